"""What draws tokens: the compiled sampler where it runs."""

import logging

from plugins.cpu.library import open_library
from plugins.cpu.sampler import NativeSampler
from quasar.errors import QuasarError
from runtime.sampling.chooser import TokenSampler, reference_sampler

_log = logging.getLogger("quasar.runtime")


def make_sampler() -> TokenSampler:
    """The compiled one where it runs, whatever kernels the engine has; the reference draws the same tokens, slower."""
    try:
        return NativeSampler(open_library().path).prepare
    except QuasarError as error:
        _log.info("tokens are drawn by numpy: %s", error)
        return reference_sampler
