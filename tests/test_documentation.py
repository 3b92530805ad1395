"""The documentation cannot rot: its Python runs, and what it links to is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("docs/*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
KERAS = "ignore:__array__ implementation doesn't:DeprecationWarning"
"""What it says while it makes NumPy's arrays of tensors."""
LANGUAGES = {"python", "sh", "text"}


def blocks(text: str) -> list[tuple[str, int, list[str]]]:
    """Language, number of lines before the first one, and lines of every fenced block."""
    found: list[tuple[str, int, list[str]]] = []
    inside = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append((line.removeprefix("```"), number, []))
        elif inside:
            found[-1][2].append(line)
    assert not inside, "a block has no end"
    return found


def script(text: str) -> str:
    """The Python of a document, each line where it is in the document, so that errors name it."""
    lines: list[str] = []
    for language, before, block in blocks(text):
        if language == "python":
            lines += [""] * (before - len(lines)) + block
    return "\n".join(lines)


def anchors(text: str) -> set[str]:
    """The headings of a document as links name them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


by_name = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def test_there_is_documentation_with_python_in_it() -> None:
    names = {path.name for path in DOCUMENTS}
    assert names >= {"README.md", "design.md", "mathematics.md", "dialects.md", "deviations.md"}
    with_python = {path.name for path in DOCUMENTS if script(path.read_text(encoding="utf-8"))}
    assert with_python >= {"README.md", "mathematics.md", "dialects.md", "deviations.md"}


def test_a_script_has_its_lines_where_the_document_has_them() -> None:
    text = "# Title\n\n```python\nx = 1\n```\n\n```sh\nexit 1\n```\n\n```python\ny = x\n1 / 0\n```\n"
    assert script(text).splitlines() == ["", "", "", "x = 1", "", "", "", "", "", "", "", "y = x", "1 / 0"]


@pytest.mark.slow
@by_name
def test_python_runs_as_printed(path: Path, tmp_path: Path) -> None:
    """One process for each document, for some of what they show holds for a whole process; warnings are errors."""
    text = path.read_text(encoding="utf-8")
    assert {language for language, _, _ in blocks(text)} <= LANGUAGES
    code = script(text)
    if not code:
        return
    file = tmp_path / f"example_{path.stem}.py"  # and not by a name that others import
    file.write_text(code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", KERAS, file],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUTF8": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@by_name
def test_links_lead_to_files_and_headings_that_exist(path: Path) -> None:
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, heading = target.partition("#")
        file = (path.parent / name) if name else path
        assert file.exists(), target
        if heading:
            assert heading in anchors(file.read_text(encoding="utf-8")), target


def test_the_tests_that_documents_name_exist() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"def (test_\w+)", tests))
    for path in DOCUMENTS:
        named = set(re.findall(r"`(test_\w+)`", path.read_text(encoding="utf-8")))
        assert named <= existing, path.name
