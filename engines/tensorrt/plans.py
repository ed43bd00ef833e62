"""The manifest's part on TensorRT: the lowered graph, what its network held, and the plans compiled from it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from engines.contract import Contract
from engines.fields import check_fields
from engines.manifest import Manifest
from engines.tensorrt.library import LIBRARIES, LibraryName
from quasar.errors import DamagedEngineError

FOLDER = "tensorrt"
# Of values around the matmuls and in the KV cache.
ComputeType = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A compiled plan, as a path in the engine directory: it runs on one compute capability with one version."""

    file: str
    version: str
    compute_capability: str

    def fits(self, *, version: str, compute_capability: str) -> bool:
        """Whether that version on that GPU can load it."""
        return (self.version, self.compute_capability) == (version, compute_capability)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """A compiled kv_compact, as a path in the engine directory, and how to launch it (plugins.compiled)."""

    file: str
    compute_capability: str
    entry: str
    threads: int
    shared_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtFiles:
    """What one of the two libraries has in an engine directory.

    `layers` counts the parsed network's layers by TensorRT's type names; `quantized_matmuls` of the `matmuls` have both
    operands from DEQUANTIZE. `kernels` are kv_compact's, one per compute capability, where the contract has trees.
    `rescaled_channels` counts output channels whose float16 scale was moved (`export.passes.LowerToTensorRt`).
    `weights`: those that were packed for the graph; "": it reads the canonical ones.
    """

    graph: str
    compute_type: str
    rescaled_channels: int
    layers: dict[str, int]
    matmuls: int
    quantized_matmuls: int
    bindings: list[dict[str, Any]]
    profiles: dict[str, dict[str, list[list[int]]]]
    kernels: tuple[KernelFile, ...]
    plans: tuple[Plan, ...]
    weights: str = ""

    @property
    def names(self) -> list[str]:
        """Every file."""
        kernels, plans = [kernel.file for kernel in self.kernels], [plan.file for plan in self.plans]
        weights = [self.weights] if self.weights else []
        return [self.graph, *weights, *kernels, *plans]

    def check(self, contract: Contract) -> None:
        """The plans are compared with the contract when they are loaded (`engines.tensorrt.bindings`)."""

    def to_json(self) -> dict[str, Any]:
        """The manifest's `backends.tensorrt` or `backends.tensorrt-rtx`."""
        value = asdict(self)
        if not self.weights:
            # Earlier versions do not know the field.
            del value["weights"]
        return {
            **value,
            "kernels": [asdict(kernel) for kernel in self.kernels],
            "plans": [asdict(plan) for plan in self.plans],
        }

    @classmethod
    def from_json(cls, library: str, value: Any) -> "TensorRtFiles":
        """Read that part; raises `DamagedEngineError` naming what does not fit."""
        what = f"backends.{library}"
        lists = {"bindings", "kernels", "plans"}
        scalars = {
            "graph": str,
            "compute_type": str,
            "rescaled_channels": int,
            "layers": dict,
            "matmuls": int,
            "quantized_matmuls": int,
            "profiles": dict,
            **({"weights": str} if isinstance(value, Mapping) and "weights" in value else {}),
        }
        if not isinstance(value, Mapping) or not all(isinstance(value.get(name), list) for name in lists):
            raise DamagedEngineError(f"manifest.json: {what} lacks a list of bindings, kernels or plans")
        checked = check_fields(what, {key: item for key, item in value.items() if key not in lists}, scalars)
        if checked["compute_type"] not in get_args(ComputeType):
            raise DamagedEngineError(f"manifest.json: {what}.compute_type is {checked['compute_type']!r}")
        plan = {"file": str, "version": str, "compute_capability": str}
        kernel = {"file": str, "compute_capability": str, "entry": str, "threads": int, "shared_bytes": int}
        return cls(
            **checked,
            bindings=value["bindings"],
            kernels=tuple(KernelFile(**check_fields(f"{what}.kernels", one, kernel)) for one in value["kernels"]),
            plans=tuple(Plan(**check_fields(f"{what}.plans", one, plan)) for one in value["plans"]),
        )


def tensorrt_files(manifest: Manifest) -> dict[LibraryName, TensorRtFiles]:
    """The parts of a manifest on TensorRT, by library."""
    parts = {library: manifest.backends.get(library) for library in LIBRARIES}
    return {library: part for library, part in parts.items() if isinstance(part, TensorRtFiles)}
