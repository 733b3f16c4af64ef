"""The command `sglang`: `sglang serve --model-path MODEL` is `python -m sglang.launch_server`.

Only the word after the command is read here; everything behind it belongs to that command. It is
run as Python's -m would: the processes that a server starts import its main module again.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version

_USAGE = """\
usage: sglang serve --model-path MODEL [flags]   start a server (flags: sglang serve --help)
       sglang version                            print the version
"""


def main(
    argv: Sequence[str] | None = None, run_module: Callable[..., object] = runpy.run_module
) -> int:
    """Run a command; returns the exit status, 2 with the usage on stderr for an unknown one.

    A server's own exit status leaves as SystemExit. Side effect: `sys.argv` is the command's then.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if command == "serve":
        sys.argv[1:] = rest
        run_module("sglang.launch_server", run_name="__main__", alter_sys=True)
        return 0
    if command in ("version", "--version"):
        print(f"sglang {version('sglang')}")
        return 0
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    named = f"no command {command!r}" if command else "a command is missing"
    print(f"sglang: {named}\n{_USAGE}", end="", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
