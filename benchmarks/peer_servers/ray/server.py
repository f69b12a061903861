"""Ray Serve with `@serve.batch`."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse

from benchmarks.peer_servers.batched import Model
from benchmarks.peer_servers.setting import Setting, read_arguments

MAX_ONGOING = 1024  # the default, 5, would keep batches from filling
OBJECT_STORE_BYTES = 100_000_000


@serve.deployment(max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0})
class Denoise:
    def __init__(self, checkpoint: str, setting: Setting) -> None:
        self.model = Model(checkpoint, setting.threads)
        self.answer.set_max_batch_size(setting.batch_size)
        self.answer.set_batch_wait_timeout_s(setting.batch_timeout)

    @serve.batch
    async def answer(self, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return await asyncio.to_thread(self.model.answer, bodies)

    async def __call__(self, request: Request) -> JSONResponse:
        return JSONResponse(await self.answer(await request.json()))  # a plain dictionary would be sent in chunks


def main() -> None:
    arguments = read_arguments()
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(include_dashboard=False, object_store_memory=OBJECT_STORE_BYTES)
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    deployment = Denoise.options(num_replicas=arguments.setting.workers)
    serve.run(deployment.bind(arguments.checkpoint, arguments.setting), route_prefix="/denoise")
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    ray.shutdown()


if __name__ == "__main__":
    main()
