"""The shipped data sets: one module each, and the one place that lists them.

Invariant: a module in this folder is a data set under its file's name; the command line, the help
texts, the built-in scorers and the tools all ask here, so a new set is one new file.

A set's module has `make_map_fn(split, …)`, which returns what turns (row of the source, index) into
a prompt row, or `generate(…)`, which returns the rows of both splits, where there is no source.
Their keyword arguments are options of `rlhf3d data prepare`. Besides:

* DATA_SOURCE: what its rows name; ALIASES: other names for rows with the same kind of answer
* SCORER: name of the built-in scorer of these rows (`rewards.scorers`)
* HUB: repository and configuration on the Hugging Face hub
* SPLITS: those it has; default train and test
* NOTES: what its user should know
* EXCLUDE: sets whose questions must not be in it

A user's own file needs `make_map_fn` alone; HUB, SPLITS and NOTES are read there too.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

DEFAULT_SPLITS = ("train", "test")


def names() -> tuple[str, ...]:
    """The names of all sets, sorted; imports none of them."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load(name: str) -> ModuleType:
    """The module of a set."""
    return importlib.import_module(f"{__name__}.{name}")


def scorers() -> dict[str, str]:
    """The built-in scorer of each data source."""
    scorer_of = {}
    for module in map(load, names()):
        for data_source in (module.DATA_SOURCE, *getattr(module, "ALIASES", ())):
            scorer_of[data_source] = module.SCORER
    return scorer_of
