"""What a caller may choose when an engine is loaded on CUDA."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaOptions:
    """Load options.

    Attributes:
        slots: sequences that the KV cache holds; all of it is allocated at load. None: as many as half of the GPU's
            memory holds that is free beside the weights, 16 at most.
        max_positions: that one pass takes, of all sequences together; None for those of a chunk of a prompt.
        draft_head: load the draft head that the directory has, where it was compiled.
    """

    slots: int | None = 1
    max_positions: int | None = None
    draft_head: bool = True
