"""Networks from elsewhere, handed to distmatch as they are: copied, trained, saved, loaded; or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.diffusion.calls import CalledNet
from distmatch.diffusion.denoiser import has_features
from distmatch.diffusion.guidance import Guided
from distmatch.diffusion.paths.custom import path_of
from distmatch.interop import export_onnx
from distmatch.interop.frozen import Portable
from distmatch.interop.own_modules import inner_module
from distmatch.interop.saved import load_denoiser, save_denoiser
from distmatch.nets.build import build_net
from distmatch.nets.config import MLPConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.ratio.discriminator import build_discriminator, choose_source
from tests.helpers import own_networks
from tests.helpers.command import command, done
from tests.helpers.own_networks import Conv, OfEDM, OfKDiffusion, Velocity, Whole
from tests.helpers.processes import together
from tests.helpers.rounding import assert_same_but_for_rounding
from tests.helpers.small import network_teacher

QUICK: dict[str, Any] = {"steps": 1, "data": "digits", "batch": 4, "fake_score_steps": 1, "quiet": True}
IMAGE = (1, 8, 8)


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


def of_diffusers() -> Any:
    models = pytest.importorskip("tests.helpers.diffusers_models")
    unet = models.unet(in_channels=1, out_channels=1, num_class_embeds=11)
    return dm.as_denoiser(unet, "vp", "eps", shape=IMAGE, num_classes=10, null_class=10, time=999)


TEACHERS: dict[str, Callable[[], Any]] = {
    "conv": lambda: dm.as_denoiser(Conv(), shape=IMAGE),
    "k-diffusion": lambda: dm.as_denoiser(
        OfKDiffusion(3), shape=IMAGE, num_classes=10, null_class=10, arguments={"width": 3}
    ),
    "edm": lambda: dm.as_denoiser(OfEDM()),
    "flow": lambda: dm.as_denoiser(Velocity(), "condot", "flow", shape=IMAGE, reverse_time=True),
    "diffusers": of_diffusers,
    "preconditioned": lambda: EDMDenoiser(Conv(), shape=IMAGE, num_classes=0),
    "whole": Whole,
}
METHODS = ("f-distill", "dmd2", "sid", "consistency")
CASES = [
    (network, method)
    for network in TEACHERS
    for method in (METHODS[:1] if network in ("preconditioned", "whole") else METHODS)
]
CLASSES = {"conv": "Conv", "k-diffusion": "OfKDiffusion", "edm": "OfEDM", "flow": "Velocity"}
CLASSES |= {"preconditioned": "Conv", "whole": "Whole"}


def load(folders: dict[str, str]) -> None:
    """Samples of saved students, in a process that did not make them."""
    torch.set_num_threads(1)
    for folder, name in folders.items():
        handed = {"network": getattr(own_networks, name)} if name else {}
        student = dm.Student.from_pretrained(folder, **handed)
        torch.save(student.sample(5, seed=3), folder + "/samples.pt")


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Any, Tensor]]:
    """Students of each network by each method, and what a process of its own made of the saved ones."""
    root, made, folders = tmp_path_factory.mktemp("students"), {}, {}
    for network, method in CASES:
        often = {} if method == "consistency" else {"fake_score_steps": 1}
        teacher = seeded(TEACHERS[network])
        student = dm.distill(teacher, "digits", method=method, steps=2, batch=16, quiet=True, **often)
        folder = str(root / f"{network}-{method}")
        student.save_pretrained(folder)
        made[network, method] = student
        folders[folder] = CLASSES.get(network, "")
    together(load, [(folders,)], timeout=120)
    return {
        key: (student, torch.load(f"{root}/{key[0]}-{key[1]}/samples.pt", weights_only=True))
        for key, student in made.items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("network", "method"), CASES)
def test_a_student_is_a_copy_that_learns_and_is_saved(students: Any, network: str, method: str) -> None:
    student, elsewhere = students[network, method]
    copied, original = inner_module(student.denoiser), inner_module(seeded(TEACHERS[network]))
    assert type(copied) is type(original)
    before = original.state_dict()
    moved = [float((value - before[name]).abs().max()) for name, value in copied.state_dict().items()]
    assert 0 < max(moved) < 0.01  # two steps of Adam from the teacher's weights
    assert_same_but_for_rounding(elsewhere, student.sample(5, seed=3))


@pytest.fixture
def edm_student() -> Any:
    return dm.Student(seeded(lambda: dm.as_denoiser(OfEDM())), (2.5,), {"method": "f-distill"})


def test_what_a_file_cannot_build_is_asked_for(edm_student: Any, tmp_path: Path) -> None:
    edm_student.save_pretrained(tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["module"] == {"class": "tests.helpers.own_networks:OfEDM"}
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'from_pretrained("this/folder", network=OfEDM)' in card
    with pytest.raises(UserError, match=r"class tests.helpers.own_networks:OfEDM.*network=YourNetwork"):
        dm.Student.from_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"another architecture"):
        dm.Student.from_pretrained(tmp_path / "m", network=Conv)
    with pytest.raises(UserError, match=r"cannot build the network.*positional argument"):
        dm.Student.from_pretrained(tmp_path / "m", network=nn.Linear)
    with pytest.raises(UserError, match=r"does not return a module"):
        dm.Student.from_pretrained(tmp_path / "m", network=dict)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"a module, its class"):
        dm.Student.from_pretrained(tmp_path / "m", network="OfEDM")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"another denoiser.*num_classes 0.*num_classes 10"):
        dm.Student.from_pretrained(tmp_path / "m", network=dm.as_denoiser(OfEDM(0)))
    with pytest.raises(UserError, match=r"another denoiser.*prediction eps.*prediction x0"):
        dm.Student.from_pretrained(tmp_path / "m", network=dm.as_denoiser(OfEDM(), prediction="eps"))
    handed = OfEDM()
    kept = {name: value.clone() for name, value in handed.state_dict().items()}
    for network in (OfEDM, handed, dm.as_denoiser(OfEDM())):
        loaded = dm.Student.from_pretrained(tmp_path / "m", network=network)
        for name, value in inner_module(edm_student.denoiser).state_dict().items():
            assert torch.equal(inner_module(loaded.denoiser).state_dict()[name], value)
    assert all(torch.equal(handed.state_dict()[name], value) for name, value in kept.items())


def test_what_a_file_says_itself_takes_no_network(tmp_path: Path) -> None:
    save_denoiser(tmp_path / "ours", network_teacher())
    with pytest.raises(UserError, match="already determines"):
        load_denoiser(tmp_path / "ours", OfEDM)
    with pytest.raises(UserError, match="already determines"):
        dm.load_teacher(tmp_path / "ours", network=OfEDM)


def test_a_network_of_ours_on_a_path_needs_no_help(tmp_path: Path) -> None:
    net = seeded(lambda: build_net(MLPConfig(width=8, depth=1), (2,), 3))
    teacher = dm.as_denoiser(net, "cosine", "v", shape=(2,), num_classes=3)
    save_denoiser(tmp_path / "m", teacher)
    x, sigma, labels = torch.randn(4, 2), torch.rand(4) + 0.1, torch.tensor([0, 1, 2, -1])
    loaded = dm.load_teacher(tmp_path / "m")
    assert_same_but_for_rounding(loaded(x, sigma, labels), teacher(x, sigma, labels))


def test_code_is_not_kept_and_the_denoiser_is_asked_for(tmp_path: Path) -> None:
    """A call, a clock, a path that are functions: with the denoiser in hand the weights are all it takes."""

    def call(net: Any, x: Tensor, t: Tensor, conditions: Any) -> Tensor:
        return net(x, sigma=t, class_cond=conditions["label"])

    def made() -> Any:
        path = path_of(lambda t: 1 - t, lambda t: t)
        clock = torch.exp
        options = {"call": call, "num_classes": 10, "null_class": 10, "time": clock}
        return dm.as_denoiser(OfKDiffusion(), path, "flow", shape=IMAGE, **options)

    teacher = seeded(made)
    save_denoiser(tmp_path / "m", teacher)
    said = json.loads((tmp_path / "m" / "config.json").read_text())
    assert said["denoiser"]["missing"] == ["path", "time", "call"]
    with pytest.raises(UserError, match=r"path, time, call of the saved one is code.*as_denoiser"):
        dm.load_teacher(tmp_path / "m", network=OfKDiffusion)
    loaded = dm.load_teacher(tmp_path / "m", network=made())
    x, sigma = torch.randn(4, *IMAGE), torch.rand(4) + 0.1
    assert_same_but_for_rounding(loaded(x, sigma), teacher(x, sigma))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"library": "diffusers", "config": {"_class_name": "DiffusionPipeline"}}, "no network of diffusers"),
        ({"library": "diffusers", "config": {"_class_name": "os.system"}}, "no network of diffusers"),
        ({"library": "distmatch", "config": {"kind": "mlp", "width": 8, "depth": 10**6}}, "too few tensors"),
        ({"library": "elsewhere", "config": {}}, "no code is loaded"),
    ],
)
def test_a_config_builds_networks_of_two_libraries_only(
    edm_student: Any, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    pytest.importorskip("diffusers")
    edm_student.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    config = json.loads(file.read_text())
    config["module"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=said):
        load_denoiser(tmp_path / "m")


def test_what_cannot_be_kept_is_said_before_training(tmp_path: Path) -> None:
    class Noting(Conv):
        def get_extra_state(self) -> Any:
            return {"num_steps": 3}

        def set_extra_state(self, state: Any) -> None: ...

    with pytest.raises(UserError, match=r"Noting cannot be saved.*_extra_state"):
        dm.distill(dm.as_denoiser(Noting(), shape=IMAGE), out=tmp_path / "run", **QUICK)
    assert not (tmp_path / "run").exists()
    conv = Conv()
    conv.lock = (i for i in ())  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"cannot be copied"):
        dm.distill(dm.as_denoiser(conv, shape=IMAGE), out=tmp_path / "run", **QUICK)
    with pytest.raises(UserError, match=r"must be JSON"):
        dm.as_denoiser(Conv(), shape=IMAGE, arguments={"layer": Conv()})


@pytest.mark.filterwarnings("ignore")
def test_a_run_folder_and_the_command_line(tmp_path: Path) -> None:
    student = dm.distill(seeded(TEACHERS["k-diffusion"]), out=tmp_path / "run", **QUICK)
    loaded = dm.Student.from_pretrained(tmp_path / "run", network=OfKDiffusion)  # of width 3, as was kept
    assert loaded.denoiser.net.module.inner_model.first.out_channels == 3
    assert_same_but_for_rounding(loaded.sample(3), student.sample(3))
    answer = command(f"sample {tmp_path / 'run'} --out {tmp_path / 'x.npz'}")
    assert answer.code == 2
    assert "OfKDiffusion" in answer.err
    assert "Traceback" not in answer.err
    line = f"sample {tmp_path / 'run'} --n 3 --overwrite --out {tmp_path / 'x.npz'} --network"
    done(f"{line} tests.helpers.own_networks:OfKDiffusion")
    with np.load(tmp_path / "x.npz") as written:
        assert np.array_equal(written["x"], student.export(student.sample(3)))
    for wrong in ("OfKDiffusion", "tests.helpers.nowhere:A", "tests.helpers.own_networks:Nobody"):
        answer = command(f"{line} {wrong}")
        assert (answer.code, "names nothing" in answer.err) == (2, True), answer.err


# ------------------------------------------------------------------ calls


# ------------------------------------------------------------------ what else there is to a student


@pytest.mark.filterwarnings("ignore")
def test_a_student_of_another_network_is_made_only_when_it_is_asked_for() -> None:
    teacher = dm.as_denoiser(Conv(), shape=IMAGE)
    with pytest.raises(UserError, match=r"no input for a second noise level.*net="):
        dm.distill(teacher, method="ctm", steps=1, data="digits", batch=4, quiet=True)
    small: dict[str, Any] = {"net": "mlp", "width": 8, "depth": 1, "fit_steps": 1}
    student = dm.distill(teacher, method="ctm", steps=1, data="digits", batch=4, quiet=True, **small)
    assert type(student.denoiser.net).__name__ == "MLP"
    # Where the parameters are hidden in a function there is nothing to copy.
    hidden = dm.as_denoiser(lambda x, t: Conv()(x, t), shape=IMAGE)
    student = dm.distill(hidden, method="dmd2", **small, **QUICK)
    assert type(student.denoiser.net).__name__ == "MLP"


def test_exports_compute_the_same(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    student = dm.Student(seeded(TEACHERS["edm"]), (2.5,))
    assert export_onnx(student, tmp_path / "m") < 1e-4
    for network in ("flow", "whole"):
        portable = Portable(dm.Student(seeded(TEACHERS[network]), (2.5, 0.5)))
        inputs = portable.inputs(3)
        torch.testing.assert_close(portable(*inputs), portable.expected(inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_parts_of_any_module_are_features(tmp_path: Path) -> None:
    """Their outputs, in the pass itself or in one that ends there; copied, used and saved with it."""
    velocity, made = Velocity(), {"prediction": "flow", "shape": IMAGE, "features": ("inner.first",)}
    teacher = dm.as_denoiser(velocity, "condot", **made)
    x, sigma = torch.randn(3, *IMAGE), torch.tensor([0.1, 1.0, 9.0])
    behind: list[int] = []
    velocity.inner.last.register_forward_hook(lambda *_: behind.append(1))
    prediction, (feature,) = teacher(x, sigma, return_features=True)
    assert torch.equal(prediction, teacher(x, sigma))
    at = x / (1 + sigma)[:, None, None, None]
    torch.testing.assert_close(feature, velocity.inner.first(at))
    assert len(behind) == 2
    (alone,) = teacher(x, sigma, return_features="only")
    assert torch.equal(alone, feature)
    assert len(behind) == 2  # the pass was left before the last layer
    plain = dm.as_denoiser(Conv(), shape=IMAGE, features=["first"])
    assert plain(x, sigma, return_features="only")[0].shape == (3, 4, 8, 8)
    for method in ("f-distill", "sida"):
        student = dm.distill(teacher, method=method, **QUICK)
        assert has_features(student.denoiser)
    student.save_pretrained(tmp_path / "m")
    loaded = dm.Student.from_pretrained(tmp_path / "m", network=Velocity)
    assert loaded.denoiser.net.features == ("inner.first",)
    with pytest.raises(UserError, match=r"unknown module.*inner.first"):
        dm.as_denoiser(velocity, "condot", **{**made, "features": ("inner.frist",)})


def test_features_are_asked_for_only_where_the_network_has_them() -> None:
    ours = network_teacher()
    own = EDMDenoiser(Conv(), shape=IMAGE, num_classes=0)
    exact = dm.GaussianMixture([1.0], [[0.0, 0.0]], [1.0], [0])
    for denoiser, able in ((ours, True), (own, False), (exact, False), (Guided(exact, 2.0), False)):
        assert has_features(denoiser) is able
        assert choose_source("auto", denoiser) == ("teacher" if able else "own")
    for source in ("teacher", "fake"):
        with pytest.raises(UserError, match="--ratio-features own"):
            build_discriminator(choose_source(source, own), own, 0)
    assert isinstance(TEACHERS["flow"]().net, CalledNet)
