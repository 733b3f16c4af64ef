#!/usr/bin/env bash
# Sets up, checks and tests: lint, layers, types, generated documents, then pytest.
#
#     bash scripts/test.sh [pytest arguments]
#
# The everyday suite leaves out tests marked slow or gpu; `-m slow` on the command line wins. Files
# are shared out to a process per core with one compute thread each; `-n 0` runs all in one process.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup.sh" --test --demo-model
bash "$root/scripts/check.sh"
printf '==> Tests\n'
cd "$root"
unset PYTHONDONTWRITEBYTECODE # or hundreds of servers would compile every module once more
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist loadfile \
    -m "not slow and not gpu" "$@"
