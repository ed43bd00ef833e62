"""What is public is pinned: a change here is a change for users."""

import inspect

import engines
import quasar
import quasar.checkpoints
import quasar.errors
import quasar.text
import runtime
from runtime.generation_options import OPTIONS
from runtime.option_keywords import OptionsDict


def test_public_names():
    assert runtime.__all__ == [
        *("Conversation", "Corpus", "Draft", "Drafter", "Engine", "Event", "Generation", "GenerationOptions"),
        *(
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
        ),
        "share_threads",
    ]
    assert engines.__all__ == [
        *(
            "Contract",
            "CudaOptions",
            "LoadedEngine",
            "Manifest",
            "OnnxRuntimeOptions",
            "TensorRtOptions",
            "load_engine",
        ),
    ]
    assert quasar.checkpoints.__all__ == ["Checkpoint", "DecoderSpec", "Rope", "open_checkpoint"]
    assert quasar.text.__all__ == [
        *("ChatOptions", "ChatTemplate", "Detokenizer", "Message", "Prompt", "TextCodec", "TextStream", "read_prompts"),
    ]
    assert quasar.__version__ == "0.1.0"


def test_generation_options():
    options = [
        *("max_new_tokens", "min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *(
            "presence_penalty",
            "frequency_penalty",
            "logit_bias",
            "logits_processor",
            "response_format",
            "seed",
            "stop",
            "stop_token_ids",
        ),
        *("ignore_eos", "logprobs", "deadline", "cancel", "drafter", "prediction", "num_draft_tokens"),
        *("chat_template", "tools"),
        *("chat_template_kwargs", "continue_final_message", "parse_special", "date", "sampling", "priority"),
        *("cache_salt", "recorder"),
    ]
    assert list(OptionsDict.__annotations__) == ["options", *options]
    assert [option.name for option in OPTIONS] == options
    engine, conversation = runtime.Engine, runtime.Conversation
    methods = (engine.generate, engine.stream, engine.agenerate, engine.astream)
    conversations = (conversation.generate, conversation.stream, conversation.agenerate, conversation.astream)
    for method in (*methods, *conversations):
        parameters = list(inspect.signature(method).parameters.values())[1:]
        assert [parameter.name for parameter in parameters] == ["prompt", "options", *options]
        assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    # Every option is described.
    assert all(f"\n    {name}: " in runtime.GenerationOptions.__doc__ for name in options)
    options = [
        *("path", "backend", "provider", "threads", "kernels", "rebuild", "max_sequences", "max_batch_tokens"),
        *("max_stall_ms", "queue_limit", "prefix_cache", "options", "on_round", "on_generation"),
    ]
    assert list(inspect.signature(runtime.load).parameters) == options


def test_the_exception_tree_is_the_drawn_one():
    drawn = [line.strip("│├└─ ").split()[0] for line in quasar.errors.__doc__.splitlines() if "Error" in line][1:]
    defined = [
        name
        for name, value in vars(quasar.errors).items()
        if isinstance(value, type) and issubclass(value, quasar.errors.QuasarError)
    ]
    assert drawn == defined
