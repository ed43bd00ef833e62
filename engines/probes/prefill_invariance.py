"""The probe for prefix reuse: a position of a prefill chunk has the bits of the same position fed by decoding.

Where it holds, what decoding left in the cache may stand in for a prefill of the same tokens.
"""

import numpy as np

from engines.probes.row_invariance import RowInvariance
from engines.session import Session, fill_randomly

_SEED = 20262
# Between the widest verify call that there is and a whole chunk, on both sides of what kernels may change at.
_WIDTHS = (33, 50, 64, 100, 129, 200)


def prefill_is_exact(session: Session, found: RowInvariance, *, positions: int | None = None) -> bool:
    """Compare chunks, in an empty cache and after others, with their positions decoded one by one, bit for bit.

    A prompt's last chunk may be of any width, one position on: so narrower ones are compared, too, but for those at
    which chains are exact.

    Args:
        found: the widths at which chains are exact. No prefill is where decoding is not at every width from 1 on, or
            has boundaries.
        positions: how many of a chunk are decoded, in one place of the cache: a brief look at a graph whose cut-down
            form has passed the whole test. None: all of them, in three places.
    """
    contract, base, chunk = session.contract, found.chain, session.contract.prefill_chunk
    if base != 1 or found.boundaries or session.max_logits_rows < chunk or contract.max_length < chunk:
        return False
    random = np.random.default_rng(_SEED)
    last = (contract.max_length - chunk) // chunk * chunk
    for length in [min(chunk, last)] if positions is not None else sorted({0, min(chunk, last), last}):
        tokens = random.integers(0, contract.vocab_size, chunk)
        if length:
            fill_randomly(session, random, 0, length)
        untried = range(found.widest + 1, _WIDTHS[0])
        widths = [width for width in (*untried, *_WIDTHS) if width < chunk] if length == 0 else []
        outputs, written = [], []
        for width in (*widths, chunk - 1, chunk) if positions is None else (chunk,):
            outputs.append(session.run_logits(tokens[:width], length, width).copy())
            written.append(session.read_rows(length, length + width))
        count = chunk if positions is None else min(positions, chunk)
        for index in range(count):
            decoded = session.run_logits(tokens[index : index + 1], length + index, 1)[0].tobytes()
            if any(decoded != whole[index].tobytes() for whole in outputs if index < len(whole)):
                return False
        decoded_block = session.read_rows(length, length + count)
        for block in written:
            common = min(count, block.shape[-2])
            if decoded_block[..., :common, :].tobytes() != block[..., :common, :].tobytes():
                return False
    return True
