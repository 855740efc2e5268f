"""Samples, levels and batches of other shapes are refused at the entry, before torch meets them."""

import pytest
import torch
from torch import nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data.batches import Batch
from distmatch.diffusion.conditioning import FieldSpec


class Net(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, t):
        return self.conv(x)


def teacher(channels: int = 3):
    return dm.as_denoiser(Net(channels), "edm", "x0", shape=(3, 4, 4))


def test_a_network_of_other_channels_is_refused_before_training():
    with pytest.raises(UserError, match=r"does not run.*5 channels.*\(B, 3, 4, 4\).*as_denoiser"):
        dm.methods.build(teacher(5), "dmd2", total_steps=10)


def test_levels_belong_to_the_samples():
    x, model = torch.zeros(2, 3, 4, 4), teacher()
    assert torch.equal(model(x, torch.ones(1)), model(x, torch.ones(2)))
    for wrong in (torch.ones(3), torch.ones(2, 3)):
        with pytest.raises(UserError, match="one noise level for all samples"):
            model(x, wrong)
    with pytest.raises(UserError, match=r"shape of the model.*\(batch, 3, 4, 4\)"):
        model(x[:, :1], torch.ones(2))


@pytest.mark.parametrize("name", ["dmd2", "consistency", "mmd"])
def test_a_batch_of_another_shape_is_refused(name):
    method = dm.methods.build(teacher(), name, total_steps=10)
    state = method.init(seed=0)
    with pytest.raises(UserError, match=r"samples of a batch.*\(B, 3, 4, 4\)"):
        method.step(state, Batch(torch.zeros(4, 1, 4, 4)))
    with pytest.raises(UserError, match="one condition for each sample"):
        method.step(state, Batch(torch.zeros(4, 3, 4, 4), torch.zeros(3, dtype=torch.int64)))
    assert state.step == 0


def test_labels_are_declared_in_one_place():
    spec = {"text": FieldSpec((4,))}
    with pytest.raises(UserError, match=r'declare "label": FieldSpec'):
        dm.as_denoiser(Net(3), "edm", "x0", shape=(3, 4, 4), num_classes=10, conditioning=spec)


@pytest.mark.parametrize(
    ("setting", "meant"),
    [("metod", "method"), ("divergense", "divergence"), ("critic_stepss", "fake_score_steps")],
)
def test_a_misspelt_setting_is_recognised(setting, meant):
    with pytest.raises(UserError, match=f"did you mean.*{meant}"):
        dm.methods.build(teacher(), "dmd2", total_steps=10, **{setting: 1})
