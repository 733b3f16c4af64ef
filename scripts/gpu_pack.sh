#!/usr/bin/env bash
# Packs the tree and what scripts/gpu_check.sh needs, for a GPU machine without a network.
#
#     bash scripts/gpu_pack.sh [--python-version 3.12] [--output gpu_pack.tar.gz] [--limit 60MiB]
#     bash scripts/gpu_pack.sh --wheels wheels    # only the wheels, for gpu_check.sh beside them
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$PWD/.venv/bin/python}
PYTHONPATH="$PWD/python:$PWD/scripts${PYTHONPATH:+:$PYTHONPATH}" exec "$python" scripts/gpu_pack.py "$@"
