"""Answers under a grammar: whether they are valid and exact, and what the grammar adds to a round.

    python benchmarks/structured_output.py build/smollm2-w8a8
    python benchmarks/structured_output.py build/smollm2-w8a8 --random 20 --part schemas

Schemas: random ones, and hard ones that were picked by hand. Each is answered plainly, speculatively, drawn with a seed
both ways, and four at a time in passes that they share. An answer that ends with "stop" must be valid; all answers to
one question must have the same ids. What cannot be compiled must be refused with a reason, within seconds.

Rounds: width 6 (five drafts), greedy, with and without a grammar, interleaved; medians of milliseconds. `all` accepts
every draft, `typical` one of them; `masked` is typical with likeliest tokens that are all invalid, so that a
mask over the logits is made each time, and `drawn` samples. "Host" is the part outside of the pass: drafts and the
choice of tokens. The last line is JSON; a check that fails ends with exit code 1.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from numpy.typing import NDArray
from structured_schemas import HARD, random_schema

import runtime
from engines import OnnxRuntimeOptions, load_engine
from engines.text import open_codec
from quasar.errors import GrammarError
from runtime.acceptance import accept, follow
from runtime.drafters import Draft
from runtime.generation_options import GenerationOptions
from runtime.grammar.compiler import Grammars
from runtime.grammar.drafts import GuidedDrafter
from runtime.grammar.formats import Grammar, ResponseFormat
from runtime.grammar.greedy import GreedyGrammarChooser
from runtime.grammar.matcher import GrammarState
from runtime.sampling.chooser import GreedyChooser, LogitsChooser, TokenChooser
from runtime.sampling.compiled import make_sampler
from runtime.segment import Segment, Targets
from runtime.verifier import Verifier

Int64 = NDArray[np.int64]

WIDTH = 6
TOGETHER = 4
_WARM_UP = 5
_SEED = 11
# Seconds in which a schema is compiled or refused.
_MOST_SECONDS = 3.0
_ANSWER = '{"name": "John Smith", "city": "London", "age": 33, "tags": ["a"]}'
_ANSWER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "city": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "city", "age", "tags"],
    "additionalProperties": False,
}


def format_of(schema: dict[str, Any]) -> ResponseFormat:
    """The option for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def check_schemas(engine: runtime.Engine, schemas: dict[str, dict[str, Any]], max_new_tokens: int) -> dict[str, Any]:
    """Answer each schema in every way; counts, and what went wrong."""
    failures: list[str] = []
    refused: dict[str, str] = {}
    counts = {"asked": 0, "answers": 0, "ended": 0, "valid": 0, "tokens": 0, "rounds": 0, "drafted": 0, "accepted": 0}
    asked: list[tuple[str, dict[str, Any], dict[str, Any], list[int]]] = []
    for name, schema in schemas.items():
        counts["asked"] += 1
        prompt = f"Answer with JSON that follows this schema: {json.dumps(schema)[:400]}"
        for drawn in ({}, {"temperature": 0.9, "seed": _SEED}):
            options: Any = {"response_format": format_of(schema), "max_new_tokens": max_new_tokens, **drawn}
            start = time.perf_counter()
            try:
                plain = engine.generate(prompt, drafter="none", **options)
                drafted = engine.generate(prompt, **options)
            except GrammarError as error:
                refused[name] = str(error)
                if time.perf_counter() - start > _MOST_SECONDS:
                    failures.append(f"{name}: refused after {time.perf_counter() - start:.1f} s")
                break
            counts["answers"] += 1
            for key in ("tokens", "rounds", "drafted", "accepted"):
                counts[key] += getattr(drafted.stats, key)
            if plain.token_ids != drafted.token_ids or plain.text != drafted.text:
                failures.append(f"{name}, {drawn}: plain {plain.text!r}, with drafts {drafted.text!r}")
            if plain.finish_reason == "stop":
                counts["ended"] += 1
                if _is_valid(plain.text, schema):
                    counts["valid"] += 1
                else:
                    failures.append(f"{name}, {drawn}: {plain.text!r} is invalid")
            asked.append((name, {"prompt": prompt, **options}, schema, list(plain.token_ids)))
    failures += _together(engine, asked)
    return {**counts, "refused": refused, "failures": failures}


def _is_valid(text: str, schema: dict[str, Any]) -> bool:
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _together(engine: runtime.Engine, asked: list[tuple[str, dict[str, Any], dict[str, Any], list[int]]]) -> list[str]:
    """The same four at a time, each in a thread of its own; every second four beside one without a grammar."""
    failures: list[str] = []

    def run(one: tuple[str, dict[str, Any], dict[str, Any], list[int]]) -> None:
        name, options, _, alone = one
        keywords = {key: value for key, value in options.items() if key != "prompt"}
        if list(engine.generate(options["prompt"], **keywords).token_ids) != alone:
            failures.append(f"{name}: another answer beside others")

    for first in range(0, len(asked), TOGETHER):
        running = [threading.Thread(target=run, args=(one,)) for one in asked[first : first + TOGETHER]]
        if first // TOGETHER % 2:
            running.append(threading.Thread(target=lambda: engine.generate("Count to ten.", max_new_tokens=40)))
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
    return failures


class KnownDraft:
    """Drafts what it was given."""

    def __init__(self, tokens: Int64) -> None:
        self._draft = Draft(tokens=tokens)

    def propose(self, context: Int64, max_tokens: int) -> Draft:  # noqa: ARG002 - the form of `Drafter`
        """The tokens."""
        return self._draft


class Rounds:
    """Rounds of width 6 in the middle of an answer, with the target's choice and drafts made to agree so far."""

    def __init__(self, directory: Path) -> None:
        loaded = load_engine(directory, options=OnnxRuntimeOptions(kernels="native"))
        manifest = loaded.directory.manifest
        contract, codec = loaded.session.contract, open_codec(loaded.directory.path, manifest.text)
        self._verifier, self._sampler, self._vocab = Verifier(loaded.session), make_sampler(), contract.vocab_size
        end_ids = manifest.text.eos_token_ids
        self._end_id = end_ids[0]
        start = time.perf_counter()
        self.grammars = Grammars(codec, vocab_size=self._vocab, end_ids=end_ids)
        self._grammar = Grammar(kind="json_schema", text=json.dumps(_ANSWER_SCHEMA))
        self.grammars.start(self._grammar)
        self.first_seconds = time.perf_counter() - start
        self._answer = codec.tokenizer.encode(_ANSWER, add_special_tokens=False).ids
        prompt = np.array(codec.encode_chat([{"role": "user", "content": "Describe a person. " * 40}]), np.int64)
        self._prompt = np.concatenate([prompt, np.array(self._answer[:4], np.int64)])
        self._length = len(self._prompt) - 1
        self._verifier.prefill(self._prompt[: self._length])

    def run(self, kind: str, accepted: int, *, guided: bool) -> tuple[float, float]:
        """Milliseconds of one round, and those of its host part."""
        coming = [int(token) for token in self._answer[4 : 4 + WIDTH]]
        following = coming[: accepted + 1]
        # A name that is repeated follows the grammar, and is not what comes.
        draft = np.array([*coming[:accepted], coming[0], *coming[1:]][: WIDTH - 1], np.int64)
        state = self._state() if guided else None
        drafter: Any = KnownDraft(draft) if state is None else GuidedDrafter(KnownDraft(draft), state)
        chooser = self._chooser(kind, state)
        start = time.perf_counter()
        proposed = drafter.propose(self._prompt, WIDTH - 1)
        tokens = np.concatenate([self._prompt[-1:], proposed.tokens])
        segment = Segment(
            tokens=tokens, cache_length=self._length, num_logits=len(tokens), wants_logits=chooser.wants_logits
        )
        before = time.perf_counter()
        [targets] = self._verifier.run([segment])
        passed = time.perf_counter() - before
        # What the target says is set to the answer, which it need not agree with.
        targets = self._agreeing(targets, following, kind)
        places = iter(range(WIDTH))
        context = np.concatenate([self._prompt, proposed.tokens])

        def choose(place: int) -> int:
            chooser.choose(targets, place, context[: len(self._prompt) + place])
            return following[next(places)]

        accept(follow(proposed.tokens, None), choose, lambda token: True)
        took = time.perf_counter() - start
        return 1e3 * took, 1e3 * (took - passed)

    def _state(self) -> GrammarState:
        state = self.grammars.start(self._grammar)
        for token in self._answer[:4]:
            state.take(token)
        return state

    def _chooser(self, kind: str, state: GrammarState | None) -> TokenChooser:
        if kind == "drawn":
            options = GenerationOptions(temperature=0.8, top_p=0.95)
            return LogitsChooser(options, None, sampler=self._sampler, seed=1, grammar=state)
        return GreedyChooser() if state is None else GreedyGrammarChooser(state)

    def _agreeing(self, targets: Targets, following: list[int], kind: str) -> Targets:
        if targets.logits is not None:
            for place, token in enumerate(following):
                targets.logits[place, token] = 1e3
        successors = targets.successors
        if successors is not None and targets.logits is not None:
            successors = successors.copy()
            for place, token in enumerate(following):
                # An end id is never valid in the middle.
                successors[place] = token if kind != "masked" else self._end_id
        return Targets(next_tokens=targets.next_tokens, logits=targets.logits, successors=successors)


def measure(rounds: Rounds, repeats: int) -> dict[str, Any]:
    """Medians of rounds, in milliseconds, and what the grammar adds, in percent of a round."""
    kinds = {"all": ("greedy", WIDTH - 1), "typical": ("greedy", 1), "masked": ("masked", 1), "drawn": ("drawn", 1)}
    times: dict[tuple[str, bool], list[tuple[float, float]]]
    times = {(name, guided): [] for name in kinds for guided in (False, True)}
    for turn in range(repeats + _WARM_UP):
        for (name, is_guided), found in times.items():
            took = rounds.run(*kinds[name], guided=is_guided)
            if turn >= _WARM_UP:
                found.append(took)
    result = {}
    for name in kinds:
        (plain, own), (with_it, host) = (
            (statistics.median(took) for took in zip(*times[name, one], strict=True)) for one in (False, True)
        )
        result[name] = {
            "plain_ms": plain,
            "guided_ms": with_it,
            "added_host_ms": host - own,
            "added_percent": 100 * (with_it / plain - 1),
            "added_host_percent": 100 * (host - own) / plain,
        }
    return result


def main() -> int:
    """Run the parts that were asked for; 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--random", type=int, default=200, help="random schemas")
    parser.add_argument("--repeats", type=int, default=200, help="rounds of each kind")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--part", choices=("all", "schemas", "rounds"), default="all")
    asked = parser.parse_args()
    found: dict[str, Any] = {}
    if asked.part != "rounds":
        schemas = {f"random {seed}": random_schema(seed) for seed in range(asked.random)}
        with runtime.load(asked.directory) as engine:
            found["schemas"] = check_schemas(engine, {**schemas, **HARD}, asked.max_new_tokens)
        shown = found["schemas"]
        print(
            f"{shown['asked']} schemas, {len(shown['refused'])} refused; {shown['answers']} answers, {shown['ended']} "
            f'ended with "stop", {shown["valid"]} of them valid; {shown["tokens"]} tokens in {shown["rounds"]} rounds'
        )
        for name, reason in shown["refused"].items():
            print(f"refused: {name}: {reason}")
        for failure in shown["failures"]:
            print(f"FAILED: {failure}")
    if asked.part != "schemas":
        rounds = Rounds(asked.directory)
        found["rounds"] = measure(rounds, asked.repeats)
        found["first_grammar_seconds"] = rounds.first_seconds
        print(f"first grammar of an engine: {rounds.first_seconds:.2f} s")
        for name, row in found["rounds"].items():
            print(
                f"{name:8} {row['plain_ms']:.3f} ms, with a grammar {row['added_percent']:+.1f} %; on the host "
                f"{1e3 * row['added_host_ms']:+.0f} µs, {row['added_host_percent']:+.1f} %"
            )
    print(json.dumps(found))
    return 1 if found.get("schemas", {}).get("failures") else 0


if __name__ == "__main__":
    sys.exit(main())
