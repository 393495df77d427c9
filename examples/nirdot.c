/*
 * nirdot - near-infrared diffuse optical tomography with a learned reconstruction, from phantoms to volumes.
 *
 *     cc -O2 -std=c99 -I. -I/usr/include/stb -o nirdot examples/nirdot.c -lm -pthread
 *
 * Light of some sources on the skin is measured by detectors; the absorption mu_a and reduced scattering mu_s' in the tissue are
 * sought. nirdot simulates phantoms and their measurements, trains an autoencoder of volumes (stage 1) and a transformer from
 * measurements to its latent space (stage 2), and evaluates the reconstruction beside classical ones.
 *
 * nirdot_physics.h   the diffusion model          nirdot_net.h       the networks
 * nirdot_data.h      phantoms and measurements    nirdot_train.h     settings and training
 * nirdot_baseline.h  homogeneous fit, Gauss-Newton   nirdot_metrics.h   scores
 * this file          the commands
 */
#define _POSIX_C_SOURCE 200809L
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"

#define CLI_PROGRAM "nirdot"
#if defined(__GNUC__)       /* not all of it is used here */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "cli.h"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#include "nirdot_train.h"
#include "nirdot_baseline.h"
#include "nirdot_metrics.h"
#include "nirdot_figures.h"

/* ---- command line --------------------------------------------------------- */

typedef struct {
    nir_settings settings;
    char run[600], data[600];           /* folders, resolved */
    const char *config;
    bool help, version;
} nir_arguments;

static const struct { const char *name, *help; } nir_commands[] = {
    { "generate",    "simulate phantoms and their measurements: data/{train,val,test}.safetensors" },
    { "stage1",      "train the autoencoder of volumes" },
    { "stage2",      "train the transformer, with the decoder of stage 1" },
    { "evaluate",    "score the reconstructions of the test phantoms beside classical ones" },
    { "reconstruct", "one measurement: volumes as NIfTI and NPY, and a figure" },
    { "ablate",      "variants of the settings over several seeds, with paired bootstrap intervals" },
    { "all",         "generate (unless the data are there), stage1, stage2, evaluate" },
};
enum { NIR_COMMANDS = sizeof nir_commands / sizeof *nir_commands };

/* Variants for ablate: settings that differ from the command line's. */
static const struct { const char *name, *words; } nir_variants[] = {
    { "base", "" },
    { "attention", "attention=2" },
    { "group-norm", "norm=group" },
    { "mean-features", "gather=mean" },
    { "latent-half", "latent=64" },
    { "adam", "optimizer=adam" },
    { "cosine", "schedule1=warmup-cosine" },
    { "mean-pooling", "pooling=mean" },
    { "distillation", "end_to_end=0" },
    { "end-to-end", "end_to_end=1" },
    { "pre-norm", "pre_norm=1" },
    { "fourier", "fourier=4" },
    { "no-surface", "surface=0" },
    { "no-fit", "fit=0 image=0" },
    { "no-image", "image=0" },
    { "no-symmetries", "symmetries=0" },
    { "noise-high", "noise=high" },
    { "raw", "residual=0" },
};
enum { NIR_VARIANTS = sizeof nir_variants / sizeof *nir_variants };

static void print_help(void)
{
    nir_settings s;
    char text[512], left[64];
    nir_settings_defaults(&s, NIR_SMALL, NIR_V2);
    printf("usage: nirdot COMMAND [OPTIONS]\n\nCommands:\n");
    for (int i = 0; i < NIR_COMMANDS; ++i) printf("  %-12s %s\n", nir_commands[i].name, nir_commands[i].help);
    printf("\n  --config FILE                      settings from a JSON file (every run saves one); options override it\n"
           "  --help, --version\n");
    for (int i = 0; i < NIR_SETTING_COUNT; ++i) {
        const nir_setting *row = &nir_setting_table[i];
        if (row->kind == NIR_SET_HEAD) {
            printf("\n%s:\n", row->help);
            continue;
        }
        snprintf(left, sizeof left, "--%s %s", row->name, row->argument);
        for (char *c = left + 2; *c && *c != ' '; ++c)
            if (*c == '_') *c = '-';
        nir_setting_text(&s, row, text, sizeof text);
        printf("  %-34s %s%s(%s)\n", left, row->help, *row->help ? " " : "", row->kind == NIR_SET_FLAG ? *text == '1' ? "on" : "off" : text);
    }
    printf("\nOptions without a value have a --no- form. Defaults in brackets are those of --size small --recipe v2.\n\n"
           "Run folder: config.json, data/, normalisation.json, stage1/ and stage2/ (model.safetensors, state.json and the checkpoint\n"
           "it names, log.jsonl and the same for 'tensorboard --logdir' and 'wandb sync'), evaluate/ (metrics.json,\n"
           "table.txt), report.md, figures/, reconstruct/, ablate/.\n\n"
           "Variants:");
    for (int i = 0; i < NIR_VARIANTS; ++i) printf("%s%s%s%s%s", i % 4 ? "  " : "\n  ", nir_variants[i].name, *nir_variants[i].words ? " (" : "",
                                                  nir_variants[i].words, *nir_variants[i].words ? ")" : "");
    printf("\n\nExamples:\n"
           "  nirdot all                                         everything at the small size: minutes\n"
           "  nirdot all --size smoke --out /tmp/smoke           the same in seconds, to see that it works\n"
           "  nirdot stage2 --out results/a --lr2 5e-4 --ema 0.999\n"
           "  nirdot evaluate --config results/a/config.json --average 8\n"
           "  nirdot reconstruct --config results/a/config.json --index 3\n"
           "  nirdot ablate --variants base,attention,no-fit --seeds 1,2,3\n\n"
           "Ctrl-C ends training after the present step; the same command goes on, with the same bits as if it had not been\n"
           "interrupted. Exit status: 0 done, 1 failure, 2 usage, 130 or 143 interrupted.\n");
}

/* One word of the command line, and the next one where it needs a value; returns how many were taken. */
static int take_option(nir_arguments *a, const char *word, const char *next)
{
    char error[256];
    if (strcmp(word, "--help") == 0 || strcmp(word, "-h") == 0) return a->help = true, 1;
    if (strcmp(word, "--version") == 0) return a->version = true, 1;
    const bool negative = strncmp(word, "--no-", 5) == 0;
    const char *name = word + (negative ? 5 : 2), *value = next;
    const size_t length = strncmp(word, "--", 2) == 0 ? strcspn(name, "=") : 0;
    const bool joined = name[length] == '=';
    if (joined) value = name + length + 1;
    if (length == 6 && strncmp(name, "config", 6) == 0 && !negative) {
        if (!value) usage_error("--config needs a file");
        a->config = value;
        return joined ? 1 : 2;
    }
    const nir_setting *row = length ? nir_setting_find(name, length) : NULL;
    if (!row || (negative && row->kind != NIR_SET_FLAG)) usage_error("'%s' is no option", word);
    if (row->kind == NIR_SET_FLAG) {
        if (joined) usage_error("--%s takes no value", row->name);
        nir_setting_set(&a->settings, row, negative ? "0" : "1", error, sizeof error);
        return 1;
    }
    if (!value) usage_error("%s needs a value", word);
    if (!nir_setting_set(&a->settings, row, value, error, sizeof error)) usage_error("--%s", error);
    return joined ? 1 : 2;
}

static void take_options(nir_arguments *a, char **argv)
{
    for (char **word = argv; *word;) word += take_option(a, *word, word[1]);
}

/* Size and recipe are looked for first, in the file and then in the words; their defaults come before everything else. */
static void parse_arguments(nir_arguments *a, char **argv)
{
    char error[512] = "";
    json_document d;
    memset(a, 0, sizeof *a);
    nir_settings_defaults(&a->settings, NIR_SMALL, NIR_V2);
    take_options(a, argv);
    if (a->help || a->version) return;
    memset(&d, 0, sizeof d);
    if (a->config) {
        if (!nir_read_json(a->config, &d, error, sizeof error)) usage_error("--config: %s", error);
        if (!nir_settings_read(&a->settings, &d, "size", error, sizeof error) || !nir_settings_read(&a->settings, &d, "recipe", error, sizeof error))
            usage_error("%s: %s", a->config, error);
        take_options(a, argv);
    }
    nir_settings_defaults(&a->settings, a->settings.size, a->settings.recipe);
    if (a->config && !nir_settings_read(&a->settings, &d, NULL, error, sizeof error)) usage_error("%s: %s", a->config, error);
    json_release(&d);
    take_options(a, argv);
    if (a->settings.image && !a->settings.fit) usage_error("--image needs --fit: add --no-image");
    if (!*a->settings.out) snprintf(a->settings.out, sizeof a->settings.out, "results/nirdot-%s", nir_sizes[a->settings.size].name);
    snprintf(a->run, sizeof a->run, "%s", a->settings.out);
    if (*a->settings.data) snprintf(a->data, sizeof a->data, "%s", a->settings.data);
    else snprintf(a->data, sizeof a->data, "%.590s/data", a->run);
}

/* ---- what the commands share ---------------------------------------------- */

static bool save_config(const nir_arguments *a)
{
    char path[700], error[512];
    json_writer w;
    memset(&w, 0, sizeof w);
    if (!cli_make_folder(a->run, error, sizeof error)) return fail(error), false;
    nir_settings_write(&a->settings, &w);
    snprintf(path, sizeof path, "%s/config.json", a->run);
    const bool good = nir_write_file(path, w.text, w.length, error, sizeof error);
    json_free(&w);
    if (!good) fail(error);
    return good;
}

static nir_dataset *load_split(const nir_arguments *a, dot_context *ctx, nir_split split)
{
    char path[700];
    snprintf(path, sizeof path, "%s/%s.safetensors", a->data, nir_split_names[split]);
    if (access(path, F_OK) != 0) {
        fprintf(stderr, "nirdot: there is no %s: run 'nirdot generate' first, or name the folder with --data\n", path);
        return NULL;
    }
    nir_dataset *d = nir_dataset_load(ctx, path);
    if (d && d->grid.n != nir_sizes[a->settings.size].autoencoder.n) {
        fprintf(stderr, "nirdot: %s has a grid of %d voxels a side, --size %s needs %d\n", path, d->grid.n, nir_sizes[a->settings.size].name,
                nir_sizes[a->settings.size].autoencoder.n);
        nir_dataset_free(d);
        return NULL;
    }
    return d;
}

/* ---- generate ------------------------------------------------------------- */

typedef struct { const char *split; double shown, start; bool live, quiet; } generation;

static void show_generation(void *user, int64_t done, int64_t count)
{
    generation *g = (generation *)user;
    const double now = cli_seconds();
    char text[48];
    if (g->quiet || (done < count && now - g->shown < cli_progress_interval(g->live))) return;
    g->shown = now;
    fprintf(stderr, "%s%s: %lld of %lld phantoms", cli_line_begin(g->live), g->split, (long long)done, (long long)count);
    if (done < count) fprintf(stderr, ", %s left", cli_duration((now - g->start) / (double)done * (double)(count - done), text, sizeof text));
    else fprintf(stderr, ", %s", cli_duration(now - g->start, text, sizeof text));
    fputs(cli_line_end(g->live, done == count), stderr);
}

static bool data_options(const nir_settings *s, nir_data_options *o)
{
    const int64_t counts[NIR_SPLITS] = { s->phantoms, s->val_phantoms, s->test_phantoms };
    if (!nir_data_defaults(o, nir_sizes[s->size].name) || !nir_data_properties(o, nir_property_presets[s->properties].name)) return false;
    for (int i = 0; i < NIR_SPLITS; ++i)
        if (counts[i]) o->preset.count[i] = counts[i];
    if (s->probe) o->preset.probe = s->probe == 1 ? NIR_PROBE_PATCH : NIR_PROBE_SURROUND;
    o->fine = s->fine;
    o->seed = (uint64_t)s->data_seed;
    o->threads = s->threads ? (int)s->threads : dot_context_defaults().threads;
    return true;
}

static int run_generate(const nir_arguments *a)
{
    nir_data_options o;
    char path[700], error[512];
    generation g = { NULL, 0, 0, cli_is_terminal(), a->settings.quiet };
    if (!data_options(&a->settings, &o)) return EXIT_RUNTIME;
    if (!cli_make_folder(a->data, error, sizeof error)) return fail(error);
    dot_context *ctx = nir_context(&a->settings);
    bool good = ctx != NULL;
    o.progress = show_generation;
    o.user = &g;
    for (int i = 0; i < NIR_SPLITS && good; ++i) {
        g.split = nir_split_names[i];
        g.start = cli_seconds();
        nir_dataset *d = nir_dataset_generate(&o, (nir_split)i);
        snprintf(path, sizeof path, "%s/%s.safetensors", a->data, nir_split_names[i]);
        good = d && nir_dataset_save(ctx, d, path);
        nir_dataset_free(d);
    }
    dot_context_destroy(ctx);
    return good ? 0 : EXIT_RUNTIME;
}

/* ---- stage1, stage2 ------------------------------------------------------- */

/* Everything that a stage needs, and its end. */
typedef struct {
    dot_context *ctx;
    nir_dataset *train, *val;
    nir_scaling scaling;
    nir_workshop shop;
    nir_stage stage;
} training;

static void training_free(training *t)
{
    nir_stage_close(&t->stage);
    nir_predictor_free(&t->shop.predictor);
    nir_volume_batch_free(&t->shop.volume);
    nir_token_batch_free(&t->shop.tokens);
    nir_fits_free(&t->shop.train_fits);
    nir_fits_free(&t->shop.val_fits);
    nir_dataset_free(t->train);
    nir_dataset_free(t->val);
    dot_context_destroy(t->ctx);
    free(t->shop.autoencoder);
    nir_transformer_free(t->shop.transformer);
    free(t);
}

static training *training_create(const nir_arguments *a)
{
    training *t = (training *)calloc(1, sizeof *t);
    if (!t) return NULL;
    t->ctx = nir_context(&a->settings);
    t->train = load_split(a, t->ctx, NIR_TRAIN);
    t->val = t->train ? load_split(a, t->ctx, NIR_VAL) : NULL;
    t->shop.train = t->train;
    t->shop.val = t->val;
    t->shop.scaling = &t->scaling;
    t->stage.settings = &a->settings;
    t->stage.ctx = t->ctx;
    t->stage.user = &t->shop;
    const nir_autoencoder_options o = nir_autoencoder_settings(&a->settings);
    if (t->val) t->shop.autoencoder = nir_autoencoder_create(t->ctx, &o);
    if (t->shop.autoencoder) return t;
    if (t->ctx && !dot_ok(t->ctx)) fail(dot_error(t->ctx));
    training_free(t);
    return NULL;
}

static int finish_training(training *t, bool opened)
{
    const nir_outcome outcome = opened ? nir_stage_train(&t->stage) : NIR_FAILED;
    if (outcome == NIR_FAILED) fail(*t->stage.error ? t->stage.error : dot_error(t->ctx));
    training_free(t);
    return outcome == NIR_DONE ? 0 : outcome == NIR_INTERRUPTED ? 128 + nir_interrupted : EXIT_RUNTIME;
}

static int run_stage1(const nir_arguments *a)
{
    char path[700], error[512];
    training *t = training_create(a);
    if (!t) return EXIT_RUNTIME;
    if (!save_config(a)) return training_free(t), EXIT_RUNTIME;
    nir_scaling_create(t->train, a->settings.residual, &t->scaling);
    snprintf(path, sizeof path, "%s/normalisation.json", a->run);
    if (!nir_scaling_save(&t->scaling, path, error, sizeof error)) return fail(error), training_free(t), EXIT_RUNTIME;
    return finish_training(t, nir_stage1_open(&t->stage, a->run));
}

/* The autoencoder of the run, all or nothing, and the normalisation that it was trained with. */
static bool load_stage1(const nir_arguments *a, nir_scaling *c, nir_autoencoder *autoencoder, dot_context *ctx)
{
    char path[700], error[512];
    snprintf(path, sizeof path, "%s/normalisation.json", a->run);
    if (!nir_scaling_load(c, path, error, sizeof error)) return fail(error), false;
    snprintf(path, sizeof path, "%s/stage1/model.safetensors", a->run);
    if (!dot_load(autoencoder->layer, path)) return fail(dot_error(ctx)), false;
    nir_autoencoder_freeze(autoencoder, true);
    return true;
}

/* The homogeneous fits that the transformer is told of, and the normalisation with them: stage2/normalisation.json. */
static bool prepare_fits(const nir_arguments *a, training *t)
{
    char path[800], error[512];
    const int threads = dot_threads(t->ctx);
    snprintf(path, sizeof path, "%s/stage2", a->run);
    if (!cli_make_folder(path, error, sizeof error)) return fail(error), false;
    if (a->settings.fit) {
        snprintf(path, sizeof path, "%s/stage2/fits-train.safetensors", a->run);
        if (!nir_fits_make(&t->shop.train_fits, t->ctx, t->train, &a->settings, 0, threads, path))
            return nir_interrupted ? false : (fail("the homogeneous fits failed"), false);
        snprintf(path, sizeof path, "%s/stage2/fits-val.safetensors", a->run);
        if (!nir_fits_make(&t->shop.val_fits, t->ctx, t->val, &a->settings, NIR_EVAL_EPOCH, threads, path))
            return nir_interrupted ? false : (fail("the homogeneous fits failed"), false);
        nir_scaling_fits(&t->scaling, t->train, &t->shop.train_fits);
    }
    snprintf(path, sizeof path, "%s/stage2/normalisation.json", a->run);
    return nir_scaling_save(&t->scaling, path, error, sizeof error) || (fail(error), false);
}

static int run_stage2(const nir_arguments *a)
{
    training *t = training_create(a);
    if (!t) return EXIT_RUNTIME;
    const nir_transformer_options o = nir_transformer_settings(&a->settings);
    const nir_autoencoder_options image = nir_autoencoder_settings(&a->settings);
    if (!load_stage1(a, &t->scaling, t->shop.autoencoder, t->ctx) || !save_config(a) || !prepare_fits(a, t))
        return training_free(t), nir_interrupted ? 128 + nir_interrupted : EXIT_RUNTIME;
    t->shop.transformer = nir_transformer_create(t->ctx, &o, &image);
    return finish_training(t, t->shop.transformer && nir_stage2_open(&t->stage, a->run));
}

/* ---- evaluate: the methods ------------------------------------------------ */

typedef enum { METHOD_ZEROS, METHOD_MEAN, METHOD_HOMOGENEOUS, METHOD_GAUSS_NEWTON, METHOD_CEILING, METHOD_LEARNED, METHODS } method;
static const char *const method_names[METHODS] = { "zeros", "train mean", "homogeneous fit", "Gauss-Newton step", "autoencoder ceiling", "learned" };
static const char *const channel_names[2] = { "mu_a", "mu_s'" };

typedef struct {
    const nir_arguments *a;
    dot_context *ctx;
    nir_dataset *test;
    nir_scaling scaling;
    nir_autoencoder *autoencoder;
    nir_transformer *transformer;
    nir_predictor learned, ceiling;
    nir_fits fits;
    nir_fitter fitter;                  /* the homogeneous fit, which may be told to the network, and Gauss-Newton */
    float *truth, *image[METHODS], *log_amplitude, *phase, *sensitivity;
    nir_metrics *metrics[METHODS];
    bool has[METHODS];
    double seconds[METHODS];
    nir_seed_scores seed[METHODS];      /* sums */
} evaluation;

static void evaluation_free(evaluation *e)
{
    nir_predictor_free(&e->learned);
    nir_predictor_free(&e->ceiling);
    nir_dataset_free(e->test);
    dot_context_destroy(e->ctx);
    free(e->autoencoder);
    nir_transformer_free(e->transformer);
    for (int m = 0; m < METHODS; ++m) {
        free(e->image[m]);
        free(e->metrics[m]);
    }
    nir_fitter_free(&e->fitter);
    nir_fits_free(&e->fits);
    free(e->truth);
    free(e->log_amplitude);
    free(e->phase);
    free(e->sensitivity);
    memset(e, 0, sizeof *e);
}

static bool evaluation_fitter(evaluation *e)
{
    const nir_settings *s = &e->a->settings;
    nir_fitter_free(&e->fitter);
    nir_fits_free(&e->fits);
    memset(&e->fitter, 0, sizeof e->fitter);
    e->learned.fits = &e->fits;
    return nir_fits_create(&e->fits, e->test, s->image) &&
           nir_fitter_create(&e->fitter, e->test, &nir_noise_presets[s->noise], (uint64_t)s->seed, NIR_EVAL_EPOCH, &e->fits);
}

/* The networks of a run and one split of its data. */
static bool evaluation_open(evaluation *e, const nir_arguments *a)
{
    char path[700];
    const nir_autoencoder_options autoencoder = nir_autoencoder_settings(&a->settings);
    const nir_transformer_options transformer = nir_transformer_settings(&a->settings);
    memset(e, 0, sizeof *e);
    e->a = a;
    e->ctx = nir_context(&a->settings);
    e->test = e->ctx ? load_split(a, e->ctx, NIR_TEST) : NULL;
    e->autoencoder = e->test ? nir_autoencoder_create(e->ctx, &autoencoder) : NULL;
    e->transformer = e->autoencoder ? nir_transformer_create(e->ctx, &transformer, &autoencoder) : NULL;
    if (!e->transformer || !load_stage1(a, &e->scaling, e->autoencoder, e->ctx)) return false;
    char error[512];
    snprintf(path, sizeof path, "%s/stage2/normalisation.json", a->run);
    if (!nir_scaling_load(&e->scaling, path, error, sizeof error)) return fail(error), false;
    snprintf(path, sizeof path, "%s/stage2/model.safetensors", a->run);
    if (!dot_load(e->transformer->layer, path)) return fail(dot_error(e->ctx)), false;
    const size_t voxels = (size_t)nir_dataset_voxels(e->test), pairs = (size_t)e->test->pairs;
    bool good = nir_predictor_create(&e->learned, &a->settings, &e->scaling, e->ctx, e->autoencoder, e->transformer, e->test) &&
                nir_predictor_create(&e->ceiling, &a->settings, &e->scaling, e->ctx, e->autoencoder, NULL, e->test);
    for (int m = 0; m < METHODS; ++m) {
        e->image[m] = (float *)calloc(2 * voxels, sizeof(float));
        e->metrics[m] = (nir_metrics *)calloc((size_t)e->test->count, sizeof *e->metrics[m]);
        good = good && e->image[m] && e->metrics[m];
    }
    e->truth = (float *)malloc(2 * voxels * sizeof(float));
    e->log_amplitude = (float *)malloc(pairs * sizeof(float));
    e->phase = (float *)malloc(pairs * sizeof(float));
    e->sensitivity = (float *)malloc(voxels * sizeof(float));
    good = good && e->truth && e->log_amplitude && e->phase && e->sensitivity && evaluation_fitter(e);
    if (!good) fail("out of memory");
    return good;
}

/* Where a change of mu_a changes the log amplitudes: sum of |J| over the pairs, in the homogeneous tissue of the fit. */
static bool sensitivity_of(evaluation *e, const nir_data *data)
{
    nir_workspace *ws = e->fitter.baseline->image.ws;
    const size_t columns = (size_t)ws->columns, voxels = (size_t)nir_dataset_voxels(e->test);
    float *J = (float *)malloc((size_t)data->pairs * 4 * columns * sizeof *J);
    const bool good = J && nir_jacobian(ws, data->pair, data->pairs, J);
    memset(e->sensitivity, 0, voxels * sizeof(float));
    for (int p = 0; p < data->pairs && good; ++p)
        for (size_t k = 0; k < columns; ++k) {
            const int v = ws->voxel[k];
            if (v >= 0 && (size_t)v < voxels) e->sensitivity[v] += fabsf(J[(size_t)p * 4 * columns + k]);
        }
    free(J);
    return good;
}

/* The homogeneous fit. It is not counted into the time of what comes after. */
static bool evaluation_fit(evaluation *e, int64_t p, double mu[2])
{
    const nir_dataset *d = e->test;
    const int64_t voxels = nir_dataset_voxels(d);
    const double start = cli_seconds();
    if (!nir_fitter_run(&e->fitter, p, mu)) return false;
    e->seconds[METHOD_HOMOGENEOUS] += cli_seconds() - start;
    for (int64_t v = 0; v < voxels; ++v)
        for (int k = 0; k < 2; ++k) e->image[METHOD_HOMOGENEOUS][2 * v + k] = d->label[p * voxels + v] ? (float)mu[k] : 0;
    return e->has[METHOD_HOMOGENEOUS] = true;
}

/* One Gauss-Newton step; its time includes a homogeneous fit. */
static bool evaluation_gauss_newton(evaluation *e, int64_t p)
{
    const nir_dataset *d = e->test;
    const int64_t voxels = nir_dataset_voxels(d);
    nir_ellipsoid shape;
    nir_data data;
    double mu[2];
    float *channel[2] = { (float *)malloc((size_t)voxels * sizeof(float)), (float *)malloc((size_t)voxels * sizeof(float)) };
    nir_fitter_data(&e->fitter, p, &shape, &data);
    const double start = cli_seconds();
    bool good = channel[0] && channel[1] && nir_baseline_reconstruct(e->fitter.baseline, &data, mu, channel[0], channel[1]);
    e->seconds[METHOD_GAUSS_NEWTON] += cli_seconds() - start;
    for (int64_t v = 0; v < voxels && good; ++v)
        for (int k = 0; k < 2; ++k) e->image[METHOD_GAUSS_NEWTON][2 * v + k] = d->label[p * voxels + v] ? channel[k][v] : 0;
    e->has[METHOD_GAUSS_NEWTON] = good;
    good = good && sensitivity_of(e, &data);
    free(channel[0]);
    free(channel[1]);
    return good;
}

/* The images of phantom p by every method, from the same noisy measurements. */
static bool evaluation_images(evaluation *e, int64_t p)
{
    const nir_dataset *d = e->test;
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + p * voxels;
    double start = cli_seconds();
    nir_dataset_volume(d, p, e->truth);
    e->has[METHOD_ZEROS] = e->has[METHOD_MEAN] = e->has[METHOD_CEILING] = e->has[METHOD_LEARNED] = true;
    for (int64_t v = 0; v < voxels; ++v)
        for (int k = 0; k < 2; ++k) e->image[METHOD_MEAN][2 * v + k] = label[v] ? (float)e->scaling.mean[k] : 0;
    nir_noise_apply(d, p, &nir_noise_presets[e->a->settings.noise], (uint64_t)e->a->settings.seed, NIR_EVAL_EPOCH, e->log_amplitude, e->phase);
    double mu[2];
    if (!evaluation_fit(e, p, mu) || !evaluation_gauss_newton(e, p)) return fail("the classical reconstruction failed"), false;
    start = cli_seconds();
    if (!nir_predict(&e->ceiling, d, p, NIR_EVAL_EPOCH, e->image[METHOD_CEILING])) return fail(dot_error(e->ctx)), false;
    e->seconds[METHOD_CEILING] += cli_seconds() - start;
    start = cli_seconds();
    if (!nir_predict(&e->learned, d, p, NIR_EVAL_EPOCH, e->image[METHOD_LEARNED])) return fail(dot_error(e->ctx)), false;
    e->seconds[METHOD_LEARNED] += cli_seconds() - start;
    return true;
}

static bool evaluation_scores(evaluation *e, int64_t p)
{
    const nir_dataset *d = e->test;
    const nir_metric_options o = nir_metric_defaults(d->grid.n);
    const nir_case of = { d->grid.n, d->grid.h, d->label + p * nir_dataset_voxels(d), e->truth, d->ellipsoid + 15 * p,
                          e->has[METHOD_GAUSS_NEWTON] ? e->sensitivity : NULL };
    for (int m = 0; m < METHODS; ++m) {
        nir_seed_scores seed;
        if (!e->has[m]) continue;
        if (!nir_metrics_compute(&of, e->image[m], &o, &e->metrics[m][p]) || !nir_seed_compatible(&of, e->image[m], &seed)) return false;
        e->seed[m].rmse += seed.rmse / (double)d->count;
        e->seed[m].psnr += seed.psnr / (double)d->count;
        e->seed[m].ssim += seed.ssim / (double)d->count;
    }
    return true;
}

/* ---- evaluate: the table -------------------------------------------------- */

static nir_summary summary_of(const evaluation *e, int m, int channel, nir_score score)
{
    return nir_summarise_score(e->metrics[m], e->test->count, channel, score);
}

static void print_channel(FILE *out, const evaluation *e, int k)
{
    static const nir_score columns[] = { NIR_SSIM_TISSUE, NIR_DICE, NIR_CONTRAST, NIR_CNR, NIR_LOCALISATION, NIR_DETECTION, NIR_FALSE_POSITIVES };
    const double homogeneous = e->has[METHOD_HOMOGENEOUS] ? summary_of(e, METHOD_HOMOGENEOUS, k, NIR_RMSE).mean : NAN;
    fprintf(out, "%s, %lld test phantoms            RMSE in tissue, mm^-1          skill  SSIM_T   Dice    CRC    CNR  loc/mm  found  false  no-tumour false\n",
            channel_names[k], (long long)e->test->count);
    for (int m = 0; m < METHODS; ++m) {
        if (!e->has[m]) continue;
        const nir_summary rmse = summary_of(e, m, k, NIR_RMSE), none = nir_summarise_tumour_free(e->metrics[m], e->test->count, k);
        fprintf(out, "  %-20s %.3e +- %.1e, median %.3e  %+6.3f", method_names[m], rmse.mean, rmse.sd, rmse.median, nir_skill(rmse.mean, homogeneous));
        for (int i = 0; i < (int)(sizeof columns / sizeof *columns); ++i) fprintf(out, " %6.3f", summary_of(e, m, k, columns[i]).mean);
        fprintf(out, " %6.3f\n", none.mean);
    }
    fprintf(out, "\n");
}

static void print_groups(FILE *out, const evaluation *e, int k)
{
    nir_lesion_group group[NIR_GROUPS];
    fprintf(out, "%s, tumours by depth of the centre: found, localisation error mm, contrast recovery\n", channel_names[k]);
    for (int m = METHOD_GAUSS_NEWTON; m < METHODS; ++m) {
        if (!e->has[m] || !nir_lesion_groups(e->metrics[m], e->test->count, k, group)) continue;
        fprintf(out, "  %-20s", method_names[m]);
        for (int g = 0; g < NIR_GROUPS; ++g)
            if (group[g].lesions)
                fprintf(out, "  %s (%lld): %.2f %.1f %.2f", nir_group_names[g], (long long)group[g].lesions, group[g].detection, group[g].error.mean, group[g].contrast.mean);
        fprintf(out, "\n");
    }
    fprintf(out, "\n");
}

/* The learned reconstruction less the Gauss-Newton step, phantom by phantom, with 95 % intervals. */
static bool paired(const evaluation *e, int k, nir_score score, nir_interval *interval)
{
    const int64_t count = e->test->count;
    double *a = (double *)malloc(2 * (size_t)count * sizeof *a);
    bool good = a != NULL;
    for (int64_t p = 0; p < count && good; ++p) {
        a[p] = e->metrics[METHOD_LEARNED][p].score[k][score];
        a[count + p] = e->metrics[METHOD_GAUSS_NEWTON][p].score[k][score];
    }
    good = good && nir_paired_bootstrap(a, a + count, count, 10000, 0.95, 1, interval);
    free(a);
    return good;
}

static void print_paired(FILE *out, const evaluation *e)
{
    static const nir_score scores[] = { NIR_RMSE, NIR_SSIM_TISSUE, NIR_DICE, NIR_CONTRAST, NIR_LOCALISATION };
    if (!e->has[METHOD_GAUSS_NEWTON]) return;
    fprintf(out, "learned less Gauss-Newton step, mean over phantoms with its 95 %% interval (paired bootstrap, 10000 draws)\n");
    for (int k = 0; k < 2; ++k)
        for (int i = 0; i < (int)(sizeof scores / sizeof *scores); ++i) {
            nir_interval v;
            if (paired(e, k, scores[i], &v))
                fprintf(out, "  %-6s %-18s %+.3e  [%+.3e, %+.3e]  n = %lld\n", channel_names[k], nir_score_table[scores[i]].name, v.difference, v.low, v.high, (long long)v.count);
        }
    fprintf(out, "\n");
}

static void print_evaluation(FILE *out, const evaluation *e)
{
    for (int k = 0; k < 2; ++k) print_channel(out, e, k);
    for (int k = 0; k < 2; ++k) print_groups(out, e, k);
    print_paired(out, e);
    fprintf(out, "wall time for a reconstruction, ms:");
    for (int m = METHOD_HOMOGENEOUS; m < METHODS; ++m)
        if (e->has[m]) fprintf(out, "  %s %.1f", method_names[m], 1e3 * e->seconds[m] / (double)e->test->count);
    if (e->a->settings.fit) fprintf(out, " (the learned one needs the homogeneous fit before it)");
    fprintf(out, "\nseed-compatible (all voxels, both channels, L = 1; the air decides them: zeros score too): RMSE / PSNR / SSIM\n");
    for (int m = 0; m < METHODS; ++m)
        if (e->has[m]) fprintf(out, "  %-20s %.4f %.2f dB %.4f\n", method_names[m], e->seed[m].rmse, e->seed[m].psnr, e->seed[m].ssim);
}

static void put_summary(json_writer *w, const char *name, nir_summary s)
{
    json_key(w, name);
    json_open(w, '{');
    json_put_number(w, "count", (double)s.count);
    json_put_number(w, "mean", s.mean);
    json_put_number(w, "sd", s.sd);
    json_put_number(w, "median", s.median);
    json_close(w, '}');
}

/* Every score of every phantom, and their summaries. */
static void put_method(json_writer *w, const evaluation *e, int m)
{
    double *values = (double *)calloc((size_t)e->test->count, sizeof *values);
    json_key(w, method_names[m]);
    json_open(w, '{');
    json_put_number(w, "seconds", e->seconds[m] / (double)e->test->count);
    for (int k = 0; k < 2; ++k) {
        json_key(w, k ? "mu_s" : "mu_a");
        json_open(w, '{');
        for (int i = 0; i < NIR_SCORES; ++i) {
            char name[64];
            json_line(w);
            put_summary(w, nir_score_table[i].name, summary_of(e, m, k, (nir_score)i));
            snprintf(name, sizeof name, "%s_of_phantoms", nir_score_table[i].name);
            for (int64_t p = 0; p < e->test->count && values; ++p) values[p] = e->metrics[m][p].score[k][i];
            if (values) json_put_numbers(w, name, values, (int)e->test->count, 1);
        }
        json_close(w, '}');
    }
    json_close(w, '}');
    free(values);
}

static bool write_evaluation(const evaluation *e)
{
    char folder[700], path[800], error[512];
    json_writer w;
    memset(&w, 0, sizeof w);
    snprintf(folder, sizeof folder, "%s/evaluate", e->a->run);
    if (!cli_make_folder(folder, error, sizeof error)) return fail(error), false;
    json_open(&w, '{');
    for (int m = 0; m < METHODS; ++m)
        if (e->has[m]) json_line(&w), put_method(&w, e, m);
    json_close(&w, '}');
    json_append_text(&w, "\n");
    snprintf(path, sizeof path, "%s/metrics.json", folder);
    bool good = nir_write_file(path, w.text, w.length, error, sizeof error);
    json_free(&w);
    if (!good) return fail(error), false;
    snprintf(path, sizeof path, "%s/table.txt", folder);
    FILE *file = fopen(path, "w");
    if (file) print_evaluation(file, e);
    good = file && !ferror(file);
    if (file) good = fclose(file) == 0 && good;
    if (!good) fprintf(stderr, "nirdot: cannot write %s\n", path);
    return good;
}

/* ---- figures -------------------------------------------------------------- */

/* Draws go on when one fails: it is told, and the numbers are there all the same. */
typedef struct { plot_style style; bool open; char folder[700]; } figures;

static void figures_open(figures *f, const char *run, int64_t count)
{
    char error[512];
    snprintf(f->folder, sizeof f->folder, "%s/figures", run);
    f->open = false;
    if (!count) return;
    const char *wrong = plot_open(&f->style);
    f->open = !wrong && cli_make_folder(f->folder, error, sizeof error);
    if (!f->open) fprintf(stderr, "nirdot: no figures: %s\n", wrong ? wrong : error);
}

static void figures_close(figures *f)
{
    if (f->open) plot_close(&f->style);
}

static void figures_told(const char *error)
{
    if (error) fprintf(stderr, "nirdot: a figure: %s\n", error);
}

static void draw_slices(figures *f, const evaluation *e, int64_t p)
{
    char path[800], title[96];
    nir_slices_figure s;
    memset(&s, 0, sizeof s);
    snprintf(path, sizeof path, "%s/slices-%lld", f->folder, (long long)p);
    snprintf(title, sizeof title, "Test phantom %lld", (long long)p);
    s.title = title;
    s.n = e->test->grid.n;
    s.h = e->test->grid.h;
    s.label = e->test->label + p * nir_dataset_voxels(e->test);
    s.truth = e->truth;
    for (int m = METHOD_HOMOGENEOUS + 1; m < METHODS; ++m) {
        if (!e->has[m]) continue;
        s.image[s.images] = e->image[m];
        s.name[s.images++] = m == METHOD_CEILING ? "autoencoder of the truth" : method_names[m];
    }
    s.axis = 2;
    s.slice = -1;
    figures_told(nir_figure_slices(&f->style, path, &s));
}

static void draw_separation(figures *f, const evaluation *e, int64_t p)
{
    const nir_dataset *d = e->test;
    const int count = nir_dataset_pairs(d, p);
    double *v = (double *)malloc((size_t)(3 * count + 3 * NIR_REFERENCE) * sizeof *v);
    char path[800];
    nir_scaling reference = e->scaling;
    nir_separation_figure s;
    if (!v) return;
    double *line = v + 3 * count;
    int lines = 0;
    nir_reference(&reference);
    for (int i = 0; i < count; ++i) {
        v[i] = nir_dataset_separation(d, p, i);
        v[count + i] = (double)e->log_amplitude[i];
        v[2 * count + i] = (double)e->phase[i];
    }
    for (int i = 15; i < 85; ++i, ++lines) {
        line[lines] = 0.5 * (i + 1);
        line[NIR_REFERENCE + lines] = reference.reference[i][0];
        line[2 * NIR_REFERENCE + lines] = reference.reference[i][1];
    }
    memset(&s, 0, sizeof s);
    s.title = "Measurements of a test phantom";
    s.separation = v;
    s.log_amplitude = v + count;
    s.phase = v + 2 * count;
    s.count = count;
    s.line_separation = line;
    s.line_log_amplitude = line + NIR_REFERENCE;
    s.line_phase = line + 2 * NIR_REFERENCE;
    s.line_count = lines;
    s.line_name = "half space, mean properties";
    s.point_name = "phantom, with noise";
    snprintf(path, sizeof path, "%s/separation", f->folder);
    figures_told(nir_figure_separation(&f->style, path, &s));
    free(v);
}

static void draw_sensitivity(figures *f, const evaluation *e, int64_t p)
{
    const nir_dataset *d = e->test;
    char path[800];
    const nir_sensitivity_figure s = { "Sensitivity of the log amplitudes to \u03bc\u2090", d->grid.n, d->grid.h, d->label + p * nir_dataset_voxels(d),
        e->sensitivity, d->source + 3 * p * d->sources, d->detector + 3 * p * d->detectors, d->sources, d->detectors, { -1, -1, -1 } };
    snprintf(path, sizeof path, "%s/sensitivity", f->folder);
    figures_told(nir_figure_sensitivity(&f->style, path, &s));
}

/* Half of a token's attention goes to its source, half to its detector. After evaluation_images of the same phantom. */
static void draw_attention(figures *f, const evaluation *e, int64_t p)
{
    enum { MOST = NIR_ATTENTION_QUERIES };
    const nir_dataset *d = e->test;
    const nir_token_batch *b = &e->learned.tokens;
    const int optodes = d->sources + d->detectors, queries = e->transformer->options.queries;
    const float *pooling = (const float *)dot_tensor_data(e->transformer->pooling, 0);
    double *attention = (double *)calloc((size_t)(MOST * optodes), sizeof *attention);
    float *position = (float *)malloc(3 * (size_t)optodes * sizeof *position);
    uint8_t *is_source = (uint8_t *)calloc((size_t)optodes, 1);
    char path[800];
    if (attention && position && is_source && pooling && queries >= 1 && queries <= MOST) {
        memcpy(position, d->source + 3 * p * d->sources, 3 * (size_t)d->sources * sizeof *position);
        memcpy(position + 3 * d->sources, d->detector + 3 * p * d->detectors, 3 * (size_t)d->detectors * sizeof *position);
        memset(is_source, 1, (size_t)d->sources);
        for (int64_t i = 0; i < b->tokens; ++i) {
            const uint16_t *pair = d->pair + 2 * (p * d->pairs + (b->mask[i] < 0 ? 0 : b->key[i].index));
            for (int q = 0; q < queries && b->mask[i] >= 0; ++q) {
                attention[q * optodes + pair[0]] += (double)pooling[i * queries + q] / 2;
                attention[q * optodes + d->sources + pair[1]] += (double)pooling[i * queries + q] / 2;
            }
        }
        const nir_attention_figure a = { "Attention of the pooling queries", position, is_source, attention, optodes, queries, d->ellipsoid + 15 * p };
        snprintf(path, sizeof path, "%s/attention", f->folder);
        figures_told(nir_figure_attention(&f->style, path, &a));
    }
    free(attention);
    free(position);
    free(is_source);
}

/* The columns of a log: of its step records or of its epoch records. */
enum { LOG_COLUMNS = 5 };
typedef struct { double *column[LOG_COLUMNS]; int count, capacity; } log_table;

/* A record of a step that came before supersedes it and all after it. */
static bool log_add(log_table *t, const json_document *d, const json_node *values, const char *const names[LOG_COLUMNS])
{
    const double step = json_get_number(d, d->nodes, "step", NAN);
    while (t->count && t->column[0][t->count - 1] >= step) --t->count;
    if (t->count == t->capacity) {
        t->capacity = 2 * t->capacity + 256;
        for (int i = 0; i < LOG_COLUMNS; ++i) {
            double *grown = (double *)realloc(t->column[i], (size_t)t->capacity * sizeof *grown);
            if (!grown) return false;
            t->column[i] = grown;
        }
    }
    t->column[0][t->count] = step;
    for (int i = 1; i < LOG_COLUMNS; ++i) t->column[i][t->count] = json_get_number(d, values, names[i], NAN);
    ++t->count;
    return true;
}

/* A torn last line is left out. The first column is the step. */
static bool log_read(const char *path, log_table *step, log_table *epoch)
{
    static const char *const of_step[LOG_COLUMNS] = { "", "train/lr", "train/beta1", "train/grad_norm", "train/loss" };
    static const char *const of_epoch[LOG_COLUMNS] = { "", "epoch/train_loss", "epoch/val_metric", "epoch/val_rmse_mua", "epoch/number" };
    size_t length;
    char *text = nir_read_file(path, &length);
    bool good = text != NULL;
    for (char *line = text, *end; good && (end = strchr(line, '\n')) != NULL; line = end + 1) {
        json_document d;
        *end = 0;
        if (json_parse(&d, line, (size_t)(end - line))) {
            const json_node *values = json_find(&d, d.nodes, "values");
            if (values && json_find(&d, values, of_step[1])) good = log_add(step, &d, values, of_step);
            if (values && json_find(&d, values, of_epoch[1])) good = log_add(epoch, &d, values, of_epoch);
        }
        json_release(&d);
    }
    free(text);
    return good;
}

static void draw_training(figures *f, const nir_arguments *a, const char *stage)
{
    char path[800];
    log_table step, epoch;
    memset(&step, 0, sizeof step);
    memset(&epoch, 0, sizeof epoch);
    snprintf(path, sizeof path, "%s/%s/log.jsonl", a->run, stage);
    if (log_read(path, &step, &epoch) && epoch.count > 1) {
        const double steps = (step.column[0][step.count - 1] + 1) / epoch.column[4][epoch.count - 1];
        nir_learning_figure l;
        nir_gradient_figure g;
        memset(&l, 0, sizeof l);
        memset(&g, 0, sizeof g);
        l.title = g.title = stage;
        l.epoch = epoch.column[4];
        l.loss[0] = epoch.column[1];
        l.name[0] = "training loss";
        l.loss[1] = epoch.column[2];
        l.name[1] = "validation RMSE, weighted";
        l.epochs = epoch.count;
        l.losses = 2;
        l.loss_label = "loss";
        g.step = step.column[0];
        g.norm = step.column[3];
        g.count = step.count;
        g.clip = a->settings.clip;
        snprintf(path, sizeof path, "%s/gradient-%s", f->folder, stage);
        figures_told(nir_figure_gradient(&f->style, path, &g));
        for (int i = 0; i < step.count; ++i) step.column[0][i] /= steps;
        l.step_epoch = step.column[0];
        l.lr = step.column[1];
        l.beta1 = step.column[2];
        l.steps = step.count;
        snprintf(path, sizeof path, "%s/learning-%s", f->folder, stage);
        figures_told(nir_figure_learning(&f->style, path, &l));
    }
    for (int i = 0; i < LOG_COLUMNS; ++i) {
        free(step.column[i]);
        free(epoch.column[i]);
    }
}

/* A page that holds the table and the pictures. */
static bool write_report(const evaluation *e)
{
    static const char *const names[] = { "learning-stage1", "learning-stage2", "gradient-stage1", "gradient-stage2", "separation", "attention", "sensitivity" };
    char path[700], picture[800];
    snprintf(path, sizeof path, "%s/report.md", e->a->run);
    FILE *file = fopen(path, "w");
    if (!file) return fprintf(stderr, "nirdot: cannot write %s\n", path), false;
    fprintf(file, "# NIR-DOT, %s, recipe %s, seed %lld\n\n```\n", nir_sizes[e->a->settings.size].name,
            e->a->settings.recipe == NIR_V1 ? "v1" : e->a->settings.recipe == NIR_V2 ? "v2" : "repo", (long long)e->a->settings.seed);
    print_evaluation(file, e);
    fprintf(file, "```\n\n");
    for (int64_t p = 0; p < e->a->settings.figures && p < e->test->count; ++p) fprintf(file, "![Test phantom %lld](figures/slices-%lld.png)\n", (long long)p, (long long)p);
    for (int i = 0; i < (int)(sizeof names / sizeof *names); ++i) {
        snprintf(picture, sizeof picture, "%s/figures/%s.png", e->a->run, names[i]);
        if (access(picture, F_OK) == 0) fprintf(file, "![%s](figures/%s.png)\n", names[i], names[i]);
    }
    return fclose(file) == 0;
}

static int run_evaluate(const nir_arguments *a)
{
    evaluation e;
    figures f;
    bool good = evaluation_open(&e, a);
    const bool live = cli_is_terminal();
    double shown = cli_seconds();
    figures_open(&f, a->run, a->settings.figures);
    for (int64_t p = 0; good && p < e.test->count && !nir_interrupted; ++p) {
        good = evaluation_images(&e, p) && evaluation_scores(&e, p);
        if (good && f.open && p < a->settings.figures) draw_slices(&f, &e, p);
        if (good && f.open && p == 0) {
            draw_separation(&f, &e, p);
            draw_attention(&f, &e, p);
            draw_sensitivity(&f, &e, p);
        }
        if (a->settings.quiet || cli_seconds() - shown < cli_progress_interval(live)) continue;
        fprintf(stderr, "%sevaluate: %lld of %lld phantoms%s", cli_line_begin(live), (long long)p + 1, (long long)e.test->count, cli_line_end(live, false));
        shown = cli_seconds();
    }
    if (good && !nir_interrupted) {
        if (live && !a->settings.quiet) fprintf(stderr, "\r\033[K");
        print_evaluation(stdout, &e);
        for (int i = 1; i <= 2 && f.open; ++i) draw_training(&f, a, i == 1 ? "stage1" : "stage2");
        good = write_evaluation(&e) && write_report(&e);
        if (good) printf("\nReport: %s/report.md\n", a->run);
    }
    figures_close(&f);
    evaluation_free(&e);
    return nir_interrupted ? 128 + nir_interrupted : good ? 0 : EXIT_RUNTIME;
}

/* ---- reconstruct ---------------------------------------------------------- */

/* NPY 1.0, float32 [z][y][x]. */
static bool write_npy(const char *path, const float *volume, int n)
{
    char header[128];
    const size_t count = (size_t)n * (size_t)n * (size_t)n;
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\x01\x00\x76\x00", 10);
    const int length = snprintf(header + 10, sizeof header - 10, "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d, %d), }", n, n, n);
    header[10 + length] = ' ';
    header[127] = '\n';
    FILE *file = fopen(path, "wb");
    bool good = file && fwrite(header, 1, sizeof header, file) == sizeof header;
    for (size_t i = 0; i < count && good; ++i) {        /* little-endian whatever the machine is */
        uint32_t bits;
        memcpy(&bits, &volume[i], sizeof bits);
        const unsigned char bytes[4] = { (unsigned char)bits, (unsigned char)(bits >> 8), (unsigned char)(bits >> 16), (unsigned char)(bits >> 24) };
        good = fwrite(bytes, 1, 4, file) == 4;
    }
    if (file) good = fclose(file) == 0 && good;
    if (!good) fprintf(stderr, "nirdot: cannot write %s\n", path);
    return good;
}

static bool write_volumes(const char *folder, const char *name, const nir_dataset *d, const float *mu)
{
    const int64_t voxels = nir_dataset_voxels(d);
    char path[900];
    float *channel = (float *)malloc((size_t)voxels * sizeof *channel);
    bool good = channel != NULL;
    for (int k = 0; k < 2 && good; ++k) {
        nir_volume_channel(mu, voxels, k, channel);
        snprintf(path, sizeof path, "%s/%s-%s.nii", folder, name, k ? "mus" : "mua");
        good = nir_write_nifti(path, channel, d->grid.n, d->grid.h);
        snprintf(path, sizeof path, "%s/%s-%s.npy", folder, name, k ? "mus" : "mua");
        good = good && write_npy(path, channel, d->grid.n);
    }
    free(channel);
    return good;
}

static int run_reconstruct(const nir_arguments *a)
{
    evaluation e;
    char folder[700], error[512];
    const nir_settings *s = &a->settings;
    bool good = evaluation_open(&e, a);
    if (good && *s->input) {
        nir_dataset_free(e.test);
        e.test = nir_dataset_load(e.ctx, s->input);
        good = e.test && e.test->grid.n == nir_sizes[s->size].autoencoder.n;
        if (e.test && !good) fprintf(stderr, "nirdot: %s has a grid of %d voxels a side, the networks are made for %d\n", s->input,
                                     e.test->grid.n, nir_sizes[s->size].autoencoder.n);
        nir_predictor_free(&e.learned);
        free(e.phase);
        free(e.log_amplitude);
        e.log_amplitude = e.phase = NULL;
        good = good && nir_predictor_create(&e.learned, s, &e.scaling, e.ctx, e.autoencoder, e.transformer, e.test) && evaluation_fitter(&e);
    }
    if (good && s->index >= e.test->count) {
        fprintf(stderr, "nirdot: --index %lld: the file has the phantoms 0 to %lld\n", (long long)s->index, (long long)e.test->count - 1);
        good = false;
    }
    snprintf(folder, sizeof folder, "%s/reconstruct/%lld", a->run, (long long)s->index);
    if (good && !cli_make_folder(folder, error, sizeof error)) good = (fail(error), false);
    const double start = cli_seconds();
    double mu[2];
    good = good && (!s->fit || nir_fitter_run(&e.fitter, s->index, mu)) && nir_predict(&e.learned, e.test, s->index, NIR_EVAL_EPOCH, e.image[METHOD_LEARNED]);
    const double seconds = cli_seconds() - start;
    if (good) {
        double rmse[2];
        nir_dataset_volume(e.test, s->index, e.truth);
        nir_tissue_rmse(e.test, s->index, e.image[METHOD_LEARNED], rmse);
        good = write_volumes(folder, "learned", e.test, e.image[METHOD_LEARNED]) && write_volumes(folder, "truth", e.test, e.truth);
        figures f;
        figures_open(&f, a->run, s->figures);
        snprintf(f.folder, sizeof f.folder, "%s", folder);
        e.has[METHOD_LEARNED] = true;
        if (f.open) draw_slices(&f, &e, s->index);
        figures_close(&f);
        printf("phantom %lld: RMSE in tissue mu_a %.3e, mu_s' %.4f mm^-1; %.1f ms; volumes in %s\n", (long long)s->index, rmse[0], rmse[1],
               1e3 * seconds, folder);
    }
    evaluation_free(&e);
    return good ? 0 : EXIT_RUNTIME;
}

/* ---- ablate --------------------------------------------------------------- */

enum { MAX_SEEDS = 16 };
typedef struct {
    const nir_arguments *base;
    bool chosen[NIR_VARIANTS];
    int64_t seed[MAX_SEEDS];
    int seeds;
    int64_t phantoms;
    double *score[NIR_VARIANTS];        /* [channel][RMSE, Dice][phantom], mean over the seeds */
} ablation;

static void take_variant(const char *name, const char *part, void *user)
{
    ablation *b = (ablation *)user;
    for (int i = 0; i < NIR_VARIANTS; ++i)
        if (strcmp(nir_variants[i].name, part) == 0) {
            b->chosen[i] = true;
            return;
        }
    usage_error("--%s: no variant is called '%s'", name, part);
}

static void take_seed(const char *name, const char *part, void *user)
{
    ablation *b = (ablation *)user;
    if (b->seeds == MAX_SEEDS) usage_error("--%s: more than %d", name, MAX_SEEDS);
    b->seed[b->seeds++] = cli_count(name, part, 0, 1000000000000);
}

/* Whether a variant changes stage 2 alone, so that it can use the stage 1 of the base. */
static bool stage2_alone(const char *words)
{
    static const char *const names[] = { "pooling", "end_to_end", "pre_norm", "fourier", "surface", "noise", "fit", "image" };
    const size_t length = strcspn(words, "=");
    for (int i = 0; i < (int)(sizeof names / sizeof *names); ++i)
        if (strlen(names[i]) == length && memcmp(names[i], words, length) == 0) return true;
    return false;
}

static bool copy_file(const char *from_folder, const char *to_folder, const char *name)
{
    char from[900], to[900], error[512];
    size_t length;
    snprintf(from, sizeof from, "%s/%s", from_folder, name);
    snprintf(to, sizeof to, "%s/%s", to_folder, name);
    char *text = nir_read_file(from, &length);
    if (!text) return fprintf(stderr, "nirdot: cannot read %s\n", from), false;
    const bool good = nir_write_file(to, text, length, error, sizeof error);
    free(text);
    if (!good) fail(error);
    return good;
}

/* The learned reconstruction's scores on the test phantoms are added to those of its variant. */
static bool ablate_score(ablation *b, int variant, const nir_arguments *a)
{
    evaluation e;
    bool good = evaluation_open(&e, a);
    if (good) b->phantoms = e.test->count;
    if (good && !b->score[variant]) b->score[variant] = (double *)calloc(4 * (size_t)e.test->count, sizeof(double));
    for (int64_t p = 0; good && b->score[variant] && p < e.test->count; ++p) {
        const nir_metric_options o = nir_metric_defaults(e.test->grid.n);
        const nir_case of = { e.test->grid.n, e.test->grid.h, e.test->label + p * nir_dataset_voxels(e.test), e.truth, NULL, NULL };
        double mu[2];
        nir_dataset_volume(e.test, p, e.truth);
        good = (!a->settings.fit || nir_fitter_run(&e.fitter, p, mu)) && nir_predict(&e.learned, e.test, p, NIR_EVAL_EPOCH, e.image[METHOD_LEARNED]) &&
               nir_metrics_compute(&of, e.image[METHOD_LEARNED], &o, &e.metrics[METHOD_LEARNED][p]);
        for (int k = 0; k < 2 && good; ++k) {
            b->score[variant][(2 * k) * e.test->count + p] += e.metrics[METHOD_LEARNED][p].score[k][NIR_RMSE] / b->seeds;
            b->score[variant][(2 * k + 1) * e.test->count + p] += e.metrics[METHOD_LEARNED][p].score[k][NIR_DICE] / b->seeds;
        }
    }
    evaluation_free(&e);
    return good;
}

static int ablate_run(ablation *b, int variant, int seed)
{
    nir_arguments a = *b->base;
    char error[256], base[900], stage1[900];
    if (!nir_settings_words(&a.settings, nir_variants[variant].words, error, sizeof error)) return fail(error);
    a.settings.seed = b->seed[seed];
    snprintf(base, sizeof base, "%.400s/ablate/base-%lld", b->base->run, (long long)b->seed[seed]);
    snprintf(a.run, sizeof a.run, "%.400s/ablate/%s-%lld", b->base->run, nir_variants[variant].name, (long long)b->seed[seed]);
    if (!a.settings.quiet) fprintf(stderr, "nirdot: %s, seed %lld\n", nir_variants[variant].name, (long long)b->seed[seed]);
    snprintf(stage1, sizeof stage1, "%s/stage1", a.run);
    if (!cli_make_folder(stage1, error, sizeof error)) return fail(error);
    int status = 0;
    if (stage2_alone(nir_variants[variant].words) && b->chosen[0]) {
        if (!copy_file(base, a.run, "normalisation.json") || !copy_file(base, a.run, "stage1/model.safetensors")) status = EXIT_RUNTIME;
    } else {
        status = run_stage1(&a);
    }
    if (!status) status = run_stage2(&a);
    return status ? status : ablate_score(b, variant, &a) ? 0 : EXIT_RUNTIME;
}

static void print_ablation(const ablation *b)
{
    const int64_t n = b->phantoms;
    printf("%d seeds, %lld test phantoms; in brackets: less the base, with its 95 %% interval (paired bootstrap over phantoms)\n", b->seeds, (long long)n);
    for (int v = 0; v < NIR_VARIANTS; ++v) {
        if (!b->score[v]) continue;
        printf("  %-16s", nir_variants[v].name);
        for (int i = 0; i < 4; ++i) {
            const nir_summary s = nir_summarise(b->score[v] + i * n, n);
            nir_interval d;
            printf("  %s %s %.3e", channel_names[i / 2], i % 2 ? "Dice" : "RMSE", s.mean);
            if (v && b->score[0] && nir_paired_bootstrap(b->score[v] + i * n, b->score[0] + i * n, n, 10000, 0.95, 1, &d))
                printf(" (%+.2e, %+.2e to %+.2e)", d.difference, d.low, d.high);
        }
        printf("\n");
    }
}

static int run_ablate(const nir_arguments *a)
{
    ablation b;
    int status = 0;
    memset(&b, 0, sizeof b);
    b.base = a;
    if (*a->settings.variants) cli_list("variants", a->settings.variants, &b, take_variant);
    else for (int v = 0; v < NIR_VARIANTS; ++v) b.chosen[v] = true;
    cli_list("seeds", a->settings.seeds, &b, take_seed);
    for (int v = 0; v < NIR_VARIANTS; ++v)
        for (int seed = 0; seed < b.seeds && !status; ++seed)
            if (b.chosen[v]) status = ablate_run(&b, v, seed);
    if (!status) print_ablation(&b);
    for (int v = 0; v < NIR_VARIANTS; ++v) free(b.score[v]);
    return status;
}

/* ---- main ----------------------------------------------------------------- */

static int run_all(const nir_arguments *a)
{
    char path[700];
    int status = 0;
    snprintf(path, sizeof path, "%s/test.safetensors", a->data);
    if (access(path, F_OK) != 0) status = run_generate(a);
    if (!status) status = run_stage1(a);
    if (!status) status = run_stage2(a);
    if (!status) status = run_evaluate(a);
    return status;
}

int main(int argc, char **argv)
{
    static nir_arguments a;
    static int (*const run[])(const nir_arguments *) = { run_generate, run_stage1, run_stage2, run_evaluate, run_reconstruct, run_ablate, run_all };
    const char *command = argc > 1 && argv[1][0] != '-' ? argv[1] : NULL;
    int found = -1;
    for (int i = 0; i < NIR_COMMANDS && command; ++i)
        if (strcmp(nir_commands[i].name, command) == 0) found = i;
    parse_arguments(&a, argv + (argc > 0) + (command != NULL));
    if (a.help) return print_help(), 0;
    if (a.version) return printf("nirdot, dotopt %s\n", DOTOPT_VERSION), 0;
    if (!command) usage_error("a command is missing: generate, stage1, stage2, evaluate, reconstruct, ablate or all");
    if (found < 0) usage_error("'%s' is no command", command);
    nir_catch_signals();
    return run[found](&a);
}
