"""One sequence while it is generated: the words of a user, an answer, and what the verifier had for each position."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from calibration.draft_heads.chat_frame import ChatFrame
from calibration.draft_heads.data_folder import ANSWER, GIVEN, USER, GeneratedSequence
from calibration.draft_heads.likely_tokens import KEPT_TOKENS, Float32
from calibration.draft_heads.loops import loop_start
from calibration.draft_heads.passage_tasks import PassageTask, draw_passage_task
from plugins.sample_token import Filters
from quasar.text import Message, Prompt, TextCodec

# One generation's draws: a function of logits float32 [V] and position (plugins.sample_token).
Draw = Callable[[Float32, int], int]
TokenSampler = Callable[[Filters, int], Draw]

# Of what is generated: a folder that keeps text of another version is not added to.
TEXT_VERSION = 2
# What makes the model write more than one kind of request: the first words of one sequence in two.
OPENINGS = (
    *("Write", "Explain", "Summarize the following text:", "Translate", "What is", "How do I", "Solve:", "Why"),
    *("Give me", "Write a Python function", "Rewrite", "Who", "List", "Create", "Calculate", "Describe", "Compare"),
    *("Answer the question based on the following passage.", "Fix this code:", "Can you"),
)
_FLOAT16_MOST = 65504.0
# How often a text is looked at for loops and endings, in tokens.
_LOOK = 8
# How often an answer becomes the passage of another request, whose answer may become one, too.
_SHARE_OF_PASSAGES = 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class TextLimits:
    """Tokens: at most of what is given, of a user's words and of an answer; at least of an answer that is kept.

    `passage`: of an answer that another request is about, at least and at most.
    """

    given: int = 768
    user: int = 160
    answer: int = 320
    least_answer: int = 12
    passage: tuple[int, int] = (40, 224)

    @property
    def few_words(self) -> int:
        """Of a user's words that are not a whole request: a question about a passage, the beginning of a plain text."""
        return max(4, self.user // 4)

    def within(self, max_length: int) -> "TextLimits":
        """Those that fit a context."""
        answer = min(self.answer, max_length // 2)
        user = min(self.user, max_length // 8)
        return TextLimits(
            given=min(self.given, max_length - answer - user),
            user=user,
            answer=answer,
            least_answer=min(self.least_answer, answer),
            passage=(min(self.passage[0], max_length // 16), min(self.passage[1], max_length // 4)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSource:
    """What all sequences of a run share.

    `stops`: tokens that end a turn. `specials`: tokens that no user writes.
    """

    codec: TextCodec
    frame: ChatFrame
    limits: TextLimits
    stops: frozenset[int]
    specials: frozenset[int]
    sampler: TokenSampler
    num_features: int
    vocab_size: int
    seed: int


class GeneratedText:
    """A sequence that grows: `pending` tokens are fed next, `take` hears what came of them.

    `number`, `turn` and the seed decide everything about it. `prompt`: a user's; None: the model writes one, or what is
    left of `task`'s. `greedy`: the answer is of the likeliest tokens; None: of one sequence in two. `turn`: how many
    requests about passages led to it.
    """

    def __init__(
        self,
        source: TextSource,
        number: int,
        prompt: Prompt | None = None,
        *,
        greedy: bool | None = None,
        task: PassageTask | None = None,
        turn: int = 0,
    ) -> None:
        self.number, self.turn, self.prompt = number, turn, prompt
        self._source = source
        self._random = np.random.default_rng([source.seed, number, turn] if turn else [source.seed, number])
        likeliest = bool(self._random.random() < 0.5)
        self.greedy = likeliest if greedy is None else greedy
        self.cached = 0
        self.is_done = False
        # Why nothing is kept of it; "" where something is.
        self.dropped = ""
        limits = source.limits
        size = limits.given + limits.user + limits.answer + 8
        self._features = np.zeros((size, source.num_features), np.float16)
        self._likely = np.zeros((size, KEPT_TOKENS), np.int32)
        self._log_probabilities = np.full((size, KEPT_TOKENS), -np.inf, np.float16)
        # What the user says: a user's own words, the task's, or what the model wrote.
        self.user_text = "" if prompt is None else prompt.text
        self.tokens: list[int] = []
        self._kinds: list[int] = []
        self._draw: Draw | None = None
        if prompt is not None:
            self._begin_answer(source.codec.encode_chat(prompt.messages))
        elif task is None:
            self._begin_user()
        else:
            self._begin_task(task)

    @property
    def pending(self) -> list[int]:
        """Tokens that the verifier has not seen."""
        return self.tokens[self.cached :]

    def take(
        self,
        features: Float32,
        logits: Float32 | None,
        likeliest: int,
        likely: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        """What a pass had for the next T pending tokens.

        Args:
            features: float32 [T, F].
            logits: float32 [V] after the last of them, where that is the last one that pends.
            likeliest: the target's token there.
            likely: `likely_tokens` of those logits, a row.
        """
        first, self.cached = self.cached, self.cached + len(features)
        self._features[first : self.cached] = np.clip(features, -_FLOAT16_MOST, _FLOAT16_MOST)
        if logits is None or likely is None:
            return
        self._likely[self.cached - 1], self._log_probabilities[self.cached - 1] = likely
        token = likeliest if self._draw is None else self._draw(logits, self.cached)
        if self._kind == USER:
            self._take_user(token)
        else:
            self._take_answer(token)

    def sequence(self) -> GeneratedSequence:
        """What is kept, once it is done."""
        end = len(self.tokens)
        return GeneratedSequence(
            number=self.number,
            greedy=self.greedy,
            tokens=np.asarray(self.tokens, np.int32),
            kinds=np.asarray(self._kinds, np.int8),
            features=self._features[:end],
            likely=self._likely[:end],
            log_probabilities=self._log_probabilities[:end],
        )

    def next_task(self) -> "GeneratedText | None":
        """A sequence about this one's answer, once it is done; None where there is none."""
        source = self._source
        if self.prompt is not None or self.dropped or not source.frame.is_chat:
            return None
        if self._random.random() >= _SHARE_OF_PASSAGES:
            return None
        least, most = source.limits.passage
        answer = [token for token in self.tokens[self._answer_start :] if token not in source.specials]
        passage = source.codec.decode(answer[: int(self._random.integers(least, most + 1))]).strip()
        if len(answer) < least or not passage:
            return None
        task = draw_passage_task(passage, self._random)
        return GeneratedText(source, self.number, task=task, turn=self.turn + 1)

    def _begin_user(self) -> None:
        source = self._source
        opening = list(source.frame.opening)
        if not opening:
            # Some base models have no token that begins a text.
            opening = [int(self._random.integers(source.vocab_size))]
        self._user_start = len(source.frame.opening)
        # Such a first word is the text's own.
        begun = len(opening) - self._user_start
        if source.frame.is_chat and self._random.random() < 0.5:
            words = OPENINGS[int(self._random.integers(len(OPENINGS)))]
            opening += source.codec.encode_continuation(words)
        limits = source.limits
        self._write_user(opening, begun + (limits.user if source.frame.is_chat else limits.few_words))

    def _begin_task(self, task: PassageTask) -> None:
        source = self._source
        self._user_start = len(source.frame.opening)
        if not task.is_open:
            self._ask(task.words)
            return
        given = [*source.frame.opening, *source.codec.encode_continuation(task.words)]
        if len(given) > source.limits.given:
            self._drop(f"a passage of more than {source.limits.given} tokens")
            return
        self._write_user(given, len(given) - self._user_start + source.limits.few_words)

    def _write_user(self, given: list[int], most: int) -> None:
        """Let the model go on with a user's words from `given`, which begin them, to `most` tokens of them."""
        self.tokens = given
        self._given_text = self._source.codec.decode(given[self._user_start :])
        self._kinds = [GIVEN] * len(given)
        self._kind = USER
        self._user_tokens = most
        filters = Filters(temperature=0.8 + 0.2 * float(self._random.random()), top_p=0.95)
        self._draw = self._source.sampler(filters, self._draw_seed())

    def _take_user(self, token: int) -> None:
        source = self._source
        written = len(self.tokens) - self._user_start
        ended = token in source.stops or token in source.specials
        if not ended:
            self.tokens.append(token)
            self._kinds.append(USER)
            if written % _LOOK == 0:
                ended = (
                    source.frame.has_ended(self._own_words()) or loop_start(self.tokens[self._user_start :]) is not None
                )
            ended = ended or written + 1 >= self._user_tokens
        if not ended:
            return
        own = source.frame.before_ending(self._own_words())
        text = (self._given_text + own).strip()
        # A request about a passage lacks its question without words of the model's own.
        if not (own if self.turn else text).strip():
            self._drop("an empty prompt")
        elif loop_start(self.tokens[self._user_start :]) is not None:
            self._drop("a prompt that goes round in circles")
        else:
            self._ask(text)

    def _own_words(self) -> str:
        """What the model wrote of a user's words, after those that it was given: a passage may have what ends them."""
        return self._source.codec.decode(self.tokens[self._user_start :])[len(self._given_text) :]

    def _ask(self, words: str) -> None:
        """Begin the answer to what the user says."""
        source = self._source
        self.user_text = words
        if source.frame.is_chat:
            # As a server would encode it.
            self._begin_answer(source.codec.encode_chat([Message(role="user", content=words)]))
        else:
            self._begin_answer(self.tokens)

    def _begin_answer(self, given: Sequence[int]) -> None:
        """What is in the cache already, as far as it is the same, is not fed again."""
        limits = self._source.limits
        if len(given) > limits.given + limits.user:
            self._drop(f"a prompt of more than {limits.given + limits.user} tokens")
            return
        same = 0
        while same < min(self.cached, len(given) - 1) and self.tokens[same] == given[same]:
            same += 1
        kinds = self._kinds[: same + 1]
        self._kinds = [*kinds, *[GIVEN] * (len(given) - len(kinds))][: len(given)]
        self.cached, self.tokens = same, list(given)
        # What was kept of other tokens there.
        self._log_probabilities[same:] = -np.inf
        self._answer_start = len(given)
        self._kind = ANSWER
        filters = Filters(temperature=0.7)
        self._draw = None if self.greedy else self._source.sampler(filters, self._draw_seed())

    def _take_answer(self, token: int) -> None:
        limits = self._source.limits
        written = len(self.tokens) - self._answer_start
        # The end of an answer is drafted like any other token.
        self.tokens.append(token)
        self._kinds.append(ANSWER)
        ended = token in self._source.stops or written + 1 >= limits.answer
        loop = None
        if ended or written % _LOOK == 0:
            loop = loop_start(self.tokens[self._answer_start :])
        if not ended and loop is None:
            return
        end = len(self.tokens) if loop is None else self._answer_start + loop
        # The last token was not fed: it has no features, nor a token after it.
        end = min(end, self.cached + 1)
        if end - self._answer_start < limits.least_answer:
            self._drop("an answer of a few tokens, or one that goes round in circles")
            return
        del self.tokens[end:], self._kinds[end:]
        self.is_done = True

    def _drop(self, reason: str) -> None:
        self.is_done, self.dropped = True, reason

    def _draw_seed(self) -> int:
        return int(self._random.integers(1 << 62))
