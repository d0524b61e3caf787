"""`corefit new`: plugins of all kinds are written, installed from their wheels, tested and run as a user would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

import forks
import pytest
from attrs import frozen
from conftest import Ended, Project
from packaging.requirements import Requirement
from processes import ended

import corefit
from corefit.cli import commands as cli
from corefit.cli.new import EXAMPLE, LONGEST, PIPELINE, TEMPLATES, new
from corefit.errors import CorefitError
from corefit.plugins import KINDS
from corefit.plugins.host import HOOKS
from corefit.plugins.kinds import BY_WORD

ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install")
COMMON = {".gitignore", ".github/workflows/test.yml", "README.md", "pyproject.toml"}
FORMS = {"objective_rollout": "rollout", "objective_pairs": "pairs"}
KINDS_OF = {**{kind: kind for kind in BY_WORD}, **dict.fromkeys(FORMS, "objective")}
"""All that is written: each kind, and the further forms of an objective; and the kind that each is of."""
NAMES = {form: f"my-own-{form.replace('_', '-')}" for form in KINDS_OF}
LONG = "x" * LONGEST


def module(kind: str) -> str:
    return f"corefit_my_own_{kind}"


def write(form: str, name: str, folder: Path) -> None:
    new(KINDS_OF[form], name, folder, [FORMS[form]] if form in FORMS else [])


@frozen
class Written:
    """All kinds, and all forms of an objective: their folders, and where they are installed."""

    folder: Path
    site: Path

    def of(self, kind: str) -> Path:
        return self.folder / f"corefit-{NAMES[kind]}"

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def started(self, module: str, *args: str, folder: Path) -> Ended:
        """`python -m module ...` where they are installed."""
        return ended(forks.start("-m", module, *args, cwd=folder, **self.environment))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """Each one's distribution, built and installed as pip does, all at once."""
    folder = tmp_path_factory.mktemp("new")
    for kind, name in NAMES.items():
        write(kind, name, folder / f"corefit-{name}")
    site = folder / "site"
    subprocess.run(
        [*PIP, "--no-build-isolation", "--no-deps", "--target", site, *folder.glob("corefit-*")],
        check=True,
        capture_output=True,
        timeout=300,
    )
    return Written(folder, site)


# what is written works


def test_their_own_tests_and_the_kit_pass(written: Written):
    own = [str(written.of(kind) / "tests") for kind in KINDS_OF]
    kit = [f"--corefit={module(kind)}" for kind in KINDS_OF]
    done = written.started("pytest", "-p", "no:cacheprovider", "-rA", *own, *kit, folder=written.folder)
    said = done.out
    assert done.status == 0, said + done.err
    for kind in KINDS_OF:
        assert re.search(rf"PASSED \S*test_my_own_{kind}.py::test_it_is_an?_", said), said
    for kind in (*FORMS, "objective", "sampler", "noise", "reward", "observer"):
        assert f"{BY_WORD[KINDS_OF[kind]].key}.my_own_{kind}" in said, "the kit's own check of it"


def test_corefit_lists_them_with_their_distributions(written: Written, project: Project):
    listed = written.started("corefit", "plugins", folder=project.folder)
    assert listed.status == 0, listed.err
    for kind, name in NAMES.items():
        assert f"\n  my_own_{kind}  (corefit-{name} 0.1.0)" in listed.out


def test_they_run_in_a_pipeline(written: Written, project: Project):
    rows = [f'"a picture of a red sky",media/{n}.png\n' for n in range(8)]
    (project.folder / "train.csv").write_text("prompt,media\n" + "".join(rows))
    project.swap(
        ('use = "sd3"', 'use = "my_own_backbone"'),
        ('{ use = "jsonl", path = "train.jsonl" }', '{ use = "my_own_source", path = "train.csv" }'),
        ('{ use = "soar", points = 2 }', '{ use = "my_own_objective", delta = 0.2 }'),
        ('{ use = "flow_grpo", group = 2, steps = 4 }', '{ use = "my_own_objective_rollout", group = 2, steps = 4 }'),
        ('noise = { use = "logit_normal" }', 'noise = { use = "my_own_noise", a = 2.0 }'),
        ('sampler = { use = "flow_sde", noise = 0.7 }', 'sampler = { use = "my_own_sampler", eta = 0.5 }'),
        ('reward = [{ use = "bright", weight = 1.0 }]', 'reward = [{ use = "my_own_reward" }]'),
        ('reward = [{ use = "bright" }]', 'reward = [{ use = "my_own_reward" }]'),
        ("[eval]", '[[observer]]\nuse = "my_own_observer"\n\n[eval]'),
    )
    done = written.started("corefit", "run", "pipeline.toml", folder=project.folder)
    assert done.status == 0, done.err
    runs = project.folder / "runs/tiny"
    assert '"large"' in (runs / "01-soar/metrics.jsonl").read_text()
    assert '"reward"' in (runs / "02-grpo/metrics.jsonl").read_text()
    assert "my_own_reward" in (runs / "results.json").read_text()
    assert "  tiny is finished\n" in (runs / "diary.txt").read_text()
    assert list((runs / "02-grpo/model").glob("*.safetensors")), "a LoRA that its backbone saved"


def ruff(folder: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(["ruff", *command, "--no-cache", "."], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS_OF)
def test_it_passes_its_own_linter(written: Written, tmp_path: Path, kind: str):
    """With names of any length: they must not make a line too long, nor one that would be joined."""
    pytest.importorskip("ruff")
    ruff(written.of(kind))
    for name in ("q", LONG):
        write(kind, name, tmp_path / name)
        ruff(tmp_path / name)


@pytest.mark.parametrize("kind", KINDS_OF)
def test_no_name_of_the_templates_is_left(written: Written, kind: str):
    files = [file for file in written.of(kind).rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert {str(file.relative_to(written.of(kind))) for file in files} - COMMON == {
        f"{module(kind)}.py",
        f"tests/test_my_own_{kind}.py",
    }
    for file in files:
        assert not re.search("plugin.name|PluginName|PLUGIN_KIND|COREFIT_RANGE", file.read_text()), file


@pytest.mark.parametrize("kind", KINDS_OF)
def test_its_project_says_what_it_needs(written: Written, kind: str):
    project = tomllib.loads((written.of(kind) / "pyproject.toml").read_text())["project"]
    (needed,) = (Requirement(text) for text in project["dependencies"])
    assert needed.name == "corefit"
    assert corefit.__version__ in needed.specifier
    assert "99" not in needed.specifier
    assert project["entry-points"]["corefit"] == {f"my_own_{kind}": module(kind)}
    assert project["description"] == f"A corefit {BY_WORD[KINDS_OF[kind]].name}."
    text = (written.of(kind) / f"{module(kind)}.py").read_text()
    assert f'COREFIT_API = "{corefit.API_VERSION}"' in text, "the templates are for this version"
    hook = f"corefit_{BY_WORD[KINDS_OF[kind]].key}"
    assert f"def {hook}()" in text
    assert hook in HOOKS


@pytest.mark.parametrize("kind", KINDS_OF)
def test_its_readme_shows_keys_and_a_table(written: Written, kind: str):
    readme = (written.of(kind) / "README.md").read_text()
    (table,) = re.findall(r"^```toml\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    assert f'use = "my_own_{kind}"' in table
    assert tomllib.loads(table)
    assert f"pytest --corefit {module(kind)}" in readme


# the command


def test_it_says_what_to_do_next(project: Project):
    ended = project.main("new", "reward", "blue-ness")
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.splitlines() == [
        "corefit-blue-ness: reward 'blue_ness', in corefit_blue_ness.py; use = \"blue_ness\" once it is installed",
        "next:",
        "  cd corefit-blue-ness && pip install -e '.[test]'",
        "  pytest",
        "  pytest --corefit corefit_blue_ness",
    ]
    assert (project.folder / "corefit-blue-ness/corefit_blue_ness.py").is_file()


def test_it_offers_every_kind():
    assert {*cli.NEW} == {*BY_WORD, PIPELINE, EXAMPLE}
    assert {kind.key for kind in BY_WORD.values()} == {*KINDS}


def refused(project: Project, *args: str, status: int = 2) -> str:
    before = project.tree()
    ended = project.main("new", *args)
    assert (ended.status, ended.out) == (status, "")
    assert project.tree() == before, "nothing is written"
    return ended.err


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("objective", "My Loss", "NAME 'My Loss' cannot be a module's: write lower-case letters"),
        ("objective", "My Loss", "'my_loss' would do"),
        ("objective", "1st", "'st' would do"),
        ("objective", "a__b", "'a_b' would do"),
        ("objective", "-", "a letter first\n"),
        ("objective", "../up", "'up' would do"),
        ("objective", LONG + "x", f"has {LONGEST + 1} characters; {LONGEST} is the most"),
        ("objective", "corefit-huber", "leave out the first word, which everything gets anyway: 'huber'"),
        ("objective", "lambda", "is a word of Python; choose another, such as 'lambda_plugin'"),
        ("objective", "none", "is a word of Python"),
        ("objective", "soar", f"the objective 'soar' is offered by corefit {corefit.__version__} already"),
        ("noise", "uniform", f"the noise weighting 'uniform' is offered by corefit {corefit.__version__} already"),
        ("sampler", "builtin", "corefit has a plugin called 'builtin' already"),
        (
            "objective",
            "batch",
            "a class called Batch, which the module itself uses; choose another, such as 'my_batch'",
        ),
        ("source", "path", "a class called Path"),
    ],
)
def test_a_name_that_cannot_be_is_refused(project: Project, kind: str, name: str, said: str):
    assert said in refused(project, kind, "--", name)


@pytest.mark.parametrize("form", FORMS.values())
def test_a_form_is_told(project: Project, form: str):
    plain, ended = project.main("new", "objective", "plain"), project.main("new", "objective", "mine", f"--{form}")
    assert (ended.status, ended.err) == (0, "")
    told = {"rollout": "scored samples of its own", "pairs": "chosen and rejected media"}
    assert f'use = "mine" once it is installed; it learns from {told[form]}\n' in ended.out
    assert 'use = "plain" once it is installed\n' in plain.out
    ours, theirs = (project.folder / f"corefit-{name}" / f"corefit_{name}.py" for name in ("mine", "plain"))
    assert ours.read_text() != theirs.read_text().replace("plain", "mine").replace("Plain", "Mine")


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize("kind", [*sorted({*BY_WORD} - {"objective"}), PIPELINE, EXAMPLE])
def test_a_form_is_refused_for_other_kinds(project: Project, kind: str, form: str):
    said = refused(project, kind, "mine", f"--{form}")
    assert f"--{form} is for objectives; leave it out, or write: corefit new objective NAME --{form}" in said


def test_two_forms_are_refused(project: Project):
    assert "--rollout and --pairs are two templates" in refused(project, "objective", "mine", "--pairs", "--rollout")


def test_a_name_that_a_form_uses_is_refused(project: Project):
    assert "a class called Samples, which" in refused(project, "objective", "samples", "--rollout")
    assert project.main("new", "objective", "samples", "--pairs").status == 0


def test_a_module_that_is_there_is_not_hidden(project: Project, monkeypatch: pytest.MonkeyPatch):
    (project.folder / "corefit_mine.py").write_text("")
    monkeypatch.syspath_prepend(str(project.folder))
    assert "there is a Python module corefit_mine already" in refused(project, "reward", "mine")


def test_an_unknown_kind_is_refused(project: Project):
    assert "'trainer' is not one of 'objective', 'backbone'" in refused(project, "trainer", "mine")


def test_nothing_is_overwritten(project: Project):
    assert "media exists already; nothing was written" in refused(project, "reward", "mine", "--folder", "media")
    assert "bright.py exists already" in refused(project, "reward", "mine", "--folder", "bright.py")
    (project.folder / "mine").mkdir()
    assert project.main("new", "reward", "mine", "--folder", "mine").status == 0, "an empty folder may be there"
    assert "mine exists already" in refused(project, "reward", "mine", "--folder", "mine")


@pytest.mark.parametrize("folder", [".", "link"])
def test_an_empty_folder_may_be_the_current_one_or_behind_a_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "other")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / ("other" if folder == "." else "empty"))
    new("reward", "mine", Path(folder))
    made = {path.name for path in (tmp_path / "other").iterdir()}
    assert made == {*(name.partition("/")[0] for name in COMMON), "corefit_mine.py", "tests"}


def test_a_folder_that_cannot_be_is_refused(project: Project):
    assert "cannot be written (File name too long)" in refused(project, "reward", "mine", "--folder", "a" * 300)


def test_a_folder_goes_into_one_that_is_there(project: Project):
    assert "is no folder; nothing was written: make it first" in refused(project, "reward", "a", "--folder", "none/a")


def test_nothing_is_left_of_what_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write, full = Path.write_text, tmp_path / "full"

    def until_full(path: Path, text: str, **rest: str) -> int:
        if path.name == "README.md":
            raise OSError(28, "No space left on device")
        return write(path, text, **rest)

    monkeypatch.setattr(Path, "write_text", until_full)
    with pytest.raises(CorefitError, match=r"full cannot be written \(No space left on device\); nothing was written"):
        new("reward", "mine", full)
    assert list(tmp_path.iterdir()) == []


# pipelines


def test_a_pipeline_is_one(project: Project):
    ended = project.main("new", "pipeline", "portraits")
    assert (ended.status, ended.err) == (0, "")
    assert "corefit check portraits/pipeline.toml" in ended.out
    folder = project.folder / "portraits"
    text = (folder / "pipeline.toml").read_text()
    assert text.startswith("#:schema pipeline.schema.json\n")
    assert (folder / "pipeline.schema.json").read_text() == project.main("schema").out
    for name in ("train.jsonl", "media", "base"):
        (folder / name).symlink_to(project.folder / name)
    (folder / "pipeline.toml").write_text(text.replace('"model"', '"base"').replace("[512, 512]", "[16, 16]"))
    checked = project.main("check", "portraits/pipeline.toml", "--set", "stage.soar.batch=4")
    assert checked.status == 0, checked.err
    assert "runs/portraits" in checked.out


def uncommented(text: str) -> str:
    """With the tables in that are offered as comments."""
    lines = [re.sub(r"^# (?=\[|\w+ = )", "", line) for line in text.splitlines()]
    return "\n".join(lines).replace('use = "..."', 'use = "bright"')


def test_what_a_pipeline_offers_in_comments_is_right(project: Project):
    text = uncommented((TEMPLATES / PIPELINE / "pipeline.toml").read_text())
    project.write('plugins = ["bright.py"]\n' + text.replace('"model"', '"base"').replace("[512, 512]", "[16, 16]"))
    tables = tomllib.loads(project.text)
    assert [stage["name"] for stage in tables["stage"]] == ["soar", "grpo"]
    assert tables["eval"]["prompts"] == "heldout.jsonl"
    settings: Sequence[str] = ("stage.soar.batch=4", "stage.grpo.batch=24")
    checked = project.main("check", "pipeline.toml", *(arg for one in settings for arg in ("--set", one)))
    assert checked.status == 0, checked.err
