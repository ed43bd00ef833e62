"""`quasar roofline`: bytes, operations and times by hand, the engines that it reads, and what is refused."""

import json
from dataclasses import asdict

import pytest

from engines.directory import open_directory
from evaluation.roofline import (
    GPUS,
    SHAPES,
    GpuLimits,
    MeasuredPasses,
    ModelShape,
    engine_model,
    model_of,
    pass_limit,
    read_measured,
    roofline,
    shape_model,
)
from quasar.errors import EngineError, QuasarError
from tests.commands import command, refused
from tests.tiny import save_tiny_model

# Outputs × inputs of its linears: 8 × 4, 4 × 4, 12 × 4, 4 × 6, and 10 × 4: 160 weights, 38 outputs and 22 inputs.
TINY = model_of("tiny", ModelShape(layers=1, hidden=4, intermediate=6, heads=2, kv_heads=1, head_size=2, vocab=10))
# A byte takes a nanosecond, an operation one in INT8 and two in 16 bits.
SLOW = GpuLimits(
    title="slow", bandwidth_gb_s=1, int8_tops=0.001, float16_tflops=0.0005, memory_gb=1, compute_capability="0.0"
)
# What tests/tiny.py makes.
TINY_LLAMA = ModelShape(layers=3, hidden=64, intermediate=96, heads=4, kv_heads=2, head_size=16, vocab=320)


def sizes_of(linears):
    return [(one.name, one.outputs, one.inputs) for one in linears]


def test_bytes_and_operations_by_hand():
    assert TINY.weight_bytes == 160 + 4 * 38
    # Keys and values of a head of two values, in 16 bits.
    assert TINY.position_bytes == 8
    # Linears, five cached positions; for each of three new ones: embedding, inputs, outputs, keys and values.
    assert TINY.pass_bytes(3, 5) == 312 + 5 * 8 + 3 * (2 * (4 + 22 + 38) + 8) == 760
    # New positions see six, seven and eight: 21 pairs, four multiply-adds each for scores and as many for values.
    assert TINY.operations(3, 5) == (2 * 3 * 160, 2 * 21 * (4 + 4)) == (960, 336)
    assert TINY.held_bytes(5) == 312 + 2 * 10 * 4 + 5 * 8


def test_a_cache_of_integers_has_a_byte_a_value(shared_engine, tiny_model):
    models = [
        engine_model(open_directory(shared_engine(tiny_model, **options))) for options in ({}, {"kv_dtype": "int8"})
    ]
    # Keys and values of 3 layers, 2 heads of 16 values.
    assert [one.position_bytes for one in models] == [2 * 192, 192]
    assert [one.in_bf16().position_bytes for one in models] == [2 * 192, 2 * 192]


def test_times_by_hand():
    limit = pass_limit(TINY, SLOW, 3, 5)
    assert limit.memory_ms == pytest.approx(760e-6)
    assert limit.compute_ms == pytest.approx((960 + 2 * 336) * 1e-6)
    assert (limit.ms, limit.bound) == (limit.compute_ms, "compute")
    bf16 = pass_limit(TINY.in_bf16(), SLOW, 3, 5)
    assert bf16.memory_ms == pytest.approx((760 - 312 + 320) * 1e-6)
    assert bf16.compute_ms == pytest.approx(2 * (960 + 336) * 1e-6)


def test_float_linears_are_counted_in_16_bits():
    bf16 = TINY.in_bf16()
    assert bf16.weight_bytes == 2 * 160
    assert bf16.operations(3, 5) == (0, 960 + 336)


def test_qwen3_8b_by_hand():
    model = shape_model("qwen3-8b")
    # q/k/v, o, gate and up, down; then the LM head.
    a_layer = 4096 * (4096 + 2 * 1024) + 4096 * 4096 + 4096 * 2 * 12288 + 12288 * 4096
    scales = 4 * (36 * (6144 + 4096 + 24576 + 4096) + 151936)
    assert a_layer == 192_937_984
    assert model.weight_bytes == 36 * a_layer + 151936 * 4096 + scales == 7_574_308_352
    # With the embedding, of which a pass reads rows alone: the 8.2 billion parameters of its name, but for norms.
    assert 36 * a_layer + 2 * 151936 * 4096 == 8_190_427_136
    assert model.position_bytes == 2 * 2 * 36 * 8 * 128
    # 2.353 ms: 7.574 GB, 2048 positions of 147456 bytes, and activations of 2 MB, at 3350 GB/s.
    assert pass_limit(model, GPUS["h100"], 1, 2048).ms == pytest.approx(2.353, abs=0.002)


@pytest.mark.parametrize(("name", "billions"), [("llama-3-8b", 8.03), ("qwen3-1.7b", 2.03), ("smollm2", 0.163)])
def test_parameters_of_shapes(name, billions):
    """Those of the model cards; tied models have their embedding once there, and twice here."""
    shape = SHAPES[name]
    values = sum(one.outputs * one.inputs for one in shape.linears("float")) + shape.vocab * shape.hidden
    assert values / 1e9 == pytest.approx(billions, abs=0.005)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_token_is_bound_by_memory(gpu, shape):
    for one in roofline(shape_model(shape), [gpu], widths=[1]).passes:
        assert (one.limit.bound, one.bf16.bound) == ("memory", "memory")
        assert 1 < one.ratio < 2


def test_rates_are_dense_and_of_one_kind():
    for name, gpu in GPUS.items():
        # INT8 runs twice as fast as 16 bits; on GeForce four times, where sums in float32 take twice as long.
        assert gpu.int8_tops / gpu.float16_tflops == pytest.approx(4 if name == "rtx-4090" else 2, rel=0.02)


def test_every_pass_that_is_asked_for():
    passes = roofline(shape_model("smollm2"), ["a10", "H200"], widths=[4, 1], cached_lengths=[100]).passes
    assert [(one.gpu, one.cached_length, one.width) for one in passes] == [
        *(("a10", 100, 1), ("a10", 100, 4), ("h200", 100, 1), ("h200", 100, 4)),
    ]
    assert len(roofline(TINY).passes) == len(GPUS) * 3 * 6


def test_an_engine_has_the_sizes_of_its_model(tiny_engine):
    model = engine_model(open_directory(tiny_engine))
    expected = model_of("tiny", TINY_LLAMA)
    assert model.linears == expected.linears
    assert {name: getattr(model, name) for name in ("layers", "hidden", "heads", "kv_heads", "head_size", "vocab")} == {
        name: value for name, value in asdict(TINY_LLAMA).items() if name != "intermediate"
    }
    assert (model.weight_bytes, model.precision) == (expected.weight_bytes, "w8a8")
    # Its cache holds 512 positions: the longer of the usual lengths are left out.
    assert {one.cached_length for one in roofline(model).passes} == {256}
    with pytest.raises(EngineError, match=r"cached lengths are \[513\]; 1 to 512 were expected"):
        roofline(model, cached_lengths=[513])
    with pytest.raises(EngineError, match=r"widths are \[1, 33\]; 1 to 32 were expected"):
        roofline(model, widths=[1, 33])


def test_a_tied_float_head_is_read_as_well(shared_engine, tmp_path):
    folder = save_tiny_model(tmp_path / "tied", "llama", tie_word_embeddings=True)
    model = engine_model(open_directory(shared_engine(folder, precision="fp32")))
    assert sizes_of(model.linears) == sizes_of(TINY_LLAMA.linears("float"))
    assert model.weight_bytes == 2 * sum(one.outputs * one.inputs for one in model.linears)
    assert model.precision == "float16"


def test_a_model_that_does_not_fit():
    assert roofline(shape_model("qwen3-8b")).too_large_for() == []
    # 110000 positions are 16.2 GB, beside 7.6 of linears and 1.2 of the embedding.
    assert roofline(shape_model("qwen3-8b"), cached_lengths=[110_000]).too_large_for() == ["a10", "rtx-4090"]


def test_json(tmp_path):
    path = tmp_path / "roofline.json"
    done = command("evaluation", "roofline", "--shape", "qwen3-8b", "--gpu", "h100", "--widths", 1, 8, "--json", path)
    assert done.returncode == 0, done.stderr
    assert "a model of the hardware's limits, not a measurement" in done.stdout
    assert "bf16 / w8a8" in done.stdout
    value = json.loads(path.read_text())
    assert list(value) == ["note", "model", "gpus", "too_large_for", "passes"]
    assert value["model"]["weight_bytes"] == 7_574_308_352
    assert value["gpus"]["h100"]["bandwidth_gb_s"] == 3350
    assert [(one["cached_length"], one["width"]) for one in value["passes"]] == [
        (length, width) for length in (256, 2048, 8192) for width in (1, 8)
    ]
    for one in value["passes"]:
        assert one["ms"] == max(one["memory_ms"], one["compute_ms"])
        assert one["bf16_ratio"] == pytest.approx(one["bf16_ms"] / one["ms"])
        assert "measured_ms" not in one


def test_measured_passes_stand_beside_the_model(tmp_path, tiny_engine):
    path, output = tmp_path / "measured.json", tmp_path / "roofline.json"
    path.write_text(json.dumps({"gpu": "H100", "t_ms": {"100": {"1": 0.5, "3": 0.75}}}))
    done = command("quasar", "roofline", tiny_engine, "--gpu", "h100", "--measured", path, "--json", output)
    assert done.returncode == 0, done.stderr
    assert "share reached" in done.stdout
    passes = json.loads(output.read_text())["passes"]
    found = {(one["cached_length"], one["width"]): one for one in passes if "measured_ms" in one}
    assert {key: one["measured_ms"] for key, one in found.items()} == {(100, 1): 0.5, (100, 3): 0.75}
    assert all(one["share"] == pytest.approx(one["ms"] / one["measured_ms"]) for one in found.values())
    # The usual cached lengths and widths stay.
    assert {(256, 1), (256, 32), (100, 32)} <= {(one["cached_length"], one["width"]) for one in passes}


def test_measured_passes_of_another_gpu():
    measured = MeasuredPasses(gpu="a100", ms={256: {1: 1.0}})
    with pytest.raises(QuasarError, match="the measured passes are of a100, and --gpu is h100"):
        roofline(TINY, ["h100"], measured=measured)
    one, other = roofline(TINY, ["h100", "a100"], widths=[1], cached_lengths=[256], measured=measured).passes
    assert (one.share, other.share) == (None, other.limit.ms)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no", "is no JSON"),
        ("[]", "milliseconds by cached length and width"),
        ('{"gpu": "h100"}', "milliseconds by cached length and width"),
        ('{"gpu": "h100", "t_ms": {}}', "milliseconds by cached length and width"),
        ('{"gpu": "h100", "t_ms": {"256": {"1": -1}}}', "milliseconds by cached length and width"),
        ('{"gpu": "h100", "t_ms": {"256": {"1": NaN}}}', "milliseconds by cached length and width"),
        ('{"gpu": "h100", "t_ms": {"256": {"one": 1}}}', "milliseconds by cached length and width"),
        ('{"gpu": "v100", "t_ms": {"256": {"1": 1}}}', "the GPU is 'v100'; a10, a100, "),
    ],
)
def test_measured_files_that_are_refused(tmp_path, text, message):
    path = tmp_path / "measured.json"
    path.write_text(text)
    with pytest.raises(QuasarError, match=message):
        read_measured(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shape", "smollm2", "--gpu", "v100"), "the GPU is 'v100'; a10, a100, l40s, rtx-4090, h100, h200 are known"),
        (("--shape", "gpt-2"), "--shape is 'gpt-2'; qwen3-8b, llama-3-8b, smollm2, qwen3-1.7b are known"),
        (("somewhere", "--shape", "smollm2"), "an engine directory and --shape were given; one of them was expected"),
        ((), "neither an engine directory nor --shape was given; one of them was expected"),
        (("--shape", "smollm2", "--widths", "0"), "widths are [0]; 1 or more were expected"),
    ],
)
def test_what_is_refused(arguments, message):
    assert refused("evaluation", "roofline", *arguments) == f"error: {message}"
