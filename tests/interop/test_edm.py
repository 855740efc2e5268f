"""The networks of EDM and EDM2 and their pickles: outputs, sizes, names, and models made of them."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from distmatch.interop.edm2_unet import EDM2UNet
from distmatch.interop.edm_checkpoint import Preconditioning, build_edm, network_of, read_edm
from distmatch.interop.edm_config import EDM2Config, EDMConfig, config_dict, config_from, from_arguments
from distmatch.interop.edm_unet import EDMUNet
from distmatch.interop.saved import convert_edm, load_denoiser, load_external, save_denoiser
from distmatch.nets.edm import EDMDenoiser
from tests.helpers import edm_pickles
from tests.helpers.edm_pickles import EDM_CASES, NCSNPP, SMALL, fill, teacher_and_pickle, write_pickle
from tests.helpers.rounding import assert_same_but_for_rounding

# Sum, sum of squares and two pixels of the output for the weights of `fill`, in float64. The first three were
# computed with NVIDIA Modulus 0.5.0 (Apache-2.0), whose attention is float32; the last with that of the
# authors, set up for the comparison alone.
OUTPUTS = {
    "ddpmpp": ("song", {"model_channels": 16}, [10.495033515, 4.676388091, -0.069667482, 0.151565180]),
    "ncsnpp": (
        "song",
        {"model_channels": 16, **NCSNPP},
        [12.253485950, 4.602292011, -0.096109102, 0.147547747],
    ),
    "adm": ("adm", {"model_channels": 64}, [-1.320621276, 26.233265094, 0.500348858, -0.168642278]),
    "edm2": (
        "edm2",
        {"model_channels": 64, "label_balance": 0.4, "concat_balance": 0.6},
        [-101.29903975441, 10327.653445913853, 0.807933803408, -5.36187862327],
    ),
}


def network(architecture, **options):
    config = from_arguments(architecture, {**SMALL, **options})
    return (EDM2UNet if architecture == "edm2" else EDMUNet)(config).double().eval()


@pytest.mark.parametrize("name", OUTPUTS)
@torch.no_grad()
def test_networks_compute_what_the_originals_compute(name):
    architecture, options, (total, squares, first, other) = OUTPUTS[name]
    net = network(architecture, **options)
    fill(net)
    x = torch.cos(torch.arange(2 * 3 * 64, dtype=torch.float64) * 1.3).reshape(2, 3, 8, 8)
    c_noise = torch.tensor([-0.5, 0.3], dtype=torch.float64)
    y, features = net(x, c_noise, torch.tensor([1, -1]), return_features=True)
    got = [y.sum(), y.square().sum(), y[0, 0, 0, 0], y[1, 2, 5, 3]]
    # 1e-6 relative: the float32 attention of the reference.
    assert [v.item() for v in got] == pytest.approx([total, squares, first, other], rel=1e-6, abs=1e-7)
    assert torch.equal(net(x, c_noise, torch.tensor([1, -1])), y)
    width = net.config.model_channels
    assert [tuple(f.shape[1:]) for f in features] == [(width, 8, 8), (2 * width, 4, 4)]


def count(config):
    with torch.device("meta"):
        net = EDM2UNet(config) if isinstance(config, EDM2Config) else EDMUNet(config)
    return sum(p.numel() for p in net.parameters()) / 1e6


def test_published_sizes():
    # EDM, table 7, and EDM2, table 2 (sizes XS and L), in millions of parameters.
    cifar = {"architecture": "song", "resolution": 32, "channels": 3, "channel_mult": (2, 2, 2)}
    assert count(EDMConfig(**cifar)) == pytest.approx(55.7, abs=0.05)
    adm = from_arguments("adm", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000})
    assert count(adm) == pytest.approx(295.9, abs=0.05)
    for channels, size in {128: 124.7, 320: 777.5}.items():
        config = EDM2Config(resolution=64, channels=4, num_classes=1000, model_channels=channels)
        assert count(config) == pytest.approx(size, abs=0.05)


def test_layer_names_are_those_of_the_checkpoints():
    names = set(network("song", model_channels=16, **NCSNPP).state_dict())
    for name in (
        "map_noise.freqs",
        "map_label.weight",
        "enc.8x8_conv.weight",
        "enc.4x4_down.skip.resample_filter",
        "enc.4x4_aux_residual.weight",
        "enc.4x4_block0.qkv.bias",
        "dec.4x4_in0.proj.weight",
        "dec.8x8_up.conv0.resample_filter",
        "dec.8x8_aux_norm.weight",
        "dec.8x8_aux_conv.bias",
    ):
        assert name in names
    adm = set(network("adm", model_channels=64).state_dict())
    assert {"out_norm.weight", "out_conv.weight", "enc.4x4_down.skip.resample_filter"} <= adm
    assert "enc.4x4_down.skip.weight" not in adm
    edm2 = set(network("edm2", model_channels=64).state_dict())
    assert {"out_gain", "emb_fourier.phases", "emb_label.weight", "dec.8x8_block1.emb_gain"} <= edm2


@torch.no_grad()
def test_edm2_keeps_magnitudes_and_ignores_the_length_of_weights():
    torch.manual_seed(0)
    net = network("edm2", model_channels=64).float()
    x, c_noise = torch.randn(16, 3, 8, 8), torch.randn(16)
    net.out_gain.fill_(1.0)
    y, features = net(x, c_noise, torch.randint(0, 2, (16,)), return_features=True)
    for feature in (*features, y):
        assert 0.5 < feature.square().mean().sqrt() < 2  # about 1 at every depth, with fresh weights
    none = net(x, c_noise)
    net.enc["8x8_block0"].conv_res0.weight.mul_(3.0)
    # Up to the 1e-4 that keeps rows of zeros finite, in rows of length about sqrt(576).
    assert torch.allclose(net(x, c_noise, torch.full((16,), -1)), none, atol=1e-3)


@pytest.mark.parametrize("case", EDM_CASES)
def test_pickles_round_trip_to_safetensors(case, tmp_path):
    teacher, path = teacher_and_pickle(tmp_path, case)
    before = torch.get_rng_state()
    read = convert_edm(path, tmp_path / "out")
    back, extra = load_denoiser(tmp_path / "out")
    assert torch.equal(torch.get_rng_state(), before)
    assert extra["kind"] == "teacher"
    assert extra["converted_from"] == path.name
    x, sigma = torch.randn(3, 3, 8, 8), torch.tensor([0.03, 1.0, 60.0])
    labels = torch.tensor([0, 1, -1])
    for other in (read, back, load_external(tmp_path / "out"), load_external(path)):
        assert (other.shape, other.num_classes, other.sigma_data) == ((3, 8, 8), 2, 0.5)
        assert (other.sigma_min, other.sigma_max) == (teacher.sigma_min, teacher.sigma_max)
        assert_same_but_for_rounding(other(x, sigma, labels), teacher(x, sigma, labels))
        assert_same_but_for_rounding(
            other(x, sigma, labels, return_features=True)[0], teacher(x, sigma, labels)
        )
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert kept.keys() == network_of(teacher).state_dict().keys()


@torch.no_grad()
def test_preconditioning_of_song(tmp_path):
    """D = x + c_out F(c_in x, c_noise) as EDM's table 1 has it for VP and VE."""
    x, sigma = torch.randn(3, 3, 8, 8).double(), torch.tensor([0.03, 1.0, 60.0]).double()
    level = sigma[:, None, None, None]
    vp = teacher_and_pickle(tmp_path, "vp")[0].double()
    t = ((0.1**2 + 2 * 19.9 * torch.log1p(sigma**2)).sqrt() - 0.1) / 19.9
    expected = x - level * vp.net(x / (1 + level**2).sqrt(), 999 * t, None)
    # 1e-5: the network is told its time in float64 here, through two roots.
    assert torch.allclose(vp(x, sigma), expected, atol=1e-5, rtol=1e-8)
    ve = teacher_and_pickle(tmp_path, "ve")[0].double()
    expected = x + level * network_of(ve)(x, (sigma / 2).log(), None)
    assert torch.allclose(ve(x, sigma), expected, atol=1e-8)


def test_edm2_with_its_latents(tmp_path):
    torch.manual_seed(2)
    arguments = {**SMALL, "img_channels": 4, "model_channels": 64, "use_fp16": True, "sigma_data": 0.5}
    config = from_arguments("edm2", arguments)
    teacher = build_edm(config, Preconditioning()).eval()
    with torch.no_grad():
        network_of(teacher).out_gain.fill_(1.0)
        teacher.half()
    encoder = edm_pickles.Persistent("StabilityVAEEncoder", {"final_std": 0.5}, scale=np.ones(4, np.float32))
    attributes = {"slot": "unet", "extra": {"encoder": encoder}, "sigma_data": 0.5}
    path = write_pickle(tmp_path / "edm2.pkl", teacher, "Precond", "UNet", arguments, **attributes)
    read, info = read_edm(path)
    assert isinstance(read, EDMDenoiser)
    x, sigma = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 5.0])
    labels = torch.tensor([1, -1])
    assert_same_but_for_rounding(read(x, sigma, labels), teacher.float()(x, sigma, labels))
    assert info["class"] == "Precond"
    # Latents of standard deviation 0.5 around 0: raw latents at mean and one deviation away.
    scale, shift = torch.tensor(info["latents"]["scale"]), torch.tensor(info["latents"]["shift"])
    assert torch.allclose(
        (torch.tensor([5.81 + 4.17, 3.25, 0.12, -2.15]) - shift) * scale, torch.tensor([0.5, 0, 0, 0])
    )


def test_students_copy_train_and_save_an_external_network(tmp_path):
    teacher, _ = teacher_and_pickle(tmp_path, "edm")
    student = copy.deepcopy(teacher).requires_grad_(True)
    x, sigma = torch.randn(4, 3, 8, 8), torch.full((4,), 80.0)
    student(x, sigma, torch.tensor([0, 1, 0, 1])).square().mean().backward()
    moved = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in student.parameters()]
    assert sum(moved) > 0.9 * len(moved)
    torch.optim.SGD(student.parameters(), 1e-2).step()
    save_denoiser(tmp_path / "run" / "model", student, {"kind": "student", "levels": [80.0]})
    back, extra = load_denoiser(tmp_path / "run")
    assert extra == {"kind": "student", "levels": [80.0]}
    assert_same_but_for_rounding(back(x, sigma), student.eval()(x, sigma))
    assert not torch.equal(back(x, sigma), teacher(x, sigma))


@pytest.mark.parametrize(
    "config", [network("song", model_channels=16, **NCSNPP).config, EDM2Config(resolution=8, channels=3)]
)
def test_configs_survive_json(config):
    assert config_from(config_dict(config)) == config
