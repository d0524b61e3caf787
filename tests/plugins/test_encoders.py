"""Text encoders and tokenizers: folders of both versions of transformers, and what is refused before it encodes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import WORDS
from safetensors.torch import load_file, save_file

from corefit.errors import ModelError
from corefit.testing import tiny_flux
from corefit_backbones.backbone import Diffusers
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

FIXTURES = Path(__file__).parents[1] / "fixtures/encoders"
FAMILIES: dict[str, type[Diffusers]] = {"flux": Flux, "sd3": Sd3, "wan": Wan}
TRANSFORMERS = int(transformers.__version__.partition(".")[0])
PROMPTS = ("a red sky", "", "RED  skies, a!")
WEIGHTS = "model.safetensors"


def encoding(folder: Path, length: int = 6) -> Any:
    backbone: Any = FAMILIES[folder.name](str(folder), max_sequence_length=length)
    backbone.place(torch.device("cpu"), torch.float32)
    return backbone


def encoded(folder: Path) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return encoding(folder).encode_text(PROMPTS).tensors


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    def copy(family: str, version: int = 4) -> Path:
        return Path(shutil.copytree(FIXTURES / f"transformers{version}" / family, tmp_path / family))

    return copy


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("version", [4, 5])
def test_a_folder_encodes_alike_whichever_transformers_wrote_it(family: str, version: int) -> None:
    found = encoded(FIXTURES / f"transformers{version}" / family)
    stored = load_file(FIXTURES / "embeddings.safetensors")
    assert {f"{family}.{name}" for name in found} == {name for name in stored if name.startswith(family)}
    for name, value in found.items():
        # the stored ones are of another CPU: 1.4e-6 apart at most on an Intel Xeon with torch 2.15
        torch.testing.assert_close(value, stored[f"{family}.{name}"], rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_key_and_embeddings_are_the_same_each_time(family: str, copied: Callable[..., Path]) -> None:
    folder = copied(family, 5)
    once, again = encoding(FIXTURES / "transformers5" / family), encoding(folder)
    assert once.encoding_key() == again.encoding_key()
    for name, value in encoded(folder).items():
        assert torch.equal(value, encoded(FIXTURES / "transformers5" / family)[name])


@pytest.mark.parametrize(
    ("family", "part", "version"),
    [
        *(("flux", "text_encoder", version) for version in (4, 5)),
        *(("flux", "text_encoder_2", version) for version in (4, 5)),
        ("sd3", "text_encoder_2", 4),
        ("sd3", "text_encoder_3", 5),
        ("wan", "text_encoder", 4),
    ],
)
def test_any_tensor_that_is_missing_is_refused(
    family: str, part: str, version: int, copied: Callable[..., Path]
) -> None:
    """Of each part, one layer's, the token embedding and the last."""
    folder = copied(family, version)
    file = folder / part / WEIGHTS
    weights = load_file(file)
    embedding = next(name for name in weights if name.endswith(("shared.weight", "token_embedding.weight")))
    for gone in {embedding, min(weights), max(weights)}:
        save_file({name: t for name, t in weights.items() if name != gone}, file, {"format": "pt"})
        with pytest.raises(
            ModelError, match=rf"{part}/{WEIGHTS}: the weights of {part} lack .*{gone.removeprefix('text_model.')}"
        ):
            encoded(folder)


def one_more(weights: dict[str, torch.Tensor]) -> None:
    weights["adapter.down.weight"] = torch.ones(2)


def cut(weights: dict[str, torch.Tensor]) -> None:
    name = max(weights)
    weights[name] = weights[name][:-1].clone()


@pytest.mark.parametrize(
    ("family", "version", "part"),
    [("flux", 4, "text_encoder"), ("flux", 5, "text_encoder"), ("wan", 4, "text_encoder")],
)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [(one_more, "which has no .*adapter.down.weight"), (cut, r" has the shape \[\d+.*; according")],
)
def test_other_weights_than_the_models_are_refused(
    family: str, version: int, part: str, spoil: Any, said: str, copied: Callable[..., Path]
) -> None:
    folder = copied(family, version)
    weights = load_file(folder / part / WEIGHTS)
    spoil(weights)
    save_file(weights, folder / part / WEIGHTS, {"format": "pt"})
    with pytest.raises(ModelError, match=f"{part}/{WEIGHTS}: .*{said}"):
        encoded(folder)


@pytest.mark.parametrize(
    ("family", "part", "names"),
    [
        ("flux", "text_encoder_2", ("encoder.embed_tokens.weight",)),  # tied to shared.weight, or a copy of it
        ("flux", "text_encoder_2", ("decoder.final_layer_norm.weight", "encoder.embed_tokens.weight")),  # a whole T5
        ("flux", "text_encoder", ("text_model.embeddings.position_ids",)),  # a buffer that older versions saved
    ],
)
def test_what_may_be_in_a_file_besides(family: str, part: str, names: Any, copied: Callable[..., Path]) -> None:
    folder = copied(family)
    weights = load_file(folder / part / WEIGHTS)
    more = {name: weights["shared.weight"].clone() for name in names if "embed_tokens" in name}
    more |= {name: torch.arange(8)[None] for name in names if name not in more}
    save_file(weights | more, folder / part / WEIGHTS, {"format": "pt"})
    assert torch.equal(encoded(folder)["prompt_embeds"], encoded(FIXTURES / "transformers4" / family)["prompt_embeds"])


def test_a_token_table_under_its_other_name_is_read(copied: Callable[..., Path]) -> None:
    folder = copied("wan")
    weights = load_file(folder / "text_encoder" / WEIGHTS)
    weights["encoder.embed_tokens.weight"] = weights.pop("shared.weight")
    save_file(weights, folder / "text_encoder" / WEIGHTS, {"format": "pt"})
    assert torch.equal(encoded(folder)["prompt_embeds"], encoded(FIXTURES / "transformers4/wan")["prompt_embeds"])


def without_format(folder: Path) -> None:
    file = folder / "text_encoder" / WEIGHTS
    save_file(load_file(file), file, {"written by": "hand"})


SPOILT: dict[str, tuple[str, int, Callable[[Path], object], str]] = {
    "merges of another vocabulary": (
        "flux",
        4,
        lambda f: (f / "tokenizer/merges.txt").write_text("#version: 0.2\nx\ny z q\n"),
        "tokenizer/merges.txt: no line of it joins two tokens|tokenizer is damaged.*: Merges text file invalid",
    ),
    "no merges": ("flux", 4, lambda f: (f / "tokenizer/merges.txt").unlink(), "tokenizer: .* lacks merges.txt"),
    "no tokenizer.json": ("wan", 5, lambda f: (f / "tokenizer/tokenizer.json").unlink(), "tokenizer: .* lacks spiece"),
    "no tokenizer config": (
        "wan",
        4,
        lambda f: (f / "tokenizer/tokenizer_config.json").unlink(),
        "tokenizer: no tokenizer_config.json",
    ),
    "cut tokenizer": (
        "flux",
        5,
        lambda f: (f / "tokenizer/tokenizer.json").write_text('{"version": "1.0", "model": {'),
        "tokenizer: the tokenizer is damaged",
    ),
    "cut vocabulary": ("sd3", 4, lambda f: (f / "tokenizer/vocab.json").write_text('{"a"'), "tokenizer is damaged"),
    "odd vocabulary": ("sd3", 4, lambda f: (f / "tokenizer/vocab.json").write_text("[1]"), "tokenizer is damaged"),
    "a text for a number": (
        "flux",
        4,
        lambda f: edit(f / "text_encoder/config.json", hidden_size="four"),
        "text_encoder/config.json: no CLIPTextModel can be made from it",
    ),
    "unknown class": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "UMT6EncoderModel"]),
        "names UMT6EncoderModel of transformers for text_encoder, which the installed",
    ),
    "other library": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", text_encoder=["os", "system"]),
        "names system of os for text_encoder",
    ),
    "no class": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "pipeline"]),
        "names pipeline of transformers for text_encoder",
    ),
    "a class that chooses": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "AutoModel"]),
        "names AutoModel for text_encoder: name the model's class",
    ),
    "not a list": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", text_encoder="UMT5EncoderModel"),
        "model_index.json: text_encoder is 'UMT5EncoderModel'; .library, class. is expected",
    ),
    "an empty list": (
        "wan",
        4,
        lambda f: edit(f / "model_index.json", tokenizer=[]),
        r"model_index.json: tokenizer is \[\]",
    ),
    "swapped classes": (
        "flux",
        4,
        lambda f: edit(f / "model_index.json", tokenizer=["transformers", "CLIPTextModel"]),
        "tokenizer",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_is_spoilt_is_named(case: str, copied: Callable[..., Path]) -> None:
    family, version, spoil, said = SPOILT[case]
    folder = copied(family, version)
    spoil(folder)
    with pytest.raises(ModelError, match=said):
        encoded(folder)


def test_weights_whose_metadata_say_no_format_are_named_or_read(copied: Callable[..., Path]) -> None:
    """transformers 4 refuses them, and 5 reads them."""
    folder = copied("wan")
    without_format(folder)
    known = f"text_encoder/{WEIGHTS}: its metadata does not say"
    with pytest.raises(ModelError, match=known) if TRANSFORMERS < 5 else nullcontext():
        assert torch.equal(encoded(folder)["prompt_embeds"], encoded(FIXTURES / "transformers4/wan")["prompt_embeds"])


def test_reading_shows_no_bars(capfd: pytest.CaptureFixture[str]) -> None:
    """transformers 5 has one for each model."""
    encoded(FIXTURES / "transformers5/sd3")
    assert "%" not in capfd.readouterr().err


def test_weights_that_say_nothing_of_their_format_are_read(copied: Callable[..., Path]) -> None:
    folder = copied("wan")
    file = folder / "text_encoder" / WEIGHTS
    save_file(load_file(file), file)
    assert torch.equal(encoded(folder)["prompt_embeds"], encoded(FIXTURES / "transformers4/wan")["prompt_embeds"])


def test_a_special_token_of_five_is_one_in_four(copied: Callable[..., Path]) -> None:
    folder = copied("wan", 5)
    edit(folder / "tokenizer/tokenizer_config.json", extra_special_tokens=["<extra_id_0>"])
    tokenizer = encoding(folder).text().tokenizer
    assert len(tokenizer.tokenize("red<extra_id_0>sky")) == 3


def test_parts_that_do_not_encode_are_not_read(tmp_path: Path) -> None:
    """The parts that do not encode prompts need no weights, and are not read."""
    folder = tiny_flux(tmp_path / "flux", words=WORDS)
    for file in [*folder.glob("transformer/*.safetensors"), *folder.glob("vae/*.safetensors")]:
        file.unlink()
    pipeline = encoding(folder).text()
    assert (pipeline.vae, pipeline.image_encoder) == (None, None)
