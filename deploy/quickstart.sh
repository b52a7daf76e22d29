#!/usr/bin/env bash
# The main job on a machine without a GPU: installs what is missing, then trains a tiny agent on real desktops.
# Usage: deploy/quickstart.sh [--wandb offline] [--seed 1] [any other key of the configuration]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=()
case " $* " in *" --wandb "*) extras=(wandb) ;; esac
bash deploy/install.sh "${extras[@]}"
exec .venv/bin/deskrl up deploy/runs/smoke.toml "$@"
