"""Sessions for the probe whose faults are known."""

import numpy as np

from engines.cache_rows import HostCaches
from engines.contract import Contract


class FaultySession(HostCaches):
    """Logits follow from the token and its position alone, except where `fault(cache_length, width, row)` says so."""

    def __init__(
        self, fault=lambda length, width, row: False, leak=lambda length, width: False, path=lambda length, width: 0
    ) -> None:
        self.contract = Contract(num_layers=1, num_kv_heads=1, head_size=2, vocab_size=11, max_length=360, capacity=448)
        self.num_layers = self.num_slots = self.max_sequences = 1
        self.caches = [(np.zeros((1, 1, 448, 2), np.float32), np.zeros((1, 1, 448, 2), np.float32))]
        self._fault, self._leak, self._path = fault, leak, path

    def run_logits(self, token_ids, cache_length, num_logits_rows):
        width = len(token_ids)
        rows = []
        for row, token in enumerate(token_ids):
            position = cache_length + row
            keys, values = self.caches[0]
            keys[0, 0, position] = (token, position)
            values[0, 0, position] = (position, token)
            # A token sees every token before it.
            seen = keys[0, 0, : position + 1].sum(dtype=np.float64)
            logits = np.sin(np.arange(11) * (int(token) + 1) + seen).astype(np.float32)
            if self._fault(cache_length, width, row):
                logits[3] = np.nextafter(logits[3], np.float32(9))
            logits[5] += self._path(cache_length, width)
            if self._leak(cache_length, width):
                logits[0] += token_ids[-1]
            rows.append(logits)
        # As the lowered graph does: a spare position after the new ones lands in the cache.
        keys[0, 0, cache_length + width] = values[0, 0, cache_length + width] = -5
        return np.asarray(rows[width - num_logits_rows :], np.float32)
