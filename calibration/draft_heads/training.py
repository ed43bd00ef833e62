"""The training of a draft head: blocks in a new order each epoch, AdamW, checkpoints that a later run goes on from."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from calibration.draft_heads.acceptance_estimate import AcceptanceEstimate, estimate
from calibration.draft_heads.data_folder import GeneratedSequence
from calibration.draft_heads.head_loss import STEPS, head_loss
from calibration.draft_heads.head_model import HeadModel
from calibration.draft_heads.pace import Pace
from calibration.draft_heads.packed_blocks import Piece, TorchBlock, draft_numbers, pack, torch_block
from quasar.errors import BuildError
from quasar.files import atomic_path, safetensors_errors

if TYPE_CHECKING:
    import torch

# AdamW (arXiv 1711.05101).
PEAK_RATE = 5e-4
_BETAS = (0.9, 0.95)
_DECAY = 0.01
_LONGEST_GRADIENT = 1.0
BLOCKS_OF_AN_UPDATE = 1
# Between checkpoints.
_SECONDS = 120.0
# One sequence in so many is held out; of these, blocks that the estimate looks at.
_HELD_OUT = 20
_ESTIMATED_BLOCKS = 24
# Of these, what the estimates on the way look at: all of them would take a fifth of the time of a large model's head.
_BLOCKS_ON_THE_WAY = 6

_Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingProgress:
    """What a checkpoint says."""

    updates: int
    progress: float
    epochs: float
    loss: float
    estimate: AcceptanceEstimate


class Training:
    """A head in training on some sequences.

    Everything but its length follows from the seed, so that a training that is stopped and goes on makes the same head
    as one that is not, where `pace` counts updates.
    """

    def __init__(
        self,
        model: HeadModel,
        learned: Sequence[GeneratedSequence],
        held_out: Sequence[GeneratedSequence],
        tokens: NDArray[np.int64],
        pace: Pace,
        *,
        seed: int,
        checkpoint: Path,
        peak_rate: float = PEAK_RATE,
        bfloat16: bool = False,
        clock: _Clock = time.monotonic,
    ) -> None:
        """Go on from `checkpoint` where there is one.

        Args:
            learned: what is learned from; `held_out`: what estimates look at (`split`).
            tokens: the target's token of each that the head drafts.
            bfloat16: products take operands of that type; parameters, sums and the loss stay float32.
        """
        import torch

        self.model, self.pace, self._bfloat16 = model, pace, bfloat16
        self._tokens, self._seed, self._path, self._clock = tokens, seed, checkpoint, clock
        self._numbers = draft_numbers(tokens, model.spec.decoder.vocab_size)
        self._learned, self._peak_rate = learned, peak_rate
        order = np.random.default_rng(seed).permutation(len(held_out)).tolist()
        blocks = pack(held_out, order)[:_ESTIMATED_BLOCKS]
        self._held_out = [torch_block(pieces, self._numbers, model.device) for pieces in blocks]
        self._block_cursor = 0
        self._epoch_blocks = len(pack(learned, self._order(0)))
        self.losses: list[float] = []
        parameters = list(model.parameters.values())
        groups = [
            {"params": [one for one in parameters if one.ndim > 1], "weight_decay": _DECAY},
            {"params": [one for one in parameters if one.ndim == 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(groups, lr=peak_rate, betas=_BETAS, fused=True)
        if checkpoint.is_file():
            self._load()

    @property
    def num_blocks(self) -> int:
        """Blocks of an epoch."""
        return self._epoch_blocks

    @property
    def epochs(self) -> float:
        """How often the text has been seen."""
        return self._block_cursor / max(self._epoch_blocks, 1)

    def run(self, report: Callable[[TrainingProgress], None]) -> None:
        """Train to the end; `report` hears of each checkpoint, the last included."""
        saved = self._clock()
        blocks = self._blocks()
        while not self.pace.is_done:
            begun = self._clock()
            loss = self._update([next(blocks) for _ in range(BLOCKS_OF_AN_UPDATE)])
            self.losses.append(loss)
            if not math.isfinite(loss):
                raise BuildError("the training's loss is no number any more: take another --seed, or more --minutes")
            self.pace.advance(self._clock() - begun)
            if self._clock() - saved >= _SECONDS and not self.pace.is_done:
                begun = self._clock()
                report(self._progress(_BLOCKS_ON_THE_WAY))
                self.save()
                saved = self._clock()
                self.pace.spent += saved - begun
        self.save()
        report(self._progress())

    def try_updates(self, count: int) -> float:
        """The seconds of an update of all steps, over some that are made and not kept, after one that warms up."""
        blocks = self._blocks()
        self.pace.updates = self.pace.most_updates
        begun = 0.0
        for number in range(count + 1):
            if number == 1:
                begun = self._clock()
            self._update([next(blocks) for _ in range(BLOCKS_OF_AN_UPDATE)])
        return (self._clock() - begun) / count

    def estimate(self, num_blocks: int = _ESTIMATED_BLOCKS) -> AcceptanceEstimate:
        """The figures of the head as it is, on so many held-out blocks."""
        return estimate(self.model, self._held_out[:num_blocks], self._tokens)

    def save(self) -> None:
        """Write parameters, the optimizer's state and how far it is, atomically."""
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for name, parameter in self.model.parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach().contiguous()
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value.contiguous()
        state = {
            "spent": self.pace.spent,
            "updates": self.pace.updates,
            "cursor": self._block_cursor,
            "losses": self.losses[-64:],
        }
        with safetensors_errors(), atomic_path(self._path) as temporary:
            save_file(tensors, temporary, metadata={"training": json.dumps(state)})

    def _load(self) -> None:
        import torch
        from safetensors import safe_open

        with safe_open(self._path, "pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["training"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
        for name, parameter in self.model.parameters.items():
            with torch.no_grad():
                parameter.copy_(stored[f"parameter.{name}"])
            self._optimizer.state[parameter] = {
                # A fused step counts where its parameter is.
                key: stored[f"{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}.{name}" in stored
            }
        self.pace.spent, self.pace.updates = state["spent"], state["updates"]
        self._block_cursor, self.losses = state["cursor"], state["losses"]

    def _progress(self, num_blocks: int = _ESTIMATED_BLOCKS) -> TrainingProgress:
        recent = self.losses[-32:]
        return TrainingProgress(
            updates=self.pace.updates,
            progress=self.pace.progress,
            epochs=self.epochs,
            loss=sum(recent) / max(len(recent), 1),
            estimate=self.estimate(num_blocks),
        )

    def _order(self, epoch: int) -> list[int]:
        order: list[int] = np.random.default_rng([self._seed, epoch]).permutation(len(self._learned)).tolist()
        return order

    def _blocks(self) -> Iterator[list[Piece]]:
        """Blocks without end, from where the training is."""
        passed = 0
        epoch = 0
        while True:
            blocks = pack(self._learned, self._order(epoch))
            # Not in the order in which they were filled: the last ones are the emptiest.
            shuffled = np.random.default_rng([self._seed, epoch, 1]).permutation(len(blocks)).tolist()
            for index in shuffled:
                passed += 1
                if passed > self._block_cursor:
                    self._block_cursor = passed
                    yield blocks[index]
            epoch += 1

    def _update(self, blocks: Sequence[Sequence[Piece]]) -> float:
        """One step of the optimizer; the loss before it."""
        import torch

        for group in self._optimizer.param_groups:
            group["lr"] = self.pace.rate(self._peak_rate)
        total = 0.0
        for pieces in blocks:
            loss = self._loss(torch_block(pieces, self._numbers, self.model.device))
            if loss is not None:
                (loss / len(blocks)).backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach()) / len(blocks)
        torch.nn.utils.clip_grad_norm_(list(self.model.parameters.values()), _LONGEST_GRADIENT)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return total

    def _loss(self, block: TorchBlock) -> "torch.Tensor | None":
        steps = self.pace.steps(STEPS)
        import torch

        with torch.autocast(self.model.device, torch.bfloat16, enabled=self._bfloat16):
            return head_loss(self.model, block, steps, np.random.default_rng([self._seed, self._block_cursor, 2]))


def split(
    sequences: Sequence[GeneratedSequence], num_prompts: int | None = None
) -> tuple[list[GeneratedSequence], list[GeneratedSequence]]:
    """Those that are learned from, and those that are held out: one in twenty, or at least one.

    `num_prompts`: of prompts that are answered in turn; all answers to one are learned from, or none.
    """
    places = by_prompt(sequences, num_prompts)
    held_out = [one for one, place in zip(sequences, places, strict=True) if place % _HELD_OUT == _HELD_OUT // 2]
    if not held_out:
        last = places[-1]
        held_out = [one for one, place in zip(sequences, places, strict=True) if place == last]
    numbers = {one.number for one in held_out}
    return [one for one in sequences if one.number not in numbers], held_out


def by_prompt(sequences: Sequence[GeneratedSequence], num_prompts: int | None) -> list[int]:
    """Of each sequence the place of its prompt, counted in order of appearance; without prompts its own."""
    known: dict[int, int] = {}
    keys = (one.number if num_prompts is None else one.number % num_prompts for one in sequences)
    return [known.setdefault(key, len(known)) for key in keys]
