"""One request through ONNX Runtime and TensorRT, layer by layer: which keys, values and logits differ, how much.

A layer's keys and values show what its attention saw, so an error that a lowering or a kernel makes appears in the
layer after it. Polygraphy's comparator makes the figures.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import Float32, to_float32
from engines.contract import INTEGER_CACHES
from engines.directory import EngineDirectory
from engines.gpu.driver import find_gpu
from engines.gpu.host_device import HostDevice, host_kernel
from engines.loading import load_opened
from engines.onnxruntime.files import NAME as ONNXRUNTIME
from engines.onnxruntime.kernels import STOCK
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.session import Session
from engines.tensorrt.host_memory import host_plan
from engines.tensorrt.library import LibraryName, import_polygraphy
from engines.tensorrt.plans import tensorrt_files
from engines.tensorrt.session import TensorRtSession
from quasar.errors import EngineError

REFERENCE = ONNXRUNTIME


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One tensor of one layer: absolute differences, and the mean one beside the reference's standard deviation."""

    tensor: str
    max_abs: float
    mean_abs: float
    relative: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendComparison:
    """A back end against ONNX Runtime over `tokens` tokens, worst tensors first.

    `ran_on`: a GPU's name, or "host memory" where the back end's graph ran on the CPU in the GPU's place.
    """

    backend: str
    ran_on: str
    tokens: int
    same_next_tokens: int
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return asdict(self)


def compare_backends(
    directory: EngineDirectory,
    token_ids: Sequence[int] | NDArray[np.int64],
    *,
    threads: int = 0,
    on_backend: Callable[[str], None] = lambda name: None,
) -> list[BackendComparison]:
    """Compare every TensorRT back end that the directory has with ONNX Runtime.

    On a machine with a GPU the plans run; on another one their graphs run on host memory.

    Raises:
        EngineError: the directory has no back end to compare, or one that should run here does not.
    """
    libraries = sorted(tensorrt_files(directory.manifest), reverse=True)
    if not libraries:
        others = [name for name in directory.manifest.backends if name != REFERENCE]
        what = f"no TensorRT back end, and {', '.join(others)} is not compared" if others else "one back end"
        raise EngineError(
            f"{directory.path} has {what}, so there is nothing to compare: add one with python -m export compile "
            f"{directory.path} --backend tensorrt-rtx"
        )
    on_backend(REFERENCE)
    # Integers of a cache are no keys and values: stock kernels have these in float32.
    kernels = STOCK if directory.manifest.contract.kv_dtype in INTEGER_CACHES else None
    options = OnnxRuntimeOptions(threads=threads, kernels=kernels)
    reference = load_opened(directory, backend=REFERENCE, options=options).session
    expected = read_tensors(reference, token_ids)
    reference.close()
    comparisons = []
    for name in libraries:
        on_backend(name)
        session, ran_on = _open(directory, name, threads)
        came = read_tensors(session, token_ids)
        session.close()
        comparisons.append(
            BackendComparison(
                backend=name,
                ran_on=ran_on,
                tokens=len(token_ids),
                same_next_tokens=int((came["logits"].argmax(-1) == expected["logits"].argmax(-1)).sum()),
                differences=differences(expected, came, libraries[0]),
            )
        )
    return comparisons


def read_tensors(session: Session, token_ids: Sequence[int] | NDArray[np.int64]) -> dict[str, Float32]:
    """Feed a sequence; read every layer's keys and values float32 [G, tokens, D] and the logits float32 [tokens, V]."""
    step = min(session.max_logits_rows, session.contract.max_width)
    logits = [
        session.run_logits(part := token_ids[start : start + step], start, len(part))
        for start in range(0, len(token_ids), step)
    ]
    tensors: dict[str, Float32] = {}
    for layer in range(session.num_layers):
        keys, values = to_float32(session.read_rows(0, len(token_ids), [layer])[0])
        tensors |= {f"layers.{layer}.key": keys, f"layers.{layer}.value": values}
    return {**tensors, "logits": np.concatenate(logits)}


def differences(expected: dict[str, Float32], came: dict[str, Float32], library: LibraryName) -> tuple[Difference, ...]:
    """Polygraphy's comparison of tensors of the same names, by falling `relative`; `library`: the one it drives."""
    import_polygraphy(library)
    from polygraphy.comparator import Comparator, IterationResult, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    runs = RunResults()
    runs.add([IterationResult(expected, runner_name=REFERENCE)], runner_name=REFERENCE)
    runs.add([IterationResult(came, runner_name="other")], runner_name="other")
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        accuracy = Comparator.compare_accuracy(runs, compare_func=SimpleCompareFunc(check_error_stat="mean"))
    (compared,) = accuracy[0][REFERENCE, "other"]
    found = [
        Difference(
            tensor=name,
            max_abs=float(result.max_absdiff),
            mean_abs=float(result.mean_absdiff),
            relative=float(result.mean_absdiff) / max(float(expected[name].std()), 1e-30),
        )
        for name, result in compared.items()
    ]
    return tuple(sorted(found, key=lambda one: -one.relative))


def _open(directory: EngineDirectory, name: LibraryName, threads: int) -> tuple[Session, str]:
    gpu = find_gpu().found
    if gpu is not None:
        return load_opened(directory, backend=name).session, gpu.name
    files, contract = tensorrt_files(directory.manifest)[name], directory.manifest.contract
    if files.compute_type == "bfloat16":
        raise EngineError(f"ONNX Runtime's CPU kernels do not run bfloat16 graphs: compare {name} on a GPU")
    device = HostDevice()
    plan = host_plan(directory.file(files.graph), directory.path, contract, device, threads=threads)
    kernel = host_kernel() if contract.tree_mask else None
    return TensorRtSession(plan, device, contract, kernel=kernel), "host memory"
