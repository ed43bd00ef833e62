"""An EAGLE head in torch: its parameters by canonical name, and the few functions that a pass is made of.

Hidden states and embeddings are divided by their scales here, and what reads or makes them is scaled to match: one
learning rate then suits every channel and every model. `tensors()` are the head's own, as it is written.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.linear_guess import InputScales, TargetParts
from quasar.checkpoints.rope import cos_sin_tables
from quasar.draft_heads.spec import FUSE, DraftHeadSpec

if TYPE_CHECKING:
    import torch

Float32 = NDArray[np.float32]

_LAYER = "layers.0"
_LM_HEAD = "lm_head.weight"


class HeadModel:
    """A draft head whose parameters can be trained; the embedding, the final norm and the LM head are the target's.

    N positions, H hidden size, G KV heads, D head size, R query heads of a KV head.
    """

    def __init__(
        self,
        spec: DraftHeadSpec,
        tensors: Mapping[str, Float32],
        target: TargetParts,
        scales: InputScales,
        *,
        num_positions: int,
        device: str = "cpu",
    ) -> None:
        """Make the parameters.

        Args:
            tensors: by canonical name, all of `spec.tensors()`.
            num_positions: that rotations are known of.
        """
        import torch

        self.spec, self.device = spec, device
        self._target = TargetParts(embedding=target.embedding.to(device), norm=target.norm.to(device), eps=target.eps)
        self._scale, self._embedding_scale = torch.from_numpy(scales.hidden).to(device), scales.embedding
        self._mean = float(np.sqrt(np.mean(np.square(scales.hidden))))
        self._factors = _factors(spec, scales, self._mean)
        self._lm_head = np.array(tensors[_LM_HEAD], np.float32)
        self._logits = torch.from_numpy(self._lm_head * scales.hidden).to(device)
        self.parameters = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(tensors[name] * factor, np.float32)).to(device))
            for name, factor in self._factors.items()
        }
        attention = spec.decoder.layers[0].attention
        assert attention.rope is not None
        cos, sin = cos_sin_tables(attention.rope, attention.head_size, num_positions)
        self._cos, self._sin = (torch.from_numpy(table).to(device) for table in (cos, sin))

    def tensors(self) -> dict[str, Float32]:
        """The head's tensors as they are now."""
        trained = {name: value.detach().float().cpu().numpy() for name, value in self.parameters.items()}
        own = {name: (value / self._factors[name]).astype(np.float32) for name, value in trained.items()}
        return own | {_LM_HEAD: self._lm_head.copy()}

    def states(self, features: "torch.Tensor") -> "torch.Tensor":
        """What leaves the target's last layer, float32 [N, H], as the head reads it and guesses it: [N, H]."""
        return self._target.normed(features) / self._scale

    def layer_input(self, tokens: "torch.Tensor", hidden: "torch.Tensor") -> "torch.Tensor":
        """The residual stream [N, H] of embeddings of int64 [N] beside hidden states."""
        import torch

        embedded = self._target.embedding[tokens].float() / self._embedding_scale
        return self._linear(FUSE, torch.cat([embedded, hidden], dim=-1), self.parameters[f"{FUSE}.bias"])

    def queries(self, x: "torch.Tensor", positions: "torch.Tensor") -> "torch.Tensor":
        """Rotated queries [G, R, N, D], scaled."""
        attention = self.spec.decoder.layers[0].attention
        rows = self._linear(f"{_LAYER}.self_attn.q_proj", x)
        heads = rows.view(len(x), attention.num_kv_heads, -1, attention.head_size).permute(1, 2, 0, 3)
        return self._rotated(heads, positions) * attention.scale

    def keys_values(self, x: "torch.Tensor", positions: "torch.Tensor") -> "tuple[torch.Tensor, torch.Tensor]":
        """Rotated keys and values, each [G, N, D]."""
        attention = self.spec.decoder.layers[0].attention
        keys, values = (
            self._linear(f"{_LAYER}.self_attn.{part}_proj", x)
            .view(len(x), attention.num_kv_heads, attention.head_size)
            .transpose(0, 1)
            for part in "kv"
        )
        return self._rotated(keys, positions), values

    def layer_output(self, x: "torch.Tensor", attended: "torch.Tensor") -> "torch.Tensor":
        """The layer's output [N, H]: what attention gave ([G, R, N, D]) and the MLP added to its input."""
        import torch

        rows = attended.permute(2, 0, 1, 3).reshape(len(x), -1)
        x = x + self._linear(f"{_LAYER}.self_attn.o_proj", rows)
        square = (x * self._scale).square().mean(-1, keepdim=True)
        length = torch.rsqrt(square + self.spec.decoder.rms_norm_eps) * self._mean
        normed = x * length * self.parameters[f"{_LAYER}.post_attention_layernorm.weight"]
        gate = self._activated(self._linear(f"{_LAYER}.mlp.gate_proj", normed))
        return x + self._linear(f"{_LAYER}.mlp.down_proj", gate * self._linear(f"{_LAYER}.mlp.up_proj", normed))

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits [N, draft vocabulary] of the layer's output, by the target's LM head."""
        from torch.nn.functional import linear

        return linear(hidden, self._logits)

    def lm_head(self, rows: "torch.Tensor | None" = None) -> "torch.Tensor":
        """That LM head, [draft vocabulary, H], or some rows of it, in the type in which products are made."""
        import torch

        weight = self._logits if rows is None else self._logits[rows]
        if torch.is_autocast_enabled(self.device):
            # Once, where a product would do so each time.
            return weight.to(torch.get_autocast_dtype(self.device))
        return weight

    def _linear(self, name: str, x: "torch.Tensor", bias: "torch.Tensor | None" = None) -> "torch.Tensor":
        from torch.nn.functional import linear

        return linear(x, self.parameters[f"{name}.weight"], bias)

    def _activated(self, x: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import gelu, silu

        return silu(x) if self.spec.decoder.layers[0].mlp.kind == "gated_silu" else gelu(x, approximate="tanh")

    def _rotated(self, heads: "torch.Tensor", positions: "torch.Tensor") -> "torch.Tensor":
        """Heads [..., N, D] rotated to their positions int64 [N]: the first half of a head with the second."""
        import torch

        cos, sin = self._cos[positions], self._sin[positions]
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _factors(spec: DraftHeadSpec, scales: InputScales, mean: float) -> dict[str, Float32]:
    """By what each trained tensor is multiplied, so that it reads and makes what is divided by its scale."""
    scale = scales.hidden
    reads, makes = scale[None], 1 / scale[:, None]
    embedding = np.full(spec.fuse.inputs - len(scale), scales.embedding, np.float32)
    found = {
        f"{FUSE}.weight": makes * np.concatenate([embedding, scale])[None],
        f"{FUSE}.bias": 1 / scale,
        f"{_LAYER}.post_attention_layernorm.weight": scale / np.float32(mean),
        **{f"{_LAYER}.self_attn.{part}_proj.weight": reads for part in "qkv"},
        f"{_LAYER}.self_attn.o_proj.weight": makes,
        **{f"{_LAYER}.mlp.{part}_proj.weight": np.ones((1, 1), np.float32) for part in ("gate", "up")},
        f"{_LAYER}.mlp.down_proj.weight": makes,
    }
    assert {*found, _LM_HEAD} == set(spec.tensors())
    return found
