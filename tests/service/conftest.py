from __future__ import annotations

import pytest

from rdt_core import ModelConfig, Tokenizer
from tests.fakes import Service


@pytest.fixture
def service(tiny_tokenizer: Tokenizer, tiny_config: ModelConfig) -> Service:
    """Loaded, ready, with an engine that reads every mask as "fox"."""
    return Service(tiny_tokenizer, tiny_config).open()
