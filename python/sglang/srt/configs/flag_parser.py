"""Turns flag definitions into a command line, a --help text and checked values.

Called by server_args.py only. It knows kinds of flags but no flag by name: which flags are
accepted without effect or refused is data in configs/flag_tables.py.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

from sglang.srt.configs.flag_spec import Arity, FlagKind, FlagSpec

logger = logging.getLogger(__name__)

_EPILOG = (
    "SGLang's other flags are known too: each is accepted with a warning because what it tunes "
    "does not exist here, or refused because ignoring it would change results. "
    "docs/server_arguments.md lists them all."
)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, without the usage of a hundred flags."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def build_parser(working: Sequence[FlagSpec], others: Sequence[FlagSpec]) -> OneLineParser:
    """A parser for all flags; --help shows the working ones, by group."""
    parser = OneLineParser(
        prog="launch_server",
        usage="python -m sglang.launch_server --model-path PATH [flags]",
        description="Serve a language model over HTTP on segmented KV memory.",
        epilog=_EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="Read flags from a YAML file; flags on the command line win.",
    )
    for title, specs in groupby(working, key=lambda spec: spec.group):
        group = parser.add_argument_group(title)
        for spec in specs:
            _add(group, spec, f"{spec.help} Default: {spec.shown_default}.".replace("%", "%%"))
    for spec in others:
        _add(parser, spec, argparse.SUPPRESS)
    return parser


def _add(target: argparse._ActionsContainer, spec: FlagSpec, help_text: str) -> None:
    if spec.arity is Arity.SWITCH:
        target.add_argument(*spec.names, dest=spec.dest, action="store_true", help=help_text)
        return
    metavar = spec.metavar
    if metavar is None:
        metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else "VALUE"
    target.add_argument(
        *spec.names,
        dest=spec.dest,
        nargs=None if spec.arity is Arity.ONE else spec.arity.value,
        type=_argparse_type(spec),
        metavar=metavar,
        help=help_text,
    )


def _argparse_type(spec: FlagSpec) -> Any:
    """`spec.parse` with its own message kept: argparse would replace that of a ValueError."""

    def parse(text: str) -> Any:
        try:
            return spec.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


def parse_values(
    parser: OneLineParser, others: Sequence[FlagSpec], argv: Sequence[str]
) -> dict[str, Any]:
    """The values of the working flags that the command line (and its --config) sets.

    Exits with status 2 and one line for a refused or unknown flag or a missing --model-path.
    """
    values = vars(parser.parse_args(list(argv)))
    config = values.pop("config", None)
    if config is not None:
        try:
            from_file = config_file_argv(Path(config))
        except (OSError, ValueError) as error:
            parser.error(f"--config {config}: {error}")
        values = vars(parser.parse_args([*from_file, *argv]))
        del values["config"]
    try:
        settle_others(others, values)
    except ValueError as error:
        parser.error(str(error))
    if "model_path" not in values:
        parser.error("--model-path is required")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


def config_file_argv(path: Path) -> list[str]:
    """A YAML file of flags as command-line words; `true` is a switch, a list several values.

    Raises OSError or ValueError when the file cannot be read or is no flat mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"not YAML: {error}".splitlines()[0]) from error
    if not isinstance(content, dict):
        raise ValueError("must be a mapping from flag to value")
    words: list[str] = []
    for key, value in content.items():
        name = "--" + str(key).removeprefix("--").replace("_", "-")
        if name == "--config":
            raise ValueError("must not name another --config")
        if value is None or value is False:
            continue
        if value is True:
            words.append(name)
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        elif isinstance(value, dict):
            raise ValueError(f"{key} must be a plain value")
        else:
            words.append(f"{name}={value}")
    return words


def values_from_kwargs(
    working: Sequence[FlagSpec], others: Sequence[FlagSpec], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Keywords as field values: aliases resolved, text parsed, the other flags settled.

    None stands for the default. Raises ValueError for a bad or refused value, TypeError for an
    unknown name or for two names of one flag.
    """
    by_name = {
        name.removeprefix("--").replace("-", "_"): spec
        for spec in (*working, *others)
        for name in spec.names
    }
    values: dict[str, Any] = {}
    for name, value in kwargs.items():
        spec = by_name.get(name)
        if spec is None:
            raise TypeError(f"unknown argument {name!r}")
        if spec.dest in values:
            raise TypeError(f"{name!r} is given twice")
        if value is None:
            continue
        values[spec.dest] = _python_value(spec, value)
    settle_others(others, values)
    if "model_path" not in values:
        raise TypeError("model_path is required")
    return values


def _python_value(spec: FlagSpec, value: Any) -> Any:
    if spec.kind is not FlagKind.WORKS:
        return value
    if spec.arity is Arity.SWITCH:
        if not isinstance(value, bool):
            raise ValueError(f"{spec.dest} must be True or False, got {value!r}")
        return value
    if spec.arity is Arity.MANY and not isinstance(value, str):
        return _python_values(spec, value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{spec.dest} cannot be {value!r}")
    try:
        parsed = spec.parse(str(value))
    except ValueError as error:
        raise ValueError(f"{spec.dest}: {error}") from error
    return (parsed,) if spec.arity is Arity.MANY else parsed


def _python_values(spec: FlagSpec, value: Any) -> tuple[Any, ...]:
    """A list, whose objects are as JSON on the command line; a mapping is NAME=VALUE, each."""
    if isinstance(value, Mapping):
        value = [f"{name}={one}" for name, one in value.items()]
    if not isinstance(value, list | tuple):
        raise ValueError(f"{spec.dest} cannot be {value!r}")
    texts = [json.dumps(one) if isinstance(one, Mapping) else one for one in value]
    return tuple(one for text in texts for one in _python_value(spec, text))


def settle_others(others: Sequence[FlagSpec], values: dict[str, Any]) -> None:
    """Take every flag that does nothing out of `values`: warn, or refuse with ValueError."""
    for spec in others:
        if spec.dest not in values:
            continue
        value = values.pop(spec.dest)
        if value is None or value is False or _text(value) in spec.noops:
            continue
        if spec.kind is FlagKind.REFUSED:
            raise ValueError(f"{spec.name} is refused: {spec.help}")
        logger.warning("%s is accepted without effect: %s", spec.name, spec.help)


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
