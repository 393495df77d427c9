/*
 * json.h - writes strict JSON (RFC 8259) and reads it back.
 *
 * Numbers are written with as few digits as bring back the same double, so
 * that reading and writing again changes nothing. JSON has no NaN and no
 * infinity: they are written as null, and null is read as NaN.
 *
 * Nothing here prints or exits. The decimal point is that of the C locale.
 */
#ifndef JSON_H
#define JSON_H

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- writing ------------------------------------------------------------ */

/* A text that grows. Begin with `json_writer w = {0}`, end with json_free. */
typedef struct {
    char *text;         /* ends in zero; NULL before the first item */
    size_t length, capacity;
    bool comma;         /* the next item has one before it */
    bool line;          /* the next item begins a line */
    bool failed;        /* memory ran short, and the text is incomplete */
} json_writer;

static inline void json_free(json_writer *w)
{
    free(w->text);
    memset(w, 0, sizeof *w);
}

static inline void json_append(json_writer *w, const char *text, size_t length)
{
    if (w->length + length + 1 > w->capacity) {
        size_t capacity = 2 * (w->length + length) + 256;
        char *grown = (char *)realloc(w->text, capacity);
        if (!grown) {
            w->failed = true;
            return;
        }
        w->text = grown;
        w->capacity = capacity;
    }
    memcpy(w->text + w->length, text, length);
    w->length += length;
    w->text[w->length] = 0;
}

static inline void json_append_text(json_writer *w, const char *text) { json_append(w, text, strlen(text)); }

/* Every value and every key begins here. */
static inline void json_item(json_writer *w)
{
    if (w->comma) json_append_text(w, w->line ? "," : ", ");
    if (w->line) json_append_text(w, "\n");
    w->comma = true;
    w->line = false;
}

/* The next item begins a new line. */
static inline void json_line(json_writer *w) { w->line = true; }

/* '{' or '[', and later '}' or ']'. */
static inline void json_open(json_writer *w, char bracket)
{
    json_item(w);
    json_append(w, &bracket, 1);
    w->comma = false;
}

static inline void json_close(json_writer *w, char bracket)
{
    if (w->line) json_append_text(w, "\n");
    json_append(w, &bracket, 1);
    w->comma = true;
    w->line = false;
}

static inline void json_string(json_writer *w, const char *text)
{
    json_item(w);
    json_append_text(w, "\"");
    for (const char *s = text; *s; ++s) {
        char code[8];
        if (*s == '"' || *s == '\\') snprintf(code, sizeof code, "\\%c", *s);
        else if ((unsigned char)*s < 0x20) snprintf(code, sizeof code, "\\u%04x", (unsigned)*s);
        else snprintf(code, sizeof code, "%c", *s);
        json_append_text(w, code);
    }
    json_append_text(w, "\"");
}

static inline void json_number(json_writer *w, double value)
{
    char text[40] = "null";
    json_item(w);
    for (int digits = 15; isfinite(value) && digits <= 17; ++digits) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    json_append_text(w, text);
}

static inline void json_bool(json_writer *w, bool value)
{
    json_item(w);
    json_append_text(w, value ? "true" : "false");
}

static inline void json_key(json_writer *w, const char *key)
{
    json_string(w, key);
    json_append_text(w, ": ");
    w->comma = false;
}

/* Members of an object. */
static inline void json_put_string(json_writer *w, const char *key, const char *value)
{
    json_key(w, key);
    json_string(w, value);
}

static inline void json_put_number(json_writer *w, const char *key, double value)
{
    json_key(w, key);
    json_number(w, value);
}

static inline void json_put_bool(json_writer *w, const char *key, bool value)
{
    json_key(w, key);
    json_bool(w, value);
}

/* values[0], values[stride], ... */
static inline void json_put_numbers(json_writer *w, const char *key, const double *values, int count, int stride)
{
    json_key(w, key);
    json_open(w, '[');
    for (int i = 0; i < count; ++i) json_number(w, values[i * stride]);
    json_close(w, ']');
}

/* ---- reading ------------------------------------------------------------ */

typedef enum { JSON_NULL, JSON_BOOL, JSON_NUMBER, JSON_STRING, JSON_ARRAY, JSON_OBJECT } json_type;

/* A value. Nodes are numbered in the order of the text; the root is node 0. */
typedef struct {
    json_type type;
    int next;           /* the next item of the same array or object, -1: none */
    int child;          /* the first item, -1: none */
    int count;          /* items */
    double number;      /* NaN for null, 0 or 1 for a bool */
    const char *text;   /* of a string, without its escapes */
    const char *key;    /* in an object */
} json_node;

typedef struct {
    json_node *nodes;
    int count, capacity;
    char *strings;      /* all texts and keys */
    const char *error;  /* what is wrong, NULL: nothing */
    const char *at, *end;
    size_t used;
} json_document;

#define JSON_MAX_DEPTH 32

static inline bool json_fail(json_document *d, const char *error)
{
    if (!d->error) d->error = error;
    return false;
}

static inline void json_skip_space(json_document *d)
{
    while (d->at < d->end && strchr(" \t\r\n", *d->at) && *d->at) ++d->at;
}

static inline bool json_take(json_document *d, const char *word)
{
    size_t length = strlen(word);
    if ((size_t)(d->end - d->at) < length || memcmp(d->at, word, length) != 0) return false;
    d->at += length;
    return true;
}

static inline bool json_hex4(json_document *d, unsigned *code)
{
    *code = 0;
    for (int i = 0; i < 4; ++i, ++d->at) {
        static const char digits[] = "0123456789abcdef0123456789ABCDEF";
        const char *found = d->at < d->end && *d->at ? strchr(digits, *d->at) : NULL;
        if (!found) return json_fail(d, "a bad \\u escape");
        *code = *code * 16 + (unsigned)((found - digits) % 16);
    }
    return true;
}

/* After "\u": one code point as UTF-8. */
static inline bool json_unicode(json_document *d, char **out)
{
    unsigned code, low;
    if (!json_hex4(d, &code)) return false;
    if (code >= 0xd800 && code < 0xdc00) {
        if (!json_take(d, "\\u") || !json_hex4(d, &low) || low < 0xdc00 || low > 0xdfff)
            return json_fail(d, "half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
    } else if (code == 0 || (code >= 0xdc00 && code < 0xe000)) {
        return json_fail(d, "a bad \\u escape");
    }
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned lead[] = { 0, 0xc0, 0xe0, 0xf0 };
    *(*out)++ = (char)(lead[more] | code >> (6 * more));
    while (more-- > 0) *(*out)++ = (char)(0x80 | (code >> (6 * more) & 0x3f));
    return true;
}

/* A string is never longer than its source, so that the buffer of the source's size holds all of them. */
static inline const char *json_read_string(json_document *d)
{
    char *start = d->strings + d->used, *out = start;
    if (!json_take(d, "\"")) {
        json_fail(d, "a string was expected");
        return NULL;
    }
    while (d->at < d->end && *d->at != '"') {
        static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
        char c = *d->at++;
        if ((unsigned char)c < 0x20) return json_fail(d, "a control character in a string"), NULL;
        if (c != '\\') {
            *out++ = c;
            continue;
        }
        c = d->at < d->end ? *d->at++ : 0;
        const char *escape = c ? strchr(from, c) : NULL;
        if (escape) *out++ = to[escape - from];
        else if (c != 'u') return json_fail(d, "a bad escape"), NULL;
        else if (!json_unicode(d, &out)) return NULL;
    }
    if (!json_take(d, "\"")) return json_fail(d, "a string without an end"), NULL;
    *out++ = 0;
    d->used = (size_t)(out - d->strings);
    return start;
}

static inline bool json_digits(json_document *d)
{
    const char *start = d->at;
    while (d->at < d->end && *d->at >= '0' && *d->at <= '9') ++d->at;
    return d->at > start;
}

/* -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?; the text ends in zero, so strtod stops in time. */
static inline bool json_read_number(json_document *d, double *value)
{
    const char *start = d->at;
    json_take(d, "-");
    bool good = json_take(d, "0") || json_digits(d);
    if (good && json_take(d, ".")) good = json_digits(d);
    if (good && (json_take(d, "e") || json_take(d, "E"))) {
        if (!json_take(d, "+")) json_take(d, "-");
        good = json_digits(d);
    }
    *value = good ? strtod(start, NULL) : 0;
    return good || json_fail(d, "a value was expected");
}

static inline int json_new_node(json_document *d)
{
    if (d->count == d->capacity) {
        int capacity = 2 * d->capacity + 64;
        json_node *grown = (json_node *)realloc(d->nodes, (size_t)capacity * sizeof *grown);
        if (!grown) return json_fail(d, "out of memory"), -1;
        d->nodes = grown;
        d->capacity = capacity;
    }
    memset(&d->nodes[d->count], 0, sizeof *d->nodes);
    d->nodes[d->count].next = d->nodes[d->count].child = -1;
    return d->count++;
}

static inline int json_read_value(json_document *d, int depth);

/* The items of node `parent`, up to the bracket that closes it. */
static inline bool json_read_items(json_document *d, int parent, bool object, int depth)
{
    const char *close = object ? "}" : "]";
    json_skip_space(d);
    if (json_take(d, close)) return true;
    for (int last = -1;;) {
        const char *key = NULL;
        json_skip_space(d);
        if (object) {
            if (!(key = json_read_string(d))) return false;
            json_skip_space(d);
            if (!json_take(d, ":")) return json_fail(d, "':' was expected");
        }
        int item = json_read_value(d, depth + 1);
        if (item < 0) return false;
        d->nodes[item].key = key;
        if (last < 0) d->nodes[parent].child = item;
        else d->nodes[last].next = item;
        last = item;
        ++d->nodes[parent].count;
        json_skip_space(d);
        if (json_take(d, close)) return true;
        if (!json_take(d, ",")) return json_fail(d, "',' was expected");
    }
}

/* Returns the number of the node, or -1. */
static inline int json_read_value(json_document *d, int depth)
{
    static const struct { const char *word; json_type type; double number; } words[] = {
        { "null", JSON_NULL, NAN }, { "true", JSON_BOOL, 1 }, { "false", JSON_BOOL, 0 } };
    json_skip_space(d);
    int index = depth < JSON_MAX_DEPTH ? json_new_node(d) : (json_fail(d, "nested too deeply"), -1);
    if (index < 0) return -1;
    for (size_t i = 0; i < sizeof words / sizeof *words; ++i) {
        if (!json_take(d, words[i].word)) continue;
        d->nodes[index].type = words[i].type;
        d->nodes[index].number = words[i].number;
        return index;
    }
    const char *text = NULL;
    double number = 0;
    json_type type = JSON_NUMBER;
    bool good;
    if (d->at < d->end && *d->at == '"') {
        type = JSON_STRING;
        good = (text = json_read_string(d)) != NULL;
    } else if (json_take(d, "{")) {
        type = JSON_OBJECT;
        good = json_read_items(d, index, true, depth);
    } else if (json_take(d, "[")) {
        type = JSON_ARRAY;
        good = json_read_items(d, index, false, depth);
    } else {
        good = json_read_number(d, &number);
    }
    d->nodes[index].type = type;    /* by number: the array may have moved */
    d->nodes[index].text = text;
    d->nodes[index].number = number;
    return good ? index : -1;
}

static inline void json_release(json_document *d)
{
    free(d->nodes);
    free(d->strings);
    memset(d, 0, sizeof *d);
}

/* Reads one value, which must be the whole text; text[length] must be zero. On failure d->error says why; call
   json_release in any case. */
static inline bool json_parse(json_document *d, const char *text, size_t length)
{
    memset(d, 0, sizeof *d);
    d->at = text;
    d->end = text + length;
    if (!(d->strings = (char *)malloc(length + 1))) return json_fail(d, "out of memory");
    if (json_read_value(d, 0) < 0) return false;
    json_skip_space(d);
    return d->at == d->end || json_fail(d, "text after the end");
}

/* The member `key` of an object; NULL if there is none. */
static inline const json_node *json_find(const json_document *d, const json_node *object, const char *key)
{
    if (!object || object->type != JSON_OBJECT) return NULL;
    for (int i = object->child; i >= 0; i = d->nodes[i].next)
        if (strcmp(d->nodes[i].key, key) == 0) return &d->nodes[i];
    return NULL;
}

/* A member that is a number (null: NaN), or a string; `otherwise` where it is not there. */
static inline double json_get_number(const json_document *d, const json_node *object, const char *key, double otherwise)
{
    const json_node *node = json_find(d, object, key);
    return node && (node->type == JSON_NUMBER || node->type == JSON_NULL) ? node->number : otherwise;
}

static inline const char *json_get_string(const json_document *d, const json_node *object, const char *key,
                                          const char *otherwise)
{
    const json_node *node = json_find(d, object, key);
    return node && node->type == JSON_STRING ? node->text : otherwise;
}

/* A member that is an array of exactly `count` numbers (null: NaN): values[0], values[stride], ... */
static inline bool json_get_numbers(const json_document *d, const json_node *object, const char *key, double *values,
                                    int count, int stride)
{
    const json_node *node = json_find(d, object, key);
    if (!node || node->type != JSON_ARRAY || node->count != count) return false;
    for (int i = node->child, k = 0; i >= 0; i = d->nodes[i].next, ++k) {
        if (d->nodes[i].type != JSON_NUMBER && d->nodes[i].type != JSON_NULL) return false;
        values[k * stride] = d->nodes[i].number;
    }
    return true;
}

#endif
