"""A pipeline file is read whole: structured, checked, and written again so that it says the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tomli_w

from corefit.data.settings import Data
from corefit.data.sources import Jsonl
from corefit.errors import ConfigError, CorefitError, PluginError
from corefit.pipeline import Full, Lora, Pipeline, Stage, read
from corefit.pipeline.pipeline import CHOICES
from corefit.pipeline.reader import Reader
from corefit.rollout.noise import Uniform
from corefit.rollout.samplers import Cps, FlowSde, Ode
from corefit.types.stage import Optimizer
from corefit_backbones.sd3 import Sd3
from corefit_sft import Sft


def refusal(project, *pairs, settings=()):
    """Return the message of `read` after text of the pipeline is replaced."""
    project.swap(*pairs)
    with pytest.raises(CorefitError) as error:
        read(project.file, settings)
    return str(error.value)


# reading


def test_reads_what_the_file_says(project):
    pipeline = read(project.file)
    soar, grpo = pipeline.stage
    assert (pipeline.name, pipeline.seed, pipeline.precision) == ("tiny", 0, "auto")
    assert (soar.name, soar.steps, soar.batch, soar.objective.points) == ("soar", 2, 4, 2)
    assert (soar.optimizer.lr, soar.optimizer.betas) == (1e-3, (0.9, 0.999))
    assert (grpo.sampler, grpo.objective.group) == (FlowSde(0.7), 2)
    assert [(w.name, w.weight, w.reward.gain) for w in grpo.reward] == [("bright", 1.0, 1.0)]
    assert pipeline.train == Lora(rank=2)
    assert pipeline.eval.limit == 4


def test_defaults(project):
    project.swap(('train = { use = "lora", rank = 2 }\n', ""), ("batch = 4\n", ""), ("batch = 4\n", ""))
    project.swap(('noise = { use = "logit_normal" }\n', ""), ("optimizer = { lr = 1e-3 }\n", ""))
    pipeline = read(project.file)
    soar, grpo = pipeline.stage
    assert pipeline.train == Full()
    assert (soar.rows, grpo.rows) == (32, 96), "32 samples, or 48 groups"
    assert (soar.noise, soar.sampler) == (None, None), "the trainer's defaults"
    assert (grpo.noise, grpo.sampler) == (None, FlowSde(0.7))
    assert soar.optimizer == Optimizer()


def test_paths_are_relative_to_the_file(project, monkeypatch):
    monkeypatch.chdir("/")
    pipeline = read(project.file)
    assert pipeline.data.source.path == project.folder / "train.jsonl"
    assert pipeline.eval.prompts == project.folder / "heldout.jsonl"
    assert pipeline.backbone.path == str(project.folder / "base")
    assert pipeline.run_folder == project.folder / "runs" / "tiny"
    assert read(project.file, ["out=elsewhere"]).run_folder == project.folder / "elsewhere" / "tiny"
    assert read(project.file, ["out=/elsewhere"]).run_folder == Path("/elsewhere/tiny")


def test_a_relative_pipeline_file(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    assert read("pipeline.toml").folder == project.folder


def test_settings_override_the_file(project):
    settings = ["stage.soar.steps=7", "stage.soar.objective={use='sft'}", "stage.grpo.reward.bright.weight=2", "seed=3"]
    pipeline = read(project.file, settings)
    soar, grpo = pipeline.stage
    assert (pipeline.seed, soar.steps, soar.objective, grpo.reward[0].weight) == (3, 7, Sft(), 2.0)


def test_soar_becomes_sft_by_one_word(project):
    project.swap(('use = "soar", points = 2', 'use = "sft"'))
    assert read(project.file).stage[0].objective == Sft()


# the file that a run leaves


def test_what_is_written_out_reads_back_the_same_from_any_folder(project, tmp_path_factory):
    pipeline = read(project.file, ["stage.soar.objective.max_gain=1e9", "stage.soar.ema=0.99", "seed=5"])
    tables = pipeline.tables()
    copy = tmp_path_factory.mktemp("copy") / "pipeline.toml"
    copy.write_text(tomli_w.dumps(tables))
    again = read(copy)
    assert again.tables() == tables
    assert again.run_folder == pipeline.run_folder
    assert (again.train, again.data, again.eval.limit) == (pipeline.train, pipeline.data, 4)


def test_what_is_written_out_names_every_default(project):
    tables = read(project.file).tables()
    stage = tables["stage"][0]
    assert stage["objective"]["use"] == "soar"
    assert (stage["objective"]["guidance"], stage["optimizer"]["eps"], stage["keep"]) == (4.5, 1e-8, 2)
    assert tables["backbone"]["train"] == {"use": "lora", "rank": 2}
    assert tables["stage"][1]["reward"] == [{"use": "bright", "gain": 1.0, "weight": 1.0}]
    assert (tables["seed"], tables["precision"], tables["data"]["skip"]) == (0, "auto", 0)


def test_held_out_rewards_are_read_set_and_written_out(project):
    held = "stage.grpo.held_out=[{use='bright', gain=2.0}]"
    alarm = ("steps=30", "log_every=1", "alarm.window=12", "alarm.stop=true")
    keys = (*alarm, "held_out.bright.gain=3", "reward.bright.normalize=batch")
    pipeline = read(project.file, [held, *(f"stage.grpo.{key}" for key in keys)])
    grpo = pipeline.stage[1]
    assert (grpo.held_out[0].value.gain, grpo.reward[0].normalize) == (3.0, "batch")
    assert (grpo.alarm.window, grpo.alarm.threshold, grpo.ends_on_alarm) == (12, 4.0, True)
    again = Reader(pipeline.host, pipeline.folder, CHOICES).read(pipeline.tables(), Pipeline)
    assert (again.stage[1].alarm, again.stage[1].reward[0].normalize) == (grpo.alarm, "batch")
    assert again.stage[1].held_out[0].value == grpo.held_out[0].value


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.soar.held_out=[{use='bright'}]", "stage.soar.held_out: this objective makes no samples"),
        ("stage.grpo.alarm={}", "stage.grpo.alarm: there is no held-out reward"),
        ("eval.reward.bright.normalize=batch", "eval.reward.bright.normalize: scores are used as they are here"),
        ("data.score=[{use='bright', normalize='batch'}]", "data.score.bright.normalize: scores are used as they are"),
        ("stage.grpo.held_out=[{use='bright', gain=2.0, weight=2}]", "stage.grpo.held_out: 'bright' is not summed"),
        ("stage.grpo.alarm.window=9", "stage.grpo.alarm.window: must be >= 10"),
        (
            "stage.grpo.alarm.window=10",
            "stage.grpo.alarm.threshold: must be below 3.94, the largest z of 10",
        ),
    ],
)
def test_held_out_rewards_that_cannot_work_are_refused(project, setting, said):
    with pytest.raises(ConfigError) as found:
        read(project.file, [setting])
    assert said in str(found.value)


# in Python


def test_the_same_classes_serve_in_python(checkpoint, pictures, tmp_path):
    pipeline = Pipeline(
        name="mine",
        backbone=Sd3(path=str(checkpoint)),
        data=Data(source=Jsonl(pictures / "train.jsonl"), size=(16, 16)),
        stage=[Stage(name="sft", steps=1, batch=2, objective=Sft())],
        out=tmp_path,
    )
    pipeline.check()
    assert isinstance(pipeline.stage, tuple)
    assert pipeline.run_folder == tmp_path / "mine"
    assert pipeline.tables()["stage"][0]["objective"] == {"use": "sft", "dropout": 0.0, "perturbation": 0.0}


def test_python_is_checked_as_the_file_is(checkpoint, pictures):
    pipeline = Pipeline(
        name="mine",
        backbone=Sd3(path=str(checkpoint)),
        data=Data(source=Jsonl(pictures / "train.jsonl"), size=(15, 16)),
        stage=[Stage(name="sft", steps=1, objective=Sft(), sampler=Ode())],
    )
    with pytest.raises(ConfigError, match=r"(?s)stage.sft.sampler: .*remove the key.*backbone: size = .*nearest"):
        pipeline.check()
    with pytest.raises(ValueError, match="'steps' must be > 0"):
        Stage(name="sft", steps=0, objective=Sft())
    with pytest.raises(ValueError, match="'betas' must be < 1"):
        Optimizer(betas=(0.9, 1.0))


def test_learning_rate_schedules():
    rates = [
        Optimizer(lr=1.0, warmup=2, schedule=s).rate(step, 6)
        for s in ("constant", "linear", "cosine")
        for step in range(6)
    ]
    assert rates == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 0.5, 1, 1, 0.75, 0.5, 0.25, 0.5, 1, 1, 0.853553, 0.5, 0.146447], abs=1e-6
    )


# contradictions: told with their place, all at once


def test_all_contradictions_are_told_at_once(project):
    said = refusal(
        project,
        ("size = [16, 16]", "size = [15, 16]"),
        ('noise = { use = "logit_normal" }', 'sampler = { use = "ode" }\noptimizer = { warmup = 9 }'),
        ("optimizer = { lr = 1e-3 }\n", ""),
        ('batch = 4\nobjective = { use = "flow', 'batch = 3\nobjective = { use = "flow'),
        ("heldout", "held"),
    )
    starts = [line.split(":")[0] for line in said.splitlines()]
    assert starts == [
        "stage.soar.sampler",
        "stage.soar.optimizer.warmup",
        "stage.grpo.batch",
        "backbone",
        "eval.prompts",
    ]


# branches


LATE = """
[[stage]]
name = "late"
from = "base"
steps = 1
batch = 4
objective = { use = "sft" }

[eval]
"""


def test_a_stage_starts_from_the_one_before_or_from_what_it_names(project):
    project.swap(("\n[eval]\n", LATE))
    pipeline = read(project.file)
    soar, grpo, late = pipeline.stage
    assert (pipeline.parent(soar), pipeline.parent(grpo), pipeline.parent(late)) == (None, soar, None)
    assert (pipeline.lineage(grpo), pipeline.lineage(late)) == ((soar, grpo), (late,))
    pipeline = read(project.file, ["stage.late.from=soar", "stage.grpo.from=base"])
    soar, grpo, late = pipeline.stage
    assert (pipeline.parent(grpo), pipeline.parent(late)) == (None, soar)
    written = pipeline.tables()["stage"]
    assert [table.get("from") for table in written] == [None, "base", "soar"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "stage.late.from=sora",
            "stage.late.from: there is no stage 'sora' (did you mean 'soar'?); there are: base, soar, grpo",
        ),
        (
            "stage.soar.from=grpo",
            "stage.soar.from: 'grpo' comes later in the file, and a stage starts from the base or from an earlier one; "
            "there are: base",
        ),
        (
            "stage.late.from=late",
            "stage.late.from: 'late' is this stage, and a stage starts from the base or from an earlier one; "
            "there are: base, soar, grpo",
        ),
        ("stage.late.from=3", "stage.late.from: must be text in quotes, not 3"),
        ("stage.late.form=base", "stage.late.form is not a key (did you mean 'from'?)"),
    ],
)
def test_a_start_that_is_none_is_refused(project, setting, said):
    project.swap(("\n[eval]\n", LATE))
    assert refusal(project, settings=[setting]).partition("; known here")[0] == said


def test_a_lora_is_not_dropped_along_a_branch_and_is_left_by_another(project):
    """All train a LoRA by default: full training from the base drops none, and from a LoRA it would."""
    project.swap(("\n[eval]\n", LATE))
    read(project.file, ["stage.late.train={use='full'}"])
    said = refusal(project, settings=["stage.late.train={use='full'}", "stage.late.from=soar"])
    assert said.startswith("stage.late.train: full training would drop the LoRA of stage soar")


def test_weights_are_held_in_half_unless_their_own_lineage_was_trained(project):
    project.swap(("\n[eval]\n", LATE))
    pipeline = read(project.file, ["stage.soar.train={use='full'}"])
    assert [pipeline.freezes_in_half(stage) for stage in pipeline.stage] == [False, False, True]


# evaluation


def test_drift_needs_media(project):
    """Prompts alone, as GRPO reads them, say nothing of what the ideal trajectory ends in."""
    assert read(project.file, ["eval.drift={}"]).eval.drift is not None
    only = [
        "eval.drift={}",
        "stage.soar.objective={use='flow_grpo', group=4, steps=4}",
        "stage.soar.reward=[{use='bright'}]",
    ]
    with pytest.raises(ConfigError, match=r"eval\.drift: it is measured on media of the data, and no stage trains on"):
        read(project.file, [*only, "stage.soar.sampler={use='flow_sde'}"])


def test_prompts_may_be_in_the_pipeline_file(project):
    project.swap(('"heldout.jsonl"', '["a red sky", "a blue sea"]'), ('reward = [{ use = "bright" }]\n', ""))
    eval = read(project.file).eval
    assert eval is not None
    examples = [*eval.data((16, 16)).raw_source.examples()]
    assert [example.prompts for example in examples] == [("a red sky",), ("a blue sea",)]
    assert eval.reward == ()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("[]", "eval.prompts: must name at least one prompt, or a file of them"),
        ('["a", 3]', "eval.prompts.1: must be text in quotes, not 3"),
        ("3", "eval.prompts: must be text in quotes, not 3"),
    ],
)
def test_prompts_of_another_kind_are_refused(project, prompts, said):
    assert refusal(project, ('"heldout.jsonl"', prompts)) == said


def test_grids_need_prompts(project):
    project.write(project.text.partition("[eval]")[0])
    said = refusal(project, settings=["stage.soar.sample_every=1"])
    assert said == (
        "stage.soar.sample_every: sample grids are drawn from the prompts of [eval], and there is none; "
        'add [eval] with prompts = ["...", ...], or remove the key'
    )


# samplers and rewards


def test_a_sampler_is_read_where_the_objective_says_so(project):
    said = refusal(project, ("points = 2", "points = 2, paths = 2"))
    assert (
        said == 'stage.soar.sampler is missing; the objective takes stochastic steps, such as sampler = { use = "cps" }'
    )
    project.swap(('noise = { use = "logit_normal" }', 'noise = { use = "uniform" }\nsampler = { use = "cps" }'))
    assert (read(project.file).stage[0].sampler, read(project.file).stage[0].noise) == (Cps(), Uniform())


@pytest.mark.parametrize(
    "sampler", ['{ use = "ode" }', '{ use = "flow_sde", noise = 0 }', '{ use = "cps", noise = 0.0 }']
)
def test_a_deterministic_sampler_is_refused_where_noise_is_needed(project, sampler):
    said = refusal(project, ('{ use = "flow_sde", noise = 0.7 }', sampler))
    assert said.startswith("stage.grpo.sampler: it is deterministic")
    assert "flow_sde or cps" in said


USING = '''
from attrs import frozen

from corefit import Reward, Supervised, hookimpl


@frozen
class Using(Supervised):
    """Reads what its key says."""

    names: tuple[str, ...]

    @property
    def uses(self):
        return frozenset({"media", *self.names})

    def terms(self, batch, ctx):
        raise NotImplementedError


@frozen
class Smooth(Reward):
    """Has a gradient."""

    differentiable = True

    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@hookimpl
def corefit_objectives():
    return {"using": Using}


@hookimpl
def corefit_rewards():
    return {"smooth": Smooth}
'''


def using(project, names, keys=""):
    """Let the first objective read `names`, in a stage with these `keys` besides."""
    (project.folder / "using.py").write_text(USING)
    project.swap(
        ('plugins = ["bright.py"]', 'plugins = ["bright.py", "using.py"]'),
        ('{ use = "soar", points = 2 }', f'{{ use = "using", names = [{names}] }}'),
        ('noise = { use = "logit_normal" }', keys),
    )


@pytest.mark.parametrize(
    "sampler", ["", '{ use = "ode" }', '{ use = "flow_sde" }', '{ use = "cps", noise = 0.0 }'], ids=str
)
def test_any_sampler_will_do_where_the_objective_only_samples(project, sampler):
    using(project, '"sampler"', f"sampler = {sampler}" if sampler else "")
    assert (read(project.file).stage[0].sampler is None) == (not sampler)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ("", "stage.soar.sampler is missing; the objective takes stochastic steps"),
        ('{ use = "ode" }', "stage.soar.sampler: it is deterministic, and the objective needs one that adds noise"),
        ('{ use = "cps", noise = 0.0 }', "stage.soar.sampler: it is deterministic"),
    ],
    ids=["none", "ode", "noise 0"],
)
@pytest.mark.parametrize("names", ['"stochastic"', '"sampler", "stochastic"'])
def test_a_stochastic_sampler_must_be_one(project, names, sampler, said):
    using(project, names, f"sampler = {sampler}" if sampler else "")
    assert refusal(project).startswith(said)


@pytest.mark.parametrize("names", ["", '"reward"'])
def test_a_sampler_that_nothing_reads_is_refused(project, names):
    using(project, names, 'sampler = { use = "cps" }\nreward = [{ use = "bright" }]')
    assert "stage.soar.sampler: this objective does not read it; remove the key" in refusal(project)


def test_a_reward_without_a_gradient_is_refused_by_name(project):
    using(project, '"reward_gradient"', 'reward = [{ use = "smooth" }, { use = "bright" }]')
    assert refusal(project) == (
        "stage.soar.reward: 'bright' has no gradient, and the objective learns from gradients; name one that is "
        "differentiable, or use an objective that needs scores alone, such as flow_grpo"
    )
    read(project.file, ["stage.soar.reward=[{use='smooth'}]"])
    scores_alone = ["stage.soar.objective.names=['reward']", "stage.soar.reward=[{use='bright'}]"]
    assert read(project.file, scores_alone).stage[0].reward[0].name == "bright"


@pytest.mark.parametrize("names", ['"reward"', '"reward_gradient"'])
def test_a_reward_that_is_missing_is_asked_for(project, names):
    using(project, names)
    assert refusal(project).startswith("stage.soar.reward is missing; the objective learns from it")


def test_a_misspelled_name_in_uses_is_refused(project):
    using(project, '"rewards"', 'reward = [{ use = "bright" }]')
    assert "has 'rewards' in `uses`, which stands for nothing (did you mean 'reward'?)" in refusal(project)


def test_prompts_alone_are_enough_where_no_stage_reads_media(project):
    grpo = project.text.split("[[stage]]")
    project.write(grpo[0].replace("train.jsonl", "heldout.jsonl") + "[[stage]]" + grpo[2])
    assert not read(project.file).needs_media


def test_media_are_needed_where_one_stage_reads_them(project):
    said = refusal(project, ("train.jsonl", "heldout.jsonl"))
    assert said.startswith("data: 6 of 6 examples have no media, and a stage needs them")


def test_independent_draws_need_enough_prompts(project):
    said = refusal(project, ("size = [16, 16]", 'size = [16, 16]\norder = "independent"'), ("batch = 4", "batch = 9"))
    assert said.startswith('stage.soar: order = "independent" draws batch / group = 9')
    assert "the data have 8; lower batch" in said


def test_missing_media_count_against_the_budget(project):
    rows = [{"prompt": "a sky", "media": f"media/{n}.png"} for n in (0, 1, 98, 99)]
    project.own("train.jsonl")
    project.lines("train.jsonl", *rows)
    said = refusal(project)
    assert said.startswith("data: 2 of 4 media are missing or unreadable, and 0 may be skipped")
    assert "98.png" in said
    assert "set skip = 2 under [data]" in said
    read(project.file, ["data.skip=2"])


def test_kinds_of_errors(project):
    with pytest.raises(ConfigError, match="there is no pipeline file"):
        read(project.folder / "none.toml")
    with pytest.raises(PluginError, match="there is no file"):
        read(project.file, ["plugins=['none.py']"])
    with pytest.raises(ConfigError, match=r"backbone: .*no such folder"):
        read(project.file, ["backbone.path=nowhere"])


def test_the_record_of_a_run_names_nothing_of_the_machine_and_reads_back_the_same(project):
    pipeline = read(project.file, ["plugins=['bright.py']"])
    record = tomli_w.dumps(pipeline.record())
    assert str(project.folder) not in record
    assert not re.search(r'"/', record)
    pipeline.run_folder.mkdir(parents=True)
    copy = pipeline.run_folder / "pipeline.toml"
    copy.write_text(record)
    again = read(copy)
    assert again.run_folder.resolve() == pipeline.run_folder
    assert again.data.source.path.samefile(pipeline.data.source.path)
    assert Path(again.backbone.path).samefile(pipeline.backbone.path)
    assert again.eval.prompts.samefile(pipeline.eval.prompts)
    assert again.tables()["stage"] == pipeline.tables()["stage"]
    assert again.record() == pipeline.record()


def test_the_record_of_a_run_has_no_secrets(project):
    file = project.folder / "bright.py"
    file.write_text(
        file.read_text().replace(
            "gain: float = 1.0", 'gain: float = 1.0\n    api_key: str = ""\n    token_env: str = ""'
        )
    )
    project.swap(('{ use = "bright", weight = 1.0 }', '{ use = "bright", api_key = "hunter2", token_env = "TOKEN" }'))
    pipeline = read(project.file)
    assert "hunter2" in tomli_w.dumps(pipeline.tables())
    record = tomli_w.dumps(pipeline.record())
    assert "hunter2" not in record
    assert 'token_env = "TOKEN"' in record
