"""Inference replica: both services of a real engine, compared with the forward pass of transformers."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import stat
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
import torch
from inference_kit import (
    LEARNER,
    PEER,
    TOLERANCE,
    Client,
    Reference,
    Replica,
    act_request,
    build_model,
    check_published_architecture,
    replica_config,
    running_replica,
    sampled,
    screenshot,
    send,
    system,
    update_events,
    user,
)
from PIL import Image
from ports_kit import free_port
from processor_kit import int4_problem
from safetensors.torch import load_file, save_file

from deskrl.actor.agent import external_server
from deskrl.actor.agent.conversation import Agent, ChatPrompt
from deskrl.actor.agent.external_policy import ExternalClient, chat_messages
from deskrl.actor.agent.inference_client import InferenceError
from deskrl.core import rpc
from deskrl.core.config import AgentConfig, InferenceConfig
from deskrl.core.errors import UserError
from deskrl.core.weights.gpu_transfer import host_id
from deskrl.inference.main import temporary_dir
from deskrl.proto.v1 import common_pb2, weights_pb2
from deskrl.proto.v1 import inference_pb2 as pb

# On a GPU the last bits of logits depend on the rest of the batch and on the prefix cache.
DEPENDS_ON_THE_BATCH = torch.cuda.is_available()

INSTRUCTION = [system("You use a computer."), user("Open the editor.")]


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Replica]:
    """Replica that all tests of this module share, because an engine takes up to a minute to start."""
    folder = tmp_path_factory.mktemp("inference")
    config = replica_config(folder, free_port(), openai_port=free_port())
    with running_replica(config, folder / "replica.log") as running:
        processes = running.descendants()
        yield running
    assert running.process.returncode == 0, "SIGTERM must end a replica gracefully"
    _, left = psutil.wait_procs(processes, timeout=60)
    assert not left, "processes of the engine were left running"


@pytest.fixture(scope="module")
def reference(replica: Replica) -> Reference:
    return Reference(replica.config.model_folder)


@pytest.fixture
def run(replica: Replica) -> Callable[[Callable[[Client], Awaitable[Any]]], Any]:
    """Return a function that runs a coroutine function with a client of the replica."""

    async def connected(scenario: Callable[[Client], Awaitable[Any]]) -> Any:
        async with rpc.connect(replica.address) as channel:
            return await scenario(Client(channel))

    return lambda scenario: asyncio.run(connected(scenario))


def test_token_ids_and_logprobs_equal_those_of_transformers(run: Any, reference: Reference) -> None:
    images = [screenshot(1), screenshot(2)]
    messages = [system("You use a computer."), user("Open it.", images[0], "Then this:", images[1])]

    async def scenario(client: Client) -> pb.SampledAction:
        await send(client.weights, update_events(reference.original, step=1))
        return await client.act(act_request(messages, images, temperature=0.7, max_tokens=20))

    action = run(scenario)
    assert list(action.prompt_ids) == reference.prompt_ids(messages)
    expected = reference.logprobs(
        action.prompt_ids, action.action_ids, images, reference.original, temperature=as_float32(0.7)
    )
    assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)
    assert set(action.action_ids).isdisjoint(reference.suppressed_ids)


def as_float32(value: float) -> float:
    """Round to 32 bits, as the protobuf field does."""
    return float(torch.tensor(value, dtype=torch.float32))


def test_a_missing_screenshot_is_requested_once_and_then_cached(run: Any) -> None:
    image = screenshot(3)
    messages = [user("What is this?", image)]

    async def scenario(client: Client) -> None:
        without = await client.inference.Act(act_request(messages), timeout=60)
        assert list(without.missing_images.hashes) == [image.hash]
        first = await client.act(act_request(messages, [image]))
        again, once_more = [await client.act(act_request(messages)) for _ in range(2)]
        assert list(again.prompt_ids) == list(first.prompt_ids)
        assert list(once_more.action_ids) == list(again.action_ids)

    run(scenario)


def test_the_prompt_of_a_step_extends_prompt_and_action_of_the_previous_step(run: Any) -> None:
    before, after = screenshot(4), screenshot(5)

    async def scenario(client: Client) -> None:
        messages = [user("Open the editor.", before)]
        first = await client.act(act_request(messages, [before]))
        messages += [sampled(first.action_ids), user(after)]
        second = await client.act(act_request(messages, [after]))
        so_far = [*first.prompt_ids, *first.action_ids]
        assert list(second.prompt_ids[: len(so_far)]) == so_far

    run(scenario)


@pytest.mark.parametrize("context", ["window", "segment", "episode"])
def test_every_step_of_an_episode_has_the_token_ids_and_logprobs_of_its_context(
    run: Any, reference: Reference, context: str
) -> None:
    """The prefix cache holds earlier steps, of which some prompts are no extension."""
    agent = {"context": context, "window_images": 2, "segment_images": (1, 3), "prompt": "brief"}
    conversation = Agent(AgentConfig.model_validate(agent)).start_conversation("Open it.")
    images = {}

    async def scenario(client: Client) -> list[tuple[ChatPrompt, pb.SampledAction]]:
        await send(client.weights, update_events(reference.original, step=1))
        steps = []
        for index in range(4):
            image = conversation.observe(Image.open(io.BytesIO(screenshot(60 + index).data)))
            images[image.hash] = image
            prompt = conversation.prompt()
            steps.append((prompt, await client.act(act_request(prompt.messages, [image], seed=index))))
            conversation.respond(steps[-1][1].action_ids)
        return steps

    steps = run(scenario)
    expected_counts = {"window": [1, 2, 2, 2], "segment": [1, 2, 3, 1], "episode": [1, 2, 3, 4]}[context]
    assert [len(prompt.images) for prompt, _ in steps] == expected_counts
    for prompt, action in steps:
        assert list(action.prompt_ids) == reference.prompt_ids(prompt.messages)
        seen = [images[name] for name in prompt.images]
        expected = reference.logprobs(action.prompt_ids, action.action_ids, seen, reference.original)
        assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)


def test_the_seed_determines_the_action(run: Any) -> None:
    async def scenario(client: Client) -> None:
        # The first request fills the prefix cache.
        _, first, again, other = [await client.act(act_request(INSTRUCTION, seed=seed)) for seed in (7, 7, 7, 8)]
        assert list(first.action_ids) == list(again.action_ids)
        assert list(first.action_ids) != list(other.action_ids)

    run(scenario)


def test_concurrent_requests_get_the_same_actions_as_sequential_ones(run: Any, reference: Reference) -> None:
    images = [screenshot(number) for number in range(6)]
    requests = [act_request([user("Go on.", image)], [image], seed=seed) for seed, image in enumerate(images)]

    async def scenario(client: Client) -> tuple[list[pb.SampledAction], list[pb.SampledAction]]:
        await send(client.weights, update_events(reference.original, step=1))
        concurrent = await asyncio.gather(*(client.act(request) for request in requests))
        return list(concurrent), [await client.act(request) for request in requests]

    concurrent, sequential = run(scenario)
    for one, other, image in zip(concurrent, sequential, images, strict=True):
        for action in (one, other):
            expected = reference.logprobs(action.prompt_ids, action.action_ids, [image], reference.original)
            assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)
        assert DEPENDS_ON_THE_BATCH or list(one.action_ids) == list(other.action_ids)


def test_temperature_zero_is_greedy(run: Any) -> None:
    async def scenario(client: Client) -> None:
        _, one, other = [await client.act(act_request(INSTRUCTION, temperature=0, seed=seed)) for seed in (0, 1, 2)]
        assert list(one.action_ids) == list(other.action_ids)

    run(scenario)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.ActRequest(peer=PEER, messages=INSTRUCTION, max_tokens=0), grpc.StatusCode.INVALID_ARGUMENT),
        (act_request(INSTRUCTION, max_tokens=401), grpc.StatusCode.INVALID_ARGUMENT),
        (act_request(INSTRUCTION, temperature=0.001), grpc.StatusCode.INVALID_ARGUMENT),
        (act_request([]), grpc.StatusCode.INVALID_ARGUMENT),
        (act_request([user("word " * 3000)]), grpc.StatusCode.INVALID_ARGUMENT),
        (
            act_request([user(*[screenshot(n) for n in range(5)])], [screenshot(n) for n in range(5)]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            act_request([user(screenshot(1))], [common_pb2.Image(hash=screenshot(1).hash, data=b"no image")]),
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
        (
            pb.ActRequest(peer=common_pb2.Peer(role="actor", protocol=99), messages=INSTRUCTION, max_tokens=1),
            grpc.StatusCode.FAILED_PRECONDITION,
        ),
    ],
    ids=[
        "no tokens", "too many tokens", "temperature", "no messages", "too long", "too many images", "wrong bytes",
        "protocol mismatch",
    ],
)  # fmt: skip
def test_invalid_requests_are_rejected(run: Any, request_: pb.ActRequest, code: grpc.StatusCode) -> None:
    async def scenario(client: Client) -> grpc.StatusCode:
        with pytest.raises(grpc.aio.AioRpcError) as rejection:
            await client.inference.Act(request_, timeout=60)
        return rejection.value.code()

    assert run(scenario) == code


def test_requests_in_flight_continue_under_the_new_weights(run: Any, reference: Reference) -> None:
    image = screenshot(6)
    messages = [user("Write a long text.", image)]
    old, new = reference.perturbed(seed=1), reference.perturbed(seed=2)

    async def scenario(client: Client) -> tuple[list[pb.SampledAction], weights_pb2.UpdateCommitted]:
        await send(client.weights, update_events(old, step=1))
        long_requests = [
            asyncio.ensure_future(client.act(act_request(messages, [image], max_tokens=400, seed=seed)))
            for seed in range(4)
        ]
        # Requests are served in order: once this one is finished, those before it are being sampled.
        await client.act(act_request(messages, [image], max_tokens=1, seed=99))
        committed = await send(client.weights, update_events(new, step=2))
        return list(await asyncio.gather(*long_requests)), committed

    actions, committed = run(scenario)
    assert committed.num_requests_kept == 4
    weights = {1: old, 2: new}
    for action in actions:
        spans = [(span.version.step, span.start, span.end) for span in action.versions]
        assert [step for step, _, _ in spans] == [1, 2]
        assert (spans[0][1], spans[0][2], spans[1][2]) == (0, spans[1][1], len(action.action_ids))
        for step, start, end in spans:
            expected = reference.logprobs(action.prompt_ids, action.action_ids, [image], weights[step])
            assert list(action.logprobs[start:end]) == pytest.approx(expected[start:end], abs=TOLERANCE)


def test_a_later_step_of_an_episode_continues_under_new_vision_weights(run: Any, reference: Reference) -> None:
    """The screenshot of the previous step is in the prefix cache, so that the engine has not needed its pixels yet."""
    before, after = screenshot(12), screenshot(13)
    old, new = reference.perturbed(seed=4), reference.perturbed(seed=5)

    async def scenario(client: Client) -> pb.SampledAction:
        await send(client.weights, update_events(old, step=1))
        messages = [user("Write a long text.", before, "Take your time. " * 50)]  # more than a block of the cache
        first = await client.act(act_request(messages, [before], max_tokens=1))
        messages += [sampled(first.action_ids), user("Go on.", after)]
        later = asyncio.ensure_future(client.act(act_request(messages, [after], max_tokens=400)))
        await client.act(act_request(messages, [after], max_tokens=1, seed=99))
        await send(client.weights, update_events(new, step=2))
        return await later

    action = run(scenario)
    assert [span.version.step for span in action.versions] == [1, 2]
    start = action.versions[1].start
    expected = reference.logprobs(action.prompt_ids, action.action_ids, [before, after], new)
    assert list(action.logprobs[start:]) == pytest.approx(expected[start:], abs=TOLERANCE)


def test_new_vision_weights_take_effect_immediately(run: Any, reference: Reference) -> None:
    image = screenshot(7)
    messages = [user("What do you see?", image)]
    language, vision = reference.original, reference.perturbed(seed=3, prefix="visual")

    async def scenario(client: Client) -> list[pb.SampledAction]:
        actions = []
        # The second update does not change the vision tower, so that cached image embeddings remain valid.
        for step, weights in enumerate((language, language, vision), start=1):
            await send(client.weights, update_events(weights, step))
            actions.append(await client.act(act_request(messages, [image])))
        return actions

    for action, weights in zip(run(scenario), (language, language, vision), strict=True):
        expected = reference.logprobs(action.prompt_ids, action.action_ids, [image], weights)
        assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)


def test_canary_logprobs_are_those_of_the_new_weights(run: Any, reference: Reference) -> None:
    image = screenshot(8)
    messages = [user("The canary.", image)]
    continuation = [300, 301, 302, 303]
    weights = reference.perturbed(seed=4)
    canary = weights_pb2.Canary(messages=messages, images=[image], continuation_ids=continuation)

    committed = run(lambda client: send(client.weights, update_events(weights, 1, canary)))
    prompt_ids = reference.prompt_ids(messages)
    expected = reference.logprobs(prompt_ids, continuation, [image], weights, temperature=None)
    assert list(committed.canary_logprobs) == pytest.approx(expected, abs=TOLERANCE)
    assert set(committed.phases_ms) == {"pause", "load", "clear_caches", "resume", "canary"}


def _remove_a_tensor(events: list[weights_pb2.UpdateWeightsRequest]) -> None:
    del events[0].begin.tensors[0]


def _flip_a_bit(events: list[weights_pb2.UpdateWeightsRequest]) -> None:
    last = events[-2].chunk
    events[-2].chunk = last[:-1] + bytes([last[-1] ^ 1])


def _truncate(events: list[weights_pb2.UpdateWeightsRequest]) -> None:
    del events[-2:]


def _append_bytes(events: list[weights_pb2.UpdateWeightsRequest]) -> None:
    events[-2].chunk += b"more"


def _change_the_processor(events: list[weights_pb2.UpdateWeightsRequest]) -> None:
    events[0].begin.model_fingerprint = "another"


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (_remove_a_tensor, grpc.StatusCode.INVALID_ARGUMENT),
        (_flip_a_bit, grpc.StatusCode.DATA_LOSS),
        (_truncate, grpc.StatusCode.ABORTED),
        (_append_bytes, grpc.StatusCode.DATA_LOSS),
        (_change_the_processor, grpc.StatusCode.FAILED_PRECONDITION),
    ],
)
def test_a_damaged_update_leaves_the_old_weights_in_use(
    run: Any, reference: Reference, damage: Callable[[list[weights_pb2.UpdateWeightsRequest]], None], code: Any
) -> None:
    events = update_events(reference.perturbed(seed=5), step=2)
    damage(events)

    async def scenario(client: Client) -> None:
        await send(client.weights, update_events(reference.original, step=1))
        _, before = [await client.act(act_request(INSTRUCTION)) for _ in range(2)]  # the first fills the prefix cache
        with pytest.raises(grpc.aio.AioRpcError) as rejection:
            await send(client.weights, events)
        assert rejection.value.code() == code
        assert await client.step() == 1
        after = await client.act(act_request(INSTRUCTION))
        assert list(after.action_ids) == list(before.action_ids)
        assert list(after.logprobs) == pytest.approx(list(before.logprobs), abs=TOLERANCE)

    run(scenario)


def test_a_second_concurrent_update_is_rejected(run: Any, reference: Reference) -> None:
    begin, *rest = update_events(reference.original, step=1)

    async def scenario(client: Client) -> None:
        ready = asyncio.Event()
        finish = asyncio.Event()

        async def slow() -> AsyncIterator[weights_pb2.UpdateWeightsRequest]:
            yield begin
            await finish.wait()
            for event in rest:
                yield event

        replies = client.weights.UpdateWeights(slow())

        async def read_replies() -> None:
            async for _ in replies:
                ready.set()

        reading = asyncio.ensure_future(read_replies())
        await ready.wait()
        with pytest.raises(grpc.aio.AioRpcError) as rejection:
            await send(client.weights, update_events(reference.original, step=2))
        assert rejection.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        finish.set()
        await reading
        assert await client.step() == 1

    run(scenario)


def test_a_learner_that_disconnects_at_the_commit_leaves_consistent_weights(run: Any, reference: Reference) -> None:
    image = screenshot(10)
    messages = [user("And now?", image)]
    weights = {1: reference.original, 2: reference.perturbed(seed=6)}
    *events, commit = update_events(weights[2], step=2)

    async def scenario(client: Client) -> tuple[int, pb.SampledAction]:
        await send(client.weights, update_events(weights[1], step=1))
        call = client.weights.UpdateWeights(timeout=120)
        for event in events:
            await call.write(event)
        assert [(await call.read()).WhichOneof("event") for _ in range(2)] == ["ready", "received"]
        await call.write(commit)
        call.cancel()
        status = weights_pb2.GetWeightStatusResponse(state="updating")
        while status.state == "updating":
            status = await client.weights.GetWeightStatus(weights_pb2.GetWeightStatusRequest(peer=PEER), timeout=60)
        return status.version.step, await client.act(act_request(messages, [image]))

    step, action = run(scenario)
    expected = reference.logprobs(action.prompt_ids, action.action_ids, [image], weights[step])
    assert list(action.logprobs) == pytest.approx(expected, abs=TOLERANCE)


def test_model_info_describes_the_served_model(run: Any, replica: Replica) -> None:
    info = run(lambda client: client.inference.GetModelInfo(pb.GetModelInfoRequest(peer=LEARNER), timeout=60))
    assert info.model_path == str(replica.config.model_folder)
    assert info.max_model_len == 2048
    assert info.engine.startswith("vllm ")
    assert len(info.processor_hash) == 64


def test_the_openai_endpoint_serves_the_same_model(replica: Replica) -> None:
    base = f"http://127.0.0.1:{replica.config.inference.openai_port}"
    with urllib.request.urlopen(f"{base}/health", timeout=60) as reply:
        assert reply.status == 200
    with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as reply:
        assert [model["id"] for model in json.load(reply)["data"]] == [replica.config.name]
    image = base64.b64encode(screenshot(9).data).decode()
    content: Sequence[dict[str, Any]] = [
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
    ]
    body = {"model": "test", "messages": [{"role": "user", "content": content}], "max_tokens": 3}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        answer = json.load(reply)
    assert answer["usage"]["completion_tokens"] == 3


def test_an_actor_can_use_the_openai_endpoint_as_an_external_policy(replica: Replica) -> None:
    address = f"http://127.0.0.1:{replica.config.inference.openai_port}/v1"
    config = InferenceConfig(external_url=address, external_model=replica.config.name, max_action_tokens=5)
    external_server.check_reachable(config)
    with pytest.raises(UserError, match="does not serve the model other"):
        external_server.check_reachable(config.model_copy(update={"external_model": "other"}))
    messages = [system("You use a computer."), user("Open it."), user(screenshot(9))]
    sent = chat_messages(messages, {screenshot(9).hash: screenshot(9).data})
    client = ExternalClient(config, timeout_s=60)
    one, same = (asyncio.run(client.complete(sent, temperature=1.0, seed=3)) for _ in range(2))
    assert one == same, "seed and screenshot must be passed on"
    with pytest.raises(InferenceError, match="400"):
        asyncio.run(client.complete(sent, temperature=-1.0, seed=3))


def test_the_temporary_directory_is_accessible_to_its_owner_only(replica: Replica) -> None:
    folder = temporary_dir(replica.config, replica=0)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the replica would wait for the learner")
def test_a_replica_without_a_gpu_rejects_a_direct_update(run: Any, reference: Reference) -> None:
    begin, *rest = update_events(reference.original, step=2)
    begin.begin.nccl.communicator_id = bytes(128)

    async def scenario(client: Client) -> None:
        await send(client.weights, update_events(reference.original, step=1))
        with pytest.raises(grpc.aio.AioRpcError) as rejection:
            await send(client.weights, [begin, *rest])
        assert rejection.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        status = await client.weights.GetWeightStatus(weights_pb2.GetWeightStatusRequest(peer=PEER), timeout=60)
        assert (status.version.step, list(status.gpu_uuids), status.communicator_id) == (1, [], b"")
        assert status.host == host_id()

    run(scenario)


def test_a_qwen3_vl_as_published_is_served_and_updated_like_a_qwen2_5_vl(tmp_path: Path) -> None:
    check_published_architecture("qwen3_vl", tmp_path)


@pytest.mark.skipif(bool(int4_problem()), reason=int4_problem())
def test_an_int4_replica_samples_with_the_rounded_weights(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    config = replica_config(tmp_path, free_port(), model, dtype="bfloat16", quantization="int4")
    reference = Reference(model)
    save_file(reference.perturbed(seed=1), model / "model.safetensors", metadata={"format": "pt"})
    request = act_request([user("Open it.", screenshot(1))], [screenshot(1)], max_tokens=40)

    async def scenario(address: str) -> pb.SampledAction:
        async with rpc.connect(address) as channel:
            return await Client(channel).act(request)

    with running_replica(config, tmp_path / "replica.log") as running:
        action = asyncio.run(scenario(running.address))
    packed = load_file(config.run_dir / "model-int4" / "model.safetensors")
    exact = load_file(model / "model.safetensors")
    rounded = {name: value if name in packed else unpack_int4(packed, name) for name, value in exact.items()}
    assert sum(name not in packed for name in exact) == 4 * 7, "seven matrices in each of four layers must be quantised"
    to_exact, to_rounded = (
        torch.tensor(reference.logprobs(action.prompt_ids, action.action_ids, [screenshot(1)], weights))
        .sub(torch.tensor(action.logprobs))
        .abs()
        .mean()
        for weights in (exact, rounded)
    )
    assert to_rounded < 0.05 < to_exact


def unpack_int4(packed: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return the matrix that 4-bit integers and their scales represent."""
    words = packed[f"{name}_packed"].long()
    levels = torch.stack([words >> 4 * place & 15 for place in range(8)], dim=-1).flatten(1) - 8
    scales = packed[f"{name}_scale"].float()
    return levels.float().mul(scales.repeat_interleave(32, dim=1))
