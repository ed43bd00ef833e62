"""`DecoderSpec`: everything about a decoder that shapes its graph, layer by layer, and the names of its tensors.

Canonical names are those of Llama's Hugging Face checkpoints without the leading `model.`; `architectures` knows what
other families call the same tensors.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quasar.errors import CheckpointError

RopeKind = Literal["default", "linear", "llama3", "yarn", "divided"]
# Norms of queries and keys, before rotation: "head", an RMS norm over each head's vector; "row", one over all query
# heads together and one over all key heads.
QkNorm = Literal["head", "row"]
# MLPs: down(activation(gate(x)) * up(x)), the activation SiLU or GELU with tanh.
MlpKind = Literal["gated_silu", "gated_gelu_tanh"]
# Where RMS norms stand: on what attention and MLP read, on what they add to the residual stream, or on both.
NormPlacement = Literal["before", "after", "around"]

# Norms of a layer by canonical name: on what attention and the MLP read, and on what they add to the residual stream.
_INPUT_NORMS = ("input_layernorm", "post_attention_layernorm")
_OUTPUT_NORMS = ("attention_output_layernorm", "mlp_output_layernorm")
_IN_LAYER = re.compile(r"layers\.(\d+)\.(.+)")


def split_name(name: str) -> tuple[int | None, str]:
    """The layer of a tensor, module or linear, and its name there: (3, "mlp.up_proj"); (None, name) outside layers."""
    found = _IN_LAYER.fullmatch(name)
    return (None, name) if found is None else (int(found[1]), found[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding: base and scaling, with the parameters that `kind` uses (see `rope.py`).

    `rotary_size`: how many first values of a head are rotated; 0 is the whole head. `long_divisors`: those that take
    the place of `divisors` where sequences may be longer than `original_context_length` (`at_length`).
    """

    theta: float
    kind: RopeKind = "default"
    rotary_size: int = 0
    factor: float = 1.0
    original_context_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()

    def rotated(self, head_size: int) -> int:
        """How many values of a head are rotated."""
        return self.rotary_size or head_size

    def at_length(self, max_length: int) -> "Rope":
        """The rope for sequences of up to `max_length` positions, which one set of divisors serves."""
        if not self.long_divisors:
            return self
        long = max_length > self.original_context_length
        return replace(self, divisors=self.long_divisors if long else self.divisors, long_divisors=())


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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every weight and bias of its members."""
        shapes: dict[str, tuple[int, ...]] = {}
        for member, rows, bias in zip(self.members, self.rows, self.bias, strict=True):
            shapes[f"{member}.weight"] = (rows, self.inputs)
            if bias:
                shapes[f"{member}.bias"] = (rows,)
        return shapes


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """Causal grouped-query attention of one layer.

    `rope`: None where queries and keys are not rotated. `window`: how many positions a position sees, itself included;
    None is all of them. `softmax_scale`: the factor on query times key; None is `head_size ** -0.5`. `softcap`: scores
    become `softcap * tanh(score / softcap)`; 0 is none.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    rope: Rope | None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: QkNorm | None = None
    window: int | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key (or value) heads together."""
        return self.num_kv_heads * self.head_size

    @property
    def scale(self) -> float:
        """The factor on query times key."""
        return float(self.head_size**-0.5) if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpSpec:
    """The MLP of one layer."""

    intermediate_size: int
    kind: MlpKind = "gated_silu"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """One decoder layer: attention, then the MLP, each added to the residual stream, times `residual_scale`.

    The scale is folded into the weights of o_proj and down_proj when they are prepared: no graph has it.
    """

    attention: AttentionSpec
    mlp: MlpSpec
    norms: NormPlacement = "before"
    residual_scale: float = 1.0

    @property
    def input_norms(self) -> bool:
        """Whether norms stand before attention and MLP."""
        return self.norms != "after"

    @property
    def output_norms(self) -> bool:
        """Whether norms stand between attention or MLP and the residual stream."""
        return self.norms != "before"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderSpec:
    """A decoder: an embedding, layers, a final RMS norm and the LM head.

    `architecture`: the family's name in `architectures.families`. `layers`: those of the graph, in order.
    `embedding_scale`: a factor on embedded tokens. `logits_scale`: a factor on logits, folded into the final norm's
    weight when it is prepared. `logits_softcap`: logits become `logits_softcap * tanh(logits / logits_softcap)`; 0 is
    none. `norm_offset`: added to the stored weight of every norm when it is prepared.
    """

    architecture: str
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    context_length: int
    rms_norm_eps: float
    tied_head: bool = False
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float = 0.0
    norm_offset: float = 0.0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def num_layers(self) -> int:
        """Layers of the graph."""
        return len(self.layers)

    # `check` makes sure that layers share what follows: caches have one shape.

    @property
    def num_kv_heads(self) -> int:
        """Key (and value) heads of every layer's cache."""
        return self.layers[0].attention.num_kv_heads

    @property
    def head_size(self) -> int:
        """Values per head, in every layer."""
        return self.layers[0].attention.head_size

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The rotary embeddings of all layers, in order of first use: each has a pair of tables."""
        ropes = (layer.attention.rope for layer in self.layers)
        return tuple(dict.fromkeys(rope for rope in ropes if rope is not None))

    @property
    def windows(self) -> tuple[int, ...]:
        """The windows of all layers that have one, in order of first use."""
        windows = (layer.attention.window for layer in self.layers)
        return tuple(dict.fromkeys(window for window in windows if window is not None))

    def at_length(self, max_length: int) -> "DecoderSpec":
        """The decoder for sequences of up to `max_length` positions: where ropes depend on that, they are fixed."""
        if not any(rope.long_divisors for rope in self.ropes):
            return self
        return replace(
            self,
            layers=tuple(
                layer
                if (rope := layer.attention.rope) is None
                else replace(layer, attention=replace(layer.attention, rope=rope.at_length(max_length)))
                for layer in self.layers
            ),
        )

    def keep_layers(self, remaining: Sequence[int]) -> "DecoderSpec":
        """The decoder that has only these layers, in this order, numbered anew."""
        return replace(self, layers=tuple(self.layers[layer] for layer in remaining))

    def layer_linears(self, layer: int) -> tuple[Linear, Linear, Linear, Linear]:
        """The four matmuls of a layer: q/k/v fused, o, gate/up fused, down."""
        attention, mlp = self.layers[layer].attention, self.layers[layer].mlp
        at, of = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        return (
            Linear(
                name=f"{at}.qkv_proj",
                members=(f"{at}.q_proj", f"{at}.k_proj", f"{at}.v_proj"),
                rows=(attention.query_size, attention.kv_size, attention.kv_size),
                inputs=self.hidden_size,
                bias=(attention.qkv_bias,) * 3,
            ),
            Linear(
                name=f"{at}.o_proj",
                members=(f"{at}.o_proj",),
                rows=(self.hidden_size,),
                inputs=attention.query_size,
                bias=(attention.output_bias,),
            ),
            Linear(
                name=f"{of}.gate_up_proj",
                members=(f"{of}.gate_proj", f"{of}.up_proj"),
                rows=(mlp.intermediate_size,) * 2,
                inputs=self.hidden_size,
                bias=(mlp.bias,) * 2,
            ),
            Linear(
                name=f"{of}.down_proj",
                members=(f"{of}.down_proj",),
                rows=(self.hidden_size,),
                inputs=mlp.intermediate_size,
                bias=(mlp.bias,),
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

    def linear_of(self, member: str) -> Linear | None:
        """The linear that a projection is part of; None for an embedding or a norm."""
        layer, _ = split_name(member)
        linears = (self.head,) if layer is None else self.layer_linears(layer)
        return next((linear for linear in linears if member in linear.members), None)

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor that a checkpoint of this spec holds."""
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for number, layer in enumerate(self.layers):
            norms = [*(_INPUT_NORMS if layer.input_norms else ()), *(_OUTPUT_NORMS if layer.output_norms else ())]
            for norm in norms:
                shapes[f"layers.{number}.{norm}.weight"] = (self.hidden_size,)
            attention = layer.attention
            match attention.qk_norm:
                case "head":
                    sizes = (attention.head_size, attention.head_size)
                case "row":
                    sizes = (attention.query_size, attention.kv_size)
                case None:
                    continue
            for part, size in zip("qk", sizes, strict=True):
                shapes[f"layers.{number}.self_attn.{part}_norm.weight"] = (size,)
        shapes["norm.weight"] = (self.hidden_size,)
        for linear in self.linears():
            if linear.name == "lm_head" and self.tied_head:
                continue
            shapes |= linear.tensors()
        return shapes

    def check(self) -> None:
        """Raise `CheckpointError` naming an option that the graph cannot express, or a size that it cannot have."""
        if not self.layers:
            raise CheckpointError("the model has no layers; at least one was expected")
        for layer in self.layers:
            _check_layer(layer)
        shared = {
            (one.num_heads, one.num_kv_heads, one.head_size) for one in (layer.attention for layer in self.layers)
        }
        if len(shared) > 1:
            raise CheckpointError("unsupported option: layers that differ in their heads")
        for name in ("embedding_scale", "logits_scale"):
            _check_factor(name, getattr(self, name))
        if not (math.isfinite(self.logits_softcap) and self.logits_softcap >= 0):
            raise CheckpointError(f"unsupported option: a soft cap of {self.logits_softcap} on logits")

    def num_parameters(self) -> int:
        """Weights and biases that the checkpoint holds."""
        total = 0
        for shape in self.tensors().values():
            size = 1
            for extent in shape:
                size *= extent
            total += size
        return total


def _check_layer(layer: LayerSpec) -> None:
    attention = layer.attention
    if attention.num_kv_heads < 1 or attention.num_heads % attention.num_kv_heads:
        raise CheckpointError(
            f"{attention.num_heads} query heads cannot share {attention.num_kv_heads} kv heads evenly"
        )
    if attention.head_size < 16 or attention.head_size % 16:
        raise CheckpointError(
            f"unsupported head size {attention.head_size}: rotary attention in ONNX Runtime takes multiples of 16"
        )
    if attention.window is not None and attention.window < 1:
        raise CheckpointError(
            "unsupported option: sliding-window attention without a window (sliding_window, use_sliding_window)"
        )
    if not (math.isfinite(attention.softcap) and attention.softcap >= 0):
        raise CheckpointError(f"unsupported option: a soft cap of {attention.softcap} on attention scores")
    _check_factor("softmax_scale", attention.scale)
    _check_factor("residual_scale", layer.residual_scale)
    if attention.rope is not None:
        _check_rope(attention.rope, attention.head_size)


def _check_factor(name: str, value: float) -> None:
    """Factors are folded into scales of integers, which are positive."""
    if not (math.isfinite(value) and value > 0):
        raise CheckpointError(f"unsupported option: {name} is {value}; a positive number was expected")


def _check_rope(rope: Rope, head_size: int) -> None:
    if rope.rotary_size % 16 or not 0 <= rope.rotary_size <= head_size:
        raise CheckpointError(
            f"unsupported option: {rope.rotary_size} of {head_size} values of a head rotate; rotary attention in ONNX "
            "Runtime takes multiples of 16"
        )
    pairs = rope.rotated(head_size) // 2
    fits = all(
        len(divisors) in (0, pairs) and all(math.isfinite(one) and one > 0 for one in divisors)
        for divisors in (rope.divisors, rope.long_divisors)
    )
    if rope.factor <= 0 or not fits:
        raise CheckpointError(f"the rope scaling does not fit: {rope}")
