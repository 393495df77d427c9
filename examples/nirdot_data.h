/*
 * nirdot_data.h - the simulated data of NIR-DOT: phantoms, optodes, datasets in
 * memory and in files, measurement noise, volumes for viewers.
 *
 *     nir_data_options o;
 *     nir_data_defaults(&o, "small");
 *     nir_dataset *train = nir_dataset_generate(&o, NIR_TRAIN);
 *     nir_dataset_save(ctx, train, "train.safetensors");
 *     nir_dataset_free(train);
 *
 * A phantom is a pure function of (options, split, index): neither the number
 * of threads nor the number of phantoms beside it changes a bit.
 *
 * Functions that fail say so in one line on stderr. The program includes
 * dotopt.h first. Lengths in mm, mu_a and mu_s' in mm^-1, phases in degrees.
 */
#ifndef NIRDOT_DATA_H
#define NIRDOT_DATA_H

#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "nirdot_physics.h"

#if defined(__GNUC__)       /* a program need not use all of it */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

/* ---- what a program uses: options --------------------------------------- */

enum { NIR_LABELS = 6, NIR_TUMOURS = NIR_LABELS - 1 };      /* label 0: air, 1: tissue, 2 to 6: tumours */
enum { NIR_DATA_VERSION = 1 };                              /* of the files */

/* NIR_NO_PAIR (of nirdot_physics.h) is the source of a pair that a phantom does not have. */

typedef enum { NIR_TRAIN, NIR_VAL, NIR_TEST, NIR_SPLITS } nir_split;
static const char *const nir_split_names[NIR_SPLITS] = { "train", "val", "test" };

/* Where optodes may be: within a distance of a random point of the surface, or anywhere on it. */
typedef enum { NIR_PROBE_PATCH, NIR_PROBE_SURROUND, NIR_PROBES } nir_probe;
static const char *const nir_probe_names[NIR_PROBES] = { "patch", "surround" };

/* Of nir_boundary: where A(n) of the boundary condition comes from. */
enum { NIR_BOUNDARIES = 4 };
static const char *const nir_boundary_names[NIR_BOUNDARIES] = {
    [NIR_HASKELL] = "haskell", [NIR_CONTINI] = "contini", [NIR_KEIJZER] = "keijzer", [NIR_GROENHUIS] = "groenhuis" };

/* Ranges of uniform draws. A tumour's properties are those of the healthy tissue around it times its two factors. */
typedef struct {
    const char *name;
    double mu_a[2], mu_s[2];                    /* of healthy tissue, mm^-1; mu_s stands for mu_s' throughout */
    double tumour_mu_a[2], tumour_mu_s[2];      /* factors */
    double refractive_index;
} nir_properties;

/* `seed`: the ranges of Hart's original generator (breast at 800 nm). `clinical`: the same tissue with the weaker
   scattering contrast of breast tumours in the literature, 1.1 to 2 times, and the refractive index of tissue. */
static const nir_properties nir_property_presets[] = {
    { "clinical", { 0.003, 0.007 }, { 0.78, 1.18 }, { 1.5, 3.5 }, { 1.1, 2.0 }, 1.40 },
    { "seed",     { 0.003, 0.007 }, { 0.78, 1.18 }, { 1.5, 3.5 }, { 1.5, 2.5 }, 1.33 },
};

typedef struct {
    const char *name;
    int n;                      /* the grid has n^3 voxels */
    double h;                   /* of side h, mm */
    int64_t count[NIR_SPLITS];  /* phantoms */
    int tumours[2];             /* from .. to, each number as likely */
    double tumour_free;         /* of all phantoms, beside those */
    double semi_axis[2];        /* of tumours, mm */
    bool flat;                  /* the third semi-axis: 3 mm to the larger of the other two, as in the original */
    nir_probe probe;
    int sources, detectors;     /* detectors: in all, or of each source */
    bool own_detectors;         /* each source has its own */
    int least_pairs;            /* a layout with fewer is drawn again */
} nir_preset;

static const nir_preset nir_presets[] = {
    { "smoke", 16, 4, {  160,  20,  20 }, { 1, 1 }, 0.0, { 6, 12 }, false, NIR_PROBE_SURROUND,  8,  8, false,   32 },
    { "small", 32, 2, { 1200, 150, 150 }, { 1, 3 }, 0.1, { 5, 12 }, false, NIR_PROBE_PATCH,    16, 16, false,   96 },
    { "full",  64, 1, { 4000, 500, 500 }, { 0, 5 }, 0.0, { 5, 15 }, true,  NIR_PROBE_PATCH,    50, 20, true,  1000 },
};
enum { NIR_PRESETS = sizeof nir_presets / sizeof *nir_presets,
       NIR_PROPERTY_PRESETS = sizeof nir_property_presets / sizeof *nir_property_presets };

typedef struct {
    nir_preset preset;              /* a copy, to be changed field by field; its name goes into the files */
    nir_properties properties;      /* likewise */
    double tissue_semi_axis[2];     /* 25 to 30 mm in a grid of 64 mm; scales with n h, as do tumours and patch */
    double patch_radius;            /* 30 mm, straight through the tissue */
    double spacing;                 /* least distance of two sources, and of any two shared optodes, 5 mm */
    double separation[2];           /* of source and detector, 10 to 40 mm */
    double frequency_hz;            /* of the modulation, 140e6 */
    nir_boundary boundary;          /* NIR_HASKELL */
    bool fine;                      /* simulate on voxels of half the side; labels stay on those of side h */
    uint64_t seed;                  /* 42 */
    int threads;                    /* 1 */
    void (*progress)(void *user, int64_t done, int64_t count);      /* NULL; called by one thread at a time */
    void *user;
} nir_data_options;

/* The options of a size preset (smoke, small, full) with clinical properties; false for another name. */
static bool nir_data_defaults(nir_data_options *o, const char *preset);
/* Other property ranges and their refractive index (clinical, seed); false for another name. */
static bool nir_data_properties(nir_data_options *o, const char *name);

/* ---- what a program uses: datasets -------------------------------------- */

typedef struct nir_dataset {
    nir_grid grid;
    int64_t count;              /* phantoms */
    int sources, detectors, pairs;
    double frequency_hz, refractive_index;
    uint64_t seed;
    char preset[32], properties[32], probe[16], split[8], boundary[16];
    bool fine;
    uint8_t  *label;            /* [count][n^3] */
    float    *property;         /* [count][NIR_LABELS][2]: mu_a, mu_s' of label 1 + index; 0: no such label */
    float    *ellipsoid;        /* [count][15], the tissue: centre, semi-axes, rotation (rows: body axes) */
    float    *tumour;           /* [count][NIR_TUMOURS][15], unclipped; semi-axes 0: no such tumour */
    float    *source;           /* [count][sources][3], on the surface */
    float    *detector;         /* [count][detectors][3] */
    uint16_t *pair;             /* [count][pairs][2]: source, detector; NIR_NO_PAIR after a phantom's last */
    float    *log_amplitude;    /* [count][pairs], without noise; 0 for no pair, as the phase */
    float    *phase;            /* [count][pairs], degrees */
} nir_dataset;

/* A split of its own; NULL on failure. */
static nir_dataset *nir_dataset_generate(const nir_data_options *options, nir_split split);
static bool nir_dataset_save(dot_context *ctx, const nir_dataset *d, const char *path);
/* Refuses a file in which any name, type, shape or value is not as nir_dataset_save writes it. */
static nir_dataset *nir_dataset_load(dot_context *ctx, const char *path);
static void nir_dataset_free(nir_dataset *d);

static int64_t nir_dataset_voxels(const nir_dataset *d);                            /* n^3 */
/* [n^3][2], channels-last: mu_a and mu_s', 0 in air. */
static void nir_dataset_volume(const nir_dataset *d, int64_t index, float *mu);
static nir_ellipsoid nir_dataset_ellipsoid(const nir_dataset *d, int64_t index);
static int nir_dataset_pairs(const nir_dataset *d, int64_t index);                  /* of this phantom */
static double nir_dataset_separation(const nir_dataset *d, int64_t index, int pair);

/* What any measurement of diffuse light must show: the amplitude falls and the phase grows with the separation.
   Slopes are per mm, of least squares; correlations are those of log amplitude and phase with the separation. */
typedef struct {
    double amplitude_slope, phase_slope, amplitude_correlation, phase_correlation;
    bool ok;                    /* signs as they must be, correlations beyond 0.6 */
} nir_sanity;
static nir_sanity nir_dataset_sanity(const nir_dataset *d, int64_t index);

/* ---- what a program uses: noise ----------------------------------------- */

/* Standard deviations. The log amplitude's is sqrt(amplitude^2 + (floor A_strongest/A)^2), where A_strongest is the
   phantom's strongest channel; with a floor, the phase's is never less than that angle in radians. Coupling errors
   are common to all channels of an optode. `original`: additive with `amplitude` times the mean amplitude, amplitudes
   cut at 1e-8, phases at 0 and 360 degrees. */
typedef struct {
    const char *name;
    double amplitude, phase;                    /* relative; degrees */
    double floor;                               /* relative to the strongest channel */
    double coupling_amplitude, coupling_phase;  /* relative; degrees */
    bool original;
} nir_noise;

static const nir_noise nir_noise_presets[] = {
    { "none",     0,     0,    0,    0,    0,   false },
    { "low",      0.005, 0.25, 0,    0,    0,   false },
    { "default",  0.01,  0.5,  0,    0,    0,   false },
    { "high",     0.03,  2,    0,    0,    0,   false },
    { "coupled",  0.01,  0.5,  1e-5, 0.03, 0.5, false },
    { "original", 0.005, 0.5,  0,    0,    0,   true },
};
enum { NIR_NOISE_PRESETS = sizeof nir_noise_presets / sizeof *nir_noise_presets };

static const nir_noise *nir_noise_find(const char *name);                           /* NULL for another name */
/* A phantom's measurements ([pairs] each) with noise: a pure function of (seed, epoch, index) and the dataset. */
static void nir_noise_apply(const nir_dataset *d, int64_t index, const nir_noise *noise, uint64_t seed, uint32_t epoch,
                            float *log_amplitude, float *phase);

/* ---- what a program uses: volumes --------------------------------------- */

/* One channel (0: mu_a, 1: mu_s') of a volume [voxels][2]. */
static void nir_volume_channel(const float *mu, int64_t voxels, int channel, float *out);
/* NIfTI-1 (.nii), one file: float32 [z][y][x], mm, the middle of the grid at the origin. */
static bool nir_write_nifti(const char *path, const float *volume, int n, double h);

/* ---- errors ------------------------------------------------------------- */

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static bool nir_data_fail(const char *function, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", function);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    va_end(arguments);
    return false;
}

/* ---- options ------------------------------------------------------------ */

static bool nir_data_defaults(nir_data_options *o, const char *preset)
{
    memset(o, 0, sizeof *o);
    for (int i = 0; i < NIR_PRESETS; ++i)
        if (strcmp(nir_presets[i].name, preset) == 0) o->preset = nir_presets[i];
    if (!o->preset.name) return nir_data_fail("nir_data_defaults", "no preset '%s': smoke, small or full", preset);
    o->properties = nir_property_presets[0];
    o->tissue_semi_axis[0] = 25;
    o->tissue_semi_axis[1] = 30;
    o->patch_radius = 30;
    o->spacing = 5;
    o->separation[0] = 10;
    o->separation[1] = 40;
    o->frequency_hz = 140e6;
    o->boundary = NIR_HASKELL;
    o->seed = 42;
    o->threads = 1;
    return true;
}

static bool nir_data_properties(nir_data_options *o, const char *name)
{
    for (int i = 0; i < NIR_PROPERTY_PRESETS; ++i)
        if (strcmp(nir_property_presets[i].name, name) == 0) {
            o->properties = nir_property_presets[i];
            return true;
        }
    return nir_data_fail("nir_data_properties", "no properties '%s': clinical or seed", name);
}

static double nir_data_scale(const nir_data_options *o) { return o->preset.n * o->preset.h / 64; }

static bool nir_data_range(const char *what, const double range[2], double low, double high)
{
    return (range[0] >= low && range[0] <= range[1] && range[1] <= high) ||
           nir_data_fail("nir_dataset_generate", "%s from %g to %g, expected a range within %g to %g", what,
                         range[0], range[1], low, high);
}

static bool nir_data_number(const char *what, double value, double low, double high)
{
    return (value >= low && value <= high) ||
           nir_data_fail("nir_dataset_generate", "%s is %g, expected %g to %g", what, value, low, high);
}

static bool nir_data_check(const nir_data_options *o)
{
    const nir_preset *p = &o->preset;
    const double voxel = p->h * sqrt(0.75) / nir_data_scale(o);     /* a smaller ball may hold no voxel's centre */
    const double tumours[2] = { p->tumours[0], p->tumours[1] };
    return nir_data_number("n", p->n, 8, 256) && nir_data_number("h", p->h, 0.1, 100) &&
           nir_data_range("the number of tumours", tumours, 0, NIR_TUMOURS) &&
           nir_data_number("the share of phantoms without tumours", p->tumour_free, 0, 1) &&
           nir_data_range("semi-axes of tumours", p->semi_axis, voxel, 20) &&
           (!p->flat || nir_data_number("the least third semi-axis, 3 mm,", 3, voxel, p->semi_axis[0])) &&
           nir_data_range("semi-axes of the tissue", o->tissue_semi_axis, 10, 31) &&
           nir_data_number("sources", p->sources, 1, 1000) && nir_data_number("detectors", p->detectors, 1, 1000) &&
           nir_data_number("detectors in all", (double)p->detectors * (p->own_detectors ? p->sources : 1), 1,
                           NIR_NO_PAIR - 1) &&
           nir_data_number("the least number of pairs", p->least_pairs, 1, (double)p->sources * p->detectors) &&
           nir_data_number("probe", (double)p->probe, 0, NIR_PROBES - 1) &&
           nir_data_number("boundary", (double)o->boundary, 0, NIR_BOUNDARIES - 1) &&
           nir_data_number("the patch's radius", o->patch_radius, 1, 100) &&
           nir_data_number("the spacing", o->spacing, 0, 20) &&
           nir_data_range("separations", o->separation, 1, 100) &&
           nir_data_range("mu_a", o->properties.mu_a, 1e-5, 0.1) &&
           nir_data_range("mu_s'", o->properties.mu_s, 0.1, 10) &&
           nir_data_range("factors of mu_a", o->properties.tumour_mu_a, 0.1, 10) &&
           nir_data_range("factors of mu_s'", o->properties.tumour_mu_s, 0.1, 10) &&
           nir_data_number("the refractive index", o->properties.refractive_index, 1, 2) &&
           nir_data_number("the frequency", o->frequency_hz, 0, 1e9) && nir_data_number("threads", o->threads, 1, 256);
}

/* ---- random draws ------------------------------------------------------- */

/* Draws in a row from one stream. A stream belongs to one use, split and phantom. */
typedef struct { uint64_t seed, stream, index; } nir_draws;
enum { NIR_DRAW_PHANTOM = 0x4e, NIR_DRAW_OPTODES, NIR_DRAW_NOISE };

static nir_draws nir_draws_of(uint64_t seed, int use, uint64_t part, int64_t phantom)
{
    nir_draws d = { seed, (uint64_t)use << 56 | part << 32 | (uint64_t)phantom, 0 };
    return d;
}

static double nir_draw_uniform(nir_draws *d, double low, double high)
{
    return low + (high - low) * dot_random_uniform(d->seed, d->stream, d->index++);
}

static double nir_draw_normal(nir_draws *d) { return dot_random_normal(d->seed, d->stream, d->index++); }

/* Stored values are float, and everything is computed from the stored values. */
static double nir_data_single(double value) { return (double)(float)value; }

/* ---- geometry ----------------------------------------------------------- */

/* Uniform on SO(3): the rotation of a unit quaternion that is uniform on the sphere (Shoemake 1992). */
static void nir_draw_rotation(nir_draws *d, double r[9])
{
    double q[4], length = 0;
    for (int i = 0; i < 4; ++i) {
        q[i] = nir_draw_normal(d);
        length += q[i] * q[i];
    }
    const double s = 1 / sqrt(length), w = s * q[0], x = s * q[1], y = s * q[2], z = s * q[3];
    const double matrix[9] = { 1 - 2 * (y * y + z * z), 2 * (x * y - z * w),     2 * (x * z + y * w),
                               2 * (x * y + z * w),     1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
                               2 * (x * z - y * w),     2 * (y * z + x * w),     1 - 2 * (x * x + y * y) };
    for (int i = 0; i < 9; ++i) r[i] = nir_data_single(matrix[i]);
}

/* A point in the laboratory frame from its place in the body's, there in units of the semi-axes. */
static void nir_ellipsoid_point(const nir_ellipsoid *e, const double u[3], double point[3])
{
    for (int i = 0; i < 3; ++i) {
        point[i] = e->centre[i];
        for (int k = 0; k < 3; ++k) point[i] += e->rotation[3 * k + i] * e->semi_axis[k] * u[k];
    }
}

/* The distance from the centre in units of the surface's in that direction: 1 on the surface. */
static double nir_ellipsoid_radius(const nir_ellipsoid *e, const double point[3])
{
    double sum = 0;
    for (int k = 0; k < 3; ++k) {
        double u = 0;
        for (int i = 0; i < 3; ++i) u += e->rotation[3 * k + i] * (point[i] - e->centre[i]);
        sum += u * u / (e->semi_axis[k] * e->semi_axis[k]);
    }
    return sqrt(sum);
}

static double nir_data_distance(const double a[3], const double b[3])
{
    return sqrt((a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1]) + (a[2] - b[2]) * (a[2] - b[2]));
}

/* Uniform in the unit ball. */
static void nir_draw_in_ball(nir_draws *d, double u[3])
{
    do
        for (int i = 0; i < 3; ++i) u[i] = nir_draw_uniform(d, -1, 1);
    while (u[0] * u[0] + u[1] * u[1] + u[2] * u[2] > 1);
}

/* Uniform on the surface by area: the unit sphere's surface is stretched there in proportion to |(u_k/a_k)|. */
static void nir_draw_on_surface(nir_draws *d, const nir_ellipsoid *e, double point[3])
{
    const double *a = e->semi_axis, least = fmin(a[0], fmin(a[1], a[2]));
    double u[3], stretch;
    do {
        double length = 0;
        for (int i = 0; i < 3; ++i) {
            u[i] = nir_draw_normal(d);
            length += u[i] * u[i];
        }
        stretch = 0;
        for (int i = 0; i < 3; ++i) {
            u[i] /= sqrt(length);
            stretch += u[i] / a[i] * (u[i] / a[i]);
        }
    } while (nir_draw_uniform(d, 0, 1) > least * sqrt(stretch));
    nir_ellipsoid_point(e, u, point);
    for (int i = 0; i < 3; ++i) point[i] = nir_data_single(point[i]);
}

/* Adds weight * (R^T S^2 R) of an ellipsoid, whose axes are longer by `more`. */
static void nir_data_add_shape(const nir_ellipsoid *e, double more, double weight, double m[3][3])
{
    for (int k = 0; k < 3; ++k) {
        const double s = (e->semi_axis[k] + more) * (e->semi_axis[k] + more) * weight, *axis = e->rotation + 3 * k;
        for (int i = 0; i < 3; ++i)
            for (int j = 0; j < 3; ++j) m[i][j] += s * axis[i] * axis[j];
    }
}

/* r^T M^-1 r for a symmetric M, by its adjugate. */
static double nir_data_inverse_form(const double m[3][3], const double r[3])
{
    double form = 0, c[3][3];
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            const int i1 = (i + 1) % 3, i2 = (i + 2) % 3, j1 = (j + 1) % 3, j2 = (j + 2) % 3;
            c[i][j] = m[i1][j1] * m[i2][j2] - m[i1][j2] * m[i2][j1];
            form += r[i] * c[i][j] * r[j];
        }
    return form / (m[0][0] * c[0][0] + m[0][1] * c[0][1] + m[0][2] * c[0][2]);
}

/* Whether two ellipsoids, grown by `gap`/2 each, have no point in common. The contact function of Perram and Wertheim
   (1985), l (1-l) r^T [(1-l) A + l B]^-1 r, is above 1 for some l in (0, 1) if and only if so; trying 63 values of l
   may miss a narrow gap, never an overlap. */
static bool nir_ellipsoids_apart(const nir_ellipsoid *a, const nir_ellipsoid *b, double gap)
{
    const double r[3] = { b->centre[0] - a->centre[0], b->centre[1] - a->centre[1], b->centre[2] - a->centre[2] };
    for (int i = 1; i < 64; ++i) {
        const double l = i / 64.0;
        double m[3][3] = { { 0 } };
        nir_data_add_shape(a, gap / 2, 1 - l, m);
        nir_data_add_shape(b, gap / 2, l, m);
        if (l * (1 - l) * nir_data_inverse_form((const double (*)[3])m, r) > 1) return true;
    }
    return false;
}

/* The part of an ellipsoid's volume that lies within another, by 552 points on a lattice. */
static double nir_ellipsoid_part_within(const nir_ellipsoid *inner, const nir_ellipsoid *outer)
{
    int all = 0, within = 0;
    for (int i = 0; i < 1000; ++i) {
        const double u[3] = { (i % 10 - 4.5) / 5, (i / 10 % 10 - 4.5) / 5, (i / 100 - 4.5) / 5 };
        double point[3];
        if (u[0] * u[0] + u[1] * u[1] + u[2] * u[2] > 1) continue;
        nir_ellipsoid_point(inner, u, point);
        ++all;
        within += nir_ellipsoid_radius(outer, point) <= 1;
    }
    return (double)within / all;
}

/* ---- phantoms ----------------------------------------------------------- */

typedef struct {
    nir_ellipsoid tissue, tumour[NIR_TUMOURS];
    int tumours;
    double property[NIR_LABELS][2];
} nir_phantom;

static int nir_tumour_count(nir_draws *d, const nir_preset *p)
{
    const bool none = nir_draw_uniform(d, 0, 1) < p->tumour_free;
    const int count = p->tumours[0] + (int)nir_draw_uniform(d, 0, p->tumours[1] - p->tumours[0] + 1);
    return none ? 0 : count;
}

/* One tumour anywhere in the tissue that lies at least four fifths within, a millimetre from the others; false if 200
   were drawn in vain. */
static bool nir_place_tumour(nir_draws *d, const nir_data_options *o, nir_phantom *p)
{
    const nir_preset *preset = &o->preset;
    const double scale = nir_data_scale(o);
    nir_ellipsoid *e = &p->tumour[p->tumours];
    for (int attempt = 0; attempt < 200; ++attempt) {
        double u[3], *a = e->semi_axis;
        bool good;
        nir_draw_in_ball(d, u);
        nir_ellipsoid_point(&p->tissue, u, e->centre);
        for (int k = 0; k < 3; ++k) a[k] = nir_draw_uniform(d, preset->semi_axis[0], preset->semi_axis[1]);
        if (preset->flat) a[2] = nir_draw_uniform(d, 3, fmax(a[0], a[1]));
        for (int k = 0; k < 3; ++k) {
            a[k] = nir_data_single(scale * a[k]);
            e->centre[k] = nir_data_single(e->centre[k]);
        }
        nir_draw_rotation(d, e->rotation);
        good = nir_ellipsoid_part_within(e, &p->tissue) >= 0.8;
        for (int k = 0; good && k < p->tumours; ++k) good = nir_ellipsoids_apart(e, &p->tumour[k], 1);
        if (good) return true;
    }
    memset(e, 0, sizeof *e);
    return false;
}

/* Fewer tumours than were asked for are placed where the tissue is full. */
static void nir_phantom_draw(const nir_data_options *o, nir_split split, int64_t index, nir_phantom *p)
{
    const nir_properties *r = &o->properties;
    nir_draws d = nir_draws_of(o->seed, NIR_DRAW_PHANTOM, (uint64_t)split, index);
    memset(p, 0, sizeof *p);
    for (int k = 0; k < 3; ++k)
        p->tissue.semi_axis[k] =
            nir_data_single(nir_data_scale(o) * nir_draw_uniform(&d, o->tissue_semi_axis[0], o->tissue_semi_axis[1]));
    nir_draw_rotation(&d, p->tissue.rotation);
    const double mu[2] = { nir_draw_uniform(&d, r->mu_a[0], r->mu_a[1]), nir_draw_uniform(&d, r->mu_s[0], r->mu_s[1]) };
    double factor[NIR_LABELS][2] = { { 1, 1 } };
    for (int k = 1; k < NIR_LABELS; ++k) {
        factor[k][0] = nir_draw_uniform(&d, r->tumour_mu_a[0], r->tumour_mu_a[1]);
        factor[k][1] = nir_draw_uniform(&d, r->tumour_mu_s[0], r->tumour_mu_s[1]);
    }
    const int wanted = nir_tumour_count(&d, &o->preset);
    while (p->tumours < wanted && nir_place_tumour(&d, o, p)) ++p->tumours;
    for (int k = 0; k <= p->tumours; ++k)
        for (int c = 0; c < 2; ++c) p->property[k][c] = nir_data_single(mu[c] * factor[k][c]);
}

/* The labels of voxels by what lies at their centres: [z][y][x]. */
static void nir_phantom_label(const nir_phantom *p, nir_grid grid, uint8_t *label)
{
    const int n = grid.n;
    for (int z = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int x = 0; x < n; ++x, ++label) {
                const double point[3] = { (x + 0.5 - n / 2.0) * grid.h, (y + 0.5 - n / 2.0) * grid.h,
                                          (z + 0.5 - n / 2.0) * grid.h };
                *label = nir_ellipsoid_radius(&p->tissue, point) <= 1;
                for (int k = 0; *label == 1 && k < p->tumours; ++k)
                    if (nir_ellipsoid_radius(&p->tumour[k], point) <= 1) *label = (uint8_t)(k + 2);
            }
}

/* ---- optodes ------------------------------------------------------------ */

/* Layouts are drawn into a dataset's arrays of one phantom. */
typedef struct {
    const nir_data_options *o;
    const nir_ellipsoid *tissue;
    double patch[3];            /* the patch's centre */
    float *source, *detector;   /* [..][3] */
    uint16_t *pair;             /* [..][2] */
    int sources, detectors, pairs;      /* so far */
} nir_layout;

static void nir_data_point(const float *from, double point[3])
{
    for (int i = 0; i < 3; ++i) point[i] = (double)from[i];
}

/* The distance to the nearest of some optodes. */
static double nir_data_nearest(const double point[3], const float *optode, int count)
{
    double nearest = INFINITY, other[3];
    for (int i = 0; i < count; ++i) {
        nir_data_point(optode + 3 * i, other);
        nearest = fmin(nearest, nir_data_distance(point, other));
    }
    return nearest;
}

/* A place for the next source, for the next shared detector, or for the next detector of source `of`. */
static bool nir_place_optode(nir_draws *d, const nir_layout *l, bool detector, int of, float *out)
{
    const nir_data_options *o = l->o;
    for (int attempt = 0; attempt < 4000; ++attempt) {
        double point[3], separation;
        nir_draw_on_surface(d, l->tissue, point);
        const double from_patch = nir_data_distance(point, l->patch);
        if (o->preset.probe == NIR_PROBE_PATCH && from_patch > o->patch_radius * nir_data_scale(o)) continue;
        if (of >= 0) {
            separation = nir_data_nearest(point, l->source + 3 * of, 1);
            if (separation < o->separation[0] || separation > o->separation[1]) continue;
        } else if (nir_data_nearest(point, l->source, l->sources) < o->spacing ||
                   (detector && nir_data_nearest(point, l->detector, l->detectors) < o->spacing)) {
            continue;
        }
        for (int i = 0; i < 3; ++i) out[i] = (float)point[i];
        return true;
    }
    return false;
}

static void nir_add_pairs(nir_layout *l, int source, int from, int to)
{
    for (int k = from; k < to; ++k) {
        double point[3];
        nir_data_point(l->detector + 3 * k, point);
        const double separation = nir_data_nearest(point, l->source + 3 * source, 1);
        if (separation < l->o->separation[0] || separation > l->o->separation[1]) continue;
        l->pair[2 * l->pairs] = (uint16_t)source;
        l->pair[2 * l->pairs++ + 1] = (uint16_t)k;
    }
}

static bool nir_layout_attempt(nir_draws *d, nir_layout *l)
{
    const nir_preset *p = &l->o->preset;
    const int groups = p->own_detectors ? p->sources : 1;
    l->sources = l->detectors = l->pairs = 0;
    nir_draw_on_surface(d, l->tissue, l->patch);
    for (; l->sources < p->sources; ++l->sources)
        if (!nir_place_optode(d, l, false, -1, l->source + 3 * l->sources)) return false;
    for (int group = 0; group < groups; ++group)
        for (int k = 0; k < p->detectors; ++k, ++l->detectors)
            if (!nir_place_optode(d, l, true, p->own_detectors ? group : -1, l->detector + 3 * l->detectors))
                return false;
    for (int s = 0; s < p->sources; ++s) {
        const int first = p->own_detectors ? s * p->detectors : 0;
        nir_add_pairs(l, s, first, first + p->detectors);
    }
    return l->pairs >= p->least_pairs;
}

static bool nir_layout_draw(nir_layout *l, uint64_t seed, nir_split split, int64_t index)
{
    nir_draws d = nir_draws_of(seed, NIR_DRAW_OPTODES, (uint64_t)split, index);
    for (int attempt = 0; attempt < 200; ++attempt)
        if (nir_layout_attempt(&d, l)) return true;
    return false;
}

/* ---- memory ------------------------------------------------------------- */

static void nir_dataset_free(nir_dataset *d)
{
    if (!d) return;
    free(d->label);
    free(d->property);
    free(d->ellipsoid);
    free(d->tumour);
    free(d->source);
    free(d->detector);
    free(d->pair);
    free(d->log_amplitude);
    free(d->phase);
    free(d);
}

/* Zeros, at least one byte; NULL also when the size does not fit. */
static void *nir_data_array(int64_t count, int64_t each, size_t size)
{
    const size_t whole = (size_t)count;
    if (each > 0 && whole > SIZE_MAX / size / (size_t)each) return NULL;
    return calloc(whole * (size_t)each + 1, size);
}

/* Room for the sizes that are set. */
static bool nir_dataset_allocate(nir_dataset *d)
{
    d->label = (uint8_t *)nir_data_array(d->count, nir_dataset_voxels(d), 1);
    d->property = (float *)nir_data_array(d->count, 2 * NIR_LABELS, sizeof(float));
    d->ellipsoid = (float *)nir_data_array(d->count, 15, sizeof(float));
    d->tumour = (float *)nir_data_array(d->count, 15 * NIR_TUMOURS, sizeof(float));
    d->source = (float *)nir_data_array(d->count, 3 * (int64_t)d->sources, sizeof(float));
    d->detector = (float *)nir_data_array(d->count, 3 * (int64_t)d->detectors, sizeof(float));
    d->pair = (uint16_t *)nir_data_array(d->count, 2 * (int64_t)d->pairs, sizeof(uint16_t));
    d->log_amplitude = (float *)nir_data_array(d->count, d->pairs, sizeof(float));
    d->phase = (float *)nir_data_array(d->count, d->pairs, sizeof(float));
    return d->label && d->property && d->ellipsoid && d->tumour && d->source && d->detector && d->pair &&
           d->log_amplitude && d->phase;
}

/* ---- reading a dataset -------------------------------------------------- */

static int64_t nir_dataset_voxels(const nir_dataset *d) { return (int64_t)d->grid.n * d->grid.n * d->grid.n; }

static void nir_dataset_volume(const nir_dataset *d, int64_t index, float *mu)
{
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + index * voxels;
    float of_label[NIR_LABELS + 1][2] = { { 0, 0 } };
    memcpy(of_label[1], d->property + index * 2 * NIR_LABELS, 2 * NIR_LABELS * sizeof(float));
    for (int64_t i = 0; i < voxels; ++i) memcpy(mu + 2 * i, of_label[label[i]], 2 * sizeof(float));
}

static nir_ellipsoid nir_data_unpack(const float *from)
{
    nir_ellipsoid e;
    for (int i = 0; i < 3; ++i) {
        e.centre[i] = (double)from[i];
        e.semi_axis[i] = (double)from[3 + i];
    }
    for (int i = 0; i < 9; ++i) e.rotation[i] = (double)from[6 + i];
    return e;
}

static void nir_data_pack(const nir_ellipsoid *e, float *to)
{
    for (int i = 0; i < 3; ++i) {
        to[i] = (float)e->centre[i];
        to[3 + i] = (float)e->semi_axis[i];
    }
    for (int i = 0; i < 9; ++i) to[6 + i] = (float)e->rotation[i];
}

static nir_ellipsoid nir_dataset_ellipsoid(const nir_dataset *d, int64_t index)
{
    return nir_data_unpack(d->ellipsoid + 15 * index);
}

static int nir_dataset_pairs(const nir_dataset *d, int64_t index)
{
    const uint16_t *pair = d->pair + 2 * index * d->pairs;
    int count = 0;
    while (count < d->pairs && pair[2 * count] != NIR_NO_PAIR) ++count;
    return count;
}

static double nir_dataset_separation(const nir_dataset *d, int64_t index, int pair)
{
    const uint16_t *p = d->pair + 2 * (index * d->pairs + pair);
    double source[3], detector[3];
    nir_data_point(d->source + 3 * (index * d->sources + p[0]), source);
    nir_data_point(d->detector + 3 * (index * d->detectors + p[1]), detector);
    return nir_data_distance(source, detector);
}

/* Slope and correlation of y against x by sums of a first pass. */
static void nir_data_regress(const double sum[6], double *slope, double *correlation)
{
    const double n = sum[0], xx = sum[3] - sum[1] * sum[1] / n, xy = sum[4] - sum[1] * sum[2] / n;
    const double yy = sum[5] - sum[2] * sum[2] / n;
    *slope = xy / xx;
    *correlation = xy / sqrt(xx * yy);
}

static nir_sanity nir_dataset_sanity(const nir_dataset *d, int64_t index)
{
    nir_sanity s;
    double sum[2][6] = { { 0 } };
    const int count = nir_dataset_pairs(d, index);
    for (int i = 0; i < count; ++i)
        for (int c = 0; c < 2; ++c) {
            const double x = nir_dataset_separation(d, index, i);
            const double y = (double)(c ? d->phase : d->log_amplitude)[index * d->pairs + i];
            const double term[6] = { 1, x, y, x * x, x * y, y * y };
            for (int k = 0; k < 6; ++k) sum[c][k] += term[k];
        }
    nir_data_regress(sum[0], &s.amplitude_slope, &s.amplitude_correlation);
    nir_data_regress(sum[1], &s.phase_slope, &s.phase_correlation);
    s.ok = s.amplitude_slope < 0 && s.phase_slope > 0 && s.amplitude_correlation < -0.6 && s.phase_correlation > 0.6;
    return s;
}

/* ---- simulation --------------------------------------------------------- */

/* What a thread needs to simulate one phantom after the other, on the grid of the simulation. */
typedef struct {
    nir_grid grid;
    nir_workspace *workspace;
    uint8_t *label;             /* [n^3] */
    float *mu_a, *mu_s;         /* [n^3] */
    double (*source)[3], (*detector)[3];
    double *log_amplitude, *phase;
} nir_simulator;

static void nir_simulator_free(nir_simulator *s)
{
    if (s->workspace) nir_workspace_free(s->workspace);
    free(s->label);
    free(s->mu_a);
    free(s->mu_s);
    free(s->source);
    free(s->detector);
    free(s->log_amplitude);
    free(s->phase);
}

static bool nir_simulator_make(nir_simulator *s, const nir_data_options *o, const nir_dataset *d)
{
    nir_options physics = nir_defaults();
    physics.frequency_hz = o->frequency_hz;
    physics.refractive_index = o->properties.refractive_index;
    physics.boundary = o->boundary;
    memset(s, 0, sizeof *s);
    s->grid = d->grid;
    if (o->fine) {
        s->grid.n *= 2;
        s->grid.h /= 2;
    }
    const int64_t voxels = (int64_t)s->grid.n * s->grid.n * s->grid.n;
    s->workspace = nir_workspace_new(s->grid, &physics);
    s->label = (uint8_t *)nir_data_array(voxels, 1, 1);
    s->mu_a = (float *)nir_data_array(voxels, 1, sizeof(float));
    s->mu_s = (float *)nir_data_array(voxels, 1, sizeof(float));
    s->source = (double (*)[3])nir_data_array(d->sources, 1, sizeof *s->source);
    s->detector = (double (*)[3])nir_data_array(d->detectors, 1, sizeof *s->detector);
    s->log_amplitude = (double *)nir_data_array(d->pairs, 1, sizeof(double));
    s->phase = (double *)nir_data_array(d->pairs, 1, sizeof(double));
    if (s->workspace && s->label && s->mu_a && s->mu_s && s->source && s->detector && s->log_amplitude && s->phase)
        return true;
    nir_simulator_free(s);
    return false;
}

/* The measurements of a phantom with the optodes and pairs in the dataset. */
static bool nir_simulate(nir_simulator *s, const nir_phantom *p, nir_dataset *d, int64_t index)
{
    const int64_t voxels = (int64_t)s->grid.n * s->grid.n * s->grid.n, first = index * d->pairs;
    const int pairs = nir_dataset_pairs(d, index);
    nir_phantom_label(p, s->grid, s->label);
    for (int64_t i = 0; i < voxels; ++i) {
        s->mu_a[i] = s->label[i] ? (float)p->property[s->label[i] - 1][0] : 0;
        s->mu_s[i] = s->label[i] ? (float)p->property[s->label[i] - 1][1] : 0;
    }
    for (int i = 0; i < d->sources; ++i) nir_data_point(d->source + 3 * (index * d->sources + i), s->source[i]);
    for (int i = 0; i < d->detectors; ++i) nir_data_point(d->detector + 3 * (index * d->detectors + i), s->detector[i]);
    if (!nir_set_tissue(s->workspace, &p->tissue, s->label) || !nir_set_properties(s->workspace, s->mu_a, s->mu_s) ||
        !nir_set_optodes(s->workspace, (const double (*)[3])s->source, d->sources, (const double (*)[3])s->detector,
                         d->detectors) ||
        !nir_forward(s->workspace, d->pair + 2 * first, pairs, NIR_KEEP_NOTHING, s->log_amplitude, s->phase))
        return false;
    for (int i = 0; i < pairs; ++i) {
        d->log_amplitude[first + i] = (float)s->log_amplitude[i];
        d->phase[first + i] = (float)s->phase[i];
    }
    return true;
}

/* ---- generation --------------------------------------------------------- */

/* A phantom's geometry, properties and labels. */
static void nir_generate_phantom(const nir_data_options *o, nir_split split, nir_dataset *d, int64_t index,
                                 nir_phantom *p)
{
    nir_phantom_draw(o, split, index, p);
    nir_data_pack(&p->tissue, d->ellipsoid + 15 * index);
    for (int k = 0; k < p->tumours; ++k) nir_data_pack(&p->tumour[k], d->tumour + 15 * (index * NIR_TUMOURS + k));
    for (int k = 0; k < NIR_LABELS; ++k)
        for (int c = 0; c < 2; ++c) d->property[2 * (index * NIR_LABELS + k) + c] = (float)p->property[k][c];
    nir_phantom_label(p, d->grid, d->label + index * nir_dataset_voxels(d));
}

/* Its optodes and pairs. */
static bool nir_generate_layout(const nir_data_options *o, nir_split split, nir_dataset *d, int64_t index,
                                const nir_phantom *p)
{
    nir_layout l;
    memset(&l, 0, sizeof l);
    l.o = o;
    l.tissue = &p->tissue;
    l.source = d->source + 3 * index * d->sources;
    l.detector = d->detector + 3 * index * d->detectors;
    l.pair = d->pair + 2 * index * d->pairs;
    if (!nir_layout_draw(&l, o->seed, split, index)) return false;
    for (int i = l.pairs; i < d->pairs; ++i) {
        l.pair[2 * i] = NIR_NO_PAIR;
        l.pair[2 * i + 1] = 0;
    }
    return true;
}

/* Phantom `index` of a split; false with a message. */
static bool nir_generate_one(const nir_data_options *o, nir_split split, nir_simulator *simulator, nir_dataset *d,
                             int64_t index, char *message, size_t size)
{
    nir_phantom p;
    nir_generate_phantom(o, split, d, index, &p);
    if (!nir_generate_layout(o, split, d, index, &p)) {
        snprintf(message, size, "no room for %d sources and %d detectors with %d pairs (spacing %g mm, separations %g "
                 "to %g mm)", o->preset.sources, o->preset.detectors, o->preset.least_pairs, o->spacing,
                 o->separation[0], o->separation[1]);
        return false;
    }
    if (!nir_simulate(simulator, &p, d, index)) {
        snprintf(message, size, "the diffusion model failed, as said above");
        return false;
    }
    const nir_sanity s = nir_dataset_sanity(d, index);
    if (!s.ok)
        snprintf(message, size, "implausible measurements: with the separation, log amplitude changes by %g per mm "
                 "(correlation %g), phase by %g degrees per mm (%g)", s.amplitude_slope, s.amplitude_correlation,
                 s.phase_slope, s.phase_correlation);
    return s.ok;
}

/* Threads take one phantom after the other. Of several failures the one of the first phantom is told. */
typedef struct {
    const nir_data_options *o;
    nir_split split;
    nir_dataset *d;
    pthread_mutex_t lock;
    int64_t next, done, failed;
    char message[256];
} nir_generation;

/* The next phantom's index after `index` has been made; -1: there is none. */
static int64_t nir_generate_next(nir_generation *g, int64_t index, const char *message)
{
    pthread_mutex_lock(&g->lock);
    if (index >= 0) ++g->done;
    if (*message && (g->failed < 0 || index < g->failed)) {
        g->failed = index;
        snprintf(g->message, sizeof g->message, "%s", message);
    }
    if (index >= 0 && g->o->progress) g->o->progress(g->o->user, g->done, g->d->count);
    index = g->failed < 0 && g->next < g->d->count ? g->next++ : -1;
    pthread_mutex_unlock(&g->lock);
    return index;
}

static void *nir_generate_worker(void *argument)
{
    nir_generation *g = (nir_generation *)argument;
    nir_simulator s;
    char message[sizeof g->message] = "";
    const bool ready = nir_simulator_make(&s, g->o, g->d);
    for (int64_t index = -1; (index = nir_generate_next(g, index, message)) >= 0;) {
        if (!ready) snprintf(message, sizeof message, "no workspace for the diffusion model");
        else nir_generate_one(g->o, g->split, &s, g->d, index, message, sizeof message);
    }
    if (ready) nir_simulator_free(&s);
    return NULL;
}

/* This thread works too, so that it goes on, more slowly, where no other can be started. */
static void nir_generate_all(nir_generation *g)
{
    pthread_t thread[256];
    int started = 0;
    pthread_mutex_init(&g->lock, NULL);
    while (started < g->o->threads - 1 && pthread_create(&thread[started], NULL, nir_generate_worker, g) == 0)
        ++started;
    nir_generate_worker(g);
    for (int i = 0; i < started; ++i) pthread_join(thread[i], NULL);
    pthread_mutex_destroy(&g->lock);
}

static nir_dataset *nir_dataset_like(const nir_data_options *o, nir_split split)
{
    const nir_preset *p = &o->preset;
    nir_dataset *d = (nir_dataset *)calloc(1, sizeof *d);
    if (!d) return NULL;
    d->grid.n = p->n;
    d->grid.h = p->h;
    d->count = p->count[split];
    d->sources = p->sources;
    d->detectors = p->detectors * (p->own_detectors ? p->sources : 1);
    d->pairs = p->sources * p->detectors;
    d->frequency_hz = o->frequency_hz;
    d->refractive_index = o->properties.refractive_index;
    d->seed = o->seed;
    d->fine = o->fine;
    snprintf(d->preset, sizeof d->preset, "%s", p->name);
    snprintf(d->properties, sizeof d->properties, "%s", o->properties.name);
    snprintf(d->probe, sizeof d->probe, "%s", nir_probe_names[p->probe]);
    snprintf(d->split, sizeof d->split, "%s", nir_split_names[split]);
    snprintf(d->boundary, sizeof d->boundary, "%s", nir_boundary_names[o->boundary]);
    if (nir_dataset_allocate(d)) return d;
    nir_dataset_free(d);
    return NULL;
}

static nir_dataset *nir_dataset_generate(const nir_data_options *options, nir_split split)
{
    nir_generation g;
    if (!nir_data_check(options) || !nir_data_number("split", (double)split, 0, NIR_SPLITS - 1) ||
        !nir_data_number("the number of phantoms", (double)options->preset.count[split], 0, 1e8))
        return NULL;
    memset(&g, 0, sizeof g);
    g.o = options;
    g.split = split;
    g.failed = -1;
    g.d = nir_dataset_like(options, split);
    if (!g.d) {
        nir_data_fail("nir_dataset_generate", "out of memory for %lld phantoms",
                      (long long)options->preset.count[split]);
        return NULL;
    }
    nir_generate_all(&g);
    if (g.failed < 0) return g.d;
    nir_data_fail("nir_dataset_generate", "%s phantom %lld: %s", nir_split_names[split], (long long)g.failed,
                  g.message);
    nir_dataset_free(g.d);
    return NULL;
}

/* ---- noise -------------------------------------------------------------- */

static const nir_noise *nir_noise_find(const char *name)
{
    for (int i = 0; i < NIR_NOISE_PRESETS; ++i)
        if (strcmp(nir_noise_presets[i].name, name) == 0) return &nir_noise_presets[i];
    nir_data_fail("nir_noise_find", "no noise '%s': none, low, default, high, coupled or original", name);
    return NULL;
}

/* Draws 2 i and 2 i + 1 are those of pair i; those of an optode's coupling lie far behind. */
typedef struct {
    const nir_noise *noise;
    uint64_t seed, stream;
    double strongest, mean;     /* log amplitude, amplitude */
} nir_noise_state;

static double nir_noise_draw(const nir_noise_state *s, uint64_t index)
{
    return dot_random_normal(s->seed, s->stream, index);
}

static double nir_noise_coupling(const nir_noise_state *s, int optode, int channel)
{
    const double sigma = channel ? s->noise->coupling_phase : s->noise->coupling_amplitude;
    return sigma > 0 ? sigma * nir_noise_draw(s, ((uint64_t)1 << 32) + 2 * (uint64_t)optode + (uint64_t)channel) : 0;
}

static void nir_noise_pair(const nir_noise_state *s, uint64_t pair, double *log_amplitude, double *phase)
{
    const double degrees = 57.29577951308232, z[2] = { nir_noise_draw(s, 2 * pair), nir_noise_draw(s, 2 * pair + 1) };
    const nir_noise *noise = s->noise;
    if (noise->original) {
        *log_amplitude = log(fmax(exp(*log_amplitude) + noise->amplitude * s->mean * z[0], 1e-8));
        *phase = fmin(fmax(*phase + noise->phase * z[1], 0), 360);
        return;
    }
    const double faint = noise->floor * exp(s->strongest - *log_amplitude);
    const double sigma = sqrt(noise->amplitude * noise->amplitude + faint * faint);
    *log_amplitude += sigma * z[0];
    *phase += (noise->floor > 0 ? fmax(noise->phase, sigma * degrees) : noise->phase) * z[1];
}

static void nir_noise_apply(const nir_dataset *d, int64_t index, const nir_noise *noise, uint64_t seed, uint32_t epoch,
                            float *log_amplitude, float *phase)
{
    const int count = nir_dataset_pairs(d, index);
    const uint16_t *pair = d->pair + 2 * index * d->pairs;
    nir_noise_state s = { noise, seed,
                          (uint64_t)NIR_DRAW_NOISE << 56 | (uint64_t)(epoch & 0xffffff) << 32 | (uint64_t)index,
                          -INFINITY, 0 };
    memcpy(log_amplitude, d->log_amplitude + index * d->pairs, (size_t)d->pairs * sizeof(float));
    memcpy(phase, d->phase + index * d->pairs, (size_t)d->pairs * sizeof(float));
    if (noise->amplitude == 0 && noise->phase == 0) return;
    for (int i = 0; i < count; ++i) {
        s.strongest = fmax(s.strongest, (double)log_amplitude[i]);
        s.mean += exp((double)log_amplitude[i]) / count;
    }
    for (int i = 0; i < count; ++i) {
        const int optode[2] = { pair[2 * i], d->sources + pair[2 * i + 1] };
        double value[2] = { (double)log_amplitude[i], (double)phase[i] };
        nir_noise_pair(&s, (uint64_t)i, &value[0], &value[1]);
        for (int c = 0; c < 2; ++c)
            value[c] += nir_noise_coupling(&s, optode[0], c) + nir_noise_coupling(&s, optode[1], c);
        log_amplitude[i] = (float)value[0];
        phase[i] = (float)value[1];
    }
}

/* ---- files: the tensors ------------------------------------------------- */

/* The tensors of a file. Pairs are int64 there, -1 and -1 for no pair. */
enum { NIR_T_LABEL, NIR_T_PROPERTY, NIR_T_ELLIPSOID, NIR_T_TUMOUR, NIR_T_SOURCE, NIR_T_DETECTOR, NIR_T_PAIR,
       NIR_T_LOG_AMPLITUDE, NIR_T_PHASE, NIR_TENSORS };

static void nir_data_items(const nir_dataset *d, const int64_t *pair, dot_safetensors_item item[NIR_TENSORS])
{
    const int64_t n = d->grid.n;
    const dot_safetensors_item all[NIR_TENSORS] = {
        { "label",         DOT_U8,  4, { d->count, n, n, n },            d->label },
        { "property",      DOT_F32, 3, { d->count, NIR_LABELS, 2 },      d->property },
        { "ellipsoid",     DOT_F32, 2, { d->count, 15 },                 d->ellipsoid },
        { "tumour",        DOT_F32, 3, { d->count, NIR_TUMOURS, 15 },    d->tumour },
        { "source",        DOT_F32, 3, { d->count, d->sources, 3 },      d->source },
        { "detector",      DOT_F32, 3, { d->count, d->detectors, 3 },    d->detector },
        { "pair",          DOT_I64, 3, { d->count, d->pairs, 2 },        pair },
        { "log_amplitude", DOT_F32, 2, { d->count, d->pairs },           d->log_amplitude },
        { "phase",         DOT_F32, 2, { d->count, d->pairs },           d->phase },
    };
    memcpy(item, all, sizeof all);
}

/* ---- files: writing ----------------------------------------------------- */

enum { NIR_META = 40, NIR_META_TEXT = 64 };

/* The shorter of two forms that reads back as the same number. */
static void nir_data_real(char text[NIR_META_TEXT], double value)
{
    snprintf(text, NIR_META_TEXT, "%.15g", value);
    if (strtod(text, NULL) != value) snprintf(text, NIR_META_TEXT, "%.17g", value);
}

/* key, value, ..., NULL; the numbers' texts lie in `text`. */
static void nir_data_metadata(const nir_dataset *d, char text[][NIR_META_TEXT], const char *meta[NIR_META])
{
    snprintf(text[0], NIR_META_TEXT, "%d", NIR_DATA_VERSION);
    nir_data_real(text[1], d->grid.h);
    nir_data_real(text[2], d->frequency_hz);
    nir_data_real(text[3], d->refractive_index);
    snprintf(text[4], NIR_META_TEXT, "%llu", (unsigned long long)d->seed);
    snprintf(text[5], NIR_META_TEXT, "%d", d->grid.n);
    const char *const all[] = {
        "format", "nirdot-dataset", "format_version", text[0], "code_version", "dotopt " DOTOPT_VERSION,
        "units", "mm, mm^-1, ln of fluence per unit source, degrees", "noise", "none",
        "n", text[5], "h", text[1], "frequency_hz", text[2], "refractive_index", text[3], "boundary", d->boundary,
        "preset", d->preset, "properties", d->properties, "probe", d->probe, "split", d->split, "seed", text[4],
        "fine", d->fine ? "true" : "false", NULL };
    memcpy(meta, all, sizeof all);
}

static bool nir_dataset_save(dot_context *ctx, const nir_dataset *d, const char *path)
{
    dot_safetensors_item item[NIR_TENSORS];
    char text[6][NIR_META_TEXT];
    const char *meta[NIR_META];
    const int64_t pairs = d->count * d->pairs;
    int64_t *pair = (int64_t *)nir_data_array(pairs, 2, sizeof(int64_t));
    if (!pair) return nir_data_fail("nir_dataset_save", "%s: out of memory", path);
    for (int64_t i = 0; i < pairs; ++i)
        for (int k = 0; k < 2; ++k) pair[2 * i + k] = d->pair[2 * i] == NIR_NO_PAIR ? -1 : d->pair[2 * i + k];
    nir_data_items(d, pair, item);
    nir_data_metadata(d, text, meta);
    const bool ok = dot_safetensors_write(ctx, path, item, NIR_TENSORS, meta);
    free(pair);
    return ok || nir_data_fail("nir_dataset_save", "%s", dot_error(ctx));
}

/* ---- files: reading ----------------------------------------------------- */

typedef struct {
    const char *path;
    dot_safetensors *file;
    nir_dataset *d;
} nir_loader;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static bool nir_loader_fail(const nir_loader *l, const char *format, ...)
{
    char message[256];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    return nir_data_fail("nir_dataset_load", "%s: %s", l->path, message);
}

/* A piece of metadata; the text may have up to size - 1 bytes. */
static bool nir_load_text(const nir_loader *l, const char *key, char *out, size_t size)
{
    const char *value = dot_safetensors_metadata(l->file, key);
    if (!value) return nir_loader_fail(l, "no metadata '%s'", key);
    if (strlen(value) >= size) return nir_loader_fail(l, "metadata '%s' is longer than %d bytes", key, (int)size - 1);
    memcpy(out, value, strlen(value) + 1);
    return true;
}

static bool nir_load_number(const nir_loader *l, const char *key, double low, double high, double *out)
{
    char text[NIR_META_TEXT], *end;
    if (!nir_load_text(l, key, text, sizeof text)) return false;
    *out = strtod(text, &end);
    if (end == text || *end || !(*out >= low && *out <= high))
        return nir_loader_fail(l, "metadata '%s' is '%s', expected a number from %g to %g", key, text, low, high);
    return true;
}

static bool nir_load_expect(const nir_loader *l, const char *key, const char *expected)
{
    char text[NIR_META_TEXT];
    if (!nir_load_text(l, key, text, sizeof text)) return false;
    return strcmp(text, expected) == 0 ||
        nir_loader_fail(l, "metadata '%s' is '%s', expected '%s'", key, text, expected);
}

static bool nir_load_seed(const nir_loader *l)
{
    char text[NIR_META_TEXT], again[NIR_META_TEXT];
    if (!nir_load_text(l, "seed", text, sizeof text)) return false;
    l->d->seed = strtoull(text, NULL, 10);
    snprintf(again, sizeof again, "%llu", (unsigned long long)l->d->seed);
    return strcmp(text, again) == 0 ||
        nir_loader_fail(l, "metadata 'seed' is '%s', expected a whole number below 2^64", text);
}

static bool nir_load_metadata(const nir_loader *l)
{
    nir_dataset *d = l->d;
    char version[NIR_META_TEXT], fine[8];
    double n = 0;
    snprintf(version, sizeof version, "%d", NIR_DATA_VERSION);
    if (!nir_load_expect(l, "format", "nirdot-dataset") || !nir_load_expect(l, "format_version", version) ||
        !nir_load_expect(l, "noise", "none") || !nir_load_number(l, "n", 1, 256, &n) ||
        !nir_load_number(l, "h", 0.01, 1000, &d->grid.h) ||
        !nir_load_number(l, "frequency_hz", 0, 1e9, &d->frequency_hz) ||
        !nir_load_number(l, "refractive_index", 1, 2, &d->refractive_index) ||
        !nir_load_text(l, "boundary", d->boundary, sizeof d->boundary) ||
        !nir_load_text(l, "preset", d->preset, sizeof d->preset) ||
        !nir_load_text(l, "properties", d->properties, sizeof d->properties) ||
        !nir_load_text(l, "probe", d->probe, sizeof d->probe) ||
        !nir_load_text(l, "split", d->split, sizeof d->split) ||
        !nir_load_seed(l) || !nir_load_text(l, "fine", fine, sizeof fine))
        return false;
    d->grid.n = (int)n;
    d->fine = strcmp(fine, "true") == 0;
    if (n != floor(n)) return nir_loader_fail(l, "metadata 'n' is %g, expected a whole number", n);
    return d->fine || strcmp(fine, "false") == 0 ||
        nir_loader_fail(l, "metadata 'fine' is '%s', expected true or false", fine);
}

/* One dimension of a tensor, which sets a size of the dataset. */
static bool nir_load_size(const nir_loader *l, const char *name, int dimension, int64_t low, int64_t high, int64_t *out)
{
    dot_safetensors_entry entry;
    const int at = dot_safetensors_find(l->file, name);
    if (at < 0) return nir_loader_fail(l, "no tensor '%s'", name);
    if (!dot_safetensors_entry_at(l->file, at, &entry) || entry.rank <= dimension || entry.shape[dimension] < low ||
        entry.shape[dimension] > high)
        return nir_loader_fail(l, "tensor '%s' has no dimension %d of %lld to %lld", name, dimension, (long long)low,
                               (long long)high);
    *out = entry.shape[dimension];
    return true;
}

/* Every tensor, and no other, of the type and shape that the sizes ask for. */
static bool nir_load_shapes(const nir_loader *l)
{
    static const char *const types[] = { [DOT_F32] = "F32", [DOT_F64] = "F64", [DOT_I64] = "I64", [DOT_U8] = "U8" };
    nir_dataset *d = l->d;
    dot_safetensors_item item[NIR_TENSORS];
    int64_t sources, detectors, pairs;
    if (!nir_load_size(l, "label", 0, 0, 100000000, &d->count) ||
        !nir_load_size(l, "source", 1, 1, NIR_NO_PAIR - 1, &sources) ||
        !nir_load_size(l, "detector", 1, 1, NIR_NO_PAIR - 1, &detectors) ||
        !nir_load_size(l, "pair", 1, 1, 10000000, &pairs))
        return false;
    d->sources = (int)sources;
    d->detectors = (int)detectors;
    d->pairs = (int)pairs;
    nir_data_items(d, NULL, item);
    for (int i = 0; i < NIR_TENSORS; ++i) {
        dot_safetensors_entry entry;
        const int at = dot_safetensors_find(l->file, item[i].name);
        if (at < 0) return nir_loader_fail(l, "no tensor '%s'", item[i].name);
        if (!dot_safetensors_entry_at(l->file, at, &entry))
            return nir_loader_fail(l, "no entry of tensor '%s'", item[i].name);
        if (strcmp(entry.dtype, types[item[i].dtype]) != 0)
            return nir_loader_fail(l, "tensor '%s' is %s, expected %s", item[i].name, entry.dtype,
                                   types[item[i].dtype]);
        if (entry.rank != item[i].rank)
            return nir_loader_fail(l, "tensor '%s' has rank %d, expected %d", item[i].name, entry.rank, item[i].rank);
        for (int k = 0; k < entry.rank; ++k)
            if (entry.shape[k] != item[i].shape[k])
                return nir_loader_fail(l, "tensor '%s' has %lld in dimension %d, expected %lld", item[i].name,
                                     (long long)entry.shape[k], k, (long long)item[i].shape[k]);
    }
    return dot_safetensors_count(l->file) == NIR_TENSORS ||
           nir_loader_fail(l, "%d tensors, expected %d", dot_safetensors_count(l->file), NIR_TENSORS);
}

static bool nir_load_tensor(const nir_loader *l, const char *name, void *out, int64_t count, size_t size)
{
    return dot_safetensors_read(l->file, dot_safetensors_find(l->file, name), out, (size_t)count * size);
}

/* Pairs are whole numbers in range, and none follows one that is missing. */
static bool nir_load_pairs(const nir_loader *l)
{
    nir_dataset *d = l->d;
    const int64_t pairs = d->count * d->pairs;
    int64_t *pair = (int64_t *)nir_data_array(pairs, 2, sizeof(int64_t));
    bool ok = pair || nir_loader_fail(l, "out of memory");
    ok = ok && (nir_load_tensor(l, "pair", pair, 2 * pairs, sizeof *pair) ||
                nir_loader_fail(l, "tensor 'pair' cannot be read"));
    for (int64_t i = 0; ok && i < pairs; ++i) {
        const int64_t s = pair[2 * i], k = pair[2 * i + 1];
        const bool none = s == -1 && k == -1, after_none = i % d->pairs > 0 && pair[2 * i - 2] == -1;
        if (!none && (after_none || s < 0 || s >= d->sources || k < 0 || k >= d->detectors))
            ok = nir_loader_fail(l, "pair %lld of phantom %lld is (%lld, %lld), expected%s a source below %d and a "
                                 "detector below %d",
                               (long long)(i % d->pairs), (long long)(i / d->pairs), (long long)s, (long long)k,
                               after_none ? " none after a missing one, else" : "", d->sources, d->detectors);
        d->pair[2 * i] = none ? NIR_NO_PAIR : (uint16_t)s;
        d->pair[2 * i + 1] = none ? 0 : (uint16_t)k;
    }
    free(pair);
    return ok;
}

/* ---- files: checking values --------------------------------------------- */

/* All values within a range (and so none of them a NaN). */
static bool nir_load_values(const nir_loader *l, const char *name, const float *value, int64_t count, double low,
                            double high)
{
    for (int64_t i = 0; i < count; ++i)
        if (!((double)value[i] >= low && (double)value[i] <= high))
            return nir_loader_fail(l, "value %lld of tensor '%s' is %g, expected %g to %g", (long long)i, name,
                                   (double)value[i], low, high);
    return true;
}

static bool nir_load_rotation(const nir_loader *l, const char *name, int64_t index, const nir_ellipsoid *e)
{
    for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 3; ++j) {
            double dot = 0;
            for (int k = 0; k < 3; ++k) dot += e->rotation[3 * i + k] * e->rotation[3 * j + k];
            if (!(fabs(dot - (i == j)) <= 1e-5))
                return nir_loader_fail(l, "%s %lld: the rotation is not orthogonal", name, (long long)index);
        }
    return true;
}

/* Every label has its properties, and labels lie in the order of the table. */
static bool nir_load_labels(const nir_loader *l, int64_t index)
{
    const nir_dataset *d = l->d;
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + index * voxels;
    const float *property = d->property + index * 2 * NIR_LABELS;
    bool used[256] = { false };
    for (int64_t i = 0; i < voxels; ++i) used[label[i]] = true;
    for (int k = NIR_LABELS + 1; k < 256; ++k)
        if (used[k])
            return nir_loader_fail(l, "phantom %lld has label %d, expected 0 to %d", (long long)index, k, NIR_LABELS);
    if (!used[1]) return nir_loader_fail(l, "phantom %lld has no tissue", (long long)index);
    for (int k = 1; k <= NIR_LABELS; ++k) {
        const double mu_a = (double)property[2 * (k - 1)], mu_s = (double)property[2 * (k - 1) + 1];
        const bool has = mu_a >= 1e-6 && mu_a <= 1 && mu_s >= 1e-3 && mu_s <= 100;
        const bool none = !used[k] && mu_a == 0 && mu_s == 0;
        if (!has && !none)
            return nir_loader_fail(l, "label %d of phantom %lld has mu_a %g and mu_s' %g mm^-1, expected 1e-6 to 1 and "
                                   "1e-3 to 100%s", k, (long long)index, mu_a, mu_s, used[k] ? "" : ", or both 0");
    }
    return true;
}

static bool nir_load_optodes(const nir_loader *l, int64_t index, const nir_ellipsoid *tissue, const char *name,
                             const float *optode, int count)
{
    for (int i = 0; i < count; ++i) {
        double point[3];
        nir_data_point(optode + 3 * (index * count + i), point);
        const double radius = nir_ellipsoid_radius(tissue, point);
        if (!(fabs(radius - 1) <= 1e-4))
            return nir_loader_fail(l, "%s %d of phantom %lld lies at %g of the surface's distance, expected 1", name, i,
                                 (long long)index, radius);
    }
    return true;
}

static bool nir_load_phantom(const nir_loader *l, int64_t index)
{
    const nir_dataset *d = l->d;
    const nir_ellipsoid tissue = nir_dataset_ellipsoid(d, index);
    const double extent = d->grid.n * d->grid.h;
    for (int k = 0; k < 3; ++k)
        if (!(tissue.semi_axis[k] > 0 && tissue.semi_axis[k] <= extent && fabs(tissue.centre[k]) <= extent))
            return nir_loader_fail(l, "the ellipsoid of phantom %lld has semi-axis %g and centre %g mm, expected at "
                                   "most %g", (long long)index, tissue.semi_axis[k], tissue.centre[k], extent);
    for (int k = 0; k < NIR_TUMOURS; ++k) {
        const nir_ellipsoid e = nir_data_unpack(d->tumour + 15 * (index * NIR_TUMOURS + k));
        if (e.semi_axis[0] > 0 && !nir_load_rotation(l, "tumour of phantom", index, &e)) return false;
    }
    return nir_load_rotation(l, "phantom", index, &tissue) && nir_load_labels(l, index) &&
           nir_load_optodes(l, index, &tissue, "source", d->source, d->sources) &&
           nir_load_optodes(l, index, &tissue, "detector", d->detector, d->detectors);
}

static bool nir_load_data(const nir_loader *l)
{
    nir_dataset *d = l->d;
    const int64_t voxels = nir_dataset_voxels(d), measured = d->count * d->pairs, tumours = d->count * NIR_TUMOURS;
    const double extent = d->grid.n * d->grid.h;
    struct { const char *name; float *to; int64_t count; double low, high; } part[] = {
        { "property", d->property, d->count * 2 * NIR_LABELS, 0, 100 },
        { "ellipsoid", d->ellipsoid, d->count * 15, -extent, extent },
        { "tumour", d->tumour, tumours * 15, -extent, extent },
        { "source", d->source, d->count * d->sources * 3, -extent, extent },
        { "detector", d->detector, d->count * d->detectors * 3, -extent, extent },
        { "log_amplitude", d->log_amplitude, measured, -100, 20 },
        { "phase", d->phase, measured, 0, 3600 },
    };
    if (!nir_load_tensor(l, "label", d->label, d->count * voxels, 1))
        return nir_loader_fail(l, "tensor 'label' cannot be read");
    for (size_t i = 0; i < sizeof part / sizeof *part; ++i) {
        if (!nir_load_tensor(l, part[i].name, part[i].to, part[i].count, sizeof(float)))
            return nir_loader_fail(l, "tensor '%s' cannot be read", part[i].name);
        if (!nir_load_values(l, part[i].name, part[i].to, part[i].count, part[i].low, part[i].high)) return false;
    }
    if (!nir_load_pairs(l)) return false;
    for (int64_t i = 0; i < d->count; ++i)
        if (!nir_load_phantom(l, i)) return false;
    return true;
}

static nir_dataset *nir_dataset_load(dot_context *ctx, const char *path)
{
    nir_loader l = { path, dot_safetensors_open(ctx, path), (nir_dataset *)calloc(1, sizeof(nir_dataset)) };
    bool ok = l.file && l.d;
    if (!l.file) nir_data_fail("nir_dataset_load", "%s", dot_error(ctx));
    else if (!l.d) nir_loader_fail(&l, "out of memory");
    ok = ok && nir_load_metadata(&l) && nir_load_shapes(&l);
    if (ok && !nir_dataset_allocate(l.d))
        ok = nir_loader_fail(&l, "out of memory for %lld phantoms", (long long)l.d->count);
    ok = ok && nir_load_data(&l);
    dot_safetensors_close(l.file);
    if (ok) return l.d;
    nir_dataset_free(l.d);
    return NULL;
}

/* ---- volumes for viewers ------------------------------------------------ */

static void nir_volume_channel(const float *mu, int64_t voxels, int channel, float *out)
{
    for (int64_t i = 0; i < voxels; ++i) out[i] = mu[2 * i + channel];
}

/* The header of 348 bytes and four zeros. Fields are in the machine's byte order, which readers tell by the first. */
static void nir_nifti_header(unsigned char head[352], int n, double h)
{
    const int32_t size = 348;
    const int16_t dim[8] = { 3, (int16_t)n, (int16_t)n, (int16_t)n, 1, 1, 1, 1 };
    const int16_t type[2] = { 16, 32 }, form[2] = { 1, 1 };
    const float voxel = (float)h, origin = (float)((0.5 - n / 2.0) * h), begin = 352, slope = 1;
    const float pixdim[8] = { 1, voxel, voxel, voxel, 1, 1, 1, 1 };     /* the first: the quaternion mirrors nothing */
    const float offset[3] = { origin, origin, origin };
    const float affine[12] = { voxel, 0, 0, origin, 0, voxel, 0, origin, 0, 0, voxel, origin };
    memset(head, 0, 352);
    memcpy(head, &size, 4);
    memcpy(head + 40, dim, sizeof dim);
    memcpy(head + 70, type, sizeof type);       /* float32, 32 bits */
    memcpy(head + 76, pixdim, sizeof pixdim);
    memcpy(head + 108, &begin, 4);
    memcpy(head + 112, &slope, 4);
    head[123] = 2;                              /* mm */
    memcpy(head + 148, "NIR-DOT, dotopt " DOTOPT_VERSION, sizeof "NIR-DOT, dotopt " DOTOPT_VERSION);
    memcpy(head + 252, form, sizeof form);      /* both are given, in the scanner's frame */
    memcpy(head + 268, offset, sizeof offset);
    memcpy(head + 280, affine, sizeof affine);
    memcpy(head + 344, "n+1", 4);
}

static bool nir_write_nifti(const char *path, const float *volume, int n, double h)
{
    unsigned char head[352];
    char temporary[1024];
    bool ok;
    if (n < 1 || n > 32767 || !(h > 0))
        return nir_data_fail("nir_write_nifti", "%d voxels of %g mm, expected 1 to 32767 of a positive size", n, h);
    if (snprintf(temporary, sizeof temporary, "%s.tmp", path) >= (int)sizeof temporary)
        return nir_data_fail("nir_write_nifti", "the path %.100s... is too long", path);
    FILE *file = fopen(temporary, "wb");
    if (!file) return nir_data_fail("nir_write_nifti", "cannot write %s", temporary);
    const size_t voxels = (size_t)n * (size_t)n * (size_t)n;
    nir_nifti_header(head, n, h);
    ok = fwrite(head, 1, sizeof head, file) == sizeof head && fwrite(volume, sizeof *volume, voxels, file) == voxels;
    ok = fclose(file) == 0 && ok;
    if (ok && rename(temporary, path) == 0) return true;
    remove(temporary);
    return nir_data_fail("nir_write_nifti", "cannot write %s", path);
}

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif /* NIRDOT_DATA_H */
