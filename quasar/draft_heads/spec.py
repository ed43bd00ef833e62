"""`DraftHeadSpec`: everything about a draft head that shapes its graph, and the names of its tensors.

A draft head is one decoder layer that reads the target's hidden states and guesses the tokens after the next one
(EAGLE, arXiv 2401.15077; EAGLE-2, 2406.16858; EAGLE-3, 2503.01840). Position i is fed token i + 1 and the target's
hidden states after token i, or, where the target has not been there yet, the head's own; its logits are of token i + 2.
"""

from dataclasses import dataclass
from typing import Literal

from quasar.checkpoints.spec import DecoderSpec, Linear
from quasar.errors import CheckpointError

# "eagle": one linear makes the layer's input of embedding and hidden state. "eagle3": hidden states of several layers
# become one; attention reads the norm of the embedding beside the norm of that.
HeadKind = Literal["eagle", "eagle3"]

FUSE = "fc"


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftHeadSpec:
    """A draft head.

    `decoder`: its one layer, sizes and norms; `vocab_size` there is the target's: the ids that it is fed.
    `feature_layers`: the target's hidden states that it reads are those that enter these layers; the number of layers
    stands for what leaves the last one. `normed`: after the target's final norm. `target_hidden_size`: of one of them.
    `draft_vocab_size`: the tokens that it can draft; fewer than the target's where the head has a `d2t`.
    `own_embedding`, `own_head`: it has them; else they are the target's.
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

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Canonical name → shape of every tensor that a head of this spec has of its own; `d2t` besides."""
        hidden = self.decoder.hidden_size
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(self.norms, (hidden,))
        if self.own_embedding:
            shapes["embed_tokens.weight"] = (self.decoder.vocab_size, hidden)
        for linear in self.linears():
            if linear.name == "lm_head" and not self.own_head:
                continue
            for member, rows, bias in zip(linear.members, linear.rows, linear.bias, strict=True):
                shapes[f"{member}.weight"] = (rows, linear.inputs)
                if bias:
                    shapes[f"{member}.bias"] = (rows,)
        return shapes

    def check(self, target: DecoderSpec) -> None:
        """Raise `CheckpointError` naming what does not fit the target, or what no graph can express."""
        self.decoder.check()
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
        outside = [layer for layer in self.feature_layers if not 0 <= layer <= target.num_layers]
        if outside or not self.feature_layers:
            raise CheckpointError(
                f"the draft head reads what enters the layers {list(self.feature_layers)}; the model has "
                f"{target.num_layers}"
            )
        if not self.own_embedding and self.decoder.hidden_size != target.hidden_size:
            raise CheckpointError(
                f"the draft head has no embedding of its own, and the model's has {target.hidden_size} values a token, "
                f"not {self.decoder.hidden_size}"
            )
