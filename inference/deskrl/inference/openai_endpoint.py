"""OpenAI-compatible HTTP endpoint of vLLM, served by the same engine as `Act`."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vllm.v1.engine.async_llm import AsyncLLM


@contextlib.asynccontextmanager
async def serve_openai(llm: AsyncLLM, model_folder: Path, name: str, endpoint: tuple[str, int]) -> AsyncIterator[None]:
    """Serve chat completions, models and health while the context is open, without authentication.

    Args:
        llm: engine.
        model_folder: folder of the engine's model.
        name: model name in the API.
        endpoint: host and port to listen on.
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
        """Server that does not install signal handlers, which the role needs itself."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args(
        ["--model", str(model_folder), "--served-model-name", name, "--disable-fastapi-docs"]
    )
    tasks = await llm.get_supported_tasks()
    app = build_app(arguments, tasks)
    await init_app_state(llm, app.state, arguments, tasks)
    family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
    listener = socket.create_server(endpoint, family=family)
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
