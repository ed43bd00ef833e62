"""The manifest's `model`: which checkpoint an engine was built from."""

from pathlib import Path
from typing import Any

from quasar.checkpoints import Checkpoint


def model_section(source: str, checkpoint: Checkpoint) -> dict[str, Any]:
    """Name, source (where the float model is found again) and sizes; `source` is the build's MODEL."""
    spec, path = checkpoint.spec, Path(source)
    return {
        "name": path.stem if path.exists() else source,
        "source": str(path.resolve()) if path.exists() else source,
        "architecture": spec.architecture,
        "parameters": spec.num_parameters(),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.files),
        "context_length": spec.context_length,
    }
