/*
 * zoo_run.h - the optimizers, the tasks, and the search for a learning rate.
 */
#ifndef ZOO_RUN_H
#define ZOO_RUN_H

#include <time.h>

/* ---- tasks -------------------------------------------------------------- */

typedef enum { QUADRATIC, ROSENBROCK, CLASSIFIER, TASKS } zoo_task_id;

enum { ZOO_LANES = 13 };            /* the most factors of the learning rate that are tried */

/* Both functions are sums of c r^2 with two residuals r. */
typedef struct {
    const char *name, *title;
    double start[2], scale[2];      /* of the residuals: c */
    double threshold;
    double floor;                   /* losses below it count as equal */
    int64_t steps;
    int factors, decades;           /* of the default learning rate: 10^-decades to 10^decades */
} zoo_task;

static const zoo_task zoo_tasks[TASKS] = {
    { "quadratic", "x\u00b2 + 10 y\u00b2 from (5, 5)", { 5, 5 }, { 1, 10 }, 1e-6, 1e-12, 200, 13, 3 },
    { "rosenbrock", "Rosenbrock, (1 \u2212 x)\u00b2 + 100 (y \u2212 x\u00b2)\u00b2 from (\u22121.2, 1)", { -1.2, 1 }, { 1, 100 },
      1e-4, 1e-12, 2000, 13, 3 },
    { "classifier", "Fashion-MNIST, 784-64-10, batches of 64", { 0, 0 }, { 0, 0 }, 0.6, 0, 300, 7, 2 },
};

enum { ZOO_BATCH = 64, ZOO_HIDDEN = 64, ZOO_HELD_OUT = 1000, ZOO_EVERY = 20, ZOO_PIXELS = 28 * 28, ZOO_CURVATURE_EVERY = 10 };

static double zoo_factor(const zoo_task *task, int lane)
{
    return pow(10, task->decades * (2.0 * lane / (task->factors - 1) - 1));
}

static double zoo_quadratic(double x, double y)
{
    return x * x + 10 * y * y;
}

static double zoo_rosenbrock(double x, double y)
{
    return (1 - x) * (1 - x) + 100 * (y - x * x) * (y - x * x);
}

/* ---- optimizers --------------------------------------------------------- */

typedef enum { ZOO_RULE, ZOO_LBFGS, ZOO_CMAES, ZOO_SPSA, ZOO_NATURAL } zoo_solver;

typedef struct {
    const char *name, *description, *source;
    zoo_solver solver;
    dot_algorithm algorithm;        /* ZOO_RULE only */
    bool on[TASKS];
    const char *searched;           /* the number that the search changes */
    double base;                    /* its default */
    bool slow;                      /* 20 ms or more for an update of the classifier: the search takes a minute */
} zoo_entry;

static const char zoo_slow[] = " muon shampoo scion soap psgd-kron ";

/* The solvers of the library that are no rows of DOT_OPTIMIZERS. SVRG and K-FAC are left out: one is a loop around whole epochs,
   and the eigenvectors of the other's first factor (785 rows) take more than a minute. L-BFGS, CMA-ES and the dense natural
   gradient are for losses without noise, or for few parameters. */
static const zoo_entry zoo_solvers[] = {
    { "l-bfgs", "limited-memory quasi-Newton, strong Wolfe; one iteration a step", "Liu, Nocedal 1989; torch.optim.LBFGS", ZOO_LBFGS,
      DOT_CUSTOM, { true, true, false }, "lr", 1, false },
    { "cma-es", "evolution of a normal distribution; a step is a generation", "Hansen 2016", ZOO_CMAES, DOT_CUSTOM,
      { true, true, false }, "sigma", 0.3, false },
    { "spsa", "two evaluations along a random direction, no gradient", "Spall 1992, 1998", ZOO_SPSA, DOT_CUSTOM,
      { true, true, true }, "a", 0.16, false },
    { "natural-gradient", "natural gradient by Gauss-Newton, damping 1e-3", "Amari 1998", ZOO_NATURAL, DOT_CUSTOM,
      { true, true, false }, "lr", 1, false },
};

enum { ZOO_SOLVERS = sizeof zoo_solvers / sizeof *zoo_solvers, ZOO_ENTRIES = DOT_ALGORITHMS - 1 + ZOO_SOLVERS };

/* Whether a list of names, with spaces around each, holds this one. */
static bool zoo_in(const char *names, const char *name)
{
    char word[64];
    snprintf(word, sizeof word, " %s ", name);
    return strstr(names, word) != NULL;
}

/* All optimizers: those of DOT_OPTIMIZERS but DOT_CUSTOM, then the solvers. */
static void zoo_entries(zoo_entry *entry)
{
    int count = 0;
    for (int a = 0; a < DOT_ALGORITHMS; ++a) {
        const dot_algorithm algorithm = (dot_algorithm)a;
        if (algorithm == DOT_CUSTOM) continue;
        const bool model = algorithm != DOT_SOPHIA_G;   /* it draws labels from a model's prediction: the functions have none */
        const zoo_entry rule = { dot_algorithm_name(algorithm), dot_algorithm_description(algorithm), dot_algorithm_paper(algorithm),
                                 ZOO_RULE, algorithm, { model, model, true }, "lr", dot_optimizer_defaults(algorithm).lr, false };
        entry[count++] = rule;
    }
    for (int i = 0; i < ZOO_SOLVERS; ++i) entry[count++] = zoo_solvers[i];
    for (int i = 0; i < count; ++i) entry[i].slow = zoo_in(zoo_slow, entry[i].name);
}

/* Small groups of kin, for the figures; a name that is missing here is drawn with the others. */
typedef struct { const char *title, *names; } zoo_family;
static const zoo_family zoo_families[] = {
    { "Gradient and momentum", " sgd momentum nesterov noisy-sgd qhm aggmo pnm " },
    { "Averages and radial parts", " asgd schedule-free-sgd schedule-free-adamw adamp sgdp " },
    { "Step sizes for each element", " adagrad adadelta rmsprop rprop novograd madgrad swats sparse-adam " },
    { "Adam and its relatives", " adam adamw adamax adamaxw nadam nadamw amsgrad radam " },
    { "Other second moments", " yogi adabelief acprop adopt diffgrad adabound laprop stable-adamw " },
    { "Other momenta", " adan ademamix mars qhadam optimistic-adam adam-atan2 grams " },
    { "Signs and trust ratios", " sign-sgd signum lion tiger lamb lars fromage " },
    { "Step sizes found on the way", " polyak-sgd prodigy dadapt-adam dog dowg momo momo-adam cocob " },
    { "Curvature, and no gradient", " l-bfgs cma-es spsa natural-gradient k-fac sophia-g sophia-h adahessian " },
    { "Factors and projections", " adafactor adamw-factored came sm3 adam-mini galore " },
    { "Matrices", " muon shampoo scion soap psgd-kron " },
    { "Others", "" },
};
enum { ZOO_FAMILIES = sizeof zoo_families / sizeof *zoo_families };

static int zoo_family_of(const char *name)
{
    int i = 0;
    while (i < ZOO_FAMILIES - 1 && !zoo_in(zoo_families[i].names, name)) ++i;
    return i;
}

/* ---- results ------------------------------------------------------------ */

/* Losses (and points) of every factor; curve[lane * points + i] is the loss after i steps, or evaluations. NaN after
   the run diverged. */
typedef struct {
    bool ran;
    int lanes;
    int64_t points;
    double *curve, *x, *y;          /* x, y: of the functions of two variables only */
    double *accuracy;               /* of the classifier: at the end, by lane */
    double lr[ZOO_LANES];           /* what was tried */
    /* found */
    int best, diverged;             /* the winner; how many ended above where they began */
    bool same;                      /* all losses are: the rule reads no learning rate */
    double final;
    int64_t reached;                /* steps to the threshold; -1: never */
    double update_us, step_us;      /* the optimizer alone, the whole step */
    double bytes;                   /* of state for each parameter */
    double evaluations;             /* of the loss in a step */
} zoo_result;

static void *zoo_alloc(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    if (!memory) {
        fprintf(stderr, "optimizer_zoo: out of memory\n");
        exit(1);
    }
    return memory;
}

/* What all runs share. */
typedef struct {
    const uint8_t *images, *labels; /* NULL: no data */
    int64_t images_count;
    int64_t steps[TASKS];
    uint64_t seed;
} zoo_settings;

/* ---- a run -------------------------------------------------------------- */

typedef struct {
    const zoo_settings *settings;
    const zoo_entry *entry;
    zoo_task_id id;
    const zoo_task *task;
    dot_context *ctx;
    dot_layer *net;
    dot_tensor *theta;              /* functions: both variables */
    dot_dataset *train, *held_out;
    dot_tensor *labels;             /* Sophia-G: drawn from the prediction */
    int64_t step;
    int64_t evaluations;
} zoo_run;

static dot_tensor *zoo_residuals(zoo_run *r)
{
    if (r->id == QUADRATIC) return r->theta;
    dot_tensor *x = dot_slice(r->theta, 0, 0, 1), *y = dot_slice(r->theta, 0, 1, 2);
    dot_tensor *pair[2] = { dot_add_scalar(dot_neg(x), 1), dot_sub(y, dot_square(x)) };
    return dot_concat(pair, 2, 0);
}

/* The layer of the functions: its input is the scale of the residuals. */
static dot_tensor *zoo_function_forward(void *user, dot_layer *layer, dot_tensor *scale)
{
    (void)layer;
    return dot_sum(dot_mul(scale, dot_square(zoo_residuals((zoo_run *)user))), DOT_ALL_AXES, false);
}

static dot_tensor *zoo_logits(zoo_run *r)
{
    return dot_forward(r->net, dot_batch(r->train, ZOO_BATCH, r->step));
}

/* The loss of the present step, as solvers want it. */
static dot_tensor *zoo_loss(void *user)
{
    static const int64_t two[] = { 2 };
    zoo_run *r = (zoo_run *)user;
    ++r->evaluations;
    dot_step_begin(r->ctx);
    if (r->id != CLASSIFIER) return dot_forward(r->net, dot_input(r->ctx, DOT_F64, 1, two, r->task->scale));
    return dot_cross_entropy_loss(zoo_logits(r), dot_batch_labels(r->train, ZOO_BATCH, r->step), 0);
}

/* Output i of the natural gradient: sqrt(c_i) r_i. */
static dot_tensor *zoo_output(void *user, int64_t index)
{
    static const int64_t two[] = { 2 };
    zoo_run *r = (zoo_run *)user;
    const double root[2] = { sqrt(r->task->scale[0]), sqrt(r->task->scale[1]) };
    ++r->evaluations;
    dot_step_begin(r->ctx);
    return dot_slice(dot_mul(dot_input(r->ctx, DOT_F64, 1, two, root), zoo_residuals(r)), 0, index, index + 1);
}

/* The loss with labels drawn from the prediction of each lane. */
static dot_tensor *zoo_sampled_loss(zoo_run *r)
{
    static const int64_t shape[] = { ZOO_BATCH };
    double p[ZOO_BATCH * 10] = { 0 };
    if (!r->labels) r->labels = dot_tensor_create(r->ctx, DOT_I64, 1, shape);
    ++r->evaluations;
    dot_step_begin(r->ctx);
    dot_tensor *logits = zoo_logits(r), *softmax = dot_softmax(logits, 1);
    for (int lane = 0; lane < dot_lanes(r->ctx); ++lane) {
        int64_t *label = (int64_t *)dot_tensor_data(r->labels, lane);
        dot_tensor_get(softmax, lane, p, ZOO_BATCH * 10);
        for (int i = 0; label && i < ZOO_BATCH; ++i) {
            double left = dot_random_uniform(r->settings->seed, UINT64_C(0x5a6f6f), (uint64_t)(r->step * ZOO_BATCH + i));
            for (label[i] = 0; label[i] < 9 && left >= p[10 * i + label[i]]; ++label[i]) left -= p[10 * i + label[i]];
        }
    }
    return dot_cross_entropy_loss(logits, r->labels, 0);
}

static dot_dataset *zoo_dataset(zoo_run *r, int64_t first, int64_t count, bool shuffle)
{
    static const int64_t shape[] = { 28, 28, 1 };
    dot_dataset_options o = dot_dataset_defaults();
    o.first = first;
    o.count = count;
    o.shuffle = shuffle;
    return dot_dataset_memory(r->ctx, r->settings->images, r->settings->labels, r->settings->images_count, 3, shape, &o);
}

static void zoo_open(zoo_run *r, const zoo_settings *settings, const zoo_entry *entry, zoo_task_id id, int lanes)
{
    static const int64_t two[] = { 2 };
    dot_context_options o = dot_context_defaults();
    memset(r, 0, sizeof *r);
    r->settings = settings;
    r->entry = entry;
    r->id = id;
    r->task = &zoo_tasks[id];
    o.threads = 1;
    o.lanes = lanes;
    o.seed = settings->seed;
    o.dtype = id == CLASSIFIER ? DOT_F32 : DOT_F64;
    o.flush_denormals = id == CLASSIFIER;
    r->ctx = dot_context_create(&o);
    if (id == CLASSIFIER) {
        const int64_t train = settings->images_count - ZOO_HELD_OUT;
        r->train = zoo_dataset(r, 0, train, true);
        r->held_out = zoo_dataset(r, train, ZOO_HELD_OUT, false);
        r->net = dot_nn_sequential(r->ctx, dot_nn_flatten(r->ctx), dot_nn_linear(r->ctx, ZOO_PIXELS, ZOO_HIDDEN), dot_nn_relu(r->ctx),
                                   dot_nn_linear(r->ctx, ZOO_HIDDEN, 10), (dot_layer *)NULL);
    } else {
        r->net = dot_nn_custom(r->ctx, r->task->name, zoo_function_forward, r);
        r->theta = dot_layer_add_parameter(r->net, "theta", DOT_KIND_WEIGHT, 1, two);
        dot_tensor_set(r->theta, DOT_ALL, r->task->start, 2);
    }
}

/* Writes down the loss of a lane after `point` steps, or evaluations; false when it has diverged. `out` is the lane of the result. */
static bool zoo_note(zoo_run *r, zoo_result *result, int lane, int out, int64_t point, const dot_tensor *held_out_loss)
{
    const int64_t at = out * result->points + point;
    double theta[2] = { NAN, NAN }, loss;
    if (r->id == CLASSIFIER) {
        loss = dot_item(held_out_loss, lane);
    } else {
        dot_tensor_get(r->theta, lane, theta, 2);
        loss = (r->id == QUADRATIC ? zoo_quadratic : zoo_rosenbrock)(theta[0], theta[1]);
        result->x[at] = theta[0];
        result->y[at] = theta[1];
    }
    const bool good = isfinite(loss) && loss < 1e12;
    result->curve[at] = good ? loss : NAN;
    return good;
}

static double zoo_accuracy(zoo_run *r, dot_tensor *logits, int lane)
{
    double *value = (double *)zoo_alloc(ZOO_HELD_OUT * 10, sizeof *value);
    int right = 0;
    dot_tensor_get(logits, lane, value, ZOO_HELD_OUT * 10);
    for (int i = 0; i < ZOO_HELD_OUT; ++i) {
        int best = 0;
        for (int k = 1; k < 10; ++k)
            if (value[10 * i + k] > value[10 * i + best]) best = k;
        right += best == r->settings->labels[r->settings->images_count - ZOO_HELD_OUT + i];
    }
    free(value);
    return (double)right / ZOO_HELD_OUT;
}

/* Notes all lanes that are still going; stops those that have diverged. False when none is left. `out`: the first lane of the result. */
static bool zoo_measure(zoo_run *r, zoo_result *result, int out, int64_t step, bool end)
{
    dot_tensor *loss = NULL, *logits = NULL;
    bool any = false;
    if (r->id == CLASSIFIER) {
        if (step % ZOO_EVERY && !end) return true;
        dot_eval_begin(r->ctx);
        logits = dot_forward(r->net, dot_batch(r->held_out, ZOO_HELD_OUT, 0));
        loss = dot_cross_entropy_loss(logits, dot_batch_labels(r->held_out, ZOO_HELD_OUT, 0), 0);
    }
    const int64_t point = r->id == CLASSIFIER ? (step + ZOO_EVERY - 1) / ZOO_EVERY : step;
    for (int lane = 0; lane < dot_lanes(r->ctx); ++lane) {
        if (!dot_lane_active(r->ctx, lane)) continue;
        if (zoo_note(r, result, lane, out + lane, point, loss)) any = true;
        else dot_lane_stop(r->ctx, lane);
        if (logits && end) result->accuracy[out + lane] = zoo_accuracy(r, logits, lane);
    }
    return any;
}

static dot_optimizer_options zoo_rule_options(const zoo_run *r)
{
    dot_optimizer_options o = dot_optimizer_defaults(r->entry->algorithm);
    if (r->id != CLASSIFIER) o.weight_decay = 0;    /* it would move the minimum */
    if (r->entry->algorithm == DOT_SOPHIA_G) o.batch = ZOO_BATCH;
    return o;
}

/* One step of a rule: curvature for those that need it, then loss, gradient and update. Returns when the update began. */
static double zoo_rule_step(zoo_run *r, dot_optimizer *opt)
{
    const dot_algorithm a = r->entry->algorithm;
    if (r->step % ZOO_CURVATURE_EVERY == 0) {
        if (a == DOT_SOPHIA_H || a == DOT_ADAHESSIAN) dot_optimizer_hutchinson(opt, zoo_loss, r);
        if (a == DOT_SOPHIA_G) {
            dot_backward(zoo_sampled_loss(r));
            dot_optimizer_curvature(opt);
        }
    }
    dot_tensor *loss = zoo_loss(r);
    dot_optimizer_loss(opt, loss);
    dot_backward(loss);
    const double begun = cli_seconds();
    dot_optimizer_step(opt, 1);
    return begun;
}

typedef bool (*zoo_tick)(void *user, int64_t steps);

/* Rules: one context, one lane for each learning rate. */
static void zoo_search_rule(zoo_run *r, zoo_result *result, zoo_tick tick, void *user)
{
    const dot_optimizer_options o = zoo_rule_options(r);
    const int64_t steps = r->settings->steps[r->id];
    dot_optimizer *opt = dot_optimizer_create(r->ctx, r->net, &o);
    for (int lane = 0; lane < result->lanes; ++lane) dot_optimizer_set(opt, DOT_HYPER_LR, 0, lane, result->lr[lane]);
    for (int64_t step = 0; step <= steps && dot_ok(r->ctx); ++step) {
        r->step = step;
        dot_optimizer_averaged(opt, true);
        const bool any = zoo_measure(r, result, 0, step, step == steps);
        dot_optimizer_averaged(opt, false);
        if (!any || step == steps || !tick(user, result->lanes)) break;
        zoo_rule_step(r, opt);
    }
    if (r->step) result->evaluations = (double)r->evaluations / (double)r->step;
    result->bytes = (double)dot_optimizer_bytes(r->net, &o) / result->lanes / (double)dot_layer_parameter_count(r->net);
}

typedef struct {
    zoo_solver kind;
    dot_lbfgs *lbfgs;
    dot_cmaes *cmaes;
    dot_spsa *spsa;
    dot_natural *natural;
} zoo_solver_state;

static zoo_solver_state zoo_solver_create(zoo_run *r, double lr)
{
    zoo_solver_state s = { r->entry->solver, NULL, NULL, NULL, NULL };
    if (s.kind == ZOO_LBFGS) {
        dot_lbfgs_options o = dot_lbfgs_defaults();
        o.lr = lr;
        o.max_iter = 1;
        o.line_search = DOT_LINE_SEARCH_STRONG_WOLFE;
        s.lbfgs = dot_lbfgs_create(r->ctx, r->net, &o);
    } else if (s.kind == ZOO_CMAES) {
        dot_cmaes_options o = dot_cmaes_defaults();
        o.sigma = lr;
        s.cmaes = dot_cmaes_create(r->ctx, r->net, &o);
    } else if (s.kind == ZOO_SPSA) {
        dot_spsa_options o = dot_spsa_defaults();
        o.a = lr;
        s.spsa = dot_spsa_create(r->ctx, r->net, &o);
    } else {
        dot_natural_options o = dot_natural_defaults();
        o.lr = lr;
        o.fisher = DOT_FISHER_GAUSS_NEWTON;
        o.damping = 1e-3;
        o.examples = 2;
        o.scale = 4;                /* the loss is a sum of squares: its Hessian is 2 J'J, and F is J'J / 2 */
        s.natural = dot_natural_create(r->ctx, r->net, &o);
    }
    return s;
}

static void zoo_solver_step(zoo_run *r, const zoo_solver_state *s)
{
    if (s->kind == ZOO_LBFGS) dot_lbfgs_step(s->lbfgs, zoo_loss, r);
    else if (s->kind == ZOO_CMAES) dot_cmaes_step(s->cmaes, zoo_loss, r);
    else if (s->kind == ZOO_SPSA) dot_spsa_step(s->spsa, zoo_loss, r);
    else dot_natural_step(s->natural, zoo_loss, zoo_output, r);
}

/* Solvers need a context of one lane: one run after the other. */
static void zoo_search_solver(zoo_run *r, zoo_result *result, int lane, zoo_tick tick, void *user)
{
    const int64_t steps = r->settings->steps[r->id];
    const size_t before = dot_memory(r->ctx).persistent_bytes;
    const zoo_solver_state s = zoo_solver_create(r, result->lr[lane]);
    result->bytes = (double)(dot_memory(r->ctx).persistent_bytes - before) / (double)dot_layer_parameter_count(r->net);
    if (r->id != CLASSIFIER) result->bytes = NAN;   /* of two parameters: nothing but what any size costs */
    for (int64_t step = 0; step <= steps && dot_ok(r->ctx); ++step) {
        r->step = step;
        if (!zoo_measure(r, result, lane, step, step == steps) || step == steps || !tick(user, 1)) break;
        zoo_solver_step(r, &s);
    }
    if (r->step) result->evaluations = (double)r->evaluations / (double)r->step;
}

/* The lane with the lowest final loss, ties by steps to the threshold. */
static void zoo_judge(zoo_result *result, const zoo_task *task, int64_t every)
{
    double best = INFINITY;
    result->best = result->diverged = 0;
    result->final = NAN;
    result->reached = -1;
    result->same = true;
    for (int lane = 0; lane < result->lanes; ++lane) {
        const double *curve = result->curve + lane * result->points, final = curve[result->points - 1];
        int64_t reached = 0;
        result->same = result->same && final == result->curve[result->points - 1];
        if (!(final <= curve[0])) {
            ++result->diverged;
            if (!isfinite(final)) continue;
        }
        while (reached < result->points && !(curve[reached] <= task->threshold)) ++reached;
        reached = reached == result->points ? -1 : reached * every;
        const double rank = fmax(final, task->floor);
        const bool sooner = rank == best && reached >= 0 && (result->reached < 0 || reached < result->reached);
        if (rank > best || (rank == best && !sooner)) continue;
        best = rank;
        result->best = lane;
        result->final = final;
        result->reached = reached;
    }
}

/* Runs one optimizer on one task with all learning rates. False, with the library's sentence, when it failed. */
static bool zoo_search(const zoo_settings *settings, const zoo_entry *entry, zoo_task_id id, zoo_result *result, zoo_tick tick,
                       void *user, char *error, size_t size)
{
    const zoo_task *task = &zoo_tasks[id];
    const int64_t every = id == CLASSIFIER ? ZOO_EVERY : 1;
    bool good = true;
    result->lanes = task->factors;
    result->points = (settings->steps[id] + every - 1) / every + 1;
    const size_t count = (size_t)(result->lanes * result->points);
    result->curve = (double *)zoo_alloc(count, sizeof *result->curve);
    for (size_t i = 0; i < count; ++i) result->curve[i] = NAN;
    if (id == CLASSIFIER) result->accuracy = (double *)zoo_alloc((size_t)result->lanes, sizeof(double));
    else {
        result->x = (double *)zoo_alloc(count, sizeof *result->x);
        result->y = (double *)zoo_alloc(count, sizeof *result->y);
        for (size_t i = 0; i < count; ++i) result->x[i] = result->y[i] = NAN;
    }
    for (int lane = 0; lane < result->lanes; ++lane) result->lr[lane] = entry->base * zoo_factor(task, lane);
    for (int lane = 0; lane < (entry->solver == ZOO_RULE ? 1 : result->lanes) && good; ++lane) {
        zoo_run r;
        zoo_open(&r, settings, entry, id, entry->solver == ZOO_RULE ? result->lanes : 1);
        if (entry->solver == ZOO_RULE) zoo_search_rule(&r, result, tick, user);
        else zoo_search_solver(&r, result, lane, tick, user);
        good = dot_ok(r.ctx);
        if (!good) snprintf(error, size, "%s on %s: %.400s", entry->name, task->name, r.ctx ? dot_error(r.ctx) : "no context");
        dot_context_destroy(r.ctx);
    }
    zoo_judge(result, task, every);
    result->ran = good;
    return good;
}

static void zoo_result_free(zoo_result *result)
{
    free(result->curve);
    free(result->x);
    free(result->y);
    free(result->accuracy);
}

/* ---- time --------------------------------------------------------------- */

static int zoo_compare(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* The median time of a step of one run on one thread with the learning rate found, in microseconds: the whole step, and
   dot_optimizer_step alone (solvers: nothing else than the step). */
static void zoo_time(const zoo_settings *settings, const zoo_entry *entry, zoo_task_id id, zoo_result *result)
{
    enum { WARM_UP = 4, MOST = 44 };
    double whole[MOST], update[MOST];
    int count = 0;
    zoo_run r;
    zoo_solver_state solver = { ZOO_RULE, NULL, NULL, NULL, NULL };
    dot_optimizer *opt = NULL;
    zoo_open(&r, settings, entry, id, 1);
    if (entry->solver == ZOO_RULE) {
        dot_optimizer_options o = zoo_rule_options(&r);
        o.lr = result->lr[result->best];
        opt = dot_optimizer_create(r.ctx, r.net, &o);
    } else solver = zoo_solver_create(&r, result->lr[result->best]);
    for (int64_t step = 0; step < MOST && dot_ok(r.ctx); ++step) {
        const double start = cli_seconds();
        double middle = start;
        r.step = step;
        if (opt) middle = zoo_rule_step(&r, opt);
        else zoo_solver_step(&r, &solver);
        const double end = cli_seconds();
        if (step < WARM_UP) continue;
        whole[count] = end - start;
        update[count++] = end - middle;
    }
    dot_context_destroy(r.ctx);
    if (!count) return;
    qsort(whole, (size_t)count, sizeof *whole, zoo_compare);
    qsort(update, (size_t)count, sizeof *update, zoo_compare);
    result->step_us = 1e6 * whole[count / 2];
    result->update_us = opt ? 1e6 * update[count / 2] : NAN;
}

#endif /* ZOO_RUN_H */
