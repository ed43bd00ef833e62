"""One request's sequence: its tokens, its cache, how its tokens are chosen, and where it ends."""

import time

import numpy as np
from numpy.typing import NDArray

from engines.contract import MAX_WIDTH, Contract
from engines.probes.row_invariance import RowInvariance
from quasar.errors import ContextLimitError, FaultError, GenerationError
from runtime.acceptance import accept, follow
from runtime.kv_cache import KVCache
from runtime.sampling.chooser import TokenChooser
from runtime.segment import NO_PROPOSAL, Outcome, Proposal, Segment, Targets, seen_tokens
from runtime.stopping import Cut, StopRules

Int64 = NDArray[np.int64]
# Every pass that decodes on its own is exact: sessions without a model, for tests.
ALWAYS_EXACT = RowInvariance(chain=1, widest=MAX_WIDTH)


def check_prompt(prompt: Int64, contract: Contract) -> None:
    """Raise if the prompt is empty, leaves no room for a new token, or holds an id outside the vocabulary."""
    if not len(prompt):
        raise GenerationError("the prompt is empty; at least one token was expected")
    if len(prompt) >= contract.max_length:
        raise ContextLimitError(
            f"the prompt has {len(prompt)} tokens and this engine holds {contract.max_length}, new tokens included: "
            "shorten the prompt or build with a larger --max-length"
        )
    if prompt.min() < 0 or prompt.max() >= contract.vocab_size:
        raise GenerationError(f"the prompt holds a token id outside the vocabulary of {contract.vocab_size}")


class Sequence:
    """Says what it needs of the next pass, and takes in what the pass brought.

    The passes of a sequence are the chunks of its prompt, then rounds: the pending token, which is the last one and
    has no cache position yet, and drafts.
    """

    def __init__(
        self,
        prompt: Int64,
        contract: Contract,
        *,
        cache: KVCache,
        chooser: TokenChooser,
        stop: StopRules,
        exact: RowInvariance = ALWAYS_EXACT,
    ) -> None:
        """`prompt` int64 [n], which `check_prompt` has seen.

        Args:
            cache: positions of earlier tokens; those that serve this prompt are kept.
            chooser: chooses the target's tokens.
            exact: which passes are exact on this machine; narrower ones are padded, wider ones are not made.
        """
        # The last token needs no cache position, and the cache may end the sequence before max_new_tokens does.
        stop.limit(contract.max_length - len(prompt))
        self._contract, self._cache, self._chooser, self._stop, self._exact = contract, cache, chooser, stop, exact
        self._tokens = np.empty(len(prompt) + stop.left + MAX_WIDTH, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._length = self._num_prompt = len(prompt)
        self.cut = Cut()

    @property
    def tokens(self) -> Int64:
        """Prompt and everything emitted: a view of a buffer that grows, int64 [n], that drafters cannot write."""
        view = self._tokens[: self._length]
        view.flags.writeable = False
        return view

    @property
    def cache_length(self) -> int:
        """Cache positions that are committed."""
        return self._cache.length

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that are still to be fed; 0 while it decodes."""
        return max(0, self._num_prompt - self._cache.length)

    @property
    def finished(self) -> bool:
        """Whether no pass is to come."""
        return self.cut.finish_reason is not None

    @property
    def most_drafts(self) -> int:
        """Drafts that the next round may hold: each fits the cache, is exact, and would not be cut off."""
        return min(
            self._stop.left - 1,
            self._cache.room - 1,
            self._exact.widest - 1,
            self._exact.drafts_before_boundary(self._cache.length),
        )

    def reuse(self) -> int:
        """Keep the cache positions that serve this prompt, and no others; returns how many those are."""
        reused = self._cache.reusable(self.tokens, decoded_exact=self._exact.prefill)
        self._cache.truncate(reused)
        return reused

    def next_pass(self, proposal: Proposal = NO_PROPOSAL, *, most: int | None = None) -> Segment:
        """What is to be fed: the next chunk of the prompt, or the pending token with a proposal's drafts.

        `most`: positions of a chunk, at most, where the bits of a prompt do not depend on where it is cut
        (`RowInvariance.prefill`); None: the engine's own chunk.

        Raises:
            FaultError: a draft outside the vocabulary.
        """
        if self.prompt_left:
            first = self._cache.length
            end = next(self._contract.prompt_chunks(self._num_prompt, first)).stop
            end = end if most is None else min(end, first + most)
            return Segment(
                tokens=self._tokens[first:end],
                cache_length=first,
                num_logits=1,
                wants_logits=end == self._num_prompt and self._chooser.wants_logits,
                slot=self._cache.slot,
            )
        draft = proposal.draft
        if len(draft.tokens) and (draft.tokens.min() < 0 or draft.tokens.max() >= self._contract.vocab_size):
            raise FaultError(
                f"the drafter proposed {draft.tokens.tolist()}; ids below {self._contract.vocab_size} were expected"
            )
        # Padded to the width of plain decoding.
        count = 1 + len(draft.tokens)
        fed = np.empty(max(count, self._exact.chain or 1), np.int64)
        fed[0] = self._tokens[self._length - 1]
        fed[1:count] = draft.tokens
        fed[count:] = fed[count - 1]
        parents = None
        if draft.parents is not None:
            parents = np.arange(-1, len(fed) - 1, dtype=np.int64)
            parents[1:count] = draft.parents + 1
        return Segment(
            tokens=fed,
            cache_length=self._cache.length,
            num_logits=len(fed),
            wants_logits=self._chooser.wants_logits,
            parents=parents,
            proposal=proposal,
            slot=self._cache.slot,
        )

    def absorb(self, segment: Segment, targets: Targets, *, tells: bool = True) -> Outcome:
        """Accept the drafts that the target chose, commit their cache positions, and emit tokens.

        `tells`: somebody wants to know what was likely after each token (`Outcome.seen`).

        A chunk before the prompt's last emits nothing. The path of a tree is still to be moved in the session's cache
        (`Verifier.keep_path`).
        """
        prompt = self.prompt_left > 0
        if prompt:
            self._cache.commit(segment.tokens, prefill=True)
            if self.prompt_left:
                return Outcome(segment=segment, tokens=segment.tokens[:0])
        first = self._length
        start = time.perf_counter()

        def choose(place: int) -> int:
            token = self._chooser.choose(targets, place, self._tokens[: self._length])
            self._tokens[self._length] = token
            self._length += 1
            return token

        def goes_on(token: int) -> bool:
            self.cut = self._stop.take(token)
            return self.cut.finish_reason is None

        draft = segment.proposal.draft
        path, _, accepted = accept(follow(draft.tokens, draft.parents), choose, goes_on)
        sample_seconds = time.perf_counter() - start if self._chooser.wants_logits else 0.0
        if not prompt:
            # The pending token and the drafts before the last token, which has no cache position yet.
            self._cache.commit(segment.tokens[list(path)])
        seen, successors = seen_tokens(segment, targets.successors, path) if tells else (None, None)
        return Outcome(
            segment=segment,
            tokens=self._tokens[first : self._length].copy(),
            path=path,
            accepted=accepted,
            logprobs=self._chooser.take_logprobs(),
            seen=seen,
            successors=successors,
            sample_seconds=sample_seconds,
        )

    def forget_from(self, length: int) -> None:
        """Drop cache positions from `length` on; nothing may be fed after that."""
        self._cache.truncate(min(length, self._cache.length))

    def end(self, reason: str | None) -> None:
        """End it from outside; nothing more is emitted."""
        self._stop.end()
        self.cut = Cut(finish_reason=reason)
