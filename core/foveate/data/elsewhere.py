"""Recipes whose data are not here: everything else of them can still be read."""

from __future__ import annotations

from dataclasses import replace

from pydantic import ConfigDict

from foveate import options as _options
from foveate.errors import DataError
from foveate.plugins import Plugins, Registration


def elsewhere(plugins: Plugins) -> Plugins:
    """`plugins` for which every data set, whatever its type and options, is one that is not here."""
    return replace(plugins, names={**plugins.names, "datasets": _Anything()})


class _Elsewhere:
    """Stands for a data set whose files or plugin are not here; only opening it is an error."""

    class Options(_options.Options):
        """Whatever the recipe says."""

        model_config = ConfigDict(extra="allow")

    def __init__(self, options: Options) -> None:
        raise DataError(f"these data are not here: {options.model_dump(mode='json')}")


class _Anything(dict[str, Registration]):
    """Every name as a data set that is elsewhere."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Registration:
        return Registration("datasets", name, _Elsewhere, "foveate")

