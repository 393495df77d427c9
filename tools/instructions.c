/* instructions - a few training steps of fixed work, for tools/instructions.sh to count their instructions.
   Build:  make build/dotopt.o && cc -O2 -I. -o instructions tools/instructions.c build/dotopt.o -lm -pthread
   Use:    instructions autoencoder|mlp avx2|portable      one thread; prints the kernels and the last loss */
#include <stdio.h>
#include <string.h>
#include "dotopt.h"

#include "bench_nets.h"

typedef struct { dot_context *ctx; dot_layer *net; dot_optimizer *optimizer; dot_tensor *x; } training;

/* A function of its own, with a name that is kept: callgrind counts what happens in it. */
double counted_steps(const training *t, int steps);

double counted_steps(const training *t, int steps)
{
    double last = 0;
    for (int i = 0; i < steps; ++i) {
        dot_step_begin(t->ctx);
        dot_tensor *loss = dot_mse_loss(dot_forward(t->net, t->x), t->x);
        dot_backward(loss);
        dot_clip_grad_norm(t->optimizer, 1);
        dot_optimizer_step(t->optimizer, 1);
        last = dot_item(loss, 0);
    }
    return last;
}

int main(int argc, char **argv)
{
    const bool images = argc == 3 && strcmp(argv[1], "autoencoder") == 0, simd = argc == 3 && strcmp(argv[2], "avx2") == 0;
    if (argc != 3 || (!images && strcmp(argv[1], "mlp")) || (!simd && strcmp(argv[2], "portable"))) {
        fprintf(stderr, "usage: instructions autoencoder|mlp avx2|portable\n");
        return 2;
    }
    dot_context_options o = dot_context_defaults();
    o.threads = 1;
    o.simd = simd;
    training t = { dot_context_create(&o), NULL, NULL, NULL };
    static const int64_t shapes[2][4] = { { 32, 784 }, { 16, 28, 28, 1 } };
    t.net = images ? net_autoencoder_of(t.ctx, 16, 32, 64) : net_mlp(t.ctx, NULL);
    t.optimizer = dot_optimizer_create(t.ctx, t.net, NULL);
    t.x = dot_tensor_create(t.ctx, DOT_F32, images ? 4 : 2, shapes[images]);
    float *x = (float *)dot_tensor_data(t.x, 0);
    for (int64_t i = 0; i < dot_tensor_size(t.x); ++i) x[i] = (float)dot_random_uniform(1, 0, (uint64_t)i);

    const double loss = t.ctx && dot_ok(t.ctx) ? counted_steps(&t, 2) : 0;
    if (!t.ctx || !dot_ok(t.ctx)) {
        fprintf(stderr, "instructions: %s\n", t.ctx ? dot_error(t.ctx) : "no context");
        dot_context_destroy(t.ctx);
        return 1;
    }
    printf("%s %.6g\n", dot_kernels(t.ctx), loss);
    dot_context_destroy(t.ctx);
    return 0;
}
