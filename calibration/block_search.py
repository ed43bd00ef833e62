"""Quantizing a model block by block: choose, write, go on, so that memory holds one block of weights.

All texts pass a block before the next one is loaded: the float model's hidden states, and beside them those of every
candidate (a quantized model) over held-out text. In a block, each step of the search (`calibration.search`) starts from
the best numbers so far; it is kept if the block's output over held-out text comes nearer to the float model's, else in
those linears alone that bring it nearer, and a step that gains nothing in the first blocks is not tried in the others.
The candidates' KL is measured at the end.

The walk is saved after blocks, and goes on from there when it is started again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.block_error import BlockJudge, HeadJudge, Judge
from calibration.block_state import CandidateState, WalkState
from calibration.fake_quantization import fake_quantized, module_of
from calibration.float_blocks import Batch, FloatBlocks, head_product
from calibration.output_error import LinearSample
from calibration.precisions.base import Precision
from calibration.precisions.catalog import FLOAT, precisions_for
from calibration.quantized_folder import QuantizedFolder
from calibration.quantized_model import LinearChoice, QuantizedModel
from calibration.recipe import Recipe
from calibration.search import LinearSearch, RoundedLinear, Trial, quantize_linear
from calibration.sqnr import LinearFigures, float_figures, linear_figures
from calibration.statistics import BlockWatch, InputStatistics, sample_every
from calibration.texts import TokenizedText
from calibration.validation_split import Divergence, DivergenceSums, in_answer
from quasar.checkpoints.spec import Linear

if TYPE_CHECKING:
    import torch

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

# The sets of texts that walk through the model.
FITTED, HELD_OUT, OTHERS = "fitted", "held out", "others"

# A step is judged on so many blocks, and dropped if it lowers their error by less than this share.
_JUDGED_BLOCKS = 4
_LEAST_GAIN = 0.01
# Seconds between two saved states: saving costs some, and so does what is done again.
_SAVE_SECONDS = 10.0
_ROWS_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Walked:
    """What a walk leaves: a quantized model by precision, the recipe's own first, its divergence and figures.

    `divergences`: from the float model over held-out text; without such text there are none. `trace`: of each step of
    the search, as the manifest has it, in how many blocks it was tried and kept, the mean share by which it lowered
    their errors, and whether it was dropped.
    """

    models: dict[str, QuantizedModel]
    divergences: dict[str, Divergence]
    figures: dict[str, dict[str, LinearFigures]]
    trace: list[dict[str, Any]]
    num_tokens: int
    held_out_tokens: int


class BlockSearch:
    """Walks the blocks of a float model.

    `steps`: those of `calibration.search`, tried in this order. `alternatives`: precisions that every linear which can
    have them is quantized to as well, beside the recipe's own. Text in `others` passes the float model alone: its
    hidden states are in the state at the end.
    """

    def __init__(
        self,
        blocks: FloatBlocks,
        recipe: Recipe,
        texts: Mapping[str, Sequence[TokenizedText]],
        folder: Path,
        progress: Progress,
        *,
        alternatives: Sequence[Precision] = (),
        steps: Sequence[str] = (),
    ) -> None:
        self._blocks = blocks
        self._spec = blocks.spec
        self._recipe = recipe
        self._texts = texts
        self._folder = folder
        self._progress = progress
        self._alternatives = alternatives
        self._steps = steps if recipe.alpha == "auto" and texts.get(HELD_OUT) else ()
        self._search = LinearSearch(self._spec, recipe)
        self._batches: dict[str, list[Batch]] = {}
        self._state = WalkState()

    @property
    def state_path(self) -> Path:
        """The file of the walk's state."""
        return self._folder / "walk.safetensors"

    @property
    def is_finished(self) -> bool:
        """Whether a walk has come to its end in this folder."""
        return self.state_path.is_file() and WalkState.load(self.state_path).num_done > self._spec.num_layers

    def run(self) -> Walked:
        """Walk, or go on from where an earlier walk was stopped."""
        self._begin()
        layers = self._spec.num_layers
        saved = time.monotonic()
        with self._progress("blocks", layers + 1) as step:
            step(min(self._state.num_done, layers))
            for index in range(self._state.num_done, layers):
                with self._blocks.block(index):
                    self._visit(index)
                self._state.num_done = index + 1
                if time.monotonic() - saved > _SAVE_SECONDS or index == layers - 1:
                    self._state.save(self.state_path)
                    saved = time.monotonic()
                step(1)
            if self._state.num_done == layers:
                self._visit_head()
                self._state.num_done = layers + 1
                self._state.save(self.state_path)
            step(1)
        return self._walked()

    def _begin(self) -> None:
        embedded = self._blocks.embed(
            {name: [text.tokens for text in texts] for name, texts in self._texts.items() if texts}
        )
        self._batches = {name: [batch for batch, _ in pairs] for name, pairs in embedded.items()}
        if self.state_path.is_file():
            self._state = WalkState.load(self.state_path)
            return
        streams = {name: [hidden for _, hidden in pairs] for name, pairs in embedded.items()}
        rungs = [precisions_for(self._recipe.precision)[0], *self._alternatives] if self._recipe.quantizes else []
        precisions = [rung.name for rung in rungs]
        held_out = streams.get(HELD_OUT, [])
        candidates = {name: CandidateState(streams=list(held_out)) for name in precisions}
        self._state = WalkState(streams=streams, candidates=candidates, figures={"linears": {}, "steps": {}})

    def _visit(self, index: int) -> None:
        """Choose the numbers of a block's linears, and bring all hidden states past it."""
        state, spec = self._state, self._spec
        linears = {linear.name: linear for linear in spec.layer_linears(index)}
        watch = BlockWatch(self._blocks.model, spec, index, sample_every(self._num_tokens(FITTED)))
        after: dict[str, list[torch.Tensor]] = {}
        for name, streams in state.streams.items():
            after[name] = []
            for batch, hidden in zip(self._of(name), streams, strict=True):
                if name == FITTED and self._recipe.quantizes:
                    watch.real = batch.real
                    with watch.watching():
                        after[name].append(self._blocks.run_block(index, batch, hidden))
                else:
                    after[name].append(self._blocks.run_block(index, batch, hidden))
        if self._recipe.quantizes:
            samples = watch.samples({name: self._weight(linear) for name, linear in linears.items()})
            held_out = (streams.get(HELD_OUT, []) for streams in (state.streams, after))
            judge = BlockJudge(self._blocks, index, self._of(HELD_OUT), *held_out)
            chosen = self._choose(linears, samples, judge)
            for precision, quantized in self._at_precisions(chosen, linears, samples).items():
                self._keep(precision, quantized, samples)
                self._advance(precision, index, quantized)
        state.streams = after

    def _of(self, name: str) -> list[Batch]:
        return self._batches.get(name, [])

    def _weight(self, linear: Linear) -> "torch.Tensor":
        import torch

        members = [module_of(self._blocks.model, member).weight.detach() for member in linear.members]
        return members[0] if len(members) == 1 else torch.cat(members)

    def _choose(
        self, linears: Mapping[str, Linear], samples: Mapping[str, LinearSample], judge: Judge
    ) -> dict[str, RoundedLinear]:
        """The best numbers that the steps find; each is kept if `judge` says so."""
        linears = {name: linear for name, linear in linears.items() if self._recipe.is_quantized(name)}
        best = {
            name: quantize_linear(samples[name], self._search.begin(linear, samples[name]))
            for name, linear in linears.items()
        }
        if not best:
            return best
        steps = [step for step in self._steps if not self._record(step)["dropped"]]
        least = judge.error(best) if steps else 0.0
        for step in steps:
            trials = {
                name: self._search.step(step, best[name].trial, linear, samples[name])
                for name, linear in linears.items()
            }
            tried = {name: quantize_linear(samples[name], trial) for name, trial in trials.items()}
            before, reached = least, judge.error(tried)
            if reached < least:
                best, least = tried, reached
            elif len(tried) > 1:
                # What one linear loses may hide what the others gain.
                for name, linear in tried.items():
                    mixed = {**best, name: linear}
                    reached = judge.error(mixed)
                    if reached < least:
                        best, least = mixed, reached
            self._judge(step, before, least)
        return best

    def _record(self, step: str) -> dict[str, Any]:
        record: dict[str, Any] = self._state.figures["steps"].setdefault(
            step, {"step": step, "blocks": 0, "kept": 0, "gain": 0.0, "dropped": False}
        )
        return record

    def _judge(self, step: str, before: float, after: float) -> None:
        """Count what a step brought to a block: `gain` sums the shares by which errors went down."""
        record = self._record(step)
        record["blocks"] += 1
        record["kept"] += after < before
        record["gain"] += max(0.0, 1 - after / max(before, 1e-30))
        if record["blocks"] == _JUDGED_BLOCKS:
            record["dropped"] = record["gain"] < _LEAST_GAIN * _JUDGED_BLOCKS

    def _at_precisions(
        self, chosen: Mapping[str, RoundedLinear], linears: Mapping[str, Linear], samples: Mapping[str, LinearSample]
    ) -> dict[str, dict[str, RoundedLinear]]:
        """By candidate: the chosen linears, and these raised to its precision where they can have it."""
        own, *_ = self._state.candidates
        found = {own: dict(chosen)}
        for precision in self._alternatives:
            raised = found[precision.name] = dict(chosen)
            for name in chosen:
                if linears[name].inputs % precision.input_multiple == 0:
                    trial: Trial = self._search.at_precision(precision, chosen[name].trial, samples[name])
                    raised[name] = quantize_linear(samples[name], trial)
        return found

    def _keep(
        self, precision: str, quantized: Mapping[str, RoundedLinear], samples: Mapping[str, LinearSample]
    ) -> None:
        """Write a candidate's integers, and note what was chosen."""
        candidate, folder = self._state.candidates[precision], QuantizedFolder(self._folder / precision)
        figures = self._state.figures["linears"].setdefault(precision, {})
        for name, linear in quantized.items():
            folder.save(name, linear.values, linear.scale)
            candidate.choices[name], candidate.factors[name] = linear.trial.choice, linear.trial.factor
            figures[name] = linear_figures(samples[name], linear).to_json()
        for name in samples.keys() - quantized.keys():
            candidate.choices[name], candidate.factors[name] = LinearChoice(precision=FLOAT.name), None
            figures[name] = float_figures(samples[name].amax).to_json()

    def _advance(self, precision: str, index: int, quantized: Mapping[str, RoundedLinear]) -> None:
        """Bring a candidate's hidden states past a block."""
        candidate = self._state.candidates[precision]
        forms = {name: linear.form() for name, linear in quantized.items()}
        with fake_quantized(self._blocks.model, self._spec, forms):
            candidate.streams = [
                self._blocks.run_block(index, batch, hidden)
                for batch, hidden in zip(self._of(HELD_OUT), candidate.streams, strict=True)
            ]

    def _visit_head(self) -> None:
        head, state = self._spec.head, self._state
        if not state.candidates:
            return
        weight = self._blocks.head()
        exact = head_product(weight)
        forms: dict[str, Any] = dict.fromkeys(state.candidates, exact)
        samples = {head.name: self._head_sample(weight)}
        chosen = self._choose({head.name: head}, samples, HeadJudge(self._blocks, self._held_out_rows(), exact))
        for precision, quantized in self._at_precisions(chosen, {head.name: head}, samples).items():
            self._keep(precision, quantized, samples)
            if quantized:
                forms[precision] = quantized[head.name].form().product
        if self._of(HELD_OUT):
            state.figures["divergences"] = {
                precision: divergence.to_json() for precision, divergence in self._divergences(exact, forms).items()
            }

    def _head_sample(self, weight: "torch.Tensor") -> LinearSample:
        statistics, every = InputStatistics(), sample_every(self._num_tokens(FITTED))
        for batch, hidden in zip(self._of(FITTED), self._state.streams[FITTED], strict=True):
            statistics.add(self._blocks.normed(hidden[batch.real]), every)
        return statistics.sample(weight)

    def _held_out_rows(self) -> "torch.Tensor":
        """What the float model's head reads over held-out text, float32 [tokens, hidden]."""
        import torch

        pairs = zip(self._of(HELD_OUT), self._state.streams.get(HELD_OUT, []), strict=True)
        rows = [self._blocks.normed(hidden[batch.real]) for batch, hidden in pairs]
        return torch.cat(rows) if rows else torch.empty((0, self._spec.hidden_size))

    def _divergences(self, exact: Any, products: Mapping[str, Any]) -> dict[str, Divergence]:
        """What held-out text says of every candidate."""
        import torch

        sums = {precision: DivergenceSums() for precision in products}
        for number, batch in enumerate(self._of(HELD_OUT)):
            real = batch.real
            # In the order in which `real` takes positions: sequence by sequence.
            answers = torch.cat([in_answer(self._texts[HELD_OUT][index]) for index in batch.indices])
            reference = self._blocks.normed(self._state.streams[HELD_OUT][number][real])
            own = {
                precision: self._blocks.normed(candidate.streams[number][real])
                for precision, candidate in self._state.candidates.items()
            }
            for start in range(0, len(reference), _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                expected = self._blocks.logits(reference[rows], exact)
                for precision, product in products.items():
                    sums[precision].add(expected, self._blocks.logits(own[precision][rows], product), answers[rows])
        return {precision: one.divergence() for precision, one in sums.items()}

    def _num_tokens(self, name: str) -> int:
        return sum(sum(batch.lengths) for batch in self._of(name))

    def _walked(self) -> Walked:
        figures = self._state.figures
        return Walked(
            models={
                precision: QuantizedModel(
                    name=precision,
                    choices=one.choices,
                    factors=one.factors,
                    folders={
                        name: QuantizedFolder(self._folder / precision)
                        for name, choice in one.choices.items()
                        if choice.precision != FLOAT.name
                    },
                )
                for precision, one in self._state.candidates.items()
            },
            divergences={precision: Divergence(**one) for precision, one in figures.get("divergences", {}).items()},
            figures={
                precision: {name: LinearFigures.from_json(entry) for name, entry in linears.items()}
                for precision, linears in figures["linears"].items()
            },
            trace=[{**step, "gain": round(step["gain"] / step["blocks"], 4)} for step in figures["steps"].values()],
            num_tokens=self._num_tokens(FITTED),
            held_out_tokens=self._num_tokens(HELD_OUT),
        )
