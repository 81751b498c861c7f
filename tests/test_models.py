"""The papers' networks: sizes, shapes, and that the rest of the library can take them apart."""

import pytest
import torch
from torch import fx

from fastfreeze.freezing import split
from fastfreeze.recipes.models import build_model


def on_meta(name, **arguments):
    with torch.device("meta"):
        return build_model(name, **arguments)


# The counts are those of the definitions; the papers print them rounded, as in the last column.
@pytest.mark.parametrize(
    ("name", "num_classes", "parameters", "paper"),
    [
        ("resnet20", 10, 269_722, "0.27M"),
        ("resnet110", 10, 1_727_962, "1.7M"),
        ("wrn16-2", 10, 691_674, "0.7M"),
        ("wrn40-4", 10, 8_949_210, "8.9M"),
        ("densenet40", 10, 1_019_722, "1.0M"),
        ("densenet-bc-100", 10, 769_162, "0.8M"),
        ("densenet100", 10, 6_979_642, "7.0M"),
        ("densenet100-24", 10, 27_249_082, "27.2M"),
        ("densenet-bc-250-24", 10, 15_324_406, "15.3M"),
        ("vgg16", 10, 14_724_042, "15M"),
        ("vgg16", 100, 14_770_212, "15M"),
    ],
)
def test_parameter_counts(name, num_classes, parameters, paper):
    assert sum(p.numel() for p in on_meta(name, num_classes=num_classes).parameters()) == parameters
    assert f"{parameters / 1e6:.{len(paper.strip('M').partition('.')[2])}f}M" == paper


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
    ],
)
def test_split_finds_stem_blocks_and_head(name, layers):
    model = build_model(name)
    found = split(model, torch.zeros(2, 3, 32, 32)).layers
    links = [("stem",), *((f"blocks.{i}",) for i in range(layers - 2)), ("head",)]
    assert [layer.modules for layer in found] == links


@pytest.mark.parametrize(
    "name", ["resnet8-w4", "tiny-resnet8", "wrn10-1", "densenet7-4", "densenet-bc-10-4", "vgg16"]
)
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


@pytest.mark.parametrize("argument", ["num_classes", "in_channels"])
def test_bad_counts(argument):
    with pytest.raises(ValueError, match=f"{argument} must be >= 1, got 0"):
        build_model("resnet8", **{argument: 0})
