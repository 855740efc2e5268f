"""Networks: shapes, features, conditioning, gradients, dtypes, compilation. All with seed 0."""

import os
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distmatch.nets.build import build_net
from distmatch.nets.config import (
    DiTConfig,
    MLPConfig,
    NetConfig,
    UNetConfig,
)
from distmatch.nets.dit import DiTBlock, position_table
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.layers import SelfAttention, crop, fourier_features, pad_to_multiple
from distmatch.nets.mlp import MLPBlock

VECTORS = [(2,), (64,)]
IMAGES = [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 7, 9), (1, 1, 1)]
OTHERS = [(9, 3), (1, 4, 8, 8), (3, 3, 5, 7)]  # sequences and video
SMALL: dict[str, NetConfig] = {
    "mlp": MLPConfig(width=16, depth=3),
    "unet": UNetConfig(width=8, multipliers=(1, 2, 2), blocks=1, attention=(1,)),
    "dit": DiTConfig(patch=2, width=16, depth=3, heads=2),
}
TAKEN = {"mlp": (1, 2, 3, 4), "unet": (3,), "dit": (2, 3, 4)}
CASES = [(kind, shape) for kind in SMALL for shape in VECTORS + IMAGES + OTHERS if len(shape) in TAKEN[kind]]
KINDS = [("mlp", (6,)), ("unet", (2, 7, 9)), ("dit", (2, 7, 9)), ("dit", (7, 3)), ("dit", (2, 3, 5, 7))]


def randomized(module: nn.Module) -> nn.Module:
    """Gives every weight, also those that start at zero, a random value that keeps activations near 1."""
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    return module


def make(kind: str, shape: tuple[int, ...], classes: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return randomized(build_net(SMALL[kind], shape, classes)).eval()


def batch(
    shape: tuple[int, ...], n: int = 4, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, *shape, generator=g, dtype=dtype)
    c_noise = torch.randn(n, generator=g, dtype=dtype) / 2
    return x, c_noise, torch.arange(n) % 4 - 1


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_shapes_and_features(kind: str, shape: tuple[int, ...]) -> None:
    net = make(kind, shape)
    x, c_noise, labels = batch(shape)
    out, features = net(x, c_noise, labels, return_features=True)
    assert out.shape == x.shape
    assert torch.equal(out, net(x, c_noise, labels))  # the same operations, so the same bits
    assert out.isfinite().all()
    assert out.std() > 0.01
    assert features
    for feature in features:
        assert len(feature) == len(x)
        assert feature.ndim == (2 if kind == "mlp" else x.ndim)


def test_unet_lends_one_map_per_resolution_and_dit_its_grid() -> None:
    x, c_noise, _ = batch((3, 30, 18))
    _, maps = make("unet", (3, 30, 18))(x, c_noise, return_features=True)
    assert [tuple(f.shape[1:]) for f in maps] == [(8, 32, 20), (16, 16, 10), (16, 8, 5)]
    x, c_noise, _ = batch((3, 7, 9))
    _, maps = make("dit", (3, 7, 9))(x, c_noise, return_features=True)
    assert [tuple(f.shape[1:]) for f in maps] == [(16, 4, 5), (16, 4, 5)]
    for shape, grid in (((9, 3), (5, 16)), ((1, 3, 7, 9), (16, 2, 4, 5))):  # tokens; a map in space and time
        x, c_noise, _ = batch(shape)
        _, maps = make("dit", shape)(x, c_noise, return_features=True)
        assert [tuple(f.shape[1:]) for f in maps] == [grid, grid]


@pytest.mark.parametrize("shape", [(6, 3), (3, 4, 6), (2, 4, 2, 6)])
def test_patches_are_those_of_torch_s_windows(shape: tuple[int, ...]) -> None:
    """Cut by ``unfold`` along each axis; joined again they are the sample."""
    net, (x, _, _) = make("dit", shape), batch(shape)
    maps = windows = x.transpose(1, 2) if len(shape) == 2 else x
    axes = maps.ndim - 2
    for axis in range(2, 2 + axes):
        windows = windows.unfold(axis, 2, 2)
    expected = windows.movedim(1, 1 + axes).flatten(1, axes).flatten(2)
    assert torch.equal(net._cut(maps), expected)
    assert torch.equal(net._joined(expected), maps)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_a_fresh_network_returns_exactly_zero(kind: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, c_noise, labels = batch(shape)
    assert not build_net(SMALL[kind], shape, 3)(x, c_noise, labels).any()


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_conditioning(kind: str, shape: tuple[int, ...]) -> None:
    net = make(kind, shape)
    x, c_noise, _ = batch(shape)
    none = net(x, c_noise, torch.full((4,), -1))
    assert torch.equal(none, net(x, c_noise))
    outs = [none] + [net(x, c_noise, torch.full((4,), k)) for k in range(3)]
    for i in range(4):
        for j in range(i):
            assert (outs[i] - outs[j]).abs().mean() > 1e-3  # float32 rounding: 1e-7
    assert (none - net(x, c_noise + 0.1)).abs().mean() > 1e-3
    # Labels act sample by sample.
    mixed = net(x, c_noise, torch.tensor([-1, 0, 1, 2]))
    for i in range(4):
        torch.testing.assert_close(mixed[i], outs[i][i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
@pytest.mark.parametrize("classes", [0, 3])
def test_every_parameter_gets_a_gradient(kind: str, shape: tuple[int, ...], classes: int) -> None:
    torch.manual_seed(0)
    net = randomized(build_net(SMALL[kind], shape, classes))
    x, c_noise, labels = batch(shape)
    net(x, c_noise, labels if classes else None).square().sum().backward()
    dead = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert dead == []


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_float64_gradients_agree_with_finite_differences(kind: str, shape: tuple[int, ...]) -> None:
    net = make(kind, shape).double()
    x, c_noise, labels = batch(shape, 2, torch.float64)
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(x.shape, generator=g, dtype=torch.float64)

    def along(step: Tensor, c: Tensor) -> Tensor:
        return net(x + step * direction, c, labels).sum(dim=tuple(range(1, x.ndim)))

    step = torch.zeros((), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (step, c_noise.requires_grad_()))


def test_dropout_acts_in_training_only() -> None:
    shape = (2, 8, 8)
    x, c_noise, labels = batch(shape)
    for config in (MLPConfig(width=16, dropout=0.5), UNetConfig(width=8, multipliers=(1,), dropout=0.5)):
        net = randomized(build_net(config, shape, 3))
        assert not torch.equal(net(x, c_noise, labels), net(x, c_noise, labels))
        net.eval()
        assert torch.equal(net(x, c_noise, labels), net(x, c_noise, labels))


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_bfloat16(kind: str, shape: tuple[int, ...]) -> None:
    denoiser = EDMDenoiser(make(kind, shape), shape=shape, num_classes=3)
    x, _, labels = batch(shape)
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    exact, _ = denoiser(x, sigma, labels, return_features=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quick, _ = denoiser(x, sigma, labels, return_features=True)
    cast = EDMDenoiser(make(kind, shape).bfloat16(), shape=shape, num_classes=3)(x.bfloat16(), sigma, labels)
    # bfloat16 has 8 bits: 2^-9 a rounding, and about ten layers add up. c_out <= sigma_data = 0.5 scales it.
    for rounded, tolerance in ((quick, 0.05), (cast, 0.08)):
        assert rounded.dtype == torch.float32
        assert not torch.equal(rounded, exact)
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=tolerance)
    # At sigma = 0.01 almost all of D is c_skip x, which never passes through bfloat16 under autocast.
    torch.testing.assert_close(quick[0], exact[0], rtol=0, atol=1e-3)


def test_noise_features_stay_exact_under_autocast_and_in_bfloat16() -> None:
    c_noise = torch.linspace(-1.55, 1.1, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = fourier_features(c_noise)
    assert features.dtype == torch.float32
    steps = torch.arange(32, dtype=torch.float64) / 31
    angle = c_noise.double()[:, None] * 0.5 * 64.0**steps
    torch.testing.assert_close(features.double(), torch.cat([angle.cos(), angle.sin()], 1), rtol=0, atol=1e-5)
    # Noise levels 5 % apart are told apart everywhere: a step of 0.012 in c_noise.
    apart = (fourier_features(c_noise + 0.0122) - features).norm(dim=1)
    assert apart.min() > 0.3


def test_attention_is_softmax_attention() -> None:
    torch.manual_seed(0)
    layer = SelfAttention(6, 2).double()
    tokens = torch.randn(3, 5, 6, dtype=torch.float64)
    q, k, v = layer.qkv(tokens).split(6, dim=2)
    heads = []
    for part in (slice(0, 3), slice(3, 6)):
        weights = (q[..., part] @ k[..., part].mT / 3**0.5).softmax(dim=-1)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(layer(tokens), layer.out(torch.cat(heads, dim=2)))


def test_dit_patches_and_positions() -> None:
    # Without positions and modulation a DiT commutes with a swap of patches; with positions it does not.
    net = make("dit", (1, 4, 4)).double()
    x, c_noise, _ = batch((1, 4, 4), dtype=torch.float64)
    swapped = (
        x.flip(2).view(4, 1, 2, 2, 4).flip(3).reshape(x.shape)
    )  # exchanges the upper and the lower patches

    def difference() -> Tensor:
        out = net(swapped, c_noise).view(4, 1, 2, 2, 4).flip(3).reshape(x.shape).flip(2)
        return (out - net(x, c_noise)).abs().max()

    assert difference() > 0.01
    net.positions.data.zero_()
    assert difference() < 1e-12
    # The table is a Gram matrix of cosines: rows and columns are separable, and equal positions are nearest.
    table = position_table((3, 4), 16).double()
    gram = table @ table.T
    torch.testing.assert_close(gram.diagonal(), torch.full((12,), 8.0, dtype=torch.float64))
    assert (gram - torch.diag(torch.full((12,), torch.inf))).max() < 8 - 0.1
    # On three axes the cosines of each axis add up, and what the width leaves over is zero.
    table = position_table((2, 3, 2), 20).double()
    assert not table[:, 18:].any()
    at = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (2, 3, 2)))
    frequencies = 10_000.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    apart = (at[:, None] - at)[..., None] * frequencies
    torch.testing.assert_close(table @ table.T, apart.cos().sum((2, 3)), rtol=1e-5, atol=1e-5)


def test_a_fresh_transformer_block_is_the_identity() -> None:
    block, tokens = DiTBlock(8, 2), torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(tokens, torch.ones(2, 8)), tokens)  # all gates are zero: "adaLN-zero"


def test_unet_sees_shifted_images_alike() -> None:
    # A convolutional net without borders in reach is equivariant to shifts by its coarsest stride.
    torch.manual_seed(0)
    config = UNetConfig(width=4, multipliers=(1, 1), blocks=1, attention=())
    net = randomized(build_net(config, (1, 32, 32), 0)).eval().double()
    for module in net.modules():
        if isinstance(module, SelfAttention | nn.GroupNorm):  # both look at the whole image
            module.forward = lambda x: x * 0.5  # type: ignore[method-assign]
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    x[..., 15:17, 15:17] = 1
    c_noise = torch.zeros(1, dtype=torch.float64)
    base = net(torch.zeros_like(x), c_noise)
    response = net(x, c_noise) - base
    moved = net(x.roll(2, dims=3), c_noise) - base
    torch.testing.assert_close(moved, response.roll(2, dims=3))
    assert (net(x.roll(1, dims=3), c_noise) - base - response.roll(1, dims=3)).abs().max() > 1e-3


def test_modulation_in_closed_form() -> None:
    # A block whose linear layers are the identity, with a scale and a shift of our choice.
    torch.manual_seed(0)
    block = MLPBlock(4, 0.0).double()
    scale, shift = torch.randn(2, 4, dtype=torch.float64)
    nn.init.zeros_(block.modulation.weight)
    block.modulation.bias.data = torch.cat([scale, shift])
    for layer in (block.first, block.last):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    hidden = torch.randn(5, 4, dtype=torch.float64)
    centered = hidden - hidden.mean(1, keepdim=True)
    unit = centered / (centered.square().mean(1, keepdim=True) + 1e-5).sqrt()
    expected = hidden + F.silu(F.silu(unit * (1 + scale) + shift))
    torch.testing.assert_close(block(hidden, torch.zeros(5, 4, dtype=torch.float64)), expected)


def test_unet_keeps_detail_by_its_skips_and_lends_live_features() -> None:
    torch.manual_seed(0)
    net = randomized(build_net(UNetConfig(width=4, multipliers=(1, 1), blocks=1), (1, 8, 8), 0)).eval()
    x, c_noise, _ = batch((1, 8, 8))
    x.requires_grad_()
    # Every map is still connected to the input: a discriminator on it can teach a generator.
    out, maps = net(x, c_noise, return_features=True)
    for feature in (out, *maps):
        (gradient,) = torch.autograd.grad(feature.square().sum(), x, retain_graph=True)
        assert gradient.abs().mean() > 1e-4
    # With the coarse level silenced, a pixel pattern that averaging removes still gets through.
    for block in [*net.down[1:], *net.middle, *net.up[:3]]:
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
    pattern = torch.ones(8, 8)
    pattern[::2] *= -1
    pattern[:, ::2] *= -1
    quiet = net(torch.zeros(4, 1, 8, 8), c_noise)
    assert (net(pattern.expand(4, 1, 8, 8), c_noise) - quiet).abs().mean() > 0.05


def test_padding_is_even_and_undone_by_crop() -> None:
    x = torch.randn(2, 1, 5, 7, generator=torch.Generator().manual_seed(0))
    padded, offset = pad_to_multiple(x, 4)
    assert padded.shape == (2, 1, 8, 8)
    assert offset == (1, 0)
    assert torch.equal(crop(padded, offset, (5, 7)), x)
    assert padded.sum() == pytest.approx(x.sum().item(), abs=1e-5)
    same, offset = pad_to_multiple(x[..., :4, :4], 4)
    assert same.shape[-2:] == (4, 4)
    assert offset == (0, 0)


@pytest.mark.parametrize(
    ("kind", "shape"), [pytest.param(*k, marks=[pytest.mark.slow] * (k[0] == "unet")) for k in KINDS]
)
def test_one_graph_without_breaks(kind: str, shape: tuple[int, ...]) -> None:
    denoiser = EDMDenoiser(make(kind, shape), shape=shape, num_classes=3)
    x, _, labels = batch(shape)
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    captured = torch.compile(denoiser, fullgraph=True, backend="eager")
    torch.testing.assert_close(captured(x, sigma, labels), denoiser(x, sigma, labels))


@pytest.mark.skipif("DISTMATCH_COMPILE" not in os.environ, reason="compiles C++ for half a minute or more")
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager() -> None:
    denoiser = EDMDenoiser(make("mlp", (6,)), shape=(6,), num_classes=3)
    x, _, labels = batch((6,))
    sigma = torch.tensor([0.01, 0.3, 2.0, 60.0])
    compiled = torch.compile(denoiser, fullgraph=True)
    # Fused sums in another order: a few float32 roundings.
    torch.testing.assert_close(compiled(x, sigma, labels), denoiser(x, sigma, labels), rtol=1e-5, atol=1e-5)
