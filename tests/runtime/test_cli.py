"""The command lines as a process sees them: output, exit codes, one helpful line and no traceback."""

import json
import shutil
import struct

import pytest

from tests.commands import command, refused
from tests.tiny import save_tiny_model, save_tokenizer


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [
        {"prompt": "one two one two one", "category": "a"},
        {"turns": ["abc abc abc", "and again"], "category": "b"},
        {"messages": [{"role": "user", "content": "x y x y x"}], "category": "a"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_build_inspect_generate_verify(tiny_model, few_prompts, prompts, tmp_path):
    engine = tmp_path / "engine"
    done = command("export", "build", tiny_model, "-o", engine, "--calibration", few_prompts)
    assert done.returncode == 0, done.stderr
    assert "checkpoint" in done.stderr
    assert f"python -m runtime generate {engine}" in done.stdout
    assert "KL" in done.stdout
    assert "t(16)" in done.stdout

    shown = command("export", "inspect", engine)
    assert "chains exact at widths 1 to 32" in shown.stdout
    manifest = json.loads(command("export", "inspect", engine, "--json").stdout)
    assert manifest == json.loads((engine / "manifest.json").read_text())

    streamed = command("runtime", "generate", engine, "one two one two", "--max-new-tokens", 12, "--stats")
    answer = json.loads(
        command("runtime", "generate", engine, "one two one two", "--max-new-tokens", 12, "--json").stdout
    )
    assert streamed.stdout == answer["text"] + "\n"
    assert "tokens/s" in streamed.stderr
    assert set(answer) == {"text", "token_ids", "finish_reason", "stopped_by", "kernels", "stats"}
    assert len(answer["token_ids"]) == answer["stats"]["tokens"] <= 12

    report = tmp_path / "verify.json"
    done = command("evaluation", "verify", engine, "--prompts", prompts, "--max-new-tokens", 16, "--json", report)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("identical: 3 of 3 prompts")
    assert json.loads(report.read_text())["divergences"] == []

    figures = tmp_path / "report.json"
    report_of_two = ("evaluation", "report", engine, "--prompts", prompts, "--limit", 2)
    done = command(*report_of_two, "--json", figures, "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"page: {tmp_path / 'page.html'}"
    assert "<h2>Loss per linear</h2>" in (tmp_path / "page.html").read_text()
    value = json.loads(figures.read_text())
    assert {"mean_kl_nats", "top1_agreement", "perplexity", "perplexity_float", "tokens", "linears"} <= set(value)
    assert set(value["continuation"]) == {"mean_kl_nats", "top1_agreement", "perplexity", "perplexity_float", "tokens"}
    assert set(value["linears"]) == set(manifest["linears"])
    assert value["linears"]["lm_head"]["sqnr_db"] > 10


class TestRefusals:
    """Bad input: exit code 2, one line, nothing half-written."""

    def build(self, model, tmp_path, *more, **options):
        line = refused("export", "build", model, "-o", tmp_path / "new" / "engine", *more, **options)
        assert not (tmp_path / "new").exists()
        return line

    def test_missing_folder(self, tmp_path):
        assert "no-such-model does not exist: give a Hugging Face folder" in self.build("no-such-model", tmp_path)

    def test_hub_id_when_offline(self, tmp_path):
        line = self.build("some-owner/some-model", tmp_path, env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)})
        assert "as a hub id it cannot be had: it is not in the local cache" in line

    def test_unsupported_architecture(self, tmp_path):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
        line = self.build(tmp_path / "model", tmp_path)
        assert "unsupported architecture: MambaForCausalLM; supported are LlamaForCausalLM" in line

    def test_truncated_shard(self, tiny_model, tmp_path):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        shard = next(folder.glob("*.safetensors"))
        shard.write_bytes(shard.read_bytes()[:-100])
        assert "is not a whole safetensors file" in self.build(folder, tmp_path)

    def test_header_that_promises_too_much(self, tiny_model, tmp_path):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        next(folder.glob("*.safetensors")).write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
        assert "is not a whole safetensors file" in self.build(folder, tmp_path)

    def test_truncated_gguf(self, tmp_path):
        (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x05")
        assert "is not a whole GGUF file" in self.build(tmp_path / "model.gguf", tmp_path)

    def test_pickled_weights(self, tiny_model, tmp_path):
        folder = shutil.copytree(tiny_model, tmp_path / "model")
        next(folder.glob("*.safetensors")).rename(folder / "pytorch_model.bin")
        assert "pytorch_model.bin is a pickle, which is never opened" in self.build(folder, tmp_path)

    def test_chat_template_that_reaches_for_python(self, tmp_path):
        folder = save_tiny_model(tmp_path / "model", "llama")
        save_tokenizer(folder, "{{ ''.__class__.__mro__[1].__subclasses__() }}")
        line = refused("export", "build", folder, "-o", tmp_path / "engine")
        assert "the chat template reaches for Python internals and is refused" in line
        assert not (tmp_path / "engine").exists()

    def test_output_that_exists(self, tiny_engine, tiny_model):
        line = refused("export", "build", tiny_model, "-o", tiny_engine)
        assert "exists: choose another -o, or replace it with --force" in line

    def test_empty_prompt_file(self, tiny_engine, tmp_path):
        (tmp_path / "empty.jsonl").write_text("\n\n")
        for program in (("evaluation", "verify"), ("runtime", "bench"), ("evaluation", "report")):
            line = refused(*program, tiny_engine, "--prompts", tmp_path / "empty.jsonl")
            assert "empty.jsonl holds no prompts" in line

    def test_malformed_row_is_named_by_line(self, tiny_engine, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "fine"}\n\n{"prompt": "fine too"\n')
        line = refused("evaluation", "verify", tiny_engine, "--prompts", tmp_path / "bad.jsonl")
        assert "bad.jsonl, line 3: not JSON" in line

    def test_missing_prompt_file(self, tiny_engine):
        line = refused("evaluation", "verify", tiny_engine, "--prompts", "nothing.jsonl")
        assert "nothing.jsonl does not exist" in line

    def test_corrupted_manifest(self, tiny_engine, tmp_path):
        engine = shutil.copytree(tiny_engine, tmp_path / "engine")
        (engine / "manifest.json").write_text('{"format_version": 1,')
        assert "manifest.json cannot be read" in refused("runtime", "generate", engine, "hi")
        assert "manifest.json cannot be read" in refused("export", "inspect", engine)

    def test_newer_format(self, tiny_engine, tmp_path):
        engine = shutil.copytree(tiny_engine, tmp_path / "engine")
        (engine / "manifest.json").write_text('{"format_version": 7}')
        assert "format version 7, this installation reads up to 1" in refused("runtime", "generate", engine, "hi")

    def test_manifest_that_points_outside(self, tiny_engine, tmp_path):
        engine = shutil.copytree(tiny_engine, tmp_path / "engine")
        value = json.loads((engine / "manifest.json").read_text())
        value["files"]["../outside"] = {"bytes": 1, "sha256": "0"}
        (engine / "manifest.json").write_text(json.dumps(value))
        assert "lies outside the directory" in refused("runtime", "generate", engine, "hi")

    def test_prompt_longer_than_the_cache(self, tiny_engine):
        line = refused("runtime", "generate", tiny_engine, "word " * 200)
        assert "tokens and this engine holds 512, new tokens included: shorten the prompt" in line

    def test_no_engine(self, tmp_path):
        line = refused("runtime", "generate", tmp_path / "none", "hi")
        assert "is no engine directory: build one with python -m export build" in line

    def test_results_that_cannot_be_written(self, tiny_engine, prompts, tmp_path):
        line = refused("evaluation", "verify", tiny_engine, "--prompts", prompts, "--json", tmp_path)
        assert "is a folder; a file to write was expected" in line
        line = refused("evaluation", "verify", tiny_engine, "--prompts", prompts, "--json", tmp_path / "no" / "file")
        assert "does not exist: make the folder" in line

    def test_names_that_no_file_can_have(self, tmp_path):
        assert "File name too long" in refused("runtime", "generate", tmp_path / ("x" * 300), "hi")

    def test_library_that_is_missing(self, tiny_model, tmp_path):
        (tmp_path / "safetensors.py").write_text("raise ModuleNotFoundError(name='safetensors')")
        line = self.build(tiny_model, tmp_path, env={"PYTHONPATH": str(tmp_path)})
        assert "safetensors is not installed: run pip install 'quasar-verifier[build]'" in line

    def test_recipe_that_cannot_be_read(self, tiny_model, prompts, tmp_path):
        line = refused(
            *(
                "calibration",
                "sweep",
                tiny_model,
                "-o",
                tmp_path,
                "--prompts",
                prompts,
                "--recipe",
                "fp32",
                "w8a8,beta=1",
            )
        )
        assert "recipe 'w8a8,beta=1' has the part 'beta=1'" in line
        assert not (tmp_path / "fp32").exists()

    def test_blocks_on_tensorrt(self, tiny_model, tmp_path):
        line = refused(
            *("export", "build", tiny_model, "-o", tmp_path / "engine", "--backend", "tensorrt-rtx"),
            *("--precision", "auto", "--max-kl", "0.01"),
        )
        assert "no matmul of INT8 activations with INT4 weights: take --precision w8a8 or w4a16-128 or" in line

    def test_unknown_drafter(self, tiny_engine):
        line = refused("runtime", "generate", tiny_engine, "hi", "--drafter", "magic")
        assert "unknown drafter 'magic'; known are auto, none, prompt-lookup, suffix, recycling" in line

    def test_float_model_of_another_vocabulary(self, tiny_engine, prompts, tmp_path):
        other = save_tiny_model(tmp_path / "other", "llama", vocab_size=400)
        line = refused("evaluation", "report", tiny_engine, "--prompts", prompts, "--float", other)
        assert "has 400 tokens, the engine 320" in line

    def test_checkpoint_that_has_changed(self, few_prompts, prompts, tmp_path, build_engine):
        folder = save_tiny_model(tmp_path / "model", "llama")
        engine = build_engine(folder)
        save_tiny_model(folder, "llama", seed=3)
        line = refused("evaluation", "report", engine, "--prompts", prompts)
        assert "is not the checkpoint that the engine was built from" in line
