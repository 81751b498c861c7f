"""Networks of others that several tests build."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.models import get_model

AUX = ("googlenet", "inception_v3")
# One network for each kind of block; the others differ in depth and width, or do not fit in here.
FAMILIES = [
    *("convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet"),
    *("inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t"),
]


def in_execution_order(model, *inputs):
    """Parameters by their module's first call; those of modules never called, after the caller."""
    order = []
    hooks = []
    for module in model.modules():
        own, all_of_it = list(module.parameters(recurse=False)), list(module.parameters())
        hooks.append(module.register_forward_pre_hook(lambda *_, p=own: order.extend(p)))
        hooks.append(module.register_forward_hook(lambda *_, p=all_of_it: order.extend(p)))
    mode = model.training
    model.eval()
    with torch.no_grad():
        model(*inputs)
    model.train(mode)
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


def tensors(value):
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    if hasattr(value, "__dataclass_fields__"):
        items = [getattr(value, name) for name in value.__dataclass_fields__]
    return [t for item in items if item is not None for t in tensors(item)]


def saved_bytes(call):
    """Bytes of storage that the forward keeps for the backward."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # a node that kept its own output itself would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = call()
    del output
    return sum(kept.values())


def build(name, size=None):
    """A torchvision model without its weights, and an input."""
    sizes = {"alexnet": 64, "inception_v3": 299, "maxvit_t": 224, "vit_h_14": 28}
    size = size or sizes.get(name, 32)
    options = {}
    if name.startswith("vit"):
        options["image_size"] = size
    if name in AUX:
        options["init_weights"] = False
    return get_model(name, weights=None, **options).train(), torch.randn(2, 3, size, size)


def tiny_bert(**options):
    """Hugging Face's BERT of three layers for classification, made from a config."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        **options,
    )
    return transformers.BertForSequenceClassification(config)
