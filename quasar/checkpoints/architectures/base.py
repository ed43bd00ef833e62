"""What a decoder family says of itself; `families` lists them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quasar.checkpoints.gguf_header import GgufHeader
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec, LayerSpec, split_name

# Canonical module → llama.cpp's, in a block or outside of blocks, for pre-norm decoders.
GGUF_MODULES: dict[str, str] = {
    "embed_tokens": "token_embd",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "norm": "output_norm",
    "lm_head": "output",
}
# The norms of decoders that have them after attention and MLP.
GGUF_OUTPUT_NORMS: dict[str, str] = {
    "attention_output_layernorm": "post_attention_norm",
    "mlp_output_layernorm": "post_ffw_norm",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SmoothingGroup:
    """A linear whose input channels can be divided by a factor where they are made.

    `producer`: the norm or projection whose output channels are divided; `consumer`: the linear whose weight is
    multiplied, both by canonical name, without the layer. `shared_by_query_heads`: the consumer reads query heads and
    the producer makes kv heads, so the query heads that read one kv head share its factor.
    """

    producer: str
    consumer: str
    shared_by_query_heads: bool = False


# Decoders with norms before attention and MLP, and around them: what is normed afterwards is smoothed by nothing.
PRE_NORM_SMOOTHING = (
    SmoothingGroup(producer="input_layernorm", consumer="self_attn.qkv_proj"),
    SmoothingGroup(producer="self_attn.v_proj", consumer="self_attn.o_proj", shared_by_query_heads=True),
    SmoothingGroup(producer="post_attention_layernorm", consumer="mlp.gate_up_proj"),
    SmoothingGroup(producer="mlp.up_proj", consumer="mlp.down_proj"),
    SmoothingGroup(producer="norm", consumer="lm_head"),
)


# Decoders with norms after attention and MLP alone: nothing that could take a factor makes what q/k/v and gate/up read.
POST_NORM_SMOOTHING = tuple(group for group in PRE_NORM_SMOOTHING if "_layernorm" not in group.producer)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedRows:
    """Where a canonical module's rows stand, if checkpoints store several as one.

    `stored`: the stored module, without the layer. `rows`: (the layer's spec) → which rows of it, int64.
    """

    stored: str
    rows: Callable[[LayerSpec], NDArray[np.int64]]


def stacked_rows(stored: str, sizes: Mapping[str, Callable[[LayerSpec], int]]) -> dict[str, FusedRows]:
    """Modules that are stored one below the other, by canonical name: name → how many rows, in their order."""

    def rows_of(module: str) -> Callable[[LayerSpec], NDArray[np.int64]]:
        def rows(layer: LayerSpec) -> NDArray[np.int64]:
            before = [size(layer) for name, size in sizes.items()][: list(sizes).index(module)]
            return np.arange(sum(before), sum(before) + sizes[module](layer))

        return rows

    return {module: FusedRows(stored=stored, rows=rows_of(module)) for module in sizes}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The transformers model that computes the same, for families that transformers does not know.

    `model_type`: its name there. `values`: what its config takes beyond what all of them do.
    """

    model_type: str
    values: Callable[[DecoderSpec], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFormat:
    """How llama.cpp stores a family.

    `architecture`: its `general.architecture`, which its other keys start with. `from_header`: header → spec.
    `transformers_values`: what the family's transformers config takes beyond what all of them do. `modules`: canonical
    module → llama.cpp's. `fused`: those that are stored as one, with llama.cpp's name of it. `restore`: (canonical
    name, its stored rows, spec) → the tensor as transformers has it.
    """

    architecture: str
    from_header: Callable[[GgufHeader], DecoderSpec]
    transformers_values: Callable[[DecoderSpec], Mapping[str, Any]] = lambda spec: {}
    modules: Mapping[str, str] = field(default_factory=lambda: GGUF_MODULES)
    fused: Mapping[str, FusedRows] = field(default_factory=dict)
    restore: Callable[[str, NDArray[Any], DecoderSpec], NDArray[Any]] = lambda name, value, spec: value

    def tensor_name(self, name: str) -> str:
        """What the file calls a tensor, or the one that it is part of, by canonical name."""
        layer, rest = split_name(name)
        module, _, parameter = rest.rpartition(".")
        if module in self.fused:
            return f"blk.{layer}.{self.fused[module].stored}.{parameter}"
        return f"{'' if layer is None else f'blk.{layer}.'}{self.modules[module]}.{parameter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder family.

    `name`: transformers' `model_type`, which manifests name as well. `model_class`: what `architectures` in config.json
    names; `other_classes`: what it may name as well; `wrapper_classes`: classes whose `text_config` is the family's,
    and whose other parts an engine leaves out. `from_config`: config → spec. `weight_names`: canonical module → the
    family's own where the two differ, both without the layer. `fused`: canonical modules that checkpoints, and
    transformers' model if there is one, hold as parts of another. `reference`: None where transformers knows the
    family. `gguf`: None where its GGUF files are not read. `smoothing`: at most one group for each linear; one without
    a group is not smoothed.

    For people, in `export list`: `models`: those of the family that they know. `options`: what a checkpoint may have.
    `tested`: which of `checks.CHECKS` the tests run.
    """

    name: str
    model_class: str
    from_config: Callable[[HuggingFaceConfig], DecoderSpec]
    weight_names: Mapping[str, str] = field(default_factory=dict)
    other_classes: tuple[str, ...] = ()
    wrapper_classes: tuple[str, ...] = ()
    fused: Mapping[str, FusedRows] = field(default_factory=dict)
    reference: Reference | None = None
    gguf: GgufFormat | None = None
    smoothing: tuple[SmoothingGroup, ...] = PRE_NORM_SMOOTHING
    models: str = ""
    options: str = ""
    tested: tuple[str, ...] = ()

    def checkpoint_name(self, name: str) -> str:
        """What checkpoints call a tensor or module, or the fused one that it is part of, without the leading `model.`.

        Transformers' model has the same names, but for `module_name`.
        """
        fused = fused_rows(name, self.fused)
        if fused is not None:
            return _renamed(name, {module: one.stored for module, one in self.fused.items()})
        return _renamed(name, self.weight_names)

    def module_name(self, name: str) -> str:
        """What the float model calls a module: a part of a fused one is a submodule of that."""
        fused = fused_rows(name, self.fused)
        own = self.checkpoint_name(name)
        return own if fused is None else f"{own}.{name.rpartition('.')[2]}"

    def canonical_name(self, name: str) -> str:
        """The inverse of `checkpoint_name`."""
        return _renamed(name, {theirs: ours for ours, theirs in self.weight_names.items()})


def fused_rows(name: str, fused: Mapping[str, FusedRows]) -> FusedRows | None:
    """Where the rows of a module, or of one of its tensors, stand; None if they are a tensor of their own."""
    _, rest = split_name(name)
    return fused.get(rest) or fused.get(rest.rpartition(".")[0])


def own_rows(name: str, stored: NDArray[Any], spec: DecoderSpec, fused: Mapping[str, FusedRows]) -> NDArray[Any]:
    """A tensor's own rows of the stored one that holds it, by canonical name: all of them unless it is fused."""
    rows, (layer, _) = fused_rows(name, fused), split_name(name)
    return stored if rows is None or layer is None else stored[rows.rows(spec.layers[layer])]


def stored_shapes(spec: DecoderSpec, stored_name: Callable[[str], str]) -> dict[str, tuple[int, ...]]:
    """Stored name → shape of every tensor; those of canonical tensors that share a stored name stand in one."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in spec.tensors().items():
        stored = stored_name(name)
        rows = shapes[stored][0] if stored in shapes else 0
        shapes[stored] = (rows + shape[0], *shape[1:])
    return shapes


def _renamed(name: str, modules: Mapping[str, str]) -> str:
    _, rest = split_name(name)
    for module, other in modules.items():
        if rest == module or rest.startswith(f"{module}."):
            return name.removesuffix(rest) + other + rest.removeprefix(module)
    return name
