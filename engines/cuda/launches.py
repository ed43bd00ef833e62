"""A pass as kernel launches: pure functions from a program, the sizes of a pass and addresses."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engines.cuda.pass_sizes import PassSizes
from engines.cuda.program import (
    AddNorm,
    Attention,
    Embed,
    Head,
    Linear,
    PlaceColumns,
    Program,
    Receive,
    Select,
    Tell,
    linear_variant,
    place_variant,
    quantize_variant,
)
from plugins.gpu.packing import TILE_INPUTS, TILE_OUTPUTS, tiles_of
from plugins.gpu.variants import (
    BLOCK_TILE_TOKENS,
    COLUMNS,
    FORMS,
    MERGED,
    TILE_TOKENS,
    GatherRows,
    Likelihoods,
    MergeLikeliest,
    NormAdd,
)
from quasar.numerics import BLOCK

# Programs of one linear per multiprocessor: as many as run at once, so that none waits for a second turn.
_PROGRAMS_PER_MULTIPROCESSOR = 2
# Tiles of inputs that a program sums at least.
_LEAST_TILES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel by its variant's name, its grid, and its arguments in order.

    `logits`: the first of the rows whose logits it leaves in their buffer, and the first after them; or none.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[int | float, ...]
    logits: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where everything lies on the device.

    `tensors` and `buffers` by name. `inputs` by name (engines.cuda.inputs). `quantized` int8, one plane or two, and
    `amax` float32: a linear's input. `sums` int32 and `arrived` int32: zeros between launches; `partials`
    float32: of linears in blocks. `queries`, `partial` and `partial_stats` float32: of attention. `keys` and `merged`
    int64: of the LM head. `next_tokens` int64: those of all rows, then their likeliest ones, row after row;
    `likelihoods` float32: theirs, of a draft head. `caches`: of each layer.
    """

    tensors: Mapping[str, int]
    buffers: Mapping[str, int]
    inputs: Mapping[str, int]
    quantized: int
    amax: int
    sums: int
    partials: int
    arrived: int
    queries: int
    partial: int
    partial_stats: int
    keys: int
    merged: int
    logits: int
    next_tokens: int
    likelihoods: int
    caches: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes of the session: cache capacity, splits of the longest context, and the GPU's multiprocessors.

    `tokens` of a pass, and `head_rows` that the LM head takes at a time: a multiple of 16.
    """

    capacity: int
    most_splits: int
    multiprocessors: int
    tokens: int
    head_rows: int


def launches(program: Program, sizes: PassSizes, at: Addresses, limits: Limits) -> Iterator[Launch]:
    """The launches of a pass, in order; where no row is wanted, those before the LM head."""
    tokens = sizes.tokens
    for step in program.steps:
        match step:
            case Embed():
                kernel = GatherRows(table_type=step.table_type).name
                table, ids = at.tensors[step.table], at.inputs["token_ids"]
                yield _gather(kernel, table, ids, at.buffers[step.output], tokens, step.columns, step.scale)
            case Receive() | Tell():
                # Copies, which the session makes before and after.
                continue
            case Select() | Head() | PlaceColumns(selected=True) if not sizes.rows:
                continue
            case PlaceColumns():
                yield _place(step, sizes.rows if step.selected else tokens, at)
            case Select():
                kernel = GatherRows(table_type="float32").name
                rows = at.inputs["logits_rows"]
                target = at.buffers[step.output]
                yield _gather(kernel, at.buffers[step.input], rows, target, sizes.rows, step.columns)
            case Linear():
                yield _quantize(step, tokens, at)
                yield (_block_linear if FORMS[step.form].in_blocks else _linear)(step, tokens, at, limits)
            case AddNorm():
                yield _norm_add(step, tokens, at)
            case Attention():
                yield from _attention(program, step, sizes, at, limits)
            case Head():
                yield _quantize(step, sizes.rows, at)
                # In parts, so that keys and logits of many rows take no more memory.
                for first in range(0, sizes.rows, limits.head_rows):
                    yield from _head(program, step, sizes, at, (first, min(first + limits.head_rows, sizes.rows)))


def splits_of(tiles: int, input_tiles: int, multiprocessors: int) -> int:
    """Over how many programs the inputs of a linear are split; what it computes does not depend on it."""
    wanted = -(-_PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // tiles)
    most = max(1, input_tiles // _LEAST_TILES)
    splits = max(1, min(wanted, most))
    # Without splits that are left with nothing.
    return tiles_of(input_tiles, tiles_of(input_tiles, splits))


def sums_of(step: Linear, multiprocessors: int) -> int:
    """Integers that the splits of a linear add up in, of any pass: those of a prompt's tiles are not split."""
    output_tiles, parts = tiles_of(step.outputs, TILE_OUTPUTS), 2 if step.gate else 1
    is_split = not FORMS[step.form].in_blocks and parts_of(step, multiprocessors) > 1
    return output_tiles * parts * TILE_OUTPUTS * TILE_TOKENS[-2] if is_split else 0


def parts_of(step: Linear, multiprocessors: int) -> int:
    """Parts that the blocks of a linear's inputs are added in: what it computes depends on that, so no pass does."""
    output_tiles, input_tiles = tiles_of(step.outputs, TILE_OUTPUTS), tiles_of(step.inputs, TILE_INPUTS)
    return splits_of(output_tiles, input_tiles, multiprocessors)


def partials_of(step: Linear, multiprocessors: int) -> int:
    """Floats that the splits of a linear in blocks leave, of any pass: a prompt's tiles are not split."""
    parts = parts_of(step, multiprocessors)
    if not FORMS[step.form].in_blocks or parts == 1:
        return 0
    halves = 2 if step.gate else 1
    return parts * tiles_of(step.outputs, TILE_OUTPUTS) * halves * TILE_OUTPUTS * BLOCK_TILE_TOKENS[-1]


def arrivals_of(step: Linear) -> int:
    """Tiles of outputs and tokens whose splits are counted, of any pass."""
    token_tiles = tiles_of(BLOCK_TILE_TOKENS[-1], FORMS[step.form].tile_tokens[-1])
    return tiles_of(step.outputs, TILE_OUTPUTS) * token_tiles


def amax_of(step: Linear | Head) -> int:
    """Floats that a token's amax takes: one, or one for each block."""
    return tiles_of(step.inputs, TILE_INPUTS) * TILE_INPUTS // BLOCK if FORMS[step.form].in_blocks else 1


def quantized_bytes(step: Linear | Head) -> int:
    """Bytes of a token as the product reads it."""
    return tiles_of(step.inputs, TILE_INPUTS) * TILE_INPUTS * FORMS[step.form].input_bytes


def token_tile(tokens: int, tiles: tuple[int, ...]) -> int:
    """The smallest tile that holds so many tokens, else the largest."""
    return next((tile for tile in tiles if tokens <= tile), tiles[-1])


def _gather(kernel: str, table: int, indices: int, target: int, rows: int, columns: int, scale: float = 1.0) -> Launch:
    grid = (rows, tiles_of(columns, COLUMNS))
    return Launch(kernel=kernel, grid=grid, arguments=(table, indices, target, columns, scale))


def _quantize(step: Linear | Head, tokens: int, at: Addresses) -> Launch:
    norm = at.tensors[step.norm] if step.norm else 0
    stride = tiles_of(step.inputs, TILE_INPUTS) * TILE_INPUTS
    return Launch(
        kernel=quantize_variant(step).name,
        grid=(tokens,),
        arguments=(at.buffers[step.input], norm, at.quantized, at.amax, step.inputs, stride, step.epsilon),
    )


def _linear(step: Linear, tokens: int, at: Addresses, limits: Limits) -> Launch:
    tile = token_tile(tokens, TILE_TOKENS)
    output_tiles, token_tiles = tiles_of(step.outputs, TILE_OUTPUTS), tiles_of(tokens, tile)
    input_tiles = tiles_of(step.inputs, TILE_INPUTS)
    # A prompt's tiles fill the GPU without splits.
    is_prompt = tile == TILE_TOKENS[-1]
    splits = 1 if is_prompt else splits_of(output_tiles * token_tiles, input_tiles, limits.multiprocessors)
    return Launch(
        kernel=linear_variant(step, tile).name,
        grid=(token_tiles, output_tiles, splits),
        arguments=(
            *(at.quantized, at.amax, at.tensors[step.weight], at.tensors[step.scale]),
            at.tensors[step.bias] if step.bias else 0,
            at.buffers[step.residual] if step.residual else 0,
            *(at.buffers[step.output], at.sums, at.arrived),
            *(tokens, step.outputs, input_tiles, tiles_of(input_tiles, splits), splits),
        ),
    )


def _block_linear(step: Linear, tokens: int, at: Addresses, limits: Limits) -> Launch:
    tile = token_tile(tokens, FORMS[step.form].tile_tokens)
    output_tiles, token_tiles = tiles_of(step.outputs, TILE_OUTPUTS), tiles_of(tokens, tile)
    input_tiles, parts = tiles_of(step.inputs, TILE_INPUTS), parts_of(step, limits.multiprocessors)
    # One program adds all parts of a prompt's tile, in the order in which the splits of a few tokens are added.
    splits = 1 if tokens > BLOCK_TILE_TOKENS[-1] else parts
    return Launch(
        kernel=linear_variant(step, tile).name,
        grid=(token_tiles, output_tiles, splits),
        arguments=(
            *(at.quantized, at.amax, at.tensors[step.weight], at.tensors[step.scale]),
            at.tensors[step.bias] if step.bias else 0,
            at.buffers[step.residual] if step.residual else 0,
            *(at.buffers[step.output], at.partials, at.arrived),
            *(tokens, step.outputs, input_tiles, tiles_of(input_tiles, parts), parts, splits),
        ),
    )


def _place(step: PlaceColumns, rows: int, at: Addresses) -> Launch:
    return Launch(
        kernel=place_variant(step).name,
        grid=(rows,),
        arguments=(
            *(at.buffers[step.input], at.tensors[step.norm] if step.norm else 0, at.buffers[step.output]),
            *(step.columns, step.first, step.width, step.epsilon),
        ),
    )


def _norm_add(step: AddNorm, tokens: int, at: Addresses) -> Launch:
    buffers, columns = at.buffers, step.columns
    return Launch(
        kernel=NormAdd.of(columns).name,
        grid=(tokens,),
        arguments=(
            *(buffers[step.input], at.tensors[step.norm], buffers[step.residual], buffers[step.output]),
            *(columns, step.epsilon),
        ),
    )


def _attention(program: Program, step: Attention, sizes: PassSizes, at: Addresses, limits: Limits) -> Iterator[Launch]:
    rotate, over_cache, over_path = program.attention_variants(step)
    key, value = at.caches[step.layer]
    inputs, positions, slots = at.inputs, at.inputs["positions"], at.inputs["slots"]
    read = tuple(at.tensors[name] if name else 0 for name in (step.cos, step.sin, step.q_norm, step.k_norm))
    # Kernels of other caches do not take any.
    scales = tuple(at.tensors[name] for name in (step.key_scale, step.value_scale) if name)
    yield Launch(
        kernel=rotate.name,
        grid=(sizes.tokens, step.heads + 2 * step.kv_heads),
        arguments=(
            *(at.buffers[step.input], *read),
            *(positions, inputs["destinations"], slots, at.queries, key, value),
            *(step.heads, step.kv_heads, limits.capacity, step.epsilon, *scales),
        ),
    )
    caches, scratch = (at.queries, key, value), (at.partial, at.partial_stats)
    shape = (step.heads, step.kv_heads, limits.capacity, limits.most_splits)
    last = (step.scale, step.softcap, step.window)
    # A prompt goes in parts as wide as the widest verify pass: what the splits leave takes no more memory.
    for first, tiles in zip(range(0, sizes.tokens, program.reach), sizes.tiles, strict=True):
        tokens = min(program.reach, sizes.tokens - first)
        if sizes.splits:
            yield Launch(
                kernel=over_cache.name,
                grid=(step.kv_heads, tiles, sizes.splits),
                arguments=(*caches, positions, slots, inputs["tiles"], *scratch, first, *shape, *last, *scales[:1]),
            )
        yield Launch(
            kernel=over_path.name,
            grid=(tokens, step.kv_heads),
            arguments=(
                *(*caches, positions, inputs["committed"], inputs["ancestors"], slots, *scratch),
                *(at.buffers[step.output], first, *shape, *last, *scales),
            ),
        )


def _head(program: Program, step: Head, sizes: PassSizes, at: Addresses, part: tuple[int, int]) -> Iterator[Launch]:
    first, rows = part[0], part[1] - part[0]
    tile = token_tile(rows, FORMS[step.form].head_tile_tokens)
    tiles, input_tiles = tiles_of(step.vocabulary, TILE_OUTPUTS), tiles_of(step.inputs, TILE_INPUTS)
    yield Launch(
        kernel=program.head_variant(step, tile).name,
        grid=(tiles_of(rows, tile), tiles),
        arguments=(
            *(at.quantized + first * quantized_bytes(step), at.amax + 4 * first * amax_of(step)),
            *(at.tensors[step.weight], at.tensors[step.scale]),
            at.tensors[step.bias] if step.bias else 0,
            *(at.logits, at.keys, rows, step.vocabulary, input_tiles),
            *(int(sizes.logits or step.likelihoods), step.softcap),
        ),
        logits=part if sizes.logits else None,
    )
    count = tiles * program.likeliest
    parts = tiles_of(count, MERGED)
    # The likeliest tokens lie right after those of this pass's rows: both are copied back in one short piece.
    ends = (at.next_tokens + 8 * first, at.next_tokens + 8 * (sizes.rows + first * program.top_k))
    keys, other = at.keys, at.merged
    if parts > 1:
        yield Launch(
            kernel=MergeLikeliest(likeliest=program.likeliest, final=False).name,
            grid=(rows, parts),
            arguments=(keys, other, *ends, count, program.top_k),
        )
        keys, other, count = other, keys, parts * program.likeliest
    yield Launch(
        kernel=MergeLikeliest(likeliest=program.likeliest, final=True).name,
        grid=(rows, 1),
        arguments=(keys, other, *ends, count, program.top_k),
    )
    if step.likelihoods:
        yield Launch(
            kernel=Likelihoods(likeliest=program.top_k).name,
            grid=(rows,),
            arguments=(at.logits, ends[1], at.likelihoods + 4 * first * program.top_k, step.vocabulary),
        )
