/* test_bits.c - the same bits whatever the lanes beside you, the threads and the interruptions; random numbers. */
#include "dotopt.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>

#include "nets.h"

/* ---- experiments: a network, an optimizer and its lanes ------------------------------------------------------- */

enum { LANES = 3, STEPS = 12, PICTURES = 40, BATCH = 6 };

static int steps = STEPS;       /* of a run; fewer when it must be quick */

static uint8_t pictures[PICTURES * PICTURE_BYTES], labels[PICTURES];

typedef struct model {
    const char *name;
    dot_layer *(*build)(dot_context *ctx);
    dot_tensor *(*loss)(dot_layer *net, dot_dataset *data, int64_t step);
} model;

static dot_layer *small_autoencoder(dot_context *ctx)
{
    return quick() ? build_autoencoder(ctx, 4, 6, 8) : build_autoencoder(ctx, 8, 16, 24);
}

static dot_layer *full_autoencoder(dot_context *ctx) { return build_autoencoder(ctx, 32, 64, 128); }
static dot_layer *classifier(dot_context *ctx) { return build_classifier(ctx, 48); }

static dot_tensor *reconstruction_loss(dot_layer *net, dot_dataset *data, int64_t step)
{
    dot_tensor *x = dot_batch(data, BATCH, step);
    return dot_mse_loss(dot_forward(net, x), x);
}

static dot_tensor *label_loss(dot_layer *net, dot_dataset *data, int64_t step)
{
    dot_tensor *x = dot_batch(data, BATCH, step);
    return dot_cross_entropy_loss(dot_forward(net, x), dot_batch_labels(data, BATCH, step), 0.1);
}

/* For the optimizers that cost much; its widest weight has more than one piece of work, in any element order. */
static dot_layer *little_classifier(dot_context *ctx)
{
    return dot_nn_sequential(ctx, dot_nn_conv2d(ctx, 1, 2, NULL), dot_nn_relu(ctx), dot_nn_flatten(ctx), dot_nn_linear(ctx, 2 * 26 * 26, 16),
                             dot_nn_layer_norm(ctx, 16), dot_nn_tanh(ctx), dot_nn_dropout(ctx, 0.1), dot_nn_linear(ctx, 16, PICTURE_CLASSES), NULL);
}

static const model autoencoder_model = { "autoencoder", small_autoencoder, reconstruction_loss };
static const model full_model = { "full autoencoder", full_autoencoder, reconstruction_loss };
static const model classifier_model = { "classifier", classifier, label_loss };
static const model little_model = { "little classifier", little_classifier, label_loss };
static const model *const models[] = { &autoencoder_model, &classifier_model };
enum { MODELS = sizeof models / sizeof *models };

/* Most tests go through the first algorithms, in which every stage of a step occurs; test_every_optimizer goes through all. */
enum { LAST = DOT_ADAMW_FACTORED };

typedef struct plan {
    const model *model;
    dot_algorithm algorithm;
    dot_decay decay;
    double beta1;                       /* NaN: the algorithm's default */
    dot_state_precision state;
    int lanes, threads;
    bool portable;
    dot_dtype dtype;
    uint64_t seed[LANES];
    double lr[LANES], weight_decay[LANES];
    double max_norm;                    /* of the gradient; 0: no clipping */
    bool curvature;                     /* given every fourth step to the rules that take it */
} plan;

/* What one lane did. */
typedef struct trace {
    double loss[STEPS], norm[STEPS], clip_norm[STEPS], weight_norm[STEPS], evaluation;
    double *weights, *gradients;        /* after the last step; of the last step */
    int64_t weight_count, gradient_count;
} trace;

typedef struct session {
    plan plan;
    dot_context *ctx;
    dot_layer *net;
    dot_optimizer *optimizer;
    dot_dataset *data;
    dot_schedule schedule;
} session;

static int setup_pictures(void **state)
{
    (void)state;
    draw_pictures(pictures, labels, PICTURES);
    if (quick())
        steps = STEPS / 2;
    return 0;
}

/* Three lanes that differ in seed, learning rate and decay. */
static plan default_plan(const model *of, dot_algorithm algorithm)
{
    static const uint64_t seed[LANES] = { 7, 0xfedcba9876543210u, 42 };
    static const double times[LANES] = { 1.0, 0.5, 2.0 }, weight_decay[LANES] = { 0.01, 0.001, 0.03 };
    dot_optimizer_options defaults = dot_optimizer_defaults(algorithm);
    plan p = { 0 };
    p.model = of;
    p.algorithm = algorithm;
    p.decay = defaults.decay;
    p.beta1 = NAN;
    p.lanes = LANES;
    p.threads = 2;
    p.dtype = DOT_F32;
    p.max_norm = 0.5;
    for (int k = 0; k < LANES; ++k) {
        p.seed[k] = seed[k];
        p.lr[k] = defaults.lr * times[k];
        p.weight_decay[k] = weight_decay[k];
    }
    return p;
}

/* The plan of one lane alone. */
static plan solo_plan(const plan *p, int lane)
{
    plan solo = *p;
    solo.lanes = 1;
    solo.seed[0] = p->seed[lane];
    solo.lr[0] = p->lr[lane];
    solo.weight_decay[0] = p->weight_decay[lane];
    return solo;
}

/* A lone lane gets its seed and hyperparameters from the options, several from the calls for lanes. */
static void open_session(session *s, const plan *p)
{
    dot_context_options co = dot_context_defaults();
    co.threads = p->threads;
    co.lanes = p->lanes;
    co.dtype = p->dtype;
    co.simd = !p->portable;
    co.seed = p->lanes == 1 ? p->seed[0] : 999;
    co.lane_seeds = p->lanes == 1 ? NULL : p->seed;
    s->plan = *p;
    s->ctx = dot_context_create(&co);
    assert_non_null(s->ctx);
    s->net = p->model->build(s->ctx);
    s->data = dot_dataset_memory(s->ctx, pictures, labels, PICTURES, 3,
                                 (const int64_t[3]){ PICTURE_SIDE, PICTURE_SIDE, 1 }, NULL);

    dot_parameter_group group = { NULL, DOT_KIND_BIAS | DOT_KIND_NORM, p->lr[0] / 2, 0.0 };
    dot_optimizer_options o = optimizer_defaults(p->algorithm);
    o.lr = p->lr[0];
    o.weight_decay = p->weight_decay[0];
    if (p->algorithm == DOT_DADAPT_ADAM)
        o.d0 = 1e-8;                /* its estimate grows too fast for so few steps */
    o.decay = p->decay;
    o.decay_period = steps;
    if (!isnan(p->beta1))
        o.beta1 = p->beta1;
    o.state = p->state;
    o.groups = &group;
    o.group_count = 1;
    s->optimizer = dot_optimizer_create(s->ctx, s->net, &o);
    for (int k = 0; p->lanes > 1 && k < p->lanes; ++k) {
        dot_optimizer_set(s->optimizer, DOT_HYPER_LR, 0, k, p->lr[k]);
        dot_optimizer_set(s->optimizer, DOT_HYPER_LR, 1, k, p->lr[k] / 2);
        dot_optimizer_set(s->optimizer, DOT_HYPER_WEIGHT_DECAY, 0, k, p->weight_decay[k]);
    }
    s->schedule = dot_schedule_cosine(steps, 0.1);
    assert_string_equal(dot_error(s->ctx), "");
}

static void train(session *s, int from, int to, trace *traces)
{
    for (int step = from; step < to; ++step) {
        if (s->plan.curvature && step % 4 == 0) {
            dot_step_begin(s->ctx);
            dot_backward(s->plan.model->loss(s->net, s->data, step));
            dot_optimizer_curvature(s->optimizer);
        }
        dot_step_begin(s->ctx);
        dot_tensor *loss = s->plan.model->loss(s->net, s->data, step);
        dot_backward(loss);
        for (int k = 0; k < s->plan.lanes; ++k)
            traces[k].loss[step] = dot_item(loss, k);
        traces[0].clip_norm[step] = s->plan.max_norm > 0 ? dot_clip_grad_norm(s->optimizer, s->plan.max_norm) : 0;
        for (int k = 0; k < s->plan.lanes; ++k) {
            traces[k].norm[step] = dot_grad_norm(s->optimizer, k);
            if (step == steps - 1)
                traces[k].gradients = snapshot(s->net, k, GRADIENTS, &traces[k].gradient_count);
        }
        dot_optimizer_loss(s->optimizer, loss);
        dot_optimizer_step(s->optimizer, dot_schedule_at(&s->schedule, step));
        for (int k = 0; k < s->plan.lanes; ++k)
            traces[k].weight_norm[step] = dot_weight_norm(s->optimizer, k);
    }
    assert_string_equal(dot_error(s->ctx), "");
}

/* The weights and the loss in evaluation; ends the session. */
static void close_session(session *s, trace *traces)
{
    dot_eval_begin(s->ctx);
    dot_tensor *loss = s->plan.model->loss(s->net, s->data, 0);
    for (int k = 0; k < s->plan.lanes; ++k) {
        traces[k].evaluation = dot_item(loss, k);
        traces[k].weights = snapshot(s->net, k, VALUES, &traces[k].weight_count);
        assert_non_null(traces[k].weights);
    }
    assert_string_equal(dot_error(s->ctx), "");
    dot_context_destroy(s->ctx);
}

static void run(const plan *p, trace *traces)
{
    session s;
    memset(traces, 0, (size_t)p->lanes * sizeof *traces);
    open_session(&s, p);
    train(&s, 0, steps, traces);
    close_session(&s, traces);
}

static void free_traces(trace *traces, int count)
{
    for (int k = 0; k < count; ++k) {
        free(traces[k].weights);
        free(traces[k].gradients);
    }
}

/* ---- comparing bits ------------------------------------------------------------------------------------------- */

static int comparisons;     /* doubles compared */

static void same_bits(const char *what, const double *a, const double *b, int64_t count)
{
    for (int64_t i = 0; i < count; ++i) {
        if (memcmp(&a[i], &b[i], sizeof *a) != 0)
            fail_msg("%s[%lld]: %.17g is not %.17g", what, (long long)i, a[i], b[i]);
    }
    comparisons += (int)count;
}

/* Steps from `from` on, and all weights. `lane` 0's clipped norm is compared where both traces have it. */
static void same_trace(const char *what, const trace *a, const trace *b, int from)
{
    char name[200];
    const double *const first[] = { a->loss, a->norm, a->weight_norm };
    const double *const second[] = { b->loss, b->norm, b->weight_norm };
    static const char *const names[] = { "loss", "gradient norm", "weight norm" };
    for (int i = 0; i < 3; ++i) {
        snprintf(name, sizeof name, "%s: %s", what, names[i]);
        same_bits(name, first[i] + from, second[i] + from, steps - from);
    }
    snprintf(name, sizeof name, "%s: evaluation", what);
    same_bits(name, &a->evaluation, &b->evaluation, 1);
    assert_true(a->weight_count == b->weight_count && a->gradient_count == b->gradient_count);
    snprintf(name, sizeof name, "%s: weights", what);
    same_bits(name, a->weights, b->weights, a->weight_count);
    snprintf(name, sizeof name, "%s: gradients", what);
    assert_non_null(a->gradients);
    assert_non_null(b->gradients);
    same_bits(name, a->gradients, b->gradients, a->gradient_count);
}

static bool weights_differ(const trace *a, const trace *b)
{
    return memcmp(a->weights, b->weights, (size_t)a->weight_count * sizeof *a->weights) != 0;
}

/* Trained: finite, not where it began, with a gradient. */
static void trained(const char *what, const trace *t)
{
    for (int step = 0; step < steps; ++step)
        if (!(isfinite(t->loss[step]) && isfinite(t->norm[step]) && t->norm[step] > 0))
            fail_msg("%s: loss %g, norm %g at step %d", what, t->loss[step], t->norm[step], step);
    assert_true(t->weight_norm[0] != t->weight_norm[steps - 1]);
    assert_true(t->loss[0] != t->loss[steps - 1]);
}

/* ---- lanes ---------------------------------------------------------------------------------------------------- */

static void lanes_equal_solo_runs(const plan *p)
{
    char what[160];
    trace together[LANES], solo;
    run(p, together);
    if (p->max_norm > 0)
        same_bits("dot_clip_grad_norm and dot_grad_norm", together[0].clip_norm, together[0].norm, steps);
    for (int k = 0; k < LANES; ++k) {
        plan alone = solo_plan(p, k);
        run(&alone, &solo);
        snprintf(what, sizeof what, "%s, %s, decay %d, beta1 %g, clip %g, lane %d", p->model->name,
                 dot_algorithm_name(p->algorithm), (int)p->decay, p->beta1, p->max_norm, k);
        trained(what, &together[k]);
        same_trace(what, &together[k], &solo, 0);
        if (k == 0)
            same_bits("what dot_clip_grad_norm returns", together[0].clip_norm, solo.clip_norm, steps);
        free_traces(&solo, 1);
    }
    assert_true(weights_differ(&together[0], &together[1]) && weights_differ(&together[1], &together[2]));
    free_traces(together, LANES);
}

static void test_lanes(void **state)
{
    static const dot_decay decays[] = { DOT_DECAY_L2, DOT_DECAY_LR, DOT_DECAY_SCHEDULED, DOT_DECAY_NORMALIZED };
    int runs = 0;
    (void)state;
    comparisons = 0;
    for (int m = 0; m < MODELS; ++m)
        for (int a = 0; a <= LAST; ++a)
            for (int d = 0; d < 4; ++d) {
                plan p = default_plan(models[m], (dot_algorithm)a);
                if (quick() && decays[d] != p.decay)
                    continue;
                p.decay = decays[d];
                lanes_equal_solo_runs(&p);
                ++runs;
            }
    print_message("lanes: %d combinations, %d values compared\n", runs, comparisons);
}

/* With and without a first moment, and without clipping. */
static void test_lanes_momentum(void **state)
{
    static const double beta1[] = { 0.0, 0.9 };
    (void)state;
    for (int a = 0; a <= LAST; ++a)
        for (int b = quick() || a == DOT_NESTEROV; b < 2; ++b) {
            plan p = default_plan(models[a % MODELS], (dot_algorithm)a);
            p.beta1 = beta1[b];
            p.max_norm = 0;
            lanes_equal_solo_runs(&p);
        }
}

static void test_lanes_full_size(void **state)
{
    (void)state;
    for (int a = 0; a <= LAST; ++a) {
        plan p = default_plan(&full_model, (dot_algorithm)a);
        if (!quick() || a == DOT_ADAMW)
            lanes_equal_solo_runs(&p);
    }
}

static void test_lanes_variants(void **state)
{
    (void)state;
    for (int m = 0; m < MODELS; ++m) {
        plan p = default_plan(models[m], DOT_ADAMW);
        p.portable = true;
        lanes_equal_solo_runs(&p);
        p.dtype = DOT_F64;
        lanes_equal_solo_runs(&p);
        p.portable = false;
        lanes_equal_solo_runs(&p);
    }
}

/* Without lane_seeds all lanes draw the same. */
static void test_lanes_of_one_seed(void **state)
{
    dot_context_options co = dot_context_defaults();
    int64_t count[2];
    (void)state;
    co.lanes = 2;
    co.seed = 31;
    dot_context *ctx = dot_context_create(&co);
    dot_layer *net = classifier(ctx);
    assert_string_equal(dot_error(ctx), "");
    double *first = snapshot(net, 0, VALUES, &count[0]), *second = snapshot(net, 1, VALUES, &count[1]);
    assert_true(first && second && count[0] == count[1]);
    same_bits("weights of two lanes", first, second, count[0]);
    free(first);
    free(second);
    dot_context_destroy(ctx);
}

/* Every hyperparameter that a lane can have of its own; in a net of its own optimizer defaults. */
static void test_lanes_each_hyperparameter(void **state)
{
    static const double values[][2] = {
        [DOT_HYPER_LR] = { 1e-3, 3e-3 }, [DOT_HYPER_WEIGHT_DECAY] = { 0.01, 0.05 }, [DOT_HYPER_BETA1] = { 0.9, 0.5 },
        [DOT_HYPER_BETA2] = { 0.999, 0.9 }, [DOT_HYPER_EPS] = { 1e-8, 1e-2 }, [DOT_HYPER_DECAY_PERIOD] = { 12, 3 } };
    (void)state;
    for (int h = 0; h < (int)(sizeof values / sizeof *values); ++h) {
        if (values[h][0] == 0)
            continue;               /* no number of Adam's */
        trace together[2], solo;
        plan p = default_plan(&classifier_model, DOT_ADAM);
        session s;
        p.lanes = 2;
        p.decay = DOT_DECAY_NORMALIZED;
        p.seed[1] = p.seed[0];
        p.lr[1] = p.lr[0] = values[DOT_HYPER_LR][0];
        p.weight_decay[1] = p.weight_decay[0] = values[DOT_HYPER_WEIGHT_DECAY][0];
        memset(together, 0, sizeof together);
        open_session(&s, &p);
        for (int k = 0; k < 2; ++k) {
            assert_true(dot_optimizer_set(s.optimizer, (dot_hyper)h, 0, k, values[h][k]));
            assert_true(dot_optimizer_get(s.optimizer, (dot_hyper)h, 0, k) == values[h][k]);
        }
        train(&s, 0, steps, together);
        close_session(&s, together);
        assert_true(weights_differ(&together[0], &together[1]));
        for (int k = 0; k < 2; ++k) {
            plan alone = solo_plan(&p, k);
            memset(&solo, 0, sizeof solo);
            open_session(&s, &alone);
            assert_true(dot_optimizer_set(s.optimizer, (dot_hyper)h, 0, DOT_ALL, values[h][k]));
            train(&s, 0, steps, &solo);
            close_session(&s, &solo);
            same_trace("a hyperparameter of its own", &together[k], &solo, 0);
            free_traces(&solo, 1);
        }
        free_traces(together, 2);
    }
}

/* ---- threads -------------------------------------------------------------------------------------------------- */

static void threads_agree(const plan *base, trace *expected)
{
    char what[160];
    plan p = *base;
    p.threads = 1;
    run(&p, expected);
    for (p.threads = 2; p.threads <= 4; ++p.threads) {
        trace traces[LANES];
        run(&p, traces);
        for (int k = 0; k < p.lanes; ++k) {
            snprintf(what, sizeof what, "%s, %s, %d threads, lane %d of %d", p.model->name,
                     dot_algorithm_name(p.algorithm), p.threads, k, p.lanes);
            same_trace(what, &expected[k], &traces[k], 0);
        }
        free_traces(traces, p.lanes);
    }
}

static void test_threads(void **state)
{
    (void)state;
    for (int m = 0; m < MODELS; ++m)
        for (int a = 0; a <= LAST; ++a)
            for (int lanes = quick() ? LANES : 1; lanes <= LANES; lanes += LANES - 1) {
                trace expected[LANES];
                plan p = default_plan(models[m], (dot_algorithm)a);
                p.lanes = lanes;
                p.portable = a % 2;
                threads_agree(&p, expected);
                free_traces(expected, lanes);
            }
}

static void test_threads_full_size(void **state)
{
    trace expected;
    plan p = default_plan(&full_model, DOT_ADAFACTOR);
    (void)state;
    p.lanes = 1;
    threads_agree(&p, &expected);
    trained("threads", &expected);
    free_traces(&expected, 1);
}

/* ---- checkpoints ---------------------------------------------------------------------------------------------- */

/* Trains to `k`, saves, and goes on in a new context from there; `changed` is the plan of the new context. */
static void interrupted_run(const plan *p, const plan *changed, int k, trace *traces)
{
    const char *path = scratch_path("checkpoint");
    session s;
    int64_t step = -1;
    memset(traces, 0, (size_t)p->lanes * sizeof *traces);
    open_session(&s, p);
    train(&s, 0, k, traces);
    assert_true(dot_checkpoint_save(path, s.net, s.optimizer, k + 1000));
    dot_context_destroy(s.ctx);

    open_session(&s, changed);
    assert_true(dot_checkpoint_load(path, s.net, s.optimizer, &step));
    assert_int_equal(step, k + 1000);
    assert_int_equal(dot_optimizer_steps(s.optimizer), k);
    train(&s, k, steps, traces);
    close_session(&s, traces);
    remove(path);
}

static void checkpoints_continue(const plan *p, const plan *changed, const int *when, int count)
{
    char what[160];
    trace whole[LANES], halves[LANES];
    run(p, whole);
    for (int i = 0; i < count; ++i) {
        interrupted_run(p, changed, when[i], halves);
        for (int k = 0; k < p->lanes; ++k) {
            snprintf(what, sizeof what, "%s, %s, interrupted after %d steps, lane %d of %d", p->model->name,
                     dot_algorithm_name(p->algorithm), when[i], k, p->lanes);
            same_trace(what, &whole[k], &halves[k], 0);
        }
        free_traces(halves, p->lanes);
    }
    free_traces(whole, p->lanes);
}

static void test_checkpoint(void **state)
{
    uint64_t draw = 0;
    (void)state;
    for (int m = 0; m < MODELS; ++m)
        for (int a = 0; a <= LAST; ++a)
            for (int lanes = quick() ? LANES : 1; lanes <= LANES; lanes += LANES - 1) {
                int when[3];
                plan p = default_plan(models[m], (dot_algorithm)a);
                p.lanes = lanes;
                for (int i = 0; i < 3; ++i)
                    when[i] = (int)(dot_random_uniform(5, 0, draw++) * steps);
                checkpoints_continue(&p, &p, when, quick() ? 1 : 3);
            }
}

/* Momentum buffers that only exist with a first moment; double precision; before the first step. */
static void test_checkpoint_variants(void **state)
{
    static const int when[2] = { 0, 5 };
    (void)state;
    for (int a = 0; a <= LAST; ++a) {
        plan p = default_plan(&classifier_model, (dot_algorithm)a);
        p.beta1 = 0.8;
        checkpoints_continue(&p, &p, when, 2);
        p.dtype = DOT_F64;
        checkpoints_continue(&p, &p, when, 2);
    }
}

/* Whether the library keeps an algorithm's state in that precision. */
static bool takes_precision(dot_algorithm algorithm, dot_state_precision precision)
{
    dot_context *ctx = dot_context_create(NULL);
    dot_optimizer_options o = optimizer_defaults(algorithm);
    o.state = precision;
    dot_optimizer_bytes(little_classifier(ctx), &o);
    bool taken = dot_ok(ctx);
    assert_true(taken || strstr(dot_error(ctx), "state"));
    dot_context_destroy(ctx);
    return taken;
}

/* Three lanes on four threads, saved and loaded on the way, against each lane alone and undisturbed, on one or two threads. */
static void test_every_optimizer(void **state)
{
    int combinations = 0, precisions = 0;
    uint64_t draw = 0;
    (void)state;
    comparisons = 0;
    steps = quick() ? STEPS / 4 : STEPS / 2;
    for (int a = 0; a < DOT_ALGORITHMS; ++a)
        for (int precision = DOT_STATE_FULL; precision <= DOT_STATE_8BIT; ++precision) {
            trace together[LANES], solo;
            char what[160];
            if (!takes_precision((dot_algorithm)a, (dot_state_precision)precision))
                continue;
            if (quick() && precision != (takes_precision((dot_algorithm)a, DOT_STATE_8BIT) ? a % 4 : DOT_STATE_FULL))
                continue;
            plan p = default_plan(&little_model, (dot_algorithm)a), alone;
            p.state = (dot_state_precision)precision;
            p.curvature = true;
            p.threads = 4;
            int when = (int)(dot_random_uniform(6, 0, draw++) * steps);
            interrupted_run(&p, &p, when, together);
            for (int k = 0; k < LANES; ++k) {
                if (quick() && k != a % LANES)
                    continue;
                snprintf(what, sizeof what, "%s, state precision %d, interrupted after %d steps, lane %d",
                         dot_algorithm_name((dot_algorithm)a), precision, when, k);
                alone = solo_plan(&p, k);
                alone.threads = 1 + k % 2;
                run(&alone, &solo);
                trained(what, &solo);
                same_trace(what, &together[k], &solo, 0);
                free_traces(&solo, 1);
            }
            assert_true(weights_differ(&together[0], &together[1]));
            free_traces(together, LANES);
            ++combinations;
            precisions += precision != DOT_STATE_FULL;
        }
    steps = quick() ? STEPS / 2 : STEPS;
    assert_true(combinations - (quick() ? 0 : precisions) == DOT_ALGORITHMS);
    print_message("optimizers: %d, and %d with another state precision, %d values compared\n", DOT_ALGORITHMS, precisions, comparisons);
}

/* Random state and hyperparameters come from the file, not from the new context. */
static void test_checkpoint_brings_everything(void **state)
{
    static const int when[1] = { 5 };
    (void)state;
    for (int lanes = 1; lanes <= LANES; lanes += LANES - 1) {
        plan p = default_plan(&classifier_model, DOT_ADAMW), other;
        p.lanes = lanes;
        other = p;
        for (int k = 0; k < lanes; ++k) {
            other.seed[k] += 1;
            other.lr[k] *= 3;
            other.weight_decay[k] = 0.5;
        }
        other.threads = 1;
        checkpoints_continue(&p, &other, when, 1);
    }
}

/* Going back within one context: the same steps again give the same bits. */
static void test_checkpoint_rewind(void **state)
{
    const char *path = scratch_path("rewind");
    trace first[LANES], again[LANES];
    plan p = default_plan(&classifier_model, DOT_ADAM);
    session s;
    int64_t step = -1, count;
    (void)state;
    memset(first, 0, sizeof first);
    memset(again, 0, sizeof again);
    open_session(&s, &p);
    train(&s, 0, 4, first);
    assert_true(dot_checkpoint_save(path, s.net, s.optimizer, 4));
    train(&s, 4, steps, first);
    double *weights = snapshot(s.net, 2, VALUES, &count);
    assert_true(dot_checkpoint_load(path, s.net, s.optimizer, &step));
    assert_int_equal(step, 4);
    train(&s, 4, steps, again);
    close_session(&s, again);
    for (int k = 0; k < LANES; ++k)
        same_bits("loss", first[k].loss + 4, again[k].loss + 4, steps - 4);
    same_bits("weights", weights, again[2].weights, count);
    free(weights);
    free_traces(first, LANES);
    free_traces(again, LANES);
    remove(path);
}

/* ---- lanes that diverge or stop ------------------------------------------------------------------------------- */

static void test_diverging_lane(void **state)
{
    (void)state;
    for (int m = 0; m < MODELS; ++m)
        for (int a = 0; a <= LAST; ++a) {
            trace together[LANES], calm[LANES];
            plan p = default_plan(models[m], (dot_algorithm)a), wild;
            p.decay = DOT_DECAY_LR;
            p.max_norm = a % 2 ? 0.5 : 0;
            run(&p, calm);
            wild = p;
            wild.lr[1] = 1e30;          /* Adafactor's relative step is at most 1/sqrt(t): its decay must do it */
            wild.weight_decay[1] = 1e30;
            run(&wild, together);
            assert_true(!isfinite(together[1].weight_norm[steps - 1]));
            same_trace("the lane before one that diverges", &together[0], &calm[0], 0);
            same_trace("the lane after one that diverges", &together[2], &calm[2], 0);
            free_traces(together, LANES);
            free_traces(calm, LANES);
        }
}

/* Lane `lane` stops after half of the steps, and the others go on as if nothing had happened. */
static void stopped_lane_keeps_values(const model *of, dot_algorithm algorithm, int lane)
{
    trace stopped[LANES], whole[LANES];
    plan p = default_plan(of, algorithm);
    session s;
    int64_t count;
    run(&p, whole);
    memset(stopped, 0, sizeof stopped);
    open_session(&s, &p);
    train(&s, 0, steps / 2, stopped);
    double *before = snapshot(s.net, lane, VALUES, &count);
    assert_true(dot_lane_active(s.ctx, lane));
    assert_true(dot_lane_stop(s.ctx, lane));
    for (int k = 0; k < LANES; ++k)
        assert_int_equal(dot_lane_active(s.ctx, k), k != lane);
    train(&s, steps / 2, steps, stopped);
    close_session(&s, stopped);

    same_bits("weights of a stopped lane", before, stopped[lane].weights, count);
    for (int k = 0; k < LANES; ++k) {
        if (k != lane)
            same_trace("a lane beside one that stopped", &stopped[k], &whole[k], 0);
    }
    free(before);
    free_traces(stopped, LANES);
    free_traces(whole, LANES);
}

static void test_stopped_lane(void **state)
{
    (void)state;
    for (int a = 0; a <= LAST; ++a)
        for (int lane = 0; lane < LANES; ++lane)
            if (!quick() || lane == a % LANES)
                stopped_lane_keeps_values(models[(a + lane) % MODELS], (dot_algorithm)a, lane);
}

/* A lane that is stopped because it diverged, and then all of them. */
static void test_all_lanes_stopped(void **state)
{
    trace traces[LANES];
    plan p = default_plan(&classifier_model, DOT_SGD);
    session s;
    int64_t count;
    (void)state;
    p.lr[1] = 1e30;
    memset(traces, 0, sizeof traces);
    open_session(&s, &p);
    train(&s, 0, 4, traces);
    assert_true(!isfinite(traces[1].loss[3]));
    for (int k = 0; k < LANES; ++k)
        assert_true(dot_lane_stop(s.ctx, k));
    double *before = snapshot(s.net, 0, VALUES, &count);
    train(&s, 4, steps, traces);
    double *after = snapshot(s.net, 0, VALUES, &count);
    same_bits("weights", before, after, count);
    free(before);
    free(after);
    free_traces(traces, LANES);
    dot_context_destroy(s.ctx);
}

/* ---- kernels -------------------------------------------------------------------------------------------------- */

static void test_portable_kernels_agree(void **state)
{
    (void)state;
    for (int m = 0; m < MODELS; ++m)
        for (int a = 0; a <= LAST; ++a) {
            trace portable, fast;
            plan p = default_plan(models[m], (dot_algorithm)a);
            p.lanes = 1;
            p.lr[0] *= 0.1;     /* Adafactor's first updates are nearly signs of the gradient: where it is about zero, rounding
                                   decides a whole step, which at the full rate says nothing about the kernels */
            run(&p, &fast);
            p.portable = true;
            run(&p, &portable);
            for (int step = 0; step < 10 && step < steps; ++step) {
                double error = fabs(portable.loss[step] - fast.loss[step]) / fabs(portable.loss[step]);
                if (!(error <= 1e-4))
                    fail_msg("%s, %s, step %d: loss %.9g portable, %.9g fast", models[m]->name,
                             dot_algorithm_name(p.algorithm), step, portable.loss[step], fast.loss[step]);
            }
            free_traces(&portable, 1);
            free_traces(&fast, 1);
        }
}

static void test_kernel_names(void **state)
{
    dot_context_options co = dot_context_defaults();
    (void)state;
    co.simd = false;
    dot_context *ctx = dot_context_create(&co);
    assert_string_equal(dot_kernels(ctx), "portable");
    dot_context_destroy(ctx);
    ctx = dot_context_create(NULL);
    static const char *const names[] = { "portable", "avx2", "avx512", "neon" };
    const char *kernels = NULL;
    for (int i = 0; i < 4; ++i)
        if (ctx && strcmp(dot_kernels(ctx), names[i]) == 0)
            kernels = names[i];
    assert_non_null(kernels);
    print_message("kernels: %s, threads: %d\n", kernels ? kernels : "", dot_threads(ctx));
    dot_context_destroy(ctx);
}

/* ---- initial weights ------------------------------------------------------------------------------------------ */

/* Two pairs of layers, the second pair made in the other order: C leaves it open in which order the arguments of
   dot_nn_sequential(ctx, dot_nn_linear(...), ...) are evaluated, and compilers differ. */
static void test_weights_do_not_depend_on_evaluation_order(void **state)
{
    double *values[2];
    int64_t count[2];
    (void)state;
    for (int turned = 0; turned < 2; ++turned) {
        dot_context *ctx = dot_context_create(NULL);
        dot_layer *layers[2];
        for (int i = 0; i < 2; ++i)
            layers[turned ? 1 - i : i] = dot_nn_linear(ctx, 3, 3);
        dot_layer *net = dot_nn_sequential(ctx, layers[0], dot_nn_relu(ctx), layers[1], NULL);
        values[turned] = snapshot(net, 0, VALUES, &count[turned]);
        assert_string_equal(dot_error(ctx), "");
        dot_context_destroy(ctx);
    }
    assert_true(count[0] == count[1] && memcmp(values[0], values[0] + count[0] / 2, 9 * sizeof(double)) != 0);
    same_bits("initial weights", values[0], values[1], count[0]);
    free(values[0]);
    free(values[1]);
}

/* What the program has set stays, wherever the layer goes then. */
static void test_weights_set_before_use_stay(void **state)
{
    static const double set[4] = { 1, 2, 3, 4 };
    double got[4];
    dot_context *ctx = dot_context_create(NULL);
    dot_layer *layer = dot_nn_linear_no_bias(ctx, 2, 2), *normal = dot_nn_linear_no_bias(ctx, 2, 2);
    (void)state;
    assert_true(dot_parameter_set(layer, "weight", 0, set, 4));
    assert_true(dot_parameter_init(normal, "weight", DOT_INIT_ONES, 1.0));
    dot_layer *net = dot_nn_sequential(ctx, dot_nn_sequential(ctx, layer, NULL), normal, NULL);
    assert_true(dot_parameter_get(net, "0.0.weight", 0, got, 4));
    same_bits("weights that were set", got, set, 4);
    assert_true(dot_parameter_get(net, "1.weight", 0, got, 4));
    for (int i = 0; i < 4; ++i)
        assert_true(got[i] == 1.0);
    dot_context_destroy(ctx);
}

/* ---- random numbers ------------------------------------------------------------------------------------------- */

/* The known answers that come with the authors' Random123 library (kat_vectors, philox4x32 with 10 rounds). */
static void test_philox_known_answers(void **state)
{
    static const struct { uint32_t counter[4], key[2], expected[4]; } rows[] = {
        { { 0, 0, 0, 0 }, { 0, 0 }, { 0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8 } },
        { { 0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff }, { 0xffffffff, 0xffffffff },
          { 0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd } },
        { { 0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344 }, { 0xa4093822, 0x299f31d0 },
          { 0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1 } } };
    (void)state;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; ++i) {
        uint32_t out[4] = { 0, 0, 0, 0 };
        dot_philox4x32(rows[i].counter, rows[i].key, out);
        for (int w = 0; w < 4; ++w)
            assert_int_equal(out[w], rows[i].expected[w]);
    }
}

enum { DRAWS = 100000 };

/* The first four moments about 0 of some stream's draws. */
static void moments(double (*draw)(uint64_t, uint64_t, uint64_t), uint64_t seed, uint64_t stream, double m[5])
{
    memset(m, 0, 5 * sizeof *m);
    for (uint64_t i = 0; i < DRAWS; ++i) {
        double x = draw(seed, stream, i), power = 1;
        for (int k = 0; k < 5; ++k, power *= x)
            m[k] += power / DRAWS;
    }
}

/* Each mean within five standard errors: sqrt(Var(x^k) / n), where E x^k of the uniform is 1/(k+1). */
static void test_uniform_moments(void **state)
{
    static const uint64_t seeds[] = { 0, 1, 0xffffffffffffffffu };
    (void)state;
    for (int s = 0; s < 3; ++s)
        for (uint64_t stream = 0; stream < 3; ++stream) {
            double m[5];
            moments(dot_random_uniform, seeds[s], stream, m);
            for (int k = 1; k < 5; ++k) {
                double mean = 1.0 / (k + 1), variance = 1.0 / (2 * k + 1) - mean * mean;
                assert_true(fabs(m[k] - mean) < 5 * sqrt(variance / DRAWS));
            }
        }
}

/* E x^k of the normal: 0, 1, 0, 3; of x^2k: 1, 3, 15, 105. */
static void test_normal_moments(void **state)
{
    static const double mean[5] = { 1, 0, 1, 0, 3 }, square[5] = { 1, 1, 3, 15, 105 };
    (void)state;
    for (uint64_t seed = 0; seed < 3; ++seed)
        for (uint64_t stream = 0; stream < 3; ++stream) {
            double m[5];
            moments(dot_random_normal, seed, stream, m);
            for (int k = 1; k < 5; ++k)
                assert_true(fabs(m[k] - mean[k]) < 5 * sqrt((square[k] - mean[k] * mean[k]) / DRAWS));
        }
}

/* In [0, 1), all 53 bits used, spread evenly over 64 bins (chi-square of 63 degrees: mean 63, deviation 11.2). */
static void test_uniform_bits(void **state)
{
    int bins[64] = { 0 }, ones[53] = { 0 };
    double chi = 0;
    (void)state;
    for (uint64_t i = 0; i < DRAWS; ++i) {
        double x = dot_random_uniform(3, 1, i), scaled = x * 9007199254740992.0;
        assert_true(x >= 0 && x < 1 && scaled == floor(scaled));
        ++bins[(int)(x * 64)];
        for (int b = 0; b < 53; ++b)
            ones[b] += (int)((uint64_t)scaled >> b & 1);
    }
    for (int b = 0; b < 53; ++b)
        assert_true(abs(ones[b] - DRAWS / 2) < 5 * sqrt(DRAWS) / 2);
    for (int b = 0; b < 64; ++b)
        chi += pow(bins[b] - DRAWS / 64.0, 2) / (DRAWS / 64.0);
    assert_true(chi > 63 - 5 * 11.2 && chi < 63 + 5 * 11.2);
}

/* The tails that Box-Muller must reach: P(|z| > 3) = 0.0027, P(|z| > 4) = 6.33e-5. */
static void test_normal_tails(void **state)
{
    int beyond[5] = { 0 };
    (void)state;
    for (uint64_t i = 0; i < DRAWS; ++i) {
        double z = dot_random_normal(11, 2, i);
        assert_true(isfinite(z));
        for (int k = 0; k < 5; ++k)
            beyond[k] += fabs(z) > k;
    }
    for (int k = 1; k < 5; ++k) {
        double p = erfc(k / sqrt(2.0)), deviation = sqrt(DRAWS * p * (1 - p));
        assert_true(fabs(beyond[k] - DRAWS * p) < 5 * deviation);
    }
}

/* Pure functions, and independent of each other in seed, stream and index: also where only high bits differ. */
static void test_draws_are_independent(void **state)
{
    static const uint64_t from[][3] = { { 1, 2, 0 }, { 2, 2, 0 }, { 1, 3, 0 }, { 1, 2, 1 }, { 2, 1, 0 },
        { 1 | (uint64_t)1 << 40, 2, 0 }, { 1, 2 | (uint64_t)1 << 40, 0 }, { 1, 2, (uint64_t)1 << 40 } };
    enum { STREAMS = sizeof from / sizeof *from, LENGTH = 10000 };
    double (*const draws[])(uint64_t, uint64_t, uint64_t) = { dot_random_uniform, dot_random_normal };
    static const double centre[] = { 0.5, 0 }, variance[] = { 1.0 / 12, 1 };
    (void)state;
    for (int d = 0; d < 2; ++d)
        for (int a = 0; a < STREAMS; ++a)
            for (int b = 0; b <= a; ++b) {
                double sum = 0;
                for (uint64_t i = 0; i < LENGTH; ++i) {
                    double x = draws[d](from[a][0], from[a][1], from[a][2] + i);
                    double y = draws[d](from[b][0], from[b][1], from[b][2] + i);
                    if (a == b)
                        assert_memory_equal(&x, &y, sizeof x);
                    sum += (x - centre[d]) * (y - centre[d]) / variance[d] / LENGTH;
                }
                if (a != b)
                    assert_true(fabs(sum) < 5 / sqrt(LENGTH));
            }
}

int main(int argc, char **argv)
{
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_philox_known_answers), cmocka_unit_test(test_uniform_moments),
        cmocka_unit_test(test_normal_moments), cmocka_unit_test(test_uniform_bits),
        cmocka_unit_test(test_normal_tails), cmocka_unit_test(test_draws_are_independent),
        cmocka_unit_test(test_kernel_names),
        cmocka_unit_test(test_weights_do_not_depend_on_evaluation_order),
        cmocka_unit_test(test_weights_set_before_use_stay),
        cmocka_unit_test(test_portable_kernels_agree),
        cmocka_unit_test(test_lanes), cmocka_unit_test(test_lanes_momentum),
        cmocka_unit_test(test_lanes_full_size), cmocka_unit_test(test_lanes_variants),
        cmocka_unit_test(test_lanes_of_one_seed), cmocka_unit_test(test_lanes_each_hyperparameter),
        cmocka_unit_test(test_threads), cmocka_unit_test(test_threads_full_size),
        cmocka_unit_test(test_checkpoint), cmocka_unit_test(test_checkpoint_variants), cmocka_unit_test(test_every_optimizer),
        cmocka_unit_test(test_checkpoint_brings_everything), cmocka_unit_test(test_checkpoint_rewind),
        cmocka_unit_test(test_diverging_lane), cmocka_unit_test(test_stopped_lane),
        cmocka_unit_test(test_all_lanes_stopped),
    };
    return cmocka_run_group_tests_name("bits", tests, setup_pictures, NULL);
}
