"""The Triton kernels: equal to their references in the interpreter, and compiled for every target without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from plugins.gpu import kv_compact, quantize_per_token
from plugins.gpu.tensorrt_plugin import own_parameters_only
from quasar.errors import QuasarError

TARGETS = ["8.0", "8.6", "8.9", "9.0", "12.0"]


def test_kernels_equal_their_references_in_the_interpreter():
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            str(Path(__file__).with_name("interpreted.py")),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "2 passed" in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_gpu(target, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for kernel in (kv_compact.KERNEL, *quantize_per_token.KERNELS.values()):
        compiled = kernel.compile(target)
        assert compiled.image.startswith(b"\x7fELF")
        assert compiled.entry.encode() in compiled.image
        assert compiled.threads == 128
        assert int(target.replace(".", "")) in targets_of(compiled.image)
    assert not list(tmp_path.rglob("*"))
    # The same image wherever it is compiled: no path of this machine is in it.
    assert str(Path(__file__).parents[2]).encode() not in compiled.image
    assert kernel.compile(target) == compiled


def test_an_impossible_target_is_one_line():
    with pytest.raises(QuasarError, match=r"no kv_compact for compute capability 2\.0"):
        kv_compact.KERNEL.compile("2.0")


def targets_of(image):
    """What a cubin's ELF header (e_flags at byte 48) may hold as its target: the first byte, or the second."""
    flags = int.from_bytes(image[48:52], "little")
    return {flags & 0xFF, (flags >> 8) & 0xFF}


def test_tensorrt_gets_the_kernel_without_triton_scratch_pointers(tmp_path):
    """And the PTX is still a program: assembled by the assembler that Triton brings."""
    import triton

    kernel = quantize_per_token.KERNELS["float32"]
    compiled = kernel.compile("8.9")
    stripped = own_parameters_only(compiled.ptx, kernel)
    assert compiled.ptx.count(".param .") == 7
    assert stripped.count(".param .") == 5
    source = tmp_path / "kernel.ptx"
    source.write_text(stripped)
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([ptxas, "-arch=sm_89", source, "-o", tmp_path / "kernel.cubin"], check=True)
    used = stripped.replace("ret;", "ld.param.b64 %rd1, [quantize_per_token_param_5];\nret;")
    with pytest.raises(ValueError, match="uses its scratch pointer"):
        own_parameters_only(used + compiled.ptx, kernel)
