"""Two TensorRT quick plugins with ahead-of-time kernels: quantize_per_token and integer_linear. Full TensorRT only.

TensorRT takes a kernel as PTX and launches it itself, once for each plugin: a plan that was compiled with it needs
neither Python nor Triton. The stock operators are the default; these are options. A plugin's inputs are all there, and
no memory is zeroed for its kernel.
"""

import importlib
import re
from typing import Any

from plugins.gpu import integer_linear, quantize_per_token
from plugins.gpu.kernel import Kernel
from plugins.gpu.packing import INPUT_MULTIPLE, TILE_INPUTS, TILE_OUTPUTS, tiles_of

QUANTIZE, LINEAR = "quasar::quantize_per_token", "quasar::integer_linear"
# Dynamic shared memory of a launch that nobody asked more for (CUDA's cuFuncSetAttribute): TensorRT's documentation
# says nothing of asking.
_SHARED_BYTES = 48 << 10


def register(tensorrt: Any, compute_capability: str) -> None:
    """Make the plugins known to TensorRT's registry in this process; a second call does nothing."""
    trtp = importlib.import_module(f"{tensorrt.__name__}.plugin")
    registry = importlib.import_module(f"{tensorrt.__name__}.plugin._lib").QDP_REGISTRY
    for plugin_id, make in ((QUANTIZE, _quantize), (LINEAR, _linear)):
        if plugin_id not in registry:
            describe, implement = make(tensorrt, trtp, compute_capability)
            trtp.register(plugin_id)(describe)
            trtp.aot_impl(plugin_id)(implement)


def _quantize(tensorrt: Any, trtp: Any, compute_capability: str) -> tuple[Any, Any]:
    def describe(x):  # type: ignore[no-untyped-def]
        shape = tuple(x.shape_expr[axis] for axis in range(x.ndim))
        integers = trtp.from_shape_expr(shape, tensorrt.int8)
        return integers, trtp.from_shape_expr((*shape[:-1], 1), tensorrt.float32)

    def implement(x, outputs, tactic):  # type: ignore[no-untyped-def]  # noqa: ARG001 - one kernel for all
        types = {tensorrt.float32: "float32", tensorrt.float16: "float16"}
        kernel = quantize_per_token.KERNELS[types.get(x.dtype, "bfloat16")]
        columns = x.shape_expr[x.ndim - 1]
        grid = (x.shape_expr[0] * x.shape_expr[1],)
        return _launch(trtp, kernel, compute_capability, grid, (columns, columns))

    _annotate(trtp, describe, implement, ("x",), 2)
    return describe, implement


def _linear(tensorrt: Any, trtp: Any, compute_capability: str) -> tuple[Any, Any]:
    def describe(q, a, weight, scale, bias):  # type: ignore[no-untyped-def]
        types = {"q": tensorrt.int8, "a": tensorrt.float32, "weight": tensorrt.int8}
        types |= dict.fromkeys(("scale", "bias"), tensorrt.float32)
        ranks = {"q": 3, "a": 3, "weight": 4, "scale": 1, "bias": 1}
        for (name, kind), value in zip(types.items(), (q, a, weight, scale, bias), strict=True):
            if value.dtype != kind or value.ndim != ranks[name]:
                raise ValueError(
                    f"{LINEAR} takes {name} as {kind} with {ranks[name]} axes; {value.dtype} with {value.ndim} came"
                )
        return trtp.from_shape_expr((q.shape_expr[0], q.shape_expr[1], scale.shape_expr[0]), tensorrt.float32)

    def implement(q, a, weight, scale, bias, outputs, tactic):  # type: ignore[no-untyped-def]  # noqa: ARG001 - one kernel for all
        inputs, channels = _constant("inputs", q.shape_expr[2]), _constant("outputs", scale.shape_expr[0])
        if inputs % INPUT_MULTIPLE:
            raise ValueError(f"{LINEAR} takes a multiple of {INPUT_MULTIPLE} inputs; {inputs} came")
        tiles = [_constant("tiles", weight.shape_expr[axis]) for axis in range(4)]
        expected = [tiles_of(channels, TILE_OUTPUTS), tiles_of(inputs, TILE_INPUTS), TILE_OUTPUTS, TILE_INPUTS]
        if tiles != expected:
            raise ValueError(f"{LINEAR} takes a weight packed in {expected}; {tiles} came")
        tokens = q.shape_expr[0] * q.shape_expr[1]
        grid = (trtp.cdiv(tokens, integer_linear.TOKENS), expected[0])
        return _launch(trtp, integer_linear.KERNEL, compute_capability, grid, (tokens, inputs, channels))

    _annotate(trtp, describe, implement, ("q", "a", "weight", "scale", "bias"), 1)
    return describe, implement


def _constant(what: str, extent: Any) -> int:
    """A shape's extent, known when the plan is compiled."""
    if not extent.is_constant:
        raise ValueError(f"{LINEAR} takes {what} that are known when the plan is compiled")
    return int(extent.constant_value())


def _launch(
    trtp: Any, kernel: Kernel, compute_capability: str, grid: tuple[Any, ...], numbers: tuple[Any, ...]
) -> tuple[Any, ...]:
    """What TensorRT launches: the entry's name, its PTX, the launch, and the int32 arguments after the inputs."""
    compiled = kernel.compile(compute_capability)
    if compiled.shared_bytes > _SHARED_BYTES:
        raise ValueError(
            f"{compiled.entry} takes {compiled.shared_bytes} bytes of shared memory; a launch has {_SHARED_BYTES}"
        )
    params, arguments = trtp.KernelLaunchParams(), trtp.SymIntExprs(len(numbers))
    for name, extent in zip(("grid_x", "grid_y"), grid, strict=False):
        setattr(params, name, trtp.SymInt32(extent))
    params.block_x = compiled.threads
    params.shared_mem = compiled.shared_bytes
    for index, number in enumerate(numbers):
        arguments[index] = trtp.SymInt32(number)
    return compiled.entry, own_parameters_only(compiled.ptx, kernel), params, arguments


def _annotate(trtp: Any, describe: Any, implement: Any, inputs: tuple[str, ...], num_outputs: int) -> None:
    """TensorRT reads the signatures: plain annotations would be evaluated where its types are not imported."""
    several: Any = tuple
    desc = trtp.TensorDesc
    tensors = dict.fromkeys(inputs, desc)
    outputs = several[(desc,) * num_outputs]
    describe.__annotations__ = {**tensors, "return": outputs}
    implement.__annotations__ = {
        **tensors,
        "outputs": outputs,
        "tactic": int,
        "return": several[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymIntExprs],
    }


def own_parameters_only(ptx: str, kernel: Kernel) -> str:
    """PTX without the two scratch pointers after the kernel's own parameters: TensorRT does not pass them.

    Raises `ValueError` if the kernel reads one.
    """
    entry = kernel.function.__name__
    for number in (len(kernel.signature), len(kernel.signature) + 1):
        name = f"{entry}_param_{number}"
        if len(re.findall(rf"\b{name}\b", ptx)) != 1:
            raise ValueError(f"the kernel {entry} uses its scratch pointer {name}")
        ptx = re.sub(rf",\s*\.param [^,)]*\b{name}\b", "", ptx)
    return ptx
