"""The viewer's pages by address, without HTTP: an address in, a reply out. Reads the store anew for each page."""

from __future__ import annotations

import io
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from deskrl.core.config import RunConfig
from deskrl.core.errors import UserError
from deskrl.core.ids import image_hash
from deskrl.core.report.page import span_text
from deskrl.core.runfolder import RunFolder
from deskrl.core.scores import EpisodeScores, read_scores
from deskrl.replay import images, schema, successes
from deskrl.replay.refusals import Refused
from deskrl.replay.segments import RESTORE, SegmentReader
from deskrl.replay.viewer import browse, pages, tokens

PAGE_EPISODES = 50
THUMBNAIL_WIDTHS = (160, 400)
_MAX_SQLITE_INTEGER = 2**63 - 1
_FILES = {
    "style.css": "text/css",
    "viewer.css": "text/css",
    "viewer.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}


@dataclass(frozen=True)
class Reply:
    """What is answered."""

    status: int
    content_type: str
    body: bytes
    is_immutable: bool = False
    """The same address will always give the same bytes."""


class NoSuchPage(Exception):
    """The address names nothing that there is; the message says what."""


class Site:
    """One run's pages.

    Args:
        config: of the run.

    Raises:
        UserError: there is no store, or none that this version can read.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._folder = RunFolder(config.folder)
        self._path = (self._folder.replay / schema.FILE_NAME).absolute()
        self._success_above = successes.threshold(config.replay.success_above)
        self._size = (config.desktop.width, config.desktop.height)
        self._text_of = tokens.token_texts(config.model_folder)
        self._segments = SegmentReader(self._path.parent)
        self._templates = _templates()
        refuse_unreadable(self._path, self._segments)

    def reply(self, path: str, query: Mapping[str, str]) -> Reply:
        """The page at an address; never raises for what a browser may ask."""
        try:
            return self._find(path)(query)
        except NoSuchPage as error:
            return self._trouble(404, str(error))
        except (sqlite3.Error, ValueError) as error:  # a damaged page or step; CodecError is a ValueError
            return self._trouble(500, f"{self._path.name} cannot be read here: {error}")
        except OSError as error:
            return self._trouble(500, f"{error.filename or 'a file of this run'} cannot be read: {error.strerror}")

    def _find(self, path: str) -> Callable[[Mapping[str, str]], Reply]:
        kind, _, name = path.removeprefix("/").partition("/")
        match kind:
            case "" | "pulse" if not name:
                return self._episodes if not kind else self._pulse
            case "episode":
                return lambda query: self._episode(name, query)
            case "group":
                return lambda query: self._group(name)
            case "image":
                return lambda query: self._image(name, query)
            case _ if kind in _FILES and not name:
                return lambda query: self._file(kind)
        raise NoSuchPage(f"nothing is at {path}")

    @contextmanager
    def _store(self) -> Iterator[sqlite3.Connection]:
        """A reader that sees one moment of the store."""
        with closing(schema.open_reader(self._path)) as connection:
            connection.execute("BEGIN")
            yield connection

    # The pages.

    def _episodes(self, query: Mapping[str, str]) -> Reply:
        filters = _filters(query)
        before = _number(query, "before")
        with self._store() as connection:
            listing = browse.find(connection, filters, self._success_above, before, PAGE_EPISODES)
            choices = browse.choices(connection)
            newest = browse.newest_ending(connection)
        return self._page(
            "episodes.html.j2",
            title=self._config.name,
            filters=filters,
            episodes=[pages.episode_view(record, self._success_above) for record in listing.episodes],
            num_matching=listing.num_matching,
            fields=pages.filter_fields(filters, choices),
            is_filtered=filters != browse.Filters(),
            is_first=before is None,
            older=None if listing.next_before is None else pages.list_url(filters, listing.next_before),
            newest=newest,
        )

    def _episode(self, name: str, query: Mapping[str, str]) -> Reply:
        number = _number(query, "step")
        with self._store() as connection:
            record = browse.episode(connection, name)
            if record is None:
                raise NoSuchPage(f"this run has no episode {name}")
            steps = browse.steps(connection, record.rollout)
            group = browse.group(connection, record.group_id)
        assert group is not None
        frames = pages.frames_of(steps, record, self._size)
        if number is None:
            number = 1
        if frames and not 1 <= number <= len(frames):
            raise NoSuchPage(f"{name} has {len(steps)} steps, and no step {number}")
        step = steps[number - 1] if number <= len(steps) else None
        scores = self._scores(group)
        members = [self._view(member, scores) for member in group.members]
        own = scores.get(name)
        learnt = None if own is None or step is None else tokens.scores_of_step(steps, number - 1, own)
        return self._page(
            "episode.html.j2",
            title=f"{name} · {self._config.name}",
            episode=self._view(record, scores),
            group=group,
            members=members,
            frames=frames,
            number=number,
            frame=frames[number - 1] if frames else None,
            step=step,
            tokens=tokens.token_views(step, self._text_of, learnt) if step is not None else [],
            has_scores=learnt is not None,
            has_texts=self._text_of is not None,
        )

    def _group(self, name: str) -> Reply:
        with self._store() as connection:
            group = browse.group(connection, name)
            if group is None:
                raise NoSuchPage(f"this run has no group {name}")
            scores = self._scores(group)
            members = [self._member(connection, record, group, scores) for record in group.members]
            candidate = None if group.candidate is None else self._member(connection, group.candidate, group, scores)
        return self._page(
            "group.html.j2", title=f"{name} · {self._config.name}", group=group, members=members, candidate=candidate
        )

    def _scores(self, group: browse.GroupRecord) -> Mapping[str, EpisodeScores]:
        """What the learner made of a group's episodes, where that is kept."""
        return read_scores(self._folder, group.batch_id).get(group.group_id, {}) if group.batch_id is not None else {}

    def _view(self, record: browse.EpisodeRecord, scores: Mapping[str, EpisodeScores]) -> pages.EpisodeView:
        own = scores.get(record.episode_id)
        return pages.episode_view(record, self._success_above, None if own is None else own.advantage)

    def _member(
        self,
        connection: sqlite3.Connection,
        record: browse.EpisodeRecord,
        group: browse.GroupRecord,
        scores: Mapping[str, EpisodeScores],
    ) -> pages.MemberView:
        steps = browse.steps(connection, record.rollout)
        return pages.MemberView(
            self._view(record, scores),
            pages.frames_of(steps, record, self._size),
            pages.standing_of(record, group),
        )

    def _image(self, name: str, query: Mapping[str, str]) -> Reply:
        width = _number(query, "width")
        if width is not None and width not in THUMBNAIL_WIDTHS:
            raise NoSuchPage(f"screenshots come in widths {THUMBNAIL_WIDTHS}, or as they are")
        try:
            with closing(schema.open_reader(self._path)) as connection:
                (data,) = images.read(connection, self._segments, [images.parse_hash(name)], 1)
        except Refused as refusal:
            raise NoSuchPage(str(refusal)) from refusal
        if image_hash(data) != name:
            return self._trouble(500, f"this screenshot is damaged on disk; {RESTORE}")
        if width is not None:
            return Reply(200, "image/jpeg", _thumbnail(data, width), is_immutable=True)
        return Reply(200, "image/png", data, is_immutable=True)

    def _pulse(self, query: Mapping[str, str]) -> Reply:
        with self._store() as connection:
            return Reply(200, "text/plain", str(browse.newest_ending(connection)).encode())

    def _file(self, name: str) -> Reply:
        assert self._templates.loader is not None
        source = self._templates.loader.get_source(self._templates, "report.css" if name == "style.css" else name)[0]
        return Reply(200, _FILES[name], source.encode())

    def _page(self, template: str, **values: Any) -> Reply:
        html = self._templates.get_template(template).render(
            run=self._config.name, size=self._size, urls=pages, **values
        )
        return Reply(200, "text/html", html.encode("utf-8", errors="replace"))

    def _trouble(self, status: int, message: str) -> Reply:
        reply = self._page("trouble.html.j2", title=self._config.name, message=message)
        return Reply(status, reply.content_type, reply.body)


def refuse_unreadable(path: Path, segments: SegmentReader) -> None:
    """Raise UserError unless there is a whole store at `path` whose pages this version can show."""
    if not path.is_file():
        mend = "wait until the run's replay service has started, or restore it from a copy"
        raise UserError(f"{path}: no such file", mend)
    try:
        with closing(schema.open_reader(path)) as connection:
            schema.refuse_foreign(connection, path)
            browse.find(connection, browse.Filters(), 0.0, None, PAGE_EPISODES)
            images.refuse_lost(connection, segments)
    except sqlite3.Error as error:
        raise UserError(
            f"{path} cannot be read: {error}", "restore the file from a copy; deskrl report RUN checks it whole"
        ) from error


def _filters(query: Mapping[str, str]) -> browse.Filters:
    outcome = query.get("outcome", "")
    if outcome not in ("", *browse.OUTCOMES):
        raise NoSuchPage(f"an episode's outcome is one of {', '.join(browse.OUTCOMES)}, not {outcome}")
    return browse.Filters(
        task=query.get("task", ""),
        queue=query.get("queue", ""),
        outcome=outcome,
        termination=_number(query, "termination"),
        fault=_number(query, "fault"),
        version=_number(query, "version"),
    )


def _number(query: Mapping[str, str], name: str) -> int | None:
    """A number in an address; None where it is left out or empty."""
    text = query.get(name, "")
    if not text:
        return None
    if not text.isascii() or not text.isdecimal() or int(text) > _MAX_SQLITE_INTEGER:
        raise NoSuchPage(f"{name} is a number, not {text[:40]}")
    return int(text)


def _thumbnail(data: bytes, width: int) -> bytes:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG", "JPEG"]) as picture:
            picture.thumbnail((width, width * 4))
            buffer = io.BytesIO()
            picture.convert("RGB").save(buffer, "JPEG", quality=82)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise NoSuchPage("what was stored as this screenshot is no picture") from error
    return buffer.getvalue()


def _templates() -> Environment:
    templates = Environment(
        # The marks of actions, and the looks, are the report's.
        loader=ChoiceLoader([PackageLoader("deskrl.replay.viewer"), PackageLoader("deskrl.core.report")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"span": span_text, "ago": pages.ago_text}
    return templates
