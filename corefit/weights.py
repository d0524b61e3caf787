"""Which weights train, and copies of them: the average (EMA) and the frozen reference policy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attrs import define

from corefit.errors import ConfigError
from corefit.stage import Full, Lora
from corefit.types import Backbone

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

Named = Mapping[str, "Parameter"]


def trainable(backbone: Backbone, mode: Full | Lora) -> Named:
    """Set up full or LoRA training of a loaded backbone; the parameters that train, by name, in float32.

    An adapter that is there already (of the stage before) trains on.
    """
    transformer = backbone.transformer
    if isinstance(mode, Full):
        transformer.requires_grad_(True)
    elif not getattr(transformer, "peft_config", None):
        transformer.requires_grad_(False)
        _adapt(transformer, mode, mode.targets or tuple(backbone.lora_targets))
    transformer.train()
    named = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    for parameter in named.values():
        parameter.data = parameter.data.float()
    return named


def _adapt(transformer: Any, mode: Lora, targets: tuple[str, ...]) -> None:
    from peft import LoraConfig

    try:
        transformer.add_adapter(
            LoraConfig(
                r=mode.rank,
                lora_alpha=mode.rank if mode.alpha is None else mode.alpha,  # pyright: ignore[reportArgumentType]
                init_lora_weights="gaussian",
                target_modules=list(targets),
            )
        )
    except ValueError as error:
        raise ConfigError(f"backbone.train.targets: {', '.join(targets)}: {error}") from error


def seeded_adapter(named: Named, seed: int) -> None:
    """Draw the adapter's random half again, keyed, so that every rank and every start has the same."""
    import torch

    from corefit.rng import generator

    for name, parameter in named.items():
        if ".lora_A." in name:
            draw = generator(seed, "lora", name).standard_normal(tuple(parameter.shape), "float32")
            parameter.data.copy_(torch.from_numpy(draw) / parameter.shape[0])


@define(eq=False)
class Ema:
    """An exponential moving average of the trained weights, in float32 beside them."""

    decay: float
    average: dict[str, Tensor]

    @staticmethod
    def of(named: Named, decay: float) -> Ema:
        return Ema(decay, {name: p.detach().clone() for name, p in named.items()})

    def update(self, named: Named) -> None:
        """average <- decay average + (1 - decay) weights, without a sync."""
        import torch

        new = [p.detach() for p in named.values()]
        old = list(self.average.values())
        torch._foreach_lerp_(old, new, 1 - self.decay)  # pyright: ignore[reportPrivateUsage]

    def swap(self, named: Named) -> None:
        """Exchange the model's weights and the averages. No graph may be alive."""
        for name, parameter in named.items():
            parameter.data, self.average[name] = self.average[name], parameter.data


def reference(backbone: Backbone, named: Named) -> Backbone:
    """The policy as it is now, frozen: the same network called with copies of the trained weights alone."""
    from torch import nn
    from torch.func import functional_call

    transformer = backbone.transformer
    start = {name: p.detach().clone() for name, p in named.items()}

    class Frozen(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return functional_call(transformer, start, args, kwargs)

    frozen = copy.copy(backbone)
    frozen.transformer = Frozen()
    return frozen
