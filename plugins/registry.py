"""Every operator of this package: what it takes and gives, its reference, and where its implementations are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from plugins.kv_compact import kv_compact
from plugins.quantize_per_token import quantize_per_token
from quasar.errors import QuasarError


@dataclass(frozen=True, slots=True, kw_only=True)
class Operator:
    """An operator.

    `inputs` and `outputs` give name → dtype [shape]. `reference` is the numpy function that every implementation must
    equal bit for bit. `implementations` maps a back end to the module that has it, imported when it is needed.
    """

    name: str
    summary: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    reference: Callable[..., Any]
    implementations: dict[str, str]


OPERATORS = {
    one.name: one
    for one in (
        Operator(
            name="kv_compact",
            summary="Move the rows of an accepted tree path to the front of the new rows, in every layer's cache.",
            inputs={
                "caches": "any [G, S, D], keys and values of every layer, changed in place",
                "cache_length": "int: committed rows; the new ones lie behind them",
                "path": "int64 [n], ascending: the new rows to keep",
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
    )
}


def operator(name: str) -> Operator:
    """The operator of that name; raises `QuasarError` naming those that there are."""
    if name not in OPERATORS:
        raise QuasarError(f"there is no operator {name!r}; known are {', '.join(OPERATORS)}")
    return OPERATORS[name]
