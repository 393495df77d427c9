#!/usr/bin/env python3
"""Makes the golden numbers of tests/test_training.c, beside this script:

    training.safetensors            losses, trajectories, schedules, outputs; how each run is set up is in its metadata
    training_net.safetensors        a state_dict as PyTorch writes it
    training_batchnorm.safetensors  the same with batch normalisation (buffers, num_batches_tracked)

usage, from the repository root (data/ must hold Fashion-MNIST):
    python tests/golden/make_training.py                write the three files (10 minutes and more)
    python tests/golden/make_training.py --keep         the same, but keep the autoencoder's numbers, which take the time
    python tests/golden/make_training.py --check FILE   FILE, written by dot_save, holds the autoencoder's first weights

Gradients, inputs and first weights come from one integer formula, `uniform`, which test_training.c has too: the
files hold results only. PyTorch is the reference wherever it has the rule. Where it has none (Adafactor factored as
(out, rest), decay free of the learning rate) the reference is `Reference` below, plain double precision, which
is itself held against torch.optim in every run that torch.optim can make.
"""
import fnmatch
import math
import pathlib
import sys

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from torch import nn

HERE = pathlib.Path(__file__).parent
IMAGES = pathlib.Path("data/train-images-idx3-ubyte")

golden = {}      # name -> array
metadata = {}    # name -> text: how a run is set up, as "key=value key=value"


# ---- the formula ---------------------------------------------------------------------------------------------------

def hash32(stream, count):
    """32 random-looking bits for each index 0..count-1 of a stream; the mixing constants are Wellons' lowbias32."""
    mask = np.uint64(0xffffffff)
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9e3779b1)
    x = (x + np.uint64(stream * 0x85ebca77 + 0x165667b1 & 0xffffffff)) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x7feb352d) & mask
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x846ca68b) & mask
    return x ^ x >> np.uint64(16)


def uniform(stream, count):
    """[0, 1) in steps of 2^-24: exact in float32, and so is 2 u - 1."""
    return (hash32(stream, count) >> np.uint64(8)).astype(np.float64) * 2.0 ** -24


def set_parameters(net, first_stream, gain=1.0):
    """Every parameter uniform in +-gain/sqrt(fan_in), rounded to float32; a bias has the fan_in of the weight before it."""
    fan_in = 1
    for p, tensor in enumerate(net.parameters()):
        if tensor.dim() >= 2:
            fan_in = tensor[0].numel()
        values = (2 * uniform(first_stream + p, tensor.numel()) - 1) * (gain / math.sqrt(fan_in))
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(values.astype(np.float32)).reshape(tensor.shape))


# ---- the rules, in double precision ---------------------------------------------------------------------------------

DEFAULTS = {
    "sgd": dict(lr=1e-3, weight_decay=0.0, decay="l2", beta1=0.0),
    "adam": dict(lr=1e-3, weight_decay=0.0, decay="l2", beta1=0.9),
    "adamw": dict(lr=1e-3, weight_decay=1e-2, decay="lr", beta1=0.9),
    "adafactor": dict(lr=1e-2, weight_decay=0.0, decay="lr", beta1=0.0, relative_step=1),
    "adamw-factored": dict(lr=1e-2, weight_decay=0.0, decay="lr", beta1=0.0, relative_step=0),
}
COMMON = dict(beta2=0.999, eps=1e-8, dampening=0.0, nesterov=0, maximize=0, decay_lr=1.0, decay_period=1.0,
              scale_parameter=1, beta2_exponent=0.8, eps1=1e-30, eps2=1e-3, clip_threshold=1.0)


def rms(x):
    return math.sqrt(float(np.mean(np.square(x))))


class Reference:
    """One optimizer over a list of float64 arrays, changed in place. Each tensor counts its own steps, as in PyTorch."""

    def __init__(self, theta, algorithm, **options):
        self.theta = theta
        self.algorithm = algorithm
        self.o = {**COMMON, **DEFAULTS[algorithm], **options}
        self.state = [dict(t=0) for _ in theta]

    def step(self, gradients, multiplier):
        for theta, g, state in zip(self.theta, gradients, self.state):
            if g is not None and theta.size:
                state["t"] += 1
                self.update(theta, g, state, multiplier)

    def update(self, theta, g, state, multiplier):
        o = self.o
        if o["maximize"]:
            g = -g
        if o["decay"] == "l2":
            g = g + o["weight_decay"] * theta
        # RMS(theta) of a relative step is that of theta before the decay.
        scale = max(o["eps2"], rms(theta)) if o["scale_parameter"] else 1.0
        theta *= 1 - multiplier * o["weight_decay"] * {
            "l2": 0.0, "lr": o["lr"], "scheduled": o["decay_lr"],
            "normalized": o["decay_lr"] / math.sqrt(o["decay_period"])}[o["decay"]]
        if self.algorithm == "sgd":
            theta -= o["lr"] * multiplier * self.sgd(g, state)
        elif self.algorithm in ("adam", "adamw"):
            theta -= o["lr"] * multiplier * self.adam(g, state)
        else:
            theta -= self.factored(g, state, scale, multiplier)

    def sgd(self, g, state):
        o = self.o
        if o["beta1"] == 0:
            return g
        first = "b" not in state
        state["b"] = g.copy() if first else o["beta1"] * state["b"] + (1 - o["dampening"]) * g
        return g + o["beta1"] * state["b"] if o["nesterov"] else state["b"]

    def adam(self, g, state):
        o, t = self.o, state["t"]
        state["m"] = state.get("m", 0.0) + (1 - o["beta1"]) * (g - state.get("m", 0.0))
        state["v"] = o["beta2"] * state.get("v", 0.0) + (1 - o["beta2"]) * np.square(g)
        return state["m"] / (1 - o["beta1"] ** t) / (np.sqrt(state["v"] / (1 - o["beta2"] ** t)) + o["eps"])

    def factored(self, g, state, scale, multiplier):
        """Shazeer, Stern 2018, algorithm 4 and 5. A tensor of two or more dimensions is the matrix [shape[0], rest] of its
        PyTorch shape, so that the rows of a ConvTranspose weight, [in, out, kh, kw], are its inputs."""
        o, t = self.o, state["t"]
        beta2 = 1 - t ** -o["beta2_exponent"]
        square = np.square(g) + o["eps1"]
        if g.ndim >= 2:
            square = square.reshape(g.shape[0], -1)
            state["r"] = beta2 * state.get("r", 0.0) + (1 - beta2) * square.mean(axis=1)
            state["c"] = beta2 * state.get("c", 0.0) + (1 - beta2) * square.mean(axis=0)
            v = (np.outer(state["r"] / state["r"].mean(), state["c"])).reshape(g.shape)
        else:
            state["v"] = v = beta2 * state.get("v", 0.0) + (1 - beta2) * square
        u = g / np.sqrt(v)
        u = u / max(1.0, rms(u) / o["clip_threshold"])
        rate = min(o["lr"], 1 / math.sqrt(t)) if o["relative_step"] else o["lr"]
        u = scale * rate * multiplier * u
        if o["beta1"] == 0:
            return u
        state["m"] = o["beta1"] * state.get("m", 0.0) + (1 - o["beta1"]) * u
        return state["m"]


def torch_optimizer(parameters, algorithm, options):
    """The torch optimizer that keeps the same rule, or None. `parameters` may be groups."""
    o = {**COMMON, **DEFAULTS.get(algorithm, {}), **options}
    common = dict(lr=o["lr"], weight_decay=o["weight_decay"], maximize=bool(o["maximize"]), foreach=False)
    if algorithm == "sgd" and (o["decay"] == "l2" or not o["weight_decay"]):
        return torch.optim.SGD(parameters, momentum=o["beta1"], dampening=o["dampening"],
                               nesterov=bool(o["nesterov"]), **common)
    # AdamW's decay is lr_t lambda = multiplier lr lambda: DOT_DECAY_SCHEDULED with decay_lr = lr is the same.
    decoupled = o["decay"] == "lr" or o["decay"] == "scheduled" and o["decay_lr"] == o["lr"]
    if algorithm in ("adam", "adamw") and (o["decay"] == "l2" or decoupled):
        rule = torch.optim.AdamW if decoupled else torch.optim.Adam
        return rule(parameters, betas=(o["beta1"], o["beta2"]), eps=o["eps"], **common)
    return None


def set_multiplier(optimizer, multiplier):
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * multiplier


def describe(**settings):
    return " ".join(f"{key}={value!r}" if isinstance(value, float) else f"{key}={value}"
                    for key, value in settings.items())


# ---- schedules ------------------------------------------------------------------------------------------------------

def cosine(total, floor=0.0):
    return lambda s: floor + (1 - floor) / 2 * (1 + math.cos(math.pi * min(max(s, 0), total) / total))


def restart_of(step, first, factor):
    """(steps since the last restart, length of the period): integers of any size, no logarithm."""
    step, period = max(step, 0), first
    if factor == 1:
        return step % first, first
    while step >= period:
        step -= period
        period *= factor
    return step, period


def warm_restarts(first, factor, floor=0.0):
    def multiplier(s):
        since, period = restart_of(s, first, factor)
        return floor + (1 - floor) / 2 * (1 + math.cos(math.pi * (since / period)))
    return multiplier


def step_drop(milestones, gamma):
    return lambda s: gamma ** sum(m <= max(s, 0) for m in milestones)


def torch_schedule(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(values)


FAR = [-1, -1000, 2 ** 31 - 1, 2 ** 31, 2 ** 32 + 5, 10 ** 12 + 7, 2 ** 53 + 1, 2 ** 62, 2 ** 63 - 1]


def make_schedules():
    from torch.optim import lr_scheduler as ls
    many = [3 * m * m for m in range(1, 17)]
    cases = [
        ("constant", dict(kind="constant"), lambda s: 1.0, None),
        ("drop", dict(kind="drop", milestones="30,60,80", factor=0.1), step_drop([30, 60, 80], 0.1),
         lambda opt: ls.MultiStepLR(opt, [30, 60, 80], 0.1)),
        ("drop16", dict(kind="drop", milestones=",".join(map(str, many)), factor=0.5), step_drop(many, 0.5),
         lambda opt: ls.MultiStepLR(opt, many, 0.5)),
        ("drop_unsorted", dict(kind="drop", milestones="80,0,30,30", factor=0.25), step_drop([80, 0, 30, 30], 0.25), None),
        ("drop_none", dict(kind="drop", milestones="", factor=0.25), step_drop([], 0.25), None),
    ]
    for total, floor in ((1000, 0.0), (2000, 0.1), (1, 0.0), (7, 0.5)):
        cases.append((f"cosine_{total}", dict(kind="cosine", total=total, floor=floor), cosine(total, floor),
                      lambda opt, total=total, floor=floor: ls.CosineAnnealingLR(opt, total, floor)))
    for first, factor, floor in ((10, 2, 0.0), (10, 3, 0.0), (10, 3, 0.05), (100, 1, 0.1), (1, 1, 0.0), (7, 4, 0.0),
                                 (1, 2, 0.3)):
        cases.append((f"restarts_{first}_{factor}_{floor}", dict(kind="restarts", total=first, factor=factor, floor=floor),
                      warm_restarts(first, factor, floor),
                      lambda opt, first=first, factor=factor, floor=floor:
                      ls.CosineAnnealingWarmRestarts(opt, first, factor, floor)))
    worst = 0.0
    for name, settings, closed, make in cases:
        golden[f"schedule.{name}"] = np.array([closed(s) for s in range(2001)])
        golden[f"schedule.{name}.far"] = np.array([closed(s) for s in FAR])
        if settings["kind"] == "restarts":
            first, factor = settings["total"], settings["factor"]
            golden[f"schedule.{name}.period"] = np.array([restart_of(s, first, factor)[1] for s in range(2001)], dtype=np.int64)
            periods = [restart_of(s, first, factor)[1] for s in FAR]    # 0: does not fit
            golden[f"schedule.{name}.far.period"] = np.array([p if p < 2 ** 63 else 0 for p in periods], dtype=np.int64)
        if make:
            # PyTorch's cosine rises again after T_max: it is asked no further.
            steps = min(settings["total"] + 1, 2001) if settings["kind"] == "cosine" else 2001
            by_torch = torch_schedule(make, steps)
            difference = np.abs(by_torch - golden[f"schedule.{name}"][:steps]).max()
            assert difference < 1e-11, (name, difference)
            worst = max(worst, difference)
            if name == "restarts_10_3_0.0":
                assert by_torch[1210] == 1.0
        metadata[f"schedule.{name}"] = describe(**settings)
    metadata["schedules"] = " ".join(name for name, *_ in cases)
    golden["far_steps"] = np.array(FAR, dtype=np.int64)
    print(f"{len(cases)} schedules; closed forms from torch.optim.lr_scheduler, which adds up step by step: {worst:.1e}")


# ---- the autoencoder -------------------------------------------------------------------------------------------------

STEPS, BATCH = 50, 128
# A quarter of PyTorch's bounds. From the whole, Adam's losses are chaotic: float32 and float64 differ by up to 4e-3 after
# 40 steps, when a unit that was dead wakes. From a quarter they differ by 3e-6 at most, but for B3 (3e-4).
GAIN = 0.25


def autoencoder():
    half = dict(kernel_size=3, stride=2, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 32, **half), nn.ReLU(),
        nn.Conv2d(32, 64, **half), nn.ReLU(),
        nn.Flatten(), nn.Linear(64 * 7 * 7, 128),
        nn.Linear(128, 64 * 7 * 7), nn.Unflatten(1, (64, 7, 7)),
        nn.ConvTranspose2d(64, 32, output_padding=1, **half), nn.ReLU(),
        nn.ConvTranspose2d(32, 1, output_padding=1, **half), nn.Sigmoid())


B = dict(algorithm="adamw", lr=1e-3, weight_decay=1e-3, decay="scheduled", decay_lr=1e-3)
C = dict(algorithm="adafactor", lr=1e-2, weight_decay=1e-3, decay="scheduled", decay_lr=1e-3)
D = dict(algorithm="adamw-factored", lr=1e-2, weight_decay=1e-3, decay="normalized", decay_lr=1.0)
DROP = dict(kind="drop", milestones="15,30,40", factor=0.1)
COSINE = dict(kind="cosine", total=STEPS)
RESTARTS = dict(kind="restarts", total=5, factor=2)
VARIANTS = {
    "A1": (dict(algorithm="adam", lr=1e-3, weight_decay=1e-3, decay="l2"), {}),
    "A2": (dict(algorithm="sgd", lr=0.1, weight_decay=1e-3, decay="l2", beta1=0.9), {}),
    "B1": (B, {}), "B2": (B, DROP), "B3": (B, COSINE), "B4": (B, RESTARTS),
    "C1": (C, {}), "C2": ({**C, "beta1": 0.9}, {}),
    "D1": (D, COSINE), "D2": (D, RESTARTS), "D3": ({**D, "beta1": 0.9}, RESTARTS),
}
SCHEDULES = {"drop": step_drop([15, 30, 40], 0.1), "cosine": cosine(STEPS), "restarts": warm_restarts(5, 2)}


def train_autoencoder(images, dtype, settings, schedule, rule):
    """The 50 losses, each before its update. rule: "torch" or "reference"."""
    multiplier_at = SCHEDULES.get(schedule.get("kind"), lambda s: 1.0)
    net = autoencoder().to(dtype)
    set_parameters(net, 0, GAIN)
    parameters = list(net.parameters())
    options = {key: value for key, value in settings.items() if key != "algorithm"}
    if rule == "torch":
        optimizer = torch_optimizer(parameters, settings["algorithm"], options)
    else:
        reference = Reference([p.detach().numpy() for p in parameters], settings["algorithm"], **options)
    losses = []
    for step in range(STEPS):
        # Bytes times 1/255 in double precision, then the network's type.
        x = torch.from_numpy(images[step * BATCH:(step + 1) * BATCH] * (1 / 255)).to(dtype).unsqueeze(1)
        loss = nn.functional.mse_loss(net(x), x)
        losses.append(loss.item())
        net.zero_grad()
        loss.backward()
        if rule == "torch":
            set_multiplier(optimizer, multiplier_at(step))
            optimizer.step()
        else:
            if schedule.get("kind") == "restarts":
                reference.o["decay_period"] = restart_of(step, schedule["total"], schedule["factor"])[1]
            else:
                reference.o["decay_period"] = STEPS
            reference.step([p.grad.numpy() for p in parameters], multiplier_at(step))
    return np.array(losses)


def make_autoencoder():
    raw = np.fromfile(IMAGES, dtype=np.uint8, offset=16, count=STEPS * BATCH * 784)
    images = raw.reshape(STEPS * BATCH, 28, 28).astype(np.float64)
    net = autoencoder()
    assert sum(p.numel() for p in net.parameters()) == 843649
    metadata["autoencoder.parameters"] = "".join(
        f"{name}[{','.join(map(str, tensor.shape))}];" for name, tensor in net.state_dict().items())
    metadata["autoencoder.variants"] = " ".join(VARIANTS)
    for name, (settings, schedule) in VARIANTS.items():
        key = f"autoencoder.{name}"
        metadata[key] = describe(**settings, **schedule)
        rule = "torch" if name[0] in "AB" else "reference"
        double = golden[f"{key}.f64"] = train_autoencoder(images, torch.float64, settings, schedule, rule)
        print(f"{key}: loss {double[0]:.5f} -> {double[-1]:.5f} by {rule}", flush=True)
        if rule == "torch":
            single = golden[f"{key}.f32"] = train_autoencoder(images, torch.float32, settings, schedule, rule)
            print(f"    float32 from float64: {np.abs(single / double - 1).max():.1e}", flush=True)


def keep_autoencoder(path):
    with safe_open(path, "np") as old:
        golden.update({name: old.get_tensor(name) for name in old.keys() if name.startswith("autoencoder.")})
        metadata.update({key: text for key, text in old.metadata().items() if key.startswith("autoencoder.")})


def check_saved(path):
    net = autoencoder()
    set_parameters(net, 0, GAIN)
    saved = load_file(path)
    expected = {name: tensor.numpy() for name, tensor in net.state_dict().items()}
    assert set(saved) == set(expected), sorted(set(saved) ^ set(expected))
    for name, values in expected.items():
        assert saved[name].shape == values.shape and saved[name].dtype == values.dtype, name
        assert np.array_equal(saved[name].view(np.uint32), values.view(np.uint32)), name
    print(f"{path}: {len(saved)} tensors, all bits as expected")


# ---- trajectories ----------------------------------------------------------------------------------------------------

SHAPES = [(), (7,), (5, 3), (3, 40), (4, 3, 3, 3), (0,)]
RUN = 200
CHECKPOINTS = [1, 2, 10, 50, 200]    # steps after which all parameters are stored
PERIODS = {1: 37.0, 101: 74.0}          # decay_period from step t on
SPIKE = {"extreme": float(np.float32(1e20)), "moderate": 1e8}


def first_theta(p, count, tiny):
    theta = 2 * uniform(50 + p, count) - 1
    if tiny:
        i = np.arange(count)
        theta[(i % 11 == 3) | (i % 11 == 7) | (i % 13 == 5)] = 0.0   # so that tiny updates show
    return theta


def gradient(stream, tiny, p, count, t):
    """The gradient of step t = 1, 2, ...: values of many sizes, one in eight exactly 0; in the streams "extreme" and
    "moderate" also elements that are always 0, and that have spikes; tiny: elements that are tiny in float32 (the product
    with a learning rate is denormal), tiny in float64, and denormal in float64."""
    h, u = hash32(100 + 8 * t + p, count), uniform(100 + 8 * t + p, count)
    i = np.arange(count)
    g = (2 * u - 1) * np.exp2(i % 9 - 4.0)
    g[h % 8 == 0] = 0.0
    if stream == "plain":
        return g * (4.0 if t % 2 else 0.0625)       # norms above and below the one that gradients are clipped to
    spike = (i % 17 == 2) & (h % 32 == 1)
    g[spike] = np.where(u[spike] < 0.5, -SPIKE[stream], SPIKE[stream])
    for modulus, rest, size in ((13, 5, 1e-308), (11, 3, 2.0 ** -122), (11, 7, 1e-300)) if tiny else ():
        chosen = i % modulus == rest
        g[chosen] = (1 + u[chosen]) * size
    g[i % 11 == 9] = 0.0
    return g


def has_gradient(p, t):
    """In runs with skip=1 parameter p is left out of the loss of some steps, the first among them."""
    return (t + p) % 3 != 0


def tiny_elements(settings):
    """Tiny elements stay out where the gradient has lambda theta in it and is divided by its own size: theta then grows
    from whatever rounding left there, a thousandfold each step."""
    return settings.get("stream", "extreme") != "plain" and not settings.get("no_tiny")


def multiplier(t):
    return 0.5 + float(uniform(40, t + 1)[t])


def step_gradients(settings, t):
    counts = [int(np.prod(shape)) for shape in SHAPES]
    stream = settings.get("stream", "extreme")
    gradients = [gradient(stream, tiny_elements(settings), p, count, t).reshape(shape)
                 for p, (shape, count) in enumerate(zip(SHAPES, counts))]
    return [g if not settings.get("skip") or has_gradient(p, t) else None for p, g in enumerate(gradients)]


def clip(gradients, max_norm):
    norm = math.sqrt(sum(float(np.sum(np.square(g))) for g in gradients if g is not None))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return [None if g is None else g * factor for g in gradients], norm


RUN_KEYS = ("algorithm", "stream", "no_tiny", "skip", "clip", "f64_only")


def run_trajectory(settings, rule):
    theta = [first_theta(p, int(np.prod(shape)), tiny_elements(settings)).reshape(shape) for p, shape in enumerate(SHAPES)]
    options = {key: value for key, value in settings.items() if key not in RUN_KEYS}
    tensors = [torch.from_numpy(x.copy()).requires_grad_() for x in theta]
    if rule == "torch":
        optimizer = torch_optimizer(tensors, settings["algorithm"], options)
        if optimizer is None:
            return None, None
    else:
        reference = Reference(theta, settings["algorithm"], **options)
    stored, norms = [], []
    for t in range(1, RUN + 1):
        gradients = step_gradients(settings, t)
        if rule == "torch":
            for tensor, g in zip(tensors, gradients):
                tensor.grad = None if g is None else torch.from_numpy(g)
            if "clip" in settings:
                norms.append(float(torch.nn.utils.clip_grad_norm_(tensors, settings["clip"])))
            set_multiplier(optimizer, multiplier(t))
            optimizer.step()
            state = [x.detach().numpy() for x in tensors]
        else:
            if "clip" in settings:
                gradients, norm = clip(gradients, settings["clip"])
                norms.append(norm)
            if t in PERIODS:
                reference.o["decay_period"] = PERIODS[t]
            reference.step(gradients, multiplier(t))
            state = reference.theta
        if t in CHECKPOINTS:
            stored.append(np.concatenate([x.ravel() for x in state]))
    return np.array(stored), np.array(norms)


def trajectories():
    decays = {"l2": {}, "lr": {}, "scheduled": dict(decay_lr=0.02), "normalized": dict(decay_lr=0.02)}
    dense = {
        "sgd": dict(algorithm="sgd"),
        "momentum": dict(algorithm="sgd", beta1=0.9),
        "dampening": dict(algorithm="sgd", beta1=0.9, dampening=0.3),
        "nesterov": dict(algorithm="sgd", beta1=0.9, nesterov=1),
        "maximize": dict(algorithm="sgd", beta1=0.9, maximize=1),
        "adam": dict(algorithm="adam"),
        "adamw": dict(algorithm="adamw"),
    }
    runs = {}
    for name, settings in dense.items():
        for decay, extra in decays.items():
            runs[f"{name}_{decay}"] = {**settings, "lr": 0.01, "weight_decay": 0.3, "decay": decay, **extra}
    runs["adam_maximize"] = {**runs["adam_l2"], "maximize": 1}
    runs["adamw_maximize"] = {**runs["adamw_lr"], "maximize": 1}
    # (1 - 0.95) 1e40 is beyond float32; (1 - 0.999) 1e40 is not.
    runs["adam_betas"] = {**runs["adam_l2"], "stream": "moderate", "beta1": 0.8, "beta2": 0.95, "eps": 1e-3}
    runs["adamw_no_decay"] = dict(algorithm="adamw", lr=0.01, weight_decay=0.0)

    factor = dict(stream="moderate", weight_decay=0.3, decay="scheduled", decay_lr=0.02)
    for relative in (0, 1):
        for scale in (0, 1):
            for beta1 in (0.0, 0.9):
                # A cap that 1/sqrt(t) falls below during the run.
                runs[f"adafactor_{relative}{scale}{int(beta1 > 0)}"] = dict(
                    algorithm="adafactor", lr=0.2 if relative else 0.01, beta1=beta1, relative_step=relative,
                    scale_parameter=scale, **factor)
    for decay, extra in decays.items():
        some = dict(stream="moderate", weight_decay=0.3, decay=decay, **extra)
        if decay != "scheduled":
            runs[f"adafactor_{decay}"] = dict(algorithm="adafactor", lr=0.2, **some)
        for beta1 in (0.0, 0.9):
            runs[f"factored_{decay}_{int(beta1 > 0)}"] = dict(algorithm="adamw-factored", lr=0.02, beta1=beta1, **some)
    base = dict(algorithm="adamw-factored", lr=0.2, **factor)
    runs["factored_relative"] = {**base, "relative_step": 1}
    runs["factored_unscaled"] = {**base, "lr": 0.01, "scale_parameter": 0}
    runs["factored_maximize"] = {**base, "lr": 0.02, "maximize": 1}
    runs["adafactor_constants"] = dict(algorithm="adafactor", stream="moderate", lr=0.2, beta2_exponent=0.5, eps1=1e-6,
                                       eps2=0.9, clip_threshold=0.5)
    # The square of 1e20 is beyond float32, in which Adafactor keeps its averages.
    runs["adafactor_extreme"] = dict(algorithm="adafactor", lr=0.2, beta1=0.9, f64_only=1)
    runs["factored_extreme"] = dict(algorithm="adamw-factored", lr=0.02, f64_only=1)

    for name in ("momentum_l2", "dampening_l2", "adam_l2", "adamw_lr", "adafactor_110", "factored_lr_1"):
        runs[f"{name}_skip"] = {**runs[name], "skip": 1}
    for name in ("momentum_l2", "adamw_lr", "adafactor_111"):
        runs[f"{name}_clip"] = {**runs[name], "stream": "plain", "clip": 40.0}
    runs["adam_l2_skip_clip"] = {**runs["adam_l2"], "stream": "plain", "skip": 1, "clip": 40.0}
    for name, settings in runs.items():
        o = {**DEFAULTS[settings["algorithm"]], **settings}
        if o["algorithm"] != "sgd" and o["decay"] == "l2" and o["weight_decay"]:
            runs[name] = {**settings, "no_tiny": 1}
    return runs


def make_trajectories():
    runs = trajectories()
    by_torch = 0
    for name, settings in runs.items():
        stored, norms = run_trajectory(settings, "reference")
        expected, expected_norms = run_trajectory(settings, "torch")
        if expected is not None:
            by_torch += 1
            scale = np.maximum.accumulate(np.abs(expected), axis=0)
            difference = np.max(np.abs(stored - expected) / np.maximum(scale, 1e-305))
            assert difference < 2e-13, (name, difference)
            stored, norms = expected, expected_norms
        assert np.isfinite(stored).all(), name
        golden[f"trajectory.{name}"] = stored
        if "clip" in settings:
            assert (norms > settings["clip"]).any() and (norms < settings["clip"]).any(), (name, norms)
            golden[f"trajectory.{name}.norms"] = norms
        metadata[f"trajectory.{name}"] = describe(**settings)
    metadata["trajectories"] = " ".join(runs)
    print(f"{len(runs)} trajectories, {by_torch} of them by torch.optim")


# ---- parameter groups --------------------------------------------------------------------------------------------------

GROUP_STEPS = 30
GROUP_CASES = {
    # net, default settings, groups: pattern, kinds, lr, weight_decay
    "kind_bias": ("plain", dict(algorithm="adamw", lr=1e-2, weight_decay=0.3), [(None, "bias", 1e-2, 0.0)]),
    "kind_bias_norm": ("norm", dict(algorithm="adamw", lr=1e-2, weight_decay=0.3), [(None, "bias,norm", 1e-2, 0.0)]),
    "pattern_bias": ("plain", dict(algorithm="adamw", lr=1e-2, weight_decay=0.3), [("*.bias", None, 3e-2, 0.1)]),
    "pattern_first": ("plain", dict(algorithm="sgd", lr=0.1, weight_decay=0.01, beta1=0.9),
                      [("0.*", None, 0.02, 0.2), (None, "bias", 0.2, 0.0)]),
    "pattern_question": ("norm", dict(algorithm="adam", lr=1e-2, weight_decay=0.01),
                         [("?.weight", None, 5e-3, 0.1), ("2.*", None, 4e-2, 0.0), ("nothing", None, 1.0, 1.0)]),
    "pattern_or_kind": ("plain", dict(algorithm="adamw", lr=1e-2, weight_decay=0.3), [("2.w*t", "bias", 3e-3, 0.02)]),
}


def group_net(kind):
    layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
    if kind == "norm":
        layers = [nn.Linear(5, 4), nn.Tanh(), nn.LayerNorm(4), nn.Linear(4, 3)]
    net = nn.Sequential(*layers).double()
    set_parameters(net, 20)
    return net


def group_of(name, net, groups):
    """1 + the index of the first group that takes the parameter by name or by kind; 0: the default group."""
    module = net.get_submodule(name.rsplit(".", 1)[0])
    kind = "norm" if isinstance(module, nn.LayerNorm) else name.rsplit(".", 1)[1]
    for index, (pattern, kinds, _, _) in enumerate(groups):
        if pattern and fnmatch.fnmatchcase(name, pattern) or kinds and kind in kinds.split(","):
            return index + 1
    return 0


def make_groups():
    x = torch.from_numpy(2 * uniform(30, 6 * 5) - 1).reshape(6, 5)
    y = torch.from_numpy(2 * uniform(31, 6 * 3) - 1).reshape(6, 3)
    for case, (kind, settings, groups) in GROUP_CASES.items():
        net = group_net(kind)
        members = [[] for _ in range(len(groups) + 1)]
        for name, tensor in net.named_parameters():
            members[group_of(name, net, groups)].append(tensor)
        options = {key: value for key, value in settings.items() if key != "algorithm"}
        torch_groups = [dict(params=members[0])] + [
            dict(params=members[i + 1], lr=lr, weight_decay=decay) for i, (_, _, lr, decay) in enumerate(groups)]
        optimizer = torch_optimizer(torch_groups, settings["algorithm"], options)
        losses = []
        for step in range(GROUP_STEPS):
            if step == 15:      # a change in mid-run: the lr of group 1 halves, the decay of group 0 becomes 0.05
                optimizer.param_groups[1]["base_lr"] *= 0.5
                optimizer.param_groups[0]["weight_decay"] = 0.05
            loss = nn.functional.mse_loss(net(x), y)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            set_multiplier(optimizer, multiplier(step))
            optimizer.step()
        golden[f"groups.{case}.losses"] = np.array(losses)
        for name, tensor in net.named_parameters():
            golden[f"groups.{case}.{name}"] = tensor.detach().numpy()
        metadata[f"groups.{case}"] = describe(**settings)
        metadata[f"groups.{case}.net"] = kind
        for i, (pattern, kinds, lr, decay) in enumerate(groups):
            metadata[f"groups.{case}.{i + 1}"] = describe(pattern=pattern or "-", kinds=kinds or "-", lr=lr, weight_decay=decay)
    metadata["groups"] = " ".join(GROUP_CASES)


# ---- files that PyTorch writes -----------------------------------------------------------------------------------------

def make_files():
    half = dict(kernel_size=3, stride=2, padding=1)
    net = nn.Sequential(
        nn.Conv2d(2, 4, **half), nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.GroupNorm(3, 6),
        nn.Flatten(), nn.Linear(96, 10), nn.Tanh(), nn.Linear(10, 96), nn.Unflatten(1, (6, 4, 4)),
        nn.ConvTranspose2d(6, 4, 3, padding=1, groups=2), nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(4, 3, output_padding=1, **half), nn.Sigmoid())
    set_parameters(net, 60)
    save_torch(net.state_dict(), HERE / "training_net.safetensors", metadata={"format": "pt"})
    x = torch.from_numpy(2 * uniform(32, 3 * 2 * 8 * 8) - 1).reshape(3, 2, 8, 8)
    with torch.no_grad():
        golden["net.output"] = net.double()(x).permute(0, 2, 3, 1).contiguous().numpy()

    net = nn.Sequential(nn.Conv2d(2, 4, **half), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1, bias=False))
    set_parameters(net, 80)
    with torch.no_grad():
        net[1].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))
        net[1].running_var.copy_(torch.tensor([0.5, 2.0, 0.25, 1.5]))
        net[1].num_batches_tracked.fill_(17)
    save_torch(net.state_dict(), HERE / "training_batchnorm.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        golden["batchnorm.output"] = net.double().eval()(x).permute(0, 2, 3, 1).contiguous().numpy()


def main():
    if sys.argv[1:2] == ["--check"]:
        return check_saved(sys.argv[2])
    make_schedules()
    make_trajectories()
    make_groups()
    make_files()
    path = HERE / "training.safetensors"
    if sys.argv[1:2] == ["--keep"]:
        keep_autoencoder(path)
    else:
        make_autoencoder()
    save_file(golden, path, metadata=metadata)
    for each in HERE.glob("training*.safetensors"):
        each.chmod(0o644)
    print(f"{path}: {path.stat().st_size} bytes, {len(golden)} tensors")


if __name__ == "__main__":
    main()
