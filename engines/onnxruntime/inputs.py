"""What an ONNX Runtime session feeds, in buffers that were allocated once: in the canonical form, or in the ragged one.

`engines.contract` says what the two forms are.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from engines import contract as names
from engines.contract import Contract
from engines.onnxruntime.binding import Binding
from engines.session import Positions
from engines.tree import ancestor_mask, check_parents, depths, pack_trees
from quasar.errors import GenerationError

Int64 = NDArray[np.int64]


class Inputs(Protocol):
    """A graph's inputs beside the caches."""

    takes_trees: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""

    def bind(self, binding: Binding, batch: Sequence[Positions]) -> None:
        """Compose what a checked batch feeds, and bind it; raises `GenerationError` for trees that do not fit."""


class CanonicalInputs:
    """[1, T]: one sequence a pass. Stock graphs have this form, and native ones of earlier versions."""

    def __init__(self, ort: Any, contract: Contract, widest: int, *, has_mask: bool, rotates_by_order: bool) -> None:
        """`has_mask`: the graph has the input `tree_mask`.

        Args:
            rotates_by_order: into an empty cache the graph's attention rotates tokens by their order and ignores
                position_ids, as GroupQueryAttention does.
        """
        self._contract, self._rotates_by_order = contract, rotates_by_order
        self.takes_trees = has_mask
        self._ids, self._positions = Buffer(ort, (1, widest)), Buffer(ort, (1, widest))
        self._rows, self._lengths = Buffer(ort, (widest,)), Buffer(ort, (1,))
        self._masks = _SquareMasks(ort, widest) if has_mask else None
        self._count = np.arange(widest, dtype=np.int64)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.array.nbytes for buffer in (self._ids, self._positions, self._rows))

    def bind(self, binding: Binding, batch: Sequence[Positions]) -> None:
        """As `Inputs`; the batch has one sequence."""
        [one] = batch
        width, length, wanted, parents = len(one.tokens), one.cache_length, one.num_logits, one.parents
        if parents is not None:
            parents = check_parents(parents, width, self._contract, takes_trees=self.takes_trees)
            if length == 0 and self._rotates_by_order:
                raise GenerationError("a tree was fed into an empty cache: feed at least one token of the prompt first")
        self._ids.array[0, :width] = one.tokens
        offsets = self._count[:width] if parents is None else depths(parents)
        np.add(offsets, length, out=self._positions.array[0, :width])
        np.add(self._count[:wanted], width - wanted, out=self._rows.array[:wanted])
        self._lengths.array[0] = length
        if self._masks is not None:
            binding.input(names.TREE_MASK, self._masks.value(width, parents))
        binding.input(names.INPUT_IDS, self._ids.value(width))
        binding.input(names.POSITION_IDS, self._positions.value(width))
        binding.input(names.CACHE_LENGTHS, self._lengths.value(1))
        binding.input(names.LOGITS_ROWS, self._rows.value(wanted))


class RaggedInputs:
    """[1, R]: the positions of several sequences in one row, each with its slot, its length and its tree."""

    takes_trees = True

    def __init__(self, ort: Any, contract: Contract, max_positions: int, max_sequences: int) -> None:
        """For at most so many positions, of at most so many sequences."""
        self._ort, self._contract = ort, contract
        self._ids, self._positions = Buffer(ort, (1, max_positions)), Buffer(ort, (1, max_positions))
        self._rows = Buffer(ort, (max_positions,))
        self._lengths, self._slots = Buffer(ort, (max_sequences,)), Buffer(ort, (max_sequences,))
        self._starts = Buffer(ort, (max_sequences + 1,))
        self._count = np.arange(max_positions, dtype=np.int64)
        self._no_mask = ort.OrtValue.ortvalue_from_numpy(np.empty(0, np.bool_))
        self._chains = [np.tri(width, dtype=np.bool_).reshape(-1) for width in range(contract.max_width + 1)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        buffers = (self._ids, self._positions, self._rows, self._lengths, self._slots, self._starts)
        return sum(buffer.array.nbytes for buffer in buffers)

    def bind(self, binding: Binding, batch: Sequence[Positions]) -> None:
        """As `Inputs`."""
        count = len(batch)
        rows, num_logits, mask = self._fill_one(batch[0]) if count == 1 else self._fill(batch)
        binding.input(names.INPUT_IDS, self._ids.value(rows))
        binding.input(names.POSITION_IDS, self._positions.value(rows))
        binding.input(names.CACHE_LENGTHS, self._lengths.value(count))
        binding.input(names.CACHE_SLOTS, self._slots.value(count))
        binding.input(names.SEQUENCE_STARTS, self._starts.value(count + 1))
        binding.input(names.LOGITS_ROWS, self._rows.value(num_logits))
        binding.input(names.TREE_MASK, mask)

    def _fill_one(self, one: Positions) -> tuple[int, int, Any]:
        """As `_fill`, for one sequence, in a quarter of the time: 3 microseconds instead of 12."""
        width, wanted, length = len(one.tokens), one.num_logits, one.cache_length
        self._starts.array[1], self._lengths.array[0], self._slots.array[0] = width, length, one.slot
        self._ids.array[0, :width] = one.tokens
        np.add(self._count[:wanted], width - wanted, out=self._rows.array[:wanted])
        positions = self._positions.array[0, :width]
        if one.parents is None:
            np.add(self._count[:width], length, out=positions)
            return width, wanted, self._no_mask
        depth, values = pack_trees([(one.parents, width)], self._contract)
        np.add(depth, length, out=positions)
        return width, wanted, self._ort.OrtValue.ortvalue_from_numpy(values)

    def _fill(self, batch: Sequence[Positions]) -> tuple[int, int, Any]:
        """Compose all inputs; how many positions and targets there are, and the mask."""
        count = len(batch)
        widths, wanted = [len(one.tokens) for one in batch], [one.num_logits for one in batch]
        starts, lengths = self._starts.array[: count + 1], self._lengths.array[:count]
        starts[1:] = list(accumulate(widths))
        lengths[:] = [one.cache_length for one in batch]
        self._slots.array[:count] = [one.slot for one in batch]
        rows, num_logits = int(starts[-1]), sum(wanted)
        np.concatenate([one.tokens for one in batch], out=self._ids.array[0, :rows])
        positions = self._positions.array[0, :rows]
        np.add(self._count[:rows], np.repeat(lengths - starts[:-1], widths), out=positions)
        # The last ones of each sequence, counted through all of them.
        before = np.repeat(starts[1:] - list(accumulate(wanted)), wanted)
        np.add(self._count[:num_logits], before, out=self._rows.array[:num_logits])
        mask = self._no_mask
        if any(one.parents is not None for one in batch):
            depth, values = self._trees(batch, widths)
            is_tree = np.array([one.parents is not None for one in batch])
            places = np.repeat(lengths[is_tree], np.array(widths)[is_tree])
            positions[np.repeat(is_tree, widths)] = np.add(places, depth, out=places)
            mask = self._ort.OrtValue.ortvalue_from_numpy(values)
        return rows, num_logits, mask

    def _trees(self, batch: Sequence[Positions], widths: list[int]) -> tuple[Int64, NDArray[np.bool_]]:
        """The depths of all trees' tokens, and the mask of all sequences: bool [ΣT²]."""
        trees = [(one.parents, width) for one, width in zip(batch, widths, strict=True) if one.parents is not None]
        depth, packed = pack_trees(trees, self._contract)
        if len(trees) == len(batch):
            return depth, packed
        parts: list[NDArray[np.bool_]] = []
        first = 0
        for one, width in zip(batch, widths, strict=True):
            if one.parents is None:
                parts.append(self._chain(width))
            else:
                parts.append(packed[first : first + width * width])
                first += width * width
        return depth, np.concatenate(parts)

    def _chain(self, width: int) -> NDArray[np.bool_]:
        return self._chains[width] if width < len(self._chains) else np.tri(width, dtype=np.bool_).reshape(-1)


class _SquareMasks:
    """The canonical form's `tree_mask` per width; a chain's is made once."""

    def __init__(self, ort: Any, widest: int) -> None:
        self._ort = ort
        self._lower = np.tri(widest, dtype=np.bool_)
        self._chains: dict[int, Any] = {}

    def value(self, width: int, parents: Int64 | None) -> Any:
        if parents is not None:
            return self._ort.OrtValue.ortvalue_from_numpy(ancestor_mask(parents)[None])
        if width not in self._chains:
            chain = np.ascontiguousarray(self._lower[None, :width, :width])
            self._chains[width] = self._ort.OrtValue.ortvalue_from_numpy(chain)
        return self._chains[width]


class Buffer:
    """A buffer and, per length of one axis, the OrtValue of its first elements (no copy).

    `axis`: which; the last, if not given. Those before it have one element.
    """

    def __init__(self, ort: Any, shape: tuple[int, ...], axis: int | None = None, dtype: DTypeLike = np.int64) -> None:
        self.array: NDArray[Any] = np.zeros(shape, dtype)
        self._before = (slice(None),) * (len(shape) - 1 if axis is None else axis)
        self._ort = ort
        self._values: dict[int, Any] = {}

    def value(self, length: int) -> Any:
        """The first `length` elements."""
        if length not in self._values:
            self._values[length] = self._ort.OrtValue.ortvalue_from_numpy(self.array[(*self._before, slice(length))])
        return self._values[length]
