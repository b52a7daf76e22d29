"""ARPO's configurations: its YAML files and dotted overrides, as configurations of a run of deskrl.

`keys` is the table of its keys, `translate` carries values over, `load` makes the run's configuration.
"""

from deskrl.core.arpo.load import load_arpo
from deskrl.core.arpo.translate import Note

__all__ = ["Note", "load_arpo"]
