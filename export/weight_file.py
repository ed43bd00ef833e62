"""External data (`verifier.onnx.data`): tensors are appended one by one, so memory never holds more than one."""

from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

# A page: what is mapped into memory starts on one.
ALIGNMENT = 4096


class WeightFile:
    """Writes external data; each tensor starts at a multiple of 4096 bytes.

    Graphs find the file by its path from `root`, the engine directory: by default the folder that it lies in.
    """

    def __init__(self, path: Path, root: Path | None = None, *, named: Path | None = None) -> None:
        """`named`: where the file is moved once it is whole, and where graphs find it."""
        self._path = path
        self._named = path if named is None else named
        self._root = path.parent if root is None else root
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = self._path.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, name: str, array: NDArray[Any]) -> ir.ExternalTensor:
        """Write an array and return the reference that the graph holds."""
        offset = -(-self._file.tell() // ALIGNMENT) * ALIGNMENT
        self._file.seek(offset)
        kind = ir.DataType.from_numpy(array.dtype)
        content = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
        if kind.bitwidth == 4:
            # Two a byte, as ONNX stores them, the first in the low bits.
            padded = np.append(content, np.zeros(len(content) % 2, np.uint8)) & np.uint8(15)
            content = padded[::2] | padded[1::2] << np.uint8(4)
        self._file.write(content.data)
        return ir.ExternalTensor(
            self._named.relative_to(self._root).as_posix(),
            offset,
            content.nbytes,
            kind,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=self._root,
        )
