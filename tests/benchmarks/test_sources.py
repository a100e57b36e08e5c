"""The user's archives: what is taken, and what each defect is answered with."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import sources
from benchmarks.folders import data_digest
from benchmarks.jobs import load_data
from benchmarks.protocols import find_protocol
from benchmarks.record import Expected
from benchmarks.settings import InputError
from benchmarks.sources import read_digits, read_npz

ANY = Expected()


def write(path, arrays, **changes):
    np.savez(path, **{key: value for key, value in (arrays | changes).items() if value is not None})
    return path


def test_a_valid_archive_comes_back_exactly(tmp_path, arrays):
    data = read_npz(write(tmp_path / "a.npz", arrays), ANY)
    np.testing.assert_array_equal(data.x_train[:, 0].numpy(), arrays["x_train"])
    assert data.y_test.tolist() == arrays["y_test"].tolist()
    assert (data.n_classes, data.x_train.dtype) == (4, torch.uint8)


def test_colour_images_get_channels_first_and_column_labels_are_taken(tmp_path, arrays):
    colour = {key: np.stack([arrays[key]] * 3, axis=3) for key in ("x_train", "x_test")}
    colour["x_train"][:, :, :, 1] = 7
    columns = {key: arrays[key][:, None] for key in ("y_train", "y_test")}
    data = read_npz(write(tmp_path / "a.npz", arrays | colour | columns), ANY)
    assert data.x_train.shape == (24, 3, 5, 4)
    assert (data.x_train[:, 1] == 7).all()
    assert data.y_train.shape == (24,)


BAD = {
    "missing key": ({"y_test": None}, ["'y_test'", "missing", "found"]),
    "float images": ({"x_train": np.zeros((24, 5, 4))}, ["'x_train'", "float64", "uint8"]),
    "flat images": ({"x_test": np.zeros((12, 20), np.uint8)}, ["'x_test'", "[12, 20]", "[n, h, w]"]),
    "no images": ({"x_test": np.zeros((0, 5, 4), np.uint8)}, ["'x_test'", "n >= 1"]),
    "float labels": ({"y_train": np.zeros(24)}, ["'y_train'", "float64", "integers"]),
    "too few labels": ({"y_train": np.zeros(9, int)}, ["'y_train'", "[9]", "[24]"]),
    "gap in labels": ({"y_test": np.array([0, 1, 2, 5] * 3)}, ["'y_test'", "each of 0 .. 3"]),
    "other size": ({"x_test": np.zeros((12, 6, 4), np.uint8)}, ["'x_test'", "[12, 6, 4]", "[5, 4]"]),
    "objects": ({"x_test": np.array([None])}, ["not a readable"]),
}


@pytest.mark.parametrize("name", BAD)
def test_each_defect_is_named(tmp_path, arrays, name):
    changes, fragments = BAD[name]
    path = write(tmp_path / "bad.npz", arrays, **changes)
    with pytest.raises(InputError) as caught:
        read_npz(path, ANY)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_what_a_protocol_expects_is_checked(tmp_path, arrays):
    path = write(tmp_path / "a.npz", arrays)
    for expected, fragment in (
        (Expected(height_width=(28, 28), channels=1), "[n, 28, 28]"),
        (Expected(height_width=(5, 4), channels=3), "[n, 5, 4, 3]"),
        (Expected(n_classes=10), "each of 0 .. 9"),
        (Expected(coarse=True), "'coarse'"),
    ):
        with pytest.raises(InputError) as caught:
            read_npz(path, expected)
        assert fragment in str(caught.value)


@pytest.mark.parametrize("coarse", [np.array([0, 0, 1]), np.array([0, 0, 0, 1]), np.zeros(4)])
def test_superclasses_must_fit(tmp_path, arrays, coarse):
    with pytest.raises(InputError, match="coarse"):
        read_npz(write(tmp_path / "a.npz", arrays, coarse=coarse), Expected(coarse=True))


def test_no_archive_and_no_file(tmp_path):
    text = tmp_path / "text.npz"
    text.write_text("not an archive")
    with pytest.raises(InputError, match="not a readable"):
        read_npz(text, ANY)
    with pytest.raises(InputError, match="does not exist"):
        read_npz(tmp_path / "none.npz", ANY)


def test_digits_are_divided_by_position():
    from sklearn.datasets import load_digits

    digits, data = load_digits(), read_digits()
    test = np.arange(1797) % 5 == 4
    np.testing.assert_array_equal(data.x_test[:, 0].numpy(), digits.images[test])
    np.testing.assert_array_equal(data.x_train[:, 0].numpy(), digits.images[~test])
    assert data.y_test.tolist() == digits.target[test].tolist()


def test_downloaded_images_are_those_of_a_file(monkeypatch, tmp_path):
    """A file without superclasses, and a download that has them, are one data set where no superclass counts."""
    images = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(200) % 100
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "images.npz", **arrays)
    coarse = np.arange(100) % 20

    def download(name):
        return sources._from_arrays(name, {**arrays, "coarse": coarse}, Expected(coarse=True))

    monkeypatch.setattr(sources, "download", download)
    plain, super_classes = (find_protocol(f"cifar100-{name}") for name in ("halrp", "superclass-halrp"))
    file = load_data(plain, tmp_path / "images.npz")
    assert data_digest(load_data(plain, None)) == data_digest(file)
    assert load_data(super_classes, None).coarse == tuple(coarse)
