"""A folder's safetensors files, and the JSON beside them. Pickled weights are never opened."""

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quasar.errors import CheckpointError
from quasar.files import inside

INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


def find_shards(folder: Path, convert: Callable[[Path], str]) -> tuple[list[Path], dict[str, Any]]:
    """The shards, and what the index says each tensor stands in; empty where there is no index, or it is left over.

    `convert`: (folder) → how its pickled weights become safetensors. Raises `CheckpointError` if there are no others,
    or if the index names a file that is not in the folder.
    """
    whole, index = folder / "model.safetensors", folder / INDEX
    named: dict[str, Any] = {}
    # In transformers' order: an index may be left over from before the shards were merged.
    if whole.is_file():
        shards = [whole]
    elif index.is_file():
        named = _weight_map(index)
        shards = _indexed_shards(folder, index, named)
    else:
        shards = [path for path in sorted(folder.glob("*.safetensors")) if not _is_other(path)]
    if not shards:
        pickled = next(iter(sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))), None)
        hint = f": {pickled.name} is a pickle, which is never opened; {convert(folder)}" if pickled else ""
        raise CheckpointError(f"{folder} has no safetensors weights{hint}")
    return shards, named


def check_numbers(folder: Path, shards: Sequence[Path]) -> None:
    """Raise `CheckpointError` naming a numbered shard that is missing, where no index says which there are."""
    numbered = [found for path in shards if (found := _NUMBERED.fullmatch(path.name))]
    for found in numbered:
        base, _, count = found.groups()
        for number in range(1, int(count) + 1):
            name = f"{base}-{number:05d}-of-{count}.safetensors"
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder} has {found[0]}, and {name} is missing: download all {int(count)} shards"
                )


def open_shard(path: Path) -> contextlib.AbstractContextManager[Any]:
    """A safetensors file, mapped. Raises `CheckpointError` if it is not a whole one."""
    import ml_dtypes  # noqa: F401 - teaches numpy the name bfloat16, which safetensors asks it for
    from safetensors import SafetensorError, safe_open

    try:
        handle: contextlib.AbstractContextManager[Any] = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}): download it again") from None
    return handle


def read_json(path: Path, expected: str = "") -> dict[str, Any]:
    """A JSON object; empty if there is no such file, unless something is `expected`: what its folder was taken for."""
    if not path.is_file():
        if expected:
            raise CheckpointError(f"{path} is missing; {expected} was expected")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; a JSON object was expected")
    return value


def _indexed_shards(folder: Path, index: Path, weight_map: Mapping[str, Any]) -> list[Path]:
    shards = []
    for name in sorted({str(name) for name in weight_map.values()}):
        path = inside(folder, name)
        # A hub cache holds links to blobs beside the snapshot: only the name must stay in the folder.
        if path is None and "/" not in name and ".." not in name:
            path = folder / name
        if path is None or not path.is_file():
            raise CheckpointError(f"{index} names the shard {name!r}, which is not in {folder}")
        shards.append(path)
    return shards


def _weight_map(index: Path) -> dict[str, Any]:
    weight_map = read_json(index, "an index of shards").get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index} has no weight_map: download it again")
    return weight_map


def _is_other(path: Path) -> bool:
    """Weights that lie beside a model's: Mistral's own format, and adapters."""
    return path.name.startswith(("consolidated", "adapter_"))
