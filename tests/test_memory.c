/* test_memory.c - no allocation after the first step, and every allocation failing in turn. */
#include "dotopt.h"

#include <math.h>
#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/stat.h>
#include <cmocka.h>

#include "nets.h"

/* ---- an allocator that counts, checks, and fails when told ------------------------------------------------------ */

typedef struct meter {
    int64_t allocations, releases;
    int64_t blocks, bytes;          /* held now */
    int64_t fail_from, fail_to;     /* allocations that fail, counted from 1; 0: none */
    int64_t failures;
    int mistakes;                   /* release of NULL, of a foreign block, of other than the allocated bytes */
    int strangers;                  /* calls from another thread */
    pthread_t thread;
} meter;

/* Before each block; twice its alignment, so that the block is aligned as malloc's. */
typedef struct block_head {
    uint64_t magic;
    size_t bytes;
    char pad[48];
} block_head;

#define BLOCK_MAGIC UINT64_C(0x6d65746572656421)

static void *meter_allocate(void *user, size_t bytes)
{
    meter *m = (meter *)user;
    int64_t number = ++m->allocations;
    m->strangers += !pthread_equal(m->thread, pthread_self());
    if (number >= m->fail_from && number <= m->fail_to) {
        ++m->failures;
        return NULL;
    }
    block_head *head = bytes > SIZE_MAX - sizeof *head ? NULL : (block_head *)malloc(sizeof *head + bytes);
    if (!head)
        return NULL;
    head->magic = BLOCK_MAGIC;
    head->bytes = bytes;
    memset(head + 1, 0xa5, bytes);      /* whoever counts on zeros finds out */
    ++m->blocks;
    m->bytes += (int64_t)bytes;
    return head + 1;
}

static void meter_release(void *user, void *memory, size_t bytes)
{
    meter *m = (meter *)user;
    block_head *head = memory ? (block_head *)memory - 1 : NULL;
    ++m->releases;
    m->strangers += !pthread_equal(m->thread, pthread_self());
    if (!head || head->magic != BLOCK_MAGIC || head->bytes != bytes) {
        ++m->mistakes;
        return;
    }
    --m->blocks;
    m->bytes -= (int64_t)bytes;
    memset(head, 0xdd, sizeof *head + bytes);
    free(head);
}

static meter new_meter(void)
{
    meter m;
    memset(&m, 0, sizeof m);
    m.thread = pthread_self();
    return m;
}

static dot_context_options metered_options(meter *m, int threads, int lanes)
{
    dot_context_options co = dot_context_defaults();
    co.threads = threads;
    co.lanes = lanes;
    co.seed = 3;
    co.allocator.allocate = meter_allocate;
    co.allocator.release = meter_release;
    co.allocator.user = m;
    return co;
}

static void assert_balanced(const meter *m)
{
    assert_int_equal(m->blocks, 0);
    assert_int_equal(m->bytes, 0);
    assert_int_equal(m->mistakes, 0);
    assert_int_equal(m->strangers, 0);
}

/* ---- two networks to train -------------------------------------------------------------------------------------- */

enum { PICTURES = 24, BATCH = 6 };

static uint8_t pictures[PICTURES * PICTURE_BYTES], labels[PICTURES];

typedef struct trainer {
    dot_context *ctx;
    dot_layer *net;
    dot_dataset *data;              /* of the autoencoder; NULL: the zoo */
    dot_optimizer *optimizer;
    zoo_scale scale;
} trainer;

static int setup_pictures(void **state)
{
    (void)state;
    draw_pictures(pictures, labels, PICTURES);
    return 0;
}

static void open_trainer(trainer *t, const dot_context_options *co, bool zoo, dot_algorithm algorithm)
{
    dot_optimizer_options o = optimizer_defaults(algorithm);
    o.weight_decay = 0.01;
    o.beta1 = 0.9;
    if (o.lr > 0.1)
        o.lr = 0.01;
    memset(t, 0, sizeof *t);
    t->ctx = dot_context_create(co);
    t->net = zoo ? build_zoo(t->ctx, &t->scale) : build_autoencoder(t->ctx, 4, 8, 12);
    t->data = zoo ? NULL : dot_dataset_memory(t->ctx, pictures, labels, PICTURES, 3,
                                              (const int64_t[3]){ PICTURE_SIDE, PICTURE_SIDE, 1 }, NULL);
    t->optimizer = dot_optimizer_create(t->ctx, t->net, &o);
}

/* The loss; *input is the first tensor of the step. */
static dot_tensor *trainer_loss(trainer *t, int64_t step, dot_tensor **input)
{
    *input = NULL;
    if (!t->data)
        return zoo_loss(t->ctx, t->net, BATCH);
    *input = dot_batch(t->data, BATCH, step);
    return dot_mse_loss(dot_forward(t->net, *input), *input);
}

static bool train_step(trainer *t, int64_t step)
{
    dot_schedule schedule = dot_schedule_warm_restarts(5, 2, 0.1);
    dot_tensor *input;
    dot_step_begin(t->ctx);
    dot_backward(trainer_loss(t, step, &input));
    dot_clip_grad_norm(t->optimizer, 0.5);
    return dot_optimizer_step(t->optimizer, dot_schedule_at(&schedule, step));
}

/* ---- no allocation after the first step ------------------------------------------------------------------------- */

/* Where the step's first tensor, its loss and their elements lie. */
typedef struct addresses { const void *input, *input_data, *loss, *loss_data; } addresses;

static addresses step_addresses(dot_tensor *input, dot_tensor *loss)
{
    addresses a;
    memset(&a, 0, sizeof a);
    a.input = input;
    a.input_data = input ? dot_tensor_data(input, 0) : NULL;
    a.loss = loss;
    a.loss_data = dot_tensor_data(loss, 0);
    return a;
}

static void assert_same_addresses(const addresses *a, const addresses *b)
{
    assert_ptr_equal(a->input, b->input);
    assert_ptr_equal(a->input_data, b->input_data);
    assert_ptr_equal(a->loss, b->loss);
    assert_ptr_equal(a->loss_data, b->loss_data);
}

static void assert_report(const dot_context *ctx, const meter *m)
{
    dot_memory_report report = dot_memory(ctx);
    assert_int_equal(report.allocations, m->allocations);
    assert_true(report.persistent_bytes > 0 && report.step_peak_bytes > 0);
    assert_true(report.step_peak_bytes <= report.step_bytes);
    assert_true(report.persistent_bytes + report.step_bytes <= (size_t)m->bytes);
}

static void steady_training(bool zoo, int threads, int lanes, dot_algorithm algorithm)
{
    meter m = new_meter();
    dot_context_options co = metered_options(&m, threads, lanes);
    dot_schedule schedule = dot_schedule_cosine(20, 0.0);
    trainer t;
    addresses first = { 0 }, first_evaluation = { 0 };
    int64_t allocations = 0, releases = 0;
    open_trainer(&t, &co, zoo, algorithm);
    for (int step = 1; step <= 20; ++step) {
        dot_tensor *input, *loss;
        dot_step_begin(t.ctx);
        loss = trainer_loss(&t, step, &input);
        assert_true(dot_backward(loss));
        addresses here = step_addresses(input, loss);
        dot_clip_grad_norm(t.optimizer, 0.5);
        dot_optimizer_loss(t.optimizer, loss);
        assert_true(dot_optimizer_step(t.optimizer, dot_schedule_at(&schedule, step)));
        if (step == 1) {
            allocations = m.allocations;
            releases = m.releases;
        } else if (step == 2) {
            first = here;
        } else {
            assert_same_addresses(&here, &first);
        }

        dot_eval_begin(t.ctx);
        loss = trainer_loss(&t, step, &input);
        if (!isfinite(dot_item(loss, lanes - 1)))
            fail_msg("%s: loss %g", dot_algorithm_name(algorithm), dot_item(loss, lanes - 1));
        here = step_addresses(input, loss);
        if (step == 2)
            first_evaluation = here;
        else if (step > 2)
            assert_same_addresses(&here, &first_evaluation);

        assert_int_equal(m.allocations, allocations);
        assert_int_equal(m.releases, releases);
        assert_report(t.ctx, &m);
    }
    assert_string_equal(dot_error(t.ctx), "");
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
}

static void test_steady_training(void **state)
{
    (void)state;
    for (int zoo = 0; zoo < 2; ++zoo)
        for (int threads = 1; threads <= 2; ++threads)
            for (int lanes = 1; lanes <= 3; lanes += 2)
                for (int a = 0; a < DOT_ALGORITHMS; a = next_algorithm(a))
                    if (a <= DOT_ADAMW_FACTORED || (!zoo && threads == 2 && lanes == 3))
                        steady_training(zoo, threads, lanes, (dot_algorithm)a);
}

/* A larger batch may ask for more, once; the old size then costs nothing either. */
static void test_larger_batch(void **state)
{
    meter m = new_meter();
    dot_context_options co = metered_options(&m, 1, 1);
    trainer t;
    (void)state;
    open_trainer(&t, &co, true, DOT_ADAMW);
    int64_t after[4];
    static const int64_t batches[4] = { 4, 64, 4, 64 };
    for (int i = 0; i < 4; ++i) {
        dot_step_begin(t.ctx);
        dot_backward(zoo_loss(t.ctx, t.net, batches[i]));
        dot_optimizer_step(t.optimizer, 1.0);
        dot_step_begin(t.ctx);          /* here step memory may be put together again */
        after[i] = m.allocations;
    }
    assert_string_equal(dot_error(t.ctx), "");
    assert_true(after[1] >= after[0]);
    assert_int_equal(after[2], after[1]);
    assert_int_equal(after[3], after[1]);
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
}

/* Reading and writing files gives back what it took, again and again. */
static void test_files_give_memory_back(void **state)
{
    const char *weights = scratch_path("weights"), *training = scratch_path("training");
    meter m = new_meter();
    dot_context_options co = metered_options(&m, 1, 3);
    trainer t;
    int64_t bytes = 0, step;
    (void)state;
    open_trainer(&t, &co, true, DOT_ADAM);
    assert_true(train_step(&t, 0));
    for (int i = 0; i < 5; ++i) {
        assert_true(dot_save_lane(t.net, 2, weights) && dot_load(t.net, weights));
        assert_true(dot_checkpoint_save(training, t.net, t.optimizer, 1));
        assert_true(dot_checkpoint_load(training, t.net, t.optimizer, &step));
        dot_safetensors_close(dot_safetensors_open(t.ctx, weights));
        assert_true(train_step(&t, i + 1));
        if (i == 0)
            bytes = m.bytes;
        assert_int_equal(m.bytes, bytes);
    }
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
    remove(weights);
    remove(training);
}

/* Also an open file belongs to the context. */
static void test_destroy_frees_everything(void **state)
{
    const char *path = scratch_path("open");
    meter m = new_meter();
    dot_context_options co = metered_options(&m, 2, 2);
    trainer t;
    (void)state;
    open_trainer(&t, &co, true, DOT_ADAFACTOR);
    assert_true(dot_save(t.net, path));
    assert_non_null(dot_safetensors_open(t.ctx, path));
    dot_step_begin(t.ctx);
    assert_non_null(zoo_loss(t.ctx, t.net, BATCH));     /* in the middle of a step */
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
    remove(path);
}

/* ---- every allocation fails in turn ----------------------------------------------------------------------------- */

typedef struct site_files {
    char folder[512], weights[600], training[600];
    unsigned char *old_weights, *old_training;
    size_t old_weights_bytes, old_training_bytes;
} site_files;

typedef struct outcome { bool created, ok, saved, checkpointed; dot_status status; } outcome;

/* Everything that a program does; goes on whatever fails. */
static outcome scenario(meter *m, const site_files *files)
{
    dot_context_options co = metered_options(m, 2, 2);
    outcome result;
    trainer zoo, pair;
    int64_t step;
    memset(&result, 0, sizeof result);
    open_trainer(&zoo, &co, true, DOT_ADAMW);
    if (!zoo.ctx)
        return result;
    result.created = true;

    pair = zoo;     /* a second network in the same context, on a dataset */
    pair.net = dot_nn_sequential(zoo.ctx, dot_nn_flatten(zoo.ctx), dot_nn_linear(zoo.ctx, PICTURE_BYTES, 3),
                                 dot_nn_linear(zoo.ctx, 3, PICTURE_BYTES),
                                 dot_nn_unflatten(zoo.ctx, 0, PICTURE_SIDE, PICTURE_SIDE, 1), NULL);
    pair.data = dot_dataset_memory(zoo.ctx, pictures, labels, PICTURES, 3,
                                   (const int64_t[3]){ PICTURE_SIDE, PICTURE_SIDE, 1 }, NULL);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAFACTOR);
    pair.optimizer = dot_optimizer_create(zoo.ctx, pair.net, &o);

    train_step(&pair, 0);
    train_step(&zoo, 0);
    result.saved = dot_save(zoo.net, files->weights);
    result.checkpointed = dot_checkpoint_save(files->training, zoo.net, zoo.optimizer, 1);
    dot_load(zoo.net, files->weights);
    dot_checkpoint_load(files->training, zoo.net, zoo.optimizer, &step);
    dot_safetensors *file = dot_safetensors_open(zoo.ctx, files->weights);
    dot_safetensors_close(file);
    result.ok = dot_ok(zoo.ctx);
    result.status = dot_error_status(zoo.ctx);
    assert_int_equal(result.ok, *dot_error(zoo.ctx) == 0);
    dot_context_destroy(zoo.ctx);
    return result;
}

/* Files other than the two: what a failed save has left behind. */
static int stray_files(const site_files *files)
{
    DIR *folder = opendir(files->folder);
    int count = 0;
    assert_non_null(folder);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;)
        count += entry->d_name[0] != '.' && strcmp(entry->d_name, "weights") != 0
                 && strcmp(entry->d_name, "training") != 0;
    closedir(folder);
    return count;
}

static void open_site_files(site_files *files)
{
    trainer t;
    memset(files, 0, sizeof *files);
    snprintf(files->folder, sizeof files->folder, "%s", scratch_path("sites"));
    snprintf(files->weights, sizeof files->weights, "%s/weights", files->folder);
    snprintf(files->training, sizeof files->training, "%s/training", files->folder);
    assert_int_equal(mkdir(files->folder, 0700), 0);

    dot_context_options co = dot_context_defaults();
    co.lanes = 2;
    co.seed = 1234;
    open_trainer(&t, &co, true, DOT_ADAMW);
    assert_true(dot_save(t.net, files->weights));
    assert_true(dot_checkpoint_save(files->training, t.net, t.optimizer, 77));
    dot_context_destroy(t.ctx);
    files->old_weights = read_file(files->weights, &files->old_weights_bytes);
    files->old_training = read_file(files->training, &files->old_training_bytes);
    assert_true(files->old_weights && files->old_training);
}

static void close_site_files(site_files *files)
{
    remove(files->weights);
    remove(files->training);
    assert_int_equal(rmdir(files->folder), 0);
    free(files->old_weights);
    free(files->old_training);
}

/* Old when the save said that it failed; new, and readable, when not. */
static void assert_whole(const site_files *files, const outcome *result, trainer *reader)
{
    size_t bytes[2];
    int64_t step = -1;
    unsigned char *weights = read_file(files->weights, &bytes[0]);
    unsigned char *training = read_file(files->training, &bytes[1]);
    assert_true(weights && training);
    bool old_weights = bytes[0] == files->old_weights_bytes && memcmp(weights, files->old_weights, bytes[0]) == 0;
    bool old_training = bytes[1] == files->old_training_bytes && memcmp(training, files->old_training, bytes[1]) == 0;
    free(weights);
    free(training);
    assert_int_equal(old_weights, !result->saved);
    assert_int_equal(old_training, !result->checkpointed);
    assert_true(dot_load(reader->net, files->weights));
    assert_true(dot_checkpoint_load(files->training, reader->net, reader->optimizer, &step));
    assert_int_equal(step, old_training ? 77 : 1);
}

/* Runs the scenario with the allocations [n, n + run) failing for n = 1, 2, ... until none fails; the sites. */
static int64_t fail_each_site(int64_t run)
{
    dot_context_options co = dot_context_defaults();
    site_files files;
    trainer reader;
    int64_t n = 0;
    open_site_files(&files);
    co.lanes = 2;
    open_trainer(&reader, &co, true, DOT_ADAMW);
    for (bool failed = true; failed;) {
        meter m = new_meter();
        m.fail_from = ++n;
        m.fail_to = n > INT64_MAX - run ? INT64_MAX : n + run - 1;
        outcome result = scenario(&m, &files);
        failed = m.failures > 0;
        if (failed != (!result.created || !result.ok) || (result.created && failed != (result.status == DOT_ERROR_MEMORY)))
            fail_msg("allocation %lld: failed %d, context %d, ok %d, status %d", (long long)n, failed, result.created,
                     result.ok, (int)result.status);
        if (m.blocks || m.bytes || m.mistakes || m.strangers)
            fail_msg("allocation %lld: %lld blocks, %lld bytes left, %d mistakes, %d from other threads", (long long)n,
                     (long long)m.blocks, (long long)m.bytes, m.mistakes, m.strangers);
        assert_whole(&files, &result, &reader);
        if (stray_files(&files) != 0)
            fail_msg("allocation %lld: %d files left behind", (long long)n, stray_files(&files));
        if (result.saved)
            assert_true(write_file(files.weights, files.old_weights, files.old_weights_bytes));
        if (result.checkpointed)
            assert_true(write_file(files.training, files.old_training, files.old_training_bytes));
    }
    dot_context_destroy(reader.ctx);
    close_site_files(&files);
    return n - 1;
}

static void test_each_allocation_fails(void **state)
{
    (void)state;
    print_message("%lld allocation sites, each failing alone\n", (long long)fail_each_site(1));
}

static void test_all_allocations_from_one_fail(void **state)
{
    (void)state;
    print_message("%lld allocation sites, each failing with all after it\n", (long long)fail_each_site(INT64_MAX));
}

/* ---- going on after a failure ----------------------------------------------------------------------------------- */

/* A first step in which allocation n fails: no weight changes; cleared, training gives the bits of the calm run. */
static bool resume_after(int64_t n, int lanes, const double *calm, int64_t calm_count)
{
    meter m = new_meter();
    dot_context_options co = metered_options(&m, 1, lanes);
    trainer t;
    int64_t count;
    open_trainer(&t, &co, false, DOT_ADAMW);
    double *before = snapshot(t.net, lanes - 1, VALUES, &count);
    m.fail_from = m.fail_to = m.allocations + n;
    bool done = train_step(&t, 0);
    m.fail_from = m.fail_to = 0;
    assert_int_equal(done, m.failures == 0);
    if (!done) {
        assert_int_equal(dot_error_status(t.ctx), DOT_ERROR_MEMORY);
        assert_false(train_step(&t, 0));            /* the error stands */
        double *after = snapshot(t.net, lanes - 1, VALUES, &count);
        assert_memory_equal(before, after, (size_t)count * sizeof *before);
        free(after);
        assert_int_equal(dot_optimizer_steps(t.optimizer), 0);
        dot_error_clear(t.ctx);
        assert_true(dot_ok(t.ctx));
        assert_true(dot_zero_grad(t.net));
        assert_true(train_step(&t, 0));
    }
    for (int step = 1; step < 4; ++step)
        assert_true(train_step(&t, step));
    double *last = snapshot(t.net, lanes - 1, VALUES, &count);
    if (calm) {
        assert_int_equal(count, calm_count);
        assert_memory_equal(last, calm, (size_t)count * sizeof *last);
    }
    free(before);
    free(last);
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
    return done;
}

static void test_training_goes_on(void **state)
{
    (void)state;
    for (int lanes = 1; lanes <= 3; lanes += 2) {
        dot_context_options co = dot_context_defaults();
        trainer t;
        int64_t count, n = 1;
        co.lanes = lanes;
        co.seed = 3;
        open_trainer(&t, &co, false, DOT_ADAMW);
        for (int step = 0; step < 4; ++step)
            assert_true(train_step(&t, step));
        double *calm = snapshot(t.net, lanes - 1, VALUES, &count);
        dot_context_destroy(t.ctx);
        while (!resume_after(n, lanes, calm, count))
            ++n;
        assert_true(n > 1);
        print_message("%lld allocation sites in a first step with %d lanes\n", (long long)(n - 1), lanes);
        free(calm);
    }
}

/* Failures that have nothing to do with memory, in the middle of training. */
static void test_misuse_between_steps(void **state)
{
    static const int64_t wrong[2] = { 3, 5 };
    meter m = new_meter();
    dot_context_options co = metered_options(&m, 2, 3);
    trainer t;
    int64_t count;
    dot_tensor *input;
    (void)state;
    open_trainer(&t, &co, false, DOT_ADAM);
    assert_true(train_step(&t, 0));
    int64_t allocations = m.allocations;
    for (int round = 0; round < 20; ++round) {
        double *before = snapshot(t.net, 1, VALUES, &count);
        dot_step_begin(t.ctx);
        dot_tensor *loss = trainer_loss(&t, round, &input);
        double zeros[15] = { 0 };
        dot_tensor *bad = dot_add(dot_input(t.ctx, DOT_F32, 2, wrong, zeros), input);
        assert_null(bad);
        assert_false(dot_ok(t.ctx));
        assert_false(dot_backward(dot_add(loss, bad)));
        assert_false(dot_backward(loss));
        assert_true(!(dot_clip_grad_norm(t.optimizer, 1.0) > 0));   /* 0, or NaN as for other doubles */
        assert_false(dot_optimizer_step(t.optimizer, 1.0));
        double *after = snapshot(t.net, 1, VALUES, &count);
        assert_memory_equal(before, after, (size_t)count * sizeof *before);
        free(before);
        free(after);
        dot_error_clear(t.ctx);
        assert_true(train_step(&t, round + 1));
    }
    assert_int_equal(dot_optimizer_steps(t.optimizer), 21);
    assert_int_equal(m.allocations, allocations);
    dot_context_destroy(t.ctx);
    assert_balanced(&m);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_steady_training), cmocka_unit_test(test_larger_batch),
        cmocka_unit_test(test_files_give_memory_back), cmocka_unit_test(test_destroy_frees_everything),
        cmocka_unit_test(test_each_allocation_fails), cmocka_unit_test(test_all_allocations_from_one_fail),
        cmocka_unit_test(test_training_goes_on), cmocka_unit_test(test_misuse_between_steps),
    };
    return cmocka_run_group_tests_name("memory", tests, setup_pictures, NULL);
}
