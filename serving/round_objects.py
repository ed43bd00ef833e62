"""Rounds as answers tell them, where `return_rounds` asks: an extension of ours to OpenAI's objects."""

from typing import Any

from quasar.text import TextCodec
from runtime import Round


class RoundObjects:
    """The objects of one answer's rounds, in order.

    Args:
        continues: the answer goes on from text, so that a leading space is its own.
    """

    def __init__(self, codec: TextCodec, *, continues: bool) -> None:
        self._codec = codec
        self._stream = codec.stream(continues=continues)

    def of(self, made: Round) -> dict[str, Any]:
        """The object of the next round.

        `texts`: what each token adds to the answer; a character that several tokens spell stands at its last one.
        """
        accepted = accepted_drafts(made)
        texts = [self._stream.push([token]) for token in made.tokens]
        if texts and made.finish_reason is not None:
            texts[-1] += self._stream.finish()
        return {
            "token_ids": made.tokens,
            "texts": texts,
            "accepted": made.accepted,
            "drafts": [
                {"token_id": token, "text": self._spelled(token), "parent": parent, "accepted": place in accepted}
                for place, (token, parent) in enumerate(zip(made.draft_tokens, _parents(made), strict=True))
            ],
            "drafter": made.drafter or "none",
            "width": made.width,
            "seconds": round(made.seconds, 6),
            "draft_seconds": round(made.draft_seconds, 6),
        }

    def _spelled(self, token: int) -> str:
        """A token by itself; a special one, which is no part of any text, by its name."""
        value = self._codec.detokenizer.token_bytes(token) or (self._codec.tokenizer.id_to_token(token) or "").encode()
        return value.decode(errors="replace")


def accepted_drafts(made: Round) -> frozenset[int]:
    """Places in the draft of those that were accepted: the path of the round's first `accepted` tokens."""
    children = {
        (parent, token): place
        for place, (parent, token) in enumerate(zip(_parents(made), made.draft_tokens, strict=True))
    }
    place, found = -1, set()
    for token in made.tokens[: made.accepted]:
        place = children[place, token]
        found.add(place)
    return frozenset(found)


def _parents(made: Round) -> tuple[int, ...]:
    """The draft that each draft follows; -1: the token before the round."""
    return tuple(range(-1, len(made.draft_tokens) - 1)) if made.draft_parents is None else made.draft_parents
