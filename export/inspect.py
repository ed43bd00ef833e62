"""The manifest for people."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calibration.precisions.catalog import STORED_CHOICES
from engines.cuda.files import has_cuda_head
from engines.directory import EngineDirectory
from engines.latency import CURVE_LENGTH
from engines.manifest import Manifest
from engines.onnxruntime.files import onnxruntime_files
from engines.onnxruntime.kernels import STOCK, choose_kernels
from engines.probes.row_invariance import RowInvariance
from export.file_purposes import purpose
from export.quantize import said_of_grids
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.errors import EngineError

if TYPE_CHECKING:
    from rich.table import Table

_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "lm_head")
_EXACT = "exact ones (session.x64quantprecision), since this CPU's fast ones saturate; about half as fast"


def print_summary(directory: EngineDirectory) -> None:
    """What a build closes with: sizes, fidelity, latency of a pass, where the engine is, the next command."""
    from rich.console import Console

    out, manifest = Console(highlight=False), directory.manifest
    files = onnxruntime_files(manifest)
    read = (files.native_weights, files.native_shared) if files.native_alone else ("verifier.onnx.data",)
    weights = sum(manifest.files[name]["bytes"] for name in read)
    out.print()
    out.print(f"[bold]{manifest.model['name']}[/bold], {manifest.precision}, {_count(manifest.model['parameters'])}")
    table = _pairs()
    table.add_row("size", f"{_mb(4 * manifest.model['parameters'])} in float32 → {_mb(weights)} of weights")
    for name, value in _fidelity_rows(manifest.fidelity):
        table.add_row(name, value)
    table.add_row("row invariance", _invariance(manifest.record.row_invariance))
    out.print(table)
    out.print(_latency_table(directory))
    out.print(f"engine: {directory.path}", soft_wrap=True)
    out.print(f'next:   python -m runtime generate {directory.path} "What is the capital of France?"', soft_wrap=True)


def print_manifest(directory: EngineDirectory) -> None:
    """Everything of the manifest that a person asks for; `--json` has the rest."""
    from rich.console import Console

    out, manifest = Console(highlight=False), directory.manifest
    contract = manifest.contract
    table = _pairs()
    table.add_row("engine", str(directory.path))
    table.add_row(
        "model",
        f"{manifest.model['name']} ({manifest.model['architecture']}, {_count(manifest.model['parameters'])})",
    )
    table.add_row("source", str(manifest.model["source"]))
    table.add_row("precision", manifest.precision)
    for name, value in _linear_rows(manifest.linears):
        table.add_row(name, value)
    if manifest.precision in STORED_CHOICES and manifest.calibration:
        table.add_row("weights", said_of_grids(manifest.calibration))
    elif manifest.calibration:
        table.add_row(
            "calibration",
            f"alpha {manifest.calibration['alpha']}, {manifest.calibration['prompts']} prompts "
            f"({manifest.calibration['source']}), {manifest.calibration['tokens']} tokens",
        )
        if unsmoothed := _unsmoothed(str(manifest.model.get("architecture"))):
            table.add_row("not smoothed", f"{', '.join(unsmoothed)}: nothing that makes their input takes a factor")
        if rotation := manifest.calibration.get("rotation"):
            table.add_row("rotation", f"{rotation}, of the residual stream and of values")
        for name, value in _search_rows(manifest.calibration):
            table.add_row(name, value)
    table.add_row(
        "max length", f"{contract.max_length} tokens, KV cache {_mb(contract.cache_bytes)} in {contract.kv_dtype}"
    )
    if (head := manifest.draft_head) is not None:
        table.add_row(
            "draft head",
            f"{head.source} ({head.kind}, {head.precision}), {_count(head.parameters)}, on native kernels"
            + (" and CUDA" if has_cuda_head(manifest) else ""),
        )
    for name, value in _fidelity_rows(manifest.fidelity):
        table.add_row(name, value)
    table.add_row("row invariance", _invariance(manifest.record.row_invariance))
    table.add_row("sampler", manifest.sampler)
    for name, value in _text_rows(manifest):
        table.add_row(name, value)
    machine = manifest.record.machine
    table.add_row(
        "measured on", f"{machine['processor']}, {machine['threads'] or machine['cores']} threads, {machine['library']}"
    )
    table.add_row("kernels", _kernels(directory))
    if onnxruntime_files(manifest).native_alone:
        table.add_row("built for", "native kernels alone (--kernels native)")
    if manifest.build_seconds:
        stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in manifest.build_seconds.items())
        table.add_row("built in", f"{sum(manifest.build_seconds.values()):.0f} s ({stages})")
    if manifest.record.exact_integers:
        table.add_row("integer kernels", _EXACT)
    table.add_row("files", f"{len(manifest.files)}, {_mb(sum(entry['bytes'] for entry in manifest.files.values()))}")
    for name, value in manifest.hashes.items():
        if value:
            table.add_row(f"{name} hash", value)
    out.print(table)
    out.print(_latency_table(directory))
    out.print(_files_table(manifest))


def _linear_rows(linears: Mapping[str, str]) -> list[tuple[str, str]]:
    """How many linears have which precision, and which ones have not the most frequent one."""
    counts = Counter(linears.values()).most_common()
    rows = [("linears", ", ".join(f"{count} {precision}" for precision, count in counts))]
    for precision, _ in counts[1:]:
        by_kind: dict[str, list[int]] = {}
        for name in (name for name, own in linears.items() if own == precision):
            found = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
            layers = by_kind.setdefault(found[2] if found else name, [])
            layers += [int(found[1])] if found else []
        rows.append((f"  {precision}", "; ".join(f"{kind} {_ranges(at)}".strip() for kind, at in by_kind.items())))
    return rows


def _unsmoothed(architecture: str) -> list[str]:
    """The linears of a layer, and the head, that a family has no smoothing group for."""
    if architecture not in ARCHITECTURES:
        return []
    smoothed = {group.consumer for group in ARCHITECTURES[architecture].smoothing}
    return [linear for linear in _LINEARS if linear not in smoothed]


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 → "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _search_rows(calibration: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the search found, and why the default precision is what it is."""
    search, gate = calibration.get("search", {}), calibration.get("gate")
    if "precisions" not in search:
        return []
    steps = ", ".join(
        f"{step['step']} kept in {step['kept']} of {step['blocks']} blocks, errors {100 * step['gain']:.0f} % smaller"
        + (" (dropped)" if step["dropped"] else "")
        for step in search["steps"]
    )
    rows = [("search", steps)] if steps else []
    found = ", ".join(
        f"{name} {reached['kl']:.4f} ({reached['answers_kl']:.4f} on answers)"
        for name, reached in search["precisions"].items()
    )
    held_out = search["held_back_tokens"]
    text = f"{held_out} held-out tokens" if held_out else "the text that it was fitted to"
    rows.append(("", f"KL on {text}: {found}"))
    if raised := search.get("raised"):
        rows.append(("", ", ".join(f"{step['step']} {step['kl']:.4f}" for step in raised)))
    if gate is not None:
        limit = f"KL {gate['max_answers_kl']:g} on {gate['judged_on']}"
        first = next(iter(search["precisions"]))
        why = f"within {limit}" if gate["precision"] == first else f"{first} is not within {limit}"
        rows.append(("default", f"{gate['precision']}: {why}"))
    return rows


def _kernels(directory: EngineDirectory) -> str:
    """Those that were measured, and those that would run here if they differ."""
    measured = str(directory.manifest.record.machine.get("kernels", STOCK))
    try:
        here = choose_kernels(None, onnxruntime_files(directory.manifest))
    except EngineError as error:
        return f"measured: {measured}; here: none, {error}"
    except ImportError:
        return f"measured: {measured}; here: ONNX Runtime is not installed"
    why = f" ({here.reason})" if here.reason else ""
    return measured if here.name == measured else f"measured: {measured}; here: {here.name}{why}"


def _pairs() -> "Table":
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _latency_table(directory: EngineDirectory) -> "Table":
    from rich.table import Table

    surface, noise = directory.manifest.record.cost_surface_ms, directory.manifest.record.cost_noise
    title = f"milliseconds of a verify pass{'' if noise is None else f' ({noise})'}"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("cached length", justify="right")
    widths = sorted({width for by_width in surface.values() for width in by_width})
    for width in widths:
        table.add_column(f"t({width})", justify="right")
    for length, by_width in surface.items():
        style = "bold" if length == CURVE_LENGTH else None
        table.add_row(
            str(length), *(f"{by_width[width]:.1f}" if width in by_width else "" for width in widths), style=style
        )
    return table


def _files_table(manifest: Manifest) -> "Table":
    """Every file, the largest first."""
    from rich.table import Table

    table = Table(title="files", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("path", overflow="fold")
    table.add_column("MB", justify="right", no_wrap=True)
    table.add_column("for", overflow="fold")
    for name, entry in sorted(manifest.files.items(), key=lambda item: (-item[1]["bytes"], item[0])):
        table.add_row(name, f"{entry['bytes'] / 1e6:.2f}", purpose(name))
    return table


def _text_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """What ends an answer, and from where that is known; templates; what the checkpoint suggests for sampling."""
    text = manifest.text
    ends = [(f"{one['token']} ({one['id']})", ", ".join(one["sources"])) for one in text.end_tokens]
    # Engines of earlier versions know the ids alone.
    ends = ends or [(str(token), "") for token in text.eos_token_ids]
    rows = [("end of an answer" if place == 0 else "", ": ".join(filter(None, one))) for place, one in enumerate(ends)]
    if not rows:
        rows = [("end of an answer", "none: answers stop at their length")]
    names = [*(["default"] if text.chat_template else []), *text.named_templates]
    rows.append(("chat template", ", ".join(names) or "none: conversations are written down plainly"))
    suggested = ", ".join(f"{name} {value:g}" for name, value in manifest.sampling_defaults.items())
    rows.append(("sampling", f"greedy by default{f'; --model-defaults: {suggested}' if suggested else ''}"))
    return rows


def _fidelity_rows(fidelity: dict[str, Any]) -> list[tuple[str, str]]:
    if not fidelity:
        return []
    return [
        ("fidelity, prompts", _figures(fidelity)),
        ("fidelity, answers", _figures(fidelity["continuation"])),
    ]


def _figures(figures: dict[str, Any]) -> str:
    return (
        f"KL {figures['mean_kl_nats']:.4f} nats, top-1 {100 * figures['top1_agreement']:.1f} %, perplexity "
        f"{figures['perplexity']:.2f} (float {figures['perplexity_float']:.2f}), {figures['tokens']} tokens"
    )


def _invariance(found: RowInvariance) -> str:
    if found.chain is None:
        return "none: speculation is refused on this machine"
    crossing = f", not across {len(found.boundaries)} totals" if found.boundaries else ""
    exact = {"trees": found.tree, "prefill": found.prefill, "batches": found.batch}
    more = "".join(f", {name} exact" for name, holds in exact.items() if holds)
    return f"chains exact at widths {found.chain} to {found.widest}{crossing}{more}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M parameters"


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.0f} MB"
