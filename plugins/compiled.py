"""A compiled GPU kernel: what a runtime without Triton needs to launch it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """An ELF image for one compute capability, its PTX, the function in it, threads per program, shared memory.

    `types`: of the arguments, in Triton's words: "*…" for a pointer, i32, i64, fp32.
    """

    image: bytes
    ptx: str
    entry: str
    threads: int
    shared_bytes: int
    types: tuple[str, ...]
