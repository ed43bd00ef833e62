"""The manifest's part on CUDA: the program, its weights, and kernels by compute capability."""

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.contract import Contract
from engines.cuda.program import Attention, Program
from engines.fields import check_fields
from engines.manifest import Manifest
from plugins.gpu.variants import KERNELS_VERSION
from quasar.errors import DamagedEngineError

NAME = "cuda"
FOLDER = "cuda"
CACHE_TYPES = ("float16", "bfloat16", "int8")
# In a kernels' file: their version, and what is known of each kernel. Its image is `<name>.cubin`.
_INDEX = "kernels.json"
# What reading raises of a file that is no zip, lacks a part, or holds other bytes than were written.
_DAMAGE = (zipfile.BadZipFile, zlib.error, KeyError, ValueError)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRecord:
    """A compiled kernel: how it is launched (plugins.compiled), and what a thread takes.

    `registers` of a thread; `spilled_bytes` of them that lie in memory; `shared_bytes` of a program.
    """

    name: str
    entry: str
    threads: int
    shared_bytes: int
    types: tuple[str, ...]
    registers: int
    spilled_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelsFile:
    """The kernels for one compute capability, as a path in the engine directory.

    `cuda`: version of the assembler that made them; a driver for the same first number, or a later one, runs them.
    """

    file: str
    compute_capability: str
    cuda: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaHeadFiles:
    """What CUDA has of a draft head, whose tensors lie among the verifier's.

    `graph`: that of the manifest's `draft_head` which it was compiled from; where the manifest names another one, the
    head was added since. `verifier`: the verifier's program where it tells what the head reads; `program`: the head's.
    """

    graph: str
    verifier: str
    program: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaFiles:
    """What CUDA has in an engine directory. `cache_type`: float16, bfloat16 or int8."""

    program: str
    weights: str
    cache_type: str
    kernels: tuple[KernelsFile, ...]
    draft_head: CudaHeadFiles | None = None

    @property
    def names(self) -> list[str]:
        """Every file."""
        head = [] if self.draft_head is None else [self.draft_head.verifier, self.draft_head.program]
        return [self.program, self.weights, *head, *(one.file for one in self.kernels)]

    def check(self, contract: Contract) -> None:
        """The program is compared with the contract when it is loaded (`check_program`)."""

    def kernels_for(self, compute_capability: str) -> KernelsFile | None:
        """Those that a GPU runs."""
        return next((one for one in self.kernels if one.compute_capability == compute_capability), None)

    def to_json(self) -> dict[str, Any]:
        """The manifest's `backends.cuda`."""
        part = {**asdict(self), "kernels": [asdict(one) for one in self.kernels]}
        if self.draft_head is None:
            del part["draft_head"]
        return part

    @classmethod
    def from_json(cls, value: Any) -> "CudaFiles":
        """Read that part; raises `DamagedEngineError` naming what does not fit."""
        what = f"backends.{NAME}"
        expected: dict[str, Any] = {"program": str, "weights": str, "cache_type": str, "kernels": list}
        if isinstance(value, Mapping) and "draft_head" in value:
            expected["draft_head"] = dict
        checked = check_fields(what, value, expected)
        if checked["cache_type"] not in CACHE_TYPES:
            raise DamagedEngineError(f"manifest.json: {what}.cache_type is {checked['cache_type']!r}")
        one = {"file": str, "compute_capability": str, "cuda": str}
        kernels = tuple(KernelsFile(**check_fields(f"{what}.kernels", item, one)) for item in checked["kernels"])
        head = checked.pop("draft_head", None)
        if head is not None:
            head = CudaHeadFiles(
                **check_fields(f"{what}.draft_head", head, dict.fromkeys(("graph", "verifier", "program"), str))
            )
        return cls(**{**checked, "kernels": kernels}, draft_head=head)


def cuda_files(manifest: Manifest) -> CudaFiles | None:
    """The part of a manifest on CUDA, if it has one."""
    section = manifest.backends.get(NAME)
    return section if isinstance(section, CudaFiles) else None


def has_cuda_head(manifest: Manifest) -> bool:
    """Whether the engine's draft head was compiled for CUDA."""
    head, files = manifest.draft_head, cuda_files(manifest)
    compiled = None if files is None else files.draft_head
    return head is not None and compiled is not None and compiled.graph == head.graph


def read_program(path: Path) -> Program:
    """The program of a file; raises `DamagedEngineError`."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedEngineError(f"{path} is no JSON ({error}): compile the engine again") from None
    try:
        return Program.from_json(value, path.name)
    except DamagedEngineError as error:
        # Of an earlier version, most likely: steps get fields.
        raise DamagedEngineError(f"{error}: compile the engine again") from None


def check_program(path: Path, program: Program, contract: Contract) -> None:
    """Raise `DamagedEngineError` if a file's program is that of an engine with other sizes."""
    layers = sum(isinstance(step, Attention) for step in program.steps)
    came = (layers, program.reach, program.top_k)
    expected = (contract.num_layers, contract.max_width, contract.top_k)
    if came != expected:
        raise DamagedEngineError(
            f"{path} is of an engine with {came[0]} layers, passes of up to {came[1]} tokens and {came[2]} likeliest "
            f"tokens; this one has {expected[0]}, {expected[1]} and {expected[2]}: compile the engine again"
        )


def write_kernels(path: Path, kernels: Mapping[str, bytes], records: list[KernelRecord]) -> None:
    """Images by name, and what is known of each, as one file: the same bytes for the same kernels."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        known = {"version": KERNELS_VERSION, "kernels": [asdict(record) for record in records]}
        index = json.dumps(known, indent=1)
        for name, data in [(_INDEX, index.encode()), *((f"{name}.cubin", image) for name, image in kernels.items())]:
            # Without a date of its own.
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)


def kernels_version(path: Path) -> int:
    """The `KERNELS_VERSION` of a kernels' file; raises `DamagedEngineError`."""
    return _read_index(path)[0]


def _read_index(path: Path) -> tuple[int, list[Any]]:
    """The version of the kernels, and what is known of each."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = json.loads(archive.read(_INDEX))
    except _DAMAGE as error:
        raise DamagedEngineError(f"{path} holds no kernels ({error}): compile the engine again") from None
    if isinstance(found, list):
        # As version 1 was written.
        return 1, found
    if not (
        isinstance(found, dict) and isinstance(found.get("kernels"), list) and isinstance(found.get("version"), int)
    ):
        raise DamagedEngineError(f"{path} holds no kernels ({_INDEX} names none): compile the engine again")
    return found["version"], found["kernels"]


def read_kernel_records(path: Path) -> list[KernelRecord]:
    """What a kernels' file has; raises `DamagedEngineError`."""
    _, found = _read_index(path)
    expected: dict[str, Any] = {
        "name": str,
        "entry": str,
        "threads": int,
        "shared_bytes": int,
        "types": list,
        "registers": int,
        "spilled_bytes": int,
    }
    checked = (check_fields("a kernel", one, expected, file=path.name) for one in found)
    return [KernelRecord(**{**one, "types": tuple(one["types"])}) for one in checked]


def read_kernels(path: Path) -> Iterator[tuple[KernelRecord, bytes]]:
    """Every kernel with its image; raises `DamagedEngineError`."""
    records = read_kernel_records(path)
    with zipfile.ZipFile(path) as archive:
        for record in records:
            try:
                image = archive.read(f"{record.name}.cubin")
            except _DAMAGE as error:
                raise DamagedEngineError(f"{path} lacks the kernel {record.name}: compile the engine again") from error
            yield record, image
