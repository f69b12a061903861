"""How a peer is set up: what the sweep varies, as the flags that every peer's `server.py` takes."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Setting:
    batch_size: int = 8
    batch_timeout: float = 0.01  # seconds that the first of a batch waits for others
    threads: int = 1  # of each worker's operations
    workers: int = 1  # processes, each with a copy of the model
    spin: int = 1  # 0: threads sleep while they wait for each other, and leave the core to whoever needs it

    def flags(self) -> list[str]:
        return [word for name, value in asdict(self).items() for word in (f"--{name}", str(value))]

    def environment(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), **({} if self.spin else {"OMP_WAIT_POLICY": "PASSIVE"})}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in asdict(self).items())


@dataclass(frozen=True)
class Arguments:
    checkpoint: str
    port: int
    setting: Setting


def read_arguments() -> Arguments:
    """The command line of a peer server; flags that are a framework's own are left to it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--port", type=int, required=True)
    for field in fields(Setting):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    values = vars(parser.parse_args())
    return Arguments(values.pop("checkpoint"), values.pop("port"), Setting(**values))
