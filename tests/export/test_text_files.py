"""What a build says of a checkpoint's tokenizer: end tokens of every source, templates, sampling defaults, errors."""

import json

import pytest

from engines.text_files import TextFiles
from export.build import build
from export.build_options import BuildOptions
from export.text_files import check_prompts, checked_text, text_warnings, write_text_files
from quasar.checkpoints import open_checkpoint
from quasar.errors import CheckpointError, DamagedEngineError, PromptError, QuasarError
from quasar.text import Prompt, TextCodec
from tests.tiny import VOCABULARY, save_tiny_model, save_tokenizer


@pytest.fixture
def folder(tmp_path):
    return save_tiny_model(tmp_path / "model", "llama")


def change(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def test_end_tokens_are_the_union_of_every_source(folder, tmp_path):
    """The ids: <|end|> 256 (the tokenizer's and the template's), <|user|> 257, <|assistant|> 258, <|system|> 259."""
    change(folder / "config.json", eos_token_id=257)
    change(folder / "generation_config.json", eos_token_id=[258, 257])
    files, _ = write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    assert {one["id"]: (one["token"], tuple(one["sources"])) for one in files.end_tokens} == {
        258: ("<|assistant|>", ("generation_config.json",)),
        257: ("<|user|>", ("generation_config.json", "config.json")),
        256: ("<|end|>", ("the tokenizer's end token", "the chat template's end of a turn")),
    }
    assert files.eos_token_ids == (258, 257, 256)
    assert TextFiles.from_json(json.loads(json.dumps(files.to_json()))) == files


@pytest.mark.parametrize(
    ("template", "found"),
    [
        ("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|system|>\n{% endfor %}", True),
        ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}", False),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", False),
        ("{% for m in messages %}{% if m.role == 'user' %}<|system|>{% endif %}{{ m.content }}{% endfor %}", False),
        ("{{ raise_exception('no') }}", False),
    ],
)
def test_the_end_of_a_turn_is_what_a_template_writes_after_an_answer(folder, tmp_path, template, found):
    save_tokenizer(folder, template)
    files, _ = write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    sources = [source for one in files.end_tokens for source in one["sources"]]
    assert ("the chat template's end of a turn" in sources) == found


def test_sampling_defaults_are_the_checkpoints(folder, tmp_path):
    path = folder / "generation_config.json"
    change(path, do_sample=True, temperature=0.6, top_p=0.95, top_k=20, max_new_tokens=9)
    _, sampling = write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    assert sampling == {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
    # transformers does not draw where the file does not say so.
    change(path, do_sample=False)
    _, sampling = write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    assert sampling["temperature"] == 0


def test_named_templates_have_files_of_their_own(folder, tmp_path):
    change(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}],
    )
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    files, _ = write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    assert (files.chat_template, files.named_templates) == (
        "chat_template.jinja",
        {"tool_use": "chat_template.tool_use.jinja"},
    )
    assert (tmp_path / "chat_template.tool_use.jinja").read_text() == "t"


def test_a_token_without_a_row_of_the_embedding_is_named(tmp_path):
    folder = save_tiny_model(tmp_path / "model", "llama", vocab_size=258)
    with pytest.raises(CheckpointError, match=r"token '<\|assistant\|>' with id 258, the embedding only 258 rows"):
        write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
    # More rows than tokens is how embeddings are padded.
    folder = save_tiny_model(tmp_path / "padded", "llama", vocab_size=VOCABULARY)
    write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)


def with_tool(tmp_path, **values):
    """A folder whose embedding has a row for each token but <|tool|>, id 260."""
    folder = save_tiny_model(tmp_path / "model", "llama", vocab_size=260)
    checked_text(open_checkpoint(str(folder)))
    token = {"content": "<|tool|>", "special": True, **values}
    change(folder / "tokenizer_config.json", added_tokens_decoder={"260": token})
    return folder


def test_a_special_token_without_a_row_of_the_embedding_is_left_out(tmp_path, caplog):
    """Gemma 3 1B has the token of images, and no row for it."""
    folder = with_tool(tmp_path)
    checkpoint = open_checkpoint(str(folder))
    plain = checkpoint.text().tokenizer
    assert plain.encode("a<|tool|>").ids[-1] == 260
    text = checked_text(checkpoint)
    assert "the embedding has no row for '<|tool|>', which becomes plain text" in caplog.text
    files, _ = write_text_files(text, tmp_path)
    codec = TextCodec.from_file(tmp_path / files.tokenizer, None)
    assert "<|tool|>" not in (tmp_path / files.tokenizer).read_text()
    assert max(codec.tokenizer.get_vocab().values()) == 259
    spelled = [plain.token_to_id(character) for character in "a<|tool|>"]
    messages = ({"role": "user", "content": "a<|tool|>"},)
    assert (
        codec.encode_text("a<|tool|>") == codec.encode_chat(messages) == codec.encode_answer("a<|tool|>")[2:] == spelled
    )
    assert codec.decode(spelled) == "a<|tool|>"
    assert codec.encode_text("a<|end|>")[-1] == 256


@pytest.mark.parametrize("processor", [True, False])
def test_a_left_out_token_may_be_in_the_models_vocabulary(processor, tmp_path):
    """As converters of SentencePiece write them; one that frames a document stays refused."""
    folder = with_tool(tmp_path)
    state = json.loads((folder / "tokenizer.json").read_text())
    state["model"]["vocab"]["<|tool|>"] = 260
    if processor:
        frame = [{"SpecialToken": {"id": "<|tool|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
        special = {"<|tool|>": {"id": "<|tool|>", "ids": [260], "tokens": ["<|tool|>"]}}
        state["post_processor"] = {
            "type": "TemplateProcessing",
            "single": frame,
            "pair": frame,
            "special_tokens": special,
        }
    added = {**state["added_tokens"][0], "id": 260, "content": "<|tool|>"}
    state["added_tokens"].append(added)
    state["padding"] = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    state["padding"] |= {"pad_id": 260, "pad_type_id": 0, "pad_token": "<|tool|>"}
    (folder / "tokenizer.json").write_text(json.dumps(state))
    if processor:
        with pytest.raises(CheckpointError, match=r"token '<\|tool\|>' with id 260, the embedding only 260 rows"):
            checked_text(open_checkpoint(str(folder)))
    else:
        write_text_files(checked_text(open_checkpoint(str(folder))), tmp_path)
        assert "<|tool|>" not in (tmp_path / "tokenizer.json").read_text()


@pytest.mark.parametrize("use", ["ordinary", "bos", "eos", "end of a turn", "conversation", "generation"])
def test_a_token_without_a_row_that_is_needed_is_named(use, tmp_path):
    folder = with_tool(tmp_path, special=use != "ordinary")
    templates = {
        "end of a turn": "{% for m in messages %}{{ m.content }}<|tool|>{% endfor %}",
        "conversation": "<|tool|>{{ messages[0].content }}",
    }
    if use in templates:
        (folder / "chat_template.jinja").write_text(templates[use])
    if use in ("bos", "eos"):
        change(folder / "tokenizer_config.json", **{f"{use}_token": "<|tool|>"})
    if use == "generation":
        change(folder / "generation_config.json", eos_token_id=[256, 260])
    with pytest.raises(CheckpointError, match=r"token '<\|tool\|>' with id 260, the embedding only 260 rows"):
        checked_text(open_checkpoint(str(folder)))


def test_a_folder_without_a_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer: tokenizer\.json was expected"):
        checked_text(open_checkpoint(str(folder)))


def test_what_a_template_says_of_a_prompt_is_said(folder):
    save_tokenizer(folder, "{% if messages[0].content == 'b' %}{{ raise_exception('No\n b!') }}{% endif %}a")
    text = checked_text(open_checkpoint(str(folder)))
    prompts = [Prompt(messages=({"role": "user", "content": content},)) for content in "ab"]
    check_prompts(text, prompts[:1], "calibration")
    message = r"^calibration prompt 2 \('b'…\): the chat template refuses this conversation: No b!$"
    with pytest.raises(PromptError, match=message):
        check_prompts(text, prompts, "calibration")


def test_a_prompt_without_tokens_is_refused_before_any_work(folder):
    """A cache has no largest value over no positions."""
    save_tokenizer(folder, "{{ messages[0].content }}")
    text = checked_text(open_checkpoint(str(folder)))
    prompts = [Prompt(messages=({"role": "user", "content": content},)) for content in ("a", "")]
    with pytest.raises(PromptError, match=r"^calibration prompt 2 \(''…\): it has no tokens: take it out$"):
        check_prompts(text, prompts, "calibration")


@pytest.mark.parametrize("damage", ["tokenizer", "vocabulary", "template"])
def test_text_is_checked_before_the_checkpoints_files_are_hashed(damage, tmp_path, few_prompts, monkeypatch):
    """A hash reads every byte, which takes a minute for eight billion weights."""
    folder = save_tiny_model(tmp_path / "model", "llama", vocab_size=258 if damage == "vocabulary" else VOCABULARY)
    if damage == "tokenizer":
        (folder / "tokenizer.json").unlink()
    if damage == "template":
        save_tokenizer(folder, "{{ raise_exception('Only tools may speak') }}")
    monkeypatch.setattr("export.build.checkpoint_hash", lambda checkpoint: pytest.fail("hashed"))
    options = BuildOptions(model=str(folder), output=tmp_path / "engine", calibration=few_prompts)
    messages = {"tokenizer": "has no tokenizer", "vocabulary": "only 258 rows", "template": "Only tools may speak"}
    with pytest.raises(QuasarError, match=messages[damage]):
        build(options)
    assert not (tmp_path / "engine").exists()


def test_a_build_warns_of_answers_without_an_end_and_without_a_template():
    files = TextFiles(tokenizer="tokenizer.json", chat_template="", bos_token="", eos_token="", eos_token_ids=())
    assert [warning.partition(":")[0] for warning in text_warnings(files)] == [
        "no token ends an answer",
        "no chat template",
    ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"end_tokens": [3]}, "text.end_tokens holds 3"),
        ({"named_templates": {"a": ""}}, r"text.named_templates\['a'\] is ''"),
        ({"date": 5}, "text.date is 5"),
    ],
)
def test_a_damaged_text_section_is_named(values, message):
    files = TextFiles(tokenizer="t", chat_template="", bos_token="", eos_token="", eos_token_ids=(1,))
    with pytest.raises(DamagedEngineError, match=message):
        TextFiles.from_json({**files.to_json(), **values})


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None])
def test_tokenizer_json_is_the_tokenizer_whatever_class_is_named(tmp_path, model_type, name):
    """DeepSeek's distilled Qwen2 models name Llama's class and have a rule of their own; transformers makes Qwen2's."""
    from tests.quasar.test_gguf_tokenizer import TEXTS, published

    folder = save_tiny_model(tmp_path / "model", model_type, vocab_size=640)
    for file in ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        (folder / file).unlink(missing_ok=True)
    if name:
        change(folder / "tokenizer_config.json", tokenizer_class=name)
    expected = published("llama-bpe")
    expected.save(str(folder / "tokenizer.json"))
    tokenizer = open_checkpoint(str(folder)).text().tokenizer
    assert tokenizer.get_vocab() == expected.get_vocab()
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False).ids == expected.encode(text).ids


def test_a_tokenizer_class_that_comes_as_code_is_not_run(folder):
    expected = open_checkpoint(str(folder)).text()
    (folder / "made_here.py").write_text("raise SystemExit")
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="MadeHere",
        auto_map={"AutoTokenizer": ["made_here.MadeHere", None]},
    )
    found = open_checkpoint(str(folder)).text()
    assert found.tokenizer.encode("a<|end|>b").ids == expected.tokenizer.encode("a<|end|>b").ids
    assert (found.chat_templates, found.end_ids) == (expected.chat_templates, expected.end_ids)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        open_checkpoint(str(folder)).text()


def test_tokens_that_only_the_tokenizer_config_names(folder):
    values = {"content": "<|tool|>", "special": True}
    change(folder / "tokenizer_config.json", added_tokens_decoder={"260": values})
    tokenizer = open_checkpoint(str(folder)).text().tokenizer
    assert tokenizer.token_to_id("<|tool|>") == 260
    assert tokenizer.encode("a<|tool|>").ids[-1] == 260
    change(folder / "tokenizer_config.json", added_tokens_decoder={"300": values})
    with pytest.raises(CheckpointError, match="the files are of different tokenizers"):
        open_checkpoint(str(folder)).text()


def test_what_frames_a_document_is_the_tokenizer_configs(tmp_path):
    from transformers import LlamaTokenizer

    folder = save_tiny_model(tmp_path / "model", "llama")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    LlamaTokenizer(vocab=vocabulary, merges=[("\u2581", "a")], add_bos_token=True).save_pretrained(folder)
    from transformers import AutoTokenizer

    for adds in (True, False):
        change(folder / "tokenizer_config.json", add_bos_token=adds)
        ids = open_checkpoint(str(folder)).text().tokenizer.encode("a").ids
        assert ids == AutoTokenizer.from_pretrained(folder).encode("a")
