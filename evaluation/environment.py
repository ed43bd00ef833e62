"""This machine and installation, as far as they decide what runs: for people, and for reports of faults."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import quasar
from engines.gpu.driver import find_gpu
from engines.machine import INSTRUCTION_SETS, cpu_quota, read_processor, usable_cores
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.kernels import choose_kernels

# Distributions whose versions are told: what the runtime needs, and then the extras.
_DISTRIBUTIONS = (
    *("numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "jinja2", "typer", "rich"),
    *("torch", "transformers", "onnx", "onnx-ir", "safetensors", "ml-dtypes", "gguf"),
    *("huggingface_hub", "tensorrt", "tensorrt-rtx", "polygraphy", "cuda-python", "triton", "matplotlib"),
    "rouge-score",
)
# Stands for an engine that has native graphs; no file is opened.
_ANY_ENGINE = OnnxRuntimeFiles(
    graph="verifier.onnx", probe="", probe_layers=0, integer_check="", native_graph="native.onnx"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What `quasar env` shows.

    `packages`: distribution → version, None where it is not installed. `cores` are the machine's, `usable_cores` those
    that this process may use, `cpu_quota` what its control groups grant (None: no limit). `kernels`: those of ONNX
    Runtime that an engine of this version would run on, "" without ONNX Runtime; `kernels_reason`: why it is these.
    `gpu`: name, compute capability and driver; None with `gpu_reason`.
    """

    quasar_verifier: str
    python: str
    system: str
    packages: dict[str, str | None]
    processor: str
    instruction_sets: tuple[str, ...]
    cores: int
    usable_cores: int
    cpu_quota: float | None
    kernels: str
    kernels_reason: str
    gpu: dict[str, str] | None
    gpu_reason: str

    def to_json(self) -> dict[str, Any]:
        """The command's JSON."""
        return {**asdict(self), "instruction_sets": list(self.instruction_sets)}

    def lines(self) -> list[tuple[str, str]]:
        """A title and a text for each line that people read."""
        quota = "" if self.cpu_quota is None else f", CPU quota {self.cpu_quota:g}"
        return [
            ("quasar-verifier", self.quasar_verifier),
            ("python", f"{self.python}, {self.system}"),
            *((name, found) for name, found in self.packages.items() if found is not None),
            ("cpu", self.processor),
            ("instructions", " ".join(self.instruction_sets) or "none of those that choose kernels"),
            ("cores", f"{self.usable_cores} usable of {self.cores}{quota}"),
            ("kernels", f"{self.kernels or 'none'} ({self.kernels_reason})"),
            ("gpu", self.gpu_reason if self.gpu is None else ", ".join(self.gpu.values())),
        ]


def read_environment() -> Environment:
    """Look at this machine and installation; versions are read from metadata, and torch and the like not imported."""
    processor, flags = read_processor()
    kernels, reason = _kernels()
    search = find_gpu()
    return Environment(
        quasar_verifier=_version("quasar-verifier") or quasar.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages={name: _version(name) for name in _DISTRIBUTIONS},
        processor=processor,
        instruction_sets=tuple(flag for flag in INSTRUCTION_SETS if flag in flags),
        cores=os.cpu_count() or 1,
        usable_cores=usable_cores(),
        cpu_quota=cpu_quota(),
        kernels=kernels,
        kernels_reason=reason,
        gpu=None if search.found is None else asdict(search.found),
        gpu_reason=search.reason,
    )


def _kernels() -> tuple[str, str]:
    """The name of the kernels, and why it is these."""
    if find_spec("onnxruntime") is None:
        return "", "ONNX Runtime is not installed: run pip install 'quasar-verifier[cpu]'"
    chosen = choose_kernels(None, _ANY_ENGINE)
    return chosen.name, chosen.reason or "the compiled operators load, and this CPU has the instructions"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
