/* Trains a convolutional autoencoder on Fashion-MNIST. The README shows this program.
   Build:  cc -O2 -std=c99 -I. -o build/autoencoder examples/autoencoder.c -lm -pthread
   Data:   tools/fetch_data.sh data */
#include <stdio.h>
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

int main(void)
{
    dot_context *ctx = dot_context_create(NULL);              /* NULL: defaults */
    dot_dataset *train = dot_dataset_idx(ctx, "data/train-images-idx3-ubyte", NULL, NULL);

    dot_conv_options half = dot_conv_defaults();
    half.kernel = 3; half.stride = 2; half.padding = 1; half.output_padding = 1;   /* the last: transposed only */
    dot_layer *net = dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 32, &half),           dot_nn_relu(ctx),
        dot_nn_conv2d(ctx, 32, 64, &half),          dot_nn_relu(ctx),
        dot_nn_flatten(ctx),                        dot_nn_linear(ctx, 64*7*7, 128),
        dot_nn_linear(ctx, 128, 64*7*7),            dot_nn_unflatten(ctx, 0, 7, 7, 64),
        dot_nn_conv_transpose2d(ctx, 64, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, 32, 1, &half),  dot_nn_sigmoid(ctx), (dot_layer *)NULL);

    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAMW);
    o.lr = 1e-3; o.weight_decay = 1e-2;
    dot_optimizer *opt = dot_optimizer_create(ctx, net, &o);
    int64_t total = 10 * dot_batches(train, 128);
    dot_schedule cosine = dot_schedule_cosine(total, 0.0);

    for (int64_t step = 0; step < total && dot_ok(ctx); ++step) {
        dot_step_begin(ctx);
        dot_tensor *x    = dot_batch(train, 128, step);        /* shuffled each epoch, by seed */
        dot_tensor *loss = dot_mse_loss(dot_forward(net, x), x);
        dot_backward(loss);
        dot_clip_grad_norm(opt, 1.0);
        dot_optimizer_step(opt, dot_schedule_at(&cosine, step));
        if (step % 100 == 0) printf("step %lld  loss %.6f\n", (long long)step, dot_item(loss, 0));
    }
    dot_save(net, "autoencoder.safetensors");
    if (!dot_ok(ctx)) fprintf(stderr, "%s\n", dot_error(ctx));
    int failed = !dot_ok(ctx);
    dot_context_destroy(ctx);
    return failed;
}
