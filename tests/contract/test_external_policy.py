"""A policy on an OpenAI-compatible server: what it is sent, what is made of its answers, what ends an episode."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.agent.conversation import make_agent
from deskrl.actor.agent.external_policy import ExternalPolicy
from deskrl.actor.agent.policy_client import InferenceFailed
from deskrl.core.config import AgentConfig, InferenceConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.core.evaluation.external import refuse_absent
from deskrl.core.running.preflight import refuse_unlearnable
from deskrl.proto.v1 import rollout_pb2

Answer = tuple[int, dict[str, Any]]
SAID = "Thought: I wait.\nAction: wait()"


def said(text: str | None) -> Answer:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """Answers one request after the other with what it was told to; keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.keys.append(self.headers["Authorization"])
                self._answer(*outer.answers.pop(0))

            def do_GET(self) -> None:
                self._answer(200, {"data": [{"id": "tars"}]} if self.path == "/v1/models" else {})

            def _answer(self, status: int, content: dict[str, Any]) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


def config_of(server: Server) -> InferenceConfig:
    return InferenceConfig(external_url=server.url + "/", external_model="tars", max_action_tokens=99)


@pytest.fixture
def decide(server: Server) -> Callable[..., Any]:
    """One decision of an episode that has had one before."""

    def decided(*answers: Answer, timeout_s: float = 20.0) -> Any:
        server.answers = [said(SAID), *answers]
        player = ExternalPolicy(config_of(server), timeout_s).player(rollout_pb2.Rollout(temperature=0.5, seed=7))
        conversation = make_agent(AgentConfig(prompt="brief")).begin("Press it.")

        async def scenario() -> Any:
            for index in range(2):
                seen = conversation.observe(Image.new("RGB", (56, 56), (index, 0, 0)))
                decision = await player.decide(conversation, seen, index)
            return decision

        return asyncio.run(scenario())

    return decided


def test_the_whole_conversation_is_sent_with_its_screenshots(
    server: Server, decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    decide(said("Action: finished()"))
    sent = server.asked[1]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("tars", 99, 0.5)
    assert sent["seed"] != server.asked[0]["seed"]
    roles = [message["role"] for message in sent["messages"]]
    assert roles == ["system", "user", "user", "assistant", "user"]
    parts = [message["content"][0] for message in sent["messages"]]
    assert (parts[1]["text"], parts[3]["text"]) == ("Press it.", SAID)
    kind, _, data = parts[4]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert parts[4] != parts[2]
    assert server.keys == ["Bearer secret"] * 2


def test_a_step_holds_what_was_said_and_nothing_that_could_be_learnt_from(decide: Callable[..., Any]) -> None:
    step = decide(said("Action: finished()")).step
    assert (step.index, step.text, len(step.images), step.temperature) == (1, "Action: finished()", 2, 0.5)
    assert (step.prompt_ids, step.action_ids, step.logprobs, step.spans, step.processor_hash) == ((), (), (), (), "")


def test_a_server_that_is_busy_is_asked_again(server: Server, decide: Callable[..., Any]) -> None:
    assert decide((503, {}), (429, {}), said("Action: wait()")).step.text == "Action: wait()"
    assert server.asked[1] == server.asked[2] == server.asked[3]


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([(400, {"error": "no image, please"})], "400.*no image, please"),
        ([(200, {"detail": "?"})], "no answer of OpenAI's protocol"),
        ([(503, {})] * 50, "no answer within 0.5 s; the last was .*503"),
    ],
)
def test_what_is_no_answer_ends_the_episode_as_a_fault(
    decide: Callable[..., Any], answers: list[Answer], told: str
) -> None:
    with pytest.raises(InferenceFailed, match=told):
        decide(*answers, timeout_s=0.5)


def test_an_empty_answer_is_the_policys_own(decide: Callable[..., Any]) -> None:
    assert decide(said(None)).step.text == ""


def test_a_server_is_looked_at_before_anything_plays(server: Server) -> None:
    refuse_absent(config_of(server))
    with pytest.raises(UserError, match=r"serves no mars; set .* to one of tars"):
        refuse_absent(config_of(server).model_copy(update={"external_model": "mars"}))
    elsewhere = {"external_url": server.url.removesuffix("/v1")}
    with pytest.raises(UserError, match="/models is not answered as OpenAI's protocol has it"):
        refuse_absent(config_of(server).model_copy(update=elsewhere))
    server.close()
    with pytest.raises(UserError, match=r"Connection refused.*; start the server"):
        refuse_absent(config_of(server))


def test_nothing_is_learnt_from_it(server: Server) -> None:
    with pytest.raises(UserError, match=r"nothing can be learnt from it; unset it; `deskrl eval` takes it"):
        refuse_unlearnable(RunConfig(inference=config_of(server)))
