"""Clients that people use, unchanged, against a server process: `make test-clients` installs them and runs this.

They run in an interpreter of their own, `QUASAR_CLIENTS_PYTHON`, in which nothing may be missing; without one, in this
one, and what is not installed here is skipped.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "clients"
ASKED = os.environ.get("QUASAR_CLIENTS_PYTHON", "")
PYTHON = ASKED or sys.executable
# Nothing is asked for over the network: litellm's table of other models, and data sets.
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# Seconds after which something is broken: these packages take long to import.
PATIENCE = 300
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abc abc abc"}]


def needs(package):
    missing = not ASKED and importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: make test-clients installs and runs it")


def run(*arguments, cwd):
    """What a client prints; it finds nothing of this project in its folder."""
    done = subprocess.run(
        [PYTHON, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=cwd,
        env={**os.environ, **OFFLINE, "PYTHONPATH": "", "HF_HOME": str(cwd)},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def expected(engine):
    """What the engine answers itself."""
    greedy = engine.generate(MESSAGES, max_new_tokens=24)
    drawn = engine.generate(MESSAGES, max_new_tokens=24, temperature=0.9, top_p=0.95, seed=7)
    usage = [greedy.stats.prompt_tokens, greedy.stats.tokens]
    return {
        "text": greedy.text,
        "stream": greedy.text,
        "awaited": greedy.text,
        "drawn": drawn.text,
        "finish_reason": greedy.finish_reason,
        "usage": usage,
        "stream_usage": usage,
        "predicted": [greedy.text, True],
    }


@needs("langchain_openai")
def test_langchain(server, engine, expected, tmp_path):
    found = json.loads(run(HERE / "langchain_chat.py", server.url, server.name, cwd=tmp_path))
    assert found == {
        **expected,
        "batch": [expected["text"], engine.generate("hi", max_new_tokens=24).text, expected["text"]],
        "logprobs": [expected["usage"][1], 2],
        "refused": "max_completion_tokens",
    }


@needs("litellm")
def test_litellm(server, engine, expected, tmp_path):
    found = json.loads(run(HERE / "litellm_chat.py", server.url, server.name, cwd=tmp_path).splitlines()[-1])
    assert found == {
        **expected,
        "vllm": expected["text"],
        "completion": engine.generate("abc abc", max_new_tokens=24, chat_template=False).text,
        "refused": "BadRequestError",
        "too_long": "ContextWindowExceededError",
    }


TASK = """task: small_questions
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  do_sample: false
  temperature: 0
  max_gen_toks: 16
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""


@needs("lm_eval")
@pytest.mark.parametrize("concurrent", [1, 3])
def test_lm_eval(server, engine, tmp_path, concurrent):
    """A task of our own: half of its answers are the engine's, so half of them are right."""
    rows = []
    for place in range(6):
        question = f"abc {place} abd {place} abc"
        answer = engine.generate(question, max_new_tokens=16, stop="\n\n").text
        rows.append({"question": question, "answer": answer if place % 2 else f"{answer} and more"})
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "small_questions.yaml").write_text(TASK.format(questions=questions))
    model = f"model={server.name},base_url={server.url}/v1/chat/completions,num_concurrent={concurrent},max_retries=1"
    command = ["-m", "lm_eval", "--model", "local-chat-completions", "--model_args", model, "--apply_chat_template"]
    command += ["--tasks", "small_questions", "--include_path", tmp_path, "--output_path", tmp_path / "out"]
    run(*command, "--log_samples", cwd=tmp_path)
    [result] = (tmp_path / "out").rglob("results_*.json")
    scores = json.loads(result.read_text())["results"]["small_questions"]
    assert scores["exact_match,none"] == 0.5
    [samples] = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    answers = {one["doc"]["question"]: one["resps"][0][0] for one in found}
    assert answers == {row["question"]: row["answer"].removesuffix(" and more") for row in rows}
