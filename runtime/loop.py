"""The loop: draft K tokens ▸ verify [pending, d1..dK] ▸ accept the longest matching prefix ▸ commit ▸ emit."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from runtime.control.candidates import Prepared
from runtime.control.control import Control, NoControl
from runtime.draft_sources import SourceCount, count_sources
from runtime.drafters.base import Float32
from runtime.sampling.logprobs import TokenLogprob
from runtime.segment import NO_PROPOSAL, Outcome, Proposal, Segment, Targets
from runtime.sequence import Sequence
from runtime.verifier import Verifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One step's outcome: tokens emitted, how many were drafted and accepted, and its seconds. Prefill drafts nothing.

    `reused`: positions of the prompt that the prefill found in the cache. `seconds` covers the whole step, of which
    `draft_seconds` went into drafting and `sample_seconds` into choosing tokens from logits. A step that was
    interrupted emits nothing.

    `draft_tokens`: the draft; `draft_parents` of a tree, as `Draft.parents` has it, None for a chain. `drafter`: whose
    draft it was; `sources`: how many of its tokens were whose. `width`: positions of this sequence that the step's last
    pass was fed. `expected_tokens`, `expected_seconds`: what the controller expected of the step when it chose; 0 where
    nothing was expected.
    """

    tokens: tuple[int, ...]
    drafted: int
    accepted: int
    seconds: float
    draft_seconds: float
    finish_reason: str | None
    stopped_by: int | str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    sample_seconds: float = 0.0
    reused: int = 0
    width: int = 0
    draft_tokens: tuple[int, ...] = ()
    draft_parents: tuple[int, ...] | None = None
    drafter: str = ""
    sources: tuple[SourceCount, ...] = ()
    expected_tokens: float = 0.0
    expected_seconds: float = 0.0


class Decoding:
    """One sequence's way through passes: the chunks of its prompt, then rounds, each with a proposal of its control."""

    def __init__(
        self,
        sequence: Sequence,
        verifier: Verifier,
        control: Control,
        interrupted: Callable[[], str | None] = lambda: None,
    ) -> None:
        """`interrupted`: asked before every pass; a reason ends the sequence, and stays."""
        self.sequence, self.control, self.interrupted = sequence, control, interrupted
        self._verifier = verifier
        # Plain decoding: nobody has to be asked, or told.
        self._plain = type(control) is NoControl
        self._prompt = sequence.tokens
        # Its first pass is under way; the first token is there.
        self.begun = self.answered = False
        # What the prefill found in the cache.
        self._reused = 0
        # Of the step under way: passes, and drafting.
        self._seconds = self._draft_seconds = 0.0

    @property
    def finished(self) -> bool:
        """Whether no pass is to come."""
        return self.sequence.finished

    def begin(self) -> None:
        """Before the first pass: find what the cache has of the prompt."""
        if not self.begun:
            self.begun = True
            self._reused = self.sequence.reuse()

    def found(self, positions: int) -> None:
        """So many positions of the prompt were copied from another sequence."""
        self._reused += positions

    def propose(self, most: int | None = None) -> Proposal:
        """The control's drafts for the next round, at most so many; none for a prompt."""
        if self._plain or self.sequence.prompt_left:
            return NO_PROPOSAL
        start = time.perf_counter()
        sequence = self.sequence
        most = sequence.most_drafts if most is None else min(most, sequence.most_drafts)
        proposal = self.control.propose(sequence.tokens, most, sequence.cache_length)
        self._draft_seconds += time.perf_counter() - start
        return proposal

    @property
    def drafts(self) -> bool:
        """Whether anybody may be asked for drafts: not in plain decoding."""
        return not self._plain

    def prepare(self, most: int) -> Proposal | Prepared:
        """As `propose`, for a pass that other sequences share: what a controller may choose from is left open.

        `most`: drafts of a control that proposes on its own, at most.
        """
        if self._plain:
            return NO_PROPOSAL
        sequence, start = self.sequence, time.perf_counter()
        prepared = self.control.prepare(sequence.tokens, sequence.most_drafts, sequence.cache_length)
        self._draft_seconds += time.perf_counter() - start
        return self.propose(most) if prepared is None else prepared

    def drafted_for(self, seconds: float) -> None:
        """Trees of draft heads were grown in this step, for all sequences of the pass, which took so long."""
        self._draft_seconds += seconds

    def absorb(self, segment: Segment, targets: Targets, *, seconds: float, alone: bool = True) -> Round | None:
        """What a pass brought; None where it was a chunk before the prompt's last.

        Args:
            seconds: of the pass.
            alone: whether it held no other sequence: then it tells what a pass of this width takes.
        """
        start = time.perf_counter()
        is_prompt = self.sequence.prompt_left > 0
        try:
            outcome = self.sequence.absorb(segment, targets, tells=not self._plain)
            self._verifier.keep_path(segment, outcome.path)
        except BaseException:
            # Positions of a path that was not moved are another one's; whoever reuses the cache must not find them.
            self.sequence.forget_from(segment.cache_length)
            raise
        if targets.hidden_states is not None and not self._plain:
            self._tell(segment, outcome, targets.hidden_states, is_prompt=is_prompt)
        seconds += time.perf_counter() - start
        self._seconds += seconds
        if not len(outcome.tokens):
            return None
        start = time.perf_counter()
        if self._plain:
            self.answered = True
        elif self.answered:
            self.control.learn(replace(outcome, seconds=seconds) if alone else outcome)
        else:
            self.answered = True
            self.control.begin(self._prompt, int(outcome.tokens[0]), outcome.successors)
        # What speculation keeps of a round is of its time, too.
        self._seconds += time.perf_counter() - start
        return self._round(outcome)

    def _tell(self, segment: Segment, outcome: Outcome, hidden_states: tuple[Float32, ...], *, is_prompt: bool) -> None:
        """The control sees the hidden states of what was committed: a chunk of the prompt, or an accepted path."""
        if not is_prompt:
            path = list(outcome.path)
            hidden_states = tuple(states[path] for states in hidden_states)
        self.control.see(self.sequence.tokens, segment.cache_length, hidden_states)

    def end(self) -> Round:
        """The step in which an interruption is seen: it emits nothing."""
        self.sequence.end(self.interrupted())
        return Round(
            tokens=(),
            drafted=0,
            accepted=0,
            seconds=self._taken(),
            draft_seconds=0.0,
            finish_reason=self.sequence.cut.finish_reason,
            reused=0 if self.answered else self._reused,
        )

    def _taken(self) -> float:
        """Seconds of the step that ends here."""
        seconds = self._seconds + self._draft_seconds
        self._seconds = self._draft_seconds = 0.0
        return seconds

    def _round(self, outcome: Outcome) -> Round:
        cut, proposal = self.sequence.cut, outcome.segment.proposal
        draft = proposal.draft
        draft_seconds, reused = self._draft_seconds, self._reused
        self._reused = 0
        return Round(
            tokens=tuple(outcome.tokens.tolist()),
            drafted=len(draft.tokens),
            accepted=outcome.accepted,
            seconds=self._taken(),
            draft_seconds=draft_seconds,
            finish_reason=cut.finish_reason,
            stopped_by=cut.stopped_by,
            logprobs=outcome.logprobs,
            sample_seconds=outcome.sample_seconds,
            reused=reused,
            width=len(outcome.segment.tokens),
            draft_tokens=tuple(draft.tokens.tolist()),
            draft_parents=None if draft.parents is None else tuple(draft.parents.tolist()),
            drafter=proposal.drafter,
            sources=count_sources(outcome),
            expected_tokens=proposal.expected_tokens,
            expected_seconds=proposal.expected_seconds,
        )


def decode(
    sequence: Sequence,
    verifier: Verifier,
    control: Control,
    interrupted: Callable[[], str | None] = lambda: None,
) -> Iterator[Round]:
    """Generate with a verifier of one's own; the first `Round` is the prefill's, with one token."""
    decoding = Decoding(sequence, verifier, control, interrupted)
    while not decoding.finished:
        if decoding.interrupted() is not None:
            yield decoding.end()
            return
        decoding.begin()
        segment = decoding.sequence.next_pass(decoding.propose())
        start = time.perf_counter()
        [targets] = verifier.run([segment])
        step = decoding.absorb(segment, targets, seconds=time.perf_counter() - start)
        if step is not None:
            yield step
