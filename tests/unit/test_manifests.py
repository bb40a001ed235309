"""The manifests hold together: schemas, secrets, a Serve configuration that our code loads."""

import copy
import importlib
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cluster.config import FleetConfig
from cluster.config_loader import load, parse_bytes
from replica.serving.keys import ADMIN_KEYS, API_KEYS
from router import environment

MANIFESTS = Path(__file__).parents[2] / "manifests"
OVERLAYS = sorted(path.name for path in (MANIFESTS / "overlays").iterdir())
Document = dict[str, Any]


def read(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def kustomization(folder: Path) -> Document:
    (document,) = read(folder / "kustomization.yaml")
    return document


def base() -> list[Document]:
    folder = MANIFESTS / "base"
    return [d for name in kustomization(folder)["resources"] for d in read(folder / name)]


def built(overlay: str) -> list[Document]:
    """The base with an overlay's patches: as much of kustomize as our overlays use."""
    documents = copy.deepcopy(base())
    folder = MANIFESTS / "overlays" / overlay
    settings = kustomization(folder)
    assert settings["resources"] == ["../../base"]
    for patch in settings["patches"]:
        if "path" in patch:
            for changes in read(folder / patch["path"]):
                merge(find(documents, changes["kind"], changes["metadata"]["name"]), changes)
        else:
            target = find(documents, patch["target"]["kind"], patch["target"]["name"])
            for operation in yaml.safe_load(patch["patch"]):
                apply(target, operation)
    return documents


def merge(target: Document, changes: Document) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(target[key], value)
        else:
            assert not isinstance(value, list), f"{key}: patch lists by JSON patch"
            target[key] = value


def apply(target: Any, operation: Document) -> None:
    """RFC 6902; refuses to replace or remove what is not there."""
    *parents, last = operation["path"].removeprefix("/").split("/")
    for part in parents:
        target = target[int(part) if isinstance(target, list) else part]
    assert operation["op"] in ("add", "replace", "remove")
    assert (last in target) or operation["op"] == "add", operation["path"]
    if operation["op"] == "remove":
        del target[last]
    else:
        target[last] = operation["value"]


def find(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [d for d in documents if d["kind"] == kind and d["metadata"]["name"] == name]
    return found


@pytest.fixture(params=["base", *OVERLAYS])
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return base() if request.param == "base" else built(request.param)


@pytest.fixture
def service(documents: list[Document]) -> Document:
    return find(documents, "RayService", "lorafleet")


@pytest.fixture
def serve(service: Document) -> Document:
    """The Serve configuration inside."""
    config: Document = yaml.safe_load(service["spec"]["serveConfigV2"])
    return config


def templates(service: Document) -> dict[str, Document]:
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **groups}


def pod_specs(documents: list[Document]) -> dict[str, Document]:
    """Every pod that the documents will start, by what starts it."""
    specs: dict[str, Document] = {}
    for document in documents:
        if document["kind"] == "RayService":
            specs |= {name: template["spec"] for name, template in templates(document).items()}
        elif "template" in document.get("spec", {}):
            specs[document["metadata"]["name"]] = document["spec"]["template"]["spec"]
    return specs


def containers(documents: list[Document]) -> list[Document]:
    return [c for spec in pod_specs(documents).values() for c in spec["containers"]]


def variables(container: Document) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in container.get("env", [])}


def test_every_file_is_named_by_a_kustomization() -> None:
    for folder in (MANIFESTS / "base", *(MANIFESTS / "overlays" / name for name in OVERLAYS)):
        settings = kustomization(folder)
        paths = [patch["path"] for patch in settings.get("patches", []) if "path" in patch]
        named = {name for name in settings["resources"] + paths if not name.startswith("..")}
        there = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
        assert named == there


def test_core_kinds_fit_their_schemas(documents: list[Document]) -> None:
    version = kubernetes_validate.latest_version()
    core = [d for d in documents if not d["apiVersion"].startswith("ray.io/")]
    assert len(core) >= 5
    for document in core:
        kubernetes_validate.validate(document, version, strict=True)


def test_ray_pods_fit_the_schema_of_pods(service: Document) -> None:
    version = kubernetes_validate.latest_version()
    for name, template in templates(service).items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}}
        kubernetes_validate.validate({**pod, "spec": template["spec"]}, version, strict=True)


def test_ray_is_the_version_that_we_install(service: Document) -> None:
    pins = (MANIFESTS.parent / "constraints.txt").read_text()
    assert f"\nray=={service['spec']['rayClusterConfig']['rayVersion']}\n" in pins


def test_serve_itself_accepts_its_configuration(serve: Document) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve)
    assert serve["http_options"]["host"] == "0.0.0.0"


def test_the_application_exists_and_its_arguments_load(serve: Document) -> None:
    (application,) = serve["applications"]
    module, _, attribute = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    config = load(FleetConfig, application["args"])
    # What Serve would show to anyone comes by environment; host and port are Serve's to set.
    assert not {"redis_url", "api_keys", "admin_keys", "host", "port"} & set(application["args"])
    assert config.engine.model.startswith("/models/")


def test_memory_is_left_to_the_engine_within_what_its_pod_has(
    service: Document, serve: Document
) -> None:
    engine = serve["applications"][0]["args"]["engine"]
    assert [name for name in engine if name.endswith("_memory")] == []
    for template in templates(service).values():
        assert "memory" in template["spec"]["containers"][0]["resources"]["limits"]


def test_replicas_can_write_their_directory_and_adapters_fit_in_it(
    service: Document, serve: Document
) -> None:
    config = load(FleetConfig, serve["applications"][0]["args"])
    assert config.adapter_disk is not None
    for name, template in templates(service).items():
        if name == "head":
            continue  # it runs no replicas
        spec = template["spec"]
        mounts = {m["mountPath"]: m for m in spec["containers"][0]["volumeMounts"]}
        mount = mounts[config.directory]
        (volume,) = (v for v in spec["volumes"] if v["name"] == mount["name"])
        assert not mount.get("readOnly")
        limit = parse_bytes(volume["emptyDir"]["sizeLimit"] + "B", "sizeLimit")
        assert config.adapter_disk < limit


def test_head_and_workers_have_the_same_environment(service: Document) -> None:
    environments = [variables(t["spec"]["containers"][0]) for t in templates(service).values()]
    assert len(environments) >= 2
    for found in environments:
        assert found == environments[0]
        environment.check(found)
        assert environment.RECOMMENDED.items() <= found.items()
        assert {environment.REDIS_URL, API_KEYS, ADMIN_KEYS} <= set(found)
        dockerfile = (MANIFESTS / "Dockerfile").read_text()
        assert f"> {found['RAY_SERVE_HAPROXY_BINARY_PATH']} " in dockerfile


def test_references_between_variables_point_backwards(documents: list[Document]) -> None:
    """Kubernetes leaves $(NAME) as it stands unless NAME was defined earlier in the list."""
    for container in containers(documents):
        earlier: set[str] = set()
        for entry in container.get("env", []):
            assert set(re.findall(r"\$\((\w+)\)", entry.get("value", ""))) <= earlier
            earlier.add(entry["name"])


def test_every_secret_key_is_generated_and_none_is_committed(documents: list[Document]) -> None:
    (generator,) = kustomization(MANIFESTS / "base")["secretGenerator"]
    (file,) = generator["envs"]
    assert file in (MANIFESTS.parent / ".gitignore").read_text().splitlines()
    example = (MANIFESTS / "base" / f"{file}.example").read_text().splitlines()
    keys = dict(line.split("=", 1) for line in example if line and not line.startswith("#"))
    assert set(keys.values()) == {"", keys["address"]}
    wanted = [
        source["secretKeyRef"]
        for container in containers(documents)
        for source in variables(container).values()
        if isinstance(source, dict)
    ]
    assert {reference["name"] for reference in wanted} == {generator["name"]}
    assert {reference["key"] for reference in wanted} == set(keys)


def test_every_container_has_probes_and_resources(documents: list[Document]) -> None:
    for container in containers(documents):
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]
        ports = {port["name"] for port in container["ports"]}
        for probe in ("readinessProbe", "livenessProbe"):
            port = container[probe].get("httpGet", {}).get("port")
            assert port is None or isinstance(port, int) or port in ports


def test_volumes_lead_to_claims(documents: list[Document]) -> None:
    claims = {d["metadata"]["name"] for d in documents if d["kind"] == "PersistentVolumeClaim"}
    for spec in pod_specs(documents).values():
        for volume in spec.get("volumes", []):
            if "emptyDir" not in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
    redis = find(documents, "StatefulSet", "lorafleet-redis")["spec"]
    (claim,) = redis["volumeClaimTemplates"]
    (container,) = redis["template"]["spec"]["containers"]
    assert claim["metadata"]["name"] in {m["name"] for m in container["volumeMounts"]}


def test_services_and_budgets_select_pods(documents: list[Document], service: Document) -> None:
    labels = [t["metadata"]["labels"] for t in templates(service).values()]
    labels += [
        d["spec"]["template"]["metadata"]["labels"] for d in documents if d["kind"] == "StatefulSet"
    ]
    selectors = [d["spec"]["selector"] for d in documents if d["kind"] == "Service"]
    selectors += [
        d["spec"]["selector"]["matchLabels"]
        for d in documents
        if d["kind"] == "PodDisruptionBudget"
    ]
    assert len(selectors) == 2
    for selector in selectors:
        assert any(selector.items() <= found.items() for found in labels)


def test_clients_reach_haproxy_and_nothing_else(
    documents: list[Document], service: Document
) -> None:
    ray = find(documents, "NetworkPolicy", "lorafleet-ray")["spec"]
    (selected,) = ray["podSelector"]["matchExpressions"]
    for template in templates(service).values():
        assert template["metadata"]["labels"][selected["key"]] in selected["values"]
    to_all = [rule for rule in ray["ingress"] if "from" not in rule]
    (port,) = find(documents, "RayService", "lorafleet")["spec"]["serveService"]["spec"]["ports"]
    assert to_all == [{"ports": [{"port": port["targetPort"]}]}]
    redis = find(documents, "NetworkPolicy", "lorafleet-redis")["spec"]
    state = find(documents, "StatefulSet", "lorafleet-redis")["spec"]["template"]
    assert redis["podSelector"]["matchLabels"].items() <= state["metadata"]["labels"].items()
    ((source,),) = (rule["from"] for rule in redis["ingress"])
    assert source["podSelector"] == ray["podSelector"]


def test_the_workers_hold_the_replicas(service: Document, serve: Document) -> None:
    config = load(FleetConfig, serve["applications"][0]["args"])
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (deployment,) = serve["applications"][0]["deployments"]
    assert deployment["name"] == "replica"
    replicas = deployment["num_replicas"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    (container,) = group["template"]["spec"]["containers"]
    resources = container["resources"]
    gpus = int(resources["limits"].get("nvidia.com/gpu", 0))
    assert (gpus > 0) == (config.engine.device == "cuda")
    if gpus:
        assert gpus * group["replicas"] >= config.replica_gpus * replicas
    cores = float(resources["requests"]["cpu"])
    assert cores * group["replicas"] >= config.cpus_per_replica * replicas


def test_a_pod_outlives_what_its_replica_may_still_stream(
    service: Document, serve: Document
) -> None:
    config = load(FleetConfig, serve["applications"][0]["args"])
    for name, template in templates(service).items():
        found = variables(template["spec"]["containers"][0])
        assert config.drain_s < float(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])
        if name != "head":
            grace_s = template["spec"]["terminationGracePeriodSeconds"]
            assert grace_s > float(found["RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S"])


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl's kustomize")
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kustomize_builds_what_we_checked(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(MANIFESTS, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "base/redis.env.example", tmp_path / "base/redis.env")
    output = subprocess.run(
        ["kubectl", "kustomize", str(tmp_path / "overlays" / overlay)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    documents = [d for d in yaml.safe_load_all(output) if d["kind"] != "Secret"]
    assert len(documents) == len(built(overlay))
    for ours in built(overlay):
        theirs = find(documents, ours["kind"], ours["metadata"]["name"])
        assert theirs.get("spec") == ours.get("spec")
