"""Published layouts of draft heads as torch modules, each with the names, the config and the steps of its publisher.

Written from what the publishers say of them, apart from the canonical reference that they are compared with. A
module's `state_dict` is what its folder holds.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

VOCABULARY, DRAFTED = 96, 40
HIDDEN, MLP, HEADS, GROUPS, SIZE = 48, 80, 4, 2, 16
EPS = 1e-5
# Layers of the target.
LAYERS = 10


class RmsNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, value: Tensor) -> Tensor:
        return self.weight * value / (value.square().mean(-1, keepdim=True) + EPS).sqrt()


class Attention(nn.Module):
    def __init__(self, inputs: int, *, theta: float, frequencies: Tensor | None, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.q_proj = nn.Linear(inputs, HEADS * SIZE, bias=bias)
        self.k_proj = nn.Linear(inputs, GROUPS * SIZE, bias=bias)
        self.v_proj = nn.Linear(inputs, GROUPS * SIZE, bias=bias)
        self.o_proj = nn.Linear(HEADS * SIZE, HIDDEN, bias=False)
        if qk_norm:
            self.q_norm, self.k_norm = RmsNorm(SIZE), RmsNorm(SIZE)
        self._qk_norm = qk_norm
        self._angles = theta ** (-torch.arange(0, SIZE, 2) / SIZE) if frequencies is None else frequencies
        self.cache: list[tuple[Tensor, Tensor]] = []

    def rotated(self, value: Tensor, position: int) -> Tensor:
        """Pairs of the two halves as complex numbers, each turned by its angle."""
        pairs = torch.complex(value[: SIZE // 2].contiguous(), value[SIZE // 2 :].contiguous())
        pairs = pairs * torch.polar(torch.ones(SIZE // 2), self._angles * position).to(pairs.dtype)
        return torch.cat([pairs.real, pairs.imag])

    def forward(self, read: Tensor, positions: list[int], sees: list[list[int]]) -> Tensor:
        """One position, one head at a time. `sees`: for each, the cached ones and the new ones that it sees."""
        queries = []
        for row, position in zip(read, positions, strict=True):
            query = self.q_proj(row).view(HEADS, SIZE)
            key, value = self.k_proj(row).view(GROUPS, SIZE), self.v_proj(row).view(GROUPS, SIZE)
            if self._qk_norm:
                query, key = self.q_norm(query), self.k_norm(key)
            queries.append(torch.stack([self.rotated(head, position) for head in query]))
            self.cache.append((torch.stack([self.rotated(head, position) for head in key]), value))
        mixed = []
        for query, seen in zip(queries, sees, strict=True):
            heads = []
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                scores = torch.stack([self.cache[one][0][group] @ query[head] for one in seen]) / math.sqrt(SIZE)
                weights = scores.softmax(0)
                heads.append(sum(weight * self.cache[one][1][group] for weight, one in zip(weights, seen, strict=True)))
            mixed.append(torch.cat(heads))
        return self.o_proj(torch.stack(mixed))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.up_proj = nn.Linear(HIDDEN, MLP, bias=False)
        self.down_proj = nn.Linear(MLP, HIDDEN, bias=False)

    def forward(self, value: Tensor) -> Tensor:
        gate = self.gate_proj(value)
        return self.down_proj(gate * gate.sigmoid() * self.up_proj(value))


class Eagle3Layer(nn.Module):
    def __init__(self, *, residual_normed: bool = False, **attention: Any) -> None:
        super().__init__()
        self.self_attn = Attention(2 * HIDDEN, **attention)
        self.mlp = Mlp()
        self.hidden_norm, self.input_layernorm = RmsNorm(HIDDEN), RmsNorm(HIDDEN)
        self.post_attention_layernorm = RmsNorm(HIDDEN)
        self._residual_normed = residual_normed

    def forward(self, embedded: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> Tensor:
        normed = self.hidden_norm(hidden)
        both = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        hidden = (normed if self._residual_normed else hidden) + self.self_attn(both, positions, sees)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class EagleLayer(nn.Module):
    """The first layer of EAGLE has no norm before attention."""

    def __init__(self, **attention: Any) -> None:
        super().__init__()
        self.self_attn = Attention(HIDDEN, **attention)
        self.mlp = Mlp()
        self.post_attention_layernorm = RmsNorm(HIDDEN)

    def forward(self, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> Tensor:
        hidden = hidden + self.self_attn(hidden, positions, sees)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Published(nn.Module):
    """What the layouts share: a config, the target's tensors, and a folder.

    `states`: what enters the target's ten layers, and what leaves the last, [11, T, hidden]; `final`: after the norm.
    """

    config: dict[str, Any]

    def __init__(self, target_hidden: int = HIDDEN) -> None:
        super().__init__()
        # In a list: no part of the state.
        self.target = [torch.randn(VOCABULARY, HIDDEN), torch.randn(VOCABULARY, HIDDEN) * 0.3]
        self.target_hidden = target_hidden
        self.config = {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "max_position_embeddings": 64,
            "model_type": "llama",
            "num_attention_heads": HEADS,
            "num_key_value_heads": GROUPS,
            "num_hidden_layers": 1,
            "head_dim": SIZE,
            "rms_norm_eps": EPS,
            "tie_word_embeddings": False,
            "vocab_size": VOCABULARY,
        }

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        """The hidden states that the first positions are fed."""
        raise NotImplementedError

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Logits, and hidden states for later positions."""
        raise NotImplementedError

    def targets(self) -> Tensor:
        """The target's token of each draft id."""
        return torch.arange(VOCABULARY)

    def stored(self) -> dict[str, Tensor]:
        """What the folder holds."""
        return dict(self.state_dict())

    def save(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.stored().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def mapping() -> tuple[Tensor, Tensor]:
    """Random `d2t` and `t2d`: the differences of the tokens that are drafted to their draft ids; which they are."""
    used = torch.randperm(VOCABULARY)[:DRAFTED].sort().values
    return used - torch.arange(DRAFTED), torch.isin(torch.arange(VOCABULARY), used)


class SafeAilabEagle3(Published):
    """Features enter the layers 2, half, and the last but two; the hidden state goes on before the norm."""

    d2t: Tensor

    def __init__(self, theta: float = 10000.0, target_hidden: int = HIDDEN, frequencies: Tensor | None = None) -> None:
        super().__init__(target_hidden)
        self.midlayer = Eagle3Layer(theta=theta, frequencies=frequencies, bias=False, qk_norm=False)
        self.fc = nn.Linear(3 * target_hidden, HIDDEN, bias=False)
        self.norm = RmsNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, DRAFTED, bias=False)
        d2t, t2d = mapping()
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        self.config["draft_vocab_size"] = DRAFTED

    def embed(self, ids: Tensor) -> Tensor:
        return self.target[0][ids]

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        taken = [state for index, state in enumerate(states[:LAYERS]) if index in (2, LAYERS // 2, LAYERS - 3)]
        return self.fc(torch.cat(taken, dim=-1))

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        hidden = self.midlayer(self.embed(ids), hidden, positions, sees)
        return self.lm_head(self.norm(hidden)), hidden

    def targets(self) -> Tensor:
        return torch.arange(DRAFTED) + self.d2t


class SpecForgeEagle3(SafeAilabEagle3):
    """Layers by what leaves them; its own embedding where the target's is of another size; EAGLE-3.1's norms."""

    def __init__(self, layers: tuple[int, ...] = (0, 4, 8), norms: bool = True) -> None:
        super().__init__(theta=5e5, target_hidden=HIDDEN + 16, frequencies=llama3_frequencies(5e5))
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        if norms:
            self.fc_norm = nn.ModuleList([RmsNorm(self.target_hidden) for _ in range(3)])
        self._layers, self._norms = layers, norms
        self.config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            "target_hidden_size": self.target_hidden,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layers), "use_aux_hidden_state": True},
            "fc_norm": norms,
            "norm_output": norms,
        }

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        after = [states[index + 1] for index in range(LAYERS)]
        taken = [after[layer] for layer in self._layers]
        if self._norms:
            taken = [norm(state) for norm, state in zip(self.fc_norm, taken, strict=True)]
        return self.fc(torch.cat(taken, dim=-1))

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        hidden = self.midlayer(self.embed(ids), hidden, positions, sees)
        normed = self.norm(hidden)
        return self.lm_head(normed), normed if self._norms else hidden


class AngelSlimEagle3(SafeAilabEagle3):
    """Layers by transformers' hidden states, after the embedding; options of the target that the head does not have."""

    def __init__(self) -> None:
        super().__init__(theta=1e6)
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.config |= {
            "architectures": ["Eagle3LlamaForCausalLM"],
            "target_model_type": "qwen3",
            "rope_theta": 1e6,
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "use_qk_norm": True,
            "attention_bias": True,
            "sliding_window": 8,
            "modal_type": "VLM",
        }

    def embed(self, ids: Tensor) -> Tensor:
        return self.embed_tokens(ids)

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        return self.fc(torch.cat([states[1 + layer] for layer in (1, LAYERS // 2 - 1, LAYERS - 4)], dim=-1))


class SpeculatorsEagle3(Published):
    """vLLM's: norms of queries and keys, the residual after its norm, one norm over all features, five of them."""

    d2t: Tensor

    def __init__(self, *, norm_output: bool = True) -> None:
        super().__init__()
        rope = {"theta": 2e4, "frequencies": None}
        layer = Eagle3Layer(residual_normed=True, bias=True, qk_norm=True, **rope)
        layer.self_attn.o_proj = nn.Linear(HEADS * SIZE, HIDDEN, bias=True)
        self.layers = nn.ModuleList([layer])
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.input_norm = RmsNorm(5 * HIDDEN)
        self.fc = nn.Linear(5 * HIDDEN, HIDDEN, bias=False)
        self.norm = RmsNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, DRAFTED, bias=False)
        d2t, t2d = mapping()
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)
        self._layers, self._norm_output = (0, 2, 5, 7, LAYERS), norm_output
        inner = {
            **{key: value for key, value in self.config.items() if key != "architectures"},
            "model_type": "qwen3",
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 2e4},
        }
        self.config = {
            "architectures": ["Eagle3Speculator"],
            "speculators_model_type": "eagle3",
            "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "someone/target"}},
            "transformer_layer_config": inner,
            "draft_vocab_size": DRAFTED,
            "target_hidden_size": None,
            "eagle_aux_hidden_state_layer_ids": list(self._layers),
            "norm_before_residual": True,
            "norm_before_fc": True,
            "fc_norm": False,
            "norm_output": norm_output,
            "embed_requires_grad": False,
        }

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        return self.fc(self.input_norm(torch.cat([states[layer] for layer in self._layers], dim=-1)))

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        hidden = self.layers[0](self.embed_tokens(ids), hidden, positions, sees)
        normed = self.norm(hidden)
        return self.lm_head(normed), normed if self._norm_output else hidden

    def targets(self) -> Tensor:
        return torch.arange(DRAFTED) + self.d2t

    def stored(self) -> dict[str, Tensor]:
        return {**self.state_dict(), "verifier_norm.weight": torch.ones(HIDDEN)}


class ModelOptEagle3(Published):
    """NVIDIA's: `layers.0`, every token drafted by the target's LM head as it was, biases of MLPs none."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Eagle3Layer(theta=1e4, frequencies=None, bias=False, qk_norm=False)])
        self.input_norm = RmsNorm(3 * HIDDEN)
        self.fc = nn.Linear(3 * HIDDEN, HIDDEN, bias=False)
        self.norm = RmsNorm(HIDDEN)
        self.config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": None,
            "rope_scaling": {"rope_type": "default", "rope_theta": 1e4},
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [1, 4, 6],
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "parallel_draft_step": 1,
                "norm_before_fc": True,
                "return_hidden_post_norm": True,
            },
        }

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        return self.fc(self.input_norm(torch.cat([states[1 + layer] for layer in (1, 4, 6)], dim=-1)))

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        hidden = self.norm(self.layers[0](self.target[0][ids], hidden, positions, sees))
        return hidden @ self.target[1].T, hidden


class SafeAilabEagle(Published):
    """EAGLE and EAGLE-2: what the target's LM head reads is fed beside the embedding; no norms at either end."""

    def __init__(self, *, bias: bool = True, embedding: bool = True, qkv_bias: bool = False) -> None:
        super().__init__()
        if embedding:
            self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([EagleLayer(theta=1e4, frequencies=None, bias=qkv_bias, qk_norm=False)])
        self.fc = nn.Linear(2 * HIDDEN, HIDDEN, bias=bias)
        if not bias:
            self.config["bias"] = False

    def start(self, states: Tensor, final: Tensor) -> Tensor:
        return final

    def step(self, ids: Tensor, hidden: Tensor, positions: list[int], sees: list[list[int]]) -> tuple[Tensor, Tensor]:
        embedded = self.embed_tokens(ids) if "embed_tokens.weight" in self.state_dict() else self.target[0][ids]
        hidden = self.layers[0](self.fc(torch.cat((embedded, hidden), dim=-1)), positions, sees)
        return hidden @ self.target[1].T, hidden


def llama3_frequencies(theta: float) -> Tensor:
    """Llama 3.1's rope of SpecForge's config above, pair by pair."""
    factor, low, high, original = 8.0, 1.0, 4.0, 16
    angles = []
    for pair in range(SIZE // 2):
        angle = theta ** (-2 * pair / SIZE)
        turns = original * angle / (2 * math.pi)
        if turns < low:
            angle /= factor
        elif turns <= high:
            kept = (turns - low) / (high - low)
            angle = (1 - kept) * angle / factor + kept * angle
        angles.append(angle)
    return torch.tensor(angles)


def published(make: Any, seed: int = 0, **options: Any) -> Published:
    """A random head of a layout."""
    torch.manual_seed(seed)
    head = make(**options).eval().requires_grad_(False)
    for name, parameter in head.named_parameters():
        if "norm" not in name and not name.startswith("embed"):
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    return head
