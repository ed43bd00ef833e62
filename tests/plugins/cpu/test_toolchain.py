"""Compiling the library, doing without a compiler, and saying no to an ONNX Runtime that is too old."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.cpu import toolchain
from plugins.cpu.toolchain import CompileError, compile_library, find_compiler
from tests.plugins.cpu.operators import needs_library


def test_without_a_compiler_the_command_says_so_and_goes_on(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, toolchain.__file__, str(tmp_path / "library.so")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == "no native operators: no C++ compiler was found (CXX, c++, g++, clang++)\n"
    assert not list(tmp_path.iterdir())


@needs_library
def test_a_compiler_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(CompileError, match=r"failed:\n.*no-such-option"):
        compile_library(tmp_path / "library.so", flags=("--no-such-option",))
    assert not list(tmp_path.iterdir())


@needs_library
def test_the_environment_chooses_the_compiler(monkeypatch, tmp_path):
    chosen = tmp_path / "my-compiler"
    chosen.symlink_to(find_compiler()[0])
    monkeypatch.setenv("CXX", f"{chosen} -O1 '-DNAME=a b'")
    assert find_compiler() == [str(chosen), "-O1", "-DNAME=a b"]
    monkeypatch.setenv("CXX", "no-such-compiler -O1")
    with pytest.raises(CompileError, match="CXX is 'no-such-compiler -O1', and there is no no-such-compiler"):
        find_compiler()


@needs_library
def test_a_compiler_without_the_newest_instructions_compiles_the_other_levels(tmp_path, capfd):
    """As GCC 10, which has no AVX-VNNI: here no x86 level but AVX2 is known, and none is optimized."""
    old = tmp_path / "old"
    old.write_text(
        f"""#!/bin/sh
        case "$*" in *-mavxvnni*|*-mavx512vnni*|*+dotprod*) echo unrecognized option >&2; exit 1;; esac
        exec {" ".join(find_compiler())} "$@" -O0
        """
    )
    old.chmod(0o755)
    library = compile_library(tmp_path / "library.so", compiler=[str(old)])
    refused = capfd.readouterr().err.splitlines()
    missing = {line.split(":")[0].removeprefix("no kernels of ") for line in refused if line.startswith("no kernels")}
    assert missing == ({"neon_dot"} if platform.machine() == "aarch64" else {"avx512_vnni", "avx_vnni"})
    script = "import sys; from pathlib import Path; from plugins.cpu.library import open_library as o\n"
    script += "print(o(Path(sys.argv[1])).level)"
    found = subprocess.run(
        [sys.executable, "-c", script, str(library)],
        env={name: value for name, value in os.environ.items() if name != "QUASAR_CPU_LEVEL"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() in ("avx2", "portable")


@needs_library
@pytest.mark.parametrize(("macros", "flag"), [("#define __clang__ 1", "-nostdlib++"), ("", "-static-libgcc")])
def test_clang_is_told_by_what_it_says_of_itself(tmp_path, macros, flag):
    """Whatever its path is: this folder has clang in its name."""
    compiler, seen = tmp_path / "clang" / "c++", tmp_path / "seen"
    compiler.parent.mkdir()
    compiler.write_text(
        f"""#!/bin/sh
        case "$*" in *-dM*) echo '{macros}'; exit;; esac
        echo "$@" >> {seen}
        while [ "$1" != -o ]; do shift; done
        : > "$2"
        """
    )
    compiler.chmod(0o755)
    compile_library(tmp_path / "library.so", compiler=[str(compiler)])
    (link,) = [line.split() for line in seen.read_text().splitlines() if "-shared" in line.split()]
    assert {"-nostdlib++", "-static-libgcc"} & set(link) == {flag}


@needs_library
def test_work_is_cut_evenly_for_any_number_of_cores(tmp_path):
    program, source = tmp_path / "pieces", Path(__file__).with_name("pieces.cpp")
    subprocess.run([*find_compiler(), "-std=c++17", "-O1", str(source), "-o", str(program)], check=True)
    assert subprocess.run([program], capture_output=True, text=True, check=True).stdout == "ok\n"


@needs_library
def test_an_onnxruntime_without_the_needed_interface_is_refused():
    """The version table has nothing for version 17; the first entry of version 1 makes the status."""
    messages = []
    status_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    table_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    text_type = ctypes.CFUNCTYPE(ctypes.c_void_p)
    text = ctypes.create_string_buffer(b"1.16.3")

    @status_type
    def create_status(code, message):
        messages.append(message.decode())
        return 0x5EED

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))

    @table_type
    def get_api(version):
        return ctypes.addressof(table) if version == 1 else None

    @text_type
    def get_version():
        return ctypes.addressof(text)

    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(toolchain.LIBRARY)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(ctypes.c_void_p(None), ctypes.byref(base)) == 0x5EED
    assert messages == ["quasar.cpu: ONNX Runtime 1.16.3 is too old; 1.17 or newer was expected"]
