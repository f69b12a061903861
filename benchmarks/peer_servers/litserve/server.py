"""LitServe with its dynamic batching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from litserve import LitAPI, LitServer

from benchmarks.peer_servers.batched import Model
from benchmarks.peer_servers.setting import read_arguments


class Denoise(LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        arguments = read_arguments()
        self.model = Model(arguments.checkpoint, arguments.setting.threads)

    def predict(self, asked: Any) -> Any:
        return self.model.answer_any(asked)

    def batch(self, bodies: Sequence[Any]) -> list[Any]:
        return list(bodies)

    def unbatch(self, answers: list[Any]) -> list[Any]:
        return answers


def main() -> None:
    arguments = read_arguments()
    setting = arguments.setting
    api = Denoise(max_batch_size=setting.batch_size, batch_timeout=setting.batch_timeout, api_path="/denoise")
    server = LitServer(api, accelerator="cpu", devices=1, workers_per_device=setting.workers, timeout=False)
    server.run(host="127.0.0.1", port=arguments.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
