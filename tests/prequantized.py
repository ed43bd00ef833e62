"""Tiny models in the layouts of quantized checkpoints, packed by code that shares nothing with the readers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.tiny import save_tiny_model

# A layer's linears; the head stays float, as the tools leave it.
MODULES = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
# Weight [N, K] → the tensors of its module, and the weight that they stand for.
Pack = Callable[[torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


def save_quantized(folder: Path, quantization: dict[str, Any], pack: Pack, **overrides: Any) -> dict[str, torch.Tensor]:
    """A tiny Llama whose layers' linears are packed; returns the weights that they stand for, by module."""
    save_tiny_model(folder, "llama", **{**SIZES, **overrides})
    tensors, expected = load_file(folder / "model.safetensors"), {}
    for layer in range(3):
        for name in MODULES:
            module = f"model.layers.{layer}.{name}"
            packed, weight = pack(tensors.pop(f"{module}.weight"))
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in packed.items()}
            expected[module.removeprefix("model.")] = weight
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    return expected


def on_grid(weight: torch.Tensor, bits: int, group: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Unsigned integers [N, K], and scales and zeros [N, K / group], of which scales are float16 numbers."""
    top, grouped = 2**bits - 1, weight.float().unflatten(1, (-1, group))
    if symmetric:
        scale = (grouped.abs().amax(-1) / (top // 2)).half().float()
        zero = torch.full_like(scale, top // 2 + 1)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).half().float()
        zero = (-low / scale).round().clamp(0, top)
    integers = (grouped / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return integers.flatten(1).int(), scale, zero.int()


def stands_for(integers: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, group_of: torch.Tensor) -> torch.Tensor:
    """The weight [N, K], by the group of every input."""
    return (integers - zero[:, group_of]) * scale[:, group_of]


def words_of(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Int [rows, n] → int32 [rows, n bits / 32], the first integer lowest."""
    fields = integers.long().unflatten(1, (-1, 32 // bits))
    shifts = torch.arange(0, 32, bits)
    return torch.from_numpy((fields << shifts).sum(-1).numpy().astype(np.uint32).view(np.int32))


def gptq(bits: int = 4, group: int = 32, *, symmetric: bool = True, version: int = 1, shuffled: bool = False) -> Pack:
    """AutoGPTQ's; `shuffled`: inputs of a group lie apart, as with desc_act."""

    def pack(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        inputs = weight.shape[1]
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(1)) if shuffled else torch.arange(inputs)
        integers, scale, zero = on_grid(weight[:, order], bits, group, symmetric)
        group_of = torch.empty(inputs, dtype=torch.int32)
        group_of[order] = torch.arange(inputs, dtype=torch.int32) // group
        own = torch.empty_like(integers)
        own[:, order] = integers
        stored = (zero - int(version == 1)) % 2**bits
        tensors = {
            "qweight": words_of(own, bits).T,
            "qzeros": words_of(stored.T, bits),
            "scales": scale.T.half(),
            "g_idx": group_of,
        }
        return tensors, stands_for(own, scale, zero, group_of.long())

    return pack


def awq(group: int = 32, *, symmetric: bool = False) -> Pack:
    """AutoAWQ's for matrix products: a word's fields hold outputs 0, 2, 4, 6, 1, 3, 5, 7 of eight."""

    def words(integers: torch.Tensor) -> torch.Tensor:
        eights = integers.unflatten(1, (-1, 8))[:, :, [0, 2, 4, 6, 1, 3, 5, 7]]
        return words_of(eights.flatten(1), 4)

    def pack(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        integers, scale, zero = on_grid(weight, 4, group, symmetric)
        tensors = {"qweight": words(integers.T), "qzeros": words(zero.T), "scales": scale.T.half()}
        return tensors, stands_for(integers, scale, zero, torch.arange(weight.shape[1]) // group)

    return pack


def gptq_config(bits: int = 4, group: int = 32, **values: Any) -> dict[str, Any]:
    """What AutoGPTQ writes."""
    return {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False, "sym": True, **values}


def awq_config(group: int = 32, **values: Any) -> dict[str, Any]:
    """What AutoAWQ writes."""
    return {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm", **values}


def compressed_config(form: str, weights: dict[str, Any], activations: dict[str, Any] | None = None) -> dict[str, Any]:
    """What LLM Compressor writes, for all linears but the head."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


def compressed(config: dict[str, Any]) -> Pack:
    """By the package's own compressors."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    (group,) = config["config_groups"].values()
    scheme = QuantizationScheme(**group)
    compressor = BaseCompressor.get_value_from_registry(config["format"])
    bits, size = scheme.weights.num_bits, scheme.weights.group_size

    def pack(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        _, scale, zero = on_grid(weight, bits, size or weight.shape[1], scheme.weights.symmetric)
        centre = (zero - 2 ** (bits - 1)).to(torch.int8)
        tensors = compressor.compress(
            {"weight": weight.float(), "weight_scale": scale, "weight_zero_point": centre}, scheme
        )
        back = compressor.decompress(dict(tensors), scheme)["weight"]
        return tensors, back.float()

    return pack
