#!/usr/bin/env python3
"""Makes the golden numbers of tests/test_nirdot_net.c, beside this script:

    nirdot_net.safetensors        outputs, losses of ten training steps, parameter counts
    nirdot_net_state.safetensors  a state_dict of small networks as PyTorch writes it, and in `golden` what they give

usage, from the repository root:
    python tests/golden/make_nirdot_net.py                 write the two files
    python tests/golden/make_nirdot_net.py --check FILE    FILE, written by dot_save, loads into the small networks and is theirs

Made with Python 3.11, torch 2.15.0, numpy 2.4.6, safetensors 0.8.0. Everything is computed in double precision. First weights, volumes
and tokens come from one integer formula, `uniform`, which the test has too (tests/golden/make_training.py explains it).
"""
import math
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

HERE = pathlib.Path(__file__).parent
golden = {}


def uniform(stream, count):
    mask = np.uint64(0xffffffff)
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9e3779b1)
    x = (x + np.uint64(stream * 0x85ebca77 + 0x165667b1 & 0xffffffff)) & mask
    x ^= x >> np.uint64(16)
    x = x * np.uint64(0x7feb352d) & mask
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x846ca68b) & mask
    x ^= x >> np.uint64(16)
    return (x >> np.uint64(8)).astype(np.float64) * 2.0 ** -24


def tensor(stream, *shape):
    """Uniform in [-1, 1)."""
    return torch.from_numpy(2 * uniform(stream, math.prod(shape)) - 1).reshape(shape)


def stream_of(name):
    """FNV-1a, 32 bits."""
    h = 0x811c9dc5
    for byte in name.encode():
        h = (h ^ byte) * 0x01000193 & 0xffffffff
    return h


def set_parameters(net):
    """Matrices and kernels uniform in +-1/sqrt(fan_in), other parameters in +-0.1, and around 1 for the factors of norms. All are
    rounded to float."""
    for name, p in net.named_parameters():
        draw = tensor(stream_of(name), *p.shape)
        if p.dim() >= 2:
            draw = draw / math.sqrt(p[0].numel())
        elif name.endswith(".weight"):
            draw = 1 + draw / 10
        else:
            draw = draw / 10
        with torch.no_grad():
            p.copy_(draw.float())


# ---- stage 1 --------------------------------------------------------------------------------------------------------

def norm_of(o, channels):
    if o["norm"] == "batch":
        return nn.BatchNorm3d(channels)
    groups = o["groups"]
    while channels % groups:
        groups -= 1
    return nn.GroupNorm(groups, channels)


class Conv(nn.Module):
    def __init__(self, o, conv, channels, relu):
        super().__init__()
        self.conv = conv
        self.norm = norm_of(o, channels)
        self.relu = relu

    def forward(self, x):
        y = self.norm(self.conv(x))
        return torch.relu(y) if self.relu else y


class Block(nn.Module):
    def __init__(self, o, cin, cout, stride, attention):
        super().__init__()
        self.first = Conv(o, nn.Conv3d(cin, cout, 3, stride, 1, bias=False), cout, True)
        self.second = Conv(o, nn.Conv3d(cout, cout, 3, 1, 1, bias=False), cout, False)
        self.skip = Conv(o, nn.Conv3d(cin, cout, 1, stride, bias=False), cout, False)
        self.attention = attention
        if attention:
            self.squeeze = nn.Conv3d(cout, max(cout // 8, 1), 1)
            self.map = nn.Conv3d(max(cout // 8, 1), 1, 1)

    def forward(self, x):
        y = torch.relu(self.second(self.first(x)) + self.skip(x))
        return y * torch.sigmoid(self.map(torch.relu(self.squeeze(y)))) if self.attention else y


class Encoder(nn.Module):
    def __init__(self, o):
        super().__init__()
        k = o["stem_kernel"]
        self.stem = Conv(o, nn.Conv3d(2, o["stem"], k, 2, k // 2, bias=False), o["stem"], True)
        widths = [o["stem"]] + o["width"]
        self.stages = nn.ModuleList(
            Block(o, a, b, 2 if i else 1, i >= len(o["width"]) - o["attention"])
            for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.flatten = o["flatten"]
        if self.flatten:
            self.to_latent = nn.Sequential(nn.Flatten(), nn.Linear(widths[-1] * (o["n"] >> len(o["width"]) + 1) ** 3, o["latent"]))
        else:
            self.to_latent = nn.Linear(widths[-1], o["latent"])

    def forward(self, x):
        x = nn.functional.max_pool3d(self.stem(x), 3, 2, 1)
        for stage in self.stages:
            x = stage(x)
        return self.to_latent(x if self.flatten else x.mean((2, 3, 4)))


class Decoder(nn.Module):
    def __init__(self, o):
        super().__init__()
        widths = [o["width"][-1]] + o["up_width"]
        self.expand = nn.Sequential(nn.Linear(o["latent"], 8 * widths[0]), nn.Unflatten(1, (widths[0], 2, 2, 2)))
        self.ups = nn.ModuleList(Conv(o, nn.ConvTranspose3d(a, b, 4, 2, 1), b, True) for a, b in zip(widths, widths[1:]))
        self.subvoxel = o["subvoxel"]
        self.output = nn.Conv3d(widths[-1], 16 if self.subvoxel else 2, 3, 1, 1)

    def forward(self, z):
        x = self.expand(z)
        for up in self.ups:
            x = up(x)
        x = self.output(x)
        if self.subvoxel:       # channels are (z, y, x, channel) of the voxels inside
            n, _, d, h, w = x.shape
            x = x.reshape(n, 2, 2, 2, 2, d, h, w).permute(0, 4, 5, 1, 6, 2, 7, 3).reshape(n, 2, 2 * d, 2 * h, 2 * w)
        return x


class Autoencoder(nn.Module):
    def __init__(self, o):
        super().__init__()
        self.encoder = Encoder(o)
        self.decoder = Decoder(o)

    def forward(self, x):
        return self.decoder(self.encoder(x))


# ---- stage 2 --------------------------------------------------------------------------------------------------------

def branch(*widths):
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers += [nn.Linear(a, b), nn.GELU(), nn.LayerNorm(b)]
    return nn.Sequential(*layers)


class Transformer(nn.Module):
    def __init__(self, o):
        super().__init__()
        d = o["d"]
        self.signal = branch(2, 16, 32)
        self.position = branch(o["position"], 32, 64)
        self.token = nn.Sequential(nn.Linear(96, o["fuse"]), nn.GELU(), nn.LayerNorm(o["fuse"]), nn.Linear(o["fuse"], d))
        self.project = nn.Linear(d, d)
        if o["context"]:
            self.context = nn.Linear(o["context"], d)
        self.token_type = nn.Parameter(torch.zeros(d))
        layer = nn.TransformerEncoderLayer(d, o["heads"], o["ffn"], dropout=0.0, activation="gelu", batch_first=True,
                                           norm_first=o["pre_norm"])
        self.encoder = nn.TransformerEncoder(layer, o["layers"], norm=nn.LayerNorm(d), enable_nested_tensor=False)
        if o["queries"]:
            self.query = nn.Parameter(torch.zeros(o["queries"], d))
            self.key, self.value = nn.Linear(d, d), nn.Linear(d, d)
            self.pool = nn.Linear(o["queries"] * d, d)
        self.head = nn.Sequential(nn.Linear(d, o["head"]), nn.ReLU(), nn.Linear(o["head"], o["latent"]))
        self.o = o

    def forward(self, signal, position, keep, context):
        x = self.project(self.token(torch.cat([self.signal(signal), self.position(position)], -1))) + self.token_type
        if self.o["context"]:
            x = x + self.context(context)[:, None]
        x = self.encoder(x, src_key_padding_mask=~keep)
        if not self.o["queries"]:
            weight = keep.double() / keep.sum(1, keepdim=True)
            return self.head((x * weight[..., None]).sum(1))
        scores = torch.einsum("qd,ntd->nqt", self.query, self.key(x)) / math.sqrt(self.o["d"])
        weight = scores.masked_fill(~keep[:, None], -math.inf).softmax(-1)
        return self.head(self.pool(torch.einsum("nqt,ntd->nqd", weight, self.value(x)).flatten(1)))


# ---- cases: the same stand in the test ---------------------------------------------------------------------------------

SMOKE = dict(n=16, stem=8, stem_kernel=3, width=[16, 32], latent=32, up_width=[16, 16], subvoxel=True, norm="batch", groups=8,
             attention=0, flatten=True)
AUTOENCODERS = {
    "smoke": SMOKE,
    "group": dict(SMOKE, norm="group", attention=2, width=[12, 32], flatten=False),
    "original": dict(n=16, stem=8, stem_kernel=7, width=[8, 16], latent=24, up_width=[16, 8, 8], subvoxel=False, norm="batch",
                     groups=8, attention=1, flatten=False),
    "small": dict(n=32, stem=8, stem_kernel=3, width=[16, 32, 64], latent=128, up_width=[32, 16, 16], subvoxel=True, norm="batch",
                  groups=8, attention=0, flatten=True),
    "full": dict(n=64, stem=16, stem_kernel=7, width=[32, 64, 128, 256], latent=256, up_width=[128, 64, 32, 16, 16],
                 subvoxel=False, norm="batch", groups=8, attention=0, flatten=False),
}
POST = dict(position=6, context=0, d=32, layers=1, heads=4, ffn=64, fuse=48, queries=4, head=32, latent=32, pre_norm=False)
TRANSFORMERS = {
    "smoke": POST,
    "pre": dict(POST, position=9, context=5, layers=2, queries=0, pre_norm=True),
    "small": dict(POST, d=96, layers=3, ffn=192, fuse=144, head=48, latent=128),
    "full": dict(POST, d=256, layers=8, heads=8, ffn=1024, fuse=384, head=128, latent=256),
}
BATCH, TOKENS, STEPS, STRIDE = 4, 20, 10, 53
# A bias before batch normalisation has the gradient 0, but for rounding, which Adam would blow up to whole steps: eps is larger than it.
EPS = 1e-5
IMPORTANCE = (2.0, 1.0)


def volume_batch(step, n):
    """Volumes [N, 2, n, n, n] and voxel weights 0 or 1 (some 4)."""
    x = tensor(1000 + step, BATCH, n, n, n, 2).permute(0, 4, 1, 2, 3)
    u = torch.from_numpy(uniform(2000 + step, BATCH * n ** 3)).reshape(BATCH, 1, n, n, n)
    return x, torch.where(u < 0.4, 0.0, torch.where(u < 0.9, 1.0, 4.0)).double()


def token_batch(step, o):
    keep = torch.from_numpy(uniform(3000 + step, BATCH * TOKENS)).reshape(BATCH, TOKENS) < 0.8
    keep[:, 0] = True
    return (tensor(4000 + step, BATCH, TOKENS, 2), tensor(5000 + step, BATCH, TOKENS, o["position"]), keep,
            tensor(6000 + step, BATCH, max(o["context"], 1)))


def rmse_loss(prediction, truth, weight):
    mean = ((prediction - truth) ** 2 * weight).sum((0, 2, 3, 4)) / weight.sum()
    return sum(c * (m + 1e-12).sqrt() for c, m in zip(IMPORTANCE, mean))


def sample(x):
    """Every STRIDE-th element of [N, D, H, W, C]."""
    return x.permute(0, 2, 3, 4, 1).reshape(-1)[::STRIDE].contiguous()


def train_autoencoder(name, o):
    net = Autoencoder(o).double()
    set_parameters(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=1e-2, eps=EPS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS)
    losses = []
    for step in range(STEPS):
        x, weight = volume_batch(step, o["n"])
        if step == 0:
            golden[f"autoencoder.{name}.first"] = sample(net.eval()(x)).detach()
            net.train()
        optimizer.zero_grad()
        loss = rmse_loss(net(x), x, weight)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step() if step < STEPS - 1 else None
        losses.append(loss.item())
    golden[f"autoencoder.{name}.losses"] = torch.tensor(losses, dtype=torch.float64)
    x, _ = volume_batch(STEPS, o["n"])
    net.eval()
    golden[f"autoencoder.{name}.latent"] = net.encoder(x).detach()
    golden[f"autoencoder.{name}.output"] = sample(net(x)).detach()
    return net


def train_transformer(name, o, decoder, n):
    """Through the frozen decoder where there is one, else towards a given latent."""
    net = Transformer(o).double()
    set_parameters(net)
    decay = [p for p in net.parameters() if p.dim() >= 2]
    rest = [p for p in net.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=2e-3,
                                  betas=(0.9, 0.98), eps=EPS)

    def multiplier(step):
        if step < 2:
            return (step + 1) / 2
        return 0.03 + 0.97 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2))) / 2

    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * multiplier(step)
        optimizer.zero_grad()
        z = net(*token_batch(step, o))
        if step == 0:
            golden[f"transformer.{name}.first"] = z.detach()
        if decoder:
            x, weight = volume_batch(step, n)
            loss = rmse_loss(decoder(z), x, weight)
        else:
            loss = ((z - tensor(7000 + step, BATCH, o["latent"])) ** 2).mean().sqrt()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    golden[f"transformer.{name}.losses"] = torch.tensor(losses, dtype=torch.float64)
    golden[f"transformer.{name}.output"] = net(*token_batch(STEPS, o)).detach()


# ---- the state_dict ----------------------------------------------------------------------------------------------------

class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.autoencoder = Autoencoder(dict(SMOKE, stem=4, width=[4, 8], latent=8, up_width=[8, 4]))
        self.transformer = Transformer(dict(POST, d=8, heads=2, ffn=8, fuse=8, queries=2, head=8, latent=8))


def small_networks():
    """With weights as PyTorch draws them, and running statistics of one batch."""
    torch.manual_seed(5)
    net = Both()
    with torch.no_grad():
        net.autoencoder(volume_batch(0, 16)[0].float())
    return net.eval()


def store_state():
    net = small_networks()
    save_file(net.state_dict(), HERE / "nirdot_net_state.safetensors")
    net = net.double()
    golden["state.volume."] = sample(net.autoencoder(volume_batch(1, 16)[0])).detach()
    golden["state.latent."] = net.transformer(*token_batch(1, net.transformer.o)).detach()


def check(path):
    ours = load_file(path)
    net = small_networks()
    theirs = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(ours)
    wrong = [k for k, v in theirs.items() if not torch.equal(v, ours[k])]
    print("differs:" if wrong else "loaded; every tensor is equal", *wrong)
    return bool(wrong)


def main():
    if sys.argv[1:2] == ["--check"]:
        sys.exit(check(sys.argv[2]))
    for name, o in AUTOENCODERS.items():
        golden[f"autoencoder.{name}.count"] = torch.tensor([sum(p.numel() for p in m.parameters())
                                                            for m in (Autoencoder(o), Encoder(o), Decoder(o))]).double()
    for name, o in TRANSFORMERS.items():
        golden[f"transformer.{name}.count"] = torch.tensor([sum(p.numel() for p in Transformer(o).parameters())]).double()
    for name in ("smoke", "group", "original"):
        net = train_autoencoder(name, AUTOENCODERS[name])
        if name == "smoke":
            for p in net.parameters():
                p.requires_grad_(False)
            train_transformer("smoke", TRANSFORMERS["smoke"], net.decoder.eval(), 16)
    train_transformer("pre", TRANSFORMERS["pre"], None, 0)
    store_state()
    save_file(golden, HERE / "nirdot_net.safetensors")


main()
