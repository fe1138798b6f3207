"""Makes AutoConfig and AutoModel know our model types, without importing them before anyone else does.

transformers' Auto classes and PreTrainedModel take seconds to import. Registering is therefore put off until the
modules that hold the registries are imported, by whoever needs them; if they already are, it happens at once. A
model itself is registered by a stand-in, which its own module replaces with the real class when it is imported:
transformers imports its registry while its own modelling modules are half loaded, too early to import ours.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

Load = Callable[[str], object]


class _StandIn(type):
    """The type of a class whose methods are those of the model of its name, which is loaded when one is looked up."""

    load: Callable[[str], object]

    def __getattr__(cls, name: str) -> object:
        return getattr(cls.load(cls.__name__), name)


def _models() -> list[tuple[Any, str]]:
    """The configurations of our models, and what the models are called."""
    from tarflow_hf.configuration_tarflow import TarFlowConfig
    from tarflow_hf.flow.inverse.configuration import TarFlowInverseConfig

    return [(TarFlowConfig, "TarFlowModel"), (TarFlowInverseConfig, "TarFlowInverseModel")]


def _register_config(module: ModuleType, load: Load) -> None:
    for config, _ in _models():
        module.AutoConfig.register(config.model_type, config, exist_ok=True)


def _register_model(module: ModuleType, load: Load) -> None:
    for config, name in _models():
        stand_in = _StandIn(name, (), {"config_class": config, "load": staticmethod(load)})
        module.AutoModel.register(config, stand_in, exist_ok=True)


def _register_image_processor(module: ModuleType, load: Load) -> None:
    from tarflow_hf.configuration_tarflow import TarFlowConfig

    classes = {"pil": load("TarFlowImageProcessor")}
    module.AutoImageProcessor.register(TarFlowConfig, image_processor_classes=classes, exist_ok=True)


_REGISTRIES: dict[str, Callable[[ModuleType, Load], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
    "transformers.models.auto.image_processing_auto": _register_image_processor,
}


class _LoaderThenRegister(importlib.abc.Loader):
    """Runs a module as its own loader does and registers with it afterwards."""

    def __init__(self, loader: importlib.abc.Loader, register: Callable[[ModuleType], None]) -> None:
        self.loader = loader
        self.register = register

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.register(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Finds the registries' modules as usual and wraps their loaders."""

    def __init__(self, load: Load) -> None:
        self.load = load

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REGISTRIES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        register = _REGISTRIES[fullname]
        if spec is not None and spec.loader is not None:
            spec.loader = _LoaderThenRegister(spec.loader, lambda module: register(module, self.load))
        return spec


def register_when_imported(load: Load) -> None:
    """Registers the TarFlow classes with the Auto classes now or as soon as those are imported.

    Args:
        load: Gives a public name of the package, importing what it needs.
    """
    for name, register in _REGISTRIES.items():
        if name in sys.modules:
            register(sys.modules[name], load)
    if not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder(load))


__all__ = ["register_when_imported"]
