#!/usr/bin/env bash
# Installs what the tests need and runs them.
# Usage: deploy/test.sh [pytest arguments]      e.g. deploy/test.sh tests/long
set -euo pipefail
cd "$(dirname "$0")/.."
extras=(test)
[[ " $* " == *" tests/long"* ]] && extras+=(suite)
bash deploy/install.sh "${extras[@]}"
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check --quiet .
mypy core actor inference replay learner
lint-imports
buf lint proto
exec pytest "$@"
