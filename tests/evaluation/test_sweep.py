"""Recipes as text, the bytes that a pass reads, and the table."""

import json
import re

import pytest

from calibration.precisions.catalog import choices
from evaluation.reused_engines import num_calibrated_on
from evaluation.sweep import (
    ALL_RECIPES,
    SweptEngine,
    build_engines,
    build_options,
    bytes_per_pass,
    markdown_table,
    possible_recipes,
    score_tasks,
    write_sweep,
)
from export.build_options import BuildOptions, Silent
from quasar.checkpoints import open_checkpoint
from quasar.errors import BuildError
from quasar.text import Prompt, read_prompts
from tests.tiny import save_tiny_model


@pytest.mark.parametrize(
    ("recipe", "folder", "asked"),
    [
        ("fp32", "fp32", {"precision": "fp32", "calibration": None}),
        ("w8a8,alpha=off", "w8a8-alphaoff", {"precision": "w8a8", "alpha": "off"}),
        (
            "w8a8-block,alpha=0.5,head=float",
            "w8a8-block-alpha0.5-headfloat",
            {"precision": "w8a8-block", "alpha": "0.5", "keep_float": ("lm_head",)},
        ),
        ("auto,kl=0.01,top1=0.9", "auto-kl0.01-top10.9", {"precision": "auto", "max_kl": 0.01, "min_top1": 0.9}),
    ],
)
def test_recipes_are_build_options(recipe, folder, asked, tmp_path):
    few = tmp_path / "few.jsonl"
    expected = BuildOptions(**{"model": "tiny", "output": tmp_path / folder, "calibration": few, **asked})
    assert build_options(recipe, "tiny", tmp_path, few) == expected


@pytest.mark.parametrize("recipe", ["w8a8,alpha", "w8a8,beta=2", "w8a8,head=half", "auto,kl=little", "auto,top1="])
def test_recipes_that_cannot_be_read(recipe, tmp_path):
    with pytest.raises(BuildError, match=r"PRECISION.* was expected"):
        build_options(recipe, "tiny", tmp_path)


def test_precisions_that_nobody_knows(tmp_path):
    with pytest.raises(BuildError, match=r"recipe 'int3,alpha=off' begins with 'int3'; w4a8, .* were expected"):
        build_options("int3,alpha=off", "tiny", tmp_path)


def test_all_recipes_are_every_combination_once(tmp_path):
    assert len(set(ALL_RECIPES)) == len(ALL_RECIPES) == 4 + 7 * 3 * 2
    for recipe in ALL_RECIPES:
        build_options(recipe, "tiny", tmp_path)


def test_recipes_that_a_model_cannot_have_are_left_out(tiny_model):
    """Its hidden size of 64 has blocks of 32, and no groups of 128."""
    possible, refused = possible_recipes(str(tiny_model), ALL_RECIPES)
    assert sorted([*possible, *refused]) == sorted(ALL_RECIPES)
    assert {recipe.split(",")[0] for recipe in refused} == {"w4a8-128", "w4a16-128"}
    assert all("needs a multiple of 128" in reason for reason in refused.values())


def test_bytes_of_a_pass(tiny_model):
    """Counted by hand: INT8 values and one float32 scale for each output, or for each 32 values."""
    spec = open_checkpoint(str(tiny_model)).spec
    linears = dict.fromkeys((linear.name for linear in spec.linears()), "float")
    values = sum(linear.inputs * linear.outputs for linear in spec.linears())
    assert bytes_per_pass(spec, linears) == 4 * values
    head = 320 * 64
    assert bytes_per_pass(spec, {**linears, "lm_head": "w8a8-token"}) == 4 * (values - head) + head + 4 * 320
    assert bytes_per_pass(spec, {**linears, "lm_head": "w8a8-block"}) == 4 * (values - head) + head + 4 * head // 32


def swept(recipe, kl, **ms):
    figures = {"mean_kl_nats": kl, "top1_agreement": 0.9, "perplexity": 30.0}
    tasks = {"exact match": {"mean": 0.1, "low": 0.05, "high": 0.2, "count": 40}} if recipe != "fp32" else {}
    return SweptEngine(
        recipe=recipe,
        directory=None,
        bytes_per_pass=2_000_000,
        fidelity={**figures, "continuation": figures},
        tasks=tasks,
        ms=ms,
    )


def test_table_has_a_dash_where_nothing_was_measured():
    table = markdown_table([swept("fp32", 0, stock={1: 4.0, 8: 5.0}), swept("w8a8", 0.02, native={1: 1.0, 8: 2.0})])
    header, _, first, second = table.splitlines()
    assert header.endswith("| exact match | MB a pass | t(1) native | t(8) native | t(1) stock | t(8) stock |")
    assert first.endswith("| 30.00 | - | 2 | - | - | 4.0 | 5.0 |")
    assert second.endswith("| 30.00 | 0.100 (0.050 to 0.200) | 2 | 1.0 | 2.0 | - | - |")


def test_files_of_a_sweep(tmp_path):
    engines = [swept("fp32", 0, stock={1: 4.0, 8: 5.0}), swept("auto,kl=0.01", 0.02, stock={1: 1.0, 8: 2.0})]
    for engine in engines:
        object.__setattr__(engine, "directory", tmp_path / engine.recipe)
    write_sweep(engines, tmp_path)
    entries = json.loads((tmp_path / "sweep.json").read_text())["engines"]
    assert [entry["recipe"] for entry in entries] == ["fp32", "auto,kl=0.01"]
    assert entries[1]["ms"] == {"stock": {"1": 1.0, "8": 2.0}}
    plot = (tmp_path / "sweep.svg").read_text()
    for label in ("fp32", "auto,kl=0.01", "t(8) in ms, stock kernels", "MB of weights read by a pass"):
        assert f">{label}</text>" in plot


def test_engines_that_are_there_are_kept(tmp_path, monkeypatch):
    (tmp_path / "w8a8-alphaoff").mkdir()
    (tmp_path / "w8a8-alphaoff" / "manifest.json").write_text("{}")
    monkeypatch.setattr("evaluation.sweep.check_engines", lambda there: None)
    asked = []
    monkeypatch.setattr("evaluation.sweep._build_apart", lambda options: asked.append(options) or 0)
    found = build_engines("tiny", tmp_path, ["w8a8,alpha=off", "fp32", "w8a8,alpha=0.5"], tmp_path / "few.jsonl")
    assert found["w8a8,alpha=0.5"] == tmp_path / "w8a8-alpha0.5"
    float_build, w8a8_build = asked
    assert float_build == BuildOptions(model="tiny", output=tmp_path / "fp32", precision="fp32")
    assert (w8a8_build.alpha, w8a8_build.calibration) == ("0.5", tmp_path / "few.jsonl")
    monkeypatch.setattr("evaluation.sweep._build_apart", lambda _: 2)
    with pytest.raises(BuildError, match="recipe 'fp32' could not be built"):
        build_engines("tiny", tmp_path, ["fp32"])


def test_engines_that_are_there_have_to_be_what_would_be_built(
    tiny_model, tiny_engine, few_prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr("evaluation.sweep._build_apart", lambda _: pytest.fail("built"))
    engine = tmp_path / "w8a8"
    engine.symlink_to(tiny_engine)
    assert build_engines(str(tiny_model), tmp_path, ["w8a8"], few_prompts) == {"w8a8": engine}
    other = save_tiny_model(tmp_path / "other", "llama", num_hidden_layers=1)
    delete = f"{re.escape(str(engine))} is %s: delete that folder"
    with pytest.raises(BuildError, match=delete % "built from another checkpoint than .*other .*"):
        build_engines(str(other), tmp_path, ["w8a8"], few_prompts)
    with pytest.raises(BuildError, match=delete % "calibrated on other prompts than the default ones"):
        build_engines(str(tiny_model), tmp_path, ["w8a8"])
    engine.rename(tmp_path / "w4a8")
    with pytest.raises(BuildError, match=r"is an engine of the precision w8a8, not w4a8: delete that folder"):
        build_engines(str(tiny_model), tmp_path, ["w4a8"], few_prompts)


def test_prompts_that_were_calibrated_on_are_counted(tiny_engine, few_prompts):
    calibrated = read_prompts(few_prompts)
    others = [Prompt(messages=({"role": "user", "content": "Something else."},))]
    assert num_calibrated_on({"w8a8": tiny_engine}, [*calibrated[:2], *others]) == 2
    assert num_calibrated_on({"w8a8": tiny_engine}, others) == 0


def test_tasks_are_scored_once(tiny_engine, tmp_path, monkeypatch):
    monkeypatch.setattr("evaluation.sweep.share_threads", lambda: None)
    prompts = tmp_path / "tasks.jsonl"
    prompts.write_text('{"category": "math", "prompt": "2 + 2 =", "reference": "4"}\n')
    engine = tmp_path / "w8a8"
    engine.symlink_to(tiny_engine)
    first = score_tasks({"w8a8": engine}, prompts, Silent().steps)
    assert first["w8a8"]["exact match"]["count"] == 1
    with monkeypatch.context() as patched:
        patched.setattr("evaluation.sweep.accuracy", lambda *_, **__: pytest.fail("scored again"))
        assert score_tasks({"w8a8": engine}, prompts, Silent().steps) == first
    prompts.write_text('{"prompt": "2 + 3 ="}\n')
    with pytest.raises(BuildError, match="tasks of recipe 'w8a8' could not be scored: no prompt has a reference"):
        score_tasks({"w8a8": engine}, prompts, Silent().steps)


def test_a_build_that_fails_says_why_and_ends_the_sweep(tmp_path, capfd):
    with pytest.raises(BuildError, match="recipe 'w8a8' could not be built"):
        build_engines(str(tmp_path / "none"), tmp_path, ["w8a8"])
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"error: {tmp_path}/none does not exist")


def test_recipes_name_precisions_that_the_build_knows():
    assert {recipe.split(",")[0] for recipe in ALL_RECIPES} == set(choices())
