"""LoRA: the remaining numeric types and ZeRO stages, and a run on real desktops that improves a policy."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from deepspeed_kit import run_in_ranks
from lora_kit import build_padded_model, check_results, train_and_resume
from ports_kit import free_port

from deskrl.launch.confidence_intervals import newcombe_difference

SMOKE = Path(__file__).parents[2] / "deploy" / "runs" / "smoke.toml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_padded_model(tmp_path_factory.mktemp("model") / "base")


def test_one_rank_saves_resumes_and_publishes_an_adapter_exactly_in_every_numeric_type(
    folder: Path, tmp_path: Path
) -> None:
    run_in_ranks(
        train_and_resume, 1, folder, [{}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "zero_stage": 3}], tmp_path
    )
    whole, half, sharded = check_results(folder, tmp_path, 3)
    assert half[0] == pytest.approx(whole[0], rel=0.1)
    assert sharded[0] == pytest.approx(half[0], rel=0.05)


def test_two_ranks_save_resume_and_publish_an_adapter_exactly_with_sharded_gradients_and_offload(
    folder: Path, tmp_path: Path
) -> None:
    cases = [{"zero_stage": 1}, {"zero_stage": 2, "offload_optimizer": True}, {"zero_stage": 2}]
    run_in_ranks(train_and_resume, 2, folder, cases, tmp_path)
    one, *others = check_results(folder, tmp_path, 3)
    for norms in others:
        assert norms == pytest.approx(one, rel=1e-3)


def test_two_ranks_save_resume_and_publish_an_adapter_exactly_in_half_precision(folder: Path, tmp_path: Path) -> None:
    sharded = [{"zero_stage": 3, "activation_checkpointing": mode} for mode in ("off", "selective", "full")]
    cases = [{"dtype": "bfloat16"} | case for case in ({"zero_stage": 2}, *sharded)]
    run_in_ranks(train_and_resume, 2, folder, cases, tmp_path)
    whole, *others = check_results(folder, tmp_path, len(cases))
    assert others == [pytest.approx(whole, rel=0.02)] * len(others)


def up(runs: Path, name: str, *arguments: str) -> Path:
    """Run the smoke configuration with options to its end, whether or not criteria are met; return its directory."""
    ports = ["--replay.address", f"127.0.0.1:{free_port()}", "--inference.address", f"127.0.0.1:{free_port()}"]
    words = ["up", str(SMOKE), "--runs", str(runs), "--name", name, *ports, *arguments]
    done = subprocess.run([sys.executable, "-m", "deskrl.cli.main", *words], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout[-3000:] + done.stderr[-1000:]
    return runs / name


@pytest.mark.timeout(2400)
def test_an_adapter_improves_a_policy_on_real_desktops(tmp_path: Path) -> None:
    """The warm start trains the whole model: the head of one with random weights is too small for confident actions."""
    start = up(tmp_path, "start", "--learner.grpo.num_updates=0", "--learner.eval.num_episodes=0")
    model = ["--model.build=null", f"--model.path={start / 'checkpoints' / 'epoch_0'}", "--learner.warm_start=null"]
    run = up(tmp_path, "lora", *model, "--learner.lora.rank=16", "--learner.grpo.learning_rate=2e-3")
    evaluation = json.loads((run / "results" / "evaluation.json").read_text())
    before, after = evaluation["before"], evaluation["after"]
    counts = (before["successes"], before["episodes"], after["successes"], after["episodes"])
    _, low, _ = newcombe_difference(*counts)
    assert low > 0, counts
    proof = json.loads((run / "results" / "checkpoint_proof.json").read_text())
    assert proof["max_difference"] < 1e-3
    assert not (run / "merged").exists()
