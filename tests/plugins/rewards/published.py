"""Small models with random weights in the layouts of the published ones, and pictures to score."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorFast, CLIPModel, CLIPTokenizerFast

from corefit.testing.checkpoints.text import CLIP_END, clip_pieces, clip_tokenizer

PROMPTS = ("a red circle", "a blue square", "the letter A " * 20)
WORDS = ("a", "red", "blue", "circle", "square", "the", "letter")
LENGTH = 12
PIECES = clip_pieces(WORDS)


def pictures(height: int = 50, width: int = 41, rows: int = 3) -> Tensor:
    """Smooth random pictures with sharp edges, [rows, 3, height, width] in [0, 1]."""
    made = torch.rand(rows, 3, 7, 6, generator=torch.Generator().manual_seed(3))
    made = nn.functional.interpolate(made, (height, width), mode="bilinear")
    made[:, :, height // 3 : height // 2] = made[:, :, height // 3 : height // 2].round()
    return made


def spread(network: nn.Module, seed: int = 0) -> nn.Module:
    """Give a network weights that are large enough for every part of it to matter."""
    draw = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=draw) * (0.3 if p.ndim < 2 else 0.7 * p[0].numel() ** -0.5)
    return network.eval()


def clip_config(act: str = "quick_gelu") -> CLIPConfig:
    both = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    end = len(PIECES[0]) - 1
    text = {**both, "hidden_size": 24, "vocab_size": end + 1, "max_position_embeddings": LENGTH, "eos_token_id": end}
    vision = {**both, "hidden_size": 32, "image_size": 28, "patch_size": 14}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def tiny_clip(folder: Path, seed: int = 0) -> Path:
    """A folder of a CLIPModel with tokenizer and preprocessing, as transformers saves them."""
    model = CLIPModel(clip_config())
    spread(model, seed)
    model.logit_scale.data = torch.tensor(4.6052)
    model.save_pretrained(folder)
    save_processor(folder)
    return folder


def save_processor(folder: Path) -> None:
    clip_tokenizer(folder / "made", PIECES, LENGTH, CLIP_END).save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    CLIPImageProcessorFast(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
