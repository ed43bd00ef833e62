"""`manifest.json`: what was built, from which bytes, and how it was measured (docs/engine-directory.md)."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.backends import Section, UnknownSection, all_backends
from engines.contract import Contract
from engines.draft_head import FOLDER as DRAFT_HEAD
from engines.draft_head import DraftHeadFiles
from engines.fields import check_fields
from engines.record import MachineRecord
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
    "build_seconds": dict,
    "backends": dict,
    "files": dict,
    "hashes": dict,
}
_OPTIONAL = {"cost_noise", "draft_head"}
_MODEL = {
    "name": str,
    "source": str,
    "architecture": str,
    "parameters": int,
    "checkpoint_bytes": int,
    "context_length": int,
}
_FIRST_SAMPLER = "gumbel-max philox4x64-10 v1"
# Keys of `hashes` that say what was done to keys and values: engines may share cache positions only where they agree.
CACHE_ROTATION = "cache_rotation"
CACHE_TREATMENTS = {
    "cache_value_smoothing": "the smoothing of v_proj and o_proj",
    "cache_query_key": "the treatment of queries and keys",
    CACHE_ROTATION: "the rotation",
}
# What they say where nothing was done.
UNTREATED = "none"
# The key for the scales of an INT8 cache; there is none for other types.
CACHE_SCALES = "cache_scales"
_FIGURES = {"mean_kl_nats", "top1_agreement", "perplexity", "perplexity_float", "tokens"}
_FIDELITY = _FIGURES | {"continuation", "prompts", "prompts_sha256"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest of an engine directory.

    `backends`: what each back end has in it, by name, read by the back end itself (`engines.backends`).
    `build_seconds`: what each stage of the build took. `draft_head`: what drafts for the verifier, if there is one.
    """

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
    backends: dict[str, Section]
    files: dict[str, dict[str, Any]]
    hashes: dict[str, str]
    sampling_defaults: dict[str, float | int] = field(default_factory=dict)
    build_seconds: dict[str, float] = field(default_factory=dict)
    draft_head: DraftHeadFiles | None = None

    @property
    def engine_hash(self) -> str:
        """Names the engine: the hash over its contract and its files' hashes, without what was compiled from them."""
        return engine_hash(self.files, self.contract, self.text, self.backends)

    @property
    def skipped_layers(self) -> str:
        """Layers of the checkpoint that were left out, as the build was told (`--skip-layers`); "" for none."""
        return str(self.model.get("skipped_layers", ""))

    @property
    def is_rotated(self) -> bool:
        """Whether hidden states and values are those of the checkpoint, turned (`--rotate`)."""
        return self.hashes.get(CACHE_ROTATION, UNTREATED) != UNTREATED

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
            **({"build_seconds": self.build_seconds} if self.build_seconds else {}),
            "backends": {name: section.to_json() for name, section in self.backends.items()},
            **({} if self.draft_head is None else {"draft_head": self.draft_head.to_json()}),
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
            {"sampler": _FIRST_SAMPLER, "sampling_defaults": {}, "build_seconds": {}, **value}
            if isinstance(value, dict)
            else value,
            # Absent in engines that earlier versions built, or without a head.
            _KEYS | dict.fromkeys(_OPTIONAL.intersection(value if isinstance(value, dict) else ()), dict),
        )
        if value["sampler"] != SAMPLER:
            raise NewerEngineError(
                f"manifest.json names the sampler {value['sampler']!r}, this installation has {SAMPLER!r}, which would "
                "draw other tokens: take the version of quasar-verifier that built the engine, or build it again with "
                "this one"
            )
        check_fields("model", value["model"], _MODEL | dict.fromkeys({"skipped_layers"} & value["model"].keys(), str))
        if value["fidelity"].keys() != _FIDELITY:
            raise DamagedEngineError(f"manifest.json: fidelity has the keys {sorted(value['fidelity'])}")
        check_fields("fidelity.continuation", value["fidelity"]["continuation"], dict.fromkeys(_FIGURES, float))
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
            backends=_read_sections(value["backends"]),
            files=files,
            hashes=value["hashes"],
            sampling_defaults=_numbers("sampling_defaults", value["sampling_defaults"]),
            build_seconds=_numbers("build_seconds", value["build_seconds"]),
            draft_head=DraftHeadFiles.from_json(value["draft_head"]) if "draft_head" in value else None,
        )


def _numbers(key: str, value: Mapping[str, Any]) -> dict[str, float | int]:
    for name, item in value.items():
        if not isinstance(item, (int, float)) or isinstance(item, bool):
            raise DamagedEngineError(f"manifest.json: {key}.{name} is {item!r}; a number was expected")
    return dict(value)


def _read_sections(value: Mapping[str, Any]) -> dict[str, Section]:
    """Each part by its own back end; those of back ends that this installation does not know stay as they are."""
    known = all_backends()
    own = {name: value[name] for name in known if name in value}
    required = [name for name, backend in known.items() if backend.in_every_build]
    check_fields("backends", own, dict.fromkeys([*required, *own], dict))
    sections: dict[str, Section] = {name: known[name].read_section(part) for name, part in own.items()}
    return sections | {name: UnknownSection(part) for name, part in value.items() if name not in known}


def engine_hash(
    files: Mapping[str, Mapping[str, Any]], contract: Contract, text: TextFiles, backends: Mapping[str, Section]
) -> str:
    """Hex SHA-256 over every file's hash, the contract, and which file serves what.

    Back ends that a build does not always have can be compiled again from the rest: adding one keeps the name.
    """
    known = all_backends()
    built = {name: part.to_json() for name, part in backends.items() if name in known and known[name].in_every_build}
    added = {backend.folder for backend in known.values() if not backend.in_every_build} | (backends.keys() - known)
    # So is a draft head, which changes no token.
    folders = tuple(f"{folder}/" for folder in (*added, DRAFT_HEAD))
    return sha256_json(
        {
            "files": {name: files[name]["sha256"] for name in files if not name.startswith(folders)},
            "contract": contract.to_json(),
            "text": text.to_json(),
            **built,
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
