"""What a training run leaves: its pipeline with a page, its curve, and uploads of both."""

from pathlib import Path

from tarflow_hf.hub.background_push import BackgroundPush
from tarflow_hf.hub.push import push_folder
from tarflow_hf.images.plotting import save_curve
from tarflow_hf.modeling_tarflow import TarFlowModel
from tarflow_hf.training.arguments import TrainingArguments
from tarflow_hf.training.log import MetricsFile
from tarflow_hf.training.run_card import held_out_result, write_run
from tarflow_hf.training.validation import make_pipeline


class Results:
    """What a run leaves in its folder and on the Hub. Only the main process writes.

    Args:
        arguments: The options of the run.
        metrics: What was measured on the way.
        num_eval_images: Held-out images; 0 if there are none.

    Example:
        >>> from pathlib import Path
        >>> from tarflow_hf.training.log import MetricsFile
        >>> from tarflow_hf.training.recipes import make_arguments
        >>> shape = {"image_size": 8, "num_channels": 1, "hidden_size": 64, "num_blocks": 2, "layers_per_block": 1}
        >>> arguments = make_arguments({"data": "huggan/AFHQ", "max_steps": 10, "output_dir": "run", **shape})
        >>> results = Results(arguments, MetricsFile(Path("run/metrics.jsonl")), num_eval_images=0)
        >>> results.write_pipeline(TarFlowModel(arguments.model.to_config(["cat", "dog"])).eval(), Path("run"))
        >>> TarFlowPipeline.from_pretrained("run").transformer.config.id2label
        {0: 'cat', 1: 'dog'}
    """

    def __init__(self, arguments: TrainingArguments, metrics: MetricsFile, *, num_eval_images: int) -> None:
        self.arguments = arguments
        self.folder = Path(arguments.output.output_dir)
        self.metrics = metrics
        self.num_eval_images = num_eval_images
        self.private = arguments.output.hub_private or None
        self.uploads = BackgroundPush(arguments.output.repo_id, private=self.private)

    def write_pipeline(self, model: TarFlowModel, folder: Path) -> None:
        """Writes the pipeline of a model into a folder, with a page that tells of this run."""
        bits, results = self.metrics.curve("validation_bits_per_dim")[1], []
        if bits and self.num_eval_images:
            source = "last line of `metrics.jsonl`"
            results = [held_out_result(self.arguments, bits[-1], self.num_eval_images, source=source)]
        write_run(folder, make_pipeline(model, self.arguments.output), self.arguments, results=tuple(results))

    def push_later(self, model: TarFlowModel, step: int) -> None:
        """Begins to upload the pipeline as it is now, unless an upload is under way."""
        self.uploads.start(lambda folder: self.write_pipeline(model, folder), f"Step {step}")

    def draw_curve(self) -> None:
        """Writes the bits per dimension over the run, of training and held-out images."""
        names = {"training": "bits_per_dim", "held out": "validation_bits_per_dim"}
        curves = {label: self.metrics.curve(name) for label, name in names.items()}
        save_curve(
            {label: curve for label, curve in curves.items() if curve[0]},
            self.folder / "curve.png",
            ylabel="bits per dimension",
            title=self.folder.name,
            shown_share=0.95,
        )

    def push(self) -> str:
        """Uploads the folder of the run; the address of the commit."""
        self.uploads.wait()
        return str(push_folder(self.folder, self.arguments.output.repo_id, private=self.private).commit_url)


__all__ = ["Results"]
