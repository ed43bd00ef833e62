"""Servers of the tiny engine with chat templates that know functions."""

import pytest

import runtime
from tests.serving.servers import running
from tests.serving.tools.templates import HERMES_TEMPLATE, LLAMA_TEMPLATE


@pytest.fixture(scope="session")
def hermes_engine(make_engine):
    return make_engine(HERMES_TEMPLATE)


@pytest.fixture(scope="session")
def make_engine(tiny_engine, tmp_path_factory):
    """The tiny engine with another chat template."""
    import shutil

    def make(template):
        folder = shutil.copytree(tiny_engine, tmp_path_factory.mktemp("engines") / "engine")
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return make


@pytest.fixture(scope="session")
def hermes(hermes_engine, tmp_path_factory):
    with running(hermes_engine, tmp_path_factory.mktemp("hermes"), "--slots", 4, "--threads", 1) as started:
        yield started


@pytest.fixture(scope="session")
def llama(make_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    with running(make_engine(LLAMA_TEMPLATE), folder, "--slots", 2, "--threads", 1) as started:
        yield started


@pytest.fixture(scope="session")
def loaded(hermes_engine):
    """The hermes engine in this process."""
    with runtime.load(hermes_engine, threads=1) as engine:
        yield engine
