"""Pages of the viewer, rendered from the replay store and the run directory at each request."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from deskrl.analysis import report
from deskrl.analysis.evaluation.task_sets import task_set_dirs
from deskrl.analysis.formatting import format_age, format_duration, format_evidence
from deskrl.analysis.report.step_frames import Frame, make_frame
from deskrl.analysis.viewer import episode_view_models, token_table
from deskrl.analysis.viewer.episode_view_models import EpisodeView, LiveView, MemberView, TaskNames
from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.run_dir import RunDir
from deskrl.core.step_codec import CodecError, Step, decode_step
from deskrl.launch.run_control import is_running
from deskrl.launch.run_state import is_evaluation
from deskrl.learner.batches.token_stats import EpisodeTokenStats, read_token_stats
from deskrl.replay.store_reader import ImageUnavailable, StoreReader, StoreSnapshot
from deskrl.replay.stored_episodes import OUTCOMES, EpisodeFilter, EpisodeRecord, GroupRecord

ASSETS = {
    "style.css": "text/css",
    "viewer.css": "text/css",
    "viewer.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
"""Media types of the static files, by name."""

_PAGE_EPISODES = 50
_MAX_LIVE = 256
_THUMBNAIL_WIDTHS = (160, 400, 640)
_MAX_SQLITE_INTEGER = 2**63 - 1

_TokenStats = Mapping[str, EpisodeTokenStats]
"""Token statistics of the episodes of one group, by episode id."""


@dataclass(frozen=True)
class Page:
    """Content of a response."""

    media_type: str
    body: bytes
    is_immutable: bool = False
    """Whether the address always returns the same content, so that browsers may cache it."""


class PageNotFound(Exception):
    """The address or a value in its query names nothing that exists; the message says what."""


class ViewerPages:
    """Pages of one run.

    Args:
        config: run configuration.

    Raises:
        UserError: the replay store or the model's tokenizer cannot be read.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run_dir = RunDir(config.run_dir)
        self._kind = "evaluation" if is_evaluation(self._run_dir) else "run"
        self._reader = StoreReader(self._run_dir.replay)
        self.store_path = self._reader.path
        self._success_threshold = config.replay.success_threshold
        self._size = (config.desktop.width, config.desktop.height)
        self._decode_token = token_table.load_token_decoder(config.model_folder)
        self._templates = _template_environment()

    def episodes(self, query: Mapping[str, str]) -> Page:
        """Render a list of episodes, newest first."""
        wanted = _parse_filter(query)
        before = _parse_number(query, "before")
        with self._reader.snapshot() as snapshot:
            listing = snapshot.find_page(wanted, self._success_threshold, before, _PAGE_EPISODES)
            options = snapshot.filter_options()
            newest = snapshot.newest_ending()
        names = self._task_names()
        return self._render(
            "episodes.html.j2",
            title=self._config.name,
            filters=wanted,
            episodes=[
                episode_view_models.episode_view(it, self._success_threshold, names=names) for it in listing.episodes
            ],
            num_matching=listing.num_matching,
            fields=episode_view_models.filter_fields(wanted, options, names),
            is_filtered=wanted != EpisodeFilter(),
            is_first=before is None,
            older=None if listing.next_before is None else episode_view_models.list_url(wanted, listing.next_before),
            newest=newest,
        )

    def episode(self, name: str, query: Mapping[str, str]) -> Page:
        """Render one step of an episode, counted from 1, with all steps and the group below."""
        number = _parse_number(query, "step")
        with self._reader.snapshot() as snapshot:
            record = snapshot.get_episode(name)
            if record is None:
                raise PageNotFound(f"this run has no episode {name}")
            record, steps = _read_steps(snapshot, record)
            group = snapshot.get_group(record.group_id)
        if group is None:
            raise ValueError(f"{name}: its row in the database, or that of its group, is damaged")
        frames = episode_view_models.make_frames(steps, record, self._size)
        if number is None:
            number = 1
        if frames and not 1 <= number <= len(frames):
            raise PageNotFound(f"{name} has {len(steps)} steps, and no step {number}")
        step = steps[number - 1] if number <= len(steps) else None
        token_stats = self._token_stats(group)
        own = token_stats.get(name)
        step_stats = None if own is None or step is None else token_table.stats_of_step(steps, number - 1, own)
        return self._render(
            "episode.html.j2",
            title=f"{name} · {self._config.name}",
            episode=self._episode_view(record, token_stats),
            group=group,
            members=[self._episode_view(member, token_stats) for member in group.members],
            frames=frames,
            number=number,
            frame=frames[number - 1] if frames else None,
            step=step,
            tokens=token_table.token_views(step, self._decode_token, step_stats) if step is not None else [],
            has_token_stats=step_stats is not None,
            has_token_texts=self._decode_token is not None,
        )

    def group(self, name: str) -> Page:
        """Render the members of a group side by side, and its candidate from the success buffer."""
        with self._reader.snapshot() as snapshot:
            group = snapshot.get_group(name)
            if group is None:
                raise PageNotFound(f"this run has no group {name}")
            stats = self._token_stats(group)
            members = [self._member_view(snapshot, record, group, stats) for record in group.members]
            candidate = None
            if group.candidate is not None:
                candidate = self._member_view(snapshot, group.candidate, group, stats)
        return self._render(
            "group.html.j2", title=f"{name} · {self._config.name}", group=group, members=members, candidate=candidate
        )

    def live(self) -> Page:
        """Render the desktops of the episodes in progress."""
        return self._render("live.html.j2", title=f"live · {self._config.name}", **self._live_values())

    def live_desktops(self) -> Page:
        """Render the part of the page `live` that changes, which an open page polls."""
        return self._render("live_desktops.html.j2", **self._live_values())

    def _live_values(self) -> dict[str, Any]:
        # A run that was killed leaves episodes in its store that look as if they were in progress.
        in_progress = is_running(self._run_dir)
        return {"in_progress": in_progress, "desktops": self._live_views() if in_progress else []}

    def _live_views(self) -> list[LiveView]:
        names = self._task_names()
        with self._reader.snapshot() as snapshot:
            running = snapshot.find_page(EpisodeFilter(outcome="running"), self._success_threshold, None, _MAX_LIVE)
            # In the order of their start, so that a desktop keeps its place until its episode ends.
            return [
                LiveView(
                    episode_view_models.episode_view(record, self._success_threshold, names=names),
                    names.instructions.get(record.task_id, ""),
                    self._last_frame(snapshot, record),
                )
                for record in reversed(running.episodes)
            ]

    def _last_frame(self, snapshot: StoreSnapshot, record: EpisodeRecord) -> Frame | None:
        """Return the frame of the last stored step; None without one, or if it is damaged."""
        try:
            payloads = snapshot.step_payloads(record)
            return make_frame(decode_step(payloads[-1], with_ids=False), *self._size) if payloads else None
        except CodecError:
            return None

    def image(self, name: str, query: Mapping[str, str]) -> Page:
        """Return a screenshot, or a thumbnail of the width in the query.

        Raises:
            ImageDamaged: the stored bytes do not match the screenshot's hash.
        """
        width = _parse_number(query, "width")
        if width is not None and width not in _THUMBNAIL_WIDTHS:
            raise PageNotFound(f"width: must be one of {', '.join(map(str, _THUMBNAIL_WIDTHS))}, or omitted")
        try:
            data = self._reader.read_image(name)
        except ImageUnavailable as error:
            raise PageNotFound(str(error)) from error
        if width is not None:
            return Page("image/jpeg", _thumbnail(data, width), is_immutable=True)
        return Page("image/png", data, is_immutable=True)

    def pulse(self) -> Page:
        """Return the sequence number of the episode that ended last, which an open list polls."""
        with self._reader.snapshot() as snapshot:
            return Page("text/plain", str(snapshot.newest_ending()).encode())

    def asset(self, name: str) -> Page:
        """Return a static file, one of ASSETS."""
        assert self._templates.loader is not None
        source = self._templates.loader.get_source(self._templates, "report.css" if name == "style.css" else name)[0]
        return Page(ASSETS[name], source.encode())

    def error(self, message: str) -> Page:
        """Render an error message."""
        return self._render("error.html.j2", title=self._config.name, message=message)

    def _render(self, template: str, **values: Any) -> Page:
        html = self._templates.get_template(template).render(
            run=self._config.name, kind=self._kind, size=self._size, urls=episode_view_models, **values
        )
        return Page("text/html", html.encode("utf-8", errors="replace"))

    def _task_names(self) -> TaskNames:
        """Read the task files of the run and of its task sets; a missing or damaged file leaves out its names."""
        instructions: dict[str, str] = {}
        applications: dict[str, str] = {}
        for root in (self._run_dir.root, *task_set_dirs(self._run_dir.root).values()):
            with contextlib.suppress(UserError):
                tasks = RunDir(root).read_tasks().items()
                instructions |= {name: str(file["instruction"]) for name, file in tasks if "instruction" in file}
                applications |= {name: str(app) for name, app in RunDir(root).read_applications().items()}
        return TaskNames(instructions, applications)

    def _token_stats(self, group: GroupRecord) -> _TokenStats:
        """Read the learner's token statistics of a group; empty if they are not stored, or no longer."""
        if group.batch_id is None:
            return {}
        return read_token_stats(self._run_dir, group.batch_id).get(group.group_id, {})

    def _episode_view(self, record: EpisodeRecord, stats: _TokenStats) -> EpisodeView:
        own = stats.get(record.episode_id)
        return episode_view_models.episode_view(record, self._success_threshold, None if own is None else own.advantage)

    def _member_view(
        self, snapshot: StoreSnapshot, record: EpisodeRecord, group: GroupRecord, stats: _TokenStats
    ) -> MemberView:
        record, steps = _read_steps(snapshot, record)
        return MemberView(
            self._episode_view(record, stats),
            episode_view_models.make_frames(steps, record, self._size),
            episode_view_models.member_note(record, group),
        )


def _read_steps(snapshot: StoreSnapshot, record: EpisodeRecord) -> tuple[EpisodeRecord, list[Step]]:
    """Return an episode with its steps; without them, and with what is damaged in the record, if they are damaged."""
    try:
        return record, snapshot.read_steps(record)
    except CodecError as error:
        return replace(record, damage=record.damage or str(error)), []


def _parse_filter(query: Mapping[str, str]) -> EpisodeFilter:
    outcome = query.get("outcome", "")
    if outcome not in ("", *OUTCOMES):
        raise PageNotFound(f"outcome: must be one of {', '.join(OUTCOMES)}, not {outcome[:40]}")
    return EpisodeFilter(
        task=query.get("task", ""),
        queue=query.get("queue", ""),
        outcome=outcome,
        termination=_parse_number(query, "termination"),
        fault=_parse_number(query, "fault"),
        version=_parse_number(query, "version"),
    )


def _parse_number(query: Mapping[str, str], name: str) -> int | None:
    """Return a number of the query; None if it is missing or empty."""
    text = query.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) > _MAX_SQLITE_INTEGER:
        raise PageNotFound(f"{name}: must be a number, not {text[:40]}")
    return int(text)


def _thumbnail(data: bytes, width: int) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
            picture.thumbnail((width, width * 4))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=82)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise PageNotFound("the data stored as this screenshot is not an image") from error
    return buffer.getvalue()


def _template_environment() -> Environment:
    environment = Environment(
        # Action shapes and the base style sheet are those of the report.
        loader=ChoiceLoader([PackageLoader(__name__.rpartition(".")[0]), PackageLoader(report.__name__)]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": format_duration, "age": format_age, "evidence": format_evidence}
    return environment
