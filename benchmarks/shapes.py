"""Decoders by their public sizes, for benchmarks with random weights."""

from dataclasses import replace

from evaluation.roofline import SHAPES as PUBLIC_SHAPES
from evaluation.roofline import ModelShape
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.spec import AttentionSpec, LayerSpec, MlpSpec, Rope


def _decoder(architecture: str, shape: ModelShape, *, theta: float, context: int, epsilon: float = 1e-6) -> DecoderSpec:
    attention = AttentionSpec(
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        rope=Rope(theta=theta),
        qk_norm="head" if architecture == "qwen3" else None,
    )
    return DecoderSpec(
        architecture=architecture,
        layers=(LayerSpec(attention=attention, mlp=MlpSpec(intermediate_size=shape.intermediate)),) * shape.layers,
        hidden_size=shape.hidden,
        vocab_size=shape.vocab,
        context_length=context,
        rms_norm_eps=epsilon,
        tied_head=True,
    )


def _gemma2_layer(window: int | None) -> LayerSpec:
    attention = AttentionSpec(
        num_heads=16,
        num_kv_heads=8,
        head_size=256,
        rope=Rope(theta=1e4),
        window=window,
        softcap=50.0,
    )
    mlp = MlpSpec(intermediate_size=14336, kind="gated_gelu_tanh")
    return LayerSpec(attention=attention, mlp=mlp, norms="around")


_SMOLLM2 = PUBLIC_SHAPES["smollm2"]
SHAPES = {
    "smollm2": _decoder("llama", _SMOLLM2, theta=1e5, context=8192, epsilon=1e-5),
    # SmolLM2-135M's body with the vocabulary of the Qwen models.
    "smollm2-151936": _decoder("llama", replace(_SMOLLM2, vocab=151936), theta=1e5, context=8192, epsilon=1e-5),
    "qwen3-1.7b": _decoder("qwen3", PUBLIC_SHAPES["qwen3-1.7b"], theta=1e6, context=40960),
    "qwen3-8b": _decoder("qwen3", PUBLIC_SHAPES["qwen3-8b"], theta=1e6, context=40960),
    "llama-3-8b": _decoder("llama", PUBLIC_SHAPES["llama-3-8b"], theta=5e5, context=8192, epsilon=1e-5),
    # Wide heads, windows, soft caps, norms around: what kernels of other families take.
    "gemma2-9b": DecoderSpec(
        architecture="gemma2",
        layers=tuple(_gemma2_layer(window) for window in (4096, None) * 21),
        hidden_size=3584,
        vocab_size=256000,
        context_length=8192,
        rms_norm_eps=1e-6,
        tied_head=True,
        embedding_scale=3584**0.5,
        logits_softcap=30.0,
    ),
    # For rehearsals in an interpreter.
    "tiny-qwen3": _decoder(
        "qwen3",
        ModelShape(layers=2, hidden=64, intermediate=96, heads=2, kv_heads=1, head_size=16, vocab=192),
        theta=1e4,
        context=1024,
    ),
    "tiny-llama": _decoder(
        "llama",
        ModelShape(layers=1, hidden=64, intermediate=128, heads=3, kv_heads=1, head_size=32, vocab=130),
        theta=1e4,
        context=1024,
    ),
}
