#!/usr/bin/env python3
"""Compares the forward model of examples/nirdot_physics.h and that of RedbirdPy with the exact solution on a sphere.

usage, from anywhere:  python tools/compare_redbird.py [options]
needs numpy and a C compiler (cc or $CC); for Redbird:  pip install redbirdpy iso2mesh tetgen
mpmath, if it is there, checks the exact solution with 40 digits.

A homogeneous ball of 27 mm, mu_a 0.005 and mu_s' 1 mm^-1, n = 1.4, 140 MHz; sources and detectors at random on its
surface (fixed seed); every pair 10 to 40 mm apart. Ours: voxels of 1 mm, 64^3, float, tolerance 1e-8. Redbird: linear
tetrahedra on a mesh of TetGen's whose boundary nodes lie on the sphere, double; each of its solvers that is installed:
SuperLU always, BLQMR with its default tolerance of 1e-10 (pip install blocksolver), PARDISO (pip install pypardiso; the
fastest by far). Their answers are the same to all digits shown, so only the first gets all the lines.

The two measure different things, so each is compared with the exact solution for its own optodes; nothing is fitted
and no offset is taken out. "bias" is the mean error, so the offset; "sd" is what is left once it is removed.

    equation    -div(D grad Phi) + (mu_a + i w/c) Phi = q, D = 1 / (3 (mu_a + mu_s')), e^{+iwt}: the same in both
    boundary    Phi + 2 A D dPhi/dnu = 0, A = (1 + Reff) / (1 - Reff), Haskell's: the same; Redbird sums the integrals
                of Reff over 1000 rectangles, here they are exact, and so its error counts as Redbird's (printed)
    source      isotropic point, at a depth of 1/mu_s' (ours), of 1/(mu_a + mu_s') (Redbird)
    detector    the fluence on the surface (ours: from that one voxel below and the Robin condition); the fluence
                1/(mu_a + mu_s') below it (Redbird), where it is some 50 % higher: compared as if they were the same,
                ln A would be off by 0.42
    phase       -arg Phi, degrees, positive and growing with distance

Two more lines of the table: ours in double with Redbird's tolerance, and ours with the optodes where Redbird has its
own, as points within the tissue.

Redbird must not hold negative volumes: versions that kept the sign of left-handed tetrahedra gave silently wrong fields
(0.4.3 takes the absolute value). So the tetrahedra are made right-handed, and the sum of the volumes it holds is
printed beside those of the mesh and of the ball; negative ones are mended, and that is said.

Processor time is one process's with one thread, from the optical properties to the readings: of ours surface, matrix,
optodes and solution; of Redbird meshprep, matrix, and the solution for the sources' columns alone (its runforward
solves for the detectors' too). Making the mesh is told apart, and so is meshprep, which is done once for a mesh. The
two differ in the number of unknowns and in accuracy, so those times are no race at equal error: for each unknown
the tetrahedra are the more accurate. --nodes 60000 brings Redbird's sd of ln A from 0.023 to 0.0075, ours of 1 mm has
0.015, and --voxel 0.5 brings ours to 0.0066. A comparison, not a test: it fails on no figure.

Run with redbirdpy 0.4.3, iso2mesh 0.6.7, tetgen 0.8.4, blocksolver 0.9.4, pypardiso 0.4.7 with mkl 2026.2.0,
numpy 2.4.6, scipy 1.17.1, mpmath 1.3.0.
"""
import os

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):    # before numpy starts its threads
    os.environ[_name] = "1"

import argparse
import pathlib
import subprocess
import sys
import tempfile
import time

try:
    import numpy as np
except ImportError as missing:
    sys.exit(f"compare_redbird: {missing}")

ROOT = pathlib.Path(__file__).resolve().parent.parent
RADIUS, MU_A, MU_S, INDEX, FREQUENCY = 27.0, 0.005, 1.0, 1.4, 140e6
LIGHT = 2.99792458e11                       # in vacuum, mm/s
DIFFUSION = 1 / (3 * (MU_A + MU_S))
WAVE_NUMBER = np.sqrt((MU_A + 2j * np.pi * FREQUENCY * INDEX / LIGHT) / DIFFUSION)
BANDS = ((10, 15), (15, 25), (25, 40), (10, 40))

# Reads "voxels h radius mu_a mu_s' f n sources detectors interior double tolerance" and then their positions; writes
# "unknowns seconds iterations" and, for every source, ln A and phase at every detector.
PROGRAM = r"""
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <time.h>
#include "nirdot_physics.h"

static double (*read_points(int count))[3]
{
    double (*p)[3] = (double (*)[3])calloc((size_t)count, sizeof *p);
    for (int i = 0; p && i < count; ++i)
        if (scanf("%lf %lf %lf", &p[i][0], &p[i][1], &p[i][2]) != 3) return NULL;
    return p;
}

int main(void)
{
    nir_grid grid;
    nir_options options = nir_defaults();
    double radius, mu_a, mu_s;
    int sources, detectors, interior, in_double, unknowns = 0;
    if (scanf("%d %lf %lf %lf %lf %lf %lf %d %d %d %d %lf", &grid.n, &grid.h, &radius, &mu_a, &mu_s,
            &options.frequency_hz, &options.refractive_index, &sources, &detectors, &interior, &in_double,
            &options.tolerance) != 12) return 2;
    options.interior_optodes = interior;
    options.float64 = in_double;
    const size_t voxels = (size_t)grid.n * (size_t)grid.n * (size_t)grid.n;
    const int pairs = sources * detectors;
    double (*source)[3] = read_points(sources), (*detector)[3] = read_points(detectors);
    uint8_t *label = (uint8_t *)calloc(voxels, 1);
    float *a = (float *)calloc(voxels, sizeof *a), *s = (float *)calloc(voxels, sizeof *s);
    uint16_t (*pair)[2] = (uint16_t (*)[2])calloc((size_t)pairs, sizeof *pair);
    double *log_amplitude = (double *)calloc((size_t)pairs, sizeof(double)), *phase = (double *)calloc((size_t)pairs,
        sizeof(double));
    if (!source || !detector || !label || !a || !s || !pair || !log_amplitude || !phase) return 2;
    const nir_ellipsoid ball = { .semi_axis = { radius, radius, radius }, .rotation = { 1, 0, 0, 0, 1, 0, 0, 0, 1 } };
    for (int z = 0, i = 0; z < grid.n; ++z)
        for (int y = 0; y < grid.n; ++y)
            for (int x = 0; x < grid.n; ++x, ++i) {
                const int voxel[3] = { x, y, z };
                double at[3];
                nir_centre(grid, voxel, at);
                label[i] = nir_ellipsoid_level(&ball, at, NULL) < 0;
                a[i] = label[i] ? (float)mu_a : 0;
                s[i] = label[i] ? (float)mu_s : 0;
                unknowns += label[i];
            }
    for (int i = 0; i < pairs; ++i) {
        pair[i][0] = (uint16_t)(i / detectors);
        pair[i][1] = (uint16_t)(i % detectors);
    }
    const clock_t start = clock();
    nir_workspace *ws = nir_workspace_new(grid, &options);
    if (!ws || !nir_set_tissue(ws, &ball, label) || !nir_set_properties(ws, a, s) ||
        !nir_set_optodes(ws, (const double (*)[3])source, sources, (const double (*)[3])detector, detectors) ||
        !nir_forward(ws, pair[0], pairs, NIR_KEEP_NOTHING, log_amplitude, phase)) return 1;
    printf("%d %.6f %d\n", unknowns, (double)(clock() - start) / CLOCKS_PER_SEC, ws->iterations);
    for (int i = 0; i < pairs; ++i) printf("%.17g %.17g\n", log_amplitude[i], phase[i]);
    return 0;
}
"""


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sources", type=int, default=50, metavar="N", help="sources, and as many detectors (50)")
    p.add_argument("--seed", type=int, default=1, metavar="N", help="of the optodes' positions (1)")
    p.add_argument("--nodes", type=int, default=20000, metavar="N", help="of Redbird's mesh, about (20000)")
    p.add_argument("--solver", default="superlu,blqmr,pardiso", metavar="NAMES",
                   help="of Redbird's femsolve, divided by commas (superlu,blqmr,pardiso: those that are installed)")
    p.add_argument("--voxel", type=float, default=1, metavar="MM", help="ours; 64 mm are divided by it (1)")
    a = p.parse_args()
    if a.sources < 1 or a.sources > 1000:
        p.error(f"--sources {a.sources}: expected 1 to 1000")
    if a.nodes < 1000:
        p.error(f"--nodes {a.nodes}: expected 1000 or more")
    if not 0.5 <= a.voxel <= 4 or abs(64 / a.voxel - round(64 / a.voxel)) > 1e-9:
        p.error(f"--voxel {a.voxel:g}: expected 0.5 to 4 mm, a divisor of 64")
    return a


# ---- the exact solution ----------------------------------------------------

def haskell_A(n):
    """By Gauss-Legendre on either side of the critical angle; the root there is taken out by t = c (1 - u^2)."""
    u, weight = np.polynomial.legendre.leggauss(200)
    u, weight = (u + 1) / 2, weight / 2
    critical = np.arcsin(1 / n)
    t = critical * (1 - u * u)
    inside, outside = np.cos(t), np.sqrt(1 - (n * np.sin(t)) ** 2)
    fresnel = (((n * inside - outside) / (n * inside + outside)) ** 2
               + ((n * outside - inside) / (n * outside + inside)) ** 2) / 2
    below = 2 * critical * u * weight * fresnel * np.sin(t) * inside
    flux = 2 * np.sum(below) + 1 - 1 / n ** 2                               # all is reflected beyond
    current = 3 * np.sum(below * inside) + (1 - 1 / n ** 2) ** 1.5
    reflection = (flux + current) / (2 - flux + current)
    return (1 + reflection) / (1 - reflection)


def ratios_i(z, terms):
    """i_l / i_(l-1) of the modified spherical Bessel functions, l = 0 .. terms (the first means nothing)."""
    t = np.zeros(terms + 200, complex)
    for l in range(terms + 198, 0, -1):
        t[l] = z / (2 * l + 1 + z * t[l + 1])
    return t


def exact(source, detector, cosine, A, terms=1200):
    """Fluence of a point source at radius `source` at radius `detector` of the ball, the cosine between them. Products
    of i_l and k_l are carried from term to term by their ratios, as each alone leaves the range of double."""
    k, zb = WAVE_NUMBER, 2 * A * DIFFUSION
    x, z0, z = k * RADIUS, k * source, k * detector
    at_x, at_0, at_z = ratios_i(x, terms), ratios_i(z0, terms), ratios_i(z, terms)
    product = np.sinh(z0) / z0 * np.sinh(z) / z * np.exp(-x) / np.sinh(x)   # i_0(z0) i_0(z) k_0(x) / i_0(x)
    up = 1 + 1 / x                                                          # k_(l+1) / k_l
    legendre, before = np.ones_like(cosine), np.zeros_like(cosine)
    total = np.zeros(np.shape(cosine), complex)
    for l in range(terms):
        reflected = -(1 + zb * k * (l / x - up)) / (1 + zb * k * (l / x + at_x[l + 1]))
        total += (2 * l + 1) * product * reflected * legendre
        product *= at_0[l + 1] * at_z[l + 1] * up / at_x[l + 1]
        up = (2 * l + 3) / x + 1 / up
        legendre, before = ((2 * l + 1) * cosine * legendre - l * before) / (l + 1), legendre
    distance = np.sqrt(source ** 2 + detector ** 2 - 2 * source * detector * cosine)
    return (np.exp(-k * distance) / distance + k * total) / (4 * np.pi * DIFFUSION)


def exact_slowly(source, detector, cosine, A, terms):
    """The same series with mpmath's Bessel functions, each from scratch."""
    import mpmath as mp
    mp.mp.dps = 40
    d = 1 / (3 * (mp.mpf(MU_A) + MU_S))
    k = mp.sqrt((MU_A + 2j * mp.pi * mp.mpf(FREQUENCY) * mp.mpf(INDEX) / mp.mpf(LIGHT)) / d)
    x, zb, total = k * RADIUS, 2 * mp.mpf(A) * d, mp.mpc(0)

    def first(z, count):
        return [mp.sqrt(mp.pi / (2 * z)) * mp.besseli(l + mp.mpf(1) / 2, z) for l in range(count)]

    i, at_source, at_detector = first(x, terms + 1), first(k * source, terms), first(k * detector, terms)
    decaying = [mp.sqrt(2 / (mp.pi * x)) * mp.besselk(l + mp.mpf(1) / 2, x) for l in range(terms + 1)]
    before, legendre = mp.mpf(0), mp.mpf(1)
    for l in range(terms):
        di, dk = i[l + 1] + l / x * i[l], -decaying[l + 1] + l / x * decaying[l]
        total -= ((2 * l + 1) * at_source[l] * at_detector[l] * legendre
                  * (decaying[l] + zb * k * dk) / (i[l] + zb * k * di))
        before, legendre = legendre, ((2 * l + 1) * mp.mpf(cosine) * legendre - l * before) / (l + 1)
    distance = mp.sqrt(mp.mpf(source) ** 2 + detector ** 2 - 2 * source * detector * mp.mpf(cosine))
    return complex((mp.exp(-k * distance) / distance + k * total) / (4 * mp.pi * d))


def check_exact(A, slow_terms=250):
    """The recurrences against mpmath over the first terms, and what the last third of all the terms adds."""
    at = (RADIUS - 1 / MU_S, RADIUS, np.float64(0.93), A)
    tail = abs(exact(*at, terms=800) / exact(*at) - 1)
    try:
        agreement = f"{abs(exact(*at, terms=slow_terms) / exact_slowly(*at, slow_terms) - 1):.1e}"
    except ImportError:
        agreement = "not checked (no mpmath)"
    print(f"exact solution: {slow_terms} terms in double against mpmath with 40 digits {agreement}; of 1200 terms the "
          f"last 400 add {tail:.1e}; A = {A:.6f}")


# ---- the two models: each gives the fluence [source][detector], unknowns, seconds, a remark -----------------

def run_ours(program, source, detector, voxel, interior=False, double=False, tolerance=1e-8):
    head = (f"{round(64 / voxel)} {voxel!r} {RADIUS!r} {MU_A!r} {MU_S!r} {FREQUENCY!r} {INDEX!r} {len(source)} "
            f"{len(detector)} {int(interior)} {int(double)} {tolerance!r}\n")
    points = "".join("%.17g %.17g %.17g\n" % tuple(p) for p in np.vstack([source, detector]))
    done = subprocess.run([program], input=head + points, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"compare_redbird: our model failed with status {done.returncode}: {done.stderr.strip()}")
    first, *rows = done.stdout.splitlines()
    unknowns, seconds, iterations = first.split()
    value = np.array([row.split() for row in rows], float).reshape(len(source), len(detector), 2)
    fluence = np.exp(value[..., 0] - 1j * np.radians(value[..., 1]))
    return fluence, int(unknowns), float(seconds), f"{iterations} iterations"


def build_program(folder):
    source, program = folder / "ball.c", folder / "ball"
    source.write_text(PROGRAM)
    command = [os.environ.get("CC", "cc"), "-O2", "-std=c99", f"-I{ROOT / 'examples'}", "-o", str(program), str(source),
               "-lm"]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"compare_redbird: {' '.join(command)}: {getattr(error, 'stderr', None) or error}")
    return str(program)


def signed_volumes(node, elem):
    a, b, c, d = (node[elem[:, k]] for k in range(4))
    return np.einsum("ij,ij->i", np.cross(b - a, c - a), d - a) / 6


def make_mesh(nodes):
    """TetGen's mesh of a polyhedron whose vertices lie on the sphere, at even distances along a spiral."""
    import tetgen
    from scipy.spatial import ConvexHull
    edge = (8.4 * RADIUS ** 3 / nodes) ** (1 / 3)       # the constant measured: it gives about as many nodes as asked
    count = round(4 * np.pi * RADIUS ** 2 / (0.866 * edge ** 2))
    j = np.arange(count)
    z, angle = 1 - (2 * j + 1) / count, j * np.pi * (3 - np.sqrt(5))
    ring = np.sqrt(1 - z * z)
    surface = RADIUS * np.stack([ring * np.cos(angle), ring * np.sin(angle), z], 1)
    hull = ConvexHull(surface)
    face = hull.simplices.copy()
    corner = surface[face]
    inward = np.einsum("ij,ij->i", np.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]), corner[:, 0]) < 0
    face[inward] = face[inward][:, ::-1]
    made = tetgen.TetGen(surface, face.astype(np.int32)).tetrahedralize(
        order=1, minratio=1.3, mindihedral=12, nobisect=True, fixedvolume=True,
        maxvolume=1.35 * edge ** 3 / (6 * np.sqrt(2)))      # 1.35 times the regular tetrahedron's
    node, elem = np.asarray(made[0], float), np.asarray(made[1], int)
    left = signed_volumes(node, elem) < 0
    elem[left] = elem[left][:, [0, 2, 1, 3]]
    return node, elem, int(left.sum())


def prepare_redbird(node, elem, source, detector):
    import redbirdpy
    cfg = {"node": node, "elem": elem + 1, "seg": np.ones(len(elem), int), "omega": 2 * np.pi * FREQUENCY,
           "prop": np.array([[0, 0, 1, 1], [MU_A, MU_S, 0, INDEX]]), "srcpos": source, "srcdir": -source / RADIUS,
           "detpos": detector, "detdir": -detector / RADIUS}
    start = time.process_time()
    cfg, _ = redbirdpy.meshprep(cfg)
    remark = ""
    if np.any(cfg["evol"] < 0):
        cfg["evol"] = np.abs(cfg["evol"])
        cfg["deldotdel"], _ = redbirdpy.utility.deldotdel(cfg)
        remark = "; its volumes were negative, and were mended here"
    seconds = time.process_time() - start
    print(f"Redbird: {len(node)} nodes, {len(elem)} tetrahedra; sum of its volumes {cfg['evol'].sum():.1f} mm^3, "
          f"of the mesh's {signed_volumes(node, elem).sum():.1f}, ball {4 / 3 * np.pi * RADIUS ** 3:.1f}{remark}")
    return cfg, seconds


def run_redbird(cfg, prepared, solver):
    from redbirdpy import forward, solver as solvers
    from redbirdpy.utility import sdmap
    sources = len(cfg["srcpos"])
    start = time.process_time()
    matrix = forward.femlhs(cfg, cfg["deldotdel"])
    rhs, location, barycentric, _ = forward.femrhs(cfg, sdmap(cfg))
    if np.isnan(location).any():
        raise RuntimeError(f"{int(np.isnan(location).sum())} optodes lie outside the mesh")
    assembled = time.process_time()
    field, flag = solvers.femsolve(matrix, rhs[:, :sources], method=solver, nthread=1)
    solved = time.process_time()
    if flag:
        raise RuntimeError(f"femsolve({solver}) returned {flag}")
    value = np.asarray(forward.femgetdet(field, cfg, rhs, location, barycentric)).T
    residual = np.linalg.norm(matrix @ field - rhs[:, :sources].toarray(), axis=0).max()
    remark = (f"meshprep {prepared:.1f} s, matrix and optodes {assembled - start:.1f} s, solution "
              f"{solved - assembled:.1f} s; largest residual {residual:.0e}")
    return value, matrix.shape[0], prepared + time.process_time() - start, remark


# ---- the table -------------------------------------------------------------

def report(name, fluence, right, separation, unknowns, seconds, bands=BANDS):
    ratio = fluence / right
    amplitude, phase = np.log(np.abs(ratio)), -np.degrees(np.angle(ratio))
    for low, high in bands:
        here = (separation >= low) & (separation < high)
        a, p = amplitude[here], phase[here]
        if not a.size:
            continue
        last = f"{unknowns:9d} {seconds:8.2f}" if (low, high) == BANDS[-1] else ""
        print(f"{name:27s} {low:2d}-{high:2d} {a.size:6d}  {a.mean():+8.4f} {a.std():7.4f} {np.abs(a).max():7.4f}  "
              f"{p.mean():+7.3f} {p.std():6.3f} {np.abs(p).max():6.3f} {last}".rstrip())


def compare_redbird(options, source, detector, cosine, separation, A):
    """The lines of the table; what cannot be had is said in one line and raised as SystemExit."""
    try:
        import redbirdpy
        from redbirdpy import solver as solvers
        start = time.process_time()
        node, elem, left = make_mesh(options.nodes)
        print(f"mesh: {time.process_time() - start:.1f} s; {left} of {len(elem)} tetrahedra came left-handed")
        cfg, prepared = prepare_redbird(node, elem, source, detector)
        depth = 1 / (MU_A + MU_S)
        right = exact(RADIUS - depth, RADIUS - depth, cosine, A)
        theirs = (1 + cfg["reff"]) / (1 - cfg["reff"])
        effect = np.log(np.abs(exact(RADIUS - depth, RADIUS - depth, cosine, theirs) / right))
        print(f"Redbird's Reff {cfg['reff']:.6f}, A = {theirs:.6f}: {effect.mean():+.5f} in ln A")
    except Exception as error:      # of any kind: whatever a package does, ours has been compared
        sys.exit(f"Redbird was not compared: {type(error).__name__}: {error}")
    rows, remarks = [], []
    missing = {"blqmr": not solvers._HAS_BLQMR and "blocksolver",      # femsolve would take another instead
               "umfpack": not solvers._HAS_UMFPACK and "scikit-umfpack",
               "pardiso": solvers._DIRECT_SOLVER != "pardiso" and "pypardiso"}
    for solver in options.solver.split(","):
        if missing.get(solver):
            remarks.append(f"{solver}: not run, {missing[solver]} is not installed")
            continue
        try:
            value, unknowns, seconds, remark = run_redbird(cfg, prepared, solver)
        except Exception as error:
            remarks.append(f"{solver}: failed: {type(error).__name__}: {error}")
            continue
        rows.append((f"Redbird {redbirdpy.__version__} {solver}", value, right, separation, unknowns, seconds,
                     BANDS[-1:] if rows else BANDS))
        remarks.append(f"{solver}: {remark}")
    return rows, remarks


def main():
    options = arguments()
    random = np.random.default_rng(options.seed)
    point = random.normal(size=(2, options.sources, 3))
    source, detector = RADIUS * point / np.linalg.norm(point, axis=2, keepdims=True)
    cosine = np.clip(source @ detector.T / RADIUS ** 2, -1, 1)
    separation = RADIUS * np.sqrt(2 - 2 * cosine)
    A, depth = haskell_A(INDEX), 1 / (MU_A + MU_S)
    check_exact(A)
    with tempfile.TemporaryDirectory() as folder:
        program = build_program(pathlib.Path(folder))
        surface = run_ours(program, source, detector, options.voxel)
        double = run_ours(program, source, detector, options.voxel, double=True, tolerance=1e-10)
        inner = 1 - depth / RADIUS
        within = run_ours(program, source * inner, detector * inner, options.voxel, interior=True)
    right = exact(RADIUS - 1 / MU_S, RADIUS, cosine, A)
    below = exact(RADIUS - depth, RADIUS - depth, cosine, A)
    print(f"ours: {surface[3]}, in double to 1e-10 {double[3]}; reading at Redbird's depth instead of the surface adds "
          f"{np.mean(np.log(np.abs(below / right))):.3f} to ln A")
    rows = [(f"ours, {options.voxel:g} mm", surface[0], right, separation, *surface[1:3]),
            ("ours, double to 1e-10", double[0], right, separation, *double[1:3], BANDS[-1:]),
            ("ours, at Redbird's optodes", within[0], below, separation, *within[1:3], BANDS[-1:])]
    failure, remarks = None, []
    try:
        theirs, remarks = compare_redbird(options, source, detector, cosine, separation, A)
        rows += theirs
    except SystemExit as error:
        failure = error
    for remark in remarks:
        print(remark)
    print(f"\n{options.sources} sources, {options.sources} detectors, seed {options.seed}; errors against the exact "
          f"solution for each one's own optodes, no offset removed\n"
          f"{'':27s}    mm  pairs  ln A:bias      sd     max  deg:bias     sd    max  unknowns    CPU s")
    for row in rows:
        report(*row)
    if failure:
        raise failure


if __name__ == "__main__":
    main()
