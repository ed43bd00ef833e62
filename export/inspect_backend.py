"""One back end of an engine directory, for people and for programs."""

from typing import Any

from engines.directory import EngineDirectory
from engines.tensorrt.library import LIBRARIES
from quasar.errors import EngineError


def backend_json(directory: EngineDirectory, backend: str) -> dict[str, Any]:
    """The manifest's part on a back end; TensorRT's plans with their sizes.

    Raises `EngineError` if the directory does not have it, with the command that adds it.
    """
    manifest = directory.manifest
    if backend == "onnxruntime":
        return manifest.onnxruntime.to_json()
    files = next((files for name, files in manifest.tensorrt.items() if name == backend), None)
    if files is None:
        raise EngineError(
            f"{directory.path} has no {backend} back end: run python -m export compile {directory.path} "
            f"--backend {backend}"
        )
    plans = [
        {**plan, "bytes": manifest.files[plan["file"]]["bytes"], "sha256": manifest.files[plan["file"]]["sha256"]}
        for plan in files.to_json()["plans"]
    ]
    return {**files.to_json(), "plans": plans}


def print_backend(directory: EngineDirectory, backend: str) -> None:
    """The same as tables."""
    from rich.console import Console
    from rich.table import Table

    out, value = Console(highlight=False), backend_json(directory, backend)
    if backend not in LIBRARIES:
        for name, item in value.items():
            out.print(f"{name}: {item}")
        return
    out.print(f"[bold]{backend}[/bold], {value['compute_type']}, {value['graph']}")
    out.print(f"matmuls: {value['matmuls']}, of which quantized: {value['quantized_matmuls']}")
    if value["rescaled_channels"]:
        out.print(f"output channels rescaled for float16: {value['rescaled_channels']}")
    plans = Table("compute capability", "version", "MB", "file", box=None, padding=(0, 2, 0, 0))
    for plan in value["plans"]:
        plans.add_row(plan["compute_capability"], plan["version"], f"{plan['bytes'] / 1e6:.0f}", plan["file"])
    out.print(plans)
    layers = Table("layer type", "number", box=None, padding=(0, 2, 0, 0))
    for name, number in sorted(value["layers"].items(), key=lambda item: -item[1]):
        layers.add_row(name, str(number))
    out.print(layers)
    profiles = Table("profile", "input_ids", "logits_rows", box=None, padding=(0, 2, 0, 0))
    for name, shapes in value["profiles"].items():
        profiles.add_row(name, _range(shapes["input_ids"]), _range(shapes["logits_rows"]))
    out.print(profiles)
    bindings = Table("binding", "dtype", "shape", "", box=None, padding=(0, 2, 0, 0))
    # Every layer's caches look alike: the first layer's stand for them.
    shown = [item for item in value["bindings"] if ".0." in item["name"] or "." not in item["name"]]
    for item in shown:
        bindings.add_row(
            item["name"], item["dtype"], str(item["shape"]), f"updates {item['updates']}" if item["updates"] else ""
        )
    out.print(bindings)
    out.print(f"and the caches of the other layers: {len(value['bindings'])} bindings in all")


def _range(shapes: list[list[int]]) -> str:
    smallest, typical, largest = ("×".join(map(str, shape)) for shape in shapes)
    return f"{smallest} to {largest}, typically {typical}"
