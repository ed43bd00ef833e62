"""Latencies on a machine that others use: when rounds end, what counts, what is marked, and what a load mends."""

import json
from dataclasses import replace

import numpy as np
import pytest

from engines import latency, loading
from engines.contract import Contract
from engines.directory import open_directory
from engines.noise import Noise, waited_share
from engines.onnxruntime import loading as ort_loading
from engines.onnxruntime import probing
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.kernels import choose_kernels
from engines.onnxruntime.probing import this_machine
from engines.probes.row_invariance import RowInvariance
from engines.record import MachineRecord
from quasar.errors import DamagedEngineError
from tests.engines.fakes import FaultySession
from tests.few_rounds import take_as_many_rounds_as_it_takes

QUIET = Noise(agreed=True, spread=1.05, waited=0.01)
NOISY = Noise(agreed=True, spread=1.05, waited=0.5)


@pytest.fixture(autouse=True)
def _as_for_users(monkeypatch):
    take_as_many_rounds_as_it_takes(monkeypatch)


class TimedFake(FaultySession):
    """Passes of 1 ms a row take what `slowed(pass number)` times that, by a clock of its own."""

    def __init__(self, slowed):
        super().__init__()
        self.now, self.passes, self._slowed = 0.0, 0, slowed

    def run(self, token_ids, cache_length, num_logits_rows):
        self.now += 1e-3 * len(token_ids) * self._slowed(self.passes)
        self.passes += 1
        return np.zeros(num_logits_rows, np.int64)

    def measure(self, *, waited=0.0, **options):
        def threads():
            # Half of the time is a thread's own; what it waited goes by the clock, too.
            return {"1": (self.now * (1 - waited), self.now * waited)}

        return latency.measure_latency(
            self, lengths=[16], widths=(1, 4), clock=lambda: self.now, threads=threads, **options
        )


def test_a_quiet_machine_takes_the_fewest_rounds():
    session = TimedFake(lambda number: 1.0)
    found = session.measure()
    assert found.surface_ms == {16: {1: 1.0, 4: 4.0}}
    assert session.passes == 2 * (2 + 10)
    assert found.noise == Noise(agreed=True, spread=1.0, waited=0.0)
    assert not found.noise.noisy


def test_rounds_go_on_until_both_halves_have_met_a_free_moment():
    """A neighbour slows every pass four times, but for round 4 and round 31, counted after the two that warm up."""
    session = TimedFake(lambda number: 1.0 if number // 2 - 2 in (4, 31) else 4.0)
    found = session.measure()
    assert found.surface_ms == {16: {1: 1.0, 4: 4.0}}
    assert session.passes == 2 * (2 + 32)
    # Agreed, and still marked: most passes were slowed.
    assert found.noise.agreed
    assert found.noise.spread == 4.0
    assert found.noise.noisy


@pytest.mark.parametrize(("options", "rounds"), [({"most": 40}, 40), ({"seconds": 0.2}, 14), ({"least": 30}, 30)])
def test_halves_that_never_agree_end_at_a_bound_and_are_noisy(options, rounds):
    """Odd rounds are three times as slow: 5 ms and 15 ms a round."""
    session = TimedFake(lambda number: 3.0 if number // 2 % 2 else 1.0)
    found = session.measure(**{"seconds": 0.2, **options} if "least" in options else {"seconds": 1e9, **options})
    assert abs(session.passes / 2 - 2 - rounds) <= 8
    assert not found.noise.agreed
    assert found.noise.noisy


def test_a_neighbour_that_never_pauses_is_seen_by_the_time_that_threads_waited():
    """Every pass takes twice its time: minima agree, and are wrong."""
    found = TimedFake(lambda number: 2.0).measure(waited=0.5)
    assert found.noise.agreed
    assert found.noise.waited == 0.5
    assert found.noise.noisy


def test_threads_that_came_or_went_do_not_count():
    before = {"1": (1.0, 0.0), "2": (1.0, 5.0)}
    assert waited_share(before, {"1": (4.0, 1.0), "3": (0.0, 9.0)}) == 0.25
    assert waited_share({}, {}) is None


def test_the_quiet_measurement_is_better_and_of_two_noisy_ones_the_lower_times():
    def of(one, eight, noise):
        return latency.Latency(surface_ms={16: {1: one, 8: eight}}, noise=noise)

    assert latency.better(of(9.0, 9.0, QUIET), of(1.0, 1.0, NOISY)).surface_ms == {16: {1: 9.0, 8: 9.0}}
    assert latency.better(of(1.0, 1.0, NOISY), of(9.0, 9.0, QUIET)).noise == QUIET
    both = latency.better(of(1.0, 9.0, NOISY), of(2.0, 3.0, NOISY))
    assert both == of(1.0, 3.0, replace(NOISY, attempts=2))
    # A width that only one of them has stays.
    wider = latency.Latency(surface_ms={16: {1: 0.5, 32: 20.0}, 64: {1: 2.0}}, noise=NOISY)
    for pair in ((both, wider), (wider, both)):
        assert latency.better(*pair).surface_ms == {16: {1: 0.5, 8: 3.0, 32: 20.0}, 64: {1: 2.0}}


def test_a_long_context_is_timed_as_far_as_a_gigabyte_of_its_cache_goes():
    sizes = {"num_layers": 32, "num_kv_heads": 8, "head_size": 128, "vocab_size": 11}
    long = Contract(**sizes, max_length=131072, capacity=131136)
    assert latency.surface_lengths(long) == [16, 256, 1024, 4096]
    assert latency.surface_lengths(replace(long, num_layers=1, num_kv_heads=1)) == [16, 256, 1024, 131072]
    assert latency.surface_lengths(replace(long, num_layers=4096)) == [16, 256, 1024]
    assert latency.surface_lengths(replace(long, max_length=640, capacity=704)) == [16, 256, 640]


@pytest.mark.parametrize("noise", [QUIET, NOISY, Noise(agreed=False, spread=1.5, attempts=3)])
def test_noise_survives_json(noise):
    assert Noise.from_json(json.loads(json.dumps(noise.to_json()))) == noise
    assert Noise.from_json(None) is None


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"agreed": 1, "spread": 1.0},
        {"agreed": True, "spread": 0.5},
        {**QUIET.to_json(), "waited": "x"},
        {**QUIET.to_json(), "attempts": "2"},
    ],
)
def test_noise_that_does_not_fit_is_damage(value):
    with pytest.raises(DamagedEngineError, match="cost_noise"):
        Noise.from_json(value)


@pytest.fixture
def built_noisily(tiny_engine, monkeypatch, tmp_path):
    """An engine whose manifest has four times its latencies and says noisy; counts the looks at load."""
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "cache"))
    directory = open_directory(tiny_engine)
    kernels = choose_kernels(None, onnxruntime_files(directory.manifest))
    slow = {
        rows: {width: 4 * ms for width, ms in by.items()}
        for rows, by in directory.manifest.record.cost_surface_ms.items()
    }
    record = replace(
        directory.manifest.record,
        machine=this_machine(0, kernels).to_json(),
        cost_surface_ms=slow,
        cost_noise=NOISY,
    )
    return replace(directory, manifest=replace(directory.manifest, record=record)), slow


def found_at_load(monkeypatch, answers):
    """What looks at load find, one after the other: factor on latencies, noise."""
    left = list(answers)

    def measure_latency(session, *, least, seconds):
        assert (least, seconds) == (4, 1.5)
        factor, noise = left.pop(0)
        return latency.Latency(surface_ms={16: {1: factor, 8: factor}}, noise=noise)

    monkeypatch.setattr(probing, "measure_latency", measure_latency)
    return left


def test_noisy_latencies_are_mended_at_load_once(built_noisily, monkeypatch):
    directory, _ = built_noisily
    left = found_at_load(monkeypatch, [(7.0, NOISY), (1.0, QUIET)])
    first = loading.load_opened(directory).record
    assert first.cost_noise.noisy
    second = loading.load_opened(directory).record
    assert second.cost_surface_ms == {16: {1: 1.0, 8: 1.0}}
    assert second.cost_noise == QUIET
    # From the user's cache, without another look; what was probed stays.
    third = loading.load_opened(directory).record
    assert third == second
    assert left == []
    assert third.row_invariance == directory.manifest.record.row_invariance


@pytest.mark.parametrize("noise", [QUIET, None], ids=["quiet", "an older engine"])
def test_quiet_latencies_are_not_measured_again(built_noisily, monkeypatch, noise):
    directory, slow = built_noisily
    found_at_load(monkeypatch, [])
    record = replace(directory.manifest.record, cost_noise=noise)
    again = loading.load_opened(replace(directory, manifest=replace(directory.manifest, record=record)))
    assert again.record.cost_surface_ms == slow


def test_who_drafts_for_a_running_verifier_does_not_measure_beside_it(built_noisily, monkeypatch):
    directory, _ = built_noisily
    found_at_load(monkeypatch, [])
    kernels = choose_kernels(None, onnxruntime_files(directory.manifest))
    record = directory.manifest.record
    assert ort_loading._record(directory, this_machine(0, kernels), 0, None, mends=False) is record


def test_passes_of_a_second_are_not_timed_again_at_load(built_noisily, monkeypatch):
    directory, _ = built_noisily
    found_at_load(monkeypatch, [])
    slow = {16: {1: 1500.0, 8: 2000.0}, 4096: {1: 2000.0, 8: 2500.0}}
    record = replace(directory.manifest.record, cost_surface_ms=slow)
    again = loading.load_opened(replace(directory, manifest=replace(directory.manifest, record=record)))
    assert again.record == record


def test_what_waiting_added_to_passes_does_not_make_them_long():
    """A round of 14 s while threads waited for nine tenths of their time: mended in seconds on the idle machine."""
    record = MachineRecord(
        machine={},
        row_invariance=RowInvariance(chain=1, widest=32),
        exact_integers=False,
        cost_surface_ms={16: {1: 5000.0, 8: 9000.0}},
        cost_noise=replace(NOISY, waited=0.9),
    )
    assert probing.mends_quickly(record)
    assert not probing.mends_quickly(replace(record, cost_noise=NOISY))


def test_latencies_that_stay_noisy_are_kept_after_four_looks(built_noisily, monkeypatch):
    directory, _ = built_noisily
    left = found_at_load(monkeypatch, [(7.0, NOISY)] * 4)
    for _ in range(6):
        record = loading.load_opened(directory).record
    assert (record.cost_noise.attempts, len(left)) == (4, 1)


def test_a_look_at_load_times_the_passes_that_sequences_share(built_noisily):
    directory, _ = built_noisily
    loaded = loading.load_opened(directory)
    if loaded.session.max_sequences > 1:
        assert {32, 64, 128} <= loaded.record.cost_surface_ms[16].keys()


def test_a_look_at_load_leaves_the_session_s_cache_alone(built_noisily):
    directory, _ = built_noisily
    loaded = loading.load_opened(directory)
    assert loaded.record.cost_noise is not None
    assert not loaded.session.read_rows(0, 64).any()
