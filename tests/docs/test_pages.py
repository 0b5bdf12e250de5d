"""The pages say what is: links lead somewhere, commands, settings, variables and error codes exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

from marginalia.cli import app
from serving.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOW = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is gone, too
named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def commands(text: str) -> list[list[str]]:
    """The words of each command line in the page's code blocks, comments apart."""
    lines = [line for kind, block in BLOCK.findall(text) if kind in ("", "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if re.match(r"(marginalia|make|dvc|python) ", line)]


@named
def test_links_of_a_page_lead_to_files(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    for link in links:
        if not link.startswith(("http://", "https://")):
            assert (page.parent / link).exists(), link


@named
def test_commands_of_a_page_exist_with_their_options(page):
    group = typer.main.get_command(app)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for words in commands(page.read_text()):
        if words[0] == "marginalia":
            command = group.commands[words[1]]
            known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            for word in words[2:]:
                assert not word.startswith("--") or word.partition("=")[0] in known, words
        elif words[0] == "make":
            assert words[1] in targets, words
        elif words[0] == "python":
            assert (ROOT / words[1]).is_file(), words


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_settings_of_a_page_exist(page):
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())
    sections = "|".join(shipped)
    for dotted in re.findall(rf"`((?:{sections})(?:\.[a-z0-9_]+)+)(?::[^`]*)?`", page.read_text()):
        value = shipped
        for key in dotted.split("."):
            if dotted.endswith((".json", ".yaml", ".md", ".py")):
                break  # a file
            assert key in value, dotted
            value = value[key]


@pytest.mark.parametrize("page", NOW, ids=lambda page: str(page.relative_to(ROOT)))
def test_variables_of_a_page_exist(page):
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    found = re.findall(rf"\b{PREFIX}[A-Z_]+\b", page.read_text())
    assert set(found) <= known


def test_every_code_of_a_refused_file_is_explained():
    """Codes as the sources give them to `Refused` and to the quarantine."""
    source = "\n".join(file.read_text() for file in (ROOT / "pipeline").rglob("*.py"))
    given = set(re.findall(r'Refused\(\s*f?"([a-z]+(?:-[a-z0-9]+)*)"', source))
    assert len(given) > 15
    page = (ROOT / "docs/troubleshooting.md").read_text()
    assert {code for code in given if f"`{code}`" not in page} == set()


def test_every_page_is_built_without_a_warning(tmp_path):
    """--strict: a page outside the navigation, or a link or anchor that is not there, ends with an error."""
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    settings = (tmp_path / "site/settings/index.html").read_text()
    assert "train.s4mc.alpha" in settings
    assert "{{" not in re.sub(r"<script.*?</script>", "", settings, flags=re.DOTALL)
