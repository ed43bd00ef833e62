"""Compiling the library, doing without a compiler, and saying no to an ONNX Runtime that is too old."""

import ctypes
import os
import subprocess
import sys

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
    chosen.symlink_to(find_compiler())
    monkeypatch.setenv("CXX", str(chosen))
    assert find_compiler() == str(chosen)


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
