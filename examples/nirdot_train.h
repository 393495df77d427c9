/*
 * nirdot_train.h - how NIR-DOT is trained: settings, normalisation, augmentation, losses, the training loop and its run folder.
 *
 * A run folder (DIR, --out) holds
 *   config.json          every setting of the run; --config DIR/config.json gives it again
 *   data/                train.safetensors, val.safetensors, test.safetensors (unless --data names another folder)
 *   normalisation.json   means and deviations of the training data
 *   stage1/, stage2/     log.jsonl           the library's run log: scalars train/... of every step, epoch/... at the end of an epoch;
 *                        events.out.*, wandb/   the same for TensorBoard and Weights & Biases
 *                        model.safetensors   the weights with the best validation metric
 *                        state.json          where training stands, and the checkpoint files that belong to it
 *                        checkpoint-*.safetensors, average-*.safetensors
 *   evaluate/            metrics.json, table.txt
 *   figures/
 *
 * Training that is killed and resumed gives the same bits as training that is not: every random draw is a function of the seed, the
 * epoch and the sample, and state.json is replaced only after the files it names are on the disk.
 *
 * Include it after dotopt.h and cli.h.
 */
#ifndef NIRDOT_TRAIN_H
#define NIRDOT_TRAIN_H

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>

#include "json.h"
#include "nirdot_baseline.h"
#include "nirdot_data.h"
#include "nirdot_net.h"

#if defined(__GNUC__)       /* a program need not use all of it */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

/* ---- settings ------------------------------------------------------------ */

/* X(kind, field, default, least, greatest, argument, help). The struct, the command line (--field with - for _), --help and the JSON
   file all read this list; X(HEAD...) begins a group. What is 0 and says "of the size" comes from nir_sizes. */
#define NIR_SETTINGS(X) \
    X(HEAD,   run, "", 0, 0, "", "Run") \
    X(CHOICE, size, "small", 0, 0, "smoke|small|full", "grid, data and networks: 16^3 x 4 mm, 32^3 x 2 mm, 64^3 x 1 mm") \
    X(CHOICE, recipe, "v2", 0, 0, "v1|v2|repo", "hyperparameters of the first plan, of the second, of the original's last version") \
    X(TEXT,   out, "", 0, 0, "DIR", "run folder (results/nirdot-SIZE)") \
    X(TEXT,   data, "", 0, 0, "DIR", "folder of the data files (data in the run folder)") \
    X(COUNT,  seed, "1337", 0, 1e15, "N", "of weights, order, augmentation, dropout and noise") \
    X(COUNT,  threads, "0", 0, 256, "N", "0: as many as there are cores; changes no result") \
    X(FLAG,   resume, "1", 0, 0, "", "go on with what the folder holds; --no-resume begins again") \
    X(FLAG,   quiet, "0", 0, 0, "", "no progress") \
    X(HEAD,   data_head, "", 0, 0, "", "Data (generate)") \
    X(CHOICE, properties, "clinical", 0, 0, "clinical|seed", "ranges of the optical properties") \
    X(CHOICE, probe, "size", 0, 0, "size|patch|surround", "where optodes are; size: as the size has it") \
    X(FLAG,   fine, "0", 0, 0, "", "simulate on voxels of half the side") \
    X(COUNT,  phantoms, "0", 0, 1e7, "N", "training phantoms; 0: of the size (160, 1200, 4000)") \
    X(COUNT,  val_phantoms, "0", 0, 1e6, "N", "0: of the size") \
    X(COUNT,  test_phantoms, "0", 0, 1e6, "N", "0: of the size") \
    X(COUNT,  data_seed, "42", 0, 1e15, "N", "of the phantoms and optodes") \
    X(CHOICE, noise, "default", 0, 0, "none|low|default|high|coupled|original", "of the measurements, drawn anew in each epoch") \
    X(HEAD,   net_head, "", 0, 0, "", "Networks") \
    X(COUNT,  latent, "0", 0, 65536, "N", "0: of the size (32, 128, 256)") \
    X(CHOICE, norm, "batch", 0, 0, "batch|group", "normalisation of the autoencoder") \
    X(CHOICE, gather, "size", 0, 0, "size|mean|flatten", "the latent from the mean of the encoder's last features (full), or from all") \
    X(COUNT,  attention, "0", 0, 4, "N", "spatial attention after the N deepest encoder stages") \
    X(REAL,   dropout1, "0", 0, 0.95, "P", "of the autoencoder's pooled features") \
    X(COUNT,  width, "0", 0, 4096, "N", "of the transformer; 0: of the size (32, 96, 256)") \
    X(COUNT,  layers, "0", 0, 99, "N", "0: of the size (1, 3, 8)") \
    X(COUNT,  heads, "0", 0, 256, "N", "0: of the size (4, 4, 8)") \
    X(COUNT,  head, "0", 0, 65536, "N", "hidden width of the latent head; 0: of the size (32, 48, 128)") \
    X(CHOICE, pooling, "queries", 0, 0, "queries|mean", "4 learned queries, or the mean over tokens") \
    X(FLAG,   pre_norm, "0", 0, 0, "", "LayerNorm before attention and feed-forward, not after") \
    X(REAL,   dropout2, "0", 0, 0.95, "P", "of the transformer") \
    X(REAL,   input_dropout, "0", 0, 0.95, "P", "of its tokens' features") \
    X(FLAG,   separation, "1", 0, 0, "", "source-detector distance as a feature of a token") \
    X(COUNT,  fourier, "0", 0, 12, "N", "bands of Fourier features of the optodes' coordinates") \
    X(FLAG,   surface, "1", 0, 0, "", "tell the transformer the tissue's ellipsoid, as Gauss-Newton is told") \
    X(FLAG,   fit, "1", 0, 0, "", "tell it the homogeneous fit, and what the measurements differ from those of the fit") \
    X(FLAG,   image, "1", 0, 0, "", "and how well a change of each voxel explains what the fit leaves, as an image; needs --fit (full: off, 2 GB)") \
    X(FLAG,   residual, "1", 0, 0, "", "measurements less those of the semi-infinite homogeneous medium") \
    X(HEAD,   loss_head, "", 0, 0, "", "Losses") \
    X(REAL,   weight_mua, "2", 0, 1e6, "X", "of the RMSE of mu_a") \
    X(REAL,   weight_mus, "1", 0, 1e6, "X", "of the RMSE of mu_s'") \
    X(REAL,   tumour_weight, "1", 0, 1e6, "X", "of tumour voxels; other tissue has 1") \
    X(REAL,   ssim, "0", 0, 1e6, "X", "of 1 - SSIM") \
    X(REAL,   perceptual, "0", 0, 1e6, "X", "stage 2: of the L1 distance of the frozen encoder's features") \
    X(HEAD,   stage1_head, "", 0, 0, "", "Stage 1: AdamW, one cycle") \
    X(COUNT,  epochs1, "30", 1, 1e6, "N", "") \
    X(COUNT,  batch1, "16", 1, 65536, "N", "") \
    X(REAL,   lr1, "3e-3", 0, 1e3, "X", "the peak") \
    X(REAL,   decay1, "1e-4", 0, 1e3, "X", "weight decay, of all parameters") \
    X(REAL,   beta1_1, "0.9", 0, 0.9999, "X", "where momentum does not cycle") \
    X(REAL,   beta2_1, "0.95", 0, 0.99999, "X", "") \
    X(REAL,   pct_start, "0.2", 0.001, 0.999, "X", "part of the run before the peak") \
    X(REAL,   div, "25", 1, 1e9, "X", "peak over first learning rate") \
    X(REAL,   final_div, "1e4", 1, 1e12, "X", "first over last learning rate") \
    X(FLAG,   cycle_momentum, "1", 0, 0, "", "beta1 goes from 0.95 to 0.85 at the peak and back") \
    X(CHOICE, schedule1, "one-cycle", 0, 0, "one-cycle|warmup-cosine|constant", "") \
    X(COUNT,  patience1, "0", 0, 1e6, "N", "stop after N epochs without a better validation metric; 0: never") \
    X(HEAD,   stage2_head, "", 0, 0, "", "Stage 2: AdamW, linear warm-up and cosine") \
    X(COUNT,  epochs2, "40", 1, 1e6, "N", "") \
    X(COUNT,  batch2, "16", 1, 65536, "N", "") \
    X(REAL,   lr2, "2e-4", 0, 1e3, "X", "the peak") \
    X(REAL,   decay2, "0.01", 0, 1e3, "X", "weight decay of matrices; biases, norms and learned vectors have none") \
    X(REAL,   beta1_2, "0.9", 0, 0.9999, "X", "") \
    X(REAL,   beta2_2, "0.98", 0, 0.99999, "X", "") \
    X(REAL,   warmup, "0.1", 0, 1, "X", "part of the run") \
    X(COUNT,  warmup_steps, "0", 0, 1e9, "N", "in its place, where not 0") \
    X(REAL,   floor, "0.03", 0, 1, "X", "last over peak learning rate") \
    X(REAL,   end_to_end, "0.25", 0, 1, "X", "last part of the epochs, with the loss of the volume; before: of the latent") \
    X(COUNT,  patience2, "0", 0, 1e6, "N", "as for stage 1") \
    X(HEAD,   both_head, "", 0, 0, "", "Both stages") \
    X(CHOICE, optimizer, "adamw", 0, 0, "adamw|adam", "adam: the decay as L2") \
    X(REAL,   clip, "1", 0, 1e9, "X", "largest gradient norm; 0: no clipping") \
    X(COUNT,  accumulate, "1", 1, 4096, "N", "batches in a step") \
    X(REAL,   ema, "0", 0, 0.999999, "X", "decay of averaged weights, which are then validated and saved; 0: none") \
    X(HEAD,   augmentation_head, "", 0, 0, "", "Augmentation") \
    X(FLAG,   symmetries, "1", 0, 0, "", "the 48 symmetries of the cube, of volume and optodes together") \
    X(COUNT,  tokens, "96", 1, 65536, "N", "measurements in a training sample; each sample has its own") \
    X(COUNT,  eval_tokens, "0", 0, 65536, "N", "in an evaluation; 0: all") \
    X(CHOICE, subsample, "uniform", 0, 0, "uniform|snr|source", "which: any, rather strong ones, those of whole sources") \
    X(REAL,   token_dropout, "0.05", 0, 0.95, "P", "") \
    X(COUNT,  average, "1", 1, 48, "N", "evaluation: mean over the reconstructions from N symmetric positions") \
    X(COUNT,  figures, "4", 0, 1000, "N", "evaluation: test phantoms that are drawn; 0: no figures") \
    X(HEAD,   other_head, "", 0, 0, "", "Reconstruct, ablate") \
    X(TEXT,   input, "", 0, 0, "FILE", "reconstruct: a data file (the test split)") \
    X(COUNT,  index, "0", 0, 1e7, "N", "reconstruct: which phantom of it") \
    X(TEXT,   variants, "", 0, 0, "LIST", "ablate: names from the list below, e.g. base,attention (all)") \
    X(TEXT,   seeds, "1,2,3", 0, 0, "LIST", "ablate: of training; the data stay the same")

typedef struct nir_settings {
#define NIR_FIELD_HEAD(f)
#define NIR_FIELD_CHOICE(f) int f;
#define NIR_FIELD_COUNT(f) int64_t f;
#define NIR_FIELD_FLAG(f) bool f;
#define NIR_FIELD_REAL(f) double f;
#define NIR_FIELD_TEXT(f) char f[512];
#define NIR_FIELD(kind, field, value, low, high, argument, help) NIR_FIELD_##kind(field)
    NIR_SETTINGS(NIR_FIELD)
} nir_settings;

typedef enum { NIR_SET_HEAD, NIR_SET_CHOICE, NIR_SET_COUNT, NIR_SET_FLAG, NIR_SET_REAL, NIR_SET_TEXT } nir_setting_kind;
typedef struct {
    nir_setting_kind kind;
    const char *name, *value;
    size_t offset;
    double low, high;
    const char *argument, *help;
} nir_setting;

#define NIR_OFFSET_HEAD(f) 0
#define NIR_OFFSET_CHOICE(f) offsetof(nir_settings, f)
#define NIR_OFFSET_COUNT(f) offsetof(nir_settings, f)
#define NIR_OFFSET_FLAG(f) offsetof(nir_settings, f)
#define NIR_OFFSET_REAL(f) offsetof(nir_settings, f)
#define NIR_OFFSET_TEXT(f) offsetof(nir_settings, f)
#define NIR_ROW(kind, field, value, low, high, argument, help) \
    { NIR_SET_##kind, #field, value, NIR_OFFSET_##kind(field), low, high, argument, help },
static const nir_setting nir_setting_table[] = { NIR_SETTINGS(NIR_ROW) };
enum { NIR_SETTING_COUNT = sizeof nir_setting_table / sizeof *nir_setting_table };

enum { NIR_V1, NIR_V2, NIR_REPO };
enum { NIR_SUBSAMPLE_UNIFORM, NIR_SUBSAMPLE_SNR, NIR_SUBSAMPLE_SOURCE };

/* What a size and a recipe change, before the words of a configuration file and of the command line. */
static const char *const nir_size_words[] = {
    "epochs1=5 epochs2=5 batch1=8 batch2=8 tokens=32 lr2=1e-3 end_to_end=0.75 figures=1",
    "epochs1=20 epochs2=24 lr2=1e-3 end_to_end=0.75",
    "epochs1=50 epochs2=50 batch1=64 batch2=64 tokens=256 image=0",
};
static const char *const nir_recipe_words[] = {
    "lr1=3e-4 decay1=0.01 pct_start=0.3 decay2=0.1 warmup_steps=1000 floor=0",
    "",
    "epochs1=200 epochs2=300 lr1=2e-3 decay1=1e-3 beta2_1=0.98 pct_start=0.4 div=20 final_div=200 lr2=3e-4 patience1=50 patience2=50 "
    "ema=0.9995 dropout1=0.05 dropout2=0.05 input_dropout=0.04 end_to_end=0 weight_mua=1 separation=0 residual=0 surface=0 fit=0 image=0 "
    "symmetries=0 token_dropout=0",
};

/* Names on the command line have - for _. */
static bool nir_name_is(const char *field, const char *word, size_t length)
{
    if (strlen(field) != length) return false;
    for (size_t i = 0; i < length; ++i)
        if (field[i] != (word[i] == '-' ? '_' : word[i])) return false;
    return true;
}

static const nir_setting *nir_setting_find(const char *word, size_t length)
{
    for (int i = 0; i < NIR_SETTING_COUNT; ++i)
        if (nir_setting_table[i].kind != NIR_SET_HEAD && nir_name_is(nir_setting_table[i].name, word, length)) return &nir_setting_table[i];
    return NULL;
}

/* The index of the word in "a|b|c", or -1. */
static int nir_choice(const char *words, const char *word)
{
    const size_t length = strlen(word);
    for (int index = 0;; ++index) {
        const size_t size = strcspn(words, "|");
        if (size == length && memcmp(words, word, size) == 0) return index;
        if (!words[size]) return -1;
        words += size + 1;
    }
}

/* Sets one setting from its text; on failure `error` says what was expected. */
static bool nir_setting_set(nir_settings *s, const nir_setting *row, const char *text, char *error, size_t size)
{
    void *field = (char *)s + row->offset;
    char *end;
    const double number = strtod(text, &end);
    const bool good = *text && !*end && number >= row->low && number <= row->high;
    const int choice = row->kind == NIR_SET_CHOICE ? nir_choice(row->argument, text) : 0;
    switch (row->kind) {
    case NIR_SET_CHOICE:
        if (choice < 0) return snprintf(error, size, "%s: '%.60s' is none of %s", row->name, text, row->argument), false;
        *(int *)field = choice;
        return true;
    case NIR_SET_COUNT:
        if (!good || number != floor(number))
            return snprintf(error, size, "%s: '%.60s' is no whole number from %.0f to %.0f", row->name, text, row->low, row->high), false;
        *(int64_t *)field = (int64_t)number;
        return true;
    case NIR_SET_REAL:
        if (!good) return snprintf(error, size, "%s: '%.60s' is no number from %g to %g", row->name, text, row->low, row->high), false;
        *(double *)field = number;
        return true;
    case NIR_SET_FLAG:
        if (strcmp(text, "0") != 0 && strcmp(text, "1") != 0)
            return snprintf(error, size, "%s: '%.60s' is neither 0 nor 1", row->name, text), false;
        *(bool *)field = *text == '1';
        return true;
    case NIR_SET_TEXT:
        if (strlen(text) >= 400) return snprintf(error, size, "%s: the text is longer than 400 bytes", row->name), false;
        snprintf((char *)field, 512, "%s", text);
        return true;
    default: return false;
    }
}

/* The text of a setting, for the JSON file and for --help. */
static const char *nir_setting_text(const nir_settings *s, const nir_setting *row, char *buffer, size_t size)
{
    const void *field = (const char *)s + row->offset;
    const char *word = row->argument;
    switch (row->kind) {
    case NIR_SET_CHOICE:
        for (int i = *(const int *)field; i > 0; --i) word += strcspn(word, "|") + 1;
        snprintf(buffer, size, "%.*s", (int)strcspn(word, "|"), word);
        break;
    case NIR_SET_COUNT: snprintf(buffer, size, "%lld", (long long)*(const int64_t *)field); break;
    case NIR_SET_REAL:                              /* the fewest digits that read back as the number */
        for (int digits = 1; digits <= 17; ++digits) {
            snprintf(buffer, size, "%.*g", digits, *(const double *)field);
            if (strtod(buffer, NULL) == *(const double *)field) break;
        }
        break;
    case NIR_SET_FLAG: snprintf(buffer, size, "%d", *(const bool *)field); break;
    default: snprintf(buffer, size, "%s", (const char *)field);
    }
    return buffer;
}

/* "a=1 b=2" */
static bool nir_settings_words(nir_settings *s, const char *words, char *error, size_t size)
{
    char word[128];
    for (const char *at = words; *at; at += strspn(at, " ")) {
        const size_t length = strcspn(at, " "), name = strcspn(at, "= ");
        const nir_setting *row = nir_setting_find(at, name);
        if (length >= sizeof word || name >= length || !row)
            return snprintf(error, size, "'%.*s' is no setting=value", (int)(length < 60 ? length : 60), at), false;
        snprintf(word, sizeof word, "%.*s", (int)(length - name - 1), at + name + 1);
        if (!nir_setting_set(s, row, word, error, size)) return false;
        at += length;
    }
    return true;
}

/* The defaults of a size and a recipe. */
static void nir_settings_defaults(nir_settings *s, int size, int recipe)
{
    char error[256] = "";
    memset(s, 0, sizeof *s);
    for (int i = 0; i < NIR_SETTING_COUNT; ++i)
        if (nir_setting_table[i].kind != NIR_SET_HEAD) nir_setting_set(s, &nir_setting_table[i], nir_setting_table[i].value, error, sizeof error);
    nir_settings_words(s, nir_size_words[size], error, sizeof error);
    nir_settings_words(s, nir_recipe_words[recipe], error, sizeof error);
    s->size = size;
    s->recipe = recipe;
    if (*error) fprintf(stderr, "nir_settings_defaults: %s\n", error);
}

static void nir_settings_write(const nir_settings *s, json_writer *w)
{
    char text[512];
    json_open(w, '{');
    for (int i = 0; i < NIR_SETTING_COUNT; ++i) {
        const nir_setting *row = &nir_setting_table[i];
        if (row->kind == NIR_SET_HEAD) continue;
        const void *field = (const char *)s + row->offset;
        json_line(w);
        if (row->kind == NIR_SET_COUNT) json_put_number(w, row->name, (double)*(const int64_t *)field);
        else if (row->kind == NIR_SET_REAL) json_put_number(w, row->name, *(const double *)field);
        else if (row->kind == NIR_SET_FLAG) json_put_bool(w, row->name, *(const bool *)field);
        else json_put_string(w, row->name, nir_setting_text(s, row, text, sizeof text));
    }
    json_line(w);
    json_close(w, '}');
    json_append_text(w, "\n");
}

/* Takes the settings of a JSON object; `only`: that one alone. */
static bool nir_settings_read(nir_settings *s, const json_document *d, const char *only, char *error, size_t size)
{
    char text[64];
    if (d->nodes[0].type != JSON_OBJECT) return snprintf(error, size, "a JSON object was expected"), false;
    for (int i = d->nodes[0].child; i >= 0; i = d->nodes[i].next) {
        const json_node *n = &d->nodes[i];
        const nir_setting *row = nir_setting_find(n->key, strlen(n->key));
        if (!row) return snprintf(error, size, "'%.60s' is no setting", n->key), false;
        if (only && strcmp(only, row->name) != 0) continue;
        if (n->type == JSON_NUMBER || n->type == JSON_BOOL) snprintf(text, sizeof text, "%.17g", n->number);
        else if (n->type != JSON_STRING) return snprintf(error, size, "%s: a number, text, true or false was expected", row->name), false;
        if (!nir_setting_set(s, row, n->type == JSON_STRING ? n->text : text, error, size)) return false;
    }
    return true;
}

/* ---- files ----------------------------------------------------------------- */

static bool nir_say(char *error, size_t size, const char *format, ...) CLI_PRINTF(3, 4);
static bool nir_say(char *error, size_t size, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, size, format, arguments);
    va_end(arguments);
    return false;
}

/* Replaces a file: writes another, flushes it to the disk, renames it, flushes the folder. */
static bool nir_write_file(const char *path, const char *text, size_t length, char *error, size_t size)
{
    char other[1200], folder[1200];
    snprintf(other, sizeof other, "%s.new", path);
    snprintf(folder, sizeof folder, "%s", path);
    char *slash = strrchr(folder, '/');
    snprintf(slash ? slash : folder, 2, "%s", slash ? "" : ".");
    FILE *file = fopen(other, "wb");
    bool good = file && fwrite(text, 1, length, file) == length && fflush(file) == 0 && fsync(fileno(file)) == 0;
    if (file) good = fclose(file) == 0 && good;
    good = good && rename(other, path) == 0;
    const int reason = errno;
    if (!good) {
        remove(other);
        return nir_say(error, size, "cannot write %.300s: %s", path, strerror(reason));
    }
    const int fd = open(folder, O_RDONLY);
    if (fd >= 0) {
        fsync(fd);
        close(fd);
    }
    return true;
}

/* A whole text file with a zero after it; NULL when it cannot be read or is longer than 64 MiB. */
static char *nir_read_file(const char *path, size_t *length)
{
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    char *text = NULL;
    const long end = fseek(file, 0, SEEK_END) == 0 ? ftell(file) : -1;
    if (end >= 0 && end < 1L << 26 && fseek(file, 0, SEEK_SET) == 0) text = (char *)malloc((size_t)end + 1);
    *length = text ? fread(text, 1, (size_t)end, file) : 0;
    if (text) text[*length] = 0;
    fclose(file);
    return text;
}

/* Reads a JSON file into a document, to be released in any case. `text` is freed here: the document has its own strings. */
static bool nir_read_json(const char *path, json_document *d, char *error, size_t size)
{
    size_t length = 0;
    char *text = nir_read_file(path, &length);
    memset(d, 0, sizeof *d);
    if (!text) return nir_say(error, size, "cannot read %.300s: %s", path, strerror(errno));
    const bool good = json_parse(d, text, length);
    if (!good) nir_say(error, size, "%.300s: %s", path, d->error ? d->error : "text after the end");
    free(text);
    return good;
}

/* ---- normalisation ------------------------------------------------------------ */

/* Volumes: z = (mu - mean)/deviation over the tissue of the training phantoms, 0 in air. Measurements: less those of the semi-infinite
   medium with the mean properties, a function of the separation alone; then z over the training pairs. Places: over half the grid. */
enum { NIR_REFERENCE = 201 };           /* separations 0.5, 1, 1.5, ... mm */
typedef struct nir_scaling {
    double mean[2], deviation[2];               /* mu_a, mu_s' in mm^-1 */
    double signal_mean[2], signal_deviation[2]; /* log amplitude, phase in degrees, less the reference */
    double fit_mean[2], fit_deviation[2];       /* the same, less what the homogeneous fit gives; stage 2 */
    double reference[NIR_REFERENCE][2];         /* at separation (i + 1)/2 mm; zeros without `residual` */
    double frequency_hz, refractive_index, half;
} nir_scaling;

/* e^{-k r}/r with k complex. */
static void nir_green(double k_re, double k_im, double r, double out[2])
{
    const double size = exp(-k_re * r) / r;
    out[0] = size * cos(k_im * r);
    out[1] = -size * sin(k_im * r);
}

/* Log amplitude and phase (degrees) at the surface of a homogeneous half space with the Robin boundary condition, at distance rho (mm)
   from a pencil beam, which acts as a point at depth z0 = 1/mu_s'. With zb = 2 A D:
     4 pi D Phi = g(r1) + g(r2) - 2/zb int_0^inf e^{-l/zb} g(r(l)) dl,  g(r) = e^{-k r}/r,  r(l)^2 = rho^2 + (z0 + l)^2, r1 = r2 = r(0)
   The integral by Simpson's rule over 40 zb. */
static void nir_semi_infinite(double mu_a, double mu_s, double wave, double A, double rho, double *log_amplitude, double *phase)
{
    enum { STEPS = 800 };
    const double D = 1 / (3 * (mu_a + mu_s)), zb = 2 * A * D, z0 = 1 / mu_s, dl = 40 * zb / STEPS;
    const double re = mu_a / D, im = wave / D, size = sqrt(hypot(re, im)), angle = atan2(im, re) / 2;
    const double k_re = size * cos(angle), k_im = size * sin(angle);
    double g[2], sum[2] = { 0, 0 }, phi[2];
    for (int i = 0; i <= STEPS; ++i) {
        const double l = i * dl, weight = (i == 0 || i == STEPS ? 1 : i % 2 ? 4 : 2) * exp(-l / zb) * dl / 3;
        nir_green(k_re, k_im, hypot(rho, z0 + l), g);
        sum[0] += weight * g[0];
        sum[1] += weight * g[1];
    }
    nir_green(k_re, k_im, hypot(rho, z0), g);
    for (int i = 0; i < 2; ++i) phi[i] = (2 * g[i] - 2 / zb * sum[i]) / (4 * NIR_PI * D);
    *log_amplitude = log(hypot(phi[0], phi[1]));
    *phase = -atan2(phi[1], phi[0]) * NIR_DEGREES;
}

/* The phase is unwrapped along the separation. */
static void nir_reference(nir_scaling *c)
{
    const double wave = 2 * NIR_PI * c->frequency_hz * c->refractive_index / NIR_LIGHT;
    const double A = nir_boundary_A(NIR_HASKELL, c->refractive_index);
    for (int i = 0; i < NIR_REFERENCE; ++i) {
        nir_semi_infinite(c->mean[0], c->mean[1], wave, A, 0.5 * (i + 1), &c->reference[i][0], &c->reference[i][1]);
        while (i && c->reference[i][1] < c->reference[i - 1][1] - 180) c->reference[i][1] += 360;
    }
}

/* The reference at a separation, between the table's points linearly; held at its ends. */
static void nir_reference_at(const nir_scaling *c, double separation, double out[2])
{
    double at = 2 * separation - 1;
    if (!(at > 0)) at = 0;
    if (at > NIR_REFERENCE - 1.001) at = NIR_REFERENCE - 1.001;
    const int i = (int)at;
    for (int k = 0; k < 2; ++k) out[k] = c->reference[i][k] + (at - i) * (c->reference[i + 1][k] - c->reference[i][k]);
}

static void nir_moments(double count, const double sum[2], const double squares[2], double mean[2], double deviation[2])
{
    for (int k = 0; k < 2; ++k) {
        mean[k] = count > 0 ? sum[k] / count : 0;
        const double variance = count > 0 ? squares[k] / count - mean[k] * mean[k] : 0;
        deviation[k] = variance > 1e-20 ? sqrt(variance) : 1;
    }
}

static void nir_scaling_volumes(const nir_dataset *d, nir_scaling *c)
{
    const int64_t voxels = nir_dataset_voxels(d);
    double sum[2] = { 0, 0 }, squares[2] = { 0, 0 }, count = 0;
    for (int64_t p = 0; p < d->count; ++p) {
        int64_t of[NIR_LABELS + 1] = { 0 };
        for (int64_t v = 0; v < voxels; ++v) ++of[d->label[p * voxels + v]];
        for (int label = 1; label <= NIR_LABELS; ++label)
            for (int k = 0; k < 2; ++k) {
                const double mu = (double)d->property[(p * NIR_LABELS + label - 1) * 2 + k];
                sum[k] += (double)of[label] * mu;
                squares[k] += (double)of[label] * mu * mu;
            }
        count += (double)(voxels - of[0]);
    }
    nir_moments(count, sum, squares, c->mean, c->deviation);
}

static void nir_scaling_create(const nir_dataset *d, bool residual, nir_scaling *c)
{
    double sum[2] = { 0, 0 }, squares[2] = { 0, 0 }, count = 0;
    memset(c, 0, sizeof *c);
    c->frequency_hz = d->frequency_hz;
    c->refractive_index = d->refractive_index;
    c->half = d->grid.n * d->grid.h / 2;
    c->fit_deviation[0] = c->fit_deviation[1] = 1;
    nir_scaling_volumes(d, c);
    if (residual) nir_reference(c);
    for (int64_t p = 0; p < d->count; ++p)
        for (int i = 0, n = nir_dataset_pairs(d, p); i < n; ++i) {
            double reference[2];
            nir_reference_at(c, nir_dataset_separation(d, p, i), reference);
            const double value[2] = { (double)d->log_amplitude[p * d->pairs + i], (double)d->phase[p * d->pairs + i] };
            for (int k = 0; k < 2; ++k) {
                sum[k] += value[k] - reference[k];
                squares[k] += (value[k] - reference[k]) * (value[k] - reference[k]);
            }
            count += 1;
        }
    nir_moments(count, sum, squares, c->signal_mean, c->signal_deviation);
}

static bool nir_scaling_save(const nir_scaling *c, const char *path, char *error, size_t size)
{
    json_writer w;
    memset(&w, 0, sizeof w);
    json_open(&w, '{');
    json_put_numbers(&w, "mu_mean", c->mean, 2, 1);
    json_put_numbers(&w, "mu_deviation", c->deviation, 2, 1);
    json_put_numbers(&w, "signal_mean", c->signal_mean, 2, 1);
    json_put_numbers(&w, "signal_deviation", c->signal_deviation, 2, 1);
    json_put_numbers(&w, "fit_mean", c->fit_mean, 2, 1);
    json_put_numbers(&w, "fit_deviation", c->fit_deviation, 2, 1);
    json_put_number(&w, "frequency_hz", c->frequency_hz);
    json_put_number(&w, "refractive_index", c->refractive_index);
    json_put_number(&w, "half_side_mm", c->half);
    json_put_numbers(&w, "reference", &c->reference[0][0], 2 * NIR_REFERENCE, 1);
    json_close(&w, '}');
    json_append_text(&w, "\n");
    const bool good = nir_write_file(path, w.text, w.length, error, size);
    json_free(&w);
    return good;
}

static bool nir_scaling_load(nir_scaling *c, const char *path, char *error, size_t size)
{
    json_document d;
    memset(c, 0, sizeof *c);
    bool good = nir_read_json(path, &d, error, size);
    if (good) {
        const json_node *root = d.nodes;
        c->frequency_hz = json_get_number(&d, root, "frequency_hz", NAN);
        c->refractive_index = json_get_number(&d, root, "refractive_index", NAN);
        c->half = json_get_number(&d, root, "half_side_mm", NAN);
        good = json_get_numbers(&d, root, "mu_mean", c->mean, 2, 1) && json_get_numbers(&d, root, "mu_deviation", c->deviation, 2, 1) &&
               json_get_numbers(&d, root, "signal_mean", c->signal_mean, 2, 1) &&
               json_get_numbers(&d, root, "signal_deviation", c->signal_deviation, 2, 1) &&
               json_get_numbers(&d, root, "fit_mean", c->fit_mean, 2, 1) &&
               json_get_numbers(&d, root, "fit_deviation", c->fit_deviation, 2, 1) &&
               json_get_numbers(&d, root, "reference", &c->reference[0][0], 2 * NIR_REFERENCE, 1) && c->half > 0 &&
               c->deviation[0] > 0 && c->deviation[1] > 0 && c->signal_deviation[0] > 0 && c->signal_deviation[1] > 0;
        if (!good) nir_say(error, size, "%.300s: not a normalisation file", path);
    }
    json_release(&d);
    return good;
}

/* ---- the symmetries of the cube ---------------------------------------------------- */

/* Number 0 to 47 of 48: x'_a = sign_a x_axis(a). 0 is the identity. */
typedef struct nir_symmetry { int axis[3]; int sign[3]; } nir_symmetry;

static nir_symmetry nir_symmetry_of(int number)
{
    static const int order[6][3] = { { 0, 1, 2 }, { 0, 2, 1 }, { 1, 0, 2 }, { 1, 2, 0 }, { 2, 0, 1 }, { 2, 1, 0 } };
    nir_symmetry s;
    for (int a = 0; a < 3; ++a) {
        s.axis[a] = order[number / 8 % 6][a];
        s.sign[a] = number >> a & 1 ? -1 : 1;
    }
    return s;
}

/* The voxel that comes to lie at (x, y, z). */
static int64_t nir_symmetry_voxel(const nir_symmetry *s, int n, int x, int y, int z)
{
    const int to[3] = { x, y, z };
    int from[3] = { 0, 0, 0 };
    for (int a = 0; a < 3; ++a) from[s->axis[a]] = s->sign[a] > 0 ? to[a] : n - 1 - to[a];
    return ((int64_t)from[2] * n + from[1]) * n + from[0];
}

static void nir_symmetry_point(const nir_symmetry *s, const double x[3], double out[3])
{
    for (int a = 0; a < 3; ++a) out[a] = s->sign[a] * x[s->axis[a]];
}

/* ---- signals ------------------------------------------------------------------------------ */

/* Set by the first SIGINT or SIGTERM: the step is finished and kept. The second ends the program at once. */
static volatile sig_atomic_t nir_interrupted;

static void nir_on_signal(int number)
{
    if (nir_interrupted) _exit(128 + number);
    nir_interrupted = number;
}

static void nir_catch_signals(void)
{
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_handler = nir_on_signal;
    sigaction(SIGINT, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
}

/* ---- the homogeneous fit ------------------------------------------------------------------ */

/* Homogeneous tissue with the surface of the phantom, fitted to its noisy measurements (nirdot_baseline.h), and what it would give.
   What is left of the measurements is the tumours' part, and noise. */
typedef struct nir_fits {
    int64_t count;
    int pairs;
    float *mu;                  /* [count][2], mm^-1 */
    float *expected;            /* [count][2][pairs]: log amplitude, phase in degrees */
    bool images;                /* are there: */
    uint8_t *image;             /* [count][n^3][2], mu_a and mu_s': 128 + 127 times the cosine between what is left of the measurements
                                   and the voxel's column of the Jacobian, both over the noise's deviation; 128 in air */
    float *left;                /* [count]: the norm of what is left, over the noise's deviation */
} nir_fits;

/* One thread's solvers, for one phantom after the other. */
typedef struct nir_fitter {
    const nir_dataset *d;
    const nir_noise *noise;
    uint64_t seed;
    int64_t epoch;              /* of the noise */
    nir_fits *fits;
    nir_baseline *baseline;
    nir_workspace *ws;
    double *block;              /* optodes, measurements, deviations, predictions */
    float *values;              /* log amplitude, phase; mu_a, mu_s' of the voxels; four rows of the Jacobian */
    double *columns;            /* [2][2][n^3]: products with the columns, and their norms */
    int64_t first, stride;      /* of a thread's share */
    bool good, show;            /* show: tell now and then how far it is */
} nir_fitter;

static void nir_fits_free(nir_fits *f)
{
    free(f->mu);
    free(f->expected);
    free(f->image);
    free(f->left);
    memset(f, 0, sizeof *f);
}

static bool nir_fits_create(nir_fits *f, const nir_dataset *d, bool images)
{
    f->count = d->count;
    f->images = images;
    f->image = (uint8_t *)malloc(images ? (size_t)(2 * d->count * nir_dataset_voxels(d)) : 1);
    f->left = (float *)calloc((size_t)d->count, sizeof(float));
    f->pairs = d->pairs;
    f->mu = (float *)calloc((size_t)(2 * d->count), sizeof(float));
    f->expected = (float *)calloc((size_t)(2 * d->count * d->pairs), sizeof(float));
    return f->mu && f->expected && f->image && f->left;
}

static void nir_fitter_free(nir_fitter *f)
{
    nir_baseline_free(f->baseline);
    nir_workspace_free(f->ws);
    free(f->block);
    free(f->values);
    free(f->columns);
}

static bool nir_fitter_create(nir_fitter *f, const nir_dataset *d, const nir_noise *noise, uint64_t seed, int64_t epoch, nir_fits *fits)
{
    const nir_grid grid = d->grid, fine = { 2 * grid.n, grid.h / 2 };
    nir_options physics = nir_defaults();
    memset(f, 0, sizeof *f);
    physics.frequency_hz = d->frequency_hz;
    physics.refractive_index = d->refractive_index;
    f->d = d;
    f->noise = noise;
    f->seed = seed;
    f->epoch = epoch;
    f->fits = fits;
    f->stride = 1;
    f->baseline = nir_baseline_new(grid, d->fine ? fine : grid, &physics, NULL);
    f->ws = nir_workspace_new(grid, &physics);
    f->block = (double *)malloc((size_t)(3 * (d->sources + d->detectors) + 6 * d->pairs) * sizeof(double));
    f->values = (float *)malloc((size_t)(2 * d->pairs + 6 * nir_dataset_voxels(d)) * sizeof(float));
    f->columns = (double *)malloc((size_t)(4 * nir_dataset_voxels(d)) * sizeof(double));
    return f->baseline && f->ws && f->block && f->values && f->columns;
}

/* What the classical methods are told of phantom p: optodes, surface, noisy measurements and the noise's deviations. It stays as long
   as the fitter fits no other. */
static void nir_fitter_data(nir_fitter *f, int64_t p, nir_ellipsoid *shape, nir_data *out)
{
    const nir_dataset *d = f->d;
    const int pairs = nir_dataset_pairs(d, p), optodes = d->sources + d->detectors;
    double (*place)[3] = (double (*)[3])f->block, *value = f->block + 3 * optodes, strongest = -INFINITY;
    float *log_amplitude = f->values, *phase = f->values + d->pairs;
    nir_noise_apply(d, p, f->noise, f->seed, (uint32_t)f->epoch, log_amplitude, phase);
    for (int i = 0; i < optodes; ++i)
        for (int k = 0; k < 3; ++k)
            place[i][k] = i < d->sources ? (double)d->source[3 * (p * d->sources + i) + k]
                                         : (double)d->detector[3 * (p * d->detectors + i - d->sources) + k];
    for (int i = 0; i < pairs; ++i) strongest = fmax(strongest, (double)log_amplitude[i]);
    for (int i = 0; i < pairs; ++i) {
        const double sigma = fmax(1e-3, hypot(f->noise->amplitude, f->noise->floor * exp(strongest - (double)log_amplitude[i])));
        value[i] = (double)log_amplitude[i];
        value[pairs + i] = (double)phase[i];
        value[2 * pairs + i] = sigma;
        value[3 * pairs + i] = fmax(0.05, fmax(f->noise->phase, f->noise->floor > 0 ? sigma * NIR_DEGREES : 0));
    }
    *shape = nir_dataset_ellipsoid(d, p);
    const nir_data data = { .shape = shape, .source = (const double (*)[3])place, .detector = (const double (*)[3])(place + d->sources),
        .sources = d->sources, .detectors = d->detectors, .pairs = pairs, .pair = d->pair + 2 * p * d->pairs, .log_amplitude = value,
        .phase = value + pairs, .sigma_amplitude = value + 2 * pairs, .sigma_phase = value + 3 * pairs };
    *out = data;
}

/* The image of nir_fits, from the fields that nir_forward has left in the workspace. */
static bool nir_fitter_image(nir_fitter *f, int64_t p, const nir_data *data)
{
    if (!nir_derivatives_ready(f->ws, "nir_fitter_image", data->pairs, NIR_KEEP_ALL)) return false;
    const nir_workspace *ws = f->ws;
    const int64_t voxels = nir_dataset_voxels(f->d), n = ws->columns;
    const float *expected = f->fits->expected + 2 * p * f->d->pairs;
    float *rows = f->values + 2 * f->d->pairs + 2 * voxels;         /* [ln A, phase][mu_a, mu_s'][columns] */
    double *product = f->columns, *norm = f->columns + 2 * voxels, left = 0;
    uint8_t *image = f->fits->image + 2 * p * voxels;
    memset(f->columns, 0, (size_t)(4 * voxels) * sizeof(double));
    memset(image, 128, (size_t)(2 * voxels));
    for (int i = 0; i < data->pairs; ++i) {
        const double sigma[2] = { data->sigma_amplitude[i], data->sigma_phase[i] };
        const double rest[2] = { (data->log_amplitude[i] - (double)expected[i]) / sigma[0],
                                 (data->phase[i] - (double)expected[f->d->pairs + i]) / sigma[1] };
        nir_jacobian_rows(f->ws, data->pair, i, rows);
        left += rest[0] * rest[0] + rest[1] * rest[1];
        for (int q = 0; q < 2; ++q)
            for (int64_t j = 0; j < 2 * n; ++j) {
                const double a = (double)rows[2 * q * n + j] / sigma[q];
                product[j] += a * rest[q];
                norm[j] += a * a;
            }
    }
    f->fits->left[p] = (float)sqrt(left);
    for (int k = 0; k < 2; ++k)
        for (int64_t j = 0; j < n; ++j) {
            const double size = sqrt(norm[k * n + j] * left);
            if (ws->voxel[j] >= 0 && size > 0) image[2 * ws->voxel[j] + k] = (uint8_t)(128.5 + 127 * product[k * n + j] / size);
        }
    return true;
}

/* Fits phantom p; `mu`, the predictions and the image go to the fits. */
static bool nir_fitter_run(nir_fitter *f, int64_t p, double mu[2])
{
    const nir_dataset *d = f->d;
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + p * voxels;
    float *mu_a = f->values + 2 * d->pairs, *mu_s = mu_a + voxels, *expected = f->fits->expected + 2 * p * d->pairs;
    nir_ellipsoid shape;
    nir_data data;
    nir_fitter_data(f, p, &shape, &data);
    double *log_amplitude = f->block + 3 * (d->sources + d->detectors) + 4 * d->pairs, *phase = log_amplitude + d->pairs;
    if (!nir_baseline_fit(f->baseline, &data, mu)) return false;
    for (int64_t v = 0; v < voxels; ++v) {
        mu_a[v] = label[v] ? (float)mu[0] : 0;
        mu_s[v] = label[v] ? (float)mu[1] : 0;
    }
    if (!nir_set_tissue(f->ws, &shape, label) || !nir_set_properties(f->ws, mu_a, mu_s) ||
        !nir_set_optodes(f->ws, data.source, data.sources, data.detector, data.detectors) ||
        !nir_forward(f->ws, data.pair, data.pairs, f->fits->images ? NIR_KEEP_ALL : NIR_KEEP_NOTHING, log_amplitude, phase)) return false;
    for (int k = 0; k < 2; ++k) f->fits->mu[2 * p + k] = (float)mu[k];
    for (int i = 0; i < data.pairs; ++i) {
        expected[i] = (float)log_amplitude[i];
        expected[d->pairs + i] = (float)phase[i];
    }
    return !f->fits->images || nir_fitter_image(f, p, &data);
}

static void *nir_fitter_main(void *user)
{
    nir_fitter *f = (nir_fitter *)user;
    const bool live = cli_is_terminal();
    double mu[2], shown = cli_seconds();
    f->good = true;
    for (int64_t p = f->first; p < f->d->count && f->good && !nir_interrupted; p += f->stride) {
        f->good = nir_fitter_run(f, p, mu);
        if (!f->show || cli_seconds() - shown < cli_progress_interval(live)) continue;
        shown = cli_seconds();
        fprintf(stderr, "%shomogeneous fits: %lld of %lld phantoms%s", cli_line_begin(live), (long long)p, (long long)f->d->count, cli_line_end(live, false));
    }
    return NULL;
}

enum { NIR_MAX_FITTERS = 64 };

/* All phantoms; the number of threads changes no bit. */
static bool nir_fits_run(nir_fits *fits, const nir_dataset *d, const nir_noise *noise, uint64_t seed, int64_t epoch, int threads, bool show)
{
    nir_fitter fitter[NIR_MAX_FITTERS];
    pthread_t thread[NIR_MAX_FITTERS];
    bool started[NIR_MAX_FITTERS] = { false }, good = true;
    if (threads > NIR_MAX_FITTERS) threads = NIR_MAX_FITTERS;
    for (int i = 0; i < threads; ++i) {
        good = nir_fitter_create(&fitter[i], d, noise, seed, epoch, fits) && good;
        fitter[i].first = i;
        fitter[i].stride = threads;
        fitter[i].show = show && i == 0;
    }
    for (int i = 1; i < threads && good; ++i) started[i] = pthread_create(&thread[i], NULL, nir_fitter_main, &fitter[i]) == 0;
    for (int i = 0; i < threads && good; ++i)
        if (!started[i]) nir_fitter_main(&fitter[i]);
    for (int i = 1; i < threads; ++i)
        if (started[i]) pthread_join(thread[i], NULL);
    for (int i = 0; i < threads; ++i) {
        good = good && fitter[i].good;
        nir_fitter_free(&fitter[i]);
    }
    return good && !nir_interrupted;
}

/* The fits of a dataset: from a file that an earlier run of the same settings left, or computed and kept there. */
enum { NIR_FIT_TENSORS = 4 };
static int nir_fits_items(const nir_fits *f, const nir_dataset *d, dot_safetensors_item item[NIR_FIT_TENSORS])
{
    const int64_t n = d->grid.n;
    const dot_safetensors_item all[NIR_FIT_TENSORS] = {
        { "mu", DOT_F32, 2, { d->count, 2 }, f->mu }, { "expected", DOT_F32, 3, { d->count, 2, d->pairs }, f->expected },
        { "left", DOT_F32, 1, { d->count }, f->left }, { "image", DOT_U8, 5, { d->count, n, n, n, 2 }, f->image },
    };
    memcpy(item, all, sizeof all);
    return f->images ? NIR_FIT_TENSORS : NIR_FIT_TENSORS - 1;
}

static bool nir_fits_load(nir_fits *fits, dot_context *ctx, const nir_dataset *d, const char *path, const char *key)
{
    dot_safetensors_item item[NIR_FIT_TENSORS];
    const int count = nir_fits_items(fits, d, item);
    void *const into[NIR_FIT_TENSORS] = { fits->mu, fits->expected, fits->left, fits->image };
    dot_safetensors *file = access(path, F_OK) == 0 ? dot_safetensors_open(ctx, path) : NULL;
    const char *found = file ? dot_safetensors_metadata(file, "key") : NULL;
    bool good = found && strcmp(found, key) == 0;
    for (int i = 0; i < count && good; ++i) {
        dot_safetensors_entry entry;
        size_t bytes = dot_dtype_size(item[i].dtype);
        for (int k = 0; k < item[i].rank; ++k) bytes *= (size_t)item[i].shape[k];
        const int k = dot_safetensors_find(file, item[i].name);
        good = k >= 0 && dot_safetensors_entry_at(file, k, &entry) && entry.bytes == bytes &&
               strcmp(entry.dtype, item[i].dtype == DOT_U8 ? "U8" : "F32") == 0 && dot_safetensors_read(file, k, into[i], bytes);
    }
    dot_safetensors_close(file);
    return good;
}

static bool nir_fits_make(nir_fits *fits, dot_context *ctx, const nir_dataset *d, const nir_settings *s, int64_t epoch, int threads,
                          const char *path)
{
    char key[160];
    dot_safetensors_item item[NIR_FIT_TENSORS];
    const nir_noise *noise = &nir_noise_presets[s->noise];
    snprintf(key, sizeof key, "%s %s %llu %lld noise %s seed %lld epoch %lld images %d", d->preset, d->split, (unsigned long long)d->seed,
             (long long)d->count, noise->name, (long long)s->seed, (long long)epoch, s->image);
    if (!nir_fits_create(fits, d, s->image)) return false;
    if (nir_fits_load(fits, ctx, d, path, key)) return true;
    const double start = cli_seconds();
    if (!nir_fits_run(fits, d, noise, (uint64_t)s->seed, epoch, threads, !s->quiet)) return false;
    if (!s->quiet)
        fprintf(stderr, "%shomogeneous fits: %lld of %lld phantoms (%s), %.0f s%s", cli_line_begin(cli_is_terminal()), (long long)d->count,
                (long long)d->count, d->split, cli_seconds() - start, cli_line_end(cli_is_terminal(), true));
    const char *const metadata[] = { "key", key, "units", "mu mm^-1; log amplitude, phase in degrees", NULL };
    return dot_safetensors_write(ctx, path, item, nir_fits_items(fits, d, item), metadata);
}

/* Mean and deviation of what the fits leave of the measurements (without noise) of the training data. */
static void nir_scaling_fits(nir_scaling *c, const nir_dataset *d, const nir_fits *fits)
{
    double sum[2] = { 0, 0 }, squares[2] = { 0, 0 }, count = 0;
    for (int64_t p = 0; p < d->count; ++p)
        for (int i = 0, n = nir_dataset_pairs(d, p); i < n; ++i, count += 1)
            for (int k = 0; k < 2; ++k) {
                const double left = (double)(k ? d->phase : d->log_amplitude)[p * d->pairs + i] - (double)fits->expected[(2 * p + k) * d->pairs + i];
                sum[k] += left;
                squares[k] += left * left;
            }
    nir_moments(count, sum, squares, c->fit_mean, c->fit_deviation);
}

/* ---- samples --------------------------------------------------------------------------- */

/* Random streams of training; the low bits are an epoch or a sample. */
enum { NIR_STREAM_ORDER = 1, NIR_STREAM_SYMMETRY, NIR_STREAM_TOKENS, NIR_STREAM_DROP };
static uint64_t nir_stream(int use, int64_t epoch, int64_t sample)
{
    return (uint64_t)(0x5400 + use) << 48 | (uint64_t)(epoch & 0xffffff) << 24 | (uint64_t)(sample & 0xffffff);
}
enum { NIR_EVAL_EPOCH = 0xfffffe };     /* of the noise of validation and test: always the same */

/* Normalised volume [n^3][2] and weights [n^3] of a phantom in a symmetric position. */
static void nir_sample_volume(const nir_dataset *d, const nir_scaling *c, int64_t p, int symmetry, double tumour_weight, float *x, float *weight)
{
    const nir_symmetry s = nir_symmetry_of(symmetry);
    const int n = d->grid.n;
    const uint8_t *label = d->label + p * nir_dataset_voxels(d);
    float value[NIR_LABELS + 1][2] = { { 0, 0 } };
    for (int l = 1; l <= NIR_LABELS; ++l)
        for (int k = 0; k < 2; ++k)
            value[l][k] = (float)(((double)d->property[(p * NIR_LABELS + l - 1) * 2 + k] - c->mean[k]) / c->deviation[k]);
    for (int z = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int i = 0; i < n; ++i, x += 2, ++weight) {
                const int l = label[nir_symmetry_voxel(&s, n, i, y, z)];
                x[0] = value[l][0];
                x[1] = value[l][1];
                *weight = l == 0 ? 0.0f : l == 1 ? 1.0f : (float)tumour_weight;
            }
}

static double nir_between(const double a[3], const double b[3]) { return sqrt(pow(a[0] - b[0], 2) + pow(a[1] - b[1], 2) + pow(a[2] - b[2], 2)); }

/* Features of a token's place: source, detector, and what the settings add. */
static int nir_position_features(const nir_settings *s) { return 6 + s->separation + 12 * (int)s->fourier; }
static int nir_signal_features(const nir_settings *s) { return s->fit ? 4 : 2; }
static int nir_context_features(const nir_settings *s) { return (s->surface ? 9 : 0) + (s->fit ? 2 : 0); }
enum { NIR_SURFACE_FEATURES = 9, NIR_CONTEXT_FEATURES = 11 };

static void nir_token_place(const nir_settings *s, const nir_scaling *c, const double source[3], const double detector[3], float *out)
{
    double place[6];
    for (int i = 0; i < 3; ++i) {
        place[i] = source[i] / c->half;
        place[3 + i] = detector[i] / c->half;
    }
    for (int i = 0; i < 6; ++i) *out++ = (float)place[i];
    if (s->separation) *out++ = (float)(nir_between(source, detector) / c->half);
    for (int band = 0; band < s->fourier; ++band)
        for (int i = 0; i < 6; ++i) {
            *out++ = (float)sin(NIR_PI * ldexp(place[i], band));
            *out++ = (float)cos(NIR_PI * ldexp(place[i], band));
        }
}

/* The ellipsoid as its centre and the matrix of its quadratic form, less that of a ball of 0.86 of the half side. */
static void nir_surface_features(const nir_ellipsoid *e, const nir_scaling *c, const nir_symmetry *s, float out[NIR_SURFACE_FEATURES])
{
    static const int pair[6][2] = { { 0, 0 }, { 1, 1 }, { 2, 2 }, { 0, 1 }, { 0, 2 }, { 1, 2 } };
    const double ball = 0.86 * c->half;
    double centre[3];
    nir_symmetry_point(s, e->centre, centre);
    for (int i = 0; i < 3; ++i) out[i] = (float)(centre[i] / c->half);
    for (int i = 0; i < 6; ++i) {
        const int a = pair[i][0], b = pair[i][1];
        double sum = a == b ? -1 : 0;
        for (int k = 0; k < 3; ++k)
            sum += ball * ball / (e->semi_axis[k] * e->semi_axis[k]) * s->sign[a] * s->sign[b] *
                   e->rotation[3 * k + s->axis[a]] * e->rotation[3 * k + s->axis[b]];
        out[3 + i] = (float)(3 * sum);
    }
}

typedef struct nir_token_key { double key; int index; } nir_token_key;
static int nir_token_key_compare(const void *a, const void *b)
{
    const nir_token_key *p = (const nir_token_key *)a, *q = (const nir_token_key *)b;
    return p->key != q->key ? p->key < q->key ? 1 : -1 : p->index - q->index;
}

/* The order in which a sample's pairs are taken: random keys, largest first (weighted: Efraimidis, Spirakis 2006). In order as they are
   for an evaluation. Channels whose relative deviation is above 0.3 come last, with a key of -inf, and are not taken. */
static int nir_token_order(const nir_settings *s, const nir_dataset *d, int64_t p, const float *log_amplitude, const nir_noise *noise,
                           bool training, uint64_t stream, nir_token_key *key)
{
    const int count = nir_dataset_pairs(d, p);
    const uint16_t *pair = d->pair + 2 * p * d->pairs;
    double strongest = -INFINITY;
    int good = 0;
    for (int i = 0; i < count; ++i) strongest = fmax(strongest, (double)log_amplitude[i]);
    for (int i = 0; i < count; ++i) {
        const double deviation = hypot(noise->amplitude, noise->floor * exp(strongest - (double)log_amplitude[i]));
        const double u = dot_random_uniform((uint64_t)s->seed, stream, (uint64_t)i) + 1e-12;
        key[i].index = i;
        key[i].key = -i;
        if (training && s->subsample == NIR_SUBSAMPLE_UNIFORM) key[i].key = log(u);
        if (training && s->subsample == NIR_SUBSAMPLE_SNR) key[i].key = log(u) * exp(0.25 * (strongest - (double)log_amplitude[i]));
        if (training && s->subsample == NIR_SUBSAMPLE_SOURCE)
            key[i].key = -(double)(int64_t)(1e6 * dot_random_uniform((uint64_t)s->seed, stream, (uint64_t)(100000 + pair[2 * i]))) - u;
        if (deviation > 0.3) key[i].key = -INFINITY;
        else ++good;
    }
    qsort(key, (size_t)count, sizeof *key, nir_token_key_compare);
    return good;
}

/* Room for the tokens of a batch. */
typedef struct nir_token_batch {
    int64_t count, tokens;
    int n;                              /* voxels a side of the images */
    float *signal, *position, *mask, *context, *image;
    float *log_amplitude, *phase;       /* of one phantom, with noise */
    nir_token_key *key;
} nir_token_batch;

static void nir_token_batch_free(nir_token_batch *b)
{
    float *const arrays[7] = { b->signal, b->position, b->mask, b->context, b->log_amplitude, b->phase, b->image };
    for (int i = 0; i < 7; ++i) free(arrays[i]);
    free(b->key);
    memset(b, 0, sizeof *b);
}

static bool nir_token_batch_create(nir_token_batch *b, const nir_settings *s, int64_t count, int64_t tokens, const nir_dataset *d)
{
    const size_t all = (size_t)(count * tokens);
    memset(b, 0, sizeof *b);
    b->count = count;
    b->tokens = tokens;
    b->signal = (float *)calloc((size_t)nir_signal_features(s) * all, sizeof(float));
    b->position = (float *)calloc((size_t)nir_position_features(s) * all, sizeof(float));
    b->mask = (float *)calloc(all, sizeof(float));
    b->context = (float *)calloc((size_t)(NIR_CONTEXT_FEATURES * count), sizeof(float));
    b->log_amplitude = (float *)calloc((size_t)d->pairs, sizeof(float));
    b->phase = (float *)calloc((size_t)d->pairs, sizeof(float));
    b->key = (nir_token_key *)calloc((size_t)d->pairs, sizeof *b->key);
    b->n = d->grid.n;
    b->image = (float *)calloc(s->image ? (size_t)(2 * count * nir_dataset_voxels(d)) : 1, sizeof(float));
    if (b->image && b->signal && b->position && b->mask && b->context && b->log_amplitude && b->phase && b->key) return true;
    nir_token_batch_free(b);
    return false;
}

static float nir_clamped(double z) { return (float)(z > 10 ? 10 : z < -10 ? -10 : z); }

/* One token of row `row` of the batch. */
static void nir_token_fill(nir_token_batch *b, const nir_settings *s, const nir_scaling *c, const nir_dataset *d, const nir_fits *fits,
                           int64_t p, int pair, const nir_symmetry *symmetry, int64_t row)
{
    float *signal = b->signal + row * nir_signal_features(s);
    const uint16_t *optode = d->pair + 2 * (p * d->pairs + pair);
    const float *place[2] = { d->source + 3 * (p * d->sources + optode[0]), d->detector + 3 * (p * d->detectors + optode[1]) };
    double point[2][3], reference[2];
    for (int k = 0; k < 2; ++k) {
        const double x[3] = { (double)place[k][0], (double)place[k][1], (double)place[k][2] };
        nir_symmetry_point(symmetry, x, point[k]);
    }
    nir_reference_at(c, nir_between(point[0], point[1]), reference);
    const double value[2] = { (double)b->log_amplitude[pair], (double)b->phase[pair] };
    for (int k = 0; k < 2; ++k) {
        signal[k] = nir_clamped((value[k] - reference[k] - c->signal_mean[k]) / c->signal_deviation[k]);
        if (s->fit) signal[2 + k] = nir_clamped((value[k] - (double)fits->expected[(2 * p + k) * d->pairs + pair] - c->fit_mean[k]) / c->fit_deviation[k]);
    }
    nir_token_place(s, c, point[0], point[1], b->position + row * nir_position_features(s));
    b->mask[row] = 0;
}

/* The image of the fit in a symmetric position: cosines, times the logarithm of how much is left. */
static void nir_token_image(nir_token_batch *b, const nir_dataset *d, const nir_fits *fits, int64_t p, int64_t at, const nir_symmetry *turn)
{
    const int n = d->grid.n;
    const uint8_t *image = fits->image + 2 * p * nir_dataset_voxels(d);
    const float scale = (float)(log1p((double)fits->left[p]) / (2 * 127));
    float *out = b->image + 2 * at * nir_dataset_voxels(d);
    for (int z = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int x = 0; x < n; ++x, out += 2) {
                const int64_t v = nir_symmetry_voxel(turn, n, x, y, z);
                out[0] = scale * (float)(image[2 * v] - 128);
                out[1] = scale * (float)(image[2 * v + 1] - 128);
            }
}

/* Tokens of phantom p as row `at` of the batch, in a symmetric position, with the noise of the epoch. Training draws a subset, and drops
   tokens; an evaluation takes the first ones. Tokens that are not there have no weight. */
static void nir_token_sample(nir_token_batch *b, const nir_settings *s, const nir_scaling *c, const nir_dataset *d, const nir_fits *fits,
                             int64_t p, int64_t at, int symmetry, int64_t epoch, bool training)
{
    const nir_noise *noise = &nir_noise_presets[s->noise];
    const nir_symmetry turn = nir_symmetry_of(symmetry);
    const nir_ellipsoid shape = nir_dataset_ellipsoid(d, p);
    const int features = nir_position_features(s);
    nir_noise_apply(d, p, noise, (uint64_t)s->seed, (uint32_t)epoch, b->log_amplitude, b->phase);
    const int good = nir_token_order(s, d, p, b->log_amplitude, noise, training, nir_stream(NIR_STREAM_TOKENS, epoch, p), b->key);
    float *context = b->context + nir_context_features(s) * at;
    if (s->surface) nir_surface_features(&shape, c, &turn, context);
    if (s->image) nir_token_image(b, d, fits, p, at, &turn);
    for (int k = 0; k < 2 && s->fit; ++k)
        context[(s->surface ? NIR_SURFACE_FEATURES : 0) + k] = nir_clamped(((double)fits->mu[2 * p + k] - c->mean[k]) / c->deviation[k]);
    for (int64_t i = 0; i < b->tokens; ++i) {
        const int64_t row = at * b->tokens + i;
        const bool dropped = training && i && dot_random_uniform((uint64_t)s->seed, nir_stream(NIR_STREAM_DROP, epoch, p), (uint64_t)i) < s->token_dropout;
        if (i < good && !dropped) {
            nir_token_fill(b, s, c, d, fits, p, b->key[i].index, &turn, row);
            continue;
        }
        b->mask[row] = NIR_NO_TOKEN;
        memset(b->signal + row * nir_signal_features(s), 0, (size_t)nir_signal_features(s) * sizeof(float));
        memset(b->position + row * features, 0, (size_t)features * sizeof(float));
    }
}

static nir_tokens nir_token_tensors(dot_context *ctx, const nir_settings *s, const nir_token_batch *b)
{
    const int64_t signal[3] = { b->count, b->tokens, nir_signal_features(s) }, position[3] = { b->count, b->tokens, nir_position_features(s) };
    const int64_t context[2] = { b->count, nir_context_features(s) }, image[5] = { b->count, b->n, b->n, b->n, 2 };
    const nir_tokens t = { dot_input(ctx, DOT_F32, 3, signal, b->signal), dot_input(ctx, DOT_F32, 3, position, b->position),
                           dot_input(ctx, DOT_F32, 2, signal, b->mask), context[1] ? dot_input(ctx, DOT_F32, 2, context, b->context) : NULL,
                           s->image ? dot_input(ctx, DOT_F32, 5, image, b->image) : NULL };
    return t;
}

/* ---- models ------------------------------------------------------------------------------ */

static nir_autoencoder_options nir_autoencoder_settings(const nir_settings *s)
{
    nir_autoencoder_options o = nir_sizes[s->size].autoencoder;
    if (s->latent) o.latent = (int)s->latent;
    o.norm = s->norm ? NIR_NORM_GROUP : NIR_NORM_BATCH;
    o.attention = (int)s->attention < o.stages ? (int)s->attention : o.stages;
    o.dropout = s->dropout1;
    if (s->gather) o.flatten = s->gather == 2;
    return o;
}

static nir_transformer_options nir_transformer_settings(const nir_settings *s)
{
    nir_transformer_options o = nir_sizes[s->size].transformer;
    o.latent = nir_autoencoder_settings(s).latent;
    if (s->width) {
        o.width = (int)s->width;
        o.fuse = 3 * o.width / 2;
        o.feed_forward = 2 * o.width;
        o.head = o.width / 2;
    }
    if (s->layers) o.layers = (int)s->layers;
    if (s->heads) o.heads = (int)s->heads;
    if (s->head) o.head = (int)s->head;
    if (s->pooling) o.queries = 0;
    o.position = nir_position_features(s);
    o.signal = nir_signal_features(s);
    o.image = s->image;
    o.context = nir_context_features(s);
    o.pre_norm = s->pre_norm;
    o.dropout = s->dropout2;
    o.input_dropout = s->input_dropout;
    return o;
}

static dot_context *nir_context(const nir_settings *s)
{
    dot_context_options o = dot_context_defaults();
    if (s->threads) o.threads = (int)s->threads;
    o.seed = (uint64_t)s->seed;
    return dot_context_create(&o);
}

/* ---- losses -------------------------------------------------------------------------------- */

/* Convolves each of the two channels of x [M, D, H, W, 2] along one axis with a Gaussian, without padding. */
static dot_tensor *nir_blur_axis(dot_tensor *x, int axis, double sigma, int radius)
{
    float kernel[2 * 16 + 1][2];
    const int size = 2 * radius + 1;
    double sum = 0;
    for (int i = 0; i < size; ++i) sum += exp(-0.5 * (i - radius) * (i - radius) / (sigma * sigma));
    for (int i = 0; i < size; ++i) kernel[i][0] = kernel[i][1] = (float)(exp(-0.5 * (i - radius) * (i - radius) / (sigma * sigma)) / sum);
    int64_t shape[5] = { 1, 1, 1, 1, 2 };
    shape[axis] = size;
    dot_conv_options o = dot_conv_defaults();
    o.groups = 2;
    return dot_conv(x, dot_input(dot_tensor_context(x), DOT_F32, 5, shape, kernel), NULL, &o, DOT_NONE);
}

/* 1 - SSIM (Wang et al. 2004, 3-D), the mean over both channels and over the tissue at least a window's radius inside the grid, of
   normalised volumes; range[c] is the data range of channel c there. */
static dot_tensor *nir_ssim_loss(dot_tensor *prediction, dot_tensor *truth, dot_tensor *weight, const double range[2])
{
    dot_context *ctx = dot_tensor_context(prediction);
    const int64_t n = dot_tensor_dim(prediction, 0), side = dot_tensor_dim(prediction, 1), two = 2;
    const double sigma = side < 32 ? 1 : 1.5;
    const int radius = side < 32 ? 3 : 5;
    const float c1[2] = { (float)pow(0.01 * range[0], 2), (float)pow(0.01 * range[1], 2) };
    const float c2[2] = { (float)pow(0.03 * range[0], 2), (float)pow(0.03 * range[1], 2) };
    dot_tensor *x = dot_mul(prediction, weight), *y = dot_mul(truth, weight), *part[5];
    dot_tensor *maps[5] = { x, y, dot_square(x), dot_square(y), dot_mul(x, y) };
    dot_tensor *all = dot_concat(maps, 5, 0);
    for (int axis = 0; axis < 3; ++axis) all = nir_blur_axis(all, axis, sigma, radius);
    for (int i = 0; i < 5; ++i) part[i] = dot_slice(all, 0, i * n, (i + 1) * n);
    dot_tensor *xx = dot_square(part[0]), *yy = dot_square(part[1]), *xy = dot_mul(part[0], part[1]);
    dot_tensor *k1 = dot_input(ctx, DOT_F32, 1, &two, c1), *k2 = dot_input(ctx, DOT_F32, 1, &two, c2);
    dot_tensor *top = dot_mul(dot_add(dot_mul_scalar(xy, 2), k1), dot_add(dot_mul_scalar(dot_sub(part[4], xy), 2), k2));
    dot_tensor *bottom = dot_mul(dot_add(dot_add(xx, yy), k1), dot_add(dot_sub(dot_add(part[2], part[3]), dot_add(xx, yy)), k2));
    for (int axis = 1; axis <= 3; ++axis) weight = dot_slice(weight, axis, radius, side - radius);
    dot_tensor *sum = dot_sum(dot_mul(dot_div(top, bottom), weight), DOT_ALL_AXES, false);
    dot_tensor *mean = dot_div(sum, dot_add_scalar(dot_mul_scalar(dot_sum(weight, DOT_ALL_AXES, false), 2), 1e-12));
    return dot_add_scalar(dot_neg(mean), 1);
}

/* Mean L1 distance of the features that the frozen encoder's stages give for prediction and truth, both 0 outside the tissue. */
static dot_tensor *nir_perceptual_loss(nir_autoencoder *a, dot_tensor *prediction, dot_tensor *truth, dot_tensor *weight)
{
    dot_tensor *feature[NIR_MAX_STAGES], *loss = NULL;
    nir_encode(a, dot_mul(truth, weight));
    for (int i = 0; i < a->options.stages; ++i) feature[i] = dot_detach(a->feature[i]);
    nir_encode(a, dot_mul(prediction, weight));
    for (int i = 0; i < a->options.stages && i < 3; ++i) {
        dot_tensor *l = dot_l1_loss(a->feature[i], feature[i]);
        loss = loss ? dot_add(loss, l) : l;
    }
    return loss;
}

/* Greatest values that the generator can give: the data ranges of PSNR and SSIM (nirdot.md, section 5), mm^-1. */
static const double nir_data_range_of[2] = { 0.0245, 2.95 };

/* The loss of a volume; `a`: the frozen autoencoder for the perceptual term, or NULL. */
static dot_tensor *nir_volume_loss(const nir_settings *s, const nir_scaling *c, nir_autoencoder *a, dot_tensor *prediction,
                                   dot_tensor *truth, dot_tensor *weight)
{
    const double importance[2] = { s->weight_mua, s->weight_mus };
    const double range[2] = { nir_data_range_of[0] / c->deviation[0], nir_data_range_of[1] / c->deviation[1] };
    dot_tensor *loss = nir_rmse_loss(prediction, truth, weight, importance);
    if (s->ssim > 0) {
        dot_tensor *mask = dot_minimum(weight, dot_add_scalar(dot_mul_scalar(weight, 0), 1));
        loss = dot_add(loss, dot_mul_scalar(nir_ssim_loss(prediction, truth, mask, range), s->ssim));
    }
    if (s->perceptual > 0 && a) {
        dot_tensor *mask = dot_minimum(weight, dot_add_scalar(dot_mul_scalar(weight, 0), 1));
        loss = dot_add(loss, dot_mul_scalar(nir_perceptual_loss(a, prediction, truth, mask), s->perceptual));
    }
    return loss;
}

/* ---- a stage of training ---------------------------------------------------------------------- */

typedef enum { NIR_DONE, NIR_FAILED, NIR_INTERRUPTED } nir_outcome;

typedef struct nir_stage nir_stage;
struct nir_stage {
    const nir_settings *settings;
    const char *name;                   /* "stage1" */
    char folder[600];
    dot_context *ctx;
    dot_layer *layer;                   /* what is trained */
    dot_optimizer *optimizer;
    dot_average *averages;              /* NULL without EMA */
    dot_telemetry *telemetry;
    dot_schedule schedule;
    bool cycle_momentum;
    int64_t epochs, batch, samples, steps;      /* steps: of an epoch */
    int64_t patience;
    dot_tensor *(*loss)(nir_stage *t, int64_t epoch, const int64_t *sample);    /* of `batch` samples */
    bool (*validate)(nir_stage *t, double *metric, double rmse[2]);             /* rmse: in tissue, mm^-1, mean over phantoms */
    void *user;
    dot_logger *log;
    int64_t *order;
    char error[512];
    /* kept in state.json */
    int64_t step, best_epoch, bad, clipped;
    double best, best_rmse[2], loss_sum, norm_sum, seconds;
    bool done;
};

static bool nir_stage_fails(nir_stage *t)
{
    if (!*t->error && !dot_ok(t->ctx)) nir_say(t->error, sizeof t->error, "%s: %s", t->name, dot_error(t->ctx));
    return false;
}

static void nir_stage_path(const nir_stage *t, const char *name, char *path, size_t size) { snprintf(path, size, "%s/%s", t->folder, name); }

/* ---- a stage: its log ---- */

typedef struct nir_value { const char *tag; double value; } nir_value;
enum { NIR_MOST_VALUES = 16 };

/* A record of step number `step`, 0, 1, ... All records go through here. */
static bool nir_stage_record(nir_stage *t, int64_t step, const nir_value *values, int count)
{
    const char *tags[NIR_MOST_VALUES];
    double numbers[NIR_MOST_VALUES];
    for (int i = 0; i < count && i < NIR_MOST_VALUES; ++i) {
        tags[i] = values[i].tag;
        numbers[i] = values[i].value;
    }
    return dot_logger_scalars(t->log, step, count < NIR_MOST_VALUES ? count : NIR_MOST_VALUES, tags, numbers) || nir_stage_fails(t);
}

/* Records of the present step and later ones, from before a crash, are superseded. A new log begins with the settings. */
static bool nir_stage_open_log(nir_stage *t)
{
    dot_logger_options o = dot_logger_defaults();
    char path[700], text[512];
    nir_stage_path(t, "log.jsonl", path, sizeof path);
    const bool fresh = access(path, F_OK) != 0;
    o.name = t->name;
    o.project = "nirdot";
    o.resume = true;
    o.resume_step = t->step;
    t->log = dot_logger_create(t->ctx, t->folder, &o);
    for (int i = 0; i < NIR_SETTING_COUNT && fresh && t->log; ++i) {
        const nir_setting *row = &nir_setting_table[i];
        const void *field = (const char *)t->settings + row->offset;
        if (row->kind == NIR_SET_COUNT) dot_logger_config_number(t->log, row->name, (double)*(const int64_t *)field);
        else if (row->kind == NIR_SET_REAL) dot_logger_config_number(t->log, row->name, *(const double *)field);
        else if (row->kind == NIR_SET_FLAG) dot_logger_config_bool(t->log, row->name, *(const bool *)field);
        else if (row->kind != NIR_SET_HEAD) dot_logger_config_text(t->log, row->name, nir_setting_text(t->settings, row, text, sizeof text));
    }
    return (t->log && dot_ok(t->ctx)) || nir_stage_fails(t);
}

/* ---- a stage: its state on the disk ---- */

static bool nir_stage_write_state(nir_stage *t, const char *checkpoint, const char *average)
{
    char path[700];
    json_writer w;
    memset(&w, 0, sizeof w);
    json_open(&w, '{');
    json_put_number(&w, "step", (double)t->step);
    json_put_number(&w, "of_steps", (double)(t->epochs * t->steps));
    json_put_string(&w, "checkpoint", checkpoint);
    json_put_string(&w, "average", average);
    json_put_number(&w, "best", t->best);
    json_put_numbers(&w, "best_rmse", t->best_rmse, 2, 1);
    json_put_number(&w, "best_epoch", (double)t->best_epoch);
    json_put_number(&w, "epochs_without_better", (double)t->bad);
    json_put_number(&w, "loss_sum", t->loss_sum);
    json_put_number(&w, "norm_sum", t->norm_sum);
    json_put_number(&w, "clipped", (double)t->clipped);
    json_put_number(&w, "seconds", t->seconds);
    json_put_bool(&w, "done", t->done);
    json_close(&w, '}');
    json_append_text(&w, "\n");
    nir_stage_path(t, "state.json", path, sizeof path);
    const bool good = nir_write_file(path, w.text, w.length, t->error, sizeof t->error);
    json_free(&w);
    return good;
}

static void nir_stage_remove(const nir_stage *t, const char *kind, int64_t step)
{
    char name[64], path[700];
    snprintf(name, sizeof name, "%s-%lld.safetensors", kind, (long long)step);
    nir_stage_path(t, name, path, sizeof path);
    remove(path);
}

/* Writes the checkpoint of this step, then the state that names it, then removes the one before. */
static bool nir_stage_save(nir_stage *t, int64_t before)
{
    char name[2][64] = { "", "" }, path[700];
    snprintf(name[0], sizeof name[0], "checkpoint-%lld.safetensors", (long long)t->step);
    nir_stage_path(t, name[0], path, sizeof path);
    bool good = dot_checkpoint_save(path, t->layer, t->optimizer, t->step);
    if (t->averages) {
        snprintf(name[1], sizeof name[1], "average-%lld.safetensors", (long long)t->step);
        nir_stage_path(t, name[1], path, sizeof path);
        good = good && dot_state_save(path, dot_average_state(t->averages));
    }
    good = (good || nir_stage_fails(t)) && nir_stage_write_state(t, name[0], name[1]);
    if (good && before >= 0 && before != t->step) {
        nir_stage_remove(t, "checkpoint", before);
        nir_stage_remove(t, "average", before);
    }
    return good;
}

/* Takes up training where state.json says; true also when there is none. */
static bool nir_stage_load(nir_stage *t)
{
    char path[700];
    json_document d;
    nir_stage_path(t, "state.json", path, sizeof path);
    if (!t->settings->resume) remove(path);
    if (access(path, F_OK) != 0) return nir_stage_open_log(t);
    bool good = nir_read_json(path, &d, t->error, sizeof t->error);
    if (good) {
        const json_node *root = d.nodes;
        const double step = json_get_number(&d, root, "step", NAN);
        const char *checkpoint = json_get_string(&d, root, "checkpoint", ""), *average = json_get_string(&d, root, "average", "");
        const json_node *done = json_find(&d, root, "done");
        good = step >= 0 && step < 1e15 && *checkpoint && !strchr(checkpoint, '/') && !strchr(average, '/') &&
               json_get_numbers(&d, root, "best_rmse", t->best_rmse, 2, 1);
        if (!good) nir_say(t->error, sizeof t->error, "%.300s: not the state of a run", path);
        const double steps = json_get_number(&d, root, "of_steps", NAN);
        if (good && steps != (double)(t->epochs * t->steps))
            good = nir_say(t->error, sizeof t->error, "%.300s is of a run of %.0f steps, the settings make %lld: --no-resume begins again", path,
                           steps, (long long)(t->epochs * t->steps));
        t->best = json_get_number(&d, root, "best", INFINITY);
        if (isnan(t->best)) t->best = INFINITY;
        t->best_epoch = (int64_t)json_get_number(&d, root, "best_epoch", 0);
        t->bad = (int64_t)json_get_number(&d, root, "epochs_without_better", 0);
        t->loss_sum = json_get_number(&d, root, "loss_sum", 0);
        t->norm_sum = json_get_number(&d, root, "norm_sum", 0);
        t->clipped = (int64_t)json_get_number(&d, root, "clipped", 0);
        t->seconds = json_get_number(&d, root, "seconds", 0);
        t->done = done && done->number == 1;
        nir_stage_path(t, checkpoint, path, sizeof path);
        good = good && (dot_checkpoint_load(path, t->layer, t->optimizer, &t->step) || nir_stage_fails(t));
        if (good && t->averages) {
            nir_stage_path(t, average, path, sizeof path);
            good = dot_state_load(path, dot_average_state(t->averages)) || nir_stage_fails(t);
        }
        if (good && t->step != (int64_t)step) good = nir_say(t->error, sizeof t->error, "%.300s is of another step than state.json", path);
        good = good && nir_stage_open_log(t);
    }
    json_release(&d);
    return good;
}

/* ---- a stage: progress ---- */

static void nir_stage_show(const nir_stage *t, double since, int64_t from, bool live, bool end)
{
    enum { CELLS = 24 };
    const int64_t total = t->epochs * t->steps;
    const double share = total ? (double)t->step / (double)total : 1, elapsed = cli_seconds() - since;
    const double left = t->step > from ? elapsed * (double)(total - t->step) / (double)(t->step - from) : 0;
    char bar[CELLS + 1], text[48];
    for (int i = 0; i < CELLS; ++i) bar[i] = i < (int)(share * CELLS) ? '=' : i == (int)(share * CELLS) ? '>' : ' ';
    bar[CELLS] = 0;
    fprintf(stderr, "%s%s ", cli_line_begin(live), t->name);
    if (live) fprintf(stderr, "[%s] ", bar);
    fprintf(stderr, "epoch %lld/%lld", (long long)((t->step + t->steps - 1) / t->steps), (long long)t->epochs);
    if (t->step % t->steps) fprintf(stderr, ", loss %.4f", t->loss_sum / (double)(t->step % t->steps));
    if (isfinite(t->best))
        fprintf(stderr, ", best RMSE mu_a %.2e mu_s' %.4f /mm (epoch %lld)", t->best_rmse[0], t->best_rmse[1], (long long)t->best_epoch);
    if (end) fprintf(stderr, ", %s", cli_duration(t->seconds, text, sizeof text));
    else if (t->step > from) fprintf(stderr, ", %s left", cli_duration(left, text, sizeof text));
    fputs(cli_line_end(live, end), stderr);
}

/* ---- a stage: the loop ---- */

/* A permutation of the samples, a function of seed and epoch (Fisher, Yates). */
static void nir_order(uint64_t seed, int64_t epoch, int64_t count, int64_t *order)
{
    for (int64_t i = 0; i < count; ++i) order[i] = i;
    for (int64_t i = count - 1; i > 0; --i) {
        const int64_t k = (int64_t)(dot_random_uniform(seed, nir_stream(NIR_STREAM_ORDER, epoch, 0), (uint64_t)i) * (double)(i + 1));
        const int64_t other = order[i];
        order[i] = order[k];
        order[k] = other;
    }
}

/* One optimizer step: forward and backward over `accumulate` batches, clipping, update, average. */
static bool nir_stage_step(nir_stage *t, int64_t epoch)
{
    const nir_settings *s = t->settings;
    const int64_t first = t->step % t->steps * s->accumulate * t->batch;
    const double multiplier = dot_schedule_at(&t->schedule, t->step), beta1 = dot_schedule_momentum(&t->schedule, t->step);
    dot_accumulation sum = { 0 };
    double loss = 0;
    for (int64_t i = 0; i < s->accumulate; ++i) {
        dot_step_begin(t->ctx);
        dot_tensor *l = t->loss(t, epoch, t->order + first + i * t->batch);
        loss += dot_item(l, 0) / (double)s->accumulate;
        dot_backward(s->accumulate > 1 ? dot_accumulate(&sum, l, 1) : l);
    }
    if (s->accumulate > 1) dot_accumulate_finish(&sum, t->optimizer);
    if (!dot_ok(t->ctx)) return nir_stage_fails(t);
    if (!isfinite(loss))
        return nir_say(t->error, sizeof t->error, "%s: the loss is %g at step %lld; the last checkpoint is kept. A lower learning rate "
                       "may help", t->name, loss, (long long)t->step);
    const double norm = dot_clip_grad_norm(t->optimizer, s->clip > 0 ? s->clip : 1e300);
    if (t->cycle_momentum && !isnan(beta1)) dot_optimizer_set(t->optimizer, DOT_HYPER_BETA1, DOT_ALL, DOT_ALL, beta1);
    const nir_value values[] = {
        { "train/loss", loss }, { "train/grad_norm", norm },
        { "train/lr", multiplier * dot_optimizer_get(t->optimizer, DOT_HYPER_LR, 0, 0) },
        { "train/beta1", dot_optimizer_get(t->optimizer, DOT_HYPER_BETA1, 0, 0) },
    };
    dot_telemetry_before(t->telemetry);
    dot_optimizer_step(t->optimizer, multiplier);
    dot_telemetry_after(t->telemetry);
    if (t->averages) dot_average_update(t->averages);
    if (!dot_ok(t->ctx)) return nir_stage_fails(t);
    t->loss_sum += loss;
    t->norm_sum += norm;
    t->clipped += s->clip > 0 && norm > s->clip;
    ++t->step;
    return nir_stage_record(t, t->step - 1, values, sizeof values / sizeof *values);
}

/* Validates (the averaged weights, if there are any), keeps the best ones, logs. */
static bool nir_stage_end_epoch(nir_stage *t, int64_t epoch, double seconds)
{
    double metric = NAN, rmse[2] = { NAN, NAN };
    char path[700];
    struct rusage usage;
    const dot_telemetry_report report = dot_telemetry_latest(t->telemetry, 0);
    if (t->averages && !dot_average_swap(t->averages)) return nir_stage_fails(t);
    bool good = t->validate(t, &metric, rmse);
    if (good && metric < t->best) {
        t->best = metric;
        t->best_epoch = epoch + 1;
        t->best_rmse[0] = rmse[0];
        t->best_rmse[1] = rmse[1];
        t->bad = 0;
        nir_stage_path(t, "model.safetensors", path, sizeof path);
        good = dot_save(t->layer, path);
    } else {
        ++t->bad;
    }
    if (t->averages) good = dot_average_swap(t->averages) && good;
    if (!good) return nir_stage_fails(t);
    getrusage(RUSAGE_SELF, &usage);
    const nir_value values[] = {
        { "epoch/number", (double)epoch + 1 }, { "epoch/train_loss", t->loss_sum / (double)t->steps }, { "epoch/val_metric", metric },
        { "epoch/val_rmse_mua", rmse[0] }, { "epoch/val_rmse_mus", rmse[1] }, { "epoch/grad_norm", t->norm_sum / (double)t->steps },
        { "epoch/clipped", (double)t->clipped / (double)t->steps }, { "epoch/update_ratio", report.update_ratio },
        { "epoch/gradient_momentum_cosine", report.cosine }, { "epoch/weight_norm", dot_weight_norm(t->optimizer, 0) },
        { "epoch/seconds", seconds },
        { "epoch/samples_per_second", (double)(t->steps * t->batch * t->settings->accumulate) / (seconds > 0 ? seconds : 1) },
        { "epoch/cpu_seconds", (double)usage.ru_utime.tv_sec + 1e-6 * (double)usage.ru_utime.tv_usec + (double)usage.ru_stime.tv_sec },
        { "epoch/peak_megabytes", (double)usage.ru_maxrss / 1024 },
    };
    t->loss_sum = t->norm_sum = 0;
    t->clipped = 0;
    return nir_stage_record(t, t->step - 1, values, sizeof values / sizeof *values);
}

/* Trains from where the stage stands to its end. */
static nir_outcome nir_stage_train(nir_stage *t)
{
    const bool live = cli_is_terminal();
    const int64_t total = t->epochs * t->steps, from = t->step;
    const double start = cli_seconds();
    double shown = start - 1e9, epoch_start = start, mark = start;
    int64_t saved = t->step ? t->step : -1;
    while (!t->done) {
        const int64_t epoch = t->step / t->steps;
        if (t->step == from || t->step % t->steps == 0) nir_order((uint64_t)t->settings->seed, epoch, t->samples, t->order);
        if (!nir_stage_step(t, epoch)) return NIR_FAILED;
        const bool end = t->step % t->steps == 0;
        t->seconds += cli_seconds() - mark;
        mark = cli_seconds();
        if (end && !nir_stage_end_epoch(t, epoch, cli_seconds() - epoch_start)) return NIR_FAILED;
        if (end) epoch_start = cli_seconds();
        t->done = t->step >= total || (end && t->patience && t->bad >= t->patience);
        if (end || nir_interrupted) {
            dot_logger_flush(t->log);
            if (!nir_stage_save(t, saved)) return NIR_FAILED;
            saved = t->step;
        }
        if (!t->settings->quiet && (cli_seconds() - shown > cli_progress_interval(live) || t->done)) {
            nir_stage_show(t, start, from, live, t->done);
            shown = cli_seconds();
        }
        if (nir_interrupted && !t->done) {
            if (live) fputc('\n', stderr);
            fprintf(stderr, CLI_PROGRAM ": interrupted; %s stands at step %lld of %lld, the same command goes on\n", t->name,
                    (long long)t->step, (long long)total);
            return NIR_INTERRUPTED;
        }
    }
    return NIR_DONE;
}

/* What all stages set up after the optimizer. */
static bool nir_stage_open(nir_stage *t, const char *run)
{
    const nir_settings *s = t->settings;
    snprintf(t->folder, sizeof t->folder, "%s/%s", run, t->name);
    if (!cli_make_folder(t->folder, t->error, sizeof t->error)) return false;
    if (t->batch > t->samples) t->batch = t->samples;
    t->steps = t->samples / (t->batch * s->accumulate);
    if (t->steps < 1)
        return nir_say(t->error, sizeof t->error, "%s: %lld training phantoms are fewer than %lld batches of %lld", t->name,
                       (long long)t->samples, (long long)s->accumulate, (long long)t->batch);
    t->best = INFINITY;
    t->order = (int64_t *)malloc((size_t)t->samples * sizeof *t->order);
    t->telemetry = dot_telemetry_create(t->optimizer, t->steps);
    if (s->ema > 0) {
        dot_average_options o = dot_average_defaults();
        o.decay = s->ema;
        o.warmup = true;
        t->averages = dot_average_create(t->layer, &o);
    }
    if (!t->order) return nir_say(t->error, sizeof t->error, "out of memory");
    return (dot_ok(t->ctx) || nir_stage_fails(t)) && nir_stage_load(t);
}

static void nir_stage_close(nir_stage *t)
{
    dot_logger_close(t->log, t->done);
    free(t->order);
}

/* ---- volumes in batches --------------------------------------------------------------------------- */

typedef struct nir_volume_batch {
    int64_t count;
    int n;
    float *x, *weight;
} nir_volume_batch;

static bool nir_volume_batch_create(nir_volume_batch *b, int64_t count, int n)
{
    const size_t voxels = (size_t)count * (size_t)n * (size_t)n * (size_t)n;
    b->count = count;
    b->n = n;
    b->x = (float *)malloc(2 * voxels * sizeof(float));
    b->weight = (float *)malloc(voxels * sizeof(float));
    return b->x && b->weight;
}

static void nir_volume_batch_free(nir_volume_batch *b)
{
    free(b->x);
    free(b->weight);
}

static void nir_volume_batch_set(nir_volume_batch *b, int64_t at, const nir_dataset *d, const nir_scaling *c, int64_t p, int symmetry, double tumour_weight)
{
    const int64_t voxels = nir_dataset_voxels(d);
    nir_sample_volume(d, c, p, symmetry, tumour_weight, b->x + 2 * voxels * at, b->weight + voxels * at);
}

static dot_tensor *nir_volume_input(dot_context *ctx, const nir_volume_batch *b, int64_t count)
{
    const int64_t shape[5] = { count, b->n, b->n, b->n, 2 };
    return dot_input(ctx, DOT_F32, 5, shape, b->x);
}

static dot_tensor *nir_weight_input(dot_context *ctx, const nir_volume_batch *b, int64_t count)
{
    const int64_t shape[5] = { count, b->n, b->n, b->n, 1 };
    return dot_input(ctx, DOT_F32, 5, shape, b->weight);
}

/* Which symmetric position a sample takes in an epoch. */
static int nir_sample_symmetry(const nir_settings *s, int64_t epoch, int64_t sample)
{
    return s->symmetries ? (int)(48 * dot_random_uniform((uint64_t)s->seed, nir_stream(NIR_STREAM_SYMMETRY, epoch, sample), 0)) : 0;
}

/* In mm^-1, with 0 in air, from a normalised volume. */
static void nir_volume_raw(const nir_dataset *d, const nir_scaling *c, int64_t p, const float *z, float *mu)
{
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + p * voxels;
    for (int64_t v = 0; v < voxels; ++v)
        for (int k = 0; k < 2; ++k) mu[2 * v + k] = label[v] ? (float)(c->mean[k] + c->deviation[k] * (double)z[2 * v + k]) : 0;
}

/* Root of the mean square error over the tissue, mm^-1. */
static void nir_tissue_rmse(const nir_dataset *d, int64_t p, const float *mu, double rmse[2])
{
    const int64_t voxels = nir_dataset_voxels(d);
    const uint8_t *label = d->label + p * voxels;
    double sum[2] = { 0, 0 }, count = 0;
    for (int64_t v = 0; v < voxels; ++v) {
        if (!label[v]) continue;
        count += 1;
        for (int k = 0; k < 2; ++k) {
            const double error = (double)mu[2 * v + k] - (double)d->property[(p * NIR_LABELS + label[v] - 1) * 2 + k];
            sum[k] += error * error;
        }
    }
    for (int k = 0; k < 2; ++k) rmse[k] = count > 0 ? sqrt(sum[k] / count) : 0;
}

/* ---- reconstruction -------------------------------------------------------------------------------- */

/* The two trained networks. Without a transformer it encodes and decodes the true volume: the best that the decoder can give. */
typedef struct nir_predictor {
    const nir_settings *settings;
    const nir_scaling *scaling;
    dot_context *ctx;
    nir_autoencoder *autoencoder;
    nir_transformer *transformer;
    const nir_fits *fits;               /* of the dataset; set by the caller where the settings ask for it */
    nir_token_batch tokens;
    nir_volume_batch volume;
    float *z;
} nir_predictor;

static bool nir_predictor_create(nir_predictor *q, const nir_settings *s, const nir_scaling *c, dot_context *ctx, nir_autoencoder *a,
                                 nir_transformer *t, const nir_dataset *d)
{
    const int64_t positions = s->average, pairs = d->pairs;
    const int64_t tokens = s->eval_tokens && s->eval_tokens < pairs ? s->eval_tokens : pairs;
    memset(q, 0, sizeof *q);
    q->settings = s;
    q->scaling = c;
    q->ctx = ctx;
    q->autoencoder = a;
    q->transformer = t;
    q->z = (float *)malloc(2 * (size_t)nir_dataset_voxels(d) * sizeof(float));
    return q->z && nir_volume_batch_create(&q->volume, positions, d->grid.n) && nir_token_batch_create(&q->tokens, s, positions, tokens, d);
}

static void nir_predictor_free(nir_predictor *q)
{
    nir_token_batch_free(&q->tokens);
    nir_volume_batch_free(&q->volume);
    free(q->z);
}

/* Positions are spread over the 48 symmetries; the first is the identity. */
static int nir_position(const nir_settings *s, int64_t i) { return (int)(i * 48 / s->average); }

/* Adds position i of the batch, turned back, to the mean in q->z. */
static void nir_predictor_add(nir_predictor *q, const nir_dataset *d, const float *volume, int64_t i)
{
    const nir_symmetry turn = nir_symmetry_of(nir_position(q->settings, i));
    const int n = d->grid.n;
    const float share = 1.0f / (float)q->settings->average;
    volume += 2 * i * nir_dataset_voxels(d);
    for (int z = 0; z < n; ++z)
        for (int y = 0; y < n; ++y)
            for (int x = 0; x < n; ++x, volume += 2) {
                const int64_t v = nir_symmetry_voxel(&turn, n, x, y, z);
                q->z[2 * v] += share * volume[0];
                q->z[2 * v + 1] += share * volume[1];
            }
}

/* Reconstructs phantom p, mu [n^3][2] in mm^-1 with 0 in air, from its measurements with the noise of `epoch`. Uses step memory. */
static bool nir_predict(nir_predictor *q, const nir_dataset *d, int64_t p, int64_t epoch, float *mu)
{
    const nir_settings *s = q->settings;
    const int64_t count = s->average, voxels = nir_dataset_voxels(d);
    dot_tensor *latent;
    const bool frozen = q->autoencoder->frozen;
    dot_eval_begin(q->ctx);
    q->autoencoder->frozen = true;
    if (q->transformer && q->transformer->image) q->transformer->image->frozen = true;
    for (int64_t i = 0; i < count; ++i) {
        if (q->transformer) nir_token_sample(&q->tokens, s, q->scaling, d, q->fits, p, i, nir_position(s, i), epoch, false);
        else nir_volume_batch_set(&q->volume, i, d, q->scaling, p, nir_position(s, i), 1);
    }
    if (q->transformer) {
        const nir_tokens in = nir_token_tensors(q->ctx, s, &q->tokens);
        latent = nir_transformer_forward(q->transformer, &in);
    } else {
        latent = nir_encode(q->autoencoder, nir_volume_input(q->ctx, &q->volume, count));
    }
    dot_tensor *volume = nir_decode(q->autoencoder, latent);
    q->autoencoder->frozen = frozen;
    if (q->transformer && q->transformer->image) q->transformer->image->frozen = false;
    const float *out = (const float *)dot_tensor_data(volume, 0);
    if (!out) return false;
    memset(q->z, 0, 2 * (size_t)voxels * sizeof(float));
    for (int64_t i = 0; i < count; ++i) nir_predictor_add(q, d, out, i);
    nir_volume_raw(d, q->scaling, p, q->z, mu);
    return true;
}

/* Mean in-tissue RMSE over a dataset, and the metric by which models are chosen: both channels over their deviation, weighted as the
   loss is. */
static bool nir_predictor_score(nir_predictor *q, const nir_dataset *d, double *metric, double rmse[2])
{
    float *mu = (float *)malloc(2 * (size_t)nir_dataset_voxels(d) * sizeof(float));
    double sum[2] = { 0, 0 }, one[2];
    bool good = mu != NULL;
    for (int64_t p = 0; p < d->count && good; ++p) {
        good = nir_predict(q, d, p, NIR_EVAL_EPOCH, mu);
        if (good) nir_tissue_rmse(d, p, mu, one);
        for (int k = 0; k < 2 && good; ++k) sum[k] += one[k];
    }
    free(mu);
    for (int k = 0; k < 2; ++k) rmse[k] = sum[k] / (double)d->count;
    *metric = q->settings->weight_mua * rmse[0] / q->scaling->deviation[0] + q->settings->weight_mus * rmse[1] / q->scaling->deviation[1];
    return good;
}

/* ---- stage 1 ------------------------------------------------------------------------------------------ */

/* What a stage trains with. */
typedef struct nir_workshop {
    const nir_dataset *train, *val;
    const nir_scaling *scaling;
    nir_autoencoder *autoencoder;
    nir_transformer *transformer;
    nir_volume_batch volume;
    nir_token_batch tokens;
    nir_predictor predictor;
    nir_fits train_fits, val_fits;
    int64_t latent_epochs;              /* stage 2: epochs before the end-to-end part */
} nir_workshop;

static dot_tensor *nir_stage1_loss(nir_stage *t, int64_t epoch, const int64_t *sample)
{
    nir_workshop *w = (nir_workshop *)t->user;
    const nir_settings *s = t->settings;
    for (int64_t i = 0; i < t->batch; ++i)
        nir_volume_batch_set(&w->volume, i, w->train, w->scaling, sample[i], nir_sample_symmetry(s, epoch, sample[i]), s->tumour_weight);
    dot_tensor *x = nir_volume_input(t->ctx, &w->volume, t->batch);
    return nir_volume_loss(s, w->scaling, NULL, dot_forward(w->autoencoder->layer, x), x, nir_weight_input(t->ctx, &w->volume, t->batch));
}

static bool nir_stage_validate(nir_stage *t, double *metric, double rmse[2])
{
    nir_workshop *w = (nir_workshop *)t->user;
    return nir_predictor_score(&w->predictor, w->val, metric, rmse);
}

static dot_schedule nir_stage1_schedule(const nir_settings *s, int64_t total)
{
    dot_schedule schedule = dot_schedule_constant();
    if (s->schedule1 == 0) {
        schedule = dot_schedule_one_cycle(total);
        schedule.peak_at = fmax(s->pct_start, fmin(0.9, 2 / (double)total));        /* a run of a few steps has a peak too */
        schedule.div = s->div;
        schedule.final_div = s->final_div;
    } else if (s->schedule1 == 1) {
        schedule = dot_schedule_warmup_cosine(total, (int64_t)(s->warmup * (double)total), s->floor);
    }
    return schedule;
}

static dot_algorithm nir_algorithm(const nir_settings *s) { return s->optimizer ? DOT_ADAM : DOT_ADAMW; }

static bool nir_stage1_open(nir_stage *t, const char *run)
{
    nir_workshop *w = (nir_workshop *)t->user;
    const nir_settings *s = t->settings;
    dot_optimizer_options o = dot_optimizer_defaults(nir_algorithm(s));
    o.lr = s->lr1;
    o.weight_decay = s->decay1;
    o.beta1 = s->beta1_1;
    o.beta2 = s->beta2_1;
    t->name = "stage1";
    t->layer = w->autoencoder->layer;
    t->optimizer = dot_optimizer_create(t->ctx, t->layer, &o);
    t->epochs = s->epochs1;
    t->batch = s->batch1;
    t->samples = w->train->count;
    t->patience = s->patience1;
    t->loss = nir_stage1_loss;
    t->validate = nir_stage_validate;
    t->cycle_momentum = s->cycle_momentum && s->schedule1 == 0;
    if (!nir_stage_open(t, run)) return false;
    t->schedule = nir_stage1_schedule(s, t->epochs * t->steps);
    char wrong[256];
    if (dot_schedule_invalid(&t->schedule, wrong, sizeof wrong))
        return nir_say(t->error, sizeof t->error, "stage1: %lld steps in all: %s", (long long)(t->epochs * t->steps), wrong);
    return (nir_volume_batch_create(&w->volume, t->batch, w->train->grid.n) &&
            nir_predictor_create(&w->predictor, s, w->scaling, t->ctx, w->autoencoder, NULL, w->val)) ||
           nir_say(t->error, sizeof t->error, "stage1: out of memory");
}

/* ---- stage 2 ------------------------------------------------------------------------------------------ */

/* First the latent of the frozen encoder is the target; at the end, through the frozen decoder, the volume. */
static dot_tensor *nir_stage2_loss(nir_stage *t, int64_t epoch, const int64_t *sample)
{
    nir_workshop *w = (nir_workshop *)t->user;
    const nir_settings *s = t->settings;
    for (int64_t i = 0; i < t->batch; ++i) {
        const int symmetry = nir_sample_symmetry(s, epoch, sample[i]);
        nir_volume_batch_set(&w->volume, i, w->train, w->scaling, sample[i], symmetry, s->tumour_weight);
        nir_token_sample(&w->tokens, s, w->scaling, w->train, &w->train_fits, sample[i], i, symmetry, epoch, true);
    }
    const nir_tokens in = nir_token_tensors(t->ctx, s, &w->tokens);
    dot_tensor *x = nir_volume_input(t->ctx, &w->volume, t->batch), *latent = nir_transformer_forward(w->transformer, &in);
    if (epoch < w->latent_epochs) return dot_rmse_loss(latent, dot_detach(nir_encode(w->autoencoder, x)));
    return nir_volume_loss(s, w->scaling, w->autoencoder, nir_decode(w->autoencoder, latent), x,
                           nir_weight_input(t->ctx, &w->volume, t->batch));
}

static dot_schedule nir_stage2_schedule(const nir_settings *s, int64_t total)
{
    int64_t warmup = s->warmup_steps ? s->warmup_steps : (int64_t)(s->warmup * (double)total);
    if (warmup >= total) warmup = total / 2;
    dot_schedule schedule = dot_schedule_warmup_cosine(total, warmup, s->floor);
    schedule.start = warmup ? 1.0 / (double)warmup : 0;
    return schedule;
}

static bool nir_stage2_open(nir_stage *t, const char *run)
{
    nir_workshop *w = (nir_workshop *)t->user;
    const nir_settings *s = t->settings;
    const dot_parameter_group no_decay = { NULL, DOT_KIND_BIAS | DOT_KIND_NORM | DOT_KIND_EMBEDDING, s->lr2, 0 };
    dot_optimizer_options o = dot_optimizer_defaults(nir_algorithm(s));
    o.lr = s->lr2;
    o.weight_decay = s->decay2;
    o.beta1 = s->beta1_2;
    o.beta2 = s->beta2_2;
    o.groups = &no_decay;
    o.group_count = 1;
    t->name = "stage2";
    t->layer = w->transformer->layer;
    t->optimizer = dot_optimizer_create(t->ctx, t->layer, &o);
    t->epochs = s->epochs2;
    t->batch = s->batch2;
    t->samples = w->train->count;
    t->patience = s->patience2;
    t->loss = nir_stage2_loss;
    t->validate = nir_stage_validate;
    w->latent_epochs = t->epochs - llround(s->end_to_end * (double)t->epochs);
    if (!nir_stage_open(t, run)) return false;
    t->schedule = nir_stage2_schedule(s, t->epochs * t->steps);
    return (nir_volume_batch_create(&w->volume, t->batch, w->train->grid.n) &&
            nir_token_batch_create(&w->tokens, s, t->batch, s->tokens < w->train->pairs ? s->tokens : w->train->pairs, w->train) &&
            nir_predictor_create(&w->predictor, s, w->scaling, t->ctx, w->autoencoder, w->transformer, w->val) &&
            (w->predictor.fits = &w->val_fits)) ||
           nir_say(t->error, sizeof t->error, "stage2: out of memory");
}

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#endif
