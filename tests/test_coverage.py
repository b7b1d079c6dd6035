"""A dozen architectures, each hard to split in its own way, through every check of the zoo."""

from __future__ import annotations

import pytest

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.checks import CHECKS
from benchmarks.coverage.compare import NotApplicable
from benchmarks.coverage.subject import Subject
from benchmarks.zoo.models import MODELS

_NOT_PICKLED = {"cifar_resnet32_option_a"}  # a closure inside the backbone
_ONE_SIZE = {"late_class_token"}


@pytest.fixture(scope="module", params=list(MODELS))
def subject(request: pytest.FixtureRequest) -> Subject:
    build, hard = MODELS[request.param]
    return Subject(Architecture(request.param, "hand-made", build, hard))


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "compile"])
@pytest.mark.filterwarnings("ignore:Not re-initialised")
@pytest.mark.filterwarnings("ignore:In training the backbone returns more")  # auxiliary heads do
def test_the_wrapped_model_is_the_backbone(subject: Subject, check: str) -> None:
    name = subject.architecture.name
    try:
        CHECKS[check](subject)
    except NotApplicable as reason:
        expected = {"pickle": _NOT_PICKLED, "sizes": _ONE_SIZE}.get(check, set())
        assert name in expected, reason
