"""RDT on Ray Serve: each replica is a whole server, and they run on as many machines as Ray has.

    serve run service.ray_serve:app                                 settings from RDT_* alone
    serve run service.ray_serve:build checkpoint=FILE max_replicas=8
    serve run deploy/ray/serve.yaml                                 with Serve's own settings, gRPC among them

A composition root beside `service.runtime`, and the only place that knows of Ray.

    options      arguments -> settings of a server, and how many servers
    application  what Serve deploys
    replica      one server in a process of Ray's
    rpc, proxy   gRPC, in the replica and in front of it
    metering     the metrics of all replicas, whichever is asked
    scaling      how many replicas there should be
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

if find_spec("ray") is None:
    raise ImportError("Ray is not installed: pip install '.[ray]' in the project's folder", name="ray")


def build(arguments: Mapping[str, Any]) -> Any:
    """The application, as `serve run` and the configuration file ask for it: settings of the server by their
    names, and those of `service.ray_serve.options.Fleet`.

    Raises `SettingsError` naming every argument that cannot be used.
    """
    from service.ray_serve.application import application  # noqa: PLC0415 - proxies import this package without torch
    from service.ray_serve.options import read_arguments  # noqa: PLC0415

    return application(*read_arguments(arguments))


def __getattr__(name: str) -> Any:
    """`app` is built when it is asked for: importing does no work."""
    if name == "app":
        return build({})
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
