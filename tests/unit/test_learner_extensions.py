"""Extension points of the learner: the suites on built-in and example implementations, and what a run rejects."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from deskrl.cli.main import main
from deskrl.core.config import GrpoConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.learner.curriculum import Curriculum
from deskrl.learner.extensions import check_extensions
from deskrl.learner.loss_interface import LossInputs
from deskrl.learner.loss_registry import LOSSES, compute_loss, select_loss
from deskrl.learner.metrics.run_trackers import RunTrackers
from deskrl.testing import advantages, losses, task_samplers, trackers

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the examples and the modules of a test importable."""
    for folder in (tmp_path, ROOT / "examples" / "loss", ROOT / "examples" / "tracker"):
        monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


# Losses.


class TestGrpo(losses.LossSuite):
    selection = "grpo"


class TestGrpoOfArpo(losses.LossSuite):
    selection = "grpo"
    grpo: Mapping[str, Any] = {"importance_weighting": "off", "dual_clip": 3.0}


class TestGspo(losses.LossSuite):
    selection = "gspo"


class TestGspoWithAWideRange(losses.LossSuite):
    selection = "gspo"
    options: Mapping[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
    grpo: Mapping[str, Any] = {"importance_weighting": "off"}


class TestCispo(losses.LossSuite):
    selection = "cispo"


class TestCispoExample(losses.LossSuite):
    selection = "cispo_loss:cispo"
    options: Mapping[str, Any] = {"clip_high": 2.0}


def test_the_built_in_loss_uses_the_keys_of_grpo() -> None:
    config = GrpoConfig(clip_low=0.1, clip_high=0.15, importance_cap=1.2, dual_clip=1.5)
    inputs = losses.make_inputs(12)
    result = compute_loss(select_loss(config), inputs, config)
    advantages_N = inputs.advantages_N
    weight_N = (inputs.prox_logprobs_N - inputs.behaviour_logprobs_N).exp().clamp(max=1.2)
    weight_N[inputs.from_buffer_N] = 1.0
    ratio_N = (inputs.logprobs_N - inputs.prox_logprobs_N).exp()
    gain_N = torch.minimum(ratio_N * advantages_N, ratio_N.clamp(0.9, 1.15) * advantages_N)
    gain_N = torch.where(advantages_N < 0, torch.maximum(gain_N, 1.5 * advantages_N), gain_N)
    assert result.loss.equal(-(weight_N * gain_N / inputs.denominators_N).sum())
    assert result.clipped_N.tolist() == (gain_N != ratio_N * advantages_N).tolist() and bool(result.clipped_N.any())
    assert result.importance_N.equal(weight_N)


def test_cispo_keeps_the_gradient_of_a_clipped_token_at_its_largest_weight() -> None:
    """Ratios e^0 = 1 and e^2 = 7.39, clipped at 1 + 3 = 4; importance weights 1 and, from the buffer, 1."""
    config = GrpoConfig(loss="cispo_loss:cispo")
    inputs = LossInputs(
        logprobs_N=torch.tensor([-1.0, -1.0], requires_grad=True),
        prox_logprobs_N=torch.tensor([-1.0, -3.0]),
        behaviour_logprobs_N=torch.tensor([-1.0, -9.0]),
        advantages_N=torch.tensor([0.5, 0.5]),
        entropy_N=torch.zeros(2),
        from_buffer_N=torch.tensor([False, True]),
        turn_N=torch.tensor([0, 0]),
        denominators_N=torch.tensor([2.0, 2.0]),
    )
    result = compute_loss(select_loss(config), inputs, config)
    (gradient_N,) = torch.autograd.grad(result.loss, inputs.logprobs_N)
    assert gradient_N.tolist() == pytest.approx([-0.25, -1.0])
    assert float(result.loss.detach()) == pytest.approx(1.25)
    assert result.clipped_N.tolist() == [False, True]
    assert result.metrics["pi_weight"].tolist() == [1.0, 4.0]


FAULTY_LOSSES = {
    "the mean over tokens": ("-(i.logprobs_N * i.advantages_N).mean()", "test_the_losses_of_micro_batches_add_up"),
    "without denominators": (
        "-(i.logprobs_N * i.advantages_N).sum()",
        "test_the_loss_of_each_token_is_divided_by_its_denominator",
    ),
    "the wrong sign": (
        "(i.logprobs_N * i.advantages_N / i.denominators_N).sum()",
        "test_the_first_optimizer_step_follows_the_advantage",
    ),
    "one loss per token": (
        "-(i.logprobs_N * i.advantages_N / i.denominators_N)",
        "test_loss_and_gradient_are_finite",
    ),
    "no gradient": ("-(i.logprobs_N * i.advantages_N).sum().detach()", "test_loss_and_gradient_are_finite"),
    "an unbounded ratio": (
        "-((i.logprobs_N - i.prox_logprobs_N).mul(9).exp() * i.advantages_N / i.denominators_N).sum()",
        "test_a_policy_far_from_the_others_leaves_loss_and_gradient_finite",
    ),
    "the place in the micro-batch": (
        "-(i.logprobs_N * i.advantages_N / i.denominators_N * torch.arange(1, 1 + len(i.logprobs_N))).sum()",
        "test_the_order_of_the_tokens_does_not_matter",
    ),
    "random numbers": (
        "-(i.logprobs_N * i.advantages_N / i.denominators_N).sum() * torch.rand(())",
        "test_the_result_is_the_same_for_the_same_tokens",
    ),
    "the first token": (
        "-(i.logprobs_N * i.advantages_N / i.denominators_N).sum() + 0 * i.logprobs_N[0]",
        "test_a_micro_batch_without_tokens_has_a_loss_of_0",
    ),
    "changed inputs": (
        "-(i.logprobs_N * i.advantages_N.mul_(0.5) / i.denominators_N).sum()",
        "test_the_inputs_are_not_changed",
    ),
}
"""Expression of a faulty loss, and the check that finds the fault."""


@pytest.mark.parametrize("fault", FAULTY_LOSSES)
def test_the_suite_finds_a_faulty_loss(tmp_path: Path, fault: str) -> None:
    expression, check = FAULTY_LOSSES[fault]
    (tmp_path / "own_loss.py").write_text(
        "import torch\nfrom deskrl.learner.loss_interface import LossResult\n"
        "def faulty(i, config, options):\n"
        f"    return LossResult({expression}, i.from_buffer_N, torch.ones_like(i.advantages_N))\n"
    )
    suite = losses.LossSuite()
    extra = {"difference": -20.0} if "far_from" in check else {}
    with pytest.raises((AssertionError, UserError, IndexError)):
        getattr(suite, check)(LOSSES.select("own_loss:faulty"), **extra)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("7", "returned int instead of a LossResult"),
        ("LossResult(i.logprobs_N.sum(), None, None)", "returned NoneType instead of a tensor as clipped_N"),
        (
            "LossResult(i.logprobs_N.sum(), i.from_buffer_N, i.advantages_N[:2])",
            r"returned importance_N of shape \(2,\) instead of \(12,\)",
        ),
        (
            "LossResult(i.logprobs_N.sum(), i.from_buffer_N, i.advantages_N, {'own': i.logprobs_N.mean()})",
            r"returned metrics\['own'\] of shape \(\) instead of \(12,\)",
        ),
        ("LossResult(i.advantages_N.sum(), i.from_buffer_N, i.advantages_N)", "returned a loss without a gradient"),
    ],
)
def test_a_result_that_cannot_be_trained_on_is_an_error_that_names_the_loss(
    tmp_path: Path, result: str, problem: str
) -> None:
    (tmp_path / "own_result.py").write_text(
        f"from deskrl.learner.loss_interface import LossResult\ndef loss(i, config, options):\n    return {result}\n"
    )
    config = GrpoConfig(loss="own_result:loss")
    with pytest.raises(UserError, match="^learner.grpo.loss: own_result:loss " + problem):
        compute_loss(select_loss(config), losses.make_inputs(12), config)


# Advantages.


class TestCentred(advantages.AdvantageSuite):
    selection = "centred"


class TestStandardised(advantages.AdvantageSuite):
    selection = "standardised"


@pytest.mark.parametrize(
    ("expression", "check"),
    [
        ("rewards[1:]", "test_each_trajectory_has_one_finite_advantage"),
        ("[r / sum(rewards) if sum(rewards) else float('nan') for r in rewards]", "test_each_trajectory_has_one_"),
        ("[-r for r in rewards]", "test_a_higher_reward_never_has_a_lower_advantage"),
        ("[0.0 for r in rewards]", "test_a_higher_reward_never_has_a_lower_advantage"),
        ("[r - rewards[0] * i for i, r in enumerate(rewards)]", "test_the_order_of_the_trajectories_does_not_matter"),
        ("[r - random.random() for r in rewards]", "test_the_advantages_are_the_same_for_the_same_rewards"),
    ],
)
def test_the_suite_finds_a_faulty_advantage(tmp_path: Path, expression: str, check: str) -> None:
    (tmp_path / "own_advantage.py").write_text(f"import random\ndef faulty(rewards, options): return {expression}\n")
    suite = advantages.AdvantageSuite()
    (name,) = (name for name in dir(suite) if name.startswith(check))
    selected = advantages.ADVANTAGES.select("own_advantage:faulty")

    def check_all_groups() -> None:
        for rewards in advantages.GROUPS:
            getattr(suite, name)(selected, rewards)

    with pytest.raises((AssertionError, UserError)):
        check_all_groups()


# Task samplers.


class TestEpochs(task_samplers.TaskSamplerSuite):
    selection = "epochs"


SAMPLER = """
import random
from deskrl.core.config import Section
from deskrl.core.registry import with_options
calls = []
class Options(Section):
    floor: float = 0.1
@with_options(Options)
def hardest_first(inputs, options):
    weights = [max(options.floor, 1 - inputs.success_rates.get(it, 0)) for it in inputs.task_ids]
    return random.Random(inputs.seed * 1_000_003 + inputs.ordinal).choices(inputs.task_ids, weights)[0]
def unknown(inputs, options): return "nowhere"
def remembers(inputs, options):
    calls.append(0)
    return inputs.task_ids[len(calls) % len(inputs.task_ids)]
def hashes(inputs, options): return inputs.task_ids[hash(str(inputs.ordinal)) % len(inputs.task_ids)]
def first_only(inputs, options): return inputs.task_ids[0]
"""
"""A task sampler with options, and faulty ones."""


@pytest.fixture
def own_sampler(tmp_path: Path) -> None:
    (tmp_path / "own_sampler.py").write_text(SAMPLER)


@pytest.mark.usefixtures("own_sampler")
class TestOwnSampler(task_samplers.TaskSamplerSuite):
    selection = "own_sampler:hardest_first"
    options: Mapping[str, Any] = {"floor": 0.2}

    @pytest.mark.parametrize(
        ("name", "check"),
        [
            ("remembers", "test_a_group_plays_the_same_task_whatever_was_asked_before"),
            ("hashes", "test_the_plan_is_the_same_in_every_process"),
            ("first_only", "test_every_task_is_played_before_its_success_rate_is_known"),
        ],
    )
    def test_the_suite_finds_a_faulty_sampler(self, name: str, check: str) -> None:
        self.selection, self.options = f"own_sampler:{name}", {}
        with pytest.raises(AssertionError):
            getattr(self, check)(task_samplers.TASK_SAMPLERS.select(self.selection))


def curriculum(sampler: str) -> Curriculum:
    config = RunConfig.model_validate({"tasks": {"sampler": sampler}})
    return Curriculum(config, {"web": b"{}", "image": b"{}"})


@pytest.mark.usefixtures("own_sampler")
def test_the_curriculum_plays_the_tasks_that_the_sampler_chooses() -> None:
    plan = curriculum("own_sampler:hardest_first")
    easy_web = [plan.train_group(ordinal, {"web": 1.0, "image": 0.0}).task_id for ordinal in range(200)]
    assert 5 <= easy_web.count("web") <= 35, "one eleventh of 200"


@pytest.mark.usefixtures("own_sampler")
def test_a_task_that_does_not_exist_is_an_error_that_names_the_sampler() -> None:
    problem = "^tasks.sampler: own_sampler:unknown returned 'nowhere' for group 3, which is not the id of one of the 2"
    with pytest.raises(UserError, match=problem):
        curriculum("own_sampler:unknown").train_group(3)


# Trackers.


class JsonServer:
    """HTTP server that keeps the JSON bodies it gets."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/metrics"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server() -> Iterator[JsonServer]:
    server = JsonServer()
    yield server
    server.close()


class TestHttpExample(trackers.TrackerSuite):
    selection = "http_tracker:HttpTracker"

    @pytest.fixture
    def options(self, server: JsonServer) -> Mapping[str, Any]:
        return {"url": server.url}


def test_the_example_posts_each_line_of_metrics(server: JsonServer, tmp_path: Path) -> None:
    name = "http_tracker:HttpTracker"
    config = RunConfig(runs=tmp_path, name="mine", tracker=(name,), tracker_options={name: {"url": server.url}})
    run = RunTrackers(config)
    run.log("update", {"update": 2, "loss": 0.5, "applied": True, "per_task": {"web": {"n": 4}}, "note": "text"})
    run.log("phase", {"phase": "training"})
    run.log("replay", {"stored": {"web": 1}})
    run.close()
    metrics = {"update/update": 2.0, "update/loss": 0.5, "update/applied": 1.0, "update/per_task/web/n": 4.0}
    assert server.bodies == [
        {"run": "mine", "step": 2, "metrics": metrics},
        {"run": "mine", "step": 2, "metrics": {"replay/stored/web": 1.0}},
    ]


TRACKERS = """
class Raises:
    def __init__(self, config, options): pass
    def log(self, step, metrics): raise ConnectionError("no route to host")
    def close(self): raise OSError("gone")
class Keeps:
    logged = []
    def __init__(self, config, options): pass
    def log(self, step, metrics): self.logged.append((step, metrics))
    def close(self): self.logged.append("closed")
class RefusesToStart(Keeps):
    def __init__(self, config, options): raise RuntimeError("no such project")
"""


def test_a_tracker_that_raises_is_named_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "own_trackers.py").write_text(TRACKERS)
    run = RunTrackers(RunConfig(runs=tmp_path, tracker=("own_trackers:Raises", "own_trackers:Keeps")))
    with caplog.at_level(logging.WARNING):
        run.log("update", {"update": 1, "loss": 0.5})
        run.log("update", {"update": 2, "loss": 0.25})
        run.close()
    (warning,) = caplog.messages
    assert "own_trackers:Raises" in warning and "ConnectionError: no route to host" in warning
    assert sys.modules["own_trackers"].Keeps.logged == [
        (1, {"update/update": 1.0, "update/loss": 0.5}),
        (2, {"update/update": 2.0, "update/loss": 0.25}),
        "closed",
    ]


def test_a_tracker_that_cannot_be_started_ends_the_learner_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "own_trackers.py").write_text(TRACKERS)
    with pytest.raises(UserError, match="own_trackers:RefusesToStart cannot be started: RuntimeError: no such project"):
        RunTrackers(RunConfig(runs=tmp_path, tracker=("own_trackers:RefusesToStart",)))


# The check before a run starts.


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"learner": {"grpo": {"loss": "reinforce"}}}, "learner.grpo.loss: unknown policy loss 'reinforce'"),
        ({"learner": {"grpo": {"loss": "own_bad:nothing"}}}, "learner.grpo.loss: own_bad:nothing: "),
        (
            {"learner": {"grpo": {"loss": "own_bad:number"}}},
            "own_bad:number cannot be used as policy loss: it cannot be called",
        ),
        (
            {"learner": {"grpo": {"loss": "own_bad:alone"}}},
            "cannot be used as policy loss: it does not take the arguments inputs, config, options",
        ),
        ({"learner": {"grpo": {"loss_options": {"x": 1}}}}, "learner.grpo.loss_options.x: grpo has no options"),
        (
            {"learner": {"grpo": {"loss": "cispo_loss:cispo", "loss_options": {"clip_high": 0}}}},
            "learner.grpo.loss_options.clip_high: Input should be greater than 0",
        ),
        ({"learner": {"grpo": {"advantage": "best"}}}, "learner.grpo.advantage: unknown advantage 'best'"),
        (
            {"tasks": {"sampler": "own_bad:alone"}},
            "tasks.sampler: own_bad:alone cannot be used as task sampler: it does not",
        ),
        ({"tracker": ["paper"]}, "tracker: unknown tracker 'paper'"),
        ({"tracker": ["own_bad:Silent"]}, "own_bad:Silent cannot be used as tracker: it has no method log, close"),
        ({"tracker_options": {"wandbb": {}}}, "tracker_options.wandbb: there is no such tracker"),
        (
            {"tracker": ["http_tracker:HttpTracker"]},
            "tracker_options.http_tracker:HttpTracker.url: Field required",
        ),
    ],
)
def test_an_extension_that_cannot_be_used_is_rejected_with_its_key(
    tmp_path: Path, values: dict[str, Any], problem: str
) -> None:
    (tmp_path / "own_bad.py").write_text("number = 7\ndef alone(inputs): ...\nclass Silent: ...\n")
    with pytest.raises(UserError) as caught:
        check_extensions(RunConfig.model_validate(values))
    assert problem in str(caught.value)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "mlflow"])
def test_a_missing_package_of_a_tracker_is_reported_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"the package {name} is not installed \(hint: pip install 'deskrl\[{name}\]'"):
        check_extensions(RunConfig(tracker=(name,)))


def test_a_run_with_an_unknown_loss_ends_with_one_line_before_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [f"--runs={tmp_path / 'runs'}", "--learner.grpo.loss=no_such_module:loss"]
    assert main(["up", str(ROOT / "deploy" / "runs" / "simulated.toml"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("deskrl: learner.grpo.loss: no_such_module:loss cannot be imported: ")
    assert not (tmp_path / "runs").exists()
