"""Draft heads from the float model's hidden states against heads from the quantized verifier's, on the same text.

    python benchmarks/head_features.py DIR --float DIR2 --data FOLDER -o OUT [--tokens 120000] [--updates 1500]

FOLDER is what `calibration train-head DIR --data FOLDER` kept. The float engine reads the same tokens, for its own
hidden states and likeliest tokens; then two heads are trained for the same number of updates, with one vocabulary and
seed. Both are measured on held-out text as the *verifier* sees it, which is what a head gets when it drafts, and
written to OUT/verifier and OUT/float: `export add-head` and `benchmarks/draft_head.py` measure them with everything
else. The last line is JSON.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from calibration.draft_heads.arithmetic_choice import bfloat16_is_faster
from calibration.draft_heads.data_folder import DataFolder, GeneratedSequence
from calibration.draft_heads.draft_vocabulary import choose_vocabulary, token_masses
from calibration.draft_heads.likely_tokens import likely_tokens
from calibration.draft_heads.pace import Pace
from calibration.draft_heads.target_tensors import first_model, head_spec, open_target
from calibration.draft_heads.training import Training, split
from engines import OnnxRuntimeOptions, load_engine
from engines.directory import open_directory
from engines.session import Session, positions_of
from quasar.draft_heads.writer import write_draft_head

_SEED, _VOCABULARY = 0, 8192


def as_seen_by(session: Session, sequences: Sequence[GeneratedSequence]) -> Iterator[GeneratedSequence]:
    """The same tokens with another engine's hidden states and likeliest tokens, wherever these were asked for."""
    contract = session.contract
    logits = np.empty((contract.prefill_chunk, contract.vocab_size), np.float32)
    for number, sequence in enumerate(sequences):
        features, likely, log_probabilities = [], [], []
        for chunk in contract.prompt_chunks(len(sequence)):
            tokens = np.asarray(sequence.tokens[chunk], np.int64)
            rows = logits[: len(tokens)]
            session.run_batch([positions_of(tokens, chunk.start, len(tokens))], logits=rows)
            states = session.hidden_states
            assert states is not None
            features.append(states[0].astype(np.float16))
            ids, values = likely_tokens(rows)
            likely.append(ids)
            log_probabilities.append(values)
        asked = np.isfinite(np.asarray(sequence.log_probabilities)[:, :1])
        yield replace(
            sequence,
            features=np.concatenate(features),
            likely=np.concatenate(likely),
            log_probabilities=np.where(asked, np.concatenate(log_probabilities), -np.inf).astype(np.float16),
        )
        print(f"read {number + 1} of {len(sequences)}", end="\r", file=sys.stderr, flush=True)


def train(directory: Path, sequences: Sequence[GeneratedSequence], tokens: Any, updates: int, output: Path) -> Training:
    """A head that was trained on these sequences and written."""
    manifest = open_directory(directory).manifest
    checkpoint = open_target(directory, manifest, None)
    spec = head_spec(checkpoint.spec, num_layers=manifest.contract.num_layers, draft_vocab_size=len(tokens))
    learned, held_out = split(sequences)
    longest = max(map(len, sequences))
    model = first_model(checkpoint, spec, learned, tokens, num_positions=longest, seed=_SEED)
    output.mkdir(parents=True)
    scratch = output.with_suffix(".training")
    training = Training(
        model,
        learned,
        held_out,
        tokens,
        Pace(seconds=math.inf, most_updates=updates),
        seed=_SEED,
        checkpoint=scratch,
        bfloat16=bfloat16_is_faster(),
    )
    training.run(lambda progress: print(f"{output.name}: update {progress.updates}, {progress.estimate}", flush=True))
    scratch.unlink()
    write_draft_head(output, spec, model.tensors(), tokens, manifest.model["name"])
    return training


def main() -> None:
    """Read, train both, measure both on what the verifier says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--float", dest="float_engine", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", dest="output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=120_000)
    parser.add_argument("--updates", type=int, default=1500)
    options = parser.parse_args()
    identity = json.loads((options.data / "data.json").read_text(encoding="utf-8"))
    sequences: list[GeneratedSequence] = []
    for sequence in DataFolder(options.data, identity, read_only=True).sequences():
        if sum(map(len, sequences)) >= options.tokens:
            break
        sequences.append(sequence)
    contract = open_directory(options.engine).manifest.contract
    loaded = load_engine(
        options.float_engine,
        options=OnnxRuntimeOptions(hidden_states=(contract.num_layers,), max_positions=contract.prefill_chunk),
    )
    seen = list(as_seen_by(loaded.session, sequences))
    loaded.session.close()
    masses = [token_masses(split(sequences)[0][part::5], contract.vocab_size) for part in range(5)]
    eos = open_directory(options.engine).manifest.text.eos_token_ids
    tokens = choose_vocabulary(masses, always=set(eos), size=_VOCABULARY).tokens
    of_verifier = train(options.engine, sequences, tokens, options.updates, options.output / "verifier")
    of_float = train(options.engine, seen, tokens, options.updates, options.output / "float")
    # Both by the verifier's hidden states and its likeliest tokens.
    held_out = of_verifier.estimate()
    of_verifier.model = of_float.model
    result = {
        "tokens": sum(map(len, sequences)),
        "updates": options.updates,
        "trained on the verifier": held_out.to_json(),
        "trained on the float model": of_verifier.estimate().to_json(),
        "float model's head on the float model": of_float.estimate().to_json(),
    }
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{name}: agreement {value['coverage']['1']}, acceptance length {value['chain'][-1]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
