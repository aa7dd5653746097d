"""The Python of README.md and docs/ runs as written: each document's blocks in order, in one namespace; and guides
through the code leave no file out."""

import pathlib
import re

import pytest
import torch

import jlebm_fast.recognition

ROOT = pathlib.Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DOCUMENTS = [
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if BLOCK.search(path.read_text(encoding="utf-8"))
]


def test_there_are_documents_with_code():
    assert {"README.md", "docs/sampling.md"} <= set(DOCUMENTS)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_runs(name, capsys):
    torch.manual_seed(0)
    text = (ROOT / name).read_text(encoding="utf-8")
    namespace: dict = {"__name__": "document"}
    for block in BLOCK.finditer(text):
        # as many empty lines before it as the document has: a traceback names the document's own line
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], name, "exec"), namespace)


def test_the_way_through_recognition_has_a_line_for_every_file():
    here = jlebm_fast.recognition
    lines = re.findall(r"^(?:    \d  | {7})(\w+) {2,}\S", here.__doc__, re.MULTILINE)
    assert set(lines) == {path.stem for path in pathlib.Path(here.__file__).parent.glob("[!_]*.py")}
