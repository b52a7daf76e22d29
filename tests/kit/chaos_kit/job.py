"""Whole job for fault injection: replay, learner, inference and actors as processes, with certificates.

All roles are those of `deskrl`, except the engine of inference (`light_engine`), unless vLLM is requested. Each kind of
connection between two roles passes through a relay of its own, and replay keeps its store on a small disk.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import light_engine
import psutil
from ports_kit import free_ports

from chaos_kit.clock import Clock
from chaos_kit.disk import Disk
from chaos_kit.faulty_relay import FaultyRelay
from chaos_kit.record import AcknowledgedResult, Record
from chaos_kit.record_reader import ActorLog, read_record
from chaos_kit.role_process import RoleProcess, UnexpectedExit
from deskrl.actor.main import desktops_dir
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.process_lifecycle import supervised_environment
from deskrl.core.run_dir import RunDir
from deskrl.launch.certificates import make_certificates
from deskrl.launch.supervisor import RUN_MARK, describe_leftovers
from deskrl.learner.policy.tiny_model import build_tiny_model

NUM_ACTORS = 2
ACTORS = tuple(f"actor-{index}" for index in range(NUM_ACTORS))
ROLES = ("replay", "inference", "learner", *ACTORS)
LEASE_TTL_S = 3.0
ROLLOUTS = 4
MAX_STALENESS = 2
GROUPS_PER_BATCH = 2
LINKS = ("actor~replay", "learner~replay", "actor~inference", "learner~inference")
_IMAGE_SIZE = (224, 112)
_SCREEN_SCALE = {"simulated": 1, "embedded": 4}
_TASKS = {"simulated": (), "embedded": ("make-a-folder",)}
"""Task ids by provider: all tasks, or one whose setup is fast."""
_POLL_INTERVAL_S = 0.05
_STALL_TIMEOUT_S = 300.0
_CLEANUP_TIMEOUT_S = 15.0
"""Time within which desktops and processes must disappear after the last role has exited."""


class ChaosJob:
    """Running job.

    Args:
        runs: directory of runs.
        name: name of the run.
        num_updates: number of updates after which the learner finishes.
        seed: seed of the run and of the relays.
        model: model folder made by `build_model`.
        provider: desktop provider, `simulated` or `embedded`.
        with_vllm: use vLLM instead of the light engine.
        actor_prefix: command prefix of the actors, to run them in another network namespace.
    """

    def __init__(
        self,
        runs: Path,
        name: str,
        num_updates: int,
        seed: int,
        model: Path,
        provider: str = "simulated",
        actor_prefix: Sequence[str] = (),
        *,
        with_vllm: bool = False,
    ) -> None:
        self.with_vllm = with_vllm
        self.config = _config(runs, name, num_updates, seed, model, provider)
        self.folder = RunDir(self.config.run_dir)
        self.folder.root.mkdir(parents=True)  # fails if an earlier job has left its run directory
        self.folder.create()
        self.disk = Disk(self.folder.replay)
        self.actor_logs = [ActorLog(self.folder.logs / f"{name}.log") for name in ACTORS]
        self.unexpected_exits: list[UnexpectedExit] = []
        self.orphans: list[str] = []
        addresses = {"replay": self.config.replay.address, "inference": self.config.inference.address}
        self.links = {link: FaultyRelay(addresses[link.partition("~")[2]], seed + n) for n, link in enumerate(LINKS)}
        assert self.config.security.certificates_dir is not None
        make_certificates(self.config.security.certificates_dir, [], 2)
        self._is_stopping = threading.Event()
        self._environment = {**supervised_environment(), RUN_MARK: str(self.folder.root), "OMP_NUM_THREADS": "1"}
        self.clocks = {role: Clock(self.folder.root / "clocks" / role) for role in ROLES}
        self._prepare()
        self.roles = self._roles(actor_prefix)
        for role in self.roles.values():
            role.start()
        self._supervising = threading.Thread(target=self._supervise)
        self._following = threading.Thread(target=self._follow_logs)
        self._supervising.start()
        self._following.start()

    @property
    def is_finished(self) -> bool:
        """Whether the learner has finished."""
        return self.roles["learner"].is_done

    def wait(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` and return whether the learner has finished."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_finished and time.monotonic() < deadline_s:
            time.sleep(min(_POLL_INTERVAL_S, max(0.0, deadline_s - time.monotonic())))
        return self.is_finished

    def wait_until_running(self) -> None:
        """Wait for the first update, after which every role is busy."""
        self._wait_while(lambda: not any(self.folder.read_metrics("update")), "the first update was not made")

    def wait_until_finished(self) -> None:
        """Wait until the learner has finished.

        Raises:
            TimeoutError: the job made no progress for too long.
        """
        self._wait_while(lambda: not self.is_finished, "the job does not finish")

    def check_descendants_exit(self, role: str, processes: list[psutil.Process]) -> None:
        """Record descendants of a killed process that still run after its leases have expired."""
        _, alive = psutil.wait_procs(processes, timeout=LEASE_TTL_S)
        self.orphans += [f"process {late.pid} {late.name()} of a killed {role}" for late in alive if late.is_running()]

    def stop(self) -> None:
        """Stop the roles in order and record what they leave behind; the disk stays mounted."""
        self._is_stopping.set()
        self._supervising.join()
        self._following.join()
        order = sorted(self.roles, key=["learner", *ACTORS, "inference", "replay"].index)
        for name in order:
            role = self.roles[name]
            status = 0 if role.is_done else role.stop()
            if status != 0:
                self.unexpected_exits.append(UnexpectedExit(name, status, role.last_line()))
        for log in self.actor_logs:
            log.read()
        for relay in self.links.values():
            relay.close()
        self._record_leftovers()

    def record(self) -> Record:
        """Return the record of the stopped job."""
        store = self.folder.root / "store"
        shutil.copytree(self.disk.path, store)
        return read_record(
            self.config,
            store,
            acknowledged=self.acknowledged,
            unexpected_exits=[str(unexpected) for unexpected in self.unexpected_exits],
            orphans=list(self.orphans),
        )

    def close(self) -> None:
        """Stop the job if it runs, and unmount the disk."""
        if not self._is_stopping.is_set():
            self.stop()
        self.disk.close()

    def _record_leftovers(self) -> None:
        deadline_s = time.monotonic() + _CLEANUP_TIMEOUT_S
        while leftovers := self._leftovers():
            if time.monotonic() > deadline_s:
                self.orphans += leftovers
                return
            time.sleep(0.1)

    def _leftovers(self) -> list[str]:
        desktops = desktops_dir(self.config)
        return describe_leftovers(self.folder) + ([f"folder {desktops}"] if desktops.exists() else [])

    def _prepare(self) -> None:
        """Prepare the run directory with `deskrl prepare`, as launchers do."""
        dump_config(self.config, self.folder.config)
        command = [sys.executable, "-m", "deskrl.cli.main", "prepare", str(self.folder.config)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _roles(self, actor_prefix: Sequence[str]) -> dict[str, RoleProcess]:
        cli = [sys.executable, "-m", "deskrl.cli.main"]
        inference = [*cli, "inference"] if self.with_vllm else [sys.executable, light_engine.__file__]
        commands = {
            "replay": [*self.disk.prefix, *cli, "replay", str(self.folder.config)],
            "inference": [*inference, str(self.folder.config)],
            "learner": [*cli, "learner", str(self.client_config("learner"))],
        }
        for index, name in enumerate(ACTORS):
            commands[name] = [*actor_prefix, *cli, "actor", str(self.client_config("actor")), "--index", str(index)]
        return {
            name: RoleProcess(
                name, command, self.folder.logs / f"{name}.log", self._environment | self.clocks[name].environment
            )
            for name, command in commands.items()
        }

    def client_config(self, client: str) -> Path:
        """Write the configuration with which a client connects through its relays; return its path."""
        services = {
            service: getattr(self.config, service).model_copy(
                update={"address": self.links[f"{client}~{service}"].address}
            )
            for service in ("replay", "inference")
        }
        path = self.folder.root / f"{client}.json"
        dump_config(self.config.model_copy(update=services), path)
        return path

    def _supervise(self) -> None:
        while not self._is_stopping.wait(_POLL_INTERVAL_S):
            for role in self.roles.values():
                if (unexpected := role.restart_if_exited()) is not None:
                    self.unexpected_exits.append(unexpected)

    def _follow_logs(self) -> None:
        while not self._is_stopping.wait(_POLL_INTERVAL_S):
            for log in self.actor_logs:
                log.read()

    @property
    def acknowledged(self) -> list[AcknowledgedResult]:
        """All acknowledged results so far, in the order of acknowledgement."""
        results = (result for log in self.actor_logs for result in log.acknowledged)
        return sorted(results, key=lambda result: result.seen_s)

    def _wait_while(self, condition: Callable[[], bool], problem: str) -> None:
        last, progress_s = -1, time.monotonic()
        while condition():
            now = len(self.acknowledged) + len(list(self.folder.read_metrics("update")))
            if now != last:
                last, progress_s = now, time.monotonic()
            if time.monotonic() - progress_s > _STALL_TIMEOUT_S:
                raise TimeoutError(f"{problem}: no progress for {_STALL_TIMEOUT_S:.0f} s; logs in {self.folder.logs}")
            time.sleep(_POLL_INTERVAL_S)


def build_model(folder: Path) -> Path:
    """Build the model of all jobs, which they only read."""
    words = [
        f"Type the word {word}. Thought: Go on. Action: type(content='{word}') finished()"
        for word in light_engine.WORDS
    ]
    build_tiny_model(folder, 0, _IMAGE_SIZE, words * 8)
    return folder


def _config(runs: Path, name: str, num_updates: int, seed: int, model: Path, provider: str) -> RunConfig:
    replay, inference = (f"127.0.0.1:{port}" for port in free_ports(2))
    width, height = _IMAGE_SIZE
    return RunConfig.model_validate(
        {
            "runs": runs,
            "name": name,
            "seed": seed,
            "model": {"path": model},
            "tasks": {"num_rollouts": ROLLOUTS, "max_steps": 4, "ids": _TASKS[provider]},
            "desktop": {
                "provider": provider,
                "num_envs": 2 * NUM_ACTORS,
                "width": _SCREEN_SCALE[provider] * width,
                "height": _SCREEN_SCALE[provider] * height,
                "step_timeout_s": 5.0,
                # Some actions hang for longer than step_timeout_s, so that desktops are replaced.
                "simulated": {"time_scale": 0.02, "random_success_rate": 0.5, "hang_rate": 0.01, "hang_s": 400.0},
            },
            "agent": {"context": "episode", "prompt": "brief", "image_width": width, "image_height": height},
            "actor": {"desktops_per_actor": 2, "act_timeout_s": 60.0},
            "replay": {"address": replay, "lease_ttl_s": LEASE_TTL_S},
            "inference": {
                "address": inference,
                "dtype": "float32",
                "max_model_len": 2048,
                "max_action_tokens": 48,
                "kv_cache_bytes": 128 * 1024**2,
                # Settings that vLLM needs on an unusual machine.
                "engine_args": json.loads(os.environ.get("DESKRL_TEST_ENGINE_ARGS", "{}")),
            },
            "security": {"certificates_dir": runs / name / "certificates"},
            "learner": {
                "dtype": "float32",
                "grpo": {
                    "num_updates": num_updates,
                    "groups_per_batch": GROUPS_PER_BATCH,
                    "max_staleness": MAX_STALENESS,
                    "zero_variance_groups": "keep",
                    "learning_rate": 1e-4,
                },
            },
        }
    )
