/* The optimizers that evaluate the loss themselves: against the golden numbers that golden/make_solvers.py makes with PyTorch and
   NumPy, on problems with known solutions, for every number of threads, with bad input, and with an allocator that fails. */
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

#include "nets.h"

#define GOLDEN "tests/golden/solvers.safetensors"
#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))
enum { MOST = 128 };        /* parameters of a test problem */

static dot_context *golden_context;
static dot_safetensors *golden_file;

/* ---- helpers ------------------------------------------------------------------------------------------------------ */

static void require(const dot_context *ctx, bool condition, const char *what)
{
    if (!condition || !dot_ok(ctx))
        fail_msg("%s: %s", what, ctx ? dot_error(ctx) : "no context");
}

static dot_context *open_context(dot_dtype dtype, uint64_t seed, int threads)
{
    dot_context_options options = dot_context_defaults();
    options.dtype = dtype;
    options.seed = seed;
    options.threads = threads;
    options.flush_denormals = false;
    dot_context *ctx = dot_context_create(&options);
    require(ctx, ctx != NULL, "dot_context_create");
    return ctx;
}

/* The values of golden tensor `prefix``name`, to be freed by the caller. */
static double *golden(const char *prefix, const char *name, dot_safetensors_entry *entry)
{
    char full[128];
    snprintf(full, sizeof full, "%s%s", prefix, name);
    int index = dot_safetensors_find(golden_file, full);
    if (index < 0 || !dot_safetensors_entry_at(golden_file, index, entry))
        fail_msg("%s: no tensor '%s'", GOLDEN, full);
    double *values = (double *)calloc((size_t)entry->count + 1, sizeof *values);
    assert_non_null(values);
    require(golden_context, dot_safetensors_read_double(golden_file, index, values, entry->count), full);
    return values;
}

/* The number behind "key=" in a line of golden metadata, or `otherwise`. */
static double setting(const char *line, const char *key, double otherwise)
{
    char word[64];
    snprintf(word, sizeof word, "%s=", key);
    const char *found = strstr(line, word);
    return found ? strtod(found + strlen(word), NULL) : otherwise;
}

/* Asserts |a - b| <= tolerance * max(|b|, the largest |b|). */
static void assert_close(const char *what, int64_t row, const double *a, const double *b, int64_t n, double tolerance)
{
    double size = 0;
    for (int64_t i = 0; i < n; ++i)
        size = fmax(size, fabs(b[i]));
    for (int64_t i = 0; i < n; ++i)
        if (!(fabs(a[i] - b[i]) <= tolerance * size))
            fail_msg("%s, row %lld: [%lld] is %.17g, expected %.17g", what, (long long)row, (long long)i, a[i], b[i]);
}

static void assert_error(dot_context *ctx, dot_status status, const char *text)
{
    if (dot_error_status(ctx) != status || !strstr(dot_error(ctx), text))
        fail_msg("error %d \"%s\", expected %d with \"%s\"", (int)dot_error_status(ctx), dot_error(ctx), (int)status, text);
    dot_error_clear(ctx);
}

#define REFUSES(kind, field, value, text) do { \
        dot_##kind##_options o_ = dot_##kind##_defaults(); \
        o_.field = value; \
        assert_null(dot_##kind##_create(p.ctx, p.layer, &o_)); \
        assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_" #kind "_create: " text); \
    } while (0)

/* ---- problems ----------------------------------------------------------------------------------------------------- */

typedef struct problem problem;
struct problem {
    dot_context *ctx;
    dot_layer *layer;
    dot_tensor *theta;              /* all parameters, of those problems that have one vector */
    dot_tensor *(*value)(problem *p);
    int64_t n;
    double decades;                 /* bowl: curvatures from 1 to 10^decades */
    int64_t rows, batch;            /* data of net and squares; squares: rows of a batch */
    int64_t features;               /* net: of a row of x */
    dot_fisher fisher;              /* natural gradient: what an example returns */
    uint64_t stream;                /* of sampled labels */
    const double *x, *y;
    int64_t calls, bad_call;        /* the call at which the loss is not finite, from 1; 0: never */
    double bad_value;
    int mistake;                    /* what the loss function does wrong; see loss_of */
};

/* A step tensor with these values, in the context's type. */
static dot_tensor *constant(dot_context *ctx, int rank, const int64_t *shape, const double *values)
{
    int64_t n = 1;
    for (int i = 0; i < rank; ++i)
        n *= shape[i];
    float *narrow = (float *)calloc((size_t)n, sizeof *narrow);
    assert_non_null(narrow);
    for (int64_t i = 0; i < n; ++i)
        narrow[i] = (float)values[i];
    bool f64 = dot_context_dtype(ctx) == DOT_F64;
    dot_tensor *t = dot_input(ctx, dot_context_dtype(ctx), rank, shape, f64 ? (const void *)values : (const void *)narrow);
    free(narrow);
    return t;
}

static dot_tensor *rosenbrock(problem *p)
{
    dot_tensor *head = dot_slice(p->theta, 0, 0, p->n - 1), *tail = dot_slice(p->theta, 0, 1, p->n);
    dot_tensor *valley = dot_mul_scalar(dot_square(dot_sub(tail, dot_square(head))), 100);
    dot_tensor *slope = dot_square(dot_add_scalar(dot_neg(head), 1));
    return dot_sum(dot_add(valley, slope), DOT_ALL_AXES, false);
}

/* 0.5 sum a_i (x_i - b_i)^2 with a_i = 10^(decades i / (n - 1)), b_i = sin(1 + i) */
static dot_tensor *bowl(problem *p)
{
    double a[MOST], b[MOST];
    for (int i = 0; i < (int)p->n; ++i) {
        a[i] = pow(10, p->decades * i / (double)(p->n - 1));
        b[i] = sin(1.0 + i);
    }
    dot_tensor *distance = dot_square(dot_sub(p->theta, constant(p->ctx, 1, &p->n, b)));
    return dot_mul_scalar(dot_sum(dot_mul(constant(p->ctx, 1, &p->n, a), distance), DOT_ALL_AXES, false), 0.5);
}

static dot_tensor *net_loss(problem *p)
{
    int64_t in[2] = { p->rows, p->features }, out[2] = { p->rows, 2 };
    dot_tensor *x = constant(p->ctx, 2, in, p->x), *y = constant(p->ctx, 2, out, p->y);
    return dot_mse_loss(dot_forward(p->layer, x), y);
}

static dot_tensor *squares_of(problem *p, int64_t first, int64_t rows)
{
    int64_t shape[2] = { rows, p->n }, column[2] = { rows, 1 }, vector[2] = { p->n, 1 };
    dot_tensor *x = constant(p->ctx, 2, shape, p->x + first * p->n), *y = constant(p->ctx, 2, column, p->y + first);
    return dot_mul_scalar(dot_mse_loss(dot_matmul(x, dot_reshape(p->theta, 2, vector)), y), 0.5);
}

static dot_tensor *squares(problem *p) { return squares_of(p, 0, p->rows); }

static dot_tensor *pass(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)user, (void)layer;
    return x;
}

static void begin_at(problem *p, const double *start)
{
    dot_parameter_info info;
    for (int i = 0; i < dot_layer_parameters(p->layer) && dot_layer_parameter(p->layer, i, &info); ++i) {
        dot_parameter_set(p->layer, info.name, 0, start, dot_tensor_size(info.tensor));
        start += dot_tensor_size(info.tensor);
    }
}

static problem open_problem(dot_context *ctx, dot_tensor *(*value)(problem *p), int64_t n, const double *start)
{
    problem p;
    memset(&p, 0, sizeof p);
    p.ctx = ctx;
    p.value = value;
    p.n = n;
    p.decades = 3;
    p.features = 4;
    if (value == net_loss) {
        p.layer = dot_nn_sequential(ctx, dot_nn_linear(ctx, 4, 5), dot_nn_tanh(ctx), dot_nn_linear(ctx, 5, 2), NULL);
    } else {
        p.layer = dot_nn_custom(ctx, "point", pass, NULL);
        p.theta = dot_layer_add_parameter(p.layer, "theta", DOT_KIND_WEIGHT, 1, &n);
    }
    if (start)
        begin_at(&p, start);
    return p;
}

enum { RIGHT, RETURNS_NULL, RETURNS_VECTOR, RETURNS_FOREIGN, FAILS };

static dot_tensor *loss_of(void *user)
{
    problem *p = (problem *)user;
    dot_step_begin(p->ctx);
    ++p->calls;
    dot_tensor *loss = p->value(p);
    if (p->calls == p->bad_call)
        return dot_mul_scalar(dot_exp(dot_mul_scalar(dot_add_scalar(loss, 1), 1e300)), p->bad_value);   /* infinite or NaN */
    if (p->mistake == RETURNS_NULL)
        return NULL;
    if (p->mistake == RETURNS_VECTOR)
        return dot_mul_scalar(p->theta, 2);
    if (p->mistake == FAILS)
        return dot_reshape(loss, 1, &p->n);
    return loss;
}

static dot_tensor *batch_of(void *user, int64_t index)
{
    problem *p = (problem *)user;
    dot_step_begin(p->ctx);
    ++p->calls;
    return squares_of(p, index * p->batch, p->batch);
}

static void values_of(const problem *p, double *out)
{
    int64_t count;
    double *values = snapshot(p->layer, 0, TRAINABLE_VALUES, &count);
    assert_non_null(values);
    assert_true(count == p->n);
    memcpy(out, values, (size_t)count * sizeof *out);
    free(values);
}

static double value_now(problem *p)
{
    dot_step_begin(p->ctx);
    return dot_item(p->value(p), 0);
}

typedef struct data { double *squares_x, *squares_y, *net_x, *net_y, *net_start; } data;

static data open_data(void)
{
    data d;
    dot_safetensors_entry entry;
    d.squares_x = golden("squares.x", "", &entry);
    d.squares_y = golden("squares.y", "", &entry);
    d.net_x = golden("net.x", "", &entry);
    d.net_y = golden("net.y", "", &entry);
    d.net_start = golden("lbfgs.net.start", "", &entry);
    return d;
}

static void close_data(data *d)
{
    free(d->squares_x), free(d->squares_y), free(d->net_x), free(d->net_y), free(d->net_start);
}

/* ---- L-BFGS ------------------------------------------------------------------------------------------------------- */

static const char *const lbfgs_cases[] = {
    "rosenbrock", "rosenbrock_each", "rosenbrock_plain", "rosenbrock_history", "rosenbrock_short", "rosenbrock_lr",
    "rosenbrock_small", "rosenbrock_far", "rosenbrock_end",
    "bowl", "bowl_wolfe", "bowl_history", "net", "net_wolfe",
};

static void lbfgs_like_torch(const char *name)
{
    char prefix[64];
    snprintf(prefix, sizeof prefix, "lbfgs.%s", name);
    const char *line = dot_safetensors_metadata(golden_file, prefix);
    assert_non_null(line);
    dot_safetensors_entry start_entry, entry;
    double *start = golden(prefix, ".start", &start_entry), *theta = golden(prefix, ".theta", &entry), theta_now[MOST];
    int64_t steps = entry.shape[0], n = entry.shape[1];
    double *loss = golden(prefix, ".loss", &entry), *count = golden(prefix, ".count", &entry);
    double *x = golden("net.x", "", &entry), *y = golden("net.y", "", &entry);
    dot_context *ctx = open_context(DOT_F64, 0, 2);
    problem p = open_problem(ctx, strstr(line, "=rosen") ? rosenbrock : strstr(line, "=bowl") ? bowl : net_loss, n, start);
    p.x = x;
    p.y = y;
    p.rows = 12;
    dot_lbfgs_options o = dot_lbfgs_defaults();
    o.lr = setting(line, "lr", 1);
    o.max_iter = (int)setting(line, "max_iter", 20);
    o.max_eval = (int)setting(line, "max_eval", 25);
    o.history = (int)setting(line, "history_size", 100);
    o.line_search = setting(line, "search", 0) > 0 ? DOT_LINE_SEARCH_STRONG_WOLFE : DOT_LINE_SEARCH_NONE;
    dot_lbfgs *l = dot_lbfgs_create(ctx, p.layer, &o);
    require(ctx, l != NULL, name);
    for (int64_t i = 0; i < steps; ++i) {
        double first = dot_lbfgs_step(l, loss_of, &p);
        require(ctx, true, name);
        values_of(&p, theta_now);
        assert_close(name, i, theta_now, theta + i * n, n, 1e-9);
        if (!(fabs(first - loss[i]) <= 1e-9 * fabs(loss[i]) + 1e-15))
            fail_msg("%s: loss %lld is %.17g, expected %.17g", name, (long long)i, first, loss[i]);
        assert_int_equal(dot_lbfgs_iterations(l), (int64_t)count[2 * i]);
        assert_int_equal(dot_lbfgs_evaluations(l), (int64_t)count[2 * i + 1]);
    }
    free(start), free(theta), free(loss), free(count), free(x), free(y);
    dot_context_destroy(ctx);
}

static void test_lbfgs_like_torch(void **state)
{
    (void)state;
    for (int i = 0; i < COUNT(lbfgs_cases); ++i)
        lbfgs_like_torch(lbfgs_cases[i]);
}

static void test_lbfgs_rosenbrock(void **state)
{
    static const double start[2] = { -1.2, 1 };
    (void)state;
    for (int f64 = 0; f64 < 2; ++f64) {
        dot_context *ctx = open_context(f64 ? DOT_F64 : DOT_F32, 0, 1);
        problem p = open_problem(ctx, rosenbrock, 2, start);
        dot_lbfgs_options o = dot_lbfgs_defaults();
        o.line_search = DOT_LINE_SEARCH_STRONG_WOLFE;
        o.max_iter = 100;
        o.max_eval = 200;
        o.tolerance_change = 0;
        o.tolerance_grad = 1e-13;
        dot_lbfgs *l = dot_lbfgs_create(ctx, p.layer, &o);
        double x[2];
        assert_true(fabs(dot_lbfgs_step(l, loss_of, &p) - 24.2) < 1e-5);
        require(ctx, true, "dot_lbfgs_step");
        values_of(&p, x);
        print_message("# L-BFGS, Rosenbrock, %s: error %.2g after %d iterations, %d evaluations\n", f64 ? "float64" : "float32",
                      fmax(fabs(x[0] - 1), fabs(x[1] - 1)), (int)dot_lbfgs_iterations(l), (int)dot_lbfgs_evaluations(l));
        assert_true(fmax(fabs(x[0] - 1), fabs(x[1] - 1)) < (f64 ? 1e-10 : 1e-3));
        dot_context_destroy(ctx);
    }
}

static void test_lbfgs_quadratic(void **state)
{
    (void)state;
    for (int search = 0; search < 2; ++search)
        for (int f64 = 0; f64 < 2; ++f64) {
            dot_context *ctx = open_context(f64 ? DOT_F64 : DOT_F32, 0, 1);
            problem p = open_problem(ctx, bowl, 10, NULL);
            dot_lbfgs_options o = dot_lbfgs_defaults();
            o.line_search = search ? DOT_LINE_SEARCH_STRONG_WOLFE : DOT_LINE_SEARCH_NONE;
            o.max_iter = 100;
            o.max_eval = 200;
            o.tolerance_change = f64 ? 0 : 1e-9;
            o.tolerance_grad = 1e-11;
            dot_lbfgs *l = dot_lbfgs_create(ctx, p.layer, &o);
            double x[10], b[10];
            dot_lbfgs_step(l, loss_of, &p);
            require(ctx, true, "dot_lbfgs_step");
            values_of(&p, x);
            for (int i = 0; i < 10; ++i)
                b[i] = sin(1.0 + i);
            assert_close("minimum", search, x, b, 10, f64 ? 1e-10 : 1e-4);
            dot_context_destroy(ctx);
        }
}

/* A loss that is not finite, at the first or at a later evaluation, in float32 and with either line search. */
static void test_lbfgs_not_finite(void **state)
{
    static const double start[2] = { -1.2, 1 };
    (void)state;
    for (int k = 1; k <= 12; ++k)
        for (int search = 0; search < 2; ++search) {
            dot_context *ctx = open_context(DOT_F64, 0, 1);
            problem p = open_problem(ctx, rosenbrock, 2, start);
            dot_lbfgs_options o = dot_lbfgs_defaults();
            o.line_search = search ? DOT_LINE_SEARCH_STRONG_WOLFE : DOT_LINE_SEARCH_NONE;
            o.lr = search ? 1 : 1e-2;
            dot_lbfgs *l = dot_lbfgs_create(ctx, p.layer, &o);
            p.bad_call = k;
            p.bad_value = k % 2 ? 0 : 1;                    /* NaN = 0 * infinity */
            double first = dot_lbfgs_step(l, loss_of, &p);
            require(ctx, true, "dot_lbfgs_step");
            assert_int_equal(p.calls, k);
            double now = value_now(&p);
            if (k == 1) {
                assert_true(!isfinite(first));
                assert_true(fabs(now - 24.2) < 1e-12);
            } else {
                assert_true(fabs(first - 24.2) < 1e-12);
                assert_true(now <= 24.2 + 1e-12);
            }
            p.bad_call = 0;
            double next = dot_lbfgs_step(l, loss_of, &p);   /* goes on, from there */
            assert_true(next == now);
            for (int i = 0; search && i < 5; ++i)
                dot_lbfgs_step(l, loss_of, &p);
            require(ctx, true, "dot_lbfgs_step");
            assert_true(!search || value_now(&p) < 1e-9);
            dot_context_destroy(ctx);
        }
}

/* ---- CMA-ES ------------------------------------------------------------------------------------------------------- */

static void cmaes_like_numpy(const char *name)
{
    char prefix[64];
    snprintf(prefix, sizeof prefix, "cmaes.%s", name);
    const char *line = dot_safetensors_metadata(golden_file, prefix);
    assert_non_null(line);
    dot_safetensors_entry entry;
    double *rows = golden(prefix, "", &entry), now[MOST];
    static const double classic[2] = { -1.2, 1 };
    int64_t n = entry.shape[1] - 2;
    bool valley = strstr(line, "=rosen") != NULL;
    dot_context *ctx = open_context(DOT_F64, (uint64_t)setting(line, "seed", 0), 2);
    problem p = open_problem(ctx, valley ? rosenbrock : bowl, n, valley ? classic : NULL);
    dot_cmaes_options o = dot_cmaes_defaults();
    o.sigma = setting(line, "sigma", 0);
    o.population = (int)setting(line, "population", 0);
    dot_cmaes *s = dot_cmaes_create(ctx, p.layer, &o);
    for (int64_t i = 0; i < entry.shape[0]; ++i) {
        const double *row = rows + i * (n + 2);
        double least = dot_cmaes_step(s, loss_of, &p), sigma = dot_cmaes_sigma(s);
        require(ctx, true, name);
        values_of(&p, now);
        assert_close(name, i, &sigma, row + 1, 1, 1e-8);
        assert_close(name, i, now, row + 2, n, 1e-8);
        assert_close(name, i, &least, row, 1, 1e-7);
    }
    free(rows);
    dot_context_destroy(ctx);
}

static void test_cmaes_like_numpy(void **state)
{
    (void)state;
    cmaes_like_numpy("bowl");
    cmaes_like_numpy("rosenbrock");
    cmaes_like_numpy("large");
    cmaes_like_numpy("lazy");
}

/* The minimum in 10 dimensions, for several seeds: sphere, ellipsoid of condition 10^6, Rosenbrock. */
static void test_cmaes_converges(void **state)
{
    static const struct {
        const char *name;
        dot_tensor *(*value)(problem *p);
        double decades, start, target;
        int evaluations;
    } rows[] = {
        { "sphere", bowl, 0, 3, 1e-10, 2500 },
        { "ellipsoid", bowl, 6, 3, 1e-10, 8000 },
        { "Rosenbrock", rosenbrock, 0, 0, 1e-10, 10000 },
    };
    (void)state;
    for (int r = 0; r < COUNT(rows); ++r) {
        int most = 0, seeds = quick() ? 1 : 5;
        for (int seed = 1; seed <= seeds; ++seed) {
            double start[10];
            for (int i = 0; i < 10; ++i)
                start[i] = rows[r].start;
            dot_context *ctx = open_context(DOT_F64, (uint64_t)seed, 1);
            problem p = open_problem(ctx, rows[r].value, 10, start);
            p.decades = rows[r].decades;
            dot_cmaes_options o = dot_cmaes_defaults();
            o.sigma = r == 2 ? 0.1 : 1;
            dot_cmaes *s = dot_cmaes_create(ctx, p.layer, &o);
            double least = INFINITY;
            while (least > rows[r].target && p.calls < rows[r].evaluations && dot_ok(ctx))
                least = fmin(least, dot_cmaes_step(s, loss_of, &p));
            require(ctx, least <= rows[r].target, rows[r].name);
            assert_true(dot_cmaes_best(s) == least && value_now(&p) == least);
            most = p.calls > most ? (int)p.calls : most;
            dot_context_destroy(ctx);
        }
        print_message("# CMA-ES, %s in 10-D to %g: at most %d evaluations\n", rows[r].name, rows[r].target, most);
    }
}

/* Those that need no gradient may evaluate: nothing is recorded, and the numbers are the same. */
static dot_tensor *evaluation_of(void *user)
{
    problem *p = (problem *)user;
    dot_eval_begin(p->ctx);
    return p->value(p);
}

static void test_evaluation(void **state)
{
    double now[2][10];
    (void)state;
    for (int evaluation = 0; evaluation < 2; ++evaluation) {
        problem p = open_problem(open_context(DOT_F32, 3, 1), bowl, 10, NULL);
        dot_cmaes *c = dot_cmaes_create(p.ctx, p.layer, NULL);
        dot_spsa *s = dot_spsa_create(p.ctx, p.layer, NULL);
        for (int i = 0; i < 3; ++i) {
            dot_cmaes_step(c, evaluation ? evaluation_of : loss_of, &p);
            dot_spsa_step(s, evaluation ? evaluation_of : loss_of, &p);
        }
        require(p.ctx, true, "evaluation");
        values_of(&p, now[evaluation]);
        dot_context_destroy(p.ctx);
    }
    assert_memory_equal(now[0], now[1], sizeof now[0]);
}

/* A parameter that requires no gradient is not moved, and its layer not taken by K-FAC. */
static void test_frozen(void **state)
{
    data d = open_data();
    (void)state;
    problem p = open_problem(open_context(DOT_F64, 3, 1), net_loss, 37, d.net_start);
    p.x = d.net_x;
    p.y = d.net_y;
    p.rows = 12;
    dot_parameter_info info;
    assert_true(dot_layer_parameter(p.layer, 0, &info));
    dot_requires_grad(info.tensor, false);
    dot_kfac_options ko = dot_kfac_defaults();
    ko.fisher = DOT_FISHER_EMPIRICAL;
    dot_lbfgs *l = dot_lbfgs_create(p.ctx, p.layer, NULL);
    dot_cmaes *c = dot_cmaes_create(p.ctx, p.layer, NULL);
    dot_spsa *s = dot_spsa_create(p.ctx, p.layer, NULL);
    dot_kfac *k = dot_kfac_create(p.ctx, p.layer, &ko);
    double before[37], now[37];
    values_of(&p, before);
    assert_true(isfinite(dot_lbfgs_step(l, loss_of, &p)) && isfinite(dot_cmaes_step(c, loss_of, &p)));
    assert_true(isfinite(dot_spsa_step(s, loss_of, &p)) && isfinite(dot_kfac_step(k, loss_of, NULL, &p)));
    require(p.ctx, true, "frozen");
    values_of(&p, now);
    for (int i = 0; i < 37; ++i)
        assert_true((now[i] == before[i]) == (i < 20));
    close_data(&d);
    dot_context_destroy(p.ctx);
}

static dot_tensor *hole(problem *p)         /* the bowl, but undefined where x_0 < 0 */
{
    return dot_add(bowl(p), dot_mul_scalar(dot_sum(dot_log(dot_slice(p->theta, 0, 0, 1)), DOT_ALL_AXES, false), 1e-30));
}

static void test_cmaes_not_finite(void **state)
{
    double start[4] = { 0.5, 0, 0, 0 }, mean[4];
    (void)state;
    dot_context *ctx = open_context(DOT_F64, 1, 1);
    problem p = open_problem(ctx, hole, 4, start);
    p.decades = 0;
    dot_cmaes_options o = dot_cmaes_defaults();
    o.sigma = 1;
    dot_cmaes *s = dot_cmaes_create(ctx, p.layer, &o);
    for (int i = 0; i < 100; ++i)
        dot_cmaes_step(s, loss_of, &p);
    require(ctx, true, "dot_cmaes_step");
    assert_true(value_now(&p) < 1e-8);

    start[0] = -100;                        /* everything undefined: only sigma changes */
    p = open_problem(ctx, hole, 4, start);
    s = dot_cmaes_create(ctx, p.layer, &o);
    assert_true(isinf(dot_cmaes_step(s, loss_of, &p)) && dot_cmaes_sigma(s) == 0.5);
    assert_true(isnan(dot_cmaes_best(s)));
    values_of(&p, mean);
    assert_memory_equal(mean, start, sizeof mean);
    require(ctx, true, "dot_cmaes_step");
    dot_context_destroy(ctx);
}

/* ---- SPSA --------------------------------------------------------------------------------------------------------- */

static void test_spsa_like_numpy(void **state)
{
    const char *line = dot_safetensors_metadata(golden_file, "spsa");
    dot_safetensors_entry entry;
    double *rows = golden("spsa", "", &entry), now[MOST];
    int64_t n = entry.shape[1] - 1;
    (void)state;
    assert_non_null(line);
    dot_context *ctx = open_context(DOT_F64, (uint64_t)setting(line, "seed", 0), 1);
    problem p = open_problem(ctx, bowl, n, NULL);
    dot_spsa_options o = dot_spsa_defaults();
    o.a = setting(line, " a", 0);
    o.c = setting(line, " c", 0);
    o.stability = setting(line, "stability", 0);
    dot_spsa *s = dot_spsa_create(ctx, p.layer, &o);
    for (int64_t i = 0; i < entry.shape[0]; ++i) {
        double mean = dot_spsa_step(s, loss_of, &p);
        require(ctx, true, "dot_spsa_step");
        values_of(&p, now);
        assert_close("spsa", i, now, rows + i * (n + 1) + 1, n, 1e-10);
        assert_close("spsa", i, &mean, rows + i * (n + 1), 1, 1e-10);
    }
    free(rows);
    dot_context_destroy(ctx);
}

static dot_tensor *noisy_sphere(problem *p)
{
    double noise = 0.01 * dot_random_normal(77, 0, (uint64_t)p->calls);
    return dot_add_scalar(bowl(p), noise);
}

/* The sphere in 10 dimensions under noise of standard deviation 0.01, from a loss of 13. */
static void test_spsa_converges(void **state)
{
    (void)state;
    for (int seed = 1; seed <= 3; ++seed) {
        double start[10], x[10];
        for (int i = 0; i < 10; ++i)
            start[i] = 2;
        dot_context *ctx = open_context(DOT_F64, (uint64_t)seed, 1);
        problem p = open_problem(ctx, noisy_sphere, 10, start);
        p.decades = 0;
        dot_spsa_options o = dot_spsa_defaults();
        o.a = 1;
        o.c = 0.1;
        dot_spsa *s = dot_spsa_create(ctx, p.layer, &o);
        for (int i = 0; i < 2000; ++i)
            dot_spsa_step(s, loss_of, &p);
        require(ctx, true, "dot_spsa_step");
        values_of(&p, x);
        double loss = 0;
        for (int i = 0; i < 10; ++i)
            loss += 0.5 * (x[i] - sin(1.0 + i)) * (x[i] - sin(1.0 + i));
        print_message("# SPSA, noisy sphere in 10-D, seed %d: loss %.2g after 2000 steps\n", seed, loss);
        assert_true(loss < 1e-2);
        dot_context_destroy(ctx);
    }
}

static void test_spsa_not_finite(void **state)
{
    double start[4] = { -100, 0, 0, 0 }, now[4];
    (void)state;
    dot_context *ctx = open_context(DOT_F64, 1, 1);
    problem p = open_problem(ctx, hole, 4, start);
    dot_spsa *s = dot_spsa_create(ctx, p.layer, NULL);
    assert_true(isnan(dot_spsa_step(s, loss_of, &p)));
    values_of(&p, now);
    assert_memory_equal(now, start, sizeof now);
    require(ctx, true, "dot_spsa_step");
    dot_context_destroy(ctx);
}

/* ---- SVRG --------------------------------------------------------------------------------------------------------- */

/* Least squares, 64 rows, 6 unknowns, condition 2.1, batches of 8: the distance to the solution of the normal equations falls
   by a factor each snapshot, down to rounding. */
static void test_svrg_linear(void **state)
{
    dot_safetensors_entry entry;
    double *x = golden("squares.x", "", &entry), *y = golden("squares.y", "", &entry);
    double *solution = golden("squares.solution", "", &entry);
    double now[6], before = 0, first = 0, worst = 0;
    (void)state;
    dot_context *ctx = open_context(DOT_F64, 4, 1);
    problem p = open_problem(ctx, squares, 6, NULL);
    p.x = x;
    p.y = y;
    p.rows = 64;
    p.batch = 8;
    dot_svrg_options o = dot_svrg_defaults();
    o.lr = 0.07;                            /* 1 / (4 L), L = 3.355 */
    o.batches = 8;
    o.inner = 40;
    dot_svrg *s = dot_svrg_create(ctx, p.layer, &o);
    for (int i = 0; i < 25; ++i) {
        double loss = dot_svrg_step(s, loss_of, batch_of, &p), distance = 0;
        require(ctx, isfinite(loss), "dot_svrg_step");
        values_of(&p, now);
        for (int k = 0; k < 6; ++k)
            distance += (now[k] - solution[k]) * (now[k] - solution[k]);
        distance = sqrt(distance);
        if (i > 0 && before > 1e-12)
            worst = fmax(worst, distance / before);
        first = i == 0 ? distance : first;
        before = distance;
    }
    assert_int_equal(p.calls, 25 * 81);
    print_message("# SVRG, least squares: distance %.2g after the first snapshot, %.2g after the 25th, each at most %.2f of the "
                  "last\n", first, before, worst);
    assert_true(before < 1e-12 && worst < 0.7);
    free(x), free(y), free(solution);
    dot_context_destroy(ctx);
}

/* ---- natural gradient --------------------------------------------------------------------------------------------- */

/* What example i of squares and net gives: its loss, with its label or one drawn from N(prediction, 1), or its output. */
static dot_tensor *example_of(void *user, int64_t i)
{
    problem *p = (problem *)user;
    int64_t in[2] = { 1, p->value == squares ? p->n : p->features }, column[2] = { p->n, 1 }, out[2] = { 1, p->value == squares ? 1 : 2 };
    dot_step_begin(p->ctx);
    ++p->calls;
    dot_tensor *x = constant(p->ctx, 2, in, p->x + i * in[1]);
    dot_tensor *y = p->value == squares ? dot_matmul(x, dot_reshape(p->theta, 2, column)) : dot_forward(p->layer, x);
    if (p->fisher == DOT_FISHER_GAUSS_NEWTON)
        return y;
    double noise = dot_random_normal(21, p->stream, (uint64_t)i);
    dot_tensor *label = p->fisher == DOT_FISHER_SAMPLED ? dot_add_scalar(dot_detach(y), noise)
                                                        : constant(p->ctx, 2, out, p->y + i * out[1]);
    return dot_mul_scalar(dot_mse_loss(y, label), p->value == squares ? 0.5 : 1);
}

static const double natural_start[6] = { 0.8414709848078965, 0.9092974268256817, 0.1411200080598672, -0.7568024953079282,
                                         -0.9589242746631385, -0.27941549819892586 };

static problem open_data_problem(dot_context *ctx, const data *d, bool net)
{
    problem p = open_problem(ctx, net ? net_loss : squares, net ? 37 : 6, net ? d->net_start : natural_start);
    p.x = net ? d->net_x : d->squares_x;
    p.y = net ? d->net_y : d->squares_y;
    p.rows = net ? 12 : 64;
    return p;
}

static void natural_like_numpy(const char *name, dot_fisher fisher, dot_natural_method method, double lr, double damping,
                               bool mean)
{
    dot_safetensors_entry entry;
    double *theta = golden("natural.", name, &entry), now[MOST];
    bool net = strstr(name, "net_") == name;
    data d = open_data();
    problem p = open_data_problem(open_context(DOT_F64, 0, 2), &d, net);
    dot_natural_options o = dot_natural_defaults();
    p.fisher = o.fisher = fisher;
    o.method = method;
    o.lr = lr;
    o.damping = damping;
    o.examples = p.rows;
    o.outputs = net && fisher == DOT_FISHER_GAUSS_NEWTON ? 2 : 1;       /* the net's loss: 2 / outputs = 1 is the scale */
    dot_natural *s = dot_natural_create(p.ctx, p.layer, &o);
    for (int64_t i = 0; i < entry.shape[0]; ++i) {
        double before = value_now(&p);
        p.stream = (uint64_t)i;
        double loss = dot_natural_step(s, mean ? NULL : loss_of, example_of, &p);
        require(p.ctx, fabs(loss - before) <= 1e-14 * fabs(before), name);
        values_of(&p, now);
        assert_close(name, i, now, theta + i * p.n, p.n, method == DOT_NATURAL_CG ? 1e-8 : 1e-11);
    }
    free(theta);
    close_data(&d);
    dot_context_destroy(p.ctx);
}

static void test_natural_like_numpy(void **state)
{
    static const char *const names[3] = { "empirical", "sampled", "gauss_newton" };
    char diagonal[64];
    (void)state;
    for (int fisher = 0; fisher < 3; ++fisher) {
        snprintf(diagonal, sizeof diagonal, "%s_diagonal", names[fisher]);
        natural_like_numpy(names[fisher], (dot_fisher)fisher, DOT_NATURAL_DENSE, 0.5, 0.1, false);
        natural_like_numpy(names[fisher], (dot_fisher)fisher, DOT_NATURAL_CG, 0.5, 0.1, false);
        natural_like_numpy(diagonal, (dot_fisher)fisher, DOT_NATURAL_DIAGONAL, 0.5, 0.1, false);
    }
    natural_like_numpy("empirical", DOT_FISHER_EMPIRICAL, DOT_NATURAL_DENSE, 0.5, 0.1, true);
    for (int method = DOT_NATURAL_DENSE; method <= DOT_NATURAL_CG; ++method) {
        natural_like_numpy("net_gauss_newton", DOT_FISHER_GAUSS_NEWTON, (dot_natural_method)method, 1, 0.05, false);
        natural_like_numpy("net_empirical", DOT_FISHER_EMPIRICAL, (dot_natural_method)method, 0.3, 0.05, true);
    }
}

/* Least squares: Gauss-Newton is Newton, so that one step is at the solution of the normal equations. */
static void test_natural_newton(void **state)
{
    dot_safetensors_entry entry;
    double *solution = golden("squares.solution", "", &entry), now[6];
    data d = open_data();
    (void)state;
    for (int f64 = 0; f64 < 2; ++f64) {
        problem p = open_data_problem(open_context(f64 ? DOT_F64 : DOT_F32, 0, 1), &d, false);
        dot_natural_options o = dot_natural_defaults();
        p.fisher = o.fisher = DOT_FISHER_GAUSS_NEWTON;
        o.damping = 1e-12;
        o.examples = 64;
        dot_natural *s = dot_natural_create(p.ctx, p.layer, &o);
        dot_natural_step(s, loss_of, example_of, &p);
        require(p.ctx, true, "dot_natural_step");
        values_of(&p, now);
        assert_close("Newton", f64, now, solution, 6, f64 ? 1e-11 : 1e-6);
        dot_context_destroy(p.ctx);
    }
    free(solution);
    close_data(&d);
}

/* The sampled labels' F comes near the true one, X'X / N: with many draws the steps from both agree. */
static void test_natural_sampled_is_true(void **state)
{
    double now[6], mean[6] = { 0 }, exact[6], size = 0, distance = 0;
    data d = open_data();
    (void)state;
    for (int sampled = 0; sampled < 2; ++sampled) {
        problem p = open_data_problem(open_context(DOT_F64, 0, 1), &d, false);
        dot_natural_options o = dot_natural_defaults();
        p.fisher = o.fisher = sampled ? DOT_FISHER_SAMPLED : DOT_FISHER_GAUSS_NEWTON;
        o.damping = 10;                     /* so large that the inverse is nearly linear in F, and its mean that of F */
        o.examples = 64;
        dot_natural *s = dot_natural_create(p.ctx, p.layer, &o);
        int draws = sampled ? 400 : 1;
        for (int i = 0; i < draws; ++i) {
            dot_parameter_set(p.layer, "theta", 0, natural_start, 6);
            p.stream = (uint64_t)i;
            dot_natural_step(s, loss_of, example_of, &p);
            values_of(&p, now);
            for (int k = 0; k < 6; ++k)
                mean[k] += sampled ? now[k] / draws : 0;
        }
        if (!sampled)
            memcpy(exact, now, sizeof exact);
        require(p.ctx, true, "dot_natural_step");
        dot_context_destroy(p.ctx);
    }
    for (int k = 0; k < 6; ++k) {
        distance = fmax(distance, fabs(mean[k] - exact[k]));
        size = fmax(size, fabs(exact[k] - natural_start[k]));
    }
    print_message("# natural gradient, 400 x 64 sampled labels: the mean step differs by %.2g of its size\n", distance / size);
    assert_true(distance < 0.01 * size);
    close_data(&d);
}

static dot_tensor *sum_of(problem *p) { return dot_sum(p->theta, DOT_ALL_AXES, false); }
static dot_tensor *sum_example(void *user, int64_t i) { (void)i; return loss_of(user); }

/* F of ones, and a damping that 1 + damping does not see. */
static void test_natural_lost_damping(void **state)
{
    double now[4], start[4] = { 1, 2, 3, 4 };
    (void)state;
    problem p = open_problem(open_context(DOT_F64, 0, 1), sum_of, 4, start);
    dot_natural_options o = dot_natural_defaults();
    o.damping = 1e-30;
    o.examples = 2;
    dot_natural *s = dot_natural_create(p.ctx, p.layer, &o);
    assert_true(isnan(dot_natural_step(s, NULL, sum_example, &p)));
    assert_string_equal(dot_error(p.ctx), "dot_natural_step: damping 1e-30 is lost in rounding beside F: pivot 1 is 0");
    values_of(&p, now);
    assert_memory_equal(now, start, sizeof now);
    dot_context_destroy(p.ctx);
}

static dot_tensor *bad_example(void *user, int64_t i)
{
    dot_tensor *t = example_of(user, i);
    return i == 5 ? dot_mul_scalar(dot_log(dot_mul_scalar(t, 0)), 0) : t;
}

static void test_natural_not_finite(void **state)
{
    double now[6];
    data d = open_data();
    (void)state;
    for (int method = 0; method < 3; ++method) {
        problem p = open_data_problem(open_context(DOT_F64, 0, 1), &d, false);
        dot_natural_options o = dot_natural_defaults();
        o.method = (dot_natural_method)method;
        o.damping = 1e-3;
        o.examples = 64;
        dot_natural *s = dot_natural_create(p.ctx, p.layer, &o);
        dot_natural_step(s, loss_of, bad_example, &p);
        require(p.ctx, true, "dot_natural_step");
        values_of(&p, now);
        assert_memory_equal(now, natural_start, sizeof now);
        dot_context_destroy(p.ctx);
    }
    close_data(&d);
}

/* ---- K-FAC -------------------------------------------------------------------------------------------------------- */

/* The network's outputs, or its loss with labels drawn from N(prediction, 1). */
static dot_tensor *net_outputs(void *user)
{
    problem *p = (problem *)user;
    int64_t in[2] = { p->rows, p->features };
    dot_step_begin(p->ctx);
    ++p->calls;
    return dot_forward(p->layer, constant(p->ctx, 2, in, p->x));
}

static dot_tensor *net_sampled(void *user)
{
    problem *p = (problem *)user;
    dot_tensor *y = net_outputs(user);
    double noise[64];
    for (int i = 0; i < 2 * p->rows; ++i)
        noise[i] = dot_random_normal(21, p->stream, (uint64_t)i);
    int64_t out[2] = { p->rows, 2 };
    return dot_mse_loss(y, dot_add(dot_detach(y), constant(p->ctx, 2, out, noise)));    /* 2 outputs: mean = 1/2 of the sum */
}

static dot_conv_options conv_of(int kernel, int stride, int padding)
{
    dot_conv_options o = dot_conv_defaults();
    o.kernel = kernel;
    o.stride = stride;
    o.padding = padding;
    return o;
}

/* The networks of golden/make_solvers.py; a row of x is an image in PyTorch's order. */
static dot_layer *dense(dot_context *ctx)
{
    return dot_nn_sequential(ctx, dot_nn_linear(ctx, 4, 5), dot_nn_tanh(ctx), dot_nn_layer_norm(ctx, 5), dot_nn_linear(ctx, 5, 2), NULL);
}

static dot_layer *conv1d(dot_context *ctx)
{
    dot_conv_options first = conv_of(3, 1, 1), groups = conv_of(3, 1, 0), transposed = conv_of(2, 1, 0);
    groups.groups = 2;
    return dot_nn_sequential(ctx, dot_nn_unflatten(ctx, 0, 0, 6, 2), dot_nn_conv1d(ctx, 2, 4, &first), dot_nn_tanh(ctx),
                             dot_nn_conv1d(ctx, 4, 4, &groups), dot_nn_conv_transpose1d(ctx, 4, 2, &transposed), dot_nn_flatten(ctx),
                             dot_nn_linear(ctx, 10, 2), NULL);
}

static dot_layer *conv2d(dot_context *ctx)
{
    dot_conv_options first = conv_of(2, 1, 0), second = conv_of(2, 1, 0);
    first.kernel_each[0] = 3;
    first.stride_each[0] = 2;
    first.padding_each[0] = 1;
    first.dilation_each[1] = 2;
    second.bias = false;
    return dot_nn_sequential(ctx, dot_nn_unflatten(ctx, 0, 5, 6, 2), dot_nn_conv2d(ctx, 2, 3, &first), dot_nn_tanh(ctx),
                             dot_nn_conv2d(ctx, 3, 2, &second), dot_nn_tanh(ctx), dot_nn_flatten(ctx), dot_nn_linear(ctx, 12, 2), NULL);
}

static dot_layer *conv3d(dot_context *ctx)
{
    dot_conv_options o = conv_of(2, 2, 1);
    return dot_nn_sequential(ctx, dot_nn_unflatten(ctx, 3, 2, 3, 1), dot_nn_conv3d(ctx, 1, 2, &o), dot_nn_tanh(ctx), dot_nn_flatten(ctx),
                             dot_nn_linear(ctx, 16, 2), NULL);
}

static const struct { const char *name; dot_layer *(*net)(dot_context *ctx); } kfac_cases[] = {
    { "kfac", dense }, { "kfac.factored", dense }, { "kfac.conv1d", conv1d }, { "kfac.conv2d", conv2d }, { "kfac.conv2d_newton", conv2d },
    { "kfac.conv3d", conv3d },
};

static void kfac_like_torch(const char *name, dot_layer *(*net)(dot_context *ctx))
{
    static dot_tensor *(*const statistics[3])(void *) = { NULL, net_sampled, net_outputs };
    const char *line = dot_safetensors_metadata(golden_file, name);
    dot_safetensors_entry x_entry, entry;
    double *start = golden(name, ".start", &entry), *loss = golden(name, ".loss", &entry), *x = golden(name, ".x", &x_entry);
    double *y = golden("net.y", "", &entry), *theta = golden(name, ".theta", &entry), now[MOST], worst = 0;
    assert_non_null(line);
    problem p = open_problem(open_context(DOT_F64, 0, 2), net_loss, 37, NULL);
    p.layer = net(p.ctx);
    p.n = entry.shape[1];
    p.x = x;
    p.y = y;
    p.rows = x_entry.shape[0];
    p.features = x_entry.shape[1];
    begin_at(&p, start);
    dot_kfac_options o = dot_kfac_defaults();
    o.fisher = (dot_fisher)setting(line, "fisher", -1);
    o.tikhonov = (dot_tikhonov)setting(line, "tikhonov", -1);
    o.lr = setting(line, "lr", 0);
    o.momentum = setting(line, "momentum", 0);
    o.decay = setting(line, "decay", 0);
    o.damping = setting(line, "damping", 0);
    o.kl_clip = setting(line, "kl_clip", -1);
    o.statistics_every = (int)setting(line, "statistics_every", 0);
    o.inverse_every = (int)setting(line, "inverse_every", 0);
    dot_kfac *s = dot_kfac_create(p.ctx, p.layer, &o);
    for (int64_t i = 0; i < entry.shape[0]; ++i) {
        const double *expected = theta + i * p.n;
        p.stream = (uint64_t)i;
        double before = dot_kfac_step(s, loss_of, statistics[o.fisher], &p), size = 0;
        require(p.ctx, true, name);
        values_of(&p, now);
        assert_close(name, i, now, expected, p.n, 1e-12);
        assert_close(name, i, &before, loss + i, 1, 1e-12);
        for (int64_t j = 0; j < p.n; ++j)
            size = fmax(size, fabs(expected[j]));
        for (int64_t j = 0; j < p.n; ++j)
            worst = fmax(worst, fabs(now[j] - expected[j]) / size);
    }
    print_message("# %s: %d steps, worst error %.1e\n", name, (int)entry.shape[0], worst);
    free(start), free(loss), free(x), free(y), free(theta);
    dot_context_destroy(p.ctx);
}

static void test_kfac_like_torch(void **state)
{
    (void)state;
    for (int i = 0; i < COUNT(kfac_cases); ++i)
        kfac_like_torch(kfac_cases[i].name, kfac_cases[i].net);
}

static dot_layer *one_linear(dot_context *ctx) { return dot_nn_linear(ctx, 4, 2); }
static dot_layer *wide_linear(dot_context *ctx) { return dot_nn_linear(ctx, 60, 2); }       /* A has 12 eigenvalues that are not 0 */

static dot_layer *one_patch(dot_context *ctx)       /* the kernel sees the whole image, at one position */
{
    dot_conv_options o = conv_of(2, 1, 0);
    return dot_nn_sequential(ctx, dot_nn_unflatten(ctx, 0, 2, 2, 1), dot_nn_conv2d(ctx, 1, 2, &o), dot_nn_flatten(ctx), NULL);
}

/* One layer with Gaussian noise: F is exactly A x I, and K-FAC is the exact natural gradient. */
static void kfac_is_natural(dot_layer *(*net)(dot_context *ctx), int features, const double *x)
{
    double now[2][MOST], before[MOST], moved = 0;
    int n = 2 * (features + 1);
    data d = open_data();
    for (int exact = 0; exact < 2; ++exact) {
        problem p = open_problem(open_context(DOT_F64, 6, 1), net_loss, 37, NULL);
        p.n = n;
        p.features = features;
        p.x = x ? x : d.net_x;
        p.y = d.net_y;
        p.rows = 12;
        p.fisher = DOT_FISHER_GAUSS_NEWTON;
        p.layer = net(p.ctx);
        values_of(&p, before);
        dot_natural_options no = dot_natural_defaults();
        no.fisher = p.fisher;
        no.damping = 0.03;
        no.examples = 12;
        no.outputs = 2;
        dot_natural *natural = dot_natural_create(p.ctx, p.layer, &no);
        dot_kfac_options ko = dot_kfac_defaults();
        ko.fisher = p.fisher;
        ko.lr = 1;
        ko.momentum = ko.decay = ko.kl_clip = 0;
        ko.damping = 0.03;
        ko.statistics_every = ko.inverse_every = 1;
        dot_kfac *kfac = dot_kfac_create(p.ctx, p.layer, &ko);
        for (int i = 0; i < 3; ++i)
            assert_true(isfinite(exact ? dot_natural_step(natural, loss_of, example_of, &p)
                                       : dot_kfac_step(kfac, loss_of, net_outputs, &p)));
        require(p.ctx, true, "step");
        values_of(&p, now[exact]);
        dot_context_destroy(p.ctx);
    }
    assert_close("K-FAC", 3, now[0], now[1], n, 1e-12);
    for (int i = 0; i < n; ++i)
        moved = fmax(moved, fabs(now[1][i] - before[i]));
    assert_true(moved > 0.1);
    close_data(&d);
}

static void test_kfac_is_natural(void **state)
{
    (void)state;
    double wide[12 * 60], nearly_diagonal[12 * 4];
    for (int i = 0; i < 12 * 60; ++i)
        wide[i] = sin(1.7 * i);
    for (int i = 0; i < 12 * 4; ++i) {              /* signs of mean 0, then 1: A has elements 1 and of the order of 1e-9 in one row */
        int row = i / 4, sign[4] = { row % 2 ? 1 : -1, row / 2 % 2 ? 1 : -1, row < 6 ? 1 : -1, 1 };
        nearly_diagonal[i] = sign[i % 4] + 1e-9 * (i % 4 + 1);
    }
    kfac_is_natural(one_linear, 4, NULL);
    kfac_is_natural(one_linear, 4, nearly_diagonal);
    kfac_is_natural(wide_linear, 60, wide);
    kfac_is_natural(one_patch, 4, NULL);
}

static dot_layer *small_conv(dot_context *ctx)
{
    dot_conv_options o = conv_of(2, 1, 1);
    return dot_nn_sequential(ctx, dot_nn_unflatten(ctx, 0, 2, 2, 1), dot_nn_conv2d(ctx, 1, 2, &o), dot_nn_tanh(ctx), dot_nn_flatten(ctx),
                             dot_nn_linear(ctx, 18, 2), NULL);
}

/* The factors are means: they are the same of a batch and of the same batch 300 times. 32400 patches are gathered in two parts. */
static void test_kfac_of_many_rows(void **state)
{
    enum { TIMES = 300, PARAMETERS = 48 };
    double now[2][PARAMETERS], start[PARAMETERS];
    data d = open_data();
    double *x = (double *)calloc(TIMES * 48, sizeof *x), *y = (double *)calloc(TIMES * 24, sizeof *y);
    (void)state;
    assert_true(x && y);
    for (int i = 0; i < TIMES; ++i) {
        memcpy(x + i * 48, d.net_x, 48 * sizeof *x);
        memcpy(y + i * 24, d.net_y, 24 * sizeof *y);
    }
    for (int many = 0; many < 2; ++many) {
        problem p = open_problem(open_context(DOT_F64, 8, 2), net_loss, 37, NULL);
        p.layer = small_conv(p.ctx);
        p.n = PARAMETERS;
        p.x = x;
        p.y = y;
        p.rows = many ? 12 * TIMES : 12;
        dot_kfac_options o = dot_kfac_defaults();
        o.fisher = DOT_FISHER_EMPIRICAL;
        o.lr = 0.1;
        o.statistics_every = o.inverse_every = 1;
        dot_kfac *s = dot_kfac_create(p.ctx, p.layer, &o);
        values_of(&p, start);
        for (int i = 0; i < 3; ++i)
            dot_kfac_step(s, loss_of, NULL, &p);
        require(p.ctx, true, "dot_kfac_step");
        values_of(&p, now[many]);
        assert_true(fabs(now[many][0] - start[0]) > 1e-5);
        dot_context_destroy(p.ctx);
    }
    assert_close("many rows", 3, now[1], now[0], PARAMETERS, 1e-12);
    free(x), free(y);
    close_data(&d);
}

static dot_tensor *flat_outputs(void *user) { return dot_mul_scalar(dot_sum(net_outputs(user), DOT_ALL_AXES, false), 0); }

/* The factored damping where G is 0: with pi = 1, v = (A + sqrt(damping) I)^-1 M / sqrt(damping); A is 1 here. */
static void test_kfac_without_gradients(void **state)
{
    static const double x[1] = { 1 }, y[2] = { 3, -1 };
    double now[2], start[2] = { 0.5, 0.25 };
    (void)state;
    problem p = open_problem(open_context(DOT_F64, 0, 1), net_loss, 37, NULL);
    p.layer = dot_nn_linear_no_bias(p.ctx, 1, 2);
    p.n = 2;
    p.x = x;
    p.y = y;
    p.rows = p.features = 1;
    begin_at(&p, start);
    dot_kfac_options o = dot_kfac_defaults();
    o.lr = 0.25;
    o.momentum = o.decay = o.kl_clip = 0;
    o.damping = 0.25;
    o.tikhonov = DOT_TIKHONOV_FACTORED;
    dot_kfac *s = dot_kfac_create(p.ctx, p.layer, &o);
    dot_kfac_step(s, loss_of, flat_outputs, &p);
    require(p.ctx, true, "dot_kfac_step");
    values_of(&p, now);
    for (int i = 0; i < 2; ++i)             /* M = start - y, of the mean of 2 squares */
        start[i] -= 0.25 * (start[i] - y[i]) / 1.5 / 0.5;
    assert_close("no gradients", 0, now, start, 2, 1e-15);
    dot_context_destroy(p.ctx);
}

static dot_tensor *twice(void *user, dot_layer *layer, dot_tensor *x)
{
    (void)layer;
    dot_layer *linear = (dot_layer *)user;
    return dot_forward(linear, dot_forward(linear, x));
}

static dot_tensor *sum_of_outputs(void *user) { return dot_mean(net_outputs(user), DOT_ALL_AXES, false); }

static void test_kfac_errors(void **state)
{
    data d = open_data();
    double before[20], now[20];
    (void)state;
    problem p = open_problem(open_context(DOT_F32, 0, 1), net_loss, 37, NULL);
    dot_layer *linear = dot_nn_linear(p.ctx, 4, 4);
    p.n = 20;
    p.x = d.net_x;
    p.y = d.net_y;
    p.rows = 12;
    p.layer = dot_nn_custom(p.ctx, "twice", twice, linear);
    assert_null(dot_kfac_create(p.ctx, dot_nn_layer_norm(p.ctx, 4), NULL));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: 0 linear or convolution layers that train under no other K-FAC, expected 1");
    assert_true(dot_layer_add_child(p.layer, "linear", linear));
    REFUSES(kfac, fisher, (dot_fisher)3, "fisher 3");
    REFUSES(kfac, lr, -1, "lr -1");
    REFUSES(kfac, momentum, 1, "momentum 1, expected 0 to 1 (excluded)");
    REFUSES(kfac, decay, 1, "decay 1, expected 0 to 1 (excluded)");
    REFUSES(kfac, damping, 0, "damping 0, expected 1e-300 to");
    REFUSES(kfac, kl_clip, -1, "kl_clip -1, expected 0 to");
    REFUSES(kfac, kl_clip, (double)NAN, "kl_clip nan, expected 0 to");
    REFUSES(kfac, tikhonov, (dot_tikhonov)2, "tikhonov 2, expected 0 to 1");
    REFUSES(kfac, statistics_every, 0, "statistics_every 0");
    REFUSES(kfac, inverse_every, 0, "inverse_every 0");
    REFUSES(kfac, magic, 5, "magic 0x00000005");
    dot_kfac *s = dot_kfac_create(p.ctx, p.layer, NULL);
    require(p.ctx, s != NULL, "dot_kfac_create");
    assert_null(dot_kfac_create(p.ctx, p.layer, NULL));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: 0 linear or convolution layers that train under no other K-FAC");
    values_of(&p, before);
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, sum_of_outputs, &p)));
    assert_error(p.ctx, DOT_ERROR_STATE, "dot_kfac_step: linear layer 0 of those under K-FAC is used 2 times in a step, expected once");
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, NULL, &p)));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_kfac_step: a function is NULL");
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, net_outputs, &p)));
    assert_error(p.ctx, DOT_ERROR_SHAPE, "dot_kfac_step: the user's function returned a tensor [12,4], expected a scalar");
    dot_kfac_options o = dot_kfac_defaults();
    o.fisher = DOT_FISHER_GAUSS_NEWTON;
    dot_layer *other = dot_nn_linear(p.ctx, 4, 4);
    s = dot_kfac_create(p.ctx, other, &o);
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, sum_of_outputs, &p)));
    assert_error(p.ctx, DOT_ERROR_SHAPE, "dot_kfac_step: the outputs are [], expected [rows, outputs]");
    s = dot_kfac_create(p.ctx, dot_nn_linear(p.ctx, 4, 4), &o);
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, net_outputs, &p)));
    assert_error(p.ctx, DOT_ERROR_STATE, "dot_kfac_step: linear layer 0 of those under K-FAC is used 0 times in a step, expected once");
    s = dot_kfac_create(p.ctx, dot_nn_conv1d(p.ctx, 4, 4, NULL), &o);
    assert_true(isnan(dot_kfac_step(s, sum_of_outputs, net_outputs, &p)));
    assert_error(p.ctx, DOT_ERROR_STATE, "dot_kfac_step: conv layer 0 of those under K-FAC is used 0 times in a step, expected once");
    assert_true(isnan(dot_kfac_step(NULL, sum_of_outputs, sum_of_outputs, &p)));
    values_of(&p, now);
    assert_memory_equal(now, before, sizeof now);
    close_data(&d);
    dot_context_destroy(p.ctx);
}

/* ---- the same bits for any number of threads ---------------------------------------------------------------------- */

enum { IN = 150, HIDDEN = 120, BATCHES = 2, WIDE_ROWS = 6 };        /* 18121 parameters: several pieces */

typedef struct wide { dot_context *ctx; dot_layer *net; } wide;

static dot_tensor *wide_batch(void *user, int64_t index)
{
    wide *w = (wide *)user;
    double x[WIDE_ROWS * IN], y[WIDE_ROWS];
    int64_t shape[2] = { WIDE_ROWS, IN }, column[2] = { WIDE_ROWS, 1 };
    for (int i = 0; i < WIDE_ROWS * IN; ++i)
        x[i] = sin(i * 0.7 + (double)index);
    for (int i = 0; i < WIDE_ROWS; ++i)
        y[i] = cos(i + (double)index);
    dot_step_begin(w->ctx);
    return dot_mse_loss(dot_forward(w->net, constant(w->ctx, 2, shape, x)), constant(w->ctx, 2, column, y));
}

static dot_tensor *wide_loss(void *user) { return wide_batch(user, 0); }

/* Runs all solvers; returns the parameters. */
static double *run_all(dot_dtype dtype, int threads, int64_t *count)
{
    wide w;
    w.ctx = open_context(dtype, 5, threads);
    w.net = dot_nn_sequential(w.ctx, dot_nn_linear(w.ctx, IN, HIDDEN), dot_nn_tanh(w.ctx),
                              dot_nn_linear_no_bias(w.ctx, HIDDEN, 1), NULL);
    dot_layer *small = dot_nn_linear(w.ctx, IN, 1);
    wide tiny = { w.ctx, small };
    dot_lbfgs_options lo = dot_lbfgs_defaults();
    lo.line_search = DOT_LINE_SEARCH_STRONG_WOLFE;
    lo.history = 5;
    lo.max_iter = 8;
    dot_svrg_options vo = dot_svrg_defaults();
    vo.batches = BATCHES;
    dot_lbfgs *l = dot_lbfgs_create(w.ctx, w.net, &lo);
    dot_spsa *s = dot_spsa_create(w.ctx, w.net, NULL);
    dot_svrg *v = dot_svrg_create(w.ctx, w.net, &vo);
    dot_cmaes *c = dot_cmaes_create(w.ctx, small, NULL);
    dot_natural_options no = dot_natural_defaults();
    no.examples = 2;
    no.damping = 0.1;
    dot_natural *dense = dot_natural_create(w.ctx, small, &no);
    no.method = DOT_NATURAL_CG;
    dot_natural *cg = dot_natural_create(w.ctx, w.net, &no);
    dot_layer *net2 = dot_nn_sequential(w.ctx, dot_nn_linear(w.ctx, IN, 40), dot_nn_relu(w.ctx),
                                        dot_nn_linear(w.ctx, 40, 1), NULL);
    wide second = { w.ctx, net2 };
    dot_kfac_options ko = dot_kfac_defaults();
    ko.fisher = DOT_FISHER_EMPIRICAL;
    dot_kfac *k = dot_kfac_create(w.ctx, net2, &ko);
    dot_conv_options padded = conv_of(3, 1, 2);
    dot_layer *net3 = dot_nn_sequential(w.ctx, dot_nn_unflatten(w.ctx, 0, 5, 30, 1), dot_nn_conv2d(w.ctx, 1, 16, &padded), dot_nn_relu(w.ctx),
                                        dot_nn_conv2d(w.ctx, 16, 2, &padded), dot_nn_avg_pool(w.ctx, NULL), dot_nn_flatten(w.ctx),
                                        dot_nn_linear(w.ctx, 136, 1), NULL);
    wide third = { w.ctx, net3 };       /* 1836 patches of 145 elements: gathered in several parts */
    ko.tikhonov = DOT_TIKHONOV_FACTORED;
    dot_kfac *kc = dot_kfac_create(w.ctx, net3, &ko);
    for (int i = 0; i < 2; ++i) {
        dot_kfac_step(k, wide_loss, NULL, &second);
        dot_kfac_step(kc, wide_loss, NULL, &third);
        dot_spsa_step(s, wide_loss, &w);
        dot_svrg_step(v, wide_loss, wide_batch, &w);
        dot_lbfgs_step(l, wide_loss, &w);
        dot_cmaes_step(c, wide_loss, &tiny);
        dot_natural_step(dense, NULL, wide_batch, &tiny);
        dot_natural_step(cg, NULL, wide_batch, &w);
    }
    require(w.ctx, true, "run_all");
    dot_layer *nets[4] = { w.net, small, net2, net3 };
    double *all = NULL;
    *count = 0;
    for (int i = 0; i < COUNT(nets); ++i) {
        int64_t more;
        double *values = snapshot(nets[i], 0, TRAINABLE_VALUES, &more);
        assert_non_null(values);
        all = (double *)realloc(all, (size_t)(*count + more) * sizeof *all);
        assert_non_null(all);
        memcpy(all + *count, values, (size_t)more * sizeof *all);
        *count += more;
        free(values);
    }
    dot_context_destroy(w.ctx);
    return all;
}

static void test_same_bits(void **state)
{
    static const int threads[] = { 1, 2, 4 };
    (void)state;
    for (int f64 = 0; f64 < 2; ++f64) {
        int64_t n, count;
        double *first = run_all(f64 ? DOT_F64 : DOT_F32, 1, &n);
        for (int i = 1; i < COUNT(threads); ++i) {
            double *other = run_all(f64 ? DOT_F64 : DOT_F32, threads[i], &count);
            assert_true(count == n && memcmp(first, other, (size_t)n * sizeof *first) == 0);
            free(other);
        }
        free(first);
    }
}

/* ---- errors ------------------------------------------------------------------------------------------------------- */

static void test_option_errors(void **state)
{
    (void)state;
    problem p = open_problem(open_context(DOT_F32, 0, 1), bowl, 4, NULL);
    REFUSES(lbfgs, lr, -1, "lr -1, expected 0 to");
    REFUSES(lbfgs, lr, NAN, "lr nan, expected 0 to");
    REFUSES(lbfgs, max_iter, 0, "max_iter 0, expected 1 to");
    REFUSES(lbfgs, max_eval, 0, "max_eval 0, expected 1 to");
    REFUSES(lbfgs, tolerance_grad, -1e-3, "tolerance_grad -0.001, expected 0");
    REFUSES(lbfgs, tolerance_change, INFINITY, "tolerance_change inf, expected 0");
    REFUSES(lbfgs, history, 0, "history 0, expected 1 to 10000");
    REFUSES(lbfgs, line_search, (dot_line_search)2, "line_search 2, expected 0 to 1");
    REFUSES(lbfgs, magic, 0, "magic 0x00000000, expected options filled by");
    REFUSES(cmaes, sigma, 0, "sigma 0, expected 1e-300 to");
    REFUSES(cmaes, population, 3, "population 3, expected 4 to");
    REFUSES(cmaes, magic, 1, "magic 0x00000001");
    REFUSES(spsa, a, -1, "a -1, expected 0 to");
    REFUSES(spsa, c, 0, "c 0, expected 1e-300 to");
    REFUSES(spsa, stability, -2, "stability -2, expected 0 to");
    REFUSES(spsa, alpha, NAN, "alpha nan");
    REFUSES(spsa, gamma, -1, "gamma -1");
    REFUSES(spsa, magic, 2, "magic 0x00000002");
    REFUSES(svrg, lr, -3, "lr -3");
    REFUSES(svrg, batches, 0, "batches 0, expected 1 to");
    REFUSES(svrg, inner, -1, "inner -1, expected 0 to");
    REFUSES(svrg, magic, 3, "magic 0x00000003");
    dot_natural_options o = dot_natural_defaults();
    o.examples = 3;
    assert_null(dot_natural_create(p.ctx, p.layer, &o));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_create: damping 0, expected 1e-300 to");
    o.damping = -1;
    assert_null(dot_natural_create(p.ctx, p.layer, &o));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_create: damping -1, expected 1e-300 to");
    o.damping = 1;
    o.outputs = 2;
    assert_null(dot_natural_create(p.ctx, p.layer, &o));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_create: outputs 2, expected 1 to 1");
    o.outputs = 1;
    o.examples = 0;
    assert_null(dot_natural_create(p.ctx, p.layer, &o));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_create: examples 0, expected 1 to");
    REFUSES(natural, fisher, (dot_fisher)3, "fisher 3, expected 0 to 2");
    REFUSES(natural, method, (dot_natural_method)3, "method 3, expected 0 to 2");
    REFUSES(natural, lr, -1, "lr -1");
    REFUSES(natural, magic, 4, "magic 0x00000004");
    dot_context_destroy(p.ctx);
}

static void test_create_errors(void **state)
{
    (void)state;
    dot_context_options two = dot_context_defaults();
    two.lanes = 2;
    dot_context *lanes = dot_context_create(&two), *ctx = open_context(DOT_F32, 0, 1);
    dot_layer *laned = dot_nn_linear(lanes, 2, 2), *empty = dot_nn_relu(ctx), *large = dot_nn_linear(ctx, 100, 100);
    assert_null(dot_lbfgs_create(lanes, laned, NULL));
    assert_error(lanes, DOT_ERROR_STATE, "dot_lbfgs_create: a context of 2 lanes, expected one lane");
    assert_null(dot_cmaes_create(lanes, laned, NULL));
    assert_error(lanes, DOT_ERROR_STATE, "dot_cmaes_create: a context of 2 lanes, expected one lane");
    assert_null(dot_spsa_create(lanes, laned, NULL));
    assert_error(lanes, DOT_ERROR_STATE, "dot_spsa_create: a context of 2 lanes, expected one lane");
    assert_null(dot_svrg_create(lanes, laned, NULL));
    assert_error(lanes, DOT_ERROR_STATE, "dot_svrg_create: a context of 2 lanes, expected one lane");
    assert_null(dot_kfac_create(lanes, laned, NULL));
    assert_error(lanes, DOT_ERROR_STATE, "dot_kfac_create: a context of 2 lanes, expected one lane");
    assert_null(dot_kfac_create(ctx, dot_nn_linear(ctx, 4096, 1), NULL));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: a layer's size, with the bias, 4097, expected 1 to 4096");
    dot_conv_options groups = conv_of(3, 1, 0), transposed = conv_of(3, 1, 0);
    groups.groups = 2;
    assert_null(dot_kfac_create(ctx, dot_nn_conv2d(ctx, 456, 1, NULL), NULL));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: a layer's size, with the bias, 4105, expected 1 to 4096");
    dot_layer *left_out = dot_nn_sequential(ctx, dot_nn_conv2d(ctx, 4, 4, &groups), dot_nn_conv_transpose2d(ctx, 4, 4, &transposed), NULL);
    assert_null(dot_kfac_create(ctx, left_out, NULL));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: 0 linear or convolution layers that train under no other K-FAC");
    assert_null(dot_lbfgs_create(ctx, laned, NULL));
    assert_error(ctx, DOT_ERROR_STATE, "dot_lbfgs_create: layer of another context");
    assert_null(dot_lbfgs_create(ctx, empty, NULL));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_lbfgs_create: the layer has no trainable parameters");
    assert_null(dot_cmaes_create(ctx, large, NULL));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_cmaes_create: the number of trainable parameters 10100, expected 1 to 4096");
    dot_natural_options o = dot_natural_defaults();
    o.damping = 1;
    o.examples = 2;
    assert_null(dot_natural_create(ctx, large, &o));
    assert_error(ctx, DOT_ERROR_ARGUMENT, "dot_natural_create: the number of trainable parameters 10100, expected 1 to 8192");
    assert_null(dot_natural_create(lanes, laned, &o));
    assert_error(lanes, DOT_ERROR_STATE, "dot_natural_create: a context of 2 lanes, expected one lane");
    assert_null(dot_lbfgs_create(ctx, NULL, NULL));
    assert_null(dot_lbfgs_create(NULL, large, NULL));
    assert_true(isnan(dot_lbfgs_step(NULL, loss_of, NULL)) && isnan(dot_cmaes_step(NULL, loss_of, NULL)));
    assert_true(isnan(dot_spsa_step(NULL, loss_of, NULL)) && isnan(dot_svrg_step(NULL, loss_of, batch_of, NULL)));
    assert_true(isnan(dot_cmaes_best(NULL)) && isnan(dot_cmaes_sigma(NULL)));
    assert_true(dot_lbfgs_iterations(NULL) == 0 && dot_lbfgs_evaluations(NULL) == 0);
    assert_true(dot_ok(ctx));
    dot_context_destroy(lanes);
    dot_context_destroy(ctx);
}

typedef struct solvers {
    dot_lbfgs *lbfgs;
    dot_cmaes *cmaes;
    dot_spsa *spsa;
    dot_svrg *svrg;
    dot_natural *natural[3];        /* dense, CG, diagonal */
} solvers;

static solvers open_solvers(problem *p)
{
    solvers s;
    s.lbfgs = dot_lbfgs_create(p->ctx, p->layer, NULL);
    s.cmaes = dot_cmaes_create(p->ctx, p->layer, NULL);
    s.spsa = dot_spsa_create(p->ctx, p->layer, NULL);
    s.svrg = dot_svrg_create(p->ctx, p->layer, NULL);
    dot_natural_options o = dot_natural_defaults();
    o.damping = 1;
    o.examples = 3;
    for (int i = 0; i < 3; ++i) {
        o.method = (dot_natural_method)i;
        s.natural[i] = dot_natural_create(p->ctx, p->layer, &o);
    }
    return s;
}

static dot_tensor *loss_of_batch(void *user, int64_t index)
{
    (void)index;
    return loss_of(user);
}

static double step_of(solvers *s, int which, problem *p)
{
    switch (which) {
    case 0: return dot_lbfgs_step(s->lbfgs, loss_of, p);
    case 1: return dot_cmaes_step(s->cmaes, loss_of, p);
    case 2: return dot_spsa_step(s->spsa, loss_of, p);
    case 3: return dot_svrg_step(s->svrg, loss_of, loss_of_batch, p);
    default: return dot_natural_step(s->natural[which - 4], loss_of, loss_of_batch, p);
    }
}

enum { SOLVERS = 7 };
static const char *const solver_step[SOLVERS] = { "dot_lbfgs_step", "dot_cmaes_step", "dot_spsa_step", "dot_svrg_step",
                                                  "dot_natural_step", "dot_natural_step", "dot_natural_step" };

/* A loss function that goes wrong: an error by name, and the parameters as before. */
static void test_loss_errors(void **state)
{
    static const struct { int mistake; dot_status status; const char *text; } rows[] = {
        { RETURNS_NULL, DOT_ERROR_STATE, "the user's function returned NULL, expected a scalar" },
        { RETURNS_VECTOR, DOT_ERROR_SHAPE, "the user's function returned a tensor [4], expected a scalar" },
        { FAILS, DOT_ERROR_SHAPE, "dot_reshape" },
    };
    static const double start[4] = { 0.5, -0.25, 2, 1 };
    double now[4];
    (void)state;
    problem p = open_problem(open_context(DOT_F32, 0, 1), bowl, 4, start);
    solvers s = open_solvers(&p);
    for (int which = 0; which < SOLVERS; ++which) {
        for (int r = 0; r < COUNT(rows); ++r) {
            p.mistake = rows[r].mistake;
            assert_true(isnan(step_of(&s, which, &p)));
            if (p.mistake != FAILS)
                assert_non_null(strstr(dot_error(p.ctx), solver_step[which]));
            assert_error(p.ctx, rows[r].status, rows[r].text);
            values_of(&p, now);
            assert_memory_equal(now, start, sizeof now);
        }
        p.mistake = RIGHT;
        assert_true(isfinite(step_of(&s, which, &p)) && dot_ok(p.ctx));     /* and works after it */
        dot_parameter_set(p.layer, "theta", 0, start, 4);
    }
    assert_true(isnan(dot_lbfgs_step(s.lbfgs, NULL, &p)));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_lbfgs_step: a function is NULL");
    assert_true(isnan(dot_svrg_step(s.svrg, loss_of, NULL, &p)));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_svrg_step: a function is NULL");
    assert_true(isnan(dot_natural_step(s.natural[0], NULL, NULL, &p)));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_step: a function is NULL");
    dot_natural_options o = dot_natural_defaults();
    o.damping = 1;
    o.examples = 2;
    o.outputs = 3;
    o.fisher = DOT_FISHER_GAUSS_NEWTON;
    dot_natural *s3 = dot_natural_create(p.ctx, p.layer, &o);
    assert_true(isnan(dot_natural_step(s3, NULL, loss_of_batch, &p)));
    assert_error(p.ctx, DOT_ERROR_ARGUMENT, "dot_natural_step: a function is NULL");
    assert_true(isnan(dot_natural_step(s3, loss_of, loss_of_batch, &p)));
    assert_error(p.ctx, DOT_ERROR_SHAPE, "dot_natural_step: the output of example 0 is [], expected 3 elements");
    dot_lane_stop(p.ctx, 0);
    assert_true(isnan(dot_spsa_step(s.spsa, loss_of, &p)));
    assert_error(p.ctx, DOT_ERROR_STATE, "dot_spsa_step: the context's lane is stopped");
    dot_context_destroy(p.ctx);
}

/* ---- memory ------------------------------------------------------------------------------------------------------- */

typedef struct meter { int64_t allocations, blocks, fail_at; } meter;

static void *meter_allocate(void *user, size_t bytes)
{
    meter *m = (meter *)user;
    if (++m->allocations == m->fail_at)
        return NULL;
    void *memory = malloc(bytes);
    m->blocks += memory != NULL;
    return memory;
}

static void meter_release(void *user, void *memory, size_t bytes)
{
    meter *m = (meter *)user;
    (void)bytes;
    m->blocks--;
    free(memory);
}

static dot_context *metered(meter *m)
{
    dot_context_options o = dot_context_defaults();
    o.threads = 2;
    o.allocator.allocate = meter_allocate;
    o.allocator.release = meter_release;
    o.allocator.user = m;
    return dot_context_create(&o);
}

/* A network of two layers under K-FAC, linear or given, with the data of another. */
static problem open_kfac(dot_context *ctx, const data *d, dot_fisher fisher, dot_layer *given, dot_kfac **s)
{
    problem p = open_problem(ctx, net_loss, 37, NULL);
    p.x = d->net_x;
    p.y = d->net_y;
    p.rows = 12;
    if (given)
        p.layer = given;
    dot_kfac_options o = dot_kfac_defaults();
    o.fisher = fisher;
    o.statistics_every = 3;
    o.inverse_every = 4;
    *s = dot_kfac_create(ctx, p.layer, &o);
    return p;
}

static void test_kfac_steady(void **state)
{
    static dot_tensor *(*const statistics[3])(void *) = { NULL, net_sampled, net_outputs };
    data d = open_data();
    (void)state;
    for (int i = 0; i < 6; ++i) {
        int fisher = i % 3;
        meter m = { 0, 0, 0 };
        int64_t after = 0;
        dot_kfac *s;
        dot_context *ctx = metered(&m);
        problem p = open_kfac(ctx, &d, (dot_fisher)fisher, i < 3 ? NULL : small_conv(ctx), &s);
        double before = value_now(&p);
        for (int step = 0; step < 20; ++step) {
            assert_true(isfinite(dot_kfac_step(s, loss_of, statistics[fisher], &p)));
            after = step == 0 ? m.allocations : after;
        }
        assert_int_equal(m.allocations, after);
        assert_true(value_now(&p) < before);
        dot_context_destroy(p.ctx);
        assert_int_equal(m.blocks, 0);
    }
    close_data(&d);
}

/* Statistics and a gradient that are not finite change nothing; after them it goes on. */
static void test_kfac_not_finite(void **state)
{
    double before[37], now[37];
    data d = open_data();
    dot_kfac *s;
    (void)state;
    problem p = open_kfac(open_context(DOT_F64, 0, 1), &d, DOT_FISHER_EMPIRICAL, NULL, &s);
    values_of(&p, before);
    for (int k = 1; k <= 2; ++k) {
        p.calls = 0;
        p.bad_call = k;                     /* 1: the statistics; 2: the loss, of the next step that has statistics */
        dot_kfac_step(s, loss_of, NULL, &p);
        require(p.ctx, true, "dot_kfac_step");
        values_of(&p, now);
        assert_true(memcmp(before, now, sizeof now) == 0 || k == 1);
        memcpy(before, now, sizeof now);
        for (int i = 0; i < 2; ++i)
            assert_true(isfinite(dot_kfac_step(s, loss_of, NULL, &p)));
        values_of(&p, before);
        for (int i = 0; i < 37; ++i)
            assert_true(isfinite(before[i]));
    }
    close_data(&d);
    dot_context_destroy(p.ctx);
}

static void test_kfac_failing_allocator(void **state)
{
    bool finished = false;
    data d = open_data();
    (void)state;
    for (int64_t fail = 1; !finished; ++fail) {
        meter m = { 0, 0, fail };
        dot_context *ctx = metered(&m);
        if (ctx) {
            dot_kfac *s;
            problem p = open_kfac(ctx, &d, DOT_FISHER_SAMPLED, small_conv(ctx), &s);
            dot_kfac_step(s, loss_of, net_sampled, &p);
            assert_true(dot_ok(ctx) == (m.allocations < fail));
            assert_int_equal(dot_error_status(ctx), dot_ok(ctx) ? DOT_OK : DOT_ERROR_MEMORY);
        }
        finished = m.allocations < fail;
        dot_context_destroy(ctx);
        assert_int_equal(m.blocks, 0);
    }
    close_data(&d);
}

static void test_steady(void **state)
{
    meter m = { 0, 0, 0 };
    (void)state;
    problem p = open_problem(metered(&m), bowl, 10, NULL);
    p.decades = 1;
    solvers s = open_solvers(&p);
    for (int which = 0; which < SOLVERS; ++which) {
        int64_t after = 0;
        for (int i = 0; i < 20; ++i) {
            assert_true(isfinite(step_of(&s, which, &p)));
            after = i == 0 ? m.allocations : after;
        }
        assert_int_equal(m.allocations, after);
    }
    dot_context_destroy(p.ctx);
    assert_int_equal(m.blocks, 0);
}

/* Every allocation fails in turn: an error, no crash, no leak, and the parameters stay if it is within a step. */
static void test_failing_allocator(void **state)
{
    (void)state;
    for (int64_t fail = 1;; ++fail) {
        meter m = { 0, 0, fail };
        dot_context *ctx = metered(&m);
        if (ctx) {
            problem p = open_problem(ctx, bowl, 10, NULL);
            solvers s = open_solvers(&p);
            for (int which = 0; which < SOLVERS; ++which)
                step_of(&s, which, &p);
            assert_true(dot_ok(ctx) == (m.allocations < fail));
            if (!dot_ok(ctx))
                assert_int_equal(dot_error_status(ctx), DOT_ERROR_MEMORY);
        }
        bool finished = m.allocations < fail;
        dot_context_destroy(ctx);
        assert_int_equal(m.blocks, 0);
        if (finished)
            break;
    }
}

/* ---- all of them -------------------------------------------------------------------------------------------------- */

static int open_golden(void **state)
{
    (void)state;
    golden_context = dot_context_create(NULL);
    golden_file = dot_safetensors_open(golden_context, GOLDEN);
    if (!golden_file)
        print_error("%s\n", dot_error(golden_context));
    return golden_file ? 0 : 1;
}

static int close_golden(void **state)
{
    (void)state;
    dot_context_destroy(golden_context);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lbfgs_like_torch),
        cmocka_unit_test(test_lbfgs_rosenbrock),
        cmocka_unit_test(test_lbfgs_quadratic),
        cmocka_unit_test(test_lbfgs_not_finite),
        cmocka_unit_test(test_cmaes_like_numpy),
        cmocka_unit_test(test_cmaes_converges),
        cmocka_unit_test(test_cmaes_not_finite),
        cmocka_unit_test(test_evaluation),
        cmocka_unit_test(test_frozen),
        cmocka_unit_test(test_spsa_like_numpy),
        cmocka_unit_test(test_spsa_converges),
        cmocka_unit_test(test_spsa_not_finite),
        cmocka_unit_test(test_svrg_linear),
        cmocka_unit_test(test_natural_like_numpy),
        cmocka_unit_test(test_natural_newton),
        cmocka_unit_test(test_natural_sampled_is_true),
        cmocka_unit_test(test_natural_lost_damping),
        cmocka_unit_test(test_natural_not_finite),
        cmocka_unit_test(test_kfac_like_torch),
        cmocka_unit_test(test_kfac_is_natural),
        cmocka_unit_test(test_kfac_of_many_rows),
        cmocka_unit_test(test_kfac_without_gradients),
        cmocka_unit_test(test_kfac_errors),
        cmocka_unit_test(test_same_bits),
        cmocka_unit_test(test_option_errors),
        cmocka_unit_test(test_create_errors),
        cmocka_unit_test(test_loss_errors),
        cmocka_unit_test(test_kfac_steady),
        cmocka_unit_test(test_kfac_not_finite),
        cmocka_unit_test(test_kfac_failing_allocator),
        cmocka_unit_test(test_steady),
        cmocka_unit_test(test_failing_allocator),
    };
    return cmocka_run_group_tests(tests, open_golden, close_golden);
}
