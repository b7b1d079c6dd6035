"""Architectures of transformers, small and without weights."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.environment import let_torchvision_import

_TEXT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 99}
_TEXT |= {"intermediate_size": 64, "pad_token_id": 0}
_VISION = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
_VISION |= {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
_STAGES: dict[str, Any] = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]}

_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bert": ("SequenceClassification", _TEXT),
    "Roberta": ("SequenceClassification", _TEXT | {"pad_token_id": 1}),
    "Electra": ("SequenceClassification", _TEXT | {"embedding_size": 16}),
    "Albert": ("SequenceClassification", _TEXT | {"embedding_size": 16}),
    "DistilBert": (
        "SequenceClassification",
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "vocab_size": 99},
    ),
    "MPNet": ("SequenceClassification", _TEXT),
    "GPT2": (
        "SequenceClassification",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 99, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "XLMRoberta": ("SequenceClassification", _TEXT | {"pad_token_id": 1}),
    "ViT": ("ImageClassification", _VISION),
    "DeiT": ("ImageClassification", _VISION),
    "Beit": ("ImageClassification", _VISION | {"use_relative_position_bias": True}),
    "Dinov2": ("ImageClassification", _VISION),
    "ConvNextV2": ("ImageClassification", _STAGES),
    "ResNet": ("ImageClassification", _STAGES | {"embedding_size": 16}),
    "RegNet": ("ImageClassification", _STAGES | {"embedding_size": 16, "groups_width": 8}),
    "Swin": (
        "ImageClassification",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2, 2], "window_size": 4}
        | {"num_heads": [2, 2, 4]},
    ),
    "MobileViT": (
        "ImageClassification",
        {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 24, 32, 40, 40]}
        | {"image_size": 64, "num_attention_heads": 4},
    ),
    "PoolFormer": ("ImageClassification", {"hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4}),
    "Segformer": (
        "ImageClassification",
        {"hidden_sizes": [16, 24, 32, 40], "depths": [1] * 4, "image_size": 64}
        | {"num_attention_heads": [1, 1, 2, 4], "decoder_hidden_size": 32},
    ),
    "Wav2Vec2": (
        "SequenceClassification",
        {k: v for k, v in _TEXT.items() if k != "pad_token_id"}
        | {"conv_dim": [16] * 3, "conv_stride": [4] * 3, "conv_kernel": [8] * 3}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
        | {"classifier_proj_size": 16, "num_feat_extract_layers": 3, "mask_time_prob": 0.0},
    ),
}
_HARD = {
    "Albert": "one block's parameters used by every layer",
    "Wav2Vec2": "audio; layer drop",
    "GPT2": "the last token that is no padding, by input ids",
    "Beit": "relative position bias",
}


def architectures() -> Iterator[Architecture]:
    """List them; transformers is imported when one is built."""
    for name, (task, config) in _CONFIGS.items():
        yield Architecture(
            f"{name}For{task}",
            "transformers",
            partial(_build, name, task, config),
            _HARD.get(name, "dataclass output, keyword inputs"),
            name in ("Bert", "ViT"),
        )


def _build(name: str, task: str, options: dict[str, Any]) -> nn.Module:
    let_torchvision_import()
    import transformers

    config = getattr(transformers, f"{name}Config")(**options, num_labels=10)
    return getattr(transformers, f"{name}For{task}")(config)
