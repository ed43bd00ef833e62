"""Each published layout is read as what its publisher computes: from prompt to a tree, hidden states and logits."""

import pytest
import torch

from quasar.checkpoints.spec import AttentionSpec, DecoderSpec, LayerSpec, MlpSpec, Rope
from quasar.draft_heads.folder import open_draft_head
from tests.draft_head_reference import CanonicalHead
from tests.quasar.draft_heads.published_heads import (
    HIDDEN,
    LAYERS,
    VOCABULARY,
    AngelSlimEagle3,
    ModelOptEagle3,
    SafeAilabEagle,
    SafeAilabEagle3,
    SpecForgeEagle3,
    SpeculatorsEagle3,
    published,
)

LAYOUTS = {
    "SafeAILab EAGLE-3": (SafeAilabEagle3, {}),
    "SpecForge EAGLE-3.1": (SpecForgeEagle3, {}),
    "SpecForge EAGLE-3": (SpecForgeEagle3, {"norms": False}),
    "AngelSlim": (AngelSlimEagle3, {}),
    "speculators": (SpeculatorsEagle3, {}),
    "speculators, hidden state before the norm": (SpeculatorsEagle3, {"norm_output": False}),
    "ModelOpt": (ModelOptEagle3, {}),
    "SafeAILab EAGLE": (SafeAilabEagle, {}),
    "SafeAILab EAGLE, no biases, the target's embedding": (SafeAilabEagle, {"bias": False, "embedding": False}),
    "SafeAILab EAGLE of Qwen2": (SafeAilabEagle, {"qkv_bias": True}),
}


def target_spec(hidden_size=HIDDEN, layers=LAYERS, vocab_size=VOCABULARY):
    attention = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, rope=Rope(theta=1e4))
    return DecoderSpec(
        architecture="llama",
        layers=(LayerSpec(attention=attention, mlp=MlpSpec(intermediate_size=64)),) * layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        context_length=256,
        rms_norm_eps=1e-5,
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompt_and_tree_as_the_publisher_computes_them(layout, tmp_path):
    make, options = LAYOUTS[layout]
    theirs = published(make, **options)
    theirs.save(tmp_path)
    head = open_draft_head(tmp_path, target_spec(theirs.target_hidden))
    spec = head.spec
    assert head.targets.tolist() == theirs.targets().tolist()

    tensors = {name: head.read(name) for name in spec.tensors()}
    theirs.double()
    theirs.target = [value.double() for value in theirs.target]
    ours = CanonicalHead(spec, tensors, embedding=theirs.target[0], head=theirs.target[1], dtype=torch.float64)
    length = 7
    states = torch.randn(LAYERS + 1, length, theirs.target_hidden, dtype=torch.float64)
    final = torch.randn(length, theirs.target_hidden, dtype=torch.float64)
    features = torch.cat([states[layer] for layer in spec.feature_layers], dim=-1)
    hidden = [theirs.start(states, final), ours.hidden(final if spec.normed else features)]
    torch.testing.assert_close(hidden[1], hidden[0], atol=1e-5, rtol=1e-5)

    # The prompt; then two branches on its last hidden state, and three positions on those.
    levels = [
        (list(range(length)), [list(range(position + 1)) for position in range(length)], None),
        ([length] * 2, [[*range(length), length + node] for node in range(2)], [length - 1] * 2),
        (
            [length + 1] * 3,
            [[*range(length), length + parent, length + 2 + node] for node, parent in enumerate((0, 0, 1))],
            [0, 0, 1],
        ),
    ]
    for positions, sees, parents in levels:
        if parents is not None:
            hidden = [one[parents] for one in hidden]
        ids = torch.randint(VOCABULARY, (len(positions),))
        mask = torch.zeros(len(positions), max(map(max, sees)) + 1, dtype=torch.bool)
        for row, seen in enumerate(sees):
            mask[row, seen] = True
        logits, hidden[0] = theirs.step(ids, hidden[0], positions, sees)
        our_logits, hidden[1] = ours.step(ids, hidden[1], torch.tensor(positions), mask)
        assert logits.std() > 0.1
        # Rotary tables are float32.
        torch.testing.assert_close(our_logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(hidden[1], hidden[0], atol=1e-5, rtol=1e-5)
