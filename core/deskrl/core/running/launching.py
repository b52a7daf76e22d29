"""What launchers ask of a run configuration: how many processes, what must lie ready, and whether a role is up.

Knows the roles by name and asks them for their part; starts none. `deskrl up` is the launcher of one machine and does
the same by its own means; systemd, Slurm, compose and Kubernetes do it by these.
"""

from __future__ import annotations

import importlib
import shlex

from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.runfolder import RunFolder
from deskrl.core.running import preflight
from deskrl.core.running.starting import needs_model
from deskrl.core.security.identity import IdentityFiles


def prepare(config: RunConfig) -> int:
    """Write what the roles of a run expect to find: its folder, its tasks, and the model if one is to be built.

    Run again, it leaves a model that is there alone.

    Raises:
        UserError: the configuration contradicts itself, or a task cannot be had.
    """
    preflight.refuse_contradictions(config)
    preflight.refuse_unlearnable(config)
    folder = RunFolder(config.folder)
    preflight.refuse_full_disk(folder)
    tasks = importlib.import_module("deskrl.actor.prepare")
    tasks.load(config)
    folder.create()
    tasks.main(config)
    if needs_model(config):
        importlib.import_module("deskrl.learner.policy.build_model").main(config)
    dump_config(config, folder.config)  # the last: where it lies, all is ready
    return 0


def size(config: RunConfig) -> int:
    """Print how many processes make the run, and where its servers are, as a shell can read it."""
    preflight.refuse_contradictions(config)
    values = {
        "name": config.name,
        "folder": shlex.quote(str(config.folder)),
        "num_actors": config.num_actors,
        "num_replicas": config.inference.num_replicas,
    }
    for service, address in (("replay", config.replay.address), ("inference", config.inference.address)):
        host, _, port = address.rpartition(":")
        values |= {f"{service}_host": shlex.quote(host), f"{service}_port": port}
    for key, value in values.items():
        print(f"{key}={value}")
    return 0


def health(config: RunConfig, role: str, index: int) -> int:
    """0 if the replay service or a replica answers that it serves, 1 if not.

    Beside a server it shows the server's own certificate, elsewhere the operator's.

    Raises:
        UserError: it does not trust this process, or this process does not trust it.
    """
    if config.security.folder is not None:
        is_beside = IdentityFiles(config.security.folder, role).key.exists()
        rpc.identify_as(role if is_beside else "operator", config.security.folder)
    address = config.replay.address if role == "replay" else config.inference.replica_address(index)
    return 0 if rpc.check_health(address) else 1
