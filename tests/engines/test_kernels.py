"""Which kernels run, why, and that an engine works with either."""

import dataclasses
import sys

import numpy as np
import pytest

import runtime
from engines.directory import open_directory
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.kernels import choose_kernels, slot_bytes
from engines.onnxruntime.probing import this_machine
from plugins.cpu import library, toolchain
from quasar.errors import BuildError, EngineError
from tests.plugins.cpu.operators import LEVELS, needs_library

FILES = OnnxRuntimeFiles(
    graph="a", probe="b", probe_layers=1, integer_check="c", native_graph="d", native_probe="e", native_weights="f"
)
EARLIER = OnnxRuntimeFiles(graph="a", probe="b", probe_layers=1, integer_check="c")


@needs_library
def test_native_kernels_run_where_they_can():
    chosen = choose_kernels(None, FILES)
    assert (chosen.library, chosen.level, chosen.reason) == (toolchain.LIBRARY, LEVELS[0], "")
    assert chosen.name == f"native {LEVELS[0]}"
    assert choose_kernels("native", FILES) == chosen
    stock = choose_kernels("stock", FILES)
    assert (stock.name, stock.reason) == ("stock", "")


def test_an_unknown_name_is_refused():
    with pytest.raises(EngineError, match="kernels is 'fast'; 'stock' or 'native' was expected"):
        choose_kernels("fast", FILES)


def refused(monkeypatch, message, files=FILES):
    assert message in choose_kernels(None, files).reason
    with pytest.raises(EngineError, match="native kernels cannot run: .*" + message.replace("+", r"\+")):
        choose_kernels("native", files)


def test_without_a_library(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "LIBRARY", tmp_path / "none.so")
    refused(monkeypatch, "there is no library of native operators at")
    monkeypatch.setattr(toolchain, "BUILT", tmp_path / "none.so")
    refused(monkeypatch, "a C++ compiler is needed")


def test_without_onnxruntime_loading_says_so(monkeypatch, tiny_engine):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"ONNX Runtime is not installed: run pip install 'quasar-verifier\[cpu\]'"):
        runtime.load(tiny_engine)


@needs_library
def test_another_library_is_another_machine(tmp_path):
    """What was probed and timed with one compiler's operators is not trusted with another's."""
    chosen = choose_kernels(None, FILES)
    (tmp_path / "other.so").write_bytes(toolchain.LIBRARY.read_bytes() + b"\0")
    other = dataclasses.replace(chosen, library=tmp_path / "other.so")
    assert this_machine(0, chosen) == this_machine(0, chosen)
    assert this_machine(0, chosen).key != this_machine(0, other).key


def test_an_engine_of_an_earlier_version(monkeypatch):
    refused(monkeypatch, "an earlier version built it", EARLIER)


def test_a_library_for_another_machine(monkeypatch, tmp_path):
    (tmp_path / "other.so").write_bytes(b"\x7fELF\x02\x01\x01" + bytes(60))
    monkeypatch.setattr(toolchain, "LIBRARY", tmp_path / "other.so")
    refused(monkeypatch, "cannot be used here")


@needs_library
def test_a_library_with_other_operators(monkeypatch):
    monkeypatch.setattr(library, "ABI", 5)
    refused(monkeypatch, "has operators of version 4, 5 was expected")


@needs_library
def test_a_library_that_onnxruntime_refuses(monkeypatch):
    import onnxruntime

    def refuse(options, path):
        raise RuntimeError("quasar.cpu: ONNX Runtime 1.16.0 is too old; 1.17 or newer was expected")

    monkeypatch.setattr(onnxruntime.SessionOptions, "register_custom_ops_library", refuse)
    refused(monkeypatch, "1.16.0 is too old")


@needs_library
def test_a_level_that_this_cpu_lacks(monkeypatch):
    monkeypatch.setenv("QUASAR_CPU_LEVEL", "abacus")
    refused(monkeypatch, "QUASAR_CPU_LEVEL names a level that is unknown")


@needs_library
def test_slow_kernels_run_only_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(library, "_SLOW_LEVELS", (LEVELS[0],))
    assert "this CPU has none of" in choose_kernels(None, FILES).reason
    assert choose_kernels("native", FILES).level == LEVELS[0]
    monkeypatch.setenv("QUASAR_CPU_LEVEL", LEVELS[-1])
    assert choose_kernels(None, FILES).level == LEVELS[-1]


@needs_library
def test_an_engine_runs_with_either(tiny_engine):
    ids = np.random.default_rng(0).integers(0, 250, 40)
    answers = {}
    for kernels in ("native", "stock"):
        with runtime.load(tiny_engine, kernels=kernels) as engine:
            assert engine.kernels.startswith(kernels)
            assert engine.record.row_invariance.tree == (kernels == "native")
            plain = engine.generate(ids, max_new_tokens=60, drafter="none", ignore_eos=True)
            drafted = engine.generate(ids, max_new_tokens=60, ignore_eos=True)
            assert plain.token_ids == drafted.token_ids
            answers[kernels] = plain.token_ids
    assert len(answers["native"]) == len(answers["stock"])


def test_an_engine_without_native_kernels_says_why(tiny_engine, monkeypatch, tmp_path):
    for name in ("LIBRARY", "BUILT"):
        monkeypatch.setattr(toolchain, name, tmp_path / "none.so")
    with runtime.load(tiny_engine) as engine:
        assert engine.kernels == (
            "stock (no native operators were compiled when this was installed (a C++ compiler is needed))"
        )
        assert engine.generate("hello", max_new_tokens=4).token_ids
    with pytest.raises(EngineError, match="native kernels cannot run"):
        runtime.load(tiny_engine, kernels="native")


@needs_library
def test_a_damaged_packed_file_is_an_error(tiny_engine, tmp_path):
    """Truncated, or of another size: refused by the manifest; and without a manifest by the graph's own shapes."""
    import shutil

    from engines.onnxruntime.session import OnnxRuntimeSession
    from quasar.errors import DamagedEngineError

    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    packed = folder / "onnxruntime" / "native.onnx.data"
    content = packed.read_bytes()
    with runtime.load(tiny_engine) as engine:
        contract = engine.manifest.contract
    for size in (0, 1, 4095, len(content) // 2, len(content) - 1):
        packed.write_bytes(content[:size])
        with pytest.raises(DamagedEngineError, match="bytes, the manifest says"):
            runtime.load(folder)
        with pytest.raises(EngineError, match="cannot be loaded by ONNX Runtime"):
            OnnxRuntimeSession(folder, folder / "onnxruntime/native.onnx", contract, library=toolchain.LIBRARY)


@needs_library
def test_scales_that_are_not_finite_are_refused(tiny_engine, tmp_path):
    """Where no manifest guards the file: else every token would come of them."""
    import shutil

    import onnx_ir as ir

    from engines.onnxruntime.session import OnnxRuntimeSession

    folder = tmp_path / "engine"
    shutil.copytree(tiny_engine, folder)
    graph = folder / "onnxruntime" / "native.onnx"
    node = next(node for node in ir.load(graph).graph if node.op_type == "W8A8Linear")
    scale = node.inputs[2].const_value
    weights = np.memmap(folder / scale.location, np.uint8, "r+")
    with runtime.load(tiny_engine) as engine:
        contract = engine.manifest.contract
    OnnxRuntimeSession(folder, graph, contract, library=toolchain.LIBRARY).close()
    weights[scale.offset : scale.offset + 4] = np.float32([np.nan]).view(np.uint8)
    weights.flush()
    with pytest.raises(EngineError, match="W8A8Linear: scale has values that are not finite: the file is damaged"):
        OnnxRuntimeSession(folder, graph, contract, library=toolchain.LIBRARY)


@needs_library
@pytest.mark.parametrize(("kv_dtype", "dtype"), [("float16", np.float16), ("int8", np.int8), ("int8-tiers", np.int8)])
def test_an_engine_with_a_small_cache(tiny_model, build_engine, kv_dtype, dtype):
    directory = build_engine(tiny_model, kv_dtype=kv_dtype)
    ids = np.random.default_rng(1).integers(0, 250, 40)
    manifest = open_directory(directory).manifest
    assert ("cache_scales" in manifest.hashes) == kv_dtype.startswith("int8")
    assert manifest.contract.cache_bytes == np.dtype(dtype).itemsize * manifest.contract.cache_values
    for kernels, cached in (("native", dtype), ("stock", np.float32)):
        with runtime.load(directory, kernels=kernels) as engine:
            assert engine._loaded.session.caches[0][0].dtype == cached
            plain = engine.generate(ids, max_new_tokens=40, drafter="none", ignore_eos=True)
            assert engine.generate(ids, max_new_tokens=40, ignore_eos=True).token_ids == plain.token_ids
            if kernels == "native":
                assert engine.record.row_invariance.tree
    with pytest.raises(BuildError, match="--kv-dtype is 'int4'; float32, float16, bfloat16, int8, int8-tiers were exp"):
        build_engine(tiny_model, kv_dtype="int4")


@needs_library
def test_packed_tensors_of_any_declared_place_and_shape_end_in_errors(tiny_engine, tmp_path):
    """A graph that lies about where a packed weight is, or how large: an error, never a read outside of the file."""
    import onnx

    from engines.onnxruntime.session import OnnxRuntimeSession

    random = np.random.default_rng(12)
    with runtime.load(tiny_engine) as engine:
        contract = engine.manifest.contract
    size = (tiny_engine / "onnxruntime" / "native.onnx.data").stat().st_size
    original = onnx.load(tiny_engine / "onnxruntime" / "native.onnx", load_external_data=False)
    for attempt in range(40):
        model = onnx.ModelProto()
        model.CopyFrom(original)
        packed = [one for one in model.graph.initializer if one.name.endswith(".packed")]
        tensor = packed[random.integers(len(packed))]
        entries, true_dims = {entry.key: entry for entry in tensor.external_data}, list(tensor.dims)
        if attempt % 2:
            axis = int(random.integers(4))
            tensor.dims[axis] = int(random.choice([0, 1, 2, 33, tensor.dims[axis] * 2, tensor.dims[axis] + 1, 2**33]))
            entries["length"].value = str(int(np.prod([int(extent) for extent in tensor.dims])))
        else:
            entries["offset"].value = str(int(random.choice([size - 1, size, size + 4096, 2**40, 2**62])))
        path = tmp_path / "lying.onnx"
        path.write_bytes(model.SerializeToString())
        try:
            session = OnnxRuntimeSession(tiny_engine, path, contract, library=toolchain.LIBRARY)
        except EngineError:
            continue
        # What could be loaded lies inside the file, with another shape.
        assert attempt % 2
        if list(tensor.dims) == true_dims:
            continue
        with pytest.raises(Exception, match="packed weights are"):
            session.run(np.arange(3), 0, 3)


@needs_library
def test_a_slot_of_stock_kernels_is_float32(tiny_model, shared_engine):
    manifest = open_directory(shared_engine(tiny_model, kv_dtype="int8")).manifest
    assert slot_bytes(manifest, "native") == manifest.contract.cache_bytes
    assert slot_bytes(manifest, "stock") == 4 * manifest.contract.cache_bytes
