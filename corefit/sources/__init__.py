"""Where raw examples come from, and how their media are read."""

from corefit.sources.folder import ImageFolder
from corefit.sources.jsonl import Jsonl
from corefit.sources.media import View, dimensions, view
from corefit.sources.messages import listed
from corefit.sources.saved import HfDataset
from corefit.sources.text import Text, prompts
from corefit.sources.webdataset import WebDataset

__all__ = ["HfDataset", "ImageFolder", "Jsonl", "Text", "View", "WebDataset", "dimensions", "listed", "prompts", "view"]
