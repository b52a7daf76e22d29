"""From names and characters to X11 key symbols. Knows no keyboard layout and no connection."""

from __future__ import annotations

from Xlib import XK

_SHORT_NAMES = {
    "ctrl": "Control_L",
    "control": "Control_L",
    "ctrlleft": "Control_L",
    "ctrlright": "Control_R",
    "shift": "Shift_L",
    "shiftleft": "Shift_L",
    "shiftright": "Shift_R",
    "alt": "Alt_L",
    "altleft": "Alt_L",
    "altright": "Alt_R",
    "option": "Alt_L",
    "super": "Super_L",
    "win": "Super_L",
    "winleft": "Super_L",
    "winright": "Super_R",
    "cmd": "Super_L",
    "command": "Super_L",
    "meta": "Super_L",
    "enter": "Return",
    "esc": "Escape",
    "del": "Delete",
    "backspace": "BackSpace",
    "pageup": "Page_Up",
    "pgup": "Page_Up",
    "pagedown": "Page_Down",
    "pgdn": "Page_Down",
    "capslock": "Caps_Lock",
    "numlock": "Num_Lock",
    "printscreen": "Print",
    "prtsc": "Print",
    "spacebar": "space",
    "arrowup": "Up",
    "arrowdown": "Down",
    "arrowleft": "Left",
    "arrowright": "Right",
}
_CONTROL_CHARACTERS = {"\n": XK.XK_Return, "\r": XK.XK_Return, "\t": XK.XK_Tab, "\b": XK.XK_BackSpace}
_UNICODE_KEYSYM = 0x01000000

_by_lower_name = {
    name[3:].lower(): value
    for name, value in sorted(vars(XK).items(), reverse=True)  # reverse: of two spellings, the capitalised one wins
    if name.startswith("XK_") and len(name) > 4
}


def keysym_of_character(character: str) -> int | None:
    """The key symbol that enters `character`; None for control characters that no key enters."""
    if character in _CONTROL_CHARACTERS:
        return int(_CONTROL_CHARACTERS[character])
    code = ord(character)
    if 0x20 <= code <= 0x7E or 0xA0 <= code <= 0xFF:
        return code
    return _UNICODE_KEYSYM | code if code >= 0x100 else None


def keysym_of_name(name: str) -> int | None:
    """The key symbol of a key named as in a hotkey: one character, an X11 name in any case, or a usual short name."""
    if len(name) == 1:
        return keysym_of_character(name)
    lower = name.strip().lower()
    return _by_lower_name.get(_SHORT_NAMES.get(lower, lower).lower())
