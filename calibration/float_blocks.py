"""The float model one decoder block at a time: memory holds a single block's weights, whatever the model's size.

Hidden states of all texts wait between blocks. Transformers' own modules compute everything: its decoder gives each
block its masks and rotations in one pass in which no block computes, and these are kept.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from calibration.fake_quantization import module_of, row_slices
from calibration.float_model import check_filled, empty_float_model, fill, to_torch
from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import check_finite, read_head

if TYPE_CHECKING:
    import torch

_BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Token sequences that are computed together, padded on the right, where causal attention cannot see it.

    `indices`: of the sequences, in the order in which they were given; `lengths`: tokens of each. `keywords`: what
    transformers passes to each block beside the hidden states, by block.
    """

    indices: tuple[int, ...]
    lengths: tuple[int, ...]
    keywords: tuple[dict[str, Any], ...]

    @property
    def real(self) -> "torch.Tensor":
        """Which positions are no padding: bool [sequences, longest]."""
        import torch

        return torch.arange(max(self.lengths))[None] < torch.tensor(self.lengths)[:, None]


class FloatBlocks:
    """A checkpoint's float model in float32, block by block.

    Raises `CheckpointError` if transformers' model has a parameter that the checkpoint does not fill, and `BuildError`
    if torch or transformers is not installed.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        import torch

        self._checkpoint = checkpoint
        self.spec = checkpoint.spec
        self.model: Any = empty_float_model(checkpoint)
        self._names: dict[str, list[str]] = {}
        for name in self.spec.tensors():
            block = ".".join(name.split(".")[:2]) if name.startswith("layers.") else ""
            self._names.setdefault(block, []).append(name)
        fill(self.model, checkpoint, ["norm.weight"], torch.float32)

    def embed(self, texts: Mapping[str, Sequence[Sequence[int]]]) -> "dict[str, list[tuple[Batch, torch.Tensor]]]":
        """By the name of a set of token sequences: batches, with what the first block reads of each.

        Batches are those of `batches_of`; hidden states are float32 [sequences, longest, hidden].
        """
        import torch

        used = sorted({token for sequences in texts.values() for tokens in sequences for token in tokens})
        row_of = {token: row for row, token in enumerate(used)}
        embedding = self.model.model.embed_tokens
        empty = embedding.weight
        # Rows of the tokens that occur, and ids to match: the whole table may be gigabytes.
        table = to_torch(_rows(self._checkpoint, used)).float()
        embedding.weight = torch.nn.Parameter(table, requires_grad=False)
        embedding.padding_idx = None
        rows = {name: [[row_of[token] for token in one] for one in sequences] for name, sequences in texts.items()}
        embedded = {
            name: [self._embedded(indices, sequences) for indices in batches_of(sequences)]
            for name, sequences in rows.items()
        }
        embedding.weight = empty
        return embedded

    def _embedded(self, indices: Sequence[int], rows: Sequence[Sequence[int]]) -> "tuple[Batch, torch.Tensor]":
        """A batch of sequences of the compact table's rows."""
        import torch

        lengths = tuple(len(rows[index]) for index in indices)
        ids = torch.zeros((len(indices), max(lengths)), dtype=torch.long)
        for number, index in enumerate(indices):
            ids[number, : len(rows[index])] = torch.tensor(rows[index])
        hidden, keywords = self._record(ids)
        return Batch(indices=tuple(indices), lengths=lengths, keywords=keywords), hidden

    def _record(self, ids: "torch.Tensor") -> "tuple[torch.Tensor, tuple[dict[str, Any], ...]]":
        """What the first block reads, and what transformers passes to every block."""
        import torch

        keywords: list[dict[str, Any]] = []
        first: list[torch.Tensor] = []

        def record(hidden: "torch.Tensor", **passed: Any) -> "torch.Tensor":
            first.append(hidden)
            keywords.append(passed)
            return hidden

        with self._blocks_as(record), torch.no_grad():
            self.model.model(input_ids=ids, use_cache=False)
        return first[0], tuple(keywords)

    @contextmanager
    def _blocks_as(self, forward: Any) -> Iterator[None]:
        layers = list(self.model.model.layers)
        for layer in layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    @contextmanager
    def block(self, index: int) -> Iterator[Any]:
        """The block's module, filled with float32 weights; they are gone afterwards."""
        import torch

        layer = self.model.model.layers[index]
        empty = dict(layer.named_parameters())
        fill(self.model, self._checkpoint, self._names[f"layers.{index}"], torch.float32)
        check_filled(self._checkpoint, layer)
        try:
            yield layer
        finally:
            for name, value in empty.items():
                module, _, parameter = name.rpartition(".")
                setattr(layer.get_submodule(module), parameter, value)

    def run_block(self, index: int, batch: Batch, hidden: "torch.Tensor") -> "torch.Tensor":
        """A filled block's output for hidden states float32 [sequences, longest, hidden] of a batch."""
        import torch

        with torch.no_grad():
            output = self.model.model.layers[index](hidden, **batch.keywords[index])
            # Older transformers give a layer's output in a tuple.
            states: torch.Tensor = output[0] if isinstance(output, tuple) else output
            return states

    def normed(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """What the LM head reads, for the last block's output."""
        import torch

        with torch.no_grad():
            states: torch.Tensor = module_of(self.model, "norm")(hidden)
            return states

    def head(self) -> "torch.Tensor":
        """The LM head's weight [vocabulary, hidden] as the checkpoint stores it, in 16 or 32 bits."""
        name = "embed_tokens.weight" if self.spec.tied_head else "lm_head.weight"
        return to_torch(check_finite(self._checkpoint, name, read_head(self._checkpoint)))

    def logits(self, normed: "torch.Tensor", product: Any) -> "torch.Tensor":
        """Logits float32 [rows, vocabulary] of what `normed` gave for them, float32 [rows, hidden].

        `product`: the LM head's, float32 [rows, hidden] → [rows, vocabulary]; scales and soft caps are the model's own.
        """
        import torch

        def finish(**_: Any) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPast

            return BaseModelOutputWithPast(last_hidden_state=normed[None])

        model = self.model
        model.model.forward, model.lm_head.forward = finish, lambda x: product(x[0])[None]
        try:
            with torch.no_grad():
                logits: torch.Tensor = model(input_ids=torch.zeros((1, 1), dtype=torch.long), use_cache=False).logits
                return logits[0]
        finally:
            del model.model.forward, model.lm_head.forward


def head_product(weight: "torch.Tensor") -> Any:
    """The float product with a weight [vocabulary, hidden] of any float type, widened a part at a time."""
    import torch

    def product(x: "torch.Tensor") -> "torch.Tensor":
        y = torch.empty((len(x), len(weight)))
        for rows in row_slices(*weight.shape):
            torch.mm(x, weight[rows].float().t(), out=y[:, rows])
        return y

    return product


def _rows(checkpoint: Checkpoint, tokens: Sequence[int]) -> Any:
    name = "embed_tokens.weight"
    return check_finite(checkpoint, name, checkpoint.read(name)[np.asarray(tokens)])


def batches_of(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of sequences that are computed together: at most 1024 padded tokens, shortest sequences first."""
    batches: list[list[int]] = []
    for index in sorted(range(len(sequences)), key=lambda index: len(sequences[index])):
        if batches and (len(batches[-1]) + 1) * len(sequences[index]) <= _BATCH_TOKENS:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
