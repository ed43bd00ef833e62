"""CUDA programs of a decoder's shape, without a checkpoint, a graph or weights."""

from collections.abc import Iterator
from typing import Any

from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Program, Select, Step, Tensor
from plugins.gpu.variants import PER_TOKEN


def program_of(
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_size: int,
    vocabulary: int = 1000,
    layers: int = 1,
    reach: int = 32,
    top_k: int = 8,
    qk_norm: bool = False,
    bias: bool = False,
    softcap: float = 0.0,
    window: int = 0,
    gate: str = "silu",
    rotary: int | None = None,
    row_norm: bool = False,
    output_norms: bool = False,
    embedding_scale: float = 1.0,
    logits_softcap: float = 0.0,
    form: str = PER_TOKEN,
) -> Program:
    """The steps of a decoder, as the exporter writes them; tensors have a place, and nothing lies there."""
    rotary = head_size if rotary is None else rotary
    names: list[str] = []

    def tensor(name: str, *, present: bool = True) -> str:
        names.extend([name] if present and name not in names else [])
        return name if present else ""

    def linear(name: str, source: str, inputs: int, outputs: int, **rest: Any) -> Linear:
        rest = {"norm": "", "bias": "", "residual": "", "gate": "", "form": form, **rest}
        weight, scale = tensor(f"{name}.weight"), tensor(f"{name}.scale")
        sizes = {"inputs": inputs, "outputs": outputs, "epsilon": 1e-6}
        return Linear(input=source, weight=weight, scale=scale, output=name, **sizes, **rest)

    def added(name: str, source: str, inputs: int, stream: str) -> Iterator[Step]:
        """A linear whose output is added to the residual stream, after a norm or at once."""
        if not output_norms:
            yield linear(name, source, inputs, hidden, residual=stream)
            return
        yield linear(f"{name}.product", source, inputs, hidden)
        yield AddNorm(
            input=f"{name}.product",
            norm=tensor(f"{name}.norm"),
            epsilon=1e-6,
            residual=stream,
            columns=hidden,
            output=name,
        )

    def steps() -> Iterator[Step]:
        yield Embed(table=tensor("embed"), table_type="bfloat16", columns=hidden, scale=embedding_scale, output="embed")
        stream = "embed"
        for layer in range(layers):
            at = f"layers.{layer}"
            norm, qkv_bias = tensor(f"{at}.norm"), tensor(f"{at}.qkv.bias", present=bias)
            columns = (heads + 2 * kv_heads) * head_size
            yield linear(f"{at}.qkv", stream, hidden, columns, norm=norm, bias=qkv_bias)
            yield Attention(
                layer=layer,
                input=f"{at}.qkv",
                cos=tensor("cos", present=rotary > 0),
                sin=tensor("sin", present=rotary > 0),
                q_norm=tensor(f"{at}.q_norm", present=qk_norm),
                k_norm=tensor(f"{at}.k_norm", present=qk_norm),
                row_norm=row_norm,
                heads=heads,
                kv_heads=kv_heads,
                head_size=head_size,
                rotary=rotary,
                scale=head_size**-0.5,
                softcap=softcap,
                window=window,
                epsilon=1e-6,
                key_scale="",
                value_scale="",
                output=f"{at}.context",
            )
            yield from added(f"{at}.o", f"{at}.context", heads * head_size, stream)
            mlp_norm = tensor(f"{at}.mlp_norm")
            yield linear(f"{at}.gate_up", f"{at}.o", hidden, intermediate, norm=mlp_norm, gate=gate)
            yield from added(f"{at}.down", f"{at}.gate_up", intermediate, f"{at}.o")
            stream = f"{at}.down"
        yield Select(input=stream, columns=hidden, output="selected")
        yield Head(
            input="selected",
            norm=tensor("norm"),
            epsilon=1e-6,
            bias="",
            softcap=logits_softcap,
            likelihoods=False,
            form=form,
            inputs=hidden,
            weight=tensor("head.weight"),
            scale=tensor("head.scale"),
            vocabulary=vocabulary,
        )

    done = tuple(steps())
    return Program(
        cache_type="float16",
        reach=reach,
        top_k=top_k,
        tensors={name: Tensor(offset=256 * place, bytes=4) for place, name in enumerate(names)},
        steps=done,
    )


SMOLLM2 = {"hidden": 576, "intermediate": 1536, "heads": 9, "kv_heads": 3, "head_size": 64}
QWEN3_8B = {
    "hidden": 4096,
    "intermediate": 12288,
    "heads": 32,
    "kv_heads": 8,
    "head_size": 128,
    "qk_norm": True,
    "vocabulary": 151936,
}
# Wide heads with a cap on scores and a window, and everything else that Gemma 2 has.
WIDE_HEADS = {
    "hidden": 4096,
    "intermediate": 12288,
    "heads": 16,
    "kv_heads": 8,
    "head_size": 256,
    "softcap": 50.0,
    "window": 4096,
    "gate": "gelu_tanh",
    "output_norms": True,
    "embedding_scale": 64.0,
    "logits_softcap": 30.0,
}
# Norms over all heads together and after linears, as OLMo 2 has them, in a layer that does not rotate.
ROW_NORMS = {
    "hidden": 4096,
    "intermediate": 11008,
    "heads": 32,
    "kv_heads": 32,
    "head_size": 128,
    "qk_norm": True,
    "row_norm": True,
    "output_norms": True,
    "rotary": 0,
}
