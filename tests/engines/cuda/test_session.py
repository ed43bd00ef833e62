"""The CUDA session decodes on a stand-in for a GPU (interpreted_session.py has what is asserted)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.prequantized import awq, awq_config, save_quantized
from tests.tiny import save_tiny_model

# Interpreted passes take a fifth of a second each: as little as has groups, layers and a norm of each kind.
SMALL = {"num_attention_heads": 2, "num_key_value_heads": 1}
# Windows end within the few tokens that are decoded.
CAPS = {"sliding_window": 4, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0}
SCALES = {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 0.25}
MODELS = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "phi3": ("phi3", {"partial_rotary_factor": 0.5, "hidden_size": 64, "sliding_window": 4}),
    "gemma2": ("gemma2", CAPS),
    "gemma2-wide-heads": ("gemma2", {**CAPS, "head_dim": 256}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 24},
    ),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "granite": ("granite", {**SCALES, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("olmo2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "blocks": ("llama", {"precision": "w8a8-block"}),
    "nibbles": ("llama", {"precision": "w4a8"}),
    "nibbles-in-planes": ("llama", {"precision": "w4a16"}),
    "int8-cache": ("qwen3", {"kv_dtype": "int8"}),
    "offsets": ("awq", {"precision": "stored", "kv_dtype": "int8"}),
}


def check_session(name, layers, prompts, only, passed, *, shared_engine, make_once):
    architecture, options = MODELS[name]
    options = {"num_hidden_layers": layers, **SMALL, **options}
    precision, kv_dtype = options.pop("precision", "w8a8"), options.pop("kv_dtype", "float16")

    def save(folder):
        if architecture == "awq":
            save_quantized(folder / "model", awq_config(), awq(), **options)
        else:
            save_tiny_model(folder / "model", architecture, **options)

    model = make_once(f"cuda-{name}-{layers}", save)
    engine = shared_engine(model / "model", kv_dtype=kv_dtype, precision=precision)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *("-k", only, str(Path(__file__).with_name("interpreted_session.py"))),
        ],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "QUASAR_TEST_ENGINES": str(engine),
            "QUASAR_TEST_PROMPTS": str(prompts),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert passed in done.stdout.splitlines()[-1]


ONE_LAYER = ("llama", "qwen2", "qwen3", "blocks", "nibbles", "nibbles-in-planes", "int8-cache", "offsets")


# Of the others, decoding alone, and one layer: it runs whatever they have beside Llama, in a third of the time.
@pytest.mark.parametrize(
    ("name", "layers", "prompts", "only", "passed"),
    [
        ("llama", 2, 3, "", "6 passed"),
        ("gemma2", 1, 2, "decoding", "1 passed"),
        # Nibbles with offsets, and an INT8 cache.
        ("offsets", 3, 1, "decoding", "1 passed"),
        *(
            pytest.param(*case, marks=pytest.mark.full)
            for case in (
                ("llama", 2, 8, "decoding", "1 passed"),
                ("qwen2", 1, 8, "decoding", "1 passed"),
                ("qwen3", 1, 8, "decoding", "1 passed"),
                ("blocks", 1, 4, "decoding", "1 passed"),
                ("nibbles", 1, 4, "decoding", "1 passed"),
                ("nibbles-in-planes", 1, 2, "decoding", "1 passed"),
                ("int8-cache", 1, 4, "decoding or one_value", "2 passed"),
            )
        ),
    ],
)
def test_a_session_on_the_stand_in(name, layers, prompts, only, passed, shared_engine, make_once):
    check_session(name, layers, prompts, only, passed, shared_engine=shared_engine, make_once=make_once)


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in MODELS if name not in ONE_LAYER])
def test_a_session_of_every_kind_of_layer(name, shared_engine, make_once):
    only = "decoding or one_value"
    check_session(name, 2, 3, only, "2 passed", shared_engine=shared_engine, make_once=make_once)
