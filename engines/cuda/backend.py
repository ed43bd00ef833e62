"""CUDA: our own kernels on NVIDIA GPUs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engines.backends import GPU, Backend, Table
from engines.cuda.files import FOLDER, NAME, CudaFiles, read_kernel_records
from engines.cuda.load_options import CudaOptions
from engines.cuda.loading import find_placement, load_cuda
from engines.directory import EngineDirectory
from engines.loaded import LoadedEngine
from quasar.errors import EngineError


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaBackend(Backend):
    """Runs the program and the kernels that `python -m export compile --backend cuda` adds to an engine directory."""

    def read_section(self, value: Mapping[str, Any]) -> CudaFiles:
        """The program, its weights and the kernels."""
        return CudaFiles.from_json(value)

    def load(self, directory: EngineDirectory, options: CudaOptions) -> LoadedEngine:
        """A session on this machine's GPU."""
        sessions, record = load_cuda(directory, options)
        return LoadedEngine(
            directory=directory,
            record=record,
            backend=self.name,
            session=sessions.verifier,
            draft_head=sessions.head,
        )

    def refusal(self, directory: EngineDirectory) -> str:
        """Whether a GPU and kernels for it are here."""
        try:
            find_placement(directory)
        except EngineError as error:
            return str(error)
        return ""

    def to_json(self, directory: EngineDirectory) -> dict[str, Any]:
        """The part of the manifest, with what each kernel takes."""
        part = directory.manifest.backends[self.name].to_json()
        for entry in part["kernels"]:
            records = read_kernel_records(directory.file(entry["file"]))
            entry["kernels"] = [
                {
                    "name": record.name,
                    "threads": record.threads,
                    "registers": record.registers,
                    "spilled_bytes": record.spilled_bytes,
                    "shared_bytes": record.shared_bytes,
                }
                for record in records
            ]
        return part

    def show(self, directory: EngineDirectory) -> Iterator[str | Table]:
        """Kernels by compute capability."""
        value = self.to_json(directory)
        size = directory.manifest.files[value["weights"]]["bytes"]
        yield f"[bold]{self.name}[/bold], KV cache in {value['cache_type']}, weights {size / 1e6:.0f} MB"
        for entry in value["kernels"]:
            yield f"compute capability {entry['compute_capability']}, {entry['file']}"
            yield Table(
                columns=("kernel", "threads", "registers", "spilled bytes", "shared bytes"),
                rows=tuple(tuple(str(item) for item in kernel.values()) for kernel in entry["kernels"]),
            )


CUDA = CudaBackend(
    name=NAME,
    folder=FOLDER,
    device=GPU,
    packages=("cuda",),
    options=CudaOptions,
    compiler="export.compile_cuda",
    ahead_of_time=True,
)
