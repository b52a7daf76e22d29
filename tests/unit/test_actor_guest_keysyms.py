"""Key names and characters map to the X11 key symbols."""

import pytest

pytest.importorskip("Xlib", reason="python-xlib is not installed: pip install deskrl[actor]")

from Xlib import XK

from deskrl.actor.guest.keysyms import key_name, keysym_of_character, keysym_of_name


@pytest.mark.parametrize(
    ("character", "symbol"),
    [("a", 0x61), ("A", 0x41), ("<", 0x3C), ("ß", 0xDF), ("€", 0x010020AC), ("😀", 0x0101F600), ("\n", XK.XK_Return)],
)
def test_a_character_maps_to_its_latin_1_code_or_its_unicode_key_symbol(character: str, symbol: int) -> None:
    assert keysym_of_character(character) == symbol


def test_a_control_character_without_a_key_has_no_key_symbol() -> None:
    assert keysym_of_character("\x07") is None


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("ctrl", XK.XK_Control_L),
        ("enter", XK.XK_Return),
        ("return", XK.XK_Return),
        ("page_down", XK.XK_Page_Down),
        ("pgdn", XK.XK_Page_Down),
        ("f5", XK.XK_F5),
        ("left", XK.XK_Left),
        ("space", XK.XK_space),
        ("a", XK.XK_a),
        ("+", XK.XK_plus),
        ("Escape", XK.XK_Escape),
        ("windows", XK.XK_Super_L),
        ("NumLock", XK.XK_Num_Lock),
        ("page down", XK.XK_Page_Down),
        ("num5", XK.XK_KP_5),
        ("plus", XK.XK_plus),
        ("ctrlright", XK.XK_Control_R),
        ("kp_enter", XK.XK_KP_Enter),
    ],
)
def test_x11_names_in_any_case_and_common_short_names_are_accepted(name: str, symbol: int) -> None:
    assert keysym_of_name(name) == symbol


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        *(("Control_L", "ctrl"), ("PGDN", "pagedown"), ("page-down", "pagedown"), ("A", "a"), ("ß", "ß"), ("_", "_")),
        *(("minus", "-"), ("Return", "enter"), ("KP_Add", "add"), ("f24", "f24"), ("option", "alt"), ("meta", "super")),
    ],
)
def test_spellings_of_a_key_have_one_name_and_one_key_symbol(spelling: str, name: str) -> None:
    assert key_name(spelling) == key_name(name) == name
    assert keysym_of_name(spelling.lower()) == keysym_of_name(name)


@pytest.mark.parametrize("spelling", ["", " ", "\n", "\x07", "bogus", "f25", "volumeup", "--"])
def test_a_spelling_of_no_key_has_no_name(spelling: str) -> None:
    assert key_name(spelling) is None


def test_an_unknown_name_has_no_key_symbol() -> None:
    assert keysym_of_name("no such key") is None
