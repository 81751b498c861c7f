"""What users change behind the optimizer's back counts from the next step on, as in torch."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fastfreeze.kernels import library
from fastfreeze.optim import SGD
from tests.covering import covering
from tests.optim.helpers import BACKENDS, net, train

needs_grad_dtype = pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="torch has no grad_dtype"
)


class Trained:
    """Two matrices of three parameters each, and a single number, in two groups."""

    def __init__(self, make, momentum=0.9):
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
        self.params.append(nn.Parameter(torch.randn(())))
        groups = [{"params": self.params[:2], "lr": 0.1}, {"params": self.params[2:], "lr": 0.5}]
        self.optimizer, self.momentum = make(groups, lr=0.1, momentum=momentum), momentum

    def step(self, seed, skip=None):
        generator = torch.Generator("cpu").manual_seed(seed)
        for i, p in enumerate(self.params):
            grad = torch.randn(p.shape, generator=generator, device="cpu")
            p.grad = None if i == skip else grad.to(p.device, p.dtype)
        self.optimizer.step()

    def buffer(self, i):
        return self.optimizer.state[self.params[i]]["momentum_buffer"]

    def everything(self):
        buffers = [self.optimizer.state[p].get("momentum_buffer") for p in self.params]
        return [p.detach() for p in self.params], [b for b in buffers if b is not None]


def pair_of(backend, momentum=0.9):
    """The same trained by ours and by torch's for-loop."""
    return [
        Trained(lambda groups, **k: SGD(groups, backend=backend, **k), momentum),
        Trained(lambda groups, **k: torch.optim.SGD(groups, foreach=False, **k), momentum),
    ]


def state_of(t, i=0):
    return t.optimizer.state[t.params[i]]


def replace_parameter(t):
    t.params[0] = nn.Parameter(t.params[0].detach() + 1)
    t.optimizer.param_groups[0]["params"][0] = t.params[0]


def replace_parameter_and_keep_momentum(t):
    old = t.params[0]
    replace_parameter(t)
    t.optimizer.state[t.params[0]] = t.optimizer.state.pop(old)


def move_between_groups(t):
    groups = t.optimizer.param_groups
    groups[1]["params"].append(groups[0]["params"].pop())


def shrink_with_its_momentum(t):
    rows = t.buffer(0)[:3]
    t.params[0].data = t.params[0].data[:3]
    state_of(t)["momentum_buffer"] = rows
    t.params[0].grad = None


def swap_states(t):
    state = t.optimizer.state
    a, b = t.params[:2]
    state[a], state[b] = state[b], state[a]


def clear_and_look(t):
    t.optimizer.state.clear()
    for p in t.params:
        t.optimizer.state[p]


def delete_one_add_another(t):
    del t.optimizer.state[t.params[0]]
    t.optimizer.state["mine"] = {"count": 1}


def view_as_another_dtype(t):
    for p in t.params:
        p.data = p.data.half()
        t.optimizer.state[p] = {}
    t.step(5)
    for p in t.params:
        p.grad = None
        p.data = p.data.view(torch.bfloat16).fill_(1.0)
        t.optimizer.state[p] = {}


def buffer_of(i, make):
    return lambda t: state_of(t, i).update(momentum_buffer=make(t.buffer(i)))


def data_of(make):
    return lambda t: setattr(t.params[0], "data", make(t.params[0].data))


def state_is(make):
    return lambda t: t.optimizer.state.update({t.params[0]: make()})


def add_a_group(t):
    t.params.append(nn.Parameter(torch.ones(9)))
    t.optimizer.add_param_group({"params": t.params[-1:], "lr": 0.01})


def step_with_gradients_of_zero(t):
    t.optimizer.zero_grad(set_to_none=False)
    t.optimizer.step()


def hyper(**values):
    return lambda t: t.optimizer.param_groups[0].update(values)


EDITS = {
    "parameter replaced": replace_parameter,
    "parameter replaced, momentum kept": replace_parameter_and_keep_momentum,
    "parameter moved between groups": move_between_groups,
    "parameters reversed": lambda t: t.optimizer.param_groups[0]["params"].reverse(),
    "list of parameters replaced": lambda t: hyper(params=t.params[1:2])(t),
    "parameter shrunk": shrink_with_its_momentum,
    "group added": add_a_group,
    "data replaced": data_of(lambda data: data + 1),
    "data transposed": data_of(torch.t),
    "data viewed as another dtype": view_as_another_dtype,
    "state replaced by nothing": state_is(dict),
    "state replaced by the user's": state_is(lambda: {"momentum_buffer": torch.full((4, 4), 10.0)}),
    "states swapped": swap_states,
    "all state cleared, then looked at": clear_and_look,
    "one state deleted, another added": delete_one_add_another,
    "one state cleared": lambda t: state_of(t).clear(),
    "buffer set to None": buffer_of(0, lambda buffer: None),
    "buffer transposed": buffer_of(0, lambda buffer: buffer.t()),
    "buffer negated": buffer_of(0, torch._neg_view),
    "buffer of a number replaced": buffer_of(3, lambda buffer: buffer + 1),
    "buffer's data replaced": lambda t: setattr(t.buffer(0), "data", torch.ones(4, 4)),
    "gradients of zero": step_with_gradients_of_zero,
    "another rate and sign": hyper(lr=0.01, maximize=True),
    "another decay": hyper(weight_decay=0.1),
    "another flag, of None": hyper(maximize=None),
    "another momentum": hyper(momentum=0.5),
    "momentum switched": lambda t: hyper(momentum=0.5 if t.momentum == 0 else 0.0)(t),
}


@covering(
    "backend_and_device",
    backend_and_device=BACKENDS,
    edit=EDITS,
    how={"momentum": (0.9, False), "plain": (0.0, False), "unseen": (0.9, True)},
)
def test_an_edit_counts_from_the_next_step_on(backend, edit, how):
    """Also, unseen, that of a parameter without a gradient in the step before."""
    momentum, unseen = how
    ours, theirs = pair_of(backend, momentum)
    kept = []
    for t in (ours, theirs):
        t.step(0)
        t.step(1)
        if momentum == 0:  # a momentum to edit
            for p in t.params:
                t.optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        if unseen:
            t.params[0].grad = None
            t.optimizer.step()
            kept += [t.params[0].data, t.buffer(0).data]  # or new memory might come to lie there
        edit(t)
        t.step(2)
        t.step(3)
    sixteen = ours.params[0].dtype == torch.bfloat16  # ours rounds once
    tolerance = {"rtol": 0.02, "atol": 0.02} if sixteen else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(ours.everything(), theirs.everything(), **tolerance)


# What leaves shapes, dtypes and lengths of groups as they were; the first also without momentum.
AT_ANY_TIME = [name for name in EDITS if name.startswith(("another", "data t", "data r", "state"))]
WITH_ALL_STATES = [name for name in EDITS if name.startswith(("buffer", "one", "all", "momentum"))]
WITH_ALL_STATES += ["parameter replaced, momentum kept", "parameters reversed"]


def test_edits_in_random_order(backend):
    for seed in range(12):
        draw = random.Random(seed)
        ours, theirs = pair_of(backend)
        for step in range(15):
            states = [theirs.optimizer.state[p] for p in theirs.params]
            complete = all(state.get("momentum_buffer") is not None for state in states)
            edit = EDITS[draw.choice(AT_ANY_TIME + WITH_ALL_STATES * complete)]
            skip = draw.randrange(12)
            for t in (ours, theirs):
                edit(t)
                t.step(step, skip)
            torch.testing.assert_close(ours.everything(), theirs.everything(), rtol=1e-5, atol=1e-5)


def test_a_first_gradient_that_comes_later(backend):
    """Undampened, as each one's first."""
    ours, theirs = pair_of(backend)
    for t in (ours, theirs):
        for group in t.optimizer.param_groups:
            group["dampening"] = 0.5
        t.params[0].requires_grad_(False)
        t.step(0, skip=0)
        t.step(1, skip=0)
        t.params[0].requires_grad_(True)
        t.step(2)
        t.step(3)
    torch.testing.assert_close(ours.everything(), theirs.everything(), rtol=1e-6, atol=1e-6)


def new_data(shape, gradient=True):
    """Of another shape, with a gradient that fits it or the one that was there."""

    def edit(weight, _):
        weight.data = torch.zeros(shape) if isinstance(shape, tuple) else weight.data[:shape]
        if gradient:
            weight.grad = None
            weight.grad = torch.ones_like(weight)

    return edit


def new_buffer(make):
    return lambda weight, state: state.update(momentum_buffer=make(weight))


REFUSED = {
    "buffer too small": new_buffer(lambda w: torch.zeros(3)),
    "buffer too large": new_buffer(lambda w: torch.zeros(90, 60)),
    "buffer of as many elements": new_buffer(lambda w: torch.zeros(6, 9)),
    "buffer resized": lambda w, state: state["momentum_buffer"].resize_(0),
    "buffer elsewhere": new_buffer(lambda w: torch.zeros_like(w, device="meta")),
    "buffer a number": new_buffer(lambda w: 3.0),
    "buffer a list": new_buffer(lambda w: [1.0]),
    "larger weight": new_data((900, 600)),
    "weight of as many elements": new_data((6, 9)),
    "first rows of the weight": new_data(2),
    "stale gradient": new_data((900, 600), gradient=False),
}
WHY = (
    "of parameter group 0 must (have its parameter's shape|be a tensor or None, got (3.0|.1.0.)"
    r"|be on its parameter's device \w+(:0)?, got meta)"
)


@covering("backend_and_device", backend_and_device=BACKENDS, edit=REFUSED)
def test_what_does_not_fit_its_parameter_is_refused_and_changes_nothing(backend, edit):
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9, backend=backend)
    train(model, optimizer, 2)
    whole = model[0].weight.data  # the first rows' neighbours are not to be written either
    edit(model[0].weight, optimizer.state[model[0].weight])
    before = copy.deepcopy([model.state_dict(), whole])
    buffers = [s["momentum_buffer"] for s in optimizer.state.values()]
    copies = copy.deepcopy(buffers[1:])
    for _ in range(2):
        with pytest.raises(ValueError, match=WHY):
            optimizer.step()
    torch.testing.assert_close([model.state_dict(), whole], before, rtol=0, atol=0)
    now = [s["momentum_buffer"] for s in optimizer.state.values()]
    assert all(a is b for a, b in zip(now, buffers, strict=True))
    assert all(map(torch.equal, now[1:], copies))
    assert optimizer.current_step == 2


def for_loop(params, **kwargs):
    return torch.optim.SGD(params, foreach=False, **kwargs)


def single_negated(p, x):
    """What autograd leaves for the imaginary part of a conjugated number."""
    z = torch.complex(torch.ones_like(x), p).conj()
    return torch.autograd.grad((z * z).real.sum(), [p])[0]


STRANGE = {
    "negated": lambda p, x: torch._neg_view(x),
    "imaginary part of a conjugate": lambda p, x: torch.complex(x, x).conj().imag,
    "autograd's": single_negated,
    "zeros by a flag": lambda p, x: torch._efficientzerotensor(p.shape, device=p.device),
    "one number expanded": lambda p, x: x.flatten()[0].expand(p.shape),
    "with gaps": lambda p, x: torch.stack([x, -x], -1)[..., 0],
    "the weights themselves": lambda p, x: p.detach(),
}


@covering(
    "backend_and_device",
    backend_and_device=BACKENDS,
    strange=STRANGE,
    shape={"number": (), "matrix": (40, 50)},
)
def test_a_strange_gradient(backend, strange, shape):
    def trained(make):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for _ in range(2)]
        optimizer = make(params, lr=0.1, momentum=0.9, weight_decay=0.1)
        for kind in ((lambda p, x: x), strange, strange, (lambda p, x: x)):
            for p in params:
                x = torch.randn(shape)
                p.grad = kind(p, x) if p is params[0] else x
            optimizer.step()
        return params

    expected = trained(for_loop)
    shares = strange is STRANGE["the weights themselves"]
    if shares and backend != "reference":
        with pytest.raises(ValueError, match="shares memory with another"):
            trained(lambda p, **k: SGD(p, backend=backend, **k))
        backend = None
    torch.testing.assert_close(trained(lambda p, **k: SGD(p, backend=backend, **k)), expected)


class Wrapped(torch.Tensor):
    """A tensor around another one, which takes no operators but torch's."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "aten":
            return NotImplemented
        plain = tree_map_only(cls, lambda t: t.inner, (args, kwargs or {}))
        result = function(*plain[0], **plain[1])
        return args[0] if function._schema.is_mutable else tree_map_only(torch.Tensor, cls, result)


def test_a_parameter_that_becomes_a_wrapper_goes_to_the_reference():
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.5)
    p.grad = torch.ones(3)
    optimizer.step()
    p.grad = None
    torch.utils.swap_tensors(p, nn.Parameter(Wrapped(torch.full((3,), 5.0))))
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.inner, torch.full((3,), 4.5))


def of_data(*make):
    return lambda flat: [nn.Parameter(each(flat)) for each in make]


def of_one(flat):
    return [nn.Parameter(flat)] * 2


def whole(flat):
    return flat


# Made of one vector, long enough for two threads; those that share memory go one after the other.
STRANGE_PARAMETERS = {
    "negated": of_data(torch._neg_view),
    "there twice": of_one,
    "tied by data": of_data(whole, whole),
    "a flat one and its parts": of_data(whole, lambda f: f[:35_000], lambda f: f[35_000:]),
    "parts and a flat one": of_data(lambda f: f[:35_000], whole, lambda f: f[::2]),
    "parts that overlap": of_data(lambda f: f[:40_000], lambda f: f[30_000:]),
}


@pytest.mark.parametrize("make", STRANGE_PARAMETERS.values(), ids=STRANGE_PARAMETERS)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_strange_parameters_go_to_the_reference(make):
    def trained(optimizer_of):
        torch.manual_seed(0)
        params = make(torch.randn(70_000))
        rates = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(params)]
        groups = params if make is of_one else rates
        optimizer = optimizer_of(groups, lr=0.1, momentum=0.9, weight_decay=0.1)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            optimizer.step()
        return [p.detach() for p in params]

    torch.testing.assert_close(trained(SGD), trained(for_loop), rtol=0, atol=0)
    if library.backends()["cpu"].available:
        with pytest.raises(ValueError, match="cannot take parameter 0: it"):
            trained(lambda p, **k: SGD(p, backend="cpu", **k))


def test_a_default_device_is_none_of_the_optimizers_business():
    def trained(context):
        p = nn.Parameter(torch.ones(3, device="cpu"))
        with context:
            optimizer = SGD([p], lr=0.1, momentum=0.9, total_steps=9)
            for _ in range(3):
                p.grad = torch.ones(3, device="cpu")
                optimizer.step()
        return p.tolist()

    assert trained(torch.device("meta")) == trained(torch.device("cpu"))


@needs_grad_dtype
@covering(
    momentum=[0.0, 0.9],
    change={"same plan": {}, "new plan": {"weight_decay": 0.1}},
    dtypes={
        "wide gradient": (torch.bfloat16, torch.float32),
        "narrow gradient": (torch.float32, torch.bfloat16),
    },
)
def test_gradients_of_another_dtype(dtypes, change, momentum):
    """Momentum takes theirs, as in torch."""
    dtype, grad_dtype = dtypes
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(33, dtype=dtype)) for _ in range(3)]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    o = SGD(ours, lr=0.1, momentum=momentum)
    t = torch.optim.SGD(theirs, lr=0.1, momentum=momentum, foreach=False)
    for step in range(5):
        for p in (ours[2], theirs[2]) if step == 0 else (ours[1], theirs[1]) if step == 2 else ():
            p.grad, p.grad_dtype = None, grad_dtype
        if step == 3:
            o.param_groups[0].update(change)
            t.param_groups[0].update(change)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(33, dtype=p.grad_dtype)
            q.grad = p.grad.clone()
        o.step()
        t.step()
    roundings = 0.02 if dtype == torch.bfloat16 else 0.0  # of five steps in torch, one each here
    torch.testing.assert_close(ours, theirs, rtol=0, atol=roundings)
    kept = [[s["momentum_buffer"].dtype for s in x.state.values()] for x in (o, t) if momentum]
    assert kept == kept[::-1]


@needs_grad_dtype
def test_a_kernel_refuses_gradients_of_another_dtype(backend):
    p = nn.Parameter(torch.ones(33))
    optimizer = SGD([p], lr=0.1, momentum=0.9, backend=backend)
    p.grad = torch.ones(33)
    optimizer.step()
    p.grad, p.grad_dtype = None, torch.bfloat16
    p.grad = torch.ones(33, dtype=torch.bfloat16)
    before = copy.deepcopy((p.detach(), optimizer.state[p]))
    for _ in range(2) if backend != "reference" else ():
        with pytest.raises(ValueError, match=r"parameter 0: its gradient is torch.bfloat16"):
            optimizer.step()
        torch.testing.assert_close((p.detach(), optimizer.state[p]), before, rtol=0, atol=0)
        assert optimizer.current_step == 1


class Doubled(torch.Tensor):
    """A subclass whose values are not those in its memory."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        args = [2 * a.as_subclass(torch.Tensor) if type(a) is cls else a for a in args]
        return function(*args, **(kwargs or {}))


def test_a_gradient_of_a_subclass(backend):
    p = nn.Parameter(torch.ones(3))
    optimizer = SGD([p], lr=0.5, backend=backend)
    for grad in (torch.ones(3), torch.ones(3).as_subclass(Doubled)):
        p.grad = grad
        optimizer.step()
    assert p.tolist() == [1 - 0.5 - 1.0] * 3
