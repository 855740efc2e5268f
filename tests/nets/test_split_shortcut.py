"""Layers split at a shortcut, and U-Nets rewritten with them. All with seed 0."""

import copy

import pytest
import torch
from torch import Tensor, nn

from distmatch.base.errors import UserError
from distmatch.nets.build import build_net
from distmatch.nets.config import UNetConfig
from distmatch.nets.edm import EDMDenoiser
from distmatch.nets.saved import load_model, save_model
from distmatch.nets.split_shortcut import SplitLayer, split_layer, split_shortcuts
from distmatch.nets.unet import UNet
from tests.helpers.rounding import assert_same_but_for_rounding

# Sums in another order: float64 rounding of outputs of size 10.
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def conv(bias: bool, **options: object) -> nn.Conv2d:
    return nn.Conv2d(7, 5, 3, bias=bias, dtype=torch.float64, **options)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("index", [1, 3, 6])
@pytest.mark.parametrize("kind", ["padded", "strided", "circular", "linear"])
def test_the_sum_of_the_parts_is_the_layer(kind: str, index: int, bias: bool) -> None:
    torch.manual_seed(0)
    layers = {
        "padded": lambda: conv(bias, padding=1),
        "strided": lambda: conv(bias, stride=2, dilation=2),
        "circular": lambda: conv(bias, padding=2, padding_mode="circular"),
        "linear": lambda: nn.Linear(7, 5, bias=bias, dtype=torch.float64),
    }
    whole = layers[kind]()
    split = split_layer(whole, index)
    x = torch.randn((3, 7, 9, 11) if kind != "linear" else (3, 4, 7), dtype=torch.float64) * 3
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = split(ours), whole(theirs)
    torch.testing.assert_close(out, expected, **EXACT)

    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (expected * direction).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **EXACT)
    both = torch.cat([split.first.weight.grad, split.second.weight.grad], dim=1)
    torch.testing.assert_close(both, whole.weight.grad, **EXACT)
    assert split.second.bias is None  # once, in the first part
    if bias:
        torch.testing.assert_close(split.first.bias.grad, whole.bias.grad, **EXACT)


def unet(shape: tuple[int, int, int] = (3, 7, 9), dtype: torch.dtype = torch.float64) -> UNet:
    torch.manual_seed(0)
    net = build_net(UNetConfig(width=8, multipliers=(1, 2, 3), blocks=2, attention=(1,)), shape, 3)
    for parameter in net.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
        nn.init.normal_(parameter, std=fan_in**-0.5)
    assert isinstance(net, UNet)
    return net.to(dtype).eval()


def inputs(shape: tuple[int, int, int] = (3, 7, 9)) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(4, *shape, dtype=torch.float64)
    return x, torch.randn(4, dtype=torch.float64) / 2, torch.tensor([-1, 0, 1, 2])


@pytest.mark.parametrize("shape", [(3, 7, 9), (1, 8, 8), (2, 1, 5)])
def test_a_rewritten_unet_is_the_unet(shape: tuple[int, int, int]) -> None:
    net = unet(shape)
    before = copy.deepcopy(net.state_dict())
    changed = split_shortcuts(net)
    args = inputs(shape)
    (out, maps), (expected, expected_maps) = (
        changed(*args, return_features=True),
        net(*args, return_features=True),
    )
    assert expected.std() > 0.1
    torch.testing.assert_close(out, expected, **EXACT)
    for ours, theirs in zip(maps, expected_maps, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])  # the original is left as it was
    count = sum(p.numel() for p in net.parameters())
    assert sum(p.numel() for p in changed.parameters()) == count


def test_the_cut_is_where_the_shortcut_begins() -> None:
    net = unet()
    widths: list[int] = []  # of what comes from below, as the network itself makes it

    def seen(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        widths.append(out.shape[1])

    for block in [net.middle[-1], *net.up]:
        block.register_forward_hook(seen)
    net(*inputs())
    cuts = [None if b.resample == "up" else w for b, w in zip(net.up, widths, strict=False)]
    changed = split_shortcuts(net)
    assert [getattr(b.conv_in, "index", None) for b in changed.up] == cuts
    assert [getattr(b.skip, "index", None) for b in changed.up] == cuts
    splits = [m for m in changed.modules() if isinstance(m, SplitLayer)]
    assert len(splits) == 2 * 3 * (2 + 1)  # conv_in and skip, three levels of blocks + 1


def quantized(x: Tensor, bits: int = 4) -> Tensor:
    """``x`` on the 2^bits even levels between its least and its largest value."""
    low, high = x.min(), x.max()
    step = (high - low) / (2**bits - 1)
    return low + step * ((x - low) / step).round()


def test_a_range_for_each_half_is_finer_than_one_for_both() -> None:
    # Halves of spread 1 and 50: at 4 bits one range for both rounds the narrow half away.
    torch.manual_seed(0)
    whole = nn.Conv2d(8, 4, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        whole.weight[:, :4] *= 50  # and the narrow half matters as much
    x = torch.cat([torch.randn(6, 4, 9, 9), 50 * torch.randn(6, 4, 9, 9)], dim=1).double()
    split = split_layer(whole, 4)
    for part in (split.first, split.second):
        part.weight.data = quantized(part.weight.data)
        part.register_forward_pre_hook(lambda module, args: (quantized(args[0]),))
    exact, apart = whole(x), split(x)
    whole.weight.data = quantized(whole.weight.data)
    together = whole(quantized(x))
    error = [(out - exact).square().mean().sqrt() / exact.std() for out in (apart, together)]
    assert error[0] < 0.25
    assert error[1] > 2.5 * error[0]


def test_weights_of_a_rewritten_unet_are_kept_by_rewriting_again(tmp_path) -> None:
    net = unet(dtype=torch.float32)
    denoiser = EDMDenoiser(net, shape=(3, 7, 9), num_classes=3, sigma_data=0.5)
    changed = split_shortcuts(net)
    save_model(tmp_path / "model", denoiser)
    loaded, _ = load_model(tmp_path / "model")
    again = split_shortcuts(loaded.net)
    x, c_noise, labels = inputs()
    assert_same_but_for_rounding(
        again(x.float(), c_noise.float(), labels), changed(x.float(), c_noise.float(), labels)
    )
    fresh = split_shortcuts(unet((3, 7, 9), torch.float32))
    nn.init.zeros_(fresh.last.weight)
    fresh.load_state_dict(changed.state_dict())
    assert torch.equal(fresh.last.weight, net.last.weight)
    denoiser.net = changed
    with pytest.raises(UserError, match=r"split.*save the network as it was"):
        save_model(tmp_path / "split", denoiser)


def test_bad_input() -> None:
    for index in (0, 7, -1):
        with pytest.raises(UserError, match="above 0 and below 7"):
            split_layer(conv(True), index)
    with pytest.raises(UserError, match="groups=7"):
        split_layer(nn.Conv2d(7, 7, 3, groups=7), 3)
    with pytest.raises(UserError, match="split already"):
        split_shortcuts(split_shortcuts(unet()))
