# Sourced by the other scripts: a virtual environment in .venv with everything that is needed,
# made on the first run and reused while pyproject.toml and constraints.txt stay the same.
#   PYTHON   interpreter to make it with (default: python3; 3.11 or 3.12)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "$1" >&2
  exit 1
}

PYTHON="${PYTHON:-python3}"
command -v "$PYTHON" > /dev/null || fail "Python 3.11 or 3.12 is needed; set PYTHON to it."
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' ||
  fail "Python 3.11 or 3.12 is needed, $PYTHON is $("$PYTHON" --version); set PYTHON to another."

wanted="$(cat pyproject.toml constraints.txt | "$PYTHON" -c \
  'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')"
if [ "$(cat .venv/.installed 2> /dev/null || true)" != "$wanted" ]; then
  echo "Installing into .venv (once; a few minutes) ..."
  .venv/bin/python -m pip --version > /dev/null 2>&1 || "$PYTHON" -m venv --clear .venv ||
    fail "$PYTHON -m venv does not work (on Debian and Ubuntu: apt install python3-venv)."
  # pip would compile 20,000 files. What a run imports is compiled here, and the rest when it is used.
  .venv/bin/python -m pip install -qq --disable-pip-version-check --no-compile \
    --constraint constraints.txt --editable ".[dev,docs,fid]"
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python -c \
    'import ganscale.launch.ray_train, ganscale.training.loop, torch._dynamo, torchvision, wandb'
  echo "$wanted" > .venv/.installed
fi
export PATH="$PWD/.venv/bin:$PATH"
