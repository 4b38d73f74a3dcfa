#!/usr/bin/env bash
# Everything that must hold: formatting, lint, types, tests. Sets itself up on a fresh clone.
#   scripts/test.sh             all of it
#   scripts/test.sh -k order    arguments go to pytest; with -n 0 one test at a time
# Tests on real images use GANSCALE_CIFAR10, or ../shared/cifar10 when that is there.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -z "${GANSCALE_CIFAR10:-}" ] && [ -d ../shared/cifar10 ]; then
  export GANSCALE_CIFAR10="$PWD/../shared/cifar10"
fi
export WANDB_MODE=offline RAY_AUTH_MODE=disabled

# The rating page is tested in a browser; where none is and none can be had, those tests are skipped.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver ||
    echo "no chromium could be installed: the rating page goes untested" >&2
fi

ruff format --check .
ruff check .
mypy
pytest -n logical --dist worksteal -m "not slow and not gpu" "$@"
