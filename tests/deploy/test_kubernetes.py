"""The manifests as they lie in deploy/kubernetes: valid by the published schemas, and true to the server they run."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from service.lifecycle import Lifecycle
from service.metrics import Metrics
from service.rest.app import create_app
from service.rpc.convert import SERVICE
from service.runtime import FLUSH_SECONDS
from service.settings import PREFIX, unknown_variables
from tests.deploy.manifests import (
    BASE,
    HERE,
    OLDEST,
    OVERLAYS,
    README,
    ROOT,
    VERSIONS,
    WHOLE,
    check,
    kustomizations,
    load,
    one,
    pod,
    pods_metrics,
    ports,
    read_env,
    resource_files,
    server,
    understood,
)  # fmt: skip


def test_the_schemas_reject_what_is_wrong() -> None:
    """Else the tests below could not fail."""
    for kind, key in [("Deployment", "replicaz"), ("NetworkPolicy", "podselector")]:
        wrong = {**one(kind), "spec": {**one(kind)["spec"], key: 1}}
        with pytest.raises(kubernetes_validate.ValidationError, match=key):
            check(wrong, OLDEST)
    monitor = one("ServiceMonitor", WHOLE)
    [endpoint] = monitor["spec"]["endpoints"]
    for change in ({"intervall": "1s"}, {"interval": "1 second"}):
        wrong = {**monitor, "spec": {**monitor["spec"], "endpoints": [{**endpoint, **change}]}}
        with pytest.raises((AssertionError, ValueError)):
            check(wrong, OLDEST)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("path", resource_files(), ids=lambda path: str(path.relative_to(HERE)))
def test_every_resource_is_valid_as_it_lies_there(path: Path, version: str) -> None:
    for manifest in load(path):
        check(manifest, version)


def test_kustomizations_name_what_there_is_and_leave_nothing_out() -> None:
    used = {HERE / name for name in ("README.md", "prometheus-adapter.yaml", "prometheus-rules.sh")}
    for folder, content in kustomizations():
        used.add(folder / "kustomization.yaml")
        names = [*content["resources"], *content.get("components", [])]
        names += [patch["path"] for patch in content.get("patches", [])]
        names += [name for maps in content.get("configMapGenerator", []) for name in maps.get("envs", [])]
        for name in names:
            assert (folder / name).exists(), f"{folder}: {name}"
            used.add((folder / name).resolve())
    assert {path for path in HERE.rglob("*") if path.is_file()} <= used


def test_every_setting_is_one_the_server_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(HERE.rglob("*.env"))
    assert len(files) >= 2
    for path in files:
        variables = read_env(path)
        assert variables
        assert all(name.startswith(PREFIX) for name in variables), path
        assert unknown_variables(variables) == [], path
        understood(monkeypatch, variables)
    texts = (path.read_text(encoding="utf-8") for path in HERE.rglob("*") if path.is_file())
    named = {name for text in texts for name in re.findall(rf"\b{PREFIX}[A-Z_]+[A-Z]\b", text)}
    links = {"RDT_PORT", "RDT_SERVICE_HOST"}  # what a comment says is kept away
    assert unknown_variables(named - links) == []


def test_the_container_listens_where_the_service_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = understood(monkeypatch, read_env(HERE / "base" / "settings.env"))
    assert settings.host == "0.0.0.0"
    assert ports() == {"http": settings.http_port, "grpc": settings.grpc_port}
    for name, wanted in [("rdt", {"http", "grpc"}), ("rdt-grpc", {"grpc"})]:
        service = one("Service", name=name)["spec"]
        assert {port["name"] for port in service["ports"]} == wanted
        for port in service["ports"]:
            assert port["targetPort"] == port["name"]
            assert port["port"] == ports()[port["name"]]
    assert one("Service", name="rdt-grpc")["spec"]["clusterIP"] == "None"
    assert "clusterIP" not in one("Service")["spec"]


def test_names_of_services_do_not_become_settings() -> None:
    """A Service named rdt-http would set RDT_HTTP_PORT=tcp://…, and the server would not start."""
    assert pod()["enableServiceLinks"] is False


def test_probes_ask_for_what_the_app_answers() -> None:
    app = create_app(Lifecycle(), Metrics(lambda: 0.0), max_body_bytes=1)
    paths = set(app.openapi()["paths"])
    asked = {name: server()[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    for get in [*asked.values(), *one("ServiceMonitor", WHOLE)["spec"]["endpoints"]]:
        assert get["path"] in paths
        assert get["port"] == "http"
    assert {name: get["path"] for name, get in asked.items()} == {
        "startup": "/health/ready",  # a server that is up and never loads is started again
        "readiness": "/health/ready",
        "liveness": "/health/live",  # a draining server is not ready, and must not be killed for it
    }
    startup, liveness = server()["startupProbe"], server()["livenessProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300
    assert liveness["failureThreshold"] * liveness["periodSeconds"] >= 60


def test_the_grace_of_the_pod_covers_that_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = understood(monkeypatch, read_env(HERE / "base" / "settings.env"))
    sleep = server()["lifecycle"]["preStop"]["sleep"]["seconds"]
    margin = pod()["terminationGracePeriodSeconds"] - (sleep + settings.grace_seconds + FLUSH_SECONDS)
    assert margin >= 10, "for the last pass of the engine and the interpreter's exit"
    readiness = server()["readinessProbe"]
    assert sleep >= 5, "for the endpoint to be gone everywhere"
    assert readiness["periodSeconds"] <= sleep


def test_a_rollout_takes_nothing_away_and_the_budget_lets_nodes_drain() -> None:
    spec = one("Deployment")["spec"]
    assert spec["strategy"]["rollingUpdate"] == {"maxUnavailable": 0, "maxSurge": 1}
    assert "replicas" not in spec, "applying the manifests again would undo the autoscaler"
    assert one("HorizontalPodAutoscaler")["spec"]["minReplicas"] >= 2
    budget = one("PodDisruptionBudget")["spec"]
    assert budget["maxUnavailable"] == 1
    assert "minAvailable" not in budget
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_selectors_meet_the_pods() -> None:
    labels = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    services = [manifest for manifest in BASE if manifest["kind"] == "Service"]
    selectors = [
        one("Deployment")["spec"]["selector"]["matchLabels"],
        one("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(service["spec"]["selector"] for service in services),
        *(spread["labelSelector"]["matchLabels"] for spread in pod()["topologySpreadConstraints"]),
    ]
    assert len(selectors) == 7
    for selector in selectors:
        assert selector
        assert selector.items() <= labels.items()
    assert one("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"] == {
        "apiVersion": "apps/v1", "kind": "Deployment", "name": one("Deployment")["metadata"]["name"],
    }  # fmt: skip


def test_each_pod_is_scraped_once() -> None:
    monitor = one("ServiceMonitor", WHOLE)["spec"]
    [endpoint] = monitor["endpoints"]
    selector = monitor["selector"]["matchLabels"]
    services = [found for found in BASE if found["kind"] == "Service"]
    chosen = [found for found in services if selector.items() <= found["metadata"]["labels"].items()]
    assert [endpoint["port"] in {port["name"] for port in found["spec"]["ports"]} for found in chosen].count(True) == 1


def test_the_autoscaler_reads_gauges_the_server_has_and_the_adapter_passes_on() -> None:
    gauges = {family.name for family in Metrics(lambda: 0.0).registry.collect() if family.type == "gauge"}
    patch = yaml.safe_load((HERE / "overlays" / "gpu" / "autoscaler.yaml").read_text(encoding="utf-8"))
    names = set(pods_metrics(BASE)) | {metric["pods"]["metric"]["name"] for metric in patch[0]["value"]}
    assert "rdt_waiting_requests" in names
    assert names <= gauges
    [adapter] = load(HERE / "prometheus-adapter.yaml")
    [rule] = adapter["rules"]["custom"]
    found = re.search(r'__name__=~"([^"]*)"', rule["seriesQuery"])
    assert found is not None
    assert {name for name in gauges if re.fullmatch(found[1], name)} == names
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}


def test_the_autoscaler_is_fast_up_and_slow_down(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = one("HorizontalPodAutoscaler")["spec"]
    up, down = spec["behavior"]["scaleUp"], spec["behavior"]["scaleDown"]
    assert up["stabilizationWindowSeconds"] == 0
    assert {"type": "Percent", "value": 100, "periodSeconds": 30} in up["policies"]
    assert down["stabilizationWindowSeconds"] >= 300
    assert down["policies"] == [{"type": "Pods", "value": 1, "periodSeconds": 120}]
    settings = understood(monkeypatch, read_env(HERE / "base" / "settings.env"))
    target = pods_metrics(BASE)["rdt_waiting_requests"]
    assert target * 10 < settings.max_waiting, "more pods long before the first refusal"
    assert f"{target} waiting" in README


def test_the_container_may_do_nothing_it_need_not() -> None:
    assert pod()["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod().keys()
    whole = pod()["securityContext"]
    assert whole["runAsNonRoot"] is True
    assert whole["runAsUser"] > 0
    assert whole["runAsGroup"] > 0
    assert whole["seccompProfile"] == {"type": "RuntimeDefault"}
    assert server()["securityContext"] == {
        "allowPrivilegeEscalation": False, "privileged": False, "readOnlyRootFilesystem": True, "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }  # fmt: skip
    assert server()["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert next(volume for volume in pod()["volumes"] if volume["name"] == "tmp")["emptyDir"]["sizeLimit"]
    resources = server()["resources"]
    assert resources["requests"] == resources["limits"], "cores of its own, and memory that is there"


def test_keys_come_from_a_secret_that_need_not_be_there() -> None:
    assert {"secretRef": {"name": "rdt-keys", "optional": True}} in server()["envFrom"]
    assert not any("KEY" in name for path in HERE.rglob("*.env") for name in read_env(path))


def test_the_network_policy_opens_the_two_ports_and_nothing_else() -> None:
    spec = one("NetworkPolicy")["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}
    assert spec["egress"] == []
    [rule] = spec["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": port} for port in ports().values()]
    assert {"podSelector": {}} in rule["from"], "the namespace's own pods"
    assert {} not in rule["from"]
    assert {"namespaceSelector": {}} not in rule["from"], "every namespace"


def test_the_image_is_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for folder, suffix in [("base", ""), ("overlays/gpu", "-cuda")]:
        [content] = load(HERE / folder / "kustomization.yaml")
        assert content["images"] == [{"name": server()["image"], "newTag": project["version"] + suffix}]


def test_the_readme_names_paths_that_exist() -> None:
    for name in re.findall(r"deploy/kubernetes/[\w./-]*\w", README):
        assert (ROOT / name).exists() or name.endswith("/mine"), name
    assert all(f"overlays/{name}" in README for name in OVERLAYS)


def test_the_readmes_service_config_asks_the_service_for_its_health() -> None:
    [block] = re.findall(r"^```json\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    config = json.loads(block)
    assert config["healthCheckConfig"] == {"serviceName": SERVICE}
    assert config["methodConfig"][0]["name"] == [{"service": SERVICE}]


def test_the_user_is_the_images() -> None:
    created = re.search(r"useradd .*--uid (\d+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert created is not None
    assert pod()["securityContext"]["runAsUser"] == int(created[1])


def test_prometheus_rules_become_resources_of_the_operator() -> None:
    done = subprocess.run([HERE / "prometheus-rules.sh"], capture_output=True, text=True, timeout=10, check=True)
    rules, alerts = yaml.safe_load_all(done.stdout)
    for resource, name in [(rules, "rules"), (alerts, "alerts")]:
        check(resource, OLDEST)
        assert resource["kind"] == "PrometheusRule"
        assert resource["metadata"]["name"] == f"rdt-{name}"
        assert load(ROOT / "deploy" / "prometheus" / f"{name}.yml") == [resource["spec"]]


def test_the_rules_see_the_job_the_operator_makes() -> None:
    """Its targets carry the Service's name as their job unless the monitor says otherwise."""
    assert "jobLabel" not in one("ServiceMonitor", WHOLE)["spec"]
    text = (ROOT / "deploy" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    assert set(re.findall(r'job="([^"]*)"', text)) == {one("Service")["metadata"]["name"]}
