"""Arguments of the application: a server's own settings, and how many servers there may be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from service.errors import shown
from service.settings import Settings, SettingsError, read_settings, wanted

NOT_HERE = {
    "host": "http_options of Serve",
    "http_port": "http_options of Serve",
    "grpc_port": "grpc_options of Serve",
    "admin_key": "user_config of the deployment, which reloads every replica",
    "api_workers": "proxy_location of Serve, whose proxies answer callers",
}
"""Settings that Serve decides, and where."""

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Fleet(BaseModel):
    """How many replicas, of what size, and what asks for more."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_replicas: int = Field(1, ge=1, description="Replicas at the least; from none, a first caller would wait long.")
    max_replicas: int = Field(4, ge=1, description="Replicas at the most.")
    num_cpus: Finite = Field(1, ge=0, description="Cores that Ray sets aside for a replica.")
    num_gpus: Finite = Field(0, ge=0, description="GPUs that Ray sets aside for a replica.")
    target_waiting: Finite = Field(8, gt=0, description="Waiting requests for each replica; more want more replicas.")
    target_load: Finite = Field(0.7, gt=0, le=1, description="Load of each, of 1, up to which fewer replicas will do.")
    window_seconds: Finite = Field(20, gt=0, description="What the two are averaged over.")
    upscale_seconds: Finite = Field(10, ge=0, description="How long more must be wanted.")
    downscale_seconds: Finite = Field(120, ge=0, description="How long fewer must be wanted.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Fleet:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}: want at least min_replicas = {self.min_replicas}")
        return self


def read_arguments(arguments: Mapping[str, object]) -> tuple[Settings, Fleet]:
    """Arguments over environment over defaults, as for `rdt-serve`. The result does not depend on where it is used,
    because replicas may run on other machines.

    Raises `SettingsError`.
    """
    for name in arguments:
        if name in NOT_HERE:
            raise SettingsError(f"{name} is not an argument here: see {NOT_HERE[name]}")
        if name not in Settings.model_fields and name not in Fleet.model_fields:
            known = sorted({*Settings.model_fields, *Fleet.model_fields} - set(NOT_HERE))
            raise SettingsError(f"{name} is not an argument: want one of {', '.join(known)}")
    fleet = _read_fleet({name: value for name, value in arguments.items() if name in Fleet.model_fields})
    flags = [f"--{name}={value}" for name, value in arguments.items() if name in Settings.model_fields]
    settings = read_settings(flags)
    changes = {"checkpoint": settings.checkpoint.absolute(), "replicas": _replicas(settings, fleet)}
    return settings.model_copy(update=changes), fleet


def _read_fleet(arguments: Mapping[str, object]) -> Fleet:
    try:
        return Fleet.model_validate(arguments)
    except ValidationError as error:
        raise SettingsError("; ".join(map(_problem, error.errors()))) from None


def _problem(fault: ErrorDetails) -> str:
    if not fault["loc"]:  # of two together
        return str(fault["ctx"]["error"])
    name = str(fault["loc"][0])
    return f"{name} is {shown(fault['input'])}: want {wanted(Fleet.model_fields[name])}"


def n_batches(settings: Settings) -> int:
    """Batches of one replica, on all of its devices."""
    return max(1, settings.replicas) * len(settings.device_names)


def _replicas(settings: Settings, fleet: Fleet) -> int:
    """One batch for each core that Ray sets aside, not for each core of the machine, which others may use too."""
    if settings.replicas or fleet.num_gpus:
        return settings.replicas
    return max(1, int(fleet.num_cpus) // settings.threads)
