"""timm's models through the ordinary API: split, SGD, trim, SnapshotEnsemble."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastfreeze

timm = pytest.importorskip("timm")

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 6


def family(name, *, size=64, quick=False, **options):
    marks = [] if quick else [pytest.mark.slow]
    return pytest.param(name, size, options, marks=marks, id=name)


FAMILIES = [
    family("test_resnet", quick=True),
    family("test_vit", quick=True, img_size=64),
    family("vit_tiny_patch16_224", size=32, img_size=32),
    family("efficientnet_b0"),
    family("densenet121", drop_path_rate=None),
    family("swin_tiny_patch4_window7_224", img_size=64, window_size=2),
    family("mixer_s32_224", size=224),
    family("edgenext_xx_small"),
    family("vgg11", size=32, drop_path_rate=None, mlp_ratio=0.02),
    family("xcit_nano_12_p16_224", img_size=64),
]


@pytest.mark.parametrize(("name", "size", "options"), FAMILIES)
def test_a_family_freezes_and_makes_an_ensemble(name, size, options):
    options = {"drop_path_rate": 0.1, "num_classes": 3} | options
    model = timm.create_model(name, pretrained=False, **options)
    images, labels = torch.randn(4, 3, size, size), torch.tensor([0, 1, 2, 0])
    schedule = fastfreeze.FreezeOutCycles(STEPS, num_cycles=3, t_0=0.5)
    plan = fastfreeze.split(model, images, schedule=schedule, lr=0.01)
    assert len(plan.layers) > 4
    optimizer = fastfreeze.SGD(plan.param_groups(), 0.01, momentum=0.9, schedule=schedule)
    store = fastfreeze.MemorySnapshots()
    network = fastfreeze.trim(model)
    for _ in range(STEPS):
        frozen = [p for i in optimizer.frozen_layers for _, p in plan.layers[i].parameters]
        before = [p.clone() for p in frozen]
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        if frozen:
            network.verify(images)
        optimizer.step()
        assert all(map(torch.equal, before, frozen))
        if optimizer.current_step in schedule.cycle_ends:
            store.save(model, step=optimizer.current_step, cycle=len(store))
    assert len(optimizer.frozen_layers) > len(plan.layers) // 2
    ensemble = fastfreeze.SnapshotEnsemble.from_store(model, store)
    members = [member(images).softmax(1) for member in ensemble.members]
    torch.testing.assert_close(ensemble(images), sum(members) / 3, rtol=1e-3, atol=1e-4)
