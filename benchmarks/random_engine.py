"""Stock against native kernels on a W8A8 verifier of random weights, for shapes whose checkpoints are not at hand.

    python benchmarks/random_engine.py qwen3-1.7b --rows 256 --widths 1 8

Prints medians, ratios, the bytes that a pass reads per second, and what the machine's memory delivers.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from shapes import SHAPES

from calibration.recipe import Recipe, make_recipe
from calibration.smoothing import SmoothingFactors
from calibration.weights import PreparedWeights
from engines.contract import Contract, capacity_for, top_k_for
from engines.latency import measure_interleaved
from engines.machine import usable_cores
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.onnxruntime.threads import share_threads
from evaluation.pass_latency import memory_bandwidth
from export.lowering import lower_for_onnxruntime
from export.verifier import build_verifier
from export.weight_file import WeightFile
from plugins.cpu.library import find_library
from quasar.checkpoints import DecoderSpec
from quasar.checkpoints.checkpoint_text import CheckpointText
from quasar.checkpoints.prequantized.weight import PrequantizedWeight

FILES = OnnxRuntimeFiles(
    graph="onnxruntime/verifier.onnx",
    probe="onnxruntime/probe.onnx",
    probe_layers=1,
    integer_check="onnxruntime/integer_check.onnx",
    native_graph="onnxruntime/native.onnx",
    native_probe="onnxruntime/native_probe.onnx",
    native_weights="onnxruntime/native.onnx.data",
)


class RandomWeights:
    """A checkpoint without files: the same random block, repeated, serves every tensor of a size."""

    def __init__(self, spec: DecoderSpec) -> None:
        self.spec = spec
        self.location = Path()
        self.files: tuple[Path, ...] = ()
        self.quantized_by = ""
        self._shapes = spec.tensors()
        self._block = np.random.default_rng(0).standard_normal(1 << 20, np.float32)

    def read(self, name: str) -> NDArray[Any]:
        """Normal values of standard deviation K^-0.5; norms are ones."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float32)
        tensor: NDArray[Any] = (np.resize(self._block, shape) * shape[1] ** -0.5).astype(np.float32)
        return tensor.astype(ml_dtypes.bfloat16) if name == "embed_tokens.weight" else tensor

    def prequantized(self, name: str) -> PrequantizedWeight | None:  # noqa: ARG002 - all are floats
        """There is none."""
        return None

    def transformers_config(self) -> Any:
        """There is none."""
        raise NotImplementedError

    def text(self) -> CheckpointText:
        """There is none."""
        raise NotImplementedError


def main() -> None:
    """Build the graphs in a temporary folder, time them, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--rows", nargs="+", type=int, default=[256], help="cached positions")
    parser.add_argument("--widths", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the graphs go for a while; about 5 bytes per parameter")
    options = parser.parse_args()

    spec = SHAPES[options.shape]
    contract = contract_of(spec, max(options.rows) + 64)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_graphs(spec, contract, folder)
        share_threads()
        sessions = [
            OnnxRuntimeSession(folder, folder / FILES.graph, contract),
            OnnxRuntimeSession(folder, folder / FILES.native_graph, contract, library=find_library().path),
        ]
        stock, native = measure_interleaved(
            sessions, lengths=options.rows, widths=options.widths, repeats=options.repeats
        )
        weights = (folder / FILES.native_weights).stat().st_size
        bandwidth = memory_bandwidth(usable_cores())
    print(f"{options.shape}: {weights / 1e6:.0f} MB of packed weights; memory reads {bandwidth:.1f} GB/s")
    for length in options.rows:
        size = weights + length * (contract.cache_bytes // contract.capacity)
        for width in options.widths:
            ours, theirs = native[length][width], stock[length][width]
            print(
                f"{length} cached, t({width}): stock {theirs:.1f} ms, native {ours:.1f} ms, ratio {theirs / ours:.2f}; "
                f"native reads {size / ours / 1e6:.1f} GB/s"
            )


def contract_of(spec: DecoderSpec, length: int) -> Contract:
    """The contract of an engine of that shape that holds `length` tokens."""
    return Contract(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        vocab_size=spec.vocab_size,
        max_length=length,
        capacity=capacity_for(length),
        top_k=top_k_for(spec.vocab_size),
    )


def recipe_of(spec: DecoderSpec) -> Recipe:
    """The precision of such an engine's linears."""
    return make_recipe(spec, precision="w8a8", alpha=0.5)


def write_graphs(spec: DecoderSpec, contract: Contract, folder: Path) -> None:
    """Canonical and lowered graphs of random weights."""
    import onnx_ir as ir

    recipe = recipe_of(spec)
    prepared = PreparedWeights(RandomWeights(spec), recipe, SmoothingFactors())
    with WeightFile(folder / "verifier.onnx.data") as weights:
        model = build_verifier(
            prepared, weights, capacity=contract.capacity, top_k=contract.top_k, producer_version="benchmark"
        )
    ir.save(model, folder / "verifier.onnx")
    lower_for_onnxruntime(folder, "verifier.onnx", FILES, spec, contract.kv_dtype)


if __name__ == "__main__":
    main()
