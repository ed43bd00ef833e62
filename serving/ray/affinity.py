"""Which replica a request goes to: the one that has computed how its prompt begins, unless it has too much to do."""

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

# Characters of a prompt that say how it begins, and tokens of one that is token ids.
_CHARACTERS, _TOKENS = 2048, 512
# A replica whose slots are taken has too much to do when it has so many times what all have in the mean.
_TOO_MANY_TIMES = 1.25


def beginning_of(body: Any, authorization: str, *, shared: bool) -> str:
    """A name for how a request's prompt begins; "" where no replica would serve it better than another.

    Requests with one name share computed positions: they came with the same key, name the same cache (`cache_salt`,
    `prompt_cache_key` or `user`), and begin alike. Of a chat that is everything up to the first message of the user, so
    that the turns of a conversation have one name; of both, so many characters at most.

    Args:
        body: the request's JSON value, not checked yet.
        authorization: the header.
        shared: whether requests that name no cache share positions, too.
    """
    if not isinstance(body, dict):
        return ""
    salt = next((body[name] for name in ("cache_salt", "prompt_cache_key", "user") if body.get(name)), None)
    beginning = _messages(body["messages"]) if "messages" in body else _prompt(body.get("prompt"))
    if not beginning or (salt is None and not shared):
        return ""
    named = json.dumps([authorization, str(salt or "")[:512], beginning])
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def preferred(beginning: str, loads: Mapping[str, int], *, slots: int, rng: random.Random) -> list[list[str]]:
    """Replicas in groups, best first; of a group, the one with the least to do is to be taken.

    Each beginning has an order of replicas of its own (rendezvous hashing), the same wherever it is asked for and
    without anything remembered; a replica that comes or goes moves no beginnings but its own. The first of the order
    that has not too much to do is taken: one with a free slot has not, nor one that has not much more than the others.
    Without a beginning, the better of two by chance.

    Args:
        beginning: as `beginning_of` names it.
        loads: replica → requests that it has.
        slots: sequences that share a replica's passes.
    """
    replicas = sorted(loads)
    if not beginning:
        two = rng.sample(replicas, min(2, len(replicas)))
        return [two, [one for one in replicas if one not in two]]
    order = sorted(replicas, key=lambda one: _weight(beginning, one))
    most = max(slots, _TOO_MANY_TIMES * (sum(loads.values()) + 1) / max(len(loads), 1))
    free = [one for one in order if loads[one] < most]
    return [[one] for one in (*free, *(one for one in order if one not in free))]


def _weight(beginning: str, replica: str) -> bytes:
    return hashlib.blake2b(f"{beginning} {replica}".encode(), digest_size=8).digest()


def _messages(value: Any) -> str:
    """Roles and texts up to the first message of the user."""
    found = ""
    for message in value if isinstance(value, list) else ():
        if not isinstance(message, dict) or len(found) >= _CHARACTERS:
            break
        found += f"{message.get('role')}\n{_text(message.get('content'))}\n"
        if message.get("role") == "user":
            break
    return found[:_CHARACTERS]


def _text(content: Any) -> str:
    if isinstance(content, list):
        parts: Sequence[Any] = content
        return "".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))
    return content if isinstance(content, str) else ""


def _prompt(value: Any) -> str:
    """The first prompt of a completion."""
    if isinstance(value, list) and value and not isinstance(value[0], int):
        value = value[0]
    if isinstance(value, list):
        return " ".join(str(one) for one in value[:_TOKENS])
    return value[:_CHARACTERS] if isinstance(value, str) else ""
