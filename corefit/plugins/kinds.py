"""The kinds of things that a plugin can offer: the one record that host, reader, listing, templates and kit read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import frozen

from corefit.types.objective import Objective
from corefit.types.protocols import Backbone, NoiseWeighting, Reward, Sampler, Source


@frozen(kw_only=True)
class Kind:
    """One kind of offer.

    key        what the host files offers under; the hook that offers them is corefit_<key>
    name       what messages call one of them
    word       what `corefit new`, its templates and the page in docs/plugins call it
    protocol   what an offered class implements, and the type of fields that hold one
    check      the call of corefit.testing that checks one; {cls} and {keys} are filled in
    reads      whether one may want media, metadata or files of its own, so that the kit cannot make one by itself
    """

    key: str
    name: str
    word: str
    protocol: type
    check: str
    reads: bool = False

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
    )
}
"""Kinds by key, in the order in which `corefit plugins` lists them."""
BY_WORD: Mapping[str, Kind] = {kind.word: kind for kind in KINDS.values()}
"""Kinds by what `corefit new` calls them."""
BY_PROTOCOL: Mapping[Any, Kind] = {kind.protocol: kind for kind in KINDS.values()}
"""Kinds by the type of the fields that hold one."""
