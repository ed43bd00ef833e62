"""An engine that drafts for another one: a smaller model, or the same one in lower precision.

`model:DIR` has a KV cache of its own, which follows the sequence. `self` is the verifier's own weights with coarser
activations (QSpec, arXiv 2410.11305), or over half of the cache's bits (QuantSpec, arXiv 2502.10424), on the verifier's
cache: it reads the positions that the verifier committed and writes its own after them, which no pass of the verifier
reads before it has written them itself. `self:DIR` does so with
other weights of the same model. It may have been built without some of the model's layers (`--skip-layers`): then it
works on the cache of the others.

`hierarchical:DIR` (SpecMQuant, arXiv 2505.22179, section 5) lets other drafters propose to the engine, trees too: what
the engine accepts becomes the sequence that the target verifies, in fewer passes of the engine. With a second directory
one of them is a smaller engine (ML-SpecQD, arXiv 2503.13565).
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np

from engines.backends import CPU, find_backend
from engines.cache_rows import HostCacheArrays
from engines.directory import EngineDirectory, open_directory
from engines.loaded import LoadedEngine
from engines.loading import load_opened
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.onnxruntime.threads import shared_threads
from quasar.checkpoints.skipped_layers import parse_layers
from quasar.errors import GenerationError
from runtime.acceptance import accept, follow
from runtime.control.latency import LatencyModel
from runtime.drafters.agreement import check_shared_cache, check_vocabularies, expected_agreement
from runtime.drafters.base import NO_DRAFT, Draft, Drafter, Draw, Int64, ObservingDrafter
from runtime.kv_cache import common_length
from runtime.refusals import ENGINE_CLOSED
from runtime.segment import Proposal, Segment, Targets, seen_tokens
from runtime.verifier import Verifier

# What a fast drafter proposes to an intermediate engine: one or two more tokens hardly make its pass slower.
_INNER_TOKENS = 3
# Cache length at which a token's latency is looked up.
_TYPICAL_CACHE_LENGTH = 256
# What is believed of another model's tokens before any was seen: that it is worth its time.
_FIRST_PRIOR = 0.8

_log = logging.getLogger("quasar.runtime")


class DraftEngine:
    """A loaded engine that drafts, and the tokens whose positions are in its cache.

    Drafts need not be exact, so any common beginning of two sequences of one slot is used again.
    """

    def __init__(
        self,
        loaded: LoadedEngine,
        *,
        shares_cache: bool = False,
        agreement: float | None = None,
        unlike: frozenset[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`shares_cache`: the session works on the verifier's cache, which holds the sequence already.

        Args:
            agreement: how often its likeliest token is expected to be the verifier's.
            unlike: ids that stand for something else at the verifier (`check_vocabularies`).
            clock: seconds, by which the latency of passes is taken.
        """
        self.loaded = loaded
        self.shares_cache = shares_cache
        self.agreement = agreement
        self.unlike = np.array(sorted(unlike), np.int64)
        self._clock = clock
        self._latency = LatencyModel(loaded.record.cost_surface_ms, widest=loaded.session.contract.max_width)
        self.end_ids = frozenset(loaded.directory.manifest.text.eos_token_ids)
        self._verifier = Verifier(loaded.session, most_logits=_INNER_TOKENS + 1)
        self._contract = loaded.session.contract
        # By slot: the tokens of its positions.
        self._cached = [np.empty(0, np.int64)] * loaded.session.num_slots

    @property
    def max_length(self) -> int:
        """Tokens that it holds."""
        return self._contract.max_length

    @property
    def vocab_size(self) -> int:
        """Ids that it can be fed."""
        return self._contract.vocab_size

    @property
    def takes_trees(self) -> bool:
        """Whether its passes take trees: they need not be exact, since what it drafts is verified."""
        return self.loaded.session.takes_trees

    @cached_property
    def warm(self) -> Mapping[int, Sequence[int]]:
        """Token → successors that come with the engine, read once for all sequences."""
        return self.loaded.directory.successors()

    @property
    def seconds_per_token(self) -> float:
        """Latency of a pass of one token: the recorded one, corrected by the passes that were made since."""
        return self._latency.of(_TYPICAL_CACHE_LENGTH).seconds[0]

    def draft(
        self,
        context: Int64,
        count: int,
        draw: Draw | None,
        inner: Drafter | None = None,
        *,
        slot: int = 0,
        committed: int | None = None,
    ) -> list[int]:
        """The engine's own continuation of a context, at most `count` tokens, fewer where the sequence ends.

        Args:
            slot: the sequence's in the verifier's cache; a cache of the engine's own has it in the same one.
            draw: chooses tokens from logits; None takes the likeliest.
            inner: proposes tokens to this engine, so that it takes fewer passes; what comes out does not depend on it
                but for the last bits of a pass of another shape.
            committed: positions of the context that are in the verifier's cache; None: all but the last one's.
        """
        tokens = np.empty(len(context) + count + _INNER_TOKENS, np.int64)
        tokens[: len(context)] = context
        length, wanted = len(context), len(context) + count
        slot = slot if self.shares_cache else slot % len(self._cached)
        if self.shares_cache:
            fed = len(context) - 1 if committed is None else min(committed, len(context) - 1)
        else:
            fed = self._known(context, slot)
        chunk = self._contract.prefill_chunk
        observe = inner.observe if inner is not None and isinstance(inner, ObservingDrafter) else None
        # What is left for the first pass that drafts: at least the last token, at most a chunk.
        last_chunk = fed + (length - fed - 1) // chunk * chunk
        self._verifier.prefill(tokens[:last_chunk], first=fed, slot=slot)
        fed = last_chunk
        ended = False

        def goes_on(token: int) -> bool:
            nonlocal ended, length
            tokens[length] = token
            length += 1
            ended = token in self.end_ids
            return length < wanted and not ended

        while length < wanted and not ended:
            guess = NO_DRAFT
            if inner is not None and wanted - length > 1:
                # What is fed must not be wider than a pass is.
                room = min(_INNER_TOKENS, wanted - length - 1, chunk - (length - fed))
                guess = inner.propose(tokens[:length], room)
                width = length - fed + len(guess.tokens)
                if guess.parents is not None and (width > self._contract.max_width or not fed):
                    # The rest of a prompt is wider than a tree can be, and stock kernels take none at its beginning.
                    guess = NO_DRAFT
            segment = _segment(tokens[fed:length], guess, fed, slot, wants_logits=draw is not None)
            start, width = self._clock(), len(segment.tokens)
            [targets] = self._verifier.run([segment])
            # What is wider is the rest of a prompt.
            if width <= self._contract.max_width:
                self._latency.correct(fed, width, self._clock() - start)
            before = length

            def choose(place: int, targets: Targets = targets) -> int:
                if targets.next_tokens is not None:
                    return int(targets.next_tokens[place])
                assert targets.logits is not None
                assert draw is not None
                return draw(targets.logits[place], length)

            path, _, _ = accept(follow(guess.tokens, guess.parents), choose, goes_on)
            # What stood before the pending token goes on standing there.
            earlier = before - 1 - fed
            self._verifier.keep_path(segment, [*range(earlier), *(earlier + place for place in path)])
            if observe is not None:
                seen, successors = seen_tokens(segment, targets.successors, path)
                if seen is not None and successors is not None:
                    observe(seen, successors)
            fed = length - 1
        if not self.shares_cache:
            self._cached[slot] = tokens[:fed].copy()
        return [int(token) for token in tokens[len(context) : length]]

    def forget(self, slot: int) -> None:
        """As `FollowingCache` (runtime.slots)."""
        self._cached[slot % len(self._cached)] = np.empty(0, np.int64)

    def _known(self, context: Int64, slot: int) -> int:
        """How many positions of a slot are of this context; its last token is always fed."""
        return common_length(self._cached[slot], context[:-1])


def _segment(known: Int64, guess: Draft, cache_length: int, slot: int, *, wants_logits: bool) -> Segment:
    """What a pass feeds: tokens that are known, the last of which is pending, and what was guessed after it."""
    fed = np.concatenate([known, guess.tokens])
    parents = None
    if guess.parents is not None:
        parents = np.arange(-1, len(fed) - 1, dtype=np.int64)
        parents[len(known) :] = guess.parents + len(known)
    return Segment(
        tokens=fed,
        cache_length=cache_length,
        num_logits=1 + len(guess.tokens),
        wants_logits=wants_logits,
        parents=parents,
        proposal=Proposal(draft=guess),
        slot=slot,
    )


class EngineDrafter:
    """One sequence's drafts from an engine.

    Where the sequence is longer than the engine holds, or has a token that it lacks, nothing is drafted any more.
    """

    def __init__(
        self,
        engine: DraftEngine,
        name: str,
        vocab_size: int,
        inner: Drafter | None = None,
        *,
        slot: Callable[[], int] = lambda: 0,
        committed: Callable[[], int] | None = None,
    ) -> None:
        """What drafts, and for whom.

        Args:
            vocab_size: the verifier's.
            inner: a fast drafter that proposes to the engine ("hierarchical").
            slot: where the sequence has its positions in the verifier's cache.
            committed: how many it has there; None: of every context all but the last.
        """
        self.name = name
        self._engine, self._vocab_size, self._inner = engine, vocab_size, inner
        self._slot, self._committed = slot, committed
        self._draw: Draw | None = None
        self._ended = False

    @property
    def seconds_per_token(self) -> float:
        """As `SlowDrafter`."""
        return math.inf if self._ended else self._engine.seconds_per_token

    def prior(self, evidence: int) -> float:  # noqa: ARG002 - the form of `Drafter`'s
        """As `Drafter`: what the build found (the manifest's `fidelity`), else that it is worth a try."""
        return _FIRST_PRIOR if self._engine.agreement is None else self._engine.agreement

    def sample_with(self, draw: Draw) -> None:
        """As `SamplingDrafter`."""
        self._draw = draw

    def propose(self, context: Int64, max_tokens: int) -> Draft:
        """As `Drafter`."""
        count = min(max_tokens, self._engine.max_length - len(context))
        # Tables may be padded: one of the two has ids there that the other lacks, and no token stands for them.
        if count <= 0 or int(context.max()) >= self._engine.vocab_size:
            self._ended = True
            return NO_DRAFT
        committed = None if self._committed is None else self._committed()
        drafted = self._engine.draft(context, count, self._draw, self._inner, slot=self._slot(), committed=committed)
        tokens = np.array(drafted, np.int64)
        unknown = np.flatnonzero((tokens >= self._vocab_size) | np.isin(tokens, self._engine.unlike))
        return Draft(tokens=tokens[: unknown[0]] if len(unknown) else tokens)


class DraftEngines:
    """The draft engines of one verifier, loaded when they are first asked for, each once. Thread-safe."""

    def __init__(
        self,
        target: EngineDirectory,
        *,
        kernels: str | None = None,
        threads: int = 0,
        caches: HostCacheArrays | None = None,
        no_cache: str = "",
        on_cpu: bool = False,
        slots: int = 1,
        adapt: Callable[[LoadedEngine], LoadedEngine] = lambda loaded: loaded,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`target`: the verifier's directory.

        Args:
            kernels, threads: as `runtime.load` takes them.
            caches: the verifier's, which engines of the same model may work on.
            no_cache: why there are none, where there are none.
            on_cpu: whether the verifier runs on threads of this process, too.
            slots: the verifier's; a cache of an engine's own has as many.
            adapt: what is made of an engine when it has been loaded.
        """
        self._target, self._kernels, self._threads, self._caches = target, kernels, threads, caches
        self._no_cache, self._on_cpu, self._slots = no_cache, on_cpu, slots
        self._adapt, self._clock = adapt, clock
        self._loaded: dict[tuple[Path, bool, bool], DraftEngine] = {}
        self._loading: dict[tuple[Path, bool, bool], threading.Lock] = {}
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def of(cls, target: LoadedEngine) -> Self:
        """Those of a loaded verifier: on its kernels and, where they may, on its cache."""
        return cls(
            target.directory,
            kernels=target.kernels.split()[0] if target.kernels else None,
            threads=int(target.record.machine.get("threads", 0)),
            caches=getattr(target.session, "caches", None),
            no_cache=f"the back end {target.backend} keeps the verifier's where no other engine reaches it",
            on_cpu=find_backend(target.backend).device == CPU,
            slots=target.session.num_slots,
        )

    def open(self, path: Path, *, shares_cache: bool, drafts: bool = False) -> DraftEngine:
        """The engine in a directory, checked against the verifier; `drafts`: its graph that drafts.

        Raises:
            EngineError: it cannot be loaded.
            GenerationError: another vocabulary, or a cache that it may not share; says what differs. Or the verifier
                was closed.
        """
        key = (path.resolve(), shares_cache, drafts)
        with self._lock:
            loading = self._loading.setdefault(key, threading.Lock())
        # Loading takes seconds: who asks for the same engine waits, and nobody else.
        with loading:
            with self._lock:
                if self._closed:
                    raise GenerationError(ENGINE_CLOSED)
                if key in self._loaded:
                    return self._loaded[key]
            engine = self._load(path, shares_cache=shares_cache, drafts=drafts)
            if not self._keep(key, engine):
                engine.loaded.session.close()
                raise GenerationError(ENGINE_CLOSED)
            return engine

    def _keep(self, key: tuple[Path, bool, bool], engine: DraftEngine) -> bool:
        """Whether somebody still wants it."""
        with self._lock:
            if not self._closed:
                self._loaded[key] = engine
            return not self._closed

    def open_own(self) -> DraftEngine:
        """The verifier's own graph that drafts, on its weights and cache.

        Raises:
            EngineError: the directory has no such graph, or not for these kernels.
            GenerationError: its cache is out of reach, or the verifier was closed.
        """
        return self.open(self._target.path, shares_cache=True, drafts=True)

    def close(self) -> None:
        """Free their sessions, and load none any more."""
        with self._lock:
            self._closed, self._caches = True, None
            for engine in self._loaded.values():
                engine.loaded.session.close()
            self._loaded.clear()

    def forget(self, slot: int) -> None:
        """As `FollowingCache` (runtime.slots): how long drafts take tells nobody what another one asked."""
        with self._lock:
            for engine in self._loaded.values():
                engine.forget(slot)

    def copy(self, source: int, target: int, tokens: Int64) -> None:
        """As `FollowingCache`: nothing is copied, and what is lacking is fed again."""

    @property
    def nbytes(self) -> int:
        """Memory of their weights, and of the KV caches that are their own."""
        total = 0
        with self._lock:
            for (_, _, drafts), engine in self._loaded.items():
                memory = engine.loaded.session.memory()
                # The verifier's own weights are mapped once.
                total += (0 if drafts else memory.weights) + (0 if engine.shares_cache else memory.cache)
        return total

    def _load(self, path: Path, *, shares_cache: bool, drafts: bool) -> DraftEngine:
        target, directory = self._target, open_directory(path)
        unlike = check_vocabularies(target, directory)
        if shares_cache:
            check_shared_cache(target.manifest, directory.manifest, path)
            if self._caches is None:
                raise GenerationError(
                    f"{path} cannot draft on the verifier's cache: {self._no_cache}. With a cache of its own it can: "
                    f"model:{path}"
                )
        if self._on_cpu and shared_threads() is None:
            _log.warning(
                "%s drafts with threads of its own, which compete with the verifier's for the cores: "
                "call runtime.share_threads() before the first engine is loaded",
                path,
            )
        longest, own = target.manifest.contract.max_length, directory.manifest.contract.max_length
        if own < longest:
            _log.warning("%s holds %d tokens, the verifier %d: it drafts up to there", path, own, longest)
        caches = self._caches if shares_cache else None
        if caches is not None:
            skipped = parse_layers(directory.manifest.skipped_layers, len(caches))
            caches = [pair for layer, pair in enumerate(caches) if layer not in skipped]
        loaded = self._adapt(
            load_opened(
                directory,
                options=OnnxRuntimeOptions(
                    threads=self._threads,
                    kernels=self._kernels,
                    slots=self._slots,
                    caches=caches,
                    draft_head=False,
                    drafts=drafts,
                ),
            )
        )
        _log.info(
            "%s drafts: %.1f MB of weights, %s",
            path,
            loaded.session.memory().weights / 1e6,
            "on the verifier's cache" if shares_cache else f"a cache of {loaded.session.memory().cache / 1e6:.1f} MB",
        )
        return DraftEngine(
            loaded,
            shares_cache=shares_cache,
            # What was measured is the verifier's own.
            agreement=None if drafts else expected_agreement(target.manifest, directory.manifest),
            unlike=unlike,
            clock=self._clock,
        )
