"""What the docs point to exists: files, functions, links."""

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from metastate.config import TrainConfig
from metastate.eval.suite import Suite
from metastate.mapping import from_dict

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


def anchors(page):
    """Return the names that GitHub gives the headings of a page."""
    found = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = [x for x in re.findall(r"\]\(([^)]+)\)", text) if "://" not in x]
    missing = []
    for link in links:
        file, _, place = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (place and place not in anchors(target)):
            missing.append(link)
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


@pytest.mark.parametrize(
    ("page", "makes"), [("README.md", "models/first"), ("docs/training.md", "runs/texts/best")]
)
def test_the_python_of_pages_runs(page, makes, few_words, tmp_path, monkeypatch):
    shutil.copytree(few_words.parent, tmp_path / "texts", ignore=shutil.ignore_patterns("data"))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), {})
    assert (tmp_path / makes / "model.safetensors").is_file()


def test_the_yaml_of_the_page_on_runs_is_read():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    growth, suite = (yaml.safe_load(x) for x in re.findall(r"```yaml\n(.*?)```", text, re.S))
    assert [g.step for g in from_dict(TrainConfig, growth | {"steps": 3000}).growth] == [1000, 2000]
    suite = from_dict(Suite, suite)
    assert suite.baseline == "RWKV-7" and list(suite.sizes) == ["tiny", "wide"]
    plain = from_dict(Suite, {"models": {"a": {}}, "sizes": {"tiny": {}}})
    for name in ("tokens_per_parameter", "points", "test_tokens"):  # shown as defaults
        assert getattr(suite, name) == getattr(plain, name)


def commands_of(text):
    """Return what follows `metastate` in every command that a page or a recipe shows.

    A command has a line of its own (behind $, # or python's -m) or stands in backquotes, and may be
    broken, by a backslash or there. A name alone, or with one option, is no command but a mention.
    """
    lines = re.sub(r"\\\n[ \t#]*", "", text)
    shown = re.findall(r"^(?:.* -m |[ \t#$]*)metastate (\w[\w-]*(?: .*)?)$", lines, re.M)
    quoted = re.findall(r"`(?:python -m )?metastate\s+(\w[\w-]*\s[^`]*)`", lines)
    quoted = [
        re.sub(r"\s+(?:# +)?|[][]", " ", q) for q in quoted
    ]  # [an option that may be left out]
    return [*shown, *(q for q in quoted if not re.fullmatch(r"\S+ --[\w-]+", q))]


def test_commands_are_found_where_pages_show_them():
    text = """
    $ metastate train --a \\
    #     --b 1  # why
    torchrun -n 2 -m metastate eval x
    metastate doctor
    metastate doctor: OK | `metastate grow --c`, `metastate
    prepare [--d 2] y` and `metastate chat`
    """
    assert [shlex.split(c, comments=True) for c in commands_of(text)] == [
        ["train", "--a", "--b", "1"],
        ["eval", "x"],
        ["doctor"],
        ["prepare", "--d", "2", "y"],
    ]


RECIPES = sorted(path for path in (ROOT / "recipes").iterdir() if path.is_file())


@pytest.mark.parametrize("page", [*PAGES, *RECIPES], ids=lambda p: p.name)
def test_commands_parse(page):
    """Every command that a page or a recipe shows is accepted by the parser."""
    from metastate.cli import build_parser
    from metastate.errors import ConfigError

    commands = commands_of(page.read_text(encoding="utf-8"))
    assert len(commands) >= (6 if page.name == "README.md" else 0)
    for command in commands:
        try:
            _, unknown = build_parser()[0].parse_known_args(shlex.split(command, comments=True))
        except ConfigError as error:
            pytest.fail(f"{command}: {error}")
        assert not unknown, command
