"""Shared control of an episode: who acts, on which screenshot, and what the policy sees of the person's actions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent.conversation import Agent, Conversation
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.agent.shared_control import SharedControl, SharedConversation
from deskrl.actor.demonstrations import Player
from deskrl.actor.desktops.simulated import SimulatedDesktop
from deskrl.core.config import AgentConfig, DesktopConfig
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2

CLICK = Action(ActionKind.CLICK, x=101, y=50)
POLICY_CLICK = "Thought: It is there.\nAction: click(start_box='(56,56)')"
FINISHED = "Thought: It is done.\nAction: finished()"


class ChangingDesktop(SimulatedDesktop):
    """Desktop whose screen is another one at each look."""

    def __init__(self) -> None:
        super().__init__(DesktopConfig(width=560, height=280), "desktop")
        self.num_looks = 0

    async def screenshot(self) -> Image.Image:
        self.num_looks += 1
        return Image.new("RGB", (560, 280), (self.num_looks, 0, 0))


class PolicyDouble(ActorPolicy):
    """Policy that responds with these texts or raises these errors; None: it samples until it is cancelled."""

    def __init__(self, *responses: str | Exception | None) -> None:
        self._responses = list(responses)
        self.prompts: list[list[str]] = []
        self.is_sampling = asyncio.Event()
        self.added: list[str] = []

    def add_screenshot(self, screenshot: common_pb2.Image) -> None:
        self.added.append(screenshot.hash)

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        prompt = conversation.prompt()
        self.prompts.append([message.contents[0].text or "screenshot" for message in prompt.messages[2:]])
        response = self._responses.pop(0)
        if response is None:
            self.is_sampling.set()
            await asyncio.Event().wait()
        if isinstance(response, Exception):
            raise response
        assert response is not None
        conversation.respond(response)
        return Decision(Step(index, screenshot.hash, prompt.images, response), {})


class Game:
    """Control with its conversation, in which the desktop is observed before each decision as in an episode."""

    def __init__(self, *responses: str | Exception | None) -> None:
        self.desktop = ChangingDesktop()
        self.policy = PolicyDouble(*responses)
        self.control = SharedControl(self.desktop, self.policy, self._notice)
        self.has_message = asyncio.Event()
        self.conversation = SharedConversation(Agent(AgentConfig(context="episode")).start_conversation("Do it."))
        self.num_steps = 0

    def _notice(self) -> None:
        if self.control.message:
            self.has_message.set()

    async def decide(self) -> tuple[Player, Action, bool]:
        """Return who decided, the action, and whether it was decided on a newer screenshot than the one given."""
        image = self.conversation.observe(await self.desktop.screenshot())
        decision = await self.control.decide(self.conversation, image, self.num_steps)
        self.num_steps += 1
        action = self.conversation.parse(decision.step.text).action
        assert self.control.choice is not None and self.control.choice.action == action
        newest = decision.screenshot or image
        assert decision.step.screenshot == newest.hash
        return self.control.choice.player, action, newest != image


def play(scenario: Callable[[Game], Any], *responses: str | Exception | None) -> Game:
    """Run a scenario of a game in which the policy has these responses."""

    async def run() -> Game:
        game = Game(*responses)
        await scenario(game)
        return game

    return asyncio.run(run())


def once_it_waits(function: Callable[[], None]) -> None:
    """Call a function in the next iteration of the event loop, when the control waits for the person."""
    asyncio.get_running_loop().call_soon(function)


def test_a_person_acts_on_the_screen_of_the_moment_in_exact_pixels() -> None:
    async def scenario(game: Game) -> None:
        once_it_waits(lambda: game.control.act(CLICK))
        assert await game.decide() == (Player.PERSON, CLICK, True)
        assert game.control.choice is not None
        assert game.control.choice.screen.getpixel((0, 0)) == (game.desktop.num_looks, 0, 0)

    play(scenario)


def test_actions_of_the_person_are_executed_in_their_order() -> None:
    async def scenario(game: Game) -> None:
        moves = [Action(ActionKind.MOVE, x=x) for x in range(3)]
        for move in moves:
            game.control.act(move)
        assert game.control.num_waiting == 3
        assert [(await game.decide())[1] for _ in moves] == moves

    play(scenario)


def test_the_policy_plays_after_it_was_given_control_and_sees_the_persons_actions_in_its_language() -> None:
    async def scenario(game: Game) -> None:
        game.control.act(CLICK)
        await game.decide()
        game.control.hand_over()
        player, action, is_newer = await game.decide()
        assert (player, action.kind, is_newer) == (Player.POLICY, ActionKind.CLICK, False)
        assert game.policy.added == [game.conversation.prompt().images[0]]

    game = play(scenario, POLICY_CLICK)
    assert game.policy.prompts == [["screenshot", "Thought: \nAction: click(start_box='(101,50)')", "screenshot"]]


def test_actions_that_the_policys_language_cannot_express_are_told_as_they_are() -> None:
    async def scenario(game: Game) -> None:
        game.control.act(Action(ActionKind.CLICK, x=1, y=1, keys=("ctrl",)))
        await game.decide()
        game.control.hand_over()
        await game.decide()

    game = play(scenario, POLICY_CLICK)
    assert "ctrl" in game.policy.prompts[0][1]


def test_a_policy_that_takes_control_while_the_person_looks_gets_a_new_screenshot() -> None:
    async def scenario(game: Game) -> None:
        once_it_waits(game.control.hand_over)
        assert (await game.decide())[::2] == (Player.POLICY, True)

    play(scenario, POLICY_CLICK)


@pytest.mark.parametrize("takes_over_first", [True, False])
def test_the_person_can_take_over_while_the_policy_is_sampling(takes_over_first: bool) -> None:
    async def scenario(game: Game) -> None:
        game.control.hand_over()
        deciding = asyncio.create_task(game.decide())
        await game.policy.is_sampling.wait()
        if takes_over_first:
            game.control.take_over()
        game.control.act(CLICK)
        assert await deciding == (Player.PERSON, CLICK, True)
        assert game.control.player is Player.PERSON

    play(scenario, None)


@pytest.mark.parametrize("acts", [True, False])
def test_the_policy_does_not_act_if_the_person_takes_over_while_its_screenshot_is_taken(acts: bool) -> None:
    class InterruptedDesktop(ChangingDesktop):
        async def screenshot(self) -> Image.Image:
            screen = await super().screenshot()
            if self.num_looks == 2:  # the one for the policy
                game.control.act(CLICK) if acts else game.control.take_over()
                has_looked.set()
            return screen

    async def scenario() -> None:
        game.desktop = InterruptedDesktop()
        game.control = SharedControl(game.desktop, game.policy, lambda: None)
        deciding = asyncio.create_task(game.decide())
        once_it_waits(game.control.hand_over)
        await has_looked.wait()
        if not acts:
            once_it_waits(lambda: game.control.act(CLICK))
        assert (await deciding)[:2] == (Player.PERSON, CLICK)

    game, has_looked = Game(POLICY_CLICK), asyncio.Event()
    asyncio.run(scenario())
    assert game.policy.prompts == []


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ("Action: frobnicate()", "The policy wrote an invalid action: "),
        (InferenceError("no replica"), "The policy did not respond: no replica"),
        (FINISHED, "The policy wants to end the episode: finished"),
    ],
)
def test_the_person_gets_control_with_a_message_when_the_policy_fails_or_wants_to_end(
    response: str | Exception, message: str
) -> None:
    async def scenario(game: Game) -> None:
        game.control.hand_over()
        deciding = asyncio.create_task(game.decide())
        await game.has_message.wait()
        assert game.control.player is Player.PERSON
        assert game.control.message.startswith(message)
        game.control.act(CLICK)
        assert await deciding == (Player.PERSON, CLICK, True)
        game.control.hand_over()
        assert (await game.decide())[0] is Player.POLICY
        assert game.control.message == ""

    game = play(scenario, response, POLICY_CLICK)
    assert len(game.policy.prompts[1]) == 3, "the failed response is not part of the conversation"


def test_a_look_never_overlaps_with_an_operation_of_the_episode() -> None:
    class SlowDesktop(ChangingDesktop):
        def __init__(self) -> None:
            super().__init__()
            self.may_show = asyncio.Event()

        async def screenshot(self) -> Image.Image:
            await self.may_show.wait()
            return await super().screenshot()

    async def scenario() -> None:
        game = Game(POLICY_CLICK)
        desktop = SlowDesktop()
        desktop.may_show.set()
        game.desktop, game.control = desktop, SharedControl(desktop, game.policy, lambda: None)
        assert await game.control.look() is None, "before the first decision"
        deciding = asyncio.create_task(game.decide())
        await asyncio.sleep(0)
        desktop.may_show.clear()
        looking = asyncio.create_task(game.control.look())
        await asyncio.sleep(0)
        game.control.hand_over()
        await asyncio.sleep(0)
        assert not looking.done() and not deciding.done()
        desktop.may_show.set()
        assert await looking is not None
        await deciding
        assert await game.control.look() is None, "the episode executes the action"

    asyncio.run(scenario())


def test_without_a_policy_the_person_keeps_control() -> None:
    async def scenario() -> None:
        control = SharedControl(ChangingDesktop(), None, lambda: None)
        control.hand_over()
        assert control.player is Player.PERSON and not control.has_policy

    asyncio.run(scenario())
