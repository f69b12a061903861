"""What Serve deploys: one deployment, whose bounds agree with those of the engine inside."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig

from service.errors import RETRY_SECONDS
from service.ray_serve.options import Fleet, n_batches
from service.ray_serve.replica import Replica
from service.ray_serve.scaling import WaitingPolicy
from service.settings import Settings

NAME = "Denoiser"

LEAVING_SECONDS = 5.0
"""How long a replica may take to end once its requests are answered."""
HEALTH_SECONDS = 1.0
"""Serve should know soon of a failed engine: its replica refuses at once, so it looks idle and gets more requests."""


def application(settings: Settings, fleet: Fleet) -> Any:
    ongoing = max_ongoing(settings, fleet)
    deployment: Any = serve.deployment(
        serve.ingress()(Replica),
        name=NAME,
        ray_actor_options={"num_cpus": fleet.num_cpus, "num_gpus": fleet.num_gpus},
        max_ongoing_requests=ongoing,
        max_queued_requests=ongoing * fleet.max_replicas,  # or a burst would be refused while there is room for it
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=RETRY_SECONDS),
        graceful_shutdown_timeout_s=settings.grace_seconds + LEAVING_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=HEALTH_SECONDS,
        autoscaling_config=AutoscalingConfig(
            min_replicas=fleet.min_replicas,
            max_replicas=fleet.max_replicas,
            look_back_period_s=fleet.window_seconds,
            upscale_delay_s=fleet.upscale_seconds,
            downscale_delay_s=fleet.downscale_seconds,
            policy=AutoscalingPolicy(
                policy_function=WaitingPolicy,
                policy_kwargs={"target_waiting": fleet.target_waiting, "target_load": fleet.target_load},
            ),
        ),
    )
    return deployment.bind(settings)


def max_ongoing(settings: Settings, fleet: Fleet) -> int:
    """More than the engine holds, live and waiting, so that the engine refuses further requests at once, before Serve
    queues them itself.
    """
    max_live = settings.limits_on("cuda" if fleet.num_gpus else "cpu").max_live
    holds = settings.max_waiting + max_live * n_batches(settings)
    return holds + max(16, holds // 4)
