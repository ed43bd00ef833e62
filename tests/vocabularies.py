"""Small tokenizers of every kind that the runtime reads, made from nothing."""

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

PIECES = ["▁", "▁a", "a", "b", "▁▁", "▁你", "好", "é", "▁é", "🙂", "\n", "▁the", "he", ".", "▁."]
SPECIAL = ["<s>", "</s>", "<|im_end|>"]


def byte_level():
    """GPT-2's alphabet, a token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_added(tokenizer)


def byte_fallback():
    """Llama 2's form: pieces, and a token for each byte of what has none."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_added(tokenizer)


def sentencepiece():
    """Unigram with Metaspace, without bytes."""
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in PIECES)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _with_added(tokenizer)


def bytes_and_pieces():
    """Gemma's form: byte fallback, and no space that is put before a text."""
    tokenizer = byte_fallback()
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


KINDS = {
    "byte-level": byte_level,
    "byte-fallback": byte_fallback,
    "SentencePiece": sentencepiece,
    "byte-fallback without prefix": bytes_and_pieces,
}


def _with_added(tokenizer):
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    return tokenizer
