"""The sources of raw examples, and how their media are decoded."""

from corefit.data.sources.folder import ImageFolder
from corefit.data.sources.jsonl import Jsonl
from corefit.data.sources.media import MEDIA, View, dimensions, view
from corefit.data.sources.messages import listed
from corefit.data.sources.parquet import Parquet
from corefit.data.sources.prompts import category, prompt_source
from corefit.data.sources.saved import HfDataset
from corefit.data.sources.text import Listed, Text
from corefit.data.sources.video import clip_shape, is_clip
from corefit.data.sources.webdataset import WebDataset

__all__ = [
    "MEDIA",
    "HfDataset",
    "ImageFolder",
    "Jsonl",
    "Listed",
    "Parquet",
    "Text",
    "View",
    "WebDataset",
    "category",
    "clip_shape",
    "dimensions",
    "is_clip",
    "listed",
    "prompt_source",
    "view",
]
