#!/usr/bin/env bash
# Starts the smoke run on a machine without a GPU: installs what is missing, then trains a tiny agent on real desktops.
# Usage: deploy/quickstart.sh [--tracker wandb] [--seed 1] [any other configuration key]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=()
for tracker in wandb tensorboard mlflow; do
  [[ " $* " =~ " --tracker"[\ =]"$tracker " ]] && extras+=("$tracker")
done
bash deploy/install.sh "${extras[@]}"
exec .venv/bin/deskrl up deploy/runs/smoke.toml "$@"
