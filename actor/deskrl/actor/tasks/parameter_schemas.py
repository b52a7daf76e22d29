"""Schemas of the parameters of setup steps and getters: OSWorld's, and those of this project."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from deskrl.actor.miniwob.page_run import SPLITS
from deskrl.actor.task import TypedItem


@dataclass(frozen=True)
class ValueType:
    """Type of a parameter."""

    description: str
    """Noun phrase that completes "must be"."""
    accepts: Callable[[Any], bool]
    """Whether a value has this type."""


@dataclass(frozen=True)
class ItemSchema:
    """Parameters of a type of setup steps or getters. Other parameters are ignored, as by OSWorld."""

    required: Mapping[str, ValueType]
    optional: Mapping[str, ValueType]


def parameter_error(item: TypedItem, schemas: Mapping[str, ItemSchema]) -> tuple[str, str] | None:
    """Return the name of the first parameter that its schema does not allow, and the reason; None if there is none.

    An item of an unknown type has no schema, and therefore no error.
    """
    schema = schemas.get(item.type)
    if schema is None:
        return None
    for name, kind in schema.required.items():
        if name not in item.parameters:
            return name, f"must be {kind.description}, but is missing"
    for name, kind in {**schema.required, **schema.optional}.items():
        if name in item.parameters and not kind.accepts(item.parameters[name]):
            return name, f"must be {kind.description}"
    return _file_error(item)


def _file_error(item: TypedItem) -> tuple[str, str] | None:
    """Check the items of `files`, which have parameters of their own."""
    if item.type not in ("download", "upload_file"):
        return None
    for file in item.parameters["files"]:
        for key, kind in (("path", _TEXT), *((("url", _URL),) if item.type == "download" else ())):
            if not kind.accepts(file.get(key)) or not file[key]:
                return f"files.{key}", f"must be {kind.description}"
        if item.type == "upload_file":
            sources = [key for key in _FILE_SOURCES if key in file]
            if len(sources) != 1:
                return "files", f"must contain exactly one of {', '.join(_FILE_SOURCES)} in each object"
            if not _FILE_SOURCES[sources[0]].accepts(file[sources[0]]):
                return f"files.{sources[0]}", f"must be {_FILE_SOURCES[sources[0]].description}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_url(value: Any) -> bool:
    """Return whether a value is the address of a file: a URL with a host, or the path of a file of this machine."""
    try:
        return isinstance(value, str) and bool(value) and (not urlsplit(value).scheme or bool(urlsplit(value).netloc))
    except ValueError:
        return False


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.lower() in ("true", "false"))


_TEXT = ValueType("a string", lambda value: isinstance(value, str))
_TEXTS = ValueType("an array of strings", lambda value: _is_list_of(str, value))
_TEXT_OR_TEXTS = ValueType(
    "a string or an array of strings", lambda value: isinstance(value, str) or _is_list_of(str, value)
)
_COMMAND = ValueType(
    _TEXT_OR_TEXTS.description, lambda value: bool(value) and (isinstance(value, str) or _is_list_of(str, value))
)
_NUMBER = ValueType("a number of at least 0", _is_number)
_INTEGER = ValueType("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
_BOOLEAN = ValueType("a boolean", _is_boolean)
_OBJECT = ValueType("an object", lambda value: isinstance(value, dict))
_URL = ValueType("a string that is a URL", _is_url)
_URLS = ValueType(
    "a string or an array of strings that are URLs",
    lambda value: all(map(_is_url, value)) if isinstance(value, list) else _is_url(value),
)
_OBJECTS = ValueType("an array of objects", lambda value: _is_list_of(dict, value))
_ARRAY = ValueType("an array", lambda value: isinstance(value, list))
_PATHS = ValueType("a string or an array", lambda value: isinstance(value, str | list))
_SPLIT = ValueType(f"one of {', '.join(SPLITS)}", lambda value: value in SPLITS)
_ANY = ValueType("a value", lambda value: True)
_FILE_SOURCES = {"local_path": _TEXT, "content": _TEXT_OR_TEXTS, "base64": _TEXT}


def _schema(*, optional: Mapping[str, ValueType] | None = None, **required: ValueType) -> ItemSchema:
    return ItemSchema(required, optional or {})


_RUN = _schema(
    command=_COMMAND,
    optional={"shell": _BOOLEAN, "stdout": _TEXT, "stderr": _TEXT, "until": _OBJECT},
)
_WINDOW = _schema(window_name=_TEXT, optional={"strict": _BOOLEAN, "by_class": _BOOLEAN})

STEP_SCHEMAS: Mapping[str, ItemSchema] = {
    "act": _schema(action_list=_ARRAY),
    "activate_window": _WINDOW,
    "change_wallpaper": _schema(path=_TEXT),
    "chrome_close_tabs": _schema(urls_to_close=_TEXTS),
    "chrome_open_tabs": _schema(urls_to_open=_TEXTS),
    "close_window": _WINDOW,
    "command": _RUN,
    "download": _schema(files=_OBJECTS),
    "environment": _schema(optional={"parameters": _OBJECT}),
    "execute": _RUN,
    "execute_with_verification": _schema(
        command=_COMMAND,
        optional={"shell": _BOOLEAN, "verification": _OBJECT, "max_wait_time": _NUMBER, "check_interval": _NUMBER},
    ),
    "googledrive": _schema(settings_file=_TEXT, operation=_TEXTS, args=_ARRAY),
    "launch": _schema(command=_COMMAND, optional={"shell": _BOOLEAN}),
    "login": _schema(settings_file=_TEXT, platform=_TEXT),
    "miniwob": _schema(html=_TEXT, page=_TEXT, split=_SPLIT),
    "open": _schema(path=_TEXT),
    "proxy": _schema(optional={"client_password": _TEXT}),
    "replay": _schema(trajectory=_TEXT),
    "setup_script": _schema(command=_TEXTS, timeout_s=_NUMBER),
    "sleep": _schema(seconds=_NUMBER),
    "tidy_desktop": _schema(),
    "update_browse_history": _schema(history=_OBJECTS),
    "upload_file": _schema(files=_OBJECTS),
}
"""Schemas of setup steps, which evaluators may also run as `postconfig`."""

_NO_PARAMETERS = (
    "accessibility_tree",
    "active_tab_info",
    "bookmarks",
    "chrome_appearance_mode_ui",
    "chrome_color_scheme",
    "chrome_font_size",
    "chrome_language",
    "chrome_saved_address",
    "conference_city_in_order",
    "data_delete_automacally",
    "default_search_engine",
    "default_video_player",
    "enable_do_not_track",
    "enable_enhanced_safety_browsing",
    "enable_safe_browsing",
    "enabled_experiments",
    "environment_outcome",
    "find_installed_extension_name",
    "find_unpacked_extension_path",
    "miniwob_end",
    "new_startup_page",
    "number_of_search_results",
    "open_tabs_info",
    "profile_name",
    "shortcuts_on_desktop",
    "vm_screen_size",
    "vm_terminal_output",
)
_READ_COMMAND = _schema(command=_COMMAND, optional={"shell": _BOOLEAN, "session": _BOOLEAN})
_SLIDE = _schema(ppt_file_path=_TEXT, slide_index=_INTEGER, dest=_TEXT)
_URL_PARTS = _schema(parse_keys=_TEXTS, optional={"goto_prefix": _TEXT, "replace": _OBJECT, "split_list": _BOOLEAN})
_COPIES = {"dest": _PATHS, "multi": _BOOLEAN, "gives": _ARRAY}
_TO_FILE = _schema(dest=_TEXT)

GETTER_SCHEMAS: Mapping[str, ItemSchema] = {
    **dict.fromkeys(_NO_PARAMETERS, _schema()),
    "active_tab_html_parse": _schema(category=_TEXT, optional={"goto_prefix": _TEXT}),
    "active_tab_url_parse": _URL_PARTS,
    "active_url_from_accessTree": _schema(optional={"goto_prefix": _TEXT}),
    "audio_in_slide": _SLIDE,
    "background_image_in_slide": _SLIDE,
    "cache_file": _schema(path=_TEXT),
    "check_script": _schema(command=_TEXTS, session=_BOOLEAN, timeout_s=_NUMBER),
    "cloud_file": _schema(path=_URLS, optional=_COPIES),
    "content_from_vm_file": _schema(path=_TEXT, file_type=_TEXT, file_content=_TEXT),
    "cookie_data": _TO_FILE,
    "gimp_config_file": _schema(file_name=_TEXT, dest=_TEXT),
    "googledrive_file": _schema(settings_file=_TEXT, dest=_TEXT_OR_TEXTS),
    "gotoRecreationPage_and_get_html_content": _schema(selector=_TEXT, optional={"class": _TEXT, "order": _TEXT}),
    "history": _TO_FILE,
    "info_from_website": _schema(url=_TEXT, infos=_OBJECTS),
    "list_directory": _schema(path=_TEXT),
    "macys_product_url_parse": _URL_PARTS,
    "page_info": _schema(url=_TEXT),
    "pdf_from_url": _schema(path=_TEXT, dest=_TEXT),
    "replay": _schema(trajectory=_ANY),
    "rule": _schema(rules=_ANY),
    "rule_relativeTime": _schema(rules=_OBJECT),
    "setup_window_image": _schema(executable=_TEXTS, optional={"keys": _TEXTS}),
    "setup_window_title": _schema(executable=_TEXTS, keys=_TEXTS),
    "time_diff_range": _schema(diff_range_in_minutes=_ANY),
    "url_dashPart": _schema(
        partIndex=_INTEGER, needDeleteId=_BOOLEAN, returnType=_TEXT, optional={"goto_prefix": _TEXT, "key": _TEXT}
    ),
    "url_path_parse": _URL_PARTS,
    "vlc_config": _TO_FILE,
    "vlc_playing_info": _TO_FILE,
    "vm_command_error": _READ_COMMAND,
    "vm_command_line": _READ_COMMAND,
    "vm_file": _schema(path=_TEXT_OR_TEXTS, optional=_COPIES),
    "vm_wallpaper": _TO_FILE,
    "vm_window_size": _schema(app_class_name=_TEXT),
    "vscode_config": _schema(path=_TEXT, dest=_TEXT, vscode_extension_command=_TEXT),
}
"""Schemas of getters."""
