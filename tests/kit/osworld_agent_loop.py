"""Agent loop of OSWorld's package desktop-env on a guest server, run in the environment of OSWorld's evaluators.

    PYTHON osworld_agent_loop.py PORT TASK.json CACHE_FOLDER ACTION ...

Actions are pyautogui code, DONE or FAIL. Prints one JSON object. The package has no registry of providers, so that its
factory of providers is replaced by one for a guest that runs already; everything else is the package's own code.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any


class _Nothing:
    """Virtual machine manager and provider of a guest that is started and restored by others."""

    def __init__(self, address: str) -> None:
        self._address = address

    def get_ip_address(self, path_to_vm: str) -> str:
        return self._address

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments, **keywords: None


def main(port: str, task_file: str, cache_folder: str, *actions: str) -> None:
    sys.modules.setdefault("easyocr", types.ModuleType("easyocr"))  # needs PyTorch; no metric of the task uses it
    import desktop_env.desktop_env as package

    guest = _Nothing(f"127.0.0.1:{port}:9222:8006:8080")
    package.create_vm_manager_and_provider = lambda *arguments, **keywords: (guest, guest)
    env = package.DesktopEnv(
        provider_name="docker",
        path_to_vm="guest",
        action_space="pyautogui",
        cache_dir=cache_folder,
        screen_size=(1280, 720),
        require_a11y_tree=False,
    )
    observation = env.reset(task_config=json.loads(Path(task_file).read_text()))
    sizes, done = [len(observation["screenshot"])], False
    for action in actions:
        observation, _, done, _ = env.step(action, pause=0.5)
        sizes.append(len(observation["screenshot"]))
    result = {"instruction": observation["instruction"], "sizes": sizes, "done": done, "reward": env.evaluate()}
    env.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
