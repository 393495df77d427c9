#!/usr/bin/env python3
"""Golden numbers of the operations and losses, from PyTorch in float64.

Writes ops_*.safetensors beside this file; tests/test_ops.c runs whatever they hold. A case NAME consists of

    NAME/in0, in1, ...   the arguments, in the library's layout (a slot left out: NULL); exact in float32
    NAME/out             the result
    NAME/gout            the upstream gradient g: the loss is sum(out * g)
    NAME/grad0, ...      the gradients of the arguments that have one
    NAME/after3, ...     what an argument holds after the step (running statistics)

and of the metadata entry NAME: "op=conv stride=2,2 act=relu ...". Besides an op's own parameters:

    shared=0,2   these arguments are inputs of the step (shared by all lanes, without gradient)
    same=1       the second argument is the first one again
    mode=eval    an evaluation: forward only
    fd=0         no finite differences: the case sits on a kink, or at values where they mean nothing

Layouts: images [N, spatial..., C]; convolution weights [kernel..., Cin/groups, Cout]; transposed convolution
weights [kernel..., Cout/groups, Cin]; linear weights [in, out].

usage: python tests/golden/make_ops.py
"""
import itertools
import json
import math
import os
import struct
import zlib

import numpy as np
import torch
import torch.nn.functional as F

torch.set_num_threads(1)
FOLDER = os.path.dirname(os.path.abspath(__file__))
SIZE_LIMIT = 1500000
F32_LIMIT = 3e-6    # a case that PyTorch itself computes worse than this in float32 is badly conditioned
CODES = {"float64": "F64", "float32": "F32", "int64": "I64"}


def narrowed(a):
    """In float32 where that loses nothing."""
    return a.astype("float32") if a.dtype == np.float64 and np.array_equal(a, a.astype("float32")) else a


def write_safetensors(path, arrays, metadata):
    """As the reference writer does, wide types first; byte for byte the same each time."""
    arrays = {name: narrowed(a) for name, a in arrays.items()}
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    header, begin = {"__metadata__": metadata}, 0
    for name in order:
        a = arrays[name]
        header[name] = {"dtype": CODES[str(a.dtype)], "shape": list(a.shape),
                        "data_offsets": [begin, begin + a.nbytes]}
        begin += a.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            f.write(arrays[name].tobytes())


def text_of(value):
    if isinstance(value, (tuple, list)):
        return ",".join(text_of(v) for v in value)
    return str(int(value)) if isinstance(value, bool) else str(value)


def relative_error(a, b):
    return float((a - b).abs().max() / max(1e-30, float(b.abs().max()))) if b.numel() else 0.0


class Family:
    """Cases numbered NAME_000, NAME_001, ... in the file ops_FILE.safetensors. Coarse: upstream gradients of few bits."""
    all = []

    def __init__(self, name, file=None, coarse=False):
        self.name, self.file, self.coarse = name, file or name, coarse
        self.arrays, self.metadata, self.errors, self.attempt = {}, {}, [], 0
        Family.all.append(self)

    def rng(self, purpose="inputs"):
        """The random numbers of the next case: they depend on its name and on how often it was drawn."""
        seed = zlib.crc32(("%s %s %d" % (self.next_name(), purpose, self.attempt)).encode())
        return np.random.RandomState(seed & 0x7fffffff)

    def next_name(self):
        return "%s_%03d" % (self.name, len(self.metadata))

    def add(self, op, fn, inputs, shared=(), updated=(), redraw=False, **params):
        """fn: torch tensors in the library's layout -> result in the library's layout. With redraw, numbers that
        float32 cannot do justice to are refused: False, and rng() gives others."""
        name = self.next_name()
        wide = [None if a is None else np.array(a, dtype="int64" if np.asarray(a).dtype.kind in "iu" else "float64")
                for a in inputs]
        for a in wide:
            assert a is None or a.dtype == np.int64 or np.array_equal(a, a.astype("float32")), name
        training = params.get("mode") != "eval"
        grads = [i for i, a in enumerate(wide) if a is not None and a.dtype == np.float64
                 and i not in shared and i not in updated and training]
        gout = None
        results = {}
        for dtype in (torch.float64, torch.float32):
            t = [None if a is None else torch.tensor(a, dtype=torch.int64 if a.dtype == np.int64 else dtype)
                 for a in wide]
            for i in grads:
                t[i].requires_grad_(True)
            out = fn(*t)
            if gout is None:
                draw = coarse if self.coarse else uniform
                gout = draw(self.rng("gout"), tuple(out.shape))
            result = {"out": out.detach()}
            if grads:
                (out * torch.tensor(gout, dtype=dtype)).sum().backward()
            for i in grads:
                result["grad%d" % i] = t[i].grad
            for i in updated:
                result["after%d" % i] = t[i].detach()
            results[dtype] = result
        exact, rounded = results[torch.float64], results[torch.float32]
        worst = max(relative_error(rounded[k].double(), exact[k]) for k in exact)
        assert all(bool(torch.isfinite(v).all()) for v in exact.values()), name
        if worst > F32_LIMIT and redraw:
            self.attempt += 1
            return False
        if worst > F32_LIMIT:
            print("%s %s %s: float32 is off by %.1e" % (name, op, params, worst))
        self.attempt = 0
        self.errors.append(worst)

        entry = ["op=" + op] + ["%s=%s" % (k, text_of(v)) for k, v in params.items()]
        if shared:
            entry.append("shared=" + text_of(shared))
        self.metadata[name] = " ".join(entry)
        for i, a in enumerate(wide):
            if a is not None:
                self.arrays["%s/in%d" % (name, i)] = a
        if training:
            self.arrays[name + "/gout"] = gout
        for key, value in exact.items():
            self.arrays["%s/%s" % (name, key)] = np.array(value.numpy(), dtype="float64", order="C")
        return True


def write_file(file, families):
    path = os.path.join(FOLDER, "ops_%s.safetensors" % file)
    arrays, metadata = {}, {}
    for family in families:
        arrays.update(family.arrays)
        metadata.update(family.metadata)
    write_safetensors(path, arrays, metadata)
    size = os.path.getsize(path)
    print("%-20s %4d cases %8d bytes   PyTorch in float32: %.1e" %
          (file, len(metadata), size, max(max(family.errors) for family in families)))
    assert size < SIZE_LIMIT, path


# ---- inputs ---------------------------------------------------------------------------------------------------------

def quantised(a):
    return np.asarray(np.asarray(a, dtype="float32"), dtype="float64")


def uniform(rng, shape, low=-1.5, high=1.5):
    return quantised(rng.uniform(low, high, shape))


def grid(rng, shape, step, low, high, odd=False):
    """Multiples of step in [low, high]; odd: odd ones, which are never 0 and never a multiple of 2 step."""
    k = rng.randint(math.ceil(low / step / 2), math.floor(high / step / 2) + 1, shape)
    return np.asarray((2 * k + 1 if odd else 2 * k) * step, dtype="float64")


def coarse(rng, shape):
    """Products and sums of these are exact in float32, and so half as long in the file."""
    return grid(rng, shape, 1 / 16, -1.5, 1.5)


def distinct(rng, shape):
    """Values from -2 to 2 that are all different, at equal distances that float32 holds exactly."""
    n = int(np.prod(shape))
    return ((rng.permutation(n) - n // 2) * 2.0 ** (2 - math.ceil(math.log2(max(n, 2))))).reshape(shape)


# ---- elementwise ----------------------------------------------------------------------------------------------------

BINARY = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div,
          "maximum": torch.maximum, "minimum": torch.minimum}
BROADCASTS = [((), ()), ((), (3,)), ((5,), ()), ((1,), (1,)), ((7,), (7,)), ((16,), (16,)), ((17,), (17,)),
              ((33,), (33,)), ((200,), (200,)), ((33,), (1,)), ((16,), ()), ((), (17,)), ((3, 1, 5), (4, 1)),
              ((2, 3), (3,)), ((3,), (2, 3)), ((2, 3), (2, 1)), ((4, 1), (1, 4)), ((2, 3, 4, 5), (5,)),
              ((2, 3, 4, 5), (4, 1)), ((2, 1, 4, 1), (3, 1, 5)), ((9, 17), (17,)), ((9, 17), (9, 1)),
              ((1, 17), (9, 17)), ((1, 1, 1), (2,)), ((0, 3), (3,)), ((0,), (1,)), ((2, 0, 3), (3,)), ((0,), ()),
              ((1, 2, 1, 2, 1, 2, 1, 2), (2, 1, 2, 1, 2, 1, 2, 1)), ((2, 3, 1), (2, 3, 4)),
              ((5, 1, 16), (1, 3, 16)), ((2, 2, 17), (2, 1, 17))]


def make_elementwise():
    for op, f in BINARY.items():
        family = Family(op, "elementwise")
        for sa, sb in BROADCASTS:
            rng = family.rng()
            a, b = grid(rng, sa, 1 / 64, -2, 2, odd=True), grid(rng, sb, 1 / 64, -2, 2)
            if op == "div":
                b = np.sign(rng.uniform(-1, 1, sb)) * grid(rng, sb, 1 / 64, 0.5, 2)
            family.add(op, f, [a, b])
        for shared in ((0,), (1,)):
            rng = family.rng()
            family.add(op, f, [grid(rng, (4, 9), 1 / 64, -2, 2, odd=True), grid(rng, (9,), 1 / 64, 0.5, 2)],
                       shared=shared)
        if op != "div":     # x / x: the gradient is 0, and rounding is all that is left of it
            x = grid(family.rng(), (3, 6), 1 / 64, 0.5, 2)
            family.add(op, lambda a, f=f: f(a, a), [x], same=1, fd=int(op not in ("maximum", "minimum")))
        if op in ("maximum", "minimum"):
            family.add(op, f, [[1.0, 2.0, -3.0, 0.0], [1.0, 1.0, -3.0, 0.0]], fd=0)


UNARY_SHAPES = [(), (1,), (7,), (16,), (17,), (33,), (2, 3, 5), (0, 3), (130,)]


def unary_table():
    """op, parameters, function, range of the inputs, extreme inputs"""
    gelu_tanh = lambda x: F.gelu(x, approximate="tanh")
    wide = [-1e4, -200.0, -100.0, -30.0, -10.0, -6.0, -1.0, -0.25, 0.0, 0.25, 1.0, 6.0, 10.0, 30.0, 100.0, 200.0, 1e4]
    flat = [-87.0, -50.0, -20.0, 0.0, 5.0]
    yield "neg", {}, torch.neg, -2, 2, wide
    yield "abs", {}, torch.abs, -2, 2, wide
    yield "exp", {}, torch.exp, -2, 2, flat
    yield "exp", {}, torch.exp, -2, 2, [80.0, 50.0, 10.0]
    yield "log", {}, torch.log, 0.25, 3, [1e-30, 1e-10, 1.0, 1e10, 1e30]
    yield "sqrt", {}, torch.sqrt, 0.25, 3, [1e-10, 1.0, 1e10]
    yield "square", {}, torch.square, -2, 2, wide
    yield "relu", {}, torch.relu, -2, 2, wide
    yield "gelu", {}, F.gelu, -4, 4, wide
    yield "gelu_tanh", {}, gelu_tanh, -4, 4, wide
    yield "silu", {}, F.silu, -4, 4, wide
    yield "sigmoid", {}, torch.sigmoid, -4, 4, wide
    yield "tanh", {}, torch.tanh, -3, 3, wide
    yield "tanh", {}, torch.tanh, -0.01, 0.01, [1e-6, 1e-5, 1e-4, 1e-3, -1e-5]
    for c in (0.0, 1.5, -2.0):
        yield "add_scalar", {"c": c}, lambda x, c=c: x + c, -2, 2, wide
        yield "mul_scalar", {"c": c}, lambda x, c=c: x * c, -2, 2, wide
    for c, low in ((2.0, -2), (3.0, -2), (0.5, 0.25), (-1.0, 0.25), (-0.5, 0.25), (1.7, 0.25), (1.0, -2), (0.0, -2)):
        yield "pow_scalar", {"c": c}, lambda x, c=c: torch.pow(x, c), low, 2, \
            [-3.0, 0.0, 0.5, 100.0] if c in (2.0, 3.0, 1.0, 0.0) else [1e-4, 1.0, 1e4]
    for slope in (0.01, 0.25, 0.0):
        yield "leaky_relu", {"slope": slope}, lambda x, s=slope: F.leaky_relu(x, s), -2, 2, wide
    for beta, threshold in ((1.0, 20.0), (2.0, 20.0), (0.5, 5.0), (10.0, 1.0)):
        yield "softplus", {"beta": beta, "threshold": threshold}, \
            lambda x, b=beta, t=threshold: F.softplus(x, b, t), -3, 3, \
            wide + [19.5, 20.0, 20.5, 9.75, 10.0, 10.25, -40.0]


def make_unary():
    families = {}
    for op, params, f, low, high, extreme in unary_table():
        family = families[op] = families.get(op) or Family(op, "unary")
        for shape in UNARY_SHAPES:
            step = 1 / 64 if high > 1 else 1 / 4096
            while not family.add(op, f, [grid(family.rng(), shape, step, low, high, odd=True)], redraw=True, **params):
                pass
        family.add(op, f, [quantised(extreme)], fd=0, **params)


# ---- reductions -----------------------------------------------------------------------------------------------------

REDUCTIONS = {"sum": lambda x, d, k: x.sum(d, keepdim=k), "mean": lambda x, d, k: x.mean(d, keepdim=k),
              "max": lambda x, d, k: x.amax(d, keepdim=k), "min": lambda x, d, k: x.amin(d, keepdim=k)}
AXES = [((), "all"), ((7,), (0,)), ((1,), (0,)), ((65,), "all"), ((3, 4), (0,)), ((3, 4), (1,)), ((3, 4), "all"),
        ((1, 5), (0,)), ((5, 1), (1,)), ((5, 1), (0,)), ((2, 3, 4), (0,)), ((2, 3, 4), (1,)), ((2, 3, 4), (2,)),
        ((2, 3, 4), (0, 1)), ((2, 3, 4), (0, 2)), ((2, 3, 4), (1, 2)), ((2, 3, 4), (0, 1, 2)),
        ((2, 3, 4, 5), (1, 2)), ((2, 3, 4, 5), (0, 3)), ((2, 3, 4, 5), (0, 2)), ((2, 3, 4, 5), (1, 3)),
        ((2, 3, 4, 5), (0, 1, 3)), ((33, 17), (0,)), ((33, 17), (1,)), ((16, 16), (0,)), ((3, 33), (1,)),
        ((2, 1, 2, 1, 2, 2, 1, 2), (0, 3, 5, 6)), ((300,), "all"), ((0, 3), (1,)), ((3, 0), (0,))]


def make_reductions():
    for op, f in REDUCTIONS.items():
        family = Family(op, "reductions")
        shapes = AXES + ([((0, 3), (0,)), ((3, 0), "all"), ((0,), "all"), ((2, 0, 3), (1,))] if op == "sum" else [])
        for (shape, axes), keep in itertools.product(shapes, (False, True)):
            dims = tuple(range(len(shape))) if axes == "all" else axes
            fn = (lambda x, d=dims, k=keep: f(x, d, k)) if shape else (lambda x: x * 1.0)
            family.add(op, fn, [distinct(family.rng(), shape)], axes=axes, keep=keep)
        if op in ("max", "min"):
            x = [[1.0, 3.0, 3.0, -2.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -1.0, -7.0, -7.0]]
            for dims in ((0,), (1,), (0, 1)):
                family.add(op, lambda x, d=dims: f(x, d, False), [x], axes=dims, keep=False, fd=0)


# ---- products -------------------------------------------------------------------------------------------------------

ACTIVATIONS = {"none": lambda x: x, "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def make_matmul():
    family = Family("matmul")
    sizes = [(1, 1, 1), (5, 7, 3), (6, 16, 9), (33, 17, 65), (17, 1, 33), (1, 33, 1), (1, 5, 17), (16, 16, 16),
             (7, 130, 2), (2, 3, 1), (13, 8, 31), (4, 300, 5), (0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0), (12, 64, 48)]
    for m, k, n in sizes:
        rng = family.rng()
        family.add("matmul", torch.matmul, [uniform(rng, (m, k)), uniform(rng, (k, n)) / 4])
    for lead, (m, k, n) in itertools.product(((2,), (1,), (2, 3), (0,), (2, 1, 2)), ((5, 7, 3), (1, 1, 1), (6, 16, 9))):
        for b_lead in (lead, ()):
            rng = family.rng()
            family.add("matmul", torch.matmul, [uniform(rng, lead + (m, k)), uniform(rng, b_lead + (k, n))])
    for shared in ((0,), (1,)):
        rng = family.rng()
        family.add("matmul", torch.matmul, [uniform(rng, (9, 7)), uniform(rng, (7, 5))], shared=shared)
        rng = family.rng()
        family.add("matmul", torch.matmul, [uniform(rng, (3, 4, 7)), uniform(rng, (3, 7, 5))], shared=shared)
    family.add("matmul", lambda a: a @ a, [uniform(family.rng(), (6, 6))], same=1)
    family.add("matmul", lambda a: a @ a, [uniform(family.rng(), (2, 5, 5))], same=1)
    family = Family("matmul_large")
    rng = family.rng()
    family.add("matmul", torch.matmul, [uniform(rng, (128, 70)), uniform(rng, (70, 300)) / 4])


def fitting(rng, fn, shapes, fan_in, act):
    """Random arguments x, w and perhaps b. A ReLU's are such that nothing comes near its kink."""
    scale = 1.7 / math.sqrt(max(1, fan_in))
    while True:
        if act != "relu":
            return [uniform(rng, shapes[0]), quantised(uniform(rng, shapes[1]) * scale)] + \
                [uniform(rng, s) for s in shapes[2:]]
        # With a bias of odd multiples of 1/128, sums of multiples of 1/64 are at least 1/128 from 0.
        args = [grid(rng, shapes[0], 1 / 16, -1, 1), grid(rng, shapes[1], 1 / 16, -1, 1)] + \
            [grid(rng, s, 1 / 128, -1, 1, odd=True) for s in shapes[2:]]
        if len(shapes) == 2:
            args = [uniform(rng, s) for s in shapes]
        before = fn(*[torch.tensor(a, dtype=torch.float64) for a in args])
        if bool(((before.abs() > 1e-3) | (before == 0)).all()):     # 0: an output that no input reaches
            return args


def make_linear():
    family = Family("linear")

    def add(lead, n_in, n_out, act, bias, shared=()):
        fn = lambda x, w, b=None: F.linear(x, w.T, b)
        shapes = [lead + (n_in,), (n_in, n_out)] + ([(n_out,)] if bias else [])
        while not family.add("linear", lambda *t: ACTIVATIONS[act](fn(*t)), fitting(family.rng(), fn, shapes, n_in, act),
                             shared=shared, redraw=True, act=act):
            pass

    for act, bias in itertools.product(ACTIVATIONS, (True, False)):
        for lead, n_in, n_out in (((3,), 5, 7), ((1,), 1, 1), ((6,), 16, 9), ((2, 3), 4, 5), ((), 6, 4), ((0,), 3, 2),
                                  ((17,), 3, 17), ((2, 1, 3), 7, 16)):
            add(lead, n_in, n_out, act, bias)
        add((5,), 8, 6, act, bias, shared=(0,))
    for act in ACTIVATIONS:
        add((33,), 17, 65, act, True)
    add((13,), 300, 20, "none", True)
    add((4,), 20, 300, "none", True)
    add((2, 0), 4, 3, "relu", True)
    add((5,), 8, 6, "none", True, shared=(1,))
    add((5,), 8, 6, "none", True, shared=(2,))
    add((5,), 8, 6, "none", True, shared=(0, 1))


# ---- convolution ----------------------------------------------------------------------------------------------------

CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def spread(value, dims):
    return (value,) * dims if isinstance(value, int) else tuple(value)


def out_sizes(transpose, size, k, s, p, d, op):
    if transpose:
        return [(i - 1) * s_ - 2 * p_ + d_ * (k_ - 1) + o_ + 1 for i, k_, s_, p_, d_, o_ in zip(size, k, s, p, d, op)]
    return [(i + 2 * p_ - d_ * (k_ - 1) - 1) // s_ + 1 if i + 2 * p_ >= d_ * (k_ - 1) + 1 else 0
            for i, k_, s_, p_, d_ in zip(size, k, s, p, d)]


def add_conv(family, transpose, n, size, cin, cout, kernel, stride=1, padding=0, dilation=1, groups=1,
             output_padding=0, act="none", bias=True, shared=()):
    """False where the output would be empty."""
    dims = len(size)
    k, s, p, d, o = (spread(v, dims) for v in (kernel, stride, padding, dilation, output_padding))
    if min(out_sizes(transpose, size, k, s, p, d, o)) < 1 or any(o_ and o_ >= max(s_, d_) for o_, s_, d_ in zip(o, s, d)):
        return False

    def fn(x, w, b=None):
        x = x.movedim(-1, 1).contiguous()
        w = w.permute(dims + 1, dims, *range(dims)).contiguous()
        y = CONV_TRANSPOSE[dims](x, w, b, s, p, o, groups, d) if transpose else CONV[dims](x, w, b, s, p, d, groups)
        return y.movedim(1, -1)

    shapes = [(n,) + tuple(size) + (cin,), k + ((cout // groups, cin) if transpose else (cin // groups, cout))]
    shapes += [(cout,)] if bias else []
    fan_in = int(np.prod(k)) * cin // groups
    params = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    if transpose:
        params["output_padding"] = output_padding
    params = {key: v for key, v in params.items() if v != (1 if key in ("stride", "dilation", "groups") else 0)}
    while not family.add("conv_transpose" if transpose else "conv", lambda *t: ACTIVATIONS[act](fn(*t)),
                         fitting(family.rng(), fn, shapes, fan_in, act), shared=shared, redraw=True, act=act, **params):
        pass
    return True


ODD_ACTS = itertools.cycle(["none", "tanh", "none", "relu", "none", "sigmoid"])


def make_conv2d(transpose):
    base = "conv_transpose2d" if transpose else "conv2d"
    kernels, strides = (1, 2, 3, 5, (3, 5)), (1, 2, 3, (2, 1))
    add = lambda *a, **b: add_conv(family, transpose, *a, **b)

    family = Family(base)                       # geometry
    small = (4, 3) if transpose else (7, 6)
    for i, (k, s, p) in enumerate(itertools.product(kernels, strides, (0, 1, 2, (0, 2)))):
        add(1 + i % 2, small, 2, 3, k, s, p, act=next(ODD_ACTS), bias=i % 3 != 0)
    for k, s, d, p in itertools.product((2, 3, (3, 5)), (1, 2, (1, 3)), (2, 3, (1, 2)), (0, 2)):
        add(1, (4, 3) if transpose else (8, 9), 1, 2, k, s, p, d)
    for k, s in ((1, 2), (1, 3), (2, 3), ((1, 2), (3, 4)), (2, 5)):              # strides beyond the kernel
        for p in (0, 1):
            add(1, (5, 6), 2, 2, k, s, p)

    family = Family(base + "_output_padding" if transpose else base + "_sizes")
    if transpose:
        for k, s, p, d in itertools.product((1, 2, 3, (3, 5)), (2, 3, (2, 1)), (0, 1, 2), (1, 2)):
            for o in (1, 2, (1, 0), (0, 1)):
                if (k, p, d) in ((3, 1, 1), (3, 1, 2)) or o in (1, (1, 0)) and d == 1:
                    add(1, (4, 3), 2, 2, k, s, p, d, 1, o, act=next(ODD_ACTS))
        add(2, (3, 4), 4, 4, 3, 2, 1, 1, 2, 1)
        add(0, (3, 4), 2, 3, 3, 2, 1, 1, 1, 1)
    for size, k, s in itertools.product(((1, 1), (2, 2), (3, 4), (5, 5), (8, 8), (13, 1), (1, 9), (2, 11)), (1, 3), (1, 2)):
        add(1, size, 2, 2, k, s, k // 2)
    for n, act, bias in itertools.product((0, 1, 3), ACTIVATIONS, (True, False)):
        add(n, (4, 5), 2, 3, 3, 2, 1, act=act, bias=bias)
        add(n, (3, 3), 3, 2, 2, 1, 0, act=act, bias=bias)
    for shared in ((0,), (1,), (2,), (0, 2), (0, 1)):
        add(2, (5, 4), 3, 4, 3, 2, 1, shared=shared)
        add(2, (5, 4), 3, 4, 3, 1, 1, act="tanh", shared=shared)
    add(3, (7, 9), 3, 2, 3, 2, 1, act="relu")

    family = Family(base + "_channels")
    pairs = ((1, 1), (1, 2), (2, 1), (3, 5), (5, 3), (1, 16), (16, 1), (16, 17), (17, 16), (1, 32), (32, 1), (3, 32),
             (32, 3), (64, 2), (2, 64))
    for (cin, cout), (k, s) in itertools.product(pairs, ((1, 1), (3, 1), (3, 2))):
        add(1, (2, 3) if transpose else (3, 4) if s == 1 else (5, 4), cin, cout, k, s, k // 2, act=next(ODD_ACTS))
    add(1, (4, 3), 32, 64, 1, 1, 0)
    add(1, (4, 3), 32, 32, 2, 2, 0, act="relu")
    for cin, cout, groups in ((2, 2, 2), (4, 6, 2), (6, 4, 2), (3, 3, 3), (3, 6, 3), (6, 3, 3), (16, 16, 16),
                              (17, 17, 17), (32, 32, 32), (16, 32, 2), (32, 16, 2), (32, 64, 32), (5, 5, 5), (64, 64, 64)):
        for k, s, d in ((3, 1, 1), (3, 2, 1), (3, 1, 2), (2, 2, 1)):
            if cin * cout // groups < 300 or k == 2:
                size = (2, 3) if transpose else (4, 5) if cin < 32 else (3, 4)
                add(1, size, cin, cout, k, s, 1, d, groups, act=next(ODD_ACTS))
    add(0, (4, 5), 4, 4, 3, 1, 1, 1, 4)
    add(0, (4, 5), 16, 32, 1, 1, 0)
    for shared in ((0,), (1,)):
        add(2, (4, 5), 6, 6, 3, 2, 1, 1, 6, shared=shared)
        add(2, (4, 5), 4, 6, 3, 2, 1, 1, 2, shared=shared)


def make_conv_other(transpose, dims):
    family = Family("conv%s%dd" % ("_transpose" if transpose else "", dims))
    add = lambda *a, **b: add_conv(family, transpose, *a, **b)
    size = {1: (9,), 3: (3, 4, 3)}[dims] if not transpose else {1: (5,), 3: (2, 3, 2)}[dims]
    each = [(1, 2, 3)[:dims], (3, 1, 2)[:dims]]
    kernels = (1, 2, 3, 5) if dims == 1 else (1, 2, 3, (3, 1, 2))
    strides = (1, 2, 3) if dims == 1 else (1, 2, (2, 1, 3))
    for i, (k, s, p) in enumerate(itertools.product(kernels, strides, (0, 1, 2))):
        if dims == 1 or (i + p) % 2 == 0:
            add(1 + i % 2 if dims == 1 else 1, size, 2, 2, k, s, p, act=next(ODD_ACTS), bias=i % 3 != 0)
    for k, s, d in itertools.product((2, 3), (1, 2), (2, 3) if dims == 1 else (2, (1, 3, 2))):
        add(1, size, 2, 1, k, s, 2, d)
    for cin, cout, groups in ((1, 1, 1), (4, 6, 2), (3, 3, 3), (3, 6, 3), (16, 16, 16), (16, 17, 1), (1, 32, 1), (5, 3, 1),
                              (32, 32, 32)):
        add(1, size, cin, cout, 3 if cin * cout < 40 or groups > 1 else 2, 2, 1, 1, groups)
    add(1, size, 64, 32, 1)
    for n, act in itertools.product((0, 1, 3), ACTIVATIONS):
        add(n, size, 2, 2, 2, each[0], 1, act=act, bias=act != "tanh")
    add(1, size, 2, 2, each[1], each[0], 1)
    for k, s in ((1, 2), (1, 3), (2, 3)):
        add(2, size, 1, 2, k, s)
    for shared in ((0,), (1,), (2,)):
        add(2, size, 2, 3, 2, 2, 1, shared=shared)
    if transpose:
        for k, s, p, o in ((3, 2, 1, 1), (1, 2, 0, 1), (2, 3, 0, 2), (3, 3, 1, 1), (2, 3, 1, (2, 0, 1)[:dims]), (5, 3, 2, 2)):
            if dims == 1 or k != 5:
                add(1, size, 2, 2, k, s, p, 1, 1, o, act=next(ODD_ACTS))
        add(1, size, 2, 2, 3, 1, 1, 2, 1, 1)
        add(1, size, 4, 2, 3, 2, 1, 1, 2, 1)


def make_conv_random(transpose):
    """Whatever the tables forget: combinations drawn at random."""
    family = Family("conv_transpose_random" if transpose else "conv_random")
    rng = np.random.RandomState(8 if transpose else 7)
    wanted = {1: 30, 2: 70, 3: 30}
    while any(wanted.values()):
        dims = int(rng.choice([d for d, count in wanted.items() if count]))
        pick = lambda values: tuple(int(v) for v in rng.choice(values, dims))
        groups = int(rng.choice([1, 1, 1, 2, 3]))
        cin, cout = groups * int(rng.randint(1, 5)), groups * int(rng.randint(1, 5))
        if rng.randint(6) == 0:
            groups = cin = int(rng.choice([4, 8, 9]))
            cout = cin * int(rng.randint(1, 3))
        size = pick(range(1, 11 if dims < 3 else 6)) if not transpose else pick(range(1, 6 if dims < 3 else 4))
        k, s = pick((1, 2, 3, 3, 4, 5)), pick((1, 1, 2, 2, 3, 4))
        p, d = pick((0, 0, 1, 2, 3)), pick((1, 1, 1, 2, 3))
        o = tuple(int(rng.randint(0, max(a, b))) for a, b in zip(s, d)) if transpose else 0
        outs = out_sizes(transpose, size, k, s, p, d, spread(o, dims))
        elements = np.prod(size) * cin + np.prod(k) * cin * cout // groups + 2 * max(0, np.prod(np.maximum(outs, 0))) * cout
        if elements > 1200:
            continue
        if add_conv(family, transpose, int(rng.choice([1, 1, 2])), size, cin, cout, k, s, p, d, groups, o,
                    str(rng.choice(["none", "none", "relu", "sigmoid", "tanh"])), bool(rng.randint(3))):
            wanted[dims] -= 1


def make_autoencoder():
    """The layers of the convolutional autoencoder for 28 x 28 images, batch 4."""
    family = Family("autoencoder1")
    add_conv(family, False, 4, (28, 28), 1, 32, 3, 2, 1, act="relu", shared=(0,))
    add_conv(family, True, 4, (7, 7), 64, 32, 3, 2, 1, output_padding=1, act="relu")
    family = Family("autoencoder2")
    add_conv(family, False, 4, (14, 14), 32, 64, 3, 2, 1, act="relu")
    add_conv(family, True, 4, (14, 14), 32, 1, 3, 2, 1, output_padding=1, act="sigmoid")


def make_long():
    """What is cut into pieces: thousands of rows or elements, sums of hundreds of products, dozens of taps."""
    family = Family("long_products", coarse=True)
    for lead, k, n in (((1100,), 3, 2), ((1030,), 9, 5), ((4200,), 1, 2), ((2, 600), 3, 2), ((4,), 700, 5), ((2, 3), 330, 9)):
        rng = family.rng()
        family.add("matmul", torch.matmul, [coarse(rng, lead + (k,)), coarse(rng, (k, n))])
    rng = family.rng()
    family.add("matmul", torch.matmul, [coarse(rng, (2, 1030, 2)), coarse(rng, (2, 2, 2))])
    rng = family.rng()
    family.add("linear", lambda x, w, b: torch.tanh(F.linear(x, w.T, b)),
               [uniform(rng, (1100, 3)), uniform(rng, (3, 4)), uniform(rng, (4,))], shared=(0,), act="tanh")
    for transpose in (False, True):
        add_conv(family, transpose, 1, (1100,), 2, 2, 3, 1, 1, act="relu", shared=(0,))
        add_conv(family, transpose, 2, (23, 24), 1, 3, 3, 1, 1, act="relu")
        add_conv(family, transpose, 1, (33, 34), 2, 2, 3, 1, 1, groups=2, act="relu", shared=(0,))
        add_conv(family, transpose, 1, (33, 32), 8, 2, 2, 1, 0, act="relu", shared=(0,))
        add_conv(family, transpose, 1, (11, 10, 10), 1, 2, 2, 1, 1, bias=False)
        add_conv(family, transpose, 1, (3, 3), 400, 3, 1)
        add_conv(family, transpose, 1, (3, 4), 40, 3, 3, 1, 1)
        for cin in (1, 2, 9):
            add_conv(family, transpose, 1, (8, 7), cin, 3, 7, 1, 3)
            add_conv(family, transpose, 1, (5, 6), cin, 2, (5, 7), 2, (2, 3))
        add_conv(family, transpose, 1, (4, 5, 4), 2, 2, (3, 4, 3), 1, 1)
        add_conv(family, transpose, 1, (50,), 3, 2, 40, 1, 20)
    family = Family("long_elements", coarse=True)
    for op, f in (("exp", torch.exp), ("gelu", F.gelu), ("relu", torch.relu)):
        family.add(op, f, [grid(family.rng(), (4113,), 1 / 64, -2, 2, odd=True)])
    rng = family.rng()
    family.add("mul", torch.mul, [coarse(rng, (1030, 4)), coarse(rng, (4,))])
    rng = family.rng()
    family.add("add", torch.add, [coarse(rng, (4,)), coarse(rng, (1030, 1))])
    for op in ("sum", "mean", "max"):
        for shape, axes in (((8200,), "all"), ((4200, 1), (0,)), ((70, 2, 30), (0, 2)))[:3 if op == "sum" else 1]:
            dims = tuple(range(len(shape))) if axes == "all" else axes
            family.add(op, lambda x, o=op, d=dims: REDUCTIONS[o](x, d, False), [distinct(family.rng(), shape)], axes=axes,
                       keep=False)
    for op, f in (("mse_loss", F.mse_loss), ("bce_with_logits_loss", F.binary_cross_entropy_with_logits)):
        rng = family.rng()
        family.add(op, f, [coarse(rng, (4200,)), coarse(rng, (4200,))], shared=(1,))
    rng = family.rng()
    family.add("cross_entropy_loss", F.cross_entropy, [uniform(rng, (1500, 3)), np.asarray(rng.randint(0, 3, (1500,)))])
    rng = family.rng()
    family.add("batch_norm", lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, True, 0.1, 1e-5),
               [uniform(rng, (1100, 2), -2, 3)] + [uniform(rng, (2,), 0.5, 2) for _ in range(4)], updated=(3, 4),
               momentum=0.1, eps=1e-5)
    rng = family.rng()
    family.add("layer_norm", lambda x, w, b: F.layer_norm(x, (4200,), w, b, 1e-5),
               [uniform(rng, (1, 4200)), coarse(rng, (4200,)), coarse(rng, (4200,))], shared=(0, 2), axes=1, eps=1e-5)
    rng = family.rng()
    family.add("layer_norm", lambda x, w, b: F.layer_norm(x, (3,), w, b, 1e-2),
               [distinct(rng, (1100, 3)), uniform(rng, (3,)), uniform(rng, (3,))], axes=1, eps=1e-2)
    rng = family.rng()
    family.add("embedding", lambda w, i: F.embedding(i, w), [coarse(rng, (7, 3)), rng.randint(0, 7, (1300,))], shared=(1,))
    family.add("softmax", lambda x: torch.softmax(x, 1), [uniform(family.rng(), (1, 4200), -3, 3)], axis=1)


# ---- pooling --------------------------------------------------------------------------------------------------------

MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
AVG_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
ADAPTIVE = {"adaptive_max_pool": {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d},
            "adaptive_avg_pool": {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}}


def add_pool(family, op, shape, kernel, stride=0, padding=0, dilation=1, ceil_mode=False, count_include_pad=True, x=None,
             **more):
    dims = len(shape) - 2
    k, p, d = spread(kernel, dims), spread(padding, dims), spread(dilation, dims)
    s = k if stride == 0 else spread(stride, dims)

    def fn(t):
        t = t.movedim(-1, 1).contiguous()
        if op == "max_pool":
            return MAX_POOL[dims](t, k, s, p, d, ceil_mode).movedim(1, -1)
        return AVG_POOL[dims](t, k, s, p, ceil_mode, count_include_pad).movedim(1, -1)

    params = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation, "ceil_mode": ceil_mode,
              "count_include_pad": count_include_pad}
    usual = {"stride": 0, "padding": 0, "dilation": 1, "ceil_mode": False, "count_include_pad": True}
    family.add(op, fn, [distinct(family.rng(), shape) if x is None else x], **more,
               **{key: v for key, v in params.items() if key not in usual or v != usual[key]})


def make_pool():
    shapes = {1: ((2, 9, 3), (1, 10, 1)), 2: ((1, 7, 8, 2), (2, 5, 5, 1), (1, 6, 7, 17)), 3: ((1, 4, 5, 5, 2),)}
    for op in ("max_pool", "avg_pool"):
        family = Family(op, "pool")
        for dims, list_of_shapes in shapes.items():
            for shape, ceil in itertools.product(list_of_shapes, (False, True)):
                for k, s, p in ((2, 0, 0), (3, 2, 1), (3, 1, 1), (3, 3, 0), (2, 3, 1), (1, 2, 0), (4, 3, 2)):
                    add_pool(family, op, shape, k, s, p, ceil_mode=ceil)
                    if op == "avg_pool" and p:
                        add_pool(family, op, shape, k, s, p, ceil_mode=ceil, count_include_pad=False)
        for ceil in (False, True):
            add_pool(family, op, (1, 7, 8, 2), (2, 3), (2, 1), (1, 0), ceil_mode=ceil)
            add_pool(family, op, (2, 7, 8, 1), (3, 2), 0, (0, 1), ceil_mode=ceil)
            add_pool(family, op, (1, 4, 5, 6, 2), (2, 3, 1), (1, 2, 3), (1, 1, 0), ceil_mode=ceil)
            if op == "max_pool":
                for shape, k, s, p, d in (((1, 9, 8, 2), 3, 1, 1, 2), ((1, 9, 8, 2), 2, 2, 1, 3), ((1, 12, 3), 3, 2, 1, 2),
                                          ((1, 9, 8, 2), (2, 3), (1, 2), (1, 0), (3, 1)), ((1, 5, 5, 6, 1), 2, 2, 1, 2)):
                    add_pool(family, op, shape, k, s, p, d, ceil)
        for shape in ((0, 6, 6, 2), (0, 6, 2), (0, 4, 4, 4, 1)):
            add_pool(family, op, shape, 2)
        add_pool(family, op, (3, 8, 8, 16), 2)
        add_pool(family, op, (1, 5, 4, 33), 2)
        if op == "max_pool":
            tied = np.asarray(np.random.RandomState(3).randint(0, 3, (2, 6, 7, 2)), dtype="float64")
            add_pool(family, op, tied.shape, 3, 2, 1, x=tied, fd=0)
            add_pool(family, op, (1, 7, 2), 3, 1, 1, x=np.zeros((1, 7, 2)), fd=0)
            add_pool(family, op, (1, 3, 4, 5, 1), 2, 1, 1, x=-np.ones((1, 3, 4, 5, 1)), fd=0)
    for op in ADAPTIVE:
        family = Family(op, "pool")
        for shape, sizes in (((2, 9, 3), (3,)), ((2, 9, 3), (4,)), ((1, 7, 2), (1,)), ((1, 5, 2), (5,)), ((1, 3, 2), (5,)),
                             ((2, 7, 8, 2), (3, 4)), ((1, 7, 8, 3), (1, 1)), ((1, 5, 9, 2), (4, 2)), ((1, 6, 6, 17), (5, 7)),
                             ((1, 4, 5, 6, 2), (2, 3, 4)), ((1, 3, 3, 3, 1), (1, 2, 3)), ((0, 6, 6, 2), (3, 2)),
                             ((0, 6, 2), (4,)), ((1, 1, 1, 2), (2, 3))):
            dims = len(sizes)
            f = ADAPTIVE[op][dims]
            family.add(op, lambda t, f=f, s=sizes: f(t.movedim(-1, 1).contiguous(), s).movedim(1, -1),
                       [distinct(family.rng(), shape)], sizes=sizes)
        if op == "adaptive_max_pool":
            tied = np.asarray(np.random.RandomState(4).randint(0, 2, (1, 5, 7, 2)), dtype="float64")
            family.add(op, lambda t: F.adaptive_max_pool2d(t.movedim(-1, 1).contiguous(), (2, 3)).movedim(1, -1), [tied],
                       sizes=(2, 3), fd=0)


# ---- softmax, normalisation -----------------------------------------------------------------------------------------

def make_softmax():
    family = Family("softmax")
    for op, f in (("softmax", torch.softmax), ("log_softmax", torch.log_softmax)):
        for shape, axis in (((5,), 0), ((5,), -1), ((3, 4), 0), ((3, 4), 1), ((3, 4), -1), ((3, 4), -2), ((2, 3, 4), 0),
                            ((2, 3, 4), 1), ((2, 3, 4), 2), ((2, 3, 4), -2), ((4, 33), 1), ((33, 4), 0), ((2, 17, 3), 1),
                            ((3, 16), 1), ((2, 2, 65), -1), ((2, 300), 1), ((4, 1), 1), ((0, 3), 1), ((3, 0), 0),
                            ((2, 2, 3, 2, 2), 2)):
            family.add(op, lambda x, a=axis: f(x, a), [uniform(family.rng(), shape, -3, 3)], axis=axis)
        x = [[1000.0, 999.0, -1000.0, 0.0], [-1000.0, -1000.0, -1001.0, -1000.5], [5.0, 5.0, 5.0, 5.0],
             [1e30, 0.0, -1e30, 1.0], [88.0, 89.0, 90.0, -90.0]]
        for axis in (0, 1):
            rows = x if op == "softmax" else x[:3] + x[4:]      # log softmax(-1e30) would hide everything else
            family.add(op, lambda t, a=axis: f(t, a), [quantised(rows)], axis=axis, fd=0)


def attended(q, k, v, heads, scale=None, causal=0, hidden=()):
    """torch's own attention, of heads that lie behind one another in the last axis."""
    q, k, v = (t.reshape(t.shape[0], t.shape[1], heads, t.shape[2] // heads).transpose(1, 2) for t in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    mask = torch.tril(mask) if causal else mask
    mask[:, list(hidden)] = False
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return torch.nan_to_num(out, nan=0.0).transpose(1, 2).flatten(2)


def make_attention():
    family = Family("attention")
    for n, t, s, heads, d, e, more in (
            (2, 5, 7, 1, 3, 4, {}), (1, 1, 1, 2, 1, 1, {}), (2, 6, 6, 3, 5, 5, dict(causal=1)), (1, 9, 4, 2, 8, 16, dict(causal=1)),
            (1, 4, 9, 2, 4, 3, dict(causal=1)), (2, 7, 10, 2, 16, 16, dict(hidden=(0, 3, 9))), (1, 6, 6, 2, 8, 8, dict(causal=1, hidden=(2, 3))),
            (2, 13, 11, 2, 33, 17, dict(scale=0.3)), (1, 50, 65, 2, 32, 32, {}), (1, 100, 64, 1, 64, 20, {}), (0, 3, 4, 2, 4, 4, {}),
            (2, 0, 4, 2, 4, 4, {}), (1, 3, 300, 1, 6, 6, {}), (1, 2, 513, 2, 4, 4, dict(scale=2.0)), (1, 530, 5, 1, 3, 2, {}),
            (1, 110, 110, 1, 8, 8, dict(causal=1)), (1, 20, 270, 1, 8, 8, dict(causal=1)), (1, 97, 130, 1, 8, 40, dict(hidden=(64, 65, 129)))):
        rng = family.rng()
        args = [uniform(rng, (n, t, heads * d)), uniform(rng, (n, s, heads * d)), uniform(rng, (n, s, heads * e))]
        family.add("attention", lambda q, k, v, h=heads, m=more: attended(q, k, v, h, **m), args, heads=heads, **more)
    for shared in ((0,), (1,), (2,), (0, 1), (1, 2)):
        rng = family.rng()
        args = [uniform(rng, (2, 5, 6)), uniform(rng, (2, 4, 6)), uniform(rng, (2, 4, 8))]
        family.add("attention", lambda q, k, v: attended(q, k, v, 2), args, shared=shared, heads=2)
    x = uniform(family.rng(), (2, 5, 6))
    family.add("attention", lambda q, k, v: attended(q, q, v, 2), [x, None, uniform(family.rng("v"), (2, 5, 4))], same=1, heads=2)
    steep = uniform(family.rng(), (1, 6, 8))
    family.add("attention", lambda q, k, v: attended(q, k, v, 1), [quantised(steep), quantised(steep[:, ::-1]), quantised(steep)], heads=1)
    for n, t, heads, d, more in ((2, 5, 1, 3, {}), (1, 33, 4, 16, {}), (3, 8, 2, 32, dict(causal=1)), (1, 70, 3, 5, {}), (2, 12, 2, 8, dict(hidden=(1, 11)))):
        family.add("self_attention", lambda x, h=heads, m=more: attended(*x.chunk(3, 2), h, **m),
                   [uniform(family.rng(), (n, t, 3 * heads * d))], heads=heads, **more)


def make_norms():
    family = Family("layer_norm", "norms")
    for shape, axes in (((4, 5), 1), ((3, 4, 5), 1), ((3, 4, 5), 2), ((3, 4, 5), 3), ((2, 33), 1), ((5, 17), 1), ((3, 64), 1),
                        ((2, 3, 16), 1), ((2, 2, 3, 4), 2), ((0, 6), 1), ((7,), 1), ((2, 300), 1)):
        inner = shape[len(shape) - axes:]
        for weight, bias, eps in ((1, 1, 1e-5), (1, 0, 1e-5), (0, 1, 1e-3), (0, 0, 0.1)):
            rng = family.rng()
            args = [uniform(rng, shape, -2, 3), uniform(rng, inner) if weight else None, uniform(rng, inner) if bias else None]
            family.add("layer_norm", lambda x, w, b, i=inner, e=eps: F.layer_norm(x, i, w, b, e), args, axes=axes, eps=eps)
    for shared in ((0,), (1,), (2,)):
        rng = family.rng()
        family.add("layer_norm", lambda x, w, b: F.layer_norm(x, (6,), w, b, 1e-5),
                   [uniform(rng, (5, 6), 9, 12), uniform(rng, (6,)), uniform(rng, (6,))], shared=shared, axes=1, eps=1e-5)

    family = Family("group_norm", "norms")
    for shape, groups in (((3, 8), 2), ((2, 5, 4), 1), ((2, 5, 4), 2), ((2, 5, 4), 4), ((2, 3, 4, 6), 1), ((2, 3, 4, 6), 3),
                          ((2, 3, 4, 6), 6), ((1, 2, 3, 2, 4), 2), ((0, 3, 4, 6), 3), ((2, 4, 4, 16), 4), ((1, 3, 5, 34), 2),
                          ((1, 3, 3, 33), 33)):
        for weight, bias, eps in ((1, 1, 1e-5), (1, 0, 1e-3), (0, 1, 1e-5), (0, 0, 1e-5)):
            rng = family.rng()
            c = shape[-1:]
            args = [uniform(rng, shape, -2, 3), uniform(rng, c) if weight else None, uniform(rng, c) if bias else None]
            family.add("group_norm", lambda x, w, b, g=groups, e=eps:
                       F.group_norm(x.movedim(-1, 1).contiguous(), g, w, b, e).movedim(1, -1), args, groups=groups, eps=eps)
    for shared in ((0,), (1,), (2,)):
        rng = family.rng()
        family.add("group_norm", lambda x, w, b: F.group_norm(x.movedim(-1, 1).contiguous(), 2, w, b, 1e-5).movedim(1, -1),
                   [uniform(rng, (2, 5, 4), 4, 7), uniform(rng, (4,)), uniform(rng, (4,))], shared=shared, groups=2, eps=1e-5)

    family = Family("batch_norm", "norms")
    for shape in ((6, 3), (5, 1), (3, 4, 2), (2, 3, 4, 5), (4, 2, 2, 17), (2, 2, 3, 2, 3), (1, 3, 3, 16), (9, 33)):
        c = shape[-1:]
        for weight, bias, running, momentum, eps in ((1, 1, 1, 0.1, 1e-5), (1, 1, 0, 0.1, 1e-5), (0, 0, 1, 0.25, 1e-3),
                                                     (1, 0, 1, 1.0, 1e-5), (0, 1, 1, 0.0, 1e-5)):
            for mode in ("train", "eval") if running else ("train",):
                rng = family.rng()
                args = [uniform(rng, shape, -2, 3)] + [uniform(rng, c) if there else None for there in (weight, bias)] + \
                    ([uniform(rng, c), uniform(rng, c, 0.5, 2)] if running else [None, None])
                family.add("batch_norm", lambda x, w, b, m, v, t=mode == "train", a=momentum, e=eps:
                           F.batch_norm(x.movedim(-1, 1).contiguous(), m, v, w, b, t, a, e).movedim(1, -1), args,
                           updated=(3, 4) if running else (), mode=mode, momentum=momentum, eps=eps)
    for shared in ((0,), (1,), (2,)):
        rng = family.rng()
        family.add("batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, True, 0.1, 1e-5),
                   [uniform(rng, (6, 4), 4, 7), uniform(rng, (4,)), uniform(rng, (4,))], shared=shared, momentum=0.1, eps=1e-5)
    rng = family.rng()
    family.add("batch_norm", lambda x, w, b, m, v: F.batch_norm(x.movedim(-1, 1), m, v, w, b, False, 0.1, 1e-5).movedim(1, -1),
               [uniform(rng, (0, 3, 4)), uniform(rng, (4,)), uniform(rng, (4,)), uniform(rng, (4,)), uniform(rng, (4,), 1, 2)],
               updated=(3, 4), mode="eval", momentum=0.1, eps=1e-5)


# ---- shapes ---------------------------------------------------------------------------------------------------------

def make_shapes():
    family = Family("shapes")
    for rows, width, shape in ((5, 3, (4,)), (5, 3, (2, 3)), (4, 1, (7,)), (3, 17, (6,)), (6, 16, (2, 2, 2)), (5, 3, (0,)),
                               (1, 4, (5,)), (3, 2, ()), (9, 33, (12,)), (3, 64, (5,)), (4, 150, (2, 3))):
        rng = family.rng()
        indices = np.asarray(rng.randint(0, rows, shape), dtype="int64")
        for shared in ((1,), ()):
            family.add("embedding", lambda w, i: F.embedding(i, w), [uniform(rng, (rows, width)), indices], shared=shared)
    for shape, to in (((2, 3, 4), (6, 4)), ((2, 3, 4), (2, -1)), ((2, 3, 4), (-1,)), ((6,), (1, 2, 1, 3)), ((1,), ()),
                      ((), (1, 1)), ((0, 3), (3, 0)), ((2, 3), (2, 3)), ((4, 6), (-1, 3, 2)), ((0, 4), (-1, 4))):
        family.add("reshape", lambda x, t=to: x.reshape(t), [uniform(family.rng(), shape)], shape=to)
    for axes in ((0,), (0, 1), (1, 0), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0), (0, 3, 1, 2), (0, 2, 3, 1), (3, 2, 1, 0),
                 (1, 0, 3, 2), (4, 0, 2, 1, 3), (7, 5, 3, 1, 0, 2, 4, 6)):
        shape = ((2, 3, 4, 5, 2)[:len(axes)]) if len(axes) < 6 else (2, 1, 2, 2, 1, 2, 2, 2)
        family.add("permute", lambda x, a=axes: x.permute(a), [uniform(family.rng(), shape)], axes=axes)
    family.add("permute", lambda x: x.permute(1, 0), [uniform(family.rng(), (33, 17))], axes=(1, 0))
    family.add("permute", lambda x: x.permute(2, 0, 1), [uniform(family.rng(), (0, 3, 2))], axes=(2, 0, 1))
    for shapes, axis in ((((3,),), 0), (((3,), (2,)), 0), (((2, 3), (2, 3)), 0), (((2, 3), (2, 1), (2, 4)), 1),
                         (((2, 3), (0, 3), (1, 3)), 0), (((2, 3, 4), (2, 1, 4)), 1), (((2, 3, 4), (2, 3, 2)), 2),
                         (((2, 3, 4), (2, 3, 2)), -1), (((1, 2, 2, 2), (3, 2, 2, 2), (2, 2, 2, 2)), 0),
                         (((1,),) * 5, 0), (((0, 2), (0, 3)), 1), (((2, 16), (2, 17)), 1)):
        rng = family.rng()
        family.add("concat", lambda *t, a=axis: torch.cat(t, a), [uniform(rng, s) for s in shapes], axis=axis)
    rng = family.rng()
    family.add("concat", lambda *t: torch.cat(t, 1), [uniform(rng, (2, 3)), uniform(rng, (2, 2))], shared=(0,), axis=1)
    family.add("concat", lambda x: torch.cat((x, x), 1), [uniform(family.rng(), (2, 3))], same=1, axis=1)
    for shape, axis, begin, end in (((7,), 0, 0, 7), ((7,), 0, 2, 5), ((7,), 0, 6, 7), ((4, 5), 0, 1, 3), ((4, 5), 1, 0, 2),
                                    ((4, 5), -1, 3, 5), ((2, 3, 4), 1, 1, 2), ((2, 3, 4), 2, 1, 4), ((4, 5), 1, 2, 2),
                                    ((0, 5), 1, 1, 3), ((33, 17), 0, 5, 21)):
        family.add("slice", lambda x, a=axis, b=begin, e=end: x.narrow(a, b, e - b), [uniform(family.rng(), shape)],
                   axis=axis, begin=begin, end=end)
    for shape, before, after, value in (((5,), (1,), (2,), 0.0), ((5,), (0,), (0,), 1.0), ((2, 3), (1, 0), (0, 2), 0.5),
                                        ((2, 3), (0, 1), (0, 1), -1.0), ((1, 3, 4, 2), (0, 1, 2, 0), (0, 2, 1, 0), 0.0),
                                        ((2, 3, 2), (1, 1, 1), (2, 2, 2), 3.0), ((0, 3), (0, 1), (0, 1), 0.0),
                                        ((0, 3), (2, 1), (0, 0), 2.0)):
        flat = [v for pair in zip(reversed(before), reversed(after)) for v in pair]
        family.add("pad", lambda x, f=flat, v=value: F.pad(x, f, value=v), [uniform(family.rng(), shape)],
                   before=before, after=after, value=value)
    for shape in ((), (5,), (2, 3), (0, 2)):
        family.add("detach", lambda x: x.detach() * x, [uniform(family.rng(), shape)], fd=0)


# ---- losses ---------------------------------------------------------------------------------------------------------

def make_losses():
    family = Family("losses")
    losses = [("mse_loss", {}, F.mse_loss), ("rmse_loss", {}, lambda p, t: torch.sqrt(F.mse_loss(p, t))),
              ("l1_loss", {}, F.l1_loss), ("bce_with_logits_loss", {}, F.binary_cross_entropy_with_logits)]
    losses += [("huber_loss", {"delta": d}, lambda p, t, d=d: F.huber_loss(p, t, delta=d)) for d in (1.0, 0.5, 2.0)]
    for op, params, f in losses:
        for shape in ((), (1,), (7,), (16,), (33,), (3, 5), (2, 3, 4, 1), (17, 9)):
            rng = family.rng()
            p = grid(rng, shape, 1 / 64, -2, 2, odd=True)
            t = grid(rng, shape, 1 / 64, 0 if "bce" in op else -2, 1)
            family.add(op, f, [p, t], **params)
            if shape in ((7,), (3, 5)):
                family.add(op, f, [p, t], shared=(1,), **params)
                family.add(op, f, [p, t], shared=(0,), **params)
    for x, t in (([-1000.0, -100.0, -20.0, 0.0, 20.0, 100.0, 1000.0, 3.0, 1e4, -1e4],
                  [1.0, 0.0, 0.5, 1.0, 1.0, 0.0, 1.0, 0.25, 1.0, 0.0]), ([-100.0, 100.0, -1e4, 1e4], [0.0, 1.0, 0.0, 1.0])):
        family.add("bce_with_logits_loss", F.binary_cross_entropy_with_logits, [x, t], shared=(1,), fd=0)
    family.add("huber_loss", lambda p, t: F.huber_loss(p, t, delta=1.0),
               [[0.0, 2.0, 1.0, -1.0, 1e4], [0.0, 1.0, 2.0, 1.0, 0.0]], delta=1.0, fd=0)
    family.add("l1_loss", F.l1_loss, [[0.0, 2.0, 1.0], [0.0, 1.0, 2.0]], fd=0)

    for smoothing in (0.0, 0.1, 0.5, 1.0):
        for shape in ((4, 3), (1, 1), (1, 5), (7, 10), (2, 3, 5), (5,), (3, 33), (5, 16), (2, 2, 2, 4), (33, 3)):
            rng = family.rng()
            labels = np.asarray(rng.randint(0, shape[-1], shape[:-1]), dtype="int64")
            family.add("cross_entropy_loss", lambda x, y, s=smoothing: F.cross_entropy(
                x.reshape(-1, x.shape[-1]), y.reshape(-1), label_smoothing=s), [uniform(rng, shape, -3, 3), labels],
                shared=(1,) if len(shape) != 2 else (), smoothing=smoothing)
        x = [[1000.0, 999.0, -1000.0, 0.0], [-1000.0, -1000.0, -1001.0, -1000.5], [5.0, 5.0, 5.0, 5.0],
             [88.0, 89.0, 90.0, -90.0]]
        family.add("cross_entropy_loss", lambda x, y, s=smoothing: F.cross_entropy(x, y, label_smoothing=s),
                   [quantised(x), np.asarray([2, 0, 3, 1])], shared=(1,), smoothing=smoothing, fd=0)


def main():
    make_elementwise()
    make_unary()
    make_reductions()
    make_matmul()
    make_linear()
    for transpose in (False, True):
        make_conv2d(transpose)
        make_conv_other(transpose, 1)
        make_conv_other(transpose, 3)
        make_conv_random(transpose)
    make_autoencoder()
    make_long()
    make_pool()
    make_softmax()
    make_attention()
    make_norms()
    make_shapes()
    make_losses()
    for file in sorted({family.file for family in Family.all}):
        write_file(file, [family for family in Family.all if family.file == file])
    print("%d cases" % sum(len(family.metadata) for family in Family.all))


if __name__ == "__main__":
    main()
