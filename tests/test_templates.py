"""Issue forms, as far as GitHub's rules for them can be checked without a network."""

from __future__ import annotations

import configparser
import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="needs PyYAML, which the extra [docs] brings")

GITHUB = Path(__file__).resolve().parents[1] / ".github"
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS = {"checkboxes", "dropdown", "input", "textarea"}


@pytest.fixture(params=FORMS, ids=lambda path: path.stem)
def form(request: pytest.FixtureRequest) -> dict[str, Any]:
    return yaml.safe_load(request.param.read_text())


def test_a_form_has_what_github_asks_for(form: dict[str, Any]) -> None:
    assert set(form) <= {"name", "description", "title", "labels", "assignees", "body"}
    assert all(isinstance(form[key], str) and form[key] for key in ("name", "description"))
    assert {field["type"] for field in form["body"]} <= FIELDS | {"markdown"}
    assert any(field["type"] in FIELDS for field in form["body"])  # only markdown is refused


def test_fields_are_named_once_and_labelled_once(form: dict[str, Any]) -> None:
    fields = [field for field in form["body"] if field["type"] in FIELDS]
    for values in ([f["id"] for f in fields], [f["attributes"]["label"] for f in fields]):
        assert len(set(values)) == len(values)
        assert all(isinstance(value, str) and value for value in values)
    for field in fields:
        assert set(field) <= {"type", "id", "attributes", "validations"}
        assert set(field.get("validations", {})) <= {"required"}


def test_the_workflow_runs_what_a_developer_runs() -> None:
    workflow = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())
    jobs = workflow["jobs"]
    assert [step["run"] for step in jobs["ci"]["steps"][2:]] == [".ci/run"]
    assert (GITHUB.parent / ".ci" / "run").stat().st_mode & 0o111
    for job in jobs.values():
        assert [step["uses"].split("@")[0] for step in job["steps"][:2]] == [
            "actions/checkout",
            "actions/setup-python",
        ]


def test_the_workflow_runs_the_oldest_versions_that_are_supported() -> None:
    """constraints.txt needs Python 3.11, so tools/matrix.py makes that environment."""
    settings = configparser.ConfigParser()
    settings.read(GITHUB.parent / "setup.cfg")
    python = settings["options"]["python_requires"].removeprefix(">=")
    (torch,) = re.findall(r"torch>=(\S+)", settings["options"]["install_requires"])
    oldest = yaml.safe_load((GITHUB / "workflows" / "ci.yml").read_text())["jobs"]["oldest"]
    assert oldest["steps"][1]["with"]["python-version"] == python
    assert oldest["steps"][2]["run"].startswith(f"python tools/matrix.py {python}:{torch}.")
