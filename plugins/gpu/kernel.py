"""A Triton kernel before it is compiled, and its compilation ahead of time on any machine."""

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from plugins.compiled import CompiledKernel
from quasar.errors import QuasarError

# GPUs from this compute capability on let a kernel start before the one before it has ended.
_OVERLAPPING = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A function in Triton's language with its constants.

    Attributes:
        name: tells it from other kernels of the same function; "": the function's own.
        signature: the types of its arguments in Triton's words.
        aligned: arguments that are always multiples of 16, so that 16 bytes are loaded at once.
        num_stages: tiles of a loop that are loaded ahead.
        most_registers: of a thread; None: what the assembler finds best.
        overlaps: whether its last constant, OVERLAP, says that it may start before the kernel before it has ended: it
            waits for that itself, before it reads what others write. Compute capability 9.0 and above.
    """

    function: Callable[..., None]
    signature: dict[str, str]
    constants: dict[str, int]
    num_warps: int
    name: str = ""
    aligned: tuple[str, ...] = ()
    num_stages: int = 3
    most_registers: int | None = None
    overlaps: bool = False

    def constants_for(self, *, overlap: bool) -> dict[str, int]:
        """Every constant of the function."""
        return {**self.constants, "OVERLAP": int(overlap)} if self.overlaps else self.constants

    def compile(self, compute_capability: str) -> CompiledKernel:
        """The kernel for a GPU like "8.9"; raises `QuasarError` with Triton's words if it cannot be compiled."""
        from triton import compile as triton_compile
        from triton import jit
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        major, minor = compute_capability.split(".")
        constants = self.constants_for(overlap=int(major) >= _OVERLAPPING)
        source = ASTSource(
            jit(self.function),
            signature={**self.signature, **dict.fromkeys(constants, "constexpr")},
            constexprs=constants,
            attrs={
                (position,): [["tt.divisibility", 16]]
                for position, argument in enumerate(self.signature)
                if argument in self.aligned
            },
        )
        # Contracting a * b + c would round once where the reference rounds twice.
        options = {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "maxnreg": self.most_registers,
            "enable_fp_fusion": False,
        }
        with _reproducible():
            try:
                compiled = triton_compile(
                    source, target=GPUTarget("cuda", 10 * int(major) + int(minor), 32), options=options
                )
            except Exception as error:  # Triton's errors share no public base
                raise QuasarError(
                    f"Triton compiled no {self.function.__name__} for compute capability {compute_capability}: {error}"
                ) from None
        return CompiledKernel(
            image=bytes(compiled.asm["cubin"]),
            ptx=str(compiled.asm["ptx"]),
            entry=str(compiled.metadata.name),
            threads=32 * self.num_warps,
            shared_bytes=int(compiled.metadata.shared),
            types=tuple(self.signature.values()),
        )


def optional_arguments(names: Sequence[str], kind: str, *, taken: bool) -> tuple[dict[str, str], dict[str, int]]:
    """Signature and constants of a kernel's last arguments where only some variants take them.

    The others have zeros in their place, of which nothing is read: what they are launched with stays as it is.
    """
    return (dict.fromkeys(names, kind), {}) if taken else ({}, dict.fromkeys(names, 0))


def assembler_version(compute_capability: str) -> str:
    """CUDA's version of the assembler that Triton brings for a GPU, like "13.4": drivers of its first number run it."""
    from triton.backends.nvidia.compiler import get_ptxas

    major, minor = compute_capability.split(".")
    return str(get_ptxas(10 * int(major) + int(minor)).version)


@contextmanager
def _reproducible() -> Iterator[None]:
    """Compile without leaving anything in the user's home, and without this machine's paths in the image."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="quasar-triton-") as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "TRITON_DISABLE_LINE_INFO": "1"}
        try:
            yield
        finally:
            for name in ("TRITON_CACHE_DIR", "TRITON_DISABLE_LINE_INFO"):
                del os.environ[name]
                if name in before:
                    os.environ[name] = before[name]
