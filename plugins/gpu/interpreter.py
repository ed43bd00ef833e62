"""Running a Triton kernel on the CPU, in Triton's interpreter: for tests, and for the stand-in of a GPU."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from plugins.gpu.kernel import Kernel


def interpret(kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Run a kernel; pointers are torch tensors.

    Only in a process whose TRITON_INTERPRET is 1 when it first imports Triton.
    """
    from triton.runtime.interpreter import InterpretedFunction

    # Hardware does not complain about an infinity either.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"), _bfloat16_products():
        InterpretedFunction(kernel.function)[grid](*arguments, **kernel.constants)


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """The interpreter keeps bfloat16 as its bits, and multiplies those bits as integers: widen them first."""
    from triton.language import bfloat16
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    before = InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar == bfloat16:
            a, b = (TensorHandle(_widened(part.data), d.dtype) for part in (a, b))
        return before(builder, a, b, d, *options)

    InterpreterBuilder.create_dot = create_dot
    try:
        yield
    finally:
        InterpreterBuilder.create_dot = before


def _widened(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)
