"""External policies of Anthropic's Messages API and OpenAI's Responses API: requests, replies, and failures.

The server and its replies are those of `vendor_api_kit`: written from the public documentation, not recorded.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from PIL import Image
from pydantic import BaseModel
from vendor_api_kit import (
    AnthropicRequest,
    OpenAIRequest,
    Reply,
    VendorServer,
    anthropic_reply,
    check_vendor_types,
    openai_reply,
)

from deskrl.actor.actions import Action, ActionKind
from deskrl.actor.agent import external_server
from deskrl.actor.agent.action_language import FormatError
from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.external_apis import policy_opener
from deskrl.actor.agent.external_server import check_reachable
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.actor.agent.model_fit import check_language
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.step_codec import Step
from deskrl.proto.v1 import rollout_pb2

KEY = "secret-key"
VARIABLE = "DESKRL_TEST_KEY"
APIS = {"anthropic_messages": "anthropic_computer_use", "openai_responses": "openai_computer_use"}
SIZE = (64, 48)
Play = Callable[..., list[tuple[Step, Action]]]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[VendorServer]:
    monkeypatch.setenv(VARIABLE, KEY)
    running = VendorServer(KEY)
    yield running
    running.close()


def config_of(server: VendorServer, api: str, timeout_s: float = 20.0, **sections: dict[str, Any]) -> RunConfig:
    inference = {
        "external_url": server.url,
        "external_model": "computer-model",
        "external_api": api,
        "external_api_key_variable": VARIABLE,
        "max_action_tokens": 99,
    }
    agent = {"action_language": APIS.get(api, "ui_tars_1_5"), "window_images": 2}
    return RunConfig.model_validate(
        {
            "inference": inference | sections.get("inference", {}),
            "agent": agent | sections.get("agent", {}),
            "actor": {"act_timeout_s": timeout_s},
        }
    )


@pytest.fixture
def play(server: VendorServer) -> Play:
    """Return a function that plays replies in an episode, and returns its steps with their actions."""

    def run(api: str, *replies: Reply, num_steps: int = 1, **options: Any) -> list[tuple[Step, Action]]:
        server.replies = list(replies)
        config = config_of(server, api, **options)
        check_language(config)
        policy = policy_opener(config)(rollout_pb2.Rollout(temperature=0.5, seed=7))
        conversation = Agent(config.agent).start_conversation("Press it.")

        async def scenario() -> list[tuple[Step, Action]]:
            steps = []
            for index in range(num_steps):
                seen = conversation.observe(Image.new("RGB", SIZE, (index, 0, 0)))
                step = (await policy.decide(conversation, seen, index)).step
                steps.append((step, conversation.parse(step.text).action))
            return steps

        return asyncio.run(scenario())

    return run


def use(number: int, action: str, **arguments: Any) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": f"toolu_{number}",
        "name": "computer",
        "input": {"action": action, **arguments},
        "caller": None,
    }


def call(number: int, *actions: dict[str, Any], **fields: Any) -> dict[str, Any]:
    item = {"type": "computer_call", "id": f"cu_{number}", "call_id": f"call_{number}", "status": "completed"}
    return {**item, "pending_safety_checks": [], "actions": list(actions), **fields}


def shade(png: str) -> int:
    """Return the shade of a screenshot, which is the index of the step before which it was taken."""
    value = Image.open(io.BytesIO(base64.b64decode(png.rpartition(",")[2]))).getpixel((0, 0))
    assert isinstance(value, tuple)
    return int(value[0])


def say(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text, "citations": None}


CLICK = {"type": "click", "button": "left", "x": 10, "y": 20}
ANSWER = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}
REPLIES: dict[str, Reply] = {
    "anthropic_messages": anthropic_reply(use(1, "left_click", coordinate=[10, 20])),
    "openai_responses": openai_reply(call(1, CLICK)),
}


def test_anthropic_gets_calls_and_results_with_the_screenshots_of_the_context(server: VendorServer, play: Play) -> None:
    thinking = {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"}
    steps = play(
        "anthropic_messages",
        anthropic_reply(thinking, say("I press it."), use(1, "left_click", coordinate=[10, 20])),
        anthropic_reply(use(2, "key", text="ctrl+s")),
        anthropic_reply(say("Done: 42"), stop_reason="end_turn"),
        num_steps=3,
    )
    assert [action for _, action in steps] == [
        Action(ActionKind.CLICK, x=10, y=20),
        Action(ActionKind.HOTKEY, keys=("ctrl", "s")),
        Action(ActionKind.FINISHED, text="Done: 42"),
    ]
    assert steps[0][0].text.startswith("I press it.\n{") and steps[0][0].temperature == 1.0
    assert (steps[0][0].action_ids, steps[0][0].logprobs, len(steps[2][0].images)) == ((), (), 2)
    body = server.requests[2]
    assert (body["model"], body["max_tokens"]) == ("computer-model", 99)
    assert body["tools"][0] == {
        "type": "computer_20251124",
        "name": "computer",
        "display_width_px": 64,
        "display_height_px": 48,
    }
    assert "last line" not in body["system"], "the syntax of text responses is not for the API"
    task, called, first, again, second = (message["content"] for message in body["messages"])
    assert task[0]["text"] == "Press it." and task[1]["text"] == "This screenshot is no longer shown."
    assert called[0] == thinking and called[2]["id"] == again[0]["id"].replace("2", "1")
    assert [shade(result[0]["content"][0]["source"]["data"]) for result in (first, second)] == [1, 2]


def test_each_call_of_a_reply_is_a_step_and_gets_the_screenshot_after_it(server: VendorServer, play: Play) -> None:
    steps = play(
        "anthropic_messages",
        anthropic_reply(say("Both."), use(1, "left_click", coordinate=[1, 2]), use(2, "type", text="a")),
        anthropic_reply(say(""), stop_reason="end_turn"),
        num_steps=3,
        agent={"window_images": 5},
    )
    assert [action.kind for _, action in steps] == [ActionKind.CLICK, ActionKind.TYPE, ActionKind.FINISHED]
    assert len(server.requests) == 2
    results = server.requests[1]["messages"][2]["content"]
    assert [shade(result["content"][0]["source"]["data"]) for result in results] == [1, 2]


def test_anthropics_toolset_is_declared_and_its_results_name_it(server: VendorServer, play: Play) -> None:
    member = {"type": "tool_use", "id": "toolu_1", "name": "wait", "toolset_name": "computer", "input": {"duration": 1}}
    steps = play(
        "anthropic_messages",
        anthropic_reply(member),
        anthropic_reply({**member, "name": "report_infeasible", "input": {}}),
        num_steps=2,
        agent={"action_language_options": {"tool": "computer_toolset_20260801"}},
    )
    assert [action for _, action in steps] == [Action(ActionKind.WAIT, seconds=1.0), Action(ActionKind.INFEASIBLE)]
    assert server.requests[1]["messages"][2]["content"][0]["toolset_name"] == "computer"
    assert server.requests[0]["tools"][0]["configs"]["zoom"] == {"enabled": False}


@pytest.mark.parametrize(
    ("api", "reply", "reason"),
    [
        ("anthropic_messages", anthropic_reply(say("So"), use(1, "wait"), stop_reason="max_tokens"), "not a tool call"),
        ("anthropic_messages", anthropic_reply(use(1, "left_mouse_down")), "use left_click_drag"),
        ("anthropic_messages", anthropic_reply(say('{"type": "text"}'), use(1, "zoom")), "screenshots have one size"),
        (
            "openai_responses",
            openai_reply(status="incomplete", incomplete_details={"reason": "max_output_tokens"}),
            "not",
        ),
        ("openai_responses", openai_reply(call(1, CLICK, pending_safety_checks=[{"id": "sc_1"}])), "a person"),
        ("openai_responses", openai_reply(call(1, {**CLICK, "button": "back"})), "has no other"),
    ],
)
def test_a_reply_without_a_valid_action_is_a_format_error_of_the_policy(
    play: Play, api: str, reply: Reply, reason: str
) -> None:
    with pytest.raises(FormatError, match=reason):
        play(api, reply)


@pytest.mark.parametrize("stop_reason", ["end_turn", "refusal"])
def test_an_anthropic_reply_without_calls_ends_the_task(play: Play, stop_reason: str) -> None:
    [(_, action)] = play("anthropic_messages", anthropic_reply(stop_reason=stop_reason))
    assert action == Action(ActionKind.FINISHED)


def test_openai_gets_the_screenshot_after_each_call_and_continues_its_response(
    server: VendorServer, play: Play
) -> None:
    reasoning = {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "I press it."}]}
    checks = [{"id": "sc_1", "code": "malicious_instructions", "message": "Check it."}]
    steps = play(
        "openai_responses",
        openai_reply(reasoning, call(1, CLICK, {"type": "type", "text": "a"}, pending_safety_checks=checks)),
        openai_reply(call(2, actions=None, action={"type": "wait"}), number=2),
        openai_reply(ANSWER, number=3),
        num_steps=4,
        agent={"action_language_options": {"safety_checks": "acknowledge"}},
        inference={"external_parameters": {"reasoning": {"effort": "low"}}},
    )
    assert [action for _, action in steps] == [
        Action(ActionKind.CLICK, x=10, y=20),
        Action(ActionKind.TYPE, text="a"),
        Action(ActionKind.WAIT, seconds=2.0),
        Action(ActionKind.FINISHED, text="42"),
    ]
    assert steps[0][0].text.startswith("I press it.\n{")
    first, second, third = server.requests
    text, image = first["input"][0]["content"]
    assert (text["text"], shade(image["image_url"]), image["detail"]) == ("Press it.", 0, "original")
    assert first["tools"][0] == {"type": "computer"} and first["reasoning"] == {"effort": "low"}
    (output,) = second["input"]
    assert (second["previous_response_id"], output["call_id"]) == ("resp_1", "call_1")
    assert (shade(output["output"]["image_url"]), output["acknowledged_safety_checks"]) == (2, checks)
    (output,) = third["input"]
    assert (third["previous_response_id"], output["call_id"], len(output)) == ("resp_2", "call_2", 3)
    assert shade(output["output"]["image_url"]) == 3


def test_the_preview_tool_gets_the_size_and_a_function_call_declares_a_task_infeasible(
    server: VendorServer, play: Play
) -> None:
    infeasible = {"type": "function_call", "call_id": "call_1", "name": "report_infeasible", "arguments": "{}"}
    steps = play(
        "openai_responses",
        openai_reply(infeasible),
        agent={"action_language_options": {"tool": "computer_use_preview"}},
    )
    assert steps[0][1] == Action(ActionKind.INFEASIBLE)
    tool = {"type": "computer_use_preview", "display_width": 64, "display_height": 48, "environment": "linux"}
    assert server.requests[0]["tools"][0] == tool


def test_a_prompt_of_the_configuration_replaces_the_instructions(server: VendorServer, play: Play) -> None:
    play("anthropic_messages", REPLIES["anthropic_messages"], agent={"prompt": "brief"})
    assert server.requests[0]["system"] == "Use the computer."


@pytest.mark.parametrize("api", APIS)
def test_a_request_to_a_busy_server_is_repeated_unchanged(server: VendorServer, play: Play, api: str) -> None:
    busy = [Reply({}, 529), Reply({}, 429, {"retry-after": "0"}), Reply({}, 503, {"retry-after": "0.01"})]
    busy += [Reply(b'{"id": ', 200, {"Content-Length": "100"})]
    ((_, action),) = play(api, *busy, REPLIES[api])
    assert action == Action(ActionKind.CLICK, x=10, y=20)
    assert len(server.requests) == 5 and all(request == server.requests[0] for request in server.requests)


def test_a_response_that_failed_for_a_passing_reason_is_requested_again(server: VendorServer, play: Play) -> None:
    failed = openai_reply(status="failed", error={"code": "rate_limit_exceeded", "message": "slow down"})
    play("openai_responses", failed, REPLIES["openai_responses"])
    assert server.requests[0] == server.requests[1]
    with pytest.raises(InferenceError, match=r"no valid response of OpenAI's protocol .*status failed: other: no"):
        play("openai_responses", openai_reply(status="failed", error={"code": "other", "message": "no"}))


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply({"error": {"message": "your credit balance is too low"}}, 400), "400 .*credit balance is too low"),
        (Reply({"error": {"message": f"{KEY} is not valid"}}, 401), r"401 .*\*\*\* is not valid"),
        (Reply({}, 307, {"Location": "http://127.0.0.1:9/v1/messages"}), "307"),
        (Reply({"detail": "?"}), "no valid response of .* protocol"),
        (Reply([]), "no valid response of .* protocol"),
        (Reply(b"<html>"), "no valid response of .* protocol"),
        (Reply(b"[" * 100_000), "no valid response of .* protocol"),
    ],
)
def test_a_rejected_request_or_an_invalid_reply_is_a_fault_that_does_not_show_the_key(
    play: Play, api: str, reply: Reply, problem: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with pytest.raises(InferenceError, match=problem) as error:
        play(api, reply)
    chain = [error.value, error.value.__cause__]
    assert KEY not in "".join(map(repr, chain)) + caplog.text


@pytest.mark.parametrize("api", APIS)
def test_a_server_that_stays_exhausted_is_a_fault_after_the_time_limit(play: Play, api: str) -> None:
    exhausted = Reply({"error": {"type": "overloaded_error"}}, 529, {"retry-after": "0.05"})
    with pytest.raises(InferenceError, match=r"no response within 1 s; last error: .*529.*overloaded_error"):
        play(api, *[exhausted] * 50, timeout_s=1.0)


def test_an_attempt_that_the_time_limit_interrupts_does_not_hide_what_the_server_reported(play: Play) -> None:
    exhausted = Reply({"error": {"type": "overloaded_error"}}, 529, {"retry-after": "0.05"})
    slow = anthropic_reply(say("a" * 500), stop_reason="end_turn")
    slow.pause_s = 0.02
    with pytest.raises(InferenceError, match=r"no response within 1 s; last error: .*529.*overloaded_error"):
        play("anthropic_messages", exhausted, slow, timeout_s=1.0)


def test_a_server_that_asks_for_a_pause_beyond_the_time_limit_is_a_fault(play: Play) -> None:
    pause = Reply({}, 429, {"retry-after": "3600"})
    with pytest.raises(InferenceError, match=r"no response within 0\.2 s; last error: .*429"):
        play("anthropic_messages", pause, timeout_s=0.2)


def test_a_reply_that_arrives_too_slowly_is_a_fault(play: Play) -> None:
    slow = anthropic_reply(say("a" * 500), stop_reason="end_turn")
    slow.pause_s = 0.02
    with pytest.raises(InferenceError, match=r"no response within 0\.2 s; last error: .*incomplete at the time limit"):
        play("anthropic_messages", slow, timeout_s=0.2)


def test_a_reply_that_is_too_long_is_rejected(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_server, "MAX_REPLY_BYTES", 1000)
    with pytest.raises(InferenceError, match="the response is longer than 1000 bytes"):
        play("anthropic_messages", anthropic_reply(say("a" * 2000), stop_reason="end_turn"))


def test_text_that_cannot_be_stored_is_replaced(play: Play) -> None:
    body = json.dumps(anthropic_reply(say("A"), stop_reason="end_turn").body).replace('"A"', '"\\ud800"')
    [(step, _)] = play("anthropic_messages", Reply(body.encode()))
    assert step.text.encode() and "?" in step.text


@pytest.mark.parametrize("api", APIS)
def test_the_check_names_the_reason_why_a_server_cannot_be_used(
    server: VendorServer, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(server, api).inference
    check_reachable(config)
    with pytest.raises(
        UserError, match=r"(does not serve the model mars|/models/mars: .*404 ).*hint: .*external_model"
    ):
        check_reachable(config.model_copy(update={"external_model": "mars"}))
    monkeypatch.setenv(VARIABLE, "wrong")
    with pytest.raises(UserError, match=f"401 .*hint: set the environment variable {VARIABLE} to a valid API key"):
        check_reachable(config)
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UserError, match=f"the environment variable {VARIABLE} with the API key of .* is not set"):
        check_reachable(config)
    variable = "ANTHROPIC_API_KEY" if api == "anthropic_messages" else "OPENAI_API_KEY"
    monkeypatch.setenv(variable, KEY)
    check_reachable(config.model_copy(update={"external_api_key_variable": None}))


def test_an_api_with_tools_requires_the_action_language_of_its_tools(server: VendorServer) -> None:
    check_language(config_of(server, "chat_completions", agent={"action_language": "qwen3_vl"}))
    for api, other in (("anthropic_messages", "ui_tars_1_5"), ("openai_responses", "anthropic_computer_use")):
        with pytest.raises(UserError, match=rf"external_api = {api} .*set agent.action_language to {APIS[api]}\)"):
            check_language(config_of(server, api, agent={"action_language": other}))


@pytest.mark.parametrize("name", ["max_tokens", "messages", "stream"])
def test_parameters_that_deskrl_sets_are_rejected(server: VendorServer, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is set by deskrl"):
        config_of(server, "anthropic_messages", inference={"external_parameters": {name: 1}})


@pytest.mark.parametrize(
    ("api", "tool", "request_type"),
    [
        ("anthropic_messages", "computer_20251124", AnthropicRequest),
        ("anthropic_messages", "computer_toolset_20260801", AnthropicRequest),
        ("openai_responses", "computer", OpenAIRequest),
        ("openai_responses", "computer_use_preview", OpenAIRequest),
    ],
)
def test_requests_fit_the_types_of_the_vendors_packages(
    server: VendorServer, play: Play, api: str, tool: str, request_type: type[BaseModel]
) -> None:
    pytest.importorskip(api.partition("_")[0], reason="the vendor's package is not installed")
    play(api, REPLIES[api], REPLIES[api], num_steps=2, agent={"action_language_options": {"tool": tool}})
    assert len(server.requests) == 2
    for body in server.requests:
        check_vendor_types(request_type, body)
