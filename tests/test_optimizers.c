/* Every optimizer against golden trajectories: 200 steps over tensors of every rank, with the learning rate changing at each step.
   golden/make_training.py and golden/make_optimizers.py make them, with PyTorch, optax and formulas transcribed from the papers.

   usage: test_optimizers             all tests
          test_optimizers --table     the README's table of optimizers, measured now */
#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dotopt.h"

#include <cmocka.h>

#define GOLDEN "tests/golden/training.safetensors"
#define GOLDEN_OPTIMIZERS "tests/golden/optimizers.safetensors"
#define GOLDEN_MATRIX "tests/golden/matrix_optimizers.safetensors"
#include "golden.h"
#include "nets.h"

static dot_safetensors *training_file, *optimizers_file, *matrix_file;

/* ---- trajectories --------------------------------------------------------------------------------------------------- */

/* Parameters of every rank, one of them empty, under a loss that is linear in them: sum(theta * g). */
enum { TENSORS = 6, RUN = 200, ELEMENTS = 1 + 7 + 15 + 120 + 108, LARGEST = 120 };
static const struct { const char *name; int rank; int64_t shape[4]; int64_t count; } probe[TENSORS] = {
    { "p0", 0, { 0 }, 1 },        { "p1", 1, { 7 }, 7 },             { "p2", 2, { 5, 3 }, 15 },
    { "p3", 2, { 3, 40 }, 120 },  { "p4", 4, { 4, 3, 3, 3 }, 108 },  { "p5", 1, { 0 }, 0 }
};
static const int checkpoints[] = { 1, 2, 10, 50, 200 };

static bool has_tiny(const settings *s)
{
    return strcmp(s->stream, "plain") != 0 && !s->no_tiny;
}

static bool has_gradient(const settings *s, int p, int t)
{
    return !s->skip || (t + p) % 3 != 0;
}

/* One element of the gradient of step t; `gradient` in make_training.py says what it is made of. */
static double gradient(const settings *s, int p, uint32_t i, int t)
{
    static const struct { uint32_t modulus, rest; double size; } tiny[] = {
        { 11, 7, 1e-300 }, { 11, 3, 0x1p-122 }, { 13, 5, 1e-308 }   /* an element of two kinds is of the first */
    };
    uint32_t stream = (uint32_t)(100 + 8 * t + p), h = hash32(stream, i);
    double u = uniform(stream, i), g = h % 8 == 0 ? 0 : ldexp(2 * u - 1, (int)(i % 9) - 4);
    if (strcmp(s->stream, "plain") == 0)
        return g * (t % 2 ? 4.0 : 0.0625);
    if (i % 11 == 9)
        return 0;
    for (int k = 0; has_tiny(s) && k < COUNT(tiny); ++k)
        if (i % tiny[k].modulus == tiny[k].rest)
            return (1 + u) * tiny[k].size;
    double spike = strcmp(s->stream, "extreme") == 0 ? (double)1e20f : 1e8;
    return i % 17 == 2 && h % 32 == 1 ? u < 0.5 ? -spike : spike : g;
}

static dot_tensor *forward_nothing(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user;
    (void)layer;
    return x;
}

static dot_layer *probe_layer(dot_context *ctx, const settings *s, dot_tensor *tensors[TENSORS], double *theta)
{
    dot_layer *layer = dot_nn_custom(ctx, "probe", forward_nothing, NULL);
    for (int p = 0; p < TENSORS; ++p) {
        tensors[p] = dot_layer_add_parameter(layer, probe[p].name, DOT_KIND_WEIGHT, probe[p].rank, probe[p].shape);
        require(ctx, tensors[p] != NULL, "dot_layer_add_parameter");
        for (int64_t i = 0; i < probe[p].count; ++i) {
            bool zero = has_tiny(s) && (i % 11 == 3 || i % 11 == 7 || i % 13 == 5);
            theta[i] = zero ? 0 : 2 * uniform((uint32_t)(50 + p), (uint32_t)i) - 1;
        }
        require(ctx, dot_parameter_set(layer, probe[p].name, DOT_ALL, theta, probe[p].count), "dot_parameter_set");
        theta += probe[p].count;
    }
    return layer;
}

/* The curvature of step t: gradients of another stream, for the parameters that have one in that step. */
static void give_curvature(dot_context *ctx, const settings *s, dot_tensor *tensors[TENSORS], dot_optimizer *optimizer, int t)
{
    settings plain = *s;
    dot_tensor *loss = NULL;
    snprintf(plain.stream, sizeof plain.stream, "plain");
    dot_step_begin(ctx);
    for (int p = 0; p < TENSORS; ++p) {
        double wide[LARGEST];
        float narrow[LARGEST];
        bool single = dot_tensor_dtype(tensors[p]) == DOT_F32;
        for (int64_t i = 0; i < probe[p].count; ++i)
            narrow[i] = (float)(wide[i] = gradient(&plain, p, (uint32_t)i, 5000 + t));
        if (!has_gradient(s, p, t))
            continue;
        dot_tensor *g = dot_input(ctx, single ? DOT_F32 : DOT_F64, probe[p].rank, probe[p].shape,
                                  single ? (const void *)narrow : (const void *)wide);
        dot_tensor *term = dot_sum(dot_mul(tensors[p], g), DOT_ALL_AXES, false);
        loss = loss ? dot_add(loss, term) : term;
    }
    require(ctx, dot_backward(loss) && dot_optimizer_curvature(optimizer), "dot_optimizer_curvature");
}

/* The step's backward pass; `given` receives the gradients as the context's type holds them. */
static void probe_backward(dot_context *ctx, const settings *s, dot_tensor *tensors[TENSORS], int t, double *given)
{
    bool single = dot_tensor_dtype(tensors[0]) == DOT_F32;
    dot_tensor *loss = NULL;
    dot_step_begin(ctx);
    for (int p = 0; p < TENSORS; given += probe[p++].count) {
        double wide[LARGEST];
        float narrow[LARGEST];
        bool has = has_gradient(s, p, t);
        for (int64_t i = 0; i < probe[p].count; ++i) {
            wide[i] = gradient(s, p, (uint32_t)i, t);
            narrow[i] = (float)wide[i];
            given[i] = !has ? 0 : single ? (double)narrow[i] : wide[i];
        }
        if (!has)
            continue;
        dot_tensor *g = dot_input(ctx, single ? DOT_F32 : DOT_F64, probe[p].rank, probe[p].shape,
                                  single ? (const void *)narrow : (const void *)wide);
        dot_tensor *term = dot_sum(dot_mul(tensors[p], g), DOT_ALL_AXES, false);
        loss = loss ? dot_add(loss, term) : term;
    }
    require(ctx, dot_backward(loss), "dot_backward");
}

/* The gradients that the library holds are those given, to the bit. */
static bool check_gradients(dot_layer *layer, const double *given, const char *name, int t)
{
    for (int p = 0; p < TENSORS; given += probe[p++].count) {
        double held[LARGEST];
        if (!dot_parameter_grad(layer, probe[p].name, 0, held, probe[p].count)) {
            print_error("%s: dot_parameter_grad of %s at step %d\n", name, probe[p].name, t);
            return false;
        }
        for (int64_t i = 0; i < probe[p].count; ++i)
            if (held[i] != given[i]) {
                print_error("%s: gradient of %s[%d] at step %d is %g, not %g\n", name, probe[p].name, (int)i, t,
                            held[i], given[i]);
                return false;
            }
    }
    return true;
}


/* theta against the golden checkpoint. Errors are relative to the largest that an element has been: a sum that passes
   through zero keeps the rounding errors of its past. Denormals have an absolute precision, some roundings of the smallest
   one each step; a momentum of 0.9 keeps each of them for ten steps. */
/* Wider in float32 for the rules whose step is a quotient of sums over all parameters, which carries their rounding everywhere, and for
   Shampoo. In float64 wider for the runs of Shampoo and SOAP whose matrices are so ill-conditioned, or singular, that one rounding of
   the gradients moves the reference further than 1e-13: by ten times as much as that (measured by the script that made them). */
static double single_bound, double_bound = 1e-12;

static void set_bounds(const settings *s)
{
    dot_algorithm algorithm = s->optimizer.algorithm;
    bool quotient = algorithm == DOT_PRODIGY || algorithm == DOT_DADAPT_ADAM || algorithm == DOT_DOWG;
    single_bound = algorithm == DOT_SHAMPOO ? 2e-4 : quotient ? 2e-5 : 2e-6;
    double_bound = fmax(1e-12, 10 * s->rounding);
}

static bool check_theta(dot_layer *layer, dot_dtype dtype, const double *expected, double *scale, const char *name, int t,
                        double *worst)
{
    double ours[ELEMENTS], *next = ours;
    for (int p = 0; p < TENSORS; next += probe[p++].count)
        if (!dot_parameter_get(layer, probe[p].name, 0, next, probe[p].count))
            return false;
    for (int i = 0; i < ELEMENTS; ++i)
        scale[i] = fmax(scale[i], fabs(expected[i]));
    for (int i = 0; i < ELEMENTS; ++i)
        if (scale[i] > 1e-30)
            *worst = fmax(*worst, fabs(ours[i] - expected[i]) / scale[i]);
    char at[16];
    snprintf(at, sizeof at, " step %d", t);
    bool single = dtype == DOT_F32;
    return agree(join(name, single ? " float32" : " float64", at), ours, expected, scale, ELEMENTS,
                 single ? single_bound * sqrt(t) : double_bound, ldexp(20 * (t + 1), single ? -149 : -1074));
}

/* Clips, and checks the norm that is reported. */
static bool check_clip(dot_optimizer *optimizer, double max_norm, double expected, dot_dtype dtype, const char *name)
{
    double norms[3];
    norms[0] = dot_grad_norm(optimizer, 0);
    norms[1] = dot_clip_grad_norm(optimizer, max_norm);
    norms[2] = dot_grad_norm(optimizer, 0);     /* still the norm before clipping */
    double three[3] = { expected, expected, expected };
    return agree(join(name, " norm", ""), norms, three, NULL, 3, dtype == DOT_F32 ? 2e-6 : 1e-12, 0);
}

/* The loss that the rules are told that ask for it. */
static dot_tensor *loss_of_step(dot_context *ctx, int t)
{
    double value = 2 + 10 * uniform(41, (uint32_t)t);
    return dot_input(ctx, DOT_F64, 0, NULL, &value);
}

/* Saves the training, and loads it with parameters that have been updated `late` times where it was once. The counts are the last of
   the checkpoint's "counters", of which the file's header says where they lie. */
static void count_on_from(dot_context *ctx, dot_layer *layer, dot_optimizer *optimizer, int64_t late)
{
    const char *path = scratch_path("late_run.safetensors");
    size_t bytes;
    require(ctx, dot_checkpoint_save(path, layer, optimizer, 0), "dot_checkpoint_save");
    unsigned char *file = read_file(path, &bytes);
    assert_non_null(file);
    uint64_t header;
    long long begin, end;
    memcpy(&header, file, sizeof header);
    unsigned char after = file[8 + header];
    file[8 + header] = 0;
    const char *entry = strstr((const char *)file + 8, "\"counters\"");
    assert_non_null(entry);
    assert_int_equal(sscanf(strstr(entry, "\"data_offsets\""), "\"data_offsets\":[%lld,%lld]", &begin, &end), 2);
    file[8 + header] = after;
    unsigned char *last = file + 8 + header + end;
    int changed = 0;
    for (int p = 1; p <= TENSORS; ++p) {
        int64_t count;
        memcpy(&count, last - 8 * p, sizeof count);
        assert_true(count == 0 || count == 1);
        if (count == 1)
            memcpy(last - 8 * p, &late, sizeof late);
        changed += count == 1;
    }
    assert_true(changed > 0 && write_file(path, file, bytes));
    free(file);
    require(ctx, dot_checkpoint_load(path, layer, optimizer, NULL), "dot_checkpoint_load");
    remove(path);
}

static bool run_trajectory(const char *prefix, const char *name, const settings *s, dot_dtype dtype, double *worst)
{
    dot_tensor *tensors[TENSORS];
    double scale[ELEMENTS], given[ELEMENTS], zeros[ELEMENTS] = { 0 };
    dot_context *ctx = context_of(dtype, 0);
    dot_layer *layer = probe_layer(ctx, s, tensors, scale);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &s->optimizer);
    require(ctx, optimizer != NULL, name);
    for (int i = 0; i < ELEMENTS; ++i)
        scale[i] = fabs(scale[i]);
    int64_t count;
    const char *norms_name = join(prefix, name, ".norms");
    double *norms = golden_has(norms_name) ? golden(norms_name, &count) : NULL;
    double *expected = golden(join(prefix, name, ""), &count);
    assert_int_equal(count, COUNT(checkpoints) * ELEMENTS);
    bool good = true, needs_loss = strstr(dot_algorithm_name(s->optimizer.algorithm), "polyak") ||
                                   strstr(dot_algorithm_name(s->optimizer.algorithm), "momo");
    for (int t = 1, next = 0; t <= RUN && good; ++t) {
        if (s->curvature_period == 1 || t % 10 == 1)
            give_curvature(ctx, s, tensors, optimizer, t);
        probe_backward(ctx, s, tensors, t, given);
        good = check_gradients(layer, given, name, t);
        if (s->clip > 0)
            good = check_clip(optimizer, s->clip, norms[t - 1], dtype, name) && good;
        if (t == 1 || t == 101)
            dot_optimizer_set(optimizer, DOT_HYPER_DECAY_PERIOD, 0, DOT_ALL, t == 1 ? 37 : 74);
        if (needs_loss)
            require(ctx, dot_optimizer_loss(optimizer, loss_of_step(ctx, t)), name);
        require(ctx, dot_optimizer_step(optimizer, multiplier(t)), name);
        if (t == 1 && s->late > 0)
            count_on_from(ctx, layer, optimizer, (int64_t)s->late);
        if (t == checkpoints[next])
            good = check_theta(layer, dtype, expected + ELEMENTS * next++, scale, name, t, worst) && good;
    }
    good = good && check_gradients(layer, zeros, name, RUN) && dot_optimizer_steps(optimizer) == RUN;
    free(expected);
    free(norms);
    dot_context_destroy(ctx);
    return good;
}

/* ---- all of them ------------------------------------------------------------------------------------------------------ */

/* The worst relative error of each algorithm, by type, over its runs. */
static double worst_error[DOT_ALGORITHMS][2];
static int runs_of[DOT_ALGORITHMS];

static int run_all(const char *prefix, const char *list, dot_algorithm algorithm, dot_dtype dtype)
{
    char name[FIELD_SIZE];
    int failures = 0;
    while (next_word(&list, ' ', name)) {
        settings s = settings_of(join(prefix, name, ""));
        if (!s.known || s.optimizer.algorithm != algorithm || (s.f64_only && dtype != DOT_F64))
            continue;
        runs_of[algorithm] += dtype == DOT_F64;
        set_bounds(&s);
        if (!run_trajectory(prefix, name, &s, dtype, &worst_error[algorithm][dtype == DOT_F64]))
            ++failures;
    }
    return failures;
}

static int run_algorithm(dot_algorithm algorithm, dot_dtype dtype)
{
    golden_file = training_file;
    int failures = run_all("trajectory.", golden_text("trajectories"), algorithm, dtype);
    golden_file = optimizers_file;
    failures += run_all("optimizer.", golden_text("optimizers"), algorithm, dtype);
    golden_file = matrix_file;
    failures += run_all("optimizer.", golden_text("optimizers"), algorithm, dtype);
    return failures;
}

static void test_trajectories(void **state)
{
    dot_algorithm algorithm = (dot_algorithm)(intptr_t)*state;
    const char *name = dot_algorithm_name(algorithm);
    int failures = run_algorithm(algorithm, DOT_F64) + run_algorithm(algorithm, DOT_F32);
    print_message("# %s: %d runs, worst error %.1e in float64, %.1e in float32\n", name, runs_of[algorithm], worst_error[algorithm][1],
                  worst_error[algorithm][0]);
    if (runs_of[algorithm] == 0)
        fail_msg("%s: no golden trajectory", name);
    if (failures)
        fail_msg("%s: %d trajectories failed", name, failures);
}

/* ---- late steps ------------------------------------------------------------------------------------------------------- */

/* At step 10^6 Adam's bias corrections are 1 to the last bits (0.999^1e6 = 1e-435): from moments that have long settled on a constant
   gradient g, m = g and v = g^2, the step is lr g / (|g| + eps). The step count comes from a checkpoint. */
static void test_late_step(void **state)
{
    (void)state;
    static const int64_t shape[1] = { 3 };
    static const double theta[3] = { 1, -2, 0.5 }, g[3] = { 0.25, -3, 1e-5 };
    const char *path = scratch_path("late.safetensors");
    dot_context *ctx = context_of(DOT_F64, 0);
    dot_layer *layer = dot_nn_custom(ctx, "late", forward_nothing, NULL);
    dot_tensor *w = dot_layer_add_parameter(layer, "w", DOT_KIND_WEIGHT, 1, shape);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAM);
    o.lr = 0.1;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
    for (int64_t step = 1; step <= 1000001; ++step) {
        dot_step_begin(ctx);
        dot_tensor *slope = dot_input(ctx, DOT_F64, 1, shape, g);
        dot_backward(dot_sum(dot_mul(w, slope), DOT_ALL_AXES, false));
        if (step == 1000000) {
            require(ctx, dot_checkpoint_save(path, layer, optimizer, step), "save");
            dot_tensor_set(w, DOT_ALL, theta, 3);
            require(ctx, dot_checkpoint_load(path, layer, optimizer, NULL), "load");
            dot_tensor_set(w, DOT_ALL, theta, 3);
            dot_step_begin(ctx);
            dot_backward(dot_sum(dot_mul(w, dot_input(ctx, DOT_F64, 1, shape, g)), DOT_ALL_AXES, false));
            dot_optimizer_step(optimizer, 1);
            break;
        }
        dot_optimizer_step(optimizer, 0);
    }
    double ours[3], expected[3];
    for (int i = 0; i < 3; ++i)
        expected[i] = theta[i] - 0.1 * g[i] / (fabs(g[i]) + 1e-8);
    assert_true(dot_tensor_get(w, 0, ours, 3));
    remove(path);
    dot_context_destroy(ctx);
    assert_true(agree("late step", ours, expected, NULL, 3, 1e-12, 0));
}

/* ---- a rule from outside ------------------------------------------------------------------------------------------------ */

/* RMSprop as a user would write it: against the library's own. */
static void update_rmsprop(void *user, const dot_rule_range *r)
{
    const double *beta = (const double *)user;
    double *theta = (double *)r->theta, *v = (double *)r->state[0];
    const double *gradient = (const double *)r->gradient;
    for (int64_t i = 0; i < r->count; ++i) {
        double g = r->gradient_scale * gradient[i] + r->l2 * theta[i];
        v[i] = *beta * v[i] + (1 - *beta) * g * g;
        theta[i] = r->keep * theta[i] - r->lr * g / (sqrt(v[i]) + 1e-8);
    }
}

static void test_custom_rule(void **state)
{
    (void)state;
    double beta = 0.99, first[2][ELEMENTS];
    dot_rule rule = { "rmsprop-of-mine", 1, update_rmsprop, &beta };
    settings s;
    memset(&s, 0, sizeof s);
    snprintf(s.stream, sizeof s.stream, "plain");
    for (int own = 0; own < 2; ++own) {
        dot_tensor *tensors[TENSORS];
        double given[ELEMENTS];
        dot_context *ctx = context_of(DOT_F64, 0);
        dot_layer *layer = probe_layer(ctx, &s, tensors, given);
        dot_optimizer_options o = dot_optimizer_defaults(own ? DOT_CUSTOM : DOT_RMSPROP);
        o.lr = 0.01;
        o.weight_decay = 0.1;
        o.decay = DOT_DECAY_L2;
        o.rule = own ? &rule : NULL;
        dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
        require(ctx, optimizer != NULL, "custom rule");
        for (int t = 1; t <= 50; ++t) {
            probe_backward(ctx, &s, tensors, t, given);
            require(ctx, dot_optimizer_step(optimizer, multiplier(t)), "custom rule");
        }
        double *next = first[own];
        for (int p = 0; p < TENSORS; next += probe[p++].count)
            assert_true(dot_parameter_get(layer, probe[p].name, 0, next, probe[p].count));
        dot_context_destroy(ctx);
    }
    assert_true(agree("a rule of the user's", first[1], first[0], NULL, ELEMENTS, 1e-13, 0));
}

/* ---- state precision ----------------------------------------------------------------------------------------------------- */

enum { WIDE = 3000 };

/* Adam on a quadratic with noise, sum c (w - target)^2 / 2: the distance to the target at the end. */
static double distance_after(dot_algorithm algorithm, dot_state_precision precision, double *bytes)
{
    static const int64_t shape[1] = { WIDE };
    static float target[WIDE], noise[WIDE];
    double sum = 0, values[WIDE];
    dot_context *ctx = context_of(DOT_F32, 5);
    dot_layer *layer = dot_nn_custom(ctx, "wide", forward_nothing, NULL);
    dot_tensor *w = dot_layer_add_parameter(layer, "w", DOT_KIND_WEIGHT, 1, shape);
    dot_optimizer_options o = dot_optimizer_defaults(algorithm);
    o.lr = 0.01;
    o.weight_decay = 0;
    o.state = precision;
    size_t planned = dot_optimizer_bytes(layer, &o);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
    require(ctx, optimizer != NULL && dot_optimizer_state_bytes(optimizer) == planned, "state precision");
    *bytes = (double)planned / WIDE;
    for (int i = 0; i < WIDE; ++i)
        target[i] = (float)(2 * uniform(70, (uint32_t)i) - 1);
    for (int t = 0; t < 600; ++t) {
        for (int i = 0; i < WIDE; ++i)
            noise[i] = (float)(0.2 * (uniform(100 + (uint32_t)t, (uint32_t)i) - 0.5));
        dot_step_begin(ctx);
        dot_tensor *away = dot_sub(w, dot_input(ctx, DOT_F32, 1, shape, target));
        dot_tensor *loss = dot_add(dot_mul_scalar(dot_sum(dot_square(away), DOT_ALL_AXES, false), 0.5),
                                   dot_sum(dot_mul(w, dot_input(ctx, DOT_F32, 1, shape, noise)), DOT_ALL_AXES, false));
        dot_backward(loss);
        require(ctx, dot_optimizer_step(optimizer, t < 400 ? 1 : 0.1), "state precision");
    }
    assert_true(dot_tensor_get(w, 0, values, WIDE));
    for (int i = 0; i < WIDE; ++i)
        sum += (values[i] - (double)target[i]) * (values[i] - (double)target[i]);
    dot_context_destroy(ctx);
    return sqrt(sum / WIDE);
}

/* Each precision costs the bytes that it says, and trains about as well as full precision. */
static void test_state_precision(void **state)
{
    (void)state;
    static const dot_algorithm algorithms[] = { DOT_MOMENTUM, DOT_ADAM, DOT_LION, DOT_RMSPROP, DOT_ADAN };
    static const double per_state[] = { 4, 2, 4, 1 + 4.0 / 256 };
    for (int a = 0; a < COUNT(algorithms); ++a) {
        double bytes[4], distance[4];
        for (int p = 0; p < 4; ++p)
            distance[p] = distance_after(algorithms[a], (dot_state_precision)p, &bytes[p]);
        print_message("# %s: distance to the minimum %.4f with full state, %.4f bfloat16, %.4f with compensation, %.4f 8-bit\n",
                      dot_algorithm_name(algorithms[a]), distance[0], distance[1], distance[2], distance[3]);
        for (int p = 0; p < 4; ++p) {
            assert_true(fabs(bytes[p] - bytes[0] / 4 * per_state[p]) < 0.01 * bytes[0]);
            if (!(distance[p] < 1.5 * distance[0] + 0.01))
                fail_msg("%s with state precision %d: distance %g, full %g", dot_algorithm_name(algorithms[a]), p, distance[p], distance[0]);
        }
    }
}

/* The mean of a constant square in bfloat16: rounding to the nearest would leave v where it is, stochastic rounding does not. */
static void test_stochastic_rounding(void **state)
{
    (void)state;
    static const int64_t shape[1] = { WIDE };
    static float g[WIDE];
    double mean = 0, values[WIDE];
    const char *path = scratch_path("bf16.safetensors");
    dot_context *ctx = context_of(DOT_F32, 3);
    dot_layer *layer = dot_nn_custom(ctx, "wide", forward_nothing, NULL);
    dot_tensor *w = dot_layer_add_parameter(layer, "w", DOT_KIND_WEIGHT, 1, shape);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAM);
    o.state = DOT_STATE_BF16;
    o.lr = 1;
    o.beta1 = 0;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
    for (int t = 0; t < 1001; ++t) {            /* g = 1 for one step, then 0: v decays as 0.999^t, and m = 0 */
        for (int i = 0; i < WIDE; ++i)
            g[i] = t == 0 || t == 1000 ? 1 : 0;
        if (t == 1000) {
            double zero[WIDE] = { 0 };
            dot_tensor_set(w, DOT_ALL, zero, WIDE);
        }
        dot_step_begin(ctx);
        dot_backward(dot_sum(dot_mul(w, dot_input(ctx, DOT_F32, 1, shape, g)), DOT_ALL_AXES, false));
        require(ctx, dot_optimizer_step(optimizer, 1), "stochastic rounding");
    }
    /* theta = -1 / sqrt(v / (1 - 0.999^1001)), v = 0.001 (0.999^1000 + 1) */
    assert_true(dot_tensor_get(w, 0, values, WIDE));
    for (int i = 0; i < WIDE; ++i)
        mean += 1 / (values[i] * values[i]) / WIDE;
    double expected = 0.001 * (pow(0.999, 1000) + 1) / (1 - pow(0.999, 1001));
    dot_context_destroy(ctx);
    remove(path);
    if (!(fabs(mean / expected - 1) < 0.01))
        fail_msg("mean of v is %g, not %g", mean, expected);
}

/* ---- bits of the rules made of products ----------------------------------------------------------------------------------- */

enum { INPUTS = 192, OUTPUTS = 128 };       /* enough for the products to be spread over the threads */
typedef struct trial { dot_algorithm algorithm; int64_t in, out; int steps; } trial;

/* Weights of lane `lane` after some steps on a layer; interrupted: saved and loaded after the fifth. */
static void trial_run(const trial *tried, int threads, int lanes, int lane, bool interrupted, double *weights)
{
    static const uint64_t seeds[2] = { 4, 5 };
    const int64_t shape[2] = { 7, tried->in };
    const char *path = scratch_path("trial.safetensors");
    float x[7 * INPUTS];
    dot_context_options co = dot_context_defaults();
    co.threads = threads;
    co.lanes = lanes;
    co.lane_seeds = lanes == 1 ? &seeds[lane] : seeds;
    dot_optimizer_options o = dot_optimizer_defaults(tried->algorithm);
    o.rank = 2;
    o.period = 3;
    o.max_precond_dim = OUTPUTS;
    dot_context *ctx = dot_context_create(&co);
    dot_layer *net = dot_nn_linear(ctx, tried->in, tried->out);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &o);
    assert_int_equal(dot_optimizer_state_bytes(optimizer), dot_optimizer_bytes(net, &o));
    int64_t allocations = 0;
    for (int64_t t = 0; t < tried->steps; ++t) {
        if (t == 2)                             /* the step memory is one piece from the second step on */
            allocations = dot_memory(ctx).allocations;
        for (int i = 0; i < 7 * tried->in; ++i)
            x[i] = (float)(2 * uniform(300 + (uint32_t)t, (uint32_t)i) - 1);
        dot_step_begin(ctx);
        dot_backward(dot_mean(dot_square(dot_forward(net, dot_input(ctx, DOT_F32, 2, shape, x))), DOT_ALL_AXES, false));
        dot_optimizer_step(optimizer, 1);
        if (interrupted && t == 4) {
            require(ctx, dot_checkpoint_save(path, net, optimizer, t), "save");
            dot_context_destroy(ctx);
            ctx = dot_context_create(&co);
            net = dot_nn_linear(ctx, tried->in, tried->out);
            optimizer = dot_optimizer_create(ctx, net, &o);
            require(ctx, dot_checkpoint_load(path, net, optimizer, NULL), "load");
            remove(path);
        }
    }
    assert_true(interrupted || dot_memory(ctx).allocations == allocations);
    require(ctx, dot_parameter_get(net, "weight", lanes == 1 ? 0 : lane, weights, tried->in * tried->out), "trial");
    dot_context_destroy(ctx);
}

static void test_product_bits(void **state)
{
    (void)state;
    static const dot_algorithm algorithms[] = { DOT_SHAMPOO, DOT_SOAP, DOT_PSGD_KRON, DOT_GALORE, DOT_SCION, DOT_MUON };
    static double expected[INPUTS * OUTPUTS], other[INPUTS * OUTPUTS];
    for (int a = 0; a < COUNT(algorithms); ++a)
        for (int lane = 0; lane < 2; ++lane) {
            trial small = { algorithms[a], 6, 5, 10 }, large = { algorithms[a], INPUTS, OUTPUTS, 3 };
            trial_run(&small, 1, 1, lane, false, expected);
            trial_run(&small, 4, 2, lane, false, other);
            assert_memory_equal(expected, other, 30 * sizeof *expected);
            trial_run(&small, 2, 2, lane, true, other);
            assert_memory_equal(expected, other, 30 * sizeof *expected);
            if (algorithms[a] == DOT_SHAMPOO || algorithms[a] == DOT_GALORE)    /* the eigenvectors take long */
                continue;
            trial_run(&large, 1, 1, lane, false, expected);
            trial_run(&large, 3, 1, lane, false, other);
            assert_memory_equal(expected, other, sizeof expected);
            trial_run(&large, 3, 2, lane, false, other);
            assert_memory_equal(expected, other, sizeof expected);
        }
}

/* ---- refusals ------------------------------------------------------------------------------------------------------------- */

/* Creating with these options is refused with a sentence that has `word`, and leaves the context as it was. */
static void refused(dot_context *ctx, dot_layer *layer, const dot_optimizer_options *o, const char *word)
{
    assert_null(dot_optimizer_create(ctx, layer, o));
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_ARGUMENT);
    if (!strstr(dot_error(ctx), word) || !strstr(dot_error(ctx), "dot_optimizer_create"))
        fail_msg("'%s' does not say '%s'", dot_error(ctx), word);
    dot_error_clear(ctx);
}

static void test_refusals(void **state)
{
    (void)state;
#define RANGE(constant, field, value, least, greatest, meaning) { offsetof(dot_optimizer_options, field), #field, least, greatest },
    static const struct { size_t offset; const char *name; double least, greatest; } ranges[] = { DOT_HYPERPARAMETERS(RANGE) };
    dot_context *ctx = context_of(DOT_F32, 0);
    dot_layer *layer = dot_nn_linear(ctx, 4, 3);
    dot_optimizer_options o;
    for (int i = 0; i < COUNT(ranges); ++i) {
        double bad[3] = { NAN, ranges[i].least - fabs(ranges[i].least) - 1, ranges[i].greatest * 2 + 1 };
        for (int k = 0; k < 3; ++k) {
            o = dot_optimizer_defaults(DOT_ADAM);
            *(double *)(void *)((char *)&o + ranges[i].offset) = bad[k];
            refused(ctx, layer, &o, ranges[i].name);
        }
        assert_string_equal(dot_hyper_name((dot_hyper)i), ranges[i].name);
    }
    o = dot_optimizer_defaults(DOT_SGD);
    o.nesterov = true;
    refused(ctx, layer, &o, "nesterov");
    o = dot_optimizer_defaults(DOT_LION);
    o.dialect = DOT_DIALECT_TF;
    refused(ctx, layer, &o, "tf");
    o.dialect = (dot_dialect)99;
    refused(ctx, layer, &o, "99");
    o = dot_optimizer_defaults(DOT_MUON);
    o.state = DOT_STATE_8BIT;
    refused(ctx, layer, &o, "muon");
    o = dot_optimizer_defaults(DOT_ADAM);
    o.state = (dot_state_precision)7;
    refused(ctx, layer, &o, "state 7");
    o = dot_optimizer_defaults(DOT_ADAFACTOR);
    o.cautious = true;
    refused(ctx, layer, &o, "cautious");
    o = dot_optimizer_defaults(DOT_CUSTOM);
    refused(ctx, layer, &o, "rule");
    o = dot_optimizer_defaults(DOT_SCHEDULE_FREE_ADAMW);
    o.beta1 = 0;
    refused(ctx, layer, &o, "beta1");
    o = dot_optimizer_defaults(DOT_PSGD_KRON);
    o.initial = 0;
    refused(ctx, layer, &o, "initial 0");
    o.initial = 1;
    dot_optimizer *kron = dot_optimizer_create(ctx, layer, &o);
    assert_false(dot_optimizer_set(kron, DOT_HYPER_MAX_PRECOND_DIM, 0, 0, 3));
    assert_non_null(strstr(dot_error(ctx), "max_precond_dim 3"));
    dot_error_clear(ctx);
    dot_optimizer *polyak = (o = dot_optimizer_defaults(DOT_POLYAK_SGD), dot_optimizer_create(ctx, layer, &o));
    assert_false(dot_optimizer_step(polyak, 1));
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_STATE);
    dot_context_destroy(ctx);
}

/* ---- schedule-free: where it is evaluated ------------------------------------------------------------------------------------- */

/* x = y + (1 - 1/beta1) (z - y) is the mean of the z so far, with equal weights under a constant rate; and the way back is exact. */
static void test_averaged_point(void **state)
{
    (void)state;
    static const double start[2] = { 5, -3 };
    dot_context *ctx = context_of(DOT_F64, 0);
    dot_layer *layer = dot_nn_custom(ctx, "pair", forward_nothing, NULL);
    static const int64_t shape[1] = { 2 };
    dot_tensor *w = dot_layer_add_parameter(layer, "w", DOT_KIND_WEIGHT, 1, shape);
    dot_tensor_set(w, DOT_ALL, start, 2);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_SCHEDULE_FREE_SGD);
    o.lr = 0.1;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
    double z[2] = { 5, -3 }, sum[2] = { 0, 0 }, y[2], x[2], again[2];
    for (int t = 1; t <= 20; ++t) {
        assert_true(dot_tensor_get(w, 0, y, 2));
        dot_step_begin(ctx);
        dot_backward(dot_mul_scalar(dot_sum(dot_square(w), DOT_ALL_AXES, false), 0.5));
        require(ctx, dot_optimizer_step(optimizer, 1), "schedule-free");
        for (int i = 0; i < 2; ++i) {
            z[i] -= 0.1 * y[i];         /* the gradient of y^2/2 at y */
            sum[i] += z[i];
        }
        assert_true(dot_tensor_get(w, 0, y, 2));
        require(ctx, dot_optimizer_averaged(optimizer, true), "averaged");
        assert_true(dot_tensor_get(w, 0, x, 2));
        double mean[2] = { sum[0] / t, sum[1] / t };
        assert_true(agree("averaged point", x, mean, NULL, 2, 1e-12, 0));
        require(ctx, dot_optimizer_averaged(optimizer, false), "averaged");
        assert_true(dot_tensor_get(w, 0, again, 2));
        assert_memory_equal(again, y, sizeof y);
    }
    require(ctx, dot_optimizer_averaged(optimizer, true), "averaged");
    assert_false(dot_optimizer_step(optimizer, 1));
    dot_context_destroy(ctx);
}

/* ---- Hutchinson ------------------------------------------------------------------------------------------------------------- */

static dot_tensor *diagonal_target;
static dot_tensor *diagonal_loss(void *user)
{
    dot_tensor *w = (dot_tensor *)user;
    dot_step_begin(dot_tensor_context(w));
    return dot_mul_scalar(dot_sum(dot_mul(diagonal_target, dot_square(w)), DOT_ALL_AXES, false), 0.5);
}

/* The loss sum h w^2 / 2 has the diagonal Hessian h, of which z * Hz is exact: AdaHessian's first step is lr g / (h + eps), as far as
   the precision keeps h^2, whose root has half its relative error. The difference of gradients itself is good to 1e-11 of h in
   float64 and to 1e-5 in float32. */
static void hutchinson_case(dot_dtype dtype, dot_state_precision precision, const double h[4], double tolerance)
{
    static const int64_t shape[1] = { 4 };
    static const double start[4] = { 1, -2, 3, 0.25 };
    dot_context *ctx = context_of(dtype, 9);
    dot_layer *layer = dot_nn_custom(ctx, "bowl", forward_nothing, NULL);
    dot_tensor *w = dot_layer_add_parameter(layer, "w", DOT_KIND_WEIGHT, 1, shape);
    diagonal_target = dot_tensor_create(ctx, dtype, 1, shape);
    dot_tensor_set(diagonal_target, DOT_ALL, h, 4);
    dot_tensor_set(w, DOT_ALL, start, 4);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAHESSIAN);
    o.state = precision;
    dot_optimizer *optimizer = dot_optimizer_create(ctx, layer, &o);
    require(ctx, dot_optimizer_hutchinson(optimizer, diagonal_loss, w), "hutchinson");
    double ours[4], moved[4], expected[4];
    assert_true(dot_tensor_get(w, 0, ours, 4));
    assert_memory_equal(ours, start, sizeof ours);
    dot_backward(diagonal_loss(w));
    require(ctx, dot_optimizer_step(optimizer, 1), "adahessian");
    assert_true(dot_tensor_get(w, 0, ours, 4));
    for (int i = 0; i < 4; ++i) {
        moved[i] = ours[i] - start[i];
        expected[i] = -o.lr * h[i] * start[i] / (h[i] + o.eps);
    }
    dot_context_destroy(ctx);
    assert_true(agree("hutchinson", moved, expected, NULL, 4, tolerance, 0));
}

static void test_hutchinson(void **state)
{
    (void)state;
    static const double wide[4] = { 1, 10, 0.5, 100 }, near[4] = { 1, 1.75, 2, 1.25 };  /* 8 bits: 128 steps to the largest of a block */
    hutchinson_case(DOT_F64, DOT_STATE_FULL, wide, 1e-8);
    hutchinson_case(DOT_F32, DOT_STATE_FULL, wide, 1e-4);
    hutchinson_case(DOT_F32, DOT_STATE_BF16_KAHAN, wide, 1e-4);
    hutchinson_case(DOT_F32, DOT_STATE_BF16, wide, 1.0 / 256);
    hutchinson_case(DOT_F32, DOT_STATE_8BIT, near, 1.0 / 128);
}

/* ---- the table ------------------------------------------------------------------------------------------------------------ */

/* State of a 256 x 256 matrix, in bytes per parameter. */
static double state_bytes(dot_algorithm algorithm)
{
    dot_context *ctx = context_of(DOT_F32, 0);
    dot_optimizer_options o = dot_optimizer_defaults(algorithm);
    double bytes = (double)dot_optimizer_bytes(dot_nn_linear_no_bias(ctx, 256, 256), &o) / 65536;
    dot_context_destroy(ctx);
    return bytes;
}

/* What the golden numbers of an algorithm were held against, or "formula": transcribed from the paper alone. */
static const char *reference_of(dot_algorithm algorithm)
{
    dot_safetensors *files[] = { optimizers_file, matrix_file };
    const char *key = join("reference.", dot_algorithm_name(algorithm), ""), *text = NULL;
    for (int i = 0; i < COUNT(files) && !text; ++i)
        text = dot_safetensors_metadata(files[i], key);
    return text ? text : "own reference";
}

static void print_table(void)
{
    printf("| optimizer | | source | dialects | state | compared with | runs | float64 | float32 |\n|---|---|---|---|---|---|---|---|---|\n");
    for (int i = 0; i < DOT_ALGORITHMS; ++i) {
        dot_algorithm a = (dot_algorithm)i;
        if (a == DOT_CUSTOM)
            continue;
        bool good = run_algorithm(a, DOT_F64) + run_algorithm(a, DOT_F32) == 0;
        printf("| %s | %s | %s | ", dot_algorithm_name(a), dot_algorithm_description(a), dot_algorithm_paper(a));
        for (int d = 1; d < DOT_DIALECTS; ++d)
            if (dot_algorithm_has(a, (dot_dialect)d))
                printf("%s ", dot_dialect_name((dot_dialect)d));
        printf("| %.3g | %s | %d | %.0e | %.0e |%s\n", state_bytes(a), reference_of(a), runs_of[a], worst_error[a][1], worst_error[a][0], good ? "" : " FAILED");
    }
}

/* ---- main ------------------------------------------------------------------------------------------------------------- */

static int open_both(void **state)
{
    int failed = open_golden(state);
    training_file = golden_file;
    optimizers_file = dot_safetensors_open(golden_context, GOLDEN_OPTIMIZERS);
    matrix_file = dot_safetensors_open(golden_context, GOLDEN_MATRIX);
    if (!optimizers_file || !matrix_file)
        print_error("%s or %s: %s\n", GOLDEN_OPTIMIZERS, GOLDEN_MATRIX, dot_error(golden_context));
    return failed || !optimizers_file || !matrix_file ? -1 : 0;
}

static int close_both(void **state)
{
    dot_safetensors_close(optimizers_file);
    dot_safetensors_close(matrix_file);
    golden_file = training_file;
    return close_golden(state);
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], "--table") == 0) {
        bool failed = open_both(NULL) != 0;
        if (!failed)
            print_table();
        return close_both(NULL) || failed;
    }
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    static const struct CMUnitTest others[] = {
        cmocka_unit_test(test_late_step), cmocka_unit_test(test_custom_rule), cmocka_unit_test(test_state_precision),
        cmocka_unit_test(test_stochastic_rounding), cmocka_unit_test(test_refusals), cmocka_unit_test(test_averaged_point),
        cmocka_unit_test(test_hutchinson),
        cmocka_unit_test(test_product_bits)
    };
    static struct CMUnitTest tests[DOT_ALGORITHMS + COUNT(others)];
    size_t count = 0;
    for (int i = 0; i < COUNT(others); ++i)
        tests[count++] = others[i];
    for (int a = 0; a < DOT_ALGORITHMS; ++a)
        if (a != DOT_CUSTOM) {
            struct CMUnitTest test = { dot_algorithm_name((dot_algorithm)a), test_trajectories, NULL, NULL, (void *)(intptr_t)a };
            tests[count++] = test;
        }
    return cmocka_run_group_tests_name("optimizers", tests, open_both, close_both);
}
