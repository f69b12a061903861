"""Every way to ask, once: REST, a batch, a stream, gRPC with its health service."""

from __future__ import annotations

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub
from place import GRPC, KEY, SERVER, fail

from service.client import Client
from service.rpc.pb import denoiser_pb2 as pb
from service.rpc.pb.denoiser_pb2_grpc import DenoiserStub
from service.schema import DenoiseAnswer

TEXT = "The album was [MASK] in 2004 and received positive [MASK] from critics."


def main() -> None:
    with Client(SERVER, api_key=KEY) as client:
        answer = client.denoise(TEXT)
        results = client.denoise_batch([TEXT, TEXT])
        *passes, last = client.denoise_stream(TEXT)
    if [result.answer.text for result in results if result.answer] != [answer.text] * 2:
        fail(f"the batch is answered otherwise than the text alone: {results}")
    if not isinstance(last, DenoiseAnswer) or last.text != answer.text or len(passes) != answer.steps:
        fail(f"the stream ends otherwise than the text alone: {last}")
    with grpc.insecure_channel(GRPC) as channel:
        health = HealthStub(channel).Check(HealthCheckRequest(), timeout=10)
        metadata = [] if KEY is None else [("authorization", f"Bearer {KEY}")]
        called = DenoiserStub(channel).Denoise(pb.DenoiseRequest(text=TEXT), timeout=10, metadata=metadata)
    if called.text != answer.text or health.status != HealthCheckResponse.SERVING:
        fail(f"gRPC answers otherwise than REST: {called}")
    print(f"REST, batch, stream and gRPC agree after {answer.steps} passes: {answer.text}")


if __name__ == "__main__":
    main()
