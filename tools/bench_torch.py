#!/usr/bin/env python3
"""Does in PyTorch what build/bench does with the library: the same rows, the same JSON.

The rows come from `build/bench --list` (make bench). Of each row several settings are timed
briefly (memory layout, fused / foreach optimizers, torch.compile, ...) and the fastest is
measured; the result says which it was. An operation's two passes choose apart.
"""
import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
LEAST, MOST = 5, 20000


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--bench", default=os.path.join(HERE, "..", "build", "bench"), metavar="FILE", help="the program that lists the rows")
    p.add_argument("--list", action="store_true", help="print the rows that PyTorch can do")
    p.add_argument("--only", default="*", metavar="PATTERN", help="rows whose name contains PATTERN, or matches it (*, ?)")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="threads (1)")
    p.add_argument("--seconds", type=float, default=1, metavar="S", help="time for each row (1); a fifth of it to try each setting")
    p.add_argument("--json", metavar="FILE", help="write the results there as well; -: to standard output, alone")
    p.add_argument("--serve", action="store_true", help="read names of rows, one a line, and answer each with a line of JSON")
    p.add_argument("--no-compile", action="store_true", help="do not try torch.compile")
    return p.parse_args()


ARGUMENTS = arguments()
# Before PyTorch starts its threads: they stay on their cores, and sleep soon where the library's threads are to run next.
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []     # binding narrows what this thread sees
os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ.setdefault("OMP_NUM_THREADS", str(ARGUMENTS.threads))

import torch  # noqa: E402
import torch.nn as nn  # noqa: E402
import torch.nn.functional as F  # noqa: E402

torch.set_num_threads(ARGUMENTS.threads)
now = time.perf_counter


class Unsupported(Exception):
    """PyTorch has nothing that does this row."""


def random(*shape):
    return torch.rand(*shape) - 0.5


# ---- operations: each setting is (name, operands, function) ------------------------------


def conv_settings(p):
    d = p["dims"]
    x = random(p["batch"], p["in"], *[p["size"]] * d)
    ends = (p["in"], p["out"]) if p["transposed"] else (p["out"], p["in"])
    w, b = random(*ends, *[p["kernel"]] * d), random(p["out"])
    last = torch.channels_last if d == 2 else torch.channels_last_3d
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", last)):
        operands = wanted(x.clone(memory_format=layout), w.clone(memory_format=layout), b)
        operands[0].requires_grad_(not p["first"])
        if p["transposed"]:
            function = F.conv_transpose2d if d == 2 else F.conv_transpose3d
            extra = {"output_padding": p["output_padding"]}
        else:
            function, extra = (F.conv2d if d == 2 else F.conv3d), {}
        yield name, operands, lambda a, w, b, f=function, e=extra: f(a, w, b, stride=p["stride"], padding=p["padding"], **e)


def batch_norm_settings(p):
    side = int(round((p["rows"] / 32) ** 0.5))
    x = random(32, p["columns"], side, side)
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        operands = wanted(x.clone(memory_format=layout), random(p["columns"]), random(p["columns"]))
        yield name, operands, lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True)


def pool_settings(p):
    x = random(p["batch"], p["channels"], p["size"], p["size"])
    for name, layout in (("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)):
        yield name, wanted(x.clone(memory_format=layout)), lambda x: x.mean((2, 3))


def wanted(*operands):
    return [t.detach().requires_grad_() for t in operands]


def rows(p):
    return random(p["rows"], p["columns"])


def one(operands, function):
    return lambda p: [("eager", operands(p), function)]


def labels(p):
    return torch.arange(p["rows"]) % p["columns"]


OPERATIONS = {
    "conv": conv_settings,
    "batch_norm": batch_norm_settings,
    "pool": pool_settings,
    "linear": one(lambda p: wanted(random(p["rows"], p["in"]), random(p["out"], p["in"]), random(p["out"])), F.linear),
    "matmul": one(lambda p: wanted(random(p["batch"], p["m"], p["k"]), random(p["batch"], p["k"], p["n"])), torch.bmm),
    "relu": one(lambda p: wanted(rows(p)), F.relu),
    "sigmoid": one(lambda p: wanted(rows(p)), torch.sigmoid),
    "gelu": one(lambda p: wanted(rows(p)), F.gelu),
    "softmax": one(lambda p: wanted(rows(p)), lambda x: F.softmax(x, -1)),
    "layer_norm": one(lambda p: wanted(rows(p), random(p["columns"]), random(p["columns"])),
                      lambda x, w, b: F.layer_norm(x, x.shape[1:], w, b)),
    "add": one(lambda p: wanted(rows(p), rows(p)), torch.add),
    "mse": one(lambda p: wanted(rows(p)) + [rows(p)], F.mse_loss),
    "cross_entropy": one(lambda p: wanted(rows(p)) + [labels(p)], F.cross_entropy),
    "permute": one(lambda p: wanted(random(p["batch"], p["rows"], p["columns"], p["width"])), lambda x: x.transpose(1, 2).contiguous()),
}


class Operation:
    """One setting of an operation; run() gives the seconds of its two passes."""

    def __init__(self, name, operands, function):
        self.name, self.operands, self.function = name, operands, function
        self.ones = None

    def run(self):
        for t in self.operands:
            t.grad = None
        begin = now()
        y = self.function(*self.operands)
        middle = now()
        if self.ones is None:
            self.ones = torch.empty_like(y)
        again = now()
        self.ones.fill_(1)
        y.backward(self.ones)
        end = now()
        return middle - begin, end - again

    def check(self):
        self.run()
        return all(bool(torch.isfinite(t.grad).all()) for t in self.operands if t.requires_grad)


# ---- matrix products ----------------------------------------------------------------------


class Product:
    name = "torch.mm"

    def __init__(self, p):
        self.a = random(p["k"], p["m"]).t() if p["a_transposed"] else random(p["m"], p["k"])
        self.b = random(p["n"], p["k"]).t() if p["b_transposed"] else random(p["k"], p["n"])
        self.c = torch.empty(p["m"], p["n"])

    def run(self):
        with torch.no_grad():
            begin = now()
            torch.mm(self.a, self.b, out=self.c)
            return (now() - begin,)

    def check(self):
        self.run()
        return bool(torch.isfinite(self.c).all())


# ---- optimizers ---------------------------------------------------------------------------

ALGORITHMS = {
    "sgd": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "adam": (torch.optim.Adam, {}),
    "adamw": (torch.optim.AdamW, {}),
    "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    "adagrad": (torch.optim.Adagrad, {}),
    "rmsprop": (torch.optim.RMSprop, {}),
    "adamax": (torch.optim.Adamax, {}),
    "nadam": (torch.optim.NAdam, {}),
    "radam": (torch.optim.RAdam, {}),
    "adadelta": (torch.optim.Adadelta, {}),
    "asgd": (torch.optim.ASGD, {}),
    "rprop": (torch.optim.Rprop, {}),
    "adafactor": (getattr(torch.optim, "Adafactor", None), {}),
    "muon": (getattr(torch.optim, "Muon", None), {}),
}


def optimizers(parameters, name):
    """The optimizer in every way that PyTorch offers: [(setting, optimizer)]."""
    make, options = ALGORITHMS.get(name, (None, None))
    if make is None:
        raise Unsupported(name)
    found = []
    for setting in ({"fused": True}, {"foreach": True}, {"foreach": False}):
        try:
            made = make(list(parameters), lr=1e-6, **options, **setting)
            for q in parameters:
                if q.grad is None:
                    q.grad = torch.zeros_like(q)
            made.step()
            found.append((" ".join(k if v else "for-loop" for k, v in setting.items()), made))
        except (TypeError, RuntimeError, ValueError, NotImplementedError):
            pass
    if not found:
        made = make(list(parameters), lr=1e-6, **options)
        found.append(("default", made))
    return found


class Step:
    """One setting of an optimizer's step."""

    def __init__(self, name, optimizer, parameters):
        self.name, self.optimizer, self.parameters = name, optimizer, parameters

    def run(self):
        begin = now()
        self.optimizer.step()
        return (now() - begin,)

    def check(self):
        return all(bool(torch.isfinite(q).all()) for q in self.parameters)


def optimizer_settings(p):
    parameters = [random(p["rows"], p["columns"]).requires_grad_() for _ in range(p["tensors"])]
    for q in parameters:
        q.grad = q.detach() * 2e-3
    yield from (Step(name, made, parameters) for name, made in optimizers(parameters, p["algorithm"]))


# ---- networks, as in bench_nets.h ---------------------------------------------------------


def half(make, a, b, **more):
    return make(a, b, 3, stride=2, padding=1, **more)


def net_ae():
    return nn.Sequential(
        half(nn.Conv2d, 1, 32), nn.ReLU(), half(nn.Conv2d, 32, 64), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 128), nn.Linear(128, 3136),
        nn.Unflatten(1, (64, 7, 7)), half(nn.ConvTranspose2d, 64, 32, output_padding=1), nn.ReLU(),
        half(nn.ConvTranspose2d, 32, 1, output_padding=1), nn.Sigmoid())


def net_ae3d():
    sizes = (2, 16, 32, 64, 128)
    down = [half(nn.Conv3d, a, b) for a, b in zip(sizes, sizes[1:])]
    up = [half(nn.ConvTranspose3d, b, a, output_padding=1) for a, b in reversed(list(zip(sizes, sizes[1:])))]
    layers = [part for layer in down + up for part in (layer, nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def net_mlp():
    sizes = (784, 256, 64, 32, 64, 128, 784)
    layers = [part for a, b in zip(sizes, sizes[1:]) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1], nn.Sigmoid())


class Encoder(nn.Module):
    def __init__(self, width=256, heads=8, feed=1024):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff1, self.ff2 = nn.Linear(width, feed), nn.Linear(feed, width)

    def forward(self, x):
        n, t, c = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, c))
        return x + self.ff2(F.gelu(self.ff1(self.norm2(x))))


def conv_norm(a, b, kernel, stride, relu):
    parts = [nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(b)]
    return nn.Sequential(*parts, *([nn.ReLU(inplace=True)] if relu else []))


class Residual(nn.Module):
    def __init__(self, a, b, stride):
        super().__init__()
        self.body = nn.Sequential(conv_norm(a, b, 3, stride, True), conv_norm(b, b, 3, 1, False))
        self.short = nn.Identity() if a == b else conv_norm(a, b, 1, stride, False)

    def forward(self, x):
        return F.relu(self.body(x) + self.short(x), inplace=True)


def net_resnet18():
    blocks = []
    for i in range(8):
        b = 64 << i // 2
        a = b if i % 2 or i == 0 else b // 2
        blocks.append(Residual(a, b, 1 if a == b else 2))
    return nn.Sequential(conv_norm(3, 64, 3, 1, True), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


NETS = {
    "ae": (net_ae, (1, 28, 28), torch.channels_last),
    "ae3d": (net_ae3d, (2, 32, 32, 32), torch.channels_last_3d),
    "mlp": (net_mlp, (784,), None),
    "transformer": (lambda: nn.Sequential(*[Encoder() for _ in range(6)]), (256, 256), None),
    "resnet18": (net_resnet18, (3, 32, 32), torch.channels_last),
}


class Training:
    """One setting of a training step."""

    def __init__(self, name, net, optimizer, x, target):
        self.name, self.net, self.optimizer, self.x, self.target = name, net, optimizer, x, target
        self.parameters = sum(q.numel() for q in net.parameters())
        self.loss = None

    def run(self):
        begin = now()
        self.optimizer.zero_grad(set_to_none=True)
        y = self.net(self.x)
        loss = F.cross_entropy(y, self.target) if self.target.dim() == 1 else F.mse_loss(y, self.target)
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()
        return (now() - begin,)

    def check(self):
        return bool(torch.isfinite(self.loss))


def net_settings(p):
    make, shape, last = NETS[p["which"]]
    for layout in [torch.contiguous_format] + ([last] if last else []):
        for compiled in (False,) if ARGUMENTS.no_compile else (False, True):
            torch.manual_seed(0)
            x = torch.rand(p["batch"], *shape).contiguous(memory_format=layout)
            net = make().to(memory_format=layout)
            target = torch.arange(p["batch"]) % 10 if p["which"] == "resnet18" else x
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
            name = ", ".join(["channels_last"] * (layout is last) + ["fused"] + ["compile"] * compiled)
            yield Training(name, torch.compile(net) if compiled else net, optimizer, x, target)


class Pair:
    """Two processes of one thread each, side by side; the slower one counts."""
    name = "two processes"

    def __init__(self, p):
        if len(CORES) < 2:
            raise Unsupported("a pair needs two cores")
        self.row = "step/" + p["which"]
        self.sides = []
        for core in CORES[:2]:
            command = [sys.executable, os.path.abspath(__file__), "--serve", "--threads", "1", "--bench", ARGUMENTS.bench,
                       "--seconds", str(ARGUMENTS.seconds)] + ["--no-compile"] * ARGUMENTS.no_compile
            self.sides.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                               env={k: v for k, v in os.environ.items() if not k.startswith("OMP_")},
                                               preexec_fn=lambda core=core: os.sched_setaffinity(0, {core})))
        self.measure()                  # chooses the settings

    def measure(self):
        for side in self.sides:
            side.stdin.write(self.row + "\n")
            side.stdin.flush()
        answers = [json.loads(side.stdout.readline())[0] for side in self.sides]
        self.name = "two processes: " + answers[0]["setting"]
        self.parameters = answers[0]["parameters"]
        return max(answers, key=lambda a: a["median"])

    def close(self):
        for side in self.sides:
            side.stdin.close()
            side.wait()


# ---- rows ---------------------------------------------------------------------------------


def settings_of(kind, p):
    if kind in OPERATIONS:
        return [Operation(*s) for s in OPERATIONS[kind](p)]
    if kind == "gemm":
        return [Product(p)]
    if kind == "optimizer":
        return list(optimizer_settings(p))
    if kind == "net":
        return list(net_settings(p))
    raise Unsupported(kind)


PHASES = {"gemm": ["product"], "optimizer": ["step"], "net": ["step"], "pair": ["step"]}


def read_rows():
    """{name: (kind, sizes)} of the rows that PyTorch may be able to do; peers are not its business."""
    try:
        text = subprocess.run([ARGUMENTS.bench, "--list"], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"bench_torch: cannot list the rows: {error} (make bench)")
    found = {}
    for line in text.splitlines():
        name, kind, *fields = line.split()
        p = dict(field.split("=") for field in fields)
        p = {k: int(v) if v.lstrip("-").isdigit() else v for k, v in p.items()}
        possible = kind != "optimizer" or ALGORITHMS.get(p["algorithm"], (None,))[0]
        if "@" not in name and possible and (kind in OPERATIONS or kind in PHASES):
            found[name] = kind, p
    return found


def quartiles(times):
    t = sorted(times)
    n = len(t)
    median = (t[(n - 1) // 2] + t[n // 2]) / 2
    return median, t[0], (t[n - 1 - n // 4] - t[n // 4]) / median


def timed(setting, seconds):
    """The seconds of each phase, over and over: [[...], ...]"""
    times, begin = [], now()
    while now() - begin < seconds / 10 or (len(times) < 2 and now() - begin < seconds):
        times.append(setting.run())
    times, begin = [], now()
    while len(times) < MOST:
        spent = now() - begin
        if spent >= seconds and len(times) >= (2 if spent > 4 * seconds else LEAST):
            break
        times.append(setting.run())
    return list(zip(*times))


class Row:
    """A row made ready, with the best setting of each phase."""

    def __init__(self, name, kind, p):
        self.name, self.phases = name, PHASES.get(kind, ["forward", "backward"])
        self.pair = Pair(p) if kind == "pair" else None
        if self.pair:
            return
        tried = []
        for setting in settings_of(kind, p):
            try:
                tried.append((setting, [quartiles(t)[0] for t in timed(setting, ARGUMENTS.seconds / 5)]))
            except Exception as error:          # a setting that does not work here (torch.compile without a compiler)
                print(f"bench_torch: {name}: {setting.name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        if not tried:
            raise Unsupported("no setting works")
        self.best = [min(tried, key=lambda s: s[1][i])[0] for i in range(len(self.phases))]

    def measure(self):
        if self.pair:
            answer = self.pair.measure()
            return [dict(answer, name=self.name, threads=2, setting=self.pair.name, parameters=self.pair.parameters)]
        measured = {id(s): timed(s, ARGUMENTS.seconds) for s in self.best}
        for setting in self.best:
            if not setting.check():
                raise ArithmeticError("results that are not finite")
        results = []
        for i, phase in enumerate(self.phases):
            median, best, spread = quartiles(measured[id(self.best[i])][i])
            results.append({"name": self.name, "phase": phase, "threads": ARGUMENTS.threads, "median": median, "best": best,
                            "spread": spread, "repetitions": len(measured[id(self.best[i])][i]),
                            "parameters": getattr(self.best[i], "parameters", 0) if isinstance(self.best[i], Training) else 0,
                            "setting": self.best[i].name})
        return results

    def close(self):
        if self.pair:
            self.pair.close()


def serve(all_rows):
    row = None
    for line in sys.stdin:
        name = line.strip()
        try:
            if name not in all_rows:
                raise Unsupported("PyTorch has no such row")
            if row is None or row.name != name:
                if row:
                    row.close()
                row = None
                row = Row(name, *all_rows[name])
            answer = row.measure()
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    if row:
        row.close()


def main():
    all_rows = read_rows()
    if ARGUMENTS.serve:
        return serve(all_rows)
    chosen = [n for n in all_rows if ARGUMENTS.only in n or fnmatch.fnmatchcase(n, ARGUMENTS.only)]
    if not chosen:
        sys.exit(f"bench_torch: --only: no row is called '{ARGUMENTS.only}'")
    if ARGUMENTS.list:
        return print("\n".join(chosen))
    alone, results, failed = ARGUMENTS.json == "-", [], False
    if not alone:
        print(f"PyTorch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
        print(f"{'row':32} {'phase':8} {'thr':>3} {'median ms':>11} {'best ms':>11} {'spread':>7}  setting")
    for name in chosen:
        if all_rows[name][0] == "pair" and ARGUMENTS.threads != 2:
            continue
        try:
            row = Row(name, *all_rows[name])
            for r in row.measure():
                results.append(r)
                if not alone:
                    print(f"{r['name']:32} {r['phase']:8} {r['threads']:3} {r['median'] * 1e3:11.4f} {r['best'] * 1e3:11.4f} "
                          f"{r['spread']:7.1%}  {r['setting']}", flush=True)
            row.close()
        except Exception as error:
            failed = True
            print(f"bench_torch: {name}: {type(error).__name__}: {error}", file=sys.stderr)
    if ARGUMENTS.json:
        document = {"program": f"PyTorch {torch.__version__}", "kernels": torch.backends.cpu.get_cpu_capability(), "results": results}
        with sys.stdout if alone else open(ARGUMENTS.json, "w") as f:
            json.dump(document, f, indent=1)
            f.write("\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
