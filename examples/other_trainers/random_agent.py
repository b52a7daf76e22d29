"""Random agent on deskrl's desktops through Gymnasium.

    python examples/other_trainers/random_agent.py [RUN.toml] [--steps 100]

Prints one line for each episode. Needs `pip install 'deskrl[actor,env]'`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gymnasium

from deskrl.env import GYMNASIUM_ID
from deskrl.env.desktop_env import ConfigSource
from deskrl.env.desktop_fault import DesktopFault


def play(config: ConfigSource, num_steps: int, seed: int = 0) -> list[dict[str, Any]]:
    """Take random actions, and return the records of the episodes that have ended.

    Args:
        config: run configuration, its values as nested tables, the path of a TOML file, or None for the defaults.
        num_steps: number of actions.
        seed: seed of the actions, of the tasks and of their noise.
    """
    env = gymnasium.make(GYMNASIUM_ID, config=config)
    env.action_space.seed(seed)
    records = []
    try:
        env.reset(seed=seed)
        for _ in range(num_steps):
            try:
                _, reward, terminated, truncated, info = env.step(env.action_space.sample())
            except DesktopFault as fault:  # not a result of the agent: there is no reward
                print(f"repeated after a fault: {fault}")
                env.reset()
                continue
            if terminated or truncated:
                records.append({"reward": float(reward), **info})
                print(f"{info['task']}: reward {reward:g} after {info['num_steps']} steps ({info['termination']})")
                env.reset()
    finally:
        env.close()
    return records


def main() -> None:
    """Play with the options of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", nargs="?", type=Path, help="run configuration; default: deskrl's suite")
    parser.add_argument("--steps", type=int, default=100, help="number of actions")
    options = parser.parse_args()
    play(options.config, options.steps)


if __name__ == "__main__":
    main()
