"""API keys: who may ask, by `Authorization: Bearer KEY`."""

import hashlib
import hmac
from dataclasses import dataclass, field
from pathlib import Path

from quasar.errors import QuasarError
from serving.api_errors import ApiError, ErrorAnswer


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """The keys that are taken; none: everybody may ask."""

    keys: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def asked_for(self) -> bool:
        """Whether a key is needed."""
        return bool(self.keys)

    def holder(self, authorization: str | None) -> str:
        """A name for the holder of the key in a header, which says nothing of the key; "" where none is needed.

        Raises `ApiError`, status 401. Every key is compared, and each in a time that does not tell how much of it was
        right.
        """
        if not self.keys:
            return ""
        scheme, _, given = (authorization or "").partition(" ")
        offered = given.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        matches = [hmac.compare_digest(offered, key) for key in self.keys]
        if not any(matches):
            raise _unauthorized(given=bool(offered))
        return hashlib.sha256(self.keys[matches.index(True)]).hexdigest()[:12]


def read_keys(path: Path) -> Keys:
    """Keys from a file, one a line; empty lines and lines that begin with # are left out.

    Raises `QuasarError` for a file that cannot be read, or that has no key that a header can hold.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeError) as error:
        raise QuasarError(f"--api-key-file {path} cannot be read ({error}); keys were expected, one a line") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise QuasarError(f"--api-key-file {path} has no key; keys were expected, one a line")
    for number, key in enumerate(keys, start=1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise QuasarError(f"--api-key-file {path}: key {number} has characters that no header holds: use ASCII")
    return Keys(keys=tuple(key.encode() for key in keys))


def _unauthorized(*, given: bool) -> ApiError:
    message = "the API key is wrong" if given else "an API key is needed: send Authorization: Bearer KEY"
    return ApiError(
        ErrorAnswer(
            status=401,
            message=message,
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    )
