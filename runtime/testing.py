"""A session without a model, for testing drafters and loops: the next token, or its logits, follow from the context."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH, Contract
from engines.row_invariance import RowInvariance
from runtime.drafters import Drafter
from runtime.kv_cache import KVCache
from runtime.loop import Round, decode
from runtime.options import GenerationOptions
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, VerifierSession, reference_sampler
from runtime.sampling.processors import LogitsChanges
from runtime.stopping import StopRules

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_CERTAIN = 30.0


class TableSession:
    """Answers as a verifier would whose target's choice after a context is `next_token(context)`.

    It keeps the tokens of its cache and reads nothing but committed rows and the rows of the call, so a loop that
    commits or truncates wrongly gets other answers. `calls` holds (cache length, fed tokens) of every call.

    Args:
        next_logits: context → float32 [V], in place of logits that make `next_token` certain.
    """

    def __init__(
        self,
        next_token: Callable[[Sequence[int]], int] | None = None,
        *,
        next_logits: Callable[[Sequence[int]], Float32] | None = None,
        vocab_size: int = 100,
        max_length: int = 512,
        prefill_chunk: int = 256,
    ) -> None:
        self.contract = Contract(
            num_layers=1,
            num_kv_heads=1,
            head_size=1,
            vocab_size=vocab_size,
            max_length=max_length,
            capacity=max_length + 64,
            prefill_chunk=prefill_chunk,
        )
        self._next_token, self._next_logits = next_token, next_logits
        self._cached = np.full(self.contract.capacity, -1, np.int64)
        self.calls: list[tuple[int, tuple[int, ...]]] = []

    def run(self, token_ids: Int64, cache_length: int, num_logits_rows: int, /) -> Int64:
        """Feed tokens behind the committed rows; the target's token after each of the last rows: int64 [rows]."""
        contexts = self._feed(token_ids, cache_length, num_logits_rows)
        if self._next_token is not None:
            return np.array([self._next_token(context) for context in contexts], np.int64)
        return np.array([int(self._logits(context).argmax()) for context in contexts], np.int64)

    def run_logits(
        self, token_ids: Int64, cache_length: int, num_logits_rows: int, /, *, out: Float32 | None = None
    ) -> Float32:
        """The same with the logits of those rows: float32 [rows, V]."""
        contexts = self._feed(token_ids, cache_length, num_logits_rows)
        rows = np.stack([self._logits(context) for context in contexts])
        if out is None:
            return rows
        out[: len(rows)] = rows
        return out[: len(rows)]

    def read_rows(self, first: int, end: int, layers: Sequence[int] | None = None) -> Float32:  # noqa: ARG002
        """A copy of cache rows: float32 [1, 1, 1, rows, 1], the tokens."""
        rows: Float32 = self._cached[first:end].astype(np.float32).reshape(1, 1, 1, -1, 1)
        return rows

    def write_rows(self, first: int, rows: Float32) -> None:
        """Overwrite cache rows."""
        self._cached[first : first + rows.size] = rows.reshape(-1).astype(np.int64)

    def close(self) -> None:
        """Nothing is held."""

    def _feed(self, token_ids: Int64, cache_length: int, num_logits_rows: int) -> list[list[int]]:
        self.calls.append((cache_length, tuple(int(token) for token in token_ids)))
        end = cache_length + len(token_ids)
        self._cached[cache_length:end] = token_ids
        return [self._cached[: row + 1].tolist() for row in range(end - num_logits_rows, end)]

    def _logits(self, context: list[int]) -> Float32:
        if self._next_logits is not None:
            return np.asarray(self._next_logits(context), np.float32)
        assert self._next_token is not None
        logits = np.zeros(self.contract.vocab_size, np.float32)
        logits[self._next_token(context)] = _CERTAIN
        return logits


def run_loop(
    session: VerifierSession,
    prompt: Sequence[int] | Int64,
    *,
    drafter: Drafter | None = None,
    num_draft_tokens: int = 0,
    max_new_tokens: int = 40,
    stop_ids: frozenset[int] = frozenset(),
    exact: RowInvariance = RowInvariance(chain=1, widest=MAX_WIDTH),  # noqa: B008 - immutable
    cache: KVCache | None = None,
    options: GenerationOptions | None = None,
    interrupted: Callable[[], str | None] = lambda: None,
) -> list[Round]:
    """Every step of one generation, without text; `options`: those that choose tokens from logits (seed 0 if none)."""
    contract, ids = session.contract, np.asarray(prompt, np.int64)
    return list(
        decode(
            GreedyChooser(session)
            if options is None
            else LogitsChooser(
                session,
                options,
                LogitsChanges(options, ids, contract.vocab_size, stop_ids),
                sampler=reference_sampler,
                seed=options.seed or 0,
                buffer=lambda: np.empty((contract.max_width, contract.vocab_size), np.float32),
            ),
            ids,
            StopRules(max_new_tokens=max_new_tokens, stop_ids=stop_ids),
            cache=KVCache(contract) if cache is None else cache,
            contract=contract,
            drafter=drafter,
            num_draft_tokens=num_draft_tokens,
            exact=exact,
            interrupted=interrupted,
        )
    )
