"""Tokenizers from GGUF fields: against the tokenizer whose fields they are, a written-out merge rule, refusals."""

import dataclasses

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from quasar.checkpoints import open_checkpoint
from quasar.checkpoints.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    GgufVocabulary,
    tokenizer_from_gguf,
)
from quasar.errors import CheckpointError

TEXTS = [
    "x =  2",
    "| 12 | 3456 |\n|---|\n",
    "He's 100% sure; they'LL see.\r\n\r\n  def f(x):\n\treturn x**2",
    "naïve café 你好 🙂 \u00bd",
    "   leading, trailing   ",
    "1234567890 12 3",
    "camelCase HTTPServer's IT'S o'Clock résumÉ ǅ a/b//\n\n/c नमस्ते",
]
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As the tokenizer.json of Phi-4-mini and of Mistral Nemo have them.
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = O200K.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", "")
SMALL = GgufVocabulary(
    model="gpt2",
    pre="gpt-2",
    tokens=("a", "b", "ab", "<s>", "</s>"),
    types=(NORMAL, NORMAL, NORMAL, CONTROL, CONTROL),
    scores=(),
    merges=("a b",),
    bos_id=3,
    eos_id=4,
    unknown_id=None,
    add_bos=None,
    add_eos=None,
    add_space_prefix=True,
)


def published(kind):
    """A tokenizer trained on the texts, whose text is cut as the model's own tokenizer.json cuts it."""
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "llama-bpe": [
            pre_tokenizers.Split(Regex(CL100K), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "qwen2": [
            pre_tokenizers.Split(Regex(CL100K.replace("{1,3}", "")), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "seed-coder": [
            pre_tokenizers.Split(
                Regex(CL100K.replace("{1,3}", "{1}").replace("]+[\\r\\n]*", "\\r\\n]+")), behavior="isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        **{
            name: [
                pre_tokenizers.Split(Regex(expression), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
            for name, expression in {"smaug-bpe": CL100K, "dbrx": CL100K, "gpt-4o": O200K, "tekken": TEKKEN}.items()
        },
    }[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def fields_of(tokenizer, pre):
    """What a converter writes into a GGUF header."""
    import json

    state = json.loads(tokenizer.to_str())["model"]
    words = sorted(state["vocab"], key=state["vocab"].get)
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in state["merges"]]
    return dataclasses.replace(
        SMALL,
        pre=pre,
        tokens=(*words, "<|begin|>", "<tool>", "[PAD9]"),
        types=(*([NORMAL] * len(words)), CONTROL, USER_DEFINED, UNUSED),
        merges=tuple(merges),
        bos_id=len(words),
        eos_id=None,
    )


@pytest.mark.parametrize(
    "kind", ["smollm", "llama-bpe", "qwen2", "seed-coder", "gpt-2", "smaug-bpe", "dbrx", "gpt-4o", "tekken"]
)
def test_byte_level_kinds_cut_as_the_published_tokenizers_do(kind):
    expected = published(kind)
    ours = tokenizer_from_gguf(fields_of(expected, kind))
    random = np.random.default_rng(0)
    joined = "".join(TEXTS)
    for text in [*TEXTS, *(joined[a : a + 20] for a in random.integers(0, len(joined), 200))]:
        assert ours.encode(text, add_special_tokens=False).ids == expected.encode(text).ids
        assert ours.decode(ours.encode(text, add_special_tokens=False).ids) == text


def test_the_kinds_differ_where_their_rules_do():
    """Ids of the demo model: SmolLM2 splits digits first, which GPT-2's rule does not."""
    tokenizer = open_checkpoint("smollm2").text().tokenizer
    assert tokenizer.encode("x =  2").tokens == ["x", "Ġ=", "ĠĠ", "2"]
    assert tokenizer.encode("in 1969").tokens == ["in", "Ġ", "1", "9", "6", "9"]
    # Its published special tokens.
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2]
    assert tokenizer.get_vocab_size() == 49152


def test_no_token_is_added_and_padding_has_none():
    vocabulary = fields_of(published("gpt-2"), "gpt-2")
    tokenizer = tokenizer_from_gguf(vocabulary)
    assert tokenizer.get_vocab_size() == len(vocabulary.tokens) - 1
    assert tokenizer.token_to_id("[PAD9]") is None
    added = tokenizer.get_added_tokens_decoder()
    assert {one.content: one.special for one in added.values()} == {"<|begin|>": True, "<tool>": False}


@pytest.mark.parametrize(
    ("change", "ids"),
    [
        ({}, [2]),
        ({"add_bos": True}, [3, 2]),
        ({"add_eos": True}, [2, 4]),
        ({"add_bos": True, "add_eos": True}, [3, 2, 4]),
        ({"pre": "llama-bpe"}, [3, 2]),
        ({"pre": "llama-bpe", "add_bos": False}, [2]),
        ({"pre": "tekken"}, [3, 2]),
        ({"pre": "smaug-bpe"}, [2]),
        ({"pre": "gpt-4o"}, [2]),
        ({"add_bos": True, "bos_id": None}, [2]),
        ({"add_bos": True, "add_eos": True, "eos_id": 3}, [3, 2, 3]),
    ],
)
def test_what_frames_a_document(change, ids):
    assert tokenizer_from_gguf(dataclasses.replace(SMALL, **change)).encode("ab").ids == ids


def test_whole_words_are_not_merged_up_to():
    """`ignore_merges`: Llama 3 has tokens that no merges lead to."""
    words = dataclasses.replace(SMALL, merges=(), add_bos=False)
    assert tokenizer_from_gguf(words).encode("ab").ids == [0, 1]
    kinds = {"llama-bpe": [2], "tekken": [2], "smaug-bpe": [0, 1], "gpt-4o": [0, 1]}
    for pre, ids in kinds.items():
        assert tokenizer_from_gguf(dataclasses.replace(words, pre=pre)).encode("ab").ids == ids


PIECES = ["▁", "a", "b", "c", "▁a", "ab", "bc", "abc", "▁ab", "aa", "cab", "▁▁"]


def sentencepiece(**changes):
    tokens = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES)
    types = (UNKNOWN, CONTROL, CONTROL, *([BYTE] * 256), *([NORMAL] * len(PIECES)))
    random = np.random.default_rng(3)
    scores = (*([0.0] * 259), *(-random.permutation(len(PIECES)).astype(float)))
    values = {"tokens": tokens, "types": types, "scores": scores, "bos_id": 1, "eos_id": 2, "unknown_id": 0}
    return dataclasses.replace(SMALL, model="llama", pre="default", merges=(), **{**values, **changes})


def merged(text, vocabulary):
    """SentencePiece's rule, written out: join the neighbours whose union scores highest, the leftmost first."""
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    pieces = list(text.replace(" ", "▁"))
    while True:
        joins = [
            (vocabulary.scores[ids[pieces[place] + pieces[place + 1]]], -place)
            for place in range(len(pieces) - 1)
            if pieces[place] + pieces[place + 1] in ids
        ]
        if not joins:
            break
        place = -max(joins)[1]
        pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
    found = []
    for piece in pieces:
        found += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return found


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_merges_by_score(prefix):
    vocabulary = sentencepiece(add_space_prefix=prefix)
    tokenizer = tokenizer_from_gguf(vocabulary)
    random = np.random.default_rng(0)
    for _ in range(500):
        text = "".join(random.choice(list("abc é"), random.integers(1, 12)))
        ids = tokenizer.encode(text).ids
        assert ids == [1, *merged(" " + text if prefix else text, vocabulary)]
        assert tokenizer.decode(ids) == text


def test_transformers_reads_the_same_sentencepiece():
    """transformers' own Llama tokenizer over the same pieces and merges."""
    from transformers import LlamaTokenizer

    from quasar.checkpoints.gguf_tokenizer import _ids, _merges_by_score

    vocabulary = sentencepiece()
    ids = _ids(vocabulary)
    expected = LlamaTokenizer(vocab=ids, merges=_merges_by_score(vocabulary, ids), add_prefix_space=True)
    ours = tokenizer_from_gguf(vocabulary)
    for text in ("abc", "a b c", "ab  cab", "é a"):
        assert ours.encode(text, add_special_tokens=False).ids == expected.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "tekken9"}, "unsupported pre-tokenizer: GGUF 'tekken9'; supported are llama-bpe"),
        ({"pre": ""}, r"none \(tokenizer.ggml.pre is missing\)"),
        ({"model": "t5"}, "GGUF model 't5'; supported are gpt2 and llama"),
        ({"tokens": (), "types": ()}, "has no tokens"),
        ({"merges": ("ab",)}, "merges holds 'ab'"),
        ({"model": "llama"}, "has no scores"),
    ],
)
def test_what_is_not_known_is_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        tokenizer_from_gguf(dataclasses.replace(SMALL, **change))


def test_a_header_that_contradicts_itself():
    values = {"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1]}
    with pytest.raises(CheckpointError, match="2 tokens and 1 types"):
        GgufVocabulary.read(lambda key, default: values.get(key, default))


def test_added_token_text_is_found_before_merging():
    vocabulary = dataclasses.replace(SMALL, types=(NORMAL, NORMAL, USER_DEFINED, CONTROL, CONTROL), merges=())
    assert tokenizer_from_gguf(vocabulary).encode("aab").ids == [0, 2]
    reference = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, []))
    reference.add_tokens([AddedToken("ab", normalized=False)])
    assert reference.encode("aab").ids == [0, 2]
