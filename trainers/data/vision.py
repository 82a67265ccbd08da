"""Real image sets: scikit-learn's digits, Fashion-MNIST, CIFAR-10. A class is a domain."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import TypedDict, Unpack

import numpy as np
import torch

from trainers.data.base import data_file, held_out, require_choice
from trainers.data.images import ImageData, Images

FASHION = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Our copy of CIFAR-10: 1,000 lossless 32x32 tiles a file, 20 rows of 50.
TILE, TILE_ROWS, TILE_COLUMNS = 32, 20, 50
TRAIN_FILES, TEST_FILES = 25, 10
# Of the train images, the last so many are those that settings are chosen by.
CHOOSING = 5000


class ImageOptions(TypedDict, total=False):
    """The options of every real image set, as ``ImageData`` takes them."""

    batch_size: int
    seed: int
    valid_images: int | None


def image_data(name: str, train: Images, valid: Images, classes: tuple[str, ...], options: ImageOptions) -> ImageData:
    """An image set whose domains are its classes.

    Args:
        name: its name.
        train: the train split.
        valid: the held-out split.
        classes: the names of the classes.
        options: of ``ImageData``; by default batches of 64, seed 0, and the whole held-out split.

    Returns:
        The data set.
    """
    return ImageData(
        name,
        train,
        valid,
        domains=classes,
        num_classes=len(classes),
        batch_size=options.get("batch_size", 64),
        seed=options.get("seed", 0),
        valid_images=options.get("valid_images"),
    )


def labelled(pixels_NCHW: np.ndarray, classes_N: np.ndarray) -> Images:
    """Images whose domain is their class.

    Args:
        pixels_NCHW: (N, C, H, W) uint8.
        classes_N: (N,) integers.

    Returns:
        The split.

    Raises:
        ValueError: if there are more or fewer labels than images.
    """
    if len(pixels_NCHW) != len(classes_N):
        raise ValueError(f"labels: expected one for each of {len(pixels_NCHW)} images, got {len(classes_N)}")
    classes = torch.from_numpy(classes_N.astype(np.int64))
    return Images(pixels=torch.from_numpy(pixels_NCHW), classes=classes, domains=classes)


def digits(*, valid_fraction: float = 0.2, **options: Unpack[ImageOptions]) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 1x8x8 with values 0 to 16.

    Args:
        valid_fraction: share of each class held out.
        **options: of ``ImageData``.

    Returns:
        The data set "digits".

    Raises:
        ValueError: if an option is out of range.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels_NHW, classes_N = data.images.astype(np.uint8), data.target
    held = np.array(held_out([(str(c), str(i)) for i, c in enumerate(classes_N)], valid_fraction))
    train, valid = (labelled(pixels_NHW[side][:, None], classes_N[side]) for side in (~held, held))
    return image_data("digits", train, valid, tuple(map(str, range(10))), options)


def fashion_mnist(*, root: str | None = None, split: str = "test", **options: Unpack[ImageOptions]) -> ImageData:
    """Fashion-MNIST: 60,000 + 10,000 grey 1x28x28 images, from the four official .gz files under fashion-mnist/.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        split: as in ``sides``.
        **options: of ``ImageData``.

    Returns:
        The data set "fashion_mnist".

    Raises:
        ValueError: if no root is given, a file is damaged, or an option is out of range.
        FileNotFoundError: if a file is missing.
    """
    parts = []
    for part in ("train", "t10k"):
        pixels = read_idx(data_file(root, f"fashion-mnist/{part}-images-idx3-ubyte.gz"), dimensions=3)
        classes = read_idx(data_file(root, f"fashion-mnist/{part}-labels-idx1-ubyte.gz"), dimensions=1)
        parts.append(labelled(pixels[:, None], classes))
    return image_data("fashion_mnist", *sides(parts[0], parts[1], split), FASHION, options)


def sides(train: Images, test: Images, split: str) -> tuple[Images, Images]:
    """Choose what is trained on and what is held out.

    Args:
        train: a set's own train images.
        test: a set's own test images.
        split: what is held out: "test", the test images; "valid", the last 5,000 train images, which are then not
            trained on, to choose settings without a look at the test images.

    Returns:
        The train side and the held-out side.

    Raises:
        ValueError: another split, or too few images for it.
    """
    require_choice("split", split, ("test", "valid"))
    if split == "test":
        return train, test
    kept = len(train.pixels) - CHOOSING
    if kept < 1:
        raise ValueError(f"split: expected more than {CHOOSING} train images for 'valid', got {len(train.pixels)}")
    before, after = (
        Images(pixels=train.pixels[part], classes=train.classes[part], domains=train.domains[part])
        for part in (slice(kept), slice(kept, None))
    )
    return before, after


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read a gzipped idx file: 0, 0, 8, the number of dimensions, their sizes (big-endian int32), the bytes.

    Args:
        path: the file.
        dimensions: how many are expected.

    Returns:
        A uint8 array.

    Raises:
        ValueError: if the file is not that.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name}: expected a gzip file, got a damaged one ({error})") from error
    header = 4 + 4 * dimensions
    shape = np.frombuffer(data[4:header], ">i4").tolist() if len(data) >= header else []
    if data[:4] != bytes([0, 0, 8, dimensions]) or len(data) != header + int(np.prod(shape)):
        raise ValueError(
            f"{path.name}: expected an idx file of {dimensions}-dimensional bytes, got {len(data)} bytes "
            f"that start with {data[:4].hex()}"
        )
    return np.frombuffer(bytearray(data), np.uint8, offset=header).reshape(shape)


def cifar10(*, root: str | None = None, split: str = "test", **options: Unpack[ImageOptions]) -> ImageData:
    """CIFAR-10, first half of train: 25,000 + 10,000 colour 3x32x32 images, from cifar10/*.webp.

    Args:
        root: folder of the data sets; None reads MOEGEO_DATA.
        split: as in ``sides``.
        **options: of ``ImageData``.

    Returns:
        The data set "cifar10 (first half of train)".

    Raises:
        ValueError: if no root is given, a file is damaged, or an option is out of range.
        FileNotFoundError: if a file is missing.
    """
    path = data_file(root, "cifar10/labels.npz")
    try:
        with np.load(path, allow_pickle=False) as archive:
            labels = {"train": archive["train_labels"], "test": archive["test_labels"]}
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name}: expected arrays train_labels and test_labels, got {error}") from error
    parts = []
    for part, files in (("train", TRAIN_FILES), ("test", TEST_FILES)):
        tiles = [read_tiles(data_file(root, f"cifar10/{part}_{i:02d}.webp")) for i in range(files)]
        pixels = np.concatenate(tiles)
        parts.append(labelled(pixels, labels[part][: len(pixels)]))
    return image_data("cifar10 (first half of train)", *sides(parts[0], parts[1], split), CIFAR10, options)


def read_tiles(path: Path) -> np.ndarray:
    """Cut a sheet of tiles into images.

    Args:
        path: an RGB image of 640x1600 pixels, 20 rows of 50 tiles, row by row.

    Returns:
        (1000, 3, 32, 32) uint8.

    Raises:
        ValueError: if the file is no image or has another size.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            sheet = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{path.name}: expected an image, got a damaged file ({error})") from error
    expected = (TILE_ROWS * TILE, TILE_COLUMNS * TILE, 3)
    if sheet.shape != expected:
        raise ValueError(f"{path.name}: expected an image of shape {expected}, got {sheet.shape}")
    tiles = sheet.reshape(TILE_ROWS, TILE, TILE_COLUMNS, TILE, 3).transpose(0, 2, 4, 1, 3)
    return tiles.reshape(-1, 3, TILE, TILE)
