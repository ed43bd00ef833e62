"""Which kernels a plan runs, from TensorRT's engine inspector: a plan must be loaded on a GPU to be asked."""

import json
import re
from typing import Any

from engines.tensorrt.library import Library

# Parts of names that kernels of integer tensor-core products have: CUTLASS's and cuBLAS's instruction and type names.
_INTEGER = re.compile(r"imma|i8816|i16832|s8s8|i8i8|int8|_s8_|igemm", re.IGNORECASE)


def plan_layers(engine: Any, library: Library) -> list[dict[str, Any]]:
    """The plan's layers as the inspector gives them; plans are compiled with detailed verbosity."""
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(library.module.LayerInformationFormat.JSON)
    layers = json.loads(text).get("Layers", [])
    return [entry if isinstance(entry, dict) else {"Name": entry} for entry in layers]


def integer_kernels(layers: list[dict[str, Any]]) -> list[str]:
    """The kernels, by `TacticName` (or the layer's own text), whose names say that they multiply integers."""
    names = [str(entry.get("TacticName") or entry.get("Name", "")) for entry in layers]
    return sorted({name for name in names if _INTEGER.search(name)})
