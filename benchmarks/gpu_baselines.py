"""The same decoder in torch: BF16 with cuBLAS and torch's fastest attention, in CUDA graphs; or with FP8 linears."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from quasar.checkpoints import DecoderSpec

# The least tokens of an FP8 product: cuBLAS pads fewer itself no more.
_FP8_TOKENS = 16


class Bf16Linears:
    """Linears with weights in BF16."""

    def make(self, outputs: int, inputs: int, device: str) -> Any:
        """A random weight."""
        return torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16) * inputs**-0.5

    def apply(self, x: Tensor, weight: Any) -> Tensor:
        """X Wᵀ."""
        return functional.linear(x, weight)


class Fp8Linears:
    """Linears with weights and activations in FP8 (e4m3): a scale per output channel and per token."""

    def make(self, outputs: int, inputs: int, device: str) -> Any:
        """A random weight with its scales."""
        weight = (torch.randn(outputs, inputs, device=device) * 16).to(torch.float8_e4m3fn)
        return weight, torch.full((1, outputs), inputs**-0.5 / 16, device=device)

    def apply(self, x: Tensor, weight: Any) -> Tensor:
        """X Wᵀ of the quantized x."""
        values, scale = weight
        tokens = len(x)
        if tokens < _FP8_TOKENS:
            x = functional.pad(x, (0, 0, 0, _FP8_TOKENS - tokens))
        amax = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-6) / 448
        q = (x / amax).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(  # noqa: SLF001 - torch's only FP8 product
            q, values.t(), scale_a=amax, scale_b=scale, out_dtype=torch.bfloat16
        )
        return y[:tokens]


class Decoder:
    """A decoder of random weights: a pass is recorded as a CUDA graph for each width and cached length.

    Attention reads just the cached positions, which a real decoder's graph could not know: to its advantage.
    """

    def __init__(self, spec: DecoderSpec, capacity: int, device: str, linears: type[Any] = Bf16Linears) -> None:
        self._spec, self._device, self._linears = spec, device, linears()
        attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
        self._heads, self._kv_heads, self._size = attention.num_heads, attention.num_kv_heads, attention.head_size
        hidden, qkv = spec.hidden_size, (self._heads + 2 * self._kv_heads) * self._size
        make = self._linears.make
        self._layers = [
            {
                "qkv": make(qkv, hidden, device),
                "o": make(hidden, self._heads * self._size, device),
                "gate_up": make(2 * mlp.intermediate_size, hidden, device),
                "down": make(hidden, mlp.intermediate_size, device),
            }
            for _ in spec.layers
        ]
        self._head = make(spec.vocab_size, hidden, device)
        options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
        self._embedding = torch.randn(spec.vocab_size, hidden, **options)
        self._norm = torch.ones(hidden, **options)
        self._head_norm = torch.ones(self._size, **options)
        self._caches = [torch.randn(2, 1, self._kv_heads, capacity, self._size, **options) for _ in spec.layers]
        angles = torch.arange(capacity)[:, None] / 1e4 ** (torch.arange(self._size // 2) / (self._size // 2))
        self._cos, self._sin = (one.to(torch.bfloat16).to(device) for one in (angles.cos(), angles.sin()))

    def pass_of(self, width: int, cached: int) -> Callable[[], object]:
        """A function that runs a pass and waits for its tokens, with the faster of two ways to attend."""
        if self._device == "cpu":
            ids = torch.zeros(width, dtype=torch.long)
            return lambda: self._forward(ids, cached, lower_right=False)
        passes = []
        for lower_right in (True, False):
            try:
                passes.append(self._record(width, cached, lower_right=lower_right))
            except RuntimeError:  # this torch has no kernel for it
                torch.cuda.synchronize()
        return min(passes, key=_seconds)

    def _record(self, width: int, cached: int, *, lower_right: bool) -> Callable[[], object]:
        ids = torch.zeros(width, dtype=torch.long, device=self._device)
        with torch.inference_mode():
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._forward(ids, cached, lower_right=lower_right)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                tokens = self._forward(ids, cached, lower_right=lower_right)
        host = torch.empty(width, dtype=torch.long, pin_memory=True)
        given = torch.zeros(width, dtype=torch.long).pin_memory()

        def run() -> object:
            ids.copy_(given, non_blocking=True)
            graph.replay()
            host.copy_(tokens, non_blocking=True)
            torch.cuda.synchronize()
            return host

        return run

    def _forward(self, ids: Tensor, cached: int, *, lower_right: bool) -> Tensor:
        width, end, spec = len(ids), cached + len(ids), self._spec
        apply, epsilon = self._linears.apply, spec.rms_norm_eps
        x = self._embedding[ids]
        mask: Any = None
        if width > 1 and lower_right:
            mask = causal_lower_right(width, end)
        elif width > 1:
            seen = torch.arange(end, device=self._device)
            mask = seen[None, :] <= torch.arange(cached, end, device=self._device)[:, None]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            qkv = apply(functional.rms_norm(x, (spec.hidden_size,), self._norm, epsilon), layer["qkv"])
            heads = qkv.view(width, -1, self._size)
            q, k, v = heads.split([self._heads, self._kv_heads, self._kv_heads], dim=1)
            if spec.layers[0].attention.qk_norm:
                q, k = (functional.rms_norm(one, (self._size,), self._head_norm, epsilon) for one in (q, k))
            q, k = (self._rotate(one, cached) for one in (q, k))
            cache[0, 0, :, cached:end] = k.transpose(0, 1)
            cache[1, 0, :, cached:end] = v.transpose(0, 1)
            context = functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None], cache[0, :, :, :end], cache[1, :, :, :end], attn_mask=mask, enable_gqa=True
            )
            x = x + apply(context[0].transpose(0, 1).reshape(width, -1), layer["o"])
            normed = functional.rms_norm(x, (spec.hidden_size,), self._norm, epsilon)
            gate, up = apply(normed, layer["gate_up"]).chunk(2, dim=1)
            x = x + apply(functional.silu(gate) * up, layer["down"])
        logits: Tensor = apply(functional.rms_norm(x, (spec.hidden_size,), self._norm, epsilon), self._head)
        return logits.argmax(dim=1)

    def _rotate(self, x: Tensor, cached: int) -> Tensor:
        cos, sin = (table[cached : cached + len(x), None] for table in (self._cos, self._sin))
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _seconds(run: Callable[[], object]) -> float:
    """The least of a few runs."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
