"""How every ONNX Runtime session of this project is made, so that what is checked is what runs."""

from pathlib import Path
from typing import Any

from engines.onnxruntime.threads import bound_cores, shared_threads

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
