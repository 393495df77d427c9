/*
 * fashion_sweep - trains an autoencoder on Fashion-MNIST under sixteen variants
 * of optimizer, decay and schedule, each over a grid of learning rates and
 * weight decays, and draws the heatmaps.
 *
 *     cc -O2 -I. -I/usr/include/stb examples/fashion_sweep.c -o fashion_sweep -lm -pthread
 *
 * cli.h            what the examples' command lines share
 * sweep_run.h      the variants, the networks, and a training run
 * sweep_results.h  the results folder
 * sweep_report.h   the table and the pictures
 * this file        options and presets, the workers, progress, main
 */
#define _POSIX_C_SOURCE 200809L
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

#include <signal.h>

#define CLI_PROGRAM "fashion_sweep"
#include "cli.h"
#include "sweep_report.h"

enum { EXIT_DIVERGED = 3 };

/* ---- presets ------------------------------------------------------------ */

#define ALL_LR "1/1024,1/512,1/256,1/128,1/64,1/32,1/16,1/8,1/4,1/2,1,2"
#define ALL_WD "0,1/32,1/16,1/8,1/4,1/2,1,2,4,8,16,32"

typedef struct {
    const char *name, *help;
    const char *lr, *wd;
    int64_t samples, validation, epochs, batch;     /* validation: -1: a twelfth of the samples */
    bool control;
} preset;

static const preset presets[] = {
    { "quick", "all variants on a coarse grid and a part of the data: minutes",
      "1/16,1/4,1/2,1,2", "0,1/8,1,8,32", 360, -1, 3, 16, true },
    { "cpu", "all variants on the whole grid and a part of the data: a night on two cores",
      ALL_LR, ALL_WD, 4800, -1, 10, 32, true },
    { "full", "the plan's 15 x 144 runs of 100 epochs on all 60,000 samples",
      ALL_LR, ALL_WD, 60000, 0, 100, 128, false },
};
enum { PRESETS = sizeof presets / sizeof *presets };

/* ---- options ------------------------------------------------------------ */

typedef struct {
    const char *preset, *only, *lr_text, *wd_text, *seed_text, *data, *out;
    int model, decay, decay_norm, reconstructions, map;
    int64_t samples, validation, test_samples, epochs, batch, log_every, jobs, lanes;
    bool control, resume, force, dry_run, list, quiet, progress, help, version;
    /* made from these */
    sweep_settings settings;
    const char *analyze;
    bool chosen[SWEEP_VARIANTS];
    double lr[128], wd[128], seed[128];
    int lrs, wds, seeds;
    char folder[256];
} options;

#define AT(field) offsetof(options, field)
static const cli_option option_table[] = {
    { "preset", CLI_TEXT, AT(preset), 0, 0, "NAME", "quick (default), cpu or full; the options below change it" },
    { "only", CLI_TEXT, AT(only), 0, 0, "LIST", "variants, e.g. A1,B3" },
    { "lr-mult", CLI_TEXT, AT(lr_text), 0, 0, "LIST", "learning rate multipliers, e.g. 1/4,1/2,1" },
    { "wd-mult", CLI_TEXT, AT(wd_text), 0, 0, "LIST", "weight decay multipliers, e.g. 0,1/32,1" },
    { "seed", CLI_TEXT, AT(seed_text), 0, 0, "LIST", "42; of several, the geometric mean is shown" },
    { "control", CLI_ON, AT(control), 0, 0, NULL, "add A1c, Adam + L2 with cosine schedule" },
    { "no-control", CLI_OFF, AT(control), 0, 0, NULL, "leave A1c out" },
    { "model", CLI_CHOICE, AT(model), 0, 0, "conv|mlp", "the network" },
    { "samples", CLI_COUNT, AT(samples), 2, 1000000000, "N", "training images, the validation images included" },
    { "val", CLI_COUNT, AT(validation), 0, 1000000000, "N",
      "validation images: the last of the samples (a twelfth; full: 0)" },
    { "test-samples", CLI_COUNT, AT(test_samples), 1, 1000000000, "N",
      "test images (a sixth of the samples, at most 10000)" },
    { "epochs", CLI_COUNT, AT(epochs), 1, 100000, "N", "schedules keep the proportions that they have at 100" },
    { "batch", CLI_COUNT, AT(batch), 1, 100000, "N", "images in a batch" },
    { "decay", CLI_CHOICE, AT(decay), 0, 0, "paper|torch", "decoupled decay: free of the learning rate, or times it" },
    { "decay-norm", CLI_CHOICE, AT(decay_norm), 0, 0, "paper|seed",
      "normalised decay: over sqrt(steps of the period), or\n"
      "times sqrt(batch / (batches * epochs))" },
    { "log-every", CLI_COUNT, AT(log_every), 1, 1000000000, "N",
      "steps between two measurements of the norms (an epoch)" },
    { "jobs", CLI_COUNT, AT(jobs), 1, 1024, "N", "runs at the same time (the number of cores)" },
    { "lanes", CLI_COUNT, AT(lanes), 1, 4096, "N", "runs in one context (1); changes no result" },
    { "reconstructions", CLI_CHOICE, AT(reconstructions), 0, 0, "none|center|all",
      "draw them for no run, for one a variant, for all" },
    { "cmap", CLI_CHOICE, AT(map), 0, 0, "jet|viridis|turbo", "colours of the heatmaps" },
    { "data", CLI_TEXT, AT(data), 0, 0, "DIR", "where the IDX files are (data)" },
    { "out", CLI_TEXT, AT(out), 0, 0, "DIR", "where the results go (results/PRESET)" },
    { "resume", CLI_ON, AT(resume), 0, 0, NULL, "go on with what the folder holds (default)" },
    { "no-resume", CLI_OFF, AT(resume), 0, 0, NULL, "start in an empty folder" },
    { "force", CLI_ON, AT(force), 0, 0, NULL, "with --no-resume: delete the results that it holds" },
    { "dry-run", CLI_ON, AT(dry_run), 0, 0, NULL, "print the plan and the time that it will take" },
    { "list", CLI_ON, AT(list), 0, 0, NULL, "print the runs, one a line" },
    { "no-progress", CLI_OFF, AT(progress), 0, 0, NULL, "plain lines instead of a progress line" },
    { "quiet", CLI_ON, AT(quiet), 0, 0, NULL, "neither" },
    { "help", CLI_ON, AT(help), 0, 0, NULL, "print this" },
    { "version", CLI_ON, AT(version), 0, 0, NULL, "print the version" },
};
#undef AT
enum { OPTIONS = sizeof option_table / sizeof *option_table, NOT_GIVEN = -1 };

static void print_help(void)
{
    printf("usage: fashion_sweep [OPTIONS]           run a sweep, or go on with it\n"
           "       fashion_sweep analyze DIR [--cmap ...]   table and pictures of the results in DIR\n\n"
           "Trains an autoencoder on Fashion-MNIST under many optimizers, each over a grid of\n"
           "learning rates and weight decays.\n");
    cli_print_options(option_table, OPTIONS);
    printf("\nPresets:\n");
    for (int i = 0; i < PRESETS; ++i)
        printf("  %-7s%s\n         %lld samples, %lld epochs, batches of %lld\n", presets[i].name, presets[i].help,
               (long long)presets[i].samples, (long long)presets[i].epochs, (long long)presets[i].batch);
    printf("\nVariants:\n");
    for (int i = 0; i < SWEEP_VARIANTS; ++i) printf("  %-4s %s\n", sweep_variants[i].id, sweep_variants[i].title);
    printf("\nExamples:\n"
           "  fashion_sweep                                the quick sweep\n"
           "  fashion_sweep --preset full --dry-run        how long would it take?\n"
           "  fashion_sweep --preset cpu --only A1,A1c,B3 --seed 1,2,3 --out results/three\n"
           "  fashion_sweep analyze results/quick --cmap viridis\n\n"
           "Ctrl-C ends a sweep cleanly; the same command goes on with it, and gives the same numbers\n"
           "as if it had not been interrupted. Exit status: 0 done, 1 failure, 2 usage, 3 some runs\n"
           "diverged, 130 or 143 interrupted.\n");
}

static void take_variant(const char *name, const char *id, void *user)
{
    options *o = (options *)user;
    const int v = sweep_find(id);
    if (v < 0) usage_error("--%s: no variant is called '%s'", name, id);
    o->chosen[v] = true;
}

/* A number >= 0, or a fraction such as 1/32. */
static double parse_multiplier(const char *name, const char *text)
{
    char *end;
    double value = isdigit((unsigned char)*text) ? strtod(text, &end) : NAN;
    if (!isnan(value) && *end == '/' && isdigit((unsigned char)end[1])) value /= strtod(end + 1, &end);
    if (isnan(value) || *end || !(value <= 1e9)) usage_error("--%s: '%s' is no number such as 2, 0.25 or 1/32", name, text);
    return value;
}

static void add_unique(const char *name, double *list, int *count, double value)
{
    for (int i = 0; i < *count; ++i)
        if (list[i] == value) return;
    if (*count == 128) usage_error("--%s: more than 128 values", name);
    list[(*count)++] = value;
}

static void take_lr(const char *name, const char *text, void *user)
{
    options *o = (options *)user;
    const double value = parse_multiplier(name, text);
    if (!(value > 0)) usage_error("--%s: a learning rate must be greater than 0", name);
    add_unique(name, o->lr, &o->lrs, value);
}

static void take_wd(const char *name, const char *text, void *user)
{
    options *o = (options *)user;
    add_unique(name, o->wd, &o->wds, parse_multiplier(name, text));
}

static void take_seed(const char *name, const char *text, void *user)
{
    options *o = (options *)user;
    char *end;
    const double value = isdigit((unsigned char)*text) ? (double)strtoull(text, &end, 10) : NAN;
    if (isnan(value) || *end || value > 9007199254740992.0)
        usage_error("--%s: '%s' is no whole number up to 2^53", name, text);
    add_unique(name, o->seed, &o->seeds, value);
}

static const preset *find_preset(const char *name)
{
    for (int i = 0; i < PRESETS; ++i)
        if (strcmp(presets[i].name, name) == 0) return &presets[i];
    usage_error("--preset: '%s' is none of quick, cpu, full", name);
}

/* Makes the settings from the options. */
static void resolve_settings(options *o)
{
    sweep_settings *s = &o->settings;
    s->model = (sweep_model)o->model;
    s->decay = (sweep_decay_form)o->decay;
    s->decay_norm = (sweep_decay_norm)o->decay_norm;
    s->samples = o->samples;
    s->epochs = o->epochs;
    s->batch = o->batch;
    s->validation = o->validation == NOT_GIVEN ? o->samples / 12 : o->validation;
    if (s->validation >= s->samples) usage_error("--val %lld leaves none of %lld samples to train with",
                                                 (long long)s->validation, (long long)s->samples);
    s->test_samples = o->test_samples;
    if (s->test_samples == NOT_GIVEN) {
        s->test_samples = o->samples / 6 > o->batch ? o->samples / 6 : o->batch;
        if (s->test_samples > 10000) s->test_samples = 10000;
    }
    s->log_every = o->log_every == NOT_GIVEN ? sweep_batches(s) : o->log_every;
    if (sweep_batches(s) * s->epochs > 1000000000) usage_error("more than 10^9 steps in a run");
}

static void parse_options(options *o, int argc, char **argv)
{
    memset(o, 0, sizeof *o);
    o->preset = "quick";
    if (argc > 1 && strcmp(argv[1], "analyze") == 0) {
        if (argc < 3 || argv[2][0] == '-') usage_error("analyze: which folder?");
        o->analyze = argv[2];
        argv += 2;
    }
    cli_parse(option_table, OPTIONS, o, argv, "preset");
    const preset *p = find_preset(o->preset);
    o->lr_text = p->lr;
    o->wd_text = p->wd;
    o->samples = p->samples;
    o->validation = p->validation;
    o->epochs = p->epochs;
    o->batch = p->batch;
    o->control = p->control;
    o->seed_text = "42";
    o->data = "data";
    o->test_samples = o->log_every = NOT_GIVEN;
    o->jobs = dot_context_defaults().threads;
    o->lanes = 1;
    o->reconstructions = 1;
    o->resume = o->progress = true;
    cli_parse(option_table, OPTIONS, o, argv, NULL);
    snprintf(o->folder, sizeof o->folder, "results/%s", o->preset);
    if (!o->out) o->out = o->folder;
    if (o->only) cli_list("only", o->only, o, take_variant);
    else for (int v = 0; v < SWEEP_VARIANTS; ++v) o->chosen[v] = v != SWEEP_CONTROL || o->control;
    cli_list("lr-mult", o->lr_text, o, take_lr);
    cli_list("wd-mult", o->wd_text, o, take_wd);
    cli_list("seed", o->seed_text, o, take_seed);
    o->lrs = sweep_unique(o->lr, o->lrs);
    o->wds = sweep_unique(o->wd, o->wds);
    o->seeds = sweep_unique(o->seed, o->seeds);
    resolve_settings(o);
}

/* ---- the plan ----------------------------------------------------------- */

/* Where in a sorted axis the multiplier nearest to 1 is. */
static int center_of(const double *axis, int count)
{
    int best = 0;
    for (int i = 1; i < count; ++i)
        if (fabs(axis[i] - 1) < fabs(axis[best] - 1)) best = i;
    return best;
}

/* All runs that the options ask for, in the order in which they are started. */
static void make_plan(const options *o, sweep_runs *plan)
{
    const int lr_center = center_of(o->lr, o->lrs), wd_center = center_of(o->wd, o->wds);
    for (int v = 0; v < SWEEP_VARIANTS; ++v)
        for (int seed = 0; seed < o->seeds && o->chosen[v]; ++seed)
            for (int i = 0; i < o->lrs; ++i)
                for (int k = 0; k < o->wds; ++k) {
                    sweep_run *r = sweep_run_create(v, o->lr[i], o->wd[k], (uint64_t)o->seed[seed]);
                    r->draw = o->reconstructions == 2 ||
                              (o->reconstructions == 1 && seed == 0 && i == lr_center && k == wd_center);
                    sweep_runs_add(plan, r);
                }
}

static void print_list(const sweep_runs *plan)
{
    printf("id\tname\tlr_multiplier\twd_multiplier\tlearning_rate\tweight_decay\tseed\n");
    for (int i = 0; i < plan->count; ++i) {
        const sweep_run *r = plan->run[i];
        const sweep_variant *v = &sweep_variants[r->variant];
        char lr[24], wd[24];
        printf("%s\t%s\t%s\t%s\t%.9g\t%.9g\t%llu\n", v->id, v->name, sweep_fraction(r->lr, lr, sizeof lr),
               sweep_fraction(r->decay, wd, sizeof wd), v->base_lr * r->lr, sweep_base_decay * r->decay,
               (unsigned long long)r->seed);
    }
}

/* With T_0 = 10 and T_mult = 2, restart periods do not add up to a run. */
static void warn_of_restarts(const options *o)
{
    bool any = false;
    int64_t total = o->settings.epochs * sweep_batches(&o->settings);
    dot_schedule schedule = dot_schedule_constant();
    for (int v = 0; v < SWEEP_VARIANTS; ++v) {
        if (!o->chosen[v] || sweep_variants[v].schedule != DOT_SCHEDULE_WARM_RESTARTS) continue;
        schedule = sweep_schedule(&o->settings, &sweep_variants[v]);
        any = true;
    }
    if (any && !o->quiet)
        fprintf(stderr, "fashion_sweep: warm restarts: the periods of 10, 20 and 40 %% leave 30 %% of the run; the fourth "
                "is cut off there, with the learning rate at %.0f %%\n", 100 * dot_schedule_at(&schedule, total - 1));
}

/* ---- time --------------------------------------------------------------- */

/* The clock time that many seconds from now, with the date when it is not today. */
static const char *clock_after(double seconds, char *buffer, size_t size)
{
    const time_t now = time(NULL), then = now + (time_t)seconds;
    struct tm a, b;
    localtime_r(&now, &a);
    localtime_r(&then, &b);
    strftime(buffer, size, a.tm_yday == b.tm_yday && a.tm_year == b.tm_year ? "%H:%M" : "%Y-%m-%d %H:%M", &b);
    return buffer;
}

/* One of the jobs that measure how long a step takes, all at the same time as in the sweep. */
typedef struct {
    sweep_job job;
    sweep_run *run;         /* one for each lane */
    double start, seconds;
    int64_t steps;
} stopwatch;

/* The first steps find memory; then a second's worth is measured. */
static bool stopwatch_tick(void *user, int lanes)
{
    stopwatch *w = (stopwatch *)user;
    enum { WARM_UP = 2, LEAST = 4 };
    (void)lanes;
    if (++w->steps == WARM_UP) w->start = cli_seconds();
    w->seconds = cli_seconds() - w->start;
    return w->steps < WARM_UP + LEAST || w->seconds < 1;
}

static void *stopwatch_main(void *user)
{
    stopwatch *w = (stopwatch *)user;
    sweep_train(&w->job);
    return NULL;
}

/* Seconds that one step of one run takes while all jobs are busy; 0 when the library failed. */
static double measure_step(const options *o, const sweep_data *data, const sweep_variant *v)
{
    const int jobs = (int)o->jobs, lanes = (int)o->lanes, cores = dot_context_defaults().threads;
    sweep_settings long_run = o->settings;
    long_run.epochs = 1000;
    stopwatch *watch = (stopwatch *)sweep_alloc((size_t)jobs, sizeof *watch);
    pthread_t *thread = (pthread_t *)sweep_alloc((size_t)jobs, sizeof *thread);
    int started = 0;
    double seconds = 0;
    for (int i = 0; i < jobs; ++i) {
        sweep_job *job = &watch[i].job;
        job->settings = &long_run;
        job->data = data;
        job->variant = v;
        job->lanes = lanes;
        job->threads = cores > jobs ? cores / jobs : 1;
        job->run = (sweep_run **)sweep_alloc((size_t)lanes, sizeof *job->run);
        for (int k = 0; k < lanes; ++k) job->run[k] = sweep_run_create((int)(v - sweep_variants), 0.25, 1, 1);
        job->tick = stopwatch_tick;
        job->user = &watch[i];
        if (started == i && pthread_create(&thread[i], NULL, stopwatch_main, &watch[i]) == 0) ++started;
    }
    for (int i = 0; i < started; ++i) pthread_join(thread[i], NULL);
    for (int i = 0; i < jobs; ++i) {
        const sweep_job *job = &watch[i].job;
        if (*job->error && !i) fail(job->error);
        if (i < started && watch[i].steps > 2)
            seconds += watch[i].seconds / (double)(watch[i].steps - 2) / lanes / started;
        for (int k = 0; k < lanes; ++k) sweep_run_free(job->run[k]);
        free(job->run);
    }
    free(watch);
    free(thread);
    return seconds;
}

/* Prints what the sweep would do, and an estimate of the time from a short measurement of each algorithm. */
static int dry_run(const options *o, const sweep_data *data, const sweep_runs *plan, const sweep_runs *finished)
{
    const sweep_settings *s = &o->settings;
    const double steps = (double)(sweep_batches(s) * s->epochs), trained = (double)(s->samples - s->validation);
    const double evaluated = (double)(s->test_samples + s->validation) / trained / 3;   /* forward only */
    double cost[DOT_ALGORITHMS] = {0}, total = 0;
    int left = 0;
    char text[48], when[48];
    for (int i = 0; i < plan->count; ++i) {
        const sweep_variant *v = &sweep_variants[plan->run[i]->variant];
        if (sweep_runs_find(finished, plan->run[i])) continue;
        if (cost[v->algorithm] == 0) cost[v->algorithm] = measure_step(o, data, v);
        if (cost[v->algorithm] == 0) return EXIT_RUNTIME;
        total += cost[v->algorithm] * steps * (1 + evaluated) / (double)o->jobs;
        ++left;
    }
    printf("variants       ");
    for (int v = 0; v < SWEEP_VARIANTS; ++v)
        if (o->chosen[v]) printf("%s ", sweep_variants[v].id);
    printf("\ngrid           %d learning rates x %d weight decays x %d seed%s\n", o->lrs, o->wds, o->seeds,
           o->seeds > 1 ? "s" : "");
    printf("runs           %d, of which %d are finished\n", plan->count, plan->count - left);
    printf("a run          %lld epochs of %lld steps, batches of %lld\n", (long long)s->epochs, (long long)sweep_batches(s),
           (long long)s->batch);
    printf("images         %.0f training, %lld validation, %lld test\n", trained, (long long)s->validation,
           (long long)s->test_samples);
    for (int a = 0; a < DOT_ALGORITHMS; ++a)
        if (cost[a] > 0) printf("%-14s %.1f ms a step\n", dot_algorithm_name((dot_algorithm)a), 1e3 * cost[a]);
    printf("together       %s with %lld jobs, until %s\n", cli_duration(total, text, sizeof text), (long long)o->jobs,
           clock_after(total, when, sizeof when));
    printf("folder         %s\n", o->out);
    return 0;
}

/* ---- the workers -------------------------------------------------------- */

/* The signal that asked for the end, 0: none. The second one ends the program at once. */
static volatile sig_atomic_t interrupted;

static void on_signal(int signal_number)
{
    if (interrupted) _exit(128 + signal_number);
    interrupted = signal_number;
}

typedef struct { int first, count; } task;     /* of runs in `todo`: one variant, one seed */

typedef struct {
    const options *o;
    const sweep_data *data;
    sweep_log log;
    plot_style style;
    sweep_runs todo, finished;
    task *tasks;
    int task_count, next_task, workers;
    int left[SWEEP_VARIANTS];       /* runs that are not finished */
    int64_t steps, all_steps;       /* taken, and of all of todo */
    int planned, diverged;          /* runs, those of earlier sessions included */
    const sweep_run *best;
    double start;
    char error[512];                /* the first failure: everyone stops */
    pthread_mutex_t mutex;          /* of all above; `drawing` of the style */
    pthread_mutex_t drawing;
    pthread_cond_t ended;           /* a worker ended */
} sweep;

typedef struct {
    sweep *all;
    int64_t steps;                  /* counted for the present task */
} worker;

static bool worker_tick(void *user, int lanes)
{
    worker *w = (worker *)user;
    sweep *all = w->all;
    pthread_mutex_lock(&all->mutex);
    all->steps += lanes;
    const bool go_on = !interrupted && !*all->error;
    pthread_mutex_unlock(&all->mutex);
    w->steps += lanes;
    return go_on;
}

/* Takes a finished run into the results; the caller holds the mutex. */
static void take_run(sweep *all, sweep_run *r)
{
    if (!r->diverged && (!all->best || sweep_final_test(r) < sweep_final_test(all->best))) all->best = r;
    all->diverged += r->diverged;
    sweep_runs_add(&all->finished, r);
}

/* The end of a task: each run is drawn, logged and counted. `run` entries that were taken become NULL. */
static void finish_task(worker *w, sweep_job *job)
{
    sweep *all = w->all;
    const sweep_settings *s = job->settings;
    const char *picture_error = NULL;
    for (int k = 0; k < job->lanes && !picture_error; ++k) {
        if (!job->run[k]->snapshots) continue;
        pthread_mutex_lock(&all->drawing);
        picture_error = sweep_draw_reconstructions(&all->style, all->log.folder, s, all->data, job->run[k]);
        pthread_mutex_unlock(&all->drawing);
    }
    pthread_mutex_lock(&all->mutex);
    if (picture_error && !*all->error) snprintf(all->error, sizeof all->error, "%s", picture_error);
    for (int k = 0; k < job->lanes && !*all->error; ++k) {
        if (!sweep_log_run(&all->log, s, job->run[k], all->error, sizeof all->error)) break;
        const int variant = job->run[k]->variant;
        take_run(all, job->run[k]);
        job->run[k] = NULL;
        if (--all->left[variant] == 0)
            sweep_write_variant(all->log.folder, s, all->data, variant, &all->finished, all->error, sizeof all->error);
    }
    all->steps += job->lanes * s->epochs * sweep_batches(s) - w->steps;    /* what diverged runs did not take */
    pthread_mutex_unlock(&all->mutex);
}

static void work_on(worker *w, const task *t)
{
    sweep *all = w->all;
    const int cores = dot_context_defaults().threads, jobs = (int)all->o->jobs;
    sweep_job job;
    memset(&job, 0, sizeof job);
    job.settings = &all->o->settings;
    job.data = all->data;
    job.run = &all->todo.run[t->first];
    job.lanes = t->count;
    job.variant = &sweep_variants[job.run[0]->variant];
    job.threads = cores > jobs ? cores / jobs : 1;
    job.tick = worker_tick;
    job.user = w;
    w->steps = 0;
    const sweep_outcome outcome = sweep_train(&job);
    if (outcome == SWEEP_DONE) finish_task(w, &job);
    if (outcome != SWEEP_FAILED) return;
    pthread_mutex_lock(&all->mutex);
    if (!*all->error) snprintf(all->error, sizeof all->error, "%s", job.error);
    pthread_mutex_unlock(&all->mutex);
}

static void *worker_main(void *user)
{
    worker *w = (worker *)user;
    sweep *all = w->all;
    pthread_mutex_lock(&all->mutex);
    while (all->next_task < all->task_count && !interrupted && !*all->error) {
        const task *t = &all->tasks[all->next_task++];
        pthread_mutex_unlock(&all->mutex);
        work_on(w, t);
        pthread_mutex_lock(&all->mutex);
    }
    --all->workers;
    pthread_cond_signal(&all->ended);
    pthread_mutex_unlock(&all->mutex);
    return NULL;
}

/* ---- progress ----------------------------------------------------------- */

/* How far the sweep is, or at the end how long it took. On a terminal the line is cut at the right edge, not wrapped.
   The caller holds the mutex. */
static void print_progress(const sweep *all, bool live, bool end)
{
    const double elapsed = cli_seconds() - all->start, share = (double)all->steps / (double)all->all_steps;
    const double runs = share * all->todo.count, left = share > 0 ? elapsed / share - elapsed : 0;
    char text[48], when[48], lr[24], wd[24];
    fprintf(stderr, "%s%d of %d runs", cli_line_begin(live), all->finished.count, all->planned);
    if (!end) fprintf(stderr, ", %.0f %%", 100 * share);
    if (end)
        fprintf(stderr, " in %s", cli_duration(elapsed, text, sizeof text));
    else if (elapsed > 2 && share > 0)
        fprintf(stderr, ", %.1f runs/min, %s left (%s)", 60 * runs / elapsed, cli_duration(left, text, sizeof text),
                clock_after(left, when, sizeof when));
    if (all->best)
        fprintf(stderr, ", best %.5f (%s, %s x %s)", sweep_final_test(all->best), sweep_variants[all->best->variant].id,
                sweep_fraction(all->best->lr, lr, sizeof lr), sweep_fraction(all->best->decay, wd, sizeof wd));
    fputs(cli_line_end(live, end), stderr);
}

/* Waits for all workers, and says now and then how far they are. */
static void watch_workers(sweep *all)
{
    const bool live = cli_is_terminal() && all->o->progress;
    const double interval = cli_progress_interval(live);
    double last = cli_seconds();
    bool told = false;
    pthread_mutex_lock(&all->mutex);
    while (all->workers > 0) {
        cli_wait(&all->ended, &all->mutex);
        if (interrupted && !told) {
            fprintf(stderr, "%sfashion_sweep: interrupted, finishing the present steps\n", live ? "\n" : "");
            told = true;
        }
        if (all->o->quiet || told || cli_seconds() - last < interval) continue;
        print_progress(all, live, false);
        last = cli_seconds();
    }
    if (!all->o->quiet && !told && !*all->error) print_progress(all, live, true);
    pthread_mutex_unlock(&all->mutex);
}

/* ---- a sweep ------------------------------------------------------------ */

/* Takes from the plan what is not finished, and cuts it into tasks of at most `lanes` runs of one variant and seed. */
static void make_tasks(sweep *all, sweep_runs *plan)
{
    const options *o = all->o;
    for (int i = 0; i < plan->count; ++i) {
        sweep_run *r = plan->run[i];
        if (sweep_runs_find(&all->finished, r)) {
            sweep_run_free(r);
            continue;
        }
        sweep_runs_add(&all->todo, r);
        ++all->left[r->variant];
    }
    plan->count = 0;
    all->tasks = (task *)sweep_alloc((size_t)all->todo.count, sizeof *all->tasks);
    for (int i = 0; i < all->todo.count; ++i) {
        task *last = all->task_count ? &all->tasks[all->task_count - 1] : NULL;
        const sweep_run *r = all->todo.run[i], *before = last ? all->todo.run[last->first] : NULL;
        if (last && before->variant == r->variant && before->seed == r->seed && last->count < o->lanes) ++last->count;
        else all->tasks[all->task_count++] = (task){ i, 1 };
    }
    all->planned = all->finished.count + all->todo.count;
    all->all_steps = all->todo.count * o->settings.epochs * sweep_batches(&o->settings);
}

static void run_workers(sweep *all)
{
    const int jobs = (int)all->o->jobs < all->task_count ? (int)all->o->jobs : all->task_count;
    pthread_t *thread = (pthread_t *)sweep_alloc((size_t)jobs, sizeof *thread);
    worker *workers = (worker *)sweep_alloc((size_t)jobs, sizeof *workers);
    int started = 0;
    all->start = cli_seconds();
    pthread_mutex_lock(&all->mutex);
    for (; started < jobs; ++started) {
        workers[started].all = all;
        if (pthread_create(&thread[started], NULL, worker_main, &workers[started]) != 0) break;
        ++all->workers;
    }
    if (jobs && !started) snprintf(all->error, sizeof all->error, "no thread could be started");
    pthread_mutex_unlock(&all->mutex);
    if (started) watch_workers(all);
    for (int i = 0; i < started; ++i) pthread_join(thread[i], NULL);
    free(thread);
    free(workers);
}

/* Writes the files of all variants that have a run. */
static bool write_variants(sweep *all)
{
    bool has[SWEEP_VARIANTS] = { false }, good = true;
    for (int i = 0; i < all->finished.count; ++i) has[all->finished.run[i]->variant] = true;
    for (int v = 0; v < SWEEP_VARIANTS && good; ++v)
        good = !has[v] || sweep_write_variant(all->log.folder, &all->o->settings, all->data, v, &all->finished, all->error,
                                              sizeof all->error);
    return good;
}

/* The table on stdout and the pictures in the folder. */
static const char *report_runs(plot_style *style, const char *folder, const sweep_runs *runs, int epochs, plot_colormap map)
{
    sweep_report report;
    sweep_report_create(&report, runs, epochs);
    sweep_print_table(&report);
    fflush(stdout);
    const char *error = sweep_draw(style, folder, &report, map);
    if (!error) printf("\nPictures: %s/figures; results: %s/*.json\n", folder, folder);
    sweep_report_free(&report);
    return error;
}

static bool make_folders(const char *folder, char *error, size_t size)
{
    static const char *const inner[] = { "figures", "reconstructions" };
    for (int i = 0; i < 2; ++i) {
        char path[1200];
        snprintf(path, sizeof path, "%s/%s", folder, inner[i]);
        if (!cli_make_folder(path, error, size)) return false;
    }
    return true;
}

static int say_how_to_resume(const sweep *all, char **argv)
{
    fprintf(stderr, "fashion_sweep: %d of %d runs are finished and kept in %s. To go on:\n ", all->finished.count,
            all->planned, all->log.folder);
    for (char **word = argv; *word; ++word)
        if (strcmp(*word, "--no-resume") != 0 && strcmp(*word, "--force") != 0) fprintf(stderr, " %s", *word);
    fprintf(stderr, "\n");
    return 128 + interrupted;
}

static int run_sweep(sweep *all, sweep_runs *plan, char **argv)
{
    const options *o = all->o;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sweep_runs old = {0};
    if (!sweep_log_open(&all->log, o->out, &o->settings, all->data, o->resume, o->force, &old, all->error,
                        sizeof all->error) ||
        !make_folders(o->out, all->error, sizeof all->error)) {
        sweep_runs_free(&old);
        return fail(all->error);
    }
    for (int i = 0; i < old.count; ++i) take_run(all, old.run[i]);
    free(old.run);
    make_tasks(all, plan);
    if (!o->quiet && all->finished.count)
        fprintf(stderr, "fashion_sweep: %d runs in %s are finished, %d are left\n", all->finished.count, o->out,
                all->todo.count);
    if (all->todo.count) warn_of_restarts(o);
    run_workers(all);
    if (*all->error || !write_variants(all)) return fail(all->error);
    if (interrupted) return say_how_to_resume(all, argv);
    const char *error = report_runs(&all->style, o->out, &all->finished, (int)o->settings.epochs, (plot_colormap)o->map);
    return error ? fail(error) : all->diverged ? EXIT_DIVERGED : 0;
}

static void sweep_free(sweep *all)
{
    for (int i = 0; i < all->task_count; ++i)       /* runs that were taken belong to `finished` */
        for (int k = 0; k < all->tasks[i].count; ++k) sweep_run_free(all->todo.run[all->tasks[i].first + k]);
    free(all->todo.run);
    free(all->tasks);
    sweep_runs_free(&all->finished);
    sweep_log_close(&all->log);
}

/* ---- main --------------------------------------------------------------- */

/* Draws everything anew from the variants' files alone. */
static int analyze(const char *folder, plot_colormap map)
{
    sweep_runs runs = {0};
    plot_style style;
    char message[512] = "";
    double epochs = NAN, first = NAN;
    bool good = true;
    const char *error = plot_open(&style);
    for (int v = 0; v < SWEEP_VARIANTS && good; ++v) {
        good = sweep_read_variant(folder, v, &runs, &epochs, message, sizeof message);
        if (isnan(first)) first = epochs;
        if (good && epochs != first && !isnan(epochs))
            good = sweep_say(message, sizeof message, "%s holds results of %g and of %g epochs", folder, first, epochs);
    }
    if (good && !runs.count) good = sweep_say(message, sizeof message, "no results in %s", folder);
    if (good && !(epochs >= 1 && epochs <= 1e6))
        good = sweep_say(message, sizeof message, "%s: no number of epochs", folder);
    if (good) good = make_folders(folder, message, sizeof message);
    if (good && !error) error = report_runs(&style, folder, &runs, (int)epochs, map);
    const int status = !good ? fail(message) : error ? fail(error) : 0;
    plot_close(&style);
    sweep_runs_free(&runs);
    return status;
}

static bool check_samples(const options *o, const sweep_data *data, char *error, size_t size)
{
    if (o->settings.samples > data->train_count)
        return sweep_say(error, size, "--samples %lld: the training set has %lld images", (long long)o->settings.samples,
                         (long long)data->train_count);
    if (o->settings.test_samples > data->test_count)
        return sweep_say(error, size, "--test-samples %lld: the test set has %lld images",
                         (long long)o->settings.test_samples, (long long)data->test_count);
    return true;
}

int main(int argc, char **argv)
{
    static options o;
    parse_options(&o, argc, argv);
    if (o.help) return print_help(), 0;
    if (o.version) return printf("fashion_sweep, dotopt %s\n", DOTOPT_VERSION), 0;
    if (o.analyze) return analyze(o.analyze, (plot_colormap)o.map);

    sweep_runs plan = {0};
    sweep_data data;
    sweep all;
    memset(&all, 0, sizeof all);
    all.o = &o;
    all.data = &data;
    all.log.fd = -1;
    int status = 0;
    make_plan(&o, &plan);
    if (o.list) {
        print_list(&plan);
    } else if (!sweep_data_load(&data, o.data, all.error, sizeof all.error)) {
        status = fail(all.error);
    } else {
        pthread_mutex_init(&all.mutex, NULL);
        pthread_mutex_init(&all.drawing, NULL);
        pthread_cond_init(&all.ended, NULL);
        const char *error = plot_open(&all.style);
        if (!check_samples(&o, &data, all.error, sizeof all.error)) status = EXIT_USAGE, fail(all.error);
        else if (o.dry_run) status = sweep_log_peek(o.out, &o.settings, &data, &all.finished, all.error, sizeof all.error)
                                ? dry_run(&o, &data, &plan, &all.finished) : fail(all.error);
        else status = error ? fail(error) : run_sweep(&all, &plan, argv);
        plot_close(&all.style);
        sweep_free(&all);
        sweep_data_free(&data);
    }
    sweep_runs_free(&plan);
    return status;
}
