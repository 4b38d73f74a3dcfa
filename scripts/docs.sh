#!/usr/bin/env bash
# Builds the documentation, with every warning an error. Sets itself up on a fresh clone.
#   scripts/docs.sh           into docs/_build; open docs/_build/index.html
#   scripts/docs.sh FOLDER    into another folder
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

out="${1:-docs/_build}"
python -m sphinx -W --keep-going -n -q -b html docs "$out"
echo "wrote $out/index.html"
