/* Tests of run logs and NPY files. The event files and .wandb files are read back by decoders that are written here, apart from
   the library, from the formats' descriptions; their checksums are checked with published vectors. golden/logs.safetensors has
   files of numpy.save, histograms of numpy.histogram and digests of hashlib. tools/check_logs.py reads logs with the readers of
   TensorBoard and W&B themselves. */
#define _XOPEN_SOURCE 700       /* fork, setrlimit, symlink, nanosleep */
#include <stdarg.h>
#include <stddef.h>
#include <setjmp.h>
#include <stdint.h>
#include <cmocka.h>

#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dotopt.h"
#include "counting.h"
#include "examples/json.h"

#define COUNT(array) ((int)(sizeof (array) / sizeof *(array)))
#define MOST 20000              /* records of a file */

static char root[64];
static dot_context *ctx;
static double now;              /* what the logs' clock says */

/* ---- helpers ---- */

static double test_clock(void *user)
{
    (void)user;
    return now;
}

/* A folder that is not there yet. */
static const char *new_folder(void)
{
    static char paths[4][128];
    static int turn, count;
    turn = (turn + 1) % 4;
    snprintf(paths[turn], sizeof paths[turn], "%s/run%d", root, count++);
    return paths[turn];
}

static const char *in(const char *folder, const char *name)
{
    static char paths[8][640];
    static int turn;
    turn = (turn + 1) % 8;
    snprintf(paths[turn], sizeof paths[turn], "%.300s/%.300s", folder, name);
    return paths[turn];
}

static unsigned char *read_bytes(const char *path, size_t *size)
{
    struct stat status;
    if (stat(path, &status) != 0) fail_msg("%s is not there", path);
    *size = (size_t)status.st_size;
    unsigned char *bytes = (unsigned char *)calloc(*size + 1, 1);
    FILE *file = fopen(path, "rb");
    assert_non_null(bytes);
    assert_non_null(file);
    assert_int_equal(fread(bytes, 1, *size, file), *size);
    fclose(file);
    return bytes;
}

static void write_bytes(const char *path, const void *bytes, size_t size)
{
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    if (size > 0) assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
}

/* The names in a folder that begin with `prefix`, sorted. */
static int names_in(const char *folder, const char *prefix, char names[][256], int most)
{
    int count = 0;
    DIR *list = opendir(folder);
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list)) != NULL;)
        if (entry->d_name[0] != '.' && strncmp(entry->d_name, prefix, strlen(prefix)) == 0) {
            assert_true(count < most);
            snprintf(names[count++], 256, "%s", entry->d_name);
        }
    closedir(list);
    qsort(names, (size_t)count, 256, (int (*)(const void *, const void *))strcmp);
    return count;
}

static const char *events_path(const char *folder, int index)
{
    char names[8][256];
    assert_true(names_in(folder, "events.out.tfevents.", names, 8) > index);
    return in(folder, names[index]);
}

/* The .wandb file, of which there must be one. */
static const char *wandb_path(const char *folder)
{
    char names[8][256], runs[8][256];
    assert_int_equal(names_in(in(folder, "wandb"), "offline-run-", names, 8), 1);
    const char *run = in(in(folder, "wandb"), names[0]);
    int count = names_in(run, "run-", runs, 8);
    assert_true(count == 1 || count == 2);          /* and its mark */
    return in(run, runs[0]);
}

static dot_logger_options options(void)
{
    dot_logger_options o = dot_logger_defaults();
    o.clock = test_clock;
    o.id = "ab12";
    return o;
}

static void assert_ok(void)
{
    if (!dot_ok(ctx)) fail_msg("%s", dot_error(ctx));
}

/* The standing error has this status, and its sentence begins with the function and contains the text. Forgets it. */
static void assert_error(dot_status status, const char *function, const char *text)
{
    const char *sentence = dot_error(ctx);
    if (dot_error_status(ctx) != status || strncmp(sentence, function, strlen(function)) != 0 ||
        sentence[strlen(function)] != ':' || !strstr(sentence, text))
        fail_msg("status %d \"%s\", expected %d %s: ...%s", (int)dot_error_status(ctx), sentence, (int)status, function, text);
    dot_error_clear(ctx);
}

static void new_context(const dot_context_options *given)
{
    dot_context_options defaults = dot_context_defaults();
    defaults.threads = 1;
    dot_context_destroy(ctx);
    ctx = dot_context_create(given ? given : &defaults);
    assert_non_null(ctx);
}

static int setup(void **state)
{
    (void)state;
    now = 1700000000.25;
    ctx = NULL;
    new_context(NULL);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    dot_context_destroy(ctx);
    ctx = NULL;
    return 0;
}

static dot_logger *open_log(const char *folder, bool resume, int64_t step)
{
    dot_logger_options o = options();
    o.resume = resume;
    o.resume_step = step;
    dot_logger *log = dot_logger_create(ctx, folder, &o);
    if (!log) fail_msg("%s", dot_error(ctx));
    return log;
}

/* ---- decoders ---- */

static uint32_t crc(uint32_t polynomial, const unsigned char *bytes, size_t count)
{
    uint32_t c = 0xffffffffu;
    for (size_t i = 0; i < count; ++i) {
        c ^= bytes[i];
        for (int k = 0; k < 8; ++k) c = (c >> 1) ^ ((c & 1) ? polynomial : 0);
    }
    return c ^ 0xffffffffu;
}

static uint32_t masked(uint32_t c) { return ((c >> 15) | (c << 17)) + 0xa282ead8u; }

static uint64_t little(const unsigned char *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= (uint64_t)at[i] << (8 * i);
    return value;
}

static double as_double(uint64_t bits)
{
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double as_float(uint64_t bits)
{
    float value;
    uint32_t low = (uint32_t)bits;
    memcpy(&value, &low, sizeof value);
    return (double)value;
}

typedef struct { const unsigned char *at; size_t size; } span;
typedef struct { unsigned number, type; uint64_t value; span body; } field;

static uint64_t varint(span *s)
{
    uint64_t value = 0;
    for (int shift = 0; ; shift += 7) {
        assert_true(s->size > 0 && shift < 64);
        unsigned char byte = *s->at++;
        s->size--;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return value;
    }
}

/* The next field of a message; false at its end. Anything malformed fails the test. */
static bool next_field(span *s, field *f)
{
    if (s->size == 0) return false;
    uint64_t tag = varint(s);
    f->number = (unsigned)(tag >> 3);
    f->type = (unsigned)(tag & 7);
    assert_true(f->number > 0 && (f->type <= 2 || f->type == 5));
    size_t size = f->type == 1 ? 8 : f->type == 5 ? 4 : 0;
    if (f->type == 0) f->value = varint(s);
    if (f->type == 2) size = (size_t)varint(s);
    assert_true(size <= s->size);
    f->body.at = s->at;
    f->body.size = size;
    if (f->type == 1 || f->type == 5) f->value = little(s->at, (int)size);
    s->at += size;
    s->size -= size;
    return true;
}

/* Field `number` of a message, the `index`-th of several. */
static bool get(span message, unsigned number, int index, field *f)
{
    while (next_field(&message, f))
        if (f->number == number && index-- == 0) return true;
    memset(f, 0, sizeof *f);
    return false;
}

static span inside(span message, unsigned number)
{
    field f;
    if (!get(message, number, 0, &f)) fail_msg("no field %u", number);
    assert_int_equal(f.type, 2);
    return f.body;
}

static bool is_text(span s, const char *text) { return s.size == strlen(text) && memcmp(s.at, text, s.size) == 0; }

static void assert_text(span s, const char *text)
{
    if (!is_text(s, text)) fail_msg("\"%.*s\", expected \"%s\"", (int)s.size, (const char *)s.at, text);
}

/* The records of an event file. `torn`: it may end within one; how many bytes of it there are. */
typedef struct { unsigned char *bytes; size_t size; span *records; int count; size_t torn; } decoded;

static void release(decoded *d)
{
    free(d->bytes);
    free(d->records);
}

static void add_record(decoded *d, const unsigned char *at, size_t size)
{
    assert_true(d->count < MOST);
    d->records[d->count].at = at;
    d->records[d->count++].size = size;
}

static decoded read_events(const char *path)
{
    decoded d = { NULL, 0, (span *)calloc(MOST, sizeof(span)), 0, 0 };
    d.bytes = read_bytes(path, &d.size);
    for (size_t at = 0; at < d.size;) {
        const unsigned char *head = d.bytes + at;
        d.torn = d.size - at;
        if (d.torn < 12) return d;
        uint64_t length = little(head, 8);
        assert_int_equal(little(head + 8, 4), masked(crc(0x82f63b78u, head, 8)));
        if (d.torn < 16 + length) return d;
        assert_int_equal(little(head + 12 + length, 4), masked(crc(0x82f63b78u, head + 12, (size_t)length)));
        add_record(&d, head + 12, (size_t)length);
        at += 16 + (size_t)length;
        d.torn = 0;
    }
    return d;
}

/* The records of a .wandb file: LevelDB's log format, with plain CRC-32. */
static decoded read_wandb(const char *path)
{
    decoded d = { NULL, 0, (span *)calloc(MOST, sizeof(span)), 0, 0 };
    d.bytes = read_bytes(path, &d.size);
    size_t at = 7, out = 0, begin = 0;              /* records are put together in place: they only become shorter */
    bool open = false;
    assert_true(d.size >= 7);
    assert_memory_equal(d.bytes, ":W&B\xe1\xbe\0", 7);
    while (at < d.size) {
        size_t left = 32768 - at % 32768;
        if (left < 7) {
            for (; left > 0 && at < d.size; --left) assert_int_equal(d.bytes[at++], 0);
            continue;
        }
        d.torn = d.size - at;
        if (d.torn < 7) return d;
        size_t length = (size_t)little(d.bytes + at + 4, 2);
        unsigned type = d.bytes[at + 6];
        assert_true(length + 7 <= left);
        if (d.torn < 7 + length) return d;
        assert_int_equal(little(d.bytes + at, 4), crc(0xedb88320u, d.bytes + at + 6, length + 1));
        assert_true(type >= 1 && type <= 4 && (type >= 3) == open);
        if (!open) begin = out;
        memmove(d.bytes + out, d.bytes + at + 7, length);
        out += length;
        open = type == 2 || type == 3;
        if (!open) add_record(&d, d.bytes + begin, out - begin);
        at += 7 + length;
        d.torn = 0;
    }
    assert_false(open);
    return d;
}

/* The lines of log.jsonl, which must all be whole and strict JSON, but for a torn last one. */
typedef struct { unsigned char *bytes; size_t size; json_document *line; int count; size_t torn; } lines;

static lines read_lines(const char *folder)
{
    lines l = { NULL, 0, (json_document *)calloc(MOST, sizeof(json_document)), 0, 0 };
    l.bytes = read_bytes(in(folder, "log.jsonl"), &l.size);
    char *at = (char *)l.bytes, *end;
    for (; (end = memchr(at, '\n', l.size - (size_t)(at - (char *)l.bytes))) != NULL; at = end + 1) {
        *end = 0;
        assert_true(l.count < MOST);
        if (!json_parse(&l.line[l.count], at, (size_t)(end - at)))
            fail_msg("line %d, \"%.200s\": %s", l.count + 1, at, l.line[l.count].error);
        l.count++;
    }
    l.torn = l.size - (size_t)(at - (char *)l.bytes);
    return l;
}

static void release_lines(lines *l)
{
    for (int i = 0; i < l->count; ++i) json_release(&l->line[i]);
    free(l->line);
    free(l->bytes);
}

static const char *kind(const lines *l, int i) { return json_get_string(&l->line[i], &l->line[i].nodes[0], "kind", ""); }

static const json_node *member(const lines *l, int i, const char *key)
{
    const json_node *found = json_find(&l->line[i], &l->line[i].nodes[0], key);
    if (!found) fail_msg("line %d has no \"%s\"", i + 1, key);
    return found;
}

static double number(const lines *l, int i, const char *key) { return member(l, i, key)->number; }

static double value_of(const lines *l, int i, const char *tag)
{
    const json_node *found = json_find(&l->line[i], member(l, i, "values"), tag);
    assert_non_null(found);
    return found->number;
}

/* W&B: the JSON of `key` in record i, which has items in message `kind` (config 5, history 2, summary 3); NULL: none. */
static char *item(const decoded *d, int i, unsigned which, const char *key)
{
    static char text[40000];
    field f;
    span message = inside(d->records[i], which);
    char *found = NULL;
    while (next_field(&message, &f)) {
        if (f.number != 1 || !is_text(inside(f.body, 1), key)) continue;
        span json = inside(f.body, 16);
        assert_true(json.size < sizeof text);
        memcpy(text, json.at, json.size);
        text[json.size] = 0;
        found = text;
    }
    return found;
}

static double item_number(const decoded *d, int i, unsigned which, const char *key)
{
    char *text = item(d, i, which, key), *end = NULL;
    if (!text) fail_msg("record %d has no %s", i, key);
    double value = strtod(text, &end);
    assert_int_equal(*end, 0);
    return value;
}

/* Record i's kind: the number of its second field, the first being the record's number. */
static unsigned record_kind(const decoded *d, int i)
{
    span s = d->records[i];
    field f;
    assert_true(next_field(&s, &f) && f.number == 1 && f.type == 0);
    assert_true(next_field(&s, &f) && s.size == 0);
    return f.number;
}

static int64_t row_step(const decoded *d, int i)
{
    field f;
    assert_true(get(inside(inside(d->records[i], 2), 2), 1, 0, &f));
    assert_true((double)f.value == item_number(d, i, 2, "_step"));
    return (int64_t)f.value;
}

static int64_t event_step(span event)
{
    field f;
    return get(event, 2, 0, &f) ? (int64_t)f.value : 0;
}

/* ---- known bytes ---- */

static void test_decoders(void **state)
{
    (void)state;
    const unsigned char *digits = (const unsigned char *)"123456789";
    assert_int_equal(crc(0x82f63b78u, digits, 9), 0xe3069283u);     /* RFC 3720 and the catalogues of CRCs */
    assert_int_equal(masked(crc(0x82f63b78u, digits, 9)), 0xc78ab0e5u);
    assert_int_equal(crc(0xedb88320u, digits, 9), 0xcbf43926u);
    span s = { (const unsigned char *)"\x96\x01", 2 };
    assert_int_equal(varint(&s), 150);                              /* the example of the protocol's documentation */
}

static void test_first_bytes(void **state)
{
    (void)state;
    static const unsigned char event[] = {
        0x18, 0, 0, 0, 0, 0, 0, 0, 0xa3, 0x7f, 0x4b, 0x22, 0x09, 0, 0, 0x10, 0x40, 0xfc, 0x54, 0xd9, 0x41, 0x1a, 0x0d,
        'b', 'r', 'a', 'i', 'n', '.', 'E', 'v', 'e', 'n', 't', ':', '2', 0x33, 0x8d, 0x2f, 0xe9 };
    static const char start[] = "{\"kind\":\"start\",\"time\":1700000000.250000,\"id\":\"ab12\",\"began\":1700000000,"
                                "\"events\":1700000000,\"name\":\"n\",\"project\":\"p\",\"group\":\"g\",\"library\":\"dotopt ";
    const char *folder = new_folder();
    dot_logger_options o = options();
    o.name = "n";
    o.project = "p";
    o.group = "g";
    dot_logger *log = dot_logger_create(ctx, folder, &o);
    assert_ok();
    assert_string_equal(dot_logger_id(log), "ab12");
    size_t size;
    unsigned char *bytes = read_bytes(events_path(folder, 0), &size);
    assert_int_equal(size, sizeof event);
    assert_memory_equal(bytes, event, size);
    free(bytes);
    bytes = read_bytes(in(folder, "log.jsonl"), &size);
    assert_memory_equal(bytes, start, sizeof start - 1);
    free(bytes);
    assert_non_null(strstr(events_path(folder, 0), "/events.out.tfevents.1700000000."));
    const char *path = in(folder, "wandb/offline-run-20231114_221320-ab12/run-ab12.wandb");     /* in UTC */
    assert_string_equal(wandb_path(folder), path);
    decoded d = read_wandb(path);
    assert_int_equal(d.count, 2);
    assert_int_equal(record_kind(&d, 0), 21);
    assert_text(inside(inside(inside(d.records[0], 21), 1), 2), "0.70.0");
    assert_int_equal(record_kind(&d, 1), 17);
    span run = inside(d.records[1], 17);
    field f;
    assert_text(inside(run, 1), "ab12");
    assert_text(inside(run, 3), "p");
    assert_text(inside(run, 6), "g");
    assert_text(inside(run, 8), "n");
    assert_true(get(inside(run, 17), 1, 0, &f));
    assert_int_equal(f.value, 1700000000);
    release(&d);
}

static void test_dates(void **state)
{
    (void)state;
    static const struct { double time; const char *name; } dates[] = {      /* date -u -d @TIME +%Y%m%d_%H%M%S */
        { 0, "19700101_000000" }, { 951782399, "20000228_235959" }, { 951868800, "20000301_000000" },
        { 951782400, "20000229_000000" }, { 1709251199.9, "20240229_235959" }, { 4107542400.0, "21000301_000000" },
        { 4107542399.0, "21000228_235959" }, { 1735689599, "20241231_235959" } };
    for (int i = 0; i < COUNT(dates); ++i) {
        char expected[64];
        now = dates[i].time;
        const char *folder = new_folder();
        assert_non_null(open_log(folder, false, -1));
        snprintf(expected, sizeof expected, "/offline-run-%s-ab12/", dates[i].name);
        if (!strstr(wandb_path(folder), expected)) fail_msg("%s, expected %s", wandb_path(folder), expected);
    }
}

/* Without options: the system's clock, an id of its own, the folder's name. */
static void test_defaults(void **state)
{
    (void)state;
    char ids[2][65];
    for (int i = 0; i < 2; ++i) {
        const char *folder = new_folder();
        double before = (double)time(NULL);
        dot_logger *log = dot_logger_create(ctx, folder, NULL);
        assert_ok();
        snprintf(ids[i], sizeof ids[i], "%s", dot_logger_id(log));
        assert_int_equal(strlen(ids[i]), 8);
        assert_int_equal(strspn(ids[i], "0123456789abcdefghijklmnopqrstuvwxyz"), 8);
        assert_true(dot_logger_close(log, true));
        lines l = read_lines(folder);
        assert_true(fabs(number(&l, 0, "time") - before) < 60);         /* a clock may be set while the test runs */
        assert_string_equal(member(&l, 0, "name")->text, strrchr(folder, '/') + 1);
        assert_string_equal(member(&l, 0, "id")->text, ids[i]);
        release_lines(&l);
        assert_true(strstr(wandb_path(folder), ids[i]) && events_path(folder, 0));
    }
    assert_string_not_equal(ids[0], ids[1]);
    assert_string_equal(dot_logger_id(NULL), "");
}

/* ---- everything, there and back ---- */

static const unsigned char tiny_png[] = {                                   /* 2 x 1, grey */
    0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a, 0x00, 0x00, 0x00, 0x0d, 0x49, 0x48, 0x44, 0x52, 0x00, 0x00, 0x00, 0x02,
    0x00, 0x00, 0x00, 0x01, 0x08, 0x00, 0x00, 0x00, 0x00, 0xd1, 0x49, 0x20, 0x56, 0x00, 0x00, 0x00, 0x0b, 0x49, 0x44, 0x41,
    0x54, 0x78, 0xda, 0x63, 0x60, 0xf8, 0x0f, 0x00, 0x01, 0x02, 0x01, 0x00, 0xd1, 0x1a, 0xcb, 0x8f, 0x00, 0x00, 0x00, 0x00,
    0x49, 0x45, 0x4e, 0x44, 0xae, 0x42, 0x60, 0x82 };

#define ODD_TEXT "quote \" backslash \\ newline \n tab \t bell \a \xce\xbb \xf0\x9f\x98\x80"

static void test_scalars(void **state)
{
    (void)state;
    static const char *const tags[] = { "a", "b/\"c\"", "nan", "inf", "-inf", "tiny", "huge", "\xce\xbb" };
    double values[] = { 0.1, -1.0 / 3, NAN, INFINITY, -INFINITY, 5e-324, 1.7976931348623157e308, -0.0 };
    static const char *const odd[] = { NULL, NULL, "NaN", "Infinity", "-Infinity", NULL, NULL, NULL };
    const char *folder = new_folder();
    dot_logger *log = open_log(folder, false, -1);
    now = 1700000001.125;
    assert_true(dot_logger_scalars(log, 7, COUNT(tags), tags, values));
    now = 1700000002.5;
    assert_true(dot_logger_scalar(log, 300, "a", 2));
    assert_true(dot_logger_close(log, true));
    assert_ok();

    lines l = read_lines(folder);
    assert_int_equal(l.count, 4);
    assert_int_equal(l.torn, 0);
    assert_string_equal(kind(&l, 1), "scalars");
    assert_true(number(&l, 1, "step") == 7 && number(&l, 1, "time") == 1700000001.125 && number(&l, 2, "step") == 300);
    for (int i = 0; i < COUNT(tags); ++i) {
        double read = value_of(&l, 1, tags[i]);
        const char *flag = json_get_string(&l.line[1], member(&l, 1, "nonfinite"), tags[i], NULL);
        if (odd[i]) {
            assert_true(isnan(read) && json_find(&l.line[1], member(&l, 1, "values"), tags[i])->type == JSON_NULL);
            assert_string_equal(flag, odd[i]);
        } else {
            assert_memory_equal(&read, &values[i], sizeof read);            /* to the last bit */
            assert_null(flag);
        }
    }
    assert_null(json_find(&l.line[2], &l.line[2].nodes[0], "nonfinite"));
    assert_string_equal(kind(&l, 3), "end");
    assert_true(member(&l, 3, "success")->number == 1 && number(&l, 3, "seconds") == 2.25);
    release_lines(&l);

    decoded d = read_events(events_path(folder, 0));
    field f;
    assert_int_equal(d.count, 3);
    assert_int_equal(event_step(d.records[1]), 7);
    assert_true(get(d.records[1], 1, 0, &f) && as_double(f.value) == 1700000001.125);
    for (int i = 0; i < COUNT(tags); ++i) {
        field value;
        float expected = values[i] > 3e38 && !isinf(values[i]) ? INFINITY : (float)values[i], read;
        assert_true(get(inside(d.records[1], 5), 1, i, &value));
        assert_text(inside(value.body, 1), tags[i]);
        assert_true(get(value.body, 2, 0, &f) && f.type == 5);
        read = (float)as_float(f.value);
        assert_true(memcmp(&read, &expected, sizeof read) == 0 || (isnan(read) && isnan(expected)));
    }
    assert_int_equal(event_step(d.records[2]), 300);
    release(&d);

    d = read_wandb(wandb_path(folder));
    static const unsigned kinds[] = { 21, 17, 2, 2, 3, 18 };                /* header, run, two rows, summary, exit */
    assert_int_equal(d.count, COUNT(kinds));
    for (int i = 0; i < d.count; ++i) {
        assert_int_equal(record_kind(&d, i), kinds[i]);
        assert_true(get(d.records[i], 1, 0, &f) && f.value == (uint64_t)i + 1);
    }
    assert_int_equal(row_step(&d, 2), 7);
    assert_true(item_number(&d, 2, 2, "_timestamp") == 1700000001.125 && item_number(&d, 2, 2, "_runtime") == 0.875);
    for (int i = 0; i < COUNT(tags); ++i) {
        char quoted[32];
        snprintf(quoted, sizeof quoted, "\"%s\"", odd[i] ? odd[i] : "");
        if (odd[i]) assert_string_equal(item(&d, 2, 2, tags[i]), quoted);
        else assert_true(item_number(&d, 2, 2, tags[i]) == values[i]);
    }
    assert_int_equal(row_step(&d, 3), 300);
    assert_true(item_number(&d, 4, 3, "a") == 2 && item_number(&d, 4, 3, tags[1]) == values[1]);
    assert_false(get(inside(d.records[5], 18), 1, 0, &f));                  /* exit code 0 */
    release(&d);
}

static void test_text_and_config(void **state)
{
    (void)state;
    const char *folder = new_folder();
    dot_logger *log = open_log(folder, false, -1);
    assert_true(dot_logger_config_number(log, "lr", 1e-3));
    assert_true(dot_logger_config_text(log, "note", ODD_TEXT));
    assert_true(dot_logger_config_bool(log, "ema", true));
    assert_true(dot_logger_config_number(log, "clip", INFINITY));
    assert_true(dot_logger_text(log, 3, "report", ODD_TEXT));
    assert_true(dot_logger_config_number(log, "late", 5));
    assert_true(dot_logger_close(log, false));
    assert_ok();

    lines l = read_lines(folder);
    assert_int_equal(l.count, 8);
    assert_true(number(&l, 1, "value") == 1e-3);
    assert_string_equal(member(&l, 2, "value")->text, ODD_TEXT);
    assert_int_equal(member(&l, 3, "value")->type, JSON_BOOL);
    assert_int_equal(member(&l, 4, "value")->type, JSON_NULL);
    assert_string_equal(member(&l, 4, "nonfinite")->text, "Infinity");
    assert_string_equal(member(&l, 5, "text")->text, ODD_TEXT);
    assert_true(member(&l, 7, "success")->number == 0);
    release_lines(&l);

    decoded d = read_events(events_path(folder, 0));                        /* version, session start, text, session end */
    assert_int_equal(d.count, 4);
    span value = inside(inside(d.records[1], 5), 1), plugin = inside(inside(value, 9), 1);
    field f, shape;
    assert_text(inside(value, 1), "_hparams_/session_start_info");
    assert_text(inside(plugin, 1), "hparams");
    span session = inside(inside(plugin, 2), 3);
    static const char *const keys[] = { "lr", "note", "ema", "clip" };
    for (int i = 0; i < COUNT(keys); ++i) {
        assert_true(get(session, 1, i, &f));
        assert_text(inside(f.body, 1), keys[i]);
        span content = inside(f.body, 2);
        if (i == 0) assert_true(get(content, 2, 0, &f) && as_double(f.value) == 1e-3);
        if (i == 1) assert_text(inside(content, 3), ODD_TEXT);
        if (i == 2) assert_true(get(content, 4, 0, &f) && f.type == 0 && f.value == 1);
        if (i == 3) assert_text(inside(content, 3), "Infinity");
    }
    assert_false(get(session, 1, COUNT(keys), &f));
    value = inside(inside(d.records[2], 5), 1);
    assert_text(inside(value, 1), "report/text_summary");
    assert_text(inside(inside(inside(value, 9), 1), 1), "text");
    assert_text(inside(inside(value, 8), 8), ODD_TEXT);
    assert_true(get(inside(value, 8), 1, 0, &f) && f.value == 7 && get(inside(inside(inside(value, 8), 2), 2), 1, 0, &shape) &&
                shape.value == 1);
    value = inside(inside(d.records[3], 5), 1);
    assert_text(inside(value, 1), "_hparams_/session_end_info");
    assert_true(get(inside(inside(inside(inside(value, 9), 1), 2), 4), 1, 0, &f) && f.value == 2);     /* failure */
    release(&d);

    d = read_wandb(wandb_path(folder));
    assert_true(item_number(&d, 2, 5, "lr") == 1e-3);
    assert_string_equal(item(&d, 4, 5, "ema"), "true");
    assert_string_equal(item(&d, 5, 5, "clip"), "\"Infinity\"");
    assert_true(item_number(&d, 6, 5, "late") == 5);
    json_document text;
    char *json = item(&d, 7, 2, "report");
    assert_non_null(json);
    assert_true(json_parse(&text, json, strlen(json)));
    assert_string_equal(text.nodes[0].text, ODD_TEXT);
    json_release(&text);
    assert_true(get(inside(d.records[d.count - 1], 18), 1, 0, &f) && f.value == 1);
    release(&d);
}

/* Logs a text of `length` bytes; returns by how much the file grows. */
static size_t log_length(dot_logger *log, const char *path, char *text, size_t length)
{
    struct stat before, after;
    assert_int_equal(stat(path, &before), 0);
    text[length] = 0;
    assert_true(dot_logger_config_text(log, "t", text));
    text[length] = 'x';
    assert_int_equal(stat(path, &after), 0);
    return (size_t)(after.st_size - before.st_size);
}

static size_t room_in_block(const char *path)
{
    struct stat status;
    assert_int_equal(stat(path, &status), 0);
    return 32768 - (size_t)status.st_size % 32768;
}

/* A record may end anywhere in a block of the .wandb file, and be as long as several. */
static void test_blocks(void **state)
{
    (void)state;
    const char *folder = new_folder();
    char *text = (char *)malloc(100001), path[700];
    size_t lengths[512];
    int written = 0;
    assert_non_null(text);
    memset(text, 'x', 100000);
    dot_logger *log = open_log(folder, false, -1);
    snprintf(path, sizeof path, "%s", wandb_path(folder));
    for (size_t left = 0; left <= 16;) {                        /* a record that leaves `left` bytes of a block */
        size_t room = room_in_block(path), length = room > 12000 ? 8000 : room < 1000 ? 1500 : 200;
        size_t head = log_length(log, path, text, lengths[written++] = length) - length;
        if (length == 200) {                                    /* what else such a record has is known now */
            length = lengths[written++] = room_in_block(path) - left - head;
            log_length(log, path, text, length);
            assert_int_equal(room_in_block(path), left ? left : 32768);
            ++left;
        }
    }
    lengths[written++] = 100000;
    log_length(log, path, text, 100000);
    decoded d = read_wandb(path);
    assert_int_equal(d.count, 2 + written);
    for (int i = 0; i < written; ++i) assert_int_equal(inside(inside(inside(d.records[2 + i], 5), 1), 16).size, lengths[i] + 2);
    release(&d);
    free(text);
    assert_ok();
}

/* ---- golden numbers ---- */

static dot_safetensors *golden;

static double *golden_values(const char *name, int64_t *count)
{
    dot_safetensors_entry e;
    int index = dot_safetensors_find(golden, name);
    if (!dot_safetensors_entry_at(golden, index, &e)) fail_msg("no %s", name);
    double *values = (double *)calloc((size_t)e.count + 1, sizeof *values);
    assert_non_null(values);
    assert_true(dot_safetensors_read_double(golden, index, values, e.count));
    *count = e.count;
    return values;
}

static unsigned char *golden_bytes(const char *name, size_t *size)
{
    dot_safetensors_entry e;
    int index = dot_safetensors_find(golden, name);
    if (!dot_safetensors_entry_at(golden, index, &e)) fail_msg("no %s", name);
    unsigned char *bytes = (unsigned char *)calloc(e.bytes + 1, 1);
    assert_non_null(bytes);
    assert_true(dot_safetensors_read(golden, index, bytes, e.bytes));
    *size = e.bytes;
    return bytes;
}

static int setup_golden(void **state)
{
    setup(state);
    golden = dot_safetensors_open(ctx, "tests/golden/logs.safetensors");
    return golden == NULL;
}

/* The `index`-th name with this beginning and end, without the end. */
static bool golden_name(const char *prefix, const char *suffix, int *index, char name[128])
{
    dot_safetensors_entry e;
    for (; *index < dot_safetensors_count(golden); ++*index) {
        assert_true(dot_safetensors_entry_at(golden, *index, &e));
        size_t length = strlen(e.name), end = strlen(suffix);
        if (strncmp(e.name, prefix, strlen(prefix)) != 0) continue;
        if (length < end || strcmp(e.name + length - end, suffix) != 0) continue;
        snprintf(name, 128, "%.*s", (int)(length - end), e.name);
        ++*index;
        return true;
    }
    return false;
}

static void test_histograms(void **state)
{
    (void)state;
    char name[128], path[160];
    int seen = 0;
    for (int index = 0; golden_name("histogram/", "/edges", &index, name); ++seen) {
        int64_t size, edge_count, bins;
        double *sample = golden_values(name, &size);
        snprintf(path, sizeof path, "%s/edges", name);
        double *edges = golden_values(path, &edge_count);
        snprintf(path, sizeof path, "%s/counts", name);
        double *counts = golden_values(path, &bins), *read = (double *)calloc((size_t)bins, sizeof *read);
        const char *folder = new_folder();
        dot_logger_options o = options();
        o.histogram_bins = (int)bins;
        dot_logger *log = dot_logger_create(ctx, folder, &o);
        assert_true(dot_logger_histogram(log, 1, "h", sample, size));
        assert_true(dot_logger_scalar(log, 2, "next", 0));
        lines l = read_lines(folder);
        assert_true(json_get_numbers(&l.line[1], &l.line[1].nodes[0], "counts", read, (int)bins, 1));
        for (int64_t i = 0; i < bins; ++i)
            if (read[i] != counts[i]) fail_msg("%s: bin %d has %g, expected %g", name, (int)i, read[i], counts[i]);
        assert_true(number(&l, 1, "low") == edges[0] && number(&l, 1, "high") == edges[bins]);
        assert_true(number(&l, 1, "count") == (double)size && number(&l, 1, "nonfinite") == 0);
        release_lines(&l);
        decoded d = read_events(events_path(folder, 0));
        span histo = inside(inside(inside(d.records[1], 5), 1), 5), limits = inside(histo, 6), packed = inside(histo, 7);
        assert_int_equal(limits.size, 8 * bins);
        assert_int_equal(packed.size, 8 * bins);
        double scale = fmax(fabs(edges[0]), fabs(edges[bins]));
        for (int64_t i = 0; i < bins; ++i) {
            assert_true(as_double(little(packed.at + 8 * i, 8)) == counts[i]);
            assert_true(fabs(as_double(little(limits.at + 8 * i, 8)) - edges[i + 1]) <= 4e-16 * scale);
        }
        release(&d);
        d = read_wandb(wandb_path(folder));
        json_document row;
        char *json = item(&d, 2, 2, "h");
        assert_true(json && json_parse(&row, json, strlen(json)));
        assert_true(json_get_numbers(&row, &row.nodes[0], "values", read, (int)bins, 1));
        for (int64_t i = 0; i < bins; ++i) assert_true(read[i] == counts[i]);
        assert_int_equal(json_find(&row, &row.nodes[0], "bins")->count, bins + 1);
        assert_string_equal(json_get_string(&row, &row.nodes[0], "_type", ""), "histogram");
        json_release(&row);
        release(&d);
        free(sample);
        free(edges);
        free(counts);
        free(read);
    }
    assert_int_equal(seen, 10);
    assert_ok();
}

/* Values that are not finite are counted apart; none, and a range beyond the largest double, are no harm; tensors of any
   type. */
static void test_odd_histograms(void **state)
{
    (void)state;
    double odd[] = { 1, NAN, 2, INFINITY, -INFINITY, 3, 3 }, wide[] = { -1.7e308, 1.7e308, 0 }, huge = 1e17;
    static const unsigned char bytes[] = { 0, 1, 2, 255 };
    static const int64_t four[] = { 2, 2 };
    const char *folder = new_folder();
    dot_logger_options o = options();
    o.histogram_bins = 4;
    dot_logger *log = dot_logger_create(ctx, folder, &o);
    assert_true(dot_logger_histogram(log, 1, "odd", odd, 7));
    assert_true(dot_logger_histogram(log, 1, "none", NULL, 0));
    assert_true(dot_logger_histogram(log, 1, "nan", odd + 1, 1));
    assert_true(dot_logger_histogram(log, 1, "wide", wide, 3));
    assert_true(dot_logger_histogram(log, 1, "huge", &huge, 1));
    assert_true(dot_logger_tensor(log, 1, "bytes", dot_input(ctx, DOT_U8, 2, four, bytes), 0));
    assert_true(dot_logger_close(log, true));
    static const double counts[6][4] = { { 1, 0, 1, 2 }, { 0 }, { 0 }, { 1, 0, 1, 1 }, { 0, 0, 1, 0 }, { 3, 0, 0, 1 } };
    static const double finite[6][2] = { { 4, 3 }, { 0, 0 }, { 0, 1 }, { 3, 0 }, { 1, 0 }, { 4, 0 } };
    lines l = read_lines(folder);
    assert_int_equal(l.count, 8);
    for (int i = 0; i < 6; ++i) {
        double read[4];
        assert_true(json_get_numbers(&l.line[1 + i], &l.line[1 + i].nodes[0], "counts", read, 4, 1));
        assert_memory_equal(read, counts[i], sizeof read);
        assert_true(number(&l, 1 + i, "count") == finite[i][0] && number(&l, 1 + i, "nonfinite") == finite[i][1]);
        assert_true(number(&l, 1 + i, "low") < number(&l, 1 + i, "high"));
    }
    assert_true(number(&l, 1, "sum") == 9 && number(&l, 1, "sum_squares") == 23 && number(&l, 1, "max") == 3);
    assert_int_equal(member(&l, 2, "min")->type, JSON_NULL);
    release_lines(&l);
    assert_ok();
}

static void test_images(void **state)
{
    (void)state;
    const char *folder = new_folder();
    char wandb[700], path[900], name[128];
    dot_logger *log = open_log(folder, false, -1);
    snprintf(wandb, sizeof wandb, "%s", wandb_path(folder));
    *strrchr(wandb, '/') = 0;
    int seen = 0;
    for (int index = 0; golden_name("png/", "/sha256", &index, name); ++seen) {
        size_t size, digits, again;
        int64_t three;
        unsigned char *png = golden_bytes(name, &size);
        snprintf(path, sizeof path, "%s/sha256", name);
        unsigned char *sha = golden_bytes(path, &digits);
        snprintf(path, sizeof path, "%s/info", name);
        double *info = golden_values(path, &three);
        assert_int_equal(digits, 64);
        assert_true(dot_logger_image(log, seen, "slice z/../mu_a", png, size));
        assert_true(dot_logger_scalar(log, seen, "s", 1));
        assert_true(dot_logger_flush(log));
        lines l = read_lines(folder);
        int line = 1 + 2 * seen;
        assert_true(number(&l, line, "width") == info[0] && number(&l, line, "height") == info[1] &&
                    number(&l, line, "bytes") == (double)size);
        assert_string_equal(member(&l, line, "sha256")->text, (char *)sha);
        assert_null(strstr(member(&l, line, "path")->text, ".."));
        unsigned char *stored = read_bytes(in(folder, member(&l, line, "path")->text), &again);
        assert_int_equal(again, size);
        assert_memory_equal(stored, png, size);
        free(stored);
        release_lines(&l);
        decoded d = read_events(events_path(folder, 0));
        span image = inside(inside(inside(d.records[1 + 2 * seen], 5), 1), 4);
        field f;
        for (unsigned k = 0; k < 3; ++k)
            assert_true(get(image, k + 1, 0, &f) && (double)f.value == info[k == 0 ? 1 : k == 1 ? 0 : 2]);
        assert_int_equal(inside(image, 4).size, size);
        assert_memory_equal(inside(image, 4).at, png, size);
        release(&d);
        d = read_wandb(in(wandb, "run-ab12.wandb"));
        json_document value;
        int row = d.count - 2;                                  /* files, row, summary */
        char *json = item(&d, row, 2, "slice z/../mu_a");
        assert_true(json && json_parse(&value, json, strlen(json)));
        const char *media = json_get_string(&value, &value.nodes[0], "path", "");
        assert_text(inside(inside(inside(d.records[row - 1], 6), 1), 1), media);
        assert_string_equal(json_get_string(&value, &value.nodes[0], "_type", ""), "image-file");
        assert_string_equal(json_get_string(&value, &value.nodes[0], "sha256", ""), (char *)sha);
        assert_true(json_get_number(&value, &value.nodes[0], "width", 0) == info[0]);
        snprintf(path, sizeof path, "%s/files/%s", wandb, media);
        stored = read_bytes(path, &again);
        assert_int_equal(again, size);
        assert_memory_equal(stored, png, size);
        free(stored);
        json_release(&value);
        release(&d);
        free(png);
        free(sha);
        free(info);
    }
    assert_int_equal(seen, 66);
    assert_ok();
}

/* ---- crashes and resuming ---- */

/* A log with some of everything; the bytes of its two files. */
static unsigned char *sample_log(const char *folder, bool end, size_t *json_size, unsigned char **wandb, size_t *wandb_size)
{
    dot_logger_options o = options();
    o.tensorboard = false;
    dot_logger *log = dot_logger_create(ctx, folder, &o);
    double sample[] = { 1, 2, 3 };
    assert_true(dot_logger_config_number(log, "lr", 0.1));
    for (int step = 0; step < 4; ++step) {
        assert_true(dot_logger_scalar(log, step, "loss", 1.0 / (step + 1)));
        assert_true(dot_logger_text(log, step, "t", "hello"));
    }
    assert_true(dot_logger_histogram(log, 4, "h", sample, 3));
    if (end) assert_true(dot_logger_close(log, true));
    new_context(NULL);
    *wandb = read_bytes(wandb_path(folder), wandb_size);
    return read_bytes(in(folder, "log.jsonl"), json_size);
}

static int whole_lines(const unsigned char *bytes, size_t size)
{
    int count = 0;
    for (size_t i = 0; i < size; ++i) count += bytes[i] == '\n';
    return count;
}

/* log.jsonl cut at every byte: the whole lines stay as they are, and the run goes on. */
static void test_torn_lines(void **state)
{
    (void)state;
    size_t size, wandb_size, again;
    unsigned char *wandb, *bytes = sample_log(new_folder(), true, &size, &wandb, &wandb_size);
    const char *folder = new_folder();
    assert_int_equal(mkdir(folder, 0700), 0);
    for (size_t cut = 0; cut <= size; ++cut) {
        dot_logger_options o = options();
        o.tensorboard = o.wandb = false;
        o.resume = true;
        write_bytes(in(folder, "log.jsonl"), bytes, cut);
        dot_logger *log = dot_logger_create(ctx, folder, &o);
        if (!dot_logger_scalar(log, 9, "new", 1)) fail_msg("cut at %d: %s", (int)cut, dot_error(ctx));
        new_context(NULL);
        int kept = whole_lines(bytes, cut);
        lines l = read_lines(folder);
        assert_int_equal(l.count, kept + 2);
        assert_int_equal(l.torn, 0);
        assert_string_equal(kind(&l, kept), kept ? "resume" : "start");
        release_lines(&l);
        unsigned char *after = read_bytes(in(folder, "log.jsonl"), &again);
        size_t whole = cut;
        while (whole > 0 && bytes[whole - 1] != '\n') --whole;
        assert_memory_equal(after, bytes, whole);
        free(after);
    }
    free(bytes);
    free(wandb);
}

/* The .wandb file cut at every byte, and with every byte changed: what is whole before that stays, and the file is whole
   again. */
static void test_torn_wandb(void **state)
{
    (void)state;
    const char *folder = new_folder();
    char path[700];
    size_t size, wandb_size;
    unsigned char *wandb, *bytes = sample_log(folder, true, &size, &wandb, &wandb_size);
    snprintf(path, sizeof path, "%s", wandb_path(folder));
    decoded before = read_wandb(path);
    assert_int_equal(record_kind(&before, before.count - 1), 18);
    for (int change = 0; change < 2; ++change)
        for (size_t at = change ? 7 : 0; at < wandb_size; ++at) {
            dot_logger_options o = options();
            o.tensorboard = false;
            o.resume = true;
            wandb[at] ^= (unsigned char)change;
            write_bytes(path, wandb, change ? wandb_size : at);
            wandb[at] ^= (unsigned char)change;
            write_bytes(in(folder, "log.jsonl"), bytes, size);
            dot_logger *log = dot_logger_create(ctx, folder, &o);
            if (!dot_logger_scalar(log, 9, "new", 1)) fail_msg("%s %d: %s", change ? "byte" : "cut", (int)at, dot_error(ctx));
            new_context(NULL);
            decoded after = read_wandb(path);
            size_t kept = 0, end = 7;                   /* records that are whole before `at`, without the exit */
            while ((int)kept < before.count - 1 && end + 7 + before.records[kept].size <= at)
                end += 7 + before.records[kept++].size;
            if (kept == 0) kept = 1;                    /* the header is made anew, */
            if (kept == 1) kept = 2;                    /* and so is the run */
            assert_int_equal(after.torn, 0);
            assert_int_equal(after.count, kept + 1);
            for (int i = 0; i < (int)kept; ++i) {
                assert_int_equal(after.records[i].size, before.records[i].size);
                assert_memory_equal(after.records[i].at, before.records[i].at, before.records[i].size);
            }
            assert_true(item_number(&after, (int)kept, 2, "new") == 1);
            release(&after);
        }
    release(&before);
    free(bytes);
    free(wandb);
}

static void test_resume(void **state)
{
    (void)state;
    const char *folder = new_folder();
    dot_logger *log = open_log(folder, false, -1);
    char wandb[700], synced[720], first[700];
    assert_true(dot_logger_config_number(log, "lr", 0.1));
    for (int step = 0; step < 10; ++step) assert_true(dot_logger_scalar(log, step, "loss", step));
    assert_true(dot_logger_close(log, true));
    snprintf(wandb, sizeof wandb, "%s", wandb_path(folder));
    snprintf(synced, sizeof synced, "%s.synced", wandb);
    snprintf(first, sizeof first, "%s", events_path(folder, 0));
    write_bytes(synced, "", 0);

    assert_null(dot_logger_create(ctx, folder, NULL));
    assert_error(DOT_ERROR_STATE, "dot_logger_create", "a log is there already");
    dot_logger_options o = options();
    o.resume = true;
    o.id = "other";
    assert_null(dot_logger_create(ctx, folder, &o));
    assert_error(DOT_ERROR_STATE, "dot_logger_create", "its id is ab12, but the options say other");

    now = 1600000000;                                           /* a clock that went back */
    o.id = NULL;
    o.resume_step = 6;
    log = dot_logger_create(ctx, folder, &o);
    assert_ok();
    assert_string_equal(dot_logger_id(log), "ab12");
    assert_int_equal(access(synced, F_OK), -1);
    assert_true(dot_logger_config_number(log, "lr", 0.1));
    for (int step = 6; step < 12; ++step) assert_true(dot_logger_scalar(log, step, "loss", -step));
    assert_true(dot_logger_close(log, true));

    lines l = read_lines(folder);
    assert_int_equal(l.count, 13 + 9);                          /* nothing is lost */
    assert_string_equal(kind(&l, 13), "resume");
    assert_true(number(&l, 13, "step") == 6 && number(&l, 13, "began") == 1700000000);
    release_lines(&l);

    assert_string_equal(events_path(folder, 0), first);         /* TensorBoard reads them in this order */
    decoded d = read_events(events_path(folder, 1));
    field f;
    assert_int_equal(d.count, 2 + 1 + 6 + 1);
    assert_int_equal(event_step(d.records[1]), 6);
    assert_true(get(inside(d.records[1], 7), 1, 0, &f) && f.value == 1);        /* session_log: START */
    release(&d);

    d = read_wandb(wandb_path(folder));
    assert_string_equal(wandb_path(folder), wandb);
    int64_t steps = 0;
    for (int i = 0, last = 0; i < d.count; ++i) {
        assert_true(get(d.records[i], 1, 0, &f) && (int)f.value == last + 1);
        last = (int)f.value;
        if (record_kind(&d, i) == 18) assert_int_equal(i, d.count - 1);
        if (record_kind(&d, i) != 2) continue;
        assert_int_equal(row_step(&d, i), steps);
        assert_true(item_number(&d, i, 2, "loss") == (double)(steps < 6 ? steps : -steps));
        ++steps;
    }
    assert_int_equal(steps, 12);
    release(&d);

    log = open_log(folder, true, -1);                           /* without a step: W&B takes only what comes after */
    assert_true(dot_logger_scalar(log, 3, "loss", 100));
    assert_true(dot_logger_scalar(log, 20, "loss", 101));
    assert_true(dot_logger_close(log, true));
    d = read_wandb(wandb);
    steps = 0;
    for (int i = 0; i < d.count; ++i)
        if (record_kind(&d, i) == 2) assert_true(row_step(&d, i) >= steps && (steps = row_step(&d, i)) != 3 + 100);
    assert_int_equal(steps, 20);
    release(&d);

    write_bytes(in(folder, "log.jsonl"), "{\"kind\":\"scalars\"}\n", 19);
    o.resume_step = -1;
    assert_null(dot_logger_create(ctx, folder, &o));
    assert_error(DOT_ERROR_FORMAT, "dot_logger_create", "not a log");
    static const char foreign[] = "{\"kind\":\"start\",\"time\":1.0,\"id\":\"../../x\",\"began\":1,\"events\":1,}\n";
    write_bytes(in(folder, "log.jsonl"), foreign, sizeof foreign - 1);          /* no name of a path comes from a file */
    assert_null(dot_logger_create(ctx, folder, &o));
    assert_error(DOT_ERROR_FORMAT, "dot_logger_create", "not a log");
    assert_ok();
}

/* A child logs and says what was acknowledged, until it is killed; no such record may be missing. */
static void child_logs(const char *folder, int64_t first, int out)
{
    dot_context_options co = dot_context_defaults();
    co.threads = 1;
    dot_context *own = dot_context_create(&co);
    dot_logger_options o = dot_logger_defaults();
    o.resume = true;
    o.id = "ab12";
    char text[700];
    memset(text, 'y', sizeof text);
    dot_logger *log = dot_logger_create(own, folder, &o);
    for (int64_t step = first; ; ++step) {
        text[step * 37 % 699] = 0;
        bool good = dot_logger_text(log, step, "t", text);
        text[step * 37 % 699] = 'y';
        if (!good || write(out, &step, sizeof step) != sizeof step) _exit(1);
    }
}

static void test_kill(void **state)
{
    (void)state;
    const char *folder = new_folder();
    int64_t acknowledged[60], first = 0, total = 0;
    for (int round = 0; round < COUNT(acknowledged); ++round) {
        int ends[2], status;
        assert_int_equal(pipe(ends), 0);
        pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) child_logs(folder, first, ends[1]);
        close(ends[1]);
        acknowledged[round] = first - 1;
        if (round % 2 == 0)                             /* not while it starts */
            total += read(ends[0], &acknowledged[round], sizeof first) == sizeof first;
        struct timespec pause = { 0, (long)(5e5 + 5e6 * dot_random_uniform(5, 0, (uint64_t)round)) };
        nanosleep(&pause, NULL);
        assert_int_equal(kill(child, SIGKILL), 0);
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        for (int64_t step; read(ends[0], &step, sizeof step) == sizeof step; ++total) acknowledged[round] = step;
        close(ends[0]);
        first = acknowledged[round] + 1 + 1000;         /* each round has steps of its own */
    }
    assert_true(total >= COUNT(acknowledged) / 2);
    dot_logger *log = open_log(folder, true, -1);       /* after which all files must be whole */
    assert_true(dot_logger_close(log, true));
    lines l = read_lines(folder);
    int64_t expected = 0;
    int round = 0;
    for (int i = 0; i < l.count; ++i) {
        if (strcmp(kind(&l, i), "text") != 0) continue;
        int64_t step = (int64_t)number(&l, i, "step");
        if (step != expected) {                         /* a new round: the one before had all of its acknowledged records */
            assert_true(expected > acknowledged[round] && expected <= acknowledged[round] + 2);
            while (step != acknowledged[round] + 1 + 1000) assert_true(++round < COUNT(acknowledged));
            ++round;
            expected = step;
        }
        ++expected;
    }
    assert_true(expected > acknowledged[round]);
    for (++round; round < COUNT(acknowledged); ++round)         /* rounds without a record had none to lose */
        assert_int_equal(acknowledged[round], acknowledged[round - 1] + 1000);
    release_lines(&l);
    decoded d = read_wandb(wandb_path(folder));
    assert_int_equal(d.torn, 0);
    release(&d);
    print_message("%d kills, %d acknowledged records, none lost\n", COUNT(acknowledged), (int)total);
}

/* ---- errors ---- */

static void test_arguments(void **state)
{
    (void)state;
    static const char *const twice[] = { "a", "a" };
    static const double values[] = { 1, 2 };
    char long_tag[258];
    memset(long_tag, 'x', 256);
    long_tag[256] = 0;
    dot_logger_options o = options();
    o.magic = 0;
#define REFUSED(text) assert_null(dot_logger_create(ctx, new_folder(), &o)); \
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_create", text); o = options()
    REFUSED("not made by");
    o.id = "a/b"; REFUSED("id, expected");
    o.id = ""; REFUSED("id, expected");
    o.histogram_bins = 513; REFUSED("histogram_bins, expected 1..512");
    o.resume_step = -2; REFUSED("resume_step");
    o.project = NULL; REFUSED("project");
    o.name = "\xff"; REFUSED("UTF-8");
    o.group = long_tag; REFUSED("more than 255 bytes");
    o.clock = NULL; REFUSED("clock");
    assert_null(dot_logger_create(ctx, "", &o));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_create", "folder");
    assert_null(dot_logger_create(ctx, NULL, &o));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_create", "folder");
    assert_null(dot_logger_create(NULL, "x", &o));

    const char *folder = new_folder();
    dot_logger *log = open_log(folder, false, -1);
    size_t before, after;
    free(read_bytes(in(folder, "log.jsonl"), &before));
    assert_false(dot_logger_scalar(log, -1, "a", 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "step -1");
    assert_false(dot_logger_scalar(log, 0, "", 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "tag");
    assert_false(dot_logger_scalar(log, 0, NULL, 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "tag");
    assert_false(dot_logger_scalar(log, 0, long_tag, 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "256 bytes");
    assert_false(dot_logger_scalar(log, 0, "\xc0\x80", 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "UTF-8");
    assert_false(dot_logger_scalars(log, 0, 2, twice, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalars", "\"a\" occurs twice");
    assert_false(dot_logger_scalars(log, 0, 2, NULL, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalars", "tags NULL");
    assert_false(dot_logger_text(log, 0, "t", "\xff"));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_text", "not UTF-8");
    assert_false(dot_logger_text(log, 0, "t", NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_text", "NULL");
    assert_false(dot_logger_text(log, 0, NULL, "t"));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_text", "tag");
    assert_false(dot_logger_config_text(log, "t", NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_config_text", "NULL");
    assert_false(dot_logger_config_text(log, "t", "\xed\xa0\x80"));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_config_text", "not UTF-8");
    assert_false(dot_logger_config_number(log, NULL, 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_config_number", "tag");
    assert_false(dot_logger_histogram(log, 0, "h", NULL, 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_histogram", "NULL");
    assert_false(dot_logger_histogram(log, 0, "h", values, -1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_histogram", "count -1");
    assert_false(dot_logger_image(log, 0, "i", "not a PNG", 9));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_image", "not a PNG file");
    assert_false(dot_logger_image(log, 0, "i", tiny_png, sizeof tiny_png - 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_image", "without its end");
    unsigned char png[sizeof tiny_png];
    memcpy(png, tiny_png, sizeof png);
    png[19] = 0;
    assert_false(dot_logger_image(log, 0, "i", png, sizeof png));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_image", "impossible size");
    png[19] = 2;
    png[25] = 5;
    assert_false(dot_logger_image(log, 0, "i", png, sizeof png));
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_image", "unknown colour type");
    assert_false(dot_logger_scalar(NULL, 0, "a", 1));
    assert_false(dot_logger_close(NULL, true) || dot_logger_flush(NULL));
    free(read_bytes(in(folder, "log.jsonl"), &after));
    assert_int_equal(after, before);
    assert_ok();

    assert_false(dot_logger_scalar(log, -1, "a", 1));           /* while an error stands, the log goes on, */
    assert_true(dot_logger_scalar(log, 1, "a", 1));
    assert_true(dot_logger_close(log, false));                  /* and says so at its end */
    assert_error(DOT_ERROR_ARGUMENT, "dot_logger_scalar", "step -1");
    lines l = read_lines(folder);
    assert_non_null(strstr(member(&l, l.count - 1, "error")->text, "step -1"));
    release_lines(&l);
}

static int told;

static void count_messages(void *user, const char *message)
{
    (void)user;
    told += strstr(message, "left out of the W&B file") != NULL;
}

static void test_falling_steps(void **state)
{
    (void)state;
    dot_context_options co = dot_context_defaults();
    co.threads = 1;
    co.log = count_messages;
    new_context(&co);
    const char *folder = new_folder();
    dot_logger *log = open_log(folder, false, -1);
    told = 0;
    for (int i = 0; i < 3; ++i) {
        assert_true(dot_logger_scalar(log, 10 + i, "a", i));
        assert_true(dot_logger_scalar(log, i, "b", i));
        assert_true(dot_logger_image(log, i, "i", tiny_png, sizeof tiny_png));
    }
    assert_int_equal(told, 1);
    assert_true(dot_logger_close(log, true));
    lines l = read_lines(folder);
    assert_int_equal(l.count, 1 + 9 + 1);
    release_lines(&l);
    decoded d = read_wandb(wandb_path(folder));
    assert_int_equal(d.count, 2 + 3 + 2);
    for (int i = 2; i < 5; ++i) assert_int_equal(row_step(&d, i), 8 + i);
    assert_null(item(&d, 3, 2, "b"));
    release(&d);
}

static void limit_files(rlim_t bytes)
{
    struct rlimit limit;
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    limit.rlim_cur = bytes == RLIM_INFINITY ? limit.rlim_max : bytes;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
}

/* A write that the system cuts short (a limit here, as a full disk does) is undone, reported once, and the log goes on when
   there is room again. */
static void test_full_disk(void **state)
{
    (void)state;
    const char *folder = new_folder();
    char name[700], text[20001];
    size_t before, after;
    dot_logger *log = open_log(folder, false, -1);
    assert_true(dot_logger_scalar(log, 0, "a", 1));
    for (size_t extra = 0; extra < 80; extra += 3) {            /* log.jsonl is the largest: it fails first */
        free(read_bytes(in(folder, "log.jsonl"), &before));
        limit_files((rlim_t)(before + extra));
        bool good = dot_logger_scalar(log, 1, "a", 1);
        limit_files(RLIM_INFINITY);
        free(read_bytes(in(folder, "log.jsonl"), &after));
        if (good) {
            assert_true(extra > 70 && after <= before + extra);
            continue;
        }
        assert_error(DOT_ERROR_FILE, "dot_logger_scalar", "log.jsonl: ");
        assert_int_equal(after, before);
        assert_true(dot_logger_scalar(log, 2, "a", 1));
    }
    double sample[1000];
    for (int i = 0; i < 1000; ++i) sample[i] = i;
    assert_true(dot_logger_close(log, true));

    folder = new_folder();                                      /* now the event file is the largest */
    dot_logger_options o = options();
    o.histogram_bins = 512;
    log = dot_logger_create(ctx, folder, &o);
    snprintf(name, sizeof name, "%s", events_path(folder, 0));
    limit_files(5000);
    assert_false(dot_logger_histogram(log, 0, "h", sample, 1000));
    assert_error(DOT_ERROR_FILE, "dot_logger_histogram", "events.out.tfevents");
    assert_false(dot_logger_scalar(log, 1, "a", 1));            /* it writes the row with the histogram, which is long */
    assert_error(DOT_ERROR_FILE, "dot_logger_scalar", "run-ab12.wandb: ");
    assert_false(dot_logger_image(log, 1, "i", tiny_png, 0));
    dot_error_clear(ctx);
    limit_files(RLIM_INFINITY);
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = 0;
    assert_true(dot_logger_text(log, 2, "t", text));
    assert_true(dot_logger_close(log, true));
    decoded d = read_events(name);
    assert_int_equal(d.count, 3);
    assert_int_equal(d.torn, 0);
    release(&d);
    d = read_wandb(wandb_path(folder));
    assert_int_equal(d.torn, 0);
    assert_string_equal(item(&d, 2, 2, "a"), "1");
    release(&d);
    lines l = read_lines(folder);
    assert_int_equal(l.count, 5);
    release_lines(&l);

    folder = new_folder();                                      /* an image that does not fit leaves nothing */
    log = open_log(folder, false, -1);
    limit_files(60);
    assert_false(dot_logger_image(log, 1, "i", tiny_png, sizeof tiny_png));
    limit_files(RLIM_INFINITY);
    assert_error(DOT_ERROR_FILE, "dot_logger_image", "cannot write");
    char names[4][256];
    assert_int_equal(names_in(in(folder, "images"), "", names, 4), 0);
    assert_true(dot_logger_image(log, 1, "i", tiny_png, sizeof tiny_png));
    assert_int_equal(names_in(in(folder, "images"), "", names, 4), 1);
    assert_ok();
}

static void test_folders(void **state)
{
    (void)state;
    dot_logger_options o = options();
    char deep[256];
    const char *folder = new_folder();
    snprintf(deep, sizeof deep, "%s/a/b//c/", folder);          /* is made with all its parents */
    assert_non_null(dot_logger_create(ctx, deep, &o));
    assert_ok();
    lines l = read_lines(in(folder, "a/b/c"));
    assert_string_equal(member(&l, 0, "name")->text, "c");
    release_lines(&l);

    write_bytes(in(root, "file"), "x", 1);
    assert_null(dot_logger_create(ctx, in(root, "file"), &o));
    assert_error(DOT_ERROR_FILE, "dot_logger_create", "cannot open");
    folder = new_folder();
    assert_int_equal(mkdir(folder, 0700), 0);
    assert_int_equal(symlink("/dev/full", in(folder, "log.jsonl")), 0);
    o.resume = true;
    assert_null(dot_logger_create(ctx, folder, &o));
    assert_error(DOT_ERROR_FILE, "dot_logger_create", "log.jsonl: not a regular file");
    folder = new_folder();
    assert_int_equal(mkdir(folder, 0700), 0);
    assert_int_equal(mkfifo(in(folder, "log.jsonl"), 0600), 0);             /* it is not waited for */
    assert_null(dot_logger_create(ctx, folder, &o));
    assert_error(DOT_ERROR_FILE, "dot_logger_create", "log.jsonl");

    folder = new_folder();                                      /* a read-only folder, as somebody who may not write there */
    assert_int_equal(mkdir(folder, 0555), 0);
    assert_int_equal(chmod(root, 0755), 0);
    pid_t child = fork();
    if (child == 0) {
        if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) _exit(3);
        if (dot_logger_create(ctx, folder, &o)) _exit(1);
        _exit(strstr(dot_error(ctx), "dot_logger_create: cannot open ") && strstr(dot_error(ctx), "Permission denied") ? 0 : 2);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_true(WIFEXITED(status));
    assert_int_equal(WEXITSTATUS(status), 0);
    assert_ok();
}

/* ---- memory ---- */

static void test_no_allocations(void **state)
{
    (void)state;
    static const char *const tags[] = { "x", "y" };
    double sample[100];
    int64_t after_first = 0;
    for (int i = 0; i < 100; ++i) sample[i] = sin(i);
    dot_logger *log = open_log(new_folder(), false, -1);
    assert_true(dot_logger_config_number(log, "lr", 1));
    for (int64_t step = 0; step < 400; ++step) {
        double values[] = { (double)step * 0.37, 1.0 / (double)(step + 1) };
        assert_true(dot_logger_scalars(log, step, 2, tags, values));
        assert_true(dot_logger_scalar(log, step, "z", values[1]));
        assert_true(dot_logger_text(log, step, "t", "some text"));
        assert_true(dot_logger_histogram(log, step, "h", sample, 100));
        if (step % 100 == 0) assert_true(dot_logger_image(log, step, "i", tiny_png, sizeof tiny_png));
        if (step == 2) {
            assert_true(dot_logger_flush(log));
            after_first = dot_memory(ctx).allocations;
        }
    }
    assert_int_equal(dot_memory(ctx).allocations, after_first);
    assert_true(dot_logger_close(log, true));
}

/* Every allocation fails, it and all after it: it is reported, nothing leaks, and every file stays whole. */
static void test_memory_failures(void **state)
{
    (void)state;
    counting c = { 1 << 30, 0 };
    dot_context_options co = dot_context_defaults();
    co.threads = 1;
    co.allocator.allocate = counting_allocate;
    co.allocator.release = counting_release;
    co.allocator.user = &c;
    int failures = 0;
    for (bool all_good = false; !all_good; ++failures) {
        double sample[] = { 1, 2 };
        const char *folder = new_folder();
        c.left = 1 << 30;
        new_context(&co);
        c.left = failures;
        dot_logger_options o = options();
        o.group = "g";
        dot_logger *log = dot_logger_create(ctx, folder, &o);
        bool good = dot_logger_config_number(log, "lr", 1);
        good = dot_logger_scalar(log, 0, "a", 1) && good;
        good = dot_logger_histogram(log, 1, "h", sample, 2) && good;
        good = dot_logger_image(log, 2, "i", tiny_png, sizeof tiny_png) && good;
        good = dot_logger_close(log, true) && good;
        all_good = good && dot_ok(ctx);
        if (!all_good) assert_int_equal(dot_error_status(ctx), DOT_ERROR_MEMORY);
        if (access(in(folder, "log.jsonl"), F_OK) == 0) {
            lines l = read_lines(folder);
            assert_int_equal(l.torn, 0);
            release_lines(&l);
        }
        if (log) {
            decoded d = read_wandb(wandb_path(folder));
            assert_int_equal(d.torn, 0);
            release(&d);
            d = read_events(events_path(folder, 0));
            assert_int_equal(d.torn, 0);
            release(&d);
        }
        c.left = 1 << 30;
        dot_context_destroy(ctx);
        ctx = NULL;
        assert_int_equal(c.held, 0);
    }
    assert_true(failures > 12);

    double value = 3;
    for (int what = 0; what < 2; ++what)
        for (bool good = (failures = 0) != 0; !good; ++failures) {
            c.left = 1 << 30;
            new_context(&co);
            c.left = failures;
            if (what == 0) good = dot_npy_write(ctx, in(root, "e.npy"), DOT_F64, 0, NULL, &value);
            else good = dot_npy_open(ctx, in(root, "e.npy")) != NULL;
            if (!good) assert_int_equal(dot_error_status(ctx), DOT_ERROR_MEMORY);
            dot_context_destroy(ctx);
            ctx = NULL;
            assert_int_equal(c.held, 0);
        }
    assert_true(failures > 2);
}

/* ---- NPY ---- */

static const char *const dtype_names[] = { "f4", "f8", "i8", "u1" };
static const size_t dtype_sizes[] = { 4, 8, 8, 1 };

static bool same_double(double a, double b) { return memcmp(&a, &b, sizeof a) == 0 || (isnan(a) && isnan(b)); }

static double raw_value(const unsigned char *raw, int dtype, int64_t i)
{
    float f32;
    double f64;
    int64_t i64;
    switch (dtype) {
    case DOT_F32: memcpy(&f32, raw + 4 * i, 4); return (double)f32;
    case DOT_F64: memcpy(&f64, raw + 8 * i, 8); return f64;
    case DOT_I64: memcpy(&i64, raw + 8 * i, 8); return (double)i64;
    default:      return (double)raw[i];
    }
}

/* Files of numpy.save: all types, both byte orders, both orders of elements, ranks 0 to 8, three versions. */
static void test_npy_read(void **state)
{
    (void)state;
    static const char *const groups[] = { "npy/", "written/" };
    char name[128], key[160];
    int seen = 0, fortran = 0;
    for (int g = 0; g < 2; ++g)
        for (int index = 0; golden_name(groups[g], "/values", &index, name); ++seen) {
            size_t size;
            int64_t count, info_count;
            unsigned char *bytes = golden_bytes(name, &size);
            snprintf(key, sizeof key, "%s/values", name);
            double *values = golden_values(key, &count), *read = (double *)calloc((size_t)count + 1, sizeof *read);
            snprintf(key, sizeof key, "%s/info", name);
            double *expected = golden_values(key, &info_count);
            write_bytes(in(root, "a.npy"), bytes, size);
            dot_npy *file = dot_npy_open(ctx, in(root, "a.npy"));
            if (!file) fail_msg("%s: %s", name, dot_error(ctx));
            dot_npy_info info;
            assert_true(dot_npy_describe(file, &info));
            assert_int_equal(info.rank, info_count - 2);
            for (int k = 0; k < info.rank; ++k) assert_true((double)info.shape[k] == expected[2 + k]);
            assert_int_equal(info.count, count);
            assert_true((double)info.bytes == (double)count * expected[0] && info.fortran_order == (expected[1] != 0));
            fortran += info.fortran_order;
            assert_true(dot_npy_read_double(file, read, count));
            for (int64_t i = 0; i < count; ++i)
                if (!same_double(read[i], values[i]))
                    fail_msg("%s[%d]: %.17g, expected %.17g", name, (int)i, read[i], values[i]);
            unsigned char *raw = (unsigned char *)calloc(info.bytes + 1, 1);
            assert_true(dot_npy_read(file, raw, info.bytes));
            for (int dtype = 0; dtype < 4; ++dtype)
                for (int64_t i = 0; strcmp(info.type, dtype_names[dtype]) == 0 && i < count; ++i)
                    assert_true(same_double(raw_value(raw, dtype, i), values[i]));
            assert_false(dot_npy_read(file, raw, info.bytes + 1));
            assert_error(DOT_ERROR_ARGUMENT, "dot_npy_read", "bytes, but the array has");
            assert_false(dot_npy_read_double(file, read, count + 1));
            assert_error(DOT_ERROR_ARGUMENT, "dot_npy_read_double", "elements, but the array has");
            dot_npy_close(file);
            free(bytes);
            free(values);
            free(read);
            free(expected);
            free(raw);
        }
    assert_true(seen > 45 && fortran > 4);
    assert_ok();
}

/* The same bytes as numpy.save's. */
static void test_npy_write(void **state)
{
    (void)state;
    char name[128], key[160];
    int seen = 0;
    for (int index = 0; golden_name("written/", "/values", &index, name); ++seen) {
        size_t size, again;
        int64_t count, info_count, shape[8];
        int dtype = 0;
        unsigned char *bytes = golden_bytes(name, &size);
        snprintf(key, sizeof key, "%s/info", name);
        double *info = golden_values(key, &info_count);
        while (strncmp(name + strlen("written/<"), dtype_names[dtype], 2) != 0) ++dtype;
        count = 1;
        for (int k = 0; k < info_count - 2; ++k) count *= shape[k] = (int64_t)info[2 + k];
        const unsigned char *data = bytes + size - (size_t)count * dtype_sizes[dtype];
        assert_true(dot_npy_write(ctx, in(root, "b.npy"), (dot_dtype)dtype, (int)info_count - 2, shape, data));
        unsigned char *written = read_bytes(in(root, "b.npy"), &again);
        if (again != size || memcmp(written, bytes, size) != 0) fail_msg("%s: other bytes than numpy.save's", name);
        free(written);
        free(bytes);
        free(info);
    }
    assert_int_equal(seen, 23);
    assert_ok();
}

static size_t npy_bytes(unsigned char *out, int version, const char *dictionary, size_t data)
{
    size_t length = strlen(dictionary), head = version == 1 ? 10 : 12;
    memcpy(out, "\x93NUMPY", 6);
    out[6] = (unsigned char)version;
    out[7] = 0;
    for (size_t i = 8; i < head; ++i) out[i] = (unsigned char)(length >> 8 * (i - 8) & 255);
    memcpy(out + head, dictionary, length);
    memset(out + head + length, 1, data);
    return head + length + data;
}

#define GOOD "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"
#define SHAPED(shape) "{'descr': '|u1', 'fortran_order': False, 'shape': " shape "}\n"
#define TYPED(type) "{'descr': " type ", 'fortran_order': False, 'shape': (2,)}\n"

static void test_npy_attacks(void **state)
{
    (void)state;
    static const struct { const char *dictionary; size_t data; const char *says; } files[] = {
        { GOOD, 24, NULL },
        { "{\"shape\":(2,3),\"descr\":\"<f4\",\"fortran_order\":False}\n", 24, NULL },      /* any order, any quotes */
        { "{ 'fortran_order' : True , 'shape' : ( 2 , 3 , ) , 'descr' : '<f4' }   \n", 24, NULL },
        { SHAPED("()"), 1, NULL }, { SHAPED("(4,)"), 4, NULL }, { SHAPED("(1,1,1,1,1,1,1,2)"), 2, NULL },
        { SHAPED("(0, 281474976710655, 281474976710655)"), 0, NULL },
        { GOOD, 23, "shape [2,3] of 4-byte elements, but 23 bytes follow" },
        { GOOD, 25, "but 25 bytes follow" },                                                /* no polyglots */
        { GOOD, 48, "but 48 bytes follow" },
        { "", 0, "expected '{'" },
        { "{}\n", 0, "expected the keys descr, fortran_order, shape before here" },
        { "{'descr': '<f4', 'fortran_order': False}\n", 0, "expected the keys" },
        { "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': ()}\n", 4, "once and no other" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': (), 'x': 1}\n", 4, "once and no other" },
        { "{'descr': '<f4', 'fortran_order': 1, 'shape': ()}\n", 4, "True or False" },
        { "{'descr': '<f4' 'fortran_order': False, 'shape': ()}\n", 4, "expected '}'" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': ()}", 4, "only spaces and one newline" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': ()}\nx", 4, "only spaces and one newline" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': ()} + open('x')\n", 4, "only spaces and one newline" },
        { "{'descr': '<f4', 'fortran_order': False, 'shape': (), \n", 4, "quoted string" },
        { "{'descr': '<f4\n", 4, "short string" },
        { "{'d\\x65scr': '<f4', 'fortran_order': False, 'shape': ()}\n", 4, "without escapes" },
        { TYPED("'|O'"), 16, "a type f4" }, { TYPED("[('a', '<f4')]"), 8, "quoted string" }, { TYPED("'<U4'"), 32, "a type" },
        { TYPED("'|f4'"), 8, "a type" }, { TYPED("'=f4'"), 8, "a type" }, { TYPED("'f4'"), 8, "a type" },
        { TYPED("''"), 8, "a type" }, { TYPED("'<f16'"), 32, "a type" }, { TYPED("'<c8'"), 16, "a type" },
        { TYPED("'<f4, and a long tail'"), 8, "short string" },
        { SHAPED("(4)"), 4, "expected ','" }, { SHAPED("(,)"), 1, "an integer" }, { SHAPED("(-4,)"), 4, "an integer" },
        { SHAPED("(04,)"), 4, "without leading zeros" }, { SHAPED("(4L,)"), 4, "expected ','" },
        { SHAPED("(4.0,)"), 4, "expected ','" },
        { SHAPED("4"), 4, "'('" }, { SHAPED("[4]"), 4, "'('" }, { SHAPED("(1,1,1,1,1,1,1,1,4)"), 4, "at most 8 sizes" },
        { SHAPED("(281474976710656,)"), 4, "an integer from 0 to 281474976710655" },
        { SHAPED("(4294967296, 4294967296)"), 0, "but 0 bytes follow" },                    /* the product wraps to 0 */
        { SHAPED("(281474976710655, 281474976710655, 281474976710655)"), 1, "but 1 bytes follow" },
        { "{'descr': '<f8', 'fortran_order': False, 'shape': (2305843009213693952,)}\n", 0, "an integer from 0 to" },
    };
    unsigned char bytes[4096];
    for (int version = 1; version <= 3; ++version)
        for (int i = 0; i < COUNT(files); ++i) {
            write_bytes(in(root, "c.npy"), bytes, npy_bytes(bytes, version, files[i].dictionary, files[i].data));
            dot_npy *file = dot_npy_open(ctx, in(root, "c.npy"));
            if ((file != NULL) != (files[i].says == NULL)) fail_msg("%d: %s: %s", i, files[i].dictionary, dot_error(ctx));
            if (!file) assert_error(DOT_ERROR_FORMAT, "dot_npy_open", files[i].says);
            double none;
            dot_npy_info info;
            if (file && dot_npy_describe(file, &info) && info.count == 0) assert_true(dot_npy_read_double(file, &none, 0));
            dot_npy_close(file);
        }
    static const struct { size_t at; unsigned char byte; const char *says; } heads[] = {
        { 0, 'x', "does not begin with" }, { 5, 'y', "does not begin with" }, { 6, 0, "version" }, { 6, 4, "version" },
        { 7, 1, "version" }, { 9, 0xff, "more than 10000" }, { 9, 0x10, "ends outside" } };
    for (int i = 0; i < COUNT(heads); ++i) {
        size_t size = npy_bytes(bytes, 1, GOOD, 24);
        bytes[heads[i].at] = heads[i].byte;
        write_bytes(in(root, "c.npy"), bytes, size);
        assert_null(dot_npy_open(ctx, in(root, "c.npy")));
        assert_error(DOT_ERROR_FORMAT, "dot_npy_open", heads[i].says);
    }
    size_t size = npy_bytes(bytes, 2, GOOD, 24);
    for (size_t cut = 0; cut < size; ++cut) {
        write_bytes(in(root, "c.npy"), bytes, cut);
        assert_null(dot_npy_open(ctx, in(root, "c.npy")));
        assert_error(DOT_ERROR_FORMAT, "dot_npy_open", "c.npy");
    }
    bytes[11] = 0xff;                                           /* a header of 4 GB */
    write_bytes(in(root, "c.npy"), bytes, size);
    assert_null(dot_npy_open(ctx, in(root, "c.npy")));
    assert_error(DOT_ERROR_FORMAT, "dot_npy_open", "more than 10000");
    assert_ok();
}

static void test_npy_errors(void **state)
{
    (void)state;
    static double values[4096];
    int64_t shape[9] = { 2, 3, -1 }, many = 4096;
    const char *path = in(root, "d.npy");
    char names[64][256];
    size_t before, after;
    assert_true(dot_npy_write(ctx, path, DOT_F64, 2, shape, values));
    int files = names_in(root, "d.npy", names, 64);
    unsigned char *old = read_bytes(path, &before);
    limit_files(1000);                                          /* a full disk leaves the old file, and nothing else */
    assert_false(dot_npy_write(ctx, path, DOT_F64, 1, &many, values));
    limit_files(RLIM_INFINITY);
    assert_error(DOT_ERROR_FILE, "dot_npy_write", "cannot write");
    unsigned char *kept = read_bytes(path, &after);
    assert_int_equal(after, before);
    assert_memory_equal(kept, old, before);
    assert_int_equal(names_in(root, "d.npy", names, 64), files);
    free(old);
    free(kept);
    assert_false(dot_npy_write(ctx, path, DOT_F64, 3, shape, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "shape [2,3,-1]");
    assert_false(dot_npy_write(ctx, path, DOT_F64, 9, shape, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "rank 0..8");
    assert_false(dot_npy_write(ctx, path, (dot_dtype)9, 2, shape, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "dtype");
    assert_false(dot_npy_write(ctx, path, DOT_F64, 2, shape, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "data");
    assert_false(dot_npy_write(ctx, path, DOT_F64, 2, NULL, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "shape is NULL");
    assert_false(dot_npy_write(ctx, NULL, DOT_F64, 2, shape, values));
    assert_error(DOT_ERROR_ARGUMENT, "dot_npy_write", "path is NULL");
    assert_null(dot_npy_open(ctx, in(root, "absent.npy")));
    assert_error(DOT_ERROR_FILE, "dot_npy_open", "cannot open");
    assert_null(dot_npy_open(ctx, root));
    assert_error(DOT_ERROR_FILE, "dot_npy_open", "not a regular file");
    assert_false(dot_npy_read(NULL, values, 8) || dot_npy_read_double(NULL, values, 1) || dot_npy_describe(NULL, NULL));
    dot_npy_close(NULL);

    dot_npy *file = dot_npy_open(ctx, path);                    /* a file that becomes shorter while it is open */
    assert_int_equal(truncate(path, 100), 0);
    assert_false(dot_npy_read(file, values, 48));
    assert_error(DOT_ERROR_FILE, "dot_npy_read", "it ends early");
    assert_ok();                                                /* the context closes it */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
#define GOLDEN_TEST(name) cmocka_unit_test_setup_teardown(name, setup_golden, teardown)
        TEST(test_decoders), TEST(test_first_bytes), TEST(test_dates), TEST(test_defaults), TEST(test_scalars),
        TEST(test_text_and_config), TEST(test_blocks), GOLDEN_TEST(test_histograms), TEST(test_odd_histograms), GOLDEN_TEST(test_images),
        TEST(test_torn_lines), TEST(test_torn_wandb), TEST(test_resume), TEST(test_kill), TEST(test_arguments),
        TEST(test_falling_steps), TEST(test_full_disk), TEST(test_folders), TEST(test_no_allocations),
        TEST(test_memory_failures), GOLDEN_TEST(test_npy_read), GOLDEN_TEST(test_npy_write), TEST(test_npy_attacks),
        TEST(test_npy_errors) };
    char command[96];
    snprintf(root, sizeof root, "%s/dotopt_logs.%ld", access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp", (long)getpid());
    if (mkdir(root, 0700) != 0) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    snprintf(command, sizeof command, "rm -rf %s", root);
    return system(command) != 0 || failed;
}
