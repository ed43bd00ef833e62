"""Reading JSON that somebody else may have written: every field is checked before it is used."""

from collections.abc import Mapping
from typing import Any

from quasar.errors import DamagedEngineError

_NAMES: dict[Any, tuple[type, ...]] = {
    int: (int,),
    str: (str,),
    bool: (bool,),
    float: (int, float),
    dict: (dict,),
    list: (list,),
}


def check_fields(what: str, value: Any, expected: Mapping[str, Any], *, file: str = "manifest.json") -> dict[str, Any]:
    """The expected keys of a JSON object, types checked; a key it does not know is an error, too. `file` has it.

    Raises `DamagedEngineError` naming the field.
    """
    if not isinstance(value, Mapping):
        raise DamagedEngineError(f"{file}: {what} is a {type(value).__name__}; an object was expected")
    for name in value:
        if name not in expected:
            raise DamagedEngineError(f"{file}: {what} has an unknown field {name!r}")
    for name, kind in expected.items():
        if name not in value:
            raise DamagedEngineError(f"{file}: {what} lacks the field {name!r}")
        came = value[name]
        if not isinstance(came, _NAMES[kind]) or (isinstance(came, bool) and kind is not bool):
            raise DamagedEngineError(f"{file}: {what}.{name} is {came!r}; {kind.__name__} was expected")
    return dict(value)
