"""Exported graphs without a build: checkpoint → canonical and lowered files in a folder → sessions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from calibration.precisions.catalog import PRECISIONS
from calibration.recipe import make_recipe
from calibration.smoothing import SmoothingFactors
from calibration.weights import PreparedWeights
from engines import contract as names
from engines.contract import MAX_WIDTH, Contract, capacity_for, top_k_for
from engines.gpu.host_device import HostDevice, host_kernel
from engines.manifest import Manifest
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.onnxruntime.session_options import session_options
from engines.tensorrt.host_memory import host_plan
from engines.tensorrt.session import TensorRtSession
from export.builder import check_model
from export.passes import (
    LinearsToOnnxRuntime,
    LowerToNative,
    LowerToOnnxRuntime,
    LowerToTensorRt,
    StoredWeights,
    UnsignedActivations,
)
from export.verifier import build_verifier
from export.weight_file import WeightFile
from plugins.cpu import toolchain
from quasar.checkpoints import Checkpoint, DecoderSpec
from quasar.files import sha256_file


def contract_of(spec: DecoderSpec, max_length: int = 448, *, tree_mask: bool = False) -> Contract:
    return Contract(
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_size=spec.head_size,
        vocab_size=spec.vocab_size,
        max_length=max_length,
        capacity=capacity_for(max_length),
        max_width=16 if tree_mask else MAX_WIDTH,
        tree_mask=tree_mask,
        top_k=top_k_for(spec.vocab_size),
    )


def export_graphs(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    precision="fp32",
    factors: SmoothingFactors | None = None,
    max_length=448,
    tree_mask=False,
    static_scales: dict[str, float] | None = None,
) -> Contract:
    """Write canonical.onnx and lowered.onnx; returns their contract."""
    contract = contract_of(checkpoint.spec, max_length, tree_mask=tree_mask)
    recipe = make_recipe(checkpoint.spec, precision="w8a8" if precision in PRECISIONS else precision, alpha=0.5)
    if precision in PRECISIONS:
        # By its own name: some are brought by checkpoints alone, and cannot be asked for.
        recipe = replace(recipe, linears=dict.fromkeys(recipe.linears, precision))
    with WeightFile(folder / "weights.data") as weights:
        model = build_verifier(
            PreparedWeights(checkpoint, recipe, factors or SmoothingFactors(), static_scales=static_scales),
            weights,
            capacity=contract.capacity,
            top_k=contract.top_k,
            tree_mask=tree_mask,
            producer_version="test",
        )
    ir.save(model, folder / "canonical.onnx")
    check_model(folder / "canonical.onnx")
    with WeightFile(folder / "lowered.data") as weights:
        LinearsToOnnxRuntime(StoredWeights(weights))(model)
    assert LowerToOnnxRuntime(checkpoint.spec)(model).modified
    UnsignedActivations()(model)
    ir.save(model, folder / "lowered.onnx")
    return contract


def host_session(
    folder: Path, contract: Contract, *, device: HostDevice | None = None, graphs: bool = True
) -> TensorRtSession:
    """The TensorRT session on host memory, over canonical.onnx lowered for TensorRT in float32."""
    device = HostDevice() if device is None else device
    model = ir.load(folder / "canonical.onnx")
    LowerToTensorRt(contract, "float32")(model)
    ir.save(model, folder / "tensorrt.onnx")
    plan = host_plan(folder / "tensorrt.onnx", folder, contract, device, threads=1)
    kernel = host_kernel() if contract.tree_mask else None
    return TensorRtSession(plan, device, contract, graphs=graphs, kernel=kernel)


def lowered_session(folder: Path, contract: Contract, *, threads: int = 1, slots: int = 1) -> OnnxRuntimeSession:
    return OnnxRuntimeSession(
        folder, folder / "lowered.onnx", contract, threads=threads, exact_integers=True, slots=slots
    )


def exact_session(graph: Path) -> ort.InferenceSession:
    """A session of any graph whose integer matmuls saturate on no CPU.

    Linears in blocks run in float there, and ONNX Runtime 1.31 loads no graph that has them with its exact kernels.
    """
    in_blocks = any("block_size" in node.attributes for node in ir.load(graph).graph)
    options = session_options(threads=1, exact_integers=not in_blocks)
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def native_session(
    folder: Path,
    contract: Contract,
    spec: DecoderSpec,
    kv_dtype: str = "float32",
    *,
    threads: int = 1,
    slots: int = 1,
    max_positions: int | None = None,
    ragged: bool = True,
) -> OnnxRuntimeSession:
    """Canonical.onnx lowered to the native operators; not `ragged`: as earlier versions did it."""
    model = ir.load(folder / "canonical.onnx")
    with WeightFile(folder / "native.data", folder) as weights:
        LowerToNative(spec, StoredWeights(weights), kv_dtype)(model)
    UnsignedActivations()(model)
    if not ragged:
        _to_one_sequence(model)
    ir.save(model, folder / "native.onnx")
    return OnnxRuntimeSession(
        folder,
        folder / "native.onnx",
        contract,
        threads=threads,
        exact_integers=True,
        library=toolchain.LIBRARY,
        slots=slots,
        max_positions=max_positions,
    )


def _to_one_sequence(model: ir.Model) -> None:
    """Make a native graph one of those that earlier versions wrote: [1, T], and a cache of one sequence."""
    for node in model.graph:
        if node.op_type.startswith("VerifyAttention"):
            node.resize_inputs(10)
    for value in [*model.graph.inputs]:
        if value.name in (names.SEQUENCE_STARTS, names.CACHE_SLOTS):
            model.graph.inputs.remove(value)
        elif value.name == names.TREE_MASK:
            value.shape = ir.Shape(["batch", "tokens", "tokens"])


def run_canonical(folder: Path, contract: Contract, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V] of the canonical graph itself, in one pass over an empty cache."""
    session = exact_session(folder / "canonical.onnx")
    shape = (1, contract.num_kv_heads, contract.capacity, contract.head_size)
    feed = {
        names.INPUT_IDS: tokens[None],
        names.POSITION_IDS: np.arange(len(tokens))[None],
        names.CACHE_LENGTHS: np.zeros(1, np.int64),
        names.LOGITS_ROWS: np.arange(len(tokens)),
    }
    for layer in range(contract.num_layers):
        feed |= {name: np.zeros(shape, np.float32) for name in names.past_names(layer)}
    logits, next_tokens, top_tokens = session.run([names.LOGITS, names.NEXT_TOKENS, names.TOP_TOKENS], feed)
    np.testing.assert_array_equal(logits[0].argmax(axis=-1), next_tokens[0])
    np.testing.assert_array_equal(likeliest(logits[0], contract.top_k), top_tokens[0])
    return logits[0]


def likeliest(logits: np.ndarray, count: int) -> np.ndarray:
    """The ids of the `count` largest logits of each row, largest first, ties by lower id: int64 [rows, count]."""
    return np.argsort(-logits, axis=-1, kind="stable")[:, :count]


def run_in_chunks(session: OnnxRuntimeSession, tokens: np.ndarray, size: int) -> np.ndarray:
    """Logits of every row, the tokens fed `size` at a time."""
    parts = [
        session.run_logits(tokens[start : start + size], start, len(tokens[start : start + size]))
        for start in range(0, len(tokens), size)
    ]
    return np.concatenate(parts)


def drop_top_tokens(graph: Path) -> None:
    """Make a graph one of those that earlier versions wrote, which have no such output."""
    model = ir.load(graph)
    kept = [value for value in model.graph.outputs if value.name != names.TOP_TOKENS]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    ir.save(model, graph)


def as_built_earlier(engine: Path) -> None:
    """Make an engine directory one of those that earlier versions built: no `top_tokens`, no `contract.top_k`."""
    path = engine / "manifest.json"
    value = json.loads(path.read_text())
    for name in [name for name in value["files"] if name.endswith(".onnx")]:
        drop_top_tokens(engine / name)
        value["files"][name] = {"bytes": (engine / name).stat().st_size, "sha256": sha256_file(engine / name)}
    del value["contract"]["top_k"]
    value["hashes"]["engine"] = Manifest.from_json(value).engine_hash
    path.write_text(json.dumps(value))
