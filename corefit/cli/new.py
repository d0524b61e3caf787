"""`corefit new`: writes a complete distribution for a plugin, or a pipeline file, from the templates; or an example."""

from __future__ import annotations

import ast
import importlib.util
import json
import keyword
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from corefit import __version__
from corefit.cli import examples
from corefit.errors import ConfigError, CorefitError, PluginError
from corefit.pipeline.schema import schema
from corefit.plugins.host import GROUP, Host
from corefit.plugins.kinds import BY_WORD

if TYPE_CHECKING:
    from corefit.cli.starting import Wanted

TEMPLATES = Path(__file__).parent / "templates"
COMMON, PIPELINE, EXAMPLE = "common", "pipeline", "example"
NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
LONGEST = 30
"""Most characters of a name, so that no line of the written files is too long."""
SCHEMA = "pipeline.schema.json"
FORMS = {"rollout": "it learns from scored samples of its own", "pairs": "it learns from chosen and rejected media"}
"""What an objective may learn from besides the batch, by the option that asks for its template."""
UNWANTED = {"__pycache__", ".ruff_cache"}
"""Folders that tools leave beside the templates."""


def new(
    kind: str, name: str, folder: Path | None = None, forms: Sequence[str] = (), wanted: Wanted | None = None
) -> list[str]:
    """Write a plugin of `kind` (a key of BY_WORD), or a pipeline, called `name`; return the lines to print.

    Of an EXAMPLE, `name` is the name that it has.

    folder  new or empty; corefit-NAME by default, NAME for a pipeline or an example
    forms   at most one of FORMS, for an objective
    wanted  the folder of pictures that a pipeline is for, and what else is asked for
    Raises CorefitError for a name that is invalid or taken. Then, or if writing fails, nothing is left behind.
    """
    template = _template(kind, forms)
    if kind == EXAMPLE:
        target = folder or Path(name)
        _write(target, examples.example(name))
        return _next(f"{target}: {examples.EXAMPLES[name]}", examples.steps(name, shlex.quote(str(target))))
    plain = _checked(name)
    if kind == PIPELINE and wanted is not None:
        return _from_folder(plain, folder or Path(name), wanted)
    if kind == PIPELINE:
        target = folder or Path(name)
        _write(target, {"pipeline.toml": _filled("pipeline.toml", kind, plain), SCHEMA: _schema()})
        return _next(f"{target / 'pipeline.toml'}: its model and data are yours to name", _pipeline_steps(target))
    _refuse_taken(kind, plain, template)
    target = folder or Path(f"corefit-{_dashed(plain)}")
    _write(target, dict(_distribution(kind, plain, template)))
    said = "".join(f"; {FORMS[form]}" for form in forms)
    written = f'{target}: {BY_WORD[kind].name} {plain!r}, in corefit_{plain}.py; use = "{plain}" once it is installed'
    return _next(written + said, _plugin_steps(target, plain))


def _from_folder(plain: str, target: Path, wanted: Wanted) -> list[str]:
    """Write a pipeline for a folder of pictures or clips."""
    from corefit.cli.starting import start

    _check_target(target)  # before the seconds that an estimate takes
    made = start(wanted, plain, target)
    _write(target, {"pipeline.toml": made.text, SCHEMA: _schema()})
    steps = [f"corefit {command} {shlex.quote(str(target / 'pipeline.toml'))}" for command in (made.check, "run")]
    stage = target / "runs" / plain / f"01-{wanted.objective}"
    steps.append(f"corefit sample {shlex.quote(str(stage))} {shlex.quote(made.prompt)}")
    return [f"{target / 'pipeline.toml'} is written", *made.said, "next:", *(f"  {step}" for step in steps)]


def _template(kind: str, forms: Sequence[str]) -> str:
    """Return the folder of the templates of a kind, in one of its forms; ConfigError if it has no such form."""
    if forms and kind != "objective":
        raise ConfigError(
            f"--{forms[0]} is for objectives; leave it out, or write: corefit new objective NAME --{forms[0]}"
        )
    if len(forms) > 1:
        raise ConfigError("--rollout and --pairs are two templates; choose one")
    return "_".join([kind, *forms])


def _checked(name: str) -> str:
    """Return the name with underscores; PluginError if it cannot name a module, a class and a distribution."""
    plain = name.replace("-", "_")
    suggested = re.sub(r"_+", "_", re.sub(r"[^a-z0-9]", "_", plain.lower())).strip("_0123456789")
    hint = f"; {suggested!r} would do" if NAME.fullmatch(suggested) and len(suggested) <= LONGEST else ""
    if not NAME.fullmatch(plain):
        raise PluginError(
            f"NAME {name!r} cannot be a module's: write lower-case letters, digits and single _ or -, a letter "
            f"first{hint}"
        )
    if len(plain) > LONGEST:
        raise PluginError(f"NAME {name!r} has {len(plain)} characters; {LONGEST} is the most")
    if plain.startswith("corefit_"):
        rest = plain.removeprefix("corefit_")
        raise PluginError(f"NAME {name!r}: leave out the first word, which everything gets anyway: {rest!r}")
    if keyword.iskeyword(plain) or keyword.iskeyword(_class(plain)):
        raise PluginError(f"NAME {name!r} is a word of Python; choose another, such as {plain + '_plugin'!r}")
    return plain


def _refuse_taken(kind: str, plain: str, template: str) -> None:
    """Raise PluginError if an installed plugin or module has the name, or the template itself uses it."""
    offer = Host().offers[BY_WORD[kind].key].get(plain)
    if offer:
        raise PluginError(
            f"the {BY_WORD[kind].name} {plain!r} is offered by {offer.owner} already; choose another NAME"
        )
    for point in entry_points(group=GROUP):
        if point.name == plain:
            owner = point.dist.name if point.dist else point.value
            raise PluginError(f"{owner} has a plugin called {plain!r} already; choose another NAME")
    module = f"corefit_{plain}"
    if importlib.util.find_spec(module):
        raise PluginError(f"there is a Python module {module} already; choose another NAME, or uninstall it")
    taken = _class(plain)
    if any(taken in _names(file) for file in (TEMPLATES / template).rglob("*.py")):
        raise PluginError(
            f"NAME {plain!r} would make a class called {taken}, which the module itself uses; choose another, such as "
            f"{'my_' + plain!r}"
        )


def _names(file: Path) -> set[str]:
    """Return the names that a module's code imports or uses."""
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    imported = {
        alias.asname or alias.name
        for node in nodes
        for alias in getattr(node, "names", ())
        if isinstance(alias, ast.alias)
    }
    return imported | {node.id for node in nodes if isinstance(node, ast.Name)}


def _distribution(kind: str, plain: str, template: str) -> Iterator[tuple[str, str]]:
    """Yield (path in the distribution, text) of every file."""
    for root in (COMMON, template):
        for file in sorted((TEMPLATES / root).rglob("*")):
            path = file.relative_to(TEMPLATES / root)
            if file.is_file() and not UNWANTED & {*path.parts}:
                yield _renamed(path.as_posix(), kind, plain), _filled(path.as_posix(), root, plain, kind)


def _filled(path: str, root: str, plain: str, kind: str = "") -> str:
    text = (TEMPLATES / root / path).read_text(encoding="utf-8")
    return _renamed(text, kind, plain)


def _renamed(text: str, kind: str, plain: str) -> str:
    """Replace the names in a template, which is a working plugin called plugin_name, by those of the new plugin."""
    words = {
        "plugin_name": plain,
        "plugin-name": _dashed(plain),
        "PluginName": _class(plain),
        "PLUGIN_KIND": BY_WORD[kind].name if kind in BY_WORD else kind,
        "COREFIT_RANGE": _versions(__version__),
    }
    return re.sub("|".join(words), lambda found: words[found[0]], text)


def _dashed(plain: str) -> str:
    return plain.replace("_", "-")


def _class(plain: str) -> str:
    return "".join(word[:1].upper() + word[1:] for word in plain.split("_"))


def _versions(version: str) -> str:
    """Return the range of compatible releases: up to the next minor version before 1.0, then up to the next major."""
    major, minor = (int(part) for part in version.split(".")[:2])
    return f">={major}.{minor},<{f'0.{minor + 1}' if major == 0 else major + 1}"


def _schema() -> str:
    return json.dumps(schema(Host()), indent=1) + "\n"


def _write(target: Path, files: Mapping[str, str] | Mapping[str, Path]) -> None:
    """Write all files or none: they are written beside `target` (inside it, if it exists) and then moved.

    files  the text of each, or the file to copy, by its path in `target`
    """
    try:
        _check_target(target)
        exists, parent = target.is_dir(), target.absolute().parent
        with TemporaryDirectory(prefix=".corefit-new-", dir=target if exists else parent) as place:
            draft = Path(place) / "draft"
            draft.mkdir()
            for path, content in files.items():
                (draft / path).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, draft / path)
                else:
                    (draft / path).write_text(content, encoding="utf-8")
            for each in list(draft.iterdir()) if exists else [draft]:
                os.replace(each, target / each.name if exists else target)
    except OSError as error:
        raise CorefitError(f"{target} cannot be written ({error.strerror or error}); nothing was written") from error


def _check_target(target: Path) -> None:
    """Raise ConfigError unless the folder is empty, or can be made."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target} exists already; nothing was written: name another folder with --folder")
    if not target.absolute().parent.is_dir():
        raise ConfigError(f"{target.absolute().parent} is no folder; nothing was written: make it first")


def _next(written: str, steps: list[str]) -> list[str]:
    return [written, "next:", *(f"  {step}" for step in steps)]


def _plugin_steps(target: Path, plain: str) -> list[str]:
    return [f"cd {shlex.quote(str(target))} && pip install -e '.[test]'", "pytest", f"pytest --corefit corefit_{plain}"]


def _pipeline_steps(target: Path) -> list[str]:
    return [f"corefit {command} {shlex.quote(str(target / 'pipeline.toml'))}" for command in ("check", "run")]
