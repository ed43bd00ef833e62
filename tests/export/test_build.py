"""The build as a user sees it: what it writes, what it refuses, and that it can be killed anywhere."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration import recipe as recipes
from calibration.precision_search import Bound
from engines.directory import open_directory
from engines.onnxruntime.executed import check_integer_matmuls
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import Kernels
from export import build as export_build
from export import engine_figures
from export.build import build
from export.build_options import BuildOptions
from export.quantize import check_bound
from plugins.cpu import toolchain
from quasar.errors import BuildError, EngineError
from tests.export.killed_build import start_build
from tests.tiny import save_tiny_model

STAGES = ("text", "calibrate", "export", "lower", "probe", "fidelity", "successors")


@pytest.fixture
def start_child(tiny_model, few_prompts):
    """Starts a build of the tiny model in a process of its own."""
    children = []

    def start(output: Path, stop_after: str = ""):
        children.append(start_build(tiny_model, output, few_prompts, stop_after))
        return children[-1]

    yield start
    for process in children:
        process.kill()
        process.join()


def wait(process) -> int:
    """The exit code; minus the signal's number where one killed the process."""
    process.join()
    return process.exitcode


def is_absent_or_whole(directory: Path) -> bool:
    if not directory.exists():
        return False
    open_directory(directory)
    return True


def test_directory_holds_what_the_manifest_lists(tiny_engine):
    manifest = open_directory(tiny_engine).manifest
    on_disk = {path.relative_to(tiny_engine).as_posix() for path in tiny_engine.rglob("*") if path.is_file()}
    assert on_disk == set(manifest.files) | {"manifest.json"}
    assert set(manifest.linears.values()) == {"w8a8-token"}
    assert manifest.record.row_invariance.chain == 1
    assert manifest.record.row_invariance.tree == toolchain.LIBRARY.is_file()
    assert set(manifest.record.cost_surface_ms) == {16, 256, 512}
    assert manifest.fidelity["tokens"] > 500
    assert manifest.contract.top_k == 8
    assert not tiny_engine.with_name("engine.partial").exists()


def test_same_inputs_give_the_same_files(tiny_model, tiny_engine, few_prompts, tmp_path):
    options = BuildOptions(model=str(tiny_model), output=tmp_path / "engine", calibration=few_prompts)
    again = open_directory(build(options)).manifest
    assert again.files == open_directory(tiny_engine).manifest.files
    assert again.engine_hash == open_directory(tiny_engine).manifest.engine_hash


def test_keep_float_leaves_the_named_linears(tiny_model, build_engine):
    manifest = open_directory(build_engine(tiny_model, keep_float=("*.v_proj", "lm_head"))).manifest
    kept = {name for name, precision in manifest.linears.items() if precision == "float"}
    assert kept == {"lm_head", *(f"layers.{layer}.self_attn.qkv_proj" for layer in range(3))}


def test_precision_auto_raises_linears_until_the_engine_meets_its_bound(tiny_model, tiny_engine, build_engine):
    plain = open_directory(tiny_engine).manifest
    bound = 3 * plain.fidelity["mean_kl_nats"]
    manifest = open_directory(build_engine(tiny_model, precision="auto", max_kl=bound)).manifest
    assert manifest.fidelity["mean_kl_nats"] <= bound
    raised = [name for name, precision in manifest.linears.items() if precision != "w4a8"]
    # At 4 bits everywhere this model is twenty times as far from the float one as at 8.
    assert len(raised) > 0
    assert manifest.record.row_invariance.chain == 1
    assert manifest.calibration["search"]["raised"][-1]["step"] == f"{len(raised)} linears raised"


def test_the_default_is_in_blocks_where_answers_are_too_far_off(tiny_model, few_prompts, tmp_path, monkeypatch):
    """The text of the search says so at once, or the finished engine does on the evaluation prompts."""
    engines = {}
    for judge in ("fitted text", "evaluation prompts"):
        with monkeypatch.context() as patch:
            if judge == "fitted text":
                patch.setattr(recipes, "GATE_KL", 1e-9)
            else:
                patch.setattr(export_build, "passes_gate", lambda recipe, fidelity: False)
            options = BuildOptions(
                model=str(tiny_model), output=tmp_path / judge, calibration=few_prompts, max_length=256, effort="quick"
            )
            engines[judge] = open_directory(build(options)).manifest
        manifest = engines[judge]
        assert manifest.calibration["gate"]["judged_on"] == judge
        assert manifest.precision == "w8a8-block"
        assert set(manifest.linears.values()) == {"w8a8-block"}
    assert len({one.hashes["weights"] for one in engines.values()}) == 1


@pytest.mark.parametrize("large", [False, True])
def test_the_portable_graph_is_checked_whatever_its_size(tiny_engine, large, monkeypatch):
    """Of a large model its first layers; a linear that is not there is named either way."""
    directory = open_directory(tiny_engine)
    manifest, files = directory.manifest, onnxruntime_files(directory.manifest)
    if large:
        monkeypatch.setattr(engine_figures, "_LARGE_BYTES", 0)
    stock = Graphs.of(directory.path, files, Kernels())
    checked = []

    def check(ran, names):
        checked.extend(names)
        return check_integer_matmuls(ran, names)

    monkeypatch.setattr(engine_figures, "check_integer_matmuls", check)
    engine_figures._check_stock_integers(stock, manifest.contract, manifest.linears, exact_integers=True)
    layers = {name.split(".")[1] for name in checked if name.startswith("layers.")}
    assert layers == ({"0", "1"} if large else {"0", "1", "2"})
    assert ("lm_head" in checked) == (not large)
    linears = {**manifest.linears, "layers.0.other": "w8a8-token"}
    with pytest.raises(EngineError, match=r"layers\.0\.other ran as nothing"):
        engine_figures._check_stock_integers(stock, manifest.contract, linears, exact_integers=True)


def test_a_bound_that_no_engine_meets_says_what_was_reached(tiny_model, few_prompts, tmp_path):
    options = BuildOptions(
        model=str(tiny_model), output=tmp_path / "engine", calibration=few_prompts, precision="auto", max_kl=1e-12
    )
    message = r"is met by no engine with a quantized linear: the best reached KL \S+, top-1 \S+; ask for less"
    with pytest.raises(BuildError, match=message):
        build(options)
    assert not (tmp_path / "engine").exists()


def test_an_engine_that_misses_its_bound_is_no_engine():
    bound, linears = Bound(max_kl=0.01), {"lm_head": "w8a8-block", "layers.0.mlp.down_proj": "w4a8"}
    check_bound(bound, {"mean_kl_nats": 0.01, "top1_agreement": 0.5}, linears)
    message = r"the bound \(KL at most 0.01\) was not met: .* KL 0.011, top-1 0.5 .* with 1 of 2 linears above"
    with pytest.raises(BuildError, match=message):
        check_bound(bound, {"mean_kl_nats": 0.011, "top1_agreement": 0.5}, linears)


def test_blocks_need_inputs_that_they_divide(tmp_path, few_prompts):
    model = save_tiny_model(tmp_path / "model", "llama", intermediate_size=88)
    with pytest.raises(
        BuildError, match=r"layers.0.mlp.down_proj has 88 inputs; --precision w8a8-block needs a multiple"
    ):
        build(BuildOptions(model=str(model), output=tmp_path / "engine", precision="w8a8-block"))


def test_killed_after_each_stage_goes_on_from_there(tiny_model, few_prompts, start_child, tmp_path):
    output = tmp_path / "engine"
    state = tmp_path / "engine.partial" / ".build" / "state.json"
    done = {}
    for stage in STAGES:
        assert wait(start_child(output, stage)) == -signal.SIGKILL
        assert not output.exists()
        stages = json.loads(state.read_text())["stages"]
        assert stage in stages.keys() - done.keys()
        # What was done stays done.
        assert stages.items() >= done.items()
        done = stages
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
    assert is_absent_or_whole(output)


@pytest.mark.parametrize("kills", [8, pytest.param(20, marks=pytest.mark.full)])
def test_killed_at_random_times_leaves_nothing_half_built(kills, tiny_model, few_prompts, start_child, tmp_path):
    """Kills spread over the length of a build; each next build goes on with what the last one left."""
    chance = random.Random(5)
    output = tmp_path / "engine"
    process = start_child(output)
    start = time.monotonic()
    assert wait(process) == 0
    length = time.monotonic() - start
    assert is_absent_or_whole(output)
    for number in range(kills):
        output = tmp_path / f"engine-{number % 4}"
        process = start_child(output)
        time.sleep(chance.uniform(0, length))
        process.kill()
        process.join()
        is_absent_or_whole(output)
    for number in range(4):
        output = tmp_path / f"engine-{number}"
        if not output.exists():
            build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
        assert is_absent_or_whole(output)


def test_libraries_that_are_imported_ahead_are_whole():
    """Whoever needs them before the thread has imported them waits for it, and gets no module that is half made."""
    needs = "import export.build; export.build.import_ahead(); from transformers import AutoModelForCausalLM"
    done = subprocess.run([sys.executable, "-c", needs], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_finished_partial_directory_is_only_renamed(tiny_model, few_prompts, tmp_path):
    output = tmp_path / "engine"
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    # As after a kill between writing the manifest and the rename.
    output.rename(tmp_path / "engine.partial")
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_other_inputs_do_not_mix(tiny_model, few_prompts, start_child, tmp_path):
    output = tmp_path / "engine"
    assert wait(start_child(output, "text")) == -signal.SIGKILL
    with pytest.raises(BuildError, match=r"unfinished build with other inputs \(alpha differ\): delete it"):
        build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts, alpha=0.7))


def test_two_builds_do_not_share_a_directory(tiny_model, tmp_path):
    from filelock import FileLock

    scratch = tmp_path / "engine.partial" / ".build"
    scratch.mkdir(parents=True)
    with FileLock(scratch / "lock"), pytest.raises(BuildError, match="another build is working"):
        build(BuildOptions(model=str(tiny_model), output=tmp_path / "engine"))


def test_existing_output_is_kept_unless_forced(tiny_model, few_prompts, tmp_path):
    output = tmp_path / "engine"
    build(BuildOptions(model=str(tiny_model), output=output, precision="fp32"))
    with pytest.raises(BuildError, match="exists: choose another -o, or replace it with --force"):
        build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
    assert open_directory(output).manifest.precision == "fp32"
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts, force=True))
    assert open_directory(output).manifest.precision == "w8a8"
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_a_context_of_64_tokens_builds_and_reports(tiny_model, build_engine, few_prompts):
    from contextlib import nullcontext

    from evaluation.report import report
    from quasar.text import read_prompts

    engine = build_engine(tiny_model, max_length=64)
    figures = report(
        engine, read_prompts(few_prompts), float_model=None, steps=lambda what, total: nullcontext(lambda count: None)
    )
    assert figures["tokens"] <= 3 * 32
    assert figures["calibration_overlap"] == 3


def test_leftovers_of_unknown_inputs_are_not_published(tiny_model, few_prompts, tmp_path):
    """As after a kill while the state is removed: files are there, but nothing says what from."""
    scratch = tmp_path / "engine.partial" / ".build"
    scratch.mkdir(parents=True)
    (tmp_path / "engine.partial" / "calibration.json").write_text("{}")
    (tmp_path / "engine.partial" / ".tokenizer.json.abc.tmp").write_text("half")
    engine = build(BuildOptions(model=str(tiny_model), output=tmp_path / "engine", precision="fp32"))
    assert "calibration.json" not in open_directory(engine).manifest.files
    assert not list(engine.rglob("*.tmp"))


def test_folders_of_the_user_survive(tiny_model, few_prompts, tmp_path, monkeypatch):
    output = tmp_path / "engine"
    options = BuildOptions(model=str(tiny_model), output=output, precision="fp32", force=True)
    (tmp_path / "engine.partial").mkdir()
    (tmp_path / "engine.partial" / "thesis").write_text("mine")
    with pytest.raises(BuildError, match="is no unfinished build of these inputs"):
        build(options)
    (tmp_path / "engine.partial" / "thesis").rename(tmp_path / "thesis")
    (tmp_path / "engine.partial").rmdir()

    (tmp_path / "engine.replaced").mkdir()
    (tmp_path / "thesis").rename(tmp_path / "engine.replaced" / "thesis")
    with pytest.raises(BuildError, match="is in the way and no engine directory"):
        build(options)
    assert (tmp_path / "engine.replaced" / "thesis").read_text() == "mine"
    (tmp_path / "engine.replaced").rename(output)
    # It appeared under the output's name while the build ran.
    with monkeypatch.context() as patch:
        patch.setattr("export.build.check_target", lambda target, force: None)
        with pytest.raises(BuildError, match="it is never overwritten"):
            build(options)
    assert (output / "thesis").read_text() == "mine"
    output.rename(tmp_path / "elsewhere")
    assert is_absent_or_whole(build(options))


def test_a_link_stands_for_the_directory(tiny_model, few_prompts, tmp_path):
    build(BuildOptions(model=str(tiny_model), output=tmp_path / "real", precision="fp32"))
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build(BuildOptions(model=str(tiny_model), output=tmp_path / "link", calibration=few_prompts, force=True))
    assert (tmp_path / "link").is_symlink()
    assert open_directory(tmp_path / "real").manifest.precision == "w8a8"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "real"]


def test_foreign_directory_is_never_overwritten(tiny_model, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    with pytest.raises(BuildError, match="no engine directory: it is never overwritten"):
        build(BuildOptions(model=str(tiny_model), output=tmp_path / "photos", force=True))
    assert (tmp_path / "photos" / "cat.jpg").read_text() == "meow"


def test_calibration_text_must_not_be_evaluated_on(tiny_model, tmp_path):
    from calibration.texts import default_prompts

    shared = default_prompts("evaluation")[2].text.upper()
    (tmp_path / "own.jsonl").write_text(
        json.dumps({"prompt": "Something else"}) + "\n" + json.dumps({"prompt": shared})
    )
    with pytest.raises(BuildError, match=r"calibration prompt 2 .* is also in the project's evaluation prompts"):
        build(BuildOptions(model=str(tiny_model), output=tmp_path / "engine", calibration=tmp_path / "own.jsonl"))
    assert not (tmp_path / "engine.partial").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "--alpha is 1.5; auto, off, or a number from 0"),
        ({"alpha": "strong"}, "--alpha is strong; auto, off, or a number from 0"),
        ({"precision": "auto"}, "--precision auto needs a bound: --max-kl X"),
        ({"precision": "auto", "max_kl": 0.0}, "--max-kl is 0; a number of nats above 0"),
        ({"precision": "auto", "min_top1": 1.5}, "--min-top1 is 1.5; a share above 0 and up to 1"),
        ({"max_kl": 0.01}, "--max-kl and --min-top1 have a meaning with --precision auto alone"),
        ({"keep_float": ("layers.9.*",)}, "--keep-float 'layers.9.\\*' matches no linear"),
        ({"max_length": 4096}, "--max-length 4096 is more than the model's context of 512"),
        ({"max_length": 8}, "--max-length 8 is too short"),
        ({"precision": "fp32", "alpha": 0.5}, "--alpha has no meaning with --precision fp32"),
        ({"weights": "awq"}, "--weights awq rounds linears of one precision, and without --precision, or with auto"),
        ({"weights": "gptq", "precision": "auto", "max_kl": 1.0}, "they may get another one: say which"),
        ({"weights": "awq", "alpha": "off"}, "--weights awq is a search, and --alpha off leaves searches out"),
        ({"precision": "fp32", "weights": "gptq"}, "--weights has no meaning with --precision fp32"),
        ({"precision": "auto", "max_kl": 0.1, "skip_layers": "1"}, "--precision auto aims at a fidelity"),
    ],
)
def test_options_that_cannot_be_honoured(options, message, tiny_model, tmp_path):
    with pytest.raises(BuildError, match=message):
        build(BuildOptions(model=str(tiny_model), output=tmp_path / "engine", **options))
    assert not (tmp_path / "engine.partial").exists()


def test_calibration_takes_as_many_tokens_as_were_asked_for(tiny_model, few_prompts, tmp_path):
    """Whole texts: the first, and those that fit beside it."""
    tokens = {}
    for most in (None, 1, 180):
        options = BuildOptions(
            model=str(tiny_model),
            output=tmp_path / f"engine-{most}",
            effort="quick",
            calibration=few_prompts,
            calibration_tokens=most,
        )
        record = json.loads((build(options) / "manifest.json").read_text())["calibration"]
        tokens[most] = record["prompts"], record["tokens"]
    assert [count for count, _ in tokens.values()] == [3, 1, 2]
    assert tokens[1][1] < tokens[180][1] <= 180 < tokens[None][1]


def test_interrupted_force_keeps_an_engine(tiny_model, few_prompts, tmp_path):
    """Killed while the old directory is set aside: the finished one is put in place by the next build."""
    output = tmp_path / "engine"
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts))
    output.rename(tmp_path / "engine.partial")
    save_tiny_model(tmp_path / "other", "llama", seed=9)
    build(BuildOptions(model=str(tmp_path / "other"), output=tmp_path / "engine.replaced", calibration=few_prompts))
    build(BuildOptions(model=str(tiny_model), output=output, calibration=few_prompts, force=True))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "other"]
