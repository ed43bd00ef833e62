"""QuaRot's offline rotations (arXiv 2404.00456, section 4, stages 1a to 1c): no channel is larger than the others.

The residual stream is turned by an orthogonal matrix Q, values by another one in every head. Nothing is rotated at run
time: what reads the stream takes Q in, what writes to it takes Qᵀ in, and RMS norms, whose weights go into what reads
them, do not see a rotation. The float model computes the same function.

    embedding        E Q                    v_proj    Rᵀ V diag(norm) Q, Rᵀ bias     in every head
    q/k, gate/up     W diag(norm) Q         o_proj    Qᵀ O R, Qᵀ bias
    LM head          W diag(norm) Q         down_proj Qᵀ W, Qᵀ bias
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints import Checkpoint
from quasar.checkpoints.checkpoint import WithSpec, read_float32
from quasar.checkpoints.prequantized.weight import PrequantizedWeight
from quasar.checkpoints.spec import split_name
from quasar.errors import BuildError
from quasar.numerics import Float32

_SEED = 0
# What the manifest's `calibration.rotation` says.
ROTATION = f"Hadamard, seed {_SEED}"

# A linear's member → the norm whose output it reads.
_READS = {
    "self_attn.q_proj": "input_layernorm",
    "self_attn.k_proj": "input_layernorm",
    "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm",
    "mlp.up_proj": "post_attention_layernorm",
    "lm_head": "norm",
}
_WRITES = ("self_attn.o_proj", "mlp.down_proj")


def orthogonal_matrix(size: int, seed: int = _SEED) -> Float32:
    """An orthogonal matrix float32 [size, size] whose entries are all about as large: signs · (Hadamard ⊗ cosines).

    The Hadamard matrix is of the largest power of two that divides the size; the rest is a cosine transform.
    """
    power = size & -size
    hadamard = np.ones((1, 1))
    while len(hadamard) < power:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    odd = size // power
    place = np.arange(odd)
    cosines = np.cos(np.pi / odd * (place[:, None] + 0.5) * place[None]) * np.sqrt(np.where(place == 0, 1, 2) / odd)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size)
    matrix: Float32 = (signs[:, None] * np.kron(hadamard / np.sqrt(power), cosines)).astype(np.float32)
    return matrix


def rotated(checkpoint: Checkpoint) -> Checkpoint:
    """The same function, rotated; raises `BuildError` where norms stand on what is added to the residual stream."""
    for number, layer in enumerate(checkpoint.spec.layers):
        if layer.output_norms or not layer.input_norms:
            raise BuildError(
                f"--rotate came, and layer {number} of {checkpoint.spec.architecture} has norms after attention and "
                "MLP, which see the channels of the residual stream: leave it out"
            )
    return _Rotated(checkpoint)


class _Rotated(WithSpec):
    """Reads and turns one tensor at a time. Its head is a tensor of its own, and nothing is on a grid any more."""

    quantized_by = ""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint, replace(checkpoint.spec, tied_head=False))

    def read(self, name: str) -> NDArray[Any]:
        """One tensor by canonical name, float32."""
        module, _, parameter = name.rpartition(".")
        layer, part = split_name(module)
        if name == "embed_tokens.weight":
            return read_float32(self._checkpoint, name) @ self._residual
        tensor = read_float32(self._checkpoint, name)
        if part in _READS and parameter == "weight":
            norm = _READS[part] if layer is None else f"layers.{layer}.{_READS[part]}"
            gain = read_float32(self._checkpoint, f"{norm}.weight") + np.float32(self.spec.norm_offset)
            tensor = (tensor * gain) @ self._residual
        elif part in _READS.values():
            return np.full_like(tensor, 1 - self.spec.norm_offset)
        if part == "self_attn.v_proj":
            tensor = _in_heads(tensor.T, self._of_a_head).T
        elif part in _WRITES:
            if part == "self_attn.o_proj" and parameter == "weight":
                tensor = _in_heads(tensor, self._of_a_head)
            tensor = (tensor.T @ self._residual).T
        return np.ascontiguousarray(tensor)

    def prequantized(self, name: str) -> PrequantizedWeight | None:
        """None: a rotated weight lies between the steps of any grid."""
        del name
        return None

    def transformers_config(self) -> Any:
        """With a head of its own."""
        config = super().transformers_config()
        config.tie_word_embeddings = False
        return config

    @cached_property
    def _residual(self) -> Float32:
        return orthogonal_matrix(self.spec.hidden_size)

    @cached_property
    def _of_a_head(self) -> Float32:
        return orthogonal_matrix(self.spec.head_size)


def _in_heads(tensor: Float32, matrix: Float32) -> Float32:
    """The last axis, heads of len(matrix) values each, times the matrix."""
    heads: Float32 = tensor.reshape(*tensor.shape[:-1], -1, len(matrix)) @ matrix
    return heads.reshape(tensor.shape)
