"""What this machine multiplies faster with just now: one thread or one a core, float32 or bfloat16 operands.

Threads of one product wait for the slowest of them. On two cores that other processes load as well, one thread trained
six times as fast as two, and generated twice as fast. CPUs with AVX512-BF16 or AMX multiply bfloat16 several times as
fast, others emulate it, at a fortieth of the speed with AVX2 alone.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# What two threads must gain to be taken.
_GAIN = 1.15
# What bfloat16 must: operands are rounded on the way, sums stay float32.
_BFLOAT16_GAIN = 1.5
_ROWS, _INPUTS, _OUTPUTS = 512, 576, 4096
_ROUNDS, _PRODUCTS = 6, 4
# A first look at few rows: a type that takes so many times as long there is not timed any further.
_FEW_ROWS, _HOPELESS = 8, 6.0


def choose_threads() -> int:
    """Torch's threads, 1 or as many as it has, whichever multiplies faster just now; torch is set to them."""
    import torch

    most = torch.get_num_threads()
    if most == 1:
        return 1
    chosen = _chosen(1, most, _GAIN, lambda threads: _products(torch.float32, _ROWS, threads))
    torch.set_num_threads(chosen)
    return chosen


def bfloat16_is_faster() -> bool:
    """Whether the CPU's products of bfloat16 operands take far less time than those of float32, on torch's threads."""
    import torch

    if _products(torch.bfloat16, _FEW_ROWS) > _HOPELESS * _products(torch.float32, _FEW_ROWS):
        return False
    dtype = _chosen(torch.float32, torch.bfloat16, _BFLOAT16_GAIN, lambda dtype: _products(dtype, _ROWS))
    return dtype == torch.bfloat16


def _chosen(usual: T, other: T, gain: float, seconds: Callable[[T], float]) -> T:
    """`other` where it is faster by `gain`, over rounds in which both are timed."""
    spent = {usual: 0.0, other: 0.0}
    for _ in range(_ROUNDS):
        for one in spent:
            spent[one] += seconds(one)
    return other if spent[other] * gain < spent[usual] else usual


def _products(dtype: "torch.dtype", rows: int, threads: int | None = None) -> float:
    """Seconds of some products of a training's sizes, but for the rows."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    x, weight = torch.ones(rows, _INPUTS, dtype=dtype), torch.ones(_INPUTS, _OUTPUTS, dtype=dtype)
    # The first one wakes the threads.
    torch.mm(x, weight)
    begun = time.monotonic()
    for _ in range(_PRODUCTS):
        torch.mm(x, weight)
    return time.monotonic() - begun
