"""`deskrl report RUN`: one self-contained HTML page about a run or an evaluation.

`evaluation_page` builds the page of an evaluation. For that of a run, `run_history` (records of the run directory) and
`replay_data` (episodes of the replay store) are the sources; `report_view_models`, `run_charts` and `step_frames` turn
them into what the template lays out. Text written by the policy is untrusted: the template escapes it, and the page's
Content-Security-Policy allows its own script only.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deskrl.analysis.evaluation.task_sets import evaluation_name
from deskrl.analysis.formatting import sorted_counts
from deskrl.analysis.report import evaluation_page, report_view_models, time_breakdown
from deskrl.analysis.report.replay_data import read_replay_data
from deskrl.analysis.report.run_charts import SMOOTHING_UPDATES, build_run_charts
from deskrl.analysis.report.run_history import read_history
from deskrl.analysis.report.step_frames import encode_data_uris
from deskrl.analysis.report.templating import read_asset, template_environment
from deskrl.analysis.run_config import read_run_config
from deskrl.core.config import RunConfig
from deskrl.core.file_io import write_atomically
from deskrl.core.run_dir import RunDir
from deskrl.launch.run_state import is_evaluation


def report(root: Path) -> int:
    """Write report.html of the run or the evaluation in `root`, print its path and return the exit status.

    Raises:
        UserError: `root` contains neither.
    """
    run_dir = RunDir(root.absolute())
    write = write_evaluation_page if is_evaluation(run_dir) else write_report
    print(write(run_dir, read_run_config(run_dir)))
    return 0


def write_evaluation_page(run_dir: RunDir, config: RunConfig) -> Path:
    """Write report.html of an evaluation that is finished or in progress, and return its path.

    Args:
        run_dir: directory of the evaluation, or of one of its task sets.
        config: its configuration.
    """
    view = evaluation_page.evaluation_view(run_dir, config)
    html = _render("evaluation.html.j2", config, view.images, view=view, name=evaluation_name(run_dir.root))
    write_atomically(run_dir.report, html.encode("utf-8", errors="replace"))
    return run_dir.report


def write_report(run_dir: RunDir, config: RunConfig) -> Path:
    """Write report.html of a run that is finished, interrupted or in progress, and return its path.

    If the replay store cannot be read, the page says so and shows the rest.

    Args:
        run_dir: run directory.
        config: run configuration.
    """
    history = read_history(run_dir)
    threshold = config.replay.success_threshold
    replay = read_replay_data(run_dir.replay, config.tasks.ids, threshold)
    html = _render(
        "report.html.j2",
        config,
        replay.images,
        history=history,
        replay=replay,
        comparisons=report_view_models.comparisons(history),
        charts=build_run_charts(history),
        window=SMOOTHING_UPDATES,
        phases=time_breakdown.phase_rows(history.phases, history.duration_s),
        update_seconds=time_breakdown.mean_update_seconds(history),
        step_timings=time_breakdown.step_timings(history),
        episodes=report_view_models.episode_rows(replay, threshold),
        success_buffer=report_view_models.success_buffer_rows(replay),
        faults=sorted_counts(replay.status.faults, "FAULT_KIND_") if replay.status else [],
        dropped=report_view_models.dropped_groups(history, replay),
        tasks=report_view_models.task_strips(replay, history.instructions, config),
    )
    write_atomically(run_dir.report, html.encode("utf-8", errors="replace"))
    return run_dir.report


def _render(template: str, config: RunConfig, images: Mapping[str, bytes], **values: Any) -> str:
    """Render a self-contained page, with its style sheet, script and screenshots."""
    environment = template_environment()
    script = read_asset(environment, "report.js")
    return environment.get_template(template).render(
        config=config,
        config_json=config.model_dump_json(indent=2),
        images=encode_data_uris(images),
        style=read_asset(environment, "report.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **values,
    )
