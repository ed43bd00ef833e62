"""What a parsed network holds, by TensorRT's own names; a plan itself no longer tells."""

from collections import Counter
from typing import Any

from engines import contract as names
from engines.contract import Contract
from quasar.errors import EngineError

# Layers that pass a matmul's operand on without computing.
_TRANSPARENT = {"SHUFFLE", "CAST", "UNSQUEEZE", "SQUEEZE", "IDENTITY"}

ProfileShapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


def profiles_for(contract: Contract) -> dict[str, ProfileShapes]:
    """Profile → input → smallest, typical and largest shape.

    `verify` takes T = 1 to `max_width` tokens, `prefill` up to `prefill_chunk`; both give logits for up to `max_width`
    positions: with 1 alone, TensorRT keeps the head's weights a second time, in 16 bits.
    """
    width, chunk = contract.max_width, contract.prefill_chunk
    return {
        "verify": _shapes(contract, typical=min(8, width), largest=width, typical_logits=min(8, width)),
        "prefill": _shapes(contract, typical=chunk, largest=chunk, typical_logits=1),
    }


def describe_network(network: Any) -> dict[str, Any]:
    """`layers` by type, `matmuls`, and `quantized_matmuls`: those with both operands from DEQUANTIZE."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    matmuls = [layer for layer in layers if layer.type.name == "MATRIX_MULTIPLY"]
    quantized = [
        layer for layer in matmuls if all(_source(layer.get_input(i), producers) == "DEQUANTIZE" for i in range(2))
    ]
    return {
        "layers": dict(sorted(Counter(layer.type.name for layer in layers).items())),
        "matmuls": len(matmuls),
        "quantized_matmuls": len(quantized),
    }


def describe_bindings(network: Any) -> list[dict[str, Any]]:
    """Every input and output: name, mode, dtype, shape (-1 is dynamic), and which input an output overwrites."""
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    outputs = [network.get_output(index) for index in range(network.num_outputs)]
    return [
        {
            "name": tensor.name,
            "mode": mode,
            "dtype": tensor.dtype.name.lower(),
            "shape": list(tensor.shape),
            "updates": past_of(tensor.name) if mode == "output" else None,
        }
        for mode, tensors in (("input", inputs), ("output", outputs))
        for tensor in tensors
    ]


def check_inputs(network: Any) -> None:
    """Raise `EngineError` for an input whose values decide shapes: it would lie on the host, and stop every pass."""
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        if tensor.is_shape_tensor:
            raise EngineError(f"TensorRT takes the input {tensor.name} for a shape: the graph was not lowered for it")


def past_of(name: str) -> str | None:
    """The cache input that a cache output overwrites in place; None for any other output."""
    if not name.startswith(names.PRESENT_PREFIX):
        return None
    return names.PAST_PREFIX + name.removeprefix(names.PRESENT_PREFIX)


def _source(tensor: Any, producers: dict[str, Any]) -> str:
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in _TRANSPARENT:
        layer = producers.get(layer.get_input(0).name)
    return "" if layer is None else str(layer.type.name)


def _shapes(contract: Contract, *, typical: int, largest: int, typical_logits: int) -> ProfileShapes:
    batch = contract.max_batch
    tokens = ((batch, 1), (batch, typical), (batch, largest))
    cache = (batch, contract.num_kv_heads, contract.capacity, contract.head_size)
    shapes: ProfileShapes = {
        names.INPUT_IDS: tokens,
        names.POSITION_IDS: tokens,
        names.CACHE_LENGTHS: ((batch,),) * 3,
        names.LOGITS_ROWS: ((1,), (typical_logits,), (contract.max_width,)),
    }
    if contract.tree_mask:
        shapes[names.TREE_MASK] = ((batch, 1, 1), (batch, typical, typical), (batch, largest, largest))
    for layer in range(contract.num_layers):
        shapes |= dict.fromkeys(names.past_names(layer), (cache,) * 3)
    return shapes
