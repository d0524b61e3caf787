"""The host finds plugins, and says of each that it refuses whose it is and what to do."""

from __future__ import annotations

import inspect
import re
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import attrs
import numpy as np
import pytest
from attrs import frozen

import corefit
from corefit import Observer, Sampler, hookimpl
from corefit.errors import PluginError, near
from corefit.plugins import KINDS, Host, hookspecs
from corefit.plugins.host import HOOKS
from corefit.plugins.listing import listing
from corefit.rollout.samplers import FlowSde, Ode

OURS = f"corefit {version('corefit')}"
OFFER = """
from attrs import frozen
from corefit import Sampler, hookimpl

@frozen
class Mine(Sampler):
    {field}

    def step(self, x, v, sigma, sigma_next): ...

@hookimpl
def corefit_samplers():
    return {{"{name}": Mine}}
"""


@frozen
class Toy(Sampler):
    noise: float = 0.5

    def step(self, x, v, sigma, sigma_next): ...


@frozen
class Other(Toy):
    pass


def offering(kind, offers):
    """A plugin object with one offer hook."""

    class Plugin:
        pass

    def offer(self):
        return offers() if callable(offers) else offers

    offer.__name__ = f"corefit_{kind}"
    setattr(Plugin, offer.__name__, hookimpl(offer))
    return Plugin()


def refused(*plugins):
    with pytest.raises(PluginError) as error:
        Host(plugins=plugins)
    return str(error.value)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Makes a distribution as pip would: a module, and metadata with an entry point."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def install(distribution: str, entry: str, source: str) -> None:
        module = f"{distribution.replace('-', '_')}_module"
        monkeypatch.delitem(sys.modules, module, raising=False)
        (site / f"{module}.py").write_text(source)
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[corefit]\n{entry} = {module}\n")
        monkeypatch.syspath_prepend(str(site))

    return install


@pytest.fixture
def file(tmp_path):
    """Writes a local plugin file and gives it to a host without others."""

    def add(source: str | bytes, name: str = "mine.py") -> Host:
        path = tmp_path / name
        path.write_bytes(source.encode() if isinstance(source, str) else source)
        host = Host(plugins=[])
        host.add_file(path)
        return host

    return add


# what is found


def test_finds_what_is_installed():
    host = Host()
    assert set(host.offers) == set(KINDS)
    assert host.get("samplers", "flow_sde") is FlowSde
    assert {"sft", "soar", "flow_grpo"} <= set(host.offers["objectives"])
    assert {"ode", "flow_sde", "dance_sde", "cps"} <= set(host.offers["samplers"])
    assert {"logit_normal", "mode", "uniform", "cosmap", "sigma_sqrt"} <= set(host.offers["noise_weightings"])
    assert {"jsonl", "imagefolder"} <= set(host.offers["sources"])
    assert "sd3" in host.offers["backbones"]


def test_a_distribution_of_somebody_else_is_found_in_the_same_way(install):
    install("corefit-outside", "outside", OFFER.format(field="noise: float = 1.0", name="outer"))
    host = Host()
    assert host.get("samplers", "outer").__module__ == "corefit_outside_module"
    assert host.offers["samplers"]["outer"].owner == "corefit-outside 1.2"
    assert host.owner_of("samplers", host.get("samplers", "outer")()) == "corefit-outside 1.2"


def test_names_and_owners_of_values():
    host = Host()
    assert (host.name_of("samplers", Ode()), host.owner_of("samplers", Ode())) == ("ode", OURS)
    assert (host.name_of("samplers", Toy()), host.owner_of("samplers", Toy())) == ("Toy", Toy.__module__)


def test_objects_take_the_place_of_installed_plugins():
    host = Host(plugins=[offering("samplers", {"toy": Toy}), offering("samplers", {"other": Other})])
    assert {name: offer.cls for name, offer in host.offers["samplers"].items()} == {"toy": Toy, "other": Other}
    assert not any(host.offers[kind] for kind in KINDS if kind != "samplers")


def test_a_module_is_an_object_too():
    assert "ode" in Host(plugins=[corefit.plugins.builtin]).offers["samplers"]


def test_what_ends_the_process_is_refused(install, file):
    install("corefit-ends", "ends", "import sys\nsys.exit(0)\n")
    with pytest.raises(PluginError, match=r"'ends' of corefit-ends 1.2 cannot be imported \(SystemExit: 0\)"):
        Host()
    ends = OFFER.format(field="pass", name="x").replace("return", "raise SystemExit(0)\n    return")
    with pytest.raises(PluginError, match=r"corefit_samplers\(\) failed \(SystemExit: 0\)"):
        file(ends)


def test_an_offer_of_no_text_is_refused():
    assert "offers the name 3, which is not a string" in refused(offering("samplers", {3: Toy}))


def test_a_name_that_nobody_offers():
    with pytest.raises(PluginError) as error:
        Host().get("samplers", "flow_sd")
    assert str(error.value) == (
        "no sampler is called 'flow_sd' (did you mean 'flow_sde'?); there are: cps, dance_sde, flow_sde, ode. "
        "Install the plugin that offers it, or name its file in `plugins = [...]`"
    )
    with pytest.raises(PluginError, match=r"no noise weighting is called 'x'; there are: none\."):
        Host(plugins=[]).get("noise_weightings", "x")


def test_near_misses():
    assert near("logit_nromal", ["uniform", "logit_normal"]) == " (did you mean 'logit_normal'?)"
    assert near("zzz", ["uniform"]) == ""


# what is refused


def test_a_name_offered_twice_names_both_owners(install):
    install("corefit-outside", "outside", OFFER.format(field="noise: float = 1.0", name="ode"))
    with pytest.raises(PluginError) as error:
        Host()
    assert str(error.value) == (
        f"sampler 'ode' is offered twice, by {OURS} and by corefit-outside 1.2; "
        "rename one, or set COREFIT_DISABLE=outside to run without it"
    )


def test_a_broken_import_names_the_distribution(install):
    install("corefit-broken", "broken", "import a_module_that_is_not_there")
    with pytest.raises(PluginError) as error:
        Host()
    assert str(error.value) == (
        "plugin 'broken' of corefit-broken 1.2 cannot be imported (ModuleNotFoundError: No module named "
        "'a_module_that_is_not_there'); reinstall or update corefit-broken, or set COREFIT_DISABLE=broken to run "
        "without it"
    )


def test_two_distributions_with_one_plugin_name(install):
    install("corefit-one", "same", "")
    install("corefit-two", "same", "")
    with pytest.raises(PluginError) as error:
        Host()
    said = str(error.value)
    assert said.startswith("two plugins are called 'same', of corefit-")
    assert "corefit-one 1.2" in said
    assert "corefit-two 1.2" in said
    assert "uninstall one of them" in said


def test_a_misspelled_hook_names_the_near_miss(install):
    install(
        "corefit-outside",
        "outside",
        OFFER.format(field="pass", name="x").replace("corefit_samplers", "corefit_sampler"),
    )
    with pytest.raises(PluginError) as error:
        Host()
    said = str(error.value)
    assert "plugin 'outside' of corefit-outside 1.2 implements 'corefit_sampler', which is not a hook" in said
    assert "did you mean 'corefit_samplers'?" in said
    assert "corefit_stage_finished" in said
    assert "COREFIT_DISABLE=outside" in said


def test_a_hook_that_is_not_marked():
    said = refused(SimpleNamespace(corefit_samplers=lambda: {"toy": Toy}))
    assert "corefit_samplers() is not marked as a hook; decorate it with @corefit.hookimpl" in said
    assert "leave it out of Host(plugins=[...])" in said


def test_an_argument_that_the_hook_does_not_have():
    class Plugin:
        @hookimpl
        def corefit_stage_started(self, stage, sate):
            pass

    said = refused(Plugin())
    assert "'sate'" in said
    assert "corefit_stage_started" in said
    assert "leave it out" in said


@pytest.mark.parametrize("offered", [lambda: None, Toy(), "toy", 3, corefit])
def test_an_offer_that_is_no_attrs_class(offered):
    said = refused(offering("samplers", {"toy": offered}))
    assert "corefit_samplers() offers 'toy', which is" in said
    assert "not an attrs class; decorate the class with @attrs.frozen" in said


@pytest.mark.parametrize("offers", [None, [Toy], Toy, "toy"])
def test_offers_that_are_no_mapping(offers):
    said = refused(offering("rewards", lambda: offers))
    assert f"corefit_rewards() returned {offers!r}, not a mapping of names to classes" in said


def test_an_offer_that_raises():
    def offers():
        raise RuntimeError("no licence file")

    said = refused(offering("rewards", offers))
    assert "corefit_rewards() failed (RuntimeError: no licence file); leave it out" in said


# COREFIT_DISABLE


def test_a_plugin_can_be_disabled(monkeypatch, install):
    install("corefit-broken", "broken", "raise OSError('no driver')")
    monkeypatch.setenv("COREFIT_DISABLE", "broken, soar")
    host = Host()
    assert "soar" not in host.offers["objectives"]
    assert "sft" in host.offers["objectives"]


def test_disabling_what_is_not_there(monkeypatch):
    monkeypatch.setenv("COREFIT_DISABLE", "soaar")
    with pytest.raises(PluginError) as error:
        Host()
    assert "COREFIT_DISABLE names 'soaar', but no installed plugin has that name (did you mean 'soar'?)" in str(
        error.value
    )
    assert "there are: " in str(error.value)
    assert "flow_grpo" in str(error.value)


def test_nothing_is_disabled_by_an_empty_variable(monkeypatch):
    monkeypatch.setenv("COREFIT_DISABLE", " , ")
    assert "soar" in Host().offers["objectives"]


# local files


def test_a_local_file(file, tmp_path):
    host = file(OFFER.format(field="noise: float = 1.0", name="mine"))
    assert host.get("samplers", "mine")().noise == 1.0
    assert host.offers["samplers"]["mine"].owner == str(tmp_path / "mine.py")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.py"], "no __pycache__ beside a user's file"
    host.add_file(tmp_path / "mine.py")
    assert host.files == [tmp_path / "mine.py"]


def test_files_of_one_name_do_not_meet(tmp_path):
    host = Host(plugins=[])
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(OFFER.format(field=f"{name}: int = 1", name=name))
        host.add_file(tmp_path / name / "mine.py")
    assert (host.get("samplers", "a")().a, host.get("samplers", "b")().b) == (1, 1)


def test_annotations_of_a_local_file_are_resolved(file):
    from corefit.pipeline.reader import Reader

    source = "from __future__ import annotations\n" + OFFER.format(field="noise: float", name="mine")
    host = file(source)
    assert Reader(host, Path()).read({"noise": 1}, host.get("samplers", "mine")).noise == 1.0


@pytest.mark.parametrize("path", ["none.py", "folder"])
def test_a_local_file_that_is_not_there(tmp_path, path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(PluginError) as error:
        Host(plugins=[]).add_file(tmp_path / path)
    assert str(error.value) == f"plugins: there is no file {tmp_path / path}; paths are relative to the pipeline file"


@pytest.mark.parametrize(
    ("source", "line", "what"),
    [
        ("x = 1\ndef f(:\n", 2, "SyntaxError"),
        ("x = 1\n\nimport a_module_that_is_not_there\n", 3, "ModuleNotFoundError"),
        ("def f():\n    raise KeyError('x')\n\nf()\n", 2, "KeyError"),
        (b"x = 1\ny = '\xff'\n", 2, "SyntaxError"),
    ],
)
def test_a_local_file_that_does_not_run_names_the_line(file, tmp_path, source, line, what):
    modules = set(sys.modules)
    with pytest.raises(PluginError) as error:
        file(source)
    said = str(error.value)
    assert f"plugin file {tmp_path / 'mine.py'}:{line} cannot be run ({what}: " in said
    assert "fix it, or remove it from `plugins`" in said
    assert not any(name.startswith("corefit_local") for name in set(sys.modules) - modules)


def test_a_local_file_that_exits_is_refused(file):
    with pytest.raises(PluginError, match=r"cannot be run \(SystemExit"):
        file("import sys\nsys.exit(0)\n")


def test_a_local_file_with_a_misspelled_hook_says_what_to_remove(file):
    with pytest.raises(PluginError, match=r"(?s)did you mean 'corefit_samplers'.*remove it from `plugins`"):
        file(OFFER.format(field="pass", name="x").replace("corefit_samplers", "corefit_smplers"))


# observers


def test_observers_get_what_their_hook_declares():
    seen = []

    class Watcher:
        @hookimpl
        def corefit_stage_started(self, stage, state):
            seen.append(("started", stage, state))

        @hookimpl
        def corefit_step_finished(self, metrics):
            seen.append(("step", metrics))

        @hookimpl
        def corefit_checkpoint_saved(self, state, path):
            seen.append(("saved", state, path))

        @hookimpl
        def corefit_stage_finished(self, state, stage):
            seen.append(("finished", stage, state))

    hook = Host(plugins=[Watcher()]).hook
    hook.corefit_stage_started(stage="soar", state=0)
    hook.corefit_step_finished(stage="soar", state=1, metrics={"loss": 1.0})
    hook.corefit_checkpoint_saved(stage="soar", state=2, path=Path("x"))
    hook.corefit_stage_finished(stage="soar", state=3)
    assert seen == [
        ("started", "soar", 0),
        ("step", {"loss": 1.0}),
        ("saved", 2, Path("x")),
        ("finished", "soar", 3),
    ]


def adding(**metrics):
    """A plugin that adds metrics to a step."""

    class Adder:
        @hookimpl
        def corefit_step_metrics(self, stage, metrics):
            return {name: made(metrics) if callable(made) else made for name, made in added.items()}

    added = metrics
    return Adder()


class Numbered:
    """Adds a metric without a name."""

    @hookimpl
    def corefit_step_metrics(self):
        return {3: 1.0}


def test_observers_add_metrics():
    host = Host(plugins=[adding(double=lambda metrics: 2 * metrics["loss"]), adding(other=1)])
    assert host.step_metrics("soar", 0, {"loss": 3.0}) == {"loss": 3.0, "double": 6.0, "other": 1.0}
    assert Host(plugins=[]).step_metrics("soar", 0, {"loss": 3.0}) == {"loss": 3.0}
    (half,) = Host(plugins=[adding(half=np.float32(0.5))]).step_metrics("soar", 0, {}).values()
    assert type(half) is float, "as metrics.jsonl writes it"


@pytest.mark.parametrize(
    ("plugins", "problem"),
    [
        (
            [adding(loss=1.0)],
            r"corefit_step_metrics\(\) of .*Adder.* adds .* 'loss', which the stage logs already",
        ),
        ([adding(x=1.0), adding(x=2.0)], r"adds the metric 'x', which the object .*Adder.* logs already"),
        ([adding(step=1.0)], r"adds the metric 'step', which the stage logs already"),
        ([adding(x="high")], r"returned \{'x': 'high'\}, not a mapping of names to numbers"),
        ([adding(x=True)], "not a mapping of names to numbers"),
        ([adding(x=10**400)], "not a mapping of names to numbers"),
        ([Numbered()], "not a mapping of names to numbers"),
    ],
)
def test_metrics_that_cannot_be_added_are_refused(plugins, problem):
    with pytest.raises(PluginError, match=problem):
        Host(plugins=plugins).step_metrics("soar", 0, {"loss": 3.0})


def test_every_hook_is_known_and_offers_have_a_kind():
    offers = {f"corefit_{kind}" for kind in KINDS}
    stage = {"stage_started", "step_metrics", "step_finished", "checkpoint_saved", "stage_finished"}
    assert set(HOOKS) == offers | {f"corefit_{name}" for name in {*stage, "run_started", "scored", "run_finished"}}
    told = {name for name in vars(Observer) if not name.startswith("_")} - {"optional", "check"}
    assert {f"corefit_{name}" for name in {*told, "step_metrics"}} == set(HOOKS) - offers
    for name in told:
        arguments = [*inspect.signature(getattr(Observer, name)).parameters][1:]
        assert arguments == [*inspect.signature(getattr(hookspecs, f"corefit_{name}")).parameters]


# the list of all offers


def test_listing_shows_owner_keys_types_and_defaults():
    text = listing(Host())
    for offer in [offer for offers in Host().offers.values() for offer in offers.values()]:
        attrs.resolve_types(offer.cls)
    assert listing(Host()) == text, "also after a pipeline was read"
    assert f"  cps  ({OURS})  Coefficient-preserving" in text
    assert "      noise: float = 0.7\n" in text
    assert "      density: Literal['gaussian', 'published'] = 'gaussian'\n" in text
    assert "      path: ModelPath, required\n" in text
    assert "      batch_size" not in text
    assert "  sharpness  (corefit " in text


def test_listing_of_computed_and_made_defaults():
    @attrs.define
    class Made(Ode):
        """A title.

        More.
        """

        n: int = 1
        twice: int = attrs.Factory(lambda self: 2 * self.n, takes_self=True)
        names: list[str] = attrs.Factory(list)
        flag: bool = True
        none: int | None = None
        hidden: int = attrs.field(init=False, default=3)

    text = listing(Host(plugins=[offering("samplers", {"made": Made})]))
    assert "A title.\n" in text
    for line in ("n: int = 1", "twice: int, computed", "names: list[str] = []", "flag: bool = true"):
        assert f"      {line}\n" in text
    assert "hidden" not in text


def test_listing_shows_whole_types_of_annotations_that_are_not_text(file):
    host = file(OFFER.format(field="a: list[str] = []; b: int = 1; c: tuple[int, int] | None = None", name="mine"))
    text = listing(host)
    for line in ("a: list[str] = []", "b: int = 1", "c: tuple[int, int] | None"):
        assert f"      {line}\n" in text


# the API


def test_public_names_do_not_go():
    """A name that goes is a new major version of API_VERSION, and a line in the changelog."""
    import corefit
    import corefit.testing

    assert corefit.API_VERSION == "1.0"
    assert {
        "API_VERSION",
        "Backbone",
        "Batch",
        "Condition",
        "Context",
        "Example",
        "NoiseWeighting",
        "Objective",
        "Offers",
        "Reward",
        "Sampler",
        "Source",
        "Step",
        "Supervised",
        "Term",
        "hookimpl",
    } <= set(corefit.__all__)
    assert {"check_objective", "check_sampler", "check_backbone", "ToyBackbone", "toy_batch", "toy_context"} <= set(
        corefit.testing.__all__
    )
    assert set(HOOKS) >= {
        "corefit_backbones",
        "corefit_samplers",
        "corefit_noise_weightings",
        "corefit_objectives",
        "corefit_rewards",
        "corefit_sources",
        "corefit_stage_started",
        "corefit_step_metrics",
        "corefit_step_finished",
        "corefit_checkpoint_saved",
        "corefit_stage_finished",
        "corefit_observers",
        "corefit_run_started",
        "corefit_scored",
        "corefit_run_finished",
    }


@pytest.mark.parametrize(("version", "refused"), [("2.0", True), ("0", True), ("1", False), ("1.7", False)])
def test_a_plugin_for_another_api_is_refused_by_name(version, refused):
    plugin = ModuleType("mine")
    plugin.COREFIT_API = version
    if not refused:
        Host(plugins=[plugin])
        return
    with pytest.raises(PluginError, match=rf"plugin 'mine.* is written for version {version} of corefit's API"):
        Host(plugins=[plugin])


def test_trace_says_what_is_called_and_whose_it_is():
    said: list[str] = []
    Host(trace=said.append)
    assert any(re.fullmatch(r"corefit_objectives\(\) of sft \(corefit \S+\) -> \{sft: Sft\}", line) for line in said)


def test_trace_tells_of_observers_too():
    said: list[str] = []

    class Watcher:
        @hookimpl
        def corefit_step_finished(self, stage, state, metrics):
            pass

        @hookimpl
        def corefit_step_metrics(self, state):
            return {"twice": 2.0 * state.step}

    host = Host(plugins=[Watcher()], trace=said.append)
    stage, state = SimpleNamespace(name="soar"), SimpleNamespace(step=3)
    metrics = host.step_metrics(stage, state, {"loss": 0.5})
    host.hook.corefit_step_finished(stage=stage, state=state, metrics=metrics)
    host.hook.corefit_stage_finished(stage=stage, state=state)
    added, finished, nobody = said
    assert re.fullmatch(
        r"corefit_step_metrics\(state=step 3\) of Watcher.* \(the object 'Watcher'\) -> {'twice': 6.0}", added
    )
    told = "stage=soar, state=step 3, metrics={'loss': 0.5, 'twice': 6.0}"
    assert re.fullmatch(rf"corefit_step_finished\({re.escape(told)}\) of Watcher.* \(the object 'Watcher'\)", finished)
    assert nobody == "corefit_stage_finished(stage=soar, state=step 3) of nobody"
