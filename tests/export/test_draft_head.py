"""A draft head in an engine: its passes are those of the torch reference, through chunks, chains and a tree."""

import errno
import json
import shutil

import numpy as np
import pytest
import torch

from engines.directory import open_directory
from engines.onnxruntime.draft_head import OnnxRuntimeDraftHead
from engines.session import Positions
from export import add_head as add_head_module
from export.add_head import add_head
from export.build_options import CompileOptions
from export.compile_cuda import compile_engine
from export.weight_file import WeightFile
from plugins.cpu import toolchain
from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.checkpoint import read_float32
from quasar.draft_heads.folder import DraftHead
from quasar.errors import BuildError, CheckpointError
from tests.commands import refused
from tests.draft_head_reference import CanonicalHead
from tests.draft_heads import copy_engine, write_random_head
from tests.plugins.cpu.operators import needs_library
from tests.tiny import save_tiny_model

pytestmark = needs_library

HEADS = {
    "eagle3": {"kind": "eagle3"},
    "one hidden state, every token": {"kind": "eagle3", "feature_layers": (2,), "draft_vocab_size": 0},
    "norm before the residual": {"kind": "eagle3", "norm_before_residual": True},
    "norm of what goes on": {"kind": "eagle3", "norm_output": True},
    "norms of features": {"kind": "eagle3", "feature_norm": "each"},
    "norm of all features": {"kind": "eagle3", "feature_norm": "all"},
    "eagle": {"kind": "eagle", "fuse_bias": True},
    "biases": {"kind": "eagle", "attention": {"qkv_bias": True}},
    "norms of queries and keys": {"kind": "eagle3", "attention": {"qk_norm": "head"}},
    "a window": {"kind": "eagle3", "attention": {"window": 6}},
}


@pytest.fixture(scope="module")
def engine(shared_engine, tiny_model):
    return shared_engine(tiny_model)


def open_head(directory, slots=1):
    opened = open_directory(directory)
    files = opened.manifest.draft_head
    return OnnxRuntimeDraftHead(
        directory, files, opened.manifest.contract, library=toolchain.LIBRARY, threads=1, slots=slots
    )


def reference(engine, folder, model):
    """The torch head, and what makes its hidden states of the target's."""
    checkpoint = open_checkpoint(str(model))
    head = DraftHead(folder, checkpoint.spec)
    tensors = {name: head.read(name) for name in head.spec.tensors()}
    canonical = CanonicalHead(
        head.spec,
        tensors,
        # The engine keeps its table in 16 bits.
        embedding=stored_table(read_float32(checkpoint, "embed_tokens.weight")),
        head=read_float32(checkpoint, "lm_head.weight"),
    )
    norm = torch.from_numpy(read_float32(checkpoint, "norm.weight"))

    def hidden(features):
        states = torch.cat([torch.from_numpy(one) for one in features], dim=-1)
        if head.spec.normed:
            states = torch.nn.functional.rms_norm(states, (states.shape[-1],), norm, checkpoint.spec.rms_norm_eps)
        return canonical.hidden(states)

    return head, canonical, hidden


def stored_table(table):
    from calibration.stored_table import in_16_bits

    return np.asarray(in_16_bits(table)).astype(np.float32)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
def test_passes_are_those_of_the_reference(engine, tiny_model, tmp_path, options):
    options = dict(options)
    spec = write_random_head(tmp_path / "head", tiny_model, options.pop("kind"), **options)
    directory = copy_engine(engine, tmp_path / "engine")
    add_head(directory, tmp_path / "head", precision="fp32")
    session = open_head(directory, slots=2)
    head, canonical, hidden = reference(directory, tmp_path / "head", tiny_model)
    window = spec.decoder.layers[0].attention.window or spec.decoder.context_length
    random = np.random.default_rng(1)
    ids = random.integers(0, spec.decoder.vocab_size, 20)
    features = [random.standard_normal((20, spec.target_hidden_size)).astype(np.float32) for _ in spec.feature_layers]
    fused = session.fuse(features)
    expected = hidden(features)
    np.testing.assert_allclose(fused, expected.numpy(), atol=1e-4)
    # A prompt in two chunks, then a tree: two children of the last position, and one of the second.
    told = None
    for part in (slice(0, 13), slice(13, 20)):
        one = Positions(tokens=ids[part], cache_length=part.start, num_logits=2, slot=1)
        told = session.run([one], fused[part])
        count = part.stop - part.start
        mask = torch.ones(count, part.stop, dtype=torch.bool).tril(part.start).triu(part.start + 1 - window)
        logits, states = canonical.step(
            torch.from_numpy(ids[part]), expected[part], torch.arange(part.start, part.stop), mask
        )
        check(told, logits[-2:], states[-2:], head)
    last = told.hidden_states[-1:].copy()
    tokens = told.tokens[-1, :2].copy()
    tree = Positions(tokens=tokens, cache_length=20, num_logits=2, slot=1, parents=np.array([-1, -1]))
    told = session.run([tree], np.repeat(last, 2, axis=0))
    mask = torch.cat([torch.arange(20).repeat(2, 1) > 20 - window, torch.eye(2, dtype=torch.bool)], dim=1)
    logits, states = canonical.step(
        torch.from_numpy(tokens), torch.from_numpy(last).repeat(2, 1), torch.tensor([20, 20]), mask
    )
    check(told, logits, states, head)
    child = told.tokens[1, :1].copy()
    # The branch is fed again: the second child, and what follows it.
    branch = Positions(tokens=np.array([tokens[1], child[0]]), cache_length=20, num_logits=1, slot=1)
    told = session.run([branch], np.concatenate([last, told.hidden_states[1:2]]))
    mask = torch.cat([torch.arange(20) > 21 - window, torch.tensor([False, True, True])])[None]
    logits, states = canonical.step(torch.from_numpy(child), states[1:2], torch.tensor([21]), mask)
    check(told, logits, states, head)


def check(told, logits, states, head):
    likelihoods = logits.log_softmax(-1)
    best = likelihoods.topk(told.tokens.shape[1], dim=-1)
    np.testing.assert_allclose(told.log_probabilities, best.values.numpy(), atol=1e-4)
    np.testing.assert_array_equal(told.tokens, head.targets[best.indices.numpy()])
    # Layers of width 64 sum in another order.
    np.testing.assert_allclose(told.hidden_states, states.numpy(), atol=1e-4)


# INT8 in blocks of 32 errs by a hundredth of a logit near 1; 4 bits have steps sixteen times as wide.
@pytest.mark.parametrize(("precision", "error"), [({}, 0.6), ({"precision": "w8a8-block"}, 0.1)])
def test_sequences_share_a_pass_and_rounded_weights_are_close(engine, tiny_model, tmp_path, precision, error):
    spec = write_random_head(tmp_path / "head", tiny_model)
    rounded, exact = (copy_engine(engine, tmp_path / name) for name in ("rounded", "exact"))
    add_head(rounded, tmp_path / "head", **precision)
    add_head(exact, tmp_path / "head", precision="fp32")
    random = np.random.default_rng(2)
    sizes, told = (3, 5), {}
    ids = random.integers(0, spec.decoder.vocab_size, 8)
    states = random.standard_normal((8, spec.decoder.hidden_size)).astype(np.float32)
    batch = [
        Positions(tokens=ids[:3], cache_length=0, num_logits=1, slot=1),
        Positions(tokens=ids[3:], cache_length=0, num_logits=1, slot=0),
    ]
    for directory in (rounded, exact):
        together = open_head(directory, slots=2).run(batch, states)
        alone = open_head(directory, slots=2)
        parts = [
            alone.run([one], part).log_probabilities.copy()
            for one, part in zip(batch, np.split(states, [sizes[0]]), strict=True)
        ]
        np.testing.assert_array_equal(together.log_probabilities, np.concatenate(parts))
        told[directory] = together.log_probabilities.copy()
    np.testing.assert_allclose(told[rounded], told[exact], atol=error)
    assert not np.array_equal(told[rounded], told[exact])


def test_another_head_takes_the_place_of_the_first(engine, tiny_model, tmp_path):
    directory = copy_engine(engine, tmp_path / "engine")
    before = open_directory(directory).manifest
    for name in ("one", "two"):
        write_random_head(tmp_path / name, tiny_model, norm_output=name == "two")
        add_head(directory, tmp_path / name)
    after = open_directory(directory).manifest
    assert after.draft_head.source == "two"
    # The engine keeps its name: what was measured of it holds.
    assert after.engine_hash == before.engine_hash
    assert sorted(path.name for path in (directory / "draft_head").iterdir()) == sorted(
        name.split("/")[1] for name in after.draft_head.names
    )


def test_a_head_that_is_added_again_changes_no_file_before_it_is_whole(engine, tiny_model, tmp_path, monkeypatch):
    directory = copy_engine(engine, tmp_path / "engine")
    write_random_head(tmp_path / "head", tiny_model)
    add_head(directory, tmp_path / "head")
    names = {directory / name for name in open_directory(directory).manifest.draft_head.names}
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in names}
    # What a run left that was killed.
    (directory / "draft_head/tmpabc").mkdir()
    (directory / "draft_head/tmpabc/canonical.data").write_bytes(b"half")
    (directory / "draft_head/other.data").write_bytes(b"half")

    append = WeightFile.append

    def full(self, name, array):
        if self._file.tell() and self._path.parent == directory / "draft_head":
            raise OSError(errno.ENOSPC, "no space")
        return append(self, name, array)

    with monkeypatch.context() as patched:
        patched.setattr(WeightFile, "append", full)
        with pytest.raises(OSError, match="no space"):
            add_head(directory, tmp_path / "head")
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in names} == before
    assert set((directory / "draft_head").iterdir()) == names
    add_head(directory, tmp_path / "head")
    assert {path: path.read_bytes() for path in names} == {path: content for path, (_, content) in before.items()}


def test_what_does_not_fit_is_refused_and_nothing_changes(engine, tiny_model, tmp_path):
    directory = copy_engine(engine, tmp_path / "engine")
    before = (directory / "manifest.json").read_bytes()
    write_random_head(tmp_path / "head", tiny_model)
    config = json.loads((tmp_path / "head" / "config.json").read_text())
    (tmp_path / "head" / "config.json").write_text(json.dumps({**config, "vocab_size": 7}))
    with pytest.raises(CheckpointError, match="7"):
        add_head(directory, tmp_path / "head")
    with pytest.raises(BuildError, match="a draft head is 'w8a8-static'; w4a8-128, w4a8, w4a16-128, w4a16, w8"):
        add_head(directory, tmp_path / "head", precision="w8a8-static")
    write_random_head(tmp_path / "early", tiny_model, feature_layers=(0, 2))
    with pytest.raises(BuildError, match=r"layers \[0, 2\], and what enters layer 0 are embeddings"):
        add_head(directory, tmp_path / "early")
    write_random_head(tmp_path / "eagle", tiny_model, "eagle")
    with pytest.raises(BuildError, match="needs the model's final norm and LM head, and the model cannot be read"):
        add_head(directory, tmp_path / "eagle", model=str(tmp_path / "gone"))
    assert (directory / "manifest.json").read_bytes() == before
    assert not (directory / "draft_head").exists()


def test_a_damaged_head_is_named(engine, tiny_model, tmp_path):
    directory = copy_engine(engine, tmp_path / "engine")
    write_random_head(tmp_path / "head", tiny_model)
    add_head(directory, tmp_path / "head")
    manifest = json.loads((directory / "manifest.json").read_text())
    for key, value in (("feature_layers", [99]), ("top_k", 0), ("hidden_size", "64")):
        broken = {**manifest, "draft_head": {**manifest["draft_head"], key: value}}
        (directory / "manifest.json").write_text(json.dumps(broken))
        with pytest.raises(Exception, match="draft_head"):
            open_directory(directory)
    shutil.rmtree(directory / "draft_head")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match="is missing"):
        open_directory(directory)


@pytest.mark.parametrize("option", [("--rotate",), ("--skip-layers", "1")])
def test_a_build_says_at_once_that_a_head_reads_the_whole_model(tmp_path, option):
    paths = [tmp_path / name for name in ("model", "engine", "head")]
    said = refused("export", "build", paths[0], "-o", paths[1], "--draft-head", paths[2], *option)
    assert f"hidden states of the whole model as the checkpoint has them, and {option[0]} changes them" in said


def test_tensors_are_taken_of_the_model_that_the_engine_was_built_from(engine, tiny_model, tmp_path):
    """A head without an LM head of its own, and another model of the same sizes."""
    other = save_tiny_model(tmp_path / "other", "llama", seed=7)
    write_random_head(tmp_path / "head", tiny_model, kind="eagle", fuse_bias=True)
    copied = copy_engine(engine, tmp_path / "engine")
    with pytest.raises(BuildError, match="other is not the model that the engine was built from"):
        add_head(copied, tmp_path / "head", model=str(other))
    assert not (copied / "draft_head").exists()
    add_head(copied, tmp_path / "head", model=str(tiny_model))


def test_a_head_is_not_added_while_another_run_publishes(engine, tiny_model, tmp_path, monkeypatch):
    """From when the manifest is read: what another run adds to it would be lost."""
    write_random_head(tmp_path / "head", tiny_model)
    copied = copy_engine(engine, tmp_path / "engine")
    seen = []

    def meanwhile(directory):
        opened = open_directory(directory)
        if seen:
            # The last look, when it is published.
            return opened
        with pytest.raises(BuildError, match="another run is compiling"):
            compile_engine(CompileOptions(directory=directory, backend="cuda", compute_capabilities=("8.9",)))
        seen.append(directory)
        return opened

    monkeypatch.setattr(add_head_module, "open_directory", meanwhile)
    add_head(copied, tmp_path / "head")
    assert seen


def test_what_an_interrupted_build_left_is_named(engine, tmp_path):
    copied = copy_engine(engine, tmp_path / "engine")
    compiled = ("--backend", "cuda", "--compute-capability", "8.9")
    said = refused("export", "build", "smollm2", "-o", copied, "--draft-head", tmp_path / "head", *compiled)
    # In this order: compiling takes the head in.
    assert f"python -m export add-head {copied} {tmp_path / 'head'} and python -m export compile {copied}" in said
