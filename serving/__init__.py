"""The OpenAI-compatible server over `runtime.load`: requests over HTTP, their limits, metrics and life.

`quasar serve DIR`, or `python -m serving DIR`. What needs starlette, uvicorn or prometheus_client is imported when the
server starts (docs/serving.md).
"""
