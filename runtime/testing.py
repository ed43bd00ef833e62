"""A session without a model, for testing drafters and loops: the next token, or its logits, follow from the context."""

from collections import abc
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engines.batches import only_sequence
from engines.cache_rows import check_slot
from engines.contract import Contract
from engines.probes.row_invariance import RowInvariance
from engines.session import Positions, Session, SessionMemory, positions_of
from engines.tree import depths
from runtime.control.control import Control, NoControl
from runtime.control.fixed import FixedControl
from runtime.drafters import Drafter
from runtime.generation_options import GenerationOptions
from runtime.kv_cache import KVCache
from runtime.loop import Round, decode
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, reference_sampler
from runtime.sampling.processors import LogitsChanges
from runtime.sequence import ALWAYS_EXACT, Sequence
from runtime.stopping import StopRules
from runtime.verifier import Verifier

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_CERTAIN = 30.0


class TableSession:
    """Answers as a verifier would whose target's choice after a context is `next_token(context)`.

    It keeps the tokens of its cache and reads nothing but committed positions and those of the call, so a loop that
    commits or truncates wrongly gets other answers. `passes` holds (cache length, fed tokens) of each sequence of every
    pass.

    Args:
        next_logits: context → float32 [V], in place of logits that make `next_token` certain.
        top_k: of `top_tokens`, which then go by the logits; 0 tells none.
        slots: sequences that share its passes.
        hidden_states: whether it tells some: float32 [R, 2], the tokens that were fed and their positions.
    """

    def __init__(
        self,
        next_token: Callable[[abc.Sequence[int]], int] | None = None,
        *,
        next_logits: Callable[[abc.Sequence[int]], Float32] | None = None,
        vocab_size: int = 100,
        max_length: int = 512,
        prefill_chunk: int = 256,
        top_k: int = 0,
        slots: int = 1,
        hidden_states: bool = False,
    ) -> None:
        self.contract = Contract(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            vocab_size=vocab_size,
            max_length=max_length,
            capacity=max_length + 64,
            prefill_chunk=prefill_chunk,
            top_k=top_k,
        )
        self.num_layers, self.takes_trees = 1, True
        self.max_logits_rows = max(self.contract.max_width, prefill_chunk)
        self._next_token, self._next_logits = next_token, next_logits
        self.num_slots = self.max_sequences = slots
        self.max_positions = self.max_logits_rows
        self._cached = np.full((slots, self.contract.capacity), -1, np.int64)
        self._top: Int64 | None = np.empty((0, top_k), np.int64) if top_k else None
        self.passes: list[list[tuple[int, tuple[int, ...]]]] = []
        self._tells_hidden = hidden_states
        self.hidden_states: tuple[Float32, ...] | None = None

    @property
    def calls(self) -> list[tuple[int, tuple[int, ...]]]:
        """(Cache length, fed tokens) of every sequence of every pass."""
        return [one for held in self.passes for one in held]

    @property
    def top_tokens(self) -> Int64 | None:
        """The likeliest tokens after the positions of the last call: int64 [M, k]; None where `top_k` is 0."""
        return self._top

    def run_batch(self, batch: abc.Sequence[Positions], *, logits: Float32 | None = None) -> Int64:
        """Feed positions of sequences; the target's tokens after the wanted ones: int64 [M], and their `logits`."""
        if self.num_slots == 1:
            only_sequence(batch)
        self.passes.append([(one.cache_length, tuple(one.tokens.tolist())) for one in batch])
        contexts = [context for one in batch for context in self._feed(one)]
        if self._tells_hidden:
            self.hidden_states = (np.concatenate([_fed(one) for one in batch]),)
        if self._top is not None:
            order = [np.argsort(-self._logits(context), kind="stable") for context in contexts]
            self._top = np.stack(order)[:, : self.contract.top_k]
        if logits is not None:
            for row, context in zip(logits, contexts, strict=False):
                row[:] = self._logits(context)
        if self._next_token is not None:
            return np.array([self._next_token(context) for context in contexts], np.int64)
        return np.array([int(self._logits(context).argmax()) for context in contexts], np.int64)

    def run(
        self,
        token_ids: abc.Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: abc.Sequence[int] | Int64 | None = None,
    ) -> Int64:
        """Feed tokens after the committed positions; the target's tokens after the last: int64 [num_logits_rows]."""
        return self.run_batch([positions_of(token_ids, cache_length, num_logits_rows, parents)])

    def run_logits(
        self,
        token_ids: abc.Sequence[int] | Int64,
        cache_length: int,
        num_logits_rows: int,
        parents: abc.Sequence[int] | Int64 | None = None,
        *,
        out: Float32 | None = None,
    ) -> Float32:
        """The same with the logits of those: float32 [num_logits_rows, V]."""
        logits = np.empty((num_logits_rows, self.contract.vocab_size), np.float32) if out is None else out
        self.run_batch([positions_of(token_ids, cache_length, num_logits_rows, parents)], logits=logits)
        return logits[:num_logits_rows]

    def read_rows(
        self,
        first: int,
        end: int,
        layers: abc.Sequence[int] | None = None,  # noqa: ARG002 - the form of `Session`
        *,
        slot: int = 0,
    ) -> Float32:
        """A copy of cached positions: float32 [1, 1, 1, positions, 1], the tokens."""
        check_slot(slot, self.num_slots)
        positions: Float32 = self._cached[slot, first:end].astype(np.float32).reshape(1, 1, 1, -1, 1)
        return positions

    def write_rows(self, first: int, rows: Float32, *, slot: int = 0) -> None:
        """Overwrite cached positions."""
        check_slot(slot, self.num_slots)
        self._cached[slot, first : first + rows.size] = rows.reshape(-1).astype(np.int64)

    def compact(self, cache_length: int, path: abc.Sequence[int] | Int64, *, slot: int = 0) -> None:
        """Move the new positions of an accepted tree path to the front."""
        check_slot(slot, self.num_slots)
        places = np.asarray(path, np.int64)
        self._cached[slot, cache_length : cache_length + len(places)] = self._cached[slot, cache_length + places]

    def memory(self) -> SessionMemory:
        """No weights; the tokens are the cache."""
        return SessionMemory(weights=0, cache=self._cached.nbytes, buffers=0)

    def close(self) -> None:
        """Nothing is held."""

    def _feed(self, one: Positions) -> list[list[int]]:
        """Write the positions; the context of each of the last ones: in a tree, that of its own path."""
        width, cached = len(one.tokens), self._cached[one.slot]
        cached[one.cache_length : one.cache_length + width] = one.tokens
        committed = cached[: one.cache_length].tolist()
        paths: list[list[int]] = []
        for place, token in enumerate(one.tokens):
            parent = place - 1 if one.parents is None else int(one.parents[place])
            paths.append([*(paths[parent] if parent >= 0 else []), int(token)])
        return [committed + path for path in paths[width - one.num_logits :]]

    def _logits(self, context: list[int]) -> Float32:
        if self._next_logits is not None:
            return np.asarray(self._next_logits(context), np.float32)
        assert self._next_token is not None
        logits = np.zeros(self.contract.vocab_size, np.float32)
        logits[self._next_token(context)] = _CERTAIN
        return logits


def _fed(one: Positions) -> Float32:
    """The tokens that were fed and their positions, which siblings share: float32 [T, 2]."""
    places = np.arange(len(one.tokens)) if one.parents is None else depths(one.parents)
    return np.stack([one.tokens, one.cache_length + places], axis=1).astype(np.float32)


def run_loop(
    session: Session,
    prompt: abc.Sequence[int] | Int64,
    *,
    drafter: Drafter | None = None,
    num_draft_tokens: int = 0,
    control: Control | None = None,
    max_new_tokens: int = 40,
    stop_ids: frozenset[int] = frozenset(),
    exact: RowInvariance = ALWAYS_EXACT,
    cache: KVCache | None = None,
    options: GenerationOptions | None = None,
    interrupted: Callable[[], str | None] = lambda: None,
) -> list[Round]:
    """Every step of one generation, without text.

    Args:
        drafter, num_draft_tokens: drafts so many tokens every round; without a drafter, `control` decides, or nothing
            is drafted.
        options: those that choose tokens from logits (seed 0 if none).
    """
    contract, ids = session.contract, np.asarray(prompt, np.int64)
    if drafter is not None:
        control = FixedControl(drafter, num_draft_tokens, trees=exact.tree)
    sequence = Sequence(
        ids,
        contract,
        cache=KVCache(contract) if cache is None else cache,
        chooser=GreedyChooser()
        if options is None
        else LogitsChooser(
            options,
            LogitsChanges(options, ids, contract.vocab_size, stop_ids),
            sampler=reference_sampler,
            seed=options.seed or 0,
        ),
        stop=StopRules(max_new_tokens=max_new_tokens, stop_ids=stop_ids),
        exact=exact,
    )
    return list(decode(sequence, Verifier(session), control or NoControl(), interrupted))
