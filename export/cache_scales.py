"""The scales of an INT8 KV cache: measured on the engine's own keys and values over calibration text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from calibration.texts import TokenizedText
from engines.contract import Contract
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.graphs import Graphs
from export.build_options import Reporter
from export.passes.caches_to_int8 import CacheForm, CachesToInt8
from quasar.checkpoints.rope import inverse_frequencies
from quasar.checkpoints.spec import LayerSpec, Rope
from quasar.files import sha256_json
from quasar.numerics import QMAX, Float32

# Of the largest value that a channel had: text that comes later has larger ones.
_ROOM = 1.1

Scales = list[tuple[Float32, Float32]]


def measure_cache_scales(
    graphs: Graphs,
    contract: Contract,
    layers: Sequence[LayerSpec],
    texts: Sequence[TokenizedText],
    reporter: Reporter,
) -> Scales:
    """Of every layer's keys and values, float32 [G, D] each: a scale for each channel of a head.

    Keys are cached as they are rotated, and texts are shorter than what an engine reads: scales hold for wherever
    a key may stand (`largest_anywhere`).

    Args:
        graphs: native ones, with caches in float32.
        layers: of the graph.
    """
    ropes = [layer.attention.rope for layer in layers]
    session = graphs.open(contract)
    largest = [np.zeros((2, *pair[0].shape[1::2]), np.float32) for pair in session.caches]
    with reporter.steps("keys and values", len(texts)) as step:
        for text in texts:
            tokens = np.array(text.tokens, np.int64)
            for chunk in contract.prompt_chunks(len(tokens)):
                session.run(tokens[chunk], chunk.start, 1)
            for pair, found, rope in zip(session.caches, largest, ropes, strict=True):
                keys, values = (np.abs(cache[0, :, : len(tokens)]) for cache in pair)
                if rope is not None:
                    keys = largest_anywhere(keys, rope, contract.max_length)
                for number, rows in enumerate((keys, values)):
                    np.maximum(found[number], rows.max(axis=1), out=found[number])
            step(1)
    session.close()
    scales = [np.where(found > 0, found * np.float32(_ROOM / QMAX), np.float32(1)) for found in largest]
    return [(keys, values) for keys, values in scales]


def largest_anywhere(keys: Float32, rope: Rope, max_length: int) -> Float32:
    """What the channels of rotated keys may be, at most, at any position of a context.

    Two channels that rotate into each other have one radius, which no position changes: one of them grows by what a
    turn through the whole context brings of the other. Where pairs turn slowly that is little.

    Args:
        keys: magnitudes, float32 [G, n, D], where they stood.
    """
    turns = inverse_frequencies(rope, keys.shape[-1]) * np.float32(max_length)
    share = np.sin(np.minimum(turns, np.float32(np.pi / 2)))
    half = len(share)
    one, other = keys[..., :half], keys[..., half : 2 * half]
    radius, found = np.hypot(one, other), keys.copy()
    found[..., :half] = np.minimum(radius, one + share * other)
    found[..., half : 2 * half] = np.minimum(radius, other + share * one)
    return found


def write_int8_caches(directory: Path, files: OnnxRuntimeFiles, scales: Scales, *, tiers: bool) -> None:
    """Give the native graphs of an engine directory INT8 caches of these scales.

    `tiers`: in two, of which the graph that drafts reads the upper one.
    """
    for name in files.native_graphs:
        form: CacheForm = "flat"
        if tiers:
            form = "upper tier" if name == files.native_draft else "both tiers"
        model = ir.load(directory / name)
        CachesToInt8(scales, form)(model)
        ir.save(model, directory / name)


def scales_hash(scales: Scales) -> str:
    """What engines that share a cache must have in common."""
    return sha256_json([[part.tobytes().hex() for part in pair] for pair in scales])
