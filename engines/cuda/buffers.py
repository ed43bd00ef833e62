"""How much memory a pass takes beside weights and caches, and which activations share it.

A buffer is free again after the last step that reads it.
"""

from collections.abc import Iterator

from engines.cuda.launches import Limits, amax_of, arrivals_of, partials_of, quantized_bytes, sums_of
from engines.cuda.program import (
    AddNorm,
    Attention,
    Embed,
    Head,
    Linear,
    PlaceColumns,
    Program,
    Receive,
    Select,
    Step,
    Tell,
)
from plugins.gpu.packing import TILE_OUTPUTS, tiles_of
from plugins.gpu.variants import MERGED


def plan_buffers(program: Program) -> tuple[dict[str, int], list[int]]:
    """Buffer → the block that it lies in, and float32 columns of every block."""
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        for name in _read(step):
            # The host gets what is told when the pass has ended.
            last[name] = len(program.steps) if isinstance(step, Tell) else max(index, last.get(name, index))
    placed: dict[str, int] = {}
    blocks: list[int] = []
    free: list[int] = []
    for index, step in enumerate(program.steps):
        for name, columns in written(step):
            if name in placed and isinstance(step, PlaceColumns):
                # Others have placed their columns.
                continue
            # The block that fits best, so that wide ones are left for wide buffers.
            block = min(free, key=lambda one: abs(blocks[one] - columns), default=None)
            if block is None:
                block = len(blocks)
                blocks.append(columns)
            else:
                free.remove(block)
                blocks[block] = max(blocks[block], columns)
            placed[name] = block
        free += [placed[name] for name in dict.fromkeys(_read(step)) if last[name] == index]
    return placed, blocks


def scratch_bytes(program: Program, limits: Limits) -> dict[str, int]:
    """Bytes of what `Addresses` names beside tensors, buffers, inputs and caches."""
    tokens, reach, head_rows = limits.tokens, program.reach, limits.head_rows
    attention = [step for step in program.steps if isinstance(step, Attention)]
    linears = [step for step in program.steps if isinstance(step, Linear)]
    head = next(step for step in program.steps if isinstance(step, Head))
    queries = max(step.heads * step.head_size for step in attention)
    keys = tiles_of(head.vocabulary, TILE_OUTPUTS) * program.likeliest
    return {
        "quantized": tokens * max(quantized_bytes(head), *map(quantized_bytes, linears)),
        "amax": 4 * tokens * max(amax_of(head), *map(amax_of, linears)),
        "sums": 4 * max(sums_of(step, limits.multiprocessors) for step in linears),
        "partials": 4 * max(partials_of(step, limits.multiprocessors) for step in linears),
        "arrived": 4 * max(map(arrivals_of, linears)),
        "queries": 4 * tokens * queries,
        "partial": 4 * reach * limits.most_splits * queries,
        "partial_stats": 8 * reach * limits.most_splits * max(step.heads for step in attention),
        "keys": 8 * head_rows * keys,
        "merged": 8 * head_rows * tiles_of(keys, MERGED) * program.likeliest,
        "logits": 4 * head_rows * head.vocabulary,
        "next_tokens": 8 * tokens * (1 + program.top_k),
        "likelihoods": 4 * tokens * program.top_k if head.likelihoods else 0,
    }


def _read(step: Step) -> Iterator[str]:
    match step:
        case Embed() | Receive():
            return
        case Linear():
            yield step.input
            if step.residual:
                yield step.residual
        case AddNorm():
            yield step.input
            yield step.residual
        case Attention() | Select() | Head() | PlaceColumns() | Tell():
            yield step.input


def written(step: Step) -> Iterator[tuple[str, int]]:
    """The buffers that a step writes, and float32 columns of each."""
    match step:
        case Embed() | Select() | AddNorm() | Receive():
            yield step.output, step.columns
        case PlaceColumns():
            yield step.output, step.width
        case Linear():
            yield step.output, step.outputs
        case Attention():
            yield step.output, step.heads * step.head_size
        case Head() | Tell():
            return
