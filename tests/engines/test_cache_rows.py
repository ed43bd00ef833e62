"""Cache rows go out and in as the cache's own type, and become float32 where somebody compares."""

import sys
from pathlib import Path

import numpy as np
import pytest

from engines.cache_rows import CACHE_DTYPES, HostCaches, from_float32, new_cache, to_float32
from engines.gpu.cache import DeviceCache
from engines.gpu.host_device import HostDevice
from tests.engines.fakes import FaultySession

TYPES = ["float16", "bfloat16", "float32"]


@pytest.mark.parametrize("cache_type", TYPES)
def test_numbers_that_the_type_holds_survive(cache_type):
    rows = np.array([0.0, 1.0, -2.5, 96.0, 0.0078125], np.float32)
    raw = from_float32(rows, CACHE_DTYPES[cache_type])
    assert raw.dtype == CACHE_DTYPES[cache_type]
    np.testing.assert_array_equal(to_float32(raw), rows)


def test_bfloat16_is_rounded_half_to_even():
    """Exactly between two: 1 + 2^-8 goes down to 1, 1 + 3 * 2^-8 up to 1 + 2^-6."""
    rows = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20], np.float32)
    np.testing.assert_array_equal(to_float32(from_float32(rows, np.uint16)), [1, 1 + 2.0**-6, 1 + 2.0**-7])


def caches_of(cache_type, place):
    """Two caches of a session whose memory is the host's, or a device's."""
    contract = FaultySession().contract
    if place == "host":
        caches = HostCaches()
        shape = (2, contract.num_kv_heads, contract.capacity, contract.head_size)
        caches.caches = [(np.zeros(shape, CACHE_DTYPES[cache_type]), np.zeros(shape, CACHE_DTYPES[cache_type]))]
        return caches
    cache = DeviceCache(HostDevice(), contract, cache_type, None, slots=2)
    cache.allocate()
    return cache


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("cache_type", TYPES)
def test_every_bit_pattern_comes_back_from_every_cache(cache_type, place):
    """Swapped out and in: NaNs with a payload, infinities and subnormals, too, which no conversion would keep."""
    cache, dtype = caches_of(cache_type, place), CACHE_DTYPES[cache_type]
    raw = np.random.default_rng(0).integers(0, 256, 2 * 40 * 2 * dtype.itemsize, np.uint8).view(dtype)
    rows = raw.reshape(1, 2, 1, 40, 2)
    cache.write_rows(7, rows)
    read = cache.read_rows(7, 47, None)
    assert read.dtype == dtype
    assert read.tobytes() == rows.tobytes()
    assert not cache.read_rows(0, 7, [0]).any()
    # Another slot has none of it, and its own.
    assert not cache.read_rows(0, 47, [0], slot=1).any()
    cache.write_rows(3, rows, slot=1)
    assert cache.read_rows(3, 43, None, slot=1).tobytes() == cache.read_rows(7, 47, None, slot=0).tobytes()


@pytest.mark.parametrize("place", ["host", "device"])
def test_rows_of_another_type_are_refused(place):
    cache = caches_of("float16", place)
    with pytest.raises(ValueError, match="cache positions are float32; float16, the cache's own type, was expected"):
        cache.write_rows(0, np.zeros((1, 2, 1, 3, 2), np.float32))


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells what memory is a process's own")
def test_a_cache_takes_memory_as_it_is_written():
    """Page by page: one position of each head, as a short sequence writes, is far from all of a slot."""

    def own_memory():
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    before = own_memory()
    cache = new_cache((16, 4, 4096, 64), np.float32)
    assert cache.flags.writeable
    assert not cache[::5, :, ::1000].any()
    cache[:, :, 0] = 1
    assert cache[:, :, 0].all()
    # 64 pages of the 64 MB; what Python itself takes meanwhile is less.
    assert own_memory() - before < 4 << 20
