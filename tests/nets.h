/* nets.h - networks, pictures and small tools that several test programs share.
   Include it after dotopt.h and the C library's headers. */
#ifndef DOTOPT_TESTS_NETS_H
#define DOTOPT_TESTS_NETS_H

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#if defined(__GNUC__)
#define UNUSED __attribute__((unused))
#else
#define UNUSED
#endif

enum { PICTURE_SIDE = 28, PICTURE_BYTES = PICTURE_SIDE * PICTURE_SIDE, PICTURE_CLASSES = 10 };

/* Set DOTOPT_TEST_QUICK for slow surroundings (sanitizers, emulators): the same checks on less data. */
UNUSED static bool quick(void)
{
    return getenv("DOTOPT_TEST_QUICK") != NULL;
}

/* A rule that the library does not have, for DOT_CUSTOM: the sign of the momentum, and a count of the steps as second state. */
UNUSED static void update_by_sign(void *user, const dot_rule_range *r)
{
    (void)user;
    for (int64_t i = 0; i < r->count; ++i) {
        bool wide = r->dtype == DOT_F64;
        double theta = wide ? ((double *)r->theta)[i] : (double)((float *)r->theta)[i];
        double g = wide ? ((const double *)r->gradient)[i] : (double)((const float *)r->gradient)[i];
        double m = wide ? ((double *)r->state[0])[i] : (double)((float *)r->state[0])[i];
        g = g * r->gradient_scale + r->l2 * theta;
        m = 0.9 * m + 0.1 * g;
        theta = r->keep * theta - r->lr * (m > 0 ? 1 : m < 0 ? -1 : 0);
        if (wide) {
            ((double *)r->theta)[i] = theta;
            ((double *)r->state[0])[i] = m;
            ((double *)r->state[1])[i] += 1;
        } else {
            ((float *)r->theta)[i] = (float)theta;
            ((float *)r->state[0])[i] = (float)m;
            ((float *)r->state[1])[i] += 1;
        }
    }
}

/* An algorithm's defaults, with that rule where it is DOT_CUSTOM. */
UNUSED static dot_optimizer_options optimizer_defaults(dot_algorithm algorithm)
{
    static const dot_rule by_sign = { "sign-of-momentum", 2, update_by_sign, NULL };
    dot_optimizer_options o = dot_optimizer_defaults(algorithm);
    if (algorithm == DOT_CUSTOM)
        o.rule = &by_sign;
    return o;
}

/* The algorithms of a test that goes through them: the first few, and one of each other way to be computed (all of them take too long).
   Shampoo, SOAP, PSGD and GaLore have a test of their own in test_optimizers.c: their matrices take seconds a step on these nets. */
UNUSED static int next_algorithm(int a)
{
    static const int some[] = { DOT_RPROP, DOT_ADAN, DOT_LAMB, DOT_PRODIGY, DOT_SCHEDULE_FREE_ADAMW, DOT_CUSTOM };
    if (a < DOT_ADAMW_FACTORED)
        return a + 1;
    for (int i = 0; i < (int)(sizeof some / sizeof *some); ++i)
        if (some[i] > a)
            return some[i];
    return DOT_ALGORITHMS;
}

UNUSED static const char *scratch_folder(void)
{
    const char *folder = getenv("TMPDIR");
    return folder ? folder : "/tmp";
}

/* A file's path in the folder for temporary files, different for every process; four paths live at once. */
UNUSED static const char *scratch_path(const char *name)
{
    static char paths[4][512];
    static int turn;
    char *path = paths[turn++ % 4];
    snprintf(path, sizeof paths[0], "%s/dotopt_test_%ld_%s", scratch_folder(), (long)getpid(), name);
    return path;
}

/* This process's files that still lie there; -1: the folder cannot be read. */
UNUSED static int scratch_files(void)
{
    char prefix[64];
    int count = 0;
    DIR *folder = opendir(scratch_folder());
    snprintf(prefix, sizeof prefix, "dotopt_test_%ld_", (long)getpid());
    if (!folder)
        return -1;
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;)
        count += strstr(entry->d_name, prefix) != NULL;
    closedir(folder);
    return count;
}

/* Bright bars, whose place is the label, on noise: enough structure to learn something in a few steps. */
UNUSED static void draw_pictures(uint8_t *records, uint8_t *labels, int count)
{
    uint32_t state = 12345;
    for (int i = 0; i < count; ++i) {
        labels[i] = (uint8_t)(i * 7 % PICTURE_CLASSES);
        for (int p = 0; p < PICTURE_BYTES; ++p) {
            int row = p / PICTURE_SIDE, column = p % PICTURE_SIDE;
            bool bar = row / 3 == labels[i] || column / 3 == labels[i];
            state = state * 1664525u + 1013904223u;
            records[i * PICTURE_BYTES + p] = (uint8_t)((state >> 27) + (bar ? 200u : 0u));
        }
    }
}

/* The convolutional autoencoder of the manual, with its numbers of channels as arguments (32, 64, 128 there). */
UNUSED static dot_layer *build_autoencoder(dot_context *ctx, int narrow, int wide, int code)
{
    dot_conv_options half = dot_conv_defaults();
    half.kernel = 3;
    half.stride = 2;
    half.padding = 1;
    half.output_padding = 1;
    return dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, narrow, &half), dot_nn_relu(ctx),
        dot_nn_conv2d(ctx, narrow, wide, &half), dot_nn_relu(ctx),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, wide * 7 * 7, code),
        dot_nn_linear(ctx, code, wide * 7 * 7), dot_nn_unflatten(ctx, 0, 7, 7, wide),
        dot_nn_conv_transpose2d(ctx, wide, narrow, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, narrow, 1, &half), dot_nn_sigmoid(ctx), NULL);
}

/* A classifier with all that depends on more than one element or on chance: dropout and two normalisations. */
UNUSED static dot_layer *build_classifier(dot_context *ctx, int width)
{
    return dot_nn_sequential(ctx,
        dot_nn_flatten(ctx), dot_nn_linear(ctx, PICTURE_BYTES, width),
        dot_nn_batch_norm(ctx, width), dot_nn_relu(ctx), dot_nn_dropout(ctx, 0.3),
        dot_nn_linear(ctx, width, width / 2), dot_nn_layer_norm(ctx, width / 2), dot_nn_gelu(ctx),
        dot_nn_dropout(ctx, 0.2), dot_nn_linear(ctx, width / 2, PICTURE_CLASSES), NULL);
}

/* A network with every kind of layer, from tokens [N, ZOO_TOKENS] to logits [N, ZOO_CLASSES]. */
enum { ZOO_TOKENS = 8, ZOO_WORDS = 11, ZOO_FEATURES = 32, ZOO_CLASSES = 5 };

typedef struct zoo_scale { dot_tensor *weight; } zoo_scale;     /* the state of its custom layer */

UNUSED static dot_tensor *zoo_scale_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    zoo_scale *scale = (zoo_scale *)user;
    (void)layer;
    return dot_mul(x, scale->weight);
}

UNUSED static dot_layer *build_zoo(dot_context *ctx, zoo_scale *scale)
{
    const int64_t features = ZOO_FEATURES;
    dot_conv_options same = dot_conv_defaults(), twice = dot_conv_defaults();
    same.padding = 1;
    twice.stride = 2;
    twice.padding = 1;
    twice.output_padding = 1;

    dot_layer *custom = dot_nn_custom(ctx, "scale", zoo_scale_forward, scale);
    scale->weight = dot_layer_add_parameter(custom, "weight", DOT_KIND_NORM, 1, &features);
    dot_parameter_init(custom, "weight", DOT_INIT_ONES, 1.0);

    dot_layer *sequence = dot_nn_sequential(ctx,                            /* [N, 8] tokens */
        dot_nn_embedding(ctx, ZOO_WORDS, 6), dot_nn_conv1d(ctx, 6, 8, &same),
        dot_nn_group_norm(ctx, 2, 8), dot_nn_gelu(ctx), dot_nn_multihead_attention(ctx, 8, 2),
        dot_nn_conv_transpose1d(ctx, 8, 4, &twice), dot_nn_relu(ctx),       /* [N, 16, 4] */
        dot_nn_max_pool(ctx, NULL), dot_nn_flatten(ctx),                    /* [N, 32] */
        dot_nn_linear(ctx, 32, 32), dot_nn_batch_norm(ctx, 32), dot_nn_leaky_relu(ctx, 0.01), NULL);
    dot_layer *image = dot_nn_sequential(ctx,
        dot_nn_unflatten(ctx, 0, 4, 4, 2), dot_nn_conv2d(ctx, 2, 4, &same),
        dot_nn_batch_norm(ctx, 4), dot_nn_silu(ctx), dot_nn_avg_pool(ctx, NULL), dot_nn_adaptive_max_pool(ctx, 0, 2, 2),
        dot_nn_conv_transpose2d(ctx, 4, 2, &twice), dot_nn_sigmoid(ctx),    /* [N, 4, 4, 2] */
        dot_nn_flatten(ctx), dot_nn_linear_no_bias(ctx, 32, 32), dot_nn_tanh(ctx), NULL);
    dot_layer *volume = dot_nn_sequential(ctx,
        dot_nn_unflatten(ctx, 2, 4, 4, 1), dot_nn_conv3d(ctx, 1, 2, &same), dot_nn_softplus(ctx),
        dot_nn_max_pool(ctx, NULL), dot_nn_conv_transpose3d(ctx, 2, 1, &twice),     /* [N, 2, 4, 4, 1] */
        dot_nn_flatten(ctx), dot_nn_layer_norm(ctx, ZOO_FEATURES), dot_nn_dropout(ctx, 0.2), NULL);
    return dot_nn_sequential(ctx, sequence, image, volume, custom,
                             dot_nn_linear(ctx, ZOO_FEATURES, ZOO_CLASSES), NULL);
}

/* The zoo's loss on `batch` made-up sentences. */
UNUSED static dot_tensor *zoo_loss(dot_context *ctx, dot_layer *net, int64_t batch)
{
    int64_t tokens[64 * ZOO_TOKENS], labels[64];
    int64_t shape[2] = { batch, ZOO_TOKENS };
    for (int64_t i = 0; i < batch * ZOO_TOKENS; ++i)
        tokens[i] = i * i % ZOO_WORDS;
    for (int64_t i = 0; i < batch; ++i)
        labels[i] = i * 3 % ZOO_CLASSES;
    dot_tensor *x = dot_input(ctx, DOT_I64, 2, shape, tokens);
    dot_tensor *y = dot_input(ctx, DOT_I64, 1, shape, labels);
    return dot_cross_entropy_loss(dot_forward(net, x), y, 0.1);
}

/* All parameters and buffers of one lane, one after the other (or their gradients); the caller frees them. */
typedef enum snapshot_of { VALUES, TRAINABLE_VALUES, GRADIENTS } snapshot_of;

UNUSED static double *snapshot(dot_layer *net, int lane, snapshot_of what, int64_t *count)
{
    dot_parameter_info info;
    int n = dot_layer_parameters(net);
    double *values = NULL;
    *count = 0;
    for (int i = 0; i < n; ++i) {
        if (!dot_layer_parameter(net, i, &info)) {
            free(values);
            return NULL;
        }
        if (what != VALUES && info.kind == DOT_KIND_BUFFER)
            continue;
        int64_t size = dot_tensor_size(info.tensor);
        double *grown = (double *)realloc(values, (size_t)(*count + size) * sizeof *values);
        if (!grown) {
            free(values);
            return NULL;
        }
        values = grown;
        bool done = what == GRADIENTS ? dot_parameter_grad(net, info.name, lane, values + *count, size)
                                      : dot_parameter_get(net, info.name, lane, values + *count, size);
        if (!done) {
            free(values);
            return NULL;
        }
        *count += size;
    }
    return values;
}

/* A whole file; NULL when there is none. The caller frees it. */
UNUSED static unsigned char *read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    *bytes = 0;
    if (!file)
        return NULL;
    long end = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    unsigned char *content = end < 0 ? NULL : (unsigned char *)malloc((size_t)end + 1);
    rewind(file);
    if (content)
        *bytes = fread(content, 1, (size_t)end, file);
    fclose(file);
    return content;
}

UNUSED static bool write_file(const char *path, const void *content, size_t bytes)
{
    FILE *file = fopen(path, "wb");
    if (!file)
        return false;
    bool written = fwrite(content, 1, bytes, file) == bytes;
    return fclose(file) == 0 && written;
}

#endif
