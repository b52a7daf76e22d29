"""Placeholder files: what a download leaves instead of a file's content."""

from __future__ import annotations

from pathlib import Path

from deskrl.core.errors import UserError

COPY_HINT = "copy the file from the original model again"

_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = b"/annex/objects/"
_PAGES = (b"<!doctype", b"<html")


def check_not_placeholder(path: Path) -> None:
    """Raise UserError if a file holds a pointer or an error page instead of its content, or is a broken link."""
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to the missing file {path.readlink()}", COPY_HINT)
    try:
        with open(path, "rb") as file:
            start = file.read(256)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", COPY_HINT) from error
    if start.startswith(_LFS):
        raise UserError(f"{path}: a Git LFS pointer, not the file itself", f"run `git lfs pull` in {path.parent}")
    if _ANNEX in start[:64]:
        raise UserError(f"{path}: a git-annex pointer, not the file itself", f"run `git annex get` in {path.parent}")
    if start.lstrip().lower().startswith(_PAGES):
        raise UserError(f"{path}: a web page, not the file itself", "download it again, possibly after logging in")
