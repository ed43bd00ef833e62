"""Names that the canonical graph gives and passes look for."""


def packed_qkv(layer: int) -> str:
    """Value [B, T, (H + 2G)·D]: queries, keys and values of a layer before norms, rotation and the cache."""
    return f"layers.{layer}.self_attn.qkv"


def attention(layer: int) -> str:
    """The layer's Attention node; after lowering, the node that replaces it."""
    return f"layers.{layer}.self_attn.attention"


def context(layer: int) -> str:
    """Value [B, T, H·D]: what attention hands to o_proj."""
    return f"layers.{layer}.self_attn.context"


# Value [B, M, hidden]: the residual stream at the positions that `logits_rows` names; the final norm reads it.
HEAD_ROWS = "head_rows"
# Value [B, M, hidden]: what the head reads.
HEAD_INPUT = "norm.normed"
# Tables float32 [capacity, rotary size / 2] of the first rope.
COS_TABLE = "rotary.cos"
SIN_TABLE = "rotary.sin"
# Table of no columns, for native layers that do not rotate.
NO_ROTATION = "rotary.none"
# Value bool [B, 1, T, S]: which cache slots, with the new positions in place, a new position sees.
MASK = "mask"
# Value [1]: how many positions this call feeds.
NUM_ROWS = "num_rows"


def cos_table(rope: int) -> str:
    """The table of a rope, by its number in `DecoderSpec.ropes`."""
    return COS_TABLE if rope == 0 else f"{COS_TABLE}.{rope}"


def sin_table(rope: int) -> str:
    """As `cos_table`."""
    return SIN_TABLE if rope == 0 else f"{SIN_TABLE}.{rope}"


def window_mask(window: int) -> str:
    """Value bool [B, 1, T, S]: as `MASK`, for layers where a position sees `window` positions of its own path."""
    return f"{MASK}.window_{window}"
