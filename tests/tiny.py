"""Random tiny models as Hugging Face folders, with a byte tokenizer and a chat template."""

import json
from pathlib import Path
from typing import Any

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def tiny_config(architecture: str, **overrides: Any):
    """A transformers config of a few thousand parameters."""
    from transformers import AutoConfig

    values: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        # Wide enough that attention and MLP matter beside the residual stream.
        "initializer_range": 0.15,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 256,
        "bos_token_id": None,
        # Families' own defaults are tokens of larger vocabularies.
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **overrides,
    }
    if architecture not in ("qwen2", "phi3", "granite", "olmo2", "smollm3"):
        values.setdefault("head_dim", 16)
    return AutoConfig.for_model(architecture, **values)


def tiny_config_json(architecture: str, **overrides: Any) -> dict[str, Any]:
    """What the config.json of a tiny model holds, of families that transformers lacks as well."""
    from quasar.checkpoints.architectures.families import ARCHITECTURES

    model_class, options = WITHOUT_CLASS.get(architecture, (ARCHITECTURES[architecture].model_class, {}))
    like = "llama" if architecture in WITHOUT_CLASS else architecture
    values = tiny_config(like, **{**options, **overrides}).to_dict()
    if architecture in WITHOUT_CLASS:
        values["bias"] = values.pop("attention_bias")
    if architecture == "internlm2":
        # The family has no such option: heads divide the hidden size.
        del values["head_dim"]
    return {**values, "architectures": [model_class], "model_type": architecture}


def tiny_torch_model(architecture: str, seed: int = 0, **overrides: Any):
    """A random model in float32, norms and biases random too: ones and zeros would hide mistakes."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, **overrides)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.rand_like(parameter) + 0.5)
            elif name.endswith(".bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def save_tiny_model(folder: Path, architecture: str, seed: int = 0, **overrides: Any) -> Path:
    """Write a random model as a Hugging Face folder."""
    if architecture in WITHOUT_CLASS:
        _save_without_class(folder, architecture, seed, overrides)
    else:
        tiny_torch_model(architecture, seed, **overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def reference_model(folder: Path) -> Any:
    """The float model of a folder by transformers' own loading; Llama's for families that transformers lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    own = folder / "reference"
    return AutoModelForCausalLM.from_pretrained(own if own.is_dir() else folder, dtype=torch.float32)


# Families that transformers has no class for: name → their class, and the Llama options that say the same.
WITHOUT_CLASS = {
    "PanguEmbedded": ("PanguEmbeddedForCausalLM", {"attention_bias": True}),
    "internlm2": ("InternLM2ForCausalLM", {"attention_bias": False}),
}


def _save_without_class(folder: Path, architecture: str, seed: int, overrides: dict[str, Any]) -> None:
    """A random Llama beside the same weights in the family's form."""
    import torch
    from safetensors.torch import save_file

    _, options = WITHOUT_CLASS[architecture]
    model = tiny_torch_model("llama", seed, **{**options, **overrides})
    model.save_pretrained(folder / "reference")
    config = tiny_config_json(architecture, **overrides)
    tensors = dict(model.state_dict())
    if architecture == "internlm2":
        groups = model.config.num_key_value_heads
        for layer in range(model.config.num_hidden_layers):
            at = f"model.layers.{layer}."
            for parameter in ("weight", "bias") if config["bias"] else ("weight",):
                parts = [tensors.pop(f"{at}self_attn.{part}_proj.{parameter}") for part in "qkv"]
                # By kv head: its query heads, its key, its value.
                heads = [part.reshape(groups, -1, model.config.head_dim, *part.shape[1:]) for part in parts]
                tensors[f"{at}attention.wqkv.{parameter}"] = torch.cat(heads, 1).reshape(-1, *parts[0].shape[1:])
        for own, theirs in _INTERNLM2_NAMES.items():
            tensors = {name.replace(own, theirs): value for name, value in tensors.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


_INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "lm_head": "output",
}


def save_tokenizer(folder: Path, chat_template: str = CHAT_TEMPLATE) -> None:
    """One token per byte, and the special tokens behind them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
