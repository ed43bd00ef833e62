"""One request, from its options to its events: steps of its sequence, text, statistics."""

import logging
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError
from quasar.text import TextCodec
from runtime.active_request import UNREAD, ActiveRequest, Step
from runtime.control.control import Control
from runtime.control.from_options import make_control
from runtime.drafters.prediction import PredictedAnswer
from runtime.events import Event
from runtime.generation_options import GenerationOptions
from runtime.grammar.greedy import GreedyGrammarChooser
from runtime.grammar.matcher import GrammarState
from runtime.interruption import Interruption
from runtime.loop import Decoding, Round
from runtime.resources import EngineResources
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, TokenChooser
from runtime.sampling.processors import LogitsChanges
from runtime.sequence import Sequence, check_prompt
from runtime.slots import ScheduledSequence
from runtime.stats import Stats, StatsBuilder
from runtime.stopping import StopRules
from runtime.traces import RecordingControl

Int64 = NDArray[np.int64]

_Value = TypeVar("_Value")

_log = logging.getLogger("quasar.runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Callbacks for metrics, from the thread that generates; what they raise is logged and goes no further."""

    on_round: Callable[[Round], None] | None = None
    on_generation: Callable[[Stats], None] | None = None


def start_request(
    resources: EngineResources,
    ids: Int64,
    options: GenerationOptions,
    hooks: Hooks,
    conversation: ScheduledSequence | None = None,
    *,
    completes: bool = False,
    most_unread: int | None = UNREAD,
    called_at: float | None = None,
) -> Iterator[Event]:
    """Check everything now, and generate when the events are asked for.

    Args:
        ids: int64 [n], the prompt.
        conversation: a conversation's sequence, which outlives the request.
        completes: the prompt is text that is continued, not a conversation with an answer of its own.
        most_unread: steps that may be ahead of the reader of the events; None: all.
        called_at: when it was asked for, as `Interruption` has it.
    """
    session = resources.loaded.session
    resources.scheduler.check_process()
    # What is wrong with the prompt is said before an engine that drafts is loaded.
    options.check_vocabulary(session.contract.vocab_size)
    check_prompt(ids, session.contract)
    stop_tokens = _stop_tokens(options.stop_strings, resources.codec)
    asked = options.stop_ids | stop_tokens.keys()
    is_shown = resources.codec.detokenizer.is_shown
    grammar = None
    if options.grammar is not None:
        # Compiled here, in the caller's thread: the passes of other requests go on meanwhile.
        grammar = resources.grammars.start(
            options.grammar, other_ends=[token for token in asked if not is_shown(token)]
        )
    seed = options.seed
    if options.temperature > 0 and seed is None:
        seed = secrets.randbits(64)
    salt = resources.salt_of(options.cache_salt)
    scheduled = resources.new_sequence(salt=salt) if conversation is None else conversation
    cache = scheduled.cache
    control = make_control(
        options.drafter,
        options.num_draft_tokens,
        target=replace(
            resources.target,
            slot=lambda: cache.slot,
            committed=lambda: cache.length,
            prediction=_predicted(options, resources.codec, begins=len(ids)),
        ),
        exact=resources.loaded.record.row_invariance,
        knowledge=resources.knowledge,
        draw=resources.sampler(options.filters, seed or 0) if options.temperature > 0 else None,
        grammar=grammar,
    )
    if options.recorder is not None:
        control = RecordingControl(control, options.recorder, session.contract.vocab_size)
    stop_ids = asked if options.ignore_eos else asked | resources.end_ids
    # The text is what the grammar saw: a space that it begins with is the answer's own.
    continues = grammar is not None or (completes and any(is_shown(token) for token in ids.tolist()))
    rules = StopRules(
        max_new_tokens=options.max_new_tokens,
        stop_ids=stop_ids,
        stop_strings=options.stop_strings,
        min_new_tokens=options.min_new_tokens,
        stop_tokens=stop_tokens,
        stream=resources.codec.stream(continues=continues),
        is_complete=(lambda: False) if grammar is None else (lambda: grammar.complete),
    )
    request = _Request(
        resources=resources,
        hooks=hooks,
        ids=ids,
        options=options,
        control=control,
        grammar=grammar,
        rules=rules,
        seed=seed if options.temperature > 0 else None,
        end_ids=stop_ids | resources.end_ids,
        interruption=Interruption(options, called_at),
        salt=salt,
        most_unread=most_unread,
    )
    return request.events(scheduled)


def _predicted(options: GenerationOptions, codec: TextCodec, *, begins: int) -> PredictedAnswer | None:
    """What the answer will resemble, in the tokens that an answer would have; `begins`: tokens of the prompt."""
    predicted = options.prediction
    if predicted is None:
        return None
    if isinstance(predicted, str):
        continues = options.chat is None or options.continue_final_message
        predicted = codec.encode_continuation(predicted) if continues else codec.encode_answer(predicted)
    return PredictedAnswer(tokens=np.array(predicted, np.int64), begins=begins)


def _stop_tokens(strings: tuple[str, ...], codec: TextCodec) -> dict[int, str]:
    """Id → spelling of the stop strings that are special tokens: no text spells those."""
    special = codec.literal.special_tokens if strings else {}
    found = {}
    for string in strings:
        if string in special:
            found[special[string]] = string
        elif any(name in string for name in special):
            raise GenerationError(
                f"stop has {string!r}, which no text holds, since a special token is part of it: give that token alone"
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """One generation, checked and ready."""

    resources: EngineResources
    hooks: Hooks
    ids: Int64
    options: GenerationOptions
    control: Control
    grammar: GrammarState | None
    rules: StopRules
    seed: int | None
    end_ids: frozenset[int]
    interruption: Interruption
    salt: str | None
    most_unread: int | None

    def events(self, scheduled: ScheduledSequence) -> Iterator[Event]:
        """Step by step; a sequence that is no conversation's is released at the end, whatever ends it."""
        scheduler = self.resources.scheduler
        scheduler.begin(scheduled)
        stats_so_far = StatsBuilder(len(self.ids), self.seed)
        request, read, ended = None, 0, False
        try:
            self._take_salt(scheduled)
            request = self._request(scheduled)
            scheduler.submit(request)
            while not ended:
                step = scheduler.take(request)
                stats_so_far.wait_seconds += step.wait_seconds
                stats_so_far.add(step.round)
                read += len(step.round.tokens)
                ended = step.round.finish_reason is not None
                yield self._event(step, stats_so_far)
        finally:
            if request is not None:
                scheduler.withdraw(request)
            if not scheduled.outlives:
                scheduler.release(scheduled)
            else:
                # What nobody has read is no part of the conversation. The last token has no position.
                scheduled.cache.truncate(min(scheduled.cache.length, len(self.ids) + max(0, read - 1)))
            scheduler.end(scheduled)
            if not ended:
                _report(stats_so_far.stats(), self.hooks)
            if isinstance(self.control, RecordingControl):
                self.control.finish()

    def _take_salt(self, scheduled: ScheduledSequence) -> None:
        """A conversation's earlier positions serve others under a new salt only where they are of this prompt."""
        if scheduled.salt != self.salt:
            exact = self.resources.loaded.record.row_invariance.prefill
            scheduled.cache.truncate(scheduled.cache.reusable(self.ids, decoded_exact=exact))
            scheduled.salt = self.salt

    def _request(self, scheduled: ScheduledSequence) -> ActiveRequest:
        sequence = Sequence(
            self.ids,
            self.resources.verifier.contract,
            cache=scheduled.cache,
            chooser=self._chooser(),
            stop=self.rules,
            exact=self.resources.loaded.record.row_invariance,
        )
        return ActiveRequest(
            Decoding(sequence, self.resources.verifier, self.control, self.interruption),
            scheduled,
            take_text=self.rules.take_text,
            priority=self.options.priority,
            most_unread=self.most_unread,
        )

    def _event(self, step: Step, stats_so_far: StatsBuilder) -> Event:
        made = step.round
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("round: %d drafted, %d accepted", made.drafted, made.accepted, extra={"round": made})
        _call(self.hooks.on_round, made)
        stats = stats_so_far.stats() if made.finish_reason is not None else None
        if stats is not None:
            _report(stats, self.hooks)
        return Event(
            text=step.text,
            token_ids=made.tokens,
            drafted=made.drafted,
            accepted=made.accepted,
            round=made,
            logprobs=made.logprobs,
            finish_reason=made.finish_reason,
            stopped_by=made.stopped_by,
            stats=stats,
        )

    def _chooser(self) -> TokenChooser:
        options = self.options
        if options.temperature == 0 and options.logprobs is None and not options.changes_logits:
            return GreedyChooser() if self.grammar is None else GreedyGrammarChooser(self.grammar)
        changes = None
        if options.changes_logits:
            changes = LogitsChanges(options, self.ids, self.resources.verifier.contract.vocab_size, self.end_ids)
        return LogitsChooser(
            options, changes, sampler=self.resources.sampler, seed=self.seed or 0, grammar=self.grammar
        )


def _report(stats: Stats, hooks: Hooks) -> None:
    if _log.isEnabledFor(logging.INFO):
        _log.info(
            "generation: %d tokens in %d rounds, %s",
            stats.tokens,
            stats.rounds,
            stats.finish_reason,
            extra={"generation": stats.to_json()},
        )
    _call(hooks.on_generation, stats)


def _call(hook: Callable[[_Value], None] | None, value: _Value) -> None:
    if hook is None:
        return
    try:
        hook(value)
    except Exception:
        _log.exception("a metrics hook failed")
