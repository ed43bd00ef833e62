"""The commands that measure, as a process sees them, and the names that they had before."""

import json
import shutil

import pytest

from quasar.commands import COMMANDS
from tests.commands import command
from tests.runtime.test_cli import prompts

__all__ = ["prompts"]


def test_report_leaves_its_page_where_it_is_run(tiny_engine, prompts, tmp_path):
    engine = shutil.copytree(tiny_engine, tmp_path / "mine")
    done = command("evaluation", "report", engine, "--prompts", prompts, "--limit", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine-report.html").is_file()


def test_sweep_writes_a_table_and_a_plot(tiny_model, shared_engine, few_prompts, prompts, tmp_path):
    shutil.copytree(shared_engine(tiny_model, precision="fp32"), tmp_path / "fp32")
    done = command(
        *("evaluation", "sweep", tiny_model, "-o", tmp_path, "--prompts", prompts, "--calibration", few_prompts),
        *("--recipe", "fp32", "w8a8,alpha=off,head=float"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "sweep.md").read_text()
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| fp32", "| w8a8,alpha=off,head=float"]
    manifest = json.loads((tmp_path / "w8a8-alphaoff-headfloat" / "manifest.json").read_text())
    assert manifest["linears"]["lm_head"] == "float"
    assert manifest["calibration"]["source"] == "user"
    assert (tmp_path / "sweep.svg").read_text().startswith("<svg")


def test_verify_fails_when_nothing_was_drafted(tiny_engine, prompts):
    done = command(
        *("evaluation", "verify", tiny_engine, "--prompts", prompts, "--max-new-tokens", 1),
    )
    assert done.returncode == 1
    assert "nothing was drafted, so nothing was verified" in done.stderr
    assert command("evaluation", "verify", tiny_engine, "--prompts", prompts, "--drafter", "none").returncode == 0


def test_bench_writes_its_arms(tiny_engine, prompts, tmp_path):
    path = tmp_path / "bench.json"
    done = command("evaluation", "bench", tiny_engine, "--prompts", prompts, "--max-new-tokens", 8, "--json", path)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(path.read_text())["arms"]) == {
        *("quantized_plain", "quantized_speculative", "quantized_lookup")
    }


OLD_NAMES = [
    *(("runtime", name) for name in ("verify", "bench", "accuracy", "simulate")),
    *(("calibration", name) for name in ("report", "sweep")),
    *(("engines", name) for name in ("compare", "time")),
]


def test_old_names_are_in_the_table():
    assert sorted(OLD_NAMES) == sorted(
        (program, one.name)
        for one in COMMANDS
        for program in one.programs
        if one.module.startswith("evaluation.") and program != "evaluation"
    )


@pytest.mark.parametrize(("program", "name"), OLD_NAMES)
def test_old_names_are_the_same_commands(program, name):
    old, new = command(program, name, "--help"), command("evaluation", name, "--help")
    assert (old.returncode, new.returncode) == (0, 0), old.stderr + new.stderr
    assert old.stdout.replace(f"-m {program} ", "-m evaluation ") == new.stdout
    assert command(program, name, "--no-such-option").returncode == 2


def test_an_old_name_gives_the_same_json(tiny_engine, prompts, tmp_path):
    values = []
    for program in ("runtime", "evaluation"):
        path = tmp_path / f"{program}.json"
        options = ("--prompts", prompts, "--max-new-tokens", 32, "--limit", 1, "--json", path)
        # After any token that came before: what a tiny model writes is no text, and no draft at all is an error.
        drafter = ("--drafter", "prompt-lookup:1-2", "--num-draft-tokens", 2)
        assert command(program, "verify", tiny_engine, *options, *drafter).returncode == 0
        value = json.loads(path.read_text())
        values.append({name: value[name] for name in ("prompts", "identical", "answers", "tokens", "divergences")})
    assert values[0] == values[1]
