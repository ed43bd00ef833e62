"""How many rows of the KV cache are committed. The rows themselves are the session's: committing only counts."""

from engines.contract import Contract
from quasar.errors import ContextLimitError


class KVCache:
    """Committed rows of a cache that holds `max_length` of them; rows behind are free to be overwritten."""

    def __init__(self, contract: Contract) -> None:
        self.max_length = contract.max_length
        self.length = 0

    @property
    def room(self) -> int:
        """Rows that can still be committed."""
        return self.max_length - self.length

    def commit(self, rows: int) -> None:
        """Keep the next `rows` rows that the last pass wrote; raises `ContextLimitError` if they do not fit."""
        if not 0 <= rows <= self.room:
            raise ContextLimitError(f"{rows} rows do not fit a KV cache with room for {self.room}")
        self.length += rows

    def truncate(self, length: int) -> None:
        """Drop every row from `length` on."""
        if not 0 <= length <= self.length:
            raise ContextLimitError(f"the KV cache holds {self.length} rows and cannot be cut to {length}")
        self.length = length
