"""Controllers on known processes: sequences, drafters that are right so often, and passes of known latency."""

import dataclasses

import numpy as np

from engines.probes.row_invariance import RowInvariance
from evaluation.replay import replay
from runtime.control import Controller
from runtime.control.controller import Knowledge
from runtime.control.latency import LatencyModel
from runtime.drafters import Draft
from runtime.testing import TableSession, run_loop
from runtime.traces import TracedGeneration
from tests.runtime.test_loop import Oracle

# Milliseconds: tokens that take next to no time, those of a laptop's CPU, and those that take as long as a pass.
FLAT = {256: {1: 10.0, 32: 12.0}}
LAPTOP = {256: {1: 9.0, 4: 10.3, 8: 15.5, 16: 27.0}}
STEEP = {256: {1: 10.0, 2: 20.0}}
# A draft pays if it is right more often than not: three times of five.
CHOOSY = {256: {1: 10.0, 2: 16.0}}
SURFACES = {"flat": FLAT, "laptop": LAPTOP, "steep": STEEP}


class OnSurface:
    """A controller whose passes take exactly what a surface says; it keeps what was planned and what came of it."""

    def __init__(self, drafters, surface=LAPTOP, *, knowledge=None, most=31, trees=False, plain_width=1):
        self.latency = LatencyModel(surface, widest=32)
        self.knowledge = knowledge or Knowledge(LatencyModel(surface, widest=32))
        self.control = Controller(drafters, self.knowledge, most=most, trees=trees, plain_width=plain_width)
        self.outcomes = []

    def begin(self, prompt, first, successors):
        self.control.begin(prompt, first, successors)

    def propose(self, context, most, cache_length):
        return self.control.propose(context, most, cache_length)

    def learn(self, outcome):
        seconds = self.latency.of(outcome.segment.cache_length).seconds[len(outcome.segment.tokens) - 1]
        self.outcomes.append(dataclasses.replace(outcome, seconds=seconds))
        self.control.learn(self.outcomes[-1])

    @property
    def drafted(self):
        return [len(outcome.segment.proposal.draft.tokens) for outcome in self.outcomes]


class Script:
    """Drafts a known sequence whose tokens are right so often; `evidence` says what a place of it rests on."""

    def __init__(self, sequence, right, seed=0, *, name="script", evidence=None, most=99):
        random = np.random.default_rng(seed)
        share = np.vectorize(right)(np.arange(len(sequence))) if callable(right) else right
        self.guess = np.where(
            random.random(len(sequence)) < share, sequence, (sequence + 1 + random.integers(0, 97)) % 100
        )
        self.name, self.evidence, self.most, self.asked = name, evidence, most, []

    def propose(self, context, max_tokens):
        self.asked.append(max_tokens)
        places = slice(len(context), len(context) + min(max_tokens, self.most))
        return Draft(
            tokens=self.guess[places].copy(), evidence=None if self.evidence is None else self.evidence[places].copy()
        )


class SlowOracle(Oracle):
    """An oracle whose drafting takes time: `says` so many seconds per token, and needs `needs` of the clock."""

    name = "slow"

    def __init__(self, target, right, clock=None, *, says=1e-3, needs=None):
        super().__init__(target, right)
        self.seconds_per_token, self.clock, self.needs = says, clock, says if needs is None else needs
        self.asked = []

    def propose(self, context, max_tokens):
        self.asked.append((len(context), max_tokens))
        if self.clock is not None:
            self.clock.now += max_tokens * self.needs
        return super().propose(context, max_tokens)


class SlowScript(Script):
    """The same along a known sequence."""

    def __init__(self, sequence, right, clock, *, says=1e-3, needs=None, first=0.0, **options):
        """`first`: what its first draft needs besides."""
        super().__init__(sequence, right, name="slow", **options)
        self.seconds_per_token, self.clock, self.needs = says, clock, says if needs is None else needs
        self.first = first

    def propose(self, context, max_tokens):
        self.clock.now += max_tokens * self.needs + self.first
        self.first = 0.0
        return super().propose(context, max_tokens)


def at_times(sequence, right):
    """A drafter that has something to say half of the time, so that passes of several widths are made."""
    evidence = np.arange(len(sequence)) // 10 % 2
    return Script(sequence, lambda place: right * evidence[place], 3, evidence=evidence)


def sequence_of(length=1200, seed=1):
    return np.random.default_rng(seed).integers(0, 100, length)


def follow_sequence(sequence, drafters, surface=LAPTOP, **options):
    """Rounds along a known sequence, without a session."""
    control = OnSurface(drafters, surface, **options)
    tokens = tuple(sequence.tolist())
    traced = TracedGeneration(category="", prompt=tokens[:4], tokens=tokens[4:], top=())
    replay(traced, control, control.latency, count_drafting=False)
    return control


def on_session(control, target, *, count=40, chain=1, trees=False, options=None, **session):
    table = TableSession(target, **session)
    rounds = run_loop(
        table,
        (1, 2, 3),
        control=control,
        max_new_tokens=count,
        exact=RowInvariance(chain=chain, widest=32, tree=trees),
        options=options,
    )
    return [token for step in rounds for token in step.tokens], rounds, table
