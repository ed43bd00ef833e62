"""Drafters: whatever proposes the next tokens. Any drafter is lossless; a good one is fast."""

from runtime.drafters.base import Draft, Drafter
from runtime.drafters.corpus import Corpus
from runtime.drafters.prompt_lookup import PromptLookup
from runtime.drafters.recycling import Recycling
from runtime.drafters.suffix import Suffix

__all__ = ["Corpus", "Draft", "Drafter", "PromptLookup", "Recycling", "Suffix"]
