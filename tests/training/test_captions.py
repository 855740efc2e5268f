"""Training on captions: the model takes prompts, and is saved with their vocabulary."""

import dataclasses

import pytest
import torch

import distmatch as dm
from distmatch.data import load_data
from distmatch.diffusion.conditioning import Conditioning
from distmatch.diffusion.prompts import encode_prompts
from distmatch.interop import export_onnx
from tests.helpers.rounding import assert_same_but_for_rounding


@pytest.fixture(scope="module")
def captioned():
    return load_data("captioned-digits:test").subset(torch.arange(400))


def test_data_with_captions_train_a_model_of_prompts(captioned, tmp_path):
    """The EMA that is returned, what is on disk, and what is loaded again predict the same from prompts."""
    sizes = {"net": "dit", "patch": 4, "width": 16, "depth": 1, "heads": 1, "lr_rampup": 0}
    teacher = dm.train(captioned, steps=4, batch=16, out=tmp_path / "run", quiet=True, **sizes)
    again = dm.load_teacher(tmp_path / "run")
    prompts = ["a red seven", "a blue two, then a green one"]
    given = encode_prompts(again, prompts)
    x, sigma = torch.randn(2, 3, 8, 16), torch.ones(2)
    assert_same_but_for_rounding(teacher(x, sigma, given), again(x, sigma, given))
    assert not torch.equal(again(x, sigma, given), again(x, sigma))
    assert again.prompt_encoder.fingerprint == captioned.prompt_encoder.fingerprint


def test_captions_without_an_encoder_get_their_own_vocabulary(captioned):
    """Labels give way to captions; dropping all captions would train the unconditional model."""
    bare = dataclasses.replace(
        captioned,
        conditions=Conditioning(),
        prompt_encoder=None,
        labels=torch.zeros(400, dtype=torch.int64),
        class_names=("digits",),
    )
    teacher = dm.train(bare, steps=1, batch=8, quiet=True, net="dit", patch=4, width=16, depth=1, heads=1)
    assert set(teacher.prompt_encoder.words) <= set(captioned.prompt_encoder.words)
    assert set(teacher.conditioning_spec) == {"tokens"}
    with pytest.warns(UserWarning, match="tokens of these data is not used"):
        unconditional = dm.train(captioned, steps=1, batch=8, quiet=True, net="mlp", width=8, depth=1)
    assert not unconditional.conditioning_spec


@pytest.mark.parametrize("method", [pytest.param("f-distill", marks=pytest.mark.slow), "scm"])
def test_students_of_prompts_are_trained_saved_and_sampled(captioned, tmp_path, method):
    sizes = {"net": "dit", "patch": 4, "width": 16, "depth": 1, "heads": 1, "lr_rampup": 0}
    teacher = dm.train(captioned, steps=2, batch=16, quiet=True, **sizes)
    student = dm.distill(teacher, captioned, method=method, steps=5, batch=8, guidance=2.0, quiet=True)
    given = encode_prompts(student, ["a red seven"] * 3)
    x = student.sample(3, conditioning=given, seed=1)
    assert x.shape == (3, 3, 8, 16)
    assert bool(x.isfinite().all())
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student")
    assert_same_but_for_rounding(
        again.sample(3, conditioning=encode_prompts(again, ["a red seven"] * 3), seed=1), x
    )
    if method == "f-distill":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
        assert export_onnx(again, tmp_path / "student.onnx") < 1e-5  # also for batches of another size
