"""Running a Triton kernel on the CPU, in Triton's interpreter: for tests, and for the stand-in of a GPU."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
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

    _prepare()
    # Hardware does not complain about an infinity either.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
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


@cache
def _prepare() -> None:
    """Do once what the interpreter does at every call, for half of its time, and leave out what has no effect."""
    import triton.language as tl
    from triton.runtime import interpreter

    # Each launch, and each call of Triton's own functions, puts interpreted operators in place of the language's; a
    # launch takes them out again. In a process that interprets nothing needs the others: they stay.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))  # noqa: SLF001
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)  # noqa: SLF001
    interpreter.InterpreterBuilder.create_dot = _product
    # Sums and products of integers are computed again in 64 bits for an assertion that only `debug` makes.
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)


def _product(_: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:  # noqa: ARG001 - those of Triton's operator
    """A matrix product, in place of the interpreter's.

    That one takes the bits of bfloat16 for integers, and sums in float32, in an order that depends on the row where a
    processor's BLAS likes that. Sums of 16-bit floats are exact in float64, or as good as.
    """
    from triton.runtime.interpreter import TensorHandle

    if a.dtype.is_int():
        product = np.matmul(a.data, b.data, dtype=d.data.dtype)
    else:
        product = np.matmul(_widened(a), _widened(b)).astype(d.data.dtype)
    return TensorHandle(product + d.data, d.dtype.scalar)


def _widened(part: Any) -> Any:
    """Floats as float64; of bfloat16 there are the bits."""
    values = (part.data.astype(np.uint32) << 16).view(np.float32) if part.dtype.is_bf16() else part.data
    return values.astype(np.float64)
