# Sourced by test.sh and quickstart.sh: make and activate .venv, install once per change of the pins.
python_command=${PYTHON:-python3}
[ -x .venv/bin/python ] || "$python_command" -m venv .venv
# shellcheck disable=SC1091
source .venv/bin/activate
export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
stamp=$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-64)
if [ "$(cat .venv/installed 2>/dev/null || true)" != "$stamp" ]; then
  pip install --quiet --constraint constraints.txt torch==2.13.0
  pip install --quiet --constraint constraints.txt --editable '.[test]'
  echo "$stamp" > .venv/installed
fi
