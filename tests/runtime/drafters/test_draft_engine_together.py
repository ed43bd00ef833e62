"""Engines that draft, for several sequences at once: each works on its own slot, and every answer is its own."""

import pytest

import runtime


@pytest.mark.parametrize("kind", ["model", "self", "hierarchical"])
@pytest.mark.parametrize(("k", "options"), [(3, {}), (None, {"temperature": 0.9, "seed": 3})], ids=["greedy", "drawn"])
def test_sequences_at_once_get_the_tokens_that_they_get_alone(tiny_model, build_engine, tiny_engine, kind, k, options):
    unsmoothed = build_engine(tiny_model, alpha="off")
    prompts = ["one two one two", "abc abc abc", "hello there", "x y z x y", "k l m k l m"]
    with runtime.load(build_engine(tiny_model, precision="fp32"), max_sequences=4) as verifier:
        common = {"max_new_tokens": 30, "ignore_eos": True, **options}
        alone = [verifier.generate(prompt, drafter="none", **common).token_ids for prompt in prompts]
        drafter = f"{kind}:{unsmoothed if kind == 'self' else tiny_engine}"
        together = verifier.generate(prompts, drafter=drafter, num_draft_tokens=k, **common)
        assert [one.token_ids for one in together] == alone
        if k is not None:
            accepted, drafted = (sum(getattr(one.stats, name) for one in together) for name in ("accepted", "drafted"))
            assert accepted > 0.3 * drafted > 0
        assert max(verifier.metrics().sequences_per_pass) == 4
