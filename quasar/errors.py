"""The exception tree. A user's mistake is a `QuasarError`: one line, no traceback, exit code 2.

    QuasarError
    ├── CheckpointError        the source model is missing, damaged or of a kind that is not supported
    ├── PromptError            a prompt file, a chat template or a prompt cannot be used
    ├── BuildError             a build cannot go on: output in the way, a numeric check failed
    ├── EngineError            an engine directory cannot be loaded
    │   ├── DamagedEngineError     files are missing or are not the ones that the manifest names
    │   └── NewerEngineError       written by a later version of this project
    └── GenerationError        a request that this engine cannot honour
        ├── ContextLimitError      prompt (and new tokens) do not fit the KV cache
        ├── GrammarError           a response_format that is none, cannot be compiled, or goes beyond its limits
        ├── FaultError             not the request's: logits that are no numbers, a drafter's draft that is none
        └── QueueFullError         as many requests wait as the engine lets wait: try again later

Every message says what came, what was expected and what to do, in one line.
"""


class QuasarError(Exception):
    """Base of every error that a user can cause and mend."""


class CheckpointError(QuasarError):
    """The source model is missing, damaged, or of a kind that is not supported."""


class PromptError(QuasarError):
    """A prompt file, a chat template or a prompt cannot be used."""


class BuildError(QuasarError):
    """A build cannot go on."""


class EngineError(QuasarError):
    """An engine directory cannot be loaded."""


class DamagedEngineError(EngineError):
    """Files of an engine directory are missing, or are not the ones that its manifest names."""


class NewerEngineError(EngineError):
    """The engine directory was written by a later version of this project."""


class GenerationError(QuasarError):
    """A request that this engine cannot honour."""


class ContextLimitError(GenerationError):
    """The prompt does not fit the engine's KV cache."""


class GrammarError(GenerationError):
    """A `response_format` that is none, cannot be compiled, or goes beyond its limits in mid-answer."""


class FaultError(GenerationError):
    """The engine, or a drafter, failed at a request that may be as it should be."""


class QueueFullError(GenerationError):
    """As many requests wait as the engine lets wait (`load(queue_limit=…)`)."""
