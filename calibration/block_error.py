"""What a step of the search is judged by: a block's output over held-out text, and the head's distribution."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from calibration.fake_quantization import fake_quantized
from calibration.float_blocks import Batch, FloatBlocks
from calibration.search import RoundedLinear
from calibration.validation_split import DivergenceSums

if TYPE_CHECKING:
    import torch

# Of held-out text, that judge a block.
_ENOUGH_TOKENS = 512
# Places of held-out text that judge the head.
_MOST_ROWS = 128


class Judge(Protocol):
    """Says how far quantized linears are from float ones."""

    def error(self, quantized: Mapping[str, RoundedLinear], /) -> float:
        """Smaller is better."""


class BlockJudge:
    """By the mean over tokens of |o - ô|² / |o|², o the float block's output and ô the quantized one's.

    Both read the float model's hidden states: what earlier blocks do wrong would drown what this one does. Relative to
    the token's own hidden state, because that is how the next norm sees an error: tokens whose hidden states are a
    thousand times as large as the others' (the first one's are, in many models) would count alone otherwise.
    """

    def __init__(
        self,
        blocks: FloatBlocks,
        index: int,
        batches: Sequence[Batch],
        before: "Sequence[torch.Tensor]",
        after: "Sequence[torch.Tensor]",
    ) -> None:
        """`before`, `after`: float hidden states that the block reads and makes, [sequences, longest, hidden] each."""
        self._blocks = blocks
        self._index = index
        self._batches: list[tuple[Batch, torch.Tensor, torch.Tensor]] = []
        tokens = 0
        for batch, read, made in zip(batches, before, after, strict=True):
            if tokens < _ENOUGH_TOKENS:
                self._batches.append((batch, read, made))
                tokens += sum(batch.lengths)

    def error(self, quantized: Mapping[str, RoundedLinear], /) -> float:
        """Of the block with these linears quantized."""
        forms = {name: linear.form() for name, linear in quantized.items()}
        total = tokens = 0.0
        with fake_quantized(self._blocks.model, self._blocks.spec, forms):
            for batch, before, after in self._batches:
                off = self._blocks.run_block(self._index, batch, before) - after
                relative = off.square().sum(-1) / after.square().sum(-1).clamp_min(1e-30)
                total += float(relative[batch.real].double().sum())
                tokens += sum(batch.lengths)
        return total / max(tokens, 1)


class HeadJudge:
    """By the KL divergence of the distributions at up to 128 places, from the float head over the same inputs."""

    def __init__(
        self,
        blocks: FloatBlocks,
        normed: "torch.Tensor",
        product: "Callable[[torch.Tensor], torch.Tensor]",
    ) -> None:
        """`normed`: float32 [rows, hidden], what the head reads; `product`: the float head's."""
        self._blocks = blocks
        self._normed = normed[:: max(1, -(-len(normed) // _MOST_ROWS))]
        self._exact = blocks.logits(self._normed, product)

    def error(self, quantized: Mapping[str, RoundedLinear], /) -> float:
        """Of the one linear, the head."""
        import torch

        (head,) = quantized.values()
        sums = DivergenceSums()
        logits = self._blocks.logits(self._normed, head.form().product)
        sums.add(self._exact, logits, torch.ones(len(logits), dtype=torch.bool))
        return sums.divergence().kl
