#!/usr/bin/env python3
"""Makes utilities.safetensors, the golden numbers of tests/test_utilities.c, beside this script. usage: python make_utilities.py

All in float64, parameters in PyTorch's order and by PyTorch's names.
From PyTorch: clip_grad_value_, AveragedModel (EMA and SWA, buffers copied and averaged), update_bn, GradScaler's scale.
From the papers' formulas, written here with NumPy: adaptive clipping (Brock et al. 2021), clipping by RMS, centralisation (Yong et al.
2020), Grokfast-EMA (Lee et al. 2024), EMA warm-up (timm ModelEmaV3), Lookahead (Zhang et al. 2019), SAM (Foret et al. 2021), ASAM
(Kwon et al. 2021), gradient accumulation, telemetry.
From optax (contrib.mechanize): Mechanic.
"""
import pathlib

import jax
import numpy as np
import optax
import torch
from safetensors.numpy import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

HERE = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)
jax.config.update("jax_enable_x64", True)
torch.set_num_threads(1)
rng = np.random.default_rng(20261122)
golden = {}
STEPS = 14


def network():
    return torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12, 5),
                               torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 2))


net = network()
names = [name for name, _ in net.named_parameters()]
theta = {n: rng.uniform(-0.5, 0.5, p.shape).astype(np.float32).astype(float) for n, p in net.named_parameters()}
grads = [{n: (rng.normal(size=t.shape) * 10 ** rng.uniform(-3, 1)).astype(np.float32).astype(float) for n, t in theta.items()}
         for _ in range(STEPS)]


def write(case, tensors):
    for n, t in tensors.items():
        golden[f"{case}.{n}"] = np.ascontiguousarray(np.asarray(t))


def load(model, values):
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(torch.from_numpy(values[n]))


write("theta", theta)
for s in range(STEPS):
    write(f"grad{s}", grads[s])

# ---- gradients -------------------------------------------------------------------------------------------------------
load(net, theta)
for n, p in net.named_parameters():
    p.grad = torch.from_numpy(grads[0][n].copy())
torch.nn.utils.clip_grad_value_(net.parameters(), 0.3)
write("clip_value", {n: p.grad.numpy() for n, p in net.named_parameters()})
write("clip_rms", {n: g / max(1, np.sqrt((g * g).mean()) / 0.05) for n, g in grads[0].items()})


def unit_norm(x):
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return np.sqrt((x * x).sum(axis=axes, keepdims=x.ndim > 1))


def adaptive(g, t, limit, eps):
    most = limit * np.maximum(unit_norm(t), eps)
    norm = unit_norm(g)
    return np.where(norm >= most, g * (most / norm), g)


write("clip_adaptive", {n: adaptive(g, theta[n], 0.05, 1e-3) for n, g in grads[0].items()})
write("centralize", {n: g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True) if g.ndim > 1 else g for n, g in grads[0].items()})
h = None
for s in range(4):
    g = grads[s]
    h = {n: g[n].copy() for n in g} if h is None else {n: h[n] * 0.98 + g[n] * (1 - 0.98) for n in g}
    write(f"grokfast{s}", {n: g[n] + 2 * h[n] for n in g})

weights = [3, 7, 1]
write("accumulate", {n: sum(w * grads[i][n] for i, w in enumerate(weights)) / sum(weights) for n in names})

# ---- averages --------------------------------------------------------------------------------------------------------
points = [{n: theta[n] + 0.1 * grads[s][n] for n in theta} for s in range(STEPS)]
buffers = [{"4.running_mean": rng.normal(size=5), "4.running_var": rng.uniform(0.5, 2, 5)} for _ in range(STEPS)]
for s in range(STEPS):
    write(f"buffer{s}", buffers[s])


def averaged(case, steps=range(STEPS), **options):
    model = AveragedModel(net, **options)
    for s in steps:
        load(net, points[s])
        net[4].running_mean.copy_(torch.from_numpy(buffers[s]["4.running_mean"]))
        net[4].running_var.copy_(torch.from_numpy(buffers[s]["4.running_var"]))
        model.update_parameters(net)
    state = {n[7:]: t.numpy().copy() for n, t in model.state_dict().items() if n.startswith("module.")}
    state.pop("4.num_batches_tracked")
    write(case, state)


def warm(average, new, n):
    d = min(0.7, 1 - (1 + float(n) / 2) ** (-2 / 3))
    return average + (1 - d) * (new - average)


averaged("swa")
averaged("swa_buffers", use_buffers=True)
averaged("ema", multi_avg_fn=get_ema_multi_avg_fn(0.9))
averaged("ema_every3", steps=range(2, STEPS, 3), multi_avg_fn=get_ema_multi_avg_fn(0.9))
averaged("ema_warmup", avg_fn=warm)

# ---- statistics: batches of 4, 6 and 3 -----------------------------------------------------------------------------------
load(net, theta)
batches = [torch.from_numpy(rng.normal(size=(b, 2, 4, 4)).astype(np.float32).astype(float)) for b in (4, 6, 3)]
for i, x in enumerate(batches):
    golden[f"batch{i}"] = np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
update_bn(batches, net)
write("update_bn", {"4.running_mean": net[4].running_mean.numpy(), "4.running_var": net[4].running_var.numpy()})

# ---- Lookahead, SAM ------------------------------------------------------------------------------------------------------
slow, fast = {n: t.copy() for n, t in theta.items()}, {n: t.copy() for n, t in theta.items()}
for s in range(STEPS):
    fast = {n: fast[n] - 0.1 * grads[s][n] for n in fast}
    if (s + 1) % 6 == 0:
        slow = {n: slow[n] + 0.5 * (fast[n] - slow[n]) for n in slow}
        fast = {n: t.copy() for n, t in slow.items()}
write("lookahead", fast)


def ascend(rho, scale):
    size = {n: scale(theta[n]) for n in theta}
    norm = np.sqrt(sum(((size[n] * grads[0][n]) ** 2).sum() for n in theta))
    return {n: theta[n] + rho * size[n] ** 2 * grads[0][n] / (norm + 1e-12) for n in theta}


write("sam", ascend(0.05, np.ones_like))
write("asam", ascend(0.5, np.abs))
write("asam_eta", ascend(0.5, lambda t: np.abs(t) + 0.01))
write("sam_step", {n: theta[n] - 0.1 * grads[1][n] for n in theta})

# ---- Mechanic around SGD with momentum 0.9 and lr 0.1: three gradients in turn; and its scales ----


def mechanic(case, **options):
    wrapped = optax.contrib.mechanize(optax.sgd(0.1, momentum=0.9), **options)
    w = {n: jax.numpy.asarray(t) for n, t in theta.items()}
    state, scales = wrapped.init(w), []
    for s in range(4 * STEPS):
        updates, state = wrapped.update({n: jax.numpy.asarray(grads[s % 3][n]) for n in w}, state, w)
        w = optax.apply_updates(w, updates)
        scales.append(float(state.s.sum()))
    write(case, w)
    golden[f"{case}.scale"] = np.array(scales)


mechanic("mechanic", s_init=1e-3)
mechanic("mechanic_options", s_init=0.1, weight_decay=0.3, num_betas=3, eps=1e-4)

# ---- GradScaler: interval 3, these steps have a gradient that is not finite ------------------------------------------------
bad = [0, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 0]
p = torch.nn.Parameter(torch.zeros(1))
opt = torch.optim.SGD([p], lr=1.0)
scaler = torch.amp.GradScaler("cpu", growth_interval=3)
scales, steps = [], []
for b in bad:
    opt.zero_grad()
    scaler.scale((p * (float("inf") if b else 1.0)).sum()).backward()
    scaler.step(opt)
    scaler.update()
    scales.append(scaler.get_scale())
    steps.append(p.item())
golden["scaler.bad"], golden["scaler.scale"], golden["scaler.theta"] = np.array(bad, float), np.array(scales), np.array(steps)

# ---- telemetry: SGD with momentum 0.9 and lr 0.1, before the third step -----------------------------------------------------
w, m = {n: t.copy() for n, t in theta.items()}, None
for s in range(3):
    g = grads[s]
    flat = lambda d: np.concatenate([d[n].ravel() for n in names])
    if s == 2:
        cosine = flat(g) @ flat(m) / np.linalg.norm(flat(g)) / np.linalg.norm(flat(m))
    m = {n: g[n].copy() for n in g} if m is None else {n: 0.9 * m[n] + g[n] for n in g}
    before, w = w, {n: w[n] - 0.1 * m[n] for n in w}
ratio = np.linalg.norm(flat(w) - flat(before)) / np.linalg.norm(flat(before))
golden["telemetry"] = np.array([ratio, cosine])

save_file(golden, HERE / "utilities.safetensors")
print(len(golden), "tensors")
