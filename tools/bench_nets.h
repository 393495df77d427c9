/* bench_nets.h - the networks whose training steps are timed; instructions.c counts two of them. */
#ifndef DOTOPT_BENCH_NETS_H
#define DOTOPT_BENCH_NETS_H

#include <math.h>

#include "dotopt.h"

/* A layer of layers, and the parts that its forward function uses: yours, as long as the network lives. */
enum { NET_PARTS = 6, NET_MOST_BLOCKS = 8 };
typedef struct { dot_layer *part[NET_PARTS]; } net_parts;
typedef dot_layer *(*net_function)(dot_context *ctx, net_parts parts[NET_MOST_BLOCKS]);

static dot_conv_options net_conv(int kernel, int stride, int padding, int output_padding)
{
    dot_conv_options o = dot_conv_defaults();
    o.kernel = kernel;
    o.stride = stride;
    o.padding = padding;
    o.output_padding = output_padding;
    return o;
}

/* The autoencoder of the Fashion-MNIST sweep: 843,649 parameters at channels 32, 64. */
static dot_layer *net_autoencoder_of(dot_context *ctx, int64_t narrow, int64_t wide, int64_t code)
{
    const dot_conv_options half = net_conv(3, 2, 1, 1);
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, narrow, &half), dot_nn_relu(ctx), dot_nn_conv2d(ctx, narrow, wide, &half), dot_nn_relu(ctx),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, wide * 49, code), dot_nn_linear(ctx, code, wide * 49), dot_nn_unflatten(ctx, 0, 7, 7, wide),
        dot_nn_conv_transpose2d(ctx, wide, narrow, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, narrow, 1, &half), dot_nn_sigmoid(ctx), (dot_layer *)NULL);
}

static inline dot_layer *net_autoencoder(dot_context *ctx, net_parts *parts)
{
    (void)parts;
    return net_autoencoder_of(ctx, 32, 64, 128);
}

/* The fully connected one of the sweep. */
static inline dot_layer *net_mlp(dot_context *ctx, net_parts *parts)
{
    (void)parts;
    return dot_nn_sequential(ctx,
        dot_nn_linear(ctx, 784, 256), dot_nn_relu(ctx), dot_nn_linear(ctx, 256, 64), dot_nn_relu(ctx),
        dot_nn_linear(ctx, 64, 32), dot_nn_relu(ctx), dot_nn_linear(ctx, 32, 64), dot_nn_relu(ctx),
        dot_nn_linear(ctx, 64, 128), dot_nn_relu(ctx), dot_nn_linear(ctx, 128, 784), dot_nn_sigmoid(ctx), (dot_layer *)NULL);
}

/* The volumes' autoencoder: 582,690 parameters. */
static inline dot_layer *net_autoencoder3d(dot_context *ctx, net_parts *parts)
{
    (void)parts;
    const dot_conv_options half = net_conv(3, 2, 1, 1);
    return dot_nn_sequential(ctx,
        dot_nn_conv3d(ctx, 2, 16, &half), dot_nn_relu(ctx), dot_nn_conv3d(ctx, 16, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv3d(ctx, 32, 64, &half), dot_nn_relu(ctx), dot_nn_conv3d(ctx, 64, 128, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose3d(ctx, 128, 64, &half), dot_nn_relu(ctx), dot_nn_conv_transpose3d(ctx, 64, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose3d(ctx, 32, 16, &half), dot_nn_relu(ctx), dot_nn_conv_transpose3d(ctx, 16, 2, &half), (dot_layer *)NULL);
}

/* ---- transformer encoder ------------------------------------------------ */


static dot_layer *net_block(dot_context *ctx, const char *kind, dot_forward_function forward, net_parts *parts, dot_layer *const *part,
                            int count)
{
    static const char *const names[NET_PARTS] = { "0", "1", "2", "3", "4", "5" };
    dot_layer *layer = dot_nn_custom(ctx, kind, forward, parts);
    for (int i = 0; i < count; ++i) {
        parts->part[i] = part[i];
        if (part[i]) dot_layer_add_child(layer, names[i], part[i]);
    }
    return layer;
}

enum { NET_SEQUENCE = 256, NET_WIDTH = 256, NET_HEADS = 8, NET_BLOCKS = 6, NET_FEED = 1024 };

static dot_tensor *net_attention(dot_layer *in, dot_layer *out, dot_tensor *x)
{
    dot_attention_options o = dot_attention_defaults();
    o.heads = NET_HEADS;
    return dot_forward(out, dot_self_attention(dot_forward(in, x), &o));
}

static dot_tensor *net_encoder_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    dot_layer **part = ((net_parts *)user)->part;
    (void)layer;
    x = dot_add(x, net_attention(part[1], part[2], dot_forward(part[0], x)));
    return dot_add(x, dot_forward(part[5], dot_gelu(dot_forward(part[4], dot_forward(part[3], x)))));
}

/* Six pre-norm blocks of width 256: 4,738,560 parameters. */
static inline dot_layer *net_transformer(dot_context *ctx, net_parts *parts)
{
    dot_layer *block[NET_BLOCKS];
    for (int i = 0; i < NET_BLOCKS; ++i) {
        dot_layer *const part[] = { dot_nn_layer_norm(ctx, NET_WIDTH), dot_nn_linear(ctx, NET_WIDTH, 3 * NET_WIDTH),
                                    dot_nn_linear(ctx, NET_WIDTH, NET_WIDTH), dot_nn_layer_norm(ctx, NET_WIDTH),
                                    dot_nn_linear(ctx, NET_WIDTH, NET_FEED), dot_nn_linear(ctx, NET_FEED, NET_WIDTH) };
        block[i] = net_block(ctx, "encoder", net_encoder_forward, &parts[i], part, 6);
    }
    return dot_nn_sequential(ctx, block[0], block[1], block[2], block[3], block[4], block[5], (dot_layer *)NULL);
}

/* ---- ResNet-18 ---------------------------------------------------------- */

static dot_layer *net_conv_norm(dot_context *ctx, int64_t in, int64_t out, int kernel, int stride, bool relu)
{
    dot_conv_options o = net_conv(kernel, stride, kernel / 2, 0);
    o.bias = false;
    return dot_nn_sequential(ctx, dot_nn_conv2d(ctx, in, out, &o), dot_nn_batch_norm(ctx, out), relu ? dot_nn_relu(ctx) : (dot_layer *)NULL,
                             (dot_layer *)NULL);
}

static dot_tensor *net_residual_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    dot_layer **part = ((net_parts *)user)->part;
    (void)layer;
    dot_tensor *y = dot_forward(part[1], dot_forward(part[0], x));
    return dot_relu(dot_add(y, part[2] ? dot_forward(part[2], x) : x));
}

static dot_tensor *net_pool_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user;
    (void)layer;
    return dot_mean(x, DOT_AXIS(1) | DOT_AXIS(2), false);
}

/* ResNet-18 for images of 32 x 32 (He et al. 2016, with the 3x3 first layer of section 4.2): 11,173,962 parameters. */
static inline dot_layer *net_resnet18(dot_context *ctx, net_parts *parts)
{
    dot_layer *block[8];
    for (int i = 0; i < 8; ++i) {
        const int64_t out = 64 << i / 2, in = i % 2 || i == 0 ? out : out / 2;
        const int stride = in == out ? 1 : 2;
        dot_layer *const part[] = { net_conv_norm(ctx, in, out, 3, stride, true), net_conv_norm(ctx, out, out, 3, 1, false),
                                    in == out ? (dot_layer *)NULL : net_conv_norm(ctx, in, out, 1, stride, false) };
        block[i] = net_block(ctx, "residual", net_residual_forward, &parts[i], part, 3);
    }
    return dot_nn_sequential(ctx, net_conv_norm(ctx, 3, 64, 3, 1, true), block[0], block[1], block[2], block[3], block[4], block[5],
                             block[6], block[7], dot_nn_custom(ctx, "pool", net_pool_forward, NULL), dot_nn_linear(ctx, 512, 10),
                             (dot_layer *)NULL);
}

#endif
