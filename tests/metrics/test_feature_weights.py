"""Networks whose weights are a file, with small stand-ins: the package's own values, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import save_file

from distmatch import data
from distmatch.base.errors import UserError
from distmatch.base.metric_names import CLIP, INCEPTION, published_name
from distmatch.interop.image_encoders import TORCH_FIDELITY, image_encoder
from distmatch.metrics import evaluate, resolve_features

transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}


def pixels(side):
    return torch.randint(256, (3, 3, side, side), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model of both sides, as it is published: text and images in one file."""
    folder = tmp_path_factory.mktemp("clip")
    vision = {**SMALL, "image_size": 32, "intermediate_size": 64}
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=512)
    torch.manual_seed(0)
    net = transformers.CLIPModel(config).eval()
    net.save_pretrained(folder)
    return net, folder / "model.safetensors"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(1)
    net = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, image_size=32)).eval()
    net.save_pretrained(folder)
    return net, folder / "model.safetensors"


def test_clip_gives_the_embeddings_of_the_package(clip):
    net, file = clip
    encoder = image_encoder("clip", file)
    x = pixels(32)
    prepare = transformers.CLIPImageProcessor(size={"height": 32, "width": 32}, crop_size=32)
    ready = prepare(list(x.byte()), return_tensors="pt", input_data_format="channels_first")["pixel_values"]
    with torch.no_grad():
        expected = net.visual_projection(net.vision_model(pixel_values=ready).pooler_output)
        found = encoder.network(x)
        large = encoder.network(pixels(50))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert large.shape == found.shape
    assert encoder.published == ""


def test_dinov2_gives_the_class_token_of_the_package(dinov2):
    net, file = dinov2
    encoder = image_encoder("dinov2", file)
    x = pixels(224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = net(pixel_values=(x / 255 - mean) / std).last_hidden_state[:, 0]
        torch.testing.assert_close(encoder.network(x), expected, rtol=1e-4, atol=1e-5)


def test_metrics_of_several_files(clip, dinov2, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path))
    digits = data.digits().subset(torch.arange(48))
    both = f"clip={clip[1]},dinov2={dinov2[1]}"
    space = resolve_features("pixels,clip,dinov2", digits, both)
    found = evaluate(digits.batch(torch.arange(24))[0], digits, features=space)
    assert {"fd", "fd@clip", "mmd@clip", "vendi@dinov2"} <= set(found)
    assert found["fd@clip"].features == f"clip {space.also[0].fingerprint}"
    for weights in ("clip=", f"dinov2={dinov2[1]}", "x.pth"):
        with pytest.raises(UserError):
            resolve_features("pixels,clip", digits, weights)
    with pytest.raises(UserError, match="need no file"):
        resolve_features("pixels", digits, str(clip[1]))


def test_files_that_do_not_fit_are_refused(clip, dinov2, tmp_path):
    with pytest.raises(UserError, match="need a file of weights"):
        image_encoder("clip")
    with pytest.raises(UserError, match="come with its package"):
        image_encoder("efficientnet-lite0", clip[1])
    alone = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(1)}, alone)
    with pytest.raises(UserError, match=r"config\.json"):
        image_encoder("clip", alone)
    (tmp_path / "config.json").write_text((dinov2[1].parent / "config.json").read_text())
    with pytest.raises(UserError, match="does not hold the weights"):  # all of them would be random
        image_encoder("dinov2", alone)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": "much"}))
    with pytest.raises(UserError, match="does not hold the weights"):
        image_encoder("dinov2", alone)


@pytest.mark.skipif(TORCH_FIDELITY.version is None, reason="torch-fidelity is not installed")
def test_inception_is_that_of_torch_fidelity_and_fid_is_for_its_weights_alone(tmp_path, monkeypatch):
    module = TORCH_FIDELITY.part("feature_extractor_inceptionv3")
    kind = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # its constructor would download weights
        patch.setattr(kind, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *a, **k: {})
        net = kind("inception-v3-compat", ["2048"])
    save_file(net.state_dict(), tmp_path / "inception.safetensors")
    encoder = image_encoder("inception", tmp_path / "inception.safetensors")
    x = pixels(32)[:2]
    torch.testing.assert_close(encoder.network(x), net(x.byte())[0], rtol=1e-4, atol=1e-5)
    assert encoder.published == ""
    assert "no FID" in encoder.about
    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="does not hold the weights"):
        image_encoder("inception", tmp_path / "other.safetensors")


def test_names_of_the_literature_are_for_exact_networks():
    assert published_name("fd@inception", f"{INCEPTION} 12345678") == "FID"
    assert published_name("mmd", f"{CLIP} 12345678") == "CMMD"
    assert published_name("fd", "inception 12345678") is None
    assert published_name("mmd", "clip 12345678") is None
