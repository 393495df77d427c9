/* Tests of nirdot_physics.h: the boundary's A(n), exact solutions for infinite, half-infinite and spherical tissue,
   order of convergence, conservation of energy, reciprocity, derivatives, symmetries, bits. And of nirdot_baseline.h:
   the homogeneous fit, the step against dense algebra, a tumour found. The closed forms below are held against
   tests/golden/nirdot_physics.safetensors, which mpmath made. Takes about 3 s of processor time. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <complex.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dotopt.h"
#include "examples/nirdot_baseline.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof *(array)))
enum { OPTODES = 64 };

/* ---- helpers ---- */

static double *golden(const char *name, int64_t *count)
{
    dot_context *ctx = dot_context_create(NULL);
    dot_safetensors *file = dot_safetensors_open(ctx, "tests/golden/nirdot_physics.safetensors");
    dot_safetensors_entry entry;
    assert_non_null(file);
    const int index = dot_safetensors_find(file, name);
    assert_true(index >= 0 && dot_safetensors_entry_at(file, index, &entry));
    double *values = (double *)calloc((size_t)entry.count, sizeof *values);
    assert_non_null(values);
    assert_true(dot_safetensors_read_double(file, index, values, entry.count));
    *count = entry.count;
    dot_safetensors_close(file);
    dot_context_destroy(ctx);
    return values;
}

static void assert_near(const char *what, double ours, double expected, double tolerance)
{
    if (!(fabs(ours - expected) <= tolerance))
        fail_msg("%s: %.12g, expected %.12g +- %.2g", what, ours, expected, tolerance);
}

static void assert_between(const char *what, double value, double low, double high)
{
    if (!(value >= low && value <= high)) fail_msg("%s: %.6g, expected %g to %g", what, value, low, high);
}

/* Tissue, its optodes and what they measure. */
typedef struct {
    nir_grid grid;
    nir_options options;
    nir_ellipsoid shape;
    bool has_shape;
    uint8_t *label;
    float *mu_a, *mu_s;
    double source[OPTODES][3], detector[OPTODES][3];
    int sources, detectors, pairs;
    uint16_t pair[OPTODES * OPTODES][2];
    double log_amplitude[OPTODES * OPTODES], phase[OPTODES * OPTODES];
    nir_workspace *ws;
} scene;

static const double unit[9] = { 1, 0, 0, 0, 1, 0, 0, 0, 1 };
static const double tilted[9] = { 0.36, 0.48, -0.8, -0.8, 0.6, 0, 0.48, 0.64, 0.6 };

static size_t volume(const scene *s) { return (size_t)s->grid.n * (size_t)s->grid.n * (size_t)s->grid.n; }

/* A block that fills the grid, or an ellipsoid around the middle. */
static scene *scene_new(int n, double h, const double *semi_axis, const double *rotation, float mu_a, float mu_s)
{
    scene *s = (scene *)calloc(1, sizeof *s);
    assert_non_null(s);
    s->grid = (nir_grid){ n, h };
    s->options = nir_defaults();
    s->has_shape = semi_axis != NULL;
    for (int i = 0; semi_axis && i < 3; ++i) s->shape.semi_axis[i] = semi_axis[i];
    memcpy(s->shape.rotation, rotation ? rotation : unit, sizeof unit);
    s->label = (uint8_t *)calloc(volume(s), 1);
    s->mu_a = (float *)calloc(volume(s), sizeof(float));
    s->mu_s = (float *)calloc(volume(s), sizeof(float));
    assert_true(s->label && s->mu_a && s->mu_s);
    for (int i = 0; i < (int)volume(s); ++i) {
        const int voxel[3] = { i % n, i / n % n, i / n / n };
        double centre[3];
        nir_centre(s->grid, voxel, centre);
        if (semi_axis && nir_ellipsoid_level(&s->shape, centre, NULL) >= 0) continue;
        s->label[i] = 1;
        s->mu_a[i] = mu_a;
        s->mu_s[i] = mu_s;
    }
    return s;
}

static void scene_free(scene *s)
{
    nir_workspace_free(s->ws);
    free(s->label);
    free(s->mu_a);
    free(s->mu_s);
    free(s);
}

/* A second tissue within `radius` of (x, y, z). */
static void add_tumour(scene *s, double x, double y, double z, double radius, float mu_a, float mu_s)
{
    const int n = s->grid.n;
    for (int i = 0; i < (int)volume(s); ++i) {
        const int voxel[3] = { i % n, i / n % n, i / n / n };
        double c[3];
        nir_centre(s->grid, voxel, c);
        if (!s->label[i] || hypot(hypot(c[0] - x, c[1] - y), c[2] - z) > radius) continue;
        s->label[i] = 2;
        s->mu_a[i] = mu_a;
        s->mu_s[i] = mu_s;
    }
}

static void point_on_surface(const scene *s, uint64_t stream, double point[3])
{
    double direction[3], length = 0;
    for (int k = 0; k < 3; ++k) {
        direction[k] = dot_random_normal(7, stream, (uint64_t)k);
        length += direction[k] * direction[k];
    }
    for (int k = 0; k < 3; ++k) {
        point[k] = s->shape.centre[k];
        for (int i = 0; i < 3; ++i)
            point[k] += s->shape.rotation[3 * i + k] * direction[i] / sqrt(length) * s->shape.semi_axis[i];
    }
}

/* Optodes spread over the ellipsoid, and every pair of them between 10 and `far` mm apart. */
static void place_optodes(scene *s, int sources, int detectors, double far)
{
    s->sources = sources;
    s->detectors = detectors;
    s->pairs = 0;
    for (int i = 0; i < sources; ++i) point_on_surface(s, (uint64_t)i, s->source[i]);
    for (int i = 0; i < detectors; ++i) point_on_surface(s, 1000 + (uint64_t)i, s->detector[i]);
    for (int i = 0; i < sources; ++i)
        for (int k = 0; k < detectors; ++k) {
            double square = 0;
            for (int j = 0; j < 3; ++j) square += pow(s->source[i][j] - s->detector[k][j], 2);
            if (square < 100 || square > far * far) continue;
            s->pair[s->pairs][0] = (uint16_t)i;
            s->pair[s->pairs++][1] = (uint16_t)k;
        }
}

static void scene_set(scene *s)
{
    if (!s->ws) s->ws = nir_workspace_new(s->grid, &s->options);
    assert_non_null(s->ws);
    assert_true(nir_set_tissue(s->ws, s->has_shape ? &s->shape : NULL, s->label));
}

static void scene_measure(scene *s, nir_keep keep)
{
    assert_true(nir_set_properties(s->ws, s->mu_a, s->mu_s));
    assert_true(nir_set_optodes(s->ws, (const double (*)[3])s->source, s->sources, (const double (*)[3])s->detector,
        s->detectors));
    assert_true(nir_forward(s->ws, s->pair[0], s->pairs, keep, s->log_amplitude, s->phase));
}

static void scene_run(scene *s, nir_keep keep)
{
    scene_set(s);
    scene_measure(s, keep);
}

/* ---- exact solutions ---- */

typedef struct { double mu_a, mu_s, n, frequency; } medium;

static double diffusion_of(medium m) { return 1 / (3 * (m.mu_a + m.mu_s)); }
static double complex wave_number(medium m)
{
    return csqrt((m.mu_a + 2 * NIR_PI * m.frequency * m.n / 2.99792458e11 * I) / diffusion_of(m));
}

static double complex infinite(medium m, double r)
{
    return cexp(-wave_number(m) * r) / (4 * NIR_PI * diffusion_of(m) * r);
}

/* On the surface of a half-space; the line of images by Simpson's rule. */
static double complex half_space(medium m, double A, double rho)
{
    const double complex k = wave_number(m);
    const double d = diffusion_of(m), zb = 2 * A * d, z0 = 1 / m.mu_s, r = hypot(rho, z0), span = 50 * zb;
    const int steps = 20000;
    double complex line = 0;
    for (int i = 0; i <= steps; ++i) {
        const double l = span * i / steps, far = hypot(rho, z0 + l);
        line += (i == 0 || i == steps ? 1 : i % 2 ? 4 : 2) * cexp(-l / zb - k * far) / far;
    }
    line *= span / steps / 3;
    return (2 * cexp(-k * r) / r - 2 / zb * line) / (4 * NIR_PI * d);
}

/* On the surface of a sphere, with ratios of the modified spherical Bessel functions: i_l / i_(l-1) downwards and
   k_l / k_(l-1) upwards; i_l(source) k_l(surface) grows from term to term by their product. */
static double complex sphere(medium m, double A, double radius, double source, double cosine)
{
    enum { TERMS = 900, MORE = 60 };
    static double complex at_source[TERMS + MORE], at_surface[TERMS + MORE];
    const double complex k = wave_number(m), x = k * radius, x0 = k * source;
    const double d = diffusion_of(m), zb = 2 * A * d;
    double complex up = 0, up0 = 0, ratio = 1 + 1 / x, product = csinh(x0) / x0 * cexp(-x) / x, sum = 0;
    for (int l = TERMS + MORE - 1; l > 0; --l) {
        at_surface[l] = up = x / (2 * l + 1 + x * up);
        at_source[l] = up0 = x0 / (2 * l + 1 + x0 * up0);
    }
    double legendre = 1, before = 0;
    for (int l = 0; l < TERMS; ++l) {       /* ratio: k_(l+1) / k_l */
        const double complex di = at_surface[l + 1] + l / x, dk = -ratio + l / x;
        sum += (2 * l + 1) * product * zb * k * (di - dk) / (1 + zb * k * di) * legendre;
        product *= at_source[l + 1] * ratio;
        ratio = (2 * l + 3) / x + 1 / ratio;
        const double next = ((2 * l + 1) * cosine * legendre - l * before) / (l + 1);
        before = legendre;
        legendre = next;
    }
    return sum * k / (4 * NIR_PI * d);
}

static void assert_fluence(const char *what, double complex ours, const double expected[2])
{
    const double complex right = expected[0] + expected[1] * I;
    assert_near(what, cabs(ours - right) / cabs(right), 0, 1e-9);
}

static void test_exact_solutions(void **state)
{
    (void)state;
    int64_t cases, angles, flats, distances, ignored;
    double *ball = golden("sphere.properties", &cases), *cosine = golden("sphere.cosine", &angles);
    double *on_ball = golden("sphere.fluence", &ignored), *flat = golden("flat.properties", &flats);
    double *rho = golden("flat.distance", &distances), *on_flat = golden("flat.fluence", &ignored);
    for (int i = 0; i < cases / 6; ++i)
        for (int k = 0; k < angles; ++k) {
            const double *p = ball + 6 * i;
            const medium m = { p[0], p[1], p[2], p[3] };
            assert_fluence("sphere", sphere(m, nir_boundary_A(NIR_HASKELL, m.n), p[4], p[5], cosine[k]),
                on_ball + 2 * (i * angles + k));
        }
    for (int i = 0; i < flats / 4; ++i)
        for (int k = 0; k < distances; ++k) {
            const medium m = { flat[4 * i], flat[4 * i + 1], flat[4 * i + 2], flat[4 * i + 3] };
            assert_fluence("half-space", half_space(m, nir_boundary_A(NIR_HASKELL, m.n), rho[k]),
                on_flat + 2 * (i * distances + k));
        }
    free(ball);
    free(cosine);
    free(on_ball);
    free(flat);
    free(rho);
    free(on_flat);
}

/* ---- the boundary ---- */

static void test_A(void **state)
{
    (void)state;
    static const double table[3][5] = {     /* n; A of Haskell, Contini, Keijzer, Groenhuis, as published to 4 digits */
        { 1.33, 2.5154, 2.5153, 2.3483, 2.7904 }, { 1.37, 2.7586, 2.7586, 2.5701, 3.0499 },
        { 1.40, 2.9485, 2.9486, 2.7439, 3.2507 } };
    for (int i = 0; i < COUNT(table); ++i)
        for (int model = 0; model < 4; ++model)
            assert_near("A", nir_boundary_A((nir_boundary)model, table[i][0]), table[i][model + 1], 6e-5);
    int64_t count;
    double *n = golden("A.n", &count), *A = golden("A.haskell", &count);
    for (int i = 0; i < count; ++i) assert_near("Haskell's A", nir_boundary_A(NIR_HASKELL, n[i]), A[i], 1e-10);
    assert_near("A without a step of the index", nir_boundary_A(NIR_HASKELL, 1), 1, 1e-12);
    free(n);
    free(A);
}

/* A point t off the surface along the normal is at distance t from it, as long as t is less than the least radius of
   curvature. */
static void test_closest_point(void **state)
{
    (void)state;
    nir_ellipsoid e = { { 1, -2, 3 }, { 29, 25, 21 }, { 0 } };
    memcpy(e.rotation, tilted, sizeof tilted);
    scene s = { .shape = e };
    for (uint64_t i = 0; i < 200; ++i) {
        double at[3], normal[3], moved[3], surface[3], found[3];
        const double t = -8 + 16 * dot_random_uniform(3, i, 0);
        point_on_surface(&s, i, at);
        assert_near("level on the surface", nir_ellipsoid_level(&e, at, normal), 0, 1e-12);
        for (int k = 0; k < 3; ++k) moved[k] = at[k] + t * normal[k];
        assert_near("distance", nir_ellipsoid_closest(&e, moved, surface, found), t, 1e-9);
        for (int k = 0; k < 3; ++k) {
            assert_near("nearest point", surface[k], at[k], 1e-7);
            assert_near("normal", found[k], normal[k], 1e-8);
        }
    }
}

/* ---- against exact solutions ---- */

typedef struct { double mean, deviation, phase, worst_phase; } error_of;

static error_of compare(const scene *s, const double complex *exact)
{
    error_of e = { 0 };
    double square = 0;
    for (int p = 0; p < s->pairs; ++p) {
        const double d = s->log_amplitude[p] - log(cabs(exact[p])), f = s->phase[p] + carg(exact[p]) * 180 / NIR_PI;
        e.mean += d / s->pairs;
        square += d * d / s->pairs;
        e.phase += f / s->pairs;
        e.worst_phase = fmax(e.worst_phase, fabs(f));
    }
    e.deviation = sqrt(fmax(0, square - e.mean * e.mean));
    return e;
}

static void test_infinite(void **state)
{
    (void)state;
    const medium m = { 0.02, 1, 1.4, 140e6 };
    scene *s = scene_new(64, 1, NULL, NULL, 0.02f, 1);
    double complex exact[OPTODES];
    s->options.interior_optodes = true;
    s->sources = 1;
    for (int i = 0; i < 22; ++i) {                      /* along an axis, and along a diagonal */
        const double r = 10 + i / 2, along = i % 2 ? r / sqrt(3) : 0;
        const double at[3] = { i % 2 ? along : r, along, along };
        memcpy(s->detector[i], at, sizeof at);
        s->pair[i][1] = (uint16_t)i;
        exact[i] = infinite(m, r);
    }
    s->detectors = s->pairs = 22;
    scene_run(s, NIR_KEEP_NOTHING);
    const error_of e = compare(s, exact);
    print_message("# infinite, h = 1: ln A %+.4f +- %.4f, phase at most %.2f degrees off\n", e.mean, e.deviation,
        e.worst_phase);
    assert_near("ln A", e.mean, 0, 0.02);
    assert_between("deviation of ln A", e.deviation, 0, 0.02);
    assert_between("phase", e.worst_phase, 0, 0.6);

    /* ln(A r) falls by Re k, and the phase grows by Im k, per mm */
    const double complex k = wave_number(m);
    const double slope = (s->log_amplitude[20] + log(20) - s->log_amplitude[0] - log(10)) / 10;
    assert_near("slope of ln A", slope / creal(-k), 1, 0.01);
    assert_near("slope of the phase", (s->phase[20] - s->phase[0]) / 10 / (cimag(k) * 180 / NIR_PI), 1, 0.01);
    scene_free(s);
}

/* Source and detectors on the upper face of a block of 64 mm, at corners of voxels for every h. */
static double flat_error(int n, medium m, error_of *e)
{
    scene *s = scene_new(n, 64.0 / n, NULL, NULL, (float)m.mu_a, (float)m.mu_s);
    double complex exact[OPTODES];
    s->options.float64 = true;
    s->options.refractive_index = m.n;
    s->options.frequency_hz = m.frequency;
    s->sources = 1;
    s->source[0][2] = 32;
    for (int rho = 10; rho <= 20; rho += 2) {
        const int i = s->detectors++;
        s->detector[i][0] = rho;
        s->detector[i][2] = 32;
        s->pair[i][1] = (uint16_t)i;
        exact[i] = half_space(m, nir_boundary_A(NIR_HASKELL, m.n), rho);
    }
    s->pairs = s->detectors;
    scene_run(s, NIR_KEEP_NOTHING);
    *e = compare(s, exact);
    double square = 0;
    for (int p = 0; p < s->pairs; ++p) {
        const double re = s->log_amplitude[p] - log(cabs(exact[p])), im = s->phase[p] * NIR_PI / 180 + carg(exact[p]);
        square += re * re + im * im;
    }
    scene_free(s);
    return sqrt(square / 6);
}

static void test_half_space(void **state)
{
    (void)state;
    error_of e, ignored;
    const medium m = { 0.02, 0.5, 1.4, 140e6 };
    const double fine = flat_error(64, m, &e), coarse = flat_error(32, m, &ignored), order = log2(coarse / fine);
    print_message("# half-space, h = 1: ln A %+.4f +- %.4f, phase at most %.2f degrees off; order of convergence "
        "%.2f\n", e.mean, e.deviation, e.worst_phase, order);
    assert_near("ln A", e.mean, 0, 0.02);
    assert_between("deviation of ln A", e.deviation, 0, 0.02);
    assert_between("phase", e.worst_phase, 0, 0.6);
    assert_between("order of convergence", order, 1.7, 3);
}

static error_of sphere_error(int n, nir_surface surface, medium m)
{
    const double radius = 27, axes[3] = { radius, radius, radius };
    scene *s = scene_new(n, 64.0 / n, axes, NULL, (float)m.mu_a, (float)m.mu_s);
    static double complex exact[OPTODES * OPTODES];
    s->options.surface = surface;
    s->options.refractive_index = m.n;
    place_optodes(s, 16, 32, 40);
    for (int p = 0; p < s->pairs; ++p) {
        double dot = 0;
        for (int k = 0; k < 3; ++k) dot += s->source[s->pair[p][0]][k] * s->detector[s->pair[p][1]][k];
        exact[p] = sphere(m, nir_boundary_A(NIR_HASKELL, m.n), radius, radius - 1 / m.mu_s, dot / (radius * radius));
    }
    scene_run(s, NIR_KEEP_NOTHING);
    const error_of e = compare(s, exact);
    print_message("# sphere, mu_a %g, mu_s' %g, h = %g%s: ln A %+.4f +- %.4f, phase %+.2f, at most %.2f degrees off "
        "(%d pairs)\n", m.mu_a, m.mu_s, s->grid.h, surface == NIR_STAIRCASE ? ", staircase" : "", e.mean, e.deviation,
        e.phase, e.worst_phase, s->pairs);
    scene_free(s);
    return e;
}

static void test_sphere(void **state)
{
    (void)state;
    static const medium media[] = { { .005, 1, 1.4, 140e6 }, { .01, 1.5, 1.4, 140e6 }, { .003, .7, 1.33, 140e6 } };
    for (int i = 0; i < COUNT(media); ++i) {
        const error_of e = sphere_error(64, NIR_CORRECTED, media[i]);
        assert_near("ln A", e.mean, 0, 0.04);
        assert_between("deviation of ln A", e.deviation, 0, 0.06);
        assert_near("phase", e.phase, 0, 0.6);
    }
    sphere_error(32, NIR_CORRECTED, media[0]);
    sphere_error(16, NIR_CORRECTED, media[0]);
    /* a voxel's faces as they are have too much area, whatever h */
    const error_of naive = sphere_error(64, NIR_STAIRCASE, media[0]);
    assert_between("ln A of the staircase", naive.mean, -1, -0.2);
}

/* A source at the middle of a sphere with a core of other tissue: Phi r is a sum of exponentials in each, both
   continuous and with the same current where they meet. */
static void test_core(void **state)
{
    (void)state;
    const medium core = { 0.015, 1.8, 1.4, 140e6 }, shell = { 0.005, 1, 1.4, 140e6 };
    const double size[3] = { 27, 27, 27 }, a = 12, R = 27;
    const double complex k1 = wave_number(core), k2 = wave_number(shell);
    const double d1 = diffusion_of(core), d2 = diffusion_of(shell), zb = 2 * nir_boundary_A(NIR_HASKELL, 1.4) * d2;
    const double complex source = cexp(-k1 * a) / (4 * NIR_PI * d1), source_slope = -k1 * source;
    /* outside r Phi = b u, u = e^(-k2 r) + g e^(k2 r), with u + zb (u' - u / R) = 0 at R; inside source + c sinh */
    const double complex g = -cexp(-2 * k2 * R) * (1 - zb * k2 - zb / R) / (1 + zb * k2 - zb / R);
    const double complex u = cexp(-k2 * a) + g * cexp(k2 * a), slope = k2 * (g * cexp(k2 * a) - cexp(-k2 * a));
    /* source + c sinh = b u;  d1 (source_slope + c k1 cosh - (source + c sinh) / a) = d2 b (slope - u / a) */
    const double complex ratio = k1 * ccosh(k1 * a) / csinh(k1 * a);
    const double complex b = d1 * (source_slope - ratio * source) / (d2 * (slope - u / a) - d1 * (ratio - 1 / a) * u);
    scene *s = scene_new(64, 1, size, NULL, (float)shell.mu_a, (float)shell.mu_s);
    double complex exact[OPTODES];
    add_tumour(s, 0, 0, 0, a, (float)core.mu_a, (float)core.mu_s);
    s->options.interior_optodes = true;
    s->sources = 1;
    for (int i = 0; i < 24; ++i) {
        const double r = 15 + i / 3 * 1.25;
        for (int k = 0; k < 3; ++k) s->detector[i][k] = dot_random_normal(2, 0, (uint64_t)(3 * i + k));
        const double length = hypot(hypot(s->detector[i][0], s->detector[i][1]), s->detector[i][2]);
        for (int k = 0; k < 3; ++k) s->detector[i][k] *= r / length;
        s->pair[i][1] = (uint16_t)i;
        exact[i] = b * (cexp(-k2 * r) + g * cexp(k2 * r)) / r;
    }
    s->detectors = s->pairs = 24;
    scene_run(s, NIR_KEEP_NOTHING);
    const error_of e = compare(s, exact);
    print_message("# sphere with a core, h = 1: ln A %+.4f +- %.4f, phase %+.2f, at most %.2f degrees off\n", e.mean,
        e.deviation, e.phase, e.worst_phase);
    assert_near("ln A", e.mean, 0, 0.04);
    assert_between("deviation of ln A", e.deviation, 0, 0.06);
    assert_between("phase", e.worst_phase, 0, 0.6);
    scene_free(s);
}

/* ---- what the equations say of themselves ---- */

static const double axes[3] = { 29, 26, 23 };

/* An ellipsoid on a tilt with a tumour inside and one at the surface. */
static scene *phantom(int n, double h, bool float64)
{
    const double scale = n * h / 64, size[3] = { axes[0] * scale, axes[1] * scale, axes[2] * scale };
    scene *s = scene_new(n, h, size, tilted, 0.005f, 1);
    s->options.float64 = float64;
    if (float64) s->options.tolerance = 1e-13;
    add_tumour(s, 6 * scale, -4 * scale, 3 * scale, 8 * scale, 0.015f, 1.8f);
    add_tumour(s, -12 * scale, 10 * scale, -16 * scale, 7 * scale, 0.009f, 1.3f);
    return s;
}

/* Without modulation, what is absorbed and what leaves is what the source sends. In a block outflow is h^2 Phi_b / (2
   A), with Phi_b half a voxel from the centre: worked out here by hand. */
static void test_energy(void **state)
{
    (void)state;
    const int n = 16;
    const double h = 2, A = nir_boundary_A(NIR_HASKELL, 1.4);
    scene *s = scene_new(n, h, NULL, NULL, 0.008f, 0.9f);
    add_tumour(s, 3, 4, 12, 6, 0.02f, 1.7f);
    s->options.frequency_hz = 0;
    s->options.float64 = true;
    s->options.tolerance = 1e-12;
    s->options.interior_optodes = true;
    s->sources = 2;
    s->source[1][0] = 9.3;
    scene_run(s, NIR_KEEP_SOURCES);
    for (int source = 0; source < 2; ++source) {
        double absorbed = 0, left = 0;
        const float *phi = nir_field(s->ws, source, 0) + s->ws->first;
        for (int i = 0; i < n * n * n; ++i) {
            const int x = i % n, y = i / n % n, z = i / n / n;
            const int faces = (x == 0) + (x == n - 1) + (y == 0) + (y == n - 1) + (z == 0) + (z == n - 1);
            const double d = 1 / (3 * ((double)s->mu_a[i] + (double)s->mu_s[i]));
            assert_int_equal(s->ws->voxel[i], i);
            absorbed += h * h * h * (double)s->mu_a[i] * (double)phi[i];
            left += faces * h * h * (double)phi[i] / (2 * A + h / 2 / d);
        }
        assert_near("absorbed + left", absorbed + left, 1, 1e-6);
        assert_between("absorbed", absorbed, 0.2, 0.8);
    }
    scene_free(s);

    /* an ellipsoid with a hole: unknowns of air lie within the rows */
    s = phantom(32, 2, true);
    for (int i = 0; i < (int)volume(s); ++i)
        if (i % 32 > 12 && i % 32 < 16 && i / 32 % 32 > 10 && i / 32 % 32 < 14) s->label[i] = 0;
    s->options.frequency_hz = 0;
    s->options.interior_optodes = true;
    s->sources = 1;
    s->source[0][0] = 9;
    scene_run(s, NIR_KEEP_SOURCES);
    double sum = 0;
    int air = 0;
    for (int a = s->ws->first; a < s->ws->first + s->ws->columns; ++a) {
        const double phi = (double)nir_field(s->ws, 0, 0)[a];
        sum += s->ws->level[0].reaction[a] * phi;
        air += !s->ws->level[0].tissue[a];
        assert_true(s->ws->level[0].tissue[a] ? phi > 0 : phi == 0);
    }
    assert_true(air > 100);
    assert_near("absorbed + left around a hole", sum, 1, 1e-6);
    scene_free(s);
}

/* Source and detector may change places. */
static void test_reciprocity(void **state)
{
    (void)state;
    scene *s = phantom(32, 2, true);
    s->options.interior_optodes = true;
    place_optodes(s, 8, 8, 80);
    for (int i = 0; i < 8; ++i)
        for (int k = 0; k < 3; ++k) {
            s->source[i][k] *= 0.9;
            s->detector[i][k] *= 0.85;
        }
    scene_run(s, NIR_KEEP_NOTHING);
    double first[2][64];
    assert_true(s->pairs > 50);
    for (int p = 0; p < s->pairs; ++p) {
        first[0][p] = s->log_amplitude[p];
        first[1][p] = s->phase[p];
        const uint16_t swap = s->pair[p][0];
        s->pair[p][0] = s->pair[p][1];
        s->pair[p][1] = swap;
    }
    for (int i = 0; i < 8; ++i)
        for (int k = 0; k < 3; ++k) {
            const double swap = s->source[i][k];
            s->source[i][k] = s->detector[i][k];
            s->detector[i][k] = swap;
        }
    scene_measure(s, NIR_KEEP_NOTHING);
    for (int p = 0; p < s->pairs; ++p) {
        assert_near("ln A", s->log_amplitude[p], first[0][p], 1e-9);
        assert_near("phase", s->phase[p], first[1][p], 1e-7);
    }
    scene_free(s);
}

/* Fluence is positive; at 1 Hz it is that at 0 Hz; at 1 MHz the phase is 1000 times that at 1 kHz. */
static void test_low_frequency(void **state)
{
    (void)state;
    static const double frequency[4] = { 0, 1, 1e3, 1e6 };
    double first[128], phase[4][128];
    for (int f = 0; f < 4; ++f) {
        scene *s = phantom(24, 64.0 / 24, f > 0);
        s->options.frequency_hz = frequency[f];
        place_optodes(s, 8, 12, 80);
        assert_true(s->pairs <= 128);
        scene_run(s, NIR_KEEP_SOURCES);
        for (int i = 0; i < s->sources && f == 0; ++i)
            for (int a = 0; a < s->ws->columns; ++a)
                for (int part = 0; part < 2; ++part)
                    assert_true((nir_field(s->ws, i, part)[s->ws->first + a] > 0) == (part == 0));
        for (int p = 0; p < s->pairs; ++p) {
            if (f == 0) first[p] = s->log_amplitude[p];
            assert_near("ln A", s->log_amplitude[p], first[p], f < 3 ? 5e-5 : 2e-3);
            phase[f][p] = s->phase[p];
            if (f == 0) assert_true(phase[0][p] == 0);
            if (f == 3) assert_near("phase at 1 MHz and 1 kHz", phase[3][p] / phase[2][p], 1000, 1);
        }
        scene_free(s);
    }
}

/* ---- derivatives ---- */

/* The whole Jacobian against central differences: voxels inside, in the tumour, at the surface and beside optodes. */
static void check_jacobian(bool fixed_depth)
{
    scene *s = phantom(16, 4, true);
    s->options.fixed_source_depth = fixed_depth;
    place_optodes(s, 4, 5, 80);
    scene_run(s, NIR_KEEP_ALL);
    const int columns = s->ws->columns, rows = 2 * s->pairs;
    float *J = (float *)calloc((size_t)rows * 2 * (size_t)columns, sizeof *J);
    assert_non_null(J);
    assert_true(nir_jacobian(s->ws, s->pair[0], s->pairs, J));
    int chosen[24], count = 0, boundary = 0, beside = 0;
    for (int k = 0; k < 3; ++k) chosen[count++] = s->ws->optode[k].scatter_index[3 + k] - s->ws->first;
    for (int k = 0; k < 5; ++k) chosen[count++] = s->ws->optode[s->sources + k].index[2] - s->ws->first;
    while (count < COUNT(chosen)) chosen[count] = (int)(dot_random_uniform(5, 0, (uint64_t)count) * columns), ++count;
    double *low = (double *)calloc((size_t)rows, sizeof *low), worst = 0;
    nir_optode placed[OPTODES];
    memcpy(placed, s->ws->optode, (size_t)(s->sources + s->detectors) * sizeof *placed);
    for (int i = 0; i < COUNT(chosen); ++i)
        for (int parameter = 0; parameter < 2; ++parameter) {
            float *value = (parameter ? s->mu_s : s->mu_a) + s->ws->voxel[chosen[i]];
            const float middle = *value;
            double step = 0;
            boundary += s->ws->area[s->ws->first + chosen[i]] > 0;
            for (int sign = -1; sign <= 1; sign += 2) {
                *value = middle * (1 + (float)sign * 2e-3f);
                step += sign * (double)*value;
                assert_true(nir_set_properties(s->ws, s->mu_a, s->mu_s));
                assert_true(nir_set_optodes(s->ws, (const double (*)[3])s->source, s->sources,
                    (const double (*)[3])s->detector,
                    s->detectors));
                if (fixed_depth) {              /* as they were, but with weights for the D of now */
                    for (int o = 0; o < s->sources; ++o)
                        for (int k = 0; k < 8; ++k) {
                            const double d = 1 / (3 * (s->ws->mu_a[placed[o].index[k]] +
                                s->ws->mu_s[placed[o].index[k]]));
                            beside += placed[o].index[k] == chosen[i] + s->ws->first && placed[o].by_diffusion[k] != 0;
                            s->ws->optode[o].index[k] = placed[o].index[k];
                            s->ws->optode[o].weight[k] = placed[o].weight[k];
                            if (placed[o].index[k] == chosen[i] + s->ws->first)
                                s->ws->optode[o].weight[k] += placed[o].by_diffusion[k] *
                                    (d - 1 / (3 * ((double)(parameter ? s->mu_a : s->mu_s)[s->ws->voxel[chosen[i]]] +
                                        (double)middle)));
                        }
                }
                assert_true(nir_forward(s->ws, s->pair[0], s->pairs, NIR_KEEP_NOTHING, s->log_amplitude, s->phase));
                for (int p = 0; p < s->pairs && sign < 0; ++p) {
                    low[2 * p] = s->log_amplitude[p];
                    low[2 * p + 1] = s->phase[p];
                }
            }
            *value = middle;
            for (int part = 0; part < 2; ++part) {
                double largest = 0, off = 0;
                for (int p = 0; p < s->pairs; ++p) {
                    const double slope = ((part ? s->phase[p] : s->log_amplitude[p]) - low[2 * p + part]) / step;
                    const double ours = (double)J[(2 * p + part) * 2 * columns + parameter * columns + chosen[i]];
                    largest = fmax(largest, fabs(slope));
                    off = fmax(off, fabs(slope - ours));
                }
                worst = fmax(worst, off / largest);
            }
        }
    print_message("# Jacobian%s: off by %.1e of the largest in a column (%d columns of %d at the surface)\n",
        fixed_depth ? "" : " with sources that move", worst, boundary, 2 * COUNT(chosen));
    assert_between("error of the Jacobian", worst, 0, 1e-4);
    assert_true(boundary > 10 && (beside > 0 || !fixed_depth));
    free(low);
    free(J);
    scene_free(s);
}

static void test_jacobian(void **state)
{
    (void)state;
    check_jacobian(false);
    check_jacobian(true);
}

/* J v and J^T w, which form no matrix, against the matrix. */
static void test_products(void **state)
{
    (void)state;
    for (int fixed = 0; fixed < 2; ++fixed) {
        scene *s = phantom(20, 3.2, true);
        s->options.fixed_source_depth = fixed;
        place_optodes(s, 5, 6, 60);
        s->pair[2][0] = NIR_NO_PAIR;
        scene_run(s, NIR_KEEP_ALL);
        const int columns = s->ws->columns, rows = 2 * s->pairs;
        float *J = (float *)calloc((size_t)rows * 2 * (size_t)columns, sizeof *J);
        float *v = (float *)calloc(2 * (size_t)columns, sizeof *v);
        float *back = (float *)calloc(2 * (size_t)columns, sizeof *back);
        double *w = (double *)calloc((size_t)rows, sizeof *w), *out = (double *)calloc((size_t)rows, sizeof *out);
        double largest = 0;
        assert_true(J && v && back && w && out);
        for (int k = 0; k < 2 * columns; ++k)
            v[k] = (float)dot_random_normal(1, 0, (uint64_t)k) * (k < columns ? 0.005f : 1);
        for (int r = 0; r < rows; ++r) w[r] = dot_random_normal(1, 1, (uint64_t)r);
        assert_true(nir_jacobian(s->ws, s->pair[0], s->pairs, J));
        assert_true(nir_jacobian_times(s->ws, s->pair[0], s->pairs, v, out));
        assert_true(nir_jacobian_transpose_times(s->ws, s->pair[0], s->pairs, w, back));
        for (int r = 0; r < rows; ++r) {
            double sum = 0, size = 0;
            for (int k = 0; k < 2 * columns; ++k) {
                sum += (double)J[r * 2 * columns + k] * (double)v[k];
                size += pow((double)J[r * 2 * columns + k] * (double)v[k], 2);
            }
            assert_near("J v", out[r], sum, 1e-5 * sqrt(size));
            if (r / 2 == 2) assert_true(out[r] == 0 && sum == 0);
        }
        for (int k = 0; k < 2 * columns; ++k)
            largest = fmax(largest, fabs((double)back[k]) * (k < columns ? 0.005 : 1));
        for (int k = 0; k < 2 * columns; ++k) {
            double sum = 0;
            for (int r = 0; r < rows; ++r) sum += (double)J[r * 2 * columns + k] * w[r];
            const double unit_of = k < columns ? 0.005 : 1;
            assert_near("J^T w", (double)back[k] * unit_of, sum * unit_of, 1e-5 * largest);
        }
        free(J);
        free(v);
        free(back);
        free(w);
        free(out);
        scene_free(s);
    }
}

/* ---- symmetries, precision, bits ---- */

/* A quarter turn about z and a permutation of the axes change nothing: the phantom, its surface and its optodes
   turned. */
static void test_rotation(void **state)
{
    (void)state;
    static const int turn[3][3] = { { 0, 1, 2 }, { 1, 0, 2 }, { 1, 2, 0 } };
    static const int sign[3][3] = { { 1, 1, 1 }, { -1, 1, 1 }, { 1, 1, 1 } };
    double first[2][256];
    for (int t = 0; t < 3; ++t) {
        scene *s = phantom(24, 64.0 / 24, true), *turned = phantom(24, 64.0 / 24, true);
        place_optodes(s, 8, 12, 60);
        place_optodes(turned, 8, 12, 60);
        for (int i = 0; i < (int)volume(s); ++i) {          /* new coordinate k is +- old coordinate turn[k] */
            const int old[3] = { i % 24, i / 24 % 24, i / 24 / 24 };
            int at[3];
            for (int k = 0; k < 3; ++k) at[k] = sign[t][k] > 0 ? old[turn[t][k]] : 23 - old[turn[t][k]];
            const int to = (at[2] * 24 + at[1]) * 24 + at[0];
            turned->label[to] = s->label[i];
            turned->mu_a[to] = s->mu_a[i];
            turned->mu_s[to] = s->mu_s[i];
        }
        for (int i = 0; i < 3; ++i)
            for (int k = 0; k < 3; ++k)
                turned->shape.rotation[3 * i + k] = sign[t][k] * s->shape.rotation[3 * i + turn[t][k]];
        for (int k = 0; k < 3; ++k) {
            for (int o = 0; o < 8; ++o) turned->source[o][k] = sign[t][k] * s->source[o][turn[t][k]];
            for (int o = 0; o < 12; ++o) turned->detector[o][k] = sign[t][k] * s->detector[o][turn[t][k]];
        }
        scene_run(turned, NIR_KEEP_NOTHING);
        assert_true(turned->pairs <= 256 && turned->pairs > 40);
        for (int p = 0; p < turned->pairs; ++p) {
            if (t == 0) first[0][p] = turned->log_amplitude[p], first[1][p] = turned->phase[p];
            assert_near("ln A", turned->log_amplitude[p], first[0][p], 1e-8);
            assert_near("phase", turned->phase[p], first[1][p], 1e-6);
        }
        scene_free(s);
        scene_free(turned);
    }
}

/* float, double, SSOR: the same fields on every voxel. */
static void test_precision(void **state)
{
    (void)state;
    scene *s[3] = { phantom(48, 64.0 / 48, true), phantom(48, 64.0 / 48, false), phantom(48, 64.0 / 48, false) };
    s[0]->options.tolerance = 1e-12;
    s[2]->options.preconditioner = NIR_SSOR;
    for (int i = 0; i < 3; ++i) {
        place_optodes(s[i], 4, 12, 40);
        scene_run(s[i], NIR_KEEP_SOURCES);
        double worst = 0;
        for (int o = 0; o < s[i]->sources; ++o)
            for (int a = s[i]->ws->first; a < s[i]->ws->first + s[i]->ws->columns; ++a) {
                const float *f = nir_field(s[i]->ws, o, 0), *g = nir_field(s[0]->ws, o, 0);
                const double re = (double)(f[a] - g[a]);
                const double im = (double)(f[a + s[i]->ws->stride] - g[a + s[0]->ws->stride]);
                worst = fmax(worst, hypot(re, im) / hypot((double)g[a], (double)g[a + s[0]->ws->stride]));
            }
        print_message("# %s: %d iterations, no voxel off by more than %.1e\n",
            i == 2 ? "float, SSOR" : i ? "float, multigrid" : "double", s[i]->ws->iterations, worst);
        assert_between("error", worst, 0, i == 2 ? 1e-3 : 1e-4);
        for (int p = 0; p < s[i]->pairs; ++p) {
            assert_near("ln A", s[i]->log_amplitude[p], s[0]->log_amplitude[p], 1e-4);
            assert_near("phase", s[i]->phase[p], s[0]->phase[p], 0.01);
        }
    }
    for (int i = 0; i < 3; ++i) scene_free(s[i]);
}

/* Each source alone gives the bits of all together; so do the solvers for each kind of processor, and a workspace used
   before. */
static void test_bits(void **state)
{
    (void)state;
    scene *s = phantom(24, 64.0 / 24, false);
    static double log_amplitude[OPTODES * OPTODES], phase[OPTODES * OPTODES];
    place_optodes(s, 11, 9, 60);
    scene_run(s, NIR_KEEP_NOTHING);
    const size_t size = (size_t)s->pairs * sizeof(double);
    memcpy(log_amplitude, s->log_amplitude, size);
    memcpy(phase, s->phase, size);
    for (int i = 0; i < s->sources; ++i) {
        uint16_t pair[OPTODES][2];
        double a[OPTODES], f[OPTODES];
        int count = 0, first = 0;
        while (s->pair[first][0] != i) ++first;
        for (int p = first; p < s->pairs && s->pair[p][0] == i; ++p) {
            pair[count][0] = 0;
            pair[count++][1] = s->pair[p][1];
        }
        assert_true(nir_set_optodes(s->ws, (const double (*)[3])s->source[i], 1, (const double (*)[3])s->detector,
            s->detectors));
        assert_true(nir_forward(s->ws, pair[0], count, NIR_KEEP_NOTHING, a, f));
        assert_memory_equal(a, log_amplitude + first, (size_t)count * sizeof *a);
        assert_memory_equal(f, phase + first, (size_t)count * sizeof *f);
    }
    const int choices = s->ws->choices;
    for (int k = 0; k < choices; ++k) {
        nir_workspace_free(s->ws);
        s->ws = nir_workspace_new(s->grid, &s->options);
        s->ws->choice[0] = s->ws->choice[k];
        s->ws->choices = 1;
        scene_run(s, NIR_KEEP_NOTHING);
        assert_memory_equal(s->log_amplitude, log_amplitude, size);
        assert_memory_equal(s->phase, phase, size);
    }
    scene *other = phantom(24, 64.0 / 24, false);
    for (int i = 0; i < (int)volume(other); ++i) other->label[i] = (uint8_t)(i / 24 % 24 > 10 ? s->label[i] : 0);
    assert_true(nir_set_tissue(s->ws, &other->shape, other->label));
    assert_true(nir_set_properties(s->ws, other->mu_a, other->mu_s));
    scene_run(s, NIR_KEEP_NOTHING);
    assert_memory_equal(s->log_amplitude, log_amplitude, size);
    scene_free(other);
    scene_free(s);
}

/* Over the surface the amplitude falls and the phase grows with distance. */
static void test_trend(void **state)
{
    (void)state;
    scene *s = phantom(32, 2, false);
    place_optodes(s, 12, 24, 40);
    scene_run(s, NIR_KEEP_NOTHING);
    double mean[3] = { 0 }, cov[2] = { 0 }, var[3] = { 0 };
    for (int pass = 0; pass < 2; ++pass)
        for (int p = 0; p < s->pairs; ++p) {
            double r = 0;
            for (int k = 0; k < 3; ++k) r += pow(s->source[s->pair[p][0]][k] - s->detector[s->pair[p][1]][k], 2);
            const double v[3] = { sqrt(r), s->log_amplitude[p], s->phase[p] };
            for (int k = 0; k < 3; ++k) {
                if (pass == 0) mean[k] += v[k] / s->pairs;
                else var[k] += (v[k] - mean[k]) * (v[k] - mean[k]);
                if (pass == 1 && k > 0) cov[k - 1] += (v[0] - mean[0]) * (v[k] - mean[k]);
            }
        }
    assert_between("slope of ln A per mm", cov[0] / var[0], -0.30, -0.16);
    assert_between("slope of the phase, degrees per mm", cov[1] / var[0], 1.4, 2.9);
    assert_between("correlation of the phase and distance", cov[1] / sqrt(var[0] * var[2]), 0.8, 1);
    scene_free(s);
}

/* ---- the classical reconstruction ---- */

static nir_data data_of(const scene *s)
{
    return (nir_data){ .shape = &s->shape, .source = (const double (*)[3])s->source,
        .detector = (const double (*)[3])s->detector, .sources = s->sources, .detectors = s->detectors,
        .pairs = s->pairs, .pair = s->pair[0],
        .log_amplitude = s->log_amplitude, .phase = s->phase };
}

/* Homogeneous tissue is found again: from data of the images' grid, and of a finer one that is compared on. */
static void test_homogeneous_fit(void **state)
{
    (void)state;
    static const double mu[3][2] = { { 0.005, 1 }, { 0.0032, 1.15 }, { 0.0095, 0.7 } };
    for (int i = 0; i < COUNT(mu); ++i)
        for (int n = 32; n <= 48; n += 16) {
            scene *s = scene_new(n, 64.0 / n, axes, tilted, (float)mu[i][0], (float)mu[i][1]);
            double found[2];
            place_optodes(s, 12, 16, 40);
            s->pair[3][0] = NIR_NO_PAIR;
            scene_run(s, NIR_KEEP_NOTHING);
            const nir_data d = data_of(s);
            nir_baseline *b = nir_baseline_new((nir_grid){ 32, 2 }, s->grid, NULL, NULL);
            assert_non_null(b);
            assert_true(nir_baseline_fit(b, &d, found));
            assert_near("mu_a of the fit", found[0] / mu[i][0], 1, 1e-3);
            assert_near("mu_s' of the fit", found[1] / mu[i][1], 1, 1e-3);
            nir_baseline_free(b);
            scene_free(s);
        }
}

/* Gaussian elimination with the largest pivot. */
static void solve_dense(double *A, double *y, int n)
{
    for (int k = 0; k < n; ++k) {
        int best = k;
        for (int i = k + 1; i < n; ++i) best = fabs(A[i * n + k]) > fabs(A[best * n + k]) ? i : best;
        for (int j = 0; j < n; ++j) {
            const double swap = A[k * n + j];
            A[k * n + j] = A[best * n + j];
            A[best * n + j] = swap;
        }
        const double swap = y[k];
        y[k] = y[best];
        y[best] = swap;
        for (int i = k + 1; i < n; ++i) {
            const double f = A[i * n + k] / A[k * n + k];
            for (int j = k; j < n; ++j) A[i * n + j] -= f * A[k * n + j];
            y[i] -= f * y[k];
        }
    }
    for (int k = n - 1; k >= 0; --k) {
        for (int j = k + 1; j < n; ++j) y[k] -= A[k * n + j] * y[j];
        y[k] /= A[k * n + k];
    }
}

/* x = C J^T (J C J^T + 2 I)^-1 dy written out with dense matrices: C = G G^T over all voxels of the tissue, G's rows
   of norm 1. */
static void dense_step(scene *s, const double mu[2], const double *log_amplitude, const double *phase, double *x)
{
    const int columns = s->ws->columns, rows = 2 * s->pairs, n = s->grid.n;
    double *G = (double *)calloc((size_t)columns * (size_t)columns, sizeof *G);
    double *B = (double *)calloc((size_t)rows * 2 * (size_t)columns, sizeof *B);
    double *K = (double *)calloc((size_t)rows * (size_t)rows, sizeof *K);
    double *y = (double *)calloc((size_t)rows, sizeof *y);
    float *J = (float *)calloc((size_t)rows * 2 * (size_t)columns, sizeof *J);
    assert_true(G && B && K && y && J);
    assert_true(nir_jacobian(s->ws, s->pair[0], s->pairs, J));
    for (int i = 0; i < columns; ++i) {
        double norm = 0;
        for (int j = 0; j < columns; ++j) {
            const int a = s->ws->voxel[i], b = s->ws->voxel[j];
            const int dx = a % n - b % n, dy = a / n % n - b / n % n, dz = a / n / n - b / n / n;
            G[i * columns + j] = exp(-(dx * dx + dy * dy + dz * dz) * s->grid.h * s->grid.h / 32);
            norm += G[i * columns + j] * G[i * columns + j];
        }
        for (int j = 0; j < columns; ++j) G[i * columns + j] /= sqrt(norm);
    }
    for (int r = 0; r < rows; ++r) {
        const double sigma = r % 2 ? 0.5 : 0.01;
        y[r] = (r % 2 ? phase[r / 2] - s->phase[r / 2] : log_amplitude[r / 2] - s->log_amplitude[r / 2]) / sigma;
        for (int part = 0; part < 2; ++part)
            for (int i = 0; i < columns; ++i) {
                const double v = (double)J[(r * 2 + part) * columns + i] * mu[part] / sigma;
                for (int j = 0; j < columns; ++j) B[(r * 2 + part) * columns + j] += v * G[i * columns + j];
            }
    }
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < rows; ++t) {
            for (int k = 0; k < 2 * columns; ++k) K[r * rows + t] += B[r * 2 * columns + k] * B[t * 2 * columns + k];
            if (r == t) K[r * rows + t] += 2;
        }
    solve_dense(K, y, rows);
    double *u = (double *)calloc(2 * (size_t)columns, sizeof *u);
    assert_non_null(u);
    for (int r = 0; r < rows; ++r)
        for (int k = 0; k < 2 * columns; ++k) u[k] += B[r * 2 * columns + k] * y[r];
    for (int part = 0; part < 2; ++part)
        for (int i = 0; i < columns; ++i)
            for (int j = 0; j < columns; ++j) x[part * columns + i] += G[i * columns + j] * u[part * columns + j];
    free(G);
    free(B);
    free(K);
    free(y);
    free(J);
    free(u);
}

/* With voxels of 4 mm every voxel has its Gaussian, and with voxels of 2 mm if that is asked for. By default every
   eighth has, which is a little different at the surface: to which much of this body of 29 mm belongs. */
static void test_step(void **state)
{
    (void)state;
    for (int run = 0; run < 3; ++run) {
        const int h = run == 0 ? 4 : 2;
        scene *s = phantom(16, h, false);
        double mu[2], log_amplitude[OPTODES], phase[OPTODES], largest = 0, worst = 0;
        place_optodes(s, 5, 6, 60);
        assert_true(s->pairs > 15 && s->pairs <= 30);
        scene_run(s, NIR_KEEP_NOTHING);
        memcpy(log_amplitude, s->log_amplitude, sizeof log_amplitude);
        memcpy(phase, s->phase, sizeof phase);
        const nir_data d = data_of(s);
        float *mu_a = (float *)calloc(volume(s), sizeof *mu_a), *mu_s = (float *)calloc(volume(s), sizeof *mu_s);
        nir_baseline_options o = nir_baseline_defaults();
        o.floor = 1e-6;
        if (run == 1) o.spacing = 0.5;
        nir_baseline *b = nir_baseline_new(s->grid, s->grid, NULL, &o);
        assert_true(mu_a && mu_s && b);
        assert_true(nir_baseline_reconstruct(b, &d, mu, mu_a, mu_s));
        for (int i = 0; i < (int)volume(s); ++i) {
            assert_true(s->label[i] ? mu_a[i] > 0 && mu_s[i] > 0 : mu_a[i] == 0 && mu_s[i] == 0);
            s->mu_a[i] = s->label[i] ? (float)mu[0] : 0;
            s->mu_s[i] = s->label[i] ? (float)mu[1] : 0;
        }
        scene_measure(s, NIR_KEEP_ALL);
        double *x = (double *)calloc(2 * (size_t)s->ws->columns, sizeof *x);
        assert_non_null(x);
        dense_step(s, mu, log_amplitude, phase, x);
        for (int part = 0; part < 2; ++part)
            for (int i = 0; i < s->ws->columns; ++i) {
                const double ours = (double)(part ? mu_s : mu_a)[s->ws->voxel[i]] / mu[part] - 1;
                largest = fmax(largest, fabs(x[part * s->ws->columns + i]));
                if (ours > -0.99) worst = fmax(worst, fabs(ours - x[part * s->ws->columns + i]));
            }
        print_message("# step with voxels of %d mm, spacing %g: off by %.1e of the largest change, %.2f\n", h,
            o.spacing, worst / largest, largest);
        assert_between("largest change", largest, 0.3, 5);
        assert_between("difference from dense algebra", worst / largest, 0, run < 2 ? 1e-3 : 0.04);
        nir_baseline_free(b);
        free(mu_a);
        free(mu_s);
        free(x);
        scene_free(s);
    }
}

/* A tumour of 9 mm among optodes all around: data of voxels of 1 mm with 1 % and 0.5 degrees of noise, images of 2
   mm. */
static void test_tumour(void **state)
{
    (void)state;
    const double at[3] = { 7, -8, 5 };
    scene *s = scene_new(64, 1, axes, tilted, 0.005f, 1);
    add_tumour(s, at[0], at[1], at[2], 9, 0.0125f, 1.7f);
    place_optodes(s, 16, 16, 40);
    scene_run(s, NIR_KEEP_NOTHING);
    for (int p = 0; p < s->pairs; ++p) {
        s->log_amplitude[p] += 0.01 * dot_random_normal(11, 0, (uint64_t)p);
        s->phase[p] += 0.5 * dot_random_normal(11, 1, (uint64_t)p);
    }
    const nir_data d = data_of(s);
    static float image[2][32 * 32 * 32];
    for (int steps = 1; steps <= 2; ++steps) {
        nir_baseline_options o = nir_baseline_defaults();
        double mu[2];
        o.steps = steps;
        nir_baseline *b = nir_baseline_new((nir_grid){ 32, 2 }, s->grid, NULL, &o);
        assert_true(b && nir_baseline_reconstruct(b, &d, mu, image[0], image[1]));
        assert_near("background mu_a", mu[0], 0.005, 0.0007);
        assert_near("background mu_s'", mu[1], 1, 0.05);
        for (int part = 0; part < 2; ++part) {
            double peak = 0, sum = 0, centre[3] = { 0 }, off = 0;
            for (int i = 0; i < COUNT(image[0]); ++i) peak = fmax(peak, (double)image[part][i] - mu[part]);
            for (int i = 0; i < COUNT(image[0]); ++i) {     /* the middle of all above half of the peak */
                const double contrast = (double)image[part][i] - mu[part];
                const int voxel[3] = { i % 32, i / 32 % 32, i / 1024 };
                if (contrast < 0.5 * peak) continue;
                sum += contrast;
                for (int k = 0; k < 3; ++k) centre[k] += contrast * ((voxel[k] + 0.5) * 2 - 32);
            }
            for (int k = 0; k < 3; ++k) off += pow(centre[k] / sum - at[k], 2);
            print_message("# tumour, %s, %d steps: background %.5f, peak %.2f times that, %.1f mm off\n",
                part ? "mu_s'" : "mu_a", steps, mu[part], 1 + peak / mu[part], sqrt(off));
            assert_between("mm off", sqrt(off), 0, 3);
            assert_between("peak of the contrast", 1 + peak / mu[part], part ? 1.2 : 1.5, 4);
        }
        nir_baseline_free(b);
    }
    scene_free(s);
}

/* ---- bad input ---- */

static void test_refusals(void **state)
{
    (void)state;
    nir_options o = nir_defaults();
    o.refractive_index = 0.9;
    assert_null(nir_workspace_new((nir_grid){ 16, 4 }, &o));
    assert_null(nir_workspace_new((nir_grid){ 3, 4 }, NULL));
    assert_null(nir_workspace_new((nir_grid){ 16, NAN }, NULL));
    scene *s = phantom(16, 4, false);
    place_optodes(s, 2, 2, 80);
    s->ws = nir_workspace_new(s->grid, &s->options);
    assert_false(nir_set_properties(s->ws, s->mu_a, s->mu_s));          /* no tissue */
    nir_ellipsoid skew = s->shape;
    skew.rotation[1] += 0.2;
    assert_false(nir_set_tissue(s->ws, &skew, s->label));
    uint8_t *air = (uint8_t *)calloc(volume(s), 1);
    assert_false(nir_set_tissue(s->ws, &s->shape, air));
    free(air);
    scene_run(s, NIR_KEEP_NOTHING);
    assert_false(nir_jacobian(s->ws, s->pair[0], s->pairs, NULL));       /* no fields */
    s->pair[0][1] = 2;
    assert_false(nir_forward(s->ws, s->pair[0], s->pairs, NIR_KEEP_NOTHING, s->log_amplitude, s->phase));
    const double far[1][3] = { { 0, 0, 80 } }, nowhere[1][3] = { { 0, NAN, 0 } };
    assert_false(nir_set_optodes(s->ws, far, 1, far, 1));
    assert_false(nir_set_optodes(s->ws, nowhere, 1, nowhere, 0));
    assert_false(nir_forward(s->ws, s->pair[0], 1, NIR_KEEP_NOTHING, s->log_amplitude, s->phase));
    const int middle = (8 * 16 + 8) * 16 + 8;
    s->mu_a[middle] = NAN;
    assert_false(nir_set_properties(s->ws, s->mu_a, s->mu_s));
    s->mu_a[middle] = -0.001f;
    assert_false(nir_set_properties(s->ws, s->mu_a, s->mu_s));
    s->mu_a[middle] = 0.005f;
    s->pair[0][1] = 1;
    s->ws->options.max_iterations = 2;                                  /* no convergence; then all is well again */
    assert_true(nir_set_properties(s->ws, s->mu_a, s->mu_s));
    assert_true(nir_set_optodes(s->ws, (const double (*)[3])s->source, 2, (const double (*)[3])s->detector, 2));
    assert_false(nir_forward(s->ws, s->pair[0], s->pairs, NIR_KEEP_NOTHING, s->log_amplitude, s->phase));
    s->ws->options.max_iterations = 200;
    assert_true(nir_forward(s->ws, s->pair[0], s->pairs, NIR_KEEP_NOTHING, s->log_amplitude, s->phase));
    nir_data d = data_of(s);
    double mu[2], sigma[OPTODES] = { 0 };
    nir_baseline *b = nir_baseline_new(s->grid, s->grid, NULL, NULL);
    d.sigma_phase = sigma;                                              /* no pair is in use */
    assert_false(nir_baseline_fit(b, &d, mu));
    d.sigma_phase = NULL;
    s->phase[0] = NAN;
    assert_false(nir_baseline_fit(b, &d, mu));
    nir_baseline_free(b);
    nir_baseline_options options = nir_baseline_defaults();
    options.correlation = 0;
    assert_null(nir_baseline_new(s->grid, s->grid, NULL, &options));
    assert_null(nir_baseline_new(s->grid, (nir_grid){ 32, 1 }, NULL, NULL));
    scene_free(s);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_exact_solutions), cmocka_unit_test(test_A), cmocka_unit_test(test_closest_point),
        cmocka_unit_test(test_infinite), cmocka_unit_test(test_half_space), cmocka_unit_test(test_sphere),
        cmocka_unit_test(test_core),
        cmocka_unit_test(test_energy), cmocka_unit_test(test_reciprocity), cmocka_unit_test(test_low_frequency),
        cmocka_unit_test(test_jacobian), cmocka_unit_test(test_products), cmocka_unit_test(test_rotation),
        cmocka_unit_test(test_precision), cmocka_unit_test(test_bits), cmocka_unit_test(test_trend),
        cmocka_unit_test(test_homogeneous_fit), cmocka_unit_test(test_step), cmocka_unit_test(test_tumour),
        cmocka_unit_test(test_refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
