"""`corefit push`, against a stand-in of the hub (tests/hub.py)."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import hub as stand_in
import pytest
from hub import Hub, Refused
from safetensors.numpy import load_file

from corefit.errors import ConfigError, CorefitError, DataError
from corefit.run.publish import metadata
from corefit.run.publish.push import push
from corefit.system import files

LORA = ["README.md", "pytorch_lora_weights.safetensors", "results.json", "samples.jpg"]


@pytest.fixture(scope="module")
def served() -> Iterator[Hub]:
    with stand_in.serve() as hub:
        yield hub


@pytest.fixture
def hub(served: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """An empty hub that huggingface_hub takes for its own, and a token that may write."""
    return stand_in.take_for_the_hub(served, monkeypatch)


@pytest.fixture
def pushed(finished_run: Path, hub: Hub) -> Callable[..., tuple[str, list[str]]]:
    """Pushes a stage of the run: pushed("lora", "name"); the address, and what was said."""

    def call(stage: str, repo: str = "me/model", **keys: object) -> tuple[str, list[str]]:
        said: list[str] = []
        return push(finished_run, stage, repo, say=said.append, **keys), said  # pyright: ignore[reportArgumentType]

    return call


def swap(file: Path, old: str, new: str) -> None:
    """Replace text of a file that may be a hard link."""
    text = file.read_text()
    assert old in text
    file.unlink()
    file.write_text(text.replace(old, new))


def test_a_lora_goes_up_in_one_commit_and_says_what_it_goes_on(pushed, hub, finished_run):
    url, said = pushed("lora", "digits-lora")
    assert url == f"{hub.url}/me/digits-lora"
    assert hub.repos["me/digits-lora"].private
    assert sorted(hub.files("me/digits-lora")) == LORA
    assert hub.commits == 1
    assert "on the weights of stage soar, which are on no hub" in said[0]
    assert b'load_lora_weights("me/digits-lora"' in hub.files("me/digits-lora")["README.md"]
    assert files.read_json(finished_run / "02-lora/pushed.json")["repo"] == "me/digits-lora"
    assert (finished_run / "02-lora/model/README.md").read_bytes() == hub.files("me/digits-lora")["README.md"]


def test_a_whole_model_goes_up_with_its_folders_and_the_lora_then_names_it(pushed, hub, finished_run):
    model = finished_run / "01-soar/model"
    pushed("soar", "me/soar")
    there = hub.files("me/soar")
    assert set(there) == {file.relative_to(model).as_posix() for file in model.rglob("*") if file.is_file()} | {
        "results.json"
    }
    for name in ("transformer/diffusion_pytorch_model.safetensors", "vae/config.json", "tokenizer_3/tokenizer.json"):
        assert there[name] == (model / name).read_bytes()
    _, said = pushed("lora", "me/lora")
    assert said == []
    assert b"base_model: me/soar\n" in hub.files("me/lora")["README.md"]


def test_the_same_again_changes_nothing(pushed, hub):
    pushed("lora")
    before, sent = hub.repos["me/model"].branches["main"], list(hub.puts)
    pushed("lora")
    assert hub.repos["me/model"].branches["main"] == before
    assert hub.puts == sent


def test_after_a_failure_in_the_middle_it_goes_on(pushed, hub, finished_run):
    def fail(number: int) -> None:
        if number == 2:
            raise Refused(413, "too large today")

    hub.on_put = fail
    with pytest.raises(DataError, match=r"the hub answered 413 .*; the same command goes on where it was"):
        pushed("soar")
    assert hub.files("me/model") == {}, "no half model"
    assert not (finished_run / "01-soar/pushed.json").exists()
    arrived, hub.on_put = list(hub.puts), lambda number: None
    assert arrived
    pushed("soar")
    assert len(set(hub.puts)) == len(hub.puts), "what has arrived is not sent again"
    assert "transformer/diffusion_pytorch_model.safetensors" in hub.files("me/model")


def test_after_a_kill_it_goes_on(pushed, hub, finished_run):
    """As a user types it, in a process of its own, which is killed while it sends its third large file."""

    def kill(number: int) -> None:
        if number == 2:
            os.kill(process.pid, signal.SIGKILL)

    hub.on_put = kill
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(finished_run / "hf")}
    command = [sys.executable, "-m", "corefit", "push", str(finished_run), "soar", "model"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    assert process.wait(60) == -signal.SIGKILL
    arrived, hub.on_put = set(hub.puts), lambda number: None
    assert len(arrived) >= 2
    assert hub.files("me/model") == {}
    pushed("soar")
    assert len(set(hub.puts)) == len(hub.puts), "what has arrived is not sent again"
    assert "model_index.json" in hub.files("me/model")


def test_what_it_will_not_overwrite(pushed, hub):
    hub.create("me/notes", **{"README.md": b"my notes", "notes.txt": b"mine"})
    with pytest.raises(ConfigError, match=r"2 files, such as README\.md; nothing was changed"):
        pushed("lora", "me/notes")
    pushed("soar", "me/soar")
    with pytest.raises(ConfigError, match="stage soar of the run tiny; nothing was changed"):
        pushed("lora", "me/soar")
    with pytest.raises(ConfigError, match="stage soar of the run tiny"):
        pushed("lora", "me/soar", branch="main")
    hub.create("me/open", private=False)
    with pytest.raises(ConfigError, match="me/open is public: everyone could read the model; give --public"):
        pushed("lora", "me/open")
    assert hub.files("me/notes") == {"README.md": b"my notes", "notes.txt": b"mine"}


def test_public_where_it_is_asked_for(pushed, hub):
    pushed("lora", "me/open", public=True)
    assert not hub.repos["me/open"].private
    hub.create("me/closed")
    _, said = pushed("lora", "me/closed", public=True)
    assert "me/closed is private, and stays so" in said[0]


def test_a_branch_holds_another_stage(pushed, hub, finished_run):
    pushed("soar")
    url, _ = pushed("lora", branch="lora")
    assert url.endswith("/me/model/tree/lora")
    assert sorted(hub.files("me/model", "lora")) == LORA
    assert "model_index.json" in hub.files("me/model")
    assert b'load_lora_weights("me/model", revision="lora"' in hub.files("me/model", "lora")["README.md"]
    pushed("lora", branch="lora")


def test_a_shard_of_an_earlier_push_goes_and_a_file_of_others_stays(pushed, hub):
    pushed("soar")
    there = hub.repos["me/model"].branches["main"][1]
    there |= {"transformer/diffusion_pytorch_model-00001-of-00002.safetensors": b"old", "workflow.json": b"theirs"}
    pushed("soar")
    assert {"workflow.json"} == {name for name in hub.files("me/model") if hub.files("me/model")[name] == b"theirs"}
    assert "transformer/diffusion_pytorch_model-00001-of-00002.safetensors" not in hub.files("me/model")


def test_a_card_that_was_edited_on_the_hub_stays(pushed, hub):
    pushed("lora")
    there = hub.repos["me/model"].branches["main"][1]
    edited = there["README.md"] = there["README.md"].replace(b"# tiny lora", b"# Mine")
    _, said = pushed("lora")
    assert "README.md was edited on the hub and stays as it is there" in said
    assert hub.files("me/model")["README.md"] == edited


def test_the_header_says_what_the_pipeline_says_now(pushed, hub, finished_run, tmp_path):
    swap(finished_run / "pipeline.toml", "[card]", '[card]\nlicense = "mit"')
    pushed("lora")
    (tmp_path / "there").write_bytes(hub.files("me/model")["pytorch_lora_weights.safetensors"])
    own = finished_run / "02-lora/model/pytorch_lora_weights.safetensors"
    assert metadata.read(tmp_path / "there") == metadata.read(own) | {"modelspec.license": "mit"}
    assert load_file(tmp_path / "there").keys() == load_file(own).keys()


# nothing secret, no absolute path


def test_paths_in_configs_and_headers_do_not_go_up(pushed, hub, finished_run):
    model = finished_run / "01-soar/model"
    config, vae = model / "text_encoder/config.json", model / "vae/diffusion_pytorch_model.safetensors"
    swap(config, "{", '{"_name_or_path": "/home/somebody/clip", ')
    copy = vae.with_suffix(".copy")
    metadata.write(vae, copy, {"format": "pt", "made_from": "/home/somebody/vae.safetensors"})
    vae.unlink()
    copy.rename(vae)
    _, said = pushed("soar")
    assert b"somebody" not in b"".join(hub.files("me/model").values())
    assert json.loads(hub.files("me/model")["text_encoder/config.json"])["_name_or_path"] == "clip"
    assert "text_encoder/config.json goes up without the absolute paths in it" in said
    assert "vae/diffusion_pytorch_model.safetensors goes up without made_from in its header" in said


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("see /home/somebody/notes", "has /home/somebody/notes"),
        ("hf_abcdefghijklmnopqrstuvwx", r"has a token \(hf_...\)"),
        ("the key is open sesame", "has the value of SOME_API_KEY"),
    ],
)
def test_a_card_with_a_secret_is_refused_before_there_is_a_repository(
    pushed, hub, finished_run, text, words, monkeypatch
):
    monkeypatch.setenv("SOME_API_KEY", "open sesame")
    swap(finished_run / "02-lora/model/README.md", "# tiny lora", f"# tiny lora\n\n{text}")
    with pytest.raises(ConfigError, match=f"README.md {words}, which is not for others to read") as raised:
        pushed("lora")
    assert "sesame" not in str(raised.value)
    assert hub.repos == {}


def test_a_token_in_a_config_is_refused(pushed, hub, finished_run):
    swap(finished_run / "01-soar/model/vae/config.json", "{", '{"x": "hf_abcdefghijklmnopqrstuvwx", ')
    with pytest.raises(ConfigError, match=r"vae/config.json has a token"):
        pushed("soar")


# errors


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("", "the hub needs a token: run `hf auth login`"),
        ("wrong-0123456789", "the hub does not accept the token"),
        (stand_in.READS, "the token may not write there"),
    ],
)
def test_tokens(pushed, monkeypatch, token, words, tmp_path):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=words):
        pushed("lora")


def test_no_network(pushed, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="the hub cannot be reached"):
        pushed("lora")


@pytest.mark.parametrize(
    ("stage", "repo", "words"),
    [
        ("lora", "a/b/c", "no name of a repository; write NAME or ORGANIZATION/NAME"),
        ("lroa", "me/x", "did you mean 'lora'"),
    ],
)
def test_names(pushed, stage, repo, words):
    with pytest.raises(CorefitError, match=words):
        pushed(stage, repo)


def test_the_command_ends_with_2_and_a_line(project, hub):
    ended = project.main("push", "nowhere", "lora", "me/x")
    assert (ended.status, ended.err) == (2, "error: nowhere is not the folder of a run; name one such as runs/digits\n")


def test_the_command_says_where_it_is(finished_run, project, hub):
    shutil.copytree(finished_run, project.folder / "r", copy_function=os.link)
    ended = project.main("push", "r", "lora", "x", "--branch", "b")
    assert ended.status == 0, ended.err
    assert ended.out.endswith(f"lora is at {hub.url}/me/x/tree/b\n")
