"""Every recipe runs as it stands; what each stage may not touch stays as it was."""

import argparse
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
ROWS = {
    "ldam_drw": ["LDAM-DRW", "RIDE, no diversity", "RIDE"],
    "crt": ["plain backbone", "plain backbone, cRT", "RIDE", "RIDE, cRT"],
    "decoupling": ["plain backbone", "plain backbone, tau", "RIDE", "RIDE, tau", "RIDE, LWS"],
    "distillation": ["teacher, 6 experts", "3 experts alone", "3 experts, taught"],
    "balanced_softmax": [
        "plain backbone",
        "plain backbone, balanced softmax",
        "RIDE, adjusted by 1, 1, 1",
        "RIDE, adjusted by 1, 0, 2",
    ],
    "adapters": ["one adapter of rank 6", "three experts, adapters of rank 2"],
    "mixup": ["plain backbone, mixup", "RIDE, mixup"],
}


@pytest.mark.parametrize("name", ROWS)
def test_recipe_prints_its_table(name):
    result = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", "--seeds", "1", "--epochs", "1"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.strip("| ").split("|") for line in result.stdout.splitlines()][2:]
    assert [row[0].strip() for row in rows] == ROWS[name]
    for row in rows:
        values = [float(cell.split("+-")[0]) for cell in row[1:]]
        assert len(values) == 4
        assert all(0 <= value <= 100 for value in values)
        assert values[3] > 0  # overall


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _recipes
    import crt
    import decoupling
    import distillation
    from _data import long_tailed_digits

    digits = long_tailed_digits(0)
    torch.manual_seed(0)
    loader, balanced = _recipes.loaders(digits)
    return argparse.Namespace(
        crt=crt,
        decoupling=decoupling,
        distillation=distillation,
        digits=digits,
        loader=loader,
        balanced=balanced,
        counts=digits.train.class_counts,
    )


def test_retraining_changes_the_classifiers_and_nothing_else(recipe):
    model = recipe.crt.train_experts(recipe.loader, 1, recipe.counts)
    before = copy.deepcopy(model.state_dict())
    recipe.crt.retrain_classifiers(model, recipe.balanced, 1)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"experts.{k}.linear.{n}" for k in range(3) for n in ("weight", "bias")}


def test_tau_is_the_best_on_held_out_images_and_the_model_stays(recipe):
    model = recipe.crt.train_experts(recipe.loader, 2, recipe.counts)
    before = copy.deepcopy(model.state_dict())
    tau = recipe.decoupling.choose_tau(model, recipe.digits.calibration)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    x, y = recipe.digits.calibration.tensors

    def accuracy(power):
        weights = [e.linear.weight for e in model.experts]
        scaled = [w / w.norm(dim=1, keepdim=True) ** power for w in weights]
        state = model.run_trunk(x)
        features = [model.run_expert(k, state)[1] for k in range(3)]
        logits = sum(f @ w.T for f, w in zip(features, scaled, strict=True))
        return (logits.argmax(dim=1) == y).float().mean().item()

    with torch.no_grad():
        assert accuracy(tau) == max(accuracy(t) for t in recipe.decoupling.TAUS)


def test_the_teacher_stays_as_it_was(recipe):
    teacher = recipe.distillation.train_experts(2, recipe.loader, 1, recipe.counts)
    before = copy.deepcopy(teacher.state_dict())
    recipe.distillation.train_experts(2, recipe.loader, 1, recipe.counts, teacher=teacher)
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not teacher.training
