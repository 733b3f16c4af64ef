#!/usr/bin/env bash
# All checks that need no model and no server; CI, people and pre-commit run this same script.
#
#     bash scripts/check.sh
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ! -x .venv/bin/python ]]; then
    echo "check.sh: no .venv here; run: bash scripts/setup.sh --test" >&2
    exit 1
fi
python=$PWD/.venv/bin/python

step() {
    printf '==> %s\n' "$1"
    shift
    "$@"
}

step "Lint" "$python" -m ruff check .
step "Format" "$python" -m ruff format --check .
step "Layers" "$python" scripts/check_layers.py
step "Document of the flags" "$python" scripts/gen_server_arguments.py --check
step "Document of the HTTP API" "$python" scripts/gen_http_api.py --check
step "Map of the tree" "$python" scripts/gen_structures.py --check
step "Types" "$python" -m mypy
