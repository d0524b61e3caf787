"""The kinds of classes that a plugin can offer; host, reader, listing, templates and test kit all read this record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from corefit.types.objective import Objective
from corefit.types.observer import Observer
from corefit.types.optimizer import Optimizer
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler, Source


@frozen(kw_only=True)
class Kind:
    """One kind of class that a plugin can offer.

    key        the key of its offers in the host; the hook that offers them is corefit_<key>
    name       its name in messages, in the singular
    word       its name in `corefit new`, its templates and docs/plugins
    protocol   the protocol that an offered class implements, and the type of fields that hold an instance
    check      the call of corefit.testing that checks an instance; {cls} and {keys} are filled in
    reads      whether an instance may need media, metadata or files, which the test kit cannot provide
    default    the `use` of a table without one; "" where a table must have it
    """

    key: str
    name: str
    word: str
    protocol: type
    check: str
    reads: bool = False
    default: str = ""

    @property
    def hook(self) -> str:
        """The name of the hook that offers this kind."""
        return f"corefit_{self.key}"


KINDS: Mapping[str, Kind] = {
    kind.key: kind
    for kind in (
        Kind(
            key="objectives",
            name="objective",
            word="objective",
            protocol=Objective,
            check="check_objective({cls}({keys}))",
        ),
        Kind(
            key="backbones",
            name="backbone",
            word="backbone",
            protocol=Backbone,
            check="backbone = {cls}({keys}); backbone.load(torch.device('cpu'), torch.float32); "
            "check_backbone(backbone, prompts=['a red sky', 'a blue sea'])",
        ),
        Kind(key="samplers", name="sampler", word="sampler", protocol=Sampler, check="check_sampler({cls}({keys}))"),
        Kind(
            key="noise_weightings",
            name="noise weighting",
            word="noise",
            protocol=NoiseWeighting,
            check="check_noise({cls}({keys}))",
        ),
        Kind(
            key="rewards",
            name="reward",
            word="reward",
            protocol=Reward,
            check="check_reward({cls}({keys}), media=..., prompts=..., meta=...)",
            reads=True,
        ),
        Kind(
            key="sources",
            name="source",
            word="source",
            protocol=Source,
            check="check_source({cls}({keys}))",
            reads=True,
        ),
        Kind(
            key="observers",
            name="observer",
            word="observer",
            protocol=Observer,
            check="check_observer({cls}({keys}))",
            reads=True,
        ),
        Kind(
            key="optimizers",
            name="optimizer",
            word="optimizer",
            protocol=Optimizer,
            check="check_optimizer({cls}({keys}))",
            default="adamw",
        ),
    )
}
"""The kinds by their `key`, in the order in which `corefit plugins` lists them."""
BY_WORD: Mapping[str, Kind] = {kind.word: kind for kind in KINDS.values()}
"""The kinds by their `word`."""
BY_PROTOCOL: Mapping[Any, Kind] = {kind.protocol: kind for kind in KINDS.values()}
"""The kinds by their `protocol`."""
