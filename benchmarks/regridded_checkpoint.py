"""A Hugging Face folder of the same function whose weights lie on no grid: for figures of what quantization loses.

    python benchmarks/regridded_checkpoint.py smollm2 -o DIR
    python -m export build DIR -o build/w4a8 --precision w4a8

A dequantized GGUF stands on a grid of 4 bits, and a rounding that finds it again loses less than it would of a model
that was trained in floats. Here every channel that a norm, the values of a head or an up projection bring is multiplied
by a factor between 0.7 and 1.4, and divided where it is read: in exact arithmetic nothing changes, channels stay as
unequal as they were, and the values of a group no longer share a scale. The embedding stays as it is, the LM head is a
tensor of its own. Weights are float32.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from random_checkpoint import write_config, write_tokenizer
from safetensors.numpy import save_file

from quasar.checkpoints import Checkpoint, DecoderSpec, open_checkpoint
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.checkpoint import read_float32, read_head
from quasar.cli import run
from quasar.errors import CheckpointError
from quasar.numerics import Float32

SMALLEST, LARGEST = 0.7, 1.4
Factors = Callable[[str, int], Float32]


def main() -> None:
    """Write the folder, and say how far the weights are from those that were read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="it must not exist")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder: Path = options.output
    if folder.exists():
        raise CheckpointError(f"{folder} exists: name a folder that does not")
    checkpoint = open_checkpoint(options.model)
    spec = replace(checkpoint.spec, tied_head=False)
    if any(layer.output_norms or not layer.input_norms for layer in spec.layers):
        raise CheckpointError(f"{checkpoint.location}: norms after attention and MLP cannot take factors in")
    stored_name = ARCHITECTURES[spec.architecture].checkpoint_name
    tensors = {}
    for name, tensor in regridded(checkpoint, factors_of(options.seed)):
        stored = stored_name(name)
        stored = stored if stored.startswith("lm_head.") else f"model.{stored}"
        if stored in tensors:
            raise CheckpointError(
                f"{checkpoint.location}: {stored} holds several linears, which are not told apart here"
            )
        tensors[stored] = np.ascontiguousarray(tensor)
    folder.mkdir(parents=True)
    write_config(spec, folder)
    write_tokenizer(checkpoint.text(), folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    print(f"{folder}: {spec.num_parameters():,} parameters of {checkpoint.location}, on no grid")


def factors_of(seed: int) -> Factors:
    """Name of what brings channels, how many → a factor for each, float32."""

    def factors(name: str, count: int) -> Float32:
        drawn = np.random.default_rng([seed, *name.encode()]).uniform(np.log(SMALLEST), np.log(LARGEST), count)
        return np.exp(drawn).astype(np.float32)

    return factors


def regridded(checkpoint: Checkpoint, factors: Factors) -> Iterator[tuple[str, Float32]]:
    """Canonical name and values of every tensor, one at a time."""
    spec = checkpoint.spec
    yield "embed_tokens.weight", read_float32(checkpoint, "embed_tokens.weight")
    for number in range(spec.num_layers):
        yield from _layer(checkpoint, spec, f"layers.{number}", factors)
    norm = factors("norm", spec.hidden_size)
    yield "norm.weight", read_float32(checkpoint, "norm.weight") * norm
    yield "lm_head.weight", read_head(checkpoint).astype(np.float32) / norm


def _layer(checkpoint: Checkpoint, spec: DecoderSpec, layer: str, factors: Factors) -> Iterator[tuple[str, Float32]]:
    parts = spec.layers[int(layer.rpartition(".")[2])]
    attention = parts.attention
    before, after = (factors(f"{layer}.{norm}", spec.hidden_size) for norm in ("input", "post_attention"))
    value = factors(f"{layer}.value", attention.kv_size)
    # Every query head of a group reads the channels of its kv head.
    heads = np.repeat(value.reshape(attention.num_kv_heads, -1), attention.num_heads // attention.num_kv_heads, axis=0)
    context, inner = heads.ravel(), factors(f"{layer}.up", parts.mlp.intermediate_size)
    divided = {
        "self_attn.q_proj": before,
        "self_attn.k_proj": before,
        "self_attn.v_proj": before,
        "self_attn.o_proj": context,
        "mlp.gate_proj": after,
        "mlp.up_proj": after,
        "mlp.down_proj": inner,
    }
    multiplied = {"self_attn.v_proj": value, "mlp.up_proj": inner}
    norms = {"input_layernorm.weight": before, "post_attention_layernorm.weight": after}
    for name in spec.tensors():
        if not name.startswith(f"{layer}."):
            continue
        part = name.removeprefix(f"{layer}.")
        module, _, parameter = part.rpartition(".")
        tensor = read_float32(checkpoint, name)
        if part in norms:
            tensor = tensor * norms[part]
        if module in multiplied:
            tensor = (tensor.T * multiplied[module]).T
        if module in divided and parameter == "weight":
            tensor = tensor / divided[module]
        yield name, tensor


if __name__ == "__main__":
    run(main)
