"""What an engine's generations share, and one generation: turns on the cache, rounds, text, statistics."""

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines import LoadedEngine
from engines.machine import user_cache
from engines.text import open_codec
from quasar.errors import GenerationError
from quasar.text import ChatOptions, Message, TextCodec
from quasar.text.messages import check_messages
from runtime.cache_turns import CacheTurns, Tenant
from runtime.control.controller import Knowledge
from runtime.control.make import make_control
from runtime.control.plan import Control
from runtime.control.prices import Prices
from runtime.drafters.draft_engine import DraftEngines
from runtime.drafters.kept_successors import KeptSuccessors
from runtime.drafters.recycling import KEPT
from runtime.drafters.registry import Target
from runtime.events import Event
from runtime.interruption import Interruption
from runtime.kv_cache import KVCache
from runtime.loop import Round, check_prompt, decode
from runtime.options import GenerationOptions
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, TokenChooser
from runtime.sampling.compiled import make_sampler
from runtime.sampling.processors import LogitsChanges
from runtime.stats import Stats, Tally
from runtime.stopping import StopRules
from runtime.traces import RecordingControl

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]

_Value = TypeVar("_Value")

_log = logging.getLogger("quasar.runtime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Callbacks for metrics, from the thread that generates; what they raise is logged and goes no further."""

    on_round: Callable[[Round], None] | None = None
    on_generation: Callable[[Stats], None] | None = None


class Core:
    """A loaded engine with its turns, its text codec, its sampler and the buffer that logits are computed into."""

    def __init__(self, loaded: LoadedEngine, hooks: Hooks) -> None:
        self.loaded = loaded
        self.hooks = hooks
        self.codec: TextCodec = open_codec(loaded.directory.path, loaded.directory.manifest.text)
        self.turns = CacheTurns(loaded.session)
        self.sampler = make_sampler()
        self.draft_engines = DraftEngines.of(loaded)
        manifest = loaded.directory.manifest
        self.kept_successors = KeptSuccessors(
            user_cache() / "successors" / f"{manifest.engine_hash[:16]}.npy",
            vocab_size=manifest.contract.vocab_size,
            k=KEPT,
        )
        self._logits: Float32 | None = None

    @cached_property
    def target(self) -> Target:
        """What drafters are made for."""
        contract = self.loaded.session.contract
        return Target(
            vocab_size=contract.vocab_size,
            trees=self.loaded.record.row_invariance.tree,
            tells_successors=contract.top_k > 0,
            warm=self.loaded.directory.successors(),
            engines=self.draft_engines,
            kept=self.kept_successors,
        )

    @cached_property
    def knowledge(self) -> Knowledge:
        """What the controllers of all texts learn together."""
        return Knowledge(Prices(self.loaded.record.cost_surface_ms, widest=self.loaded.session.contract.max_width))

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The model's end ids."""
        return frozenset(self.loaded.directory.manifest.text.eos_token_ids)

    def close(self) -> None:
        """Wait for the step that is running, and free the sessions."""
        self.turns.close()
        self.draft_engines.close()
        self.kept_successors.save()

    def new_tenant(self, cache: KVCache | None = None) -> Tenant:
        """A text that takes turns, with an empty cache or a copy of another's."""
        return self.turns.new_tenant(KVCache(self.loaded.session.contract) if cache is None else cache)

    def logits_buffer(self) -> Float32:
        """Float32 [rows, V] for the widest verify call; allocated when logits are first asked for."""
        if self._logits is None:
            contract = self.loaded.session.contract
            self._logits = np.empty((contract.max_width, contract.vocab_size), np.float32)
        return self._logits

    @property
    def logits_bytes(self) -> int:
        """Memory of that buffer."""
        return 0 if self._logits is None else self._logits.nbytes

    def encode(self, prompt: object, chat: ChatOptions | None, history: tuple[Message, ...] = ()) -> Int64:
        """Token ids int64 [n]; a string is the user's message after `history`. `chat` None: no chat template."""
        if isinstance(prompt, str):
            if chat is None:
                return np.asarray(self.codec.encode_text(prompt), np.int64)
            return np.asarray(self.codec.encode_chat([*history, {"role": "user", "content": prompt}], chat), np.int64)
        if isinstance(prompt, np.ndarray) or (
            isinstance(prompt, (list, tuple)) and all(isinstance(item, (int, np.integer)) for item in prompt)
        ):
            return _token_ids(prompt)
        if chat is None:
            raise GenerationError("messages need the chat template; without it give a string or token ids")
        return np.asarray(self.codec.encode_chat(check_messages(prompt, "prompt"), chat), np.int64)

    def start(
        self, ids: Int64, options: GenerationOptions, tenant: Tenant | None = None, *, completes: bool = False
    ) -> Iterator[Event]:
        """Check everything now, and generate when the events are asked for.

        Args:
            tenant: a conversation's text.
            completes: the prompt is text that goes on, not a conversation with an answer of its own.
        """
        session = self.loaded.session
        self.turns.check_process()
        # What is wrong with the text is said before an engine that drafts is loaded.
        options.check_vocabulary(session.contract.vocab_size)
        check_prompt(ids, session.contract)
        seed = options.seed
        if options.temperature > 0 and seed is None:
            seed = secrets.randbits(64)
        control = make_control(
            options.drafter,
            options.num_draft_tokens,
            target=self.target,
            exact=self.loaded.record.row_invariance,
            knowledge=self.knowledge,
            draw=self.sampler(options.filters, seed or 0) if options.temperature > 0 else None,
        )
        if options.recorder is not None:
            control = RecordingControl(control, options.recorder, session.contract.vocab_size)
        stop_tokens = self._stop_tokens(options.stop_strings)
        asked = options.stop_ids | stop_tokens.keys()
        stop_ids = asked if options.ignore_eos else asked | self.end_ids
        is_shown = self.codec.detokenizer.is_shown
        rules = StopRules(
            max_new_tokens=options.max_new_tokens,
            stop_ids=stop_ids,
            stop_strings=options.stop_strings,
            min_new_tokens=options.min_new_tokens,
            stop_tokens=stop_tokens,
            stream=self.codec.stream(continues=completes and any(is_shown(token) for token in ids.tolist())),
        )
        run = _Run(
            core=self,
            ids=ids,
            options=options,
            control=control,
            rules=rules,
            seed=seed if options.temperature > 0 else None,
            end_ids=stop_ids | self.end_ids,
            interruption=Interruption(options),
        )
        return run.events(tenant)

    def _stop_tokens(self, strings: tuple[str, ...]) -> dict[int, str]:
        """Id → spelling of the stop strings that are special tokens: no text spells those."""
        special = self.codec.literal.special_tokens if strings else {}
        found = {}
        for string in strings:
            if string in special:
                found[special[string]] = string
            elif any(name in string for name in special):
                raise GenerationError(
                    f"stop has {string!r}, which no text holds, since a special token is part of it: give that token "
                    "alone"
                )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One generation, checked and ready."""

    core: Core
    ids: Int64
    options: GenerationOptions
    control: Control
    rules: StopRules
    seed: int | None
    end_ids: frozenset[int]
    interruption: Interruption

    def events(self, kept: Tenant | None) -> Iterator[Event]:
        """Step by step; a tenant that is not kept is let go at the end, whatever ends it."""
        tenant = self.core.new_tenant() if kept is None else kept
        tally = Tally(len(self.ids), self.seed)
        rounds = decode(
            self._chooser(),
            self.ids,
            self.rules,
            session=self.core.loaded.session,
            cache=tenant.cache,
            control=self.control,
            exact=self.core.loaded.record.row_invariance,
            interrupted=self.interruption,
        )
        self.core.turns.begin(tenant)
        ended = False
        try:
            while not ended:
                step = self._step(rounds, tenant, tally)
                ended = step.finish_reason is not None
                _call(self.core.hooks.on_round, step)
                stats = tally.stats() if ended else None
                if stats is not None:
                    _report(stats, self.core.hooks)
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
            self.core.turns.end(tenant)
            if kept is None:
                self.core.turns.release(tenant)
            if not ended:
                _report(tally.stats(), self.core.hooks)
            if isinstance(self.control, RecordingControl):
                self.control.finish()

    def _step(self, rounds: Iterator[Round], tenant: Tenant, tally: Tally) -> Round:
        asked = time.perf_counter()
        with self.core.turns.turn(tenant, lambda: self.interruption() is not None) as granted:
            waited = time.perf_counter() - asked
            step = next(rounds) if granted else self._nothing()
        tally.wait_seconds += waited
        tally.add(step)
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("round: %d drafted, %d accepted", step.drafted, step.accepted, extra={"round": step})
        return step

    def _nothing(self) -> Round:
        """Interrupted while other texts had the cache."""
        self.rules.end()
        return Round(
            tokens=(), drafted=0, accepted=0, seconds=0.0, draft_seconds=0.0, finish_reason=self.interruption()
        )

    def _chooser(self) -> TokenChooser:
        session, options = self.core.loaded.session, self.options
        if options.temperature == 0 and options.logprobs is None and not options.changes_logits:
            return GreedyChooser(session)
        changes = None
        if options.changes_logits:
            changes = LogitsChanges(options, self.ids, session.contract.vocab_size, self.end_ids)
        return LogitsChooser(
            session,
            options,
            changes,
            sampler=self.core.sampler,
            seed=self.seed or 0,
            buffer=self.core.logits_buffer,
        )


def _token_ids(prompt: Any) -> Int64:
    ids = np.asarray(prompt)
    # Numbers that no type holds become objects.
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
        raise GenerationError(f"the prompt is an array of {ids.dtype} {list(ids.shape)}; int64 [n] was expected")
    if len(ids) and int(ids.max()) > np.iinfo(np.int64).max:
        raise GenerationError(f"the prompt holds the token id {ids.max()}, which no vocabulary has")
    return ids.astype(np.int64)


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
