"""Decoders by their public sizes, for benchmarks with random weights."""

from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import AttentionSpec, LayerSpec, MlpSpec, Rope


def _decoder(
    architecture: str,
    *,
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    vocabulary: int,
    theta: float,
    context: int,
    epsilon: float = 1e-6,
) -> DecoderSpec:
    attention = AttentionSpec(
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        rope=Rope(theta=theta),
        qk_norm="head" if architecture == "qwen3" else None,
    )
    return DecoderSpec(
        architecture=architecture,
        layers=(LayerSpec(attention=attention, mlp=MlpSpec(intermediate_size=intermediate)),) * layers,
        hidden_size=hidden,
        vocab_size=vocabulary,
        context_length=context,
        rms_norm_eps=epsilon,
        tied_head=True,
    )


_SMOLLM2 = {"layers": 30, "hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_size": 64}
SHAPES = {
    "smollm2": _decoder("llama", **_SMOLLM2, vocabulary=49152, theta=1e5, context=8192, epsilon=1e-5),
    # SmolLM2-135M's body with the vocabulary of the Qwen models.
    "smollm2-151936": _decoder("llama", **_SMOLLM2, vocabulary=151936, theta=1e5, context=8192, epsilon=1e-5),
    "qwen3-1.7b": _decoder(
        "qwen3",
        layers=28,
        hidden=2048,
        intermediate=6144,
        heads=16,
        kv_heads=8,
        head_size=128,
        vocabulary=151936,
        theta=1e6,
        context=40960,
    ),
    "qwen3-8b": _decoder(
        "qwen3",
        layers=36,
        hidden=4096,
        intermediate=12288,
        heads=32,
        kv_heads=8,
        head_size=128,
        vocabulary=151936,
        theta=1e6,
        context=40960,
    ),
    "llama-3-8b": _decoder(
        "llama",
        layers=32,
        hidden=4096,
        intermediate=14336,
        heads=32,
        kv_heads=8,
        head_size=128,
        vocabulary=128256,
        theta=5e5,
        context=8192,
        epsilon=1e-5,
    ),
    # For rehearsals in an interpreter.
    "tiny-qwen3": _decoder(
        "qwen3",
        layers=2,
        hidden=64,
        intermediate=96,
        heads=2,
        kv_heads=1,
        head_size=16,
        vocabulary=192,
        theta=1e4,
        context=1024,
    ),
    "tiny-llama": _decoder(
        "llama",
        layers=1,
        hidden=64,
        intermediate=128,
        heads=3,
        kv_heads=1,
        head_size=32,
        vocabulary=130,
        theta=1e4,
        context=1024,
    ),
}
