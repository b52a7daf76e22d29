"""Commands for external launchers (systemd, Slurm, compose, Kubernetes): prepare a run, print its size, check health.

`deskrl up`, the launcher for one machine, does not need them.
"""

from __future__ import annotations

import shlex

from deskrl.actor.extensions import check_extensions
from deskrl.core import rpc
from deskrl.core.config import RunConfig, dump_config
from deskrl.core.run_dir import RunDir
from deskrl.core.security.peer_identity import IdentityFiles
from deskrl.launch import preflight
from deskrl.launch.role_launch import needs_model


def prepare(config: RunConfig) -> int:
    """Create the run directory, its task files and, if `model.build` is set, the model. Idempotent.

    Raises:
        UserError: the configuration is inconsistent, or an extension or a task cannot be loaded.
    """
    preflight.check_consistency(config)
    preflight.check_learner(config)
    check_extensions(config)
    folder = RunDir(config.run_dir)
    preflight.check_disk_not_full(folder)
    from deskrl.actor import materialize_tasks

    materialize_tasks.load(config)
    folder.create()
    materialize_tasks.main(config)
    if needs_model(config):
        from deskrl.learner.policy import build_model

        build_model.main(config)
    dump_config(config, folder.config)  # last: its presence marks a prepared run
    return 0


def size(config: RunConfig) -> int:
    """Print the number of processes and the server addresses of the run as shell assignments."""
    preflight.check_consistency(config)
    values = {
        "name": config.name,
        "folder": shlex.quote(str(config.run_dir)),
        "replay_folder": shlex.quote(str(config.replay.folder or "")),
        "num_actors": config.num_actors,
        "num_replicas": config.inference.num_replicas,
        "num_nodes": config.learner.num_nodes,
    }
    for service, address in (("replay", config.replay.address), ("inference", config.inference.address)):
        values |= {f"{service}_host": shlex.quote(address.host), f"{service}_port": address.port}
    for key, value in values.items():
        print(f"{key}={value}")
    return 0


def health(config: RunConfig, role: str, index: int) -> int:
    """Return 0 if the replay service or a replica answers SERVING, else 1.

    On the server's own machine this process uses the server's certificate, elsewhere the operator's.

    Raises:
        UserError: the server and this process do not authenticate each other.
    """
    if config.security.certificates_dir is not None:
        is_beside = IdentityFiles(config.security.certificates_dir, role).key.exists()
        rpc.load_own_identity(role if is_beside else "operator", config.security.certificates_dir)
    address = config.replay.address if role == "replay" else config.inference.replica_address(index)
    return 0 if rpc.check_health(address) else 1
