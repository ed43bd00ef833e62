"""An EAGLE-3 head in torch: its parameters by canonical name, and the few functions that a pass is made of."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.rope import cos_sin_tables
from quasar.draft_heads.spec import FUSE, DraftHeadSpec

if TYPE_CHECKING:
    import torch

_LAYER = "layers.0"


class HeadModel:
    """A draft head whose parameters can be trained; the embedding is the target's and stays.

    N positions, H hidden size, F values of features, G KV heads, D head size, R query heads of a KV head.
    """

    def __init__(
        self,
        spec: DraftHeadSpec,
        tensors: Mapping[str, NDArray[np.float32]],
        embedding: "torch.Tensor",
        *,
        num_positions: int,
        device: str = "cpu",
    ) -> None:
        """Make the parameters.

        Args:
            tensors: by canonical name, all of `spec.tensors()`.
            embedding: [V, H] of any float type.
            num_positions: that rotations are known of.
        """
        import torch

        self.spec, self.device = spec, device
        self.parameters = {
            name: torch.nn.Parameter(torch.from_numpy(np.array(tensors[name], np.float32)).to(device))
            for name in spec.tensors()
        }
        self._embedding = embedding.to(device)
        attention = spec.decoder.layers[0].attention
        assert attention.rope is not None
        cos, sin = cos_sin_tables(attention.rope, attention.head_size, num_positions)
        self._cos, self._sin = (torch.from_numpy(table).to(device) for table in (cos, sin))

    def tensors(self) -> dict[str, NDArray[np.float32]]:
        """The parameters as they are."""
        return {name: value.detach().float().cpu().numpy().copy() for name, value in self.parameters.items()}

    def fuse(self, features: "torch.Tensor") -> "torch.Tensor":
        """The target's hidden states float32 [N, F] as one vector: [N, H]."""
        return self._linear(FUSE, features)

    def layer_input(self, tokens: "torch.Tensor", hidden: "torch.Tensor") -> "torch.Tensor":
        """What attention reads: the norm of the embedding of int64 [N] beside that of hidden states: [N, 2 H]."""
        import torch

        embedded = self._embedding[tokens].float()
        return torch.cat(
            [
                self._normed(f"{_LAYER}.input_layernorm", embedded),
                self._normed(f"{_LAYER}.hidden_norm", hidden),
            ],
            dim=-1,
        )

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

    def layer_output(self, hidden: "torch.Tensor", attended: "torch.Tensor") -> "torch.Tensor":
        """The layer's output [N, H]: what attention gave ([G, R, N, D]) and the MLP added to the hidden state."""
        rows = attended.permute(2, 0, 1, 3).reshape(len(hidden), -1)
        hidden = hidden + self._linear(f"{_LAYER}.self_attn.o_proj", rows)
        x = self._normed(f"{_LAYER}.post_attention_layernorm", hidden)
        gate = self._activated(self._linear(f"{_LAYER}.mlp.gate_proj", x))
        return hidden + self._linear(f"{_LAYER}.mlp.down_proj", gate * self._linear(f"{_LAYER}.mlp.up_proj", x))

    def logits(self, hidden: "torch.Tensor") -> "torch.Tensor":
        """Logits [N, draft vocabulary] of the layer's output."""
        return self._linear("lm_head", self._normed("norm", hidden))

    def _linear(self, name: str, x: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import linear

        return linear(x, self.parameters[f"{name}.weight"])

    def _normed(self, name: str, x: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import rms_norm

        return rms_norm(x, (x.shape[-1],), self.parameters[f"{name}.weight"], self.spec.decoder.rms_norm_eps)

    def _activated(self, x: "torch.Tensor") -> "torch.Tensor":
        from torch.nn.functional import gelu, silu

        return silu(x) if self.spec.decoder.layers[0].mlp.kind == "gated_silu" else gelu(x, approximate="tanh")

    def _rotated(self, heads: "torch.Tensor", positions: "torch.Tensor") -> "torch.Tensor":
        """Heads [..., N, D] rotated to their positions int64 [N]: the first half of a head with the second."""
        import torch

        cos, sin = self._cos[positions], self._sin[positions]
        first, second = heads.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
