"""A whole running job that faults are done to: replay, a learner, inference and actors as processes, with certificates.

Replay, learner and actors are what `deskrl` starts; so is inference, but for its engine (`light_engine`). Every
connection between two roles goes through a relay of its own, and replay keeps its store on a small disk. Knows how the
job is brought up, kept up and ended; knows no fault and no rule of what has to be true in the end.
"""

from __future__ import annotations

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
from chaos_kit.files import ActorLog, read_record
from chaos_kit.record import Acknowledged, Record
from chaos_kit.roles import Ending, RoleProcess
from chaos_kit.wire import FaultyRelay
from deskrl.actor.main import desktops_folder
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.lifetime import supervised_environment
from deskrl.core.runfolder import RunFolder
from deskrl.core.running.supervisor import RUN_MARK, describe_leftovers
from deskrl.core.security.certificates import make_certificates
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
"""All there are, or one that is quickly set up."""
_TEND_EVERY_S = 0.05
_PATIENCE_S = 300.0
_CLEAR_S = 15.0
"""How long desktops and processes may take to go after the last role has ended."""


class ChaosJob:
    """One job, from its first process to its last.

    Args:
        runs: where its run's folder is made.
        name: of the run.
        num_updates: after which it ends by itself.
        seed: of the run, and of what relays corrupt.
        model: folder of the model, as `build_model` makes it.
        provider: of the desktops: `simulated` or `embedded`.
        actor_prefix: what an actor's command begins with, to run in another place than the rest.
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
    ) -> None:
        self.config = _config(runs, name, num_updates, seed, model, provider)
        self.folder = RunFolder(self.config.folder)
        self.folder.root.mkdir(parents=True)  # not over what another job has left
        self.folder.create()
        self.disk = Disk(self.folder.replay)
        self.actor_logs = [ActorLog(self.folder.logs / f"{name}.log") for name in ACTORS]
        self.endings: list[Ending] = []
        self.orphans: list[str] = []
        addresses = {"replay": self.config.replay.address, "inference": self.config.inference.address}
        self.links = {link: FaultyRelay(addresses[link.partition("~")[2]], seed + n) for n, link in enumerate(LINKS)}
        assert self.config.security.folder is not None
        make_certificates(self.config.security.folder, [], 2)
        self._is_over = threading.Event()
        self._environment = {**supervised_environment(), RUN_MARK: str(self.folder.root), "OMP_NUM_THREADS": "1"}
        self.clocks = {role: Clock(self.folder.root / "clocks" / role) for role in ROLES}
        self._prepare()
        self.roles = self._roles(actor_prefix)
        for role in self.roles.values():
            role.start()
        self._tending = threading.Thread(target=self._tend)
        self._watching = threading.Thread(target=self._watch)
        self._tending.start()
        self._watching.start()

    @property
    def is_learnt(self) -> bool:
        """Whether the learner has ended."""
        return self.roles["learner"].is_done

    def wait(self, timeout_s: float) -> bool:
        """Wait; whether the learner ended meanwhile."""
        deadline_s = time.monotonic() + timeout_s
        while not self.is_learnt and time.monotonic() < deadline_s:
            time.sleep(min(_TEND_EVERY_S, max(0.0, deadline_s - time.monotonic())))
        return self.is_learnt

    def wait_until_running(self) -> None:
        """Until the first update is learnt, so that every role has work in hand."""
        self._wait_while(lambda: not any(self.folder.read_metrics("update")), "no first update")

    def wait_until_learnt(self) -> None:
        """Until the learner has ended; a job in which nothing moves for long is given up.

        Raises:
            TimeoutError: nothing moved.
        """
        self._wait_while(lambda: not self.is_learnt, "the job stands still")

    def check_gone(self, role: str, processes: list[psutil.Process]) -> None:
        """What had descended from a killed process has to be gone once its leases have run out."""
        _, alive = psutil.wait_procs(processes, timeout=LEASE_TTL_S)
        self.orphans += [f"process {one.pid} {one.name()} of a killed {role}" for one in alive if one.is_running()]

    def end(self) -> None:
        """End the roles, in order, and note what stays behind; the disk is kept."""
        self._is_over.set()
        self._tending.join()
        self._watching.join()
        order = sorted(self.roles, key=["learner", *ACTORS, "inference", "replay"].index)
        for name in order:
            role = self.roles[name]
            status = 0 if role.is_done else role.stop()
            if status != 0:
                self.endings.append(Ending(name, status, role.last_line()))
        for log in self.actor_logs:
            log.read()
        for relay in self.links.values():
            relay.close()
        self._note_leftovers()

    def record(self) -> Record:
        """What an ended job has left behind."""
        store = self.folder.root / "store"
        shutil.copytree(self.disk.path, store)
        endings = [str(ending) for ending in self.endings]
        return read_record(
            self.config, store, acknowledged=self.acknowledged, endings=endings, orphans=list(self.orphans)
        )

    def close(self) -> None:
        """Let go of all, whatever the state."""
        if not self._is_over.is_set():
            self.end()
        self.disk.close()

    def _note_leftovers(self) -> None:
        deadline_s = time.monotonic() + _CLEAR_S
        while leftovers := self._leftovers():
            if time.monotonic() > deadline_s:
                self.orphans += leftovers
                return
            time.sleep(0.1)

    def _leftovers(self) -> list[str]:
        desktops = desktops_folder(self.config)
        return describe_leftovers(self.folder) + ([f"folder {desktops}"] if desktops.exists() else [])

    def _prepare(self) -> None:
        """What the roles expect to find, as launchers have it made."""
        dump_config(self.config, self.folder.config)
        command = [sys.executable, "-m", "deskrl.core.cli", "prepare", str(self.folder.config)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _roles(self, actor_prefix: Sequence[str]) -> dict[str, RoleProcess]:
        cli = [sys.executable, "-m", "deskrl.core.cli"]
        commands = {
            "replay": [*self.disk.prefix, *cli, "replay", str(self.folder.config)],
            "inference": [sys.executable, light_engine.__file__, str(self.folder.config)],
            "learner": [*cli, "learner", str(self.seen_by("learner"))],
        }
        for index, name in enumerate(ACTORS):
            commands[name] = [*actor_prefix, *cli, "actor", str(self.seen_by("actor")), "--index", str(index)]
        return {
            name: RoleProcess(
                name, command, self.folder.logs / f"{name}.log", self._environment | self.clocks[name].environment
            )
            for name, command in commands.items()
        }

    def seen_by(self, client: str) -> Path:
        """The configuration in which a client finds the services behind its relays."""
        found = {
            service: getattr(self.config, service).model_copy(
                update={"address": self.links[f"{client}~{service}"].address}
            )
            for service in ("replay", "inference")
        }
        path = self.folder.root / f"{client}.json"
        dump_config(self.config.model_copy(update=found), path)
        return path

    def _tend(self) -> None:
        while not self._is_over.wait(_TEND_EVERY_S):
            for role in self.roles.values():
                if (ending := role.tend()) is not None:
                    self.endings.append(ending)

    def _watch(self) -> None:
        while not self._is_over.wait(_TEND_EVERY_S):
            for log in self.actor_logs:
                log.read()

    @property
    def acknowledged(self) -> list[Acknowledged]:
        """All results so far, in the order in which they were told."""
        return sorted((one for log in self.actor_logs for one in log.acknowledged), key=lambda one: one.seen_s)

    def _wait_while(self, is_so: Callable[[], bool], complaint: str) -> None:
        last, moved_s = -1, time.monotonic()
        while is_so():
            now = len(self.acknowledged) + len(list(self.folder.read_metrics("update")))
            if now != last:
                last, moved_s = now, time.monotonic()
            if time.monotonic() - moved_s > _PATIENCE_S:
                raise TimeoutError(f"{complaint}: nothing new for {_PATIENCE_S:.0f} s; logs in {self.folder.logs}")
            time.sleep(_TEND_EVERY_S)


def build_model(folder: Path) -> Path:
    """The model of all jobs, which none of them changes."""
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
            "tasks": {"rollouts": ROLLOUTS, "max_steps": 4, "tasks": _TASKS[provider]},
            "desktop": {
                "provider": provider,
                "num_envs": 2 * NUM_ACTORS,
                "width": _SCREEN_SCALE[provider] * width,
                "height": _SCREEN_SCALE[provider] * height,
                "step_timeout_s": 5.0,
                # Some hang for longer than that, and are replaced.
                "simulated": {"time_scale": 0.02, "luck": 0.5, "hang_share": 0.01, "hang_s": 400.0},
            },
            "agent": {"context": "episode", "prompt": "brief", "image_width": width, "image_height": height},
            "actor": {"desktops_per_actor": 2, "act_timeout_s": 60.0},
            "replay": {"address": replay, "lease_ttl_s": LEASE_TTL_S},
            "inference": {"address": inference, "dtype": "float32", "max_model_len": 2048, "max_action_tokens": 48},
            "security": {"folder": runs / name / "certificates"},
            "learner": {
                "dtype": "float32",
                "grpo": {
                    "num_updates": num_updates,
                    "groups_per_batch": GROUPS_PER_BATCH,
                    "max_staleness": MAX_STALENESS,
                    "groups_without_spread": "keep",
                    "learning_rate": 1e-4,
                },
            },
        }
    )
