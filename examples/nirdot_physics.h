/*
 * nirdot_physics.h - light in tissue, in the frequency domain: the diffusion
 * approximation on voxels, its adjoint and its Jacobian.
 *
 *     -div(D grad Phi) + (mu_a + i w/c) Phi = q,     D = 1 / (3 (mu_a + mu_s'))      in the tissue
 *     Phi + 2 A D dPhi/dnu = 0                                                     on its surface (Robin)
 *
 * with e^{+iwt}; lengths in mm, mu_a and mu_s' in mm^-1, w = 2 pi f, c = c0/n. What is measured is the fluence Phi at a
 * point of the surface per unit source: ln|Phi|, and the phase -arg Phi in degrees, which is positive and grows with
 * distance.
 *
 * How to use it (one workspace for each thread; after the first phantoms nothing is allocated):
 *
 *     nir_options options = nir_defaults();                    // 140 MHz, n = 1.4, Haskell's A, float
 *     nir_workspace *ws = nir_workspace_new((nir_grid){ 64, 1.0 }, &options);
 *     nir_ellipsoid head = { .centre = { 0, 0, 0 }, .semi_axis = { 29, 27, 26 }, .rotation = { 1,0,0, 0,1,0, 0,0,1 } };
 *     nir_set_tissue(ws, &head, label);                        // uint8_t [n^3], 0: air
 *     nir_set_properties(ws, mu_a, mu_s);                      // float [n^3], mm^-1
 *     nir_set_optodes(ws, source, 50, detector, 1000);         // double [][3], on the surface, mm
 *     nir_forward(ws, pair, 1000, NIR_KEEP_NOTHING, log_amplitude, phase);
 *     nir_workspace_free(ws);
 *
 * Every function that can fail returns false (or NULL) after one line on stderr. Arrays of voxels are [z][y][x], x
 * fastest; the origin is the middle of the grid. A source is an isotropic point, 1/mu_s' below the surface; see
 * "optodes" below.
 *
 * Derivatives. With NIR_KEEP_ALL nir_forward keeps the fields of sources and detectors, and nir_jacobian fills the
 * matrix [pairs][ln A, phase][mu_a, mu_s'][columns]; column k is voxel ws->voxel[k] of the n^3. With NIR_KEEP_SOURCES
 * nir_jacobian_times and nir_jacobian_transpose_times multiply by that matrix, at the price of one more solution for
 * each source and without forming it. They are derivatives of the discrete equations, exact but for the solver's
 * tolerance.
 *
 * Accuracy, against the exact solution on a sphere of 27 mm (mu_a 0.005, mu_s' 1, 10 to 40 mm between optodes; mean and
 * standard deviation of the error, see tests/test_nirdot_physics.c): voxels of 1 mm: ln A -0.001 +- 0.018, phase +0.02
 * degrees in the mean and at most 0.6; 2 mm: +0.024 +- 0.057, -0.3 and 2.1; 4 mm: +0.07 +- 0.12, -2.1 and 7.1.
 *
 * Fields of 64^3 voxels and more gain some 7 % from large pages: GLIBC_TUNABLES=glibc.malloc.hugetlb=1 with glibc.
 *
 * The same bits come out for any grouping of the sources, and with or without AVX2 or AVX-512.
 */
#ifndef NIR_SOLVER_REAL
#ifndef NIRDOT_PHYSICS_H
#define NIRDOT_PHYSICS_H

#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NIR_PI 3.14159265358979323846
#define NIR_DEGREES (180 / NIR_PI)
#define NIR_LIGHT 2.99792458e11         /* in vacuum, mm/s */
#define NIR_NO_PAIR 0xffff              /* as the source of a pair: there is no such pair */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF            /* GCC leaves products and sums apart by itself under -std=c99 */
#endif

/* ---- types --------------------------------------------------------------- */

typedef struct {
    double centre[3], semi_axis[3];
    double rotation[9];                 /* its rows are the body's axes in the laboratory: body = R (x - centre) */
} nir_ellipsoid;

typedef struct { int n; double h; } nir_grid;      /* n x n x n voxels of side h mm */

/* Where A(n) of the boundary condition comes from. */
typedef enum {
    NIR_HASKELL,        /* integrals of Fresnel's reflection (Haskell 1994) */
    NIR_CONTINI,        /* the polynomial for n > 1 (Contini 1997) */
    NIR_KEIJZER,        /* Keijzer 1988: the default of NIRFAST and Toast++ */
    NIR_GROENHUIS       /* the fit of Groenhuis and Egan */
} nir_boundary;

/* How the faces between tissue and air stand for the true surface. */
typedef enum {
    NIR_CORRECTED,      /* their area and their distance to the voxel's centre are those of the ellipsoid */
    NIR_STAIRCASE       /* as they are: 1.5 times too much area on a sphere however small the voxels; for comparison */
} nir_surface;

typedef enum { NIR_MULTIGRID, NIR_SSOR } nir_preconditioner;

typedef struct {
    double frequency_hz, refractive_index;
    nir_boundary boundary;
    nir_surface surface;
    nir_preconditioner preconditioner;
    double relaxation;          /* of SSOR, in (0, 2) */
    double tolerance;           /* the residual's norm over the source's */
    int max_iterations;
    bool float64;               /* solve in double; fields are kept as float all the same */
    double detector_depth;      /* where the fluence below a detector is read, in voxels */
    bool interior_optodes;      /* sources and detectors are points in the tissue, and taken as they stand */
    bool fixed_source_depth;    /* the derivatives by mu_s' leave out that the sources move */
} nir_options;

static inline nir_options nir_defaults(void)
{
    return (nir_options){ .frequency_hz = 140e6, .refractive_index = 1.4, .relaxation = 1.6, .tolerance = 1e-8,
        .max_iterations = 200, .detector_depth = 1, .fixed_source_depth = true };
}

/* A source or detector is a sparse vector over the unknowns: q = sum of weight * voxel. */
typedef struct {
    int index[8];
    double weight[8];
    double by_diffusion[8];     /* d weight / d D of that voxel */
    double by_depth[8];         /* of a source: d weight / d (1/mu_s') */
    int scatter_index[8];       /* of a source: the voxels whose mean mu_s' set its depth */
    double scatter_weight[8], scatter;
} nir_optode;

/* A detector's view of a lane's solution. */
typedef struct { const nir_optode *detector; int lane, pair; double sum[2]; } nir_reading;

/* A run of unknowns along x. Unknown `first` is voxel x of row (y, z); that of the same x in the row before or after
   along y or z has this offset, and those above in the coarser grid are parent + x/2 and so on. A voxel of air within
   the run is an unknown as well, tied to nothing. */
typedef struct {
    int first, count, x, y, z;
    int y_before, y_after, z_before, z_after;
    int parent, parent_y, parent_z;
    int inner, inner_end;               /* pairs of unknowns, x even and odd, whose coarse neighbours are all tissue */
} nir_row;

typedef struct {
    int n, rows, size, pad;     /* unknowns have the numbers pad .. pad + size - 1; what lies beside them is finite */
    nir_row *row;
    int *plane;                 /* [n + 1]: the first row of plane z */
    int *start;                 /* [n * n]: unknown of x = 0 if the row had one, INT_MIN for a row of air */
    uint8_t *mask;              /* [n^3] */
    uint8_t *tissue;            /* of an unknown */
    uint8_t *transfer;          /* which of the coarse neighbours along x, y, z (bits 0, 1, 2) are tissue */
    double *reaction;           /* absorption and outflow: the real part of a row's sum */
    double *imaginary;
    void *matrix, *inverse;     /* of the solver's type: six conductances, diagonal; its complex inverse */
    void *x, *b;                /* vectors [unknown][re, im][lane] */
    size_t capacity;
} nir_level;

typedef enum { NIR_KEEP_NOTHING, NIR_KEEP_SOURCES, NIR_KEEP_ALL } nir_keep;

enum { NIR_LEVELS = 8 };

typedef struct nir_workspace nir_workspace;
typedef struct {
    int lanes;                          /* right-hand sides at a time */
    void (*assemble)(nir_workspace *ws, int level);
    void (*invert)(nir_workspace *ws, int level);
    bool (*solve)(nir_workspace *ws);
    void (*sense)(nir_workspace *ws, const float *f, const float *g);
} nir_solver;

struct nir_workspace {
    nir_grid grid;
    nir_options options;
    double A, wave;                     /* of the boundary condition; w/c in mm^-1 */
    nir_solver choice[3], solver;       /* what this processor can do, from few lanes to many; the one in use */
    int choices;
    nir_level level[NIR_LEVELS];
    int levels, first, columns, stride; /* unknown a is column a - first; fields have `stride` numbers */
    int *voxel;                         /* [columns]: the voxel of the n^3 */
    double *area, *depth;               /* of an unknown: its area of surface over h^2; its centre's depth, in mm */
    double *mu_a, *mu_s, *diffusion;
    float *edge;                        /* [8][stride]: derivatives by D of six conductances and outflow; dD/dmu */
    float *scratch;                     /* [8][stride] */
    void *solution, *direction;         /* x and p of the iteration; r is level[0].b; z and q = A p share level[0].x */
    nir_ellipsoid shape;
    bool has_shape, has_tissue, has_properties;
    nir_optode *optode;                 /* the sources, then the detectors */
    int sources, detectors, optode_capacity;
    float *field;                       /* [optode][re, im][stride] */
    size_t field_capacity;
    nir_keep kept;
    double *measured;                   /* [pairs][re, im] */
    int pairs, pair_capacity;
    nir_reading *reading;               /* what is measured of the solution under way */
    int readings;
    bool wants_solution;
    int iterations;                     /* of the last solution, and its residual */
    double residual;
};

static inline bool nir_fail(const char *function, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "%s: ", function);
    vfprintf(stderr, format, arguments);
    fprintf(stderr, "\n");
    va_end(arguments);
    return false;
}

/* ---- the boundary condition ---------------------------------------------- */

/* Fresnel's reflection of unpolarised light that meets the surface from within, at this cosine. */
static inline double nir_fresnel(double n, double cosine)
{
    const double sine = n * sqrt(1 - cosine * cosine);
    if (sine >= 1) return 1;
    const double out = sqrt(1 - sine * sine);
    const double s = (n * cosine - out) / (n * cosine + out), p = (n * out - cosine) / (n * out + cosine);
    return 0.5 * (s * s + p * p);
}

/* R_eff, with the integrals over the angle by Gauss-Legendre on either side of the critical angle: below it cos = out
   of a square root, which the substitution cosine^2 = critical^2 + (1 - critical^2) t^2 makes smooth. */
static inline double nir_effective_reflection(double n)
{
    static const double node[8] = { 0.0950125098376374, 0.2816035507792589, 0.4580167776572274, 0.6178762444026438,
        0.7554044083550030, 0.8656312023878318, 0.9445750230732326, 0.9894009349916499 };
    static const double weight[8] = { 0.1894506104550685, 0.1826034150449236, 0.1691565193950025, 0.1495959888165767,
        0.1246289712555339, 0.0951585116824928, 0.0622535239386479, 0.0271524594117541 };
    const double critical = n > 1 ? sqrt(1 - 1 / (n * n)) : 0;
    double flux = critical * critical, current = flux * critical;       /* all is reflected below the critical cosine */
    const double span = 1 - critical * critical;
    for (int i = 0; i < 16; ++i) {
        const double t = 0.5 + (i % 2 ? 0.5 : -0.5) * node[i / 2], w = 0.5 * weight[i / 2];
        const double cosine = sqrt(critical * critical + span * t * t), r = nir_fresnel(n, cosine);
        flux += w * 2 * r * span * t;               /* cos dcos = span t dt */
        current += w * 3 * r * cosine * span * t;
    }
    return (flux + current) / (2 - flux + current);
}

static inline double nir_boundary_A(nir_boundary model, double n)
{
    double r = 0;
    switch (model) {
    case NIR_CONTINI:
        return 504.332889 + n * (-2641.00214 + n * (5923.699064 + n * (-7376.355814 + n * (5507.53041 +
               n * (-2463.357945 + n * (610.956547 - 64.8047 * n))))));
    case NIR_KEIJZER: {
        const double r0 = (n - 1) * (n - 1) / ((n + 1) * (n + 1)), cosine = sqrt(1 - 1 / (n * n));
        return (2 / (1 - r0) - 1 + cosine * cosine * cosine) / (1 - cosine * cosine);
    }
    case NIR_GROENHUIS: r = -1.440 / (n * n) + 0.710 / n + 0.668 + 0.0636 * n; break;
    case NIR_HASKELL: r = nir_effective_reflection(n); break;
    }
    return (1 + r) / (1 - r);
}

/* ---- the ellipsoid ------------------------------------------------------- */

static inline void nir_to_body(const nir_ellipsoid *e, const double point[3], double body[3])
{
    for (int i = 0; i < 3; ++i) {
        body[i] = 0;
        for (int k = 0; k < 3; ++k) body[i] += e->rotation[3 * i + k] * (point[k] - e->centre[k]);
    }
}

/* |S^-1 R (x - c)| - 1: below zero inside, and the outward unit normal of the level through `point` if that is asked
   for. */
static inline double nir_ellipsoid_level(const nir_ellipsoid *e, const double point[3], double normal[3])
{
    double body[3], level = 0, length = 0;
    nir_to_body(e, point, body);
    for (int i = 0; i < 3; ++i) level += body[i] / e->semi_axis[i] * (body[i] / e->semi_axis[i]);
    if (!normal) return sqrt(level) - 1;
    for (int k = 0; k < 3; ++k) {
        normal[k] = 0;
        for (int i = 0; i < 3; ++i) normal[k] += e->rotation[3 * i + k] * body[i] / (e->semi_axis[i] * e->semi_axis[i]);
        length += normal[k] * normal[k];
    }
    for (int k = 0; k < 3; ++k) normal[k] = length > 0 ? normal[k] / sqrt(length) : (k == 2);
    return sqrt(level) - 1;
}

/* The nearest point of the surface and its outward normal; returns the signed distance, below zero inside. The point
   is a_i^2 y_i / (t + a_i^2) in the body's frame, with t by Newton's method from the outer side of the root, which is
   convex there. Good for points near the surface; the few at the centre of curvature have no nearest point. */
static inline double nir_ellipsoid_closest(const nir_ellipsoid *e, const double point[3], double surface[3],
    double normal[3])
{
    double body[3], near_body[3], square[3], low = -1e300;
    nir_to_body(e, point, body);
    for (int i = 0; i < 3; ++i) {
        square[i] = e->semi_axis[i] * e->semi_axis[i];
        low = fmax(low, -square[i] + e->semi_axis[i] * fabs(body[i]));     /* one term alone is 1: left of the root */
    }
    double t = low;
    for (int step = 0; step < 30; ++step) {
        double f = -1, slope = 0;
        for (int i = 0; i < 3; ++i) {
            const double u = t + square[i] > 0 ? e->semi_axis[i] * body[i] / (t + square[i]) : 0;
            f += u * u;
            slope -= t + square[i] > 0 ? 2 * u * u / (t + square[i]) : 0;
        }
        if (!(slope < 0)) break;
        const double move = f / slope;
        t -= move;
        if (fabs(move) < 1e-7 * square[0]) break;      /* the error is as the square of that */
    }
    for (int i = 0; i < 3; ++i) near_body[i] = t + square[i] > 0 ? square[i] * body[i] / (t + square[i]) : 0;
    double distance = 0;
    for (int k = 0; k < 3; ++k) {
        surface[k] = e->centre[k];
        for (int i = 0; i < 3; ++i) surface[k] += e->rotation[3 * i + k] * near_body[i];
        distance += (point[k] - surface[k]) * (point[k] - surface[k]);
    }
    nir_ellipsoid_level(e, surface, normal);
    return t < 0 ? -sqrt(distance) : sqrt(distance);
}

/* The same for the cube of the whole grid, which is the surface where there is no ellipsoid. */
static inline double nir_cube_closest(nir_grid grid, const double point[3], double surface[3], double normal[3])
{
    const double half = 0.5 * grid.n * grid.h;
    int axis = 0;
    for (int k = 0; k < 3; ++k) {
        surface[k] = point[k];
        normal[k] = 0;
        if (fabs(point[k]) > fabs(point[axis])) axis = k;
    }
    normal[axis] = point[axis] < 0 ? -1 : 1;
    surface[axis] = normal[axis] * half;
    return fabs(point[axis]) - half;
}

static inline double nir_closest(const nir_workspace *ws, const double point[3], double surface[3], double normal[3])
{
    return ws->has_shape ? nir_ellipsoid_closest(&ws->shape, point, surface, normal)
                         : nir_cube_closest(ws->grid, point, surface, normal);
}

/* ---- the workspace ------------------------------------------------------- */

/* Aligned to 64 bytes and zero; the block's own address lies before it. */
static inline void *nir_allocate(size_t count, size_t size)
{
    if (count > (SIZE_MAX / 2) / size) return NULL;
    char *block = (char *)calloc(1, count * size + 64 + sizeof(void *));
    if (!block) return NULL;
    char *aligned = block + sizeof(void *);
    aligned += (64 - (uintptr_t)aligned % 64) % 64;
    memcpy(aligned - sizeof(void *), &block, sizeof block);
    return aligned;
}

static inline void nir_release(void *aligned)
{
    char *block;
    if (!aligned) return;
    memcpy(&block, (char *)aligned - sizeof(void *), sizeof block);
    free(block);
}

/* All the blocks that grow with the number of unknowns of a level (0 is the finest), by address and size of an
   element. */
typedef struct { void **block; size_t size; } nir_block;
enum { NIR_BLOCKS = 18, NIR_VECTORS = 16 };      /* the vectors of the finest level begin there */
static inline int nir_blocks(nir_workspace *ws, int level, nir_block block[NIR_BLOCKS])
{
    const size_t real = ws->options.float64 ? sizeof(double) : sizeof(float);
    const size_t vector = 2 * real * (size_t)(ws->choices > 0 ? ws->choice[ws->choices - 1].lanes : 1);
    nir_level *l = &ws->level[level];
    const nir_block all[NIR_BLOCKS] = {
        { (void **)&l->tissue, 1 }, { (void **)&l->transfer, 1 }, { (void **)&l->reaction, sizeof(double) },
        { (void **)&l->imaginary, sizeof(double) }, { &l->matrix, 8 * real }, { &l->inverse, 2 * real },
        { &l->x, vector }, { &l->b, vector },
        { (void **)&ws->voxel, sizeof(int) }, { (void **)&ws->area, sizeof(double) },
        { (void **)&ws->depth, sizeof(double) },
        { (void **)&ws->mu_a, sizeof(double) }, { (void **)&ws->mu_s, sizeof(double) },
        { (void **)&ws->diffusion, sizeof(double) }, { (void **)&ws->edge, 8 * sizeof(float) },
        { (void **)&ws->scratch, 8 * sizeof(float) }, { &ws->solution, vector }, { &ws->direction, vector },
    };
    memcpy(block, all, sizeof all);
    return level == 0 ? NIR_BLOCKS : 8;
}

static inline bool nir_reserve(nir_workspace *ws, int level, size_t count)
{
    nir_block block[NIR_BLOCKS];
    const int blocks = nir_blocks(ws, level, block);
    if (count <= ws->level[level].capacity) return true;
    count += count / 8;
    ws->level[level].capacity = 0;
    for (int i = 0; i < blocks; ++i) {
        nir_release(*block[i].block);
        if (!(*block[i].block = nir_allocate(count, block[i].size)))
            return nir_fail("nir_set_tissue", "no memory for %zu unknowns", count);
    }
    ws->level[level].capacity = count;
    return true;
}

static inline void nir_workspace_free(nir_workspace *ws)
{
    if (!ws) return;
    for (int k = 0; k < NIR_LEVELS; ++k) {
        nir_block block[NIR_BLOCKS];
        const int blocks = nir_blocks(ws, k, block);
        for (int i = 0; i < blocks; ++i) nir_release(*block[i].block);
        nir_release(ws->level[k].row);
        nir_release(ws->level[k].plane);
        nir_release(ws->level[k].start);
        nir_release(ws->level[k].mask);
    }
    nir_release(ws->optode);
    nir_release(ws->field);
    nir_release(ws->measured);
    nir_release(ws->reading);
    free(ws);
}

static inline void nir_choose_solvers(nir_workspace *ws);

static inline bool nir_options_valid(nir_grid grid, const nir_options *o)
{
    const char *const name = "nir_workspace_new";
    if (grid.n < 4 || grid.n > 256) return nir_fail(name, "the grid has n = %d, expected 4 to 256", grid.n);
    if (!(grid.h > 0 && grid.h <= 100)) return nir_fail(name, "voxels of %g mm, expected 0 < h <= 100", grid.h);
    if (!(o->frequency_hz >= 0 && o->frequency_hz <= 2e9))
        return nir_fail(name, "frequency %g Hz, expected 0 to 2e9", o->frequency_hz);
    if (!(o->refractive_index >= 1 && o->refractive_index <= 2))
        return nir_fail(name, "refractive index %g, expected 1 to 2", o->refractive_index);
    if (!(o->tolerance > 0 && o->tolerance < 1)) return nir_fail(name, "tolerance %g, expected 0 to 1", o->tolerance);
    if (!(o->relaxation > 0 && o->relaxation < 2))
        return nir_fail(name, "relaxation %g, expected 0 to 2", o->relaxation);
    if (!(o->detector_depth >= 0.5 && o->detector_depth <= 3))
        return nir_fail(name, "detector_depth %g voxels, expected 0.5 to 3", o->detector_depth);
    if (o->max_iterations < 1) return nir_fail(name, "max_iterations %d, expected 1 or more", o->max_iterations);
    if ((unsigned)o->boundary > NIR_GROENHUIS)
        return nir_fail(name, "boundary %d is no nir_boundary", (int)o->boundary);
    return true;
}

/* NULL `options`: the defaults. */
static inline nir_workspace *nir_workspace_new(nir_grid grid, const nir_options *options)
{
    const nir_options chosen = options ? *options : nir_defaults();
    if (!nir_options_valid(grid, &chosen)) return NULL;
    nir_workspace *ws = (nir_workspace *)calloc(1, sizeof *ws);
    bool complete = ws != NULL;
    if (ws) {
        ws->grid = grid;
        ws->options = chosen;
        ws->A = nir_boundary_A(chosen.boundary, chosen.refractive_index);
        ws->wave = 2 * NIR_PI * chosen.frequency_hz * chosen.refractive_index / NIR_LIGHT;
        nir_choose_solvers(ws);
        int n = grid.n;
        for (int k = 0; k < NIR_LEVELS; ++k, n = (n + 1) / 2) {
            nir_level *l = &ws->level[k];
            const size_t side = (size_t)n;
            l->n = n;
            l->pad = (n + 2 + 31) / 16 * 16;        /* a neighbour, and a vector beyond the end of a row */
            l->row = (nir_row *)nir_allocate(side * side, sizeof *l->row);
            l->plane = (int *)nir_allocate(side + 1, sizeof *l->plane);
            l->start = (int *)nir_allocate(side * side, sizeof *l->start);
            l->mask = (uint8_t *)nir_allocate(side * side * side, 1);
            complete = complete && l->row && l->plane && l->start && l->mask;
            ws->levels = k + 1;
            if (n <= 4 || chosen.preconditioner == NIR_SSOR) break;
        }
    }
    if (complete) return ws;
    nir_fail("nir_workspace_new", "no memory");
    nir_workspace_free(ws);
    return NULL;
}

/* ---- tissue -------------------------------------------------------------- */

static const int nir_step[6][3] = { { -1, 0, 0 }, { 1, 0, 0 }, { 0, -1, 0 }, { 0, 1, 0 }, { 0, 0, -1 }, { 0, 0, 1 } };

/* Whether a voxel of this level is tissue; none is outside the grid. */
static inline bool nir_is_tissue(const nir_level *l, int x, int y, int z)
{
    const int n = l->n;
    if (x < 0 || y < 0 || z < 0 || x >= n || y >= n || z >= n) return false;
    return l->mask[((size_t)z * (size_t)n + (size_t)y) * (size_t)n + (size_t)x] != 0;
}

/* The unknown of x = 0 in row (y, z), or `other` for a row of air or outside the grid. */
static inline int nir_start(const nir_level *l, int y, int z, int other)
{
    if (y < 0 || z < 0 || y >= l->n || z >= l->n || l->start[z * l->n + y] == INT_MIN) return other;
    return l->start[z * l->n + y];
}

/* Numbers the unknowns: each row from its first voxel of tissue to its last. */
static inline void nir_number(nir_level *l)
{
    const int n = l->n;
    int next = l->pad;
    l->rows = 0;
    for (int z = 0; z < n; ++z) {
        l->plane[z] = l->rows;
        for (int y = 0; y < n; ++y) {
            int low = 0, high = n;
            while (low < n && !nir_is_tissue(l, low, y, z)) ++low;
            while (high > low && !nir_is_tissue(l, high - 1, y, z)) --high;
            l->start[z * n + y] = high > low ? next - low : INT_MIN;
            if (high <= low) continue;
            l->row[l->rows++] = (nir_row){ .first = next, .count = high - low, .x = low, .y = y, .z = z };
            next += high - low;
        }
    }
    l->plane[n] = l->rows;
    l->size = next - l->pad;
    for (int i = 0; i < l->rows; ++i) {
        nir_row *r = &l->row[i];
        const int own = r->first - r->x;
        r->y_before = nir_start(l, r->y - 1, r->z, own) - own;
        r->y_after = nir_start(l, r->y + 1, r->z, own) - own;
        r->z_before = nir_start(l, r->y, r->z - 1, own) - own;
        r->z_after = nir_start(l, r->y, r->z + 1, own) - own;
    }
}

/* The coarser grid's mask: a cell is tissue if one of its eight voxels is. */
static inline void nir_coarsen_mask(const nir_level *fine, nir_level *coarse)
{
    const size_t n = (size_t)fine->n, m = (size_t)coarse->n;
    memset(coarse->mask, 0, m * m * m);
    for (int i = 0; i < fine->rows; ++i) {
        const size_t x = (size_t)fine->row[i].x, y = (size_t)fine->row[i].y, z = (size_t)fine->row[i].z;
        const uint8_t *from = fine->mask + (z * n + y) * n;
        uint8_t *to = coarse->mask + (z / 2 * m + y / 2) * m;
        for (size_t k = x; k < x + (size_t)fine->row[i].count; ++k) to[k / 2] |= from[k];
    }
}

/* Links to the coarser grid. A value is interpolated from its own coarse cell and the nearer neighbours along x, y, z
   with a quarter each, which is exact for linear functions; the quarter of a cell of air goes to the own one. */
static inline void nir_link(nir_level *fine, const nir_level *coarse)
{
    for (int i = 0; i < fine->rows; ++i) {
        nir_row *r = &fine->row[i];
        const int y = r->y / 2, z = r->z / 2, near_y = y + (r->y % 2 ? 1 : -1), near_z = z + (r->z % 2 ? 1 : -1);
        r->parent = nir_start(coarse, y, z, 0);
        r->parent_y = nir_start(coarse, near_y, z, r->parent);
        r->parent_z = nir_start(coarse, y, near_z, r->parent);
        for (int k = 0; k < r->count; ++k) {
            const int x = (r->x + k) / 2, near_x = x + ((r->x + k) % 2 ? 1 : -1);
            fine->transfer[r->first + k] = (uint8_t)(nir_is_tissue(coarse, near_x, y, z) |
                nir_is_tissue(coarse, x, near_y, z) << 1 | nir_is_tissue(coarse, x, y, near_z) << 2);
        }
        const int last = r->first + r->count;
        for (r->inner = r->first + r->x % 2; r->inner + 1 < last; r->inner += 2)
            if (fine->transfer[r->inner] == 7 && fine->transfer[r->inner + 1] == 7) break;
        for (r->inner_end = r->inner; r->inner_end + 1 < last; r->inner_end += 2)
            if (fine->transfer[r->inner_end] != 7 || fine->transfer[r->inner_end + 1] != 7) break;
        if (r->inner > last) r->inner = r->inner_end = last;
    }
}

static inline void nir_centre(nir_grid grid, const int voxel[3], double point[3])
{
    for (int k = 0; k < 3; ++k) point[k] = (voxel[k] + 0.5 - 0.5 * grid.n) * grid.h;
}

/* Whether the six neighbours of a voxel are tissue too. */
static inline bool nir_is_inside(const nir_level *l, const int voxel[3])
{
    const int n = l->n;
    for (int k = 0; k < 3; ++k)
        if (voxel[k] == 0 || voxel[k] == n - 1) return false;
    const uint8_t *m = l->mask + ((size_t)voxel[2] * (size_t)n + (size_t)voxel[1]) * (size_t)n + voxel[0];
    return m[-1] && m[1] && m[-n] && m[n] && m[-n * n] && m[n * n];
}

/* The surface seen by a voxel: its area |nu . e| over the faces to the air, and the depth of its centre. */
static inline void nir_measure_surface(nir_workspace *ws, const int voxel[3], int unknown)
{
    const nir_level *l = &ws->level[0];
    const bool corrected = ws->has_shape && ws->options.surface == NIR_CORRECTED;
    double centre[3], normal[3], near_point[3];
    nir_centre(ws->grid, voxel, centre);
    ws->area[unknown] = 0;
    for (int f = 0; f < 6; ++f) {
        const int *e = nir_step[f];
        if (nir_is_tissue(l, voxel[0] + e[0], voxel[1] + e[1], voxel[2] + e[2])) continue;
        double weight = 1;
        if (corrected) {
            const double face[3] = { centre[0] + 0.5 * ws->grid.h * e[0], centre[1] + 0.5 * ws->grid.h * e[1],
                                     centre[2] + 0.5 * ws->grid.h * e[2] };
            nir_ellipsoid_level(&ws->shape, face, normal);
            weight = fabs(normal[0] * e[0] + normal[1] * e[1] + normal[2] * e[2]);
        }
        ws->area[unknown] += weight;
    }
    ws->depth[unknown] = 0.5 * ws->grid.h;
    if (corrected && ws->area[unknown] > 0)
        ws->depth[unknown] = fmax(0, -nir_ellipsoid_closest(&ws->shape, centre, near_point, normal));
}

static inline bool nir_ellipsoid_valid(const nir_ellipsoid *e)
{
    for (int i = 0; i < 3; ++i) {
        if (!(e->semi_axis[i] > 0 && e->semi_axis[i] < 1e4))
            return nir_fail("nir_set_tissue", "semi-axis %d of the ellipsoid is %g mm, expected 0 to 1e4", i,
                e->semi_axis[i]);
        if (!(fabs(e->centre[i]) < 1e4))
            return nir_fail("nir_set_tissue", "coordinate %d of the ellipsoid's centre is %g mm", i, e->centre[i]);
        for (int k = 0; k < 3; ++k) {
            double product = 0;
            for (int j = 0; j < 3; ++j) product += e->rotation[3 * i + j] * e->rotation[3 * k + j];
            if (!(fabs(product - (i == k)) < 1e-3))
                return nir_fail("nir_set_tissue",
                    "the ellipsoid's rotation is not orthogonal: row %d times row %d is %g",
                    i, k, product);
        }
    }
    return true;
}

/* `label` [n^3]: 0 is air, all else tissue. `shape`: the surface, to which normals and distances are taken; NULL where
   the surface is that of the voxels themselves, such as a block (then optodes belong on the faces of the grid). */
static inline bool nir_set_tissue(nir_workspace *ws, const nir_ellipsoid *shape, const uint8_t *label)
{
    nir_level *fine = &ws->level[0];
    const size_t n = (size_t)ws->grid.n, volume = n * n * n;
    ws->has_tissue = ws->has_properties = false;
    ws->sources = ws->detectors = 0;
    ws->kept = NIR_KEEP_NOTHING;
    ws->has_shape = shape != NULL;
    if (shape) {
        if (!nir_ellipsoid_valid(shape)) return false;
        ws->shape = *shape;
    }
    for (size_t i = 0; i < volume; ++i) fine->mask[i] = label[i] != 0;
    for (int k = 0; k < ws->levels; ++k) {
        if (k > 0) nir_coarsen_mask(&ws->level[k - 1], &ws->level[k]);
        nir_number(&ws->level[k]);
        if (!nir_reserve(ws, k, (size_t)(ws->level[k].size + 2 * ws->level[k].pad))) return false;
        if (k > 0) nir_link(&ws->level[k - 1], &ws->level[k]);
    }
    if (fine->size == 0) return nir_fail("nir_set_tissue", "every voxel is air, expected some tissue");
    ws->first = fine->pad;
    ws->columns = fine->size;
    ws->stride = fine->size + 2 * fine->pad;
    for (int i = 0; i < fine->rows; ++i) {
        const nir_row *r = &fine->row[i];
        for (int k = 0; k < r->count; ++k) {
            const int voxel[3] = { r->x + k, r->y, r->z }, a = r->first + k;
            ws->voxel[a - ws->first] = (r->z * ws->grid.n + r->y) * ws->grid.n + r->x + k;
            fine->tissue[a] = nir_is_tissue(fine, voxel[0], voxel[1], voxel[2]);
            ws->area[a] = ws->depth[a] = 0;
            if (fine->tissue[a] && !nir_is_inside(fine, voxel)) nir_measure_surface(ws, voxel, a);
        }
    }
    return ws->has_tissue = true;
}

/* ---- optical properties -------------------------------------------------- */

/* Outflow through the surface of a voxel per fluence at its centre, over h^2, and its derivative by D. */
static inline double nir_outflow(const nir_workspace *ws, int a, double *by_diffusion)
{
    const double d = ws->diffusion[a], resistance = 2 * ws->A + ws->depth[a] / d;
    if (by_diffusion) *by_diffusion = ws->area[a] * ws->depth[a] / (d * d * resistance * resistance);
    return ws->area[a] / resistance;
}

/* mu_a, mu_s' [n^3] in mm^-1; those of air are not looked at. The optodes are to be set again, as their depth depends
   on mu_s'. */
static inline bool nir_set_properties(nir_workspace *ws, const float *mu_a, const float *mu_s)
{
    nir_level *fine = &ws->level[0];
    const double h = ws->grid.h;
    if (!ws->has_tissue) return nir_fail("nir_set_properties", "there is no tissue yet: call nir_set_tissue");
    ws->has_properties = false;
    ws->sources = ws->detectors = 0;
    ws->kept = NIR_KEEP_NOTHING;
    for (int a = ws->first; a < ws->first + ws->columns; ++a) {
        const int voxel = ws->voxel[a - ws->first];
        fine->reaction[a] = fine->imaginary[a] = 0;
        if (!fine->tissue[a]) continue;
        if (!(mu_a[voxel] >= 0 && mu_a[voxel] < 1e3f) || !(mu_s[voxel] > 0 && mu_s[voxel] < 1e3f))
            return nir_fail("nir_set_properties",
                "voxel %d has mu_a %g and mu_s' %g mm^-1, expected mu_a >= 0 and mu_s' > 0",
                voxel, (double)mu_a[voxel], (double)mu_s[voxel]);
        ws->mu_a[a] = (double)mu_a[voxel];
        ws->mu_s[a] = (double)mu_s[voxel];
        ws->diffusion[a] = 1 / (3 * (ws->mu_a[a] + ws->mu_s[a]));
        fine->reaction[a] = h * h * h * ws->mu_a[a] + h * h * nir_outflow(ws, a, NULL);
        fine->imaginary[a] = h * h * h * ws->wave;
    }
    for (int k = 0; k < ws->levels; ++k) {
        ws->solver.assemble(ws, k);
        ws->solver.invert(ws, k);
    }
    return ws->has_properties = true;
}

/* ---- optodes ------------------------------------------------------------- */

/* The unknown of a voxel, or -1 for air. */
static inline int nir_unknown(const nir_level *l, int x, int y, int z)
{
    return nir_is_tissue(l, x, y, z) ? l->start[z * l->n + y] + x : -1;
}

/* Trilinear weights of `point` on the voxels around it, those of air left out; returns their sum. `corner`: that voxel
   of the eight with the least coordinates, which is found first if `find`. Weights are then those of the same
   polynomial. */
static inline double nir_stencil(const nir_workspace *ws, const double point[3], int corner[3], bool find, int index[8],
    double weight[8])
{
    double sum = 0, t[3];
    for (int k = 0; k < 3; ++k) {
        const double position = point[k] / ws->grid.h + 0.5 * ws->grid.n - 0.5;
        if (find) corner[k] = (int)floor(fmin(fmax(position, -2), ws->grid.n + 1.0));
        t[k] = position - corner[k];
    }
    for (int i = 0; i < 8; ++i) {
        const int dx = i & 1, dy = i >> 1 & 1, dz = i >> 2;
        index[i] = nir_unknown(&ws->level[0], corner[0] + dx, corner[1] + dy, corner[2] + dz);
        weight[i] = (dx ? t[0] : 1 - t[0]) * (dy ? t[1] : 1 - t[1]) * (dz ? t[2] : 1 - t[2]);
        if (index[i] < 0) {
            index[i] = ws->first;
            weight[i] = 0;
        }
        sum += weight[i];
    }
    return sum;
}

static inline double nir_depth(const nir_workspace *ws, const int corner[3], int i)
{
    const int voxel[3] = { corner[0] + (i & 1), corner[1] + (i >> 1 & 1), corner[2] + (i >> 2) };
    double point[3], surface[3], normal[3];
    nir_centre(ws->grid, voxel, point);
    return fmax(0, -nir_closest(ws, point, surface, normal));
}

/* Weights of an optode at `depth` below the surface point, read (or fed) at the point `below` it. Next to the surface
   the fluence, and likewise what a source sends into the depth, is as 2 A D + depth (the Robin condition), so weights
   at the mean depth z of the voxels in use are multiplied by (2 A D + depth) / (2 A D + z). That is 1 where all eight
   voxels are tissue and the depth is `below`. */
static inline void nir_weigh(const nir_workspace *ws, nir_optode *o, const double surface[3], const double normal[3],
    double below, double depth, int corner[3], bool find)
{
    double point[3], z = 0;
    for (int k = 0; k < 3; ++k) point[k] = surface[k] - below * normal[k];
    const double sum = nir_stencil(ws, point, corner, find, o->index, o->weight);
    for (int i = 0; i < 8; ++i) {
        o->weight[i] /= sum;
        if (o->weight[i] != 0) z += o->weight[i] * nir_depth(ws, corner, i);
    }
    for (int i = 0; i < 8; ++i) {
        const double d = 2 * ws->A * (o->weight[i] != 0 ? ws->diffusion[o->index[i]] : 1);
        o->by_diffusion[i] = o->weight[i] * 2 * ws->A * (z - depth) / ((d + z) * (d + z));
        o->weight[i] *= (d + depth) / (d + z);
    }
}

/* The least depth from `below` on at which half of the trilinear weights are on tissue; below zero if there is none. */
static inline double nir_find_depth(const nir_workspace *ws, const double surface[3], const double normal[3],
    double below)
{
    for (int step = 0; step <= 12; ++step) {
        double point[3], weight[8];
        int corner[3], index[8];
        for (int k = 0; k < 3; ++k) point[k] = surface[k] - below * normal[k];
        if (nir_stencil(ws, point, corner, true, index, weight) >= 0.5) return below;
        below += 0.25 * ws->grid.h;
    }
    return -1;
}

static inline bool nir_place_source(const nir_workspace *ws, nir_optode *o, const double surface[3],
    const double normal[3])
{
    double point[3], below = nir_find_depth(ws, surface, normal, ws->options.detector_depth * ws->grid.h);
    int corner[3];
    nir_optode ahead, behind;
    if (below < 0) return false;
    for (int k = 0; k < 3; ++k) point[k] = surface[k] - below * normal[k];
    const double sum = nir_stencil(ws, point, corner, true, o->scatter_index, o->scatter_weight);
    o->scatter = 0;
    for (int i = 0; i < 8; ++i) {
        o->scatter_weight[i] /= sum;
        if (o->scatter_weight[i] > 0) o->scatter += o->scatter_weight[i] * ws->mu_s[o->scatter_index[i]];
    }
    const double depth = 1 / o->scatter, step = 1e-4 * ws->grid.h;
    below = nir_find_depth(ws, surface, normal, depth);
    if (below < 0) return false;
    nir_weigh(ws, o, surface, normal, below, depth, corner, true);
    ahead = behind = *o;
    nir_weigh(ws, &ahead, surface, normal, below + step, depth + step, corner, false);
    nir_weigh(ws, &behind, surface, normal, below - step, depth - step, corner, false);
    for (int i = 0; i < 8; ++i) o->by_depth[i] = (ahead.weight[i] - behind.weight[i]) / (2 * step);
    return true;
}

static inline bool nir_place(const nir_workspace *ws, nir_optode *o, const double position[3], bool source)
{
    double surface[3], normal[3];
    int corner[3];
    memset(o, 0, sizeof *o);
    if (ws->options.interior_optodes) {
        const double sum = nir_stencil(ws, position, corner, true, o->index, o->weight);
        for (int i = 0; i < 8; ++i) o->weight[i] /= sum;
        return sum >= 0.5;
    }
    nir_closest(ws, position, surface, normal);
    if (source) return nir_place_source(ws, o, surface, normal);
    const double below = nir_find_depth(ws, surface, normal, ws->options.detector_depth * ws->grid.h);
    if (below >= 0) nir_weigh(ws, o, surface, normal, below, 0, corner, true);
    return below >= 0;
}

/* Sources and detectors on the surface, in mm; they are moved to its nearest point. Each source goes 1/mu_s' below it,
   with the mu_s' found there. */
static inline bool nir_set_optodes(nir_workspace *ws, const double (*source)[3], int sources,
    const double (*detector)[3], int detectors)
{
    const char *const name = "nir_set_optodes";
    if (!ws->has_properties) return nir_fail(name, "there are no properties yet: call nir_set_properties");
    if (sources < 1 || detectors < 0 || sources >= NIR_NO_PAIR || detectors >= NIR_NO_PAIR)
        return nir_fail(name, "%d sources and %d detectors, expected 1 to 65534 and 0 to 65534", sources, detectors);
    ws->sources = ws->detectors = 0;
    ws->kept = NIR_KEEP_NOTHING;
    if (sources + detectors > ws->optode_capacity) {
        nir_release(ws->optode);
        ws->optode_capacity = 0;
        ws->optode = (nir_optode *)nir_allocate((size_t)(sources + detectors), sizeof *ws->optode);
        if (!ws->optode) return nir_fail(name, "no memory for %d optodes", sources + detectors);
        ws->optode_capacity = sources + detectors;
    }
    for (int i = 0; i < sources + detectors; ++i) {
        const bool is_source = i < sources;
        const double *at = is_source ? source[i] : detector[i - sources];
        double surface[3], normal[3];
        const bool finite = isfinite(at[0]) && isfinite(at[1]) && isfinite(at[2]);
        const double distance = !finite ? INFINITY :
            ws->options.interior_optodes ? 0 : nir_closest(ws, at, surface, normal);
        if (fabs(distance) > 3 * ws->grid.h || !nir_place(ws, &ws->optode[i], at, is_source))
            return nir_fail(name, "%s %d at (%g, %g, %g) mm: %g mm from the surface, or no tissue beside it; expected "
                "a point within %g mm of the surface of the tissue", is_source ? "source" : "detector",
                is_source ? i : i - sources, at[0], at[1], at[2], distance, 3 * ws->grid.h);
    }
    ws->sources = sources;
    ws->detectors = detectors;
    return true;
}

/* ---- vectors of unknowns ------------------------------------------------- */

static inline void nir_add(const nir_workspace *ws, void *vector, int a, int lane, double re, double im)
{
    const size_t lanes = (size_t)ws->solver.lanes, at = (size_t)a * 2 * lanes + (size_t)lane;
    if (ws->options.float64) {
        ((double *)vector)[at] += re;
        ((double *)vector)[at + lanes] += im;
    } else {
        ((float *)vector)[at] += (float)re;
        ((float *)vector)[at + lanes] += (float)im;
    }
}

static inline void nir_get(const nir_workspace *ws, const void *vector, int a, int lane, double value[2])
{
    const size_t lanes = (size_t)ws->solver.lanes, at = (size_t)a * 2 * lanes + (size_t)lane;
    for (size_t part = 0; part < 2; ++part)
        value[part] = ws->options.float64 ? ((const double *)vector)[at + part * lanes]
                                          : (double)((const float *)vector)[at + part * lanes];
}

static inline void nir_clear(const nir_workspace *ws, void *vector)
{
    const size_t size = 2 * (size_t)ws->solver.lanes * (ws->options.float64 ? sizeof(double) : sizeof(float));
    memset((char *)vector + (size_t)ws->first * size, 0, (size_t)ws->columns * size);
}

/* The sum of an optode's weights times a solution. */
static inline void nir_read(const nir_workspace *ws, const nir_optode *o, const void *vector, int lane, double value[2])
{
    value[0] = value[1] = 0;
    for (int i = 0; i < 8; ++i) {
        double here[2];
        nir_get(ws, vector, o->index[i], lane, here);
        value[0] += o->weight[i] * here[0];
        value[1] += o->weight[i] * here[1];
    }
}

/* The right-hand side is in level[0].b, the answer in ws->solution if it is wanted. */
static inline bool nir_solve(nir_workspace *ws, const char *function, bool wants_solution)
{
    ws->wants_solution = wants_solution;
    if (ws->solver.solve(ws)) return true;
    for (int k = 0; k < ws->levels; ++k) {      /* nothing that is not finite may stay behind */
        nir_block block[NIR_BLOCKS];
        const int blocks = nir_blocks(ws, k, block);
        for (int i = 0; i < blocks; ++i)
            if (block[i].block == &ws->level[k].x || block[i].block == &ws->level[k].b || i >= NIR_VECTORS)
                memset(*block[i].block, 0, ws->level[k].capacity * block[i].size);
    }
    return nir_fail(function, "the solver stopped after %d iterations at a residual of %.1e, expected %.1e: the "
        "tolerance is too small for %s, or the properties are far from those of tissue", ws->iterations, ws->residual,
        ws->options.tolerance, ws->options.float64 ? "double" : "float");
}

/* The next sources to be solved for together, from `begin` to the number returned: as many as the widest solver takes,
   and the rest with the narrowest that takes them all. */
static inline int nir_next_block(nir_workspace *ws, int begin, int count)
{
    int k = 0;
    while (k < ws->choices - 1 && ws->choice[k].lanes < count - begin) ++k;
    ws->solver = ws->choice[k];
    return count - begin < ws->solver.lanes ? count : begin + ws->solver.lanes;
}

/* ---- forward ------------------------------------------------------------- */

static inline const float *nir_field(const nir_workspace *ws, int optode, int part)
{
    return ws->field + ((size_t)optode * 2 + (size_t)part) * (size_t)ws->stride;
}

static inline void nir_keep_field(nir_workspace *ws, int optode, int lane)
{
    float *re = ws->field + (size_t)optode * 2 * (size_t)ws->stride, *im = re + ws->stride;
    for (int a = ws->first; a < ws->first + ws->columns; ++a) {
        double value[2];
        nir_get(ws, ws->solution, a, lane, value);
        re[a] = (float)value[0];
        im[a] = (float)value[1];
    }
}

static inline bool nir_reserve_results(nir_workspace *ws, int pairs, int fields)
{
    const size_t need = (size_t)fields * 2 * (size_t)ws->stride;
    if (pairs > ws->pair_capacity) {
        nir_release(ws->measured);
        ws->pair_capacity = 0;
        nir_release(ws->reading);
        ws->measured = (double *)nir_allocate((size_t)pairs, 2 * sizeof(double));
        ws->reading = (nir_reading *)nir_allocate((size_t)pairs, sizeof *ws->reading);
        if (!ws->measured || !ws->reading) return nir_fail("nir_forward", "no memory for %d pairs", pairs);
        ws->pair_capacity = pairs;
    }
    if (need > ws->field_capacity) {
        nir_release(ws->field);
        ws->field_capacity = 0;
        ws->field = (float *)nir_allocate(need + need / 8, sizeof(float));
        if (!ws->field) return nir_fail("nir_forward", "no memory for %d fields", fields);
        ws->field_capacity = need + need / 8;
    }
    return true;
}

static inline bool nir_pairs_valid(const nir_workspace *ws, const char *function, const uint16_t *pair, int pairs)
{
    if (ws->sources == 0) return nir_fail(function, "there are no optodes yet: call nir_set_optodes");
    if (pairs < 0) return nir_fail(function, "%d pairs, expected 0 or more", pairs);
    for (int p = 0; p < pairs; ++p)
        if (pair[2 * p] != NIR_NO_PAIR && (pair[2 * p] >= ws->sources || pair[2 * p + 1] >= ws->detectors))
            return nir_fail(function, "pair %d is source %d and detector %d, expected fewer than %d and %d", p,
                pair[2 * p], pair[2 * p + 1], ws->sources, ws->detectors);
    return true;
}

/* Phases between -20 and 340 degrees. */
static inline void nir_observe(const double m[2], double *log_amplitude, double *phase)
{
    *log_amplitude = log(hypot(m[0], m[1]));
    *phase = -atan2(m[1], m[0]) * NIR_DEGREES;
    if (*phase < -20) *phase += 360;
}

/* The pairs whose sources are optodes begin .. end - 1. */
static inline void nir_list_readings(nir_workspace *ws, const uint16_t *pair, int pairs, int begin, int end)
{
    ws->readings = 0;
    for (int p = 0; p < pairs; ++p)
        if (pair[2 * p] >= begin && pair[2 * p] < end && pair[2 * p] < ws->sources)
            ws->reading[ws->readings++] = (nir_reading){ .detector = &ws->optode[ws->sources + pair[2 * p + 1]],
                .lane = pair[2 * p] - begin, .pair = p };
}

/* Solves for all the sources (and with NIR_KEEP_ALL the detectors), and measures the pairs [pairs][source, detector]:
   ln(amplitude) and phase in degrees. Those of a pair whose source is NIR_NO_PAIR are 0. */
static inline bool nir_forward(nir_workspace *ws, const uint16_t *pair, int pairs, nir_keep keep, double *log_amplitude,
    double *phase)
{
    if (!nir_pairs_valid(ws, "nir_forward", pair, pairs)) return false;
    const int optodes = keep == NIR_KEEP_ALL ? ws->sources + ws->detectors : ws->sources;
    ws->kept = NIR_KEEP_NOTHING;
    ws->readings = 0;
    if (!nir_reserve_results(ws, pairs, keep == NIR_KEEP_NOTHING ? 0 : optodes)) return false;
    for (int begin = 0, end; begin < optodes; begin = end) {
        end = nir_next_block(ws, begin, optodes);
        nir_clear(ws, ws->level[0].b);
        for (int s = begin; s < end; ++s)
            for (int i = 0; i < 8; ++i)
                nir_add(ws, ws->level[0].b, ws->optode[s].index[i], s - begin, ws->optode[s].weight[i], 0);
        nir_list_readings(ws, pair, pairs, begin, end);
        if (!nir_solve(ws, "nir_forward", keep != NIR_KEEP_NOTHING)) return false;
        for (int i = 0; i < ws->readings; ++i)
            memcpy(&ws->measured[2 * ws->reading[i].pair], ws->reading[i].sum, sizeof ws->reading[i].sum);
        for (int s = begin; s < end && keep != NIR_KEEP_NOTHING; ++s) nir_keep_field(ws, s, s - begin);
    }
    ws->readings = 0;
    for (int p = 0; p < pairs; ++p) {
        log_amplitude[p] = phase[p] = 0;
        if (pair[2 * p] != NIR_NO_PAIR) nir_observe(&ws->measured[2 * p], &log_amplitude[p], &phase[p]);
    }
    ws->kept = keep;
    ws->pairs = pairs;
    return true;
}

/* ---- derivatives --------------------------------------------------------- */

static inline float *nir_edge(const nir_workspace *ws, int k, int a)
{
    return ws->edge + (size_t)k * (size_t)ws->stride + a;
}

/* Of the conductance 2 h D D' / (D + D') of a face by the voxel's own D, and so on. */
static inline void nir_prepare_derivatives(nir_workspace *ws)
{
    const nir_level *l = &ws->level[0];
    const double h = ws->grid.h;
    memset(ws->edge, 0, 8 * (size_t)ws->stride * sizeof *ws->edge);
    for (int i = 0; i < l->rows; ++i) {
        const nir_row *r = &l->row[i];
        const int offset[6] = { -1, 1, r->y_before, r->y_after, r->z_before, r->z_after };
        for (int k = 0; k < r->count; ++k) {
            const int a = r->first + k;
            double by_diffusion;
            if (!l->tissue[a]) continue;
            for (int f = 0; f < 6; ++f) {
                const int *e = nir_step[f];
                if (!nir_is_tissue(l, r->x + k + e[0], r->y + e[1], r->z + e[2])) continue;
                const double d = ws->diffusion[a], other = ws->diffusion[a + offset[f]];
                *nir_edge(ws, f, a) = (float)(2 * h * other * other / ((d + other) * (d + other)));
            }
            nir_outflow(ws, a, &by_diffusion);
            *nir_edge(ws, 6, a) = (float)(h * h * by_diffusion);
            *nir_edge(ws, 7, a) = (float)(-3 * ws->diffusion[a] * ws->diffusion[a]);
        }
    }
}

/* The other parts: the weights of the source, fed with adjoint field `g`, and of the detector, with forward field `f`
   times the complex `scale`, depend on D. */
static inline void nir_sense_optode(nir_workspace *ws, const nir_optode *o, const float *field, const double scale[2])
{
    float *diffuse = ws->scratch + 2 * (size_t)ws->stride;
    for (int i = 0; i < 8; ++i) {
        const int a = o->index[i];
        const double re = (double)field[a], im = (double)field[a + ws->stride];
        diffuse[a] += (float)(o->by_diffusion[i] * (scale[0] * re - scale[1] * im));
        diffuse[a + ws->stride] += (float)(o->by_diffusion[i] * (scale[0] * im + scale[1] * re));
    }
}

/* The derivative by the depth of the source: what the adjoint field `g` says to the moved weights. */
static inline void nir_sense_depth(const nir_workspace *ws, const nir_optode *source, const float *g, double sum[2])
{
    sum[0] = sum[1] = 0;
    for (int i = 0; i < 8; ++i) {
        sum[0] += source->by_depth[i] * (double)g[source->index[i]];
        sum[1] += source->by_depth[i] * (double)g[source->index[i] + ws->stride];
    }
}

static inline bool nir_moves_sources(const nir_workspace *ws)
{
    return !ws->options.fixed_source_depth && !ws->options.interior_optodes;
}

/* Adds Re(scale * derivatives in scratch) to a row of the Jacobian, [mu_a, mu_s'][columns]. */
static inline void nir_add_row(const nir_workspace *ws, const nir_optode *source, const float *g, const double scale[2],
    float *row)
{
    const float re = (float)scale[0], im = (float)scale[1];
    const float *absorb = ws->scratch + ws->first, *diffuse = absorb + 2 * (size_t)ws->stride;
    const float *by_mu = nir_edge(ws, 7, ws->first);
    float *scatter = row + ws->columns;
    for (int k = 0; k < ws->columns; ++k) {
        const float by_d = (re * diffuse[k] - im * diffuse[k + ws->stride]) * by_mu[k];
        row[k] += re * absorb[k] - im * absorb[k + ws->stride] + by_d;
        scatter[k] += by_d;
    }
    if (!nir_moves_sources(ws)) return;
    double moved[2];
    nir_sense_depth(ws, source, g, moved);
    for (int i = 0; i < 8; ++i)
        scatter[source->scatter_index[i] - ws->first] += (float)((scale[0] * moved[0] - scale[1] * moved[1]) *
            -source->scatter_weight[i] / (source->scatter * source->scatter));
}

/* The factor whose product with dM has the real part weight_A d(ln A) + weight_phase d(phase). */
static inline void nir_log_factor(const double m[2], double weight_amplitude, double weight_phase, double factor[2])
{
    const double square = m[0] * m[0] + m[1] * m[1], b = weight_phase * NIR_DEGREES;
    factor[0] = (weight_amplitude * m[0] + b * m[1]) / square;
    factor[1] = (b * m[0] - weight_amplitude * m[1]) / square;
}

static inline bool nir_derivatives_ready(nir_workspace *ws, const char *function, int pairs, nir_keep need)
{
    if (ws->kept < need)
        return nir_fail(function, "there are no fields: call nir_forward with %s first",
            need == NIR_KEEP_ALL ? "NIR_KEEP_ALL" : "NIR_KEEP_SOURCES");
    if (pairs != ws->pairs) return nir_fail(function, "%d pairs, expected the %d of nir_forward", pairs, ws->pairs);
    nir_prepare_derivatives(ws);
    return true;
}

/* Two rows of the Jacobian, [ln A, phase][mu_a, mu_s'][columns], of pair p, which exists. */
static inline void nir_jacobian_rows(nir_workspace *ws, const uint16_t *pair, int p, float *rows)
{
    const double one[2] = { 1, 0 };
    const size_t length = 2 * (size_t)ws->columns;
    const int s = pair[2 * p], d = ws->sources + pair[2 * p + 1];
    const float *f = nir_field(ws, s, 0), *g = nir_field(ws, d, 0);
    memset(rows, 0, 2 * length * sizeof *rows);
    ws->solver.sense(ws, f, g);
    nir_sense_optode(ws, &ws->optode[s], g, one);
    nir_sense_optode(ws, &ws->optode[d], f, one);
    for (size_t part = 0; part < 2; ++part) {
        double factor[2];
        nir_log_factor(&ws->measured[2 * p], part == 0, part == 1, factor);
        nir_add_row(ws, &ws->optode[s], g, factor, rows + part * length);
    }
}

/* J [pairs][ln A, phase in degrees][mu_a, mu_s'][columns], of the pairs of the last nir_forward with NIR_KEEP_ALL.
   Rows of a pair whose source is NIR_NO_PAIR are zero, and so are columns of air. */
static inline bool nir_jacobian(nir_workspace *ws, const uint16_t *pair, int pairs, float *J)
{
    const size_t block = 4 * (size_t)ws->columns;
    if (!nir_pairs_valid(ws, "nir_jacobian", pair, pairs) ||
        !nir_derivatives_ready(ws, "nir_jacobian", pairs, NIR_KEEP_ALL)) return false;
    for (int p = 0; p < pairs; ++p)
        if (pair[2 * p] == NIR_NO_PAIR) memset(J + (size_t)p * block, 0, block * sizeof *J);
        else nir_jacobian_rows(ws, pair, p, J + (size_t)p * block);
    return true;
}

/* out [mu_a, mu_s'][columns] = J^T weight, with weight [pairs][ln A, phase]. */
static inline bool nir_jacobian_transpose_times(nir_workspace *ws, const uint16_t *pair, int pairs,
    const double *weight, float *out)
{
    const char *const name = "nir_jacobian_transpose_times";
    if (!nir_pairs_valid(ws, name, pair, pairs)) return false;
    if (!nir_derivatives_ready(ws, name, pairs, NIR_KEEP_SOURCES)) return false;
    const double one[2] = { 1, 0 };
    float *g = ws->scratch + 4 * (size_t)ws->stride;
    memset(out, 0, 2 * (size_t)ws->columns * sizeof *out);
    for (int begin = 0, end; begin < ws->sources; begin = end) {
        end = nir_next_block(ws, begin, ws->sources);
        double factor[2];
        nir_clear(ws, ws->level[0].b);
        for (int p = 0; p < pairs; ++p) {
            if (pair[2 * p] < begin || pair[2 * p] >= end) continue;
            const nir_optode *o = &ws->optode[ws->sources + pair[2 * p + 1]];
            nir_log_factor(&ws->measured[2 * p], weight[2 * p], weight[2 * p + 1], factor);
            for (int i = 0; i < 8; ++i)
                nir_add(ws, ws->level[0].b, o->index[i], pair[2 * p] - begin, o->weight[i] * factor[0],
                    o->weight[i] * factor[1]);
        }
        if (!nir_solve(ws, name, true)) return false;
        for (int s = begin; s < end; ++s) {
            for (int a = ws->first; a < ws->first + ws->columns; ++a) {
                double value[2];
                nir_get(ws, ws->solution, a, s - begin, value);
                g[a] = (float)value[0];
                g[a + ws->stride] = (float)value[1];
            }
            ws->solver.sense(ws, nir_field(ws, s, 0), g);
            nir_sense_optode(ws, &ws->optode[s], g, one);
            for (int p = 0; p < pairs; ++p) {
                if (pair[2 * p] != s) continue;
                nir_log_factor(&ws->measured[2 * p], weight[2 * p], weight[2 * p + 1], factor);
                nir_sense_optode(ws, &ws->optode[ws->sources + pair[2 * p + 1]], nir_field(ws, s, 0), factor);
            }
            nir_add_row(ws, &ws->optode[s], g, one, out);
        }
    }
    return true;
}

/* The change of the matrix with the properties, into scratch: dD, then the six conductances, then reaction and
   outflow. */
static inline void nir_perturb_matrix(nir_workspace *ws, const float *v)
{
    const nir_level *l = &ws->level[0];
    const float volume = (float)(ws->grid.h * ws->grid.h * ws->grid.h);
    const size_t stride = (size_t)ws->stride;
    float *change = ws->scratch;
    memset(change, 0, stride * sizeof *change);
    for (int k = 0; k < ws->columns; ++k)
        change[ws->first + k] = *nir_edge(ws, 7, ws->first + k) * (v[k] + v[k + ws->columns]);
    for (int i = 0; i < l->rows; ++i) {
        const nir_row *r = &l->row[i];
        const int offset[6] = { -1, 1, r->y_before, r->y_after, r->z_before, r->z_after };
        for (int a = r->first; a < r->first + r->count; ++a) {
            for (int k = 0; k < 6; ++k) {
                const float own = *nir_edge(ws, k, a), other = *nir_edge(ws, k ^ 1, a + offset[k]);
                const float sum = own * change[a] + other * change[a + offset[k]];
                change[(size_t)(k + 1) * stride + (size_t)a] = own != 0 ? sum : 0;
            }
            change[7 * stride + (size_t)a] = volume * v[a - ws->first] + *nir_edge(ws, 6, a) * change[a];
        }
    }
}

/* The right-hand side of that change, dq - dA Phi, for source s, into a lane. */
static inline void nir_perturb(nir_workspace *ws, int s, int lane, const float *v)
{
    const nir_level *l = &ws->level[0];
    const nir_optode *o = &ws->optode[s];
    const float *f = nir_field(ws, s, 0), *fi = nir_field(ws, s, 1), *change = ws->scratch;
    for (int i = 0; i < l->rows; ++i) {
        const nir_row *r = &l->row[i];
        const int offset[6] = { -1, 1, r->y_before, r->y_after, r->z_before, r->z_after };
        for (int a = r->first; a < r->first + r->count; ++a) {
            const float *conductance = change + a;
            float re = -conductance[7 * (size_t)ws->stride] * f[a], im = -conductance[7 * (size_t)ws->stride] * fi[a];
            for (int k = 0; k < 6; ++k) {
                const float g = *(conductance += ws->stride);
                re -= g * (f[a] - f[a + offset[k]]);
                im -= g * (fi[a] - fi[a + offset[k]]);
            }
            nir_add(ws, ws->level[0].b, a, lane, (double)re, (double)im);
        }
    }
    double depth = 0;
    for (int i = 0; i < 8 && nir_moves_sources(ws); ++i)
        depth -= o->scatter_weight[i] * (double)v[o->scatter_index[i] - ws->first + ws->columns] /
            (o->scatter * o->scatter);
    for (int i = 0; i < 8; ++i)
        nir_add(ws, ws->level[0].b, o->index[i], lane,
            o->by_diffusion[i] * (double)change[o->index[i]] + o->by_depth[i] * depth, 0);
}

/* out [pairs][ln A, phase] = J v, with v [mu_a, mu_s'][columns]. */
static inline bool nir_jacobian_times(nir_workspace *ws, const uint16_t *pair, int pairs, const float *v, double *out)
{
    const char *const name = "nir_jacobian_times";
    if (!nir_pairs_valid(ws, name, pair, pairs)) return false;
    if (!nir_derivatives_ready(ws, name, pairs, NIR_KEEP_SOURCES)) return false;
    nir_perturb_matrix(ws, v);
    memset(out, 0, (size_t)pairs * 2 * sizeof *out);
    for (int begin = 0, end; begin < ws->sources; begin = end) {
        end = nir_next_block(ws, begin, ws->sources);
        nir_clear(ws, ws->level[0].b);
        for (int s = begin; s < end; ++s) nir_perturb(ws, s, s - begin, v);
        if (!nir_solve(ws, name, true)) return false;
        for (int p = 0; p < pairs; ++p) {
            const int s = pair[2 * p];
            if (s < begin || s >= end) continue;
            const nir_optode *o = &ws->optode[ws->sources + pair[2 * p + 1]];
            double dm[2], amplitude[2], phase[2];
            nir_read(ws, o, ws->solution, s - begin, dm);
            for (int i = 0; i < 8; ++i) {
                const double change = o->by_diffusion[i] * (double)ws->scratch[o->index[i]];
                dm[0] += change * (double)nir_field(ws, s, 0)[o->index[i]];
                dm[1] += change * (double)nir_field(ws, s, 1)[o->index[i]];
            }
            nir_log_factor(&ws->measured[2 * p], 1, 0, amplitude);
            nir_log_factor(&ws->measured[2 * p], 0, 1, phase);
            out[2 * p] = amplitude[0] * dm[0] - amplitude[1] * dm[1];
            out[2 * p + 1] = phase[0] * dm[0] - phase[1] * dm[1];
        }
    }
    return true;
}

/* ---- the solver ---------------------------------------------------------- */

/* It is written once, at the end of this file, which includes itself for float and double, with and without AVX2 and
   AVX-512. No fused multiply-add anywhere, so that all give the same bits. */
#define NIR_JOIN2(name, suffix) name##_##suffix
#define NIR_JOIN(name, suffix) NIR_JOIN2(name, suffix)
#define NIR_(name) NIR_JOIN(nir_##name, NIR_SOLVER_SUFFIX)

/* Weights of interpolation by nir_level's transfer: the own coarse cell, its neighbours along x, y, z. */
static const double nir_quarters[8][4] = {
    { 1.00, 0.00, 0.00, 0.00 }, { 0.75, 0.25, 0.00, 0.00 }, { 0.75, 0.00, 0.25, 0.00 }, { 0.50, 0.25, 0.25, 0.00 },
    { 0.75, 0.00, 0.00, 0.25 }, { 0.50, 0.25, 0.00, 0.25 }, { 0.50, 0.00, 0.25, 0.25 }, { 0.25, 0.25, 0.25, 0.25 } };

#define NIR_SOLVER_TARGET
#define NIR_SOLVER_BYTES 16
#define NIR_SOLVER_SUFFIX f32
#define NIR_SOLVER_REAL float
#include "nirdot_physics.h"
#define NIR_SOLVER_SUFFIX f64
#define NIR_SOLVER_REAL double
#include "nirdot_physics.h"
#undef NIR_SOLVER_TARGET
#undef NIR_SOLVER_BYTES

#if defined(__GNUC__) && defined(__x86_64__)
#define NIR_SOLVER_TARGET __attribute__((target("avx2")))
#define NIR_SOLVER_BYTES 32
#define NIR_SOLVER_SUFFIX f32_avx2
#define NIR_SOLVER_REAL float
#include "nirdot_physics.h"
#define NIR_SOLVER_SUFFIX f64_avx2
#define NIR_SOLVER_REAL double
#include "nirdot_physics.h"
#undef NIR_SOLVER_TARGET
#undef NIR_SOLVER_BYTES

#define NIR_SOLVER_TARGET __attribute__((target("avx512f")))
#define NIR_SOLVER_BYTES 64
#define NIR_SOLVER_SUFFIX f32_avx512
#define NIR_SOLVER_REAL float
#include "nirdot_physics.h"
#undef NIR_SOLVER_TARGET
#undef NIR_SOLVER_BYTES
#endif

#define NIR_INSTANCE(suffix) { nir_lanes_##suffix, nir_assemble_##suffix, nir_invert_##suffix, nir_solve_##suffix, \
    nir_sense_##suffix }
static inline void nir_choose_solvers(nir_workspace *ws)
{
    static const nir_solver plain[2] = { NIR_INSTANCE(f32), NIR_INSTANCE(f64) };
    const int type = ws->options.float64;
    ws->choice[ws->choices++] = plain[type];
#if defined(__GNUC__) && defined(__x86_64__)
    static const nir_solver avx2[2] = { NIR_INSTANCE(f32_avx2), NIR_INSTANCE(f64_avx2) };
    static const nir_solver avx512 = NIR_INSTANCE(f32_avx512);
    if (__builtin_cpu_supports("avx2")) ws->choice[ws->choices++] = avx2[type];
    if (__builtin_cpu_supports("avx512f") && type == 0) ws->choice[ws->choices++] = avx512;
#endif
    ws->solver = ws->choice[0];
}

#if defined(__clang__)
#pragma STDC FP_CONTRACT DEFAULT
#endif
#endif /* NIRDOT_PHYSICS_H */
#else  /* NIR_SOLVER_REAL: one instance of the solver */

#if defined(__GNUC__)
typedef NIR_SOLVER_REAL NIR_(vec) __attribute__((vector_size(NIR_SOLVER_BYTES)));
typedef float NIR_(line) __attribute__((vector_size(NIR_SOLVER_BYTES)));
#else
typedef NIR_SOLVER_REAL NIR_(vec);
typedef float NIR_(line);
#endif
enum { NIR_(lanes) = sizeof(NIR_(vec)) / sizeof(NIR_SOLVER_REAL) };
#define real NIR_SOLVER_REAL
#define vec NIR_(vec)

/* The six conductances of an unknown, in the order of nir_step, and the real part of its diagonal. */
typedef struct { real face[6], diagonal, unused; } NIR_(cell);
#define cell NIR_(cell)

/* ---- assembly */

static inline void NIR_(assemble_finest)(nir_workspace *ws)
{
    const nir_level *l = &ws->level[0];
    cell *c = (cell *)l->matrix;
    for (int i = 0; i < l->rows; ++i) {
        const nir_row *r = &l->row[i];
        const int after[3] = { 1, r->y_after, r->z_after };
        for (int a = r->first; a < r->first + r->count; ++a) {
            const int x = r->x + a - r->first;
            for (int axis = 0; axis < 3; ++axis) {
                const int *e = nir_step[2 * axis + 1], b = a + after[axis];
                if (!l->tissue[a] || !nir_is_tissue(l, x + e[0], r->y + e[1], r->z + e[2])) continue;
                const double d = ws->diffusion[a], other = ws->diffusion[b];
                const real conductance = (real)(ws->grid.h * 2 * d * other / (d + other));
                c[a].face[2 * axis + 1] = conductance;
                c[b].face[2 * axis] = conductance;
            }
        }
    }
}

/* A coarse face takes 0.43 of the sum of its four fine faces. One half would be right for the distance across it,
   which is twice as long; a little less is faster, by an iteration at 96^3. */
static inline void NIR_(assemble_coarse)(const nir_level *fine, nir_level *coarse)
{
    const cell *from = (const cell *)fine->matrix;
    cell *to = (cell *)coarse->matrix;
    memset(coarse->reaction, 0, (size_t)(coarse->size + 2 * coarse->pad) * sizeof(double));
    memset(coarse->imaginary, 0, (size_t)(coarse->size + 2 * coarse->pad) * sizeof(double));
    for (int i = 0; i < fine->rows; ++i) {
        const nir_row *r = &fine->row[i];
        const int y = r->y % 2, z = r->z % 2;
        for (int a = r->first; a < r->first + r->count; ++a) {
            const int x = r->x + a - r->first, p = r->parent + x / 2;
            to[p].face[x % 2] += (real)0.43 * from[a].face[x % 2];
            to[p].face[2 + y] += (real)0.43 * from[a].face[2 + y];
            to[p].face[4 + z] += (real)0.43 * from[a].face[4 + z];
            coarse->reaction[p] += fine->reaction[a];
            coarse->imaginary[p] += fine->imaginary[a];
        }
    }
}

static inline void NIR_(assemble)(nir_workspace *ws, int level)
{
    nir_level *l = &ws->level[level];
    memset(l->matrix, 0, (size_t)(l->size + 2 * l->pad) * sizeof(cell));
    if (level == 0) NIR_(assemble_finest)(ws);
    else NIR_(assemble_coarse)(&ws->level[level - 1], l);
}

/* The complex inverse of the diagonal; times the relaxation factor for SSOR. */
static inline void NIR_(invert)(nir_workspace *ws, int level)
{
    nir_level *l = &ws->level[level];
    cell *c = (cell *)l->matrix;
    real (*inverse)[2] = (real (*)[2])l->inverse;
    const double scale = ws->options.preconditioner == NIR_SSOR ? ws->options.relaxation : 1;
    for (int a = l->pad; a < l->pad + l->size; ++a) {
        double d = l->reaction[a];
        for (int f = 0; f < 6; ++f) d += (double)c[a].face[f];
        if (d == 0) d = 1;
        c[a].diagonal = (real)d;
        const double square = d * d + l->imaginary[a] * l->imaginary[a];
        inverse[a][0] = (real)(scale * d / square);
        inverse[a][1] = (real)(-scale * l->imaginary[a] / square);
    }
}

/* ---- sweeps over a row */

/* Adds the lanes of two vectors, sums over a row, to sums in double. */
#define NIR_FLUSH(re, im, sum) do { \
    real lanes_[2][NIR_(lanes)]; \
    memcpy(lanes_[0], &(re), sizeof(vec)); \
    memcpy(lanes_[1], &(im), sizeof(vec)); \
    for (int k_ = 0; k_ < NIR_(lanes); ++k_) { \
        sum[0][k_] += (double)lanes_[0][k_]; \
        sum[1][k_] += (double)lanes_[1][k_]; \
    } \
} while (0)

/* r -= alpha q, and the sum of |r|^2; x += alpha p where the fields are wanted. */
NIR_SOLVER_TARGET static inline void NIR_(advance_row)(nir_workspace *ws, const nir_row *row, const vec alpha[2],
    double sum[2][NIR_(lanes)])
{
    const vec (*p)[2] = (const vec (*)[2])ws->direction, (*q)[2] = (const vec (*)[2])ws->level[0].x;
    vec (*x)[2] = (vec (*)[2])ws->solution, (*r)[2] = (vec (*)[2])ws->level[0].b;
    const vec ar = alpha[0], ai = alpha[1];
    vec re = { 0 }, im = { 0 };
    for (int a = row->first; a < row->first + row->count; ++a) {
        const vec rr = r[a][0] - (ar * q[a][0] - ai * q[a][1]);
        const vec ri = r[a][1] - (ar * q[a][1] + ai * q[a][0]);
        r[a][0] = rr;
        r[a][1] = ri;
        re += rr * rr;
        im += ri * ri;
    }
    NIR_FLUSH(re, im, sum);
    for (int a = row->first; ws->wants_solution && a < row->first + row->count; ++a) {
        x[a][0] += ar * p[a][0] - ai * p[a][1];
        x[a][1] += ar * p[a][1] + ai * p[a][0];
    }
}

/* Gauss-Seidel upwards from zero: x = (D + L)^-1 b. The unknown before is the last term: the chain of dependence is
   short. */
NIR_SOLVER_TARGET static inline void NIR_(forward_row)(const nir_level *l, const nir_row *row)
{
    const cell *c = (const cell *)l->matrix;
    const real (*inverse)[2] = (const real (*)[2])l->inverse;
    const vec (*b)[2] = (const vec (*)[2])l->b;
    vec (*x)[2] = (vec (*)[2])l->x;
    const int y = row->y_before, z = row->z_before;
    for (int a = row->first; a < row->first + row->count; ++a) {
        const real *g = c[a].face;
        const vec re = b[a][0] + g[2] * x[a + y][0] + g[4] * x[a + z][0] + g[0] * x[a - 1][0];
        const vec im = b[a][1] + g[2] * x[a + y][1] + g[4] * x[a + z][1] + g[0] * x[a - 1][1];
        x[a][0] = inverse[a][0] * re - inverse[a][1] * im;
        x[a][1] = inverse[a][0] * im + inverse[a][1] * re;
    }
}

#define NIR_AROUND(part) (b[a][part] + g[2] * x[a + row->y_before][part] + g[3] * x[a + row->y_after][part] + \
    g[4] * x[a + row->z_before][part] + g[5] * x[a + row->z_after][part])

/* Gauss-Seidel upwards. */
NIR_SOLVER_TARGET static inline void NIR_(relax_up)(const nir_level *l, const nir_row *row)
{
    const cell *c = (const cell *)l->matrix;
    const real (*inverse)[2] = (const real (*)[2])l->inverse;
    const vec (*b)[2] = (const vec (*)[2])l->b;
    vec (*x)[2] = (vec (*)[2])l->x;
    for (int a = row->first; a < row->first + row->count; ++a) {
        const real *g = c[a].face;
        const vec re = NIR_AROUND(0) + g[1] * x[a + 1][0] + g[0] * x[a - 1][0];
        const vec im = NIR_AROUND(1) + g[1] * x[a + 1][1] + g[0] * x[a - 1][1];
        x[a][0] = inverse[a][0] * re - inverse[a][1] * im;
        x[a][1] = inverse[a][0] * im + inverse[a][1] * re;
    }
}

/* Gauss-Seidel downwards, and the sum of b x, unconjugated. */
NIR_SOLVER_TARGET static inline void NIR_(relax_down)(const nir_level *l, const nir_row *row,
    double sum[2][NIR_(lanes)])
{
    const cell *c = (const cell *)l->matrix;
    const real (*inverse)[2] = (const real (*)[2])l->inverse;
    const vec (*b)[2] = (const vec (*)[2])l->b;
    vec (*x)[2] = (vec (*)[2])l->x, sum_re = { 0 }, sum_im = { 0 };
    for (int a = row->first + row->count - 1; a >= row->first; --a) {
        const real *g = c[a].face;
        const vec re = NIR_AROUND(0) + g[0] * x[a - 1][0] + g[1] * x[a + 1][0];
        const vec im = NIR_AROUND(1) + g[0] * x[a - 1][1] + g[1] * x[a + 1][1];
        const vec xr = inverse[a][0] * re - inverse[a][1] * im, xi = inverse[a][0] * im + inverse[a][1] * re;
        sum_re += b[a][0] * xr - b[a][1] * xi;
        sum_im += b[a][0] * xi + b[a][1] * xr;
        x[a][0] = xr;
        x[a][1] = xi;
    }
    if (sum) NIR_FLUSH(sum_re, sum_im, sum);
}

/* The other half of SSOR, x += w D^-1 U x, and the sum of b x. */
NIR_SOLVER_TARGET static inline void NIR_(ssor_down)(const nir_level *l, const nir_row *row, double sum[2][NIR_(lanes)])
{
    const cell *c = (const cell *)l->matrix;
    const real (*inverse)[2] = (const real (*)[2])l->inverse;
    const vec (*b)[2] = (const vec (*)[2])l->b;
    vec (*x)[2] = (vec (*)[2])l->x, sum_re = { 0 }, sum_im = { 0 };
    const int y = row->y_after, z = row->z_after;
    for (int a = row->first + row->count - 1; a >= row->first; --a) {
        const real *g = c[a].face;
        const vec re = g[3] * x[a + y][0] + g[5] * x[a + z][0] + g[1] * x[a + 1][0];
        const vec im = g[3] * x[a + y][1] + g[5] * x[a + z][1] + g[1] * x[a + 1][1];
        x[a][0] += inverse[a][0] * re - inverse[a][1] * im;
        x[a][1] += inverse[a][0] * im + inverse[a][1] * re;
        sum_re += b[a][0] * x[a][0] - b[a][1] * x[a][1];
        sum_im += b[a][0] * x[a][1] + b[a][1] * x[a][0];
    }
    NIR_FLUSH(sum_re, sum_im, sum);
}

/* ---- between two levels */

/* After a sweep upwards from zero the residual is U x; it goes to the coarse cells by the transpose of
   interpolation. */
#define NIR_RESIDUAL(a, part) \
    (c[a].face[1] * x[(a) + 1][part] + c[a].face[3] * x[(a) + y][part] + c[a].face[5] * x[(a) + z][part])

NIR_SOLVER_TARGET static inline void NIR_(restrict_edge)(const nir_level *l, const nir_level *coarse,
    const nir_row *row, int from, int to)
{
    const cell *c = (const cell *)l->matrix;
    const vec (*x)[2] = (const vec (*)[2])l->x;
    vec (*b)[2] = (vec (*)[2])coarse->b;
    const int y = row->y_after, z = row->z_after;
    for (int a = from; a < to; ++a) {
        const double *w = nir_quarters[l->transfer[a]];
        const int at = row->x + a - row->first, p = at / 2, near_x = row->parent + p + (at % 2 ? 1 : -1);
        const real own = (real)w[0], wx = (real)w[1], wy = (real)w[2], wz = (real)w[3];
        for (int part = 0; part < 2; ++part) {
            const vec residual = NIR_RESIDUAL(a, part);
            b[row->parent + p][part] += own * residual;
            b[near_x][part] += wx * residual;
            b[row->parent_y + p][part] += wy * residual;
            b[row->parent_z + p][part] += wz * residual;
        }
    }
}

/* The same for pairs with a quarter everywhere. The row's own coarse cells are kept back until their last part is
   there. */
NIR_SOLVER_TARGET static inline void NIR_(restrict_inner)(const nir_level *l, const nir_level *coarse,
    const nir_row *row)
{
    const cell *c = (const cell *)l->matrix;
    const vec (*x)[2] = (const vec (*)[2])l->x;
    const int y = row->y_after, z = row->z_after, offset = (row->x + row->inner - row->first) / 2;
    vec (*b)[2] = (vec (*)[2])coarse->b + row->parent + offset;
    vec (*by)[2] = (vec (*)[2])coarse->b + row->parent_y + offset;
    vec (*bz)[2] = (vec (*)[2])coarse->b + row->parent_z + offset;
    vec behind_re = { 0 }, behind_im = { 0 }, own_re = b[-1][0], own_im = b[-1][1];
    const real quarter = (real)0.25;
    for (int a = row->inner; a < row->inner_end; a += 2, ++b, ++by, ++bz) {
        const vec re0 = quarter * NIR_RESIDUAL(a, 0), im0 = quarter * NIR_RESIDUAL(a, 1);
        const vec re1 = quarter * NIR_RESIDUAL(a + 1, 0), im1 = quarter * NIR_RESIDUAL(a + 1, 1);
        const vec re = re0 + re1, im = im0 + im1;
        b[-1][0] = own_re + re0;
        b[-1][1] = own_im + im0;
        own_re = b[0][0] + re + behind_re;
        own_im = b[0][1] + im + behind_im;
        behind_re = re1;
        behind_im = im1;
        by[0][0] += re;
        by[0][1] += im;
        bz[0][0] += re;
        bz[0][1] += im;
    }
    b[-1][0] = own_re;
    b[-1][1] = own_im;
    b[0][0] += behind_re;
    b[0][1] += behind_im;
}

NIR_SOLVER_TARGET static inline void NIR_(restrict_row)(const nir_level *l, const nir_level *coarse, const nir_row *row)
{
    NIR_(restrict_edge)(l, coarse, row, row->first, row->inner);
    if (row->inner < row->inner_end) NIR_(restrict_inner)(l, coarse, row);
    NIR_(restrict_edge)(l, coarse, row, row->inner_end, row->first + row->count);
}

NIR_SOLVER_TARGET static inline void NIR_(prolong_edge)(const nir_level *l, const nir_level *coarse, const nir_row *row,
    int from, int to)
{
    const vec (*correction)[2] = (const vec (*)[2])coarse->x;
    vec (*x)[2] = (vec (*)[2])l->x;
    for (int a = from; a < to; ++a) {
        const double *w = nir_quarters[l->transfer[a]];
        const int at = row->x + a - row->first, p = at / 2, near_x = row->parent + p + (at % 2 ? 1 : -1);
        const real own = (real)w[0], wx = (real)w[1], wy = (real)w[2], wz = (real)w[3];
        for (int part = 0; part < 2; ++part)
            x[a][part] += own * correction[row->parent + p][part] + wx * correction[near_x][part] +
                wy * correction[row->parent_y + p][part] + wz * correction[row->parent_z + p][part];
    }
}

NIR_SOLVER_TARGET static inline void NIR_(prolong_row)(const nir_level *l, const nir_level *coarse, const nir_row *row)
{
    const int offset = (row->x + row->inner - row->first) / 2;
    const vec (*own)[2] = (const vec (*)[2])coarse->x + row->parent + offset;
    const vec (*by)[2] = (const vec (*)[2])coarse->x + row->parent_y + offset;
    const vec (*bz)[2] = (const vec (*)[2])coarse->x + row->parent_z + offset;
    vec (*x)[2] = (vec (*)[2])l->x;
    const real quarter = (real)0.25;
    NIR_(prolong_edge)(l, coarse, row, row->first, row->inner);
    for (int a = row->inner; a < row->inner_end; a += 2, ++own, ++by, ++bz) {
        const vec re = own[0][0] + by[0][0] + bz[0][0], im = own[0][1] + by[0][1] + bz[0][1];
        x[a][0] += quarter * (re + own[-1][0]);
        x[a][1] += quarter * (im + own[-1][1]);
        x[a + 1][0] += quarter * (re + own[1][0]);
        x[a + 1][1] += quarter * (im + own[1][1]);
    }
    NIR_(prolong_edge)(l, coarse, row, row->inner_end, row->first + row->count);
}

/* ---- the direction of search */

/* p = z + beta p. */
NIR_SOLVER_TARGET static inline void NIR_(direct_row)(nir_workspace *ws, const nir_row *row, const vec beta[2])
{
    const vec (*z)[2] = (const vec (*)[2])ws->level[0].x;
    vec (*p)[2] = (vec (*)[2])ws->direction;
    const vec br = beta[0], bi = beta[1];
    for (int a = row->first; a < row->first + row->count; ++a) {
        const vec re = p[a][0], im = p[a][1];
        p[a][0] = z[a][0] + br * re - bi * im;
        p[a][1] = z[a][1] + br * im + bi * re;
    }
}

/* q = A p, and the sum of p q. It takes the place of z, which has been used by then. */
NIR_SOLVER_TARGET static inline void NIR_(apply_row)(nir_workspace *ws, const nir_row *row, double sum[2][NIR_(lanes)])
{
    const cell *c = (const cell *)ws->level[0].matrix;
    const vec (*p)[2] = (const vec (*)[2])ws->direction;
    vec (*q)[2] = (vec (*)[2])ws->level[0].x;
    const int y0 = row->y_before, y1 = row->y_after, z0 = row->z_before, z1 = row->z_after;
    const real wave = (real)(ws->grid.h * ws->grid.h * ws->grid.h * ws->wave);
    vec re = { 0 }, im = { 0 };
    for (int a = row->first; a < row->first + row->count; ++a) {
        const real *g = c[a].face;
        const vec pr = p[a][0], pi = p[a][1];
        const vec qr = c[a].diagonal * pr - wave * pi - (g[0] * p[a - 1][0] + g[1] * p[a + 1][0] + g[2] * p[a + y0][0] +
            g[3] * p[a + y1][0] + g[4] * p[a + z0][0] + g[5] * p[a + z1][0]);
        const vec qi = c[a].diagonal * pi + wave * pr - (g[0] * p[a - 1][1] + g[1] * p[a + 1][1] + g[2] * p[a + y0][1] +
            g[3] * p[a + y1][1] + g[4] * p[a + z0][1] + g[5] * p[a + z1][1]);
        re += pr * qr - pi * qi;
        im += pr * qi + pi * qr;
        q[a][0] = qr;
        q[a][1] = qi;
    }
    NIR_FLUSH(re, im, sum);
}

/* ---- passes over a level

   A pass streams its vectors once: what needs the plane before or after follows one plane behind, out of the cache. */

#define NIR_PLANE(l, z) for (int i = (l)->plane[z]; i < (l)->plane[(z) + 1]; ++i)
#define NIR_PLANE_DOWN(l, z) for (int i = (l)->plane[(z) + 1] - 1; i >= (l)->plane[z]; --i)

/* On the finest level of an iteration, advances first: `alpha` is NULL elsewhere. Then x by a sweep upwards from zero,
   and the residual to the coarser level if there is one. */
NIR_SOLVER_TARGET static inline void NIR_(descend)(nir_workspace *ws, int level, const vec *alpha,
    double sum[2][NIR_(lanes)])
{
    const nir_level *l = &ws->level[level], *coarse = level + 1 < ws->levels ? l + 1 : NULL;
    if (coarse) memset(coarse->b, 0, (size_t)(coarse->size + 2 * coarse->pad) * 2 * sizeof(vec));
    for (int z = 0; z <= l->n; ++z) {
        if (z < l->n)
            NIR_PLANE(l, z) {
                if (alpha) NIR_(advance_row)(ws, &l->row[i], alpha, sum);
                NIR_(forward_row)(l, &l->row[i]);
            }
        if (coarse && z > 0) NIR_PLANE(l, z - 1) NIR_(restrict_row)(l, coarse, &l->row[i]);
    }
}

/* Adds the coarser level's correction and sweeps downwards; the sum of r x if it is asked for. */
NIR_SOLVER_TARGET static inline void NIR_(ascend)(nir_workspace *ws, int level, double sum[2][NIR_(lanes)])
{
    const nir_level *l = &ws->level[level], *coarse = level + 1 < ws->levels ? l + 1 : NULL;
    for (int z = l->n; z >= 0; --z) {
        if (coarse && z > 0) NIR_PLANE(l, z - 1) NIR_(prolong_row)(l, coarse, &l->row[i]);
        if (z == l->n) continue;
        NIR_PLANE_DOWN(l, z) {
            if (coarse) NIR_(relax_down)(l, &l->row[i], sum);
            else NIR_(ssor_down)(l, &l->row[i], sum);
        }
    }
}

/* The coarser levels of a V(1,1) cycle. The coarsest has at most 64 unknowns; four symmetric sweeps are enough. */
NIR_SOLVER_TARGET static inline void NIR_(correct)(nir_workspace *ws)
{
    const int last = ws->levels - 1;
    const nir_level *l = &ws->level[last];
    if (last == 0) return;
    for (int k = 1; k <= last; ++k) NIR_(descend)(ws, k, NULL, NULL);
    for (int sweep = 0; sweep < 3; ++sweep)
        for (int i = 0; i < l->rows; ++i) NIR_(relax_up)(l, &l->row[i]);
    for (int sweep = 0; sweep < 4; ++sweep)
        for (int i = l->rows - 1; i >= 0; --i) NIR_(relax_down)(l, &l->row[i], NULL);
    for (int k = last - 1; k > 0; --k) NIR_(ascend)(ws, k, NULL);
}

NIR_SOLVER_TARGET static inline void NIR_(search)(nir_workspace *ws, const vec beta[2], double sum[2][NIR_(lanes)])
{
    const nir_level *l = &ws->level[0];
    for (int z = 0; z <= l->n; ++z) {
        if (z < l->n) NIR_PLANE(l, z) NIR_(direct_row)(ws, &l->row[i], beta);
        if (z > 0) NIR_PLANE(l, z - 1) NIR_(apply_row)(ws, &l->row[i], sum);
    }
}

/* ---- the iteration */

/* Lane by lane the quotient a / b; 0 for a lane that is done, or where b is 0. */
static inline void NIR_(divide)(double a[2][NIR_(lanes)], double b[2][NIR_(lanes)], const bool done[NIR_(lanes)],
    vec quotient[2])
{
    real lanes[2][NIR_(lanes)];
    for (int k = 0; k < NIR_(lanes); ++k) {
        const double square = b[0][k] * b[0][k] + b[1][k] * b[1][k];
        const bool zero = done[k] || !(square > 0);
        lanes[0][k] = zero ? 0 : (real)((a[0][k] * b[0][k] + a[1][k] * b[1][k]) / square);
        lanes[1][k] = zero ? 0 : (real)((a[1][k] * b[0][k] - a[0][k] * b[1][k]) / square);
    }
    memcpy(quotient, lanes, sizeof lanes);
}

/* The measurements are sums of alpha p too, so that the field itself need not be formed. */
static inline void NIR_(observe)(nir_workspace *ws, const vec alpha[2])
{
    real lanes[2][NIR_(lanes)];
    memcpy(lanes, alpha, sizeof lanes);
    for (int i = 0; i < ws->readings; ++i) {
        nir_reading *r = &ws->reading[i];
        double value[2];
        nir_read(ws, r->detector, ws->direction, r->lane, value);
        const double re = (double)lanes[0][r->lane], im = (double)lanes[1][r->lane];
        r->sum[0] += re * value[0] - im * value[1];
        r->sum[1] += re * value[1] + im * value[0];
    }
}

/* Which lanes are done, after `square`, the lanes' |r|^2: 1 if all are, 0 if not, -1 if a number is not finite.
   `soon`: all will be after one more iteration like the last. */
static inline int NIR_(done)(nir_workspace *ws, double square[2][NIR_(lanes)], double norm[NIR_(lanes)],
    double last[NIR_(lanes)], bool done[NIR_(lanes)], bool *soon)
{
    int all = 1;
    *soon = ws->iterations > 0;
    ws->residual = 0;
    for (int k = 0; k < NIR_(lanes); ++k) {
        const double rr = square[0][k] + square[1][k];
        if (!isfinite(rr)) return -1;
        if (ws->iterations == 0) norm[k] = rr;
        const double goal = ws->options.tolerance * ws->options.tolerance * norm[k];
        done[k] = rr <= goal;
        all = all && done[k];
        if (norm[k] > 0) ws->residual = fmax(ws->residual, sqrt(rr / norm[k]));
        *soon = *soon && (done[k] || rr * rr < goal * last[k]);
        last[k] = rr;
    }
    return all;
}

/* A lane whose residual is small enough stands still, so that its result does not depend on its neighbours. When the
   end is near, the residual is looked at before the next sweep. */
NIR_SOLVER_TARGET static bool NIR_(solve)(nir_workspace *ws)
{
    const nir_level *l = &ws->level[0];
    double norm[NIR_(lanes)] = { 0 }, last[NIR_(lanes)] = { 0 }, rho[2][NIR_(lanes)] = { { 0 } };
    bool done[NIR_(lanes)] = { false }, soon = false;
    vec alpha[2], beta[2];
    memset(alpha, 0, sizeof alpha);
    if (ws->wants_solution) nir_clear(ws, ws->solution);
    for (ws->iterations = 0;; ++ws->iterations) {
        double square[2][NIR_(lanes)] = { { 0 } }, rz[2][NIR_(lanes)] = { { 0 } }, pq[2][NIR_(lanes)] = { { 0 } };
        const bool careful = soon;
        if (careful) for (int i = 0; i < l->rows; ++i) NIR_(advance_row)(ws, &l->row[i], alpha, square);
        else NIR_(descend)(ws, 0, alpha, square);
        const int state = NIR_(done)(ws, square, norm, last, done, &soon);
        if (state > 0) return true;
        if (state < 0 || ws->iterations == ws->options.max_iterations) return false;
        if (careful) NIR_(descend)(ws, 0, NULL, NULL);
        NIR_(correct)(ws);
        NIR_(ascend)(ws, 0, rz);
        NIR_(divide)(rz, rho, done, beta);
        memcpy(rho, rz, sizeof rho);
        NIR_(search)(ws, beta, pq);
        NIR_(divide)(rz, pq, done, alpha);
        NIR_(observe)(ws, alpha);
    }
}

/* ---- derivatives

   The derivative of a measurement, forward field f and adjoint field g [re, im][stride], by every voxel's mu_a at
   fixed D and by its D, as far as the operator goes: into scratch as [by mu_a: re, im; by D: re, im][stride]. Vectors
   lie along x here, and may reach beyond a row, where the next row overwrites them. */
#define NIR_LOAD(v, from) memcpy(&(v), from, sizeof(v))
NIR_SOLVER_TARGET static inline void NIR_(sense)(nir_workspace *ws, const float *f, const float *g)
{
    typedef NIR_(line) line;
    const nir_level *l = &ws->level[0];
    const size_t stride = (size_t)ws->stride;
    const float volume = (float)(ws->grid.h * ws->grid.h * ws->grid.h);
    for (int i = 0; i < l->rows; ++i) {
        const nir_row *r = &l->row[i];
        const int offset[6] = { -1, 1, r->y_before, r->y_after, r->z_before, r->z_after };
        for (int a = r->first; a < r->first + r->count; a += (int)(sizeof(line) / sizeof(float))) {
            line fr, fi, gr, gi, e;
            NIR_LOAD(fr, f + a);
            NIR_LOAD(fi, f + stride + a);
            NIR_LOAD(gr, g + a);
            NIR_LOAD(gi, g + stride + a);
            NIR_LOAD(e, nir_edge(ws, 6, a));
            const line re = fr * gr - fi * gi, im = fr * gi + fi * gr;
            const line absorb_re = -volume * re, absorb_im = -volume * im;
            line sum_re = -e * re, sum_im = -e * im;
            for (int k = 0; k < 6; ++k) {
                const int b = a + offset[k];
                line dfr, dfi, dgr, dgi;
                NIR_LOAD(dfr, f + b);
                NIR_LOAD(dfi, f + stride + b);
                NIR_LOAD(dgr, g + b);
                NIR_LOAD(dgi, g + stride + b);
                NIR_LOAD(e, nir_edge(ws, k, a));
                dfr = fr - dfr;
                dfi = fi - dfi;
                dgr = gr - dgr;
                dgi = gi - dgi;
                sum_re -= e * (dfr * dgr - dfi * dgi);
                sum_im -= e * (dfr * dgi + dfi * dgr);
            }
            memcpy(ws->scratch + a, &absorb_re, sizeof(line));
            memcpy(ws->scratch + stride + a, &absorb_im, sizeof(line));
            memcpy(ws->scratch + 2 * stride + a, &sum_re, sizeof(line));
            memcpy(ws->scratch + 3 * stride + a, &sum_im, sizeof(line));
        }
    }
}

#undef NIR_LOAD
#undef NIR_PLANE
#undef NIR_PLANE_DOWN
#undef NIR_AROUND
#undef NIR_RESIDUAL
#undef NIR_FLUSH
#undef real
#undef vec
#undef cell
#undef NIR_SOLVER_REAL
#undef NIR_SOLVER_SUFFIX
#endif
