"""The adapters benchmark on made-up sentences and a small network: resumes, stores, reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.adapters import report, train
from benchmarks.adapters.data import load
from benchmarks.adapters.methods import METHODS, Method
from benchmarks.adapters.train import Recipe, run
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
        for ids, mask, label in zip(group.ids, group.mask, group.labels, strict=True)
    }
    for group in nested.train:
        for ids, mask, label in zip(group.ids, group.mask, group.labels, strict=True):
            assert (tuple(ids[: int(mask.sum())].tolist()), int(label)) in kept
    assert [len(g.labels) for g in data.test] == [len(g.labels) for g in nested.test]


def test_runs_are_measured_reported_and_not_repeated(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load(file, 20, tokens)
    built: list[Method] = []

    def counted(method: Method, num_classes: int) -> RIDEWrapper:
        built.append(method)
        return build(method, num_classes)

    monkeypatch.setattr(train, "build", counted)
    out, cache = tmp_path / "runs", tmp_path / "cache"
    names = ("head", "one_rank8", "three_rank8_official")
    for _ in range(2):
        for name in names:
            run(name, 0, 20, data, Recipe(lr=0.05), out, cache)
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
    text = report.write(out)
    assert "Imbalance 20" in text
    assert all(f"| {name} | 1 |" in text for name in names)
