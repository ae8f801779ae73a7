"""Manifests of `infra/`: rendered, and checked against their schemas and against the repository."""

import copy
import functools
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from ray.scripts.scripts import drain_node
from ray.serve.schema import ServeDeploySchema

from mellow_platform import cluster
from mellow_platform.evaluation.evaluate_config import EvaluateConfig
from mellow_platform.preprocessing.preprocess_config import PreprocessConfig
from mellow_platform.settings import Section, load
from mellow_platform.training.train_config import TrainConfig
from serve.limits import RequestLimits
from tests.conftest import NEEDS_KUBECTL, REPOSITORY, SHARED

Manifest = dict[str, Any]

INFRA = REPOSITORY / "infra"
IMAGE = INFRA / "image"
CRDS = SHARED / "kuberay-crds"
KUBERNETES = "1.33"
PLACES = ("local", "gpu")
JOBS: dict[str, type[Section]] = {"preprocess": PreprocessConfig, "train": TrainConfig, "evaluate": EvaluateConfig}
# Folders whose kustomization can be applied.
APPLIED = sorted(
    str(file.parent.relative_to(INFRA))
    for file in INFRA.rglob("kustomization.yaml")
    if file.relative_to(INFRA).parts[0] != "components"
)
KUBERAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
NOT_VALIDATED = {"PodMonitor": "no package contains the Prometheus operator's schema"}
# Secrets that a user must create.
SECRETS = {"mellow-s3", "mellow-api-keys", "mellow-redis", "mellow-tls"}
TAG = re.compile(r"(?P<project>[\d.]+)-ray(?P<ray>[\d.]+)-py(?P<python>[\d.]+)-(?P<accelerator>cpu|cuda)")

pytestmark = NEEDS_KUBECTL


@functools.cache
def rendered(folder: str) -> tuple[Manifest, ...]:
    return tuple(cluster.render(INFRA / folder))


def one(folder: str, kind: str) -> Manifest:
    (found,) = [manifest for manifest in rendered(folder) if manifest["kind"] == kind]
    return found


def groups(spec: Manifest) -> dict[str, Manifest]:
    """Return the groups of a cluster's spec by name."""
    return {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}


def cluster_specs() -> Iterator[tuple[str, Manifest]]:
    """Yield (folder, spec) of every rendered cluster, including those of jobs and the endpoint."""
    for folder in APPLIED:
        for manifest in rendered(folder):
            spec = manifest.get("spec", {})
            found = (
                spec if manifest["kind"] == "RayCluster" else spec.get("rayClusterSpec", spec.get("rayClusterConfig"))
            )
            if found:
                yield folder, found


def pods(manifests: tuple[Manifest, ...]) -> Iterator[Manifest]:
    """Yield the spec of every pod template in manifests."""
    todo: list[Any] = list(manifests)
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            if "containers" in value:
                yield value
            todo += value.values()
        elif isinstance(value, list):
            todo += value


def container(group: Manifest) -> Manifest:
    return group["template"]["spec"]["containers"][0]


def environment(of: Manifest) -> dict[str, str]:
    return {item["name"]: item["value"] for item in of.get("env", []) if "value" in item}


# Schemas


def strict(schema: Any) -> Any:
    """Return a CRD's schema as a JSON schema that refuses unknown fields, like the API server's strict validation."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    result = {
        key: strict(value) for key, value in schema.items() if key not in ("description", "properties", "default")
    }
    if "properties" in schema:
        result["properties"] = {name: strict(value) for name, value in schema["properties"].items()}
    if schema.get("type") == "object" and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


@functools.cache
def crd_validator(kind: str) -> jsonschema.Draft202012Validator:
    if not CRDS.is_dir():
        pytest.skip(f"{CRDS} is missing: no KubeRay schemas")
    definition = yaml.load((CRDS / f"ray.io_{KUBERAY_KINDS[kind]}.yaml").read_text(), yaml.CSafeLoader)
    (version,) = [version for version in definition["spec"]["versions"] if version["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # its schema is built into the API server
    return jsonschema.Draft202012Validator(schema)


def faults(manifest: Manifest) -> list[str]:
    """Return the errors of a manifest under the schema of its kind."""
    kind = manifest["kind"]
    if kind in KUBERAY_KINDS:
        return [f"{error.json_path}: {error.message}" for error in crd_validator(kind).iter_errors(manifest)]
    try:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message}"]
    return []


@pytest.mark.parametrize("folder", APPLIED)
def test_rendered_manifests_fit_their_schemas(folder: str):
    for manifest in rendered(folder):
        if manifest["kind"] not in NOT_VALIDATED:
            assert not faults(manifest), f"{manifest['kind']} {manifest['metadata']['name']}"


def test_kinds_without_schema_are_rendered():
    kinds = {manifest["kind"] for folder in APPLIED for manifest in rendered(folder)}
    assert kinds >= set(NOT_VALIDATED), "a kind in NOT_VALIDATED is rendered nowhere"


def test_validation_finds_unknown_fields_and_wrong_types():
    cases: list[tuple[str, str, list[Any], Any, str]] = [
        ("gpu", "RayCluster", ["spec", "headGroupSpec", "rayStartParam"], {}, "rayStartParam"),
        ("gpu", "RayCluster", ["spec", "workerGroupSpecs", 0, "maxReplicas"], "16", "maxReplicas"),
        ("gpu/train", "RayJob", ["spec", "rayClusterSpec", "authOptions", "mode"], "tokens", "mode"),
        ("gpu/train", "RayJob", ["spec", "rayClusterSpec", "headGroupSpec", "template", "spec", "nodeselector"], {},
         "nodeselector"),
        ("gpu/endpoint", "RayService", ["spec", "rayClusterSpec"], {}, "rayClusterSpec"),
        ("gpu", "StatefulSet", ["spec", "template", "spec", "container"], [], "container"),
        ("gpu/endpoint", "Ingress", ["spec", "rules", 0, "hosts"], "x", "hosts"),
    ]  # fmt: skip
    for folder, kind, path, value, named in cases:
        broken = copy.deepcopy(one(f"overlays/{folder}", kind))
        target: Any = broken
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = value
        found = faults(broken)
        assert any(named in fault for fault in found), (path, found)


def test_jobs_with_kueue_are_valid(tmp_path: Path):
    def relative(folder: str) -> str:
        return os.path.relpath(INFRA / folder, tmp_path)

    overlay = {"resources": [relative("overlays/gpu/train")], "components": [relative("components/kueue")]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    (job,) = [manifest for manifest in cluster.render(tmp_path) if manifest["kind"] == "RayJob"]
    assert not faults(job)
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    # The operator accepts `suspend` only if the job's cluster ends with the job.
    assert job["spec"]["suspend"] and job["spec"]["shutdownAfterJobFinishes"] and "clusterSelector" not in job["spec"]


@pytest.mark.parametrize("place", PLACES)
def test_endpoint_has_applications_of_serve_configuration(place: str):
    config = yaml.safe_load(one(f"overlays/{place}/endpoint", "RayService")["spec"]["serveConfigV2"])
    expected = yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())
    for application in expected["applications"]:
        application["deployments"][0]["autoscaling_config"]["min_replicas"] = 2  # so that a node can be lost
    assert config == expected
    # Ray's schema ignores unknown fields, so the parsed fields are compared.
    parsed = ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True)
    assert set(config) == set(parsed)
    for given, application in zip(config["applications"], parsed["applications"], strict=True):
        assert set(given) == set(application)
        for deployment, options in zip(given["deployments"], application["deployments"], strict=True):
            assert set(deployment) == set(options)
        module, function = given["import_path"].split(":")
        assert f"\ndef {function}(" in (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()


# One definition


def test_node_groups_are_defined_in_one_file():
    pattern = re.compile(r"^ *(- )?(groupName|headGroupSpec|workerGroupSpecs|rayVersion):", re.M)
    assert [file for file in INFRA.rglob("*.yaml") if pattern.search(file.read_text())] == [INFRA / "base/cluster.yaml"]


@pytest.mark.parametrize("place", PLACES)
def test_jobs_and_endpoint_have_groups_of_overlay(place: str):
    definition = one(f"overlays/{place}/cluster", "RayCluster")["spec"]
    assert list(groups(definition)) == ["head", "cpu", "gpu", "serving"]
    for job in JOBS:
        spec = one(f"overlays/{place}/{job}", "RayJob")["spec"]
        assert spec["rayClusterSpec"] == definition
        assert "clusterSelector" not in spec
        assert spec["shutdownAfterJobFinishes"]
    service = one(f"overlays/{place}/endpoint", "RayService")["spec"]["rayClusterConfig"]
    for name, group in groups(service).items():
        changed = {"replicas", "minReplicas"}
        of_place = groups(definition)[name]
        assert {key: value for key, value in group.items() if key not in changed} == {
            key: value for key, value in of_place.items() if key not in changed
        }
    for name in ("cpu", "serving"):
        group = groups(service)[name]
        assert 2 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_job_without_own_cluster_selects_the_long_lived_one():
    name = one("overlays/gpu", "RayCluster")["metadata"]["name"]
    for job in JOBS:
        spec = one(f"jobs/{job}", "RayJob")["spec"]
        assert spec["clusterSelector"] == {"ray.io/cluster": name}
        assert "rayClusterSpec" not in spec


def test_clusters_require_token_autoscale_and_spare_head():
    for folder, spec in cluster_specs():
        assert spec["authOptions"]["mode"] == "token", folder
        assert spec["enableInTreeAutoscaling"] and spec["autoscalerOptions"]["version"] == "v2", folder
        assert groups(spec)["head"]["resources"] == {"CPU": "0"}, folder
        for name, group in groups(spec).items():
            assert group["labels"]["ray.io/node-group"] == name, folder
            # The operator refuses these parameters if the group also has fields for them.
            assert not {"num-cpus", "num-gpus", "memory", "resources", "labels"} & set(group["rayStartParams"])


# Installed packages


def lock(name: str) -> dict[str, str]:
    """Return the versions in a lock file by package."""
    found = re.findall(r"^([\w.-]+)==(\S+)", (IMAGE / name).read_text(), re.M)
    return {canonicalize_name(package): version for package, version in found}


def dockerfile_argument(name: str) -> str:
    found = re.findall(rf"^ARG {name}=(\S+)$", (IMAGE / "Dockerfile").read_text(), re.M)
    assert len(found) == 1
    return found[0]


def project() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def test_versions_of_ray_python_and_project_agree():
    tags = set()
    for folder, spec in cluster_specs():
        for group in groups(spec).values():
            image, _, tag = container(group)["image"].partition(":")
            assert image.split("/")[-1] == "mellow", folder
            tags.add(tag)
        assert spec["rayVersion"] == lock("requirements.lock")["ray"], folder
    accelerators = set()
    for tag in tags:
        match = TAG.fullmatch(tag)
        assert match, tag
        assert match["project"] == project()["version"]
        assert match["ray"] == lock("requirements.lock")["ray"]
        assert match["python"] == dockerfile_argument("PYTHON")
        accelerators.add(match["accelerator"])
        assert f"mellow:{tag}" in (IMAGE / "Dockerfile").read_text(), "the Dockerfile says how the image is built"
    assert accelerators == {"cpu", "cuda"}
    assert dockerfile_argument("PYTHON") in SpecifierSet(project()["requires-python"])
    for file in IMAGE.glob("*.lock"):
        assert f"for Python {dockerfile_argument('PYTHON')} on" in file.read_text().splitlines()[0]


def test_locked_versions_are_in_range_and_hashed():
    locked = lock("requirements.lock")
    extras = project()["optional-dependencies"]
    for line in project()["dependencies"] + extras["mlflow"] + extras["otel"]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        for versions in [lock("torch-cpu.lock"), lock("torch-cuda.lock")] if name == "torch" else [locked]:
            assert requirement.specifier.contains(versions[name]), line
    assert "torch" not in locked
    assert lock("torch-cpu.lock")["torch"].split("+") == [lock("torch-cuda.lock")["torch"], "cpu"]
    for package, version in lock("torch-cuda.lock").items():
        assert locked.get(package, version) == version, f"{package} is locked twice, differently"
    for file in IMAGE.glob("*.lock"):
        for entry in re.split(r"^(?=[\w.-]+==)", file.read_text(), flags=re.M)[1:]:
            assert "--hash=sha256:" in entry, f"{file.name}: {entry}"


def test_image_copies_only_allowed_files():
    dockerfile = (IMAGE / "Dockerfile").read_text()
    allowed = [line[1:] for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = re.findall(r"^COPY (?!--from)(\S+) ", dockerfile, re.M)
    assert sorted(copied) == sorted(allowed)
    for source in copied:
        assert list(REPOSITORY.glob(source)), source
    assert re.search(r"^USER (?!0)\d+:\d+$", dockerfile, re.M)
    path = dict.fromkeys(re.findall(r"PYTHONPATH=(\S+)", dockerfile))
    assert list(path) == ["/app:/app/platform"]


# Commands


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("job", JOBS)
def test_entrypoint_is_a_valid_job_command(place: str, job: str, monkeypatch: pytest.MonkeyPatch):
    """Run as on the cluster: in the repository's folder, with the settings of the overlay as variables."""
    monkeypatch.chdir(REPOSITORY)
    for name, value in one(f"overlays/{place}", "ConfigMap")["data"].items():
        monkeypatch.setenv(name, value)
    entrypoint = one(f"overlays/{place}/{job}", "RayJob")["spec"]["entrypoint"]
    assert entrypoint == one(f"jobs/{job}", "RayJob")["spec"]["entrypoint"]
    expanded = os.path.expandvars(entrypoint)
    assert "$" not in expanded, "a variable that no setting gives"
    program, script, *arguments = shlex.split(expanded)
    assert (program, script) == ("python", f"jobs/{job}.py")
    assert Path(script).is_file()
    load(JOBS[job], arguments)  # exits if an option or the file of --config does not exist


def test_nodes_drain_longer_than_replicas_and_proxies():
    deployments = [
        deployment
        for application in yaml.safe_load((REPOSITORY / "serve/config.yaml").read_text())["applications"]
        for deployment in application["deployments"]
    ]
    (endpoint, model) = (deployment["graceful_shutdown_timeout_s"] for deployment in deployments)
    limits, slowest = RequestLimits(), max(endpoint, model)
    assert endpoint > limits.body_seconds + limits.answer_seconds
    assert model > limits.answer_seconds
    known = {option for parameter in drain_node.params for option in parameter.opts}
    for folder, spec in cluster_specs():
        for name, group in groups(spec).items():
            if name == "head":
                continue
            shell, option, script = container(group)["lifecycle"]["preStop"]["exec"]["command"]
            assert (shell, option) == ("bash", "-c")
            notice, wait = map(shlex.split, script.split("&&"))
            assert notice[:2] == ["ray", "drain-node"]
            assert {word for word in notice if word.startswith("--")} <= known
            seconds = int(notice[notice.index("--deadline-remaining-seconds") + 1])
            assert (wait[0], int(wait[1])) == ("timeout", seconds)
            assert int(environment(container(group))["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]) == seconds
            proxy = float(environment(container(group))["RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S"])
            grace = group["template"]["spec"]["terminationGracePeriodSeconds"]
            assert slowest + proxy < seconds < grace, (folder, name)


# Production


@pytest.mark.parametrize("folder", APPLIED)
def test_containers_are_unprivileged_and_read_only(folder: str):
    for pod in pods(rendered(folder)):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
        for each in pod["containers"]:
            context = each["securityContext"]
            assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
            assert context["capabilities"]["drop"] == ["ALL"]
            assert each["livenessProbe"]
    for _, spec in [item for item in cluster_specs() if item[0] == folder]:
        assert spec["autoscalerOptions"]["securityContext"]["readOnlyRootFilesystem"]
        for name, group in groups(spec).items():
            mounts = {mount["mountPath"] for mount in container(group)["volumeMounts"]}
            assert {"/tmp", "/cache"} <= mounts, "Ray and the model hub need a place to write"
            # For other groups the operator adds a probe that also checks the HTTP proxy.
            assert ("readinessProbe" in container(group)) == (name in ("head", "gpu"))
            assert group["template"]["spec"]["automountServiceAccountToken"] == (name == "head")


@pytest.mark.parametrize("folder", APPLIED)
def test_references_are_rendered_or_known_secrets(folder: str):
    manifests = rendered(folder)
    existing = {(manifest["kind"], manifest["metadata"]["name"]) for manifest in manifests}
    text = yaml.safe_dump(list(manifests))
    for kind, key in (("ServiceAccount", "serviceAccountName"), ("PersistentVolumeClaim", "claimName")):
        for name in re.findall(rf"\b{key}: (\S+)", text):
            assert (kind, name) in existing
    for name in re.findall(r"configMapRef:\s+name: (\S+)", text):
        assert ("ConfigMap", name) in existing
    referred = re.findall(r"secret(?:KeyRef|Ref):\s+(?:key: \S+\s+)?name: (\S+)", text)
    assert set(referred) | set(re.findall(r"secretName: (\S+)", text)) <= SECRETS
    assert not any(manifest["kind"] == "Secret" for manifest in manifests), "a secret in the repository is none"


def test_gpu_overlay_trains_on_spot_and_serves_on_demand():
    spec = groups(one("overlays/gpu", "RayCluster")["spec"])
    capacity = {
        name: group["template"]["spec"].get("nodeSelector", {}).get("karpenter.sh/capacity-type")
        for name, group in spec.items()
    }
    assert capacity == {"head": "on-demand", "cpu": None, "gpu": "spot", "serving": "on-demand"}
    assert spec["gpu"]["labels"]["ray.io/market-type"] == "spot"
    for name in ("gpu", "serving"):
        pod = spec[name]["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "nvidia.com/gpu" in {toleration.get("key") for toleration in pod["tolerations"]}
        assert pod["nodeSelector"]["nvidia.com/gpu.present"] == "true"
    for name, group in spec.items():
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert volumes["cache"]["persistentVolumeClaim"]["claimName"] == "mellow-cache", name
        if name != "head":
            spread = group["template"]["spec"]["topologySpreadConstraints"]
            assert {rule["topologyKey"] for rule in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}


def test_only_long_lived_clusters_have_redis():
    long_lived = one("overlays/gpu", "RayCluster")["spec"]
    service = one("overlays/gpu/endpoint", "RayService")["spec"]["rayClusterConfig"]
    redis = {manifest["metadata"]["name"] for manifest in rendered("overlays/gpu") if manifest["kind"] == "Service"}
    for spec in (long_lived, service):
        options = spec["gcsFaultToleranceOptions"]
        assert re.fullmatch(r"redis://([\w-]+):6379", options["redisAddress"])[1] in redis  # type: ignore[index]
        assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "mellow-redis"
        assert "externalStorageNamespace" not in options, "two clusters of an upgrade would share their state"
    for job in JOBS:
        assert "gcsFaultToleranceOptions" not in one(f"overlays/gpu/{job}", "RayJob")["spec"]["rayClusterSpec"]


def test_network_policy_of_head():
    policies = {item["metadata"]["name"]: item["spec"] for item in rendered("overlays/gpu") if "Policy" in item["kind"]}
    head = policies["mellow-head"]
    assert head["podSelector"]["matchLabels"] == {"ray.io/node-type": "head"}
    everything, *others = head["ingress"]
    assert everything == {"from": [{"podSelector": {}}]}
    for rule in others:  # from other namespaces, only single ports
        assert all("namespaceSelector" in peer for peer in rule["from"])
        assert {port["port"] for port in rule["ports"]} <= {8265, 8000, 8080}


def test_endpoint_has_new_cluster_upgrades_and_tls():
    manifests = rendered("overlays/gpu/endpoint")
    service = one("overlays/gpu/endpoint", "RayService")
    assert service["spec"]["upgradeStrategy"]["type"] == "NewCluster"
    assert service["spec"]["excludeHeadPodFromServeSvc"]
    ingress = one("overlays/gpu/endpoint", "Ingress")["spec"]
    assert [rule["host"] for rule in ingress["rules"]] == ingress["tls"][0]["hosts"]
    backend = ingress["rules"][0]["http"]["paths"][0]["backend"]["service"]
    assert backend["name"] == f"{service['metadata']['name']}-serve-svc"
    assert service["metadata"]["name"] != one("overlays/gpu", "RayCluster")["metadata"]["name"], "<name>-head-svc"
    budgets = [item["spec"] for item in manifests if item["kind"] == "PodDisruptionBudget"]
    protected = {budget["selector"]["matchLabels"].get("ray.io/group") for budget in budgets}
    assert protected >= {"cpu", "serving"}
    assert all(isinstance(budget["minAvailable"], int) for budget in budgets), "of a CRD's pods, only numbers count"


def test_local_overlay_requests_no_gpu_and_little_memory():
    for name, group in groups(one("overlays/local", "RayCluster")["spec"]).items():
        assert "gpu" not in yaml.safe_dump(container(group)["resources"]), name
        assert int(container(group)["resources"]["limits"]["memory"].removesuffix("Gi")) <= 4
