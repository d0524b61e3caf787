"""Makes the tokenizers and text encoders of small checkpoints; vocabularies are made by hand, not trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
T5_PAD, T5_END, T5_UNKNOWN = "<pad>", "</s>", "<unk>"
T5_SPACE = "▁"


def clip_pieces(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Make a byte-level BPE vocabulary (piece to id) and merges for CLIP, in which each word is one piece.

    A merge ranks after all earlier ones, so that a later word cannot change how an earlier one is split.
    """
    characters = _byte_characters()
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        for chunk in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", word.lower()):
            spelled = "".join(characters[byte] for byte in chunk.encode())
            pieces = _merged([*spelled[:-1], spelled[-1] + WORD_END], ranks)
            while len(pieces) > 1:
                ranks[pieces[0], pieces[1]] = len(ranks)
                pieces = _merged(pieces, ranks)
    single = list(characters.values())
    pieces = [*single, *(c + WORD_END for c in single), *(a + b for a, b in ranks), CLIP_START, CLIP_END]
    return {piece: i for i, piece in enumerate(pieces)}, list(ranks)


def t5_pieces(words: Iterable[str]) -> list[tuple[str, float]]:
    """Make a Unigram vocabulary for T5, (piece, score) by id; a whole word always scores above its characters."""
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
    """Map each byte to the printable character that stands for it in CLIP's (GPT-2's) vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Apply byte-pair encoding: join the neighbors with the lowest rank everywhere, until no pair has a rank."""
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


def clip_tokenizer(folder: Path, pieces: tuple[dict[str, int], list[tuple[str, str]]], length: int, pad: str) -> Any:
    """Make a CLIPTokenizer from `clip_pieces`; its two files are written to `folder`."""
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


def t5_tokenizer(pieces: list[tuple[str, float]]) -> Any:
    """Make a T5TokenizerFast from `t5_pieces`."""
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


def clip_encoder(pieces: tuple[dict[str, int], list[tuple[str, str]]], width: int, layers: int, length: int) -> Any:
    """Make a random CLIPTextModelWithProjection of width `width`, which is also the width of its projection."""
    from transformers import CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(_clip_config(pieces[0], width, layers, length)).eval()


def clip_text_encoder(
    pieces: tuple[dict[str, int], list[tuple[str, str]]], width: int, layers: int, length: int
) -> Any:
    """A random CLIPTextModel, without projection."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_clip_config(pieces[0], width, layers, length)).eval()


def _clip_config(vocabulary: dict[str, int], width: int, layers: int, length: int) -> Any:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
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


def t5_encoder(pieces: list[tuple[str, float]], width: int, layers: int, *, per_layer: bool = False) -> Any:
    """Make a random T5EncoderModel of width `width`; with per_layer, a position bias per layer, it is UMT5."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    heads = max(1, width // 16)
    kind: Any = UMT5Config if per_layer else T5Config
    config = kind(
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
    return (UMT5EncoderModel if per_layer else T5EncoderModel)(config).eval()
