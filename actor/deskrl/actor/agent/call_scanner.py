"""Scanner of the action language: finds the call in a response and splits it into its arguments.

Quotes come before structure: inside quoted text, no parenthesis, label or name of an action has a meaning. Punctuation
may be full-width, quotes may be single, double, typographic or missing, and the last parenthesis may be missing. Every
pattern is matched in time linear in the length of the response.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from deskrl.actor.agent.action_language import FormatError

TEXT_ACTIONS = frozenset(["type", "input", "finished", "finish"])
"""Actions whose unnamed argument is free text."""
TEXT_ARGUMENTS = frozenset(["content", "text"])
"""Arguments that are free text."""

_ACTION_NAMES = (
    "click|left_single|left_click|left_double|double_click|right_single|right_click|middle_click|hover|mouse_move|drag|"
    "left_click_drag|select|scroll|swipe|hotkey|press|keydown|keyup|release|type|input|wait|finished|finish|call_user|"
    "error_env|long_press|open_app|press_home|press_back|navigate"
)
_OPEN, _CLOSE = r"[(（]", r"[)）]"
_CALL_HEAD = rf"(?:\w{{1,40}}\.)?([a-z]\w{{0,40}})\s*+{_OPEN}"
_LABEL = r"action\s{0,3}\*{0,2}\s{0,3}[:：]"
_AFTER_LABEL = rf"[\s*`>]*+(?>(?:{_LABEL}[\s*`>]*+)?)(?>(?:(?<=`)[a-z]{{1,10}}\n\s*+)?)"

_LABELLED = re.compile(rf"(?<![a-z_]){_LABEL}{_AFTER_LABEL}(?={_CALL_HEAD})", re.IGNORECASE)
_LABELLED_LINE = re.compile(rf"^[^\w\n]{{0,10}}{_LABEL}{_AFTER_LABEL}(?={_CALL_HEAD})", re.IGNORECASE | re.MULTILINE)
_UNLABELLED_LINE = re.compile(
    rf"^[^\w\n]{{0,10}}(?=(?:\w{{1,40}}\.)?(?:{_ACTION_NAMES})\s*+{_OPEN})", re.IGNORECASE | re.MULTILINE
)
_ANY_LABEL = re.compile(rf"(?<![a-z_]){_LABEL}", re.IGNORECASE)
_ADJACENT = re.compile(rf"[\s,，;；、`|&]*+(?:and\s|then\s)?(?:{_ACTION_NAMES})\s*+{_OPEN}", re.IGNORECASE)
_HEAD = re.compile(rf"\s*+{_CALL_HEAD}", re.IGNORECASE)
_SEPARATORS = re.compile(r"[\s,，;；、]*+")
_KEY = re.compile(r"([a-z]\w{0,40})\s*+[=＝:：]\s*+", re.IGNORECASE)
_ARGUMENT_NAMES = "start_box|end_box|start_point|end_point|point|direction|key"
_NEXT_KEY = re.compile(rf"(?<!\w)(?:{_ARGUMENT_NAMES})\s*+[=＝]", re.IGNORECASE)
_NEXT_ARGUMENT = re.compile(rf"\s*+(?:[,，]\s*+[a-z_]\w{{0,40}}|(?:{_ARGUMENT_NAMES}))\s*+[=＝]", re.IGNORECASE)
_MARKUP = r"<[|/]{0,2}\w{1,20}\|?>"
_BARE_VALUE = re.compile(
    rf"(?>(?:{_MARKUP}[^<>\n]*+{_MARKUP}|[^\s,，;；、'\"()（）\[\]{{}}【】<>=]++|"
    r"[(（\[{【](?>(?:[^()（）\[\]{}【】]|[(（\[][^()（）\[\]{}]*+[)）\]])*)[)）\]}】])+)"
)
_END_OF_CALL = re.compile(
    rf"\s*+(?:[,，]?+\s*+{_CLOSE}[^\S\n]*+(?:$|#|`|<|\[EOS|//|[.。;；,，]\s*+$|{_ADJACENT.pattern})|\Z)",
    re.IGNORECASE | re.MULTILINE,
)
_CLOSED = re.compile(rf"\s*+[,，]?+\s*+{_CLOSE}")
_QUOTE_FAMILIES = ("'‘’＇", '"“”＂')
_QUOTED_VALUES = {family: re.compile(rf"(?>(?:\\.|[^{family}\\])*)", re.DOTALL) for family in _QUOTE_FAMILIES}
_CLOSING_QUOTES = dict(zip("'\"‘“’”＇＂", "'\"’”’”＇＂", strict=True))
_UNESCAPED = {quote: re.compile(rf"\\.|({closing})", re.DOTALL) for quote, closing in _CLOSING_QUOTES.items()}
_BADLY_CLOSED = {
    quote: re.compile(rf"[{family}](?={_END_OF_CALL.pattern})", _END_OF_CALL.flags)
    for family in _QUOTE_FAMILIES
    for quote in family
}
_TRIPLE_QUOTES = ("'''", '"""')


@dataclass(frozen=True)
class Call:
    """Call of an action as written."""

    name: str
    """Name in lower case, without the name of a module."""
    arguments: dict[str, str]
    """Arguments without their quotes and still escaped, by name; unnamed ones under the empty name, space-separated."""
    end: int
    """Position after the call."""


def find_call(text: str) -> tuple[int, int]:
    """Return the position of the label of a response's first call, and the position of the call.

    A label at the start of a line is preferred to one in the middle of a thought, unless it is part of typed text. A
    call without a label is found at the start of a line.

    Raises:
        FormatError: the response contains no call.
    """
    line, anywhere = _LABELLED_LINE.search(text), _LABELLED.search(text)
    if anywhere is not None:
        if line is None or (anywhere.start() < line.start() and _covers(text, anywhere.end(), line.end())):
            return anywhere.start(), anywhere.end()
        return line.start(), line.end()
    unlabelled = _UNLABELLED_LINE.search(text)
    if unlabelled is not None:
        return unlabelled.start(), unlabelled.end()
    label = _ANY_LABEL.search(text)
    if label is None:
        raise FormatError('the response contains no "Action:"')
    raise FormatError(f"{shorten(text[label.end() : label.end() + 200])} is not of the form name(argument='value')")


def scan_call(text: str, position: int = 0) -> Call:
    """Split the call at a position of a text into its arguments; raises FormatError if it is malformed."""
    head = _HEAD.match(text, position)
    if head is None:
        raise FormatError(f"{shorten(text[position : position + 200])} is not of the form name(argument='value')")
    name, position, last_key = head[1].lower(), head.end(), ""
    arguments: dict[str, list[str]] = {}
    while True:
        position = _end(_SEPARATORS, text, position)
        if position == len(text) or text[position] in ")）":
            joined = {key: " ".join(values) for key, values in arguments.items()}
            return Call(name, joined, min(position + 1, len(text)))
        key_match = _KEY.match(text, position)
        if key_match is not None:
            last_key, position = key_match[1].lower(), key_match.end()
            if last_key in arguments:
                raise FormatError(f"{name}: {last_key} is given twice")
        if last_key in TEXT_ARGUMENTS or (not last_key and name in TEXT_ACTIONS):
            value, position = _scan_text(text, position, name)
        else:
            value, position = _scan_value(text, position)
        arguments.setdefault(last_key, []).append(value)


def has_another_call(text: str, position: int) -> bool:
    """Return whether another call follows a position: right after it, after a label, or at the start of a line."""
    if _ADJACENT.match(text, position):
        return True
    return any(pattern.search(text, position) for pattern in (_LABELLED_LINE, _UNLABELLED_LINE))


def shorten(text: str) -> str:
    """Return at most 40 characters of a text on one line, quoted, for an error message."""
    line = " ".join(text[:1000].split())
    return repr(line if len(line) <= 40 else line[:39] + "…")


def _covers(text: str, start: int, position: int) -> bool:
    """Return whether a well-formed call begins at `start` and contains a position."""
    try:
        return scan_call(text, start).end > position
    except FormatError:
        return False


def _scan_value(text: str, position: int) -> tuple[str, int]:
    """Return a value that is not free text, such as a point or the name of a key, and the position after it."""
    quote = text[position : position + 1]
    for family in _QUOTE_FAMILIES:
        if quote and quote in family:
            return _scan_quoted_value(text, position, family)
    value = _BARE_VALUE.match(text, position)
    if value is None:
        raise FormatError(f"{shorten(text[position : position + 200])} is not an argument of the form name='value'")
    return value[0], value.end()


def _scan_quoted_value(text: str, position: int, family: str) -> tuple[str, int]:
    """Return a quoted value. It ends at the next quote of the family, or where its missing quote belongs."""
    start = position + (3 if text[position : position + 3] in _TRIPLE_QUOTES else 1)
    end = _end(_QUOTED_VALUES[family], text, start)
    next_key = _NEXT_KEY.search(text, start, end)
    if next_key is not None:
        return text[start : next_key.start()].rstrip(" \t\r\n,，;；'\""), next_key.start()
    if end == len(text):
        return _scan_unclosed_value(text, start)
    is_triple = start - position == 3 and text[end : end + 3] in _TRIPLE_QUOTES
    return text[start:end], end + (3 if is_triple else 1)


def _scan_unclosed_value(text: str, start: int) -> tuple[str, int]:
    """Return a value without its closing quote: the rest of the line up to the parenthesis that closes the call."""
    line_end = text.find("\n", start)
    written = text[start : len(text) if line_end < 0 else line_end].rstrip()
    num_open, num_closed = (sum(map(written.count, characters)) for characters in ("(（", ")）"))
    if num_closed > num_open and written.endswith((")", "）")):
        written = written[:-1]
    return written.rstrip("'\"’”"), start + len(written)


def _scan_text(text: str, position: int, name: str) -> tuple[str, int]:
    """Return free text and the position after it, before the closing parenthesis.

    Text may contain its own quote unescaped, as models write it. It ends at its last unescaped quote that ends the
    call, but before another argument or action that follows such a quote.
    """
    quote = text[position : position + 1]
    if not quote or quote not in _UNESCAPED:
        return _scan_unquoted_text(text, position)
    is_triple = quote * 3 in _TRIPLE_QUOTES and text.startswith(quote * 3, position)
    width = 3 if is_triple and text.find(quote * 3, position + 3) >= 0 else 1
    start, limit = position + width, len(text)
    end = end_before_prose = -1
    for match in _UNESCAPED[quote].finditer(text, start):
        if match.start() >= limit:
            break
        if match[1] is None:
            continue
        if end_before_prose < 0:
            if _NEXT_ARGUMENT.match(text, match.end()):
                return text[start : match.start()], match.end()
            if _CLOSED.match(text, match.end()):
                limit = _start_of_next_call(text, match.end())
        if _CLOSED.match(text, match.end()):
            end_before_prose = match.start()
        if _END_OF_CALL.match(text, match.end()):
            end = match.start()
    end = end if end >= 0 else end_before_prose
    if end < 0:
        return _scan_badly_closed_text(text, start, quote, name)
    return text[start : end - width + 1], end + 1


def _scan_unquoted_text(text: str, position: int) -> tuple[str, int]:
    """Return text without quotes: up to the last parenthesis of its line."""
    line_end = text.find("\n", position)
    line = text[position : len(text) if line_end < 0 else line_end]
    end = max(line.rfind(")"), line.rfind("）"))
    value = line if end < 0 else line[:end]
    return value.strip(), position + len(value)


def _scan_badly_closed_text(text: str, start: int, quote: str, name: str) -> tuple[str, int]:
    """Return text that ends with an escaped quote, as in a path that ends with a backslash, or with another quote."""
    match = _BADLY_CLOSED[quote].search(text, start)
    if match is None:
        raise FormatError(f"{name}: the quoted text {shorten(text[start : start + 200])} is not closed")
    return text[start : match.start()], match.end()


def _start_of_next_call(text: str, position: int) -> int:
    """Return where another call or its label begins; the length of the text if none follows."""
    if _ADJACENT.match(text, _end(_CLOSED, text, position)):
        return position
    found = [pattern.search(text, position) for pattern in (_LABELLED_LINE, _UNLABELLED_LINE)]
    return min((match.start() for match in found if match is not None), default=len(text))


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return position if match is None else match.end()
