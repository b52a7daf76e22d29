"""Limits of the guest server, and its reserves beyond the limits of the session's programs."""

from __future__ import annotations

NUM_RESERVED_PROCESSES = 64
"""Processes and threads of the guest server, the X server and their sandboxes."""
RESERVED_BYTES = 128 * 1024**2
"""Memory of the guest server."""
COMMAND_REPLY_BYTES = 20 * 1024**2
"""Size of a reply with the output of a command, as JSON; the host rejects longer ones."""
_OTHER_FIELDS_BYTES = 64 * 1024
_MAX_NUM_OUTPUTS = 3
"""Outputs in a reply: OSWorld's protocol has the standard output twice, and the standard error."""
_MAX_ESCAPE_BYTES = 6
"""Bytes in JSON of one byte of output: a control character, or one that is not UTF-8, is written as an escape."""
MAX_OUTPUT_BYTES = (COMMAND_REPLY_BYTES - _OTHER_FIELDS_BYTES) // (_MAX_NUM_OUTPUTS * _MAX_ESCAPE_BYTES)
"""Bytes of each output of a command that are returned, from its beginning."""
X_MEMORY_FRACTION = 2
"""The X server may use the memory limit of the session divided by this, because programs make it grow."""
