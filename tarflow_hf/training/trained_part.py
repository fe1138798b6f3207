"""What of a model is trained: all of it, what is not frozen, or low-rank adapters; and how fast each layer learns."""

import copy
import fnmatch
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from tarflow_hf.images.extras import installed_by
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.arguments import LoraArguments, StartArguments

_EMBEDDINGS = ("class_embedding", "condition_embedding", "noise_embedding", "proj_out")


def freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    """Takes parameters out of the training, by the pattern of their names (`*` stands for anything).

    Args:
        model: The model.
        patterns: For instance `blocks.0.*` or `*.layers.*`.

    Raises:
        ValueError: If a pattern matches no parameter, or nothing is left to train.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> freeze(model, ("bias",))
        >>> model.weight.requires_grad, model.bias.requires_grad
        (True, False)
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            some = ", ".join(list(parameters)[:3])
            raise ValueError(f"freeze: the pattern {pattern!r} matches no parameter; their names are like {some}")
        for name in matched:
            parameters[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"freeze={list(patterns)} leaves no parameter to train")


def add_lora(model: nn.Module, arguments: LoraArguments, *, trained: set[str]) -> None:
    """Puts low-rank adapters of PEFT beside linear layers and freezes everything else.

    y = W x + b becomes y = W x + b + (alpha / rank) B A x, with B = 0 at the start.

    Args:
        model: The model; it is changed.
        arguments: Rank, alpha and targets.
        trained: Names of further parameters that are trained, such as the vectors of new classes.

    Raises:
        ValueError: If a target is no linear layer of the model.

    Example:
        >>> from tarflow_hf.training.arguments import LoraArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1)
        >>> model = TarFlowModel(config)
        >>> add_lora(model, LoraArguments(rank=2, targets=("qkv_proj",)), trained=set())
        >>> [tuple(parameter.shape) for parameter in model.parameters() if parameter.requires_grad]
        [(2, 64), (192, 2)]
    """
    with installed_by("lora"):
        from peft import inject_adapter_in_model

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    unknown = [target for target in arguments.targets if target not in linear]
    if unknown:
        raise ValueError(f"lora.targets: {unknown} match no linear layer; there are {', '.join(sorted(linear))}")
    inject_adapter_in_model(_peft_config(arguments), model)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def _peft_config(arguments: LoraArguments, base: str | None = None) -> Any:  # noqa: ANN401  # peft is an extra
    from peft import LoraConfig

    return LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,  # type: ignore[arg-type]  # any number
        target_modules=list(arguments.targets),
        base_model_name_or_path=base,
    )


def _has_adapters(model: nn.Module) -> bool:
    """Whether low-rank adapters stand beside some layer of the model."""
    return any(hasattr(module, "lora_A") for module in model.modules())


def without_adapters(model: TarFlowModel) -> TarFlowModel:
    """A copy of a model with its low-rank adapters added to the weights: a plain model that computes the same.

    W + (alpha / rank) B A.

    Args:
        model: A model; one without adapters is returned as it is.

    Example:
        >>> from tarflow_hf.training.arguments import LoraArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1)
        >>> model, plain = TarFlowModel(config), TarFlowModel(config)
        >>> add_lora(model, LoraArguments(rank=2), trained=set())
        >>> without_adapters(model).state_dict().keys() == plain.state_dict().keys()
        True
    """
    if not _has_adapters(model):
        return model
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(plain.get_submodule(parent), child, module.get_base_layer())
    for module in plain.modules():  # what says that there are adapters
        vars(module).pop("peft_config", None)
        vars(module).pop("_hf_peft_config_loaded", None)
    return plain.requires_grad_(True)


def save_adapter(model: TarFlowModel, arguments: StartArguments, folder: Path) -> None:
    """Writes the low-rank adapters of a model by themselves, as PEFT reads them (`PeftModel.from_pretrained`).

    Args:
        model: A model with adapters.
        arguments: What it started from, and rank, alpha and targets.
        folder: Gets `adapter_config.json` and `adapter_model.safetensors`.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.arguments import LoraArguments, StartArguments
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=1, layers_per_block=1)
        >>> model, arguments = TarFlowModel(config), StartArguments(lora=LoraArguments(rank=2))
        >>> add_lora(model, arguments.lora, trained=set())
        >>> save_adapter(model, arguments, Path("adapter"))
        >>> sorted(path.name for path in Path("adapter").iterdir())
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    assert arguments.lora is not None
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        "base_model.model." + name.replace(".default.", "."): tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    base = arguments.init_from and (Path(arguments.init_from).name if Path(arguments.init_from).exists() else None)
    _peft_config(arguments.lora, base or arguments.init_from).save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def parameter_groups(model: nn.Module, layer_decay: float) -> list[dict[str, Any]]:
    """What the optimizer trains, in groups by the factor on their learning rate (`rate_factor`).

    In each block layer j of L has the factor layer_decay^(L - 1 - j), its input projection and positions
    layer_decay^L; the output projection and what embeds classes, conditions and noise levels have 1.

    Args:
        model: The model; frozen parameters are left out.
        layer_decay: In (0, 1]; 1 is one group.

    Example:
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=2)
        >>> sorted(group["rate_factor"] for group in parameter_groups(TarFlowModel(config), 0.5))
        [0.25, 0.5, 1.0]
    """
    groups: dict[float, list[nn.Parameter]] = {}
    depths = {f"blocks.{index}": len(block.layers) for index, block in enumerate(getattr(model, "blocks", []))}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parts = name.split(".")
        depth = depths.get(".".join(parts[:2]), 0)
        below = depth - 1 - int(parts[3]) if parts[2:3] == ["layers"] else depth
        factor = 1.0 if parts[2:3] and parts[2] in _EMBEDDINGS else layer_decay**below
        groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "rate_factor": factor} for factor, parameters in groups.items()]


__all__ = ["add_lora", "freeze", "parameter_groups", "save_adapter", "without_adapters"]
