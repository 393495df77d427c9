/*
 * optimizer_zoo - every optimizer of dotopt on the same three tasks: a quadratic, Rosenbrock's function and a small
 * classifier. Each gets the same small search for its learning rate. Prints sorted tables and draws the paths, the
 * convergence, all learning-rate schedules, gradient clipping and gradient accumulation.
 *
 *     cc -O2 -I. -I/usr/include/stb examples/optimizer_zoo.c -o optimizer_zoo -lm -pthread
 *
 * cli.h       what the examples' command lines share
 * zoo_run.h   the optimizers, the tasks and the search
 * zoo_draw.h  sheets of small charts
 * this file   options, workers and progress, tables, figures, main
 */
#define _POSIX_C_SOURCE 200809L
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

#define CLI_PROGRAM "optimizer_zoo"
#include "cli.h"
#include "zoo_draw.h"
#include "zoo_run.h"

/* ---- options ------------------------------------------------------------ */

typedef struct {
    bool list, plots, progress, slow, help, version;
    const char *only, *task_text, *data, *out;
    int64_t seed, jobs, steps;      /* steps 0: the task's own */
    /* made from these */
    const zoo_entry *entry;
    bool chosen[ZOO_ENTRIES], task[TASKS];
} options;

#define AT(field) offsetof(options, field)
static const cli_option option_table[] = {
    { "only", CLI_TEXT, AT(only), 0, 0, "LIST", "optimizers, e.g. adam,lion; --list names them" },
    { "task", CLI_TEXT, AT(task_text), 0, 0, "LIST", "of quadratic,rosenbrock,classifier (all)" },
    { "slow", CLI_ON, AT(slow), 0, 0, NULL, "with the matrix rules on the classifier, which take a minute each" },
    { "steps", CLI_COUNT, AT(steps), 1, 1000000, "N", "steps of each run (quadratic 200, rosenbrock 2000, classifier 300)" },
    { "seed", CLI_COUNT, AT(seed), 0, INT64_MAX, "N", "of the first weights, the batches and all draws (1)" },
    { "jobs", CLI_COUNT, AT(jobs), 1, 256, "N", "optimizers at the same time (the number of cores);\nchanges no result but the times" },
    { "data", CLI_TEXT, AT(data), 0, 0, "DIR", "where the Fashion-MNIST files are (data)" },
    { "out", CLI_TEXT, AT(out), 0, 0, "DIR", "where the figures go (results/zoo)" },
    { "no-plots", CLI_OFF, AT(plots), 0, 0, NULL, "tables only" },
    { "no-progress", CLI_OFF, AT(progress), 0, 0, NULL, "plain lines instead of a progress line" },
    { "list", CLI_ON, AT(list), 0, 0, NULL, "print the optimizers and the schedules" },
    { "help", CLI_ON, AT(help), 0, 0, NULL, "print this" },
    { "version", CLI_ON, AT(version), 0, 0, NULL, "print the version" },
};
#undef AT
enum { OPTIONS = sizeof option_table / sizeof *option_table };

static void print_help(void)
{
    printf("usage: optimizer_zoo [OPTIONS]\n\n"
           "Runs every optimizer of dotopt on the same tasks, each with the same search for its learning rate, prints a\n"
           "sorted table for each task, and draws figures.\n");
    cli_print_options(option_table, OPTIONS);
    printf("\nTasks:\n");
    for (int i = 0; i < TASKS; ++i)
        printf("  %-14s%s; %lld steps,\n                %d learning rates: the default times 10^-%d to 10^%d\n", zoo_tasks[i].name,
               zoo_tasks[i].title, (long long)zoo_tasks[i].steps, zoo_tasks[i].factors, zoo_tasks[i].decades, zoo_tasks[i].decades);
    printf("\nExamples:\n"
           "  optimizer_zoo                                     everything: minutes\n"
           "  optimizer_zoo --task quadratic --no-plots         one table: seconds\n"
           "  optimizer_zoo --only sgd,momentum,adam,l-bfgs --task rosenbrock --steps 5000 --out results/four\n\n"
           "Exit status: 0 done, 1 failure, 2 usage.\n");
}

static void take_optimizer(const char *name, const char *word, void *user)
{
    options *o = (options *)user;
    int found = 0;
    while (found < ZOO_ENTRIES && strcmp(o->entry[found].name, word) != 0) ++found;
    if (found == ZOO_ENTRIES) usage_error("--%s: no optimizer is called '%s'; --list names them", name, word);
    o->chosen[found] = true;
}

static void take_task(const char *name, const char *word, void *user)
{
    options *o = (options *)user;
    int found = 0;
    while (found < TASKS && strcmp(zoo_tasks[found].name, word) != 0) ++found;
    if (found == TASKS) usage_error("--%s: '%s' is none of quadratic, rosenbrock, classifier", name, word);
    o->task[found] = true;
}

static void parse_options(options *o, const zoo_entry *entry, char **argv)
{
    memset(o, 0, sizeof *o);
    o->entry = entry;
    o->plots = o->progress = true;
    o->task_text = "quadratic,rosenbrock,classifier";
    o->data = "data";
    o->out = "results/zoo";
    o->seed = 1;
    o->jobs = dot_context_defaults().threads;
    cli_parse(option_table, OPTIONS, o, argv, NULL);
    cli_list("task", o->task_text, o, take_task);
    if (o->only) cli_list("only", o->only, o, take_optimizer);
    else for (int i = 0; i < ZOO_ENTRIES; ++i) o->chosen[i] = true;
    o->slow |= o->only != NULL;
}

static void print_list(const zoo_entry *entry)
{
    printf("Optimizers:\n");
    for (int i = 0; i < ZOO_ENTRIES; ++i) printf("  %-20s %s (%s)\n", entry[i].name, entry[i].description, entry[i].source);
    printf("\nSchedules:\n");
    for (int i = 0; i < DOT_SCHEDULE_KINDS; ++i) {
        const dot_schedule_kind kind = (dot_schedule_kind)i;
        printf("  %-20s %s (%s)\n", dot_schedule_name(kind), dot_schedule_description(kind), dot_schedule_source(kind));
    }
}

/* ---- workers and progress ----------------------------------------------- */

typedef struct { int entry; zoo_task_id id; } work;

typedef struct {
    const options *o;
    zoo_settings settings;
    zoo_entry entry[ZOO_ENTRIES];
    zoo_result result[TASKS][ZOO_ENTRIES];
    work todo[TASKS * ZOO_ENTRIES];
    int count, next, finished, workers;
    int64_t steps, all_steps;       /* of single runs */
    double start;
    char error[512];
    pthread_mutex_t mutex;          /* of the above */
    pthread_cond_t ended;
} zoo;

static bool worker_tick(void *user, int64_t steps)
{
    zoo *all = (zoo *)user;
    pthread_mutex_lock(&all->mutex);
    all->steps += steps;
    const bool go_on = !*all->error;
    pthread_mutex_unlock(&all->mutex);
    return go_on;
}

static void *worker_main(void *user)
{
    zoo *all = (zoo *)user;
    pthread_mutex_lock(&all->mutex);
    while (all->next < all->count && !*all->error) {
        const work w = all->todo[all->next++];
        char error[sizeof all->error] = "";
        pthread_mutex_unlock(&all->mutex);
        const bool good = zoo_search(&all->settings, &all->entry[w.entry], w.id, &all->result[w.id][w.entry], worker_tick, all,
                                     error, sizeof error);
        pthread_mutex_lock(&all->mutex);
        if (!good && !*all->error) snprintf(all->error, sizeof all->error, "%s", error);
        ++all->finished;
    }
    --all->workers;
    pthread_cond_signal(&all->ended);
    pthread_mutex_unlock(&all->mutex);
    return NULL;
}

/* The caller holds the mutex. */
static void print_progress(const zoo *all, bool live, bool end)
{
    const double elapsed = cli_seconds() - all->start;
    const double share = (double)all->steps / (double)all->all_steps;
    char text[48];
    fprintf(stderr, "%s%d of %d searches", cli_line_begin(live), all->finished, all->count);
    if (end) fprintf(stderr, " in %s", cli_duration(elapsed, text, sizeof text));
    else fprintf(stderr, ", %.0f %% of the steps", 100 * share);
    if (!end && elapsed > 2 && share > 0) fprintf(stderr, ", %s left", cli_duration(elapsed / share - elapsed, text, sizeof text));
    fputs(cli_line_end(live, end), stderr);
}

static void run_workers(zoo *all)
{
    const int jobs = all->o->jobs < all->count ? (int)all->o->jobs : all->count;
    const bool live = cli_is_terminal() && all->o->progress;
    pthread_t thread[256];
    int started = 0;
    all->start = cli_seconds();
    double last = all->start;
    pthread_mutex_lock(&all->mutex);
    for (; started < jobs; ++started) {
        if (pthread_create(&thread[started], NULL, worker_main, all) != 0) break;
        ++all->workers;
    }
    if (jobs && !started) snprintf(all->error, sizeof all->error, "no thread could be started");
    while (all->workers > 0) {
        cli_wait(&all->ended, &all->mutex);
        if (cli_seconds() - last < cli_progress_interval(live)) continue;
        print_progress(all, live, false);
        last = cli_seconds();
    }
    if (!*all->error) print_progress(all, live, true);
    pthread_mutex_unlock(&all->mutex);
    for (int i = 0; i < started; ++i) pthread_join(thread[i], NULL);
}

/* Slow rules on the classifier wait for --slow, or to be named. */
static bool left_out(const zoo *all, int entry, int id)
{
    return id == CLASSIFIER && all->entry[entry].slow && !all->o->slow;
}

/* The slow task first, and in it the slow rules, so that no worker is left alone with one at the end. */
static void make_plan(zoo *all)
{
    for (int pass = 0; pass < 2; ++pass)
        for (int id = TASKS - 1; id >= 0; --id)
            for (int i = ZOO_ENTRIES - 1; i >= 0; --i) {
                if (!all->o->chosen[i] || !all->o->task[id] || !all->entry[i].on[id] || left_out(all, i, id)) continue;
                if ((id == CLASSIFIER && !all->settings.images) || (id == CLASSIFIER && all->entry[i].slow) != (pass == 0)) continue;
                const work w = { i, (zoo_task_id)id };
                all->todo[all->count++] = w;
                all->all_steps += all->settings.steps[id] * zoo_tasks[id].factors;
            }
}

/* ---- tables ------------------------------------------------------------- */

typedef struct { const zoo_entry *entry; const zoo_result *result; double rank; } row;

/* By final loss; what counts as equal by the steps to the threshold; diverged last. */
static int compare_rows(const void *a, const void *b)
{
    const row *x = (const row *)a, *y = (const row *)b;
    const double p = isnan(x->rank) ? INFINITY : x->rank, q = isnan(y->rank) ? INFINITY : y->rank;
    if (p != q) return p < q ? -1 : 1;
    const int64_t m = x->result->reached < 0 ? INT64_MAX : x->result->reached, n = y->result->reached < 0 ? INT64_MAX : y->result->reached;
    if (m != n) return m < n ? -1 : 1;
    return strcmp(x->entry->name, y->entry->name);
}

static void print_table(const zoo *all, int id)
{
    const zoo_task *task = &zoo_tasks[id];
    row rows[ZOO_ENTRIES];
    int count = 0;
    for (int i = 0; i < ZOO_ENTRIES; ++i) {
        const zoo_result *r = &all->result[id][i];
        if (!r->ran) continue;
        const row one = { &all->entry[i], r, r->final > task->floor ? r->final : isnan(r->final) ? NAN : task->floor };
        rows[count++] = one;
    }
    if (!count) return;
    qsort(rows, (size_t)count, sizeof *rows, compare_rows);
    printf("\n%s: %s, %lld steps\n", task->name, task->title, (long long)all->settings.steps[id]);
    printf("Searched for each: %d values of the learning rate (cma-es: sigma, spsa: a), the default times 10^-%d to 10^%d, even in the\n"
           "exponent; all else as in the library's defaults%s. Best by final loss%s.\n", task->factors, task->decades, task->decades,
           id == CLASSIFIER ? "" : ", but no weight decay", id == CLASSIFIER ? "" : " (below 1e-12: equal), then by steps");
    if (id == CLASSIFIER)
        printf("Losses are those of %d images kept apart from the training set, measured every %d steps.\n", ZOO_HELD_OUT, ZOO_EVERY);
    printf("div: learning rates with which the loss ended above its first value. *: the first or last value of the search.\n\n");
    printf("%3s %-20s %10s %9s %8s %9s %9s %7s %5s %10s %9s %6s\n", "", "optimizer", "final loss", id == CLASSIFIER ? "accuracy" : "",
           "steps to", "step", "update", "state", "evals", "", "times", "div");
    printf("%3s %-20s %10s %9s %8g %9s %9s %7s %5s %10s %9s %6s\n", "", "", "", id == CLASSIFIER ? "%" : "", task->threshold, "us", "us",
           "B/param", "/step", "value", "default", "");
    for (int i = 0; i < count; ++i) {
        const zoo_result *r = rows[i].result;
        char loss[24], reached[24], accuracy[24] = "", update[24], diverged[24], bytes[24], value[24] = "any", times[24] = "-";
        snprintf(loss, sizeof loss, isnan(r->final) ? "diverged" : id == CLASSIFIER ? "%.4f" : "%.3e", r->final);
        snprintf(reached, sizeof reached, r->reached < 0 ? "-" : "%lld", (long long)r->reached);
        snprintf(update, sizeof update, isnan(r->update_us) ? "-" : "%.2f", r->update_us);
        snprintf(diverged, sizeof diverged, "%d/%d", r->diverged, r->lanes);
        if (id == CLASSIFIER && !isnan(r->final)) snprintf(accuracy, sizeof accuracy, "%.1f", 100 * r->accuracy[r->best]);
        snprintf(bytes, sizeof bytes, isnan(r->bytes) ? "-" : "%.2f", r->bytes);
        if (!r->same) {
            const bool edge = r->best == 0 || r->best == r->lanes - 1;
            snprintf(value, sizeof value, isnan(r->final) ? "-" : "%.3g", r->lr[r->best]);
            snprintf(times, sizeof times, isnan(r->final) ? "-" : "%.3g%s", zoo_factor(task, r->best), edge ? "*" : "");
        }
        printf("%3d %-20s %10s %9s %8s %9.1f %9s %7s %5.2g %10s %9s %6s\n", i + 1, rows[i].entry->name, loss, accuracy, reached,
               r->step_us, update, bytes, r->evaluations, value, times, diverged);
    }
    const char *between = "\nLeft out, a minute each (--slow): ";
    for (int i = 0; i < ZOO_ENTRIES; ++i) {
        if (!left_out(all, i, id)) continue;
        printf("%s%s", between, all->entry[i].name);
        between = ", ";
    }
    if (*between == ',') printf("\n");
}

/* ---- figures: paths and convergence -------------------------------------- */

enum { PANEL_LINES = 8, PANELS = ZOO_FAMILIES + ZOO_ENTRIES / PANEL_LINES };

typedef struct {
    zoo_panel panel[PANELS];
    plot_series series[PANELS][PANEL_LINES];
    char title[PANELS][64];
    int count;
} sheet;

/* One panel for each family, more when it has more than PANEL_LINES members. */
static void group(sheet *s, const zoo *all, int id, bool paths, const double *steps)
{
    s->count = 0;
    for (int family = 0; family < ZOO_FAMILIES; ++family) {
        int members = 0;
        for (int i = 0; i < ZOO_ENTRIES; ++i) {
            const zoo_result *r = &all->result[id][i];
            if (!r->ran || zoo_family_of(all->entry[i].name) != family || s->count == PANELS) continue;
            const int line = members++ % PANEL_LINES;
            zoo_panel *p = &s->panel[s->count];
            if (line == 0) {
                zoo_panel_defaults(p);
                snprintf(s->title[s->count], sizeof s->title[0], members > 1 ? "%s, continued" : "%s", zoo_families[family].title);
                p->title = s->title[s->count];
                p->series = s->series[s->count];
            }
            const int64_t at = r->best * r->points;
            const plot_series one = { all->entry[i].name, paths ? r->x + at : steps, paths ? r->y + at : r->curve + at, (int)r->points, 0,
                                      line < PANEL_LINES / 2 ? 1 : 2 };
            s->series[s->count][line] = one;
            p->count = line + 1;
            s->count += p->count == PANEL_LINES;
        }
        s->count += members % PANEL_LINES != 0;
    }
}

static const char *draw_paths(plot_style *style, const char *path, const zoo *all, int id)
{
    static const double quadratic[] = { 1, 4, 10, 25, 50, 100, 175, 275 };
    static const double rosenbrock[] = { 3, 20, 80, 250, 600, 1200 };
    static sheet s;
    zoo_sheet o = { NULL, "x", "y", 3, 2, 172, 128 };
    char title[200];
    snprintf(title, sizeof title, "Paths on %s: %lld steps with the best learning rate; the cross is the minimum", zoo_tasks[id].title,
             (long long)all->settings.steps[id]);
    o.title = title;
    group(&s, all, id, true, NULL);
    for (int i = 0; i < s.count; ++i) {
        zoo_panel *p = &s.panel[i];
        p->surface = id == QUADRATIC ? zoo_quadratic : zoo_rosenbrock;
        p->level = id == QUADRATIC ? quadratic : rosenbrock;
        p->levels = (int)(id == QUADRATIC ? sizeof quadratic / sizeof *quadratic : sizeof rosenbrock / sizeof *rosenbrock);
        p->goal_x = p->goal_y = id == QUADRATIC ? 0 : 1;
        p->xlo = id == QUADRATIC ? -6 : -2;
        p->xhi = id == QUADRATIC ? 6 : 2;
        p->ylo = id == QUADRATIC ? -6 : -1;
        p->yhi = id == QUADRATIC ? 6 : 3;
        p->ends = 1;
    }
    return s.count ? zoo_draw(style, path, s.panel, s.count, &o) : NULL;
}

enum { CURVE_POINTS = 50 };

/* Losses of the functions oscillate: of each fiftieth of the run the largest is drawn, below 10^-13 as 10^-13. */
static void envelope(plot_series *line, double *x, double *y, int64_t steps)
{
    const int pieces = steps < CURVE_POINTS ? (int)steps : CURVE_POINTS;
    x[0] = 0;
    y[0] = line->y[0];
    for (int piece = 1; piece <= pieces; ++piece) {
        const int64_t from = steps * (piece - 1) / pieces + 1, to = steps * piece / pieces;
        x[piece] = (double)to;
        y[piece] = 1e-13;
        for (int64_t i = from; i <= to; ++i) y[piece] = isnan(line->y[i]) ? 1e30 : fmax(y[piece], line->y[i]);
    }
    line->x = x;
    line->y = y;
    line->count = pieces + 1;
}

static const char *draw_convergence(plot_style *style, const char *path, const zoo *all, int id)
{
    static sheet s;
    static double x[PANELS][PANEL_LINES][CURVE_POINTS + 1], y[PANELS][PANEL_LINES][CURVE_POINTS + 1];
    zoo_sheet o = { NULL, "step", id == CLASSIFIER ? "loss on images kept apart" : "loss", 3, 2, 172, 118 };
    const int64_t steps = all->settings.steps[id], every = id == CLASSIFIER ? ZOO_EVERY : 1, points = (steps + every - 1) / every + 1;
    double *step = (double *)zoo_alloc((size_t)points, sizeof *step);
    char title[240];
    for (int64_t i = 0; i < points; ++i) step[i] = (double)(i * every < steps ? i * every : steps);
    snprintf(title, sizeof title, id == CLASSIFIER ? "%s: loss with the best learning rate"
             : "%s: loss with the best learning rate, the largest in each fiftieth of the run", zoo_tasks[id].title);
    o.title = title;
    group(&s, all, id, false, step);
    for (int i = 0; i < s.count; ++i) {
        s.panel[i].log_y = 1;
        s.panel[i].ylo = id == CLASSIFIER ? 0.35 : 1e-12;
        s.panel[i].yhi = id == CLASSIFIER ? 3 : 1e3;
        s.panel[i].xlo = 0;
        s.panel[i].xhi = (double)steps;
        for (int k = 0; k < s.panel[i].count && id != CLASSIFIER; ++k) envelope(&s.series[i][k], x[i][k], y[i][k], steps);
    }
    const char *error = s.count ? zoo_draw(style, path, s.panel, s.count, &o) : NULL;
    free(step);
    return error;
}

/* ---- figures: schedules -------------------------------------------------- */

enum { SCHEDULE_STEPS = 200 };

/* A plain example of each kind over SCHEDULE_STEPS steps. */
static dot_schedule example_schedule(dot_schedule_kind kind, const dot_schedule *parts)
{
    static const int64_t drops[] = { 60, 120, 160 }, boundary[] = { 80 };
    enum { T = SCHEDULE_STEPS };
    const dot_schedule *pair[] = { &parts[0], &parts[1] };
    switch (kind) {
    case DOT_SCHEDULE_CONSTANT: return dot_schedule_constant();
    case DOT_SCHEDULE_STEP: return dot_schedule_step(50, 0.5);
    case DOT_SCHEDULE_STEP_DROP: return dot_schedule_step_drop(drops, 3, 0.4);
    case DOT_SCHEDULE_EXPONENTIAL: return dot_schedule_exponential(0.98);
    case DOT_SCHEDULE_RANGE_TEST: return dot_schedule_range_test(T, 1e-2, 1);
    case DOT_SCHEDULE_FACTOR: return dot_schedule_constant_factor(50, 0.3);
    case DOT_SCHEDULE_LINEAR: return dot_schedule_linear(T, 1, 0.1);
    case DOT_SCHEDULE_POLYNOMIAL: return dot_schedule_polynomial(T, 2, 0);
    case DOT_SCHEDULE_COSINE: return dot_schedule_cosine(T, 0);
    case DOT_SCHEDULE_WARM_RESTARTS: return dot_schedule_warm_restarts(28, 2, 0);
    case DOT_SCHEDULE_WARMUP_LINEAR: return dot_schedule_warmup_linear(T, 30, 0);
    case DOT_SCHEDULE_WARMUP_COSINE: return dot_schedule_warmup_cosine(T, 30, 0);
    case DOT_SCHEDULE_WARMUP_SQRT: return dot_schedule_warmup_inverse_sqrt(30, 30);
    case DOT_SCHEDULE_NOAM: return dot_schedule_noam(30, 64);
    case DOT_SCHEDULE_ONE_CYCLE: return dot_schedule_one_cycle(T);
    case DOT_SCHEDULE_CYCLIC: return dot_schedule_cyclic(25, 25, 0.1);
    case DOT_SCHEDULE_WARMUP_STABLE: return dot_schedule_warmup_stable_decay(T, 20, 60, DOT_SLOPE_SQRT);
    case DOT_SCHEDULE_REX: return dot_schedule_rex(T, 0);
    case DOT_SCHEDULE_TANH: return dot_schedule_tanh(T, 0);
    case DOT_SCHEDULE_SWA: return dot_schedule_swa(80, 0.2, DOT_SLOPE_COSINE);
    case DOT_SCHEDULE_SEQUENCE: return dot_schedule_sequence(pair, boundary, 2);
    case DOT_SCHEDULE_PRODUCT: return dot_schedule_product(pair, 2);
    case DOT_SCHEDULE_KINDS: break;
    }
    return dot_schedule_constant();
}

static const char *draw_schedules(plot_style *style, const char *path)
{
    enum { MORE = 3, COUNT = DOT_SCHEDULE_KINDS + MORE };
    static double step[SCHEDULE_STEPS + 1], value[COUNT][SCHEDULE_STEPS + 1];
    static zoo_panel panel[COUNT];
    static plot_series series[COUNT];
    const dot_schedule parts[2] = { dot_schedule_cyclic(20, 20, 0.4), dot_schedule_exponential(0.99) };
    dot_plateau plateau = dot_plateau_defaults();
    plateau.patience = 15;
    plateau.factor = 0.5;
    for (int i = 0; i <= SCHEDULE_STEPS; ++i) step[i] = i;
    for (int k = 0; k < COUNT; ++k) {
        const bool own = k < DOT_SCHEDULE_KINDS;
        const dot_schedule_kind kind = own ? (dot_schedule_kind)k : k == COUNT - 3 ? DOT_SCHEDULE_ONE_CYCLE : DOT_SCHEDULE_CYCLIC;
        const dot_schedule s = example_schedule(kind, parts);
        char why[256];
        if (dot_schedule_invalid(&s, why, sizeof why)) return plot_fail(style, "schedule %s: %s", dot_schedule_name(kind), why);
        for (int i = 0; i <= SCHEDULE_STEPS; ++i)
            value[k][i] = own ? dot_schedule_at(&s, i) : k == COUNT - 1 ? dot_plateau_observe(&plateau, fmax(0.3, 1 - 0.01 * i))
                          : dot_schedule_momentum(&s, i);
        const plot_series one = { NULL, step, value[k], SCHEDULE_STEPS + 1, 1, 1 };
        series[k] = one;
        zoo_panel_defaults(&panel[k]);
        panel[k].title = own ? dot_schedule_name(kind) : k == COUNT - 3 ? "one-cycle: momentum" : k == COUNT - 2 ? "cyclic: momentum"
                         : "plateau";
        panel[k].series = &series[k];
        panel[k].count = 1;
        panel[k].ylo = own || k == COUNT - 1 ? 0 : 0.75;
        panel[k].yhi = own || k == COUNT - 1 ? 1.1 : 1;
        if (kind == DOT_SCHEDULE_NOAM) panel[k].yhi = 0.03;
    }
    const zoo_sheet o = { "Schedules: examples over 200 steps", "step", "multiplier of the learning rate; momentum", 5, 0, 104, 68 };
    return zoo_draw(style, path, panel, COUNT, &o);
}

/* ---- figures: clipping and accumulation ---------------------------------- */

enum { CLIP_STEPS = 400 };

/* SGD with momentum on Rosenbrock from far away, with gradients clipped to a norm of `most` (INFINITY: not). */
static const char *descend_clipped(plot_style *style, const zoo *all, double most, double *loss, double *before, double *after)
{
    static const double far[2] = { -3, -4 };
    zoo_run r;
    zoo_open(&r, &all->settings, NULL, ROSENBROCK, 1);
    dot_tensor_set(r.theta, 0, far, 2);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_MOMENTUM);
    o.lr = 1e-3;
    dot_optimizer *opt = dot_optimizer_create(r.ctx, r.net, &o);
    bool going = true;
    for (int i = 0; i < CLIP_STEPS; ++i) {
        loss[i] = before[i] = after[i] = NAN;
        if (!going || !dot_ok(r.ctx)) continue;
        dot_tensor *value = zoo_loss(&r);
        dot_backward(value);
        loss[i] = dot_item(value, 0);
        before[i] = isfinite(most) ? dot_clip_grad_norm(opt, most) : dot_grad_norm(opt, 0);
        after[i] = before[i] * fmin(1, most / (before[i] + 1e-6));
        dot_optimizer_step(opt, 1);
        going = isfinite(loss[i]) && loss[i] < 1e12;
    }
    const char *error = dot_ok(r.ctx) ? NULL : plot_fail(style, "clipping: %.400s", dot_error(r.ctx));
    dot_context_destroy(r.ctx);
    return error;
}

static const char *draw_clipping(plot_style *style, const char *path, const zoo *all)
{
    static double step[CLIP_STEPS], loss[2][CLIP_STEPS], before[2][CLIP_STEPS], after[2][CLIP_STEPS];
    for (int i = 0; i < CLIP_STEPS; ++i) step[i] = i;
    const char *error = descend_clipped(style, all, 10, loss[0], before[0], after[0]);
    if (!error) error = descend_clipped(style, all, INFINITY, loss[1], before[1], after[1]);
    if (error) return error;
    const plot_series norms[] = { { "before clipping", step, before[0], CLIP_STEPS, 1, 1 },
                                  { "after clipping to 10", step, after[0], CLIP_STEPS, 2, 1 },
                                  { "in a run without clipping", step, before[1], CLIP_STEPS, 5, 2 } };
    const plot_series losses[] = { { "clipped", step, loss[0], CLIP_STEPS, 2, 1 }, { "not clipped", step, loss[1], CLIP_STEPS, 5, 2 } };
    zoo_panel panel[2];
    for (int i = 0; i < 2; ++i) {
        zoo_panel_defaults(&panel[i]);
        panel[i].log_y = 1;
        panel[i].yhi = 1e12;
        panel[i].xlo = -20;         /* so that the run that leaves at once is seen */
        panel[i].xhi = CLIP_STEPS;
    }
    panel[0].title = "Norm of the gradient";
    panel[0].series = norms;
    panel[0].count = 3;
    panel[1].title = "Loss";
    panel[1].series = losses;
    panel[1].count = 2;
    const zoo_sheet o = { "Rosenbrock from (\u22123, \u22124): SGD with momentum 0.9, learning rate 10\u207b\u00b3", "step", NULL, 2, 1,
                          220, 150 };
    return zoo_draw(style, path, panel, 2, &o);
}

enum { ACCUMULATION_STEPS = 200, PARTS = 4 };

/* Adam on the classifier; each batch of 64 at once, or in `parts` parts whose gradients add up to the mean. */
static const char *train_accumulated(plot_style *style, const zoo *all, int parts, double *loss)
{
    zoo_run r;
    zoo_open(&r, &all->settings, NULL, CLASSIFIER, 1);
    const dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAM);
    dot_optimizer *opt = dot_optimizer_create(r.ctx, r.net, &o);
    const int64_t batch = ZOO_BATCH / parts;
    for (int64_t step = 0; step < ACCUMULATION_STEPS && dot_ok(r.ctx); ++step) {
        loss[step] = 0;
        for (int64_t part = step * parts; part < (step + 1) * parts; ++part) {
            dot_step_begin(r.ctx);
            dot_tensor *y = dot_forward(r.net, dot_batch(r.train, batch, part));
            dot_tensor *mean = dot_mul_scalar(dot_cross_entropy_loss(y, dot_batch_labels(r.train, batch, part), 0), 1.0 / parts);
            dot_backward(mean);
            loss[step] += dot_item(mean, 0);
        }
        dot_optimizer_step(opt, 1);
    }
    const char *error = dot_ok(r.ctx) ? NULL : plot_fail(style, "accumulation: %.400s", dot_error(r.ctx));
    dot_context_destroy(r.ctx);
    return error;
}

static const char *draw_accumulation(plot_style *style, const char *path, const zoo *all)
{
    static double step[ACCUMULATION_STEPS], loss[2][ACCUMULATION_STEPS], apart[ACCUMULATION_STEPS];
    double most = 0;
    const char *error = train_accumulated(style, all, 1, loss[0]);
    if (!error) error = train_accumulated(style, all, PARTS, loss[1]);
    if (error) return error;
    for (int i = 0; i < ACCUMULATION_STEPS; ++i) {
        step[i] = i;
        apart[i] = fabs(loss[0][i] - loss[1][i]);
        most = fmax(most, apart[i]);
        apart[i] *= 1e8;
    }
    printf("\nGradient accumulation: over %d steps of Adam the losses with batches of %d and of %d x %d differ by at most %.1e.\n",
           ACCUMULATION_STEPS, ZOO_BATCH, PARTS, ZOO_BATCH / PARTS, most);
    const plot_series losses[] = { { "batches of 64", step, loss[0], ACCUMULATION_STEPS, 6, 1 },
                                   { "4 batches of 16, gradients averaged", step, loss[1], ACCUMULATION_STEPS, 1, 3 } };
    const plot_series difference[] = { { "rounding, in 32-bit floats", step, apart, ACCUMULATION_STEPS, 1, 1 } };
    zoo_panel panel[2];
    zoo_panel_defaults(&panel[0]);
    zoo_panel_defaults(&panel[1]);
    panel[0].title = "Training loss";
    panel[0].series = losses;
    panel[0].count = 2;
    panel[1].title = "Difference of the two losses, in 10\u207b\u2078";
    panel[1].series = difference;
    panel[1].count = 1;
    panel[1].ylo = 0;
    panel[0].xlo = panel[1].xlo = 0;
    panel[0].xhi = panel[1].xhi = ACCUMULATION_STEPS;
    const zoo_sheet o = { "Gradient accumulation: Adam on Fashion-MNIST", "step", NULL, 2, 1, 220, 150 };
    return zoo_draw(style, path, panel, 2, &o);
}

/* ---- main --------------------------------------------------------------- */

static const char *draw_all(plot_style *style, const zoo *all)
{
    char path[1000];
    const char *error = NULL;
    style->font_size = 7.5;
    for (int id = 0; id < TASKS && !error; ++id) {
        if (!all->o->task[id] || (id == CLASSIFIER && !all->settings.images)) continue;
        snprintf(path, sizeof path, "%s/convergence_%s", all->o->out, zoo_tasks[id].name);
        error = draw_convergence(style, path, all, id);
        if (error || id == CLASSIFIER) continue;
        snprintf(path, sizeof path, "%s/paths_%s", all->o->out, zoo_tasks[id].name);
        error = draw_paths(style, path, all, id);
    }
    snprintf(path, sizeof path, "%s/schedules", all->o->out);
    if (!error) error = draw_schedules(style, path);
    snprintf(path, sizeof path, "%s/clipping", all->o->out);
    if (!error) error = draw_clipping(style, path, all);
    snprintf(path, sizeof path, "%s/accumulation", all->o->out);
    if (!error && all->settings.images) error = draw_accumulation(style, path, all);
    return error;
}

/* The images and labels of the training set, in memory of `ctx`; when they cannot be read the classifier is left out. */
static void load_data(zoo *all, dot_context *ctx, uint8_t **labels)
{
    char images_path[1000], labels_path[1000];
    snprintf(images_path, sizeof images_path, "%.900s/train-images-idx3-ubyte", all->o->data);
    snprintf(labels_path, sizeof labels_path, "%.900s/train-labels-idx1-ubyte", all->o->data);
    dot_dataset *dataset = dot_dataset_idx(ctx, images_path, labels_path, NULL);
    const int64_t count = dataset ? dot_dataset_count(dataset) : 0;
    if (count < ZOO_HELD_OUT + ZOO_BATCH) {
        fprintf(stderr, "optimizer_zoo: the classifier is left out: %s (tools/fetch_data.sh data gets the images)\n",
                dataset ? "too few images" : dot_error(ctx));
        return;
    }
    *labels = (uint8_t *)zoo_alloc((size_t)count, 1);
    for (int64_t i = 0; i < count; ++i) (*labels)[i] = (uint8_t)dot_dataset_label(dataset, i);
    all->settings.images = dot_dataset_record(dataset, 0);
    all->settings.labels = *labels;
    all->settings.images_count = count;
}

static int run(zoo *all)
{
    plot_style style;
    make_plan(all);
    if (!all->count) return fail("nothing to run: none of these optimizers works on these tasks");
    if (all->o->plots) {
        const char *error = plot_open(&style);
        if (!error && !cli_make_folder(all->o->out, all->error, sizeof all->error)) error = all->error;
        if (error) {
            const int status = fail(error);
            plot_close(&style);
            return status;
        }
    }
    run_workers(all);
    int status = *all->error ? fail(all->error) : 0;
    for (int i = 0; i < all->count && !status; ++i)
        zoo_time(&all->settings, &all->entry[all->todo[i].entry], all->todo[i].id, &all->result[all->todo[i].id][all->todo[i].entry]);
    for (int id = 0; id < TASKS && !status; ++id) print_table(all, id);
    fflush(stdout);
    if (!all->o->plots) return status;
    const char *error = status ? NULL : draw_all(&style, all);
    if (error) status = fail(error);
    else if (!status) printf("\nFigures: %s/*.png, *.svg\n", all->o->out);
    plot_close(&style);
    return status;
}

int main(int argc, char **argv)
{
    (void)argc;
    static zoo all;
    static options o;
    zoo_entries(all.entry);
    parse_options(&o, all.entry, argv);
    if (o.help) return print_help(), 0;
    if (o.version) return printf("optimizer_zoo, dotopt %s\n", DOTOPT_VERSION), 0;
    if (o.list) return print_list(all.entry), 0;
    all.o = &o;
    all.settings.seed = (uint64_t)o.seed;
    for (int id = 0; id < TASKS; ++id) all.settings.steps[id] = o.steps ? o.steps : zoo_tasks[id].steps;
    pthread_mutex_init(&all.mutex, NULL);
    pthread_cond_init(&all.ended, NULL);
    dot_context_options c = dot_context_defaults();
    c.threads = 1;
    uint8_t *labels = NULL;
    dot_context *data = o.task[CLASSIFIER] ? dot_context_create(&c) : NULL;
    if (data) load_data(&all, data, &labels);
    const int status = run(&all);
    for (int id = 0; id < TASKS; ++id)
        for (int i = 0; i < ZOO_ENTRIES; ++i) zoo_result_free(&all.result[id][i]);
    free(labels);
    dot_context_destroy(data);
    return status;
}
