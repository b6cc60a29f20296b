#!/usr/bin/env bash
# Set up .venv and run the checks and the tests: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
# What breaks every launch breaks hundreds of tests, each at its time limit: eight tell enough.
exec python -m pytest -m "not slow and not gpu" --durations=10 --maxfail=8 "$@"
