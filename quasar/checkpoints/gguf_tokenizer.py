"""A GGUF file's tokenizer fields → a tokenizer of the `tokenizers` library, id for id.

Two families: byte-level BPE ("gpt2"), whose text is cut by the rule that `tokenizer.ggml.pre` names, and SentencePiece
BPE ("llama"), whose merges follow from the pieces' scores. The rules are those of the models' published tokenizers.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quasar.errors import CheckpointError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from tokenizers.pre_tokenizers import PreTokenizer

# `tokenizer.ggml.token_type` (gguf.TokenType).
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
# Rows that only pad the embedding have no token; converters name them so.
_PADDING = re.compile(r"\[PAD\d+\]")
_SPACE = "▁"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# cl100k's rule as Llama 3 has it (digits in threes) and as Qwen 2 has it (digits one by one).
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# o200k's: a word ends where a small letter comes before a capital one.
_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4O = "|".join((*(rf"{word}(?i:'s|'t|'re|'ve|'m|'ll|'d)?" for word in _WORDS), r"\p{N}{1,3}", _REST))
# Mistral's: no endings after an apostrophe, digits one by one.
_TEKKEN = "|".join((*_WORDS, r"\p{N}", _REST))
# Seed's: line ends are pieces of their own after punctuation, too.
_SEED = _QWEN2.replace(r"+[\r\n]*|", "+|")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    """How text is cut before merging.

    `splits`: regular expressions, each applied to the pieces of the one before. `digits`: every digit alone, first.
    `whole_words`: a piece that is a token is not merged up to it (`ignore_merges`). `starts`: a text begins with BOS,
    where the file does not say.
    """

    splits: tuple[str, ...]
    digits: bool = False
    nfc: bool = False
    whole_words: bool = False
    starts: bool = False


_LLAMA3_RULE = _Rule(splits=(_LLAMA3,), whole_words=True, starts=True)
_QWEN2_RULE = _Rule(splits=(_QWEN2,), nfc=True)
_DIGITS_GPT2 = _Rule(splits=(_GPT2,), digits=True)
# Letters that have a case, as the published tokenizer lists them.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ"
    "-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰"
    "-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_LLM = _Rule(
    splits=(
        *(r"[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$"),
        *(r"[一-龥ࠀ-一가-퟿]+", r"\p{N}+"),
    ),
)
_DEEPSEEK_CODER = _Rule(
    splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
)
RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3_RULE),
    # The first Llama 3 files' tokenizer, which neither keeps whole words nor begins with BOS.
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Rule(splits=(_LLAMA3,))),
    "gpt-4o": _Rule(splits=(_GPT4O,)),
    "tekken": _Rule(splits=(_TEKKEN,), whole_words=True, starts=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2_RULE),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), _DIGITS_GPT2),
    **dict.fromkeys(("gpt-2", "gpt2", "phi-2", "olmo", "mpt"), _Rule(splits=(_GPT2,))),
    "seed-coder": _Rule(splits=(_SEED,)),
    "qwen35": _Rule(splits=(_QWEN35,)),
    "deepseek-coder": _DEEPSEEK_CODER,
    "deepseek-llm": _DEEPSEEK_LLM,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufVocabulary:
    """What a GGUF header says of its tokenizer; `types` and `scores` are empty where the file has none."""

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    scores: tuple[float, ...]
    merges: tuple[str, ...]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool | None
    add_eos: bool | None
    add_space_prefix: bool

    @classmethod
    def read(cls, field: Callable[..., Any]) -> "GgufVocabulary":
        """From a header; `field(key, default)` gives a value.

        Raises `CheckpointError` for a header that contradicts itself.
        """

        def values(name: str) -> Sequence[Any]:
            return field(f"tokenizer.ggml.{name}", ()) or ()

        def token_id(name: str) -> int | None:
            value = field(f"tokenizer.ggml.{name}_token_id", None)
            # Converters write 2^32 - 1 for "none".
            return int(value) if value is not None and int(value) < len(tokens) else None

        def flag(name: str) -> bool | None:
            value = field(f"tokenizer.ggml.{name}", None)
            return None if value is None else bool(value)

        tokens = tuple(values("tokens"))
        space = flag("add_space_prefix")
        found = cls(
            model=str(field("tokenizer.ggml.model", "")),
            pre=str(field("tokenizer.ggml.pre", "")),
            tokens=tokens,
            types=tuple(int(one) for one in values("token_type")),
            scores=tuple(float(one) for one in values("scores")),
            merges=tuple(values("merges")),
            bos_id=token_id("bos"),
            eos_id=token_id("eos"),
            unknown_id=token_id("unknown"),
            add_bos=flag("add_bos_token"),
            add_eos=flag("add_eos_token"),
            add_space_prefix=True if space is None else space,
        )
        for name in ("types", "scores"):
            came = len(getattr(found, name))
            if came not in (0, len(tokens)):
                raise CheckpointError(f"the header has {len(tokens)} tokens and {came} {name}: the file is damaged")
        return found

    def type_of(self, token: int) -> int:
        """The token's type; a file without types has ordinary tokens alone."""
        return self.types[token] if self.types else NORMAL

    def is_control(self, token: int) -> bool:
        """Whether the token is a marker, which no text spells."""
        return self.type_of(token) in (CONTROL, UNKNOWN)


def tokenizer_from_gguf(vocabulary: GgufVocabulary) -> "Tokenizer":
    """The tokenizer; raises `CheckpointError` naming a model or pre-tokenizer that is not known."""
    if not vocabulary.tokens:
        raise CheckpointError("the header has no tokens (tokenizer.ggml.tokens): the file holds no tokenizer")
    if vocabulary.model == "gpt2":
        tokenizer = _byte_level(vocabulary)
        begins = RULES[vocabulary.pre].starts
    elif vocabulary.model == "llama":
        tokenizer = _sentencepiece(vocabulary)
        begins = True
    else:
        raise CheckpointError(f"unsupported tokenizer: GGUF model {vocabulary.model!r}; supported are gpt2 and llama")
    _add_tokens(tokenizer, vocabulary)
    _frame(tokenizer, vocabulary, begins=begins)
    return tokenizer


def _byte_level(vocabulary: GgufVocabulary) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    rule = RULES.get(vocabulary.pre)
    if rule is None:
        came = repr(vocabulary.pre) if vocabulary.pre else "none (tokenizer.ggml.pre is missing)"
        raise CheckpointError(
            f"unsupported pre-tokenizer: GGUF {came}; supported are {', '.join(RULES)}: convert the model again, or "
            "build from its Hugging Face folder"
        )
    pairs: list[tuple[str, str]] = []
    for merge in vocabulary.merges:
        # The first character is never the separator: a space is spelled Ġ.
        left, found, right = merge.partition(" ")
        if not found:
            raise CheckpointError(f"tokenizer.ggml.merges holds {merge!r}; two pieces with a space between expected")
        pairs.append((left, right))
    model = models.BPE(
        vocab=_ids(vocabulary), merges=pairs, fuse_unk=False, byte_fallback=False, ignore_merges=rule.whole_words
    )
    tokenizer = Tokenizer(model)
    normalizer: Normalizer | None = normalizers.NFC() if rule.nfc else None
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pre_tokenizer(rule: _Rule) -> "PreTokenizer":
    from tokenizers import Regex, pre_tokenizers

    steps: list[PreTokenizer] = [pre_tokenizers.Digits(individual_digits=True)] if rule.digits else []
    steps += [pre_tokenizers.Split(Regex(one), behavior="isolated") for one in rule.splits]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(vocabulary: GgufVocabulary) -> "Tokenizer":
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = None if vocabulary.unknown_id is None else vocabulary.tokens[vocabulary.unknown_id]
    ids = _ids(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=ids,
            merges=_merges_by_score(vocabulary, ids),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in vocabulary.types,
        )
    )
    prefix: list[Normalizer] = [normalizers.Prepend(_SPACE)] if vocabulary.add_space_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if vocabulary.add_space_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges_by_score(vocabulary: GgufVocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union has the highest score: every way to make a piece is a merge."""
    if not vocabulary.scores:
        raise CheckpointError("the header has no scores (tokenizer.ggml.scores), which a SentencePiece tokenizer needs")
    merges: list[tuple[float, int, int, str, str]] = []
    for token, piece in enumerate(vocabulary.tokens):
        if vocabulary.type_of(token) not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                merges.append((-vocabulary.scores[token], ids[left], ids[right], left, right))
    merges.sort(key=lambda one: one[:3])
    return [(left, right) for *_, left, right in merges]


def _ids(vocabulary: GgufVocabulary) -> dict[str, int]:
    return {
        text: token
        for token, text in enumerate(vocabulary.tokens)
        if not (vocabulary.type_of(token) == UNUSED and _PADDING.fullmatch(text))
    }


def _add_tokens(tokenizer: "Tokenizer", vocabulary: GgufVocabulary) -> None:
    """Markers and the user's own tokens are found in a text before it is cut and merged."""
    from tokenizers import AddedToken

    for token, text in enumerate(vocabulary.tokens):
        if vocabulary.is_control(token):
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif vocabulary.type_of(token) == USER_DEFINED and text:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])


def _frame(tokenizer: "Tokenizer", vocabulary: GgufVocabulary, *, begins: bool) -> None:
    """BOS before a document and EOS after it, where the file (or else the kind of tokenizer) has them."""
    from tokenizers import processors

    bos = vocabulary.bos_id if (begins if vocabulary.add_bos is None else vocabulary.add_bos) else None
    eos = vocabulary.eos_id if vocabulary.add_eos else None
    frame = [(vocabulary.tokens[token], token) for token in (bos, eos) if token is not None]
    if not frame:
        return
    before = [] if bos is None else [vocabulary.tokens[bos]]
    after = [] if eos is None else [vocabulary.tokens[eos]]

    def pieces(sequence: str, kind: int) -> list[str]:
        return [f"{piece}:{kind}" for piece in (*before, sequence, *after)]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=pieces("$A", 0), pair=pieces("$A", 0) + pieces("$B", 1), special_tokens=list(dict(frame).items())
    )
