"""A pass as launches: grids, arguments and their order."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.cuda.buffers import scratch_bytes
from engines.cuda.launches import Addresses, Limits, launches, splits_of, sums_of, token_tile
from engines.cuda.pass_sizes import PassSizes
from engines.cuda.program import Attention, Linear
from engines.cuda.tiles import tile_table
from plugins.gpu.catalog import kernel_of
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS, tiles_of
from plugins.gpu.variants import FORMS, MERGED, SPLIT, TILE_TOKENS, num_splits, tile_tokens
from tests.programs import QWEN3_8B, ROW_NORMS, SMOLLM2, WIDE_HEADS, program_of

CHECKED = {"deadline": None, "database": None, "derandomize": True}
LIMITS = Limits(capacity=4160, most_splits=16, multiprocessors=132, tokens=256, head_rows=32)
SMALL = {"hidden": 304, "intermediate": 704, "heads": 6, "kv_heads": 2, "head_size": 64}


class Names(dict):
    """An address of its own for every name that is asked for."""

    def __missing__(self, name):
        self[name] = 1_000_000 + 256 * len(self)
        return self[name]


def addresses(layers=1):
    fields = [name for name in Addresses.__dataclass_fields__ if name not in ("tensors", "buffers", "inputs", "caches")]
    single = {name: 256 * (1 + place) for place, name in enumerate(fields)}
    caches = tuple((10_000 * (layer + 1), 10_000 * (layer + 1) + 256) for layer in range(layers))
    return Addresses(tensors=Names(), buffers=Names(), inputs=Names(), caches=caches, **single)


def launched(program, tokens, *, rows=1, cached=0, logits=False, at=None, limits=LIMITS):
    splits = num_splits(cached + tokens - 1, program.reach)
    step = next(step for step in program.steps if isinstance(step, Attention))
    tile = tile_tokens(step.heads // step.kv_heads, step.head_size)
    _, tiles = tile_table(np.array([0, tokens]), tokens, reach=program.reach, tile=tile)
    sizes = PassSizes(tokens=tokens, rows=rows, splits=splits, tiles=tiles, logits=logits)
    return list(launches(program, sizes, addresses(2) if at is None else at, limits))


def named(program, launch):
    """The arguments by the names of the kernel's parameters."""
    kernel = next(kernel_of(variant) for variant in program.variants() if variant.name == launch.kernel)
    return dict(zip(kernel.signature, launch.arguments, strict=True))


@settings(max_examples=300, **CHECKED)
@given(tiles=st.integers(1, 2000), input_tiles=st.integers(1, 512), multiprocessors=st.integers(1, 200))
def test_splits_cover_all_tiles_and_none_is_empty(tiles, input_tiles, multiprocessors):
    splits = splits_of(tiles, input_tiles, multiprocessors)
    each = tiles_of(input_tiles, splits)
    assert 0 < (splits - 1) * each + 1 <= input_tiles <= splits * each
    # A split has work for more than its additions, and a GPU that is busy has no splits.
    assert splits == 1 or each >= 4
    assert splits == 1 or tiles * (splits - 1) < 4 * multiprocessors


def test_few_programs_are_split():
    # SmolLM2's down projection on an H100, and Qwen3-8B's.
    assert splits_of(tiles_of(576, TILE_OUTPUTS), tiles_of(1536, TILE_INPUTS), 132) == 3
    assert splits_of(tiles_of(4096, TILE_OUTPUTS), tiles_of(12288, TILE_INPUTS), 132) > 1
    assert splits_of(1000, 100, 132) == 1


def test_tiles_hold_the_tokens():
    assert [token_tile(tokens, (16, 32, 64)) for tokens in (1, 16, 17, 32, 33, 64, 65, 256)] == [
        *(16, 16, 32, 32, 64, 64, 64, 64)
    ]


@pytest.mark.parametrize("reach", [2, 8, 16, 32])
@pytest.mark.parametrize("shape", [SMOLLM2, QWEN3_8B])
def test_sums_have_room_in_every_pass(shape, reach):
    """Whatever the widest verify pass is: the end of a prompt may be wider, and is split, too."""
    program = program_of(**shape, reach=reach)
    room = {step.output: sums_of(step, 132) for step in program.steps if isinstance(step, Linear)}
    arrived = max(tiles_of(step.outputs, TILE_OUTPUTS) for step in program.steps if isinstance(step, Linear))
    at, used = addresses(), dict.fromkeys(room, 0)
    for tokens in range(1, 257):
        for launch in launched(program, tokens, at=at):
            if not launch.kernel.startswith("w8a8_linear"):
                continue
            tile = int(launch.kernel.split("_")[2])
            assert tile in TILE_TOKENS
            token_tiles, output_tiles, splits = launch.grid
            assert token_tiles * tile >= tokens
            if splits > 1:
                assert output_tiles * token_tiles <= arrived
                parts = 2 if launch.kernel.endswith("silu") else 1
                output = next(name for name, address in at.buffers.items() if address == launch.arguments[6])
                used[output] = max(used[output], output_tiles * token_tiles * parts * TILE_OUTPUTS * tile)
    assert used == room
    assert any(used.values())


@pytest.mark.parametrize("shape", [SMOLLM2, QWEN3_8B, WIDE_HEADS, ROW_NORMS])
@pytest.mark.parametrize("tokens", [1, 17, 40])
def test_arguments_are_those_of_the_kernel(shape, tokens):
    program = program_of(**shape, bias=True, layers=2)
    kernels = {variant.name: kernel_of(variant) for variant in program.variants()}
    for launch in launched(program, tokens, cached=600, logits=True):
        signature = kernels[launch.kernel].signature
        for (name, kind), value in zip(signature.items(), launch.arguments, strict=True):
            assert isinstance(value, float if kind == "fp32" else int), (launch.kernel, name)
        assert all(extent > 0 for extent in launch.grid)


def test_the_launches_of_a_pass_are_in_order():
    program = program_of(**SMALL, layers=2)
    attention = ["rotate_append_64_64_float16", "attend_cache_3_64_32_float16", "attend_path_3_64_32_float16"]
    layer = [
        *("norm_quantize_512", "w8a8_linear_16", *attention),
        *("quantize_512", "w8a8_linear_16_residual"),
        *("norm_quantize_512", "w8a8_linear_16_silu"),
        *("quantize_1024", "w8a8_linear_16_residual"),
    ]
    first = ["gather_rows_bfloat16"]
    last = ["gather_rows_float32", "norm_quantize_512", "lm_head_16_8", "merge_likeliest_8_final"]
    assert [one.kernel for one in launched(program, 5, cached=600)] == [*first, *layer, *layer, *last]
    # A short context has nothing outside the end of its tokens' paths.
    short = [name for name in layer if not name.startswith("attend_cache")]
    assert [one.kernel for one in launched(program, 5, cached=20)] == [*first, *short, *short, *last]


def test_norms_after_linears_and_factors():
    """As Gemma 2 has them: a linear writes its product, which the norm adds to the stream; factors are arguments."""
    options = {"gate": "gelu_tanh", "output_norms": True, "embedding_scale": 17.5, "logits_softcap": 30.0}
    program, at = program_of(**SMALL, **options, rotary=0), addresses()
    ordered = launched(program, 5, at=at)
    assert [one.kernel for one in ordered] == [
        *("gather_rows_bfloat16", "norm_quantize_512", "w8a8_linear_16"),
        *("rotate_append_64_0_float16", "attend_path_3_64_32_float16"),
        *("quantize_512", "w8a8_linear_16", "norm_add_512"),
        *("norm_quantize_512", "w8a8_linear_16_gelu_tanh"),
        *("quantize_1024", "w8a8_linear_16", "norm_add_512"),
        *("gather_rows_float32", "norm_quantize_512", "lm_head_16_8_softcap", "merge_likeliest_8_final"),
    ]
    embed, rotate, added, select, head = (named(program, ordered[place]) for place in (0, 3, 7, 13, 15))
    assert (embed["scale"], select["scale"], head["softcap"]) == (17.5, 1.0, 30.0)
    assert (rotate["cos"], rotate["sin"]) == (0, 0)
    buffers, tensors = at.buffers, at.tensors
    assert (added["x"], added["residual"]) == (buffers["layers.0.o.product"], buffers["embed"])
    assert (added["weight"], added["y"]) == (tensors["layers.0.o.norm"], buffers["layers.0.o"])


def test_every_layer_has_its_own_cache():
    program, at = program_of(**SMALL, layers=2), addresses(2)
    for kernel in ("rotate_append", "attend_cache", "attend_path"):
        found = [one for one in launched(program, 5, cached=600, at=at) if one.kernel.startswith(kernel)]
        pairs = [(named(program, one)["keys"], named(program, one)["values"]) for one in found]
        assert pairs == list(at.caches)


def test_a_prompt_goes_over_the_cache_in_parts_as_wide_as_a_verify_pass():
    program = program_of(**SMALL)
    (attention,) = (step for step in program.steps if isinstance(step, Attention))
    over_path, over_cache = [], []
    for one in launched(program, 70, cached=600):
        if one.kernel.startswith("attend_path"):
            over_path.append((one.grid, named(program, one)["first_token"]))
        if one.kernel.startswith("attend_cache"):
            given = named(program, one)
            over_cache.append((one.grid, given["first_token"]))
    assert over_path == [((32, 2), 0), ((32, 2), 32), ((6, 2), 64)]
    # Three heads of a group take four rows, so that 16 tokens fill a tile of 64.
    splits = num_splits(669, 32)
    assert splits == tiles_of(600, SPLIT)
    assert over_cache == [((2, 2, splits), 0), ((2, 2, splits), 32), ((2, 1, splits), 64)]
    assert attention.heads // attention.kv_heads == 3


def test_only_the_rows_that_are_asked_for_reach_the_head():
    program, at = program_of(**SMALL, vocabulary=151936), addresses()
    select, quantize, head, first, last = launched(program, 20, rows=17, logits=True, at=at)[-5:]
    assert select.grid == (17, 1)
    assert select.arguments[1] == at.inputs["logits_rows"]
    assert quantize.grid == (17,)
    assert head.kernel == "lm_head_32_8"
    assert head.grid == (1, 2374)
    assert named(program, head)["writes_logits"] == 1
    # 8 keys of each of 2374 tiles, 2048 at a time; then 8 of each of those parts.
    assert (first.kernel, first.grid, first.arguments[:2]) == ("merge_likeliest_8", (17, 10), (at.keys, at.merged))
    assert (last.kernel, last.grid, last.arguments[0]) == ("merge_likeliest_8_final", (17, 1), at.merged)
    assert (first.arguments[4], last.arguments[4]) == (8 * 2374, 8 * 10)
    quiet = launched(program, 20, rows=1, at=at)[-3]
    assert named(program, quiet)["writes_logits"] == 0


def test_where_no_row_is_wanted_the_head_does_not_run():
    program = program_of(**SMALL)
    with_head, without = (launched(program, 5, rows=rows) for rows in (1, 0))
    assert [one.kernel for one in without] == [one.kernel for one in with_head[: len(without)]]
    assert [one.kernel for one in with_head[len(without) :]] == [
        *("gather_rows_float32", "norm_quantize_512", "lm_head_16_8", "merge_likeliest_8_final")
    ]


def test_many_rows_go_through_the_head_in_parts():
    """Each writes where the part before it did, but for the tokens, of which the likeliest come after all rows'."""
    program, at = program_of(**SMALL, vocabulary=151936), addresses()
    ordered = launched(program, 80, rows=70, logits=True, at=at)
    heads = [one for one in ordered if one.kernel.startswith("lm_head")]
    merges = [one for one in ordered if one.kernel.startswith("merge")]
    assert [one.kernel for one in heads] == ["lm_head_32_8", "lm_head_32_8", "lm_head_16_8"]
    assert [one.logits for one in heads] == [(0, 32), (32, 64), (64, 70)]
    given = [named(program, one) for one in heads]
    stride = tiles_of(304, TILE_INPUTS) * TILE_INPUTS
    assert [(one["q"] - at.quantized, one["a"] - at.amax, one["tokens"]) for one in given] == [
        *((0, 0, 32), (32 * stride, 128, 32), (64 * stride, 256, 6))
    ]
    assert {(one["keys"], one["logits"]) for one in given} == {(at.keys, at.logits)}
    ends = [named(program, one) for one in merges if one.kernel.endswith("final")]
    assert [(one["next_tokens"] - at.next_tokens) // 8 for one in ends] == [0, 32, 64]
    assert [(one["top_tokens"] - at.next_tokens) // 8 for one in ends] == [70, 70 + 8 * 32, 70 + 8 * 64]
    assert [one.grid[0] for one in merges] == [32, 32, 32, 32, 6, 6]
    # And of a part is what there is room for.
    sizes = scratch_bytes(program, LIMITS)
    keys = tiles_of(151936, TILE_OUTPUTS) * 8
    assert sizes["keys"] == 8 * 32 * keys
    assert sizes["merged"] == 8 * 32 * 8 * tiles_of(keys, MERGED)
    assert sizes["logits"] == 4 * 32 * 151936
    assert scratch_bytes(program, replace(LIMITS, head_rows=64))["logits"] == 2 * sizes["logits"]


def test_every_part_of_a_pass_has_its_own_tiles():
    """Sequences of 20, 1, 1 and 18 tokens: none of their tiles reaches into another sequence, or another part."""
    program, at = program_of(**SMALL), addresses()
    starts = np.array([0, 20, 21, 22, 40])
    table, tiles = tile_table(starts, 40, reach=32, tile=16)
    assert tiles == (5, 1)
    assert table[:6].tolist() == [[0, 16], [16, 4], [20, 1], [21, 1], [22, 10], [0, 0]]
    assert table[32:34].tolist() == [[32, 8], [0, 0]]
    sizes = PassSizes(tokens=40, rows=4, splits=2, tiles=tiles, logits=False)
    found = [one for one in launches(program, sizes, at, LIMITS) if one.kernel.startswith("attend_cache")]
    assert [(one.grid, named(program, one)["first_token"]) for one in found] == [((2, 5, 2), 0), ((2, 1, 2), 32)]
    assert {named(program, one)["tiles"] for one in found} == {at.inputs["tiles"]}


@pytest.mark.parametrize("form", [name for name, form in FORMS.items() if form.in_blocks])
def test_parts_of_linears_in_blocks_do_not_depend_on_the_pass(form):
    """What is added to what is a token's bits: parts are those of the linear, whoever computes them."""
    program = program_of(**QWEN3_8B, form=form)
    names = [step for step in program.steps if isinstance(step, Linear)]
    room = scratch_bytes(program, LIMITS)
    expected = None
    for tokens in (1, 2, 16, 17, 32, 33, 64, 256):
        passes = launched(program, tokens)
        prefix = f"linear_in_{form}_{FORMS[form].tile_tokens[-1 if tokens > 16 else 0]}"
        linears = [(one, named(program, one)) for one in passes if one.kernel.startswith(prefix)]
        assert len(linears) == len(names)
        parts = [(told["parts"], told["tiles_per_part"]) for _, told in linears]
        expected = parts if expected is None else expected
        assert parts == expected
        assert any(count > 1 for count, _ in parts)
        for (launch, told), step in zip(linears, names, strict=True):
            token_tiles, output_tiles, splits = launch.grid
            assert told["splits"] == splits == (told["parts"] if tokens <= 32 else 1)
            assert (told["parts"] - 1) * told["tiles_per_part"] < told["input_tiles"]
            assert told["parts"] * told["tiles_per_part"] >= told["input_tiles"]
            if splits > 1:
                size = TILE_OUTPUTS * (FORMS[form].tile_tokens[-1] if tokens > 16 else 16) * (2 if step.gate else 1)
                assert 4 * token_tiles * output_tiles * splits * size <= room["partials"]
                assert 4 * token_tiles * output_tiles <= room["arrived"]
        quantized = [one for one in passes if "quantize" in one.kernel]
        end = "in_blocks_in_planes" if FORMS[form].planes else "in_blocks"
        assert all(one.kernel.endswith(end) for one in quantized)
    most = max(tiles_of(step.inputs, TILE_INPUTS) for step in names)
    assert room["amax"] == 4 * LIMITS.tokens * most * TILE_INPUTS // 32
    assert room["quantized"] == LIMITS.tokens * most * TILE_INPUTS * (2 if FORMS[form].planes else 1)
    assert room["sums"] == 0
