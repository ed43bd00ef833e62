"""The build: checkpoint → calibration → canonical graph → lowering → probes and latency → fidelity → manifest."""

import threading
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calibration.float_blocks import FloatBlocks
from calibration.float_reference import float_logits
from calibration.precision_search import Bound
from calibration.precisions.base import NATIVE
from calibration.precisions.catalog import AUTO, STORED_CHOICES, refusal
from calibration.quantization import Quantization
from calibration.recipe import Alpha, Recipe, make_recipe, parse_alpha
from calibration.rotation import ROTATION, rotated
from calibration.texts import (
    CALIBRATION_ANSWER_TOKENS,
    EVALUATION_ANSWER_TOKENS,
    TokenizedText,
    calibration_prompts,
    calibration_tokens,
    default_prompts,
    describe_texts,
    fit_lengths,
    fit_texts,
    inputs_hash,
    prompts_hash,
    read_texts,
    refuse_overlap,
    tokenize,
    write_texts,
)
from engines.contract import INTEGER_CACHES, TIERED_CACHE, Contract, capacity_for, top_k_for
from engines.manifest import CACHE_SCALES, Manifest
from engines.onnxruntime.files import NAME as ONNXRUNTIME
from engines.onnxruntime.files import OnnxRuntimeFiles
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import Kernels, choose_kernels
from engines.record import MachineRecord
from engines.successors import SUCCESSORS, write_successors
from engines.text import open_codec
from engines.text_files import TextFiles
from export.build_options import (
    BuildOptions,
    Reporter,
    Silent,
    bound_of,
    check_options,
    choose_max_length,
    choose_precision,
)
from export.engine_figures import MeasuredEngine, fidelity, probe, successors
from export.layout import CANONICAL, onnxruntime_files
from export.provenance import model_section, tool_versions
from export.quantize import (
    ROOMS,
    cache_treatments,
    check_bound,
    goal_of,
    keep,
    meets,
    passes_gate,
    prepared_weights,
    quantize,
    said_of_grids,
)
from export.text_files import check_prompts, checked_text, text_warnings, write_text_files
from export.trim import check_native, native_alone, trim_to_native, without_stock
from export.workspace import Workspace, check_target, open_workspace
from plugins.sample_token import SAMPLER
from quasar.checkpoints import Checkpoint, open_checkpoint
from quasar.checkpoints.checkpoint import at_length, checkpoint_hash
from quasar.checkpoints.skipped_layers import remaining_layers, renumbered
from quasar.files import sha256_json
from quasar.text import Prompt

_ENGINE_STAGES = ("calibrate", "export", "lower", "probe", "fidelity")


def build(options: BuildOptions, reporter: Reporter | None = None) -> Path:
    """Build an engine directory; returns its path.

    Raises `QuasarError` for whatever the user can mend. Nothing half-written stands under the output's name.
    """
    return _Build(options, Silent() if reporter is None else reporter).run()


def import_ahead() -> threading.Thread:
    """Import what the float model needs, which takes seconds, in a thread, while files are read and written."""
    # Whoever needs it says that it is missing.
    with suppress(ImportError):
        # Not in the thread: the package takes its own place among the modules when it is imported, and who imports it
        # meanwhile is left with one without names.
        import transformers  # noqa: F401
    thread = threading.Thread(target=_import_float_model)
    thread.start()
    return thread


def _import_float_model() -> None:
    with suppress(ImportError):
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401


class _Build:
    def __init__(self, options: BuildOptions, reporter: Reporter) -> None:
        self._options = options
        self._reporter = reporter

    def run(self) -> Path:
        options = self._options
        check_options(options)
        output = options.output.resolve()
        # Fast refusals first: nothing is read before the output is known to be free. A link stands for its target.
        check_target(output, force=options.force)
        self._calibration = calibration_prompts(options.calibration)
        self._evaluation = default_prompts("evaluation")
        refuse_overlap(self._calibration, self._evaluation, "the project's evaluation prompts")
        self._reporter.stage("checkpoint", options.model)
        self._checkpoint: Checkpoint = open_checkpoint(options.model)
        length = choose_max_length(options.max_length, self._checkpoint.spec.context_length)
        self._checkpoint = at_length(self._checkpoint, length)
        if options.rotate:
            self._checkpoint = rotated(self._checkpoint)
        spec = self._checkpoint.spec
        # Layers are left out of the graph alone: what stays is quantized as in the engine that has all of them, so
        # that the two may share a cache.
        self._remaining = remaining_layers(options.skip_layers, spec.num_layers)
        self._spec = spec.keep_layers(self._remaining)
        precision = choose_precision(options, self._checkpoint)
        alpha: Alpha = "off" if precision in STORED_CHOICES else parse_alpha(options.alpha)
        self._asked: Recipe = make_recipe(
            spec, precision=precision, alpha=alpha, keep_float=options.keep_float, blocks=options.blocks
        )
        self._recipe = self._asked
        if options.kernels or options.kv_dtype in INTEGER_CACHES:
            asked = f"--kernels {options.kernels}" if options.kernels else f"--kv-dtype {options.kv_dtype}"
            check_native(self._files, self._linears.values(), asked)
        self._contract = Contract(
            num_layers=self._spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            vocab_size=spec.vocab_size,
            max_length=length,
            capacity=capacity_for(length),
            max_width=options.max_width,
            tree_mask=options.tree_mask,
            kv_dtype=options.kv_dtype,
            top_k=top_k_for(spec.vocab_size),
        )
        # Before the hash, which reads every byte of the checkpoint.
        self._reporter.stage("tokenizer", "tokenizer and chat template")
        self._checkpoint_text = checked_text(self._checkpoint)
        check_prompts(self._checkpoint_text, self._calibration, "calibration")
        check_prompts(self._checkpoint_text, self._evaluation, "evaluation")
        self._checkpoint_hash = checkpoint_hash(self._checkpoint)
        workspace = open_workspace(output, self._inputs(), force=options.force)
        if workspace is None:
            self._reporter.stage("finish", "an earlier run had built everything but the name")
            return options.output
        self._workspace: Workspace = workspace
        # Not a daemon: a process that ends within an import of libraries in C++ may end with their words.
        import_ahead()
        try:
            self._stages()
        finally:
            workspace.close()
        return options.output

    def _stages(self) -> None:
        workspace = self._workspace
        text = workspace.stage("text", self._write_text)
        self._text = TextFiles.from_json(text["files"])
        for warning in text_warnings(self._text):
            self._reporter.stage("", warning)
        engine = self._engine(ROOMS[0])
        for room in ROOMS[1:]:
            if meets(self._bound, engine.fidelity):
                break
            self._reporter.stage("", f"the engine does not meet the bound ({self._bound}): more linears are raised")
            engine = self._engine_again(room)
        # Without some layers, what is measured is not what quantization does.
        if not self._options.skip_layers and not passes_gate(self._recipe, engine.fidelity):
            self._reporter.stage("", "its answers are too far from the float model's: finer scales are taken")
            # What is aimed at is out of reach: the last precision is taken.
            engine = self._engine_again(0.0)
        check_bound(self._bound, engine.fidelity, dict(self._linears))
        calibration, record, fidelity = engine.calibration, engine.record, engine.fidelity
        self._reporter.stage("successors", "likeliest tokens after those of the calibration text, for drafting")
        workspace.stage("successors", lambda: self._successors(record))
        published, main = self._files, (CANONICAL, f"{CANONICAL}.data")
        if self._options.kernels:
            self._reporter.stage("trim", "what only other back ends read is left out")
            workspace.stage("trim", self._trim)
            published, main = native_alone(self._files), (self._files.native_graph, self._files.native_weights)
        self._reporter.stage("finish", "manifest")
        files = workspace.files()
        manifest = Manifest(
            producer=tool_versions(),
            model=model_section(self._options, self._checkpoint, self._spec),
            precision=self._recipe.precision,
            sampler=SAMPLER,
            linears=dict(self._linears),
            contract=self._contract,
            text=self._text,
            calibration=calibration,
            fidelity=fidelity,
            record=record,
            backends={ONNXRUNTIME: published},
            files=files,
            hashes={},
            sampling_defaults=text["sampling"],
            build_seconds=workspace.seconds,
        )
        hashes = {
            "checkpoint": self._checkpoint_hash,
            "calibration": str(calibration.get("prompts_sha256", "")),
            "verifier": str(files[main[0]]["sha256"]),
            "weights": str(files[main[1]]["sha256"]),
            "inputs": workspace.inputs_hash,
            "engine": manifest.engine_hash,
            **cache_treatments(
                self._quantization_path if self._recipe.quantizes else None, rotates=self._options.rotate
            ),
            **self._lowered,
        }
        workspace.publish(replace(manifest, hashes=hashes).to_json())
        taken = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in manifest.build_seconds.items())
        self._reporter.stage("", f"{sum(manifest.build_seconds.values()):.0f} s: {taken}")

    def _engine(self, room: float) -> MeasuredEngine:
        """Everything that follows from a quantization; `room`: the share of the bound that it aims at."""
        workspace = self._workspace
        calibration: dict[str, Any] = {}
        if self._recipe.quantizes:
            detail = "activation statistics, smoothing, clipping and rounding"
            if self._keeps:
                detail = f"none: weights as {self._checkpoint.quantized_by or 'the file'} has them"
            self._reporter.stage("calibrate", detail)
            calibration = workspace.stage("calibrate", lambda: self._calibrate(room))
            self._recipe = Quantization.load(self._quantization_path).recipe(self._recipe)
            if self._keeps:
                self._reporter.stage("", said_of_grids(calibration))
        self._reporter.stage("export", f"canonical graph, {self._recipe.precision}")
        workspace.stage("export", self._export)
        self._reporter.stage("lower", "ONNX Runtime: its own operators, and the native ones over packed weights")
        self._lowered = workspace.stage("lower", self._lower)
        self._reporter.stage("probe", "integer matmuls, row invariance, latency on this machine")
        record = MachineRecord.from_json(workspace.stage("probe", self._probe))
        if reason := refusal(self._linears.values(), NATIVE) or self._kernels.reason:
            self._reporter.stage("", f"measured on stock kernels: {reason}")
        if record.exact_integers:
            self._reporter.stage("", "this CPU's fast integer kernels saturate: exact, slower ones are used instead")
        self._reporter.stage("fidelity", "against the float model, on held-out prompts")
        fidelity = workspace.stage("fidelity", lambda: self._fidelity(record))
        return MeasuredEngine(calibration=calibration, record=record, fidelity=fidelity)

    def _engine_again(self, room: float) -> MeasuredEngine:
        self._workspace.forget(*_ENGINE_STAGES)
        self._recipe = self._asked
        return self._engine(room)

    @property
    def _keeps(self) -> bool:
        """Whether weights stay on the checkpoint's own grids."""
        return self._asked.precision in STORED_CHOICES

    @property
    def _bound(self) -> Bound | None:
        return bound_of(self._options) if self._options.precision == AUTO else None

    @property
    def _files(self) -> OnnxRuntimeFiles:
        files = onnxruntime_files(self._spec, self._linears, self._options.kv_dtype)
        # What would be left out at the end is not made.
        return without_stock(files) if self._options.kernels else files

    @cached_property
    def _kernels(self) -> Kernels:
        """What is measured is what runs here by default."""
        return choose_kernels(self._options.kernels, self._files)

    def _graphs(self, kernels: Kernels) -> Graphs:
        return Graphs.of(self._workspace.path, self._files, kernels)

    @property
    def _linears(self) -> dict[str, str]:
        """Precision by linear, of the layers that the engine has."""
        return renumbered(self._recipe.linears, self._remaining)

    def _inputs(self) -> dict[str, Any]:
        """Everything that the result follows from; the same inputs resume an interrupted build."""
        return {
            "checkpoint": self._checkpoint_hash,
            "skipped_layers": self._options.skip_layers,
            "kernels": self._options.kernels or "",
            "precision": self._recipe.precision,
            "alpha": self._recipe.alpha,
            "bound": str(self._bound or ""),
            "gate": self._recipe.gate,
            "effort": self._options.effort,
            "weights": self._options.weights or "",
            "rotation": ROTATION if self._options.rotate else "",
            "linears": sha256_json(self._recipe.linears),
            "calibration": inputs_hash(self._calibration) if self._reads_calibration else "",
            "calibration_tokens": self._most_calibration_tokens if self._reads_calibration else 0,
            "contract": self._contract.to_json(),
            "tools": tool_versions(),
        }

    def _write_text(self) -> dict[str, Any]:
        files, sampling = write_text_files(self._checkpoint_text, self._workspace.path)
        return {"files": files.to_json(), "sampling": sampling}

    def _texts(self, prompts: list[Prompt], num_tokens: int) -> list[TokenizedText]:
        prompt_tokens, answer_tokens = fit_lengths(self._contract.max_length, num_tokens)
        codec = open_codec(self._workspace.path, self._text)
        return tokenize(prompts, codec, prompt_tokens=prompt_tokens, answer_tokens=answer_tokens)

    @property
    def _reads_calibration(self) -> bool:
        return self._recipe.quantizes or self._options.kv_dtype in INTEGER_CACHES

    def _calibration_texts(self) -> tuple[list[Prompt], list[TokenizedText]]:
        """As many of the calibration prompts as were asked for, or a model of this size is given, and their texts."""
        texts = self._texts(self._calibration, CALIBRATION_ANSWER_TOKENS)
        return fit_texts(self._calibration, texts, self._most_calibration_tokens)

    @property
    def _most_calibration_tokens(self) -> int:
        return self._options.calibration_tokens or calibration_tokens(self._checkpoint.spec.num_parameters())

    def _evaluation_texts(self) -> list[TokenizedText]:
        return self._texts(self._evaluation, EVALUATION_ANSWER_TOKENS)

    def _calibrate(self, room: float) -> dict[str, Any]:
        spec, reporter = self._checkpoint.spec, self._reporter
        if self._keeps:
            return keep(self._checkpoint, self._recipe, self._quantization_path, reporter)
        goal = None if self._bound is None else goal_of(self._bound, room, spec, self._kernels, reporter)
        prompts, texts = self._calibration_texts()
        if len(prompts) < len(self._calibration):
            why = "--calibration-tokens" if self._options.calibration_tokens else "by the size of the model"
            self._reporter.stage("", f"{len(prompts)} of {len(self._calibration)} prompts: {why}")
        write_texts(self._texts_path, texts)
        folder, directory = self._quantization_path, self._workspace.path
        record = quantize(
            self._checkpoint,
            self._recipe,
            texts,
            self._evaluation_texts(),
            folder,
            directory,
            self._remaining,
            goal,
            room,
            self._options.effort,
            self._options.weights,
            reporter,
        )
        record |= describe_texts(texts, prompts)
        if self._options.rotate:
            record["rotation"] = ROTATION
        return {**record, "source": "user" if self._options.calibration else "default"}

    @property
    def _texts_path(self) -> Path:
        return self._workspace.scratch / "calibration_texts.json"

    @property
    def _quantization_path(self) -> Path:
        return self._workspace.scratch / "quantization"

    def _export(self) -> dict[str, Any]:
        import onnx_ir as ir

        # They import onnx_ir as well, which a refusal does not wait for.
        from export.builder import check_model
        from export.verifier import build_verifier
        from export.weight_file import WeightFile

        directory = self._workspace.path
        folder = self._quantization_path if self._recipe.quantizes else None
        prepared = prepared_weights(self._checkpoint, self._recipe, folder, self._remaining)
        with (
            WeightFile(directory / f"{CANONICAL}.data") as weights,
            self._reporter.steps("linears", len(self._linears)) as step,
        ):
            model = build_verifier(
                prepared,
                weights,
                capacity=self._contract.capacity,
                top_k=self._contract.top_k,
                tree_mask=self._contract.tree_mask,
                producer_version=version("quasar-verifier"),
                on_linear=lambda: step(1),
            )
        ir.save(model, directory / CANONICAL)
        check_model(directory / CANONICAL)
        return {}

    def _lower(self) -> dict[str, Any]:
        """Returns hashes for the manifest."""
        # It imports onnx_ir, which a refusal does not wait for.
        from export.lowering import lower_for_onnxruntime

        directory, files, kv_dtype = self._workspace.path, self._files, self._contract.kv_dtype
        if kv_dtype not in INTEGER_CACHES:
            lower_for_onnxruntime(directory, CANONICAL, files, self._spec, kv_dtype)
            return {}
        # With onnx_ir as well.
        from export.cache_scales import measure_cache_scales, scales_hash, write_int8_caches

        lower_for_onnxruntime(directory, CANONICAL, files, self._spec)
        graphs = self._graphs(choose_kernels(NATIVE, files))
        texts = self._calibration_texts()[1]
        scales = measure_cache_scales(graphs, self._contract, self._spec.layers, texts, self._reporter)
        write_int8_caches(directory, files, scales, tiers=kv_dtype == TIERED_CACHE)
        return {CACHE_SCALES: scales_hash(scales)}

    def _trim(self) -> dict[str, Any]:
        trim_to_native(self._workspace.path, CANONICAL, self._files)
        return {}

    def _probe(self) -> dict[str, Any]:
        graphs = self._graphs(self._kernels)
        stock, effort = None if self._options.kernels else self._graphs(Kernels()), self._options.effort
        record = probe(graphs, stock, self._contract, self._linears, self._kernels, effort, self._reporter)
        return record.to_json()

    def _fidelity(self, record: MachineRecord) -> dict[str, Any]:
        texts = self._evaluation_texts()
        reference = float_logits(
            FloatBlocks(self._checkpoint), self._recipe, texts, self._quantization_path, self._reporter.steps
        )
        graphs = self._graphs(self._kernels)
        figures = fidelity(reference, graphs, self._contract, record, texts, self._reporter)
        return {**figures, "prompts": len(texts), "prompts_sha256": prompts_hash(self._evaluation)}

    def _successors(self, record: MachineRecord) -> dict[str, Any]:
        if not self._texts_path.is_file():
            # Nothing was calibrated: the text is made for this alone.
            write_texts(self._texts_path, self._calibration_texts()[1])
        graphs, texts = self._graphs(self._kernels), read_texts(self._texts_path)
        found = successors(graphs, self._contract, record, texts, self._reporter)
        write_successors(self._workspace.path / SUCCESSORS, found, self._contract.top_k)
        return {}
