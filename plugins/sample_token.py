"""sample_token: one token drawn from a row of logits, with randomness that depends on (seed, position, token) alone.

Gumbel-max (Gumbel 1954; Maddison et al., A* sampling, 2014): the token with the largest logit / temperature + noise
has the softmax's distribution. The noise of a token at a position is the same whoever draws, so two models that share a
seed agree as often as their distributions allow: at least (1 - TV) / (1 + TV) (Daliri, Musco, Suresh 2024).

Noise is -log(E) with E independent and exponential. Sixteen tokens form a block, and their E are drawn from the least
one on: it is exponential with rate 16, belongs to each of them with the same chance, and the others exceed it by
exponentials with rate 1. So the noise of a block is bounded by one word, and few blocks need the others.

All bits are Philox4x64-10 (Salmon et al. 2011) under the key (seed, 1). Token i belongs to block 16 (i // 256) + i % 16
as its member i // 16 % 16: blocks are the columns of 16 vectors of 16 logits. Word b of the stream at counter
(0, position, 0, 0) is for block b: its lower 4 bits say which member has the least E, which is -log(u) / 16 with
u = (upper 60 bits + 1/2) / 2^60. Word 16 b + k of the stream at (0, position, 1, 0) is for member k, which exceeds that
by -log(u) with u = (word + 1/2) / 2^64.

Filters are those of transformers, in its order: temperature, top_k (ties with the k-th stay), top_p on what top_k left,
min_p relative to the largest.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quasar.errors import FaultError, GenerationError

# Recorded in an engine's manifest: another method, or another version of this one, draws other tokens.
SAMPLER = "gumbel-max philox4x64-10 v1"

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]

LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-6, 1e6

_KEY = 1
_BLOCKS, _MEMBERS = 0, 1
_BLOCK = 16
_COLUMNS = _BLOCK * _BLOCK
_SLACK = np.float32(1e-3)
# How far below the largest scaled logit the tokens of a nucleus are looked for at first.
_REACH = 8.0
# Nearer than this to the edge of top_p, relative to it, sums of float32 are not trusted.
_EDGE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Filters:
    """What is left to draw from; `top_k` 0, `top_p` 1 and `min_p` 0 keep everything.

    Raises `GenerationError` for a `temperature` outside 1e-6 to 1e6, where scaled logits would leave their type.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Check the temperature."""
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            raise GenerationError(f"temperature is {self.temperature}; 1e-6 to 1e6 was expected")


def sample_token(logits: Float32, filters: Filters, *, seed: int, position: int) -> int:
    """The token drawn for `position` from logits float32 [V]; -inf excludes a token.

    Raises:
        GenerationError: a logit is NaN or infinite, or every token is excluded.
    """
    largest = check_largest(float(logits.max()))
    within = _kth_largest(logits, filters.top_k)
    floor = max(within, _min_p_floor(largest, filters))
    candidates: Int64 = (
        np.flatnonzero(logits.astype(np.float64) >= floor) if floor > -np.inf else np.arange(len(logits))
    )
    if filters.top_p < 1:
        nucleus = _nucleus(logits, largest, within, filters)
        candidates = np.sort(nucleus[logits[nucleus].astype(np.float64) >= floor])
    return _winner(logits, largest, filters.temperature, candidates, seed, position)


def distribution(logits: Float32, filters: Filters) -> Float64:
    """What `sample_token` draws from, float64 [V]: the filtered softmax, by its definition."""
    largest = check_largest(float(logits.max()))
    wide = logits.astype(np.float64)
    mass = np.exp((wide - largest) / filters.temperature)
    mass[wide < _kth_largest(logits, filters.top_k)] = 0
    if filters.top_p < 1:
        order = np.argsort(-wide, kind="stable")
        ahead = np.cumsum(mass[order]) - mass[order]
        mass[order[ahead >= filters.top_p * mass.sum()]] = 0
    mass[wide < _min_p_floor(largest, filters)] = 0
    result: Float64 = mass / mass.sum()
    return result


def gumbel_noise(tokens: Int64, *, seed: int, position: int) -> Float64:
    """The noise of tokens int64 [n] at a position: float64 [n]."""
    blocks, members = _places(tokens)
    noise = np.empty(len(tokens))
    if len(tokens):
        words = _words(_BLOCKS, 0, int(blocks.max()) + 1, seed, position)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            noise[here] = -np.log(_exponentials(block, words[block], seed, position)[members[here]])
    return noise


def check_largest(largest: float) -> float:
    """The largest of the logits that a token is chosen by, if one can be.

    Raises `GenerationError` if every token is excluded, and `FaultError` if the logits are no numbers.
    """
    if largest == -np.inf:
        raise GenerationError("every token is excluded: a bias, a hook or a minimum leaves nothing to choose from")
    if not np.isfinite(largest):
        raise FaultError("the logits are not numbers: NaN or infinity came from the engine or a hook")
    return largest


def _kth_largest(logits: Float32, top_k: int) -> float:
    if not 0 < top_k < len(logits):
        return -np.inf
    return float(np.partition(logits, len(logits) - top_k)[len(logits) - top_k])


def _min_p_floor(largest: float, filters: Filters) -> float:
    return largest + filters.temperature * float(np.log(filters.min_p)) if filters.min_p > 0 else -np.inf


def _nucleus(logits: Float32, largest: float, within: float, filters: Filters) -> Int64:
    """The tokens that top_p keeps of those of at least `within`; only the likely ones are sorted."""
    scaled = (logits - np.float32(largest)) * np.float32(1 / filters.temperature)
    mass = np.exp(scaled)
    mass[logits < within] = 0
    needed = filters.top_p * float(mass.sum(dtype=np.float64))
    reach = _REACH
    while True:
        likely = np.flatnonzero(scaled >= -reach)
        if len(likely) == len(logits) or mass[likely].sum(dtype=np.float64) >= needed:
            break
        reach *= 2
    # Values alone are sorted, ten times as fast as their order; ids decide between those that equal the last one.
    values = np.sort(logits[likely])[::-1]
    share = np.exp((values - np.float32(largest)) * np.float32(1 / filters.temperature)).astype(np.float64)
    share[values < within] = 0
    ahead = np.cumsum(share) - share
    if np.abs(ahead - needed).min() < _EDGE * needed:
        # Too near for float32 to tell: every implementation decides such cases in float64.
        whole = np.exp((logits.astype(np.float64) - largest) / filters.temperature)
        whole[logits < within] = 0
        share = np.exp((values.astype(np.float64) - largest) / filters.temperature)
        share[values < within] = 0
        ahead, needed = np.cumsum(share) - share, filters.top_p * float(whole.sum())
    count = max(1, int(np.count_nonzero(ahead < needed)))
    last = values[count - 1]
    more, ties = likely[logits[likely] > last], likely[logits[likely] == last]
    kept: Int64 = np.concatenate([more, ties[: count - len(more)]])
    return kept


def _winner(
    logits: Float32, largest: float, temperature: float, candidates: Int64 | None, seed: int, position: int
) -> int:
    """The candidate (None: any token) with the largest scaled logit + noise; the lowest id of a tie."""
    rough = np.full(-(-len(logits) // _COLUMNS) * _COLUMNS, -np.inf, np.float32)
    chosen = slice(len(logits)) if candidates is None else candidates
    rough[chosen] = (logits[chosen] - np.float32(largest)) * np.float32(1 / temperature)
    columns = rough.reshape(-1, _BLOCK, _BLOCK)
    words = _words(_BLOCKS, 0, len(rough) // _BLOCK, seed, position)
    least = _exponential(words >> np.uint64(4), 60) / _BLOCK
    noise = -np.log(least).astype(np.float32).reshape(-1, _BLOCK)
    # The member with the least exponential has that noise, the others less: few blocks have to be looked into.
    first = (words % np.uint64(_BLOCK)).astype(np.int64).reshape(-1, 1, _BLOCK)
    reached = (np.take_along_axis(columns, first, axis=1)[:, 0] + noise).max()
    # The slack covers float32's rounding of whatever can still win.
    largest_of_block = columns.max(axis=1)
    near = np.flatnonzero((largest_of_block + noise >= reached - _SLACK) & (largest_of_block > -np.inf))
    winner, best = -1, -np.inf
    for block in near.tolist():
        members = np.flatnonzero(columns[block // _BLOCK, :, block % _BLOCK] > -np.inf)
        tokens = block // _BLOCK * _COLUMNS + block % _BLOCK + _BLOCK * members
        exponentials = _exponentials(block, words[block], seed, position)[members]
        totals = (logits[tokens].astype(np.float64) - largest) / temperature - np.log(exponentials)
        place = int(np.argmax(totals))
        if totals[place] > best or (totals[place] == best and tokens[place] < winner):
            winner, best = int(tokens[place]), float(totals[place])
    return winner


def _places(tokens: Int64) -> tuple[Int64, Int64]:
    """Block and member of tokens."""
    return tokens // _COLUMNS * _BLOCK + tokens % _BLOCK, tokens // _BLOCK % _BLOCK


def _words(stream: int, first: int, count: int, seed: int, position: int) -> NDArray[np.uint64]:
    """`count` words of a stream from word 4 `first` on."""
    generator = np.random.Philox(
        key=np.array([seed, _KEY], np.uint64), counter=np.array([first, position, stream, 0], np.uint64)
    )
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


def _exponentials(block: int, word: np.uint64, seed: int, position: int) -> Float64:
    """E of the members of a block: float64 [16]."""
    least = _exponential(np.array([word >> np.uint64(4)]), 60)[0] / _BLOCK
    more = _exponential(_words(_MEMBERS, block * _BLOCK // 4, _BLOCK, seed, position), 64)
    more[int(word) % _BLOCK] = 0
    members: Float64 = least + more
    return members


def _exponential(bits: NDArray[np.uint64], width: int) -> Float64:
    """-log(u), u = (bits + 1/2) / 2^width."""
    # Near 1 a double has no room for u; 1 - u is as exact as u is near 0.
    upper = bits >= np.uint64(1 << (width - 1))
    unit = 2.0**-width
    u = np.where(upper, 0.5, (bits.astype(np.float64) + 0.5) * unit)
    rest = np.where(upper, ((np.uint64((1 << width) - 1) - bits).astype(np.float64) + 0.5) * unit, 0.5)
    result: Float64 = np.where(upper, -np.log1p(-rest), -np.log(u))
    return result
