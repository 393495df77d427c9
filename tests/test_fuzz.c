/* A short run of tests/fuzz.c: 20,000 mutated files for each reader, 2,000 for the two that resume a run. `make sanitize`
   runs it under the sanitizers; fuzz.c itself says how to run more. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#define FUZZ_TEST
#include "fuzz.c"

static int setup_files(void **state)
{
    (void)state;
    prepare();
    return 0;
}

static int remove_all(void **state)
{
    (void)state;
    dot_context_destroy(ctx);
    remove_files();
    return 0;
}

static void fuzz_reader(reader which, int64_t runs, int64_t least)
{
    int64_t failed = fuzz(which, 1, 0, runs, NULL);
    if (failed >= 0) fail_msg("run %lld of seed 1: %s", (long long)failed, failure);
    if (accepted < least || accepted > runs)                /* else the mutations no longer reach what they should */
        fail_msg("%lld of %lld accepted, expected at least %lld", (long long)accepted, (long long)runs,
                 (long long)least);
}

static void test_safetensors(void **state) { (void)state; fuzz_reader(SAFETENSORS, 20000, 400); }
static void test_npy(void **state)         { (void)state; fuzz_reader(NPY, 20000, 300); }
static void test_idx(void **state)         { (void)state; fuzz_reader(IDX, 20000, 300); }
static void test_json(void **state)        { (void)state; fuzz_reader(JSON, 20000, 800); }
static void test_log(void **state)         { (void)state; fuzz_reader(LOG, 2000, 800); }
static void test_wandb(void **state)       { (void)state; fuzz_reader(WANDB, 2000, 1500); }

/* The mutations themselves: the same run is the same file, another run another one. */
static void test_mutations(void **state)
{
    (void)state;
    static blob a, b;
    int same = 0;
    for (int k = 0; k < READERS; ++k)
        for (uint64_t run = 0; run < 200; ++run) {
            mutate(&a, (reader)k, 7, run);
            mutate(&b, (reader)k, 7, run);
            assert_true(a.size <= MAX_SIZE && a.size == b.size);
            assert_memory_equal(a.bytes, b.bytes, a.size);
            mutate(&b, (reader)k, 7, run + 1);
            same += a.size == b.size && memcmp(a.bytes, b.bytes, a.size) == 0;
        }
    assert_true(same < 60);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_safetensors), cmocka_unit_test(test_npy), cmocka_unit_test(test_idx),
        cmocka_unit_test(test_json), cmocka_unit_test(test_log), cmocka_unit_test(test_wandb),
        cmocka_unit_test(test_mutations) };
    return cmocka_run_group_tests(tests, setup_files, remove_all);
}
