"""How every ONNX Runtime session of this project is made, so that what is checked is what runs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from engines.onnxruntime.threads import bound_cores, shared_threads
from quasar.errors import EngineError

_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
# ONNX Runtime's switch to integer kernels that cannot saturate on x86 without VNNI, at half their speed.
_EXACT_INTEGERS = "session.x64quantprecision"


def session_options(*, threads: int, exact_integers: bool, library: Path | None = None) -> Any:
    """`SessionOptions` for `threads` (0: one per physical core), or for the process's shared pool.

    `library`: native operators to register.

    A process that is bound to some of the machine's cores gets no more threads than those: ONNX Runtime would not look.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    if shared_threads() is not None:
        options.use_per_session_threads = False
    else:
        options.intra_op_num_threads = threads or bound_cores()
        options.inter_op_num_threads = 1
    # Shapes change from round to round; a plan for one shape is of no use to the next.
    options.enable_mem_pattern = False
    options.log_severity_level = 3
    # Small pieces of work, handed out as threads get free: passes are short and cores are shared.
    options.add_session_config_entry("session.dynamic_block_base", "4")
    if exact_integers:
        options.add_session_config_entry(_EXACT_INTEGERS, "1")
    if library is not None:
        options.register_custom_ops_library(str(library))
    return options


def open_graph(
    directory: Path, graph: Path, options: Any, *, adapt: Callable[[bytes], bytes] = lambda model: model
) -> tuple[Any, bytes]:
    """A session over a graph whose external data lies in `directory`, and the file's content.

    Args:
        options: as `session_options` makes them.
        adapt: the content → the model that is run.

    Raises:
        EngineError: ONNX Runtime does not load it; says why.
    """
    import onnxruntime as ort

    options.add_session_config_entry(_DATA_FOLDER, str(directory.resolve()))
    try:
        content = graph.read_bytes()
        return ort.InferenceSession(adapt(content), options, providers=["CPUExecutionProvider"]), content
    except Exception as error:  # the library's errors share no public base
        raise EngineError(f"{graph} cannot be loaded by ONNX Runtime {ort.__version__}: {error}") from None
