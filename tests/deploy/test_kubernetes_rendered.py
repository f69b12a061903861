"""What kustomize makes of the manifests: of the base, of every overlay, and of the example in their README."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from service.settings import unknown_variables
from tests.deploy.manifests import (
    BASE,
    HERE,
    KUSTOMIZE,
    OLDEST,
    OVERLAYS,
    README,
    VERSIONS,
    check,
    one,
    pod,
    pods_metrics,
    ports,
    render,
    server,
    settings_of,
    understood,
)  # fmt: skip

pytestmark = pytest.mark.skipif(KUSTOMIZE is None, reason="neither kustomize nor kubectl is on the PATH")


@pytest.mark.parametrize("folder", ["base", *(f"overlays/{name}" for name in OVERLAYS)])
def test_what_kustomize_makes_is_valid(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render(HERE / folder)
    for manifest in manifests:
        assert "namespace" not in manifest["metadata"], "the caller's choice"
        for version in VERSIONS:
            check(manifest, version)
    variables = settings_of(manifests)
    assert unknown_variables(variables) == []
    understood(monkeypatch, variables)


def test_the_gpu_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render(HERE / "overlays" / "gpu")
    settings = understood(monkeypatch, settings_of(manifests))
    assert (settings.device, settings.precision, settings.host) == ("cuda", "bf16", "0.0.0.0")
    assert server(manifests)["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pod(manifests)["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod(manifests)["tolerations"][0]["key"] == "nvidia.com/gpu"
    targets = pods_metrics(manifests)
    assert targets["rdt_live_requests"] == settings.max_live // 3
    assert targets["rdt_waiting_requests"] * 10 < settings.max_waiting


def test_the_own_weights_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = render(HERE / "overlays" / "own-weights")
    checkpoint = understood(monkeypatch, settings_of(manifests)).checkpoint
    [mount] = [mount for mount in server(manifests)["volumeMounts"] if mount["name"] == "models"]
    assert checkpoint.is_relative_to(mount["mountPath"])
    assert mount["readOnly"] is True
    [volume] = [volume for volume in pod(manifests)["volumes"] if volume["name"] == "models"]
    claim = volume["persistentVolumeClaim"]["claimName"]
    assert one("PersistentVolumeClaim", manifests, claim)
    assert {mount["name"] for mount in server(manifests)["volumeMounts"]} == {"tmp", "models"}


def test_prometheus_reaches_the_scraped_port_alone() -> None:
    manifests = render(HERE / "overlays" / "monitoring")
    before, after = (one("NetworkPolicy", found)["spec"]["ingress"] for found in (BASE, manifests))
    assert after[: len(before)] == before
    [added] = after[len(before) :]
    assert added["ports"] == [{"protocol": "TCP", "port": ports()["http"]}]


def test_the_readmes_own_overlay_renders(tmp_path: Path) -> None:
    """The example is written into a copy of this folder, where the README says it goes."""
    [example] = re.findall(r"^```yaml\n(# overlays/mine/kustomization.yaml\n.*?)^```", README, re.MULTILINE | re.DOTALL)
    copy = shutil.copytree(HERE, tmp_path / "kubernetes")
    mine = copy / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(example, encoding="utf-8")
    manifests = render(mine)
    assert {manifest["metadata"]["namespace"] for manifest in manifests} == {"rdt"}
    assert {"ServiceMonitor", "PersistentVolumeClaim"} <= {manifest["kind"] for manifest in manifests}
    assert server(manifests)["image"].startswith("registry.example/")
    for manifest in manifests:
        check(manifest, OLDEST)
