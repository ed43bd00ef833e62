"""What a caller may choose when an engine is loaded on TensorRT."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtOptions:
    """Load options.

    Attributes:
        rebuild: where no plan fits this GPU and library, compile one into the user's cache.
    """

    rebuild: bool = False
