"""Out of memory: where, how much, which keys would help that are not set, and that nothing is lost."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
import torch
from attrs import evolve, frozen
from training import Heard

from corefit.errors import TrainingError
from corefit.system import memory, ranks
from corefit.train import checkpoint as state
from corefit.train import loop as train
from corefit.train import remedies
from corefit.types import Weighted
from corefit.types.objective import Sum
from corefit.types.stage import Full, Lora, Stage
from corefit_sft import Sft
from corefit_soar import Soar


def cuda() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ...")


def main() -> None:
    torch.empty(1 << 55, dtype=torch.uint8)


def python() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    ("fill", "asked"),
    [(cuda, "; 2.50 GiB more were asked for"), (main, f"; {1 << 55} bytes more were asked for"), (python, "")],
)
def test_the_error_names_place_size_and_remedies(fill, asked):
    with (
        pytest.raises(TrainingError) as error,
        memory.explain_exhaustion("evaluation", ["eval.batch = 8"], "All is kept"),
    ):
        fill()
    assert str(error.value) == f"evaluation: out of memory{asked}. What would help: eval.batch = 8. All is kept"


def test_where_every_key_is_set_other_remedies_are_proposed():
    with (
        pytest.raises(TrainingError, match="All keys that save memory are set"),
        memory.explain_exhaustion("encoding", []),
    ):
        python()


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), memory.explain_exhaustion("encoding", []):
        raise RuntimeError("shapes")


@frozen
class Saves:
    """A backbone that can compute activations again."""

    gradient_checkpointing: bool


def test_only_what_is_not_set_is_proposed():
    both = Sum(of=(Weighted("sft", Sft()), Weighted("soar", Soar(chunk=4))))
    stage = Stage(name="s", steps=1, objective=both, batch=8, micro_batch=4)
    assert remedies.step_helps(stage, Full(), Saves(False), 2, sharded=False) == [
        "stage.s.micro_batch = 2 (now 4)",
        "stage.s.objective.of.soar.chunk = 2 (now 4)",
        "backbone.gradient_checkpointing = true",
        'stage.s.optimizer.use = "adamw8bit"',
        "shard = true",
        'backbone.train = { use = "lora" }',
    ]
    quiet = evolve(stage, micro_batch=None)
    helps = remedies.step_helps(quiet, Full(), Saves(False), 2, sharded=False)
    assert not any("micro_batch" in each for each in helps), "the trainer finds one that fits"
    small = Stage(name="s", steps=1, objective=Soar(), batch=8, micro_batch=1)
    assert remedies.step_helps(small, Lora(), Saves(True), 2, sharded=True) == []
    assert remedies.step_helps(small, Lora(), None, 1, sharded=False) == ["shard = true on several devices"]


def test_a_stage_names_step_and_term_and_goes_on(job, monkeypatch):
    one = job(steps=2, checkpoint_every=1, micro_batch=2)
    real, calls = Sft.terms, []

    def terms(self, part, ctx):
        calls.append(part)
        if len(calls) == 6:
            cuda()
        yield from real(self, part, ctx)

    with monkeypatch.context() as patched:
        patched.setattr(Sft, "terms", terms)
        with pytest.raises(
            TrainingError, match=r"stage s, step 2, term 0: out of memory; 2.50 GiB.*micro_batch = 1 \("
        ):
            train.train(one, ranks.join("fp32"))
    found, damaged = state.latest(one.folder / "checkpoints")
    assert found is not None
    assert (found.step, damaged) == (1, [])
    again = job(steps=2, checkpoint_every=1, micro_batch=1)
    started = []
    heard = Heard(on_started=started.append)
    train.train(train.attrs.evolve(again, folder=one.folder, listener=heard), ranks.join("fp32"))
    assert started == [1]


@pytest.mark.parametrize("where", ["the experience", "the optimizer's step"])
def test_the_error_names_what_was_computed(job, monkeypatch, where):
    def full(*args):
        cuda()
        yield

    if where == "the experience":
        monkeypatch.setattr(train, "checked_parts", full)
    else:
        monkeypatch.setattr(train.Loop, "_apply_gradient", lambda *args: cuda())
    with pytest.raises(TrainingError, match=f"stage s, step 1, {where}: out of memory; 2.50 GiB"):
        train.train(job(), ranks.join("fp32"))


def test_an_import_is_not_searched_for_garbage_and_a_later_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    during: list[bool] = []

    def fails() -> None:
        with memory.uncollected("a_library"):
            during.append(gc.isenabled())
            raise ImportError

    with pytest.raises(ImportError):
        fails()
    assert during == [False]
    assert gc.isenabled()
    assert frozen == [False]
    monkeypatch.setitem(sys.modules, "a_library", memory)
    with memory.uncollected("a_library"):
        assert gc.isenabled()
    assert frozen == [False]


def test_a_collector_that_is_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gc, "isenabled", lambda: False)
    monkeypatch.setattr(gc, "enable", lambda: pytest.fail("it is on"))
    with memory.uncollected("a_library"):
        pass


FROZEN = """
from corefit.system import memory
class Cycle:
    def __init__(self): self.own = self
    def __del__(self): print("collected", flush=True)
with memory.uncollected("a_library"):
    Cycle()
memory.gc.collect()
print("not collected")
"""


def test_at_the_end_what_an_import_made_goes() -> None:
    """Else nanobind, by which triton binds its compiler, ends every run with pages about leaks."""
    done = subprocess.run([sys.executable, "-c", FROZEN], capture_output=True, text=True, check=True)
    assert done.stdout == "not collected\ncollected\n"
