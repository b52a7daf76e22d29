"""`deskrl doctor [CONFIG]`: what of this machine, and of a run's other machines as seen from it, would not work.

`findings` is what a check comes to, `machine` looks at this machine, `network` at the others, `examine` puts the checks
in their order, from the outside in, and prints them. Nothing is changed, and nothing that is started stays.
"""

from deskrl.core.doctor.examine import doctor

__all__ = ["doctor"]
