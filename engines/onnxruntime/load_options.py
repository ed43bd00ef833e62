"""What a caller may choose when an engine is loaded on ONNX Runtime."""

from dataclasses import dataclass

from engines.cache_rows import HostCacheArrays


@dataclass(frozen=True, slots=True, kw_only=True)
class OnnxRuntimeOptions:
    """Load options.

    Attributes:
        provider: "cpu". GPUs are TensorRT's.
        threads: 0 takes one per physical core.
        kernels: "native" (the operators of plugins/cpu, or an error), "stock" (ONNX Runtime's own), or None for native
            ones where they can run.
        caches: another session's, to work on in place of its own.
        slots: sequences that the KV cache holds; pages that none of them has written take no memory.
        max_positions: that one pass takes, of all sequences together; None for those of a chunk of a prompt.
        hidden_states: layers of the verifier: its passes tell what enters them, for draft heads
            (`Session.hidden_states`). () takes those of the directory's draft head, which is not loaded with others.
        draft_head: load the draft head that the directory has; it runs on native kernels.
        drafts: load the graph that drafts for the engine itself, over its own weights.
    """

    provider: str = "cpu"
    threads: int = 0
    kernels: str | None = None
    caches: HostCacheArrays | None = None
    slots: int = 1
    max_positions: int | None = None
    hidden_states: tuple[int, ...] = ()
    draft_head: bool = True
    drafts: bool = False
