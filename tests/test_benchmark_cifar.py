"""The CIFAR benchmark on a handful of digits: resumes after a kill, runs second stages, reports."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("matplotlib")
digits = pytest.importorskip("sklearn.datasets").load_digits()

from benchmarks.cifar import joined, plots, priors, report  # noqa: E402
from benchmarks.cifar.data import Split, augment_strongly, load  # noqa: E402
from benchmarks.cifar.evaluate import TAUS, by_tau  # noqa: E402
from benchmarks.cifar.methods import METHODS  # noqa: E402
from benchmarks.cifar.terms import BoundedDiversity, consistency  # noqa: E402
from benchmarks.cifar.train import Recipe, Run  # noqa: E402
from benchmarks.coverage.environment import let_torchvision_import  # noqa: E402
from ride_plugin import DiversityLoss, expert_logits  # noqa: E402

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


def write(file: Path, label_key: bytes, classes: int, each: int) -> np.ndarray:
    """A file in the data set's own format: rows of 3072 bytes, red first."""
    rng = np.random.default_rng(len(file.name))
    data = rng.integers(0, 256, (classes * each, 3072), dtype=np.uint8)
    content = {b"data": data, label_key: np.tile(np.arange(classes), each).tolist()}
    file.write_bytes(pickle.dumps(content))
    return data


@pytest.mark.parametrize("classes", [10, 100])
def test_the_standard_folders_are_read_and_made_long_tailed(classes: int, tmp_path) -> None:
    if classes == 100:
        parts = [write(tmp_path / "train", b"fine_labels", 100, 20)]
        pixels = write(tmp_path / "test", b"fine_labels", 100, 2)
    else:
        names = [f"data_batch_{i}" for i in range(1, 6)]
        parts = [write(tmp_path / name, b"labels", 10, 4) for name in names]
        pixels = write(tmp_path / "test_batch", b"labels", 10, 2)
    train, test, counts = load(tmp_path, 10, torch.device("cpu"))
    assert counts.tolist() == [int(20 * 0.1 ** (k / (classes - 1))) for k in range(classes)]
    assert torch.equal(train.labels.bincount(), counts)
    red_row = torch.from_numpy(pixels[3, :32])  # first row of the red plane of image 3
    assert torch.equal(test.images[3, 0, 0], red_row)
    assert test.labels[3] == 3
    known = {row.tobytes() for part in parts for row in part}
    assert all(image.numpy().tobytes() in known for image in train.images)


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


def test_averaged_weights_are_those_of_all_steps_and_survive_a_kill(data, tmp_path) -> None:
    recipe = replace(RECIPE, average=0.5)
    run = Run("ride2_official", 3, recipe, data, tmp_path)
    expected = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    steps = 0

    def average(*_: object) -> None:
        nonlocal steps
        share = 0.5 if steps else 0.0  # the first step's weights begin the mean
        for name, parameter in run.model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * parameter.detach()
        steps += 1

    hook = torch.optim.SGD.step
    with pytest.MonkeyPatch.context() as patch:

        def step(self: torch.optim.SGD, *rest: object) -> None:
            hook(self, *rest)
            average()

        patch.setattr(torch.optim.SGD, "step", step)
        run._first_stage()
    assert steps > 2
    assert run.averaged is not None
    averaged = dict(run.averaged.module.named_parameters())
    for name, parameter in expected.items():
        torch.testing.assert_close(averaged[name].detach(), parameter, rtol=1e-4, atol=1e-5)
    again = Run("ride2_official", 3, recipe, data, tmp_path)
    again._first_stage()  # nothing is left to do but to load
    assert again.averaged is not None
    for name, parameter in again.averaged.module.named_parameters():
        assert torch.equal(parameter, averaged[name])


def test_a_bounded_reward_is_the_papers_up_to_its_cap_and_flat_beyond() -> None:
    bounded, paper = BoundedDiversity([50, 20, 5]), DiversityLoss([50, 20, 5], form="paper")
    near = (0.1 * torch.randn(8, 3, 3)).requires_grad_()
    target = torch.randint(3, (8,))
    torch.testing.assert_close(bounded(near, target), paper(near, target))
    ours, theirs = (torch.autograd.grad(f(near, target), near)[0] for f in (bounded, paper))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    far = (30 * torch.eye(3).expand(8, 3, 3)).clone().requires_grad_()
    loss = bounded(far, target)
    torch.testing.assert_close(loss, torch.tensor(-0.2 * 3.0))  # three experts, 1 nat each
    assert torch.autograd.grad(loss, far)[0].abs().max() < 1e-6


def test_a_strong_view_is_taught_only_where_the_weak_one_is_right() -> None:
    weak, strong = torch.randn(2, 6, 3, 4, dtype=torch.float64).requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    expected = torch.zeros(())
    for expert in range(3):
        rows = [b for b in range(6) if weak[b, expert].argmax() == target[b]]
        for b in rows:
            p, q = weak[b, expert].softmax(0).detach(), strong[b, expert].softmax(0)
            expected = expected + (p * (p / q).log()).sum() / len(rows)
    found = consistency(weak, strong, target)
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    taught = torch.autograd.grad(found, strong, retain_graph=True)[0].abs().sum(-1) > 0
    assert torch.equal(taught, weak.argmax(-1) == target[:, None])
    nothing = consistency(weak, strong, (weak.argmax(-1)[:, 0] + 1) % 4)
    assert torch.isfinite(nothing)
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(found, weak)  # the teacher is constant


def test_strong_views_have_their_square_cut_out_and_both_views_train(data, tmp_path) -> None:
    let_torchvision_import()
    pytest.importorskip("torchvision")
    images = torch.full((64, 3, 32, 32), 200, dtype=torch.uint8)
    views = augment_strongly(images, torch.Generator().manual_seed(0))
    assert views.shape == images.shape
    assert views.dtype == torch.uint8
    black = (views == 0).all(1)
    assert bool((black.sum((1, 2)) >= 64).all())  # an 8 x 8 corner of the square at least
    assert not torch.equal(views[0], views[1])
    for name in ("ride3_balanced_official_strong", "ride3_balanced_official_views"):
        done = Run(name, 0, RECIPE, data, tmp_path).execute()
        assert done["mean_experts"] == 3


def test_experts_look_at_different_depths(data, tmp_path) -> None:
    run = Run("ride3_balanced_official_depths", 0, RECIPE, data, tmp_path)
    aligned = [expert.align for expert in run.model.experts]
    convolutions = [sum(isinstance(part, nn.Conv2d) for part in parts) for parts in aligned]
    assert convolutions == [2, 1, 2]
    run.model.eval()
    x = torch.randn(2, 3, 32, 32)
    before = expert_logits(run.model(x))
    with torch.no_grad():
        run.model.experts[1].align[0].weight.zero_()
    after = expert_logits(run.model(x))
    assert [bool((before[:, e] == after[:, e]).all()) for e in range(3)] == [True, False, True]
    run.execute()
    assert run.result_file.exists()


def test_a_joined_classifier_learns_what_no_expert_sees_alone() -> None:
    torch.manual_seed(0)
    bits = torch.randint(2, (400, 2))
    labels = 2 * bits[:, 0] + bits[:, 1]  # each expert's features hold one of two bits
    features = nn.functional.one_hot(bits, 2).float() + 0.1 * torch.randn(400, 2, 2)
    classifier = joined.fit(features, labels, torch.bincount(labels), seed=0)
    right = classifier(features.flatten(1)).argmax(1) == labels
    assert right.float().mean() > 0.95
    text = joined.table({"a": [features.flatten(1)] * 2}, labels, torch.tensor([120, 60, 30, 10]))
    assert text.splitlines()[0] == "| what decides | few | medium | many | overall |"
    assert "± 0.0" in text.splitlines()[2]


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
    assert len(list(tmp_path.glob("*.png"))) == 4  # no many-shot class, so no head and tail
    as_trained = [row for row in done["by_tau"] if row["tau"] == 0]
    assert as_trained == [{"tau": 0.0, **done["accuracy"]}]


def test_adjusted_experts_compare_what_their_criteria_see(data, tmp_path, monkeypatch) -> None:
    compared = []

    def keeping(self, logits, target):
        compared.append(logits.detach())
        return plain(self, logits, target)

    plain = DiversityLoss.forward
    monkeypatch.setattr(DiversityLoss, "forward", keeping)
    run = Run("ride3_adjusted_paper", 0, RECIPE, data, tmp_path)
    given = []
    run.model.register_forward_hook(lambda _, __, out: given.append(expert_logits(out).detach()))
    assert run.execute()["mean_experts"] == 3
    counts = torch.tensor(COUNTS, dtype=torch.float32)
    prior = (counts / counts.sum()).log()
    added = torch.stack([prior, 0 * prior, 2 * prior])
    assert compared
    torch.testing.assert_close(compared[0], given[0] + added)


def test_adjusting_after_training_trades_few_shot_for_many_shot_accuracy(tmp_path) -> None:
    counts = [200, 50, 5]
    labels = torch.arange(3).repeat(200)
    logits = torch.randn(600, 3) + torch.nn.functional.one_hot(labels, 3)
    curve = by_tau(logits, labels, counts)
    assert [row["tau"] for row in curve] == list(TAUS)
    many, few = ([row[split] for row in curve] for split in ("many", "few"))
    assert many == sorted(many, reverse=True)
    assert few == sorted(few)
    assert many[0] > many[-1]
    assert few[0] < few[-1]
    plots.head_and_tail({"ours": [{"by_tau": curve}]}, tmp_path / "drawn.png")
    absent = [{**row, "many": None} for row in curve]
    plots.head_and_tail({"ours": [{"by_tau": absent}]}, tmp_path / "not.png")
    assert [file.name for file in tmp_path.iterdir()] == ["drawn.png"]


def test_figures_name_every_method_in_words_of_its_own() -> None:
    words = [method.words for method in METHODS.values()]
    assert len(set(words)) == len(words)
    assert not any("_" in said for said in words)


def test_expert_weights_prefer_the_expert_whose_views_agree() -> None:
    torch.manual_seed(0)
    steady = torch.nn.functional.one_hot(torch.randint(4, (60,)), 4) * 4.0
    views = [
        torch.stack([torch.randn(60, 4) * 4, steady, torch.randn(60, 4) * 4], 1) for _ in range(2)
    ]
    weights = priors.expert_weights(*views)
    assert weights.sum().item() == pytest.approx(1)
    assert weights[1] > 0.9
    grid = torch.tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3], [0.6, 0.2, 0.2]])

    def agreement(weights: torch.Tensor) -> float:
        one, other = ((weights[:, None] * view).sum(1).softmax(1) for view in views)
        return float(torch.nn.functional.cosine_similarity(one, other).mean())

    assert all(agreement(weights) >= agreement(other) for other in grid)


def test_prior_table_has_a_row_for_each_test_set() -> None:
    torch.manual_seed(0)
    labels = torch.arange(4).repeat(10)
    brightness = labels * 60 + torch.randint(70, (40,))  # neighbouring classes overlap a little
    split = Split(brightness.byte()[:, None, None, None].repeat(1, 3, 32, 32), labels)
    plain = torch.nn.Sequential(torch.nn.AvgPool2d(32), torch.nn.Flatten(), torch.nn.Linear(3, 4))
    with torch.no_grad():
        plain[2].weight.copy_(torch.arange(4.0)[:, None].expand(4, 3) / 3)
        plain[2].bias.copy_(-((torch.arange(4.0) - 1.5) ** 2) / 2)
    lines = priors.table(plain, split, torch.tensor([100, 50, 10, 2]))
    rows = [line for line in lines if line.startswith("|")][2:]
    assert len(rows) == len(priors.SHIFTS)
    assert all(row.count("|") == 7 for row in rows)
    assert [row for row in rows if row.startswith("| uniform")]
