"""Which layout of quantized weights a config names."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.prequantized.awq_layout import AwqLayout
from quasar.checkpoints.prequantized.compressed_tensors_layout import CompressedTensorsLayout
from quasar.checkpoints.prequantized.folder_layout import Layout
from quasar.checkpoints.prequantized.gptq_layout import GptqLayout

# The ends of names without one of which no weight is quantized.
KEYS = (AwqLayout.key, GptqLayout.key, CompressedTensorsLayout.key)


def make_layout(config: Mapping[str, Any]) -> Layout | None:
    """The layout that a `quantization_config` names; None where this is not one of those that are read.

    Raises `CheckpointError` for an option of a layout that is not read.
    """
    match config.get("quant_method"):
        case "gptq":
            return GptqLayout(config)
        case "awq":
            return AwqLayout(config)
        case "compressed-tensors":
            return CompressedTensorsLayout(config)
        case _:
            return None
