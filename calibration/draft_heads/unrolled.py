"""EAGLE-3's training-time test: a head runs on from its own hidden states, as it will when it drafts (2503.01840).

Step 0 is at every position of a block. In step k the chain that began at position i is k tokens further: it reads its
own hidden state of the step before, and attends to step 0's keys of the positions up to i and to its own of steps 1 to
k. No chain sees another, so chains may begin at some of the positions only.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.packed_blocks import TorchBlock

if TYPE_CHECKING:
    import torch


def unrolled_states(
    model: HeadModel, block: TorchBlock, chains: "torch.Tensor", steps: int
) -> "Iterator[tuple[torch.Tensor, torch.Tensor]]":
    """The chains that go on in each step, and the layer's output for them, float32 [chains, H].

    Chains are named by where they begin, int64 [chains]; in step k they are fed token `chain + 1 + k` of the block, and
    their logits are of the token after it. A chain ends with its sequence.
    """
    import torch

    tokens, positions = block.tokens, block.positions
    hidden = model.states(block.features)
    # The last token of a sequence has none after it: what its place is fed is never seen.
    following = torch.roll(tokens, -1)
    x = model.layer_input(following, hidden)
    keys, values = model.keys_values(x, positions)
    own: list[tuple[torch.Tensor, torch.Tensor]] = []
    x = x[chains]
    for step in range(steps):
        if step:
            goes_on = block.ends[chains] > chains + 1 + step
            if not bool(goes_on.all()):
                chains, hidden = chains[goes_on], hidden[goes_on]
                own = [(key[:, goes_on], value[:, goes_on]) for key, value in own]
            x = model.layer_input(tokens[chains + 1 + step], hidden)
            own.append(model.keys_values(x, positions[chains] + step))
        if not len(chains):
            return
        queries = model.queries(x, positions[chains] + step)
        attended = _attended(queries, keys, values, block.seen(chains), own)
        hidden = model.layer_output(x, attended)
        yield chains, hidden


def _attended(
    queries: "torch.Tensor",
    keys: "torch.Tensor",
    values: "torch.Tensor",
    mask: "torch.Tensor",
    own: "list[tuple[torch.Tensor, torch.Tensor]]",
) -> "torch.Tensor":
    """Attention [G, R, C, D] of queries [G, R, C, D] over keys [G, N, D], and over each chain's own.

    `mask`: float32 [C, N], -inf where a chain does not see a position. `own`: keys and values [G, C, D] by step.
    """
    import torch

    groups, repeated, chains, size = queries.shape
    scores = torch.bmm(queries.reshape(groups, repeated * chains, size), keys.transpose(1, 2))
    scores = scores.view(groups, repeated, chains, -1) + mask
    if own:
        further = [(queries * key[:, None]).sum(-1, keepdim=True) for key, _ in own]
        scores = torch.cat([scores, *further], dim=-1)
    shares = torch.softmax(scores, dim=-1)
    positions = keys.shape[1]
    first = shares[..., :positions].reshape(groups, repeated * chains, positions)
    attended = torch.bmm(first, values).view(groups, repeated, chains, size)
    for step, (_, value) in enumerate(own):
        attended = attended + shares[..., positions + step, None] * value[:, None]
    return attended
