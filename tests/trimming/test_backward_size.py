"""How far the backward shrinks: counted on the trimmed model, predicted from the untrimmed one.

Two predictions, and both are met exactly:

* Nodes of autograd's graph: those of the model with everything trainable, from which the gradient
  of a parameter that still trains can be reached.
* Bytes kept for the backward: as many as in the untrimmed model, called with the same flags.
"""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torchvision.models import get_model, list_models

from fastfreeze import trim
from fastfreeze.recipes.models import build_model
from tests.nets import FAMILIES, torchvision_model

pytestmark = pytest.mark.usefixtures("one_thread")


def in_execution_order(model, *inputs):
    """Parameters by their module's first call; those of modules never called, after the caller."""
    order, hooks = [], []
    for module in model.modules():
        own, all_of_it = list(module.parameters(recurse=False)), list(module.parameters())
        hooks.append(module.register_forward_pre_hook(lambda *_, p=own: order.extend(p)))
        hooks.append(module.register_forward_hook(lambda *_, p=all_of_it: order.extend(p)))
    model.eval()
    with torch.no_grad():
        model(*inputs)
    model.train()
    for hook in hooks:
        hook.remove()
    return list(dict.fromkeys(order))


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


def backward_nodes(output):
    """The nodes of a backward graph, each after those that run after it."""
    order, seen = [], set()
    stack = [(t.grad_fn, False) for t in tree_leaves(output) if isinstance(t, Tensor)]
    while stack:
        node, is_done = stack.pop()
        if is_done:
            order.append(node)
        elif node is not None and node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(following, False) for following, _ in node.next_functions]
    return order


def count_leading_to(nodes, parameters):
    """How many of ``nodes`` lead to the gradient of one of ``parameters``."""
    wanted, kept = {id(p) for p in parameters}, set()
    for node in nodes:
        leaf = getattr(node, "variable", None)  # of an AccumulateGrad
        following = [f for f, _ in node.next_functions]
        if id(leaf) in wanted if leaf is not None else not kept.isdisjoint(following):
            kept.add(node)
    return len(kept)


def check_sizes(model, x, counts, fold):
    """At cuts behind these numbers of parameters, in the order of execution."""
    order = in_execution_order(model, x)
    for parameter in order:
        parameter.requires_grad_(True)
    whole = backward_nodes(model(x))
    trimmed = trim(model, fold=fold)
    sizes, kept = [], []
    for count in counts:
        for number, parameter in enumerate(order):
            parameter.requires_grad_(number >= count)
        trimmed(x)  # the first call under a cut does more
        sizes.append(len(backward_nodes(trimmed(x))))
        kept.append(saved_bytes(lambda: trimmed(x)))
        where = f"{count} of {len(order)} frozen"
        assert sizes[-1] == count_leading_to(whole, order[count:]), where
        assert kept[-1] == saved_bytes(lambda: model(x)), where
    assert sizes == sorted(set(sizes), reverse=True)
    assert kept == sorted(kept, reverse=True)
    return sizes, kept


def evenly(model, parts):
    """Numbers of frozen parameters, from none to all."""
    total = len(list(model.parameters()))
    return [part * total // parts for part in range(parts + 1)]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", ["resnet8-w4", "densenet-bc-10", "wrn10-1"])
def test_every_cut(name, fold):
    model, x = build_model(name, num_classes=3).train(), torch.randn(2, 3, 16, 16)
    sizes, kept = check_sizes(model, x, range(len(list(model.parameters())) + 1), fold)
    assert sizes[-1] == kept[-1] == 0


QUICK = ["googlenet", "mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", QUICK)
def test_torchvision(name, fold):
    model, x = torchvision_model(name)
    check_sizes(model, x, evenly(model, 3), fold)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK)))
def test_every_family_of_torchvision(name, fold):
    model, x = torchvision_model(name)
    check_sizes(model, x, evenly(model, 5), fold)


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("name", list_models(module=torchvision.models.segmentation))
def test_every_segmentation_model(name, fold):
    model = get_model(name, weights=None, weights_backbone=None).train()
    check_sizes(model, torch.randn(2, 3, 64, 64), evenly(model, 3), fold)
