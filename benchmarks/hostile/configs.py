"""Configs and tokenizers of a base model."""

from __future__ import annotations

from typing import Any

from benchmarks.hostile.case import Case
from benchmarks.hostile.models import EITHER, NETWORKS, Spoil, edited, put_in, spoiled


def cases() -> list[Case]:
    """All of this file."""
    return [*_configs(), *_tokenizers()]


# configs


def _configs() -> list[Case]:
    found: list[Case] = []
    for part in NETWORKS:
        config = f"{part}/config.json"
        found += [
            spoiled(f"{part}: config emptied", lambda p, c=config: p.write(f"base/{c}", ""), part),
            spoiled(f"{part}: config is a list", lambda p, c=config: p.write(f"base/{c}", "[1]"), part),
            spoiled(f"{part}: config is cut", lambda p, c=config: p.write(f"base/{c}", '{"a": '), part),
        ]
    values: tuple[tuple[str, str, Any], ...] = (
        ("transformer", "num_layers", "two"),
        ("transformer", "num_layers", -1),
        ("transformer", "num_layers", 10**9),
        ("transformer", "num_layers", None),
        ("transformer", "num_attention_heads", "1"),
        ("transformer", "patch_size", 0),
        ("transformer", "in_channels", 16),
        ("transformer", "in_channels", "4"),
        ("transformer", "pos_embed_max_size", "large"),
        ("transformer", "joint_attention_dim", 7),
        ("transformer", "qk_norm", "nonsense"),
        ("transformer", "_class_name", 3),
        ("vae", "scaling_factor", "1.5"),
        ("vae", "scaling_factor", None),
        ("vae", "scaling_factor", 0),
        ("vae", "scaling_factor", float("nan")),
        ("vae", "shift_factor", "0.06"),
        ("vae", "latent_channels", 16),
        ("vae", "latent_channels", "4"),
        ("vae", "block_out_channels", []),
        ("vae", "block_out_channels", "8, 16"),
        ("vae", "down_block_types", ["Nowhere", "Nowhere"]),
        ("vae", "_class_name", "AutoencoderKLWan"),
        ("text_encoder", "hidden_size", "16"),
        ("text_encoder", "num_hidden_layers", 0),
        ("text_encoder", "vocab_size", 3),
        ("text_encoder", "max_position_embeddings", 2),
        ("text_encoder", "hidden_act", "nonsense"),
        ("text_encoder_2", "projection_dim", 3),
        ("text_encoder_3", "d_model", "32"),
        ("text_encoder_3", "num_layers", None),
        ("text_encoder_3", "vocab_size", 3),
    )
    found += [
        spoiled(f"{part}: {key} is {value}", edited(f"{part}/config.json", put_in(**{key: value})), part)
        for part, key, value in values
    ]
    schedules: tuple[tuple[str, Any], ...] = (
        ("shift", "3"),
        ("shift", 0),
        ("shift", None),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", "x"),
    )
    found += [
        spoiled(
            f"scheduler: {key} is {value}",
            edited("scheduler/scheduler_config.json", put_in(**{key: value})),
            "scheduler",
        )
        for key, value in schedules
    ]
    return [
        *found,
        spoiled(
            "scheduler: of another family",
            edited("scheduler/scheduler_config.json", put_in(_class_name="DDPMScheduler")),
            "scheduler",
            status=EITHER,
            equal=False,
        ),
        spoiled(
            "scheduler: config is nonsense", lambda p: p.write("base/scheduler/scheduler_config.json", "x"), "scheduler"
        ),
        spoiled(
            "transformer: an unknown key",
            edited("transformer/config.json", put_in(nobody_reads_this=1)),
            "transformer",
            status=EITHER,
        ),
    ]


# tokenizers


def _tokenizers() -> list[Case]:
    clip, t5 = "tokenizer", "tokenizer_3"

    def put(file: str, content: str | bytes) -> Spoil:
        return lambda project: project.write(f"base/{file}", content)

    return [
        spoiled("merges.txt is missing", lambda p: p.remove(f"base/{clip}/merges.txt"), clip),
        spoiled("merges.txt is empty", put(f"{clip}/merges.txt", ""), clip),
        spoiled("merges.txt is nonsense", put(f"{clip}/merges.txt", "#version: 0.2\none\ntwo three four\n"), clip),
        spoiled("merges.txt is not UTF-8", put(f"{clip}/merges.txt", b"\xff\xfe\xff"), clip),
        spoiled("vocab.json is missing", lambda p: p.remove(f"base/{clip}/vocab.json"), clip),
        spoiled("vocab.json is cut", put(f"{clip}/vocab.json", '{"a": 1,'), clip),
        spoiled("vocab.json is a list", put(f"{clip}/vocab.json", "[]"), clip),
        spoiled("vocab.json is empty", put(f"{clip}/vocab.json", "{}"), clip),
        spoiled(
            "tokenizer_config.json is missing",
            lambda p: p.remove(f"base/{clip}/tokenizer_config.json"),
            clip,
            status=EITHER,
            equal=False,
        ),
        spoiled("tokenizer_config.json is null", put(f"{clip}/tokenizer_config.json", "null"), clip),
        spoiled(
            "tokenizer_config.json has extra_special_tokens = []",
            edited(f"{clip}/tokenizer_config.json", put_in(extra_special_tokens=[])),
            clip,
            status=EITHER,
        ),
        spoiled(
            "tokenizer_3 has extra_special_tokens = []",
            edited(f"{t5}/tokenizer_config.json", put_in(extra_special_tokens=[])),
            t5,
            status=EITHER,
        ),
        spoiled(
            "model_max_length is text", edited(f"{clip}/tokenizer_config.json", put_in(model_max_length="long")), clip
        ),
        spoiled(
            "model_max_length is 10**30", edited(f"{clip}/tokenizer_config.json", put_in(model_max_length=10**30)), clip
        ),
        spoiled(
            "tokenizer_class is unknown",
            edited(f"{t5}/tokenizer_config.json", put_in(tokenizer_class="Nowhere")),
            t5,
            status=EITHER,
        ),
        spoiled("tokenizer.json is missing", lambda p: p.remove(f"base/{t5}/tokenizer.json"), t5),
        spoiled("tokenizer.json is cut", put(f"{t5}/tokenizer.json", '{"version": "1.0", '), t5),
        spoiled("tokenizer.json is {}", put(f"{t5}/tokenizer.json", "{}"), t5),
        spoiled("tokenizer.json is not UTF-8", put(f"{t5}/tokenizer.json", b"\xff\xfe"), t5),
        spoiled(
            "tokenizer.json has no model",
            edited(f"{t5}/tokenizer.json", lambda old: {k: v for k, v in old.items() if k != "model"}),
            t5,
        ),
        spoiled(
            "tokenizer.json is of BPE",
            edited(f"{t5}/tokenizer.json", put_in(model={"type": "BPE", "vocab": {}, "merges": []})),
            t5,
        ),
        spoiled(
            "special_tokens_map.json is nonsense", put(f"{clip}/special_tokens_map.json", "x"), clip, status=EITHER
        ),
    ]
