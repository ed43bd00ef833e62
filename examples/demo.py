"""Answer one prompt twice, plainly and with speculation, and compare: speed, verify passes, and every token."""

import argparse
import sys

import runtime

# A prompt whose answer repeats much of it: that is where drafts from the context are accepted.
PROMPT = """Correct the spelling of this text and repeat it in full:

The old harbor is quiet in the mornning. The old harbor is loud in the evening, when the boats come back and the \
fishermen sell their fish. In the winter, when the boats stay in the harbor, the fishermen mend their nets and the \
children play on the frozen quay."""


def main() -> int:
    """Run the demo; exit code 1 if the two answers differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", help="an engine directory")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args()

    token_ids: dict[str, list[int]] = {}
    stats: dict[str, runtime.Stats] = {}
    with runtime.load(options.engine) as engine:
        engine.generate(options.prompt, max_new_tokens=4)  # warm up
        kernels = engine.kernels
        print(f"prompt: {options.prompt}")
        for name, drafter in (("plain", "none"), ("speculative", "auto")):
            print(f"\n--- {name} ---")
            token_ids[name] = []
            for event in engine.stream(options.prompt, max_new_tokens=options.max_new_tokens, drafter=drafter):
                print(event.text, end="", flush=True)
                token_ids[name] += event.token_ids
                if event.stats is not None:
                    stats[name] = event.stats
            print()

    print(f"\n{'':12} {'tokens':>7} {'verify passes':>14} {'acceptance length':>18} {'tokens/s':>9}")
    for name, one in stats.items():
        print(f"{name:12} {one.tokens:7} {one.rounds:14} {one.acceptance_length:18.2f} {one.tokens_per_second:9.1f}")
    print(f"kernels: {kernels}")
    identical = token_ids["plain"] == token_ids["speculative"]
    print(f"identical: {'yes' if identical else 'no'}")
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
