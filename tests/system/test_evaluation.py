"""`deskrl eval` as a person has it: a model, real desktops, one version from end to end; told again for nothing.

The model is a Qwen2-VL, prompted as UI-TARS 1.0 and served in 4 bits; the tasks are a list and beside it its noisy
variants, as `deskrl tasks noisy` writes them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ports_kit import free_port

from deskrl.actor.desktops.packages import missing_packages

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
SUITE = Path(__file__).parents[2] / "actor" / "deskrl" / "actor" / "suite"

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")


def deskrl(*words: object) -> str:
    ended = subprocess.run(
        [sys.executable, "-m", "deskrl.core.cli", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    return ended.stdout


def test_a_checkpoint_is_evaluated_on_a_list_and_its_noisy_variants(tmp_path: Path) -> None:
    common = [f"--runs={tmp_path / 'runs'}", f"--replay.address=127.0.0.1:{free_port()}"]
    common += [f"--inference.address=127.0.0.1:{free_port()}", "--desktop.num_envs=2"]
    common += ["--agent.family=ui_tars_1_0"]
    deskrl("prepare", SMOKE, *common)
    listed, noisy = tmp_path / "list.json", tmp_path / "noisy"
    listed.write_text(json.dumps({"os": ["make-a-folder"], "text_editor": ["write-a-word"]}))
    deskrl("tasks", "noisy", listed, "--root", SUITE, "--level", "light", "--out", noisy)
    command = ["eval", "--config", SMOKE, "--checkpoint", tmp_path / "runs" / "smoke" / "model"]
    command += ["--tasks", listed, "--root", SUITE, "--noisy", noisy / "list.json"]
    command += ["--name", "judged", *common, "--tasks.tasks=[]"]
    command += ["--inference.quantization=int4", "--inference.dtype=bfloat16"]
    command += ["--learner.keep_checkpoints=1000000"]  # no disk has the room, and an evaluation needs none
    told = deskrl(*command)
    sets = tmp_path / "runs" / "judged" / "sets"
    for folder in (sets / "list", sets / "list-noisy"):
        summary = json.loads((folder / "results" / "evaluation.json").read_text())
        assert (summary["all"]["num_tasks"], summary["all"]["num_episodes"], summary["all"]["num_faulted"]) == (2, 2, 0)
        assert {"act", "image", "prefill", "decode", "transport"} <= summary["timings_ms"].keys()
        assert set(summary["applications"]) == {"os", "text_editor"} and len(summary["versions"]) == 1
        for name in ("make-a-folder", "write-a-word"):
            record = json.loads((folder / "results" / "task_results" / f"{name}.json").read_text())
            for episode in record["episodes"]:
                assert len(episode["screenshots"]) == episode["num_steps"] + 1 and episode["duration_s"] > 0
                assert all((folder / "results" / picture).stat().st_size for picture in episode["screenshots"])
    assert "feasible only" in told and "4 of 4 episodes" in told
    assert "episodes, " not in deskrl(*command), "what was played is told again"
    compared = json.loads(deskrl("compare", sets / "list", sets / "list-noisy", "--json"))
    assert compared["all"]["num_paired"] == 2
