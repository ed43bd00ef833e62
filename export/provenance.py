"""The manifest's `model` and `producer`: which checkpoint an engine was built from, and with what."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from export.build_options import BuildOptions
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.errors import BuildError

_TOOLS = ("quasar-verifier", "torch", "transformers", "onnx", "onnx-ir", "onnxruntime", "numpy")


def tool_versions() -> dict[str, str]:
    """Distribution → version; raises `BuildError` naming one that is not installed."""
    return {name: _version(name) for name in _TOOLS}


def _version(name: str) -> str:
    """A distribution's version; ONNX Runtime comes as one of several."""
    try:
        return version(name)
    except PackageNotFoundError:
        try:
            return str(import_module(name.replace("-", "_")).__version__)
        except ImportError:
            raise BuildError(f"{name} is not installed: run pip install 'quasar-verifier[cpu,build]'") from None


def model_section(options: BuildOptions, checkpoint: Checkpoint, spec: DecoderSpec) -> dict[str, Any]:
    """Name, source (where the float model is found again), sizes, and the layers that were left out, if any.

    `spec`: what is left of the checkpoint's.
    """
    source, path = options.model, Path(options.model)
    name = source
    if path.exists():
        # A link keeps its own name: what it leads to in the hub's cache is called by a hash.
        named = path.resolve() if path.name in ("", "..") else path
        # A dot in a folder's name is part of it: Llama-3.2-1B.
        name = named.stem if path.is_file() and named.suffix.lower() == ".gguf" else named.name
    return {
        "name": name,
        "source": str(path.resolve()) if path.exists() else source,
        "architecture": spec.architecture,
        "parameters": spec.num_parameters(),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "context_length": spec.context_length,
        **({"skipped_layers": options.skip_layers} if options.skip_layers else {}),
    }
