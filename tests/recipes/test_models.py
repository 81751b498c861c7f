"""The papers' networks: sizes, shapes, and that the rest of the library can take them apart."""

import pytest
import torch
from torch import fx

from fastfreeze.layers.split import split
from fastfreeze.recipes.models import build_model
from fastfreeze.trimming import trim


def on_meta(name, **arguments):
    with torch.device("meta"):
        return build_model(name, **arguments)


def count(module):
    return sum(p.numel() for p in module.parameters())


# The first column of numbers was added up by hand from the definitions, of densenet-bc and vgg also
# by torchvision's networks; the second is what is printed about these networks, rounded, and where:
#   He et al., 2016, table 6 (ResNet); Zagoruyko and Komodakis, 2016, section 3 (Wide ResNet);
#   Huang et al., 2017, table 2, and the README of github.com/liuzhuang13/DenseNet (DenseNet).
@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "printed"),
    [
        ("resnet20", 10, 269_722, "0.27M"),
        ("resnet110", 10, 1_727_962, "1.7M"),
        ("resnet32-w64", 100, 7_409_316, None),
        ("wrn16-2", 10, 691_674, None),
        ("wrn28-10", 10, 36_479_194, "36.5M"),
        ("wrn40-4", 10, 8_949_210, "8.9M"),
        ("densenet40", 10, 1_019_722, "1.0M"),
        ("densenet-bc-76", 100, 510_040, None),
        ("densenet-bc-100", 10, 769_162, "0.8M"),
        ("densenet100", 10, 6_979_642, "7.0M"),
        ("densenet100-24", 10, 27_249_082, "27.2M"),
        ("densenet-bc-250-24", 10, 15_324_406, "15.3M"),
        ("vgg16", 10, 14_724_042, None),
        ("vgg16", 100, 14_770_212, None),
        ("vgg16-fc", 100, 15_298_596, None),
    ],
)
def test_parameter_counts(name, num_classes, parameters, printed):
    assert count(on_meta(name, num_classes=num_classes)) == parameters
    assert count(on_meta(name, num_classes=num_classes, stem_stride=2)) == parameters
    if printed is not None:
        digits = len(printed.strip("M").partition(".")[2])
        assert f"{parameters / 1e6:.{digits}f}M" == printed


FAMILIES = ["resnet8-w4", "wrn10-1", "densenet7-4", "densenet-bc-10-4", "vgg16", "vgg16-fc"]


@pytest.mark.parametrize("name", FAMILIES)
def test_stem_stride_halves_what_follows_the_stem(name):
    seen = []
    for stride in (1, 2):
        model = build_model(name, stem_stride=stride).eval()
        hook = model.blocks[0].register_forward_pre_hook(lambda _, x: seen.append(x[0].shape[-1]))
        assert model(torch.zeros(1, 3, 32 * stride, 32 * stride)).shape == (1, 10)
        hook.remove()
    assert seen == [32, 32]


@pytest.mark.parametrize("name", FAMILIES)
def test_trimmed_half_frozen_network_has_the_models_gradients(name):
    images = torch.randn(4, 3, 16, 16)
    model = build_model(name)
    layers = split(model, images).layers
    frozen = layers[: len(layers) // 2]
    for parameter in (p for layer in frozen for p in layer.trainable):
        parameter.requires_grad_(False)
    for module in model.modules():
        vars(module).update({"p": 0.0} if isinstance(module, torch.nn.Dropout) else {})

    def gradients(network):
        model.zero_grad()
        network(images).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = gradients(trim(model, fold=False))
    for module in (model.get_submodule(m) for layer in frozen for m in layer.modules):
        module.eval()
    expected = gradients(model)
    assert list(expected) == [n for layer in layers[len(frozen) :] for n, _ in layer.parameters]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet20", 11),
        ("tiny-resnet20", 11),
        ("resnet110", 56),
        ("wrn16-2", 8),
        ("densenet40", 40),
        ("densenet-bc-22", 13),
        ("vgg16", 14),
        ("vgg16-fc", 14),
    ],
)
def test_split_finds_stem_blocks_and_head(name, layers):
    model = build_model(name)
    found = split(model, torch.zeros(2, 3, 32, 32)).layers
    links = [("stem",), *((f"blocks.{i}",) for i in range(layers - 2)), ("head",)]
    assert [layer.modules for layer in found] == links


@pytest.mark.parametrize("name", [*FAMILIES, "tiny-resnet8"])
@pytest.mark.parametrize("size", [28, 32])
def test_forward_is_traceable(name, size):
    model = build_model(name, num_classes=7, in_channels=1).eval()
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    logits = model(images)
    assert logits.shape == (2, 7)
    torch.testing.assert_close(fx.symbolic_trace(model)(images), logits)


def test_shortcut_adds_the_input_where_residuals_vanish():
    model = build_model("resnet8-w4")
    block = model.blocks[1]  # stride 2, 4 to 8 channels
    torch.nn.init.zeros_(block.norm2.weight)
    x = torch.rand(2, 4, 6, 6)
    out = block(x)
    assert torch.equal(out[:, :4], x[:, :, ::2, ::2])
    assert torch.equal(out[:, 4:], torch.zeros(2, 4, 3, 3))


@pytest.mark.parametrize("name", ["resnet20", "densenet-bc-22", "vgg16"])
def test_convolutions_start_from_hes_distribution(name):
    torch.manual_seed(0)
    for module in build_model(name).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 4000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(module, torch.nn.Linear):
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", r"depth of resnet must be 6 \* n \+ 2, n >= 1, got 21"),
        ("wrn16", "got 'wrn16'"),
        ("wrn17-2", r"6 \* n \+ 4"),
        ("densenet41", r"3 \* n \+ 4"),
        ("densenet-bc-99", r"6 \* n \+ 4"),
        ("resnet2", "n >= 1"),
        ("resnet20-w0", "got 'resnet20-w0'"),
        ("wrn16-0", "got 'wrn16-0'"),
        ("densenet40-0", "got 'densenet40-0'"),
        ("alexnet", "model must be one of resnet<6n"),
        ("resnet20 ", "model must be one of"),
    ],
)
def test_bad_names(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name)


@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "stem_stride"])
def test_bad_counts(argument):
    with pytest.raises(ValueError, match=f"{argument} must be >= 1, got 0"):
        build_model("resnet8", **{argument: 0})
