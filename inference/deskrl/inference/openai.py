"""vLLM's own OpenAI-compatible endpoint on the engine that `Act` samples from. Knows HTTP, not deskrl's contracts."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.engine.async_llm import AsyncLLM


@contextlib.asynccontextmanager
async def serve_openai(llm: AsyncLLM, model_folder: Path, name: str, endpoint: tuple[str, int]) -> AsyncIterator[None]:
    """Serve chat completions, models and health for as long as the block runs.

    Args:
        llm: the engine.
        model_folder: its model.
        name: what clients call the model.
        endpoint: host and port where to listen; nobody is asked who he is.
    """
    import asyncio
    import socket

    import uvicorn
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.api_server.app_state import init_app_state
        from vllm.entrypoints.launchers.app import build_app
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ModuleNotFoundError:  # vLLM 0.26
        from vllm.entrypoints.openai.api_server import build_app, init_app_state
        from vllm.entrypoints.openai.cli_args import make_arg_parser

    class Server(uvicorn.Server):
        """One that leaves signals to the role that runs it."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(model_folder), "--served-model-name", name, "--disable-fastapi-docs"]
    )
    tasks = await llm.get_supported_tasks()
    app = build_app(arguments, tasks)
    await init_app_state(llm, app.state, arguments, tasks)
    listener = socket.create_server(endpoint)
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
