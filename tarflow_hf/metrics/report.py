"""Where measurements go: metrics.json, a parquet file with one row an image, and the model card's model-index."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from huggingface_hub import HfApi, ModelCard

from tarflow_hf.configuration_tarflow import read_json
from tarflow_hf.hub.model_card import Page, Result, merge, metadata
from tarflow_hf.metrics.atomic import replacing
from tarflow_hf.pipeline_tarflow import TarFlowPipeline


def read_metrics(path: Path) -> dict[str, dict[str, Any]]:
    """What was measured before, of a file that may be missing.

    Args:
        path: The file.

    Raises:
        OSError: If it holds something else; it is left as it is.

    Example:
        >>> from pathlib import Path
        >>> read_metrics(Path("metrics.json"))
        {}
    """
    return read_json(path, str(path)) if path.exists() else {}


def write_metrics(path: Path, measured: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Adds measurements to a JSON file; one that is measured again is replaced.

    Args:
        path: The file, made if missing.
        measured: By name: values and the settings they were measured with.

    Returns:
        All that the file now holds.

    Raises:
        ValueError: If a number is not finite; the file stays as it was.

    Example:
        >>> from pathlib import Path
        >>> _ = write_metrics(Path("metrics.json"), {"bits_per_dim": {"value": 3.2, "num_samples": 100}})
        >>> write_metrics(Path("metrics.json"), {"accuracy": {"value": 0.9}}).keys()
        dict_keys(['bits_per_dim', 'accuracy'])
    """
    metrics = {**read_metrics(path), **{name: dict(entry) for name, entry in measured.items()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    return metrics


def write_per_image(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """Writes a parquet file with one row an image.

    Args:
        path: The file.
        columns: By name, one value an image.

    Example:
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import pyarrow.parquet
        >>> write_per_image(Path("per_image.parquet"), {"bits_per_dim": np.array([3.1, 3.3])})
        >>> pyarrow.parquet.read_table("per_image.parquet").to_pydict()
        {'bits_per_dim': [3.1, 3.3]}
    """
    with replacing(path) as partial:
        pyarrow.parquet.write_table(pyarrow.table(dict(columns)), partial)


def update_card(model: str, pipe: TarFlowPipeline, results: tuple[Result, ...]) -> None:
    """Writes results into the `model-index` of a model's page; the text of the page stays.

    Args:
        model: Folder of the pipeline, whose README.md is changed, or its name on the Hub, where the page is uploaded.
        pipe: The pipeline.
        results: What was measured.

    Example:
        >>> from huggingface_hub import HfApi, ModelCard
        >>> from tarflow_hf.hub.model_card import Result
        >>> config = TarFlowConfig(image_size=8, num_channels=1, hidden_size=64, num_blocks=2, layers_per_block=1)
        >>> pipe = TarFlowPipeline(transformer=TarFlowModel(config).eval())
        >>> pipe.save_pretrained("digits")
        >>> result = Result("bits_per_dim", "bits per dimension", 3.2, "digits", "test", "one draw", "evaluate.py")
        >>> update_card("digits", pipe, (result,))
        >>> ModelCard.load("digits/README.md").data.eval_results[0].metric_value
        3.2
    """
    folder = Path(model)
    path = folder / "README.md"
    if folder.is_dir():
        existing = ModelCard(path.read_text(encoding="utf-8") if path.exists() else "---\n{}\n---\n")
    else:
        existing = ModelCard.load(model)
    new = ModelCard(str(existing))
    new.data = metadata(
        Page(
            repo_id=folder.resolve().name if folder.is_dir() else model,
            config=pipe.transformer.config,
            num_parameters=pipe.transformer.num_parameters(),
            results=results,
        )
    )
    card = merge(existing, new, update_text=False)
    if folder.is_dir():
        with replacing(path) as partial:
            card.save(partial)
    else:
        HfApi().upload_file(
            path_or_fileobj=str(card).encode(),
            path_in_repo=path.name,
            repo_id=model,
            commit_message="Add evaluation results",
        )


__all__ = ["read_metrics", "update_card", "write_metrics", "write_per_image"]
