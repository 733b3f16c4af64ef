"""Writes the map in docs/structures.md: floors and towers from the layer check's table, what
each module owns from the first sentence of its docstring.

    python scripts/gen_structures.py           rewrite the map
    python scripts/gen_structures.py --check   exit 1 when the map is out of date
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from pathlib import Path

from check_layers import PACKAGE, TABLE, House, read_modules

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structures.md"
BEGIN, END = "<!-- map: written by scripts/gen_structures.py -->\n", "<!-- end of map -->\n"

_FLOORS = (
    "ground",
    "contracts",
    "memory",
    "planning",
    "compute",
    "execution",
    "processes",
    "doors",
)


def first_sentence(tree: ast.Module) -> str:
    """The first paragraph of a module's docstring on one line, empty when it has none."""
    docstring = ast.get_docstring(tree) or ""
    return " ".join(docstring.split("\n\n")[0].split())


def render_map(package_dir: Path) -> str:
    """The map as Markdown: one table per floor and tower, highest floor first."""
    house = House(TABLE)
    places: dict[tuple[int, str], list[str]] = {}
    for module, tree in read_modules(package_dir).items():
        room = house.room_of(module)
        if room is None or not tree.body:
            continue
        path = package_dir.joinpath(*(() if module == PACKAGE else module.split(".")))
        file = path.with_suffix(".py") if not path.is_dir() else path / "__init__.py"
        line = f"| `{file.relative_to(package_dir).as_posix()}` | {first_sentence(tree)} |"
        places.setdefault(house.place_of(room), []).append(line.replace("| |", "| ? |"))
    lines = []
    for (floor, tower), rows in sorted(places.items(), reverse=True):
        side = f", {tower} tower" if tower else ""
        lines += [f"### F{floor} {_FLOORS[floor]}{side}\n", "| module | what it owns |\n|---|---|"]
        lines += [*rows, ""]
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Rewrite the map between its marks, or compare it with `--check`."""
    page = PAGE.read_text(encoding="utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = f"{before}{BEGIN}\n{render_map(ROOT / 'python' / PACKAGE)}\n{END}{after}"
    if fresh == page:
        return 0
    if "--check" in argv:
        print(f"{PAGE} is out of date; run: python scripts/gen_structures.py")
        return 1
    PAGE.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
