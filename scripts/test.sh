#!/usr/bin/env bash
# Everything that must hold: formatting, lint, types, tests. Sets itself up on a fresh clone.
#   scripts/test.sh             all of it
#   scripts/test.sh -k order    arguments go to pytest; with -n 0 one test at a time
# Tests on real images use GANSCALE_CIFAR10, or ../shared/cifar10 when that is there; tests of k8s/ use
# kubectl, and KubeRay's definitions in GANSCALE_KUBERAY_CRDS, or in ../shared/k8s-crds.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [ -z "${GANSCALE_CIFAR10:-}" ] && [ -d ../shared/cifar10 ]; then
  export GANSCALE_CIFAR10="$PWD/../shared/cifar10"
fi
if [ -z "${GANSCALE_KUBERAY_CRDS:-}" ] && [ -d ../shared/k8s-crds ]; then
  export GANSCALE_KUBERAY_CRDS="$PWD/../shared/k8s-crds"
fi
[ -n "${GANSCALE_KUBERAY_CRDS:-}" ] && command -v kubectl > /dev/null ||
  echo "no kubectl, or no GANSCALE_KUBERAY_CRDS: k8s/ goes unchecked, or half of it" >&2
export WANDB_MODE=offline RAY_AUTH_MODE=disabled
# A test a core: threads of torch's would fight for it.
export OMP_NUM_THREADS=1
# Hundreds of processes import the package, which is compiled by the first of them.
unset PYTHONDONTWRITEBYTECODE

# The rating page is tested in a browser; where none is and none can be had, those tests are skipped.
if ! command -v chromium > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver ||
    echo "no chromium could be installed: the rating page goes untested" >&2
fi

ruff format --check .
ruff check .
# On one core, beside the first tests, which wait for clusters to start; it prints what it finds.
mypy &
types=$!
# One more process than there are cores, since tests wait for servers, time-outs and each other's ranks.
processes=$(($(getconf _NPROCESSORS_ONLN) + 1))
tests=0
pytest -n "$processes" --no-loadscope-reorder --durations 30 -m "not slow and not gpu" "$@" || tests=$?
wait "$types" || { echo "scripts/test.sh: types do not fit, see mypy's lines above" >&2; exit 1; }
exit "$tests"
