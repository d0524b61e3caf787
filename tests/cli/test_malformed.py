"""A user's mistake ends with exit status 2 and a message with the key or file and the remedy, nothing written.

Every case is a good pipeline with one thing spoilt, given to `corefit check` and to `corefit run`. What reading alone
refuses (values of the wrong type, keys and names at every level) is in tests/pipeline/test_reader.py, and what a source
may find wrong is in tests/data/sources/.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
from attrs import frozen

if TYPE_CHECKING:
    from conftest import Project


@frozen
class Case:
    """A mistake in a project, and what the message must contain: the key or file, and a word of the remedy."""

    name: str
    spoil: Callable[[Project], object]
    said: tuple[str, ...]


def swap(name: str, old: str, new: str, *said: str) -> Case:
    """pipeline.toml with text replaced."""
    return Case(name, lambda project: project.swap((old, new)), said)


def write(name: str, text: str, *said: str) -> Case:
    """Another pipeline.toml."""
    return Case(name, lambda project: project.write(text), said)


def rows(name: str, *lines: object, said: tuple[str, ...]) -> Case:
    """Another train.jsonl."""

    def spoil(project: Project) -> None:
        project.own("train.jsonl")
        project.lines("train.jsonl", *lines)

    return Case(name, spoil, said)


def plugin(name: str, text: str, *said: str) -> Case:
    """Another bright.py."""
    return Case(name, lambda project: (project.folder / "bright.py").write_text(text), said)


def base(name: str, spoil: Callable[..., object], *said: str) -> Case:
    """Another checkpoint: `spoil` gets a copy of its folder."""
    return Case(name, lambda project: spoil(project.own("base")), said)


def swapped(file: str, old: str, new: str) -> Callable[..., object]:
    return lambda folder: (folder / file).write_text((folder / file).read_text().replace(old, new))


SKY = {"prompt": "a sky", "media": "media/0.png"}
SOAR = 'objective = { use = "soar", points = 2 }'
GRPO = 'objective = { use = "flow_grpo", group = 2, steps = 4 }'
SAMPLER = 'sampler = { use = "flow_sde", noise = 0.7 }'
REWARD = 'reward = [{ use = "bright", weight = 1.0 }]'
SOURCE = 'source = { use = "jsonl", path = "train.jsonl" }'
LORA = 'train = { use = "lora", rank = 2 }'
BATCH = 'batch = 4\nobjective = { use = "flow'

SFT = '[[stage]]\nname = "one"\nsteps = 1\nbatch = 2\nobjective = { use = "sft" }\n'

FILES = [
    Case("missing file", lambda p: p.file.unlink(), ("no pipeline file", "pipeline.toml")),
    Case(
        "folder", lambda p: (p.file.unlink(), p.file.mkdir()), ("pipeline.toml is a folder", "name the pipeline file")
    ),
    write("no toml", 'name = "a"\nseed = = 1\n', "pipeline.toml is not valid TOML", "line 2"),
    swap("key twice", "steps = 2\n", "steps = 2\nsteps = 3\n", "pipeline.toml is not valid TOML", "line 17"),
    Case("no text", lambda p: p.file.write_bytes(b"\x89PNG\x00"), ("pipeline.toml is not valid TOML",)),
    write("empty", "", "name is missing", "backbone is missing", "data is missing", "stage is missing", "needs it"),
    write("other toml", '[project]\nname = "x"\n', "project is not a key", "known here: name, backbone"),
]
KEYS = [
    swap(
        "key of backbone",
        "max_sequence_length",
        "max_sequence_lenght",
        "backbone.max_sequence_lenght is not a key",
        "mean 'max_sequence_length'",
    ),
    swap("train misspelt", LORA, "trian = 1", "backbone.trian is not a key", "did you mean 'train'"),
    swap(
        "train at the top",
        'name = "tiny"',
        'name = "tiny"\ntrain = { use = "full" }',
        "train: is a key of [backbone]",
        "move it",
    ),
    swap("key of train", "rank", "rnak", "backbone.train.rnak is not a key", "did you mean 'rank'"),
    swap("unknown train", "lora", "lroa", "backbone.train", "did you mean 'lora'"),
    swap(
        "key of source",
        'path = "train',
        'pth = "train',
        "data.source.pth is not a key",
        "did you mean 'path'",
        "data.source.path is missing",
    ),
    swap("key of stage", "steps = 2", "step = 2", "stage.soar.step is not a key", "did you mean 'steps'"),
    swap("table that is none", "[eval]", "[evaluation]", "evaluation is not a key", "known here"),
]
TYPES = [
    swap("three numbers for size", "size = [16, 16]", "size = [16, 16, 3]", "size is [height, width]"),
    swap("text for plugins", '["bright.py"]', '"bright.py"', "plugins: must be a list of files", "such as"),
    swap(
        "precision",
        'name = "tiny"',
        'name = "tiny"\nprecision = "bf61"',
        "precision: must be one of",
        "did you mean 'bf16'",
    ),
]
VALUES = [
    swap("name", 'name = "tiny"', 'name = "a/b"', "name: must match", "a/b"),
    swap("negative steps", "steps = 2", "steps = -2", "stage.soar.steps: must be > 0"),
    swap("negative rate", "1e-3", "-1e-3", "stage.soar.optimizer.lr: must be > 0"),
    swap("betas", "lr = 1e-3", "betas = [0.9, 1.0]", "stage.soar.optimizer.betas: must be < 1"),
    swap("ema", "steps = 2", "steps = 2\nema = 1.5", "stage.soar.ema: must be < 1"),
    swap("warmup", "lr = 1e-3", "warmup = 3", "stage.soar.optimizer.warmup", "lower it"),
    swap("micro_batch", "steps = 2", "steps = 2\nmicro_batch = 5", "stage.soar.micro_batch", "lower it"),
    swap("rank", "rank = 2", "rank = 0", "backbone.train.rank: must be > 0"),
    swap("size of no patches", "size = [16, 16]", "size = [16, 18]", "backbone: size = [16, 18]", "nearest: 16 or 20"),
    swap("size too large", "size = [16, 16]", "size = [16, 4096]", "backbone: size = [16, 4096]", "nearest: 64"),
    swap("size of nothing", "size = [16, 16]", "size = [0, 16]", "size is [0, 16]", "expected [height, width]"),
]
NAMES = [
    swap("two stages of one name", 'name = "grpo"', 'name = "soar"', "stage.soar: two stages", "rename one"),
    swap("a stage called base", 'name = "soar"', 'name = "base"', "stage.base", "rename the stage"),
    swap("unknown backbone", '"sd3"', '"sd33"', "backbone: no backbone is called 'sd33'", "did you mean 'sd3'"),
    swap("unknown noise", "logit_normal", "lognormal", "stage.soar.noise: no noise weighting", "there are: "),
    swap(
        "unknown reward",
        '"bright", weight',
        '"brihgt", weight',
        "stage.grpo.reward.0: no reward",
        "did you mean 'bright'",
    ),
]
CONTRADICTIONS = [
    swap("no stages", "[[stage]]\n", "[[stages]]\n", "stages is not a key", "did you mean 'stage'"),
    Case(
        "empty stages",
        lambda p: p.write("stage = []\n" + p.text.split("[[stage]]")[0]),
        ("stage: there is none", "add [[stage]]"),
    ),
    swap("noise nobody reads", GRPO, GRPO + '\nnoise = { use = "uniform" }', "stage.grpo.noise", "remove the key"),
    swap("sampler nobody reads", SOAR, SOAR + '\nsampler = { use = "ode" }', "stage.soar.sampler", "remove the key"),
    swap("reward nobody reads", SOAR, f"{SOAR}\n{REWARD}", "stage.soar.reward", "remove the key"),
    swap(
        "deterministic sampler",
        SAMPLER,
        'sampler = { use = "ode" }',
        "stage.grpo.sampler: it is deterministic",
        "flow_sde or cps",
    ),
    swap("no sampler", SAMPLER, "", "stage.grpo.sampler is missing", "such as sampler ="),
    swap("no reward", REWARD, "", "stage.grpo.reward is missing", "such as reward ="),
    swap(
        "reward twice",
        REWARD,
        'reward = [{ use = "bright" }, { use = "bright" }]',
        "stage.grpo.reward: 'bright' is listed twice",
        "listed twice; give each a `name` of its own",
    ),
    swap("no whole groups", BATCH, BATCH.replace("4", "5"), "stage.grpo.batch: 5 rollouts", "such as 4"),
    swap(
        "fraction and window",
        "group = 2",
        "group = 2, fraction = 0.5, window = 2",
        "stage.grpo.objective",
        "'fraction' and 'window'",
        "remove one",
    ),
    swap("window too long", "group = 2", "group = 2, window = 5", "stage.grpo.objective", "do not fit into steps"),
    swap("updates", "group = 2", "group = 2, updates = 3", "stage.grpo.objective.updates", "must divide 'group'"),
    Case(
        "too few prompts",
        lambda p: p.swap(("[data]", '[data]\norder = "independent"'), ("batch = 4", "batch = 9")),
        ("stage.soar: order", "lower batch"),
    ),
    swap(
        "out is a file",
        'name = "tiny"',
        'name = "tiny"\nout = "train.jsonl"',
        "out: ",
        "train.jsonl is a file",
        "name another",
    ),
]
PLUGINS = [
    swap(
        "no plugin file",
        '["bright.py"]',
        '["brigth.py"]',
        "plugins: there is no file",
        "brigth.py",
        "relative to the pipeline file",
    ),
    plugin("plugin of no python", "def f(:\n", "bright.py:1 cannot be run (SyntaxError", "fix it"),
    plugin(
        "plugin that does not import",
        "import os\nimport not_there\n",
        "bright.py:2 cannot be run (ModuleNotFoundError",
        "fix it",
    ),
    plugin(
        "misspelled hook",
        "from corefit import hookimpl\n@hookimpl\ndef corefit_reward():\n    return {}\n",
        "implements 'corefit_reward', which is not a hook",
        "did you mean 'corefit_rewards'",
    ),
    plugin(
        "unmarked hook",
        "def corefit_rewards():\n    return {}\n",
        "bright.py: corefit_rewards() is not marked as a hook",
        "@corefit.hookimpl",
    ),
    plugin(
        "offer of no class",
        "from corefit import hookimpl\n@hookimpl\ndef corefit_rewards():\n    return {'bright': 3}\n",
        "bright.py",
        "offers 'bright'",
        "@attrs.frozen",
    ),
    plugin(
        "offer of a taken name",
        "import corefit.samplers\n"
        "@corefit.hookimpl\ndef corefit_samplers():\n    return {'ode': corefit.samplers.Cps}\n",
        "'ode' is offered twice",
        "bright.py",
        "rename one",
    ),
]
BARE = """
import sys
from attrs import field, frozen
from corefit import Reward, Source, Supervised, hookimpl

@frozen
class Bare{base}:
    {body}

@hookimpl
def corefit_{kind}():
    return {{"{name}": Bare}}
"""


def bare(kind: str, name: str, body: str, base: str = "") -> str:
    """bright.py with another class, of which `body` is all."""
    return BARE.format(kind=kind, name=name, body=body, base=base)


def objective(name: str, body: str, *said: str) -> Case:
    """The first stage with an objective of bright.py's, and no other."""

    def spoil(project: Project) -> None:
        text = bare("objectives", "bare", f"def terms(self, part, ctx): ...\n    {body}", "(Supervised)")
        (project.folder / "bright.py").write_text(text)
        project.write(project.text.partition("[[stage]]")[0] + SFT.replace("sft", "bare"))

    return Case(name, spoil, said)


OFFERED = [
    plugin(
        "reward without score",
        bare("rewards", "bright", "weight: float = 1.0", "(Reward)"),
        "bright.py",
        "offers 'bright'",
        "which is not a valid reward: it has no score(media, prompts, meta)",
    ),
    plugin(
        "reward that looks like none",
        bare("rewards", "bright", "weight: float = 1.0"),
        "offers 'bright'",
        "it has no score(media, prompts, meta)",
    ),
    plugin(
        "reward of one argument",
        bare("rewards", "bright", "def score(self, media): return media"),
        "bright.py",
        "its score does not accept the arguments of score(media, prompts, meta)",
    ),
    plugin(
        "reward that exits",
        bare("rewards", "bright", "score = lambda *_: 0\n    def __attrs_post_init__(self): sys.exit(0)"),
        "bright.py:9 called sys.exit(0)",
        "raise an error there instead",
    ),
    swap(
        "infinite weight", "weight = 1.0", "weight = inf", "stage.grpo.reward.0", "weight", "must be a number, not inf"
    ),
    swap("infinite rate", "1e-3", "inf", "stage.soar.optimizer.lr", "must be a number, not inf"),
    objective(
        "objective that uses nothing", "uses = 'media'", "stage.one.objective", "uses of Bare", "bright.py", "not a set"
    ),
    objective(
        "objective that fails", "uses = property(lambda self: 1 / 0)", "stage.one.objective", "ZeroDivisionError"
    ),
    objective("objective of complex terms", "num_terms = 1j", "num_terms of Bare", "is 1j, not a whole number"),
]
CHECKPOINTS = [
    swap("no folder", '"base"', '"bass"', "backbone: 'bass': no such folder", "organization/model"),
    swap("no checkpoint", 'path = "base"', 'path = "media"', "media: no model_index.json", "diffusers folder"),
    base("no model_index.json", lambda folder: (folder / "model_index.json").unlink(), "base: no model_index.json"),
    base(
        "broken model_index.json",
        swapped("model_index.json", "{", ""),
        "model_index.json: not JSON",
    ),
    base(
        "another family",
        swapped("model_index.json", "StableDiffusion3Pipeline", "FluxPipeline"),
        "base is a FluxPipeline",
        'set use = "flux"',
    ),
    base(
        "unknown family",
        swapped("model_index.json", "StableDiffusion3Pipeline", "OtherPipeline"),
        "base is a OtherPipeline",
        "known families: ",
    ),
    base("no vae", lambda folder: shutil.rmtree(folder / "vae"), "names vae: no such folder"),
    base("no config", lambda folder: (folder / "transformer" / "config.json").unlink(), "transformer: no config.json"),
]
DATA = [
    swap("no jsonl", '"train.jsonl"', '"trian.jsonl"', "data: ", "trian.jsonl does not exist", "`path` must name"),
    rows("bad line", SKY, '{"prompt": "a sky",', said=("train.jsonl:2: this is not JSON", "one object a line")),
    rows("mixed media", SKY, {"prompt": "a sky"}, said=("train.jsonl:2: this line has no 'media'", "give every line")),
    rows("no media", {"prompt": "a sky"}, said=("data: 1 of 1 examples have no media",)),
    rows(
        "missing media",
        SKY,
        {"prompt": "a sea", "media": "0.png"},
        said=("data: 1 of 2 media are missing", "0.png: no such file", "set skip = 1 under [data]"),
    ),
    swap(
        "no folder of pictures",
        SOURCE,
        'source = { use = "imagefolder", path = "pix" }',
        "pix does not exist",
        "`path` must name",
    ),
    swap(
        "pictures without text",
        SOURCE,
        'source = { use = "imagefolder", path = "media" }',
        "8 of 8 media have no .txt",
        "class_prompt =",
    ),
    swap(
        "no eval prompts", '"heldout.jsonl"', '"held.jsonl"', "eval.prompts: ", "held.jsonl does not exist", "must name"
    ),
    swap("no eval prompts left", '"heldout.jsonl"', "[]", "eval.prompts: must name at least one prompt"),
]
DEEP = "[" * 5000 + "]" * 5000
LONG = "a" * 5000
INPUT = [
    swap("deep lists", "steps = 2\n", f"steps = {DEEP}\n", "pipeline.toml is not valid TOML", "too deeply"),
    swap("deep tables", "steps = 2\n", f"steps.{'a.' * 3000}a = 1\n", "stage.soar.steps: must be a whole number"),
    Case("huge file", lambda p: os.truncate(p.file, 1 << 30), ("pipeline.toml has more than 16 MiB", "name another")),
    swap("endless number", "steps = 2\n", f"steps = {'9' * 5000}\n", "pipeline.toml is not valid TOML", "digits"),
    swap("huge number", "steps = 2\n", f"steps = {10**30}\n", "stage.soar.steps: must be a whole number, not 1000"),
    swap("huge number for a fraction", "1e-3", str(10**400), "stage.soar.optimizer.lr: must be a number, not 1000"),
    swap("long name", '"tiny"', f'"{LONG}"', "name: must match"),
    swap("long stage", 'name = "soar"', f'name = "{LONG}"', "name: must match"),
    swap("long key", "steps = 2", f"{LONG} = 2", "is not a key"),
    swap("long path", '"train.jsonl"', f'"{LONG}"', "data.source.path: must be a path of at most 255 bytes"),
    swap("long folder", '"base"', f'"{LONG}"', "backbone.path: must be a path of at most 255 bytes"),
    swap("long plugin", '"bright.py"', f'"{LONG}"', "must be a path of at most 255 bytes"),
    swap("long out", 'name = "tiny"', f'name = "tiny"\nout = "{LONG}"', "out: must be a path of at most 255 bytes"),
    swap("NUL in a path", '"train.jsonl"', '"train\\u0000.jsonl"', "data.source.path: must be text", "train\\x00"),
    swap("NUL in a model", '"base"', '"ba\\u0000se"', "backbone.path: must be text", "ba\\x00se"),
    swap("NUL in a plugin", '"bright.py"', '"bright\\u0000.py"', "must be text", "bright\\x00"),
    swap("NUL in keep", "[data]", '[data]\nkeep = "a\\u0000 > 1"', "data.keep: must be text"),
    swap("deep keep", "[data]", f'[data]\nkeep = "{"not " * 3000}a"', "data: keep", "too deep", "write comparisons"),
    rows(
        "half a character",
        {"prompt": "a \ud800 sky", "media": "media/0.png"},
        said=("train.jsonl:1: 'prompt' is", "lone surrogate", "correct the text"),
    ),
    rows(
        "half a character in captions",
        {"prompt": ["a sky", "\udfff"], "media": "media/0.png"},
        said=("train.jsonl:1", "lone surrogate"),
    ),
    rows(
        "NUL in media",
        {"prompt": "a sky", "media": "0\0.png"},
        said=("1 of 1 media are missing", "0\\x00.png: no such file"),
    ),
    rows("long media", {"prompt": "a sky", "media": LONG}, said=("1 of 1 media are missing", "no such file")),
    rows(
        "escapes in media",
        {"prompt": "a sky", "media": "\x1b[31mred\x9b.png"},
        said=("\\x1b[31mred\\x9b.png: no such file",),
    ),
    swap("infinite batch", "batch = 4", f"batch = {10**12}", "stage.soar.batch: must be <= 1000000"),
    swap("infinite micro_batch", "batch = 4", f"micro_batch = {10**12}", "stage.soar.micro_batch: must be <= 1000000"),
    swap("infinite steps", "steps = 2", f"steps = {10**12}", "stage.soar.steps: must be <= 1000000000"),
    swap("infinite points", "points = 2", f"points = {10**12}", "stage.soar.objective.points: must be <= 10000"),
    swap(
        "infinite paths",
        "points = 2",
        "points = 10000, paths = 10000",
        "stage.soar.objective: num_terms of Soar",
        "not a whole number from 1 to",
    ),
    swap("infinite group", "group = 2", f"group = {10**12}", "stage.grpo.objective.group: must be <= 10000"),
    swap(
        "infinite rollout",
        "group = 2, steps = 4",
        f"group = 2, steps = {10**12}",
        "stage.grpo.objective.steps: must be <= 10000",
    ),
    swap("infinite size", "[16, 16]", f"[16, {10**12}]", "expected [height, width]", "each at most 65536"),
    swap("infinite samples", "limit = 4", f"samples = {10**12}", "eval.samples: must be <= 10000"),
    swap("infinite eval batch", "limit = 4", f"batch = {10**12}", "eval.batch: must be <= 10000"),
    swap("infinite encode_batch", "[data]", f"[data]\nencode_batch = {10**12}", "data.encode_batch: must be <= 10000"),
    swap("infinite aspect", "[data]", f'[data]\naspects = ["1:{10**400}"]', "data: aspects", "write width:height"),
    swap(
        "infinite shards",
        SOURCE,
        'source = { use = "webdataset", path = "{0..999999999999}.tar" }',
        "data: ",
        "names more than 1000000 tar files",
    ),
]
CASES = [*FILES, *KEYS, *TYPES, *VALUES, *NAMES, *CONTRADICTIONS, *PLUGINS, *OFFERED, *CHECKPOINTS, *DATA, *INPUT]
TYPED = ("key of stage", "plugin of no python", "missing media")
"""Cases that are also given to the installed command, in a process of its own."""


def case(name):
    return next(case for case in CASES if case.name == name)


def refused(case, ended):
    assert ended.status == 2, ended.out + ended.err
    assert ended.err.startswith("error: ")
    assert [part for part in case.said if part not in ended.err] == [], ended.err
    assert "Traceback" not in ended.out + ended.err
    assert ended.out == ""


def test_the_pipeline_that_is_spoilt_is_good(project):
    before = project.tree()
    ended = project.main("check", "pipeline.toml")
    assert (ended.status, ended.err) == (0, "")
    assert {name: stat for name, stat in project.tree().items() if not name.startswith(".corefit")} == before


def test_cases_have_names_of_their_own():
    assert len({case.name for case in CASES}) == len(CASES) >= 25


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_check_and_run_refuse(project, case):
    case.spoil(project)
    before = project.tree()
    checked = project.main("check", "pipeline.toml")
    refused(case, checked)
    assert project.main("run", "pipeline.toml") == checked
    assert project.tree() == before, "nothing is written"


@pytest.mark.parametrize("name", TYPED, ids=lambda name: name.replace(" ", "-"))
def test_the_installed_command_refuses(project, name):
    case(name).spoil(project)
    before = project.tree()
    for verb in ("check", "run"):
        refused(case(name), project.command(verb, "pipeline.toml"))
    assert project.tree() == before, "nothing is written"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("stage.sora.steps=1", "did you mean 'soar'"),
        ("stage.soar.steps=many", "stage.soar.steps: must be a whole number, not 'many'"),
    ],
)
def test_settings_are_refused_as_the_file_is(project, setting, said):
    before = project.tree()
    for verb in ("check", "run"):
        ended = project.main(verb, "pipeline.toml", "--set", setting)
        assert (ended.status, ended.out) == (2, "")
        assert said in ended.err
    assert project.tree() == before


def test_a_file_that_may_not_be_read_is_named(project, monkeypatch):
    def closed(*args, **keys):
        raise PermissionError(13, "Permission denied", "/data/train.jsonl")

    monkeypatch.setattr("corefit.cli.checking.read", closed)
    ended = project.main("check", "pipeline.toml")
    assert (ended.status, ended.err) == (
        2,
        "error: /data/train.jsonl: permission denied; change its mode, or name another\n",
    )


def test_a_byte_order_mark_is_read(project):
    project.own("train.jsonl")
    project.own("heldout.jsonl")
    for name in ("pipeline.toml", "train.jsonl", "heldout.jsonl"):
        file = project.folder / name
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    ended = project.main("check", "pipeline.toml")
    assert (ended.status, ended.err) == (0, "")


@pytest.mark.parametrize(
    "body",
    [
        "examples = lambda self: None",
        "examples = lambda self: ['a']",
        "examples = lambda self: [Example('')] + [Example([])]",
        "examples = lambda self: [Example(3)]",
        "examples = lambda self: [Example(['a', None])]",
        "examples = lambda self: [Example('a', meta=None)]",
        "examples = lambda self: [Example('\\ud800')]",
    ],
)
def test_a_source_that_gives_no_examples_is_named(project, body):
    text = bare("sources", "mine", body, "(Source)").replace("import Reward,", "import Example, Reward,")
    (project.folder / "bright.py").write_text(text)
    project.swap((SOURCE, 'source = { use = "mine" }'))
    project.write(project.text.partition("[[stage]]")[0] + SFT)
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "bright.py)" in ended.err
    assert "example" in ended.err


def test_what_is_fine_is_told_without_escapes(project):
    (project.folder / "\x1b[2Jruns").mkdir()
    ended = project.main("check", "pipeline.toml", "--out", "\x1b[2Jruns")
    assert ended.status == 0, ended.err
    assert "\x1b" not in ended.out
    assert "\\x1b[2Jruns" in ended.out


# plugins that end the process


@pytest.mark.parametrize("where", ["reward", "source"])
def test_a_plugin_that_exits_does_not_end_a_run_as_if_it_were_done(project, where):
    plugin = project.folder / "bright.py"
    if where == "reward":
        plugin.write_text(plugin.read_text().replace("        return", "        raise SystemExit\n        return", 1))
        verbs = ("run",)
    else:
        plugin.write_text(bare("sources", "mine", "def examples(self): sys.exit(0)", "(Source)"))
        project.swap((SOURCE, 'source = { use = "mine" }'))
        project.write(project.text.partition("[[stage]]")[0] + SFT)
        verbs = ("check", "run")
    for verb in verbs:
        ended = project.main(verb, "pipeline.toml")
        assert ended.status == 2, ended.err
        assert "bright.py:" in ended.err
        assert "called sys.exit(" in ended.err


# what only opening a picture shows


def spoil_pictures(project, *numbers):
    media = project.own("media")
    for number in numbers:
        picture = media / f"{number}.png"
        picture.write_bytes(picture.read_bytes()[:100])
    project.own("train.jsonl")


def test_unreadable_pictures_are_all_listed_and_no_half_cache_is_left(project):
    spoil_pictures(project, 2, 5)
    assert project.main("check", "pipeline.toml").status == 0
    ended = project.main("run", "pipeline.toml")
    assert ended.status == 2, ended.err
    assert "Traceback" not in ended.err
    assert "2 of 8 media are missing or unreadable, and 0 may be skipped" in ended.err
    assert "2.png: " in ended.err
    assert "5.png: " in ended.err
    assert "set skip = 2 under [data]" in ended.err
    assert not [path for path in project.folder.glob(".corefit/cache/*") if path.is_dir()]
    assert not list(project.folder.glob("runs/tiny/0*"))


def test_disabling_plugins(project, monkeypatch):
    monkeypatch.setenv("COREFIT_DISABLE", "saor")
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "COREFIT_DISABLE names 'saor'" in ended.err
    assert "did you mean 'soar'" in ended.err
    monkeypatch.setenv("COREFIT_DISABLE", "soar")
    ended = project.main("check", "pipeline.toml")
    assert "stage.soar.objective: no objective is called 'soar'" in ended.err
