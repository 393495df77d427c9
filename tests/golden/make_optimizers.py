#!/usr/bin/env python3
"""Makes optimizers.safetensors, the golden trajectories of every optimizer, beside this script.

usage: python make_optimizers.py             write the file, with every check that the installed packages allow
       python make_optimizers.py --quick     write the file without a check
       python make_optimizers.py NAME ...    only make and check the runs whose names start so; write nothing

Each rule below is written from the paper or the project that is named with it, one tensor at a time, in double
precision, as plainly as it can be said. A run is 200 steps over the tensors, gradients and rates of make_training.py;
stored are all parameters after steps 1, 2, 10, 50 and 200. A run whose name ends in _late counts on from step 999,999 after its first. How a run is set up is in the metadata of the file.

The rules are held against torch.optim, and against optax and the packages of the authors where these are installed
(pip install optax schedulefree prodigyopt dadaptation adamp adabelief-pytorch adabound madgrad
momo-opt dog-optimizer torch-optimi qhoptim came-pytorch grams-pytorch pytorch_optimizer timm).
"""
import importlib
import math
import pathlib
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import torch
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).resolve().parent
for folder in (HERE, pathlib.Path("tests/golden")):
    if (folder / "make_training.py").exists():
        sys.path.insert(0, str(folder))
        break
import make_training as training
from make_training import CHECKPOINTS, RUN, SHAPES, describe, first_theta, gradient, multiplier, rms, step_gradients, uniform

RULES = {}       # algorithm -> (function, default options)
RUNS = {}        # name of a run -> settings
COMMON = dict(weight_decay=0.0, decay="l2", decay_lr=1.0, decay_period=1.0, maximize=0, cautious=0, dialect="")
RUN_KEYS = ("algorithm", "stream", "no_tiny", "skip", "f64_only", "curvature_period", "late")
LATE = 999_999   # a late run counts on from here after its first step


# ---- what all rules share --------------------------------------------------------------------------------------------

class State:
    """The state of one tensor (or of all of them together). What was never set is 0."""

    def __getattr__(self, name):
        return 0.0

    def first(self, name, value):
        """Sets what was not set before."""
        if name not in vars(self):
            setattr(self, name, value)


def rule(*names, scope="tensor", inside=False, **defaults):
    """Registers a rule. scope "tensor": rule(o, s, g, theta, lr) returns what is subtracted from theta, and the decay is
    applied around it; "own": it changes theta itself, decay and all; "all": it does so to all tensors together,
    rule(o, shared state, [(theta, g, s)], lr). inside: the rule has a place of its own for lambda theta."""
    def register(function):
        for name in names:
            RULES[name] = SimpleNamespace(function=function, defaults=defaults, scope=scope, inside=inside)
        return function
    return register


def alias(name, of, **defaults):
    RULES[name] = SimpleNamespace(**{**vars(RULES[of]), "defaults": {**RULES[of].defaults, **defaults}})


def decay_factor(o):
    """The factor of theta of the decays that are applied before the update."""
    return 1 - o.weight_decay * {
        "lr": o.multiplier * o.lr, "scheduled": o.multiplier * o.decay_lr,
        "normalized": o.multiplier * o.decay_lr / math.sqrt(o.decay_period),
        "corrected": (o.multiplier * o.lr) ** 2 / o.lr, "fixed": 1.0}.get(o.decay, 0.0)


class Optimizer:
    """A list of float64 arrays, changed in place. Each tensor counts its own steps; one without a gradient, and one
    without elements, is left alone."""

    def __init__(self, theta, algorithm, **options):
        self.theta = theta
        self.rule = RULES[algorithm]
        unknown = set(options) - set(COMMON) - set(self.rule.defaults)
        assert not unknown, (algorithm, unknown)
        self.o = SimpleNamespace(**{**COMMON, **self.rule.defaults, **options})
        self.state = [State() for _ in theta]
        self.shared = State()
        self.shared.theta, self.shared.start = theta, [x.copy() for x in theta]

    def step(self, gradients, eta, loss=None, curvature=None):
        """curvature: one estimate for each tensor, handed in once the gradients of the step are known, or None."""
        o = self.o
        o.multiplier, o.loss = eta, loss
        lr = eta * o.lr
        present = []
        for p, (theta, g, s) in enumerate(zip(self.theta, gradients, self.state)):
            if g is None or theta.size == 0:
                continue
            s.t = int(s.t) + 1
            s.curvature = None if curvature is None else curvature[p]
            g = -g if o.maximize else g
            present.append((theta, g + o.weight_decay * theta if o.decay == "l2" and not self.rule.inside else g, s))
        if self.rule.scope == "all":
            self.rule.function(o, self.shared, present, lr)
            return
        for theta, g, s in present:
            if self.rule.scope == "own":
                self.rule.function(o, s, g, theta, lr)
            else:
                self.apply(theta, self.rule.function(o, s, g, theta, lr), g, lr)

    def apply(self, theta, update, g, lr):
        o = self.o
        if update is None:      # not even decay
            return
        if o.cautious:          # Liang et al. 2024; timm: the mask over its mean, which is at least 1e-3
            mask = update * g > 0
            update = update * mask / max(mask.mean(), 1e-3)
        if self.rule.inside:
            pass
        elif o.decay == "cautious":
            theta *= 1 - lr * o.weight_decay * (update * theta >= 0)
        else:
            theta *= decay_factor(o)
        theta -= update
        if o.decay == "prox":
            theta /= 1 + lr * o.weight_decay


def ema(old, new, beta):
    return beta * old + (1 - beta) * new


# ---- torch.optim's own -----------------------------------------------------------------------------------------------

@rule("sgd", "nesterov", lr=1e-3, beta1=0.0, dampening=0.0, nesterov=0)
def sgd(o, s, g, theta, lr):
    """torch.optim.SGD: the first gradient is taken whole."""
    if o.beta1 == 0:
        return lr * g
    s.b = g.copy() if s.t == 1 else o.beta1 * s.b + (1 - o.dampening) * g
    return lr * (g + o.beta1 * s.b if o.nesterov else s.b)


alias("momentum", "sgd", beta1=0.9)
alias("nesterov", "sgd", beta1=0.9, nesterov=1)


@rule("adagrad", lr=1e-2, lr_decay=0.0, initial=0.0, eps=1e-10)
def adagrad(o, s, g, theta, lr):
    """Duchi, Hazan, Singer 2011; torch.optim.Adagrad. inside: epsilon under the root."""
    s.first("v", o.initial)
    s.v = s.v + g * g
    lr /= 1 + (s.t - 1) * o.lr_decay
    return lr * g / (np.sqrt(s.v + o.eps) if o.dialect == "inside" else np.sqrt(s.v) + o.eps)


@rule("rmsprop", lr=1e-2, beta2=0.99, eps=1e-8, beta1=0.0, centered=0)
def rmsprop(o, s, g, theta, lr):
    """Tieleman, Hinton 2012; torch.optim.RMSprop. tf: v starts at 1, epsilon under the root, lr inside the momentum."""
    tf = o.dialect == "tf"
    s.first("v", np.full(g.shape, float(tf)))
    s.v = ema(s.v, g * g, o.beta2)
    v = s.v
    if o.centered:
        s.a = ema(s.a, g, o.beta2)
        v = np.maximum(v - s.a * s.a, 0)
    if tf:
        s.b = o.beta1 * s.b + lr * g / np.sqrt(v + o.eps)
        return s.b
    s.b = o.beta1 * s.b + g / (np.sqrt(v) + o.eps)
    return lr * s.b


def moments(o, s, g):
    s.m = ema(s.m, g, o.beta1)
    s.v = ema(s.v, g * g, o.beta2)
    return 1 - o.beta1 ** s.t, 1 - o.beta2 ** s.t


@rule("adam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def adam(o, s, g, theta, lr):
    """Kingma, Ba 2014, algorithm 1; torch.optim.Adam."""
    c1, c2 = moments(o, s, g)
    return lr * (s.m / c1) / (np.sqrt(s.v / c2) + o.eps)


alias("adamw", "adam", weight_decay=1e-2, decay="lr")


@rule("amsgrad", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def amsgrad(o, s, g, theta, lr):
    """Reddi, Kale, Kumar 2018, algorithm 2 (dialect paper); torch.optim.Adam(amsgrad=True); optax.amsgrad."""
    c1, c2 = moments(o, s, g)
    if o.dialect == "optax":
        s.top = np.maximum(s.top, s.v / c2)
        return lr * (s.m / c1) / (np.sqrt(s.top) + o.eps)
    s.top = np.maximum(s.top, s.v)
    if o.dialect == "paper":
        return lr * s.m / (np.sqrt(s.top) + o.eps)
    return lr * (s.m / c1) / (np.sqrt(s.top / c2) + o.eps)


@rule("adamax", lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def adamax(o, s, g, theta, lr):
    """Kingma, Ba 2014, algorithm 2; torch.optim.Adamax, optax.adamax."""
    s.m = ema(s.m, g, o.beta1)
    s.u = np.maximum(o.beta2 * s.u, np.abs(g) + o.eps)
    return lr / (1 - o.beta1 ** s.t) * s.m / s.u


alias("adamaxw", "adamax", weight_decay=1e-2, decay="lr")


@rule("nadam", lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, momentum_decay=4e-3)
def nadam(o, s, g, theta, lr):
    """Dozat 2016; torch.optim.NAdam; optax.nadam; mlcommons: MLCommons algorithmic-efficiency and timm's NAdamW."""
    c1, c2 = moments(o, s, g)
    if o.dialect == "optax":
        m = o.beta1 * s.m / (1 - o.beta1 ** (s.t + 1)) + (1 - o.beta1) * g / c1
    elif o.dialect == "mlcommons":
        m = ema(s.m, g, o.beta1) / c1
    else:
        mu, after = (o.beta1 * (1 - 0.5 * 0.96 ** (t * o.momentum_decay)) for t in (s.t, s.t + 1))
        s.first("product", 1.0)
        s.product = s.product * mu
        m = (1 - mu) * g / (1 - s.product) + after * s.m / (1 - s.product * after)
    return lr * m / (np.sqrt(s.v / c2) + o.eps)


alias("nadamw", "nadam", dialect="optax", weight_decay=1e-2, decay="lr")


@rule("radam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def radam(o, s, g, theta, lr):
    """Liu et al. 2020, algorithm 2; torch.optim.RAdam; official: github.com/LiyuanLucasLiu/RAdam; optax.radam."""
    c1, c2 = moments(o, s, g)
    most = 2 / (1 - o.beta2) - 1
    rho = most - 2 * s.t * o.beta2 ** s.t / c2
    if rho <= 5 if not o.dialect else rho < 5:
        return None if o.dialect == "official" else lr * s.m / c1
    r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
    if o.dialect == "optax":
        return lr * r * (s.m / c1) / (np.sqrt(s.v / c2) + o.eps)
    return lr * r * (s.m / c1) * math.sqrt(c2) / (np.sqrt(s.v) + o.eps)


@rule("adadelta", lr=1.0, beta2=0.9, eps=1e-6)
def adadelta(o, s, g, theta, lr):
    """Zeiler 2012, algorithm 1; torch.optim.Adadelta."""
    s.v = ema(s.v, g * g, o.beta2)
    step = np.sqrt(s.a + o.eps) / np.sqrt(s.v + o.eps) * g
    s.a = ema(s.a, step * step, o.beta2)
    return lr * step


@rule("asgd", scope="own", lr=1e-2, lambd=1e-4, alpha=0.75, t0=1e6)
def asgd(o, s, g, theta, lr):
    """Polyak, Juditsky 1992; torch.optim.ASGD: the step size is that of the step before, lr at first."""
    s.first("step", lr)
    theta *= decay_factor(o)
    theta *= 1 - o.lambd * s.step
    theta -= s.step * g
    s.step = lr / (1 + o.lambd * lr * s.t) ** o.alpha


@rule("rprop", lr=1e-2, eta_minus=0.5, eta_plus=1.2, step_min=1e-6, step_max=50.0)
def rprop(o, s, g, theta, lr):
    """Riedmiller, Braun 1993; torch.optim.Rprop: lr is only the first step size, that of the first step."""
    s.first("step", np.full(g.shape, lr))
    sign = np.sign(g) * np.sign(s.last)
    s.step = np.clip(s.step * np.where(sign > 0, o.eta_plus, np.where(sign < 0, o.eta_minus, 1.0)), o.step_min, o.step_max)
    s.last = np.where(sign < 0, 0.0, g)
    return s.step * np.sign(s.last)


@rule("sparse-adam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def sparse_adam(o, s, g, theta, lr):
    """torch.optim.SparseAdam: Adam with epsilon outside of the correction, only where a row has a gradient."""
    s.first("m", np.zeros(g.shape))
    s.first("v", np.zeros(g.shape))
    rows = np.ones(g.shape, bool)
    if g.ndim >= 2:
        rows &= g.reshape(len(g), -1).any(axis=1).reshape(-1, *[1] * (g.ndim - 1))
    s.m = np.where(rows, ema(s.m, g, o.beta1), s.m)
    s.v = np.where(rows, ema(s.v, g * g, o.beta2), s.v)
    lr *= math.sqrt(1 - o.beta2 ** s.t) / (1 - o.beta1 ** s.t)
    return np.where(rows, lr * s.m / (np.sqrt(s.v) + o.eps), 0.0)


# ---- signs -----------------------------------------------------------------------------------------------------------

@rule("lion", lr=1e-4, beta1=0.9, beta2=0.99, decay="lr")
def lion(o, s, g, theta, lr):
    """Chen et al. 2023, algorithm 2; github.com/google/automl/tree/master/lion."""
    update = lr * np.sign(ema(s.m, g, o.beta1))
    s.m = ema(s.m, g, o.beta2)
    return update


@rule("tiger", "signum", lr=1e-3, beta1=0.965)
def tiger(o, s, g, theta, lr):
    """tiger: github.com/bojone/tiger; signum: Bernstein et al. 2018, algorithm 2."""
    s.m = ema(s.m, g, o.beta1)
    return lr * np.sign(s.m)


alias("tiger", "tiger", decay="lr")
alias("signum", "signum", beta1=0.9)


@rule("sign-sgd", lr=1e-3)
def sign_sgd(o, s, g, theta, lr):
    """Bernstein et al. 2018, algorithm 1; optax.sign_sgd."""
    return lr * np.sign(g)


# ---- curvature -------------------------------------------------------------------------------------------------------

@rule("sophia-g", lr=1e-4, beta1=0.965, beta2=0.99, rho=0.04, batch=1, weight_decay=0.1, decay="lr")
def sophia_g(o, s, g, theta, lr):
    """Liu et al. 2023, algorithm 3; github.com/Liuhong99/Sophia. The curvature is a gradient of sampled labels."""
    if s.curvature is not None:
        s.h = ema(s.h, np.square(s.curvature), o.beta2)
    s.m = ema(s.m, g, o.beta1)
    return lr * np.sign(s.m) * np.minimum(1, np.abs(s.m) / (o.rho * o.batch * s.h + 1e-15))


@rule("sophia-h", lr=1e-4, beta1=0.96, beta2=0.99, gamma=0.01, eps=1e-12, decay="lr")
def sophia_h(o, s, g, theta, lr):
    """optax.contrib.sophia: m corrected; an estimate of the curvature, z H z, counts from the next step on."""
    s.m = ema(s.m, g, o.beta1)
    update = lr * np.clip(s.m / (1 - o.beta1 ** s.t) / np.maximum(o.gamma * s.h, o.eps), -1, 1)
    if s.curvature is not None:
        s.h = ema(s.h, s.curvature, o.beta2)
    return update


# ---- more that go element by element ---------------------------------------------------------------------------------

@rule("adabelief", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-16, rectify=0, decay="lr")
def adabelief(o, s, g, theta, lr):
    """Zhuang et al. 2020; github.com/juntang-zhuang/Adabelief-Optimizer: epsilon stays in s, and is in the divisor too."""
    s.m = ema(s.m, g, o.beta1)
    s.s = ema(s.s, np.square(g - s.m), o.beta2) + o.eps
    c1, c2 = 1 - o.beta1 ** s.t, 1 - o.beta2 ** s.t
    if not o.rectify:
        return lr * (s.m / c1) / (np.sqrt(s.s / c2) + o.eps)
    most = 2 / (1 - o.beta2) - 1
    rho = most - 2 * s.t * o.beta2 ** s.t / c2
    if rho < 5:
        return lr * s.m / c1
    r = math.sqrt((rho - 4) * (rho - 2) * most / ((most - 4) * (most - 2) * rho))
    return lr * r * (s.m / c1) * math.sqrt(c2) / (np.sqrt(s.s) + o.eps)


@rule("adan", lr=1e-3, beta1=0.98, beta2=0.92, beta3=0.99, eps=1e-8, decay="prox")
def adan(o, s, g, theta, lr):
    """Xie et al. 2022, algorithm 1 with beta for 1 - beta; github.com/sail-sg/Adan."""
    difference = g - s.last if s.t > 1 else np.zeros(g.shape)
    s.last = g.copy()
    s.m = ema(s.m, g, o.beta1)
    s.d = ema(s.d, difference, o.beta2)
    s.n = ema(s.n, np.square(g + o.beta2 * difference), o.beta3)
    divisor = np.sqrt(s.n / (1 - o.beta3 ** s.t)) + o.eps
    return lr * (s.m / (1 - o.beta1 ** s.t) + o.beta2 * s.d / (1 - o.beta2 ** s.t)) / divisor


@rule("yogi", lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-3, initial=1e-6)
def yogi(o, s, g, theta, lr):
    """Zaheer et al. 2018, algorithm 2; v starts at initial, m at 0; both are corrected as in Adam."""
    s.first("v", np.full(g.shape, o.initial))
    s.m = ema(s.m, g, o.beta1)
    s.v = s.v - (1 - o.beta2) * np.sign(s.v - g * g) * (g * g)
    return lr * s.m / (1 - o.beta1 ** s.t) / (np.sqrt(s.v / (1 - o.beta2 ** s.t)) + o.eps)


@rule("noisy-sgd", lr=1e-3, eta=0.01, gamma=0.55)
def noisy_sgd(o, s, g, theta, lr):
    """Neelakantan et al. 2014; without the noise, which has no reference."""
    return lr * g


@rule("optimistic-adam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, alpha=1.0, gamma=1.0)
def optimistic_adam(o, s, g, theta, lr):
    """Daskalakis et al. 2018; optax.optimistic_adam_v2, whose Adam is NAdam."""
    c1, c2 = moments(o, s, g)
    m = o.beta1 * s.m / (1 - o.beta1 ** (s.t + 1)) + (1 - o.beta1) * g / c1
    u = m / (np.sqrt(s.v / c2) + o.eps)
    s.first("u", u)
    update = lr * ((o.alpha + o.gamma) * u - o.gamma * s.u)
    s.u = u
    return update


@rule("cocob", scope="own", lr=1.0, alpha=100.0, eps=1e-8)
def cocob(o, s, g, theta, lr):
    """Orabona, Tommasi 2017, algorithm 2; optax.contrib.cocob. There is no learning rate, and no schedule of one."""
    s.first("start", theta.copy())
    s.top = np.maximum(np.maximum(s.top, o.eps), np.abs(g))
    s.total = s.total + np.abs(g)
    s.reward = np.maximum(s.reward - g * (theta - s.start), 0)
    s.sum = s.sum - g
    theta[...] = s.start + s.sum / (s.top * np.maximum(s.total + s.top, o.alpha * s.top)) * (s.top + s.reward)


@rule("madgrad", scope="own", lr=1e-2, beta1=0.9, eps=1e-6)
def madgrad(o, s, g, theta, lr):
    """Defazio, Jelassi 2021, algorithm 1; github.com/facebookresearch/madgrad: epsilon is added to the rate too."""
    s.first("start", theta.copy())
    rate = (lr + o.eps) * math.sqrt(s.t)
    s.v = s.v + rate * g * g
    s.s = s.s + rate * g
    theta *= decay_factor(o)
    theta[...] = o.beta1 * theta + (1 - o.beta1) * (s.start - s.s / (np.cbrt(s.v) + o.eps))


@rule("acprop", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-16, decay="lr")
def acprop(o, s, g, theta, lr):
    """Zhuang et al. 2021, ACProp; optax.contrib.acprop: the gradient itself over the divisor of the step before, 1 at first;
    the error is from the m of the step before; epsilon stays in v."""
    v = s.v / (1 - o.beta2 ** (s.t - 1)) if s.t > 1 else 1.0
    s.v = ema(s.v, np.square(g - s.m), o.beta2) + o.eps
    s.m = ema(s.m, g, o.beta1)
    return lr * g / (np.sqrt(v) + o.eps)


@rule("adopt", lr=1e-3, beta1=0.9, beta2=0.9999, eps=1e-6)
def adopt(o, s, g, theta, lr):
    """Taniguchi et al. 2024, algorithm 2; github.com/iShohei220/adopt with its clipping: no update at the first step."""
    if s.t == 1:
        s.v = g * g
        return None
    bound = (s.t - 1) ** 0.25
    s.m = ema(s.m, np.clip(g / np.maximum(np.sqrt(s.v), o.eps), -bound, bound), o.beta1)
    s.v = ema(s.v, g * g, o.beta2)
    return lr * s.m


@rule("ademamix", lr=1e-3, beta1=0.9, beta2=0.999, beta3=0.9999, eps=1e-8, alpha=5.0, warmup=0, decay="lr")
def ademamix(o, s, g, theta, lr):
    """Pagliardini et al. 2024, algorithm 1; github.com/apple/ml-ademamix: alpha grows evenly, beta3 by its half-life."""
    alpha, beta3 = o.alpha, o.beta3
    if s.t < o.warmup:
        part = s.t / o.warmup
        alpha *= part
        half = [math.log(0.5) / math.log(beta + 1e-8) - 1 for beta in (o.beta1, o.beta3)]
        beta3 = 0.5 ** (1 / ((1 - part) * half[0] + part * half[1] + 1))
    c1, c2 = moments(o, s, g)
    s.slow = ema(s.slow, g, beta3)
    return lr * (s.m / c1 + alpha * s.slow) / (np.sqrt(s.v / c2) + o.eps)


@rule("mars", lr=3e-3, beta1=0.95, beta2=0.99, gamma=0.025, eps=1e-8, decay="lr")
def mars(o, s, g, theta, lr):
    """Yuan et al. 2024, algorithm 2; github.com/AGI-Arena/MARS, mars-adamw for every tensor; the gradient before is 0."""
    c = g + o.gamma * o.beta1 / (1 - o.beta1) * (g - s.last)
    s.last = g.copy()
    c1, c2 = moments(o, s, c / max(1.0, float(np.linalg.norm(c))))
    return lr * (s.m / c1) / (np.sqrt(s.v / c2) + o.eps)


@rule("schedule-free-sgd", "schedule-free-adamw", scope="own", inside=True, lr=1.0, beta1=0.9, weight_lr_power=2.0, r=0.0)
def schedule_free(o, s, g, y, lr):
    """Defazio et al. 2024; github.com/facebookresearch/schedule_free. The parameters are y; lambda y is added last."""
    s.first("z", y.copy())
    if hasattr(o, "beta2"):
        s.v = ema(s.v, g * g, o.beta2)
        g = g / (np.sqrt(s.v / (1 - o.beta2 ** s.t)) + o.eps)
    g = g + o.weight_decay * y
    s.top = max(s.top, lr)
    weight = s.t ** o.r * s.top ** o.weight_lr_power
    s.sum = s.sum + weight
    c = weight / s.sum
    y[...] = (1 - c) * y + c * s.z + lr * (o.beta1 * (1 - c) - 1) * g
    s.z -= lr * g


alias("schedule-free-adamw", "schedule-free-sgd", lr=2.5e-3, beta2=0.999, eps=1e-8)


@rule("stable-adamw", scope="own", lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, decay="lr")
def stable_adamw(o, s, g, theta, lr):
    """Wortsman et al. 2023; github.com/warner-benjamin/optimi: corrected betas; the rate is divided, for the decay too, by
    the root mean square of g / sqrt(v) where that is above 1."""
    b1, b2 = (beta * (1 - beta ** (s.t - 1)) / (1 - beta ** s.t) for beta in (o.beta1, o.beta2))
    s.m = ema(s.m, g, b1)
    s.v = ema(s.v, g * g, b2)
    lr /= max(1.0, math.sqrt(float(np.mean(g * g / np.maximum(s.v, o.eps ** 2)))))
    theta *= 1 - lr * o.weight_decay if o.decay == "lr" else decay_factor(o)
    theta -= lr * s.m / (np.sqrt(s.v) + o.eps)


@rule("adam-mini", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay="lr")
def adam_mini(o, s, g, theta, lr):
    """Zhang et al. 2024; github.com/zyushun/Adam-mini: one v for each index of the first axis; for a vector, one."""
    axes = tuple(range(1, g.ndim)) if g.ndim >= 2 else tuple(range(g.ndim))
    s.m = ema(s.m, g, o.beta1)
    s.v = ema(s.v, np.mean(g * g, axis=axes, keepdims=True), o.beta2)
    return lr * (s.m / (1 - o.beta1 ** s.t)) / (np.sqrt(s.v / (1 - o.beta2 ** s.t)) + o.eps)


@rule("adabound", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, final_lr=0.1, gamma=1e-3, amsbound=0)
def adabound(o, s, g, theta, lr):
    """Luo et al. 2019, algorithm 2; github.com/Luolc/AdaBound: final_lr follows the schedule."""
    c1, c2 = moments(o, s, g)
    s.top = np.maximum(s.top, s.v)
    rate = lr * math.sqrt(c2) / c1 / (np.sqrt(s.top if o.amsbound else s.v) + o.eps)
    final = o.multiplier * o.final_lr
    return np.clip(rate, final * (1 - 1 / (o.gamma * s.t + 1)), final * (1 + 1 / (o.gamma * s.t))) * s.m


def without_radial(o, theta, g, update):
    """The update without the part along theta, where g is nearly at right angles to theta: by rows, else as a whole; and
    the factor of the decay."""
    if theta.ndim < 2:
        return update, 1.0
    for view in ((len(theta), -1), (1, -1)):
        x, y, u = theta.reshape(view), g.reshape(view), update.reshape(view)
        norms = [np.maximum(np.linalg.norm(each, axis=1), o.eps) for each in (x, y)]
        cosine = np.abs(np.sum(x * y, axis=1) / norms[0] / norms[1])
        if cosine.max() < o.delta / math.sqrt(x.shape[1]):
            n = x / (np.linalg.norm(x, axis=1, keepdims=True) + o.eps)
            return (u - n * np.sum(n * u, axis=1, keepdims=True)).reshape(theta.shape), o.wd_ratio
    return update, 1.0


@rule("adamp", scope="own", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, delta=0.1, wd_ratio=0.1, nesterov=0, decay="lr")
def adamp(o, s, g, theta, lr):
    """Heo et al. 2021, algorithm 2; github.com/clovaai/AdamP."""
    c1, c2 = moments(o, s, g)
    m = ema(s.m, g, o.beta1) if o.nesterov else s.m
    update, ratio = without_radial(o, theta, g, m / (np.sqrt(s.v / c2) + o.eps))
    theta *= 1 - lr * o.weight_decay * ratio
    theta -= lr / c1 * update


@rule("sgdp", scope="own", lr=1e-1, beta1=0.0, dampening=0.0, eps=1e-8, delta=0.1, wd_ratio=0.1, nesterov=0, decay="lr")
def sgdp(o, s, g, theta, lr):
    """Heo et al. 2021, algorithm 1; github.com/clovaai/AdamP: the decay is divided by 1 - beta1."""
    s.b = o.beta1 * s.b + (1 - o.dampening) * g
    update, ratio = without_radial(o, theta, g, g + o.beta1 * s.b if o.nesterov else s.b)
    theta *= 1 - lr * o.weight_decay * ratio / (1 - o.beta1)
    theta -= lr * update


@rule("laprop", scope="own", lr=4e-4, beta1=0.9, beta2=0.999, eps=1e-15, decay="lr")
def laprop(o, s, g, theta, lr):
    """Ziyin, Wang, Ueda 2020, algorithm 1; github.com/Z-T-WANG/LaProp-Optimizer: the rate is inside of m, whose correction
    is the average of the rates; decay after the update."""
    s.v = ema(s.v, g * g, o.beta2)
    s.rate = ema(s.rate, lr, o.beta1)
    s.m = ema(s.m, lr * g / (np.sqrt(s.v / (1 - o.beta2 ** s.t)) + o.eps), o.beta1)
    theta -= lr / s.rate * s.m
    theta *= decay_factor(o)


@rule("qhm", lr=1.0, beta1=0.999, nu=0.7)
def qhm(o, s, g, theta, lr):
    """Ma, Yarats 2019, equation 3; github.com/facebookresearch/qhoptim."""
    s.m = ema(s.m, g, o.beta1)
    return lr * ((1 - o.nu) * g + o.nu * s.m)


@rule("qhadam", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, nu1=0.7, nu2=1.0)
def qhadam(o, s, g, theta, lr):
    """Ma, Yarats 2019, equation 7; github.com/facebookresearch/qhoptim."""
    c1, c2 = moments(o, s, g)
    return lr * ((1 - o.nu1) * g + o.nu1 * s.m / c1) / (np.sqrt((1 - o.nu2) * g * g + o.nu2 * s.v / c2) + o.eps)


@rule("aggmo", lr=0.1, beta1=0.9, beta2=0.99)
def aggmo(o, s, g, theta, lr):
    """Lucas et al. 2019, equation 3; github.com/AtheMathmo/AggMo, with the betas 0, beta1, beta2."""
    s.b1, s.b2 = o.beta1 * s.b1 + g, o.beta2 * s.b2 + g
    return lr / 3 * (g + s.b1 + s.b2)


@rule("pnm", lr=1e-3, beta1=0.9, alpha=1.0, decay="lr")
def pnm(o, s, g, theta, lr):
    """Xie et al. 2021, algorithm 2; github.com/zeke-xie/Positive-Negative-Momentum."""
    s.m, s.other = ema(s.other, g, o.beta1 ** 2), s.m
    return lr * ((1 + o.alpha) * s.m - o.alpha * s.other) / math.sqrt((1 + o.alpha) ** 2 + o.alpha ** 2)


@rule("diffgrad", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8)
def diffgrad(o, s, g, theta, lr):
    """Dubey et al. 2020; github.com/shivram1987/diffGrad, version 2; the gradient before is 0 at first."""
    c1, c2 = moments(o, s, g)
    friction = 1 / (1 + np.exp(-np.abs(s.last - g)))
    s.last = g.copy()
    return lr * math.sqrt(c2) / c1 * friction * s.m / (np.sqrt(s.v) + o.eps)


@rule("swats", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-9)
def swats(o, s, g, theta, lr):
    """Keskar, Socher 2017, algorithm 1, each tensor by itself. The rate of SGD follows the schedule."""
    if s.rate:
        s.b = o.beta1 * s.b + g
        return o.multiplier * (1 - o.beta1) * s.rate * s.b
    c1, c2 = moments(o, s, g)
    update = lr * math.sqrt(c2) / c1 * s.m / (np.sqrt(s.v) + o.eps)
    along = float(np.sum(update * g))
    if along:
        ratio = float(np.sum(update * update)) / along
        s.mean = ema(s.mean, ratio, o.beta2)
        if s.t > 1 and abs(s.mean / c2 - ratio) < o.eps:
            s.rate = s.mean / c2
    return update


@rule("grams", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, decay="lr")
def grams(o, s, g, theta, lr):
    """Cao, Li, Song 2024, algorithm 1."""
    return np.sign(g) * np.abs(adam(o, s, g, theta, lr))


@rule("adam-atan2", lr=1e-3, beta1=0.9, beta2=0.999, decay="lr")
def adam_atan2(o, s, g, theta, lr):
    """Everett et al. 2024, with a = b = 1."""
    c1, c2 = moments(o, s, g)
    return lr * np.arctan2(s.m / c1, np.sqrt(s.v / c2))


@rule("adahessian", lr=0.1, beta1=0.9, beta2=0.999, eps=1e-4, power=1.0, decay="lr")
def adahessian(o, s, g, theta, lr):
    """Yao et al. 2021, algorithm 1; github.com/amirgholami/adahessian, without averages over blocks. The estimates of the
    curvature count for themselves: v is corrected by their number."""
    if s.curvature is not None:
        s.k = s.k + 1
        s.v = ema(s.v, np.square(s.curvature), o.beta2)
    s.m = ema(s.m, g, o.beta1)
    return lr * s.m / (1 - o.beta1 ** s.t) / (np.sqrt(s.v / (1 - o.beta2 ** s.k)) ** o.power + o.eps)


# ---- norms of a tensor ---------------------------------------------------------------------------------------------------

def norm(x):
    return float(np.linalg.norm(x))


def ratio_of(top, bottom):
    return top / bottom if top and bottom else 1.0


@rule("lamb", inside=True, lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-6, weight_decay=0.01)
def lamb(o, s, g, theta, lr):
    """You et al. 2020, algorithm 2; optax.lamb."""
    c1, c2 = moments(o, s, g)
    r = s.m / c1 / (np.sqrt(s.v / c2) + o.eps) + o.weight_decay * theta
    return lr * ratio_of(norm(theta), norm(r)) * r


@rule("lars", inside=True, lr=1.0, beta1=0.9, trust=1e-3, eps=1e-8)
def lars(o, s, g, theta, lr):
    """You, Gitman, Ginsburg 2017, algorithm 1; optax.lars: the rate is inside of the momentum, as it is in the paper."""
    total = g + o.weight_decay * theta
    if o.dialect == "optax":
        size = norm(total)
        rate = o.trust * norm(theta) / (size + o.eps) if size and norm(theta) else 1.0
        s.b = o.beta1 * s.b + lr * rate * total
        return s.b
    size = norm(g)
    rate = o.trust * norm(theta) / (size + o.weight_decay * norm(theta) + o.eps) if size and norm(theta) else 1.0
    s.b = o.beta1 * s.b + rate * total
    return lr * s.b


@rule("novograd", inside=True, lr=1e-3, beta1=0.9, beta2=0.25, eps=1e-6)
def novograd(o, s, g, theta, lr):
    """Ginsburg et al. 2019, algorithm 1; optax.novograd."""
    s.v = norm(g) ** 2 if s.t == 1 else ema(s.v, norm(g) ** 2, o.beta2)
    s.m = o.beta1 * s.m + g / (math.sqrt(s.v) + o.eps) + o.weight_decay * theta
    return lr * s.m


@rule("sm3", lr=1e-2, beta1=0.9, eps=1e-8)
def sm3(o, s, g, theta, lr):
    """Anil et al. 2019, SM3-II; optax.sm3: one accumulator for each index of each axis."""
    axes = range(max(1, g.ndim))
    x = g.reshape(1) if g.ndim == 0 else g
    s.first("tops", [np.zeros([n if a == b else 1 for b, n in enumerate(x.shape)]) for a in axes])
    v = x * x
    v = v + np.minimum.reduce([np.broadcast_to(top, x.shape) for top in s.tops])
    s.tops = [v.max(axis=tuple(b for b in axes if b != a), keepdims=True) for a in axes]
    u = np.where(v > 0, x / np.sqrt(v + o.eps), 0).reshape(g.shape)
    s.m = ema(s.m, u, o.beta1)
    return lr * s.m


@rule("fromage", scope="own", lr=1e-2)
def fromage(o, s, g, theta, lr):
    """Bernstein et al. 2020, algorithm 1; github.com/jxbz/fromage."""
    theta *= decay_factor(o)
    theta -= lr * ratio_of(norm(theta), norm(g)) * g
    theta /= math.sqrt(1 + lr * lr)


# ---- norms of all tensors ----------------------------------------------------------------------------------------------

@rule("polyak-sgd", scope="all", lr=1.0, eps=0.0, lower_bound=0.0)
def polyak_sgd(o, shared, tensors, lr):
    """Loizou et al. 2021; optax.polyak_sgd: lr is the largest step."""
    square = sum(norm(g) ** 2 for _, g, _ in tensors) + o.eps
    step = min((o.loss - o.lower_bound) / square, lr) if square > np.finfo(float).eps else 0.0
    for theta, g, s in tensors:
        theta *= decay_factor(o)
        theta -= step * g


@rule("dog", scope="all", lr=1.0, r_eps=1e-6, eps=1e-8)
def dog(o, shared, tensors, lr):
    """Ivgi, Hinder, Carmon 2023; github.com/formll/dog. The distance is that of all tensors, even of one that rests."""
    shared.first("r", o.r_eps * (1 + math.sqrt(sum(norm(x) ** 2 for x in shared.start))))
    shared.r = max(shared.r, math.sqrt(sum(norm(x - y) ** 2 for x, y in zip(shared.theta, shared.start))))
    shared.g = shared.g + sum(norm(g) ** 2 for _, g, _ in tensors)
    for theta, g, s in tensors:
        theta *= decay_factor(o)
        theta -= lr * shared.r / math.sqrt(shared.g + o.eps) * g


@rule("dowg", scope="all", lr=1.0, r_eps=1e-4, eps=1e-8)
def dowg(o, shared, tensors, lr):
    """Khaled, Mishchenko, Jin 2023, algorithm 1; optax.contrib.dowg. The square of the distance starts at r_eps."""
    square = sum(norm(x - y) ** 2 for x, y in zip(shared.theta, shared.start))
    shared.r = max(shared.r, o.r_eps, square)
    shared.v = shared.v + shared.r * sum(norm(g) ** 2 for _, g, _ in tensors)
    for theta, g, s in tensors:
        theta *= decay_factor(o)
        theta -= lr * shared.r / (math.sqrt(shared.v) + o.eps) * g


@rule("prodigy", scope="all", lr=1.0, beta1=0.9, beta2=0.999, beta3=0.0, eps=1e-8, d0=1e-6, d_coef=1.0, decay="lr")
def prodigy(o, shared, tensors, lr):
    """Mishchenko, Defazio 2023, algorithm 4; github.com/konstmish/prodigy."""
    shared.first("d", o.d0)
    d, beta3 = shared.d, o.beta3 or math.sqrt(o.beta2)
    shared.top = beta3 * shared.top
    bottom = 0.0
    for theta, g, s in tensors:
        s.first("start", theta.copy())
        shared.top += d / o.d0 * d * lr * float(np.sum(g * (s.start - theta)))
        s.m = ema(s.m, d * g, o.beta1)
        s.v = ema(s.v, np.square(d * g), o.beta2)
        s.s = beta3 * s.s + d / o.d0 * d * lr * g
        bottom += float(np.sum(np.abs(s.s)))
    if bottom == 0:
        return
    shared.d = max(d, o.d_coef * shared.top / bottom)
    for theta, g, s in tensors:
        theta *= 1 - d * lr * o.weight_decay if o.decay == "lr" else 1.0
        theta -= d * lr * s.m / (np.sqrt(s.v) + shared.d * o.eps)


@rule("dadapt-adam", scope="all", lr=1.0, beta1=0.9, beta2=0.999, eps=1e-8, d0=1e-6, decay="lr")
def dadapt_adam(o, shared, tensors, lr):
    """Defazio, Mishchenko 2023, algorithm 5; github.com/facebookresearch/dadaptation, DAdaptAdam."""
    shared.first("d", o.d0)
    rate, root = shared.d * lr, math.sqrt(o.beta2)
    top = bottom = 0.0
    for theta, g, s in tensors:
        top += rate * float(np.sum(g * s.s / (np.sqrt(s.v) + o.eps)))
        s.m = ema(s.m, rate * g, o.beta1)
        s.v = ema(s.v, g * g, o.beta2)
        s.s = ema(s.s, rate * g, root)
        bottom += float(np.sum(np.abs(s.s)))
    if bottom == 0:
        return
    shared.top = ema(shared.top, top, root)
    shared.d = max(shared.d, shared.top / ((1 - root) * bottom))
    for theta, g, s in tensors:
        theta *= 1 - rate * o.weight_decay if o.decay == "lr" else 1.0
        theta -= s.m / (np.sqrt(s.v) + o.eps)


@rule("momo", scope="all", lr=1.0, beta1=0.9, lower_bound=0.0, decay="prox")
def momo(o, shared, tensors, lr):
    """Schaipp et al. 2024, algorithm 1; github.com/fabian-sp/MoMo: the averages start at the first values."""
    shared.first("loss", o.loss)
    shared.loss = ema(shared.loss, o.loss, o.beta1)
    dot = gamma = square = 0.0
    for theta, g, s in tensors:
        s.first("m", g)
        s.first("dot", float(np.sum(theta * g)))
        s.m = ema(s.m, g, o.beta1)
        s.dot = ema(s.dot, float(np.sum(theta * g)), o.beta1)
        dot += float(np.sum(theta * s.m))
        gamma += s.dot
        square += norm(s.m) ** 2
    if square == 0:
        return
    grow = 1 + lr * o.weight_decay if o.decay == "prox" else 1.0
    step = min(lr, max(grow * (shared.loss - o.lower_bound - gamma) + dot, 0.0) / square)
    for theta, g, s in tensors:
        theta -= step * s.m
        theta /= grow


@rule("momo-adam", scope="all", lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, lower_bound=0.0, decay="prox")
def momo_adam(o, shared, tensors, lr):
    """Schaipp et al. 2024, algorithm 3; github.com/fabian-sp/MoMo."""
    shared.t = shared.t + 1
    c1 = 1 - o.beta1 ** shared.t
    shared.loss = ema(shared.loss, o.loss, o.beta1)
    dot = gamma = square = 0.0
    for theta, g, s in tensors:
        _, c2 = moments(o, s, g)
        s.divisor = np.sqrt(s.v / c2) + o.eps
        s.dot = ema(s.dot, float(np.sum(theta * g)), o.beta1)
        dot += float(np.sum(theta * s.m))
        gamma += s.dot
        square += float(np.sum(s.m * s.m / s.divisor))
    if square == 0:
        return
    grow = 1 + lr * o.weight_decay if o.decay == "prox" else 1.0
    step = min(lr / c1, max(grow * (shared.loss - c1 * o.lower_bound - gamma) + dot, 0.0) / square)
    for theta, g, s in tensors:
        theta -= step * s.m / s.divisor
        theta /= grow


# ---- factored --------------------------------------------------------------------------------------------------------

def factors(s, name, square, beta, view):
    """The averages of the rows and columns of a square, and what the two give for each element."""
    square = square.reshape(view)
    r = ema(getattr(s, name + "r"), square.mean(axis=-1), beta)
    c = ema(getattr(s, name + "c"), square.mean(axis=-2), beta)
    setattr(s, name + "r", r)
    setattr(s, name + "c", c)
    return r, c


@rule("adafactor", scope="own", lr=1e-2, beta1=0.0, relative_step=1, scale_parameter=1, beta2_exponent=0.8,
      eps1=1e-30, eps2=1e-3, clip_threshold=1.0, decay="lr")
def adafactor(o, s, g, theta, lr):
    """Shazeer, Stern 2018, algorithms 4 and 5. Dialects: rest: the matrix [shape[0], rest]; t2t: tensor2tensor, only
    matrices are factored; hf: transformers, the last two axes, decay in proportion to the step; torch: torch.optim.Adafactor,
    the last two axes, epsilon as a floor; optax: optax.adafactor, which factors nothing below 128."""
    beta2 = 1 - s.t ** -o.beta2_exponent
    by_torch = o.dialect == "torch"
    square = g * g + (0.0 if by_torch else o.eps1)
    factored = {"t2t": g.ndim == 2, "optax": False}.get(o.dialect, g.ndim >= 2)
    if factored:
        view = g.shape if o.dialect in ("hf", "torch") else (len(g), -1)
        r, c = factors(s, "", square, beta2, view)
        mean = r.mean(axis=-1, keepdims=True)
        v = r[..., :, None] * c[..., None, :] / (np.maximum(mean, o.eps1) if by_torch else mean)[..., None]
        v = v.reshape(g.shape)
    else:
        s.v = v = ema(s.v, square, beta2)
    if by_torch:
        v = np.maximum(v, o.eps1 ** 2)
    u = g / np.sqrt(v)
    u = u / max(1.0, rms(u) / o.clip_threshold)
    if o.dialect == "optax":
        rate = lr
    elif by_torch:
        rate = min(lr, 1 / math.sqrt(s.t))
    else:
        rate = o.multiplier * (min(o.lr, 1 / math.sqrt(s.t)) if o.relative_step else o.lr)
    if o.scale_parameter:
        rate *= max(o.eps2, rms(theta))
    elif o.dialect == "t2t" and o.relative_step:
        rate *= 0.05
    theta *= 1 - rate * o.weight_decay if o.dialect == "hf" and o.decay == "lr" else decay_factor(o)
    s.m = ema(s.m, rate * u, o.beta1)
    theta -= s.m


@rule("came", lr=2e-4, beta1=0.9, beta2=0.999, beta3=0.9999, eps1=1e-30, eps2=1e-16, clip_threshold=1.0, decay="lr")
def came(o, s, g, theta, lr):
    """Luo et al. 2023, algorithm 2; github.com/yangluo7/CAME, but the matrix is [shape[0], rest]."""
    view = (len(g), -1) if g.ndim >= 2 else None

    def over_root(x, name, square, beta):
        if view is None:
            s.v = ema(s.v, square, beta)
            return x / np.sqrt(s.v)
        r, c = factors(s, name, square, beta, view)
        return (x.reshape(view) / np.sqrt(np.outer(r / r.mean(), c))).reshape(x.shape)

    u = over_root(g, "", g * g + o.eps1, o.beta2)
    u = u / max(1.0, rms(u) / o.clip_threshold)
    s.m = ema(s.m, u, o.beta1)
    return lr * (s.m if view is None else over_root(s.m, "unstable_", np.square(u - s.m) + o.eps2, o.beta3))


# ---- matrices ----------------------------------------------------------------------------------------------------------

@rule("muon", lr=1e-3, beta1=0.95, beta2=0.999, eps=1e-7, nesterov=1, ns_steps=5, weight_decay=0.1, decay="lr")
def muon(o, s, g, theta, lr):
    """Jordan et al. 2024; torch.optim.Muon, but in double precision and for the matrix [shape[0], rest]; match_rms: the
    scale of Liu et al. 2025 (torch: match_rms_adamw); spectral: torch's spectral_unclamped; optax: both parts of Nesterov's
    momentum with a bias correction. What is no matrix goes by AdamW, optax: by NAdamW."""
    if g.ndim < 2:
        return (nadam if o.dialect == "optax" and o.nesterov else adam)(o, s, g, theta, lr)
    s.m = ema(s.m, g, o.beta1)
    c, ahead = (1 - o.beta1 ** s.t, 1 - o.beta1 ** (s.t + 1)) if o.dialect == "optax" else (1, 1)
    x = (ema(s.m / ahead, g / c, o.beta1) if o.nesterov else s.m / c).reshape(len(g), -1)
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / max(norm(x), o.eps)
    for _ in range(o.ns_steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if rows > columns else x
    scale = {"match_rms": 0.2 * math.sqrt(max(rows, columns)), "spectral": math.sqrt(rows / columns)}
    return lr * scale.get(o.dialect, math.sqrt(max(1.0, rows / columns))) * x.reshape(g.shape)


# ---- the runs ----------------------------------------------------------------------------------------------------------

def run(name, algorithm=None, skip=True, **settings):
    """Registers a run, and the same with steps in which a tensor has no gradient."""
    algorithm = algorithm or name
    settings = dict(algorithm=algorithm, **settings)
    if not RULES[algorithm].inside and settings.get("weight_decay", RULES[algorithm].defaults.get("weight_decay")):
        settings.setdefault("decay", RULES[algorithm].defaults.get("decay", "l2"))
    assert name not in RUNS, name
    RUNS[name] = settings
    if skip:
        RUNS[name + "_skip"] = {**settings, "skip": 1}


DECAY = 0.1
ADAPTIVE = dict(weight_decay=DECAY, no_tiny=1)     # lambda theta in a gradient that is divided by its own size
EXTREME = dict(weight_decay=DECAY, stream="extreme")
MODERATE = dict(weight_decay=DECAY, stream="moderate")

run("sgd", lr=0.01, beta1=0.9, **EXTREME)
run("sgd_plain", "sgd", lr=0.01, skip=False, **EXTREME)
run("sgd_dampening", "sgd", lr=0.01, beta1=0.8, dampening=0.3, skip=False, **EXTREME)
run("momentum", lr=0.01, **EXTREME)
run("nesterov", lr=0.01, **EXTREME)
run("adagrad", lr=0.05, lr_decay=0.01, f64_only=1, **ADAPTIVE)
run("adagrad_moderate", "adagrad", lr=0.05, stream="moderate", initial=0.1, skip=False, **ADAPTIVE)
run("adagrad_inside", "adagrad", dialect="inside", lr=0.05, eps=1e-5, stream="moderate", **ADAPTIVE)
# A few spikes of 1e20 within 100 steps are beyond float32 in an average over 100 steps.
run("rmsprop", lr=0.01, stream="moderate", **ADAPTIVE)
run("rmsprop_extreme", "rmsprop", lr=0.01, f64_only=1, skip=False, **ADAPTIVE)
run("rmsprop_momentum", "rmsprop", lr=0.01, beta1=0.9, stream="moderate", skip=False, **ADAPTIVE)
run("rmsprop_centered", "rmsprop", lr=0.01, centered=1, stream="moderate", skip=False, **ADAPTIVE)
# Without decay: of a gradient that is always nearly the same the variance is mostly rounding.
run("rmsprop_centered_momentum", "rmsprop", lr=0.01, centered=1, beta1=0.8, beta2=0.9, eps=1e-4, stream="moderate",
    no_tiny=1)
run("rmsprop_tf", "rmsprop", dialect="tf", lr=0.01, eps=1e-10, beta2=0.9, stream="moderate", f64_only=1, **ADAPTIVE)
run("rmsprop_tf_momentum", "rmsprop", dialect="tf", lr=0.01, beta1=0.9, stream="moderate", **ADAPTIVE)
run("rmsprop_tf_centered", "rmsprop", dialect="tf", lr=0.01, beta1=0.5, centered=1, stream="moderate", skip=False,
    **ADAPTIVE)
run("adam", lr=0.01, **ADAPTIVE)
run("adam_betas", "adam", lr=0.01, beta1=0.8, beta2=0.95, eps=1e-3, maximize=1, stream="moderate", skip=False, **ADAPTIVE)
run("adam_masked", "adam", lr=0.01, cautious=1, decay="lr", **ADAPTIVE)
run("adamw", lr=0.01, **EXTREME)
for dialect in ("", "optax", "paper"):
    more = dict(dialect=dialect) if dialect else {}
    if dialect == "optax":
        more["f64_only"] = 1        # v / c2
        run("amsgrad_optax_moderate", "amsgrad", lr=0.01, dialect=dialect, stream="moderate", skip=False, **ADAPTIVE)
    run("amsgrad" + "_" * bool(dialect) + dialect, "amsgrad", lr=0.01, **more, **ADAPTIVE)
run("adamax", lr=0.01, **ADAPTIVE)
run("adamaxw", lr=0.01, **EXTREME)
for dialect in ("", "optax", "mlcommons"):
    more = dict(dialect=dialect) if dialect else {}
    run("nadam" + "_" * bool(dialect) + dialect, "nadam", lr=0.01, **more, **ADAPTIVE)
run("nadam_mlcommons_decoupled", "nadam", dialect="mlcommons", lr=0.01, decay="lr", skip=False, **EXTREME)
run("nadam_decay", "nadam", lr=0.01, momentum_decay=0.05, decay="lr", skip=False, **EXTREME)
run("nadamw", lr=0.01, **EXTREME)
run("radam", lr=0.02, **ADAPTIVE)
run("radam_decoupled", "radam", lr=0.02, decay="lr", beta2=0.99, skip=False, **MODERATE)
run("radam_official", "radam", dialect="official", lr=0.02, decay="lr", no_tiny=1, **EXTREME)
run("radam_optax", "radam", dialect="optax", lr=0.02, **ADAPTIVE)
run("lion", lr=0.01, **ADAPTIVE)
run("lion_maximize", "lion", lr=0.01, beta1=0.95, beta2=0.98, maximize=1, skip=False, **ADAPTIVE)
run("lion_masked", "lion", lr=0.01, cautious=1, skip=False, **ADAPTIVE)
run("tiger", lr=0.01, **ADAPTIVE)
run("signum", lr=0.01, stream="plain", **ADAPTIVE)
run("sign-sgd", lr=0.01, stream="plain", **ADAPTIVE)
run("adadelta", lr=1.0, eps=1e-4, beta2=0.95, f64_only=1, **ADAPTIVE)
run("adadelta_moderate", "adadelta", lr=1.0, stream="moderate", skip=False, **ADAPTIVE)
run("asgd", lr=0.01, **EXTREME)
run("asgd_alpha", "asgd", lr=0.05, lambd=0.1, alpha=0.5, stream="plain", weight_decay=DECAY, skip=False)
run("rprop", lr=0.01, no_tiny=1)
run("rprop_options", "rprop", lr=0.05, eta_minus=0.6, eta_plus=1.1, step_min=0.01, step_max=0.2, stream="plain",
    no_tiny=1, skip=False)
run("sparse-adam", lr=0.01, stream="extreme", f64_only=1)     # in float32 more rows are all 0
run("sparse-adam_plain", "sparse-adam", lr=0.01, stream="plain")
run("sophia-g", lr=0.01, **ADAPTIVE)
run("sophia-g_batch", "sophia-g", lr=0.01, rho=0.03, batch=20, stream="plain", skip=False, **ADAPTIVE)
run("sophia-h", lr=0.01, stream="plain", **ADAPTIVE)
for decay in ("corrected", "cautious", "prox", "fixed"):
    weight = 0.003 if decay == "fixed" else 0.3
    for name in ("adam", "sgd", "lion"):
        run(f"{name}_{decay}", name, lr=0.01, weight_decay=weight, decay=decay, skip=False,
            **(dict(beta1=0.9) if name == "sgd" else {}),
            **(dict(no_tiny=1) if decay == "cautious" or name == "lion" else {}))
for dialect, decay in (("", "lr"), ("t2t", "lr"), ("hf", "lr"), ("torch", "lr"), ("optax", "fixed")):
    name = "adafactor" + "_" * bool(dialect) + dialect
    more = dict(decay=decay, weight_decay=0.003 if decay == "fixed" else 0.3, stream="moderate")
    if dialect:
        more["dialect"] = dialect
    if dialect == "torch":
        more["eps1"] = 2.0 ** -52
    run(name, "adafactor", lr=0.01, **more)
    if dialect == "torch":      # the rate of the schedule is inside of the minimum
        run(name + "_cap", "adafactor", lr=0.2, skip=False, **more)
    else:
        run(name + "_momentum", "adafactor", lr=0.01, beta1=0.9, skip=False, **more)
    if dialect not in ("torch", "optax"):
        run(name + "_cap", "adafactor", lr=0.2, scale_parameter=0, skip=False, **more)
        run(name + "_absolute", "adafactor", lr=0.02, relative_step=0, skip=False, **more)

PLAIN = dict(weight_decay=DECAY, stream="plain")
CALM = dict(weight_decay=DECAY, stream="moderate", no_tiny=1)

run("adabelief", lr=0.01, **ADAPTIVE)
run("adabelief_rectify", "adabelief", lr=0.01, rectify=1, eps=1e-8, **ADAPTIVE)
run("adan", lr=0.01, **MODERATE)
run("adan_extreme", "adan", lr=0.01, f64_only=1, skip=False, **EXTREME)
for decay in ("lr", "corrected", "cautious", "fixed"):
    run(f"adan_{decay}", "adan", lr=0.01, decay=decay, weight_decay=0.003 if decay == "fixed" else 0.3, stream="moderate",
        skip=False, **(dict(no_tiny=1) if decay == "cautious" else {}))
run("yogi", lr=0.01, **ADAPTIVE)
run("noisy-sgd", lr=0.01, eta=0.0, **EXTREME)
run("optimistic-adam", lr=0.01, decay="lr", **EXTREME)
run("optimistic-adam_options", "optimistic-adam", lr=0.01, decay="lr", alpha=0.7, gamma=0.5, skip=False, **MODERATE)
run("cocob", decay="l2", **CALM)
run("cocob_plain", "cocob", decay="l2", alpha=10.0, skip=False, **PLAIN)
run("madgrad", lr=0.01, **CALM)
run("madgrad_no_momentum", "madgrad", lr=0.01, beta1=0.0, eps=1e-3, skip=False, **PLAIN)
run("acprop", lr=0.01, decay="lr", **PLAIN)
run("acprop_eps", "acprop", lr=0.01, decay="lr", eps=1e-4, skip=False, **CALM)
run("adopt", lr=0.01, **CALM)
run("adopt_decoupled", "adopt", lr=0.01, decay="lr", beta2=0.99, skip=False, **MODERATE)
run("ademamix", lr=0.01, **EXTREME)
run("ademamix_warmup", "ademamix", lr=0.01, beta3=0.999, alpha=8.0, warmup=120, skip=False, **MODERATE)
run("mars", lr=0.01, **PLAIN)
run("mars_moderate", "mars", lr=0.01, gamma=0.05, skip=False, **CALM)
run("schedule-free-sgd", lr=0.05, **MODERATE)
run("schedule-free-sgd_options", "schedule-free-sgd", lr=0.05, weight_lr_power=1.0, r=1.0, beta1=0.95, skip=False, **PLAIN)
run("schedule-free-adamw", lr=0.02, **ADAPTIVE)
run("schedule-free-adamw_options", "schedule-free-adamw", lr=0.02, weight_lr_power=0.0, r=0.5, beta1=0.8, skip=False, **CALM)
run("stable-adamw", lr=0.02, **CALM)
run("adam-mini", lr=0.01, **CALM)
run("adabound", lr=0.01, **CALM)
run("adabound_amsbound", "adabound", lr=0.01, final_lr=0.05, gamma=0.05, amsbound=1, skip=False, **PLAIN)
run("adamp", lr=0.01, **PLAIN)
run("adamp_delta", "adamp", lr=0.01, delta=0.6, nesterov=1, skip=False, **CALM)
run("sgdp", lr=0.01, **PLAIN)
run("sgdp_momentum", "sgdp", lr=0.01, beta1=0.9, delta=0.6, skip=False, **PLAIN)
run("sgdp_nesterov", "sgdp", lr=0.01, beta1=0.9, delta=0.6, nesterov=1, skip=False, **PLAIN)
run("laprop", lr=0.01, **ADAPTIVE)
run("qhm", lr=0.05, **EXTREME)
run("qhadam", lr=0.01, **ADAPTIVE)
run("qhadam_nus", "qhadam", lr=0.01, beta1=0.995, nu1=0.8, nu2=0.6, f64_only=1, skip=False, **ADAPTIVE)
run("aggmo", lr=0.01, **EXTREME)
run("pnm", lr=0.01, decay="lr", **EXTREME)
run("pnm_alpha", "pnm", lr=0.01, alpha=0.5, decay="l2", skip=False, **EXTREME)
run("diffgrad", lr=0.01, **ADAPTIVE)
run("swats", lr=0.01, **ADAPTIVE)
run("grams", lr=0.01, **ADAPTIVE)
run("adam-atan2", lr=0.01, **ADAPTIVE)
run("adahessian", lr=0.01, decay="lr", skip=False, **PLAIN)
run("adahessian_power", "adahessian", lr=0.01, power=0.5, decay="lr", skip=False, **PLAIN)
run("adahessian_every", "adahessian", lr=0.01, decay="lr", curvature_period=1, **PLAIN)
run("lamb", lr=0.01, **{**PLAIN, "weight_decay": 0.3})
run("lamb_moderate", "lamb", lr=0.01, skip=False, stream="moderate", no_tiny=1)
run("lars", lr=1.0, trust=0.01, **CALM)
run("lars_plain", "lars", lr=1.0, trust=0.01, skip=False, **PLAIN)
run("lars_optax", "lars", dialect="optax", lr=1.0, trust=0.01, **CALM)
run("novograd", lr=0.01, **PLAIN)
run("novograd_moderate", "novograd", lr=0.01, beta1=0.95, beta2=0.98, skip=False, **CALM)
run("sm3", lr=0.05, decay="lr", **CALM)
run("sm3_no_momentum", "sm3", lr=0.05, beta1=0.0, decay="lr", skip=False, **PLAIN)
run("fromage", lr=0.01, stream="plain")
run("fromage_moderate", "fromage", lr=0.01, stream="moderate", no_tiny=1, skip=False)
run("polyak-sgd", lr=0.1, decay="l2", **PLAIN)
# From the default first distances theta moves by 1e-6, which is rounding in float32.
run("dog", lr=1.0, r_eps=1e-2, decay="l2", **PLAIN)
run("dog_default", "dog", lr=1.0, decay="l2", f64_only=1, skip=False, **PLAIN)
run("dowg", lr=1.0, decay="l2", **PLAIN)
run("prodigy", lr=1.0, d0=1e-3, **PLAIN)
run("prodigy_options", "prodigy", lr=1.0, d0=1e-3, beta3=0.99, d_coef=1.5, skip=False, **PLAIN)
run("prodigy_default", "prodigy", lr=1.0, f64_only=1, skip=False, **PLAIN)
run("dadapt-adam", lr=1.0, d0=1e-3, **PLAIN)
run("dadapt-adam_default", "dadapt-adam", lr=1.0, f64_only=1, skip=False, **PLAIN)
run("momo", lr=0.01, **PLAIN)
run("momo_free", "momo", lr=0.05, stream="plain", skip=False)
run("momo-adam", lr=0.05, **PLAIN)
run("momo-adam_free", "momo-adam", lr=0.05, stream="plain", skip=False)

run("came", lr=0.01, **CALM)
run("came_clip", "came", lr=0.01, beta3=0.99, clip_threshold=0.5, skip=False, **PLAIN)
# Of an epsilon so small it is all the same where it is added, and that the vectors share it.
MUON = dict(beta1=0.9, eps=1e-30, **PLAIN)
run("muon", lr=0.02, **MUON)
run("muon_match_rms", "muon", dialect="match_rms", lr=0.02, skip=False, **MUON)
run("muon_spectral", "muon", dialect="spectral", lr=0.02, skip=False, **MUON)
run("muon_optax", "muon", dialect="optax", lr=0.02, skip=False, **MUON)
run("muon_no_nesterov", "muon", lr=0.02, nesterov=0, ns_steps=3, skip=False, **MUON)


# ---- what the rules are held against -------------------------------------------------------------------------------------

CHECKS = {}      # algorithm -> [(name of the source, function from the settings to a stepper or None)]


def check(*names):
    def register(function):
        for name in names:
            CHECKS.setdefault(name, []).append(function)
        return function
    return register


class TorchStepper:
    """torch.optim or one that is made like it."""
    floor = 1e-300          # next to what is denormal in between

    def __init__(self, source, make, sparse=False, flat=False, matrices=False, before=None):
        self.source, self.make, self.sparse, self.flat, self.before = source, make, sparse, flat, before
        self.matrices = matrices or sparse

    def knows(self, x):
        return x.size and (x.ndim >= 2 or not self.matrices)

    def start(self, theta):
        self.shapes = [x.shape for x in theta]
        self.tensors = [torch.from_numpy(self.view(x).copy()).requires_grad_() for x in theta]
        self.used = [y for x, y in zip(theta, self.tensors) if self.knows(x)]
        self.optimizer = self.make(self.used)
        self.base = self.optimizer.param_groups[0]["lr"]

    def step(self, gradients, eta, loss, curvature):
        for x, g in zip(self.tensors, gradients):
            x.grad = None if g is None or x.numel() == 0 else torch.from_numpy(np.array(self.view(g)))
            if self.sparse and x.grad is not None and x.dim() >= 2:
                x.grad = x.grad.to_sparse(1).coalesce()
        self.optimizer.param_groups[0]["lr"] = self.base and self.base * eta
        if self.before:
            self.before(self.optimizer)
        self.optimizer.step()

    def view(self, x):
        return x.reshape(len(x), -1) if self.flat and x.ndim > 2 else x

    def theta(self):
        found = [x.detach().numpy().reshape(shape) for x, shape in zip(self.tensors, self.shapes)]
        return [x if self.knows(x) or not x.size else None for x in found]


def torch_class(name, settings, **arguments):
    if settings["decay"] not in ("l2", "lr"):
        return None
    return TorchStepper(f"torch.optim.{name}", lambda params: getattr(torch.optim, name)(
        params, lr=settings["lr"], weight_decay=settings["weight_decay"], maximize=bool(settings["maximize"]), **arguments))


@check("sgd", "momentum", "nesterov")
def torch_sgd(o):
    if o["decay"] == "l2":
        return torch_class("SGD", o, momentum=o["beta1"], dampening=o["dampening"], nesterov=bool(o["nesterov"]),
                           foreach=False)


@check("adagrad")
def torch_adagrad(o):
    if not o["dialect"]:
        return torch_class("Adagrad", o, lr_decay=o["lr_decay"], initial_accumulator_value=o["initial"], eps=o["eps"])


@check("rmsprop")
def torch_rmsprop(o):
    if not o["dialect"]:
        return torch_class("RMSprop", o, alpha=o["beta2"], eps=o["eps"], momentum=o["beta1"], centered=bool(o["centered"]))


@check("adam", "adamw", "amsgrad")
def torch_adam(o):
    if not o["dialect"] and not o["cautious"]:
        return torch_class("AdamW" if o["decay"] == "lr" else "Adam", o, betas=(o["beta1"], o["beta2"]), eps=o["eps"],
                           amsgrad=o["algorithm"] == "amsgrad", foreach=False)


@check("adam")
def torch_adam_moving(o):
    """The decays that AdamW has only if its factor moves."""
    def move(optimizer):
        group = optimizer.param_groups[0]
        eta = group["lr"] / o["lr"]
        group["weight_decay"] = o["weight_decay"] * (eta if o["decay"] == "corrected" else 1 / group["lr"])

    if o["decay"] in ("corrected", "fixed"):
        return TorchStepper("torch.optim.AdamW, its decay moved", lambda params: torch.optim.AdamW(
            params, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"], foreach=False), before=move)


@check("adamax")
def torch_adamax(o):
    if o["decay"] == "l2":
        return torch_class("Adamax", o, betas=(o["beta1"], o["beta2"]), eps=o["eps"], foreach=False)


@check("nadam")
def torch_nadam(o):
    if not o["dialect"]:
        return torch_class("NAdam", o, betas=(o["beta1"], o["beta2"]), eps=o["eps"], momentum_decay=o["momentum_decay"],
                           decoupled_weight_decay=o["decay"] == "lr", foreach=True)


@check("radam")
def torch_radam(o):
    if not o["dialect"]:
        return torch_class("RAdam", o, betas=(o["beta1"], o["beta2"]), eps=o["eps"],
                           decoupled_weight_decay=o["decay"] == "lr")


@check("adadelta")
def torch_adadelta(o):
    return torch_class("Adadelta", o, rho=o["beta2"], eps=o["eps"])


@check("asgd")
def torch_asgd(o):
    return torch_class("ASGD", o, lambd=o["lambd"], alpha=o["alpha"], t0=o["t0"])


@check("rprop")
def torch_rprop(o):
    return TorchStepper("torch.optim.Rprop", lambda params: torch.optim.Rprop(
        params, lr=o["lr"], etas=(o["eta_minus"], o["eta_plus"]), step_sizes=(o["step_min"], o["step_max"])))


@check("sparse-adam")
def torch_sparse_adam(o):
    return TorchStepper("torch.optim.SparseAdam", lambda params: torch.optim.SparseAdam(
        params, lr=o["lr"], betas=(o["beta1"], o["beta2"]), eps=o["eps"]), sparse=True)


class Double:
    """torch, in which bfloat16 is double precision."""
    bfloat16 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@check("muon")
def torch_muon(o):
    if o["dialect"] == "optax":
        return None
    torch.optim._muon.torch = Double()
    return TorchStepper("torch.optim.Muon in double precision", lambda params: torch.optim.Muon(
        params, lr=o["lr"], weight_decay=o["weight_decay"], momentum=o["beta1"], nesterov=bool(o["nesterov"]), eps=o["eps"],
        ns_steps=o["ns_steps"], adjust_lr_fn={"match_rms": "match_rms_adamw", "spectral": "spectral_unclamped"}.get(o["dialect"])),
        flat=True, matrices=True)


@check("muon")
def optax_muon(o):
    """In optax a matrix is [in, out]."""
    if optax is None or o["dialect"] != "optax":
        return None
    inner = optax.contrib.muon(-1.0, ns_steps=o["ns_steps"], beta=o["beta1"], eps=o["eps"], nesterov=bool(o["nesterov"]),
                               adam_b1=o["beta1"], adam_b2=o["beta2"])
    turned = lambda values: [x.reshape(len(x), -1).T if x.ndim >= 2 else x for x in values]

    def update(g, state, params=None):
        updates, state = inner.update(turned(g), state, turned(params))
        return [u.T.reshape(x.shape) if x.ndim >= 2 else u for u, x in zip(updates, g)], state
    return optax_rule("contrib.muon", o, optax.GradientTransformation(lambda params: inner.init(turned(params)), update))


@check("adafactor")
def torch_adafactor(o):
    if o["dialect"] == "torch":
        return torch_class("Adafactor", o, beta2_decay=-o["beta2_exponent"], eps=(None, o["eps2"]), d=o["clip_threshold"],
                           foreach=False)


class ReferenceStepper:
    """The Adafactor of make_training.py."""
    source = "make_training.Reference"
    floor = 1e-300

    def __init__(self, o):
        self.o = o

    def start(self, theta):
        keys = set(training.COMMON) | set(training.DEFAULTS["adafactor"])
        self.values = [x.copy() for x in theta]
        self.reference = training.Reference(self.values, "adafactor", **{k: v for k, v in self.o.items() if k in keys})

    def step(self, gradients, eta, loss, curvature):
        self.reference.step(gradients, eta)

    def theta(self):
        return self.values


@check("adafactor")
def reference_adafactor(o):
    return None if o["dialect"] else ReferenceStepper(o)


try:
    import jax
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_platforms", "cpu")
    import jax.numpy as jnp
    import optax
    import optax.contrib
except ImportError:
    optax = None


class OptaxStepper:
    """A transformation of optax; the decay l2 is added before it, lr before the learning rate."""

    floor = 1e-280          # what is denormal is 0 there

    def __init__(self, source, make, needs_loss=False):
        self.source, self.make, self.needs_loss = "optax." + source, make, needs_loss
        self.needs_curvature = "sophia" in source

    def start(self, theta):
        self.values = [jnp.asarray(x) for x in theta]
        rates = jnp.asarray([multiplier(t) for t in range(1, RUN + 2)])
        self.optimizer = self.make(lambda count: rates[count])
        self.state = self.optimizer.init(self.values)
        self.update = jax.jit(self.one)

    def one(self, values, state, gradients, extra):
        updates, state = self.optimizer.update(gradients, state, values, **extra)
        return optax.apply_updates(values, updates), state

    def step(self, gradients, eta, loss, curvature):
        extra = dict(value=jnp.asarray(loss)) if self.needs_loss else {}
        if self.needs_curvature:
            extra["curvature"] = [jnp.asarray(x) for x in curvature or gradients]
        self.values, self.state = self.update(self.values, self.state, [jnp.asarray(g) for g in gradients], extra)

    def theta(self):
        return [np.asarray(x) for x in self.values]


def optax_rule(source, o, direction, needs_loss=False, inside=False):
    """direction, with the decay before (l2) or after it (lr, fixed), then the rate, unless it is inside."""
    if optax is None or o.get("skip") or o["decay"] not in ("l2", "lr") or o["cautious"] or o["maximize"]:
        return None

    def make(eta):
        steps = [optax.add_decayed_weights(o["weight_decay"])] if o["decay"] == "l2" else []
        steps += direction(lambda count: o["lr"] * eta(count)) if inside else [direction]
        if not inside:
            if o["decay"] == "lr":
                steps.append(optax.add_decayed_weights(o["weight_decay"]))
            steps.append(optax.scale_by_learning_rate(lambda count: o["lr"] * eta(count)))
        return optax.with_extra_args_support(optax.chain(*steps))
    return OptaxStepper(source, make, needs_loss)


@check("adagrad", "rmsprop", "adam", "adamw", "amsgrad", "adamax", "adamaxw", "nadam", "nadamw", "radam", "lion", "adadelta",
       "sign-sgd", "signum", "tiger", "sophia-h")
def by_optax(o):
    if optax is None:
        return None
    name, dialect = o["algorithm"], o["dialect"]
    b12 = dict(b1=o.get("beta1"), b2=o.get("beta2"))
    if name == "adagrad" and dialect == "inside":
        return optax_rule("adagrad", o, optax.scale_by_rss(o["initial"], o["eps"]))
    if name == "rmsprop" and dialect == "tf":
        kind = optax.scale_by_stddev if o["centered"] else optax.scale_by_rms
        return optax_rule("rmsprop", o, lambda lr: [kind(o["beta2"], o["eps"], 1.0), optax.scale_by_learning_rate(lr),
                                                    optax.trace(o["beta1"])], inside=True)
    if name in ("adam", "adamw"):
        return optax_rule("adam", o, optax.scale_by_adam(**b12, eps=o["eps"]))
    if name == "amsgrad" and dialect in ("optax", "paper"):
        return optax_rule("amsgrad", o, optax.scale_by_amsgrad(**b12, eps=o["eps"], bias_correction_mu=dialect == "optax",
                                                               bias_correction_nu=dialect == "optax"))
    if name in ("adamax", "adamaxw"):
        return optax_rule("adamax", o, optax.scale_by_adamax(**b12, eps=o["eps"]))
    if name in ("nadam", "nadamw") and dialect == "optax":
        return optax_rule("nadam", o, optax.scale_by_adam(**b12, eps=o["eps"], nesterov=True))
    if name == "radam" and dialect == "optax":
        return optax_rule("radam", o, optax.scale_by_radam(**b12, eps=o["eps"], threshold=5.0))
    if name == "lion":
        return optax_rule("lion", o, optax.scale_by_lion(**b12))
    if name == "adadelta":
        return optax_rule("adadelta", o, optax.scale_by_adadelta(o["beta2"], o["eps"]))
    if name == "sign-sgd":
        return optax_rule("sign_sgd", o, optax.scale_by_sign())
    if name in ("signum", "tiger"):
        return optax_rule("signum", o, optax.chain(optax.ema(o["beta1"], debias=False), optax.scale_by_sign()))
    if name == "sophia-h":
        given = optax.GradientTransformationExtraArgs(
            lambda params: optax.EmptyState(), lambda g, state, params=None, curvature=None, **extra: (curvature, state))
        return optax_rule("contrib.sophia", o, optax.contrib._sophia.scale_by_sophia(
            **b12, eps=o["eps"], gamma=o["gamma"], update_interval=10, hessian_diagonal_fn=given))


@check("adafactor")
def optax_adafactor(o):
    if optax is None or o["dialect"] != "optax" or o.get("skip"):
        return None

    def make(eta):
        steps = [optax.scale_by_factored_rms(decay_rate=o["beta2_exponent"], epsilon=o["eps1"],
                                             decay_rate_fn=lambda i, exponent: 1 - (i + 1.0) ** -exponent),
                 optax.clip_by_block_rms(o["clip_threshold"]),
                 optax.scale_by_learning_rate(lambda count: o["lr"] * eta(count), flip_sign=False),
                 optax.scale_by_param_block_rms()]
        if o["beta1"]:
            steps.append(optax.ema(o["beta1"], debias=False))
        steps += [optax.add_decayed_weights(o["weight_decay"]), optax.scale(-1)]
        return optax.with_extra_args_support(optax.chain(*steps))
    return OptaxStepper("adafactor", make)


# ---- packages of the authors

def package(name):
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def from_package(module, make, names, source=None, skip=True, **hooks):
    """A check by a class of a package; skip: it counts the steps of each tensor by itself."""
    loaded = package(module)

    @check(*names)
    def by_package(o):
        if loaded is None or o.get("skip") and not skip or o["maximize"] or o["cautious"]:
            return None
        if o["weight_decay"] and o["decay"] not in ("l2", "lr", "prox"):
            return None
        try:
            made = make(loaded, o)
        except KeyError:
            return None
        return TorchStepper(source or module, made, **hooks) if made else None


def b12(o):
    return o["beta1"], o["beta2"]


def quiet(function, *arguments, **more):
    """Some packages print when they start."""
    import contextlib
    import io
    with contextlib.redirect_stdout(io.StringIO()):
        return function(*arguments, **more)


def kozistr(name, **more):
    """A class of pytorch_optimizer, which otherwise adds 1e-15 below the root."""
    def make(m, o):
        base = m.base.optimizer.BaseOptimizer
        for function in (base.apply_ams_bound, base.apply_ams_bound_foreach):
            function.__defaults__ = tuple(0.0 if x == 1e-15 else x for x in function.__defaults__)
        options = {key: value(o) for key, value in more.items()}
        if name == "RAdam" and o["dialect"] != "official":
            return None
        return lambda params: getattr(m, name)(params, lr=o["lr"], weight_decay=o["weight_decay"], **options)
    return make


from_package("adabelief_pytorch", lambda m, o: lambda params: quiet(
    m.AdaBelief, params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], rectify=bool(o["rectify"]),
    weight_decouple=o["decay"] == "lr", print_change_log=False), ["adabelief"])
from_package("prodigyopt", lambda m, o: lambda params: m.Prodigy(
    params, lr=o["lr"], betas=b12(o), beta3=o["beta3"] or None, eps=o["eps"], weight_decay=o["weight_decay"], d0=o["d0"],
    d_coef=o["d_coef"]), ["prodigy"])
from_package("dadaptation", lambda m, o: lambda params: quiet(
    m.DAdaptAdam, params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], d0=o["d0"],
    decouple=True), ["dadapt-adam"])
from_package("schedulefree", lambda m, o: lambda params: training_mode(m.SGDScheduleFree(
    params, lr=o["lr"], momentum=o["beta1"], weight_decay=o["weight_decay"], r=o["r"], weight_lr_power=o["weight_lr_power"],
    foreach=False)), ["schedule-free-sgd"], skip=False)
from_package("schedulefree", lambda m, o: lambda params: training_mode(m.AdamWScheduleFree(
    params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], r=o["r"],
    weight_lr_power=o["weight_lr_power"], foreach=False)), ["schedule-free-adamw"], skip=False)
from_package("adabound", lambda m, o: lambda params: m.AdaBound(
    params, lr=o["lr"], betas=b12(o), final_lr=o["final_lr"], gamma=o["gamma"], eps=o["eps"], weight_decay=o["weight_decay"],
    amsbound=bool(o["amsbound"])), ["adabound"])
from_package("adamp", lambda m, o: lambda params: m.AdamP(
    params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], delta=o["delta"], wd_ratio=o["wd_ratio"],
    nesterov=bool(o["nesterov"])), ["adamp"])
# Without nesterov the package's momentum itself loses its radial part, as it is changed in place.
from_package("adamp", lambda m, o: (lambda params: m.SGDP(
    params, lr=o["lr"], momentum=o["beta1"], eps=o["eps"], weight_decay=o["weight_decay"], delta=o["delta"],
    wd_ratio=o["wd_ratio"], nesterov=bool(o["nesterov"]))) if o["nesterov"] or not o["beta1"] else None, ["sgdp"])
from_package("madgrad", lambda m, o: lambda params: m.MADGRAD(
    params, lr=o["lr"], momentum=o["beta1"], eps=o["eps"], weight_decay=o["weight_decay"]), ["madgrad"], skip=False)
from_package("optimi", lambda m, o: lambda params: m.StableAdamW(
    params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], foreach=False, triton=False),
    ["stable-adamw"], skip=False)
from_package("qhoptim.pyt", lambda m, o: lambda params: m.QHM(
    params, lr=o["lr"], momentum=o["beta1"], nu=o["nu"], weight_decay=o["weight_decay"]), ["qhm"])
from_package("qhoptim.pyt", lambda m, o: lambda params: m.QHAdam(
    params, lr=o["lr"], betas=b12(o), nus=(o["nu1"], o["nu2"]), eps=o["eps"], weight_decay=o["weight_decay"]), ["qhadam"])
from_package("dog", lambda m, o: lambda params: m.DoG(
    params, reps_rel=o["r_eps"], lr=o["lr"], eps=o["eps"], weight_decay=o["weight_decay"]), ["dog"], skip=False)
from_package("came_pytorch", lambda m, o: lambda params: m.CAME(
    params, lr=o["lr"], betas=(o["beta1"], o["beta2"], o["beta3"]), eps=(o["eps1"], o["eps2"]),
    clip_threshold=o["clip_threshold"], weight_decay=o["weight_decay"]), ["came"], flat=True)
def outside_epsilon(optimizer):
    """For packages whose epsilon is outside of the correction of v."""
    group = optimizer.param_groups[0]
    t = group["t"] = group.get("t", 0) + 1
    group.setdefault("eps0", group["eps"])
    group["eps"] = group["eps0"] * math.sqrt(1 - group["betas"][1] ** t)


for known, names, more in (
        ("Adan", ["adan"], dict(betas=lambda o: (o["beta1"], o["beta2"], o["beta3"]), eps=lambda o: o["eps"],
                                weight_decouple=lambda o: o["decay"] == "lr")),
        ("AggMo", ["aggmo"], dict(betas=lambda o: (0.0, *b12(o)), weight_decouple=lambda o: False)),
        ("PNM", ["pnm"], dict(betas=lambda o: (o["beta1"], o["alpha"]), weight_decouple=lambda o: o["decay"] == "lr")),
        ("MARS", ["mars"], dict(betas=b12, eps=lambda o: o["eps"], gamma=lambda o: o["gamma"], optimize_1d=lambda o: True)),
        ("SWATS", ["swats"], dict(betas=b12, eps=lambda o: o["eps"], weight_decouple=lambda o: False)),
        ("LaProp", ["laprop"], dict(betas=b12, eps=lambda o: o["eps"], foreach=lambda o: False)),
        ("DiffGrad", ["diffgrad"], dict(betas=b12, eps=lambda o: o["eps"], weight_decouple=lambda o: False)),
        ("RAdam", ["radam"], dict(betas=b12, eps=lambda o: o["eps"], foreach=lambda o: False)),
        ("Tiger", ["tiger"], dict(beta=lambda o: o["beta1"]))):
    from_package("pytorch_optimizer", kozistr(known, **more), names, source=f"pytorch_optimizer.{known}", skip=False,
                 before=outside_epsilon if known in ("MARS", "LaProp") else None)


from_package("grams", lambda m, o: lambda params: m.Grams(
    params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"]), ["grams"], skip=False,
    before=outside_epsilon)


# ---- timm

def given_rate(optimizer):
    """The Adafactor of timm takes no schedule where the step is relative: its rate times ours."""
    optimizer._get_lr = lambda group, state: type(optimizer)._get_lr(group, state) * optimizer.eta


class TimmAdafactor(TorchStepper):
    """The last two axes first: those it factors are the first two."""

    def view(self, x):
        return np.moveaxis(x, (-2, -1), (0, 1)) if x.ndim > 2 else x

    def theta(self):
        found = [x.detach().numpy() for x in self.tensors]
        return [np.moveaxis(x, (0, 1), (-2, -1)) if x.ndim > 2 else x for x in found]

    def step(self, gradients, eta, loss, curvature):
        self.optimizer.eta = eta
        super().step(gradients, eta, loss, curvature)


timm = package("timm.optim")


@check("nadam", "adam", "adamw", "lion", "lars", "adafactor", "adopt")
def by_timm(o):
    if timm is None or o["decay"] != "lr" and o["algorithm"] not in ("lars", "adopt") or o["maximize"]:
        return None
    name, common = o["algorithm"], dict(lr=o["lr"], weight_decay=o["weight_decay"])
    if name == "nadam" and o["dialect"] == "mlcommons":
        return TorchStepper("timm.NAdamW", lambda params: timm.NAdamW(
            params, betas=b12(o), eps=o["eps"], foreach=False, **common))
    if name in ("adam", "adamw") and o["cautious"]:
        return TorchStepper("timm.AdamWLegacy", lambda params: timm.AdamWLegacy(
            params, betas=b12(o), eps=o["eps"], caution=True, **common))
    if name == "lion" and o["cautious"]:
        return TorchStepper("timm.Lion", lambda params: timm.Lion(
            params, betas=b12(o), caution=True, foreach=False, **common))
    if name == "adopt":
        return TorchStepper("timm.Adopt", lambda params: timm.Adopt(
            params, betas=b12(o), eps=o["eps"], clip_exp=0.25, decoupled=o["decay"] == "lr", foreach=False, **common))
    if name == "lars" and not o["dialect"]:
        return TorchStepper("timm.Lars", lambda params: timm.Lars(
            params, momentum=o["beta1"], trust_coeff=o["trust"], eps=o["eps"], always_adapt=True, foreach=False, **common))
    if name == "adafactor" and o["dialect"] == "hf" and o["relative_step"] and o["scale_parameter"] and o["lr"] == 0.01:
        def make(params):
            optimizer = timm.Adafactor(params, lr=None, betas=(o["beta1"], 0.0) if o["beta1"] else None, eps=o["eps1"],
                                       eps_scale=o["eps2"], weight_decay=o["weight_decay"], min_dim_size_to_factor=0)
            given_rate(optimizer)
            return optimizer
        return TimmAdafactor("timm.Adafactor, its axes moved", make)
    return None


class GivenCurvature(TorchStepper):
    def step(self, gradients, eta, loss, curvature):
        plain = self.optimizer.step
        self.optimizer.step = lambda: plain(hessian=[torch.from_numpy(x) for x in curvature if x.size])
        super().step(gradients, eta, loss, curvature)
        self.optimizer.step = plain


@check("adahessian")
def kozistr_adahessian(o):
    loaded = package("pytorch_optimizer")
    if loaded is None or o.get("skip") or o.get("curvature_period") != 1:
        return None
    return GivenCurvature("pytorch_optimizer.AdaHessian", lambda params: loaded.AdaHessian(
        params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], hessian_power=o["power"],
        weight_decouple=True))


def training_mode(optimizer):
    optimizer.train()
    return optimizer


def momo_stepper(name):
    loaded = package("momo")

    class Momo(TorchStepper):
        def step(self, gradients, eta, loss, curvature):
            plain = self.optimizer.step
            self.optimizer.step = lambda: plain(loss=torch.tensor(loss))
            super().step(gradients, eta, loss, curvature)
            self.optimizer.step = plain

    def by_momo(o):
        if loaded is None or o.get("skip"):
            return None
        if name == "Momo":
            return Momo("momo.Momo", lambda params: loaded.Momo(
                params, lr=o["lr"], beta=o["beta1"], weight_decay=o["weight_decay"], lb=o["lower_bound"]))
        return Momo("momo.MomoAdam", lambda params: loaded.MomoAdam(
            params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], lb=o["lower_bound"]))
    return by_momo


check("momo")(momo_stepper("Momo"))
check("momo-adam")(momo_stepper("MomoAdam"))


# ---- more of optax

def zero_m(transformation):
    """optax starts the m of Yogi at the initial value of v."""
    def init(params):
        state = transformation.init(params)
        return state._replace(mu=jax.tree.map(jnp.zeros_like, state.mu))
    return optax.GradientTransformation(init, transformation.update)


def vectors(transformation):
    """For rules of optax that know no scalars."""
    def up(tree):
        return None if tree is None else [jnp.reshape(x, (1,)) if x.ndim == 0 else x for x in tree]

    def update(updates, state, params=None):
        new, state = transformation.update(up(updates), state, up(params))
        return [jnp.reshape(x, y.shape) for x, y in zip(new, updates)], state
    return optax.GradientTransformation(lambda params: transformation.init(up(params)), update)


def per_step(make):
    """A transformation without a state of its own whose settings follow the schedule: make(count)."""
    def update(updates, count, params=None, **extra):
        return make(count).update(updates, optax.EmptyState(), params, **extra)[0], count + 1
    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


@check("adabelief", "yogi", "noisy-sgd", "optimistic-adam", "cocob", "acprop", "ademamix", "adopt", "lamb", "lars",
       "novograd", "sm3", "fromage", "polyak-sgd", "dog", "dowg", "momo", "momo-adam", "schedule-free-sgd",
       "schedule-free-adamw")
def by_optax_too(o):
    if optax is None or o.get("skip"):
        return None
    name, contrib = o["algorithm"], optax.contrib
    betas = dict(b1=o.get("beta1"), b2=o.get("beta2"))
    decayed = optax.add_decayed_weights(o["weight_decay"])
    if name == "adabelief" and not o["rectify"]:
        return optax_rule("adabelief", o, optax.scale_by_belief(**betas, eps=o["eps"], eps_root=o["eps"]))
    if name == "yogi":
        return optax_rule("yogi, m from 0", o, zero_m(optax.scale_by_yogi(
            **betas, eps=o["eps"], initial_accumulator_value=o["initial"])))
    if name == "noisy-sgd":
        return optax_rule("sgd", o, optax.identity())
    if name == "optimistic-adam":
        return optax_rule("optimistic_adam_v2", o, optax.chain(
            optax.scale_by_adam(**betas, eps=o["eps"], nesterov=True),
            optax.scale_by_optimistic_gradient(o["alpha"], o["gamma"])))
    if name == "cocob":
        return OptaxStepper("contrib.cocob", lambda eta: optax.with_extra_args_support(contrib.cocob(
            1.0, o["alpha"], o["eps"], o["weight_decay"])))
    if name == "acprop":
        return optax_rule("contrib.acprop", o, contrib.scale_by_acprop(**betas, eps=o["eps"], eps_root=o["eps"]))
    if name == "ademamix" and not o["warmup"]:
        return optax_rule("contrib.ademamix", o, contrib.scale_by_ademamix(
            **betas, b3=o["beta3"], alpha=o["alpha"], eps=o["eps"]))
    if name == "adopt" and o["decay"] == "l2":      # optax decays in the first step too
        return optax_rule("contrib.adopt", o, contrib.scale_by_adopt(**betas, eps=o["eps"]))
    if name == "lamb":
        return OptaxStepper("lamb", lambda eta: optax.with_extra_args_support(optax.lamb(
            lambda count: o["lr"] * eta(count), **betas, eps=o["eps"], weight_decay=o["weight_decay"])))
    if name == "lars" and o["dialect"] == "optax":
        return OptaxStepper("lars", lambda eta: optax.with_extra_args_support(optax.lars(
            lambda count: o["lr"] * eta(count), o["weight_decay"], trust_coefficient=o["trust"], eps=o["eps"],
            momentum=o["beta1"])))
    if name == "novograd":
        return OptaxStepper("novograd", lambda eta: optax.with_extra_args_support(optax.novograd(
            lambda count: o["lr"] * eta(count), **betas, eps=o["eps"], weight_decay=o["weight_decay"])))
    if name == "sm3":
        return optax_rule("sm3", o, vectors(optax.scale_by_sm3(o["beta1"], eps=o["eps"])))
    if name == "fromage":
        return OptaxStepper("fromage", lambda eta: optax.with_extra_args_support(optax.fromage(
            lambda count: o["lr"] * eta(count))))
    if name == "polyak-sgd":
        return OptaxStepper("polyak_sgd", lambda eta: optax.chain(decayed, per_step(lambda count: optax.scale_by_polyak(
            o["lower_bound"], o["lr"] * eta(count), o["eps"])), optax.scale(-1)), needs_loss=True)
    if name == "dog":
        return OptaxStepper("contrib.dog", lambda eta: optax.with_extra_args_support(contrib.dog(
            lambda count: o["lr"] * eta(count), ("heuristic", o["r_eps"]), o["eps"], o["weight_decay"])))
    if name == "dowg":
        return OptaxStepper("contrib.dowg", lambda eta: optax.with_extra_args_support(contrib.dowg(
            lambda count: o["lr"] * eta(count), o["r_eps"], o["eps"], o["weight_decay"])))
    if name == "momo" and not o["weight_decay"]:    # optax leaves the update out of the proximal step of the decay
        return OptaxStepper("contrib.momo", lambda eta: contrib.momo(
            lambda count: o["lr"] * eta(count), o["beta1"], o["lower_bound"]), needs_loss=True)
    if name == "momo-adam" and not o["weight_decay"]:
        return OptaxStepper("contrib.momo_adam", lambda eta: contrib.momo_adam(
            lambda count: o["lr"] * eta(count), **betas, eps=o["eps"], lower_bound=o["lower_bound"]), needs_loss=True)
    if name in ("schedule-free-sgd", "schedule-free-adamw") and not o["r"]:
        inner = [] if name.endswith("sgd") else [
            optax.scale_by_rms(o["beta2"], o["eps"], eps_in_sqrt=False, bias_correction=True)]

        def make(eta):
            # Its own count starts at 1.
            rate = lambda count: o["lr"] * eta(count)
            return contrib.schedule_free(optax.chain(*inner, decayed, optax.scale_by_learning_rate(rate)),
                                         lambda count: rate(count - 1), o["beta1"], o["weight_lr_power"])
        return OptaxStepper("contrib.schedule_free", make)


def add_late_runs():
    """Of each algorithm's first run one that goes on at step 10^6: powers of t and bias corrections there."""
    for algorithm in dict.fromkeys(settings["algorithm"] for settings in RUNS.values()):
        first = next(settings for settings in RUNS.values() if settings["algorithm"] == algorithm)
        RUNS[f"{algorithm}_late"] = {**first, "late": LATE}


# ---- running -------------------------------------------------------------------------------------------------------------

def loss_of(t):
    return 2 + 10 * float(uniform(41, t + 1)[t])


NEEDS_CURVATURE = ("sophia-g", "sophia-h", "adahessian")


def curvature_of(settings, gradients, t):
    """At steps 1, 11, 21, ..., or in every step where curvature_period is 1, for the tensors that have a gradient."""
    if settings["algorithm"] not in NEEDS_CURVATURE or (t - 1) % settings.get("curvature_period", 10):
        return None
    return [None if g is None else gradient("plain", False, p, int(np.prod(shape)), 5000 + t).reshape(shape)
            for p, (g, shape) in enumerate(zip(gradients, SHAPES))]


def first_parameters(settings):
    tiny = training.tiny_elements(settings)
    return [first_theta(p, int(np.prod(shape)), tiny).reshape(shape) for p, shape in enumerate(SHAPES)]


def trajectory(settings, stepper=None):
    theta = first_parameters(settings)
    if stepper is None:
        optimizer = Optimizer(theta, **{k: v for k, v in settings.items() if k not in RUN_KEYS or k == "algorithm"})
    else:
        stepper.start(theta)
    stored = []
    for t in range(1, RUN + 1):
        gradients = step_gradients(settings, t)
        arguments = (gradients, multiplier(t), loss_of(t), curvature_of(settings, gradients, t))
        if stepper is None:
            optimizer.step(*arguments)
            for s in (*optimizer.state, optimizer.shared) if t == 1 and settings.get("late") else ():
                if s.t:
                    s.t = settings["late"]
        else:
            stepper.step(*arguments)
            theta = [np.full(x.shape, np.nan) if y is None else y for x, y in zip(theta, stepper.theta())]
        if t in CHECKPOINTS:
            stored.append(np.concatenate([x.ravel() for x in theta]))
    return np.array(stored)


REFERENCES = {      # what the runs of each algorithm were held against, by the checks below; "formula": by nothing but the paper
    "sgd": "torch.optim",
    "momentum": "torch.optim",
    "nesterov": "torch.optim",
    "adagrad": "torch.optim",
    "radam": "torch.optim",
    "adadelta": "torch.optim",
    "asgd": "torch.optim",
    "rprop": "torch.optim",
    "sparse-adam": "torch.optim",
    "muon": "torch.optim, optax",
    "adam": "torch.optim, optax",
    "adamw": "torch.optim, optax",
    "amsgrad": "torch.optim, optax",
    "adamax": "torch.optim, optax",
    "rmsprop": "torch.optim, optax",
    "nadam": "torch.optim, optax, timm",
    "adamaxw": "optax",
    "nadamw": "optax",
    "sophia-h": "optax",
    "yogi": "optax",
    "noisy-sgd": "optax",
    "optimistic-adam": "optax",
    "cocob": "optax",
    "acprop": "optax",
    "ademamix": "optax",
    "lamb": "optax",
    "novograd": "optax",
    "sm3": "optax",
    "fromage": "optax",
    "polyak-sgd": "optax",
    "dowg": "optax",
    "sign-sgd": "optax",
    "signum": "optax",
    "lion": "optax, timm",
    "lars": "optax, timm",
    "adopt": "optax, timm",
    "tiger": "optax, pytorch_optimizer",
    "adabelief": "authors' package, optax",
    "dog": "authors' package, optax",
    "momo": "authors' package, optax",
    "momo-adam": "authors' package, optax",
    "schedule-free-sgd": "authors' package, optax",
    "schedule-free-adamw": "authors' package, optax",
    "prodigy": "authors' package",
    "dadapt-adam": "authors' package",
    "adabound": "authors' package",
    "adamp": "authors' package",
    "sgdp": "authors' package",
    "madgrad": "authors' package",
    "qhm": "authors' package",
    "qhadam": "authors' package",
    "came": "authors' package",
    "grams": "authors' package",
    "stable-adamw": "optimi",
    "adan": "pytorch_optimizer",
    "aggmo": "pytorch_optimizer",
    "pnm": "pytorch_optimizer",
    "mars": "pytorch_optimizer",
    "swats": "pytorch_optimizer",
    "laprop": "pytorch_optimizer",
    "diffgrad": "pytorch_optimizer",
    "adahessian": "pytorch_optimizer",
    "adafactor": "torch.optim, optax, timm (by dialect)",
    "sophia-g": "formula",
    "adam-mini": "formula",
    "adam-atan2": "formula",
}


LOOSE = {
    "prodigy_default": 1e-10,       # the numerator is made of differences theta_0 - theta of 1e-6
}


def compare(first, stored, expected, floor):
    """The largest difference in units of the largest value that an element had at the start and the checkpoints so far. An
    oracle that has no rule for an element says NaN, in every row."""
    known = ~np.isnan(expected).all(axis=0)
    scale = np.maximum(np.maximum.accumulate(np.abs(stored), axis=0), np.abs(first))
    return np.max((np.abs(stored - expected) / np.maximum(scale, floor))[:, known])


def main():
    warnings.filterwarnings("ignore")
    np.seterr(all="ignore")
    torch.set_default_dtype(torch.float64)      # or torch.optim.NAdam keeps its product in float32
    golden, metadata, failed = {}, {}, []
    add_late_runs()
    quick, prefixes = sys.argv[1:] == ["--quick"], tuple(x for x in sys.argv[1:] if x != "--quick")
    chosen = [name for name in RUNS if not prefixes or name.startswith(prefixes)]
    for name in chosen:
        settings = RUNS[name]
        stored = trajectory(settings)
        first = np.concatenate([x.ravel() for x in first_parameters(settings)])
        moved = np.abs(stored[-1] - first).max(), np.abs(stored).max()
        if not np.isfinite(stored).all():
            failed.append(name)
            print(f"{name}: NOT FINITE")
            continue
        golden[f"optimizer.{name}"] = stored
        metadata[f"optimizer.{name}"] = describe(**settings)
        complete = {**COMMON, **RULES[settings["algorithm"]].defaults, **settings}
        sources = []
        for make in [] if quick or "late" in settings else CHECKS.get(settings["algorithm"], []):
            stepper = make(complete)
            if stepper is None:
                continue
            difference = compare(first, stored, trajectory(settings, stepper), stepper.floor)
            sources.append(f"{stepper.source} {difference:.1e}")
            if not difference < LOOSE.get(name, 1e-12):
                failed.append(name)
                sources[-1] += " FAILED"
        print(f"{name}: moved {moved[0]:.2g}, largest {moved[1]:.2g}; {', '.join(sources) or 'no other source'}", flush=True)
    metadata["optimizers"] = " ".join(key[len("optimizer."):] for key in golden)
    metadata.update({f"reference.{name}": text for name, text in REFERENCES.items()})
    print(f"{len(golden)} runs, failed: {failed or 'none'}")
    if not prefixes:
        path = HERE / "optimizers.safetensors"
        save_file(golden, path, metadata=metadata)
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size} bytes")
    assert not failed


if __name__ == "__main__":
    main()
