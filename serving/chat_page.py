"""The page at `/`: one file, with headers that let it load and ask nothing but this server."""

import base64
import hashlib
import re
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response


class ChatPage:
    """The page and its headers, read once. Its own script and style are allowed by their hashes, and nothing else."""

    def __init__(self) -> None:
        self._body = files("serving").joinpath("page.html").read_bytes()
        policy = {
            "default-src": "'none'",
            "script-src": _hashes(self._body, b"script"),
            "style-src": _hashes(self._body, b"style"),
            # The icon is a part of the page.
            "img-src": "data:",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
            # No text becomes HTML.
            "require-trusted-types-for": "'script'",
            "trusted-types": "'none'",
        }
        self._headers = {
            "content-security-policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "x-content-type-options": "nosniff",
            "referrer-policy": "no-referrer",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "same-origin",
            "cache-control": "no-cache",
        }

    async def answer(self, request: Request) -> Response:  # noqa: ARG002 - an endpoint's
        """`GET /`; it needs no key, since it holds nothing of the engine's."""
        return Response(self._body, headers=self._headers, media_type="text/html; charset=utf-8")


def _hashes(page: bytes, element: bytes) -> str:
    """CSP's sources for the contents of the elements of this name."""
    contents = re.findall(b"<%b>(.*?)</%b>" % (element, element), page, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one).digest()).decode()}'" for one in contents)
