"""`bench`: {float, quantized} × {plain, fixed lookup, speculative}, interleaved prompt by prompt; tokens as emitted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quasar.text import Prompt
from runtime.api import Engine
from runtime.drafters.named import DrafterOption
from runtime.stats import Stats

_RATIOS = {
    "quantized_speculative_over_float_plain": ("quantized_speculative", "float_plain"),
    "quantized_plain_over_float_plain": ("quantized_plain", "float_plain"),
    "quantized_speculative_over_quantized_plain": ("quantized_speculative", "quantized_plain"),
    "quantized_speculative_over_quantized_lookup": ("quantized_speculative", "quantized_lookup"),
    "quantized_lookup_over_quantized_plain": ("quantized_lookup", "quantized_plain"),
}
# Fixed prompt lookup, the yardstick: n-grams of 1 to 3, five drafts every round (Quasar, section 4).
_LOOKUP, _LOOKUP_TOKENS = "prompt-lookup", 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to decode: an engine, with a drafter or plainly."""

    name: str
    engine: Engine
    drafter: DrafterOption
    num_draft_tokens: int | None = None


def make_arms(
    quantized: Engine, float_engine: Engine | None, drafter: DrafterOption, num_draft_tokens: int | None = None
) -> list[Arm]:
    """The arms of a run: plain and speculative for each engine, and fixed prompt lookup for the quantized one."""
    arms = []
    for name, engine in (("float", float_engine), ("quantized", quantized)):
        if engine is not None:
            arms.append(Arm(name=f"{name}_plain", engine=engine, drafter="none"))
            arms.append(
                Arm(name=f"{name}_speculative", engine=engine, drafter=drafter, num_draft_tokens=num_draft_tokens)
            )
    arms.append(Arm(name="quantized_lookup", engine=quantized, drafter=_LOOKUP, num_draft_tokens=_LOOKUP_TOKENS))
    return arms


def bench(
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    on_run: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run every prompt through every arm, the order turning from prompt to prompt, after one warm-up each.

    Returns `arms`, `ratios` of decode tokens per second (total over total), both by category, and `mean_ratios`: the
    means over prompts of each prompt's own ratios.
    """
    for arm in arms:
        arm.engine.generate(prompts[0].messages, max_new_tokens=8, drafter=arm.drafter)
    runs: dict[str, list[tuple[str, Stats]]] = {arm.name: [] for arm in arms}
    for index, prompt in enumerate(prompts):
        first = index % len(arms)
        for arm in [*arms[first:], *arms[:first]]:
            generation = arm.engine.generate(
                prompt.messages,
                max_new_tokens=max_new_tokens,
                drafter=arm.drafter,
                num_draft_tokens=arm.num_draft_tokens,
            )
            runs[arm.name].append((prompt.category, generation.stats))
            on_run()
    totals = {name: total([stats for _, stats in pairs]) for name, pairs in runs.items()}
    categories = {
        category: {name: total([stats for of, stats in pairs if of == category]) for name, pairs in runs.items()}
        for category in dict.fromkeys(prompt.category for prompt in prompts)
    }
    return {
        "arms": totals,
        "ratios": ratios(totals),
        "mean_ratios": mean_ratios({name: [stats for _, stats in pairs] for name, pairs in runs.items()}),
        "categories": {category: {"arms": by_arm, "ratios": ratios(by_arm)} for category, by_arm in categories.items()},
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "drafters": {arm.name: str(arm.drafter) for arm in arms},
        "machine": arms[0].engine.record.machine,
    }


def total(stats: Sequence[Stats]) -> dict[str, float]:
    """Sums over runs; tokens per second is total over total, for the tokens of the rounds."""
    decoded = sum(one.tokens - 1 for one in stats)
    rounds = sum(one.rounds for one in stats)
    seconds = sum(one.decode_seconds for one in stats)
    return {
        "tokens": sum(one.tokens for one in stats),
        "decode_seconds": seconds,
        "prefill_seconds": sum(one.prefill_seconds for one in stats),
        "tokens_per_second": decoded / seconds if seconds else 0.0,
        "rounds": rounds,
        "drafted": sum(one.drafted for one in stats),
        "accepted": sum(one.accepted for one in stats),
        "acceptance_length": decoded / rounds if rounds else 1.0,
        "ms_per_round": 1e3 * seconds / rounds if rounds else 0.0,
    }


def mean_ratios(runs: Mapping[str, Sequence[Stats]]) -> dict[str, float]:
    """The means over prompts of the named ratios, of the prompts on which both arms decoded anything."""
    means = {}
    for name, (above, below) in _RATIOS.items():
        speeds = zip(runs.get(above, ()), runs.get(below, ()), strict=False)
        found = [
            one.tokens_per_second / other.tokens_per_second
            for one, other in speeds
            if one.tokens_per_second and other.tokens_per_second
        ]
        if found:
            means[name] = sum(found) / len(found)
    return means


def ratios(arms: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The named ratios of tokens per second whose two arms were run."""
    return {
        name: arms[above]["tokens_per_second"] / arms[below]["tokens_per_second"]
        for name, (above, below) in _RATIOS.items()
        if above in arms and below in arms and arms[below]["tokens_per_second"]
    }
