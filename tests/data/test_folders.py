"""Folders of images: pixels, classes, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from distmatch.base.errors import UserError
from distmatch.data import load_data

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 7, 9), dtype=np.uint8)

COLOR = np.random.default_rng(1).integers(0, 256, (6, 7, 9, 3), dtype=np.uint8)


def exported(data):
    return data.scaling.export(data.batch(torch.arange(len(data)))[0])


def write_images(folder, arrays, suffix=".png"):
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(folder / f"{k:03}{suffix}")


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
@pytest.mark.parametrize("pixels", [IMAGES, COLOR])
def test_folders_are_read_exactly(tmp_path, pixels, suffix):
    write_images(tmp_path, pixels, suffix)
    (tmp_path / "readme.txt").write_text("no image")
    data = load_data(tmp_path)
    np.testing.assert_array_equal(exported(data), pixels)
    assert data.labels is None


def test_sub_folders_are_classes(tmp_path):
    write_images(tmp_path / "dog", IMAGES[:2])
    write_images(tmp_path / "cat", IMAGES[2:])
    write_images(tmp_path / ".thumbs", IMAGES)
    (tmp_path / "empty").mkdir()
    data = load_data(tmp_path)
    assert data.class_names == ("cat", "dog")
    assert data.labels is not None
    assert data.labels.tolist() == [0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(exported(data), IMAGES[[2, 3, 4, 5, 0, 1]])
    write_images(tmp_path, IMAGES[:1])
    with pytest.raises(UserError, match="both in itself and in sub-folders"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("folders", "words"),
    [
        (("train", "test"), r"splits of a data set.*test, train.*Fix: pass one of them: .*/train\."),
        (("Train", "VAL"), r"splits of a data set.*Fix: .*/Train\."),
        (("train/cat", "train/dog", "test/cat", "test/dog"), r"splits of a data set.*Fix: .*/train\."),
        (("train/cat", "train/dog", "val/cat", "val/dog", "extra"), r"splits of a data set.*train, val\."),
        (("train2017", "val2017", "test-images"), r"splits of a data set"),
        (("train/cat", "train/dog"), r"nested folders.*train/cat.*Fix: pass .*/train if"),
        (("cat", "cat/small", "dog"), r"nested folders.*cat/small"),
        (("cat/1/deep", "dog/1/deep"), r"nested folders.*cat/1/deep"),
        (("", "cat", "dog"), "both in itself and in sub-folders"),
    ],
)
def test_folders_of_which_it_is_unclear_what_the_classes_are(folders, words, tmp_path):
    for k, name in enumerate(folders):
        write_images(tmp_path / name, IMAGES[k % 5 : k % 5 + 2])
    with pytest.raises(UserError, match=words):
        load_data(tmp_path)


def test_the_part_that_is_named_is_read_with_its_classes(tmp_path):
    for k, name in enumerate(("train/cat", "train/dog", "test/cat", "test/dog")):
        write_images(tmp_path / name, IMAGES[k : k + 2])
    assert load_data(tmp_path / "train").class_names == ("cat", "dog")
    write_images(tmp_path / "things/train", IMAGES[:2])  # on rails
    write_images(tmp_path / "things/ship", IMAGES[2:4])
    assert load_data(tmp_path / "things").class_names == ("ship", "train")


def test_one_sub_folder_is_no_class(tmp_path):
    write_images(tmp_path / "images", IMAGES)
    assert load_data(tmp_path).labels is None


def test_alpha_is_dropped_and_grey_joins_color(tmp_path):
    alpha = np.random.default_rng(3).integers(0, 256, (7, 9, 1), dtype=np.uint8)
    write_images(tmp_path, [np.concatenate((COLOR[0], alpha), 2), IMAGES[1]])
    data = load_data(tmp_path)
    assert data.shape == (3, 7, 9)
    np.testing.assert_array_equal(exported(data)[0], COLOR[0])
    np.testing.assert_array_equal(exported(data)[1], np.stack([IMAGES[1]] * 3, -1))


def test_camera_orientation_is_applied(tmp_path):
    write_images(tmp_path, COLOR[:1])
    exif = Image.Exif()
    exif[0x0112] = 6  # the sensor was turned: what is stored must be turned clockwise to be upright
    Image.fromarray(np.ascontiguousarray(np.rot90(COLOR[1]))).save(tmp_path / "turned.png", exif=exif)
    np.testing.assert_array_equal(exported(load_data(tmp_path)), COLOR[:2])


def test_the_first_odd_image_is_named(tmp_path):
    write_images(tmp_path, [IMAGES[0], IMAGES[1], IMAGES[2, :5], IMAGES[3, :4]])
    with pytest.raises(UserError, match=r"002\.png is 9x5.*9x7"):
        load_data(tmp_path)


def test_deep_images_are_refused(tmp_path):
    write_images(tmp_path, IMAGES[:2])
    Image.fromarray(IMAGES[0].astype(np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="more than 8 bits"):
        load_data(tmp_path)


def test_folders_without_images_and_broken_images(tmp_path):
    with pytest.raises(UserError, match="no images in"):
        load_data(tmp_path)
    (tmp_path / "a.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"cannot read the image .*a\.png"):
        load_data(tmp_path)
