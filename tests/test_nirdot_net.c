/* The networks of NIR-DOT (examples/nirdot_net.h) against the same networks in PyTorch: outputs, the losses of ten training steps, and
   files in both directions. The golden numbers are double precision; golden/make_nirdot_net.py makes them.
   The whole program takes about 4 seconds of processor time. */
#include "dotopt.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#include "examples/nirdot_net.h"
#include "nets.h"
#include "uniform.h"

#define GOLDEN "tests/golden/nirdot_net.safetensors"
#define GOLDEN_STATE "tests/golden/nirdot_net_state.safetensors"
#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))
enum { BATCH = 4, TOKENS = 20, STEPS = 10, STRIDE = 53 };
static const double importance[2] = { 2, 1 };

static dot_context *golden_context;
static dot_safetensors *golden_file;

/* ---- helpers ------------------------------------------------------------------------------------------------------ */

static dot_context *open_context(dot_dtype dtype, int threads)
{
    dot_context_options options = dot_context_defaults();
    options.dtype = dtype;
    options.threads = threads;
    options.flush_denormals = false;
    dot_context *ctx = dot_context_create(&options);
    assert_non_null(ctx);
    return ctx;
}

static void require(const dot_context *ctx)
{
    if (!dot_ok(ctx)) fail_msg("%s", dot_error(ctx));
}

static double *take(int64_t count)
{
    double *values = (double *)calloc((size_t)count + 1, sizeof *values);
    assert_non_null(values);
    return values;
}

static uint32_t stream_of(const char *name)
{
    uint32_t h = 0x811c9dc5u;
    for (; *name; ++name) h = (h ^ (unsigned char)*name) * 0x01000193u;
    return h;
}

static void set_parameters(dot_context *ctx, dot_layer *net)
{
    dot_parameter_info info;
    for (int p = 0, n = dot_layer_parameters(net); p < n; ++p) {
        assert_true(dot_layer_parameter(net, p, &info));
        if (info.kind == DOT_KIND_BUFFER) continue;
        int64_t count = dot_tensor_size(info.tensor);
        double *values = take(count);
        const char *last = strrchr(info.name, '.');
        const bool matrix = info.rank >= 2, factor = last && strcmp(last, ".weight") == 0;
        for (int64_t i = 0; i < count; ++i) {
            double draw = 2 * uniform(stream_of(info.name), (uint32_t)i) - 1;
            draw = matrix ? draw / sqrt((double)(count / info.shape[0])) : factor ? 1 + draw / 10 : draw / 10;
            values[i] = (double)(float)draw;
        }
        assert_true(dot_parameter_set(net, info.name, DOT_ALL, values, count));
        free(values);
    }
    require(ctx);
}

/* An input of the context's type. */
static dot_tensor *input_of(dot_context *ctx, int rank, const int64_t *shape, const double *values)
{
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    float *single = (float *)malloc((size_t)count * sizeof *single);
    assert_non_null(single);
    for (int64_t i = 0; i < count; ++i) single[i] = (float)values[i];
    dot_tensor *t = dot_context_dtype(ctx) == DOT_F64 ? dot_input(ctx, DOT_F64, rank, shape, values)
                                                      : dot_input(ctx, DOT_F32, rank, shape, single);
    free(single);
    return t;
}

static dot_tensor *input_uniform(dot_context *ctx, uint32_t stream, int rank, const int64_t *shape)
{
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= shape[i];
    double *values = take(count);
    for (int64_t i = 0; i < count; ++i) values[i] = 2 * uniform(stream, (uint32_t)i) - 1;
    dot_tensor *t = input_of(ctx, rank, shape, values);
    free(values);
    return t;
}

static dot_tensor *volumes(dot_context *ctx, int step, int n)
{
    const int64_t shape[5] = { BATCH, n, n, n, 2 };
    return input_uniform(ctx, 1000 + (uint32_t)step, 5, shape);
}

static dot_tensor *voxel_weights(dot_context *ctx, int step, int n)
{
    const int64_t shape[5] = { BATCH, n, n, n, 1 }, count = (int64_t)BATCH * n * n * n;
    double *values = take(count);
    for (int64_t i = 0; i < count; ++i) {
        const double u = uniform(2000 + (uint32_t)step, (uint32_t)i);
        values[i] = u < 0.4 ? 0 : u < 0.9 ? 1 : 4;
    }
    dot_tensor *t = input_of(ctx, 5, shape, values);
    free(values);
    return t;
}

static nir_tokens tokens(dot_context *ctx, int step, const nir_transformer_options *o)
{
    const int64_t signal[3] = { BATCH, TOKENS, 2 }, position[3] = { BATCH, TOKENS, o->position }, mask[2] = { BATCH, TOKENS };
    const int64_t context[2] = { BATCH, o->context };
    double keep[BATCH * TOKENS];
    for (int i = 0; i < BATCH * TOKENS; ++i)
        keep[i] = i % TOKENS == 0 || uniform(3000 + (uint32_t)step, (uint32_t)i) < 0.8 ? 0 : (double)NIR_NO_TOKEN;
    nir_tokens t = { input_uniform(ctx, 4000 + (uint32_t)step, 3, signal), input_uniform(ctx, 5000 + (uint32_t)step, 3, position),
                     input_of(ctx, 2, mask, keep), NULL, NULL };
    if (o->context) t.context = input_uniform(ctx, 6000 + (uint32_t)step, 2, context);
    return t;
}

/* Compares with a golden tensor: every `stride`-th element of ours, errors relative to the largest golden value. */
static void compare(const char *prefix, const char *name, const char *suffix, const double *ours, int64_t count, int stride,
                    double tolerance)
{
    char full[128];
    dot_safetensors_entry entry;
    snprintf(full, sizeof full, "%s.%s.%s", prefix, name, suffix);
    const int index = dot_safetensors_find(golden_file, full);
    if (index < 0 || !dot_safetensors_entry_at(golden_file, index, &entry)) fail_msg("no tensor %s", full);
    assert_int_equal(entry.count, (count + stride - 1) / stride);
    double *expected = take(entry.count), scale = 0, worst = 0;
    assert_true(dot_safetensors_read_double(golden_file, index, expected, entry.count));
    for (int64_t i = 0; i < entry.count; ++i) scale = fmax(scale, fabs(expected[i]));
    for (int64_t i = 0; i < entry.count; ++i) {
        const double error = fabs(ours[i * stride] - expected[i]) / scale;
        if (!(error <= worst)) worst = error;       /* NaN stays */
    }
    print_message("    %s: error %.1e, tolerance %.0e\n", full, worst, tolerance);
    if (!(worst <= tolerance)) fail_msg("%s: error %.3e, tolerance %.0e", full, worst, tolerance);
    free(expected);
}

static void compare_tensor(const char *prefix, const char *name, const char *suffix, const dot_tensor *t, int stride, double tolerance)
{
    assert_non_null(t);
    const int64_t count = dot_tensor_size(t);
    double *values = take(count);
    assert_true(dot_tensor_get(t, 0, values, count));
    compare(prefix, name, suffix, values, count, stride, tolerance);
    free(values);
}

/* ---- cases: the same stand in the script ----------------------------------------------------------------------------- */

static nir_autoencoder_options autoencoder_case(const char *name)
{
    nir_autoencoder_options o = nir_sizes[NIR_SMOKE].autoencoder;
    if (strcmp(name, "group") == 0) {
        o.norm = NIR_NORM_GROUP;
        o.attention = 2;
        o.flatten = false;
        o.width[0] = 12;
    } else if (strcmp(name, "original") == 0) {
        const nir_autoencoder_options original = { 16, 8, 7, 2, { 8, 16 }, 24, 3, { 16, 8, 8 }, false, NIR_NORM_BATCH, 8, 1, 0, false };
        o = original;
    }
    return o;
}

static nir_transformer_options transformer_case(const char *name)
{
    nir_transformer_options o = nir_sizes[NIR_SMOKE].transformer;
    if (strcmp(name, "pre") == 0) {
        o.position = 9;
        o.context = 5;
        o.layers = 2;
        o.queries = 0;
        o.pre_norm = true;
    }
    return o;
}

/* ---- parameter counts ------------------------------------------------------------------------------------------------- */

static void test_counts(void **state)
{
    (void)state;
    for (int s = 0; s < NIR_SIZES; ++s) {
        dot_context *ctx = open_context(DOT_F32, 1);
        nir_autoencoder *a = nir_autoencoder_create(ctx, &nir_sizes[s].autoencoder);
        nir_transformer_options o = nir_sizes[s].transformer;
        nir_transformer *t = nir_transformer_create(ctx, &o, NULL);
        assert_true(a && t);
        const double count[3] = { (double)dot_layer_parameter_count(a->layer), (double)dot_layer_parameter_count(a->encoder),
                                  (double)dot_layer_parameter_count(a->decoder) };
        const double other = (double)dot_layer_parameter_count(t->layer);
        compare("autoencoder", nir_sizes[s].name, "count", count, 3, 1, 0);
        compare("transformer", nir_sizes[s].name, "count", &other, 1, 1, 0);
        dot_context_destroy(ctx);
        free(a);
        nir_transformer_free(t);
    }
}

/* ---- ten training steps ------------------------------------------------------------------------------------------------- */

static nir_autoencoder *train_autoencoder(dot_context *ctx, const char *name, double tolerance)
{
    const nir_autoencoder_options options = autoencoder_case(name);
    nir_autoencoder *a = nir_autoencoder_create(ctx, &options);
    assert_non_null(a);
    set_parameters(ctx, a->layer);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAMW);
    o.lr = 3e-3;
    o.eps = 1e-5;       /* the script says why */
    o.beta2 = 0.95;
    o.weight_decay = 1e-2;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, a->layer, &o);
    const dot_schedule schedule = dot_schedule_one_cycle(STEPS);
    double losses[STEPS];
    dot_eval_begin(ctx);
    compare_tensor("autoencoder", name, "first", dot_forward(a->layer, volumes(ctx, 0, options.n)), STRIDE, tolerance);
    for (int step = 0; step < STEPS; ++step) {
        dot_step_begin(ctx);
        dot_tensor *x = volumes(ctx, step, options.n);
        dot_tensor *loss = nir_rmse_loss(dot_forward(a->layer, x), x, voxel_weights(ctx, step, options.n), importance);
        losses[step] = dot_item(loss, 0);
        dot_backward(loss);
        dot_clip_grad_norm(optimizer, 1);
        dot_optimizer_set(optimizer, DOT_HYPER_BETA1, DOT_ALL, DOT_ALL, dot_schedule_momentum(&schedule, step));
        dot_optimizer_step(optimizer, dot_schedule_at(&schedule, step));
        require(ctx);
    }
    compare("autoencoder", name, "losses", losses, STEPS, 1, 10 * tolerance);
    return a;
}

static void check_autoencoder(nir_autoencoder *a, dot_context *ctx, const char *name, double tolerance)
{
    dot_tensor *x = volumes(ctx, STEPS, a->options.n), *z = nir_encode(a, x);
    compare_tensor("autoencoder", name, "latent", z, 1, tolerance);
    compare_tensor("autoencoder", name, "output", nir_decode(a, z), STRIDE, tolerance);
}

static void train_transformer(dot_context *ctx, const char *name, nir_autoencoder *a, double tolerance)
{
    const nir_transformer_options options = transformer_case(name);
    nir_transformer *t = nir_transformer_create(ctx, &options, NULL);
    assert_non_null(t);
    set_parameters(ctx, t->layer);
    const dot_parameter_group no_decay = { "token_type", DOT_KIND_BIAS | DOT_KIND_NORM, 2e-3, 0 };
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAMW);
    o.lr = 2e-3;
    o.eps = 1e-5;
    o.beta2 = 0.98;
    o.groups = &no_decay;
    o.group_count = 1;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, t->layer, &o);
    double losses[STEPS];
    for (int step = 0; step < STEPS; ++step) {
        const double p = (step - 2) / (STEPS - 2.0);
        const double multiplier = step < 2 ? (step + 1) / 2.0 : 0.03 + 0.97 * (1 + cos(3.14159265358979323846 * p)) / 2;
        const int64_t shape[2] = { BATCH, options.latent };
        dot_step_begin(ctx);
        const nir_tokens in = tokens(ctx, step, &options);
        dot_tensor *z = nir_transformer_forward(t, &in), *loss;
        if (step == 0) compare_tensor("transformer", name, "first", z, 1, tolerance);
        loss = a ? nir_rmse_loss(nir_decode(a, z), volumes(ctx, step, a->options.n), voxel_weights(ctx, step, a->options.n), importance)
                 : dot_rmse_loss(z, input_uniform(ctx, 7000 + (uint32_t)step, 2, shape));
        losses[step] = dot_item(loss, 0);
        dot_backward(loss);
        dot_clip_grad_norm(optimizer, 1);
        dot_optimizer_step(optimizer, multiplier);
        require(ctx);
    }
    compare("transformer", name, "losses", losses, STEPS, 1, 10 * tolerance);
    dot_eval_begin(ctx);
    const nir_tokens in = tokens(ctx, STEPS, &options);
    compare_tensor("transformer", name, "output", nir_transformer_forward(t, &in), 1, 10 * tolerance);
    nir_transformer_free(t);        /* its layers stay, unused */
}

/* After training, outputs are compared with ten times the tolerance: rounding has grown over ten steps. */
static void train_all(dot_dtype dtype, double tolerance)
{
    static const char *const names[] = { "smoke", "group", "original" };
    for (int i = 0; i < COUNT(names); ++i) {
        dot_context *ctx = open_context(dtype, 2);
        nir_autoencoder *a = train_autoencoder(ctx, names[i], tolerance);
        dot_eval_begin(ctx);
        check_autoencoder(a, ctx, names[i], 10 * tolerance);
        nir_autoencoder_freeze(a, true);        /* folded convolutions give the same, in training steps too */
        dot_step_begin(ctx);
        check_autoencoder(a, ctx, names[i], 10 * tolerance);
        if (i == 0) train_transformer(ctx, "smoke", a, tolerance);
        if (i == 1) train_transformer(ctx, "pre", NULL, tolerance);
        dot_context_destroy(ctx);
        free(a);
    }
}

static void test_training_f64(void **state) { (void)state; train_all(DOT_F64, 1e-9); }
static void test_training_f32(void **state) { (void)state; train_all(DOT_F32, 1e-5); }

/* ---- freezing ------------------------------------------------------------------------------------------------------------- */

/* A training step through the frozen decoder leaves its parameters and running statistics alone, and gives them no gradient. */
static void test_frozen(void **state)
{
    (void)state;
    dot_context *ctx = open_context(DOT_F32, 1);
    nir_autoencoder *a = nir_autoencoder_create(ctx, &nir_sizes[NIR_SMOKE].autoencoder);
    nir_transformer *t = nir_transformer_create(ctx, &nir_sizes[NIR_SMOKE].transformer, NULL);
    assert_true(a && t);
    nir_autoencoder_freeze(a, true);
    int64_t count, same;
    double *before = snapshot(a->layer, 0, VALUES, &count);
    dot_step_begin(ctx);
    const nir_tokens in = tokens(ctx, 0, &nir_sizes[NIR_SMOKE].transformer);
    dot_backward(nir_rmse_loss(nir_decode(a, nir_transformer_forward(t, &in)), volumes(ctx, 0, 16), voxel_weights(ctx, 0, 16), importance));
    require(ctx);
    double *after = snapshot(a->layer, 0, VALUES, &same), *gradient = snapshot(a->layer, 0, GRADIENTS, &same), sum = 0;
    assert_memory_equal(before, after, (size_t)count * sizeof *before);
    for (int64_t i = 0; i < same; ++i) sum += fabs(gradient[i]);
    assert_true(sum == 0);
    free(before);
    free(after);
    free(gradient);
    gradient = snapshot(t->layer, 0, GRADIENTS, &same);
    for (int64_t i = 0; i < same; ++i) sum += fabs(gradient[i]);
    assert_true(sum > 0);
    free(gradient);
    dot_context_destroy(ctx);
    free(a);
    nir_transformer_free(t);
}

/* ---- files ------------------------------------------------------------------------------------------------------------------ */

/* PyTorch's state_dict loads, gives PyTorch's outputs, and is saved again tensor by tensor as it was. With --save FILE the test leaves
   the saved file there, for `make_nirdot_net.py --check FILE`. */
static const char *keep_file;

static void test_state(void **state)
{
    (void)state;
    dot_context *ctx = open_context(DOT_F32, 1);
    nir_autoencoder_options a_options = nir_sizes[NIR_SMOKE].autoencoder;
    nir_transformer_options t_options = nir_sizes[NIR_SMOKE].transformer;
    a_options.stem = a_options.width[0] = a_options.up_width[1] = 4;
    a_options.width[1] = a_options.up_width[0] = a_options.latent = 8;
    t_options.width = t_options.feed_forward = t_options.fuse = t_options.head = t_options.latent = 8;
    t_options.heads = t_options.queries = 2;
    nir_autoencoder *a = nir_autoencoder_create(ctx, &a_options);
    nir_transformer *t = nir_transformer_create(ctx, &t_options, NULL);
    dot_layer *both = dot_nn_custom(ctx, "both", nir_no_forward, NULL);
    assert_true(a && t && both);
    nir_child(both, "autoencoder", a->layer);
    nir_child(both, "transformer", t->layer);
    dot_load(both, GOLDEN_STATE);
    require(ctx);
    dot_eval_begin(ctx);
    compare_tensor("state", "volume", "", dot_forward(a->layer, volumes(ctx, 1, 16)), STRIDE, 1e-5);
    const nir_tokens in = tokens(ctx, 1, &t_options);
    compare_tensor("state", "latent", "", nir_transformer_forward(t, &in), 1, 1e-5);

    const char *path = keep_file ? keep_file : scratch_path("nirdot_state");
    dot_save(both, path);
    require(ctx);
    dot_safetensors *file[2] = { dot_safetensors_open(ctx, GOLDEN_STATE), dot_safetensors_open(ctx, path) };
    const int tensors = dot_safetensors_count(file[0]);
    assert_true(tensors > 100 && dot_safetensors_count(file[1]) == tensors);
    for (int i = 0; i < tensors; ++i) {
        dot_safetensors_entry entry[2];
        assert_true(dot_safetensors_entry_at(file[0], i, &entry[0]));
        const int k = dot_safetensors_find(file[1], entry[0].name);
        assert_true(dot_safetensors_entry_at(file[1], k, &entry[1]));
        assert_int_equal(entry[0].bytes, entry[1].bytes);
        char *bytes[2] = { (char *)take((int64_t)entry[0].bytes), (char *)take((int64_t)entry[0].bytes) };
        assert_true(dot_safetensors_read(file[0], i, bytes[0], entry[0].bytes) && dot_safetensors_read(file[1], k, bytes[1], entry[0].bytes));
        assert_memory_equal(bytes[0], bytes[1], entry[0].bytes);
        free(bytes[0]);
        free(bytes[1]);
    }
    dot_safetensors_close(file[0]);
    dot_safetensors_close(file[1]);
    if (!keep_file) remove(path);
    dot_context_destroy(ctx);
    free(a);
    nir_transformer_free(t);
}

/* ---- bad sizes -------------------------------------------------------------------------------------------------------------- */

static void test_invalid(void **state)
{
    (void)state;
    nir_autoencoder_options a = nir_sizes[NIR_SMALL].autoencoder;
    assert_null(nir_autoencoder_invalid(&a));
    a.n = 48;
    assert_non_null(nir_autoencoder_invalid(&a));
    a = nir_sizes[NIR_SMALL].autoencoder;
    a.attention = 4;
    assert_non_null(nir_autoencoder_invalid(&a));
    nir_transformer_options t = nir_sizes[NIR_SMALL].transformer;
    assert_null(nir_transformer_invalid(&t));
    t.heads = 5;
    assert_non_null(nir_transformer_invalid(&t));
    t = nir_sizes[NIR_SMALL].transformer;
    t.dropout = NAN;
    assert_non_null(nir_transformer_invalid(&t));
}

static int open_golden(void **state)
{
    (void)state;
    golden_context = open_context(DOT_F32, 1);
    golden_file = dot_safetensors_open(golden_context, GOLDEN);
    if (!golden_file) print_error("%s\n", dot_error(golden_context));
    return golden_file ? 0 : -1;
}

static int close_golden(void **state)
{
    (void)state;
    dot_safetensors_close(golden_file);
    dot_context_destroy(golden_context);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && strcmp(argv[1], "--save") == 0) keep_file = argv[2];
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_counts), cmocka_unit_test(test_training_f64), cmocka_unit_test(test_training_f32),
        cmocka_unit_test(test_frozen), cmocka_unit_test(test_state), cmocka_unit_test(test_invalid),
    };
    return cmocka_run_group_tests(tests, open_golden, close_golden);
}
