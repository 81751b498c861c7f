"""SGD and Adam as their kernels know them."""

from __future__ import annotations

from fastfreeze.kernels.plans import Rule
from fastfreeze.kernels.reference import adam_reference, sgd_reference

SGD = Rule(
    name="sgd",
    # As csrc/sgd_math.h reads them.
    hypers=("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize", "initial_lr"),
    counts=False,
    takes_sparse=True,
    reference=sgd_reference,
)
ADAM = Rule(  # and AdamW
    name="adam",
    # As csrc/adam_math.h reads them.
    hypers=(
        "lr",
        "beta1",
        "beta2",
        "eps",
        "weight_decay",
        "decoupled",
        "maximize",
        "amsgrad",
        "initial_lr",
    ),
    counts=True,
    takes_sparse=False,
    reference=adam_reference,
)
