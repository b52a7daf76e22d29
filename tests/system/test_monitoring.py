"""Dashboards and alerts on a run that a Prometheus server scrapes: every query returns numbers.

Replay and the actor with its desktops are the real processes. The policy is a small gRPC server that ends each episode
when the test allows it. The metrics of the learner and of the replica are the real ones, but the test serves and sets
them, so that no torch and no engine is needed.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import prometheus_client
import pytest
from ports_kit import free_port, free_ports
from prometheus_client.metrics import MetricWrapperBase
from replay_kit import TEST_PEER, ReplayProcess

from deskrl.actor.tasks.task_schema import load_tasks
from deskrl.core.config import RunConfig
from deskrl.core.process_lifecycle import supervised_environment
from deskrl.inference import metrics as inference_metrics
from deskrl.learner.metrics import prometheus as learner_metrics
from deskrl.proto.v1 import inference_pb2, inference_pb2_grpc, replay_pb2, rollout_pb2

REPOSITORY = Path(__file__).parents[2]
PROMETHEUS = REPOSITORY / "deploy/prometheus"
GUIDE = REPOSITORY / "docs/monitoring.md"
DASHBOARDS = sorted((REPOSITORY / "deploy/grafana").glob("*.json"))
TIMEOUT_S = 60.0
UPDATE: dict[str, Any] = {
    "applied": True,
    "dropped": {"all_failed": 1},
    "replayed": 1,
    "num_trajectories": 4,
    "num_tokens": 80,
    "loss": 0.1,
    "success_rate": 0.5,
    "average_reward": 0.5,
    "reward_terms": {"task": 0.5, "brevity": 0.5},
    "gradient_norm": 0.3,
    "clip_fraction": 0.1,
    "entropy": 0.7,
    "kl": 0.05,
    "mismatch_max": 1e-4,
    "lagged_difference_mean": 1e-2,
    "staleness_max": 1,
    "per_task": {"make-a-folder": {"n": 4, "success": 3}},
}


class FinishingPolicy(inference_pb2_grpc.InferenceServiceServicer):
    """Policy whose first action of each episode is `finished`, once `may_answer` is set."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()

    def Act(self, request: inference_pb2.ActRequest, context: Any) -> inference_pb2.ActResponse:
        """Return the action `finished`."""
        self.may_answer.wait(TIMEOUT_S)
        text = "Thought: Done.\nAction: finished()"
        ids = list(text.encode())
        action = inference_pb2.SampledAction(
            prompt_ids=[1], action_ids=ids, logprobs=[-0.5] * len(ids), text=text, processor_hash="-", stopped=True
        )
        return inference_pb2.ActResponse(action=action)


class Prometheus:
    """Prometheus with the configuration of deploy/prometheus, but other ports and five scrapes per second."""

    def __init__(self, folder: Path, ports: dict[str, list[int]]) -> None:
        shutil.copytree(PROMETHEUS, folder)
        config = folder / "prometheus.yml"
        text = config.read_text().replace("interval: 5s", "interval: 200ms")
        for job, scraped in scraped_ports().items():
            targets = ", ".join(f'"127.0.0.1:{port}"' for port in ports[job])
            text = text.replace(f'"127.0.0.1:{scraped}"', targets)
        config.write_text(text)
        self.address = f"127.0.0.1:{free_port()}"
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={self.address}",
                ],
                stdout=log,
                stderr=log,
            )

    def query(self, expression: str) -> list[float]:
        """Return the present values of an expression; empty while Prometheus is starting."""
        result = self._get("query", query=expression)
        return [float(sample["value"][1]) for sample in result.get("result", [])]

    def rules(self) -> list[dict[str, Any]]:
        """Return the alert rules that Prometheus has loaded."""
        return [rule for group in self._get("rules").get("groups", []) for rule in group["rules"]]

    def wait_for(self, expression: str) -> list[float]:
        """Wait until an expression has values that are all finite, and return them."""
        wait_until(lambda: (values := self.query(expression)) and all(map(math.isfinite, values)), expression)
        return self.query(expression)

    def _get(self, method: str, **arguments: str) -> dict[str, Any]:
        url = f"http://{self.address}/api/v1/{method}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_S) as page:
                data: dict[str, Any] = json.load(page)["data"]
        except urllib.error.HTTPError as error:
            if error.code == 503:  # starting
                return {}
            raise AssertionError(f"{arguments}: {error.read().decode()}") from error
        except urllib.error.URLError:  # not listening yet
            return {}
        return data


def wait_until(condition: Callable[[], object], description: str) -> None:
    """Poll a condition until it is true."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, f"timed out: {description}"
        time.sleep(0.1)


def scraped_ports() -> dict[str, int]:
    """Return the port of each job in prometheus.yml."""
    jobs = re.findall(
        r'job_name: (\w+)\n.*\n\s+- targets: \["127.0.0.1:(\d+)"\]', (PROMETHEUS / "prometheus.yml").read_text()
    )
    return {job: int(port) for job, port in jobs}


def queries() -> Iterator[tuple[str, str]]:
    """Yield "dashboard: panel" and expression of every query."""
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel["targets"]:
                yield f"{path.stem}: {panel['title']}", target["expr"]


@contextlib.contextmanager
def serving(module: ModuleType, port: int) -> Iterator[None]:
    """Serve the metrics that a module defines on a port."""
    registry = prometheus_client.CollectorRegistry()
    for metric in vars(module).values():
        if isinstance(metric, MetricWrapperBase):
            registry.register(metric)
    server, thread = prometheus_client.start_http_server(port, addr="127.0.0.1", registry=registry)
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def observe_an_action_and_a_weight_update() -> None:
    """Set the metrics of a replica after one action and one weight update."""
    inference_metrics.ACTS.labels("sampled").inc()
    inference_metrics.ACT_SECONDS.observe(0.3)
    for stage in ("image", "queue", "prefill", "decode", "rest"):
        inference_metrics.ACT_STAGE_SECONDS.labels(stage).observe(0.05)
    inference_metrics.PROMPT_TOKENS.inc(1000)
    inference_metrics.CACHED_PROMPT_TOKENS.inc(800)
    inference_metrics.ACTION_TOKENS.inc(20)
    inference_metrics.UPDATES.labels("committed").inc()
    for phase in ("pause", "load", "verify", "clear_caches", "resume", "canary"):
        inference_metrics.UPDATE_SECONDS.labels(phase).observe(0.02)


@contextlib.contextmanager
def terminating(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Terminate a process when the context ends."""
    try:
        yield
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus that has scraped a run of two actors from its start: scripted and sampled episodes, and an update."""
    require("prometheus", "Xvfb", "bwrap")
    ports = {job: [free_port()] for job in scraped_ports()} | {"actor": free_ports(2)}
    folder = tmp_path_factory.mktemp("monitoring")
    config = RunConfig.model_validate(
        {
            "runs": folder,
            "desktop": {"num_envs": 2},
            "replay": {"address": f"127.0.0.1:{free_port()}", "metrics_port": ports["replay"][0]},
            "inference": {"address": f"127.0.0.1:{free_port()}"},
            "actor": {"metrics_port": ports["actor"][0], "desktops_per_actor": 1},
        }
    )
    with contextlib.ExitStack() as stack:
        temporary = tempfile.mkdtemp(prefix="deskrl-")  # short, because paths of sockets are limited
        stack.callback(shutil.rmtree, temporary)
        policy, server = FinishingPolicy(), grpc.server(futures.ThreadPoolExecutor(2))
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(policy, server)
        server.add_insecure_port(config.inference.address)
        server.start()
        stack.callback(server.stop, None)
        replay = ReplayProcess(config)
        stack.callback(replay.close)
        learner_metrics.create_application_series(["xterm"])
        stack.enter_context(serving(learner_metrics, *ports["learner"]))
        stack.enter_context(serving(inference_metrics, *ports["inference"]))
        scraper = Prometheus(folder / "prometheus", ports)
        stack.enter_context(terminating(scraper.process))
        for index in range(len(ports["actor"])):
            stack.enter_context(terminating(start_actor(config, index, Path(temporary))))
        wait_until(lambda: scraper.query("up") == [1.0] * sum(map(len, ports.values())), "every process is scraped")
        seconds = dict.fromkeys(("wait", "learn", "publish", "checkpoint"), 0.5)
        learner_metrics.observe_update(UPDATE, seconds, {"make-a-folder": "xterm"})
        learner_metrics.observe_weight_update({"ok": True, "receive_ms": 20.0, "total_ms": 60.0})
        learner_metrics.POLICY_STEP.set(1)
        observe_an_action_and_a_weight_update()
        plan(replay, "demo", rollout_pb2.ACTING_POLICY_SCRIPTED)
        take_group(replay, "demo")
        plan(replay, "eval", rollout_pb2.ACTING_POLICY_SAMPLED)
        waiting = 'sum(deskrl_actor_desktops{state="waiting_for_model"}) == 2 and sum(deskrl_replay_active_leases) == 2'
        wait_until(lambda: scraper.query(waiting), "two desktops wait for the policy, each with a lease")
        policy.may_answer.set()
        take_group(replay, "eval")
        yield scraper


def require(*programs: str) -> None:
    """Skip the test if a program is not installed."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed (deploy/install.sh test installs it)")


def start_actor(config: RunConfig, index: int, temporary: Path) -> subprocess.Popen[bytes]:
    """Start an actor process of a run whose configuration is in its run directory."""
    with open(config.run_dir / "actor.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "deskrl.cli.main", "actor", str(config.run_dir / "config.json"), f"--index={index}"],
            stdout=log,
            stderr=log,
            env={**os.environ, **supervised_environment(), "TMPDIR": str(temporary)},
        )


def plan(replay: ReplayProcess, queue: str, acting: rollout_pb2.ActingPolicy) -> None:
    """Plan a group of two rollouts."""
    (task,) = load_tasks(ids=("make-a-folder",))
    group = replay_pb2.GroupPlan(
        group_id=f"{queue}/{task.id}",
        queue=queue,
        task_id=task.id,
        task_json=task.data,
        seeds=[0, 1],
        max_steps=6,
        temperature=1.0,
        acting_policy=acting,
    )
    replay.client().replay.PlanGroups(replay_pb2.PlanGroupsRequest(peer=TEST_PEER, groups=[group]), timeout=TIMEOUT_S)


def take_group(replay: ReplayProcess, queue: str) -> None:
    """Wait for the group of a queue, and take it."""
    group = replay.client().take(queue, "batch", 0, wait_s=TIMEOUT_S)
    assert group is not None and group.num_faulted == 0, (replay.config.run_dir / "actor.log").read_text()


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_numbers(prometheus: Prometheus, dashboard: Path) -> None:
    for title, query in queries():
        if title.startswith(f"{dashboard.stem}:"):
            assert prometheus.wait_for(query), title


def test_metrics_count_the_episodes_leases_and_faults_of_the_run(prometheus: Prometheus) -> None:
    assert prometheus.wait_for("sum by (instance) (deskrl_actor_desktops)") == [1.0, 1.0]
    wait_until(lambda: prometheus.query("sum(deskrl_actor_episodes_total)") == [4.0], "all episodes are counted")
    wait_until(lambda: prometheus.query("sum(deskrl_replay_leases_granted_total)") == [4.0], "all leases are counted")
    wait_until(lambda: prometheus.query("sum(deskrl_replay_active_leases)") == [0.0], "leases end with their episodes")
    assert prometheus.query("count(deskrl_actor_faults_total == 0)") == [2 * (len(rollout_pb2.FaultKind.keys()) - 1)]


def test_every_alert_compares_an_expression_that_has_a_value(prometheus: Prometheus) -> None:
    wait_until(prometheus.rules, "the rules are loaded")
    for rule in prometheus.rules():
        comparison = re.fullmatch(r"(.+) (>|<|==) ([\d.]+)", rule["query"], re.DOTALL)
        assert comparison, rule["name"]
        assert prometheus.wait_for(comparison[1]), rule["name"]
    assert prometheus.query('ALERTS{alertstate="firing"}') == []


def test_alerts_fire_when_they_should_and_not_before() -> None:
    require("promtool")
    for arguments in (
        ("check", "config", "prometheus.yml"),
        ("check", "rules", "alerts.yml"),
        ("test", "rules", "alerts_test.yml"),
    ):
        done = subprocess.run(["promtool", *arguments], cwd=PROMETHEUS, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_runbook_and_every_panel_an_explanation() -> None:
    guide = GUIDE.read_text()
    rules = (PROMETHEUS / "alerts.yml").read_text()
    alerts = re.findall(r"- alert: (\w+)", rules)
    assert re.findall(r"runbook: (\S+)", rules) == [f"docs/monitoring.md#{alert.lower()}" for alert in alerts]
    assert re.findall(r"^### (\w+)$", guide, re.MULTILINE) == alerts
    for path in DASHBOARDS:
        for panel in json.loads(path.read_text())["panels"]:
            assert f"| {panel['title']} |" in guide


def test_the_guide_starts_a_run_on_the_scraped_ports() -> None:
    ports = re.findall(r"--(\w+)\.metrics_port (\d+)", GUIDE.read_text())
    assert {role: int(port) for role, port in ports} == scraped_ports()
