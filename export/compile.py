"""Adding a TensorRT back end to an engine directory: lower the canonical graph, compile plans, rewrite the manifest.

Needs neither the checkpoint nor torch. New files come first and the manifest last: a run that is killed leaves the
directory as it was, and files that the next run replaces.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.precisions.base import TENSORRT
from calibration.precisions.catalog import precision_of
from calibration.precisions.token import PerToken
from engines.contract import INTEGER_CACHES, Contract
from engines.directory import EngineDirectory, open_directory
from engines.gpu.driver import find_gpu
from engines.manifest import Manifest
from engines.tensorrt.builder import compile_plan
from engines.tensorrt.library import (
    LIBRARIES,
    Library,
    LibraryName,
    check_capabilities,
    compiles_ahead,
    open_library,
    polygraphy_drives_other,
)
from engines.tensorrt.network import profiles_for
from engines.tensorrt.plans import FOLDER, KernelFile, Plan, TensorRtFiles, tensorrt_files
from export.build_options import CompileOptions, Reporter, Silent
from export.compilers import check_precisions, check_whole
from export.layout import CANONICAL
from export.passes import FuseTokenQuantization, IntegerLinears, LowerToTensorRt
from export.publishing import drop_leftovers, locked, name_by_content, publish
from export.weight_file import WeightFile
from quasar.errors import BuildError
from quasar.files import atomic_path

if TYPE_CHECKING:
    import onnx_ir as ir

# What RTX plans are compiled for where no GPU and no option says otherwise: GeForce 30, 40 and 50.
DEFAULT_CAPABILITIES = ("8.6", "8.9", "12.0")


def compile_engine(options: CompileOptions, reporter: Reporter | None = None) -> EngineDirectory:
    """Compile plans into an engine directory; returns it, opened again.

    Raises `EngineError` if the library is missing, too old or refuses the graph, `BuildError` if another run is at it.
    """
    reporter = Silent() if reporter is None else reporter
    library = _library_of(options.backend)
    for option, asked in (
        ("--fused-linears", options.fused_linears),
        ("--fused-quantization", options.fused_quantization),
    ):
        if asked and compiles_ahead(library):
            raise BuildError(f"TensorRT-RTX has no plugin layer: {option} needs --backend tensorrt")
    targets = choose_targets(library, options.compute_capabilities)
    # What another run publishes meanwhile would be lost: the directory is read where there is none.
    with locked(options.directory):
        directory = open_directory(options.directory)
        check_whole(directory, options.backend)
        check_precisions(directory.manifest, TENSORRT)
        if directory.manifest.contract.kv_dtype in INTEGER_CACHES:
            reporter.stage("", f"its KV cache is {options.compute_type} here: TensorRT updates caches of floats alone")
        if options.fused_linears:
            _check_per_token(directory.manifest)
        elif options.fused_quantization:
            _check_no_static_scales(directory.manifest)
        drop_leftovers(directory, FOLDER)
        _Compilation(directory, options, targets, reporter).run()
    return open_directory(options.directory)


def check_target(backend: str, compute_capabilities: tuple[str, ...]) -> None:
    """Raise `EngineError` naming a library, a GPU or a capability that is missing; takes no time."""
    choose_targets(_library_of(backend), compute_capabilities)


def needs_own_process(backend: str) -> bool:
    """Whether Polygraphy drives the other library in this process already: it can drive one alone."""
    return polygraphy_drives_other(_library_of(backend))


def _library_of(backend: str) -> LibraryName:
    return next(library for library in LIBRARIES if library == backend)


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The library, and the compute capabilities to compile for; `here` says that it is this machine's GPU."""

    library: Library
    capabilities: tuple[str, ...]
    here: bool


def choose_targets(backend: LibraryName, asked: tuple[str, ...]) -> Targets:
    """Check library, capabilities and GPU before any work; raises `EngineError` naming what is missing."""
    library = open_library(backend)
    capabilities = check_capabilities(library, asked)
    if capabilities:
        return Targets(library=library, capabilities=capabilities, here=False)
    gpu = find_gpu()
    if gpu.found is None:
        if not library.ahead_of_time:
            raise BuildError(
                f"{library.name} compiles on the GPU that it will run on, and {gpu.reason}: compile there, or use "
                "--backend tensorrt-rtx, which compiles anywhere"
            )
        return Targets(library=library, capabilities=DEFAULT_CAPABILITIES, here=False)
    return Targets(library=library, capabilities=(gpu.found.compute_capability,), here=True)


def _check_per_token(manifest: Manifest) -> None:
    """Raise `BuildError` naming a quantized linear that is not W8A8 per token, or that there is none that is."""
    for name, precision in manifest.linears.items():
        if precision != PerToken.name and precision_of(precision).is_quantized:
            raise BuildError(f"--fused-linears takes linears that are {PerToken.title}; {name} is {precision}")
    if PerToken.name not in manifest.linears.values():
        raise BuildError(f"--fused-linears takes linears that are {PerToken.title}, and this engine has none")


def _check_no_static_scales(manifest: Manifest) -> None:
    """Raise `BuildError` naming a linear whose activations have one scale, which is no token's."""
    for name, precision in manifest.linears.items():
        if precision_of(precision).has_static_scale:
            raise BuildError(
                f"--fused-quantization makes each token's scale, and {name} is {precision}, with one for all: leave "
                "the option out"
            )


class _Compilation:
    def __init__(
        self, directory: EngineDirectory, options: CompileOptions, targets: Targets, reporter: Reporter
    ) -> None:
        self._directory = directory
        self._options = options
        self._targets = targets
        self._reporter = reporter

    def run(self) -> None:
        manifest, library = self._directory.manifest, self._targets.library
        self._reporter.stage("lower", f"{library.name} {library.version}: {self._options.compute_type}, KV in place")
        graph, weights, rescaled = self._lower(manifest.contract)
        kernels = self._kernels(manifest.contract)
        compiled: list[Plan] = []
        described: dict[str, Any] = {}
        for capability in self._targets.capabilities:
            self._reporter.stage("compile", f"compute capability {capability}")
            plan, described = self._compile(graph, capability)
            compiled.append(plan)
        files = TensorRtFiles(
            graph=graph,
            weights=weights,
            compute_type=self._options.compute_type,
            rescaled_channels=rescaled,
            **described,
            profiles={
                name: {tensor: [list(shape) for shape in shapes] for tensor, shapes in profile.items()}
                for name, profile in profiles_for(manifest.contract).items()
            },
            kernels=self._kernels_with_earlier(kernels),
            plans=self._with_earlier(graph, compiled),
        )
        publish(self._directory, library.name, files)

    def _lower(self, contract: Contract) -> tuple[str, str, int]:
        """The graph, the file of weights that were packed for it or "", and how many channels were rescaled."""
        import onnx_ir as ir

        root, weights = self._directory.path, ""
        path = root / FOLDER / f"verifier-{self._options.compute_type}.onnx"
        model = ir.load(self._directory.file(CANONICAL))
        if self._options.fused_linears:
            path = path.with_stem(f"{path.stem}-fused")
            packed = path.with_name(f"{path.name}.data")
            with atomic_path(_partial(packed)) as temporary, WeightFile(temporary, root, named=packed) as file:
                IntegerLinears(file)(model)
            weights = name_by_content(root, _partial(packed), packed)
            _rename_data(model, packed.relative_to(root).as_posix(), weights)
        lowering = LowerToTensorRt(contract, self._options.compute_type)
        lowering(model)
        if self._options.fused_quantization or self._options.fused_linears:
            FuseTokenQuantization()(model)
            self._register_plugins()
        # Its large tensors stay where they are: the graph names them relative to the engine directory.
        with atomic_path(_partial(path)) as temporary:
            ir.save(model, temporary)
        return name_by_content(root, _partial(path), path), weights, lowering.rescaled_channels

    def _register_plugins(self) -> None:
        try:  # Triton is optional
            from plugins.gpu.tensorrt_plugin import register
        except ImportError:
            raise BuildError(
                "--fused-quantization and --fused-linears compile Triton kernels: run "
                "pip install 'quasar-verifier[trees]'"
            ) from None
        register(self._targets.library.module, self._targets.capabilities[0])

    def _kernels(self, contract: Contract) -> tuple[KernelFile, ...]:
        """kv_compact for every compute capability, where there are trees whose paths are to be moved."""
        if not contract.tree_mask:
            return ()
        try:  # Triton is optional
            from plugins.gpu.kv_compact import KERNEL
        except ImportError:
            raise BuildError(
                "this engine takes trees, and moving their positions on a GPU is a Triton kernel: run "
                "pip install 'quasar-verifier[trees]' where the plan is compiled (the runtime needs no Triton)"
            ) from None
        files = []
        for capability in self._targets.capabilities:
            compiled = KERNEL.compile(capability)
            path = self._directory.path / FOLDER / f"kv_compact-sm{capability.replace('.', '')}.cubin"
            with atomic_path(_partial(path)) as temporary:
                temporary.write_bytes(compiled.image)
            files.append(
                KernelFile(
                    file=name_by_content(self._directory.path, _partial(path), path),
                    compute_capability=capability,
                    entry=compiled.entry,
                    threads=compiled.threads,
                    shared_bytes=compiled.shared_bytes,
                )
            )
        return tuple(files)

    def _compile(self, graph: str, capability: str) -> tuple[Plan, dict[str, Any]]:
        library, directory = self._targets.library, self._directory.path
        with self._reporter.steps(f"sm{capability.replace('.', '')}", None) as step:
            compiled = compile_plan(
                library,
                directory / graph,
                directory,
                self._directory.manifest.contract,
                compute_capability=None if self._targets.here else capability,
                plugins=self._options.plugins,
                on_progress=lambda phase, done, total: step(1),
            )
        path = directory / plan_name(library, capability, self._options.compute_type)
        with atomic_path(_partial(path)) as temporary:
            temporary.write_bytes(compiled.data)
        named = name_by_content(directory, _partial(path), path)
        plan = Plan(file=named, version=library.version, compute_capability=capability)
        return plan, {**compiled.network, "bindings": compiled.bindings}

    def _with_earlier(self, graph: str, compiled: list[Plan]) -> tuple[Plan, ...]:
        """The new plans, and those that the directory has already from the same graph."""
        earlier = tensorrt_files(self._directory.manifest).get(self._targets.library.name)
        kept = earlier.plans if earlier and earlier.graph == graph else ()
        new = {(plan.version, plan.compute_capability) for plan in compiled}
        return (*(plan for plan in kept if (plan.version, plan.compute_capability) not in new), *compiled)

    def _kernels_with_earlier(self, compiled: tuple[KernelFile, ...]) -> tuple[KernelFile, ...]:
        earlier = tensorrt_files(self._directory.manifest).get(self._targets.library.name)
        new = {kernel.compute_capability for kernel in compiled}
        kept = earlier.kernels if earlier else ()
        return (*(kernel for kernel in kept if kernel.compute_capability not in new), *compiled)


def _partial(path: Path) -> Path:
    """Where a file is written: earlier versions left one of its own name, which the manifest vouches for."""
    return path.with_name(f"{path.name}.partial")


def _rename_data(model: "ir.Model", before: str, after: str) -> None:
    """Let a graph find its external tensors of one file in another."""
    import onnx_ir as ir

    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) == before:
            value.const_value = ir.ExternalTensor(
                after,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=str(tensor.name),
                base_dir=tensor.base_dir,
            )


def plan_name(library: Library, capability: str, compute_type: str) -> str:
    """Where a plan lies in an engine directory, but for the end that its content gives it."""
    return f"{FOLDER}/{library.name}-{library.version}-sm{capability.replace('.', '')}-{compute_type}.plan"
