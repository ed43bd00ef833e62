"""Whether an engine may draft for another: one vocabulary, a cache that both may work on, and how often they agree."""

from pathlib import Path

from engines.directory import EngineDirectory
from engines.manifest import CACHE_SCALES, CACHE_TREATMENTS, Manifest
from engines.text import open_codec
from quasar.errors import GenerationError


def expected_agreement(target: Manifest, draft: Manifest) -> float | None:
    """How often the drafting engine's likeliest token was the float model's, where that is the verifier's model, too.

    The verifier is much nearer to the float model than an engine that drafts for it.
    """
    if target.hashes.get("checkpoint") != draft.hashes.get("checkpoint"):
        return None
    return float(draft.fidelity["continuation"]["top1_agreement"])


def check_vocabularies(target: EngineDirectory, draft: EngineDirectory) -> frozenset[int]:
    """The ids that do not stand for the same in both engines, of which a draft may have none.

    Those may be special tokens that end nothing, which a sequence has only if somebody puts them there: reserved ones,
    say, whose names differ. Raises `GenerationError` with the first other token that differs.
    """
    manifests = (target.manifest, draft.manifest)
    if manifests[0].files[manifests[0].text.tokenizer] == manifests[1].files[manifests[1].text.tokenizer]:
        return frozenset()
    (first, first_added), (second, second_added) = (_tokens_by_id(one) for one in (target, draft))
    ends = {token for manifest in manifests for token in manifest.text.eos_token_ids}
    differing = [token for token in sorted(first.keys() | second.keys()) if first.get(token) != second.get(token)]
    for token in differing:
        # An id that one of them lacks needs only be an added one of the other.
        ordinary = (token in first and token not in first_added) or (token in second and token not in second_added)
        if ordinary or token in ends:
            raise GenerationError(
                f"{draft.path} cannot draft for {target.path}: token {token} is {second.get(token)!r} there and "
                f"{first.get(token)!r} here; engines of one vocabulary were expected"
            )
    return frozenset(differing)


def _tokens_by_id(directory: EngineDirectory) -> tuple[dict[int, str], frozenset[int]]:
    """Every token of the tokenizer by its id, and the ids of added ones; ids that only pad the model's have none."""
    tokenizer = open_codec(directory.path, directory.manifest.text).tokenizer
    words = {token: word for word, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    return words, frozenset(tokenizer.get_added_tokens_decoder())


def check_shared_cache(target: Manifest, draft: Manifest, path: Path) -> None:
    """Raise `GenerationError` naming every reason why the cached positions of one are not those of the other."""
    reasons = []
    if target.hashes.get("checkpoint") != draft.hashes.get("checkpoint"):
        reasons.append("the checkpoint")
    elif target.skipped_layers:
        reasons.append(f"the layers (the verifier lacks {target.skipped_layers}; it must have all)")
    for name in ("num_kv_heads", "head_size", "capacity", "kv_dtype"):
        here, there = getattr(target.contract, name), getattr(draft.contract, name)
        if here != there:
            reasons.append(f"{name} ({here} here, {there} there)")
    if target.hashes.get(CACHE_SCALES) != draft.hashes.get(CACHE_SCALES):
        reasons.append("the scales of the cache (of INT8 each engine has its own: there, 'self' alone shares one)")
    for name, what in CACHE_TREATMENTS.items():
        hashes = (target.hashes.get(name), draft.hashes.get(name))
        if None in hashes:
            reasons.append(f"{what} (an engine of an earlier version does not tell: build it again)")
        elif hashes[0] != hashes[1]:
            reasons.append(what)
    if reasons:
        raise GenerationError(
            f"{path} cannot draft on the verifier's cache; what differs: {', '.join(reasons)}. With a cache of its own "
            f"it can: model:{path}"
        )
