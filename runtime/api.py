"""The public API: `load` → `Engine.generate`, which is a loop over `Engine.stream`."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from engines import LoadedEngine, Manifest, load_engine
from engines.manifest import MachineRecord
from engines.text import open_codec
from quasar.errors import GenerationError
from quasar.text import Message, TextCodec, TextStream
from quasar.text.prompts import check_messages
from runtime.drafters import Drafter, PromptLookup
from runtime.loop import Limits, Round, check_prompt, decode
from runtime.stats import Stats, Tally

DRAFTERS = ("prompt-lookup", "none")
DEFAULT_DRAFT_TOKENS = 5

Prompt = str | Sequence[Message] | Sequence[int] | NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """What one step of a generation emitted. The last event has a `finish_reason` and the `stats`.

    `text` may be empty while a character is still incomplete; the events' texts joined are the generation's text.
    """

    text: str
    token_ids: tuple[int, ...]
    drafted: int
    accepted: int
    finish_reason: str | None = None
    stats: Stats | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A finished generation. `finish_reason`: "stop" (an end token came, included in `token_ids`) or "length"."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    stats: Stats


def load(
    path: str | Path,
    *,
    backend: str | None = None,
    provider: str = "cpu",
    threads: int = 0,
    kernels: str | None = None,
    rebuild: bool = False,
) -> "Engine":
    """Load an engine directory.

    Args:
        path: what `python -m export build` wrote; it is only read.
        backend: "onnxruntime", "tensorrt" or "tensorrt-rtx"; None takes TensorRT where the directory has a plan for
            this machine's GPU, else ONNX Runtime.
        provider: ONNX Runtime's: "cpu".
        threads: ONNX Runtime's; 0 takes one per physical core.
        kernels: ONNX Runtime's: "native" (compiled with this package, or an error), "stock" (ONNX Runtime's own), or
            None for native ones where they can run. They differ in speed and in the last bits of logits.
        rebuild: where no TensorRT plan fits this GPU and library, compile one into the user's cache.

    Raises:
        EngineError: no engine directory, damaged, written by a newer version, or not runnable here.
    """
    return Engine(
        load_engine(path, backend=backend, provider=provider, threads=threads, kernels=kernels, rebuild=rebuild)
    )


class Engine:
    """A loaded verifier with its buffers. One generation at a time; a context manager that frees memory."""

    def __init__(self, loaded: LoadedEngine) -> None:
        self._loaded: LoadedEngine | None = loaded
        self._codec = open_codec(loaded.directory.path, loaded.directory.manifest.text)
        self._busy = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the session and its buffers; a stream that is still open keeps them until it ends."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None and self._busy.acquire(blocking=False):
            loaded.session.close()
            self._busy.release()

    @property
    def manifest(self) -> Manifest:
        """The engine's manifest."""
        return self._open().directory.manifest

    @property
    def backend(self) -> str:
        """What runs the engine: "onnxruntime", "tensorrt" or "tensorrt-rtx"."""
        return self._open().backend

    @property
    def kernels(self) -> str:
        """Which kernels run on ONNX Runtime: "native" with an instruction level, or "stock" with why; else ""."""
        kernels = self._open().kernels
        if kernels is None:
            return ""
        return f"{kernels.name} ({kernels.reason})" if kernels.reason else kernels.name

    @property
    def record(self) -> MachineRecord:
        """Row invariance and costs on this machine."""
        return self._open().record

    @property
    def codec(self) -> TextCodec:
        """Tokenizer and chat template."""
        return self._codec

    @property
    def plain_width(self) -> int:
        """The width that plain decoding is fed with: the smallest whose rows are exact here."""
        return self.record.row_invariance.chain or 1

    def encode(self, prompt: Prompt, *, chat_template: bool = True) -> NDArray[np.int64]:
        """Token ids int64 [n] of a prompt: a string (one user message), a list of messages, or token ids."""
        if isinstance(prompt, str):
            ids = (
                self._codec.encode_chat([{"role": "user", "content": prompt}])
                if chat_template
                else self._codec.encode_text(prompt)
            )
            return np.asarray(ids, np.int64)
        if isinstance(prompt, np.ndarray) or all(isinstance(item, (int, np.integer)) for item in prompt):
            return np.asarray(prompt, np.int64).reshape(-1)
        if not chat_template:
            raise GenerationError("messages need the chat template; without it give a string or token ids")
        return np.asarray(self._codec.encode_chat(check_messages(prompt, "prompt")), np.int64)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        drafter: Drafter | str = "prompt-lookup",
        num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        chat_template: bool = True,
        ignore_eos: bool = False,
    ) -> Generation:
        """Generate to the end; the options are those of `stream`."""
        texts: list[str] = []
        token_ids: list[int] = []
        for event in self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            drafter=drafter,
            num_draft_tokens=num_draft_tokens,
            chat_template=chat_template,
            ignore_eos=ignore_eos,
        ):
            texts.append(event.text)
            token_ids += event.token_ids
        # A stream that ends without an error ends with the event that has both.
        assert event.finish_reason is not None
        assert event.stats is not None
        return Generation(
            text="".join(texts), token_ids=tuple(token_ids), finish_reason=event.finish_reason, stats=event.stats
        )

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        drafter: Drafter | str = "prompt-lookup",
        num_draft_tokens: int = DEFAULT_DRAFT_TOKENS,
        chat_template: bool = True,
        ignore_eos: bool = False,
    ) -> Iterator[Event]:
        """Generate greedily, an event per round.

        Args:
            prompt: a string (one user message), a list of messages, or token ids.
            max_new_tokens: the text ends with `finish_reason` "length" there, or where the KV cache is full.
            drafter: "prompt-lookup", "none", or any `Drafter`. The tokens are the same with every drafter.
            num_draft_tokens: drafts per round, at most.
            chat_template: False feeds a string as it stands.
            ignore_eos: go on behind end tokens, up to max_new_tokens.

        Raises:
            ContextLimitError: the prompt does not fit the KV cache.
            GenerationError: an option that cannot be honoured, or the engine is closed or busy.
        """
        loaded = self._open()
        chosen = _choose_drafter(drafter)
        contract = loaded.directory.manifest.contract
        if max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {max_new_tokens}; 1 or more was expected")
        exact = loaded.record.row_invariance
        if chosen is not None and exact.chain is not None and not 0 <= num_draft_tokens < exact.widest:
            raise GenerationError(
                f"num_draft_tokens is {num_draft_tokens}; on this machine 0 to {exact.widest - 1} drafts are verified "
                "exactly"
            )
        if chosen is not None and exact.chain is None:
            raise GenerationError(
                "on this machine a row's bits depend on how many rows are fed, so speculation would not be exact: "
                "use drafter='none'"
            )
        ids = self.encode(prompt, chat_template=chat_template)
        check_prompt(ids, contract)
        stop_ids = frozenset() if ignore_eos else frozenset(loaded.directory.manifest.text.eos_token_ids)
        rounds = decode(
            loaded.session,
            ids,
            Limits(max_new_tokens=max_new_tokens, stop_ids=stop_ids),
            drafter=chosen,
            num_draft_tokens=num_draft_tokens,
            exact=loaded.record.row_invariance,
        )
        return self._events(rounds, len(ids))

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """The logits float32 [V] that follow a sequence of tokens, prefilled as a prompt is.

        Raises:
            GenerationError: no token, one outside the vocabulary, or the engine is closed or busy.
            ContextLimitError: the sequence does not fit the KV cache.
        """
        session = self._open().session
        tokens, chunk = np.asarray(token_ids, np.int64), session.contract.prefill_chunk
        check_prompt(tokens, session.contract)
        with self._exclusively():
            for begin in range(0, len(tokens), chunk):
                logits = session.run_logits(tokens[begin : begin + chunk], begin, 1)
        last: NDArray[np.float32] = logits[0]
        return last

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """The session's buffers belong to one generation at a time."""
        session = self._open().session
        if not self._busy.acquire(blocking=False):
            raise GenerationError("this engine is generating already: finish or close that stream first")
        try:
            yield
        finally:
            if self._loaded is None:
                # Closed in the meantime.
                session.close()
            self._busy.release()

    def _events(self, rounds: Iterator[Round], prompt_tokens: int) -> Iterator[Event]:
        with self._exclusively():
            text, tally = TextStream(self._codec), Tally(prompt_tokens)
            for step in rounds:
                tally.add(step)
                piece = text.push(step.tokens)
                last = step.finish_reason is not None
                yield Event(
                    text=piece + text.finish() if last else piece,
                    token_ids=step.tokens,
                    drafted=step.drafted,
                    accepted=step.accepted,
                    finish_reason=step.finish_reason,
                    stats=tally.stats() if last else None,
                )

    def _open(self) -> LoadedEngine:
        if self._loaded is None:
            raise GenerationError("this engine is closed: load it again with runtime.load")
        return self._loaded


def _choose_drafter(drafter: Drafter | str) -> Drafter | None:
    if drafter == "none":
        return None
    if drafter == "prompt-lookup":
        return PromptLookup()
    if isinstance(drafter, str):
        raise GenerationError(f"unknown drafter {drafter!r}; known are {', '.join(DRAFTERS)}")
    return drafter
