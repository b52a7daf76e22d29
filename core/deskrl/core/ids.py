"""Names of things: runs, groups, episodes, leases, screenshots. Knows no storage and no wire.

Planned things have names derived from what they are, so that planning twice plans once; granted things are random.
"""

import hashlib
import secrets


def new_id(kind: str) -> str:
    """A fresh random name such as `lease-3f9c2a71b04e`."""
    return f"{kind}-{secrets.token_hex(6)}"


def image_hash(data: bytes) -> str:
    """Name of an encoded screenshot: lower-case hex SHA-256 of its bytes."""
    return hashlib.sha256(data).hexdigest()


def group_id(queue: str, ordinal: int) -> str:
    """Name of the group that was planned as number `ordinal` of its queue."""
    return f"{queue}/{ordinal:06d}"


def episode_id(group: str, member: int) -> str:
    """Name of a group's member."""
    return f"{group}.{member}"


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that follows from `parts` alone, for any number of independent random streams."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
