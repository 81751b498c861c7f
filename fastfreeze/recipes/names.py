"""What a user can name on the command line; here, as the rest of the recipes needs torch."""

from __future__ import annotations

METHOD_NAMES = ("sgd", "freezeout", "snapshot", "both")
RECIPE_NAMES = ("prefix", "gradual", "freezeout", "full")
EMBEDDED = "mnist5k"  # needs no files
DATA_NAMES = (
    EMBEDDED,
    "fashion-mnist",
    "cifar10",
    "cifar100",
    "svhn",
    "svhn-extra",
    "tinyimagenet",
    "imagenet",
    "folder",
)
# The papers' networks, with an example each.
MODEL_NAMES = {
    "resnet<6n+2>[-w<width>]": "resnet20",
    "tiny-resnet<6n+2>": "tiny-resnet20",
    "wrn<6n+4>-<widening>": "wrn16-2",
    "densenet<3n+4>[-<growth>]": "densenet40",
    "densenet-bc-<6n+4>[-<growth>]": "densenet-bc-76",
    "vgg16": "vgg16",
    "vgg16-fc": "vgg16-fc",
}
OTHER_MODELS = ("torchvision:NAME", "timm:NAME", "MODULE:FUNCTION")
