#!/bin/sh
# Runs a command of the test environment as an ordinary user. Requires root.
# Usage: tests/system/as_ordinary_user.sh pytest -q tests/system/test_desktop_isolation.py
# SUBORDINATE_IDS=FIRST:COUNT gives the user an account and these subordinate ids; without, it has neither.
# The interpreter may lie in a folder that only root may enter: it is mounted at the same place in an empty folder.
set -eu
prefix=$(python -c 'import sys; print(sys.base_prefix)')
user=${ORDINARY_USER_ID:-61999}
export prefix user
exec unshare --mount sh -ec '
    mount --make-rprivate /
    top=/$(echo "$prefix" | cut -d/ -f2)
    if ! setpriv --reuid="$user" --regid="$user" --clear-groups test -x "$prefix/bin/python3"; then
        mkdir -p /mnt/deskrl-python
        mount --bind "$prefix" /mnt/deskrl-python
        mount -t tmpfs -o mode=755 deskrl "$top"
        mkdir -p "$prefix"
        mount --move /mnt/deskrl-python "$prefix"
    fi
    mount -t tmpfs -o mode=1777 deskrl /tmp
    if [ "${SUBORDINATE_IDS:-}" ]; then
        { cat /etc/passwd; echo "deskrl-test:x:$user:$user::/tmp:/bin/sh"; } > /tmp/passwd
        for name in subuid subgid; do
            echo "deskrl-test:$SUBORDINATE_IDS" > "/tmp/$name"
            touch "/etc/$name"
        done
        for name in passwd subuid subgid; do
            mount --bind "/tmp/$name" "/etc/$name"
        done
    fi
    exec setpriv --reuid="$user" --regid="$user" --clear-groups --inh-caps=-all env HOME=/tmp "$@"
' sh "$@"
