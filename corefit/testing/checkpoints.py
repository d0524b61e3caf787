"""Small random Stable Diffusion 3 checkpoints in the layout of the real ones, for tests and examples.

Equal arguments write equal bytes, in any process: the vocabularies are made by hand, because tokeniser
trainers break ties differently from run to run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"
T5_SPACE = "▁"


def tiny_sd3(
    folder: Path,
    *,
    words: Sequence[str],
    seed: int = 0,
    layers: int = 2,
    heads: int = 2,
    head_width: int = 16,
    dual_attention_layers: Sequence[int] = (),
    patch: int = 2,
    latent_size: int = 8,
    max_latent_size: int = 32,
    latent_channels: int = 4,
    vae_widths: Sequence[int] = (8, 16),
    vae_layers: int = 1,
    scaling_factor: float = 1.5305,
    shift_factor: float = 0.0609,
    clip_widths: tuple[int, int] = (16, 16),
    clip_layers: int = 2,
    clip_length: int = 16,
    t5_width: int = 32,
    t5_layers: int = 1,
    shift: float = 3.0,
) -> Path:
    """Write what `StableDiffusion3Pipeline.from_pretrained(folder)` loads, with random weights.

    words            each becomes one token of every text encoder (digits stay single: CLIP splits numbers);
                     other text falls into single characters
    latent_size      of the pipeline's default image, height and width, in latent pixels
    max_latent_size  the largest that the transformer accepts
    vae_widths       channels of each level; the spatial factor is 2 ** (levels - 1)
    clip_length      tokens to which the pipeline pads both CLIP prompts, start and end included
    t5_width         also the transformer's joint attention width; at least the sum of clip_widths
    shift            of the flow-matching scheduler
    """
    if t5_width < sum(clip_widths):
        raise ValueError(f"t5_width {t5_width} is less than the sum of clip_widths {tuple(clip_widths)}")
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    folder = Path(folder)
    clip_vocabulary = clip_pieces(words)
    t5_vocabulary = t5_pieces(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusion3Pipeline(
            transformer=_transformer(
                layers,
                heads,
                head_width,
                tuple(dual_attention_layers),
                patch,
                (latent_size, max_latent_size, latent_channels),
                t5_width,
                sum(clip_widths),
            ),
            vae=_vae(latent_channels, vae_widths, vae_layers, latent_size, scaling_factor, shift_factor),
            text_encoder=_clip(clip_vocabulary, clip_widths[0], clip_layers, clip_length),
            text_encoder_2=_clip(clip_vocabulary, clip_widths[1], clip_layers, clip_length),
            text_encoder_3=_t5(t5_vocabulary, t5_width, t5_layers),
            tokenizer=_clip_tokenizer(folder / "tokenizer", clip_vocabulary, clip_length, CLIP_END),
            tokenizer_2=_clip_tokenizer(folder / "tokenizer_2", clip_vocabulary, clip_length, "!"),
            tokenizer_3=_t5_tokenizer(t5_vocabulary),
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift),
        )
    pipeline.save_pretrained(folder)
    return folder


def clip_pieces(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-level BPE vocabulary, piece -> id, and its merges, such that each word is one piece.

    A merge ranks after all earlier ones, so that a later word cannot change how an earlier one is split.
    """
    characters = _byte_characters()
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        for part in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", word.lower()):
            spelt = "".join(characters[byte] for byte in part.encode())
            pieces = _merged([*spelt[:-1], spelt[-1] + WORD_END], ranks)
            while len(pieces) > 1:
                ranks[pieces[0], pieces[1]] = len(ranks)
                pieces = _merged(pieces, ranks)
    single = list(characters.values())
    pieces = [*single, *(c + WORD_END for c in single), *(a + b for a, b in ranks), CLIP_START, CLIP_END]
    return {piece: i for i, piece in enumerate(pieces)}, list(ranks)


def t5_pieces(words: Iterable[str]) -> list[tuple[str, float]]:
    """T5's Unigram vocabulary, (piece, score) by id; a whole word always scores above its characters."""
    whole = dict.fromkeys(T5_SPACE + word for word in words if len(word) > 1)
    single = [chr(c) for c in range(33, 127)]
    special = [T5_PAD, T5_END, T5_UNKNOWN]
    return [
        *((piece, 0.0) for piece in special),
        *((piece, -2.0) for piece in whole),
        *((T5_SPACE + c, -4.0) for c in single),
        (T5_SPACE, -8.0),
        *((c, -8.0) for c in single),
    ]


def _byte_characters() -> dict[int, str]:
    """Byte -> the printable character that stands for it in CLIP's (GPT-2's) vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: join the neighbours of lowest rank, everywhere, until none has a rank."""
    while True:
        known = [pair for pair in pairwise(pieces) if pair in ranks]
        if not known:
            return pieces
        best, joined = min(known, key=ranks.__getitem__), list[str]()
        for piece in pieces:
            if joined and (joined[-1], piece) == best:
                joined[-1] += piece
            else:
                joined.append(piece)
        pieces = joined


def _clip_tokenizer(folder: Path, pieces: tuple[dict[str, int], list[tuple[str, str]]], length: int, pad: str) -> Any:
    from transformers import CLIPTokenizer

    vocabulary, merges = pieces
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CLIPTokenizer(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        bos_token=CLIP_START,
        eos_token=CLIP_END,
        unk_token=CLIP_END,
        pad_token=pad,
        model_max_length=length,
    )


def _t5_tokenizer(pieces: list[tuple[str, float]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    names = [piece for piece, _ in pieces]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=names.index(T5_UNKNOWN), byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(T5_SPACE, prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(T5_SPACE, prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {T5_END}", pair=f"$A {T5_END} $B {T5_END}", special_tokens=[(T5_END, names.index(T5_END))]
    )
    return T5TokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=T5_PAD,
        eos_token=T5_END,
        unk_token=T5_UNKNOWN,
        extra_ids=0,
        model_max_length=512,
    )


def _clip(pieces: tuple[dict[str, int], list[tuple[str, str]]], width: int, layers: int, length: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    vocabulary = pieces[0]
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 16),
        max_position_embeddings=length,
        bos_token_id=vocabulary[CLIP_START],
        eos_token_id=vocabulary[CLIP_END],
        pad_token_id=vocabulary[CLIP_END],
    )
    return CLIPTextModelWithProjection(config).eval()


def _t5(pieces: list[tuple[str, float]], width: int, layers: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    heads = max(1, width // 16)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=layers,
        num_heads=heads,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config).eval()


def _transformer(
    layers: int,
    heads: int,
    head_width: int,
    dual_attention_layers: tuple[int, ...],
    patch: int,
    latents: tuple[int, int, int],
    text_width: int,
    pooled_width: int,
) -> Any:
    from diffusers import SD3Transformer2DModel

    size, max_size, channels = latents
    return SD3Transformer2DModel(
        sample_size=size,
        patch_size=patch,
        in_channels=channels,
        out_channels=channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_width,
        joint_attention_dim=text_width,
        caption_projection_dim=heads * head_width,
        pooled_projection_dim=pooled_width,
        pos_embed_max_size=max_size // patch,
        dual_attention_layers=dual_attention_layers,
        qk_norm="rms_norm" if dual_attention_layers else None,
    ).eval()


def _vae(channels: int, widths: Sequence[int], layers: int, latent_size: int, scaling: float, shift: float) -> Any:
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # its annotations have one block where a checkpoint has several
    return kind(
        block_out_channels=tuple(widths),
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=latent_size * 2 ** (len(widths) - 1),
        scaling_factor=scaling,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
