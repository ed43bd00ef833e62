"""Which activations share memory: a buffer is free again after the last step that reads it."""

from collections.abc import Iterator

from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Program, Select, Step


def plan_buffers(program: Program) -> tuple[dict[str, int], list[int]]:
    """Buffer → the block that it lies in, and float32 columns of every block."""
    last: dict[str, int] = {}
    for index, step in enumerate(program.steps):
        for name in _read(step):
            last[name] = index
    placed: dict[str, int] = {}
    blocks: list[int] = []
    free: list[int] = []
    for index, step in enumerate(program.steps):
        for name, columns in _written(step):
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


def _read(step: Step) -> Iterator[str]:
    match step:
        case Embed():
            return
        case Linear():
            yield step.input
            if step.residual:
                yield step.residual
        case AddNorm():
            yield step.input
            yield step.residual
        case Attention() | Select() | Head():
            yield step.input


def _written(step: Step) -> Iterator[tuple[str, int]]:
    match step:
        case Embed() | Select() | AddNorm():
            yield step.output, step.columns
        case Linear():
            yield step.output, step.outputs
        case Attention():
            yield step.output, step.heads * step.head_size
        case Head():
            return
