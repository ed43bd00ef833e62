"""Servers of the tiny engine with chat templates that know functions."""

import json
import shutil

import pytest

import runtime
from engines.manifest import engine_hash, read_manifest
from quasar.files import sha256_file
from tests.serving.servers import running
from tests.serving.tools.templates import HERMES_TEMPLATE, LLAMA_TEMPLATE


@pytest.fixture(scope="session")
def make_engine(tiny_engine, tmp_path_factory):
    """The tiny engine with another chat template: quicker than a build. Its context holds names of functions alone."""

    def make(source):
        folder = shutil.copytree(tiny_engine, tmp_path_factory.mktemp("engines") / "engine")
        template, path = folder / "chat_template.jinja", folder / "manifest.json"
        manifest, value = read_manifest(path)
        template.write_text(source.replace("tool | tojson", "tool.function.name"))
        value["files"][template.name] = {"bytes": template.stat().st_size, "sha256": sha256_file(template)}
        hashed = engine_hash(value["files"], manifest.contract, manifest.text, manifest.backends)
        value["hashes"]["engine"] = hashed
        path.write_text(json.dumps(value))
        return folder

    return make


@pytest.fixture(scope="session")
def hermes_engine(make_engine):
    return make_engine(HERMES_TEMPLATE)


@pytest.fixture(scope="session")
def hermes(hermes_engine, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hermes")
    with running(hermes_engine, folder, "--slots", 4, "--threads", 1) as started:
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
