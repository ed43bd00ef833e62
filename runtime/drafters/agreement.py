"""Whether an engine may draft for another: one vocabulary, a cache that both may work on, and how often they agree."""

from pathlib import Path

from engines.directory import EngineDirectory
from engines.manifest import CACHE_TREATMENTS, Manifest
from engines.text import open_codec
from quasar.errors import GenerationError


def expected_agreement(target: Manifest, draft: Manifest) -> float | None:
    """How often the drafting engine's likeliest token was the float model's, where that is the verifier's model, too.

    The verifier is much nearer to the float model than an engine that drafts for it.
    """
    if target.hashes.get("checkpoint") != draft.hashes.get("checkpoint"):
        return None
    return float(draft.fidelity["continuation"]["top1_agreement"])


def check_vocabularies(target: EngineDirectory, draft: EngineDirectory) -> None:
    """Raise `GenerationError` with the first token id that does not stand for the same in both engines."""
    manifests = (target.manifest, draft.manifest)
    if manifests[0].files[manifests[0].text.tokenizer] == manifests[1].files[manifests[1].text.tokenizer]:
        return
    first, second = (_tokens_by_id(one) for one in (target, draft))
    for token in range(max(len(first), len(second))):
        here, there = (words[token] if token < len(words) else None for words in (first, second))
        if here != there:
            raise GenerationError(
                f"{draft.path} cannot draft for {target.path}: token {token} is {there!r} there and {here!r} here; "
                "engines of one vocabulary were expected"
            )


def _tokens_by_id(directory: EngineDirectory) -> list[str]:
    """Every token of the tokenizer; ids that only pad the model's vocabulary have none."""
    tokenizer = open_codec(directory.path, directory.manifest.text).tokenizer
    words = {token: word for word, token in tokenizer.get_vocab(with_added_tokens=True).items()}
    return [words.get(token, "") for token in range(max(words, default=-1) + 1)]


def check_shared_cache(target: Manifest, draft: Manifest, path: Path) -> None:
    """Raise `GenerationError` naming every reason why the rows of one are not those of the other."""
    reasons = []
    if target.hashes.get("checkpoint") != draft.hashes.get("checkpoint"):
        reasons.append("the checkpoint")
    elif target.skipped_layers:
        reasons.append(f"the layers (the verifier lacks {target.skipped_layers}; it must have all)")
    for name in ("num_kv_heads", "head_size", "capacity", "kv_dtype"):
        here, there = getattr(target.contract, name), getattr(draft.contract, name)
        if here != there:
            reasons.append(f"{name} ({here} here, {there} there)")
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
