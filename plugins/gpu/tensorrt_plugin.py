"""quantize_per_token as a TensorRT quick plugin with an ahead-of-time kernel: full TensorRT only.

TensorRT takes the kernel as PTX and launches it itself: a plan that was compiled with it needs neither Python nor
Triton. The stock operators are the default; this is an option.
"""

import importlib
import re
from typing import Any

from plugins.gpu.kernel import Kernel
from plugins.gpu.quantize_per_token import KERNELS

PLUGIN_ID = "quasar::quantize_per_token"


def register(tensorrt: Any, compute_capability: str) -> None:
    """Make the plugin known to TensorRT's registry in this process; a second call does nothing."""
    trtp = importlib.import_module(f"{tensorrt.__name__}.plugin")
    registry = importlib.import_module(f"{tensorrt.__name__}.plugin._lib").QDP_REGISTRY
    if PLUGIN_ID in registry:
        return
    desc, launch, expressions = trtp.TensorDesc, trtp.KernelLaunchParams, trtp.SymIntExprs
    several: Any = tuple

    def describe(x):  # type: ignore[no-untyped-def]
        shape = tuple(x.shape_expr[axis] for axis in range(x.ndim))
        integers = trtp.from_shape_expr(shape, tensorrt.int8)
        return integers, trtp.from_shape_expr((*shape[:-1], 1), tensorrt.float32)

    # TensorRT reads the signature: plain annotations would be evaluated where its types are not imported.
    describe.__annotations__ = {"x": desc, "return": several[desc, desc]}

    def implement(x, outputs, tactic):  # type: ignore[no-untyped-def]  # noqa: ARG001 - one kernel for all
        kernel = KERNELS[{tensorrt.float32: "float32", tensorrt.float16: "float16"}.get(x.dtype, "bfloat16")]
        compiled = kernel.compile(compute_capability)
        columns = x.shape_expr[x.ndim - 1]
        params = launch()
        params.grid_x = trtp.SymInt32(x.shape_expr[0] * x.shape_expr[1])
        params.block_x = compiled.threads
        params.shared_mem = compiled.shared_bytes
        arguments = expressions(2)
        arguments[0] = arguments[1] = trtp.SymInt32(columns)
        return compiled.entry, own_parameters_only(compiled.ptx, kernel), params, arguments

    implement.__annotations__ = {
        "x": desc,
        "outputs": several[desc, desc],
        "tactic": int,
        "return": several[str | bytes, str | bytes, launch, expressions],
    }
    trtp.register(PLUGIN_ID)(describe)
    trtp.aot_impl(PLUGIN_ID)(implement)


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
