"""What compiling for CUDA does to a directory; kernels are really compiled where their bytes matter."""

import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import runtime
from calibration.precisions.base import CUDA
from calibration.precisions.catalog import precision_of
from engines.cuda.files import cuda_files, kernels_version, read_kernel_records, read_kernels, read_program
from engines.cuda.loading import check_program
from engines.cuda.program import Attention, Head, Linear
from engines.directory import open_directory
from engines.gpu.device import Gpu
from engines.gpu.driver import GpuSearch
from engines.onnxruntime.files import onnxruntime_files
from export import compile_cuda
from export.build_options import CompileOptions
from export.compile_cuda import DEFAULT_CAPABILITIES, check_target, choose_capabilities, compile_engine
from export.cuda_program import _smallest
from export.inspect_backend import backend_json
from plugins.gpu.catalog import kernel_of
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS, pack_channels, pack_weight
from plugins.gpu.variants import KERNELS_VERSION, AttendCache, W8A8Linear
from quasar.errors import BuildError, DamagedEngineError, EngineError, QuasarError
from quasar.files import sha256_file, write_json
from quasar.numerics import QuantizedWeight
from tests.commands import command, refused
from tests.engines.cuda.fakes import compile_quickly


@pytest.fixture(scope="module")
def compiled_engine(tiny_engine, tmp_path_factory):
    """An engine that the command has compiled for one GPU, and what it printed. Read it, and never write there."""
    engine = shutil.copytree(tiny_engine, tmp_path_factory.mktemp("cuda") / "engine")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "export", "compile", engine, "--backend", "cuda"),
            *("--compute-capability", "8.9", "--json"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return engine, json.loads(done.stdout)["cuda"]


@pytest.fixture
def engine(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


@pytest.fixture
def quickly(monkeypatch):
    compile_quickly(monkeypatch)


def compiled(directory, *capabilities, **options):
    return compile_engine(
        CompileOptions(directory=directory, backend="cuda", compute_capabilities=capabilities or ("8.9",), **options)
    )


def files_of(directory):
    return {path.relative_to(directory).as_posix() for path in (directory / "cuda").iterdir()}


def one_line(call, *arguments, **keywords):
    with pytest.raises(BuildError) as caught:
        call(*arguments, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_command_adds_a_program_weights_and_kernels(compiled_engine, tiny_engine):
    engine, shown = compiled_engine
    before, directory = open_directory(tiny_engine).manifest, open_directory(engine)
    manifest, files = directory.manifest, cuda_files(directory.manifest)
    assert files.cache_type == "float16"
    assert [one.compute_capability for one in files.kernels] == ["8.9"]
    assert set(files.names) == files_of(engine)
    for name in files.names:
        entry = {"bytes": (engine / name).stat().st_size, "sha256": sha256_file(engine / name)}
        assert manifest.files[name] == entry
        # What differs has another name.
        assert Path(name).stem.endswith(f"-{entry['sha256'][:8]}")
    # Adding a back end changes nothing that was there: the engine keeps its name, its files and its measurements.
    assert manifest.engine_hash == before.engine_hash
    assert manifest.files.items() >= before.files.items()
    assert manifest.record == before.record
    with runtime.load(engine, backend="onnxruntime") as loaded, runtime.load(tiny_engine) as untouched:
        tokens = loaded.generate("hello", max_new_tokens=4).token_ids
        assert tokens == untouched.generate("hello", max_new_tokens=4).token_ids

    program = read_program(directory.file(files.program))
    check_program(directory.file(files.program), program, manifest.contract)
    kernels = list(read_kernels(directory.file(files.kernels[0].file)))
    assert [record.name for record, _ in kernels] == [variant.name for variant in program.variants()]
    for record, image in kernels:
        assert image.startswith(b"\x7fELF")
        assert record.entry.encode() in image
    ends = [tensor.offset + tensor.bytes for tensor in program.tensors.values()]
    assert max(ends) == (engine / files.weights).stat().st_size
    assert shown["program"] == files.program
    assert [kernel["name"] for kernel in shown["kernels"][0]["kernels"]] == [record.name for record, _ in kernels]


def test_the_weights_are_the_engines(compiled_engine, tiny_engine):
    """Every linear of the program, unpacked: the integers and scales of the canonical graph."""
    import onnx_ir as ir

    directory = open_directory(compiled_engine[0])
    files = cuda_files(directory.manifest)
    program = read_program(directory.file(files.program))
    weights = np.fromfile(directory.file(files.weights), np.uint8)
    values = ir.load(tiny_engine / "verifier.onnx").graph.initializers
    linears = [step for step in program.steps if isinstance(step, Linear | Head)]
    assert len(linears) == len(directory.manifest.linears)
    for step in linears:
        outputs = step.vocabulary if isinstance(step, Head) else step.outputs
        gated = isinstance(step, Linear) and bool(step.gate)
        place, scale_place = program.tensors[step.weight], program.tensors[step.scale]
        packed = weights[place.offset : place.offset + place.bytes].view(np.int8)
        scales = weights[scale_place.offset : scale_place.offset + scale_place.bytes].view(np.float32)
        halves = 2 if gated else 1
        expected = values[step.weight].const_value.numpy()
        assert expected.shape == (step.inputs, halves * outputs)
        unpacked = unpack(packed, halves * outputs, step.inputs, gated=gated)
        np.testing.assert_array_equal(unpacked, expected.T)
        channels = unpack_channels(scales, halves * outputs, gated=gated)
        np.testing.assert_array_equal(channels, values[step.scale].const_value.numpy().reshape(-1))


def unpack(packed, outputs, inputs, *, gated):
    """The opposite of `pack_weight`, element by element: where the kernel looks for it."""
    halves = 2 if gated else 1
    input_tiles = -(-inputs // TILE_INPUTS)
    values = np.zeros((outputs, inputs), np.int8)
    flat, each = packed.reshape(-1), outputs // halves
    row, column = np.arange(outputs)[:, None], np.arange(inputs)[None, :]
    half, place = row // each, row % each
    tile = (place // TILE_OUTPUTS * halves + half) * input_tiles + column // TILE_INPUTS
    values[:] = flat[(tile * TILE_OUTPUTS + place % TILE_OUTPUTS) * TILE_INPUTS + column % TILE_INPUTS]
    return values


def unpack_channels(packed, outputs, *, gated):
    halves = 2 if gated else 1
    row, each = np.arange(outputs), outputs // halves
    half, place = row // each, row % each
    return packed[(place // TILE_OUTPUTS * halves + half) * TILE_OUTPUTS + place % TILE_OUTPUTS]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("outputs", "inputs"), [(64, 128), (2, 1), (130, 300), (256, 129), (66, 127)])
def test_packing_loses_nothing(outputs, inputs, gated):
    random = np.random.default_rng(outputs)
    # No zeros, which padding is made of.
    values = random.integers(1, 128, (outputs, inputs)).astype(np.int8)
    channels = random.uniform(1, 2, outputs).astype(np.float32)
    packed, packed_channels = pack_weight(values, gated=gated), pack_channels(channels, gated=gated)
    assert packed.shape[2:] == (TILE_OUTPUTS, TILE_INPUTS)
    np.testing.assert_array_equal(unpack(packed, outputs, inputs, gated=gated), values)
    np.testing.assert_array_equal(unpack_channels(packed_channels, outputs, gated=gated), channels)
    assert np.count_nonzero(packed) == values.size
    assert np.count_nonzero(packed_channels) == outputs
    assert len(packed_channels) == packed.shape[0] * TILE_OUTPUTS


def test_the_precision_packs_for_cuda():
    operator = precision_of("w8a8-token").lowering(CUDA)
    values = np.random.default_rng(0).integers(-127, 128, (70, 130)).astype(np.int8)
    scale = np.arange(70, dtype=np.float32)
    weight, scales = operator.pack(QuantizedWeight(values=values, scale=scale), False)
    np.testing.assert_array_equal(weight, pack_weight(values))
    np.testing.assert_array_equal(scales, pack_channels(scale))


@pytest.mark.parametrize(
    ("name", "group"),
    [("w4a8-128", 128), ("w4a8-offset", 32), ("w4a16", 32), ("w4a16-128-offset", 128)],
)
def test_weights_of_4_bits_are_packed_for_cuda(name, group):
    """Each in a nibble plus 8, or as it is where it has offsets; a scale and an offset for each 32 inputs."""
    random, outputs, inputs = np.random.default_rng(0), 70, 384
    has_offsets = name.endswith("offset")
    values = random.integers(0, 16, (outputs, inputs)).astype(np.int8) - (0 if has_offsets else 8)
    scale, offset = (random.uniform(1, 2, (outputs, inputs // group)).astype(np.float16) for _ in range(2))
    weight = QuantizedWeight(
        values=values.astype(np.int8),
        scale=scale.astype(np.float32),
        offset=offset.astype(np.float32) if has_offsets else None,
    )
    packed, scales = precision_of(name).lowering(CUDA).pack(weight, False)
    pairs = packed.view(np.uint8)
    blocks = np.stack([pairs & 15, pairs >> 4], axis=2).reshape(2, -1, TILE_OUTPUTS, 32).swapaxes(1, 2)
    found = blocks.reshape(2 * TILE_OUTPUTS, -1)[:outputs, :inputs].astype(np.int8)
    np.testing.assert_array_equal(found - (0 if has_offsets else 8), values)
    assert scales.shape == ((2, inputs // 32, 2, TILE_OUTPUTS) if has_offsets else (2, inputs // 32, TILE_OUTPUTS))
    for part, one in enumerate([scale, offset][: 2 if has_offsets else 1]):
        stored = scales[:, :, part] if has_offsets else scales
        of_blocks = stored.swapaxes(1, 2).reshape(2 * TILE_OUTPUTS, -1)[:outputs]
        np.testing.assert_array_equal(of_blocks, np.repeat(one, group // 32, axis=1))


@pytest.mark.parametrize(
    ("values", "kind"), [([1.0, -2.0, 0.0], "bfloat16"), ([1.0009765625], "float16"), ([0.1], "float32")]
)
def test_a_table_has_the_smallest_type_that_holds_it(values, kind):
    array = np.array([values], np.float32)
    stored, name = _smallest(array)
    assert name == kind
    np.testing.assert_array_equal(stored.astype(np.float32), array)


def test_kernels_of_another_gpu_are_kept(engine, quickly):
    first = cuda_files(compiled(engine, "8.6").manifest)
    second = cuda_files(compiled(engine, "8.9").manifest)
    assert [one.compute_capability for one in second.kernels] == ["8.6", "8.9"]
    assert second.kernels[0] == first.kernels[0]
    assert (second.program, second.weights) == (first.program, first.weights)
    # The same GPU again takes the place of its kernels.
    third = cuda_files(compiled(engine, "8.6").manifest)
    assert [one.compute_capability for one in third.kernels] == ["8.9", "8.6"]
    assert files_of(engine) == set(third.names)


def test_kernels_of_another_version_are_dropped(engine, quickly, monkeypatch):
    """The program that goes with them is overwritten, and nothing here can launch them."""
    monkeypatch.setattr("engines.cuda.files.KERNELS_VERSION", 1)
    first = cuda_files(compiled(engine, "8.6").manifest)
    assert kernels_version(engine / first.kernels[0].file) == 1
    monkeypatch.undo()
    compile_quickly(monkeypatch)
    second = cuda_files(compiled(engine, "8.9").manifest)
    assert [one.compute_capability for one in second.kernels] == ["8.9"]
    assert kernels_version(engine / second.kernels[0].file) == KERNELS_VERSION
    assert files_of(engine) == set(second.names)


def test_another_cache_type_drops_the_kernels_of_the_first(engine, quickly):
    first = cuda_files(compiled(engine, "8.6").manifest)
    second = cuda_files(compiled(engine, "8.9", compute_type="bfloat16").manifest)
    assert second.cache_type == "bfloat16"
    assert [one.compute_capability for one in second.kernels] == ["8.9"]
    assert second.weights == first.weights
    assert second.program != first.program
    # Files that nothing names are gone.
    assert files_of(engine) == set(second.names)
    assert read_program(engine / second.program).cache_type == "bfloat16"


@pytest.mark.parametrize("kv_dtype", ["int8", "int8-tiers"])
def test_an_engines_integers_stay_integers(kv_dtype, tiny_model, shared_engine, tmp_path, quickly):
    """Tiers are one piece there: their verify pass reads the same integers."""
    engine = shutil.copytree(shared_engine(tiny_model, kv_dtype=kv_dtype), tmp_path / "engine")
    assert one_line(compiled, engine, compute_type="bfloat16") == (
        f"the engine's KV cache is {kv_dtype}, which cuda reads in float16; --compute-type bfloat16 came"
    )
    directory = compiled(engine)
    files = cuda_files(directory.manifest)
    program = read_program(directory.file(files.program))
    assert (files.cache_type, program.cache_type) == ("int8", "int8")
    native = ir.load(directory.file(onnxruntime_files(directory.manifest).native_graph)).graph.initializers
    weights = np.fromfile(directory.file(files.weights), np.uint8)
    layers = [step for step in program.steps if isinstance(step, Attention)]
    assert len(layers) == directory.manifest.contract.num_layers
    for layer, step in enumerate(layers):
        for name, part in ((step.key_scale, "key_scale"), (step.value_scale, "value_scale")):
            place = program.tensors[name]
            scale = weights[place.offset : place.offset + place.bytes].view(np.float32)
            expected = native[f"layers.{layer}.self_attn.{part}"].const_value.numpy()
            np.testing.assert_array_equal(scale, expected.reshape(-1))


def test_a_build_says_at_once_that_integers_are_read_in_float16(tmp_path):
    types = ("--kv-dtype", "int8", "--compute-type", "bfloat16")
    said = refused("export", "build", tmp_path, "-o", tmp_path / "engine", "--backend", "cuda", *types)
    assert "the engine's KV cache is int8, which cuda reads in float16; --compute-type bfloat16 came" in said


def test_what_killed_runs_left_is_deleted(engine, quickly):
    (engine / "cuda").mkdir()
    for name in (".weights.bin.abc.tmp", "weights-deadbeef.bin"):
        (engine / "cuda" / name).write_bytes(b"half")
    directory = compile_engine(CompileOptions(directory=engine, backend="cuda", compute_capabilities=("8.9",)))
    found = {path.relative_to(engine).as_posix() for path in (engine / "cuda").iterdir()}
    assert found == set(cuda_files(directory.manifest).names)


def test_what_gpus_compute_with_needs_a_gpu_back_end(tmp_path):
    said = refused("export", "build", tmp_path, "-o", tmp_path / "engine", "--compute-type", "bfloat16")
    assert "--compute-type bfloat16 is what GPUs compute with, and no --backend is named" in said


def test_a_programs_scales_fit_its_cache(tiny_model, shared_engine, tmp_path, quickly):
    engine = shutil.copytree(shared_engine(tiny_model, kv_dtype="int8"), tmp_path / "engine")
    directory = compiled(engine)
    path = directory.file(cuda_files(directory.manifest).program)
    program = json.loads(path.read_text())
    attention = next(step for step in program["steps"] if step["step"] == "attention")
    linear = next(step for step in program["steps"] if step["step"] == "linear")
    for step, name, value, said in (
        (program, "cache_type", "float16", "layer 0 has scales for a cache in float16"),
        (attention, "key_scale", "", "layer 0 has no scales for a cache in int8"),
        (linear, "form", "ternary", "a linear of a form that this version does not know: 'ternary'"),
    ):
        before, step[name] = step[name], value
        path.write_text(json.dumps(program))
        with pytest.raises(DamagedEngineError, match=f"{path.name}: {said}: compile the engine again"):
            read_program(path)
        step[name] = before


@pytest.mark.full
def test_the_same_bytes_every_time(compiled_engine, engine):
    files = cuda_files(compiled(engine).manifest)
    # The names say what is in them.
    assert files == cuda_files(open_directory(compiled_engine[0]).manifest)
    for name in files.names:
        assert (engine / name).read_bytes() == (compiled_engine[0] / name).read_bytes()


def test_the_same_program_and_weights_every_time(compiled_engine, engine, quickly):
    """And the same kernels: the first linear and attention stand for all."""
    directory = open_directory(compiled_engine[0])
    files, before = cuda_files(compiled(engine).manifest), cuda_files(directory.manifest)
    assert (files.program, files.weights) == (before.program, before.weights)
    for name in (files.program, files.weights):
        assert (engine / name).read_bytes() == (compiled_engine[0] / name).read_bytes()
    images = {record.name: image for record, image in read_kernels(directory.file(before.kernels[0].file))}
    variants = read_program(directory.file(before.program)).variants()
    for kind in (W8A8Linear, AttendCache):
        variant = next(one for one in variants if isinstance(one, kind))
        assert kernel_of(variant).compile("8.9").image == images[variant.name]


@pytest.mark.parametrize("stopped_in", ["_compile", "publish"])
def test_a_killed_run_leaves_the_directory_as_it_was(engine, quickly, monkeypatch, stopped_in):
    """Another cache type, which has another program: the engine of the first still loads."""
    first = cuda_files(compiled(engine).manifest)
    before = (engine / "manifest.json").read_bytes()

    def press(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(compile_cuda, stopped_in, press)
        with pytest.raises(KeyboardInterrupt):
            compiled(engine, compute_type="bfloat16")
    assert (engine / "manifest.json").read_bytes() == before
    # Opening compares every file with its hash.
    assert cuda_files(open_directory(engine).manifest) == first
    assert runtime.load(engine).backend == "onnxruntime"
    second = cuda_files(compiled(engine, compute_type="bfloat16").manifest)
    assert files_of(engine) == set(second.names)


def test_two_runs_do_not_compile_one_directory(engine, monkeypatch):
    def meanwhile(*arguments):
        assert "another run is compiling" in one_line(compiled, engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(compile_cuda, "_pack", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        compiled(engine)


def test_what_cuda_has_not_is_refused_in_a_sentence(engine, tmp_path):
    assert one_line(compiled, engine, compute_type="float32") == (
        "cuda keeps its KV cache in float16 or bfloat16; float32 came"
    )
    assert one_line(compiled, engine, "7.5") == (
        "compute capability 7.5 has no INT8 product that Triton compiles to; cuda needs 8.0 or above: use --backend "
        "tensorrt there"
    )
    for wrong in ("8", "8.x", "sm89"):
        assert one_line(compiled, engine, wrong) == (f"compute capability {wrong!r} came; one like 8.9 was expected")
    for options in ({"plugins": (tmp_path / "libmine.so",)}, {"fused_quantization": True}, {"fused_linears": True}):
        assert one_line(compiled, engine, **options) == (
            "--plugin, --fused-quantization and --fused-linears are TensorRT's: cuda has kernels of its own"
        )
    assert not (engine / "cuda").exists()


CHOICES = "w4a8 or w8a8 or w8a8-block or w4a8-128 or w4a16-128 or w4a16"


@pytest.mark.parametrize(
    ("options", "count", "title", "reason"),
    [
        # As in the tests of other back ends: engines that are built once in a run.
        ({"precision": "w8a8-static"}, 13, "W8A8 with static scales", "cuda has no form of w8a8-static"),
        ({"precision": "fp32"}, 13, "float", "cuda has no form of float"),
    ],
)
def test_other_precisions_are_refused(tiny_model, shared_engine, options, count, title, reason):
    assert one_line(compiled, shared_engine(tiny_model, **options)) == (
        f"{count} of the engine's 13 linears are {title}, and {reason}: compile an engine built with "
        f"--precision {CHOICES}"
    )


def test_an_engine_without_native_graph_is_refused(engine, monkeypatch):
    files = onnxruntime_files(open_directory(engine).manifest)
    changed = replace(files, native_graph="")
    monkeypatch.setattr("engines.onnxruntime.files.onnxruntime_files", lambda manifest: changed)
    assert one_line(compiled, engine) == (
        f"{engine} has no graph of native operators, which the CUDA program is made from: build it again with this "
        "version, a head size of up to 256 and linears of up to 65536 inputs"
    )


def test_a_kernel_that_does_not_compile_is_a_sentence(engine, monkeypatch):
    def refuse(self, capability):
        raise QuasarError("Triton compiled no gather_rows for compute capability 8.9: why")

    monkeypatch.setattr("plugins.gpu.kernel.Kernel.compile", refuse)
    assert one_line(compiled, engine) == "Triton compiled no gather_rows for compute capability 8.9: why"


def test_targets_are_chosen(monkeypatch):
    assert choose_capabilities(("8.6", "9.0", "8.6")) == ("8.6", "9.0")
    # This machine has no GPU.
    assert choose_capabilities(()) == DEFAULT_CAPABILITIES
    check_target("cuda", ("8.9",))
    with pytest.raises(BuildError, match=r"compute capability 7\.5 has no INT8 product"):
        check_target("cuda", ("8.9", "7.5"))

    def put(capability):
        gpu = Gpu(name="NVIDIA", compute_capability=capability, driver="13.1")
        monkeypatch.setattr(compile_cuda, "find_gpu", lambda: GpuSearch(found=gpu, reason=""))

    put("8.9")
    assert choose_capabilities(()) == ("8.9",)
    put("7.5")
    with pytest.raises(BuildError, match=r"compute capability 7\.5 has no INT8 product"):
        choose_capabilities(())
    assert choose_capabilities(("8.6",)) == ("8.6",)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(BuildError, match=r"written in Triton: run pip install 'quasar-verifier\[trees\]'"):
        choose_capabilities(("8.6",))


def test_inspect_shows_what_kernels_take(compiled_engine):
    engine, _ = compiled_engine

    def inspect(*options):
        arguments = [sys.executable, "-m", "export", "inspect", engine, "--backend", "cuda", *options]
        return subprocess.run(
            arguments, capture_output=True, text=True, check=True, env={"COLUMNS": "200", "PATH": ""}
        ).stdout

    value = json.loads(inspect("--json"))
    (entry,) = value["kernels"]
    records = read_kernel_records(engine / entry["file"])
    fields = ("name", "threads", "registers", "spilled_bytes", "shared_bytes")
    assert entry["kernels"] == [{field: getattr(record, field) for field in fields} for record in records]
    assert all(kernel["registers"] > 0 and kernel["spilled_bytes"] == 0 for kernel in entry["kernels"])
    lines = [line.split() for line in inspect().splitlines()]
    size = (engine / value["weights"]).stat().st_size
    assert " ".join(lines[0]) == f"cuda, KV cache in float16, weights {size / 1e6:.0f} MB"
    assert lines[1] == ["compute", "capability", "8.9,", entry["file"]]
    for kernel in entry["kernels"]:
        assert [str(item) for item in kernel.values()] in lines
    with pytest.raises(EngineError, match=r"no tensorrt back end: run python -m export compile"):
        backend_json(open_directory(engine), "tensorrt")


def test_files_that_are_no_kernels_are_damaged(tmp_path):
    path = tmp_path / "kernels.zip"

    def said(read):
        with pytest.raises(DamagedEngineError) as caught:
            list(read(path))
        return str(caught.value).removeprefix(f"{path} ")

    path.write_bytes(b"no zip")
    assert said(read_kernel_records) == "holds no kernels (File is not a zip file): compile the engine again"
    record = {"name": "a", "entry": "a", "threads": 32, "shared_bytes": 0, "types": [], "registers": 1}
    record["spilled_bytes"] = 0
    for index, expected in (
        (None, "holds no kernels (\"There is no item named 'kernels.json' in the archive\"): compile the engine again"),
        ("{}", "holds no kernels (kernels.json names none): compile the engine again"),
        ("[", "holds no kernels (Expecting value: line 1 column 2 (char 1)): compile the engine again"),
        (json.dumps([record]), "lacks the kernel a: compile the engine again"),
        (json.dumps([{"name": "a"}]), "kernels.zip: a kernel lacks the field 'entry'"),
    ):
        with zipfile.ZipFile(path, "w") as archive:
            if index is not None:
                archive.writestr("kernels.json", index)
        assert said(read_kernels) == expected


def test_files_that_are_no_program_are_damaged(compiled_engine, tmp_path):
    engine, value = compiled_engine
    contract = open_directory(engine).manifest.contract
    program, path = json.loads((engine / value["program"]).read_text()), tmp_path / "program.json"
    sizes = "passes of up to 16 tokens and 8 likeliest tokens"

    def said(changed):
        write_json(path, changed)
        with pytest.raises(DamagedEngineError) as caught:
            check_program(path, read_program(path), contract)
        return str(caught.value)

    for changed, expected in (
        ([], "program.json: there is no list of steps: compile the engine again"),
        ({**program, "tensors": []}, "program.json: there are no tensors: compile the engine again"),
        (
            {**program, "reach": "x"},
            "program.json: the program.reach is 'x'; int was expected: compile the engine again",
        ),
        (
            {**program, "steps": [{"step": "dance"}]},
            "program.json: a step that this version does not know: {'step': 'dance'}: compile the engine again",
        ),
        (
            {**program, "steps": [{"step": "select"}]},
            "program.json: step select lacks the field 'input': compile the engine again",
        ),
        (
            {**program, "reach": 16},
            f"{path} is of an engine with 3 layers, {sizes}; this one has 3, 32 and 8: compile the engine again",
        ),
    ):
        assert said(changed) == expected
    path.write_text("{")
    with pytest.raises(DamagedEngineError, match=r"program\.json is no JSON .*: compile the engine again"):
        read_program(path)


@pytest.mark.parametrize(
    ("option", "value", "why", "instead"),
    [
        (
            *("--precision", "w8a8-static"),
            "makes linears with static scales, and cuda has no form of w8a8-static",
            f"take --precision {CHOICES} with --backend cuda",
        ),
        (
            *("--keep-float", "lm_head"),
            "makes linears float, and cuda has no form of float",
            "leave it out with --backend cuda",
        ),
    ],
)
def test_a_build_says_so_before_any_work(tmp_path, option, value, why, instead):
    done = command("export", "build", tmp_path, "-o", tmp_path / "engine", "--backend", "cuda", option, value)
    # A list is not repeated.
    named = option if option == "--keep-float" else f"{option} {value}"
    assert (done.returncode, done.stderr) == (2, f"error: {named} {why}: {instead}\n")
