"""TOML tables become attrs classes strictly, and come back the same; an error names its place."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import tomli_w
from attrs import field, frozen, validators

from corefit import Objective, Reward, Sampler, Supervised, hookimpl
from corefit.errors import ConfigError
from corefit.pipeline.reader import Reader, load, override
from corefit.plugins import Host
from corefit.types import ModelPath, Weighted


@frozen
class Fields:
    """One key of every type that a plugin may use."""

    whole: int = 1
    real: float = 1.0
    text: str = "a"
    flag: bool = False
    mode: Literal["slow", "fast"] = "slow"
    count: Literal[1, 2] = 1
    maybe: int | None = None
    pair: tuple[int, float] = (1, 1.0)
    names: tuple[str, ...] = ()
    listed: list[int] = field(factory=list)
    walked: Sequence[float] = ()
    path: Path | None = None
    model: ModelPath | None = None


@frozen
class Inner:
    rate: float = field(default=1.0, validator=validators.gt(0))
    rule: str = "a"

    def __attrs_post_init__(self) -> None:
        if self.rule == "both":
            raise ValueError("'rule' and 'rate' say the same: remove one")


@frozen
class Learn(Supervised):
    inner: Inner = field(factory=Inner)
    points: int = 1

    def terms(self, batch, ctx):
        yield from ()


@frozen
class Plain(Sampler):
    def step(self, x, v, sigma, sigma_next):
        return None


@frozen
class Noisy(Plain):
    noise: float = 0.7


@frozen
class Match(Reward):
    strict: bool = False

    def score(self, media, prompts, meta):
        return media.mean()


@frozen
class Short:
    pass


@frozen(kw_only=True)
class Long:
    length: int


@frozen(kw_only=True)
class Stage:
    name: str
    objective: Objective
    sampler: Sampler | None = None
    reward: tuple[Weighted, ...] = ()
    size: Short | Long = field(factory=Short)


@frozen(kw_only=True)
class File:
    seed: int = 0
    stage: tuple[Stage, ...] = ()


class Plugin:
    @hookimpl
    def corefit_objectives(self):
        return {"learn": Learn}

    @hookimpl
    def corefit_samplers(self):
        return {"plain": Plain, "noisy": Noisy}

    @hookimpl
    def corefit_rewards(self):
        return {"match": Match}


@pytest.fixture
def reader(tmp_path):
    return Reader(Host(plugins=[Plugin()]), tmp_path, {Short | Long: {"short": Short, "long": Long}})


@pytest.fixture
def refusal(reader):
    """Return the message with which a text is refused as a File, or as another class."""

    def refusal(text, cls=File):
        with pytest.raises(ConfigError) as error:
            reader.read(tomllib.loads(text), cls)
        return str(error.value)

    return refusal


STAGE = '[[stage]]\nname = "one"\nobjective = { use = "learn" }\n'


# types


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("whole = 3", 3),
        ("real = 3.5", 3.5),
        ("real = 3", 3.0),
        ('text = "b"', "b"),
        ("flag = true", True),
        ('mode = "fast"', "fast"),
        ("count = 2", 2),
        ("maybe = 3", 3),
        ("pair = [2, 3]", (2, 3.0)),
        ('names = ["b", "c"]', ("b", "c")),
        ("names = []", ()),
        ("listed = [1, 2]", [1, 2]),
        ("walked = [1, 2.5]", (1.0, 2.5)),
    ],
)
def test_values_of_the_right_type(reader, text, value):
    read = getattr(reader.read(tomllib.loads(text), Fields), text.split()[0])
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('whole = "3"', "whole: must be a whole number, not '3'"),
        ("whole = 3.0", "whole: must be a whole number, not 3.0"),
        ("whole = true", "whole: must be a whole number, not True"),
        ("whole = [3]", "whole: must be a whole number, not [3]"),
        ('real = "3"', "real: must be a number, not '3'"),
        ("real = false", "real: must be a number, not False"),
        ("real = nan", "real: must be a number, not nan"),
        ("text = 3", "text: must be text in quotes, not 3"),
        ("text = 2026-01-02", "text: must be text in quotes, not datetime.date(2026, 1, 2)"),
        ("flag = 1", "flag: must be true or false, not 1"),
        ('flag = "true"', "flag: must be true or false, not 'true'"),
        ('mode = "fats"', "mode: must be one of 'slow', 'fast', not 'fats' (did you mean 'fast'?)"),
        ("mode = 1", "mode: must be one of 'slow', 'fast', not 1"),
        ("count = true", "count: must be one of 1, 2, not True"),
        ('maybe = "3"', "maybe: must be a whole number, not '3'"),
        ("pair = [1]", "pair: must be a list of 2, not [1]"),
        ("pair = [1, 2, 3]", "pair: must be a list of 2, not [1, 2, 3]"),
        ("pair = 1", "pair: must be a list, not 1: write [...]"),
        ('pair = ["1", "2"]', "pair.0: must be a whole number, not '1'\npair.1: must be a number, not '2'"),
        ('names = "abc"', "names: must be a list, not 'abc': write [...]"),
        ("names = [1]", "names.0: must be text in quotes, not 1"),
        ("names = { a = 1 }", "names: must be a list, not a table: write [[...]] or [{ ... }]"),
        ('listed = "12"', "listed: must be a list, not '12': write [...]"),
        ("walked = [true]", "walked.0: must be a number, not True"),
        ("path = 3", "path: must be text in quotes, not 3"),
        ("model = 3", "model: must be text in quotes, not 3"),
    ],
)
def test_values_of_the_wrong_type(refusal, text, said):
    assert refusal(text, Fields) == said


def test_paths_are_relative_to_the_folder(reader, tmp_path):
    assert reader.read({"path": "a/b"}, Fields).path == tmp_path / "a/b"
    assert reader.read({"path": "/a/b"}, Fields).path == Path("/a/b")


def test_a_model_is_a_folder_if_there_is_one_and_a_name_on_the_hub_otherwise(reader, tmp_path):
    (tmp_path / "organisation" / "local").mkdir(parents=True)

    def model(name):
        return reader.read({"model": name}, Fields).model

    assert model("organisation/local") == str(tmp_path / "organisation/local")
    assert model("organisation/remote") == "organisation/remote"
    assert model("./organisation/remote") == str(tmp_path / "organisation/remote")
    assert model("../elsewhere") == f"{tmp_path}/../elsewhere"
    assert model("/elsewhere") == "/elsewhere"


# keys and tables


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sed = 1", "sed is not a key (did you mean 'seed'?); known here: seed, stage"),
        ("colour = 1", "colour is not a key; known here: seed, stage"),
        (
            STAGE + "sampelr = 1",
            "stage.one.sampelr is not a key (did you mean 'sampler'?); "
            "known here: name, objective, sampler, reward, size",
        ),
        (
            STAGE.replace('"learn"', '"learn", point = 2'),
            "stage.one.objective.point is not a key (did you mean 'points'?); known here: inner, points",
        ),
        (
            STAGE.replace('"learn"', '"learn", inner = { rat = 2 }'),
            "stage.one.objective.inner.rat is not a key (did you mean 'rate'?); known here: rate, rule",
        ),
        (STAGE + 'sampler = { use = "plain", noise = 1 }', "stage.one.sampler.noise is not a key; known here: none"),
        (
            STAGE + 'reward = [{ use = "match" }, { use = "match", wieght = 1 }]',
            "stage.one.reward.1.wieght is not a key (did you mean 'weight'?); known here: strict, name, weight, "
            "normalize",
        ),
        (STAGE + 'size = { use = "short", length = 1 }', "stage.one.size.length is not a key; known here: none"),
    ],
)
def test_unknown_keys_at_every_level(refusal, text, said):
    assert refusal(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[stage]]\nobjective = { use = "learn" }', "stage.0.name is missing; stage.0 needs it"),
        ('[[stage]]\nname = "one"', "stage.one.objective is missing; stage.one needs it"),
        (STAGE + 'size = { use = "long" }', "stage.one.size.length is missing; stage.one.size needs it"),
    ],
)
def test_missing_keys(refusal, text, said):
    assert refusal(text) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (STAGE + "sampler = {}", "stage.one.sampler: needs `use`, the name of one sampler: noisy, plain"),
        (STAGE + "sampler = { use = 3 }", "stage.one.sampler: needs `use`, the name of one sampler: noisy, plain"),
        (STAGE + 'sampler = "noisy"', "stage.one.sampler: must be a table such as { use = \"plain\" }, not 'noisy'"),
        (
            STAGE + 'sampler = { use = "nosiy" }',
            "stage.one.sampler: no sampler is called 'nosiy' (did you mean 'noisy'?); there are: noisy, plain. "
            "Install the plugin that offers it, or name its file in `plugins = [...]`",
        ),
        (
            STAGE + 'reward = ["match"]',
            "stage.one.reward.0: must be a table such as { use = \"match\" }, not 'match'",
        ),
        (
            STAGE + 'reward = [{ use = "match", weight = "1" }]',
            "stage.one.reward.0.weight: must be a number, not '1'",
        ),
        (
            STAGE + 'reward = [{ use = "match", normalize = "group" }]',
            "stage.one.reward.0.normalize: must be one of 'none', 'batch', not 'group'",
        ),
        (
            STAGE + 'size = { use = "sort" }',
            "stage.one.size: use: 'sort' is not one of short, long (did you mean 'short'?)",
        ),
        (STAGE + "size = {}", "stage.one.size: needs `use`, the name of one choice: long, short"),
        (STAGE + "reward = { }", "stage.one.reward: must be a list, not a table: write [[...]] or [{ ... }]"),
        (STAGE.replace("[[", "[").replace("]]", "]"), "stage: must be a list, not a table: write [[...]] or [{ ... }]"),
        ("stage = [1]", "stage.0: must be a table, not 1"),
        (STAGE.replace('"learn"', '"learn", inner = 3'), "stage.one.objective.inner: must be a table, not 3"),
        (STAGE.replace('"learn"', '"learn", inner = [3]'), "stage.one.objective.inner: must be a table, not [3]"),
    ],
)
def test_tables_of_the_wrong_kind(refusal, text, said):
    assert refusal(text) == said


def test_a_class_of_no_plugin_has_none_to_name(tmp_path):
    reader = Reader(Host(plugins=[]), tmp_path)
    with pytest.raises(ConfigError, match="objective: needs `use`, the name of one objective: none is installed"):
        reader.read({"name": "one", "objective": {}}, Stage)


@pytest.mark.parametrize(
    ("inner", "said"),
    [
        ("rate = -1", "stage.one.objective.inner.rate: must be > 0: -1.0"),
        ('rule = "both"', "stage.one.objective.inner: 'rule' and 'rate' say the same: remove one"),
    ],
)
def test_what_a_class_refuses_is_told_with_its_place(refusal, inner, said):
    assert refusal(STAGE.replace('"learn"', f'"learn", inner = {{ {inner} }}')) == said


def test_all_problems_are_told_at_once(refusal):
    text = """
        seed = "a"
        sed = 1
        [[stage]]
        name = "one"
        objective = { use = "learn", points = "2", inner = { rate = 0 } }
        [[stage]]
        name = "two"
        sampler = { use = "x" }
    """
    assert refusal(text).splitlines() == [
        "seed: must be a whole number, not 'a'",
        "stage.one.objective.inner.rate: must be > 0: 0.0",
        "stage.one.objective.points: must be a whole number, not '2'",
        "stage.two.objective is missing; stage.two needs it",
        "stage.two.sampler: no sampler is called 'x'; there are: noisy, plain. "
        "Install the plugin that offers it, or name its file in `plugins = [...]`",
        "sed is not a key (did you mean 'seed'?); known here: seed, stage",
    ]


# there and back


def test_tables_read_back_the_same(reader):
    text = """
        seed = 7
        [[stage]]
        name = "one"
        objective = { use = "learn", inner = { rate = 2 } }
        sampler = { use = "noisy", noise = 1 }
        reward = [{ use = "match", weight = 2, normalize = "batch" }, { use = "match", strict = true }]
        size = { use = "long", length = 3 }
        [[stage]]
        name = "two"
        objective = { use = "learn" }
    """
    file = reader.read(tomllib.loads(text), File)
    tables = reader.tables(file)
    assert reader.read(tomllib.loads(tomli_w.dumps(tables)), File).stage[0].size == Long(length=3)
    assert reader.tables(reader.read(tomllib.loads(tomli_w.dumps(tables)), File)) == tables
    assert [each.get("normalize") for each in tables["stage"][0]["reward"]] == ["batch", None]
    assert tables["stage"][1] == {
        "name": "two",
        "objective": {"use": "learn", "inner": {"rate": 1.0, "rule": "a"}, "points": 1},
        "reward": [],
        "size": {"use": "short"},
    }


def test_every_type_reads_back_the_same(reader, tmp_path):
    first = reader.read({"path": "a", "model": "./b", "pair": [1, 2], "real": 1e300, "maybe": 3}, Fields)
    again = reader.read(tomllib.loads(tomli_w.dumps(reader.tables(first))), Fields)
    assert again == first
    assert again.path == tmp_path / "a"


# files


def test_a_path_through_a_file_is_said(tmp_path):
    """What else is wrong with a file as a whole is in tests/cli/test_malformed.py."""
    (tmp_path / "a.toml").write_text("")
    with pytest.raises(ConfigError, match="cannot be read: Not a directory"):
        load(tmp_path / "a.toml" / "x")


# --set


def tables():
    return tomllib.loads("""
        seed = 1
        [data]
        source = { use = "jsonl" }
        [[stage]]
        name = "soar"
        steps = 1
        reward = [{ use = "ocr", weight = 1.0 }]
        [[stage]]
        name = "grpo"
    """)


@pytest.mark.parametrize(
    ("setting", "keys", "value"),
    [
        ("seed=2", ["seed"], 2),
        (" seed = 2", ["seed"], 2),
        ("stage.soar.steps=100", ["stage", 0, "steps"], 100),
        ("stage.grpo.steps=1_000", ["stage", 1, "steps"], 1000),
        ("stage.soar.optimizer.lr=1e-4", ["stage", 0, "optimizer", "lr"], 1e-4),
        ("stage.soar.reward.ocr.weight=2", ["stage", 0, "reward", 0, "weight"], 2),
        ("data.source.path=train.jsonl", ["data", "source", "path"], "train.jsonl"),
        ("data.source.path='a=b'", ["data", "source", "path"], "a=b"),
        ("data.size=[8, 16]", ["data", "size"], [8, 16]),
        ("data.on=true", ["data", "on"], True),
        ("name=two words", ["name"], "two words"),
        ("name=", ["name"], ""),
        ("stage.soar.objective={use='sft'}", ["stage", 0, "objective"], {"use": "sft"}),
        ("eval.limit=3", ["eval", "limit"], 3),
    ],
)
def test_set(setting, keys, value):
    here = tables()
    override(here, [setting])
    for key in keys:
        here = here[key]
    assert here == value


def test_the_last_setting_counts():
    here = tables()
    override(here, ["seed=2", "seed=3"])
    assert here["seed"] == 3


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("seed", "--set seed: write KEY=VALUE, such as stage.soar.steps=100"),
        ("=3", "--set =3: write KEY=VALUE, such as stage.soar.steps=100"),
        ("stage..steps=3", "--set stage..steps=3: write KEY=VALUE, such as stage.soar.steps=100"),
        (
            "stage.sora.steps=3",
            "--set stage.sora.steps=3: there is no stage 'sora' (did you mean 'soar'?); there are: soar, grpo",
        ),
        (
            "stage.soar.reward.orc.weight=1",
            "--set stage.soar.reward.orc.weight=1: there is no reward 'orc' (did you mean 'ocr'?); there are: ocr",
        ),
        ("stage.steps=3", "--set stage.steps=3: say which stage (soar, grpo), as in stage.NAME.KEY=VALUE"),
        (
            "seed=1\n[other]\nx=1",
            "--set 'seed=1\\n[other]\\nx=1': it has several lines; give each key a --set of its own",
        ),
        ("seed.x=3", "--set seed.x=3: 'seed' is 1, not a table; set the whole of it"),
    ],
)
def test_set_of_what_cannot_be_set(setting, said):
    with pytest.raises(ConfigError) as error:
        override(tables(), [setting])
    assert str(error.value) == said


def test_set_where_a_list_holds_no_tables():
    with pytest.raises(ConfigError, match="there is no stage 'soar'; there are: none"):
        override({"stage": [1]}, ["stage.soar.steps=1"])
