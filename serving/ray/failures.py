"""Which error answer an exception of Ray's becomes."""

from serving.api_errors import INTERNAL, ErrorAnswer, too_busy
from serving.ray.relay import LOST


def failure_of(error: Exception) -> ErrorAnswer:
    """The answer to a request whose call of a replica raised `error`."""
    from ray.exceptions import RayError, RayTaskError  # an extra
    from ray.serve.exceptions import BackPressureError, RayServeException

    if isinstance(error, BackPressureError):
        return too_busy("as many requests wait for a replica as may: try again later").answer
    if isinstance(error, RayTaskError):
        # Raised by the replica's own code.
        return INTERNAL
    return LOST if isinstance(error, RayError | RayServeException) else INTERNAL
