"""LangChain's ChatOpenAI against a server: URL and model are the arguments; what it gets is printed as JSON."""

import asyncio
import json
import sys

import openai
from langchain_openai import ChatOpenAI

url, model = sys.argv[1:]
MESSAGES = [("system", "Be brief."), ("human", "abc abc abc")]


def chat(**options):
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, max_retries=0, max_tokens=24, **options)


greedy = chat(temperature=0)
answer = greedy.invoke(MESSAGES)
found = {
    "text": answer.content,
    "usage": [answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]],
    "finish_reason": answer.response_metadata["finish_reason"],
    "drawn": chat(temperature=0.9, top_p=0.95, seed=7).invoke(MESSAGES).content,
    "batch": [one.content for one in greedy.batch([MESSAGES, "hi", MESSAGES])],
    "awaited": asyncio.run(chat(temperature=0).ainvoke(MESSAGES)).content,
}
chunks = list(chat(temperature=0, stream_usage=True).stream(MESSAGES))
found["stream"] = "".join(one.content for one in chunks)
usages = [one.usage_metadata for one in chunks if one.usage_metadata]
found["stream_usage"] = [usages[-1]["input_tokens"], usages[-1]["output_tokens"]]
logprobs = greedy.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES).response_metadata["logprobs"]["content"]
found["logprobs"] = [len(logprobs), len(logprobs[0]["top_logprobs"])]
predicted = greedy.invoke(MESSAGES, prediction={"type": "content", "content": answer.content})
details = predicted.response_metadata["token_usage"]["completion_tokens_details"]
found["predicted"] = [predicted.content, details["accepted_prediction_tokens"] >= 0]
try:
    greedy.invoke(MESSAGES, max_tokens=-1)
except openai.BadRequestError as error:
    found["refused"] = error.param
print(json.dumps(found))
