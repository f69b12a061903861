"""Mosec with its dynamic batching."""

from __future__ import annotations

import os
from typing import Any

from mosec import Server, Worker

from benchmarks.peer_servers.batched import Model
from benchmarks.peer_servers.setting import read_arguments

TIMEOUT_SECONDS = 600


class Denoise(Worker):
    def __init__(self) -> None:
        super().__init__()
        arguments = read_arguments()
        self.model = Model(arguments.checkpoint, arguments.setting.threads)

    def forward(self, data: Any) -> Any:
        return self.model.answer_any(data)


def main() -> None:
    arguments = read_arguments()
    setting = arguments.setting
    os.environ["MOSEC_ADDRESS"] = "127.0.0.1"  # Mosec takes --port from the command line
    os.environ["MOSEC_TIMEOUT"] = str(1000 * TIMEOUT_SECONDS)
    server = Server()
    server.append_worker(
        Denoise, num=setting.workers, max_batch_size=setting.batch_size,
        max_wait_time=round(1000 * setting.batch_timeout), route="/denoise",
    )  # fmt: skip
    server.run()


if __name__ == "__main__":
    main()
