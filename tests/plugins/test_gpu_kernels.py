"""The Triton kernels: equal to their references in the interpreter, and compiled for every target without a GPU."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import pytest

from plugins.gpu import integer_linear, kv_compact, quantize_per_token
from plugins.gpu.catalog import kernel_of
from plugins.gpu.registers import resources_of
from plugins.gpu.tensorrt_plugin import own_parameters_only
from plugins.gpu.variants import (
    FORMS,
    AttendCache,
    AttendPath,
    BlockLinear,
    Likelihoods,
    LmHead,
    NormAdd,
    NormQuantize,
    PlaceRows,
    RotateAppend,
    W8A8Linear,
)
from quasar.errors import QuasarError
from tests.programs import QWEN3_8B, ROW_NORMS, SMOLLM2, WIDE_HEADS, program_of

TARGETS = ["8.0", "8.6", "8.9", "9.0", "12.0"]


def attention_of(program):
    return [one for one in program.variants() if isinstance(one, RotateAppend | AttendCache | AttendPath)]


IN_BLOCKS = [name for name, form in FORMS.items() if form.in_blocks]
# One of each kind that the shapes below lack.
OTHERS = (
    W8A8Linear(tokens=64, bias=True, residual=False, gate="gelu_tanh"),
    LmHead(tokens=32, likeliest=8, bias=False, softcap=True),
    *(
        LmHead(tokens=FORMS[form].head_tile_tokens[-1], likeliest=8, bias=False, softcap=False, form=form)
        for form in IN_BLOCKS
    ),
    *(
        BlockLinear(form=form, tokens=FORMS[form].tile_tokens[-1], bias=True, residual=False, gate="silu")
        for form in IN_BLOCKS
    ),
    *(NormQuantize.of(12288, norm=True, form=form) for form in IN_BLOCKS),
    NormAdd.of(4096),
    # Of a draft head: three hidden states of a model of 8B, their norms, and a likely vocabulary.
    *(PlaceRows.of(4096, 4096, 12288, norm=norm) for norm in (False, True)),
    Likelihoods(likeliest=8),
    *(one for one in attention_of(program_of(**{**QWEN3_8B, "reach": 48}))),
    RotateAppend(head_size=128, rotary=0, cache_type="float16", norm=True, row=4096),
    # Left to the assembler, it spills for 12.0.
    AttendCache(group=8, head_size=128, reach=32, cache_type="float16", softcap=False, window=False),
    *(replace(one, cache_type="int8") for shape in (SMOLLM2, QWEN3_8B) for one in attention_of(program_of(**shape))),
    *(one for one in program_of(**WIDE_HEADS).variants() if isinstance(one, AttendCache | AttendPath)),
)


# Shared memory that one program may have, by compute capability (CUDA C programming guide, technical specifications).
SHARED_BYTES = {"8.0": 163 << 10, "8.6": 99 << 10, "8.9": 99 << 10, "9.0": 227 << 10, "12.0": 99 << 10}
# Registers that one thread may have.
REGISTERS = 255
# Integer products of tensor cores, in PTX: those of compute capability 9.0 have a name of their own.
INTEGER_PRODUCT = {True: r"wgmma\.mma_async\.\S+\.s32\.s8\.s8", False: r"mma\.sync\.\S+\.s32\.s8\.s8\.s32"}


@pytest.mark.parametrize(("file", "tests"), [("interpreted.py", 3), ("interpreted_cuda.py", 97)])
def test_kernels_equal_their_references_in_the_interpreter(file, tests):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            str(Path(__file__).with_name(file)),
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{tests} passed" in done.stdout.splitlines()[-1]


# The one with least shared memory.
@pytest.mark.parametrize(
    "target", [one if one == "8.6" else pytest.param(one, marks=pytest.mark.full) for one in TARGETS]
)
def test_cuda_kernels_fit_every_gpu(target):
    """Of two shapes and what they lack: nothing spills, and linears are integer products of weights loaded ahead."""
    shapes = [program_of(**shape).variants() for shape in (SMOLLM2, QWEN3_8B)]
    # Three tiles of tokens with nothing, a residual or a gate after them, and two of the head; one more of each, and
    # one of each form in blocks.
    assert check_resources(target, [*chain.from_iterable(shapes), *OTHERS]) == 3 * 3 + 2 + 2 * (1 + 5)


@pytest.mark.full
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_of_every_family_fit_every_gpu(target):
    """All kernels of two shapes that differ in everything, and attention of all groups, sizes and options."""
    shapes = [program_of(**shape).variants() for shape in (WIDE_HEADS, ROW_NORMS)]
    options = product((1, 2, 4, 8, 16), (64, 128, 256), (False, True), (False, True), ("float16", "int8"))
    attention = [
        kind(group=group, head_size=size, reach=32, cache_type=cache_type, softcap=softcap, window=window)
        for group, size, softcap, window, cache_type in options
        for kind in (AttendCache, AttendPath)
    ]
    check_resources(target, [*chain.from_iterable(shapes), *attention])


def check_resources(target, variants):
    """Compile each once; returns how many have integer products."""
    linears = 0
    for variant in dict.fromkeys(variants):
        compiled = kernel_of(variant).compile(target)
        resources = resources_of(compiled.image)
        assert resources.spilled_bytes == 0, variant
        assert 0 < resources.registers <= REGISTERS, variant
        assert compiled.shared_bytes <= SHARED_BYTES[target], variant
        if isinstance(variant, W8A8Linear | LmHead | BlockLinear):
            linears += 1
            assert re.search(INTEGER_PRODUCT[target == "9.0"], compiled.ptx), variant
        if isinstance(variant, W8A8Linear) or (isinstance(variant, LmHead) and not variant.form):
            # 16 bytes a thread, past the first level of the cache, while earlier ones are multiplied.
            assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10\b", compiled.ptx), variant
            assert "cp.async.ca" not in compiled.ptx, variant
    return linears


def test_spilled_registers_are_counted():
    """A kernel that cannot hold its values: the check above can fail."""
    (variant,) = {one for one in program_of(**SMOLLM2).variants() if isinstance(one, AttendCache)}
    kernel = replace(kernel_of(variant), num_warps=1)
    assert resources_of(kernel.compile("8.9").image).spilled_bytes > 0


def test_an_image_without_a_kernel_is_one_line():
    with pytest.raises(QuasarError, match="cuobjdump says nothing of a kernel's registers"):
        resources_of(b"no image")


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


@pytest.mark.parametrize("target", TARGETS)
def test_the_plugins_linear_fits_every_gpu_and_a_plain_launch(target):
    compiled = integer_linear.KERNEL.compile(target)
    resources = resources_of(compiled.image)
    assert resources.spilled_bytes == 0
    assert 0 < resources.registers <= REGISTERS
    # More would have to be asked for, which a plugin cannot.
    assert compiled.shared_bytes <= 48 << 10
    assert re.search(INTEGER_PRODUCT[target == "9.0"], compiled.ptx)
    # Rows without padding, and still 16 bytes at once.
    assert re.search(r"cp\.async\.cg\.shared\.global.*, 0x10\b", compiled.ptx)
    assert "cp.async.ca" not in compiled.ptx


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", [quantize_per_token.KERNELS["float32"], integer_linear.KERNEL], ids=lambda one: "")
def test_tensorrt_gets_kernels_without_triton_scratch_pointers(kernel, target, tmp_path):
    """And the PTX is still a program: assembled by the assembler that Triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    compiled = kernel.compile(target)
    stripped = own_parameters_only(compiled.ptx, kernel)
    parameters = len(kernel.signature)
    assert compiled.ptx.count(".param .") == parameters + 2
    assert stripped.count(".param .") == parameters
    source = tmp_path / "kernel.ptx"
    source.write_text(stripped)
    architecture = re.search(r"\.target (\w+)", stripped)[1]
    ptxas = get_ptxas(int(target.replace(".", ""))).path
    subprocess.run([ptxas, f"-arch={architecture}", source, "-o", tmp_path / "kernel.cubin"], check=True)
    used = stripped.replace("ret;", f"ld.param.b64 %rd1, [{compiled.entry}_param_{parameters}];\nret;")
    with pytest.raises(ValueError, match="uses its scratch pointer"):
        own_parameters_only(used + compiled.ptx, kernel)
