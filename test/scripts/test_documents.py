"""Documents say what the tree says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gen_structures
from sglang.srt.managers.schedule_batch import _EDGES
from sglang.srt.models.registry import MODEL_CLASSES

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "structures.md").read_text(encoding="utf-8")


def test_the_map_shows_the_tree_as_it_is() -> None:
    assert gen_structures.main(["--check"]) == 0


def test_every_module_on_the_map_says_what_it_owns() -> None:
    rows = re.findall(r"^\| `(srt/[^`]+|[a-z_]+\.py)` \| (.*) \|$", PAGE, re.MULTILINE)
    assert len(rows) > 50
    assert [path for path, owns in rows if owns in ("", "?")] == []


def test_a_stale_map_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "structures.md"
    copy.write_text(PAGE.replace("srt/errors.py", "srt/mistakes.py"), encoding="utf-8")
    monkeypatch.setattr(gen_structures, "PAGE", copy)
    assert gen_structures.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().out
    assert gen_structures.main([]) == 0
    assert copy.read_text(encoding="utf-8") == PAGE


def test_the_paths_around_the_package_exist() -> None:
    section = PAGE.split("## Around the package")[1].split("## The life")[0]
    paths = re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE)
    assert "scripts/check.sh" in paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_states_of_a_request_are_the_codes() -> None:
    drawn = {
        state: set(targets.split(", "))
        for state, targets in re.findall(r"^   ([A-Z]+) +-> ([A-Z, ]+)$", PAGE, re.MULTILINE)
    }
    legal = {
        state.name: {target.name for target in targets}
        for state, targets in _EDGES.items()
        if targets
    }
    assert drawn == legal


def test_every_note_that_the_code_cites_is_written() -> None:
    names = ("kv_segments.md", "structures.md", "gpu.md", "speculative_decoding.md")
    documents = [ROOT / "docs" / name for name in names]
    notes = "".join(document.read_text(encoding="utf-8") for document in documents)
    cited = {
        " ".join(name.split())
        for root in ("python", "sgl-kernel/python")
        for path in (ROOT / root).rglob("*.py")
        for name in re.findall(r"Note\s+\[([^\]]+)\]", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert [name for name in sorted(cited) if f"[{name}]" not in notes] == []


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs/structures.md"])
def test_links_and_scripts_in_documents_exist(name: str) -> None:
    document = ROOT / name
    text = document.read_text(encoding="utf-8")
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert [link for link in targets if not _is_there(document, link)] == []
    scripts = re.findall(r"(?:bash|python) (scripts/\S+?\.(?:sh|py))", text)
    assert [script for script in scripts if not (ROOT / script).is_file()] == []


def _is_there(document: Path, link: str) -> bool:
    """Whether a relative link leads to a file and, where it names one, to a heading of it."""
    path, _, anchor = link.partition("#")
    target = document.parent / path if path else document
    if not target.exists() or not anchor:
        return target.exists()
    titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8").lower(), re.MULTILINE)
    return anchor in {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    ("link", "there"),
    [
        ("README.md", True),
        ("README.md#no-such-heading", False),
        ("docs/nowhere.md", False),
        ("docs/kv_segments.md#note-block-tables", True),
    ],
)
def test_a_link_must_lead_somewhere(link: str, there: bool) -> None:
    assert _is_there(ROOT / "README.md", link) is there


def test_the_readme_shows_both_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash scripts/serve.sh" in readme
    assert "bash scripts/test.sh" in readme


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_model_that_is_served_is_listed() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert [name for name in MODEL_CLASSES if f"`{name}`" not in text] == []
