/* The operations and losses, forward and backward: against PyTorch's numbers (tests/golden/ops_*.safetensors; the
   cases are listed in make_ops.py there) and against finite differences. Run from the repository's root; an argument
   selects tests by name, e.g. `test_ops 'conv2d*'`. */
#include "dotopt.h"

#include <float.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define COUNT(a) ((int)(sizeof(a) / sizeof (a)[0]))

enum { SLOTS = 6 };     /* arguments of an operation, at most */

/* ---- parameters: "op=conv stride=2,2 act=relu" ------------------------------------------------------------------- */

static const char *find(const char *text, const char *key)
{
    size_t length = strlen(key);
    for (const char *p = text; p; p = strchr(p, ' ')) {
        p += *p == ' ';
        if (!strncmp(p, key, length) && p[length] == '=')
            return p + length + 1;
    }
    return NULL;
}

static bool is(const char *text, const char *key, const char *value)
{
    const char *p = find(text, key);
    size_t length = strlen(value);
    return p && !strncmp(p, value, length) && (p[length] == ' ' || p[length] == 0);
}

static double number(const char *text, const char *key, double otherwise)
{
    const char *p = find(text, key);
    return p ? strtod(p, NULL) : otherwise;
}

static int integer(const char *text, const char *key, int otherwise)
{
    return (int)number(text, key, otherwise);
}

/* The integers of "key=2,3,1"; returns how many. */
static int integers(const char *text, const char *key, int64_t *values)
{
    const char *p = find(text, key);
    int count = 0;
    while (p && *p && *p != ' ' && count < DOT_MAX_RANK) {
        char *end;
        values[count++] = (int64_t)strtoll(p, &end, 10);
        p = *end == ',' ? end + 1 : end;
    }
    return count;
}

/* One number: for all axes; several: one an axis. */
static void set_sizes(const char *text, const char *key, int *all, int each[3])
{
    int64_t values[DOT_MAX_RANK];
    int count = integers(text, key, values);
    if (count == 1)
        *all = (int)values[0];
    for (int i = 0; count > 1 && i < count && i < 3; ++i)
        each[i] = (int)values[i];
}

static unsigned axis_set(const char *text)
{
    int64_t axes[DOT_MAX_RANK];
    unsigned set = is(text, "axes", "all") ? DOT_ALL_AXES : 0;
    if (!set)
        for (int i = integers(text, "axes", axes) - 1; i >= 0; --i)
            set |= DOT_AXIS(axes[i]);
    return set;
}

static dot_activation activation(const char *text)
{
    static const char *const names[] = { "none", "relu", "sigmoid", "tanh" };
    static const dot_activation values[] = { DOT_NONE, DOT_RELU, DOT_SIGMOID, DOT_TANH };
    for (int i = 0; i < COUNT(names); ++i)
        if (is(text, "act", names[i]))
            return values[i];
    return DOT_NONE;
}

/* ---- operations: one row each ------------------------------------------------------------------------------------ */

#define BUILD(name, expression) \
    static dot_tensor *build_##name(const char *p, dot_tensor **in) { (void)p; return expression; }

BUILD(add_scalar, dot_add_scalar(in[0], number(p, "c", 0)))
BUILD(mul_scalar, dot_mul_scalar(in[0], number(p, "c", 0)))
BUILD(pow_scalar, dot_pow_scalar(in[0], number(p, "c", 0)))
BUILD(leaky_relu, dot_leaky_relu(in[0], number(p, "slope", 0.01)))
BUILD(softplus, dot_softplus(in[0], number(p, "beta", 1), number(p, "threshold", 20)))
BUILD(sum, dot_sum(in[0], axis_set(p), integer(p, "keep", 0) != 0))
BUILD(mean, dot_mean(in[0], axis_set(p), integer(p, "keep", 0) != 0))
BUILD(max, dot_max(in[0], axis_set(p), integer(p, "keep", 0) != 0))
BUILD(min, dot_min(in[0], axis_set(p), integer(p, "keep", 0) != 0))
BUILD(linear, dot_linear(in[0], in[1], in[2], activation(p)))
BUILD(softmax, dot_softmax(in[0], integer(p, "axis", 0)))
BUILD(log_softmax, dot_log_softmax(in[0], integer(p, "axis", 0)))
BUILD(dropout, dot_dropout(in[0], number(p, "p", 0.5)))
BUILD(layer_norm, dot_layer_norm(in[0], integer(p, "axes", 1), in[1], in[2], number(p, "eps", 1e-5)))
BUILD(group_norm, dot_group_norm(in[0], integer(p, "groups", 1), in[1], in[2], number(p, "eps", 1e-5)))
BUILD(batch_norm, dot_batch_norm(in[0], in[1], in[2], in[3], in[4], number(p, "momentum", 0.1), number(p, "eps", 1e-5)))
BUILD(slice, dot_slice(in[0], integer(p, "axis", 0), integer(p, "begin", 0), integer(p, "end", 0)))
BUILD(detach, dot_mul(dot_detach(in[0]), in[0]))
BUILD(huber_loss, dot_huber_loss(in[0], in[1], number(p, "delta", 1)))
BUILD(cross_entropy_loss, dot_cross_entropy_loss(in[0], in[1], number(p, "smoothing", 0)))

static dot_conv_options conv_options(const char *p)
{
    dot_conv_options o = dot_conv_defaults();
    set_sizes(p, "stride", &o.stride, o.stride_each);
    set_sizes(p, "padding", &o.padding, o.padding_each);
    set_sizes(p, "dilation", &o.dilation, o.dilation_each);
    set_sizes(p, "output_padding", &o.output_padding, o.output_padding_each);
    o.groups = integer(p, "groups", 1);
    return o;
}

static dot_tensor *build_conv(const char *p, dot_tensor **in)
{
    dot_conv_options o = conv_options(p);
    return dot_conv(in[0], in[1], in[2], &o, activation(p));
}

static dot_tensor *build_conv_transpose(const char *p, dot_tensor **in)
{
    dot_conv_options o = conv_options(p);
    return dot_conv_transpose(in[0], in[1], in[2], &o, activation(p));
}

static dot_pool_options pool_options(const char *p)
{
    dot_pool_options o = dot_pool_defaults();
    set_sizes(p, "kernel", &o.kernel, o.kernel_each);
    set_sizes(p, "stride", &o.stride, o.stride_each);
    set_sizes(p, "padding", &o.padding, o.padding_each);
    set_sizes(p, "dilation", &o.dilation, o.dilation_each);
    o.ceil_mode = integer(p, "ceil_mode", 0) != 0;
    o.count_include_pad = integer(p, "count_include_pad", 1) != 0;
    return o;
}

static dot_tensor *build_max_pool(const char *p, dot_tensor **in)
{
    dot_pool_options o = pool_options(p);
    return dot_max_pool(in[0], &o);
}

static dot_tensor *build_avg_pool(const char *p, dot_tensor **in)
{
    dot_pool_options o = pool_options(p);
    return dot_avg_pool(in[0], &o);
}

static dot_tensor *build_adaptive_max_pool(const char *p, dot_tensor **in)
{
    int64_t sizes[DOT_MAX_RANK];
    return integers(p, "sizes", sizes) ? dot_adaptive_max_pool(in[0], sizes) : NULL;
}

static dot_tensor *build_adaptive_avg_pool(const char *p, dot_tensor **in)
{
    int64_t sizes[DOT_MAX_RANK];
    return integers(p, "sizes", sizes) ? dot_adaptive_avg_pool(in[0], sizes) : NULL;
}

/* hidden=2,3: keys that the mask hides in every sequence. */
static dot_attention_options attention_options(const char *p, const dot_tensor *k)
{
    dot_attention_options o = dot_attention_defaults();
    int64_t hidden[DOT_MAX_RANK], shape[2] = { 0, 0 };
    uint8_t seen[1024];
    int count = integers(p, "hidden", hidden);
    for (int i = 0; i < 2 && count; ++i)
        shape[i] = dot_tensor_dim(k, i);
    o.heads = integer(p, "heads", 1);
    o.scale = number(p, "scale", o.scale);
    o.causal = integer(p, "causal", 0) != 0;
    memset(seen, 1, sizeof seen);
    for (int i = 0; i < count && shape[0] * shape[1] <= COUNT(seen); ++i)
        for (int64_t n = 0; n < shape[0]; ++n)
            seen[n * shape[1] + hidden[i]] = 0;
    if (count)
        o.key_mask = dot_input(dot_tensor_context(k), DOT_U8, 2, shape, seen);
    return o;
}

static dot_tensor *build_attention(const char *p, dot_tensor **in)
{
    dot_attention_options o = attention_options(p, in[1]);
    return dot_attention(in[0], in[1], in[2], &o);
}

static dot_tensor *build_self_attention(const char *p, dot_tensor **in)
{
    dot_attention_options o = attention_options(p, in[0]);
    return dot_self_attention(in[0], &o);
}

static dot_tensor *build_reshape(const char *p, dot_tensor **in)
{
    int64_t shape[DOT_MAX_RANK];
    return dot_reshape(in[0], integers(p, "shape", shape), shape);
}

static dot_tensor *build_permute(const char *p, dot_tensor **in)
{
    int64_t values[DOT_MAX_RANK];
    int axes[DOT_MAX_RANK];
    for (int i = integers(p, "axes", values) - 1; i >= 0; --i)
        axes[i] = (int)values[i];
    return dot_permute(in[0], axes);
}

static dot_tensor *build_concat(const char *p, dot_tensor **in)
{
    int count = 0;
    while (count < SLOTS && in[count])
        ++count;
    return dot_concat(in, count, integer(p, "axis", 0));
}

static dot_tensor *build_pad(const char *p, dot_tensor **in)
{
    int64_t before[DOT_MAX_RANK], after[DOT_MAX_RANK];
    integers(p, "before", before);
    integers(p, "after", after);
    return dot_pad(in[0], before, after, number(p, "value", 0));
}

enum { F64, F32_PORTABLE, F32_FAST, F32_LANES, CONFIGS };

typedef struct op_row {
    const char *name;
    dot_tensor *(*unary)(dot_tensor *);
    dot_tensor *(*binary)(dot_tensor *, dot_tensor *);
    dot_tensor *(*build)(const char *parameters, dot_tensor **in);
    int cases;                  /* what was run, and the largest errors */
    double worst[CONFIGS], worst_difference;
} op_row;

#define UNARY(name) { #name, dot_##name, NULL, NULL, 0, { 0 }, 0 }
#define BINARY(name) { #name, NULL, dot_##name, NULL, 0, { 0 }, 0 }
#define GENERAL(name) { #name, NULL, NULL, build_##name, 0, { 0 }, 0 }
static op_row ops[] = {
    BINARY(add), BINARY(sub), BINARY(mul), BINARY(div), BINARY(maximum), BINARY(minimum),
    UNARY(neg), UNARY(abs), UNARY(exp), UNARY(log), UNARY(sqrt), UNARY(square),
    GENERAL(add_scalar), GENERAL(mul_scalar), GENERAL(pow_scalar),
    UNARY(relu), GENERAL(leaky_relu), UNARY(gelu), UNARY(gelu_tanh), UNARY(silu), UNARY(sigmoid), UNARY(tanh),
    GENERAL(softplus), GENERAL(sum), GENERAL(mean), GENERAL(max), GENERAL(min), BINARY(matmul), GENERAL(linear),
    GENERAL(conv), GENERAL(conv_transpose), GENERAL(max_pool), GENERAL(avg_pool), GENERAL(adaptive_max_pool),
    GENERAL(adaptive_avg_pool), GENERAL(softmax), GENERAL(log_softmax), GENERAL(attention), GENERAL(self_attention),
    GENERAL(dropout), GENERAL(layer_norm),
    GENERAL(group_norm), GENERAL(batch_norm), BINARY(embedding), GENERAL(reshape), GENERAL(permute),
    GENERAL(concat), GENERAL(slice), GENERAL(pad), GENERAL(detach),
    BINARY(mse_loss), BINARY(rmse_loss), BINARY(l1_loss), GENERAL(huber_loss), BINARY(bce_with_logits_loss),
    GENERAL(cross_entropy_loss)
};

static op_row *find_op(const char *text)
{
    for (int i = 0; i < COUNT(ops); ++i)
        if (is(text, "op", ops[i].name))
            return &ops[i];
    return NULL;
}

static dot_tensor *apply(const op_row *op, const char *text, dot_tensor **in)
{
    return op->unary ? op->unary(in[0]) : op->binary ? op->binary(in[0], in[1]) : op->build(text, in);
}

/* ---- golden cases ------------------------------------------------------------------------------------------------ */

typedef struct array {
    bool there;
    dot_dtype dtype;            /* DOT_I64, or some float type */
    int rank;
    int64_t shape[DOT_MAX_RANK], count;
    double *values;
} array;

typedef struct golden_case {
    char name[DOT_MAX_NAME];
    const char *text;
    op_row *op;
    bool training, same, differences;
    unsigned shared;            /* the arguments that are inputs of the step */
    array in[SLOTS], out, gout, grad[SLOTS], after[SLOTS];
} golden_case;

static array read_array(dot_safetensors *file, const golden_case *c, const char *what, int slot)
{
    array a = { 0 };
    dot_safetensors_entry entry = { 0 };
    char name[2 * DOT_MAX_NAME];
    if (slot < 0)
        snprintf(name, sizeof name, "%s/%s", c->name, what);
    else
        snprintf(name, sizeof name, "%s/%s%d", c->name, what, slot);
    int index = dot_safetensors_find(file, name);
    if (index < 0)
        return a;
    assert_true(dot_safetensors_entry_at(file, index, &entry));
    a.there = true;
    a.dtype = strcmp(entry.dtype, "I64") ? DOT_F64 : DOT_I64;
    a.rank = entry.rank;
    memcpy(a.shape, entry.shape, sizeof a.shape);
    a.count = entry.count;
    a.values = calloc((size_t)entry.count + 1, sizeof(double));
    assert_non_null(a.values);
    assert_true(dot_safetensors_read_double(file, index, a.values, a.count));
    return a;
}

/* `entry_name`: that of the case's result. */
static void read_case(dot_safetensors *file, const char *entry_name, golden_case *c)
{
    int64_t slots[DOT_MAX_RANK];
    memset(c, 0, sizeof *c);
    snprintf(c->name, sizeof c->name, "%.*s", (int)(strlen(entry_name) - strlen("/out")), entry_name);
    c->text = dot_safetensors_metadata(file, c->name);
    assert_non_null(c->text);
    c->op = find_op(c->text);
    if (!c->op)
        fail_msg("%s: no such operation: %s", c->name, c->text);
    c->training = !is(c->text, "mode", "eval");
    c->same = integer(c->text, "same", 0) != 0;
    c->differences = c->training && integer(c->text, "fd", 1);
    for (int i = integers(c->text, "shared", slots) - 1; i >= 0; --i)
        c->shared |= 1u << slots[i];
    c->out = read_array(file, c, "out", -1);
    c->gout = read_array(file, c, "gout", -1);
    for (int i = 0; i < SLOTS; ++i) {
        c->in[i] = read_array(file, c, "in", i);
        c->grad[i] = read_array(file, c, "grad", i);
        c->after[i] = read_array(file, c, "after", i);
    }
}

static void free_case(golden_case *c)
{
    free(c->out.values);
    free(c->gout.values);
    for (int i = 0; i < SLOTS; ++i) {
        free(c->in[i].values);
        free(c->grad[i].values);
        free(c->after[i].values);
    }
}

static bool has_gradients(const golden_case *c)
{
    for (int i = 0; i < SLOTS; ++i)
        if (c->grad[i].there)
            return true;
    return false;
}

/* ---- running a case ---------------------------------------------------------------------------------------------- */

static const struct config {
    const char *name;
    dot_dtype dtype;
    bool simd, wrapped;         /* wrapped: the arguments are results of operations, not persistent tensors */
    int threads, lanes;         /* 0 threads: the default. The last lane runs the case, the others its values turned round */
    double tolerance;
} configs[CONFIGS] = {
    { "f64", DOT_F64, true, false, 0, 1, 1e-10 },
    { "f32 portable", DOT_F32, false, true, 0, 1, 1e-5 },
    { "f32", DOT_F32, true, false, 1, 1, 1e-5 },
    { "f32, 3 lanes", DOT_F32, true, false, 3, 3, 1e-5 }    /* in the last lane the same bits as "f32" */
};
#define DIFFERENCE_TOLERANCE 1e-6

static dot_context *create_context(const struct config *config)
{
    dot_context_options options = dot_context_defaults();
    options.dtype = config->dtype;
    options.simd = config->simd;
    options.lanes = config->lanes;
    if (config->threads)
        options.threads = config->threads;
    dot_context *ctx = dot_context_create(&options);
    assert_non_null(ctx);
    return ctx;
}

static int failures;

static void report(const golden_case *c, const char *config, const char *what, int slot, double error)
{
    ++failures;
    printf("# FAILED %s (%s) %s", c->name, config, what);
    if (slot >= 0)
        printf("%d", slot);
    printf(": %.3g [%s;", error, c->text);
    for (int i = 0; i < SLOTS; ++i)
        for (int k = 0; c->in[i].there && k <= c->in[i].rank; ++k)
            if (k == c->in[i].rank)
                printf(" %s", k ? "" : "()");
            else
                printf("%s%d", k ? "x" : " ", (int)c->in[i].shape[k]);
    printf("]\n");
}

/* A case in one context. */
typedef struct graph {
    dot_context *ctx;
    const golden_case *c;
    const struct config *config;
    dot_tensor *leaf[SLOTS], *in[SLOTS], *out;
} graph;

static dot_tensor *step_input(const graph *g, const array *a)
{
    dot_dtype dtype = a->dtype == DOT_I64 ? DOT_I64 : g->config->dtype;
    void *data = malloc(((size_t)a->count + 1) * sizeof(double));
    assert_non_null(data);
    for (int64_t i = 0; i < a->count; ++i) {
        if (dtype == DOT_I64)
            ((int64_t *)data)[i] = (int64_t)a->values[i];
        else if (dtype == DOT_F32)
            ((float *)data)[i] = (float)a->values[i];
        else
            ((double *)data)[i] = a->values[i];
    }
    dot_tensor *t = dot_input(g->ctx, dtype, a->rank, a->shape, data);
    free(data);
    return t;
}

static bool is_shared(const golden_case *c, int slot)
{
    return (c->shared >> slot & 1) != 0;
}

static int case_lane(const graph *g)
{
    return g->config->lanes - 1;
}

/* The case's lane gets its values, lane 0 the same backwards, and the others the same from another start: as long as
   only the case's lane is looked at, a lane that reads a neighbour's memory shows. */
static void set_lanes(const graph *g, dot_tensor *t, const array *a)
{
    double *values = malloc(((size_t)a->count + 1) * sizeof(double));
    assert_non_null(values);
    for (int lane = 0; lane < g->config->lanes; ++lane) {
        for (int64_t i = 0; i < a->count; ++i)
            values[i] = a->values[lane == case_lane(g) ? i : lane ? (i + lane) % a->count : a->count - 1 - i];
        dot_tensor_set(t, lane, values, a->count);
    }
    free(values);
}

static graph make_graph(dot_context *ctx, const golden_case *c, int config)
{
    graph g = { ctx, c, &configs[config], { NULL }, { NULL }, NULL };
    for (int i = 0; i < SLOTS; ++i) {
        const array *a = &c->in[i];
        if (!a->there || is_shared(c, i))
            continue;
        g.leaf[i] = dot_tensor_create(ctx, a->dtype == DOT_I64 ? DOT_I64 : g.config->dtype, a->rank, a->shape);
        set_lanes(&g, g.leaf[i], a);
        if (c->grad[i].there)
            dot_requires_grad(g.leaf[i], true);
    }
    return g;
}

static void wrap_arguments(graph *g)
{
    for (int i = 0; i < SLOTS; ++i)
        if (g->c->grad[i].there)
            g->in[i] = dot_mul_scalar(g->in[i], 1.0);
}

static void begin(graph *g)
{
    const golden_case *c = g->c;
    if (c->training)
        dot_step_begin(g->ctx);
    else
        dot_eval_begin(g->ctx);
    for (int i = 0; i < SLOTS; ++i)
        g->in[i] = c->in[i].there && is_shared(c, i) ? step_input(g, &c->in[i]) : g->leaf[i];
}

static void apply_case(graph *g)
{
    if (g->c->same)
        g->in[1] = g->in[0];
    g->out = apply(g->c->op, g->c->text, g->in);
}

static void forward(graph *g)
{
    begin(g);
    if (g->config->wrapped)
        wrap_arguments(g);
    apply_case(g);
}

static dot_tensor *weighted_sum(const graph *g)
{
    return dot_sum(dot_mul(g->out, step_input(g, &g->c->gout)), DOT_ALL_AXES, false);
}

static bool same_shape(const dot_tensor *t, const array *a)
{
    bool same = t && dot_tensor_rank(t) == a->rank && dot_tensor_size(t) == a->count;
    for (int i = 0; same && i < a->rank; ++i)
        same = dot_tensor_dim(t, i) == a->shape[i];
    return same;
}

/* max |t - scale a| / max |scale a|; infinite where t is NULL, has another shape, or holds what is not finite. */
static double relative_error(const dot_tensor *t, int lane, const array *a, double scale)
{
    double error = 0, largest = 1e-30;
    if (!same_shape(t, a))
        return INFINITY;
    double *values = malloc(((size_t)a->count + 1) * sizeof(double));
    assert_non_null(values);
    bool finite = dot_tensor_get(t, lane, values, a->count);
    for (int64_t i = 0; i < a->count; ++i) {
        finite = finite && isfinite(values[i]);
        error = fmax(error, fabs(values[i] - scale * a->values[i]));
        largest = fmax(largest, fabs(scale * a->values[i]));
    }
    free(values);
    return finite ? error / largest : INFINITY;
}

static void check(const graph *g, const char *what, int slot, const dot_tensor *t, const array *want, double scale)
{
    double error = relative_error(t, case_lane(g), want, scale), *worst = &g->c->op->worst[g->config - configs];
    if (error > *worst)
        *worst = error;
    if (!(error < g->config->tolerance))
        report(g->c, g->config->name, what, slot, error);
}

static void check_arguments(const graph *g)
{
    const golden_case *c = g->c;
    for (int i = 0; i < SLOTS; ++i) {
        if (!g->in[i] || (c->same && i == 1))
            continue;
        if (c->grad[i].there)
            check(g, "grad", i, dot_tensor_grad(g->leaf[i]), &c->grad[i], 1);
        else if (dot_tensor_grad(g->in[i]))
            report(c, g->config->name, "a gradient nobody asked for, argument ", i, 0);
        if (c->after[i].there)
            check(g, "after", i, g->leaf[i], &c->after[i], 1);
        else if (relative_error(g->in[i], case_lane(g), &c->in[i], 1) != 0)
            report(c, g->config->name, "changed argument ", i, relative_error(g->in[i], case_lane(g), &c->in[i], 1));
    }
}

static bool backward(const graph *g)
{
    return !has_gradients(g->c) || dot_backward(weighted_sum(g));
}

/* Another step gives the same result and adds to the gradients. */
static void check_again(graph *g)
{
    array first = g->c->out;
    first.values = malloc(((size_t)first.count + 1) * sizeof(double));
    assert_non_null(first.values);
    dot_tensor_get(g->out, case_lane(g), first.values, first.count);
    forward(g);
    if (relative_error(g->out, case_lane(g), &first, 1) != 0)
        report(g->c, g->config->name, "another step gives another result", -1, relative_error(g->out, case_lane(g), &first, 1));
    free(first.values);
    if (!backward(g))
        report(g->c, g->config->name, dot_error(g->ctx), -1, NAN);
    for (int i = 0; i < SLOTS; ++i)
        if (g->c->grad[i].there)
            check(g, "added grad", i, dot_tensor_grad(g->leaf[i]), &g->c->grad[i], 2);
    dot_error_clear(g->ctx);
}

/* False after an error of the library. */
static bool run(graph *g)
{
    forward(g);
    bool ok = backward(g) && dot_ok(g->ctx);
    if (ok) {
        check(g, "out", -1, g->out, &g->c->out, 1);
        check_arguments(g);
    } else
        report(g->c, g->config->name, dot_error(g->ctx), -1, NAN);
    dot_error_clear(g->ctx);
    return ok;
}

static void compare_bits(const graph *solo, const graph *lanes, const char *what, int slot, dot_tensor *a, dot_tensor *b)
{
    size_t bytes = a ? (size_t)dot_tensor_size(a) * dot_dtype_size(dot_tensor_dtype(a)) : 0;
    if (bytes && (!b || memcmp(dot_tensor_data(a, 0), dot_tensor_data(b, case_lane(lanes)), bytes)))
        report(solo->c, lanes->config->name, what, slot, NAN);
}

static void compare_lanes(const graph *solo, const graph *lanes)
{
    compare_bits(solo, lanes, "lane differs from the solo run: out", -1, solo->out, lanes->out);
    for (int i = 0; i < SLOTS; ++i) {
        compare_bits(solo, lanes, "lane differs from the solo run: grad", i, dot_tensor_grad(solo->leaf[i]),
                     dot_tensor_grad(lanes->leaf[i]));
        compare_bits(solo, lanes, "lane differs from the solo run: argument", i, solo->leaf[i], lanes->leaf[i]);
    }
}

/* ---- finite differences ------------------------------------------------------------------------------------------ */

/* Adds c x^2, summed, for each argument x. */
static dot_tensor *add_squares(const graph *g, dot_tensor *loss, double c)
{
    for (int i = 0; i < SLOTS; ++i)
        if (g->c->grad[i].there)
            loss = dot_add(loss, dot_mul_scalar(dot_sum(dot_square(g->in[i]), DOT_ALL_AXES, false), c));
    return loss;
}

/* Gradients have to add up inside the graph: the arguments are used before, in and after the operation, and its
   result twice. */
static dot_tensor *difference_loss(void *user)
{
    static const double zero = 0;
    graph *g = user;
    begin(g);
    wrap_arguments(g);
    dot_tensor *loss = add_squares(g, dot_input(g->ctx, DOT_F64, 0, NULL, &zero), 0.125);
    apply_case(g);
    loss = dot_add(loss, dot_mul_scalar(dot_sum(dot_square(g->out), DOT_ALL_AXES, false), 0.05));
    return add_squares(g, dot_add(loss, weighted_sum(g)), 0.25);
}

/* For the large cases: the derivative along one direction of +-1. */
static double directional_check(graph *g)
{
    const double step = 4e-6;       /* the sums are large, and so is their rounding */
    double slope = 0, loss[2];
    if (!dot_backward(difference_loss(g)))
        return NAN;
    for (int side = 0; side < 2; ++side) {
        uint64_t draw = 0;
        for (int i = 0; i < SLOTS; ++i) {
            const array *a = &g->c->in[i];
            if (!g->c->grad[i].there)
                continue;
            const double *grad = dot_tensor_data(dot_tensor_grad(g->leaf[i]), 0);
            double *x = dot_tensor_data(g->leaf[i], 0);
            for (int64_t k = 0; k < a->count; ++k) {
                double direction = dot_random_uniform(1, 0, draw++) < 0.5 ? -1 : 1;
                x[k] = a->values[k] + (side ? step : -step) * direction;
                if (side)
                    slope += grad[k] * direction;
            }
        }
        loss[side] = dot_item(difference_loss(g), 0);
    }
    double numeric = (loss[1] - loss[0]) / (2 * step);
    return fabs(slope - numeric) / fmax(1, fmax(fabs(slope), fabs(numeric)));
}

static void check_differences(dot_context *ctx, const golden_case *c)
{
    graph g = make_graph(ctx, c, F64);
    dot_tensor *inputs[SLOTS];
    int count = 0;
    int64_t elements = 0;
    for (int i = 0; i < SLOTS; ++i)
        if (c->grad[i].there) {
            inputs[count++] = g.leaf[i];
            elements += c->in[i].count;
        }
    double error = elements <= 250 ? dot_gradient_check(ctx, difference_loss, &g, inputs, count, 1e-6)
                                   : directional_check(&g);
    if (!(error <= c->op->worst_difference))
        c->op->worst_difference = error;
    if (!(error < DIFFERENCE_TOLERANCE))
        report(c, dot_ok(ctx) ? "f64" : dot_error(ctx), "finite differences", -1, error);
    dot_error_clear(ctx);
}

/* ---- a file of cases --------------------------------------------------------------------------------------------- */

static void run_case(dot_context *const *ctx, const golden_case *c)
{
    graph g[CONFIGS];
    bool ok[CONFIGS];
    ++c->op->cases;
    for (int k = 0; k < CONFIGS; ++k) {
        g[k] = make_graph(ctx[k], c, k);
        ok[k] = run(&g[k]);
    }
    if (ok[F32_FAST] && ok[F32_LANES])
        compare_lanes(&g[F32_FAST], &g[F32_LANES]);
    for (int k = 0; k < CONFIGS; ++k)
        if (ok[k])
            check_again(&g[k]);
    if (ok[F64] && c->differences && has_gradients(c))
        check_differences(ctx[F64], c);
}

static const struct golden_file {
    const char *name;
    int cases;                  /* at least */
} files[] = {
    { "elementwise", 200 }, { "unary", 300 }, { "reductions", 250 }, { "matmul", 50 }, { "matmul_large", 1 },
    { "linear", 80 }, { "conv1d", 70 }, { "conv2d", 140 }, { "conv2d_sizes", 90 }, { "conv2d_channels", 100 },
    { "conv3d", 50 }, { "conv_random", 130 }, { "conv_transpose1d", 70 }, { "conv_transpose2d", 130 },
    { "conv_transpose2d_output_padding", 150 }, { "conv_transpose2d_channels", 100 }, { "conv_transpose3d", 50 },
    { "conv_transpose_random", 130 }, { "autoencoder1", 2 }, { "autoencoder2", 2 }, { "pool", 250 },
    { "long_products", 35 }, { "long_elements", 18 }, { "softmax", 40 }, { "attention", 30 }, { "norms", 150 }, { "shapes", 80 }, { "losses", 120 }
};

static void test_file(void **state)
{
    const struct golden_file *golden = *state;
    dot_context *reader = dot_context_create(NULL), *ctx[CONFIGS];
    dot_safetensors_entry entry;
    char path[256];
    int cases = 0;

    snprintf(path, sizeof path, "tests/golden/ops_%s.safetensors", golden->name);
    dot_safetensors *file = dot_safetensors_open(reader, path);
    if (!file)
        fail_msg("%s", dot_error(reader));
    for (int k = 0; k < CONFIGS; ++k)
        ctx[k] = create_context(&configs[k]);
    failures = 0;
    for (int i = 0; dot_safetensors_entry_at(file, i, &entry); ++i) {
        const char *slash = strrchr(entry.name, '/');
        if (!slash || strcmp(slash, "/out"))
            continue;
        golden_case c;
        read_case(file, entry.name, &c);
        run_case(ctx, &c);
        free_case(&c);
        ++cases;
    }
    printf("# %s: %d cases in %d contexts (kernels: %s), %d failures\n", golden->name, cases, CONFIGS,
           dot_kernels(ctx[F32_FAST]), failures);
    for (int k = 0; k < CONFIGS; ++k)
        dot_context_destroy(ctx[k]);
    dot_safetensors_close(file);
    dot_context_destroy(reader);
    assert_true(cases >= golden->cases);
    assert_int_equal(failures, 0);
}

/* ---- dropout ----------------------------------------------------------------------------------------------------- */

enum { MANY = 100000 };

static dot_context *seeded_context(uint64_t seed)
{
    dot_context_options options = dot_context_defaults();
    options.seed = seed;
    dot_context *ctx = dot_context_create(&options);
    assert_non_null(ctx);
    return ctx;
}

static dot_tensor *filled(dot_context *ctx, int64_t count, double value)
{
    dot_tensor *t = dot_tensor_create(ctx, DOT_F32, 1, &count);
    double *values = malloc((size_t)count * sizeof(double));
    assert_non_null(values);
    for (int64_t i = 0; i < count; ++i)
        values[i] = value;
    assert_true(dot_tensor_set(t, DOT_ALL, values, count));
    free(values);
    return dot_requires_grad(t, true);
}

/* Bits of `count` steps of dropout of `x`, one after the other. */
static void dropout_steps(dot_context *ctx, dot_tensor *x, int count, float *out)
{
    for (int i = 0; i < count; ++i) {
        dot_step_begin(ctx);
        dot_tensor *y = dot_dropout(x, 0.5);
        assert_non_null(y);
        memcpy(out + i * dot_tensor_size(x), dot_tensor_data(y, 0), (size_t)dot_tensor_size(x) * sizeof *out);
    }
}

static void test_dropout_statistics(void **state)
{
    static const double rates[] = { 0.1, 0.25, 0.5, 0.9 };
    (void)state;
    dot_context *ctx = seeded_context(7);
    dot_tensor *x = filled(ctx, MANY, 3);
    for (int r = 0; r < COUNT(rates); ++r) {
        double p = rates[r], dropped = 0, runs = 0;
        dot_step_begin(ctx);
        dot_tensor *y = dot_dropout(x, p);
        const float *v = dot_tensor_data(y, 0);
        assert_non_null(v);
        for (int i = 0; i < MANY; ++i) {
            dropped += v[i] == 0;
            runs += i && v[i] == 0 && v[i - 1] == 0;
            if (v[i] != 0)
                assert_true(fabs(v[i] - 3 / (1 - p)) < 1e-6 * 3 / (1 - p));
        }
        /* Five standard deviations, of the count and (from above) of the count of neighbours. */
        assert_true(fabs(dropped - MANY * p) < 5 * sqrt(MANY * p * (1 - p)));
        assert_true(fabs(runs - MANY * p * p) < 5 * sqrt(3 * MANY * p * p * (1 - p * p)));
    }
    dot_context_destroy(ctx);
}

static void test_dropout_limits(void **state)
{
    (void)state;
    dot_context *ctx = seeded_context(7);
    dot_tensor *x = filled(ctx, 1000, 3);
    for (int p = 0; p < 2; ++p) {           /* all kept; all dropped, and no 0/0 */
        double factor = 1 - p;
        dot_step_begin(ctx);
        dot_tensor *y = dot_dropout(x, p);
        assert_true(dot_backward(dot_sum(y, DOT_ALL_AXES, false)));
        const float *v = dot_tensor_data(y, 0), *grad = dot_tensor_data(dot_tensor_grad(x), 0);
        for (int i = 0; i < 1000; ++i) {
            assert_true(v[i] == 3 * factor);
            assert_true(grad[i] == 1);      /* 1 of p = 0, and nothing added by p = 1 */
        }
    }
    dot_eval_begin(ctx);
    const float *v = dot_tensor_data(dot_dropout(x, 0.5), 0);
    assert_non_null(v);
    for (int i = 0; i < 1000; ++i)
        assert_true(v[i] == 3);
    static const double bad[] = { -0.1, 1.1, (double)NAN };
    for (int i = 0; i < COUNT(bad); ++i) {
        dot_step_begin(ctx);
        assert_null(dot_dropout(x, bad[i]));
        assert_int_equal(dot_error_status(ctx), DOT_ERROR_ARGUMENT);
        dot_error_clear(ctx);
    }
    dot_context_destroy(ctx);
}

static void test_dropout_gradient(void **state)
{
    enum { SIZE = 1000 };
    static const dot_dtype dtypes[] = { DOT_F32, DOT_F64 };
    double g[SIZE], v[SIZE], grad[SIZE];
    int64_t count = SIZE;
    (void)state;
    for (int i = 0; i < SIZE; ++i)
        g[i] = (i % 17 - 8) / 8.0;
    for (int k = 0; k < COUNT(dtypes); ++k) {
        dot_context *ctx = seeded_context(3);
        dot_tensor *x = dot_requires_grad(dot_tensor_create(ctx, dtypes[k], 1, &count), true);
        dot_tensor *upstream = dot_tensor_create(ctx, dtypes[k], 1, &count);
        assert_true(dot_tensor_set(x, 0, g, count) && dot_tensor_set(upstream, 0, g, count));
        dot_step_begin(ctx);
        dot_tensor *y = dot_dropout(dot_add_scalar(x, 4), 0.75);            /* of 3 and more: 0 is what was dropped */
        assert_true(dot_backward(dot_sum(dot_mul(y, upstream), DOT_ALL_AXES, false)));
        assert_true(dot_tensor_get(y, 0, v, count) && dot_tensor_get(dot_tensor_grad(x), 0, grad, count));
        for (int i = 0; i < SIZE; ++i) {
            assert_true(v[i] == 0 || v[i] == 4 * (g[i] + 4));
            assert_true(grad[i] == (v[i] == 0 ? 0 : 4 * g[i]));
        }
        dot_context_destroy(ctx);
    }
}

static void test_dropout_repeats(void **state)
{
    enum { SIZE = 1000, STEPS = 3 };
    static float first[STEPS * SIZE], again[STEPS * SIZE], other[STEPS * SIZE];
    (void)state;
    dot_context *a = seeded_context(5), *b = seeded_context(5), *c = seeded_context(6);
    dropout_steps(a, filled(a, SIZE, 1), STEPS, first);
    dropout_steps(b, filled(b, SIZE, 1), STEPS, again);
    dropout_steps(c, filled(c, SIZE, 1), STEPS, other);
    assert_memory_equal(first, again, sizeof first);
    assert_memory_not_equal(first, other, SIZE * sizeof *first);
    assert_memory_not_equal(first, first + SIZE, SIZE * sizeof *first);         /* step 0, step 1 */
    assert_memory_not_equal(first + SIZE, first + 2 * SIZE, SIZE * sizeof *first);
    dot_step_begin(a);                                                          /* two in a step */
    dot_tensor *x = filled(a, SIZE, 1), *y = dot_dropout(x, 0.5), *z = dot_dropout(x, 0.5);
    assert_true(dot_ok(a));
    assert_memory_not_equal(dot_tensor_data(y, 0), dot_tensor_data(z, 0), SIZE * sizeof *first);
    dot_context_destroy(a);
    dot_context_destroy(b);
    dot_context_destroy(c);
}

/* A lane drops what a context with its seed drops. */
static void test_dropout_lanes(void **state)
{
    enum { SIZE = 1000, LANES = 3 };
    static const uint64_t seeds[LANES] = { 11, 12, 13 };
    static float solo[SIZE];
    (void)state;
    dot_context_options options = dot_context_defaults();
    options.lanes = LANES;
    options.lane_seeds = seeds;
    dot_context *ctx = dot_context_create(&options);
    assert_non_null(ctx);
    dot_tensor *x = filled(ctx, SIZE, 1);
    dot_step_begin(ctx);
    dot_tensor *y = dot_dropout(x, 0.5);
    assert_non_null(y);
    for (int lane = 0; lane < LANES; ++lane) {
        dot_context *one = seeded_context(seeds[lane]);
        dropout_steps(one, filled(one, SIZE, 1), 1, solo);
        assert_memory_equal(dot_tensor_data(y, lane), solo, sizeof solo);
        dot_context_destroy(one);
    }
    assert_memory_not_equal(dot_tensor_data(y, 0), dot_tensor_data(y, 1), SIZE * sizeof(float));
    dot_context_destroy(ctx);
}

/* ---- calls that must fail ---------------------------------------------------------------------------------------- */

#define ON(status) (1u << (status))
#define ANY_ERROR (~ON(DOT_OK))
#define MISFIT (ON(DOT_ERROR_SHAPE) | ON(DOT_ERROR_ARGUMENT))

/* shapes: one an argument, f32; a shape that ends in 'i' is of DOT_I64, and its elements are `index`. */
static const struct bad_call {
    const char *text, *shapes;
    unsigned statuses;          /* which may result */
    int index;
} bad_calls[] = {
    { "op=add", "2x3 4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=mul", "0x3 2x3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=add", "3 3i", ON(DOT_ERROR_DTYPE), 0 },
    { "op=exp", "3i", ON(DOT_ERROR_DTYPE), 0 },
    { "op=softplus beta=0", "3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=sum axes=0,2", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=mean axes=all", "0", ANY_ERROR, 0 },
    { "op=max axes=0", "0x3", ANY_ERROR, 0 },
    { "op=min axes=1", "2x0", ANY_ERROR, 0 },
    { "op=matmul", "2x3 4x5", ON(DOT_ERROR_SHAPE), 0 },
    { "op=matmul", "2x2x3 3x3x2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=matmul", "3 3x2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=linear", "2x3 4x5", ON(DOT_ERROR_SHAPE), 0 },
    { "op=linear", "2x3 3x5 4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=conv", "1x5x5x3 3x3x4x2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=conv", "1x5x5x3 3x3x3x2 3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=conv", "1x5x5x3 3x3x2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=conv", "1x2x5x3 3x3x3x2", MISFIT, 0 },
    { "op=conv dilation=3", "1x5x5x3 3x3x3x2", MISFIT, 0 },
    { "op=conv groups=2", "1x5x5x3 3x3x1x2", MISFIT, 0 },
    { "op=conv groups=2", "1x5x5x4 3x3x2x3", MISFIT, 0 },
    { "op=conv groups=0", "1x5x5x3 3x3x3x2", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=conv stride=0", "1x5x5x3 3x3x3x2", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=conv dilation=0", "1x5x5x3 3x3x3x2", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=conv padding=-1", "1x5x5x3 3x3x3x2", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=conv_transpose", "1x5x5x3 3x3x2x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=conv_transpose stride=2 output_padding=2", "1x5x5x3 3x3x2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=conv_transpose padding=3", "1x1x1x3 3x3x2x3", MISFIT, 0 },
    { "op=max_pool kernel=2 padding=2", "1x5x5x1", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=max_pool kernel=0", "1x5x5x1", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=max_pool kernel=6", "1x5x5x1", MISFIT, 0 },
    { "op=avg_pool kernel=6", "1x5x5x1", MISFIT, 0 },
    { "op=avg_pool kernel=2", "5x1", MISFIT, 0 },
    { "op=adaptive_avg_pool sizes=0,1", "1x5x5x1", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=softmax axis=2", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=softmax axis=-3", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=attention", "1x2x4 1x3x5 1x3x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention", "1x2x4 2x3x4 1x3x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention", "1x2x4 1x3x4 1x4x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention", "1x2x4 1x0x4 1x0x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention", "2x4 2x4 2x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention heads=3", "1x2x4 1x3x4 1x3x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=attention heads=0", "1x2x4 1x3x4 1x3x4", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=attention scale=inf", "1x2x4 1x3x4 1x3x4", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=self_attention heads=2", "1x2x9", ON(DOT_ERROR_SHAPE), 0 },
    { "op=layer_norm axes=3", "2x3", MISFIT, 0 },
    { "op=layer_norm axes=0", "2x3", MISFIT, 0 },
    { "op=layer_norm", "2x3 2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=group_norm groups=2", "2x3", MISFIT, 0 },
    { "op=group_norm groups=0", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=layer_norm eps=-1", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=batch_norm", "2x3 2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=batch_norm", "1x3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=batch_norm", "0x3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=batch_norm", "3", MISFIT, 0 },
    { "op=batch_norm momentum=2", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=embedding", "4x3 2i", ON(DOT_ERROR_ARGUMENT), 4 },
    { "op=embedding", "4x3 2i", ON(DOT_ERROR_ARGUMENT), -1 },
    { "op=embedding", "4x3 2", ON(DOT_ERROR_DTYPE), 0 },
    { "op=embedding", "4x3x2 2i", ON(DOT_ERROR_SHAPE), 0 },
    { "op=reshape shape=4,2", "2x3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=reshape shape=-1,4", "2x3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=reshape shape=-1,-1", "2x3", MISFIT, 0 },
    { "op=permute axes=0,0", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=permute axes=0,2", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=concat axis=0", "2x3 2x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=concat axis=0", "2x3 3", ON(DOT_ERROR_SHAPE), 0 },
    { "op=concat axis=2", "2x3 2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=slice axis=0 begin=1 end=3", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=slice axis=0 begin=2 end=1", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=slice axis=2 begin=0 end=1", "2x3", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=pad before=-3,0 after=0,0", "2x3", MISFIT, 0 },
    { "op=mse_loss", "2x3 2x4", ON(DOT_ERROR_SHAPE), 0 },
    { "op=mse_loss", "0 0", ANY_ERROR, 0 },
    { "op=rmse_loss", "0x2 0x2", ANY_ERROR, 0 },
    { "op=l1_loss", "0 0", ANY_ERROR, 0 },
    { "op=huber_loss", "0 0", ANY_ERROR, 0 },
    { "op=huber_loss delta=0", "2 2", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=bce_with_logits_loss", "0 0", ANY_ERROR, 0 },
    { "op=bce_with_logits_loss", "3 2", ON(DOT_ERROR_SHAPE), 0 },
    { "op=cross_entropy_loss", "0x3 0i", ANY_ERROR, 0 },
    { "op=cross_entropy_loss", "2x3 3i", ON(DOT_ERROR_SHAPE), 0 },
    { "op=cross_entropy_loss", "2x3 2", ON(DOT_ERROR_DTYPE), 0 },
    { "op=cross_entropy_loss", "2x3 2i", ON(DOT_ERROR_ARGUMENT), 3 },
    { "op=cross_entropy_loss", "2x3 2i", ON(DOT_ERROR_ARGUMENT), -1 },
    { "op=cross_entropy_loss smoothing=1.5", "2x3 2i", ON(DOT_ERROR_ARGUMENT), 0 },
    { "op=dropout p=2", "3", ON(DOT_ERROR_ARGUMENT), 0 }
};

static void make_arguments(dot_context *ctx, const struct bad_call *call, dot_tensor **in)
{
    const char *p = call->shapes;
    for (int slot = 0; *p; ++slot) {
        int64_t shape[DOT_MAX_RANK];
        double values[256];
        int rank = 0;
        do {
            char *end;
            shape[rank++] = (int64_t)strtoll(p, &end, 10);
            p = end + (*end == 'x');
        } while (p[-1] == 'x');
        dot_dtype dtype = *p == 'i' ? DOT_I64 : DOT_F32;
        p += *p == 'i';
        p += *p == ' ';
        in[slot] = dot_tensor_create(ctx, dtype, rank, shape);
        assert_non_null(in[slot]);
        int64_t count = dot_tensor_size(in[slot]);
        assert_in_range(count, 0, COUNT(values));
        for (int64_t i = 0; i < count; ++i)
            values[i] = dtype == DOT_I64 ? call->index : 1;
        assert_true(dot_tensor_set(in[slot], DOT_ALL, values, count));
        if (dtype == DOT_F32)
            dot_requires_grad(in[slot], true);
    }
}

/* An error is kept, names the function, and stops what comes after it until it is cleared. */
static void test_errors(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    int wrong = 0;
    for (int i = 0; i < COUNT(bad_calls); ++i) {
        const struct bad_call *call = &bad_calls[i];
        dot_tensor *in[SLOTS] = { NULL };
        char name[64];
        make_arguments(ctx, call, in);
        dot_step_begin(ctx);
        const op_row *op = find_op(call->text);
        assert_non_null(op);
        dot_tensor *result = apply(op, call->text, in);
        snprintf(name, sizeof name, "dot_%s", op->name);
        if (result || !(call->statuses & ON(dot_error_status(ctx))) || !strstr(dot_error(ctx), name) || dot_ok(ctx) ||
            dot_add(in[0], in[0])) {
            printf("# FAILED %s (%s): %s, status %d, \"%s\"\n", call->text, call->shapes, result ? "a result" : "NULL",
                   (int)dot_error_status(ctx), dot_error(ctx));
            ++wrong;
        }
        dot_error_clear(ctx);
        assert_true(dot_ok(ctx));
    }
    printf("# %d calls that must fail, %d wrong\n", COUNT(bad_calls), wrong);
    dot_context_destroy(ctx);
    assert_int_equal(wrong, 0);
}

/* What a failed call returned is passed on in silence. */
static void test_null_arguments(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    dot_tensor *x = filled(ctx, 3, 1);
    dot_step_begin(ctx);
    for (int i = 0; i < COUNT(ops); ++i) {
        dot_tensor *in[SLOTS] = { NULL, x, NULL };
        if (strcmp(ops[i].name, "concat"))
            assert_null(apply(&ops[i], "sizes=1 axes=0 before=0 after=0", in));
        in[0] = x;
        in[1] = NULL;
        if (ops[i].binary || !strcmp(ops[i].name, "conv") || !strcmp(ops[i].name, "linear"))
            assert_null(apply(&ops[i], "", in));
    }
    dot_tensor *pieces[] = { x, NULL };
    assert_null(dot_concat(pieces, 2, 0));
    assert_false(dot_backward(NULL));
    assert_true(dot_ok(ctx));
    dot_context_destroy(ctx);
}

/* An index out of range in any one lane is found. */
static void test_errors_in_lanes(void **state)
{
    enum { LANES = 3 };
    int64_t shape[2] = { 4, 3 }, count = 4;
    double good[] = { 0, 1, 2, 0 }, bad[] = { 0, 1, 2, 4 };
    (void)state;
    dot_context_options options = dot_context_defaults();
    options.lanes = LANES;
    dot_context *ctx = dot_context_create(&options);
    dot_tensor *x = dot_tensor_create(ctx, DOT_F32, 2, shape), *indices = dot_tensor_create(ctx, DOT_I64, 1, &count);
    for (int lane = -1; lane < LANES; ++lane) {
        assert_true(dot_tensor_set(indices, DOT_ALL, good, count));
        if (lane >= 0)
            assert_true(dot_tensor_set(indices, lane, bad, count));
        for (int k = 0; k < 2; ++k) {
            dot_step_begin(ctx);
            dot_tensor *y = k ? dot_embedding(x, indices) : dot_cross_entropy_loss(x, indices, 0);
            assert_int_equal(y == NULL, lane >= 0);
            assert_int_equal(dot_error_status(ctx), lane >= 0 ? DOT_ERROR_ARGUMENT : DOT_OK);
            dot_error_clear(ctx);
        }
    }
    dot_context_destroy(ctx);
}

static void test_mixed_arguments(void **state)
{
    (void)state;
    int64_t count = 3;
    dot_context *ctx = dot_context_create(NULL), *other = dot_context_create(NULL);
    dot_tensor *x = filled(ctx, count, 1), *wide = dot_tensor_create(ctx, DOT_F64, 1, &count);
    dot_step_begin(ctx);
    assert_null(dot_add(x, wide));
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_DTYPE);
    dot_error_clear(ctx);
    assert_null(dot_add(x, filled(other, count, 1)));
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_STATE);
    dot_error_clear(ctx);
    assert_non_null(dot_add(wide, wide));
    dot_context_destroy(ctx);
    dot_context_destroy(other);
}

/* ---- the way back ------------------------------------------------------------------------------------------------ */

static void test_backward_errors(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    dot_tensor *x = filled(ctx, 3, 1);
    dot_step_begin(ctx);
    assert_false(dot_backward(dot_square(x)));                      /* three elements */
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_SHAPE);
    dot_error_clear(ctx);
    dot_eval_begin(ctx);
    dot_tensor *loss = dot_sum(dot_square(x), DOT_ALL_AXES, false);
    assert_true(dot_item(loss, 0) == 3);
    assert_false(dot_backward(loss));                               /* nothing was recorded */
    assert_int_equal(dot_error_status(ctx), DOT_ERROR_STATE);
    dot_error_clear(ctx);
    assert_null(dot_tensor_grad(x));
    dot_context_destroy(ctx);
}

/* Two losses over one graph: the gradients of the leaves add up, those inside the graph do not. */
static void test_two_losses(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    dot_tensor *x = filled(ctx, 3, 2);
    dot_step_begin(ctx);
    int64_t row[2] = { 1, 3 };
    dot_tensor *y = dot_reshape(dot_square(x), 2, row), *cube = dot_mul(x, y);
    assert_true(dot_backward(dot_sum(y, DOT_ALL_AXES, false)));         /* 2 x   =  4 */
    assert_true(dot_backward(dot_sum(cube, DOT_ALL_AXES, false)));      /* 3 x^2 = 12 */
    const float *grad = dot_tensor_data(dot_tensor_grad(x), 0);
    assert_non_null(grad);
    for (int i = 0; i < 3; ++i)
        assert_true(grad[i] == 16);
    dot_context_destroy(ctx);
}

/* x used many times, at different depths. */
static void test_fan_out(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    dot_tensor *x = filled(ctx, 3, 2);
    dot_step_begin(ctx);
    dot_tensor *y = x;
    for (int i = 0; i < 6; ++i)
        y = dot_add(dot_mul(y, x), x);              /* in the end x^7 + x^6 + ... + x */
    assert_true(dot_backward(dot_sum(y, DOT_ALL_AXES, false)));
    const float *grad = dot_tensor_data(dot_tensor_grad(x), 0);
    assert_non_null(grad);
    double want = 0;
    for (int k = 1; k <= 7; ++k)
        want += k * pow(2, k - 1);
    for (int i = 0; i < 3; ++i)
        assert_true(grad[i] == want);
    dot_context_destroy(ctx);
}

/* A chain of n results needs the memory of few gradients, not of n; what is asked for is kept: d/dy of 2^17 y is 2^17, y being the third. */
static void test_gradients_share_memory(void **state)
{
    (void)state;
    enum { SIZE = 10000, CHAIN = 20 };
    static float ones[SIZE];
    int64_t size = SIZE;
    for (int i = 0; i < SIZE; ++i)
        ones[i] = 1;
    dot_context *ctx = dot_context_create(NULL);
    dot_tensor *w = dot_requires_grad(dot_tensor_create(ctx, DOT_F32, 1, &size), true), *chain[CHAIN];
    dot_step_begin(ctx);
    dot_tensor *y = dot_add(w, dot_input(ctx, DOT_F32, 1, &size, ones));
    for (int i = 0; i < CHAIN; ++i)
        chain[i] = y = dot_mul_scalar(y, 2);
    dot_retain_grad(chain[2]);
    dot_tensor *loss = dot_sum(y, DOT_ALL_AXES, false);
    size_t forward = dot_memory(ctx).step_peak_bytes;
    assert_true(dot_backward(loss));
    assert_true(dot_memory(ctx).step_peak_bytes < forward + 4 * SIZE * sizeof(float));
    assert_null(dot_tensor_grad(chain[1]));
    const float *kept = dot_tensor_data(dot_tensor_grad(chain[2]), 0), *grad = dot_tensor_data(dot_tensor_grad(w), 0);
    assert_true(kept && kept[SIZE - 1] == ldexp(1, CHAIN - 3) && grad[0] == ldexp(1, CHAIN));
    dot_context_destroy(ctx);
}

/* 0, 1, ..., 23 as [1, 4, 3, 2]: what nn.AdaptiveMaxPool2d and AvgPool2d of (2, 1) and (1, 1) give in channel 0. */
static void test_adaptive_pooling_layers(void **state)
{
    (void)state;
    static const int64_t shape[4] = { 1, 4, 3, 2 };
    float values[24];
    double out[4];
    for (int i = 0; i < 24; ++i)
        values[i] = (float)i;
    dot_context *ctx = dot_context_create(NULL);
    dot_layer *halves = dot_nn_adaptive_max_pool(ctx, 0, 2, 1), *all = dot_nn_adaptive_avg_pool(ctx, 0, 1, 1);
    dot_layer *net = dot_nn_sequential(ctx, all, dot_nn_flatten(ctx), dot_nn_linear(ctx, 2, 3), NULL);
    dot_step_begin(ctx);
    dot_tensor *x = dot_input(ctx, DOT_F32, 4, shape, values), *y = dot_forward(halves, x), *mean = dot_forward(all, x);
    assert_true(dot_tensor_get(y, 0, out, 4));
    assert_true(dot_tensor_dim(y, 1) == 2 && out[0] == 10 && out[1] == 11 && out[2] == 22 && out[3] == 23);
    assert_true(dot_tensor_get(mean, 0, out, 2) && out[0] == 11 && out[1] == 12);
    assert_int_equal(dot_tensor_dim(dot_forward(net, x), 1), 3);
    dot_context_destroy(ctx);
}

static dot_tensor *half_detached(void *user)
{
    dot_tensor *x = *(dot_tensor **)user;
    dot_step_begin(dot_tensor_context(x));
    return dot_sum(dot_mul(dot_detach(x), x), DOT_ALL_AXES, false);
}

/* The gradient check itself finds a wrong gradient: x instead of 2 x. */
static void test_gradient_check_fails(void **state)
{
    (void)state;
    int64_t count = 4;
    double values[] = { 1, 2, 3, 4 };
    dot_context_options options = dot_context_defaults();
    options.dtype = DOT_F64;
    dot_context *ctx = dot_context_create(&options);
    dot_tensor *x = dot_requires_grad(dot_tensor_create(ctx, DOT_F64, 1, &count), true);
    assert_true(dot_tensor_set(x, 0, values, count));
    double error = dot_gradient_check(ctx, half_detached, &x, &x, 1, 1e-6);
    assert_true(fabs(error - 0.5) < 1e-6);
    dot_context_destroy(ctx);
}

/* ---- functions of float ------------------------------------------------------------------------------------------ */

/* Distance from libm's double function, in units of the last place of the nearest float. */
static double ulps(float y, double exact)
{
    int exponent;
    if (isnan(exact) || isinf((float)exact))
        return isnan(exact) ? isnan(y) ? 0 : INFINITY : y == (float)exact ? 0 : INFINITY;
    frexp(fmax(fabs(exact), FLT_MIN), &exponent);
    return fabs((double)y - exact) / ldexp(1, exponent - FLT_MANT_DIG);
}

static double erf_gelu(double x) { return 0.5 * x * erfc(-x * sqrt(0.5)); }
static double logistic(double x) { return 1 / (1 + exp(-x)); }

/* Numbers of all magnitudes: the errors that dotopt.h states, and the same bits with and without the processor's vectors. */
static void test_functions_of_float(void **state)
{
    static const struct {
        const char *name;
        dot_tensor *(*f)(dot_tensor *x);
        double (*exact)(double x);
        double most, low, high;             /* ulps, for low <= x <= high */
    } rows[] = {
        { "exp", dot_exp, exp, 1, -103, 1e30 }, { "log", dot_log, log, 1, -1e30, 1e38 }, { "tanh", dot_tanh, tanh, 1.5, -1e30, 1e30 },
        { "sigmoid", dot_sigmoid, logistic, 3.5, -87, 1e30 }, { "gelu", dot_gelu, erf_gelu, 24, -4, 4 },
    };
    enum { N = 1 << 16 };
    static float x[N];
    double worst[COUNT(rows)] = { 0 };
    int64_t shape[1] = { N };
    dot_context *ctx[2];
    (void)state;
    for (int simd = 0; simd < 2; ++simd) {
        dot_context_options o = dot_context_defaults();
        o.simd = simd;
        o.flush_denormals = false;
        ctx[simd] = dot_context_create(&o);
        assert_non_null(ctx[simd]);
    }
    for (uint32_t block = 0; block < 16; ++block) {
        for (uint32_t i = 0; i < N; ++i) {
            uint32_t bits = i << 16 | ((i * 40503u + block * 4099u) & 0xffffu);
            memcpy(&x[i], &bits, sizeof bits);
        }
        for (int r = 0; r < COUNT(rows); ++r) {
            const float *y[2];
            for (int simd = 0; simd < 2; ++simd) {
                dot_eval_begin(ctx[simd]);
                y[simd] = (const float *)dot_tensor_data(rows[r].f(dot_input(ctx[simd], DOT_F32, 1, shape, x)), 0);
                assert_string_equal(dot_error(ctx[simd]), "");
            }
            for (int i = 0; i < N; ++i) {
                if (memcmp(&y[0][i], &y[1][i], sizeof(float)) != 0 && !(isnan(y[0][i]) && isnan(y[1][i])))
                    fail_msg("%s(%.9g): %.9g without vectors, %.9g with", rows[r].name, x[i], y[0][i], y[1][i]);
                if (x[i] >= rows[r].low && x[i] <= rows[r].high)
                    worst[r] = fmax(worst[r], ulps(y[0][i], rows[r].exact(x[i])));
            }
        }
    }
    for (int r = 0; r < COUNT(rows); ++r) {
        printf("# %s: at most %.2f ulp\n", rows[r].name, worst[r]);
        assert_true(worst[r] <= rows[r].most);
    }
    dot_context_destroy(ctx[0]);
    dot_context_destroy(ctx[1]);
}

/* ---- all of it --------------------------------------------------------------------------------------------------- */

static void test_every_operation(void **state)
{
    int cases = 0, without = 0;
    (void)state;
    printf("# largest relative error\n# %-22s cases", "");
    for (int k = 0; k < CONFIGS; ++k)
        printf(" %13s", configs[k].name);
    printf("   differences\n");
    for (int i = 0; i < COUNT(ops); ++i) {
        printf("# %-22s %5d", ops[i].name, ops[i].cases);
        for (int k = 0; k < CONFIGS; ++k)
            printf(" %13.1e", ops[i].worst[k]);
        printf(" %13.1e\n", ops[i].worst_difference);
        cases += ops[i].cases;
        without += !ops[i].cases && strcmp(ops[i].name, "dropout");     /* random: it has tests of its own */
    }
    printf("# %d cases, each in %d contexts, twice\n", cases, CONFIGS);
    assert_int_equal(without, 0);
}

int main(int argc, char **argv)
{
    static const struct CMUnitTest others[] = {
        cmocka_unit_test(test_dropout_statistics), cmocka_unit_test(test_dropout_limits),
        cmocka_unit_test(test_dropout_gradient), cmocka_unit_test(test_dropout_repeats),
        cmocka_unit_test(test_dropout_lanes), cmocka_unit_test(test_errors), cmocka_unit_test(test_null_arguments),
        cmocka_unit_test(test_errors_in_lanes), cmocka_unit_test(test_mixed_arguments), cmocka_unit_test(test_backward_errors),
        cmocka_unit_test(test_two_losses), cmocka_unit_test(test_fan_out), cmocka_unit_test(test_adaptive_pooling_layers), cmocka_unit_test(test_gradients_share_memory),
        cmocka_unit_test(test_gradient_check_fails), cmocka_unit_test(test_functions_of_float),
        cmocka_unit_test(test_every_operation)
    };
    struct CMUnitTest tests[COUNT(files) + COUNT(others)];
    for (int i = 0; i < COUNT(files); ++i) {
        struct CMUnitTest test = { files[i].name, test_file, NULL, NULL, (void *)(uintptr_t)&files[i] };
        tests[i] = test;
    }
    memcpy(tests + COUNT(files), others, sizeof others);
    if (argc > 1)
        cmocka_set_test_filter(argv[1]);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
