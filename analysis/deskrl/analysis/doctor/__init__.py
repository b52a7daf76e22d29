"""`deskrl doctor [CONFIG]`: checks this machine, and the other machines of a run as this machine reaches them.

The checks change nothing and leave no process or file behind.
"""

from deskrl.analysis.doctor.runner import doctor

__all__ = ["doctor"]
