"""Every operator of this package: what it takes and gives, its reference, and where its implementations are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plugins.integer_linear import integer_linear
from plugins.kv_compact import kv_compact
from plugins.quantize_per_token import quantize_per_token
from plugins.sample_token import sample_token
from plugins.verify_attention import verify_attention_batch
from plugins.w8a8_linear import w4a16_block_linear, w8a8_block_linear, w8a8_linear
from quasar.errors import QuasarError


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator.

    `inputs` and `outputs` give name → dtype [shape]. `reference` is the numpy function that every implementation must
    equal: bit for bit, or in its floats within a rounding that its tests state. `implementations` maps a back end to
    the module that has it, imported when it is needed.
    """

    name: str
    summary: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    reference: Callable[..., Any]
    implementations: dict[str, str]


# Neighbours of a linear that its operator takes in.
_TAKEN_IN = {
    "bias": "float32 [N], optional",
    "residual": "float32 [..., N], optional",
    "norm": "float32 [K], optional",
}

OPERATORS = {
    one.name: one
    for one in (
        Operator(
            name="kv_compact",
            summary="Move the positions of an accepted tree path to the front of the new ones, in every layer's cache.",
            inputs={
                "caches": "any [G, S, D], keys and values of every layer, changed in place",
                "cache_length": "int: committed positions; the new ones follow them",
                "path": "int64 [n], ascending: the new positions to keep",
            },
            outputs={},
            reference=kv_compact,
            implementations={"cpu": "plugins.kv_compact", "cuda": "plugins.gpu.kv_compact"},
        ),
        Operator(
            name="quantize_per_token",
            summary="Row amax and INT8 quantization in one pass: q = Q(x / a, 1/127), a = max(max|x|, 2^-14).",
            inputs={"x": "float16, bfloat16 or float32 [T, K], rows may be strided"},
            outputs={"q": "int8 [T, K]", "a": "float32 [T]"},
            reference=quantize_per_token,
            implementations={"cpu": "plugins.quantize_per_token", "cuda": "plugins.gpu.quantize_per_token"},
        ),
        Operator(
            name="integer_linear",
            summary="A W8A8 linear of tokens that are quantized already: y = (q Wᵀ) · scale / 127 · a + bias.",
            inputs={
                "q": "int8 [..., K], K a multiple of 16",
                "a": "float32 [..., 1]",
                "weight": "int8 [tiles of N, tiles of K, 64, 128] (plugins.gpu.packing)",
                "scale": "float32 [N]",
                "bias": "float32 [N]",
            },
            outputs={"y": "float32 [..., N]"},
            reference=integer_linear,
            implementations={"cpu": "plugins.integer_linear", "cuda": "plugins.gpu.integer_linear"},
        ),
        Operator(
            name="W8A8Linear",
            summary="A linear with per-token INT8 activations: RMS norm before it, bias, residual or gate after it.",
            inputs={
                "x": "float32 [..., K]",
                "packed": "uint8 [tiles, K / 4, 32, 4] (plugins.cpu.packing)",
                "scale": "float32 [N]",
                **_TAKEN_IN,
            },
            outputs={"y": "float32 [..., N]"},
            reference=w8a8_linear,
            implementations={"cpu": "plugins.cpu.library"},
        ),
        Operator(
            name="W8A8BlockLinear",
            summary="The same with a scale for every 32 inputs, of weights and of activations.",
            inputs={
                "x": "float32 [..., K]",
                "packed": "uint8 [tiles, K / 4, 32, 4], K padded to 32",
                "scale": "float32 [tiles, K / 32, 32]",
                **_TAKEN_IN,
            },
            outputs={"y": "float32 [..., N]"},
            reference=w8a8_block_linear,
            implementations={"cpu": "plugins.cpu.library"},
        ),
        Operator(
            name="W4A8BlockLinear",
            summary="The same with 4-bit weights, whose scales are those of groups of inputs: a multiple of 32.",
            inputs={
                "x": "float32 [..., K]",
                "packed": "uint8 [tiles, K / 4, 16, 4], K padded to 32: two columns a byte",
                "scale": "float16 [tiles, groups, 32]; with offsets [tiles, groups, 64], scales first",
                **_TAKEN_IN,
            },
            outputs={"y": "float32 [..., N]"},
            reference=w8a8_block_linear,
            implementations={"cpu": "plugins.cpu.library"},
        ),
        Operator(
            name="W4A16BlockLinear",
            summary="The same weights times rows whose blocks have 16 bits, as two planes of integers.",
            inputs={
                "x": "float32 [..., K], K a multiple of 32",
                "packed": "uint8 [tiles, K / 4, 16, 4]: two columns a byte",
                "scale": "float16 [tiles, groups, 32]; with offsets [tiles, groups, 64], scales first",
                **_TAKEN_IN,
            },
            outputs={"y": "float32 [..., N]"},
            reference=w4a16_block_linear,
            implementations={"cpu": "plugins.cpu.library"},
        ),
        Operator(
            name="VerifyAttention",
            summary="Norms, rotation, append to the cache, and attention of each new position over its own path.",
            inputs={
                "qkv": "float32 [1, R, (H + 2G)·D]: the positions of B sequences, one sequence after the other",
                "key": "[slots, G, S, D], or in tiers [slots, 2G, S, D / 2] (plugins.verify_attention.in_tiers), the "
                "caches; updated in place where present is bound to it",
                "value": "alike",
                "cache_lengths": "int64 [B]",
                "position_ids": "int64 [1, R]",
                "cos": "float32 [positions, angles]; of 0 columns where a layer does not rotate",
                "sin": "float32 [positions, angles]",
                "tree_mask": "bool, each sequence's [T, T] after the other's; optional, or of no value: all are chains",
                "q_norm": "float32 [D], or [H·D] for all heads together; optional",
                "k_norm": "float32 [D] or [G·D], optional",
                "sequence_starts": "int64 [B + 1]: each sequence's first row, then R; optional: one sequence",
                "cache_slots": "int64 [B], distinct; optional with the one before: a batch is one sequence in slot 0",
                "key_scale": "float32 [G, D], of an INT8 cache alone; its integers are divided by it",
                "value_scale": "float32 [G, D], alike",
            },
            outputs={
                "context": "float32 [1, R, H·D]",
                "present key": "[slots, G, S, D]",
                "present value": "[slots, G, S, D]",
            },
            reference=verify_attention_batch,
            implementations={"cpu": "plugins.cpu.library"},
        ),
        Operator(
            name="sample_token",
            summary="Draw a token from filtered logits with randomness keyed by (seed, position, token).",
            inputs={
                "logits": "float32 [V]",
                "filters": "temperature, top_k, top_p, min_p (plugins.sample_token.Filters)",
                "seed": "uint64",
                "position": "int: the token's place in its sequence",
            },
            outputs={"token": "int"},
            reference=sample_token,
            implementations={"cpu": "plugins.cpu.sampler"},
        ),
    )
}


def operator(name: str) -> Operator:
    """The operator of that name; raises `QuasarError` naming those that there are."""
    if name not in OPERATORS:
        raise QuasarError(f"there is no operator {name!r}; known are {', '.join(OPERATORS)}")
    return OPERATORS[name]
