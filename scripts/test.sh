#!/usr/bin/env bash
# Sets up, checks and tests: lint, layers, types, generated documents, then pytest.
#
#     bash scripts/test.sh [pytest arguments]
#
# The everyday suite leaves out tests marked slow or gpu; `-m slow` on the command line wins.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

bash "$root/scripts/setup.sh" --test --demo-model
bash "$root/scripts/check.sh"
printf '==> Tests\n'
cd "$root"
exec .venv/bin/python -m pytest -m "not slow and not gpu" "$@"
