#!/usr/bin/env python3
"""Makes nirdot_metrics.safetensors, the golden numbers of tests/test_nirdot_data.c, beside this script.
usage: python make_nirdot_metrics.py

Two cases of 20^3 voxels, images and truths of two channels that look like mu_a and mu_s' (float32); everything else is
computed from them in float64 by
  scikit-image 0.26.0: structural_similarity (Gaussian window, population covariances; with sigma = 1 as well), its map,
                       peak_signal_noise_ratio
  SciPy 1.17.1:        ndimage.label (26 neighbours), ndimage.gaussian_filter, optimize.linear_sum_assignment,
                       optimize.minimize (distance to an ellipsoid), stats.bootstrap, stats.sem, stats.entropy,
                       spatial.distance.cosine
  NumPy 2.4.6:         median, mean, std
safetensors 0.8.0 writes the file.
"""
import pathlib

import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.spatial.distance
import scipy.stats
from safetensors.numpy import save_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

HERE = pathlib.Path(__file__).parent
N, H = 20, 3.0
RANGE = (0.0245, 2.95)
REACH = 10.0
rng = np.random.default_rng(20261122)
golden = {}

grid = (np.arange(N) + 0.5 - N / 2) * H
Z, Y, X = np.meshgrid(grid, grid, grid, indexing="ij")


def ellipsoid(centre, axes):
    return sum(((c - m) / a) ** 2 for c, m, a in zip((X, Y, Z), centre, axes)) <= 1


def phantom(tumours, noise, blur, ghosts):
    """A labelled phantom, its properties, and a blurred, noisy image of it with false lesions."""
    tissue = ellipsoid((1.0, -0.5, 0.0), (27.0, 25.0, 22.0))
    label = tissue.astype(np.uint8)
    for k, (centre, axes) in enumerate(tumours):
        label[ellipsoid(centre, axes) & (label == 1)] = k + 2
    truth = np.zeros((N, N, N, 2))
    image = np.zeros_like(truth)
    for c, (background, contrasts) in enumerate(((0.0052, (2.1, 2.9, 1.7, 2.4)), (0.95, (1.8, 1.5, 1.9, 1.6)))):
        truth[..., c][label == 1] = background
        for k in range(len(tumours)):
            truth[..., c][label == k + 2] = background * contrasts[k]
        smooth = scipy.ndimage.gaussian_filter(truth[..., c] - background * tissue, blur) + background
        for centre, axes, height in ghosts[c]:
            smooth[ellipsoid(centre, axes)] += height * background
        smooth *= 1 + noise * scipy.ndimage.gaussian_filter(rng.normal(size=label.shape), 1) * 5
        image[..., c] = smooth * tissue
    return label, truth.astype(np.float32), image.astype(np.float32)


def components(detected, contrast):
    """Centroids, in mm as x, y, z, of the components, and their masks."""
    mark, count = scipy.ndimage.label(detected, structure=np.ones((3, 3, 3)))
    masks = [mark == i + 1 for i in range(count)]
    centroids = [[np.average(axis[m], weights=contrast[m]) for axis in (X, Y, Z)] for m in masks]
    return np.array(centroids).reshape(count, 3), masks


def seed_compatible(truth, image):
    """RMSE, PSNR and SSIM of both channels and all voxels with data range 1, zeros around the volume, no crop."""
    def mean(v):
        return scipy.ndimage.gaussian_filter(v, (1.5, 1.5, 1.5, 0), mode="constant", truncate=3.5)
    x, y = image.astype(float), truth.astype(float)
    ux, uy = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - ux**2, mean(y * y) - uy**2, mean(x * y) - ux * uy
    ssim = (2 * ux * uy + 1e-4) * (2 * vxy + 9e-4) / ((ux**2 + uy**2 + 1e-4) * (vx + vy + 9e-4))
    return np.array([np.sqrt(np.mean((x - y) ** 2)), peak_signal_noise_ratio(y, x, data_range=1.0), ssim.mean()])


def score(label, truth, image, c):
    x, y = image[..., c].astype(float), truth[..., c].astype(float)
    tissue, tumour = label > 0, label > 1
    background = tissue & ~tumour
    out = {"rmse": np.sqrt(np.mean((x - y)[tissue] ** 2)), "rmse_all": np.sqrt(np.mean((x - y) ** 2))}
    out["nrmse"] = out["rmse"] / y[tissue].mean()
    out["psnr"] = peak_signal_noise_ratio(y, x, data_range=RANGE[c])
    how = dict(data_range=RANGE[c], gaussian_weights=True, use_sample_covariance=False, full=True)
    out["ssim"], similarity = structural_similarity(y, x, sigma=1.5, **how)
    out["ssim_tissue"] = similarity[tissue].mean()
    out["ssim_narrow"], _ = structural_similarity(y, x, sigma=1.0, **how)     # its radius is 4
    contrast = x - np.median(x[tissue])
    detected = tissue & (contrast > 0.5 * contrast[tissue].max())
    out["dice"] = 2 * (detected & tumour).sum() / (detected.sum() + tumour.sum())
    out["contrast_recovery"] = (x[tumour].mean() - x[background].mean()) / (y[tumour].mean() - y[background].mean())
    out["peak_contrast_recovery"] = contrast[tissue].max() / (y - y[background].mean())[tissue].max()
    w = tumour.sum() / tissue.sum()
    spread = np.sqrt(w * x[tumour].var() + (1 - w) * x[background].var())
    out["cnr"] = (x[tumour].mean() - x[background].mean()) / spread
    out["volume_ratio"] = detected.sum() / tumour.sum()
    centroids, masks = components(detected, contrast)
    true = np.array([[axis[label == k].mean() for axis in (X, Y, Z)] for k in range(2, label.max() + 1)])
    whole = np.array([np.average(axis[detected], weights=contrast[detected]) for axis in (X, Y, Z)])
    out["nearest_tumour"] = np.linalg.norm(true - whole, axis=1).min()
    distance = np.linalg.norm(centroids[:, None] - true[None], axis=2)
    meet = np.array([[(m & (label == k + 2)).any() for k in range(len(true))] for m in masks])
    allowed = meet & (distance <= REACH)
    rows, columns = scipy.optimize.linear_sum_assignment(np.where(allowed, distance, 1e6))
    pairs = [(r, k) for r, k in zip(rows, columns) if allowed[r, k]]
    out["localisation_error"] = np.mean([distance[r, k] for r, k in pairs]) if pairs else np.nan
    out["detection_rate"] = len(pairs) / len(true)
    out["false_positives"] = len(masks) - len(pairs)
    return out


tumours = [((-9.0, 4.0, 3.0), (7.0, 6.0, 8.0)), ((11.0, -8.0, -2.0), (6.0, 7.0, 6.0)),
           ((2.0, 12.0, -9.0), (6.5, 6.0, 6.0)), ((-6.0, -8.0, 6.0), (7.0, 6.5, 6.0))]
ghosts = (((((12.0, 10.0, 8.0), (4.5, 4.5, 4.5), 1.6),), (((0.0, -15.0, 5.0), (4.5, 5.0, 4.5), 1.1),)))
cases = (phantom(tumours[:3], 0.02, 0.7, ghosts), phantom(tumours[:2] + tumours[3:], 0.05, 1.3, ghosts))
for i, (label, truth, image) in enumerate(cases):
    golden[f"label{i}"], golden[f"image{i}"] = label, image
    golden[f"seed_compatible{i}"] = seed_compatible(truth, image)
    golden[f"property{i}"] = np.array([truth[label == k][0] for k in range(label.max() + 1)])      # the truth, by label
    for c in range(2):
        for name, value in score(label, truth, image, c).items():
            golden[f"{name}.{i}.{c}"] = np.array([value], dtype=np.float64)

# ---- matching: the positions of 5 tumours and 7 components, which may meet, the number of pairs and their sum --------
REACH_WIDE = 25.0
table = []
for _ in range(60):
    there, found = (rng.uniform(-20, 20, (k, 3)).astype(np.float32) for k in (5, 7))
    meet = rng.random((7, 5)) < 0.45
    distance = np.linalg.norm(found[:, None].astype(float) - there[None].astype(float), axis=2)
    allowed = meet & (distance <= REACH_WIDE)
    rows, columns = scipy.optimize.linear_sum_assignment(np.where(allowed, distance, 1e6))
    picked = [distance[r, k] for r, k in zip(rows, columns) if allowed[r, k]]
    table.append(np.concatenate([there.ravel(), found.ravel(), meet.ravel(), [len(picked), np.sum(picked)]]))
golden["matching"] = np.array(table)

# ---- distance from a point to an ellipsoid's surface: rows of centre, semi-axes, rotation, point, depth --------------
rows = []
for k in range(24):
    axes = rng.uniform(22, 31, 3)
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    rotation *= np.sign(np.linalg.det(rotation))
    centre = rng.uniform(-2, 2, 3)
    direction = rng.normal(size=3)
    u = direction / np.linalg.norm(direction) * (rng.uniform(0, 0.97) if k < 18 else rng.uniform(1.05, 1.5))
    if k in (3, 4, 5):
        u[k - 3] = 0        # on a plane of symmetry
    if k == 6:
        u[:] = 0
    values = np.float32(np.concatenate([centre, axes, rotation.ravel()]))
    c64, a64, r64 = (values[:3].astype(float), values[3:6].astype(float), values[6:].reshape(3, 3).astype(float))
    point = c64 + r64.T @ (a64 * u)
    best = np.inf
    for start in rng.normal(size=(40, 3)):
        def surface(v):
            return c64 + r64.T @ (a64 * v / np.linalg.norm(v))
        best = min(best, scipy.optimize.minimize(lambda v: np.linalg.norm(surface(v) - point), start, method="BFGS",
                                                 options={"gtol": 1e-10}).fun)
    rows.append(np.concatenate([values.astype(float), point, [best if k < 18 else -best]]))
golden["depth"] = np.array(rows)

# ---- statistics ------------------------------------------------------------------------------------------------------
a, b = rng.gamma(2, 1, 60), rng.gamma(2, 1, 60)
b = 0.6 * a + 0.4 * b + 0.1
interval = scipy.stats.bootstrap((a - b,), np.mean, n_resamples=200000, confidence_level=0.95, method="percentile",
                                 vectorized=True, batch=20000, rng=np.random.default_rng(1)).confidence_interval
golden["bootstrap.a"], golden["bootstrap.b"] = a, b
golden["bootstrap"] = np.array([np.mean(a - b), interval.low, interval.high, scipy.stats.sem(a - b)])
latent = rng.normal(size=(2, 32)).astype(np.float32)
share = rng.dirichlet(np.ones(20))
golden["latent"], golden["share"] = latent, share
golden["diagnostics"] = np.array([np.sqrt(np.mean((latent[0].astype(float) - latent[1]) ** 2)),
                                  1 - scipy.spatial.distance.cosine(*latent.astype(float)), scipy.stats.entropy(share)])
golden["summary"] = np.array([np.mean(a), np.std(a, ddof=1), np.median(a)])

save_file(golden, HERE / "nirdot_metrics.safetensors")
