"""The pipeline file and the command line: what users type, paste and generate."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.hostile.case import CHECK, PIPELINE, RUN, Case, Project

Spoil = Callable[[Project], object]


def cases() -> list[Case]:
    """All of this area."""
    return [*_values(), *_files(), *_typed(), *_paths()]


def _case(name: str, spoil: Spoil, *says: str, status: tuple[int, ...] = (2,)) -> Case:
    return Case(name=name, area="pipeline", spoil=spoil, says=says, status=status)


def _for(old: str, new: str) -> Spoil:
    """Another text in the pipeline."""
    return lambda project: project.replace(old, new)


def _then(*spoils: Spoil) -> Spoil:
    def all_of_them(project: Project) -> None:
        for spoil in spoils:
            spoil(project)

    return all_of_them


# a value that is wrong: name, what stands there, what is put there, a word of the message
VALUES: tuple[tuple[str, str, str, str], ...] = (
    ("seed is text", "seed = 0", 'seed = "0"', "seed"),
    ("seed is a date", "seed = 0", "seed = 2026-11-21", "seed"),
    ("name is empty", 'name = "demo"', 'name = ""', "name"),
    ("name climbs out", 'name = "demo"', 'name = "../../outside"', "name"),
    ("name is a dot", 'name = "demo"', 'name = "."', "name"),
    ("name has NUL", 'name = "demo"', 'name = "de\\u0000mo"', "name"),
    ("name of 5000 letters", 'name = "demo"', f'name = "{"x" * 5000}"', "name"),
    ("name ends with a line break", 'name = "demo"', 'name = "demo\\n"', "name"),
    ("stage name of 5000 letters", 'name = "sft"', f'name = "{"s" * 5000}"', "name"),
    ("stage name climbs out", 'name = "sft"', 'name = "../../../outside"', "name"),
    ("stage name is empty", 'name = "sft"', 'name = ""', "name"),
    ("stage name has an escape sequence", 'name = "sft"', 'name = "\\u001b[31mEVIL"', "name"),
    ("stage called base", 'name = "sft"', 'name = "base"', "base"),
    ("two stages of one name", 'name = "grpo"', 'name = "sft"', "sft"),
    ("steps is zero", "steps = 4", "steps = 0", "steps"),
    ("steps is negative", "steps = 4", "steps = -4", "steps"),
    ("steps is a fraction", "steps = 4", "steps = 4.5", "steps"),
    ("steps is true", "steps = 4", "steps = true", "steps"),
    ("steps is inf", "steps = 4", "steps = inf", "steps"),
    ("batch of 10**12", "batch = 2", "batch = 1000000000000", "batch"),
    ("batch beyond 64 bits", "batch = 2", "batch = 99999999999999999999999", "batch"),
    ("batch is zero", "batch = 2", "batch = 0", "batch"),
    ("lr is inf", "lr = 1e-3", "lr = inf", "lr"),
    ("lr is nan", "lr = 1e-3", "lr = nan", "lr"),
    ("lr is negative", "lr = 1e-3", "lr = -1.0", "lr"),
    ("lr is text", "lr = 1e-3", 'lr = "1e-3"', "lr"),
    ("misspelled key of a stage", "checkpoint_every", "checkpoint_evry", "checkpoint_every"),
    ("misspelled table", "[data]", "[dta]", "data"),
    ("misspelled objective", '"flow_grpo"', '"flow_grop"', "flow_grpo"),
    ("misspelled sampler", '"cps"', '"csp"', "cps"),
    ("misspelled backbone", '"sd3"', '"ds3"', "sd3"),
    ("objective is a text", 'objective = { use = "sft" }', 'objective = "sft"', "objective"),
    ("objective is a list", 'objective = { use = "sft" }', "objective = []", "objective"),
    ("use is a number", 'objective = { use = "sft" }', "objective = { use = 3 }", "use"),
    ("size is empty", "size = [16, 16]", "size = []", "size"),
    ("size of five numbers", "size = [16, 16]", "size = [1, 2, 3, 4, 5]", "size"),
    ("size is zero", "size = [16, 16]", "size = [0, 0]", "size"),
    ("size is negative", "size = [16, 16]", "size = [-16, -16]", "size"),
    ("size is odd", "size = [16, 16]", "size = [17, 15]", "size"),
    ("size of 10**9", "size = [16, 16]", "size = [1000000000, 1000000000]", "size"),
    ("size is text", "size = [16, 16]", 'size = "16x16"', "size"),
    ("aspect with a zero", "size = [16, 16]", 'size = [16, 16]\naspects = ["0:1"]', "aspects"),
    ("aspect of 10**9 to 1", "size = [16, 16]", 'size = [16, 16]\naspects = ["1000000000:1"]', "aspects"),
    ("fps is inf", "size = [16, 16]", "size = [1, 16, 16]\nfps = inf", ""),
    ("encode_batch is zero", "size = [16, 16]", "size = [16, 16]\nencode_batch = 0", "encode_batch"),
    ("skip is negative", "size = [16, 16]", "size = [16, 16]\nskip = -1", "skip"),
    ("keep is code", "size = [16, 16]", "size = [16, 16]\nkeep = \"__import__('os').system('true')\"", "keep"),
    ("keep is deep", "size = [16, 16]", f'size = [16, 16]\nkeep = "{"(" * 5000}1{")" * 5000}"', "keep"),
    ("keep has NUL", "size = [16, 16]", 'size = [16, 16]\nkeep = "rating\\u0000 > 1"', "keep"),
    ("LoRA rank of 10**9", "rank = 2", "rank = 1000000000", "rank"),
    ("LoRA rank is zero", "rank = 2", "rank = 0", "rank"),
    ("LoRA alpha is inf", "rank = 2", "rank = 2, alpha = inf", "alpha"),
    ("LoRA targets are unknown", "rank = 2", 'rank = 2, targets = ["nowhere"]', "nowhere"),
    ("LoRA after LoRA of another rank", "steps = 4\n", 'steps = 4\ntrain = { use = "lora", rank = 4 }\n', "LoRA"),
    ("group does not divide batch", "group = 2", "group = 3", "group"),
    ("group is zero", "group = 2", "group = 0", "group"),
    ("noise is inf", "noise = 0.7", "noise = inf", "noise"),
    ("noise is out of range", "noise = 0.7", "noise = -1.0", "noise"),
    ("guidance is inf", "guidance = 1.5", "guidance = inf", "guidance"),
    ("fraction is nan", "fraction = 0.5", "fraction = nan", "fraction"),
    ("sampler is deterministic", '{ use = "cps", noise = 0.7 }', '{ use = "ode" }', "sampler"),
    ("reward is missing", 'reward = [{ use = "bright" }]\nsampler', "sampler", "reward"),
    ("reward is a table", 'reward = [{ use = "bright" }]\nsampler', 'reward = { use = "bright" }\nsampler', "reward"),
    ("reward weight is inf", '"bright" }]\nsampler', '"bright", weight = inf }]\nsampler', "weight"),
    ("reward weight is text", '"bright" }]\nsampler', '"bright", weight = "1" }]\nsampler', "weight"),
    (
        "betas of three",
        "lr = 1e-3 }\ncheckpoint_every",
        "lr = 1e-3, betas = [0.9, 0.9, 0.9] }\ncheckpoint_every",
        "betas",
    ),
    ("betas of one", "lr = 1e-3 }\ncheckpoint_every", "lr = 1e-3, betas = [1.0, 1.0] }\ncheckpoint_every", "betas"),
    ("warmup beyond steps", "lr = 1e-3 }\ncheckpoint_every", "lr = 1e-3, warmup = 99 }\ncheckpoint_every", "warmup"),
    ("plugins is a text", 'plugins = ["bright.py"]', 'plugins = "bright.py"', "plugins"),
    ("plugins has numbers", 'plugins = ["bright.py"]', "plugins = [1]", "plugins"),
    ("plugin file is a folder", '"bright.py"', '"base"', "base"),
    ("plugin file is no Python", '"bright.py"', '"mine.txt"', "mine.txt"),
    ("plugin file climbs to nothing", '"bright.py"', '"../../nowhere.py"', "nowhere.py"),
    ("plugin file has NUL", '"bright.py"', '"bri\\u0000ght.py"', "plugins"),
    ("eval steps is zero", "steps = 2\nbatch = 2", "steps = 0\nbatch = 2", "eval.steps"),
    (
        "eval has no reward",
        'prompts = "heldout.jsonl"\nreward = [{ use = "bright" }]',
        'prompts = "heldout.jsonl"',
        "reward",
    ),
    ("eval prompts are a folder", '"heldout.jsonl"', '"pictures"', "pictures"),
    ("precision is fp8", "seed = 0", 'seed = 0\nprecision = "fp8"', "precision"),
    ("out is a file", "seed = 0", 'seed = 0\nout = "mine.txt"', "mine.txt"),
    ("out is below a file", "seed = 0", 'seed = 0\nout = "mine.txt/deep"', "mine.txt"),
    ("out has NUL", "seed = 0", 'seed = 0\nout = "ru\\u0000ns"', "out"),
    ("train at the top", "seed = 0", 'seed = 0\ntrain = { use = "full" }', "train"),
    ("key of 10000 letters", "seed = 0", f"seed = 0\n{'k' * 10000} = 1", "not a key"),
    ("key with an escape sequence", "seed = 0", 'seed = 0\n"\\u001b[31mEVIL" = 1', "not a key"),
    ("value with an escape sequence", '"flow_grpo"', '"\\u001b[31mEVIL"', "flow_grpo"),
    ("no stage", '[[stage]]\nname = "sft"', '[[nostage]]\nname = "sft"', "stage"),
)


def _values() -> list[Case]:
    cases = [_case(name, _for(old, new), said) for name, old, new, said in VALUES]
    raw = ("escape sequence",)
    return [
        case
        if not any(word in case.name for word in raw)
        else Case(name=case.name, area=case.area, spoil=case.spoil, says=case.says, unsaid=("\x1b[31mEVIL",))
        for case in cases
    ]


def _content(content: bytes) -> Spoil:
    return lambda project: project.write(PIPELINE, content)


def _with_bom(project: Project) -> None:
    project.write(PIPELINE, b"\xef\xbb\xbf" + project.path(PIPELINE).read_bytes())


def _crlf(project: Project) -> None:
    project.write(PIPELINE, project.path(PIPELINE).read_bytes().replace(b"\n", b"\r\n"))


def _utf16(project: Project) -> None:
    project.write(PIPELINE, project.path(PIPELINE).read_text().encode("utf-16"))


def _files() -> list[Case]:
    deep, tables = "[" * 20000 + "]" * 20000, ".".join(["a"] * 20000)
    return [
        _case("BOM", _with_bom, status=(0,)),
        _case("CRLF", _crlf, status=(0,)),
        _case("UTF-16", _utf16, PIPELINE),
        _case("empty file", _content(b""), "stage"),
        _case("binary file", _content(bytes(range(256)) * 40), PIPELINE),
        _case("NUL in the file", _content(b'name = "demo"\n\0\n'), PIPELINE),
        _case("JSON", _content(b'{"name": "demo"}'), PIPELINE),
        _case("deep list", lambda p: p.append(f"\n[deep]\nx = {deep}\n")),
        _case("deep tables", lambda p: p.append(f"\n[{tables}]\nx = 1\n")),
        _case("file of 20 MB", lambda p: p.append("\n# comment" * 2_000_000), status=(0, 2)),
        _case("key of a million digits", lambda p: p.replace("seed = 0", f"seed = {'9' * 1_000_000}")),
        _case("3000 stages", lambda p: p.append("".join(f'\n[[stage]]\nname = "s{n}"' for n in range(3000))), "stage"),
        _case("key twice", lambda p: p.replace("seed = 0", "seed = 0\nseed = 1"), PIPELINE),
        _case("file is missing", lambda p: p.remove(PIPELINE), PIPELINE),
        _case("file is a folder", lambda p: (p.remove(PIPELINE), p.path(PIPELINE).mkdir()), PIPELINE),
        _case("file is a link to itself", _loop, PIPELINE),
        _case("file is a dangling link", _dangling, PIPELINE),
        _case("file is a pipe", _null, status=(2,)),
    ]


def _loop(project: Project) -> None:
    project.remove(PIPELINE)
    project.path(PIPELINE).symlink_to(PIPELINE)


def _dangling(project: Project) -> None:
    project.remove(PIPELINE)
    project.path(PIPELINE).symlink_to("nowhere.toml")


def _null(project: Project) -> None:
    project.remove(PIPELINE)
    project.path(PIPELINE).symlink_to(os.devnull)


def _typing(name: str, *typed: str, says: tuple[str, ...] = (), status: tuple[int, ...] = (2,), **rest: object) -> Case:
    made = Case(name=name, area="pipeline", typed=typed, says=says, status=status)
    import attrs

    return attrs.evolve(made, **rest) if rest else made


def _typed() -> list[Case]:
    set_ = partial(_typing, status=(2,))
    return [
        set_("--set without value", *CHECK, "--set", "seed", says=("seed",)),
        set_("--set empty key", *CHECK, "--set", "=1", says=("KEY=VALUE",)),
        set_("--set dots", *CHECK, "--set", "...=1", says=("KEY=VALUE",)),
        set_("--set into a value", *CHECK, "--set", "seed.deep=1", says=("seed",)),
        set_("--set unknown stage", *CHECK, "--set", "stage.sfft.steps=1", says=("sft",)),
        set_("--set stage without a name", *CHECK, "--set", "stage.steps=1", says=("stage",)),
        set_("--set injects a table", *CHECK, "--set", "seed=1\n[evil]\nx=1", says=("seed",)),
        set_("--set inf", *CHECK, "--set", "stage.sft.optimizer.lr=inf", says=("lr",)),
        set_("--set NUL key", *CHECK, "--set", "se\x01ed=1", says=("se",)),
        set_("--set a surrogate", *CHECK, "--set", "name=\udc80", says=("name",)),
        set_("--set deep", *CHECK, "--set", f"seed={'[' * 5000}{']' * 5000}", says=("seed",)),
        set_("--set a stage to a number", *CHECK, "--set", "stage=3", says=("stage",)),
        set_("--set backbone to a text", *CHECK, "--set", "backbone=sd3", says=("backbone",)),
        set_("--from unknown", *RUN, "--from", "gpro", says=("grpo",)),
        set_("--from with escape sequence", *RUN, "--from", "\x1b[31mEVIL", says=("stage",), unsaid=("\x1b[31mEVIL",)),
        set_("--out is a file", *RUN, "--out", "mine.txt", says=("mine.txt",)),
        set_("--out with quotes", *RUN, "--dry-run", "--out", "it's '''odd'''", status=(0, 2), says=("out",)),
        set_("--out is /proc", *RUN, "--out", "/proc/nowhere", says=("/proc",)),
        set_("--out is /dev/null", *RUN, "--out", "/dev/null", says=("/dev/null",)),
        set_("--ranks zero", *CHECK, "--ranks", "0", says=("ranks",)),
        set_("--memory nonsense", *CHECK, "--memory", "lots", says=("lots",)),
        set_("--memory one byte", *CHECK, "--memory", "0.000001MiB", says=("stage",)),
        set_("--memory of 400 digits", *CHECK, "--memory", "9" * 400 + "GiB", status=(0, 2)),
        set_("no such command", "trian", PIPELINE, says=("trian",)),
        set_("no argument", "run", says=("PIPELINE",)),
        set_("show zero", "show", PIPELINE, "--count", "0", says=("count",)),
        set_("show into a folder", "show", PIPELINE, "--file", "pictures", says=("pictures",)),
        set_(
            "show into no folder", "show", PIPELINE, "--file", "nowhere/deep/x.png", status=(0, 2), makes=("nowhere",)
        ),
        set_("show into a text file", "show", PIPELINE, "--file", "new.txt", status=(0, 2), makes=("new.txt",)),
        set_("plugins of a missing file", "plugins", "nowhere.py", says=("nowhere.py",)),
        set_("plugins of a picture", "plugins", "pictures/0.png", says=("0.png",)),
        set_("plugins of a folder", "plugins", "pictures", says=("pictures",)),
        set_("schema of a missing file", "schema", "nowhere.py", says=("nowhere.py",)),
        set_("new over a full folder", "new", "reward", "odd", "--folder", "pictures", says=("pictures",)),
        set_("new with a path for a name", "new", "reward", "../outside/evil", says=("name",)),
        set_("new with an empty name", "new", "objective", "", says=("name",)),
        set_("new with a keyword", "new", "objective", "class", status=(0, 2), makes=("corefit-class",)),
        set_("new with unicode", "new", "reward", "größe", status=(0, 2), makes=("corefit-größe",)),
        set_("new with an escape sequence", "new", "reward", "\x1b[31mEVIL", unsaid=("\x1b[31mEVIL",)),
        set_("new pipeline over a file", "new", "pipeline", "mine.txt", status=(2,), says=("mine.txt",)),
        set_("new of no kind", "new", "rewrad", "x", says=("reward",)),
        set_("seed beyond 64 bits", *RUN, "--set", "seed=99999999999999999999999", says=("seed",), status=(0, 2)),
        set_("seed far below zero", *RUN, "--set", "seed=-99999999999999999999999", says=("seed",), status=(0, 2)),
        set_("completion of no shell", "completion", "tcsh", says=("tcsh",)),
    ]


def _paths() -> list[Case]:
    return [
        _case("source path climbs to nothing", _for('"train.jsonl"', '"../../nowhere.jsonl"'), "nowhere.jsonl"),
        _case("source path is /dev/zero", _for('"train.jsonl"', '"/dev/full"'), "/dev/full"),
        _case("source path is empty", _for('"train.jsonl"', '""'), "path"),
        _case("source path has NUL", _for('"train.jsonl"', '"tra\\u0000in.jsonl"'), "path"),
        _case("source path of 5000 letters", _for('"train.jsonl"', f'"{"p" * 5000}"'), "path"),
        _case("source is a link to itself", _linked_source, "train.jsonl"),
        _case("backbone path of 5000 letters", _for('"base"', f'"{"p" * 5000}"'), "backbone"),
        _case("backbone path has NUL", _for('"base"', '"ba\\u0000se"'), "backbone"),
        _case("backbone path is a file", _for('"base"', '"mine.txt"'), "mine.txt"),
        _case("backbone path is empty", _for('"base"', '""'), "backbone"),
        _encoded("encoded is the project", "."),
        _encoded("encoded is the user's folder", "../outside"),
        _encoded("encoded is the root", "/"),
        _encoded("encoded is the pictures", "pictures"),
        _encoded("encoded is a file", "mine.txt"),
        _encoded("encoded is empty", ""),
        _encoded("encoded is an odd URL", "ftp://"),
        _encoded("encoded is missing", "nowhere"),
    ]


def _linked_source(project: Project) -> None:
    project.remove("train.jsonl")
    Path(project.folder / "train.jsonl").symlink_to("train.jsonl")


def _encoded(name: str, place: str) -> Case:
    spoil = _for('source = { use = "jsonl", path = "train.jsonl" }', f'encoded = "{place}"')
    return Case(name=name, area="pipeline", spoil=spoil, typed=RUN, says=(Path(place).name or "data",))
