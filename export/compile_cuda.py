"""Adding the CUDA back end to an engine directory: pack the weights, compile the kernels, rewrite the manifest.

Needs neither a GPU nor the checkpoint. New files come first and the manifest last, as for every back end.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from calibration.precisions.base import CUDA
from calibration.precisions.catalog import DEFAULT_HEAD_CHOICE, refusal
from engines.contract import INT8_CACHE, INTEGER_CACHES
from engines.cuda.files import (
    FOLDER,
    NAME,
    CudaFiles,
    CudaHeadFiles,
    KernelRecord,
    KernelsFile,
    cuda_files,
    kernels_version,
    write_kernels,
)
from engines.cuda.loading import LEAST_CAPABILITY
from engines.cuda.program import Program
from engines.directory import EngineDirectory, open_directory
from engines.gpu.driver import find_gpu
from engines.onnxruntime.files import required_native_graph
from export.build_options import CompileOptions, Reporter, Silent
from export.compilers import check_precisions, check_whole
from export.cuda_head_program import HeadPrograms, write_head_programs
from export.cuda_program import write_program
from export.layout import CANONICAL
from export.publishing import drop_leftovers, locked, name_by_content, publish
from plugins.gpu.variants import KERNELS_VERSION, Variant
from quasar.errors import BuildError, QuasarError
from quasar.files import atomic_path, write_json

_FLOATS = ("float16", "bfloat16")
# Integers of a cache are that before they are multiplied: exactly, and queries with more bits than bfloat16 has.
_OF_INTEGERS = "float16"
# What kernels are compiled for where no GPU and no option says otherwise: A100, A10, L40S, H100 and H200, and GeForce
# from 30 to 50.
DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "12.0")


def compile_engine(options: CompileOptions, reporter: Reporter | None = None) -> EngineDirectory:
    """Pack weights and compile kernels into an engine directory; returns it, opened again.

    Raises `BuildError` for linears, graphs or capabilities that have no CUDA form, or if another run is at it.
    """
    reporter = Silent() if reporter is None else reporter
    if options.plugins or options.fused_quantization or options.fused_linears:
        raise BuildError(
            "--plugin, --fused-quantization and --fused-linears are TensorRT's: cuda has kernels of its own"
        )
    if options.compute_type not in _FLOATS:
        raise BuildError(f"cuda keeps its KV cache in {' or '.join(_FLOATS)}; {options.compute_type} came")
    capabilities = choose_capabilities(options.compute_capabilities)
    # What another run publishes meanwhile would be lost: the directory is read where there is none.
    with locked(options.directory):
        directory = open_directory(options.directory)
        check_whole(directory, NAME)
        check_precisions(directory.manifest, CUDA)
        cache_type = cache_type_of(directory.manifest.contract.kv_dtype, options.compute_type)
        native = required_native_graph(directory.path, directory.manifest, "which the CUDA program is made from")
        drop_leftovers(directory, FOLDER)
        reporter.stage("pack", f"{NAME}: weights in tiles, KV cache in {cache_type}")
        packed = _pack(directory, native, cache_type, reporter)
        earlier = cuda_files(directory.manifest)
        kept = () if earlier is None else _still_fitting(directory, earlier, packed)
        kernels = [_compile(directory.path, packed.variants, capability, reporter) for capability in capabilities]
        files = replace(
            packed.files,
            kernels=(*(one for one in kept if one.compute_capability not in capabilities), *kernels),
        )
        publish(directory, NAME, files)
    return open_directory(options.directory)


def cache_type_of(kv_dtype: str, compute_type: str) -> str:
    """What CUDA's cache holds: integers where the engine's does, in one piece, since nothing drafts on half of them.

    Raises `BuildError` for a compute type in which integers are not read.
    """
    if kv_dtype not in INTEGER_CACHES:
        return compute_type
    if compute_type != _OF_INTEGERS:
        raise BuildError(
            f"the engine's KV cache is {kv_dtype}, which cuda reads in {_OF_INTEGERS}; --compute-type {compute_type} "
            "came"
        )
    return INT8_CACHE


def _still_fitting(directory: EngineDirectory, earlier: CudaFiles, packed: "_Packed") -> list[KernelsFile]:
    """Kernels for other GPUs that this version can launch, with the same cache, and of the same draft head."""
    graphs = [None if one.draft_head is None else one.draft_head.graph for one in (earlier, packed.files)]
    if earlier.cache_type != packed.files.cache_type or graphs[0] != graphs[1]:
        return []
    return [one for one in earlier.kernels if kernels_version(directory.file(one.file)) == KERNELS_VERSION]


def check_target(_backend: str, compute_capabilities: tuple[str, ...]) -> None:
    """Raise `BuildError` naming a capability that is too old, or that Triton is missing; takes no time."""
    choose_capabilities(compute_capabilities)


def needs_own_process(_backend: str) -> bool:
    """Nothing stands in the way."""
    return False


def choose_capabilities(asked: tuple[str, ...]) -> tuple[str, ...]:
    """What to compile for: what was asked, else this machine's GPU, else `DEFAULT_CAPABILITIES`."""
    try:
        import triton
    except ImportError:
        raise BuildError("cuda's kernels are written in Triton: run pip install 'quasar-verifier[trees]'") from None
    del triton
    for capability in asked:
        numbers = capability.split(".")
        if len(numbers) != 2 or not all(number.isdigit() for number in numbers):
            raise BuildError(f"compute capability {capability!r} came; one like 8.9 was expected")
        if tuple(map(int, numbers)) < LEAST_CAPABILITY:
            least = ".".join(map(str, LEAST_CAPABILITY))
            raise BuildError(
                f"compute capability {capability} has no INT8 product that Triton compiles to; cuda needs {least} or "
                "above: use --backend tensorrt there"
            )
    if asked:
        return tuple(dict.fromkeys(asked))
    gpu = find_gpu().found
    if gpu is None:
        return DEFAULT_CAPABILITIES
    return choose_capabilities((gpu.compute_capability,))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Packed:
    """What was packed: its files, still without kernels, and every kernel that the programs launch."""

    files: CudaFiles
    variants: tuple[Variant, ...]


def _pack(directory: EngineDirectory, native: str, cache_type: str, reporter: Reporter) -> _Packed:
    manifest, folder = directory.manifest, directory.path / FOLDER
    weights, head = folder / "weights.bin", manifest.draft_head
    with (
        reporter.steps("linears", len(manifest.linears)) as step,
        atomic_path(weights) as temporary,
    ):
        program = write_program(
            directory.path,
            (native, CANONICAL),
            manifest.contract,
            manifest.linears,
            temporary,
            cache_type,
            on_linear=lambda: step(1),
        )
        of_head = _pack_head(directory, program, temporary, reporter)
    files = CudaFiles(
        program=_write(directory.path, "program", program),
        weights=name_by_content(directory.path, weights),
        cache_type=cache_type,
        kernels=(),
    )
    if head is None or of_head is None:
        return _Packed(files=files, variants=tuple(program.variants()))
    files = replace(
        files,
        draft_head=CudaHeadFiles(
            graph=head.graph,
            verifier=_write(directory.path, "program-with-head", of_head.verifier),
            program=_write(directory.path, "draft-head", of_head.head),
        ),
    )
    return _Packed(files=files, variants=tuple(dict.fromkeys((*of_head.verifier.variants(), *of_head.head.variants()))))


def _pack_head(directory: EngineDirectory, program: Program, weights: Path, reporter: Reporter) -> HeadPrograms | None:
    """The programs with the engine's draft head; None where there is none, or none with a form here, which is said."""
    head, size = directory.manifest.draft_head, weights.stat().st_size
    if head is None:
        return None
    try:
        if reason := refusal([head.precision], CUDA):
            raise BuildError(reason)
        return write_head_programs(directory.path, head, directory.manifest.contract, program, weights)
    except BuildError as error:
        os.truncate(weights, size)
        reporter.stage(
            "draft head", f"left out, and {NAME} goes without it: {error}; add-head --precision {DEFAULT_HEAD_CHOICE}"
        )
        return None


def _write(directory: Path, name: str, program: Program) -> str:
    """Write a program's file; its name."""
    path = directory / FOLDER / f"{name}.json"
    write_json(path, program.to_json())
    return name_by_content(directory, path)


def _compile(directory: Path, variants: Sequence[Variant], capability: str, reporter: Reporter) -> KernelsFile:
    from plugins.gpu.kernel import assembler_version  # Triton is optional

    reporter.stage("compile", f"compute capability {capability}")
    path = directory / FOLDER / f"kernels-sm{capability.replace('.', '')}.zip"
    images: dict[str, bytes] = {}
    records: list[KernelRecord] = []
    with reporter.steps(f"sm{capability.replace('.', '')}", len(variants)) as step:
        for record, image in _compiled(variants, capability):
            records.append(record)
            images[record.name] = image
            step(1)
    with atomic_path(path) as temporary:
        write_kernels(temporary, images, records)
    named = name_by_content(directory, path)
    return KernelsFile(file=named, compute_capability=capability, cuda=assembler_version(capability))


def _compiled(variants: Sequence[Variant], capability: str) -> Iterator[tuple[KernelRecord, bytes]]:
    from plugins.gpu.catalog import kernel_of  # Triton is optional
    from plugins.gpu.registers import resources_of

    for variant in variants:
        try:
            compiled = kernel_of(variant).compile(capability)
        except QuasarError as error:
            raise BuildError(str(error)) from None
        resources = resources_of(compiled.image)
        record = KernelRecord(
            name=variant.name,
            entry=compiled.entry,
            threads=compiled.threads,
            shared_bytes=compiled.shared_bytes,
            types=compiled.types,
            registers=resources.registers,
            spilled_bytes=resources.spilled_bytes,
        )
        yield record, compiled.image
