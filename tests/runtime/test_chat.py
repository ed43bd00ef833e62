"""The terminal chat: lines in, answers out; Ctrl-C stops an answer and nothing else."""

import os
import signal
import subprocess
import sys

import pytest

import runtime
from runtime.chat import HELP, chat, interrupts_set
from tests.tiny import CHAT_TEMPLATE, save_tiny_model, save_tokenizer


@pytest.fixture(scope="module")
def engine(tiny_engine):
    with runtime.load(tiny_engine) as loaded:
        yield loaded


def run(engine, *lines, **options):
    """What the chat wrote; a line that is an exception is raised."""
    waiting, written = list(lines), []

    def read(prompt):
        if not waiting:
            raise EOFError
        line = waiting.pop(0)
        if isinstance(line, str):
            return line
        raise line

    settings = {"system": "", "max_new_tokens": 8, **options}
    system = settings.pop("system")
    chat(engine, settings, system=system, read=read, write=written.append, describe=lambda stats: f"{stats.tokens} t")
    assert not waiting
    return "".join(written)


def test_answers_go_on_with_the_conversation(engine):
    first = engine.generate("hello", max_new_tokens=8)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "and?"},
    ]
    second = engine.generate(messages, max_new_tokens=8)
    assert run(engine, "hello", "", "and?") == f"{HELP}\n{first.text}\n{second.text}\n\n"


def test_commands(engine):
    answer = engine.generate("hello", max_new_tokens=8)
    said = run(engine, "/stats", "hello", "/stats", "/reset", "hello", "/what", KeyboardInterrupt(), "/exit")
    assert said == (
        f"{HELP}\nnothing was generated yet\n{answer.text}\n{answer.stats.tokens} t\n{answer.text}\n{HELP}\n\n{HELP}\n"
    )


def test_a_system_message_stays_after_reset(engine):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    answer = engine.generate(messages, max_new_tokens=8).text
    assert run(engine, "hello", "/reset", "hello", system="be brief") == f"{HELP}\n{answer}\n{answer}\n\n"


def test_an_error_is_a_line_and_the_chat_goes_on(engine):
    said = run(engine, "word " * 200, "hello")
    assert "error: the prompt has" in said
    assert engine.generate("hello", max_new_tokens=8).text in said


def test_what_a_template_says_of_a_conversation_is_one_sentence(tmp_path, build_engine):
    folder = save_tiny_model(tmp_path / "model", "llama")
    refusal = "{% if messages[0].content == 'no' %}{{ raise_exception('Say\n yes') }}{% endif %}"
    save_tokenizer(folder, refusal + CHAT_TEMPLATE)
    path, said = build_engine(folder), "error: the chat template refuses this conversation: Say yes\n"
    with runtime.load(path) as engine:
        answer = engine.generate("hello", max_new_tokens=8).text
        assert run(engine, "no", "hello") == f"{HELP}\n{said}{answer}\n\n"
    program = [sys.executable, "-m", "runtime", "generate", str(path), "no"]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


def test_ctrl_c_stops_the_answer(engine):
    def interrupt(context, logits):
        if len(interrupt.seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        interrupt.seen.append(1)
        return logits

    interrupt.seen = []
    said = run(engine, "hello", logits_processor=interrupt, max_new_tokens=200, ignore_eos=True, drafter="none")
    assert said.endswith(" [stopped]\n\n")
    assert len(interrupt.seen) <= 5
    with interrupts_set():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_program(tiny_engine):
    program = [sys.executable, "-m", "runtime", "chat", str(tiny_engine), "--max-new-tokens", "200", "--ignore-eos"]
    with subprocess.Popen(
        program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        output, errors = process.communicate("hello\n/stats\n/exit\n", timeout=120)
    assert process.returncode == 0, errors
    assert output.startswith(HELP)
    assert "200 tokens in" in output


def test_a_closed_standard_input_is_its_end(engine):
    """Python's `input` raises RuntimeError then."""
    assert run(engine, RuntimeError("input(): lost sys.stdin")).endswith("\n")
