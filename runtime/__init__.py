"""What *happens* at run time: load an engine, draft and verify, generate and stream. No torch, transformers or onnx.

import runtime

engine = runtime.load("build/smollm2-w8a8")
print(engine.generate("What is the capital of France?", max_new_tokens=32).text)
"""

from engines.onnxruntime.threads import share_threads
from runtime.api import Engine, Memory, load
from runtime.conversation import Conversation
from runtime.drafters import Corpus, Draft, Drafter, PromptLookup, Recycling, Suffix
from runtime.events import Event, Generation
from runtime.generation_options import GenerationOptions
from runtime.grammar.formats import ResponseFormat
from runtime.loop import Round
from runtime.metrics import Metrics
from runtime.sampling.logprobs import TokenLogprob
from runtime.stats import Stats
from runtime.traces import Recorder

__all__ = [
    "Conversation",
    "Corpus",
    "Draft",
    "Drafter",
    "Engine",
    "Event",
    "Generation",
    "GenerationOptions",
    "Memory",
    "Metrics",
    "PromptLookup",
    "Recorder",
    "Recycling",
    "ResponseFormat",
    "Round",
    "Stats",
    "Suffix",
    "TokenLogprob",
    "load",
    "share_threads",
]
