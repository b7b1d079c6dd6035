"""Issue forms, as far as GitHub's rules for them can be checked without a network."""

from __future__ import annotations

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
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"][2:]]
    assert commands == [".ci/run"]
    assert (GITHUB.parent / ".ci" / "run").stat().st_mode & 0o111
