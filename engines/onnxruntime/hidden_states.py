"""Hidden states as further outputs of a verifier graph, added when it is loaded: the file stays as it is.

A serialized protobuf message that follows another one is merged with it: fields that repeat are appended. So outputs
are added to a serialized model by a second model that has nothing but them, without the onnx package.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.contract import layer_output
from engines.onnxruntime.binding import Binding
from engines.onnxruntime.inputs import Buffer
from quasar.errors import EngineError

Float32 = NDArray[np.float32]

# Numbers of protobuf fields: ModelProto.graph, GraphProto.output, ValueInfoProto.name and .type, TypeProto.tensor_type,
# TypeProto.Tensor.elem_type; and TensorProto.FLOAT.
_GRAPH, _OUTPUT, _NAME, _TYPE, _TENSOR, _ELEMENT, _FLOAT = 7, 12, 1, 2, 1, 1, 1


def with_hidden_states(model: bytes, layers: Sequence[int]) -> bytes:
    """A serialized graph whose outputs are, besides, the hidden states float32 [1, R, hidden] that enter `layers`."""
    if not layers:
        return model
    tensor = bytes([_ELEMENT << 3, _FLOAT])
    kind = _field(_TYPE, _field(_TENSOR, tensor))
    outputs = [_field(_OUTPUT, _field(_NAME, name_of(layer).encode()) + kind) for layer in layers]
    return model + _field(_GRAPH, b"".join(outputs))


def name_of(layer: int) -> str:
    """The value that enters a layer; the number of layers stands for what leaves the last one."""
    if layer < 1:
        raise EngineError(f"the hidden states that enter layer {layer} were asked for; layers from 1 on were expected")
    return layer_output(layer - 1)


class HiddenStates:
    """The buffers that those outputs are bound to; how many values a hidden state has, the first pass tells."""

    def __init__(self, ort: Any, layers: Sequence[int], max_positions: int) -> None:
        """For at most so many positions of a pass."""
        self._ort, self._names, self._most = ort, [name_of(layer) for layer in layers], max_positions
        self._buffers: list[Buffer] = []

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.array.nbytes for buffer in self._buffers)

    def bind(self, binding: Binding, count: int) -> None:
        """Bind the outputs of a pass over so many positions."""
        for name, buffer in zip(self._names, self._buffers, strict=False):
            binding.output(name, buffer.value(count))
        if not self._buffers:
            for name in self._names:
                binding.any_output(name)

    def take(self, binding: Binding, count: int) -> tuple[Float32, ...]:
        """What the pass wrote, by layer: float32 [count, hidden]."""
        if not self._buffers:
            arrays = [binding.allocated(name) for name in self._names]
            sizes = [(1, self._most, array.shape[-1]) for array in arrays]
            self._buffers = [Buffer(self._ort, size, axis=1, dtype=np.float32) for size in sizes]
            for buffer, array in zip(self._buffers, arrays, strict=True):
                buffer.array[0, :count] = array[0]
        return tuple(buffer.array[0, :count] for buffer in self._buffers)


def _field(number: int, content: bytes) -> bytes:
    """A protobuf field of bytes."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
