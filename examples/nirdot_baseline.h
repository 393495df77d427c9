/*
 * nirdot_baseline.h - the classical reconstruction beside which a network has to
 * stand: a homogeneous fit, then Gauss-Newton steps with a smooth prior.
 *
 *     1. mu_a, mu_s' of homogeneous tissue, by least squares of all channels
 *     2. dy = what was measured - what that tissue would give, over the noise's standard deviation
 *     3. x = C J^T (J C J^T + 2 I)^-1 dy,      mu = mu_0 (1 + x)
 *
 * with the Jacobian J of nirdot_physics.h by relative changes, and a prior for x of standard deviation 1 that is
 * correlated over 4 mm: C = G G^T, where G is a Gaussian within the tissue, scaled so that every voxel has the same
 * variance. (The 2 I is the noise's covariance doubled, for what the linear model leaves out.)
 *
 * How to use it (one nir_baseline for each thread):
 *
 *     nir_baseline *b = nir_baseline_new((nir_grid){ 32, 2 }, (nir_grid){ 64, 1 }, NULL, NULL);
 *     nir_data data = { .shape = &head, .source = source, .sources = 16, ..., .phase = phase };
 *     nir_baseline_reconstruct(b, &data, background, mu_a, mu_s);      // float [32^3] each, 0 in air; double [2]
 *     nir_baseline_free(b);
 *
 * The first grid is that of the images. The second is the one on which homogeneous tissue is compared with what was
 * measured; its error of discretisation should be that of the data, or small: give the grid of the simulation, or the
 * first again.
 */
#ifndef NIRDOT_BASELINE_H
#define NIRDOT_BASELINE_H

#include "nirdot_physics.h"

/* ---- types --------------------------------------------------------------- */

typedef struct {
    double correlation;         /* the Gaussian's standard deviation in mm */
    double spacing;             /* of its Gaussians, over their standard deviation, at most; but no less than a voxel.
                                   At 1 it ripples by 1e-4, and is a few per cent off at the surface (see the tests) */
    double deviation;           /* of x, the relative change of mu */
    double noise;               /* the multiple of I */
    double start[2];            /* mu_a, mu_s' in mm^-1, at which the homogeneous fit begins */
    int fit_steps;              /* of the homogeneous fit, at most */
    int steps;                  /* of Gauss-Newton */
    double floor;               /* mu is at least this multiple of the background */
} nir_baseline_options;

static inline nir_baseline_options nir_baseline_defaults(void)
{
    return (nir_baseline_options){ .correlation = 4, .spacing = 1, .deviation = 1, .noise = 2, .start = { 0.005, 1 },
        .fit_steps = 4, .steps = 1,
        .floor = 0.1 };
}

/* What was measured, and where; as in nir_set_optodes and nir_forward. */
typedef struct {
    const nir_ellipsoid *shape;
    const double (*source)[3], (*detector)[3];
    int sources, detectors, pairs;
    const uint16_t *pair;                               /* [pairs][2] */
    const double *log_amplitude, *phase;                /* [pairs]; the phase in degrees */
    const double *sigma_amplitude, *sigma_phase;        /* of the noise; NULL: 0.01 and 0.5 degrees. A pair is left out
                                                           if one of its two is not a number above zero */
} nir_data;

/* A grid with homogeneous or other tissue on it. */
typedef struct {
    nir_workspace *ws;
    uint8_t *label;
    float *mu_a, *mu_s;
} nir_model;

typedef struct {
    nir_baseline_options options;
    nir_model image, small, fine;       /* the images' grid; a coarser one for the fit; the one to compare on, whose ws
                                           is NULL where it is the first */
    int node_step, nodes;               /* the prior's Gaussians sit at every so many voxels; along a side */
    int *used;                          /* [nodes^3]: the node's number, or -1 */
    int use;
    double *share;                      /* [nodes^3]: the root of the part of its block that is tissue */
    float *weight;                      /* [nodes][n]: the Gaussian along one axis */
    int *low, *high;                    /* [nodes]: where it is not zero */
    double *norm;                       /* [n^3] */
    float *work;                        /* for the three passes */
    double *measured;                   /* [7][2][pairs]: predictions, corrections, slopes */
    float *rows, *factor;               /* eight rows of J; B = J G [rows / 8][2 * use][8] */
    double *K, *y, *x;
    int *channel;                       /* [rows]: pair and quantity of a row */
    size_t pair_capacity, row_capacity, use_capacity;
} nir_baseline;

enum { NIR_BLOCK = 8 };                 /* rows of J that are handled together */

/* ---- memory -------------------------------------------------------------- */

static inline void nir_model_free(nir_model *m)
{
    nir_workspace_free(m->ws);
    nir_release(m->label);
    nir_release(m->mu_a);
    nir_release(m->mu_s);
}

static inline bool nir_model_new(nir_model *m, nir_grid grid, const nir_options *physics)
{
    const size_t n = (size_t)grid.n;
    if (!(m->ws = nir_workspace_new(grid, physics))) return false;
    m->label = (uint8_t *)nir_allocate(n * n * n, 1);
    m->mu_a = (float *)nir_allocate(n * n * n, sizeof(float));
    m->mu_s = (float *)nir_allocate(n * n * n, sizeof(float));
    return (m->label && m->mu_a && m->mu_s) || nir_fail("nir_baseline_new", "no memory");
}

static inline void nir_baseline_free(nir_baseline *b)
{
    if (!b) return;
    nir_model_free(&b->image);
    nir_model_free(&b->small);
    nir_model_free(&b->fine);
    void *const blocks[] = { b->used, b->share, b->weight, b->low, b->high, b->norm, b->work, b->measured, b->rows,
        b->factor, b->K, b->y, b->x, b->channel };
    for (size_t i = 0; i < sizeof blocks / sizeof *blocks; ++i) nir_release(blocks[i]);
    free(b);
}

/* A block that has to grow loses what it held. */
static inline bool nir_grow(void *block, size_t count, size_t size)
{
    void *old;
    memcpy(&old, block, sizeof old);
    nir_release(old);
    void *grown = nir_allocate(count ? count : 1, size);
    memcpy(block, &grown, sizeof grown);
    return grown || nir_fail("nir_baseline", "no memory for %zu numbers", count);
}

static inline bool nir_baseline_valid(nir_grid grid, nir_grid reference, const nir_baseline_options *o)
{
    const char *const name = "nir_baseline_new";
    if (!(o->correlation > 0)) return nir_fail(name, "correlation %g mm, expected more than 0", o->correlation);
    if (!(o->spacing > 0 && o->spacing <= 1))
        return nir_fail(name, "spacing %g, expected more than 0 and up to 1", o->spacing);
    if (!(o->deviation > 0)) return nir_fail(name, "deviation %g, expected more than 0", o->deviation);
    if (!(o->noise > 0)) return nir_fail(name, "noise %g, expected more than 0", o->noise);
    if (!(o->floor > 0 && o->floor < 1)) return nir_fail(name, "floor %g, expected 0 to 1", o->floor);
    if (!(o->start[0] > 0 && o->start[1] > 0))
        return nir_fail(name, "the fit begins at mu_a %g and mu_s' %g, expected more than 0", o->start[0], o->start[1]);
    if (o->fit_steps < 1 || o->steps < 1)
        return nir_fail(name, "%d steps of the fit and %d of Gauss-Newton, expected 1 or more", o->fit_steps, o->steps);
    if (fabs(grid.n * grid.h - reference.n * reference.h) > 1e-6 * grid.n * grid.h)
        return nir_fail(name, "the grids are %g and %g mm wide, expected the same", grid.n * grid.h,
            reference.n * reference.h);
    return true;
}

/* Gaussians along one axis: nodes in the middle of blocks of node_step voxels. Where they are a standard deviation
   apart, the sum of g(x - node) g(x' - node) ripples by 2 exp(-pi^2) = 1e-4. */
static inline bool nir_baseline_nodes(nir_baseline *b)
{
    const nir_grid grid = b->image.ws->grid;
    const double sigma = b->options.correlation / grid.h;
    b->node_step = (int)fmin(fmax(floor(sigma * b->options.spacing + 1e-9), 1), 8);
    b->nodes = (grid.n + b->node_step - 1) / b->node_step;
    const size_t n = (size_t)grid.n, nodes = (size_t)b->nodes;
    if (!nir_grow(&b->used, nodes * nodes * nodes, sizeof(int)) ||
        !nir_grow(&b->share, nodes * nodes * nodes, sizeof(double)) ||
        !nir_grow(&b->weight, nodes * n, sizeof(float)) ||
        !nir_grow(&b->low, nodes, sizeof(int)) || !nir_grow(&b->high, nodes, sizeof(int)) ||
        !nir_grow(&b->norm, n * n * n, sizeof(double)) ||
        !nir_grow(&b->work, (n * n * n + n * n * nodes + n * nodes * nodes + nodes * nodes * nodes) * NIR_BLOCK,
            sizeof(float))) return false;
    for (int k = 0; k < b->nodes; ++k) {
        const double middle = (k + 0.5) * b->node_step - 0.5;
        b->low[k] = (int)fmax(ceil(middle - 4 * sigma), 0);
        b->high[k] = (int)fmin(floor(middle + 4 * sigma) + 1, grid.n);
        for (int i = b->low[k]; i < b->high[k]; ++i)
            b->weight[k * grid.n + i] = (float)exp(-0.5 * (i - middle) * (i - middle) / (sigma * sigma));
    }
    return true;
}

/* NULL `physics`, `options`: the defaults. */
static inline nir_baseline *nir_baseline_new(nir_grid grid, nir_grid reference, const nir_options *physics,
    const nir_baseline_options *options)
{
    const nir_baseline_options chosen = options ? *options : nir_baseline_defaults();
    nir_options model = physics ? *physics : nir_defaults();
    if (!nir_baseline_valid(grid, reference, &chosen)) return NULL;
    nir_baseline *b = (nir_baseline *)calloc(1, sizeof *b);
    if (!b) {
        nir_fail("nir_baseline_new", "no memory");
        return NULL;
    }
    b->options = chosen;
    model.fixed_source_depth = true;
    bool complete = nir_model_new(&b->image, grid, &model);
    if (complete && reference.n != grid.n) complete = nir_model_new(&b->fine, reference, &model);
    model.fixed_source_depth = false;
    const int half = grid.n >= 24 ? (grid.n + 1) / 2 : grid.n;
    if (complete) complete = nir_model_new(&b->small, (nir_grid){ half, grid.n * grid.h / half }, &model);
    if (complete && nir_baseline_nodes(b)) return b;
    nir_baseline_free(b);
    return NULL;
}

/* ---- homogeneous tissue -------------------------------------------------- */

static inline double nir_sigma(const nir_data *d, int p, int quantity)
{
    if (quantity == 0) return d->sigma_amplitude ? d->sigma_amplitude[p] : 0.01;
    return d->sigma_phase ? d->sigma_phase[p] : 0.5;
}

static inline bool nir_in_use(const nir_data *d, int p)
{
    const double a = nir_sigma(d, p, 0), f = nir_sigma(d, p, 1);
    return d->pair[2 * p] != NIR_NO_PAIR && a > 0 && f > 0 && isfinite(a) && isfinite(f);
}

static inline bool nir_model_shape(nir_model *m, const nir_ellipsoid *shape)
{
    const int n = m->ws->grid.n;
    for (int z = 0, i = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int x = 0; x < n; ++x, ++i) {
                const int voxel[3] = { x, y, z };
                double centre[3];
                nir_centre(m->ws->grid, voxel, centre);
                m->label[i] = nir_ellipsoid_level(shape, centre, NULL) < 0;
            }
    return nir_set_tissue(m->ws, shape, m->label);
}

static inline void nir_model_fill(nir_model *m, const double mu[2])
{
    const int n = m->ws->grid.n;
    for (int i = 0; i < n * n * n; ++i) {
        m->mu_a[i] = m->label[i] ? (float)mu[0] : 0;
        m->mu_s[i] = m->label[i] ? (float)mu[1] : 0;
    }
}

/* What the model's properties give: [ln A][pairs], [phase][pairs]. */
static inline bool nir_model_predict(nir_model *m, const nir_data *d, nir_keep keep, double *predicted)
{
    return nir_set_properties(m->ws, m->mu_a, m->mu_s) &&
        nir_set_optodes(m->ws, d->source, d->sources, d->detector, d->detectors) &&
        nir_forward(m->ws, d->pair, d->pairs, keep, predicted, predicted + d->pairs);
}

/* One step of Gauss-Newton for the logarithms of mu_a and mu_s' on the small grid, to the measurements less
   `correction`. Returns the larger of the two changes, or -1. `predicted` is that of before the step. */
static inline double nir_fit_step(nir_baseline *b, const nir_data *d, const double *correction, double mu[2],
    double *predicted)
{
    nir_model *m = &b->small;
    double *slope[2] = { b->measured + 8 * d->pairs, b->measured + 10 * d->pairs };
    double normal[3] = { 0 }, right[2] = { 0 }, change[2];
    nir_model_fill(m, mu);
    if (!nir_model_predict(m, d, NIR_KEEP_SOURCES, predicted)) return -1;
    const size_t columns = (size_t)m->ws->columns;
    for (int k = 0; k < 2; ++k) {
        for (size_t i = 0; i < 2 * columns; ++i) b->work[i] = i / columns == (size_t)k ? (float)mu[k] : 0;
        if (!nir_jacobian_times(m->ws, d->pair, d->pairs, b->work, slope[k])) return -1;
    }
    for (int p = 0; p < d->pairs; ++p)
        for (int q = 0; q < 2 && nir_in_use(d, p); ++q) {
            const double sigma = nir_sigma(d, p, q), *y = q ? d->phase : d->log_amplitude;
            const double u = slope[0][2 * p + q] / sigma, v = slope[1][2 * p + q] / sigma;
            const double r = (y[p] - predicted[q * d->pairs + p] - correction[q * d->pairs + p]) / sigma;
            normal[0] += u * u;
            normal[1] += u * v;
            normal[2] += v * v;
            right[0] += u * r;
            right[1] += v * r;
        }
    const double determinant = normal[0] * normal[2] - normal[1] * normal[1];
    if (!(determinant > 0)) {
        nir_fail("nir_baseline_fit",
            "the measurements do not determine mu_a and mu_s'; expected pairs at several distances");
        return -1;
    }
    change[0] = (normal[2] * right[0] - normal[1] * right[1]) / determinant;
    change[1] = (normal[0] * right[1] - normal[1] * right[0]) / determinant;
    static const double low[2] = { 1e-5, 0.05 }, high[2] = { 0.2, 10 };         /* mm^-1: no tissue is beyond these */
    for (int k = 0; k < 2; ++k) mu[k] = fmin(fmax(mu[k] * exp(fmin(fmax(change[k], -0.7), 0.7)), low[k]), high[k]);
    return fmax(fabs(change[0]), fabs(change[1]));
}

/* Fits on the small grid to the measurements less `correction`; leaves the prediction of the small grid. */
static inline bool nir_fit_small(nir_baseline *b, const nir_data *d, const double *correction, double mu[2],
    double *predicted)
{
    double change = 1;
    for (int step = 0; step < b->options.fit_steps && change > 1e-3; ++step)
        if ((change = nir_fit_step(b, d, correction, mu, predicted)) < 0) return false;
    nir_model_fill(&b->small, mu);
    return nir_model_predict(&b->small, d, NIR_KEEP_NOTHING, predicted);
}

static inline bool nir_baseline_begin(nir_baseline *b, const nir_data *d)
{
    int used = 0;
    if (d->pairs < 1 || !d->shape || !d->source || !d->detector || !d->pair || !d->log_amplitude || !d->phase)
        return nir_fail("nir_baseline",
            "the data are not complete: expected a shape, sources, detectors, pairs and measurements");
    for (int p = 0; p < d->pairs; ++p)
        if (nir_in_use(d, p)) {
            ++used;
            if (!isfinite(d->log_amplitude[p]) || !isfinite(d->phase[p]))
                return nir_fail("nir_baseline", "pair %d has ln A = %g and phase %g, expected finite numbers", p,
                    d->log_amplitude[p], d->phase[p]);
        }
    if (used < 2) return nir_fail("nir_baseline", "%d pairs are in use, expected 2 or more", used);
    if ((size_t)d->pairs > b->pair_capacity) {
        b->pair_capacity = 0;
        if (!nir_grow(&b->measured, 14 * (size_t)d->pairs, sizeof(double)) ||
            !nir_grow(&b->channel, 2 * (size_t)d->pairs, sizeof(int))) return false;
        b->pair_capacity = (size_t)d->pairs;
    }
    return nir_model_shape(&b->image, d->shape) && nir_model_shape(&b->small, d->shape) &&
        (!b->fine.ws || nir_model_shape(&b->fine, d->shape));
}

/* The error of the small grid, found on a finer one at the fit so far, corrects the measurements; then it is fitted
   again, as long as that changes mu. The grid to compare on comes last, and once. Leaves what homogeneous tissue gives
   there in `expected`, and the error of the images' grid, which is to be taken from the measurements, in `error`. */
static inline bool nir_fit(nir_baseline *b, const nir_data *d, double mu[2], double *expected, double *error)
{
    const int count = 2 * d->pairs;
    double *small = b->measured, *correction = b->measured + count, *image = b->measured + 2 * count;
    memset(correction, 0, (size_t)count * sizeof *correction);
    memset(error, 0, (size_t)count * sizeof *error);
    mu[0] = b->options.start[0];
    mu[1] = b->options.start[1];
    if (!nir_fit_small(b, d, correction, mu, small)) return false;
    for (int round = 0; round < 4; ++round) {
        const double before[2] = { mu[0], mu[1] };
        nir_model_fill(&b->image, mu);
        if (!nir_model_predict(&b->image, d, NIR_KEEP_NOTHING, image)) return false;
        for (int i = 0; i < count; ++i) correction[i] = image[i] - small[i];
        if (!nir_fit_small(b, d, correction, mu, small)) return false;
        if (fmax(fabs(log(mu[0] / before[0])), fabs(log(mu[1] / before[1]))) < 1e-2) break;
    }
    for (int i = 0; i < count; ++i) image[i] = small[i] + correction[i];
    if (b->fine.ws) {
        nir_model_fill(&b->fine, mu);
        if (!nir_model_predict(&b->fine, d, NIR_KEEP_NOTHING, expected)) return false;
        for (int i = 0; i < count; ++i) {
            error[i] = expected[i] - image[i];
            correction[i] += error[i];
        }
        if (!nir_fit_small(b, d, correction, mu, small)) return false;
    }
    for (int i = 0; i < count; ++i) expected[i] = small[i] + correction[i];
    return true;
}

/* mu_a and mu_s' of homogeneous tissue. */
static inline bool nir_baseline_fit(nir_baseline *b, const nir_data *d, double mu[2])
{
    return nir_baseline_begin(b, d) && nir_fit(b, d, mu, b->measured + 6 * d->pairs, b->measured + 12 * d->pairs);
}

/* ---- the prior ----------------------------------------------------------- */

/* volume = G nodes, without the norm: [z][y][x] from [Z][Y][X] with weights w along each axis, or their squares. */
static inline void nir_spread(const nir_baseline *b, const double *nodes, bool squares, double *volume, double *plane)
{
    const int n = b->image.ws->grid.n, m = b->nodes;
    memset(volume, 0, (size_t)n * (size_t)n * (size_t)n * sizeof *volume);
    for (int Z = 0; Z < m; ++Z) {
        memset(plane, 0, (size_t)n * (size_t)n * sizeof *plane);
        for (int Y = 0; Y < m; ++Y)
            for (int X = 0; X < m; ++X) {
                const double u = nodes[(Z * m + Y) * m + X];
                if (u == 0) continue;
                for (int y = b->low[Y]; y < b->high[Y]; ++y) {
                    const double v = (double)b->weight[Y * n + y], uv = u * (squares ? v * v : v);
                    for (int x = b->low[X]; x < b->high[X]; ++x) {
                        const double w = (double)b->weight[X * n + x];
                        plane[y * n + x] += uv * (squares ? w * w : w);
                    }
                }
            }
        for (int z = b->low[Z]; z < b->high[Z]; ++z) {
            const double w = (double)b->weight[Z * n + z], weight = squares ? w * w : w;
            for (int i = 0; i < n * n; ++i) volume[(size_t)z * (size_t)(n * n) + (size_t)i] += weight * plane[i];
        }
    }
}

/* A node stands for the Gaussians of all the voxels in its block: its variance is as the number of those that are
   tissue. Also the root of what the squares of each voxel's Gaussians sum to. */
static inline bool nir_prior(nir_baseline *b)
{
    const nir_level *l = &b->image.ws->level[0];
    const int n = l->n, m = b->nodes, step = b->node_step;
    const size_t voxels = (size_t)n * (size_t)n * (size_t)n, all = (size_t)m * (size_t)m * (size_t)m;
    double *nodes = (double *)nir_allocate(all + (size_t)n * (size_t)n, sizeof *nodes);
    if (!nodes) return nir_fail("nir_baseline_reconstruct", "no memory");
    for (int z = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int x = 0; x < n; ++x)
                if (nir_is_tissue(l, x, y, z))
                    nodes[(z / step * m + y / step) * m + x / step] += 1.0 / (step * step * step);
    b->use = 0;
    for (size_t i = 0; i < all; ++i) {
        b->used[i] = nodes[i] > 0 ? b->use++ : -1;
        b->share[i] = sqrt(nodes[i]);
    }
    nir_spread(b, nodes, true, b->norm, nodes + all);
    for (size_t i = 0; i < voxels; ++i) b->norm[i] = b->norm[i] > 0 ? sqrt(b->norm[i]) : 1;
    nir_release(nodes);
    return true;
}

/* ---- kernels: eight rows of J side by side ------------------------------- */

#if defined(__GNUC__)
typedef float nir_eight __attribute__((vector_size(32), aligned(32)));
#define NIR_INLINE static inline __attribute__((always_inline))
#else
typedef struct { float lane[8]; } nir_eight;
#define NIR_INLINE static inline
#endif

/* sum += w * v */
#if defined(__GNUC__)
#define NIR_ADD_SCALED(sum, w, v) ((sum) += (w) * (v))
#else
#define NIR_ADD_SCALED(sum, w, v) do { for (int k_ = 0; k_ < 8; ++k_) (sum).lane[k_] += (w) * (v).lane[k_]; } while (0)
#endif

/* Along one axis: out[i][X][j] = sum over x of weight[X][x] in[i][x][j]. Where `start` says that a row is air both are
   zero. */
NIR_INLINE void nir_gather(const nir_baseline *b, const nir_eight *in, nir_eight *out, int outer, int inner,
    const int *start)
{
    const int n = b->image.ws->grid.n, m = b->nodes;
    for (int i = 0; i < outer; ++i)
        for (int X = 0; X < m && !(start && start[i] == INT_MIN); ++X)
            for (int j = 0; j < inner; ++j) {
                const nir_eight *from = in + (size_t)i * (size_t)(n * inner) + j;
                nir_eight sum;
                memset(&sum, 0, sizeof sum);
                for (int x = b->low[X]; x < b->high[X]; ++x) NIR_ADD_SCALED(sum, b->weight[X * n + x], from[x * inner]);
                out[((size_t)i * (size_t)m + (size_t)X) * (size_t)inner + (size_t)j] = sum;
            }
}

/* The used nodes of G^T applied to the volume at the head of `work`. */
NIR_INLINE void nir_gather_nodes(const nir_baseline *b, nir_eight *out)
{
    const int n = b->image.ws->grid.n, m = b->nodes;
    nir_eight *volume = (nir_eight *)(void *)b->work, *first = volume + n * n * n, *second = first + n * n * m;
    nir_eight *third = second + n * m * m;
    nir_gather(b, volume, first, n * n, 1, b->image.ws->level[0].start);        /* [z][y][X] */
    nir_gather(b, first, second, n, m, NULL);                                   /* [z][Y][X] */
    nir_gather(b, second, third, 1, m * m, NULL);                               /* [Z][Y][X] */
    for (int i = 0; i < m * m * m; ++i)
        if (b->used[i] >= 0) {
            const float share = (float)b->share[i];
            memset(&out[b->used[i]], 0, sizeof *out);
            NIR_ADD_SCALED(out[b->used[i]], share, third[i]);
        }
}

/* A tile of B B^T, in double after every 256 columns. */
NIR_INLINE void nir_tile(const float *left, const nir_eight *right, int columns, double tile[8][8])
{
    for (int begin = 0; begin < columns; begin += 256) {
        const int end = begin + 256 < columns ? begin + 256 : columns;
        nir_eight sum[8];
        float lanes[8][8];
        memset(sum, 0, sizeof sum);
        for (int c = begin; c < end; ++c) {
            const nir_eight v = right[c];
            const float *a = left + 8 * c;
            NIR_ADD_SCALED(sum[0], a[0], v);
            NIR_ADD_SCALED(sum[1], a[1], v);
            NIR_ADD_SCALED(sum[2], a[2], v);
            NIR_ADD_SCALED(sum[3], a[3], v);
            NIR_ADD_SCALED(sum[4], a[4], v);
            NIR_ADD_SCALED(sum[5], a[5], v);
            NIR_ADD_SCALED(sum[6], a[6], v);
            NIR_ADD_SCALED(sum[7], a[7], v);
        }
        memcpy(lanes, sum, sizeof lanes);
        for (int i = 0; i < 8; ++i)
            for (int k = 0; k < 8; ++k) tile[i][k] += (double)lanes[i][k];
    }
}

typedef struct {
    void (*gather_nodes)(const nir_baseline *b, nir_eight *out);
    void (*tile)(const float *left, const nir_eight *right, int columns, double tile[8][8]);
} nir_kernels;

static inline void nir_gather_nodes_plain(const nir_baseline *b, nir_eight *out) { nir_gather_nodes(b, out); }
static inline void nir_tile_plain(const float *left, const nir_eight *right, int columns, double tile[8][8])
{
    nir_tile(left, right, columns, tile);
}

#if defined(__GNUC__) && defined(__x86_64__)
__attribute__((target("avx2"))) static inline void nir_gather_nodes_avx2(const nir_baseline *b, nir_eight *out)
{
    nir_gather_nodes(b, out);
}

__attribute__((target("avx2"))) static inline void nir_tile_avx2(const float *left, const nir_eight *right, int columns,
    double tile[8][8])
{
    nir_tile(left, right, columns, tile);
}
#endif

static inline nir_kernels nir_choose_kernels(void)
{
#if defined(__GNUC__) && defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return (nir_kernels){ nir_gather_nodes_avx2, nir_tile_avx2 };
#endif
    return (nir_kernels){ nir_gather_nodes_plain, nir_tile_plain };
}

/* ---- a step of Gauss-Newton ---------------------------------------------- */

/* Lists the rows: ln A and phase of every pair in use; returns how many. */
static inline int nir_list_channels(nir_baseline *b, const nir_data *d)
{
    int rows = 0;
    for (int p = 0; p < d->pairs; ++p)
        for (int q = 0; q < 2 && nir_in_use(d, p); ++q) b->channel[rows++] = 2 * p + q;
    return rows;
}

static inline bool nir_reserve_step(nir_baseline *b, int rows)
{
    const size_t padded = (size_t)(rows + NIR_BLOCK - 1) / NIR_BLOCK * NIR_BLOCK, n = (size_t)b->image.ws->grid.n;
    const size_t columns = n * n * n;
    if (padded > b->row_capacity || (size_t)b->use > b->use_capacity) {
        b->row_capacity = b->use_capacity = 0;
        if (!nir_grow(&b->rows, NIR_BLOCK * 2 * columns, sizeof(float)) ||
            !nir_grow(&b->factor, padded * 2 * (size_t)b->use, sizeof(float)) ||
            !nir_grow(&b->K, padded * padded, sizeof(double)) || !nir_grow(&b->y, padded, sizeof(double)) ||
            !nir_grow(&b->x, 3 * columns + 2 * (size_t)(b->nodes * b->nodes * b->nodes), sizeof(double))) return false;
        b->row_capacity = padded;
        b->use_capacity = (size_t)b->use;
    }
    return true;
}

/* B = J G for eight rows, whitened and by relative changes of mu_0; adds J x to y. */
static inline void nir_factor_block(nir_baseline *b, const nir_data *d, const double mu[2], int block, int rows,
    nir_kernels kernels)
{
    nir_workspace *ws = b->image.ws;
    const size_t columns = (size_t)ws->columns, voxels = (size_t)ws->grid.n * (size_t)ws->grid.n * (size_t)ws->grid.n;
    float scale[NIR_BLOCK] = { 0 };
    for (int k = 0; k < NIR_BLOCK && block * NIR_BLOCK + k < rows; ++k) {
        const int channel = b->channel[block * NIR_BLOCK + k];
        if (channel % 2 == 0) nir_jacobian_rows(ws, d->pair, channel / 2, b->rows + (size_t)k * 2 * columns);
        scale[k] = (float)(1 / nir_sigma(d, channel / 2, channel % 2));
    }
    for (size_t part = 0; part < 2; ++part) {
        for (size_t c = 0; c < columns; ++c) {
            const size_t voxel = (size_t)ws->voxel[c];
            const float weight = (float)(mu[part] / b->norm[voxel]);
            float *to = b->work + voxel * NIR_BLOCK;
            const float *from = b->rows + part * columns + c;
            for (size_t k = 0; k < NIR_BLOCK; ++k) to[k] = scale[k] * weight * from[k * 2 * columns];
            const double x = b->x[part * voxels + voxel];
            if (x != 0)
                for (size_t k = 0; k < NIR_BLOCK; ++k)
                    b->y[(size_t)block * NIR_BLOCK + k] += x * mu[part] * (double)(scale[k] * from[k * 2 * columns]);
        }
        kernels.gather_nodes(b, (nir_eight *)(void *)b->factor + ((size_t)block * 2 + part) * (size_t)b->use);
    }
}

/* K = L L^T in its lower half, rows of `stride`; then y = K^-1 y. */
static inline bool nir_cholesky(double *K, size_t stride, int size, double *y)
{
    for (int i = 0; i < size; ++i) {
        double *row = K + (size_t)i * stride;
        for (int j = 0; j <= i; ++j) {
            const double *other = K + (size_t)j * stride;
            double sum[4] = { 0 };
            int k = 0;
            for (; k + 4 <= j; k += 4)
                for (int t = 0; t < 4; ++t) sum[t] += row[k + t] * other[k + t];
            for (; k < j; ++k) sum[0] += row[k] * other[k];
            const double rest = row[j] - ((sum[0] + sum[1]) + (sum[2] + sum[3]));
            if (j < i) row[j] = rest / other[j];
            else if (rest > 0) row[j] = sqrt(rest);
            else return false;
        }
    }
    for (int i = 0; i < size; ++i) {
        for (int k = 0; k < i; ++k) y[i] -= K[(size_t)i * stride + (size_t)k] * y[k];
        y[i] /= K[(size_t)i * stride + (size_t)i];
    }
    for (int i = size - 1; i >= 0; --i) {
        y[i] /= K[(size_t)i * stride + (size_t)i];
        for (int k = 0; k < i; ++k) y[k] -= K[(size_t)i * stride + (size_t)k] * y[i];
    }
    return true;
}

/* x = C J^T (J C J^T + noise I)^-1 y. */
static inline bool nir_step_solve(nir_baseline *b, int rows, nir_kernels kernels)
{
    const int blocks = (rows + NIR_BLOCK - 1) / NIR_BLOCK, all = b->nodes * b->nodes * b->nodes;
    const size_t padded = (size_t)blocks * NIR_BLOCK, length = 2 * (size_t)b->use, n = (size_t)b->image.ws->grid.n;
    const size_t voxels = n * n * n;
    const double variance = b->options.deviation * b->options.deviation;
    double *nodes = b->x + 2 * voxels, *plane = nodes + 2 * all;
    for (int i = 0; i < blocks; ++i)
        for (int j = 0; j <= i; ++j) {
            double tile[8][8] = { { 0 } };
            kernels.tile(b->factor + (size_t)i * length * NIR_BLOCK,
                (const nir_eight *)(const void *)b->factor + (size_t)j * length, (int)length, tile);
            for (size_t r = 0; r < 8; ++r)
                for (size_t c = 0; c < 8; ++c)
                    b->K[((size_t)i * 8 + r) * padded + (size_t)j * 8 + c] = variance * tile[r][c];
        }
    for (size_t i = 0; i < padded; ++i) b->K[i * padded + i] += b->options.noise;
    if (!nir_cholesky(b->K, padded, rows, b->y))
        return nir_fail("nir_baseline_reconstruct", "J C J^T is not finite; expected fields of ordinary tissue");
    memset(nodes, 0, 2 * (size_t)all * sizeof *nodes);
    for (int part = 0; part < 2; ++part)
        for (int i = 0; i < all; ++i) {
            if (b->used[i] < 0) continue;
            double sum = 0;
            for (int r = 0; r < rows; ++r)
                sum += b->y[r] * (double)b->factor[(((size_t)(r / 8) * 2 + (size_t)part) * (size_t)b->use +
                    (size_t)b->used[i]) * 8 + (size_t)(r % 8)];
            nodes[part * all + i] = variance * b->share[i] * sum;
        }
    for (int part = 0; part < 2; ++part) {
        double *x = b->x + (size_t)part * voxels;
        nir_spread(b, nodes + part * all, false, x, plane);
        for (size_t i = 0; i < voxels; ++i) x[i] = b->image.label[i] ? x[i] / b->norm[i] : 0;
    }
    return true;
}

static inline bool nir_gauss_newton(nir_baseline *b, const nir_data *d, const double mu[2], const double *offset,
    const double *predicted)
{
    const nir_kernels kernels = nir_choose_kernels();
    const int rows = nir_list_channels(b, d), blocks = (rows + NIR_BLOCK - 1) / NIR_BLOCK;
    if (!nir_reserve_step(b, rows)) return false;
    nir_prepare_derivatives(b->image.ws);
    const size_t n = (size_t)b->image.ws->grid.n;
    /* Air stays zero in all blocks. */
    memset(b->work, 0, n * n * (n + (size_t)b->nodes) * NIR_BLOCK * sizeof *b->work);
    memset(b->y, 0, (size_t)blocks * NIR_BLOCK * sizeof *b->y);
    for (int i = 0; i < blocks; ++i) nir_factor_block(b, d, mu, i, rows, kernels);
    for (int r = 0; r < rows; ++r) {
        const int p = b->channel[r] / 2, q = b->channel[r] % 2;
        const double y = q ? d->phase[p] : d->log_amplitude[p];
        b->y[r] += (y - predicted[q * d->pairs + p] - offset[q * d->pairs + p]) / nir_sigma(d, p, q);
    }
    return nir_step_solve(b, rows, kernels);
}

/* The background by nir_baseline_fit, then options.steps steps; mu_a, mu_s' [n^3] of the first grid, 0 in air. */
static inline bool nir_baseline_reconstruct(nir_baseline *b, const nir_data *d, double background[2], float *mu_a,
    float *mu_s)
{
    if (!nir_baseline_fit(b, d, background) || !nir_prior(b) || !nir_reserve_step(b, 2 * d->pairs)) return false;
    nir_model *m = &b->image;
    const size_t voxels = (size_t)m->ws->grid.n * (size_t)m->ws->grid.n * (size_t)m->ws->grid.n;
    const int count = 2 * d->pairs;
    double *predicted = b->measured, *offset = b->measured + count, *expected = b->measured + 3 * count;
    memset(b->x, 0, 2 * voxels * sizeof *b->x);
    nir_model_fill(m, background);
    for (int step = 0; step < b->options.steps; ++step) {
        if (!nir_model_predict(m, d, NIR_KEEP_ALL, predicted)) return false;
        for (int i = 0; i < count && step == 0; ++i) offset[i] = expected[i] - predicted[i];
        if (!nir_gauss_newton(b, d, background, offset, predicted)) return false;
        for (size_t i = 0; i < voxels; ++i) {
            if (!m->label[i]) continue;
            m->mu_a[i] = (float)(background[0] * fmax(1 + b->x[i], b->options.floor));
            m->mu_s[i] = (float)(background[1] * fmax(1 + b->x[voxels + i], b->options.floor));
        }
    }
    memcpy(mu_a, m->mu_a, voxels * sizeof *mu_a);
    memcpy(mu_s, m->mu_s, voxels * sizeof *mu_s);
    return true;
}

#endif /* NIRDOT_BASELINE_H */
