"""Architectures of timm."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from benchmarks.coverage.architecture import Architecture
from benchmarks.coverage.environment import let_torchvision_import

_CONVOLUTIONAL = [
    "resnet18 resnet26d seresnet18 skresnet18 resnest14d res2net50_26w_4s resnetv2_18",
    "densenet121 dla34 hrnet_w18_small vgg11 ese_vovnet19b_dw cspresnet50 cspdarknet53 selecsls42",
    "efficientnet_b0 efficientnet_lite0 efficientnetv2_rw_t mixnet_s mnasnet_small mobilenetv2_050",
    "mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 repvgg_a0 ghostnet_050 lcnet_050",
    "ghostnetv2_100 fbnetc_100 tinynet_e regnetx_002 regnety_002 rexnet_100 gernet_s nf_regnet_b0",
    "convnext_atto convnextv2_atto convmixer_1024_20_ks9_p14 inception_next_atto hgnetv2_b0",
    "rdnet_tiny starnet_s1 mambaout_femto repghostnet_050 edgenext_xx_small fastvit_t8",
]
_OTHERS = [
    "vit_tiny_patch16_224 deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 cait_xxs24_224",
    "deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224 xcit_nano_12_p16_224",
    "convit_tiny crossvit_9_240 coat_lite_tiny levit_128s visformer_tiny pvt_v2_b0 twins_svt_small",
    "swin_tiny_patch4_window7_224 swinv2_cr_tiny_ns_224 nest_tiny gcvit_xxtiny "
    "maxvit_rmlp_pico_rw_256",
    "coatnet_pico_rw_224 mobilevit_xxs mobilevitv2_050 efficientformer_l1 efficientformerv2_s0",
    "efficientvit_b0 efficientvit_m0 poolformer_s12 caformer_s18 tiny_vit_5m_224 focalnet_tiny_srf",
    "davit_tiny volo_d1_224 swiftformer_xs hiera_tiny_224 tnt_s_legacy_patch16_224",
    "mixer_s32_224 gmlp_ti16_224 resmlp_12_224 sequencer2d_s",
]
_HARD = {
    "deit_tiny_distilled_patch16_224": "two averaged heads",
    "levit_128s": "two averaged heads",
    "cait_xxs24_224": "class token after the fork",
    "crossvit_9_240": "two streams of two sizes",
    "hiera_tiny_224": "window units folded into the sequence",
    "hrnet_w18_small": "streams of four resolutions",
    "swin_tiny_patch4_window7_224": "windows folded into the batch",
}
_COMPILED = {"vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "mixer_s32_224"}
# Smaller inputs than the default, to save time.
_CONVOLUTIONAL_SIZE = 128
_IMAGE_SIZE = {
    "beit_base_patch16_224": 64,
    "volo_d1_224": 96,
    "deit3_small_patch16_224": 96,
    "tnt_s_legacy_patch16_224": 96,
}


def architectures() -> Iterator[Architecture]:
    """List them; timm is imported when one is built."""
    for lines, size in ((_CONVOLUTIONAL, _CONVOLUTIONAL_SIZE), (_OTHERS, None)):
        for name in (name for line in lines for name in line.split()):
            build = partial(_build, name, size)
            yield Architecture(name, "timm", build, _HARD.get(name, ""), name in _COMPILED)


def _build(name: str, declared_size: int | None) -> nn.Module:
    let_torchvision_import()
    import timm

    options: dict[str, Any] = {}
    if size := _IMAGE_SIZE.get(name):
        options["img_size"] = size
    if declared_size:
        options["pretrained_cfg_overlay"] = {"input_size": (3, declared_size, declared_size)}
    try:  # dropout and stochastic depth, where there are any
        return timm.create_model(name, num_classes=10, drop_rate=0.1, drop_path_rate=0.1, **options)
    except TypeError:
        return timm.create_model(name, num_classes=10, **options)
