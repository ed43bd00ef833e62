"""Random tiny models as Hugging Face folders, with a byte tokenizer and a chat template."""

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
        "tie_word_embeddings": False,
        **overrides,
    }
    if architecture != "qwen2":
        values.setdefault("head_dim", 16)
    return AutoConfig.for_model(architecture, **values)


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
    tiny_torch_model(architecture, seed, **overrides).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


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
