"""Students of teachers that are conditioned on more than labels: a sequence of vectors, and a number."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.adapters import PredictionDenoiser
from distmatch.diffusion.conditioning import FieldSpec
from distmatch.diffusion.guidance import Guided
from distmatch.training.evaluation import asked_of, measure_samples
from distmatch.training.sampling import SampleResult

SPEC = {"text": FieldSpec((-1, 4)), "age": FieldSpec()}


class TextNet(nn.Module):
    """E[x0 | x] of samples that lie at a linear function of their text, whatever its length."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.text = nn.Linear(4, width)
        self.rest = nn.Linear(4, width)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor, t: Tensor, *, text: Tensor, age: Tensor) -> Tensor:
        near = torch.stack([t.log(), age], 1)
        hidden = torch.nn.functional.silu(self.rest(torch.cat([x, near], 1)) + self.text(text).mean(1))
        return self.last(hidden)


def teacher() -> PredictionDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = TextNet()
    null = dm.Conditioning({"text": torch.zeros(1, 3, 4), "age": torch.zeros(1)})
    return dm.as_denoiser(
        net, "edm", "x0", shape=(2,), conditioning=SPEC, null=null, sigma_data=1.0, arguments={"width": 16}
    )


def conditions(n: int, seed: int = 0) -> dm.Conditioning:
    gen = torch.Generator().manual_seed(seed)
    return dm.Conditioning({"text": torch.randn(n, 3, 4, generator=gen), "age": torch.rand(n, generator=gen)})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dm.Dataset:
    told = conditions(200)
    x = told["text"].mean(1)[:, :2] + 0.1 * told["age"][:, None]
    file = tmp_path_factory.mktemp("conditions") / "x.npz"
    named = {f"condition_{name}": value.numpy() for name, value in told.items()}
    np.savez(file, x=x.numpy(), **named)
    return dm.load_data(file)


METHODS = [
    *("f-distill", "dmd2", "sid", "sim", "uni-instruct", "moment-matching"),
    *("consistency", "scm", "rcm", "dmd"),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_student_is_distilled_saved_and_sampled_under_conditions(
    method: str, data: dm.Dataset, tmp_path: Path
) -> None:
    own = {"pairs": 20, "pair_steps": 3} if method == "dmd" else {}
    student = dm.distill(teacher(), data, method=method, steps=5, batch=16, seed=1, quiet=True, **own)
    told = conditions(6, seed=3)
    x = student.sample(6, seed=2, conditioning=told)
    assert (x - student.sample(6, seed=2, conditioning=conditions(6, seed=4))).abs().max() > 1e-4
    student.save_pretrained(tmp_path / "student")
    again = dm.Student.from_pretrained(tmp_path / "student", network=TextNet)
    assert torch.equal(again.sample(6, seed=2, conditioning=told), x)
    torch.testing.assert_close(again.sample(6, seed=2, conditioning=told, batch=4), x)
    none = x, torch.ones(6)  # "no condition" is saved too
    with torch.no_grad():
        assert torch.equal(again.denoiser(*none), student.denoiser(*none))


def test_conditions_follow_the_precision_of_the_network(data: dm.Dataset) -> None:
    """Differences run the network in float64, and the text is float32."""
    student = dm.distill(
        teacher(), data, method="scm", tangent="difference", steps=3, batch=16, seed=1, quiet=True
    )
    exact = dm.distill(teacher(), data, method="scm", tangent="exact", steps=3, batch=16, seed=1, quiet=True)
    told = conditions(6)
    torch.testing.assert_close(
        student.sample(6, conditioning=told), exact.sample(6, conditioning=told), rtol=1e-3, atol=1e-3
    )


def test_the_order_of_samples_and_parts_of_a_batch_change_nothing(data: dm.Dataset) -> None:
    plain, parts = (
        dm.distill(teacher(), data, method="f-distill", steps=6, batch=16, accumulate=count, quiet=True)
        for count in (1, 4)
    )
    told = conditions(8)
    torch.testing.assert_close(
        plain.sample(8, conditioning=told), parts.sample(8, conditioning=told), rtol=1e-3, atol=1e-4
    )
    model = teacher()
    x, sigma = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 5, 8)
    turned = torch.arange(7, -1, -1)
    found = Guided(model, 2.0)(x, sigma, told)
    torch.testing.assert_close(
        Guided(model, 2.0)(x[turned], sigma[turned], told.index(turned)), found[turned]
    )


def test_teacher_and_student_are_measured_under_the_conditions_of_the_data(data: dm.Dataset) -> None:
    student = dm.distill(teacher(), data, method="sid", steps=5, batch=16, quiet=True)
    with pytest.raises(UserError, match="needs the conditioning of its samples"):
        student.sample(4)
    metrics = dm.evaluate(student, data, n=100)
    assert 0 <= metrics["fd"].value < 1e3


def test_real_samples_stand_beside_those_asked_for_under_the_same_conditions(data: dm.Dataset) -> None:
    asked = asked_of(data, SPEC, 50, seed=4)
    shown: list[dm.Conditioning] = []

    def draw(n: int, told: dm.Conditioning) -> SampleResult:
        shown.append(told)
        return SampleResult(data.batch(torch.arange(n))[0], told, 1, 0.0)

    drawn = measure_samples(data, {"student": draw}, asked=asked, n=25, seed=4)[1]
    assert torch.equal(shown[0]["text"], asked["text"])
    by_hand = asked["text"].mean(1)[:, :2] + 0.1 * asked["age"][:, None]  # as the data were made
    torch.testing.assert_close(torch.as_tensor(data.scaling.export(drawn["reference"].x)), by_hand)


@pytest.mark.parametrize("method", ["mmd", "dpm-ot"])
def test_methods_that_know_labels_alone_say_so_before_anything_is_trained(
    method: str, data: dm.Dataset
) -> None:
    with pytest.raises(UserError, match=r"supports class labels only.*alone use .*dmd.*also .*dmd2"):
        dm.distill(teacher(), data, method=method, steps=5, batch=16, quiet=True)


def test_training_says_that_conditions_are_left_out(data: dm.Dataset) -> None:
    with pytest.warns(UserWarning, match="class labels only: age, text of these data"):
        dm.train(data, steps=1, batch=16, width=8, depth=1, quiet=True)


def test_data_that_do_not_hold_the_conditions_are_refused(data: dm.Dataset) -> None:
    bare = dataclasses.replace(data, conditions=dm.Conditioning())
    with pytest.raises(UserError, match=r"do not contain the teacher.s conditioning.*age, text"):
        dm.distill(teacher(), bare, method="sid", steps=5, batch=16, quiet=True)
    with pytest.raises(UserError, match="cannot be drawn without data"):
        dm.distill(teacher(), None, method="sid", steps=5, batch=16, quiet=True)
