"""The manifest's part on ONNX Runtime: its graphs, and what they read."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.contract import Contract
from engines.fields import check_fields
from engines.manifest import Manifest
from quasar.errors import BuildError, DamagedEngineError, EngineError

NAME = "onnxruntime"
_OPTIONAL_FILES = (
    *("graph", "probe", "weights"),
    *("native_graph", "native_probe", "native_draft", "native_weights", "native_shared"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeFiles:
    """The lowered graph, its cut-down copy for probes and the integer check, as paths in the engine directory.

    `graph` and `probe`: "" in engines built for native kernels alone.
    `weights`: of linears in blocks, as MatMulNBits reads them; "" without such.
    `native_graph` and `native_probe`: the same for the native operators; "" in engines of earlier versions.
    `native_draft`: the same weights with coarser activations, or over the upper tier of the cache, for drafts of the
    engine's own; "" where there are none.
    `native_weights`: what those read, packed. `native_shared`: what else they read, where there is no canonical graph
    whose file has it.
    """

    graph: str = ""
    probe: str = ""
    probe_layers: int
    integer_check: str
    weights: str = ""
    native_graph: str = ""
    native_probe: str = ""
    native_draft: str = ""
    native_weights: str = ""
    native_shared: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every file."""
        return tuple(name for name in self.to_json().values() if isinstance(name, str))

    @property
    def native_graphs(self) -> tuple[str, ...]:
        """Every graph of native operators."""
        return tuple(name for name in (self.native_graph, self.native_probe, self.native_draft) if name)

    @property
    def native_alone(self) -> bool:
        """Whether the engine was built with `--kernels native`: nothing else can run it, or be compiled from it."""
        return not self.graph

    def check(self, contract: Contract) -> None:
        """Raise `DamagedEngineError` if no graph is there, or the cut-down copy has layers that the engine has not."""
        if not self.graph and not self.native_graph:
            raise DamagedEngineError("manifest.json names no graph for ONNX Runtime")
        if not 1 <= self.probe_layers <= contract.num_layers:
            raise DamagedEngineError(f"manifest.json gives its probe {self.probe_layers} layers")

    def to_json(self) -> dict[str, Any]:
        """The manifest's `backends.onnxruntime`; what is not there is left out."""
        return {name: value for name, value in asdict(self).items() if value != ""}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "OnnxRuntimeFiles":
        """Read it; raises `DamagedEngineError` naming what does not fit."""
        optional = dict.fromkeys((name for name in _OPTIONAL_FILES if name in value), str)
        required = {"probe_layers": int, "integer_check": str}
        return cls(**check_fields("backends.onnxruntime", value, required | optional))


def onnxruntime_files(manifest: Manifest) -> OnnxRuntimeFiles:
    """The part of a manifest on ONNX Runtime."""
    section = manifest.backends.get(NAME)
    if not isinstance(section, OnnxRuntimeFiles):
        raise EngineError(f"the engine has no {NAME} back end: build it again")
    return section


def required_native_graph(directory: Path, manifest: Manifest, use: str) -> str:
    """The graph of native operators; raises `BuildError` where an engine has none.

    `use`: what needs it, a clause such as "on which draft heads run".
    """
    if native := onnxruntime_files(manifest).native_graph:
        return native
    raise BuildError(
        f"{directory} has no graph of native operators, {use}: build it again with this version, a head size of up to "
        "256 and linears of up to 65536 inputs"
    )
