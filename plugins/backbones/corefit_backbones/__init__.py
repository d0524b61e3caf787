"""The backbones of corefit: how the model families of diffusers are loaded, called and saved."""

from corefit import Backbone, Offers, hookimpl
from corefit_backbones.chroma import Chroma
from corefit_backbones.flux import Flux
from corefit_backbones.sd3 import Sd3
from corefit_backbones.wan import Wan

FAMILIES = {"sd3": Sd3, "flux": Flux, "chroma": Chroma, "wan": Wan}


@hookimpl
def corefit_backbones() -> Offers[Backbone]:
    return FAMILIES
