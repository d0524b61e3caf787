"""The decisions of a run: --dry-run says what the run then does, and a kill between any two writes is harmless.

Training writes its checkpoints and a model, but loads and learns nothing; all else is the run itself.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import quick
import torch
from attrs import define, evolve, field
from conftest import Project
from torch.distributed.checkpoint import CheckpointException

from corefit import Condition
from corefit.errors import ConfigError, DataError, Stopped
from corefit.pipeline import Pipeline, read
from corefit.run import observers, plan, record, report, run
from corefit.run.evaluation.evaluator import Evaluator
from corefit.system import files
from corefit.train import checkpoint as state
from corefit.train import loop as train
from corefit_backbones.backbone import Diffusers
from corefit_backbones.sd3 import Sd3

SETTINGS = ("stage.soar.steps=3", "stage.soar.checkpoint_every=1", "stage.soar.keep=2", "stage.grpo.steps=2")


class Killed(BaseException):
    """The process is gone."""


@define
class Toy:
    """A project whose runs take no time, and what they did."""

    project: Project
    capsys: pytest.CaptureFixture[str]
    trained: list[tuple[str, int]] = field(factory=list)
    """(stage, the step it was trained from), in order."""
    stop: tuple[str, int] | None = None
    """(stage, step) after which a signal comes."""

    @property
    def folder(self) -> Path:
        return self.project.folder / "runs" / "tiny"

    @property
    def said(self) -> list[str]:
        """Lines since this was asked before."""
        return self.capsys.readouterr().out.splitlines()

    def pipeline(self, *settings: str) -> Pipeline:
        return read(self.project.file, [*SETTINGS, *settings])

    def again(self, pipeline: Pipeline, again: str = "") -> None:
        """A run of a pipeline that has been read."""
        self.trained = []
        with quick.uncollected():
            run.run(pipeline, again=again)

    def run(self, *settings: str, again: str = "") -> None:
        """The whole run, or until `stop`."""
        self.again(self.pipeline(*settings), again)

    def only(self, *stages: str, settings: tuple[str, ...] = ()) -> dict[str, str]:
        """A run with --only, after the dry listing of it, which is returned."""
        lines = self.foreseen(*settings, only=stages)
        self.trained = []
        run.run(self.pipeline(*settings), only=stages)
        return lines

    def foreseen(self, *settings: str, again: str = "", only: tuple[str, ...] = ()) -> dict[str, str]:
        """The dry listing."""
        before, _ = self.project.tree(), self.said
        run.dry_run(self.pipeline(*settings), again=again, only=only)
        assert self.project.tree() == before, "a dry run writes nothing"
        return dict(re.split(r"  +", line, maxsplit=1) for line in self.said)

    def interrupted(self, stage: str, step: int, *settings: str, again: str = "") -> None:
        """A run that a signal ends."""
        self.stop = (stage, step)
        with pytest.raises(Stopped):
            self.run(*settings, again=again)
        self.stop = None

    def train(self, job, ranks):
        """Writes the checkpoints that are due."""
        found, _ = state.latest(job.folder / "checkpoints")
        first, stage = found.step if found else 0, job.stage
        self.trained.append((stage.name, first))
        job.listener.started(first)
        for step in range(first + 1, stage.steps + 1):
            stopping = self.stop == (stage.name, step)
            if stopping or (step % stage.checkpoint_every == 0 and step < stage.steps):
                info = {"identity": job.identity}
                state.save(job.folder / "checkpoints", step, {"step": torch.tensor(step)}, info, stage.keep)
            if stopping:
                raise Stopped(step)
        job.backbone.transformer = torch.nn.Identity()
        return train.Cost(1.0, 2.0, 3)


@pytest.fixture
def toy(project, monkeypatch, capsys) -> Toy:
    made = Toy(project, capsys)

    def save(backbone, folder, tensors):
        (folder / "transformer").mkdir()
        (folder / "transformer" / "weights").write_bytes(b"trained")

    monkeypatch.setattr(train, "train", made.train)
    monkeypatch.setattr(run.Run, "_refuse_too_large", lambda *args: None)
    monkeypatch.setattr(record, "_commit", lambda folder: None)
    monkeypatch.setattr(Evaluator, "media", lambda judge, net, rows, _=0: torch.full((len(rows), 3, 16, 16), 0.5))
    monkeypatch.setattr(Evaluator, "_drift_of", lambda judge, net, batch, _: ([0.0], [[row / 7] for row in batch.rows]))
    monkeypatch.setattr(Diffusers, "save_tensors", save)
    monkeypatch.setattr(Sd3, "load", lambda backbone, *args: setattr(backbone, "transformer", torch.nn.Identity()))
    monkeypatch.setattr(Sd3, "load_lora", lambda *args: None)
    monkeypatch.setattr(Sd3, "encode_text", lambda _, prompts: Condition({"a": torch.ones(len(prompts), 2)}))
    monkeypatch.setattr(Sd3, "encode", lambda _, pictures: torch.ones(len(pictures), 4, 8, 8))
    for place in (report, observers):
        monkeypatch.setattr(place, "grid", lambda media, prompts, png: files.write_whole(png, b"a grid"))
    for name in ("page", "comparison", "print_table"):
        monkeypatch.setattr(report, name, lambda *args: None)
    return made


USED = {"01-soar": "use as it is: finished, 3 steps", "02-grpo": "use as it is: finished, 2 steps"}
EVALUATED = {f"evaluate {name}": "evaluated before" for name in ("base", "soar", "grpo")}
DONE = {"data": "8 examples, cached", "prompts": "6 examples, cached", **USED, **EVALUATED}
NEW = "on 4 held-out prompts: not evaluated yet"
ASIDE = " (the former one goes to superseded/)"
ANEW = {
    "02-grpo": f"train 2 steps: stage soar, which it starts from, changed{ASIDE}",
    "evaluate soar": NEW,
    "evaluate grpo": NEW,
}
"""The lines of the later stages if the first stage has changed."""


def superseded(toy: Toy) -> set[str]:
    return {path.name for path in toy.folder.glob("superseded/*")}


def foreseen(toy: Toy, *settings: str, again: str = "") -> dict[str, str]:
    """The dry listing but for what is used as it is, once the run has done what it says, and no more."""
    lines, before = toy.foreseen(*settings, again=again), superseded(toy)
    toy.run(*settings, again=again)
    evaluated = [match[1] for line in toy.said if (match := re.match(r"(\w+): 4 held-out prompts: 4/4", line))]
    assert evaluated == [
        name[9:] for name, what in lines.items() if name[:8] == "evaluate" and what != "evaluated before"
    ]
    todo = {name: what for name, what in lines.items() if name[0] == "0" and not what.startswith("use")}
    assert toy.trained == [(name[3:], begin(what)) for name, what in todo.items()]
    moved = {name.rpartition("-")[0] for name in superseded(toy) - before}
    assert moved == {name for name, what in todo.items() if what.endswith(ASIDE)}
    left = toy.foreseen(*settings).values()
    assert [what for what in left if not re.search("^use as it is|evaluated before|cached$", what)] == []
    return {name: what for name, what in lines.items() if what != DONE[name]}


def begin(what: str) -> int:
    """Where a line of the listing says that training begins."""
    match = re.match(r"go on from step (\d+) of|train \d steps?( from \w+)?: ", what)
    assert match, what
    return int(match[1] or 0)


def test_all_is_new_and_then_nothing_is(toy):
    assert foreseen(toy) == {
        "data": "8 examples to encode",
        "prompts": "6 examples to encode",
        "evaluate base": NEW,
        "01-soar": "train 3 steps: not trained yet",
        "evaluate soar": NEW,
        "02-grpo": "train 2 steps: not trained yet",
        "evaluate grpo": NEW,
    }
    assert foreseen(toy) == {}
    assert superseded(toy) == set()


LOOKED = """
from pathlib import Path

from attrs import frozen

from corefit import Supervised, hookimpl


@frozen
class Looked(Supervised):
    table: Path

    def terms(self, batch, ctx):
        raise NotImplementedError


@hookimpl
def corefit_objectives():
    return {"looked": Looked}
"""


def moved(toy: Toy, folder: Path) -> Toy:
    """The project in another place, with its runs, as `mv` leaves it."""
    shutil.move(toy.project.folder, folder)
    toy.project.folder.mkdir()  # this process is in it
    return Toy(evolve(toy.project, folder=folder), toy.capsys)


def test_a_project_that_is_moved_is_finished(toy, tmp_path_factory):
    toy.run()
    assert moved(toy, tmp_path_factory.mktemp("elsewhere") / "project").foreseen() == DONE


def test_a_project_with_a_key_that_is_a_path_is_finished_after_a_move(toy, tmp_path_factory):
    (toy.project.folder / "looked.py").write_text(LOOKED)
    toy.project.swap(
        ('plugins = ["bright.py"]', 'plugins = ["bright.py", "looked.py"]'),
        ('{ use = "soar", points = 2 }', '{ use = "looked", table = "tables/a.json" }'),
    )
    toy.interrupted("grpo", 1)
    elsewhere = moved(toy, tmp_path_factory.mktemp("elsewhere") / "project")
    lines = elsewhere.foreseen()
    assert lines["01-soar"] == USED["01-soar"]
    assert lines["02-grpo"] == "go on from step 1 of 2: it was interrupted"
    other = elsewhere.foreseen("stage.soar.objective.table='tables/b.json'")
    assert other["01-soar"] == f"train 3 steps: objective.table tables/a.json -> tables/b.json{ASIDE}"


def test_nothing_is_judged_without_eval(toy):
    toy.project.write(toy.project.text.partition("[eval]")[0])
    assert [*foreseen(toy)] == ["data", "01-soar", "02-grpo"]


# what changed


@pytest.mark.parametrize(
    ("setting", "lines"),
    [
        ("stage.soar.keep=3", {}),
        ("stage.soar.optimizer.lr=5e-4", {"01-soar": f"train 3 steps: optimizer.lr 0.001 -> 0.0005{ASIDE}", **ANEW}),
        ("stage.soar.steps=4", {"01-soar": f"train 4 steps: steps 3 -> 4{ASIDE}", **ANEW}),
        ("stage.grpo.steps=1", {"02-grpo": f"train 1 step: steps 2 -> 1{ASIDE}", "evaluate grpo": NEW}),
        ("seed=1", {"01-soar": f"train 3 steps: seed 0 -> 1{ASIDE}", **ANEW}),
        ("eval.seed=1", dict.fromkeys(EVALUATED, "on 4 held-out prompts: eval.seed 0 -> 1")),
        ("eval.steps=3", dict.fromkeys(EVALUATED, "on 4 held-out prompts: eval.steps 2 -> 3")),
    ],
)
def test_a_key(toy, setting, lines):
    toy.run()
    assert foreseen(toy, setting) == lines


def test_the_data(toy):
    toy.run()
    with toy.project.own("train.jsonl").open("a") as file:
        file.write('{"prompt": "a picture of a red sea", "media": "media/0.png", "number": 9}\n')
    changed = {"data": "9 examples to encode", "01-soar": f"train 3 steps: its data changed{ASIDE}", **ANEW}
    assert foreseen(toy) == changed


def test_the_code_of_a_plugin(toy):
    toy.run()
    plugin = toy.project.folder / "bright.py"
    plugin.write_text(plugin.read_text().replace("mean(1) *", "amax(1) *"))
    assert foreseen(toy) == {
        "evaluate base": "on 4 held-out prompts: code of bright.py changed",
        "evaluate soar": "on 4 held-out prompts: code of bright.py changed",
        "02-grpo": f"train 2 steps: code of bright.py changed{ASIDE}",
        "evaluate grpo": NEW,
    }


def test_a_run_says_why_it_supersedes(toy):
    toy.run()
    assert toy.said
    toy.run("stage.soar.optimizer.lr=5e-4", "stage.soar.ema=0.9")
    assert [line for line in toy.said if "superseded" in line] == [
        "01-soar: optimizer.lr 0.001 -> 0.0005, ema none -> 0.9; the former one is in superseded/01-soar-1",
        "02-grpo: stage soar, which it starts from, changed; the former one is in superseded/02-grpo-1",
    ]
    toy.run()
    assert superseded(toy) == {"01-soar-1", "01-soar-2", "02-grpo-1", "02-grpo-2"}


# what was interrupted


def test_it_goes_on(toy):
    toy.interrupted("soar", 2)
    assert foreseen(toy)["01-soar"] == "go on from step 2 of 3: it was interrupted"
    assert superseded(toy) == set()


@pytest.mark.parametrize(
    ("harmed", "what"),
    [
        ([2], "go on from step 1 of 3: it was interrupted; 1 newer checkpoint damaged"),
        ([1, 2], "train 3 steps: it was interrupted; 2 newer checkpoints damaged"),
    ],
)
def test_a_damaged_checkpoint_is_not_gone_on_from(toy, harmed, what):
    toy.interrupted("soar", 2)
    for number in harmed:
        (file,) = (toy.folder / "01-soar" / "checkpoints" / f"step-{number:06d}").glob("*.safetensors")
        file.write_bytes(b"")
    assert foreseen(toy)["01-soar"] == what


def test_a_checkpoint_of_another_pipeline_is_never_gone_on_from(toy):
    toy.interrupted("soar", 2)
    lr = "stage.soar.optimizer.lr=5e-4"
    assert foreseen(toy, lr)["01-soar"] == f"train 3 steps: optimizer.lr 0.001 -> 0.0005{ASIDE}"
    kept = toy.folder / "superseded" / "01-soar-1" / "checkpoints"
    assert sorted(path.name for path in kept.iterdir()) == ["step-000001", "step-000002"]
    toy.interrupted("soar", 1)
    toy.interrupted("soar", 1, lr)
    assert foreseen(toy)["01-soar"].startswith("train 3 steps"), "neither of the other, nor its own of long ago"


def test_what_changes_rounding_alone_is_gone_on_with(toy):
    toy.interrupted("soar", 2)
    setting = ("stage.soar.micro_batch=1", "backbone.gradient_checkpointing=true")
    changed = "micro_batch none -> 1, backbone.gradient_checkpointing false -> true"
    going = f"with {changed}, which changes rounding alone"
    assert toy.foreseen(*setting)["01-soar"] == f"go on from step 2 of 3: it was interrupted, {going}"
    toy.interrupted("soar", 3, *setting)
    assert f"01-soar: goes on {going}" in toy.said
    assert foreseen(toy, *setting)["01-soar"] == "go on from step 3 of 3: it was interrupted", "it has said so before"
    assert superseded(toy) == set()
    assert foreseen(toy) == {}, "what is finished stays finished"
    assert foreseen(toy, "eval.batch=1") == {}


# what is missing or damaged


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda file: file.unlink(), "model/transformer/weights is missing"),
        (
            lambda file: file.write_bytes(b"trainee"),
            "model/transformer/weights is damaged: its sha256 is not the one in",
        ),
        (lambda file: shutil.rmtree(file.parents[1]), "model/transformer/weights is missing"),
    ],
    ids=["missing", "damaged", "no model"],
)
def test_a_damaged_model_is_trained_again(toy, harm, said):
    toy.run()
    file = toy.folder / "01-soar" / "model" / "transformer" / "weights"
    done = (toy.folder / "01-soar" / "done.json").read_text()
    harm(file)
    toy.interrupted("soar", 3)
    assert any(re.match(f"01-soar: {said}.*; it is trained again from its newest checkpoint", s) for s in toy.said)
    assert foreseen(toy) == {"01-soar": "go on from step 3 of 3: it was interrupted"}
    assert file.read_bytes() == b"trained"
    assert (toy.folder / "01-soar" / "done.json").read_text() == done
    harm(file)
    (line,) = foreseen(toy).items()
    assert line[0] == "01-soar"
    assert line[1].startswith(f"go on from step 3 of 3: {said}")


def test_hard_links_are_read_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(files, "sha256", lambda file: read.append(file.name) or "0")
    (tmp_path / "a").write_text("a")
    os.link(tmp_path / "a", tmp_path / "b")
    assert plan.hashes(tmp_path) == {"a": "0", "b": "0"}
    assert plan.damage(tmp_path, {"a": "0", "b": "0"}) == ""
    assert read == ["a"]


HARMS = {
    "missing": (lambda file: file.unlink(), "is missing"),
    "cut off": (lambda file: file.write_text('{"identi'), "is damaged (it cannot be read: "),
    "emptied": (lambda file: file.write_text("{}"), "is damaged (it has no digest)"),
    "a list": (lambda file: file.write_text("[]"), "is damaged (it is not a JSON object)"),
    "a letter": (lambda file: swap(file, '"finished"', '"finisher"'), "is damaged (its content does not have the"),
    "a digit": (lambda file: swap(file, '"seconds": 1.0', '"seconds": 7.0'), "is damaged (its content does not have"),
    "emptied hashes": (lambda file: swap(file, '"transformer/weights"', '"transformer/weight"'), "is damaged (its"),
    "no digest": (lambda file: swap(file, '"digest"', '"digesu"'), "is damaged (it has no digest)"),
}
"""Damage to done.json, and the message about it."""


def swap(file: Path, old: str, new: str) -> None:
    """Replace text of a file that must be there."""
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_note_costs_nothing(toy, harm):
    toy.run()
    before, (spoil, said) = contents(toy.folder), HARMS[harm]
    spoil(toy.folder / "02-grpo" / "done.json")
    lines = toy.foreseen()
    assert lines["02-grpo"].startswith(f"{USED['02-grpo']}; its done.json {said}"), lines
    assert lines["evaluate grpo"] == "evaluated before"
    toy.run()
    assert any(line.startswith(f"02-grpo: its done.json {said}") for line in toy.said)
    assert toy.trained == []
    assert contents(toy.folder) == before, "it is written again, and nothing else is"


def test_a_stage_of_which_both_notes_are_damaged_goes_on_from_its_checkpoint(toy):
    toy.interrupted("soar", 2)
    for name in ("done.json", "done.copy.json"):
        (toy.folder / "01-soar" / name).write_text("{}")
    said = "its done.json is damaged (it has no digest)"
    assert foreseen(toy)["01-soar"] == f"go on from step 2 of 3: {said}"
    assert superseded(toy) == set()


def test_a_stage_that_nothing_proves_is_moved_aside(toy):
    toy.run()
    for name in ("done.json", "done.copy.json"):
        (toy.folder / "01-soar" / name).write_text("{}")
    (toy.folder / "01-soar" / "checkpoints" / "step-000002" / "manifest.json").write_text("{}")
    (toy.folder / "01-soar" / "checkpoints" / "step-000001" / "manifest.json").write_text("{}")
    lines = foreseen(toy)
    assert lines["01-soar"] == f"train 3 steps: its done.json is damaged (it has no digest){ASIDE}"
    assert (toy.folder / "superseded" / "01-soar-1" / "model").is_dir()


def test_what_a_version_without_digests_left_is_used(toy):
    toy.interrupted("grpo", 1)
    soar, scores = (json.loads((toy.folder / "01-soar" / name).read_text()) for name in ("done.json", "scores.json"))
    for target in plan.targets(toy.pipeline(), soar["parts"]["dataset"], scores["parts"]["prompts"], "fp32"):
        for name, of in (("done.json", target.weights), ("scores.json", target.scores)):
            if (file := target.folder / name).exists():
                content = json.loads(file.read_text())
                del content["digest"], content["rounding"]
                for key in ("samples", "prompts", "versions"):
                    content.pop(key, None)
                content |= {"identity": files.json_digest(of.former), "parts": of.former}
                file.write_text(json.dumps(content))
    for manifest in toy.folder.glob("*/checkpoints/*/manifest.json"):
        content = json.loads(manifest.read_text()) | {"format": 2}
        del content["digest"], content["info"]["identity"]
        manifest.write_text(json.dumps(content))
    for copy in toy.folder.glob("*/done.copy.json"):
        copy.unlink()
    assert "save_dtype" not in json.loads((toy.folder / "01-soar" / "done.json").read_text())["parts"]["stage"]
    lines = toy.foreseen()
    assert lines["01-soar"] == USED["01-soar"]
    assert lines["evaluate soar"] == "evaluated before"
    assert lines["02-grpo"] == "go on from step 1 of 2: it was interrupted"
    swap(toy.folder / "01-soar" / "done.json", '"seed": 0', '"seed": 1')
    assert toy.foreseen()["01-soar"].endswith(f"its done.json is damaged (it has no digest){ASIDE}")


def test_damaged_scores_are_judged_again(toy):
    toy.run()
    scores = toy.folder / "01-soar" / "scores.json"
    swap(scores, "0.5", "0.6")
    harm = "its scores.json is damaged (its content does not have the digest that is in it)"
    assert foreseen(toy) == {"evaluate soar": f"on 4 held-out prompts: {harm}"}
    swap(scores, "0.5", "0.6")
    toy.run()
    assert f"01-soar: {harm}; it is evaluated again" in toy.said


def test_scores_or_samples_that_are_gone(toy):
    toy.run()
    (toy.folder / "01-soar" / "scores.json").unlink()
    (toy.folder / "02-grpo" / "samples" / "last.safetensors").unlink()
    assert foreseen(toy) == {"evaluate soar": NEW, "evaluate grpo": "on 4 held-out prompts: its samples are missing"}


def test_samples_that_are_damaged_are_made_again(toy):
    toy.run()
    samples = toy.folder / "02-grpo" / "samples" / "last.safetensors"
    whole = samples.read_bytes()
    samples.write_bytes(whole[:-1])
    damaged = "samples/last.safetensors is damaged: its sha256 is not the one in scores.json"
    assert foreseen(toy) == {"evaluate grpo": f"on 4 held-out prompts: {damaged}"}
    toy.run()
    assert samples.read_bytes() == whole
    assert foreseen(toy) == {}


def test_scores_are_not_kept_beside_the_samples_of_others(toy, monkeypatch):
    toy.run()

    def killed(*args):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "keep_samples", killed)
        with pytest.raises(Killed):
            toy.run("eval.steps=3")
    assert foreseen(toy) == {"evaluate base": NEW}


# branches

LATE = """
[[stage]]
name = "late"
from = "soar"
steps = 1
batch = 4
objective = { use = "sft" }

[eval]
"""


@pytest.fixture
def branches(toy) -> Toy:
    """base -> {soar -> late, grpo}, finished."""
    toy.project.swap(('name = "grpo"', 'name = "grpo"\nfrom = "base"'), ("\n[eval]\n", LATE))
    toy.run()
    return toy


def test_branches_are_trained_from_what_they_name(toy):
    toy.project.swap(('name = "grpo"', 'name = "grpo"\nfrom = "base"'), ("\n[eval]\n", LATE))
    lines = toy.foreseen()
    assert lines["02-grpo"] == "train 2 steps from base: not trained yet"
    assert lines["03-late"] == "train 1 step from soar: not trained yet"
    toy.run()
    assert toy.trained == [("soar", 0), ("grpo", 0), ("late", 0)]


def redone(toy: Toy, *settings: str, again: str = "") -> dict[str, str]:
    """What a run does beside using what is finished: by name, without the former folders' new place."""
    lines = toy.foreseen(*settings, again=again)
    toy.run(*settings, again=again)
    assert [name for name, _ in toy.trained] == [n[3:] for n, what in lines.items() if what.startswith("train")]
    assert all(re.search("^use as|before$|cached$", what) for what in toy.foreseen(*settings).values())
    return {name: what.removesuffix(ASIDE) for name, what in lines.items() if what.startswith("train")}


def test_a_change_reaches_what_descends_from_it(branches):
    changed = "stage soar, which it starts from, changed"
    assert redone(branches, "stage.soar.optimizer.lr=5e-4") == {
        "01-soar": "train 3 steps: optimizer.lr 0.001 -> 0.0005",
        "03-late": f"train 1 step from soar: {changed}",
    }
    # from.json of an older run is no part of this: names are looked up in the pipeline of now
    branches.run()
    assert redone(branches, "stage.grpo.optimizer.lr=5e-4") == {
        "02-grpo": "train 2 steps from base: optimizer.lr 2e-05 -> 0.0005"
    }


def test_another_start_is_said(branches):
    assert redone(branches, "stage.late.from=base")["03-late"] == (
        "train 1 step from base: it starts from the base, not stage soar"
    )
    assert redone(branches, "stage.late.from=grpo")["03-late"] == (
        "train 1 step from grpo: it starts from stage grpo, not the base"
    )
    assert redone(branches, "stage.late.from=soar")["03-late"] == (
        "train 1 step from soar: it starts from stage soar, not grpo"
    )


def test_a_chain_is_the_same_with_and_without_from(toy):
    toy.run()
    assert foreseen(toy, "stage.soar.from=base", "stage.grpo.from=soar") == {}


def test_from_runs_a_stage_and_what_descends_from_it_again(branches):
    assert redone(branches, again="soar") == {
        "01-soar": "train 3 steps: --from soar",
        "03-late": "train 1 step from soar: --from soar",
    }
    assert [*redone(branches, again="grpo")] == ["02-grpo"]
    assert [*redone(branches, again="late")] == ["03-late"]


def test_from_joins_what_an_interrupted_one_has_left(branches):
    branches.interrupted("soar", 1, again="soar")
    branches.again(branches.pipeline(), "grpo")
    assert branches.trained == [("soar", 1), ("grpo", 0), ("late", 0)]


# --only


LEFT_OUT = "leave out: --only does not name it"


def rows_of(toy: Toy) -> list[str]:
    return list(dict.fromkeys(row["stage"] for row in json.loads((toy.folder / "results.json").read_text())))


def test_only_runs_what_it_names_and_what_that_comes_from(branches):
    shutil.rmtree(branches.folder)
    lines = branches.only("grpo")
    assert [lines["01-soar"], lines["03-late"]] == [LEFT_OUT, LEFT_OUT]
    assert branches.trained == [("grpo", 0)]
    assert rows_of(branches) == ["base", "grpo"]
    branches.only("late")
    assert branches.trained == [("soar", 0), ("late", 0)]
    assert rows_of(branches) == ["base", "soar", "grpo", "late"], "what is finished stays in the results"
    assert branches.only("late")["02-grpo"].startswith("use as it is")
    assert branches.trained == []
    tree = branches.project.tree()
    branches.run()
    assert branches.trained == []
    assert branches.project.tree().keys() == tree.keys(), "all stages are finished, one after the other"


def test_only_leaves_what_has_changed_as_it_is(branches):
    branches.run()
    changed = ("stage.soar.optimizer.lr=5e-4", "stage.grpo.optimizer.lr=5e-4")
    lines = branches.only("grpo", settings=changed)
    assert [lines["01-soar"], lines["03-late"]] == [LEFT_OUT, LEFT_OUT]
    assert branches.trained == [("grpo", 0)]
    assert superseded(branches) == {"02-grpo-1"}
    assert rows_of(branches) == ["base", "grpo"]


def test_only_forgets_nothing_of_an_interrupted_from(branches):
    branches.interrupted("soar", 1, again="soar")
    branches.only("grpo")
    assert branches.trained == []
    branches.run()
    assert branches.trained == [("soar", 1), ("late", 0)]
    assert not list(branches.folder.glob("*from.json*"))


def test_only_names_stages(branches):
    shutil.rmtree(branches.folder)
    with pytest.raises(ConfigError, match=r"--only lat: there is no stage 'lat' \(did you mean 'late'\?\)"):
        run.run(branches.pipeline(), only=("lat",))
    with pytest.raises(ConfigError, match="--from soar runs late anew, which --only leaves out"):
        run.run(branches.pipeline(), again="soar", only=("soar",))
    assert not branches.folder.exists()


# --from


def test_from_runs_a_stage_and_those_after_it_again(toy):
    toy.run()
    grpo = {"02-grpo": f"train 2 steps: --from grpo{ASIDE}", "evaluate grpo": NEW}
    assert foreseen(toy, again="grpo") == grpo
    assert foreseen(toy) == {}
    assert foreseen(toy, again="grpo") == grpo, "a request that was carried out can be made again"
    assert superseded(toy) == {"02-grpo-1", "02-grpo-2"}
    assert foreseen(toy, again="soar") == {
        "01-soar": f"train 3 steps: --from soar{ASIDE}",
        "evaluate soar": NEW,
        "02-grpo": f"train 2 steps: --from soar{ASIDE}",
        "evaluate grpo": NEW,
    }
    assert not list(toy.folder.glob("*from.json*"))


def test_from_in_a_run_that_has_not_come_so_far(toy):
    toy.interrupted("soar", 1)
    lines = foreseen(toy, again="grpo")
    assert lines["01-soar"] == "go on from step 1 of 3: it was interrupted"
    assert lines["02-grpo"] == "train 2 steps: not trained yet"


@pytest.mark.parametrize("again", ["soar", ""], ids=["same command", "plain run"])
def test_from_goes_on_after_a_stop(toy, again):
    toy.run()
    toy.interrupted("soar", 2, again="soar")
    toy.interrupted("grpo", 1, again=again)
    assert toy.trained == [("soar", 2), ("grpo", 0)]
    lines = {"02-grpo": "go on from step 1 of 2: it was interrupted", "evaluate grpo": NEW}
    assert foreseen(toy, again=again) == lines
    assert superseded(toy) == {"01-soar-1", "02-grpo-1"}
    assert toy.foreseen(again="soar")["01-soar"] == f"train 3 steps: --from soar{ASIDE}", "the run ended: a new request"


def test_from_another_stage_is_another_request(toy):
    toy.run()
    toy.interrupted("soar", 1, again="soar")
    lines = foreseen(toy, again="grpo")
    assert lines["01-soar"] == "go on from step 1 of 3: it was interrupted"
    assert lines["02-grpo"] == f"train 2 steps: --from grpo{ASIDE}"
    toy.interrupted("grpo", 1, again="grpo")
    assert foreseen(toy, again="soar")["02-grpo"] == f"train 2 steps: --from soar{ASIDE}"


def test_from_an_unknown_stage(toy):
    before = toy.project.tree()
    for attempt in (toy.run, toy.foreseen):
        with pytest.raises(ConfigError, match=r"--from sora: there is no stage 'sora' \(did you .*\); .*: soar, grpo"):
            attempt(again="sora")
    assert toy.project.tree() == before


@pytest.mark.parametrize("harm", [lambda file: file.write_text("{"), lambda file: swap(file, "02-grpo", "02-gapo")])
def test_a_damaged_request_is_named_and_can_be_made_again(toy, harm):
    toy.run()
    toy.interrupted("soar", 1, again="soar")
    harm(toy.folder / "from.json")
    for attempt in (toy.run, toy.foreseen):
        with pytest.raises(DataError, match=r"tiny: its from\.json is damaged .* give --from STAGE again"):
            attempt()
    assert foreseen(toy, again="grpo")["02-grpo"] == f"train 2 steps: --from grpo{ASIDE}"


# kills


class Kill:
    """Ends a run as it makes, renames or removes a file or folder for the n-th time; nothing is done after that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
        self.left = n
        for name in ("rename", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, real):
        def call(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise Killed
            return real(*args, **kwargs)

        return call


def contents(folder: Path) -> Mapping[str, bytes]:
    """Every file and folder of a run; what is in checkpoints is not the same twice, for torch writes their headers.

    Nor is what run.json and the page say of times.
    """
    found = {path.relative_to(folder): path for path in folder.rglob("*")}
    passing = {"checkpoints", "run.json", "report.html"}
    compared = {name: path.is_file() and not passing & {*name.parts} for name, path in found.items()}
    return {str(name): path.read_bytes() if compared[name] else b"" for name, path in found.items()}


@pytest.mark.parametrize(
    ("settings", "again"),
    [
        ([], ""),
        pytest.param(["stage.soar.optimizer.lr=5e-4"], "", marks=pytest.mark.slow),
        pytest.param([], "grpo", marks=pytest.mark.slow),
        pytest.param(["stage.grpo.optimizer.lr=5e-4"], "soar", marks=pytest.mark.slow),
        (["stage.grpo.from=base"], "soar"),
        (["eval.diversity={prompts=2, samples=2}", "eval.drift={samples=3}"], ""),
    ],
    ids=["new", "changed", "from", "changed and from", "branches", "measured"],
)
def test_a_run_that_is_killed_anywhere_ends_the_same(toy, settings, again):
    """Also where a plain run goes on with `--from`; only one that had not yet begun with that is asked again."""
    toy.run()
    start, change, pipeline = toy.project.folder / "start", bool(settings or again), toy.pipeline(*settings)
    toy.folder.rename(start)

    def prepared() -> None:
        shutil.rmtree(toy.folder, ignore_errors=True)
        if change:
            shutil.copytree(start, toy.folder)

    def killed(n: int) -> bool:
        with pytest.MonkeyPatch.context() as patched:
            kill = Kill(patched, n)
            try:
                toy.again(pipeline, again)
            except (Killed, CheckpointException):  # torch makes the second of the first
                return True
        assert kill.left >= 0
        return False

    prepared()
    toy.again(pipeline, again)
    whole, n = contents(toy.folder), 0
    prepared()
    while killed(n):
        begun = (toy.folder / "from.json").exists()
        toy.again(pipeline, "" if begun and n % 2 else again)
        assert contents(toy.folder) == whole, f"killed at {n}"
        prepared()
        n += 1
    assert n > 20
