"""A plan's tensors against the contract: checked before a byte is allocated."""

from dataclasses import dataclass
from typing import Any

from engines import contract as names
from engines.contract import Contract
from engines.tensorrt.network import ProfileShapes, past_of, profiles_for
from quasar.errors import EngineError

# TensorRT's names of the types that a KV cache may have, and ours.
CACHE_TYPES = {"HALF": "float16", "BF16": "bfloat16", "FLOAT": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bindings:
    """What a session allocates: the cache's type, and the profiles by name in the plan's order."""

    cache_type: str
    profiles: dict[str, ProfileShapes]


def check_bindings(engine: Any, contract: Contract) -> Bindings:
    """The bindings of a TensorRT engine (or of what stands in for one).

    Raises `EngineError` naming a tensor that is missing, of another type or shape, or a cache that is not updated in
    place.
    """
    found = {engine.get_tensor_name(index) for index in range(engine.num_io_tensors)}
    expected = _types(contract)
    if found != expected.keys():
        raise EngineError(f"the plan's tensors are not the contract's: {', '.join(sorted(found ^ expected.keys()))}")
    cache_types = set()
    for name, kind in expected.items():
        came = engine.get_tensor_dtype(name).name
        if kind is not None and came != kind:
            raise EngineError(f"the plan's tensor {name} is {came}; {kind} was expected: compile the plan again")
        if kind is None:
            cache_types.add(came)
            past = past_of(name)
            if past is not None and engine.get_aliased_input_tensor(name) != past:
                raise EngineError(f"the plan does not update {past} in place: compile it with a newer TensorRT")
    if len(cache_types) != 1 or not cache_types <= CACHE_TYPES.keys():
        raise EngineError(f"the plan's KV cache is {', '.join(sorted(cache_types))}; one float type was expected")
    profiles = profiles_for(contract)
    if engine.num_optimization_profiles != len(profiles):
        raise EngineError(
            f"the plan has {engine.num_optimization_profiles} profiles; {', '.join(profiles)} were expected"
        )
    for index, (profile, shapes) in enumerate(profiles.items()):
        for name, wanted in shapes.items():
            came = tuple(tuple(shape) for shape in engine.get_tensor_profile_shape(name, index))
            if (came[0], came[2]) != (wanted[0], wanted[2]):
                raise EngineError(
                    f"the plan's profile {profile} takes {name} from {came[0]} to {came[2]}; {wanted[0]} to "
                    f"{wanted[2]} was expected: compile the plan again"
                )
    return Bindings(cache_type=CACHE_TYPES[cache_types.pop()], profiles=profiles)


def _types(contract: Contract) -> dict[str, str | None]:
    """Tensor → TensorRT's name of its type; None for the caches, whose type the plan chooses."""
    types: dict[str, str | None] = {
        names.INPUT_IDS: "INT64",
        names.POSITION_IDS: "INT64",
        names.CACHE_LENGTHS: "INT64",
        names.LOGITS_ROWS: "INT64",
        names.NEXT_TOKENS: "INT64",
        names.LOGITS: "FLOAT",
    }
    if contract.top_k:
        types[names.TOP_TOKENS] = "INT64"
    if contract.tree_mask:
        types[names.TREE_MASK] = "BOOL"
    for layer in range(contract.num_layers):
        types |= dict.fromkeys((*names.past_names(layer), *names.present_names(layer)))
    return types
