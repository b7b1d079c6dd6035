"""The CIFAR benchmark on a handful of digits: resumes after a kill, runs second stages, reports."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
digits = pytest.importorskip("sklearn.datasets").load_digits()

from benchmarks.cifar import report  # noqa: E402
from benchmarks.cifar.data import Split, load  # noqa: E402
from benchmarks.cifar.train import Recipe, Run  # noqa: E402

COUNTS = (12, 9, 7, 6, 5, 4, 3, 3, 2, 2)
RECIPE = Recipe(epochs=2, batch_size=16)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, Split, torch.Tensor]:
    images = np.kron(digits.images, np.ones((4, 4)))[..., None].repeat(3, -1) * 15
    chosen, rest = [], []
    for label, count in enumerate(COUNTS):
        rows = np.flatnonzero(digits.target == label)
        chosen += rows[:count].tolist()
        rest += rows[count : count + 5].tolist()
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(
        file,
        train_images=images[chosen].astype(np.uint8),
        train_labels=digits.target[chosen],
        test_images=images[rest].astype(np.uint8),
        test_labels=digits.target[rest],
    )
    return load(file, 0, torch.device("cpu"))


class Killed(Exception):
    pass


def test_a_killed_run_goes_on_as_if_nothing_had_happened(data, tmp_path, monkeypatch) -> None:
    whole = Run("ride2_official", 3, RECIPE, data, tmp_path / "whole")
    whole.folder.mkdir()
    whole._first_stage()

    save = Run._save

    def killed(self: Run, epoch: int, *rest: object) -> None:
        save(self, epoch, *rest)
        raise Killed

    part = Run("ride2_official", 3, RECIPE, data, tmp_path / "part")
    part.folder.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", killed)
        with pytest.raises(Killed):
            part._first_stage()
    again = Run("ride2_official", 3, RECIPE, data, tmp_path / "part")
    again._first_stage()
    expected = whole.model.state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in again.model.state_dict().items())
    assert not all(torch.equal(v, expected[k]) for k, v in part.model.state_dict().items())


def test_methods_with_a_second_stage_share_the_first_and_change_classifiers_only(
    data, tmp_path
) -> None:
    for name in ("crt", "tau_norm", "ride3_crt"):
        Run(name, 0, RECIPE, data, tmp_path).execute()
    weights = {
        name: torch.load(tmp_path / f"{name}-seed0-model.pth", weights_only=True)
        for name in ("ce", "crt", "tau_norm", "ride3_ce_no_diversity", "ride3_crt")
    }
    for name, first in (
        ("crt", "ce"),
        ("tau_norm", "ce"),
        ("ride3_crt", "ride3_ce_no_diversity"),
    ):
        changed = {k for k, v in weights[name].items() if not torch.equal(v, weights[first][k])}
        assert all("linear" in key for key in changed), name
        assert changed or name == "tau_norm"  # a power of zero changes nothing
    done = json.loads((tmp_path / "ride3_crt-seed0.json").read_text())
    assert len(done["experts"]) == 3
    assert set(done["routed"]) == {
        "router at 1.1 x",
        "router at 0.5",
        "max_probability at 1.1 x",
        "margin at 1.1 x",
    }
    budget = 1.1 * json.loads((tmp_path / "ce-seed0.json").read_text())["flops"]
    assert done["routed"]["router at 1.1 x"]["flops"] <= 1.5 * budget
    text = report.write(tmp_path)
    assert all(f"| {name} |" in text for name in ("ce", "crt", "tau_norm", "ride3_crt"))
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_adjusted_experts_compare_what_their_criteria_see(data, tmp_path) -> None:
    run = Run("ride3_adjusted_paper", 0, RECIPE, data, tmp_path)
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    prior = (counts / counts.sum()).log()
    torch.testing.assert_close(run.prior, torch.stack([0 * prior, prior, 2 * prior]))
    assert run.execute()["mean_experts"] == 3
