#!/usr/bin/env bash
# Set up .venv and run the checks and the tests: scripts/test.sh [--thorough] [pytest arguments]
# With --thorough also the longest tests, 21 minutes instead of 11 on two slow cores; CI runs it so.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen="not slow and not gpu and not thorough"
if [ "${1:-}" = --thorough ]; then
  chosen="not slow and not gpu"
  shift
fi
source scripts/setup.sh
ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
# What breaks every launch breaks hundreds of tests, each at its time limit: eight tell enough.
exec python -m pytest -m "$chosen" --durations=10 --maxfail=8 "$@"
