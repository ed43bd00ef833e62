"""Text of the model's own for a draft head: many sequences at a time, features and likely tokens taken on the way.

Positions that are decoded have the bits that a prefill of the same tokens has on native kernels, so that nothing is fed
a second time.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np

from calibration.draft_heads.generated_text import GeneratedText, TextSource, TokenSampler
from calibration.draft_heads.likely_tokens import likely_tokens
from calibration.texts import overlaps
from engines.session import Positions, Session
from plugins.cpu.library import open_library
from plugins.cpu.sampler import NativeSampler
from plugins.sample_token import Filters, sample_token
from quasar.errors import QuasarError
from quasar.text import Message, Prompt

# A prompt of the user's is answered so often: once with the likeliest tokens, the other times drawn.
ANSWERS_OF_A_PROMPT = 4


class Generation:
    """Feeds a session with as many sequences as it has slots, and hands out those that are done.

    `dropped`: how many sequences were, by reason. `positions`: that were fed so far.
    """

    def __init__(
        self,
        session: Session,
        source: TextSource,
        *,
        prompts: Sequence[Prompt] | None = None,
        excluded: Sequence[Prompt] = (),
    ) -> None:
        """`prompts`: the user's; None: the model writes them. `excluded`: what no prompt may have in common with."""
        self._session, self._source = session, source
        self._prompts, self._excluded = prompts, excluded
        self.dropped: Counter[str] = Counter()
        self.positions = 0
        self._logits = np.empty((session.num_slots, session.contract.vocab_size), np.float32)

    @property
    def most_sequences(self) -> int | None:
        """How many there can be; None without end."""
        return None if self._prompts is None else ANSWERS_OF_A_PROMPT * len(self._prompts)

    def run(self, kept: Collection[int]) -> Iterator[GeneratedText | None]:
        """Sequences as they are done, but for the numbers that are `kept` already; None after every other pass.

        Requests about an answer that is kept are not made any more: a run that goes on has fewer of them.
        """
        numbers = self._numbers(kept)
        slots: list[GeneratedText | None] = [None] * self._session.num_slots
        while True:
            for slot, text in enumerate(slots):
                if text is None or text.is_done:
                    slots[slot] = self._about(text) or self._next(numbers)
            if not any(slots):
                return
            self._pass(slots)
            for text in slots:
                if text is not None and text.is_done:
                    if not text.dropped and self._is_excluded(text):
                        text.dropped = "a prompt of the evaluation"
                    if text.dropped:
                        self.dropped[text.dropped] += 1
                    else:
                        yield text
            yield None

    def _numbers(self, kept: Collection[int]) -> Iterator[int]:
        number = 0
        while self.most_sequences is None or number < self.most_sequences:
            if number not in kept:
                yield number
            number += 1

    def _about(self, done: GeneratedText | None) -> GeneratedText | None:
        """A sequence about what another one says, where there is to be one."""
        text = None if done is None else done.next_task()
        if text is not None and text.dropped:
            self.dropped[text.dropped] += 1
            return None
        return text

    def _next(self, numbers: Iterator[int]) -> GeneratedText | None:
        for number in numbers:
            if self._prompts is None:
                text = GeneratedText(self._source, number)
            else:
                turn, index = divmod(number, len(self._prompts))
                text = GeneratedText(self._source, number, self._prompts[index], greedy=turn == 0)
            if not text.is_done:
                return text
            self.dropped[text.dropped] += 1
        return None

    def _pass(self, slots: Sequence[GeneratedText | None]) -> None:
        """Feed every slot its next token, and as many a chunk of its prompt as the pass takes."""
        session, chunks = self._session, self._session.contract.prompt_chunks
        texts = [(slot, text) for slot, text in enumerate(slots) if text is not None]
        room = session.max_positions - len(texts)
        batch: list[Positions] = []
        fed: list[GeneratedText] = []
        for slot, text in texts:
            part = next(chunks(len(text.tokens), text.cached))
            width = part.stop - part.start
            if width - 1 > room:
                continue
            room -= width - 1
            tokens = np.asarray(text.tokens[part], np.int64)
            is_last = part.stop == len(text.tokens)
            batch.append(Positions(tokens=tokens, cache_length=part.start, num_logits=int(is_last), slot=slot))
            fed.append(text)
        wanted = sum(one.num_logits for one in batch)
        logits = self._logits[:wanted]
        likeliest = session.run_batch(batch, logits=logits) if wanted else session.run_batch(batch)
        states = session.hidden_states
        assert states is not None
        features = np.concatenate(states, axis=1)
        ids, log_probabilities = likely_tokens(logits)
        first = row = 0
        for one, text in zip(batch, fed, strict=True):
            end = first + len(one.tokens)
            if one.num_logits:
                likely = ids[row], log_probabilities[row]
                text.take(features[first:end], logits[row], int(likeliest[row]), likely)
                row += 1
            else:
                text.take(features[first:end], None, 0, None)
            first = end
        self.positions += first

    def _is_excluded(self, text: GeneratedText) -> bool:
        if text.prompt is not None:
            return False
        return overlaps(Prompt(messages=(Message(role="user", content=text.user_text),)), self._excluded)


def token_sampler() -> TokenSampler:
    """The compiled one where it runs; the reference draws the same tokens, slower."""
    try:
        return NativeSampler(open_library().path).prepare
    except QuasarError:
        return _reference


def _reference(filters: Filters, seed: int) -> Callable[[np.ndarray, int], int]:
    return lambda logits, position: sample_token(logits, filters, seed=seed, position=position)
