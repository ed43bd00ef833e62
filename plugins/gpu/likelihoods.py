"""likelihoods as a Triton kernel: how likely a draft head holds its likeliest tokens, from all of a row's logits."""

import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from plugins.gpu.kernel import Kernel
from plugins.gpu.variants import SUMMED, Likelihoods, power_of_2


def likelihoods(  # type: ignore[no-untyped-def]
    logits,
    tokens,
    y,
    vocabulary,
    LIKELIEST: tl.constexpr,  # noqa: N803
    PLACES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    OVERLAP: tl.constexpr,  # noqa: N803
):
    """Row `program_id(0)` of y float32 [M, LIKELIEST]: the log-softmax of `logits` float32 [M, vocabulary].

    At `tokens` int64 [M, LIKELIEST], the likeliest first: its logit is the largest of the row. -1, which stands for
    logits that are no numbers, gives NaN, for all tokens of a row whose likeliest it is. PLACES: LIKELIEST, rounded up
    to a power of two.
    """
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    base, own = logits + row * vocabulary, row * LIKELIEST
    likeliest = tl.load(tokens + own)
    largest = tl.load(base + likeliest, mask=likeliest >= 0, other=float("nan"))
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        values = tl.load(base + offsets, mask=offsets < vocabulary, other=float("-inf"))
        total += tl.exp(values - largest)
    place = tl.arange(0, PLACES)
    token = tl.load(tokens + own + place, mask=place < LIKELIEST, other=-1)
    value = tl.load(base + token, mask=token >= 0, other=float("nan"))
    tl.store(y + own + place, value - largest - tl.log(tl.sum(total, axis=0)), mask=place < LIKELIEST)


def kernel_for(variant: Likelihoods) -> Kernel:
    """The kernel of a variant."""
    return Kernel(
        name=variant.name,
        function=likelihoods,
        overlaps=True,
        signature={"logits": "*fp32", "tokens": "*i64", "y": "*fp32", "vocabulary": "i32"},
        constants={"LIKELIEST": variant.likeliest, "PLACES": power_of_2(variant.likeliest), "BLOCK": SUMMED},
        num_warps=8,
        aligned=("logits",),
    )
