"""`corefit push`: uploads the model of a stage to the hub.

All files go up in one commit, so a repository never has half a model. What a killed push has uploaded stays with the
hub, which knows files of weights by their hash, and is not sent again. (huggingface_hub's upload_large_folder resumes,
too; it makes many commits, writes its own files beside the weights, and tries again for ever where a token or the
network is missing.)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from attrs import frozen

from corefit.errors import ConfigError, CorefitError, DataError, counted
from corefit.run.plan import CARD
from corefit.run.publish import card
from corefit.run.publish.contents import Contents, contents
from corefit.run.publish.facts import PUSHED, Facts, head_of
from corefit.run.publish.output import Output
from corefit.system import files

GIT = ".gitattributes"
"""A file that the hub itself puts into every repository."""
MAIN = "main"
Say = Callable[[str], None]


def push(run: Path, stage: str, repo: str, *, public: bool = False, branch: str | None = None, say: Say) -> str:
    """Upload the model of a finished stage, and return the address of its page. Raises ConfigError or DataError.

    repo    "name" or "organization/name"; it is created if there is none, private unless `public`
    branch  a branch of the repository; it is created if there is none
    """
    output = Output.of(run, stage)
    with _explained(repo), tempfile.TemporaryDirectory() as scratch:
        found = contents(output, _card(output), Path(scratch), say)  # refused before a repository is created
        hub = Hub.of(repo, public=public, branch=branch, say=say)
        stale = hub.stale(output, found)
        text = _card(output, hub)
        found[CARD] = text.encode()
        if hub.has_own_card(text):
            say(f"{CARD} was edited on the hub and stays as it is there")
            del found[CARD]
        commit = hub.commit(found, stale, f"{output.tables['name']}: {stage}, by corefit")
    files.write_json(output.folder / PUSHED, {"repo": hub.repo, "revision": branch, "commit": commit})
    card.keep(run, stage, say)
    for line in _missing(output):
        say(line)
    return hub.url


def _card(output: Output, hub: Hub | None = None) -> str:
    """Return the card for the hub: one that somebody has edited as it is."""
    file = output.model / CARD
    own = file.read_text("utf-8") if file.is_file() else None
    if own is not None and card.is_edited(own):
        return own
    return card.render(output, hub.repo, hub.branch) if hub else card.render(output)


def _missing(output: Output) -> list[str]:
    """Say what others lack to load the model."""
    facts = Facts.of(output)
    if facts.start_stage and not (facts.start and facts.start.on_hub):
        return [
            f"{output.stage} is a LoRA on the weights of stage {facts.start_stage}, which are on no hub, so others "
            f"cannot use it yet: push them with `corefit push {output.run} {facts.start_stage} REPO`, then push "
            f"{output.stage} again, whose card then names them"
        ]
    if facts.lora and facts.start is None:
        return [
            f"the card does not say where on the hub {facts.base_name} is, on which the LoRA goes: set base_model in "
            "[card] of the pipeline, run it again, which trains nothing, and push again"
        ]
    return []


@frozen(eq=False, slots=False)
class Hub:
    """A repository of models on the hub, at one branch.

    is_new  whether the branch has no content of its own yet
    """

    api: Any
    repo: str
    branch: str | None
    is_new: bool

    @staticmethod
    def of(repo: str, *, public: bool, branch: str | None, say: Say) -> Hub:
        """Find or create a repository and its branch. Unless `public`, one that others can read is a ConfigError."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo)
        if not get_token():
            raise ConfigError(
                "the hub needs a token: run `hf auth login`, or set HF_TOKEN to a token that may write, from your "
                "settings there"
            )
        api = HfApi(library_name="corefit")
        name = api.create_repo(repo, private=not public, exist_ok=True).repo_id
        if api.repo_info(name).private is False and not public:
            raise ConfigError(f"{name} is public: everyone could read the model; give --public, or name another")
        if public and api.repo_info(name).private:
            say(f"{name} is private, and stays so; its settings on the hub make it public")
        heads = {each.name: each.target_commit for each in api.list_repo_refs(name).branches}
        if branch and branch not in heads:
            api.create_branch(name, branch=branch)
        is_new = branch not in (None, MAIN) and heads.get(branch) in (None, heads.get(MAIN))
        return Hub(api, name, branch, is_new)

    @property
    def url(self) -> str:
        """The address of its page."""
        return f"{self.api.endpoint}/{self.repo}{f'/tree/{self.branch}' if self.branch else ''}"

    @cached_property
    def files(self) -> set[str]:
        """The names of the files that are there."""
        return set(self.api.list_repo_files(self.repo, revision=self.branch)) - {GIT}

    @cached_property
    def card(self) -> str | None:
        """The text of the card that is there."""
        if CARD not in self.files:
            return None
        with tempfile.TemporaryDirectory() as folder:
            file = self.api.hf_hub_download(self.repo, CARD, revision=self.branch, cache_dir=folder)
            return Path(file).read_text("utf-8", "replace")

    def has_own_card(self, text: str) -> bool:
        """Return whether somebody has edited the card on the hub; `text` is the one that would replace it."""
        there = None if self.is_new else self.card
        return there is not None and there != text and card.is_edited(there) and not card.is_edited(text)

    def stale(self, output: Output, found: Contents) -> list[str]:
        """Return the files there that an earlier push of the same model has left.

        Raises ConfigError if the repository has another model.
        """
        there = self.files
        if self.is_new:  # a copy of the main branch
            return sorted(there - found.keys())
        own, head = {"run": output.tables["name"], "stage": output.stage}, head_of(self.card)
        if there and head.get("corefit") != own:
            held = _held(head) or f"{counted(len(there), 'file')}, such as {min(there)}"
            other = self.branch or MAIN
            raise ConfigError(
                f"{self.repo} has something else in its branch {other}: {held}; nothing was changed. Name another "
                "repository, or another --branch"
            )
        folders = {name.partition("/")[0] for name in found if "/" in name}
        return sorted(name for name in there - found.keys() if "/" in name and name.partition("/")[0] in folders)

    def commit(self, found: Contents, stale: list[str], message: str) -> str:
        """Upload files and remove others, in one commit; return its id."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [
            *(CommitOperationAdd(name, str(file) if isinstance(file, Path) else file) for name, file in found.items()),
            *(CommitOperationDelete(name) for name in stale),
        ]
        done = self.api.create_commit(self.repo, operations, commit_message=message, revision=self.branch)
        return str(done.oid)


def _held(head: Mapping[str, Any]) -> str:
    """Return which model a card is of, if corefit wrote it."""
    own = head.get("corefit")
    return f"stage {own.get('stage')} of the run {own.get('run')}" if isinstance(own, Mapping) else ""


# errors


@contextmanager
def _explained(repo: str) -> Generator[None]:
    """Turn errors of huggingface_hub and of the network into ConfigError and DataError, which say what to do."""
    from huggingface_hub import errors
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

    xet = getattr(errors, "XetError", RuntimeError)  # gone since 2.0
    try:
        yield
    except CorefitError:
        raise
    except HFValidationError as error:
        raise ConfigError(f"{repo!r} is no name of a repository; write NAME or ORGANIZATION/NAME ({error})") from error
    except HfHubHTTPError as error:
        if getattr(error, "response", None) is None:  # without an answer
            raise DataError(f"{repo}: the hub cannot be reached ({_line(error)}); {AGAIN}") from error
        raise _refused(repo, error) from error
    except (HTTPError, xet, OSError, RuntimeError, ValueError) as error:
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError) and cause.response is not None:
            raise _refused(repo, cause) from error
        if UNREACHABLE.search(type(cause).__name__):
            raise DataError(f"{repo}: the hub cannot be reached ({type(cause).__name__}); {AGAIN}") from error
        raise DataError(f"{repo}: the upload did not succeed ({_line(cause)}); {AGAIN}") from error


UNREACHABLE = re.compile("Connect|Timeout|Offline|Proxy|SSL|Protocol")
"""Found in the names of the errors of a network, which differ between the packages that send requests."""
AGAIN = "the same command goes on where it was: files that arrived are not sent again"


def _refused(repo: str, error: Any) -> ConfigError | DataError:
    status = getattr(error.response, "status_code", None)
    if status == 401:
        return ConfigError(f"{repo}: the hub does not accept the token; run `hf auth login`, or set HF_TOKEN anew")
    if status == 403:
        return ConfigError(
            f"{repo}: the token may not write there ({_line(error)}); use one that may, or name a repository of yours"
        )
    return DataError(f"{repo}: the hub answered {status} ({_line(error)}); {AGAIN}")


def _line(error: BaseException) -> str:
    """Return what an error says, in one line, without the addresses of requests."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
