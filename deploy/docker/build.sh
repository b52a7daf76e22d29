#!/usr/bin/env bash
# Builds the desktop image of the provider `docker`.
# Usage: deploy/docker/build.sh [--tag NAME] [--base IMAGE | --bootstrap] [--applications "PACKAGE ..."]
#   --tag NAME      name of the image (default: deskrl-desktop)
#   --base IMAGE    Debian base image (default: debian:bookworm-slim)
#   --bootstrap     create the base image from Debian packages (debootstrap, as root), for machines without a registry
#   --applications  Debian packages of the applications (default: those of deskrl's own tasks)
# Environment: DOCKER_HOST selects the docker daemon, DEBIAN_MIRROR the package source of --bootstrap.
set -euo pipefail
cd "$(dirname "$0")/../.."

tag=deskrl-desktop
base=
arguments=()
while (($#)); do
    case $1 in
        --tag) tag=$2; shift 2 ;;
        --base) base=$2; shift 2 ;;
        --bootstrap) base=bootstrap; shift ;;
        --applications) arguments+=(--build-arg "APPLICATIONS=$2"); shift 2 ;;
        *) echo "build.sh: $1: unknown option (hint: the options are listed at the top of this file)" >&2; exit 2 ;;
    esac
done

work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT

if [ "$base" = bootstrap ]; then
    if ! command -v debootstrap >/dev/null || ((EUID)); then
        echo "build.sh: --bootstrap requires root and debootstrap (hint: apt-get install debootstrap, or use --base)" >&2
        exit 2
    fi
    echo "bootstrapping Debian"
    debootstrap --variant=minbase bookworm "$work/root" "${DEBIAN_MIRROR:-http://deb.debian.org/debian}" >"$work/log" \
        || { tail -3 "$work/log" >&2; exit 1; }
    base=deskrl-base
    tar --one-file-system -C "$work/root" -c . | docker import - "$base" >/dev/null
fi
[ -z "$base" ] || arguments+=(--build-arg "BASE=$base")

mkdir "$work/context"
cp deploy/docker/Dockerfile "$work/context/"
cp -r actor/deskrl/actor/guest "$work/context/guest"
find "$work/context" -name __pycache__ -prune -exec rm -rf {} +
docker build --network host --tag "$tag" "${arguments[@]}" "$work/context"
echo "built $tag"
