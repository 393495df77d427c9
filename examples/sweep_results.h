/*
 * sweep_results.h - the results folder of a sweep.
 *
 *   settings.json       what determines the numbers; a folder holds runs of one
 *                       setting, but of any variants, multipliers and seeds
 *   runs.jsonl          the log: one line for each finished run, written by one
 *                       write(2) and flushed to the disk, so that a crash loses
 *                       no finished run
 *   B3_AdamW_Cosine.json, ...   the results by variant, sorted; the figures are
 *                       drawn from these
 */
#ifndef SWEEP_RESULTS_H
#define SWEEP_RESULTS_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "json.h"
#include "sweep_run.h"

/* ---- a set of runs ------------------------------------------------------ */

typedef struct {
    sweep_run **run;
    int count, capacity;
} sweep_runs;

static void sweep_runs_add(sweep_runs *set, sweep_run *run)
{
    if (set->count == set->capacity) {
        set->capacity = 2 * set->capacity + 64;
        sweep_run **grown = (sweep_run **)sweep_alloc((size_t)set->capacity, sizeof *grown);
        if (set->count) memcpy(grown, set->run, (size_t)set->count * sizeof *grown);
        free(set->run);
        set->run = grown;
    }
    set->run[set->count++] = run;
}

static void sweep_runs_free(sweep_runs *set)
{
    for (int i = 0; i < set->count; ++i) sweep_run_free(set->run[i]);
    free(set->run);
    memset(set, 0, sizeof *set);
}

/* By variant, seed, learning rate and weight decay: the order in which runs are started and written. */
static int sweep_run_compare(const void *a, const void *b)
{
    const sweep_run *p = *(sweep_run *const *)a, *q = *(sweep_run *const *)b;
    if (p->variant != q->variant) return p->variant < q->variant ? -1 : 1;
    if (p->seed != q->seed) return p->seed < q->seed ? -1 : 1;
    if (p->lr != q->lr) return p->lr < q->lr ? -1 : 1;
    return p->decay < q->decay ? -1 : p->decay > q->decay;
}

static const sweep_run *sweep_runs_find(const sweep_runs *set, const sweep_run *wanted)
{
    for (int i = 0; i < set->count; ++i)
        if (sweep_run_compare(&set->run[i], &wanted) == 0) return set->run[i];
    return NULL;
}

/* The epoch (0, 1, ...) with the lowest of the losses at `first`, an element of r->epoch[0]; -1 if there is none. */
static int sweep_best_epoch(const sweep_run *r, const double *first)
{
    const int stride = sizeof(sweep_epoch) / sizeof(double);
    int best = -1;
    for (int i = 0; i < r->epochs; ++i)
        if (isfinite(first[i * stride]) && (best < 0 || first[i * stride] < first[best * stride])) best = i;
    return best;
}

static double sweep_final_test(const sweep_run *r) { return r->diverged ? NAN : r->epoch[r->epochs - 1].test; }

/* ---- a run as JSON ------------------------------------------------------ */

/* Members name_loss and name_epoch (1, 2, ...) for the best epoch; null for a run without one. */
static void sweep_put_best(json_writer *w, const char *name, const sweep_run *r, const double *first)
{
    const int best = sweep_best_epoch(r, first);
    const double loss = best < 0 ? NAN : first[best * (int)(sizeof(sweep_epoch) / sizeof(double))];
    char key[40];
    snprintf(key, sizeof key, "best_%s_loss", name);
    json_put_number(w, key, loss);
    snprintf(key, sizeof key, "best_%sepoch", strcmp(name, "test") == 0 ? "" : "val_");
    json_put_number(w, key, best < 0 ? (double)NAN : best + 1);
}

/* The losses where a restart period ends: for 100 epochs after 10, 30 and 70. In shorter runs the end may fall inside an
   epoch; then the losses are those after the nearest one. */
static void sweep_put_cycles(json_writer *w, const sweep_settings *s, const sweep_run *r)
{
    static const int ends[] = { 10, 30, 70 };
    json_key(w, "cycle_ends");
    json_open(w, '[');
    for (int i = 0; i < 3; ++i) {
        const double end = (double)sweep_scaled(s, ends[i]) / (double)sweep_batches(s);
        const int epoch = end < 1 ? 1 : (int)lround(end);
        if (epoch > r->epochs) continue;
        json_open(w, '{');
        json_put_number(w, "cycle_end", end);
        json_put_number(w, "epoch", epoch);
        json_put_number(w, "train_loss", r->epoch[epoch - 1].train);
        json_put_number(w, "test_loss", r->epoch[epoch - 1].test);
        json_put_number(w, "val_loss", r->epoch[epoch - 1].validation);
        json_close(w, '}');
    }
    json_close(w, ']');
}

static void sweep_put_run(json_writer *w, const sweep_settings *s, const sweep_run *r)
{
    const sweep_variant *v = &sweep_variants[r->variant];
    const sweep_epoch none = { NAN, NAN, NAN, 0 }, *first = r->epoch;
    const sweep_epoch *last = r->diverged ? &none : &first[r->epochs - 1];
    const int best_val = sweep_best_epoch(r, &first->validation);
    const int stride = sizeof *first / sizeof(double), mstride = sizeof *r->measurement / sizeof(double);
    json_open(w, '{');
    json_put_string(w, "optimizer_id", v->id);
    json_put_number(w, "lr_multiplier", r->lr);
    json_put_number(w, "wd_multiplier", r->decay);
    json_put_number(w, "learning_rate", v->base_lr * r->lr);
    json_put_number(w, "weight_decay", sweep_base_decay * r->decay);
    json_put_number(w, "seed", (double)r->seed);
    json_put_string(w, "status", r->diverged ? "diverged" : "ok");
    json_put_number(w, "final_train_loss", last->train);
    json_put_number(w, "final_test_loss", last->test);
    json_put_number(w, "final_val_loss", last->validation);
    sweep_put_best(w, "test", r, &first->test);
    sweep_put_best(w, "val", r, &first->validation);
    json_put_number(w, "test_loss_at_best_val", best_val < 0 ? NAN : first[best_val].test);
    if (v->schedule == DOT_SCHEDULE_WARM_RESTARTS) sweep_put_cycles(w, s, r);
    json_put_numbers(w, "epoch_train_losses", &first->train, r->epochs, stride);
    json_put_numbers(w, "epoch_test_losses", &first->test, r->epochs, stride);
    json_put_numbers(w, "epoch_val_losses", &first->validation, r->epochs, stride);
    json_put_numbers(w, "epoch_times", &first->seconds, r->epochs, stride);
    json_put_numbers(w, "log_steps", &r->measurement->step, r->measurements, mstride);
    json_put_numbers(w, "log_lrs", &r->measurement->lr, r->measurements, mstride);
    json_put_numbers(w, "log_grad_norms", &r->measurement->grad_norm, r->measurements, mstride);
    json_put_numbers(w, "log_weight_norms", &r->measurement->weight_norm, r->measurements, mstride);
    json_put_number(w, "runtime_seconds", r->seconds);
    json_close(w, '}');
}

/* The run that `node` describes; NULL if it is not one. */
static sweep_run *sweep_get_run(const json_document *d, const json_node *node)
{
    const json_node *epochs = json_find(d, node, "epoch_test_losses"), *steps = json_find(d, node, "log_steps");
    const int variant = sweep_find(json_get_string(d, node, "optimizer_id", ""));
    const double lr = json_get_number(d, node, "lr_multiplier", NAN), seed = json_get_number(d, node, "seed", NAN);
    const double decay = json_get_number(d, node, "wd_multiplier", NAN);
    const int stride = sizeof(sweep_epoch) / sizeof(double), mstride = sizeof(sweep_measurement) / sizeof(double);
    if (variant < 0 || !epochs || !steps || epochs->count < 1 || !(lr > 0) || !(decay >= 0) || !(seed >= 0)) return NULL;
    sweep_run *r = sweep_run_create(variant, lr, decay, (uint64_t)seed);
    r->diverged = strcmp(json_get_string(d, node, "status", ""), "ok") != 0;
    r->seconds = json_get_number(d, node, "runtime_seconds", 0);
    r->epochs = epochs->count;
    r->measurements = steps->count;
    r->epoch = (sweep_epoch *)sweep_alloc((size_t)r->epochs, sizeof *r->epoch);
    r->measurement = (sweep_measurement *)sweep_alloc((size_t)r->measurements, sizeof *r->measurement);
    sweep_epoch *e = r->epoch;
    sweep_measurement *m = r->measurement;
    const bool whole =
        json_get_numbers(d, node, "epoch_train_losses", &e->train, r->epochs, stride) &&
        json_get_numbers(d, node, "epoch_test_losses", &e->test, r->epochs, stride) &&
        json_get_numbers(d, node, "epoch_val_losses", &e->validation, r->epochs, stride) &&
        json_get_numbers(d, node, "epoch_times", &e->seconds, r->epochs, stride) &&
        json_get_numbers(d, node, "log_steps", &m->step, r->measurements, mstride) &&
        json_get_numbers(d, node, "log_lrs", &m->lr, r->measurements, mstride) &&
        json_get_numbers(d, node, "log_grad_norms", &m->grad_norm, r->measurements, mstride) &&
        json_get_numbers(d, node, "log_weight_norms", &m->weight_norm, r->measurements, mstride) &&
        (r->diverged || isfinite(e[r->epochs - 1].test));
    if (whole) return r;
    sweep_run_free(r);
    return NULL;
}

/* ---- files -------------------------------------------------------------- */

/* The whole file with a zero behind it; NULL, with errno, when it cannot be read. */
static char *sweep_read_open(int fd, size_t *length)
{
    struct stat status;
    if (fstat(fd, &status) != 0) return NULL;
    char *text = (char *)sweep_alloc((size_t)status.st_size + 1, 1);
    for (*length = 0; *length < (size_t)status.st_size;) {
        const ssize_t got = pread(fd, text + *length, (size_t)status.st_size - *length, (off_t)*length);
        if (got < 0) {
            free(text);
            return NULL;
        }
        if (got == 0) break;
        *length += (size_t)got;
    }
    text[*length] = 0;
    return text;
}

static char *sweep_read_file(const char *path, size_t *length)
{
    const int fd = open(path, O_RDONLY);
    if (fd < 0) return NULL;
    char *text = sweep_read_open(fd, length);
    const int reason = errno;
    close(fd);
    errno = reason;
    return text;
}

static void sweep_sync_folder(const char *folder)
{
    int fd = open(folder, O_RDONLY);
    if (fd < 0) return;
    fsync(fd);
    close(fd);
}

/* Replaces folder/name: it is always the old or the new file, whole. */
static bool sweep_write_file(const char *folder, const char *name, const json_writer *w, char *error, size_t size)
{
    char path[1200], temporary[1220];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    snprintf(temporary, sizeof temporary, "%s.tmp", path);
    if (w->failed) return sweep_say(error, size, "%s: out of memory", path);
    FILE *file = fopen(temporary, "wb");
    if (!file) return sweep_say(error, size, "cannot write %s: %s", temporary, strerror(errno));
    bool good = fwrite(w->text, 1, w->length, file) == w->length && fflush(file) == 0 && fsync(fileno(file)) == 0;
    good = fclose(file) == 0 && good;
    if (!good || rename(temporary, path) != 0) {
        sweep_say(error, size, "cannot write %s: %s", path, strerror(errno));
        remove(temporary);
        return false;
    }
    sweep_sync_folder(folder);
    return true;
}

/* ---- settings.json ------------------------------------------------------ */

static void sweep_put_settings(json_writer *w, const sweep_settings *s, const sweep_data *data)
{
    static const char *const models[] = { "conv", "mlp" }, *const forms[] = { "paper", "torch" },
                      *const norms[] = { "paper", "seed" };
    char hash[20];
    snprintf(hash, sizeof hash, "%016llx", (unsigned long long)data->hash);
    json_open(w, '{');
    json_line(w), json_put_string(w, "model", models[s->model]);
    json_line(w), json_put_number(w, "samples", (double)s->samples);
    json_line(w), json_put_number(w, "validation_samples", (double)s->validation);
    json_line(w), json_put_number(w, "test_samples", (double)s->test_samples);
    json_line(w), json_put_number(w, "epochs", (double)s->epochs);
    json_line(w), json_put_number(w, "batch_size", (double)s->batch);
    json_line(w), json_put_number(w, "steps_per_epoch", (double)sweep_batches(s));
    json_line(w), json_put_string(w, "decay", forms[s->decay]);
    json_line(w), json_put_string(w, "decay_norm", norms[s->decay_norm]);
    json_line(w), json_put_number(w, "log_every", (double)s->log_every);
    json_line(w), json_put_string(w, "data_fnv1a", hash);
    json_line(w), json_put_string(w, "dotopt", DOTOPT_VERSION);
    json_line(w), json_put_string(w, "kernels", data->kernels);
    json_line(w), json_close(w, '}');
}

static const char *sweep_value_text(const json_node *node, char *buffer, size_t size)
{
    if (!node) return "not given";
    if (node->type == JSON_STRING) return node->text;
    snprintf(buffer, size, "%.17g", node->number);
    return buffer;
}

/* Compares the settings of a folder with these, and names the first that differs. */
static bool sweep_settings_equal(const char *folder, const char *text, size_t length, const json_writer *mine,
                                 char *error, size_t size)
{
    json_document theirs = {0}, ours = {0};
    bool equal = json_parse(&theirs, text, length) && theirs.nodes[0].type == JSON_OBJECT;
    if (!equal)
        sweep_say(error, size, "%s/settings.json is damaged: %s", folder, theirs.error ? theirs.error : "no object");
    if (equal) json_parse(&ours, mine->text, mine->length);
    for (int i = equal ? ours.nodes[0].child : -1; equal && i >= 0; i = ours.nodes[i].next) {
        char a[40], b[40];
        const json_node *other = json_find(&theirs, theirs.nodes, ours.nodes[i].key);
        const char *now = sweep_value_text(&ours.nodes[i], a, sizeof a), *then = sweep_value_text(other, b, sizeof b);
        equal = strcmp(now, then) == 0;
        if (!equal)
            sweep_say(error, size, "%s holds runs with other settings: %s was %s, now it is %s; choose another --out, "
                      "or delete them with --no-resume --force", folder, ours.nodes[i].key, then, now);
    }
    json_release(&ours);
    json_release(&theirs);
    return equal;
}

/* ---- runs.jsonl --------------------------------------------------------- */

typedef struct {
    char folder[1024];
    int fd;                 /* of runs.jsonl, -1: closed */
} sweep_log;

static void sweep_log_close(sweep_log *log)
{
    if (log->fd >= 0) close(log->fd);
    log->fd = -1;
}

/* Reads the runs in `text`, a line each. What is not a run is skipped with a warning. */
static void sweep_read_lines(const char *path, char *text, sweep_runs *runs)
{
    int number = 0;
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        json_document d;
        *end = 0;
        ++number;
        sweep_run *r = json_parse(&d, line, (size_t)(end - line)) ? sweep_get_run(&d, d.nodes) : NULL;
        if (!r)
            fprintf(stderr, "fashion_sweep: %s:%d is skipped: %s\n", path, number, d.error ? d.error : "it is not a run");
        else if (sweep_runs_find(runs, r))
            sweep_run_free(r);
        else
            sweep_runs_add(runs, r);
        json_release(&d);
    }
}

/* Removes the files in folder/inner whose names end in `ending`. */
static void sweep_delete_files(const char *folder, const char *inner, const char *ending)
{
    char path[1400];
    snprintf(path, sizeof path, "%s/%s", folder, inner);
    DIR *files = opendir(path);
    if (!files) return;
    for (const struct dirent *file; (file = readdir(files)) != NULL;) {
        const size_t length = strlen(file->d_name), end = strlen(ending);
        if (length <= end || strcmp(file->d_name + length - end, ending) != 0) continue;
        snprintf(path, sizeof path, "%s/%s/%s", folder, inner, file->d_name);
        remove(path);
    }
    closedir(files);
}

/* Removes what an earlier sweep left in the folder; the settings last, so that a folder with runs always has them. */
static void sweep_delete_results(const char *folder)
{
    static const char *const pictures[] = { "figures", "reconstructions" };
    char path[1200];
    for (int i = 0; i < 2; ++i) {
        sweep_delete_files(folder, pictures[i], ".png");
        sweep_delete_files(folder, pictures[i], ".svg");
    }
    for (int i = 0; i < SWEEP_VARIANTS; ++i) {
        snprintf(path, sizeof path, "%s/%s_%s.json", folder, sweep_variants[i].id, sweep_variants[i].name);
        remove(path);
    }
    snprintf(path, sizeof path, "%s/runs.jsonl", folder);
    remove(path);
    snprintf(path, sizeof path, "%s/settings.json", folder);
    remove(path);
}

/* Only one sweep at a time writes into a folder. The lock ends with the process, however that ends, but also when the
   process closes any descriptor of the file: it is opened only here. */
static bool sweep_log_lock(sweep_log *log, const char *path, char *error, size_t size)
{
    struct flock lock;
    memset(&lock, 0, sizeof lock);
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    log->fd = open(path, O_RDWR | O_APPEND | O_CREAT, 0666);
    if (log->fd < 0) return sweep_say(error, size, "cannot open %s: %s", path, strerror(errno));
    if (fcntl(log->fd, F_SETLK, &lock) == 0) return true;
    return sweep_say(error, size, "another sweep is writing into %s", log->folder);
}

/* Reads the finished runs. A last line without an end was being written when the machine or the program stopped: it is
   cut off, and its run is done again. */
static bool sweep_log_read(sweep_log *log, const char *path, sweep_runs *runs, char *error, size_t size)
{
    size_t length = 0, whole;
    char *text = sweep_read_open(log->fd, &length);
    if (!text) return sweep_say(error, size, "cannot read %s: %s", path, strerror(errno));
    for (whole = length; whole > 0 && text[whole - 1] != '\n'; --whole) {}
    const bool good = whole == length || ftruncate(log->fd, (off_t)whole) == 0;
    if (whole < length) fprintf(stderr, "fashion_sweep: %s ends in the middle of a run, which is done again\n", path);
    text[whole] = 0;
    sweep_read_lines(path, text, runs);
    free(text);
    return good || sweep_say(error, size, "cannot truncate %s: %s", path, strerror(errno));
}

/* Opens a results folder, and adds the runs that it holds to `runs`. */
static bool sweep_log_open(sweep_log *log, const char *folder, const sweep_settings *s, const sweep_data *data,
                           bool resume, bool force, sweep_runs *runs, char *error, size_t size)
{
    char log_path[1200], settings_path[1200];
    log->fd = -1;
    if (!cli_make_folder(folder, error, size)) return false;
    snprintf(log->folder, sizeof log->folder, "%s", folder);
    snprintf(log_path, sizeof log_path, "%s/runs.jsonl", folder);
    snprintf(settings_path, sizeof settings_path, "%s/settings.json", folder);
    if (!sweep_log_lock(log, log_path, error, size)) return false;

    size_t length = 0;
    char *old = sweep_read_file(settings_path, &length);
    const bool used = old || lseek(log->fd, 0, SEEK_END) > 0;
    if (used && !resume && !force)
        sweep_say(error, size, "%s already holds results; --no-resume needs an empty folder, or --force to delete them",
                  folder);
    else if (used && !old && resume)
        sweep_say(error, size, "%s has a runs.jsonl but no settings.json; choose another --out", folder);
    else if (used && !resume) {
        sweep_log_close(log);       /* the new log is a new file, with a lock of its own */
        sweep_delete_results(folder);
        sweep_log_lock(log, log_path, error, size);
        free(old);
        old = NULL;
    }
    json_writer w = {0};
    sweep_put_settings(&w, s, data);
    json_append_text(&w, "\n");
    bool good = log->fd >= 0 && !*error;
    if (good && !old) good = sweep_write_file(folder, "settings.json", &w, error, size);
    else if (good) good = sweep_settings_equal(folder, old, length, &w, error, size) &&
                          sweep_log_read(log, log_path, runs, error, size);
    json_free(&w);
    free(old);
    if (!good) sweep_log_close(log);
    return good;
}

/* Reads the finished runs of a folder, if it holds any, and changes nothing. */
static bool sweep_log_peek(const char *folder, const sweep_settings *s, const sweep_data *data, sweep_runs *runs,
                           char *error, size_t size)
{
    char log_path[1200], settings_path[1200];
    size_t length = 0, settings_length = 0;
    snprintf(log_path, sizeof log_path, "%s/runs.jsonl", folder);
    snprintf(settings_path, sizeof settings_path, "%s/settings.json", folder);
    char *settings = sweep_read_file(settings_path, &settings_length), *log = sweep_read_file(log_path, &length);
    json_writer w = {0};
    sweep_put_settings(&w, s, data);
    const bool good = !settings || sweep_settings_equal(folder, settings, settings_length, &w, error, size);
    if (good && settings && log) sweep_read_lines(log_path, log, runs);
    json_free(&w);
    free(settings);
    free(log);
    return good;
}

/* Appends a finished run. When this returns true, the run survives any crash. */
static bool sweep_log_run(sweep_log *log, const sweep_settings *s, const sweep_run *r, char *error, size_t size)
{
    json_writer w = {0};
    sweep_put_run(&w, s, r);
    json_append_text(&w, "\n");
    errno = 0;
    const bool good = !w.failed && write(log->fd, w.text, w.length) == (ssize_t)w.length && fdatasync(log->fd) == 0;
    json_free(&w);
    return good || sweep_say(error, size, "cannot write %s/runs.jsonl: %s", log->folder,
                             errno ? strerror(errno) : "the disk took only a part of the line");
}

/* ---- the results of a variant ------------------------------------------- */

static void sweep_put_config(json_writer *w, const sweep_settings *s, const sweep_variant *v)
{
    static const char *const modes[] = { "l2", "lr", "scheduled", "normalized" };
    const bool adafactor = v->algorithm == DOT_ADAFACTOR, factored = sweep_factored(v);
    json_open(w, '{');
    json_put_bool(w, "normalized_decay", v->decay == SWEEP_NORMALIZED);
    json_put_string(w, "lr_schedule", sweep_schedule_names[v->schedule]);
    json_put_bool(w, "factored", factored);
    json_put_number(w, "momentum", v->beta1);
    json_put_number(w, "clipping", factored ? 1.0 : NAN);
    json_line(w), json_put_string(w, "algorithm", dot_algorithm_name(v->algorithm));
    json_put_string(w, "dialect", factored ? "Shazeer, Stern 2018; matrices as [out, rest]" : "torch");
    json_put_number(w, "beta1", v->beta1);
    json_put_number(w, "base_lr", v->base_lr);
    json_put_number(w, "base_wd", sweep_base_decay);
    json_put_bool(w, "relative_step", adafactor);
    json_put_bool(w, "scale_parameter", factored);
    json_line(w), json_put_string(w, "decay_mode", modes[sweep_decay_mode(s, v)]);
    json_put_number(w, "decay_lr", v->decay == SWEEP_L2 || s->decay == SWEEP_TORCH ? NAN : sweep_decay_lr(v));
    if (sweep_note(v)) json_put_string(w, "note", sweep_note(v));
    json_close(w, '}');
}

/* Writes the variant's file from the runs of it in the set, in a fixed order. */
static bool sweep_write_variant(const char *folder, const sweep_settings *s, const sweep_data *data, int variant,
                                const sweep_runs *runs, char *error, size_t size)
{
    const sweep_variant *v = &sweep_variants[variant];
    sweep_runs sorted = {0};
    json_writer w = {0};
    char name[80];
    for (int i = 0; i < runs->count; ++i)
        if (runs->run[i]->variant == variant) sweep_runs_add(&sorted, runs->run[i]);
    if (sorted.count) qsort(sorted.run, (size_t)sorted.count, sizeof *sorted.run, sweep_run_compare);
    json_open(&w, '{');
    json_line(&w), json_put_string(&w, "optimizer_id", v->id);
    json_line(&w), json_put_string(&w, "optimizer_name", v->name);
    json_line(&w), json_key(&w, "config"), sweep_put_config(&w, s, v);
    json_line(&w), json_key(&w, "settings"), sweep_put_settings(&w, s, data);
    json_line(&w), json_key(&w, "results"), json_open(&w, '[');
    for (int i = 0; i < sorted.count; ++i) json_line(&w), sweep_put_run(&w, s, sorted.run[i]);
    json_line(&w), json_close(&w, ']');
    json_line(&w), json_close(&w, '}');
    json_append_text(&w, "\n");
    free(sorted.run);           /* the runs belong to the other set */
    snprintf(name, sizeof name, "%s_%s.json", v->id, v->name);
    const bool good = sweep_write_file(folder, name, &w, error, size);
    json_free(&w);
    return good;
}

/* Adds the runs in the variant's file. No file, no runs; `epochs` becomes what its runs were set to. */
static bool sweep_read_variant(const char *folder, int variant, sweep_runs *runs, double *epochs, char *error, size_t size)
{
    char path[1200];
    json_document d;
    size_t length = 0;
    snprintf(path, sizeof path, "%s/%s_%s.json", folder, sweep_variants[variant].id, sweep_variants[variant].name);
    char *text = sweep_read_file(path, &length);
    if (!text) return errno == ENOENT || sweep_say(error, size, "cannot read %s: %s", path, strerror(errno));
    const json_node *root = json_parse(&d, text, length) ? d.nodes : NULL, *results = json_find(&d, root, "results");
    bool good = results && results->type == JSON_ARRAY;
    if (!good) sweep_say(error, size, "%s: %s", path, d.error ? d.error : "there is no array \"results\"");
    else *epochs = json_get_number(&d, json_find(&d, root, "settings"), "epochs", NAN);
    for (int i = good ? results->child : -1; good && i >= 0; i = d.nodes[i].next) {
        sweep_run *r = sweep_get_run(&d, &d.nodes[i]);
        good = r && r->variant == variant;
        if (good) sweep_runs_add(runs, r);
        else sweep_run_free(r);
        if (!good) sweep_say(error, size, "%s: a result is not a run of %s", path, sweep_variants[variant].id);
    }
    json_release(&d);
    free(text);
    return good;
}

#endif
