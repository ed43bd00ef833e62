"""TensorRT-RTX really compiles the lowered graphs, without a GPU; and what compiling does to a directory."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model

import runtime
from engines.directory import open_directory
from engines.tensorrt.builder import CompiledPlan, compile_plan
from engines.tensorrt.library import check_capabilities, open_library
from engines.tensorrt.plans import tensorrt_files
from export.build_options import CompileOptions
from export.compile import choose_targets, compile_engine
from export.inspect_backend import backend_json
from export.passes import LowerToTensorRt
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError, EngineError
from tests.graphs import as_built_earlier, export_graphs
from tests.tiny import save_tiny_model

CAPABILITIES = ("8.6", "8.9", "12.0")


@pytest.fixture
def engine(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def compiled(directory, *capabilities, **options):
    options = CompileOptions(
        directory=directory, backend="tensorrt-rtx", compute_capabilities=capabilities or ("8.9",), **options
    )
    return compile_engine(options)


def check_network(value, num_layers, linears, *, quantized=True, nibbles=False):
    """The promises about a parsed network, from TensorRT's own layer types.

    `quantized`: linears are INT8 on both sides; `nibbles`: weights of 4 bits alone.
    """
    layers = value["layers"]
    assert layers["KV_CACHE_UPDATE"] == 2 * num_layers
    assert layers["ATTENTION_INPUT"] == layers["ATTENTION_OUTPUT"] == num_layers
    assert value["matmuls"] == linears
    # No float weight matmul is left: every linear is after QUANTIZE and DEQUANTIZE.
    assert value["quantized_matmuls"] == (linears if quantized else 0)
    assert layers.get("QUANTIZE", 0) == (linears if quantized else 0)
    assert layers.get("DEQUANTIZE", 0) == (2 * linears if quantized else linears if nibbles else 0)
    updates = {item["name"]: item["updates"] for item in value["bindings"] if item["updates"]}
    assert len(updates) == 2 * num_layers
    assert updates["present.0.key"] == "past_key_values.0.key"


COMPILED = {"llama": {}, "qwen2": {"tree_mask": True, "max_width": 16}, "qwen3": {"precision": "fp32"}}


@pytest.mark.parametrize(("architecture", "options"), COMPILED.items())
def test_random_models_compile_for_three_gpus(architecture, options, build_engine, tmp_path):
    model = save_tiny_model(tmp_path / "model", architecture)
    directory = compiled(build_engine(model, **options), *CAPABILITIES)
    value = backend_json(directory, "tensorrt-rtx")
    quantized = options.get("precision") != "fp32"
    check_network(value, 3, 3 * 4 + 1, quantized=quantized)
    assert [plan["compute_capability"] for plan in value["plans"]] == list(CAPABILITIES)
    assert len({plan["sha256"] for plan in value["plans"]}) == 3
    width = options.get("max_width", 32)
    assert value["profiles"]["verify"]["input_ids"] == [[1, 1], [1, 8], [1, width]]
    assert value["profiles"]["prefill"]["input_ids"] == [[1, 1], [1, 256], [1, 256]]
    (top,) = [item for item in value["bindings"] if item["name"] == "top_tokens"]
    assert (top["dtype"], top["shape"]) == ("int64", [1, -1, 8])
    masks = [item for item in value["bindings"] if item["name"] == "tree_mask"]
    assert [mask["shape"] for mask in masks] == ([[1, -1, -1]] if "tree_mask" in options else [])
    assert [kernel["compute_capability"] for kernel in value["kernels"]] == (
        list(CAPABILITIES) if "tree_mask" in options else []
    )


@pytest.mark.parametrize("precision", ["w4a16", "w4a16-128"])
def test_weights_of_4_bits_compile(precision, build_engine, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    model = save_tiny_model(tmp_path / "model", "llama", **sizes)
    value = backend_json(compiled(build_engine(model, precision=precision)), "tensorrt-rtx")
    check_network(value, 3, 3 * 4 + 1, quantized=False, nibbles=True)


@pytest.mark.full
def test_smollm2_compiles_for_three_gpus_and_its_weights_are_in_8_bits(smollm2_engine, tmp_path):
    engine = shutil.copytree(smollm2_engine, tmp_path / "engine")
    before = open_directory(engine).manifest
    done = subprocess.run(
        [
            *(sys.executable, "-m", "export", "compile", engine, "--backend", "tensorrt-rtx"),
            *("--compute-capability", *CAPABILITIES, "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    value = json.loads(done.stdout)["tensorrt-rtx"]
    check_network(value, 30, 121)
    assert [plan["compute_capability"] for plan in value["plans"]] == list(CAPABILITIES)
    manifest = open_directory(engine).manifest
    # Adding a back end changes nothing that was there: the engine keeps its name, its files and its measurements.
    assert manifest.engine_hash == before.engine_hash
    assert manifest.files.items() >= before.files.items()
    assert manifest.record == before.record

    float_plan = compile_float16_with_its_own_head(tmp_path / "float")
    for plan in value["plans"]:
        assert plan["bytes"] <= 0.7 * float_plan


def compile_float16_with_its_own_head(folder: Path) -> int:
    """Bytes of SmolLM2's plan without quantization, the head a tensor of its own, as the INT8 head always is."""
    folder.mkdir()
    contract = export_graphs(open_checkpoint("smollm2"), folder, max_length=4096)
    model = ir.load(folder / "canonical.onnx")
    head = next(node for node in model.graph if node.name == "lm_head.columns")
    own = np.ascontiguousarray(head.inputs[0].const_value.numpy().T)
    own.tofile(folder / "head.data")
    tensor = ir.ExternalTensor("head.data", 0, own.nbytes, ir.DataType.FLOAT, shape=ir.Shape(own.shape), name="head")
    weight = ir.Value(name="head", type=ir.TensorType(tensor.dtype), shape=ir.Shape(own.shape), const_value=tensor)
    model.graph.register_initializer(weight)
    ir.convenience.replace_all_uses_with(head.outputs[0], weight)
    tensor._base_dir = folder
    LowerToTensorRt(contract, "float16")(model)
    ir.save(model, folder / "float16.onnx")
    plan = compile_plan(
        open_library("tensorrt-rtx"), folder / "float16.onnx", folder, contract, compute_capability="8.9"
    )
    check_network({**plan.network, "bindings": plan.bindings}, 30, 121, quantized=False)
    return len(plan.data)


def test_compiling_again_adds_plans_and_another_type_replaces_them(engine):
    first = tensorrt_files(compiled(engine, "8.6").manifest)["tensorrt-rtx"]
    second = tensorrt_files(compiled(engine, "8.9").manifest)["tensorrt-rtx"]
    assert [plan.compute_capability for plan in second.plans] == ["8.6", "8.9"]
    assert second.plans[0] == first.plans[0]
    assert runtime.load(engine).generate("hi", max_new_tokens=4).token_ids
    third = compiled(engine, "8.9", compute_type="bfloat16")
    files = tensorrt_files(third.manifest)["tensorrt-rtx"]
    assert [plan.compute_capability for plan in files.plans] == ["8.9"]
    assert {item["dtype"] for item in files.bindings if item["updates"]} == {"bf16"}
    left = {path.relative_to(engine).as_posix() for path in (engine / "tensorrt").iterdir()}
    assert left == set(files.names)


def test_an_engine_of_an_earlier_version_compiles_without_top_tokens(engine):
    as_built_earlier(engine)
    before = open_directory(engine).manifest
    manifest = compiled(engine, "8.9").manifest
    assert manifest.engine_hash == before.engine_hash
    assert manifest.contract.top_k == 0
    names = {item["name"] for item in tensorrt_files(manifest)["tensorrt-rtx"].bindings}
    assert "next_tokens" in names
    assert "top_tokens" not in names


def test_a_killed_run_leaves_the_directory_as_it_was(engine, monkeypatch):
    before = (engine / "manifest.json").read_bytes()
    monkeypatch.setattr("export.publishing.write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compiled(engine)
    assert (engine / "manifest.json").read_bytes() == before
    monkeypatch.undo()
    assert runtime.load(engine).backend == "onnxruntime"
    assert len(tensorrt_files(compiled(engine).manifest)["tensorrt-rtx"].plans) == 1


def test_a_graph_that_tensorrt_refuses_is_one_line(engine, tmp_path):
    contract = open_directory(engine).manifest.contract
    with pytest.raises(EngineError, match=r"refused .*present\.0\.key.*static sequence length"):
        # The canonical graph has a cache of any length.
        compile_plan(open_library("tensorrt-rtx"), engine / "verifier.onnx", engine, contract, compute_capability="8.9")


def test_choices_are_checked_before_any_work(monkeypatch):
    library = open_library("tensorrt-rtx")
    assert {"8.6", "8.9", "12.0"} <= set(library.compute_capabilities)
    with pytest.raises(EngineError, match=r"capability 6\.1 is unknown to tensorrt-rtx .*7\.5, 8\.0"):
        choose_targets("tensorrt-rtx", ("8.6", "6.1"))
    assert choose_targets("tensorrt-rtx", ("8.6", "8.6")).capabilities == ("8.6",)
    # This machine has no GPU.
    assert choose_targets("tensorrt-rtx", ()).capabilities == CAPABILITIES
    with pytest.raises(EngineError, match=r"tensorrt is not installed: run pip install 'quasar-verifier\[tensorrt\]'"):
        choose_targets("tensorrt", ())
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["tensorrt_rtx"])
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "11.4.0")
    with pytest.raises(BuildError, match="compiles on the GPU that it will run on, and there is no NVIDIA driver"):
        choose_targets("tensorrt", ())
    with pytest.raises(EngineError, match="leave --compute-capability out"):
        check_capabilities(open_library("tensorrt"), ("8.9",))
    monkeypatch.setattr(sys.modules["tensorrt_rtx"], "__version__", "10.14.1")
    with pytest.raises(EngineError, match=r"tensorrt 10\.14\.1 is too old: 10\.15 or newer"):
        open_library("tensorrt")


def test_blocks_are_refused(tiny_model, build_engine):
    directory = build_engine(tiny_model, precision="w8a8-block", keep_float=("lm_head",))
    with pytest.raises(BuildError, match=r"12 of the engine's 13 linears are W8A8 in blocks of 32, and TensorRT"):
        compiled(directory)


def test_plugins_need_full_tensorrt(engine, tmp_path):
    with pytest.raises(EngineError, match="no plugin layer: --plugin needs --backend tensorrt"):
        compiled(engine, plugins=(tmp_path / "libmine.so",))
    with pytest.raises(BuildError, match="no plugin layer: --fused-quantization needs --backend tensorrt"):
        compiled(engine, fused_quantization=True)
    with pytest.raises(BuildError, match="no plugin layer: --fused-linears needs --backend tensorrt"):
        compiled(engine, fused_linears=True)


def test_fused_linears_have_a_graph_and_weights_of_their_own(engine, monkeypatch):
    """What full TensorRT would be given, and what lies in the directory then."""
    monkeypatch.setattr("export.compile.compiles_ahead", lambda library: False)
    registered, seen = [], []
    monkeypatch.setattr("plugins.gpu.tensorrt_plugin.register", lambda module, target: registered.append(target))

    def compile_plan(library, graph, folder, contract, **options):
        model = onnx.load(graph, load_external_data=False)
        load_external_data_for_model(model, str(folder))
        seen.append({node.op_type for node in model.graph.node})
        tiles = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".tiles")]
        assert len(tiles) == 13
        assert all(numpy_helper.to_array(tensor).shape[2:] == (64, 128) for tensor in tiles)
        network = {"layers": {}, "matmuls": 0, "quantized_matmuls": 0}
        return CompiledPlan(data=b"plan", network=network, bindings=[])

    monkeypatch.setattr("export.compile.compile_plan", compile_plan)
    files = tensorrt_files(compiled(engine, fused_linears=True).manifest)["tensorrt-rtx"]
    assert registered == ["8.9"]
    assert {"integer_linear", "quantize_per_token"} <= seen[0]
    assert not {"MatMul", "QuantizeLinear", "DequantizeLinear"} & seen[0]
    # Names end in the content's hash.
    assert re.fullmatch(r"tensorrt/verifier-float16-fused-[0-9a-f]{8}\.onnx", files.graph)
    assert re.fullmatch(r"tensorrt/verifier-float16-fused-[0-9a-f]{8}\.onnx\.data", files.weights)
    assert tensorrt_files(open_directory(engine).manifest)["tensorrt-rtx"] == files
    left = {path.relative_to(engine).as_posix() for path in (engine / "tensorrt").iterdir()}
    assert left == set(files.names)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precision": "w8a8-static"}, r"linears that are W8A8 per token; layers\.0\.\S+ is w8a8-static$"),
        ({"precision": "fp32"}, "linears that are W8A8 per token, and this engine has none$"),
    ],
)
def test_fused_linears_are_per_token(options, expected, tiny_model, build_engine, monkeypatch):
    monkeypatch.setattr("export.compile.compiles_ahead", lambda library: False)
    with pytest.raises(BuildError, match=f"^--fused-linears takes {expected}"):
        compiled(build_engine(tiny_model, **options), fused_linears=True)


def test_fused_quantization_makes_scales_of_tokens(tiny_model, build_engine, monkeypatch):
    monkeypatch.setattr("export.compile.compiles_ahead", lambda library: False)
    with pytest.raises(BuildError, match=r"^--fused-quantization makes each token's scale, and .* is w8a8-static"):
        compiled(build_engine(tiny_model, precision="w8a8-static"), fused_quantization=True)


def test_trees_need_triton_where_they_are_compiled(tiny_model, build_engine, monkeypatch):
    directory = build_engine(tiny_model, tree_mask=True)
    monkeypatch.setitem(sys.modules, "plugins.gpu.kv_compact", None)
    with pytest.raises(BuildError, match=r"pip install 'quasar-verifier\[trees\]'"):
        compiled(directory)


def test_two_runs_do_not_compile_one_directory(engine, monkeypatch):
    def meanwhile(*arguments, **keywords):
        with pytest.raises(BuildError, match="another run is compiling"):
            compiled(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr("export.compile.compile_plan", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        compiled(engine)


def test_ctrl_c_stops_the_compiler(engine, monkeypatch):
    """TensorRT calls back while it compiles, and swallows what is raised there."""
    heard = []

    def press(phase, done, total):
        heard.append(phase)
        raise KeyboardInterrupt

    original = compile_plan
    monkeypatch.setattr(
        "export.compile.compile_plan", lambda *given, **options: original(*given, **options | {"on_progress": press})
    )
    before = (engine / "manifest.json").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        compiled(engine)
    assert len(heard) == 1
    assert (engine / "manifest.json").read_bytes() == before


def test_inspect_says_what_to_run(engine):
    with pytest.raises(EngineError, match=r"no tensorrt back end: run python -m export compile .* --backend tensorrt$"):
        backend_json(open_directory(engine), "tensorrt")
    assert backend_json(open_directory(engine), "onnxruntime")["graph"] == "onnxruntime/verifier.onnx"


def test_the_other_library_is_compiled_in_a_process_of_its_own(engine):
    """As `--backend tensorrt --backend tensorrt-rtx` does: Polygraphy drives one library in a process."""
    code = (
        "import sys\n"
        "from engines.tensorrt.library import import_polygraphy\n"
        "from export.cli import app\n"
        "from quasar.cli import run\n"
        "import_polygraphy('tensorrt')\n"
        f"sys.argv = ['x', 'compile', {str(engine)!r}, '--backend', 'tensorrt-rtx', '--compute-capability', '8.6']\n"
        "run(app)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    files = tensorrt_files(open_directory(engine).manifest)["tensorrt-rtx"]
    assert [plan.compute_capability for plan in files.plans] == ["8.6"]


def test_a_run_that_fails_leaves_what_the_manifest_names(tiny_model, shared_engine, tmp_path, monkeypatch):
    """Another graph of the same type, refused by the library: every back end still loads, files of old names too."""
    engine = shutil.copytree(shared_engine(tiny_model), tmp_path / "engine")
    network = {"layers": {}, "matmuls": 0, "quantized_matmuls": 0}
    monkeypatch.setattr(
        "export.compile.compile_plan",
        lambda *given, **options: CompiledPlan(data=b"plan", network=network, bindings=[]),
    )
    first = tensorrt_files(compiled(engine).manifest)["tensorrt-rtx"]
    as_earlier = {file: f"{file.rpartition('-')[0]}{Path(file).suffix}" for file in first.names}
    manifest = (engine / "manifest.json").read_text()
    for file, earlier in as_earlier.items():
        (engine / file).rename(engine / earlier)
        manifest = manifest.replace(file, earlier)
    (engine / "manifest.json").write_text(manifest)
    before = open_directory(engine).manifest

    def refuse(*given, **options):
        raise EngineError("no such layer")

    monkeypatch.setattr("export.compile.compiles_ahead", lambda library: False)
    monkeypatch.setattr("export.compile._Compilation._register_plugins", lambda self: None)
    with monkeypatch.context() as refusing:
        refusing.setattr("export.compile.compile_plan", refuse)
        with pytest.raises(EngineError, match="no such layer"):
            compiled(engine, fused_quantization=True)
    assert open_directory(engine).manifest == before
    runtime.load(engine, backend="onnxruntime").close()
    # Plans are of one graph.
    second = tensorrt_files(compiled(engine, "8.6", fused_quantization=True).manifest)["tensorrt-rtx"]
    assert [plan.compute_capability for plan in second.plans] == ["8.6"]
    both = tensorrt_files(compiled(engine, fused_quantization=True).manifest)["tensorrt-rtx"]
    assert [plan.compute_capability for plan in both.plans] == ["8.6", "8.9"]
    left = {path.relative_to(engine).as_posix() for path in (engine / "tensorrt").iterdir()}
    assert {file for file in left if not file.endswith(".partial")} == set(both.names)
