"""Where the graphs of one engine lie that run with some kernels, and sessions over them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.cache_rows import HostCacheArrays
from engines.contract import Contract
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.session import OnnxRuntimeSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Graphs:
    """The graphs; `directory` holds their external data, `library` the operators that they need.

    `draft`: the one in which the engine drafts for itself, where there is one.
    """

    directory: Path
    graph: Path
    probe: Path
    probe_layers: int
    integer_check: Path
    library: Path | None = None
    draft: Path | None = None

    @classmethod
    def of(cls, directory: Path, files: OnnxRuntimeFiles, kernels: Kernels) -> "Graphs":
        """The graphs of an engine directory that run with these kernels."""
        native = kernels.library is not None
        return cls(
            directory=directory,
            graph=directory / (files.native_graph if native else files.graph),
            probe=directory / (files.native_probe if native else files.probe),
            probe_layers=files.probe_layers,
            integer_check=directory / files.integer_check,
            library=kernels.library,
            draft=directory / files.native_draft if native and files.native_draft else None,
        )

    def open(
        self,
        contract: Contract,
        *,
        threads: int = 0,
        exact_integers: bool = False,
        caches: HostCacheArrays | None = None,
        slots: int = 1,
        max_positions: int | None = None,
        hidden_states: Sequence[int] = (),
        drafts: bool = False,
    ) -> OnnxRuntimeSession:
        """A session over the whole graph, or with `drafts` over the one that drafts for it.

        What is not described here is as `OnnxRuntimeSession` takes it.
        """
        return OnnxRuntimeSession(
            self.directory,
            self.draft if drafts and self.draft is not None else self.graph,
            contract,
            threads=threads,
            exact_integers=exact_integers,
            library=self.library,
            caches=caches,
            slots=slots,
            max_positions=max_positions,
            hidden_states=hidden_states,
        )

    def open_probe(
        self, contract: Contract, *, threads: int = 0, exact_integers: bool = False, slots: int = 1
    ) -> OnnxRuntimeSession:
        """A session over the cut-down graph, which has few of the layers and no head."""
        return OnnxRuntimeSession(
            self.directory,
            self.probe,
            contract,
            num_layers=self.probe_layers,
            threads=threads,
            exact_integers=exact_integers,
            library=self.library,
            slots=slots,
        )
