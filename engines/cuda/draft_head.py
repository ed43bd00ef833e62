"""A draft head on CUDA: a session of its own program, on the verifier's device and among its weights.

The verifier's pass makes one vector of its hidden states itself (`CudaSession.hidden_states`), so nothing is left to
fuse: they come to the host once, and go back as what the head's positions read.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engines.cache_rows import Float32
from engines.contract import Contract
from engines.cuda.program import TARGETS, Program
from engines.cuda.session import CudaSession
from engines.draft_head import DraftHeadFiles, HeadTargets
from engines.gpu.device import Device, LoadedKernel
from engines.session import Positions, SessionMemory

Int64 = NDArray[np.int64]


class CudaDraftHead:
    """Runs a head's program; what `run` returns are views of buffers that the next call overwrites."""

    def __init__(
        self,
        program: Program,
        weights: Path,
        kernels: Mapping[str, LoadedKernel],
        device: Device,
        files: DraftHeadFiles,
        verifier: CudaSession,
        *,
        graphs: bool = True,
    ) -> None:
        """Allocate buffers, and a cache of as many slots as the verifier's.

        Args:
            weights: the file that the verifier's tensors lie in, and the head's.
            kernels: those of `program.variants()` by name, loaded on the device.
            device: the verifier's.
            verifier: closed after the head.
            graphs: record each kind of step once, and replay it.

        Raises:
            EngineError: a kernel is missing, or the GPU has no room.
        """
        self.hidden_size = files.hidden_size
        self.contract: Contract = files.contract(verifier.contract)
        self.num_slots = verifier.num_slots
        self._session = CudaSession(
            program,
            weights,
            kernels,
            device,
            self.contract,
            slots=self.num_slots,
            graphs=graphs,
            weights_of=verifier,
        )
        self.max_sequences, self.max_positions = self._session.max_sequences, self._session.max_positions
        self._targets: Int64 | None = None
        if (place := program.tensors.get(TARGETS)) is not None:
            self._targets = np.fromfile(weights, np.int64, place.bytes // 8, offset=place.offset)

    def fuse(self, features: Sequence[Float32]) -> Float32:
        """What the verifier's pass has made of them, float32 [R, H]: a new array."""
        (fused,) = features
        return fused.copy()

    def run(self, batch: Sequence[Positions], hidden_states: Float32) -> HeadTargets:
        """Feed positions of several sequences with the hidden states float32 [R, H] that they read.

        A row whose logits are not numbers has log-probabilities NaN, of some tokens.

        Raises:
            GenerationError: the batch does not fit.
        """
        self._session.run_received(batch, [hidden_states])
        places = self._session.top_tokens
        assert places is not None
        places = np.maximum(places, 0)
        (following,) = self._session.told(selected=True)
        return HeadTargets(
            tokens=places if self._targets is None else self._targets[places],
            log_probabilities=self._session.likelihoods,
            hidden_states=following,
        )

    def copy_rows(self, source: int, target: int, first: int, end: int) -> None:
        """As `DraftHeadSession`."""
        self._session.write_rows(first, self._session.read_rows(first, end, slot=source), slot=target)

    def memory(self) -> SessionMemory:
        """What it takes beside the verifier, which counts the weights of both."""
        return self._session.memory()

    def close(self) -> None:
        """Free the recorded steps, unless the verifier has been closed and they with it; memory is the verifier's."""
        self._session.close()
