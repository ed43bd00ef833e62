"""Engine directories that are damaged, foreign, newer or hostile are refused in one sentence; other machines probe."""

import json
import shutil

import pytest

from engines import directory as directory_module
from engines import loading
from engines.directory import open_directory
from engines.machine import user_cache
from engines.manifest import Manifest
from engines.onnxruntime import loading as onnxruntime_loading
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from plugins.cpu import toolchain
from plugins.sample_token import SAMPLER
from quasar.errors import DamagedEngineError, EngineError, NewerEngineError
from quasar.files import sha256_json
from tests.graphs import as_built_earlier
from tests.tiny import save_tiny_model


@pytest.fixture
def engine(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


def edit(engine, change):
    """Change the manifest and, as an attacker would, make its hashes fit again."""
    path = engine / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    try:
        manifest = Manifest.from_json(value)
        value["hashes"]["engine"] = manifest.engine_hash
    except EngineError:
        pass
    path.write_text(json.dumps(value))


def test_manifest_survives_a_round_trip(engine):
    raw = (engine / "manifest.json").read_text()
    assert json.dumps(Manifest.from_json(json.loads(raw)).to_json(), indent=2, ensure_ascii=False) + "\n" == raw


def test_golden_keys(engine):
    value = json.loads((engine / "manifest.json").read_text())
    assert list(value) == [
        "format_version",
        "producer",
        "model",
        "precision",
        "sampler",
        "contract",
        "text",
        "fidelity",
        "row_invariance",
        "cost_curve_ms",
        "cost_surface_ms",
        "cost_noise",
        "machine",
        "build_seconds",
        "backends",
        "calibration",
        "linears",
        "hashes",
        "files",
    ]
    assert value["format_version"] == 1
    # Native operators, where they were compiled, make trees exact.
    trees = toolchain.LIBRARY.is_file()
    assert value["row_invariance"] == {
        "chain": 1,
        "widest": 32,
        "boundaries": [],
        "tree": trees,
        "prefill": True,
        "batch": trees,
    }
    assert list(value["cost_curve_ms"]) == ["1", "2", "3", "4", "6", "8", "12", "16"]
    assert value["cost_curve_ms"] == value["cost_surface_ms"]["256"]


def test_an_earlier_engine_keeps_its_hash(engine):
    now = open_directory(engine).manifest
    assert now.contract.top_k == 8
    as_built_earlier(engine)
    value = json.loads((engine / "manifest.json").read_text())
    manifest = open_directory(engine).manifest
    assert manifest.contract.top_k == 0
    assert manifest.to_json() == value
    # As the version computed it that wrote the contract so.
    assert "top_k" not in value["contract"]
    files = {name: entry["sha256"] for name, entry in value["files"].items()}
    parts = {"contract": value["contract"], "text": value["text"], "onnxruntime": value["backends"]["onnxruntime"]}
    assert manifest.engine_hash == sha256_json({"files": files, **parts})
    assert manifest.engine_hash != now.engine_hash


def test_no_directory_and_no_manifest(tmp_path):
    with pytest.raises(EngineError, match="is no engine directory: build one with"):
        open_directory(tmp_path / "nothing")
    (tmp_path / "engine.partial").mkdir()
    with pytest.raises(EngineError, match=r"has no manifest\.json \(a build that did not finish\)"):
        open_directory(tmp_path / "engine.partial")


def test_newer_format_is_refused_whatever_else_it_holds(engine):
    (engine / "manifest.json").write_text(json.dumps({"format_version": 2, "something": "new"}))
    with pytest.raises(NewerEngineError, match="format version 2, this installation reads up to 1: upgrade"):
        open_directory(engine)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format_version": "1"}'])
def test_manifest_that_is_none(engine, text):
    (engine / "manifest.json").write_text(text)
    with pytest.raises(DamagedEngineError):
        open_directory(engine)


@pytest.mark.parametrize("name", ["verifier.onnx", "verifier.onnx.data", "onnxruntime/verifier.onnx", "tokenizer.json"])
def test_missing_truncated_and_changed_files(engine, name):
    path = engine / name
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DamagedEngineError, match=r"bytes, the manifest says"):
        open_directory(engine)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DamagedEngineError, match="SHA-256 differs"):
        open_directory(engine)
    path.unlink()
    with pytest.raises(DamagedEngineError, match="is missing"):
        open_directory(engine)


@pytest.mark.parametrize("outside", ["../secret.txt", "/etc/passwd", "onnxruntime/../../secret.txt", ""])
def test_paths_that_point_outside(engine, outside, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")

    def change(value):
        value["files"][outside] = {"bytes": 6, "sha256": "0" * 64}

    edit(engine, change)
    with pytest.raises(DamagedEngineError, match="lies outside the directory"):
        open_directory(engine)


def test_a_link_that_leads_outside(engine, tmp_path):
    (tmp_path / "elsewhere.json").write_bytes((engine / "tokenizer.json").read_bytes())
    (engine / "tokenizer.json").unlink()
    (engine / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DamagedEngineError, match="lies outside the directory"):
        open_directory(engine)


@pytest.mark.parametrize("section", ["text", "backends"])
def test_names_that_are_not_listed(engine, section):
    def change(value):
        if section == "text":
            value["text"]["tokenizer"] = "../../tokenizer.json"
        else:
            value["backends"]["onnxruntime"]["graph"] = "../../verifier.onnx"

    edit(engine, change)
    with pytest.raises(DamagedEngineError, match="which is not one of its files"):
        open_directory(engine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("contract"), "lacks the field 'contract'"),
        (lambda value: value["contract"].update(capacity="big"), "contract.capacity is 'big'; int was expected"),
        (lambda value: value["contract"].update(surprise=1), "contract has an unknown field 'surprise'"),
        (lambda value: value["contract"].update(prefill_chunk=0), "sizes that do not fit each other"),
        (lambda value: value["contract"].update(capacity=64), "sizes that do not fit each other"),
        (lambda value: value["contract"].update(top_k=-1), "sizes that do not fit each other"),
        (lambda value: value["backends"]["onnxruntime"].update(probe_layers=9), "gives its probe 9 layers"),
        (lambda value: value["model"].pop("name"), "model lacks the field 'name'"),
        (lambda value: value["fidelity"].pop("tokens"), "fidelity has the keys"),
        (lambda value: value.update(row_invariance={"chain": "yes"}), "row_invariance is"),
        (lambda value: value.update(row_invariance={"chain": 500, "widest": 600, "tree": False}), "row_invariance is"),
        (lambda value: value.update(cost_surface_ms={"x": 1}), "cost_surface_ms must map"),
        *(
            (lambda value, ms=ms: value.update(cost_surface_ms={"16": {"1": ms}}), "latencies that are no time")
            for ms in (0, -1.5, float("nan"), float("inf"))
        ),
        (lambda value: value["fidelity"].update(continuation=None), "fidelity.continuation is a NoneType"),
        (lambda value: value["text"].update(eos_token_ids="2"), "text.eos_token_ids is '2'"),
    ],
)
def test_fields_that_do_not_fit(engine, change, message):
    edit(engine, change)
    with pytest.raises(DamagedEngineError, match=message):
        open_directory(engine)


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["contract"].update(capacity=value["contract"]["capacity"] + 64),
        lambda value: value["text"].update(eos_token_ids=[7]),
        lambda value: value["backends"]["onnxruntime"].update(graph="verifier.onnx"),
    ],
)
def test_what_runs_changed_by_hand(engine, change):
    path = engine / "manifest.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DamagedEngineError, match="changed by hand"):
        open_directory(engine)


def test_a_model_of_one_layer_is_probed_elsewhere_too(tmp_path, build_engine):
    engine = build_engine(save_tiny_model(tmp_path / "model", "llama", num_hidden_layers=1))
    edit(engine, lambda value: value["machine"].update(processor="Another CPU"))
    assert loading.load_engine(engine).record.row_invariance.chain == 1


def test_a_cache_that_holds_nonsense_is_measured_again(engine):
    edit(engine, lambda value: value["machine"].update(processor="Another CPU"))
    loading.load_engine(engine)
    (record,) = (user_cache() / "machines").iterdir()
    for text in ("null", "[]", "{", '{"row_invariance": 1}'):
        record.write_text(text)
        assert loading.load_engine(engine).record.row_invariance.chain == 1


def test_cuda_provider_names_the_tensorrt_back_end(engine):
    with pytest.raises(EngineError, match="NVIDIA GPUs are served by the back ends cuda and tensorrt"):
        loading.load_engine(engine, options=OnnxRuntimeOptions(provider="cuda"))


def test_a_directory_that_is_added_to_meanwhile(engine, monkeypatch):
    """The manifest was read, and a file of it is gone: another manifest names what took its place."""
    manifest = json.loads((engine / "manifest.json").read_text())
    entry = manifest["files"]["tokenizer.json"]
    before = {**manifest, "files": {**manifest["files"], "cuda/extra-1.bin": {"bytes": 3, "sha256": "0" * 64}}}
    (engine / "manifest.json").write_text(json.dumps(before))
    check, checked = directory_module._check_file, []

    def publishing(path, name, entry):
        if not checked:
            # What the other run writes and deletes, after this one has read the manifest.
            (engine / "manifest.json").write_text(json.dumps(manifest))
        checked.append(name)
        check(path, name, entry)

    monkeypatch.setattr(directory_module, "_check_file", publishing)
    opened = open_directory(engine)
    assert opened.manifest.files["tokenizer.json"] == entry
    assert "cuda/extra-1.bin" not in opened.manifest.files
    # Where nobody adds to it, a missing file is an error at once.
    checked.clear()
    checked.append("no publishing")
    (engine / "manifest.json").write_text(json.dumps(before))
    with pytest.raises(DamagedEngineError, match=r"extra-1\.bin is missing"):
        open_directory(engine)


def test_another_machine_is_probed_once_and_kept_in_the_user_cache(engine, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in engine.rglob("*")}

    def change(value):
        value["machine"]["processor"] = "Another CPU"
        value["row_invariance"]["chain"] = 5

    edit(engine, change)
    assert loading.load_engine(engine).record.row_invariance.chain == 1
    kept = list((user_cache() / "machines").iterdir())
    assert len(kept) == 1
    monkeypatch.setattr(onnxruntime_loading, "probe_graphs", None)
    assert loading.load_engine(engine).record.row_invariance.chain == 1
    unchanged = {path: path.stat().st_mtime_ns for path in engine.rglob("*") if path.name != "manifest.json"}
    assert unchanged == {path: time for path, time in before.items() if path.name != "manifest.json"}


def test_read_only_cache_is_no_obstacle(engine, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("QUASAR_CACHE", str(tmp_path / "file"))
    edit(engine, lambda value: value["machine"].update(processor="Another CPU"))
    assert loading.load_engine(engine).record.row_invariance.chain == 1


def test_an_engine_of_an_earlier_version_names_no_sampler_and_no_prefill(engine):
    value = json.loads((engine / "manifest.json").read_text())
    del value["sampler"], value["row_invariance"]["prefill"]
    (engine / "manifest.json").write_text(json.dumps(value))
    manifest = open_directory(engine).manifest
    assert manifest.sampler == SAMPLER
    # Not probed: rows that were decoded serve no later prompt.
    assert not manifest.record.row_invariance.prefill


def test_another_sampler_is_a_newer_engine(engine):
    value = json.loads((engine / "manifest.json").read_text())
    value["sampler"] = "dice v2"
    (engine / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(NewerEngineError, match="names the sampler 'dice v2', this installation has 'gumbel-max"):
        open_directory(engine)


def test_what_an_earlier_version_found_of_prefills_holds_at_width_1_alone(engine):
    """It said so of kernels whose positions have other bits alone than beside others, and a prompt may end in one."""
    edit(engine, lambda value: value["row_invariance"].update(chain=2, prefill=True))
    assert not open_directory(engine).manifest.record.row_invariance.prefill
    edit(engine, lambda value: value["row_invariance"].update(chain=1, prefill=True))
    assert open_directory(engine).manifest.record.row_invariance.prefill
