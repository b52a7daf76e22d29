"""External policies: requests to a server that speaks OpenAI's protocol, its responses, and its failures."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from typing import Any

import pytest
from PIL import Image

from deskrl.actor.agent.conversation import Agent
from deskrl.actor.agent.external_policy import ExternalClient
from deskrl.actor.agent.external_server import check_reachable
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.core.config import AgentConfig, InferenceConfig, RunConfig
from deskrl.core.errors import UserError
from deskrl.launch.preflight import check_learner
from deskrl.proto.v1 import rollout_pb2

HttpResponse = tuple[int, dict[str, Any]]
RESPONSE = "Thought: I wait.\nAction: wait()"


def completion(text: str | None) -> HttpResponse:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


class Server:
    """HTTP server that returns prepared responses in order and records the requests."""

    def __init__(self) -> None:
        self.responses: list[HttpResponse] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.num_responses = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                outer.keys.append(self.headers["Authorization"])
                response = outer.next_response()
                outer.num_responses += 1
                self._respond(*response)

            def do_GET(self) -> None:
                self._respond(200, {"data": [{"id": "tars"}]} if self.path == "/v1/models" else {})

            def _respond(self, status: int, content: dict[str, Any]) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        Thread(target=self._http.serve_forever, daemon=True).start()

    def next_response(self) -> HttpResponse:
        return self.responses.pop(0)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def config_of(server: Server) -> InferenceConfig:
    return InferenceConfig(external_url=server.url + "/", external_model="tars", max_action_tokens=99)


@pytest.fixture
def decide(server: Server) -> Callable[..., Any]:
    """Return a function that runs an episode of two steps and returns the second decision."""

    def run_two_steps(*responses: HttpResponse, timeout_s: float = 20.0) -> Any:
        server.responses = [completion(RESPONSE), *responses]
        client = ExternalClient(config_of(server), timeout_s)
        policy = client.open_policy(rollout_pb2.Rollout(temperature=0.5, seed=7))
        conversation = Agent(AgentConfig(prompt="brief")).start_conversation("Press it.")

        async def scenario() -> Any:
            for index in range(2):
                seen = conversation.observe(Image.new("RGB", (56, 56), (index, 0, 0)))
                decision = await policy.decide(conversation, seen, index)
            return decision

        return asyncio.run(scenario())

    return run_two_steps


def test_the_whole_conversation_is_sent_with_its_screenshots(
    server: Server, decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    decide(completion("Action: finished()"))
    sent = server.requests[1]
    assert (sent["model"], sent["max_tokens"], sent["temperature"]) == ("tars", 99, 0.5)
    assert sent["seed"] != server.requests[0]["seed"]
    roles = [message["role"] for message in sent["messages"]]
    assert roles == ["system", "user", "user", "assistant", "user"]
    parts = [message["content"][0] for message in sent["messages"]]
    assert (parts[1]["text"], parts[3]["text"]) == ("Press it.", RESPONSE)
    kind, _, data = parts[4]["image_url"]["url"].partition(",")
    assert kind == "data:image/png;base64" and base64.b64decode(data).startswith(b"\x89PNG")
    assert parts[4] != parts[2]
    assert server.keys == ["Bearer secret"] * 2


def test_parameters_of_the_configuration_are_sent_and_replace_the_temperature(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "mine")
    server.responses = [completion(RESPONSE)]
    parameters = {"external_parameters": {"temperature": 0.25, "top_p": 0.9}, "external_api_key_variable": "MY_KEY"}
    policy = ExternalClient(config_of(server).model_copy(update=parameters), 20.0).open_policy(
        rollout_pb2.Rollout(temperature=0.5, seed=7)
    )
    conversation = Agent(AgentConfig(prompt="brief")).start_conversation("Press it.")
    seen = conversation.observe(Image.new("RGB", (56, 56)))
    step = asyncio.run(policy.decide(conversation, seen, 0)).step
    (sent,) = server.requests
    assert (sent["temperature"], sent["top_p"], step.temperature) == (0.25, 0.9, 0.25)
    assert server.keys == ["Bearer mine"]


def test_a_step_contains_the_text_and_no_tokens_or_logprobs(decide: Callable[..., Any]) -> None:
    step = decide(completion("Action: finished()")).step
    assert (step.index, step.text, len(step.images), step.temperature) == (1, "Action: finished()", 2, 0.5)
    assert (step.prompt_ids, step.action_ids, step.logprobs, step.spans, step.processor_hash) == ((), (), (), (), "")


def test_a_request_to_a_busy_server_is_repeated(server: Server, decide: Callable[..., Any]) -> None:
    assert decide((503, {}), (429, {}), completion("Action: wait()")).step.text == "Action: wait()"
    assert server.requests[1] == server.requests[2] == server.requests[3]


@pytest.mark.parametrize(
    ("responses", "problem"),
    [
        ([(400, {"error": "no image, please"})], "400.*no image, please"),
        ([(200, {"detail": "?"})], "no valid response of OpenAI's protocol"),
        ([(503, {})] * 50, "no response within 0.5 s; last error: .*503"),
    ],
)
def test_an_error_of_the_server_ends_the_episode_with_a_fault(
    decide: Callable[..., Any], responses: list[HttpResponse], problem: str
) -> None:
    with pytest.raises(InferenceError, match=problem):
        decide(*responses, timeout_s=0.5)


def test_nothing_waits_for_a_request_that_was_cancelled(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    is_asked, has_ended = Event(), Event()

    def respond() -> HttpResponse:
        is_asked.set()
        has_ended.wait(20.0)
        return completion(RESPONSE)

    monkeypatch.setattr(server, "next_response", respond)

    async def scenario() -> None:
        client = ExternalClient(config_of(server), 20.0)
        request = asyncio.create_task(client.complete([], 1.0, 0))
        await asyncio.to_thread(is_asked.wait, 20.0)
        request.cancel()
        await asyncio.wait({request})

    asyncio.run(scenario())
    assert not has_ended.is_set() and server.num_responses == 0, "the event loop has ended before the request"
    has_ended.set()


def test_an_empty_response_is_a_response_of_the_policy(decide: Callable[..., Any]) -> None:
    assert decide(completion(None)).step.text == ""


def test_the_check_names_the_reason_why_a_server_cannot_be_used(server: Server) -> None:
    check_reachable(config_of(server))
    with pytest.raises(UserError, match=r"does not serve the model mars \(hint: set .* to one of tars"):
        check_reachable(config_of(server).model_copy(update={"external_model": "mars"}))
    elsewhere = {"external_url": server.url.removesuffix("/v1")}
    with pytest.raises(UserError, match="/models: no valid response of OpenAI's protocol"):
        check_reachable(config_of(server).model_copy(update=elsewhere))
    server.close()
    with pytest.raises(UserError, match=r"Connection refused.*hint: start the server"):
        check_reachable(config_of(server))


def test_an_external_policy_cannot_be_trained(server: Server) -> None:
    with pytest.raises(UserError, match="an external server cannot be trained"):
        check_learner(RunConfig(inference=config_of(server)))
