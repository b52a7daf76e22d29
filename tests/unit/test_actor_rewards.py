"""Specification of rewards: selection of terms, their order, values and evidence, and the attribution of their errors.

The desktop is the double of test_actor_episode.py. Rewards are loaded from a module of the user's own, as in a run.
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rewards_kit import DesktopDouble, end, evaluate, reward_of

from deskrl.actor.desktops.base import DesktopError, DesktopGone, UnsupportedOperation
from deskrl.actor.extensions import check_extensions
from deskrl.actor.rewards.reward_term import MAX_ABANDONED_THREADS
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError

REWARDS = """
import asyncio, threading, time
from deskrl.actor.rewards.reward_interface import Score
from deskrl.actor.tasks.evaluators import EvaluatorError, UnreadableStateError
from deskrl.core.config import Section
from deskrl.core.registry import with_options

release = threading.Event()
thread_names = []

def half(episode): return 0.5
def plain(episode):
    thread_names.append(threading.current_thread().name)
    return float(episode.blocking_desktop.read_file("~/notes.txt"))
async def coroutine(episode): return float(await episode.desktop.read_file("~/notes.txt"))
def number_of_actions(episode): return Score(len(episode.actions) / 10, {"actions": len(episode.actions)})
def product(episode): return episode.terms["task"] * 0.5

class Options(Section):
    value: float = 1.0
@with_options(Options)
def constant(episode, options): return options.value

class Windows:
    needs_session = True
    class Options(Section):
        title: str
    def __init__(self, options): self.title = options.title
    async def score(self, episode): return any(it["title"] == self.title for it in await episode.desktop.windows())

class Broken:
    def __init__(self): raise ValueError("no model")
    def score(self, episode): return 0.0
class Scoreless: ...
def no_arguments(): return 1.0

def raises(episode): raise ValueError("a defect")
def raises_in_a_cycle(episode):
    error = ValueError("a defect")
    raise error from error
def exits(episode): raise SystemExit(3)
async def exits_in_loop(episode): raise SystemExit(3)
async def cancels_itself(episode): raise asyncio.CancelledError
async def hangs(episode): await asyncio.Event().wait()
async def ignores_cancellation(episode):
    try: await asyncio.Event().wait()
    except asyncio.CancelledError: await asyncio.Event().wait()  # until the event loop ends
def hangs_in_thread(episode): release.wait()
def wraps(episode):
    try: return float(episode.blocking_desktop.read_file("~/notes.txt"))
    except Exception as error: raise RuntimeError("cannot read the notes") from error
def swallows(episode):
    try: return float(episode.blocking_desktop.read_file("~/notes.txt"))
    except Exception: return 0.0
async def blocks_the_loop(episode): return float(episode.blocking_desktop.read_file("~/notes.txt"))
def defective_task(episode): raise EvaluatorError("no such metric")
def unreadable(episode): raise UnreadableStateError("the file is malformed")
def without_json(episode): return Score(1.0, {(1, 2): "x"})
def long_evidence(episode): return Score(1.0, "x" * 10000)
"""


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Provide the module `my_rewards`, and release its threads at the end."""
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_rewards  # type: ignore[import-not-found]

    yield my_rewards
    my_rewards.release.set()
    del sys.modules["my_rewards"]


def mine(name: str, **keys: Any) -> dict[str, Any]:
    return {"kind": f"my_rewards:{name}", **keys}


def rejection(terms: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        check_extensions(RunConfig(reward={"terms": terms}))
    return str(caught.value)


def test_the_only_term_evaluators_is_the_task_s_own_evaluation() -> None:
    desktop = DesktopDouble()
    evaluation = evaluate({"task": {}}, desktop)
    assert (evaluation.reward, evaluation.evidence.keys()) == (1.0, {"checks", "asked"})
    assert desktop.calls == ["stop_policy_programs", "stop_all_programs", "execute evaluate"]


def test_the_reward_is_the_weighted_mean_of_the_terms_and_each_is_in_the_evidence() -> None:
    evaluation = evaluate({"task": {"weight": 3}, "half": mine("half", weight=1)})
    assert evaluation.reward == 0.875
    assert evaluation.evidence["terms"] == {"task": 1.0, "half": 0.5}
    assert evaluation.evidence["evidence"]["task"]["checks"][0]["score"] == 1.0
    assert evaluate({"half": mine("half")}).evidence == {"terms": {"half": 0.5}}


def test_weights_that_do_not_add_up_exactly_give_1_if_all_terms_are_1() -> None:
    terms = {f"t{weight}": mine("constant", weight=weight / 10) for weight in (1, 2, 7)}
    assert evaluate(terms).reward == 1.0


def test_a_term_of_weight_0_is_in_the_evidence_and_available_to_later_terms() -> None:
    evaluation = evaluate({"product": mine("product"), "task": {"weight": 0}})
    assert (evaluation.reward, evaluation.evidence["terms"]) == (0.5, {"product": 0.5, "task": 1.0})


def test_rewards_may_be_functions_in_a_thread_coroutines_or_classes_with_options(module: Any) -> None:
    desktop = DesktopDouble(files={"~/notes.txt": b"0.25"}, titles=["Calculator"])
    assert evaluate({"a": mine("plain")}, desktop).reward == 0.25
    assert module.thread_names == ["reward"] != [threading.current_thread().name]
    assert evaluate({"a": mine("coroutine")}, desktop).reward == 0.25
    assert evaluate({"a": mine("constant", options={"value": 0.75})}, desktop).reward == 0.75
    assert evaluate({"a": mine("Windows", options={"title": "Calculator"})}, desktop).reward == 1.0


def test_terms_that_need_the_session_run_before_all_programs_are_stopped_and_the_others_after() -> None:
    desktop = DesktopDouble(files={"~/notes.txt": b"1"}, titles=["Calculator"])
    terms = {"notes": mine("coroutine"), "task": {}, "shown": mine("Windows", options={"title": "Calculator"})}
    evaluation = evaluate(terms, desktop)
    order = ["stop_policy_programs", "windows", "stop_policy_programs", "stop_all_programs", "execute evaluate"]
    assert desktop.calls == [*order, "stop_all_programs", "read_file ~/notes.txt"]
    assert list(evaluation.evidence["terms"]) == ["notes", "task", "shown"]
    desktop.calls.clear()
    evaluate({"notes": mine("coroutine")}, desktop)
    assert desktop.calls == ["stop_policy_programs", "stop_all_programs", "read_file ~/notes.txt"]


def test_a_reward_sees_actions_thoughts_screenshots_and_the_final_action() -> None:
    async def look() -> None:
        episode = end(DesktopDouble(), num_actions=3)
        assert [action.thought for action in episode.actions] == ["0", "1", "2"]
        assert [image.size for image in episode.screenshots] == [(28, 28)] * 3
        assert [image.getpixel((0, 0)) for image in episode.screenshots[-2:]] == [(1, 0, 0), (2, 0, 0)]
        assert episode.final_action == episode.actions[-1].action
        assert (episode.instruction, episode.seed, episode.terms) == ("Touch it.", 1, {})

    asyncio.run(look())
    assert evaluate({"a": mine("number_of_actions")}, num_actions=3).evidence["evidence"] == {"a": {"actions": 3}}
    assert evaluate({"a": mine("number_of_actions")}, num_actions=0).reward == 0.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("raises", "ValueError: a defect"),
        ("raises_in_a_cycle", "ValueError: a defect"),
        ("exits", "SystemExit: 3"),
        ("exits_in_loop", "SystemExit: 3"),
        ("cancels_itself", "cancelled itself"),
        ("hangs", "not done within 0.2 s"),
        ("ignores_cancellation", "not done within 0.2 s"),
        ("hangs_in_thread", "not done within 0.2 s"),
        ("product", "KeyError: 'task'"),
        ("blocks_the_loop", "await episode.desktop instead"),
        ("defective_task", "no such metric"),
        ("without_json", "its evidence is not JSON"),
    ],
)
def test_a_reward_that_raises_or_takes_too_long_is_a_fault_that_names_it(name: str, problem: str) -> None:
    with pytest.raises(EvaluatorError, match="reward mine: ") as caught:
        evaluate({"mine": mine(name, timeout_s=0.2)}, DesktopDouble(files={"~/notes.txt": b"1"}))
    assert problem in str(caught.value)


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_a_value_outside_0_to_1_is_a_fault(value: float, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "returned", lambda episode: value, raising=False)
    with pytest.raises(EvaluatorError, match=r"reward mine: returned .* not a number in \[0, 1\]"):
        evaluate({"mine": mine("returned")})


@pytest.mark.parametrize("value", [None, "1", [1.0], 1j])
def test_a_value_that_is_not_a_number_is_a_fault(value: Any, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "returned", lambda episode: value, raising=False)
    with pytest.raises(EvaluatorError, match="reward mine: returned"):
        evaluate({"mine": mine("returned")})


@pytest.mark.parametrize("name", ["plain", "coroutine", "wraps"])
def test_an_operation_that_fails_is_a_state_that_cannot_be_read(name: str) -> None:
    with pytest.raises(UnreadableStateError, match="reward mine: no answer"):
        evaluate({"mine": mine(name)}, DesktopDouble(error=DesktopError("no answer")))


def test_an_operation_that_hangs_until_the_time_limit_is_a_state_that_cannot_be_read() -> None:
    for name in ("plain", "coroutine"):
        with pytest.raises(UnreadableStateError, match=r"an operation on the desktop was not done within 0\.05 s"):
            evaluate({"mine": mine(name, timeout_s=0.05)}, DesktopDouble(hangs=True))


def test_an_operation_that_the_desktop_does_not_have_is_a_fault() -> None:
    with pytest.raises(EvaluatorError, match="this desktop has no files"):
        evaluate({"mine": mine("plain")}, DesktopDouble(error=UnsupportedOperation("this desktop has no files")))


@pytest.mark.parametrize("name", ["plain", "coroutine", "wraps", "swallows"])
def test_a_lost_desktop_ends_the_evaluation_even_if_the_reward_catches_the_error(name: str) -> None:
    with pytest.raises(DesktopGone, match="its processes are gone"):
        evaluate({"mine": mine(name)}, DesktopDouble(error=DesktopGone("its processes are gone")))


def test_a_reward_can_tell_that_the_policy_left_an_unreadable_state() -> None:
    with pytest.raises(UnreadableStateError, match="the file is malformed"):
        evaluate({"mine": mine("unreadable")})


def test_the_evidence_of_a_reward_is_limited() -> None:
    assert len(json.dumps(evaluate({"mine": mine("long_evidence")}).evidence)) < 5000


def test_a_function_that_never_returns_is_not_called_without_end() -> None:
    reward = reward_of({"mine": mine("hangs_in_thread", timeout_s=0.01)})
    for problem in ["not done"] * MAX_ABANDONED_THREADS + ["8 earlier calls have not returned"]:
        with pytest.raises(EvaluatorError, match=problem):
            evaluate(reward)


def test_a_desktop_is_out_of_reach_after_the_evaluation() -> None:
    async def use_late() -> None:
        episode = end(DesktopDouble())
        episode.desktop.close()
        with pytest.raises(RuntimeError, match="has ended"):
            await episode.desktop.read_file("~/notes.txt")

    asyncio.run(use_late())


def test_invalid_terms_are_rejected_before_the_run() -> None:
    assert "reward.terms.a.kind: unknown reward 'nothing'" in rejection({"a": {"kind": "nothing"}})
    assert "evaluators, vision_language_judge" in rejection({"a": {"kind": "nothing"}})
    assert "it has no method score" in rejection({"a": mine("Scoreless")})
    assert "it does not take the arguments episode" in rejection({"a": mine("no_arguments")})
    assert "reward.terms.a.options.title: Field required" in rejection({"a": mine("Windows")})
    assert "reward.terms.a.options.x: my_rewards:half has no options" in rejection(
        {"a": mine("half", options={"x": 1})}
    )
    assert "raised while it was constructed: ValueError: no model" in rejection({"a": mine("Broken")})
    assert "reward.terms.a and reward.terms.b are all of the kind evaluators" in rejection({"a": {}, "b": {}})


def test_weights_are_finite_and_not_negative_and_one_is_positive() -> None:
    for weights in ([-1.0], [math.inf], [math.nan], [0.0, 0.0], []):
        with pytest.raises(ValueError, match="reward"):
            RunConfig(reward={"terms": {f"t{index}": {"weight": weight} for index, weight in enumerate(weights)}})
