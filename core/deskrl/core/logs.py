"""Log lines, the same in every role: time, role, level, message, on standard error. Knows nothing of log files."""

import logging
import sys


def setup(role: str) -> logging.Logger:
    """Send the `deskrl` loggers to standard error with the role's name; third parties from WARNING."""
    logging.basicConfig(
        stream=sys.stderr,
        level=logging.WARNING,
        format=f"%(asctime)s {role} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        force=True,
    )
    logger = logging.getLogger("deskrl")
    logger.setLevel(logging.INFO)
    return logger
