# Decisions of deploy/install.sh that depend on the distribution and the kernel. The functions change nothing; they are
# tested with the answers of several distributions. Paths are below $root, which is empty except in tests.

root=${root-}
# Programs that run inside a sandbox; also in actor/deskrl/actor/desktops/browser_programs.py.
browser_programs=(/usr/lib/chromium/chromium /usr/lib/chromium-browser/chromium-browser /opt/google/chrome/chrome)

# Succeeds if a browser is installed that runs inside a sandbox.
has_browser() {
    local program
    for program in "${browser_programs[@]}"; do
        [ -f "$root$program" ] && return
    done
    return 1
}

# Succeeds if apt offers package $1, and it is not a package that only installs a snap.
is_offered_without_snap() {
    local description
    description=$(apt-cache show --no-all-versions "$1" 2>/dev/null) && [ -n "$description" ] || return 1
    ! grep -qiE '^(version|depends|pre-depends|description[^:]*):.*snap' <<<"$description"
}

# Prints the package of a browser that runs inside a sandbox; nothing if one is installed. Fails if apt offers none.
browser_package() {
    local package
    has_browser && return
    for package in chromium google-chrome-stable chromium-browser; do
        if is_offered_without_snap "$package"; then
            echo "$package"
            return
        fi
    done
    return 1
}

# Prints a kernel setting, such as kernel/unprivileged_userns_clone; nothing if this kernel does not have it.
kernel_setting() {
    cat "$root/proc/sys/$1" 2>/dev/null || true
}

# Prints what forbids user namespaces to programs without privileges: clone, max, apparmor; nothing if nothing does.
userns_obstacle() {
    if [ "$(kernel_setting kernel/unprivileged_userns_clone)" = 0 ]; then
        echo clone
    elif [ "$(kernel_setting user/max_user_namespaces)" = 0 ]; then
        echo max
    elif [ "$(kernel_setting kernel/apparmor_restrict_unprivileged_userns)" = 1 ] && [ ! -f "$root/etc/apparmor.d/deskrl-bwrap" ]; then
        echo apparmor
    fi
}

# Prints the file of an enabled AppArmor profile of another package for bwrap, which deskrl's own would conflict with.
conflicting_profile() {
    local file
    for file in "$root"/etc/apparmor.d/*; do
        [ -f "$file" ] && [ "${file##*/}" != deskrl-bwrap ] && [ ! -e "$root/etc/apparmor.d/disable/${file##*/}" ] || continue
        if grep -qE '^[[:space:]]*(profile[^#]*[[:space:]])?/usr/bin/bwrap[[:space:]]+([^#]*[[:space:]])?\{' "$file"; then
            echo "${file#"$root"}"
            return
        fi
    done
}

# Prints what the user can do about an obstacle that userns_obstacle has printed.
userns_hint() {
    case $1 in
        clone) echo "as root: sysctl kernel.unprivileged_userns_clone=1" ;;
        max) echo "as root: sysctl user.max_user_namespaces=10000" ;;
        apparmor) echo "as root: bash deploy/install.sh apparmor, which permits them to bwrap; docs/security.md says what that means" ;;
    esac
}
