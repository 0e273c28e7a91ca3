#!/bin/sh
# Run all tests in a new environment: build/lowest has the lowest versions of all packages that setup.py allows, build/highest
# the highest versions that are released.
#     [PYTHON=python3.10] tests/supply.sh lowest|highest
set -eu
cd "$(dirname "$0")/.."
venv=build/$1
"${PYTHON:-python3}" -m venv --clear "$venv"
case $1 in
    lowest) grep -oE '[a-z-]+>=[0-9.]+"' setup.py | tr -d '"' | sed 's/>=/==/' ;;
    highest) ;;
esac > "$venv/constraints.txt"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet -c "$venv/constraints.txt" -e '.[dev]'
"$venv/bin/python" -m pip check
"$venv/bin/python" -m pip freeze --exclude-editable
"$venv/bin/python" -m pytest
