"""What the requests of one engine share: the verifier and who runs it, the tokenizer, the sampler, what was learned."""

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from engines import LoadedEngine
from engines.machine import user_cache
from engines.text import open_codec
from quasar.text import TextCodec
from runtime.control.controller import Knowledge
from runtime.control.latency import LatencyModel
from runtime.drafters.draft_engine import DraftEngines
from runtime.drafters.draft_head import DraftHeadCache
from runtime.drafters.named import VerifierProfile
from runtime.drafters.persistent_successors import PersistentSuccessors
from runtime.drafters.recycling import KEPT
from runtime.grammar.compiler import Grammars
from runtime.kv_cache import KVCache
from runtime.sampling.compiled import make_sampler
from runtime.scheduler import Scheduler
from runtime.service_limits import ServiceLimits
from runtime.slots import ScheduledSequence
from runtime.verifier import Verifier

Int64 = NDArray[np.int64]


class EngineResources:
    """A loaded engine with its scheduler, its text codec, its sampler, and the engines that draft for it."""

    def __init__(self, loaded: LoadedEngine, limits: ServiceLimits) -> None:
        self.loaded, self._limits = loaded, limits
        self.codec: TextCodec = open_codec(loaded.directory.path, loaded.directory.manifest.text)
        self.verifier = Verifier(loaded.session)
        self.draft_engines = DraftEngines.of(loaded)
        self.scheduler = Scheduler(
            self.verifier,
            exact=loaded.record.row_invariance,
            knowledge=lambda: self.knowledge,
            max_batch_tokens=limits.max_batch_tokens,
            stall_seconds=None if limits.max_stall_ms is None else limits.max_stall_ms / 1e3,
            queue_limit=limits.queue_limit,
            following=[self.draft_engines, *([] if self.draft_head is None else [self.draft_head])],
        )
        self.sampler = make_sampler()
        self.grammars = Grammars(self.codec, vocab_size=loaded.session.contract.vocab_size, end_ids=self.end_ids)
        manifest = loaded.directory.manifest
        self.persistent_successors = PersistentSuccessors(
            user_cache() / "successors" / f"{manifest.engine_hash[:16]}.npy",
            vocab_size=manifest.contract.vocab_size,
            k=KEPT,
        )
        # Reads the engine's successors now: its files may be replaced while it runs.
        self.target  # noqa: B018 - a cached property

    @cached_property
    def target(self) -> VerifierProfile:
        """What drafters are made for."""
        contract = self.loaded.session.contract
        return VerifierProfile(
            vocab_size=contract.vocab_size,
            trees=self.loaded.record.row_invariance.tree,
            tells_successors=contract.top_k > 0,
            warm=self.loaded.directory.successors(),
            engines=self.draft_engines,
            draft_head=self.draft_head,
            persistent=self.persistent_successors,
        )

    @cached_property
    def draft_head(self) -> DraftHeadCache | None:
        """What a draft head's sequences share, where the engine has one."""
        session = self.loaded.draft_head
        return None if session is None else DraftHeadCache(session)

    @cached_property
    def knowledge(self) -> Knowledge:
        """What the controllers of all sequences learn together."""
        return Knowledge(
            LatencyModel(self.loaded.record.cost_surface_ms, widest=self.loaded.session.contract.max_width)
        )

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The model's end ids."""
        return frozenset(self.loaded.directory.manifest.text.eos_token_ids)

    def close(self) -> None:
        """Wait for the step that is running, and free the sessions."""
        self.scheduler.close()
        self.draft_engines.close()
        if self.loaded.draft_head is not None:
            self.loaded.draft_head.close()
        self.persistent_successors.save()

    def new_sequence(
        self, cache: KVCache | None = None, *, salt: str | None = None, outlives: bool = False
    ) -> ScheduledSequence:
        """A sequence for the scheduler, with an empty cache or a copy of another's.

        `salt`: as `salt_of`. `outlives`: it goes on after a generation.
        """
        cache = KVCache(self.loaded.session.contract) if cache is None else cache
        return self.scheduler.add(cache, salt=salt, outlives=outlives)

    def salt_of(self, asked: str | None) -> str | None:
        """Whose positions may serve a request's prompt: those of requests with this salt; None: nobody's."""
        if self._limits.prefix_cache == "off":
            return None
        return (asked or "") if self._limits.prefix_cache == "shared" else asked
