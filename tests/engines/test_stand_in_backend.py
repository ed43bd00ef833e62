"""A back end is one folder and one registration: here a class of this file, registered by the test alone."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest

import runtime
from engines.backends import BACKENDS, Backend
from engines.directory import open_directory
from engines.fields import check_fields
from engines.loaded import LoadedEngine
from engines.machine import cpu_machine
from engines.probes.driver import brief_plan, run_probes
from export.inspect_backend import print_backend
from runtime.testing import TableSession


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """`backends.stand-in`: a file with the number that is added to a token to make the next one."""

    step: str

    @property
    def names(self):
        return (self.step,)

    def check(self, contract):
        """Nothing depends on sizes."""

    def to_json(self):
        return {"step": self.step}


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInOptions:
    extra: int = 0


class StandIn(Backend):
    def read_section(self, value):
        return Part(**check_fields("backends.stand-in", value, {"step": str}))

    def load(self, directory, options):
        step = int(directory.file(directory.manifest.backends[self.name].step).read_text()) + options.extra
        contract = directory.manifest.contract
        session = TableSession(
            lambda context: (context[-1] + step) % contract.vocab_size, vocab_size=contract.vocab_size, max_length=80
        )
        machine = cpu_machine(library="table 1", provider="cpu", threads=1, kernels="table")
        record = run_probes(session, machine, brief_plan(session.contract))
        return LoadedEngine(directory=directory, record=record, backend=self.name, session=session)


# The registration ends here.


@pytest.fixture
def engine(tiny_engine, tmp_path, monkeypatch):
    """A built engine to which the stand-in was added."""
    monkeypatch.setitem(BACKENDS, "stand-in", StandIn(name="stand-in", folder="stand-in", options=StandInOptions))
    path = shutil.copytree(tiny_engine, tmp_path / "engine")
    (path / "stand-in").mkdir()
    (path / "stand-in" / "step").write_text("3")
    value = json.loads((path / "manifest.json").read_text())
    value["backends"]["stand-in"] = {"step": "stand-in/step"}
    sha256 = "4e07408562bedb8b60ce05c1decfe3ad16b72230967de01f640b7e4729b49fce"
    value["files"]["stand-in/step"] = {"bytes": 1, "sha256": sha256}
    (path / "manifest.json").write_text(json.dumps(value))
    return path


def test_it_is_loaded_probed_and_generates(engine):
    with runtime.load(engine, backend="stand-in") as loaded:
        assert (loaded.backend, loaded.kernels) == ("stand-in", "")
        assert (loaded.record.row_invariance.chain, loaded.record.row_invariance.tree) == (1, True)
        assert set(loaded.record.cost_surface_ms) == {16, 80}
        made = loaded.generate([1, 2, 3], max_new_tokens=5, ignore_eos=True)
        assert made.token_ids == (6, 9, 12, 15, 18)
    # Its options alone name it; the engine is the same one, and still ONNX Runtime's where nobody chooses.
    with runtime.load(engine, options=StandInOptions(extra=1)) as loaded:
        assert loaded.generate([1], max_new_tokens=2, ignore_eos=True).token_ids == (5, 9)
    assert runtime.load(engine).backend == "onnxruntime"


def test_inspect_shows_it(engine, capsys):
    print_backend(open_directory(engine), "stand-in")
    assert capsys.readouterr().out == "step: stand-in/step\n"


def test_its_part_is_checked(engine):
    value = json.loads((engine / "manifest.json").read_text())
    value["backends"]["stand-in"] = {"stride": 3}
    (engine / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(Exception, match=r"backends.stand-in has an unknown field 'stride': build the engine again"):
        open_directory(engine)


def test_without_it_the_engine_runs_all_the_same(engine):
    code = f"import runtime; print(runtime.load({str(engine)!r}).backend)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "onnxruntime\n"
