"""What `import engram_lm` does for transformers: its Auto classes know a config.json of ours.

Entries in transformers' table of configurations, made when that table is, whichever of the two
packages is imported first. Importing the models at once would be simpler, but it takes 5 seconds
that `engram rows` and memories under other people's models need not wait; transformers has no entry
points. An entry is a stand-in that imports the models, and so registers the real classes, when a
model is opened.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import Any

CONFIGURATIONS = {"engram_lm": "EngramLMConfig", "engram_attached": "AttachedConfig"}
"""model_type -> class in engram_lm.model."""
PACK = "engram_pack"
"""model_type of a memory that was saved apart from its model."""
_TABLE = "transformers.models.auto.configuration_auto"


def announce() -> None:
    """Adds the entries now if transformers has its table already, or else when it makes it."""
    if _TABLE in sys.modules:
        _register(sys.modules[_TABLE])
    else:
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Waits for one import, adds the entries after it, and is gone."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            _register(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _StandIn:
    """A configuration's class, imported when something is first asked of it.

    It must not be imported as the table is made: transformers may be half imported at that time.
    """

    def __init__(self, kind: str) -> None:
        self.__dict__["_kind"] = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(import_module("engram_lm.model"), self._kind), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(import_module("engram_lm.model"), self._kind)(*args, **kwargs)


def _register(table: Any) -> None:
    for model_type, kind in CONFIGURATIONS.items():
        if model_type not in table.CONFIG_MAPPING:
            table.CONFIG_MAPPING.register(model_type, _StandIn(kind))
