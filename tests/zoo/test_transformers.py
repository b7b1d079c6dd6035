"""Networks of transformers and timm, made small: each expert trains as a copy of its own.

They are skipped where the packages are absent; docs/how-to/training-stacks.md has an environment.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.coverage.environment import let_torchvision_import
from ride_plugin import RIDEWrapper
from tests.naive import train_both

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="needs timm")
transformers = pytest.importorskip("transformers")
let_torchvision_import()

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = {"vocab_size": 60, "pad_token_id": 0, "num_labels": 5}
DECODER = {
    **SMALL,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {**DECODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
del BERT["num_key_value_heads"]


class Pooled(nn.Module):
    """A body without a classifier of its own, and one on the mean of its hidden states."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.score = body, nn.Linear(32, 5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        masked = {} if attention_mask is None else {"attention_mask": attention_mask}
        hidden = self.body(input_ids, **masked).last_hidden_state
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.score((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))


def made(name: str, kind: str = "ForSequenceClassification", **options: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**options)
    if hasattr(transformers, name + kind):
        return getattr(transformers, name + kind)(config)
    return Pooled(getattr(transformers, f"{name}Model")(config))


def tokens(rows: int, length: int = 9, padded: int = 0) -> tuple[tuple[()], dict[str, Tensor]]:
    """A batch in which row k ends in k tokens of padding, up to ``padded``."""
    ids = torch.randint(3, 60, (rows, length))
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, length - min(row, padded) :] = 0
    return (), {"input_ids": ids * mask, "attention_mask": mask}


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "Llama": lambda: made("Llama", **DECODER),
    "Gemma": lambda: made("Gemma", **DECODER, head_dim=8),
    "Qwen2": lambda: made("Qwen2", **DECODER),
    "Phi": lambda: made("Phi", **DECODER),
    "Olmo": lambda: made("Olmo", **DECODER, eos_token_id=1, bos_token_id=2),
}


@pytest.mark.parametrize("first", ["padded", "whole"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_with_grouped_queries(kind: str, first: str) -> None:
    net = DECODERS[kind]()
    example = tokens(2, padded=3 if first == "padded" else 0)[1]
    model = RIDEWrapper(net, 3, init="copy", example_input=example, logits="logits")
    batches = [tokens(4, padded=3), tokens(4), tokens(3, 12, 4), tokens(5, 7, 2)]
    train_both(net, model, batches, lr=0.01, tolerance=1e-4)


GPT2 = {"n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}


@pytest.mark.parametrize("kind", ["GPT2", "Llama"])
def test_classifiers_of_every_token_are_made_anew(kind: str) -> None:
    net = made("GPT2", **SMALL, **GPT2) if kind == "GPT2" else DECODERS[kind]()
    model = RIDEWrapper(net, 3, init="copy", num_classes=11, logits="logits").eval()
    assert (model.classifier_name, model.feature_dim) == ("score", 32)
    first, second, _ = model.classifiers
    assert not torch.equal(first.weight, second.weight)
    assert [expert.config.num_labels for expert in model.experts] == [11] * 3
    _, batch = tokens(4, padded=3)
    got = model.router_inputs(**batch)
    for index, plain in enumerate(model.to_modules()):
        hidden = plain.base_model(**batch).last_hidden_state
        last = torch.stack([row[8 - k] for k, row in enumerate(hidden)])
        torch.testing.assert_close(got.expert_features[:, index], last)
        torch.testing.assert_close(got.expert_logits[:, index], plain(**batch).logits)
    cosine = RIDEWrapper(net, 2, classifier="cosine", logits="logits").classifiers
    assert [type(head).__name__ for head in cosine] == ["CosineClassifier"] * 2


@pytest.mark.parametrize("first", ["padded", "whole"])
@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_narrowed(kind: str, first: str) -> None:
    example = tokens(2, padded=3 if first == "padded" else 0)[1]
    model = RIDEWrapper(
        DECODERS[kind](), 3, expert_width=0.5, example_input=example, logits="logits"
    )
    for _, batch in (tokens(4, padded=3), tokens(4), tokens(3, 12, 4)):
        out = model.train()(**batch)
        nn.functional.cross_entropy(out, torch.arange(len(out)) % 5).backward()
        got = model.eval().router_inputs(**batch).expert_logits
        for index, plain in enumerate(model.to_modules()):
            expected = plain.eval()(**batch)
            expected = getattr(expected, "logits", expected)
            torch.testing.assert_close(got[:, index], expected, rtol=1e-4, atol=1e-4)
        with model.evaluating(), torch.no_grad():
            some = model.run_trunk(**batch).select(torch.tensor([2, 0]))
            rows, _ = model.run_expert(1, some)
        torch.testing.assert_close(rows, got[[2, 0], 1], rtol=1e-4, atol=1e-4)


REFORMER = {
    **SMALL,
    "attn_layers": ["local", "lsh", "local"],
    "hidden_size": 32,
    "feed_forward_size": 64,
    "num_attention_heads": 2,
    "attention_head_size": 16,
    "axial_pos_embds_dim": (16, 16),
    "axial_pos_shape": (4, 4),
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "local_attention_probs_dropout_prob": 0.0,
    "lsh_attention_probs_dropout_prob": 0.0,
    "num_buckets": 2,
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "is_decoder": False,
    "hash_seed": 0,
    "classifier_dropout": 0.0,
    "use_cache": False,
}
CTRL = {"n_positions": 64, "n_embd": 32, "dff": 64, "n_layer": 3, "n_head": 4}
RWKV = {"context_length": 32, "hidden_size": 32, "num_hidden_layers": 3}
RWKV |= {"attention_hidden_size": 32, "intermediate_size": 64}

OTHERS: dict[str, tuple[Callable[[], nn.Module], int, str | None]] = {
    "CTRL": (lambda: made("CTRL", **SMALL, **CTRL, resid_pdrop=0.0, embd_pdrop=0.0), 9, None),
    "RWKV": (lambda: Pooled(made("Rwkv", "Model", vocab_size=60, **RWKV)), 9, None),
    "Reformer": (lambda: made("Reformer", **REFORMER), 16, None),
    "BERT, attentions": (
        lambda: made("Bert", **BERT, output_attentions=True, attn_implementation="eager"),
        9,
        None,
    ),
    "BERT, hidden states": (lambda: made("Bert", **BERT, output_hidden_states=True), 9, None),
    "BERT, embedding": (lambda: made("Bert", **BERT), 9, "bert.embeddings.word_embeddings"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_others(kind: str) -> None:
    make, length, fork_at = OTHERS[kind]
    net = make()

    def batch(rows: int) -> tuple[tuple[()], dict[str, Tensor]]:
        _, inputs = tokens(rows, length)
        if kind == "RWKV":
            del inputs["attention_mask"]
        return (), inputs

    model = RIDEWrapper(
        net, 3, init="copy", fork_at=fork_at, example_input=batch(2)[1], logits="logits"
    )
    train_both(net, model, [batch(4) for _ in range(3)], lr=0.01, tolerance=1e-4)


@needs_timm
def test_coat_keeps_every_name_and_every_expert_its_own() -> None:
    import timm

    options = {"num_classes": 5, "img_size": 64}
    net = timm.create_model("coat_tiny", **options).eval()
    x = torch.randn(2, 3, 64, 64)
    model = RIDEWrapper(net, 2, init="copy", example_input=x).eval()
    expected = model.router_inputs(x).expert_logits
    for index in range(2):
        again = timm.create_model("coat_tiny", **options).eval()
        again.load_state_dict(model.to_module(index).state_dict())
        torch.testing.assert_close(again(x), expected[:, index], rtol=1e-4, atol=1e-4)
