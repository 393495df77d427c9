/*
 * bench - times the library's operations, optimizers and training steps, and
 * what limits them: the processor, the memory, and other people's code.
 *
 *     cc -O2 -I. -o bench tools/bench.c -lm -pthread -ldl
 *
 * bench_kernels.h  peak, bandwidth, the AdamW yardstick
 * bench_nets.h     the networks
 * this file        the rows, how each kind of row is run, measurement, output
 *
 * A row is a kind of work and its sizes; bench_torch.py reads the same rows
 * (--list) and does the same work in PyTorch; compare runs both in turns.
 *
 * Of an operation the forward and backward pass are timed apart. The backward
 * pass begins with a gradient of ones, which it has to write: those bytes count,
 * and bench_torch.py writes them too.
 */
#define _POSIX_C_SOURCE 200809L
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

#include <ctype.h>
#include <dlfcn.h>
#include <errno.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <time.h>

#include "bench_kernels.h"
#include "bench_nets.h"

enum { FIELDS = 11, PHASES = 2, INPUTS = 3, SAMPLES = 20000, LEAST_SAMPLES = 5 };

typedef struct { char name[48]; const char *kind; int64_t p[FIELDS]; } row;
typedef struct work work;

/* A kind of work. `fields` names the row's sizes. An operation has `shape`, which makes its operands and counts its work, and `apply`. */
typedef struct {
    const char *name, *fields, *phase[PHASES];
    bool (*open)(work *w);
    bool (*run)(work *w, double seconds[PHASES]);      /* once */
    void (*shape)(work *w);
    dot_tensor *(*apply)(work *w);
} kind;

/* A row made ready to run. */
struct work {
    const row *of;
    const kind *kind;
    const char *peer;               /* whose code: "" is the library's */
    const int64_t *p;
    int threads;
    double flop[PHASES], bytes[PHASES];     /* of one repetition; 0: not counted */
    int64_t parameters;
    char error[512];
    /* for the library */
    dot_context *ctx;
    dot_layer *layer;
    dot_tensor *in[INPUTS], *labels;
    int inputs;
    dot_optimizer *optimizer;
    net_parts parts[NET_MOST_BLOCKS];
    work *second;                   /* of a pair */
    /* for the others */
    team team;
    bool has_team;
    float *memory, *array[4];
    size_t count;
    int64_t step;
    double team_seconds[2];
    void *library;
};

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool refuse(work *w, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->error, sizeof w->error, format, arguments);
    va_end(arguments);
    return false;
}

/* False, with the library's sentence, if an error stands in the context. */
static bool library_ok(work *w)
{
    if (w->ctx && dot_ok(w->ctx)) return true;
    return refuse(w, "%s", w->ctx ? dot_error(w->ctx) : "no context (out of memory?)");
}

static bool finite_all(const float *x, int64_t n)
{
    float sum = 0;                      /* x - x is 0, or NaN where x is not finite */
    for (int64_t i = 0; i < n; ++i) sum += x[i] - x[i];
    return sum == 0;
}

/* Even numbers in -0.5..0.5, always the same ones. */
static void fill_random(float *x, int64_t n)
{
    uint32_t state = 1;
    for (int64_t i = 0; i < n; ++i) {
        state = state * 1664525u + 1013904223u;
        x[i] = (float)(state >> 8) * 0x1p-24f - 0.5f;
    }
}

static bool open_context(work *w)
{
    dot_context_options o = dot_context_defaults();
    o.threads = w->threads;
    w->ctx = dot_context_create(&o);
    return library_ok(w);
}

/* ---- operations --------------------------------------------------------- */

static dot_tensor *forward_nothing(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user;
    (void)layer;
    return x;
}

static dot_tensor *operand_of(work *w, bool gradient, int rank, const int64_t *shape)
{
    static const char *const names[INPUTS] = { "a", "b", "c" };
    dot_tensor *t = dot_layer_add_parameter(w->layer, names[w->inputs], gradient ? DOT_KIND_WEIGHT : DOT_KIND_BUFFER, rank, shape);
    if (t) fill_random((float *)dot_tensor_data(t, 0), dot_tensor_size(t));
    return w->in[w->inputs++] = t;
}
#define OPERAND(w, gradient, ...) \
    operand_of(w, gradient, (int)(sizeof((int64_t[]){ __VA_ARGS__ }) / sizeof(int64_t)), (const int64_t[]){ __VA_ARGS__ })

static bool open_op(work *w)
{
    if (!open_context(w)) return false;
    w->layer = dot_nn_custom(w->ctx, "operands", forward_nothing, NULL);
    w->kind->shape(w);
    return library_ok(w);
}

/* Bytes that the two passes cannot do without: operands in, results out; the gradients of both, and the ones. */
static void count_bytes(work *w, const dot_tensor *y)
{
    const double out = 4 * (double)dot_tensor_size(y);
    w->bytes[0] = out;
    w->bytes[1] = 2 * out;
    for (int i = 0; i < w->inputs; ++i) {
        const double in = 4 * (double)dot_tensor_size(w->in[i]);
        w->bytes[0] += in;
        w->bytes[1] += dot_tensor_grad(w->in[i]) ? 2 * in : in;
    }
}

static bool gradients_finite(work *w)
{
    for (int i = 0; i < w->inputs; ++i) {
        dot_tensor *g = dot_tensor_grad(w->in[i]);
        if (g && !finite_all((float *)dot_tensor_data(g, 0), dot_tensor_size(g))) return false;
    }
    return true;
}

static bool run_op(work *w, double seconds[PHASES])
{
    dot_zero_grad(w->layer);
    dot_step_begin(w->ctx);
    const double begin = now();
    dot_tensor *y = w->kind->apply(w);
    const double middle = now();
    dot_tensor *loss = dot_tensor_size(y) == 1 ? y : dot_sum(y, DOT_ALL_AXES, false);
    const double again = now();
    dot_backward(loss);
    const double end = now();
    seconds[0] = middle - begin;
    seconds[1] = end - again;
    if (!library_ok(w)) return false;
    if (w->bytes[0] == 0) {             /* the first time */
        count_bytes(w, y);
        if (!isfinite(dot_item(loss, 0)) || !gradients_finite(w)) return refuse(w, "results that are not finite");
    }
    return true;
}

/* Multiply-adds of the forward pass; backward there is one product of the same size for each operand that wants a gradient. */
static void count_products(work *w, double forward, int gradients)
{
    w->flop[0] = 2 * forward;
    w->flop[1] = 2 * forward * gradients;
}

enum { CONV_DIMS, CONV_BATCH, CONV_SIZE, CONV_IN, CONV_OUT, CONV_KERNEL, CONV_STRIDE, CONV_PADDING, CONV_EXTRA, CONV_TRANSPOSED, CONV_FIRST };
static double power_of(int64_t base, int64_t exponent)
{
    double product = 1;
    while (exponent-- > 0) product *= (double)base;
    return product;
}

static void shape_conv(work *w)
{
    const int64_t *p = w->p, s = p[CONV_SIZE], k = p[CONV_KERNEL], in = p[CONV_IN], out = p[CONV_OUT], n = p[CONV_BATCH];
    const bool dx = !p[CONV_FIRST], volume = p[CONV_DIMS] == 3;
    const int64_t a = p[CONV_TRANSPOSED] ? out : in, b = p[CONV_TRANSPOSED] ? in : out;
    if (volume) {
        OPERAND(w, dx, n, s, s, s, in);
        OPERAND(w, true, k, k, k, a, b);
    } else {
        OPERAND(w, dx, n, s, s, in);
        OPERAND(w, true, k, k, a, b);
    }
    OPERAND(w, true, out);
    const int64_t points = p[CONV_TRANSPOSED] ? s : (s + 2 * p[CONV_PADDING] - k) / p[CONV_STRIDE] + 1;
    count_products(w, (double)(n * in * out) * power_of(points * k, p[CONV_DIMS]), dx ? 2 : 1);
}
static dot_tensor *apply_conv(work *w)
{
    const int64_t *p = w->p;
    const dot_conv_options o = net_conv((int)p[CONV_KERNEL], (int)p[CONV_STRIDE], (int)p[CONV_PADDING], (int)p[CONV_EXTRA]);
    return (p[CONV_TRANSPOSED] ? dot_conv_transpose : dot_conv)(w->in[0], w->in[1], w->in[2], &o, DOT_NONE);
}

static void shape_linear(work *w)
{
    const int64_t *p = w->p;
    OPERAND(w, true, p[0], p[1]);
    OPERAND(w, true, p[1], p[2]);
    OPERAND(w, true, p[2]);
    count_products(w, (double)(p[0] * p[1] * p[2]), 2);
}
static dot_tensor *apply_linear(work *w) { return dot_linear(w->in[0], w->in[1], w->in[2], DOT_NONE); }

static void shape_matmul(work *w)
{
    const int64_t *p = w->p;
    OPERAND(w, true, p[0], p[1], p[3]);
    OPERAND(w, true, p[0], p[3], p[2]);
    count_products(w, (double)(p[0] * p[1] * p[2] * p[3]), 2);
}
static dot_tensor *apply_matmul(work *w) { return dot_matmul(w->in[0], w->in[1]); }

static void shape_rows(work *w) { OPERAND(w, true, w->p[0], w->p[1]); }
static dot_tensor *apply_relu(work *w) { return dot_relu(w->in[0]); }
static dot_tensor *apply_sigmoid(work *w) { return dot_sigmoid(w->in[0]); }
static dot_tensor *apply_gelu(work *w) { return dot_gelu(w->in[0]); }
static dot_tensor *apply_softmax(work *w) { return dot_softmax(w->in[0], -1); }

static void shape_norm(work *w)
{
    shape_rows(w);
    OPERAND(w, true, w->p[1]);
    OPERAND(w, true, w->p[1]);
}
static dot_tensor *apply_layer_norm(work *w) { return dot_layer_norm(w->in[0], 1, w->in[1], w->in[2], 1e-5); }
static dot_tensor *apply_batch_norm(work *w) { return dot_batch_norm(w->in[0], w->in[1], w->in[2], NULL, NULL, 0.1, 1e-5); }

static void shape_two(work *w)
{
    shape_rows(w);
    OPERAND(w, true, w->p[0], w->p[1]);
}
static dot_tensor *apply_add(work *w) { return dot_add(w->in[0], w->in[1]); }
static dot_tensor *apply_mse(work *w) { return dot_mse_loss(w->in[0], w->in[1]); }

static void shape_targets(work *w)      /* a target wants no gradient */
{
    shape_rows(w);
    OPERAND(w, false, w->p[0], w->p[1]);
}

static void shape_image(work *w) { OPERAND(w, true, w->p[0], w->p[1], w->p[1], w->p[2]); }
static dot_tensor *apply_mean(work *w) { return dot_mean(w->in[0], DOT_AXIS(1) | DOT_AXIS(2), false); }

static void shape_heads(work *w) { OPERAND(w, true, w->p[0], w->p[1], w->p[2], w->p[3]); }
static dot_tensor *apply_permute(work *w)
{
    static const int axes[4] = { 0, 2, 1, 3 };
    return dot_permute(w->in[0], axes);
}

static dot_tensor *labels_of(work *w, int64_t rows, int64_t classes)
{
    dot_tensor *labels = dot_tensor_create(w->ctx, DOT_I64, 1, &rows);
    int64_t *label = labels ? (int64_t *)dot_tensor_data(labels, 0) : NULL;
    for (int64_t i = 0; label && i < rows; ++i) label[i] = i % classes;
    return labels;
}
static void shape_classes(work *w)
{
    shape_rows(w);
    w->labels = labels_of(w, w->p[0], w->p[1]);
}
static dot_tensor *apply_cross_entropy(work *w) { return dot_cross_entropy_loss(w->in[0], w->labels, 0); }

/* ---- matrix products, with peers ---------------------------------------- */

/* C [m, n] = A B, over k; A or B may be stored transposed. The library's transposed products are those of the backward pass, with
   a gradient of ones. The peers are loaded if they are installed. */
typedef void (*cblas_function)(int order, int ta, int tb, int m, int n, int k, float alpha, const float *a, int lda, const float *b,
                               int ldb, float beta, float *c, int ldc);
enum { GEMM_M, GEMM_N, GEMM_K, GEMM_A, GEMM_B, CBLAS_ROWS = 101, CBLAS_PLAIN = 111, CBLAS_TRANSPOSED = 112 };

static const struct { const char *peer, *file[2], *set_threads; bool wide; } blas_peers[] = {
    { "openblas", { "libopenblas.so.0", "libopenblas.so" }, "openblas_set_num_threads", false },
    { "blis", { "libblis.so.4", "libblis.so" }, "bli_thread_set_num_threads", true },
};
enum { BLAS_PEERS = sizeof blas_peers / sizeof *blas_peers };

static cblas_function cblas_of(void *library)
{
    cblas_function f = NULL;
    *(void **)&f = library ? dlsym(library, "cblas_sgemm") : NULL;     /* POSIX's way from an object's address to a function's */
    return f;
}

static void *open_library(int peer)
{
    void *library = dlopen(blas_peers[peer].file[0], RTLD_NOW | RTLD_LOCAL);
    if (!library) library = dlopen(blas_peers[peer].file[1], RTLD_NOW | RTLD_LOCAL);
    return library;
}

static bool open_arrays(work *w, size_t arrays, size_t count)
{
    const size_t skewed = count + 3152;     /* arrays that are multiples of 4 KB apart fall on the same sets of the caches */
    w->count = count;
    w->memory = (float *)malloc(arrays * skewed * sizeof(float) + 64);
    if (!w->memory) return refuse(w, "out of memory: %zu arrays of %zu floats", arrays, count);
    float *base = w->memory + (64 - (uintptr_t)w->memory % 64) / sizeof(float);
    for (size_t i = 0; i < arrays; ++i) w->array[i] = base + i * skewed;
    return true;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static bool open_gemm(work *w)
{
    const int64_t *p = w->p, m = p[GEMM_M], n = p[GEMM_N], k = p[GEMM_K];
    w->flop[0] = 2 * (double)(m * n * k);
    w->bytes[0] = 4 * (double)(m * k + k * n + m * n);
    if (!*w->peer) {
        if (!open_context(w)) return false;
        w->layer = dot_nn_custom(w->ctx, "operands", forward_nothing, NULL);
        if (p[GEMM_A]) { OPERAND(w, false, k, m); OPERAND(w, true, m, n); }         /* A' C' is the gradient of the second */
        else if (p[GEMM_B]) { OPERAND(w, true, m, n); OPERAND(w, false, n, k); }    /* C' B' that of the first */
        else { OPERAND(w, false, m, k); OPERAND(w, false, k, n); }
        return library_ok(w);
    }
    for (int i = 0; i < BLAS_PEERS; ++i) {
        if (strcmp(blas_peers[i].peer, w->peer) != 0) continue;
        w->library = open_library(i);
        void (*narrow)(int) = NULL;
        void (*wide)(int64_t) = NULL;
        void *set = w->library ? dlsym(w->library, blas_peers[i].set_threads) : NULL;
        if (!set || !cblas_of(w->library)) return refuse(w, "%s cannot be loaded", w->peer);
        *(void **)&narrow = *(void **)&wide = set;
        if (blas_peers[i].wide) wide(w->threads);
        else narrow(w->threads);
    }
    if (!open_arrays(w, 3, larger((size_t)(m * k), larger((size_t)(k * n), (size_t)(m * n))))) return false;
    for (int i = 0; i < 3; ++i) fill_random(w->array[i], (int64_t)w->count);
    return true;
}

static bool run_gemm(work *w, double seconds[PHASES])
{
    const int64_t *p = w->p;
    const int m = (int)p[GEMM_M], n = (int)p[GEMM_N], k = (int)p[GEMM_K];
    double begin = now();
    if (*w->peer) {
        cblas_of(w->library)(CBLAS_ROWS, p[GEMM_A] ? CBLAS_TRANSPOSED : CBLAS_PLAIN, p[GEMM_B] ? CBLAS_TRANSPOSED : CBLAS_PLAIN, m, n, k, 1,
                             w->array[0], p[GEMM_A] ? m : k, w->array[1], p[GEMM_B] ? k : n, 0, w->array[2], n);
        seconds[0] = now() - begin;
        return finite_all(w->array[2], (int64_t)m * n) || refuse(w, "results that are not finite");
    }
    dot_zero_grad(w->layer);
    dot_step_begin(w->ctx);
    begin = now();
    dot_tensor *c = dot_matmul(w->in[0], w->in[1]);
    seconds[0] = now() - begin;
    if (p[GEMM_A] || p[GEMM_B]) {
        dot_tensor *loss = dot_sum(c, DOT_ALL_AXES, false);
        begin = now();
        dot_backward(loss);
        seconds[0] = now() - begin;
        c = dot_tensor_grad(w->in[p[GEMM_A] ? 1 : 0]);
    }
    if (!library_ok(w)) return false;
    return finite_all((float *)dot_tensor_data(c, 0), (int64_t)m * n) || refuse(w, "results that are not finite");
}

/* ---- optimizers --------------------------------------------------------- */

enum { OPTIMIZER_ALGORITHM, OPTIMIZER_TENSORS, OPTIMIZER_ROWS, OPTIMIZER_COLUMNS };

static bool open_optimizer(work *w)
{
    const int64_t *p = w->p, shape[2] = { p[OPTIMIZER_ROWS], p[OPTIMIZER_COLUMNS] };
    w->parameters = p[OPTIMIZER_TENSORS] * shape[0] * shape[1];
    if (*w->peer) {
        w->has_team = team_open(&w->team, w->threads);
        if (!w->has_team) return refuse(w, "no threads");
        if (!open_arrays(w, 4, (size_t)w->parameters)) return false;
        w->bytes[0] = 28 * (double)w->parameters;
        fill_random(w->array[0], w->parameters);
        fill_random(w->array[1], w->parameters);
        for (int i = 2; i < 4; ++i) memset(w->array[i], 0, w->count * sizeof(float));
        return true;
    }
    if (!open_context(w)) return false;
    w->layer = dot_nn_custom(w->ctx, "weights", forward_nothing, NULL);
    for (int i = 0; i < p[OPTIMIZER_TENSORS]; ++i) {
        char name[16];
        snprintf(name, sizeof name, "%d", i);
        dot_tensor *t = dot_layer_add_parameter(w->layer, name, DOT_KIND_WEIGHT, 2, shape);
        if (!t) return library_ok(w);
        fill_random((float *)dot_tensor_data(t, 0), dot_tensor_size(t));
    }
    const dot_optimizer_options o = dot_optimizer_defaults((dot_algorithm)p[OPTIMIZER_ALGORITHM]);
    w->optimizer = dot_optimizer_create(w->ctx, w->layer, &o);
    /* gradient in, weights and state in and out */
    w->bytes[0] = 12 * (double)w->parameters + 2 * (double)dot_optimizer_bytes(w->layer, &o);
    return library_ok(w);
}

static void yardstick(void *argument, int member, int members)
{
    work *w = (work *)argument;
    const size_t from = team_part(w->count, member, members), to = team_part(w->count, member + 1, members);
    const adamw_numbers k = adamw_at(w->step);
    adamw(w->array[0] + from, w->array[1] + from, w->array[2] + from, w->array[3] + from, to - from, &k);
}

/* The gradients come from a loss that pulls all weights to 0, so slowly that no rule diverges. */
static bool run_optimizer(work *w, double seconds[PHASES])
{
    if (*w->peer) {
        ++w->step;
        const double begin = now();
        team_run(&w->team, yardstick, w);
        seconds[0] = now() - begin;
        return w->step > 1 || finite_all(w->array[0], w->parameters) || refuse(w, "results that are not finite");
    }
    dot_step_begin(w->ctx);
    dot_tensor *loss = NULL;
    dot_parameter_info info;
    for (int i = 0; i < w->p[OPTIMIZER_TENSORS] && dot_layer_parameter(w->layer, i, &info); ++i) {
        dot_tensor *part = dot_sum(dot_square(info.tensor), DOT_ALL_AXES, false);
        loss = loss ? dot_add(loss, part) : part;
    }
    loss = dot_mul_scalar(loss, 1e-3);
    dot_backward(loss);
    dot_optimizer_loss(w->optimizer, loss);
    const double begin = now();
    dot_optimizer_step(w->optimizer, 1e-3);
    seconds[0] = now() - begin;
    if (!library_ok(w)) return false;
    return isfinite(dot_item(loss, 0)) || refuse(w, "a loss that is not finite");
}

/* ---- training steps ----------------------------------------------------- */

enum { NET_WHICH, NET_BATCH };
static const struct { const char *name; net_function make; int rank; int64_t shape[4]; int64_t classes; double multiply_adds; } nets[] = {
    /* multiply_adds: of an example, forward and backward, every tap counted, without the gradient of the input */
    { "ae", net_autoencoder, 3, { 28, 28, 1 }, 0, 8109696 },
    { "ae3d", net_autoencoder3d, 4, { 32, 32, 32, 2 }, 0, 92012544 },
    { "mlp", net_mlp, 1, { 784 }, 0, 788480 },
    { "transformer", net_transformer, 2, { NET_SEQUENCE, NET_WIDTH }, 0, 4227858432.0 },
    { "resnet18", net_resnet18, 3, { 32, 32, 3 }, 10, 1664498688 },
};
enum { NETS = sizeof nets / sizeof *nets };
enum { NET_AE, NET_AE3D, NET_MLP, NET_TRANSFORMER, NET_RESNET18 };

static bool open_net(work *w)
{
    const int which = (int)w->p[NET_WHICH];
    int64_t shape[DOT_MAX_RANK] = { w->p[NET_BATCH] };
    for (int i = 0; i < nets[which].rank; ++i) shape[i + 1] = nets[which].shape[i];
    if (!open_context(w)) return false;
    w->layer = nets[which].make(w->ctx, w->parts);
    w->in[0] = dot_tensor_create(w->ctx, DOT_F32, nets[which].rank + 1, shape);
    if (nets[which].classes) w->labels = labels_of(w, w->p[NET_BATCH], nets[which].classes);
    w->optimizer = dot_optimizer_create(w->ctx, w->layer, NULL);        /* AdamW */
    if (!library_ok(w)) return false;
    float *x = (float *)dot_tensor_data(w->in[0], 0);
    fill_random(x, dot_tensor_size(w->in[0]));
    for (int64_t i = 0; i < dot_tensor_size(w->in[0]); ++i) x[i] += 0.5f;
    w->flop[0] = 2 * nets[which].multiply_adds * (double)w->p[NET_BATCH];
    w->parameters = dot_layer_parameter_count(w->layer);
    return true;
}

static bool run_net(work *w, double seconds[PHASES])
{
    const double begin = now();
    dot_step_begin(w->ctx);
    dot_tensor *y = dot_forward(w->layer, w->in[0]);
    dot_tensor *loss = w->labels ? dot_cross_entropy_loss(y, w->labels, 0) : dot_mse_loss(y, w->in[0]);
    dot_backward(loss);
    dot_optimizer_step(w->optimizer, 1);
    seconds[0] = now() - begin;
    if (!library_ok(w)) return false;
    return isfinite(dot_item(loss, 0)) || refuse(w, "a loss that is not finite");
}

/* Two contexts of one thread each, side by side: time until both have done one step. */
static bool open_pair(work *w)
{
    if (w->threads != 2) return refuse(w, "a pair runs on 2 threads");
    w->has_team = team_open(&w->team, 2);
    w->second = (work *)calloc(1, sizeof *w->second);
    if (!w->has_team || !w->second) return refuse(w, "no threads or memory");
    w->second->kind = w->kind;
    w->second->p = w->p;
    w->second->threads = w->threads = 1;
    if (!open_net(w->second)) return refuse(w, "%s", w->second->error);
    if (!open_net(w)) return false;
    w->threads = 2;
    w->flop[0] *= 2;
    return true;
}

static void pair_task(void *argument, int member, int members)
{
    work *w = (work *)argument;
    double seconds[PHASES];
    (void)members;
    w->team_seconds[member] = run_net(member ? w->second : w, seconds) ? seconds[0] : -1;
}

static bool run_pair(work *w, double seconds[PHASES])
{
    team_run(&w->team, pair_task, w);
    seconds[0] = w->team_seconds[w->team_seconds[1] > w->team_seconds[0]];
    return w->team_seconds[0] > 0 && (w->team_seconds[1] > 0 || refuse(w, "%s", w->second->error));
}

/* ---- the machine's limits ----------------------------------------------- */

static volatile float fma_sink[TEAM_MOST];
static void fma_task(void *argument, int member, int members)
{
    (void)members;
    fma_sink[member] = ((const fma_kernel *)argument)->run();
}

static bool open_fma(work *w)
{
    w->flop[0] = fma_best().flop * w->threads;
    w->has_team = team_open(&w->team, w->threads);
    return w->has_team || refuse(w, "no threads");
}

static bool run_fma(work *w, double seconds[PHASES])
{
    fma_kernel kernel = fma_best();
    const double begin = now();
    team_run(&w->team, fma_task, &kernel);
    seconds[0] = now() - begin;
    return true;
}

static bool open_triad(work *w)
{
    w->has_team = team_open(&w->team, w->threads);
    if (!w->has_team) return refuse(w, "no threads");
    if (!open_arrays(w, 3, (size_t)w->p[0])) return false;
    for (int i = 0; i < 3; ++i) memset(w->array[i], 0, w->count * sizeof(float));
    w->bytes[0] = 12 * (double)w->count;
    return true;
}

static void triad_task(void *argument, int member, int members)
{
    work *w = (work *)argument;
    const size_t from = team_part(w->count, member, members), to = team_part(w->count, member + 1, members);
    triad(w->array[0] + from, w->array[1] + from, w->array[2] + from, to - from, w->p[1] != 0);
}

static bool run_triad(work *w, double seconds[PHASES])
{
    const double begin = now();
    team_run(&w->team, triad_task, w);
    seconds[0] = now() - begin;
    return true;
}

/* ---- kinds and rows ----------------------------------------------------- */

#define OP(shape, apply) { "forward", "backward" }, open_op, run_op, shape, apply
static const kind kinds[] = {
    { "fma", "", { "run" }, open_fma, run_fma, NULL, NULL },
    { "triad", "count streaming", { "run" }, open_triad, run_triad, NULL, NULL },
    { "gemm", "m n k a_transposed b_transposed", { "product" }, open_gemm, run_gemm, NULL, NULL },
    { "conv", "dims batch size in out kernel stride padding output_padding transposed first", OP(shape_conv, apply_conv) },
    { "linear", "rows in out", OP(shape_linear, apply_linear) },
    { "matmul", "batch m n k", OP(shape_matmul, apply_matmul) },
    { "relu", "rows columns", OP(shape_rows, apply_relu) },
    { "sigmoid", "rows columns", OP(shape_rows, apply_sigmoid) },
    { "gelu", "rows columns", OP(shape_rows, apply_gelu) },
    { "softmax", "rows columns", OP(shape_rows, apply_softmax) },
    { "layer_norm", "rows columns", OP(shape_norm, apply_layer_norm) },
    { "batch_norm", "rows columns", OP(shape_norm, apply_batch_norm) },
    { "add", "rows columns", OP(shape_two, apply_add) },
    { "mse", "rows columns", OP(shape_targets, apply_mse) },
    { "cross_entropy", "rows columns", OP(shape_classes, apply_cross_entropy) },
    { "pool", "batch size channels", OP(shape_image, apply_mean) },
    { "permute", "batch rows columns width", OP(shape_heads, apply_permute) },
    { "optimizer", "algorithm tensors rows columns", { "step" }, open_optimizer, run_optimizer, NULL, NULL },
    { "net", "which batch", { "step" }, open_net, run_net, NULL, NULL },
    { "pair", "which batch", { "step" }, open_pair, run_pair, NULL, NULL },
};
enum { KINDS = sizeof kinds / sizeof *kinds };

static const row fixed_rows[] = {
    { "peak/fma", "fma", { 0 } },
    { "peak/triad", "triad", { 32000000, 0 } },
    { "peak/triad-streaming", "triad", { 32000000, 1 } },

    { "gemm/conv2", "gemm", { 64, 6272, 288 } },
    { "gemm/conv2-data", "gemm", { 288, 6272, 64 } },
    { "gemm/conv2-weight", "gemm", { 64, 288, 6272 } },
    { "gemm/conv1", "gemm", { 32, 25088, 9 } },
    { "gemm/conv1-weight", "gemm", { 32, 9, 25088 } },
    { "gemm/fc1", "gemm", { 128, 128, 3136 } },
    { "gemm/fc1-data", "gemm", { 128, 3136, 128 } },
    { "gemm/fc1-weight", "gemm", { 128, 3136, 128, 1, 0 } },
    { "gemm/fc2", "gemm", { 128, 3136, 128, 0, 1 } },
    { "gemm/fc2-data", "gemm", { 128, 128, 3136 } },
    { "gemm/fc2-weight", "gemm", { 3136, 128, 128 } },
    { "gemm/conv2-image", "gemm", { 64, 49, 288 } },
    { "gemm/1024", "gemm", { 1024, 1024, 1024 } },
    { "gemm/ff1", "gemm", { 2048, 1024, 256 } },
    { "gemm/scores", "gemm", { 256, 256, 32 } },

    { "ae/conv1", "conv", { 2, 128, 28, 1, 32, 3, 2, 1, 0, 0, 1 } },
    { "ae/conv2", "conv", { 2, 128, 14, 32, 64, 3, 2, 1, 0, 0, 0 } },
    { "ae/fc1", "linear", { 128, 3136, 128 } },
    { "ae/fc2", "linear", { 128, 128, 3136 } },
    { "ae/convt1", "conv", { 2, 128, 7, 64, 32, 3, 2, 1, 1, 1, 0 } },
    { "ae/convt2", "conv", { 2, 128, 14, 32, 1, 3, 2, 1, 1, 1, 0 } },
    { "ae/relu", "relu", { 128 * 196, 32 } },
    { "ae/sigmoid", "sigmoid", { 128, 784 } },
    { "ae/mse", "mse", { 128, 784 } },

    { "ae3d/conv1", "conv", { 3, 8, 32, 2, 16, 3, 2, 1, 0, 0, 1 } },
    { "ae3d/conv2", "conv", { 3, 8, 16, 16, 32, 3, 2, 1, 0, 0, 0 } },
    { "ae3d/conv3", "conv", { 3, 8, 8, 32, 64, 3, 2, 1, 0, 0, 0 } },
    { "ae3d/conv4", "conv", { 3, 8, 4, 64, 128, 3, 2, 1, 0, 0, 0 } },
    { "ae3d/convt1", "conv", { 3, 8, 2, 128, 64, 3, 2, 1, 1, 1, 0 } },
    { "ae3d/convt2", "conv", { 3, 8, 4, 64, 32, 3, 2, 1, 1, 1, 0 } },
    { "ae3d/convt3", "conv", { 3, 8, 8, 32, 16, 3, 2, 1, 1, 1, 0 } },
    { "ae3d/convt4", "conv", { 3, 8, 16, 16, 2, 3, 2, 1, 1, 1, 0 } },
    { "ae3d/relu", "relu", { 8 * 4096, 16 } },
    { "ae3d/mse", "mse", { 8, 65536 } },

    { "transformer/layer_norm", "layer_norm", { 2048, 256 } },
    { "transformer/qkv", "linear", { 2048, 256, 768 } },
    { "transformer/split", "permute", { 8, 256, 8, 32 } },
    { "transformer/scores", "matmul", { 64, 256, 256, 32 } },
    { "transformer/softmax", "softmax", { 64 * 256, 256 } },
    { "transformer/context", "matmul", { 64, 256, 32, 256 } },
    { "transformer/out", "linear", { 2048, 256, 256 } },
    { "transformer/add", "add", { 2048, 256 } },
    { "transformer/ff1", "linear", { 2048, 256, 1024 } },
    { "transformer/gelu", "gelu", { 2048, 1024 } },
    { "transformer/ff2", "linear", { 2048, 1024, 256 } },

    { "resnet18/conv1", "conv", { 2, 32, 32, 3, 64, 3, 1, 1, 0, 0, 1 } },
    { "resnet18/layer1", "conv", { 2, 32, 32, 64, 64, 3, 1, 1, 0, 0, 0 } },
    { "resnet18/layer2-half", "conv", { 2, 32, 32, 64, 128, 3, 2, 1, 0, 0, 0 } },
    { "resnet18/layer2-short", "conv", { 2, 32, 32, 64, 128, 1, 2, 0, 0, 0, 0 } },
    { "resnet18/layer2", "conv", { 2, 32, 16, 128, 128, 3, 1, 1, 0, 0, 0 } },
    { "resnet18/layer3-half", "conv", { 2, 32, 16, 128, 256, 3, 2, 1, 0, 0, 0 } },
    { "resnet18/layer3", "conv", { 2, 32, 8, 256, 256, 3, 1, 1, 0, 0, 0 } },
    { "resnet18/layer4-half", "conv", { 2, 32, 8, 256, 512, 3, 2, 1, 0, 0, 0 } },
    { "resnet18/layer4", "conv", { 2, 32, 4, 512, 512, 3, 1, 1, 0, 0, 0 } },
    { "resnet18/batch_norm1", "batch_norm", { 32 * 1024, 64 } },
    { "resnet18/batch_norm4", "batch_norm", { 32 * 16, 512 } },
    { "resnet18/relu", "relu", { 32 * 1024, 64 } },
    { "resnet18/add", "add", { 32 * 1024, 64 } },
    { "resnet18/pool", "pool", { 32, 4, 512 } },
    { "resnet18/fc", "linear", { 32, 512, 10 } },
    { "resnet18/cross_entropy", "cross_entropy", { 32, 10 } },

    { "adamw/1M", "optimizer", { DOT_ADAMW, 1, 1000, 1000 } },
    { "adamw/10M", "optimizer", { DOT_ADAMW, 1, 10000, 1000 } },
    { "adamw/10M-64-tensors", "optimizer", { DOT_ADAMW, 64, 625, 250 } },
    { "adamw/100M", "optimizer", { DOT_ADAMW, 1, 10000, 10000 } },

    { "step/ae", "net", { NET_AE, 128 } },
    { "step/ae3d", "net", { NET_AE3D, 8 } },
    { "step/mlp", "net", { NET_MLP, 128 } },
    { "step/transformer", "net", { NET_TRANSFORMER, 8 } },
    { "step/resnet18", "net", { NET_RESNET18, 32 } },
    { "pair/ae", "pair", { NET_AE, 128 } },
};

/* The rows above, those of the peers ("gemm/1024@blis"), and one for each optimizer. */
typedef struct { row *at; int count; } row_list;

static void add_row(row_list *rows, row r)
{
    row *grown = (row *)realloc(rows->at, ((size_t)rows->count + 1) * sizeof r);
    if (!grown) {
        fprintf(stderr, "bench: out of memory\n");
        exit(1);
    }
    rows->at = grown;
    rows->at[rows->count++] = r;
}

static void add_peer(row_list *rows, row r, const char *peer)
{
    const size_t length = strlen(r.name);
    snprintf(r.name + length, sizeof r.name - length, "@%s", peer);
    add_row(rows, r);
}

static row_list all_rows(void)
{
    row_list rows = { NULL, 0 };
    for (size_t i = 0; i < sizeof fixed_rows / sizeof *fixed_rows; ++i) {
        const row r = fixed_rows[i];
        add_row(&rows, r);
        if (strcmp(r.kind, "optimizer") == 0) add_peer(&rows, r, "yardstick");
        for (int k = 0; k < BLAS_PEERS && strcmp(r.kind, "gemm") == 0; ++k)
            if (open_library(k)) add_peer(&rows, r, blas_peers[k].peer);
    }
    for (int a = 0; a < DOT_CUSTOM; ++a) {
        row r = { "", "optimizer", { a, 16, 256, 256 } };
        snprintf(r.name, sizeof r.name, "optimizer/%s", dot_algorithm_name((dot_algorithm)a));
        add_row(&rows, r);
    }
    return rows;
}

static const kind *find_kind(const char *name)      /* there is one: the tables above are all */
{
    int i = 0;
    while (i < KINDS - 1 && strcmp(kinds[i].name, name) != 0) ++i;
    return &kinds[i];
}

/* One row a line: name, kind, sizes. What is a number in the table and has a name gets its name. */
static void print_row(const row *r)
{
    const char *field = find_kind(r->kind)->fields;
    printf("%s %s", r->name, r->kind);
    for (int i = 0; *field; ++i) {
        const int length = (int)strcspn(field, " ");
        printf(" %.*s=", length, field);
        if (strncmp(field, "algorithm", 9) == 0) printf("%s", dot_algorithm_name((dot_algorithm)r->p[i]));
        else if (strncmp(field, "which", 5) == 0) printf("%s", nets[r->p[i]].name);
        else printf("%lld", (long long)r->p[i]);
        field += length + (field[length] == ' ');
    }
    printf("\n");
}

/* ---- measurement -------------------------------------------------------- */

typedef struct { double median, best, spread; int count; } summary;     /* seconds; spread: quartile distance over median */

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static summary summarize(double *t, int n)
{
    qsort(t, (size_t)n, sizeof *t, by_value);
    const double median = n % 2 ? t[n / 2] : (t[n / 2 - 1] + t[n / 2]) / 2;
    return (summary){ median, t[0], (t[n - 1 - n / 4] - t[n / 4]) / median, n };
}

static void work_close(work *w)
{
    if (!w) return;
    if (w->second) work_close(w->second);
    if (w->has_team) team_close(&w->team);
    dot_context_destroy(w->ctx);
    free(w->memory);
    free(w);
}

/* NULL after a message in `error`. */
static work *work_open(const row *r, int threads, char *error, size_t size)
{
    work *w = (work *)calloc(1, sizeof *w);
    if (!w) {
        snprintf(error, size, "out of memory");
        return NULL;
    }
    const char *at = strchr(r->name, '@');
    w->of = r;
    w->kind = find_kind(r->kind);
    w->p = r->p;
    w->peer = at ? at + 1 : "";
    w->threads = threads;
    if (w->kind->open(w)) return w;
    snprintf(error, size, "%s", w->error);
    work_close(w);
    return NULL;
}

/* Repeats for so many seconds, after a tenth of them to warm up: LEAST_SAMPLES times at least, or twice where that takes long. */
static bool measure(work *w, double seconds, summary result[PHASES])
{
    static double t[PHASES][SAMPLES];
    double once[PHASES] = { 0, 0 };
    int n = 0;
    for (double begin = now(), spent = 0; spent < seconds / 10 || (n < 2 && spent < seconds); spent = now() - begin, ++n)
        if (!w->kind->run(w, once)) return false;
    n = 0;
    for (double begin = now(), spent = 0; n < SAMPLES && (spent < seconds || n < (spent > 4 * seconds ? 2 : LEAST_SAMPLES)); ++n) {
        if (!w->kind->run(w, once)) return false;
        for (int i = 0; i < PHASES; ++i) t[i][n] = once[i];
        spent = now() - begin;
    }
    for (int i = 0; i < PHASES; ++i) result[i] = summarize(t[i], n);
    return true;
}

/* ---- output ------------------------------------------------------------- */

typedef struct { double gflops, gbps; } limits;

static const char *library_kernels(void)
{
    static char name[16];
    dot_context *ctx = dot_context_create(NULL);
    snprintf(name, sizeof name, "%s", ctx ? dot_kernels(ctx) : "?");
    dot_context_destroy(ctx);
    return name;
}

static void write_json(FILE *f, const work *w, int phase, const summary *s)
{
    fprintf(f, "{\"name\": \"%s\", \"phase\": \"%s\", \"threads\": %d, \"median\": %.9g, \"best\": %.9g, \"spread\": %.3g, "
            "\"repetitions\": %d, \"flop\": %.17g, \"bytes\": %.17g, \"parameters\": %lld, \"setting\": \"%s\"}",
            w->of->name, w->kind->phase[phase], w->threads, s->median, s->best, s->spread, s->count, w->flop[phase], w->bytes[phase],
            (long long)w->parameters, *w->peer ? w->peer : library_kernels());
}

static void print_header(void)
{
    printf("%-32s %-8s %3s %11s %11s %7s %9s %7s %9s %7s\n", "row", "phase", "thr", "median ms", "best ms", "spread", "GFLOP/s", "of peak",
           "GB/s", "of triad");
}

static void print_rate(double amount, double seconds, double limit)
{
    if (amount <= 0) {
        printf(" %9s %7s", "", "");
        return;
    }
    printf(" %9.1f", amount / seconds * 1e-9);
    if (limit > 0) printf(" %6.1f%%", 100 * amount / seconds * 1e-9 / limit);
    else printf(" %7s", "");
}

static void print_result(const work *w, int phase, const summary *s, limits peak)
{
    printf("%-32s %-8s %3d %11.4f %11.4f %6.1f%%", w->of->name, w->kind->phase[phase], w->threads, s->median * 1e3, s->best * 1e3,
           s->spread * 100);
    print_rate(w->flop[phase], s->median, peak.gflops);
    print_rate(w->bytes[phase], s->median, peak.gbps);
    printf("\n");
    fflush(stdout);
}

/* ---- options and runs --------------------------------------------------- */

typedef struct {
    const char *only, *json;
    int threads;                /* 0: 1, then 2 */
    double seconds;
    bool list, serve;
} options;

static void usage_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, "bench: ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (--help lists the options)\n");
    va_end(arguments);
    exit(2);
}

static void print_help(void)
{
    printf("usage: bench [OPTIONS]\n\n"
           "Times operations, optimizers and training steps, and the machine's limits.\n\n"
           "  --list          print the rows with their sizes\n"
           "  --only PATTERN  rows whose name contains PATTERN, or matches it (*, ?)\n"
           "  --threads N     threads, 1 to %d (1, then 2 if there are as many cores)\n"
           "  --seconds S     time for each row (1)\n"
           "  --json FILE     write the results there as well; -: to standard output, alone\n"
           "  --serve         read names of rows, one a line, and answer each with a line of JSON\n"
           "  --help          print this\n\n"
           "Times are medians over the repetitions; best: the shortest; spread: the distance of the\n"
           "quartiles over the median. GFLOP/s count every tap of a convolution; GB/s the bytes that\n"
           "an operation cannot do without. of peak: of multiply-adds in registers with the same\n"
           "threads; of triad: of a = b + 3c in memory (above 100%% what the caches hold).\n"
           "name@peer is other people's code: OpenBLAS and BLIS where they are installed, and a\n"
           "single-pass AdamW in AVX2. Exit status: 0 done, 1 failure, 2 usage.\n", TEAM_MOST);
}

static double number_of(const char *name, const char *text, double least, double most)
{
    char *end;
    const double value = isdigit((unsigned char)*text) || *text == '.' ? strtod(text, &end) : -1;
    if (value < least || value > most || *end) usage_error("%s: '%s' is no number from %g to %g", name, text, least, most);
    return value;
}

static void parse_options(options *o, int argc, char **argv)
{
    *o = (options){ "", NULL, 0, 1, false, false };
    for (int i = 1; i < argc; ++i) {
        const char *name = argv[i];
        if (strcmp(name, "--help") == 0 || strcmp(name, "-h") == 0) {
            print_help();
            exit(0);
        }
        if (strcmp(name, "--list") == 0) o->list = true;
        else if (strcmp(name, "--serve") == 0) o->serve = true;
        else if (strcmp(name, "--only") && strcmp(name, "--threads") && strcmp(name, "--seconds") && strcmp(name, "--json"))
            usage_error("'%s' is no option", name);
        else {
            const char *value = argv[++i];
            if (!value) usage_error("%s needs a value", name);
            if (strcmp(name, "--only") == 0) o->only = value;
            else if (strcmp(name, "--json") == 0) o->json = value;
            else if (strcmp(name, "--seconds") == 0) o->seconds = number_of(name, value, 0.001, 3600);
            else {
                o->threads = (int)number_of(name, value, 1, TEAM_MOST);
                if (o->threads != number_of(name, value, 1, TEAM_MOST)) usage_error("--threads: '%s' is no whole number", value);
            }
        }
    }
}

static bool chosen(const options *o, const row *r)
{
    return strstr(r->name, o->only) || fnmatch(o->only, r->name, 0) == 0;
}

/* The machine's limits with so many threads, quickly. */
static limits measure_limits(int threads, double seconds)
{
    limits found = { 0, 0 };
    for (int i = 0; i < 2; ++i) {       /* the first two rows */
        char error[512];
        summary s[PHASES];
        work *w = work_open(&fixed_rows[i], threads, error, sizeof error);
        if (w && measure(w, seconds, s)) {
            if (w->flop[0] > 0) found.gflops = w->flop[0] / s[0].best * 1e-9;
            else found.gbps = w->bytes[0] / s[0].best * 1e-9;
        }
        work_close(w);
    }
    return found;
}

/* Runs one row and says what came of it. False after an error. */
static bool run_row(const options *o, const row *r, int threads, limits peak, FILE *json, bool *first)
{
    char error[512];
    summary s[PHASES];
    work *w = work_open(r, threads, error, sizeof error);
    bool ok = w && measure(w, o->seconds, s);
    if (!ok) fprintf(stderr, "bench: %s: %s\n", r->name, w ? w->error : error);
    for (int i = 0; ok && i < PHASES && w->kind->phase[i]; ++i) {
        if (json != stdout) print_result(w, i, &s[i], peak);
        if (json) {
            fprintf(json, *first ? "\n" : ",\n");
            write_json(json, w, i, &s[i]);
            *first = false;
        }
    }
    work_close(w);
    return ok;
}

static bool run_rows(const options *o, const row_list *rows, int threads, FILE *json, bool *first)
{
    bool ok = true;
    const limits peak = measure_limits(threads, o->seconds < 0.2 ? o->seconds : 0.2);
    for (int i = 0; i < rows->count; ++i)
        if (chosen(o, &rows->at[i]) && (threads == 2 || strcmp(rows->at[i].kind, "pair") != 0))
            ok = run_row(o, &rows->at[i], threads, peak, json, first) && ok;
    return ok;
}

/* Answers each line with an array of results, or with {"error": ...}. The row that was asked for last stays ready. */
static bool serve(const options *o, const row_list *rows)
{
    char line[256], error[512];
    summary s[PHASES];
    work *w = NULL;
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\r\n")] = 0;
        int i = 0;
        while (i < rows->count && strcmp(rows->at[i].name, line) != 0) ++i;
        snprintf(error, sizeof error, "there is no such row");
        if (!w || strcmp(w->of->name, line) != 0) {
            work_close(w);
            w = i < rows->count ? work_open(&rows->at[i], o->threads ? o->threads : 1, error, sizeof error) : NULL;
        }
        if (w && measure(w, o->seconds, s)) {
            printf("[");
            for (int k = 0; k < PHASES && w->kind->phase[k]; ++k) {
                printf(k ? ", " : "");
                write_json(stdout, w, k, &s[k]);
            }
            printf("]\n");
        } else {
            const char *text = w ? w->error : error;
            printf("{\"error\": \"");
            for (; *text; ++text) putchar(*text == '"' || *text == '\\' || (unsigned char)*text < 32 ? '\'' : *text);
            printf("\"}\n");
        }
        fflush(stdout);
    }
    work_close(w);
    return true;
}

/* Runs the chosen rows and writes the results. */
static bool run_all(const options *o, const row_list *rows)
{
    const bool alone = o->json && strcmp(o->json, "-") == 0;
    FILE *json = alone ? stdout : o->json ? fopen(o->json, "w") : NULL;
    if (o->json && !json) {
        fprintf(stderr, "bench: cannot write %s: %s\n", o->json, strerror(errno));
        return false;
    }
    bool ok = true, first = true;
    if (json) fprintf(json, "{\"program\": \"dotopt %s\", \"kernels\": \"%s\", \"results\": [", DOTOPT_VERSION, library_kernels());
    if (!alone) {
        printf("dotopt %s, kernels %s; peak measured with %s\n", DOTOPT_VERSION, library_kernels(), fma_best().name);
        print_header();
    }
    const int last = o->threads ? o->threads : dot_context_defaults().threads < 2 ? 1 : 2;
    for (int threads = o->threads ? o->threads : 1; threads <= last; ++threads) ok = run_rows(o, rows, threads, json, &first) && ok;
    if (json) fprintf(json, "\n]}\n");
    if (json && (fflush(json) || (json != stdout && fclose(json)))) {
        fprintf(stderr, "bench: cannot write %s: %s\n", o->json, strerror(errno));
        ok = false;
    }
    return ok;
}

int main(int argc, char **argv)
{
    options o;
    parse_options(&o, argc, argv);
    const row_list rows = all_rows();
    int found = 0;
    for (int i = 0; i < rows.count; ++i) {
        if (!chosen(&o, &rows.at[i])) continue;
        ++found;
        if (o.list) print_row(&rows.at[i]);
    }
    if (!found) usage_error("--only: no row is called '%s'", o.only);
    const bool ok = o.list || (o.serve ? serve(&o, &rows) : run_all(&o, &rows));
    free(rows.at);
    return ok ? 0 : 1;
}
