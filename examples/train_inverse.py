"""Trains a learned inverse of a flow, which gives its images in one pass, and saves it beside the flow.

    accelerate launch examples/train_inverse.py                        # of the quickstart's runs/digits
    accelerate launch examples/train_inverse.py recipe.yaml --flow user/model --output_dir runs/fast
    python examples/train_inverse.py --help                            # every option

The folder of a run holds the whole pipeline, flow and inverse (`TarFlowPipeline.from_pretrained(folder)`),
decoders.png with the same latents decoded exactly, in one pass and refined, metrics.jsonl and checkpoints/. The same
command started again goes on from the last checkpoint.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from tarflow_hf.training.option_groups import parse_groups

DEFAULT_RECIPE = Path(__file__).parent / "recipes" / "digits_inverse.yaml"


def main(argv: Sequence[str]) -> int:
    """Trains as the command line says; the exit status, 0 if finished, 143 if stopped early with a checkpoint."""
    import torch

    from tarflow_hf.hub.bars import no_bars_off_a_terminal
    from tarflow_hf.images.sources import load_image_data
    from tarflow_hf.metrics.features import load_feature_extractor
    from tarflow_hf.training.export import load_pipeline
    from tarflow_hf.training.inverse import GROUPS, InverseRun
    from tarflow_hf.training.inverse_arguments import check_options
    from tarflow_hf.training.launchers import first_on_each_machine, make_accelerator
    from tarflow_hf.training.lock import one_writer
    from tarflow_hf.training.results import check_folder
    from tarflow_hf.training.stopping import STOPPED

    data, settings, options = parse_groups(
        argv, GROUPS, description="Trains a learned inverse of a flow.", default_recipe=str(DEFAULT_RECIPE)
    )
    check_options(data, settings)
    features = None if options.perceptual is None else load_feature_extractor(options.perceptual)
    no_bars_off_a_terminal()
    folder = Path(options.output_dir)
    check_folder(folder)
    accelerator = make_accelerator(settings, trackers=(), folder=folder)
    with one_writer(folder, accelerator):
        with first_on_each_machine(accelerator):
            pipe = load_pipeline(options.flow, dtype=torch.float32)
            labelled = pipe.transformer.config.num_classes > 0
            images, _ = load_image_data(data, class_conditional=labelled, eval_images=None)
        run = InverseRun(data, settings, options, accelerator, pipe, images, features)
        try:
            finished = run.train()
        finally:
            run.trainer.release()
            accelerator.end_training()
    return 0 if finished else STOPPED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
