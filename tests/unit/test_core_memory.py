"""What memory is left, on machines with each kind of control group."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deskrl.core.memory import available_bytes

GIB = 1024**3


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    return tmp_path


def available(machine: Path, groups_of_process: str) -> float:
    (machine / "proc/cgroup").write_text(groups_of_process)
    return available_bytes(machine / "proc", machine / "cgroup") / GIB


def write(folder: Path, **values: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


def test_without_a_limit_it_is_what_the_machine_has(machine: Path) -> None:
    write(machine / "cgroup/job", memory__max="max", memory__current=GIB)
    assert available(machine, "0::/job\n") == pytest.approx(psutil.virtual_memory().available / GIB, rel=0.05)


def test_a_limit_above_the_process_counts_and_cached_files_do_not(machine: Path) -> None:
    write(machine / "cgroup/pod", memory__max=3 * GIB, memory__current=2 * GIB)
    write(machine / "cgroup/pod", memory__stat=f"anon {GIB}\ninactive_file {GIB // 2}\nactive_file 0")
    write(machine / "cgroup/pod/container", memory__max="max", memory__current=GIB)
    assert available(machine, "0::/pod/container\n") == 1.5


def test_the_older_kind_of_groups_counts_too(machine: Path) -> None:
    folder = machine / "cgroup/memory/slurm/job_7"
    write(folder, memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB, memory__stat="total_inactive_file 0")
    assert available(machine, "5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n") == 1


def test_a_path_of_the_host_that_a_container_cannot_see_leaves_the_mount_itself(machine: Path) -> None:
    write(machine / "cgroup", memory__max=GIB, memory__current=GIB // 4)
    assert available(machine, "0::/kubepods/pod1/abc\n") == 0.75


def test_a_group_over_its_limit_has_nothing_left(machine: Path) -> None:
    write(machine / "cgroup/job", memory__max=GIB, memory__current=2 * GIB)
    assert available(machine, "0::/job\n") == 0
