/*
 * nirdot_metrics.h - how good a reconstructed volume is: errors, structural
 * similarity, lesions found and missed, and statistics over phantoms.
 *
 *     nir_metric_options o = nir_metric_defaults(n);
 *     nir_case of = { n, h, label, truth, ellipsoid, NULL };
 *     nir_metrics m;
 *     nir_metrics_compute(&of, image, &o, &m);
 *     m.score[0][NIR_RMSE];    (channel 0: mu_a, 1: mu_s')
 *
 * Volumes are [n^3][2], channels-last, [z][y][x], in mm^-1. T is the tissue
 * (label > 0), U the tumours (label > 1), B = T without U; x the image, y the
 * truth. Every number is of one phantom and one channel; averages are taken
 * over phantoms afterwards. A number that does not exist (the contrast of a
 * phantom without tumours) is NAN, and left out of averages.
 *
 * Needs libc and libm.
 */
#ifndef NIRDOT_METRICS_H
#define NIRDOT_METRICS_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)       /* a program need not use all of it */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

/* ---- what a program uses: one phantom ----------------------------------- */

/* The scores. b = median_T(x) and D = { T: x - b > 1/2 max_T(x - b) } use the image alone. */
typedef enum {
    NIR_RMSE,               /* sqrt(mean_T (x - y)^2), mm^-1 */
    NIR_NRMSE,              /* RMSE / mean_T(y) */
    NIR_RMSE_ALL,           /* over all voxels, the air included, mm^-1 */
    NIR_PSNR,               /* 20 log10(L / RMSE_ALL), dB; INFINITY for the truth */
    NIR_SSIM,               /* Wang et al. 2004 in 3-D, mean over the map without its border */
    NIR_SSIM_TISSUE,        /* mean over the map in T */
    NIR_DICE,               /* of D and U; 1 where both are empty */
    NIR_CONTRAST,           /* (mean_U x - mean_B x) / (mean_U y - mean_B y) */
    NIR_CONTRAST_PEAK,      /* max_T(x - b) / max_T(y - mean_B y) */
    NIR_CNR,                /* (mean_U x - mean_B x) / sqrt(w var_U x + (1 - w) var_B x), w = |U|/|T| (Song 2004) */
    NIR_LOCALISATION,       /* mean distance of matched components and tumours, mm */
    NIR_NEAREST,            /* from the centroid of all of D to the nearest tumour's, mm: generous with several */
    NIR_VOLUME_RATIO,       /* |D| / |U|; the ratio of widths at half maximum is its cube root */
    NIR_DETECTION,          /* share of tumours that are matched */
    NIR_FALSE_POSITIVES,    /* components of D that are matched to none */
    NIR_RMSE_INSIDE,        /* RMSE in the part of T that the measurement sees, and in the rest */
    NIR_RMSE_OUTSIDE,
    NIR_SCORES
} nir_score;

typedef struct { const char *name, *unit; int better; } nir_score_row;  /* better: 1 greater, -1 less, 0 close to 1 */
static const nir_score_row nir_score_table[NIR_SCORES] = {
    { "rmse", "mm^-1", -1 }, { "nrmse", "", -1 }, { "rmse_all", "mm^-1", -1 }, { "psnr", "dB", 1 }, { "ssim", "", 1 },
    { "ssim_tissue", "", 1 }, { "dice", "", 1 }, { "contrast_recovery", "", 0 }, { "peak_contrast_recovery", "", 0 },
    { "cnr", "", 1 }, { "localisation_error", "mm", -1 }, { "nearest_tumour", "mm", -1 }, { "volume_ratio", "", 0 },
    { "detection_rate", "", 1 }, { "false_positives", "", -1 }, { "rmse_inside", "mm^-1", -1 },
    { "rmse_outside", "mm^-1", -1 },
};

/* What is known of a phantom. */
typedef struct {
    int n;
    double h;                   /* mm */
    const uint8_t *label;       /* [n^3]: 0 air, 1 tissue, 2 to 6 tumours */
    const float *truth;         /* [n^3][2] */
    const float *ellipsoid;     /* [15]: centre, semi-axes, rotation of the tissue; NULL: no depths */
    const float *sensitivity;   /* [n^3]: sum of |J| over the measurements; NULL: no NIR_RMSE_INSIDE and _OUTSIDE */
} nir_case;

typedef struct {
    double range[2];            /* L of PSNR and SSIM: 0.0245 and 2.95 mm^-1, the largest of the original generator */
    double sigma;               /* of SSIM's Gaussian window, voxels: 1.5; 1 for n <= 16 */
    int radius;                 /* of that window: 5; 3 for n <= 16 */
    double threshold;           /* of D, 1/2 */
    double least_contrast;      /* D is empty unless max_T(x - b) is above this times |b|: 1e-6, for rounding errors */
    double reach;               /* no match where the centroids are farther apart than this, 10 mm */
    double seen;                /* of the largest sensitivity, 0.01 */
} nir_metric_options;

static nir_metric_options nir_metric_defaults(int n);

/* A tumour and what became of it in each channel. A component of D (26 neighbours) may be matched to a tumour with
   which it shares a voxel, within reach. Of all one-to-one matchings the one with most pairs counts, and among those
   the one with the least sum of distances. A component's centroid is weighted by x - b. */
typedef struct {
    int label;
    double volume, centroid[3], depth;      /* mm^3; mm; mm from the centroid to the surface */
    int seen;                               /* 1: its centroid is where the sensitivity is, 0: is not, -1: unknown */
    bool detected[2];
    double error[2];                        /* distance of the centroids, mm; NAN when missed */
    double contrast[2];                     /* contrast recovery of this tumour alone */
} nir_lesion;

enum { NIR_LESIONS = 5 };
typedef struct {
    double score[2][NIR_SCORES];
    nir_lesion lesion[NIR_LESIONS];
    int lesions;
} nir_metrics;

/* false: memory is short, or n is below the SSIM window's width. */
static bool nir_metrics_compute(const nir_case *of, const float *image, const nir_metric_options *o, nir_metrics *m);

/* Skill: 1 - RMSE / RMSE of the homogeneous fit. */
static double nir_skill(double rmse, double rmse_homogeneous) { return 1 - rmse / rmse_homogeneous; }

/* The numbers of the original program's documents: both channels and all voxels in one RMSE, L = 1 mm^-1, SSIM with
   zeros around and no border left out. An empty image has SSIM 0.7 there: not for comparing methods. */
typedef struct { double rmse, psnr, ssim; } nir_seed_scores;
static bool nir_seed_compatible(const nir_case *of, const float *image, nir_seed_scores *s);

/* For a phantom whose tumours differ from the tissue in one channel only: the relative contrast that the image shows
   in the other channel over that in this one. */
static double nir_crosstalk(const nir_case *of, const float *image, int channel);

/* Of two latent vectors, sqrt(mean (a - b)^2) and their cosine; of shares that sum to 1 (attention), -sum p ln p in
   nats: ln n where all are equal, 0 where one has all. */
static double nir_latent_rmse(const float *a, const float *b, int64_t n);
static double nir_latent_cosine(const float *a, const float *b, int64_t n);
static double nir_attention_entropy(const double *p, int64_t n);

/* ---- what a program uses: many phantoms --------------------------------- */

typedef struct { int64_t count; double mean, sd, median; } nir_summary;     /* sd with count - 1 */
static nir_summary nir_summarise(const double *value, int64_t count);       /* NANs left out */
static nir_summary nir_summarise_score(const nir_metrics *m, int64_t count, int channel, nir_score score);
/* The components found in phantoms that have no tumour. */
static nir_summary nir_summarise_tumour_free(const nir_metrics *m, int64_t count, int channel);

/* Tumours in groups, by depth of the centroid and by sensitivity. */
enum { NIR_ALL_LESIONS, NIR_SHALLOW, NIR_MIDDLE, NIR_DEEP, NIR_SEEN, NIR_UNSEEN, NIR_GROUPS };
static const char *const nir_group_names[NIR_GROUPS] = {
    "all", "depth < 15 mm", "depth 15-25 mm", "depth > 25 mm", "inside sensitivity", "outside sensitivity" };
typedef struct { int64_t lesions; double detection; nir_summary error, contrast; } nir_lesion_group;
/* false: memory is short */
static bool nir_lesion_groups(const nir_metrics *m, int64_t count, int channel, nir_lesion_group group[NIR_GROUPS]);

/* mean(a - b) over phantoms with its percentile interval: the phantoms are drawn anew, with replacement, `resamples`
   times. Pairs with a NAN are left out. The same numbers give the same interval. false: no pairs, or no memory. */
typedef struct { int64_t count; double difference, low, high; } nir_interval;
static bool nir_paired_bootstrap(const double *a, const double *b, int64_t count, int resamples, double level,
                                 uint64_t seed, nir_interval *out);

/* ---- options ------------------------------------------------------------ */

static nir_metric_options nir_metric_defaults(int n)
{
    nir_metric_options o = { { 0.0245, 2.95 }, n > 16 ? 1.5 : 1, n > 16 ? 5 : 3, 0.5, 1e-6, 10, 0.01 };
    return o;
}

static int64_t nir_metric_voxels(const nir_case *of) { return (int64_t)of->n * of->n * of->n; }

/* ---- errors ------------------------------------------------------------- */

/* Sums over a set of voxels. */
typedef struct { int64_t count; double squares, x, xx, y; } nir_metric_sums;

static void nir_metric_add(nir_metric_sums *s, double x, double y)
{
    ++s->count;
    s->squares += (x - y) * (x - y);
    s->x += x;
    s->xx += x * x;
    s->y += y;
}

static double nir_metric_rms(const nir_metric_sums *s) { return sqrt(s->squares / (double)s->count); }

/* The sums of one channel over all voxels with low <= label <= high. */
static nir_metric_sums nir_metric_sum(const nir_case *of, const float *image, int channel, int low, int high)
{
    nir_metric_sums s = { 0, 0, 0, 0, 0 };
    const int64_t voxels = nir_metric_voxels(of);
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i] >= low && of->label[i] <= high)
            nir_metric_add(&s, (double)image[2 * i + channel], (double)of->truth[2 * i + channel]);
    return s;
}

static double nir_metric_psnr(double rmse, double range) { return 20 * log10(range / rmse); }

static void nir_metric_errors(const nir_case *of, const float *image, int c, const nir_metric_options *o, double *score)
{
    const nir_metric_sums all = nir_metric_sum(of, image, c, 0, 255), tissue = nir_metric_sum(of, image, c, 1, 255);
    score[NIR_RMSE] = nir_metric_rms(&tissue);
    score[NIR_NRMSE] = score[NIR_RMSE] / (tissue.y / (double)tissue.count);
    score[NIR_RMSE_ALL] = nir_metric_rms(&all);
    score[NIR_PSNR] = nir_metric_psnr(score[NIR_RMSE_ALL], o->range[c]);
}

/* The largest sensitivity in the tissue times the share that counts as seen. */
static double nir_metric_least_seen(const nir_case *of, const nir_metric_options *o)
{
    const int64_t voxels = nir_metric_voxels(of);
    double most = 0;
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i]) most = fmax(most, (double)of->sensitivity[i]);
    return o->seen * most;
}

static void nir_metric_by_sensitivity(const nir_case *of, const float *image, int c, const nir_metric_options *o,
                                      double *score)
{
    nir_metric_sums part[2] = { { 0, 0, 0, 0, 0 }, { 0, 0, 0, 0, 0 } };
    const int64_t voxels = nir_metric_voxels(of);
    if (!of->sensitivity) return;
    const double least = nir_metric_least_seen(of, o);
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i])
            nir_metric_add(&part[(double)of->sensitivity[i] > least], (double)image[2 * i + c],
                           (double)of->truth[2 * i + c]);
    if (part[1].count) score[NIR_RMSE_INSIDE] = nir_metric_rms(&part[1]);
    if (part[0].count) score[NIR_RMSE_OUTSIDE] = nir_metric_rms(&part[0]);
}

/* ---- structural similarity ---------------------------------------------- */

/* What lies beyond the volume: its mirror image (d c b a | a b c d | d c b a), or zeros. */
typedef enum { NIR_MIRROR, NIR_ZEROS } nir_border;

enum { NIR_RADIUS_MOST = 15 };
typedef struct {
    int n, radius;
    nir_border border;
    double weight[2 * NIR_RADIUS_MOST + 1];
    double *line;               /* n + 2 radius */
} nir_window;

static void nir_window_set(nir_window *w, int n, double sigma, int radius, nir_border border)
{
    double sum = 0;
    w->n = n;
    w->radius = radius;
    w->border = border;
    for (int k = -radius; k <= radius; ++k) sum += w->weight[k + radius] = exp(-0.5 * k * k / (sigma * sigma));
    for (int k = 0; k <= 2 * radius; ++k) w->weight[k] /= sum;
}

/* One line of n values, `stride` apart, in place. */
static void nir_window_line(const nir_window *w, double *value, int64_t stride)
{
    const int n = w->n, r = w->radius;
    for (int i = -r; i < n + r; ++i) {
        const int mirrored = i < 0 ? -1 - i : i >= n ? 2 * n - 1 - i : i;
        w->line[i + r] = mirrored == i || w->border == NIR_MIRROR ? value[mirrored * stride] : 0;
    }
    for (int i = 0; i < n; ++i) {
        double sum = 0;
        for (int k = 0; k <= 2 * r; ++k) sum += w->weight[k] * w->line[i + k];
        value[i * stride] = sum;
    }
}

/* A volume along z, y and x. */
static void nir_window_apply(const nir_window *w, double *value)
{
    const int64_t n = w->n, stride[3] = { n * n, n, 1 };
    for (int axis = 0; axis < 3; ++axis) {
        const int64_t s = stride[(axis + 1) % 3], t = stride[(axis + 2) % 3];
        for (int64_t i = 0; i < n; ++i)
            for (int64_t k = 0; k < n; ++k) nir_window_line(w, value + i * s + k * t, stride[axis]);
    }
}

enum { NIR_MOMENTS = 5 };       /* means of x, y, x^2, y^2, xy in the window */

/* SSIM at every voxel with K1 = 0.01, K2 = 0.03 and population covariances, into moment[0]. */
static void nir_ssim_map(const nir_window *w, const float *x, const float *y, int c, double range,
                         double *moment[NIR_MOMENTS])
{
    const int64_t voxels = (int64_t)w->n * w->n * w->n;
    const double c1 = 0.01 * range * (0.01 * range), c2 = 0.03 * range * (0.03 * range);
    for (int64_t i = 0; i < voxels; ++i) {
        const double a = (double)x[2 * i + c], b = (double)y[2 * i + c];
        const double term[NIR_MOMENTS] = { a, b, a * a, b * b, a * b };
        for (int k = 0; k < NIR_MOMENTS; ++k) moment[k][i] = term[k];
    }
    for (int k = 0; k < NIR_MOMENTS; ++k) nir_window_apply(w, moment[k]);
    for (int64_t i = 0; i < voxels; ++i) {
        const double a = moment[0][i], b = moment[1][i];
        const double va = moment[2][i] - a * a, vb = moment[3][i] - b * b, vab = moment[4][i] - a * b;
        moment[0][i] = (2 * a * b + c1) * (2 * vab + c2) / ((a * a + b * b + c1) * (va + vb + c2));
    }
}

/* Mean of the map without `crop` voxels at each side; of the voxels with labels from `low` on. */
static double nir_ssim_mean(const nir_case *of, const double *map, int crop, int low)
{
    double sum = 0;
    int64_t count = 0;
    const int n = of->n;
    for (int z = crop; z < n - crop; ++z)
        for (int y = crop; y < n - crop; ++y)
            for (int x = crop; x < n - crop; ++x) {
                const int64_t i = ((int64_t)z * n + y) * n + x;
                if (of->label[i] < low) continue;
                sum += map[i];
                ++count;
            }
    return sum / (double)count;
}

/* The volumes of a map in one block, to be freed at moment[0]; false when memory is short. */
static bool nir_ssim_room(nir_window *w, double *moment[NIR_MOMENTS])
{
    const size_t voxels = (size_t)w->n * (size_t)w->n * (size_t)w->n;
    double *block = (double *)malloc((NIR_MOMENTS * voxels + (size_t)(w->n + 2 * w->radius)) * sizeof *block);
    if (!block) return false;
    for (int k = 0; k < NIR_MOMENTS; ++k) moment[k] = block + (size_t)k * voxels;
    w->line = block + NIR_MOMENTS * voxels;
    return true;
}

static bool nir_metric_ssim(const nir_case *of, const float *image, const nir_metric_options *o, nir_metrics *m)
{
    nir_window w;
    double *moment[NIR_MOMENTS];
    if (o->radius < 0 || o->radius > NIR_RADIUS_MOST || of->n < 2 * o->radius + 1 || !(o->sigma > 0)) return false;
    nir_window_set(&w, of->n, o->sigma, o->radius, NIR_MIRROR);
    if (!nir_ssim_room(&w, moment)) return false;
    for (int c = 0; c < 2; ++c) {
        nir_ssim_map(&w, image, of->truth, c, o->range[c], moment);
        m->score[c][NIR_SSIM] = nir_ssim_mean(of, moment[0], o->radius, 0);
        m->score[c][NIR_SSIM_TISSUE] = nir_ssim_mean(of, moment[0], 0, 1);
    }
    free(moment[0]);
    return true;
}

static bool nir_seed_compatible(const nir_case *of, const float *image, nir_seed_scores *s)
{
    nir_window w;
    double *moment[NIR_MOMENTS];
    nir_metric_sums all[2];
    s->rmse = s->psnr = s->ssim = NAN;
    nir_window_set(&w, of->n, 1.5, 5, NIR_ZEROS);
    if (of->n < 11 || !nir_ssim_room(&w, moment)) return false;
    s->ssim = 0;
    for (int c = 0; c < 2; ++c) {
        all[c] = nir_metric_sum(of, image, c, 0, 255);
        nir_ssim_map(&w, image, of->truth, c, 1, moment);
        s->ssim += nir_ssim_mean(of, moment[0], 0, 0) / 2;
    }
    s->rmse = sqrt((all[0].squares + all[1].squares) / (2 * (double)all[0].count));
    s->psnr = nir_metric_psnr(s->rmse, 1);
    free(moment[0]);
    return true;
}

/* ---- contrast ----------------------------------------------------------- */

static void nir_metric_contrast(const nir_case *of, const float *image, int c, double *score)
{
    const nir_metric_sums u = nir_metric_sum(of, image, c, 2, 255), b = nir_metric_sum(of, image, c, 1, 1);
    const double nu = (double)u.count, nb = (double)b.count;
    if (!u.count || !b.count) return;
    const double found = u.x / nu - b.x / nb, variance_u = fmax(u.xx / nu - u.x / nu * (u.x / nu), 0);
    const double variance_b = fmax(b.xx / nb - b.x / nb * (b.x / nb), 0), w = nu / (nu + nb);
    score[NIR_CONTRAST] = found / (u.y / nu - b.y / nb);
    score[NIR_CNR] = found == 0 ? 0 : found / sqrt(w * variance_u + (1 - w) * variance_b);
}

static double nir_crosstalk(const nir_case *of, const float *image, int channel)
{
    double relative[2];
    for (int c = 0; c < 2; ++c) {
        const nir_metric_sums u = nir_metric_sum(of, image, c, 2, 255), b = nir_metric_sum(of, image, c, 1, 1);
        relative[c] = u.x / (double)u.count / (b.x / (double)b.count) - 1;
    }
    return relative[1 - channel] / relative[channel];
}

/* ---- latents and attention ---------------------------------------------- */

static double nir_latent_rmse(const float *a, const float *b, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += ((double)a[i] - (double)b[i]) * ((double)a[i] - (double)b[i]);
    return sqrt(sum / (double)n);
}

static double nir_latent_cosine(const float *a, const float *b, int64_t n)
{
    double aa = 0, bb = 0, ab = 0;
    for (int64_t i = 0; i < n; ++i) {
        aa += (double)a[i] * (double)a[i];
        bb += (double)b[i] * (double)b[i];
        ab += (double)a[i] * (double)b[i];
    }
    return ab / sqrt(aa * bb);
}

static double nir_attention_entropy(const double *p, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum -= p[i] > 0 ? p[i] * log(p[i]) : 0;
    return sum;
}

/* ---- lesions: what is there --------------------------------------------- */

/* The least distance from a point inside the ellipsoid to its surface; of a point outside, negative. With the point at
   (u_k) in the body's frame, the nearest surface point is a_k^2 u_k / (t + a_k^2), where t is the largest root of
   sum (a_k u_k / (t + a_k^2))^2 = 1 (Eberly, "Distance from a point to an ellipse, an ellipsoid, or a hyperellipsoid").
   Here s = t + min a_k^2 > 0. A point on a plane of symmetry is moved off it by 1e-9, since s vanishes there. */
static double nir_ellipsoid_depth(const float ellipsoid[15], const double point[3])
{
    double a[3], u[3], squares[3], radius = 0, distance = 0, low = 0, high = 0;
    for (int k = 0; k < 3; ++k) {
        a[k] = (double)ellipsoid[3 + k];
        u[k] = 0;
        for (int i = 0; i < 3; ++i) u[k] += (double)ellipsoid[6 + 3 * k + i] * (point[i] - (double)ellipsoid[i]);
        u[k] = fmax(fabs(u[k]), 1e-9 * a[k]);
        high += a[k] * u[k] * (a[k] * u[k]);
        radius += u[k] / a[k] * (u[k] / a[k]);
    }
    const double least = fmin(a[0], fmin(a[1], a[2]));
    for (int k = 0; k < 3; ++k) squares[k] = a[k] * a[k] - least * least;
    high = sqrt(high);          /* where every term is at most its share of 1 */
    for (int step = 0; step < 200; ++step) {
        const double s = (low + high) / 2;
        double sum = 0;
        for (int k = 0; k < 3; ++k) sum += a[k] * u[k] / (s + squares[k]) * (a[k] * u[k] / (s + squares[k]));
        if (sum > 1) low = s;
        else high = s;
    }
    for (int k = 0; k < 3; ++k) {
        const double nearest = a[k] * a[k] * u[k] / (high + squares[k]);
        distance += (nearest - u[k]) * (nearest - u[k]);
    }
    return radius <= 1 ? sqrt(distance) : -sqrt(distance);
}

static void nir_metric_place(const nir_case *of, int64_t voxel, double point[3])
{
    const int64_t n = of->n, place[3] = { voxel % n, voxel / n % n, voxel / (n * n) };
    for (int k = 0; k < 3; ++k) point[k] = ((double)place[k] + 0.5 - (double)n / 2) * of->h;
}

/* The voxel in which a point lies. */
static int64_t nir_metric_voxel(const nir_case *of, const double point[3])
{
    int64_t place[3];
    for (int k = 0; k < 3; ++k) {
        place[k] = (int64_t)floor(point[k] / of->h + of->n / 2.0);
        place[k] = place[k] < 0 ? 0 : place[k] >= of->n ? of->n - 1 : place[k];
    }
    return (place[2] * of->n + place[1]) * of->n + place[0];
}

static void nir_metric_truth(const nir_case *of, const nir_metric_options *o, nir_metrics *m)
{
    const int64_t voxels = nir_metric_voxels(of);
    double sum[NIR_LESIONS][4] = { { 0 } };
    for (int64_t i = 0; i < voxels; ++i) {
        const int k = of->label[i] - 2;
        double point[3];
        if (k < 0 || k >= NIR_LESIONS) continue;
        nir_metric_place(of, i, point);
        for (int j = 0; j < 3; ++j) sum[k][j] += point[j];
        sum[k][3] += 1;
    }
    for (int k = 0; k < NIR_LESIONS; ++k) {
        nir_lesion *l = &m->lesion[m->lesions];
        if (sum[k][3] == 0) continue;
        l->label = k + 2;
        l->volume = sum[k][3] * of->h * of->h * of->h;
        for (int j = 0; j < 3; ++j) l->centroid[j] = sum[k][j] / sum[k][3];
        l->depth = of->ellipsoid ? nir_ellipsoid_depth(of->ellipsoid, l->centroid) : NAN;
        l->seen = !of->sensitivity ? -1
                : (double)of->sensitivity[nir_metric_voxel(of, l->centroid)] > nir_metric_least_seen(of, o);
        ++m->lesions;
    }
}

static void nir_metric_lesion_contrast(const nir_case *of, const float *image, int c, nir_metrics *m)
{
    const nir_metric_sums b = nir_metric_sum(of, image, c, 1, 1);
    const double nb = (double)b.count;
    for (int k = 0; k < m->lesions; ++k) {
        const nir_metric_sums u = nir_metric_sum(of, image, c, m->lesion[k].label, m->lesion[k].label);
        m->lesion[k].contrast[c] = (u.x / (double)u.count - b.x / nb) / (u.y / (double)u.count - b.y / nb);
    }
}

/* ---- lesions: what the image shows -------------------------------------- */

static int nir_metric_ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Sorts the values. */
static double nir_metric_median(double *value, int64_t count)
{
    if (count == 0) return NAN;
    qsort(value, (size_t)count, sizeof *value, nir_metric_ascending);
    return (value[(count - 1) / 2] + value[count / 2]) / 2;
}

typedef struct {
    int64_t voxels;
    double weight, centroid[3];
    bool overlap[NIR_LESIONS];
} nir_component;

/* The components of D in the order of their first voxels. */
typedef struct {
    double background, peak;        /* b, max_T(x - b) */
    int32_t *mark;                  /* [n^3]: 0 not in D, else the component's number from 1 */
    int32_t *queue;                 /* [n^3] */
    nir_component *component;
    int count;
} nir_found;

static void nir_found_free(nir_found *f)
{
    free(f->mark);
    free(f->queue);
    free(f->component);
}

/* Marks what is connected with a voxel by sides, edges and corners; D's voxels not reached yet are marked -1. */
static void nir_found_flood(nir_found *f, int n, int64_t from, int32_t number)
{
    int64_t head = 0, tail = 0;
    f->mark[from] = number;
    f->queue[tail++] = (int32_t)from;
    while (head < tail) {
        const int at = f->queue[head++], x = at % n, y = at / n % n, z = at / (n * n);
        for (int k = 0; k < 27; ++k) {
            const int nx = x + k % 3 - 1, ny = y + k / 3 % 3 - 1, nz = z + k / 9 - 1;
            if (nx < 0 || ny < 0 || nz < 0 || nx >= n || ny >= n || nz >= n) continue;
            const int next = (nz * n + ny) * n + nx;
            if (f->mark[next] != -1) continue;
            f->mark[next] = number;
            f->queue[tail++] = next;
        }
    }
}

/* D itself, as marks of -1. */
static bool nir_found_threshold(nir_found *f, const nir_case *of, const float *image, int c,
                                const nir_metric_options *o)
{
    const int64_t voxels = nir_metric_voxels(of);
    double *value = (double *)malloc((size_t)voxels * sizeof *value);
    int64_t count = 0;
    if (!value) return false;
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i]) value[count++] = (double)image[2 * i + c];
    f->background = nir_metric_median(value, count);
    f->peak = count ? value[count - 1] - f->background : 0;
    free(value);
    if (!(f->peak > o->least_contrast * fabs(f->background))) return true;
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i] && (double)image[2 * i + c] - f->background > o->threshold * f->peak) f->mark[i] = -1;
    return true;
}

static void nir_found_measure(nir_found *f, const nir_case *of, const float *image, int c)
{
    const int64_t voxels = nir_metric_voxels(of);
    for (int64_t i = 0; i < voxels; ++i) {
        double point[3];
        if (!f->mark[i]) continue;
        nir_component *p = &f->component[f->mark[i] - 1];
        const double weight = (double)image[2 * i + c] - f->background;
        nir_metric_place(of, i, point);
        for (int k = 0; k < 3; ++k) p->centroid[k] += weight * point[k];
        p->weight += weight;
        ++p->voxels;
        if (of->label[i] > 1 && of->label[i] < NIR_LESIONS + 2) p->overlap[of->label[i] - 2] = true;
    }
    for (int i = 0; i < f->count; ++i)
        for (int k = 0; k < 3; ++k) f->component[i].centroid[k] /= f->component[i].weight;
}

static bool nir_found_make(nir_found *f, const nir_case *of, const float *image, int c, const nir_metric_options *o)
{
    const int64_t voxels = nir_metric_voxels(of);
    memset(f, 0, sizeof *f);
    f->mark = (int32_t *)calloc((size_t)voxels, sizeof *f->mark);
    f->queue = (int32_t *)malloc((size_t)voxels * sizeof *f->queue);
    if (!f->mark || !f->queue || !nir_found_threshold(f, of, image, c, o)) return false;
    for (int64_t i = 0; i < voxels; ++i)
        if (f->mark[i] == -1) nir_found_flood(f, of->n, i, ++f->count);
    f->component = (nir_component *)calloc((size_t)f->count + 1, sizeof *f->component);
    if (!f->component) return false;
    nir_found_measure(f, of, image, c);
    return true;
}

/* ---- lesions: matching -------------------------------------------------- */

static double nir_metric_distance(const double a[3], const double b[3])
{
    return sqrt((a[0] - b[0]) * (a[0] - b[0]) + (a[1] - b[1]) * (a[1] - b[1]) + (a[2] - b[2]) * (a[2] - b[2]));
}

enum { NIR_SUBSETS = 1 << NIR_LESIONS };

static int nir_metric_bits(int set)
{
    int bits = 0;
    for (; set; set &= set - 1) ++bits;
    return bits;
}

/* The best matching of the components so far with each subset of tumours, grown by one component after the other;
   choice[i][set]: the tumour that component i has, or -1. */
static int nir_match_all(const nir_found *f, const nir_metrics *m, double reach, signed char (*choice)[NIR_SUBSETS])
{
    double cost[NIR_SUBSETS], next[NIR_SUBSETS];
    int best = 0;
    for (int set = 0; set < NIR_SUBSETS; ++set) cost[set] = set ? INFINITY : 0;
    for (int i = 0; i < f->count; ++i) {
        memcpy(next, cost, sizeof next);
        memset(choice[i], -1, sizeof choice[i]);
        for (int k = 0; k < m->lesions; ++k) {
            const double distance = nir_metric_distance(f->component[i].centroid, m->lesion[k].centroid);
            if (!f->component[i].overlap[m->lesion[k].label - 2] || distance > reach) continue;
            for (int set = 0; set < NIR_SUBSETS; ++set)
                if (!(set >> k & 1) && cost[set] + distance < next[set | 1 << k]) {
                    next[set | 1 << k] = cost[set] + distance;
                    choice[i][set | 1 << k] = (signed char)k;
                }
        }
        memcpy(cost, next, sizeof cost);
    }
    for (int set = 1; set < NIR_SUBSETS; ++set) {
        const int more = nir_metric_bits(set) - nir_metric_bits(best);
        if (isfinite(cost[set]) && (more > 0 || (more == 0 && cost[set] < cost[best]))) best = set;
    }
    return best;
}

static bool nir_match(const nir_found *f, int c, double reach, nir_metrics *m)
{
    signed char (*choice)[NIR_SUBSETS] = (signed char (*)[NIR_SUBSETS])malloc(((size_t)f->count + 1) * sizeof *choice);
    double sum = 0;
    int matched = 0;
    if (!choice) return false;
    for (int set = nir_match_all(f, m, reach, choice), i = f->count - 1; set && i >= 0; --i) {
        const int k = choice[i][set];
        if (k < 0) continue;
        m->lesion[k].detected[c] = true;
        m->lesion[k].error[c] = nir_metric_distance(f->component[i].centroid, m->lesion[k].centroid);
        sum += m->lesion[k].error[c];
        ++matched;
        set &= ~(1 << k);
    }
    free(choice);
    if (matched) m->score[c][NIR_LOCALISATION] = sum / matched;
    if (m->lesions) m->score[c][NIR_DETECTION] = (double)matched / m->lesions;
    m->score[c][NIR_FALSE_POSITIVES] = f->count - matched;
    return true;
}

/* What D says as a whole. */
static void nir_metric_overlap(const nir_found *f, const nir_case *of, int c, nir_metrics *m)
{
    const int64_t voxels = nir_metric_voxels(of);
    int64_t found = 0, there = 0, both = 0;
    double centroid[3] = { 0, 0, 0 }, weight = 0, nearest = INFINITY, *score = m->score[c];
    for (int64_t i = 0; i < voxels; ++i) {
        found += f->mark[i] > 0;
        there += of->label[i] > 1;
        both += f->mark[i] > 0 && of->label[i] > 1;
    }
    score[NIR_DICE] = found + there ? 2 * (double)both / (double)(found + there) : 1;
    if (there) score[NIR_VOLUME_RATIO] = (double)found / (double)there;
    for (int i = 0; i < f->count; ++i) {
        weight += f->component[i].weight;
        for (int k = 0; k < 3; ++k) centroid[k] += f->component[i].weight * f->component[i].centroid[k];
    }
    for (int k = 0; k < 3; ++k) centroid[k] /= weight;
    for (int k = 0; k < m->lesions; ++k) nearest = fmin(nearest, nir_metric_distance(centroid, m->lesion[k].centroid));
    if (f->count && m->lesions) score[NIR_NEAREST] = nearest;
}

/* max_T(x - b) over the largest contrast of the truth. */
static void nir_metric_peak(const nir_found *f, const nir_case *of, const float *image, int c, double *score)
{
    const int64_t voxels = nir_metric_voxels(of);
    const nir_metric_sums b = nir_metric_sum(of, image, c, 1, 1);
    const double background = b.y / (double)b.count;
    double peak = -INFINITY;
    bool any = false;
    for (int64_t i = 0; i < voxels; ++i)
        if (of->label[i] > 1) {
            peak = fmax(peak, (double)of->truth[2 * i + c] - background);
            any = true;
        }
    if (any && b.count) score[NIR_CONTRAST_PEAK] = f->peak / peak;
}

static bool nir_metrics_compute(const nir_case *of, const float *image, const nir_metric_options *o, nir_metrics *m)
{
    memset(m, 0, sizeof *m);
    if (!nir_metric_ssim(of, image, o, m)) return false;
    for (int c = 0; c < 2; ++c) {
        for (int i = 0; i < NIR_SCORES; ++i)
            if (i != NIR_SSIM && i != NIR_SSIM_TISSUE) m->score[c][i] = NAN;
        for (int k = 0; k < NIR_LESIONS; ++k) m->lesion[k].error[c] = m->lesion[k].contrast[c] = NAN;
    }
    nir_metric_truth(of, o, m);
    for (int c = 0; c < 2; ++c) {
        nir_found f;
        bool ok = nir_found_make(&f, of, image, c, o) && nir_match(&f, c, o->reach, m);
        if (ok) {
            nir_metric_errors(of, image, c, o, m->score[c]);
            nir_metric_by_sensitivity(of, image, c, o, m->score[c]);
            nir_metric_contrast(of, image, c, m->score[c]);
            nir_metric_lesion_contrast(of, image, c, m);
            nir_metric_overlap(&f, of, c, m);
            nir_metric_peak(&f, of, image, c, m->score[c]);
        }
        nir_found_free(&f);
        if (!ok) return false;
    }
    return true;
}

/* ---- statistics --------------------------------------------------------- */

/* Streaming, so that it needs no memory but for the median, which is NAN when that is short. */
static nir_summary nir_summarise(const double *value, int64_t count)
{
    nir_summary s = { 0, NAN, NAN, NAN };
    double *sorted = (double *)malloc(((size_t)count + 1) * sizeof *sorted), sum = 0, squares = 0;
    for (int64_t i = 0; i < count; ++i)
        if (!isnan(value[i])) {
            if (sorted) sorted[s.count] = value[i];
            sum += value[i];
            ++s.count;
        }
    if (s.count) s.mean = sum / (double)s.count;
    for (int64_t i = 0; i < count; ++i)
        if (!isnan(value[i])) squares += (value[i] - s.mean) * (value[i] - s.mean);
    if (s.count > 1) s.sd = sqrt(squares / (double)(s.count - 1));
    if (sorted) s.median = nir_metric_median(sorted, s.count);
    free(sorted);
    return s;
}

/* Picks one number of each phantom; those without it give NAN. */
static nir_summary nir_metric_pick(const nir_metrics *m, int64_t count, int channel, nir_score score,
                                   bool free_of_tumours)
{
    const nir_summary none = { 0, NAN, NAN, NAN };
    double *value = (double *)malloc(((size_t)count + 1) * sizeof *value);
    if (!value) return none;
    for (int64_t i = 0; i < count; ++i)
        value[i] = free_of_tumours && m[i].lesions ? (double)NAN : m[i].score[channel][score];
    const nir_summary s = nir_summarise(value, count);
    free(value);
    return s;
}

static nir_summary nir_summarise_score(const nir_metrics *m, int64_t count, int channel, nir_score score)
{
    return nir_metric_pick(m, count, channel, score, false);
}

static nir_summary nir_summarise_tumour_free(const nir_metrics *m, int64_t count, int channel)
{
    return nir_metric_pick(m, count, channel, NIR_FALSE_POSITIVES, true);
}

static bool nir_in_group(const nir_lesion *l, int group)
{
    const bool in[NIR_GROUPS] = { true, l->depth < 15, l->depth >= 15 && l->depth <= 25, l->depth > 25, l->seen == 1,
                                  l->seen == 0 };
    return in[group];
}

static bool nir_lesion_groups(const nir_metrics *m, int64_t count, int channel, nir_lesion_group group[NIR_GROUPS])
{
    double *error = (double *)malloc(((size_t)count * 2 + 1) * NIR_LESIONS * sizeof *error);
    double *contrast = error ? error + count * NIR_LESIONS : NULL;
    for (int g = 0; error && g < NIR_GROUPS; ++g) {
        int64_t lesions = 0, detected = 0;
        for (int64_t i = 0; i < count; ++i)
            for (int k = 0; k < m[i].lesions; ++k) {
                const nir_lesion *l = &m[i].lesion[k];
                if (!nir_in_group(l, g)) continue;
                error[lesions] = l->error[channel];
                contrast[lesions++] = l->contrast[channel];
                detected += l->detected[channel];
            }
        group[g].lesions = lesions;
        group[g].detection = lesions ? (double)detected / (double)lesions : (double)NAN;
        group[g].error = nir_summarise(error, lesions);
        group[g].contrast = nir_summarise(contrast, lesions);
    }
    free(error);
    return contrast != NULL;
}

/* SplitMix64 (Steele, Lea, Flood 2014) as a function of its counter. */
static uint64_t nir_metric_random(uint64_t seed, uint64_t index)
{
    uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Linear between the two nearest of sorted values. */
static double nir_metric_quantile(const double *sorted, int count, double q)
{
    const double at = q * (count - 1), below = floor(at);
    const int i = (int)below;
    return i + 1 < count ? sorted[i] + (at - below) * (sorted[i + 1] - sorted[i]) : sorted[count - 1];
}

static bool nir_paired_bootstrap(const double *a, const double *b, int64_t count, int resamples, double level,
                                 uint64_t seed, nir_interval *out)
{
    const nir_interval none = { 0, NAN, NAN, NAN };
    *out = none;
    if (count < 1 || resamples < 1 || !(level > 0 && level < 1)) return false;
    double *difference = (double *)malloc((size_t)count * sizeof *difference);
    double *mean = (double *)malloc((size_t)resamples * sizeof *mean), sum = 0;
    int64_t n = 0;
    for (int64_t i = 0; difference && i < count; ++i)
        if (!isnan(a[i]) && !isnan(b[i])) sum += difference[n++] = a[i] - b[i];
    const bool ok = difference && mean && n > 0;
    for (int r = 0; ok && r < resamples; ++r) {
        const uint64_t key = nir_metric_random(seed, (uint64_t)r);
        mean[r] = 0;
        for (int64_t i = 0; i < n; ++i)
            mean[r] += difference[(nir_metric_random(key, (uint64_t)i) >> 32) * (uint64_t)n >> 32] / (double)n;
    }
    if (ok) {
        qsort(mean, (size_t)resamples, sizeof *mean, nir_metric_ascending);
        out->count = n;
        out->difference = sum / (double)n;
        out->low = nir_metric_quantile(mean, resamples, (1 - level) / 2);
        out->high = nir_metric_quantile(mean, resamples, (1 + level) / 2);
    }
    free(difference);
    free(mean);
    return ok;
}

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif /* NIRDOT_METRICS_H */
