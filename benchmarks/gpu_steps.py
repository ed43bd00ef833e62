"""The steps of benchmarks/gpu.py, each a function from its options to figures; each runs in a process of its own."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from gpu_device import Arrays, Runner
from gpu_draft_head import fed, open_head, step_of, write_random_head
from numpy.typing import NDArray
from random_engine import FILES, contract_of, recipe_of, write_graphs
from random_program import write_random_program
from shapes import SHAPES

from engines.contract import Contract
from engines.cuda.launches import splits_of
from engines.cuda.session import CudaSession
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from engines.onnxruntime.session import OnnxRuntimeSession
from engines.probes.batch_invariance import batches_are_exact
from export.cuda_program import write_program
from plugins.gpu.packing import (
    TILE_INPUTS,
    TILE_OUTPUTS,
    pack_block_scales,
    pack_blocks,
    pack_channels,
    pack_nibbles,
    pack_weight,
    tiles_of,
)
from plugins.gpu.variants import (
    BLOCKS,
    FORMS,
    GATES,
    HEAD_TILE_TOKENS,
    MERGED,
    NIBBLES,
    PER_TOKEN,
    TILE_TOKENS,
    AttendCache,
    AttendPath,
    BlockLinear,
    KernelForm,
    LmHead,
    MergeLikeliest,
    NormQuantize,
    RotateAppend,
    W8A8Linear,
    num_splits,
    tile_tokens,
)
from plugins.verify_attention import verify_attention
from plugins.w8a8_linear import quantize_rows, rms_norm, w4a16_block_linear, w8a8_block_linear, w8a8_linear
from quasar.errors import QuasarError
from quasar.numerics import BLOCK, quantize_weight

WIDTHS = (1, 2, 4, 8, 16, 32)
CACHED_LENGTHS = (256, 2048, 8192)
# Sequences that share passes.
_SLOTS = 4
_EPSILON = 1e-6
_NATIVE = "native kernels, float16 cache"
# Form of linears and type of the cache of what is measured beside "int8".
_LOW_BIT = {
    "int8": (PER_TOKEN, "float16"),
    "int8 cache": (PER_TOKEN, "int8"),
    "w8a8-block": (BLOCKS, "float16"),
    "w4a8": (NIBBLES, "float16"),
    "w4a16": ("nibbles_planes", "float16"),
}
# What stands for a model in a rehearsal.
_TINY = {"smollm2": "tiny-llama", "qwen3-1.7b": "tiny-qwen3"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a step is given. `rehearse`: tiny shapes, without a GPU. `seconds`: when to stop measuring more."""

    rehearse: bool
    seconds: float
    folder: Path

    @property
    def runner(self) -> Runner:
        """A new one."""
        return Runner(rehearse=self.rehearse)


def environment(options: Options) -> dict[str, Any]:
    """GPU, driver and versions; what a copy within its memory reaches in GB/s, read and written bytes counted."""
    import importlib.metadata as metadata
    import platform

    versions = {}
    for name in ("cuda-bindings", "triton", "torch", "numpy", "onnxruntime"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    figures: dict[str, Any] = {"python": platform.python_version(), "versions": versions}
    if options.rehearse:
        return {**figures, "gpu": "none: a rehearsal"}
    from engines.gpu.driver import find_gpu

    gpu = find_gpu()
    if gpu.found is None:
        raise QuasarError(gpu.reason)
    figures |= {
        "gpu": gpu.found.name,
        "compute_capability": gpu.found.compute_capability,
        "cuda": gpu.found.driver,
    }
    try:
        import torch
    except ImportError:
        return figures
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    times = [_seconds_on_gpu(lambda: target.copy_(source)) for _ in range(5)]
    return {**figures, "copy_gb_s": round(2 * source.numel() / statistics.median(times) / 1e9, 1)}


def kernels(options: Options) -> dict[str, Any]:
    """Every kernel alone, on random data, against its reference in numpy."""
    arrays, random = Arrays(options.runner), np.random.default_rng(0)
    sizes = ((1, 4096, 4096), (7, 6144, 4096), (40, 1024, 12288))
    if options.rehearse:
        sizes = ((1, 130, 200), (5, 192, 300), (18, 66, 128))
    figures: dict[str, Any] = {}
    try:
        for tokens, outputs, inputs in sizes:
            figures[f"quantize {tokens}x{inputs}"] = _check_quantize(arrays, random, tokens, inputs)
            for gate in GATES:
                name = f"linear {tokens}x{outputs}x{inputs} {gate or 'residual'}"
                figures[name] = _check_linear(arrays, random, tokens, outputs, inputs, gate=gate)
            # The references of forms in blocks take long.
            few = (tokens, min(outputs, 512), min(inputs, 1024))
            for form in FORMS.values():
                if form.in_blocks:
                    name = f"linear in {form.name} {'x'.join(map(str, few))}"
                    figures[name] = _check_block_linear(arrays, random, form, *few)
        vocabulary, hidden = (200, 130) if options.rehearse else (151936, 1024)
        figures[f"lm_head {vocabulary}"] = _check_head(arrays, random, 5, vocabulary, hidden)
        shapes = ((2, 1, 32, 290, 3),) if options.rehearse else ((32, 8, 128, 2000, 17), (9, 3, 64, 700, 8))
        for shape in shapes:
            for cache_type in ("float16", "int8"):
                name = f"attention {shape[0]}/{shape[1]} heads of {shape[2]}, cache in {cache_type}"
                figures[name] = _check_attention(arrays, random, *shape, cache_type)
    finally:
        arrays.close()
    wrong = [name for name, one in figures.items() if not one["ok"]]
    return {"checks": figures, "wrong": wrong, "ok": not wrong}


def model(name: str, options: Options) -> dict[str, Any]:
    """A whole model of random weights: exactness, and fidelity against the CPU engine.

    Exactness: bits of logits at every width, of chains, trees, prompts and sequences that share passes, and greedy
    decoding with drafts. Fidelity:
    KL and top-1 against the CPU engine of the same weights, whose cache has the same type.
    """
    length, last = (24, 8) if options.rehearse else (192, 32)
    with _model(_TINY.get(name, name) if options.rehearse else name, options) as (session, contract, folder):
        exact = _exactness_of(session, contract, options)
        reference, title = _cpu_session(folder, contract)
        tokens = np.random.default_rng(1).integers(0, contract.vocab_size, length)
        # The prompt, then its end as a verify pass.
        for one in (session, reference):
            one.run(tokens[: length - last], 0, 1)
        fed = tokens[length - last :]
        ours, theirs = (one.run_logits(fed, length - last, last) for one in (session, reference))
        divergence = _divergence(theirs, ours)
    # Both engines round the same integers but where a float lies within its last bits of a tie: far below the KL of
    # quantization, which is about 0.01. Stock kernels have another cache, whose rounding costs about as much as that.
    ok = all(exact.values()) and divergence["kl"] < (1e-3 if title == _NATIVE else 0.03)
    return {"exactness": exact, "fidelity": {"reference": title, **divergence}, "ok": ok}


def latency(name: str, options: Options) -> dict[str, Any]:
    """Milliseconds of a verify pass by cached length and width, beside BF16 and FP8 in torch, interleaved; memory."""
    shape = "tiny-qwen3" if options.rehearse else name
    lengths = (16, 300) if options.rehearse else CACHED_LENGTHS
    widths = (1, 2) if options.rehearse else WIDTHS
    spec = SHAPES[shape]
    contract = replace(contract_of(spec, max(lengths) + 64), kv_dtype="float16")
    weights = options.folder / "weights.bin"
    start = time.perf_counter()
    program = write_random_program(spec, contract, weights)
    written = time.perf_counter() - start
    runner = options.runner
    start = time.perf_counter()
    session = runner.session(program, weights, contract)
    loaded = time.perf_counter() - start - runner.compile_seconds
    overlapping = runner.session(program, weights, contract, overlap=True)
    weights.unlink()
    figures: dict[str, Any] = {
        "shape": shape,
        "seconds": {
            "write weights": round(written, 1),
            "compile kernels": round(runner.compile_seconds, 1),
            "load": round(loaded, 1),
        },
        "memory_bytes": {
            "weights": session.memory().weights,
            "cache": session.memory().cache,
            "buffers": session.memory().buffers,
        },
        "ms": {},
    }
    others, skipped = _baselines(spec, contract, rehearse=options.rehearse)
    figures |= {"skipped": skipped, "ok": True}
    end = time.perf_counter() + options.seconds
    for cached in lengths:
        for width in widths:
            if time.perf_counter() > end:
                figures["stopped"] = f"before {cached} cached, width {width}: the time was up"
                return figures
            plain, other = (one.run(np.arange(width), cached, width).copy() for one in (session, overlapping))
            if not np.array_equal(plain, other):
                figures |= {"ok": False, "error": f"overlapping kernels gave other tokens at width {width}"}
            passes = {"int8": _pass_of(session, width, cached)}
            passes["int8 overlapping"] = _pass_of(overlapping, width, cached)
            passes |= {title: one.pass_of(width, cached) for title, one in others.items()}
            for title, ms in _interleaved(passes, rehearse=options.rehearse).items():
                figures["ms"].setdefault(title, {}).setdefault(str(cached), {})[str(width)] = ms
    return figures


def low_bit(name: str, options: Options) -> dict[str, Any]:
    """Milliseconds of a verify pass by cached length and width: weights of 4 bits, and an INT8 cache.

    Each is beside W8A8 with a float16 cache, interleaved with it, so that memory holds two models; "over_int8" is the
    ratio. Of floats times integers of 4 bits the bits of chains of all widths are compared as well.
    """
    end = time.perf_counter() + options.seconds
    shape = "tiny-qwen3" if options.rehearse else name
    lengths = (300,) if options.rehearse else CACHED_LENGTHS
    widths = (1, 2) if options.rehearse else (1, 8, 32)
    spec, runner, weights = SHAPES[shape], options.runner, options.folder / "weights.bin"
    contract = replace(contract_of(spec, max(lengths) + 64), kv_dtype="float16")
    figures: dict[str, Any] = {"shape": shape, "ms": {}, "over_int8": {}, "memory_bytes": {}, "skipped": {}, "ok": True}

    def opened(title: str) -> CudaSession:
        form, cache_type = _LOW_BIT[title]
        session = runner.session(write_random_program(spec, contract, weights, cache_type, form), weights, contract)
        taken = session.memory()
        figures["memory_bytes"][title] = {"weights": taken.weights, "cache": taken.cache}
        weights.unlink()
        return session

    with opened("int8") as base:
        for title in _LOW_BIT:
            if title == "int8":
                continue
            if time.perf_counter() > end:
                figures["skipped"][title] = "the time was up"
                continue
            try:
                other = opened(title)
            except QuasarError as error:
                figures["skipped"][title] = str(error)
                continue
            with other:
                for cached, width in product(lengths, widths):
                    passes = {"int8": _pass_of(base, width, cached), title: _pass_of(other, width, cached)}
                    ms = _interleaved(passes, rehearse=options.rehearse)
                    for one, took in ms.items():
                        figures["ms"].setdefault(one, {}).setdefault(str(cached), {})[str(width)] = took
                    ratio = round(ms[title] / ms["int8"], 3)
                    figures["over_int8"].setdefault(title, {}).setdefault(str(cached), {})[str(width)] = ratio
                figures["ok"] &= _chains_are_exact(other, widths[-1])
    return figures


def draft_head(name: str, options: Options) -> dict[str, Any]:
    """Milliseconds of a draft head's steps beside the verifier's passes; its log-probabilities against the CPU's head.

    "verifier with the head" tells what the head reads, which plain passes do not.
    """
    spec = SHAPES[_TINY.get(name, name) if options.rehearse else name]
    contract = replace(contract_of(spec, 400 if options.rehearse else 1024), kv_dtype="float16")
    lengths, cached = ((9, 3), 16) if options.rehearse else ((300, 7), 256)
    path = options.folder
    write_graphs(spec, contract, path)
    files = write_random_head(spec, contract, path)
    weights = path / "weights.bin"
    graphs = (FILES.native_graph, "verifier.onnx")
    program = write_program(path, graphs, contract, recipe_of(spec).linears, weights, "float16")
    runner = options.runner
    with runner.session(program, weights, contract) as plain:
        verifier, head = open_head(runner, program, weights, contract, files, path)
        with verifier:
            ours = fed(head, lengths)
            passes = {
                **{f"verifier, width {width}": _pass_of(plain, width, cached) for width in (1, 8)},
                **{f"verifier with the head, width {width}": _pass_of(verifier, width, cached) for width in (1, 8)},
                **{f"step of {count}": step_of(head, count, cached) for count in (1, 4)},
            }
            ms = _interleaved(passes, rehearse=options.rehearse)
            same = np.array_equal(plain.run(np.arange(8), cached, 8), verifier.run(np.arange(8), cached, 8))
            own = weights.stat().st_size - plain.memory().weights
            taken = {"weights": own, "cache": head.memory().cache, "buffers": head.memory().buffers}
    figures = {"ms of passes": ms, "step over t(1)": ms["step of 1"] / ms["verifier, width 1"], "memory_bytes": taken}
    from plugins.cpu.library import open_library

    reference = OnnxRuntimeDraftHead(path, files, contract, library=open_library().path)
    error = float(np.abs(ours - fed(reference, lengths)).mean())
    # Keys and values are rounded to float16, and a value near a tie of INT8 moves by a step then.
    ok = same and error < 0.05
    return {**figures, "mean error of log-probabilities": error, "same tokens as without": bool(same), "ok": ok}


def _chains_are_exact(session: CudaSession, width: int) -> bool:
    """Whether positions that are fed together have the bits of those that are fed one by one."""
    tokens = np.random.default_rng(4).integers(0, session.contract.vocab_size, width)
    chain = session.run_logits(tokens, 8, width)
    one_by_one = [session.run_logits(tokens[i : i + 1], 8 + i, 1) for i in range(width)]
    return np.array_equal(chain, np.concatenate(one_by_one))


def _check_quantize(arrays: Arrays, random: np.random.Generator, tokens: int, columns: int) -> dict[str, Any]:
    x = random.standard_normal((tokens, columns)).astype(np.float32)
    weight = random.uniform(0.5, 1.5, columns).astype(np.float32)
    q, a = _quantized(arrays, x)
    expected_q, expected_a = quantize_rows(x)
    exact = bool((q[:, :columns] == expected_q).all() and (a == expected_a).all())
    q, a = _quantized(arrays, x, weight)
    expected_q, expected_a = quantize_rows(rms_norm(x, weight, _EPSILON))
    # The norm sums in float32: an integer near a tie may go to the other side.
    off = np.abs(q[:, :columns].astype(np.int32) - expected_q)
    near = bool(off.max() <= 1 and (off > 0).mean() < 0.01 and np.allclose(a, expected_a, rtol=1e-5))
    return {"ok": exact and near, "exact": exact, "norm_within_one_step": near}


def _quantized(
    arrays: Arrays, x: NDArray[np.float32], weight: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    tokens, columns = x.shape
    stride = tiles_of(columns, TILE_INPUTS) * TILE_INPUTS
    q, a = arrays.put(np.full((tokens, stride), 99, np.int8)), arrays.put(np.full(tokens, -1, np.float32))
    norm = 0 if weight is None else arrays.put(weight)
    arguments = (arrays.put(x), norm, q, a, columns, stride, _EPSILON)
    arrays.run(NormQuantize.of(columns, norm=weight is not None), (tokens,), arguments)
    return arrays.get(q, (tokens, stride), np.int8), arrays.get(a, (tokens,), np.float32)


def _check_linear(
    arrays: Arrays, random: np.random.Generator, tokens: int, outputs: int, inputs: int, *, gate: str
) -> dict[str, Any]:
    x = random.standard_normal((tokens, inputs)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((outputs, inputs)).astype(np.float32) * inputs**-0.5)
    gated = bool(gate)
    finished = outputs // 2 if gated else outputs
    residual = None if gated else random.standard_normal((tokens, finished)).astype(np.float32)
    expected = w8a8_linear(x, weight.values, weight.scale, residual=residual, gate=GATES.index(gate))
    q, a = (arrays.put(one) for one in _quantized(arrays, x))
    packed, scale = (
        arrays.put(one) for one in (pack_weight(weight.values, gated=gated), pack_channels(weight.scale, gated=gated))
    )
    at_residual = 0 if residual is None else arrays.put(residual)
    input_tiles, output_tiles, parts = tiles_of(inputs, TILE_INPUTS), tiles_of(finished, TILE_OUTPUTS), 1 + gated
    worst, same, first = 0.0, True, None
    for tile in TILE_TOKENS:
        variant = W8A8Linear(tokens=tile, bias=False, residual=not gated, gate=gate)
        token_tiles = tiles_of(tokens, tile)
        sums = arrays.put(np.zeros(token_tiles * output_tiles * parts * TILE_OUTPUTS * tile, np.int32))
        arrived = arrays.put(np.zeros(token_tiles * output_tiles, np.int32))
        # Twice with splits: what the first leaves in the sums would show in the second.
        for splits in (1, *[splits_of(output_tiles * token_tiles, input_tiles, 132)] * 2):
            y = arrays.put(np.full((tokens, finished), np.nan, np.float32))
            numbers = (tokens, finished, input_tiles, tiles_of(input_tiles, splits), splits)
            pointers = (q, a, packed, scale, 0, at_residual, y, sums, arrived)
            arrays.run(variant, (token_tiles, output_tiles, splits), (*pointers, *numbers))
            found = arrays.get(y, (tokens, finished), np.float32)
            first = found if first is None else first
            same = same and np.array_equal(found, first)
            worst = max(worst, float(np.abs(found - expected).max()))
    # e^x of a GPU is within two units in the last place; everything else is exact.
    return {"ok": same and worst <= (1e-5 if gated else 0.0), "same_bits": same, "largest_error": worst}


def _check_block_linear(
    arrays: Arrays, random: np.random.Generator, form: KernelForm, tokens: int, outputs: int, inputs: int
) -> dict[str, Any]:
    """With a gate: the bits of every tile and split, and what the reference says to within float32's rounding."""
    inputs -= inputs % BLOCK
    blocks, most = inputs // BLOCK, 7 if form.nibbles else 127
    x = random.standard_normal((tokens, inputs)).astype(np.float32)
    values = random.integers(-most, most + 1, (outputs, inputs)).astype(np.int8)
    kind = np.float16 if form.nibbles else np.float32
    scale = (random.uniform(0.5, 1, (outputs, blocks)) / most / inputs**0.5).astype(kind)
    offset = (scale * -most).astype(kind) if form.offsets else None
    stored = values + np.int8(most) if form.offsets else values
    reference = w4a16_block_linear if form.planes else w8a8_block_linear
    of_blocks = None if offset is None else offset.astype(np.float32)
    expected = reference(x, stored, scale.astype(np.float32), offset=of_blocks, gate=GATES.index("silu"))
    tiles, scales = tiles_of(outputs // 2, TILE_OUTPUTS), pack_block_scales(scale, gated=True)
    if offset is not None:
        scales = np.stack([scales, pack_block_scales(offset, gated=True)], axis=2)
    # Nibbles are packed plus 8.
    packed = pack_blocks(values, gated=True)
    if form.nibbles:
        packed = pack_nibbles(stored - np.int8(8) if form.offsets else values, gated=True)
    stride = tiles_of(inputs, TILE_INPUTS) * TILE_INPUTS
    q = arrays.put(np.zeros(tokens * stride * form.input_bytes, np.int8))
    a = arrays.put(np.zeros(tokens * stride // BLOCK, np.float32))
    arguments = (arrays.put(x), 0, q, a, inputs, stride, _EPSILON)
    arrays.run(NormQuantize.of(inputs, norm=False, form=form.name), (tokens,), arguments)
    weights = (arrays.put(packed), arrays.put(scales))
    input_tiles = stride // TILE_INPUTS
    parts = splits_of(tiles, input_tiles, 132)
    first, same, worst = None, True, 0.0
    for tile in form.tile_tokens:
        variant = BlockLinear(form=form.name, tokens=tile, bias=False, residual=False, gate="silu")
        token_tiles = tiles_of(tokens, tile)
        partials = arrays.put(np.full(token_tiles * tiles * parts * 2 * TILE_OUTPUTS * tile, np.nan, np.float32))
        arrived = arrays.put(np.zeros(token_tiles * tiles, np.int32))
        for splits in (1, parts, parts):
            y = arrays.put(np.full((tokens, outputs // 2), np.nan, np.float32))
            numbers = (tokens, outputs // 2, input_tiles, tiles_of(input_tiles, parts), parts, splits)
            arrays.run(variant, (token_tiles, tiles, splits), (q, a, *weights, 0, 0, y, partials, arrived, *numbers))
            found = arrays.get(y, (tokens, outputs // 2), np.float32)
            first = found if first is None else first
            same = same and np.array_equal(found, first)
            worst = max(worst, float(np.abs(found - expected).max()))
        # A token alone, in the first column of its tile.
        alone = arrays.put(np.full((1, outputs // 2), np.nan, np.float32))
        numbers = (1, outputs // 2, input_tiles, tiles_of(input_tiles, parts), parts, parts)
        at_last = (q + (tokens - 1) * stride * form.input_bytes, a + 4 * (tokens - 1) * (stride // BLOCK))
        arrays.run(variant, (1, tiles, parts), (*at_last, *weights, 0, 0, alone, partials, arrived, *numbers))
        same = same and np.array_equal(arrays.get(alone, (1, outputs // 2), np.float32)[0], found[-1])
    # Sums of about 1: parts are added in another order, and products rounded before they are added.
    return {"ok": same and worst <= 1e-5, "same_bits": same, "largest_error": worst}


def _check_head(
    arrays: Arrays, random: np.random.Generator, tokens: int, vocabulary: int, inputs: int
) -> dict[str, Any]:
    x = random.standard_normal((tokens, inputs)).astype(np.float32)
    weight = quantize_weight(random.standard_normal((vocabulary, inputs)).astype(np.float32) * inputs**-0.5)
    weight.values[7] = weight.values[vocabulary - 1]
    weight.scale[7] = weight.scale[vocabulary - 1]
    expected = w8a8_linear(x, weight.values, weight.scale)
    q, a = (arrays.put(one) for one in _quantized(arrays, x))
    packed, scale = arrays.put(pack_weight(weight.values)), arrays.put(pack_channels(weight.scale))
    tiles, k = tiles_of(vocabulary, TILE_OUTPUTS), 8
    ok = True
    for tile in HEAD_TILE_TOKENS:
        logits = arrays.put(np.full((tokens, vocabulary), np.nan, np.float32))
        keys, merged = (arrays.put(np.zeros((tokens, tiles, k), np.int64)) for _ in range(2))
        ends = [arrays.put(np.zeros((tokens, count), np.int64)) for count in (1, k)]
        arguments = (q, a, packed, scale, 0, logits, keys, tokens, vocabulary, tiles_of(inputs, TILE_INPUTS), 1, 0.0)
        arrays.run(
            LmHead(tokens=tile, likeliest=k, bias=False, softcap=False), (tiles_of(tokens, tile), tiles), arguments
        )
        parts = tiles_of(tiles * k, MERGED)
        first, last = (MergeLikeliest(likeliest=k, final=final) for final in (False, True))
        arrays.run(first, (tokens, parts), (keys, merged, *ends, tiles * k, k))
        arrays.run(last, (tokens, 1), (merged, keys, *ends, parts * k, k))
        found = arrays.get(logits, (tokens, vocabulary), np.float32)
        likeliest = np.argsort(-expected, axis=1, kind="stable")[:, :k]
        ok = ok and np.array_equal(found, expected)
        ok = ok and np.array_equal(arrays.get(ends[1], (tokens, k), np.int64), likeliest)
    return {"ok": ok}


def _check_attention(
    arrays: Arrays,
    random: np.random.Generator,
    heads: int,
    kv_heads: int,
    size: int,
    cached: int,
    tokens: int,
    cache_type: str,
) -> dict[str, Any]:
    capacity, reach = cached + 64, 32
    angles = random.uniform(0, 6, (capacity, size // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    caches = [random.standard_normal((kv_heads, capacity, size)) for _ in range(2)]
    scales = [(np.exp2(random.uniform(0, 3, (kv_heads, size))) / 127).astype(np.float32) for _ in range(2)]
    if cache_type == "int8":
        caches = [(32 * cache).round().clip(-127, 127).astype(np.int8) for cache in caches]
    else:
        caches, scales = [cache.astype(np.float16) for cache in caches], []
    qkv = random.standard_normal((tokens, (heads + 2 * kv_heads) * size)).astype(np.float32)
    keys, values = (cache.astype(np.float32) for cache in caches)
    expected = verify_attention(
        *(qkv, keys, values, cached, cached + np.arange(tokens), cos, sin),
        num_heads=heads,
        cache_dtype=np.dtype(np.float32 if scales else np.float16),
        cache_scales=(scales[0], scales[1]) if scales else None,
    )
    at_scales = tuple(arrays.put(scale) for scale in scales)
    tables = arrays.put(cos), arrays.put(sin)
    shape: dict[str, Any] = {"group": heads // kv_heads, "head_size": size, "reach": reach, "cache_type": cache_type}
    kinds = [kind(**shape, softcap=False, window=False) for kind in (AttendCache, AttendPath)]
    rotate = RotateAppend(head_size=size, rotary=size, cache_type=cache_type, norm=False)

    def attend(first: int, count: int) -> NDArray[np.float32]:
        at_keys, at_values = (arrays.put(cache) for cache in caches)
        positions = (cached + first + np.arange(count)).astype(np.int32)
        at_positions, committed = arrays.put(positions), arrays.put(positions + 1)
        zeros = arrays.put(np.zeros(max(count, reach * reach), np.int32))
        context = arrays.put(np.full((count, heads * size), np.nan, np.float32))
        # Keys and values of the tokens before are those of the whole pass.
        before = arrays.put(qkv[: first + count])
        all_positions = arrays.put((cached + np.arange(first + count)).astype(np.int32))
        all_queries = arrays.put(np.zeros((first + count, heads * size), np.float32))
        all_zeros = arrays.put(np.zeros(first + count, np.int32))
        ends = (heads, kv_heads, capacity, 0.0, *at_scales)
        at_caches = (at_keys, at_values)
        fed = (before, *tables, 0, 0, all_positions, all_positions, all_zeros, all_queries, *at_caches, *ends)
        arrays.run(rotate, (first + count, heads + 2 * kv_heads), fed)
        rows = arrays.get(all_queries, (first + count, heads * size), np.float32)[first:]
        queries = arrays.put(rows)
        splits = max(1, num_splits(cached + tokens, reach))
        partial = arrays.put(np.full((count, heads, splits, size), np.nan, np.float32))
        stats = arrays.put(np.full((count, heads, splits, 2), np.nan, np.float32))
        sizes = (0, heads, kv_heads, capacity, splits, size**-0.5, 0.0, 0)
        tile = tile_tokens(shape["group"], size)
        tiles = [(start, min(tile, count - start)) for start in range(0, count, tile)]
        table, scratch = arrays.put(np.array(tiles, np.int32)), (partial, stats)
        over_cache = (queries, *at_caches, at_positions, zeros, table, *scratch, *sizes, *at_scales[:1])
        arrays.run(kinds[0], (kv_heads, len(tiles), splits), over_cache)
        over_path = (queries, *at_caches, at_positions, committed, zeros, zeros, *scratch, context, *sizes)
        arrays.run(kinds[1], (count, kv_heads), (*over_path, *at_scales))
        return arrays.get(context, (count, heads * size), np.float32)

    together = attend(0, tokens)
    same = all(np.array_equal(attend(one, 1)[0], together[one]) for one in (0, tokens // 2, tokens - 1))
    worst = float(np.abs(together - expected).max())
    # Scores and weights keep 22 bits, exp2 of a GPU loses two of 24; contexts are averages of values near 1.
    return {"ok": same and worst < 1e-4, "same_bits": same, "largest_error": worst}


@contextmanager
def _model(name: str, options: Options) -> Iterator[tuple[CudaSession, Contract, Path]]:
    """A model of random weights: its CUDA session, and the folder with the CPU's graphs."""
    spec = SHAPES[name]
    contract = replace(contract_of(spec, 400 if options.rehearse else 1024), kv_dtype="float16")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder)
        write_graphs(spec, contract, path)
        linears = recipe_of(spec).linears
        graphs = (FILES.native_graph, "verifier.onnx")
        program = write_program(path, graphs, contract, linears, path / "weights.bin", "float16")
        with options.runner.session(program, path / "weights.bin", contract, slots=_SLOTS) as session:
            yield session, contract, path


def _cpu_session(folder: Path, contract: Contract) -> tuple[Any, str]:
    """The native operators' session where they can run, else that of stock kernels; and which."""
    from plugins.cpu.library import open_library

    try:
        library = open_library().path
    except QuasarError:
        return OnnxRuntimeSession(folder, folder / FILES.graph, contract), "stock kernels, float32 cache"
    return OnnxRuntimeSession(folder, folder / FILES.native_graph, contract, library=library), _NATIVE


def _divergence(theirs: NDArray[np.float32], ours: NDArray[np.float32]) -> dict[str, float]:
    p, q = (_log_softmax(one.astype(np.float64)) for one in (theirs, ours))
    kl = float((np.exp(p) * (p - q)).sum(axis=1).mean())
    top1 = float((theirs.argmax(axis=1) == ours.argmax(axis=1)).mean())
    return {"kl": kl, "top1": top1, "largest_difference": float(np.abs(theirs - ours).max())}


def _log_softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = x - x.max(axis=1, keepdims=True)
    logarithms: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithms


def _exactness_of(session: CudaSession, contract: Contract, options: Options) -> dict[str, bool]:
    random = np.random.default_rng(2)
    tokens = random.integers(0, contract.vocab_size, contract.max_length)
    lengths: tuple[int, ...] = (1, 63, 200, 320, 700)
    widths: tuple[int, ...] = tuple(range(1, 33))
    if options.rehearse:
        lengths, widths = (40,), (2, 5)
    found: dict[str, bool] = {"chains": True, "prompts": True, "trees": True}
    for length in lengths:
        _feed(session, tokens[:length], contract)
        count = max(widths)
        one_by_one = np.concatenate(
            [session.run_logits(tokens[length + i : length + i + 1], length + i, 1) for i in range(count)]
        )
        for width in widths:
            chain = session.run_logits(tokens[length : length + width], length, width)
            found["chains"] &= np.array_equal(chain, one_by_one[:width])
        # A path of five through a tree, with other tokens among them.
        parents, path = [-1, -1, 1, 1, 3, 0, 4, 6], [1, 3, 4, 6, 7]
        tree = random.integers(0, contract.vocab_size, 8)
        known = min(len(path), count)
        tree[path[:known]] = tokens[length : length + known]
        logits = session.run_logits(tree, length, 8, parents)
        found["trees"] &= np.array_equal(logits[path[:known]], one_by_one[:known])
        _feed(session, tokens[: length + count], contract)
        last = session.run_logits(tokens[length + count - 1 : length + count], length + count - 1, 1)
        found["prompts"] &= np.array_equal(last[0], one_by_one[-1])
    many: dict[str, int] = {"batches": 1, "most_positions": 24} if options.rehearse else {"batches": 12}
    found["batches"] = batches_are_exact(session, trees=True, **many)
    found["greedy decoding with drafts"] = _decodes_alike(session, tokens[:20], 6 if options.rehearse else 64)
    return {name: bool(one) for name, one in found.items()}


def _decodes_alike(session: CudaSession, prompt: NDArray[np.int64], count: int) -> bool:
    """Plain decoding, and decoding with drafts of which some are wrong: the same tokens."""
    pending = int(session.run(prompt, 0, 1)[0])
    plain, length = [pending], len(prompt)
    for _ in range(count):
        plain.append(int(session.run([plain[-1]], length, 1)[0]))
        length += 1
    random = np.random.default_rng(3)
    found, length = [int(session.run(prompt, 0, 1)[0])], len(prompt)
    while len(found) <= count:
        drafts = np.array(plain[len(found) : len(found) + 5])
        drafts[random.random(len(drafts)) < 0.2] += 1
        fed = np.array([found[-1], *(drafts % session.contract.vocab_size)])
        targets = session.run(fed, length, len(fed)).tolist()
        accepted = 0
        while accepted < len(fed) - 1 and targets[accepted] == fed[accepted + 1]:
            accepted += 1
        found += targets[: accepted + 1]
        length += accepted + 1
    return found[: count + 1] == plain


def _feed(session: CudaSession, tokens: NDArray[np.int64], contract: Contract) -> None:
    for first in range(0, len(tokens), contract.prefill_chunk):
        session.run(tokens[first : min(first + contract.prefill_chunk, len(tokens))], first, 1)


def _pass_of(session: CudaSession, width: int, cached: int) -> Callable[[], object]:
    tokens = np.arange(width)
    return lambda: session.run(tokens, cached, width)


def _baselines(spec: Any, contract: Contract, *, rehearse: bool) -> tuple[dict[str, Any], dict[str, str]]:
    """Decoders in torch by title, and why others are not there."""
    try:
        import torch
        from gpu_baselines import Decoder, Fp8Linears
    except ImportError as error:
        return {}, {"bf16": str(error), "fp8": str(error)}
    device = "cpu" if rehearse else "cuda"
    found: dict[str, Any] = {"bf16": Decoder(spec, contract.capacity, device)}
    if rehearse or torch.cuda.get_device_capability() < (8, 9):
        return found, {"fp8": "this device has no FP8 products"}
    try:
        found["fp8"] = Decoder(spec, contract.capacity, device, linears=Fp8Linears)
    except RuntimeError as error:
        return found, {"fp8": str(error).splitlines()[0]}
    return found, {}


def _interleaved(passes: dict[str, Callable[[], object]], *, rehearse: bool) -> dict[str, float]:
    """Median milliseconds of each, in turns, after a few that are not counted: one is launched, one recorded."""
    times: dict[str, list[float]] = {title: [] for title in passes}
    uncounted, counted = (2, 1) if rehearse else (3, 15)
    for repeat in range(uncounted + counted):
        for title, one in passes.items():
            start = time.perf_counter()
            one()
            if repeat >= uncounted:
                times[title].append(1e3 * (time.perf_counter() - start))
    return {title: round(statistics.median(ms), 4) for title, ms in times.items()}


def _seconds_on_gpu(work: Callable[[], object]) -> float:
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


STEPS: dict[str, Callable[[Options], dict[str, Any]]] = {
    "environment": environment,
    "kernels": kernels,
    "smollm2": lambda options: model("smollm2", options),
    "qwen3-1.7b": lambda options: model("qwen3-1.7b", options),
    "latency-qwen3-8b": lambda options: latency("qwen3-8b", options),
    "latency-llama-3-8b": lambda options: latency("llama-3-8b", options),
    "low-bit-qwen3-8b": lambda options: low_bit("qwen3-8b", options),
    "draft-head-qwen3-1.7b": lambda options: draft_head("qwen3-1.7b", options),
}
