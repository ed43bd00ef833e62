"""What is public is pinned: a change here is a change for users."""

import inspect

import engines
import quasar
import quasar.checkpoints
import quasar.errors
import quasar.text
import runtime


def test_public_names():
    assert runtime.__all__ == [
        *("Draft", "Drafter", "Engine", "Event", "Generation", "PromptLookup", "Stats", "load", "share_threads"),
    ]
    assert engines.__all__ == ["Contract", "LoadedEngine", "Manifest", "load_engine"]
    assert quasar.checkpoints.__all__ == ["Checkpoint", "DecoderSpec", "Rope", "open_checkpoint"]
    assert quasar.text.__all__ == ["ChatTemplate", "Message", "Prompt", "TextCodec", "TextStream", "read_prompts"]
    assert quasar.__version__ == "0.1.0"


def test_generation_options():
    options = ["prompt", "max_new_tokens", "drafter", "num_draft_tokens", "chat_template", "ignore_eos"]
    for method in (runtime.Engine.generate, runtime.Engine.stream):
        parameters = list(inspect.signature(method).parameters.values())[1:]
        assert [parameter.name for parameter in parameters] == options
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    options = ["path", "backend", "provider", "threads", "kernels", "rebuild"]
    assert list(inspect.signature(runtime.load).parameters) == options


def test_the_exception_tree_is_the_drawn_one():
    drawn = [line.strip("│├└─ ").split()[0] for line in quasar.errors.__doc__.splitlines() if "Error" in line][1:]
    defined = [
        name
        for name, value in vars(quasar.errors).items()
        if isinstance(value, type) and issubclass(value, quasar.errors.QuasarError)
    ]
    assert drawn == defined
