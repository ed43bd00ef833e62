"""`DraftHeadSpec`: everything about a draft head that shapes its graph, and the names of its tensors.

A draft head is one decoder layer that reads the target's hidden states and guesses the tokens after the next one
(EAGLE, arXiv 2401.15077; EAGLE-2, 2406.16858; EAGLE-3, 2503.01840). Position i is fed token i + 1 and the target's
hidden states after token i, or, where the target has not been there yet, the head's own; its logits are of token i + 2.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from quasar.checkpoints.spec import DecoderSpec, Linear
from quasar.errors import CheckpointError

# "eagle": one linear makes the layer's input of embedding and hidden state. "eagle3": hidden states of several layers
# become one; attention reads the norm of the embedding beside the norm of that.
HeadKind = Literal["eagle", "eagle3"]
# RMS norms on what `fc` reads ("eagle3"): "all", one over a position's features together; "each", one over each of the
# hidden states that they are.
FeatureNorm = Literal["all", "each"]

FUSE = "fc"


class Target(Protocol):
    """The sizes of a target that a draft head has to fit; a `DecoderSpec` has them."""

    @property
    def hidden_size(self) -> int:
        """Values of a hidden state."""

    @property
    def vocab_size(self) -> int:
        """Ids."""

    @property
    def num_layers(self) -> int:
        """Layers."""

    @property
    def context_length(self) -> int:
        """Positions that it was made for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeadSpec:
    """A draft head.

    `decoder`: its one layer, sizes and norms; `vocab_size` there is the target's: the ids that it is fed.
    `feature_layers`: the target's hidden states that it reads are those that enter these layers; the number of layers
    stands for what leaves the last one. `normed`: after the target's final norm. `target_hidden_size`: of one of them.
    `draft_vocab_size`: the tokens that it can draft; fewer than the target's where the head has a `d2t`.
    `own_embedding`, `own_head`: it has them; else they are the target's, the embedding without the target's factor.
    "eagle3" alone: `feature_norm`, see `FeatureNorm`. `norm_before_residual`: attention is added to the norm of the
    hidden state that it reads, not to the hidden state. `norm_output`: the head's own hidden state, as a later position
    reads it, is after `norm`, which logits are always after; else it is what leaves the layer.
    """

    kind: HeadKind
    decoder: DecoderSpec
    feature_layers: tuple[int, ...]
    target_hidden_size: int
    draft_vocab_size: int
    normed: bool = False
    fuse_bias: bool = False
    own_embedding: bool = False
    own_head: bool = True
    feature_norm: FeatureNorm | None = None
    norm_before_residual: bool = False
    norm_output: bool = False

    @property
    def num_features(self) -> int:
        """F: values of a position that the target gives it."""
        return len(self.feature_layers) * self.target_hidden_size

    @property
    def reduces_vocabulary(self) -> bool:
        """Whether `d2t` says which tokens its logits are of."""
        return self.draft_vocab_size < self.decoder.vocab_size

    @property
    def fuse(self) -> Linear:
        """The linear that makes one vector: of hidden states ("eagle3"), or of embedding and hidden state ("eagle")."""
        hidden = self.decoder.hidden_size
        inputs = self.num_features if self.kind == "eagle3" else hidden + self.target_hidden_size
        return Linear(name=FUSE, members=(FUSE,), rows=(hidden,), inputs=inputs, bias=(self.fuse_bias,))

    @property
    def head(self) -> Linear:
        """The LM head, over the tokens that it drafts."""
        return Linear(
            name="lm_head",
            members=("lm_head",),
            rows=(self.draft_vocab_size,),
            inputs=self.decoder.hidden_size,
            bias=(False,),
        )

    def layer_linears(self) -> tuple[Linear, Linear, Linear, Linear]:
        """The four matmuls of the layer: q/k/v fused, o, gate/up fused, down."""
        qkv, output, gate_up, down = self.decoder.layer_linears(0)
        if self.kind == "eagle3":
            # Embedding first, hidden state second.
            qkv = Linear(name=qkv.name, members=qkv.members, rows=qkv.rows, inputs=2 * qkv.inputs, bias=qkv.bias)
        return qkv, output, gate_up, down

    def linears(self) -> tuple[Linear, ...]:
        """Every matmul, in the order in which a pass runs them."""
        return (self.fuse, *self.layer_linears(), self.head)

    @property
    def norms(self) -> tuple[str, ...]:
        """Names of the RMS norms' weights, float [hidden]."""
        after = ("layers.0.post_attention_layernorm.weight",)
        if self.kind == "eagle":
            return after
        return ("layers.0.input_layernorm.weight", "layers.0.hidden_norm.weight", *after, "norm.weight")

    @property
    def feature_norms(self) -> dict[str, int]:
        """Name → size of the RMS norms' weights on features, in the order of the features."""
        match self.feature_norm:
            case "all":
                return {"input_norm.weight": self.num_features}
            case "each":
                return {
                    f"fc_norm.{number}.weight": self.target_hidden_size for number in range(len(self.feature_layers))
                }
            case None:
                return {}

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor that a head of this spec has of its own; `d2t` besides."""
        hidden = self.decoder.hidden_size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.norms, (hidden,))
        shapes |= {name: (size,) for name, size in self.feature_norms.items()}
        attention = self.decoder.layers[0].attention
        if attention.qk_norm is not None:
            head = attention.qk_norm == "head"
            shapes["layers.0.self_attn.q_norm.weight"] = (attention.head_size if head else attention.query_size,)
            shapes["layers.0.self_attn.k_norm.weight"] = (attention.head_size if head else attention.kv_size,)
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (self.decoder.vocab_size, hidden)
        for linear in self.linears():
            if linear.name == "lm_head" and not self.own_head:
                continue
            shapes |= linear.tensors()
        return shapes

    def check(self, target: Target) -> None:
        """Raise `CheckpointError` naming what does not fit the target, or what no graph can express."""
        self.decoder.check()
        self._check_options()
        if self.target_hidden_size != target.hidden_size:
            raise CheckpointError(
                f"the draft head reads hidden states of {self.target_hidden_size} values, the model's have "
                f"{target.hidden_size}: the head is of another model"
            )
        if self.decoder.vocab_size != target.vocab_size:
            raise CheckpointError(
                f"the draft head is fed {self.decoder.vocab_size} ids, the model has {target.vocab_size}: the head is "
                "of another model"
            )
        ascending = sorted(set(self.feature_layers))
        if not ascending or not 0 <= ascending[0] <= ascending[-1] <= target.num_layers:
            raise CheckpointError(
                f"the draft head reads what enters the layers {list(self.feature_layers)}; the model has "
                f"{target.num_layers}"
            )
        if tuple(ascending) != self.feature_layers:
            # Engines concatenate them as the target makes them, whatever order a config has.
            raise CheckpointError(
                f"the draft head reads what enters the layers {list(self.feature_layers)}; different layers, the first "
                "one first, were expected"
            )
        if not self.own_embedding and self.decoder.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"the draft head has no embedding of its own, and the model's has {target.hidden_size} values a token, "
                f"not {self.decoder.hidden_size}"
            )
        if not self.own_head and self.decoder.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"the draft head has no LM head of its own, and the model's reads {target.hidden_size} values, not "
                f"{self.decoder.hidden_size}"
            )

    def _check_options(self) -> None:
        """Raise `CheckpointError` naming what contradicts itself."""
        if self.decoder.num_layers != 1:
            raise CheckpointError(
                f"unsupported option: a draft head of {self.decoder.num_layers} layers; one was expected"
            )
        if not 0 < self.draft_vocab_size <= self.decoder.vocab_size:
            raise CheckpointError(
                f"the draft head drafts {self.draft_vocab_size} tokens of {self.decoder.vocab_size}: draft_vocab_size "
                "and vocab_size contradict each other"
            )
        if self.reduces_vocabulary and not self.own_head:
            raise CheckpointError(
                f"the draft head drafts {self.draft_vocab_size} tokens and has no LM head of its own; the model's is "
                f"of {self.decoder.vocab_size}"
            )
        if self.kind == "eagle3":
            return
        if self.feature_norm is not None or self.norm_before_residual or self.norm_output:
            raise CheckpointError("unsupported option: norms of EAGLE-3 (fc_norm, norm_output, …) in an EAGLE head")
        if self.target_hidden_size != self.decoder.hidden_size or len(self.feature_layers) > 1:
            raise CheckpointError(
                f"an EAGLE head reads the model's hidden state or its own, and one has {self.num_features} values, the "
                f"other {self.decoder.hidden_size}"
            )
