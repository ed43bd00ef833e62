"""What options do to a row of logits before a token is chosen, each row with its own context.

Biases and penalties touch a few tokens; nothing here goes over the vocabulary but a user's hook.
"""

import numpy as np
from numpy.typing import NDArray

from quasar.errors import GenerationError
from runtime.generation_options import GenerationOptions

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]


class LogitsChanges:
    """The changes of one generation. Rows come in the order of their tokens: `apply`, then `add` what was chosen."""

    def __init__(self, options: GenerationOptions, prompt: Int64, vocab_size: int, end_ids: frozenset[int]) -> None:
        """`end_ids`: what cannot be chosen before `min_new_tokens`."""
        self._options = options
        self._prompt_length = len(prompt)
        self._vocab_size = vocab_size
        biases = options.logit_bias or {}
        self._bias_ids = np.array(list(biases), np.int64)
        self._biases = np.array(list(biases.values()), np.float32)
        self._end_ids = np.array(sorted(end_ids), np.int64)
        self._penalizes = (options.repetition_penalty, options.presence_penalty, options.frequency_penalty) != (1, 0, 0)
        # Distinct tokens of prompt and answer, and how often each is in the answer.
        self._counts = np.zeros(vocab_size if self._penalizes else 0, np.int32)
        self._is_known = np.zeros(vocab_size if self._penalizes else 0, np.bool_)
        self._known = np.empty(vocab_size if self._penalizes else 0, np.int64)
        self._num_known = 0
        if self._penalizes:
            for token in np.unique(prompt).tolist():
                self._remember(token)

    def apply(self, logits: Float32, context: Int64) -> Float32:
        """Change a row of logits float32 [V] in place, and return it, or what the user's hook returns.

        `context` int64 [n]: prompt, answer, and the drafts that were accepted on the position's path.

        Raises:
            GenerationError: the hook returned something else than logits of that shape.
        """
        if len(self._bias_ids):
            logits[self._bias_ids] += self._biases
        if self._penalizes:
            self._penalize(logits)
        if len(context) - self._prompt_length < self._options.min_new_tokens:
            logits[self._end_ids] = -np.inf
        if self._options.logits_processor is not None:
            return self._call_hook(logits, context)
        return logits

    def add(self, token: int) -> None:
        """The token that was chosen: part of the context of later positions."""
        if self._penalizes:
            self._remember(token)
            self._counts[token] += 1

    def _remember(self, token: int) -> None:
        if not self._is_known[token]:
            self._is_known[token] = True
            self._known[self._num_known] = token
            self._num_known += 1

    def _penalize(self, logits: Float32) -> None:
        known = self._known[: self._num_known]
        values = logits[known]
        options = self._options
        if options.repetition_penalty != 1:
            penalty = np.float32(options.repetition_penalty)
            values = np.where(values < 0, values * penalty, values / penalty)
        if options.presence_penalty or options.frequency_penalty:
            counts = self._counts[known]
            values -= np.float32(options.frequency_penalty) * counts.astype(np.float32)
            values -= np.float32(options.presence_penalty) * (counts > 0).astype(np.float32)
        logits[known] = values

    def _call_hook(self, logits: Float32, context: Int64) -> Float32:
        assert self._options.logits_processor is not None
        shown = context.view()
        shown.flags.writeable = False
        changed = self._options.logits_processor(shown, logits)
        if not isinstance(changed, np.ndarray) or changed.shape != (self._vocab_size,):
            came = f"shape {changed.shape}" if isinstance(changed, np.ndarray) else type(changed).__name__
            raise GenerationError(
                f"logits_processor returned {came}; an array of shape ({self._vocab_size},) was expected"
            )
        if changed.dtype.kind != "f":
            raise GenerationError(f"logits_processor returned {changed.dtype}; floating-point logits were expected")
        return np.ascontiguousarray(changed, np.float32)
