"""How often a draft head's likeliest token is the verifier's on answers to given prompts, by depth and category.

    python benchmarks/head_agreement.py DIR HEAD --prompts FILE.jsonl [--tokens 128] [--json FILE]

DIR answers greedily; HEAD, a folder that `calibration train-head` wrote for DIR's model, reads DIR's hidden states over
prompts and answers. It is run as it was trained, in floats, in chains of five. "answers alone": the same where it sees
nothing of the prompt but its last two positions, which tells what it takes from there. The last line is JSON.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from head_features import as_seen_by

import runtime
from calibration.draft_heads.acceptance_estimate import estimate
from calibration.draft_heads.data_folder import ANSWER, GIVEN, GeneratedSequence
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.likely_tokens import KEPT_TOKENS
from calibration.draft_heads.linear_guess import InputScales
from calibration.draft_heads.packed_blocks import draft_numbers, pack, torch_block
from calibration.draft_heads.target_tensors import open_target, target_parts
from engines import OnnxRuntimeOptions, load_engine
from engines.directory import open_directory
from engines.text import open_codec
from quasar.draft_heads.folder import open_draft_head
from quasar.text import Prompt, read_prompts

# Positions of the prompt that are left where the head is to see the answer alone.
_LEFT = 2


def answered(directory: Path, prompts: Sequence[Prompt], tokens: int) -> list[GeneratedSequence]:
    """Prompts with the engine's greedy answers; hidden states and likely tokens are still to be read."""
    opened = open_directory(directory)
    codec = open_codec(directory, opened.manifest.text)
    found = []
    with runtime.load(directory) as engine:
        for number, prompt in enumerate(prompts):
            given = codec.encode_chat(prompt.messages)
            answer = engine.generate(prompt.messages, max_new_tokens=tokens).token_ids
            length = len(given) + len(answer)
            asked = np.arange(length) >= len(given) - 1
            found.append(
                GeneratedSequence(
                    number=number,
                    greedy=True,
                    tokens=np.array([*given, *answer], np.int32),
                    kinds=np.where(np.arange(length) < len(given), GIVEN, ANSWER).astype(np.int8),
                    features=np.zeros((length, 0), np.float16),
                    likely=np.zeros((length, KEPT_TOKENS), np.int32),
                    log_probabilities=np.where(asked, 0, -np.inf)[:, None].repeat(KEPT_TOKENS, 1).astype(np.float16),
                )
            )
    return found


def figures(model: HeadModel, sequences: Sequence[GeneratedSequence], targets: Any, vocab_size: int) -> dict[str, Any]:
    """Agreement by depth, and the acceptance length of chains of five."""
    numbers, longest = draft_numbers(targets, vocab_size), max(map(len, sequences))
    blocks = [torch_block(pieces, numbers) for pieces in pack(sequences, range(len(sequences)), longest)]
    found = estimate(model, blocks, targets)
    return {"agreement": found.agreement, "chain": found.chain[-1], "positions": found.positions}


def answer_of(sequence: GeneratedSequence) -> GeneratedSequence:
    """Without the prompt but for its last positions."""
    first = int((np.asarray(sequence.kinds) == ANSWER).argmax())
    return sequence.part(max(0, first - _LEFT), len(sequence))


def main() -> None:
    """Answer, read, and say what agrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("head", type=Path)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runtime.share_threads()
    prompts = read_prompts(options.prompts)
    manifest = open_directory(options.engine).manifest
    contract = manifest.contract
    asked = OnnxRuntimeOptions(
        hidden_states=(contract.num_layers,), draft_head=False, max_positions=contract.prefill_chunk
    )
    unread = answered(options.engine, prompts, options.tokens)
    session = load_engine(options.engine, options=asked).session
    sequences = list(as_seen_by(session, unread))
    session.close()
    checkpoint = open_target(options.engine, manifest, None)
    head = open_draft_head(options.head, checkpoint.spec)
    model = HeadModel(
        head.spec,
        {name: np.asarray(head.read(name), np.float32) for name in head.spec.tensors()},
        target_parts(checkpoint),
        InputScales(hidden=np.ones(checkpoint.spec.hidden_size, np.float32), embedding=1.0),
        num_positions=contract.capacity,
    )
    result: dict[str, Any] = {}
    categories = list(dict.fromkeys(prompt.category for prompt in prompts))
    for category in [*categories, "all"]:
        own = [one for one, prompt in zip(sequences, prompts, strict=True) if category in (prompt.category, "all")]
        result[category] = {
            name: figures(model, seen, head.targets, contract.vocab_size)
            for name, seen in (("prompts and answers", own), ("answers alone", list(map(answer_of, own))))
        }
        for name, one in result[category].items():
            depths = " ".join(f"{100 * share:.1f}" for share in one["agreement"])
            print(f"{category:16s} {name:20s} {depths} %, chains of five emit {one['chain']:.2f}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
