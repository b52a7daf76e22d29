"""Shared control of an episode: a person and, optionally, a policy choose its actions in turn.

The person may take over at any time, also while the policy is sampling. The policy sees the person's actions as
responses in its own action language. It gives control to the person if it fails to respond, if its response cannot be
parsed, and instead of ending the episode.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from deskrl.actor.actions import Action
from deskrl.actor.agent.action_language import FormatError, PolicyResponse
from deskrl.actor.agent.conversation import ChatPrompt, Conversation
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.policies import ActorPolicy, Decision
from deskrl.actor.demonstrations import Player
from deskrl.actor.desktops.base import Desktop
from deskrl.core.error_text import one_line
from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import common_pb2

_MAX_MESSAGE_CHARACTERS = 300


@dataclass(frozen=True)
class Choice:
    """Action that a player chose, with the screen on which it was chosen, at full size."""

    action: Action
    player: Player
    thought: str
    screen: Image.Image
    chosen_s: float
    """Time of the choice, by `time.monotonic`."""


class SharedConversation(Conversation):
    """Conversation of a policy with whom a person shares control.

    A response becomes part of the conversation with the next step, so that it can be withdrawn.

    Args:
        policy: conversation in the policy's action language.
    """

    def __init__(self, policy: Conversation) -> None:
        self._policy = policy
        self._response: str | Sequence[int] | None = None
        self._persons_action: Action | None = None
        self.screen: Image.Image
        """Last screenshot at the full size of the screen."""

    def observe(self, screenshot: Image.Image) -> common_pb2.Image:
        """Add a screenshot; it replaces the last one if that has no response yet."""
        if self._response is not None:
            self._policy.respond(self._response)
        self.screen, self._response, self._persons_action = screenshot, None, None
        return self._policy.observe(screenshot)

    def prompt(self) -> ChatPrompt:
        """Return the policy's prompt for the next action."""
        return self._policy.prompt()

    def respond(self, response: str | Sequence[int]) -> None:
        """Set the response to the last observation."""
        self._response = response

    def respond_as_person(self, action: Action) -> str:
        """Set an action of the person as the response to the last observation, and return its text."""
        text = self._render_exactly(action) or f"Action: {action.to_record()}"
        self._response, self._persons_action = text, action
        return text

    def _render_exactly(self, action: Action) -> str | None:
        """Return an action in the policy's action language; None if the language cannot express it."""
        try:
            text = self._policy.render(PolicyResponse("", action))
            read = self._policy.parse(text).action
        except ValueError:
            return None
        return text if (read.kind, read.keys, read.text) == (action.kind, action.keys, action.text) else None

    def withdraw(self) -> None:
        """Remove the response to the last observation."""
        self._response = None

    def parse(self, text: str) -> PolicyResponse:
        """Return the person's action as it was chosen, or parse a response of the policy."""
        if self._persons_action is not None:
            return PolicyResponse("", self._persons_action)
        return self._policy.parse(text)

    def render(self, response: PolicyResponse) -> str:
        """Return the text of a response in the policy's action language."""
        return self._policy.render(response)


class SharedControl(ActorPolicy):
    """A person and, optionally, a policy as the players of one episode, whose conversation is a SharedConversation.

    Args:
        desktop: desktop of the episode.
        policy: policy that can play; None: only the person plays.
        notify: called after `player`, `message` or `num_waiting` may have changed.
    """

    def __init__(self, desktop: Desktop, policy: ActorPolicy | None, notify: Callable[[], None]) -> None:
        self._desktop = desktop
        self._policy = policy
        self._notify = notify
        self._actions: asyncio.Queue[Action] = asyncio.Queue()
        self._changed = asyncio.Event()
        self._looking = asyncio.Lock()
        self._is_deciding = False
        self.player = Player.PERSON
        """Who has control."""
        self.message = ""
        """Why control was given to the person; empty if they took it."""
        self.choice: Choice | None = None
        """Last action that was chosen."""

    @property
    def has_policy(self) -> bool:
        """Whether the person can hand control to a policy."""
        return self._policy is not None

    @property
    def num_waiting(self) -> int:
        """Number of the person's actions that are not yet chosen, because earlier ones are being executed."""
        return self._actions.qsize()

    def act(self, action: Action) -> None:
        """Add an action of the person, who thereby takes over."""
        self._actions.put_nowait(action)
        self.take_over()

    def take_over(self, message: str = "") -> None:
        """Give control to the person."""
        self._give(Player.PERSON, message)

    def hand_over(self) -> None:
        """Give control to the policy; actions of the person that are not yet executed are executed before."""
        if self._policy is not None and self.player is not Player.POLICY:
            self._give(Player.POLICY, "")

    async def decide(self, conversation: Conversation, screenshot: common_pb2.Image, index: int) -> Decision:
        """Return the next action of the player who has control (see the base class).

        A person looks at the screen itself, so that the screenshot is taken again when they act.

        Raises:
            DesktopError: the desktop gave no screenshot.
        """
        assert isinstance(conversation, SharedConversation)
        self._is_deciding = True
        try:
            return await self._decide(conversation, screenshot, index)
        finally:
            async with self._looking:  # a look in progress ends before the episode uses the desktop again
                self._is_deciding = False

    async def look(self) -> Image.Image | None:
        """Return the screen while an action is awaited; None at other times, when the episode uses the desktop.

        Raises:
            DesktopError: the desktop gave no screenshot.
        """
        async with self._looking:
            return await self._desktop.screenshot() if self._is_deciding else None

    async def _decide(self, conversation: SharedConversation, screenshot: common_pb2.Image, index: int) -> Decision:
        newer: common_pb2.Image | None = None
        is_current = True
        while True:
            if not self._actions.empty():
                return self._person_decides(conversation, await self._observe_again(conversation), index)
            if self.player is Player.PERSON:
                self._changed.clear()
                await self._changed.wait()
                is_current = False
                continue
            if not is_current:
                newer = screenshot = await self._observe_again(conversation)
                is_current = True
                continue  # the person may have acted or taken over meanwhile
            decision = await self._policy_decides(conversation, screenshot, index)
            if decision is not None:
                return replace(decision, screenshot=newer)

    def _person_decides(self, conversation: SharedConversation, screenshot: common_pb2.Image, index: int) -> Decision:
        action = self._actions.get_nowait()
        if self._policy is not None:
            self._policy.add_screenshot(screenshot)
        text = conversation.respond_as_person(action)
        self.choice = Choice(action, Player.PERSON, "", conversation.screen, time.monotonic())
        self.message = ""
        self._notify()
        return Decision(Step(index, screenshot.hash, conversation.prompt().images, text), {}, screenshot)

    async def _policy_decides(
        self, conversation: SharedConversation, screenshot: common_pb2.Image, index: int
    ) -> Decision | None:
        """Let the policy decide; return None if the person has control instead."""
        assert self._policy is not None
        try:
            decision = await self._unless_changed(self._policy.decide(conversation, screenshot, index))
            response = conversation.parse(decision.step.text) if decision is not None else None
        except (InferenceError, UserError, FormatError) as error:
            what = "wrote an invalid action" if isinstance(error, FormatError) else "did not respond"
            self.take_over(f"The policy {what}: {one_line(error, _MAX_MESSAGE_CHARACTERS)}")
            response = None
        if response is not None and response.action.ends_episode:
            self.take_over(f"The policy wants to end the episode: {response.action.kind}")
            response = None
        if response is None:
            conversation.withdraw()
            return None
        self.choice = Choice(response.action, Player.POLICY, response.thought, conversation.screen, time.monotonic())
        return decision

    async def _unless_changed(self, deciding: Coroutine[Any, Any, Decision]) -> Decision | None:
        """Return a decision of the policy; None if control changes first."""
        self._changed.clear()
        task = asyncio.create_task(deciding)
        change = asyncio.create_task(self._changed.wait())
        try:
            await asyncio.wait({task, change}, return_when=asyncio.FIRST_COMPLETED)
            return None if change.done() else task.result()
        finally:
            for one in (task, change):
                one.cancel()
            await asyncio.wait({task, change})

    async def _observe_again(self, conversation: SharedConversation) -> common_pb2.Image:
        async with self._looking:
            screen = await self._desktop.screenshot()
        return await asyncio.to_thread(conversation.observe, screen)

    def _give(self, player: Player, message: str) -> None:
        self.player, self.message = player, message
        self._changed.set()
        self._notify()
