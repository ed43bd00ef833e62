"""The float model's logits over texts that have passed its blocks: what an engine's fidelity is measured against."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.block_search import OTHERS, BlockSearch, Progress
from calibration.block_state import WalkState
from calibration.fidelity import LogitsReader
from calibration.float_blocks import FloatBlocks, batches_of, head_product
from calibration.recipe import Recipe
from calibration.texts import TokenizedText

if TYPE_CHECKING:
    import torch

_ROWS_AT_ONCE = 128


def float_logits(
    blocks: FloatBlocks, recipe: Recipe, texts: Sequence[TokenizedText], folder: Path, progress: Progress
) -> LogitsReader:
    """Reads logits float32 [positions, V] of the `others` of a walk in `folder`.

    Without a finished walk there, it walks with them alone, or goes on with such a walk that was stopped.
    """
    search = BlockSearch(blocks, recipe.as_float(), {OTHERS: texts}, folder, progress)
    if not search.is_finished:
        search.run()
    streams = WalkState.load(search.state_path).streams[OTHERS]
    sequences = [text.tokens for text in texts]
    hidden: dict[tuple[int, ...], torch.Tensor] = {}
    for indices, stream in zip(batches_of(sequences), streams, strict=True):
        for row, index in enumerate(indices):
            hidden[sequences[index]] = stream[row, : len(sequences[index])]
    product = head_product(blocks.head())

    def read(tokens: Sequence[int]) -> Iterator[NDArray[np.float32]]:
        normed = blocks.normed(hidden[tuple(tokens)])
        for start in range(0, len(normed), _ROWS_AT_ONCE):
            yield blocks.logits(normed[start : start + _ROWS_AT_ONCE], product).numpy()

    return read
