"""transformers' own Trainer trains the model too."""

import pytest
import torch
from conftest import tiny_config
from transformers import Trainer, TrainingArguments

from tarflow_hf import TarFlowModel


class Rows(torch.utils.data.Dataset):
    """Images with their labels under the name that `forward` gives them."""

    def __init__(self, count):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1
        self.labels = torch.randint(0, 4, (count,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "class_labels": self.labels[index]}


def train(folder, **options):
    torch.manual_seed(0)
    model = TarFlowModel(tiny_config())
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=4,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        label_names=["class_labels"],
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(32), eval_dataset=Rows(8))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [float(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    return trainer, losses, norms


def test_accumulated_gradients_make_the_step_of_the_whole_batch(tmp_path):
    trainer, losses, norms = train(tmp_path / "whole", per_device_train_batch_size=8)
    assert losses[-1] < losses[0]
    assert "eval_loss" in trainer.evaluate()
    _, parts, part_norms = train(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert parts == pytest.approx(losses, rel=1e-3)
    assert part_norms == pytest.approx(norms, rel=1e-2)


def test_activation_checkpointing_gives_the_same_losses(tmp_path):
    _, losses, _ = train(tmp_path / "plain", per_device_train_batch_size=8)
    _, again, _ = train(tmp_path / "checkpointed", per_device_train_batch_size=8, activation_checkpointing=True)
    assert again == losses
