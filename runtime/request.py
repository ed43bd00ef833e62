"""One request, from its options to its events: steps of its sequence, text, statistics."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError
from quasar.text import TextCodec
from runtime.control.control import Control
from runtime.control.from_options import make_control
from runtime.events import Event
from runtime.generation_options import GenerationOptions
from runtime.interruption import Interruption
from runtime.loop import Round, decode
from runtime.resources import EngineResources
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, TokenChooser
from runtime.sampling.processors import LogitsChanges
from runtime.scheduler import ScheduledSequence
from runtime.sequence import Sequence, check_prompt
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
    scheduled: ScheduledSequence | None = None,
    *,
    completes: bool = False,
) -> Iterator[Event]:
    """Check everything now, and generate when the events are asked for.

    Args:
        ids: int64 [n], the prompt.
        scheduled: a conversation's, which outlives the request.
        completes: the prompt is text that is continued, not a conversation with an answer of its own.
    """
    session = resources.loaded.session
    resources.scheduler.check_process()
    # What is wrong with the prompt is said before an engine that drafts is loaded.
    options.check_vocabulary(session.contract.vocab_size)
    check_prompt(ids, session.contract)
    seed = options.seed
    if options.temperature > 0 and seed is None:
        seed = secrets.randbits(64)
    control = make_control(
        options.drafter,
        options.num_draft_tokens,
        target=resources.target,
        exact=resources.loaded.record.row_invariance,
        knowledge=resources.knowledge,
        draw=resources.sampler(options.filters, seed or 0) if options.temperature > 0 else None,
    )
    if options.recorder is not None:
        control = RecordingControl(control, options.recorder, session.contract.vocab_size)
    stop_tokens = _stop_tokens(options.stop_strings, resources.codec)
    asked = options.stop_ids | stop_tokens.keys()
    stop_ids = asked if options.ignore_eos else asked | resources.end_ids
    is_shown = resources.codec.detokenizer.is_shown
    rules = StopRules(
        max_new_tokens=options.max_new_tokens,
        stop_ids=stop_ids,
        stop_strings=options.stop_strings,
        min_new_tokens=options.min_new_tokens,
        stop_tokens=stop_tokens,
        stream=resources.codec.stream(continues=completes and any(is_shown(token) for token in ids.tolist())),
    )
    request = _Request(
        resources=resources,
        hooks=hooks,
        ids=ids,
        options=options,
        control=control,
        rules=rules,
        seed=seed if options.temperature > 0 else None,
        end_ids=stop_ids | resources.end_ids,
        interruption=Interruption(options),
    )
    return request.events(scheduled)


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
    rules: StopRules
    seed: int | None
    end_ids: frozenset[int]
    interruption: Interruption

    def events(self, conversation: ScheduledSequence | None) -> Iterator[Event]:
        """Step by step; a sequence of its own is released at the end, whatever ends it."""
        scheduled = self.resources.new_sequence() if conversation is None else conversation
        stats_so_far = StatsBuilder(len(self.ids), self.seed)
        sequence = Sequence(
            self.ids,
            self.resources.verifier.contract,
            cache=scheduled.cache,
            chooser=self._chooser(),
            stop=self.rules,
            exact=self.resources.loaded.record.row_invariance,
        )
        scheduler = self.resources.scheduler
        rounds = decode(sequence, self.resources.verifier, self.control, self.interruption)
        scheduler.begin(scheduled)
        ended = False
        try:
            while not ended:
                step = self._step(rounds, scheduled, stats_so_far)
                ended = step.finish_reason is not None
                _call(self.hooks.on_round, step)
                stats = stats_so_far.stats() if ended else None
                if stats is not None:
                    _report(stats, self.hooks)
                yield Event(
                    text=self.rules.take_text(),
                    token_ids=step.tokens,
                    drafted=step.drafted,
                    accepted=step.accepted,
                    logprobs=step.logprobs,
                    finish_reason=step.finish_reason,
                    stopped_by=step.stopped_by,
                    stats=stats,
                )
        finally:
            scheduler.end(scheduled)
            if conversation is None:
                scheduler.release(scheduled)
            if not ended:
                _report(stats_so_far.stats(), self.hooks)
            if isinstance(self.control, RecordingControl):
                self.control.finish()

    def _step(self, rounds: Iterator[Round], scheduled: ScheduledSequence, stats_so_far: StatsBuilder) -> Round:
        asked = time.perf_counter()
        with self.resources.scheduler.step(scheduled, lambda: self.interruption() is not None) as granted:
            waited = time.perf_counter() - asked
            step = next(rounds) if granted else self._nothing()
        stats_so_far.wait_seconds += waited
        stats_so_far.add(step)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("round: %d drafted, %d accepted", step.drafted, step.accepted, extra={"round": step})
        return step

    def _nothing(self) -> Round:
        """Interrupted while other sequences had the slot."""
        self.rules.end()
        return Round(
            tokens=(), drafted=0, accepted=0, seconds=0.0, draft_seconds=0.0, finish_reason=self.interruption()
        )

    def _chooser(self) -> TokenChooser:
        options = self.options
        if options.temperature == 0 and options.logprobs is None and not options.changes_logits:
            return GreedyChooser()
        changes = None
        if options.changes_logits:
            changes = LogitsChanges(options, self.ids, self.resources.verifier.contract.vocab_size, self.end_ids)
        return LogitsChooser(options, changes, sampler=self.resources.sampler, seed=self.seed or 0)


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
