"""The kernel of every variant."""

from plugins.gpu import (
    block_linear,
    gather_rows,
    kv_compact,
    likelihoods,
    lm_head,
    norm_add,
    norm_quantize,
    place_rows,
    rotate_append,
    verify_attention,
    w8a8_linear,
)
from plugins.gpu.kernel import Kernel
from plugins.gpu.variants import (
    AttendCache,
    AttendPath,
    BlockLinear,
    GatherRows,
    KvCompact,
    Likelihoods,
    LmHead,
    MergeLikeliest,
    NormAdd,
    NormQuantize,
    PlaceRows,
    RotateAppend,
    Variant,
    W8A8Linear,
)


def kernel_of(variant: Variant) -> Kernel:
    """The kernel that a variant names."""
    match variant:
        case GatherRows():
            return gather_rows.kernel_for(variant)
        case NormQuantize():
            return norm_quantize.kernel_for(variant)
        case NormAdd():
            return norm_add.kernel_for(variant)
        case PlaceRows():
            return place_rows.kernel_for(variant)
        case W8A8Linear():
            return w8a8_linear.kernel_for(variant)
        case BlockLinear():
            return block_linear.kernel_for(variant)
        case RotateAppend():
            return rotate_append.kernel_for(variant)
        case AttendCache():
            return verify_attention.cache_kernel(variant)
        case AttendPath():
            return verify_attention.path_kernel(variant)
        case LmHead():
            return lm_head.head_kernel(variant)
        case MergeLikeliest():
            return lm_head.merge_kernel(variant)
        case Likelihoods():
            return likelihoods.kernel_for(variant)
        case KvCompact():
            return kv_compact.KERNEL
