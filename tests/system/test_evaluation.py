"""`deskrl eval`: evaluates a model on a task list and its noisy variants, and prints a finished evaluation again.

The model is a Qwen2-VL, prompted as UI-TARS 1.0 and served in int4 where the processor has a kernel for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from processor_kit import int4_problem

from deskrl.actor.desktops.debian_packages import missing_packages

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"
SUITE = Path(__file__).parents[2] / "actor" / "deskrl" / "actor" / "suite"

pytestmark = pytest.mark.skipif(bool(missing_packages()), reason=f"packages missing: {missing_packages()}")


def deskrl(*words: object) -> str:
    result = subprocess.run(
        [sys.executable, "-m", "deskrl.cli.main", *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout


def test_a_checkpoint_is_evaluated_on_a_list_and_its_noisy_variants(tmp_path: Path) -> None:
    common = [f"--runs={tmp_path / 'runs'}", "--desktop.num_envs=2", "--agent.action_language=ui_tars_1_0"]
    deskrl("prepare", SMOKE, *common)
    listed, noisy = tmp_path / "list.json", tmp_path / "noisy"
    listed.write_text(json.dumps({"os": ["make-a-folder"], "text_editor": ["write-a-word"]}))
    deskrl("tasks", "noisy", listed, "--root", SUITE, "--level", "light", "--out", noisy)
    command = ["eval", "--config", SMOKE, "--checkpoint", tmp_path / "runs" / "smoke" / "model"]
    command += ["--tasks", listed, "--root", SUITE, "--noisy", noisy / "list.json"]
    command += ["--name", "judged", *common, "--tasks.ids=[]"]
    command += ["--inference.dtype=bfloat16", "--tasks.max_steps=3"]
    if not int4_problem():
        command += ["--inference.quantization=int4"]
    command += ["--learner.keep_checkpoints=1000000"]  # more than any disk holds, but an evaluation writes none
    output = deskrl(*command)
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
    assert "feasible only" in output and "4 of 4 episodes" in output
    assert output.count("none of the 2 tasks was left out") == 2
    root = tmp_path / "runs" / "judged"
    assert "has finished" in deskrl("status", root)
    page = Path(deskrl("report", root).strip()).read_text()
    assert "deskrl evaluation" in page and "<b>4 of 4</b>" in page
    assert "episodes, " not in deskrl(*command), "a finished evaluation is only printed"
    compared = json.loads(deskrl("compare", sets / "list", sets / "list-noisy", "--json"))
    assert compared["all"]["num_paired"] == 2
