"""Which kernels there are, by what they were compiled for: known without Triton, so that a runtime can name them."""

from dataclasses import dataclass

from plugins.gpu.packing import TILE_INPUTS

# Of the kernels' arguments and of what they mean: those that were compiled with another one are refused at load. 1:
# a pass was of one sequence. 2: `attend_cache` takes a table of tiles, `rotate_append` tokens that go nowhere.
KERNELS_VERSION = 2
# Tokens of a linear's tile: passes of up to 16 and up to 32 tokens, and prompts.
TILE_TOKENS = (16, 32, 64)
# Those of linears in blocks: sums of a block, a part and all of more tokens would not fit the registers.
BLOCK_TILE_TOKENS = (16, 32)
# Those of the LM head: a pass asks for the logits of up to 32 positions.
HEAD_TILE_TOKENS = (16, 32)
# Positions of a block and of a split of attention, on a token's own path.
BLOCK, SPLIT = 64, 256
# Rows of a tile of `attend_path`: the heads of a group; 16 are the least that tensor cores take.
PATH_ROWS = 16
# Columns that one program of `gather_rows` copies.
COLUMNS = 1024
# Logits that one program of `likelihoods` adds up at a time.
SUMMED = 1024
# Keys that one program of `merge_likeliest` looks at.
MERGED = 2048
# What becomes of a linear's first half of outputs before the other half is multiplied by it; the place is the number in
# the native graph's attribute and in the kernel.
GATES = ("", "silu", "gelu_tanh")
# Those of activations of 16 bits, which have twice as many sums.
PLANES_TILE_TOKENS = (16,)
# Numpy's names of types, and Triton's.
TRITON_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int8": "i8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelForm:
    """How a linear's numbers lie: INT8 with scales per token and output, or in blocks of 32 inputs.

    Attributes:
        in_blocks: scales of weights and tokens are those of blocks.
        nibbles: weights have 4 bits.
        offsets: beside its scale a block of weights has an offset.
        planes: activations have 16 bits, as two integers of 8: 256 times the first, and the second.
    """

    name: str
    in_blocks: bool = True
    nibbles: bool = True
    offsets: bool = False
    planes: bool = False

    @property
    def tile_tokens(self) -> tuple[int, ...]:
        """Tokens of a linear's tiles."""
        if self.planes:
            return PLANES_TILE_TOKENS
        return BLOCK_TILE_TOKENS if self.in_blocks else TILE_TOKENS

    @property
    def head_tile_tokens(self) -> tuple[int, ...]:
        """Tokens of the LM head's tiles."""
        return PLANES_TILE_TOKENS if self.planes else HEAD_TILE_TOKENS

    @property
    def input_bytes(self) -> int:
        """Bytes of an input as the product reads it."""
        return 2 if self.planes else 1


PER_TOKEN, BLOCKS, NIBBLES = "", "blocks", "nibbles"
FORMS = {
    form.name: form
    for form in (
        KernelForm(name=PER_TOKEN, in_blocks=False, nibbles=False),
        KernelForm(name=BLOCKS, nibbles=False),
        KernelForm(name=NIBBLES),
        KernelForm(name="nibbles_offsets", offsets=True),
        KernelForm(name="nibbles_planes", planes=True),
        KernelForm(name="nibbles_offsets_planes", offsets=True, planes=True),
    )
}


def power_of_2(extent: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (extent - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherRows:
    """`gather_rows` of a table of float32, float16 or bfloat16."""

    table_type: str

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"gather_rows_{self.table_type}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormQuantize:
    """`norm_quantize` of tokens of up to `block` values; `norm`: with the RMS norm.

    `aligned`: the values are a multiple of 16, so that 16 bytes are loaded at once. `in_blocks`: with an amax for every
    32 values; `planes`: each becomes two integers.
    """

    block: int
    norm: bool
    aligned: bool
    in_blocks: bool = False
    planes: bool = False

    @property
    def name(self) -> str:
        """Of the kernel."""
        ends = (("_in_blocks", self.in_blocks), ("_in_planes", self.planes), ("_unaligned", not self.aligned))
        return f"{'norm_' if self.norm else ''}quantize_{self.block}" + "".join(name for name, has in ends if has)

    @classmethod
    def of(cls, columns: int, *, norm: bool, form: str = PER_TOKEN) -> "NormQuantize":
        """The one for tokens of so many values, before a linear of a form."""
        block, of_form = power_of_2(max(columns, TILE_INPUTS)), FORMS[form]
        return cls(
            block=block, norm=norm, aligned=columns % 16 == 0, in_blocks=of_form.in_blocks, planes=of_form.planes
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NormAdd:
    """`norm_add` of tokens of up to `block` values; `aligned` as in `NormQuantize`."""

    block: int
    aligned: bool

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"norm_add_{self.block}{'' if self.aligned else '_unaligned'}"

    @classmethod
    def of(cls, columns: int) -> "NormAdd":
        """The one for tokens of so many values."""
        return cls(block=power_of_2(max(columns, TILE_INPUTS)), aligned=columns % 16 == 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceRows:
    """`place_rows` of up to `block` values; `norm`: with the RMS norm. `aligned` as in `NormQuantize`."""

    block: int
    norm: bool
    aligned: bool

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"place_{'normed_' if self.norm else ''}rows_{self.block}{'' if self.aligned else '_unaligned'}"

    @classmethod
    def of(cls, columns: int, first: int, width: int, *, norm: bool) -> "PlaceRows":
        """The one for so many values, which begin at column `first` of rows of `width`."""
        aligned = columns % 16 == first % 16 == width % 16 == 0
        return cls(block=power_of_2(max(columns, TILE_INPUTS)), norm=norm, aligned=aligned)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Linear:
    """Tiles of so many tokens, and what follows the product. `gate`: one of `GATES`."""

    tokens: int
    bias: bool
    residual: bool
    gate: str

    @property
    def suffix(self) -> str:
        """What the kernels' names have in common."""
        ends = (("bias", self.bias), ("residual", self.residual), (self.gate, bool(self.gate)))
        return str(self.tokens) + "".join(f"_{name}" for name, has in ends if has)


@dataclass(frozen=True, slots=True, kw_only=True)
class W8A8Linear(_Linear):
    """`w8a8_linear`, with tiles of one of `TILE_TOKENS`."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"w8a8_linear_{self.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockLinear(_Linear):
    """`block_linear` of a form in blocks, one of `FORMS`, and tiles of one of its `tile_tokens`."""

    form: str

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"linear_in_{self.form}_{self.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RotateAppend:
    """`rotate_append` for heads of a size, of which the first `rotary` values are rotated; `norm`: q/k norms.

    `row`: 0 if a norm is over each head; else norms are over all heads of a token, of up to so many values.
    """

    head_size: int
    rotary: int
    cache_type: str
    norm: bool
    row: int = 0

    @property
    def name(self) -> str:
        """Of the kernel."""
        norm = f"_norm{f'_{self.row}' if self.row else ''}" if self.norm else ""
        return f"rotate_append_{self.head_size}_{self.rotary}{norm}_{self.cache_type}"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """`group`: heads per kv head. `reach`: the widest pass, so that a token's end of path has a fixed start."""

    group: int
    head_size: int
    reach: int
    cache_type: str
    softcap: bool
    window: bool

    @property
    def suffix(self) -> str:
        """What the two kernels' names have in common."""
        ends = (("softcap", self.softcap), ("window", self.window))
        shape = f"{self.group}_{self.head_size}_{self.reach}_{self.cache_type}"
        return shape + "".join(f"_{name}" for name, has in ends if has)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendCache(_Attention):
    """`attend_cache`: over the committed cache, in splits."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"attend_cache_{self.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttendPath(_Attention):
    """`attend_path`: the splits in order, and the end of each token's path."""

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"attend_path_{self.suffix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """`lm_head` with tiles of so many tokens, as the form has them; `likeliest`: keys that a tile leaves.

    `form`: one of `FORMS`.
    """

    tokens: int
    likeliest: int
    bias: bool
    softcap: bool
    form: str = PER_TOKEN

    @property
    def name(self) -> str:
        """Of the kernel."""
        ends = ((self.form, bool(self.form)), ("bias", self.bias), ("softcap", self.softcap))
        return f"lm_head_{self.tokens}_{self.likeliest}" + "".join(f"_{name}" for name, has in ends if has)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLikeliest:
    """`merge_likeliest`: a round, or the last one."""

    likeliest: int
    final: bool

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"merge_likeliest_{self.likeliest}{'_final' if self.final else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Likelihoods:
    """`likelihoods` of so many tokens after each position."""

    likeliest: int

    @property
    def name(self) -> str:
        """Of the kernel."""
        return f"likelihoods_{self.likeliest}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KvCompact:
    """`kv_compact`, for any type of cache."""

    name: str = "kv_compact"


Attend = AttendCache | AttendPath
LinearVariant = W8A8Linear | BlockLinear
Variant = (
    GatherRows
    | NormQuantize
    | NormAdd
    | PlaceRows
    | LinearVariant
    | RotateAppend
    | Attend
    | LmHead
    | MergeLikeliest
    | Likelihoods
    | KvCompact
)


def tile_rows(head_size: int) -> int:
    """Rows of a tile of `attend_cache`: more of wide heads would not fit registers and shared memory."""
    return 64 if head_size <= 128 else 32


def tile_tokens(group: int, head_size: int) -> int:
    """Tokens of a tile of `attend_cache` for so many heads per kv head: each takes a power of two of rows."""
    return tile_rows(head_size) // power_of_2(group)


def num_splits(last_position: int, reach: int) -> int:
    """Splits of the cache that `attend_cache` takes, for a pass whose last token is at `last_position` of its path."""
    tail = max(0, last_position - (reach - 1)) // BLOCK * BLOCK
    return -(-tail // SPLIT)
