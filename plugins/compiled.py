"""A compiled GPU kernel: what a runtime without Triton needs to launch it."""

from dataclasses import dataclass

# Triton gives every kernel two more pointers after its own arguments, for scratch memory that ours do not use.
SCRATCH_POINTERS = (0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """An ELF image for one compute capability, its PTX, the function in it, threads per program, shared memory."""

    image: bytes
    ptx: str
    entry: str
    threads: int
    shared_bytes: int
