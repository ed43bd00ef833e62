"""`DecoderSpec`: everything about a decoder that shapes its graph, and the names of its tensors and linears.

Canonical tensor names are those of Hugging Face checkpoints without the leading `model.`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quasar.errors import CheckpointError

RopeKind = Literal["default", "linear", "llama3", "yarn", "divided"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base and scaling, with the parameters that `kind` uses (see `rope.py`)."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """One matmul of the graph: fused where several projections read the same input.

    `members` are the projections of the checkpoint, in the order in which their rows are stacked;
    each has a weight float [rows, inputs] and, if `bias`, a bias float [rows].
    """

    name: str
    members: tuple[str, ...]
    rows: tuple[int, ...]
    inputs: int
    bias: tuple[bool, ...]

    @property
    def outputs(self) -> int:
        """Columns of the matmul: the rows of all members."""
        return sum(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A pre-norm decoder with grouped-query attention and a SwiGLU MLP (the Llama family, Qwen2, Qwen3)."""

    architecture: Literal["llama", "qwen2", "qwen3"]
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    rope: Rope
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_size

    def layer_linears(self, layer: int) -> tuple[Linear, Linear, Linear, Linear]:
        """The four matmuls of a layer: q/k/v fused, o, gate/up fused, down."""
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        qkv = (self.query_size, self.kv_size, self.kv_size)
        return (
            Linear(
                name=f"{attention}.qkv_proj",
                members=(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                rows=qkv,
                inputs=self.hidden_size,
                bias=(self.qkv_bias,) * 3,
            ),
            Linear(
                name=f"{attention}.o_proj",
                members=(f"{attention}.o_proj",),
                rows=(self.hidden_size,),
                inputs=self.query_size,
                bias=(self.output_bias,),
            ),
            Linear(
                name=f"{mlp}.gate_up_proj",
                members=(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                rows=(self.intermediate_size,) * 2,
                inputs=self.hidden_size,
                bias=(self.mlp_bias,) * 2,
            ),
            Linear(
                name=f"{mlp}.down_proj",
                members=(f"{mlp}.down_proj",),
                rows=(self.hidden_size,),
                inputs=self.intermediate_size,
                bias=(self.mlp_bias,),
            ),
        )

    @property
    def head(self) -> Linear:
        """The LM head. When tied, its float weight is the embedding's."""
        return Linear(
            name="lm_head", members=("lm_head",), rows=(self.vocab_size,), inputs=self.hidden_size, bias=(False,)
        )

    def linears(self) -> Iterator[Linear]:
        """Every matmul of the graph, in the order in which a pass runs them."""
        for layer in range(self.num_layers):
            yield from self.layer_linears(layer)
        yield self.head

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor that a checkpoint of this spec holds."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes[f"layers.{layer}.input_layernorm.weight"] = (self.hidden_size,)
            shapes[f"layers.{layer}.post_attention_layernorm.weight"] = (self.hidden_size,)
            if self.qk_norm:
                shapes[f"layers.{layer}.self_attn.q_norm.weight"] = (self.head_size,)
                shapes[f"layers.{layer}.self_attn.k_norm.weight"] = (self.head_size,)
        shapes["norm.weight"] = (self.hidden_size,)
        for linear in self.linears():
            if linear.name == "lm_head" and self.tied_head:
                continue
            for member, rows, bias in zip(linear.members, linear.rows, linear.bias, strict=True):
                shapes[f"{member}.weight"] = (rows, linear.inputs)
                if bias:
                    shapes[f"{member}.bias"] = (rows,)
        return shapes

    def check(self) -> None:
        """Raise `CheckpointError` naming a size that no graph can be built for."""
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise CheckpointError(f"{self.num_heads} query heads cannot share {self.num_kv_heads} kv heads evenly")
        if self.head_size < 16 or self.head_size % 16:
            raise CheckpointError(
                f"unsupported head size {self.head_size}: rotary attention in ONNX Runtime takes multiples of 16"
            )
        if self.rope.factor <= 0 or (self.rope.divisors and len(self.rope.divisors) != self.head_size // 2):
            raise CheckpointError(f"the rope scaling does not fit: {self.rope}")

    def num_parameters(self) -> int:
        """Weights and biases that the checkpoint holds."""
        total = 0
        for shape in self.tensors().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total
