"""Identifiers of groups, episodes, leases and screenshots, and seeds.

Identifiers of planned groups and episodes are deterministic, so that planning is idempotent; those of leases are
random.
"""

import hashlib
import secrets


def new_id(kind: str) -> str:
    """Return a new random identifier such as `lease-3f9c2a71b04e`."""
    return f"{kind}-{secrets.token_hex(6)}"


def image_hash(data: bytes) -> str:
    """Return the identifier of an encoded screenshot: the SHA-256 of its bytes in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def group_id(queue: str, ordinal: int) -> str:
    """Return the identifier of group number `ordinal` of a queue."""
    return f"{queue}/{ordinal:06d}"


def episode_id(group: str, member: int) -> str:
    """Return the identifier of member number `member` of a group."""
    return f"{group}.{member}"


def derive_seed(*parts: object) -> int:
    """Return a 63-bit seed derived from `parts`; different parts give independent random streams."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
