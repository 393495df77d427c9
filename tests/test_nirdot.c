/* The program nirdot from end to end at the smoke size: every command finishes and leaves the files that it promises, training that is
   killed and resumed gives the bits of training that is not, for any number of threads, and bad input is told. Run from the
   repository's root; the program lies beside this one. About 15 seconds of processor time. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "examples/json.h"

static char programs[512];          /* the folder of this program */

/* Runs nirdot, after the words of `before`, with its output in a log; returns its exit status, -1 when it was killed. */
static int run(const char *before, const char *arguments)
{
    char command[2048];
    snprintf(command, sizeof command, "cd %s && %s ./nirdot %s > nirdot.log 2>&1", programs, before, arguments);
    const int status = system(command);
    return status % 256 ? -1 : status / 256;
}

static char *read_text(const char *name, size_t *size)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s", programs, name);
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s is missing", path);
    char *text = (char *)calloc(1, 1 << 22);
    assert_non_null(text);
    *size = fread(text, 1, (1 << 22) - 1, f);
    fclose(f);
    return text;
}

static void require_success(int status)
{
    size_t size;
    if (status == 0) return;
    char *log = read_text("nirdot.log", &size);
    fail_msg("exit status %d: %.600s", status, log);
}

static void remove_folder(const char *folder)
{
    char command[1024];
    snprintf(command, sizeof command, "rm -rf %s/%s", programs, folder);
    assert_int_equal(system(command), 0);
}

static void require_file(const char *name, size_t least)
{
    size_t size;
    char *text = read_text(name, &size);
    if (size < least) fail_msg("%s has %zu bytes", name, size);
    free(text);
}

/* ---- end to end ----------------------------------------------------------------------------------------------------- */

static double mean_of(const json_document *d, const char *method, const char *channel, const char *score)
{
    const json_node *m = json_find(d, d->nodes, method), *c = json_find(d, m, channel), *s = json_find(d, c, score);
    if (!s) fail_msg("metrics.json has no %s, %s, %s", method, channel, score);
    return json_get_number(d, s, "mean", NAN);
}

/* The autoencoder knows the truth and five epochs: it must beat the mean of the training data; zeros have the truth's own norm. */
static void check_metrics(void)
{
    size_t size;
    json_document d;
    char *text = read_text("nirdot_smoke/evaluate/metrics.json", &size);
    assert_true(json_parse(&d, text, size));
    for (int k = 0; k < 2; ++k) {
        const char *channel = k ? "mu_s" : "mu_a";
        const double zeros = mean_of(&d, "zeros", channel, "rmse"), mean = mean_of(&d, "train mean", channel, "rmse");
        const double ceiling = mean_of(&d, "autoencoder ceiling", channel, "rmse"), learned = mean_of(&d, "learned", channel, "rmse");
        const double homogeneous = mean_of(&d, "homogeneous fit", channel, "rmse");
        print_message("    RMSE of %s: zeros %.3e, mean %.3e, homogeneous %.3e, autoencoder %.3e, learned %.3e\n", channel, zeros, mean, homogeneous,
                      ceiling, learned);
        assert_true(mean < zeros && ceiling < mean && learned < mean && homogeneous < mean);
    }
    json_release(&d);
    free(text);
}

static void test_all(void **state)
{
    (void)state;
    remove_folder("nirdot_smoke");
    require_success(run("", "all --size smoke --threads 1 --out nirdot_smoke --quiet"));
    static const char *const files[] = { "config.json", "normalisation.json", "report.md", "data/test.safetensors", "stage1/log.jsonl",
        "stage1/model.safetensors", "stage1/state.json", "stage2/log.jsonl", "stage2/model.safetensors", "evaluate/table.txt",
        "figures/slices-0.png", "figures/learning-stage2.svg", "figures/attention.png" };
    for (int i = 0; i < (int)(sizeof files / sizeof *files); ++i) {
        char name[128];
        snprintf(name, sizeof name, "nirdot_smoke/%s", files[i]);
        require_file(name, 100);
    }
    check_metrics();
    require_success(run("", "reconstruct --config nirdot_smoke/config.json --index 3"));
    require_file("nirdot_smoke/reconstruct/3/learned-mua.npy", 128 + 4 * 16 * 16 * 16);
    require_file("nirdot_smoke/reconstruct/3/truth-mus.nii", 352 + 4 * 16 * 16 * 16);
}

/* ---- resuming ------------------------------------------------------------------------------------------------------- */

/* The values of the records of steps, one a line; what was logged again after a crash counts as it was logged last. */
enum { MOST_STEPS = 256, MOST_VALUES = 512 };
static char *steps_of(const char *name)
{
    static char values[MOST_STEPS][MOST_VALUES];
    size_t size;
    char *text = read_text(name, &size), *out = (char *)calloc(MOST_STEPS, MOST_VALUES);
    int count = 0;
    assert_non_null(out);
    for (char *line = text, *end; (end = strchr(line, '\n')) != NULL; line = end + 1) {
        *end = 0;
        const char *found = strstr(line, "\"values\""), *step = strstr(line, "\"step\"");
        if (!found || !step || !strstr(found, "train/loss")) continue;
        const int k = (int)strtol(step + 7, NULL, 10);
        assert_true(k >= 0 && k < MOST_STEPS && k <= count && strlen(found) < MOST_VALUES);
        snprintf(values[k], MOST_VALUES, "%s", found);
        count = k + 1;
    }
    for (int k = 0; k < count; ++k) {
        strcat(out, values[k]);
        strcat(out, "\n");
    }
    free(text);
    return out;
}

static void compare_runs(const char *a, const char *b, const char *stage)
{
    char name[2][128];
    size_t size[2];
    char *text[2];
    const char *const folder[2] = { a, b };
    for (int i = 0; i < 2; ++i) {
        snprintf(name[i], sizeof name[i], "%s/%s/model.safetensors", folder[i], stage);
        text[i] = read_text(name[i], &size[i]);
    }
    assert_int_equal(size[0], size[1]);
    assert_memory_equal(text[0], text[1], size[0]);
    for (int i = 0; i < 2; ++i) {
        free(text[i]);
        snprintf(name[i], sizeof name[i], "%s/%s/log.jsonl", folder[i], stage);
        text[i] = steps_of(name[i]);
    }
    assert_true(strlen(text[0]) > 1000);
    assert_string_equal(text[0], text[1]);
    free(text[0]);
    free(text[1]);
}

#define LITTLE "--size smoke --data nirdot_smoke/data --ema 0.99 --accumulate 2 --dropout2 0.1 --epochs1 2 --epochs2 2 --no-fit --no-image --quiet "

/* Killed after ever longer times until one run comes to its end; each begins where the last one has saved. */
static int run_killed(const char *arguments)
{
    int kills = 0;
    for (double seconds = 0.1; seconds < 500; seconds *= 1.8) {
        char before[64];
        snprintf(before, sizeof before, "timeout -s KILL %.2f", seconds);
        const int status = run(before, arguments);
        if (status == 0) return kills;
        if (status != -1 && status != 137) require_success(status);
        ++kills;
    }
    fail_msg("never finished");
    return kills;
}

static void test_resume(void **state)
{
    (void)state;
    remove_folder("nirdot_whole");
    remove_folder("nirdot_killed");
    require_success(run("", "stage1 --threads 1 --out nirdot_whole " LITTLE));
    require_success(run("", "stage2 --threads 1 --out nirdot_whole " LITTLE));
    int kills = run_killed("stage1 --threads 2 --out nirdot_killed " LITTLE);
    compare_runs("nirdot_whole", "nirdot_killed", "stage1");
    kills += run_killed("stage2 --threads 2 --out nirdot_killed " LITTLE);
    compare_runs("nirdot_whole", "nirdot_killed", "stage2");
    print_message("    killed %d times\n", kills);
    assert_true(kills > 0);
}

/* ---- bad input ------------------------------------------------------------------------------------------------------ */

static void expect(const char *arguments, int status, const char *message)
{
    size_t size;
    const int got = run("", arguments);
    char *log = read_text("nirdot.log", &size);
    if (got != status || !strstr(log, message)) fail_msg("nirdot %s: exit status %d, %.300s", arguments, got, log);
    free(log);
}

static void test_errors(void **state)
{
    (void)state;
    char path[600];
    snprintf(path, sizeof path, "%s/nirdot_bad.json", programs);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs("{ \"epochs1\": 3, \"epoch2\": 4 }", f);
    fclose(f);
    expect("", 2, "a command is missing");
    expect("train", 2, "'train' is no command");
    expect("stage1 --epochs 3", 2, "'--epochs' is no option");
    expect("stage1 --lr1 fast", 2, "lr1: 'fast' is no number from 0 to 1000");
    expect("stage1 --epochs1 2.5", 2, "whole number");
    expect("stage1 --norm layer", 2, "none of batch|group");
    expect("stage1 --no-lr1 3", 2, "is no option");
    expect("stage1 --config nirdot_bad.json", 2, "'epoch2' is no setting");
    expect("stage1 --config nirdot_none.json", 2, "cannot read nirdot_none.json");
    expect("stage1 --out nirdot_empty", 1, "run 'nirdot generate' first");
    expect("stage1 --size small --data nirdot_smoke/data --out nirdot_empty", 1, "a grid of 16 voxels a side, --size small needs 32");
    expect("stage2 --size smoke --data nirdot_smoke/data --out nirdot_empty", 1, "nirdot_empty/normalisation.json");
    expect("reconstruct --config nirdot_smoke/config.json --index 20", 1, "has the phantoms 0 to 19");
    expect("stage2 --config nirdot_smoke/config.json --no-resume --latent 16", 1, "to_latent");
    expect("generate --size smoke --out /proc/nirdot", 1, "cannot make the folder");
    expect("--help", 0, "usage: nirdot");
    remove_folder("nirdot_empty");
    remove(path);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_all), cmocka_unit_test(test_resume), cmocka_unit_test(test_errors) };
    const char *slash = argc > 0 ? strrchr(argv[0], '/') : NULL;
    snprintf(programs, sizeof programs, "%.*s", slash ? (int)(slash - argv[0]) : 1, slash ? argv[0] : ".");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
