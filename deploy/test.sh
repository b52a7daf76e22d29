#!/usr/bin/env bash
# Installs what the tests need, runs the linters and the type checker, and then the tests.
# Usage: deploy/test.sh [pytest arguments]      e.g. deploy/test.sh tests/long
set -euo pipefail
cd "$(dirname "$0")/.."
extras=(test)
[[ " $* " == *" tests/long"* ]] && extras+=(suite notebooks)
bash deploy/install.sh "${extras[@]}"
export PATH="$PWD/.venv/bin:$PATH"
ruff check .
ruff format --check --quiet .
mypy core models actor inference replay learner launch env analysis cli testing
lint-imports
buf lint proto
exec pytest "$@"
