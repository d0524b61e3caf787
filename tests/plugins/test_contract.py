"""A class that only looks like a protocol is told what it lacks, by name, before anything is built on it."""

from __future__ import annotations

import pytest
import torch
from attrs import define, frozen

import corefit
from corefit import Backbone, NoiseWeighting, Reward, Sampler, Source, Supervised, Term
from corefit.errors import PluginError
from corefit.plugins import KINDS, Host
from corefit.plugins.contract import declared, problems, term
from corefit.types.objective import USES


def lacks(cls, kind):
    return "; ".join(problems(cls, kind))


def test_every_kind_has_a_protocol():
    assert all(getattr(corefit, kind.protocol.__name__) is kind.protocol for kind in KINDS.values())


def test_what_is_installed_lacks_nothing():
    for kind, offers in Host().offers.items():
        for offer in offers.values():
            assert lacks(offer.cls, kind) == ""


@pytest.mark.parametrize(
    ("protocol", "kind", "said"),
    [
        (Reward, "rewards", "it has no score(media, prompts, meta)"),
        (Source, "sources", "it has no examples()"),
        (Sampler, "samplers", "it has no step(x, v, sigma, sigma_next)"),
        (NoiseWeighting, "noise_weightings", "it has no sample(n, shift, rng); it has no weight(sigma)"),
        (Supervised, "objectives", "it has no terms(part, ctx)"),
    ],
)
def test_members_that_a_subclass_must_write_are_named(protocol, kind, said):
    made = frozen(type("Bare", (protocol,), {}))
    assert lacks(made, kind) == said
    with pytest.raises(TypeError, match="abstract"):
        made()


@pytest.mark.parametrize("name", ["weight", "normalize"])
def test_keys_of_entries_are_not_keys_of_a_reward(name):
    """The reader would take them, and the reward never see them."""
    methods = {"score": lambda self, media, prompts, meta: media, "__annotations__": {name: float}, name: 1.0}
    assert lacks(frozen(type("Own", (Reward,), methods)), "rewards").startswith(
        f"its key {name!r} is one that every entry"
    )


def test_a_backbone_is_told_all_that_it_lacks():
    said = lacks(frozen(type("Bare", (Backbone,), {})), "backbones")
    for name in ("check()", "load(device, dtype)", "velocity(x, sigma, cond)", "save(folder)"):
        assert f"it has no {name}" in said


def test_attributes_that_a_backbone_neither_declares_nor_uses_are_named():
    class Silent(Backbone):
        transformer = None

        def place(self, device, dtype):
            self.empty = None

    said = lacks(frozen(Silent), "backbones").split("; ")
    assert "it has no lora_targets" in said
    assert not {"it has no transformer", "it has no empty"} & {*said}
    assert "lora_targets" not in lacks(
        define(type("Field", (Backbone,), {"__annotations__": {"lora_targets": list}})), "backbones"
    )


def test_a_class_that_looks_alike_needs_what_a_subclass_inherits():
    @frozen
    class Alike:
        stochastic: bool = True

        def step(self, x, v, sigma, sigma_next): ...

    assert lacks(Alike, "samplers") == "it has no log_prob(x_next, step)"


@pytest.mark.parametrize("slots", [True, False])
def test_fields_are_members(slots):
    @define(slots=slots)
    class Fields:
        stochastic: bool
        log_prob: object = None

        def step(self, *args, **rest): ...

    assert lacks(Fields, "samplers") == ""


def scores(self, media, prompts, meta, more=None): ...


@pytest.mark.parametrize(
    ("score", "fine"),
    [
        (scores, True),
        (staticmethod(lambda media, prompts, meta: None), True),
        (classmethod(scores), True),
        (torch.no_grad()(scores), True),
        (lambda self, *all: None, True),
        (lambda self, media: None, False),
        (lambda self, media, prompts, meta, more: None, False),
        (lambda: None, False),
        (3, False),
    ],
)
def test_methods_take_what_they_are_given(score, fine):
    assert (lacks(frozen(type("Takes", (), {"score": score})), "rewards") == "") == fine


def test_a_coroutine_is_no_method():
    """Its scores would be a promise that nobody awaits."""

    @frozen
    class Late(Reward):
        async def score(self, media, prompts, meta): ...

    assert (
        lacks(Late, "rewards")
        == "its score is a coroutine (async def), but corefit calls it without await; write a plain method"
    )


def test_an_offer_that_lacks_a_member_is_refused_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from attrs import frozen\nfrom corefit import hookimpl\n\n@frozen\nclass Dim:\n"
        "    def score(self, media): ...\n\n@hookimpl\ndef corefit_rewards():\n    return {'dim': Dim}\n"
    )
    with pytest.raises(
        PluginError, match=r"offers 'dim', Dim \(.*mine.py\), which is not a valid reward: its score does not"
    ):
        Host(plugins=[]).add_file(tmp_path / "mine.py")


@pytest.mark.parametrize(
    ("member", "value", "said"),
    [
        ("uses", None, "uses of Says"),
        ("uses", "media", "is 'media', not a set of names"),
        ("uses", {1}, "not a set of names"),
        ("num_terms", 0, "is 0, not a whole number from 1 to 1000000"),
        ("group_size", 10**12, "is 1000000000000, not a whole number from 1"),
        ("num_terms", 1.0, "is 1.0, not a whole number"),
        ("num_updates", None, "num_updates of Says"),
        ("group_size", 1j, "is 1j, not a whole number"),
        ("rows_per_graph", True, "is True, not a whole number"),
        ("chunks", {"chunk": 0}, "is {'chunk': 0}, not a mapping of keys to a whole number"),
        ("chunks", {"chunk": 4}, "has 'chunk' in `chunks`, which is no key of it that is marked ROUNDING and None"),
    ],
)
def test_what_an_objective_declares_is_of_its_type(member, value, said):
    made = frozen(type("Says", (Supervised,), {member: value, "terms": lambda self, part, ctx: None}))()
    with pytest.raises(PluginError, match=rf"{member} of Says .*test_contract.py|{said}") as error:
        declared(made, "objectives")
    assert said in str(error.value)


def using(*names):
    members = {"uses": frozenset(names), "terms": lambda self, part, ctx: None, "__module__": __name__}
    return frozen(type("Says", (Supervised,), members))()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("rewards", " (did you mean 'reward'?)"),
        ("refernce", " (did you mean 'reference'?)"),
        ("reward_gradients", " (did you mean 'reward_gradient'?)"),
        ("medium:rejected", " (did you mean 'media:rejected'?)"),
        ("meda:mask", " (did you mean 'media:mask'?)"),
        ("media:", " (did you mean 'media'?)"),
        ("optimizer", ""),
    ],
)
def test_a_name_that_no_objective_can_read_is_refused(name, hint):
    with pytest.raises(PluginError) as error:
        declared(using("media", name), "objectives")
    assert f"test_contract.py) has {name!r} in `uses`, which stands for nothing{hint}; it may hold media, " in str(
        error.value
    )


def test_names_of_further_media_are_the_datas_own():
    every = [name for name in USES if ":" not in name]
    declared(using(*every, "media:rejected", "media:depth map", "media:a:b"), "objectives")


TOTAL = torch.zeros((), requires_grad=True)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "term",
        3.0,
        Term(3.0, 1.0),
        Term(torch.zeros(2), 1.0),
        Term(torch.zeros((), dtype=torch.complex64), 1.0),
        Term(TOTAL, None),
        Term(TOTAL, "1"),
        Term(TOTAL, torch.ones(2)),
        Term(TOTAL, 1.0, None),
    ],
)
def test_a_term_is_a_sum_and_a_count(value):
    with pytest.raises(PluginError, match=r"a term of .*int is .*, not a corefit.Term"):
        term(value, 3)
    term(Term(TOTAL, 1, {"loss": TOTAL}), 3)
    term(Term(TOTAL, torch.ones(())), 3)


def test_a_term_without_a_gradient_is_named():
    with pytest.raises(PluginError, match="yields a term whose total has no gradient"):
        term(Term(TOTAL.detach(), 1), 3)


def test_a_metric_with_a_name_of_the_trainer_is_refused():
    with pytest.raises(PluginError, match=r"int logs 'step', a name that the trainer uses; give the metric another"):
        term(Term(TOTAL, 1.0, {"step": TOTAL}), 3)
