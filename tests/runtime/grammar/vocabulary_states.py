"""Grammars over a small vocabulary with tokens of several characters, for tests of states and drafts."""

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from quasar.text import TextCodec
from runtime.grammar.compiler import Grammars
from runtime.grammar.formats import Grammar

END, OTHER = "<|end|>", "<|other|>"
# The merges of a vocabulary: words, and ends of words beside punctuation.
_TEXT = [
    '{"name": "John Smith", "age": 33, "city": "London", "tags": ["a", "b"]}',
    "hello world, hello there; goodbye world: the answer is yes or no.",
] * 4


@cache
def codec():
    """About 400 tokens of a byte-level vocabulary; the end id and another special one come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_special_tokens([END, OTHER])
    return TextCodec(tokenizer, None)


def token(name):
    return codec().tokenizer.token_to_id(name)


def vocab_size():
    """The model's vocabulary is larger than the tokenizer's, as those of most checkpoints."""
    return codec().tokenizer.get_vocab_size() + 13


def encode(text):
    return codec().tokenizer.encode(text, add_special_tokens=False).ids


@cache
def grammars():
    return Grammars(codec(), vocab_size=vocab_size(), end_ids=[token(END)])


def start(kind, text, **options):
    return grammars().start(Grammar(kind=kind, text=text), **options)
