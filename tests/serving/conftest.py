"""A server of the tiny engine, for tests that leave it as it was."""

import pytest

import runtime
from tests.serving.servers import running


@pytest.fixture(scope="session")
def server(tiny_engine, tmp_path_factory):
    with running(
        tiny_engine, tmp_path_factory.mktemp("server"), "--slots", 4, "--queue-limit", 8, "--threads", 1
    ) as started:
        yield started


@pytest.fixture(scope="session")
def engine(tiny_engine):
    """The same engine in this process: what its answers are compared with."""
    with runtime.load(tiny_engine, threads=1) as loaded:
        yield loaded
