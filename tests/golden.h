/* Golden numbers: reading the files in golden/, comparing with them, and what test programs share with the scripts that
   made them. Include it after dotopt.h and cmocka.h, with GOLDEN defined as the path of the file that is opened. */
#ifndef GOLDEN_H
#define GOLDEN_H

#include "uniform.h"

#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))
#define FIELD_SIZE 128
#ifdef __GNUC__
#define MAYBE_UNUSED __attribute__((unused))
#else
#define MAYBE_UNUSED
#endif

static dot_context *golden_context;
static dot_safetensors *golden_file;

/* ---- helpers ------------------------------------------------------------------------------------------------------ */

static void require(const dot_context *ctx, bool condition, const char *what)
{
    if (!condition || !dot_ok(ctx))
        fail_msg("%s: %s", what, ctx ? dot_error(ctx) : "no context");
}

/* The test compares tiny numbers: denormals stay. */
static dot_context *context_of(dot_dtype dtype, uint64_t seed)
{
    dot_context_options options = dot_context_defaults();
    options.dtype = dtype;
    options.seed = seed;
    options.flush_denormals = false;
    dot_context *ctx = dot_context_create(&options);
    require(ctx, ctx != NULL, "dot_context_create");
    return ctx;
}

static void *take(size_t count, size_t size)
{
    void *memory = calloc(count ? count : 1, size);
    assert_non_null(memory);
    return memory;
}

static double *doubles(int64_t count)
{
    return (double *)take((size_t)count, sizeof(double));
}

static bool golden_has(const char *name)
{
    return dot_safetensors_find(golden_file, name) >= 0;
}

/* The values of a golden tensor, to be freed by the caller. */
static double *golden(const char *name, int64_t *count)
{
    int index = dot_safetensors_find(golden_file, name);
    dot_safetensors_entry entry;
    if (index < 0 || !dot_safetensors_entry_at(golden_file, index, &entry))
        fail_msg("%s: no tensor '%s'", GOLDEN, name);
    double *values = doubles(entry.count);
    require(golden_context, dot_safetensors_read_double(golden_file, index, values, entry.count), name);
    *count = entry.count;
    return values;
}

static const char *golden_text(const char *name)
{
    const char *text = dot_safetensors_metadata(golden_file, name);
    if (!text)
        fail_msg("%s: no metadata '%s'", GOLDEN, name);
    return text;
}

/* "prefix" + the middle + "suffix", in one of a few static buffers. */
static const char *join(const char *prefix, const char *middle, const char *suffix)
{
    static char buffers[4][2 * FIELD_SIZE];
    static int next;
    char *buffer = buffers[next++ % 4];
    snprintf(buffer, sizeof buffers[0], "%s%s%s", prefix, middle, suffix);
    return buffer;
}

/* The word at *cursor (blanks separate words), copied to `word`; false at the end. */
static bool next_word(const char **cursor, char separator, char word[FIELD_SIZE])
{
    while (**cursor && **cursor == separator)
        ++*cursor;
    size_t length = 0;
    for (; **cursor && **cursor != separator; ++*cursor) {
        assert_true(length + 1 < FIELD_SIZE);
        word[length++] = **cursor;
    }
    word[length] = 0;
    return length > 0;
}

/* Is |ours - expected| <= relative * max(scale, |expected|) + absolute everywhere? scale may be NULL. Prints the worst
   element where it is not. NaN never passes. */
static bool agree(const char *what, const double *ours, const double *expected, const double *scale, int64_t count,
                 double relative, double absolute)
{
    int64_t worst = -1;
    double excess = 1;
    for (int64_t i = 0; i < count; ++i) {
        double size = fmax(fabs(expected[i]), scale ? scale[i] : 0);
        double ratio = fabs(ours[i] - expected[i]) / (relative * size + absolute);
        if (ours[i] == expected[i] || ratio <= excess)
            continue;
        worst = i;
        if (isnan(ratio))
            break;
        excess = ratio;
    }
    if (worst >= 0)
        print_error("%s: [%lld] is %.17g, not %.17g (%.3g times the tolerance)\n", what, (long long)worst, ours[worst],
                    expected[worst], excess);
    return worst < 0;
}

MAYBE_UNUSED static double largest_relative(const double *a, const double *b, int count)
{
    double largest = 0;
    for (int i = 0; i < count; ++i)
        largest = fmax(largest, fabs(a[i] - b[i]) / fabs(b[i]));
    return largest;
}

/* ---- the formula, as in make_training.py ---------------------------------------------------------------------------- */

static void fill_uniform(double *values, int64_t count, uint32_t stream)
{
    for (int64_t i = 0; i < count; ++i)
        values[i] = 2 * uniform(stream, (uint32_t)i) - 1;
}

static int64_t shape_count(int rank, const int64_t *shape)
{
    int64_t count = 1;
    for (int i = 0; i < rank; ++i)
        count *= shape[i];
    return count;
}

/* Every parameter p uniform in +-gain/sqrt(fan_in), rounded to float; a bias has the fan_in of the weight before it. */
MAYBE_UNUSED static void set_parameters(dot_layer *net, uint32_t first_stream, double gain)
{
    int64_t fan_in = 1;
    for (int p = 0; p < dot_layer_parameters(net); ++p) {
        dot_parameter_info info;
        assert_true(dot_layer_parameter(net, p, &info));
        int64_t count = shape_count(info.rank, info.shape);
        if (info.rank >= 2)
            fan_in = count / info.shape[0];
        double *values = doubles(count);
        fill_uniform(values, count, first_stream + (uint32_t)p);
        for (int64_t i = 0; i < count; ++i)
            values[i] = (double)(float)(values[i] * (gain / sqrt((double)fan_in)));
        assert_true(dot_parameter_set(net, info.name, DOT_ALL, values, count));
        free(values);
    }
}

/* ---- settings from the metadata ------------------------------------------------------------------------------------- */

typedef struct settings {
    dot_optimizer_options optimizer;
    double clip, total, factor, floor, curvature_period, late, rounding;
    bool known, no_tiny, skip, f64_only;
    char kind[FIELD_SIZE], milestones[FIELD_SIZE];  /* schedule */
    char stream[FIELD_SIZE];                        /* of gradients */
    char pattern[FIELD_SIZE], kinds[FIELD_SIZE];    /* parameter group */
} settings;

#define REAL(name)   { #name, offsetof(settings, name), 'r' }
#define FLAG(name)   { #name, offsetof(settings, name), 'f' }
#define TEXT(name)   { #name, offsetof(settings, name), 't' }
#define OPTION(name) { #name, offsetof(settings, optimizer.name), 'f' }
#define NUMBER(constant, name, value, least, greatest, meaning) { #name, offsetof(settings, optimizer.name), 'r' },
static const struct { const char *key; size_t offset; char type; } setting_fields[] = {
    DOT_HYPERPARAMETERS(NUMBER)
    OPTION(nesterov), OPTION(relative_step), OPTION(scale_parameter), OPTION(maximize), OPTION(centered), OPTION(rectify),
    OPTION(amsbound), OPTION(cautious),
    REAL(clip), REAL(total), REAL(curvature_period), REAL(late), REAL(rounding), REAL(factor), REAL(floor), FLAG(no_tiny), FLAG(skip), FLAG(f64_only),
    TEXT(kind), TEXT(milestones), TEXT(stream), TEXT(pattern), TEXT(kinds)
};

static int index_of(const char *const *names, int count, const char *name)
{
    for (int i = 0; i < count; ++i)
        if (names[i] && strcmp(names[i], name) == 0)
            return i;
    fail_msg("unknown value '%s'", name);
    return 0;
}

static dot_decay decay_of(const char *name)
{
    static const char *const names[] = { "l2", "lr", "scheduled", "normalized", "corrected", "cautious", "prox", "fixed" };
    return (dot_decay)index_of(names, COUNT(names), name);
}

static bool dialect_of(const char *name, dot_dialect *dialect)
{
    for (int i = 0; i < DOT_DIALECTS; ++i)
        if (strcmp(dot_dialect_name((dot_dialect)i), name) == 0) {
            *dialect = (dot_dialect)i;
            return true;
        }
    return false;
}

static void apply_setting(settings *s, const char *key, const char *value)
{
    if (strcmp(key, "algorithm") == 0) {
        dot_algorithm algorithm;
        s->known = dot_algorithm_find(value, &algorithm);
        if (s->known)
            s->optimizer = dot_optimizer_defaults(algorithm);
        return;
    }
    if (strcmp(key, "decay") == 0) {
        s->optimizer.decay = decay_of(value);
        return;
    }
    if (strcmp(key, "dialect") == 0) {
        s->known = s->known && dialect_of(value, &s->optimizer.dialect);
        return;
    }
    for (int i = 0; i < COUNT(setting_fields); ++i) {
        void *field = (char *)s + setting_fields[i].offset;
        if (strcmp(setting_fields[i].key, key) != 0)
            continue;
        switch (setting_fields[i].type) {
        case 'r': *(double *)field = strtod(value, NULL); return;
        case 'f': *(bool *)field = strtod(value, NULL) != 0; return;
        default: snprintf((char *)field, FIELD_SIZE, "%s", value); return;
        }
    }
    if (s->known)
        fail_msg("unknown setting '%s'", key);
}

/* `known` tells whether the library has the algorithm. */
static settings settings_of(const char *name)
{
    settings s;
    memset(&s, 0, sizeof s);
    snprintf(s.stream, sizeof s.stream, "extreme");
    const char *cursor = golden_text(name);
    char word[FIELD_SIZE];
    while (next_word(&cursor, ' ', word)) {
        char *equals = strchr(word, '=');
        assert_non_null(equals);
        *equals = 0;
        apply_setting(&s, word, equals + 1);
    }
    return s;
}

/* What the learning rate of step t is multiplied by. */
static double multiplier(int t)
{
    return 0.5 + uniform(40, (uint32_t)t);
}

/* ---- opening the file: set-up and tear-down of a group of tests ------------------------------------------------------ */

static int open_golden(void **state)
{
    (void)state;
    dot_context_options options = dot_context_defaults();
    options.flush_denormals = false;
    golden_context = dot_context_create(&options);
    golden_file = dot_safetensors_open(golden_context, GOLDEN);
    if (!golden_file)
        print_error("%s: %s\n", GOLDEN, dot_error(golden_context));
    return golden_file ? 0 : -1;
}

static int close_golden(void **state)
{
    (void)state;
    dot_safetensors_close(golden_file);
    dot_context_destroy(golden_context);
    return 0;
}

#endif
