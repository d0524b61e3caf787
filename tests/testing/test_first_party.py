"""No false alarm: everything that corefit, its plugins and its examples offer passes every check of its kind."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS

from corefit import testing
from corefit.flow import interpolate, per_sample
from corefit.plugins import Host, Offer
from corefit.plugins.kinds import KINDS
from corefit.testing.keys import check_keys
from corefit.types import Weighted
from corefit_sft import Sft
from corefit_soar import Soar

EXAMPLES = Path(__file__).parents[2] / "examples"
MEANT = {
    ("objectives", "soar"): ({}, {"points": 3, "chunk": 2, "weight": 2.0, "levels": "table", "dropout": 0.3}),
    ("objectives", "flow_grpo"): (
        {"group": 4, "steps": 4},
        {"group": 4, "steps": 4, "beta": 0.1, "updates": 2},
        {"group": 4, "steps": 5, "window": 2, "strategy": "progressive", "interval": 1, "start": "shared"},
        {"group": 4, "steps": 5, "window": 2, "window_range": (1, 4), "start": "shared", "std": "each"},
        {"group": 4, "steps": 4, "ratio": "guard", "updates": 2},
    ),
    ("objectives", "dpo"): ({}, {"loss": "ipo", "sft": 1.0, "dropout": 0.3, "reference_every": 2}),
    ("objectives", "online_dpo"): ({"group": 4, "steps": 4}, {"group": 4, "steps": 4, "epochs": 2, "draws": 1}),
    ("objectives", "reward_gradient"): (
        {"method": "refl", "steps": 4},
        {"method": "draft", "steps": 4, "truncation": 2},
        {"method": "draft_lv", "steps": 4, "guidance": 1.0},
        {"method": "leap_align", "steps": 4, "threshold": 2.0},
    ),
    ("objectives", "nft"): (
        {"group": 4, "steps": 4},
        {"group": 4, "steps": 4, "beta": 0.1, "kl": 0.0, "updates": 2, "epochs": 2, "decay": 0.5, "adv_mode": "binary"},
    ),
    ("objectives", "awm"): (
        {"group": 4, "steps": 4, "train_timesteps": 2},
        {"group": 4, "steps": 4, "train_timesteps": 2, "updates": 2, "epochs": 2, "time_type": "noise", "beta": 0.0},
    ),
    ("objectives", "sum"): ({"of": (Weighted("sft", Sft()), Weighted("soar", Soar(points=2)))},),
    ("samplers", "cps"): ({}, {"noise": 0.0}, {"noise": 1.0}),
    ("samplers", "flow_sde"): ({}, {"noise": 0.0}),
}
"""Keys that offers are checked with, where not their defaults alone."""

IMPROVES = {
    "sft": ({}, lambda backbone, batch: fit(backbone, batch)),
    "soar": ({"points": 2}, lambda backbone, batch: fit(backbone, batch)),
    "reflexflow": ({}, lambda backbone, batch: fit(backbone, batch)),
    "reward_gradient": ({"method": "leap_align", "steps": 6, "guidance": 1.0}, "reward"),
    # of few trained steps: on a toy, those that are not trained pull against them
    "flow_grpo": ({"group": 4, "steps": 6, "window": 2, "guidance": 1.0}, "reward"),
    # of a small beta, which lets the model learn enough in few steps
    "dpo": ({"beta": 5.0}, lambda backbone, batch: preferred(backbone, batch)),
    "online_dpo": ({"group": 4, "steps": 4, "guidance": 1.0, "draws": 2}, "reward"),
    "nft": ({"group": 4, "steps": 4}, "reward"),
    # with the power of the error, each pair counts by how well it fits already, which on a toy outweighs its advantage
    "awm": ({"group": 4, "steps": 6, "train_timesteps": 3, "weighting": "t"}, "reward"),
}
"""Keys of objectives, and what training on them must raise."""


def offered() -> list[Offer]:
    """Every offer there is, installed and in the examples, but rewards that tests/plugins/rewards checks."""
    host = Host()
    host.add_file(EXAMPLES / "plugin" / "corefit_reflexflow.py")
    if importlib.util.find_spec("sklearn"):
        host.add_file(EXAMPLES / "digits" / "digits.py")
    found = [offer for offers in host.offers.values() for offer in offers.values()]
    return [offer for offer in found if not offer.cls.__module__.startswith("corefit_rewards.")]


def backbone(offer: Offer, pictures: Path, folder: Path) -> None:
    tiny: Callable[..., Path] = getattr(testing, f"tiny_{offer.name}")
    made = offer.cls(str(tiny(folder / "base", words=WORDS)), max_sequence_length=16)
    made.load(torch.device("cpu"), torch.float32)
    testing.check_backbone(made, prompts=["a red sky", "a blue sea"])


def objective(offer: Offer, pictures: Path, folder: Path) -> None:
    for keys in MEANT.get((offer.kind, offer.name), ({},)):
        testing.check_objective(offer.cls(**keys))
    if offer.name in IMPROVES:
        keys, improves = IMPROVES[offer.name]
        testing.check_objective(offer.cls(**keys), improves=improves, shape=(3, 4, 4))


def fit(backbone, batch):
    """How little the model errs on held-out rows, [B]."""
    return -error(backbone, batch, batch.clean)


def preferred(backbone, batch):
    """How much more the model errs on the rejected media of held-out rows, [B]."""
    return error(backbone, batch, batch.extra["rejected"]) - error(backbone, batch, batch.clean)


def error(backbone, batch, x0):
    ctx = testing.toy_context(backbone, batch.rows)
    noise, sigma = ctx.randn_like(x0), ctx.sigma(x0)
    v = backbone.velocity(interpolate(x0, noise, sigma), sigma, batch.cond)
    return per_sample((v - (noise - x0)) ** 2)


def sampler(offer: Offer, pictures: Path, folder: Path) -> None:
    for keys in MEANT.get((offer.kind, offer.name), ({},)):
        testing.check_sampler(offer.cls(**keys))


def noise(offer: Offer, pictures: Path, folder: Path) -> None:
    testing.check_noise(offer.cls())


def reward(offer: Offer, pictures: Path, folder: Path) -> None:
    """The judge of digits, on scenes of its own."""
    source = next(each.cls for each in offered() if each.name == "digits")
    scenes = list(source(count=5).examples())
    media = torch.stack([torch.from_numpy(scene.media).movedim(-1, 0).float() / 255 for scene in scenes])
    testing.check_reward(offer.cls(), media, [scene.prompt for scene in scenes], [scene.meta for scene in scenes])


def source(offer: Offer, pictures: Path, folder: Path) -> None:
    if offer.name == "digits":
        return testing.check_source(offer.cls())
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        shutil.copy(pictures / row["media"], folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(row["prompt"])
    path = {
        "jsonl": lambda: pictures / "train.jsonl",
        "imagefolder": lambda: folder,
        "text": lambda: folder / "0.txt",
        "webdataset": lambda: packed(folder),
        "hf_dataset": lambda: saved(folder, rows),
        "parquet": lambda: tabled(folder, rows),
    }[offer.name]()
    return testing.check_source(offer.cls(path))


def packed(folder: Path) -> str:
    with tarfile.open(folder / "data-0.tar", "w") as tar:
        for path in sorted(folder.glob("[0-9].*")):
            tar.add(path, path.name)
    return str(folder / "data-0.tar")


def tabled(folder: Path, rows: list[Mapping[str, Any]]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    media = [{"bytes": (folder / f"{n}.png").read_bytes(), "path": None} for n in range(len(rows))]
    parquet.write_table(arrow.table({"image": media, "text": [r["prompt"] for r in rows]}), folder / "rows.parquet")
    return folder / "rows.parquet"


def saved(folder: Path, rows: list[Mapping[str, Any]]) -> Path:
    datasets = pytest.importorskip("datasets")
    columns = {"image": [str(folder / f"{n}.png") for n in range(len(rows))], "text": [row["prompt"] for row in rows]}
    datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image()).save_to_disk(folder / "saved")
    return folder / "saved"


def observer(offer: Offer, pictures: Path, tmp_path: Path) -> None:
    """Its keys alone: what trackers send is in tests/plugins/test_trackers.py."""
    check_keys(offer.cls, KINDS["observers"].protocol)


def optimizer(offer: Offer, pictures: Path, tmp_path: Path) -> None:
    testing.check_optimizer(offer.cls())


CHECKS = {
    "optimizers": optimizer,
    "observers": observer,
    "backbones": backbone,
    "objectives": objective,
    "samplers": sampler,
    "noise_weightings": noise,
    "rewards": reward,
    "sources": source,
}


@pytest.mark.parametrize("offer", offered(), ids=lambda offer: f"{offer.kind}.{offer.name}")
def test_no_false_alarm(offer, pictures, tmp_path):
    CHECKS[offer.kind](offer, pictures, tmp_path)
