from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from rdt_core import ModelConfig, Tokenizer
from service.runtime import FrontEnd, listen
from service.settings import Settings
from service.tracing import NO_TRACER
from tests.fakes import Service


@pytest.fixture
def service(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> Service:
    """Loaded, ready, with an engine that reads every mask as "fox"."""
    return Service(tiny_tokenizer, tiny_config).open()


@pytest.fixture
def path(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copy(tiny_checkpoint, tmp_path / "best_model.pt"))


@pytest.fixture
async def server(service: Service) -> AsyncIterator[tuple[FrontEnd, int]]:
    async def no_reload() -> None:
        raise AssertionError

    settings = Settings(http_port=0, grpc_port=0)
    front = FrontEnd(settings, service.lifecycle, service.metrics, NO_TRACER, no_reload)  # type: ignore[arg-type]
    with listen(settings.host, 0) as listener:
        await front.open(listener)
        yield front, listener.getsockname()[1]
        await front.close()


@pytest.fixture
def port(server: tuple[FrontEnd, int]) -> int:
    return server[1]


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    async with service.channel() as channel:
        yield channel
