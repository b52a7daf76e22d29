"""Writes the report of a run: one page that needs nothing but itself, for who has just watched the run.

Knows how the parts come together: `history` (what the run wrote down) and `evidence` (what replay holds) feed `page`,
`curves` and `frames`, which the template lays out. Whatever the policy wrote is untrusted: the template escapes all
of it, and the page forbids itself to load or run anything but its own one script.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

from deskrl.core.config import RunConfig
from deskrl.core.report import clock, page
from deskrl.core.report.curves import WINDOW, draw_curves
from deskrl.core.report.evidence import gather
from deskrl.core.report.frames import data_uris
from deskrl.core.report.history import read_history
from deskrl.core.report.templating import source, templates
from deskrl.core.runfolder import RunFolder, write_atomically

__all__ = ["write_report"]


def write_report(folder: RunFolder, config: RunConfig, replay_address: str) -> Path:
    """Write `report.html` of a run, finished or cut short, and return its path.

    Args:
        folder: of the run.
        config: of the run.
        replay_address: where a replay service with the run's episodes answers. If it does not, the page says so and
            shows the rest.
    """
    history = read_history(folder)
    evidence = gather(replay_address, config.tasks.tasks, config.replay.success_above)
    environment = templates()
    script = source(environment, "report.js")
    html = environment.get_template("report.html.j2").render(
        config=config,
        config_json=config.model_dump_json(indent=2),
        history=history,
        evidence=evidence,
        comparisons=page.comparisons(history),
        curves=draw_curves(history),
        window=WINDOW,
        phases=clock.phase_rows(history.phases, history.duration_s),
        update_seconds=clock.update_seconds(history),
        turn_timings=clock.turn_timings(history),
        episodes=page.episode_rows(evidence, config.replay.success_above),
        stored=page.stored_rows(evidence),
        faults=page.counts_in_words(evidence.status.faults, "FAULT_KIND_") if evidence.status else [],
        dropped=page.dropped_groups(history, evidence),
        tasks=page.task_strips(evidence, history, config),
        images=data_uris(evidence.images),
        style=source(environment, "report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    write_atomically(folder.report, html.encode("utf-8", errors="replace"))
    return folder.report
