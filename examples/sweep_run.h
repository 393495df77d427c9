/*
 * sweep_run.h - what the optimizer sweep trains: the variants, the networks,
 * and one training run.
 *
 * The program includes dotopt.h and cli.h first.
 */
#ifndef SWEEP_RUN_H
#define SWEEP_RUN_H

#include <math.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>


/* ---- the variants ------------------------------------------------------- */

/* How a variant decays its weights. With `--decay paper` the last two are Loshchilov and Hutter's rule, free of the
   learning rate; with `--decay torch` both multiply by the learning rate. */
typedef enum { SWEEP_L2, SWEEP_DECOUPLED, SWEEP_NORMALIZED } sweep_decay;

typedef struct {
    const char *id, *name, *title;
    dot_algorithm algorithm;
    sweep_decay decay;
    dot_schedule_kind schedule;
    double beta1;           /* of SGD: the momentum */
    double base_lr;         /* of Adafactor: the largest relative step */
} sweep_variant;

#define V(id, name, title, algorithm, decay, schedule, beta1, base_lr) \
    { id, name, title, DOT_##algorithm, SWEEP_##decay, DOT_SCHEDULE_##schedule, beta1, base_lr }
static const sweep_variant sweep_variants[] = {
    V("A1",  "Adam_L2",               "Adam + L2",                          ADAM,           L2,         CONSTANT,      0.9, 1e-3),
    V("A1c", "Adam_L2_Cosine",        "Adam + L2, cosine",                  ADAM,           L2,         COSINE,        0.9, 1e-3),
    V("A2",  "SGD_L2",                "SGD + L2",                           SGD,            L2,         CONSTANT,      0.9, 0.1),
    V("B1",  "AdamW_Fixed",           "AdamW",                              ADAMW,          DECOUPLED,  CONSTANT,      0.9, 1e-3),
    V("B2",  "AdamW_StepDrop",        "AdamW, step drop",                   ADAMW,          DECOUPLED,  STEP_DROP,     0.9, 1e-3),
    V("B3",  "AdamW_Cosine",          "AdamW, cosine",                      ADAMW,          DECOUPLED,  COSINE,        0.9, 1e-3),
    V("B4",  "AdamW_WarmRestarts",    "AdamW, warm restarts",               ADAMW,          DECOUPLED,  WARM_RESTARTS, 0.9, 1e-3),
    V("B5",  "AdamW_Norm_Fixed",      "AdamW, norm. decay",                 ADAMW,          NORMALIZED, CONSTANT,      0.9, 1e-3),
    V("B6",  "AdamW_Norm_StepDrop",   "AdamW, norm. decay, step drop",      ADAMW,          NORMALIZED, STEP_DROP,     0.9, 1e-3),
    V("B7",  "AdamW_Norm_Cosine",     "AdamW, norm. decay, cosine",         ADAMW,          NORMALIZED, COSINE,        0.9, 1e-3),
    V("B8",  "AdamWR",                "AdamWR: norm. decay, warm restarts", ADAMW,          NORMALIZED, WARM_RESTARTS, 0.9, 1e-3),
    V("C1",  "Adafactor",             "Adafactor",                          ADAFACTOR,      DECOUPLED,  CONSTANT,      0.0, 1e-2),
    V("C2",  "Adafactor_Momentum",    "Adafactor, momentum",                ADAFACTOR,      DECOUPLED,  CONSTANT,      0.9, 1e-2),
    V("D1",  "Factored_Cosine",       "Factored AdamW, cosine",             ADAMW_FACTORED, NORMALIZED, COSINE,        0.0, 1e-2),
    V("D2",  "Factored_WarmRestarts", "Factored AdamW, warm restarts",      ADAMW_FACTORED, NORMALIZED, WARM_RESTARTS, 0.0, 1e-2),
    V("D3",  "Factored_Momentum",     "Factored AdamW, restarts, momentum", ADAMW_FACTORED, NORMALIZED, WARM_RESTARTS, 0.9, 1e-2),
};
#undef V
enum { SWEEP_VARIANTS = sizeof sweep_variants / sizeof *sweep_variants, SWEEP_CONTROL = 1 };

static const double sweep_base_decay = 1e-3;
static const char *const sweep_schedule_names[] = {
    [DOT_SCHEDULE_CONSTANT] = "fixed", [DOT_SCHEDULE_STEP_DROP] = "step_drop", [DOT_SCHEDULE_COSINE] = "cosine",
    [DOT_SCHEDULE_WARM_RESTARTS] = "warm_restarts" };

static bool sweep_factored(const sweep_variant *v)
{
    return v->algorithm == DOT_ADAFACTOR || v->algorithm == DOT_ADAMW_FACTORED;
}

static int sweep_find(const char *id)
{
    for (int i = 0; i < SWEEP_VARIANTS; ++i)
        if (strcmp(sweep_variants[i].id, id) == 0) return i;
    return -1;
}

/* What must be said about two of them; NULL for the others. */
static const char *sweep_note(const sweep_variant *v)
{
    if (strcmp(v->id, "A1c") == 0)
        return "control: differs from A1 in the schedule only, from B3 in the coupling only";
    if (strcmp(v->id, "A2") == 0)
        return "inferred: the plan counts 15 variants and gives SGD's base learning rate, but does not describe it";
    return NULL;
}

/* ---- the settings and the data ------------------------------------------ */

typedef enum { SWEEP_CONV, SWEEP_MLP } sweep_model;
typedef enum { SWEEP_PAPER, SWEEP_TORCH } sweep_decay_form;
typedef enum { SWEEP_NORM_PAPER, SWEEP_NORM_SEED } sweep_decay_norm;

/* What, besides variant, multipliers and seed, determines the numbers of a run. */
typedef struct {
    sweep_model model;
    sweep_decay_form decay;
    sweep_decay_norm decay_norm;
    int64_t samples;            /* of the training set, the validation samples included; these are the last */
    int64_t validation;
    int64_t test_samples;
    int64_t epochs, batch;
    int64_t log_every;          /* steps */
} sweep_settings;

enum { SWEEP_HEIGHT = 28, SWEEP_WIDTH = 28, SWEEP_PIXELS = SWEEP_HEIGHT * SWEEP_WIDTH, SWEEP_SHOWN = 8 };
static const int64_t sweep_eval_batch = 500;

/* The images are loaded once and shared by all runs. */
typedef struct {
    uint8_t *train, *test;
    int64_t train_count, test_count;
    uint64_t hash;              /* of all of these bytes */
    char kernels[16];           /* the library's; other kernels, other last bits */
} sweep_data;

static int64_t sweep_batches(const sweep_settings *s)
{
    return (s->samples - s->validation + s->batch - 1) / s->batch;
}

/* The plan's epochs are of a run of 100; other runs keep the proportions. Never less than one step. */
static int64_t sweep_scaled(const sweep_settings *s, int64_t epoch_of_100)
{
    int64_t steps = llround((double)(epoch_of_100 * s->epochs * sweep_batches(s)) / 100);
    return steps > 0 ? steps : 1;
}

/* Drops to a tenth after epochs 30, 60 and 80; restarts with T_0 = 10 epochs and T_mult = 2. */
static dot_schedule sweep_schedule(const sweep_settings *s, const sweep_variant *v)
{
    const int64_t drops[3] = { sweep_scaled(s, 30), sweep_scaled(s, 60), sweep_scaled(s, 80) };
    switch (v->schedule) {
    case DOT_SCHEDULE_STEP_DROP: return dot_schedule_step_drop(drops, 3, 0.1);
    case DOT_SCHEDULE_COSINE: return dot_schedule_cosine(s->epochs * sweep_batches(s), 0);
    case DOT_SCHEDULE_WARM_RESTARTS: return dot_schedule_warm_restarts(sweep_scaled(s, 10), 2, 0);
    default: return dot_schedule_constant();
    }
}

/* What the library calls the variant's decay. */
static dot_decay sweep_decay_mode(const sweep_settings *s, const sweep_variant *v)
{
    if (v->decay == SWEEP_L2) return DOT_DECAY_L2;
    if (s->decay == SWEEP_TORCH) return DOT_DECAY_LR;
    return v->decay == SWEEP_NORMALIZED && s->decay_norm == SWEEP_NORM_PAPER ? DOT_DECAY_NORMALIZED : DOT_DECAY_SCHEDULED;
}

/* The decay of AdamW without normalisation is taken times its base learning rate: at the learning rate multiplier 1 it
   equals PyTorch's, and at no other does it change with the learning rate. */
static double sweep_decay_lr(const sweep_variant *v)
{
    return v->decay == SWEEP_DECOUPLED ? 1e-3 : 1.0;
}

/* What stands before the weight decay that the library is given. `period` is the length in steps of the run or of the
   present restart period. The seed's formula is taken literally: sqrt(batch / (batches per epoch * epochs)). */
static double sweep_decay_factor(const sweep_settings *s, const sweep_variant *v, int64_t period)
{
    if (v->decay != SWEEP_NORMALIZED) return 1;
    if (s->decay_norm == SWEEP_NORM_SEED) return sqrt((double)s->batch / (double)(sweep_batches(s) * s->epochs));
    return s->decay == SWEEP_TORCH ? 1 / sqrt((double)period) : 1;  /* else DOT_DECAY_NORMALIZED divides */
}

/* ---- a run -------------------------------------------------------------- */

typedef struct { double train, test, validation, seconds; } sweep_epoch;        /* arrays of doubles, for JSON */
typedef struct { double step, lr, grad_norm, weight_norm; } sweep_measurement;

typedef struct {
    int variant;
    double lr, decay;               /* multipliers of the variant's base values */
    uint64_t seed;
    bool diverged;                  /* a loss was not finite; the last of `epoch` is the epoch where it happened */
    int epochs, measurements;
    sweep_epoch *epoch;
    sweep_measurement *measurement;
    double seconds;
    bool draw;                      /* keep reconstructions of the first test images, */
    int snapshots;                  /* after each ten epochs or, in a shorter run, after the last, */
    uint8_t *snapshot;              /* SWEEP_SHOWN images each */
} sweep_run;

/* Memory or the end of the program, which is all that it could do without. */
static void *sweep_alloc(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) {
        fprintf(stderr, "fashion_sweep: out of memory\n");
        exit(1);
    }
    return memory;
}

static bool sweep_say(char *error, size_t size, const char *format, ...)
#if defined(__GNUC__)
    __attribute__((format(printf, 3, 4)))
#endif
    ;

/* Sets the error and returns false. */
static bool sweep_say(char *error, size_t size, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, size, format, arguments);
    va_end(arguments);
    return false;
}

static sweep_run *sweep_run_create(int variant, double lr, double decay, uint64_t seed)
{
    sweep_run *r = (sweep_run *)sweep_alloc(1, sizeof *r);
    r->variant = variant;
    r->lr = lr;
    r->decay = decay;
    r->seed = seed;
    return r;
}

static void sweep_run_free(sweep_run *r)
{
    if (!r) return;
    free(r->epoch);
    free(r->measurement);
    free(r->snapshot);
    free(r);
}

static int64_t sweep_snapshot_count(const sweep_settings *s) { return s->epochs < 10 ? 1 : s->epochs / 10; }

static bool sweep_snapshot_due(const sweep_settings *s, int64_t epoch)
{
    return epoch % 10 == 0 || (s->epochs < 10 && epoch == s->epochs);
}

/* ---- training ----------------------------------------------------------- */

/* Some runs of one variant and seed, which are trained side by side as the lanes of one context. */
typedef struct {
    const sweep_settings *settings;
    const sweep_data *data;
    const sweep_variant *variant;
    sweep_run **run;
    int lanes, threads;
    bool (*tick)(void *user, int lanes);    /* after every step, with the lanes that took it; false: give up */
    void *user;
    char error[512];
    /* in training */
    dot_context *ctx;
    dot_layer *net;
    dot_optimizer *optimizer;
    dot_dataset *train, *validation, *test;
} sweep_job;

typedef enum { SWEEP_DONE, SWEEP_GIVEN_UP, SWEEP_FAILED } sweep_outcome;

/* Conv 1-32-64, latent 128, and back: 843,649 parameters. */
static dot_layer *sweep_conv_net(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults();
    half.kernel = 3; half.stride = 2; half.padding = 1; half.output_padding = 1;   /* the last: transposed only */
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 32, &half),               dot_nn_relu(ctx),       /* 28x28 -> 14x14 */
        dot_nn_conv2d(ctx, 32, 64, &half),              dot_nn_relu(ctx),       /* -> 7x7 */
        dot_nn_flatten(ctx),                            dot_nn_linear(ctx, 64*7*7, 128),
        dot_nn_linear(ctx, 128, 64*7*7),                dot_nn_unflatten(ctx, 0, 7, 7, 64),
        dot_nn_conv_transpose2d(ctx, 64, 32, &half),    dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, 32, 1, &half),     dot_nn_sigmoid(ctx), NULL);
}

static dot_layer *sweep_mlp_net(dot_context *ctx)
{
    return dot_nn_sequential(ctx, dot_nn_flatten(ctx),
        dot_nn_linear(ctx, SWEEP_PIXELS, 256),  dot_nn_relu(ctx),
        dot_nn_linear(ctx, 256, 64),            dot_nn_relu(ctx),
        dot_nn_linear(ctx, 64, 32),             dot_nn_relu(ctx),
        dot_nn_linear(ctx, 32, 64),             dot_nn_relu(ctx),
        dot_nn_linear(ctx, 64, 128),            dot_nn_relu(ctx),
        dot_nn_linear(ctx, 128, SWEEP_PIXELS),  dot_nn_sigmoid(ctx),
        dot_nn_unflatten(ctx, 0, SWEEP_HEIGHT, SWEEP_WIDTH, 1), NULL);
}

static dot_dataset *sweep_dataset(dot_context *ctx, const uint8_t *images, int64_t first, int64_t count, bool shuffle)
{
    const int64_t shape[3] = { SWEEP_HEIGHT, SWEEP_WIDTH, 1 };
    dot_dataset_options options = dot_dataset_defaults();
    options.shuffle = shuffle;
    return count > 0 ? dot_dataset_memory(ctx, images + first * SWEEP_PIXELS, NULL, count, 3, shape, &options) : NULL;
}

/* Makes everything that the job trains with; the caller asks dot_ok(job->ctx). */
static void sweep_job_open(sweep_job *job)
{
    const sweep_settings *s = job->settings;
    const sweep_variant *v = job->variant;
    dot_context_options options = dot_context_defaults();
    options.threads = job->threads;
    options.lanes = job->lanes;
    options.seed = job->run[0]->seed;
    job->ctx = dot_context_create(&options);
    job->net = s->model == SWEEP_CONV ? sweep_conv_net(job->ctx) : sweep_mlp_net(job->ctx);

    const int64_t trained = s->samples - s->validation;
    job->train = sweep_dataset(job->ctx, job->data->train, 0, trained, true);
    job->validation = sweep_dataset(job->ctx, job->data->train, trained, s->validation, false);
    job->test = sweep_dataset(job->ctx, job->data->test, 0, s->test_samples, false);

    dot_optimizer_options o = dot_optimizer_defaults(v->algorithm);
    o.beta1 = v->beta1;
    o.decay = sweep_decay_mode(s, v);
    o.decay_lr = sweep_decay_lr(v);
    if (sweep_factored(v)) o.relative_step = v->algorithm == DOT_ADAFACTOR;     /* D has a schedule instead of 1/sqrt(t) */
    job->optimizer = dot_optimizer_create(job->ctx, job->net, &o);
    for (int k = 0; k < job->lanes; ++k)
        dot_optimizer_set(job->optimizer, DOT_HYPER_LR, 0, k, v->base_lr * job->run[k]->lr);
}

/* Sets the weight decay for the restart period that begins. */
static void sweep_begin_period(sweep_job *job, int64_t period)
{
    const double factor = sweep_base_decay * sweep_decay_factor(job->settings, job->variant, period);
    dot_optimizer_set(job->optimizer, DOT_HYPER_DECAY_PERIOD, 0, DOT_ALL, (double)period);
    for (int k = 0; k < job->lanes; ++k)
        dot_optimizer_set(job->optimizer, DOT_HYPER_WEIGHT_DECAY, 0, k, factor * job->run[k]->decay);
}

/* The loss of lane k is not finite: the run ends, and its neighbours go on. */
static void sweep_diverge(sweep_job *job, int k, sweep_epoch *epoch)
{
    job->run[k]->diverged = true;
    epoch->train = epoch->test = epoch->validation = NAN;
    dot_lane_stop(job->ctx, k);
}

static void sweep_measure(sweep_job *job, int64_t step, double multiplier)
{
    for (int k = 0; k < job->lanes; ++k) {
        if (!dot_lane_active(job->ctx, k)) continue;
        sweep_run *r = job->run[k];
        sweep_measurement *m = &r->measurement[r->measurements++];
        double lr = job->variant->base_lr * r->lr;
        if (job->variant->algorithm == DOT_ADAFACTOR) lr = fmin(lr, 1 / sqrt((double)(step + 1)));
        m->step = (double)step;
        m->lr = lr * multiplier;
        m->grad_norm = dot_grad_norm(job->optimizer, k);
        m->weight_norm = dot_weight_norm(job->optimizer, k);
    }
}

static int sweep_active(const sweep_job *job)
{
    int active = 0;
    for (int k = 0; k < job->lanes; ++k) active += dot_lane_active(job->ctx, k);
    return active;
}

/* One epoch of training. Its loss is that of each batch before the step on it, weighted by samples. */
static bool sweep_train_epoch(sweep_job *job, const dot_schedule *schedule, int64_t *period, int64_t number)
{
    const sweep_settings *s = job->settings;
    const int64_t batches = dot_batches(job->train, s->batch), total = s->epochs * batches;
    for (int64_t step = number * batches; step < (number + 1) * batches && sweep_active(job) > 0; ++step) {
        const int64_t present = dot_schedule_period(schedule, step, total);
        if (present != *period) sweep_begin_period(job, *period = present);

        dot_step_begin(job->ctx);
        dot_tensor *x = dot_batch(job->train, s->batch, step);
        dot_tensor *loss = dot_mse_loss(dot_forward(job->net, x), x);
        dot_backward(loss);
        for (int k = 0; k < job->lanes; ++k) {
            if (!dot_lane_active(job->ctx, k)) continue;
            sweep_epoch *epoch = &job->run[k]->epoch[number];
            epoch->train += dot_item(loss, k) * (double)dot_tensor_dim(x, 0);
            if (!isfinite(epoch->train)) sweep_diverge(job, k, epoch);
        }
        const double multiplier = dot_schedule_at(schedule, step);
        if (step % s->log_every == 0) sweep_measure(job, step, multiplier);
        dot_optimizer_step(job->optimizer, multiplier);
        if (!dot_ok(job->ctx) || !job->tick(job->user, sweep_active(job))) return false;
    }
    return true;
}

/* The mean loss of each lane over a data set. */
static bool sweep_evaluate(sweep_job *job, dot_dataset *data, double *loss)
{
    for (int k = 0; k < job->lanes; ++k) loss[k] = 0;
    for (int64_t step = 0; step < dot_batches(data, sweep_eval_batch); ++step) {
        dot_eval_begin(job->ctx);
        dot_tensor *x = dot_batch(data, sweep_eval_batch, step);
        dot_tensor *mse = dot_mse_loss(dot_forward(job->net, x), x);
        for (int k = 0; k < job->lanes; ++k) loss[k] += dot_item(mse, k) * (double)dot_tensor_dim(x, 0);
        if (!dot_ok(job->ctx) || !job->tick(job->user, 0)) return false;
    }
    for (int k = 0; k < job->lanes; ++k) loss[k] /= (double)dot_dataset_count(data);
    return true;
}

/* Reconstructions of the first test images by every lane that is to be drawn. */
static void sweep_take_snapshots(sweep_job *job)
{
    enum { COUNT = SWEEP_SHOWN * SWEEP_PIXELS };
    double *pixel = (double *)sweep_alloc(COUNT, sizeof *pixel);
    dot_eval_begin(job->ctx);
    dot_tensor *y = dot_forward(job->net, dot_batch(job->test, SWEEP_SHOWN, 0));
    const int64_t count = dot_tensor_size(y) < COUNT ? dot_tensor_size(y) : COUNT;
    for (int k = 0; k < job->lanes; ++k) {
        sweep_run *r = job->run[k];
        if (!r->draw || r->diverged || !dot_tensor_get(y, k, pixel, count)) continue;
        uint8_t *out = r->snapshot + (size_t)r->snapshots++ * COUNT;
        for (int64_t i = 0; i < count; ++i) out[i] = (uint8_t)lround(255 * fmin(fmax(pixel[i], 0), 1));
    }
    free(pixel);
}

/* Evaluates every lane that still runs after epoch `number`, and closes the epoch's record. */
static bool sweep_finish_epoch(sweep_job *job, int64_t number, double *test, double *validation)
{
    const sweep_settings *s = job->settings;
    if (!sweep_evaluate(job, job->test, test)) return false;
    if (job->validation && !sweep_evaluate(job, job->validation, validation)) return false;
    for (int k = 0; k < job->lanes; ++k) {
        if (!dot_lane_active(job->ctx, k)) continue;
        sweep_epoch *epoch = &job->run[k]->epoch[number];
        epoch->train /= (double)dot_dataset_count(job->train);
        epoch->test = test[k];
        epoch->validation = job->validation ? validation[k] : NAN;
        if (!isfinite(test[k]) || (job->validation && !isfinite(validation[k]))) sweep_diverge(job, k, epoch);
    }
    if (sweep_snapshot_due(s, number + 1)) sweep_take_snapshots(job);
    return dot_ok(job->ctx);
}

static bool sweep_train_epochs(sweep_job *job, double *test, double *validation)
{
    const sweep_settings *s = job->settings;
    const dot_schedule schedule = sweep_schedule(s, job->variant);
    int64_t period = 0;
    for (int64_t number = 0; number < s->epochs && sweep_active(job) > 0; ++number) {
        const double start = cli_seconds();
        const int running = sweep_active(job);
        for (int k = 0; k < job->lanes; ++k)
            if (dot_lane_active(job->ctx, k)) job->run[k]->epochs = (int)number + 1;
        if (!sweep_train_epoch(job, &schedule, &period, number)) return false;
        if (sweep_active(job) > 0 && !sweep_finish_epoch(job, number, test, validation)) return false;
        for (int k = 0; k < job->lanes; ++k) {      /* lanes share the time */
            if (job->run[k]->epochs != number + 1) continue;
            job->run[k]->epoch[number].seconds = (cli_seconds() - start) / running;
            job->run[k]->seconds += job->run[k]->epoch[number].seconds;
        }
    }
    return true;
}

/* Trains the job's runs and fills in their results. These do not depend on how runs are grouped into jobs, nor on the
   number of threads. */
static sweep_outcome sweep_train(sweep_job *job)
{
    const sweep_settings *s = job->settings;
    const size_t epochs = (size_t)s->epochs, steps = epochs * (size_t)sweep_batches(s);
    double *losses = (double *)sweep_alloc(2 * (size_t)job->lanes, sizeof *losses);
    for (int k = 0; k < job->lanes; ++k) {
        sweep_run *r = job->run[k];
        r->epoch = (sweep_epoch *)sweep_alloc(epochs, sizeof *r->epoch);
        r->measurement = (sweep_measurement *)sweep_alloc(steps / (size_t)s->log_every + 1, sizeof *r->measurement);
        if (r->draw)
            r->snapshot = (uint8_t *)sweep_alloc((size_t)sweep_snapshot_count(s), SWEEP_SHOWN * SWEEP_PIXELS);
    }
    sweep_job_open(job);
    const bool finished = dot_ok(job->ctx) && sweep_train_epochs(job, losses, losses + job->lanes);
    const bool good = dot_ok(job->ctx);
    if (!good) sweep_say(job->error, sizeof job->error, "%s", job->ctx ? dot_error(job->ctx) : "no context: out of memory");
    dot_context_destroy(job->ctx);
    free(losses);
    return finished ? SWEEP_DONE : good ? SWEEP_GIVEN_UP : SWEEP_FAILED;
}

/* ---- loading the data --------------------------------------------------- */

/* Copies the images of an IDX file. NULL, with the reason in `error`, when that is not possible. */
static uint8_t *sweep_load_images(dot_context *ctx, const char *folder, const char *name, int64_t *count,
                                  char *error, size_t size)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    dot_dataset_options options = dot_dataset_defaults();
    options.shuffle = false;
    dot_dataset *images = dot_dataset_idx(ctx, path, NULL, &options);
    dot_tensor *first = dot_batch(images, 1, 0);
    if (!dot_ok(ctx)) {
        sweep_say(error, size, "%s (tools/fetch_data.sh gets the data)", dot_error(ctx));
        return NULL;
    }
    if (dot_tensor_dim(first, 1) != SWEEP_HEIGHT || dot_tensor_dim(first, 2) != SWEEP_WIDTH) {
        sweep_say(error, size, "%s: images of %d x %d were expected", path, SWEEP_HEIGHT, SWEEP_WIDTH);
        return NULL;
    }
    *count = dot_dataset_count(images);
    uint8_t *copy = (uint8_t *)sweep_alloc((size_t)*count, SWEEP_PIXELS);
    for (int64_t i = 0; i < *count; ++i)
        memcpy(copy + i * SWEEP_PIXELS, dot_dataset_record(images, i), SWEEP_PIXELS);
    return copy;
}

static uint64_t sweep_hash(uint64_t hash, const uint8_t *bytes, int64_t count)     /* FNV-1a */
{
    for (int64_t i = 0; i < count; ++i) hash = (hash ^ bytes[i]) * UINT64_C(0x100000001b3);
    return hash;
}

static void sweep_data_free(sweep_data *data)
{
    free(data->train);
    free(data->test);
}

static bool sweep_data_load(sweep_data *data, const char *folder, char *error, size_t size)
{
    dot_context_options options = dot_context_defaults();
    options.threads = 1;
    dot_context *ctx = dot_context_create(&options);
    memset(data, 0, sizeof *data);
    data->train = sweep_load_images(ctx, folder, "train-images-idx3-ubyte", &data->train_count, error, size);
    if (data->train)
        data->test = sweep_load_images(ctx, folder, "t10k-images-idx3-ubyte", &data->test_count, error, size);
    if (data->test) {
        data->hash = sweep_hash(UINT64_C(0xcbf29ce484222325), data->train, data->train_count * SWEEP_PIXELS);
        data->hash = sweep_hash(data->hash, data->test, data->test_count * SWEEP_PIXELS);
        snprintf(data->kernels, sizeof data->kernels, "%s", dot_kernels(ctx));
    }
    dot_context_destroy(ctx);
    return data->test != NULL;
}

#endif
