"""What makes a draft head: trainings of the same length on less text, with another MLP, vocabulary or operands.

    python benchmarks/head_ablation.py DIR --data FOLDER [--minutes 5] [--arms text/8,text/4,...] [--json FILE]

FOLDER is what `calibration train-head DIR --data FOLDER` kept. Every arm is one training of so many minutes (but no
more than eight times through its text), and all are measured on the same held-out sequences: how often the head's
likeliest token is the verifier's, by depth, and the acceptance length of chains of five. "text/8" learns from an eighth
of the text; "vocabulary 4096" drafts so many tokens; "mlp 3072" has so wide an MLP; "float32" multiplies unrounded
operands. Arms run one after the other: nothing else may run. The last line is JSON.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.draft_heads.arithmetic_choice import bfloat16_is_faster, choose_threads
from calibration.draft_heads.data_folder import DataFolder, GeneratedSequence
from calibration.draft_heads.draft_vocabulary import choose_vocabulary, coverage_of, token_masses
from calibration.draft_heads.pace import MOST_EPOCHS, Pace
from calibration.draft_heads.packed_blocks import BLOCK_POSITIONS
from calibration.draft_heads.target_tensors import first_model, head_spec, open_target
from calibration.draft_heads.training import Training, split
from engines.directory import open_directory

_SEED, _VOCABULARY = 0, 8192
ARMS = (
    *("text/8", "text/4", "text/2", "text/1"),
    *("vocabulary 4096", "vocabulary 16384", "vocabulary 32768"),
    *("mlp 768", "mlp 3072", "float32"),
)


def train(
    directory: Path,
    arm: str,
    learned: Sequence[GeneratedSequence],
    held_out: Sequence[GeneratedSequence],
    minutes: float,
    *,
    bfloat16: bool,
) -> dict[str, Any]:
    """One arm's figures."""
    kind, _, number = arm.replace("/", " ").partition(" ")
    manifest = open_directory(directory).manifest
    contract = manifest.contract
    if kind == "text":
        learned = learned[: len(learned) // int(number)]
    size = int(number) if kind == "vocabulary" else _VOCABULARY
    masses = [token_masses(learned, contract.vocab_size)]
    vocabulary = choose_vocabulary(masses, always=set(manifest.text.eos_token_ids), size=size)
    checkpoint = open_target(directory, manifest, None)
    spec = head_spec(
        checkpoint.spec,
        num_layers=contract.num_layers,
        draft_vocab_size=len(vocabulary.tokens),
        intermediate_size=int(number) if kind == "mlp" else None,
    )
    longest = max(len(one) for one in (*learned, *held_out))
    model = first_model(checkpoint, spec, learned, vocabulary.tokens, num_positions=longest, seed=_SEED)
    tokens = sum(map(len, learned))
    pace = Pace(seconds=60 * minutes, most_updates=math.ceil(MOST_EPOCHS * tokens / BLOCK_POSITIONS))
    with tempfile.TemporaryDirectory() as scratch:
        training = Training(
            model,
            learned,
            held_out,
            vocabulary.tokens,
            pace,
            seed=_SEED,
            checkpoint=Path(scratch) / "training",
            bfloat16=bfloat16 and kind != "float32",
        )
        training.run(lambda progress: print(f"{arm}: {progress.progress:.0%}, {progress.estimate}", flush=True))
    return {
        "tokens": tokens,
        "parameters": sum(parameter.numel() for parameter in model.parameters.values()),
        "held_out_coverage": round(coverage_of(token_masses(held_out, contract.vocab_size), vocabulary.tokens), 4),
        "updates": pace.updates,
        "epochs": round(training.epochs, 2),
        "seconds": round(pace.spent, 1),
        **training.estimate().to_json(),
    }


def main() -> None:
    """Train every arm, print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    identity = json.loads((options.data / "data.json").read_text(encoding="utf-8"))
    learned, held_out = split(list(DataFolder(options.data, identity, read_only=True).sequences()))
    choose_threads()
    bfloat16 = bfloat16_is_faster()
    found = {
        arm: train(options.engine, arm, learned, held_out, options.minutes, bfloat16=bfloat16)
        for arm in options.arms.split(",")
    }
    print("| arm | tokens | updates | epochs | agreement by depth | chains of five |\n|---|---|---|---|---|---|")
    for arm, figures in found.items():
        depths = " ".join(f"{share:.3f}" for share in figures["coverage"]["1"])
        row = (arm, f"{figures['tokens']:,}", figures["updates"], figures["epochs"], depths, figures["chain"][-1])
        print(f"| {' | '.join(map(str, row))} |")
    text = json.dumps({"minutes": options.minutes, "arms": found})
    if options.json is not None:
        options.json.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
