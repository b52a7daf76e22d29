"""Tasks of MiniWoB++: unpacks the html files of the package `miniwob` and writes task files and lists of its pages.

    DIR/html/                              html files and licence of the package
    DIR/examples/miniwob/<page>.json       tasks whose pages have seeds of the split `train`
    DIR/examples/miniwob/<page>-heldout.json
    DIR/train.json, DIR/heldout.json       task lists

A task names a page and a split. Which seed of the split an episode has follows from its group (`page_run.page_seed`),
so that every training group has another layout, and all its episodes have the same one.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from deskrl.actor.miniwob.page_files import PAGES_FOLDER
from deskrl.actor.miniwob.page_run import SPLITS
from deskrl.actor.miniwob.unplayable_pages import UNPLAYABLE_PAGES
from deskrl.core.errors import UserError
from deskrl.core.file_io import write_json

DOMAIN = "miniwob"
"""Application of all tasks in the task lists."""
_HTML_PREFIX = "miniwob/html/"
_HTML_FOLDERS = ("common", "core", PAGES_FOLDER)
_DOWNLOAD_HINT = "pip download --no-deps miniwob==1.1.0, and give the wheel by --package miniwob-1.1.0-py3-none-any.whl"


def main(out: Path, package: Path | None = None, pages: Sequence[str] = ()) -> int:
    """Write the tasks and print which pages have none; returns the exit status 0.

    Args:
        out: directory to write to.
        package: wheel of the package; None: the installed package.
        pages: names of the pages; empty: all that can be played.

    Raises:
        UserError: the package is not found or has other content, a page is unknown, or a file cannot be written.
    """
    files = package_files(package)
    known = sorted(PurePosixPath(name).stem for name in files if PurePosixPath(name).parts[0] == PAGES_FOLDER)
    if unknown := sorted(set(pages) - set(known)):
        close = difflib.get_close_matches(unknown[0], known) or known[:4]
        hint = f"similar names: {', '.join(close)}; without --pages, all playable pages are used"
        raise UserError(f"MiniWoB++ has no page {', '.join(unknown)}", hint)
    left_out = {} if pages else {page: UNPLAYABLE_PAGES[page] for page in known if page in UNPLAYABLE_PAGES}
    chosen = list(dict.fromkeys(pages)) or [page for page in known if page not in left_out]
    try:
        _write_html(out / "html", files)
        _write_tasks(out, chosen)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{out}: cannot be written: {reason}", "give another directory by --out") from error
    print(f"{len(chosen)} pages in {out}: task lists {', '.join(f'{split}.json' for split in SPLITS)}")
    for page, reason in left_out.items():
        print(f"left out: {page}: {reason}")
    return 0


def package_files(package: Path | None) -> dict[str, bytes]:
    """Return the html files of the package by their paths in its folder `html`, and its licence as `LICENSE`.

    Args:
        package: wheel of the package; None: the installed package, which is not imported.

    Raises:
        UserError: the package is not found, or has no html files.
    """
    found = dict(_wheel_files(package) if package is not None else _installed_files())
    pages = [name for name in found if name.startswith(f"{PAGES_FOLDER}/")]
    if not pages or "core/core.js" not in found:
        raise UserError(f"{package or 'the installed package miniwob'}: contains no pages of MiniWoB++", _DOWNLOAD_HINT)
    return found


def task_record(page: str, split: str, html: Path) -> dict[str, Any]:
    """Return the task file of a page.

    Args:
        page: name of the page.
        split: set of seeds.
        html: folder of the html files on the machines of the actors.
    """
    return {
        "id": task_id(page, split),
        "snapshot": "chromium",
        "instruction": f"Do what the page {page} asks for.",
        "source": "MiniWoB++",
        "related_apps": ["chromium"],
        "config": [{"type": "miniwob", "parameters": {"html": str(html), "page": page, "split": split}}],
        "evaluator": {"func": "miniwob_reward", "result": {"type": "miniwob_end"}},
    }


def task_id(page: str, split: str) -> str:
    """Return the id of a page's task: the name of the page, with the split unless it is `train`."""
    return page if split == SPLITS[0] else f"{page}-{split}"


def _wheel_files(package: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with zipfile.ZipFile(package) as archive:
            for name in archive.namelist():
                if PurePosixPath(name).name == "LICENSE":
                    yield "LICENSE", archive.read(name)
                elif _is_used(name.removeprefix(_HTML_PREFIX)) and name.startswith(_HTML_PREFIX):
                    yield name.removeprefix(_HTML_PREFIX), archive.read(name)
    except (OSError, zipfile.BadZipFile) as error:
        reason = getattr(error, "strerror", None) or "not a wheel"
        raise UserError(f"{package}: cannot be read: {reason}", _DOWNLOAD_HINT) from error


def _installed_files() -> Iterator[tuple[str, bytes]]:
    spec = importlib.util.find_spec("miniwob")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("the package miniwob is not installed", _DOWNLOAD_HINT)
    folder = Path(spec.submodule_search_locations[0])
    for licence in sorted(folder.parent.glob("miniwob-*.dist-info/**/LICENSE")):
        yield "LICENSE", licence.read_bytes()
    for file in (folder / "html").rglob("*"):
        name = file.relative_to(folder / "html").as_posix()
        if _is_used(name) and file.is_file():
            yield name, file.read_bytes()


def _is_used(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return len(parts) > 1 and parts[0] in _HTML_FOLDERS and ".." not in parts and not name.endswith("/")


def _write_html(folder: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def _write_tasks(out: Path, pages: Sequence[str]) -> None:
    html = (out / "html").resolve()
    folder = out / "examples" / DOMAIN
    folder.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        for page in pages:
            record = task_record(page, split, html)
            text = json.dumps(record, indent=2) + "\n"
            (folder / f"{record['id']}.json").write_text(text, encoding="utf-8")
        write_json(out / f"{split}.json", {DOMAIN: [task_id(page, split) for page in pages]})
