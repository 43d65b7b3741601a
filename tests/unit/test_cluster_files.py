"""The files of cluster/ by Ray's own validators, KubeRay's schemas, and a reading of the Dockerfile."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml

from serve.fastpath import switches
from serve.observe.metrics import METRICS

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"
ROOT = CLUSTER.parent
LAUNCHERS = ("aws.yaml", "gcp.yaml")
SCHEMAS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
MANIFESTS = {"RayCluster": "raycluster.yaml", "RayJob": "rayjob.yaml", "RayService": "rayservice.yaml"}


@pytest.fixture(scope="module")
def fast_path(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Switches of Serve's fast path, but for what is of one machine alone."""
    return {
        each.name: each.value
        for each in switches(tmp_path_factory.mktemp("haproxy"))
        if each.name.startswith("RAY_SERVE_") and not re.search("_PORT$|_PATH$|_FILE|_STATE_", each.name)
    }


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


# --- launcher ---------------------------------------------------------------------------------------------------------


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Filled with Ray's defaults and checked by Ray."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_is_valid(name: str) -> None:
    config = prepared(load(CLUSTER / name))
    types = config["available_node_types"]
    assert config["head_node_type"] == "head" and types["head"]["resources"] == {"CPU": 0}
    assert types["training"]["resources"]["GPU"] >= 1 and types["training"]["min_workers"] == 0
    assert "spot" in json.dumps(types["training"]["node_config"]).lower()
    for role in ("gateway", "serving"):
        assert "spot" not in json.dumps(types[role]["node_config"]).lower()
        assert "GPU" not in types[role]["resources"] and types[role]["resources"]["CPU"] > 0
    assert types["gateway"]["max_workers"] == 1
    assert {key: value["labels"]["recsys-role"] for key, value in types.items() if key != "head"} == {
        "training": "training",
        "gateway": "gateway",
        "serving": "serving",
    }
    assert 0 < config["idle_timeout_minutes"] <= 15


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize(
    "plant",
    [
        lambda config: config.update(unknown_key=1),
        lambda config: config["available_node_types"]["training"].update(gpus=1),
        lambda config: config.update(head_node_type="absent"),
        lambda config: config.update(max_workers=1),
    ],
)
def test_launcher_mistakes_are_noticed(name: str, plant: Any) -> None:
    config = load(CLUSTER / name)
    plant(config)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        prepared(config)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_asks_for_the_token_and_opens_nothing(name: str, fast_path: dict[str, str]) -> None:
    config = load(CLUSTER / name)
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        (start,) = [command for command in commands if "ray start" in command]
        before = start.split("ray start")[0]
        assert "RAY_AUTH_MODE=token" in before
        told = dict(word.split("=", 1) for word in shlex.split(before.replace(";", " ; ")) if "=" in word)
        assert fast_path.items() <= told.items()
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    assert "security_group" not in config["provider"]  # Ray's own admits SSH and the cluster itself


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_installs_the_pinned_dependencies_with_one_faiss(name: str) -> None:
    config = load(CLUSTER / name)
    training = config["available_node_types"]["training"]["worker_setup_commands"]
    for commands, faiss in ((config["setup_commands"], "cpu"), (training, "gpu")):
        (install,) = [command for command in commands if " -e " in command]
        words = shlex.split(install)
        assert words[words.index("-c") + 1] == "~/recsys/constraints.txt"
        assert words[words.index("-e") + 1] == f"~/recsys[{faiss},demo]"


# --- KubeRay ----------------------------------------------------------------------------------------------------------


def strict(node: Any) -> Any:
    """A CRD's structural schema as plain JSON Schema that refuses unknown fields, as the API server does."""
    if isinstance(node, list):
        return [strict(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-") and key != "format"}
    out.pop("nullable", None)
    for key in ("items", "additionalProperties", "anyOf", "oneOf", "allOf", "not"):
        if key in out:
            out[key] = strict(out[key])
    if "properties" in out:
        out["properties"] = {key: strict(value) for key, value in out["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            out.setdefault("additionalProperties", False)
    # What the schema gives a default is filled before it is checked.
    if "required" in out:
        filled = {key for key, value in node.get("properties", {}).items() if "default" in value}
        out["required"] = [key for key in out["required"] if key not in filled]
    if node.get("x-kubernetes-int-or-string"):
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if node.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


@pytest.fixture(scope="module")
def validators(shared_data: Path) -> dict[str, jsonschema.Draft202012Validator]:
    found = {}
    for kind, stem in SCHEMAS.items():
        schema = strict(json.loads((shared_data / "kuberay_crd" / f"{stem}.v1.json").read_text())["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found[kind] = jsonschema.Draft202012Validator(schema)
    return found


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    key = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}.get(manifest["kind"])
    return manifest["spec"] if key is None else manifest["spec"][key]


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_fits_the_schema(kind: str, validators: dict[str, jsonschema.Draft202012Validator]) -> None:
    manifest = load(CLUSTER / "kuberay" / MANIFESTS[kind])
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", kind)
    assert [f"{error.json_path}: {error.message}" for error in validators[kind].iter_errors(manifest)] == []


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_mistakes_are_noticed(kind: str, validators: dict[str, jsonschema.Draft202012Validator]) -> None:
    def broken(plant: Any) -> bool:
        manifest = load(CLUSTER / "kuberay" / MANIFESTS[kind])
        plant(manifest)
        return not validators[kind].is_valid(manifest)

    assert broken(lambda m: m["spec"].update(unknownField=1))
    assert broken(lambda m: cluster_spec(m)["authOptions"].update(mode="none"))
    assert broken(lambda m: cluster_spec(m)["workerGroupSpecs"][0].pop("template"))
    assert broken(lambda m: cluster_spec(m)["workerGroupSpecs"][0].update(maxReplicas="many"))
    assert broken(lambda m: cluster_spec(m)["headGroupSpec"]["template"]["spec"]["containers"][0].update(imag="x"))


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifest_is_closed_and_bounded(kind: str, fast_path: dict[str, str]) -> None:
    spec = cluster_spec(load(CLUSTER / "kuberay" / MANIFESTS[kind]))
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2" and spec["enableInTreeAutoscaling"] is True
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and head["rayStartParams"]["num-cpus"] == "0"
    assert "enableIngress" not in head
    for group in (head, *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            environment = {entry["name"]: entry["value"] for entry in container["env"]}
            assert fast_path.items() <= environment.items()
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert container["image"].endswith("-gpu" if gpu else "-cpu")
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert all(group["labels"] == {"recsys-role": name} for name, group in groups.items())
    if kind == "RayService":
        assert groups["gateway"]["maxReplicas"] == 1
    else:
        assert "nvidia.com/gpu" in groups["training"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    if kind != "RayJob":
        assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis://recsys-redis:6379"


def test_job_has_bounds_and_a_real_entry_point() -> None:
    from jobs.config import JobConfig
    from recsys.config import load_config

    spec = load(CLUSTER / "kuberay" / "rayjob.yaml")["spec"]
    assert spec["backoffLimit"] >= 1 and spec["activeDeadlineSeconds"] > 0 and spec["shutdownAfterJobFinishes"] is True
    words = shlex.split(spec["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.pipeline"] and (ROOT / "jobs" / "pipeline.py").is_file()
    overrides = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    config = load_config(JobConfig, ROOT / words[words.index("--config") + 1], overrides=overrides)
    assert config.compute.use_gpu and config.workdir.startswith("/mnt/recsys/")
    serve_args = serve_configs()["rayservice.yaml"]["applications"][0]["args"]
    assert serve_args["bundle_uri"] == config.publish.store


def test_claims_and_secrets_are_those_of_the_prerequisites() -> None:
    documents = list(yaml.safe_load_all((CLUSTER / "kuberay" / "prerequisites.yaml").read_text()))
    claims = {each["metadata"]["name"]: each for each in documents if each["kind"] == "PersistentVolumeClaim"}
    assert claims["recsys-events"]["spec"]["accessModes"] == ["ReadWriteOncePod"]
    services = {each["metadata"]["name"] for each in documents if each["kind"] == "Service"}
    for name in MANIFESTS.values():
        text = (CLUSTER / "kuberay" / name).read_text()
        assert set(re.findall(r"claimName: ([\w-]+)", text)) <= set(claims)
        assert set(re.findall(r"redis://([\w-]+):", text)) <= services


# --- Serve ------------------------------------------------------------------------------------------------------------


def serve_configs() -> dict[str, Any]:
    service = load(CLUSTER / "kuberay" / "rayservice.yaml")
    embedded = yaml.safe_load(service["spec"]["serveConfigV2"])
    return {"rayservice.yaml": embedded, "serve.yaml": load(CLUSTER / "serve.yaml")}


def unknown_keys(tree: dict[str, Any]) -> set[str]:
    """Keys that Ray's schemas do not have: Ray itself passes over them in silence."""
    from ray.serve import schema

    def extra(model: Any, value: dict[str, Any]) -> set[str]:
        return set(value) - set(model.model_fields)

    found = extra(schema.ServeDeploySchema, tree) | extra(schema.HTTPOptionsSchema, tree["http_options"])
    for application in tree["applications"]:
        found |= extra(schema.ServeApplicationSchema, application)
        for deployment in application["deployments"]:
            found |= extra(schema.DeploymentSchema, deployment)
            found |= extra(schema.RayActorOptionsSchema, deployment["ray_actor_options"])
    return found


@pytest.mark.parametrize("name", ["rayservice.yaml", "serve.yaml"])
def test_serve_config_is_valid(name: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    from recsys.pipeline.stage import STAGES
    from serve.config import ServeConfig

    tree = serve_configs()[name]
    ServeDeploySchema.model_validate(tree)
    assert unknown_keys(tree) == set()
    assert unknown_keys(tree | {"http_option": {}}) == {"http_option"}
    with pytest.raises(ValueError, match="port"):
        ServeDeploySchema.model_validate(tree | {"http_options": {"port": "open"}})
    (application,) = tree["applications"]
    assert application["import_path"] == "serve.app:build"
    config = ServeConfig.parse(application["args"], where=name)
    overrides = {each["name"]: each["ray_actor_options"] for each in application["deployments"]}
    assert set(overrides) == {"gateway", *STAGES}
    for deployment, options in overrides.items():
        scaling = config.gateway if deployment == "gateway" else config.stage(deployment)
        role = "gateway" if deployment == "gateway" else "serving"
        assert options["num_cpus"] == scaling.num_cpus
        assert options["label_selector"] == {"recsys-role": role}
        assert options["runtime_env"]["env_vars"]["OMP_NUM_THREADS"] == str(scaling.threads)


# --- Dockerfile -------------------------------------------------------------------------------------------------------

KNOWN = {"ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "FROM", "RUN", "USER", "WORKDIR"}


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with continued lines joined; a line that is none raises ValueError."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    found = []
    for line in joined:
        word, _, rest = line.partition(" ")
        if word not in KNOWN or not rest.strip():
            raise ValueError(f"not an instruction: {line}")
        found.append((word, rest.strip()))
    return found


def test_dockerfile(fast_path: dict[str, str]) -> None:
    found = instructions((CLUSTER / "Dockerfile").read_text())
    words = [word for word, _ in found]
    assert words.index("FROM") <= 1 and all(word == "ARG" for word in words[: words.index("FROM")])
    stages = {rest.split(" AS ")[1] for word, rest in found if word == "FROM" and " AS " in rest}
    for word, rest in found:
        if word == "COPY":
            flags, paths = [w for w in rest.split() if w.startswith("--")], [w for w in rest.split() if w[:2] != "--"]
            stage = next((flag.removeprefix("--from=") for flag in flags if flag.startswith("--from=")), None)
            assert stage is None or stage in stages
            for source in paths[:-1] if stage is None else ():
                assert (ROOT / source).exists(), source
        elif word in ("CMD", "ENTRYPOINT"):
            assert all(isinstance(each, str) for each in json.loads(rest))
    user = max(i for i, word in enumerate(words) if word == "USER")
    assert found[user][1] == "1000:1000" and "RUN" not in words[user:]
    installs = [rest for word, rest in found if word == "RUN" and "pip install" in rest]
    assert installs and all("-c constraints.txt" in rest and "${EXTRA}" in rest for rest in installs)
    settings = [each for word, rest in found if word == "ENV" for each in shlex.split(rest)]
    environment = dict(setting.split("=", 1) for setting in settings)
    assert (fast_path | {"RAY_AUTH_MODE": "token"}).items() <= environment.items()
    with pytest.raises(ValueError, match="not an instruction"):
        instructions("FROM x\nCOPPY a b\n")


def test_one_version_of_ray_everywhere() -> None:
    (pin,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for name in MANIFESTS.values():
        assert cluster_spec(load(CLUSTER / "kuberay" / name))["rayVersion"] == pin


# --- monitoring -------------------------------------------------------------------------------------------------------

DASHBOARD = json.loads((CLUSTER / "monitoring" / "grafana.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SUFFIXES = {"counter": {""}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}


def exported() -> dict[str, set[str]]:
    """The series that Prometheus finds, and their labels."""
    return {
        f"ray_{name}{suffix}": {*metric.labels, *(["le"] if suffix == "_bucket" else [])}
        for name, metric in METRICS.items()
        for suffix in SUFFIXES[metric.kind]
    }


def nodes_of(tree: Any) -> list[Any]:
    """Every node of a PromQL expression."""
    below = [getattr(tree, name, None) for name in ("lhs", "rhs", "expr", "param", "vector_selector")]
    children = [child for child in [*below, *getattr(tree, "args", [])] if child is not None]
    return [tree, *(node for child in children for node in nodes_of(child))]


def selectors_of(tree: Any) -> list[Any]:
    return [node for node in nodes_of(tree) if isinstance(node, promql_parser.VectorSelector)]


@pytest.mark.parametrize("query", QUERIES)
def test_dashboard_asks_for_what_is_exported(query: str) -> None:
    tree = promql_parser.parse(query.replace("$__rate_interval", "1m"))
    series = exported()
    assert selectors_of(tree)
    for selector in selectors_of(tree):
        assert selector.name in series, selector.name
        assert {matcher.name for matcher in selector.matchers.matchers} <= series[selector.name]
    for node in nodes_of(tree):
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            for selector in selectors_of(node):
                assert set(node.modifier.labels) <= series[selector.name]


def test_dashboard_shows_every_metric() -> None:
    shown = " ".join(QUERIES)
    assert {name for name in METRICS if f"ray_{name}" not in shown} == set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert all(panel["datasource"]["uid"] == "${datasource}" for panel in DASHBOARD["panels"])
