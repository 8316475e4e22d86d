"""Stand-in for torchvision where that can't be imported: timm and lightly import it, but their models don't use it.

PyPI's torchvision is built beside PyPI's torch; beside the CPU build of torch its import fails ("operator
torchvision::nms does not exist"), and with it that of transformers. The Makefile therefore installs timm and lightly
without their dependencies.
"""

import enum
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

NAME = "torchvision"


class InterpolationMode(enum.Enum):
    """Members of which timm builds dictionaries."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Stub(ModuleType):
    """Module in which each name is an empty class, to derive from."""

    InterpolationMode = InterpolationMode
    __version__ = "0.0"

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(name, (), {"__module__": self.__name__})
        setattr(self, name, value)
        return value


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that finds torchvision and each module in it."""

    def find_spec(self, name, path=None, target=None):
        inside = name.partition(".")[0] == NAME
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if inside else None

    def create_module(self, spec):
        return Stub(spec.name)

    def exec_module(self, module):
        pass


def forget() -> None:
    """Remove torchvision and each module in it from sys.modules."""
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


@contextmanager
def torchvision() -> Iterator[None]:
    """Let imports inside the context find torchvision: the real one where it can be imported, else the stub."""
    try:
        importlib.import_module(NAME)
    except (ImportError, RuntimeError):
        forget()
    else:
        yield
        return
    finder = Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        forget()
