"""The README and docs hold together: links lead somewhere, every page is listed."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CHANGELOG.md", *PAGES]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_relative_links_lead_to_files(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    missing = [t for t in targets if "://" not in t and not (path.parent / t).exists()]
    assert missing == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_anchors_lead_to_headings(path: Path) -> None:
    for name, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]*)\)", path.read_text()):
        target = path.parent / name if name else path
        headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert anchor in slugs, f"{name}#{anchor}"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_few_shot_accuracy_stands_beside_the_method(path: Path) -> None:
    """Where a phone cuts a wide table, the column that matters most is the last to go."""
    for heading in re.findall(r"^\|.*\|$(?=\n\|[ :|-]+\|$)", path.read_text(), flags=re.MULTILINE):
        columns = [column.strip() for column in heading[1:-1].split("|")]
        if {"few", "medium", "many"} <= set(columns):
            assert columns[1:4] == ["few", "medium", "many"]


def test_the_navigation_lists_every_page() -> None:
    settings = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"- (?:\w+: )?(\S+\.md)$", settings, flags=re.MULTILINE)
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES]
    assert sorted(listed) == sorted(pages)


def test_the_reference_has_every_public_name() -> None:
    import ride_plugin

    shown = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in PAGES), flags=re.M))
    shown = {name.rsplit(".", 1)[1] for name in shown}
    faces = (ride_plugin, ride_plugin.functional, ride_plugin.longtail, ride_plugin.routing)
    public = {name for face in faces for name in face.__all__}
    aliases = {"Form", "__version__", "functional", "longtail", "routing"}
    assert public - shown == aliases


def test_each_readme_command_is_one_line_that_pins_versions() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        (line,) = block.splitlines()
        assert line.startswith("pip install -c constraints.txt ")


def test_torch_is_pinned_to_the_version_the_readme_states() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    (torch,) = [pin for pin in pins if pin.startswith("torch==")]
    assert f"torch {torch.removeprefix('torch==')}" in (ROOT / "README.md").read_text()


def test_the_readme_uses_the_packages_public_names_only() -> None:
    import ride_plugin

    text = (ROOT / "README.md").read_text()
    for imported in re.findall(r"from ride_plugin import (.*)", text):
        assert {name.strip() for name in imported.split(",")} <= set(ride_plugin.__all__)


def test_the_badges_say_what_the_metadata_says() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    options = settings["options"]
    torch = re.search(r"^torch>=(\S+)$", options["install_requires"], flags=re.MULTILINE)
    assert torch is not None
    said = {
        "python": f"{options['python_requires'].removeprefix('>=')} and later",
        "torch": f"{torch[1]} and later",
        "license": settings["metadata"]["license"],
        "typed": "mypy --strict",
    }
    shown = re.findall(r"\(\.github/badges/(\w+)\.svg\)", (ROOT / "README.md").read_text())
    assert sorted(shown) == sorted(said)
    for name, words in said.items():
        assert f"{name}: {words}" in (ROOT / ".github" / "badges" / f"{name}.svg").read_text()
