/* test_errors.c - one row per misuse: the status, the sentence, that nothing changed, and that the error sticks. */
#include "dotopt.h"

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "nets.h"

#define BIG (INT64_C(1) << 62)
#define BIG_TEXT "4611686018427387904"
#define SHAPE(...) ((const int64_t[]){ __VA_ARGS__ })
#define LENGTH(array) ((int)(sizeof(array) / sizeof *(array)))

/* Sets of statuses: one, where the interface says which; several, where it leaves the choice. */
enum {
    ARGUMENT = 1 << DOT_ERROR_ARGUMENT, SHAPES = 1 << DOT_ERROR_SHAPE, DTYPE = 1 << DOT_ERROR_DTYPE,
    STATE = 1 << DOT_ERROR_STATE, MEMORY = 1 << DOT_ERROR_MEMORY, NO_FILE = 1 << DOT_ERROR_FILE,
    FORMAT = 1 << DOT_ERROR_FORMAT, SIZES = ARGUMENT | SHAPES | MEMORY,
    NONE = 1 << DOT_OK, ANY = 0xfe
};

/* ---- the objects that are misused ------------------------------------------------------------------------------- */

typedef struct fixture {
    dot_context *ctx, *other;
    /* Step tensors, of the context's type if not said otherwise. */
    dot_tensor *x;          /* [2, 3], no gradient */
    dot_tensor *wide;       /* [2, 17] */
    dot_tensor *image;      /* [2, 8, 8, 4] */
    dot_tensor *empty;      /* [0, 3] */
    dot_tensor *integers;   /* DOT_I64 [2], classes of x */
    dot_tensor *bytes;      /* DOT_U8 [2, 3] */
    dot_tensor *twin;       /* the other float type [2, 3] */
    dot_tensor *foreign;    /* [2, 3] of the other context */
    /* Persistent ones, with gradient. */
    dot_tensor *weight;     /* [3, 4] */
    dot_tensor *v3, *v4, *v17;
    dot_tensor *kernels;    /* [3, 3, 4, 4] */
    dot_tensor *foreign_v3, *foreign_v4, *foreign_weight, *foreign_kernels, *foreign_integers;

    dot_layer *net, *foreign_net;       /* 3 -> 4 -> 3 */
    dot_optimizer *optimizer, *foreign_optimizer;
    dot_dataset *data, *unlabelled;
    uint64_t fingerprint;               /* before the row */
} fixture;

static int rows, wrong_rows;

static uint8_t records[4 * 6] = { 0, 50, 100, 150, 200, 255, 1, 2, 3 }, record_labels[4] = { 3, 1, 4, 1 };

/* The step's tensors; they must be made anew after dot_eval_begin. */
static void make_step_tensors(fixture *f)
{
    static const float zeros[2 * 8 * 8 * 4] = { 0 };
    static const double other_zeros[6] = { 0 };
    static const float values[6] = { 1, 2, 3, 4, 5, 6 };
    static const int64_t classes[2] = { 1, 2 };
    dot_step_begin(f->ctx);
    dot_step_begin(f->other);
    f->x = dot_input(f->ctx, DOT_F32, 2, SHAPE(2, 3), values);
    f->wide = dot_input(f->ctx, DOT_F32, 2, SHAPE(2, 17), zeros);
    f->image = dot_input(f->ctx, DOT_F32, 4, SHAPE(2, 8, 8, 4), zeros);
    f->empty = dot_input(f->ctx, DOT_F32, 2, SHAPE(0, 3), zeros);
    f->integers = dot_input(f->ctx, DOT_I64, 1, SHAPE(2), classes);
    f->bytes = dot_input(f->ctx, DOT_U8, 2, SHAPE(2, 3), zeros);
    f->twin = dot_input(f->ctx, DOT_F64, 2, SHAPE(2, 3), other_zeros);
    f->foreign = dot_input(f->other, DOT_F32, 2, SHAPE(2, 3), values);
    f->foreign_integers = dot_input(f->other, DOT_I64, 1, SHAPE(2), classes);
}

static dot_tensor *parameter(dot_context *ctx, int rank, const int64_t *shape)
{
    return dot_requires_grad(dot_tensor_create(ctx, DOT_F32, rank, shape), true);
}

static dot_layer *small_net(dot_context *ctx)
{
    return dot_nn_sequential(ctx, dot_nn_linear(ctx, 3, 4), dot_nn_tanh(ctx), dot_nn_linear(ctx, 4, 3), NULL);
}

/* No more than a small machine has: what asks for more is refused, whatever the system here would promise. */
static void *modest_allocate(void *user, size_t bytes)
{
    (void)user;
    return bytes > ((size_t)1 << 30) ? NULL : malloc(bytes);
}

static void modest_release(void *user, void *memory, size_t bytes)
{
    (void)user, (void)bytes;
    free(memory);
}

static int open_fixture(void **state)
{
    fixture *f = (fixture *)calloc(1, sizeof *f);
    dot_context_options co = dot_context_defaults();
    co.lanes = 2;
    co.threads = 2;
    co.allocator.allocate = modest_allocate;
    co.allocator.release = modest_release;
    f->ctx = dot_context_create(&co);
    f->other = dot_context_create(&co);
    f->weight = parameter(f->ctx, 2, SHAPE(3, 4));
    f->v3 = parameter(f->ctx, 1, SHAPE(3));
    f->v4 = parameter(f->ctx, 1, SHAPE(4));
    f->v17 = parameter(f->ctx, 1, SHAPE(17));
    f->kernels = parameter(f->ctx, 4, SHAPE(3, 3, 4, 4));
    f->foreign_weight = parameter(f->other, 2, SHAPE(3, 4));
    f->foreign_v3 = parameter(f->other, 1, SHAPE(3));
    f->foreign_v4 = parameter(f->other, 1, SHAPE(4));
    f->foreign_kernels = parameter(f->other, 4, SHAPE(3, 3, 4, 4));
    f->net = small_net(f->ctx);
    f->foreign_net = small_net(f->other);
    f->optimizer = dot_optimizer_create(f->ctx, f->net, NULL);
    f->foreign_optimizer = dot_optimizer_create(f->other, f->foreign_net, NULL);
    f->data = dot_dataset_memory(f->ctx, records, record_labels, 4, 3, SHAPE(2, 3, 1), NULL);
    f->unlabelled = dot_dataset_memory(f->ctx, records, NULL, 4, 3, SHAPE(2, 3, 1), NULL);
    make_step_tensors(f);
    *state = f;
    if (dot_ok(f->ctx) && dot_ok(f->other))
        return 0;
    print_error("fixture: %s%s\n", dot_error(f->ctx), dot_error(f->other));
    return -1;
}

static int close_fixture(void **state)
{
    fixture *f = (fixture *)*state;
    dot_context_destroy(f->ctx);
    dot_context_destroy(f->other);
    free(f);
    return 0;
}

/* FNV-1a over all that must not change. */
static uint64_t hash(uint64_t h, const void *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; ++i)
        h = (h ^ ((const unsigned char *)data)[i]) * UINT64_C(1099511628211);
    return h;
}

static uint64_t fingerprint(const fixture *f)
{
    dot_tensor *const tensors[] = { f->x, f->weight, f->v3, f->v4, f->v17, f->kernels };
    uint64_t h = UINT64_C(14695981039346656037);
    for (int lane = 0; lane < 2; ++lane) {
        int64_t count;
        double *values = snapshot(f->net, lane, VALUES, &count);
        h = hash(h, values, (size_t)count * sizeof *values);
        free(values);
        for (int i = 0; i < LENGTH(tensors); ++i)
            h = hash(h, dot_tensor_data(tensors[i], lane), (size_t)dot_tensor_size(tensors[i]) * sizeof(float));
        for (int i = 0; i < DOT_HYPERS; ++i) {
            double value = dot_optimizer_get(f->optimizer, (dot_hyper)i, 0, lane);
            h = hash(h, &value, sizeof value);
        }
    }
    int64_t numbers[] = { dot_optimizer_steps(f->optimizer), dot_dataset_count(f->data), dot_layer_parameters(f->net),
                          dot_lane_active(f->ctx, 0), dot_lane_active(f->ctx, 1),
                          (int64_t)dot_memory(f->ctx).persistent_bytes };
    return hash(h, numbers, sizeof numbers);
}

/* ---- rows ------------------------------------------------------------------------------------------------------- */

static void wrong(int line, const char *call, const char *what, const char *detail)
{
    ++wrong_rows;
    print_error("line %d: %s\n    %s: %s\n", line, call, what, detail);
}

/* The name of the library's function in the text of a call. */
static const char *function_name(const char *call, char *name, size_t size)
{
    const char *start = strstr(call, "dot_");
    size_t length = 0;
    if (start)
        length = strspn(start, "abcdefghijklmnopqrstuvwxyz_0123456789");
    snprintf(name, size, "%.*s", (int)length, start ? start : "");
    return name;
}

/* `names` is "a|b|c": the sentence must begin with one of them and a colon. */
static bool begins_with(const char *sentence, const char *names)
{
    while (*names) {
        size_t length = strcspn(names, "|");
        if (strncmp(sentence, names, length) == 0 && sentence[length] == ':')
            return true;
        names += length + (names[length] == '|');
    }
    return false;
}

/* An error stands: another does not replace it, nothing computes, and clearing it is enough to go on. */
static void check_sticky(fixture *f, int line, const char *call)
{
    char first[512];
    dot_status status = dot_error_status(f->ctx);
    snprintf(first, sizeof first, "%s", dot_error(f->ctx));
    if (dot_tensor_create(f->ctx, DOT_F32, 99, SHAPE(1)) || dot_neg(f->x) || dot_forward(f->net, f->x)
        || dot_optimizer_step(f->optimizer, 1.0) || dot_nn_relu(f->ctx))
        wrong(line, call, "computed while an error stands", first);
    if (strcmp(first, dot_error(f->ctx)) != 0 || dot_error_status(f->ctx) != status || dot_ok(f->ctx))
        wrong(line, call, "the first error was replaced", dot_error(f->ctx));
    dot_error_clear(f->ctx);
    if (!dot_ok(f->ctx) || dot_error_status(f->ctx) != DOT_OK || *dot_error(f->ctx))
        wrong(line, call, "not cleared", dot_error(f->ctx));
}

static void check_row(fixture *f, int line, const char *call, bool refused, int statuses, const char *names,
                      const char *value)
{
    char name[64];
    const char *sentence = dot_error(f->ctx);
    dot_status status = dot_error_status(f->ctx);
    ++rows;
    if (!refused)
        wrong(line, call, "was accepted", sentence);
    if (!(statuses >> status & 1)) {
        char detail[600];
        snprintf(detail, sizeof detail, "status %d, \"%s\"", (int)status, sentence);
        wrong(line, call, "another status", detail);
    }
    if (status != DOT_OK) {
        if (!begins_with(sentence, names ? names : function_name(call, name, sizeof name)))
            wrong(line, call, "the sentence begins otherwise", sentence);
        if (!strstr(sentence, value))
            wrong(line, call, value, sentence);
        check_sticky(f, line, call);
    }
    if (fingerprint(f) != f->fingerprint)
        wrong(line, call, "something changed", "");
    dot_tensor *control = dot_neg(f->x);    /* the fixture is as good as before */
    if (dot_item(control, 0) != -1.0 || !dot_ok(f->ctx))
        wrong(line, call, "afterwards nothing works", dot_error(f->ctx));
    dot_error_clear(f->ctx);
}

static bool prepare(fixture *f)
{
    f->fingerprint = fingerprint(f);
    return true;
}

static bool nothing(double value)
{
    return isnan(value) || value == 0;
}

/* The call must fail with a status of the set, its own name and the value in the sentence. */
#define FAILS(statuses, value, call) FAILS_AS(NULL, statuses, value, call)
#define FAILS_AS(names, statuses, value, call) \
    check_row(f, __LINE__, #call, prepare(f) && !(call), statuses, names, value)
/* NULL objects: no result, and no error. */
#define SILENT(call) check_row(f, __LINE__, #call, prepare(f) && !(call), NONE, NULL, "")
/* No result and no harm; an error or none. */
#define REFUSED(call) check_row(f, __LINE__, #call, prepare(f) && !(call), NONE | ANY, NULL, "")

static void finish(void)
{
    assert_int_equal(wrong_rows, 0);
}

/* ---- contexts --------------------------------------------------------------------------------------------------- */

static void *no_memory(void *user, size_t bytes) { (void)user, (void)bytes; return NULL; }
static void no_release(void *user, void *memory, size_t bytes) { (void)user, (void)memory, (void)bytes; }

static void refuse_context(int line, const char *what, const dot_context_options *options)
{
    dot_context *ctx = dot_context_create(options);
    ++rows;
    if (ctx)
        wrong(line, what, "a context was created", "");
    dot_context_destroy(ctx);
}

#define CONTEXT(...) (co = dot_context_defaults(), __VA_ARGS__, refuse_context(__LINE__, #__VA_ARGS__, &co))

static void test_context(void **state)
{
    dot_context_options co;
    (void)state;
    wrong_rows = 0;
    CONTEXT(co.threads = 0);
    CONTEXT(co.threads = -1);
    CONTEXT(co.threads = 257);
    CONTEXT(co.threads = INT_MAX);
    CONTEXT(co.threads = INT_MIN);
    CONTEXT(co.lanes = 0);
    CONTEXT(co.lanes = -1);
    CONTEXT(co.lanes = 4097);
    CONTEXT(co.lanes = INT_MAX);
    CONTEXT(co.lanes = INT_MIN);
    CONTEXT(co.dtype = DOT_I64);
    CONTEXT(co.dtype = DOT_U8);
    CONTEXT(co.dtype = (dot_dtype)17);
    CONTEXT(co.dtype = (dot_dtype)-1);
    CONTEXT(co.magic = 0);
    CONTEXT(co.magic += 1);
    CONTEXT(memset(&co, 0, sizeof co));
    CONTEXT(co.allocator.allocate = NULL);
    CONTEXT(co.allocator.release = NULL);
    CONTEXT(co.allocator.allocate = no_memory, co.allocator.release = no_release);

    co = dot_context_defaults();        /* both ends are allowed */
    co.threads = 1;
    co.lanes = 4096;
    dot_context *ctx = dot_context_create(&co);
    assert_non_null(ctx);
    assert_int_equal(dot_lanes(ctx), 4096);
    dot_context_destroy(ctx);
    co.threads = 256;
    co.lanes = 1;
    ctx = dot_context_create(&co);
    assert_non_null(ctx);
    assert_true(dot_threads(ctx) >= 1 && dot_threads(ctx) <= 256);
    dot_context_destroy(ctx);
    finish();
}

static void test_null_context(void **state)
{
    fixture *f = (fixture *)*state;
    wrong_rows = 0;
    dot_context_destroy(NULL);
    dot_error_clear(NULL);
    dot_step_begin(NULL);
    dot_eval_begin(NULL);
    SILENT(dot_ok(NULL));
    dot_error_status(NULL);
    dot_error(NULL);
    dot_kernels(NULL);
    SILENT(dot_threads(NULL));
    SILENT(dot_lanes(NULL));
    SILENT(dot_lane_stop(NULL, 0));
    SILENT(dot_lane_active(NULL, 0));
    SILENT(dot_memory(NULL).persistent_bytes);
    SILENT(dot_tensor_create(NULL, DOT_F32, 1, SHAPE(1)));
    SILENT(dot_input(NULL, DOT_F32, 1, SHAPE(1), records));
    SILENT(dot_nn_sequential(NULL, dot_nn_relu(NULL), NULL));
    SILENT(dot_nn_linear(NULL, 1, 1));
    SILENT(dot_nn_linear_no_bias(NULL, 1, 1));
    SILENT(dot_nn_conv1d(NULL, 1, 1, NULL));
    SILENT(dot_nn_conv2d(NULL, 1, 1, NULL));
    SILENT(dot_nn_conv3d(NULL, 1, 1, NULL));
    SILENT(dot_nn_conv_transpose1d(NULL, 1, 1, NULL));
    SILENT(dot_nn_conv_transpose2d(NULL, 1, 1, NULL));
    SILENT(dot_nn_conv_transpose3d(NULL, 1, 1, NULL));
    SILENT(dot_nn_max_pool(NULL, NULL));
    SILENT(dot_nn_avg_pool(NULL, NULL));
    SILENT(dot_nn_batch_norm(NULL, 1));
    SILENT(dot_nn_layer_norm(NULL, 1));
    SILENT(dot_nn_group_norm(NULL, 1, 1));
    SILENT(dot_nn_embedding(NULL, 1, 1));
    SILENT(dot_nn_dropout(NULL, 0.5));
    SILENT(dot_nn_relu(NULL));
    SILENT(dot_nn_leaky_relu(NULL, 0.1));
    SILENT(dot_nn_gelu(NULL));
    SILENT(dot_nn_silu(NULL));
    SILENT(dot_nn_sigmoid(NULL));
    SILENT(dot_nn_tanh(NULL));
    SILENT(dot_nn_softplus(NULL));
    SILENT(dot_nn_flatten(NULL));
    SILENT(dot_nn_unflatten(NULL, 0, 0, 1, 1));
    SILENT(dot_nn_adaptive_max_pool(NULL, 0, 1, 1));
    SILENT(dot_nn_multihead_attention(NULL, 4, 2));
    SILENT(dot_attention(NULL, NULL, NULL, NULL));
    SILENT(dot_self_attention(NULL, NULL));
    SILENT(dot_nn_adaptive_avg_pool(NULL, 0, 1, 1));
    SILENT(dot_nn_custom(NULL, "custom", zoo_scale_forward, NULL));
    SILENT(dot_optimizer_create(NULL, f->net, NULL));
    SILENT(!isnan(dot_gradient_check(NULL, NULL, NULL, NULL, 0, 1e-6)));
    SILENT(dot_safetensors_open(NULL, "no file"));
    SILENT(dot_safetensors_write(NULL, "no file", NULL, 0, NULL));
    SILENT(dot_dataset_idx(NULL, "no file", NULL, NULL));
    SILENT(dot_dataset_memory(NULL, records, NULL, 1, 1, SHAPE(1), NULL));
    finish();
}

static void test_lanes(void **state)
{
    fixture *f = (fixture *)*state;
    wrong_rows = 0;
    FAILS(ARGUMENT, "2", dot_lane_stop(f->ctx, 2));
    FAILS(ARGUMENT, "-1", dot_lane_stop(f->ctx, -1));
    FAILS(ARGUMENT, "2147483647", dot_lane_stop(f->ctx, INT_MAX));
    REFUSED(dot_lane_active(f->ctx, 2));
    REFUSED(dot_lane_active(f->ctx, -1));
    finish();
}

/* ---- tensors ---------------------------------------------------------------------------------------------------- */

static void test_tensor_create(void **state)
{
    fixture *f = (fixture *)*state;
    static const int64_t ones[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    wrong_rows = 0;
    FAILS(ARGUMENT | DTYPE, "17", dot_tensor_create(f->ctx, (dot_dtype)17, 1, ones));
    FAILS(ARGUMENT | DTYPE, "", dot_tensor_create(f->ctx, (dot_dtype)-1, 1, ones));
    FAILS(ARGUMENT | SHAPES, "9", dot_tensor_create(f->ctx, DOT_F32, 9, ones));
    FAILS(ARGUMENT | SHAPES, "-1", dot_tensor_create(f->ctx, DOT_F32, -1, ones));
    FAILS(ARGUMENT | SHAPES, "2147483647", dot_tensor_create(f->ctx, DOT_F32, INT_MAX, ones));
    FAILS(ARGUMENT | SHAPES, "-3", dot_tensor_create(f->ctx, DOT_F32, 2, SHAPE(2, -3)));
    FAILS(ARGUMENT | SHAPES, "-9223372036854775808", dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(INT64_MIN)));
    FAILS(MEMORY, BIG_TEXT, dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(BIG)));
    FAILS(MEMORY, BIG_TEXT, dot_tensor_create(f->ctx, DOT_U8, 2, SHAPE(BIG, 4)));
    FAILS(MEMORY, "4294967296", dot_tensor_create(f->ctx, DOT_F32, 3, SHAPE(INT64_C(1) << 32, INT64_C(1) << 32, 16)));
    FAILS(MEMORY, "2305843009213693952", dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(BIG / 2)));   /* 2^64 with lanes */
    FAILS(MEMORY, "9223372036854775807", dot_tensor_create(f->ctx, DOT_F64, 1, SHAPE(INT64_MAX)));
    FAILS(MEMORY, "", dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(BIG / 8)));       /* fits, but nobody has it */
    FAILS(MEMORY, "", dot_tensor_create(f->ctx, DOT_U8, 1, SHAPE(INT64_C(1) << 31)));
    FAILS(MEMORY, "", dot_pad(f->x, SHAPE(0, 0), SHAPE(0, INT64_C(1) << 30), 0));
    REFUSED(dot_tensor_create(f->ctx, DOT_F32, 1, NULL));

    FAILS(ARGUMENT | DTYPE, "17", dot_input(f->ctx, (dot_dtype)17, 1, ones, records));
    FAILS(ARGUMENT | SHAPES, "9", dot_input(f->ctx, DOT_U8, 9, ones, records));
    FAILS(ARGUMENT | SHAPES, "-1", dot_input(f->ctx, DOT_U8, -1, ones, records));
    FAILS(ARGUMENT | SHAPES, "-3", dot_input(f->ctx, DOT_U8, 1, SHAPE(-3), records));
    FAILS(MEMORY, BIG_TEXT, dot_input(f->ctx, DOT_F64, 1, SHAPE(BIG), records));
    FAILS(MEMORY, BIG_TEXT, dot_input(f->ctx, DOT_U8, 2, SHAPE(BIG, 4), records));
    REFUSED(dot_input(f->ctx, DOT_U8, 1, NULL, records));
    REFUSED(dot_input(f->ctx, DOT_U8, 1, ones, NULL));

    dot_tensor *counts = dot_tensor_create(f->ctx, DOT_I64, 1, ones);
    SILENT(dot_requires_grad(NULL, true));
    FAILS(DTYPE, "", dot_requires_grad(counts, true));
    FAILS(STATE | ARGUMENT, "", dot_requires_grad(f->x, true));
    finish();
}

static void test_tensor_access(void **state)
{
    fixture *f = (fixture *)*state;
    double values[6] = { 0 };
    wrong_rows = 0;
    SILENT(dot_tensor_context(NULL));
    SILENT(dot_tensor_dtype(NULL));
    SILENT(dot_tensor_rank(NULL));
    SILENT(dot_tensor_dim(NULL, 0));
    SILENT(dot_tensor_size(NULL));
    SILENT(dot_tensor_data(NULL, 0));
    SILENT(dot_tensor_grad(NULL));
    SILENT(dot_retain_grad(NULL));
    SILENT(!isnan(dot_item(NULL, 0)));
    SILENT(dot_tensor_get(NULL, 0, values, 6));
    SILENT(dot_tensor_set(NULL, 0, values, 6));
    SILENT(dot_tensor_grad(f->weight));         /* none before dot_backward: no error */
    REFUSED(dot_dtype_size((dot_dtype)17));
    REFUSED(dot_dtype_size((dot_dtype)-1));
    REFUSED(dot_tensor_dim(f->x, 2));
    REFUSED(dot_tensor_dim(f->x, -3));
    REFUSED(dot_tensor_data(f->x, 2));
    REFUSED(dot_tensor_data(f->x, -1));
    REFUSED(dot_tensor_data(f->weight, 2));
    REFUSED(!nothing(dot_item(f->x, 2)));
    REFUSED(!nothing(dot_item(f->x, -1)));
    REFUSED(!nothing(dot_item(f->empty, 0)));
    FAILS(ARGUMENT, "2", dot_tensor_get(f->weight, 2, values, 6));
    FAILS(ARGUMENT, "-1", dot_tensor_get(f->x, DOT_ALL, values, 6));
    FAILS(ARGUMENT | SHAPES, "7", dot_tensor_get(f->x, 0, values, 7));
    FAILS(ARGUMENT | SHAPES, "-1", dot_tensor_get(f->x, 0, values, -1));
    REFUSED(dot_tensor_get(f->x, 0, NULL, 6));
    FAILS(ARGUMENT, "2", dot_tensor_set(f->v3, 2, values, 3));
    FAILS(ARGUMENT, "-2", dot_tensor_set(f->v3, -2, values, 3));
    FAILS(ARGUMENT | SHAPES, "4", dot_tensor_set(f->v3, 0, values, 4));
    FAILS(ARGUMENT | SHAPES, "-1", dot_tensor_set(f->v3, DOT_ALL, values, -1));
    REFUSED(dot_tensor_set(f->v3, 0, NULL, 3));
    finish();
}

/* ---- operations: by tables -------------------------------------------------------------------------------------- */

typedef dot_tensor *(*unary)(dot_tensor *x);
typedef dot_tensor *(*binary)(dot_tensor *a, dot_tensor *b);
typedef dot_tensor *(*reduction)(dot_tensor *x, unsigned axes, bool keep);

#define ENTRY(function) { #function, function }
static const struct { const char *name; unary call; } unaries[] = {
    ENTRY(dot_neg), ENTRY(dot_abs), ENTRY(dot_exp), ENTRY(dot_log), ENTRY(dot_sqrt), ENTRY(dot_square),
    ENTRY(dot_relu), ENTRY(dot_gelu), ENTRY(dot_gelu_tanh), ENTRY(dot_silu), ENTRY(dot_sigmoid), ENTRY(dot_tanh) };
static const struct { const char *name; binary call; } binaries[] = {
    ENTRY(dot_add), ENTRY(dot_sub), ENTRY(dot_mul), ENTRY(dot_div), ENTRY(dot_maximum), ENTRY(dot_minimum),
    ENTRY(dot_mse_loss), ENTRY(dot_rmse_loss), ENTRY(dot_l1_loss), ENTRY(dot_bce_with_logits_loss) };
static const struct { const char *name; reduction call; } reductions[] = {
    ENTRY(dot_sum), ENTRY(dot_mean), ENTRY(dot_max), ENTRY(dot_min) };

static dot_tensor *huber(dot_tensor *a, dot_tensor *b) { return dot_huber_loss(a, b, 1.0); }

#define ROW(names, statuses, value, call) \
    check_row(f, __LINE__, names, prepare(f) && !(call), statuses, names, value)

static void misuse_binary(fixture *f, const char *name, binary call)
{
    ROW(name, NONE, "", call(NULL, f->x));
    ROW(name, NONE, "", call(f->x, NULL));
    ROW(name, STATE, "", call(f->x, f->foreign));
    ROW(name, DTYPE, "", call(f->bytes, f->bytes));
    ROW(name, DTYPE, "", call(f->x, f->bytes));
    ROW(name, DTYPE, "", call(f->x, f->twin));
    ROW(name, DTYPE, "", call(f->twin, f->x));
    ROW(name, SHAPES, "17", call(f->x, f->wide));
    ROW(name, SHAPES, "17", call(f->v17, f->x));
}

static void test_elementwise(void **state)
{
    fixture *f = (fixture *)*state;
    wrong_rows = 0;
    for (int i = 0; i < LENGTH(unaries); ++i) {
        ROW(unaries[i].name, NONE, "", unaries[i].call(NULL));
        ROW(unaries[i].name, DTYPE, "", unaries[i].call(f->bytes));
        ROW(unaries[i].name, DTYPE, "", unaries[i].call(f->integers));
    }
    for (int i = 0; i < LENGTH(binaries); ++i)
        misuse_binary(f, binaries[i].name, binaries[i].call);
    misuse_binary(f, "dot_huber_loss", huber);

    SILENT(dot_add_scalar(NULL, 1));
    SILENT(dot_mul_scalar(NULL, 1));
    SILENT(dot_pow_scalar(NULL, 1));
    SILENT(dot_leaky_relu(NULL, 0.1));
    SILENT(dot_softplus(NULL, 1, 20));
    FAILS(DTYPE, "", dot_add_scalar(f->bytes, 1));
    FAILS(DTYPE, "", dot_mul_scalar(f->bytes, 1));
    FAILS(DTYPE, "", dot_pow_scalar(f->bytes, 1));
    FAILS(DTYPE, "", dot_leaky_relu(f->bytes, 0.1));
    FAILS(DTYPE, "", dot_softplus(f->bytes, 1, 20));
    FAILS(ARGUMENT, "nan", dot_leaky_relu(f->x, NAN));
    FAILS(ARGUMENT, "inf", dot_leaky_relu(f->x, INFINITY));
    FAILS(ARGUMENT, "0", dot_softplus(f->x, 0, 20));
    FAILS(ARGUMENT, "nan", dot_softplus(f->x, NAN, 20));
    FAILS(ARGUMENT, "inf", dot_softplus(f->x, INFINITY, 20));
    FAILS(ARGUMENT, "nan", dot_softplus(f->x, 1, NAN));
    FAILS(ARGUMENT, "0", dot_huber_loss(f->x, f->x, 0));
    FAILS(ARGUMENT, "-1", dot_huber_loss(f->x, f->x, -1));
    FAILS(ARGUMENT, "nan", dot_huber_loss(f->x, f->x, NAN));
    finish();
}

static void test_reductions(void **state)
{
    fixture *f = (fixture *)*state;
    wrong_rows = 0;
    for (int i = 0; i < LENGTH(reductions); ++i) {
        const char *name = reductions[i].name;
        reduction call = reductions[i].call;
        ROW(name, NONE, "", call(NULL, DOT_ALL_AXES, false));
        ROW(name, DTYPE, "", call(f->bytes, DOT_ALL_AXES, false));
        ROW(name, ARGUMENT | SHAPES, "", call(f->x, DOT_AXIS(2), false));
        ROW(name, ARGUMENT | SHAPES, "", call(f->x, DOT_AXIS(0) | DOT_AXIS(5), true));
        ROW(name, ARGUMENT | SHAPES, "", call(f->x, DOT_AXIS(9), true));
        ROW(name, ARGUMENT | SHAPES, "", call(f->x, DOT_AXIS(31), true));
        if (call == dot_sum)
            continue;
        ROW(name, ARGUMENT | SHAPES, "", call(f->empty, DOT_ALL_AXES, false));
        ROW(name, ARGUMENT | SHAPES, "", call(f->empty, DOT_AXIS(0), true));
    }
    assert_true(dot_item(dot_sum(f->empty, DOT_ALL_AXES, false), 0) == 0.0 && dot_ok(f->ctx));

    FAILS(ARGUMENT | SHAPES, "", dot_mse_loss(f->empty, f->empty));
    FAILS(ARGUMENT | SHAPES, "", dot_rmse_loss(f->empty, f->empty));
    FAILS(ARGUMENT | SHAPES, "", dot_l1_loss(f->empty, f->empty));
    FAILS(ARGUMENT | SHAPES, "", dot_huber_loss(f->empty, f->empty, 1));
    FAILS(ARGUMENT | SHAPES, "", dot_bce_with_logits_loss(f->empty, f->empty));
    dot_tensor *no_labels = dot_input(f->ctx, DOT_I64, 1, SHAPE(0), records);
    FAILS(ARGUMENT | SHAPES, "", dot_cross_entropy_loss(f->empty, no_labels, 0));

    FAILS(ARGUMENT | SHAPES, "2", dot_softmax(f->x, 2));
    FAILS(ARGUMENT | SHAPES, "-3", dot_softmax(f->x, -3));
    FAILS(ARGUMENT | SHAPES, "2147483647", dot_softmax(f->x, INT_MAX));
    FAILS(ARGUMENT | SHAPES, "2", dot_log_softmax(f->x, 2));
    FAILS(ARGUMENT | SHAPES, "-3", dot_log_softmax(f->x, -3));
    FAILS(ARGUMENT | SHAPES, "-2147483648", dot_log_softmax(f->x, INT_MIN));
    FAILS(DTYPE, "", dot_softmax(f->bytes, 0));
    FAILS(DTYPE, "", dot_log_softmax(f->bytes, 0));
    SILENT(dot_softmax(NULL, 0));
    SILENT(dot_log_softmax(NULL, 0));
    finish();
}

static void test_products(void **state)
{
    fixture *f = (fixture *)*state;
    dot_tensor *cube = dot_tensor_create(f->ctx, DOT_F32, 3, SHAPE(5, 3, 2));
    dot_tensor *twin_v4 = dot_tensor_create(f->ctx, DOT_F64, 1, SHAPE(4));
    wrong_rows = 0;
    SILENT(dot_matmul(NULL, f->weight));
    SILENT(dot_matmul(f->x, NULL));
    FAILS(SHAPES, "17", dot_matmul(f->wide, f->weight));
    FAILS(SHAPES, "3", dot_matmul(f->x, f->v3));
    FAILS(SHAPES, "3", dot_matmul(f->v3, f->weight));
    FAILS(SHAPES, "5", dot_matmul(f->x, cube));
    FAILS(STATE, "", dot_matmul(f->x, f->foreign_weight));
    FAILS(DTYPE, "", dot_matmul(f->twin, f->weight));
    FAILS(DTYPE, "", dot_matmul(f->bytes, f->weight));

    SILENT(dot_linear(NULL, f->weight, f->v4, DOT_NONE));
    SILENT(dot_linear(f->x, NULL, f->v4, DOT_NONE));
    FAILS(SHAPES, "17", dot_linear(f->wide, f->weight, f->v4, DOT_NONE));
    FAILS(SHAPES, "17", dot_linear(f->x, f->weight, f->v17, DOT_NONE));
    FAILS(SHAPES, "", dot_linear(f->x, f->v3, NULL, DOT_NONE));
    FAILS(SHAPES, "", dot_linear(f->x, f->weight, f->weight, DOT_NONE));
    FAILS(SHAPES, "", dot_linear(f->x, f->kernels, NULL, DOT_NONE));
    FAILS(STATE, "", dot_linear(f->x, f->foreign_weight, NULL, DOT_NONE));
    FAILS(STATE, "", dot_linear(f->x, f->weight, f->foreign_v4, DOT_NONE));
    FAILS(DTYPE, "", dot_linear(f->twin, f->weight, NULL, DOT_NONE));
    FAILS(DTYPE, "", dot_linear(f->x, f->weight, twin_v4, DOT_NONE));
    FAILS(DTYPE, "", dot_linear(f->bytes, f->weight, NULL, DOT_NONE));
    FAILS(ARGUMENT, "4", dot_linear(f->x, f->weight, NULL, (dot_activation)4));
    FAILS(ARGUMENT, "", dot_linear(f->x, f->weight, NULL, (dot_activation)-1));

    SILENT(dot_embedding(NULL, f->integers));
    SILENT(dot_embedding(f->weight, NULL));
    FAILS(SHAPES, "", dot_embedding(f->v3, f->integers));
    FAILS(DTYPE, "", dot_embedding(f->weight, f->x));
    FAILS(DTYPE, "", dot_embedding(f->weight, f->bytes));
    FAILS(STATE, "", dot_embedding(f->weight, f->foreign_integers));
    finish();
}

static void test_indices(void **state)
{
    static const int64_t bad[] = { 3, -1, 17, INT64_MAX, INT64_MIN };
    fixture *f = (fixture *)*state;
    char value[32];
    wrong_rows = 0;
    for (int i = 0; i < LENGTH(bad); ++i) {
        const int64_t pair[2] = { 1, bad[i] };
        dot_tensor *indices = dot_input(f->ctx, DOT_I64, 1, SHAPE(2), pair);
        snprintf(value, sizeof value, "%lld", (long long)bad[i]);
        FAILS(ARGUMENT, value, dot_embedding(f->weight, indices));
        FAILS(ARGUMENT, value, dot_cross_entropy_loss(f->x, indices, 0.0));
    }
    dot_tensor *three = dot_input(f->ctx, DOT_I64, 1, SHAPE(3), bad);
    SILENT(dot_cross_entropy_loss(NULL, f->integers, 0));
    SILENT(dot_cross_entropy_loss(f->x, NULL, 0));
    FAILS(SHAPES, "3", dot_cross_entropy_loss(f->x, three, 0));
    dot_tensor *floats = dot_input(f->ctx, DOT_F32, 1, SHAPE(2), ((const float[]){ 1, 2 }));
    FAILS(DTYPE, "", dot_cross_entropy_loss(f->x, floats, 0));
    FAILS(DTYPE, "", dot_cross_entropy_loss(f->bytes, f->integers, 0));
    FAILS(STATE, "", dot_cross_entropy_loss(f->x, f->foreign_integers, 0));
    FAILS(ARGUMENT, "-0.1", dot_cross_entropy_loss(f->x, f->integers, -0.1));
    FAILS(ARGUMENT, "1.5", dot_cross_entropy_loss(f->x, f->integers, 1.5));
    FAILS(ARGUMENT, "nan", dot_cross_entropy_loss(f->x, f->integers, NAN));
    finish();
}

/* ---- operations: shapes ----------------------------------------------------------------------------------------- */

static void test_shapes(void **state)
{
    fixture *f = (fixture *)*state;
    dot_tensor *const mixed[] = { f->x, f->wide, NULL }, *const foreign[] = { f->x, f->foreign };
    dot_tensor *const types[] = { f->x, f->twin }, *const good[] = { f->x, f->x };
    static const int64_t ones[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    wrong_rows = 0;
    SILENT(dot_reshape(NULL, 1, SHAPE(6)));
    REFUSED(dot_reshape(f->x, 1, NULL));
    FAILS(SHAPES, "4", dot_reshape(f->x, 2, SHAPE(4, 2)));
    FAILS(SHAPES | ARGUMENT, "9", dot_reshape(f->x, 9, ones));
    FAILS(SHAPES | ARGUMENT, "-1", dot_reshape(f->x, -1, ones));
    FAILS(SHAPES | ARGUMENT, "-1", dot_reshape(f->x, 2, SHAPE(-1, -1)));
    FAILS(SHAPES | ARGUMENT, "-2", dot_reshape(f->x, 2, SHAPE(-2, 3)));
    FAILS(SHAPES, "4", dot_reshape(f->x, 2, SHAPE(-1, 4)));
    FAILS(SHAPES | ARGUMENT, "0", dot_reshape(f->x, 2, SHAPE(-1, 0)));
    FAILS(SIZES, BIG_TEXT, dot_reshape(f->x, 2, SHAPE(BIG, 4)));
    FAILS(SIZES, BIG_TEXT, dot_reshape(f->x, 3, SHAPE(BIG, 4, -1)));

    SILENT(dot_permute(NULL, (const int[]){ 1, 0 }));
    REFUSED(dot_permute(f->x, NULL));
    FAILS(ARGUMENT | SHAPES, "0", dot_permute(f->x, (const int[]){ 0, 0 }));
    FAILS(ARGUMENT | SHAPES, "2", dot_permute(f->x, (const int[]){ 0, 2 }));
    FAILS(ARGUMENT | SHAPES, "2147483647", dot_permute(f->x, (const int[]){ INT_MAX, 0 }));

    REFUSED(dot_concat(NULL, 1, 0));
    SILENT(dot_concat(mixed + 2, 1, 0));
    FAILS(ARGUMENT, "0", dot_concat(good, 0, 0));
    FAILS(ARGUMENT, "-1", dot_concat(good, -1, 0));
    FAILS(ARGUMENT | SHAPES, "2", dot_concat(good, 2, 2));
    FAILS(ARGUMENT | SHAPES, "-3", dot_concat(good, 2, -3));
    FAILS(SHAPES, "17", dot_concat(mixed, 2, 0));
    FAILS(STATE, "", dot_concat(foreign, 2, 0));
    FAILS(DTYPE, "", dot_concat(types, 2, 0));

    SILENT(dot_slice(NULL, 0, 0, 1));
    FAILS(ARGUMENT | SHAPES, "2", dot_slice(f->x, 2, 0, 1));
    FAILS(ARGUMENT | SHAPES, "-3", dot_slice(f->x, -3, 0, 1));
    FAILS(ARGUMENT | SHAPES, "4", dot_slice(f->x, 1, 0, 4));
    FAILS(ARGUMENT | SHAPES, "-4", dot_slice(f->x, 1, -4, 2));
    FAILS(ARGUMENT | SHAPES, "2", dot_slice(f->x, 1, 2, 1));
    FAILS(ARGUMENT | SHAPES, "9223372036854775807", dot_slice(f->x, 1, 0, INT64_MAX));
    FAILS(ARGUMENT | SHAPES, "-9223372036854775808", dot_slice(f->x, 1, INT64_MIN, 3));

    SILENT(dot_pad(NULL, SHAPE(0, 0), SHAPE(0, 0), 0));
    REFUSED(dot_pad(f->x, NULL, SHAPE(0, 0), 0));
    REFUSED(dot_pad(f->x, SHAPE(0, 0), NULL, 0));
    FAILS(ARGUMENT | SHAPES, "-1", dot_pad(f->x, SHAPE(0, -1), SHAPE(0, 0), 0));
    FAILS(ARGUMENT | SHAPES, "-1", dot_pad(f->x, SHAPE(0, 0), SHAPE(-1, 0), 0));
    FAILS(SIZES, BIG_TEXT, dot_pad(f->x, SHAPE(0, BIG), SHAPE(0, 0), 0));
    FAILS(SIZES, "9223372036854775807", dot_pad(f->x, SHAPE(0, INT64_MAX), SHAPE(0, INT64_MAX), 0));
    SILENT(dot_detach(NULL));
    finish();
}

/* ---- operations: convolution and pooling ------------------------------------------------------------------------ */

typedef struct bad_int { const char *field; size_t offset; int value; int statuses; bool layers_only, ops_only; } bad_int;

#define CONV(field, value, statuses, layers_only, ops_only) \
    { #field, offsetof(dot_conv_options, field), value, statuses, layers_only, ops_only }
static const bad_int bad_conv[] = {
    CONV(kernel, 0, ARGUMENT, true, false), CONV(kernel, -1, ARGUMENT, true, false),
    CONV(kernel, INT_MIN, ARGUMENT, true, false), CONV(kernel, INT_MAX, SIZES, true, false),
    CONV(stride, 0, ARGUMENT, false, false), CONV(stride, -1, ARGUMENT, false, false),
    CONV(stride, INT_MIN, ARGUMENT, false, false),
    CONV(padding, -1, ARGUMENT, false, false), CONV(padding, INT_MIN, ARGUMENT, false, false),
    CONV(dilation, 0, ARGUMENT, false, false), CONV(dilation, -1, ARGUMENT, false, false),
    CONV(dilation, INT_MIN, ARGUMENT, false, false), CONV(dilation, INT_MAX, SIZES, false, true),
    CONV(output_padding, -1, ARGUMENT, false, false), CONV(output_padding, INT_MIN, ARGUMENT, false, false),
    CONV(groups, 0, ARGUMENT, false, false), CONV(groups, -1, ARGUMENT, false, false),
    CONV(groups, INT_MAX, ARGUMENT | SHAPES, false, false), CONV(groups, 3, ARGUMENT | SHAPES, false, false),
    CONV(kernel_each[0], 0, ARGUMENT, true, false), CONV(kernel_each[0], -2, ARGUMENT, true, false),
    CONV(stride_each[0], 0, ARGUMENT, false, false), CONV(stride_each[0], -2, ARGUMENT, false, false),
    CONV(padding_each[0], -2, ARGUMENT, false, false), CONV(padding_each[0], INT_MIN, ARGUMENT, false, false),
    CONV(dilation_each[0], 0, ARGUMENT, false, false), CONV(dilation_each[0], -2, ARGUMENT, false, false),
    CONV(output_padding_each[0], -2, ARGUMENT, false, false) };

#define POOL(field, value, statuses, layers_only, ops_only) \
    { #field, offsetof(dot_pool_options, field), value, statuses, layers_only, ops_only }
static const bad_int bad_pool[] = {
    POOL(kernel, 0, ARGUMENT, false, false), POOL(kernel, -1, ARGUMENT, false, false),
    POOL(kernel, INT_MIN, ARGUMENT, false, false), POOL(kernel, INT_MAX, SIZES, false, true),
    POOL(kernel, 9, SHAPES, false, true),
    POOL(stride, -1, ARGUMENT, false, false), POOL(stride, INT_MIN, ARGUMENT, false, false),
    POOL(padding, -1, ARGUMENT, false, false), POOL(padding, 2, ARGUMENT, false, false),
    POOL(padding, INT_MAX, ARGUMENT, false, false), POOL(padding, INT_MIN, ARGUMENT, false, false),
    POOL(kernel_each[0], 0, ARGUMENT, false, false), POOL(kernel_each[0], -2, ARGUMENT, false, false),
    POOL(stride_each[0], -2, ARGUMENT, false, false), POOL(padding_each[0], -2, ARGUMENT, false, false),
    POOL(padding_each[0], 2, ARGUMENT, false, false) };
static const bad_int bad_dilation[] = {         /* max pooling only */
    POOL(dilation, 0, ARGUMENT, false, false), POOL(dilation, -1, ARGUMENT, false, false),
    POOL(dilation, INT_MIN, ARGUMENT, false, false), POOL(dilation, INT_MAX, SIZES, false, true),
    POOL(dilation_each[0], 0, ARGUMENT, false, false), POOL(dilation_each[0], -2, ARGUMENT, false, false) };

typedef dot_layer *(*conv_layer)(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
static const struct { const char *name; conv_layer call; } conv_layers[] = {
    ENTRY(dot_nn_conv1d), ENTRY(dot_nn_conv2d), ENTRY(dot_nn_conv3d), ENTRY(dot_nn_conv_transpose1d),
    ENTRY(dot_nn_conv_transpose2d), ENTRY(dot_nn_conv_transpose3d) };

typedef dot_tensor *(*conv_op)(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options,
                               dot_activation act);
static const struct { const char *name; conv_op call; } conv_ops[] = { ENTRY(dot_conv), ENTRY(dot_conv_transpose) };

static void set_int(void *options, const bad_int *bad)
{
    memcpy((char *)options + bad->offset, &bad->value, sizeof bad->value);
}

static void test_conv_options(void **state)
{
    fixture *f = (fixture *)*state;
    char value[32];
    dot_conv_options o;
    wrong_rows = 0;
    for (int i = 0; i < LENGTH(bad_conv); ++i) {
        const bad_int *bad = &bad_conv[i];
        snprintf(value, sizeof value, "%d", bad->value);
        o = dot_conv_defaults();
        set_int(&o, bad);
        for (int c = 0; c < LENGTH(conv_layers) && !bad->ops_only; ++c)
            ROW(conv_layers[c].name, bad->statuses, value, conv_layers[c].call(f->ctx, 4, 4, &o));
        for (int c = 0; c < LENGTH(conv_ops) && !bad->layers_only; ++c)
            ROW(conv_ops[c].name, bad->statuses, bad->value == INT_MAX ? "" : value,
                conv_ops[c].call(f->image, f->kernels, f->v4, &o, DOT_NONE));
    }
    memset(&o, 0, sizeof o);
    for (int c = 0; c < LENGTH(conv_layers); ++c)
        ROW(conv_layers[c].name, ARGUMENT, "", conv_layers[c].call(f->ctx, 4, 4, &o));
    for (int c = 0; c < LENGTH(conv_ops); ++c)
        ROW(conv_ops[c].name, ARGUMENT, "", conv_ops[c].call(f->image, f->kernels, f->v4, &o, DOT_NONE));

    o = dot_conv_defaults();            /* outputs that no memory holds */
    o.padding = INT_MAX;
    FAILS(SIZES, "", dot_conv(f->image, f->kernels, f->v4, &o, DOT_NONE));
    FAILS(SIZES, "", dot_conv_transpose(f->image, f->kernels, f->v4, &o, DOT_NONE));    /* less than nothing */
    o.padding = 0;
    o.output_padding = INT_MAX;
    FAILS(SIZES, "", dot_conv_transpose(f->image, f->kernels, f->v4, &o, DOT_NONE));
    o.output_padding = 0;
    o.stride = INT_MAX;
    FAILS(SIZES, "", dot_conv_transpose(f->image, f->kernels, f->v4, &o, DOT_NONE));
    finish();
}

static void test_conv_shapes(void **state)
{
    fixture *f = (fixture *)*state;
    dot_tensor *small = dot_tensor_create(f->ctx, DOT_F32, 4, SHAPE(1, 2, 8, 4));
    dot_tensor *deep = dot_tensor_create(f->ctx, DOT_F32, 4, SHAPE(1, 8, 8, 17));
    dot_tensor *twin = dot_tensor_create(f->ctx, DOT_F64, 4, SHAPE(1, 8, 8, 4));
    dot_tensor *six = dot_tensor_create(f->ctx, DOT_F32, 6, SHAPE(1, 3, 3, 3, 3, 4));
    dot_tensor *no_kernel = dot_tensor_create(f->ctx, DOT_F32, 4, SHAPE(0, 3, 4, 4));
    wrong_rows = 0;
    for (int c = 0; c < LENGTH(conv_ops); ++c) {
        const char *name = conv_ops[c].name;
        conv_op call = conv_ops[c].call;
        ROW(name, NONE, "", call(NULL, f->kernels, f->v4, NULL, DOT_NONE));
        ROW(name, NONE, "", call(f->image, NULL, f->v4, NULL, DOT_NONE));
        ROW(name, SHAPES, "17", call(deep, f->kernels, f->v4, NULL, DOT_NONE));
        ROW(name, SHAPES, "17", call(f->image, f->kernels, f->v17, NULL, DOT_NONE));
        ROW(name, SHAPES, "", call(f->image, f->kernels, f->weight, NULL, DOT_NONE));
        ROW(name, SHAPES, "", call(f->x, f->kernels, f->v4, NULL, DOT_NONE));
        ROW(name, SHAPES, "", call(six, six, NULL, NULL, DOT_NONE));
        ROW(name, SHAPES, "", call(f->image, f->weight, NULL, NULL, DOT_NONE));
        ROW(name, SHAPES | ARGUMENT, "0", call(f->image, no_kernel, NULL, NULL, DOT_NONE));
        ROW(name, STATE, "", call(f->image, f->foreign_kernels, f->v4, NULL, DOT_NONE));
        ROW(name, STATE, "", call(f->image, f->kernels, f->foreign_v4, NULL, DOT_NONE));
        ROW(name, DTYPE, "", call(twin, f->kernels, f->v4, NULL, DOT_NONE));
        ROW(name, DTYPE, "", call(f->bytes, f->kernels, f->v4, NULL, DOT_NONE));
        ROW(name, ARGUMENT, "4", call(f->image, f->kernels, f->v4, NULL, (dot_activation)4));
        ROW(name, ARGUMENT, "", call(f->image, f->kernels, f->v4, NULL, (dot_activation)-1));
    }
    FAILS(SHAPES, "2", dot_conv(small, f->kernels, f->v4, NULL, DOT_NONE));     /* kernel 3, image 2 */
    for (int c = 0; c < LENGTH(conv_layers); ++c) {
        const char *name = conv_layers[c].name;
        ROW(name, ARGUMENT, "-1", conv_layers[c].call(f->ctx, -1, 4, NULL));
        ROW(name, ARGUMENT, "-1", conv_layers[c].call(f->ctx, 4, -1, NULL));
        ROW(name, SIZES, BIG_TEXT, conv_layers[c].call(f->ctx, BIG, 4, NULL));
        ROW(name, SIZES, BIG_TEXT, conv_layers[c].call(f->ctx, 4, BIG, NULL));
        ROW(name, SIZES, "1048576", conv_layers[c].call(f->ctx, 1 << 20, 1 << 20, NULL));     /* over 2^31 */
    }
    finish();
}

typedef dot_tensor *(*pool_op)(dot_tensor *x, const dot_pool_options *options);
typedef dot_layer *(*pool_layer)(dot_context *ctx, const dot_pool_options *options);

static void misuse_pool(fixture *f, const char *op, pool_op pool, const char *layer, pool_layer make,
                        const bad_int *table, int count)
{
    char value[32];
    for (int i = 0; i < count; ++i) {
        dot_pool_options o = dot_pool_defaults();
        set_int(&o, &table[i]);
        snprintf(value, sizeof value, "%d", table[i].value);
        ROW(op, table[i].statuses, table[i].value == INT_MAX ? "" : value, pool(f->image, &o));
        if (!table[i].ops_only)
            ROW(layer, table[i].statuses, value, make(f->ctx, &o));
    }
}

static void test_pooling(void **state)
{
    fixture *f = (fixture *)*state;
    dot_pool_options zero;
    dot_tensor *one = dot_tensor_create(f->ctx, DOT_F32, 4, SHAPE(1, 1, 8, 4));
    dot_tensor *six = dot_tensor_create(f->ctx, DOT_F32, 6, SHAPE(1, 3, 3, 3, 3, 4));
    dot_tensor *integers = dot_tensor_create(f->ctx, DOT_I64, 4, SHAPE(1, 8, 8, 4));
    wrong_rows = 0;
    misuse_pool(f, "dot_max_pool", dot_max_pool, "dot_nn_max_pool", dot_nn_max_pool, bad_pool, LENGTH(bad_pool));
    misuse_pool(f, "dot_avg_pool", dot_avg_pool, "dot_nn_avg_pool", dot_nn_avg_pool, bad_pool, LENGTH(bad_pool));
    misuse_pool(f, "dot_max_pool", dot_max_pool, "dot_nn_max_pool", dot_nn_max_pool, bad_dilation, LENGTH(bad_dilation));
    memset(&zero, 0, sizeof zero);
    FAILS(ARGUMENT, "", dot_max_pool(f->image, &zero));
    FAILS(ARGUMENT, "", dot_avg_pool(f->image, &zero));
    FAILS(ARGUMENT, "", dot_nn_max_pool(f->ctx, &zero));
    FAILS(ARGUMENT, "", dot_nn_avg_pool(f->ctx, &zero));
    SILENT(dot_max_pool(NULL, NULL));
    SILENT(dot_avg_pool(NULL, NULL));
    FAILS(SHAPES, "1", dot_max_pool(one, NULL));
    FAILS(SHAPES, "1", dot_avg_pool(one, NULL));
    FAILS(SHAPES, "", dot_max_pool(f->x, NULL));
    FAILS(SHAPES, "", dot_avg_pool(f->x, NULL));
    FAILS(SHAPES, "", dot_max_pool(six, NULL));
    FAILS(SHAPES, "", dot_avg_pool(six, NULL));
    FAILS(DTYPE, "", dot_max_pool(integers, NULL));
    FAILS(DTYPE, "", dot_avg_pool(integers, NULL));

    SILENT(dot_adaptive_max_pool(NULL, SHAPE(1, 1)));
    SILENT(dot_adaptive_avg_pool(NULL, SHAPE(1, 1)));
    REFUSED(dot_adaptive_max_pool(f->image, NULL));
    REFUSED(dot_adaptive_avg_pool(f->image, NULL));
    FAILS(ARGUMENT | SHAPES, "-1", dot_adaptive_max_pool(f->image, SHAPE(2, -1)));
    FAILS(ARGUMENT | SHAPES, "-1", dot_adaptive_avg_pool(f->image, SHAPE(2, -1)));
    FAILS(SIZES, BIG_TEXT, dot_adaptive_max_pool(f->image, SHAPE(BIG, 4)));
    FAILS(SIZES, BIG_TEXT, dot_adaptive_avg_pool(f->image, SHAPE(BIG, 4)));
    FAILS(SHAPES, "", dot_adaptive_max_pool(f->x, SHAPE(1, 1)));
    FAILS(SHAPES, "", dot_adaptive_avg_pool(f->x, SHAPE(1, 1)));
    FAILS(DTYPE, "", dot_adaptive_max_pool(integers, SHAPE(1, 1)));
    FAILS(DTYPE, "", dot_adaptive_avg_pool(integers, SHAPE(1, 1)));
    finish();
}

/* ---- operations: chance and normalisation ------------------------------------------------------------------------ */

static void test_normalisation(void **state)
{
    fixture *f = (fixture *)*state;
    dot_tensor *integers = dot_tensor_create(f->ctx, DOT_I64, 2, SHAPE(2, 3));
    wrong_rows = 0;
    SILENT(dot_dropout(NULL, 0.5));
    FAILS(ARGUMENT, "-0.1", dot_dropout(f->x, -0.1));
    FAILS(ARGUMENT, "1.5", dot_dropout(f->x, 1.5));
    FAILS(ARGUMENT, "nan", dot_dropout(f->x, NAN));
    FAILS(ARGUMENT, "inf", dot_dropout(f->x, INFINITY));
    FAILS(DTYPE, "", dot_dropout(integers, 0.5));

    SILENT(dot_layer_norm(NULL, 1, f->v3, f->v3, 1e-5));
    FAILS(ARGUMENT | SHAPES, "0", dot_layer_norm(f->x, 0, NULL, NULL, 1e-5));
    FAILS(ARGUMENT | SHAPES, "-1", dot_layer_norm(f->x, -1, NULL, NULL, 1e-5));
    FAILS(ARGUMENT | SHAPES, "3", dot_layer_norm(f->x, 3, NULL, NULL, 1e-5));
    FAILS(SHAPES, "17", dot_layer_norm(f->x, 1, f->v17, NULL, 1e-5));
    FAILS(SHAPES, "17", dot_layer_norm(f->x, 1, f->v3, f->v17, 1e-5));
    FAILS(SHAPES, "", dot_layer_norm(f->x, 2, f->v3, NULL, 1e-5));
    FAILS(STATE, "", dot_layer_norm(f->x, 1, f->foreign_v3, NULL, 1e-5));
    FAILS(STATE, "", dot_layer_norm(f->x, 1, f->v3, f->foreign_v3, 1e-5));
    FAILS(DTYPE, "", dot_layer_norm(f->twin, 1, f->v3, NULL, 1e-5));
    FAILS(DTYPE, "", dot_layer_norm(integers, 1, NULL, NULL, 1e-5));
    FAILS(ARGUMENT, "-1", dot_layer_norm(f->x, 1, NULL, NULL, -1.0));
    FAILS(ARGUMENT, "nan", dot_layer_norm(f->x, 1, NULL, NULL, NAN));
    FAILS(ARGUMENT, "inf", dot_layer_norm(f->x, 1, NULL, NULL, INFINITY));

    SILENT(dot_group_norm(NULL, 1, f->v4, f->v4, 1e-5));
    FAILS(ARGUMENT | SHAPES, "0", dot_group_norm(f->image, 0, NULL, NULL, 1e-5));
    FAILS(ARGUMENT | SHAPES, "-1", dot_group_norm(f->image, -1, NULL, NULL, 1e-5));
    FAILS(ARGUMENT | SHAPES, "3", dot_group_norm(f->image, 3, NULL, NULL, 1e-5));
    FAILS(ARGUMENT | SHAPES, "2147483647", dot_group_norm(f->image, INT_MAX, NULL, NULL, 1e-5));
    FAILS(SHAPES, "17", dot_group_norm(f->image, 2, f->v17, NULL, 1e-5));
    FAILS(SHAPES, "17", dot_group_norm(f->image, 2, f->v4, f->v17, 1e-5));
    FAILS(SHAPES, "", dot_group_norm(f->v4, 2, NULL, NULL, 1e-5));
    FAILS(STATE, "", dot_group_norm(f->image, 2, f->foreign_v4, NULL, 1e-5));
    FAILS(STATE, "", dot_group_norm(f->image, 2, f->v4, f->foreign_v4, 1e-5));
    FAILS(DTYPE, "", dot_group_norm(f->twin, 1, f->v3, NULL, 1e-5));
    FAILS(DTYPE, "", dot_group_norm(integers, 1, NULL, NULL, 1e-5));
    FAILS(ARGUMENT, "-1", dot_group_norm(f->image, 2, NULL, NULL, -1.0));
    FAILS(ARGUMENT, "nan", dot_group_norm(f->image, 2, NULL, NULL, NAN));
    FAILS(ARGUMENT, "inf", dot_group_norm(f->image, 2, NULL, NULL, INFINITY));

    dot_tensor *mean = dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(3));
    dot_tensor *var = dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(3));
    SILENT(dot_batch_norm(NULL, f->v3, f->v3, mean, var, 0.1, 1e-5));
    FAILS(SHAPES, "17", dot_batch_norm(f->x, f->v17, NULL, mean, var, 0.1, 1e-5));
    FAILS(SHAPES, "17", dot_batch_norm(f->x, f->v3, f->v17, mean, var, 0.1, 1e-5));
    FAILS(SHAPES, "17", dot_batch_norm(f->x, NULL, NULL, f->v17, var, 0.1, 1e-5));
    FAILS(SHAPES, "17", dot_batch_norm(f->x, NULL, NULL, mean, f->v17, 0.1, 1e-5));
    FAILS(SHAPES, "", dot_batch_norm(f->v3, NULL, NULL, mean, var, 0.1, 1e-5));
    FAILS(STATE, "", dot_batch_norm(f->x, f->foreign_v3, NULL, mean, var, 0.1, 1e-5));
    FAILS(STATE, "", dot_batch_norm(f->x, f->v3, f->foreign_v3, mean, var, 0.1, 1e-5));
    FAILS(STATE, "", dot_batch_norm(f->x, NULL, NULL, f->foreign_v3, var, 0.1, 1e-5));
    FAILS(STATE, "", dot_batch_norm(f->x, NULL, NULL, mean, f->foreign_v3, 0.1, 1e-5));
    FAILS(DTYPE, "", dot_batch_norm(f->twin, f->v3, NULL, NULL, NULL, 0.1, 1e-5));
    FAILS(DTYPE, "", dot_batch_norm(integers, NULL, NULL, NULL, NULL, 0.1, 1e-5));
    FAILS(ARGUMENT, "-0.1", dot_batch_norm(f->x, NULL, NULL, mean, var, -0.1, 1e-5));
    FAILS(ARGUMENT, "1.5", dot_batch_norm(f->x, NULL, NULL, mean, var, 1.5, 1e-5));
    FAILS(ARGUMENT, "nan", dot_batch_norm(f->x, NULL, NULL, mean, var, NAN, 1e-5));
    FAILS(ARGUMENT, "-1", dot_batch_norm(f->x, NULL, NULL, mean, var, 0.1, -1.0));
    FAILS(ARGUMENT, "nan", dot_batch_norm(f->x, NULL, NULL, mean, var, 0.1, NAN));
    FAILS(ARGUMENT, "inf", dot_batch_norm(f->x, NULL, NULL, mean, var, 0.1, INFINITY));
    for (int i = 0; i < 3; ++i)         /* failures leave the running statistics alone */
        assert_true(((float *)dot_tensor_data(mean, 0))[i] == 0 && ((float *)dot_tensor_data(var, 1))[i] == 0);
    finish();
}

/* ---- the tape --------------------------------------------------------------------------------------------------- */

static void test_backward(void **state)
{
    fixture *f = (fixture *)*state;
    dot_tensor *y = dot_forward(f->net, f->x);
    wrong_rows = 0;
    SILENT(dot_backward(NULL));
    FAILS(SHAPES | ARGUMENT, "3", dot_backward(y));
    FAILS(STATE | ARGUMENT, "", dot_backward(dot_sum(f->x, DOT_ALL_AXES, false)));
    FAILS(STATE | ARGUMENT, "", dot_backward(dot_detach(dot_sum(y, DOT_ALL_AXES, false))));
    FAILS(STATE | ARGUMENT | SHAPES, "", dot_backward(f->v3));
    FAILS(STATE | ARGUMENT | SHAPES | DTYPE, "", dot_backward(f->integers));
    assert_true(dot_backward(dot_sum(y, DOT_ALL_AXES, false)));

    dot_eval_begin(f->ctx);
    f->x = dot_input(f->ctx, DOT_F32, 2, SHAPE(2, 3), ((const float[]){ 1, 2, 3, 4, 5, 6 }));
    y = dot_sum(dot_forward(f->net, f->x), DOT_ALL_AXES, false);
    assert_non_null(y);
    FAILS(STATE, "", dot_backward(y));
    make_step_tensors(f);
    finish();
}

/* ---- layers ----------------------------------------------------------------------------------------------------- */

static dot_tensor *broken_forward(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user, (void)layer, (void)x;
    return NULL;
}

static void test_layer_options(void **state)
{
    fixture *f = (fixture *)*state;
    wrong_rows = 0;
    FAILS(ARGUMENT, "-1", dot_nn_linear(f->ctx, -1, 4));
    FAILS(ARGUMENT, "-1", dot_nn_linear(f->ctx, 4, -1));
    FAILS(SIZES, BIG_TEXT, dot_nn_linear(f->ctx, BIG, 4));
    FAILS(SIZES, BIG_TEXT, dot_nn_linear(f->ctx, 4, BIG));
    FAILS(SIZES, "4294967296", dot_nn_linear(f->ctx, INT64_C(1) << 32, INT64_C(1) << 32));
    FAILS(ARGUMENT, "-1", dot_nn_linear_no_bias(f->ctx, -1, 4));
    FAILS(ARGUMENT, "-1", dot_nn_linear_no_bias(f->ctx, 4, -1));
    FAILS(SIZES, BIG_TEXT, dot_nn_linear_no_bias(f->ctx, BIG, 4));
    FAILS(ARGUMENT, "-1", dot_nn_batch_norm(f->ctx, -1));
    FAILS(SIZES, BIG_TEXT, dot_nn_batch_norm(f->ctx, BIG));
    FAILS(ARGUMENT, "-1", dot_nn_layer_norm(f->ctx, -1));
    FAILS(SIZES, BIG_TEXT, dot_nn_layer_norm(f->ctx, BIG));
    FAILS(ARGUMENT, "0", dot_nn_group_norm(f->ctx, 0, 4));
    FAILS(ARGUMENT, "-1", dot_nn_group_norm(f->ctx, -1, 4));
    FAILS(ARGUMENT | SHAPES, "3", dot_nn_group_norm(f->ctx, 3, 4));
    FAILS(ARGUMENT, "-4", dot_nn_group_norm(f->ctx, 2, -4));
    FAILS(SIZES, BIG_TEXT, dot_nn_group_norm(f->ctx, 2, BIG));
    FAILS(ARGUMENT, "-1", dot_nn_embedding(f->ctx, -1, 4));
    FAILS(ARGUMENT, "-1", dot_nn_embedding(f->ctx, 4, -1));
    FAILS(SIZES, BIG_TEXT, dot_nn_embedding(f->ctx, BIG, 4));
    FAILS(SIZES, BIG_TEXT, dot_nn_embedding(f->ctx, 4, BIG));
    FAILS(ARGUMENT, "-0.1", dot_nn_dropout(f->ctx, -0.1));
    FAILS(ARGUMENT, "1.5", dot_nn_dropout(f->ctx, 1.5));
    FAILS(ARGUMENT, "nan", dot_nn_dropout(f->ctx, NAN));
    FAILS(ARGUMENT, "nan", dot_nn_leaky_relu(f->ctx, NAN));
    FAILS(ARGUMENT, "inf", dot_nn_leaky_relu(f->ctx, INFINITY));
    FAILS(ARGUMENT, "-1", dot_nn_unflatten(f->ctx, 0, 4, 4, -1));
    FAILS(ARGUMENT, "0", dot_nn_adaptive_max_pool(f->ctx, 0, 4, 0));
    FAILS(ARGUMENT, "5", dot_nn_multihead_attention(f->ctx, 5, 2));
    FAILS(ARGUMENT, "-1", dot_nn_multihead_attention(f->ctx, 4, -1));
    FAILS(ARGUMENT, "0", dot_nn_multihead_attention(f->ctx, 0, 1));
    FAILS(SIZES, BIG_TEXT, dot_nn_multihead_attention(f->ctx, BIG, 1));
    FAILS(ARGUMENT, "-3", dot_nn_adaptive_avg_pool(f->ctx, 0, -3, 4));
    FAILS(ARGUMENT, "2", dot_nn_adaptive_avg_pool(f->ctx, 2, 0, 4));
    FAILS(ARGUMENT, "-2", dot_nn_unflatten(f->ctx, -2, 4, 4, 1));
    FAILS(ARGUMENT, "-2", dot_nn_unflatten(f->ctx, 0, -2, 4, 1));
    FAILS(ARGUMENT, "-2", dot_nn_unflatten(f->ctx, 0, 4, -2, 1));
    FAILS(SIZES, BIG_TEXT, dot_nn_unflatten(f->ctx, 0, BIG, 4, 4));
    REFUSED(dot_nn_custom(f->ctx, "custom", NULL, NULL));
    finish();
}

/* Inputs that do not fit: the sentence may name the operation or the layer's constructor. */
static void test_forward(void **state)
{
    fixture *f = (fixture *)*state;
    dot_context *ctx = f->ctx;
    dot_layer *linear = dot_nn_linear(ctx, 3, 4), *conv = dot_nn_conv2d(ctx, 3, 4, NULL);
    dot_layer *transpose = dot_nn_conv_transpose2d(ctx, 3, 4, NULL), *batch = dot_nn_batch_norm(ctx, 3);
    dot_layer *norm = dot_nn_layer_norm(ctx, 3), *group = dot_nn_group_norm(ctx, 1, 3);
    dot_layer *embedding = dot_nn_embedding(ctx, 2, 3), *unflatten = dot_nn_unflatten(ctx, 0, 2, 2, 1);
    dot_layer *pool = dot_nn_max_pool(ctx, NULL), *average = dot_nn_avg_pool(ctx, NULL), *relu = dot_nn_relu(ctx);
    dot_layer *cubes = dot_nn_adaptive_avg_pool(ctx, 1, 1, 1), *lines = dot_nn_adaptive_max_pool(ctx, 0, 0, 2);
    dot_layer *custom = dot_nn_custom(ctx, "broken", broken_forward, NULL);
    dot_tensor *line = dot_tensor_create(ctx, DOT_F32, 3, SHAPE(2, 8, 3));
    wrong_rows = 0;
    SILENT(dot_forward(NULL, f->x));
    SILENT(dot_forward(linear, NULL));
    SILENT(dot_forward(relu, NULL));
    SILENT(dot_forward(f->net, NULL));
    FAILS_AS("dot_forward|dot_linear|dot_nn_linear", SHAPES, "17", dot_forward(linear, f->wide));
    FAILS_AS("dot_forward|dot_linear|dot_nn_linear|dot_nn_sequential", SHAPES, "17", dot_forward(f->net, f->wide));
    FAILS_AS("dot_forward|dot_linear|dot_nn_linear", DTYPE, "", dot_forward(linear, f->bytes));
    FAILS_AS("dot_forward|dot_linear|dot_nn_linear", DTYPE, "", dot_forward(linear, f->twin));
    FAILS_AS("dot_forward|dot_linear|dot_nn_linear", STATE, "", dot_forward(linear, f->foreign));
    FAILS_AS("dot_forward|dot_relu|dot_nn_relu", STATE, "", dot_forward(relu, f->foreign));
    FAILS_AS("dot_forward|dot_relu|dot_nn_relu", DTYPE, "", dot_forward(relu, f->bytes));
    FAILS_AS("dot_forward|dot_conv|dot_nn_conv2d", SHAPES, "4", dot_forward(conv, f->image));
    FAILS_AS("dot_forward|dot_conv|dot_nn_conv2d", SHAPES, "", dot_forward(conv, line));
    FAILS_AS("dot_forward|dot_conv|dot_nn_conv2d", SHAPES, "", dot_forward(conv, f->x));
    FAILS_AS("dot_forward|dot_conv_transpose|dot_nn_conv_transpose2d", SHAPES, "4", dot_forward(transpose, f->image));
    FAILS_AS("dot_forward|dot_conv_transpose|dot_nn_conv_transpose2d", SHAPES, "", dot_forward(transpose, line));
    FAILS_AS("dot_forward|dot_batch_norm|dot_nn_batch_norm", SHAPES, "17", dot_forward(batch, f->wide));
    FAILS_AS("dot_forward|dot_layer_norm|dot_nn_layer_norm", SHAPES, "17", dot_forward(norm, f->wide));
    FAILS_AS("dot_forward|dot_group_norm|dot_nn_group_norm", SHAPES, "17", dot_forward(group, f->wide));
    FAILS_AS("dot_forward|dot_embedding|dot_nn_embedding", DTYPE, "", dot_forward(embedding, f->x));
    FAILS_AS("dot_forward|dot_embedding|dot_nn_embedding", ARGUMENT, "2", dot_forward(embedding, f->integers));
    FAILS_AS("dot_forward|dot_unflatten|dot_nn_unflatten|dot_reshape", SHAPES, "17", dot_forward(unflatten, f->wide));
    FAILS_AS("dot_forward|dot_max_pool|dot_nn_max_pool", SHAPES, "", dot_forward(pool, f->x));
    FAILS_AS("dot_forward|dot_avg_pool|dot_nn_avg_pool", SHAPES, "", dot_forward(average, f->x));
    FAILS_AS("dot_nn_adaptive_avg_pool", SHAPES, "3", dot_forward(cubes, f->image));
    FAILS_AS("dot_nn_adaptive_max_pool", SHAPES, "1", dot_forward(lines, f->image));
    REFUSED(dot_forward(custom, f->x));
    finish();
}

static void test_layer_trees(void **state)
{
    fixture *f = (fixture *)*state;
    dot_context *ctx = f->ctx;
    char longest[DOT_MAX_NAME], too_long[DOT_MAX_NAME + 1];
    dot_layer *parent = dot_nn_custom(ctx, "parent", zoo_scale_forward, NULL);
    dot_layer *child = dot_nn_custom(ctx, "child", zoo_scale_forward, NULL);
    dot_layer *second = dot_nn_custom(ctx, "second", zoo_scale_forward, NULL);
    dot_layer *relu = dot_nn_relu(ctx);
    memset(longest, 'n', sizeof longest);
    longest[DOT_MAX_NAME - 1] = 0;
    memset(too_long, 'n', sizeof too_long);
    too_long[DOT_MAX_NAME] = 0;
    assert_true(dot_layer_add_child(parent, "child", child));
    wrong_rows = 0;
    SILENT(dot_layer_add_child(NULL, "child", second));
    SILENT(dot_layer_add_child(parent, "child", NULL));
    REFUSED(dot_layer_add_child(parent, NULL, second));
    FAILS(STATE | ARGUMENT, "", dot_layer_add_child(parent, "again", child));
    FAILS(STATE | ARGUMENT, "", dot_layer_add_child(second, "again", child));
    FAILS(STATE | ARGUMENT, "", dot_layer_add_child(parent, "self", parent));
    FAILS(STATE | ARGUMENT, "", dot_layer_add_child(child, "up", parent));
    FAILS(STATE, "", dot_layer_add_child(parent, "foreign", f->foreign_net));
    FAILS(STATE | ARGUMENT, "", dot_nn_sequential(ctx, relu, relu, NULL));
    FAILS(STATE | ARGUMENT, "", dot_nn_sequential(ctx, relu, child, NULL));
    FAILS(STATE, "", dot_nn_sequential(ctx, relu, f->foreign_net, NULL));
    dot_layer *sequence = dot_nn_sequential(ctx, relu, NULL);       /* the failures did not take it */
    assert_non_null(sequence);
    FAILS(STATE | ARGUMENT, "", dot_nn_sequential(ctx, relu, NULL));
    FAILS(STATE | ARGUMENT, "", dot_layer_add_child(parent, "taken", relu));

    dot_layer *third = dot_nn_custom(ctx, "third", zoo_scale_forward, NULL);
    FAILS(ARGUMENT | STATE, "child", dot_layer_add_child(parent, "child", third));
    FAILS(ARGUMENT, "nnnnnnnn", dot_layer_add_child(parent, too_long, third));
    SILENT(dot_layer_name(NULL, "name"));
    REFUSED(dot_layer_name(third, NULL));
    FAILS(ARGUMENT, "nnnnnnnn", dot_layer_name(third, too_long));
    assert_ptr_equal(dot_layer_name(third, longest), third);
    finish();
}

static void test_parameters(void **state)
{
    fixture *f = (fixture *)*state;
    static const int64_t ones[9] = { 1, 1, 1, 1, 1, 1, 1, 1, 1 };
    char too_long[DOT_MAX_NAME + 1], long_name[100];
    double values[16] = { 0 };
    dot_parameter_info info;
    dot_layer *layer = dot_nn_custom(f->ctx, "layer", zoo_scale_forward, NULL);
    memset(too_long, 'n', sizeof too_long);
    too_long[DOT_MAX_NAME] = 0;
    assert_non_null(dot_layer_add_parameter(layer, "weight", DOT_KIND_WEIGHT, 1, ones));
    wrong_rows = 0;
    SILENT(dot_layer_add_parameter(NULL, "bias", DOT_KIND_BIAS, 1, ones));
    REFUSED(dot_layer_add_parameter(layer, NULL, DOT_KIND_BIAS, 1, ones));
    REFUSED(dot_layer_add_parameter(layer, "bias", DOT_KIND_BIAS, 1, NULL));
    FAILS(ARGUMENT | STATE, "weight", dot_layer_add_parameter(layer, "weight", DOT_KIND_BIAS, 1, ones));
    FAILS(ARGUMENT, "nnnnnnnn", dot_layer_add_parameter(layer, too_long, DOT_KIND_BIAS, 1, ones));
    FAILS(ARGUMENT, "0", dot_layer_add_parameter(layer, "bias", (dot_parameter_kind)0, 1, ones));
    FAILS(ARGUMENT, "3", dot_layer_add_parameter(layer, "bias", (dot_parameter_kind)3, 1, ones));
    FAILS(ARGUMENT, "32", dot_layer_add_parameter(layer, "bias", (dot_parameter_kind)32, 1, ones));
    FAILS(ARGUMENT | SHAPES, "9", dot_layer_add_parameter(layer, "bias", DOT_KIND_BIAS, 9, ones));
    FAILS(ARGUMENT | SHAPES, "-1", dot_layer_add_parameter(layer, "bias", DOT_KIND_BIAS, -1, ones));
    FAILS(ARGUMENT | SHAPES, "-3", dot_layer_add_parameter(layer, "bias", DOT_KIND_BIAS, 1, SHAPE(-3)));
    FAILS(MEMORY, BIG_TEXT, dot_layer_add_parameter(layer, "bias", DOT_KIND_BIAS, 1, SHAPE(BIG)));
    assert_int_equal(dot_layer_parameters(layer), 1);
    dot_layer *with_buffer = dot_nn_batch_norm(f->ctx, 1);
    FAILS(ARGUMENT, "buffer", dot_parameter_set_grad(with_buffer, "running_mean", 0, values, 1));

    SILENT(dot_layer_parameters(NULL));
    SILENT(dot_layer_parameter(NULL, 0, &info));
    SILENT(dot_layer_parameter_count(NULL));
    REFUSED(dot_layer_parameter(f->net, 0, NULL));
    REFUSED(dot_layer_parameter(f->net, 4, &info));
    REFUSED(dot_layer_parameter(f->net, -1, &info));

    SILENT(dot_parameter_get(NULL, "0.bias", 0, values, 4));
    SILENT(dot_parameter_set(NULL, "0.bias", 0, values, 4));
    SILENT(dot_parameter_grad(NULL, "0.bias", 0, values, 4));
    SILENT(dot_parameter_set_grad(NULL, "0.bias", 0, values, 4));
    SILENT(dot_parameter_init(NULL, "0.bias", DOT_INIT_ZEROS, 1));
    SILENT(dot_zero_grad(NULL));
    REFUSED(dot_parameter_get(f->net, NULL, 0, values, 4));
    REFUSED(dot_parameter_set(f->net, NULL, 0, values, 4));
    REFUSED(dot_parameter_grad(f->net, NULL, 0, values, 4));
    REFUSED(dot_parameter_set_grad(f->net, NULL, 0, values, 4));
    REFUSED(dot_parameter_init(f->net, NULL, DOT_INIT_ZEROS, 1));
    REFUSED(dot_parameter_get(f->net, "0.bias", 0, NULL, 4));
    REFUSED(dot_parameter_set(f->net, "0.bias", 0, NULL, 4));
    REFUSED(dot_parameter_grad(f->net, "0.bias", 0, NULL, 4));
    REFUSED(dot_parameter_set_grad(f->net, "0.bias", 0, NULL, 4));
    FAILS(ARGUMENT, "9.bias", dot_parameter_get(f->net, "9.bias", 0, values, 4));
    FAILS(ARGUMENT, "9.bias", dot_parameter_set(f->net, "9.bias", 0, values, 4));
    FAILS(ARGUMENT, "9.bias", dot_parameter_grad(f->net, "9.bias", 0, values, 4));
    FAILS(ARGUMENT, "9.bias", dot_parameter_set_grad(f->net, "9.bias", 0, values, 4));
    FAILS(ARGUMENT, "9.bias", dot_parameter_init(f->net, "9.bias", DOT_INIT_ZEROS, 1));
    FAILS(ARGUMENT, "0.bia", dot_parameter_get(f->net, "0.bia", 0, values, 4));
    FAILS(ARGUMENT, "2", dot_parameter_get(f->net, "0.bias", 2, values, 4));
    FAILS(ARGUMENT, "-1", dot_parameter_get(f->net, "0.bias", DOT_ALL, values, 4));
    FAILS(ARGUMENT, "2", dot_parameter_set(f->net, "0.bias", 2, values, 4));
    FAILS(ARGUMENT, "-2", dot_parameter_set(f->net, "0.bias", -2, values, 4));
    FAILS(ARGUMENT, "2", dot_parameter_grad(f->net, "0.bias", 2, values, 4));
    FAILS(ARGUMENT, "2", dot_parameter_set_grad(f->net, "0.bias", 2, values, 4));
    FAILS(ARGUMENT, "-1", dot_parameter_grad(f->net, "0.bias", DOT_ALL, values, 4));
    FAILS(ARGUMENT | SHAPES, "5", dot_parameter_get(f->net, "0.bias", 0, values, 5));
    FAILS(ARGUMENT | SHAPES, "-1", dot_parameter_get(f->net, "0.bias", 0, values, -1));
    FAILS(ARGUMENT | SHAPES, "5", dot_parameter_set(f->net, "0.bias", 0, values, 5));
    FAILS(ARGUMENT | SHAPES, "-1", dot_parameter_set(f->net, "0.bias", 0, values, -1));
    FAILS(ARGUMENT | SHAPES, "5", dot_parameter_grad(f->net, "0.bias", 0, values, 5));
    FAILS(ARGUMENT | SHAPES, "5", dot_parameter_set_grad(f->net, "0.bias", 0, values, 5));
    FAILS(ARGUMENT, "7", dot_parameter_init(f->net, "0.weight", (dot_init)7, 1));
    FAILS(ARGUMENT, "", dot_parameter_init(f->net, "0.weight", (dot_init)-1, 1));
    FAILS(ARGUMENT, "nan", dot_parameter_init(f->net, "0.weight", DOT_INIT_XAVIER_NORMAL, NAN));
    FAILS(ARGUMENT, "inf", dot_parameter_init(f->net, "0.weight", DOT_INIT_KAIMING_UNIFORM, INFINITY));
    FAILS(ARGUMENT | SHAPES, "0.bias", dot_parameter_init(f->net, "0.bias", DOT_INIT_ORTHOGONAL, 1));
    FAILS(ARGUMENT | SHAPES, "0.bias", dot_parameter_init(f->net, "0.bias", DOT_INIT_XAVIER_UNIFORM, 1));
    FAILS(ARGUMENT | SHAPES, "0.bias", dot_parameter_init(f->net, "0.bias", DOT_INIT_KAIMING_NORMAL, 1));

    /* Three names that fit alone and not together: refused somewhere, never cut off. */
    dot_layer *outer = dot_nn_custom(f->ctx, "outer", zoo_scale_forward, NULL);
    memset(long_name, 'n', sizeof long_name);
    long_name[sizeof long_name - 1] = 0;
    bool fits = dot_layer_add_child(outer, long_name, layer)
                && dot_layer_add_parameter(layer, long_name, DOT_KIND_WEIGHT, 1, ones) != NULL
                && dot_layer_parameter(outer, 1, &info);
    ++rows;
    if (fits)
        wrong(__LINE__, "dot_layer_parameter", "a name of 199 bytes", info.name);
    dot_error_clear(f->ctx);
    finish();
}

/* ---- optimizers ------------------------------------------------------------------------------------------------- */

typedef struct bad_double { const char *field; size_t offset; double value; dot_algorithm algorithm; dot_decay decay; } bad_double;

#define BAD(field, value, algorithm, decay) { #field, offsetof(dot_optimizer_options, field), value, algorithm, decay }
static const bad_double bad_optimizer[] = {
    BAD(decay_lr, -1, DOT_ADAMW, DOT_DECAY_SCHEDULED), BAD(decay_lr, NAN, DOT_ADAMW, DOT_DECAY_SCHEDULED),
    BAD(decay_lr, INFINITY, DOT_ADAMW, DOT_DECAY_NORMALIZED), BAD(decay_lr, -INFINITY, DOT_ADAMW, DOT_DECAY_SCHEDULED),
    BAD(decay_period, 0, DOT_ADAMW, DOT_DECAY_NORMALIZED), BAD(decay_period, -1, DOT_ADAMW, DOT_DECAY_NORMALIZED),
    BAD(decay_period, NAN, DOT_SGD, DOT_DECAY_NORMALIZED), BAD(decay_period, INFINITY, DOT_ADAMW, DOT_DECAY_NORMALIZED),
    BAD(beta1, -0.1, DOT_SGD, DOT_DECAY_L2), BAD(beta1, NAN, DOT_SGD, DOT_DECAY_L2),
    BAD(beta1, INFINITY, DOT_SGD, DOT_DECAY_L2),
    BAD(beta1, -0.1, DOT_ADAM, DOT_DECAY_L2), BAD(beta1, 1, DOT_ADAM, DOT_DECAY_L2),
    BAD(beta1, NAN, DOT_ADAM, DOT_DECAY_L2), BAD(beta1, 1.5, DOT_ADAMW, DOT_DECAY_LR),
    BAD(beta1, -0.1, DOT_ADAFACTOR, DOT_DECAY_LR), BAD(beta1, 1, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(beta1, NAN, DOT_ADAMW_FACTORED, DOT_DECAY_LR),
    BAD(beta2, -0.1, DOT_ADAM, DOT_DECAY_L2), BAD(beta2, 1, DOT_ADAM, DOT_DECAY_L2),
    BAD(beta2, NAN, DOT_ADAM, DOT_DECAY_L2), BAD(beta2, INFINITY, DOT_ADAMW, DOT_DECAY_LR),
    BAD(eps, -1, DOT_ADAM, DOT_DECAY_L2), BAD(eps, NAN, DOT_ADAM, DOT_DECAY_L2),
    BAD(eps, INFINITY, DOT_ADAMW, DOT_DECAY_LR),
    BAD(dampening, NAN, DOT_SGD, DOT_DECAY_L2), BAD(dampening, INFINITY, DOT_SGD, DOT_DECAY_L2),
    BAD(dampening, -INFINITY, DOT_SGD, DOT_DECAY_L2),
    BAD(beta2_exponent, NAN, DOT_ADAFACTOR, DOT_DECAY_LR), BAD(beta2_exponent, INFINITY, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(beta2_exponent, -0.5, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(eps1, -1, DOT_ADAFACTOR, DOT_DECAY_LR), BAD(eps1, NAN, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(eps1, INFINITY, DOT_ADAMW_FACTORED, DOT_DECAY_LR),
    BAD(eps2, -1, DOT_ADAFACTOR, DOT_DECAY_LR), BAD(eps2, NAN, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(eps2, INFINITY, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(clip_threshold, 0, DOT_ADAFACTOR, DOT_DECAY_LR), BAD(clip_threshold, -1, DOT_ADAFACTOR, DOT_DECAY_LR),
    BAD(clip_threshold, NAN, DOT_ADAMW_FACTORED, DOT_DECAY_LR) };

static const double bad_rates[] = { -1, NAN, INFINITY, -INFINITY };

static const char *print_double(char *text, size_t size, double value)
{
    if (isnan(value))
        snprintf(text, size, "nan");    /* some C libraries print its sign too */
    else
        snprintf(text, size, "%g", value);
    return text;
}

static dot_optimizer *optimizer_with(fixture *f, dot_optimizer_options *o, size_t offset, double value)
{
    memcpy((char *)o + offset, &value, sizeof value);
    return dot_optimizer_create(f->ctx, f->net, o);
}

static void test_optimizer_options(void **state)
{
    fixture *f = (fixture *)*state;
    char value[32];
    dot_optimizer_options o;
    wrong_rows = 0;
    for (int i = 0; i < LENGTH(bad_optimizer); ++i) {
        const bad_double *bad = &bad_optimizer[i];
        o = dot_optimizer_defaults(bad->algorithm);
        o.decay = bad->decay;
        ROW("dot_optimizer_create", ARGUMENT, print_double(value, sizeof value, bad->value),
            optimizer_with(f, &o, bad->offset, bad->value));
    }
    for (int a = 0; a < DOT_ALGORITHMS; ++a)
        for (int i = 0; i < LENGTH(bad_rates); ++i) {
            print_double(value, sizeof value, bad_rates[i]);
            o = dot_optimizer_defaults((dot_algorithm)a);
            ROW("dot_optimizer_create", ARGUMENT, value,
                optimizer_with(f, &o, offsetof(dot_optimizer_options, lr), bad_rates[i]));
            o = dot_optimizer_defaults((dot_algorithm)a);
            ROW("dot_optimizer_create", ARGUMENT, value,
                optimizer_with(f, &o, offsetof(dot_optimizer_options, weight_decay), bad_rates[i]));
        }
    finish();
}

static void test_optimizer_create(void **state)
{
    fixture *f = (fixture *)*state;
    char value[32];
    dot_optimizer_options o;
    dot_parameter_group group = { "*.bias", 0, 1e-3, 0 };
    wrong_rows = 0;
    SILENT(dot_optimizer_create(f->ctx, NULL, NULL));
    FAILS(STATE, "", dot_optimizer_create(f->ctx, f->foreign_net, NULL));
    memset(&o, 0, sizeof o);
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));
    o = dot_optimizer_defaults(DOT_ADAM);
    o.algorithm = DOT_ALGORITHMS;
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));
    o.algorithm = (dot_algorithm)-1;
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));
    o = dot_optimizer_defaults(DOT_ALGORITHMS);
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));
    o = dot_optimizer_defaults(DOT_ADAM);
    o.decay = (dot_decay)8;
    FAILS(ARGUMENT, "8", dot_optimizer_create(f->ctx, f->net, &o));
    o.decay = (dot_decay)-1;
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));

    o = dot_optimizer_defaults(DOT_ADAM);
    o.group_count = 1;
    FAILS(ARGUMENT, "", dot_optimizer_create(f->ctx, f->net, &o));      /* groups is NULL */
    o.groups = &group;
    o.group_count = -1;
    FAILS(ARGUMENT, "-1", dot_optimizer_create(f->ctx, f->net, &o));
    o.group_count = 1;
    for (int i = 0; i < LENGTH(bad_rates); ++i) {
        group.lr = bad_rates[i];
        group.weight_decay = 0;
        print_double(value, sizeof value, bad_rates[i]);
        FAILS(ARGUMENT, value, dot_optimizer_create(f->ctx, f->net, &o));
        group.lr = 1e-3;
        group.weight_decay = bad_rates[i];
        FAILS(ARGUMENT, value, dot_optimizer_create(f->ctx, f->net, &o));
    }
    REFUSED(dot_algorithm_name(DOT_ALGORITHMS));
    REFUSED(dot_algorithm_name((dot_algorithm)-1));
    REFUSED(dot_algorithm_description(DOT_ALGORITHMS));
    REFUSED(dot_algorithm_description((dot_algorithm)-1));
    REFUSED(dot_algorithm_paper(DOT_ALGORITHMS));
    REFUSED(dot_algorithm_paper((dot_algorithm)-1));
    dot_algorithm found = DOT_SGD;
    REFUSED(dot_algorithm_find("gradient descent", &found));
    REFUSED(dot_algorithm_find("", &found));
    REFUSED(dot_algorithm_find("ADAM ", &found));
    REFUSED(dot_algorithm_find(NULL, &found));
    assert_int_equal(found, DOT_SGD);
    finish();
}

static void test_optimizer_calls(void **state)
{
    static const struct { dot_hyper hyper; double value; } bad[] = {
        { DOT_HYPER_LR, -1 }, { DOT_HYPER_LR, NAN }, { DOT_HYPER_LR, INFINITY }, { DOT_HYPER_WEIGHT_DECAY, -1 },
        { DOT_HYPER_WEIGHT_DECAY, NAN }, { DOT_HYPER_WEIGHT_DECAY, INFINITY }, { DOT_HYPER_BETA1, -0.1 },
        { DOT_HYPER_BETA1, 1 }, { DOT_HYPER_BETA1, NAN }, { DOT_HYPER_BETA2, -0.1 }, { DOT_HYPER_BETA2, 1 },
        { DOT_HYPER_BETA2, NAN }, { DOT_HYPER_EPS, -1 }, { DOT_HYPER_EPS, NAN }, { DOT_HYPER_EPS, INFINITY },
        { DOT_HYPER_DECAY_PERIOD, 0 }, { DOT_HYPER_DECAY_PERIOD, -1 }, { DOT_HYPER_DECAY_PERIOD, NAN },
        { DOT_HYPER_DECAY_PERIOD, INFINITY } };
    fixture *f = (fixture *)*state;
    char value[32];
    wrong_rows = 0;
    dot_backward(dot_sum(dot_forward(f->net, f->x), DOT_ALL_AXES, false));
    assert_true(dot_ok(f->ctx));
    SILENT(dot_optimizer_step(NULL, 1));
    SILENT(dot_optimizer_set(NULL, DOT_HYPER_LR, 0, 0, 1));
    SILENT(!nothing(dot_optimizer_get(NULL, DOT_HYPER_LR, 0, 0)));
    SILENT(dot_optimizer_steps(NULL));
    SILENT(dot_optimizer_state_bytes(NULL));
    SILENT(!nothing(dot_clip_grad_norm(NULL, 1)));
    SILENT(!nothing(dot_grad_norm(NULL, 0)));
    SILENT(!nothing(dot_weight_norm(NULL, 0)));
    FAILS(ARGUMENT, "-1", dot_optimizer_step(f->optimizer, -1));
    FAILS(ARGUMENT, "nan", dot_optimizer_step(f->optimizer, NAN));
    FAILS(ARGUMENT, "inf", dot_optimizer_step(f->optimizer, INFINITY));
    FAILS(ARGUMENT, "-1", !nothing(dot_clip_grad_norm(f->optimizer, -1)));
    FAILS(ARGUMENT, "nan", !nothing(dot_clip_grad_norm(f->optimizer, NAN)));
    FAILS(ARGUMENT, "2", !nothing(dot_grad_norm(f->optimizer, 2)));
    FAILS(ARGUMENT, "-1", !nothing(dot_grad_norm(f->optimizer, -1)));
    FAILS(ARGUMENT, "2", !nothing(dot_weight_norm(f->optimizer, 2)));
    FAILS(ARGUMENT, "-1", !nothing(dot_weight_norm(f->optimizer, -1)));
    FAILS(ARGUMENT, "2", dot_optimizer_set(f->optimizer, DOT_HYPER_LR, 0, 2, 1e-3));
    FAILS(ARGUMENT, "-2", dot_optimizer_set(f->optimizer, DOT_HYPER_LR, 0, -2, 1e-3));
    FAILS(ARGUMENT, "1", dot_optimizer_set(f->optimizer, DOT_HYPER_LR, 1, 0, 1e-3));
    FAILS(ARGUMENT, "-2", dot_optimizer_set(f->optimizer, DOT_HYPER_LR, -2, 0, 1e-3));
    FAILS(ARGUMENT, "", dot_optimizer_set(f->optimizer, DOT_HYPERS, 0, 0, 1e-3));
    FAILS(ARGUMENT, "", dot_optimizer_set(f->optimizer, (dot_hyper)-1, 0, 0, 1e-3));
    for (int i = 0; i < LENGTH(bad); ++i) {
        print_double(value, sizeof value, bad[i].value);
        FAILS(ARGUMENT, value, dot_optimizer_set(f->optimizer, bad[i].hyper, 0, 1, bad[i].value));
        FAILS(ARGUMENT, value, dot_optimizer_set(f->optimizer, bad[i].hyper, DOT_ALL, DOT_ALL, bad[i].value));
    }
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, DOT_HYPER_LR, 0, 2)));
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, DOT_HYPER_LR, 0, -1)));
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, DOT_HYPER_LR, 1, 0)));
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, DOT_HYPER_LR, -1, 0)));
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, DOT_HYPERS, 0, 0)));
    REFUSED(!nothing(dot_optimizer_get(f->optimizer, (dot_hyper)-1, 0, 0)));
    finish();
}

/* ---- schedules: no context, NaN for an invalid one --------------------------------------------------------------- */

static void invalid_schedule(int line, const char *what, dot_schedule schedule)
{
    ++rows;
    if (!isnan(dot_schedule_at(&schedule, 0)) || !isnan(dot_schedule_at(&schedule, 1000)))
        wrong(line, what, "a valid schedule", "");
}

#define INVALID(schedule) invalid_schedule(__LINE__, #schedule, schedule)

static void test_schedules(void **state)
{
    static const int64_t rising[17] = { 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17 };
    dot_schedule s;
    (void)state;
    wrong_rows = 0;
    INVALID(dot_schedule_step_drop(rising, 17, 0.1));
    INVALID(dot_schedule_step_drop(rising, -1, 0.1));
    INVALID(dot_schedule_step_drop(rising, INT_MAX, 0.1));
    INVALID(dot_schedule_step_drop(NULL, 1, 0.1));
    INVALID(dot_schedule_step_drop(rising, 3, NAN));
    INVALID(dot_schedule_step_drop(rising, 3, INFINITY));
    INVALID(dot_schedule_cosine(0, 0));
    INVALID(dot_schedule_cosine(-1, 0));
    INVALID(dot_schedule_cosine(INT64_MIN, 0));
    INVALID(dot_schedule_cosine(10, NAN));
    INVALID(dot_schedule_cosine(10, INFINITY));
    INVALID(dot_schedule_warm_restarts(0, 2, 0));
    INVALID(dot_schedule_warm_restarts(-1, 2, 0));
    INVALID(dot_schedule_warm_restarts(10, 0, 0));
    INVALID(dot_schedule_warm_restarts(10, -1, 0));
    INVALID(dot_schedule_warm_restarts(10, 2, NAN));
    s = dot_schedule_constant();
    s.kind = (dot_schedule_kind)4;
    INVALID(s);
    s.kind = (dot_schedule_kind)-1;
    INVALID(s);
    s = dot_schedule_step_drop(rising, 3, 0.1);
    s.milestone_count = 17;
    INVALID(s);
    s.milestone_count = -1;
    INVALID(s);
    ++rows;
    assert_true(isnan(dot_schedule_at(NULL, 0)));
    dot_schedule_period(NULL, 0, 10);
    s = dot_schedule_cosine(10, 0.25);          /* clamped outside its range: no errors */
    assert_true(dot_schedule_at(&s, INT64_MIN) == 1.0 && dot_schedule_at(&s, INT64_MAX) == 0.25);
    s = dot_schedule_warm_restarts(10, 2, 0.25);
    assert_true(dot_schedule_at(&s, INT64_MIN) == 1.0);
    double last = dot_schedule_at(&s, INT64_MAX);
    assert_true(last >= 0.25 && last <= 1.0);
    finish();
}

/* ---- the gradient check ----------------------------------------------------------------------------------------- */

static dot_tensor *squared_sum(void *user)
{
    dot_tensor *x = (dot_tensor *)user;
    dot_step_begin(dot_tensor_context(x));
    return dot_sum(dot_square(x), DOT_ALL_AXES, false);
}

static dot_tensor *squares(void *user)
{
    dot_tensor *x = (dot_tensor *)user;
    dot_step_begin(dot_tensor_context(x));
    return dot_square(x);
}

static dot_tensor *no_loss(void *user) { (void)user; return NULL; }

/* One row of its own kind: in a context that fits, NaN and a sentence, and the inputs as before. */
static void bad_check(int line, const char *what, dot_tensor *x, int statuses, const char *value, double result)
{
    dot_context *ctx = dot_tensor_context(x);
    dot_status status = dot_error_status(ctx);
    double element = -1;
    ++rows;
    if (!isnan(result))
        wrong(line, what, "was accepted", "");
    if (!(statuses >> status & 1) || (status && !begins_with(dot_error(ctx), "dot_gradient_check|dot_backward"))
        || !strstr(dot_error(ctx), value))
        wrong(line, what, "another sentence", dot_error(ctx));
    dot_error_clear(ctx);
    dot_tensor_get(x, 0, &element, 1);
    if (element != 3)
        wrong(line, what, "the inputs changed", "");
}

#define CHECK(statuses, value, call) bad_check(__LINE__, #call, x, statuses, value, call)

static void test_gradient_check(void **state)
{
    fixture *f = (fixture *)*state;
    dot_context_options co = dot_context_defaults();
    double three = 3;
    co.dtype = DOT_F64;
    dot_context *ctx = dot_context_create(&co);
    dot_tensor *x = dot_requires_grad(dot_tensor_create(ctx, DOT_F64, 1, SHAPE(1)), true);
    dot_tensor *pair = dot_requires_grad(dot_tensor_create(ctx, DOT_F64, 1, SHAPE(2)), true);
    dot_tensor *plain = dot_tensor_create(ctx, DOT_F64, 1, SHAPE(1));
    dot_tensor *narrow = dot_requires_grad(dot_tensor_create(ctx, DOT_F32, 1, SHAPE(1)), true);
    dot_tensor *none = NULL;
    wrong_rows = 0;
    assert_true(dot_tensor_set(x, 0, &three, 1));
    assert_true(dot_gradient_check(ctx, squared_sum, x, &x, 1, 1e-6) < 1e-6);
    CHECK(ARGUMENT, "0", dot_gradient_check(ctx, squared_sum, x, &x, 1, 0));
    CHECK(ARGUMENT, "-1", dot_gradient_check(ctx, squared_sum, x, &x, 1, -1));
    CHECK(ARGUMENT, "nan", dot_gradient_check(ctx, squared_sum, x, &x, 1, NAN));
    CHECK(ARGUMENT, "inf", dot_gradient_check(ctx, squared_sum, x, &x, 1, INFINITY));
    CHECK(ARGUMENT, "-1", dot_gradient_check(ctx, squared_sum, x, &x, -1, 1e-6));
    CHECK(DTYPE, "", dot_gradient_check(ctx, squared_sum, x, &narrow, 1, 1e-6));
    CHECK(ARGUMENT | STATE, "", dot_gradient_check(ctx, squared_sum, x, &plain, 1, 1e-6));
    CHECK(STATE, "", dot_gradient_check(ctx, squared_sum, x, &f->v3, 1, 1e-6));
    CHECK(SHAPES | ARGUMENT, "2", dot_gradient_check(ctx, squares, pair, &pair, 1, 1e-6));
    CHECK(NONE | ARGUMENT | STATE, "", dot_gradient_check(ctx, no_loss, x, &x, 1, 1e-6));
    CHECK(NONE | ARGUMENT, "", dot_gradient_check(ctx, NULL, x, &x, 1, 1e-6));
    CHECK(NONE | ARGUMENT, "", dot_gradient_check(ctx, squared_sum, x, NULL, 1, 1e-6));
    CHECK(NONE | ARGUMENT, "", dot_gradient_check(ctx, squared_sum, x, &none, 1, 1e-6));
    dot_context_destroy(ctx);

    co.lanes = 2;                       /* one lane only */
    ctx = dot_context_create(&co);
    x = dot_requires_grad(dot_tensor_create(ctx, DOT_F64, 1, SHAPE(1)), true);
    assert_true(dot_tensor_set(x, DOT_ALL, &three, 1));
    CHECK(STATE | ARGUMENT, "2", dot_gradient_check(ctx, squared_sum, x, &x, 1, 1e-6));
    dot_context_destroy(ctx);
    finish();
}

/* ---- files ------------------------------------------------------------------------------------------------------ */

static void test_weight_files(void **state)
{
    fixture *f = (fixture *)*state;
    char missing[600], folder[600], good[600], bad[600], nowhere[600];
    snprintf(nowhere, sizeof nowhere, "%s", scratch_path("missing/file"));
    snprintf(missing, sizeof missing, "%s", scratch_path("missing"));
    snprintf(folder, sizeof folder, "%s", scratch_path("folder"));
    snprintf(good, sizeof good, "%s", scratch_path("good"));
    snprintf(bad, sizeof bad, "%s", scratch_path("bad"));
    assert_int_equal(mkdir(folder, 0700), 0);
    wrong_rows = 0;
    SILENT(dot_save(NULL, good));
    SILENT(dot_save_lane(NULL, 0, good));
    SILENT(dot_load(NULL, good));
    REFUSED(dot_save(f->net, NULL));
    REFUSED(dot_save_lane(f->net, 0, NULL));
    REFUSED(dot_load(f->net, NULL));
    FAILS(NO_FILE, nowhere, dot_save(f->net, nowhere));
    FAILS(NO_FILE, folder, dot_save(f->net, folder));
    FAILS(NO_FILE, "", dot_save(f->net, ""));
    FAILS(NO_FILE, nowhere, dot_save_lane(f->net, 1, nowhere));
    FAILS(ARGUMENT, "2", dot_save_lane(f->net, 2, good));
    FAILS(ARGUMENT, "-1", dot_save_lane(f->net, -1, good));
    FAILS(NO_FILE, missing, dot_load(f->net, missing));
    FAILS(NO_FILE | FORMAT, folder, dot_load(f->net, folder));

    assert_true(write_file(bad, "", 0));
    FAILS(FORMAT, bad, dot_load(f->net, bad));
    assert_true(write_file(bad, "this is no safetensors file at all", 34));
    FAILS(FORMAT, bad, dot_load(f->net, bad));
    size_t bytes;
    assert_true(dot_save(f->net, good));
    unsigned char *content = read_file(good, &bytes);
    assert_true(write_file(bad, content, bytes - 1));
    FAILS(FORMAT, bad, dot_load(f->net, bad));
    assert_true(write_file(bad, content, 20));
    FAILS(FORMAT, bad, dot_load(f->net, bad));
    free(content);

    /* Well-formed files of other networks. */
    dot_layer *wider = dot_nn_sequential(f->ctx, dot_nn_linear(f->ctx, 3, 5), dot_nn_tanh(f->ctx),
                                         dot_nn_linear(f->ctx, 5, 3), NULL);
    assert_true(dot_save(wider, bad));
    FAILS(SHAPES, "0.weight", dot_load(f->net, bad));
    dot_layer *no_bias = dot_nn_sequential(f->ctx, dot_nn_linear_no_bias(f->ctx, 3, 4), dot_nn_tanh(f->ctx),
                                           dot_nn_linear(f->ctx, 4, 3), NULL);
    assert_true(dot_save(no_bias, bad));
    FAILS(ANY & ~(NO_FILE | MEMORY), "0.bias", dot_load(f->net, bad));      /* too few parameters */
    FAILS(ANY & ~(NO_FILE | MEMORY), "0.bias", dot_load(no_bias, good));    /* too many */
    static const int64_t integers[12] = { 1 };
    static const float zeros[12] = { 0 };
    const dot_safetensors_item items[] = { { "0.weight", DOT_I64, 2, { 4, 3 }, integers }, { "0.bias", DOT_F32, 1, { 4 }, zeros },
        { "2.weight", DOT_F32, 2, { 3, 4 }, zeros }, { "2.bias", DOT_F32, 1, { 3 }, zeros } };
    assert_true(dot_safetensors_write(f->ctx, bad, items, 4, NULL));
    FAILS(DTYPE, "0.weight", dot_load(f->net, bad));
    remove(bad);
    remove(good);
    remove(folder);
    finish();
}

static void test_checkpoint_files(void **state)
{
    fixture *f = (fixture *)*state;
    char missing[600], folder[600], good[600], bad[600], weights[600];
    int64_t step = 5;
    snprintf(missing, sizeof missing, "%s", scratch_path("missing"));
    snprintf(folder, sizeof folder, "%s", scratch_path("folder"));
    snprintf(good, sizeof good, "%s", scratch_path("good"));
    snprintf(bad, sizeof bad, "%s", scratch_path("bad"));
    snprintf(weights, sizeof weights, "%s", scratch_path("weights.safetensors"));
    assert_int_equal(mkdir(folder, 0700), 0);
    wrong_rows = 0;
    SILENT(dot_checkpoint_save(good, NULL, f->optimizer, 0));
    SILENT(dot_checkpoint_save(good, f->net, NULL, 0));
    SILENT(dot_checkpoint_load(good, NULL, f->optimizer, &step));
    SILENT(dot_checkpoint_load(good, f->net, NULL, &step));
    REFUSED(dot_checkpoint_save(NULL, f->net, f->optimizer, 0));
    REFUSED(dot_checkpoint_load(NULL, f->net, f->optimizer, &step));
    FAILS(ARGUMENT, "-1", dot_checkpoint_save(good, f->net, f->optimizer, -1));
    FAILS(ARGUMENT, "-9223372036854775808", dot_checkpoint_save(good, f->net, f->optimizer, INT64_MIN));
    FAILS(STATE, "", dot_checkpoint_save(good, f->net, f->foreign_optimizer, 0));
    FAILS(NO_FILE, folder, dot_checkpoint_save(folder, f->net, f->optimizer, 0));
    FAILS(NO_FILE, missing, dot_checkpoint_load(missing, f->net, f->optimizer, &step));
    FAILS(NO_FILE | FORMAT, folder, dot_checkpoint_load(folder, f->net, f->optimizer, &step));

    size_t bytes;
    assert_true(dot_save(f->net, weights));
    FAILS(ANY & ~(NO_FILE | MEMORY), weights, dot_checkpoint_load(weights, f->net, f->optimizer, &step));
    assert_true(dot_checkpoint_save(good, f->net, f->optimizer, 9));
    FAILS(STATE, "", dot_checkpoint_load(good, f->net, f->foreign_optimizer, &step));
    unsigned char *content = read_file(good, &bytes);
    for (size_t cut = 1; cut < bytes; cut += bytes / 7) {
        assert_true(write_file(bad, content, bytes - cut));
        FAILS(FORMAT, bad, dot_checkpoint_load(bad, f->net, f->optimizer, &step));
    }
    free(content);

    /* Whole checkpoints of other training: another algorithm, network, number of lanes. */
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAFACTOR);
    dot_optimizer *adafactor = dot_optimizer_create(f->ctx, f->net, &o);
    assert_true(dot_checkpoint_save(bad, f->net, adafactor, 1));
    FAILS(ANY & ~(NO_FILE | MEMORY), "", dot_checkpoint_load(bad, f->net, f->optimizer, &step));
    dot_layer *wider = dot_nn_linear(f->ctx, 3, 5);
    dot_optimizer *of_wider = dot_optimizer_create(f->ctx, wider, NULL);
    assert_true(dot_checkpoint_save(bad, wider, of_wider, 1));
    FAILS(ANY & ~(NO_FILE | MEMORY), "", dot_checkpoint_load(bad, f->net, f->optimizer, &step));
    dot_context *single = dot_context_create(NULL);
    dot_layer *alone = small_net(single);
    assert_true(dot_checkpoint_save(bad, alone, dot_optimizer_create(single, alone, NULL), 1));
    FAILS(ANY & ~(NO_FILE | MEMORY), "", dot_checkpoint_load(bad, f->net, f->optimizer, &step));
    dot_context_destroy(single);
    assert_int_equal(step, 5);          /* no failure has touched it */
    assert_true(dot_checkpoint_load(good, f->net, f->optimizer, &step));
    assert_int_equal(step, 9);
    remove(bad);
    remove(good);
    remove(weights);
    remove(folder);
    finish();
}

static void test_safetensors(void **state)
{
    fixture *f = (fixture *)*state;
    char missing[600], folder[600], good[600], bad[600];
    static const float data[4] = { 1, 2, 3, 4 };
    dot_safetensors_item item = { "values", DOT_F32, 2, { 2, 2 }, data }, items[2];
    dot_safetensors_entry entry;
    double out[5];
    snprintf(missing, sizeof missing, "%s", scratch_path("missing"));
    snprintf(folder, sizeof folder, "%s", scratch_path("folder"));
    snprintf(good, sizeof good, "%s", scratch_path("good"));
    snprintf(bad, sizeof bad, "%s", scratch_path("bad"));
    assert_int_equal(mkdir(folder, 0700), 0);
    assert_true(dot_safetensors_write(f->ctx, good, &item, 1, NULL));
    wrong_rows = 0;
    REFUSED(dot_safetensors_write(f->ctx, NULL, &item, 1, NULL));
    REFUSED(dot_safetensors_write(f->ctx, bad, NULL, 1, NULL));
    FAILS(ARGUMENT, "-1", dot_safetensors_write(f->ctx, bad, &item, -1, NULL));
    FAILS(NO_FILE, folder, dot_safetensors_write(f->ctx, folder, &item, 1, NULL));
#define ITEM(change) (items[0] = items[1] = item, items[1].name = "second", change)
    ITEM(items[0].name = NULL);
    REFUSED(dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].data = NULL);
    REFUSED(dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[1].name = "values");
    FAILS(ARGUMENT, "values", dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].dtype = (dot_dtype)17);
    FAILS(ARGUMENT | DTYPE, "17", dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].rank = 9);
    FAILS(ARGUMENT | SHAPES, "9", dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].rank = -1);
    FAILS(ARGUMENT | SHAPES, "-1", dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].shape[1] = -2);
    FAILS(ARGUMENT | SHAPES, "-2", dot_safetensors_write(f->ctx, bad, items, 2, NULL));
    ITEM(items[0].shape[1] = BIG);
    FAILS(SIZES, BIG_TEXT, dot_safetensors_write(f->ctx, bad, items, 2, NULL));

    REFUSED(dot_safetensors_open(f->ctx, NULL));
    FAILS(NO_FILE, missing, dot_safetensors_open(f->ctx, missing));
    FAILS(NO_FILE | FORMAT, folder, dot_safetensors_open(f->ctx, folder));
    assert_true(write_file(bad, "\1\0\0\0\0\0\0\0[", 9));
    FAILS(FORMAT, bad, dot_safetensors_open(f->ctx, bad));

    dot_safetensors *file = dot_safetensors_open(f->ctx, good);
    assert_int_equal(dot_safetensors_count(file), 1);
    SILENT(dot_safetensors_count(NULL));
    SILENT(dot_safetensors_entry_at(NULL, 0, &entry));
    SILENT(dot_safetensors_find(NULL, "values") >= 0);
    SILENT(dot_safetensors_metadata(NULL, "key"));
    SILENT(dot_safetensors_read(NULL, 0, out, 16));
    SILENT(dot_safetensors_read_double(NULL, 0, out, 4));
    dot_safetensors_close(NULL);
    REFUSED(dot_safetensors_entry_at(file, 0, NULL));
    REFUSED(dot_safetensors_entry_at(file, 1, &entry));
    REFUSED(dot_safetensors_entry_at(file, -1, &entry));
    SILENT(dot_safetensors_find(file, "value") >= 0);
    SILENT(dot_safetensors_find(file, NULL) >= 0);
    SILENT(dot_safetensors_metadata(file, "key"));
    SILENT(dot_safetensors_metadata(file, NULL));
    FAILS(ARGUMENT, "1", dot_safetensors_read(file, 1, out, 16));
    FAILS(ARGUMENT, "-1", dot_safetensors_read(file, -1, out, 16));
    FAILS(ARGUMENT | SHAPES, "17", dot_safetensors_read(file, 0, out, 17));
    FAILS(ARGUMENT | SHAPES, "15", dot_safetensors_read(file, 0, out, 15));
    REFUSED(dot_safetensors_read(file, 0, NULL, 16));
    FAILS(ARGUMENT, "1", dot_safetensors_read_double(file, 1, out, 4));
    FAILS(ARGUMENT, "-1", dot_safetensors_read_double(file, -1, out, 4));
    FAILS(ARGUMENT | SHAPES, "5", dot_safetensors_read_double(file, 0, out, 5));
    FAILS(ARGUMENT | SHAPES, "-1", dot_safetensors_read_double(file, 0, out, -1));
    REFUSED(dot_safetensors_read_double(file, 0, NULL, 4));
    dot_safetensors_close(file);

    static const char header[] = "{\"b\":{\"dtype\":\"BF16\",\"shape\":[1],\"data_offsets\":[0,2]}}  ";
    unsigned char half[8 + sizeof header - 1 + 2] = { sizeof header - 1 };
    memcpy(half + 8, header, sizeof header - 1);
    assert_true(write_file(bad, half, sizeof half));
    file = dot_safetensors_open(f->ctx, bad);
    assert_non_null(file);
    FAILS(DTYPE, "BF16", dot_safetensors_read_double(file, 0, out, 1));
    dot_safetensors_close(file);
    remove(bad);
    remove(good);
    remove(folder);
    finish();
}

/* ---- datasets --------------------------------------------------------------------------------------------------- */

static void test_datasets(void **state)
{
    fixture *f = (fixture *)*state;
    dot_dataset_options o;
    wrong_rows = 0;
#define MEMORY_SET(options) dot_dataset_memory(f->ctx, records, record_labels, 4, 3, SHAPE(2, 3, 1), options)
    memset(&o, 0, sizeof o);
    FAILS_AS("dot_dataset_memory", ARGUMENT, "", MEMORY_SET(&o));
#define DATA(change, value) (o = dot_dataset_defaults(), change), \
    FAILS_AS("dot_dataset_memory", ARGUMENT, value, MEMORY_SET(&o))
    DATA(o.scale = NAN, "nan");
    DATA(o.scale = INFINITY, "inf");
    DATA(o.scale = -INFINITY, "inf");
    DATA(o.first = -1, "-1");
    DATA(o.first = 5, "5");
    DATA(o.first = INT64_MAX, "9223372036854775807");
    DATA(o.count = -2, "-2");
    DATA(o.count = 5, "5");
    DATA((o.first = 2, o.count = 3), "3");
    DATA((o.first = 2, o.count = INT64_MAX), "9223372036854775807");
    REFUSED(dot_dataset_memory(f->ctx, NULL, NULL, 4, 1, SHAPE(6), NULL));
    REFUSED(dot_dataset_memory(f->ctx, records, NULL, 4, 1, NULL, NULL));
    FAILS(ARGUMENT, "-1", dot_dataset_memory(f->ctx, records, NULL, -1, 1, SHAPE(6), NULL));
    FAILS(ARGUMENT | SHAPES, "8", dot_dataset_memory(f->ctx, records, NULL, 4, 8, SHAPE(1, 1, 1, 1, 1, 1, 1, 6), NULL));
    FAILS(ARGUMENT | SHAPES, "-1", dot_dataset_memory(f->ctx, records, NULL, 4, -1, SHAPE(6), NULL));
    FAILS(ARGUMENT | SHAPES, "-6", dot_dataset_memory(f->ctx, records, NULL, 4, 1, SHAPE(-6), NULL));
    FAILS(SIZES, BIG_TEXT, dot_dataset_memory(f->ctx, records, NULL, 4, 1, SHAPE(BIG), NULL));
    FAILS(SIZES, BIG_TEXT, dot_dataset_memory(f->ctx, records, NULL, 1, 2, SHAPE(BIG, 4), NULL));

    SILENT(dot_dataset_count(NULL));
    SILENT(dot_dataset_record(NULL, 0));
    dot_dataset_label(NULL, 0);
    REFUSED(dot_dataset_record(f->data, 4));
    REFUSED(dot_dataset_record(f->data, -1));
    REFUSED(dot_dataset_record(f->data, INT64_MAX));
    REFUSED(dot_dataset_label(f->data, 4) > 0);
    REFUSED(dot_dataset_label(f->data, -1) > 0);
    assert_int_equal(dot_dataset_label(f->unlabelled, 0), -1);

    SILENT(dot_batches(NULL, 2));
    REFUSED(dot_batches(f->data, 0));
    REFUSED(dot_batches(f->data, -1));
    SILENT(dot_batch(NULL, 2, 0));
    SILENT(dot_batch_labels(NULL, 2, 0));
    FAILS(ARGUMENT, "0", dot_batch(f->data, 0, 0));
    FAILS(ARGUMENT, "-1", dot_batch(f->data, -1, 0));
    FAILS(ARGUMENT, "-1", dot_batch(f->data, 2, -1));
    FAILS(ARGUMENT, "-9223372036854775808", dot_batch(f->data, 2, INT64_MIN));
    FAILS(ARGUMENT, "0", dot_batch_labels(f->data, 0, 0));
    FAILS(ARGUMENT, "-1", dot_batch_labels(f->data, -1, 0));
    FAILS(ARGUMENT, "-1", dot_batch_labels(f->data, 2, -1));
    FAILS(STATE | ARGUMENT, "", dot_batch_labels(f->unlabelled, 2, 0));
    assert_non_null(dot_batch(f->data, INT64_MAX, INT64_MAX));      /* a batch of all; any step has a batch */
    finish();
}

/* Writes an IDX file: type byte 8 and `rank` sizes, each below 256, then `bytes` zeros. */
static void write_idx(const char *path, int type, int rank, int a, int b, int c, int bytes)
{
    unsigned char content[256] = { 0, 0, (unsigned char)type, (unsigned char)rank };
    const int sizes[3] = { a, b, c };
    for (int i = 0; i < rank && i < 3; ++i)
        content[4 + 4 * i + 3] = (unsigned char)sizes[i];
    assert_true(write_file(path, content, (size_t)(4 + 4 * rank + bytes)));
}

static void test_idx_files(void **state)
{
    fixture *f = (fixture *)*state;
    char missing[600], folder[600], images[600], labels[600], bad[600];
    dot_dataset_options o = dot_dataset_defaults();
    snprintf(missing, sizeof missing, "%s", scratch_path("missing"));
    snprintf(folder, sizeof folder, "%s", scratch_path("folder"));
    snprintf(images, sizeof images, "%s", scratch_path("images"));
    snprintf(labels, sizeof labels, "%s", scratch_path("labels"));
    snprintf(bad, sizeof bad, "%s", scratch_path("bad"));
    assert_int_equal(mkdir(folder, 0700), 0);
    write_idx(images, 8, 3, 4, 2, 3, 24);
    write_idx(labels, 8, 1, 4, 0, 0, 4);
    assert_non_null(dot_dataset_idx(f->ctx, images, labels, NULL));
    wrong_rows = 0;
    REFUSED(dot_dataset_idx(f->ctx, NULL, labels, NULL));
    FAILS(NO_FILE, missing, dot_dataset_idx(f->ctx, missing, NULL, NULL));
    FAILS(NO_FILE, missing, dot_dataset_idx(f->ctx, images, missing, NULL));
    FAILS(NO_FILE | FORMAT, folder, dot_dataset_idx(f->ctx, folder, NULL, NULL));
    FAILS(FORMAT, labels, dot_dataset_idx(f->ctx, labels, NULL, NULL));
    FAILS(FORMAT, images, dot_dataset_idx(f->ctx, images, images, NULL));
    assert_true(write_file(bad, "", 0));
    FAILS(FORMAT, bad, dot_dataset_idx(f->ctx, bad, NULL, NULL));
    assert_true(write_file(bad, "not an IDX file, but text", 25));
    FAILS(FORMAT, bad, dot_dataset_idx(f->ctx, bad, NULL, NULL));
    write_idx(bad, 8, 3, 4, 2, 3, 23);          /* one byte short */
    FAILS(FORMAT, bad, dot_dataset_idx(f->ctx, bad, NULL, NULL));
    write_idx(bad, 8, 3, 4, 2, 3, 25);          /* one too many */
    FAILS(FORMAT, bad, dot_dataset_idx(f->ctx, bad, NULL, NULL));
    write_idx(bad, 13, 3, 1, 2, 3, 24);         /* floats */
    FAILS(FORMAT | DTYPE, bad, dot_dataset_idx(f->ctx, bad, NULL, NULL));
    write_idx(bad, 8, 1, 3, 0, 0, 3);           /* fewer labels than images */
    FAILS(FORMAT | SHAPES, bad, dot_dataset_idx(f->ctx, images, bad, NULL));
    o.count = 5;
    FAILS(ARGUMENT, "5", dot_dataset_idx(f->ctx, images, labels, &o));
    memset(&o, 0, sizeof o);
    FAILS(ARGUMENT, "", dot_dataset_idx(f->ctx, images, labels, &o));
    remove(images);
    remove(labels);
    remove(bad);
    remove(folder);
    finish();
}

/* ---- while an error stands -------------------------------------------------------------------------------------- */

static void test_standing_error(void **state)
{
    fixture *f = (fixture *)*state;
    char path[600];
    snprintf(path, sizeof path, "%s", scratch_path("standing"));
    dot_tensor *loss = dot_sum(dot_forward(f->net, f->x), DOT_ALL_AXES, false);
    uint64_t before = fingerprint(f);
    assert_null(dot_add(f->x, f->wide));
    char sentence[512];
    snprintf(sentence, sizeof sentence, "%s", dot_error(f->ctx));
    for (int i = 0; i < LENGTH(unaries); ++i)
        assert_null(unaries[i].call(f->x));
    for (int i = 0; i < LENGTH(binaries); ++i)
        assert_null(binaries[i].call(f->x, f->x));
    for (int i = 0; i < LENGTH(reductions); ++i)
        assert_null(reductions[i].call(f->x, DOT_ALL_AXES, false));
    assert_null(dot_matmul(f->x, f->weight));
    assert_null(dot_linear(f->x, f->weight, f->v4, DOT_NONE));
    assert_null(dot_conv(f->image, f->kernels, f->v4, NULL, DOT_NONE));
    assert_null(dot_conv_transpose(f->image, f->kernels, f->v4, NULL, DOT_NONE));
    assert_null(dot_max_pool(f->image, NULL));
    assert_null(dot_reshape(f->x, 1, SHAPE(6)));
    assert_null(dot_softmax(f->x, 0));
    assert_null(dot_dropout(f->x, 0.5));
    assert_null(dot_embedding(f->weight, f->integers));
    assert_null(dot_cross_entropy_loss(f->x, f->integers, 0));
    assert_null(dot_batch(f->data, 2, 0));
    assert_null(dot_input(f->ctx, DOT_F32, 1, SHAPE(1), records));
    assert_null(dot_tensor_create(f->ctx, DOT_F32, 1, SHAPE(1)));
    assert_null(dot_nn_linear(f->ctx, 3, 4));
    assert_null(dot_optimizer_create(f->ctx, f->net, NULL));
    assert_null(dot_forward(f->net, f->x));
    assert_false(dot_backward(loss));
    assert_false(dot_optimizer_step(f->optimizer, 1));
    assert_true(nothing(dot_clip_grad_norm(f->optimizer, 1)));
    assert_true(dot_save(f->net, path));        /* so that nothing is lost */
    assert_true(dot_load(f->net, path));
    assert_string_equal(dot_error(f->ctx), sentence);
    assert_int_equal(dot_error_status(f->ctx), DOT_ERROR_SHAPE);
    assert_false(dot_ok(f->ctx));
    dot_error_clear(f->ctx);

    assert_true(fingerprint(f) == before);      /* dot_load gave every lane the weights of lane 0, which are its own */
    assert_true(dot_backward(loss));
    assert_true(dot_optimizer_step(f->optimizer, 1));
    assert_true(fingerprint(f) != before);
    remove(path);
}

/* Contexts are independent: an error in one does not stop the other. */
static void test_independent_contexts(void **state)
{
    fixture *f = (fixture *)*state;
    assert_null(dot_add(f->x, f->wide));
    assert_false(dot_ok(f->ctx));
    assert_true(dot_ok(f->other));
    assert_non_null(dot_neg(f->foreign));
    assert_null(dot_add(f->foreign, f->x));
    assert_int_equal(dot_error_status(f->other), DOT_ERROR_STATE);
    dot_error_clear(f->ctx);
    assert_false(dot_ok(f->other));
    dot_error_clear(f->other);
    assert_true(dot_ok(f->other));
}

/* What the tests above wrote they have removed: files that are left are a failed save's. */
static void test_no_files_left(void **state)
{
    (void)state;
    assert_int_equal(scratch_files(), 0);
}

static int print_rows(void **state)
{
    (void)state;
    print_message("%d rows of misuse\n", rows);
    return 0;
}

#define WITH_FIXTURE(test) cmocka_unit_test_setup_teardown(test, open_fixture, close_fixture)

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_context), cmocka_unit_test(test_schedules),
        WITH_FIXTURE(test_null_context), WITH_FIXTURE(test_lanes), WITH_FIXTURE(test_tensor_create),
        WITH_FIXTURE(test_tensor_access), WITH_FIXTURE(test_elementwise), WITH_FIXTURE(test_reductions),
        WITH_FIXTURE(test_products), WITH_FIXTURE(test_indices), WITH_FIXTURE(test_shapes),
        WITH_FIXTURE(test_conv_options), WITH_FIXTURE(test_conv_shapes), WITH_FIXTURE(test_pooling),
        WITH_FIXTURE(test_normalisation), WITH_FIXTURE(test_backward), WITH_FIXTURE(test_layer_options),
        WITH_FIXTURE(test_forward), WITH_FIXTURE(test_layer_trees), WITH_FIXTURE(test_parameters),
        WITH_FIXTURE(test_optimizer_options), WITH_FIXTURE(test_optimizer_create), WITH_FIXTURE(test_optimizer_calls),
        WITH_FIXTURE(test_gradient_check), WITH_FIXTURE(test_weight_files), WITH_FIXTURE(test_checkpoint_files),
        WITH_FIXTURE(test_safetensors), WITH_FIXTURE(test_datasets), WITH_FIXTURE(test_idx_files),
        WITH_FIXTURE(test_standing_error), WITH_FIXTURE(test_independent_contexts),
        cmocka_unit_test(test_no_files_left),
    };
    return cmocka_run_group_tests_name("errors", tests, NULL, print_rows);
}
