"""The classes of a data set in the numbering of a model, by their names."""

import torch

from tarflow_hf.configuration_tarflow import TarFlowConfig
from tarflow_hf.images.sources import NO_LABEL, ImageData


def label_numbering(data: ImageData, config: TarFlowConfig) -> torch.Tensor | None:
    """The model's class id of each class of a data set, by name, or None where one of them has no classes.

    A model whose classes are only numbered takes the data set's numbers.

    Args:
        data: The data set.
        config: The model's configuration.

    Returns:
        (number of the data set's classes,) int64.

    Raises:
        ValueError: If the model does not know a class of the data set.

    Example:
        >>> from tarflow_hf.images.arguments import DataArguments
        >>> from tarflow_hf.images.sources import load_image_data
        >>> digits = DataArguments(data="./examples/data/digits")
        >>> data, _ = load_image_data(digits, class_conditional=True)
        >>> names = dict(enumerate("9876543210"))
        >>> config = TarFlowConfig(image_size=8, hidden_size=64, num_classes=10, id2label=names)
        >>> label_numbering(data, config)
        tensor([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    """
    if config.num_classes == 0 or data.label_column is None:
        return None
    names = {str(name): int(index) for index, name in (config.id2label or {}).items()}
    numbered = set(names) == {f"LABEL_{index}" for index in range(config.num_classes)}
    if numbered and len(data.class_names) <= config.num_classes:
        return torch.arange(len(data.class_names))
    unknown = [name for name in data.class_names if name not in names]
    if unknown:
        raise ValueError(
            f"data set {data.name!r} has classes that the model does not know: {unknown[:5]}; "
            f"the model's are {list(names)[:5]}"
        )
    return torch.tensor([names[name] for name in data.class_names])


def renumber(class_labels: torch.Tensor, numbering: torch.Tensor) -> torch.Tensor:
    """Labels of the data set as labels of the model; -1 (none) stays.

    Args:
        class_labels: (batch,) labels of the data set, -1 for none.
        numbering: (classes,) the model's number of each, of [`label_numbering`].

    Example:
        >>> renumber(torch.tensor([0, 1, -1]), numbering=torch.tensor([5, 7]))
        tensor([ 5,  7, -1])
    """
    return torch.where(class_labels == NO_LABEL, class_labels, numbering[class_labels.clamp(min=0)])


__all__ = ["label_numbering", "renumber"]
