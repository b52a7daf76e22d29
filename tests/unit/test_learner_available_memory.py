"""Available memory under the limits of cgroup v1 and v2."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from deskrl.learner.available_memory import available_bytes

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


def test_without_a_limit_the_memory_of_the_machine_is_available(machine: Path) -> None:
    write(machine / "cgroup/job", memory__max="max", memory__current=GIB)
    assert available(machine, "0::/job\n") == pytest.approx(psutil.virtual_memory().available / GIB, rel=0.05)


def test_limits_of_ancestor_groups_apply_and_the_page_cache_counts_as_available(machine: Path) -> None:
    write(machine / "cgroup/pod", memory__max=3 * GIB, memory__current=2 * GIB)
    write(machine / "cgroup/pod", memory__stat=f"anon {GIB}\ninactive_file {GIB // 2}\nactive_file 0")
    write(machine / "cgroup/pod/container", memory__max="max", memory__current=GIB)
    assert available(machine, "0::/pod/container\n") == 1.5


def test_limits_of_cgroup_v1_apply(machine: Path) -> None:
    folder = machine / "cgroup/memory/slurm/job_7"
    write(folder, memory__limit_in_bytes=2 * GIB, memory__usage_in_bytes=GIB, memory__stat="total_inactive_file 0")
    assert available(machine, "5:cpu,cpuacct:/\n4:memory:/slurm/job_7\n0::/\n") == 1


def test_in_a_container_the_limit_of_the_mounted_group_applies(machine: Path) -> None:
    write(machine / "cgroup", memory__max=GIB, memory__current=GIB // 4)
    assert available(machine, "0::/kubepods/pod1/abc\n") == 0.75


def test_no_memory_is_available_in_a_group_over_its_limit(machine: Path) -> None:
    write(machine / "cgroup/job", memory__max=GIB, memory__current=2 * GIB)
    assert available(machine, "0::/job\n") == 0
