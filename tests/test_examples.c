/* The two programs from end to end, on little data: they finish, are interrupted and go on to the same results, and leave
   the files that they promise. Run from the repository's root; the programs lie beside this one. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static char programs[512];          /* the folder of this program */

/* Runs a program beside this one with its output in a log; returns its exit status. */
static int run(const char *program, const char *arguments)
{
    char command[2048];
    snprintf(command, sizeof command, "%s/%s %s > %s/example.log 2>&1", programs, program, arguments, programs);
    int status = system(command);
    return status % 256 ? -1 : status / 256;
}

static char *read_text(const char *folder, const char *name)
{
    char path[1024];
    snprintf(path, sizeof path, "%s/%s/%s", programs, folder, name);
    FILE *f = fopen(path, "rb");
    if (!f)
        fail_msg("%s is missing", path);
    char *text = (char *)calloc(1, 1 << 22);
    assert_non_null(text);
    size_t size = fread(text, 1, (1 << 22) - 1, f);
    fclose(f);
    if (size < 200)
        fail_msg("%s has %zu bytes", path, size);
    return text;
}

static void remove_folder(const char *folder)
{
    char command[1024];
    snprintf(command, sizeof command, "rm -rf %s/%s", programs, folder);
    assert_int_equal(system(command), 0);
}

/* The numbers that follow `key` in the text, at most `most`, sorted. */
static int compare_numbers(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int numbers_after(const char *text, const char *key, double *values, int most)
{
    int count = 0;
    while (count < most && (text = strstr(text, key)) != NULL)
        values[count++] = strtod(text += strlen(key), NULL);
    qsort(values, (size_t)count, sizeof *values, compare_numbers);
    return count;
}

static void test_sweep(void **state)
{
    static const char *const pictures[] = { "A1_Adam_L2.png", "B3_AdamW_Cosine.svg", "overview.png" };
    char arguments[512];
    (void)state;
    remove_folder("example_sweep");
    snprintf(arguments, sizeof arguments, "--samples 48 --test-samples 20 --epochs 1 --lr-mult 1/2,1 --wd-mult 0,1 --batch 16 --out %s/example_sweep", programs);
    assert_int_equal(run("fashion_sweep", arguments), 0);
    char *log = read_text("example_sweep", "runs.jsonl");
    int runs = 0;
    for (const char *at = log; (at = strchr(at, '\n')) != NULL; ++at)
        ++runs;
    assert_int_equal(runs, 16 * 4);
    free(log);
    for (int i = 0; i < 3; ++i) {
        char path[64];
        snprintf(path, sizeof path, "figures/%s", pictures[i]);
        free(read_text("example_sweep", path));
    }
    snprintf(arguments, sizeof arguments, "analyze %s/example_sweep", programs);
    assert_int_equal(run("fashion_sweep", arguments), 0);
    free(read_text("", "example.log"));
    remove_folder("example_sweep");
}

/* Half of a sweep, and then the whole: the same losses as of a sweep in one go. */
static void test_sweep_goes_on(void **state)
{
    const char *const common = "--only B3 --samples 48 --test-samples 20 --epochs 1 --batch 16 --wd-mult 0";
    char arguments[512];
    double loss[2][3];
    (void)state;
    for (int halved = 0; halved < 2; ++halved) {
        remove_folder("example_half");
        if (halved) {
            snprintf(arguments, sizeof arguments, "%s --lr-mult 1 --out %s/example_half", common, programs);
            assert_int_equal(run("fashion_sweep", arguments), 0);
        }
        snprintf(arguments, sizeof arguments, "%s --lr-mult 1/2,1 --out %s/example_half", common, programs);
        assert_int_equal(run("fashion_sweep", arguments), 0);
        char *log = read_text("example_half", "runs.jsonl");
        assert_int_equal(numbers_after(log, "\"final_test_loss\": ", loss[halved], 3), 2);
        free(log);
    }
    assert_true(loss[0][0] == loss[1][0] && loss[0][1] == loss[1][1] && loss[0][0] != loss[0][1] && loss[0][0] > 0);
    remove_folder("example_half");
}

static void test_zoo(void **state)
{
    static const char *const pictures[] = { "paths_quadratic.png", "convergence_rosenbrock.png", "schedules.png", "schedules.svg" };
    char arguments[512];
    (void)state;
    remove_folder("example_zoo");
    snprintf(arguments, sizeof arguments, "--task quadratic,rosenbrock --steps 40 --out %s/example_zoo", programs);
    assert_int_equal(run("optimizer_zoo", arguments), 0);
    for (int i = 0; i < 4; ++i)
        free(read_text("example_zoo", pictures[i]));
    char *table = read_text("", "example.log");
    assert_non_null(strstr(table, " adamw "));
    free(table);
    remove_folder("example_zoo");
}

static void test_usage(void **state)
{
    (void)state;
    assert_int_equal(run("fashion_sweep", "--only Z9"), 2);
    assert_int_equal(run("fashion_sweep", "--samples many"), 2);
    assert_int_equal(run("optimizer_zoo", "--only no-such-rule"), 2);
    assert_int_equal(run("optimizer_zoo", "--help"), 0);
    assert_int_equal(run("fashion_sweep", "--data no/such/folder"), 1);
}

int main(int argc, char **argv)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_usage), cmocka_unit_test(test_sweep), cmocka_unit_test(test_sweep_goes_on),
                                        cmocka_unit_test(test_zoo) };
    snprintf(programs, sizeof programs, "%s", argc > 0 && strchr(argv[0], '/') ? argv[0] : "build/");
    *strrchr(programs, '/') = 0;
    return cmocka_run_group_tests(tests, NULL, NULL);
}
