/*
 * cli.h - what the examples' command lines share: a table of options, errors,
 * waiting for workers, durations, folders. Define CLI_PROGRAM, the program's
 * name, before including it.
 */
#ifndef CLI_H
#define CLI_H

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#if defined(__GNUC__)
#define CLI_PRINTF(text, rest) __attribute__((format(printf, text, rest)))
#define CLI_NORETURN __attribute__((noreturn))
#else
#define CLI_PRINTF(text, rest)
#define CLI_NORETURN
#endif

enum { EXIT_RUNTIME = 1, EXIT_USAGE = 2 };

/* ---- errors ------------------------------------------------------------- */

CLI_PRINTF(1, 2) CLI_NORETURN static void usage_error(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    fprintf(stderr, CLI_PROGRAM ": ");
    vfprintf(stderr, format, arguments);
    fprintf(stderr, " (--help lists the options)\n");
    va_end(arguments);
    exit(EXIT_USAGE);
}

static int fail(const char *message)
{
    fprintf(stderr, CLI_PROGRAM ": %s\n", message);
    return EXIT_RUNTIME;
}

/* ---- options ------------------------------------------------------------ */

/* A word of the command line and the field that it sets, by its offset in the program's struct of options: a bool (CLI_ON,
   CLI_OFF), an int64_t (CLI_COUNT), an int, the index of the word chosen (CLI_CHOICE), a const char * (CLI_TEXT). */
typedef enum { CLI_ON, CLI_OFF, CLI_COUNT, CLI_CHOICE, CLI_TEXT } cli_kind;
typedef struct {
    const char *name;
    cli_kind kind;
    size_t offset;
    int64_t low, high;          /* of a CLI_COUNT */
    const char *argument;       /* in --help; of a choice: the words, with bars between them */
    const char *help;
} cli_option;

static int64_t cli_count(const char *name, const char *value, int64_t low, int64_t high)
{
    char *end;
    errno = 0;
    const long long number = isdigit((unsigned char)*value) ? strtoll(value, &end, 10) : -1;
    if (number < 0 || *end || errno || number < low || number > high)
        usage_error("--%s: '%s' is no whole number from %lld to %lld", name, value, (long long)low, (long long)high);
    return number;
}

static int cli_choice(const cli_option *o, const char *value)
{
    const size_t length = strlen(value);
    int index = 0;
    for (const char *word = o->argument;; ++index) {
        const size_t size = strcspn(word, "|");
        if (size == length && memcmp(word, value, size) == 0) return index;
        if (!word[size]) usage_error("--%s: '%s' is none of %s", o->name, value, o->argument);
        word += size + 1;
    }
}

static void cli_set(void *fields, const cli_option *o, const char *value)
{
    void *field = (char *)fields + o->offset;
    switch (o->kind) {
    case CLI_ON: *(bool *)field = true; break;
    case CLI_OFF: *(bool *)field = false; break;
    case CLI_COUNT: *(int64_t *)field = cli_count(o->name, value, o->low, o->high); break;
    case CLI_CHOICE: *(int *)field = cli_choice(o, value); break;
    case CLI_TEXT: *(const char **)field = value; break;
    }
}

/* Reads the words from argv[1] on into `fields`; `only`: that option alone, the others are just checked for being there. */
static void cli_parse(const cli_option *table, int count, void *fields, char **argv, const char *only)
{
    for (int i = 1; argv[i]; ++i) {
        const char *word = strcmp(argv[i], "-h") == 0 ? "--help" : argv[i];
        const size_t length = strncmp(word, "--", 2) == 0 ? strcspn(word + 2, "=") : 0;
        const cli_option *found = NULL;
        for (int k = 0; k < count && length; ++k)
            if (strlen(table[k].name) == length && memcmp(table[k].name, word + 2, length) == 0) found = &table[k];
        if (!found) usage_error("'%s' is no option", word);
        const char *value = word[2 + length] == '=' ? word + 3 + length : NULL;
        if (found->kind <= CLI_OFF && value) usage_error("--%s takes no value", found->name);
        if (found->kind > CLI_OFF && !value && !(value = argv[++i])) usage_error("--%s needs a value", found->name);
        if (!only || strcmp(found->name, only) == 0) cli_set(fields, found, value);
    }
}

static void cli_print_options(const cli_option *table, int count)
{
    printf("\nOptions:\n");
    for (int i = 0; i < count; ++i) {
        char left[64];
        snprintf(left, sizeof left, "--%s %s", table[i].name, table[i].argument ? table[i].argument : "");
        printf("  %-34s ", left);
        for (const char *line = table[i].help;; line += strcspn(line, "\n") + 1) {
            printf("%.*s\n", (int)strcspn(line, "\n"), line);
            if (!strchr(line, '\n')) break;
            printf("%37s", "");
        }
    }
}

/* Splits "a,b,c" and hands each part to `take`. */
static void cli_list(const char *name, const char *text, void *user, void (*take)(const char *name, const char *part, void *user))
{
    char copy[4096];
    if (strlen(text) >= sizeof copy) usage_error("--%s: the list is too long", name);
    snprintf(copy, sizeof copy, "%s", text);
    for (char *part = copy, *comma; part; part = comma) {
        comma = strchr(part, ',');
        if (comma) *comma++ = 0;
        take(name, part, user);
    }
}

/* ---- time --------------------------------------------------------------- */

static double cli_seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* "3 h 05 min", "4 min 10 s", "12 s" */
static const char *cli_duration(double seconds, char *buffer, size_t size)
{
    const long long s = llround(seconds);
    if (s >= 48 * 3600) snprintf(buffer, size, "%lld days %lld h", s / 86400, s % 86400 / 3600);
    else if (s >= 3600) snprintf(buffer, size, "%lld h %02lld min", s / 3600, s % 3600 / 60);
    else if (s >= 60) snprintf(buffer, size, "%lld min %02lld s", s / 60, s % 60);
    else snprintf(buffer, size, "%lld s", s);
    return buffer;
}

/* ---- progress ----------------------------------------------------------- */

/* On a terminal a progress line is drawn over itself, several times a second; elsewhere there is a plain line now and then. */
static bool cli_is_terminal(void)
{
    const char *term = getenv("TERM");
    return isatty(STDERR_FILENO) && term && strcmp(term, "dumb") != 0;
}

static double cli_progress_interval(bool live) { return live ? 0.25 : 15; }

/* Before and after a line: at the right edge it is cut, not wrapped. */
static const char *cli_line_begin(bool live) { return live ? "\r\033[K\033[?7l" : ""; }
static const char *cli_line_end(bool live, bool last) { return live ? last ? "\033[?7h\n" : "\033[?7h" : "\n"; }

/* Waits for the condition, at most a fifth of a second. */
static void cli_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_nsec += 200000000;
    until.tv_sec += until.tv_nsec / 1000000000;
    until.tv_nsec %= 1000000000;
    pthread_cond_timedwait(condition, mutex, &until);
}

/* ---- folders ------------------------------------------------------------ */

/* Makes the folder and those above it. */
static bool cli_make_folder(const char *folder, char *error, size_t size)
{
    char path[1024];
    if (strlen(folder) >= sizeof path - 64) return snprintf(error, size, "the name of the folder is too long"), false;
    snprintf(path, sizeof path, "%s", folder);
    for (char *slash = path + 1;; ++slash) {
        slash += strcspn(slash, "/");
        const char after = *slash;
        *slash = 0;
        if (mkdir(path, 0777) != 0 && errno != EEXIST)
            return snprintf(error, size, "cannot make the folder %.300s: %s", path, strerror(errno)), false;
        *slash = after;
        if (!after) return true;
    }
}

#endif
