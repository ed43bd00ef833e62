"""ONNX Runtime on CPUs, as a back end."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engines.backends import CPU, Backend
from engines.directory import EngineDirectory
from engines.loaded import LoadedEngine
from engines.onnxruntime.files import NAME, OnnxRuntimeFiles
from engines.onnxruntime.kernels import check_library
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.loading import load_onnxruntime
from quasar.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeBackend(Backend):
    """Runs the lowered graph on a CPU; every engine has it, since fidelity is measured on it."""

    def read_section(self, value: Mapping[str, Any]) -> OnnxRuntimeFiles:
        """The lowered graphs."""
        return OnnxRuntimeFiles.from_json(value)

    def load(self, directory: EngineDirectory, options: OnnxRuntimeOptions) -> LoadedEngine:
        """A session on the kernels that were asked for, or on the best."""
        return load_onnxruntime(directory, options)

    def refusal(self, directory: EngineDirectory) -> str:  # noqa: ARG002 - every engine has it
        """Whether ONNX Runtime is installed."""
        try:
            check_library()
        except EngineError as error:
            return str(error)
        return ""


ONNXRUNTIME = OnnxRuntimeBackend(
    name=NAME,
    folder=NAME,
    device=CPU,
    packages=("onnxruntime",),
    in_every_build=True,
    options=OnnxRuntimeOptions,
)
