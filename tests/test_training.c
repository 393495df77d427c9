/* Optimizers, schedules, parameter groups, initialisation and training, against the golden numbers that
   golden/make_training.py makes with PyTorch. How each run is set up stands in the metadata of the golden file, so that both
   languages read the same words; inputs, gradients and first weights come from `uniform`, which the script has too. */
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
#include <unistd.h>

#define GOLDEN "tests/golden/training.safetensors"
#define GOLDEN_NET "tests/golden/training_net.safetensors"
#define GOLDEN_BATCHNORM "tests/golden/training_batchnorm.safetensors"
#define IMAGES "data/train-images-idx3-ubyte"
#include "golden.h"

static dot_schedule schedule_of(const settings *s)
{
    int64_t milestones[16];
    int count = 0;
    const char *cursor = s->milestones;
    char word[FIELD_SIZE];
    while (next_word(&cursor, ',', word)) {
        assert_true(count < COUNT(milestones));
        milestones[count++] = strtoll(word, NULL, 10);
    }
    if (strcmp(s->kind, "drop") == 0)
        return dot_schedule_step_drop(milestones, count, s->factor);
    if (strcmp(s->kind, "cosine") == 0)
        return dot_schedule_cosine((int64_t)s->total, s->floor);
    if (strcmp(s->kind, "restarts") == 0)
        return dot_schedule_warm_restarts((int64_t)s->total, (int)s->factor, s->floor);
    assert_true(s->kind[0] == 0 || strcmp(s->kind, "constant") == 0);
    return dot_schedule_constant();
}

/* ---- schedules ------------------------------------------------------------------------------------------------------ */

static bool check_schedule(const char *name)
{
    settings s = settings_of(join("schedule.", name, ""));
    dot_schedule schedule = schedule_of(&s);
    bool restarts = schedule.kind == DOT_SCHEDULE_WARM_RESTARTS, good = true;
    int64_t count, far_count;
    double *far_steps = golden("far_steps", &far_count);    /* rounded to double: the exact ones are below */
    static const int64_t far[] = { -1, -1000, INT32_MAX, INT64_C(2147483648), INT64_C(4294967301), INT64_C(1000000000007),
                                   INT64_C(9007199254740993), INT64_C(4611686018427387904), INT64_MAX };
    assert_int_equal(far_count, COUNT(far));
    for (int part = 0; part < 2; ++part) {
        const char *suffix = part ? ".far" : "", *label = join("schedule.", name, suffix);
        double *expected = golden(label, &count), *ours = doubles(count);
        assert_int_equal(count, part ? far_count : 2001);
        for (int64_t i = 0; i < count; ++i) {
            if (part)
                assert_true(far_steps[i] == (double)far[i]);
            ours[i] = dot_schedule_at(&schedule, part ? far[i] : i);
        }
        good &= agree(label, ours, expected, NULL, count, 2e-15, 2e-15);
        free(expected);
        expected = restarts ? golden(join("schedule.", name, part ? ".far.period" : ".period"), &count) : NULL;
        for (int64_t i = 0; i < count; ++i) {
            int64_t step = part ? far[i] : i, period = dot_schedule_period(&schedule, step, 1234567);
            bool right = !restarts ? period == 1234567
                       : expected[i] != 0 ? (double)period == expected[i]
                       : period > 0;    /* the true period is beyond int64_t */
            if (!right)
                print_error("%s: period %lld at step %lld\n", name, (long long)period, (long long)step);
            good &= right;
        }
        free(expected);
        free(ours);
    }
    free(far_steps);
    return good;
}

static void test_schedules(void **state)
{
    (void)state;
    const char *cursor = golden_text("schedules");
    char name[FIELD_SIZE];
    int failures = 0, count = 0;
    for (; next_word(&cursor, ' ', name); ++count)
        failures += !check_schedule(name);
    assert_int_equal(count, 16);
    assert_int_equal(failures, 0);
}

static void test_invalid_schedules(void **state)
{
    (void)state;
    static const int64_t many[17] = { 0 };
    dot_schedule bad[6];
    for (int i = 0; i < COUNT(bad); ++i)
        bad[i] = dot_schedule_cosine(10, 0);
    bad[0].kind = (dot_schedule_kind)99;
    bad[1].total = 0;
    bad[2] = dot_schedule_warm_restarts(0, 2, 0);
    bad[3] = dot_schedule_warm_restarts(10, 0, 0);
    bad[4] = dot_schedule_step_drop(many, 17, 0.1);
    bad[5] = dot_schedule_step_drop(many, 1, 0.1);
    bad[5].milestone_count = -1;
    for (int i = 0; i < COUNT(bad); ++i)
        if (!isnan(dot_schedule_at(&bad[i], 3)))
            fail_msg("invalid schedule %d gives %g", i, dot_schedule_at(&bad[i], 3));
    assert_true(isnan(dot_schedule_at(NULL, 0)));
}

/* ---- options -------------------------------------------------------------------------------------------------------- */

static void test_defaults(void **state)
{
    (void)state;
    static const struct {
        dot_algorithm algorithm;
        const char *name;
        double lr, weight_decay, beta1;
        dot_decay decay;
        bool relative_step;
    } table[] = {
        { DOT_SGD, "sgd", 1e-3, 0, 0, DOT_DECAY_L2, false },
        { DOT_ADAM, "adam", 1e-3, 0, 0.9, DOT_DECAY_L2, false },
        { DOT_ADAMW, "adamw", 1e-3, 1e-2, 0.9, DOT_DECAY_LR, false },
        { DOT_ADAFACTOR, "adafactor", 1e-2, 0, 0, DOT_DECAY_LR, true },
        { DOT_ADAMW_FACTORED, "adamw-factored", 1e-2, 0, 0, DOT_DECAY_LR, false }
    };
    for (int i = 0; i < COUNT(table); ++i) {
        dot_optimizer_options o = dot_optimizer_defaults(table[i].algorithm);
        dot_algorithm found = DOT_ALGORITHMS;
        assert_string_equal(dot_algorithm_name(table[i].algorithm), table[i].name);
        assert_true(dot_algorithm_find(table[i].name, &found) && found == table[i].algorithm);
        assert_true(o.algorithm == table[i].algorithm && o.lr == table[i].lr && o.weight_decay == table[i].weight_decay);
        assert_true(o.beta1 == table[i].beta1 && o.decay == table[i].decay);
        if (i >= 3)
            assert_true(o.relative_step == table[i].relative_step && o.scale_parameter);
        assert_true(o.decay_lr == 1 && o.decay_period == 1 && o.beta2 == 0.999 && o.eps == 1e-8 && o.dampening == 0);
        assert_true(!o.nesterov && !o.maximize && o.beta2_exponent == 0.8 && o.eps1 == 1e-30 && o.eps2 == 1e-3);
        assert_true(o.clip_threshold == 1 && o.groups == NULL && o.group_count == 0);
    }
    dot_algorithm found;
    assert_false(dot_algorithm_find("no such rule", &found));
    assert_null(dot_algorithm_name(DOT_ALGORITHMS));
}

/* ---- parameter groups ----------------------------------------------------------------------------------------------- */

enum { GROUPS = 3, GROUP_STEPS = 30 };

static unsigned kinds_of(const char *names)
{
    unsigned kinds = 0;
    char name[FIELD_SIZE];
    while (next_word(&names, ',', name))
        kinds |= strcmp(name, "bias") == 0 ? DOT_KIND_BIAS : strcmp(name, "norm") == 0 ? DOT_KIND_NORM : 0;
    return kinds;
}

static int groups_of(const char *name, settings texts[GROUPS], dot_parameter_group groups[GROUPS])
{
    static const char *const suffixes[GROUPS] = { ".1", ".2", ".3" };
    int count = 0;
    for (; count < GROUPS && dot_safetensors_metadata(golden_file, join("groups.", name, suffixes[count])); ++count) {
        texts[count] = settings_of(join("groups.", name, suffixes[count]));
        const settings *s = &texts[count];
        groups[count].pattern = strcmp(s->pattern, "-") == 0 ? NULL : s->pattern;
        groups[count].kinds = kinds_of(s->kinds);
        groups[count].lr = s->optimizer.lr;
        groups[count].weight_decay = s->optimizer.weight_decay;
    }
    return count;
}

static dot_layer *group_net(dot_context *ctx, const char *kind)
{
    dot_layer *first = dot_nn_linear(ctx, 5, 4), *act = dot_nn_tanh(ctx), *last = dot_nn_linear(ctx, 4, 3);
    dot_layer *net = strcmp(kind, "norm") == 0
        ? dot_nn_sequential(ctx, first, act, dot_nn_layer_norm(ctx, 4), last, (void *)NULL)
        : dot_nn_sequential(ctx, first, act, last, (void *)NULL);
    require(ctx, net != NULL, kind);
    set_parameters(net, 20, 1);
    return net;
}

static bool train_groups(const char *name, dot_context *ctx, dot_layer *net, dot_optimizer *optimizer, double half_lr)
{
    static const int64_t x_shape[2] = { 6, 5 }, y_shape[2] = { 6, 3 };
    double x[30], y[18], losses[GROUP_STEPS];
    int64_t count;
    double *expected = golden(join("groups.", name, ".losses"), &count);
    assert_int_equal(count, GROUP_STEPS);
    fill_uniform(x, COUNT(x), 30);
    fill_uniform(y, COUNT(y), 31);
    for (int step = 0; step < GROUP_STEPS; ++step) {
        if (step == 15)
            require(ctx, dot_optimizer_set(optimizer, DOT_HYPER_LR, 1, DOT_ALL, half_lr) &&
                         dot_optimizer_set(optimizer, DOT_HYPER_WEIGHT_DECAY, 0, DOT_ALL, 0.05), name);
        dot_step_begin(ctx);
        dot_tensor *loss = dot_mse_loss(dot_forward(net, dot_input(ctx, DOT_F64, 2, x_shape, x)),
                                        dot_input(ctx, DOT_F64, 2, y_shape, y));
        losses[step] = dot_item(loss, 0);
        dot_backward(loss);
        require(ctx, dot_optimizer_step(optimizer, multiplier(step)), name);
    }
    bool good = agree(join("groups.", name, ".losses"), losses, expected, NULL, GROUP_STEPS, 1e-12, 0);
    free(expected);
    return good;
}

static bool check_parameters(const char *group, dot_layer *net, double relative)
{
    bool good = true;
    char prefix[FIELD_SIZE];
    snprintf(prefix, sizeof prefix, "groups.%s", group);
    for (int p = 0; p < dot_layer_parameters(net); ++p) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(net, p, &info));
        int64_t count;
        const char *name = join(prefix, ".", info.name);
        double *expected = golden(name, &count), *ours = doubles(count);
        assert_true(dot_parameter_get(net, info.name, 0, ours, count));
        good &= agree(name, ours, expected, NULL, count, relative, relative);
        free(ours);
        free(expected);
    }
    return good;
}

static bool check_groups(const char *name)
{
    settings s = settings_of(join("groups.", name, "")), texts[GROUPS];
    dot_parameter_group groups[GROUPS];
    memset(groups, 0, sizeof groups);
    dot_context *ctx = context_of(DOT_F64, 0);
    dot_layer *net = group_net(ctx, golden_text(join("groups.", name, ".net")));
    s.optimizer.groups = groups;
    s.optimizer.group_count = groups_of(name, texts, groups);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &s.optimizer);
    require(ctx, optimizer != NULL, name);
    double half_lr = groups[0].lr / 2;
    bool good = dot_optimizer_get(optimizer, DOT_HYPER_LR, 0, 0) == s.optimizer.lr;
    for (int g = 0; g < s.optimizer.group_count; ++g)
        good = good && dot_optimizer_get(optimizer, DOT_HYPER_LR, g + 1, 0) == groups[g].lr &&
               dot_optimizer_get(optimizer, DOT_HYPER_WEIGHT_DECAY, g + 1, 0) == groups[g].weight_decay;
    if (!good)
        print_error("groups.%s: dot_optimizer_get\n", name);
    memset(groups, 0x7f, sizeof groups);    /* the optimizer has its own copy, */
    memset(texts, 0x7f, sizeof texts);      /* of the patterns too */
    good = train_groups(name, ctx, net, optimizer, half_lr) && good;
    good = dot_optimizer_get(optimizer, DOT_HYPER_LR, 1, 0) == half_lr &&
           dot_optimizer_get(optimizer, DOT_HYPER_WEIGHT_DECAY, 0, 0) == 0.05 && good;
    good = check_parameters(name, net, 1e-12) && good;
    dot_context_destroy(ctx);
    return good;
}

static void test_groups(void **state)
{
    (void)state;
    const char *cursor = golden_text("groups");
    char name[FIELD_SIZE];
    int failures = 0, count = 0;
    for (; next_word(&cursor, ' ', name); ++count)
        if (!check_groups(name)) {
            print_error("groups.%s failed\n", name);
            ++failures;
        }
    assert_int_equal(count, 6);
    assert_int_equal(failures, 0);
}

/* Three lanes, each with a learning rate and a decay of its own, are the three runs alone, bit for bit. */
static void train_lanes(int lanes, int first, double out[3][35])
{
    static const double lr[3] = { 1e-3, 3e-2, 1e-2 }, decay[3] = { 0, 0.1, 0.3 };
    static const int64_t x_shape[2] = { 6, 5 }, y_shape[2] = { 6, 3 };
    double x[30], y[18];
    fill_uniform(x, COUNT(x), 30);
    fill_uniform(y, COUNT(y), 31);
    dot_context_options options = dot_context_defaults();
    options.dtype = DOT_F64;
    options.lanes = lanes;
    dot_context *ctx = dot_context_create(&options);
    dot_layer *net = group_net(ctx, "plain");
    dot_optimizer_options adamw = dot_optimizer_defaults(DOT_ADAMW);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &adamw);
    for (int lane = 0; lane < lanes; ++lane) {
        dot_optimizer_set(optimizer, DOT_HYPER_LR, 0, lane, lr[first + lane]);
        dot_optimizer_set(optimizer, DOT_HYPER_WEIGHT_DECAY, 0, lane, decay[first + lane]);
    }
    for (int step = 0; step < 5; ++step) {
        dot_step_begin(ctx);
        dot_backward(dot_mse_loss(dot_forward(net, dot_input(ctx, DOT_F64, 2, x_shape, x)),
                                  dot_input(ctx, DOT_F64, 2, y_shape, y)));
        dot_clip_grad_norm(optimizer, 0.1);
        dot_optimizer_step(optimizer, multiplier(step));
    }
    for (int lane = 0; lane < lanes; ++lane) {
        require(ctx, dot_parameter_get(net, "0.weight", lane, out[first + lane], 20), "lanes");
        require(ctx, dot_parameter_get(net, "2.weight", lane, out[first + lane] + 20, 12), "lanes");
        require(ctx, dot_parameter_get(net, "2.bias", lane, out[first + lane] + 32, 3), "lanes");
    }
    dot_context_destroy(ctx);
}

static void test_lanes(void **state)
{
    (void)state;
    double together[3][35], alone[3][35];
    memset(together, 0, sizeof together);
    memset(alone, 0xff, sizeof alone);
    train_lanes(3, 0, together);
    for (int lane = 0; lane < 3; ++lane)
        train_lanes(1, lane, alone);
    assert_memory_equal(together, alone, sizeof together);
    assert_true(memcmp(together[0], together[1], sizeof together[0]) != 0);
}

/* ---- the autoencoder ------------------------------------------------------------------------------------------------ */

enum { STEPS = 50, BATCH = 128,
       STEPS_F64 = 12 };    /* float64 runs the portable kernels: twelve steps hold a restart and are seconds, not minutes */
#define GAIN 0.25    /* why so small: see golden/make_training.py */

static dot_layer *autoencoder(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults();
    half.kernel = 3;
    half.stride = 2;
    half.padding = 1;
    half.output_padding = 1;    /* transposed only */
    dot_layer *net = dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv2d(ctx, 32, 64, &half), dot_nn_relu(ctx),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, 64 * 7 * 7, 128),
        dot_nn_linear(ctx, 128, 64 * 7 * 7), dot_nn_unflatten(ctx, 0, 7, 7, 64),
        dot_nn_conv_transpose2d(ctx, 64, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, 32, 1, &half), dot_nn_sigmoid(ctx), (void *)NULL);
    require(ctx, net != NULL, "autoencoder");
    return net;
}

static void train_autoencoder(const char *id, dot_dtype dtype, int steps, double *losses)
{
    settings s = settings_of(join("autoencoder.", id, ""));
    dot_schedule schedule = schedule_of(&s);
    dot_context_options options = dot_context_defaults();
    options.dtype = dtype;
    dot_context *ctx = dot_context_create(&options);
    dot_dataset_options part = dot_dataset_defaults();
    part.shuffle = false;
    part.count = STEPS * BATCH;
    dot_dataset *data = dot_dataset_idx(ctx, IMAGES, NULL, &part);
    dot_layer *net = autoencoder(ctx);
    set_parameters(net, 0, GAIN);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &s.optimizer);
    require(ctx, optimizer != NULL && dot_dataset_count(data) == STEPS * BATCH, id);
    for (int step = 0; step < steps; ++step) {
        dot_step_begin(ctx);
        dot_tensor *x = dot_batch(data, BATCH, step);
        dot_tensor *loss = dot_mse_loss(dot_forward(net, x), x);
        losses[step] = dot_item(loss, 0);
        dot_backward(loss);
        if (s.optimizer.decay == DOT_DECAY_NORMALIZED)
            dot_optimizer_set(optimizer, DOT_HYPER_DECAY_PERIOD, 0, DOT_ALL,
                              (double)dot_schedule_period(&schedule, step, STEPS));
        dot_optimizer_step(optimizer, dot_schedule_at(&schedule, step));
        require(ctx, true, id);
    }
    dot_context_destroy(ctx);
}

/* In float32 the losses agree with PyTorch's, in float32 or float64, where it has the rule, or else with the double-precision
   reference. PyTorch's own two part by 3e-4 in B3, when rounding decides the sign of a gradient of almost nothing and Adam
   makes a whole step of it: which of the two a processor's order of summation follows is open, that it follows one is not. */
static void test_autoencoder_f32(void **state)
{
    const char *id = (const char *)*state, *single = join("autoencoder.", id, ".f32");
    int64_t count;
    double losses[STEPS], *torch32 = golden_has(single) ? golden(single, &count) : NULL;
    double *exact = golden(join("autoencoder.", id, ".f64"), &count);
    assert_int_equal(count, STEPS);
    train_autoencoder(id, DOT_F32, STEPS, losses);
    print_message("# autoencoder %s float32: %.2e from float64, %.2e from PyTorch's float32, which is %.2e from float64\n", id,
                  largest_relative(losses, exact, STEPS), torch32 ? largest_relative(losses, torch32, STEPS) : NAN,
                  torch32 ? largest_relative(torch32, exact, STEPS) : NAN);
    bool single_is_nearer = torch32 && largest_relative(losses, torch32, STEPS) < largest_relative(losses, exact, STEPS);
    bool good = agree(join(id, " float32", ""), losses, single_is_nearer ? torch32 : exact, NULL, STEPS, 1e-4, 0);
    free(torch32);
    free(exact);
    assert_true(good);
}

static void test_autoencoder_f64(void **state)
{
    const char *id = (const char *)*state;
    int64_t count;
    double losses[STEPS], *exact = golden(join("autoencoder.", id, ".f64"), &count);
    assert_int_equal(count, STEPS);
    train_autoencoder(id, DOT_F64, STEPS_F64, losses);
    print_message("# autoencoder %s float64: %.2e from the reference\n", id, largest_relative(losses, exact, STEPS_F64));
    bool good = agree(join(id, " float64", ""), losses, exact, NULL, STEPS_F64, 1e-9, 0);
    free(exact);
    assert_true(good);
}

static void test_autoencoder_parameters(void **state)
{
    (void)state;
    dot_context *ctx = context_of(DOT_F32, 0);
    dot_layer *net = autoencoder(ctx);
    char text[1024];
    size_t used = 0;
    for (int p = 0; p < dot_layer_parameters(net); ++p) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(net, p, &info));
        used += (size_t)snprintf(text + used, sizeof text - used, "%s", info.name);
        for (int axis = 0; axis < info.rank; ++axis)
            used += (size_t)snprintf(text + used, sizeof text - used, "%c%lld", axis ? ',' : '[', (long long)info.shape[axis]);
        used += (size_t)snprintf(text + used, sizeof text - used, "];");
        assert_int_equal(dot_tensor_size(info.tensor), shape_count(info.rank, info.shape));
    }
    assert_string_equal(text, golden_text("autoencoder.parameters"));
    assert_int_equal(dot_layer_parameter_count(net), 843649);
    dot_parameter_info info;
    assert_false(dot_layer_parameter(net, dot_layer_parameters(net), &info));
    dot_context_destroy(ctx);
}

/* Adam keeps two numbers a parameter; Adafactor rows + columns of [out, rest], vectors whole: 10 707 numbers. */
static void test_state_bytes(void **state)
{
    (void)state;
    static const struct { dot_algorithm algorithm; double beta1; size_t numbers; } table[] = {
        { DOT_SGD, 0, 0 }, { DOT_SGD, 0.9, 843649 }, { DOT_ADAM, 0.9, 2 * 843649 }, { DOT_ADAMW, 0.9, 2 * 843649 },
        { DOT_ADAFACTOR, 0, 10707 }, { DOT_ADAFACTOR, 0.9, 10707 + 843649 }, { DOT_ADAMW_FACTORED, 0, 10707 }
    };
    dot_context *ctx = context_of(DOT_F32, 0);
    dot_layer *net = autoencoder(ctx);
    for (int i = 0; i < COUNT(table); ++i) {
        dot_optimizer_options o = dot_optimizer_defaults(table[i].algorithm);
        o.beta1 = table[i].beta1;
        dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &o);
        require(ctx, optimizer != NULL, "dot_optimizer_create");
        size_t bytes = dot_optimizer_state_bytes(optimizer);
        if (bytes < 4 * table[i].numbers || bytes > 4 * table[i].numbers + 4096)
            fail_msg("%s, beta1 %g: state of %zu bytes for %zu numbers", dot_algorithm_name(table[i].algorithm), o.beta1,
                     bytes, table[i].numbers);
    }
    dot_context_destroy(ctx);
}

/* ---- files ---------------------------------------------------------------------------------------------------------- */

static void temporary_path(char path[FIELD_SIZE])
{
    const char *folder = getenv("TMPDIR");
    folder = folder && strlen(folder) < 80 ? folder : "/tmp";
    snprintf(path, FIELD_SIZE, "%s/dotopt_training_%ld.safetensors", folder, (long)getpid());
}

static double *values_of(dot_layer *layer, const char *name, int64_t count)
{
    double *values = doubles(count);
    assert_true(dot_parameter_get(layer, name, 0, values, count));
    return values;
}

static void assert_same_parameters(dot_layer *a, dot_layer *b)
{
    assert_int_equal(dot_layer_parameters(a), dot_layer_parameters(b));
    for (int p = 0; p < dot_layer_parameters(a); ++p) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(a, p, &info));
        int64_t count = shape_count(info.rank, info.shape);
        double *left = values_of(a, info.name, count), *right = values_of(b, info.name, count);
        assert_memory_equal(left, right, (size_t)count * sizeof *left);
        free(left);
        free(right);
    }
}

static dot_tensor *random_input(dot_context *ctx, dot_dtype dtype, const int64_t shape[4], uint32_t stream)
{
    int64_t count = shape_count(4, shape);
    dot_tensor *x = dot_tensor_create(ctx, dtype, 4, shape);
    double *values = doubles(count);
    fill_uniform(values, count, stream);
    require(ctx, dot_tensor_set(x, DOT_ALL, values, count), "dot_tensor_set");
    free(values);
    return x;
}

/* Saved and loaded into a net with other weights: the same bits, and the same outputs. TRAINING_SAVE=file keeps the file for
   make_training.py --check. */
static void test_save_load(void **state)
{
    (void)state;
    static const int64_t shape[4] = { 2, 28, 28, 1 };
    char path[FIELD_SIZE];
    const char *keep = getenv("TRAINING_SAVE");
    temporary_path(path);
    dot_context *a = context_of(DOT_F32, 1), *b = context_of(DOT_F32, 2);
    dot_layer *saved = autoencoder(a), *loaded = autoencoder(b);
    set_parameters(saved, 0, GAIN);
    require(a, dot_save(saved, keep ? keep : path), "dot_save");
    require(b, dot_load(loaded, keep ? keep : path), "dot_load");
    if (!keep)
        remove(path);
    assert_same_parameters(saved, loaded);
    dot_eval_begin(a);
    dot_eval_begin(b);
    dot_tensor *out = dot_forward(saved, random_input(a, DOT_F32, shape, 33));
    dot_tensor *again = dot_forward(loaded, random_input(b, DOT_F32, shape, 33));
    require(a, out != NULL, "forward");
    require(b, again != NULL, "forward");
    assert_int_equal(dot_tensor_size(out), 2 * 28 * 28);
    assert_memory_equal(dot_tensor_data(out, 0), dot_tensor_data(again, 0), 2 * 28 * 28 * sizeof(float));
    dot_context_destroy(a);
    dot_context_destroy(b);
}

static dot_layer *small_net(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults(), grouped = dot_conv_defaults();
    half.stride = 2;
    half.padding = 1;
    half.output_padding = 1;
    grouped.padding = 1;
    grouped.groups = 2;
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 2, 4, &half), dot_nn_relu(ctx),
        dot_nn_conv2d(ctx, 4, 6, &grouped), dot_nn_group_norm(ctx, 3, 6),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, 96, 10), dot_nn_tanh(ctx),
        dot_nn_linear(ctx, 10, 96), dot_nn_unflatten(ctx, 0, 4, 4, 6),
        dot_nn_conv_transpose2d(ctx, 6, 4, &grouped), dot_nn_leaky_relu(ctx, 0.1),
        dot_nn_conv_transpose2d(ctx, 4, 3, &half), dot_nn_sigmoid(ctx), (void *)NULL);
}

static dot_layer *batchnorm_net(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults(), one = dot_conv_defaults();
    half.stride = 2;
    half.padding = 1;
    one.kernel = 1;
    one.bias = false;
    return dot_nn_sequential(ctx, dot_nn_conv2d(ctx, 2, 4, &half), dot_nn_batch_norm(ctx, 4), dot_nn_relu(ctx),
                             dot_nn_conv2d(ctx, 4, 3, &one), (void *)NULL);
}

/* x [3, 8, 8, 2]; the formula's order is PyTorch's, [3, 2, 8, 8]. */
static dot_tensor *image_input(dot_context *ctx, dot_dtype dtype)
{
    static const int64_t shape[4] = { 3, 8, 8, 2 };
    double nchw[384], nhwc[384];
    fill_uniform(nchw, 384, 32);
    for (int i = 0; i < 384; ++i) {
        int c = i % 2, w = i / 2 % 8, h = i / 16 % 8, n = i / 128;
        nhwc[i] = nchw[((n * 2 + c) * 8 + h) * 8 + w];
    }
    dot_tensor *x = dot_tensor_create(ctx, dtype, 4, shape);
    require(ctx, dot_tensor_set(x, DOT_ALL, nhwc, 384), "dot_tensor_set");
    return x;
}

static void check_loaded(dot_layer *(*make)(dot_context *), const char *path, const char *output, dot_dtype dtype)
{
    dot_context *ctx = context_of(dtype, 3);
    dot_layer *net = make(ctx);
    require(ctx, net != NULL, path);
    require(ctx, dot_load(net, path), path);
    dot_eval_begin(ctx);
    dot_tensor *y = dot_forward(net, image_input(ctx, dtype));
    require(ctx, y != NULL, output);
    int64_t count;
    double *expected = golden(output, &count), *ours = doubles(count), largest = 0;
    assert_int_equal(dot_tensor_size(y), count);
    assert_true(dot_tensor_get(y, 0, ours, count));
    for (int64_t i = 0; i < count; ++i)
        largest = fmax(largest, fabs(expected[i]));
    bool good = agree(output, ours, expected, NULL, count, 0, largest * (dtype == DOT_F32 ? 2e-6 : 1e-13));
    free(expected);
    free(ours);
    dot_context_destroy(ctx);
    assert_true(good);
}

static void test_load_pytorch(void **state)
{
    (void)state;
    check_loaded(small_net, GOLDEN_NET, "net.output", DOT_F32);
    check_loaded(small_net, GOLDEN_NET, "net.output", DOT_F64);
}

/* PyTorch's file has the integer buffer num_batches_tracked besides. */
static void test_load_pytorch_batchnorm(void **state)
{
    (void)state;
    check_loaded(batchnorm_net, GOLDEN_BATCHNORM, "batchnorm.output", DOT_F32);
    check_loaded(batchnorm_net, GOLDEN_BATCHNORM, "batchnorm.output", DOT_F64);
}

/* A file of PyTorch's, loaded and saved: the same names, shapes, types and bytes. */
static void test_resave_pytorch(void **state)
{
    (void)state;
    char path[FIELD_SIZE];
    temporary_path(path);
    dot_context *ctx = context_of(DOT_F32, 4);
    dot_layer *net = small_net(ctx);
    require(ctx, dot_load(net, GOLDEN_NET) && dot_save(net, path), "load and save");
    dot_safetensors *theirs = dot_safetensors_open(ctx, GOLDEN_NET), *ours = dot_safetensors_open(ctx, path);
    remove(path);
    require(ctx, theirs && ours, "dot_safetensors_open");
    assert_int_equal(dot_safetensors_count(ours), dot_safetensors_count(theirs));
    for (int i = 0; i < dot_safetensors_count(theirs); ++i) {
        dot_safetensors_entry a, b;
        assert_true(dot_safetensors_entry_at(theirs, i, &a));
        int j = dot_safetensors_find(ours, a.name);
        assert_true(j >= 0 && dot_safetensors_entry_at(ours, j, &b));
        assert_string_equal(a.dtype, b.dtype);
        assert_int_equal(a.rank, b.rank);
        assert_memory_equal(a.shape, b.shape, (size_t)a.rank * sizeof a.shape[0]);
        unsigned char *left = (unsigned char *)take(a.bytes, 1), *right = (unsigned char *)take(a.bytes, 1);
        assert_true(a.bytes == b.bytes && dot_safetensors_read(theirs, i, left, a.bytes) &&
                    dot_safetensors_read(ours, j, right, a.bytes));
        assert_memory_equal(left, right, a.bytes);
        free(left);
        free(right);
    }
    dot_safetensors_close(theirs);
    dot_safetensors_close(ours);
    dot_context_destroy(ctx);
}

/* ---- initialisation ------------------------------------------------------------------------------------------------- */

static dot_layer *make_linear(dot_context *ctx)    { return dot_nn_linear(ctx, 300, 200); }
static dot_layer *make_embedding(dot_context *ctx) { return dot_nn_embedding(ctx, 200, 100); }

static dot_layer *make_conv1d(dot_context *ctx)
{
    dot_conv_options o = dot_conv_defaults();
    o.kernel = 5;
    return dot_nn_conv1d(ctx, 64, 128, &o);
}

static dot_layer *make_conv2d(dot_context *ctx)
{
    dot_conv_options o = dot_conv_defaults();
    o.groups = 2;
    return dot_nn_conv2d(ctx, 32, 96, &o);
}

static dot_layer *make_conv3d(dot_context *ctx)
{
    return dot_nn_conv3d(ctx, 16, 32, NULL);
}

/* PyTorch's weight [64, 24, 3, 5]: its fan_in counts the second axis. */
static dot_layer *make_conv_transpose2d(dot_context *ctx)
{
    dot_conv_options o = dot_conv_defaults();
    o.groups = 2;
    o.kernel_each[0] = 3;
    o.kernel_each[1] = 5;
    return dot_nn_conv_transpose2d(ctx, 64, 48, &o);
}

typedef struct initialisation {
    const char *what;
    dot_layer *(*make)(dot_context *);
    const char *name;
    int init;                       /* a dot_init, or -1: as the layer begins */
    double gain;
    bool normal;
    double bound_squared;           /* of a uniform distribution; the variance of a normal one */
    int64_t count;
} initialisation;

static const initialisation initialisations[] = {
    { "linear", make_linear, "weight", -1, 0, false, 1.0 / 300, 60000 },
    { "linear bias", make_linear, "bias", -1, 0, false, 1.0 / 300, 200 },
    { "conv1d", make_conv1d, "weight", -1, 0, false, 1.0 / 320, 40960 },
    { "conv1d bias", make_conv1d, "bias", -1, 0, false, 1.0 / 320, 128 },
    { "conv2d", make_conv2d, "weight", -1, 0, false, 1.0 / 144, 13824 },
    { "conv3d", make_conv3d, "weight", -1, 0, false, 1.0 / 432, 13824 },
    { "conv_transpose2d", make_conv_transpose2d, "weight", -1, 0, false, 1.0 / 360, 23040 },
    { "conv_transpose2d bias", make_conv_transpose2d, "bias", -1, 0, false, 1.0 / 360, 48 },
    { "embedding", make_embedding, "weight", -1, 0, true, 1, 20000 },
    { "linear Xavier uniform", make_linear, "weight", DOT_INIT_XAVIER_UNIFORM, 1.5, false, 2.25 * 6 / 500, 60000 },
    { "linear Xavier normal", make_linear, "weight", DOT_INIT_XAVIER_NORMAL, 0.5, true, 0.25 * 2 / 500, 60000 },
    { "conv2d Xavier uniform", make_conv2d, "weight", DOT_INIT_XAVIER_UNIFORM, 1, false, 6.0 / (144 + 864), 13824 },
    { "transposed Xavier normal", make_conv_transpose2d, "weight", DOT_INIT_XAVIER_NORMAL, 1, true, 2.0 / (360 + 960), 23040 },
    { "linear Kaiming uniform", make_linear, "weight", DOT_INIT_KAIMING_UNIFORM, 1.4142135623730951, false, 6.0 / 300, 60000 },
    { "linear Kaiming normal", make_linear, "weight", DOT_INIT_KAIMING_NORMAL, 1.4142135623730951, true, 2.0 / 300, 60000 },
    { "conv2d Kaiming normal", make_conv2d, "weight", DOT_INIT_KAIMING_NORMAL, 1, true, 1.0 / 144, 13824 },
    { "conv1d Kaiming uniform", make_conv1d, "weight", DOT_INIT_KAIMING_UNIFORM, 1, false, 3.0 / 320, 40960 }
};

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The Kolmogorov-Smirnov distance of sorted values from the distribution, times sqrt(count): above 2.5 once in 130 000. */
static double kolmogorov_smirnov(const double *sorted, int64_t count, bool normal, double size)
{
    double distance = 0, n = (double)count;
    for (int64_t i = 0; i < count; ++i) {
        double p = normal ? erfc(-sorted[i] / size / sqrt(2)) / 2 : (sorted[i] / size + 1) / 2;
        distance = fmax(distance, fmax(p - (double)i / n, (double)(i + 1) / n - p));
    }
    return distance * sqrt(n);
}

static bool check_initialisation(const initialisation *c, dot_dtype dtype, double *values)
{
    dot_context *ctx = context_of(dtype, 12345);
    dot_layer *layer = c->make(ctx);
    require(ctx, layer != NULL, c->what);
    if (c->init >= 0)
        require(ctx, dot_parameter_init(layer, c->name, (dot_init)c->init, c->gain), c->what);
    require(ctx, dot_parameter_get(layer, c->name, 0, values, c->count), c->what);
    dot_context_destroy(ctx);
    double mean = 0, square = 0, n = (double)c->count, size = sqrt(c->bound_squared);
    for (int64_t i = 0; i < c->count; ++i) {
        mean += values[i] / n;
        square += values[i] * values[i] / n;
    }
    qsort(values, (size_t)c->count, sizeof *values, compare_doubles);
    double lowest = values[0] / size, highest = values[c->count - 1] / size;
    double ks = kolmogorov_smirnov(values, c->count, c->normal, size);
    double variance = c->normal ? c->bound_squared : c->bound_squared / 3;
    /* Five standard deviations; the ends of a uniform sample lie within 40/n of the bounds but once in 10^8. */
    bool good = fabs(mean) <= 5 * sqrt(variance / n) && ks < 2.5;
    good = good && fabs(square / variance - 1) <= 5 * sqrt((c->normal ? 2 : 0.8) / n);
    if (!c->normal)
        good = good && lowest >= -1 - 1e-7 && highest <= 1 + 1e-7 && lowest < -1 + 40 / n && highest > 1 - 40 / n;
    if (!good)
        print_error("%s: mean %g, variance %g of %g, range %g..%g, Kolmogorov-Smirnov %g\n", c->what, mean, square, variance,
                    lowest, highest, ks);
    return good;
}

static void test_initialisation(void **state)
{
    (void)state;
    int failures = 0;
    for (int i = 0; i < COUNT(initialisations); ++i) {
        double *values = doubles(initialisations[i].count);
        failures += !check_initialisation(&initialisations[i], DOT_F32, values);
        failures += !check_initialisation(&initialisations[i], DOT_F64, values);
        free(values);
    }
    assert_int_equal(failures, 0);
}

static void assert_constant(dot_layer *layer, const char *name, int64_t count, double value)
{
    double *values = values_of(layer, name, count);
    for (int64_t i = 0; i < count; ++i)
        assert_true(values[i] == value);
    free(values);
}

static void test_constant_initialisation(void **state)
{
    (void)state;
    dot_context *ctx = context_of(DOT_F32, 0);
    dot_layer *norms[3] = { dot_nn_batch_norm(ctx, 6), dot_nn_layer_norm(ctx, 6), dot_nn_group_norm(ctx, 2, 6) };
    for (int i = 0; i < COUNT(norms); ++i) {
        require(ctx, norms[i] != NULL, "norm");
        assert_constant(norms[i], "weight", 6, 1);
        assert_constant(norms[i], "bias", 6, 0);
    }
    assert_constant(norms[0], "running_mean", 6, 0);
    assert_constant(norms[0], "running_var", 6, 1);
    dot_layer *linear = make_linear(ctx);
    require(ctx, dot_parameter_init(linear, "weight", DOT_INIT_ONES, 1), "ones");
    require(ctx, dot_parameter_init(linear, "bias", DOT_INIT_ZEROS, 1), "zeros");
    assert_constant(linear, "weight", 60000, 1);
    assert_constant(linear, "bias", 200, 0);
    dot_context_destroy(ctx);
}

/* The same seed gives the same weights; another seed, or another layer of the same net, others. */
static void test_initialisation_seeds(void **state)
{
    (void)state;
    double first[12], second[12], again[12], other[12];
    double *const out[3] = { first, again, other };
    static const uint64_t seeds[3] = { 7, 7, 8 };
    for (int i = 0; i < 3; ++i) {
        dot_context *ctx = context_of(DOT_F32, seeds[i]);
        dot_layer *net = dot_nn_sequential(ctx, dot_nn_linear(ctx, 4, 3), dot_nn_relu(ctx), dot_nn_linear(ctx, 3, 4),
                                           (void *)NULL);
        require(ctx, dot_parameter_get(net, "0.weight", 0, out[i], 12), "0.weight");
        require(ctx, dot_parameter_get(net, "2.weight", 0, second, 12), "2.weight");
        dot_context_destroy(ctx);
    }
    assert_memory_equal(first, again, sizeof first);
    for (int i = 0; i < 12; ++i) {
        assert_true(first[i] != other[i]);
        assert_true(fabs(first[i] * 2 - second[i] * sqrt(3)) > 1e-6);   /* not the same draws in other bounds */
    }
}

/* The matrix [out, rest] has orthonormal rows, or columns if it has more rows than columns, times the gain. */
static void check_orthogonal(dot_layer *(*make)(dot_context *), int64_t rows, int64_t columns, dot_dtype dtype)
{
    dot_context *ctx = context_of(dtype, 5);
    dot_layer *layer = make(ctx);
    require(ctx, dot_parameter_init(layer, "weight", DOT_INIT_ORTHOGONAL, 1.5), "orthogonal");
    double *w = values_of(layer, "weight", rows * columns);
    bool wide = rows <= columns;
    int64_t n = wide ? rows : columns, length = wide ? columns : rows, along = wide ? 1 : columns, across = wide ? columns : 1;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) {
            double product = 0;
            for (int64_t k = 0; k < length; ++k)
                product += w[i * across + k * along] * w[j * across + k * along];
            double expected = i == j ? 2.25 : 0;
            if (!(fabs(product - expected) <= (dtype == DOT_F32 ? 2e-6 : 1e-13)))
                fail_msg("orthogonal [%d, %d]: product of %d and %d is %.17g, not %g", (int)rows, (int)columns, (int)i,
                         (int)j, product, expected);
        }
    free(w);
    dot_context_destroy(ctx);
}

static dot_layer *make_wide(dot_context *ctx) { return dot_nn_linear(ctx, 100, 64); }
static dot_layer *make_tall(dot_context *ctx) { return dot_nn_linear(ctx, 64, 100); }

static void test_orthogonal(void **state)
{
    (void)state;
    for (int i = 0; i < 2; ++i) {
        dot_dtype dtype = i ? DOT_F64 : DOT_F32;
        check_orthogonal(make_wide, 64, 100, dtype);
        check_orthogonal(make_tall, 100, 64, dtype);
        check_orthogonal(make_conv2d, 96, 144, dtype);
        check_orthogonal(make_conv_transpose2d, 64, 360, dtype);
    }
}

/* ---- attention as a layer -------------------------------------------------------------------------------------------- */

static bool agrees(const char *name, const double *ours, double tolerance)
{
    int64_t count;
    double *expected = golden(name, &count);
    bool good = agree(name, ours, expected, NULL, count, tolerance, tolerance);
    free(expected);
    return good;
}

/* torch.nn.MultiheadAttention's names, shapes, output and gradients. */
static void check_multihead_attention(dot_dtype dtype, double tolerance)
{
    static const int64_t shape[3] = { 2, 7, 12 };
    static const char *const names[4] = { "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias" };
    dot_context *ctx = context_of(dtype, 0);
    dot_layer *layer = dot_nn_multihead_attention(ctx, 12, 3);
    require(ctx, layer && dot_layer_parameters(layer) == 4, "attention");
    for (int i = 0; i < 4; ++i) {
        dot_parameter_info info;
        int64_t count;
        double *values = golden(names[i], &count);
        assert_true(dot_layer_parameter(layer, i, &info));
        assert_string_equal(info.name, names[i]);
        assert_int_equal(info.shape[0], i < 2 ? 36 : 12);
        require(ctx, dot_parameter_set(layer, names[i], DOT_ALL, values, count), names[i]);
        free(values);
    }
    int64_t count;
    double *x = golden("x", &count), *upstream = golden("upstream", &count), ours[432];
    dot_tensor *input = dot_requires_grad(dot_tensor_create(ctx, dtype, 3, shape), true), *weights = dot_tensor_create(ctx, dtype, 3, shape);
    require(ctx, dot_tensor_set(input, DOT_ALL, x, count) && dot_tensor_set(weights, DOT_ALL, upstream, count), "input");
    dot_step_begin(ctx);
    dot_tensor *y = dot_forward(layer, input);
    require(ctx, dot_backward(dot_sum(dot_mul(y, weights), DOT_ALL_AXES, false)), "backward");
    bool good = dot_tensor_get(y, 0, ours, count) && agrees("y", ours, tolerance)
             && dot_tensor_get(dot_tensor_grad(input), 0, ours, count) && agrees("gradient.x", ours, tolerance);
    for (int i = 0; i < 4; ++i)
        good = dot_parameter_grad(layer, names[i], 0, ours, i == 0 ? 432 : i == 1 ? 36 : i == 2 ? 144 : 12)
            && agrees(join("gradient.", names[i], ""), ours, tolerance) && good;
    assert_true(good);
    free(x);
    free(upstream);
    dot_context_destroy(ctx);
}

static void test_multihead_attention(void **state)
{
    (void)state;
    dot_safetensors *training = golden_file;
    golden_file = dot_safetensors_open(golden_context, "tests/golden/layers.safetensors");
    check_multihead_attention(DOT_F64, 1e-12);
    check_multihead_attention(DOT_F32, 1e-5);
    dot_safetensors_close(golden_file);
    golden_file = training;
    dot_context *ctx = context_of(DOT_F32, 2);
    dot_layer *layer = dot_nn_multihead_attention(ctx, 100, 4);
    assert_constant(layer, "in_proj_bias", 300, 0);
    assert_constant(layer, "out_proj.bias", 100, 0);
    double *w = values_of(layer, "in_proj_weight", 30000), most = 0;
    for (int i = 0; i < 30000; ++i)
        most = fmax(most, fabs(w[i]));
    double bound = sqrt(6.0 / 400);             /* Xavier's, of which 30,000 draws reach more than 0.999 */
    assert_true(most <= bound * (1 + 1e-6) && most > 0.999 * bound);
    free(w);
    dot_context_destroy(ctx);
}

/* ---- main ----------------------------------------------------------------------------------------------------------- */

/* The tests below name each variant; the golden file lists them: both must be the same. */
static const char autoencoder_variants[] = "A1 A2 B1 B2 B3 B4 C1 C2 D1 D2 D3";

static void test_variants(void **state)
{
    (void)state;
    assert_string_equal(golden_text("autoencoder.variants"), autoencoder_variants);
}

#define AUTOENCODER_F32(id) { "autoencoder " id " float32", test_autoencoder_f32, NULL, NULL, (void *)id }
#define AUTOENCODER_F64(id) { "autoencoder " id " float64", test_autoencoder_f64, NULL, NULL, (void *)id }

/* usage: test_training [name with * and ?]: all tests, or those of that name. */
int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    static const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_schedules),
        cmocka_unit_test(test_invalid_schedules),
        cmocka_unit_test(test_defaults),
        cmocka_unit_test(test_groups),
        cmocka_unit_test(test_lanes),
        cmocka_unit_test(test_initialisation),
        cmocka_unit_test(test_constant_initialisation),
        cmocka_unit_test(test_initialisation_seeds),
        cmocka_unit_test(test_orthogonal),
        cmocka_unit_test(test_multihead_attention),
        cmocka_unit_test(test_autoencoder_parameters),
        cmocka_unit_test(test_state_bytes),
        cmocka_unit_test(test_save_load),
        cmocka_unit_test(test_load_pytorch),
        cmocka_unit_test(test_load_pytorch_batchnorm),
        cmocka_unit_test(test_resave_pytorch),
        cmocka_unit_test(test_variants),
        AUTOENCODER_F32("A1"), AUTOENCODER_F32("A2"),
        AUTOENCODER_F32("B1"), AUTOENCODER_F32("B2"), AUTOENCODER_F32("B3"), AUTOENCODER_F32("B4"),
        AUTOENCODER_F32("C1"), AUTOENCODER_F32("C2"),
        AUTOENCODER_F32("D1"), AUTOENCODER_F32("D2"), AUTOENCODER_F32("D3"),
        AUTOENCODER_F64("C1"), AUTOENCODER_F64("C2"),
        AUTOENCODER_F64("D1"), AUTOENCODER_F64("D2"), AUTOENCODER_F64("D3")
    };
    return cmocka_run_group_tests_name("training", tests, open_golden, close_golden);
}
