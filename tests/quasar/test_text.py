"""Prompt files, chat templates in their sandbox, and text that streams in whole characters."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quasar.errors import DamagedEngineError, PromptError
from quasar.text import ChatTemplate, TextCodec, read_prompts

USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def codec():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return TextCodec(tokenizer, None)


def test_three_kinds_of_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"prompt": "a"},
        {"turns": ["b", "later"], "category": "two"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "c"}]},
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    prompts = read_prompts(path)
    assert [prompt.messages[-1]["content"] for prompt in prompts] == ["a", "b", "c"]
    assert prompts[1].category == "two"
    assert prompts[2].messages[0]["role"] == "system"


def test_a_limit_takes_every_category_in_turn(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"{category}{number}", "category": category} for category in "abc" for number in range(4)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert [prompt.text for prompt in read_prompts(path, limit=5)] == ["a0", "a1", "b0", "b1", "c0"]
    assert len(read_prompts(path, limit=99)) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a list came"),
        ('{"text": "x"}', "line 2: none of the keys prompt, messages, turns holds text"),
        ('{"turns": []}', "line 2: none of the keys"),
        ('{"messages": []}', "line 2: messages must be a list that is not empty"),
        ('{"messages": [{"role": "user"}]}', "line 2: a message needs the strings role and content"),
    ],
)
def test_bad_rows_are_named(line, message, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(PromptError, match=message):
        read_prompts(path)


def test_unusual_characters_do_not_cut_rows(tmp_path):
    path = tmp_path / "prompts.jsonl"
    texts = ["a\u2028b", "c\u0085d", "e\u2029f"]
    path.write_text("\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts), newline="")
    assert [prompt.text for prompt in read_prompts(path)] == texts


def test_rows_that_no_parser_survives(tmp_path):
    path = tmp_path / "prompts.jsonl"
    for row in ("[" * 100_000, '{"prompt": ' + "9" * 5000 + "}"):
        path.write_text(row)
        with pytest.raises(PromptError, match="line 1"):
            read_prompts(path)


def test_half_a_surrogate_is_no_text(codec):
    with pytest.raises(PromptError, match="the prompt is not Unicode text"):
        codec.encode_text("a\ud800b")


def test_files_that_are_none(tmp_path):
    with pytest.raises(PromptError, match="does not exist"):
        read_prompts(tmp_path / "nothing")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PromptError, match="cannot be read as UTF-8"):
        read_prompts(tmp_path / "binary")


def test_template_renders_as_transformers_does():
    source = (
        "{%- for message in messages %}\n"
        "    {%- if message.role == 'user' %}\n"
        "[{{ message.content | trim }}]\n"
        "    {%- else %}{% continue %}{%- endif %}\n"
        "{%- endfor %}{{ bos_token }}{{ messages | tojson(ensure_ascii=False) }}"
        "{% if tools is not none %}tools!{% endif %}{% generation %}answer{% endgeneration %}"
    )
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": " é <x> "}]
    expected = render_jinja_template([messages], chat_template=source, add_generation_prompt=True, bos_token="<s>")[0]
    assert ChatTemplate(source, bos_token="<s>").render(messages) == expected[0]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['__builtins__'] }}",
        "{{ strftime_now.__code__ }}",
        "{{ (messages | attr('__class__')).__base__ }}",
        "{% for x in ().__class__.__bases__ %}{{ x }}{% endfor %}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
    ],
)
def test_templates_that_reach_out_are_refused(source):
    with pytest.raises(PromptError, match=r"reaches for Python internals|cannot render"):
        ChatTemplate(source).render(USER)


def test_broken_and_refusing_templates():
    with pytest.raises(PromptError, match="cannot render this conversation"):
        ChatTemplate("{% for %}").render(USER)
    with pytest.raises(PromptError, match=r"^the chat template refuses this conversation: only two roles$"):
        ChatTemplate("{{ raise_exception('only two roles') }}").render(USER)
    with pytest.raises(PromptError, match="Range too big"):
        ChatTemplate("{% for i in range(10**9) %}x{% endfor %}").render(USER)
    for source in ("{{ 1/0 }}", "{{ '{a}'.format() }}", "{{ '%(a)s' % {} }}", "{{ 'x'.encode('foo') }}"):
        with pytest.raises(PromptError, match="cannot render"):
            ChatTemplate(source).render(USER)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DamagedEngineError, match=r"tokenizer\.json cannot be read"):
        TextCodec.from_file(tmp_path / "tokenizer.json", None)


@settings(max_examples=60)
@given(text=st.text(max_size=20), cut=st.lists(st.integers(1, 5), max_size=30))
def test_stream_never_shows_half_a_character(codec, text, cut):
    """Tokens are single bytes here: whatever the blocks, no piece holds a broken character, and all of it arrives."""
    ids = codec.encode_text(text)
    stream, pieces = codec.stream(), []
    for size in [*cut, 1000]:
        pieces.append(stream.push(ids[:size]))
        ids = ids[size:]
    pieces.append(stream.finish())
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_shows_at_the_end_only(codec):
    ids = codec.encode_text("a€")
    stream = codec.stream()
    assert stream.push(ids[:-1]) == "a"
    assert stream.finish().startswith("\ufffd")


def test_special_tokens_are_not_text(codec):
    ids = [*codec.encode_text("ab"), codec.tokenizer.token_to_id("<|end|>")]
    stream = codec.stream()
    assert stream.push(ids) + stream.finish() == "ab" == codec.decode(ids)
