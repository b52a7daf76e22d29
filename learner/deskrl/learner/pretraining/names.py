"""Names of screen elements: random words as tensors of character codes, one tenth of which is held out.

A name is held out if a hash of its first three letters, in lower case, is 0. Training never draws such a name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
CHARACTERS = LETTERS + LETTERS.upper() + "0123456789 "
"""Characters of names; the code of a character is its index plus 1, and 0 is padding."""
SPACE = len(CHARACTERS)
NUM_CLASSES = SPACE
"""Classes of the dense reading targets: 0 for no visible character, otherwise the code of the character."""
MIN_LENGTH = 3
MAX_LENGTH = 12
_FIRST_DIGIT = 2 * len(LETTERS) + 1
_HASH_MODULUS = 10
_HASH_FACTORS = (7, 3, 9)  # coprime to the modulus, so that the first letter alone can select either side
_INVERSE_OF_FIRST = 3  # 7 * 3 = 1 modulo 10


@dataclass(frozen=True)
class NameStyle:
    """Distribution of names."""

    min_length: int = MIN_LENGTH
    max_length: int = MAX_LENGTH
    space_rate: float = 0.25
    """Probability that a name of at least seven characters consists of two words."""
    digit_rate: float = 0.05
    """Probability that a character after the third is a digit."""
    similar_rate: float = 0.0
    """Probability that a name differs from the first name of its screen in one character only."""


def name_text(codes: Tensor) -> str:
    """Return the text of one name (a 1-D tensor of codes)."""
    return "".join(CHARACTERS[code - 1] for code in codes.tolist() if code)


def name_codes(text: str) -> list[int]:
    """Return the codes of a text; raises ValueError for a character that names do not have."""
    return [CHARACTERS.index(character) + 1 for character in text]


def is_held_out(codes: Tensor) -> Tensor:
    """Return whether names (codes in the last dimension) are held out."""
    letters = (codes[..., :MIN_LENGTH] - 1) % len(LETTERS)
    return (letters * torch.tensor(_HASH_FACTORS, device=codes.device)).sum(-1) % _HASH_MODULUS == 0


def draw_names(
    generator: torch.Generator, num_screens: int, num_names: int, style: NameStyle, held_out: bool
) -> Tensor:
    """Draw names.

    Args:
        generator: random generator; its device is that of the result.
        num_screens: number of screens.
        num_names: number of names per screen.
        style: distribution of the names.
        held_out: whether to draw held-out names only, or never one.

    Returns:
        Codes with shape (num_screens, num_names, MAX_LENGTH), padded with 0.
    """
    shape = (num_screens, num_names)
    device = generator.device
    letters = torch.randint(0, 26, (*shape, MAX_LENGTH), generator=generator, device=device)
    similar = torch.rand(shape, generator=generator, device=device) < style.similar_rate
    letters = torch.where(similar[..., None], _change_one_letter(generator, letters[:, :1].expand_as(letters)), letters)
    letters[..., 0] = _choose_side(generator, letters, held_out)
    codes = letters + 1 + 26 * _capitals(generator, shape)
    codes = _insert_digits(generator, codes, style.digit_rate)
    length = torch.randint(style.min_length, style.max_length + 1, shape, generator=generator, device=device)
    length = torch.where(similar, length[:, :1].expand_as(length), length)[..., None]
    position = torch.arange(MAX_LENGTH, device=device)
    has_space = torch.rand((*shape, 1), generator=generator, device=device) < style.space_rate
    at_space = (position == length // 2) & has_space & (length >= 7)
    codes = torch.where(at_space, torch.full_like(codes, SPACE), codes)
    return torch.where(position < length, codes, torch.zeros_like(codes))


def _change_one_letter(generator: torch.Generator, letters: Tensor) -> Tensor:
    """Return names with one of the first three letters replaced by another one."""
    place = torch.randint(0, MIN_LENGTH, (*letters.shape[:-1], 1), generator=generator, device=letters.device)
    shift = torch.randint(1, 26, place.shape, generator=generator, device=letters.device)
    here = torch.arange(MAX_LENGTH, device=letters.device) == place
    return torch.where(here, (letters + shift) % 26, letters)


def _choose_side(generator: torch.Generator, letters: Tensor, held_out: bool) -> Tensor:
    """Return first letters with which all names are held out, or none."""
    first = letters[..., 0]
    rest = letters[..., 1] * _HASH_FACTORS[1] + letters[..., 2] * _HASH_FACTORS[2]
    residue = (-rest * _INVERSE_OF_FIRST) % _HASH_MODULUS
    if not held_out:
        return torch.where(first % _HASH_MODULUS == residue, (first + 1) % 26, first)
    tens = torch.randint(0, 3, first.shape, generator=generator, device=first.device)
    chosen = residue + _HASH_MODULUS * tens
    return torch.where(chosen < 26, chosen, residue)


def _capitals(generator: torch.Generator, shape: tuple[int, int]) -> Tensor:
    """Return 1 for each character in upper case: names are in lower case, capitalised, or in upper case."""
    style = torch.rand((*shape, 1), generator=generator, device=generator.device)
    first = torch.arange(MAX_LENGTH, device=generator.device) == 0
    return ((style < 0.2) | ((style < 0.6) & first)).long()


def _insert_digits(generator: torch.Generator, codes: Tensor, rate: float) -> Tensor:
    """Return names with digits after the third character, no two of them adjacent (two would be one token)."""
    position = torch.arange(MAX_LENGTH, device=codes.device)
    drawn = torch.rand(codes.shape, generator=generator, device=codes.device) < rate
    digits = torch.randint(_FIRST_DIGIT, _FIRST_DIGIT + 10, codes.shape, generator=generator, device=codes.device)
    return torch.where(drawn & (position >= MIN_LENGTH) & (position % 2 == 1), digits, codes)
