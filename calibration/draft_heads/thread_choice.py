"""How many threads the work is shared by: all cores where they are free, one where other work takes its turns on them.

Threads of one product wait for the slowest of them. On two cores that other processes load as well, one thread trained
six times as fast as two, and generated twice as fast.
"""

import time

# What two threads must gain to be taken.
_GAIN = 1.15
_ROWS, _INPUTS, _OUTPUTS = 512, 576, 4096
_ROUNDS, _PRODUCTS = 6, 4


def choose_threads() -> int:
    """Torch's threads, 1 or as many as it has, whichever multiplies faster just now; torch is set to them."""
    import torch

    most = torch.get_num_threads()
    if most == 1:
        return 1
    x, weight = torch.ones(_ROWS, _INPUTS), torch.ones(_INPUTS, _OUTPUTS)
    seconds = {1: 0.0, most: 0.0}
    for _ in range(_ROUNDS):
        for threads in seconds:
            torch.set_num_threads(threads)
            # The first one wakes the threads.
            torch.mm(x, weight)
            begun = time.monotonic()
            for _ in range(_PRODUCTS):
                torch.mm(x, weight)
            seconds[threads] += time.monotonic() - begun
    chosen = most if seconds[most] * _GAIN < seconds[1] else 1
    torch.set_num_threads(chosen)
    return chosen
