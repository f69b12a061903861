"""The manifests under deploy/kubernetes, read, rendered and held against the published schemas."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import PREFIX, Settings, read_settings

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy" / "kubernetes"
README = (HERE / "README.md").read_text(encoding="utf-8")
OLDEST = "1.30"  # the first in which a preStop hook can sleep without a shell
VERSIONS = (OLDEST, kubernetes_validate.latest_version())
OVERLAYS = sorted(path.parent.name for path in (HERE / "overlays").glob("*/kustomization.yaml"))
KUSTOMIZE = next((tool for tool in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(tool[0])), None)
OPERATOR = "monitoring.coreos.com/v1"  # its kinds are not Kubernetes' own

Manifest = dict[str, Any]


def load(path: Path) -> list[Manifest]:
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def kustomizations() -> Iterator[tuple[Path, Manifest]]:
    for path in sorted(HERE.rglob("kustomization.yaml")):
        [content] = load(path)
        yield path.parent, content


def resource_files() -> list[Path]:
    """The files that are whole resources, not patches and not kustomizations."""
    named = (folder / name for folder, content in kustomizations() for name in content["resources"])
    return [path for path in named if path.is_file()]


BASE = [manifest for path in resource_files() if path.parent.name == "base" for manifest in load(path)]
WHOLE = [manifest for path in resource_files() for manifest in load(path)]


def one(kind: str, manifests: list[Manifest] = BASE, name: str = "rdt") -> Manifest:
    [found] = [found for found in manifests if found["kind"] == kind and found["metadata"]["name"] == name]
    return found


def pod(manifests: list[Manifest] = BASE) -> Manifest:
    return one("Deployment", manifests)["spec"]["template"]["spec"]


def server(manifests: list[Manifest] = BASE) -> Manifest:
    [container] = pod(manifests)["containers"]
    return container


def ports() -> dict[str, int]:
    return {port["name"]: port["containerPort"] for port in server()["ports"]}


def settings_of(manifests: list[Manifest]) -> dict[str, str]:
    """What the rendered ConfigMap sets, checked to be the one the pod reads."""
    [found] = [manifest for manifest in manifests if manifest["kind"] == "ConfigMap"]
    assert {"configMapRef": {"name": found["metadata"]["name"]}} in server(manifests)["envFrom"]
    return found["data"]


def read_env(path: Path) -> dict[str, str]:
    lines = (line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def understood(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> Settings:
    """The server's settings under these variables alone."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return read_settings([])


def render(folder: Path) -> list[Manifest]:
    assert KUSTOMIZE is not None
    done = subprocess.run([*KUSTOMIZE, str(folder)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "a warning, of a deprecated field for one"
    return list(yaml.safe_load_all(done.stdout))


def check(manifest: Manifest, version: str) -> None:
    """Raises for anything the schemas do not know."""
    if manifest["apiVersion"] != OPERATOR:
        kubernetes_validate.validate(manifest, version, strict=True)
        return
    kinds = importlib.import_module("cloudcoil.models.prometheus_operator.v1")  # 2 s: only where it is needed
    read = getattr(kinds, manifest["kind"]).model_validate(manifest)
    # The models drop what they do not know, so a misspelt field is missing when they are written again.
    assert read.model_dump(mode="json", by_alias=True, exclude_unset=True) == manifest


def pods_metrics(manifests: list[Manifest]) -> dict[str, int]:
    """Names and target averages of the metrics the autoscaler reads from pods."""
    metrics = one("HorizontalPodAutoscaler", manifests)["spec"]["metrics"]
    found = (metric["pods"] for metric in metrics if metric["type"] == "Pods")
    return {metric["metric"]["name"]: int(metric["target"]["averageValue"]) for metric in found}
