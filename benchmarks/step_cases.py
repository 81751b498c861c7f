"""A training step with a part of the model frozen: what trim and kept values gain over flags.

Forward, loss, backward and torch's SGD, which is the same for all; only the network differs.
*flags* is ``requires_grad=False`` alone, on a copy of the model: its frozen norms stay in training
mode and move their statistics. Two more do by hand what flags forget: put what is frozen into eval
mode, and bring model and images into channels_last, in which trim is timed, too.

In *trim* cases the first half of the parameters is frozen, in order of execution, wherever that
cuts the model. In *kept* cases it is a part without which the rest can run, and the floor is that:
the rest alone, trained on features that were stored before, in the layout in which the cache hands
them on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import fastfreeze
from benchmarks.case import OURS, Case
from benchmarks.training_rivals import (
    AS_IT_IS,
    BF16_TOLERANCE,
    CACHE,
    FLAGS,
    HYPERS,
    LAST,
    LR,
    TOLERANCE,
    State,
    Training,
    deviation,
)

IN_EVAL = "flags, frozen part in eval mode"
CHANNELS_LAST = "flags, frozen part in eval mode, channels_last"
OURS_CHANNELS_LAST = f"{OURS}, channels_last"
REST = "rest alone"  # the floor of kept cases
GATE_STEPS = 4
FILLING_EPOCHS = 3  # after which all is found, and the first that was found has been compared
IMAGE_SIZE = 64
ZOO = (  # of timm
    *("resnet18", "densenet121", "mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0"),
    *("ghostnet_100", "regnety_002", "hgnetv2_b0", "repvgg_a0", "vgg11_bn", "cs3darknet_s"),
    *("poolformer_s12", "convnext_atto", "edgenext_xx_small", "mobilevit_xxs"),
    *("maxvit_pico_rw_256", "mixer_s32_224", "swin_tiny_patch4_window7_224"),
    "vit_tiny_patch16_224",
)
OPTIONS: dict[str, dict[str, float]] = {
    **{model: {"img_size": IMAGE_SIZE} for model in ZOO[-4:]},
    "vgg11_bn": {"mlp_ratio": 1 / 16},  # else a step is the update of its head's 120M weights
}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
Cut = Callable[[nn.Module], tuple[nn.Module, nn.Module]]


@dataclass(frozen=True)
class Work:
    """What all rivals train: copies of a model, of which some is frozen, on shuffled batches."""

    model: nn.Module
    inputs: Tensor  # [N, ...]
    labels: Tensor  # int64 [N]
    batch_size: int
    cut: Cut | None = None  # the frozen part and the rest of a copy, one after the other
    bf16: bool = False  # under autocast

    @property
    def layout(self) -> torch.memory_format:
        """In which images are fastest, mostly."""
        return LAST if self.inputs.ndim == 4 else AS_IT_IS

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.labels.device.type, torch.bfloat16, enabled=self.bf16)

    def start(self) -> nn.Module:
        """A copy in training mode, what is frozen in eval mode."""
        model = copy.deepcopy(self.model).train()
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                module.eval()
        return model

    def batches(self) -> Iterator[Tensor]:
        """Sample ids int64 ``[B]``, each epoch in another order, the same for every rival."""
        generator = torch.Generator().manual_seed(0)
        while True:
            order = torch.randperm(len(self.labels), generator=generator)
            yield from order.to(self.labels.device).split(self.batch_size)


class Step:
    """A run: one more step of a training of some network, which is given images and their ids."""

    def __init__(
        self,
        work: Work,
        model: nn.Module,
        network: Callable[[Tensor, Tensor], Any],
        layout: torch.memory_format = AS_IT_IS,
    ) -> None:
        def logits(inputs: Tensor, ids: Tensor) -> Tensor:
            with work.autocast():
                output = network(inputs, ids)
            return (output if isinstance(output, Tensor) else output.logits).float()

        fused = {"fused": True} if work.labels.is_cuda else {}
        optimizer = torch.optim.SGD(model.parameters(), LR, **HYPERS, **fused)
        self.training = Training(model, logits, optimizer, layout=layout)
        self.tolerance = BF16_TOLERANCE if work.bf16 else TOLERANCE
        self._work, self._batches = work, work.batches()

    def __call__(self) -> Tensor:
        ids = next(self._batches)
        return self.training.step(self._work.inputs[ids], self._work.labels[ids], ids)


def by_hand(
    work: Work,
    layout: torch.memory_format = AS_IT_IS,
    network_of: Callable[[nn.Module], Callable] = lambda model: model,
) -> Step:
    """torch alone, or a network that is made of the model."""
    model = work.start().to(memory_format=layout)
    network = network_of(model)
    return Step(work, model, lambda x, ids: network(x), layout)


by_trim = partial(by_hand, network_of=fastfreeze.trim)


def by_cache(work: Work) -> Step:
    """The trimmed model with values that are kept already, images in channels_last."""
    layout = work.layout
    model = work.start().to(memory_format=layout)
    cache = fastfreeze.FeatureCache(fastfreeze.trim(model), enabled=True)
    steps = FILLING_EPOCHS * len(work.labels) // work.batch_size
    for ids in islice(work.batches(), steps):
        with work.autocast():
            cache(work.inputs[ids].contiguous(memory_format=layout), samples=ids)
    model.load_state_dict(work.model.state_dict())  # norms that train have moved
    misses = cache.stats().misses
    step = Step(work, model, lambda x, ids: cache(x, samples=ids), layout)
    step.training.notes = lambda: {
        "missed": cache.stats().misses - misses,
        "reason": cache.reason,
    }
    return step


def rest_alone(work: Work) -> Step:
    """What trains, on stored features."""
    assert work.cut is not None
    model = work.start()
    frozen, rest = work.cut(model.to(memory_format=work.layout))
    with torch.no_grad(), work.autocast():
        features = frozen(work.inputs.contiguous(memory_format=work.layout))
    work = replace(work, inputs=features)
    return Step(work, model, lambda x, ids: rest(x), work.layout)


def step_case(work: Work, name: str) -> Case:
    """The rivals for a step; those with kept values where the work has a cut."""
    start = copy.deepcopy(work.model.state_dict())
    truth = _after_the_gate(by_hand(work))
    makes: dict[str, Callable[[Work], Step]] = {OURS: by_trim, FLAGS: by_hand, IN_EVAL: by_hand}
    if work.layout == LAST:
        makes[OURS_CHANNELS_LAST] = partial(by_trim, layout=LAST)
        makes[CHANNELS_LAST] = partial(by_hand, layout=LAST)
    if work.cut is not None:
        makes |= {CACHE: by_cache, REST: rest_alone}
    case = Case(name=name)
    for rival, make in makes.items():
        case.add(rival, partial(make, work), lambda step: _wrong(step, truth, start))
    if (flags := case.runs.get(FLAGS)) is not None:
        flags.training.model.train()  # with the frozen part in eval mode it was the true one
    case.floor = case.runs.pop(REST, None)
    return case


def _after_the_gate(step: Step) -> State:
    torch.manual_seed(0)  # of dropouts
    for _ in range(GATE_STEPS):
        step()
    return copy.deepcopy(step.training.model.state_dict())


def _wrong(step: Step, truth: State, start: State) -> str | None:
    """What keeps a rival's training from being the true one; None if nothing does."""
    _after_the_gate(step)
    notes = step.training.notes()
    if notes.get("missed") or notes.get("reason"):
        return f"not all values are found: {notes}"
    return deviation(step.training, truth, start, step.tolerance)


def trim_case(model_name: str, batch_size: int = 16, device: str = "cpu") -> Case:
    """Of a model of timm, on one batch of images; in bf16 on a GPU."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model(model_name, num_classes=10, **OPTIONS.get(model_name, {}))
    work = _images(model, batch_size, batch_size, device)
    layers = fastfreeze.split(model, work.inputs[:2]).layers
    parameters = [p for layer in layers for p in layer.trainable]
    for parameter in parameters[: len(parameters) // 2]:
        parameter.requires_grad_(False)
    return step_case(work, f"{model_name}, half of the parameters frozen")


def mobilenet_case(num_frozen: int, batch_size: int = 32, device: str = "cpu") -> Case:
    """Of torchvision's MobileNetV2 with so many of its 19 blocks frozen; in bf16 on a GPU."""
    from torchvision.models import mobilenet_v2

    def cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
        features = model.features
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return features[:num_frozen], nn.Sequential(features[num_frozen:], *pool, model.classifier)

    torch.manual_seed(0)
    model = mobilenet_v2(weights=None, num_classes=10)
    work = _images(model, batch_size, 4 * batch_size, device, cut)
    cut(work.model)[0].requires_grad_(False)
    return step_case(work, f"MobileNetV2, {num_frozen} of 19 blocks frozen")


def _images(
    model: nn.Module, batch_size: int, samples: int, device: str, cut: Cut | None = None
) -> Work:
    """Random ones, whose statistics the model's norms have; larger ones on a GPU."""
    size = 224 if device == "cuda" else IMAGE_SIZE
    images = torch.randn(samples, 3, size, size).to(device)
    # Else frozen norms would let what they norm grow.
    update_bn([images[:16]], model.to(device))
    labels = torch.randint(10, (samples,)).to(device)
    return Work(model, images, labels, batch_size, cut, bf16=device == "cuda")


def bert_case(
    num_frozen: int | None, batch_size: int = 16, length: int = 48, **options: int
) -> Case:
    """Of a BERT, its embeddings and so many layers frozen; None: all but the head."""
    from transformers import BertConfig, BertForSequenceClassification

    def cut(model: nn.Module) -> tuple[nn.Module, nn.Module]:
        bert, head = model.bert, (model.dropout, model.classifier)
        layers = bert.encoder.layer
        if num_frozen is None:
            return nn.Sequential(bert.embeddings, *layers, bert.pooler), nn.Sequential(*head)
        frozen = nn.Sequential(bert.embeddings, *layers[:num_frozen])
        return frozen, nn.Sequential(*layers[num_frozen:], bert.pooler, *head)

    torch.manual_seed(0)
    config = BertConfig(**{**MINILM, **options})
    model = BertForSequenceClassification(config)
    tokens = torch.randint(config.vocab_size, (4 * batch_size, length))
    labels = torch.randint(2, (len(tokens),))
    cut(model)[0].requires_grad_(False)
    frozen = f"embeddings and {num_frozen} of {config.num_hidden_layers} layers"
    what = "all but the head" if num_frozen is None else frozen
    return step_case(Work(model, tokens, labels, batch_size, cut), f"BERT, {what} frozen")


def step_cases(device: str = "cpu") -> dict[str, Callable[[], Case]]:
    """By name; on a GPU fewer, larger ones."""
    if device == "cuda":
        return {
            "trim-resnet50": partial(trim_case, "resnet50", 256, device),
            "trim-vit_small_patch16_224": partial(trim_case, "vit_small_patch16_224", 128, device),
            "kept-mobilenet_v2-half": partial(mobilenet_case, 10, 128, device),
            "kept-mobilenet_v2-three-quarters": partial(mobilenet_case, 15, 128, device),
        }
    return {
        **{f"trim-{model}": partial(trim_case, model) for model in ZOO},
        "kept-mobilenet_v2-half": partial(mobilenet_case, 10),
        "kept-mobilenet_v2-three-quarters": partial(mobilenet_case, 15),
        "kept-minilm-3-layers": partial(bert_case, 3),
        "kept-minilm-5-layers": partial(bert_case, 5),
        "kept-minilm-all-but-head": partial(bert_case, None),
    }
