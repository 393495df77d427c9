/* Tests of safetensors files and datasets. The vectors and the attacks are those of the reference implementation's tests, of
   its list of attacks, and of bugs found in other readers; tests/golden/files.safetensors is written by the reference. */
#define _XOPEN_SOURCE 600       /* mkdir, setrlimit, truncate */
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
#include <unistd.h>

#include "dotopt.h"
#include "counting.h"

#define COUNT(array) ((int)(sizeof (array) / sizeof *(array)))

static char folder[64];
static dot_context *ctx;

/* ---- helpers ---- */

static const char *in_folder(const char *name)
{
    static char paths[4][256];
    static int turn;
    turn = (turn + 1) % 4;
    snprintf(paths[turn], sizeof paths[turn], "%s/%s", folder, name);
    return paths[turn];
}

static const char *make_file(const char *name, const void *bytes, size_t size)
{
    const char *path = in_folder(name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    if (size > 0) assert_int_equal(fwrite(bytes, 1, size, file), size);
    assert_int_equal(fclose(file), 0);
    return path;
}

static unsigned char *read_file(const char *path, size_t *size)
{
    unsigned char *bytes = (unsigned char *)malloc(1 << 20);
    FILE *file = fopen(path, "rb");
    assert_non_null(bytes);
    assert_non_null(file);
    *size = fread(bytes, 1, 1 << 20, file);
    fclose(file);
    return bytes;
}

static int files_in_folder(void)
{
    int count = 0;
    DIR *list = opendir(folder);
    assert_non_null(list);
    for (struct dirent *entry; (entry = readdir(list)) != NULL;) count += entry->d_name[0] != '.';
    closedir(list);
    return count;
}

static void put64(unsigned char *to, uint64_t value)
{
    for (int i = 0; i < 8; ++i) to[i] = (unsigned char)(value >> 8 * i & 255);
}

/* A safetensors file of this header and `data` bytes 0, 1, 2, ... */
static const char *make_header(const char *header, size_t length, size_t data)
{
    unsigned char *bytes = (unsigned char *)malloc(8 + length + data);
    assert_non_null(bytes);
    put64(bytes, length);
    memcpy(bytes + 8, header, length);
    for (size_t i = 0; i < data; ++i) bytes[8 + length + i] = (unsigned char)i;
    const char *path = make_file("made.safetensors", bytes, 8 + length + data);
    free(bytes);
    return path;
}

static dot_safetensors *open_header(const char *header, size_t data)
{
    return dot_safetensors_open(ctx, make_header(header, strlen(header), data));
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

static void assert_ok(void)
{
    if (!dot_ok(ctx)) fail_msg("%s", dot_error(ctx));
}

static int setup(void **state)
{
    (void)state;
    ctx = dot_context_create(NULL);
    return ctx == NULL;
}

static int teardown(void **state)
{
    (void)state;
    dot_context_destroy(ctx);
    return 0;
}

static void new_context(const dot_context_options *options)
{
    dot_context_destroy(ctx);
    ctx = dot_context_create(options);
    assert_non_null(ctx);
}

/* ---- safetensors: reading ---- */

static const char reference[] = "{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}";

static void test_reference_vectors(void **state)
{
    (void)state;
    static const struct { const char *bytes; size_t size; bool good; } vectors[] = {
        { "<\0\0\0\0\0\0\0{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 84, true },
        { "<\0\0\0\0\0\0\0{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}"
          "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0extra_bogus_data_for_polyglot_file", 118, false },
        { "<\0\0\0\0\0\0\0{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 82, false },
        { "<\0\0\0\0\xff\xff\xff", 8, false },
        { "", 0, false },
        { "\1\0\0\0\0\0\0\0\xff", 9, false },
        { "\1\0\0\0\0\0\0\0{", 9, false },
        { "<\0\0\0\0\0\0\0{\"test\":{\"dtype\":\"I32\",\"shape\":[2,0],\"data_offsets\":[0, 0]}}", 68, true },
        { "8\0\0\0\0\0\0\0{\"test\":{\"dtype\":\"I32\",\"shape\":[],\"data_offsets\":[0,4]}}\0\0\0\0", 68, true },
        { "\2\0\0\0\0\0\0\0{}", 10, true },
        { "\6\0\0\0\0\0\0\0{}\x0d  \n", 14, false },                  /* ends with what the format does not name */
        { "\6\0\0\0\0\0\0\0{}    ", 14, true },
        { "\6\0\0\0\0\0\0\0    {}", 14, false },
        { "\0\0\0\0\0\0\0\0", 8, false },
    };
    for (int i = 0; i < COUNT(vectors); ++i) {
        dot_safetensors *file = dot_safetensors_open(ctx, make_file("vector", vectors[i].bytes, vectors[i].size));
        if ((file != NULL) != vectors[i].good) fail_msg("vector %d: %s", i, dot_error(ctx));
        if (!file) assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "/vector: ");
        dot_safetensors_close(file);
        assert_ok();
    }
}

static void test_reference_contents(void **state)
{
    (void)state;
    unsigned char out[16];
    dot_safetensors_entry entry;
    dot_safetensors *file = open_header(reference, 16);
    assert_int_equal(dot_safetensors_count(file), 1);
    assert_int_equal(dot_safetensors_find(file, "test"), 0);
    assert_int_equal(dot_safetensors_find(file, "tes"), -1);
    assert_int_equal(dot_safetensors_find(file, "test0"), -1);
    assert_true(dot_safetensors_entry_at(file, 0, &entry));
    assert_string_equal(entry.name, "test");
    assert_string_equal(entry.dtype, "I32");
    assert_int_equal(entry.rank, 2);
    assert_int_equal(entry.shape[0], 2);
    assert_int_equal(entry.shape[1], 2);
    assert_int_equal(entry.count, 4);
    assert_int_equal(entry.bytes, 16);
    assert_true(dot_safetensors_read(file, 0, out, 16));
    for (int i = 0; i < 16; ++i) assert_int_equal(out[i], i);       /* on a little-endian machine */
    assert_null(dot_safetensors_metadata(file, "format"));
    assert_ok();
    dot_safetensors_close(file);
}

#define ENTRY(dtype, shape, offsets) "{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"
#define ONE(dtype, shape, offsets) "{\"a\":" ENTRY(dtype, shape, offsets) "}"

static void test_attacks(void **state)
{
    (void)state;
    static const struct { const char *header; size_t data; const char *says; } attacks[] = {
        /* offsets */
        { ONE("U8", "[4]", "[-4,0]"), 4, "an integer from 0" },
        { ONE("U8", "[4]", "[0,8]"), 4, "outside the file" },
        { ONE("U8", "[4]", "[999999999999,4]"), 4, "run backwards" },
        { ONE("U8", "[0]", "[4,0]"), 4, "run backwards" },
        { ONE("U8", "[4]", "[4,8]"), 8, "begins at byte 4 of the data, expected 0" },
        { ONE("U8", "[4]", "[0,4]"), 5, "the tensors take 4 bytes, but the file has 5" },
        { "{}", 1, "the tensors take 0 bytes, but the file has 1" },
        { "{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",\"b\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "begins at byte 0 of the data, expected 4" },
        { "{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",\"b\":" ENTRY("U8", "[4]", "[2,6]") "}", 6, "begins at byte 2 of the data, expected 4" },
        { "{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",\"b\":" ENTRY("U8", "[2]", "[6,8]") "}", 8, "begins at byte 6 of the data, expected 4" },
        { ONE("U8", "[4]", "[0]"), 4, "two integers" },
        { ONE("U8", "[4]", "[]"), 4, "two integers" },
        { ONE("U8", "[4]", "[0,4,4]"), 4, "two integers" },
        { ONE("U8", "[4]", "\"0,4\""), 4, "'['" },
        /* shapes */
        { ONE("F32", "[2,2]", "[0,15]"), 15, "do not fit dtype and shape" },
        { ONE("F32", "[2,2]", "[0,20]"), 20, "do not fit dtype and shape" },
        { ONE("F64", "[2,2]", "[0,16]"), 16, "do not fit dtype and shape" },
        { ONE("U8", "[4294967296,4294967296]", "[0,0]"), 0, "product overflows" },
        { ONE("F32", "[4611686018427387904]", "[0,0]"), 0, "an integer from 0" },
        { ONE("F32", "[281474976710655,65536]", "[0,0]"), 0, "product overflows" },
        { ONE("F64", "[281474976710655,4096]", "[0,0]"), 0, "product overflows" },
        { ONE("U8", "[4294967296,4294967296,0]", "[0,0]"), 0, "product overflows" },
        { ONE("U8", "[18446744073709551616]", "[0,0]"), 0, "an integer from 0" },
        { ONE("U8", "[281474976710656]", "[0,0]"), 0, "an integer from 0" },
        { ONE("U8", "[1,1,1,1,1,1,1,1,1]", "[0,1]"), 1, "at most 8 integers" },
        { ONE("F4", "[3]", "[0,1]"), 1, "not whole bytes" },
        { ONE("F6_E2M3", "[2]", "[0,1]"), 1, "not whole bytes" },
        { ONE("U8", "4", "[0,4]"), 4, "'['" },
        { ONE("U8", "[[4]]", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[4", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[4}", "[0,4]"), 4, "']'" },
        /* numbers */
        { ONE("U8", "[04]", "[0,4]"), 4, "leading zeros" },
        { ONE("U8", "[00]", "[0,0]"), 0, "leading zeros" },
        { ONE("U8", "[4.0]", "[0,4]"), 4, "']'" },
        { ONE("U8", "[4e0]", "[0,4]"), 4, "']'" },
        { ONE("U8", "[+4]", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[0x4]", "[0,4]"), 4, "']'" },
        { ONE("U8", "[4,]", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[,4]", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[null]", "[0,4]"), 4, "an integer from 0" },
        { ONE("U8", "[\"4\"]", "[0,4]"), 4, "an integer from 0" },
        /* dtypes and keys */
        { ONE("F33", "[4]", "[0,4]"), 4, "a known dtype" },
        { ONE("f32", "[1]", "[0,4]"), 4, "a known dtype" },
        { ONE("", "[1]", "[0,4]"), 4, "a known dtype" },
        { "{\"a\":{\"dtype\":1,\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "'\"'" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4]}}", 4, "the keys dtype, shape, data_offsets" },
        { "{\"a\":{\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "the keys dtype, shape, data_offsets" },
        { "{\"a\":{\"dtype\":\"U8\",\"data_offsets\":[0,4]}}", 4, "the keys dtype, shape, data_offsets" },
        { "{\"a\":{}}", 0, "'\"'" },
        { "{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", 4, "once" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"sh\\u0061pe\":[4]}}", 4, "once" },
        { "{\"a\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4],\"strides\":[1]}}", 4, "no other" },
        { "{\"a\":null}", 0, "'{'" },
        { "{\"a\":[]}", 0, "'{'" },
        /* names */
        { "{\"a\":" ENTRY("U8", "[2]", "[0,2]") ",\"a\":" ENTRY("U8", "[2]", "[2,4]") "}", 4, "\"a\" occurs twice" },
        { "{\"a\":" ENTRY("U8", "[2]", "[0,2]") ",\"\\u0061\":" ENTRY("U8", "[2]", "[2,4]") "}", 4, "\"a\" occurs twice" },
        { "{\"a\":" ENTRY("U8", "[0]", "[0,0]") ",\"b\":" ENTRY("U8", "[0]", "[0,0]") ",\"a\":" ENTRY("U8", "[0]", "[0,0]") "}", 0, "\"a\" occurs twice" },
        { "{\"a\\u0000b\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "no zero character" },
        { "{'a':" ENTRY("U8", "[4]", "[0,4]") "}", 4, "'\"'" },
        { "{a:" ENTRY("U8", "[4]", "[0,4]") "}", 4, "'\"'" },
        /* strings */
        { "{\"a\n\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "control characters" },
        { "{\"a\x7f\":" ENTRY("U8", "[4]", "[0,3]") "}", 4, "do not fit" },             /* 0x7f itself is allowed */
        { "{\"\xc0\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },                   /* overlong */
        { "{\"\xe0\x80\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },
        { "{\"\xf0\x80\x80\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },
        { "{\"\xed\xa0\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },               /* a surrogate */
        { "{\"\xf4\x90\x80\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },           /* above U+10FFFF */
        { "{\"\xf5\x80\x80\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },
        { "{\"\x80\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },
        { "{\"\xe2\x82\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },                   /* cut */
        { "{\"\xff\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "UTF-8" },
        { "{\"\\ud800\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "surrogate pair" },
        { "{\"\\ud800\\u0041\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "surrogate pair" },
        { "{\"\\ud800\\ud800\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "surrogate pair" },
        { "{\"\\udc00\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "surrogate pair" },
        { "{\"\\u12g4\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "hexadecimal" },
        { "{\"\\u12\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "hexadecimal" },
        { "{\"\\x41\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "a known escape" },
        { "{\"\\'\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "a known escape" },
        { "{\"a", 0, "a closing quote" },
        { "{\"a\\", 0, "a known escape" },
        { "{\"a\\u", 0, "hexadecimal" },
        { "{\"a\\ud800\\u", 0, "hexadecimal" },
        /* metadata */
        { "{\"__metadata__\":{\"k\":1}}", 0, "'\"'" },
        { "{\"__metadata__\":{\"k\":null}}", 0, "'\"'" },
        { "{\"__metadata__\":{\"k\":{}}}", 0, "'\"'" },
        { "{\"__metadata__\":{\"k\":\"\\u0000\"}}", 0, "no zero character" },
        { "{\"__metadata__\":null}", 0, "'{'" },
        { "{\"__metadata__\":[]}", 0, "'{'" },
        { "{\"__metadata__\":" ENTRY("U8", "[4]", "[0,4]") "}", 4, "'\"'" },
        { "{\"__metadata__\":{\"k\":\"1\",\"\\u006b\":\"2\"}}", 0, "\"k\" occurs twice" },
        { "{\"__metadata__\":{},\"\\u005f_metadata__\":{}}", 0, "only once" },
        { "{\"__metadata__\":{\"k\":\"v\",}}", 0, "'\"'" },
        /* the object */
        { "", 0, "'{'" },
        { "[]", 0, "'{'" },
        { " {}", 0, "'{'" },
        { "\xef\xbb\xbf{}", 0, "'{'" },
        { "{", 0, "'\"'" },
        { "{}{}", 0, "only spaces" },
        { "{}\n", 0, "only spaces" },
        { "{}x", 0, "only spaces" },
        { "{,}", 0, "'\"'" },
        { "{\"a\"}", 0, "':'" },
        { "{\"a\":" ENTRY("U8", "[4]", "[0,4]") ",}", 4, "'\"'" },
        { "{\"a\":" ENTRY("U8", "[4]", "[0,4]"), 4, "'}'" },
        { "{/**/}", 0, "'\"'" },
    };
    for (int i = 0; i < COUNT(attacks); ++i) {
        dot_safetensors *file = open_header(attacks[i].header, attacks[i].data);
        if (file) fail_msg("attack %d was read: %s", i, attacks[i].header);
        assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", attacks[i].says);
    }
}

/* Cuts the reference file anywhere, and changes each of its header's bytes into each other byte: it must be refused or, where
   the change is in the name, be read; and never anything worse, which the sanitizers watch. */
static void test_every_byte(void **state)
{
    (void)state;
    unsigned char bytes[84];
    put64(bytes, 60);
    memcpy(bytes + 8, reference, 60);
    memset(bytes + 68, 0, 16);
    for (size_t size = 0; size < sizeof bytes; ++size) {
        assert_null(dot_safetensors_open(ctx, make_file("cut", bytes, size)));
        assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "");
    }
    int readable = 0;
    for (size_t at = 0; at < 68; ++at)
        for (int change = 1; change < 256; ++change) {
            bytes[at] ^= (unsigned char)change;
            dot_safetensors *file = dot_safetensors_open(ctx, make_file("changed", bytes, sizeof bytes));
            bytes[at] ^= (unsigned char)change;
            if (file) {
                ++readable;
                dot_safetensors_close(file);
            } else {
                assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "");
            }
        }
    /* Each of the 4 letters of the name: any other ASCII character but the 32 controls, the quote, the backslash, itself; the
       name "te\t", a tab; and I32 as U32 or F32. */
    assert_int_equal(readable, 4 * (128 - 32 - 3) + 1 + 2);
}

static void test_header_with_zero_byte(void **state)
{
    (void)state;
    char header[64];
    memcpy(header, reference, 60);
    header[3] = 0;
    assert_null(dot_safetensors_open(ctx, make_header(header, 60, 16)));
    assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "control characters");
    memcpy(header, "{}\0 ", 4);
    assert_null(dot_safetensors_open(ctx, make_header(header, 4, 0)));
    assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "only spaces");
}

static void test_header_length(void **state)
{
    (void)state;
    static const uint64_t lengths[] = { 77, 100000000, 100000001, 0x7fffffff, 0xffffffff, 0x7fffffffffffffff, 0xfffffffffffffff8,
                                        0xffffffffffffffff };
    for (int i = 0; i < COUNT(lengths); ++i) {
        unsigned char bytes[84] = { 0 };
        put64(bytes, lengths[i]);
        memcpy(bytes + 8, reference, 60);
        assert_null(dot_safetensors_open(ctx, make_file("length", bytes, sizeof bytes)));
        assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "at most 100000000 and the 76 that follow");
    }
    /* A file that has them, and a header above the limit: sparse, so it takes no room. */
    unsigned char head[9] = { 0, 0, 0, 0, 0, 0, 0, 0, '{' };
    put64(head, 100000001);
    const char *path = make_file("large", head, sizeof head);
    assert_int_equal(truncate(path, 100000020), 0);
    assert_null(dot_safetensors_open(ctx, path));
    assert_error(DOT_ERROR_FORMAT, "dot_safetensors_open", "header of 100000001 bytes, expected at most 100000000");
}

static void test_json_variants(void **state)
{
    (void)state;
    /* Other writers' blanks, orders of keys, and escapes. */
    static const char header[] =
        "{ \"b\\u00e9\\\"\\\\\\/\\b\\f\\n\\r\\t\" :\t{\r\n\"data_offsets\" : [ 2 , 4 ] , \"shape\" : [ ] , \"dtype\" : \"I16\" } , "
        "\"__metadata__\" : { \"\" : \"empty key\" , \"pair \\ud83d\\ude00\" : \"\\uFFFF \xf0\x9f\x98\x80\" } , "
        "\"\" : {\"shape\":[2],\"dtype\":\"BOOL\",\"data_offsets\":[0,2]}}   ";
    dot_safetensors *file = open_header(header, 4);
    assert_ok();
    assert_int_equal(dot_safetensors_count(file), 2);
    assert_true(dot_safetensors_find(file, "b\xc3\xa9\"\\/\b\f\n\r\t") >= 0);
    assert_true(dot_safetensors_find(file, "") >= 0);
    assert_string_equal(dot_safetensors_metadata(file, ""), "empty key");
    assert_string_equal(dot_safetensors_metadata(file, "pair \xf0\x9f\x98\x80"), "\xef\xbf\xbf \xf0\x9f\x98\x80");
    assert_null(dot_safetensors_metadata(file, "pair"));
    dot_safetensors_close(file);
}

static void test_dtypes(void **state)
{
    (void)state;
    static const struct { const char *name; int bits; } dtypes[] = {
        { "BOOL", 8 }, { "F4", 4 }, { "F6_E2M3", 6 }, { "F6_E3M2", 6 }, { "U8", 8 }, { "I8", 8 }, { "F8_E5M2", 8 }, { "F8_E4M3", 8 },
        { "F8_E8M0", 8 }, { "F8_E4M3FNUZ", 8 }, { "F8_E5M2FNUZ", 8 }, { "I16", 16 }, { "U16", 16 }, { "F16", 16 }, { "BF16", 16 },
        { "I32", 32 }, { "U32", 32 }, { "F32", 32 }, { "C64", 64 }, { "F64", 64 }, { "I64", 64 }, { "U64", 64 } };
    for (int i = 0; i < COUNT(dtypes); ++i) {
        char header[128];
        unsigned char out[32];
        double values[4];
        dot_safetensors_entry entry;
        size_t bytes = (size_t)dtypes[i].bits * 4 / 8;
        snprintf(header, sizeof header, "{\"a\":{\"dtype\":\"%s\",\"shape\":[4],\"data_offsets\":[0,%d]}}", dtypes[i].name, (int)bytes);
        dot_safetensors *file = open_header(header, bytes);
        assert_ok();
        assert_true(dot_safetensors_entry_at(file, 0, &entry));
        assert_string_equal(entry.dtype, dtypes[i].name);
        assert_int_equal(entry.bytes, bytes);
        assert_true(dot_safetensors_read(file, 0, out, bytes));
        bool known = strstr(" F32 F64 I64 U8 ", entry.dtype) && strlen(entry.dtype) > 1 && strcmp(entry.dtype, "F4") != 0;
        assert_int_equal(dot_safetensors_read_double(file, 0, values, 4), known);
        if (!known) assert_error(DOT_ERROR_DTYPE, "dot_safetensors_read_double", entry.dtype);
        dot_safetensors_close(file);
        assert_ok();
    }
}

static void test_golden(void **state)
{
    (void)state;
    static const char decoder[] = "decoder.weight";
    double values[12];
    dot_safetensors_entry entry;
    dot_safetensors *file = dot_safetensors_open(ctx, "tests/golden/files.safetensors");
    assert_ok();
    assert_int_equal(dot_safetensors_count(file), 7);
    assert_string_equal(dot_safetensors_metadata(file, "format"), "pt");
    int index = dot_safetensors_find(file, decoder);
    assert_true(dot_safetensors_entry_at(file, index, &entry));
    assert_string_equal(entry.name, decoder);
    assert_string_equal(entry.dtype, "F32");
    assert_int_equal(entry.rank, 2);
    assert_int_equal(entry.shape[0], 3);
    assert_int_equal(entry.shape[1], 4);
    assert_true(dot_safetensors_read_double(file, index, values, 12));
    for (int i = 0; i < 12; ++i) assert_true(values[i] == (i - 6) / 4.0);
    assert_true(dot_safetensors_read_double(file, dot_safetensors_find(file, "scalar"), values, 1));
    assert_true(values[0] == -1.5);
    assert_true(dot_safetensors_read_double(file, dot_safetensors_find(file, "steps"), values, 3));
    assert_true(values[0] == -1 && values[1] == 4611686018427387904.0 && values[2] == 7);
    assert_true(dot_safetensors_read_double(file, dot_safetensors_find(file, "bytes"), values, 5));
    for (int i = 0; i < 5; ++i) assert_true(values[i] == 250 + i);
    assert_true(dot_safetensors_read_double(file, dot_safetensors_find(file, "gr\xc3\xbc\xc3\x9f" "e \"quoted\" \\ \xf0\x9f\x98\x80"), values, 1));
    assert_true(values[0] == 1.25);
    assert_true(dot_safetensors_read_double(file, dot_safetensors_find(file, "empty"), NULL, 0));
    assert_true(dot_safetensors_read(file, dot_safetensors_find(file, "empty"), NULL, 0));
    assert_ok();
    dot_safetensors_close(file);
}

static void test_read_arguments(void **state)
{
    (void)state;
    unsigned char out[32];
    double values[8];
    dot_safetensors_entry entry;
    dot_safetensors *file = open_header(ONE("F32", "[4]", "[0,16]"), 16);
    assert_ok();
    assert_false(dot_safetensors_entry_at(file, 1, &entry));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_entry_at", "tensor 1, but the file has 1");
    assert_false(dot_safetensors_read(file, -1, out, 16));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read", "tensor -1");
    assert_false(dot_safetensors_read(file, 0, out, 15));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read", "room for 15 bytes, but tensor \"a\" has 16");
    assert_false(dot_safetensors_read(file, 0, out, 17));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read", "room for 17 bytes");
    assert_false(dot_safetensors_read(file, 0, NULL, 16));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read", "NULL");
    assert_false(dot_safetensors_read_double(file, 0, values, 5));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read_double", "room for 5 elements, but tensor \"a\" has 4");
    assert_false(dot_safetensors_read_double(file, 0, values, -4));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read_double", "has 4");
    assert_false(dot_safetensors_read_double(file, 9, values, 4));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_read_double", "tensor 9");

    /* The file gets shorter while it is open. */
    assert_int_equal(truncate(in_folder("made.safetensors"), 70), 0);
    assert_false(dot_safetensors_read(file, 0, out, 16));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_read", "ends early");
    assert_false(dot_safetensors_read_double(file, 0, values, 4));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_read_double", "ends early");
    dot_safetensors_close(file);

    /* NULL: silence. */
    assert_null(dot_safetensors_open(NULL, "x"));
    assert_int_equal(dot_safetensors_count(NULL), 0);
    assert_false(dot_safetensors_entry_at(NULL, 0, &entry));
    assert_int_equal(dot_safetensors_find(NULL, "a"), -1);
    assert_null(dot_safetensors_metadata(NULL, "a"));
    assert_false(dot_safetensors_read(NULL, 0, out, 16));
    assert_false(dot_safetensors_read_double(NULL, 0, values, 4));
    dot_safetensors_close(NULL);
    assert_ok();
}

static void test_open_errors(void **state)
{
    (void)state;
    assert_null(dot_safetensors_open(ctx, in_folder("absent")));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_open", "/absent: cannot open it: ");
    assert_null(dot_safetensors_open(ctx, folder));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_open", "not a regular file");
    assert_null(dot_safetensors_open(ctx, "/dev/null"));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_open", "not a regular file");
    assert_int_equal(mkfifo(in_folder("pipe"), 0600), 0);               /* must not wait for a writer */
    assert_null(dot_safetensors_open(ctx, in_folder("pipe")));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_open", "not a regular file");
    assert_null(dot_safetensors_open(ctx, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_open", "NULL");
}

/* Names and offsets in any order; each is found, and its data are its own. */
static void test_many_tensors(void **state)
{
    (void)state;
    enum { N = 3000 };
    char *header = (char *)malloc(N * 80), *at = header;
    assert_non_null(header);
    at += sprintf(at, "{");
    for (int i = 0; i < N; ++i) {
        int k = (int)((int64_t)i * 1999 % N);                           /* 1999 and 3000 have no common factor */
        at += sprintf(at, "%s\"t%d\":" "{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}", i ? "," : "", k, k, k + 1);
    }
    sprintf(at, "}");
    dot_safetensors *file = open_header(header, N);
    assert_ok();
    assert_int_equal(dot_safetensors_count(file), N);
    for (int k = 0; k < N; ++k) {
        char name[16];
        unsigned char byte;
        dot_safetensors_entry entry;
        snprintf(name, sizeof name, "t%d", k);
        int index = dot_safetensors_find(file, name);
        assert_true(dot_safetensors_entry_at(file, index, &entry));
        assert_string_equal(entry.name, name);
        assert_true(dot_safetensors_read(file, index, &byte, 1));
        assert_int_equal(byte, k & 255);
    }
    dot_safetensors_close(file);
    free(header);
}

/* A destroyed context leaves no file open: the next one gets the same descriptor. */
static void test_destroy_closes(void **state)
{
    (void)state;
    const char *path = make_header(reference, 60, 16);
    FILE *before = fopen(path, "rb");
    int fd = fileno(before);
    fclose(before);
    assert_non_null(dot_safetensors_open(ctx, path));
    assert_non_null(dot_safetensors_open(ctx, path));
    new_context(NULL);
    FILE *after = fopen(path, "rb");
    assert_int_equal(fileno(after), fd);
    fclose(after);
}

/* ---- safetensors: writing ---- */

static dot_safetensors_item item(const char *name, dot_dtype dtype, int rank, int64_t a, int64_t b, int64_t c, const void *data)
{
    dot_safetensors_item made;
    memset(&made, 0, sizeof made);
    made.name = name;
    made.dtype = dtype;
    made.rank = rank;
    made.shape[0] = a;
    made.shape[1] = b;
    made.shape[2] = c;
    made.data = data;
    return made;
}

/* The same tensors as tests/golden/files.py gives the reference's writer, in another order: the same bytes. */
static void test_write_golden(void **state)
{
    (void)state;
    static const char *const metadata[] = { "format", "pt", NULL };
    float decoder[12], encoder[6], one = 1.25f;
    double scalar = -1.5;
    int64_t steps[3] = { -1, (int64_t)1 << 62, 7 };
    uint8_t bytes[5] = { 250, 251, 252, 253, 254 };
    for (int i = 0; i < 12; ++i) decoder[i] = (float)(i - 6) / 4;
    for (int i = 0; i < 6; ++i) encoder[i] = (float)i * 0.5f;
    dot_safetensors_item items[7];
    items[0] = item("bytes", DOT_U8, 1, 5, 0, 0, bytes);
    items[1] = item("encoder.weight", DOT_F32, 3, 2, 1, 3, encoder);
    items[2] = item("scalar", DOT_F64, 0, 0, 0, 0, &scalar);
    items[3] = item("gr\xc3\xbc\xc3\x9f" "e \"quoted\" \\ \xf0\x9f\x98\x80", DOT_F32, 1, 1, 0, 0, &one);
    items[4] = item("empty", DOT_F64, 2, 2, 0, 0, NULL);
    items[5] = item("steps", DOT_I64, 1, 3, 0, 0, steps);
    items[6] = item("decoder.weight", DOT_F32, 2, 3, 4, 0, decoder);
    assert_true(dot_safetensors_write(ctx, in_folder("golden"), items, 7, metadata));
    assert_ok();
    size_t size, expected;
    unsigned char *ours = read_file(in_folder("golden"), &size), *theirs = read_file("tests/golden/files.safetensors", &expected);
    assert_int_equal(size, expected);
    assert_memory_equal(ours, theirs, size);
    free(ours);
    free(theirs);
}

static void test_write_small(void **state)
{
    (void)state;
    static const char *const metadata[] = { "a \"key\"", "line\nand \x01 control \\", "k", "", NULL };
    static const char *const none[] = { NULL };
    size_t size;
    for (int i = 0; i < 3; ++i) {
        assert_true(dot_safetensors_write(ctx, in_folder("small"), NULL, 0, i == 0 ? NULL : i == 1 ? none : metadata));
        dot_safetensors *file = dot_safetensors_open(ctx, in_folder("small"));
        assert_ok();
        assert_int_equal(dot_safetensors_count(file), 0);
        if (i == 2) {
            assert_string_equal(dot_safetensors_metadata(file, metadata[0]), metadata[1]);
            assert_string_equal(dot_safetensors_metadata(file, "k"), "");
        }
        dot_safetensors_close(file);
        unsigned char *bytes = read_file(in_folder("small"), &size);
        assert_int_equal(size % 8, 0);
        if (i < 2) assert_memory_equal(bytes, "\10\0\0\0\0\0\0\0{}      ", 16);
        free(bytes);
    }
    assert_true(files_in_folder() >= 1);
}

/* Larger than any buffer, converted on the way in, in pieces. */
static void test_write_large(void **state)
{
    (void)state;
    enum { N = 100003 };
    float *weights = (float *)malloc(N * sizeof *weights);
    double *values = (double *)malloc(N * sizeof *values);
    assert_non_null(weights);
    assert_non_null(values);
    for (int i = 0; i < N; ++i) weights[i] = (float)sin(i);
    weights[7] = -0.0f;
    weights[8] = HUGE_VALF;
    dot_safetensors_item large = item("w", DOT_F32, 1, N, 0, 0, weights);
    assert_true(dot_safetensors_write(ctx, in_folder("large2"), &large, 1, NULL));
    dot_safetensors *file = dot_safetensors_open(ctx, in_folder("large2"));
    assert_true(dot_safetensors_read_double(file, 0, values, N));
    for (int i = 0; i < N; ++i) assert_true(values[i] == (double)weights[i] && !signbit(values[i]) == !signbit(weights[i]));
    dot_safetensors_close(file);
    assert_ok();
    free(weights);
    free(values);
}

static void test_write_arguments(void **state)
{
    (void)state;
    uint8_t bytes[4] = { 1, 2, 3, 4 };
    struct { dot_safetensors_item item; const char *says; } wrong[12];
    int n = 0;
#define WRONG(i, text) (wrong[n].item = (i), wrong[n++].says = (text))
    WRONG(item(NULL, DOT_U8, 1, 4, 0, 0, bytes), "expected a name");
    WRONG(item("", DOT_U8, 1, 4, 0, 0, bytes), "expected a name");
    WRONG(item("a\xff", DOT_U8, 1, 4, 0, 0, bytes), "expected a name in UTF-8");
    WRONG(item("__metadata__", DOT_U8, 1, 4, 0, 0, bytes), "another name");
    WRONG(item("a", (dot_dtype)4, 1, 4, 0, 0, bytes), "expected dtype");
    WRONG(item("a", (dot_dtype)-1, 1, 4, 0, 0, bytes), "expected dtype");
    WRONG(item("a", DOT_U8, -1, 4, 0, 0, bytes), "expected rank");
    WRONG(item("a", DOT_U8, DOT_MAX_RANK + 1, 4, 0, 0, bytes), "expected rank");
    WRONG(item("a", DOT_U8, 1, -4, 0, 0, bytes), "shape [-4]; expected sizes");
    WRONG(item("a", DOT_F64, 2, (int64_t)1 << 40, (int64_t)1 << 40, 0, bytes), "fewer elements");
    WRONG(item("a", DOT_U8, 1, 4, 0, 0, NULL), "expected data");
    WRONG(item("b", DOT_U8, 1, 4, 0, 0, bytes), "\"b\" occurs twice");
    int before = files_in_folder();
    for (int i = 0; i < n; ++i) {
        dot_safetensors_item items[2];
        items[0] = item("b", DOT_F64, 1, 0, 0, 0, NULL);
        items[1] = wrong[i].item;
        assert_false(dot_safetensors_write(ctx, in_folder("never"), items, 2, NULL));
        assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_write", wrong[i].says);
    }
    static const struct { const char *metadata[5]; const char *says; } bad[] = {
        { { "a", NULL }, "has no value" }, { { "a", "1", "b", NULL }, "has no value" }, { { "a", "1", "a", "2", NULL }, "occurs twice" },
        { { "a\xff", "1", NULL }, "not UTF-8" }, { { "a", "\xc3", NULL }, "not UTF-8" } };
    for (int i = 0; i < COUNT(bad); ++i) {
        assert_false(dot_safetensors_write(ctx, in_folder("never"), NULL, 0, bad[i].metadata));
        assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_write", bad[i].says);
    }
    assert_false(dot_safetensors_write(ctx, NULL, NULL, 0, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_write", "path is NULL");
    assert_false(dot_safetensors_write(ctx, in_folder("never"), NULL, 1, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_write", "items is NULL, count 1");
    assert_false(dot_safetensors_write(ctx, in_folder("never"), NULL, -1, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_safetensors_write", "count -1");
    assert_false(dot_safetensors_write(NULL, in_folder("never"), NULL, 0, NULL));
    assert_int_equal(files_in_folder(), before);
}

/* Whatever fails, the old file stays, whole, and nothing is left beside it. */
static void test_write_failures(void **state)
{
    (void)state;
    static double zeros[4096];
    dot_safetensors_item small = item("a", DOT_F64, 1, 2, 0, 0, zeros), large = item("a", DOT_F64, 1, 4096, 0, 0, zeros);
    const char *path = in_folder("kept");
    assert_true(dot_safetensors_write(ctx, path, &small, 1, NULL));
    int before = files_in_folder();
    size_t size, again;
    unsigned char *old = read_file(path, &size);

    struct rlimit limit, tight;                         /* a full disk: no file may grow beyond 1000 bytes */
    assert_int_equal(getrlimit(RLIMIT_FSIZE, &limit), 0);
    tight = limit;
    tight.rlim_cur = 1000;
    signal(SIGXFSZ, SIG_IGN);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &tight), 0);
    bool written = dot_safetensors_write(ctx, path, &large, 1, NULL);
    assert_int_equal(setrlimit(RLIMIT_FSIZE, &limit), 0);
    assert_false(written);
    assert_error(DOT_ERROR_FILE, "dot_safetensors_write", "cannot write");
    unsigned char *now = read_file(path, &again);
    assert_int_equal(again, size);
    assert_memory_equal(now, old, size);
    assert_int_equal(files_in_folder(), before);

    assert_int_equal(mkdir(in_folder("a folder"), 0700), 0);            /* a target that cannot be replaced */
    assert_false(dot_safetensors_write(ctx, in_folder("a folder"), &small, 1, NULL));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_write", "rename it");
    assert_int_equal(files_in_folder(), before + 1);

    assert_false(dot_safetensors_write(ctx, in_folder("absent/x"), &small, 1, NULL));
    assert_error(DOT_ERROR_FILE, "dot_safetensors_write", "cannot create");
    if (geteuid() != 0) {                                               /* the superuser may write anywhere */
        assert_int_equal(chmod(in_folder("a folder"), 0500), 0);
        assert_false(dot_safetensors_write(ctx, in_folder("a folder/x"), &small, 1, NULL));
        assert_error(DOT_ERROR_FILE, "dot_safetensors_write", "cannot create");
        assert_int_equal(chmod(in_folder("a folder"), 0700), 0);
    }

    char stale[256];                                                    /* what a killed process left is not in the way */
    snprintf(stale, sizeof stale, "kept.tmp.%ld.0", (long)getpid());
    make_file(stale, "x", 1);
    assert_true(dot_safetensors_write(ctx, path, &large, 1, NULL));
    assert_int_equal(files_in_folder(), before + 2);
    assert_ok();
    free(old);
    free(now);
}

/* Every allocation fails once; each failure is reported and undone. */
static void test_memory_failures(void **state)
{
    (void)state;
    static const unsigned char images[] = { 0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2, 1, 2, 3, 4 };
    static const unsigned char labels[] = { 0, 0, 8, 1, 0, 0, 0, 2, 5, 6 };
    counting c = { 1 << 30, 0 };
    dot_context_options options = dot_context_defaults();
    options.allocator.allocate = counting_allocate;
    options.allocator.release = counting_release;
    options.allocator.user = &c;
    options.threads = 1;
    make_file("images", images, sizeof images);
    make_file("labels", labels, sizeof labels);
    double value = 2;
    dot_safetensors_item one = item("a", DOT_F64, 0, 0, 0, 0, &value);
    assert_true(dot_safetensors_write(ctx, in_folder("memory"), &one, 1, NULL));
    for (int what = 0; what < 3; ++what) {
        int64_t failed = 0;
        for (bool good = false; !good; ++failed) {
            c.left = 1 << 30;
            new_context(&options);
            c.left = failed;
            if (what == 0) good = dot_safetensors_open(ctx, in_folder("memory")) != NULL;
            if (what == 1) good = dot_safetensors_write(ctx, in_folder("memory"), &one, 1, NULL);
            if (what == 2) good = dot_dataset_idx(ctx, in_folder("images"), in_folder("labels"), NULL) != NULL;
            if (!good) assert_int_equal(dot_error_status(ctx), DOT_ERROR_MEMORY);
            assert_true(failed < 100);
        }
        assert_true(failed > 1);
    }
    new_context(NULL);
    assert_int_equal(c.held, 0);
}

/* ---- datasets ---- */

static void test_idx_errors(void **state)
{
    (void)state;
#define DIMS(n, h, w) "\0\0\0" n "\0\0\0" h "\0\0\0" w
    static const struct { const char *bytes; size_t size; dot_status status; const char *says; } wrong[] = {
        { "", 0, DOT_ERROR_FORMAT, "0 bytes, expected at least 16" },
        { "\0\0", 2, DOT_ERROR_FORMAT, "2 bytes, expected at least 16" },
        { "\0\0\x08\x03\0\0\0\1\0\0\0\1\0\0\0", 15, DOT_ERROR_FORMAT, "15 bytes, expected at least 16" },
        { "\0\0\x08\x02" DIMS("\1", "\1", "\1") "x", 17, DOT_ERROR_FORMAT, "magic number 0x00000802, expected 0x00000803 (unsigned bytes, 3 dimensions)" },
        { "\0\0\x0d\x03" DIMS("\1", "\1", "\1") "xxxx", 20, DOT_ERROR_FORMAT, "magic number 0x00000d03" },
        { "\0\1\x08\x03" DIMS("\1", "\1", "\1") "x", 17, DOT_ERROR_FORMAT, "magic number 0x00010803" },
        { "\x1f\x8b\x08\x08" DIMS("\1", "\1", "\1") "x", 17, DOT_ERROR_FORMAT, "gunzip" },
        { "\x1f\x8b\x08\x08", 4, DOT_ERROR_FORMAT, "gunzip" },
        { "\0\0\x08\x03" DIMS("\2", "\1", "\1") "x", 17, DOT_ERROR_FORMAT, "2 records of 1 x 1 bytes announced, but 1 bytes follow" },
        { "\0\0\x08\x03" DIMS("\1", "\1", "\1") "xx", 18, DOT_ERROR_FORMAT, "1 records of 1 x 1 bytes announced, but 2 bytes follow" },
        { "\0\0\x08\x03\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff" "x", 17, DOT_ERROR_FORMAT, "4294967295 records of 4294967295 x 4294967295" },
        { "\0\0\x08\x03\x80\0\0\0\x80\0\0\0\0\0\0\4", 16, DOT_ERROR_FORMAT, "announced, but 0 bytes follow" },   /* 2^64 wraps to 0 */
        { "\0\0\x08\x03" DIMS("\0", "\1", "\1"), 16, DOT_ERROR_FORMAT, "empty" },
        { "\0\0\x08\x03" DIMS("\2", "\0", "\1"), 16, DOT_ERROR_FORMAT, "empty" },
    };
    for (int i = 0; i < COUNT(wrong); ++i) {
        assert_null(dot_dataset_idx(ctx, make_file("wrong", wrong[i].bytes, wrong[i].size), NULL, NULL));
        assert_error(wrong[i].status, "dot_dataset_idx", wrong[i].says);
    }
    const char *images = make_file("images", "\0\0\x08\x03" DIMS("\2", "\1", "\2") "abcd", 20);
    assert_null(dot_dataset_idx(ctx, images, make_file("labels", "\0\0\x08\x01\0\0\0\3abc", 11), NULL));
    assert_error(DOT_ERROR_FORMAT, "dot_dataset_idx", "3 labels for 2 images");
    assert_null(dot_dataset_idx(ctx, images, make_file("labels", "\0\0\x08\x01\0\0\0\2abc", 11), NULL));
    assert_error(DOT_ERROR_FORMAT, "dot_dataset_idx", "2 records of 1 x 1 bytes announced, but 3 bytes follow");
    assert_null(dot_dataset_idx(ctx, images, images, NULL));
    assert_error(DOT_ERROR_FORMAT, "dot_dataset_idx", "expected 0x00000801 (unsigned bytes, 1 dimension)");
    assert_null(dot_dataset_idx(ctx, in_folder("absent"), NULL, NULL));
    assert_error(DOT_ERROR_FILE, "dot_dataset_idx", "/absent: cannot open it");
    assert_null(dot_dataset_idx(ctx, images, in_folder("absent"), NULL));
    assert_error(DOT_ERROR_FILE, "dot_dataset_idx", "/absent: cannot open it");
    assert_null(dot_dataset_idx(ctx, folder, NULL, NULL));
    assert_error(DOT_ERROR_FILE, "dot_dataset_idx", "not a regular file");
    assert_null(dot_dataset_idx(ctx, NULL, NULL, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_idx", "NULL");
    assert_null(dot_dataset_idx(NULL, images, NULL, NULL));
    assert_ok();
}

static void test_idx_small(void **state)
{
    (void)state;
    const char *images = make_file("images", "\0\0\x08\x03" DIMS("\3", "\1", "\2") "\0\1\2\3\4\377", 22);
    const char *labels = make_file("labels", "\0\0\x08\x01\0\0\0\3\7\0\377", 11);
    dot_dataset_options options = dot_dataset_defaults();
    assert_true(options.shuffle && options.scale == 1.0 / 255 && options.first == 0 && options.count == -1);
    options.shuffle = false;
    dot_dataset *all = dot_dataset_idx(ctx, images, labels, &options), *bare = dot_dataset_idx(ctx, images, NULL, &options);
    options.first = 1;
    options.count = 1;
    dot_dataset *part = dot_dataset_idx(ctx, images, labels, &options);
    assert_ok();
    assert_int_equal(dot_dataset_count(all), 3);
    assert_memory_equal(dot_dataset_record(all, 2), "\4\377", 2);
    assert_int_equal(dot_dataset_label(all, 0), 7);
    assert_int_equal(dot_dataset_label(all, 2), 255);
    assert_int_equal(dot_dataset_label(bare, 0), -1);
    assert_int_equal(dot_dataset_count(part), 1);
    assert_memory_equal(dot_dataset_record(part, 0), "\2\3", 2);
    assert_int_equal(dot_dataset_label(part, 0), 0);
    assert_ok();
    assert_null(dot_dataset_record(part, 1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_record", "record 1, but there are 1");
    assert_int_equal(dot_dataset_label(part, -1), -1);
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_label", "record -1");

    dot_step_begin(ctx);
    dot_tensor *x = dot_batch(all, 3, 0), *y = dot_batch_labels(all, 3, 0);
    assert_ok();
    assert_int_equal(dot_tensor_rank(x), 4);
    static const int64_t shape[] = { 3, 1, 2, 1 };
    for (int i = 0; i < 4; ++i) assert_int_equal(dot_tensor_dim(x, i), shape[i]);
    assert_int_equal(dot_tensor_dtype(x), DOT_F32);
    static const int bytes[] = { 0, 1, 2, 3, 4, 255 }, classes[] = { 7, 0, 255 };
    for (int i = 0; i < 6; ++i) assert_true(((float *)dot_tensor_data(x, 0))[i] == (float)(bytes[i] * (1.0 / 255)));
    assert_int_equal(dot_tensor_rank(y), 1);
    assert_int_equal(dot_tensor_dtype(y), DOT_I64);
    for (int i = 0; i < 3; ++i) assert_int_equal(((int64_t *)dot_tensor_data(y, 0))[i], classes[i]);
    assert_null(dot_batch_labels(bare, 3, 0));
    assert_error(DOT_ERROR_STATE, "dot_batch_labels", "no labels");
}

static dot_dataset *counting_records(int64_t count, const dot_dataset_options *options)
{
    static uint8_t records[256], labels[256];
    for (int i = 0; i < 256; ++i) {
        records[i] = (uint8_t)i;
        labels[i] = (uint8_t)(255 - i);
    }
    return dot_dataset_memory(ctx, records, labels, count, 0, NULL, options);
}

/* The records of a batch in one lane, which the bytes name; and that the labels are theirs. */
static int batch_records(dot_dataset *dataset, int64_t batch, int64_t step, int lane, int *records)
{
    double values[256], labels[256];
    dot_tensor *x = dot_batch(dataset, batch, step), *y = dot_batch_labels(dataset, batch, step);
    assert_ok();
    int64_t size = dot_tensor_dim(x, 0);
    assert_int_equal(dot_tensor_dim(y, 0), size);
    assert_true(dot_tensor_get(x, lane, values, size) && dot_tensor_get(y, lane, labels, size));
    for (int i = 0; i < size; ++i) {
        records[i] = (int)lround(values[i] * 255);
        assert_int_equal((int)labels[i], 255 - records[i]);
    }
    return (int)size;
}

/* All records of an epoch, in its order. */
static void epoch_records(dot_dataset *dataset, int64_t batch, int64_t epoch, int lane, int *records)
{
    int at = 0;
    for (int64_t i = 0; i < dot_batches(dataset, batch); ++i) {
        dot_step_begin(ctx);
        at += batch_records(dataset, batch, epoch * dot_batches(dataset, batch) + i, lane, records + at);
    }
    assert_int_equal(at, dot_dataset_count(dataset));
}

static void test_batches(void **state)
{
    (void)state;
    int records[256];
    dot_dataset_options options = dot_dataset_defaults();
    options.shuffle = false;
    dot_dataset *ten = counting_records(10, &options);
    assert_int_equal(dot_batches(ten, 4), 3);
    assert_int_equal(dot_batches(ten, 5), 2);
    assert_int_equal(dot_batches(ten, 10), 1);
    assert_int_equal(dot_batches(ten, 11), 1);
    assert_int_equal(dot_batches(ten, INT64_MAX), 1);
    assert_int_equal(dot_batches(ten, 1), 10);
    dot_step_begin(ctx);
    static const int64_t begins[] = { 0, 4, 8, 0, 4, 8 };
    static const int sizes[] = { 4, 4, 2, 4, 4, 2 };
    for (int step = 0; step < 6; ++step) {
        assert_int_equal(batch_records(ten, 4, step, 0, records), sizes[step]);
        for (int i = 0; i < sizes[step]; ++i) assert_int_equal(records[i], begins[step] + i);
    }
    assert_int_equal(batch_records(ten, INT64_MAX, INT64_MAX, 0, records), 10);
    assert_int_equal(batch_records(ten, 4, INT64_MAX - 1, 0, records), INT64_MAX % 3 == 0 ? 2 : 4);

    assert_int_equal(dot_batches(ten, 0), 0);
    assert_error(DOT_ERROR_ARGUMENT, "dot_batches", "batch 0, expected at least 1");
    assert_null(dot_batch(ten, -1, 0));
    assert_error(DOT_ERROR_ARGUMENT, "dot_batch", "batch -1, expected at least 1");
    assert_null(dot_batch(ten, 4, -1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_batch", "step -1, expected at least 0");
    assert_null(dot_batch_labels(ten, 0, 0));
    assert_error(DOT_ERROR_ARGUMENT, "dot_batch_labels", "batch 0");
    assert_null(dot_batch_labels(ten, 4, -1));
    assert_error(DOT_ERROR_ARGUMENT, "dot_batch_labels", "step -1");

    assert_null(dot_batch(NULL, 4, 0));
    assert_null(dot_batch_labels(NULL, 4, 0));
    assert_int_equal(dot_batches(NULL, 4), 0);
    assert_int_equal(dot_dataset_count(NULL), 0);
    assert_null(dot_dataset_record(NULL, 0));
    assert_int_equal(dot_dataset_label(NULL, 0), -1);
    assert_ok();

    assert_null(dot_batch(ten, 4, -1));                 /* while an error stands, nothing computes */
    assert_null(dot_batch(ten, 4, 0));
    assert_error(DOT_ERROR_ARGUMENT, "dot_batch", "step -1");
}

static void assert_permutation(const int *records, int first, int count)
{
    int seen[256] = { 0 };
    for (int i = 0; i < count; ++i) {
        assert_in_range(records[i], first, first + count - 1);
        assert_int_equal(seen[records[i]]++, 0);
    }
}

static void test_shuffle(void **state)
{
    (void)state;
    int epochs[4][256], again[256], part[256], other[256];
    dot_dataset *data = counting_records(250, NULL);
    for (int e = 0; e < 4; ++e) {
        epoch_records(data, 32, e, 0, epochs[e]);
        assert_permutation(epochs[e], 0, 250);
        for (int d = 0; d < e; ++d) assert_memory_not_equal(epochs[d], epochs[e], 250 * sizeof(int));
    }
    epoch_records(data, 32, 1, 0, again);               /* back in time: a pure function of the step */
    assert_memory_equal(again, epochs[1], 250 * sizeof(int));
    epoch_records(data, 7, 2, 0, again);                /* the batch cuts the epoch, and does not change its order */
    assert_memory_equal(again, epochs[2], 250 * sizeof(int));
    epoch_records(counting_records(250, NULL), 32, 3, 0, again);
    assert_memory_equal(again, epochs[3], 250 * sizeof(int));

    dot_dataset_options options = dot_dataset_defaults();
    options.first = 100;
    options.count = 50;
    epoch_records(counting_records(250, &options), 8, 0, 0, part);
    assert_permutation(part, 100, 50);

    dot_context_options seeded = dot_context_defaults();
    seeded.seed = 1;
    new_context(&seeded);
    epoch_records(counting_records(250, NULL), 32, 0, 0, other);
    assert_permutation(other, 0, 250);
    assert_memory_not_equal(other, epochs[0], 250 * sizeof(int));
    seeded.seed = 0;
    seeded.threads = 3;
    new_context(&seeded);
    epoch_records(counting_records(250, NULL), 32, 0, 0, other);
    assert_memory_equal(other, epochs[0], 250 * sizeof(int));
}

/* Every order of 4 records about equally often: chi-squared with 23 degrees of freedom, 99.9 % quantile 49.73. */
static void test_shuffle_is_uniform(void **state)
{
    (void)state;
    enum { EPOCHS = 4800 };
    int counts[256] = { 0 }, used = 0;
    dot_dataset *data = counting_records(4, NULL);
    for (int64_t epoch = 0; epoch < EPOCHS; ++epoch) {
        int r[256];
        epoch_records(data, 4, epoch, 0, r);
        ++counts[r[0] << 6 | r[1] << 4 | r[2] << 2 | r[3]];
    }
    double chi2 = 0;
    for (int i = 0; i < 256; ++i) {
        if (counts[i] == 0) continue;
        ++used;
        chi2 += (counts[i] - EPOCHS / 24.0) * (counts[i] - EPOCHS / 24.0) / (EPOCHS / 24.0);
    }
    assert_int_equal(used, 24);
    assert_true(chi2 < 49.73);
}

/* Lane k sees what a context of one lane with its seed sees; equal seeds share one batch. */
static void test_lanes(void **state)
{
    (void)state;
    static const uint64_t seeds[3] = { 5, 9, 5 };
    int laned[3][256], solo[256];
    dot_context_options options = dot_context_defaults();
    options.lanes = 3;
    options.lane_seeds = seeds;
    new_context(&options);
    dot_dataset *data = counting_records(200, NULL);
    for (int lane = 0; lane < 3; ++lane) epoch_records(data, 64, 2, lane, laned[lane]);
    assert_memory_equal(laned[0], laned[2], 200 * sizeof(int));
    assert_memory_not_equal(laned[0], laned[1], 200 * sizeof(int));
    dot_step_begin(ctx);
    dot_tensor *x = dot_batch(data, 64, 0);
    assert_true(dot_tensor_data(x, 0) != dot_tensor_data(x, 1));
    assert_true(dot_lane_stop(ctx, 0));                 /* the others go on */
    epoch_records(data, 64, 3, 1, solo);
    assert_permutation(solo, 0, 200);
    epoch_records(data, 64, 2, 1, solo);
    assert_memory_equal(solo, laned[1], 200 * sizeof(int));

    for (int lane = 0; lane < 2; ++lane) {
        dot_context_options one = dot_context_defaults();
        one.seed = seeds[lane];
        new_context(&one);
        epoch_records(counting_records(200, NULL), 64, 2, 0, solo);
        assert_memory_equal(solo, laned[lane], 200 * sizeof(int));
    }

    options.lane_seeds = NULL;
    options.seed = 5;
    new_context(&options);
    data = counting_records(200, NULL);
    epoch_records(data, 64, 2, 2, solo);
    assert_memory_equal(solo, laned[0], 200 * sizeof(int));
    dot_step_begin(ctx);
    x = dot_batch(data, 64, 0);
    assert_true(dot_tensor_data(x, 0) == dot_tensor_data(x, 2));
}

static void test_batch_f64_and_shape(void **state)
{
    (void)state;
    static const int64_t shape[] = { 2, 1, 3 };
    uint8_t records[5 * 6];
    for (int i = 0; i < 30; ++i) records[i] = (uint8_t)(i * 8);
    dot_context_options f64 = dot_context_defaults();
    f64.dtype = DOT_F64;
    new_context(&f64);
    dot_dataset_options options = dot_dataset_defaults();
    options.shuffle = false;
    options.scale = -0.3;
    options.first = 2;
    dot_dataset *data = dot_dataset_memory(ctx, records, NULL, 5, 3, shape, &options);
    assert_int_equal(dot_dataset_count(data), 3);
    assert_ptr_equal(dot_dataset_record(data, 1), records + 18);
    dot_step_begin(ctx);
    dot_tensor *x = dot_batch(data, 2, 1);
    assert_ok();
    assert_int_equal(dot_tensor_dtype(x), DOT_F64);
    assert_int_equal(dot_tensor_rank(x), 4);
    assert_int_equal(dot_tensor_dim(x, 0), 1);
    for (int i = 0; i < 3; ++i) assert_int_equal(dot_tensor_dim(x, i + 1), shape[i]);
    for (int i = 0; i < 6; ++i) assert_true(((double *)dot_tensor_data(x, 0))[i] == records[24 + i] * -0.3);
}

static void test_dataset_arguments(void **state)
{
    (void)state;
    static const uint8_t records[24] = { 0 };
    static const int64_t zero[] = { 2, 0 }, huge[] = { (int64_t)1 << 40, (int64_t)1 << 40 };
    static const struct { int64_t first, count; bool good; } parts[] = {
        { 0, -1, true }, { 23, -1, true }, { 23, 1, true }, { 0, 24, true }, { 24, -1, false }, { -1, -1, false }, { 0, 25, false },
        { 0, 0, false }, { 0, -2, false }, { 23, 2, false }, { 1, INT64_MAX, false }, { INT64_MAX, INT64_MAX, false } };
    for (int i = 0; i < COUNT(parts); ++i) {
        dot_dataset_options options = dot_dataset_defaults();
        options.first = parts[i].first;
        options.count = parts[i].count;
        dot_dataset *data = dot_dataset_memory(ctx, records, NULL, 24, 0, NULL, &options);
        if (parts[i].good) assert_int_equal(dot_dataset_count(data), parts[i].count < 0 ? 24 - parts[i].first : parts[i].count);
        else assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "there are 24 records");
        assert_ok();
    }
    static const double scales[] = { NAN, INFINITY, -INFINITY, 1e300 };
    for (int i = 0; i < COUNT(scales); ++i) {
        dot_dataset_options options = dot_dataset_defaults();
        options.scale = scales[i];
        assert_null(dot_dataset_memory(ctx, records, NULL, 24, 0, NULL, &options));
        assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "scale");
    }
    dot_dataset_options blank;
    memset(&blank, 0, sizeof blank);
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, 0, NULL, &blank));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "dot_dataset_defaults");

    assert_null(dot_dataset_memory(ctx, NULL, NULL, 24, 0, NULL, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "records NULL");
    assert_null(dot_dataset_memory(ctx, records, NULL, 0, 0, NULL, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "count 0");
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, -1, NULL, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "rank -1");
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, DOT_MAX_RANK, zero, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "rank 8");
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, 1, NULL, NULL));
    assert_error(DOT_ERROR_ARGUMENT, "dot_dataset_memory", "shape NULL");
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, 2, zero, NULL));
    assert_error(DOT_ERROR_SHAPE, "dot_dataset_memory", "24 records of shape [2,0]");
    assert_null(dot_dataset_memory(ctx, records, NULL, 24, 2, huge, NULL));
    assert_error(DOT_ERROR_SHAPE, "dot_dataset_memory", "fit the memory");
    assert_null(dot_dataset_memory(ctx, records, NULL, INT64_MAX / 4, 0, NULL, NULL));  /* the permutation alone is 16 EiB */
    assert_error(DOT_ERROR_MEMORY, "dot_dataset_memory", "");
    assert_null(dot_dataset_memory(NULL, records, NULL, 24, 0, NULL, NULL));
    assert_ok();
}

/* Batches ask the allocator for nothing, once a step has run. */
static void test_batches_allocate_nothing(void **state)
{
    (void)state;
    int records[256];
    dot_dataset *data = counting_records(250, NULL);
    epoch_records(data, 32, 0, 0, records);
    int64_t before = dot_memory(ctx).allocations;
    for (int epoch = 1; epoch < 5; ++epoch) epoch_records(data, 32, epoch, 0, records);
    assert_int_equal(dot_memory(ctx).allocations, before);
}

/* Facts about Fashion-MNIST: its first labels (the authors' README), and the loss of predicting 0 on the test set. */
static void test_fashion_mnist(void **state)
{
    (void)state;
    static const int labels[] = { 9, 2, 1, 1, 6, 1, 4, 6, 5, 7 };
    dot_dataset *data = dot_dataset_idx(ctx, "data/t10k-images-idx3-ubyte", "data/t10k-labels-idx1-ubyte", NULL);
    assert_ok();
    assert_int_equal(dot_dataset_count(data), 10000);
    for (int i = 0; i < COUNT(labels); ++i) assert_int_equal(dot_dataset_label(data, i), labels[i]);
    int classes[10] = { 0 };
    for (int i = 0; i < 10000; ++i) ++classes[dot_dataset_label(data, i)];
    for (int i = 0; i < 10; ++i) assert_int_equal(classes[i], 1000);
    double sum = 0;
    for (int64_t step = 0; step < dot_batches(data, 999); ++step) {
        dot_eval_begin(ctx);
        dot_tensor *x = dot_batch(data, 999, step);
        assert_ok();
        const float *values = (const float *)dot_tensor_data(x, 0);
        for (int64_t i = 0; i < dot_tensor_size(x); ++i) sum += (double)values[i] * (double)values[i];
    }
    assert_true(fabs(sum / (10000.0 * 784) - 0.20650) < 5e-6);
}

/* ---- */

static int make_folder(void **state)
{
    (void)state;
    if (mkdir("build", 0777) != 0 && errno != EEXIST) return 1;
    snprintf(folder, sizeof folder, "build/test_files.%ld", (long)getpid());
    return mkdir(folder, 0700);
}

static int remove_folder(void **state)
{
    (void)state;
    DIR *list = opendir(folder);
    if (!list) return 1;
    for (struct dirent *entry; (entry = readdir(list)) != NULL;)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) remove(in_folder(entry->d_name));
    closedir(list);
    return remove(folder);
}

int main(void)
{
#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)
    const struct CMUnitTest tests[] = {
        TEST(test_reference_vectors), TEST(test_reference_contents), TEST(test_attacks), TEST(test_every_byte),
        TEST(test_header_with_zero_byte), TEST(test_header_length), TEST(test_json_variants), TEST(test_dtypes), TEST(test_golden),
        TEST(test_read_arguments), TEST(test_open_errors), TEST(test_many_tensors), TEST(test_destroy_closes),
        TEST(test_write_golden), TEST(test_write_small), TEST(test_write_large), TEST(test_write_arguments),
        TEST(test_write_failures), TEST(test_memory_failures), TEST(test_idx_errors), TEST(test_idx_small), TEST(test_batches),
        TEST(test_shuffle), TEST(test_shuffle_is_uniform), TEST(test_lanes), TEST(test_batch_f64_and_shape),
        TEST(test_dataset_arguments), TEST(test_batches_allocate_nothing), TEST(test_fashion_mnist),
    };
    return cmocka_run_group_tests(tests, make_folder, remove_folder);
}
