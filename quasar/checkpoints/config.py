"""`DecoderSpec` from a Hugging Face config: the family is found by name, and reads it."""

from collections.abc import Mapping
from typing import Any

from quasar.checkpoints.architectures.base import Architecture
from quasar.checkpoints.architectures.families import ARCHITECTURES
from quasar.checkpoints.huggingface_config import HuggingFaceConfig
from quasar.checkpoints.spec import DecoderSpec
from quasar.errors import CheckpointError

# What a config with a `text_config` says for the whole model.
_OUTER = ("bos_token_id", "eos_token_id", "tie_word_embeddings", "quantization_config")


def spec_from_config(config: Mapping[str, Any], generation: Mapping[str, Any]) -> DecoderSpec:
    """The spec that `config.json` and `generation_config.json` describe.

    Raises `CheckpointError` naming the architecture or option that is not supported, or the key that is missing.
    """
    try:
        spec = _architecture(config).from_config(HuggingFaceConfig(config, generation))
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json holds a value of the wrong kind ({error})") from None
    spec.check()
    return spec


def decoder_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the decoder alone: `text_config` where a model takes images as well, else the config itself.

    Raises `CheckpointError` if that is missing.
    """
    names = config.get("architectures") or []
    wrapped = [one for one in ARCHITECTURES.values() if set(one.wrapper_classes).intersection(names)]
    if not wrapped:
        return config
    own = config.get("text_config")
    if not isinstance(own, Mapping):
        raise CheckpointError(f"config.json: text_config is {own!r}; a JSON object was expected")
    outer = {name: config[name] for name in _OUTER if name in config}
    return {**outer, **own, "architectures": [wrapped[0].model_class], "model_type": wrapped[0].name}


def _architecture(config: Mapping[str, Any]) -> Architecture:
    names, kind = config.get("architectures") or [], config.get("model_type")
    if not names and kind in ARCHITECTURES:
        # transformers picks the model by model_type alone.
        return ARCHITECTURES[kind]
    for name in names:
        by_type = {one.name: one for one in ARCHITECTURES.values() if name in (one.model_class, *one.other_classes)}
        if by_type:
            # transformers picks the float model by model_type; both must mean the same.
            if kind not in by_type:
                raise CheckpointError(f"config.json: model_type is {kind!r}, but {name} is named")
            return by_type[kind]
    by_class = [one.model_class for one in ARCHITECTURES.values()]
    came = ", ".join(map(str, names)) or f"model_type {config.get('model_type', 'unknown')!r}"
    raise CheckpointError(f"unsupported architecture: {came}; supported are {', '.join(by_class)}")
