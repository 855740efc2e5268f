"""Feature spaces: the cached classifier on the digits, pooling of large images, and what users get wrong."""

import json

import pytest
import torch

from distmatch import data
from distmatch.base import seeds
from distmatch.base.errors import UserError
from distmatch.base.files import cache_folder
from distmatch.metrics import Features, classifier_features, pixels, reference_labels, resolve_features
from distmatch.metrics.classifier import load_or_train
from distmatch.metrics.reference import stratified_order
from tests.helpers.rounding import assert_same_but_for_rounding


@pytest.fixture(scope="module")
def digits():
    return data.digits()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "classifiers"  # other test files train the same one


@pytest.fixture(scope="module")
def features(digits, cache):
    return classifier_features(digits, cache)


@pytest.fixture
def few(digits, monkeypatch):
    """A quick training, for what does not depend on its quality."""
    monkeypatch.setitem(load_or_train.__globals__, "_STEPS", (20, 20))
    return digits.subset(torch.arange(200))


def test_digits_classifier_is_accurate_on_held_out_samples(digits, features):
    assert features.heldout_accuracy.value > 0.95
    assert features.heldout_accuracy.n == 179
    x, labels = digits.batch(torch.arange(len(digits)))
    assert float((features.predict(x) == labels).float().mean()) > 0.97
    values = features(x)
    assert values.shape == (1797, 32)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.std(0), torch.ones(32), rtol=0.1, atol=0)


def test_second_use_reads_the_cache_and_gives_the_same_numbers(digits, features, cache, monkeypatch):
    monkeypatch.setitem(load_or_train.__globals__, "_train", None)  # training now would fail
    again = classifier_features(data.digits(), cache)
    x = digits.batch(torch.arange(50))[0]
    assert_same_but_for_rounding(again(x), features(x))
    assert again.heldout_accuracy == features.heldout_accuracy


def test_other_content_is_trained_anew(few, tmp_path):
    classifier_features(few, tmp_path)
    classifier_features(few.subset(torch.arange(199)), tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["truncate", "other", "json", "fields"])
def test_a_damaged_cache_is_trained_over(few, tmp_path, damage):
    x = few.batch(torch.arange(20))[0]
    first = classifier_features(few, tmp_path)(x)
    weights, facts = next(tmp_path.glob("*.safetensors")), next(tmp_path.glob("*.json"))
    if damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "other":
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
    elif damage == "json":
        facts.write_text("{")
    else:
        facts.write_text("[]")
    assert_same_but_for_rounding(classifier_features(few, tmp_path)(x), first)
    assert "sha256" in json.loads(facts.read_text())  # and the cache is whole again


def test_a_cache_that_cannot_be_written_costs_only_time(few, tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert classifier_features(few, tmp_path / "file").heldout_accuracy.n == 20


def test_training_is_deterministic_and_leaves_the_global_stream_alone(few, tmp_path):
    x = few.batch(torch.arange(20))[0]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = classifier_features(few, tmp_path / "a")(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(123)
    assert torch.equal(classifier_features(few, tmp_path / "b")(x), first)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DISTMATCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "distmatch"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "distmatch")


def test_larger_images_get_a_convolutional_net_with_64_features(tmp_path, monkeypatch):
    monkeypatch.setitem(load_or_train.__globals__, "_STEPS", (5, 5))
    x = torch.randint(0, 256, (40, 30, 28, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = data.from_arrays(x, torch.arange(40) % 2)
    assert classifier_features(images, tmp_path)(images.batch(torch.arange(40))[0]).shape == (40, 64)


def test_pixels_flatten_and_large_images_are_averaged():
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels()(x), x.flatten(1))
    assert pixels()(torch.ones(2, 3, 32, 32)).shape == (2, 3 * 16 * 16)
    assert (pixels()(torch.ones(2, 3, 64, 64)) == 1).all()


def test_video_and_sequences_are_averaged_in_space_then_time_and_along_their_length():
    g = torch.Generator().manual_seed(0)
    small = torch.randn(2, 1, 8, 8, 8, generator=g)
    assert torch.equal(pixels()(small), small.flatten(1))
    clips = torch.randn(2, 3, 4, 16, 16, generator=g)
    by_hand = clips.reshape(2, 3, 4, 8, 2, 8, 2).mean((4, 6)).flatten(1)
    torch.testing.assert_close(pixels()(clips), by_hand)
    long = torch.randn(2, 3, 2048, 1, 1, generator=g)  # no more to halve in space
    by_hand = long.reshape(2, 3, 256, 8).mean(3).flatten(1)
    torch.testing.assert_close(pixels()(long), by_hand)
    walks = torch.randn(2, 1000, 3, generator=g)
    by_hand = walks.reshape(2, 250, 4, 3).mean(2).transpose(1, 2).flatten(1)
    torch.testing.assert_close(pixels()(walks), by_hand)
    assert pixels()(torch.randn(2, 3000)).shape == (2, 3000)  # vectors have no neighbours to average


@pytest.mark.parametrize(("shape", "kind"), [((40, 6, 9, 8, 3), "video"), ((40, 150, 2), "sequence")])
def test_larger_video_and_sequences_get_a_convolutional_net_too(shape, kind, tmp_path, monkeypatch):
    monkeypatch.setitem(load_or_train.__globals__, "_STEPS", (5, 5))
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    found = data.from_arrays(x, torch.arange(40) % 2, kind=kind)
    space = classifier_features(found, tmp_path)
    batch = found.batch(torch.arange(40))[0]
    assert space(batch).shape == (40, 64)
    assert_same_but_for_rounding(classifier_features(found, tmp_path)(batch), space(batch))
    swapped = batch.flip(2 if kind == "video" else 1)  # time backwards
    assert float((space(swapped) - space(batch)).abs().mean()) > 0.1


def test_automatic_choice(few, monkeypatch, tmp_path):
    monkeypatch.setenv("DISTMATCH_CACHE", str(tmp_path))
    assert resolve_features("auto", few).name == "classifier"
    assert resolve_features("auto", few.without_labels()).name == "pixels"
    assert resolve_features("auto", None).name == "pixels"
    assert resolve_features("auto", data.toy_dataset("ring8", 100)).name == "pixels"
    ready = Features("mine", lambda x: x.flatten(1))
    assert resolve_features(ready, None) is ready


def test_users_mistakes(few):
    with pytest.raises(UserError, match="labeled reference"):
        resolve_features("classifier", few.without_labels())
    with pytest.raises(UserError, match="labeled reference"):
        resolve_features("classifier", None)
    with pytest.raises(UserError, match="classifier"):
        resolve_features("clasifier", few)
    with pytest.raises(UserError, match="wrong shape"):
        resolve_features(lambda x: x, few)(torch.zeros(5, 1, 8, 8))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(UserError, match="NaN or infinity in 5 of 5"):
            resolve_features(lambda x, bad=bad: x.flatten(1) + bad, few)(torch.ones(5, 1, 8, 8))
    with pytest.raises(UserError, match="no classifier"):
        pixels().predict(torch.zeros(1, 2))


def test_every_slice_of_a_stratified_order_has_the_shares_of_the_labels():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([600, 300, 100]))
    order = stratified_order(labels, 1000, seeds.generator(0, "test"))
    assert torch.equal(order.sort().values, torch.arange(1000))
    for part in order.split(100):
        counts = torch.bincount(labels[part], minlength=3)
        assert ((counts - torch.tensor([60, 30, 10])).abs() <= 2).all()
    other = stratified_order(labels, 1000, seeds.generator(1, "test"))
    assert (order[:100, None] == other[None, :100]).sum() < 30  # random, not the same samples each time


def test_reference_labels_keep_the_shares_and_repeat(digits):
    labels = reference_labels(digits, 4000, seed=3)
    counts = torch.bincount(digits.labels, minlength=10) * 4000 / 1797
    assert ((torch.bincount(labels, minlength=10) - counts).abs() < 3).all()
    with pytest.raises(UserError, match="no labels"):
        reference_labels(digits.without_labels(), 5)
