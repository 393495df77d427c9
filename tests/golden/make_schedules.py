#!/usr/bin/env python3
"""Makes schedules.safetensors, the golden numbers of tests/test_schedules.c, beside this script.

usage, from the repository root:  python tests/golden/make_schedules.py

For each case NAME, which test_schedules.c sets up under the same name:
    torch.NAME           what PyTorch's scheduler gives when it is stepped one by one from step 0, for as long as it is right
    exact.NAME           the closed form at the steps 0, 1, ..., worked out with 40 digits and rounded once
    exact.NAME.far       the same at the steps of FAR
and NAME.momentum where momentum is cycled. plateau.NAME.metrics is what a plateau is shown, plateau.NAME.torch what
ReduceLROnPlateau makes of it; plateau.NAME.right the rule as it is meant, where PyTorch's errs (a negative metric with a
relative threshold). The closed forms are written from the papers and from Hugging Face's definitions, which are held
against transformers itself where that is installed.
"""
import json
import math
import pathlib
import sys
import warnings

import mpmath
import numpy as np
import torch
from mpmath import mpf as M
from safetensors.numpy import save_file
from torch.optim import lr_scheduler as ls
from torch.optim.swa_utils import SWALR

mpmath.mp.dps = 40
warnings.filterwarnings("ignore")
FAR = [-1, -1000, 2 ** 31 - 1, 2 ** 31, 2 ** 32 + 5, 10 ** 12 + 7, 2 ** 53 + 1, 2 ** 62, 2 ** 63 - 1]
STEPS = 2001

golden = {}
names = []
worst = {}


def by_torch(make, steps, lr):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr, momentum=0.5)
    scheduler = make(optimizer)
    rates, momenta = [], []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        momenta.append(optimizer.param_groups[0]["momentum"])
        if step + 1 < steps:
            optimizer.step()
            scheduler.step()
    return np.array(rates, dtype=np.float64), np.array(momenta, dtype=np.float64)


def case(name, exact, make=None, torch_steps=STEPS, momentum=None, steps=STEPS, lr=1.0):
    """exact and momentum: functions of an integer step >= 0; make: a PyTorch scheduler from an optimizer."""
    names.append(name)
    for suffix, rule in (("", exact), (".momentum", momentum)):
        if rule:
            values = np.array([float(rule(s)) for s in range(steps)])
            golden[f"exact.{name}{suffix}"] = values
            golden[f"exact.{name}{suffix}.far"] = np.array([float(rule(max(s, 0))) for s in FAR])
    if make:
        rates, momenta = by_torch(make, min(torch_steps, steps), lr)
        golden[f"torch.{name}"] = rates
        if momentum:
            golden[f"torch.{name}.momentum"] = momenta
        for key in [name] + [f"{name}.momentum"] * bool(momentum):
            ours = golden[f"exact.{key}"][:len(rates)]
            difference = np.abs(golden[f"torch.{key}"] - ours).max()
            assert difference < 1e-12, (key, difference)
            worst[key] = difference


# ---- closed forms ----------------------------------------------------------------------------------------------------

def progress(s, begin, end):
    return M(min(max(s, begin), end) - begin) / (end - begin) if end > begin else M(s >= end)


def down(curve, floor):
    return M(floor) + (1 - M(floor)) * curve


def cosine_curve(p):
    return (1 + mpmath.cos(mpmath.pi * p)) / 2


SLOPES = {"linear": lambda p: 1 - p, "cos": cosine_curve, "sqrt": lambda p: 1 - mpmath.sqrt(p)}


def warmed(warmup, start, after):
    return lambda s: M(start) + (1 - M(start)) * s / warmup if s < warmup else after(s)


def cosine(total, floor=0.0, warmup=0, start=0.0):
    return warmed(warmup, start, lambda s: down(cosine_curve(progress(s, warmup, total)), floor))


def polynomial(total, power=1.0, floor=0.0, warmup=0, start=0.0):
    return warmed(warmup, start, lambda s: down((1 - progress(s, warmup, total)) ** M(power), floor))


def rex(total, floor=0.0, warmup=0):
    def curve(p):
        return (1 - p) / (1 - p / 2)
    return warmed(warmup, 0, lambda s: down(curve(progress(s, warmup, total)), floor))


def tanh(total, floor=0.0, lower=-6.0, upper=3.0):
    return lambda s: down((1 - mpmath.tanh(M(lower) + (M(upper) - M(lower)) * progress(s, 0, total))) / 2, floor)


def stable_decay(total, warmup, last, slope, floor=0.0):
    return warmed(warmup, 0, lambda s: down(SLOPES[slope](progress(s, total - last, total)), floor))


def inverse_sqrt(warmup, timescale):
    return warmed(warmup, 0, lambda s: 1 / mpmath.sqrt(M(s + timescale - warmup) / timescale))


def noam(warmup, width):
    return lambda s: M(width) ** M(-0.5) * min(M(s + 1) ** M(-0.5), (s + 1) * M(warmup) ** M(-1.5))


def anneal(total, start, end, slope="linear"):
    return lambda s: M(end) + (M(start) - M(end)) * SLOPES[slope](progress(s, 0, total))


def restart_of(s, first, factor):
    """(steps since the last restart, length of the period, its number)"""
    if factor == 1:
        return s % first, first, s // first
    period, index = first, 0
    while s >= period:
        s, period, index = s - period, period * factor, index + 1
    return s, period, index


def warm_restarts(first, factor, floor=0.0, decay=1.0, warmup=0, start=0.0):
    def multiplier(s):
        since, period, index = restart_of(s, first, factor)
        peak = max(M(floor), M(decay) ** index)
        if since < warmup:
            return M(start) + (peak - M(start)) * since / warmup
        return M(floor) + (peak - M(floor)) * cosine_curve(progress(since, warmup, period))
    return multiplier


def one_cycle(total, levels=(1.0, 25.0, 1e4), pct=0.3, slopes=("cos", "cos", "cos"), three=False, momenta=(0.85, 0.95)):
    """(level, momentum) as functions of the step; the turns as PyTorch computes them."""
    peak, div, final_div = levels
    start, low, high = M(peak) / M(div), M(momenta[0]), M(momenta[1])
    turns = [(M(0), start, high), (M(pct * total - 1), M(peak), low)]
    if three:
        turns.append((M(2 * pct * total - 2), start, high))
    turns.append((M(total - 1), start / M(final_div), high))

    def at(s, which):
        phase = next((i for i in range(1, len(turns)) if s <= turns[i][0]), len(turns) - 1)
        before, after = turns[phase - 1], turns[phase]
        p = min(M(1), (s - before[0]) / (after[0] - before[0]))
        return after[which] + (before[which] - after[which]) * SLOPES[slopes[phase - 1]](p)
    return (lambda s: at(s, 1)), (lambda s: at(s, 2))


def cyclic(up, last, low, peak=1.0, decay=1.0, gamma=1.0, momenta=(0.8, 0.9)):
    def height(s):
        cycle, since = divmod(s, up + last)
        rise = M(since) / up if since <= up else M(up + last - since) / last
        return rise * M(decay) ** cycle * M(gamma) ** s
    return (lambda s: M(low) + (M(peak) - M(low)) * height(s)), \
        (lambda s: M(momenta[1]) - (M(momenta[1]) - M(momenta[0])) * height(s))


def step_drop(milestones, gamma):
    return lambda s: M(gamma) ** sum(m <= s for m in milestones)


def sequence(parts, boundaries):
    def at(s):
        i = sum(b <= s for b in boundaries)
        return parts[i](s - ([0] + boundaries)[i])
    return at


def product(*parts):
    return lambda s: mpmath.fprod(part(s) for part in parts)


# ---- the cases ---------------------------------------------------------------------------------------------------------

def make_simple():
    case("constant", lambda s: 1, lambda o: ls.LambdaLR(o, lambda e: 1.0), steps=20)
    for every, gamma in ((30, 0.1), (1, 0.999), (7, 0.5)):
        case(f"step_{every}", lambda s: M(gamma) ** (s // every), lambda o: ls.StepLR(o, every, gamma))
    case("step_drop", step_drop([30, 60, 80], 0.1), lambda o: ls.MultiStepLR(o, [30, 60, 80], 0.1), steps=100)
    for gamma in (0.99, 0.5, 1.001):
        case(f"exponential_{gamma}", lambda s: M(gamma) ** s if s < 10 ** 6 or gamma < 1 else math.inf,
             lambda o: ls.ExponentialLR(o, gamma))
    case("constant_factor_third", lambda s: M(1 / 3) if s < 5 else 1, lambda o: ls.ConstantLR(o), steps=20)
    case("constant_factor", lambda s: M(0.1) if s < 700 else 1, lambda o: ls.ConstantLR(o, 0.1, 700), steps=800)
    case("linear_third", anneal(5, 1 / 3, 1.0), lambda o: ls.LinearLR(o), steps=20)
    case("linear_up", anneal(1000, 1e-3, 1.0), lambda o: ls.LinearLR(o, 1e-3, 1.0, 1000), steps=1100)
    case("linear_down", anneal(1500, 1.0, 0.0), lambda o: ls.LinearLR(o, 1.0, 0.0, 1500))
    case("linear_sqrt", anneal(1000, 0.25, 2.0, "sqrt"), steps=1100)
    for total, power in ((5, 1.0), (2000, 1.0), (1000, 2.0), (1500, 0.5)):
        case(f"polynomial_{total}", polynomial(total, power), lambda o: ls.PolynomialLR(o, total, power), steps=total + 10)
    case("polynomial_floor", polynomial(500, 3.0, 0.01, 50, 0.1), steps=600)
    for total, floor in ((1000, 0.0), (2000, 0.1), (1, 0.0), (7, 0.5)):
        case(f"cosine_{total}", cosine(total, floor), lambda o: ls.CosineAnnealingLR(o, total, floor),
             torch_steps=total + 1, steps=total + 10)    # PyTorch's rises again after its end
    case("cosine_absolute", cosine(300, 1e-5 / 3e-3), lambda o: ls.CosineAnnealingLR(o, 300, 1e-5 / 3e-3), torch_steps=301,
         steps=310)
    case("rex", rex(1000), steps=1010)
    case("rex_floor", rex(500, 0.1, 20), steps=510)
    case("tanh", tanh(1000), steps=1010)
    case("tanh_timm", tanh(300, 0.05, -7.0, 3.0), steps=310)
    case("range_test", lambda s: M(1e-4) * (M(10.0) / M(1e-4)) ** progress(s, 0, 500), steps=510)
    for slope in ("linear", "cos"):
        case(f"swa_{slope}", anneal(10, 1.0, 0.05, slope), lambda o: SWALR(o, 0.05, 10, slope), torch_steps=10, steps=30)
    case("swa_long", anneal(1000, 1.0, 0.05, "cos"), lambda o: SWALR(o, 0.05, 1000, "cos"), torch_steps=1000, steps=1100)


def make_restarts():
    for first, factor, floor in ((10, 2, 0.0), (10, 3, 0.0), (10, 3, 0.05), (100, 1, 0.1), (1, 1, 0.0), (7, 4, 0.0), (1, 2, 0.3)):
        name = f"restarts_{first}_{factor}_{floor}"
        case(name, warm_restarts(first, factor, floor), lambda o: ls.CosineAnnealingWarmRestarts(o, first, factor, floor))
        golden[f"{name}.period"] = np.array([restart_of(s, first, factor)[1] for s in range(STEPS)], dtype=np.int64)
    assert golden["torch.restarts_10_3_0.0"][1210] == 1.0
    case("restarts_decay", warm_restarts(50, 2, 0.01, 0.5, 5, 0.001))
    case("restarts_equal", warm_restarts(100, 1, 0.1, 0.7, 10, 0.1))


def make_warmups():
    case("warmup_linear", polynomial(1000, warmup=100), steps=1010)
    case("warmup_linear_floor", polynomial(1000, floor=0.03, warmup=100, start=0.01), steps=1010)
    case("warmup_polynomial", polynomial(1000, 2.0, 1e-7 / 1e-3, 100), steps=1010)
    case("warmup_cosine", cosine(1000, warmup=100), steps=1010)
    case("warmup_cosine_floor", cosine(2000, 0.03, 200, 0.01), steps=2010)
    case("warmup_cosine_absolute", cosine(1000, 1e-6 / 2e-4, 100), steps=1010)
    case("warmup_only", cosine(100, 0.0, 100), steps=110)
    case("warmup_inverse_sqrt", inverse_sqrt(100, 100))
    case("warmup_inverse_sqrt_none", inverse_sqrt(0, 10000))
    case("noam", noam(400, 512))
    case("noam_paper", noam(4000, 512))
    for slope in SLOPES:
        case(f"stable_{slope}", stable_decay(1000, 100, 200, slope), steps=1010)
    case("stable_floor", stable_decay(500, 50, 450, "cos", 0.1), steps=510)
    case("stable_no_warmup", stable_decay(500, 0, 1, "sqrt", 0.1), steps=510)


def make_one_cycle():
    def cycle(name, total, pct=0.3, levels=(1.0, 25.0, 1e4), slope="cos", three=False, momenta=(0.85, 0.95)):
        level, momentum = one_cycle(total, levels, pct, (slope,) * 3, three, momenta)
        case(name, level, lambda o: ls.OneCycleLR(
            o, max_lr=levels[0], total_steps=total, pct_start=pct, anneal_strategy=slope, three_phase=three,
            div_factor=levels[1], final_div_factor=levels[2], base_momentum=momenta[0], max_momentum=momenta[1]),
            torch_steps=total, momentum=momentum, steps=total + 10)      # PyTorch's rises again after its end
    cycle("one_cycle", 1000)
    cycle("one_cycle_linear", 1000, slope="linear")
    cycle("one_cycle_three", 1000, three=True)
    cycle("one_cycle_three_linear", 777, slope="linear", three=True, levels=(3.0, 10.0, 100.0))
    cycle("one_cycle_fraction", 97, pct=0.45, levels=(1.0, 20.0, 200.0), momenta=(0.8, 0.9))
    cycle("one_cycle_short", 5)
    cycle("one_cycle_nirdot", 2000, pct=0.2)
    level, momentum = one_cycle(1000, slopes=("linear", "cos", "linear"), pct=0.45)
    case("one_cycle_mixed", level, momentum=momentum, steps=1010)


def make_cyclic():
    modes = (("triangular", 1.0, 1.0, 1.0), ("triangular2", 0.5, 1.0, 1.0), ("exp_range", 1.0, 0.999, 0.999))
    for mode, decay, gamma, torch_gamma in modes:
        for up, last, low in ((200, 200, 0.1), (30, 70, 0.25)):
            level, momentum = cyclic(up, last, low, 1.0, decay, gamma)
            case(f"{mode}_{up}", level, lambda o: ls.CyclicLR(o, low, 1.0, up, last, mode, torch_gamma), momentum=momentum,
                 lr=low)


def make_combinations():
    def warm_cosine(o):
        return ls.SequentialLR(o, [ls.LinearLR(o, 0.1, 1.0, 100), ls.CosineAnnealingLR(o, 900, 0.0)], [100])
    case("sequence", sequence([anneal(100, 0.1, 1.0), cosine(900)], [100]), warm_cosine, torch_steps=1001, steps=1010)

    def three(o):
        return ls.SequentialLR(o, [ls.ConstantLR(o, 0.1, 20), ls.ExponentialLR(o, 0.9),
                                   ls.CosineAnnealingWarmRestarts(o, 10, 3)], [20, 60])
    case("sequence_three", sequence([lambda s: M(0.1) if s < 20 else 1, lambda s: M(0.9) ** s, warm_restarts(10, 3)], [20, 60]),
         three)
    golden["sequence_three.period"] = np.array([STEPS if s < 60 else restart_of(s - 60, 10, 3)[1] for s in range(STEPS)],
                                               dtype=np.int64)

    def steps(o):
        return ls.SequentialLR(o, [ls.StepLR(o, 7, 0.5), ls.MultiStepLR(o, [5, 9], 0.1), ls.PolynomialLR(o, 50, 2.0)], [30, 50])
    case("sequence_steps", sequence([lambda s: M(0.5) ** (s // 7), step_drop([5, 9], 0.1), polynomial(50, 2.0)], [30, 50]), steps,
         steps=200)

    def chained(o):
        return ls.ChainedScheduler([ls.ConstantLR(o, 0.1, 20), ls.ExponentialLR(o, 0.99)])
    case("product", product(lambda s: M(0.1) if s < 20 else 1, lambda s: M(0.99) ** s), chained)

    def chained_three(o):
        return ls.ChainedScheduler([ls.LinearLR(o, 0.1, 1.0, 50), ls.StepLR(o, 100, 0.5), ls.MultiStepLR(o, [300, 301], 0.1)])
    case("product_three", product(anneal(50, 0.1, 1.0), lambda s: M(0.5) ** (s // 100), step_drop([300, 301], 0.1)),
         chained_three)
    case("nested", product(sequence([anneal(10, 0.0, 1.0), product(cosine(500, 0.1), warm_restarts(20, 2))], [10]),
                           step_drop([100], 0.5)), steps=600)
    level, momentum = one_cycle(400)
    triangles, its_momentum = cyclic(30, 70, 0.25)
    case("sequence_momentum", sequence([level, triangles], [400]), momentum=sequence([momentum, its_momentum], [400]), steps=1000)


# ---- plateau -----------------------------------------------------------------------------------------------------------

def right_plateau(metrics, mode="min", factor=0.1, patience=10, threshold=1e-4, threshold_mode="rel", cooldown=0, min_lr=0.0,
                  eps=1e-8):
    """The rule in words: better means below the best by more than the threshold, or than that part of |best|; the first
    metric is better, unless it is NaN or infinitely bad."""
    lr, best, bad, wait, rates = 1.0, None, 0, 0, []
    for metric in metrics:
        value = -metric if mode == "max" else metric
        margin = 0 if best is None else threshold * (abs(best) if threshold_mode == "rel" else 1)
        if value < math.inf and (best is None or best - value > margin):
            best, bad = value, 0
        else:
            bad += 1
        if wait > 0:
            wait, bad = wait - 1, 0
        if bad > patience:
            lower = max(lr * factor, min_lr)
            lr = lower if lr - lower > eps else lr
            wait, bad = cooldown, 0
        rates.append(lr)
    return np.array(rates)


def make_plateau():
    random = np.random.default_rng(7)
    noisy = 1 / np.sqrt(np.arange(1, 1001)) + 0.2 + 0.05 * random.standard_normal(1000)
    with_nan = np.where(random.random(1000) < 0.1, np.nan, noisy)
    constant = np.ones(60)
    flat = np.concatenate([np.linspace(1, 0.1, 30), np.full(200, 0.1)])
    cases = {
        "constant": (constant, dict(patience=2)),
        "patience_0": (constant, dict(patience=0, factor=0.5)),
        "defaults": (noisy, dict()),
        "maximize": (noisy[::-1].copy(), dict(mode="max", patience=5, factor=0.7)),
        "maximize_abs": (1 - noisy, dict(mode="max", patience=3, factor=0.9, threshold=0.01, threshold_mode="abs")),
        "absolute": (noisy, dict(patience=4, factor=0.5, threshold=0.02, threshold_mode="abs")),
        "absolute_negative": (-noisy[::-1].copy(), dict(patience=4, factor=0.5, threshold=0.02, threshold_mode="abs")),
        "cooldown": (flat, dict(patience=3, cooldown=5, factor=0.5)),
        "cooldown_long": (noisy, dict(patience=1, cooldown=17, factor=0.8, threshold=0.05)),
        "floor": (flat, dict(patience=2, factor=0.3, min_lr=0.02)),
        "eps": (flat, dict(patience=1, factor=0.5, eps=0.01)),
        "nan": (with_nan, dict(patience=4, factor=0.6)),
        "nan_first": (np.concatenate([[np.nan] * 8, noisy[:200]]), dict(patience=4, factor=0.6)),
        "all_nan": (np.full(30, np.nan), dict(patience=3, factor=0.5)),
        "infinite": (np.array([np.inf] * 4 + [3.0, 2.0, np.inf, -np.inf, 1.0, 1.0, 1.0, 1.0]), dict(patience=1, factor=0.5)),
        "negative": (np.array([-1.0, -0.95, -0.9] + [-0.9] * 20), dict(patience=3, threshold=0.1, factor=0.5)),
        "negative_better": (-np.linspace(1, 30, 200), dict(patience=2, threshold=0.01, factor=0.5)),
        "negative_max": (np.array([-1.0, -1.05, -1.09] + [-1.2] * 20), dict(mode="max", patience=3, threshold=0.1, factor=0.5)),
    }
    differ = []
    for name, (metrics, settings) in cases.items():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        scheduler = ls.ReduceLROnPlateau(optimizer, **settings)
        rates = []
        for metric in metrics:
            scheduler.step(metric)
            rates.append(optimizer.param_groups[0]["lr"])
        right = right_plateau(metrics, **settings)
        golden[f"plateau.{name}.metrics"] = metrics
        golden[f"plateau.{name}.right"] = right
        if np.array_equal(right, rates):
            golden[f"plateau.{name}.torch"] = np.array(rates)
        else:
            differ.append(name)
    assert differ == ["negative", "negative_max"], differ
    return list(cases)


# ---- Hugging Face --------------------------------------------------------------------------------------------------------

def check_transformers():
    try:
        from transformers import optimization as hf
    except ImportError:
        print("transformers is not installed: its schedules are not compared", file=sys.stderr)
        return
    wsd = dict(num_warmup_steps=100, num_decay_steps=200, num_training_steps=1000, min_lr_ratio=0.0)
    pairs = {
        "warmup_linear": lambda o: hf.get_linear_schedule_with_warmup(o, 100, 1000),
        "warmup_cosine": lambda o: hf.get_cosine_schedule_with_warmup(o, 100, 1000),
        "warmup_cosine_absolute": lambda o: hf.get_cosine_with_min_lr_schedule_with_warmup(o, 100, 1000, min_lr_rate=1e-6 / 2e-4),
        "warmup_polynomial": lambda o: hf.get_polynomial_decay_schedule_with_warmup(o, 100, 1000, lr_end=1e-7 / 1e-3, power=2.0),
        "warmup_inverse_sqrt": lambda o: hf.get_inverse_sqrt_schedule(o, 100),
        "warmup_inverse_sqrt_none": lambda o: hf.get_inverse_sqrt_schedule(o, 0),
        "stable_linear": lambda o: hf.get_wsd_schedule(o, decay_type="linear", **wsd),
        "stable_cos": lambda o: hf.get_wsd_schedule(o, decay_type="cosine", **wsd),
        "stable_sqrt": lambda o: hf.get_wsd_schedule(o, decay_type="1-sqrt", **wsd),
    }
    for name, make in pairs.items():
        values, _ = by_torch(make, 1001, 1.0)
        difference = np.abs(values - golden[f"exact.{name}"][:1001]).max()
        assert difference < 1e-12, (name, difference)
        print(f"transformers: {name} {difference:.1e}")


def main():
    for make in (make_simple, make_restarts, make_warmups, make_one_cycle, make_cyclic, make_combinations):
        make()
    plateaus = make_plateau()
    check_transformers()
    golden["far"] = np.array(FAR, dtype=np.int64)
    path = pathlib.Path(__file__).parent / "schedules.safetensors"
    save_file(golden, path, metadata={"cases": " ".join(names), "plateaus": " ".join(plateaus), "torch": torch.__version__})
    print(f"{len(names)} cases, {len(worst)} rows by PyTorch, {len(plateaus)} plateaus; PyTorch's sums are off by up to "
          f"{max(worst.values()):.1e}: {json.dumps({k: f'{v:.0e}' for k, v in sorted(worst.items(), key=lambda x: -x[1])[:6]})}")


main()
