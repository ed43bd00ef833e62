"""A native graph whose caches hold INT8: the scales of their channels become inputs of the attention."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult, PreconditionError

from engines import contract as names
from export.builder import initializer
from plugins.cpu.library import DOMAIN
from quasar.numerics import Float32

# How integers lie, and what is read of them: one beside the other; in two tiers of 4 bits, of which both or the upper.
CacheForm = Literal["flat", "both tiers", "upper tier"]
_FLOAT = "VerifyAttention"
_OPERATORS: dict[CacheForm, str] = {
    "flat": "VerifyAttentionInt8",
    "both tiers": "VerifyAttentionTiers",
    "upper tier": "VerifyAttentionUpperTier",
}
# Where VerifyAttention takes the scales of keys and of values.
_KEY_SCALE, _VALUE_SCALE, _NUM_INPUTS = 12, 13, 14


class CachesToInt8(InPlacePass):
    """Native operators over float32 caches → over INT8 ones. `scales`: of each layer's keys and values, [G, D] each."""

    def __init__(self, scales: Sequence[tuple[Float32, Float32]], form: CacheForm = "flat") -> None:
        super().__init__()
        self._scales, self._form = scales, form

    def requires(self, model: ir.Model) -> None:
        """Caches in float32, on native operators."""
        if not any(node.op_type == _FLOAT and node.domain == DOMAIN for node in model.graph):
            raise PreconditionError(f"the graph has no {_FLOAT}: it is no native one with caches in float32")

    def call(self, model: ir.Model) -> PassResult:
        """Change every layer's operator, and type and shape of its caches."""
        layer = 0
        for node in model.graph:
            if node.op_type != _FLOAT or node.domain != DOMAIN:
                continue
            node.op_type = _OPERATORS[self._form]
            node.resize_inputs(_NUM_INPUTS)
            for place, part, scale in zip(
                (_KEY_SCALE, _VALUE_SCALE), ("key_scale", "value_scale"), self._scales[layer], strict=True
            ):
                value = initializer(ir.tensor(np.ascontiguousarray(scale), name=f"layers.{layer}.self_attn.{part}"))
                model.graph.register_initializer(value)
                node.replace_input_with(place, value)
            layer += 1
        for value in (*model.graph.inputs, *model.graph.outputs):
            if str(value.name).startswith((names.PAST_PREFIX, names.PRESENT_PREFIX)):
                value.type = ir.TensorType(ir.DataType.INT8)
                if self._form != "flat":
                    value.shape = _in_tiers(value.shape)
        return PassResult(model, modified=True)


def _in_tiers(shape: ir.Shape | None) -> ir.Shape:
    """[slots, G, S, D] → [slots, 2G, S, D / 2]."""
    assert shape is not None
    slots, heads, positions, size = shape
    assert isinstance(heads, int)
    assert isinstance(size, int)
    return ir.Shape([slots, 2 * heads, positions, size // 2])
