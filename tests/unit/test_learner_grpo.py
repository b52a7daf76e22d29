"""Training batches and updates of GRPO: rewards, advantages, learning rate and loss, with hand-computed numbers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from deskrl.core.config import GrpoConfig
from deskrl.core.presets import PRESETS
from deskrl.core.step_codec import Step
from deskrl.learner.batches.collator import MicroBatch
from deskrl.learner.batches.packing import Row
from deskrl.learner.episode_types import Trajectory
from deskrl.learner.group_filter import FilteredGroup
from deskrl.learner.grpo import build_training_batch, learning_rate, update
from deskrl.learner.loss_interface import LossInputs
from deskrl.learner.losses import policy_loss
from deskrl.learner.metrics.update_stats import UpdateReport
from deskrl.learner.policy.deepspeed_engine import StepOutcome
from deskrl.learner.policy.policy_model import Scores

ARPO = GrpoConfig.model_validate(PRESETS["arpo"]["learner"]["grpo"])


def trajectory(reward: float, num_tokens: int = 1, format_ok: bool = True) -> Trajectory:
    step = Step(0, "a", ("a",), "", (1, 2), tuple(range(num_tokens)), (-1.0,) * num_tokens)
    return Trajectory("e", "task", reward, (step,), format_ok)


def advantages_of(trajectories: list[Trajectory], config: GrpoConfig) -> list[float]:
    group = FilteredGroup("train/0", "task", tuple(trajectories))
    values: list[float] = build_training_batch([group], lambda span: 0, config).advantages_T.tolist()
    return values


def test_advantages_of_one_success_in_eight_with_the_arpo_preset() -> None:
    advantages = advantages_of([trajectory(1.0), *[trajectory(0.0) for _ in range(7)]], ARPO)
    assert advantages == pytest.approx([2.4749, *[-0.3536] * 7], abs=5e-5)


def test_advantages_of_one_success_in_eight_with_the_deskrl_preset() -> None:
    advantages = advantages_of([trajectory(1.0), *[trajectory(0.0) for _ in range(7)]], GrpoConfig())
    assert advantages == pytest.approx([0.875, *[-0.125] * 7])


def test_an_unparsable_action_costs_a_reward_of_0_5_with_the_arpo_preset() -> None:
    """Rewards 1, 0, 0 and -0.5: mean 0.125, sample standard deviation sqrt(1.1875 / 3) = 0.629153."""
    group = [trajectory(1.0), trajectory(0.0), trajectory(0.0), trajectory(0.0, format_ok=False)]
    assert advantages_of(group, ARPO) == pytest.approx([1.39076, -0.19868, -0.19868, -0.99340], abs=1e-4)


def test_the_tokens_of_a_trajectory_are_counted_over_all_its_rows() -> None:
    group = [trajectory(1.0, num_tokens=3), trajectory(0.0, num_tokens=5)]
    batch = build_training_batch([FilteredGroup("train/0", "task", tuple(group))], lambda span: 0, ARPO)
    assert batch.num_tokens_T.tolist() == [3, 5]


@pytest.mark.parametrize(
    ("warmup_updates", "rates"),
    [(0, [1e-6, 1e-6, 1e-6]), (2, [0.0, 5e-7, 1e-6, 1e-6]), (4, [0.0, 2.5e-7, 5e-7, 7.5e-7, 1e-6])],
)
def test_the_learning_rate_rises_linearly_over_the_warm_up(warmup_updates: int, rates: list[float]) -> None:
    config = GrpoConfig(learning_rate=1e-6, warmup_updates=warmup_updates)
    assert [learning_rate(config, number) for number in range(len(rates))] == pytest.approx(rates)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.0, 0.5, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2]),  # 0.2 + 0.8 * (1 - n / 4)
        ("cosine", [0.0, 0.5, 1.0, 0.2 + 0.4 * (1 + 0.5**0.5), 0.6, 0.2 + 0.4 * (1 - 0.5**0.5), 0.2, 0.2]),
    ],
)
def test_the_learning_rate_follows_its_schedule_from_the_warm_up_to_the_last_update(
    schedule: str, rates: list[float]
) -> None:
    """Two updates of warm-up and four of the schedule, with a fifth of the learning rate at its end."""
    config = GrpoConfig.model_validate(
        {
            "learning_rate": 1.0,
            "warmup_updates": 2,
            "num_updates": 6,
            "learning_rate_schedule": schedule,
            "min_learning_rate_ratio": 0.2,
        }
    )
    assert [learning_rate(config, number) for number in range(len(rates))] == pytest.approx(rates)


def test_a_schedule_without_updates_after_the_warm_up_starts_at_the_whole_learning_rate() -> None:
    config = GrpoConfig(learning_rate=0.5, warmup_updates=3, num_updates=3, learning_rate_schedule="linear")
    assert learning_rate(config, 3) == 0.5


def test_a_batch_of_the_arpo_preset_has_128_trajectories_and_two_optimizer_steps() -> None:
    preset: dict[str, Any] = dict(PRESETS["arpo"])
    num_trajectories = ARPO.groups_per_batch * preset["tasks"]["num_rollouts"]
    assert (num_trajectories, num_trajectories // ARPO.num_minibatches) == (128, 64)


class OneParameterEngine:
    """Engine of one rank whose policy gives every token the same logprob, a parameter."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.logprob = torch.tensor(-1.0, requires_grad=True)

    def set_optimizer(self, learning_rate: float, weight_decay: float) -> None: ...

    def accumulate_gradients(self, num_micro_batches: int) -> Any:
        return nullcontext()

    def forward(
        self, micro: MicroBatch, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs_N = self.logprob.expand(len(micro.target_N))
        return logprobs_N, -logprobs_N if entropy_gradient else torch.ones(len(micro.target_N))

    def score(self, micro: MicroBatch, temperature: float) -> Scores:
        logprobs_N = self.logprob.detach().expand(len(micro.target_N))
        return Scores(logprobs_N, torch.ones(len(micro.target_N)))

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> StepOutcome:
        return StepOutcome(True, float(self.logprob.grad.abs()) if self.logprob.grad is not None else 0.0)

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        return list(values)

    max_over_ranks = sum_over_ranks

    def gather(self, value: Any) -> list[Any]:
        return [value]


class RowLoader:
    """Loader whose micro-batches are single rows, and one without tokens."""

    def shard(self, rows: Sequence[Row]) -> list[list[Row]]:
        return [*([row] for row in rows), []]

    def load(self, shard: Sequence[Sequence[Row]]) -> Iterator[MicroBatch]:
        for rows in shard:
            numbers = {
                "target_N": [target for row in rows for target in row.targets],
                "staleness_N": [value for row in rows for value in row.staleness],
                "trajectory_N": [row.trajectory for row in rows for _ in row.targets],
                "turn_N": [index for index, row in enumerate(rows) for _ in row.targets],
            }
            tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in numbers.items()}
            behaviour_logprobs_N = torch.tensor([value for row in rows for value in row.behaviour_logprobs])
            none = torch.zeros(0)
            yield MicroBatch(none, none, (), (), (), none, behaviour_logprobs_N=behaviour_logprobs_N, **tensors)


@pytest.mark.parametrize(("loss", "metrics"), [("grpo", {}), ("cispo_loss:cispo", {"pi_weight": 1.0})])
def test_an_update_uses_the_configured_loss_and_reports_its_metrics(
    monkeypatch: pytest.MonkeyPatch, loss: str, metrics: dict[str, float]
) -> None:
    """Advantages 0.5 for 3 tokens and -0.5 for 5, divided by 2 trajectories x 4 tokens: a gradient of 1 / 8."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "loss"))
    config = GrpoConfig(loss=loss, loss_denominator_tokens=4)
    group = FilteredGroup("train/0", "task", (trajectory(1.0, num_tokens=3), trajectory(0.0, num_tokens=5)))
    batch = build_training_batch([group], lambda span: 0, config)
    engine: Any = OneParameterEngine()
    loader: Any = RowLoader()
    report = update(engine, loader, batch, config, 0)
    assert engine.logprob.grad.item() == pytest.approx(0.125)
    assert report.gradient_norm == pytest.approx(0.125)
    assert report.loss_metrics == metrics
    assert (report.num_tokens, report.clip_fraction, report.importance_mean) == (8, 0.0, 1.0)


class ConstantReference:
    """Reference policy that gives every token the same logprob."""

    def __init__(self, logprob: float) -> None:
        self._logprob = logprob

    def logprobs(self, micro_batches: Iterable[MicroBatch], temperature: float) -> list[torch.Tensor]:
        return [torch.full((len(micro.target_N),), self._logprob) for micro in micro_batches]


def update_of(config: GrpoConfig, reference: float | None = None) -> tuple[UpdateReport, OneParameterEngine]:
    """Update with a success of 3 tokens and a failure of 5; the policy gives all of them the logprob -1."""
    group = FilteredGroup("train/0", "task", (trajectory(1.0, num_tokens=3), trajectory(0.0, num_tokens=5)))
    batch = build_training_batch([group], lambda span: 0, config)
    engine, loader = OneParameterEngine(), RowLoader()
    policy: Any = engine
    micro_batches: Any = loader
    found = None if reference is None else ConstantReference(reference)
    return update(policy, micro_batches, batch, config, 0, found), engine


def gradient_of(config: GrpoConfig, reference: float | None = None) -> float:
    gradient = update_of(config, reference)[1].logprob.grad
    assert gradient is not None
    return float(gradient)


def test_coefficients_of_0_leave_the_update_bit_for_bit_that_of_the_policy_loss() -> None:
    logprob = torch.tensor(-1.0, requires_grad=True)
    total = 0.0
    for advantage, num_tokens in ((0.5, 3), (-0.5, 5)):
        tokens = torch.full((num_tokens,), -1.0)
        inputs = LossInputs(
            logprobs_N=logprob.expand(num_tokens),
            prox_logprobs_N=tokens,
            behaviour_logprobs_N=tokens,
            advantages_N=torch.full_like(tokens, advantage),
            entropy_N=torch.zeros_like(tokens),
            from_buffer_N=torch.zeros_like(tokens, dtype=torch.bool),
            turn_N=torch.zeros_like(tokens, dtype=torch.long),
            denominators_N=torch.full_like(tokens, 6.0),
        )
        result = policy_loss(inputs, GrpoConfig())
        torch.autograd.backward(result.loss)
        total += float(result.loss.detach())
    report, engine = update_of(GrpoConfig(loss_denominator_tokens=3, kl_coefficient=0.0, entropy_coefficient=0.0))
    assert engine.logprob.grad is not None and logprob.grad is not None
    assert engine.logprob.grad.item() == logprob.grad.item()
    assert (report.loss, report.policy_loss, report.kl) == (total, total, None)


@pytest.mark.parametrize(("reference", "k2", "k3"), [(-3.0, 2.0, 1 + math.exp(-2)), (-0.5, 0.125, math.exp(0.5) - 1.5)])
def test_a_kl_penalty_in_the_loss_pulls_the_policy_towards_the_reference(
    reference: float, k2: float, k3: float
) -> None:
    """Each of 8 tokens adds 0.1 / 8 times the slope of its estimate; without a penalty the gradient is 1 / 8."""
    settings = {"loss_denominator_tokens": 4, "kl_coefficient": 0.1}
    expected = {"k1": 1.0, "k2": -1.0 - reference, "k3": 1 - math.exp(reference + 1)}
    for estimator, slope in expected.items():
        config = GrpoConfig.model_validate({**settings, "kl_estimator": estimator})
        assert gradient_of(config, reference) == pytest.approx(0.125 + 0.1 * slope)
    report, _ = update_of(GrpoConfig.model_validate({**settings, "kl_estimator": "k2"}), reference)
    assert report.kl == pytest.approx(k2)
    assert report.loss - report.policy_loss == pytest.approx(0.1 * k2)
    assert update_of(GrpoConfig.model_validate(settings), reference)[0].kl == pytest.approx(k3)


@pytest.mark.parametrize("num_minibatches", [1, 2])
def test_a_kl_penalty_in_the_reward_changes_the_advantages_only(num_minibatches: int) -> None:
    """k1 is 2 per token: rewards 1 - 0.1 * 2 * 3 = 0.4 and 0 - 0.1 * 2 * 5 = -1, so the advantages are 0.7 and -0.7."""
    config = GrpoConfig(
        loss_denominator_tokens=4,
        kl_coefficient=0.1,
        kl_estimator="k1",
        kl_applied_to="reward",
        num_minibatches=num_minibatches,
    )
    report, engine = update_of(config, reference=-3.0)
    stats = report.token_stats["train/0"]["e"]
    assert stats.advantage == pytest.approx(-0.7)
    assert report.kl == pytest.approx(2.0)
    assert report.loss == report.policy_loss
    assert engine.logprob.grad is not None
    # One step divides by 2 trajectories x 4 tokens, two steps by 1 x 4 each, and this engine adds up their gradients.
    assert engine.logprob.grad.item() == pytest.approx(0.7 * 2 / 8 * num_minibatches)


def test_an_entropy_bonus_raises_the_entropy_of_the_policy() -> None:
    """The entropy of this policy is -logprob, so the bonus adds 0.1 to the gradient, which is descended."""
    config = GrpoConfig(loss_denominator_tokens=4, entropy_coefficient=0.1)
    report, engine = update_of(config)
    assert engine.logprob.grad is not None
    assert engine.logprob.grad.item() == pytest.approx(0.125 + 0.1)
    assert report.loss - report.policy_loss == pytest.approx(-0.1)


def test_a_marked_loss_gets_the_gradient_of_the_entropy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropy is -logprob: 8 tokens of weight 1 / 8 make a gradient of -1."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "entropy_loss.py").write_text(
        "import torch\nfrom deskrl.learner.loss_interface import LossResult, with_entropy_gradient\n"
        "@with_entropy_gradient\n"
        "def marked(inputs, config, options):\n"
        "    assert inputs.entropy_N.requires_grad\n"
        "    loss = (inputs.entropy_N / inputs.denominators_N).sum()\n"
        "    return LossResult(loss, inputs.from_buffer_N, torch.ones_like(inputs.advantages_N))\n"
    )
    assert gradient_of(GrpoConfig(loss="entropy_loss:marked", loss_denominator_tokens=4)) == pytest.approx(-1.0)
