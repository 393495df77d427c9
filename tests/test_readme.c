/* The README's program: the one in examples/, word for word; compiled as the README says, run, and its network is good. */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "dotopt.h"

static char *read_text(const char *path)
{
    FILE *f = fopen(path, "rb");
    assert_non_null(f);
    char *text = (char *)calloc(1, 1 << 20);
    assert_non_null(text);
    assert_true(fread(text, 1, (1 << 20) - 1, f) > 0);
    fclose(f);
    return text;
}

/* The first ```c block of the README. */
static char *readme_program(void)
{
    char *text = read_text("README.md");
    char *begin = strstr(text, "```c\n");
    assert_non_null(begin);
    char *end = strstr(begin += 5, "```");
    assert_non_null(end);
    *end = 0;
    memmove(text, begin, strlen(begin) + 1);
    return text;
}

static void test_same_as_example(void **state)
{
    (void)state;
    char *readme = readme_program(), *example = read_text("examples/autoencoder.c");
    const char *body = strstr(example, "#include <stdio.h>");
    assert_non_null(body);
    assert_string_equal(readme, body);
    free(readme);
    free(example);
}

/* 200 steps instead of ten epochs; the mean squared error over test images must then be well below that of answering with
   the mean training image, 0.08663. */
static void test_trains(void **state)
{
    (void)state;
    const char *epochs = "10 * dot_batches(train, 128)";
    char *program = readme_program(), *at = strstr(program, epochs);
    assert_non_null(at);
    FILE *f = fopen("build/readme_program.c", "wb");
    assert_non_null(f);
    fprintf(f, "%.*s200%s", (int)(at - program), program, at + strlen(epochs));
    assert_int_equal(fclose(f), 0);
    free(program);
    remove("autoencoder.safetensors");
    assert_int_equal(system("cc -O2 -std=c99 -I. -o build/readme_program build/readme_program.c -lm -pthread"), 0);
    assert_int_equal(system("build/readme_program > build/readme_program.log"), 0);

    dot_context *ctx = dot_context_create(NULL);
    dot_dataset_options all = dot_dataset_defaults();
    all.shuffle = false;
    dot_dataset *test = dot_dataset_idx(ctx, "data/t10k-images-idx3-ubyte", NULL, &all);
    dot_conv_options half = dot_conv_defaults();
    half.kernel = 3; half.stride = 2; half.padding = 1; half.output_padding = 1;
    dot_layer *net = dot_nn_sequential(ctx,
        dot_nn_conv2d(ctx, 1, 32, &half), dot_nn_relu(ctx), dot_nn_conv2d(ctx, 32, 64, &half), dot_nn_relu(ctx),
        dot_nn_flatten(ctx), dot_nn_linear(ctx, 64 * 7 * 7, 128),
        dot_nn_linear(ctx, 128, 64 * 7 * 7), dot_nn_unflatten(ctx, 0, 7, 7, 64),
        dot_nn_conv_transpose2d(ctx, 64, 32, &half), dot_nn_relu(ctx),
        dot_nn_conv_transpose2d(ctx, 32, 1, &half), dot_nn_sigmoid(ctx), (dot_layer *)NULL);
    assert_true(dot_load(net, "autoencoder.safetensors"));
    dot_eval_begin(ctx);
    dot_tensor *x = dot_batch(test, 1000, 0);
    double loss = dot_item(dot_mse_loss(dot_forward(net, x), x), 0);
    print_message("test loss after 200 steps: %.5f\n", loss);
    assert_string_equal(dot_error(ctx), "");
    assert_true(loss < 0.03);
    dot_context_destroy(ctx);
    remove("autoencoder.safetensors");
}

int main(void)
{
    const struct CMUnitTest tests[] = { cmocka_unit_test(test_same_as_example), cmocka_unit_test(test_trains) };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
