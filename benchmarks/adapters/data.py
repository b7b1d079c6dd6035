"""CLINC150 made long-tailed, as token ids in groups of similar length."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ride_plugin.longtail import long_tailed_counts

LENGTHS = (9, 11, 13, 16, 64)  # tokens; a group's sentences are padded to the longest among them


@dataclass(frozen=True)
class Group:
    """Samples of one shape: the network's arguments, ``[N, ...]`` each, and labels ``[N]``."""

    inputs: dict[str, Tensor]
    labels: Tensor


@dataclass(frozen=True)
class Data:
    """The long-tailed training samples, the balanced held-out (if any) and test samples."""

    train: list[Group]
    held_out: list[Group]
    test: list[Group]
    class_counts: list[int]


def load(file: Path, imbalance: float, tokenizer: Any) -> Data:
    """Read ``clinc150.json`` and keep a long tail of it, 100 sentences of the first class.

    Classes are ordered by one seeded shuffle, the same for every run, so the draws for several
    imbalances are nested. Held-out and test sentences are all kept: 20 and 30 a class.
    """
    content = json.loads(file.read_text())
    num_classes = len(content["classes"])
    order = np.random.default_rng(0).permutation(num_classes)
    rank = np.empty(num_classes, dtype=np.int64)
    rank[order] = np.arange(num_classes)
    counts = long_tailed_counts(num_classes, 100, imbalance)
    kept, seen = [], [0] * num_classes
    for text, label in _pairs(content, "train"):
        c = int(rank[label])
        if seen[c] < counts[c]:
            seen[c] += 1
            kept.append((text, c))
    held_out, test = (
        _groups([(text, int(rank[label])) for text, label in _pairs(content, part)], tokenizer)
        for part in ("val", "test")
    )
    return Data(_groups(kept, tokenizer), held_out, test, seen)


def _pairs(content: dict[str, Any], part: str) -> list[tuple[str, int]]:
    return [(text, label) for text, label in content[part]]


def _groups(pairs: list[tuple[str, int]], tokenizer: Any) -> list[Group]:
    tokens = [tokenizer(text)["input_ids"] for text, _ in pairs]
    groups = []
    for low, high in zip((0, *LENGTHS), LENGTHS, strict=False):
        rows = [i for i, ids in enumerate(tokens) if low < len(ids) <= high]
        if rows:
            padded = torch.nn.utils.rnn.pad_sequence(
                [torch.tensor(tokens[i]) for i in rows], batch_first=True
            )
            lengths = torch.tensor([len(tokens[i]) for i in rows])
            mask = (torch.arange(padded.shape[1]) < lengths.unsqueeze(1)).long()
            inputs = {"input_ids": padded, "attention_mask": mask}
            groups.append(Group(inputs, torch.tensor([pairs[i][1] for i in rows])))
    return groups
