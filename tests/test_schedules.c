/* Schedules against the golden numbers that golden/make_schedules.py makes: PyTorch's own, stepped one by one, and closed
   forms with 40 digits. A case is set up here and there under the same name. With SCHEDULES_ERRORS set in the environment,
   the largest errors of each case are printed. */
#include <float.h>
#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "dotopt.h"

#include <cmocka.h>

#define GOLDEN "tests/golden/schedules.safetensors"
#define COUNT(array) ((int)(sizeof(array) / sizeof(array)[0]))

static dot_context *golden_context;
static dot_safetensors *golden_file;

/* ---- golden numbers -------------------------------------------------------------------------------------------------- */

typedef struct numbers { double *values; int64_t count; } numbers;

/* To be freed by the caller; none when there is no such tensor. */
static numbers golden(const char *prefix, const char *name, const char *suffix)
{
    numbers n = { NULL, 0 };
    char full[128];
    dot_safetensors_entry entry;
    snprintf(full, sizeof full, "%s%s%s", prefix, name, suffix);
    const int index = dot_safetensors_find(golden_file, full);
    if (index < 0 || !dot_safetensors_entry_at(golden_file, index, &entry))
        return n;
    n.count = entry.count;
    n.values = (double *)calloc((size_t)n.count, sizeof(double));
    assert_non_null(n.values);
    assert_true(dot_safetensors_read_double(golden_file, index, n.values, n.count));
    return n;
}

static const int64_t far_steps[] = { -1, -1000, INT32_MAX, INT64_C(2147483648), INT64_C(4294967301), INT64_C(1000000000007),
                                     INT64_C(9007199254740993), INT64_C(4611686018427387904), INT64_MAX };

typedef double (*rule)(const dot_schedule *schedule, int64_t step);

/* The largest |ours - expected| / (|expected| + least); NaN never passes, the same infinity does. */
static double largest_error(const dot_schedule *s, rule value, numbers expected, const int64_t *steps, double least)
{
    double largest = 0;
    for (int64_t i = 0; i < expected.count; ++i) {
        const double ours = value(s, steps ? steps[i] : i), right = expected.values[i];
        const double error = ours == right ? 0 : fabs(ours - right) / (fabs(right) + least);
        if (!(error <= largest))
            largest = isnan(error) ? INFINITY : error;
    }
    return largest;
}

/* The closed form is met to 1e-14 of each value, however small the value; PyTorch, which adds up step by step,
   to 1e-12 of the base learning rate. */
static int check_rule(const char *name, const dot_schedule *s, rule value, const char *suffix, double tolerance)
{
    char far_suffix[32];
    snprintf(far_suffix, sizeof far_suffix, "%s.far", suffix);
    numbers exact = golden("exact.", name, suffix), far = golden("exact.", name, far_suffix);
    numbers torch = golden("torch.", name, suffix);
    assert_true(exact.count > 0);
    assert_int_equal(far.count, COUNT(far_steps));
    const double error = largest_error(s, value, exact, NULL, 0), far_error = largest_error(s, value, far, far_steps, DBL_MIN);
    const double torch_error = largest_error(s, value, torch, NULL, 1);
    const bool good = error <= tolerance && far_error <= tolerance && torch_error <= 1e-12;
    if (!good || getenv("SCHEDULES_ERRORS"))
        print_error("%s%s: largest errors %.1e, far off %.1e, to PyTorch (%lld steps) %.1e\n", name, suffix, error, far_error,
                    (long long)torch.count, torch_error);
    free(exact.values);
    free(far.values);
    free(torch.values);
    return !good;
}

static int cases_seen, failures;

static void check(const char *name, dot_schedule s)
{
    char reason[256] = "";
    if (dot_schedule_invalid(&s, reason, sizeof reason))
        fail_msg("%s: %s", name, reason);
    failures += check_rule(name, &s, dot_schedule_at, "", 1e-14);
    numbers momentum = golden("exact.", name, ".momentum");
    if (momentum.values)
        failures += check_rule(name, &s, dot_schedule_momentum, ".momentum", 1e-14);
    else
        assert_true(isnan(dot_schedule_momentum(&s, 3)));
    free(momentum.values);
    ++cases_seen;
}

/* ---- simple schedules -------------------------------------------------------------------------------------------------- */

static void test_simple(void **state)
{
    static const int64_t drops[] = { 30, 60, 80 };
    dot_schedule s;
    (void)state;
    failures = 0;
    check("constant", dot_schedule_constant());
    check("step_30", dot_schedule_step(30, 0.1));
    check("step_1", dot_schedule_step(1, 0.999));
    check("step_7", dot_schedule_step(7, 0.5));
    check("step_drop", dot_schedule_step_drop(drops, 3, 0.1));
    check("exponential_0.99", dot_schedule_exponential(0.99));
    check("exponential_0.5", dot_schedule_exponential(0.5));
    check("exponential_1.001", dot_schedule_exponential(1.001));
    check("constant_factor_third", dot_schedule_constant_factor(5, 1.0 / 3));
    check("constant_factor", dot_schedule_constant_factor(700, 0.1));
    check("linear_third", dot_schedule_linear(5, 1.0 / 3, 1.0));
    check("linear_up", dot_schedule_linear(1000, 1e-3, 1.0));
    check("linear_down", dot_schedule_linear(1500, 1.0, 0.0));
    s = dot_schedule_linear(1000, 0.25, 2.0);
    s.slopes[0] = DOT_SLOPE_SQRT;
    check("linear_sqrt", s);
    check("polynomial_5", dot_schedule_polynomial(5, 1.0, 0.0));
    check("polynomial_2000", dot_schedule_polynomial(2000, 1.0, 0.0));
    check("polynomial_1000", dot_schedule_polynomial(1000, 2.0, 0.0));
    check("polynomial_1500", dot_schedule_polynomial(1500, 0.5, 0.0));
    s = dot_schedule_polynomial(500, 3.0, 0.01);
    s.warmup = 50;
    s.start = 0.1;
    check("polynomial_floor", s);
    check("cosine_1000", dot_schedule_cosine(1000, 0.0));
    check("cosine_2000", dot_schedule_cosine(2000, 0.1));
    check("cosine_1", dot_schedule_cosine(1, 0.0));
    check("cosine_7", dot_schedule_cosine(7, 0.5));
    s = dot_schedule_cosine(300, 1e-5);         /* the floor as a learning rate */
    s.floor_base = 3e-3;
    check("cosine_absolute", s);
    check("rex", dot_schedule_rex(1000, 0.0));
    s = dot_schedule_rex(500, 0.1);
    s.warmup = 20;
    check("rex_floor", s);
    check("tanh", dot_schedule_tanh(1000, 0.0));
    s = dot_schedule_tanh(300, 0.05);
    s.tanh_from = -7;
    check("tanh_timm", s);
    check("range_test", dot_schedule_range_test(500, 1e-4, 10.0));
    check("swa_linear", dot_schedule_swa(10, 0.05, DOT_SLOPE_LINEAR));
    check("swa_cos", dot_schedule_swa(10, 0.05, DOT_SLOPE_COSINE));
    check("swa_long", dot_schedule_swa(1000, 0.05, DOT_SLOPE_COSINE));
    assert_int_equal(failures, 0);
}

static void test_warmups(void **state)
{
    dot_schedule s;
    (void)state;
    failures = 0;
    check("warmup_linear", dot_schedule_warmup_linear(1000, 100, 0.0));
    s = dot_schedule_warmup_linear(1000, 100, 0.03);
    s.start = 0.01;
    check("warmup_linear_floor", s);
    s = dot_schedule_warmup_linear(1000, 100, 1e-7);
    s.power = 2;
    s.floor_base = 1e-3;
    check("warmup_polynomial", s);
    check("warmup_cosine", dot_schedule_warmup_cosine(1000, 100, 0.0));
    s = dot_schedule_warmup_cosine(2000, 200, 0.03);
    s.start = 0.01;
    check("warmup_cosine_floor", s);
    s = dot_schedule_warmup_cosine(1000, 100, 1e-6);
    s.floor_base = 2e-4;
    check("warmup_cosine_absolute", s);
    check("warmup_only", dot_schedule_warmup_cosine(100, 100, 0.0));
    check("warmup_inverse_sqrt", dot_schedule_warmup_inverse_sqrt(100, 100));
    check("warmup_inverse_sqrt_none", dot_schedule_warmup_inverse_sqrt(0, 10000));
    check("noam", dot_schedule_noam(400, 512));
    check("noam_paper", dot_schedule_noam(4000, 512));
    check("stable_linear", dot_schedule_warmup_stable_decay(1000, 100, 200, DOT_SLOPE_LINEAR));
    check("stable_cos", dot_schedule_warmup_stable_decay(1000, 100, 200, DOT_SLOPE_COSINE));
    check("stable_sqrt", dot_schedule_warmup_stable_decay(1000, 100, 200, DOT_SLOPE_SQRT));
    s = dot_schedule_warmup_stable_decay(500, 50, 450, DOT_SLOPE_COSINE);
    s.floor = 0.1;
    check("stable_floor", s);
    s = dot_schedule_warmup_stable_decay(500, 0, 1, DOT_SLOPE_SQRT);
    s.floor = 0.1;
    check("stable_no_warmup", s);
    assert_int_equal(failures, 0);
}

/* ---- restarts ----------------------------------------------------------------------------------------------------------- */

static void check_periods(const char *name, dot_schedule s, int64_t total)
{
    numbers periods = golden("", name, ".period");
    assert_true(periods.count > 0);
    for (int64_t i = 0; i < periods.count; ++i)
        if ((double)dot_schedule_period(&s, i, total) != periods.values[i])
            fail_msg("%s: period %lld at step %lld", name, (long long)dot_schedule_period(&s, i, total), (long long)i);
    free(periods.values);
}

static void test_restarts(void **state)
{
    static const struct { const char *name; int64_t first; int factor; double floor; } cases[] = {
        { "restarts_10_2_0.0", 10, 2, 0.0 },  { "restarts_10_3_0.0", 10, 3, 0.0 }, { "restarts_10_3_0.05", 10, 3, 0.05 },
        { "restarts_100_1_0.1", 100, 1, 0.1 }, { "restarts_1_1_0.0", 1, 1, 0.0 },  { "restarts_7_4_0.0", 7, 4, 0.0 },
        { "restarts_1_2_0.3", 1, 2, 0.3 }
    };
    dot_schedule s;
    (void)state;
    failures = 0;
    for (int i = 0; i < COUNT(cases); ++i) {
        s = dot_schedule_warm_restarts(cases[i].first, cases[i].factor, cases[i].floor);
        check(cases[i].name, s);
        check_periods(cases[i].name, s, 2001);
    }
    s = dot_schedule_warm_restarts(10, 3, 0.0);
    assert_true(dot_schedule_at(&s, 1210) == 1.0);     /* the restart that a logarithm misses */
    s = dot_schedule_warm_restarts(50, 2, 0.01);
    s.decay = 0.5;
    s.warmup = 5;
    s.start = 0.001;
    check("restarts_decay", s);
    s = dot_schedule_warm_restarts(100, 1, 0.1);
    s.decay = 0.7;
    s.warmup = 10;
    s.start = 0.1;
    check("restarts_equal", s);
    assert_int_equal(failures, 0);
}

/* ---- cycles --------------------------------------------------------------------------------------------------------------- */

static dot_schedule one_cycle(int64_t total, double peak_at, dot_slope slope, bool three_phase)
{
    dot_schedule s = dot_schedule_one_cycle(total);
    s.peak_at = peak_at;
    s.slopes[0] = s.slopes[1] = s.slopes[2] = slope;
    s.three_phase = three_phase;
    return s;
}

static void test_one_cycle(void **state)
{
    (void)state;
    failures = 0;
    check("one_cycle", dot_schedule_one_cycle(1000));
    check("one_cycle_linear", one_cycle(1000, 0.3, DOT_SLOPE_LINEAR, false));
    check("one_cycle_three", one_cycle(1000, 0.3, DOT_SLOPE_COSINE, true));
    dot_schedule s = one_cycle(777, 0.3, DOT_SLOPE_LINEAR, true);
    s.peak = 3;
    s.div = 10;
    s.final_div = 100;
    check("one_cycle_three_linear", s);
    s = one_cycle(97, 0.45, DOT_SLOPE_COSINE, false);
    s.div = 20;
    s.final_div = 200;
    s.momentum_low = 0.8;
    s.momentum_high = 0.9;
    check("one_cycle_fraction", s);
    check("one_cycle_short", dot_schedule_one_cycle(5));
    s = dot_schedule_one_cycle(2000);
    s.peak_at = 0.2;
    check("one_cycle_nirdot", s);
    s = one_cycle(1000, 0.45, DOT_SLOPE_LINEAR, false);
    s.slopes[1] = DOT_SLOPE_COSINE;
    check("one_cycle_mixed", s);
    assert_int_equal(failures, 0);
}

static void test_cyclic(void **state)
{
    static const struct { const char *mode; double decay, factor; } modes[] = {
        { "triangular", 1, 1 }, { "triangular2", 0.5, 1 }, { "exp_range", 1, 0.999 }
    };
    static const struct { int64_t up, down; double low; } triangles[] = { { 200, 200, 0.1 }, { 30, 70, 0.25 } };
    (void)state;
    failures = 0;
    for (int i = 0; i < COUNT(modes); ++i)
        for (int j = 0; j < COUNT(triangles); ++j) {
            char name[64];
            dot_schedule s = dot_schedule_cyclic(triangles[j].up, triangles[j].down, triangles[j].low);
            s.decay = modes[i].decay;
            s.factor = modes[i].factor;
            snprintf(name, sizeof name, "%s_%d", modes[i].mode, (int)triangles[j].up);
            check(name, s);
        }
    assert_int_equal(failures, 0);
}

/* ---- combinations ------------------------------------------------------------------------------------------------------ */

static void test_sequences(void **state)
{
    static const int64_t at_100[] = { 100 }, at_20_60[] = { 20, 60 }, at_30_50[] = { 30, 50 }, drops[] = { 5, 9 };
    (void)state;
    failures = 0;
    const dot_schedule warm = dot_schedule_linear(100, 0.1, 1.0), cosine = dot_schedule_cosine(900, 0.0);
    const dot_schedule *const two[] = { &warm, &cosine };
    check("sequence", dot_schedule_sequence(two, at_100, 2));

    const dot_schedule low = dot_schedule_constant_factor(20, 0.1), fall = dot_schedule_exponential(0.9);
    const dot_schedule restarts = dot_schedule_warm_restarts(10, 3, 0.0);
    const dot_schedule *const three[] = { &low, &fall, &restarts };
    dot_schedule s = dot_schedule_sequence(three, at_20_60, 3);
    check("sequence_three", s);
    check_periods("sequence_three", s, 2001);
    const dot_schedule *const factors[] = { &cosine, &s };
    s = dot_schedule_product(factors, 1);
    assert_int_equal(dot_schedule_period(&s, 1210, 77), 77);
    const dot_schedule inner = dot_schedule_sequence(three, at_20_60, 3);
    const dot_schedule *const with_inner[] = { &cosine, &inner };
    check_periods("sequence_three", dot_schedule_product(with_inner, 2), 2001);

    const dot_schedule steps = dot_schedule_step(7, 0.5), drop = dot_schedule_step_drop(drops, 2, 0.1);
    const dot_schedule power = dot_schedule_polynomial(50, 2.0, 0.0);
    const dot_schedule *const stairs[] = { &steps, &drop, &power };
    check("sequence_steps", dot_schedule_sequence(stairs, at_30_50, 3));
    assert_int_equal(failures, 0);
}

static void test_products(void **state)
{
    static const int64_t at_10[] = { 10 }, at_100[] = { 100 }, at_400[] = { 400 }, drops[] = { 300, 301 };
    (void)state;
    failures = 0;
    const dot_schedule low = dot_schedule_constant_factor(20, 0.1), fall = dot_schedule_exponential(0.99);
    const dot_schedule *const two[] = { &low, &fall };
    check("product", dot_schedule_product(two, 2));

    const dot_schedule rise = dot_schedule_linear(50, 0.1, 1.0), steps = dot_schedule_step(100, 0.5);
    const dot_schedule drop = dot_schedule_step_drop(drops, 2, 0.1);
    const dot_schedule *const three[] = { &rise, &steps, &drop };
    check("product_three", dot_schedule_product(three, 3));

    const dot_schedule cosine = dot_schedule_cosine(500, 0.1), restarts = dot_schedule_warm_restarts(20, 2, 0.0);
    const dot_schedule *const curves[] = { &cosine, &restarts };
    const dot_schedule both = dot_schedule_product(curves, 2), warm = dot_schedule_linear(10, 0.0, 1.0);
    const dot_schedule *const phases[] = { &warm, &both };
    const dot_schedule run = dot_schedule_sequence(phases, at_10, 2), half = dot_schedule_step_drop(at_100, 1, 0.5);
    const dot_schedule *const outer[] = { &run, &half };
    const dot_schedule nested = dot_schedule_product(outer, 2);
    check("nested", nested);
    assert_int_equal(dot_schedule_period(&nested, 9, 600), 600);
    assert_int_equal(dot_schedule_period(&nested, 10, 600), 20);
    assert_int_equal(dot_schedule_period(&nested, 30, 600), 40);

    const dot_schedule cycle = dot_schedule_one_cycle(400), triangles = dot_schedule_cyclic(30, 70, 0.25);
    const dot_schedule *const cycles[] = { &cycle, &triangles };
    check("sequence_momentum", dot_schedule_sequence(cycles, at_400, 2));
    assert_int_equal(failures, 0);
}

static int words(const char *text)
{
    int count = 1;
    for (; *text; ++text)
        count += *text == ' ';
    return count;
}

/* After the tests above: they left no golden case out. */
static void test_all_cases(void **state)
{
    (void)state;
    assert_int_equal(cases_seen, words(dot_safetensors_metadata(golden_file, "cases")));
}

/* ---- names, overrides ---------------------------------------------------------------------------------------------------- */

static void test_names(void **state)
{
    dot_schedule_kind found;
    (void)state;
    for (int k = 0; k < DOT_SCHEDULE_KINDS; ++k) {
        const dot_schedule_kind kind = (dot_schedule_kind)k;
        assert_true(dot_schedule_find(dot_schedule_name(kind), &found) && found == kind);
        assert_true(strlen(dot_schedule_description(kind)) > 0 && strlen(dot_schedule_source(kind)) > 0);
        assert_true((strlen(dot_schedule_fields(kind)) > 0) == (kind != DOT_SCHEDULE_CONSTANT));
    }
    assert_string_equal(dot_schedule_name(DOT_SCHEDULE_WARM_RESTARTS), "warm-restarts");
    assert_null(dot_schedule_name(DOT_SCHEDULE_KINDS));
    assert_null(dot_schedule_description((dot_schedule_kind)-1));
    assert_null(dot_schedule_source((dot_schedule_kind)99));
    assert_null(dot_schedule_fields((dot_schedule_kind)99));
    assert_false(dot_schedule_find("cosin", &found) || dot_schedule_find(NULL, &found) || dot_schedule_find("cosine", NULL));
}

static void test_overrides(void **state)
{
    char text[512];
    (void)state;
    dot_schedule s = dot_schedule_one_cycle(1000);      /* NIR-DOT's: 0.9 and 3e-3 are not what is used */
    assert_true(dot_schedule_overrides(&s, 3e-3, 0.9, text, sizeof text));
    assert_string_equal(text, "one-cycle: the learning rate is not 0.003 but 0.00012 at step 0, 0.003 at step 299, 1.2e-08 at "
                              "step 999; the momentum (dot_schedule_momentum) not 0.9 but 0.95, 0.85, 0.95");
    const dot_schedule cosine = dot_schedule_cosine(10, 0.0), cyclic = dot_schedule_cyclic(30, 70, 0.25);
    const dot_schedule *const parts[] = { &cosine, &cyclic };
    s = dot_schedule_product(parts, 2);
    assert_true(dot_schedule_overrides(&s, 0.1, 0.5, text, sizeof text));
    assert_string_equal(text, "cyclic: the learning rate is not 0.1 but 0.025 at step 0, 0.1 at step 30, 0.025 at step 100; the "
                              "momentum (dot_schedule_momentum) not 0.5 but 0.9, 0.8, 0.9");
    assert_true(dot_schedule_overrides(&s, 0.1, 0.5, NULL, 0));
    assert_true(dot_schedule_overrides(&s, 0.1, 0.5, text, 5));
    assert_string_equal(text, "cycl");
    assert_false(dot_schedule_overrides(&cosine, 0.1, 0.9, text, sizeof text));
    assert_string_equal(text, "");
    s = dot_schedule_one_cycle(0);
    assert_false(dot_schedule_overrides(&s, 0.1, 0.9, text, sizeof text));
    assert_false(dot_schedule_overrides(NULL, 0.1, 0.9, text, sizeof text));
}

/* ---- invalid schedules ---------------------------------------------------------------------------------------------------- */

static void refused(const dot_schedule *s, const char *expected)
{
    char reason[256] = "", shorter[8];
    const char *wrong = dot_schedule_invalid(s, reason, sizeof reason);
    if (!wrong || strcmp(wrong, expected) != 0) {
        print_error("'%s', not '%s'\n", wrong ? wrong : "valid", expected);
        ++failures;
        return;
    }
    if (wrong != reason || !isnan(dot_schedule_at(s, 0)) || !isnan(dot_schedule_at(s, 1000)) ||
        !isnan(dot_schedule_momentum(s, 0)) || dot_schedule_period(s, 5, 77) != 77 || !dot_schedule_invalid(s, NULL, 0)) {
        print_error("%s: has a value\n", expected);
        ++failures;
    }
    assert_true(dot_schedule_invalid(s, shorter, sizeof shorter) == shorter && strncmp(shorter, expected, 7) == 0);
}

static void refuse(dot_schedule s, const char *expected)
{
    refused(&s, expected);
}

static dot_schedule cosine_with(size_t offset, double value)
{
    dot_schedule s = dot_schedule_cosine(10, 0.0);
    memcpy((char *)&s + offset, &value, sizeof value);
    return s;
}

static void test_invalid_fields(void **state)
{
    static const struct { const char *name; size_t offset; double below, above; const char *expected; } fields[] = {
#define FIELD(field, below, above, expected) { #field, offsetof(dot_schedule, field), below, above, expected }
        FIELD(floor, -1, INFINITY, ">= 0"),         FIELD(factor, -0.5, INFINITY, ">= 0"),  FIELD(start, -1, INFINITY, ">= 0"),
        FIELD(end, -1, INFINITY, ">= 0"),           FIELD(peak, -1, INFINITY, ">= 0"),      FIELD(floor_base, 0, INFINITY, "> 0"),
        FIELD(decay, -0.5, 1.5, "0..1"),            FIELD(power, 0, INFINITY, "> 0"),       FIELD(peak_at, -0.5, 1.5, "0..1"),
        FIELD(div, 0, INFINITY, "> 0"),             FIELD(final_div, -3, INFINITY, "> 0"),
        FIELD(momentum_low, -0.5, 1, "0 or more, below 1"),  FIELD(momentum_high, -0.5, 1, "0 or more, below 1"),
        FIELD(tanh_from, -INFINITY, INFINITY, "a finite number"),  FIELD(tanh_to, -INFINITY, INFINITY, "a finite number")
    };
    (void)state;
    failures = 0;
    for (int i = 0; i < COUNT(fields); ++i) {
        const double values[] = { fields[i].below, fields[i].above, NAN };
        for (int j = 0; j < COUNT(values); ++j) {
            char expected[128];
            snprintf(expected, sizeof expected, "cosine: %s %.15g, expected %s", fields[i].name, values[j], fields[i].expected);
            refuse(cosine_with(fields[i].offset, values[j]), expected);
        }
    }
    dot_schedule s = dot_schedule_cosine(10, 0.0);
    s.warmup = -1;
    refuse(s, "cosine: warmup -1, expected >= 0");
    s.warmup = 0;
    s.down = -2;
    refuse(s, "cosine: down -2, expected >= 0");
    s.down = 0;
    s.scale = 0;
    refuse(s, "cosine: scale 0, expected >= 1");
    s.scale = 1;
    s.slopes[2] = DOT_SLOPE_SQRT;
    refuse(s, "cosine: slopes[2] 2, expected 0..0");
    memset(&s, 0, sizeof s);
    refuse(s, "constant: total 0, expected >= 1");
    s.kind = (dot_schedule_kind)99;
    refuse(s, "schedule of kind 99, expected 0..21");
    refused(NULL, "schedule is NULL");
    assert_int_equal(failures, 0);
}

/* A schedule that does not read a field is refused with another value there, and only then; one that does is not. */
static void test_unread_fields(void **state)
{
    static const struct { const char *name; size_t offset; bool whole; double value; } fields[] = {
#define OTHER(field, whole, value) { #field, offsetof(dot_schedule, field), whole, value }
        OTHER(warmup, true, 1), OTHER(down, true, 1), OTHER(scale, true, 2), OTHER(floor, false, 0.125), OTHER(factor, false, 2),
        OTHER(start, false, 0.25), OTHER(end, false, 0.25), OTHER(peak, false, 2), OTHER(floor_base, false, 2),
        OTHER(decay, false, 0.5), OTHER(power, false, 2), OTHER(peak_at, false, 0.25), OTHER(div, false, 2),
        OTHER(final_div, false, 2), OTHER(momentum_low, false, 0.5), OTHER(momentum_high, false, 0.5),
        OTHER(tanh_from, false, 1), OTHER(tanh_to, false, 1)
    };
    const dot_schedule constant = dot_schedule_constant();
    const dot_schedule *const parts[] = { &constant };
    const dot_schedule all[] = {
        constant, dot_schedule_step(100, 0.5), dot_schedule_step_drop(NULL, 0, 0.5), dot_schedule_exponential(0.5),
        dot_schedule_range_test(100, 0.5, 1), dot_schedule_constant_factor(100, 0.5), dot_schedule_linear(100, 0.5, 0.5),
        dot_schedule_polynomial(100, 2, 0), dot_schedule_cosine(100, 0), dot_schedule_warm_restarts(100, 2, 0),
        dot_schedule_warmup_linear(100, 0, 0), dot_schedule_warmup_cosine(100, 0, 0), dot_schedule_warmup_inverse_sqrt(5, 5),
        dot_schedule_noam(5, 5), dot_schedule_one_cycle(100), dot_schedule_cyclic(50, 50, 0),
        dot_schedule_warmup_stable_decay(100, 5, 5, DOT_SLOPE_SQRT), dot_schedule_rex(100, 0), dot_schedule_tanh(100, 0),
        dot_schedule_swa(100, 0.5, DOT_SLOPE_SQRT), dot_schedule_sequence(parts, NULL, 1), dot_schedule_product(parts, 1)
    };
    int read = 0;
    (void)state;
    failures = 0;
    assert_int_equal(COUNT(all), DOT_SCHEDULE_KINDS);
    for (int i = 0; i < COUNT(all) * COUNT(fields); ++i) {
        const int f = i % COUNT(fields);
        const double value = fields[f].value;
        const int64_t whole = (int64_t)value;
        char list[256], word[64], expected[128];
        dot_schedule s = all[i / COUNT(fields)];
        assert_int_equal(s.kind, i / COUNT(fields));
        assert_null(dot_schedule_invalid(&s, NULL, 0));
        memcpy((char *)&s + fields[f].offset, fields[f].whole ? (const void *)&whole : (const void *)&value, 8);
        snprintf(list, sizeof list, " %s ", dot_schedule_fields(s.kind));
        snprintf(word, sizeof word, " %s ", fields[f].name);
        if (strstr(list, word)) {
            failures += dot_schedule_invalid(&s, NULL, 0) || isnan(dot_schedule_at(&s, 7));
            ++read;
            continue;
        }
        snprintf(expected, sizeof expected, "%s: %s %g, a field that it does not read", dot_schedule_name(s.kind), fields[f].name,
                 value);
        refuse(s, expected);
    }
    assert_true(read > 60 && read < 120);
    assert_int_equal(failures, 0);
}

static void test_invalid_kinds(void **state)
{
    static const int64_t many[17] = { 0 };
    dot_schedule s;
    (void)state;
    failures = 0;
    refuse(dot_schedule_step(0, 0.1), "step: total 0, expected >= 1");
    refuse(dot_schedule_step(10, NAN), "step: factor nan, expected >= 0");
    refuse(dot_schedule_step_drop(many, 17, 0.1), "step-drop: 17 milestones, expected 0..16 and an array");
    refuse(dot_schedule_step_drop(NULL, 1, 0.1), "step-drop: -1 milestones, expected 0..16 and an array");
    refuse(dot_schedule_exponential(-0.1), "exponential: factor -0.1, expected >= 0");
    refuse(dot_schedule_range_test(10, 0.0, 1.0), "range-test: start 0 and end 1, expected > 0");
    refuse(dot_schedule_range_test(10, 1.0, 0.0), "range-test: start 1 and end 0, expected > 0");
    refuse(dot_schedule_constant_factor(-1, 0.5), "constant-factor: total -1, expected >= 1");
    refuse(dot_schedule_linear(0, 0.1, 1.0), "linear: total 0, expected >= 1");
    refuse(dot_schedule_linear(10, -0.1, 1.0), "linear: start -0.1, expected >= 0");
    refuse(dot_schedule_polynomial(10, 0.0, 0.0), "polynomial: power 0, expected > 0");
    refuse(dot_schedule_cosine(10, 1.5), "cosine: floor 1.5, expected 0..1");
    s = dot_schedule_cosine(10, 0.1);
    s.floor_base = 0.01;
    refuse(s, "cosine: floor 0.1, expected 0..0.01");
    refuse(dot_schedule_warm_restarts(0, 2, 0.0), "warm-restarts: total 0, expected >= 1");
    refuse(dot_schedule_warm_restarts(10, 0, 0.0), "warm-restarts: factor 0, expected a whole number, 1..1e6");
    refuse(dot_schedule_warm_restarts(10, 1000001, 0.0), "warm-restarts: factor 1e+06, expected a whole number, 1..1e6");
    s = dot_schedule_warm_restarts(10, 2, 0.0);
    s.factor = 1.5;
    refuse(s, "warm-restarts: factor 1.5, expected a whole number, 1..1e6");
    s.factor = 2;
    s.warmup = 10;
    refuse(s, "warm-restarts: warmup 10, expected less than the first period, 10");
    refuse(dot_schedule_warmup_linear(10, 11, 0.0), "warmup-linear: warmup 11 and down 0, expected at most the total, 10");
    refuse(dot_schedule_warmup_cosine(10, -1, 0.0), "warmup-cosine: warmup -1, expected >= 0");
    refuse(dot_schedule_warmup_inverse_sqrt(10, 0), "warmup-inverse-sqrt: scale 0, expected >= 1");
    refuse(dot_schedule_noam(0, 512), "noam: warmup 0, expected >= 1");
    refuse(dot_schedule_noam(10, -512), "noam: scale -512, expected >= 1");
    refuse(dot_schedule_warmup_stable_decay(10, 5, 6, DOT_SLOPE_LINEAR),
           "warmup-stable-decay: warmup 5 and down 6, expected at most the total, 10");
    refuse(dot_schedule_warmup_stable_decay(10, 5, 0, DOT_SLOPE_LINEAR), "warmup-stable-decay: down 0, expected >= 1");
    refuse(dot_schedule_rex(0, 0.0), "rex: total 0, expected >= 1");
    refuse(dot_schedule_tanh(10, -1.0), "tanh: floor -1, expected >= 0");
    refuse(dot_schedule_swa(10, NAN, DOT_SLOPE_LINEAR), "swa: end nan, expected >= 0");
    refuse(dot_schedule_swa(10, 0.1, (dot_slope)7), "swa: slopes[0] 7, expected 0..2");
    assert_int_equal(failures, 0);
}

static void test_invalid_cycles(void **state)
{
    static const char phase[] = "expected between the first step and the last";
    char expected[256];
    (void)state;
    failures = 0;
    refuse(dot_schedule_one_cycle(0), "one-cycle: total 0, expected >= 1");
    snprintf(expected, sizeof expected, "one-cycle: peak_at 0.3 of 3 steps ends phase 1 at step -0.1, %s", phase);
    refuse(dot_schedule_one_cycle(3), expected);
    snprintf(expected, sizeof expected, "one-cycle: peak_at 1 of 10 steps ends phase 1 at step 9, %s", phase);
    refuse(one_cycle(10, 1, DOT_SLOPE_COSINE, false), expected);
    snprintf(expected, sizeof expected, "one-cycle: peak_at 0.6 of 10 steps ends phase 1 at step 5 and phase 2 twice as late, %s",
             phase);
    refuse(one_cycle(10, 0.6, DOT_SLOPE_COSINE, true), expected);
    refuse(dot_schedule_cyclic(0, 10, 0.1), "cyclic: up 0, expected >= 1");
    refuse(dot_schedule_cyclic(-5, 10, 0.1), "cyclic: warmup 0 and down 10, expected at most the total, 5");
    refuse(dot_schedule_cyclic(10, 0, 0.1), "cyclic: down 0, expected >= 1");
    refuse(dot_schedule_cyclic(10, -1, 0.1), "cyclic: down -1, expected >= 0");
    refuse(dot_schedule_cyclic(10, 10, -0.1), "cyclic: start -0.1, expected >= 0");
    refuse(dot_schedule_cyclic(INT64_MAX, 2, 0.1), "cyclic: total -9.22337203685478e+18, expected >= 1");
    assert_int_equal(failures, 0);
}

static void test_invalid_combinations(void **state)
{
    static const int64_t rising[] = { 5, 9, 12, 13, 14, 15, 16, 17 }, falling[] = { 5, 5 }, zero[] = { 0 };
    const dot_schedule good = dot_schedule_cosine(10, 0.0), bad = dot_schedule_rex(0, 0.0);
    const dot_schedule *const parts[9] = { &good, &good, &good, &good, &good, &good, &good, &good, &good };
    const dot_schedule *const with_null[] = { &good, NULL }, *const with_bad[] = { &good, &bad };
    dot_schedule s;
    (void)state;
    failures = 0;
    refuse(dot_schedule_product(parts, 0), "product: 0 parts, expected 1..8 and an array");
    refuse(dot_schedule_product(parts, 9), "product: 9 parts, expected 1..8 and an array");
    refuse(dot_schedule_product(NULL, 2), "product: 0 parts, expected 1..8 and an array");
    refuse(dot_schedule_product(parts, INT_MIN), "product: -2147483648 parts, expected 1..8 and an array");
    refuse(dot_schedule_product(with_null, 2), "schedule is NULL");
    refuse(dot_schedule_product(with_bad, 2), "rex: total 0, expected >= 1");
    refuse(dot_schedule_sequence(parts, rising, 9), "sequence: 9 parts, expected 1..8 and an array");
    refuse(dot_schedule_sequence(parts, rising, 0), "sequence: 0 parts, expected 1..8 and an array");
    refuse(dot_schedule_sequence(parts, falling, 3), "sequence: boundary 1 at step 5, expected above 5");
    refuse(dot_schedule_sequence(parts, zero, 2), "sequence: boundary 0 at step 0, expected above 0");
    refuse(dot_schedule_sequence(parts, NULL, 2), "sequence: -1 milestones, expected 0..16 and an array");
    refuse(dot_schedule_sequence(with_bad, rising, 2), "rex: total 0, expected >= 1");
    s = dot_schedule_sequence(parts, rising, 3);
    s.part_count = 2;
    refuse(s, "sequence: 2 boundaries, expected one less than the 2 parts");
    s.parts[1] = &s;                    /* one that holds itself */
    s.part_count = 3;
    refused(&s, "sequence: nested more than 8 deep");
    s = dot_schedule_sequence(parts, rising, 8);
    assert_null(dot_schedule_invalid(&s, NULL, 0));
    assert_int_equal(failures, 0);
}

/* ---- plateau ------------------------------------------------------------------------------------------------------------ */

static int check_plateau(const char *name, const char *suffix, dot_plateau plateau)
{
    numbers metrics = golden("plateau.", name, ".metrics"), expected = golden("plateau.", name, suffix);
    int wrong = 0;
    assert_true(metrics.count > 0 && metrics.count == expected.count);
    for (int64_t i = 0; i < metrics.count; ++i) {
        unsigned char saved[sizeof plateau];    /* a plain struct: its bytes go on as it would */
        memcpy(saved, &plateau, sizeof plateau);
        memset(&plateau, 0xa5, sizeof plateau);
        memcpy(&plateau, saved, sizeof plateau);
        const double ours = dot_plateau_observe(&plateau, metrics.values[i]);
        assert_true(ours == plateau.multiplier);
        if (!(fabs(ours - expected.values[i]) <= 1e-15 * expected.values[i]) && ++wrong == 1)
            print_error("plateau %s%s: %.17g, not %.17g at %lld\n", name, suffix, ours, expected.values[i], (long long)i);
    }
    free(metrics.values);
    free(expected.values);
    return wrong > 0;
}

static void test_plateau(void **state)
{
    static const struct {
        const char *name;
        bool maximize, absolute, torch_errs;
        int64_t patience, cooldown;
        double factor, threshold, floor, eps;
    } cases[] = {
        { "constant", false, false, false, 2, 0, 0.1, 1e-4, 0, 1e-8 },
        { "patience_0", false, false, false, 0, 0, 0.5, 1e-4, 0, 1e-8 },
        { "maximize", true, false, false, 5, 0, 0.7, 1e-4, 0, 1e-8 },
        { "maximize_abs", true, true, false, 3, 0, 0.9, 0.01, 0, 1e-8 },
        { "absolute", false, true, false, 4, 0, 0.5, 0.02, 0, 1e-8 },
        { "absolute_negative", false, true, false, 4, 0, 0.5, 0.02, 0, 1e-8 },
        { "cooldown", false, false, false, 3, 5, 0.5, 1e-4, 0, 1e-8 },
        { "cooldown_long", false, false, false, 1, 17, 0.8, 0.05, 0, 1e-8 },
        { "floor", false, false, false, 2, 0, 0.3, 1e-4, 0.02, 1e-8 },
        { "eps", false, false, false, 1, 0, 0.5, 1e-4, 0, 0.01 },
        { "nan", false, false, false, 4, 0, 0.6, 1e-4, 0, 1e-8 },
        { "nan_first", false, false, false, 4, 0, 0.6, 1e-4, 0, 1e-8 },
        { "all_nan", false, false, false, 3, 0, 0.5, 1e-4, 0, 1e-8 },
        { "infinite", false, false, false, 1, 0, 0.5, 1e-4, 0, 1e-8 },
        { "negative", false, false, true, 3, 0, 0.5, 0.1, 0, 1e-8 },
        { "negative_better", false, false, false, 2, 0, 0.5, 0.01, 0, 1e-8 },
        { "negative_max", true, false, true, 3, 0, 0.5, 0.1, 0, 1e-8 }
    };
    (void)state;
    failures = check_plateau("defaults", ".torch", dot_plateau_defaults());
    for (int i = 0; i < COUNT(cases); ++i) {
        dot_plateau p = dot_plateau_defaults();
        p.maximize = cases[i].maximize;
        p.absolute = cases[i].absolute;
        p.patience = cases[i].patience;
        p.cooldown = cases[i].cooldown;
        p.factor = cases[i].factor;
        p.threshold = cases[i].threshold;
        p.floor = cases[i].floor;
        p.eps = cases[i].eps;
        failures += check_plateau(cases[i].name, ".right", p);
        if (!cases[i].torch_errs)
            failures += check_plateau(cases[i].name, ".torch", p);
    }
    assert_int_equal(words(dot_safetensors_metadata(golden_file, "plateaus")), COUNT(cases) + 1);
    assert_int_equal(failures, 0);
}

static void refuse_plateau(dot_plateau p, const char *expected)
{
    char reason[256];
    const dot_plateau before = p;
    const char *wrong = dot_plateau_invalid(&p, reason, sizeof reason);
    if (!wrong || strcmp(wrong, expected) != 0 || !isnan(dot_plateau_observe(&p, 1.0)) || p.bad != before.bad || !isnan(p.best)) {
        print_error("'%s', not '%s'\n", wrong ? wrong : "valid", expected);
        ++failures;
    }
}

static void test_invalid_plateau(void **state)
{
    static const struct { size_t offset; double value; const char *expected; } cases[] = {
#define BAD(field, value, expected) { offsetof(dot_plateau, field), value, "plateau: " expected }
        BAD(threshold, -1, "threshold -1, expected >= 0"),      BAD(threshold, NAN, "threshold nan, expected >= 0"),
        BAD(factor, 1, "factor 1, expected 0 or more, below 1"), BAD(factor, -0.1, "factor -0.1, expected 0 or more, below 1"),
        BAD(floor, -1, "floor -1, expected >= 0"),              BAD(floor, INFINITY, "floor inf, expected >= 0"),
        BAD(eps, -1, "eps -1, expected >= 0"),                  BAD(multiplier, NAN, "multiplier nan, expected >= 0")
    };
    dot_plateau p = dot_plateau_defaults();
    (void)state;
    failures = 0;
    for (int i = 0; i < COUNT(cases); ++i) {
        p = dot_plateau_defaults();
        memcpy((char *)&p + cases[i].offset, &cases[i].value, sizeof(double));
        refuse_plateau(p, cases[i].expected);
    }
    p = dot_plateau_defaults();
    p.patience = -1;
    refuse_plateau(p, "plateau: patience -1, expected >= 0");
    p = dot_plateau_defaults();
    p.cooldown = -1;
    refuse_plateau(p, "plateau: cooldown -1, expected >= 0");
    p = dot_plateau_defaults();
    p.magic = 7;
    refuse_plateau(p, "plateau: not filled by dot_plateau_defaults (magic 0x00000007)");
    assert_true(isnan(dot_plateau_observe(NULL, 1.0)));
    assert_string_equal(dot_plateau_invalid(NULL, NULL, 0), "invalid");
    p = dot_plateau_defaults();
    assert_null(dot_plateau_invalid(&p, NULL, 0));
    assert_int_equal(failures, 0);
}

/* ---- any scalar ----------------------------------------------------------------------------------------------------------- */

static void test_any_scalar(void **state)
{
    (void)state;
    dot_context *ctx = dot_context_create(NULL);
    dot_layer *net = dot_nn_linear(ctx, 1, 1);
    dot_optimizer_options o = dot_optimizer_defaults(DOT_ADAMW);
    dot_optimizer *optimizer = dot_optimizer_create(ctx, net, &o);
    const dot_schedule s = dot_schedule_one_cycle(10), grow = dot_schedule_linear(10, 0.0, 2.0);
    for (int64_t step = -2; step < 14; ++step) {
        assert_true(dot_optimizer_set(optimizer, DOT_HYPER_BETA1, DOT_ALL, DOT_ALL, dot_schedule_momentum(&s, step)));
        assert_true(dot_optimizer_set(optimizer, DOT_HYPER_WEIGHT_DECAY, DOT_ALL, DOT_ALL, 1e-2 * dot_schedule_at(&grow, step)));
        assert_true(dot_optimizer_get(optimizer, DOT_HYPER_BETA1, 0, 0) == dot_schedule_momentum(&s, step));
    }
    assert_true(dot_optimizer_get(optimizer, DOT_HYPER_WEIGHT_DECAY, 0, 0) == 2e-2);
    dot_context_destroy(ctx);
}

static int open_golden(void **state)
{
    (void)state;
    golden_context = dot_context_create(NULL);
    golden_file = dot_safetensors_open(golden_context, GOLDEN);
    if (!golden_file)
        print_error("%s: %s\n", GOLDEN, dot_error(golden_context));
    return golden_file ? 0 : -1;
}

static int close_golden(void **state)
{
    (void)state;
    dot_context_destroy(golden_context);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_simple),
        cmocka_unit_test(test_warmups),
        cmocka_unit_test(test_restarts),
        cmocka_unit_test(test_one_cycle),
        cmocka_unit_test(test_cyclic),
        cmocka_unit_test(test_sequences),
        cmocka_unit_test(test_products),
        cmocka_unit_test(test_all_cases),
        cmocka_unit_test(test_names),
        cmocka_unit_test(test_overrides),
        cmocka_unit_test(test_invalid_fields),
        cmocka_unit_test(test_unread_fields),
        cmocka_unit_test(test_invalid_kinds),
        cmocka_unit_test(test_invalid_cycles),
        cmocka_unit_test(test_invalid_combinations),
        cmocka_unit_test(test_plateau),
        cmocka_unit_test(test_invalid_plateau),
        cmocka_unit_test(test_any_scalar)
    };
    return cmocka_run_group_tests_name("schedules", tests, open_golden, close_golden);
}
