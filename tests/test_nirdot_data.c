/* Tests of NIR-DOT's datasets, metrics and figures: against closed forms, against scikit-image, SciPy and NumPy
   (tests/golden/make_nirdot_metrics.py), and against what was published of the original data. */
#define _XOPEN_SOURCE 700       /* dup2, mkdtemp, truncate */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "dotopt.h"
#include "examples/nirdot_data.h"
#include "examples/nirdot_metrics.h"
#include "examples/nirdot_figures.h"

#define COUNT(array) ((int)(sizeof (array) / sizeof *(array)))
#define GOLDEN "tests/golden/nirdot_metrics.safetensors"

static dot_context *ctx;
static dot_safetensors *golden_file;
static char folder[] = "/tmp/nirdot_data.XXXXXX";

/* ---- helpers ---- */

static double *golden(const char *name, int64_t *count)
{
    dot_safetensors_entry entry;
    const int at = dot_safetensors_find(golden_file, name);
    if (at < 0 || !dot_safetensors_entry_at(golden_file, at, &entry)) fail_msg("%s: no tensor '%s'", GOLDEN, name);
    double *value = (double *)calloc((size_t)entry.count, sizeof *value);
    assert_non_null(value);
    assert_true(dot_safetensors_read_double(golden_file, at, value, entry.count));
    if (count) *count = entry.count;
    return value;
}

static double golden_number(const char *format, ...)
{
    char name[64];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(name, sizeof name, format, arguments);
    va_end(arguments);
    double *value = golden(name, NULL), number = value[0];
    free(value);
    return number;
}

static void assert_near(const char *what, double ours, double expected, double tolerance)
{
    if (!(fabs(ours - expected) <= tolerance))
        fail_msg("%s is %.10g, expected %.10g +- %g", what, ours, expected, tolerance);
}

static void *take(int64_t count, size_t size)
{
    void *memory = calloc((size_t)count, size);
    assert_non_null(memory);
    return memory;
}

static const char *in_folder(const char *name)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

/* What is written to stderr between these two; `wanted` must occur in it. */
static int stderr_kept;
static void catch_stderr(void)
{
    fflush(stderr);
    stderr_kept = dup(2);
    assert_non_null(freopen(in_folder("stderr"), "w", stderr));
}

static void release_stderr(const char *wanted)
{
    char text[4096];
    fflush(stderr);
    dup2(stderr_kept, 2);
    close(stderr_kept);
    FILE *file = fopen(in_folder("stderr"), "r");
    assert_non_null(file);
    text[fread(text, 1, sizeof text - 1, file)] = 0;
    fclose(file);
    if (!strstr(text, wanted)) fail_msg("the message was '%s', expected '...%s...'", text, wanted);
}

/* ---- metrics: a small phantom ---- */

enum { SIDE = 20, VOXELS = SIDE * SIDE * SIDE };

/* A ball of tissue with two tumours of twice the tissue's properties, or none. */
typedef struct {
    uint8_t label[VOXELS];
    float truth[2 * VOXELS], image[2 * VOXELS], sensitivity[VOXELS];
    float ellipsoid[15];
    nir_case of;
    nir_metric_options o;
    nir_metrics m;
} ball;

static double from_point(int64_t voxel, double x, double y, double z)
{
    const double dx = (double)(voxel % SIDE) - x, dy = (double)(voxel / SIDE % SIDE) - y;
    const double dz = (double)(voxel / (SIDE * SIDE)) - z;
    return sqrt(dx * dx + dy * dy + dz * dz);
}

static ball *ball_make(bool tumours)
{
    static const float mu[3][2] = { { 0, 0 }, { 0.005f, 1 }, { 0.01f, 2 } };
    static const float shape[15] = { 0, 0, 0, 27, 27, 27, 1, 0, 0, 0, 1, 0, 0, 0, 1 };
    ball *b = (ball *)take(1, sizeof *b);
    for (int64_t i = 0; i < VOXELS; ++i) {
        b->label[i] = from_point(i, 9.5, 9.5, 9.5) < 9;
        if (tumours && from_point(i, 6, 9, 9) < 2.2) b->label[i] = 2;
        if (tumours && from_point(i, 13, 11, 8) < 2.2) b->label[i] = 3;
        memcpy(b->truth + 2 * i, mu[b->label[i] > 1 ? 2 : b->label[i]], sizeof mu[0]);
        b->sensitivity[i] = i % SIDE < 10;
    }
    memcpy(b->ellipsoid, shape, sizeof shape);
    memcpy(b->image, b->truth, sizeof b->truth);
    b->of = (nir_case){ SIDE, 3, b->label, b->truth, b->ellipsoid, b->sensitivity };
    b->o = nir_metric_defaults(SIDE);
    return b;
}

static void ball_score(ball *b) { assert_true(nir_metrics_compute(&b->of, b->image, &b->o, &b->m)); }

static void test_truth_as_image(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    ball_score(b);
    for (int c = 0; c < 2; ++c) {
        const double *s = b->m.score[c];
        assert_true(s[NIR_RMSE] == 0 && s[NIR_RMSE_ALL] == 0 && isinf(s[NIR_PSNR]) && s[NIR_PSNR] > 0);
        assert_near("SSIM", s[NIR_SSIM], 1, 1e-12);
        assert_near("SSIM in tissue", s[NIR_SSIM_TISSUE], 1, 1e-12);
        assert_true(s[NIR_DICE] == 1 && s[NIR_VOLUME_RATIO] == 1 && s[NIR_DETECTION] == 1 &&
                    s[NIR_FALSE_POSITIVES] == 0);
        assert_near("contrast recovery", s[NIR_CONTRAST], 1, 1e-6);
        assert_near("peak contrast recovery", s[NIR_CONTRAST_PEAK], 1, 1e-6);
        assert_near("localisation error", s[NIR_LOCALISATION], 0, 1e-12);
        assert_true(s[NIR_CNR] > 1e3);
    }
    assert_int_equal(b->m.lesions, 2);
    assert_near("centroid", b->m.lesion[0].centroid[0], (6 + 0.5 - 10) * 3, 1e-12);
    assert_near("depth", b->m.lesion[0].depth, 27 - 3 * sqrt(3.5 * 3.5 + 2 * 0.25), 1e-9);
    assert_true(b->m.lesion[0].seen == 1 && b->m.lesion[1].seen == 0);
    free(b);
}

/* An error of d at every voxel of the tissue. */
static void test_constant_error(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    double tissue = 0, sum = 0;
    for (int64_t i = 0; i < VOXELS; ++i) {
        tissue += b->label[i] > 0;
        sum += (double)b->truth[2 * i];
        if (b->label[i]) b->image[2 * i] += 0.001f;
    }
    ball_score(b);
    const double *s = b->m.score[0];
    assert_near("RMSE", s[NIR_RMSE], 0.001, 1e-9);
    assert_near("NRMSE", s[NIR_NRMSE], 0.001 / (sum / tissue), 1e-6);
    assert_near("RMSE of all voxels", s[NIR_RMSE_ALL], 0.001 * sqrt(tissue / VOXELS), 1e-9);
    assert_near("PSNR", s[NIR_PSNR], 20 * log10(24.5) + 10 * log10(VOXELS / tissue), 1e-4);
    assert_near("RMSE inside", s[NIR_RMSE_INSIDE], 0.001, 1e-9);
    assert_near("RMSE outside", s[NIR_RMSE_OUTSIDE], 0.001, 1e-9);
    assert_near("contrast recovery", s[NIR_CONTRAST], 1, 1e-5);
    assert_near("skill", nir_skill(s[NIR_RMSE], 0.004), 0.75, 1e-6);
    assert_true(s[NIR_DICE] == 1 && b->m.score[1][NIR_RMSE] == 0);
    for (int64_t i = 0; i < VOXELS; ++i)
        if (b->label[i] && b->sensitivity[i] == 0) b->image[2 * i] += 0.002f;
    ball_score(b);
    assert_near("RMSE inside", s[NIR_RMSE_INSIDE], 0.001, 1e-9);
    assert_near("RMSE outside", s[NIR_RMSE_OUTSIDE], 0.003, 1e-9);
    free(b);
}

/* Two volumes that are constant: SSIM is Wang's luminance term, and the cropped mean sees no border. */
static void test_ssim_of_constants(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    const double x = (double)0.002f, y = (double)0.005f, c1 = 0.01 * 0.0245 * 0.01 * 0.0245;
    for (int64_t i = 0; i < VOXELS; ++i) {
        b->image[2 * i] = 0.002f;
        b->truth[2 * i] = 0.005f;
    }
    ball_score(b);
    assert_near("SSIM", b->m.score[0][NIR_SSIM], (2 * x * y + c1) / (x * x + y * y + c1), 1e-9);
    assert_near("SSIM in tissue", b->m.score[0][NIR_SSIM_TISSUE], (2 * x * y + c1) / (x * x + y * y + c1), 1e-9);
    free(b);
}

static void test_homogeneous_image(void **state)
{
    (void)state;
    for (int tumours = 0; tumours < 2; ++tumours) {
        ball *b = ball_make(tumours);
        for (int64_t i = 0; i < VOXELS; ++i)    /* with jitter far below anything that is a lesion */
            if (b->label[i]) b->image[2 * i] = 0.006f * (1 + 1e-7f * (float)(i % 3));
        ball_score(b);
        const double *s = b->m.score[0];
        assert_true(s[NIR_FALSE_POSITIVES] == 0 && isnan(s[NIR_LOCALISATION]) && isnan(s[NIR_NEAREST]));
        assert_true(s[NIR_DICE] == (tumours ? 0 : 1));
        if (tumours) assert_true(s[NIR_DETECTION] == 0 && fabs(s[NIR_CONTRAST]) < 1e-6 && s[NIR_VOLUME_RATIO] == 0);
        else assert_true(isnan(s[NIR_DETECTION]) && isnan(s[NIR_CONTRAST]) && isnan(s[NIR_CNR]) &&
                         isnan(s[NIR_VOLUME_RATIO]));
        free(b);
    }
}

/* Voxels that touch at a corner are one lesion; with a voxel between them they are two. */
static void test_components(void **state)
{
    (void)state;
    for (int gap = 0; gap < 2; ++gap) {
        ball *b = ball_make(false);
        const int64_t second = (9 + gap + 1) * SIDE * SIDE + (9 + gap + 1) * SIDE + 9 + gap + 1;
        b->image[2 * (9 * SIDE * SIDE + 9 * SIDE + 9)] = 0.02f;
        b->image[2 * second] = 0.02f;
        ball_score(b);
        assert_true(b->m.score[0][NIR_FALSE_POSITIVES] == 1 + gap && b->m.score[1][NIR_FALSE_POSITIVES] == 0);
        assert_true(b->m.score[0][NIR_DICE] == 0 && b->m.score[1][NIR_DICE] == 1);
        const nir_summary s = nir_summarise_tumour_free(&b->m, 1, 0);
        assert_true(s.count == 1 && s.mean == 1 + gap);
        free(b);
    }
}

/* Two thirds of one tumour are seen, shifted by a voxel; the other is missed. */
static void test_a_lesion_missed(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    nir_lesion_group group[NIR_GROUPS];
    for (int64_t i = 0; i < VOXELS; ++i) {
        if (b->label[i]) b->image[2 * i] = 0.005f;
        if (from_point(i, 7, 9, 9) < 2.2) b->image[2 * i] = 0.008f;
    }
    ball_score(b);
    const double *s = b->m.score[0];
    assert_true(s[NIR_DETECTION] == 0.5 && s[NIR_FALSE_POSITIVES] == 0 && b->m.lesion[0].detected[0] &&
                !b->m.lesion[1].detected[0]);
    assert_near("localisation error", s[NIR_LOCALISATION], 3, 1e-9);
    assert_near("nearest tumour", s[NIR_NEAREST], 3, 1e-9);
    assert_near("peak", s[NIR_CONTRAST_PEAK], 0.6, 1e-6);
    assert_near("volume", b->m.lesion[0].volume, b->m.lesion[1].volume, 0);
    assert_near("volume ratio", s[NIR_VOLUME_RATIO], 0.5, 0);
    assert_near("contrast of the tumour missed", b->m.lesion[1].contrast[0] < 0, 1, 0);
    assert_true(nir_lesion_groups(&b->m, 1, 0, group));
    assert_true(group[NIR_ALL_LESIONS].lesions == 2 && group[NIR_ALL_LESIONS].detection == 0.5);
    assert_true(group[NIR_SHALLOW].lesions == 1 && group[NIR_MIDDLE].lesions == 1 && group[NIR_DEEP].lesions == 0);
    assert_true(group[NIR_MIDDLE].detection == 1 && group[NIR_SHALLOW].detection == 0);     /* at 16.3 and 14.7 mm */
    assert_true(group[NIR_SEEN].detection == 1 && group[NIR_UNSEEN].detection == 0);
    assert_near("error of those found", group[NIR_ALL_LESIONS].error.mean, 3, 1e-9);
    free(b);
}

static void test_crosstalk(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    for (int64_t i = 0; i < VOXELS; ++i) b->image[2 * i + 1] = b->label[i] > 1 ? 1.2f : b->label[i] ? 1 : 0;
    assert_near("crosstalk", nir_crosstalk(&b->of, b->image, 0), 0.2, 1e-6);    /* 100 % in one, 20 % in the other */
    free(b);
}

static void test_window_that_does_not_fit(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    b->o.radius = 10;
    assert_false(nir_metrics_compute(&b->of, b->image, &b->o, &b->m));
    assert_int_equal(nir_metric_defaults(16).radius, 3);
    free(b);
}

/* ---- metrics: against scikit-image, SciPy and NumPy ---- */

/* The scores that the golden file has, and the tolerance relative to the number. */
static void test_golden_scores(void **state)
{
    (void)state;
    static const nir_score scores[] = {
        NIR_RMSE, NIR_NRMSE, NIR_RMSE_ALL, NIR_PSNR, NIR_SSIM, NIR_SSIM_TISSUE, NIR_DICE, NIR_CONTRAST,
        NIR_CONTRAST_PEAK, NIR_CNR, NIR_LOCALISATION, NIR_NEAREST, NIR_VOLUME_RATIO, NIR_DETECTION,
        NIR_FALSE_POSITIVES };
    double worst = 0;
    for (int i = 0; i < 2; ++i) {
        ball *b = ball_make(true);
        char name[32];
        snprintf(name, sizeof name, "label%d", i);
        double *label = golden(name, NULL);
        snprintf(name, sizeof name, "image%d", i);
        double *image = golden(name, NULL);
        snprintf(name, sizeof name, "property%d", i);
        double *property = golden(name, NULL);
        for (int64_t k = 0; k < 2 * VOXELS; ++k) {
            b->label[k / 2] = (uint8_t)label[k / 2];
            b->truth[k] = (float)property[2 * b->label[k / 2] + k % 2];
            b->image[k] = (float)image[k];
        }
        ball_score(b);
        for (int c = 0; c < 2; ++c)
            for (int k = 0; k < COUNT(scores); ++k) {
                const double ours = b->m.score[c][scores[k]];
                const double theirs = golden_number("%s.%d.%d", nir_score_table[scores[k]].name, i, c);
                assert_near(nir_score_table[scores[k]].name, ours, theirs, 1e-9 * fmax(1, fabs(theirs)));
                worst = fmax(worst, fabs(ours - theirs) / fmax(1e-3, fabs(theirs)));
            }
        b->o.sigma = 1;
        b->o.radius = 4;
        ball_score(b);
        for (int c = 0; c < 2; ++c)
            assert_near("SSIM, sigma 1", b->m.score[c][NIR_SSIM], golden_number("ssim_narrow.%d.%d", i, c), 1e-9);
        nir_seed_scores seed;
        snprintf(name, sizeof name, "seed_compatible%d", i);
        double *expected = golden(name, NULL);
        assert_true(nir_seed_compatible(&b->of, b->image, &seed));
        assert_near("RMSE as in the original", seed.rmse, expected[0], 1e-9);
        assert_near("PSNR as in the original", seed.psnr, expected[1], 1e-9);
        assert_near("SSIM as in the original", seed.ssim, expected[2], 1e-9);
        free(expected);
        free(label);
        free(image);
        free(property);
        free(b);
    }
    print_message("# scores: largest relative difference from scikit-image and SciPy %.1e\n", worst);
}

static void test_golden_matching(void **state)
{
    (void)state;
    int64_t count;
    double *table = golden("matching", &count);
    const int width = 15 + 21 + 35 + 2, cases = (int)count / width;
    for (int i = 0; i < cases; ++i) {
        const double *row = table + i * width;
        nir_component component[7] = { 0 };
        nir_found f = { 0, 0, NULL, NULL, component, 7 };
        nir_metrics m;
        double sum = 0;
        memset(&m, 0, sizeof m);
        m.lesions = 5;
        for (int k = 0; k < 5; ++k) {
            m.lesion[k].label = k + 2;
            memcpy(m.lesion[k].centroid, row + 3 * k, sizeof m.lesion[k].centroid);
        }
        for (int j = 0; j < 7; ++j) {
            memcpy(component[j].centroid, row + 15 + 3 * j, sizeof component[j].centroid);
            for (int k = 0; k < 5; ++k) component[j].overlap[k] = row[36 + 5 * j + k] != 0;
        }
        assert_true(nir_match(&f, 0, 25, &m));
        for (int k = 0; k < 5; ++k)
            if (m.lesion[k].detected[0]) sum += m.lesion[k].error[0];
        assert_true(m.score[0][NIR_DETECTION] * 5 == row[71] && m.score[0][NIR_FALSE_POSITIVES] == 7 - row[71]);
        assert_near("sum of distances", sum, row[72], 1e-4);
    }
    assert_int_equal(cases, 60);
    free(table);
}

static void test_golden_depth(void **state)
{
    (void)state;
    int64_t count;
    double *row = golden("depth", &count);
    for (int i = 0; i < count / 19; ++i) {
        float ellipsoid[15];
        for (int k = 0; k < 15; ++k) ellipsoid[k] = (float)row[19 * i + k];
        /* the rotations are float: the two ways of applying one differ by 1e-7 of 30 mm */
        assert_near("depth", nir_ellipsoid_depth(ellipsoid, row + 19 * i + 15), row[19 * i + 18], 1e-5);
    }
    free(row);
}

static void test_statistics(void **state)
{
    (void)state;
    int64_t count;
    double *a = golden("bootstrap.a", &count), *b = golden("bootstrap.b", NULL), *expected = golden("bootstrap", NULL);
    double *summary = golden("summary", NULL);
    nir_interval one, two;
    const nir_summary s = nir_summarise(a, count);
    assert_near("mean", s.mean, summary[0], 1e-12);
    assert_near("sd", s.sd, summary[1], 1e-12);
    assert_near("median", s.median, summary[2], 1e-12);
    assert_true(nir_paired_bootstrap(a, b, count, 100000, 0.95, 7, &one));
    /* the interval's ends are quantiles of 10^5 draws, which are known to about 0.01 standard errors */
    assert_near("difference", one.difference, expected[0], 1e-12);
    assert_near("lower end", one.low, expected[1], 0.03 * expected[3]);
    assert_near("upper end", one.high, expected[2], 0.03 * expected[3]);
    assert_true(nir_paired_bootstrap(a, b, count, 100000, 0.95, 7, &two) && memcmp(&one, &two, sizeof one) == 0);
    assert_true(nir_paired_bootstrap(a, b, count, 1000, 0.95, 8, &two) && two.low != one.low);
    a[3] = b[5] = NAN;
    assert_true(nir_paired_bootstrap(a, b, count, 1000, 0.95, 7, &two) && two.count == count - 2);
    assert_int_equal(nir_summarise(a, count).count, count - 1);
    a[0] = NAN;
    assert_false(nir_paired_bootstrap(a, b, 1, 1000, 0.95, 7, &two));
    free(a);
    free(b);
    free(expected);
    free(summary);
}

static void test_diagnostics(void **state)
{
    (void)state;
    double *latent = golden("latent", NULL), *share = golden("share", NULL), *expected = golden("diagnostics", NULL);
    const double even[4] = { 0.25, 0.25, 0.25, 0.25 }, one[3] = { 0, 1, 0 };
    float a[2][32];
    for (int i = 0; i < 64; ++i) a[i / 32][i % 32] = (float)latent[i];
    assert_near("RMSE of latents", nir_latent_rmse(a[0], a[1], 32), expected[0], 1e-7);
    assert_near("cosine of latents", nir_latent_cosine(a[0], a[1], 32), expected[1], 1e-12);
    assert_near("entropy", nir_attention_entropy(share, 20), expected[2], 1e-12);
    assert_near("entropy of equal shares", nir_attention_entropy(even, 4), log(4), 1e-15);
    assert_true(nir_attention_entropy(one, 3) == 0);
    free(latent);
    free(share);
    free(expected);
}

/* The first numbers of the published generator with seed 1234567. */
static void test_random_numbers(void **state)
{
    (void)state;
    static const uint64_t expected[] = { 6457827717110365317u, 3203168211198807973u, 9817491932198370423u,
                                         4593380528125082431u, 16408922859458223821u };
    for (int i = 0; i < COUNT(expected); ++i) assert_true(nir_metric_random(1234567, (uint64_t)i) == expected[i]);
}

/* ---- phantoms ---- */

static nir_data_options options_of(const char *preset, int64_t count)
{
    nir_data_options o;
    assert_true(nir_data_defaults(&o, preset));
    for (int i = 0; i < NIR_SPLITS; ++i) o.preset.count[i] = count;
    return o;
}

static nir_dataset *generate(const nir_data_options *o, nir_split split)
{
    nir_dataset *d = nir_dataset_generate(o, split);
    assert_non_null(d);
    return d;
}

/* Uniform rotations: any element of the matrix is uniform in [-1, 1]. Uniform Euler angles would give 0.637 for
   |R33|. */
static void test_rotations(void **state)
{
    (void)state;
    enum { MANY = 20000 };
    nir_draws draws = nir_draws_of(5, NIR_DRAW_PHANTOM, 0, 0);
    double sum[9] = { 0 }, absolute[9] = { 0 }, below[9] = { 0 }, worst = 0;
    for (int i = 0; i < MANY; ++i) {
        double r[9];
        nir_draw_rotation(&draws, r);
        const double det = r[0] * (r[4] * r[8] - r[5] * r[7]) - r[1] * (r[3] * r[8] - r[5] * r[6]) +
                           r[2] * (r[3] * r[7] - r[4] * r[6]);
        worst = fmax(worst, fabs(det - 1));
        for (int k = 0; k < 9; ++k) {
            worst = fmax(worst, fabs(r[k / 3 * 3] * r[k % 3 * 3] + r[k / 3 * 3 + 1] * r[k % 3 * 3 + 1] +
                                     r[k / 3 * 3 + 2] * r[k % 3 * 3 + 2] - (k / 3 == k % 3)));
            sum[k] += r[k] / MANY;
            absolute[k] += fabs(r[k]) / MANY;
            below[k] += (r[k] < 0.6) / (double)MANY;
        }
    }
    assert_near("orthogonality and determinant", worst, 0, 1e-6);
    for (int k = 0; k < 9; ++k) {   /* four standard errors */
        assert_near("mean of an element", sum[k], 0, 4 * sqrt(1 / 3.0 / MANY));
        assert_near("mean of its magnitude", absolute[k], 0.5, 4 * sqrt(1 / 12.0 / MANY));
        assert_near("share below 0.6", below[k], 0.8, 4 * sqrt(0.8 * 0.2 / MANY));
    }
    print_message("# rotations: mean |R33| = %.4f, expected 0.5 +- %.4f\n", absolute[8], sqrt(1 / 12.0 / MANY));
}

/* Points on a spheroid are uniform by area: the share between two parallels is that of the surface of revolution. */
static void test_surface_points(void **state)
{
    (void)state;
    enum { MANY = 20000, SLICES = 20000 };
    const nir_ellipsoid e = { { 1, 2, 3 }, { 30, 30, 15 }, { 1, 0, 0, 0, 1, 0, 0, 0, 1 } };
    nir_draws draws = nir_draws_of(6, NIR_DRAW_OPTODES, 0, 0);
    double inner = 0, all = 0, found = 0;
    for (int i = 0; i < SLICES; ++i) {      /* dA = 2 pi r sqrt(1 + (dr/dz)^2) dz with r = a sqrt(1 - z^2/c^2) */
        const double z = (i + 0.5) / SLICES, area = sqrt((1 - z * z) + 30.0 / 15 * 30.0 / 15 * z * z);
        all += area;
        inner += z < 0.5 ? area : 0;
    }
    for (int i = 0; i < MANY; ++i) {
        double point[3];
        nir_draw_on_surface(&draws, &e, point);
        assert_near("radius", nir_ellipsoid_radius(&e, point), 1, 1e-6);
        found += fabs(point[2] - 3) < 7.5;
    }
    assert_near("share between the parallels", found / MANY, inner / all, 4 * sqrt(0.25 / MANY));
}

/* Spheres touch where the distance is the sum of the radii; of other ellipsoids, an overlap is never taken for none. */
static void test_apart(void **state)
{
    (void)state;
    nir_draws draws = nir_draws_of(7, NIR_DRAW_PHANTOM, 0, 0);
    for (int i = 0; i < 300; ++i) {
        nir_ellipsoid e[2];
        for (int k = 0; k < 2; ++k) {
            const double radius = nir_draw_uniform(&draws, 2, 10);
            for (int j = 0; j < 3; ++j) {
                e[k].centre[j] = nir_draw_uniform(&draws, -8, 8);
                e[k].semi_axis[j] = i < 150 ? radius : nir_draw_uniform(&draws, 2, 10);
            }
            nir_draw_rotation(&draws, e[k].rotation);
        }
        const bool apart = nir_ellipsoids_apart(&e[0], &e[1], 0);
        if (i < 150) {
            const double gap = nir_data_distance(e[0].centre, e[1].centre) - e[0].semi_axis[0] - e[1].semi_axis[0];
            if (fabs(gap) > 0.01) assert_int_equal(apart, gap > 0);
            continue;
        }
        for (int k = 0; apart && k < 2000; ++k) {
            double u[3], point[3];
            nir_draw_in_ball(&draws, u);
            nir_ellipsoid_point(&e[0], u, point);
            assert_true(nir_ellipsoid_radius(&e[1], point) > 1);
        }
    }
}

/* What must hold of a phantom's tumours: as many as the preset says, four fifths within, none in another, properties
   and semi-axes in range. The share within is found with 4000 points, to 4 standard errors, and the lattice's 2 %. */
static void check_tumours(const nir_data_options *o, const nir_phantom *p, nir_draws *draws)
{
    const nir_properties *r = &o->properties;
    const double *t = p->property[0];
    assert_true(p->tumours <= o->preset.tumours[1]);
    assert_true(t[0] >= r->mu_a[0] && t[0] <= r->mu_a[1] && t[1] >= r->mu_s[0] && t[1] <= r->mu_s[1]);
    for (int k = 0; k < NIR_LABELS; ++k) {
        const double a = p->property[k][0] / t[0], s = p->property[k][1] / t[1];
        if (k > p->tumours) assert_true(p->property[k][0] == 0 && p->property[k][1] == 0);
        else if (k > 0) assert_true(a >= r->tumour_mu_a[0] * (1 - 1e-6) && a <= r->tumour_mu_a[1] * (1 + 1e-6) &&
                                    s >= r->tumour_mu_s[0] * (1 - 1e-6) && s <= r->tumour_mu_s[1] * (1 + 1e-6));
    }
    for (int k = 0; k < p->tumours; ++k) {
        int within = 0;
        for (int i = 0; i < 4000; ++i) {
            double u[3], point[3];
            nir_draw_in_ball(draws, u);
            nir_ellipsoid_point(&p->tumour[k], u, point);
            within += nir_ellipsoid_radius(&p->tissue, point) <= 1;
            for (int j = 0; j < p->tumours; ++j) assert_true(j == k || nir_ellipsoid_radius(&p->tumour[j], point) > 1);
        }
        assert_true(within >= 4000 * (0.8 - 0.02) - 4 * sqrt(4000 * 0.16));
        for (int j = 0; j < 2 + !o->preset.flat; ++j)
            assert_true(p->tumour[k].semi_axis[j] >= o->preset.semi_axis[0] &&
                        p->tumour[k].semi_axis[j] <= o->preset.semi_axis[1]);
        const double third = p->tumour[k].semi_axis[2];
        if (o->preset.flat) assert_true(third >= 3 && third <= o->preset.semi_axis[1]);
    }
}

static void test_phantoms(void **state)
{
    (void)state;
    nir_draws draws = nir_draws_of(8, NIR_DRAW_PHANTOM, 0, 0);
    for (int preset = 0; preset < NIR_PRESETS; ++preset) {
        nir_data_options o = options_of(nir_presets[preset].name, 1);
        int tumours[NIR_TUMOURS + 1] = { 0 };
        double scattering[2] = { INFINITY, 0 };
        if (preset == 2) assert_true(nir_data_properties(&o, "seed"));
        for (int i = 0; i < 200; ++i) {
            nir_phantom p;
            nir_phantom_draw(&o, NIR_TRAIN, i, &p);
            check_tumours(&o, &p, &draws);
            ++tumours[p.tumours];
            for (int k = 0; k < 3; ++k) assert_true(p.tissue.semi_axis[k] >= 25 && p.tissue.semi_axis[k] <= 30);
            for (int k = 1; k <= p.tumours; ++k) {
                scattering[0] = fmin(scattering[0], p.property[k][1] / p.property[0][1]);
                scattering[1] = fmax(scattering[1], p.property[k][1] / p.property[0][1]);
            }
        }
        /* the ranges are used to their ends */
        const double *range = o.properties.tumour_mu_s, width = range[1] - range[0];
        assert_true(scattering[0] < range[0] + 0.05 * width && scattering[1] > range[1] - 0.05 * width);
        for (int k = o.preset.tumours[0]; k <= o.preset.tumours[1]; ++k) assert_true(tumours[k] > 0);
        assert_true((tumours[0] > 0) == (o.preset.tumours[0] == 0 || o.preset.tumour_free > 0));
    }
}

/* The original generator's volumes, as measured on 80 of them (raw mm^-1, air included): mean (0.00180, 0.338),
   standard deviation (0.00289, 0.507). A phantom's own mean scatters by a fifth, so that the mean of 150 is good to a
   few percent. */
static void test_volume_statistics(void **state)
{
    (void)state;
    static const double expected[2][2] = { { 0.00180, 0.00289 }, { 0.338, 0.507 } };
    nir_data_options o = options_of("small", 1);
    const nir_preset small = o.preset;
    uint8_t *label = (uint8_t *)take(32 * 32 * 32, 1);
    double sum[2][3] = { { 0 } };
    assert_true(nir_data_defaults(&o, "full") && nir_data_properties(&o, "seed"));
    for (int i = 0; i < 150; ++i) {
        nir_phantom p;
        nir_phantom_draw(&o, NIR_TEST, i, &p);
        nir_phantom_label(&p, (nir_grid){ small.n, small.h }, label);
        for (int k = 0; k < 32 * 32 * 32; ++k)
            for (int c = 0; c < 2; ++c) {
                const double value = label[k] ? p.property[label[k] - 1][c] : 0;
                sum[c][0] += 1;
                sum[c][1] += value;
                sum[c][2] += value * value;
            }
    }
    for (int c = 0; c < 2; ++c) {
        const double mean = sum[c][1] / sum[c][0], sd = sqrt(sum[c][2] / sum[c][0] - mean * mean);
        print_message("# channel %d: mean %.5f, sd %.5f; the original's %.5f, %.5f\n", c, mean, sd, expected[c][0],
                      expected[c][1]);
        assert_near("mean", mean / expected[c][0], 1, 0.08);
        assert_near("standard deviation", sd / expected[c][1], 1, 0.08);
    }
    free(label);
}

/* ---- optodes ---- */

static void check_optodes(const nir_data_options *o, const nir_dataset *d, int64_t index)
{
    const float *source = d->source + 3 * index * d->sources, *detector = d->detector + 3 * index * d->detectors;
    const nir_ellipsoid tissue = nir_dataset_ellipsoid(d, index);
    const int pairs = nir_dataset_pairs(d, index), optodes = d->sources + d->detectors;
    int in_range = 0;
    double widest = 0;
    for (int i = 0; i < optodes; ++i) {
        double a[3], b[3];
        nir_data_point(i < d->sources ? source + 3 * i : detector + 3 * (i - d->sources), a);
        assert_near("radius of an optode", nir_ellipsoid_radius(&tissue, a), 1, 1e-6);
        for (int j = i + 1; j < optodes; ++j) {
            nir_data_point(j < d->sources ? source + 3 * j : detector + 3 * (j - d->sources), b);
            const double distance = nir_data_distance(a, b);
            widest = fmax(widest, distance);
            if (j < d->sources || !o->preset.own_detectors) assert_true(distance >= 5 - 1e-4);
            in_range += i < d->sources && j >= d->sources && distance >= 10 && distance <= 40;
        }
    }
    assert_true(o->preset.probe == NIR_PROBE_PATCH ? widest <= 60 + 1e-4 : widest > 40);
    assert_true(pairs >= o->preset.least_pairs && pairs <= d->pairs);
    if (!o->preset.own_detectors) assert_int_equal(pairs, in_range);
    for (int k = 0; k < pairs; ++k) {
        const uint16_t *pair = d->pair + 2 * (index * d->pairs + k);
        const double separation = nir_dataset_separation(d, index, k);
        assert_true(separation >= 10 - 1e-4 && separation <= 40 + 1e-4);
        assert_true(pair[0] < d->sources && pair[1] < d->detectors);
        if (k > 0) assert_true(pair[0] > pair[-2] || (pair[0] == pair[-2] && pair[1] > pair[-1]));    /* none twice */
        if (o->preset.own_detectors) assert_int_equal(pair[1] / o->preset.detectors, pair[0]);
    }
}

static void test_optodes(void **state)
{
    (void)state;
    static const struct { const char *preset; nir_probe probe; int64_t count; } cases[] = {
        { "smoke", NIR_PROBE_SURROUND, 20 }, { "small", NIR_PROBE_PATCH, 6 }, { "small", NIR_PROBE_SURROUND, 6 },
        { "full", NIR_PROBE_PATCH, 2 } };
    for (int i = 0; i < COUNT(cases); ++i) {
        nir_data_options o = options_of(cases[i].preset, cases[i].count);
        o.preset.probe = cases[i].probe;
        if (i == 3) {       /* the optodes of the full preset, simulated on a coarser grid */
            o.preset.n = 32;
            o.preset.h = 2;
        }
        nir_dataset *d = generate(&o, NIR_VAL);
        assert_string_equal(d->probe, cases[i].probe == NIR_PROBE_PATCH ? "patch" : "surround");
        for (int64_t k = 0; k < d->count; ++k) check_optodes(&o, d, k);
        nir_dataset_free(d);
    }
}

/* ---- datasets ---- */

/* Every number of two datasets is the same, bit for bit. */
static bool same_phantoms(const nir_dataset *a, const nir_dataset *b, int64_t count)
{
    const size_t n = (size_t)count, voxels = (size_t)nir_dataset_voxels(a), pairs = (size_t)a->pairs;
    return a->pairs == b->pairs && a->sources == b->sources && a->detectors == b->detectors && a->grid.n == b->grid.n &&
           memcmp(a->label, b->label, n * voxels) == 0 &&
           memcmp(a->property, b->property, n * 12 * sizeof(float)) == 0 &&
           memcmp(a->ellipsoid, b->ellipsoid, n * 15 * sizeof(float)) == 0 &&
           memcmp(a->tumour, b->tumour, n * 75 * sizeof(float)) == 0 &&
           memcmp(a->source, b->source, n * 3 * (size_t)a->sources * sizeof(float)) == 0 &&
           memcmp(a->detector, b->detector, n * 3 * (size_t)a->detectors * sizeof(float)) == 0 &&
           memcmp(a->pair, b->pair, n * pairs * 4) == 0 && memcmp(a->phase, b->phase, n * pairs * sizeof(float)) == 0 &&
           memcmp(a->log_amplitude, b->log_amplitude, n * pairs * sizeof(float)) == 0;
}

static void test_threads(void **state)
{
    (void)state;
    for (int fine = 0; fine < 2; ++fine) {
        nir_data_options o = options_of("smoke", 9);
        o.fine = fine;
        nir_dataset *one = generate(&o, NIR_TRAIN);
        for (o.threads = 2; o.threads <= 4; o.threads *= 2) {
            nir_dataset *more = generate(&o, NIR_TRAIN);
            assert_true(same_phantoms(one, more, 9));
            nir_dataset_free(more);
        }
        o.preset.count[NIR_TRAIN] = 4;
        nir_dataset *fewer = generate(&o, NIR_TRAIN), *other = generate(&o, NIR_VAL);
        assert_true(same_phantoms(one, fewer, 4) && !same_phantoms(one, other, 1));
        o.seed = 43;
        nir_dataset *seed = generate(&o, NIR_TRAIN);
        assert_false(same_phantoms(one, seed, 1));
        nir_dataset_free(one);
        nir_dataset_free(fewer);
        nir_dataset_free(other);
        nir_dataset_free(seed);
    }
}

/* With `fine`, volumes and optodes stay as they are, and the measurements change by the error of the coarse grid. */
static void test_fine(void **state)
{
    (void)state;
    nir_data_options o = options_of("small", 3);
    nir_dataset *coarse = generate(&o, NIR_TRAIN);
    o.fine = true;
    nir_dataset *fine = generate(&o, NIR_TRAIN);
    double sum = 0, most = 0;
    int64_t count = 0;
    assert_memory_equal(coarse->label, fine->label, (size_t)(3 * nir_dataset_voxels(fine)));
    assert_memory_equal(coarse->source, fine->source, sizeof(float) * 3 * 3 * 16);
    assert_true(fine->fine && fine->grid.n == 32);
    for (int64_t i = 0; i < 3 * coarse->pairs; ++i)
        if (coarse->pair[2 * i] != NIR_NO_PAIR) {
            const double change = (double)(fine->log_amplitude[i] - coarse->log_amplitude[i]);
            sum += fabs(change);
            most = fmax(most, fabs(change));
            ++count;
        }
    print_message("# fine grid: log amplitude changes by %.3f in the mean, %.3f at most\n", sum / (double)count, most);
    assert_true(sum / (double)count > 1e-4 && sum / (double)count < 0.15);
    nir_dataset_free(coarse);
    nir_dataset_free(fine);
}

static void test_volume(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 2);
    nir_dataset *d = generate(&o, NIR_TEST);
    float mu[2 * 16 * 16 * 16], one[16 * 16 * 16];
    int tissue = 0, tumour = 0;
    nir_dataset_volume(d, 1, mu);
    nir_volume_channel(mu, 16 * 16 * 16, 1, one);
    for (int i = 0; i < 16 * 16 * 16; ++i) {
        const uint8_t label = d->label[16 * 16 * 16 + i];
        const float *property = d->property + 12 + 2 * (label - 1);
        if (label == 0) assert_true(mu[2 * i] == 0 && mu[2 * i + 1] == 0);
        else assert_true(mu[2 * i] == property[0] && mu[2 * i + 1] == property[1]);
        assert_true(one[i] == mu[2 * i + 1]);
        tissue += label > 0;
        tumour += label > 1;
    }
    /* the ellipsoid's volume, to the accuracy that counting voxels has */
    const nir_ellipsoid e = nir_dataset_ellipsoid(d, 1);
    assert_near("volume", tissue * 64 / (4.18879 * e.semi_axis[0] * e.semi_axis[1] * e.semi_axis[2]), 1, 0.03);
    assert_true(tumour > 0);
    nir_dataset_free(d);
}

/* The published original data (n = 1.33, 140 MHz): log amplitude falls by 0.199 per mm (0.16 to 0.30 by phantom),
   phase grows by 1.95 degrees per mm (1.4 to 2.8), from 12 to at most 80 degrees and from -6.5 to -13.5 over 10 to 40
   mm. Its amplitudes held noise, which pulls far channels down, so the means are compared to a tenth. */
static void test_measurements(void **state)
{
    (void)state;
    enum { MANY = 40 };
    nir_data_options o = options_of("full", MANY);
    double slope[2] = { 0, 0 }, least = 1;
    assert_true(nir_data_properties(&o, "seed"));
    o.preset.n = 32;
    o.preset.h = 2;
    o.preset.sources = 12;      /* of the probe's 50, for the time */
    o.preset.least_pairs = 240;
    nir_dataset *d = generate(&o, NIR_TRAIN);
    for (int64_t i = 0; i < MANY; ++i) {
        const nir_sanity s = nir_dataset_sanity(d, i);
        assert_true(s.ok);
        assert_true(s.amplitude_slope > -0.30 && s.amplitude_slope < -0.12 && s.phase_slope > 1.2 &&
                    s.phase_slope < 2.8);
        slope[0] += s.amplitude_slope / MANY;
        slope[1] += s.phase_slope / MANY;
        least = fmin(least, fmin(-s.amplitude_correlation, s.phase_correlation));
    }
    for (int64_t i = 0; i < MANY * d->pairs; ++i) {
        assert_true((double)d->log_amplitude[i] > -18 && (double)d->log_amplitude[i] < -5);
        assert_true((double)d->phase[i] > 8 && (double)d->phase[i] < 110);
    }
    print_message("# slopes %.4f and %.3f per mm (the original's -0.199 and 1.95), least correlation %.2f\n", slope[0],
                  slope[1], least);
    assert_near("slope of log amplitude", slope[0], -0.199, 0.02);
    assert_near("slope of phase", slope[1], 1.95, 0.195);
    assert_true(least > 0.8);
    nir_dataset_free(d);
}

/* Measurements that belong to other pairs are found out: here those of the detectors of the pairs before. */
static void test_sanity_finds_wrong_indices(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 20);
    nir_dataset *d = generate(&o, NIR_TRAIN);
    int found = 0;
    for (int64_t i = 0; i < 20; ++i) {
        assert_true(nir_dataset_sanity(d, i).ok);
        const int pairs = nir_dataset_pairs(d, i);
        uint16_t *pair = d->pair + 2 * i * d->pairs, first = pair[1];
        for (int k = 0; k + 1 < pairs; ++k) pair[2 * k + 1] = pair[2 * k + 3];
        pair[2 * pairs - 1] = first;
        found += !nir_dataset_sanity(d, i).ok;
    }
    assert_true(found >= 19);
    nir_dataset_free(d);
}

static void test_options_refused(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 1);
    const struct { double *field; double value; const char *message; } cases[] = {
        { &o.preset.h, -1, "h is -1" }, { &o.separation[0], 39, "no room for 8 sources" },
        { &o.separation[1], 5, "separations from 10 to 5" },
        { &o.preset.semi_axis[0], 2, "semi-axes of tumours from 2 to 12, expected a range within 3.46" },
        { &o.properties.mu_a[0], -0.1, "mu_a from -0.1" },
        { &o.properties.refractive_index, 0.5, "the refractive index is 0.5" },
        { &o.preset.tumour_free, NAN, "without tumours is nan" }, { &o.frequency_hz, -1, "the frequency is -1" } };
    for (int i = 0; i < COUNT(cases); ++i) {
        const double kept = *cases[i].field;
        *cases[i].field = cases[i].value;
        catch_stderr();
        nir_dataset *d = nir_dataset_generate(&o, NIR_TRAIN);
        release_stderr(cases[i].message);
        assert_null(d);
        *cases[i].field = kept;
    }
    catch_stderr();
    assert_false(nir_data_defaults(&o, "tiny"));
    assert_null(nir_noise_find("loud"));
    assert_false(nir_data_properties(&o, "brain"));
    release_stderr("no properties 'brain': clinical or seed");
}

/* ---- noise ---- */

static void test_noise_is_a_function(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 3);
    nir_dataset *d = generate(&o, NIR_TRAIN);
    float a[2][64], b[2][64];
    const size_t size = sizeof a[0];
    for (int i = 0; i < NIR_NOISE_PRESETS; ++i) {
        const nir_noise *noise = &nir_noise_presets[i];
        assert_ptr_equal(nir_noise_find(noise->name), noise);
        nir_noise_apply(d, 1, noise, 9, 4, a[0], a[1]);
        nir_noise_apply(d, 2, noise, 9, 4, b[0], b[1]);
        nir_noise_apply(d, 1, noise, 9, 4, b[0], b[1]);
        assert_true(memcmp(a, b, sizeof a) == 0);
        assert_int_equal(memcmp(a[0], d->log_amplitude + 64, size) == 0, i == 0);
        assert_int_equal(memcmp(a[1], d->phase + 64, size) == 0, i == 0);
        if (i == 0) continue;
        nir_noise_apply(d, 1, noise, 9, 5, b[0], b[1]);
        assert_true(a[0][0] != b[0][0] && a[1][0] != b[1][0]);
        nir_noise_apply(d, 1, noise, 10, 4, b[0], b[1]);
        assert_true(a[0][0] != b[0][0] && a[1][0] != b[1][0]);
        assert_true(nir_dataset_pairs(d, 1) < 64 && a[0][63] == 0 && a[1][63] == 0);
    }
    nir_dataset_free(d);
}

/* Mean, standard deviation and correlation of the two errors over many epochs. */
static void test_noise_has_its_size(void **state)
{
    (void)state;
    enum { EPOCHS = 2000 };
    static const struct { const char *name; double amplitude, phase; } cases[] = {
        { "low", 0.005, 0.25 }, { "default", 0.01, 0.5 }, { "high", 0.03, 2 },
        { "coupled", 0.0435890, 0.910100 } };    /* sqrt(1 %^2 + 2 (3 %)^2), sqrt(0.573^2 + 2 0.5^2) */
    nir_data_options o = options_of("smoke", 1);
    nir_dataset *d = generate(&o, NIR_TRAIN);
    const int pairs = nir_dataset_pairs(d, 0);
    for (int i = 0; i < COUNT(cases); ++i) {
        double sum[5] = { 0 }, n = 0;
        for (uint32_t epoch = 0; epoch < EPOCHS; ++epoch) {
            float la[64], phase[64];
            nir_noise_apply(d, 0, nir_noise_find(cases[i].name), 1, epoch, la, phase);
            for (int k = 0; k < pairs; ++k) {
                const double e[2] = { (double)(la[k] - d->log_amplitude[k]) / cases[i].amplitude,
                                      (double)(phase[k] - d->phase[k]) / cases[i].phase };
                const double term[5] = { e[0], e[1], e[0] * e[0], e[1] * e[1], e[0] * e[1] };
                for (int j = 0; j < 5; ++j) sum[j] += term[j];
                n += 1;
            }
        }
        /* coupling errors are common to a row of channels, so fewer draws are independent */
        const double tolerance = strcmp(cases[i].name, "coupled") == 0 ? 0.06 : 0.02;
        for (int j = 0; j < 5; ++j) assert_near("a moment of the noise", sum[j] / n, j == 2 || j == 3, tolerance);
    }
    nir_dataset_free(d);
}

/* The original's: of constant size on the amplitude, so that its logarithm suffers at the far channels; cut at 1e-8. */
static void test_noise_of_the_original(void **state)
{
    (void)state;
    enum { EPOCHS = 3000 };
    nir_data_options o = options_of("smoke", 1);
    nir_dataset *d = generate(&o, NIR_TRAIN);
    const int pairs = nir_dataset_pairs(d, 0);
    double mean = 0, squares[64] = { 0 };
    d->log_amplitude[3] = -30;
    for (int k = 0; k < pairs; ++k) mean += exp((double)d->log_amplitude[k]) / pairs;
    for (uint32_t epoch = 0; epoch < EPOCHS; ++epoch) {
        float la[64], phase[64];
        nir_noise_apply(d, 0, nir_noise_find("original"), 1, epoch, la, phase);
        for (int k = 0; k < pairs; ++k) {
            const double error = exp((double)la[k]) - exp((double)d->log_amplitude[k]);
            squares[k] += error * error / EPOCHS;
            assert_true((double)la[k] >= log(1e-8) - 1e-5 && phase[k] >= 0 && phase[k] <= 360);
        }
    }
    for (int k = 0; k < pairs; ++k)
        if (k != 3 && exp((double)d->log_amplitude[k]) > 0.03 * mean)      /* far from the cut */
            assert_near("sd of the amplitude", sqrt(squares[k]) / mean, 0.005, 0.0004);
    nir_dataset_free(d);
}

/* ---- files ---- */

static void test_round_trip(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 5);
    o.seed = 18446744073709551615u;
    o.fine = true;
    assert_true(nir_data_properties(&o, "seed"));
    nir_dataset *d = generate(&o, NIR_TEST);
    const char *path = in_folder("test.safetensors");
    assert_true(nir_dataset_save(ctx, d, path));
    nir_dataset *e = nir_dataset_load(ctx, path);
    assert_non_null(e);
    assert_true(same_phantoms(d, e, 5));
    assert_true(e->count == 5 && e->seed == d->seed && e->fine && e->grid.h == 4 && e->frequency_hz == 140e6 &&
                e->refractive_index == 1.33);
    assert_string_equal(e->preset, "smoke");
    assert_string_equal(e->properties, "seed");
    assert_string_equal(e->probe, "surround");
    assert_string_equal(e->split, "test");
    assert_string_equal(e->boundary, "haskell");
    dot_safetensors *file = dot_safetensors_open(ctx, path);
    assert_non_null(strstr(dot_safetensors_metadata(file, "code_version"), DOTOPT_VERSION));
    assert_non_null(strstr(dot_safetensors_metadata(file, "units"), "mm^-1"));
    dot_safetensors_close(file);
    nir_dataset_free(d);
    nir_dataset_free(e);
}

/* Saves a dataset with one thing changed, and sees it refused with this message. */
static void refuse(const nir_dataset *d, const char *message)
{
    const char *path = in_folder("damaged.safetensors");
    char kept[256];
    snprintf(kept, sizeof kept, "%s", path);
    assert_true(nir_dataset_save(ctx, d, kept));
    catch_stderr();
    nir_dataset *e = nir_dataset_load(ctx, kept);
    release_stderr(message);
    assert_null(e);
    assert_true(dot_ok(ctx));
}

static void test_bad_values_refused(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 2);
    nir_dataset *d = generate(&o, NIR_TEST);
    const float nan_value = NAN;
    const struct { void *at; const void *value; size_t size; const char *message; } cases[] = {
        { d->label + 5000, &(uint8_t){ 7 }, 1, "phantom 1 has label 7, expected 0 to 6" },
        { d->label + 5000, &(uint8_t){ 6 }, 1, "label 6 of phantom 1 has mu_a 0 and mu_s' 0" },
        { d->property + 12, &(float){ -0.01f }, 4, "value 12 of tensor 'property' is -0.01" },
        { d->property + 1, &(float){ 0 }, 4, "label 1 of phantom 0 has mu_a" },
        { d->property + 11, &nan_value, 4, "value 11 of tensor 'property' is nan" },
        { d->ellipsoid + 3, &(float){ 0 }, 4, "the ellipsoid of phantom 0 has semi-axis 0" },
        { d->ellipsoid + 21, &(float){ 0.5f }, 4, "phantom 1: the rotation is not orthogonal" },
        { d->tumour + 8, &(float){ 3 }, 4, "tumour of phantom 0: the rotation is not orthogonal" },
        { d->source + 30, &(float){ 31 }, 4, "source 2 of phantom 1 lies at" },
        { d->detector + 3, &nan_value, 4, "value 3 of tensor 'detector' is nan" },
        { d->pair + 2, &(uint16_t){ 8 }, 2, "pair 1 of phantom 0 is (8," },
        { d->pair + 3, &(uint16_t){ 60000 }, 2, "a detector below 8" },
        { d->pair + 4, &(uint16_t){ NIR_NO_PAIR }, 2, "expected none after a missing one" },
        { d->log_amplitude + 70, &(float){ INFINITY }, 4, "value 70 of tensor 'log_amplitude' is inf" },
        { d->phase + 2, &(float){ -1 }, 4, "value 2 of tensor 'phase' is -1, expected 0 to 3600" },
        { &d->grid.h, &(double){ -4 }, 8, "metadata 'h' is '-4', expected a number" },
        { &d->refractive_index, &(double){ NAN }, 8, "metadata 'refractive_index' is 'nan'" },
        { &d->frequency_hz, &(double){ 1e12 }, 8, "metadata 'frequency_hz'" },
    };
    for (int i = 0; i < COUNT(cases); ++i) {
        unsigned char kept[8];
        memcpy(kept, cases[i].at, cases[i].size);
        memcpy(cases[i].at, cases[i].value, cases[i].size);
        refuse(d, cases[i].message);
        memcpy(cases[i].at, kept, cases[i].size);
    }
    nir_dataset_free(d);
}

/* A file of the same tensors and metadata but one: `tensor` and `key` are left out or replaced. */
static void refuse_file(const nir_dataset *d, const char *tensor, const dot_safetensors_item *instead, const char *key,
                        const char *value, const char *message)
{
    dot_safetensors_item item[NIR_TENSORS + 1];
    char text[6][NIR_META_TEXT], path[256];
    const char *meta[NIR_META];
    int64_t *pair = (int64_t *)take(d->count * d->pairs * 2, sizeof *pair);
    int items = 0, texts = 0;
    nir_data_items(d, pair, item);
    nir_data_metadata(d, text, meta);
    for (int i = 0; i < NIR_TENSORS; ++i)
        if (!tensor || strcmp(item[i].name, tensor) != 0) item[items++] = item[i];
    if (instead) item[items++] = *instead;
    for (int i = 0; meta[i]; i += 2)
        if (!key || strcmp(meta[i], key) != 0 || value) {
            meta[texts] = meta[i];
            meta[texts + 1] = key && strcmp(meta[i], key) == 0 ? value : meta[i + 1];
            texts += 2;
        }
    meta[texts] = NULL;
    snprintf(path, sizeof path, "%s", in_folder("damaged.safetensors"));
    assert_true(dot_safetensors_write(ctx, path, item, items, meta));
    catch_stderr();
    nir_dataset *e = nir_dataset_load(ctx, path);
    release_stderr(message);
    assert_null(e);
    free(pair);
}

static void test_bad_files_refused(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 2);
    nir_dataset *d = generate(&o, NIR_TEST);
    const dot_safetensors_item wide = { "label", DOT_F32, 4, { 2, 8, 8, 8 }, d->label };
    const dot_safetensors_item small = { "label", DOT_U8, 4, { 2, 16, 16, 8 }, d->label };
    const dot_safetensors_item flat = { "phase", DOT_F32, 1, { 128 }, d->phase };
    const dot_safetensors_item few = { "source", DOT_F32, 3, { 2, 5, 3 }, d->source };
    const dot_safetensors_item extra = { "extra", DOT_U8, 1, { 4 }, d->label };
    refuse_file(d, "tumour", NULL, NULL, NULL, "no tensor 'tumour'");
    refuse_file(d, "label", NULL, NULL, NULL, "no tensor 'label'");
    refuse_file(d, "label", &wide, NULL, NULL, "tensor 'label' is F32, expected U8");
    refuse_file(d, "label", &small, NULL, NULL, "tensor 'label' has 8 in dimension 3, expected 16");
    refuse_file(d, "phase", &flat, NULL, NULL, "tensor 'phase' has rank 1, expected 2");
    refuse_file(d, "source", &few, NULL, NULL, "source 0 of phantom 1 lies at");
    refuse_file(d, NULL, &extra, NULL, NULL, "10 tensors, expected 9");
    refuse_file(d, NULL, NULL, "h", NULL, "no metadata 'h'");
    refuse_file(d, NULL, NULL, "h", "4 mm", "metadata 'h' is '4 mm', expected a number");
    refuse_file(d, NULL, NULL, "n", "15.5", "metadata 'n' is 15.5, expected a whole number");
    refuse_file(d, NULL, NULL, "n", "32", "tensor 'label' has 16 in dimension 1, expected 32");
    refuse_file(d, NULL, NULL, "format", "mnist", "metadata 'format' is 'mnist', expected 'nirdot-dataset'");
    refuse_file(d, NULL, NULL, "format_version", "2", "metadata 'format_version' is '2', expected '1'");
    refuse_file(d, NULL, NULL, "noise", "low", "metadata 'noise' is 'low', expected 'none'");
    refuse_file(d, NULL, NULL, "seed", "18446744073709551616", "metadata 'seed'");
    refuse_file(d, NULL, NULL, "fine", "maybe", "metadata 'fine' is 'maybe', expected true or false");
    refuse_file(d, NULL, NULL, "preset", "a name that is longer than all names of presets",
                "metadata 'preset' is longer than 31 bytes");
    nir_dataset_free(d);
}

/* Cut anywhere, a file is refused. */
static void test_torn_files_refused(void **state)
{
    (void)state;
    nir_data_options o = options_of("smoke", 1);
    nir_dataset *d = generate(&o, NIR_TEST);
    char path[256];
    struct stat status;
    snprintf(path, sizeof path, "%s", in_folder("torn.safetensors"));
    assert_true(nir_dataset_save(ctx, d, path));
    assert_int_equal(stat(path, &status), 0);
    for (off_t size = status.st_size - 1; size > 0; size = size * 2 / 3) {
        assert_int_equal(truncate(path, size), 0);
        catch_stderr();
        nir_dataset *e = nir_dataset_load(ctx, path);
        release_stderr("nir_dataset_load: ");
        assert_null(e);
        dot_error_clear(ctx);
    }
    catch_stderr();
    assert_null(nir_dataset_load(ctx, "no/such/file.safetensors"));
    release_stderr("no/such/file.safetensors");
    dot_error_clear(ctx);
    nir_dataset_free(d);
}

/* The fields of the header by their offsets in the standard, and the values behind it. */
static void test_nifti(void **state)
{
    (void)state;
    enum { N = 6 };
    float volume[N * N * N], value[16];
    unsigned char bytes[352 + sizeof volume + 1];
    char path[256];
    int16_t word[8];
    int32_t size;
    for (int i = 0; i < N * N * N; ++i) volume[i] = (float)i * 0.5f;
    snprintf(path, sizeof path, "%s", in_folder("volume.nii"));
    assert_true(nir_write_nifti(path, volume, N, 2.5));
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    assert_int_equal(fread(bytes, 1, sizeof bytes, file), 352 + sizeof volume);
    fclose(file);
    memcpy(&size, bytes, 4);
    assert_int_equal(size, 348);
    memcpy(word, bytes + 40, 16);
    assert_true(word[0] == 3 && word[1] == N && word[2] == N && word[3] == N && word[4] == 1);
    memcpy(word, bytes + 70, 4);
    assert_true(word[0] == 16 && word[1] == 32);
    memcpy(value, bytes + 76, 32);
    assert_true(value[0] == 1 && value[1] == 2.5f && value[2] == 2.5f && value[3] == 2.5f);
    memcpy(value, bytes + 108, 12);
    assert_true(value[0] == 352 && value[1] == 1 && value[2] == 0);
    assert_int_equal(bytes[123], 2);
    memcpy(word, bytes + 252, 4);
    assert_true(word[0] == 1 && word[1] == 1);
    memcpy(value, bytes + 280, 48);
    for (int i = 0; i < 12; ++i) assert_true(value[i] == (i % 4 == 3 ? -6.25f : i % 5 == 0 ? 2.5f : 0));
    assert_memory_equal(bytes + 344, "n+1\0\0\0\0\0", 8);
    assert_memory_equal(bytes + 352, volume, sizeof volume);
    catch_stderr();
    assert_false(nir_write_nifti("no/such/folder/v.nii", volume, N, 2.5));
    assert_false(nir_write_nifti(path, volume, 0, 2.5));
    release_stderr("nir_write_nifti: cannot write no/such/folder/v.nii");
}

/* ---- figures ---- */

/* Draws a slice of a volume in which one voxel, (x, y, z) = (1, 2, 4) of 6^3, has a colour of its own, and finds that
   where the axes' ticks say that it is. */
static void test_slice_orientation(void **state)
{
    (void)state;
    enum { N = 6, ZOOM = 5 };
    static const int place[3] = { 1, 2, 4 };
    static const int across[3] = { 1, 0, 0 }, up[3] = { 2, 2, 1 };      /* by the axis that is cut */
    plot_style style;
    if (plot_open(&style)) fail_msg("%s", style.error);
    style.dpi = 72;
    for (int axis = 0; axis < 3; ++axis) {
        unsigned colour[N * N];
        plot_canvas c;
        plot_canvas_open(&c, &style, 60, 60);
        const plot_axis grid = nir_axis_grid(N, 2);
        const nir_axes a = { 10, 20, N * ZOOM, N * ZOOM, grid, grid, NULL, NULL, 0, 0, 0 };
        for (int i = 0; i < N * N; ++i) {
            const int voxel = nir_slice_voxel(N, axis, place[axis], i % N, i / N);
            colour[i] = voxel == (place[2] * N + place[1]) * N + place[0] ? 0x123456 : 0xfedcba;
        }
        nir_slice_draw(&c, a.x, a.y, colour, N, ZOOM);
        assert_false(c.failed);
        int found = 0;
        const double x = nir_axes_x(&a, (place[across[axis]] + 0.5 - N / 2.0) * 2);
        const double y = nir_axes_y(&a, (place[up[axis]] + 0.5 - N / 2.0) * 2);
        for (int i = 0; i < c.rows * c.columns; ++i) found += memcmp(c.pixel + 3 * i, "\x12\x34\x56", 3) == 0;
        assert_int_equal(found, ZOOM * ZOOM);
        assert_memory_equal(c.pixel + 3 * ((int)y * c.columns + (int)x), "\x12\x34\x56", 3);
        assert_string_equal(nir_slice_label(axis, 0), nir_axis_names[across[axis]]);
        assert_string_equal(nir_slice_label(axis, 1), nir_axis_names[up[axis]]);
        if (plot_canvas_close(&c, &style, in_folder("slice"))) fail_msg("%s", style.error);
    }
    plot_close(&style);
}

/* The two files of a figure are whole: the PNG has a size and an end, the SVG holds these texts. */
static void check_figure(const char *error, const char *name, const char *const *text)
{
    static const unsigned char signature[8] = { 0x89, 'P', 'N', 'G', 13, 10, 26, 10 };
    static char bytes[1 << 21];
    char path[300];
    if (error) fail_msg("%s: %s", name, error);
    snprintf(path, sizeof path, "%s.png", in_folder(name));
    FILE *file = fopen(path, "rb");
    assert_non_null(file);
    size_t size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    assert_true(size > 1000 && size < sizeof bytes && memcmp(bytes, signature, 8) == 0);
    assert_memory_equal(bytes + size - 8, "IEND\xae\x42\x60\x82", 8);
    snprintf(path, sizeof path, "%s.svg", in_folder(name));
    file = fopen(path, "rb");
    assert_non_null(file);
    size = fread(bytes, 1, sizeof bytes - 1, file);
    fclose(file);
    bytes[size] = 0;
    assert_string_equal(bytes + size - 7, "</svg>\n");
    for (; *text; ++text)
        if (!strstr(bytes, *text)) fail_msg("%s.svg does not show '%s'", name, *text);
}

static void test_figures_of_a_phantom(void **state)
{
    (void)state;
    ball *b = ball_make(true);
    plot_style style;
    if (plot_open(&style)) fail_msg("%s", style.error);
    style.dpi = 72;
    for (int i = 0; i < 2 * VOXELS; ++i) b->image[i] *= 1.1f;
    const nir_slices_figure slices = { "A & B", SIDE, 3, b->label, b->truth, { b->truth, b->image },
                                       { "first", "second" }, 2, 2, -1 };
    check_figure(nir_figure_slices(&style, in_folder("slices"), &slices), "slices",
                 (const char *const[]){ "A &amp; B", "truth, z = \u22124.5 mm", "first", "second \u2212 truth",
                                        "x (mm)", "y (mm)", nir_channel_names[0], nir_channel_names[1], NULL });
    const nir_sensitivity_figure sensitivity = { NULL, SIDE, 3, b->label, b->sensitivity, b->ellipsoid, b->ellipsoid,
                                                 1, 1, { 4, -1, -1 } };
    check_figure(nir_figure_sensitivity(&style, in_folder("sensitivity"), &sensitivity), "sensitivity",
                 (const char *const[]){ "x = \u221216.5 mm", "source", "detector", "1 % of the largest", "0.001",
                                        NULL });
    nir_slices_figure bad = slices;
    bad.slice = SIDE;
    assert_non_null(strstr(nir_figure_slices(&style, in_folder("bad"), &bad), "slice 20, expected"));
    memset(b->sensitivity, 0, sizeof b->sensitivity);
    assert_non_null(strstr(nir_figure_sensitivity(&style, in_folder("bad"), &sensitivity), "no positive value"));
    assert_non_null(strstr(nir_figure_slices(&style, "no/such/folder/f", &slices), "cannot write no/such/folder/f"));
    plot_close(&style);
    free(b);
}

static void test_figures_of_training(void **state)
{
    (void)state;
    enum { STEPS = 50 };
    static const double x[3] = { 10, 20, 40 }, y[3] = { -6, -8, NAN }, phase[3] = { 20, 40, 80 };
    static const float position[9] = { 0, 0, 20, 0, 20, 0, 20, 0, 0 };
    static const float shape[15] = { 0, 0, 0, 25, 20, 20, 1, 0, 0, 0, 1, 0, 0, 0, 1 };
    static const uint8_t is_source[3] = { 1, 0, 0 };
    double step[STEPS], norm[STEPS], lr[STEPS], attention[6] = { 0.2, 0.3, 0.5, 1, 0, 0 };
    plot_style style;
    if (plot_open(&style)) fail_msg("%s", style.error);
    style.dpi = 72;
    for (int i = 0; i < STEPS; ++i) {
        step[i] = i;
        norm[i] = i < 5 ? 2 : i == 9 ? NAN : 0.5;
        lr[i] = 1e-3 * (i + 1);
    }
    const nir_separation_figure separation = { NULL, x, y, phase, 3, x, y, phase, 2, "half-space", NULL };
    check_figure(nir_figure_separation(&style, in_folder("separation"), &separation), "separation",
                 (const char *const[]){ "ln amplitude", "phase (degrees)", "half-space", "measured", NULL });
    const nir_learning_figure learning = { "Stage 1", x, { phase, y }, { "training", "validation" }, 3, 2, "RMSE", 0,
                                           step, lr, norm, STEPS };
    check_figure(nir_figure_learning(&style, in_folder("learning"), &learning), "learning",
                 (const char *const[]){ "training", "validation", "RMSE", "learning rate", "\u03b2\u2081",
                                        "epoch", NULL });
    const nir_gradient_figure gradient = { NULL, step, norm, STEPS, 1 };    /* 5 of 49 finite steps */
    check_figure(nir_figure_gradient(&style, in_folder("gradient"), &gradient), "gradient",
                 (const char *const[]){ "clipped above 1: 10.2 % of steps", "before clipping", "step", NULL });
    const nir_attention_figure pooling = { NULL, position, is_source, attention, 3, 2, shape };
    check_figure(nir_figure_attention(&style, in_folder("attention"), &pooling), "attention",
                 (const char *const[]){ "query 1", "query 2", "share of attention", "z (mm)", "y (mm)", NULL });
    attention[3] = -0.5;
    assert_non_null(strstr(nir_figure_attention(&style, in_folder("bad"), &pooling), "value 3 is -0.5, expected 0"));
    plot_close(&style);
}

static int setup(void **state)
{
    (void)state;
    ctx = dot_context_create(NULL);
    golden_file = ctx ? dot_safetensors_open(ctx, GOLDEN) : NULL;
    return !golden_file || !mkdtemp(folder);
}

static int teardown(void **state)
{
    (void)state;
    char command[64];
    dot_safetensors_close(golden_file);
    dot_context_destroy(ctx);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_truth_as_image), cmocka_unit_test(test_constant_error),
        cmocka_unit_test(test_ssim_of_constants), cmocka_unit_test(test_homogeneous_image),
        cmocka_unit_test(test_components), cmocka_unit_test(test_a_lesion_missed), cmocka_unit_test(test_crosstalk),
        cmocka_unit_test(test_window_that_does_not_fit), cmocka_unit_test(test_golden_scores),
        cmocka_unit_test(test_golden_matching), cmocka_unit_test(test_golden_depth),
        cmocka_unit_test(test_statistics), cmocka_unit_test(test_diagnostics), cmocka_unit_test(test_random_numbers),
        cmocka_unit_test(test_rotations),
        cmocka_unit_test(test_surface_points), cmocka_unit_test(test_apart), cmocka_unit_test(test_phantoms),
        cmocka_unit_test(test_volume_statistics), cmocka_unit_test(test_optodes), cmocka_unit_test(test_threads),
        cmocka_unit_test(test_fine), cmocka_unit_test(test_volume), cmocka_unit_test(test_measurements),
        cmocka_unit_test(test_sanity_finds_wrong_indices), cmocka_unit_test(test_options_refused),
        cmocka_unit_test(test_noise_is_a_function), cmocka_unit_test(test_noise_has_its_size),
        cmocka_unit_test(test_noise_of_the_original), cmocka_unit_test(test_round_trip),
        cmocka_unit_test(test_bad_values_refused), cmocka_unit_test(test_bad_files_refused),
        cmocka_unit_test(test_torn_files_refused), cmocka_unit_test(test_nifti),
        cmocka_unit_test(test_slice_orientation), cmocka_unit_test(test_figures_of_a_phantom),
        cmocka_unit_test(test_figures_of_training),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
