"""The compose file keeps its promises. What Docker makes of it, `deploy/check.sh` sees."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.runtime import FLUSH_SECONDS
from service.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
PROJECT: dict[str, Any] = yaml.safe_load(re.sub(r"(?<!\$)\$\{\w+:-([^}]*)\}", r"\1", TEXT))
SERVICES: dict[str, dict[str, Any]] = PROJECT["services"]
SERVERS = ("service", "service-gpu")

every_service = pytest.mark.parametrize("name", SERVICES)


def seconds(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(s|m)", text).groups()  # type: ignore[union-attr]
    return int(number) * {"s": 1, "m": 60}[unit]


@every_service
def test_nothing_is_published_beyond_loopback(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


@every_service
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["tmpfs"] == ["/tmp"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["ulimits"]["nofile"] <= 20_000
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert not service.get("privileged")
    assert not any("docker.sock" in volume for volume in service.get("volumes", []))


@every_service
def test_every_image_has_a_version(name: str) -> None:
    repository, _, tag = SERVICES[name]["image"].partition(":")
    assert repository
    assert tag
    assert tag != "latest"


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_may_drain_before_it_is_killed(name: str) -> None:
    grace = Settings.model_fields["grace_seconds"].default
    assert seconds(SERVICES[name]["stop_grace_period"]) > grace + FLUSH_SECONDS + 5


@pytest.mark.parametrize("name", SERVERS)
def test_every_setting_but_the_address_is_the_callers(name: str) -> None:
    wanted = {PREFIX + field.upper() for field in Settings.model_fields}
    inside = {"RDT_HOST", "RDT_HTTP_PORT", "RDT_GRPC_PORT"}  # where it listens in its container is the image's
    assert set(SERVICES[name]["environment"]) == wanted - inside
    assert all(value is None for value in SERVICES[name]["environment"].values())  # taken over, or the image's default


@pytest.mark.parametrize("name", SERVERS)
def test_the_server_restarts_and_reads_what_the_trainer_writes(name: str) -> None:
    service, trainer = SERVICES[name], SERVICES["trainer"]
    assert service["restart"] == "unless-stopped"
    assert "models:/models:ro" in service["volumes"]
    assert "models:/models" in trainer["volumes"]
    assert any(word.startswith("output.checkpoint_dir=/models/") for word in trainer["entrypoint"])


@every_service
def test_memory_and_swap_together_are_no_less_than_memory(name: str) -> None:
    """Docker refuses to create such a container."""
    service = SERVICES[name]
    assert service.get("memswap_limit", service["mem_limit"]) == service["mem_limit"]


def test_only_the_server_and_its_monitoring_start_unasked() -> None:
    unasked = {name for name, service in SERVICES.items() if "profiles" not in service}
    assert unasked == {"service", "prometheus", "grafana"}


def test_gpu_services_ask_for_a_gpu_and_build_for_it() -> None:
    for name in ("service-gpu", "trainer-gpu"):
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device["capabilities"] == ["gpu"]
        assert SERVICES[name]["build"]["args"]["TORCH"] == "cuda"
    for name in ("service", "trainer"):
        assert SERVICES[name]["build"]["args"]["TORCH"] == "cpu"
    cpu, gpu = SERVICES["service"], SERVICES["service-gpu"]
    assert {name for name in cpu.keys() | gpu.keys() if cpu.get(name) != gpu.get(name)} == {
        "build", "deploy", "image", "mem_limit", "memswap_limit", "networks", "profiles",
    }  # fmt: skip


def test_no_password_is_written_down() -> None:
    environment = SERVICES["grafana"]["environment"]
    assert not any("PASSWORD" in name for name in environment)
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_the_trainers_configuration_is_in_its_image() -> None:
    assert "COPY training/configs /configs\n" in (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (name,) = [word for word in SERVICES["trainer"]["entrypoint"] if word.startswith("--config=/configs/")]
    assert (ROOT / "training" / "configs" / Path(name).name).is_file(), name


def test_what_is_mounted_is_there() -> None:
    mounts = [volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])]
    for mount in mounts:
        if mount.startswith("./deploy"):
            assert (ROOT / mount).is_dir(), mount
        elif mount != "./data":
            assert mount in PROJECT["volumes"], mount
