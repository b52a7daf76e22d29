"""Agent loop of OSWorld's package desktop-env on deskrl's desktops, run in the environment of OSWorld's evaluators.

    PYTHONPATH=env PYTHON osworld_agent_loop.py DESKRL_PYTHON TASK.json CACHE_FOLDER NUM_EPISODES ACTION ...

Actions are pyautogui code, DONE or FAIL. Prints one JSON object for each episode.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path


def main(python: str, task_file: str, cache_folder: str, num_episodes: str, *actions: str) -> None:
    sys.modules.setdefault("easyocr", types.ModuleType("easyocr"))  # needs PyTorch; no metric of the task uses it
    from desktop_env.desktop_env import DesktopEnv

    from deskrl.env.desktop_env_provider import PROVIDER_NAME, use_deskrl_desktops

    use_deskrl_desktops(python=python)
    env = DesktopEnv(
        provider_name=PROVIDER_NAME,
        action_space="pyautogui",
        cache_dir=cache_folder,
        screen_size=(1280, 720),
        require_a11y_tree=False,
    )
    try:
        for _ in range(int(num_episodes)):
            observation = env.reset(task_config=json.loads(Path(task_file).read_text()))
            sizes, done = [len(observation["screenshot"])], False
            for action in actions:
                observation, _, done, _ = env.step(action, pause=0.5)
                sizes.append(len(observation["screenshot"]))
            reward = env.evaluate()
            result = {"instruction": observation["instruction"], "sizes": sizes, "done": done, "reward": reward}
            print(json.dumps(result), flush=True)
    finally:
        env.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
