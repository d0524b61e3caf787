"""Small models with random weights in the layouts of the published ones, and pictures to score."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorFast, CLIPModel, CLIPTokenizerFast

from corefit.testing.checkpoints.text import CLIP_END, clip_pieces, clip_tokenizer
from corefit.types import Reward
from corefit_rewards.aesthetic import Aesthetic
from corefit_rewards.clip_score import ClipScore
from corefit_rewards.hps import Hps
from corefit_rewards.image_reward import ImageReward
from corefit_rewards.pickscore import PickScore

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


def tensor(features: Any) -> Tensor:
    """The features that get_image_features and get_text_features return, which transformers 5 wraps."""
    return features if isinstance(features, Tensor) else features.pooler_output


def spread(network: nn.Module, seed: int = 0, gain: float = 0.7) -> nn.Module:
    """Give a network weights that are large enough for every part of it to matter."""
    draw = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=draw) * (0.3 if p.ndim < 2 else gain * p[0].numel() ** -0.5)
    return network.eval()


def clip_config(pixels: int) -> CLIPConfig:
    both = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    end = len(PIECES[0]) - 1
    text = {**both, "hidden_size": 24, "vocab_size": end + 1, "max_position_embeddings": LENGTH, "eos_token_id": end}
    vision = {**both, "hidden_size": 32, "image_size": pixels, "patch_size": 14}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)


def tiny_clip(folder: Path, pixels: int = 28) -> Path:
    """A folder of a CLIPModel with tokenizer and preprocessing, as transformers saves them."""
    model = CLIPModel(clip_config(pixels))
    spread(model)
    model.logit_scale.data = torch.tensor(4.6052)
    model.save_pretrained(folder)
    save_processor(folder, pixels)
    return folder


def save_processor(folder: Path, pixels: int = 28) -> None:
    clip_tokenizer(folder / "made", PIECES, LENGTH, CLIP_END).save_pretrained(folder)
    CLIPTokenizerFast.from_pretrained(folder).save_pretrained(folder)
    square = {"height": pixels, "width": pixels}
    CLIPImageProcessorFast(size={"shortest_edge": pixels}, crop_size=square).save_pretrained(folder)


class OpenClip(nn.Module):
    """A CLIP as open_clip builds it, with the names of its tensors; activations are exact GELU."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
            self.mlp = nn.Sequential()
            self.mlp.add_module("c_fc", nn.Linear(width, 2 * width))
            self.mlp.add_module("gelu", nn.GELU())
            self.mlp.add_module("c_proj", nn.Linear(2 * width, width))

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            y = self.ln_1(x)
            x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
            return x + self.mlp(self.ln_2(x))

    class Blocks(nn.Module):
        def __init__(self, width: int, heads: int, layers: int) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList(OpenClip.Block(width, heads) for _ in range(layers))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            for block in self.resblocks:
                x = block(x, mask)
            return x

    class Visual(nn.Module):
        def __init__(self, width: int, joint: int) -> None:
            super().__init__()
            self.class_embedding = nn.Parameter(torch.zeros(width))
            self.positional_embedding = nn.Parameter(torch.zeros(5, width))
            self.conv1 = nn.Conv2d(3, width, 14, 14, bias=False)
            self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
            self.transformer = OpenClip.Blocks(width, width // 80, 2)
            self.proj = nn.Parameter(torch.zeros(width, joint))

        def forward(self, pixels: Tensor) -> Tensor:
            x = self.conv1(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1) + self.positional_embedding
            return self.ln_post(self.transformer(self.ln_pre(x))[:, 0]) @ self.proj

    def __init__(self, width: int = 160, text_width: int = 128, joint: int = 24) -> None:
        super().__init__()
        self.visual = OpenClip.Visual(width, joint)
        self.token_embedding = nn.Embedding(len(PIECES[0]), text_width)
        self.positional_embedding = nn.Parameter(torch.zeros(LENGTH, text_width))
        self.transformer = OpenClip.Blocks(text_width, text_width // 64, 2)
        self.ln_final = nn.LayerNorm(text_width)
        self.text_projection = nn.Parameter(torch.zeros(text_width, joint))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Cosines [B] of pixels and tokens."""
        x = self.token_embedding(tokens) + self.positional_embedding
        causal = torch.full((LENGTH, LENGTH), -torch.inf).triu(1)
        x = self.ln_final(self.transformer(x, causal))
        text = x[torch.arange(len(x)), tokens.argmax(1)] @ self.text_projection
        return nn.functional.cosine_similarity(self.visual(pixels), text)


class Blip(nn.Module):
    """BLIP's ViT and BERT with cross-attention, and ImageReward's head, as published, with the names of the tensors."""

    class Vit(nn.Module):
        class Block(nn.Module):
            def __init__(self, width: int) -> None:
                super().__init__()
                self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
                self.attn = nn.Module()
                self.attn.qkv, self.attn.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
                self.mlp = nn.Module()
                self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

            def forward(self, x: Tensor) -> Tensor:
                q, k, v = heads(self.attn.qkv(self.norm1(x))).chunk(3, 1)
                x = x + self.attn.proj(joined(nn.functional.scaled_dot_product_attention(q, k, v)))
                return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))

        def __init__(self, width: int) -> None:
            super().__init__()
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.pos_embed = nn.Parameter(torch.zeros(1, 5, width))
            self.patch_embed = nn.Module()
            self.patch_embed.proj = nn.Conv2d(3, width, 16, 16)
            self.blocks = nn.ModuleList(Blip.Vit.Block(width) for _ in range(2))
            self.norm = nn.LayerNorm(width, eps=1e-6)

        def forward(self, pixels: Tensor) -> Tensor:
            x = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    class Bert(nn.Module):
        class Attention(nn.Module):
            def __init__(self, width: int, source: int) -> None:
                super().__init__()
                self.self, self.output = nn.Module(), nn.Module()
                self.self.query, self.output.dense = nn.Linear(width, width), nn.Linear(width, width)
                self.self.key, self.self.value = nn.Linear(source, width), nn.Linear(source, width)
                self.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)

            def forward(self, x: Tensor, source: Tensor, mask: Tensor | None = None) -> Tensor:
                q, k, v = heads(self.self.query(x)), heads(self.self.key(source)), heads(self.self.value(source))
                y = joined(nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask))
                return self.output.LayerNorm(self.output.dense(y) + x)

        def __init__(self, width: int, source: int, vocabulary: int) -> None:
            super().__init__()
            self.embeddings, self.encoder = nn.Module(), nn.Module()
            self.embeddings.word_embeddings = nn.Embedding(vocabulary, width)
            self.embeddings.position_embeddings = nn.Embedding(40, width)
            self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
            self.embeddings.register_buffer("position_ids", torch.arange(40)[None])
            self.encoder.layer = nn.ModuleList()
            for _ in range(2):
                layer = nn.Module()
                layer.attention = Blip.Bert.Attention(width, width)
                layer.crossattention = Blip.Bert.Attention(width, source)
                layer.intermediate, layer.output = nn.Module(), nn.Module()
                layer.intermediate.dense = nn.Linear(width, 2 * width)
                layer.output.dense = nn.Linear(2 * width, width)
                layer.output.LayerNorm = nn.LayerNorm(width, eps=1e-12)
                self.encoder.layer.append(layer)

        def forward(self, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
            words = self.embeddings.word_embeddings(tokens)
            x = self.embeddings.LayerNorm(words + self.embeddings.position_embeddings.weight[: tokens.shape[1]])
            for layer in self.encoder.layer:
                x = layer.crossattention(layer.attention(x, x, mask[:, None, None].bool()), seen)
                y = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(x)))
                x = layer.output.LayerNorm(y + x)
            return x

    def __init__(self, vocabulary: int, width: int = 128, text_width: int = 64) -> None:
        super().__init__()
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder = Blip.Vit(width)
        self.blip.text_encoder = Blip.Bert(text_width, width, vocabulary)
        self.mlp.layers = head(text_width)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        first = self.blip.text_encoder(tokens, mask, self.blip.visual_encoder(pixels))[:, 0]
        return (self.mlp.layers(first)[:, 0] - 0.16717362830052426) / 1.0333394966054072


def heads(x: Tensor) -> Tensor:
    """[B, L, n * 64] -> [B, n, L, 64]."""
    return x.unflatten(2, (-1, 64)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """[B, n, L, 64] -> [B, L, n * 64]."""
    return x.transpose(1, 2).flatten(2)


def head(width: int) -> nn.Sequential:
    """LAION's and ImageReward's head, with the dropout of its training."""
    return nn.Sequential(
        *(nn.Linear(width, 1024), nn.Dropout(0.2), nn.Linear(1024, 128), nn.Dropout(0.2)),
        *(nn.Linear(128, 64), nn.Dropout(0.1), nn.Linear(64, 16), nn.Linear(16, 1)),
    )


def tokenizer_of_bert(folder: Path) -> Path:
    """A folder of BERT's tokenizer for lower case, with few words."""
    from transformers import BertTokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS[1:],
        *letters,
        *(f"##{letter}" for letter in letters),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def open_clip() -> OpenClip:
    made = OpenClip()
    spread(made, 5)
    return made


def blip(tokenizer: Path) -> Blip:
    """ImageReward for the words of the tokenizer in a folder."""
    from transformers import AutoTokenizer

    made = Blip(len(AutoTokenizer.from_pretrained(tokenizer)))
    spread(made, 5)
    spread(made.mlp, 5, gain=2.5)
    return made


def reward(name: str, folder: Path, **keys: Any) -> Any:
    """The reward `name` with all its files in one folder; in float32, unless the keys say otherwise."""
    kinds: dict[str, type[Reward]] = {
        "aesthetic": Aesthetic,
        "clip_score": ClipScore,
        "hps": Hps,
        "image_reward": ImageReward,
        "pickscore": PickScore,
    }
    places = {"aesthetic": ["head"], "hps": ["processor"], "image_reward": ["tokenizer"]}.get(name, [])
    return kinds[name](**{"path": str(folder), "dtype": "fp32", **{each: str(folder) for each in places}, **keys})


def folders(make: Callable[[str], Path]) -> dict[str, Path]:
    """For each reward, a folder with all its files."""
    made = {name: make(name) for name in ("clip_score", "hps", "image_reward")}
    tiny_clip(made["clip_score"])
    own = {f"layers.{name}": tensor for name, tensor in spread(head(16), 5, gain=2.5).state_dict().items()}
    torch.save(own, made["clip_score"] / "aesthetic-model.pth")
    save_processor(made["hps"])
    torch.save({"epoch": 1, "state_dict": open_clip().state_dict()}, made["hps"] / "HPS_v2.1_compressed.pt")
    tokenizer_of_bert(made["image_reward"])
    torch.save(blip(made["image_reward"]).state_dict(), made["image_reward"] / "ImageReward.pt")
    return {**made, "pickscore": made["clip_score"], "aesthetic": made["clip_score"]}
