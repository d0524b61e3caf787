"""Small detectors with random weights, in the layouts of published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from published import clip_config
from transformers import (
    CLIPImageProcessorFast,
    CLIPModel,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorFast,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    MaskFormerImageProcessorFast,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessorFast,
)

from corefit.testing.checkpoints.text import CLIP_END, clip_pieces, clip_tokenizer
from corefit_rewards.geneval_rules import COLORS

LABELS = {0: "dog", 1: "cat", 2: "mouse", 3: "N/A"}
"""Classes as detectors write them: `mouse` is GenEval's computer mouse, and N/A is none."""
SWIN = {
    "model_type": "swin",
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
LARGE = ("queries", "detection_tokens", "class_predictor.weight", "classifier.layers.2", "embedding")
"""Parts of the names of weights by which queries differ from each other."""
SMALL = {"num_queries": 7, "decoder_layers": 2, "encoder_layers": 1, "id2label": LABELS}


def tiny_mask2former(folder: Path) -> Path:
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "dim_feedforward": 16}
    config = Mask2FormerConfig(
        backbone_config=dict(SWIN), num_attention_heads=2, encoder_feedforward_dim=16, **sizes, **SMALL
    )
    processor = Mask2FormerImageProcessorFast(size={"height": 64, "width": 64}, ignore_index=255)
    return saved(folder, Mask2FormerForUniversalSegmentation(config), processor)


def tiny_maskformer(folder: Path) -> Path:
    decoder = {
        "model_type": "detr",
        "d_model": 16,
        "num_queries": 7,
        "decoder_layers": 1,
        "encoder_layers": 1,
        "decoder_attention_heads": 2,
        "encoder_attention_heads": 2,
        "decoder_ffn_dim": 16,
        "encoder_ffn_dim": 16,
    }
    config = MaskFormerConfig(
        fpn_feature_size=32, mask_feature_size=32, backbone_config=dict(SWIN), decoder_config=decoder, id2label=LABELS
    )
    processor = MaskFormerImageProcessorFast(size={"height": 64, "width": 64}, ignore_index=255)
    return saved(folder, MaskFormerForInstanceSegmentation(config), processor)


def tiny_yolos(folder: Path) -> Path:
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=[64, 64],
        num_detection_tokens=7,
        id2label=LABELS,
    )
    processor = YolosImageProcessorFast(size={"height": 64, "width": 64})
    return saved(folder, YolosForObjectDetection(config), processor)


def saved(folder: Path, network: Any, processor: Any) -> Path:
    varied(network).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def varied(network: Any) -> Any:
    """Give a network random weights, by their names, with which it finds different things in different places."""
    for name, p in network.named_parameters():
        draw = torch.Generator().manual_seed(crc32(name.encode()))  # their order differs between versions
        if "norm" not in name:
            p.data = torch.randn(p.shape, generator=draw) * (0.1 if p.ndim < 2 else p[0].numel() ** -0.5)
        if any(part in name for part in LARGE):
            p.data *= 4
    return network


def tiny_color_clip(folder: Path) -> Path:
    """A CLIP whose tokenizer knows the words of GenEval's questions about colors."""
    words = (*COLORS, "a", "photo", "of", "-", "colored", "object", "dog", "cat")
    config = clip_config(28)
    pieces = clip_pieces(words)
    config.text_config.vocab_size = len(pieces[0])
    config.text_config.eos_token_id = len(pieces[0]) - 1
    varied(CLIPModel(config)).save_pretrained(folder)
    clip_tokenizer(folder / "made", pieces, config.text_config.max_position_embeddings, CLIP_END).save_pretrained(
        folder
    )
    CLIPImageProcessorFast(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder
