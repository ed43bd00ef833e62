"""Engines that draft, by draft length: acceptance, memory, and speed beside plain decoding, prompt lookup and `auto`.

    python benchmarks/engine_drafters.py build/fp32 --drafter self:build/w8a8-unsmoothed --prompts FILE.jsonl --limit 13
    python benchmarks/engine_drafters.py build/w4a16 --drafter self model:build/small --prompts FILE.jsonl --limit 13

Each drafter drafts alone, with so many tokens and with as many as the controller takes, and beside `auto`'s. All arms
are interleaved prompt by prompt. The tokens of every arm are compared with plain decoding's. With `--context-tokens`
prompts are long.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import runtime
from evaluation.bench import total
from quasar.text import Prompt, read_prompts
from runtime.stats import Stats

Arm = tuple[str, int | None]
_PLAIN: Arm = ("none", None)
_LOOKUP: Arm = ("prompt-lookup", 5)
_AUTO: Arm = ("auto", None)


def measure(engine: runtime.Engine, arms: Sequence[Arm], prompts: Sequence[Prompt], tokens: int) -> None:
    """Run every prompt through every arm, and print a line for each."""
    runs: dict[Arm, list[Stats]] = {arm: [] for arm in arms}
    differing = 0
    for index, prompt in enumerate(prompts):
        answers = {}
        first = index % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            # With a salt the arms share the prompt's rows: a prompt is read once.
            generation = engine.generate(
                prompt.messages,
                max_new_tokens=tokens,
                drafter=arm[0],
                num_draft_tokens=arm[1],
                cache_salt="benchmark",
            )
            runs[arm].append(generation.stats)
            answers[arm] = generation.token_ids
        differing += sum(answer != answers[_PLAIN] for answer in answers.values())
    plain = total(runs[_PLAIN])["tokens_per_second"]
    print(f"{'drafter':40s} K  accepted/drafted  L     ms/round  tokens/s  over plain")
    for (name, count), stats in runs.items():
        sums = total(stats)
        share = sums["accepted"] / sums["drafted"] if sums["drafted"] else 0.0
        print(
            f"{name[-40:]:40s} {count or '-'}  {share:16.3f}  {sums['acceptance_length']:.2f}  "
            f"{sums['ms_per_round']:8.1f}  {sums['tokens_per_second']:8.1f}  {sums['tokens_per_second'] / plain:.2f}"
        )
    memory = engine.memory()
    print(f"answers that differ from plain decoding's: {differing}")
    print(
        f"MB: verifier's weights {memory.weights / 1e6:.0f}, its cache {memory.cache / 1e6:.0f}, "
        f"engines that draft {memory.drafters / 1e6:.0f}; kernels: {engine.kernels}"
    )


def main() -> None:
    """Read the arguments, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--drafter", nargs="+", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument(
        "--context-tokens", type=int, help="so many tokens of the file's other texts stand before each prompt"
    )
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    arguments = parser.parse_args()
    # Verifier and drafter run one after the other: with a pool each, the idle one would slow the other down.
    runtime.share_threads()
    engine = runtime.load(arguments.directory)
    arms = [_PLAIN, _LOOKUP, _AUTO]
    for drafter in arguments.drafter:
        arms += [(drafter, count) for count in (*arguments.draft_tokens, None)]
        arms.append((f"auto,{drafter}", None))
    engine.warmup()
    prompts = read_prompts(arguments.prompts, arguments.limit)
    if arguments.context_tokens:
        prompts = after_texts(engine, prompts, read_prompts(arguments.prompts), arguments.context_tokens)
    measure(engine, arms, prompts, arguments.max_new_tokens)


def after_texts(
    engine: runtime.Engine, prompts: Sequence[Prompt], others: Sequence[Prompt], tokens: int
) -> list[Prompt]:
    """Each prompt as the last question about so many tokens of other prompts' texts, at most."""
    lengths = [len(engine.encode(list(other.messages))) for other in others]
    found = []
    for number, prompt in enumerate(prompts):
        before, total = [], 0
        # Other texts for every prompt: by a stride that is coprime to most numbers of prompts.
        for place in (number * 17 + step * 7 for step in range(len(others))):
            other, length = others[place % len(others)], lengths[place % len(others)]
            if other.text != prompt.text and total + length <= tokens:
                before.append(other.text)
                total += length
        text = "\n\n".join([*before, prompt.text])
        found.append(replace(prompt, messages=({"role": "user", "content": text},)))
    return found


if __name__ == "__main__":
    main()
