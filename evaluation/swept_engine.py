"""What a sweep finds of one recipe."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptEngine:
    """One recipe: its engine, what a pass reads, fidelity, scores of tasks, and milliseconds by kernels and width."""

    recipe: str
    directory: Path
    bytes_per_pass: int
    fidelity: dict[str, Any]
    tasks: dict[str, Any]
    ms: dict[str, dict[int, float]]

    def to_json(self) -> dict[str, Any]:
        """The sweep's entry."""
        return {
            "recipe": self.recipe,
            "engine": self.directory.name,
            "bytes_per_pass": self.bytes_per_pass,
            "fidelity": self.fidelity,
            "tasks": self.tasks,
            "ms": {kernels: {str(width): ms for width, ms in curve.items()} for kernels, curve in self.ms.items()},
        }
