"""What a GGUF header says of text, and an engine that is built from it."""

import pytest

import runtime
from export.text_files import checked_text, write_text_files
from quasar.checkpoints import open_checkpoint
from quasar.errors import CheckpointError
from tests.tiny_gguf import save_tiny_gguf

CHATML = "{% for m in messages %}<|begin|>{{ m.content }}<|eom|>{% endfor %}"


def test_every_field_and_every_name_that_ends_a_text(tmp_path):
    path = save_tiny_gguf(
        tmp_path / "m.gguf",
        tokenizer__ggml__eos_token_id=259,
        tokenizer__ggml__eot_token_id=257,
        tokenizer__ggml__eom_token_id=258,
        tokenizer__chat_template=CHATML,
    )
    files, _ = write_text_files(checked_text(open_checkpoint(str(path))), tmp_path)
    assert {one["token"]: one["sources"] for one in files.end_tokens} == {
        "<|endoftext|>": ["eos_token_id", "the name <|endoftext|>"],
        "<|im_end|>": ["eot_token_id", "the name <|im_end|>"],
        "<|eom|>": ["eom_token_id", "the chat template's end of a turn"],
    }
    # The float reference stops where the engine does, as far as the header says it.
    assert set(open_checkpoint(str(path)).transformers_config().eos_token_id) == {257, 258, 259}


def test_an_id_that_means_none(tmp_path):
    path = save_tiny_gguf(
        tmp_path / "m.gguf", tokenizer__ggml__bos_token_id=2**32 - 1, tokenizer__ggml__eot_token_id=2**32 - 1
    )
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.text().bos_token == ""
    assert checkpoint.spec.bos_token_id is None
    assert 2**32 - 1 not in checkpoint.spec.eos_token_ids


def test_templates_by_name(tmp_path):
    path = save_tiny_gguf(
        tmp_path / "m.gguf",
        tokenizer__chat_template="d",
        tokenizer__chat_templates=["tool_use"],
        tokenizer__chat_template__tool_use="t",
    )
    assert open_checkpoint(str(path)).text().chat_templates == {"default": "d", "tool_use": "t"}


def test_sampling_defaults(tmp_path):
    path = save_tiny_gguf(tmp_path / "m.gguf", general__sampling__temp=0.5, general__sampling__top_k=20)
    assert open_checkpoint(str(path)).text().sampling == {"temperature": 0.5, "top_k": 20}
    assert open_checkpoint(str(save_tiny_gguf(tmp_path / "n.gguf"))).text().sampling == {}


def test_an_unknown_pre_tokenizer_is_named_before_any_work(tmp_path, build_engine):
    path = save_tiny_gguf(tmp_path / "m.gguf", pre="exaone9")
    with pytest.raises(CheckpointError, match=r"m\.gguf: unsupported pre-tokenizer: GGUF 'exaone9'"):
        build_engine(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": False}, r"m\.gguf: the header has no tokens .*: the file holds no tokenizer"),
        ({"rows": 258}, r"token '<\|endoftext\|>' with id 259, the embedding only 258 rows"),
    ],
)
def test_a_tokenizer_that_is_missing_or_of_another_model(options, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        checked_text(open_checkpoint(str(save_tiny_gguf(tmp_path / "m.gguf", **options))))


def test_an_engine_from_a_gguf_of_llama_3s_kind(tmp_path, build_engine):
    """No id past the vocabulary; BOS where the kind has it; the name without its suffix; no template is said."""
    engine_path = build_engine(save_tiny_gguf(tmp_path / "Tiny-3.1.GGUF"))
    with runtime.load(engine_path) as engine:
        assert engine.manifest.model["name"] == "Tiny-3.1"
        assert engine.encode("ab", chat_template=False).tolist() == [256, *engine.encode("ab").tolist()[1:]]
        assert engine.encode("<|begin|>ab", chat_template=False).tolist() == engine.encode("ab").tolist()
        # Content that spells BOS is text, and a document has its own.
        assert engine.encode("<|begin|>").tolist()[0] == 256
        assert len(engine.encode("<|begin|>")) == 1 + len("<|begin|>")
        plain = engine.generate("ab ab ab ab", max_new_tokens=24, drafter="none")
        assert engine.generate("ab ab ab ab", max_new_tokens=24).token_ids == plain.token_ids
