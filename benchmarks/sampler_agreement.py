"""How often a drafter that samples agrees with its target, by the way in which both draw with shared randomness.

    python benchmarks/sampler_agreement.py build/smollm2-fp32 build/smollm2-w8a8 --prompts FILE.jsonl --limit 20

Both engines see the target's own greedy answers; for every token of these the exact probability that both draw the same
is computed from their two distributions: with one uniform and the inverse CDF over token ids, the same over tokens in
order of probability (each model's own), and with Gumbel-max. 1 - TV is the most that any way could reach with p and q
known to each other. The last line is JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import runtime
from plugins.sample_token import Filters, distribution
from quasar.text import read_prompts

Float64 = NDArray[np.float64]

SETTINGS = (Filters(temperature=0.8, top_p=0.95), Filters(temperature=1.0))


def overlap(p: Float64, q: Float64, p_order: NDArray[np.int64], q_order: NDArray[np.int64]) -> float:
    """Probability that one uniform falls into the same token's interval of both, laid out in these orders."""
    ends_p, ends_q = np.empty_like(p), np.empty_like(q)
    ends_p[p_order], ends_q[q_order] = np.cumsum(p[p_order]), np.cumsum(q[q_order])
    return float(np.maximum(np.minimum(ends_p, ends_q) - np.maximum(ends_p - p, ends_q - q), 0).sum())


def gumbel_agreement(p: Float64, q: Float64) -> float:
    """Probability that Gumbel-max with shared noise draws the same: the sum of 1 / sum_j max(p_j / p_i, q_j / q_i).

    Of the two in the inner sum p's is the larger where p_j / q_j >= p_i / q_i: one order of tokens serves all of them.
    """
    shared = np.flatnonzero((p > 0) & (q > 0))
    p_alone, q_alone = p[q == 0].sum(), q[p == 0].sum()
    order = shared[np.argsort(p[shared] / q[shared])]
    p, q = p[order], q[order]
    p_from_here = p_alone + np.cumsum(p[::-1])[::-1]
    q_before = q_alone + np.cumsum(q) - q
    return float((1 / (p_from_here / p + q_before / q)).sum())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drafter", type=Path, metavar="DIR")
    parser.add_argument("target", type=Path, metavar="DIR2")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=24, help="of each answer")
    options = parser.parse_args()

    pairs: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    runtime.share_threads()
    with runtime.load(options.drafter) as drafter, runtime.load(options.target) as target:
        for prompt in read_prompts(options.prompts, options.limit):
            ids = target.encode(list(prompt.messages)).tolist()
            answer = target.generate(list(prompt.messages), max_new_tokens=options.tokens).token_ids
            for count in range(len(answer)):
                context = [*ids, *answer[:count]]
                pairs.append((drafter.logits(context), target.logits(context)))
    found = {}
    for filters in SETTINGS:
        figures = []
        for logits, other in pairs:
            p, q = distribution(logits, filters), distribution(other, filters)
            by_id = np.arange(len(p))
            by_rank = np.argsort(-p, kind="stable"), np.argsort(-q, kind="stable")
            figures.append(
                (
                    1 - 0.5 * np.abs(p - q).sum(),
                    overlap(p, q, by_id, by_id),
                    overlap(p, q, *by_rank),
                    gumbel_agreement(p, q),
                )
            )
        best, ids_first, ranks_first, gumbel = np.mean(figures, axis=0).tolist()
        found[f"temperature {filters.temperature}, top_p {filters.top_p}"] = {
            "rows": len(figures),
            "1 - TV": best,
            "inverse CDF by id": ids_first,
            "inverse CDF by rank": ranks_first,
            "Gumbel-max": gumbel,
        }
    for name, shares in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in shares.items()))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
