"""transformers without the price of torch: where torch is installed and nobody has imported it, it stays that way.

transformers imports torch, and its own base class of models, wherever torch is installed, also for those who want a
configuration, a processor, or Keras alone. `torch_left_for_later` shows to what is imported within it a module `torch`
that is empty yet. Whoever imports torch afterwards, or needs an attribute of that module first, has torch executed in
this very module, by Python's own machinery with its locks and errors: there is one torch in the process, the real one.

Correctness does not depend on what transformers imports: what it uses at once is imported at once, and takes its time.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from threading import Lock, get_ident
from types import ModuleType

_lock = Lock()


@contextmanager
def torch_left_for_later() -> Iterator[None]:
    """Within, importing torch does not execute it, unless something of it is used.

    Where torch is imported already, or not installed, nothing changes.
    """
    if "torch" in sys.modules or (spec := find_spec("torch")) is None:
        yield
        return
    _torch.__spec__ = spec  # asked for by who wants to know whether torch is installed
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    stand_ins = [_torch, *_parts_of_transformers()]
    for module in stand_ins:
        sys.modules.setdefault(module.__name__, module)
    _finder.is_held = True
    try:
        yield
    finally:
        for module in stand_ins:
            _withdraw(module)
        _finder.is_held = False
        _finder.leave()


class _StandIn(ModuleType):
    """A module that is imported when an attribute is asked of it that it does not have."""

    def __getattr__(self, name):
        if name.startswith("__"):  # the statement `import` asks for some of these
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        _withdraw(self)
        return getattr(importlib.import_module(self.__name__), name)


class _Torch(_StandIn):
    """torch until it is executed, in this object, which is an ordinary module from then on."""

    executing_thread = None

    def __getattr__(self, name):
        if _Torch.executing_thread == get_ident():
            raise AttributeError(f"module 'torch' has no attribute {name!r}")
        _withdraw(self)
        torch = importlib.import_module("torch")
        return ModuleType.__getattribute__(self, name) if torch is self else getattr(torch, name)


def _withdraw(module: _StandIn) -> None:
    """Take a stand-in out of `sys.modules`, if it is there and is one still, so that an import is one of the module."""
    with _lock:
        is_executed = isinstance(module, _Torch) and _Torch.executing_thread is not None
        if isinstance(module, _StandIn) and not is_executed and sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]


class _TorchLoader(Loader):
    """Executes torch in `_torch`; of a torch that cannot be imported nothing is left there."""

    def __init__(self, loader: Loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        with _lock:
            _Torch.executing_thread = get_ident()
        return _torch

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        before = dict(vars(module))
        try:
            self._loader.exec_module(module)
            module.__class__ = ModuleType
            _finder.leave()
        except BaseException:
            vars(module).clear()
            vars(module).update(before)
            raise
        finally:
            _Torch.executing_thread = None


class _ImportedLoader(Loader):
    """Gives a module that is imported already."""

    def __init__(self, module: ModuleType):
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec


class _Finder:
    """The first of Python's finders until torch is executed: it finds torch as the others do, with its own loader."""

    is_held = False

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name == "torch" and target is None:
            found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
            spec = next((spec for spec in found if spec is not None), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _TorchLoader(spec.loader)
            return spec
        if name.startswith("torch.") and target is None and name in sys.modules:
            # `import torch.nn` looked for the path of torch, which executed it, which imported torch.nn. Python does
            # not look again, and would execute it twice.
            return ModuleSpec(name, _ImportedLoader(sys.modules[name]))
        return None

    def leave(self) -> None:
        """Let Python do without as soon as torch is executed and nothing is imported within `torch_left_for_later`."""
        if type(_torch) is ModuleType and not self.is_held:
            with suppress(ValueError):  # where someone else has changed the list
                sys.meta_path.remove(self)


_torch = _Torch("torch")
_finder = _Finder()


class _LaterActivations(Mapping):
    """`ACT2FN` of transformers, which are modules of torch."""

    def _activations(self):
        return importlib.import_module("transformers.activations").ACT2FN

    def __getitem__(self, name):
        return self._activations()[name]

    def __iter__(self):
        return iter(self._activations())

    def __len__(self):
        return len(self._activations())


class _IsAudioTokenizer(type):
    """Makes `isinstance` and `issubclass` ask the class of transformers that a stand-in stands for."""

    def __instancecheck__(cls, instance):
        return isinstance(instance, _audio_tokenizer_class())

    def __subclasscheck__(cls, subclass):
        return issubclass(subclass, _audio_tokenizer_class())


class _LaterAudioTokenizer(metaclass=_IsAudioTokenizer):
    """`PreTrainedAudioTokenizerBase` of transformers, a model in torch, which processors ask for as a type."""


def _audio_tokenizer_class() -> type:
    return importlib.import_module("transformers.modeling_utils").PreTrainedAudioTokenizerBase


def _parts_of_transformers() -> list[_StandIn]:
    """What transformers' processors import besides torch itself, to name it: the activations, and a class of models."""
    activations, models = _StandIn("transformers.activations"), _StandIn("transformers.modeling_utils")
    activations.ACT2FN = _LaterActivations()
    models.PreTrainedAudioTokenizerBase = _LaterAudioTokenizer
    return [activations, models]
