#!/usr/bin/env python3
"""Makes solvers.safetensors, the golden numbers of tests/test_solvers.c, beside this script. usage: python make_solvers.py

L-BFGS: the iterates of torch.optim.LBFGS in float64. Each case is run from its start and from a start that is moved in the last
bits; only the steps in which the two agree to 1e-11 are written, so that what is compared is not chaotic.
CMA-ES: means and step sizes of `Cmaes` below, written from arXiv 1604.00772 (figure 6, table 1) with numpy.linalg.eigh, on
the library's draws (Philox4x32-10 and Box-Muller, written anew). SPSA: the same, from Spall 1992.
Least squares: the solution of the normal equations by numpy.linalg.lstsq.
K-FAC: `kfac_case` below, the factors and dampings of Martens, Grosse 2015 and of Grosse, Martens 2016 with dense solutions, the clip and
the momentum of alecwangcq/KFAC-Pytorch (commit 3dec464), in float64.
Natural gradient: numpy.linalg.solve with F from explicit per-example gradients and, for the network, torch's Jacobians.
"""
import math
import pathlib

import numpy as np
import torch
from safetensors.numpy import save_file

HERE = pathlib.Path(__file__).parent
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
golden, metadata = {}, {}


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def bowl(x):
    """0.5 sum a_i (x_i - b_i)^2, a from 1 to 1e3."""
    n = len(x)
    i = torch.arange(n)
    a = 10.0 ** (3.0 * i / (n - 1))
    b = torch.sin(1.0 + i)
    return 0.5 * (a * (x - b) ** 2).sum()


def network(data):
    """mean squares of a net 4-5-2 with tanh; theta = W1 [5,4], b1, W2 [2,5], b2 in PyTorch's order."""
    x, y = torch.from_numpy(data["net.x"]), torch.from_numpy(data["net.y"])

    def loss(t):
        hidden = torch.tanh(x @ t[:20].view(5, 4).T + t[20:25])
        return ((hidden @ t[25:35].view(2, 5).T + t[35:37] - y) ** 2).mean()
    return loss


def lbfgs(problem, start, steps, **options):
    theta = torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], **options)

    def closure():
        optimizer.zero_grad()
        loss = problem(theta)
        loss.backward()
        return loss
    thetas, losses, counts = [], [], []
    for _ in range(steps):
        losses.append(optimizer.step(closure).item())
        thetas.append(theta.detach().numpy().copy())
        state = optimizer.state[theta]
        counts.append([state["n_iter"], state["func_evals"]])
    return np.array(thetas), np.array(losses), np.array(counts, dtype=np.int64)


def lbfgs_case(name, problem, kind, start, steps, **options):
    start = np.array(start)
    thetas, losses, counts = lbfgs(problem, start, steps, **options)
    moved, _, moved_counts = lbfgs(problem, start * (1 + 4e-16 * np.cos(np.arange(len(start)))) + 1e-17, steps, **options)
    difference = np.abs(thetas - moved).max(axis=1) / np.abs(thetas).max(axis=1)
    same = (difference < 1e-11) & (counts == moved_counts).all(axis=1)
    keep = steps if same.all() else int(np.argmin(same))
    assert keep > 0, name
    golden[f"lbfgs.{name}.start"] = start
    golden[f"lbfgs.{name}.theta"] = thetas[:keep]
    golden[f"lbfgs.{name}.loss"] = losses[:keep]
    golden[f"lbfgs.{name}.count"] = counts[:keep]
    texts = dict(options)
    texts["search"] = 1 if texts.pop("line_search_fn", None) else 0
    metadata[f"lbfgs.{name}"] = f"problem={kind} " + " ".join(f"{k}={v}" for k, v in texts.items())
    print(f"{name}: {keep} of {steps} steps, counts {counts[keep - 1]}, losses {losses[0]:.3g} to {losses[keep - 1]:.3g}, "
          f"sensitivity {difference[:keep].max():.1e}")


def lbfgs_cases():
    rng = np.random.default_rng(1)
    golden["net.x"] = rng.standard_normal((12, 4))
    golden["net.y"] = rng.standard_normal((12, 2))
    net, theta = network(golden), 0.5 * rng.standard_normal(37)
    classic, chain = [-1.2, 1.0], [-1.2, 1.0] * 5
    wolfe = dict(line_search_fn="strong_wolfe")
    lbfgs_case("rosenbrock", rosenbrock, "rosenbrock", classic, 3, **wolfe)
    lbfgs_case("rosenbrock_each", rosenbrock, "rosenbrock", classic, 40, max_iter=1, max_eval=25, **wolfe)
    lbfgs_case("rosenbrock_plain", rosenbrock, "rosenbrock", classic, 12, lr=0.3, max_iter=5, max_eval=6)
    lbfgs_case("rosenbrock_history", rosenbrock, "rosenbrock", chain, 10, max_iter=4, max_eval=40, history_size=3, **wolfe)
    lbfgs_case("rosenbrock_short", rosenbrock, "rosenbrock", chain, 10, max_iter=3, max_eval=4, **wolfe)
    lbfgs_case("rosenbrock_lr", rosenbrock, "rosenbrock", chain, 10, lr=20.0, max_iter=2, max_eval=50, **wolfe)
    lbfgs_case("rosenbrock_small", rosenbrock, "rosenbrock", chain, 10, lr=1e-3, max_iter=2, max_eval=50, **wolfe)
    lbfgs_case("rosenbrock_far", rosenbrock, "rosenbrock", classic, 6, lr=1e5, max_iter=3, max_eval=60, history_size=1, **wolfe)
    lbfgs_case("rosenbrock_end", rosenbrock, "rosenbrock", chain, 6, lr=1e3, max_iter=3, max_eval=60, history_size=1, **wolfe)
    lbfgs_case("bowl", bowl, "bowl", np.zeros(10), 6)
    lbfgs_case("bowl_wolfe", bowl, "bowl", np.zeros(10), 6, **wolfe)
    lbfgs_case("bowl_history", bowl, "bowl", np.zeros(10), 12, lr=0.5, max_iter=4, max_eval=5, history_size=2)
    lbfgs_case("net", net, "net", theta, 10, max_iter=4, max_eval=5)
    lbfgs_case("net_wolfe", net, "net", theta, 10, max_iter=4, max_eval=20, **wolfe)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011)."""
    c, k, word = list(counter), list(key), 0xffffffff
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & word, (p0 >> 32) ^ c[3] ^ k[1], p0 & word]
        k = [k[0] + 0x9E3779B9 & word, k[1] + 0xBB67AE85 & word]
    return c


def pair(seed, stream, index):
    w = philox([index & 0xffffffff, index >> 32, stream & 0xffffffff, stream >> 32], [seed & 0xffffffff, seed >> 32])
    return [((w[1] << 32 | w[0]) >> 11) * 2.0 ** -53, ((w[3] << 32 | w[2]) >> 11) * 2.0 ** -53]


def uniform(seed, stream, index):
    return pair(seed, stream, index // 2)[index % 2]


def normal(seed, stream, index):
    u = pair(seed, stream, index // 2)
    radius, angle = math.sqrt(-2 * math.log(1 - u[0])), 2 * math.pi * u[1]
    return radius * (math.sin(angle) if index % 2 else math.cos(angle))


STREAM = 9 << 56


class Cmaes:
    def __init__(self, mean, sigma, population, seed):
        n = len(mean)
        self.n, self.mean, self.sigma, self.seed, self.g = n, np.array(mean), sigma, seed, 0
        self.population = population or 4 + int(3 * math.log(n))
        raw = np.array([math.log((self.population + 1) / 2) - math.log(i) for i in range(1, self.population + 1)])
        mu = self.mu = self.population // 2
        self.mu_eff = raw[:mu].sum() ** 2 / (raw[:mu] ** 2).sum()
        mu_eff_minus = raw[mu:].sum() ** 2 / (raw[mu:] ** 2).sum()
        self.cc = (4 + self.mu_eff / n) / (n + 4 + 2 * self.mu_eff / n)
        self.cs = (self.mu_eff + 2) / (n + self.mu_eff + 5)
        self.ds = 1 + 2 * max(0, math.sqrt((self.mu_eff - 1) / (n + 1)) - 1) + self.cs
        self.c1 = 2 / ((n + 1.3) ** 2 + self.mu_eff)
        self.cmu = min(1 - self.c1, 2 * (1 / 4 + self.mu_eff + 1 / self.mu_eff - 2) / ((n + 2) ** 2 + 2 * self.mu_eff / 2))
        least = min(1 + self.c1 / self.cmu, 1 + 2 * mu_eff_minus / (self.mu_eff + 2), (1 - self.c1 - self.cmu) / (n * self.cmu))
        self.w = np.where(raw >= 0, raw / raw[raw > 0].sum(), least / -raw[raw < 0].sum() * raw)
        self.every = max(1, math.floor(1 / (10 * n * (self.c1 + self.cmu))))
        self.C, self.root, self.inverse = np.eye(n), np.eye(n), np.eye(n)
        self.ps, self.pc, self.E = np.zeros(n), np.zeros(n), math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n ** 2))

    def step(self, loss):
        n = self.n
        z = np.array([[normal(self.seed, STREAM + self.g, k * n + i) for i in range(n)] for k in range(self.population)])
        y = z @ self.root
        values = [loss(self.mean + self.sigma * row) for row in y]
        y = y[np.argsort(values, kind="stable")]
        mean_y = self.w[:self.mu] @ y[:self.mu]
        self.mean = self.mean + self.sigma * mean_y
        self.ps = (1 - self.cs) * self.ps + math.sqrt(self.cs * (2 - self.cs) * self.mu_eff) * (self.inverse @ mean_y)
        length = np.linalg.norm(self.ps)
        h = length / math.sqrt(1 - (1 - self.cs) ** (2 * (self.g + 1))) < (1.4 + 2 / (n + 1)) * self.E
        self.pc = (1 - self.cc) * self.pc + h * math.sqrt(self.cc * (2 - self.cc) * self.mu_eff) * mean_y
        w = [a if a >= 0 else a * n / np.sum((self.inverse @ row) ** 2) for a, row in zip(self.w, y)]
        delta = (1 - h) * self.cc * (2 - self.cc)
        self.C = (1 + self.c1 * delta - self.c1 - self.cmu * self.w.sum()) * self.C + self.c1 * np.outer(self.pc, self.pc) \
            + self.cmu * sum(a * np.outer(row, row) for a, row in zip(w, y))
        self.sigma *= math.exp(self.cs / self.ds * (length / self.E - 1))
        self.g += 1
        if self.g % self.every == 0:
            values_c, vectors = np.linalg.eigh(self.C)
            self.root = (vectors * np.sqrt(values_c)) @ vectors.T
            self.inverse = (vectors / np.sqrt(values_c)) @ vectors.T
        return min(values)


def cmaes_cases():
    bowl10 = lambda x: float(bowl(torch.from_numpy(x)))
    rosenbrock_of = lambda x: float(rosenbrock(torch.from_numpy(x)))
    for name, problem, start, sigma, population, seed, steps in (
            ("bowl", bowl10, np.zeros(10), 0.5, 0, 7, 60), ("rosenbrock", rosenbrock_of, np.array([-1.2, 1.0]), 0.3, 0, 8, 60),
            ("large", bowl10, np.zeros(5), 1.0, 40, 9, 40), ("lazy", bowl10, np.zeros(100), 0.5, 4, 10, 60)):
        s, rows = Cmaes(start, sigma, population, seed), []
        for _ in range(steps):
            best = s.step(problem)
            rows.append(np.concatenate([[best, s.sigma], s.mean]))
        golden[f"cmaes.{name}"] = np.array(rows)
        kind = name if name == "rosenbrock" else "bowl"
        metadata[f"cmaes.{name}"] = f"problem={kind} sigma={sigma} population={population} seed={seed}"
        print(f"cmaes {name}: least loss {rows[0][0]:.3g} to {rows[-1][0]:.3g}, sigma {rows[-1][1]:.3g}, eigh every {s.every}")


def spsa_case():
    theta, rows, seed, a, c = np.zeros(10), [], 11, 2e-3, 1e-2
    for k in range(50):
        delta = np.array([-1.0 if uniform(seed, STREAM + k, i) < 0.5 else 1.0 for i in range(10)])
        ak, ck = a / (k + 1 + 5) ** 0.602, c / (k + 1) ** 0.101
        plus, minus = (float(bowl(torch.from_numpy(theta + sign * ck * delta))) for sign in (1, -1))
        theta = theta - ak * (plus - minus) / (2 * ck) / delta
        rows.append(np.concatenate([[(plus + minus) / 2], theta]))
    golden["spsa"] = np.array(rows)
    metadata["spsa"] = f"problem=bowl seed={seed} a={a} c={c} stability=5"
    print(f"spsa: {rows[0][0]:.3g} to {rows[-1][0]:.3g}")


def least_squares():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 6))
    y = x @ rng.standard_normal(6) + 0.5 * rng.standard_normal(64)
    golden["squares.x"], golden["squares.y"] = x, y
    golden["squares.solution"] = np.linalg.lstsq(x, y, rcond=None)[0]
    curvature = np.linalg.eigvalsh(x.T @ x / 64)
    print(f"least squares: eigenvalues {curvature[0]:.3f} to {curvature[-1]:.3f}, largest of one batch "
          f"{max(np.linalg.eigvalsh(x[i:i + 8].T @ x[i:i + 8] / 8)[-1] for i in range(0, 64, 8)):.3f}")


def natural_run(name, theta, steps, lr, damping, scale, diagonal, pieces):
    """pieces(theta, step) -> the gradient of the loss, the rows of G, the number of examples."""
    thetas = []
    for step in range(steps):
        g, rows, examples = pieces(theta, step)
        fisher = scale / examples * rows.T @ rows
        if diagonal:
            fisher = np.diag(np.diag(fisher))
        theta = theta - lr * np.linalg.solve(fisher + damping * np.eye(len(theta)), g)
        thetas.append(theta)
    golden[f"natural.{name}"] = np.array(thetas)


def natural_cases():
    x, y = golden["squares.x"], golden["squares.y"]
    start = np.sin(1.0 + np.arange(6))
    mean = lambda t: x.T @ (x @ t - y) / 64
    pieces = {
        "empirical": lambda t, step: (mean(t), (x @ t - y)[:, None] * x, 64),
        "sampled": lambda t, step: (mean(t), -np.array([normal(21, step, i) for i in range(64)])[:, None] * x, 64),
        "gauss_newton": lambda t, step: (mean(t), x, 64),
    }
    for name, of in pieces.items():
        natural_run(name, start, 5, 0.5, 0.1, 1.0, False, of)
        natural_run(name + "_diagonal", start, 5, 0.5, 0.1, 1.0, True, of)
    net_x, net_y = torch.from_numpy(golden["net.x"]), torch.from_numpy(golden["net.y"])

    def predict(t):
        return torch.tanh(net_x @ t[:20].view(5, 4).T + t[20:25]) @ t[25:35].view(2, 5).T + t[35:37]

    def per_example(t):
        return ((predict(t) - net_y) ** 2).mean(dim=1)

    def net_pieces(function):
        def of(theta, step):
            t = torch.from_numpy(theta)
            rows = torch.autograd.functional.jacobian(function, t).reshape(-1, 37).numpy()
            return torch.autograd.functional.jacobian(per_example, t).mean(dim=0).numpy(), rows, 12
        return of
    theta = golden["lbfgs.net.start"]
    natural_run("net_gauss_newton", theta, 4, 1.0, 0.05, 1.0, False, net_pieces(predict))
    natural_run("net_empirical", theta, 4, 0.3, 0.05, 1.0, False, net_pieces(per_example))
    last = golden["natural.net_gauss_newton"][-1]
    print(f"natural: net, Gauss-Newton, loss {per_example(torch.from_numpy(theta)).mean():.3g} to "
          f"{per_example(torch.from_numpy(last)).mean():.3g} in 4 steps")


def patches(x, m):
    """[N, T, features]: what each of the T outputs of a convolution sees of x [N, C, spatial...]."""
    if isinstance(m, torch.nn.Conv3d):
        x = torch.nn.functional.pad(x, [p for p in reversed(m.padding) for _ in range(2)])
        for axis in range(3):
            x = x.unfold(2 + axis, m.kernel_size[axis], m.stride[axis])
        return x.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(1, 3)
    sizes = [m.kernel_size, m.dilation, m.padding, m.stride]
    if isinstance(m, torch.nn.Conv1d):
        x, sizes = x.unsqueeze(-1), [s + (rest,) for s, rest in zip(sizes, (1, 1, 0, 1))]
    return torch.nn.functional.unfold(x, *sizes).transpose(1, 2)


def kfac_step(A, G, gradient, damping, tikhonov):
    """The natural gradient of one layer, [out, in], by dense solutions."""
    if tikhonov == "exact":
        fisher = torch.kron(G, A) + damping * torch.eye(len(G) * len(A))
        return torch.linalg.solve(fisher, gradient.reshape(-1)).view_as(gradient)
    pi = math.sqrt((A.trace() / len(A)) / (G.trace() / len(G)))
    v = torch.linalg.solve(G + math.sqrt(damping) / pi * torch.eye(len(G)), gradient)
    return torch.linalg.solve(A + pi * math.sqrt(damping) * torch.eye(len(A)), v.T).T


def kfac_case(name, net, shape, fisher, tikhonov, lr, damping, kl_clip, steps, seed):
    """2 outputs; N = 12; all but linear layers and plain convolutions keep their gradient. sampled: labels from N(prediction, 1).
    `sources` are sums over the examples, so that the gradients are those of each example."""
    y, momentum, decay, every, inverse_every, N = torch.from_numpy(golden["net.y"]), 0.9, 0.95, 2, 4, 12
    features = math.prod(shape)
    rng = np.random.default_rng(seed)
    start = 0.5 * rng.standard_normal(sum(p.numel() for p in net.parameters()))
    golden[f"{name}.x"] = golden["net.x"] if features == 4 else rng.standard_normal((N, features))
    x = torch.from_numpy(golden[f"{name}.x"]).view(N, *shape)
    torch.nn.utils.vector_to_parameters(torch.tensor(start), net.parameters())
    plain = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    layers = [m for m in net if isinstance(m, torch.nn.Linear) or (isinstance(m, plain) and m.groups == 1)]
    ones = {m: int(m.bias is not None) for m in layers}
    A = {m: torch.eye(m.weight[0].numel() + ones[m]) for m in layers}
    G = {m: torch.eye(len(m.weight)) for m in layers}
    inputs, outputs = {}, {}

    def remember(m, given, returned):
        inputs[m], outputs[m] = given[0], returned
    for m in layers:
        m.register_forward_hook(remember)
    buffers, thetas, losses, clips = {p: torch.zeros_like(p) for p in net.parameters()}, [], [], 0
    for step in range(steps):
        if step % every == 0:
            prediction = net(x)
            if fisher == "gauss_newton":
                sources = [prediction[:, j].sum() for j in range(2)]
            elif fisher == "sampled":
                noise = torch.tensor([normal(21, step, i) for i in range(2 * N)]).view(N, 2)
                sources = [0.5 * ((prediction - (prediction.detach() + noise)) ** 2).sum()]
            else:
                sources = [((prediction - y) ** 2).mean(dim=1).sum()]
            for m in layers:
                a = inputs[m].detach()
                a = a.unsqueeze(1) if a.dim() == 2 else patches(a, m)
                a = torch.cat([a, torch.ones(*a.shape[:2], ones[m])], dim=2)
                A[m] = decay * A[m] + (1 - decay) * torch.einsum("nti,ntj->ij", a, a) / N
                fresh = 0
                for source in sources:
                    g, = torch.autograd.grad(source, outputs[m], retain_graph=True)
                    g = g.flatten(2).transpose(1, 2) if g.dim() > 2 else g.unsqueeze(1)
                    assert g.shape[1] == a.shape[1]
                    fresh = fresh + torch.einsum("nti,ntj->ij", g, g) / (N * g.shape[1])
                G[m] = decay * G[m] + (1 - decay) * fresh
        if step % inverse_every == 0:
            A_used, G_used = dict(A), dict(G)
        net.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        losses.append(loss.item())
        updates, total = {}, 0.0
        for m in layers:
            gradient = m.weight.grad.flatten(1)
            if ones[m]:
                gradient = torch.cat([gradient, m.bias.grad[:, None]], dim=1)
            v = kfac_step(A_used[m], G_used[m], gradient, damping, tikhonov)
            updates[m.weight] = v[:, :m.weight[0].numel()].reshape(m.weight.shape)
            if ones[m]:
                updates[m.bias] = v[:, -1]
            total += (v * gradient).sum().item() * lr ** 2
        nu = min(1.0, math.sqrt(kl_clip / total)) if kl_clip > 0 else 1.0
        clips += nu < 1
        for p in net.parameters():
            buffers[p] = momentum * buffers[p] + (nu * updates[p] if p in updates else p.grad)
            p.data -= lr * buffers[p]
        thetas.append(torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy().copy())
    golden[f"{name}.start"], golden[f"{name}.theta"], golden[f"{name}.loss"] = start, np.array(thetas), np.array(losses)
    metadata[name] = (f"fisher={['empirical', 'sampled', 'gauss_newton'].index(fisher)} "
                      f"tikhonov={['exact', 'factored'].index(tikhonov)} lr={lr} momentum={momentum} decay={decay} "
                      f"damping={damping} kl_clip={kl_clip} statistics_every={every} inverse_every={inverse_every}")
    print(f"{name}: {len(start)} parameters, loss {losses[0]:.3g} to {losses[-1]:.3g}, clipped {clips} of {steps} times")


def kfac_cases():
    nn = torch.nn

    def dense():
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 2))

    def conv1d():
        return nn.Sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3, groups=2), nn.ConvTranspose1d(4, 2, 2),
                             nn.Flatten(), nn.Linear(10, 2))

    def conv2d():
        return nn.Sequential(nn.Conv2d(2, 3, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), nn.Tanh(),
                             nn.Conv2d(3, 2, 2, bias=False), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))

    def conv3d():
        return nn.Sequential(nn.Conv3d(1, 2, 2, stride=2, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    kfac_case("kfac", dense(), (4,), "sampled", "exact", 0.05, 1e-3, 1e-3, 30, 4)
    kfac_case("kfac.factored", dense(), (4,), "sampled", "factored", 0.05, 1e-2, 0.0, 20, 4)
    kfac_case("kfac.conv1d", conv1d(), (2, 6), "empirical", "factored", 0.03, 1e-2, 1e-3, 16, 5)
    kfac_case("kfac.conv2d", conv2d(), (2, 5, 6), "sampled", "exact", 0.03, 1e-2, 1e-3, 16, 6)
    kfac_case("kfac.conv2d_newton", conv2d(), (2, 5, 6), "gauss_newton", "factored", 0.02, 1e-1, 0.0, 16, 6)
    kfac_case("kfac.conv3d", conv3d(), (1, 3, 2, 3), "sampled", "exact", 0.03, 1e-2, 0.0, 16, 7)


if __name__ == "__main__":
    lbfgs_cases()
    cmaes_cases()
    spsa_case()
    least_squares()
    natural_cases()
    kfac_cases()
    save_file({k: np.ascontiguousarray(v) for k, v in golden.items()}, HERE / "solvers.safetensors", metadata)
