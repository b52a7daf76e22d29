"""Translation of ARPO's YAML configurations and dotted overrides into run configurations of deskrl."""

from deskrl.launch.arpo.load import load_arpo
from deskrl.launch.arpo.translate import Note

__all__ = ["Note", "load_arpo"]
