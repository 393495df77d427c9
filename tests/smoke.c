/* smoke.c - a small self-checking program for compilers and machines where no test library is installed.
   usage: smoke [FILE]      FILE: where it may save and load weights
   Trains a small convolutional network, checks its gradients in double precision, and prints the last loss. */
#include "dotopt.h"

#include <math.h>
#include <stdio.h>

enum { SIDE = 8, COUNT = 16, BATCH = 8, STEPS = 30, CLASSES = 4 };

static int failures;

static void expect(bool condition, const char *what, const char *detail)
{
    if (condition)
        return;
    ++failures;
    printf("FAILED  %s: %s\n", what, detail);
}

/* A bright quarter on a dark, uneven ground; the label says which. */
static void draw(uint8_t *records, uint8_t *labels)
{
    for (int i = 0; i < COUNT; ++i) {
        labels[i] = (uint8_t)(i % CLASSES);
        for (int y = 0; y < SIDE; ++y)
            for (int x = 0; x < SIDE; ++x) {
                int quarter = y / (SIDE / 2) * 2 + x / (SIDE / 2);
                int ground = (i * 31 + y * 17 + x * 7) % 64;
                records[(i * SIDE + y) * SIDE + x] = (uint8_t)(quarter == labels[i] ? 150 + ground : ground);
            }
    }
}

static dot_layer *network(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults();
    half.stride = 2;
    half.padding = 1;
    half.output_padding = 1;
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 6, &half), dot_nn_batch_norm(ctx, 6), dot_nn_gelu(ctx),
        dot_nn_conv_transpose2d(ctx, 6, 2, &half), dot_nn_relu(ctx), dot_nn_avg_pool(ctx, NULL),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, 32, 8), dot_nn_tanh(ctx), dot_nn_linear(ctx, 8, CLASSES), NULL);
}

typedef struct problem {
    dot_context *ctx;
    dot_layer *net;
    dot_dataset *data;
} problem;

static problem open_problem(dot_dtype dtype, const uint8_t *records, const uint8_t *labels)
{
    static const int64_t shape[3] = { SIDE, SIDE, 1 };
    dot_context_options options = dot_context_defaults();
    problem p;
    options.seed = 5;
    options.threads = 2;
    options.dtype = dtype;
    p.ctx = dot_context_create(&options);
    p.net = network(p.ctx);
    p.data = dot_dataset_memory(p.ctx, records, labels, COUNT, 3, shape, NULL);
    expect(dot_ok(p.ctx), "creation", dot_error(p.ctx));
    return p;
}

static dot_tensor *loss_of(problem *p, int64_t step)
{
    dot_tensor *x = dot_batch(p->data, BATCH, step);
    return dot_cross_entropy_loss(dot_forward(p->net, x), dot_batch_labels(p->data, BATCH, step), 0.0);
}

static dot_tensor *loss_to_check(void *user)
{
    problem *p = (problem *)user;
    dot_step_begin(p->ctx);
    return loss_of(p, 0);
}

static void check_gradients(const uint8_t *records, const uint8_t *labels)
{
    problem p = open_problem(DOT_F64, records, labels);
    dot_parameter_info info;
    char detail[64];
    for (int i = 0; i < dot_layer_parameters(p.net) && dot_layer_parameter(p.net, i, &info); ++i) {
        if (info.kind == DOT_KIND_BUFFER)
            continue;
        double error = dot_gradient_check(p.ctx, loss_to_check, &p, &info.tensor, 1, 1e-6);
        snprintf(detail, sizeof detail, "error %g", error);
        expect(error < 1e-6, info.name, detail);
    }
    expect(dot_ok(p.ctx), "gradient check", dot_error(p.ctx));
    dot_context_destroy(p.ctx);
}

/* Trains in single precision; the loss of the last step. */
static double train(problem *p)
{
    dot_optimizer_options options = dot_optimizer_defaults(DOT_ADAMW);
    options.lr = 0.01;
    dot_optimizer *optimizer = dot_optimizer_create(p->ctx, p->net, &options);
    dot_schedule cosine = dot_schedule_cosine(STEPS, 0.0);
    double first = 0, last = 0;
    char detail[64];
    for (int64_t step = 0; step < STEPS && dot_ok(p->ctx); ++step) {
        dot_step_begin(p->ctx);
        dot_tensor *loss = loss_of(p, step);
        dot_backward(loss);
        dot_clip_grad_norm(optimizer, 1.0);
        dot_optimizer_step(optimizer, dot_schedule_at(&cosine, step));
        last = dot_item(loss, 0);
        if (step == 0)
            first = last;
    }
    snprintf(detail, sizeof detail, "from %g to %g", first, last);
    expect(dot_ok(p->ctx), "training", dot_error(p->ctx));
    expect(last < 0.5 * first, "the loss does not fall", detail);
    return last;
}

/* Saved and loaded into a new network, the weights give the same loss. */
static void check_file(problem *p, const char *path, const uint8_t *records, const uint8_t *labels)
{
    problem copy = open_problem(DOT_F32, records, labels);
    dot_eval_begin(p->ctx);
    double expected = dot_item(loss_of(p, 0), 0);
    expect(dot_save(p->net, path), "dot_save", dot_error(p->ctx));
    expect(dot_load(copy.net, path), "dot_load", dot_error(copy.ctx));
    dot_eval_begin(copy.ctx);
    double loss = dot_item(loss_of(&copy, 0), 0);
    expect(fabs(loss - expected) <= 0.0, "loss after dot_load", "differs");
    dot_context_destroy(copy.ctx);
    remove(path);
}

int main(int argc, char **argv)
{
    uint8_t records[COUNT * SIDE * SIDE], labels[COUNT];
    draw(records, labels);
    check_gradients(records, labels);

    problem p = open_problem(DOT_F32, records, labels);
    if (!p.ctx)
        return 1;
    double loss = train(&p);
    if (argc > 1)
        check_file(&p, argv[1], records, labels);
    printf("kernels %s\nloss %.7f\n", dot_kernels(p.ctx), loss);
    dot_context_destroy(p.ctx);
    return failures > 0;
}
