#!/usr/bin/env bash
# Checks and measures on a GPU, in under nine minutes: docs/gpu.md, gpu_check.
#
#     bash scripts/gpu_check.sh [--stage 1 4] [--out FOLDER] [--dry-run-cpu]
#
# Needs a Python with torch, triton, transformers, tokenizers and safetensors ($PYTHON, else .venv's,
# else python3). What else the server needs is taken from wheels/, which scripts/gpu_pack.sh fills.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    [[ -x .venv/bin/python ]] && python=$PWD/.venv/bin/python
fi
path=$PWD/python:$PWD/scripts:$PWD/sgl-kernel/python
if compgen -G "wheels/*.whl" >/dev/null; then
    # A wheel is an archive of what is imported: no pip and no network are needed. What the machine's
    # Python has stays in front of it.
    if [[ ! -d .gpu-wheels ]]; then
        for wheel in wheels/*.whl; do
            "$python" -m zipfile -e "$wheel" .gpu-wheels.part
        done
        mv .gpu-wheels.part .gpu-wheels
    fi
    path=$path:$PWD/.gpu-wheels
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m gpu_check "$@"
