from pathlib import Path

import pytest
import torch
from hintsearch.distill.data import DataSplits
from hintsearch.distill.hint_configuration import HintConfiguration, HintPair
from hintsearch.distill.loss_names import find_hint_loss, find_logit_loss
from hintsearch.distill.losses import FeatureShape, HintLoss
from hintsearch.distill.recipe import Recipe
from hintsearch.distill.trainer import Seeds, TeacherNetwork, Trainer
from hintsearch.models.zoo import ModelSpec
from torch import nn

FILE = Path(__file__).parents[2] / "docs" / "my_losses.py"


def test_documented_functions_are_their_formulas() -> None:
    student, teacher = torch.zeros(2, 3, 4, 4), torch.ones(2, 5, 2, 2)
    student[1] += 3
    kind = find_hint_loss(f"{FILE}:mean_difference")
    assert issubclass(kind, HintLoss)
    loss = kind(FeatureShape(3, 4, 4), FeatureShape(5, 2, 2))
    assert loss.compare(student, teacher).tolist() == [1, 4]
    logits = find_logit_loss(f"{FILE}:squared_logits")
    found = logits(torch.zeros(2, 2), torch.tensor([[2.0, 2.0], [0.0, 4.0]]), torch.zeros(2, dtype=torch.long), 2.0)
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize("name", ["mean_difference", "PooledRegression"])
def test_student_learns_by_a_documented_loss(splits: DataSplits, teacher: nn.Module, name: str) -> None:
    hints = HintConfiguration(
        (HintPair("layer3.0", "layer3.0", f"{FILE}:{name}", 1.0),),
        logit_weight=1.0,
        logit_loss=f"{FILE}:squared_logits",
    )
    trainer = Trainer(
        ModelSpec("resnet8", 3, 1, width=0.25),
        splits,
        Recipe(lr=0.05, batch_size=20, crop_padding=0, flip=False),
        (6,),
        Seeds(),
        hints=hints,
        teacher=TeacherNetwork(teacher),
    )
    results = list(trainer.epochs())
    # Normalised, so about 1 at the start.
    assert results[-1].metrics["loss_hint"] < 0.5 * results[0].metrics["loss_hint"]
