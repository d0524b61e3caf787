"""Which keys and files change a stage's identity, which do not, and how messages name a change."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

import corefit
from corefit.pipeline import read
from corefit.run import identity
from corefit.run.identity import Identity, differences
from corefit.system.files import json_digest


def identities(file, *settings, dataset="d", precision="fp32") -> dict[str, Identity]:
    """Return the identities of base, stages and the scores of the last stage."""
    pipeline = read(file, settings)
    found = {"base": identity.of_base(pipeline)}
    for stage in pipeline.stage:
        found[stage.name] = identity.of_stage(pipeline, stage, list(found.values())[-1], dataset, precision)
    return {**found, "scores": identity.of_scores(pipeline, found["grpo"], "p", "", dataset)}


def changes(old, new) -> dict[str, str]:
    """Name -> what is said of it, of those whose hash differs, from parts as a file keeps them."""
    kept = {name: json.loads(json.dumps(one.parts)) for name, one in old.items()}
    said = {name: new[name].changes_since(kept[name]) for name in new if new[name].hash != old[name].hash}
    assert all(said.values())
    return said


LATER = {"grpo": "stage soar, which it starts from, changed", "scores": "its weights changed"}


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.soar.optimizer.lr=5e-4", "optimizer.lr 0.001 -> 0.0005"),
        ("stage.soar.steps=3", "steps 2 -> 3"),
        ("stage.soar.ema=0.9", "ema none -> 0.9"),
        ("stage.soar.objective.points=4", "objective.points 2 -> 4"),
        ("stage.soar.objective={use='sft'}", "objective soar -> sft"),
        ("stage.soar.noise={use='uniform'}", "noise logit_normal -> uniform"),
        ("stage.soar.optimizer.betas=[0.9, 0.99]", "optimizer.betas [0.9, 0.999] -> [0.9, 0.99]"),
        ("backbone.train={use='lora', rank=4}", "train.rank 2 -> 4"),
        ("backbone.train={use='full'}", "train lora -> full"),
        ("data.order='independent'", "data.order epochs -> independent"),
    ],
)
def test_a_key_of_the_first_stage(project, setting, said):
    assert changes(identities(project.file), identities(project.file, setting)) == {"soar": said, **LATER}


def test_a_key_of_the_second_stage_leaves_the_first_alone(project):
    was = identities(project.file)
    for setting, said in (
        ("stage.grpo.reward.bright.weight=2", "reward.bright.weight 1.0 -> 2.0"),
        ("stage.grpo.sampler={use='cps'}", "sampler flow_sde -> cps"),
    ):
        now = changes(was, identities(project.file, setting))
        assert now == {"grpo": said, "scores": "its weights changed"}


def test_what_all_stages_share(project, monkeypatch):
    was = identities(project.file)
    seed = changes(was, identities(project.file, "seed=1"))
    assert seed == {"soar": "seed 0 -> 1", **LATER}
    assert changes(was, identities(project.file, precision="bf16")) == {"soar": "precision fp32 -> bf16", **LATER}
    assert changes(was, identities(project.file, dataset="e")) == {"soar": "its data changed", **LATER}
    backbone = changes(was, identities(project.file, "backbone.max_sequence_length=8"))
    assert backbone == dict.fromkeys(("base", "soar"), "backbone.max_sequence_length 16 -> 8") | LATER
    frozen = changes(was, identities(project.file, "backbone.frozen='nf4'"))
    assert frozen == dict.fromkeys(("base", "soar"), "backbone.frozen none -> nf4") | LATER
    monkeypatch.setattr(corefit, "__version__", "9.1")
    version = f"corefit {was['soar'].parts['corefit']} -> 9.1"
    assert changes(was, identities(project.file)) == {
        "soar": version,
        **LATER,
        "scores": f"its weights changed, {version}",
    }


def test_of_scores_alone(project):
    was = identities(project.file)
    assert changes(was, identities(project.file, "eval.steps=9")) == {"scores": "eval.steps 2 -> 9"}
    assert changes(was, identities(project.file, "eval.guidance=2")) == {"scores": "eval.guidance 4.5 -> 2.0"}
    assert changes(was, identities(project.file, "eval.seed=3")) == {"scores": "eval.seed 0 -> 3"}
    assert changes(was, identities(project.file, "eval.limit=3")) == {"scores": "eval.limit 4 -> 3"}
    diversity, drift = (identities(project.file, f"eval.{name}={{}}") for name in ("diversity", "drift"))
    assert changes(was, diversity)["scores"].startswith("eval.diversity none -> {")
    assert changes(was, drift)["scores"].startswith("the data of drift changed, eval.drift none -> {")
    more = identities(project.file, "eval.diversity={samples=9}")
    assert changes(diversity, more) == {"scores": "eval.diversity.samples 8 -> 9"}
    assert changes(drift, identities(project.file, "eval.drift={start=0.5}")) == {
        "scores": "eval.drift.start 1.0 -> 0.5"
    }
    assert changes(was, identities(project.file, "eval.reward.bright.gain=2")) == {
        "scores": "eval.reward.bright.gain 1.0 -> 2.0"
    }
    pipeline = read(project.file)
    prompts = identity.of_scores(pipeline, was["grpo"], "other", "", "d")
    assert prompts.changes_since(was["scores"].parts) == "the prompts changed"
    half, exact = (identity.of_scores(pipeline, was["grpo"], "p", held, "d") for held in ("bfloat16", "float32"))
    assert half.changes_since(exact.parts) == "weights held in float32 -> bfloat16"


def test_drift_alone_depends_on_the_data(project):
    """All of it is measured anew where the training data change, and nothing else of the evaluation is."""
    for settings, equal in (((), True), (("eval.diversity={}",), True), (("eval.drift={}",), False)):
        pipeline = read(project.file, settings)
        base = identity.of_base(pipeline)
        one, other = (identity.of_scores(pipeline, base, "p", "", data) for data in ("one", "other"))
        assert (one.hash == other.hash) is equal


@pytest.mark.parametrize(
    "setting",
    [
        "stage.soar.log_every=1",
        "stage.soar.checkpoint_every=1",
        "stage.soar.keep=1",
        "stage.soar.sample_every=1",
        "eval.samples=1",
        "stage.soar.train={use='lora', rank=2}",  # what it has from [backbone]
        "name='other'",
        "out='elsewhere'",
    ],
)
def test_what_changes_nothing(project, setting):
    assert changes(identities(project.file), identities(project.file, setting)) == {}


@pytest.mark.parametrize(
    ("setting", "name", "said"),
    [
        ("stage.soar.micro_batch=2", "soar", "micro_batch none -> 2"),
        ("stage.soar.objective.chunk=2", "soar", "objective.chunk none -> 2"),
        ("backbone.gradient_checkpointing=true", "soar", "backbone.gradient_checkpointing false -> true"),
        ("backbone.attention='flash'", "grpo", "backbone.attention native -> flash"),
        ("backbone.compile=true", "grpo", "backbone.compile false -> true"),
        ("eval.batch=2", "scores", "eval.batch 16 -> 2"),
    ],
)
def test_what_changes_rounding_alone_is_no_change(project, setting, name, said):
    was, now = identities(project.file), identities(project.file, setting)
    assert changes(was, now) == {}
    assert now[name].rounding_changes(was[name].rounding) == said
    assert was[name].rounding_changes(was[name].rounding) == was[name].rounding_changes(None) == ""


def test_what_changes_rounding_in_a_part_of_a_sum(project):
    sums = "stage.soar.objective={use='sum', of=[{use='sft'}, {use='soar', chunk=CHUNK, weight=0.5}]}"
    was, now = (identities(project.file, sums.replace("CHUNK", chunk)) for chunk in "12")
    assert changes(was, now) == {}
    assert now["soar"].rounding_changes(was["soar"].rounding) == "objective.of.soar.chunk 1 -> 2"


def test_encode_batch_leaves_encoded_data_as_they_are(project):
    from corefit.data import cache

    was, now = (read(project.file, [f"data.encode_batch={n}"]) for n in (16, 1))
    for pipeline in (was, now):
        pipeline.backbone.place("cpu", "float32")
    keys = {cache.key(one.data, one.backbone, project.folder / "root", media=True) for one in (was, now)}
    assert len(keys) == 1
    assert changes(identities(project.file), identities(project.file, "data.encode_batch=1")) == {}


def test_what_version_0_1_called_it_is_known(project):
    """These are its hashes of the same pipeline: rounding was among what determined it."""
    now = identities(project.file, "stage.soar.objective.chunk=2")
    assert now["soar"].former["stage"]["objective"]["chunk"] == 2
    assert now["grpo"].former["before"]["identity"] == json_digest(now["soar"].former)
    assert now["scores"].former["model"] == json_digest(now["grpo"].former)
    for one in now.values():
        assert one.matches({"identity": json_digest(one.former)})
        assert one.matches({"identity": one.hash, "rounding": {}})
        assert not one.matches({"identity": one.hash})


def test_the_project_may_move(project, tmp_path_factory):
    was = identities(project.file)
    moved = tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(project.folder, moved)
    assert changes(was, identities(moved / "pipeline.toml")) == {}


PATHS = '''
from pathlib import Path

from attrs import field, frozen

from corefit import Reward, Supervised, hookimpl
from corefit.types import ModelPath


@frozen
class Inner:
    table: Path | None = None


@frozen
class Looked(Supervised):
    """Looks things up."""

    table: Path
    judge: ModelPath | None = None
    inner: Inner = field(factory=Inner)
    others: tuple[Path, ...] = ()

    def terms(self, batch, ctx):
        raise NotImplementedError


@frozen
class Judged(Reward):
    """Reads a file."""

    table: Path | None = None

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@hookimpl
def corefit_objectives():
    return {"looked": Looked}


@hookimpl
def corefit_rewards():
    return {"judged": Judged}
'''


def with_paths(project, table="tables/a.json"):
    """A project whose first objective, data scores and held-out rewards read files by keys of type Path."""
    (project.folder / "paths.py").write_text(PATHS)
    keys = f'table = "{table}", inner = {{ table = "../beside.json" }}, others = ["/else/where.json", "{table}"]'
    project.swap(
        ('plugins = ["bright.py"]', 'plugins = ["bright.py", "paths.py"]'),
        ('{ use = "soar", points = 2 }', f'{{ use = "looked", judge = "./judge", {keys} }}'),
        ('reward = [{ use = "bright" }]', f'reward = [{{ use = "judged", table = "{table}" }}]'),
    )


def test_a_project_with_paths_among_its_keys_may_move(project, tmp_path_factory):
    with_paths(project)
    was, moved = identities(project.file), tmp_path_factory.mktemp("elsewhere") / "below" / "project"
    shutil.copytree(project.folder, moved)
    assert changes(was, identities(moved / "pipeline.toml")) == {}
    objective = was["soar"].parts["stage"]["objective"]
    assert objective["table"] == "tables/a.json"
    assert objective["judge"] == "judge"
    assert objective["inner"] == {"table": "../beside.json"}
    assert objective["others"] == ["/else/where.json", "tables/a.json"], "one that is absolute and elsewhere stays"
    assert was["scores"].parts["eval"]["reward"] == [
        {"use": "judged", "table": "tables/a.json", "weight": 1.0},
    ]


def test_a_path_may_be_written_in_several_ways(project):
    with_paths(project)
    was = identities(project.file)
    for same in ("./tables/a.json", "tables/../tables/a.json", f"{project.folder}/tables/a.json"):
        assert changes(was, identities(project.file, f"stage.soar.objective.table='{same}'")) == {}


@pytest.mark.parametrize("other", ["tables/b.json", "../tables/a.json", "/tables/a.json"])
def test_a_path_to_another_file_is_a_change(project, other):
    with_paths(project)
    was, now = identities(project.file), identities(project.file, f"stage.soar.objective.table='{other}'")
    assert changes(was, now) == {"soar": f"objective.table tables/a.json -> {other}", **LATER}


def test_encoded_data_stay_when_a_project_with_a_path_in_their_scores_moves(project, tmp_path_factory):
    from corefit.data import cache

    def key(folder, *settings):
        pipeline = read(folder / "pipeline.toml", settings)
        pipeline.backbone.place("cpu", "float32")
        return cache.key(pipeline.data, pipeline.backbone, folder / ".corefit" / "cache", media=True)

    with_paths(project)
    score = "data.score=[{use='judged', table='tables/TABLE.json'}]"
    was, moved = key(project.folder, score), tmp_path_factory.mktemp("elsewhere") / "project"
    shutil.copytree(project.folder, moved)
    assert key(moved, score) == was
    assert key(moved, score.replace("TABLE", "other")) != was


def test_code_of_a_plugin_file(project):
    was = identities(project.file)
    plugin = project.folder / "bright.py"
    plugin.write_text(plugin.read_text().replace("mean(1) *", "amax(1) *"))
    said = "code of bright.py changed"
    now = identities(project.file)
    assert changes(was, now) == {"grpo": said, "scores": f"its weights changed, {said}"}
    assert now["soar"] == was["soar"], "which uses nothing of it"


def test_code_of_a_package(project, monkeypatch):
    was = identities(project.file)
    real = identity.source
    monkeypatch.setattr(identity, "source", lambda file: "new" if file.parent.name == "corefit_soar" else real(file))
    assert changes(was, identities(project.file)) == {"soar": "code of corefit_soar changed", **LATER}


def test_weights_of_the_backbone(project):
    was = identities(project.file)
    (file,) = (project.own("base") / "transformer").glob("*.safetensors")
    save_file({name: t + 1 for name, t in load_file(file).items()}, file)
    said = "backbone weights changed"
    assert changes(was, identities(project.file)) == {"base": said, "soar": said, **LATER}


def test_many_differences_are_counted(project):
    keys = ("steps=3", "ema=0.9", "optimizer.eps=1e-3", "max_grad_norm=2", "batch=8")
    settings = [f"stage.soar.{key}" for key in keys]
    said = changes(identities(project.file), identities(project.file, *settings))["soar"]
    assert said == "steps 2 -> 3, batch 4 -> 8, optimizer.eps 1e-08 -> 0.001, and 2 more"


def test_a_stage_that_starts_from_another_one(project):
    was = identities(project.file)["grpo"]
    project.swap(('name = "soar"', 'name = "warm"'))
    assert identities(project.file)["grpo"].changes_since(was.parts) == "it starts from stage warm, not soar"


def test_former_parts_that_say_nothing(project):
    now = identities(project.file)["soar"]
    assert now.changes_since({}) == "what determined the former one is not known"
    other = {**now.parts, "code": {}}
    assert now.changes_since(other) == "what determines it changed"
    assert now.changes_since(now.parts) == ""


def test_a_plugin_that_moved_is_named():
    """Its name and keys are the same; who offers it is not."""
    was = {"stage": {"name": "a"}, "code": {"corefit_huber": "1", "corefit_sft": "3"}}
    now = {"stage": {"name": "a"}, "code": {"huber.py": "2", "corefit_sft": "3"}}
    assert differences(was, now) == ["code of huber.py, formerly of corefit_huber"]
    assert differences(was, {**now, "stage": {"name": "a", "steps": 3}}) == ["steps none -> 3"]


def test_code_of_a_part_of_a_sum(project, monkeypatch):
    sums = "stage.soar.objective={use='sum', of=[{use='soar', points=2}, {use='sft', weight=0.1}]}"
    was = identities(project.file, sums)
    assert changes(was, identities(project.file, sums.replace("0.1", "0.2"))).keys() == {"soar", *LATER}
    real = identity.source
    monkeypatch.setattr(identity, "source", lambda file: "new" if file.parent.name == "corefit_sft" else real(file))
    assert changes(was, identities(project.file, sums)) == {"soar": "code of corefit_sft changed", **LATER}


def test_held_out_rewards_and_alarms_count_only_where_they_end_a_stage(project):
    held = "stage.grpo.held_out=[{use='bright', gain=2.0}]"
    steps = ("stage.grpo.steps=40", "stage.grpo.log_every=2")
    was = identities(project.file, *steps)
    assert changes(was, identities(project.file, *steps, held)) == {}
    assert changes(was, identities(project.file, *steps, held, "stage.grpo.alarm={window=12}")) == {}
    stop = identities(project.file, *steps, held, "stage.grpo.alarm={window=12, stop=true}")
    weights = {"scores": "its weights changed"}
    assert changes(was, stop).keys() == {"grpo", "scores"}
    window = identities(project.file, *steps, held, "stage.grpo.alarm={window=13, stop=true}")
    assert changes(stop, window) == {"grpo": "alarm.window 12 -> 13", **weights}
    logged = identities(project.file, *steps, held, "stage.grpo.alarm={window=12, stop=true}", "stage.grpo.log_every=1")
    assert changes(stop, logged) == {"grpo": "alarm.log_every 2 -> 1", **weights}
    other = "stage.grpo.held_out=[{use='bright', gain=3.0}]"
    gain = identities(project.file, *steps, other, "stage.grpo.alarm={window=12, stop=true}")
    assert changes(stop, gain) == {"grpo": "alarm.held_out.bright.gain 2.0 -> 3.0", **weights}


def test_normalization_counts_where_it_is_set(project):
    was = identities(project.file)
    assert "normalize" not in json.dumps(was["grpo"].parts)
    assert changes(was, identities(project.file, "stage.grpo.reward.bright.normalize='none'")) == {}
    batch = changes(was, identities(project.file, "stage.grpo.reward.bright.normalize='batch'"))
    assert batch == {"grpo": "reward.bright.normalize none -> batch", "scores": "its weights changed"}


def test_keys_that_are_new_leave_the_parts_of_a_stage_as_they_were(project):
    """A finished stage of an older corefit is not trained again."""
    stage = identities(project.file)["grpo"].parts["stage"]
    assert stage.keys() == {
        *("name", "steps", "objective", "batch", "sampler", "reward", "optimizer", "max_grad_norm", "save_dtype"),
        "on_nan",
    }
    assert identities(project.file)["base"].parts["backbone"].keys() == {"use", "max_sequence_length"}


def test_what_determines_a_held_out_reward_is_not_taken_for_that_of_a_trained_one(project):
    """Both may have the same name; each tells what determines its scores."""
    project.swap(('reward = [{ use = "bright", weight = 1.0 }]', 'reward = [{ use = "bright", gain = 3.0 }]'))
    keys = ("stage.grpo.held_out=[{use='bright', gain=2.0}]", "stage.grpo.steps=40", "stage.grpo.log_every=1")
    told = '    def scores_key(self):\n        return f"version of {self.gain}"\n\n    def score('
    (project.folder / "bright.py").write_text(
        (project.folder / "bright.py").read_text().replace("    def score(", told)
    )
    parts = identities(project.file, *keys, "stage.grpo.alarm={stop=true}")["grpo"].parts
    assert parts["rewards"] == {"bright": "version of 3.0"}
    assert parts["alarm"]["rewards"] == {"bright": "version of 2.0"}
    assert "alarm" not in identities(project.file, *keys)["grpo"].parts
