"""The softmax operators by the CUDA kernels, emulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastfreeze.kernels.reference import sum_dtype
from fastfreeze.kernels.softmax_arguments import new_statistics
from tests.kernels.emulation import Addresses, Program, build, dtype_code

_SUM, _LOG, _STATISTICS = range(3)
# What a launch may write and read, as buffers 3 to 11 of the harness.
_BUFFERS = ("out", "before", "labels", "max_probability", "argmax", "entropy")
_BUFFERS += ("mutual_information", "nll", "entropy_sum")


@dataclass(frozen=True)
class EmulatedSoftmax:
    """Operators as registered; blocks: how many a launch has at most."""

    program: Program
    blocks: int = 10**6

    def ensemble_softmax(self, members, weights, temperature, log):
        out = torch.full_like(members[0], torch.nan, memory_format=torch.contiguous_format)
        self.launch(_LOG if log else _SUM, members, weights, temperature, out=out)
        return out

    def ensemble_statistics(self, members, weights, temperature, labels):
        out, *summary = results = new_statistics(members[0], labels is not None)
        for tensor in results:
            tensor.fill_(-1 if tensor.dtype == torch.int64 else torch.nan)
        names = ("max_probability", "argmax", "entropy", "mutual_information", "nll")
        found = dict(zip(names, summary, strict=True))
        if labels is None:
            del found["nll"]
        else:
            found["labels"] = labels.contiguous()
        self.launch(_STATISTICS, members, weights, temperature, out=out, **found)
        return results

    def softmax_add(self, result, entropy, total, logits, weight, temperature):
        mode = _SUM if entropy is None else _STATISTICS
        named = {"out": result, "before": total, "entropy_sum": entropy}
        self.launch(mode, [logits], [weight], temperature, **named)

    def launch(self, mode, members, weights, temperature, **named):
        """Rows without unit stride, and batches of them, are copied as the operator does."""
        assert set(named) <= set(_BUFFERS)
        dtype, classes = members[0].dtype, members[0].shape[-1]
        rows = [z if z.stride(-1) == 1 or classes == 1 else z.contiguous() for z in members]
        rows = [z.reshape(-1, classes) for z in rows]
        if len(rows[0]) == 0:
            return
        weights = [1 / len(rows)] * len(rows) if weights is None else weights
        out_is_sum = named["out"].dtype != dtype
        assert not out_is_sum or named["out"].dtype == sum_dtype(dtype)
        addresses = Addresses(torch.tensor([z.data_ptr() for z in rows]))
        strides = torch.tensor([z.stride(0) for z in rows])
        shares = torch.tensor(weights, dtype=torch.float64)
        pointees = list({z.data_ptr(): z for z in rows}.values())
        self.program.run(
            "softmax",
            [addresses, strides, shares, *(named.get(name) for name in _BUFFERS), *pointees],
            [dtype_code(dtype), mode, out_is_sum, *rows[0].shape, self.blocks, 1 / temperature],
            seed=torch.randint(2**31, ()).item(),
        )


def emulated_softmax(_=None, sanitizer=None, blocks=10**6):
    """Skips where there is no compiler."""
    return EmulatedSoftmax(build("softmax_harness.cpp", sanitizer), blocks)
