"""A plan on a GPU: built, right, exact, fast, and gone when it is closed. Times are recorded, not asserted."""

import shutil
import time
from statistics import median

import numpy as np
import pytest

import runtime
from engines.cache_rows import to_float32
from engines.directory import open_directory
from engines.gpu.driver import CudaDevice
from engines.tensorrt.inspector import integer_kernels, plan_layers
from engines.tree import ancestor_mask
from evaluation.exactness import verify
from export.build_options import CompileOptions
from export.compile import compile_engine
from export.inspect_backend import backend_json
from plugins.gpu.kv_compact import KERNEL
from plugins.kv_compact import kv_compact, launch_arguments

pytestmark = pytest.mark.gpu
PARENTS = np.array([-1, 0, 0, 1, 2, 4])


def session_of(engine):
    return engine._loaded.session


def test_the_plan_holds_what_the_graph_says(directory, library, record):
    value = backend_json(open_directory(directory), library.name)
    assert value["layers"]["KV_CACHE_UPDATE"] == 60
    assert value["matmuls"] == value["quantized_matmuls"] == 121
    (plan,) = value["plans"]
    record(f"{library.name}: plan of {plan['bytes'] / 1e6:.0f} MB for compute capability {plan['compute_capability']}")


def agreement(engine, reference, prompts):
    """Mean KL in nats, tokens whose likeliest next token is the same, and tokens."""
    divergences, same, total = [], 0, 0
    for prompt in prompts[:8]:
        ids = engine.encode(prompt.messages)[:64]
        ours, theirs = [], []
        for start in range(0, len(ids), 16):
            part = ids[start : start + 16]
            ours.append(session_of(engine).run_logits(part, start, len(part)))
            theirs.append(session_of(reference).run_logits(part, start, len(part)).copy())
        p, q = (log_softmax(np.concatenate(rows).astype(np.float64)) for rows in (theirs, ours))
        divergences += (np.exp(p) * (p - q)).sum(axis=-1).tolist()
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        total += len(ids)
    return np.mean(divergences), same, total


def test_logits_are_those_of_onnx_runtime(engine, reference, prompts, library, record):
    divergence, same, total = agreement(engine, reference, prompts)
    record(f"{library.name}: KL against ONNX Runtime {divergence:.4f} nats, {same} of {total} tokens the same")
    # Two INT8 verifiers whose roundings fall differently; against the float model both have 0.03 nats.
    assert divergence < 0.05
    assert same > 0.85 * total


def test_linears_of_ours_inside_a_plan(built, reference, prompts, library, record, tmp_path):
    if library.name != "tensorrt":
        pytest.skip("TensorRT-RTX has no plugins")
    directory = shutil.copytree(built, tmp_path / "engine")
    compile_engine(CompileOptions(directory=directory, backend=library.name, fused_linears=True))
    with runtime.load(directory, backend=library.name) as engine:
        divergence, same, total = agreement(engine, reference, prompts)
        parity = verify(engine, prompts[:8], {"max_new_tokens": 32})
    record(
        f"{library.name} --fused-linears: KL against ONNX Runtime {divergence:.4f} nats, {same} of {total} tokens the "
        f"same, verify {parity.identical} of {parity.prompts} prompts identical"
    )
    assert divergence < 0.05
    assert parity.identical == parity.prompts


def test_top_tokens_are_the_likeliest(engine, prompts):
    session = session_of(engine)
    for prompt in prompts[:8]:
        ids = engine.encode(prompt.messages)[:16]
        logits = session.run_logits(ids, 0, len(ids))
        expected = np.argsort(-logits, axis=-1, kind="stable")[:, : session.contract.top_k]
        # float16 products tie now and then: the lower id comes first.
        np.testing.assert_array_equal(session.top_tokens, expected)
        np.testing.assert_array_equal(session.run(ids, 0, len(ids)), expected[:, 0])
        np.testing.assert_array_equal(session.top_tokens, expected)


def test_rows_do_not_depend_on_the_width(engine, library, record):
    found = engine.record.row_invariance
    record(
        f"{library.name}: row invariance: chains exact at widths {found.chain} to {found.widest}, {found.boundaries}"
    )
    assert found.chain is not None, "no two widths agree: speculation is refused on this GPU"


def test_integer_kernels_run(engine, library, record):
    layers = plan_layers(session_of(engine)._plan.engine, library)
    names = integer_kernels(layers)
    record(f"{library.name}: {len(layers)} layers, integer kernels: {', '.join(names) or 'none by name'}")
    if library.name == "tensorrt":
        assert names, "TensorRT runs no kernel whose name says that it multiplies integers"


def test_speculation_is_exact(engine, prompts, library, record):
    parity = verify(engine, prompts, {"max_new_tokens": 64})
    record(
        f"{library.name}: verify {parity.identical} of {parity.prompts} prompts identical, acceptance length "
        f"{parity.acceptance_length:.2f}"
    )
    assert parity.drafted
    assert parity.identical == parity.prompts


def test_cuda_graphs_change_no_token(directory, engine, library, record):
    session = session_of(engine)
    tokens, times = {}, {}
    for graphs in (True, False):
        session._graphs = graphs
        tokens[graphs], times[graphs] = [], []
        for start in range(0, 320, 8):
            begin = time.perf_counter()
            tokens[graphs] += session.run(np.arange(start, start + 8), start, 8).tolist()
            times[graphs].append(time.perf_counter() - begin)
    session._graphs = True
    assert tokens[True] == tokens[False]
    with_graphs, without = (1e3 * median(times[graphs][10:]) for graphs in (True, False))
    record(f"{library.name}: t(8) {with_graphs:.2f} ms with CUDA graphs, {without:.2f} ms without")


def test_throughput(engine, prompts, library, record):
    speeds = {}
    for drafter in ("none", "prompt-lookup"):
        runs = [engine.generate(prompt.messages, max_new_tokens=128, drafter=drafter).stats for prompt in prompts[:8]]
        speeds[drafter] = sum(run.tokens - 1 for run in runs) / sum(run.decode_seconds for run in runs)
    record(f"{library.name}: {speeds['none']:.0f} tokens/s plain, {speeds['prompt-lookup']:.0f} with prompt lookup")
    curve = engine.record.cost_surface_ms[256]
    record(f"{library.name}: t(1) {curve[1]:.2f} ms, t(8) {curve[8]:.2f}, t(16) {curve[16]:.2f}, 256 rows in the cache")


def test_a_tree_is_its_paths(engine, record, library):
    session, path = session_of(engine), [0, 2, 4, 5]
    random = np.random.default_rng(3)
    prompt, fed, more = (random.integers(0, 49152, size) for size in (40, 6, 5))
    session.run(prompt, 0, 1)
    tree = session.run_logits(fed, 40, 6, PARENTS)
    session.compact(40, path)
    rows = to_float32(session.read_rows(40, 44))
    after = session.run_logits(more, 44, 5)
    chain = session.run_logits(fed[path], 40, 4)
    # float16 attention sums masked slots in other places; INT8 rounds behind it.
    assert np.abs(tree[path] - chain).mean() < 0.5
    record(f"{library.name}: a path through a tree against the chain: {np.abs(tree[path] - chain).max():.3g} at most")
    np.testing.assert_allclose(rows, to_float32(session.read_rows(40, 44)), atol=0.5)
    assert np.abs(after - session.run_logits(more, 44, 5)).mean() < 0.5
    assert not ancestor_mask(PARENTS)[4, 1]


def test_memory_is_given_back(directory, library, record):
    with CudaDevice() as device:
        before = device.free_bytes
        for _ in range(3):
            with runtime.load(directory, backend=library.name) as loaded:
                loaded.generate("Hello", max_new_tokens=16)
                used = before - device.free_bytes
        after = device.free_bytes
    record(
        f"{library.name}: {used / 1e6:.0f} MB of GPU memory while loaded, {(before - after) / 1e6:.0f} MB left behind"
    )
    # The driver keeps a context and kernels of the process.
    assert before - after < 256e6


@pytest.mark.parametrize("path", [[0], [0, 2, 3, 7], [1, 2, 3], list(range(16))])
def test_kv_compact_on_the_gpu_is_its_reference(path):
    random = np.random.default_rng(len(path))
    caches = [random.standard_normal((3, 64, 64)).astype(np.float16) for _ in range(8)]
    with CudaDevice() as device:
        addresses = np.array([device.allocate(cache.nbytes) for cache in caches], np.int64)
        for address, cache in zip(addresses, caches, strict=True):
            device.upload(int(address), cache.reshape(-1).view(np.uint8))
        table, rows = device.allocate(addresses.nbytes), device.allocate(8 * len(path))
        device.upload(table, addresses.view(np.uint8))
        device.upload(rows, np.array(path, np.int64).view(np.uint8))
        compiled = KERNEL.compile(device.gpu.compute_capability)
        grid, args = launch_arguments(
            table,
            rows,
            num_caches=8,
            num_heads=3,
            capacity=64,
            position_bytes=128,
            cache_length=20,
            path_length=len(path),
        )
        kernel = device.load_kernel(
            compiled.image,
            compiled.entry,
            threads=compiled.threads,
            shared_bytes=compiled.shared_bytes,
            types=compiled.types,
        )
        device.launch(kernel, grid, args)
        kv_compact(caches, 20, path)
        for address, cache in zip(addresses, caches, strict=True):
            came = np.empty_like(cache)
            device.download(came.reshape(-1).view(np.uint8), int(address))
            device.synchronize()
            np.testing.assert_array_equal(came, cache)


def log_softmax(rows):
    rows = rows - rows.max(axis=-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=-1, keepdims=True))
