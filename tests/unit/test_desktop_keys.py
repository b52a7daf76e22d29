"""Names and characters become the key symbols that X11 has for them."""

import pytest

pytest.importorskip("Xlib", reason="python-xlib is not installed: pip install deskrl[actor]")

from Xlib import XK

from deskrl.actor.guest.keys import keysym_of_character, keysym_of_name


@pytest.mark.parametrize(
    ("character", "symbol"),
    [("a", 0x61), ("A", 0x41), ("<", 0x3C), ("ß", 0xDF), ("€", 0x010020AC), ("😀", 0x0101F600), ("\n", XK.XK_Return)],
)
def test_a_character_is_its_latin_1_code_or_its_unicode_key_symbol(character: str, symbol: int) -> None:
    assert keysym_of_character(character) == symbol


def test_a_control_character_that_no_key_enters_has_no_symbol() -> None:
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
    ],
)
def test_keys_are_known_by_their_x11_names_in_any_case_and_by_the_usual_short_ones(name: str, symbol: int) -> None:
    assert keysym_of_name(name) == symbol


def test_an_unknown_name_has_no_symbol() -> None:
    assert keysym_of_name("no such key") is None
