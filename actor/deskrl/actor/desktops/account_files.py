"""Files passwd and group of a desktop, which has one user with an account."""

from __future__ import annotations


def account_files(user_id: int) -> dict[str, str]:
    """Return the contents of `passwd` and `group` by file name, for the desktop's user with this id."""
    return {
        "passwd": f"root:x:0:0:root:/root:/usr/sbin/nologin\nuser:x:{user_id}:{user_id}:user:/home/user:/bin/bash\n",
        "group": f"root:x:0:\nuser:x:{user_id}:\n",
    }
