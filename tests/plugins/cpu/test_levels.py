"""Every instruction level computes the same bits: those of this CPU, and NEON's in an emulator where there is one."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from plugins.cpu import toolchain
from tests.plugins.cpu.operators import LEVELS, needs_library

SOURCE = Path(__file__).with_name("levels.cpp")


def hashes(command: list[str], level: str) -> list[str]:
    done = subprocess.run(
        command, env={**os.environ, "QUASAR_CPU_LEVEL": level}, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == [level]
    return done.stdout.splitlines()


def compile_program(folder: Path, compiler: Sequence[str], *more: str) -> str:
    program = str(folder / "levels")
    subprocess.run([*compiler, "-std=c++17", "-O1", str(SOURCE), *more, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """The program over the library that is there."""
    folder = tmp_path_factory.mktemp("levels")
    return [compile_program(folder, toolchain.find_compiler(), "-ldl"), str(toolchain.LIBRARY.resolve())]


@needs_library
def test_levels_of_this_cpu(command):
    portable = hashes(command, "portable")
    assert len(portable) > 250
    assert len(set(portable)) > 0.9 * len(portable)
    for level in LEVELS:
        assert hashes(command, level) == portable


@needs_library
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_in_an_emulator(command, tmp_path):
    compiler = ["aarch64-linux-gnu-g++"]
    objects = toolchain.compile_objects(tmp_path, compiler=compiler, machine="aarch64")
    program = compile_program(tmp_path, compiler, "-DQUASAR_LINKED", *objects, "-static", "-lm")
    assert hashes(["qemu-aarch64", "-cpu", "max", program], "neon-dot") == hashes(command, "portable")
