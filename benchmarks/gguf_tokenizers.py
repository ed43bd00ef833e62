"""GGUF tokenizers against llama.cpp's reference pairs: texts (.gguf.inp) and the ids that they must have (.gguf.out).

Point it at the folder `models` of a llama.cpp source tree. A file whose tokenizer is not supported is named with the
reason. Texts are encoded as content is: without BOS, and with control tokens as text.
"""

import argparse
from pathlib import Path

from quasar.checkpoints.gguf_reader import GgufReader
from quasar.checkpoints.gguf_tokenizer import GgufVocabulary, tokenizer_from_gguf
from quasar.errors import CheckpointError

_SEPARATOR = "\n__ggml_vocab_test__\n"


def main() -> None:
    """Print a table: file, pairs, equal ones, and the first text whose ids differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        print(f"{path.stem.removeprefix('ggml-vocab-'):<16} {_compare(path)}")


def _compare(path: Path) -> str:
    texts, expected = path.with_name(f"{path.name}.inp"), path.with_name(f"{path.name}.out")
    if not texts.is_file() or not expected.is_file():
        return "no reference pairs"
    fields = GgufReader(path).fields
    try:
        vocabulary = GgufVocabulary.read(lambda key, default: fields[key].contents() if key in fields else default)
        tokenizer = tokenizer_from_gguf(vocabulary)
    except CheckpointError as error:
        return f"refused: {str(error).partition(';')[0]}"
    tokenizer.encode_special_tokens = True
    pairs = list(
        zip(
            texts.read_bytes().decode().split(_SEPARATOR)[:-1],
            ([int(token) for token in line.split()] for line in expected.read_text().splitlines()),
            strict=True,
        )
    )
    different = [
        (text, tokenizer.encode(text, add_special_tokens=False).ids, ids)
        for text, ids in pairs
        if tokenizer.encode(text, add_special_tokens=False).ids != ids
    ]
    first = f"; first: {different[0]!r}"[:400] if different else ""
    return f"{len(pairs)} pairs, {len(pairs) - len(different)} equal{first}"


if __name__ == "__main__":
    main()
