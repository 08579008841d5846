"""What the docs point to exists: files, functions, links."""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def names_of(path):
    """Return every function, class and `Class.method` defined in a file."""
    out = set()

    def visit(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                out.add(prefix + child.name)
                visit(child, f"{child.name}.")

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    missing = [x for x in links if "://" not in x and not (page.parent / x).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_code_references_exist(page):
    """`layers/x.py: Class.method` names a file of the package and something in it."""
    text = page.read_text(encoding="utf-8")
    for file, name in re.findall(r"`([\w/]+\.py)(?::\s*([\w.]+))?`", text):
        candidates = (ROOT / "src" / "metastate" / file, ROOT / file)
        path = next((p for p in candidates if p.is_file()), None)
        assert path is not None, f"{page.name} names {file}"
        if name:
            assert name in names_of(path), f"{page.name} names {file}: {name}"


def test_architecture_points_to_code():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(re.findall(r"`[\w/]+\.py: [\w.]+`", text)) >= 10


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S
    )
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert (tmp_path / "models" / "first" / "model.safetensors").is_file()


def test_the_readmes_commands_parse():
    """Every `metastate ...` line of the README is accepted by the parser."""
    from metastate.cli import build_parser

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = re.findall(r"^(?:\$ )?metastate (\w+ .*)$", text, re.M)
    assert len(lines) >= 6
    for line in lines:
        _, unknown = build_parser()[0].parse_known_args(shlex.split(line))
        assert not unknown, line
