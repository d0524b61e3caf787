"""Model cards: what they say, that their example runs, and when they are written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import quick
import yaml
from PIL import Image

from corefit.pipeline import read
from corefit.run import observers, plan
from corefit.run.publish import card, facts
from corefit.run.publish.output import Output
from corefit.run.run import run as running
from corefit.system import files

LICENSED = "---\nlicense: other\nlicense_name: their-terms\nlicense_link: https://example.org/terms\n---\n"


def head(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def rerun(project: Path, **keys: str) -> list[str]:
    """Run the finished pipeline again, with [card] `keys`; what it printed."""
    from corefit.system.display import Display

    printed: list[str] = []
    settings = [f"card.{key}={value}" for key, value in keys.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(observers, "curves", quick.blank)
        patch.setattr(Display, "print", lambda _, text: printed.append(text))
        running(read(project / "pipeline.toml", settings))
    return printed


def test_a_lora_on_a_stage_says_so_and_shows_its_results(finished_run):
    text = (finished_run / "02-lora/model/README.md").read_text()
    found = head(text)
    assert found["pipeline_tag"] == "text-to-image"
    assert found["library_name"] == "diffusers"
    assert {"corefit", "sd3", "lora", "sft"} <= set(found["tags"])
    assert found["corefit"] == {"run": "tiny", "stage": "lora"}
    assert "base_model" not in found, "no name on the hub is known of what it goes on"
    assert "not go on `base` itself, but on the weights that stage `soar` of the same run" in text
    assert "set the strength to 2." in text, "alpha is twice the rank"
    assert "| base |" in text
    assert "| lora |" in text
    assert f"torch {facts.Facts.of(Output.of(finished_run, 'lora')).versions['torch']}" in text
    assert "8 examples at 16 x 16, 4 held-out prompts" in text


def test_the_card_of_a_stage_has_no_results_of_other_branches(finished_run):
    assert "| lora |" not in (finished_run / "01-soar/model/README.md").read_text()


def test_nothing_in_it_tells_of_this_machine(finished_run, finished):
    from corefit.system.public import leaks

    for stage in ("01-soar", "02-lora"):
        text = (finished_run / stage / "model/README.md").read_text()
        assert leaks(text) == []
        assert str(finished) not in text
        assert 'path = "…/train.jsonl"' in text


def test_the_picture_is_small(finished_run):
    file = finished_run / "01-soar/model/samples.jpg"
    assert max(Image.open(file).size) <= card.LARGEST
    assert file.stat().st_size < 500_000


@pytest.mark.parametrize("stage", ["01-soar", "02-lora"])
def test_its_example_runs(finished_run, stage, monkeypatch):
    """In this process, which has imported diffusers already."""
    text = (finished_run / stage / "model/README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert ("load_lora_weights" in code) == (stage == "02-lora")
    monkeypatch.chdir(finished_run / stage / "model")
    names: dict = {}
    exec(code, names)
    assert names["picture"].size == (16, 16)
    if stage == "02-lora":
        adapter = names["pipeline"].transformer.peft_config["default_0"]
        assert (adapter.r, adapter.lora_alpha) == (2, 4)


def test_it_is_no_part_of_the_weights(finished_run):
    done = json.loads((finished_run / "01-soar/done.json").read_text())
    (finished_run / "01-soar/model/README.md").unlink()
    (finished_run / "01-soar/model/README.md").write_text("mine")
    assert plan.damage(finished_run / "01-soar/model", done["model"]) == ""
    assert "README.md" not in plan.hashes(finished_run / "01-soar/model")
    assert plan.hashes(finished_run / "01-soar/model") == done["model"]


def test_a_changed_table_renews_it_and_trains_nothing(finished_run):
    done = (finished_run / "02-lora/done.json").read_bytes()
    printed = rerun(
        finished_run.parent.parent, title="'A fine title'", license="'mit'", tags="['fine']", base_model="'org/base'"
    )
    assert "lora: finished before, used as it is" in printed
    assert (finished_run / "02-lora/done.json").read_bytes() == done
    text = (finished_run / "02-lora/model/README.md").read_text()
    assert "# A fine title" in text
    assert head(text)["license"] == "mit"
    assert "fine" in head(text)["tags"]
    found = head((finished_run / "01-soar/model/README.md").read_text())
    assert (found["base_model"], found["base_model_relation"]) == ("org/base", "finetune")


def test_a_missing_and_a_half_written_one_are_written_again(finished_run):
    file = finished_run / "01-soar/model/README.md"
    whole = file.read_bytes()
    file.unlink()
    (finished_run / "01-soar/model/.README.md.part").write_bytes(whole[:100])
    (finished_run / "02-lora/model/samples.jpg").unlink()
    rerun(finished_run.parent.parent)
    assert file.read_bytes() == whole
    assert not file.with_name(".README.md.part").exists()
    assert (finished_run / "02-lora/model/samples.jpg").is_file()


def test_one_that_was_edited_stays(finished_run):
    file, said = finished_run / "01-soar/model/README.md", list[str]()
    text = file.read_text()
    assert not card.is_edited(text)
    mine = text.replace("# tiny soar", "# Mine")
    file.unlink()
    file.write_text(mine)
    card.keep(finished_run, "soar", said.append)
    assert (file.read_text(), said) == (mine, []), "nothing would be new in it"
    tables = (finished_run / "pipeline.toml").read_text()
    (finished_run / "pipeline.toml").unlink()
    (finished_run / "pipeline.toml").write_text(tables.replace("[card]", '[card]\nlicense = "mit"'))
    card.keep(finished_run, "soar", said.append)
    assert file.read_text() == mine
    assert said == ["01-soar/model/README.md was edited and stays as it is; for a new card, move it away"]


def test_a_run_goes_on_without_a_card(finished_run, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(card, "render", lambda output: 1 / 0)
    card.keep(finished_run, "soar", said.append)
    assert said == ["soar: its model card cannot be written (ZeroDivisionError: division by zero); the run goes on"]


def test_the_license_is_that_of_the_base_and_never_invented(finished_run):
    text = card.render(Output.of(finished_run, "soar"))
    assert head(text)["license"] == "unknown"
    assert "Not known: look up that of `base`" in text
    base = (finished_run.parent.parent / "base").resolve()
    (finished_run.parent.parent / "base").unlink()
    shutil.copytree(base, finished_run.parent.parent / "base")
    (finished_run.parent.parent / "base/README.md").write_text(LICENSED)
    text = card.render(Output.of(finished_run, "soar"))
    assert (head(text)["license"], head(text)["license_name"]) == ("other", "their-terms")
    assert "[their-terms](https://example.org/terms)" in text


def test_one_that_was_pushed_names_the_hub_and_what_it_goes_on(finished_run):
    files.write_json(finished_run / "01-soar" / facts.PUSHED, {"repo": "me/soar", "revision": "v1", "commit": "0"})
    text = card.render(Output.of(finished_run, "lora"), "me/lora")
    assert (head(text)["base_model"], head(text)["base_model_relation"]) == ("me/soar", "adapter")
    assert 'from_pretrained("me/soar", revision="v1", torch_dtype=torch.bfloat16)' in text
    assert 'load_lora_weights("me/lora", weight_name="pytorch_lora_weights.safetensors")' in text


def test_a_trigger_word_and_clips(finished_run, monkeypatch):
    output = Output.of(finished_run, "lora")
    data = {**output.tables["data"], "trigger": "ohwx", "size": [9, 16, 32]}
    monkeypatch.setitem(output.tables, "data", data)  # pyright: ignore[reportArgumentType]
    text = card.render(output)
    assert (head(text)["pipeline_tag"], head(text)["instance_prompt"]) == ("text-to-video", "ohwx")
    assert "trigger word `ohwx`" in text
    assert "prompt = 'ohwx, a red sky'" in text
    assert "num_frames=9, height=16, width=32" in text


def test_no_import_of_the_command_line_waits_for_it():
    code = "import sys, corefit.cli.publishing; assert not {'torch', 'huggingface_hub'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
