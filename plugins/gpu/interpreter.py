"""Running a Triton kernel on the CPU, in Triton's interpreter: for tests, and for the stand-in of a GPU."""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from plugins.gpu.kernel import Kernel

# Triton's words for what pointers point to, and numpy's types with elements of that size.
_ELEMENTS = {"i8": np.int8, "i32": np.int32, "i64": np.int64, "fp32": np.float32, "fp16": np.float16, "bf16": np.int16}


def interpret(kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[Any]) -> None:
    """Run a kernel; pointers are torch tensors.

    Only in a process whose TRITON_INTERPRET is 1 when it first imports Triton.
    """
    from triton.runtime.interpreter import InterpretedFunction

    # Hardware does not complain about an infinity either.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"), _bfloat16_products():
        InterpretedFunction(kernel.function)[grid](*arguments, **kernel.constants_for(overlap=False))


def interpret_at(kernel: Kernel, grid: tuple[int, ...], arguments: Sequence[int | float]) -> None:
    """As `interpret`, with addresses of host memory as pointers."""
    values = [_argument(kind, value) for kind, value in zip(kernel.signature.values(), arguments, strict=True)]
    interpret(kernel, grid, values)


def _argument(kind: str, value: float) -> Any:
    """A pointer as a torch tensor of one element at its address, which is what the interpreter takes."""
    import torch

    if not kind.startswith("*"):
        return value
    element = np.dtype(_ELEMENTS[kind[1:]])
    # No kernel reads what a null pointer points to.
    at = (ctypes.c_uint8 * element.itemsize).from_address(int(value)) if value else bytearray(element.itemsize)
    tensor = torch.from_numpy(np.frombuffer(memoryview(at), element))
    return tensor.view(torch.bfloat16) if kind == "*bf16" else tensor


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
