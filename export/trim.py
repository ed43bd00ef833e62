"""An engine directory for native kernels alone: what only other back ends read is left out, once all is measured."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from calibration.precisions.base import NATIVE
from calibration.precisions.catalog import choices_on, refusal
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.kernels import choose_kernels
from quasar.errors import BuildError
from quasar.files import atomic_path


def check_native(files: OnnxRuntimeFiles, precisions: Iterable[str], asked: str) -> None:
    """Raise `QuasarError` where no native kernels can run an engine with these graphs, or not on this machine.

    `asked`: the option that needs them.
    """
    if reason := refusal(precisions, NATIVE):
        raise BuildError(f"{asked} came, and {reason}: leave it out, or take --precision {choices_on(NATIVE)}")
    if not files.native_graph:
        raise BuildError(
            f"{asked} came, and native kernels take heads of up to 256 values and linears of up to 65536 "
            "inputs, which this model exceeds: leave it out"
        )
    # The build measures what it publishes.
    choose_kernels(NATIVE, files)


def native_alone(files: OnnxRuntimeFiles) -> OnnxRuntimeFiles:
    """What is left of the graphs of a whole directory."""
    return replace(without_stock(files), native_shared=f"{files.native_graph}.shared.data")


def without_stock(files: OnnxRuntimeFiles) -> OnnxRuntimeFiles:
    """The graphs without those that ONNX Runtime's own kernels run."""
    return replace(files, graph="", probe="", weights="")


def trim_to_native(directory: Path, canonical: str, files: OnnxRuntimeFiles) -> None:
    """Leave what native kernels read; a run that was killed anywhere is finished by the next.

    Tensors that the native graphs share with others go to a file of their own. Only then does anything disappear, the
    canonical graph last: as long as it is there, its weights are, and everything is written again.
    """
    left = native_alone(files)
    if (directory / canonical).is_file():
        _own_shared_tensors(directory, canonical, left)
    for name in (files.graph, files.probe, files.weights, canonical, f"{canonical}.data"):
        if name:
            (directory / name).unlink(missing_ok=True)


def _own_shared_tensors(directory: Path, canonical: str, files: OnnxRuntimeFiles) -> None:
    """Write what the native graphs read of the canonical weights, and make them read it there."""
    # Imported here, since a refusal does not wait for it.
    import onnx_ir as ir

    from export.weight_file import WeightFile  # it imports onnx_ir

    source = ir.load(directory / canonical).graph.initializers
    models = {name: ir.load(directory / name) for name in files.native_graphs}
    shared: dict[str, ir.ExternalTensor] = {}
    path = directory / files.native_shared
    with atomic_path(path) as temporary, WeightFile(temporary, directory, named=path) as weights:
        for value in (value for model in models.values() for value in model.graph.initializers.values()):
            tensor, name = value.const_value, str(value.name)
            if not isinstance(tensor, ir.ExternalTensor) or tensor.location == files.native_weights:
                continue
            if name not in shared:
                stored = source[name].const_value
                assert stored is not None
                shared[name] = weights.append(name, stored.numpy())
            value.const_value = shared[name]
    for name, model in models.items():
        with atomic_path(directory / name) as temporary:
            ir.save(model, temporary)
