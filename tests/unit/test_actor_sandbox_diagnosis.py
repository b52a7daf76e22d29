"""Cause of a sandbox that does not start: the hint follows from bubblewrap's message and the kernel's settings."""

from __future__ import annotations

import pytest

from deskrl.actor.desktops.sandbox_diagnosis import SandboxSettings, diagnose, read_settings

FORBIDDEN = "bwrap: setting up uid map: Permission denied"
NO_NAMESPACE = "bwrap: No permissions to create new namespace, likely because the kernel does not allow it"


@pytest.mark.parametrize(
    ("reason", "settings", "message", "hint"),
    [
        ("bwrap: Unknown option --size", {"bwrap_version": "bubblewrap 0.6.1"}, "0.6.1 is too old", "bubblewrap 0.7"),
        ("not found", {"bwrap_version": ""}, "is not installed", "apt-get install bubblewrap"),
        (NO_NAMESPACE, {"unprivileged_userns_clone": 0}, "does not permit", "kernel.unprivileged_userns_clone=1"),
        (NO_NAMESPACE, {"max_user_namespaces": 0}, "does not permit", "user.max_user_namespaces"),
        (FORBIDDEN, {"apparmor_restrict_unprivileged_userns": 1}, "does not permit", "AppArmor profile"),
        (FORBIDDEN, {"is_container": True}, "does not permit", "of this container"),
        (FORBIDDEN, {}, "does not permit", "possibly a security module"),
        ("bwrap: Creating new namespace failed: No space left on device", {}, "is exhausted", "max_user_namespaces"),
    ],
)
def test_the_hint_follows_from_the_cause(reason: str, settings: dict[str, object], message: str, hint: str) -> None:
    error = diagnose(reason, SandboxSettings(**{"bwrap_version": "bubblewrap 0.8.0", **settings}))  # type: ignore[arg-type]
    assert error is not None
    assert message in error.message and reason in error.message and hint in error.hint


def test_a_failure_without_a_known_cause_may_be_transient() -> None:
    assert diagnose("bwrap: execvp Xvfb: Text file busy", SandboxSettings("bubblewrap 0.8.0")) is None


def test_the_settings_of_this_machine_can_be_read() -> None:
    settings = read_settings()
    assert settings.max_user_namespaces is None or settings.max_user_namespaces >= 0
