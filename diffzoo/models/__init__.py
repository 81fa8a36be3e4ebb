"""The networks. Importing a family registers its sizes."""

from diffzoo.models import adm, dimr, dit, edm2, pixnerd, simple_unet, simple_uvit, simpler_uvit, uvit_bao
from diffzoo.models.base import Config, Level, LevelConfig, Network
from diffzoo.models.registry import build, entry, is_model, list_models, register_model

__all__ = [
    "Config",
    "Level",
    "LevelConfig",
    "Network",
    "adm",
    "build",
    "dimr",
    "dit",
    "edm2",
    "entry",
    "is_model",
    "list_models",
    "pixnerd",
    "register_model",
    "simple_unet",
    "simple_uvit",
    "simpler_uvit",
    "uvit_bao",
]
