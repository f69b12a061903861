"""All settings, declared once: environment `RDT_*`, flags of the same name, `--help`, ranges, defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict

from service.access import is_sendable
from service.engine.scheduler import SchedulerLimits
from service.errors import shown

PREFIX = "RDT_"
NOT_SET = "(not set)"
"""How `--help` shows no value. It is also read as no value, so it must not be what a template writes for a missing
secret: with pydantic's own, `None`, the server would then run without a key."""

INT32_MAX = 2**31 - 1
"""Largest count of any setting: some libraries take 32-bit numbers."""

MOST_TOP_K = 32
"""`LEAST_TOP` of `rdt_core.decoding`, which is not imported here because it takes torch along."""


def _sendable(key: SecretStr) -> SecretStr:
    if not is_sendable(key.get_secret_value()):
        raise PydanticCustomError("key", "want printable ASCII characters, and no space at either end")
    return key


def _not_blank(name: object) -> object:
    if isinstance(name, str) and not name.strip():
        raise PydanticCustomError("blank", "blank")
    return name


def _encodable(host: str) -> str:
    """Python's sockets raise a `TypeError` for a name that has no form in ASCII."""
    if not host.isascii():
        host.encode("idna")  # a UnicodeError is a ValueError
    return host


WORDS = {
    "checkpoint": "the name of a file",
    "device": "auto, cpu, cuda or cuda:N",
    "devices": "numbers of CUDA devices, such as 0,1",
    "host": "a name or an address",
    "otel_endpoint": "http://HOST:PORT or https://HOST:PORT",
}
"""What is wanted where it is no number and no choice."""

Key = Annotated[SecretStr, AfterValidator(_sendable)]
NotBlank = BeforeValidator(_not_blank)  # before an empty path becomes the current folder


class Settings(BaseSettings):
    """Serve an RDT checkpoint. Every flag can be set as an environment variable: --http_port is RDT_HTTP_PORT."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, cli_prog_name="rdt-serve", cli_avoid_json=True, cli_parse_none_str=NOT_SET
    )

    checkpoint: Annotated[Path, NotBlank] = Field(
        Path("models/rdt-small/best_model.pt"), description="The checkpoint file to serve. A reload reads it again."
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$",
        description="Where to compute: auto, cpu, cuda or cuda:N. auto takes a GPU if there is one.",
    )
    devices: str = Field(
        "",
        pattern=r"^([0-9]+(,[0-9]+)*)?$",
        description="Several CUDA devices by their numbers, such as 0,1, in place of RDT_DEVICE: each computes, all "
        "fed from one queue.",
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16", "int8"] = Field(
        "auto",
        description="Number format of the matrix products. fp32 answers as the reference does, except for ties in the "
        "last digit; the others are faster where the processor has instructions for them. auto: fp32 on a CPU, bf16 "
        "on CUDA, fp16 before Ampere.",
    )
    host: Annotated[str, NotBlank, AfterValidator(_encodable)] = Field(
        "127.0.0.1",
        description="Address to listen on. The default serves this machine only; 0.0.0.0 serves whoever reaches the "
        "ports, so set RDT_API_KEY with it.",
    )
    http_port: int = Field(
        8000, ge=0, le=65_535, description="Port of REST, health, metrics and the page; 0 picks a free one."
    )
    grpc_port: int = Field(50_051, ge=0, le=65_535, description="Port of gRPC; 0 picks a free one.")
    token_budget: int = Field(
        0,
        ge=0,
        le=INT32_MAX,
        description="Largest number of tokens that a replica computes in one tick, at least the model's "
        "max_seq_len. More give more throughput, up to a point, and longer ticks. 0: 512 on a CPU, on CUDA up to "
        "16384, as memory allows.",
    )
    max_live: int = Field(
        0,
        ge=0,
        le=INT32_MAX,
        description="Largest number of texts that a replica computes in one tick. Raise it if requests wait "
        "while ticks have few tokens. 0: 64 on a CPU, 512 on CUDA, where 65534 is the most.",
    )
    # Seven seconds of requests at full throughput: the bundled model on two cores of an AMD EPYC with AVX-512.
    max_waiting: int = Field(
        256,
        ge=1,
        le=INT32_MAX,
        description="Largest number of requests in the queue; more are refused at once. Lower it to shorten "
        "the longest wait; raise it for a server that empties it faster.",
    )
    max_waiting_tokens: int = Field(
        16_384,
        ge=1,
        le=INT32_MAX,
        description="Largest number of tokens in the queue, of all requests together; more are refused at once. "
        "It bounds the wait where texts are long.",
    )
    shed: Literal["off", "depth"] = Field(
        "off",
        description="What to do under load. off: full depth, and refuse when the queue is full. depth: also make "
        "fewer passes, the fuller the queue is.",
    )
    shed_min_steps: int = Field(
        2,
        ge=1,
        le=INT32_MAX,
        description="With RDT_SHED=depth, shedding leaves every request at least so many passes. Set it below the "
        "passes that requests usually make, or nothing is shed.",
    )
    max_steps_limit: int = Field(
        100,
        ge=1,
        le=INT32_MAX,
        description="Largest max_steps a request may ask for. Lower it to bound what one request costs.",
    )
    max_top_k: int = Field(
        20,
        ge=0,
        le=MOST_TOP_K,
        description="Largest top_k a request may ask for, that is, candidates for each restored token. Of more than 32 "
        "the order of equally likely ones would depend on other requests.",
    )
    max_batch_items: int = Field(
        64,
        ge=1,
        le=INT32_MAX,
        description="Largest number of texts in one batch request. Each of them takes a place in the queue.",
    )
    max_body_bytes: int = Field(
        1_048_576,
        ge=1,
        le=INT32_MAX,
        description="Largest REST body or gRPC message, in bytes; larger ones are refused.",
    )
    grace_seconds: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds that accepted requests get to finish after SIGTERM; what is left then fails. Raise it "
        "for long requests, and let whatever stops the server wait longer than that.",
    )
    api_key: Key | None = Field(
        None,
        min_length=1,
        description="Key that callers must send; without one nobody is asked for it. Better set in the environment "
        "than as a flag, which others on the machine can read.",
    )
    admin_key: Key | None = Field(
        None, min_length=1, description="Key of POST /model/reload, which is there only if this is set."
    )
    replicas: int = Field(
        0,
        ge=0,
        le=1024,
        description="Batches computed side by side on each device. Lower it to save memory or to leave cores to "
        "others. 0: on a CPU cores divided by threads, on CUDA one.",
    )
    stuck_seconds: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds after which a tick that has not come back ends the process, for a restart. Raise it if "
        "good ticks can take that long. 0: never, and an event loop may stand still for longer than 30 s, which else "
        "ends its process.",
    )
    threads: int = Field(
        1,
        ge=1,
        le=1024,
        description="Compute threads of each replica on a CPU. One each, and more replicas, was faster where it was "
        "measured. With one, other requests change no digit of an answer.",
    )
    api_workers: int = Field(
        0,
        ge=0,
        le=64,
        description="Processes that answer callers, apart from the engine's. They help where a GPU waits for the one "
        "process; on a CPU they take cores from the replicas. 0: all in one process.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity to log; debug adds a line for each request."
    )
    log_format: Literal["text", "json"] = Field("text", description="Form of the log: text, or one JSON object a line.")
    otel_endpoint: str | None = Field(
        None,
        pattern=r"^https?://[^\s/]+/?$",
        description="OTLP collector that traces are sent to by gRPC, such as http://127.0.0.1:4317; without one there "
        "are no traces. Needs the extra otel.",
    )

    @property
    def device_names(self) -> list[str]:
        """`cuda:N` for each of `devices`, else `device` alone."""
        return [f"cuda:{number}" for number in self.devices.split(",") if number] or [self.device]

    def limits_on(self, device_type: str) -> SchedulerLimits:
        """A setting of 0 gets the default of the device. A budget that CUDA has no memory for shrinks while warming."""
        token_budget, max_live = (16_384, 512) if device_type == "cuda" else (512, 64)
        return SchedulerLimits(
            token_budget=self.token_budget or token_budget,
            max_live=self.max_live or max_live,
            max_waiting=self.max_waiting,
            max_waiting_tokens=self.max_waiting_tokens,
            shed_min_steps=self.shed_min_steps if self.shed == "depth" else None,
        )


def secret(key: SecretStr | None) -> str | None:
    """The key itself, if one is set."""
    return None if key is None else key.get_secret_value()


class SettingsError(ValueError):
    """Settings that cannot be used; the message names each, its value and what was wanted."""


def read_settings(arguments: Sequence[str]) -> Settings:
    """Flags over environment over defaults. Flags may be written with `-` or `_`.

    Raises `SettingsError` for a bad value; prints and exits for `--help` and unknown flags, as argparse does.
    """
    try:
        return CliApp.run(Settings, cli_args=[_underscored(argument) for argument in arguments])
    except ValidationError as error:
        raise SettingsError("; ".join(_problem(fault) for fault in error.errors())) from None


def unknown_variables(environment: Iterable[str]) -> list[str]:
    """`RDT_*` names that set nothing: most likely misspelt."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in known)


def _underscored(argument: str) -> str:
    name, equals, value = argument.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if argument.startswith("--") else argument


def _problem(fault: ErrorDetails) -> str:
    name = str(fault["loc"][0])
    known_as = f"{name} ({PREFIX}{name.upper()})"
    if not name.endswith("_key"):
        return f"{known_as} is {shown(fault['input'])}: want {WORDS.get(name) or wanted(Settings.model_fields[name])}"
    if not fault["input"]:
        return f"{known_as} is empty: want a key, or leave it unset"
    return f"{known_as}: {fault['msg']}"  # a key is never shown


def wanted(field: FieldInfo) -> str:
    """The values of a choice, or of a number: `a whole number from 0 to 65535`."""
    if get_origin(field.annotation) is Literal:
        return f"one of {', '.join(get_args(field.annotation))}"
    kind = "a whole number" if field.annotation is int else "a finite number"
    bounds = {
        name: getattr(rule, name) for rule in field.metadata for name in ("ge", "gt", "le") if hasattr(rule, name)
    }
    if "ge" in bounds and "le" in bounds:
        return f"{kind} from {bounds['ge']} to {bounds['le']}"
    signs = {"ge": ">=", "gt": ">", "le": "<="}
    return f"{kind} {' and '.join(f'{signs[name]} {bound}' for name, bound in bounds.items())}"
