"""The public API: `load` → `Engine.generate`, which is a loop over `Engine.stream`."""

import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, Unpack, cast, overload

import numpy as np
from numpy.typing import NDArray

from engines import LoadedEngine, Manifest
from engines.backends import CPU, find_backend
from engines.directory import open_directory
from engines.loading import choose_backend, load_opened
from engines.onnxruntime.files import NAME as ONNXRUNTIME
from engines.onnxruntime.kernels import slot_bytes
from engines.record import MachineRecord
from quasar.errors import EngineError, GenerationError
from quasar.text import Message, TextCodec
from runtime.active_request import UNREAD
from runtime.asynchronous import collect, in_thread
from runtime.chat_options import completes
from runtime.conversation import Conversation
from runtime.drafters.named import names_alone
from runtime.events import Event, Generation, gather, gather_all
from runtime.generation_options import GenerationOptions, Signal
from runtime.loop import Round
from runtime.metrics import Metrics
from runtime.option_keywords import OptionsDict, cancel_of, make_options, takes_options
from runtime.prompt_ids import Prompt, Prompts, encode_prompt
from runtime.refusals import ENGINE_CLOSED
from runtime.request import Hooks, start_request
from runtime.resources import EngineResources
from runtime.segment import Segment
from runtime.sequence import check_prompt
from runtime.service_limits import ServiceLimits, default_slots
from runtime.slots import PrefixCache
from runtime.stats import Stats

# The keywords of `load` that are a back end's options, where the caller left them alone.
_KEYWORD_DEFAULTS = {"provider": "cpu", "threads": 0, "kernels": None, "rebuild": False}
# Prefill chunks that `warmup` feeds: their ids are places all over the embedding. More of them would delay a server.
_WARM_CHUNKS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes that an engine uses.

    `weights`: tensors that the graph reads; on ONNX Runtime they are mapped files, which processes share. `cache`: the
    KV cache at its full length; on a CPU, pages that were never written take no memory. `buffers`: inputs, outputs and
    logits. `swapped_out`: cache positions of conversations and streams while another sequence has the slot. `drafters`:
    weights and caches of engines that draft, and of a draft head.
    """

    weights: int
    cache: int
    buffers: int
    swapped_out: int
    drafters: int


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    kernels: str | None = None,
    rebuild: bool = False,
    max_sequences: int | None = None,
    max_batch_tokens: int | None = None,
    max_stall_ms: float | None = None,
    queue_limit: int | None = None,
    prefix_cache: PrefixCache = "salted",
    options: object | None = None,
    on_round: Callable[[Round], None] | None = None,
    on_generation: Callable[[Stats], None] | None = None,
) -> "Engine":
    """Load an engine directory.

    Args:
        path: what `python -m export build` wrote; it is only read.
        backend: "onnxruntime", "cuda", "tensorrt" or "tensorrt-rtx"; None takes the first of the last three that has
            kernels or a plan for this machine's GPU, else ONNX Runtime.
        provider: ONNX Runtime's: "cpu".
        threads: ONNX Runtime's; 0 takes one per physical core.
        kernels: ONNX Runtime's: "native" (compiled with this package, or an error), "stock" (ONNX Runtime's own), or
            None for native ones where they can run. They differ in speed and in the last bits of logits.
        rebuild: where no TensorRT plan fits this GPU and library, compile one into the user's cache.
        max_sequences: slots of the KV cache: so many sequences share passes, others wait or are swapped out. None: 16
            at most, as many as a quarter of the machine's memory holds on ONNX Runtime, on CUDA half of the GPU's that
            is free beside the weights; 1 on TensorRT.
        max_batch_tokens, max_stall_ms, queue_limit, prefix_cache: as `ServiceLimits` has them.
        options: the back end's load options as one object (`engines.OnnxRuntimeOptions`, `engines.CudaOptions`,
            `engines.TensorRtOptions`), in place of provider, threads, kernels, rebuild and max_sequences; without a
            `backend`, one that takes such options is chosen.
        on_round: called with every step of every generation, in the thread that reads it.
        on_generation: called with the statistics of every generation. What these two raise is logged.

    Raises:
        EngineError: no engine directory, damaged, written by a newer version, or not runnable here; `options` of
            another back end, or beside keywords that they take the place of; a limit that cannot be honoured.
    """
    limits = ServiceLimits(
        max_batch_tokens=max_batch_tokens,
        max_stall_ms=max_stall_ms,
        queue_limit=queue_limit,
        prefix_cache=prefix_cache,
    )
    if max_sequences is not None and max_sequences < 1:
        raise EngineError(f"max_sequences is {max_sequences}; 1 or more was expected")
    if backend is not None:
        find_backend(backend)
    keywords = {"provider": provider, "threads": threads, "kernels": kernels, "rebuild": rebuild}
    if options is not None and (keywords != _KEYWORD_DEFAULTS or max_sequences is not None):
        raise EngineError(
            "options came beside provider, threads, kernels, rebuild or max_sequences: pass one or the other"
        )
    directory = open_directory(Path(path))
    chosen = choose_backend(directory, options) if backend is None else find_backend(backend)
    if options is None:
        slots = max_sequences
        if slots is None and chosen.device == CPU:
            # A GPU's memory is known where the engine is loaded into it: there the back end chooses.
            manifest = directory.manifest
            is_ours = chosen.name == ONNXRUNTIME
            slots = default_slots(slot_bytes(manifest, kernels) if is_ours else manifest.contract.cache_bytes)
        options = chosen.make_options({**keywords, "slots": slots})
    loaded = load_opened(directory, backend=chosen.name, options=options)
    if max_sequences is not None and loaded.session.num_slots != max_sequences:
        loaded.session.close()
        raise EngineError(
            f"max_sequences is {max_sequences}; the back end {chosen.name} runs {loaded.session.num_slots} here"
        )
    try:
        return Engine(loaded, Hooks(on_round=on_round, on_generation=on_generation), limits)
    except BaseException:
        # A tokenizer that cannot be read, say: a GPU's memory would stay taken.
        if loaded.draft_head is not None:
            loaded.draft_head.close()
        loaded.session.close()
        raise


class Engine:
    """A loaded verifier with its buffers; a context manager that frees memory.

    Threads may share it. Requests that are there at the same time share passes where the kernels allow it; a sequence
    keeps its slot of the KV cache until it ends, or its consumer leaves it alone while others wait (docs/runtime.md).
    """

    def __init__(self, loaded: LoadedEngine, hooks: Hooks | None = None, limits: ServiceLimits | None = None) -> None:
        self._resources: EngineResources | None = EngineResources(loaded, limits or ServiceLimits())
        self._hooks = hooks or Hooks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the round that is running, and free the session; open streams end with an error."""
        resources = self._resources
        if resources is not None:
            # Refused in a pass of its own: then it stays as it is.
            resources.close()
            self._resources = None

    @property
    def manifest(self) -> Manifest:
        """The engine's manifest."""
        return self._loaded.directory.manifest

    @property
    def backend(self) -> str:
        """What runs the engine: "onnxruntime", "cuda", "tensorrt" or "tensorrt-rtx"."""
        return self._loaded.backend

    @property
    def kernels(self) -> str:
        """Which kernels run on ONNX Runtime: "native" with an instruction level, or "stock" with why; else ""."""
        loaded = self._loaded
        return f"{loaded.kernels} ({loaded.kernels_reason})" if loaded.kernels_reason else loaded.kernels

    @property
    def record(self) -> MachineRecord:
        """Row invariance and latencies on this machine."""
        return self._loaded.record

    @property
    def drafters(self) -> list[str]:
        """Names that `drafter` takes on this engine and that load no other one."""
        return names_alone(self._open().target)

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template."""
        return self._open().codec

    @property
    def plain_width(self) -> int:
        """The width that plain decoding is fed with: the smallest that is exact here."""
        return self.record.row_invariance.chain or 1

    @takes_options
    def encode(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> NDArray[np.int64]:
        """Token ids int64 [n] of a prompt: a string (one user message), a list of messages, or token ids.

        Args:
            options: those of `stream` that say how a conversation is rendered; the others change nothing here.
        """
        return encode_prompt(prompt, self._open().codec, self._options(options).chat)

    @takes_options
    def stream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Iterator[Event]:
        """Generate, an event per round. `runtime.GenerationOptions` says what the options mean.

        Args:
            prompt: a string (one user message), a list of messages, or token ids.
            options: see `GenerationOptions`.

        Raises:
            ContextLimitError: the prompt does not fit the KV cache.
            GenerationError: an option that is unknown or cannot be honoured, or the engine is closed.
        """
        return self._start(prompt, options, most_unread=UNREAD)

    @overload
    def generate(self, prompt: str, **options: Unpack[OptionsDict]) -> Generation: ...
    @overload
    def generate(self, prompt: Prompts, **options: Unpack[OptionsDict]) -> list[Generation]: ...
    @overload
    def generate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Generation: ...
    @takes_options
    def generate(self, prompt: Prompt | Prompts, **options: Unpack[OptionsDict]) -> Generation | list[Generation]:
        """Generate to the end, as `stream` does; a list of prompts gives a list of generations, in order."""
        if _is_many(prompt):
            start = partial(self._start, options=options, most_unread=None, called_at=time.monotonic())
            starts = [partial(start, one) for one in cast("list[Prompt]", prompt)]
            return gather_all(starts, together=self._open().scheduler.shares_passes)
        return gather(self._start(cast("Prompt", prompt), options, most_unread=None))

    @takes_options
    def astream(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> AsyncIterator[Event]:
        """`stream` for asyncio: generates in a thread of its own; leaving the loop cancels it within one round."""
        self._open()

        def start(cancel: Signal) -> Iterator[Event]:
            return self.stream(prompt, **cast("OptionsDict", {**options, "cancel": cancel}))

        return in_thread(start, cancel_of(options))

    @takes_options
    async def agenerate(self, prompt: Prompt, **options: Unpack[OptionsDict]) -> Generation:
        """`generate` for asyncio; cancelling the task cancels the generation within one round."""
        return gather(await collect(self.astream(prompt, **options)))

    def session(self, messages: Sequence[Message] = ()) -> Conversation:
        """A conversation that keeps its positions in the KV cache between turns; `messages`: what it begins with."""
        return Conversation(self._open(), self._hooks, tuple(messages))

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits float32 [V] that follow a sequence of tokens, prefilled as a prompt is.

        Raises:
            GenerationError: no token, one outside the vocabulary, or the engine is closed.
            ContextLimitError: the sequence does not fit the KV cache.
        """
        resources = self._open()
        tokens = np.asarray(token_ids, np.int64)
        check_prompt(tokens, resources.verifier.contract)
        scheduled = resources.new_sequence()
        try:
            with resources.scheduler.alone(scheduled):
                targets = resources.verifier.prefill(tokens, slot=scheduled.cache.slot, wants_logits=True)
                assert targets.logits is not None
                last: NDArray[np.float32] = targets.logits[0].copy()
        finally:
            resources.scheduler.release(scheduled)
        return last

    def warmup(self) -> None:
        """Run what the first generations would run first: prefill chunks, every verify width, the sampler."""
        resources = self._open()
        verifier = resources.verifier
        contract, plain = verifier.contract, self.plain_width
        chunk = min(contract.prefill_chunk, contract.max_length)
        # Token ids from all over the vocabulary: the embedding's pages come into memory, too.
        ids = np.linspace(0, contract.vocab_size - 1, _WARM_CHUNKS * chunk).astype(np.int64).reshape(-1, chunk)
        segments = [Segment(tokens=one, cache_length=0, num_logits=1) for one in ids]
        segments += [
            Segment(tokens=np.zeros(width, np.int64), cache_length=1, num_logits=width)
            for width in range(plain, contract.max_width + 1)
        ]
        drawn = Segment(tokens=np.zeros(plain, np.int64), cache_length=1, num_logits=1, wants_logits=True)
        scheduled = resources.new_sequence()
        try:
            with resources.scheduler.alone(scheduled):
                for segment in (*segments, drawn):
                    [targets] = verifier.run([replace(segment, slot=scheduled.cache.slot)])
                assert targets.logits is not None
                checked = make_options({"temperature": 1.0, "top_p": 0.9})
                resources.sampler(checked.filters, 0)(targets.logits[0], 0)
        finally:
            resources.scheduler.release(scheduled)

    def memory(self) -> Memory:
        """Bytes of weights, KV cache and buffers, of conversations that wait, and of engines that draft."""
        resources = self._open()
        session, head = resources.loaded.session.memory(), resources.loaded.draft_head
        return Memory(
            weights=session.weights,
            cache=session.cache,
            buffers=session.buffers + resources.verifier.logits_bytes,
            swapped_out=resources.scheduler.swapped_out_bytes(),
            drafters=resources.draft_engines.nbytes + (0 if head is None else head.memory().total),
        )

    def metrics(self) -> Metrics:
        """What the scheduler does and has done: requests that run and wait, sequences per pass, use of the cache."""
        return self._open().scheduler.metrics()

    def _start(
        self, prompt: Prompt, options: OptionsDict, *, most_unread: int | None, called_at: float | None = None
    ) -> Iterator[Event]:
        resources, checked = self._open(), self._options(options)
        ids = encode_prompt(prompt, resources.codec, checked.chat)
        return start_request(
            resources,
            ids,
            checked,
            self._hooks,
            completes=completes(prompt, checked.chat),
            most_unread=most_unread,
            called_at=called_at,
        )

    def _options(self, options: OptionsDict) -> GenerationOptions:
        return make_options(options, self.manifest.sampling_defaults)

    @property
    def _loaded(self) -> LoadedEngine:
        return self._open().loaded

    def _open(self) -> EngineResources:
        if self._resources is None:
            raise GenerationError(ENGINE_CLOSED)
        return self._resources


def _is_many(prompt: Any) -> bool:
    """Whether a list of prompts came: neither messages nor token ids."""
    if not isinstance(prompt, (list, tuple)) or not prompt:
        return False
    return isinstance(prompt[0], (str, list, tuple, np.ndarray))
