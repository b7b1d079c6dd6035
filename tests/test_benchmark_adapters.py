"""The adapters benchmark on made-up sentences and a small network: resumes, stores, reports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.adapters import images, report
from benchmarks.adapters.data import Data, Group, load
from benchmarks.adapters.methods import METHODS, Method
from benchmarks.adapters.train import Recipe, Task, run, store
from ride_plugin import RIDEWrapper
from tests.adapters import LowRank

CLASSES = 4


class Words(nn.Module):
    """Mean of word vectors, two layers, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8)
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).float()
        pooled = (self.embedding(input_ids) * weight).sum(1) / weight.sum(1)
        return self.head(self.layers(pooled))


def build(method: Method, num_classes: int) -> RIDEWrapper:
    assert num_classes == CLASSES
    network = Words().requires_grad_(False)
    if method.rank:
        network.layers[2] = LowRank(network.layers[2], method.rank)
    network.head.requires_grad_(True)
    ids = torch.randint(0, 30, (2, 6))
    return RIDEWrapper(
        network,
        method.num_experts,
        fork_at="layers.2" if method.rank else "head",
        init="copy",
        example_input={"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    )


def tokens(text: str) -> dict[str, list[int]]:
    return {"input_ids": [int(word) for word in text.split()]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)

    def pairs(each: int) -> list[tuple[str, int]]:
        made = []
        for label in range(CLASSES):
            for _ in range(each):
                length = int(torch.randint(3, 15, (1,), generator=generator))
                words = torch.randint(0, 7, (length,), generator=generator) + 7 * label
                made.append((" ".join(map(str, words.tolist())), label))
        return made

    content = {"classes": list("abcd"), "train": pairs(100), "val": pairs(5), "test": pairs(6)}
    written = tmp_path / "clinc150.json"
    written.write_text(json.dumps(content))
    return written


def test_the_tail_is_that_of_the_formula_and_sentences_keep_their_words(file: Path) -> None:
    data = load(file, 20, tokens)
    counts = [int(100 * (1 / 20) ** (c / 3)) for c in range(CLASSES)]
    assert data.class_counts == counts
    labels = torch.cat([group.labels for group in data.train])
    assert labels.bincount().tolist() == counts
    nested = load(file, 100, tokens)
    kept = {
        (tuple(ids[: int(mask.sum())].tolist()), int(label))
        for group in data.train
        for ids, mask, label in zip(*group.inputs.values(), group.labels, strict=True)
    }
    for group in nested.train:
        for ids, mask, label in zip(*group.inputs.values(), group.labels, strict=True):
            assert (tuple(ids[: int(mask.sum())].tolist()), int(label)) in kept
    assert [len(g.labels) for g in data.test] == [len(g.labels) for g in nested.test]


class HidesOnDemand(Words):
    """As transformers have it: a mask that hides nothing is not used."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        if not attention_mask.all():
            x = x * attention_mask.unsqueeze(-1)
        return self.head(self.layers(x.sum(1)))


@pytest.mark.parametrize("number", [33, 1699])
def test_a_few_last_sentences_of_one_length_are_stored_with_others(
    number: int, tmp_path: Path
) -> None:
    ids, mask = torch.randint(0, 30, (number, 6)), torch.ones(number, 6, dtype=torch.int64)
    mask[: number - 3 : 2, 4:] = 0  # the last sentences hide nothing
    network = HidesOnDemand().requires_grad_(False)
    network.head.requires_grad_(True)
    inputs = {"input_ids": ids, "attention_mask": mask}
    model = RIDEWrapper(network, 1, fork_at="layers.2", example_input=inputs).eval()
    group = Group(inputs, torch.zeros(number, dtype=torch.int64))
    stored = store(model, Data([group], [], [], [number]), tmp_path / "states.pt")
    torch.testing.assert_close(model(stored.train[0][0]), model(**inputs))


def test_runs_are_measured_reported_and_not_repeated(file: Path, tmp_path: Path) -> None:
    data = load(file, 20, tokens)
    built: list[Method] = []

    def counted(method: Method, num_classes: int) -> RIDEWrapper:
        built.append(method)
        return build(method, num_classes)

    task = Task(METHODS, counted, many=50, few=10)
    out, cache = tmp_path / "runs", tmp_path / "cache"
    names = ("head", "one_rank8", "three_rank8_official")
    for _ in range(2):
        for name in names:
            run(task, name, 0, 20, data, Recipe(lr=0.05), out, cache)
    assert built == [METHODS[name] for name in names]
    assert len(list(cache.iterdir())) == 2  # the trunk of the head alone, and that of all adapters
    results = {
        name: json.loads((out / f"{name}-imbalance20-seed0.json").read_text()) for name in names
    }
    own = 8 * 8 + 8 * 8 + 8 * CLASSES + CLASSES
    assert results["one_rank8"]["trainable_parameters"] == own
    assert results["three_rank8_official"]["trainable_parameters"] == 3 * own
    assert results["one_rank8"]["accuracy"]["overall"] > 0.6  # words tell the class
    exits = results["three_rank8_official"]["exits"]
    assert set(exits) == {"margin", "router"}
    assert all(1 <= e["mean_experts"] <= 3 for e in exits.values())
    text = report.write(out, METHODS)
    assert "Imbalance 20" in text
    assert all(f"| {name} | 1 |" in text for name in names)


class Features(nn.Module):
    """As the pretrained images' network lays out its parts, of two blocks and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks = nn.ModuleList(FeatureBlock() for _ in range(images.FIRST_BLOCK + 1))
        self._conv_head = nn.Conv2d(3, 6, 1, bias=False)
        self._fc = nn.Linear(6, 10)

    def extract_features(self, x: Tensor) -> Tensor:
        for block in self._blocks:
            x = block(x)
        return self._conv_head(x).relu()


class FeatureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._expand_conv = nn.Conv2d(3, 5, 1, bias=False)
        self._project_conv = nn.Conv2d(5, 3, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self._project_conv(self._expand_conv(x).relu())


def test_images_are_made_long_tailed_mirrored_and_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    train_labels, test_labels = np.repeat(np.arange(CLASSES), 30), np.repeat(np.arange(CLASSES), 9)

    def drawn(labels: np.ndarray) -> np.ndarray:
        pixels = generator.integers(0, 60, (len(labels), 4, 4, 3))
        for label in range(3):  # a colour for each class but the last
            pixels[labels == label, :, :, label] += 180
        return pixels.astype(np.uint8)

    file = tmp_path / "images.npz"
    np.savez(
        file,
        train_images=drawn(train_labels),
        train_labels=train_labels,
        test_images=drawn(test_labels),
        test_labels=test_labels,
    )
    data = images.load(file, 10)
    assert data.class_counts == [int(30 * 0.1 ** (c / 3)) for c in range(CLASSES)]
    pixels, labels = data.train[0].inputs["images"], data.train[0].labels
    plain, mirrored = pixels.chunk(2)
    assert torch.equal(mirrored, plain.flip(3))
    assert not torch.equal(mirrored, plain)
    assert labels.bincount().tolist() == [2 * count for count in data.class_counts]
    assert torch.equal(data.test[0].labels, torch.from_numpy(test_labels))
    shorter = tmp_path / "shorter.npz"  # a tail of imbalance 3
    kept = np.concatenate([np.flatnonzero(train_labels == c)[: 30 // (1 + c)] for c in range(3)])
    arrays = {**np.load(file), "train_images": drawn(train_labels[kept])}
    np.savez(shorter, **{**arrays, "train_labels": train_labels[kept]})
    with pytest.raises(ValueError, match=r"imbalance 2, but its own is 3"):
        images.load(shorter, 2)

    monkeypatch.setattr(images, "pretrained", lambda: Features().requires_grad_(False).eval())
    monkeypatch.setattr(images, "SIZE", 8)
    methods = {"one": Method(3, epochs=4), "three": Method(1, 3, (1.0, 1.0, 1.0), epochs=4)}
    task = Task(methods, images.build, many=20, few=5)
    for name in methods:
        run(task, name, 0, 10, data, Recipe(lr=0.05), tmp_path / "out", tmp_path / "cache")
    results = {
        name: json.loads((tmp_path / f"out/{name}-imbalance10-seed0.json").read_text())
        for name in methods
    }
    layers = 2 * (3 + 5) + (3 + 6)  # of rank one: two in the block, the last
    assert results["one"]["trainable_parameters"] == 3 * layers + 6 * CLASSES
    assert results["three"]["trainable_parameters"] == 3 * layers + 3 * 6 * CLASSES
    assert results["three"]["accuracy"]["overall"] > 0.6
    assert "exits" not in results["three"]  # nothing was held out to choose thresholds on
    assert "| three | 1 |" in report.write(tmp_path / "out", methods)
