"""`python -m evaluation compare`: worst layers first, and what a broken layer looks like."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from engines.backends import UnknownSection
from engines.directory import open_directory
from engines.tensorrt.plans import tensorrt_files
from evaluation.compare import compare_backends, differences
from export.build_options import CompileOptions, Silent
from export.compile import compile_engine
from quasar.errors import EngineError
from tests.commands import command
from tests.plugins.cpu.operators import needs_library


@pytest.fixture(scope="module")
def engine(tiny_model, build_engine):
    directory = build_engine(tiny_model, precision="fp32")
    compile_engine(CompileOptions(directory=directory, backend="tensorrt-rtx", compute_capabilities=("8.9",)))
    return directory


def run(*arguments):
    return command("engines", "compare", *arguments)


def test_figures_are_the_definitions():
    expected = {"a": np.array([1.0, 3.0], np.float32), "b": np.array([0.0, 4.0], np.float32)}
    came = {"a": np.array([1.0, 4.0], np.float32), "b": np.array([0.0, 4.0], np.float32)}
    worst, best = differences(expected, came, "tensorrt-rtx")
    assert (worst.tensor, worst.max_abs, worst.mean_abs, worst.relative) == ("a", 1.0, 0.5, 0.5)
    assert (best.tensor, best.max_abs) == ("b", 0.0)


def test_a_float16_graph_stays_near_its_float32_engine(engine, tmp_path):
    done = run(engine, "--worst", 3, "--json", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    assert "tensorrt-rtx on host memory, against onnxruntime" in done.stdout
    (comparison,) = json.loads((tmp_path / "out.json").read_text())
    figures = [one["relative"] for one in comparison["differences"]]
    assert figures == sorted(figures, reverse=True)
    assert len(figures) == 2 * 3 + 1
    # float16 keeps 11 bits of every value between operators; seen: 0.02 % to 0.1 % of the spread.
    assert 0 < figures[0] < 0.005
    assert comparison["same_next_tokens"] > 0.95 * comparison["tokens"]


@needs_library
def test_an_int8_cache_is_compared_as_what_it_stands_for(tiny_model, build_engine):
    """Native kernels hold integers, stock ones and TensorRT the keys and values themselves, and it says so."""
    directory, said = build_engine(tiny_model, precision="fp32", kv_dtype="int8-tiers"), []

    class Reporter(Silent):
        def stage(self, title, detail=""):
            said.append(detail)

    options = CompileOptions(directory=directory, backend="tensorrt-rtx", compute_capabilities=("8.9",))
    compile_engine(options, Reporter())
    assert "its KV cache is float16 here: TensorRT updates caches of floats alone" in said
    (comparison,) = compare_backends(open_directory(directory), np.arange(12) + 20)
    assert max(one.relative for one in comparison.differences) < 0.005


def test_a_layer_that_computes_something_else_shows(engine, monkeypatch):
    directory = open_directory(engine)
    graph = engine / tensorrt_files(directory.manifest)["tensorrt-rtx"].graph
    before = graph.read_bytes()
    model = ir.load(graph)
    for node in model.graph:
        if node.name == "layers.1.self_attn.attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 0.1)
    try:
        ir.save(model, graph)
        (comparison,) = compare_backends(directory, np.arange(1, 40))
    finally:
        graph.write_bytes(before)
    by_name = {one.tensor: one.relative for one in comparison.differences}
    assert by_name["layers.1.key"] < 0.005 < 0.02 < by_name["layers.2.key"]


def test_one_back_end_has_nothing_to_compare_with(tiny_engine):
    done = run(tiny_engine)
    assert done.returncode == 2
    assert done.stderr.strip().endswith(f"add one with python -m export compile {tiny_engine} --backend tensorrt-rtx")


def test_cuda_is_not_compared(tiny_engine):
    opened = open_directory(tiny_engine)
    manifest = replace(opened.manifest, backends={**opened.manifest.backends, "cuda": UnknownSection({})})
    opened = SimpleNamespace(path=opened.path, manifest=manifest)
    with pytest.raises(EngineError, match=r"has no TensorRT back end, and cuda is not compared, so there is nothing"):
        compare_backends(opened, [1, 2, 3])


def test_bfloat16_needs_a_gpu(tiny_model, build_engine):
    directory = build_engine(tiny_model)
    compile_engine(
        CompileOptions(
            directory=directory, backend="tensorrt-rtx", compute_capabilities=("8.9",), compute_type="bfloat16"
        )
    )
    with pytest.raises(EngineError, match="bfloat16"):
        compare_backends(open_directory(directory), [1, 2, 3])
