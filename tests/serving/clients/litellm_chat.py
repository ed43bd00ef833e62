"""Litellm against a server: URL and model are the arguments; what it gets is printed as JSON."""

import asyncio
import json
import sys

import litellm

url, model = sys.argv[1:]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "abc abc abc"}]
litellm.num_retries = 0


def options(provider="openai", **more):
    base = {"model": f"{provider}/{model}", "api_base": f"{url}/v1", "api_key": "none", "max_tokens": 24}
    return {**base, "temperature": 0, **more}


answer = litellm.completion(messages=MESSAGES, **options())
found = {
    "text": answer.choices[0].message.content,
    "usage": [answer.usage.prompt_tokens, answer.usage.completion_tokens],
    "finish_reason": answer.choices[0].finish_reason,
    "drawn": litellm.completion(messages=MESSAGES, **options(temperature=0.9, top_p=0.95, seed=7))
    .choices[0]
    .message.content,
    "awaited": asyncio.run(litellm.acompletion(messages=MESSAGES, **options())).choices[0].message.content,
    "vllm": litellm.completion(messages=MESSAGES, **options("hosted_vllm", top_k=1)).choices[0].message.content,
}
chunks = list(litellm.completion(messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **options()))
found["stream"] = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
found["stream_usage"] = [
    [one.usage.prompt_tokens, one.usage.completion_tokens] for one in chunks if getattr(one, "usage", None)
][-1]
text = litellm.text_completion(prompt="abc abc", **options("text-completion-openai"))
found["completion"] = text.choices[0].text
predicted = litellm.completion(messages=MESSAGES, prediction={"type": "content", "content": found["text"]}, **options())
found["predicted"] = [
    predicted.choices[0].message.content,
    predicted.usage.completion_tokens_details.accepted_prediction_tokens >= 0,
]
for name, more in (
    ("refused", {"max_tokens": -1}),
    ("too_long", {"messages": [{"role": "user", "content": "a " * 9000}]}),
):
    try:
        litellm.completion(**{"messages": MESSAGES, **options(), **more})
    except Exception as error:
        found[name] = type(error).__name__
print(json.dumps(found))
