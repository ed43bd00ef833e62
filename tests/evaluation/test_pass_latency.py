"""`python -m evaluation time`: the JSON's form, what is refused, and caches that were written."""

import json

import numpy as np
import pytest

from engines.latency import measure_latency
from engines.loading import load_engine
from tests.commands import command
from tests.plugins.cpu.operators import LEVELS, needs_library


def run_time(*arguments):
    return command("engines", "time", *arguments)


@needs_library
def test_the_json_has_what_was_asked_for(tiny_engine, tmp_path):
    output = tmp_path / "time.json"
    done = run_time(
        *(str(tiny_engine), "--kernels", "stock", "native", "--widths", "1", "2", "8", "--rows", "16", "256"),
        *("--repeats", "2", "--json", str(output)),
    )
    assert done.returncode == 0, done.stderr
    value = json.loads(output.read_text())
    assert list(value) == ["kernels", "ms", "bandwidth_gb_s", "floor_ms"]
    assert value["kernels"] == {"stock": "stock", "native": f"native {LEVELS[0]}"}
    assert {name: {length: list(by) for length, by in part.items()} for name, part in value["ms"].items()} == {
        name: {"16": ["1", "2", "8"], "256": ["1", "2", "8"]} for name in ("stock", "native")
    }
    assert all(ms > 0 for part in value["ms"].values() for by in part.values() for ms in by.values())
    assert value["bandwidth_gb_s"] > 0
    assert value["floor_ms"]["16"] < value["floor_ms"]["256"]
    assert "stock / native" in done.stdout
    assert "GB/s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--widths", "0"), "widths are [0]; 1 to 32 were expected"),
        (("--rows", "9999"), "cached lengths are [9999]; 1 to 512, the engine's max length, were expected"),
        (("--kernels", "fast"), "kernels is 'fast'; 'stock' or 'native' was expected"),
    ],
)
def test_what_is_refused(tiny_engine, arguments, message):
    done = run_time(str(tiny_engine), *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_costs_are_measured_over_a_cache_that_was_written(tiny_engine):
    """Untouched memory is one page of zeros, and far too fast to read."""
    session = load_engine(tiny_engine).session
    assert not session.read_rows(0, 200).any()
    measure_latency(session, lengths=[200], widths=[1], least=2, most=2)
    rows = session.read_rows(0, 200)
    assert (np.abs(rows).max(axis=(2, 4)) > 0).all()
