"""How far engines with other KV caches are from one of the same weights, by the position in a long text.

    python benchmarks/cache_fidelity.py FLOAT32-CACHE INT8-CACHE … --prompts FILE.jsonl [--tokens 4000] [--json FILE]

The prompts stand one after the other in a text of so many tokens, which all engines read. KL in nats and top-1
agreement, to the first engine, are means over the positions of a part. The last line is JSON.
"""

import argparse
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.fidelity import kl_nats, log_softmax
from engines.directory import open_directory
from engines.loading import load_engine
from engines.text import open_codec
from quasar.text import read_prompts

# Where parts of the text begin, and how many positions are read at once: logits of large vocabularies take room.
_PARTS = (0, 256, 1024, 2048, 4096, 8192, 16384, 32768)
_AT_ONCE = 128


def text_of(directory: Path, prompts: Path, tokens: int) -> NDArray[np.int64]:
    """The prompts' tokens, one after the other: int64 [tokens] or fewer."""
    codec = open_codec(directory, open_directory(directory).manifest.text)
    parts = [codec.encode_chat(prompt.messages) for prompt in read_prompts(prompts)]
    return np.concatenate(parts).astype(np.int64)[:tokens]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="FLOAT32-CACHE")
    parser.add_argument("others", type=Path, nargs="+", metavar="INT8-CACHE")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--tokens", type=int, default=4000, metavar="N", help="of the text")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()

    text = text_of(options.base, options.prompts, options.tokens)
    sessions = {str(path): load_engine(path).session for path in (options.base, *options.others)}
    kl: dict[str, list[NDArray[np.float64]]] = {str(path): [] for path in options.others}
    agrees: dict[str, list[NDArray[np.bool_]]] = {str(path): [] for path in options.others}
    for first in range(0, len(text), _AT_ONCE):
        chunk = text[first : first + _AT_ONCE]
        log_p = log_softmax(sessions[str(options.base)].run_logits(chunk, first, len(chunk)))
        for name in kl:
            log_q = log_softmax(sessions[name].run_logits(chunk, first, len(chunk)))
            kl[name].append(kl_nats(log_p, log_q))
            agrees[name].append(log_p.argmax(axis=-1) == log_q.argmax(axis=-1))
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in kl:
        nats, same = np.concatenate(kl[name]), np.concatenate(agrees[name])
        found[name] = {
            f"{first} to {min(end, len(text))}": {
                "kl": round(float(nats[first:end].mean()), 5),
                "top1": round(float(same[first:end].mean()), 4),
            }
            for first, end in pairwise((*_PARTS, len(text)))
            if first < min(end, len(text))
        }
        print(name)
        for part, figures in found[name].items():
            print(f"  {part:>14}: KL {figures['kl']:.5f}, top-1 {100 * figures['top1']:.1f} %")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
