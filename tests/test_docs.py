"""The documentation: its Python runs, and its links lead somewhere.

A block marked `python` is run, the blocks of one page in order and in one
namespace, in an empty directory. One that only shows something is marked
`py`.
"""

import re
from pathlib import Path

import pytest

from tests.processes import Forked, run_script

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)[^)]*\)")
_HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)


def python_of(text: str) -> str:
    """Returns the page's Python on the lines where the page has it."""
    lines = [""] * (text.count("\n") + 1)
    for match in _FENCE.finditer(text):
        if match[1] == "python":
            start = text[: match.start(2)].count("\n")
            block = match[2].splitlines()
            lines[start : start + len(block)] = block
    return "\n".join(lines).rstrip()


def anchors_of(text: str) -> set[str]:
    headings = _HEADING.findall(_FENCE.sub("", text))
    return {
        re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        for heading in headings
    }


def broken_links(page: Path) -> list[str]:
    broken = []
    for target in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue  # the network is not for tests
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists():
            broken.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors_of(path.read_text("utf-8")):
            broken.append(f"{target}: there is no such heading")
    return broken


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def page_with_python(page: Path):
    """The first page is tried on each backend."""
    marks = () if page.name == "README.md" else pytest.mark.any_backend
    return pytest.param(page, marks=marks, id=name_of(page))


@pytest.mark.parametrize(
    "page",
    [page_with_python(p) for p in PAGES if python_of(p.read_text("utf-8"))],
)
def test_python_runs(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text(python_of(page.read_text("utf-8")), "utf-8")
    process = Forked(run_script, script, cwd=tmp_path, side="one")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]


def test_the_checks_can_fail(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A page\n\n[a](gone.md) [b](#a-page) [c](#nope) [d](https://x.org)\n"
        "\n```python\nx = 1\n```\n\n```py\nshown\n```\n\n"
        "```python\nassert x == 2\n```\n"
    )
    assert broken_links(page) == [
        "gone.md: there is no such file",
        "#nope: there is no such heading",
    ]
    code = python_of(page.read_text())
    assert "shown" not in code
    assert code.splitlines()[5] == "x = 1"
    with pytest.raises(AssertionError):
        exec(code, {})
