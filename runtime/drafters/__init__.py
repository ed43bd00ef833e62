"""Drafters: whatever proposes the next tokens. Any drafter is lossless; a good one is fast."""

from runtime.drafters.base import Draft, Drafter
from runtime.drafters.prompt_lookup import PromptLookup

__all__ = ["Draft", "Drafter", "PromptLookup"]
