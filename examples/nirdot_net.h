/*
 * nirdot_net.h - the networks of NIR-DOT, and their losses.
 *
 * Stage 1 is a 3-D convolutional autoencoder: volume -> latent -> volume. Stage 2 is a transformer whose tokens are
 * measurements (log amplitude, phase, where source and detector are): measurements -> latent. The decoder of stage 1, frozen,
 * turns the latent of stage 2 into the reconstructed volume.
 *
 * Volumes are [N, D, H, W, C], channels mu_a and mu_s', normalised; tokens are [N, T, features]. Parameters have the names and
 * shapes of the same modules in PyTorch (tests/golden/make_nirdot_net.py), so that weights go both ways as safetensors.
 */
#ifndef NIRDOT_NET_H
#define NIRDOT_NET_H

#include "dotopt.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__)
#define NIR_UNUSED __attribute__((unused))
#else
#define NIR_UNUSED
#endif

/* ---- sizes -------------------------------------------------------------- */

typedef enum nir_norm { NIR_NORM_BATCH, NIR_NORM_GROUP } nir_norm;

enum { NIR_MAX_STAGES = 4, NIR_MAX_UPS = 6 };

typedef struct nir_autoencoder_options {
    int n;                      /* voxels a side: 2^(ups + 1), with `subvoxel` 2^(ups + 2) */
    int stem, stem_kernel;      /* channels and kernel of the first convolution, stride 2; max pooling 3, stride 2 follows */
    int stages, width[NIR_MAX_STAGES];      /* residual blocks; all but the first have stride 2 */
    int latent;
    int ups, up_width[NIR_MAX_UPS];         /* transposed convolutions, each doubles the side; they begin at 2^3 */
    bool subvoxel;              /* the last convolution gives 2^3 voxels at each place (Shi et al. 2016): a fifth of the time of a
                                   decoder that computes at full resolution, as the original does (false) */
    nir_norm norm;              /* batch: as the original. Group: the scale of a sample is lost in the encoder, see nir_norm_layer */
    int groups;                 /* of group normalisation: 8, fewer where the channels do not divide */
    int attention;              /* spatial attention after so many of the deepest stages; 0 */
    double dropout;             /* on the encoder's last features */
    bool flatten;               /* the latent comes from all of the last features; false: from their mean, as in the original, which
                                   loses where things are */
} nir_autoencoder_options;

typedef struct nir_transformer_options {
    int signal, position;       /* features of a token: of its values, of its place */
    int context;                /* features of the whole measurement, 0: none; added to every token */
    int width, layers, heads, feed_forward;
    int fuse;                   /* hidden width between the two feature branches and the token */
    int queries;                /* learned pooling queries; 0: the mean over tokens */
    int head, latent;           /* hidden width of the latent head, and its output */
    bool image;                 /* an image of the measurements goes through an encoder like that of stage 1, and adds to the latent */
    bool pre_norm;              /* LayerNorm before attention and feed-forward; false: after, as the original */
    double dropout, input_dropout;
} nir_transformer_options;

typedef enum nir_size { NIR_SMOKE, NIR_SMALL, NIR_FULL, NIR_SIZES } nir_size;

/* Parameters: see the test, which counts them. Full: the original. */
static const struct nir_size_row {
    const char *name;
    nir_autoencoder_options autoencoder;
    nir_transformer_options transformer;
} nir_sizes[NIR_SIZES] = {
    { "smoke", { 16, 8, 3, 2, { 16, 32 }, 32, 2, { 16, 16 }, true, NIR_NORM_BATCH, 8, 0, 0, true },
      { 2, 6, 0, 32, 1, 4, 64, 48, 4, 32, 32, false, false, 0, 0 } },
    { "small", { 32, 8, 3, 3, { 16, 32, 64 }, 128, 3, { 32, 16, 16 }, true, NIR_NORM_BATCH, 8, 0, 0, true },
      { 2, 6, 0, 96, 3, 4, 192, 144, 4, 48, 128, false, false, 0, 0 } },
    { "full", { 64, 16, 7, 4, { 32, 64, 128, 256 }, 256, 5, { 128, 64, 32, 16, 16 }, false, NIR_NORM_BATCH, 8, 0, 0.05, false },
      { 2, 6, 0, 256, 8, 8, 1024, 384, 4, 128, 256, false, false, 0.05, 0.04 } },
};

/* ---- building ----------------------------------------------------------- */

static dot_layer *nir_child(dot_layer *parent, const char *name, dot_layer *child)
{
    return dot_layer_add_child(parent, name, child) ? child : NULL;
}

/* The parameter or buffer that is called `name` in the layer; NULL when there is none. */
static dot_tensor *nir_tensor(dot_layer *layer, const char *name)
{
    dot_parameter_info info;
    for (int i = 0, n = dot_layer_parameters(layer); i < n; ++i)
        if (dot_layer_parameter(layer, i, &info) && strcmp(info.name, name) == 0) return info.tensor;
    return NULL;
}

/* Xavier's uniform weights everywhere; biases 0; norms stay 1 and 0. */
static void nir_init(dot_layer *layer)
{
    dot_parameter_info info;
    for (int i = 0, n = dot_layer_parameters(layer); i < n; ++i) {
        if (!dot_layer_parameter(layer, i, &info)) return;
        if (info.kind == DOT_KIND_WEIGHT) dot_parameter_init(layer, info.name, DOT_INIT_XAVIER_UNIFORM, 1);
        if (info.kind == DOT_KIND_BIAS) dot_parameter_init(layer, info.name, DOT_INIT_ZEROS, 1);
    }
}

/* No gradients for the parameters of the layer, or gradients again. */
static void nir_set_trainable(dot_layer *layer, bool on)
{
    dot_parameter_info info;
    for (int i = 0, n = dot_layer_parameters(layer); i < n; ++i)
        if (dot_layer_parameter(layer, i, &info) && info.kind != DOT_KIND_BUFFER) dot_requires_grad(info.tensor, on);
}

/* Group normalisation makes a sample's features independent of its scale; in the encoder, whose convolutions have no bias, the
   level of a homogeneous phantom is then lost. Batch normalisation keeps it. */
static dot_layer *nir_norm_layer(dot_context *ctx, const nir_autoencoder_options *o, int channels)
{
    if (o->norm == NIR_NORM_BATCH) return dot_nn_batch_norm(ctx, channels);
    int groups = o->groups;
    while (channels % groups) --groups;
    return dot_nn_group_norm(ctx, groups, channels);
}

/* ---- stage 1: convolution, normalisation, ReLU --------------------------- */

typedef struct nir_conv {
    dot_layer *layer, *norm;
    dot_tensor *weight, *bias;
    dot_tensor *gain, *shift, *mean, *var;      /* of batch normalisation */
    dot_conv_options options;
    bool transposed, relu;
    const bool *frozen;
} nir_conv;

static dot_tensor *nir_convolve(const nir_conv *c, dot_tensor *x, dot_tensor *weight, dot_tensor *bias, dot_activation act)
{
    return (c->transposed ? dot_conv_transpose : dot_conv)(x, weight, bias, &c->options, act);
}

/* A frozen batch normalisation with its running statistics is a factor and a shift of each channel: both go into the
   convolution, which is then one fused operation, and is what evaluation computes. */
static dot_tensor *nir_conv_frozen(const nir_conv *c, dot_tensor *x)
{
    dot_tensor *scale = dot_mul(c->gain, dot_pow_scalar(dot_add_scalar(c->var, 1e-5), -0.5));
    dot_tensor *mean = c->bias ? dot_sub(c->mean, c->bias) : c->mean;
    dot_tensor *shift = dot_sub(c->shift, dot_mul(mean, scale));
    const int64_t column[2] = { dot_tensor_dim(scale, 0), 1 };
    if (c->transposed) scale = dot_reshape(scale, 2, column);       /* its weight is [kernel..., out, in] */
    return nir_convolve(c, x, dot_mul(c->weight, scale), shift, c->relu ? DOT_RELU : DOT_NONE);
}

static dot_tensor *nir_conv_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    const nir_conv *c = (const nir_conv *)user;
    (void)layer;
    if (*c->frozen && c->mean) return nir_conv_frozen(c, x);
    dot_tensor *y = dot_forward(c->norm, nir_convolve(c, x, c->weight, c->bias, DOT_NONE));
    return c->relu ? dot_relu(y) : y;
}

typedef struct nir_conv_shape { int in, out, kernel, stride, padding; bool transposed, bias, relu; } nir_conv_shape;

static dot_layer *nir_conv_create(dot_context *ctx, const nir_autoencoder_options *o, const bool *frozen, nir_conv *c,
                                  nir_conv_shape s)
{
    c->options = dot_conv_defaults();
    c->options.kernel = s.kernel;
    c->options.stride = s.stride;
    c->options.padding = s.padding;
    c->options.bias = s.bias;
    c->transposed = s.transposed;
    c->relu = s.relu;
    c->frozen = frozen;
    c->layer = dot_nn_custom(ctx, "nir_conv", nir_conv_forward, c);
    dot_layer *conv = nir_child(c->layer, "conv", s.transposed ? dot_nn_conv_transpose3d(ctx, s.in, s.out, &c->options)
                                                               : dot_nn_conv3d(ctx, s.in, s.out, &c->options));
    c->norm = nir_child(c->layer, "norm", nir_norm_layer(ctx, o, s.out));
    c->weight = nir_tensor(conv, "weight");
    c->bias = nir_tensor(conv, "bias");
    c->gain = nir_tensor(c->norm, "weight");
    c->shift = nir_tensor(c->norm, "bias");
    c->mean = nir_tensor(c->norm, "running_mean");
    c->var = nir_tensor(c->norm, "running_var");
    return c->layer;
}

/* ---- stage 1: residual block, spatial attention -------------------------- */

/* conv 3^3, norm, ReLU, conv 3^3, norm; plus conv 1^3, norm of the input; ReLU. Then, optionally, the spatial attention. */
typedef struct nir_residual {
    dot_layer *layer;
    nir_conv first, second, skip;
    dot_layer *squeeze, *map;           /* attention, or NULL: conv 1^3 C -> C/8, ReLU, conv 1^3 -> 1, sigmoid */
} nir_residual;

static dot_tensor *nir_residual_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    nir_residual *b = (nir_residual *)user;
    (void)layer;
    dot_tensor *y = dot_forward(b->second.layer, dot_forward(b->first.layer, x));
    y = dot_relu(dot_add(y, dot_forward(b->skip.layer, x)));
    if (!b->map) return y;
    return dot_mul(y, dot_sigmoid(dot_forward(b->map, dot_relu(dot_forward(b->squeeze, y)))));
}

static dot_layer *nir_residual_create(dot_context *ctx, const nir_autoencoder_options *o, const bool *frozen, nir_residual *b, int in,
                                   int out, int stride, bool attention)
{
    b->layer = dot_nn_custom(ctx, "nir_residual", nir_residual_forward, b);
    const nir_conv_shape first = { in, out, 3, stride, 1, false, false, true }, second = { out, out, 3, 1, 1, false, false, false },
                         skip = { in, out, 1, stride, 0, false, false, false };
    nir_child(b->layer, "first", nir_conv_create(ctx, o, frozen, &b->first, first));
    nir_child(b->layer, "second", nir_conv_create(ctx, o, frozen, &b->second, second));
    nir_child(b->layer, "skip", nir_conv_create(ctx, o, frozen, &b->skip, skip));
    if (attention) {
        dot_conv_options point = dot_conv_defaults();
        point.kernel = 1;
        const int narrow = out / 8 > 0 ? out / 8 : 1;
        b->squeeze = nir_child(b->layer, "squeeze", dot_nn_conv3d(ctx, out, narrow, &point));
        b->map = nir_child(b->layer, "map", dot_nn_conv3d(ctx, narrow, 1, &point));
    }
    return b->layer;
}

/* ---- stage 1: the autoencoder -------------------------------------------- */

typedef struct nir_autoencoder {
    nir_autoencoder_options options;
    dot_layer *layer, *encoder, *decoder;   /* layer: both; of all three, dot_forward */
    bool frozen;                            /* nir_autoencoder_freeze */
    nir_conv stem, up[NIR_MAX_UPS];
    nir_residual block[NIR_MAX_STAGES];
    dot_layer *to_latent, *dropout, *expand, *output;
    dot_tensor *output_weight, *output_bias;
    dot_tensor *feature[NIR_MAX_STAGES];    /* what the stages gave in the latest encoding, in step memory */
} nir_autoencoder;

static dot_tensor *nir_encoder_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    nir_autoencoder *a = (nir_autoencoder *)user;
    dot_pool_options pool = dot_pool_defaults();
    (void)layer;
    pool.kernel = 3;
    pool.stride = 2;
    pool.padding = 1;
    x = dot_max_pool(dot_forward(a->stem.layer, x), &pool);
    for (int i = 0; i < a->options.stages; ++i) x = a->feature[i] = dot_forward(a->block[i].layer, x);
    if (!a->options.flatten) x = dot_mean(x, DOT_AXIS(1) | DOT_AXIS(2) | DOT_AXIS(3), false);
    return dot_forward(a->to_latent, dot_forward(a->dropout, x));
}

/* A convolution 3^3 to two channels, as the transposed convolution with the mirrored kernel: the same sums, in a third of the
   time, because the matrix product then has 54 columns and not 2. */
static dot_tensor *nir_conv_few(dot_tensor *x, dot_tensor *weight, dot_tensor *bias)
{
    enum { TAPS = 27 };
    const int64_t in = dot_tensor_dim(weight, 3), out = dot_tensor_dim(weight, 4), taps = TAPS;
    const int64_t rows[2] = { TAPS, in * out }, kernel[5] = { 3, 3, 3, in, out };
    static const int swap[5] = { 0, 1, 2, 4, 3 };
    int64_t mirror[TAPS];
    for (int i = 0; i < TAPS; ++i) mirror[i] = TAPS - 1 - i;
    dot_conv_options same = dot_conv_defaults();
    same.padding = 1;
    dot_tensor *order = dot_input(dot_tensor_context(x), DOT_I64, 1, &taps, mirror);
    dot_tensor *mirrored = dot_reshape(dot_embedding(dot_reshape(weight, 2, rows), order), 5, kernel);
    return dot_conv_transpose(x, dot_permute(mirrored, swap), bias, &same, DOT_NONE);
}

/* [N, D, H, W, 2 * 2 * 2 * C] -> [N, 2D, 2H, 2W, C] */
static dot_tensor *nir_subvoxels(dot_tensor *x)
{
    const int64_t n = dot_tensor_dim(x, 0), d = dot_tensor_dim(x, 1), h = dot_tensor_dim(x, 2), w = dot_tensor_dim(x, 3);
    const int64_t c = dot_tensor_dim(x, 4) / 8, split[8] = { n, d, h, w, 2, 2, 2, c }, joined[5] = { n, 2 * d, 2 * h, 2 * w, c };
    static const int order[8] = { 0, 1, 4, 2, 5, 3, 6, 7 };
    return dot_reshape(dot_permute(dot_reshape(x, 8, split), order), 5, joined);
}

static dot_tensor *nir_decoder_forward(void *user, dot_layer *layer, dot_tensor *latent)
{
    nir_autoencoder *a = (nir_autoencoder *)user;
    (void)layer;
    dot_tensor *x = dot_forward(a->expand, latent);
    for (int i = 0; i < a->options.ups; ++i) x = dot_forward(a->up[i].layer, x);
    if (a->options.subvoxel) return nir_subvoxels(dot_forward(a->output, x));
    return nir_conv_few(x, a->output_weight, a->output_bias);
}

static dot_tensor *nir_autoencoder_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    nir_autoencoder *a = (nir_autoencoder *)user;
    (void)layer;
    return dot_forward(a->decoder, dot_forward(a->encoder, x));
}

static void nir_encoder_create(dot_context *ctx, nir_autoencoder *a)
{
    const nir_autoencoder_options *o = &a->options;
    const nir_conv_shape stem = { 2, o->stem, o->stem_kernel, 2, o->stem_kernel / 2, false, false, true };
    a->encoder = nir_child(a->layer, "encoder", dot_nn_custom(ctx, "nir_encoder", nir_encoder_forward, a));
    nir_child(a->encoder, "stem", nir_conv_create(ctx, o, &a->frozen, &a->stem, stem));
    dot_layer *stages = nir_child(a->encoder, "stages", dot_nn_custom(ctx, "list", nir_encoder_forward, a));
    for (int i = 0, in = o->stem; i < o->stages; in = o->width[i++]) {
        const char name[2] = { (char)('0' + i), 0 };
        nir_child(stages, name, nir_residual_create(ctx, o, &a->frozen, &a->block[i], in, o->width[i], i ? 2 : 1,
                                                 i >= o->stages - o->attention));
    }
    a->dropout = nir_child(a->encoder, "dropout", dot_nn_dropout(ctx, o->dropout));
    const int deepest = o->width[o->stages - 1], side = o->n >> (o->stages + 1);
    a->to_latent = nir_child(a->encoder, "to_latent",
        !o->flatten ? dot_nn_linear(ctx, deepest, o->latent)
                    : dot_nn_sequential(ctx, dot_nn_flatten(ctx), dot_nn_linear(ctx, (int64_t)side * side * side * deepest, o->latent), NULL));
}

static void nir_decoder_create(dot_context *ctx, nir_autoencoder *a)
{
    const nir_autoencoder_options *o = &a->options;
    const int deepest = o->width[o->stages - 1];
    a->decoder = nir_child(a->layer, "decoder", dot_nn_custom(ctx, "nir_decoder", nir_decoder_forward, a));
    a->expand = nir_child(a->decoder, "expand", dot_nn_sequential(ctx, dot_nn_linear(ctx, o->latent, 8 * deepest),
                                                                  dot_nn_unflatten(ctx, 2, 2, 2, deepest), NULL));
    dot_layer *ups = nir_child(a->decoder, "ups", dot_nn_custom(ctx, "list", nir_decoder_forward, a));
    for (int i = 0, in = deepest; i < o->ups; in = o->up_width[i++]) {
        const char name[2] = { (char)('0' + i), 0 };
        const nir_conv_shape up = { in, o->up_width[i], 4, 2, 1, true, true, true };
        nir_child(ups, name, nir_conv_create(ctx, o, &a->frozen, &a->up[i], up));
    }
    dot_conv_options same = dot_conv_defaults();
    same.padding = 1;
    a->output = nir_child(a->decoder, "output", dot_nn_conv3d(ctx, o->up_width[o->ups - 1], o->subvoxel ? 16 : 2, &same));
    a->output_weight = nir_tensor(a->output, "weight");
    a->output_bias = nir_tensor(a->output, "bias");
}

/* What is wrong with the sizes, or NULL. */
static const char *nir_autoencoder_invalid(const nir_autoencoder_options *o)
{
    if (o->stages < 1 || o->stages > NIR_MAX_STAGES) return "stages: expected 1 to 4";
    if (o->ups < 1 || o->ups > NIR_MAX_UPS || o->n != 2 << (o->ups + o->subvoxel))
        return "n: expected 2^(ups + 1), with subvoxel 2^(ups + 2), ups 1 to 6";
    if (o->flatten && o->n >> (o->stages + 1) < 1) return "stages: with flatten, expected n of at least 2^(stages + 1)";
    if (o->stem < 1 || o->stem_kernel < 1 || o->stem_kernel % 2 == 0) return "stem: expected channels, and an odd kernel";
    if (o->latent < 1 || o->groups < 1) return "latent, groups: expected 1 or more";
    if (o->attention < 0 || o->attention > o->stages) return "attention: expected 0 to the number of stages";
    if (!(o->dropout >= 0 && o->dropout < 1)) return "dropout: expected 0 <= p < 1";
    for (int i = 0; i < o->stages; ++i)
        if (o->width[i] < 1) return "width: expected 1 or more channels";
    for (int i = 0; i < o->ups; ++i)
        if (o->up_width[i] < 1) return "up_width: expected 1 or more channels";
    return NULL;
}

/* NULL after an error, which stands in the context, or on stderr when the sizes are wrong. Free it after the context. */
NIR_UNUSED static nir_autoencoder *nir_autoencoder_create(dot_context *ctx, const nir_autoencoder_options *options)
{
    const char *wrong = nir_autoencoder_invalid(options);
    if (wrong) return fprintf(stderr, "nir_autoencoder_create: %s\n", wrong), (nir_autoencoder *)NULL;
    nir_autoencoder *a = (nir_autoencoder *)calloc(1, sizeof *a);
    if (!a) return NULL;
    a->options = *options;
    a->layer = dot_nn_custom(ctx, "nir_autoencoder", nir_autoencoder_forward, a);
    nir_encoder_create(ctx, a);
    nir_decoder_create(ctx, a);
    nir_init(a->layer);
    if (dot_ok(ctx)) return a;
    free(a);
    return NULL;
}

NIR_UNUSED static dot_tensor *nir_encode(nir_autoencoder *a, dot_tensor *volume) { return dot_forward(a->encoder, volume); }
NIR_UNUSED static dot_tensor *nir_decode(nir_autoencoder *a, dot_tensor *latent) { return dot_forward(a->decoder, latent); }

/* Frozen: no gradients for its parameters, and batch normalisation uses its running statistics in training steps too. */
NIR_UNUSED static void nir_autoencoder_freeze(nir_autoencoder *a, bool on)
{
    a->frozen = on;
    nir_set_trainable(a->layer, !on);
}

/* ---- stage 2: attention --------------------------------------------------- */

/* One encoder layer, with the parameters of torch.nn.TransformerEncoderLayer (GELU). */
typedef struct nir_attention_layer {
    dot_layer *layer, *out_proj, *linear1, *linear2, *norm1, *norm2, *dropout;
    dot_tensor *in_proj_weight, *in_proj_bias;      /* [3 width, width], [3 width]: queries, keys, values */
} nir_attention_layer;

typedef struct nir_transformer {
    nir_transformer_options options;
    dot_layer *layer;                   /* its parameters; not for dot_forward */
    dot_layer *signal, *position, *token, *context, *project, *norm, *key, *value, *pool, *head, *dropout;
    dot_tensor *token_type, *query;     /* token-type embedding [width], pooling queries [queries, width] */
    nir_attention_layer *layers;
    nir_autoencoder *image;             /* its encoder; NULL without */
    dot_tensor *pooling;                /* softmax of the pooling queries over the tokens [N, T, queries], of the latest pass */
} nir_transformer;

/* Multi-head self-attention over x [N, T, width]; mask [N, 1, 1, T] is added to the scores, or NULL. */
static dot_tensor *nir_self_attention(const nir_transformer *t, const nir_attention_layer *l, dot_tensor *x, dot_tensor *mask)
{
    const int64_t n = dot_tensor_dim(x, 0), tokens = dot_tensor_dim(x, 1), width = t->options.width, heads = t->options.heads;
    const int64_t split[5] = { n, tokens, 3, heads, width / heads }, each[4] = { n, heads, tokens, width / heads };
    const int64_t joined[3] = { n, tokens, width };
    static const int swap[2] = { 1, 0 }, heads_first[5] = { 2, 0, 3, 1, 4 }, last_two[4] = { 0, 1, 3, 2 }, tokens_first[4] = { 0, 2, 1, 3 };
    dot_tensor *all = dot_linear(x, dot_permute(l->in_proj_weight, swap), l->in_proj_bias, DOT_NONE), *part[3];
    all = dot_permute(dot_reshape(all, 5, split), heads_first);
    for (int i = 0; i < 3; ++i) part[i] = dot_reshape(dot_slice(all, 0, i, i + 1), 4, each);
    dot_tensor *scores = dot_matmul(dot_mul_scalar(part[0], 1 / sqrt((double)(width / heads))), dot_permute(part[1], last_two));
    if (mask) scores = dot_add(scores, mask);
    scores = dot_dropout(dot_softmax(scores, -1), t->options.dropout);
    dot_tensor *mixed = dot_permute(dot_matmul(scores, part[2]), tokens_first);
    return dot_forward(l->out_proj, dot_reshape(mixed, 3, joined));
}

static dot_tensor *nir_feed_forward(const nir_transformer *t, const nir_attention_layer *l, dot_tensor *x)
{
    const double p = t->options.dropout;
    return dot_dropout(dot_forward(l->linear2, dot_dropout(dot_gelu(dot_forward(l->linear1, x)), p)), p);
}

static dot_tensor *nir_attention_forward(const nir_transformer *t, const nir_attention_layer *l, dot_tensor *x, dot_tensor *mask)
{
    const double p = t->options.dropout;
    if (t->options.pre_norm) {
        x = dot_add(x, dot_dropout(nir_self_attention(t, l, dot_forward(l->norm1, x), mask), p));
        return dot_add(x, nir_feed_forward(t, l, dot_forward(l->norm2, x)));
    }
    x = dot_forward(l->norm1, dot_add(x, dot_dropout(nir_self_attention(t, l, x, mask), p)));
    return dot_forward(l->norm2, dot_add(x, nir_feed_forward(t, l, x)));
}

static dot_tensor *nir_no_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user;
    (void)layer;
    return x;
}

static dot_layer *nir_attention_create(dot_context *ctx, const nir_transformer_options *o, nir_attention_layer *l)
{
    const int64_t shape[2] = { 3 * o->width, o->width };
    l->layer = dot_nn_custom(ctx, "nir_attention_layer", nir_no_forward, NULL);
    dot_layer *attention = nir_child(l->layer, "self_attn", dot_nn_custom(ctx, "nir_attention", nir_no_forward, NULL));
    l->in_proj_weight = dot_layer_add_parameter(attention, "in_proj_weight", DOT_KIND_WEIGHT, 2, shape);
    l->in_proj_bias = dot_layer_add_parameter(attention, "in_proj_bias", DOT_KIND_BIAS, 1, shape);
    l->out_proj = nir_child(attention, "out_proj", dot_nn_linear(ctx, o->width, o->width));
    l->linear1 = nir_child(l->layer, "linear1", dot_nn_linear(ctx, o->width, o->feed_forward));
    l->linear2 = nir_child(l->layer, "linear2", dot_nn_linear(ctx, o->feed_forward, o->width));
    l->norm1 = nir_child(l->layer, "norm1", dot_nn_layer_norm(ctx, o->width));
    l->norm2 = nir_child(l->layer, "norm2", dot_nn_layer_norm(ctx, o->width));
    return l->layer;
}

/* ---- stage 2: the transformer --------------------------------------------- */

/* Linear, GELU, LayerNorm, twice. */
static dot_layer *nir_branch(dot_context *ctx, int in, int hidden, int out)
{
    return dot_nn_sequential(ctx, dot_nn_linear(ctx, in, hidden), dot_nn_gelu(ctx), dot_nn_layer_norm(ctx, hidden),
                             dot_nn_linear(ctx, hidden, out), dot_nn_gelu(ctx), dot_nn_layer_norm(ctx, out), NULL);
}

enum { NIR_SIGNAL_HIDDEN = 16, NIR_SIGNAL_OUT = 32, NIR_POSITION_HIDDEN = 32, NIR_POSITION_OUT = 64 };

static void nir_tokens_create(dot_context *ctx, nir_transformer *t)
{
    const nir_transformer_options *o = &t->options;
    const int64_t width = o->width;
    t->signal = nir_child(t->layer, "signal", nir_branch(ctx, o->signal, NIR_SIGNAL_HIDDEN, NIR_SIGNAL_OUT));
    t->position = nir_child(t->layer, "position", nir_branch(ctx, o->position, NIR_POSITION_HIDDEN, NIR_POSITION_OUT));
    t->token = nir_child(t->layer, "token", dot_nn_sequential(ctx,
        dot_nn_linear(ctx, NIR_SIGNAL_OUT + NIR_POSITION_OUT, o->fuse), dot_nn_gelu(ctx), dot_nn_layer_norm(ctx, o->fuse),
        dot_nn_linear(ctx, o->fuse, o->width), dot_nn_dropout(ctx, o->input_dropout), NULL));
    t->project = nir_child(t->layer, "project", dot_nn_linear(ctx, o->width, o->width));
    if (o->context) t->context = nir_child(t->layer, "context", dot_nn_linear(ctx, o->context, o->width));
    t->token_type = dot_layer_add_parameter(t->layer, "token_type", DOT_KIND_EMBEDDING, 1, &width);
}

static void nir_pooling_create(dot_context *ctx, nir_transformer *t)
{
    const nir_transformer_options *o = &t->options;
    const int64_t shape[2] = { o->queries, o->width };
    if (o->queries) {
        t->query = dot_layer_add_parameter(t->layer, "query", DOT_KIND_EMBEDDING, 2, shape);
        t->key = nir_child(t->layer, "key", dot_nn_linear(ctx, o->width, o->width));
        t->value = nir_child(t->layer, "value", dot_nn_linear(ctx, o->width, o->width));
        t->pool = nir_child(t->layer, "pool", dot_nn_linear(ctx, (int64_t)o->queries * o->width, o->width));
    }
    t->head = nir_child(t->layer, "head", dot_nn_sequential(ctx, dot_nn_linear(ctx, o->width, o->head), dot_nn_relu(ctx),
                                                            dot_nn_linear(ctx, o->head, o->latent), NULL));
}

static const char *nir_transformer_invalid(const nir_transformer_options *o)
{
    if (o->signal < 1 || o->position < 1 || o->context < 0) return "signal, position: expected 1 feature or more";
    if (o->layers < 0 || o->layers > 99) return "layers: expected 0 to 99";
    if (o->heads < 1 || o->width < 1 || o->width % o->heads) return "width: expected a multiple of heads";
    if (o->feed_forward < 1 || o->fuse < 1 || o->head < 1 || o->latent < 1) return "feed_forward, fuse, head, latent: expected 1 or more";
    if (o->queries < 0) return "queries: expected 0 or more";
    if (!(o->dropout >= 0 && o->dropout < 1 && o->input_dropout >= 0 && o->input_dropout < 1)) return "dropout: expected 0 <= p < 1";
    return NULL;
}

/* The encoder alone of an autoencoder. */
static nir_autoencoder *nir_image_encoder_create(dot_context *ctx, const nir_autoencoder_options *options, int latent)
{
    nir_autoencoder *a = (nir_autoencoder *)calloc(1, sizeof *a);
    if (!a) return NULL;
    a->options = *options;
    a->options.latent = latent;
    a->layer = dot_nn_custom(ctx, "nir_image", nir_encoder_forward, a);
    nir_encoder_create(ctx, a);
    return a;
}

/* `image`: the sizes of the encoder where the options have one, else NULL. Free with nir_transformer_free, after the context. */
NIR_UNUSED static nir_transformer *nir_transformer_create(dot_context *ctx, const nir_transformer_options *options,
                                                          const nir_autoencoder_options *image)
{
    const char *wrong = nir_transformer_invalid(options);
    if (!wrong && options->image) wrong = image ? nir_autoencoder_invalid(image) : "image: expected the encoder's sizes";
    if (wrong) return fprintf(stderr, "nir_transformer_create: %s\n", wrong), (nir_transformer *)NULL;
    nir_transformer *t = (nir_transformer *)calloc(1, sizeof *t);
    if (t) t->layers = (nir_attention_layer *)calloc((size_t)options->layers + 1, sizeof *t->layers);
    if (!t || !t->layers) return free(t), (nir_transformer *)NULL;
    t->options = *options;
    t->layer = dot_nn_custom(ctx, "nir_transformer", nir_no_forward, NULL);
    nir_tokens_create(ctx, t);
    dot_layer *encoder = nir_child(t->layer, "encoder", dot_nn_custom(ctx, "nir_encoder", nir_no_forward, NULL));
    dot_layer *list = nir_child(encoder, "layers", dot_nn_custom(ctx, "list", nir_no_forward, NULL));
    for (int i = 0; i < options->layers; ++i) {
        char name[16];
        snprintf(name, sizeof name, "%d", i);
        nir_child(list, name, nir_attention_create(ctx, options, &t->layers[i]));
    }
    t->norm = nir_child(encoder, "norm", dot_nn_layer_norm(ctx, options->width));
    nir_pooling_create(ctx, t);
    if (options->image && (t->image = nir_image_encoder_create(ctx, image, options->latent)) != NULL)
        nir_child(t->layer, "image", t->image->layer);
    nir_init(t->layer);
    if (t->query) dot_parameter_init(t->layer, "query", DOT_INIT_XAVIER_NORMAL, 1);
    if (dot_ok(ctx) && (t->image || !options->image)) return t;
    free(t->image);
    free(t->layers);
    free(t);
    return NULL;
}

NIR_UNUSED static void nir_transformer_free(nir_transformer *t)
{
    if (t) free(t->layers);
    if (t) free(t->image);
    free(t);
}

/* What stage 2 sees: all in step memory. `mask` [N, T] is added to attention scores: 0 for a token, NIR_NO_TOKEN for padding;
   NULL when every token counts. `context` [N, context] and `image` [N, D, H, W, 2] where the options ask for them. */
typedef struct nir_tokens { dot_tensor *signal, *position, *mask, *context, *image; } nir_tokens;
#define NIR_NO_TOKEN (-1e9f)

/* The learned queries' weighted means of the tokens x [N, T, width] -> [N, width]. */
static dot_tensor *nir_pool(nir_transformer *t, dot_tensor *x, dot_tensor *mask)
{
    const nir_transformer_options *o = &t->options;
    const int64_t n = dot_tensor_dim(x, 0), tokens = dot_tensor_dim(x, 1);
    const int64_t column[3] = { n, tokens, 1 }, joined[2] = { n, (int64_t)(o->queries ? o->queries : 1) * o->width };
    static const int swap[2] = { 1, 0 }, last_two[3] = { 0, 2, 1 };
    dot_tensor *scores;
    if (o->queries) {
        scores = dot_mul_scalar(dot_matmul(dot_forward(t->key, x), dot_permute(t->query, swap)), 1 / sqrt((double)o->width));
    } else {
        scores = dot_mul_scalar(dot_slice(x, 2, 0, 1), 0);
    }
    if (mask) scores = dot_add(scores, dot_reshape(mask, 3, column));
    t->pooling = dot_softmax(scores, 1);
    dot_tensor *mean = dot_matmul(dot_permute(t->pooling, last_two), o->queries ? dot_forward(t->value, x) : x);
    mean = dot_reshape(mean, 2, joined);
    return o->queries ? dot_forward(t->pool, mean) : mean;
}

/* The latent [N, latent] of the measurements. */
NIR_UNUSED static dot_tensor *nir_transformer_forward(nir_transformer *t, const nir_tokens *in)
{
    const int64_t n = dot_tensor_dim(in->signal, 0), tokens = dot_tensor_dim(in->signal, 1);
    const int64_t scores[4] = { n, 1, 1, tokens }, row[3] = { n, 1, t->options.width };
    dot_tensor *branch[2] = { dot_forward(t->signal, in->signal), dot_forward(t->position, in->position) };
    dot_tensor *x = dot_add(dot_forward(t->project, dot_forward(t->token, dot_concat(branch, 2, 2))), t->token_type);
    if (t->context) x = dot_add(x, dot_reshape(dot_forward(t->context, in->context), 3, row));
    dot_tensor *mask = in->mask ? dot_reshape(in->mask, 4, scores) : NULL;
    for (int i = 0; i < t->options.layers; ++i) x = nir_attention_forward(t, &t->layers[i], x, mask);
    dot_tensor *latent = dot_forward(t->head, nir_pool(t, dot_forward(t->norm, x), in->mask));
    return t->image ? dot_add(latent, dot_forward(t->image->encoder, in->image)) : latent;
}

/* ---- losses --------------------------------------------------------------- */

/* Sum over the two channels c of importance[c] sqrt(sum w (p - y)^2 / sum w), over all voxels of the batch; prediction and truth
   [N, D, H, W, 2], weight w [N, D, H, W, 1]: 0 in air. */
NIR_UNUSED static dot_tensor *nir_rmse_loss(dot_tensor *prediction, dot_tensor *truth, dot_tensor *weight, const double importance[2])
{
    const unsigned voxels = DOT_AXIS(0) | DOT_AXIS(1) | DOT_AXIS(2) | DOT_AXIS(3);
    dot_tensor *squares = dot_sum(dot_mul(dot_square(dot_sub(prediction, truth)), weight), voxels, false);
    dot_tensor *mean = dot_div(squares, dot_add_scalar(dot_sum(weight, DOT_ALL_AXES, false), 1e-12));
    dot_tensor *rmse = dot_sqrt(dot_add_scalar(mean, 1e-12));       /* the root's slope stays finite at 0 */
    dot_tensor *a = dot_mul_scalar(dot_slice(rmse, 0, 0, 1), importance[0]);
    return dot_sum(dot_add(a, dot_mul_scalar(dot_slice(rmse, 0, 1, 2), importance[1])), DOT_ALL_AXES, false);
}

#endif
