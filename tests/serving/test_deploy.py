"""deploy/: no container engine runs here, so what the files say is held against the service and against each other."""

import contextlib
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from pipeline.storage import atomic
from serving import settings
from serving.bento import address
from serving.telemetry import metrics
from tests.support.image_files import save
from tests.support.live_server import ROOT, Server, free_port, until

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
KUBERNETES = {part["kind"]: part for part in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/marginalia.json").read_text())
ALERTS = [rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, rest), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage; a stage built on another begins with the other's."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name] = list(found.get(base, []))
        elif name:
            found[name].append((word, rest))
    return found


def expressions() -> list[str]:
    """Every query: the panels', the dashboard's variable and the alerts'."""
    panels = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    variables = [item["query"]["query"] for item in DASHBOARD["templating"]["list"]]
    return panels + variables + [rule["expr"] for rule in ALERTS]


def refused_once(server: Server, http: httpx.Client) -> None:
    """Some counters begin to exist when there is something to count: here a champion that cannot be followed."""
    pointer = server.folder / "champions" / "champion.json"
    good = pointer.read_bytes()
    atomic.write_text(pointer, "not a pointer")
    until(lambda: 'marginalia_candidates_refused_total{cause="pointer"}' in http.get("/metrics").text)
    atomic.write_bytes(pointer, good)


def test_queries_use_what_a_server_offers(server: Server, http: httpx.Client) -> None:
    picture = save(Image.fromarray(np.zeros((20, 30, 3), np.uint8)))
    for body in (picture, b"no image"):
        http.post("/v1/segment", content=body, headers={"Content-Type": "application/octet-stream"})
    refused_once(server, http)
    offered: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        offered.setdefault(family.name, set())  # a gauge that has no value yet
        for sample in family.samples:
            offered.setdefault(sample.name, set()).update(sample.labels)
    added = {"instance", "job"}  # by Prometheus, to every series
    used: set[str] = set()
    for query in expressions():
        for name, matchers in re.findall(r"\b(marginalia_\w+|up)\b(?:\{([^}]*)\})?", query):
            labels = set(re.findall(r"(\w+)=~?\"", matchers))
            if name != "up":
                assert name in offered, query
                assert labels <= offered[name] | added, query
                used.add(name)
        for grouping in re.findall(r"(?:by|ignoring) ?\(([^)]*)\)", query):
            known = set.union(added, *(offered[name] for name in re.findall(r"marginalia_\w+", query)))
            assert {label.strip() for label in grouping.split(",")} <= known, query
    assert len(used) >= 8


def test_queries_ask_for_labels_that_can_be() -> None:
    allowed = {
        "reason": metrics.REASONS, "phase": metrics.PHASES, "answer": metrics.ANSWERS, "result": metrics.SWAPS,
        "job": {"marginalia"}, "instance": {"$instance"},
    }  # fmt: skip
    for query in expressions():
        for label, values in re.findall(r'(\w+)=~?"([^"]*)"', query):
            assert set(values.split("|")) <= set(allowed[label]), query


def test_alerts_cover_what_was_promised() -> None:
    assert {rule["alert"] for rule in ALERTS} == {
        "MarginaliaNotReady", "MarginaliaErrors", "MarginaliaSlow", "MarginaliaOverloaded", "MarginaliaBundleRefused",
        "MarginaliaConfidenceDrift", "MarginaliaRestarted",
    }  # fmt: skip
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"].keys() == {"summary", "description"}


def test_prometheus_reads_the_rules_and_every_query(tmp_path: Path) -> None:
    if not (promtool := shutil.which("promtool")):
        pytest.skip("promtool is not installed")
    subprocess.run([promtool, "check", "config", DEPLOY / "prometheus.yml"], check=True, capture_output=True)
    variables = {"$__rate_interval": "1m", "$__range": "6h", "$instance": ".*"}
    queries = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    for name, value in variables.items():
        queries = [query.replace(name, value) for query in queries]
    rules = [{"record": f"query:{i}", "expr": query} for i, query in enumerate(queries)]
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    subprocess.run([promtool, "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


def test_grafana_finds_its_source_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/marginalia.yml").read_text())["providers"]
    host, port = source["url"].removeprefix("http://").split(":")
    assert f":{port}" in SERVICES[host]["ports"][0]
    uids = {part["datasource"]["uid"] for panel in DASHBOARD["panels"] for part in (panel, *panel["targets"])}
    assert uids == {source["uid"]}
    assert provider["options"]["path"] in {volume["target"] for volume in mounts("grafana")}
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def environment(variables: dict[str, str]) -> contextlib.AbstractContextManager[object]:
    """The variables of a container, and no others."""
    return mock.patch.dict(os.environ, variables, clear=True)


def mounts(service: str) -> list[dict[str, Any]]:
    return [volume for volume in SERVICES[service]["volumes"] if isinstance(volume, dict)]


@pytest.mark.parametrize("name", list(SERVICES))
def test_containers_may_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", service["user"])
    assert {"mem_limit", "cpus", "pids_limit"} <= service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert name == "marginalia" or re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    for volume in mounts(name):
        assert volume["read_only"] is True
        source = (DEPLOY / volume["source"]).resolve()
        assert source.exists() or source == ROOT / "champions"  # which a pipeline's first run makes
    assert not [volume for volume in service["volumes"] if isinstance(volume, str) and not re.match(r"\w+:/", volume)]


def test_the_service_in_compose_and_its_scrape() -> None:
    service = SERVICES["marginalia"]
    assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
    assert ROOT / service["build"]["dockerfile"] == DEPLOY / "Dockerfile"
    assert service["build"]["target"] in stages()
    with environment({k: v for k, v in service["environment"].items() if v is not None}):
        settings.from_environment()
    _, admin = dict(stages()["service"])["EXPOSE"].split()
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": [f"marginalia:{admin}"]}]
    there = {Path(volume["target"]).name: Path(volume["target"]).parent for volume in mounts("prometheus")}
    assert all(there[name] == there["prometheus.yml"] for name in config["rule_files"])


def test_all_that_is_written_goes_to_two_folders() -> None:
    variables = {}
    for word, rest in stages()["service"]:
        if word == "ENV":
            variables |= dict(pair.split("=", 1) for pair in rest.split())
    folders = {Path("/") / Path(variables[name]).parts[1] for name in ("HOME", "TMPDIR", "BENTOML_HOME")}
    spool = Path(variables["TMPDIR"])
    assert "PROMETHEUS_MULTIPROC_DIR" not in variables
    assert variables["PYTHONDONTWRITEBYTECODE"] == "1"
    champions = Path(variables["MARGINALIA_CHAMPIONS"])
    assert champions.parent in {Path(volume["target"]) for volume in mounts("marginalia")}
    memory = {Path(mount.partition(":")[0]) for mount in SERVICES["marginalia"]["tmpfs"]}
    disk = {Path(volume.split(":")[1]) for volume in SERVICES["marginalia"]["volumes"] if isinstance(volume, str)}
    assert memory | disk == folders
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"]}
    mounted = {Path(mount["mountPath"]): volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted.keys() == folders
    assert spool in disk
    assert "medium" not in mounted[spool]  # large bodies go there so that they need no memory
    room = 2 * settings.Settings().max_large_body
    assert int(mounted[spool]["sizeLimit"].removesuffix("Gi")) << 30 >= room
    users = [rest for word, rest in stages()["service"] if word == "USER"]
    made = next(json.loads(rest) for word, rest in stages()["service"] if word == "RUN" and str(spool) in rest)
    owner, group = users[-1].split(":")
    assert {f"--owner={owner}", f"--group={group}"} <= set(made)
    assert pod["securityContext"]["fsGroup"] == int(group)


def test_the_image_listens_where_it_says() -> None:
    variables = {}
    for word, rest in stages()["service"]:
        if word == "ENV":
            variables |= dict(pair.split("=", 1) for pair in rest.split())
    exposed = dict(stages()["service"])["EXPOSE"].split()
    with environment(variables):
        admin = settings.from_environment().admin
        assert admin is not None
        assert exposed == [str(address.chosen_port(None)), str(admin[1])]
        assert (address.chosen_host(None), admin[0]) == ("0.0.0.0", "0.0.0.0")
    (asked,) = [rest for word, rest in stages()["service"] if word == "HEALTHCHECK"]
    assert f"127.0.0.1:{admin[1]}/readyz" in asked
    assert set(exposed) <= {port.rpartition(":")[2] for port in SERVICES["marginalia"]["ports"]}


def test_the_image_runs_as_nobody_in_particular_without_a_shell() -> None:
    for name in ("service", "packed"):
        found = stages()[name]
        users = [rest for word, rest in found if word == "USER"]
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
        for word, rest in found:
            if word in ("CMD", "ENTRYPOINT", "RUN", "HEALTHCHECK"):
                assert isinstance(json.loads(rest[rest.index("[") :]), list)
                assert "sh" not in json.loads(rest[rest.index("[") :])
    (install,) = [rest for word, rest in stages()["build"] if word == "RUN" and "install" in json.loads(rest)]
    assert json.loads(install)[-3:] == ["-c", "constraints.txt", ".[serve,cpu,geo]"]
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert not [line for line in extras["cpu"] if line.startswith("torch")]


def test_the_image_gets_what_the_package_is_made_of() -> None:
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    admitted = [line[1:] for line in ignored if line.startswith("!")]
    copied = [
        source
        for word, rest in stages()["build"]
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    for source in copied:
        assert (ROOT / source).exists()
        assert source in admitted
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = {pattern.removesuffix("*") for pattern in told["tool"]["setuptools"]["packages"]["find"]["include"]}
    links = {"params.yaml", "presets"}  # what pipeline/config links to
    needed = {*modules, *links, told["project"]["readme"]}
    assert needed | {"pyproject.toml", "constraints.txt", *told["project"]["license-files"]} == set(copied)
    for secret in (".git", ".venv", "data", "models", ".env"):
        assert not any(fnmatch.fnmatch(secret, pattern) for pattern in admitted)


def test_the_health_check_tells_ready_from_gone(server: Server) -> None:
    (check,) = [rest for word, rest in stages()["service"] if word == "HEALTHCHECK"]
    python, *arguments = json.loads(check[check.index("[") :])
    assert python == "python"

    def run(port: int) -> int:
        asked = [part.replace(":3010/", f":{port}/") for part in arguments]
        assert asked != arguments
        return subprocess.run([sys.executable, *asked], capture_output=True).returncode

    assert run(server.port) == 0
    assert run(free_port()) == 1


def test_kubernetes_asks_the_right_questions(http: httpx.Client) -> None:
    spec = KUBERNETES["Deployment"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [str(ports["http"]), str(ports["admin"])] == dict(stages()["packed"])["EXPOSE"].split()
    assert spec["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["admin"])
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["port"] == "admin"
        assert http.get(asked["path"]).status_code == 200
    assert container["livenessProbe"]["httpGet"]["path"] == "/livez"
    assert pod["securityContext"]["runAsNonRoot"] is True
    users = [rest for word, rest in stages()["packed"] if word == "USER"]
    assert users[-1] == "{runAsUser}:{runAsGroup}".format(**pod["securityContext"])
    inner = container["securityContext"]
    assert inner["readOnlyRootFilesystem"] is True
    assert inner["allowPrivilegeEscalation"] is False
    assert inner["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys() & container["resources"]["requests"].keys()


def test_kubernetes_parts_mean_each_other() -> None:
    spec = KUBERNETES["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"].items()
    for selector in (
        spec["selector"]["matchLabels"],
        KUBERNETES["Service"]["spec"]["selector"],
        KUBERNETES["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels
    assert selector.items()
    scaler = KUBERNETES["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == KUBERNETES["Deployment"]["metadata"]["name"]
    assert "replicas" not in spec
    assert scaler["minReplicas"] > KUBERNETES["PodDisruptionBudget"]["spec"]["maxUnavailable"]
    (metric,) = scaler["metrics"]
    assert metric["resource"]["name"] == "cpu"
    assert "cpu" in spec["template"]["spec"]["containers"][0]["resources"]["requests"]  # what a utilisation is of


def test_the_settings_bear_what_kubernetes_adds_for_this_service() -> None:
    """The variables of links to services, as the kubelet makes them, were they not switched off."""
    (container,) = KUBERNETES["Deployment"]["spec"]["template"]["spec"]["containers"]
    given = {item["name"]: item.get("value", "2") for item in container["env"]}
    name = KUBERNETES["Service"]["metadata"]["name"].upper().replace("-", "_")
    links = {f"{name}_SERVICE_HOST": "10.0.0.7"}
    for i, port in enumerate(KUBERNETES["Service"]["spec"]["ports"]):
        number, url = port["port"], f"tcp://10.0.0.7:{port['port']}"
        links |= {f"{name}_SERVICE_PORT_{port['name'].upper()}": str(number), f"{name}_PORT_{number}_TCP": url}
        links |= {f"{name}_PORT_{number}_TCP_PROTO": "tcp", f"{name}_PORT_{number}_TCP_ADDR": "10.0.0.7"}
        links |= {f"{name}_PORT_{number}_TCP_PORT": str(number)}
        if not i:
            links |= {f"{name}_SERVICE_PORT": str(number), f"{name}_PORT": url}
    with environment(given):
        without_links = settings.from_environment()
    with environment(given | links):
        assert settings.from_environment() == without_links
        assert settings.ignored() == sorted(links)
    assert KUBERNETES["Deployment"]["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_what_is_under_way_has_the_time_to_end() -> None:
    """Before the container is killed: the pause before SIGTERM, the longest answer, and the rest of the end."""
    rest_s = 20
    compose = {k: v for k, v in SERVICES["marginalia"]["environment"].items() if v is not None}
    with environment(compose):
        longest = settings.from_environment().drain_limit_s
    assert int(SERVICES["marginalia"]["stop_grace_period"].removesuffix("s")) >= longest + rest_s
    pod = KUBERNETES["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    with environment({item["name"]: item["value"] for item in container["env"] if "value" in item}):
        longest = settings.from_environment().drain_limit_s
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + longest + rest_s
