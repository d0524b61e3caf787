"""What encodes prompts: a family's diffusers pipeline that has only its text encoders and tokenizers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError
from corefit_backbones import parts
from corefit_backbones.folder import Checkpoint

if TYPE_CHECKING:
    import torch


def read(kind: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A pipeline of class `kind` that can encode prompts, without transformer and VAE.

    ModelError for text encoders as in `parts.read`, and for tokenizers whose files are missing or damaged.
    """
    checkpoint.check_weights("text_encoder")
    for name in checkpoint.parts:
        if (
            name.startswith("text_encoder")
            and (lacks := name.replace("text_encoder", "tokenizer")) not in checkpoint.parts
        ):
            raise ModelError(
                f"{checkpoint.folder}: model_index.json names {name} and no {lacks}; fetch the folder again"
            )
    needed = [name for name in checkpoint.parts if not name.startswith(("transformer", "vae"))]
    made = {name: _part(checkpoint, name, dtype) for name in needed}
    settings = {name: value for name, value in checkpoint.settings.items() if name not in checkpoint.index}
    taken = signature(kind).parameters
    absent = {name: None for name, parameter in taken.items() if parameter.default is parameter.empty}
    pipeline = kind(**{name: value for name, value in {**absent, **settings, **made}.items() if name in taken})
    # if SD3 has no T5, encode_prompt reads the width of the zeros in its place from the transformer's config
    pipeline.transformer = SimpleNamespace(config=SimpleNamespace(**checkpoint.config("transformer")))
    return pipeline


def blank(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    """A text encoder without weights, on the meta device, as `read` would hold it in `dtype`."""
    kind, file = _class(checkpoint, name), checkpoint.config(name).file  # of a model on the hub, JSON alone is fetched
    with parts.described(kind, file):
        return parts.blank(kind, file.parent).to(dtype)


def quantize(encoder: Any) -> None:
    """Hold the weights of all linear layers in int8, with a scale for each row, as `frozen = "int8"` does.

    Their dtype says so: T5 rounds the input of some layers to the dtype of the weight, unless that is torch.int8.
    """
    import torch
    from torch import nn

    from corefit_backbones import lowbit

    for name, linear in [(name, m) for name, m in encoder.named_modules() if type(m) is nn.Linear]:
        owner, _, own = name.rpartition(".")
        made = lowbit.LowBitLinear(linear, "int8")
        if not linear.weight.is_meta:
            for part, tensor in lowbit.pack(linear.weight.detach(), "int8").items():
                getattr(made, part).data = tensor
        made.weight = nn.Parameter(made.weight.data.view(torch.int8), requires_grad=False)
        setattr(encoder.get_submodule(owner), own, made)


def check_length(checkpoint: Checkpoint) -> None:
    """Raise a ModelError if the CLIP tokenizer's number of tokens is not a number."""
    if "tokenizer" in checkpoint.parts:
        checkpoint.config("tokenizer", "tokenizer_config.json").get("model_max_length")


def _part(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> Any:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerBase

    folder, kind = checkpoint.folder / name, _class(checkpoint, name)
    if issubclass(kind, Module):
        # as in diffusers, a part that has no files of the variant is read from its plain files
        has = checkpoint.variant and any(folder.glob(f"*.{checkpoint.variant}.*"))
        return parts.read(kind, folder, dtype, checkpoint.variant if has else None)
    if issubclass(kind, PreTrainedTokenizerBase):
        return _tokenizer(kind, folder, checkpoint.config(name, "tokenizer_config.json"))
    with parts.reading(folder):
        made = kind.from_pretrained(folder)
    if isinstance(made, Module):
        raise ModelError(
            f"{checkpoint.folder}: model_index.json names {kind.__name__} for {name}: name the model's class"
        )
    return made


def _class(checkpoint: Checkpoint, part: str) -> Any:
    """The class that model_index.json names for a part; it must be one of diffusers or transformers."""
    library, name = checkpoint.classes[part] or ("", "")
    module: Any = None
    if library in ("diffusers", "transformers"):
        module = import_module(library)
    elif library.isidentifier():  # a module of diffusers.pipelines, as in ["ltx2", "LTX2TextConnectors"]
        module = getattr(import_module("diffusers.pipelines"), library, None)
    kind = getattr(module, name, None)
    if not isinstance(kind, type) or not hasattr(kind, "from_pretrained"):
        raise ModelError(
            f"{checkpoint.path}: model_index.json names {name} of {library} for {part}, which the installed "
            "diffusers and transformers do not have"
        )
    return kind


def _tokenizer(kind: Any, folder: Path, config: Mapping[str, Any]) -> Any:
    """Read a tokenizer that was written by transformers 4 or 5."""
    import transformers

    kind = _readable(kind, folder)
    special, more = config.get("extra_special_tokens"), dict[str, Any]()
    if isinstance(special, list) and int(transformers.__version__.split(".")[0]) < 5:
        more = {"extra_special_tokens": {}, "additional_special_tokens": list(special)}  # version 4's name for it
    try:
        made = kind.from_pretrained(folder, **more)
        if not made.vocab_size:
            raise ValueError("its vocabulary is empty")
    except Exception as e:  # the tokenizers library raises Exception itself
        raise ModelError(
            f"{folder}: the tokenizer is damaged, or of another version: {e}; fetch its files again"
        ) from e
    _check_merges(folder)
    return made


def _check_merges(folder: Path) -> None:
    """Raise a ModelError if no merge of merges.txt gives a token of vocab.json: prompts would become single bytes."""
    merges, vocabulary = folder / "merges.txt", folder / "vocab.json"
    if not (merges.is_file() and vocabulary.is_file()):
        return
    with parts.reading(folder):
        known = json.loads(vocabulary.read_text(encoding="utf-8"))
        lines = merges.read_text(encoding="utf-8").splitlines()
    pairs = (line.split() for line in lines if not line.startswith("#version"))
    if not any(len(pair) == 2 and "".join(pair) in known for pair in pairs):
        raise ModelError(f"{merges}: no line of it joins two tokens into one that vocab.json has; fetch the file again")


def _readable(kind: Any, folder: Path) -> Any:
    """`kind`, or its fast class if the folder has only the file for that; ModelError if files are missing.

    transformers 5 writes tokenizer.json for a T5Tokenizer; in transformers 4 the class of that name reads spiece.model.
    """
    import transformers

    one, fast = "tokenizer.json", getattr(transformers, f"{kind.__name__}Fast", kind)
    others = {str(name) for name in kind.vocab_files_names.values()} - {one}
    missing = sorted(name for name in others if not (folder / name).is_file())
    if not missing:
        return kind
    if one in fast.vocab_files_names.values() and (folder / one).is_file():
        return fast
    raise ModelError(f"{folder}: the tokenizer lacks {', '.join(missing)}; copy its files there")
