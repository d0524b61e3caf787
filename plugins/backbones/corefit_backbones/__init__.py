"""Backbones of corefit: how the model families of diffusers are loaded, called and saved."""

from corefit import Backbone, Offers, hookimpl
from corefit_backbones.sd3 import Sd3


@hookimpl
def corefit_backbones() -> Offers[Backbone]:
    return {"sd3": Sd3}
