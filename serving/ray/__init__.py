"""The server over several processes and machines: an application of Ray Serve (docs/serving.md, "Beyond one machine").

`serving.ray.app` builds it, `quasar serve DIR --ray` runs it. Ray, an extra, is imported when an application is built.
"""

from serving.ray.application import app, from_config

__all__ = ["app", "from_config"]
