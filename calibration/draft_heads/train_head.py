"""From an engine directory to a draft head: text of the model's own, a vocabulary, the training, the head's folder."""

import math
import shutil
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from calibration.draft_heads.arithmetic_choice import bfloat16_is_faster, choose_threads
from calibration.draft_heads.chat_frame import chat_frame
from calibration.draft_heads.data_folder import DataFolder, GeneratedSequence
from calibration.draft_heads.draft_vocabulary import DraftVocabulary, choose_vocabulary, coverage_of, token_masses
from calibration.draft_heads.generated_text import TEXT_VERSION, TextLimits, TextSource
from calibration.draft_heads.generation import Generation, token_sampler
from calibration.draft_heads.head_loss import DECAY, STEPS
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.head_options import (
    LEAST_PROMPTS,
    TrainHeadOptions,
    TrainingReporter,
    check_head_options,
)
from calibration.draft_heads.pace import MOST_EPOCHS, Pace
from calibration.draft_heads.packed_blocks import BLOCK_POSITIONS
from calibration.draft_heads.partial_head import REPORT, PartialHead, finish_earlier
from calibration.draft_heads.target_tensors import feature_layers_for, first_model, head_spec, open_target
from calibration.draft_heads.training import BLOCKS_OF_AN_UPDATE, Training, TrainingProgress, by_prompt, split
from calibration.texts import default_prompts, prompts_hash, refuse_overlap
from engines.directory import EngineDirectory, open_directory
from engines.loading import load_opened
from engines.onnxruntime.load_options import OnnxRuntimeOptions
from engines.session import Session
from engines.text import open_codec
from quasar.checkpoints import Checkpoint
from quasar.draft_heads.spec import DraftHeadSpec
from quasar.draft_heads.writer import write_draft_head
from quasar.errors import BuildError, EngineError
from quasar.files import write_json
from quasar.text import Prompt, read_prompts

# Sequences that are generated together: a pass of so many positions takes a few times one of one position.
_SLOTS = 16
# The time is split so that the text could be learned from so often if every update unrolled all steps; it is learned
# from about twice as often, since the first ones unroll less.
_EPOCHS = 3.0
# Of the time: for loading, estimates and writing.
_RESERVE = 0.06
# Tokens after which both rates are measured, and updates that the measurement makes.
_FIRST_TOKENS = 4096
_TRIED_UPDATES = 3
# What the LM head is taken to be until the vocabulary is chosen.
_TRIED_VOCABULARY = 8192
_SECONDS_BETWEEN_LINES = 30.0
# Of the text: each says how much of it the tokens of the others cover.
_PARTS = 5


def train_head(options: TrainHeadOptions, reporter: TrainingReporter) -> Path:
    """Train a draft head and write it to `options.output`; a run that was stopped goes on.

    Raises a `QuasarError` that says what is missing, or in the way.
    """
    check_head_options(options)
    _check_libraries()
    directory = open_directory(options.directory)
    prompts, excluded = _prompts(options)
    inputs = _inputs(options, directory, prompts, excluded)
    if finish_earlier(options.output, inputs):
        return options.output
    work = PartialHead(options.output, inputs)
    try:
        _Run(options, reporter, directory, work, prompts, excluded).make()
    finally:
        work.close()
    work.publish()
    return options.output


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """What was generated, and at what speed, in this run and earlier ones."""

    sequences: list[GeneratedSequence]
    vocabulary: DraftVocabulary


class _Run:
    """One run of the making of a head."""

    def __init__(
        self,
        options: TrainHeadOptions,
        reporter: TrainingReporter,
        directory: EngineDirectory,
        work: PartialHead,
        prompts: list[Prompt] | None,
        excluded: list[Prompt],
    ) -> None:
        import torch

        self._options, self._reporter, self._work = options, reporter, work
        self._directory, self._prompts, self._excluded = directory, prompts, excluded
        manifest = directory.manifest
        reporter.stage("model", options.model or manifest.model["source"])
        self._checkpoint: Checkpoint = open_target(options.directory, manifest, options.model)
        self._num_layers = manifest.contract.num_layers
        self._layers = feature_layers_for(self._num_layers)
        self._begun = time.monotonic()
        self._threads = choose_threads()
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        # Earlier runs' seconds of work count.
        self._before = float(work.state.get("seconds", 0.0))
        self._state: dict[str, Any] = work.state
        if "bfloat16" not in self._state:
            self._keep(bfloat16=self._device != "cpu" or bfloat16_is_faster())

    def make(self) -> None:
        """Generate, choose the vocabulary, train, write."""
        path = self._options.data or self._work.scratch / "data"
        inputs = self._work.inputs
        identity = {key: inputs[key] for key in ("engine", "layers", "prompts", "excluded", "seed")}
        identity["text"] = TEXT_VERSION
        if self._state.get("generated"):
            data = DataFolder(path, identity, read_only=True)
        else:
            with DataFolder.writing(path, identity) as data:
                self._generate(data)
        text = self._text(data)
        training = self._train(text)
        self._write(data, text, training)

    # The text.

    def _generate(self, data: DataFolder) -> None:
        options = self._options
        session = self._session()
        try:
            generation = self._generation(session)
            self._fill(data, generation)
        finally:
            session.close()
        if self._num_kept(data) < 2:
            raise BuildError(
                f"{data.num_sequences} sequences came of {options.directory}, and {dict(generation.dropped)} was "
                "dropped: a head cannot be trained on that; give --prompts, or more --minutes"
            )
        dropped = dict(generation.dropped)
        self._keep(generated=True, dropped=dropped, generated_by=self._seconds())

    def _fill(self, data: DataFolder, generation: Generation) -> None:
        """Generate until the rest of the time is what the training needs."""
        options = self._options
        rate = self._state.get("positions_a_second")
        wanted = options.tokens if options.tokens is not None else math.inf
        begun = said = time.monotonic()
        # What the measurement of the training takes is no time of generation.
        apart = 0.0
        for text in generation.run(data.numbers):
            if text is not None:
                data.append(text.sequence())
            now = time.monotonic()
            # Sequences that are not done yet count: many are done at once.
            speed = generation.positions / max(now - begun - apart, 1e-9)
            if options.tokens is None and data.num_tokens >= _FIRST_TOKENS:
                if rate is None and self._num_kept(data) > 1:
                    data.flush()
                    rate = self._training_rate(data)
                    apart += time.monotonic() - now
                    self._keep(positions_a_second=rate)
                if rate is not None:
                    wanted = self._wanted(data.num_tokens, speed, rate)
            if now - said >= _SECONDS_BETWEEN_LINES:
                said = now
                of = f" of about {wanted:,.0f}" if math.isfinite(wanted) else ""
                self._reporter.stage(
                    "generating",
                    f"{data.num_sequences} sequences, {data.num_tokens:,} tokens{of}, {speed:.0f} a second",
                )
                self._keep()
            # Where no measurement came to pass, half of the time is the most.
            late = options.tokens is None and self._seconds() > 0.5 * self._budget and not math.isfinite(wanted)
            if data.num_tokens >= wanted or late:
                break
        data.flush()
        self._keep(tokens_a_second=round(generation.positions / max(time.monotonic() - begun - apart, 1e-9), 1))

    def _num_kept(self, data: DataFolder) -> int:
        """What can be held out apart: answers that lead to each other, and those to one prompt, are kept together."""
        prompts = self._num_prompts
        return len(data.numbers if prompts is None else {number % prompts for number in data.numbers})

    def _wanted(self, tokens: int, speed: float, rate: float) -> float:
        """Tokens that leave time to learn from each `_EPOCHS` times."""
        left = self._budget * (1 - _RESERVE) - self._seconds()
        return tokens + max(0.0, (left - _EPOCHS * tokens / rate) / (1 / speed + _EPOCHS / rate))

    def _training_rate(self, data: DataFolder) -> float:
        """Positions a second of the training, measured on the first text."""
        sequences = list(data.sequences())
        contract = self._directory.manifest.contract
        size = min(self._options.draft_vocab or _TRIED_VOCABULARY, contract.vocab_size)
        vocabulary = choose_vocabulary([token_masses(sequences, contract.vocab_size)], always=(), size=size)
        pace = Pace(seconds=math.inf, most_updates=_TRIED_UPDATES + 1)
        model = self._model(vocabulary, sequences)
        training = self._training(model, vocabulary, sequences, pace, "trial.safetensors")
        seconds = training.try_updates(_TRIED_UPDATES)
        rate = BLOCKS_OF_AN_UPDATE * BLOCK_POSITIONS / seconds
        self._reporter.stage("measured", f"training takes {rate:.0f} positions a second")
        return rate

    def _generation(self, session: Session) -> Generation:
        manifest = self._directory.manifest
        codec = open_codec(self._directory.path, manifest.text)
        source = TextSource(
            codec=codec,
            frame=chat_frame(codec),
            limits=TextLimits().within(manifest.contract.max_length),
            stops=frozenset(manifest.text.eos_token_ids),
            specials=frozenset(codec.literal.special_tokens.values()),
            sampler=token_sampler(),
            num_features=len(self._layers) * self._checkpoint.spec.hidden_size,
            vocab_size=manifest.contract.vocab_size,
            seed=self._options.seed,
        )
        return Generation(session, source, prompts=self._prompts, excluded=self._excluded)

    def _session(self) -> Session:
        contract = self._directory.manifest.contract
        options = OnnxRuntimeOptions(
            # One per core, unless the cores are not ours alone.
            threads=1 if self._threads == 1 else 0,
            slots=_SLOTS,
            hidden_states=self._layers,
            draft_head=False,
            max_positions=max(contract.max_width, contract.prefill_chunk) + _SLOTS,
        )
        try:
            engine = load_opened(self._directory, options=options)
        except EngineError as error:
            raise BuildError(
                f"a draft head learns from hidden states, which {self._directory.path} cannot tell here: {error}"
            ) from None
        kernels = f", {engine.kernels} kernels" if engine.kernels else ""
        threads = "1 thread" if self._threads == 1 else f"{self._threads} threads"
        self._reporter.stage("engine", f"{self._directory.path}{kernels}, {threads}, {_SLOTS} sequences at a time")
        return engine.session

    def _text(self, data: DataFolder) -> _Text:
        sequences = list(data.sequences())
        learned, held_out = self._split(sequences)
        manifest = self._directory.manifest
        places = by_prompt(learned, self._num_prompts)
        parts = [
            token_masses(
                [one for one, place in zip(learned, places, strict=True) if place % _PARTS == part],
                manifest.contract.vocab_size,
            )
            for part in range(_PARTS)
        ]
        codec = open_codec(self._directory.path, manifest.text)
        always = {*manifest.text.eos_token_ids, *codec.literal.special_tokens.values()}
        vocabulary = choose_vocabulary(parts, always=always, size=self._options.draft_vocab)
        unseen = coverage_of(token_masses(held_out, manifest.contract.vocab_size), vocabulary.tokens)
        self._keep(held_out_coverage=round(unseen, 4))
        self._reporter.stage(
            "text", f"{len(sequences)} sequences, {data.num_tokens:,} tokens ({data.nbytes / 1e6:.0f} MB)"
        )
        self._reporter.stage(
            "vocabulary",
            f"{len(vocabulary.tokens)} of {manifest.contract.vocab_size} tokens, {unseen:.2%} of the verifier's "
            "probability on held-out text",
        )
        return _Text(sequences=sequences, vocabulary=vocabulary)

    # The training.

    def _pace(self, text: _Text) -> Pace:
        """How long the training is: decided once, and kept."""
        if "training_seconds" not in self._state:
            left = self._budget * (1 - _RESERVE / 2) - self._seconds()
            # A run that comes late trains for a while all the same.
            self._keep(training_seconds=max(left, 0.1 * self._budget))
        if self._options.updates is not None:
            return Pace(seconds=math.inf, most_updates=self._options.updates)
        tokens = sum(map(len, self._split(text.sequences)[0]))
        most = math.ceil(MOST_EPOCHS * tokens / (BLOCKS_OF_AN_UPDATE * BLOCK_POSITIONS))
        return Pace(seconds=float(self._state["training_seconds"]), most_updates=most)

    def _train(self, text: _Text) -> Training:
        model = self._model(text.vocabulary, text.sequences)
        # What the model's beginning took is of the time, too.
        pace = self._pace(text)
        training = self._training(model, text.vocabulary, text.sequences, pace, "training.safetensors")
        begun = "again from" if pace.updates else "from"
        self._reporter.stage("training", f"{begun} update {pace.updates}, {training.num_blocks} blocks an epoch")
        if not pace.updates:
            self._keep(estimate_before=training.estimate().to_json())

        def report(progress: TrainingProgress) -> None:
            self._reporter.stage(
                "training",
                f"{progress.progress:.0%}, update {progress.updates}, epoch {progress.epochs:.2f}, "
                f"loss {progress.loss:.3f}, {progress.estimate}",
            )
            self._keep(estimate=progress.estimate.to_json(), loss=round(progress.loss, 4), epochs=progress.epochs)

        with _disk_errors(self._work.path):
            training.run(report)
        return training

    def _model(self, vocabulary: DraftVocabulary, sequences: list[GeneratedSequence]) -> HeadModel:
        """The head that is to be trained, as it begins."""
        return first_model(
            self._checkpoint,
            self._spec(len(vocabulary.tokens)),
            self._split(sequences)[0],
            vocabulary.tokens,
            num_positions=max(map(len, sequences)),
            seed=self._options.seed,
            device=self._device,
        )

    def _training(
        self,
        model: HeadModel,
        vocabulary: DraftVocabulary,
        sequences: list[GeneratedSequence],
        pace: Pace,
        checkpoint: str,
    ) -> Training:
        learned, held_out = self._split(sequences)
        return Training(
            model,
            learned,
            held_out,
            vocabulary.tokens,
            pace,
            seed=self._options.seed,
            checkpoint=self._work.scratch / checkpoint,
            bfloat16=self._state["bfloat16"],
            clock=time.monotonic,
        )

    @property
    def _num_prompts(self) -> int | None:
        return None if self._prompts is None else len(self._prompts)

    def _split(self, sequences: list[GeneratedSequence]) -> tuple[list[GeneratedSequence], list[GeneratedSequence]]:
        return split(sequences, self._num_prompts)

    def _spec(self, draft_vocab_size: int) -> DraftHeadSpec:
        return head_spec(
            self._checkpoint.spec,
            num_layers=self._num_layers,
            draft_vocab_size=draft_vocab_size,
            intermediate_size=self._options.intermediate_size,
        )

    # The head.

    def _write(self, data: DataFolder, text: _Text, training: Training) -> None:
        manifest, model = self._directory.manifest, training.model
        # Written as it was trained: a build rounds it to INT8 itself.
        tensors = model.tensors()
        with _disk_errors(self._work.path):
            write_draft_head(self._work.path, model.spec, tensors, text.vocabulary.tokens, manifest.model["name"])
            write_json(self._work.path / REPORT, self._report(data, text, training))
        self._reporter.stage("head", f"{self._options.output}, {sum(map(np.size, tensors.values())):,} parameters")

    def _report(self, data: DataFolder, text: _Text, training: Training) -> dict[str, Any]:
        manifest, spec, pace = self._directory.manifest, training.model.spec, training.pace
        return {
            "engine": manifest.engine_hash,
            "model": manifest.model["name"],
            "inputs": self._work.inputs,
            "seconds": round(self._seconds(), 1),
            "data": {
                "sequences": len(text.sequences),
                "tokens": data.num_tokens,
                "answer_tokens": data.num_answer_tokens,
                "bytes": data.nbytes,
                "seconds": round(float(self._state.get("generated_by", 0.0)), 1),
                "tokens_a_second": self._state.get("tokens_a_second"),
                "dropped": self._state.get("dropped", {}),
            },
            "vocabulary": {
                "tokens": spec.draft_vocab_size,
                "coverage": round(text.vocabulary.coverage, 4),
                "held_out_coverage": self._state["held_out_coverage"],
            },
            "training": {
                "seconds": round(pace.spent, 1),
                "updates": pace.updates,
                "epochs": round(training.epochs, 3),
                "positions_a_second": round(
                    pace.updates * BLOCKS_OF_AN_UPDATE * BLOCK_POSITIONS / max(pace.spent, 1e-9), 1
                ),
                "loss": self._state.get("loss"),
                "steps": STEPS,
                "step_weights": [round(DECAY**step, 4) for step in range(STEPS)],
                "device": training.model.device,
                "threads": self._threads,
                "operands": "bfloat16" if self._state["bfloat16"] else "float32",
            },
            "held_out": self._state["estimate"],
            "held_out_before_training": self._state.get("estimate_before"),
            "head": {
                "feature_layers": list(spec.feature_layers),
                "intermediate_size": spec.decoder.layers[0].mlp.intermediate_size,
                "parameters": sum(math.prod(shape) for shape in spec.tensors().values()),
            },
            "versions": {name: version(name) for name in ("quasar-verifier", "torch", "numpy", "onnxruntime")},
        }

    # The clock.

    @property
    def _budget(self) -> float:
        return 60 * self._options.minutes

    def _seconds(self) -> float:
        """Of work, in this run and those that it goes on from."""
        return self._before + time.monotonic() - self._begun

    def _keep(self, **values: Any) -> None:
        self._state.update(values, seconds=round(self._seconds(), 1))
        with _disk_errors(self._work.path):
            self._work.save()


class _disk_errors:  # noqa: N801 - it is used as a function
    """A context in which a full disk is one sentence."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            reason = "is full" if shutil.disk_usage(self._path).free < 1 << 24 else f"refuses ({error.strerror})"
            raise BuildError(
                f"the disk of {self._path} {reason}: make room and run the same command again, which goes on"
            ) from None


def _check_libraries() -> None:
    for name in ("torch", "safetensors"):
        try:
            __import__(name)
        except ImportError:
            raise BuildError(
                f"{name} is not installed; training a draft head needs it: run pip install 'quasar-verifier[build]'"
            ) from None


def _prompts(options: TrainHeadOptions) -> tuple[list[Prompt] | None, list[Prompt]]:
    """The user's prompts, and those that must not be learned from."""
    evaluation, further = default_prompts("evaluation"), read_prompts(options.excluded) if options.excluded else []
    excluded = [*evaluation, *further]
    if options.prompts is None:
        return None, excluded
    prompts = read_prompts(options.prompts)
    if len(prompts) < LEAST_PROMPTS:
        raise BuildError(
            f"{options.prompts} holds {len(prompts)} prompts; {LEAST_PROMPTS} or more were expected, or no --prompts: "
            "the model writes them itself then"
        )
    for others, what in ((evaluation, "the project's evaluation prompts"), (further, str(options.excluded))):
        refuse_overlap(prompts, others, what, kind="prompt", flattered="the head", source=str(options.prompts))
    return prompts, excluded


def _inputs(
    options: TrainHeadOptions, directory: EngineDirectory, prompts: list[Prompt] | None, excluded: list[Prompt]
) -> dict[str, Any]:
    return {
        "engine": directory.manifest.engine_hash,
        "layers": list(feature_layers_for(directory.manifest.contract.num_layers)),
        "prompts": "" if prompts is None else prompts_hash(prompts),
        "excluded": prompts_hash(excluded),
        "seed": options.seed,
        "minutes": options.minutes,
        "draft_vocab": options.draft_vocab,
        "intermediate_size": options.intermediate_size,
        "tokens": options.tokens,
        "updates": options.updates,
        "data": "" if options.data is None else str(options.data.absolute()),
    }
