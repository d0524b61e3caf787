"""The base model's folder, as downloads, copies and other tools leave it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.hostile.case import RUN, Case, Project

Spoil = Callable[[Project], object]
NETWORKS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")
PARTS = (*NETWORKS, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler")
EITHER = (0, 2)


def cases() -> list[Case]:
    """All of this file."""
    return [*_parts(), *_weights(), *_indices(), *_folders()]


def spoiled(name: str, spoil: Spoil, *says: str, status: tuple[int, ...] = (2,), **rest: Any) -> Case:
    """Status 0 must mean that nothing of importance was spoiled: results as of an undisturbed run."""
    rest = {"equal": 0 in status, **rest}
    return Case(name=name, area="models", spoil=spoil, typed=RUN, says=says, status=status, again=True, **rest)


def edited(file: str, edit: Callable[[dict[str, Any]], Any]) -> Spoil:
    def spoil(project: Project) -> None:
        path = project.path(f"base/{file}")
        path.write_text(json.dumps(edit(json.loads(path.read_text()))))

    return spoil


def put_in(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda old: {**old, **values}


def _parts() -> list[Case]:
    """Each part is missing, or is a file."""
    found = [spoiled(f"{part} is missing", lambda p, part=part: p.remove(f"base/{part}"), part) for part in PARTS]

    def file(part: str) -> Spoil:
        return lambda p: (p.remove(f"base/{part}"), p.write(f"base/{part}", "x"))

    found += [
        spoiled(f"{part} is a file", file(part), part) for part in ("transformer", "vae", "tokenizer_3", "scheduler")
    ]
    found += [
        spoiled(f"{part} has no config", lambda p, part=part: p.remove(f"base/{part}/config.json"), part)
        for part in NETWORKS
    ]
    return found


# weights


def _file(project: Project, part: str) -> Path:
    return project.path(f"base/{part}/*.safetensors")


def _bytes(part: str, change: Callable[[bytes], bytes]) -> Spoil:
    def spoil(project: Project) -> None:
        path = _file(project, part)
        path.write_bytes(change(path.read_bytes()))

    return spoil


def _tensors(part: str, change: Callable[[dict[str, Any]], dict[str, Any]], metadata: bool = True) -> Spoil:
    def spoil(project: Project) -> None:
        from safetensors.numpy import load_file, save_file

        path = _file(project, part)
        save_file(change(load_file(path)), path, {"format": "pt"} if metadata else None)

    return spoil


def _first(tensors: dict[str, Any]) -> str:
    """The name of a tensor of two axes, in order."""
    return min(name for name, tensor in tensors.items() if tensor.ndim >= 2)


def _without(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if name != _first(tensors)}


def _shaped(tensors: dict[str, Any]) -> dict[str, Any]:
    name = _first(tensors)
    return {**tensors, name: tensors[name][:-1].copy()}


def _nan(tensors: dict[str, Any]) -> dict[str, Any]:
    name = _first(tensors)
    return {**tensors, name: tensors[name] * float("nan")}


def _more(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    return {**tensors, "nobody.reads.this": np.zeros(3, np.float32)}  # alignment changes: last bits may


def _renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {f"module.{name}": tensor for name, tensor in tensors.items()}


def _integers(tensors: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    name = _first(tensors)
    return {**tensors, name: np.zeros(tensors[name].shape, np.int64)}


def _weights() -> list[Case]:
    found: list[Case] = []
    for part in NETWORKS:
        found += [
            spoiled(f"{part}: weights gone", lambda p, part=part: _file(p, part).unlink(), part),
            spoiled(f"{part}: weights emptied", _bytes(part, lambda data: b""), part),
            spoiled(f"{part}: weights cut", _bytes(part, lambda data: data[: len(data) // 2]), part),
            spoiled(f"{part}: header flipped", _bytes(part, lambda data: data[:20] + b"\xff" + data[21:]), part),
            spoiled(f"{part}: a tensor is missing", _tensors(part, _without), part),
            spoiled(f"{part}: a tensor is of another shape", _tensors(part, _shaped), part),
            spoiled(f"{part}: a tensor too many", _tensors(part, _more), part, status=EITHER, equal=False),
            spoiled(f"{part}: all names have a prefix", _tensors(part, _renamed), part),
            spoiled(f"{part}: no metadata", _tensors(part, dict, metadata=False), part, status=EITHER),
            spoiled(f"{part}: no tensors", _tensors(part, lambda _: {}), part),
        ]
    found += [spoiled(f"{part}: NaN", _tensors(part, _nan), status=(2,)) for part in NETWORKS]
    return [
        *found,
        spoiled(
            "transformer: whole numbers", _tensors("transformer", _integers), "transformer", status=EITHER, equal=False
        ),
        spoiled(
            "transformer: a header of 2**60 bytes",
            _bytes("transformer", lambda data: (1 << 60).to_bytes(8, "little") + data[8:]),
            "transformer",
        ),
        spoiled("transformer: a pickle", _pickled("transformer", "diffusion_pytorch_model.bin"), "transformer"),
        spoiled("text_encoder: a pickle", _pickled("text_encoder", "pytorch_model.bin"), "text_encoder"),
        spoiled(
            "transformer: an index of missing files",
            _indexed("diffusion_pytorch_model-00001-of-00002.safetensors"),
            "transformer",
        ),
        spoiled("transformer: an index that climbs out", _indexed("../../../outside/precious.txt"), "transformer"),
        spoiled("transformer: an index of nonsense", _index("nonsense"), "transformer"),
        spoiled("transformer: an index that is a list", _index("[]"), "transformer"),
    ]


class _Evil:
    """Unpickled, it writes a file."""

    def __reduce__(self) -> Any:
        return exec, ("open('mine.txt', 'w').write('unpickled')",)


def _pickled(part: str, name: str) -> Spoil:
    def spoil(project: Project) -> None:
        _file(project, part).unlink()
        project.write(f"base/{part}/{name}", pickle.dumps(_Evil()))

    return spoil


def _index(text: str) -> Spoil:
    def spoil(project: Project) -> None:
        _file(project, "transformer").unlink()
        project.write("base/transformer/diffusion_pytorch_model.safetensors.index.json", text)

    return spoil


def _indexed(file: str) -> Spoil:
    return _index(json.dumps({"metadata": {}, "weight_map": {"proj_out.weight": file}}))


# model_index.json, and the folder as a whole


def _indices() -> list[Case]:
    file = "model_index.json"

    def entry(name: str, edit: Callable[[dict[str, Any]], Any], *says: str, status: tuple[int, ...] = (2,)) -> Case:
        return spoiled(f"index: {name}", edited(file, edit), *(says or (file,)), status=status)

    return [
        spoiled("index: missing", lambda p: p.remove(f"base/{file}"), file),
        spoiled("index: empty", lambda p: p.write(f"base/{file}", ""), file),
        spoiled("index: not UTF-8", lambda p: p.write(f"base/{file}", b"\xff"), file),
        entry("a list", lambda _: [1]),
        entry("null", lambda _: None),
        entry("of another family", put_in(_class_name="FluxPipeline"), "FluxPipeline"),
        entry("of no family", put_in(_class_name=3), "3"),
        entry("without a class", lambda old: {k: v for k, v in old.items() if k != "_class_name"}, "_class_name"),
        entry("a class of os", put_in(text_encoder=["os", "system"]), "text_encoder"),
        entry("a class of text", put_in(text_encoder="CLIPTextModel"), "text_encoder"),
        entry("a class that is a number", put_in(text_encoder=["transformers", 3]), "text_encoder"),
        entry("a class that is unknown", put_in(text_encoder_3=["transformers", "Nowhere"]), "text_encoder_3"),
        entry(
            "a class of another kind", put_in(text_encoder=["transformers", "BertModel"]), "text_encoder", status=EITHER
        ),
        entry("a list of three", put_in(vae=["diffusers", "AutoencoderKL", 3]), "vae", status=EITHER),
        entry("an empty list", put_in(vae=[]), "vae"),
        entry("no transformer", put_in(transformer=[None, None]), "transformer"),
        entry("no tokenizer", put_in(tokenizer_3=[None, None]), "tokenizer_3", status=EITHER),
        entry("a class that climbs out", put_in(vae=["../../outside", "precious"]), "vae", status=EITHER),
    ]


def _folders() -> list[Case]:
    def rank(project: Project) -> None:
        project.replace("rank = 2", "rank = 1000000000")

    def loop(project: Project) -> None:
        project.path("base").rename(project.folder / "other")
        project.path("base").symlink_to("base", target_is_directory=True)

    def linked(project: Project) -> None:
        project.path("base").rename(project.folder / "other")
        project.path("base").symlink_to("other", target_is_directory=True)

    return [
        spoiled("folder is empty", lambda p: (p.remove("base"), p.path("base").mkdir()), "base"),
        spoiled("folder is missing", lambda p: p.remove("base"), "base"),
        spoiled("folder is a link to itself", loop, "base"),
        spoiled("folder is a link", linked, status=(0,)),
        spoiled(
            "folder has files of the user's",
            lambda p: p.write("base/transformer/mine.txt", "x"),
            "mine.txt",
            status=EITHER,
        ),
        spoiled("LoRA of rank 10**9 is run", rank, "rank"),
        spoiled(
            "another variant is asked for",
            lambda p: p.replace('path = "base"', 'path = "base"\nvariant = "fp16"'),
            "fp16",
        ),
        spoiled(
            "variant climbs out", lambda p: p.replace('path = "base"', 'path = "base"\nvariant = "../../x"'), "variant"
        ),
        spoiled(
            "revision of a folder",
            lambda p: p.replace('path = "base"', 'path = "base"\nrevision = "main"'),
            "revision",
            status=EITHER,
        ),
        spoiled(
            "attention of nonsense",
            lambda p: p.replace('path = "base"', 'path = "base"\nattention = "nonsense"'),
            "attention",
        ),
        spoiled(
            "max_sequence_length of 10**9",
            lambda p: p.replace("max_sequence_length = 8", "max_sequence_length = 1000000000"),
            "max_sequence_length",
        ),
        spoiled("flux for a folder of sd3", lambda p: p.replace('use = "sd3"', 'use = "flux"'), "base"),
        spoiled("wan for a folder of sd3", lambda p: p.replace('use = "sd3"', 'use = "wan"'), "base"),
        spoiled(
            "a name on the hub that is not here",
            lambda p: p.replace('path = "base"', 'path = "nobody/nothing"'),
            "nobody/nothing",
        ),
    ]
