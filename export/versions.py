"""Versions of the tools that an engine depends on; they are part of a build's inputs and of its manifest."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

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
