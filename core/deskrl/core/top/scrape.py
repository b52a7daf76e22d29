"""Reads the metrics ports of a run's roles, and the GPUs of this machine. Knows HTTP and text forms; no metric."""

from __future__ import annotations

import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from deskrl.core.config import RunConfig
from deskrl.core.running.preflight import Endpoint, endpoints
from deskrl.core.top.window import Scrape

_TIMEOUT_S = 2.0
_ANY_HOST = ("0.0.0.0", "[::]", "::")
_GPU_QUERY = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    """How busy a GPU is."""

    busy_share: float
    used_mib: float
    total_mib: float


def metrics_addresses(config: RunConfig) -> list[str]:
    """Where the roles of a run serve metrics, `role:port` by `host:port`."""
    return [address_of(endpoint) for endpoint in endpoints(config) if endpoint.key.endswith("metrics_port")]


def address_of(endpoint: Endpoint) -> str:
    """Where this machine finds what listens there."""
    return f"{'127.0.0.1' if endpoint.host in _ANY_HOST else endpoint.host}:{endpoint.port}"


def read_all(addresses: Sequence[str]) -> dict[str, Scrape]:
    """What each process says that answers."""
    with ThreadPoolExecutor(max_workers=16) as pool:
        scrapes = pool.map(_read, addresses)
        return {address: scrape for address, scrape in zip(addresses, scrapes, strict=True) if scrape is not None}


def _read(address: str) -> Scrape | None:
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=_TIMEOUT_S) as page:
            return parse(page.read().decode())
    except (OSError, ValueError):  # it is away, or no metrics are what answers
        return None


def parse(text: str) -> Scrape:
    """The samples of Prometheus' text form."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def read_gpus() -> list[Gpu]:
    """This machine's GPUs; none without the driver's program."""
    if shutil.which(_GPU_QUERY[0]) is None:
        return []
    done = subprocess.run(_GPU_QUERY, capture_output=True, text=True, timeout=_TIMEOUT_S * 5)
    return parse_gpus(done.stdout) if done.returncode == 0 else []


def parse_gpus(text: str) -> list[Gpu]:
    """Lines of "busy per cent, used MiB, total MiB"; a GPU that tells no number (as one cut into parts) is left out."""
    gpus = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 3 and all(part.isdecimal() for part in parts):
            gpus.append(Gpu(int(parts[0]) / 100, int(parts[1]), int(parts[2])))
    return gpus
