"""Finding the model of a stage in the folder of a run."""

import json

import pytest
import tomli_w

from corefit.errors import ConfigError
from corefit.run.publish.output import Output
from corefit.run.report.results import KEYS
from corefit_backbones.sd3 import Sd3


@pytest.fixture
def run(tmp_path, checkpoint):
    """The folder of a run that trained all weights, then a LoRA on them, and has a third stage still to do."""
    tables = {
        "name": "r",
        "backbone": {"use": "sd3", "path": str(checkpoint), "train": {"use": "full"}},
        "stage": [{"name": "soar"}, {"name": "grpo"}, {"name": "more"}],
    }
    for folder in ("01-soar", "02-grpo"):
        (tmp_path / folder / "model").mkdir(parents=True)
    (tmp_path / "01-soar/model/model_index.json").write_text("{}")
    (tmp_path / "pipeline.toml").write_text(tomli_w.dumps(tables))
    return tmp_path


def test_weights_of_a_full_stage_and_of_a_lora_on_it(run):
    full, lora = Output.of(run, "soar"), Output.of(run, "grpo")
    assert (full.whole, full.lora) == (run / "01-soar/model", None)
    assert (lora.whole, lora.lora) == (run / "01-soar/model", run / "02-grpo/model")
    assert isinstance(lora.base(), Sd3)


def test_results_are_optional(run):
    assert Output.of(run, "soar").results() == []
    row = dict.fromkeys(KEYS, "soar")
    (run / "results.json").write_text(json.dumps([row]))
    assert Output.of(run, "soar").results() == [row]


@pytest.mark.parametrize(
    ("stage", "words"), [("sor", "did you mean 'soar'"), ("more", "has not finished"), ("x", "it has soar, grpo, more")]
)
def test_what_is_not_there_is_said(run, stage, words):
    with pytest.raises(ConfigError, match=words):
        Output.of(run, stage)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        Output.of(tmp_path / "nowhere", "soar")
