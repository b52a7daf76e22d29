"""Key names: one table of the spellings of keys, and the X11 key symbols of names and characters.

The action parser reads key names with this table, and input devices press them, so that every key that the parser
accepts can be pressed. Only the functions that return key symbols need python-xlib.
"""

from __future__ import annotations

from functools import cache

_KEYS: dict[str, tuple[str, str]] = {
    "ctrl": ("Control_L", "control ctl ctrlleft leftctrl controlleft leftcontrol controlkey ctrlkey"),
    "ctrlright": ("Control_R", "rightctrl controlright rightcontrol controlr ctrlr"),
    "shift": ("Shift_L", "shiftleft leftshift shiftl shiftkey"),
    "shiftright": ("Shift_R", "rightshift shiftr"),
    "alt": ("Alt_L", "option opt altleft leftalt altl altkey"),
    "altright": ("Alt_R", "rightalt altr optionright"),
    "super": (
        "Super_L",
        "win windows winleft leftwin windowskey winkey windowskeyleft cmd command commandkey meta superl superleft "
        "leftsuper metaleft leftmeta leftcmd cmdleft lwin os",
    ),
    "superright": ("Super_R", "winright rightwin superr rightsuper metaright rightmeta rightcmd cmdright rwin"),
    "enter": ("Return", "return enterkey returnkey newline"),
    "tab": ("Tab", "tabulator tabkey"),
    "esc": ("Escape", "escape esckey escapekey"),
    "space": ("space", "spacebar spacekey blank"),
    "backspace": ("BackSpace", "bksp bkspc bs backspacekey"),
    "delete": ("Delete", "del deletekey delkey forwarddelete"),
    "insert": ("Insert", "ins insertkey"),
    "home": ("Home", "homekey"),
    "end": ("End", "endkey"),
    "pageup": ("Page_Up", "pgup pageu prior pgupkey pageupkey"),
    "pagedown": ("Page_Down", "pgdn pgdown paged next pgdnkey pagedn pagedownkey"),
    "left": ("Left", "arrowleft leftarrow leftkey leftarrowkey"),
    "right": ("Right", "arrowright rightarrow rightkey rightarrowkey"),
    "up": ("Up", "arrowup uparrow upkey uparrowkey"),
    "down": ("Down", "arrowdown downarrow downkey downarrowkey"),
    "capslock": ("Caps_Lock", "caps capslk"),
    "numlock": ("Num_Lock", "numlk"),
    "scrolllock": ("Scroll_Lock", "scrlk scrolllk"),
    "print": ("Print", "printscreen prtsc prtscr prtscn prntscrn prtscrn printscrn sysrq snapshot"),
    "pause": ("Pause", "break pausebreak"),
    "menu": ("Menu", "apps contextmenu application"),
    "help": ("Help", ""),
    "add": ("KP_Add", "kpadd numpadadd numadd kpplus"),
    "subtract": ("KP_Subtract", "kpsubtract numpadsubtract numsub kpminus"),
    "multiply": ("KP_Multiply", "kpmultiply numpadmultiply"),
    "divide": ("KP_Divide", "kpdivide numpaddivide"),
    "decimal": ("KP_Decimal", "kpdecimal numpaddecimal"),
    "kp_enter": ("KP_Enter", "kpenter numpadenter enterkp"),
    **{f"f{number}": (f"F{number}", "") for number in range(1, 25)},
    **{f"num{digit}": (f"KP_{digit}", f"kp{digit} numpad{digit}") for digit in range(10)},
    "+": ("plus", "plus plussign"),
    "-": ("minus", "minus hyphen dash"),
    "_": ("underscore", "underscore"),
    "=": ("equal", "equal equals equalsign"),
    ",": ("comma", "comma"),
    ".": ("period", "period dot fullstop"),
    "/": ("slash", "slash forwardslash"),
    "\\": ("backslash", "backslash"),
    ";": ("semicolon", "semicolon"),
    ":": ("colon", "colon"),
    "'": ("apostrophe", "apostrophe quote singlequote"),
    '"': ("quotedbl", "quotedbl doublequote"),
    "`": ("grave", "grave backtick backquote"),
    "~": ("asciitilde", "tilde asciitilde"),
    "[": ("bracketleft", "bracketleft leftbracket openbracket"),
    "]": ("bracketright", "bracketright rightbracket closebracket"),
    "*": ("asterisk", "asterisk star"),
    "#": ("numbersign", "numbersign hash"),
    "@": ("at", "at"),
    "&": ("ampersand", "ampersand"),
    "?": ("question", "question questionmark"),
    "!": ("exclam", "exclam exclamation exclamationmark"),
}
"""X11 name of each named key, and its other spellings in lower case without spaces, underscores and hyphens."""

NAMED_KEYS = tuple(_KEYS)
"""Names of all keys other than letters and digits."""

_KEY_OF_SPELLING = {
    spelling: key
    for key, (x11_name, spellings) in _KEYS.items()
    for spelling in (key.replace("_", "") or key, x11_name.lower().replace("_", ""), *spellings.split())
}
_KEY_OF_SPELLING["_"] = "_"
_SEPARATORS = str.maketrans("", "", "_- ")

_CONTROL_CHARACTERS = {"\n": "Return", "\r": "Return", "\t": "Tab", "\b": "BackSpace"}
_UNICODE_KEYSYM = 0x01000000


def key_name(spelling: str) -> str | None:
    """Return the name of a key; None if the spelling is unknown.

    Args:
        spelling: a printable character, or the name of a key in any case, with or without spaces, underscores and
            hyphens.
    """
    plain = spelling.lower()
    if len(plain) == 1:
        return plain if plain.isprintable() and plain != " " else None
    return _KEY_OF_SPELLING.get(plain.translate(_SEPARATORS))


def keysym_of_character(character: str) -> int | None:
    """Return the key symbol that types `character`; None for control characters without a key."""
    if character in _CONTROL_CHARACTERS:
        return _keysyms()[_CONTROL_CHARACTERS[character].lower()]
    code = ord(character)
    if 0x20 <= code <= 0x7E or 0xA0 <= code <= 0xFF:
        return code
    return _UNICODE_KEYSYM | code if code >= 0x100 else None


def keysym_of_name(name: str) -> int | None:
    """Return the key symbol of a key name; None if it is unknown.

    Args:
        name: one character, an X11 name in any case, or a spelling that `key_name` accepts.
    """
    if len(name) == 1:
        return keysym_of_character(name)
    lower = name.strip().lower()
    key = key_name(lower)
    return _keysyms().get(lower if key is None else _KEYS[key][0].lower())


@cache
def _keysyms() -> dict[str, int]:
    """Return the key symbols by their X11 names in lower case; capitalised spellings win."""
    from Xlib import XK

    return {
        name[3:].lower(): value
        for name, value in sorted(vars(XK).items(), reverse=True)
        if name.startswith("XK_") and len(name) > 4
    }
