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


class Columns(torch.utils.data.Dataset):
    """Images with their labels in a column of any name, or without."""

    def __init__(self, column, dtype=torch.int64):
        self.rows, self.column, self.dtype = Rows(16), column, dtype

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        labels = {} if self.column is None else {self.column: row["class_labels"].to(self.dtype)}
        return {"pixel_values": row["pixel_values"]} | labels


def train_on(folder, model, column, **options):
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    trainer = Trainer(model, arguments, train_dataset=Columns(column), eval_dataset=Columns(column))
    trainer.train()
    return trainer


@pytest.mark.parametrize("column", ["label", "labels", "class_labels", "label_ids", None])
@pytest.mark.parametrize("returns_dict", [True, False])
def test_a_column_of_labels_conditions_the_model_and_evaluation_has_a_loss(column, returns_dict, tmp_path):
    torch.manual_seed(0)
    model = TarFlowModel(tiny_config(return_dict=returns_dict))
    seen = []
    model.blocks[0].class_embedding.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    trainer = train_on(tmp_path, model, column)
    assert "eval_loss" in trainer.evaluate()
    assert all((labels >= 0).all() == (column is not None) for labels in seen)
    assert (tmp_path / "checkpoint-2/preprocessor_config.json").is_file()


def test_an_unconditional_model_refuses_labels_and_evaluates_without(tmp_path):
    assert "eval_loss" in train_on(tmp_path / "plain", TarFlowModel(tiny_config(num_classes=0)), None).evaluate()
    with pytest.raises(ValueError, match="must be None for an unconditional model"):
        train_on(tmp_path / "labelled", TarFlowModel(tiny_config(num_classes=0)), "label")


def test_a_volume_preserving_model_learns_its_prior(tmp_path):
    model = TarFlowModel(tiny_config(volume_preserving=True))
    trainer = train_on(tmp_path, model, "label")
    assert not model.prior_variance.allclose(torch.ones_like(model.prior_variance))
    before = model.prior_variance.clone()
    trainer.evaluate()
    assert model.prior_variance.equal(before)
