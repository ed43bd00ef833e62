"""Compiling the operator library: a C++17 compiler, one object per instruction level, nothing else.

Imports the standard library alone, so that an install can run this file before anything is installed.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where it is made, and which one is used.
BUILT = HERE / ("libquasar_cpu.dylib" if sys.platform == "darwin" else "libquasar_cpu.so")
LIBRARY = Path(os.environ.get("QUASAR_CPU_LIBRARY") or BUILT)
# For `make test-native`: the first error ends the process.
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g", "-fno-omit-frame-pointer")

# Nothing may be contracted or reordered: a position's bits are the same on every level, and with every compiler.
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-threadsafe-statics", "-ffp-contract=off", "-fno-math-errno"),
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512")
_LEVELS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"level_avx512_vnni": _AVX512, "level_avx_vnni": (*_AVX2, "-mavxvnni"), "level_avx2": _AVX2},
    "aarch64": {"level_neon_dot": ("-march=armv8.2-a+dotprod",)},
}
# Without these there is no library.
_NEEDED = ("level_portable", "dispatch", "operators", "c_abi")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


class CompileError(Exception):
    """There is no library: no compiler, or it failed."""


def find_compiler() -> list[str]:
    """The C++ compiler and its first arguments: the environment's CXX, or the first of c++, g++ and clang++ there is.

    Raises:
        CompileError: there is none, or not the one that CXX names.
    """
    if chosen := shlex.split(os.environ.get("CXX", "")):
        if found := shutil.which(chosen[0]):
            return [found, *chosen[1:]]
        raise CompileError(f"CXX is {os.environ['CXX']!r}, and there is no {chosen[0]}")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise CompileError("no C++ compiler was found (CXX, c++, g++, clang++)")


def compile_library(
    output: Path = BUILT,
    *,
    compiler: Sequence[str] | None = None,
    machine: str | None = None,
    flags: Sequence[str] = (),
) -> Path:
    """Compile the library; it appears under its name when it is whole.

    Args:
        compiler: the command, with arguments of its own; None is `find_compiler`'s.
        machine: what to compile for, as the compiler does; None is this machine.
        flags: more flags, for compiling and linking (sanitizers).

    Raises:
        CompileError: no compiler, or it failed; with the compiler's first lines.
    """
    if sys.platform == "win32":
        raise CompileError("the native library is not built on Windows")
    compiler = compiler or find_compiler()
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        objects = compile_objects(Path(folder), compiler=compiler, machine=machine, flags=flags)
        made = Path(folder) / output.name
        # The C runtime is all that it needs.
        runtime = "-nostdlib++" if _is_clang(compiler) else "-static-libgcc"
        _run([*compiler, "-shared", runtime, *flags, *objects, "-lm", "-o", str(made)])
        made.replace(output)
    return output


def compile_objects(
    folder: Path, *, compiler: Sequence[str], machine: str | None = None, flags: Sequence[str] = ()
) -> list[str]:
    """Compile every source into `folder`, each level with its instructions; the objects' paths.

    A level that this compiler cannot compile is left out, and said: an old one may lack the newest instructions.
    """
    machine = machine or platform.machine().lower()
    levels = _LEVELS.get(_MACHINES.get(machine, machine), {})
    common = (*_FLAGS, *flags)

    def compile_one(source: str, name: str, extra: Sequence[str] = ()) -> str:
        target = str(folder / f"{name}.o")
        _run([*compiler, *common, *extra, "-c", str(HERE / "native" / f"{source}.cpp"), "-o", target])
        return target

    def compile_level(name: str) -> str:
        try:
            return compile_one(name, name, levels[name])
        except CompileError as error:
            print(f"no kernels of {name.removeprefix('level_')}: {error}", file=sys.stderr)
            return compile_one("level_missing", name, [f"-DQUASAR_LEVEL={name.removeprefix('level_')}"])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # First what must be compiled: where it is not, nothing needs to be said of levels.
        needed = list(pool.map(lambda name: compile_one(name, name), _NEEDED))
        return [*needed, *pool.map(compile_level, levels)]


def _is_clang(compiler: Sequence[str]) -> bool:
    """As its own macros say: c++ may be either, and so may a path."""
    command = [*compiler, "-dM", "-E", "-x", "c++", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler
    return "__clang__" in done.stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the user's compiler
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise CompileError("\n".join([f"{Path(command[0]).name} failed:", *lines[:20]]))


if __name__ == "__main__":
    # Arguments: where to, and --sanitize.
    arguments = [argument for argument in sys.argv[1:] if argument != "--sanitize"]
    target = Path(arguments[0]) if arguments else BUILT
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        print(f"compiled {compile_library(target, flags=SANITIZERS if '--sanitize' in sys.argv else ())}")
    except CompileError as error:
        print(f"no native operators: {error}", file=sys.stderr)
