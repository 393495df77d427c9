/* Times the training step of the Fashion-MNIST autoencoder (843,649 parameters, AdamW), on images made here.
   Build:  cc -O2 -std=c11 -I. -o build/bench_step tools/bench_step.c -lm -pthread
   Use:    build/bench_step [batch] [steps]        prints median and best milliseconds and GFLOP/s for 1 and 2 threads
   Work: 16,219,392 floating-point operations per image, forward and backward, every kernel tap counted. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

#define FLOP_PER_IMAGE 16219392.0

static double seconds(void)
{
    struct timespec t;
    timespec_get(&t, TIME_UTC);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static dot_layer *autoencoder(dot_context *ctx)
{
    dot_conv_options half = dot_conv_defaults();
    half.stride = 2; half.padding = 1; half.output_padding = 1;
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 32, &half), dot_nn_relu(ctx), dot_nn_conv2d(ctx, 32, 64, &half), dot_nn_relu(ctx),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, 64 * 7 * 7, 128),
        dot_nn_linear(ctx, 128, 64 * 7 * 7), dot_nn_unflatten(ctx, 0, 7, 7, 64),
        dot_nn_conv_transpose2d(ctx, 64, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, 32, 1, &half), dot_nn_sigmoid(ctx), (dot_layer *)NULL);
}

/* False after an error, which it prints. */
static bool bench(int threads, int64_t batch, int steps, const uint8_t *images, double *time)
{
    dot_context_options options = dot_context_defaults();
    options.threads = threads;
    dot_context *ctx = dot_context_create(&options);
    int64_t shape[3] = { 28, 28, 1 };
    dot_dataset *data = dot_dataset_memory(ctx, images, NULL, batch * 4, 3, shape, NULL);
    dot_layer *net = autoencoder(ctx);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, NULL);
    for (int step = -5; step < steps && dot_ok(ctx); ++step) {         /* five to warm up */
        double start = seconds();
        dot_step_begin(ctx);
        dot_tensor *x = dot_batch(data, batch, step + 5);
        dot_backward(dot_mse_loss(dot_forward(net, x), x));
        dot_optimizer_step(optimizer, 1);
        if (step >= 0) time[step] = seconds() - start;
    }
    bool ok = dot_ok(ctx);
    if (!ok) fprintf(stderr, "bench_step: %s\n", ctx ? dot_error(ctx) : "no context");
    else {
        qsort(time, (size_t)steps, sizeof *time, by_value);
        double median = time[steps / 2], flop = FLOP_PER_IMAGE * (double)batch;
        printf("%s, %d thread%s, batch %lld: median %.2f ms (%.1f GFLOP/s), best %.2f ms (%.1f GFLOP/s)\n", dot_kernels(ctx), threads,
               threads > 1 ? "s" : "", (long long)batch, median * 1e3, flop / median * 1e-9, time[0] * 1e3, flop / time[0] * 1e-9);
    }
    dot_context_destroy(ctx);
    return ok;
}

int main(int argc, char **argv)
{
    long batch = argc > 1 ? atol(argv[1]) : 128, steps = argc > 2 ? atol(argv[2]) : 60;
    if (batch < 1 || batch > 65536 || steps < 1 || steps > 100000) {
        fprintf(stderr, "usage: bench_step [batch 1..65536] [steps 1..100000]\n");
        return 2;
    }
    size_t bytes = (size_t)batch * 4 * 784;
    uint8_t *images = (uint8_t *)malloc(bytes);
    double *time = (double *)malloc((size_t)steps * sizeof *time);
    bool ok = images && time;
    for (size_t i = 0; ok && i < bytes; ++i) images[i] = (uint8_t)(dot_random_uniform(1, 0, i) * 256);
    for (int threads = 1; ok && threads <= 2; ++threads) ok = bench(threads, batch, (int)steps, images, time);
    free(images);
    free(time);
    return ok ? 0 : 1;
}
