"""What a training run leaves: its pipeline with a page, its curve, and uploads of both."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library it goes by

from tarflow_hf.flow.likelihood import DensityUnit
from tarflow_hf.hub.background_push import BackgroundPush
from tarflow_hf.hub.checkpoint_files import CONFIG, IMAGE_PROCESSOR, INDEX, SHIMS, check_replaceable
from tarflow_hf.hub.model_card import Result
from tarflow_hf.hub.page_files import read_page
from tarflow_hf.hub.push import push_folder
from tarflow_hf.images.latents import Autoencoder
from tarflow_hf.images.plotting import save_curve
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.pipeline_tarflow import TarFlowPipeline
from tarflow_hf.training.arguments import OutputArguments, TrainingArguments
from tarflow_hf.training.history import History
from tarflow_hf.training.log import MetricsFile
from tarflow_hf.training.run_card import held_out_result, write_page
from tarflow_hf.training.validation import failing_pictures_warn, make_pipeline

_WRITTEN = (
    *(INDEX, CONFIG, IMAGE_PROCESSOR, *SHIMS, "transformer/model.safetensors", "README.md", "recipe.yaml"),
    *("metrics.jsonl", "timing.jsonl", "history.jsonl", "run.lock", "checkpoints/step-00000001/checkpoint.json"),
)
NOT_PUSHED = 69
"""Exit status of a run that is finished but not on the Hub."""


class PushError(RuntimeError):
    """A run cannot be pushed to the Hub; its model is not touched by that."""


def check_folder(folder: Path) -> None:
    """Raises ValueError if a file that a run would write is there and is none of a run, or could not be written.

    What is of no run is not overwritten, and a run that is finished is not lost for a folder in the place of a file.

    Args:
        folder: Folder of the run.

    Example:
        >>> from pathlib import Path
        >>> _ = Path("README.md").write_text("my notes")
        >>> check_folder(Path("."))
        Traceback (most recent call last):
            ...
        ValueError: README.md is there already and of no run: move it away, or choose another output_dir
    """

    check_replaceable(folder, _WRITTEN)

    def foreign(name: str, *company: str) -> bool:
        file = folder / name
        return file.exists() and file.stat().st_size > 0 and not any((folder / other).exists() for other in company)

    for name, *company in (
        ("README.md", "recipe.yaml", "model_index.json"),
        ("metrics.jsonl", "history.jsonl", "checkpoints", "recipe.yaml"),
    ):
        if foreign(name, *company):
            raise ValueError(
                f"{folder / name} is there already and of no run: move it away, or choose another output_dir"
            )
    if (folder / "README.md").is_file():
        read_page(folder / "README.md")
    History(folder / "history.jsonl").changes()


def prepare_push(output: OutputArguments) -> None:
    """Makes the repository that a run is pushed to, or finds it writable, before anything is trained.

    Args:
        output: Its name, and whether it is private.

    Raises:
        PushError: If the Hub cannot be reached or refuses.

    Example:
        >>> from tarflow_hf.training.arguments import OutputArguments
        >>> prepare_push(OutputArguments(output_dir="runs/digits", push_to_hub=True, hub_model_id="not a name"))
        Traceback (most recent call last):
            ...
        tarflow_hf.training.results.PushError: push_to_hub: the repository not a name cannot be written to: ...
    """
    repo_id = output.repo_id
    try:
        api = HfApi()
        repo_id = api.create_repo(repo_id, private=output.hub_private or None, exist_ok=True).repo_id
        api.auth_check(repo_id, write=True)
    except (OSError, HTTPError, ValueError) as error:
        raise PushError(
            f"push_to_hub: the repository {repo_id} cannot be written to: {_first_line(error)}. Log in with "
            "`hf auth login`, or set push_to_hub to false and push afterwards; nothing was trained"
        ) from error


class Results:
    """What a run leaves in its folder and on the Hub. Only the main process writes.

    Args:
        arguments: The options of the run.
        metrics: What was measured on the way.
        num_eval_images: Held-out images; 0 if there are none.
        unit: In what the density of the flow is told.
        vae: The autoencoder of a run on latents.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.flow.likelihood import DensityUnit
        >>> from tarflow_hf.training.log import MetricsFile
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> shape = {"image_size": 8, "num_channels": 1, "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1}
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 10, "output_dir": "run", **shape})
        >>> metrics = MetricsFile(Path("run/metrics.jsonl"))
        >>> results = Results(arguments, metrics, num_eval_images=0, unit=DensityUnit(64))
        >>> results.write_pipeline(TarFlowModel(arguments.model.to_config(["cat", "dog"])).eval(), Path("run"))
        >>> TarFlowPipeline.from_pretrained("run").transformer.config.id2label
        {0: 'cat', 1: 'dog'}
    """

    def __init__(
        self,
        arguments: TrainingArguments,
        metrics: MetricsFile,
        *,
        num_eval_images: int,
        unit: DensityUnit,
        vae: Autoencoder | None = None,
    ) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output.output_dir)
        self.metrics = metrics
        self.num_eval_images = num_eval_images
        self.unit = unit
        self.vae = vae
        self.private = arguments.output.hub_private or None
        self.uploads = BackgroundPush(arguments.output.repo_id, private=self.private)

    def write_pipeline(self, model: TarFlowModel, folder: Path) -> None:
        """Writes the pipeline of a model into a folder, with a page that tells of this run."""
        pipe = self._pipeline(model)
        pipe.save_pretrained(folder)
        self._write_page(folder, pipe)

    def write_page(self, model: TarFlowModel) -> None:
        """Writes the page of the run anew, now that there are pictures to show."""
        self._write_page(self.folder, self._pipeline(model))

    def _write_page(self, folder: Path, pipe: TarFlowPipeline) -> None:
        write_page(folder, pipe, self.arguments, results=self._measured(), about_weights=self._changes())

    def _changes(self) -> dict[str, object]:
        """Options that were changed on the way, for the page."""
        changes = History(self.folder / "history.jsonl").changes()
        return {f"changed at {step}": text for step, text in changes.items()}

    def _pipeline(self, model: TarFlowModel) -> TarFlowPipeline:
        return make_pipeline(model, self.arguments.output, self.vae, self.arguments.model.image_size)

    def _measured(self) -> tuple[Result, ...]:
        found = self._curve("validation_bits_per_dim")[1]
        if not found or not self.num_eval_images:
            return ()
        source = "last line of `metrics.jsonl`"
        return (held_out_result(self.arguments, found[-1], self.num_eval_images, source=source),)

    def _curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of the bits per dimension, or of what a run on latents or arrays has in their place."""
        (name,) = self.unit.named({name: 0.0})
        return self.metrics.curve(name)

    def push_later(self, model: TarFlowModel, step: int) -> None:
        """Begins to upload the pipeline as it is now, unless an upload is under way."""
        self.uploads.start(lambda folder: self.write_pipeline(model, folder), f"Step {step}")

    def draw_curve(self) -> None:
        """Writes the bits per dimension over the run, of training and held-out images."""
        names = {"training": "bits_per_dim", "held out": "validation_bits_per_dim"}
        curves = {label: self._curve(name) for label, name in names.items()}
        path = self.folder / "curve.png"
        with failing_pictures_warn(path):
            save_curve(
                {label: curve for label, curve in curves.items() if curve[0]},
                path,
                ylabel=self.unit.text,
                title=self.folder.name,
                shown_share=0.95,
            )

    def push(self) -> str:
        """Uploads the folder of the run; the address of the commit.

        Raises:
            PushError: If that fails; the message says where the model lies and how to push it.
        """
        self.uploads.wait()
        repo_id = self.arguments.output.repo_id
        try:
            return str(push_folder(self.folder, repo_id, private=self.private).commit_url)
        except (OSError, HTTPError, ValueError) as error:
            private = f", private={self.private}" if self.private else ""
            command = f"from tarflow_hf import push_folder; push_folder({str(self.folder)!r}, {repo_id!r}{private})"
            raise PushError(
                f"the finished model lies in {self.folder}, but was not pushed to {repo_id}: {_first_line(error)}\n"
                f'Push it with: python -c "{command}"'
            ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


__all__ = ["NOT_PUSHED", "PushError", "Results", "check_folder", "prepare_push"]
