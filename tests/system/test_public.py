from __future__ import annotations

import os
from pathlib import Path

import pytest

from corefit.system.public import is_secret, leaks, seen_from, without_places, without_secrets


@pytest.mark.parametrize(
    ("key", "secret"),
    [
        ("token", True),
        ("hf_token", True),
        ("api_key", True),
        ("APIKEY", True),
        ("aws_secret_access_key", True),
        ("client-secret", True),
        ("password", True),
        ("token_env", False),
        ("max_tokens_per_prompt", False),
        ("tokenizer", False),
        ("key", False),
        ("author", False),
    ],
)
def test_which_keys_are_secret(key, secret):
    assert is_secret(key) is secret


def test_secrets_are_left_out_or_replaced_at_any_depth():
    tables = {
        "a": [{"token": "s1", "n": 1}],
        "b": {"password": "s2", "tokens": ["s3"], "max_token": 4},
        "url": "http://u:s4@h/x",
    }
    assert without_secrets(tables) == {"a": [{"n": 1}], "b": {"max_token": 4}, "url": "http://h/x"}
    assert without_secrets(tables, "hidden") == {
        "a": [{"token": "hidden", "n": 1}],
        "b": {"password": "hidden", "tokens": "hidden", "max_token": 4},
        "url": "http://h/x",
    }


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/models/sd3", "…/sd3"),
        ("/data", "…/data"),
        ("C:\\models\\sd3", "…/sd3"),
        ("../../base", "../../base"),
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-medium"),
        ("https://host/a/b", "https://host/a/b"),
        ("a cat and/or a dog", "a cat and/or a dog"),
        ("/home/ann/x.py: no such file; see /home/ann/run/log.txt", "…/x.py: no such file; see …/log.txt"),
        ("3/4", "3/4"),
    ],
)
def test_absolute_paths_are_shortened_to_their_names(text, shown):
    assert without_places(text) == shown
    assert without_places({"a": [text]}) == {"a": [shown]}


def test_a_path_seen_from_a_folder_leads_there(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a" / "b")
    target = tmp_path / "target"
    target.touch()
    for folder in (tmp_path / "a" / "b", tmp_path / "link"):
        named = seen_from(folder, str(target))
        assert not os.path.isabs(named)
        assert (folder / named).samefile(target)
    assert seen_from(tmp_path, "a/b") == "a/b"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("see /home/me/x and C:\\Users\\me", ["/home/me/x", "C:\\Users\\me"]),
        ("https://huggingface.co/a/b, ../../base, and/or, 24/7/365, …/x.toml, </summary>", []),
        ("hf_abcdefghijklmnopqrst", ["a token (hf_...)"]),
        ("ghp_abcdefghijklmnopqrst", ["a token (ghp_...)"]),
        ("at https://me:secret@host/", ["a user in an address"]),
        ("ask-me-anything-about-this-task-force", []),
    ],
)
def test_what_leaks(text, found):
    assert leaks(text) == found


def test_a_value_of_a_secret_variable_leaks_by_its_name(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "opensesame")
    monkeypatch.setenv("OTHER_TOKEN", "short")
    assert leaks("it is opensesame, short") == ["the value of MY_TOKEN"]
