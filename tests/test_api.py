"""The Python interface: what goes in, what comes out, in whose units."""

import copy
import itertools

import numpy as np
import pytest
import torch

import distmatch as dm
from distmatch.base import progress as progress_module
from distmatch.data.batches import Batches
from distmatch.metrics import classifier, reference_labels
from distmatch.training.options import NetOptions, RunOptions, TrainOptions
from distmatch.training.prepare_teacher import prepare_training
from tests.helpers.rounding import assert_same_but_for_rounding

QUICK = {"batch": 32, "quiet": True}
TINY = {"width": 16, "depth": 1, **QUICK}


class Shifted:
    """The exact teacher of N(2, 0.5^2 I) in two dimensions, as a user would write it."""

    shape, num_classes = (2,), 0
    sigma_data, sigma_min, sigma_max = 0.5, 0.002, 80.0

    def __call__(self, x, sigma, conditioning=None):
        shrink = 0.25 / (0.25 + sigma[:, None] ** 2)
        return 2 + shrink * (x - 2)


def test_data_of_a_formula_teacher_are_taken_in_its_own_units():
    data = 2 + 0.5 * torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    student = dm.distill(Shifted(), data, steps=5, fit_steps=600, **{**TINY, "width": 64})
    x = student.sample(500)
    assert float(x.mean()) == pytest.approx(2, abs=0.4)  # scaled data would have been centered on 0
    np.testing.assert_array_equal(student.export(x), x.numpy())


def test_samples_come_back_in_the_units_of_the_training_data():
    table = np.random.default_rng(0).normal([100.0, -3.0], [20.0, 0.1], size=(400, 2)).astype("float32")
    teacher = dm.train(table, steps=60, **TINY)
    student = dm.distill(teacher, table, steps=5, **QUICK)
    values = student.export(student.sample(300))
    assert values.dtype == np.float32
    assert abs(values[:, 0].mean() - 100) < 40
    assert abs(values[:, 1].mean() + 3) < 0.4


def test_exported_digits_are_bytes():
    teacher = dm.train("digits", steps=2, **TINY)
    student = dm.distill(teacher, "digits", steps=5, **QUICK)
    images = student.export(student.sample(5))
    assert images.dtype == np.uint8
    assert images.shape == (5, 8, 8)


def test_unknown_settings_are_answered_with_the_nearest():
    with pytest.raises(dm.UserError, match="gan_weight"):
        dm.distill("ring8", gan_wieght=1.0)


def test_a_run_folder_can_be_written_from_python(tmp_path):
    dm.train("digits", steps=2, out=tmp_path / "teacher", **TINY)
    student = dm.distill(tmp_path / "teacher", steps=5, out=tmp_path / "student", **QUICK)
    again = dm.Student.from_pretrained(tmp_path / "student")
    assert_same_but_for_rounding(again.sample(4, seed=3), student.sample(4, seed=3))
    with pytest.raises(dm.UserError, match="--overwrite"):
        dm.train("digits", steps=2, out=tmp_path / "teacher", **TINY)


def test_batch_one_is_warned_of():
    with pytest.warns(UserWarning, match="at batch 1"):
        dm.distill("skewed2", steps=5, fit_steps=1, **{**TINY, "batch": 1})


def test_dropout_resumes_to_the_bit_and_leaves_the_global_stream_alone():
    net = NetOptions(net="mlp", width=16, depth=1, dropout=0.3)
    options = TrainOptions(net=net, run=RunOptions(steps=8, batch=16, device="cpu"))
    data = dm.load_data("digits")

    def advanced(state, method_step, steps):
        batches = Batches(data, 16, 0)
        for _ in range(steps):
            torch.rand(3)  # whatever else draws from the global stream
            method_step(state, batches(state.step))
        return state

    whole = prepare_training(options, data)
    advanced(whole.state, whole.step, 3)
    saved = copy.deepcopy(whole.state.state_dict())
    resumed = prepare_training(options, data)
    resumed.state.load_state_dict(saved)
    before = torch.get_rng_state()
    resumed.step(resumed.state, Batches(data, 16, 0)(3))
    assert torch.equal(before, torch.get_rng_state())
    advanced(resumed.state, resumed.step, 3)
    advanced(whole.state, whole.step, 4)
    for mine, other in zip(
        whole.state.denoiser.parameters(), resumed.state.denoiser.parameters(), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fit_steps": 20}, "fit to teacher"),
        ({"method": "dmd", "fit_steps": 5, "pairs": 64, "pair_steps": 2}, "pairs of the teacher"),
        ({"method": "dpm-ot", "fit_steps": 5, "bank": 16, "bank_steps": 2}, "latents of the teacher"),
    ],
)
def test_quiet_says_nothing(settings, said, monkeypatch, capfd):
    """Whatever is done before the first step included. By this clock all takes long enough to be shown."""
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    dm.distill("ring8", steps=5, width=16, depth=1, batch=32, quiet=True, **settings)
    assert capfd.readouterr() == ("", "")
    dm.distill("ring8", steps=5, width=16, depth=1, batch=32, **settings)
    shown = capfd.readouterr()
    assert said in shown.err
    assert "distill: 5/5" in shown.err
    assert shown.out == ""


def test_a_quiet_evaluation_says_nothing(tmp_path, monkeypatch, capfd):
    clock = itertools.count(step=20.0)
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(classifier, "_STEPS", (5, 5))
    x, labels = dm.load_data("digits").batch(torch.arange(0, 1797, 2))
    for quiet in (True, False):
        monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / str(quiet)))
        dm.evaluate(x, "digits", labels=labels, n=60, quiet=quiet)
        assert ("feature network" in capfd.readouterr().err) == (not quiet)


def test_a_quiet_comparison_says_nothing(tmp_path, capfd):
    common = {"methods": "diff-instruct", "seeds": 1, "budget": "5 steps", "n": 60, "fit_steps": 5, **TINY}
    dm.compare("ring8", out=tmp_path / "a", **common)
    assert capfd.readouterr() == ("", "")
    dm.compare("ring8", out=tmp_path / "b", **{**common, "quiet": False})
    assert "compare: trying diff-instruct" in capfd.readouterr().err


def test_a_student_is_measured_by_samples_of_its_own():
    teacher = dm.train("digits", steps=2, **TINY)
    student = dm.distill(teacher, "digits", steps=5, **QUICK)
    found = dm.evaluate(student, "digits", n=60, features="pixels", quiet=True)
    data = dm.load_data("digits")
    labels = reference_labels(data, 120, seed=0)
    same = dm.evaluate(student.sample(120, conditioning=labels), data, labels=labels, n=60, features="pixels")
    assert found == same


@pytest.mark.parametrize("wrong", [Shifted(), "runs/none", dm.load_data("digits"), ["a"]])
def test_what_is_no_samples_is_refused_with_the_way_out(wrong):
    with pytest.raises(dm.UserError, match=r"no samples to measure.*distmatch evaluate|no samples.*sample\("):
        dm.evaluate(wrong, "digits")


def test_warnings_of_a_run_point_at_the_line_that_started_it():
    teacher = dm.train("digits", steps=2, **TINY)
    with pytest.warns(UserWarning, match="ratio normalization") as found:
        dm.distill(teacher, "digits", steps=5, **QUICK)
    assert {w.filename for w in found} == {__file__}


def test_a_teacher_in_memory_knows_its_data_by_name():
    teacher = dm.train("digits", steps=2, **TINY)
    student = dm.distill(teacher, steps=5, **QUICK)
    assert student.info["data"]["spec"] == "digits"
    assert student.info["data"]["content_hash"] == dm.load_data("digits").content_hash
    part = dm.train(dm.load_data("digits").subset(torch.arange(64)), steps=2, **TINY)
    with pytest.raises(dm.UserError, match="needs real data"):  # the name alone would give other data
        dm.distill(part, steps=5, **QUICK)
    with pytest.raises(dm.UserError, match="needs real data"):
        dm.distill(Shifted(), steps=5, **QUICK)


@pytest.mark.parametrize(("samples", "said"), [(9, "9 samples, and a batch of 32"), (32, None)])
def test_data_smaller_than_a_batch_are_warned_of(samples, said):
    data = dm.load_data("digits").subset(torch.arange(samples))
    options = TrainOptions(run=RunOptions(batch=32), net=NetOptions(width=16, depth=1))
    found = prepare_training(options, data).warnings
    assert [said in w for w in found] == ([True] if said else [])
