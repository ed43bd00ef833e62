"""A Hugging Face folder of random weights, for shapes whose checkpoints are not at hand: to build engines from.

    python benchmarks/random_checkpoint.py DIR --tokenizer qwen2.5-coder-0.5b.gguf
    python benchmarks/random_checkpoint.py DIR --tokenizer FOLDER --shape qwen3-1.7b --tied-head --layers 2

Weights are bfloat16 in shards with an index, written block by block: memory stays below 1 GB. They are normal with
standard deviation 0.02, what is added to the residual stream less by the root of how many such sums there are, as GPT-2
was initialized; norms are ones. Answers are noise: it serves figures of speed, size and memory.
"""

import argparse
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import ml_dtypes
import numpy as np
from shapes import SHAPES

from quasar.checkpoints import DecoderSpec, open_checkpoint
from quasar.checkpoints.architectures.base import stored_shapes
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint_text import CheckpointText
from quasar.checkpoints.reference_config import reference_config
from quasar.cli import run
from quasar.errors import CheckpointError
from quasar.files import write_json

DEVIATION = 0.02
_INTO_THE_STREAM = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
# Values that are drawn at once.
_BLOCK = 1 << 24
_ITEM_BYTES = 2
Shapes = dict[str, tuple[int, ...]]


def main() -> None:
    """Write the folder, open it as a build would, print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="a .gguf file or a folder that has one")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-8b")
    parser.add_argument("--layers", type=int, metavar="N", help="so many layers (default: the shape's)")
    parser.add_argument("--tied-head", action="store_true", help="no LM head beside the embedding")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard-gb", type=float, default=2.0, help="gigabytes of a shard, at most")
    options = parser.parse_args()

    if options.folder.exists():
        raise CheckpointError(f"{options.folder} exists: name a folder that does not")
    text = open_checkpoint(options.tokenizer).text()
    spec = spec_of(SHAPES[options.shape], options.layers, text, tied_head=options.tied_head)
    options.folder.mkdir(parents=True)
    write_config(spec, options.folder)
    write_tokenizer(text, options.folder)
    shards = shards_of(spec, int(options.shard_gb * 1e9))
    write_shards(spec, shards, options.seed, options.folder)
    opened = open_checkpoint(str(options.folder))
    size = sum(path.stat().st_size for path in opened.files)
    print(
        f"{options.folder}: {options.shape}, {opened.spec.num_layers} layers, {opened.spec.num_parameters():,} "
        f"parameters, {size / 1e9:.2f} GB in {len(shards)} shards"
    )


def spec_of(shape: DecoderSpec, layers: int | None, text: CheckpointText, *, tied_head: bool) -> DecoderSpec:
    """The shape with a number of layers and the tokens of a tokenizer.

    Raises `CheckpointError` if there are no such layers, or for a tokenizer with more tokens than the embedding has
    rows.
    """
    count = shape.num_layers if layers is None else layers
    if not 1 <= count <= shape.num_layers:
        raise CheckpointError(f"--layers is {count}; 1 to {shape.num_layers} were expected")
    last = max(text.tokenizer.get_vocab().values())
    if last >= shape.vocab_size:
        raise CheckpointError(
            f"the tokenizer has the token {last}, and the shape's embedding {shape.vocab_size} rows: take another "
            "--tokenizer or --shape"
        )
    return replace(
        shape,
        layers=shape.layers[:count],
        tied_head=tied_head,
        bos_token_id=text.tokenizer.token_to_id(text.bos_token) if text.bos_token else None,
        eos_token_ids=tuple(text.end_ids),
    )


def write_config(spec: DecoderSpec, folder: Path) -> None:
    """`config.json` and `generation_config.json`."""
    architecture = ARCHITECTURES[spec.architecture]
    values = architecture.gguf.transformers_values(spec) if architecture.gguf else {}
    config = reference_config(spec, architecture.name, values)
    config.architectures, config.dtype = [architecture.model_class], "bfloat16"
    config.save_pretrained(folder)
    write_json(folder / "generation_config.json", {"eos_token_id": list(spec.eos_token_ids)})


def write_tokenizer(text: CheckpointText, folder: Path) -> None:
    """`tokenizer.json`, `tokenizer_config.json` and the chat templates, by transformers' own writer."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.tokenizer, bos_token=text.bos_token or None, eos_token=text.eos_token or None
    )
    templates = dict(text.chat_templates)
    tokenizer.chat_template = templates.get("default") if set(templates) <= {"default"} else templates
    tokenizer.save_pretrained(folder)


def shards_of(spec: DecoderSpec, shard_bytes: int) -> list[Shapes]:
    """Stored name → shape of every tensor, shard by shard; a tensor that is larger than a shard has one of its own."""
    shards: list[Shapes] = [{}]
    filled = 0
    for name, shape in stored_shapes(spec, ARCHITECTURES[spec.architecture].checkpoint_name).items():
        size = _bytes(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name if name.startswith("lm_head.") else f"model.{name}"] = shape
        filled += size
    return shards


def write_shards(spec: DecoderSpec, shards: list[Shapes], seed: int, folder: Path) -> None:
    """The safetensors files and their index. A tensor's values follow from the seed and its name alone."""
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            _write_header(file, shapes)
            for tensor, shape in shapes.items():
                for block in blocks(tensor, shape, seed, spec):
                    file.write(block)
        weight_map |= dict.fromkeys(shapes, name)
    total = sum(_bytes(shape) for shapes in shards for shape in shapes.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def blocks(name: str, shape: tuple[int, ...], seed: int, spec: DecoderSpec) -> Iterator[bytes]:
    """A tensor's bytes in bfloat16, some rows at a time."""
    if len(shape) == 1:
        value = 0.0 if name.endswith(".bias") else 1 - spec.norm_offset
        yield np.full(shape, value, ml_dtypes.bfloat16).tobytes()
        return
    deviation = DEVIATION / (2 * spec.num_layers) ** 0.5 if name.endswith(_INTO_THE_STREAM) else DEVIATION
    random = np.random.default_rng([seed, *name.encode()])
    rows = max(_BLOCK // shape[1], 1)
    for first in range(0, shape[0], rows):
        values = random.standard_normal((min(rows, shape[0] - first), shape[1]), np.float32)
        values *= np.float32(deviation)
        yield values.astype(ml_dtypes.bfloat16).tobytes()


def _write_header(file: BinaryIO, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, start + _bytes(shape)]}
        start += _bytes(shape)
    text = json.dumps(header).encode()
    # Data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


def _bytes(shape: tuple[int, ...]) -> int:
    count = _ITEM_BYTES
    for extent in shape:
        count *= extent
    return count


if __name__ == "__main__":
    run(main)
