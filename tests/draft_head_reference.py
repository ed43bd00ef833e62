"""A draft head of a canonical spec, step by step in torch: the oracle of graphs, and of the layouts' readers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from quasar.checkpoints.rope import cos_sin_tables
from quasar.draft_heads.spec import DraftHeadSpec


class CanonicalHead:
    """One sequence's draft head, with its KV cache: every call of `step` adds its positions to it.

    `embedding` [V, H] and `head` [V, H]: the target's, where the spec's head has none of its own. `dtype`: in which all
    is computed, but for the rotary tables.
    """

    def __init__(
        self,
        spec: DraftHeadSpec,
        tensors: Mapping[str, np.ndarray],
        *,
        embedding: Any = None,
        head: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._spec = spec
        # numpy's bfloat16 is a name that torch does not know.
        self._tensors = {
            name: torch.as_tensor(np.asarray(value, np.float64)).to(dtype) for name, value in tensors.items()
        }
        own = {"embed_tokens.weight": embedding, "lm_head.weight": head}
        for name, value in own.items():
            if value is not None:
                self._tensors.setdefault(name, torch.as_tensor(value, dtype=dtype))
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def hidden(self, features: Tensor) -> Tensor:
        """What positions are fed for the target's features [R, F]: hidden states [R, H]."""
        if self._spec.kind == "eagle":
            return features
        parts = [features]
        if self._spec.feature_norm == "each":
            parts = list(features.split(self._spec.target_hidden_size, dim=-1))
        norms = self._spec.feature_norms
        if norms:
            parts = [self._norm(part, name) for part, name in zip(parts, norms, strict=True)]
        return self._linear(torch.cat(parts, dim=-1), "fc")

    def step(self, ids: Tensor, hidden: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [R, draft vocabulary] and hidden states [R, H] of new positions.

        `ids` [R] are tokens of the target, `hidden` [R, H] what `hidden` or an earlier step gave, `mask` bool
        [R, cached + R] what each sees.
        """
        spec, at = self._spec, "layers.0."
        embedded = functional.embedding(ids, self._tensors["embed_tokens.weight"]) * spec.decoder.embedding_scale
        if spec.kind == "eagle":
            residual = self._linear(torch.cat([embedded, hidden], dim=-1), "fc")
            read = residual
        else:
            normed = self._norm(hidden, at + "hidden_norm.weight")
            residual = normed if spec.norm_before_residual else hidden
            read = torch.cat([self._norm(embedded, at + "input_layernorm.weight"), normed], dim=-1)
        residual = residual + self._attention(read, positions, mask)
        read = self._norm(residual, at + "post_attention_layernorm.weight")
        gate, up = self._linear(read, at + "mlp.gate_proj"), self._linear(read, at + "mlp.up_proj")
        gelu = spec.decoder.layers[0].mlp.kind == "gated_gelu_tanh"
        gate = functional.gelu(gate, approximate="tanh") if gelu else functional.silu(gate)
        out = residual + self._linear(gate * up, at + "mlp.down_proj")
        normed = self._norm(out, "norm.weight") if spec.kind == "eagle3" else out
        return self._linear(normed, "lm_head"), normed if spec.norm_output else out

    def _attention(self, read: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        attention, at = self._spec.decoder.layers[0].attention, "layers.0.self_attn."
        query, key, value = (
            self._linear(read, f"{at}{part}_proj").unflatten(-1, (-1, attention.head_size)) for part in "qkv"
        )
        if attention.qk_norm == "head":
            query, key = self._norm(query, at + "q_norm.weight"), self._norm(key, at + "k_norm.weight")
        if attention.rope is not None:
            tables = cos_sin_tables(attention.rope, attention.head_size, int(positions.max()) + 1)
            cos, sin = (torch.as_tensor(table)[positions][:, None] for table in tables)
            query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
        self.keys.append(key)
        self.values.append(value)
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        shared = attention.num_heads // attention.num_kv_heads
        scores = torch.einsum("rhd,chd->hrc", query, keys.repeat_interleave(shared, dim=1)) * attention.scale
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        mixed = torch.einsum("hrc,chd->rhd", weights, values.repeat_interleave(shared, dim=1))
        return self._linear(mixed.flatten(1), at + "o_proj")

    def _norm(self, value: Tensor, name: str) -> Tensor:
        weight = self._tensors[name]
        return functional.rms_norm(value, (len(weight),), weight, self._spec.decoder.rms_norm_eps)

    def _linear(self, value: Tensor, name: str) -> Tensor:
        return functional.linear(value, self._tensors[name + ".weight"], self._tensors.get(name + ".bias"))


def _rotated(value: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    size = 2 * cos.shape[-1]
    first, second = value[..., :size].chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, value[..., size:]], dim=-1)
    return turned.to(value.dtype)
