"""deploy/kubernetes: what the overlays render to is valid, drains in good order and scales as documented."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from deskrl.actor.main import DRAIN_S
from deskrl.core.config import LearnerConfig, RunConfig
from deskrl.learner.nodes.node_rank import check_rendezvous
from deskrl.replay.metrics import ReplayMetrics

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
VERSION = "1.37"
Manifest = dict[str, Any]

TEXT, COUNT = {"type": "string"}, {"type": "integer", "minimum": 1}


def closed(**properties: Any) -> Manifest:
    """Return the JSON schema of an object that has these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


POLICIES = {"type": "array", "items": closed(type={"enum": ["Pods", "Percent"]}, value=COUNT, periodSeconds=COUNT)}
SCALED_OBJECT = closed(
    apiVersion={"const": "keda.sh/v1alpha1"},
    kind={"const": "ScaledObject"},
    metadata=closed(name=TEXT, namespace=TEXT),
    spec=closed(
        scaleTargetRef=closed(apiVersion=TEXT, kind=TEXT, name=TEXT),
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        advanced=closed(
            horizontalPodAutoscalerConfig=closed(
                behavior=closed(
                    scaleUp=closed(policies=POLICIES),
                    scaleDown=closed(stabilizationWindowSeconds=COUNT, policies=POLICIES),
                )
            )
        ),
        triggers={
            "type": "array",
            "items": closed(
                type={"const": "prometheus"},
                metricType={"enum": ["AverageValue", "Value"]},
                metadata=closed(serverAddress=TEXT, query=TEXT, threshold=TEXT, ignoreNullValues=TEXT),
            ),
        },
    ),
)
"""The fields of KEDA's ScaledObject and of its Prometheus trigger that the manifest uses, with their types."""


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not on PATH")


def render(overlay: str) -> dict[str, Manifest]:
    """Return the documents of an overlay by kind and name, such as `Service/replay`."""
    command = ["kubectl", "kustomize", str(KUBERNETES / "overlays" / overlay)]
    rendered = subprocess.run(command, capture_output=True, text=True, check=False)
    assert rendered.returncode == 0, rendered.stderr
    return by_name(yaml.safe_load_all(rendered.stdout))


def base() -> dict[str, Manifest]:
    """Return the documents of the base, as they are in its files."""
    folder = KUBERNETES / "base"
    files = yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]
    return by_name(document for file in files for document in yaml.safe_load_all((folder / file).read_text()))


def by_name(documents: Any) -> dict[str, Manifest]:
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


def pods() -> dict[str, Manifest]:
    """Return the pod template of each role."""
    return {
        document["metadata"]["name"]: document["spec"]["template"]
        for document in base().values()
        if "template" in document.get("spec", {})
    }


def check(document: Manifest) -> None:
    """Check a document against the schema of its kind."""
    if document["kind"] == "ScaledObject":
        jsonschema.validate(document, SCALED_OBJECT)
    else:
        kubernetes_validate.validate(document, VERSION, strict=True)


@needs("kubectl")
@pytest.mark.parametrize("overlay", sorted(path.name for path in (KUBERNETES / "overlays").iterdir()))
def test_an_overlay_renders_to_valid_documents_in_the_namespace_of_the_run(overlay: str) -> None:
    documents = render(overlay)
    for document in documents.values():
        check(document)
    others = [document for document in documents.values() if document["kind"] != "Namespace"]
    assert {document["metadata"]["namespace"] for document in others} == {"deskrl"}


def test_the_documents_of_the_base_are_valid() -> None:
    for document in base().values():
        check(document)
    listed = {path.name for path in (KUBERNETES / "base").glob("*.yaml")} - {"kustomization.yaml"}
    assert listed == set(yaml.safe_load((KUBERNETES / "base" / "kustomization.yaml").read_text())["resources"])


@needs("kubectl")
def test_the_overlay_local_disk_adds_a_volume_for_the_store_and_changes_nothing_else() -> None:
    rendered, expected = render("local-disk"), base()
    replay = rendered["StatefulSet/replay"]["spec"]
    (container,) = replay["template"]["spec"]["containers"]
    (claim,) = replay.pop("volumeClaimTemplates")
    assert claim["spec"]["accessModes"] == ["ReadWriteOncePod"]
    folder = {"name": "DESKRL_REPLAY__FOLDER", "value": "/replay"}
    container["env"].remove(folder)
    container["volumeMounts"].remove({"name": claim["metadata"]["name"], "mountPath": folder["value"]})
    for document in rendered.values():
        document["metadata"].pop("namespace", None)
    (original,) = expected["StatefulSet/replay"]["spec"]["template"]["spec"]["containers"]
    for values in (container["env"], container["volumeMounts"], original["env"], original["volumeMounts"]):
        values.sort(key=json.dumps)  # a patch may reorder a list
    assert rendered == expected


def test_only_actors_may_be_evicted_and_one_at_a_time() -> None:
    budgets = {name.partition("/")[2]: found["spec"] for name, found in base().items() if "DisruptionBudget" in name}
    assert set(budgets) == set(pods())
    for role, budget in budgets.items():
        assert budget.pop("selector")["matchLabels"] == pods()[role]["metadata"]["labels"]
    assert budgets == {
        "actor": {"maxUnavailable": 1},
        "inference": {"maxUnavailable": 0},
        "learner": {"minAvailable": 1},  # a Job has no scale, which maxUnavailable needs
        "replay": {"maxUnavailable": 0},
    }


@pytest.mark.parametrize("role", ["actor", "inference"])
def test_pods_that_are_scaled_are_spread_over_the_nodes_and_keep_their_number_when_applied_again(role: str) -> None:
    (spread,) = pods()[role]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "kubernetes.io/hostname"
    assert spread["labelSelector"]["matchLabels"] == pods()[role]["metadata"]["labels"]
    (document,) = (found for name, found in base().items() if name in (f"Deployment/{role}", f"StatefulSet/{role}"))
    assert "replicas" not in document["spec"]


def test_the_grace_period_of_an_actor_covers_its_drain() -> None:
    assert pods()["actor"]["spec"]["terminationGracePeriodSeconds"] >= 2 * DRAIN_S


def test_a_learner_that_is_evicted_is_replaced_however_often() -> None:
    rules = base()["Job/learner"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert rules[1]["action"] == "FailJob" and rules[1]["onExitCodes"]["values"] == [2]


def scaled_object() -> Manifest:
    """Return the specification of the ScaledObject."""
    path = KUBERNETES / "overlays" / "autoscaling" / "actor-scaled-object.yaml"
    specification: Manifest = yaml.safe_load(path.read_text())["spec"]
    return specification


def trigger() -> dict[str, str]:
    """Return the metadata of the trigger of the ScaledObject."""
    metadata: dict[str, str] = scaled_object()["triggers"][0]["metadata"]
    return metadata


@pytest.mark.parametrize(
    ("num_leases", "num_actors"),
    [(0, 4), (14, 4), (16, 5), (20, 6), (28, 8), (49, 14), (60, 16), (64, 16)],
)
def test_actors_are_added_while_fewer_than_one_desktop_in_eight_is_free(num_leases: int, num_actors: int) -> None:
    wanted = math.ceil(num_leases / float(trigger()["threshold"]))  # as the autoscaler does for an AverageValue
    assert min(max(wanted, scaled_object()["minReplicaCount"]), scaled_object()["maxReplicaCount"]) == num_actors


def test_autoscaling_scales_the_actors_by_a_metric_of_the_replay_service() -> None:
    target = scaled_object()["scaleTargetRef"]
    assert base()[f"{target['kind']}/{target['name']}"]["apiVersion"] == target["apiVersion"]
    assert float(trigger()["threshold"]) == RunConfig().actor.desktops_per_actor * 7 / 8
    exported = {metric.name for metric in ReplayMetrics().registry.collect()}
    assert trigger()["query"].removeprefix("sum(").removesuffix(")") in exported


@needs("promtool")
def test_the_query_of_the_autoscaler_sums_leases_and_has_no_result_without_a_sample(tmp_path: Path) -> None:
    query = trigger()["query"]
    series = [{"series": 'deskrl_replay_active_leases{instance="replay-0:9464"}', "values": "_x4 12 16"}]
    expected = [{"labels": "{}", "value": 16}]
    queries = [
        {"expr": query, "eval_time": "2m", "exp_samples": []},
        {"expr": query, "eval_time": "6m", "exp_samples": expected},
    ]
    group = {"interval": "1m", "input_series": series, "promql_expr_test": queries}
    (tmp_path / "test.yml").write_text(json.dumps({"rule_files": [], "tests": [group]}))
    tested = subprocess.run(
        ["promtool", "test", "rules", "test.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert trigger()["ignoreNullValues"] == "false", "no result must not count as 0"


@needs("kubectl")
def test_the_overlay_learner_nodes_gives_each_pod_its_rank_and_admits_only_pods_of_the_learner() -> None:
    rendered = render("learner-nodes")
    job, pod = rendered["Job/learner"]["spec"], rendered["Job/learner"]["spec"]["template"]["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == rendered["PodDisruptionBudget/learner"]["spec"]["minAvailable"]
    (container,) = pod["containers"]
    assert container["args"][-2:] == ["--node-rank", "$(NODE_RANK)"]
    for part in (container, *pod["initContainers"]):
        values = {variable["name"]: variable.get("value") for variable in part["env"]}
        rank = next(variable for variable in part["env"] if variable["name"] == "NODE_RANK")
        assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]
        learner = LearnerConfig(
            num_nodes=int(values["DESKRL_LEARNER__NUM_NODES"]),
            master_addr=values["DESKRL_LEARNER__MASTER_ADDR"],
            master_port=int(values["DESKRL_LEARNER__MASTER_PORT"]),
        )
        check_rendezvous(learner)
        assert learner.num_nodes == job["completions"]
        assert learner.master_addr == f"learner-0.{pod['subdomain']}"
    service = rendered[f"Service/{pod['subdomain']}"]["spec"]
    assert service["clusterIP"] == "None" and service["publishNotReadyAddresses"]
    labels = rendered["Job/learner"]["spec"]["template"]["metadata"]["labels"]
    ranks, metrics = rendered["NetworkPolicy/deskrl-learner"]["spec"]["ingress"]
    assert service["selector"] == labels
    assert ranks == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert [port["port"] for port in metrics["ports"]] == [9464]
