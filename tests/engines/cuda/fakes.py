"""Engines with kernels that are no kernels: for everything around them."""

from collections.abc import Iterator, Sequence

import pytest

from engines.cuda.files import KernelRecord
from export import compile_cuda
from plugins.gpu.variants import Variant


def no_kernels(variants: Sequence[Variant], capability: str) -> Iterator[tuple[KernelRecord, bytes]]:
    """In place of a compilation, which takes half a second for each kernel."""
    for variant in variants:
        record = KernelRecord(
            name=variant.name,
            entry="entry",
            threads=32,
            shared_bytes=0,
            types=("i32",),
            registers=1,
            spilled_bytes=0,
        )
        yield record, f"{variant.name} for {capability}".encode()


def compile_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `export.compile_cuda` write such kernels."""
    monkeypatch.setattr(compile_cuda, "_compiled", no_kernels)
