"""A case: what is spoiled, what is typed, and what must hold then."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from attrs import field, frozen

PIPELINE, CHECK, RUN, PREPARE = "pipeline.toml", ("check", "pipeline.toml"), ("run", "pipeline.toml"), ("prepare",)
OURS = ("runs", ".corefit")
"""Folders of a project that corefit writes; all else is the user's."""


@frozen
class Project:
    """A folder with a pipeline, its data and its base model, which a case may spoil."""

    folder: Path

    @property
    def run_folder(self) -> Path:
        """The folder that the pipeline, which is called demo, leaves its run in."""
        return self.folder / "runs" / "demo"

    @property
    def cache(self) -> Path:
        """Where encoded data and prompts are."""
        return self.folder / ".corefit" / "cache"

    @property
    def outside(self) -> Path:
        """A folder of the user's beside the project."""
        return self.folder.parent / "outside"

    def path(self, name: str) -> Path:
        """A file or folder of the project; a pattern must match, and its first match in order is taken."""
        return sorted(self.folder.glob(name))[0] if "*" in name else self.folder / name

    def replace(self, old: str, new: str, file: str = PIPELINE) -> None:
        """Change a text that must be in a file."""
        path = self.path(file)
        text = path.read_text(encoding="utf-8")
        if old not in text:
            raise LookupError(f"{path} has no {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")

    def append(self, text: str, file: str = PIPELINE) -> None:
        """Add to the end of a file."""
        path = self.path(file)
        path.write_text(path.read_text(encoding="utf-8") + text, encoding="utf-8")

    def write(self, file: str, content: str | bytes) -> None:
        """Make a file, and the folders that it needs."""
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        """Delete a file or folder."""
        path = self.path(name)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def nothing(project: Project) -> None:
    """Spoil nothing: what is hostile is what is typed, or what surrounds it."""


def undisturbed() -> None:
    """Change nothing in the process."""


def fine(project: Project) -> list[str]:
    """Find nothing wrong."""
    return []


@frozen(kw_only=True)
class Case:
    """One hostile act.

    spoil    changes the project before the command
    typed    arguments of corefit; {folder} is the project's
    start    what lies in the folder before: "fresh", "encoded", "finished", "interrupted"
    status   exit statuses that are right
    says     words that the output must have, in any case of letters; not asked of status 0 where others are right too
    unsaid   what the output must not have
    inside   is called in the process, in the project's folder, before corefit is
    env      variables of the environment; None removes one
    again    run the same command once what was spoiled is as before: it must end as an undisturbed run does
    equal    status 0 must mean the same results as an undisturbed run's
    theirs   a plugin file whose author's exception this is: it may be shown with its traceback, and status 1, if that
             names the file
    after    what is wrong with what the command left, if it ended with status 0
    odd      further arguments of the last rank alone
    makes    names in the project's folder that the command may add
    ranks    processes that run it together
    root     whether the case needs the right to mount
    """

    name: str
    area: str
    spoil: Callable[[Project], object] = nothing
    typed: Sequence[str] = CHECK
    start: str = "fresh"
    status: Collection[int] = (2,)
    says: Sequence[str] = ()
    unsaid: Sequence[str] = ()
    inside: Callable[[], object] = undisturbed
    env: Mapping[str, str | None] = field(factory=dict[str, "str | None"])
    again: bool = False
    equal: bool = False
    theirs: str = ""
    after: Callable[[Project], list[str]] = fine
    odd: Sequence[str] = ()
    makes: Sequence[str] = ()
    ranks: int = 1
    root: bool = False
    timeout: float = 120.0


# what is of the user, and of a run


def digests(folder: Path, *, without: Collection[str] = ()) -> dict[str, str]:
    """Relative name -> sha256 of each file, target of each link, "folder" for a folder; names at the top left out."""
    found: dict[str, str] = {}
    if not folder.exists():
        return found
    for entry in sorted(path for path in folder.iterdir() if path.name not in without):
        below = sorted(entry.rglob("*")) if entry.is_dir() and not entry.is_symlink() else []
        for path in [entry, *below]:
            found[path.relative_to(folder).as_posix()] = _digest(path)
    return found


def _digest(path: Path) -> str:
    if path.is_symlink():
        return f"link to {path.readlink()}"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return "folder" if path.is_dir() else "special"


def changed(before: Mapping[str, str], after: Mapping[str, str], makes: Collection[str] = ()) -> list[str]:
    """Which of the user's files are gone, other, or new without being asked for; each with its name."""
    gone = [f"{name}: gone" for name in before if name not in after]
    other = [f"{name}: changed" for name in before if name in after and before[name] != after[name]]
    new = [f"{name}: new" for name in after if name not in before and name.partition("/")[0] not in makes]
    return gone + other + new


def precious(project: Project) -> dict[str, str]:
    """sha256 -> name of what a run must never lose: models, and what the user put there."""
    found: dict[str, str] = {}
    for path in (project.folder / "runs").rglob("*"):
        if path.is_file() and not path.is_symlink() and ("model" in path.parts or path.name == "mine.txt"):
            found[_digest(path)] = path.relative_to(project.folder).as_posix()
    return found
