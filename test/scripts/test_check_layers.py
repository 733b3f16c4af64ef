"""The layer check finds planted violations and nothing in our own tree."""

from __future__ import annotations

from pathlib import Path

import pytest

import check_layers
from check_layers import Row, check

HOUSE: tuple[Row, ...] = (
    (0, "", "ground"),
    (1, "", "low.a < low.b < low.c"),
    (1, "", "low.other"),
    (2, "TEXT", "text.*"),
    (2, "DEVICE", "device.*"),
    (2, "DEVICE", "pool_* < user"),
    (3, "", "door"),
)


def plant(root: Path, **files: str) -> Path:
    """A package whose modules (`a__b` for a/b.py) have the given source."""
    for name, source in files.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


def test_our_own_tree_is_clean(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_layers.main([]) == 0
    assert capsys.readouterr().out == "layer check: clean\n"


def test_imports_downwards_and_along_the_order_pass(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        ground="import os\n",
        low__a="from sglang.ground import x\n",
        low__c="from sglang.low import a\nimport sglang.low.b\n",
        low__b="import sglang.ground\n",
        text__x="from sglang.low.c import y\nfrom .y import z\n",
        text__y="import torch\n",
        pool_1="from sglang import pool_2\n",
        pool_2="",
        user="import sglang.pool_1\n",
        door="import sglang.text.x, sglang.user\n",
    )
    assert check(root, HOUSE) == []


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("ground", "import sglang.low.a\n", "ground:1: imports sglang.low.a: F0 imports upwards"),
        ("low__a", "from sglang.low.b import x\n", "no order puts low.b before low.a on F1"),
        ("low__other", "import sglang.low.a\n", "no order puts low.a before low.other on F1"),
        ("text__x", "import sglang.device.y\n", "the TEXT floors never import the DEVICE tower"),
        ("device__x", "import sglang.text.y\n", "the DEVICE floors never import the TEXT tower"),
        ("text__x", "from ..device import y\n", "the TEXT floors never import the DEVICE tower"),
        ("low__a", "import sglang.text.y\n", "the shared floors never import the TEXT tower"),
        ("text__x", "import sglang.door\n", "F2 imports upwards from F3"),
        (
            "text__x",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import sglang.device.y\n",
            "text.x:3: imports sglang.device.y: the TEXT floors",
        ),
        ("door", "def f():\n    import json\n", "door:2: imports json: inside a function only"),
        ("door", "async def f():\n    import sglang.user\n", "inside a function only"),
        ("door", "class A:\n    def f(self):\n        import os\n", "inside a function only"),
        ("attic", "import os\n", "attic: unknown module"),
    ],
)
def test_each_kind_of_violation_is_found(
    tmp_path: Path, module: str, source: str, message: str
) -> None:
    files = {
        "low__a": "",
        "low__b": "",
        "text__y": "",
        "device__y": "",
        "user": "",
        "door": "",
        module: source,
    }
    (problem,) = check(plant(tmp_path, **files), HOUSE)
    assert message in problem


def test_heavy_packages_may_be_imported_inside_a_function(tmp_path: Path) -> None:
    source = "def f():\n    import transformers\n    from torch import nn\n"
    assert check(plant(tmp_path, ground=source), HOUSE) == []


def test_a_cycle_inside_one_room_is_found(tmp_path: Path) -> None:
    root = plant(tmp_path, text__x="import sglang.text.y\n", text__y="from . import x\n")
    (problem,) = check(root, HOUSE)
    assert problem.startswith("import cycle: ")
    assert "text.x" in problem


def test_a_package_file_with_code_needs_a_floor(tmp_path: Path) -> None:
    root = plant(tmp_path, low__a="", shed__x="")
    (root / "__init__.py").write_text('"""Ours."""\nX = 1\n')
    (root / "low" / "__init__.py").write_text("")
    (root / "shed" / "__init__.py").write_text("import os\n")
    (root / "shed" / "x.py").unlink()
    assert [line.split(":")[0] for line in check(root, HOUSE)] == ["shed"]


def test_the_packages_own_file_is_a_module_too(tmp_path: Path) -> None:
    root = plant(tmp_path, ground="from sglang import Engine\n")
    (root / "__init__.py").write_text("import os\n")
    (problem,) = check(root, (*HOUSE, (3, "", "door < sglang")))
    assert "ground:1: imports sglang.Engine: F0 imports upwards from F3" in problem


def test_arithmetic_stays_free_of_torch(tmp_path: Path) -> None:
    root = plant(tmp_path, srt__mem_cache__kv_layout="from torch import nn\n")
    (problem,) = check(root)
    assert "stays free of torch" in problem


def test_a_table_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="a stands in two places"):
        check_layers.House([(0, "", "a"), (1, "", "a < b")])


def test_violations_are_printed_and_fail(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(tmp_path, srt__nowhere="import os\n")
    assert check_layers.main([str(tmp_path)]) == 1
    assert "srt.nowhere: unknown module" in capsys.readouterr().out
