"""From a folder of pictures to a pipeline file: `corefit new pipeline NAME --from-folder FOLDER`."""

from corefit.cli.starting.start import Started, Wanted, start

__all__ = ["Started", "Wanted", "start"]
