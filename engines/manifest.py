"""`manifest.json`: what was built, from which bytes, and how it was measured (docs/engine-directory.md)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from engines.contract import MAX_WIDTH, Contract
from engines.costs import CURVE_ROWS, CostSurface
from engines.fields import check_fields
from engines.noise import Noise
from engines.row_invariance import RowInvariance
from engines.tensorrt.library import LIBRARIES, LibraryName
from engines.tensorrt.plans import FOLDER as TENSORRT_FOLDER
from engines.tensorrt.plans import TensorRtFiles
from engines.text_files import TextFiles
from plugins.sample_token import SAMPLER
from quasar.errors import DamagedEngineError, NewerEngineError
from quasar.files import sha256_json

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

_KEYS = {
    "format_version": int,
    "producer": dict,
    "model": dict,
    "precision": str,
    "sampler": str,
    "linears": dict,
    "contract": dict,
    "text": dict,
    "sampling_defaults": dict,
    "calibration": dict,
    "fidelity": dict,
    "row_invariance": dict,
    "cost_curve_ms": dict,
    "cost_surface_ms": dict,
    "machine": dict,
    "backends": dict,
    "files": dict,
    "hashes": dict,
}
_MODEL = {
    "name": str,
    "source": str,
    "architecture": str,
    "parameters": int,
    "checkpoint_bytes": int,
    "context_length": int,
}
_FIRST_SAMPLER = "gumbel-max philox4x64-10 v1"
# Keys of `hashes` that say what was done to what the KV cache holds: engines may share rows only where they are equal.
CACHE_TREATMENTS = {
    "cache_value_smoothing": "the smoothing of v_proj and o_proj",
    "cache_query_key": "the treatment of queries and keys",
    "cache_rotation": "the rotation",
}
_OPTIONAL_FILES = ("weights", "native_graph", "native_probe", "native_weights")
_FIGURES = {"mean_kl_nats", "top1_agreement", "perplexity", "perplexity_float", "tokens"}
_FIDELITY = _FIGURES | {"continuation", "prompts", "prompts_sha256"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeFiles:
    """The lowered graph, its cut-down copy for probes and the integer check, as paths in the engine directory.

    `weights`: of linears in blocks, as MatMulNBits reads them; "" without such.
    `native_graph` and `native_probe`: the same for the native operators; "" in engines of earlier versions.
    `native_weights`: what those read, packed.
    """

    graph: str
    probe: str
    probe_layers: int
    integer_check: str
    weights: str = ""
    native_graph: str = ""
    native_probe: str = ""
    native_weights: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """Every file."""
        return tuple(name for name in self.to_json().values() if isinstance(name, str))

    def to_json(self) -> dict[str, Any]:
        """The manifest's `backends.onnxruntime`; what is not there is left out."""
        return {name: value for name, value in asdict(self).items() if value != ""}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "OnnxRuntimeFiles":
        """Read it; raises `DamagedEngineError` naming what does not fit."""
        optional = dict.fromkeys((name for name in _OPTIONAL_FILES if name in value), str)
        required = {"graph": str, "probe": str, "probe_layers": int, "integer_check": str}
        return cls(**check_fields("backends.onnxruntime", value, required | optional))


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRecord:
    """What was measured on one machine: probes, whether exact integer kernels must be asked for, and costs.

    `cost_noise` None: engines of earlier versions do not tell.
    """

    machine: dict[str, Any]
    row_invariance: RowInvariance
    exact_integers: bool
    cost_surface_ms: CostSurface
    cost_noise: Noise | None = None

    def to_json(self) -> dict[str, Any]:
        """The keys of the manifest that belong to a machine; the user cache keeps the same ones."""
        surface = {
            str(rows): {str(width): ms for width, ms in by_width.items()}
            for rows, by_width in self.cost_surface_ms.items()
        }
        rows = CURVE_ROWS if CURVE_ROWS in self.cost_surface_ms else max(self.cost_surface_ms)
        return {
            "row_invariance": {**asdict(self.row_invariance), "boundaries": list(self.row_invariance.boundaries)},
            "cost_curve_ms": surface[str(rows)],
            "cost_surface_ms": surface,
            **({} if self.cost_noise is None else {"cost_noise": self.cost_noise.to_json()}),
            "machine": {**self.machine, "exact_integers": self.exact_integers},
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "MachineRecord":
        """Read those keys; raises `DamagedEngineError` naming what does not fit."""
        invariance = value["row_invariance"]
        chain, widest = invariance.get("chain", 0), invariance.get("widest")
        if not (isinstance(widest, int) and (chain is None or (isinstance(chain, int) and 1 <= chain <= widest))):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; 1 <= chain <= widest expected")
        if widest > MAX_WIDTH or not isinstance(invariance.get("tree"), bool):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; widest or tree does not fit")
        # Absent in engines that earlier versions built: not probed.
        if not isinstance(prefill := invariance.get("prefill", False), bool):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; prefill does not fit")
        boundaries = invariance.get("boundaries")
        if not isinstance(boundaries, list) or not all(isinstance(total, int) for total in boundaries):
            raise DamagedEngineError(f"manifest.json: row_invariance is {invariance!r}; boundaries must be totals")
        machine = dict(value["machine"])
        exact = machine.pop("exact_integers", None)
        try:
            surface = {
                int(rows): {int(width): float(ms) for width, ms in by_width.items()}
                for rows, by_width in value["cost_surface_ms"].items()
            }
        except (ValueError, TypeError, AttributeError):
            raise DamagedEngineError("manifest.json: cost_surface_ms must map rows to widths to milliseconds") from None
        if not isinstance(exact, bool) or not surface or not all(surface.values()):
            raise DamagedEngineError("manifest.json: machine.exact_integers or cost_surface_ms is missing")
        return cls(
            machine=machine,
            row_invariance=RowInvariance(
                chain=chain,
                widest=widest,
                boundaries=tuple(sorted(boundaries)),
                tree=invariance["tree"],
                prefill=prefill,
            ),
            exact_integers=exact,
            cost_surface_ms=surface,
            cost_noise=Noise.from_json(value.get("cost_noise")),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest of an engine directory."""

    producer: dict[str, str]
    model: dict[str, Any]
    precision: str
    sampler: str
    linears: dict[str, str]
    contract: Contract
    text: TextFiles
    calibration: dict[str, Any]
    fidelity: dict[str, Any]
    record: MachineRecord
    onnxruntime: OnnxRuntimeFiles
    tensorrt: dict[LibraryName, TensorRtFiles]
    files: dict[str, dict[str, Any]]
    hashes: dict[str, str]
    sampling_defaults: dict[str, float | int] = field(default_factory=dict)

    @property
    def engine_hash(self) -> str:
        """Names the engine: the hash over its contract and its files' hashes, but not over what TensorRT compiled."""
        return engine_hash(self.files, self.contract, self.text, self.onnxruntime)

    @property
    def skipped_layers(self) -> str:
        """Layers of the checkpoint that were left out, as the build was told (`--skip-layers`); "" for none."""
        return str(self.model.get("skipped_layers", ""))

    def to_json(self) -> dict[str, Any]:
        """The file's content, keys in reading order."""
        return {
            "format_version": FORMAT_VERSION,
            "producer": self.producer,
            "model": self.model,
            "precision": self.precision,
            "sampler": self.sampler,
            "contract": self.contract.to_json(),
            "text": self.text.to_json(),
            **({"sampling_defaults": self.sampling_defaults} if self.sampling_defaults else {}),
            "fidelity": self.fidelity,
            **self.record.to_json(),
            "backends": {
                "onnxruntime": self.onnxruntime.to_json(),
                **{library: files.to_json() for library, files in self.tensorrt.items()},
            },
            "calibration": self.calibration,
            "linears": self.linears,
            "hashes": self.hashes,
            "files": self.files,
        }

    @classmethod
    def from_json(cls, value: Any) -> "Manifest":
        """Read a manifest; raises `NewerEngineError`, or `DamagedEngineError` naming what does not fit."""
        came = value.get("format_version") if isinstance(value, dict) else None
        if isinstance(came, int) and came > FORMAT_VERSION:
            raise NewerEngineError(
                f"manifest.json has format version {came}, this installation reads up to {FORMAT_VERSION}: "
                "upgrade quasar-verifier, or build the engine again with this version"
            )
        # Engines that earlier versions built name no sampler; the first one is theirs.
        value = check_fields(
            "the top level",
            {"sampler": _FIRST_SAMPLER, "sampling_defaults": {}, **value} if isinstance(value, dict) else value,
            # Absent in engines that earlier versions built.
            _KEYS | ({"cost_noise": dict} if isinstance(value, dict) and "cost_noise" in value else {}),
        )
        if value["sampler"] != SAMPLER:
            raise NewerEngineError(
                f"manifest.json names the sampler {value['sampler']!r}, this installation has {SAMPLER!r}, which would "
                "draw other texts: take the version of quasar-verifier that built the engine, or build it again with "
                "this one"
            )
        present = [library for library in LIBRARIES if library in value["backends"]]
        backends = check_fields("backends", value["backends"], dict.fromkeys(["onnxruntime", *present], dict))
        check_fields("model", value["model"], _MODEL | dict.fromkeys({"skipped_layers"} & value["model"].keys(), str))
        if value["fidelity"].keys() != _FIDELITY or value["fidelity"]["continuation"].keys() != _FIGURES:
            raise DamagedEngineError(f"manifest.json: fidelity has the keys {sorted(value['fidelity'])}")
        files = {
            name: check_fields(f"files[{name!r}]", entry, {"bytes": int, "sha256": str})
            for name, entry in value["files"].items()
        }
        return cls(
            producer=value["producer"],
            model=value["model"],
            precision=value["precision"],
            sampler=value["sampler"],
            linears=value["linears"],
            contract=Contract.from_json(value["contract"]),
            text=TextFiles.from_json(value["text"]),
            calibration=value["calibration"],
            fidelity=value["fidelity"],
            record=MachineRecord.from_json(value),
            onnxruntime=OnnxRuntimeFiles.from_json(backends["onnxruntime"]),
            tensorrt={library: TensorRtFiles.from_json(library, backends[library]) for library in present},
            files=files,
            hashes=value["hashes"],
            sampling_defaults=_sampling(value["sampling_defaults"]),
        )


def _sampling(value: Mapping[str, Any]) -> dict[str, float | int]:
    for name, item in value.items():
        if not isinstance(item, (int, float)) or isinstance(item, bool):
            raise DamagedEngineError(f"manifest.json: sampling_defaults.{name} is {item!r}; a number was expected")
    return dict(value)


def engine_hash(
    files: Mapping[str, Mapping[str, Any]], contract: Contract, text: TextFiles, backend: OnnxRuntimeFiles
) -> str:
    """Hex SHA-256 over every file's hash, the contract, and which file serves what.

    What lies under tensorrt/ is a cache that can be compiled again from the rest, so adding to it keeps the name.
    """
    return sha256_json(
        {
            "files": {name: files[name]["sha256"] for name in files if not name.startswith(f"{TENSORRT_FOLDER}/")},
            "contract": contract.to_json(),
            "text": text.to_json(),
            "onnxruntime": backend.to_json(),
        }
    )


def read_manifest(path: Path) -> tuple[Manifest, dict[str, Any]]:
    """The manifest and its raw JSON; raises an `EngineError` if it is damaged or newer."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DamagedEngineError(f"{path} cannot be read ({error}): build the engine again") from None
    try:
        return Manifest.from_json(value), value
    except DamagedEngineError as error:
        raise DamagedEngineError(f"{path.parent}: {error}: build the engine again") from None
