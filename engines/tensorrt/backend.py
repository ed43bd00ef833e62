"""TensorRT and TensorRT-RTX on NVIDIA GPUs, as two back ends."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.backends import GPU, Backend, Table
from engines.directory import EngineDirectory
from engines.loaded import LoadedEngine
from engines.tensorrt.library import LibraryName, compiles_ahead
from engines.tensorrt.load_options import TensorRtOptions
from engines.tensorrt.loading import explain_misfit, find_placement, load_tensorrt
from engines.tensorrt.plans import FOLDER, TensorRtFiles
from quasar.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtBackend(Backend):
    """Runs plans that `python -m export compile` adds to an engine directory; `library`: which of the two."""

    library: LibraryName

    def read_section(self, value: Mapping[str, Any]) -> TensorRtFiles:
        """The lowered graph and the plans."""
        return TensorRtFiles.from_json(self.name, value)

    def load(self, directory: EngineDirectory, options: TensorRtOptions) -> LoadedEngine:
        """A session on this machine's GPU."""
        session, record = load_tensorrt(directory, self.library, rebuild=options.rebuild)
        return LoadedEngine(directory=directory, record=record, backend=self.name, session=session)

    def refusal(self, directory: EngineDirectory) -> str:
        """Whether GPU, library and a plan for both are here."""
        try:
            placement = find_placement(directory, self.library)
        except EngineError as error:
            return str(error)
        return "" if placement.plan is not None else explain_misfit(directory, placement)

    def to_json(self, directory: EngineDirectory) -> dict[str, Any]:
        """The part of the manifest; plans with their sizes."""
        part, files = directory.manifest.backends[self.name].to_json(), directory.manifest.files
        plans = [
            {**plan, "bytes": files[plan["file"]]["bytes"], "sha256": files[plan["file"]]["sha256"]}
            for plan in part["plans"]
        ]
        return {**part, "plans": plans}

    def show(self, directory: EngineDirectory) -> Iterator[str | Table]:
        """Plans, layers of the parsed network, profiles, bindings."""
        value = self.to_json(directory)
        yield f"[bold]{self.name}[/bold], {value['compute_type']}, {value['graph']}"
        yield f"matmuls: {value['matmuls']}, of which quantized: {value['quantized_matmuls']}"
        if value["rescaled_channels"]:
            yield f"output channels rescaled for float16: {value['rescaled_channels']}"
        yield Table(
            columns=("compute capability", "version", "MB", "file"),
            rows=tuple(
                (plan["compute_capability"], plan["version"], f"{plan['bytes'] / 1e6:.0f}", plan["file"])
                for plan in value["plans"]
            ),
        )
        yield Table(
            columns=("layer type", "number"),
            rows=tuple(
                (name, str(number)) for name, number in sorted(value["layers"].items(), key=lambda item: -item[1])
            ),
        )
        yield Table(
            columns=("profile", "input_ids", "logits_rows"),
            rows=tuple(
                (name, _range(shapes["input_ids"]), _range(shapes["logits_rows"]))
                for name, shapes in value["profiles"].items()
            ),
        )
        # Every layer's caches look alike: the first layer's stand for them.
        shown = [item for item in value["bindings"] if ".0." in item["name"] or "." not in item["name"]]
        yield Table(
            columns=("binding", "dtype", "shape", ""),
            rows=tuple(
                (
                    item["name"],
                    item["dtype"],
                    str(item["shape"]),
                    f"updates {item['updates']}" if item["updates"] else "",
                )
                for item in shown
            ),
        )
        yield f"and the caches of the other layers: {len(value['bindings'])} bindings in all"


def _range(shapes: list[list[int]]) -> str:
    smallest, typical, largest = ("×".join(map(str, shape)) for shape in shapes)
    return f"{smallest} to {largest}, typically {typical}"


def _backend(library: LibraryName, module: str) -> TensorRtBackend:
    return TensorRtBackend(
        name=library,
        library=library,
        folder=FOLDER,
        device=GPU,
        packages=(module, "cuda"),
        options=TensorRtOptions,
        compiler="export.compile",
        ahead_of_time=compiles_ahead(library),
    )


TENSORRT = _backend("tensorrt", "tensorrt")
TENSORRT_RTX = _backend("tensorrt-rtx", "tensorrt_rtx")
