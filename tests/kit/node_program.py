"""Node of a learner whose ranks only add up numbers with gloo: `python node_program.py CONFIG NODE_RANK [LINES]`.

Each rank appends a line to the file LINES after each sum; it ends when the file `done` is beside it.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def run_node(config: Path, node_rank: int, lines: str) -> int:
    """Run the ranks of a node as the learner does."""
    from deskrl.core import console
    from deskrl.core.config import read_resolved
    from deskrl.learner import torchrun_launch

    console.set_up_logging("learner")
    torchrun_launch.RANK_PROGRAM = (__file__,)
    return torchrun_launch.main(read_resolved(config), node_rank, [str(config), str(node_rank), lines])


def run_rank(config: Path, lines: Path) -> None:
    """Add up the ranks over and over."""
    import torch
    import torch.distributed

    from deskrl.core import console
    from deskrl.core.config import read_resolved
    from deskrl.core.process_lifecycle import stop_event
    from deskrl.learner.nodes.node_watch import watch_nodes

    console.set_up_logging("learner")
    watch_nodes(read_resolved(config).learner.node_timeout_s, stop_event())
    torch.distributed.init_process_group("gloo")
    is_last = False
    while not is_last:
        is_done = (lines.parent / "done").exists()
        total = torch.tensor([float(torch.distributed.get_rank() + 1), float(is_done)])
        torch.distributed.all_reduce(total)
        is_last = bool(total[1] > 0)
        with open(lines, "a") as file:
            file.write(f"{int(total[0])}\n")
        time.sleep(0.1)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config, node_rank, lines = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    if "RANK" in os.environ:
        run_rank(config, Path(lines))
    else:
        sys.exit(run_node(config, node_rank, lines))
