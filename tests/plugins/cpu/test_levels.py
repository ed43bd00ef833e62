"""Every instruction level computes the same bits: those of this CPU, and NEON's in an emulator where there is one."""

import os
import shutil
import subprocess
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


def link(folder: Path, compiler: str, machine: str | None, *flags: str) -> str:
    objects = toolchain.compile_objects(folder, compiler=compiler, machine=machine)
    program = str(folder / "levels")
    subprocess.run([compiler, "-std=c++17", "-O1", str(SOURCE), *objects, *flags, "-lm", "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels")
    return folder, hashes([link(folder, toolchain.find_compiler(), None)], "portable")


@needs_library
def test_levels_of_this_cpu(expected):
    folder, portable = expected
    assert len(portable) > 250
    assert len(set(portable)) > 0.9 * len(portable)
    for level in LEVELS:
        assert hashes([str(folder / "levels")], level) == portable


@needs_library
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_in_an_emulator(expected, tmp_path):
    program = link(tmp_path, "aarch64-linux-gnu-g++", "aarch64", "-static")
    assert hashes(["qemu-aarch64", "-cpu", "max", program], "neon-dot") == expected[1]
