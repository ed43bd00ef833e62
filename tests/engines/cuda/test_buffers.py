"""Activations share memory, and none is overwritten before its last reader."""

import pytest

from engines.cuda.buffers import plan_buffers
from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Select
from tests.programs import QWEN3_8B, ROW_NORMS, SMOLLM2, WIDE_HEADS, program_of


def run_on(program, placed, blocks):
    """What a pass reads and writes, with names in place of numbers; raises for a name that is not there any more."""
    memory = [""] * len(blocks)

    def read(name):
        assert memory[placed[name]] == name, f"{name} was overwritten by {memory[placed[name]]}"
        return placed[name]

    def write(name, columns, sources=()):
        assert blocks[placed[name]] >= columns
        # Programs of one launch read their sources while others write.
        assert placed[name] not in sources
        memory[placed[name]] = name

    for step in program.steps:
        match step:
            case Embed():
                write(step.output, step.columns)
            case Linear():
                sources = [read(name) for name in (step.input, step.residual) if name]
                write(step.output, step.outputs, sources)
            case AddNorm():
                write(step.output, step.columns, [read(step.input), read(step.residual)])
            case Attention():
                write(step.output, step.heads * step.head_size, [read(step.input)])
            case Select():
                write(step.output, step.columns, [read(step.input)])
            case Head():
                read(step.input)


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN3_8B, WIDE_HEADS, ROW_NORMS])
@pytest.mark.parametrize("layers", [1, 2, 7])
def test_no_buffer_is_overwritten_before_its_last_reader(shape, layers):
    program = program_of(**shape, layers=layers)
    placed, blocks = plan_buffers(program)
    run_on(program, placed, blocks)
    # The residual stream, and a step's input and output.
    assert len(blocks) <= 3
    qkv = (shape["heads"] + 2 * shape["kv_heads"]) * shape["head_size"]
    assert sum(blocks) <= shape["hidden"] + 2 * max(shape["intermediate"], qkv)


def test_an_overwritten_buffer_is_seen():
    """The check above can fail."""
    program = program_of(**SMOLLM2, layers=2)
    placed, blocks = plan_buffers(program)
    with pytest.raises(AssertionError, match="was overwritten by"):
        run_on(program, dict.fromkeys(placed, 0) | {"layers.0.qkv": 1}, [max(blocks)] * 2)
