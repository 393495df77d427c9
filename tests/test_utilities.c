/* The training utilities: against the golden numbers that golden/make_utilities.py makes with PyTorch and NumPy, in both types, for
   every number of threads and lanes, saved and resumed bit for bit, with bad input, and without allocation after the first step. */
#include "dotopt.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "nets.h"

#define GOLDEN "tests/golden/utilities.safetensors"
enum { STEPS = 14, MOST = 256, BN = 4 };

static dot_context *golden_context;
static dot_safetensors *golden_file;

/* ---- helpers ------------------------------------------------------------------------------------------------------ */

static void require(const dot_context *ctx, bool condition, const char *what)
{
    if (!condition || !dot_ok(ctx))
        fail_msg("%s: %s", what, ctx ? dot_error(ctx) : "no context");
}

/* The golden tensor "case.name", or with index >= 0 "case<index>.name"; returns its elements. */
static int64_t golden(const char *set, int index, const char *name, double *out)
{
    char full[160], number[16] = "";
    dot_safetensors_entry e;
    if (index >= 0)
        snprintf(number, sizeof number, "%d", index);
    snprintf(full, sizeof full, "%s%s%s%s", set, number, *name ? "." : "", name);
    int at = dot_safetensors_find(golden_file, full);
    if (at < 0 || !dot_safetensors_entry_at(golden_file, at, &e) || e.count > MOST)
        fail_msg("%s: no tensor '%s'", GOLDEN, full);
    require(golden_context, dot_safetensors_read_double(golden_file, at, out, e.count), full);
    return e.count;
}

static dot_context *open_context(dot_dtype dtype, int threads, int lanes, const uint64_t *seeds)
{
    dot_context_options o = dot_context_defaults();
    o.dtype = dtype;
    o.threads = threads;
    o.lanes = lanes;
    o.lane_seeds = seeds;
    o.flush_denormals = false;
    dot_context *ctx = dot_context_create(&o);
    require(ctx, ctx != NULL, "dot_context_create");
    return ctx;
}

/* The network of make_utilities.py. */
static dot_layer *network(dot_context *ctx)
{
    dot_conv_options conv = dot_conv_defaults();
    return dot_nn_sequential(ctx, dot_nn_conv2d(ctx, 2, 3, &conv), dot_nn_relu(ctx), dot_nn_flatten(ctx), dot_nn_linear(ctx, 12, 5),
                             dot_nn_batch_norm(ctx, 5), dot_nn_linear(ctx, 5, 2), NULL);
}

typedef struct bench { dot_context *ctx; dot_layer *net; dot_optimizer *opt; } bench;

static bench open_bench(dot_dtype dtype, double momentum)
{
    bench b;
    dot_optimizer_options o = dot_optimizer_defaults(DOT_MOMENTUM);
    o.lr = 0.1;
    o.beta1 = momentum;
    b.ctx = open_context(dtype, 2, 1, NULL);
    b.net = network(b.ctx);
    b.opt = dot_optimizer_create(b.ctx, b.net, &o);
    require(b.ctx, b.opt != NULL, "open_bench");
    return b;
}

static bool is_buffer(const dot_parameter_info *info)
{
    return info->kind == DOT_KIND_BUFFER;
}

/* theta = golden theta + scale * grad<step> */
static void set_theta(bench *b, int step, double scale)
{
    for (int i = 0; i < dot_layer_parameters(b->net); ++i) {
        dot_parameter_info info;
        double t[MOST], g[MOST];
        assert_true(dot_layer_parameter(b->net, i, &info));
        if (is_buffer(&info))
            continue;
        int64_t n = golden("theta", -1, info.name, t);
        golden("grad", step, info.name, g);
        for (int64_t j = 0; j < n; ++j)
            t[j] += scale * g[j];
        assert_true(dot_parameter_set(b->net, info.name, DOT_ALL, t, n));
    }
}

/* Gradients as dot_backward leaves them. */
static void set_grads(bench *b, int step)
{
    for (int i = 0; i < dot_layer_parameters(b->net); ++i) {
        dot_parameter_info info;
        double g[MOST];
        assert_true(dot_layer_parameter(b->net, i, &info));
        if (is_buffer(&info))
            continue;
        int64_t n = golden("grad", step, info.name, g);
        assert_true(dot_parameter_set_grad(b->net, info.name, DOT_ALL, g, n));
    }
}

static double tolerance(const bench *b) { return dot_context_dtype(b->ctx) == DOT_F64 ? 1e-12 : 2e-6; }

static void check_values(const bench *b, const char *what, const char *name, const double *ours, const double *expected, int64_t n, double factor)
{
    double size = 0;
    for (int64_t i = 0; i < n; ++i)
        size = fmax(size, fabs(expected[i]));
    for (int64_t i = 0; i < n; ++i)
        if (!(fabs(ours[i] - expected[i]) <= factor * tolerance(b) * size))
            fail_msg("%s.%s[%d] is %.17g, expected %.17g", what, name, (int)i, ours[i], expected[i]);
}

/* All parameters (or gradients) against the golden case. */
static void check(const bench *b, const char *set, int index, bool gradient, bool buffers)
{
    for (int i = 0; i < dot_layer_parameters(b->net); ++i) {
        dot_parameter_info info;
        double ours[MOST], expected[MOST];
        assert_true(dot_layer_parameter(b->net, i, &info));
        if (dot_tensor_dtype(info.tensor) == DOT_I64 || (is_buffer(&info) && !buffers))
            continue;
        int64_t n = golden(set, index, info.name, expected);
        assert_true((gradient ? dot_parameter_grad : dot_parameter_get)(b->net, info.name, 0, ours, n));
        check_values(b, set, info.name, ours, expected, n, 1);
    }
}

static void assert_error(dot_context *ctx, dot_status status, const char *text)
{
    if (dot_error_status(ctx) != status || !strstr(dot_error(ctx), text))
        fail_msg("error %d \"%s\", expected %d with \"%s\"", (int)dot_error_status(ctx), dot_error(ctx), (int)status, text);
    dot_error_clear(ctx);
}

static const dot_dtype dtypes[] = { DOT_F64, DOT_F32 };

/* ---- golden numbers -------------------------------------------------------------------------------------------------- */

static void test_gradient_stages(void **state)
{
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b = open_bench(dtypes[d], 0);
        set_theta(&b, 0, 0);
        set_grads(&b, 0);
        assert_true(dot_clip_grad_value(b.opt, 0.3));
        check(&b, "clip_value", -1, true, false);
        set_grads(&b, 0);
        assert_true(dot_clip_grad_rms(b.opt, 0.05));
        check(&b, "clip_rms", -1, true, false);
        set_grads(&b, 0);
        assert_true(dot_clip_grad_adaptive(b.opt, 0.05, 1e-3, NULL));
        check(&b, "clip_adaptive", -1, true, false);
        set_grads(&b, 0);
        assert_true(dot_clip_grad_adaptive(b.opt, 0.05, 1e-3, "*"));
        check(&b, "grad0", -1, true, false);
        assert_true(dot_centralize_grad(b.opt));
        check(&b, "centralize", -1, true, false);
        require(b.ctx, true, "stages");
        dot_context_destroy(b.ctx);
    }
}

static void test_nan_is_not_clipped_away(void **state)
{
    (void)state;
    bench b = open_bench(DOT_F32, 0);
    set_grads(&b, 0);
    dot_parameter_info info;
    assert_true(dot_layer_parameter(b.net, 0, &info));
    ((float *)dot_tensor_data(dot_tensor_grad(info.tensor), 0))[3] = (float)NAN;
    assert_true(dot_clip_grad_value(b.opt, 0.3) && dot_clip_grad_rms(b.opt, 0.05) && dot_clip_grad_adaptive(b.opt, 0.05, 1e-3, NULL));
    assert_true(isnan(((float *)dot_tensor_data(dot_tensor_grad(info.tensor), 0))[3]));
    dot_context_destroy(b.ctx);
}

static void test_grokfast(void **state)
{
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b = open_bench(dtypes[d], 0);
        dot_grokfast *g = dot_grokfast_create(b.opt, NULL);
        for (int s = 0; s < 4; ++s) {
            set_grads(&b, s);
            assert_true(dot_grokfast_filter(g));
            check(&b, "grokfast", s, true, false);
        }
        dot_context_destroy(b.ctx);
    }
}

typedef struct average_case { const char *name; dot_average_kind kind; double decay; bool warmup; int64_t every; bool buffers; } average_case;

static void set_buffers(bench *b, int step)
{
    static const char *const names[] = { "4.running_mean", "4.running_var" };
    for (int i = 0; i < 2; ++i) {
        double v[MOST];
        int64_t n = golden("buffer", step, names[i], v);
        assert_true(dot_parameter_set(b->net, names[i], DOT_ALL, v, n));
    }
}

static void test_averages(void **state)
{
    static const average_case cases[] = {
        { "swa", DOT_AVERAGE_SWA, 0.5, false, 1, false }, { "swa_buffers", DOT_AVERAGE_SWA, 0.5, false, 1, true },
        { "ema", DOT_AVERAGE_EMA, 0.9, false, 1, false }, { "ema_every3", DOT_AVERAGE_EMA, 0.9, false, 3, false },
        { "ema_warmup", DOT_AVERAGE_EMA, 0.7, true, 1, false },
    };
    (void)state;
    for (int i = 0; i < 10; ++i) {
        const average_case *c = &cases[i / 2];
        bench b = open_bench(dtypes[i % 2], 0);
        dot_average_options o = dot_average_defaults();
        o.kind = c->kind;
        o.decay = c->decay;
        o.warmup = c->warmup;
        o.gamma = 2;
        o.every = c->every;
        o.buffers = c->buffers;
        dot_average *a = dot_average_create(b.net, &o);
        for (int s = 0; s < STEPS; ++s) {
            set_theta(&b, s, 0.1);
            set_buffers(&b, s);
            assert_true(dot_average_update(a));
        }
        assert_int_equal(dot_average_count(a), c->every == 3 ? 4 : STEPS);
        double before[MOST], after[MOST];
        assert_true(dot_parameter_get(b.net, "3.weight", 0, before, 60) && dot_average_swap(a));
        check(&b, c->name, -1, false, true);
        assert_false(dot_average_update(a));
        assert_error(b.ctx, DOT_ERROR_STATE, "dot_average_update: the layer and the module object have changed places");
        assert_true(dot_average_swap(a) && dot_parameter_get(b.net, "3.weight", 0, after, 60));
        assert_memory_equal(before, after, 60 * sizeof(double));
        dot_context_destroy(b.ctx);
    }
}

static int64_t fail_at = -1;

static bool statistics_batch(void *user, int64_t index)
{
    bench *b = (bench *)user;
    double x[MOST];
    float narrow[MOST];
    int64_t n = golden("batch", (int)index, "", x), shape[4] = { n / 32, 4, 4, 2 };
    for (int64_t i = 0; i < n; ++i)
        narrow[i] = (float)x[i];
    dot_step_begin(b->ctx);
    const void *data = dot_context_dtype(b->ctx) == DOT_F64 ? (const void *)x : (const void *)narrow;
    return dot_forward(b->net, dot_input(b->ctx, dot_context_dtype(b->ctx), 4, shape, data)) != NULL && index != fail_at;
}

/* What chance does in the next training step. */
static double next_draw(dot_context *ctx)
{
    float numbers[64];
    int64_t shape[1] = { 64 };
    for (int i = 0; i < 64; ++i)
        numbers[i] = (float)i;
    dot_step_begin(ctx);
    return dot_item(dot_sum(dot_dropout(dot_input(ctx, DOT_F32, 1, shape, numbers), 0.5), DOT_ALL_AXES, false), 0);
}

static void test_batch_norm_statistics(void **state)
{
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b = open_bench(dtypes[d], 0);
        double ours[5], expected[5];
        static const char *const names[] = { "4.running_mean", "4.running_var" };
        set_theta(&b, 0, 0);
        set_buffers(&b, 0);
        fail_at = 1;
        assert_false(dot_batch_norm_recompute(b.net, statistics_batch, &b, 3));
        for (int i = 0; i < 2; ++i) {
            golden("buffer0", -1, names[i], expected);
            assert_true(dot_parameter_get(b.net, names[i], 0, ours, 5));
            check_values(&b, "kept", names[i], ours, expected, 5, 1);
        }
        fail_at = -1;
        require(b.ctx, dot_batch_norm_recompute(b.net, statistics_batch, &b, 3), "dot_batch_norm_recompute");
        bench other = open_bench(dtypes[d], 0);         /* it counts as no training step */
        double draw = next_draw(other.ctx);
        assert_true(next_draw(b.ctx) == draw && next_draw(b.ctx) != draw);
        dot_context_destroy(other.ctx);
        for (int i = 0; i < 2; ++i) {
            golden("update_bn", -1, names[i], expected);
            assert_true(dot_parameter_get(b.net, names[i], 0, ours, 5));
            check_values(&b, "update_bn", names[i], ours, expected, 5, 1);
        }
        assert_true(dot_parameter_get(b.net, "4.num_batches_tracked", 0, ours, 1) && ours[0] == 3);
        dot_context_destroy(b.ctx);
    }
}

static void test_lookahead(void **state)
{
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b = open_bench(dtypes[d], 0);
        set_theta(&b, 0, 0);
        dot_lookahead *l = dot_lookahead_create(b.opt, NULL);
        for (int s = 0; s < STEPS; ++s) {
            set_grads(&b, s);
            assert_true(dot_optimizer_step(b.opt, 1) && dot_lookahead_update(l));
        }
        check(&b, "lookahead", -1, false, false);
        dot_context_destroy(b.ctx);
    }
}

static void test_mechanic(void **state)
{
    static const char *const names[] = { "mechanic", "mechanic_options" };
    (void)state;
    for (int d = 0; d < 2; ++d)
        for (int c = 0; c < 2; ++c) {
            bench b = open_bench(dtypes[d], 0.9);
            double scales[4 * STEPS];
            dot_mechanic_options o = dot_mechanic_defaults();
            o.s_init = c ? 0.1 : 1e-3;
            if (c) {
                o.weight_decay = 0.3;
                o.betas = 3;
                o.eps = 1e-4;
            }
            set_theta(&b, 0, 0);
            dot_mechanic *m = dot_mechanic_create(b.opt, &o);
            assert_int_equal(golden(names[c], -1, "scale", scales), 4 * STEPS);
            for (int s = 0; s < 4 * STEPS; ++s) {
                set_grads(&b, s % 3);
                assert_true(dot_mechanic_step(m, 1));
                double ours = dot_mechanic_scale(m, 0);
                check_values(&b, names[c], "scale", &ours, &scales[s], 1, 10);
            }
            check(&b, names[c], -1, false, false);
            dot_context_destroy(b.ctx);
        }
}

static void test_sam(void **state)
{
    static const char *const names[] = { "sam", "asam", "asam_eta" };
    (void)state;
    for (int i = 0; i < 6; ++i) {
        bench b = open_bench(dtypes[i % 2], 0);
        dot_sam_options o = dot_sam_defaults();
        o.adaptive = i / 2 > 0;
        o.rho = i / 2 > 0 ? 0.5 : 0.05;
        o.eta = i / 2 == 2 ? 0.01 : 0;
        dot_sam *sam = dot_sam_create(b.opt, &o);
        double before[60], after[60], one = 7;
        set_theta(&b, 0, 0);
        set_grads(&b, 0);
        dot_parameter_get(b.net, "3.weight", 0, before, 60);
        require(b.ctx, dot_sam_ascend(sam), "dot_sam_ascend");
        check(&b, names[i / 2], -1, false, false);
        dot_parameter_set(b.net, "4.num_batches_tracked", 0, &one, 1);       /* the second pass's statistics go */
        assert_false(dot_sam_ascend(sam));
        assert_error(b.ctx, DOT_ERROR_STATE, "dot_sam_ascend: the layer and the sam object");
        set_grads(&b, 1);
        assert_true(dot_sam_descend(sam));
        dot_parameter_get(b.net, "3.weight", 0, after, 60);
        assert_memory_equal(before, after, sizeof before);
        dot_parameter_get(b.net, "4.num_batches_tracked", 0, &one, 1);
        assert_true(one == 0);
        assert_true(dot_optimizer_step(b.opt, 1));
        check(&b, "sam_step", -1, false, false);
        assert_false(dot_sam_descend(sam));
        assert_error(b.ctx, DOT_ERROR_STATE, "dot_sam_descend: the parameters are where they were");
        dot_context_destroy(b.ctx);
    }
}

static dot_tensor *identity(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user;
    (void)layer;
    return x;
}

/* Units in every layout of parameters, flattened, unflattened, transposed, grouped: centralised, each has
   the mean 0. */
static void test_units_of_every_layer(void **state)
{
    (void)state;
    dot_context *ctx = open_context(DOT_F64, 2, 1, NULL);
    dot_conv_options grouped = dot_conv_defaults();
    grouped.groups = 2;
    dot_layer *net = dot_nn_custom(ctx, "all", identity, NULL);
    assert_true(dot_layer_add_child(net, "auto", build_autoencoder(ctx, 3, 4, 70)));
    assert_true(dot_layer_add_child(net, "conv1", dot_nn_conv1d(ctx, 2, 4, &grouped)));
    assert_true(dot_layer_add_child(net, "conv3", dot_nn_conv3d(ctx, 2, 3, NULL)));
    assert_true(dot_layer_add_child(net, "transpose", dot_nn_conv_transpose2d(ctx, 4, 6, &grouped)));
    assert_true(dot_layer_add_child(net, "embedding", dot_nn_embedding(ctx, 5, 7)));
    dot_optimizer *opt = dot_optimizer_create(ctx, net, NULL);
    require(ctx, opt != NULL, "net");
    for (int i = 0; i < dot_layer_parameters(net); ++i) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(net, i, &info));
        double *g = (double *)calloc((size_t)dot_tensor_size(info.tensor), sizeof *g);
        assert_non_null(g);
        for (int64_t j = 0; j < dot_tensor_size(info.tensor); ++j)
            g[j] = dot_random_uniform(1, (uint64_t)i, (uint64_t)j);
        assert_true(dot_parameter_set_grad(net, info.name, 0, g, dot_tensor_size(info.tensor)));
        free(g);
    }
    assert_true(dot_centralize_grad(opt));
    for (int i = 0; i < dot_layer_parameters(net); ++i) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(net, i, &info));
        int64_t n = dot_tensor_size(info.tensor), length = n / info.shape[0];
        double *g = (double *)calloc((size_t)n, sizeof *g);
        assert_non_null(g);
        assert_true(dot_parameter_grad(net, info.name, 0, g, n));
        for (int64_t u = 0; info.rank >= 2 && u < info.shape[0]; ++u) {
            double sum = 0;
            for (int64_t j = 0; j < length; ++j)
                sum += g[u * length + j];
            if (!(fabs(sum) < 1e-12 * (double)length))
                fail_msg("%s: unit %d sums to %g", info.name, (int)u, sum);
        }
        free(g);
    }
    dot_context_destroy(ctx);
}

static void test_scaler(void **state)
{
    (void)state;
    double bad[64], scale[64], theta[64], w[1] = { 0 };
    int64_t n = golden("scaler.bad", -1, "", bad), one = 1;
    golden("scaler.scale", -1, "", scale);
    golden("scaler.theta", -1, "", theta);
    dot_context *ctx = open_context(DOT_F32, 1, 1, NULL);
    dot_layer *layer = dot_nn_custom(ctx, "one", identity, NULL);
    dot_tensor *p = dot_layer_add_parameter(layer, "p", DOT_KIND_WEIGHT, 1, &one);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_SGD);
    o.lr = 1;
    dot_guard_options g = dot_guard_loss_scaling();
    g.interval = 3;
    dot_guard *guard = dot_guard_create(dot_optimizer_create(ctx, layer, &o), &g);
    require(ctx, guard != NULL, "dot_guard_create");
    for (int64_t i = 0; i < n; ++i) {
        float factor = bad[i] != 0 ? (float)INFINITY : 1.0f;
        dot_step_begin(ctx);
        dot_tensor *loss = dot_sum(dot_mul(p, dot_input(ctx, DOT_F32, 1, &one, &factor)), DOT_ALL_AXES, false);
        require(ctx, dot_backward(dot_guard_loss(guard, loss)) && dot_guard_step(guard, 1), "dot_guard_step");
        assert_true(dot_guard_scale(guard, 0) == scale[i]);
        assert_true(dot_guard_skipped(guard, 0) == (bad[i] != 0));
        assert_true(dot_tensor_get(p, 0, w, 1) && w[0] == theta[i]);
    }
    assert_int_equal(dot_guard_skips(guard, 0), 4);
    dot_context_destroy(ctx);
}

static void test_telemetry(void **state)
{
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b = open_bench(dtypes[d], 0.9);
        double expected[2];
        golden("telemetry", -1, "", expected);
        set_theta(&b, 0, 0);
        dot_telemetry *t = dot_telemetry_create(b.opt, 2);
        assert_int_equal(dot_telemetry_latest(t, 0).step, -1);
        for (int s = 0; s < 3; ++s) {
            set_grads(&b, s);
            if (s == 1) {                   /* clipped, but to what it was */
                double norm = dot_grad_norm(b.opt, 0);
                dot_clip_grad_norm(b.opt, (norm + 1e-6) * (1 - 1e-15));
            }
            assert_true(dot_telemetry_before(t) && dot_optimizer_step(b.opt, 1) && dot_telemetry_after(t));
        }
        dot_telemetry_report r = dot_telemetry_latest(t, 0);
        assert_int_equal(r.step, 3);
        check_values(&b, "telemetry", "ratio", &r.update_ratio, &expected[0], 1, 1);
        check_values(&b, "telemetry", "cosine", &r.cosine, &expected[1], 1, 10);
        assert_true(r.clipped > 0.33 && r.clipped < 0.34);
        dot_context_destroy(b.ctx);
    }
}

/* ---- accumulation ---------------------------------------------------------------------------------------------------- */

/* loss = mean over rows of the squares of a layer's outputs, of rows [from, to) of eight. */
static dot_tensor *rows_loss(dot_context *ctx, dot_layer *net, int from, int to)
{
    double x[24];
    float narrow[24];
    for (int i = 0; i < 24; ++i)
        narrow[i] = (float)(x[i] = sin(1.0 + i));
    int64_t shape[2] = { to - from, 3 };
    const void *data = dot_context_dtype(ctx) == DOT_F64 ? (const void *)(x + from * 3) : (const void *)(narrow + from * 3);
    return dot_mean(dot_square(dot_forward(net, dot_input(ctx, dot_context_dtype(ctx), 2, shape, data))), DOT_ALL_AXES, false);
}

static void test_accumulation_is_the_whole_batch(void **state)
{
    static const int cut[] = { 0, 3, 4, 8 };
    (void)state;
    for (int d = 0; d < 2; ++d) {
        bench b;
        b.ctx = open_context(dtypes[d], 2, 1, NULL);
        b.net = dot_nn_sequential(b.ctx, dot_nn_linear(b.ctx, 3, 4), dot_nn_tanh(b.ctx), dot_nn_linear(b.ctx, 4, 2), NULL);
        b.opt = dot_optimizer_create(b.ctx, b.net, NULL);
        double whole[12], parts[12];
        dot_step_begin(b.ctx);
        assert_true(dot_backward(rows_loss(b.ctx, b.net, 0, 8)) && dot_parameter_grad(b.net, "0.weight", 0, whole, 12));
        dot_zero_grad(b.net);
        dot_accumulation a = { 0 };
        for (int i = 0; i < 3; ++i) {
            dot_step_begin(b.ctx);
            assert_true(dot_backward(dot_accumulate(&a, rows_loss(b.ctx, b.net, cut[i], cut[i + 1]), cut[i + 1] - cut[i])));
        }
        assert_true(a.weight == 8);
        require(b.ctx, dot_accumulate_finish(&a, b.opt), "dot_accumulate_finish");
        assert_true(dot_parameter_grad(b.net, "0.weight", 0, parts, 12) && a.weight == 0);
        check_values(&b, "accumulate", "0.weight", parts, whole, 12, 1);
        assert_false(dot_accumulate_finish(&a, b.opt));
        assert_error(b.ctx, DOT_ERROR_STATE, "dot_accumulate_finish: sum of weights 0");
        assert_null(dot_accumulate(&a, rows_loss(b.ctx, b.net, 0, 1), -2));
        assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_accumulate: weight -2");
        dot_context_destroy(b.ctx);
    }
}

/* ---- all of it together: the same bits over threads, lanes, and a saved run ----------------------------------------------- */

typedef struct run {
    dot_context *ctx;
    dot_layer *net;
    dot_optimizer *opt;
    dot_grokfast *grokfast;
    dot_average *average;
    dot_lookahead *lookahead;
    dot_sam *sam;
    dot_guard *guard;
    dot_telemetry *telemetry;
} run;

enum { WIDE = 300, RUN_STEPS = 12 };        /* more than one piece in a parameter */

static run open_run(int threads, int lanes, const uint64_t *seeds)
{
    run r;
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAMW);
    dot_average_options average = dot_average_defaults();
    dot_lookahead_options lookahead = dot_lookahead_defaults();
    dot_guard_options guard = dot_guard_loss_scaling();
    average.decay = 0.8;
    average.warmup = true;
    lookahead.k = 3;
    guard.interval = 4;
    r.ctx = open_context(DOT_F32, threads, lanes, seeds);
    r.net = dot_nn_sequential(r.ctx, dot_nn_linear(r.ctx, 8, WIDE), dot_nn_batch_norm(r.ctx, WIDE), dot_nn_dropout(r.ctx, 0.1),
                              dot_nn_linear(r.ctx, WIDE, 100), NULL);
    r.opt = dot_optimizer_create(r.ctx, r.net, &o);
    r.grokfast = dot_grokfast_create(r.opt, NULL);
    r.average = dot_average_create(r.net, &average);
    r.lookahead = dot_lookahead_create(r.opt, &lookahead);
    r.sam = dot_sam_create(r.opt, NULL);
    r.guard = dot_guard_create(r.opt, &guard);
    r.telemetry = dot_telemetry_create(r.opt, 2);
    require(r.ctx, r.telemetry != NULL, "open_run");
    return r;
}

static dot_tensor *run_loss(run *r, int step, int part)
{
    float x[6 * 8];
    int64_t shape[2] = { 6, 8 };
    for (int i = 0; i < 48; ++i)
        x[i] = (float)sin(i * 0.7 + step * 1.3 + part * 0.1);
    dot_step_begin(r->ctx);
    return dot_mean(dot_square(dot_add_scalar(dot_forward(r->net, dot_input(r->ctx, DOT_F32, 2, shape, x)), -1)), DOT_ALL_AXES, false);
}

/* Lanes whose seed is 3 get a gradient that is not finite at step 2, seed 5 at steps 3 and 4. */
static void spoil(run *r, int step)
{
    dot_parameter_info info;
    assert_true(dot_layer_parameter(r->net, 0, &info));
    for (int lane = 0; lane < dot_lanes(r->ctx); ++lane)
        if ((dot_lane_seed(r->ctx, lane) == 3 && step == 2) || (dot_lane_seed(r->ctx, lane) == 5 && (step == 3 || step == 4)))
            ((float *)dot_tensor_data(dot_tensor_grad(info.tensor), lane))[1] = (float)INFINITY;
}

static void run_step(run *r, int step)
{
    dot_accumulation a = { 0 };
    bool ok = dot_backward(run_loss(r, step, 0)) && dot_sam_ascend(r->sam);
    for (int part = 0; part < 2; ++part)
        ok = ok && dot_backward(dot_guard_loss(r->guard, dot_accumulate(&a, run_loss(r, step, part), part + 1)));
    ok = ok && dot_sam_descend(r->sam) && dot_accumulate_finish(&a, r->opt);
    spoil(r, step);
    ok = ok && dot_guard_unscale(r->guard) && dot_centralize_grad(r->opt) && dot_grokfast_filter(r->grokfast);
    ok = ok && dot_clip_grad_adaptive(r->opt, 0.1, 1e-3, NULL) && dot_clip_grad_rms(r->opt, 1) && dot_clip_grad_value(r->opt, 0.2);
    dot_clip_grad_norm(r->opt, 0.5);
    ok = ok && dot_telemetry_before(r->telemetry) && dot_guard_step(r->guard, 1) && dot_telemetry_after(r->telemetry)
        && dot_lookahead_update(r->lookahead) && dot_average_update(r->average);
    require(r->ctx, ok, "run_step");
}

/* Weights, average and numbers of one lane, as bytes. */
static size_t run_bytes(run *r, int lane, uint8_t *out)
{
    size_t used = 0;
    for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < dot_layer_parameters(r->net); ++i) {
            dot_parameter_info info;
            assert_true(dot_layer_parameter(r->net, i, &info));
            size_t bytes = (size_t)dot_tensor_size(info.tensor) * dot_dtype_size(dot_tensor_dtype(info.tensor));
            memcpy(out + used, dot_tensor_data(info.tensor, lane), bytes);
            used += bytes;
        }
        assert_true(dot_average_swap(r->average));
    }
    dot_telemetry_report t = dot_telemetry_latest(r->telemetry, lane);
    double numbers[5] = { dot_guard_scale(r->guard, lane), (double)dot_guard_skips(r->guard, lane), t.update_ratio, t.cosine, t.clipped };
    memcpy(out + used, numbers, sizeof numbers);
    return used + sizeof numbers;
}

static uint8_t *run_whole(int threads, int lanes, const uint64_t *seeds, size_t *bytes)
{
    run r = open_run(threads, lanes, seeds);
    uint8_t *out = (uint8_t *)calloc((size_t)lanes, 1 << 20);
    assert_non_null(out);
    for (int s = 0; s < RUN_STEPS; ++s)
        run_step(&r, s);
    for (int lane = 0; lane < lanes; ++lane) {
        int64_t skips = dot_lane_seed(r.ctx, lane) == 3 ? 1 : dot_lane_seed(r.ctx, lane) == 5 ? 2 : 0;
        assert_int_equal(dot_guard_skips(r.guard, lane), skips);
        *bytes = run_bytes(&r, lane, out + ((size_t)lane << 20));
    }
    dot_context_destroy(r.ctx);
    return out;
}

static const uint64_t seeds[4] = { 2, 3, 5, 3 };

static void test_same_bits(void **state)
{
    (void)state;
    size_t bytes = 0;
    uint8_t *lanes = run_whole(1, 4, seeds, &bytes);
    for (int threads = 2; threads <= 4; threads *= 2) {
        uint8_t *other = run_whole(threads, 4, seeds, &bytes);
        for (int lane = 0; lane < 4; ++lane)
            assert_memory_equal(lanes + ((size_t)lane << 20), other + ((size_t)lane << 20), bytes);
        free(other);
    }
    for (int lane = 0; lane < 4; ++lane) {
        uint8_t *solo = run_whole(1 + lane % 2, 1, seeds + lane, &bytes);
        if (memcmp(lanes + ((size_t)lane << 20), solo, bytes) != 0)
            fail_msg("lane %d differs from a run of its own", lane);
        free(solo);
    }
    free(lanes);
}

/* The first weight of `lane` after steps with Mechanic; interrupted: saved and loaded in the middle. */
static void mechanic_run(int threads, int lanes, const uint64_t *lane_seeds, int lane, bool interrupted, double weight[8 * WIDE])
{
    run r = open_run(threads, lanes, lane_seeds);
    dot_mechanic_options o = dot_mechanic_defaults();
    o.s_init = 1e-3;
    dot_mechanic *m = dot_mechanic_create(r.opt, &o);
    for (int s = 0; s < RUN_STEPS; ++s) {
        require(r.ctx, dot_backward(run_loss(&r, s, 0)) && dot_clip_grad_norm(r.opt, 0.5) > 0 && dot_mechanic_step(m, 1), "mechanic");
        if (!interrupted || s != 5)
            continue;
        const char *training = scratch_path("t"), *scale = scratch_path("m");
        require(r.ctx, dot_checkpoint_save(training, r.net, r.opt, s) && dot_state_save(scale, dot_mechanic_state(m)), "save");
        dot_context_destroy(r.ctx);
        r = open_run(threads, lanes, lane_seeds);
        m = dot_mechanic_create(r.opt, &o);
        require(r.ctx, dot_checkpoint_load(training, r.net, r.opt, NULL) && dot_state_load(scale, dot_mechanic_state(m)), "load");
        remove(training);
        remove(scale);
    }
    assert_true(dot_parameter_get(r.net, "0.weight", lane, weight, 8 * WIDE));
    dot_context_destroy(r.ctx);
}

static void test_mechanic_bits(void **state)
{
    static double solo[8 * WIDE], other[8 * WIDE];
    (void)state;
    for (int lane = 0; lane < 2; ++lane) {
        mechanic_run(1, 1, seeds + lane, 0, false, solo);
        mechanic_run(4, 2, seeds, lane, false, other);
        assert_memory_equal(solo, other, sizeof solo);
        mechanic_run(2, 2, seeds, lane, true, other);
        assert_memory_equal(solo, other, sizeof solo);
    }
}

static void move_states(run *r, bool save)
{
    dot_state *states[] = { dot_grokfast_state(r->grokfast), dot_average_state(r->average), dot_lookahead_state(r->lookahead),
                            dot_guard_state(r->guard) };
    static const char *const names[] = { "g", "a", "l", "s" };
    for (int i = 0; i < 4; ++i) {
        const char *path = scratch_path(names[i]);
        require(r->ctx, save ? dot_state_save(path, states[i]) : dot_state_load(path, states[i]), names[i]);
        if (!save)
            remove(path);
    }
}

static void test_resume(void **state)
{
    (void)state;
    for (int lanes = 1; lanes <= 4; lanes += 3) {
        run whole = open_run(2, lanes, seeds), first = open_run(2, lanes, seeds);
        for (int s = 0; s < RUN_STEPS; ++s)
            run_step(&whole, s);
        for (int s = 0; s < 6; ++s)
            run_step(&first, s);
        assert_true(dot_checkpoint_save(scratch_path("c"), first.net, first.opt, 6));
        move_states(&first, true);
        dot_context_destroy(first.ctx);
        run second = open_run(1, lanes, seeds);
        require(second.ctx, dot_checkpoint_load(scratch_path("c"), second.net, second.opt, NULL), "dot_checkpoint_load");
        remove(scratch_path("c"));
        move_states(&second, false);
        for (int s = 6; s < RUN_STEPS; ++s)
            run_step(&second, s);
        uint8_t *a = (uint8_t *)calloc(2, 1 << 20), *b = a + (1 << 20);
        assert_non_null(a);
        for (int lane = 0; lane < lanes; ++lane) {
            size_t bytes = run_bytes(&whole, lane, a) - sizeof(double);       /* the clipped share begins anew */
            run_bytes(&second, lane, b);
            assert_memory_equal(a, b, bytes);
        }
        free(a);
        dot_context_destroy(whole.ctx);
        dot_context_destroy(second.ctx);
    }
}

static void test_no_allocation(void **state)
{
    (void)state;
    run r = open_run(2, 4, seeds);
    run_step(&r, 0);
    int64_t allocations = dot_memory(r.ctx).allocations;
    for (int s = 1; s < RUN_STEPS; ++s)
        run_step(&r, s);
    assert_int_equal(dot_memory(r.ctx).allocations, allocations);
    dot_context_destroy(r.ctx);
}

/* ---- guards, outliers, groups, errors --------------------------------------------------------------------------------- */

static void poison(bench *b, int lane)
{
    dot_parameter_info info;
    assert_true(dot_layer_parameter(b->net, 0, &info));
    ((float *)dot_tensor_data(dot_tensor_grad(info.tensor), lane))[0] = (float)NAN;
}

static void test_guard_gives_up(void **state)
{
    (void)state;
    for (int lanes = 1; lanes <= 2; ++lanes) {
        bench b;
        dot_guard_options g = dot_guard_defaults();
        g.max_skips = 3;
        b.ctx = open_context(DOT_F32, 1, lanes, NULL);
        b.net = network(b.ctx);
        b.opt = dot_optimizer_create(b.ctx, b.net, NULL);
        dot_guard *guard = dot_guard_create(b.opt, &g);
        for (int s = 0; s < 3; ++s) {
            set_grads(&b, s);
            poison(&b, lanes - 1);
            assert_true(dot_guard_step(guard, 1) == (lanes == 2 || s < 2));
        }
        if (lanes == 1)
            assert_error(b.ctx, DOT_ERROR_STATE, "dot_guard_step: lane 0 skipped 3 steps in a row");
        else
            assert_true(dot_lane_active(b.ctx, 0) && !dot_lane_active(b.ctx, 1) && dot_ok(b.ctx));
        assert_int_equal(dot_optimizer_steps(b.opt), lanes == 1 ? 0 : 3);
        set_grads(&b, 0);
        assert_true(dot_guard_unscale(guard));
        assert_false(dot_guard_unscale(guard));
        assert_error(b.ctx, DOT_ERROR_STATE, "dot_guard_unscale: called twice");
        dot_context_destroy(b.ctx);
    }
}

/* Every algorithm: a lane that skips steps, beside others, is the run of its own; `bytes` of parameters come out. */
static size_t guarded(dot_algorithm algorithm, int lanes, const uint64_t *lane_seeds, uint8_t *out)
{
    bench b;
    dot_optimizer_options o = optimizer_defaults(algorithm);
    size_t used = 0;
    b.ctx = open_context(DOT_F32, 1, lanes, lane_seeds);
    b.net = dot_nn_sequential(b.ctx, dot_nn_linear(b.ctx, 3, 4), dot_nn_tanh(b.ctx), dot_nn_linear(b.ctx, 4, 2), NULL);
    b.opt = dot_optimizer_create(b.ctx, b.net, &o);
    dot_guard *guard = dot_guard_create(b.opt, NULL);
    run spoiled = { b.ctx, b.net, b.opt, NULL, NULL, NULL, NULL, guard, NULL };
    for (int s = 0; s < 7; ++s) {
        dot_step_begin(b.ctx);
        dot_tensor *loss = rows_loss(b.ctx, b.net, s, s + 1);
        dot_optimizer_loss(b.opt, loss);
        assert_true(dot_backward(loss));
        spoil(&spoiled, s);
        require(b.ctx, dot_guard_step(guard, 1), dot_algorithm_name(algorithm));
    }
    for (int lane = 0; lane < lanes; ++lane)
        for (int i = 0; i < dot_layer_parameters(b.net); ++i, used += 64) {
            dot_parameter_info info;
            assert_true(dot_layer_parameter(b.net, i, &info));
            memcpy(out + used, dot_tensor_data(info.tensor, lane), (size_t)dot_tensor_size(info.tensor) * sizeof(float));
        }
    dot_context_destroy(b.ctx);
    return used;
}

static void test_guarded_lanes_of_every_algorithm(void **state)
{
    (void)state;
    for (int a = 0; a < DOT_ALGORITHMS; a = next_algorithm(a)) {
        uint8_t lanes[4 * 256] = { 0 };
        guarded((dot_algorithm)a, 4, seeds, lanes);
        for (int lane = 0; lane < 4; ++lane) {
            uint8_t solo[256] = { 0 };
            assert_int_equal(guarded((dot_algorithm)a, 1, seeds + lane, solo), sizeof solo);
            if (memcmp(lanes + lane * 256, solo, sizeof solo) != 0)
                fail_msg("%s: lane %d differs from a run of its own", dot_algorithm_name((dot_algorithm)a), lane);
        }
    }
}

static void test_outliers(void **state)
{
    (void)state;
    dot_outlier o = dot_outlier_defaults();
    double sum = 0, squares = 0;
    for (int i = 0; i < 50; ++i) {
        double x = 3 + sin(i * 2.1);
        sum += x;
        squares += x * x;
        assert_false(dot_outlier_observe(&o, x));
    }
    assert_true(fabs(o.mean - sum / 50) < 1e-12 && fabs(o.variance - (squares / 50 - sum / 50 * sum / 50)) < 1e-12);
    dot_outlier before = o;
    assert_true(dot_outlier_observe(&o, 10) && dot_outlier_observe(&o, (double)NAN) && dot_outlier_observe(&o, (double)INFINITY));
    assert_true(o.mean == before.mean && o.variance == before.variance && o.count == 50 && o.outliers == 3);
    assert_false(dot_outlier_observe(&o, 3.1));
    assert_false(dot_outlier_observe(&o, -5));              /* good news is none */
    for (int i = 0; i < 10; ++i)
        assert_true(dot_outlier_observe(&o, 100));
    assert_true(dot_outlier_observe(&o, 100));              /* the eleventh: this is how things are now */
    assert_true(o.mean == 100 && o.count == 1);
    assert_false(dot_outlier_observe(&o, 101));
}

static void test_groups(void **state)
{
    static const char *const patterns[] = { "embed*", "0.*", "1.*", "head*" };
    dot_parameter_group g[4];
    (void)state;
    assert_true(dot_groups_layerwise(g, patterns, 4, 1e-3, 0.75, 0.05));
    for (int i = 0; i < 4; ++i)
        assert_true(fabs(g[i].lr / (1e-3 * pow(0.75, 3 - i)) - 1) < 1e-14 && g[i].weight_decay == 0.05 && g[i].pattern == patterns[i]);
    assert_true(dot_groups_discriminative(g, patterns, 4, 1e-5, 1e-3, 0));
    for (int i = 0; i < 4; ++i)
        assert_true(fabs(g[i].lr / (1e-5 * pow(100, i / 3.0)) - 1) < 1e-14);
    assert_true(dot_groups_discriminative(g, patterns, 1, 1e-5, 1e-3, 0) && g[0].lr == 1e-5);
    assert_false(dot_groups_layerwise(g, patterns, 0, 1, 1, 0));
    assert_false(dot_groups_layerwise(g, patterns, 4, 1, 0, 0));
    assert_false(dot_groups_layerwise(g, patterns, 4, (double)NAN, 1, 0));
    assert_false(dot_groups_discriminative(g, patterns, 4, -1, 1, 0));
    assert_false(dot_groups_discriminative(NULL, patterns, 4, 1, 1, 0));
}

#define REFUSES(kind, object, field, value, text) do { \
        dot_##kind##_options o_ = dot_##kind##_defaults(); \
        o_.field = value; \
        assert_null(dot_##kind##_create(object, &o_)); \
        assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_" #kind "_create: " text); \
    } while (0)

static void test_errors(void **state)
{
    (void)state;
    bench b = open_bench(DOT_F32, 0);
    REFUSES(grokfast, b.opt, alpha, 1, "alpha 1, expected 0 to 1 (excluded)");
    REFUSES(grokfast, b.opt, lambda, -1, "lambda -1");
    REFUSES(grokfast, b.opt, magic, 0, "magic 0x00000000");
    REFUSES(average, b.net, decay, 1.5, "decay 1.5, expected 0 to 1");
    REFUSES(average, b.net, every, 0, "every 0, expected 1 or more");
    REFUSES(average, b.net, gamma, 0, "gamma 0");
    REFUSES(average, b.net, kind, (dot_average_kind)2, "kind 2");
    REFUSES(lookahead, b.opt, k, 0, "k 0, expected 1 or more");
    REFUSES(lookahead, b.opt, alpha, (double)NAN, "alpha nan");
    REFUSES(mechanic, b.opt, weight_decay, -1, "weight_decay -1");
    REFUSES(mechanic, b.opt, s_init, 0, "s_init 0");
    REFUSES(mechanic, b.opt, eps, 0, "eps 0");
    REFUSES(mechanic, b.opt, betas, 0, "betas 0, expected 1 to 12");
    assert_true(isnan(dot_mechanic_scale(dot_mechanic_create(b.opt, NULL), 1)));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_mechanic_scale: lane 1");
    REFUSES(sam, b.opt, rho, -0.1, "rho -0.1");
    REFUSES(sam, b.opt, eps, 0, "eps 0");
    REFUSES(guard, b.opt, scale, 0, "scale 0");
    REFUSES(guard, b.opt, growth, 0.5, "growth 0.5");
    REFUSES(guard, b.opt, backoff, 2, "backoff 2");
    REFUSES(guard, b.opt, interval, 0, "interval 0");
    REFUSES(guard, b.opt, max_skips, -1, "max_skips -1");
    assert_null(dot_telemetry_create(b.opt, 0));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_telemetry_create: every 0");
    assert_false(dot_clip_grad_value(b.opt, 0));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_clip_grad_value: limit 0");
    assert_false(dot_clip_grad_rms(b.opt, (double)INFINITY));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_clip_grad_rms: limit inf");
    assert_false(dot_clip_grad_adaptive(b.opt, 0.01, -1, NULL));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_clip_grad_adaptive: eps -1");
    assert_false(dot_batch_norm_recompute(b.net, statistics_batch, &b, 0));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_batch_norm_recompute: batches 0");
    dot_average *a = dot_average_create(b.net, NULL);
    assert_false(dot_average_swap(a));
    assert_error(b.ctx, DOT_ERROR_STATE, "dot_average_swap: 0 averages taken");
    assert_true(dot_average_update(a) && dot_average_swap(a));
    assert_false(dot_state_save(scratch_path("x"), dot_average_state(a)));
    assert_error(b.ctx, DOT_ERROR_STATE, "dot_state_save: the layer and the module object");
    assert_true(dot_average_swap(a) && dot_state_save(scratch_path("x"), dot_average_state(a)));
    assert_false(dot_state_load(scratch_path("x"), dot_lookahead_state(dot_lookahead_create(b.opt, NULL))));
    assert_error(b.ctx, DOT_ERROR_FORMAT, "no tensor \"slow.0.weight\"");
    remove(scratch_path("x"));
    assert_true(isnan(dot_guard_scale(dot_guard_create(b.opt, NULL), 1)));
    assert_error(b.ctx, DOT_ERROR_ARGUMENT, "dot_guard_scale: lane 1");
    dot_context_destroy(b.ctx);
}

static void test_null(void **state)
{
    (void)state;
    assert_false(dot_clip_grad_value(NULL, 1) || dot_clip_grad_rms(NULL, 1) || dot_clip_grad_adaptive(NULL, 1, 1, NULL) || dot_centralize_grad(NULL));
    assert_false(dot_accumulate(NULL, NULL, 1) || dot_accumulate_finish(NULL, NULL));
    assert_false(dot_grokfast_create(NULL, NULL) || dot_grokfast_filter(NULL) || dot_grokfast_state(NULL));
    assert_false(dot_average_create(NULL, NULL) || dot_average_update(NULL) || dot_average_swap(NULL) || dot_average_count(NULL) || dot_average_state(NULL));
    assert_false(dot_batch_norm_recompute(NULL, NULL, NULL, 1));
    assert_false(dot_lookahead_create(NULL, NULL) || dot_lookahead_update(NULL) || dot_lookahead_state(NULL));
    assert_false(dot_mechanic_create(NULL, NULL) || dot_mechanic_step(NULL, 1) || dot_mechanic_state(NULL) || !isnan(dot_mechanic_scale(NULL, 0)));
    assert_false(dot_sam_create(NULL, NULL) || dot_sam_ascend(NULL) || dot_sam_descend(NULL));
    assert_false(dot_guard_create(NULL, NULL) || dot_guard_loss(NULL, NULL) || dot_guard_unscale(NULL) || dot_guard_step(NULL, 1));
    assert_false(dot_guard_skips(NULL, 0) || dot_guard_skipped(NULL, 0) || dot_guard_state(NULL) || dot_outlier_observe(NULL, 1));
    assert_false(dot_telemetry_create(NULL, 1) || dot_telemetry_before(NULL) || dot_telemetry_after(NULL));
    assert_false(dot_state_save("x", NULL) || dot_state_load("x", NULL));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_gradient_stages), cmocka_unit_test(test_nan_is_not_clipped_away), cmocka_unit_test(test_grokfast),
        cmocka_unit_test(test_averages), cmocka_unit_test(test_batch_norm_statistics), cmocka_unit_test(test_lookahead),
        cmocka_unit_test(test_mechanic), cmocka_unit_test(test_mechanic_bits),
        cmocka_unit_test(test_sam), cmocka_unit_test(test_units_of_every_layer), cmocka_unit_test(test_scaler), cmocka_unit_test(test_telemetry),
        cmocka_unit_test(test_accumulation_is_the_whole_batch), cmocka_unit_test(test_same_bits), cmocka_unit_test(test_resume),
        cmocka_unit_test(test_no_allocation), cmocka_unit_test(test_guard_gives_up),
        cmocka_unit_test(test_guarded_lanes_of_every_algorithm), cmocka_unit_test(test_outliers),
        cmocka_unit_test(test_groups), cmocka_unit_test(test_errors), cmocka_unit_test(test_null),
    };
    golden_context = open_context(DOT_F64, 1, 1, NULL);
    golden_file = dot_safetensors_open(golden_context, GOLDEN);
    if (!golden_file) {
        fprintf(stderr, "%s\n", dot_error(golden_context));
        return 1;
    }
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    dot_context_destroy(golden_context);
    return failed;
}
