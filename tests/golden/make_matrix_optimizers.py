#!/usr/bin/env python3
"""Makes matrix_optimizers.safetensors, the golden trajectories of Shampoo, SOAP, PSGD-Kron, GaLore and Scion, beside this script.

usage: python make_matrix_optimizers.py             write the file, with every check that the installed packages allow
       python make_matrix_optimizers.py --quick     make the runs without a check; write nothing
       python make_matrix_optimizers.py NAME ...    only make and check the runs whose names start so; write nothing

Tensors, gradients, rates, stored steps and the names in the file are those of make_optimizers.py. Every tensor of rank 2
and more is the matrix [shape[0], rest]. The rules are held against galore-torch, pytorch_optimizer and timm where these are
installed (pip install --no-deps galore-torch pytorch_optimizer timm), in double precision.

Beside each run stands how far it moves where every gradient is changed by a rounding in double (f64) and in single
precision (f32): what an implementation that rounds in another order can differ by. Of Shampoo and SOAP the first is written
to the file ("rounding") where it takes the twelfth digit.
"""
import functools
import importlib
import importlib.util
import math
import pathlib
import sys
import types
import warnings

import numpy as np
import torch
from safetensors.numpy import save_file

import make_optimizers as common
from make_solvers import normal, uniform
from make_optimizers import (CALM, CHECKS, COMMON, HERE, PLAIN, RULES, RUNS, Double, State, TorchStepper, b12, check, compare,
                             decay_factor, describe, ema, first_parameters, norm, package, rule, run, trajectory)

RUNS.clear()
NULL = 1e-12        # an eigenvalue, or a pivot of QR, below this part of the largest is 0
TAKEN = 1e-2        # a unit vector of which less is left adds no direction


# ---- what has no answer of its own -------------------------------------------------------------------------------------

def completed(q, rank):
    """The first `rank` columns of q, and an orthonormal basis of what is orthogonal to them: the unit vectors e_0, e_1,
    ... one after the other, less their parts along all columns so far, of length 1; without those of which less than
    TAKEN is left."""
    q = q.copy()
    rows, columns = q.shape
    j = 0
    while rank < columns:
        x = np.zeros(rows)
        x[j] = 1
        j += 1
        for _ in range(2):
            x -= q[:, :rank] @ (q[:, :rank].T @ x)
            if norm(x) < TAKEN:
                break
        else:
            q[:, rank] = x / norm(x)
            rank += 1
    return q


def eigenvectors(a):
    """By falling eigenvalue; those of the eigenvalue 0 are chosen by completed."""
    w, q = np.linalg.eigh(a)
    w, q = w[::-1], q[:, ::-1]
    return completed(q, int(np.sum(w > NULL * w[0])))


def orthogonal(a):
    """Q of QR, where R is not 0 on the diagonal, completed."""
    q, r = np.linalg.qr(a)
    pivots = np.abs(np.diag(r))
    small = np.flatnonzero(pivots <= NULL * pivots.max())
    return completed(q, int(small[0]) if small.size else len(pivots))


def largest_positive(vectors):
    """Each row with the sign that makes its largest element, the first of these, positive."""
    largest = vectors[np.arange(len(vectors)), np.abs(vectors).argmax(axis=1)]
    return vectors * np.where(largest < 0, -1.0, 1.0)[:, None]


def matrix(x):
    return x.reshape(len(x), -1)


# ---- the rules -----------------------------------------------------------------------------------------------------------

def power(a, exponent, least):
    """Of a symmetric matrix whose eigenvalues are at least `least`, whatever rounding says."""
    w, q = np.linalg.eigh(a)
    return q * np.maximum(w, least) ** exponent @ q.T


@rule("shampoo", lr=0.1, beta1=0.0, eps=1e-4, max_precond_dim=512)
def shampoo(o, s, g, theta, lr):
    """Gupta, Koren, Singer 2018, algorithm 1, of the matrix: L = eps I + sum g g', R = eps I + sum g' g,
    d = L^(-1/4) g R^(-1/4); of rank 0 and 1: v = eps + sum g^2, d = g / sqrt(v). Then b = beta1 b + d, theta -= lr b; the
    decay is applied before. A side longer than max_precond_dim is left as it is, and the other's power is -1/2."""
    if g.ndim < 2:
        s.first("v", np.full(g.shape, o.eps))
        s.v = s.v + g * g
        d = g / np.sqrt(s.v)
    else:
        x = matrix(g)
        s.first("left", o.eps * np.eye(x.shape[0]))
        s.first("right", o.eps * np.eye(x.shape[1]))
        s.left = s.left + x @ x.T
        s.right = s.right + x.T @ x
        taken = [side <= o.max_precond_dim for side in x.shape]
        exponent = -0.25 if all(taken) else -0.5
        x = power(s.left, exponent, o.eps) @ x if taken[0] else x
        x = x @ power(s.right, exponent, o.eps) if taken[1] else x
        d = x.reshape(g.shape)
    s.b = o.beta1 * s.b + d
    return lr * s.b


@rule("soap", scope="own", lr=3e-3, beta1=0.95, beta2=0.95, eps=1e-8, period=10, max_precond_dim=512, decay="lr")
def soap(o, s, g, theta, lr):
    """Vyas et al. 2024; github.com/nikhilvyas/SOAP with the matrix for the tensor, correct_bias, shampoo_beta = beta2, no
    merge_dims, no normalize_grads. Step 1: L = (1 - beta2) g g', R = (1 - beta2) g' g, P and Q their eigenvectors by falling
    eigenvalue; theta stays. Step t, k = t - 1: x = P' g Q, m = beta1 m + (1 - beta1) x, v = beta2 v + (1 - beta2) x^2,
    theta -= lr sqrt(1 - beta2^k) / (1 - beta1^k) P (m / (sqrt(v) + eps)) Q', then the decay, then L = beta2 L +
    (1 - beta2) g g', R likewise; where k % period = 0 the columns of P are sorted by falling diag(P' L P), and the rows of v
    with them, and P = Q of QR(L P); likewise Q, R and the columns of v; m is turned from the old into the new basis, v is not.
    Of rank 0 and 1, and for a side longer than max_precond_dim: P = 1 or Q = 1, and step 1 changes nothing either. Where L or R is singular the eigenvectors of 0, and
    what QR makes of them, are those of `completed`: the update depends on them, on no sign and no order."""
    first = s.t == 1
    x = g if g.ndim < 2 else matrix(g)
    if not first:
        k = s.t - 1
        turned = x if g.ndim < 2 else s.p.T @ x @ s.q
        s.m = ema(s.m, turned, o.beta1)
        s.v = ema(s.v, turned * turned, o.beta2)
        d = s.m / (np.sqrt(s.v) + o.eps)
        if g.ndim >= 2:
            d = (s.p @ d @ s.q.T).reshape(g.shape)
        theta -= lr * math.sqrt(1 - o.beta2 ** k) / (1 - o.beta1 ** k) * d
        theta *= decay_factor(o)
    if g.ndim < 2:
        return
    s.left = ema(s.left, x @ x.T, o.beta2)
    s.right = ema(s.right, x.T @ x, o.beta2)
    taken = [side <= o.max_precond_dim for side in x.shape]
    if first:
        s.p, s.q = (eigenvectors(a) if t else np.eye(len(a)) for a, t in zip((s.left, s.right), taken))
    elif k % o.period == 0:
        m = s.p @ s.m @ s.q.T
        if taken[0]:
            order = np.argsort(-np.diag(s.p.T @ s.left @ s.p), kind="stable")
            s.v, s.p = s.v[order], orthogonal(s.left @ s.p[:, order])
        if taken[1]:
            order = np.argsort(-np.diag(s.q.T @ s.right @ s.q), kind="stable")
            s.v, s.q = s.v[:, order], orthogonal(s.right @ s.q[:, order])
        s.m = s.p.T @ m @ s.q


@functools.cache
def draws(p, t, n):
    """n normal numbers and a uniform one: the library's, of seed 0, for the step t of tensor p."""
    stream = 5 << 56 | p << 40 | t
    return np.array([normal(0, stream, i) for i in range(n)]), uniform(0, stream, 2 * n)


def norm_bound(a):
    """A lower bound of the spectral norm of a symmetric matrix, by one step of the power method from its longest row."""
    scale = np.abs(a).max()
    if scale == 0:
        return 0.0
    a = a / scale
    x = a @ a[np.argmax(np.square(a).sum(axis=1))]
    return scale * norm(a @ (x / norm(x)))


@rule("psgd-kron", lr=1e-3, beta1=0.9, initial=1.0, precond_lr=0.1, prob_start=500.0, prob_decay=1e-3, min_prob=0.03,
      max_precond_dim=512, clip_threshold=1.1, decay="lr")
def psgd_kron(o, s, g, theta, lr):
    """Li 2018, 2022; github.com/evanatyourservice/kron_torch, of the matrix. m = momentum / (1 - beta1^t). With v from N(0, 1):
    A = Ql m Qr', B = Ql'^-1 v Qr^-1; Ql -= precond_lr triu(A A' - B B') Ql / |A A' + B B'|, likewise Qr with A' and B'; of
    diagonals the diagonals, and |.| their largest. theta -= lr clip(Ql' Ql m Qr' Qr); the decay is applied before. Q is updated
    once 1 / p steps have passed, and before one update in a hundred both Q are given the same largest element."""
    x = g if g.ndim < 2 else matrix(g)
    if s.t == 1:
        scale = o.initial ** (1 / max(x.ndim, 1))
        s.q = [scale * (np.eye(n) if x.ndim == 2 and 1 < n <= o.max_precond_dim else np.ones(n)) for n in x.shape or (1,)]
    s.m = ema(s.m, x, o.beta1)
    m = s.m / (1 - o.beta1 ** s.t)
    flat = x.ndim < 2
    m2 = m.reshape(-1, 1) if flat else m
    full = lambda: [np.diag(q) if q.ndim == 1 else q for q in s.q] + ([np.eye(1)] if flat else [])
    s.waited = s.waited + 1
    if s.waited >= 1 / max(o.min_prob, min(1.0, math.exp(-o.prob_decay * (s.t - 1 - o.prob_start)))):
        s.waited = 0
        v, chance = draws(common.training.SHAPES.index(g.shape), s.t, g.size)
        if x.ndim == 2 and chance < 0.01:
            largest = [np.abs(q).max() for q in s.q]
            s.q = [q * math.sqrt(largest[0] * largest[1]) / top for q, top in zip(s.q, largest)]
        left, right = full()
        a = left @ m2 @ right.T
        b = np.linalg.solve(right.T, np.linalg.solve(left.T, v.reshape(m2.shape)).T).T
        for i, (q, p, r) in enumerate(zip(s.q, (a, a.T), (b, b.T))):
            plus, minus = p @ p.T + r @ r.T, p @ p.T - r @ r.T
            if q.ndim == 1:
                s.q[i] = q - o.precond_lr * np.diag(minus) * q / np.diag(plus).max()
            else:
                s.q[i] = q - o.precond_lr / norm_bound(plus) * np.triu(minus) @ q
    left, right = full()
    d = (left.T @ left @ m2 @ right.T @ right).reshape(g.shape)
    return lr * d * min(1.0, o.clip_threshold / (common.rms(d) + 1e-8))


@rule("galore", scope="own", lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, rank=2, period=50, scale=0.25, decay="lr")
def galore(o, s, g, theta, lr):
    """Zhao et al. 2024; github.com/jiaweizzhao/GaLore, AdamW with proj_type std and the matrix for the tensor. At steps 1,
    1 + period, ...: g = U S V'; P = the first `rank` rows of V' where rows >= columns, else the first columns of U, each with
    its largest element positive, as m is kept from one P to the next and the update so depends on the signs. x = g P' (or
    P' g); m = beta1 m + (1 - beta1) x, v = beta2 v + (1 - beta2) x^2, d = m / (sqrt(v) + eps); theta -= lr sqrt(1 - beta2^t)
    / (1 - beta1^t) scale d P (or scale P d); then the decay. Of rank 0 and 1: x = g, and d without scale."""
    if g.ndim >= 2:
        x = matrix(g)
        tall = x.shape[0] >= x.shape[1]
        if (s.t - 1) % o.period == 0:
            u, _, vt = np.linalg.svd(x, full_matrices=False)
            s.p = largest_positive(vt[:o.rank] if tall else u[:, :o.rank].T)
        x = x @ s.p.T if tall else s.p @ x
    else:
        x = g
    s.m = ema(s.m, x, o.beta1)
    s.v = ema(s.v, x * x, o.beta2)
    d = s.m / (np.sqrt(s.v) + o.eps)
    if g.ndim >= 2:
        d = o.scale * (d @ s.p if tall else s.p.T @ d).reshape(g.shape)
    theta -= lr * math.sqrt(1 - o.beta2 ** s.t) / (1 - o.beta1 ** s.t) * d
    theta *= decay_factor(o)


@rule("scion", lr=1e-3, beta1=0.9, decay="lr")
def scion(o, s, g, theta, lr):
    """Pethick et al. 2025; github.com/LIONS-EPFL/scion, unconstrained, Spectral for the matrix and BiasRMS for rank 0 and 1,
    in double precision. m = beta1 m + (1 - beta1) g; x = m / max(|m|, 1e-7), five times x = 3.4445 x + (-4.775 a +
    2.0315 a^2) x of a = x x', of the transposed matrix where rows > columns; d = sqrt(rows / columns) x, or
    d = m / (sqrt(mean(m^2)) + 1e-7); theta -= lr d; the decay is applied before."""
    s.m = ema(s.m, g, o.beta1)
    if g.ndim < 2:
        return lr * s.m / (common.rms(s.m) + 1e-7)
    x = matrix(s.m)
    rows, columns = x.shape
    x = x.T if rows > columns else x
    x = x / max(norm(x), 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x.T if rows > columns else x
    return lr * math.sqrt(rows / columns) * x.reshape(g.shape)


# ---- the runs ------------------------------------------------------------------------------------------------------------

# Of the stream "moderate" only Scion: L and R of its spikes have eigenvalues from 1e-2 to 1e16 and more, of which double
# precision knows half, and so has the projection of GaLore.
run("shampoo", lr=0.1, decay="lr", **PLAIN)
run("shampoo_momentum", "shampoo", lr=0.05, beta1=0.9, eps=1e-2, decay="lr", skip=False, **PLAIN)
run("shampoo_l2", "shampoo", lr=0.1, decay="l2", skip=False, **PLAIN)
run("soap", lr=0.01, **PLAIN)
run("soap_options", "soap", lr=0.01, beta1=0.9, beta2=0.98, eps=1e-3, period=3, skip=False, **PLAIN)
run("shampoo_one_side", "shampoo", lr=0.1, max_precond_dim=4, decay="lr", skip=False, **PLAIN)     # L of [3, 40], [4, 27]; R of [5, 3]
run("soap_one_side", "soap", lr=0.01, max_precond_dim=4, skip=False, **PLAIN)
run("soap_no_side", "soap", lr=0.01, max_precond_dim=2, skip=False, **PLAIN)
run("soap_full_rank", "soap", lr=0.01, period=15, **PLAIN)    # singular are L and R only in step 1
run("shampoo_conditioned", "shampoo", lr=5.0, eps=1e3, decay="lr", **PLAIN)             # eigenvalues from 1e3 to 1e6
run("soap_conditioned", "soap", lr=0.02, eps=0.1, beta2=0.99, period=50, skip=False, **PLAIN)
run("soap_one_basis", "soap", lr=0.02, beta1=0.9, beta2=0.99, period=1000, skip=False, **PLAIN)
run("psgd-kron", lr=0.01, **PLAIN)
run("psgd-kron_rare", "psgd-kron", lr=0.01, prob_start=20.0, prob_decay=0.03, min_prob=0.3, skip=False, **PLAIN)
run("psgd-kron_options", "psgd-kron", lr=0.02, beta1=0.5, initial=0.25, precond_lr=0.03, clip_threshold=0.6, skip=False, **PLAIN)
run("psgd-kron_one_side", "psgd-kron", lr=0.01, max_precond_dim=4, skip=False, **PLAIN)
run("psgd-kron_diagonal", "psgd-kron", lr=0.01, max_precond_dim=0, beta1=0.0, skip=False, **PLAIN)
run("galore", lr=0.01, rank=2, period=50, **PLAIN)
run("galore_one_basis", "galore", lr=0.01, rank=2, period=1000, **PLAIN)            # depends on no sign
run("galore_no_momentum", "galore", lr=0.01, rank=2, beta1=0.0, period=7, **PLAIN)  # nor does this
run("galore_rank", "galore", lr=0.01, rank=4, period=20, scale=1.0, beta2=0.99, eps=1e-3, skip=False, **PLAIN)
run("scion", lr=0.01, **PLAIN)
run("scion_beta", "scion", lr=0.02, beta1=0.5, skip=False, **PLAIN)
run("scion_no_momentum", "scion", lr=0.01, beta1=0.0, maximize=1, skip=False, **PLAIN)
run("scion_moderate", "scion", lr=0.01, skip=False, **CALM)


# ---- what the rules are held against -------------------------------------------------------------------------------------

class DoubleTorch(Double):
    """torch, in which single precision and bfloat16 are double precision, and whose decompositions are those above."""
    float = float32 = torch.float64

    class linalg:
        @staticmethod
        def eigh(a):
            assert float(a.abs().max()) > 1e-20     # or the 1e-30 that is added counts
            w = torch.linalg.eigvalsh(a)
            return w, torch.from_numpy(np.ascontiguousarray(eigenvectors(a.numpy())[:, ::-1]))

        @staticmethod
        def qr(a):
            return torch.from_numpy(orthogonal(a.numpy())), None

        @staticmethod
        def svd(a, full_matrices):
            u, s, vt = torch.linalg.svd(a, full_matrices=full_matrices)
            return torch.from_numpy(largest_positive(u.numpy().T).T), s, torch.from_numpy(largest_positive(vt.numpy()))


class Checked(TorchStepper):
    """Known are only the tensors of the rank asked for. one_by_one: an optimizer for each tensor, which counts the steps of
    that tensor alone."""

    def __init__(self, source, make, ranks=(0, 1, 2, 4), one_by_one=False, **more):
        super().__init__(source, make, flat=True, **more)
        self.ranks, self.one_by_one = ranks, one_by_one

    def knows(self, x):
        return x.size and x.ndim in self.ranks

    def start(self, theta):
        super().start(theta)
        self.known = [self.knows(x) for x in theta]
        if self.one_by_one:
            self.several = [self.make([y]) if known else None for y, known in zip(self.tensors, self.known)]

    def step(self, gradients, eta, loss, curvature):
        if not self.one_by_one:
            super().step(gradients, eta, loss, curvature)
            return
        for x, g, optimizer in zip(self.tensors, gradients, self.several):
            if optimizer and g is not None:
                x.grad = torch.from_numpy(np.array(self.view(g)))
                optimizer.param_groups[0]["lr"] = self.base * eta
                optimizer.step()

    def theta(self):
        found = [x.detach().numpy().reshape(shape) for x, shape in zip(self.tensors, self.shapes)]
        return [x if known or not x.size else None for x, known in zip(found, self.known)]


def bare(name):
    """A package from which modules are loaded without what it loads itself; None where it is not installed."""
    found = importlib.util.find_spec(name)
    if found is None:
        return None
    parent = sys.modules[name] = types.ModuleType(name)
    parent.__path__ = list(found.submodule_search_locations)
    return parent


class Factors:
    """Shampoo by the singular values of triangular factors of L and R: twice the digits of their small eigenvalues."""
    source, floor = "shampoo by factors", 1e-300

    def __init__(self, o):
        self.o = types.SimpleNamespace(**o)

    def start(self, theta):
        self.x, self.s = [x.copy() for x in theta], [State() for _ in theta]

    def theta(self):
        return self.x

    def step(self, gradients, eta, loss, curvature):
        o = self.o
        for x, g, s in zip(self.x, gradients, self.s):
            if g is None or not x.size:
                continue
            if o.decay == "l2":
                g = g + o.weight_decay * x
            else:
                x *= 1 - eta * o.lr * o.weight_decay
            if g.ndim < 2:
                s.first("v", o.eps)
                s.v = s.v + g ** 2
                d = g * s.v ** -0.5
            else:
                d = matrix(g)
                for name, rows in (("l", d.T), ("r", d)):
                    s.first(name, math.sqrt(o.eps) * np.eye(rows.shape[1]))
                    setattr(s, name, np.linalg.qr(np.vstack([getattr(s, name), rows]))[1])
                (_, a, u), (_, b, v) = np.linalg.svd(s.l), np.linalg.svd(s.r)
                d = (u.T @ ((u @ d @ v.T) / np.sqrt(np.outer(a, b))) @ v).reshape(g.shape)
            s.b = o.beta1 * s.b + d
            x -= eta * o.lr * s.b


@check("shampoo")
def by_factors(o):
    return None if o["max_precond_dim"] < 512 else Factors(o)


@check("shampoo")
def kozistr_shampoo(o):
    loaded = package("pytorch_optimizer")
    if loaded is None or o["beta1"] or o["max_precond_dim"] < 512:      # its momentum is one of the gradient
        return None
    return Checked("pytorch_optimizer.Shampoo, matrices", lambda params: loaded.Shampoo(
        params, lr=o["lr"], weight_decay=o["weight_decay"], weight_decouple=o["decay"] == "lr", matrix_eps=o["eps"]),
        ranks=(2, 4))


@check("soap")
def kozistr_soap(o):
    loaded = package("pytorch_optimizer")
    if loaded is None:
        return None
    importlib.import_module("pytorch_optimizer.optimizer.soap").torch = DoubleTorch()
    return Checked("pytorch_optimizer.SOAP", lambda params: loaded.SOAP(
        params, lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"], precondition_frequency=o["period"],
        max_precondition_dim=o["max_precond_dim"], merge_dims=False, precondition_1d=False, correct_bias=True, normalize_gradient=False), one_by_one=True)


@check("psgd-kron")
def timm_kron(o):
    """One by one, so that it is known whose draws are asked for."""
    if o["clip_threshold"] != 1.1 or "timm.optim" not in sys.modules and (bare("timm") is None or bare("timm.optim") is None):
        return None
    loaded = importlib.import_module("timm.optim.kron")
    now = types.SimpleNamespace()

    class Drawn(DoubleTorch):
        linalg = torch.linalg

        @staticmethod
        def randn(shape, **options):
            return torch.from_numpy(draws(now.p, now.t, math.prod(shape))[0].reshape(shape))
    loaded.torch = Drawn()
    schedule = functools.partial(loaded.precond_update_prob_schedule, min_prob=o["min_prob"], decay=o["prob_decay"],
                                 flat_start=o["prob_start"])

    class Kron(loaded.Kron):
        def __init__(self, params):
            loaded.has_dynamo = False
            super().__init__(params, lr=o["lr"], momentum=o["beta1"], weight_decay=o["weight_decay"], decoupled_decay=True,
                             preconditioner_update_probability=schedule, max_size_triangular=o["max_precond_dim"],
                             precond_lr=o["precond_lr"], precond_init_scale=o["initial"])
            self.p, self.t = [math.prod(x) for x in common.training.SHAPES].index(params[0].numel()), 0
            self.rng = types.SimpleNamespace(random=lambda: draws(now.p, now.t, params[0].numel())[1])

        def step(self):
            self.t += 1
            now.p, now.t = self.p, self.t
            super().step()
    return Checked("timm.Kron", Kron, one_by_one=True)


def galore_adamw():
    """galore_torch.adamw without what else the package loads."""
    if "galore_torch" not in sys.modules:
        if bare("galore_torch") is None:
            return None
        for name in ("transformers", "transformers.utils", "transformers.utils.versions"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["transformers.utils.versions"].require_version = lambda text: None
        importlib.import_module("galore_torch.galore_projector").torch = DoubleTorch()
    return importlib.import_module("galore_torch.adamw").AdamW


@check("galore")
def official_galore(o):
    adamw = galore_adamw()
    if adamw is None:
        return None

    def make(params):
        group = dict(params=params)
        if params[0].dim() >= 2:
            group.update(rank=o["rank"], update_proj_gap=o["period"], scale=o["scale"], proj_type="std")
        return adamw([group], lr=o["lr"], betas=b12(o), eps=o["eps"], weight_decay=o["weight_decay"],
                     no_deprecation_warning=True)
    return Checked("galore_torch.AdamW", make, one_by_one=True)


@check("scion")
def kozistr_scion(o):
    loaded = package("pytorch_optimizer")
    if loaded is None:
        return None
    source = importlib.import_module("pytorch_optimizer.optimizer.scion")
    inner = importlib.import_module("pytorch_optimizer.optimizer.utils.matrix").zero_power_via_newton_schulz_5
    source.zero_power_via_newton_schulz_5 = lambda g, steps: inner(g, steps, dtype=torch.float64)
    source.BiasRMS.lmo.__defaults__ = (1e-7,)
    return Checked("pytorch_optimizer.SCION", lambda params: loaded.SCION(
        params, lr=o["lr"], momentum=1 - o["beta1"], constraint=False, weight_decay=o["weight_decay"], weight_decouple=True,
        maximize=bool(o["maximize"]), foreach=False))


# ---- running -------------------------------------------------------------------------------------------------------------

def moved_by_rounding(settings, size):
    """The trajectory where each gradient is off by up to `size` of itself."""
    exact, random = common.step_gradients, np.random.default_rng(1)
    common.step_gradients = lambda *arguments: [
        None if g is None else g * (1 + size * random.uniform(-1, 1, g.shape)) for g in exact(*arguments)]
    try:
        return trajectory(settings)
    finally:
        common.step_gradients = exact


ILL_CONDITIONED = ("shampoo", "soap")   # L and R have eigenvalues from 1e-4 to 1e6, or are singular
BOUND, ROUNDINGS = 1e-12, 10            # relative, or so many times what one rounding of the gradients moves


def main():
    warnings.filterwarnings("ignore")
    np.seterr(all="ignore")
    torch.set_default_dtype(torch.float64)
    golden, metadata, failed = {}, {}, []
    common.add_late_runs()
    quick, prefixes = sys.argv[1:] == ["--quick"], tuple(x for x in sys.argv[1:] if x != "--quick")
    for name, settings in RUNS.items():
        if prefixes and not name.startswith(prefixes):
            continue
        stored = trajectory(settings)
        first = np.concatenate([x.ravel() for x in first_parameters(settings)])
        if not np.isfinite(stored).all():
            failed.append(name)
            print(f"{name}: NOT FINITE")
            continue
        moved = {} if quick else {which: compare(first, stored, moved_by_rounding(settings, size), 1e-300)
                                  for which, size in (("f64", 2.0 ** -53), ("f32", 2.0 ** -24))}
        rounding = moved.get("f64", 0) if settings["algorithm"] in ILL_CONDITIONED else 0
        bound = max(BOUND, ROUNDINGS * rounding)
        golden[f"optimizer.{name}"] = stored
        metadata[f"optimizer.{name}"] = describe(**settings, **({"rounding": float(f"{rounding:.1e}")} if bound > BOUND else {}))
        complete = {**COMMON, **RULES[settings["algorithm"]].defaults, **settings}
        sources = []
        for make in [] if quick or "late" in settings else CHECKS[settings["algorithm"]]:
            stepper = make(complete)
            if stepper is None:
                continue
            difference = compare(first, stored, trajectory(settings, stepper), stepper.floor)
            sources.append(f"{stepper.source} {difference:.1e}")
            if not difference < bound:
                failed.append(name)
                sources[-1] += " FAILED"
        sources += [f"{which} {by:.1e}" for which, by in moved.items()]
        print(f"{name}: moved {np.abs(stored[-1] - first).max():.2g}, largest {np.abs(stored).max():.2g}; "
              f"{', '.join(sources)}", flush=True)
    metadata["optimizers"] = " ".join(key[len("optimizer."):] for key in golden)
    metadata.update({"reference.shampoo": "pytorch_optimizer", "reference.soap": "pytorch_optimizer",     # see the checks above
                     "reference.psgd-kron": "timm", "reference.galore": "galore_torch", "reference.scion": "pytorch_optimizer"})
    print(f"{len(golden)} runs, failed: {failed or 'none'}")
    if not prefixes and not quick:
        path = HERE / "matrix_optimizers.safetensors"
        save_file(golden, path, metadata=metadata)
        path.chmod(0o644)
        print(f"{path.name}: {path.stat().st_size} bytes")
    assert not failed


if __name__ == "__main__":
    main()
