"""The registry of precisions: what is asked of each, what it gives, and that nothing else names one."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from calibration.precisions import catalog
from calibration.precisions.base import NATIVE, ONNXRUNTIME, TENSORRT, AsItIs, Operator, Refused
from calibration.precisions.catalog import PRECISIONS, choices, choices_on, ladder, precision_of, precisions_for
from calibration.recipe import make_recipe
from export.layout import native_takes
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from quasar.numerics import QuantizedWeight, dequantize_weight

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "calibration" / "precisions"
ABOVE = [ROOT / name for name in ("calibration", "export", "evaluation")]
EVERYWHERE = [*ABOVE, *(ROOT / name for name in ("plugins", "engines", "runtime", "serving"))]


def test_what_can_be_asked_for():
    assert choices() == (
        *("w4a8", "w8a8", "w8a8-block", "w4a8-128", "w4a16-128", "w4a16", "w8a8-static"),
        *("auto", "stored", "stored-a16", "fp32"),
    )
    assert [precision.name for precision in ladder()] == ["w4a8", "w8a8-token", "w8a8-block", "float"]
    assert precisions_for("auto") == ladder()
    assert [precision.name for precision in precisions_for("w8a8")] == ["w8a8-token"]
    assert choices_on(TENSORRT) == "w8a8 or w4a16-128 or w4a16 or w8a8-static"
    with pytest.raises(
        BuildError, match="--precision is 'w9a9'; w4a8, w8a8, w8a8-block, w4a8-128, w4a16-128, w4a16, w8a8-static, auto"
    ):
        precisions_for("w9a9")
    with pytest.raises(BuildError, match="precision is 'w9a9'; w4a8-128, w4a8-128-offset, w4a8, w4a8-offs"):
        precision_of("w9a9")


def test_an_unknown_choice_is_refused_before_any_work(tiny_model):
    spec = open_checkpoint(str(tiny_model)).spec
    assert native_takes(spec)
    with pytest.raises(BuildError, match="--precision is 'int8'"):
        make_recipe(spec, precision="int8", alpha="auto")


def test_a_back_end_that_a_precision_does_not_name_refuses():
    assert catalog.refusal(PRECISIONS, NATIVE) == ""
    assert catalog.refusal(["w8a8-token", "w8a8-block"], TENSORRT).startswith("TensorRT has no INT8 matmul")
    assert catalog.refusal(["float"], "abacus") == "abacus has no form of float"


SEARCHED = [precision for precision in PRECISIONS.values() if not precision.has_offsets]
WITH_OFFSETS = [precision for precision in PRECISIONS.values() if precision.has_offsets]


@pytest.mark.parametrize("precision", SEARCHED, ids=lambda precision: precision.name)
def test_what_is_stored_is_what_is_fake_quantized(precision):
    """Weights in numpy, as the export stores them, are those of the search in torch, bit for bit."""
    random = np.random.default_rng(0)
    weight = (random.standard_normal((48, 128)) * 10.0 ** random.integers(-3, 3, (48, 1))).astype(np.float32)
    weight[3], weight[4, :32] = 0, 0
    tensor = torch.from_numpy(weight)
    scale = precision.scales_of(tensor)
    stored = precision.quantize(weight)
    found = stored
    if precision.is_quantized:
        assert isinstance(stored, QuantizedWeight)
        np.testing.assert_array_equal(precision.round_weight(tensor, scale).numpy(), stored.values)
        found = dequantize_weight(stored)
        if precision.weight_bits == 4:
            # Scales are numbers of 16 bits, and stay so.
            np.testing.assert_array_equal(stored.scale.astype(np.float16), stored.scale)
            np.testing.assert_array_equal(precision.stored_scales(stored.scale), stored.scale)
            assert precision.num_bytes(48, 128) == stored.values.size // 2 + 2 * stored.scale.size
        else:
            assert precision.num_bytes(48, 128) == stored.values.nbytes + stored.scale.nbytes
    np.testing.assert_array_equal(precision.rounded(tensor, scale).numpy(), found)


@pytest.mark.parametrize("precision", WITH_OFFSETS, ids=lambda precision: precision.name)
def test_offsets_are_brought_by_checkpoints_alone(precision):
    assert precision.choice not in choices()
    with pytest.raises(BuildError, match=f"--precision is '{precision.choice}'"):
        precisions_for(precision.choice)
    weight = np.random.default_rng(1).standard_normal((48, 256)).astype(np.float32) + 0.5
    stored = precision.quantize(weight)
    assert stored.values.min() == 0
    assert stored.values.max() == 15
    assert precision.num_bytes(48, 256) == stored.values.size // 2 + 2 * stored.scale.size + 2 * stored.offset.size
    # Half a step, and the rounding of the offset to a float16.
    step = np.repeat(stored.scale, precision.group, axis=1)
    bound = step / 2 + np.repeat(np.abs(stored.offset), precision.group, axis=1) * 2**-11 + 1e-6
    assert (np.abs(dequantize_weight(stored) - weight) <= bound).all()


@pytest.mark.parametrize("precision", PRECISIONS.values(), ids=lambda precision: precision.name)
def test_every_back_end_is_answered(precision):
    values = np.ones((64, 128), np.int8)
    scale = np.ones((64, 128 // getattr(precision, "group", 32)), np.float32)
    offset = np.ones_like(scale) if precision.has_offsets else None
    for backend in (ONNXRUNTIME, NATIVE, TENSORRT):
        match precision.lowering(backend):
            case Operator() as operator:
                packed, scales = operator.pack(QuantizedWeight(values=values, scale=scale, offset=offset), False)
                assert 8 * packed.nbytes == precision.weight_bits * values.size
                # With wide groups a scale may be repeated.
                assert scales is None or scales.size % scale.size == 0
            case Refused(reason=reason):
                assert reason
                assert not reason.endswith(".")
            case lowering:
                assert lowering == AsItIs()


@pytest.mark.parametrize(
    "precision", [one for one in PRECISIONS.values() if one.drafts_as], ids=lambda precision: precision.name
)
def test_what_drafts_reads_the_same_stored_weights(precision):
    coarser = PRECISIONS[precision.drafts_as]
    weight = np.random.default_rng(4).standard_normal((40, 256)).astype(np.float32)
    own, other = precision.quantize(weight), coarser.quantize(weight)
    for part in ("values", "scale", "offset"):
        np.testing.assert_array_equal(getattr(own, part), getattr(other, part))
    native = [one.lowering(NATIVE) for one in (precision, coarser)]
    for gated in (False, True):
        packed = [one.pack(own, gated) for one in native]
        for mine, its in zip(*packed, strict=True):
            np.testing.assert_array_equal(mine, its)
    assert native[0].attributes(40, 256) == native[1].attributes(40, 256)
    assert native[0].op_type != native[1].op_type
    # And what sets them apart: activations.
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(precision.round_activations(x, 0.0), x)
    assert not torch.equal(coarser.round_activations(x, 0.0), x)


def constants(path):
    """String constants of a module, docstrings apart."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in texts:
            yield node


def test_no_other_module_names_a_precision():
    """Not as a value anywhere, not within a string of calibration or above. Triton calls a float32 "fp32" as well."""
    named = {*PRECISIONS, *choices()} - {"float", "auto", "stored"}
    within = re.compile("|".join(sorted(map(re.escape, named), key=len, reverse=True)))
    found = []
    for package in EVERYWHERE:
        for path in package.rglob("*.py"):
            if FOLDER in path.parents or (ROOT / "plugins" / "gpu") in path.parents:
                continue
            found += [
                f"{path}:{node.lineno}: {node.value!r}"
                for node in constants(path)
                if node.value in named or (package in ABOVE and within.search(node.value))
            ]
    assert not found, "\n".join(found)


def test_no_other_module_compares_precisions_by_name():
    """ "float" and "auto" mean other things too: only what compares them with a precision is wrong."""
    compared = re.compile(r"precision\S* (==|!=|in|not in) .*[\"'](float|auto)[\"']")
    for package in EVERYWHERE:
        for path in package.rglob("*.py"):
            if FOLDER not in path.parents:
                assert not compared.search(path.read_text(encoding="utf-8")), path
