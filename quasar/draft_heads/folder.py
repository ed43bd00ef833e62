"""A published draft head's folder: config.json and safetensors, read lazily. Pickled weights are never opened."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.shards import check_numbers, find_shards, open_shard, read_json
from quasar.draft_heads.layouts import base_model, canonical_name, draft_head_spec
from quasar.draft_heads.spec import DraftHeadSpec, Target
from quasar.errors import CheckpointError

_FLOATS = ("F32", "F16", "BF16", "F64")
# Tokens of draft ids, as differences; and whether a target's token is one of them.
_D2T, _T2D = "d2t", "t2d"


class DraftHead:
    """A draft head of a local folder, for one target.

    `spec`: what it is. `targets`: int64 [draft_vocab_size], the target's token of each that it drafts, ascending.
    `base_model`: what its config says that it was trained for; "" if it does not.
    """

    def __init__(self, folder: Path, target: Target) -> None:
        self._folder = folder
        config = read_json(folder / "config.json", "the folder of a draft head")
        self.base_model = base_model(config)
        self._shard_of = self._index()
        try:
            self.spec: DraftHeadSpec = draft_head_spec(
                config, self._shard_of, num_layers=target.num_layers, context_length=target.context_length
            )
            self.spec.check(target)
        except CheckpointError as error:
            trained = f"; config.json says that it was trained for {self.base_model}" if self.base_model else ""
            raise CheckpointError(f"{folder}: {error}{trained}") from None
        self._check_tensors()
        self.targets: NDArray[np.int64] = self._targets()

    @property
    def location(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def files(self) -> tuple[Path, ...]:
        """The config and the shards, sorted."""
        return tuple(sorted({self._folder / "config.json", *(path for path, _ in self._shard_of.values())}))

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name (`DraftHeadSpec.tensors`), in its stored precision.

        Raises `CheckpointError` if it holds a value that is not finite.
        """
        value = self._read(name)
        if not np.isfinite(value).all():
            path, stored = self._shard_of[name]
            raise CheckpointError(f"{path}: {stored} holds values that are not finite: download it again")
        return value

    def _read(self, name: str) -> NDArray[Any]:
        path, stored = self._shard_of[name]
        with open_shard(path) as shard:
            tensor: NDArray[Any] = shard.get_tensor(stored)
        return tensor

    def _index(self) -> dict[str, tuple[Path, str]]:
        """Canonical name → (shard, name in the shard)."""
        shards, named = find_shards(self._folder, _convert)
        if not named:
            check_numbers(self._folder, shards)
        found: dict[str, tuple[Path, str]] = {}
        for path in shards:
            with open_shard(path) as shard:
                for stored in shard.keys():  # noqa: SIM118 - a safetensors handle is not a dict
                    name = canonical_name(stored)
                    if name is None:
                        continue
                    if name in found:
                        other, first = found[name]
                        raise CheckpointError(
                            f"{self._folder}: {first!r} of {other.name} and {stored!r} of {path.name} are the same "
                            "tensor: delete the file that is not part of the head, or download the folder again"
                        )
                    found[name] = (path, stored)
        for stored, file in named.items():
            name = canonical_name(stored)
            if name is not None and (name not in found or found[name][0].name != Path(str(file)).name):
                raise CheckpointError(
                    f"{self._folder}: the index says that {file} holds {stored!r}, and it does not: download the "
                    "folder again"
                )
        return found

    def _check_tensors(self) -> None:
        expected = self.spec.tensors()
        for name, shape in expected.items():
            if name not in self._shard_of:
                raise CheckpointError(
                    f"{self._folder}: the tensor {name!r} is missing from the safetensors weights, and the head's "
                    "config asks for it: download the folder again"
                )
            path, stored = self._shard_of[name]
            came, dtype = self._header(name)
            if came != shape:
                raise CheckpointError(f"{path}: {stored} has shape {list(came)}; the config asks for {list(shape)}")
            if dtype not in _FLOATS:
                raise CheckpointError(f"{path}: {stored} is stored as {dtype}; float weights were expected")
        for name, (_, stored) in self._shard_of.items():
            if name not in expected and name not in (_D2T, _T2D):
                raise CheckpointError(
                    f"{self._folder}: unexpected tensor {stored!r}: the config has no such weight, and without it this "
                    "would be another head"
                )

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and type of a stored tensor."""
        path, stored = self._shard_of[name]
        with open_shard(path) as shard:
            view = shard.get_slice(stored)
            return tuple(view.get_shape()), view.get_dtype()

    def _targets(self) -> NDArray[np.int64]:
        """The target's token of each draft id, which `d2t` says less the id itself; `t2d` must say the same."""
        drafted, total = self.spec.draft_vocab_size, self.spec.decoder.vocab_size
        targets = np.arange(drafted, dtype=np.int64)
        if _D2T in self._shard_of:
            targets = targets + self._integers(_D2T, drafted)
        elif self.spec.reduces_vocabulary:
            raise CheckpointError(
                f"{self._folder}: the tensor 'd2t' is missing, which says which {drafted} of the {total} tokens the "
                "head drafts: download the folder again"
            )
        check_targets(targets, total, f"{self._folder}: d2t")
        # Heads of all tokens have a t2d that nobody filled.
        if _T2D in self._shard_of and self.spec.reduces_vocabulary:
            said = np.flatnonzero(self._integers(_T2D, total))
            if not np.array_equal(said, targets):
                raise CheckpointError(
                    f"{self._folder}: t2d has {len(said)} tokens that the head drafts, and not the {drafted} of d2t: "
                    "download the folder again"
                )
        return targets

    def _integers(self, name: str, length: int) -> NDArray[np.int64]:
        path, stored = self._shard_of[name]
        came, dtype = self._header(name)
        if came != (length,):
            raise CheckpointError(f"{path}: {stored} has shape {list(came)}; the config asks for {[length]}")
        if dtype not in ("BOOL", "U8", "I8", "I32", "I64"):
            raise CheckpointError(f"{path}: {stored} is stored as {dtype}; integers were expected")
        return self._read(name).astype(np.int64)


def open_draft_head(path: Path, target: Target) -> DraftHead:
    """A published draft head for a target: EAGLE, EAGLE-2 or EAGLE-3, in any of the layouts of `layouts`.

    Raises `CheckpointError` naming what is missing or damaged, what is not supported, and what does not fit the target.
    """
    return DraftHead(path, target)


def check_targets(targets: NDArray[np.int64], vocab_size: int, where: str) -> None:
    """Raise `CheckpointError` if what a head drafts is not so many different tokens of the target, ascending."""
    outside = targets[(targets < 0) | (targets >= vocab_size)]
    if len(outside):
        raise CheckpointError(f"{where} names the token {outside[0]}; the model has tokens 0 to {vocab_size - 1}")
    wrong = np.flatnonzero(np.diff(targets) <= 0)
    if len(wrong):
        first, second = targets[wrong[0]], targets[wrong[0] + 1]
        raise CheckpointError(f"{where} names the token {second} after {first}; ascending tokens were expected")


def _convert(folder: Path) -> str:
    pickled = next(iter(sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))))
    code = (
        "import torch as t; from safetensors.torch import save_file as s; "
        f"a, b = {str(pickled)!r}, {str(folder / 'model.safetensors')!r}; "
        "s({n: v.clone().contiguous() for n, v in t.load(a, map_location='cpu', weights_only=True).items()}, b)"
    )
    return f"convert it, if you trust it: python -c {shlex.quote(code)}"
