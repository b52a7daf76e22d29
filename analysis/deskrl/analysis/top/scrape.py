"""Readers of the metrics ports of a run's roles and of the GPUs of this machine."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from deskrl.analysis.top.timeseries import Scrape
from deskrl.core.addresses import format_address
from deskrl.core.config import RunConfig
from deskrl.core.run_identity import RunIdentity
from deskrl.launch.preflight import Endpoint, endpoints

_TIMEOUT_S = 2.0
_LOOPBACK_OF = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opener of URLs that uses no proxy: roles reach one another directly."""
_GPU_QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """Utilisation and memory of a GPU."""

    utilisation: float
    used_mib: float
    total_mib: float


def metrics_addresses(config: RunConfig) -> list[str]:
    """Return the addresses (host:port) at which the roles of a run serve metrics."""
    return [address_of(endpoint) for endpoint in endpoints(config) if endpoint.key.endswith("metrics_port")]


def address_of(endpoint: Endpoint) -> str:
    """Return the address at which this machine reaches a listening socket."""
    return format_address(_LOOPBACK_OF.get(endpoint.host, endpoint.host), endpoint.port)


def read_all(addresses: Sequence[str]) -> dict[str, Scrape]:
    """Return the metrics of each process that is reachable, by address."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        scrapes = pool.map(_read, addresses)
        return {address: scrape for address, scrape in zip(addresses, scrapes, strict=True) if scrape is not None}


def _read(address: str) -> Scrape | None:
    try:
        with _direct.open(f"http://{address}/metrics", timeout=_TIMEOUT_S) as page:
            return parse(page.read().decode())
    except (OSError, ValueError):  # not reachable, or not a metrics server
        return None


def parse(text: str) -> Scrape:
    """Return the samples of a metrics page in the Prometheus text format."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def is_of_run(scrape: Scrape, run: RunIdentity) -> bool:
    """Return whether a process belongs to a run; true if it does not say, as one of an older version of deskrl."""
    for name, labels in scrape:
        if name == "deskrl_run_info":
            values = dict(labels)
            return run.is_same_run(RunIdentity(values.get("name", ""), values.get("id", ""), values.get("host", "")))
    return True


def read_gpus() -> list[Gpu]:
    """Return the GPUs of this machine; empty if nvidia-smi is not installed or fails."""
    if shutil.which(_GPU_QUERY[0]) is None:
        return []
    done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S * 5)
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Parse lines "utilisation in percent, used MiB, total MiB"; GPUs without numbers, as in MIG mode, are left out."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and all(part.isdecimal() for part in parts):
            gpus.append(Gpu(int(parts[0]) / 100, int(parts[1]), int(parts[2])))
    return gpus
