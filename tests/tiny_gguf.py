"""A tiny GGUF model with random weights and a tokenizer of single bytes."""

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers

SPECIAL = ("<|begin|>", "<|im_end|>", "<|eom|>", "<|endoftext|>")


def add_sizes(writer: gguf.GGUFWriter, config) -> None:
    """The sizes of a transformers config, as every family's header has them."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def save_tiny_gguf(
    path: Path,
    *,
    pre: str = "llama-bpe",
    layers: int = 1,
    tokenizer: bool = True,
    rows: int = 256 + len(SPECIAL),
    extra: Mapping[str, np.ndarray] | None = None,
    **fields,
) -> Path:
    """One layer of Llama.

    `rows`: of the embedding. `extra`: more tensors. `fields`: more of the header, by GGUF key with `__` for dots; None
    leaves one out.
    """
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    if tokenizer:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3] * len(SPECIAL))
        writer.add_token_merges(["a b"] if pre == "none" else [])
    values = {"tokenizer__ggml__bos_token_id": 256, "tokenizer__ggml__eos_token_id": 257, **fields}
    for key, value in values.items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_array(name, value)
    random = np.random.default_rng(0)
    shapes = {"token_embd.weight": (rows, 64), "output_norm.weight": (64,)}
    for layer in range(layers):
        for part, shape in {
            "attn_norm": (64,),
            "ffn_norm": (64,),
            "attn_q": (64, 64),
            "attn_k": (32, 64),
            "attn_v": (32, 64),
            "attn_output": (64, 64),
            "ffn_gate": (96, 64),
            "ffn_up": (96, 64),
            "ffn_down": (64, 96),
        }.items():
            shapes[f"blk.{layer}.{part}.weight"] = shape
    for name, shape in shapes.items():
        value = random.standard_normal(shape) * 0.15 if len(shape) > 1 else random.random(shape) + 0.5
        writer.add_tensor(name, value.astype(np.float32))
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
