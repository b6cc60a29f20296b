#!/usr/bin/env bash
# Set up .venv and run the checks and the tests: scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh
ruff check --quiet .
ruff format --quiet --check .
mypy --no-error-summary
exec python -m pytest -m "not slow and not gpu" --durations=10 "$@"
