/* fuzz.c - feeds mutated files to every reader. Nothing but a C compiler is needed:

     cc -O1 -g -std=c99 -fsanitize=address,undefined -fno-sanitize-recover=all -I. -o build/fuzz tests/fuzz.c -lm -pthread
     build/fuzz --reader npy --runs 10000000 --seed 1

   A run takes a valid file of the reader's seeds, changes it in one to eight places (bits, bytes, words of a dictionary,
   numbers, pieces moved, copied, cut or taken from another seed; lengths and checksums mended half the time, so that the
   change is seen), and reads it whole. Run k of a seed is always the same: `--first k --runs 1` repeats it, and
   `--keep FILE` leaves its bytes. Besides what the sanitizers find, a run fails when a reader refuses without a sentence,
   accepts with one, or asks for more than 64 bytes of memory per byte of the file. Files lie in /dev/shm (or $TMPDIR),
   one for each process. */
#ifndef FUZZ_TEST
#define DOTOPT_IMPLEMENTATION
#endif
#include "dotopt.h"
#include "examples/json.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) ((int)(sizeof (array) / sizeof *(array)))
#define MAX_SIZE 2048           /* bytes of a mutated file */

/* ---- randomness: SplitMix64 ---- */

static uint64_t random_state;

static uint64_t draw(void)
{
    uint64_t z = random_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static size_t below(size_t n) { return n ? (size_t)(draw() % n) : 0; }

/* ---- seeds: valid files ---- */

typedef struct { unsigned char bytes[MAX_SIZE]; size_t size; } blob;

typedef enum { SAFETENSORS, NPY, IDX, JSON, LOG, WANDB, READERS } reader;
static const char *const reader_names[READERS] = { "safetensors", "npy", "idx", "json", "log", "wandb" };

static blob seeds[READERS][8];
static int seed_counts[READERS];

static void add_seed(reader which, const void *bytes, size_t size)
{
    blob *b = &seeds[which][seed_counts[which]++];
    if (size > sizeof b->bytes) abort();
    memcpy(b->bytes, bytes, size);
    b->size = size;
}

static void put_little(unsigned char *to, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; ++i) to[i] = (unsigned char)(value >> 8 * i & 255);
}

static void add_safetensors(const char *header, size_t data)
{
    unsigned char bytes[MAX_SIZE] = { 0 };
    size_t length = strlen(header);
    put_little(bytes, length, 8);
    memcpy(bytes + 8, header, length);
    add_seed(SAFETENSORS, bytes, 8 + length + data);
}

static void add_npy(int version, const char *dictionary, size_t data)
{
    unsigned char bytes[MAX_SIZE];
    size_t head = version == 1 ? 10 : 12, length = strlen(dictionary) + 1;
    memset(bytes, ' ', sizeof bytes);
    length += (64 - (head + length) % 64) % 64;
    memcpy(bytes, "\x93NUMPY", 6);
    bytes[6] = (unsigned char)version;
    bytes[7] = 0;
    put_little(bytes + 8, length, version == 1 ? 2 : 4);
    memcpy(bytes + head, dictionary, strlen(dictionary));
    bytes[head + length - 1] = '\n';
    for (size_t i = 0; i < data; ++i) bytes[head + length + i] = (unsigned char)(i * 37);
    add_seed(NPY, bytes, head + length + data);
}

static uint32_t crc32_of(const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < count; ++i) {
        crc ^= bytes[i];
        for (int k = 0; k < 8; ++k) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

/* Mends the checksums of what looks like the pieces of a .wandb file. */
static void mend_wandb(blob *b)
{
    for (size_t at = 7; at + 7 <= b->size;) {
        size_t length = b->bytes[at + 4] | (size_t)b->bytes[at + 5] << 8;
        if (length > b->size - at - 7) return;
        put_little(b->bytes + at, crc32_of(b->bytes + at + 6, length + 1), 4);
        at += 7 + length;
    }
}

static size_t add_piece(unsigned char *to, int type, const char *record, size_t length)
{
    put_little(to + 4, length, 2);
    to[6] = (unsigned char)type;
    memcpy(to + 7, record, length);
    return 7 + length;
}

static void add_wandb(void)
{
    static const char header[] = "\x08\x01\xaa\x01\x0f\x0a\x0d\x0a\x03" "dot" "\x12\x06" "0.70.0";
    static const char run[] = "\x08\x02\x8a\x01\x09\x0a\x02" "ab" "\x1a\x03" "dot";
    static const char row[] = "\x08\x03\x12\x12\x12\x02\x08\x05\x0a\x0c\x0a\x04" "loss" "\x82\x01\x03" "0.5";
    static const char end[] = "\x08\x04\x92\x01\x02\x10\x07";
    blob b = { ":W&B\xe1\xbe", 7 };
    b.size += add_piece(b.bytes + b.size, 1, header, sizeof header - 1);
    b.size += add_piece(b.bytes + b.size, 1, run, sizeof run - 1);
    b.size += add_piece(b.bytes + b.size, 2, row, 10);
    b.size += add_piece(b.bytes + b.size, 3, row + 10, 5);
    b.size += add_piece(b.bytes + b.size, 4, row + 15, sizeof row - 1 - 15);
    mend_wandb(&b);
    add_seed(WANDB, b.bytes, b.size);
    b.size += add_piece(b.bytes + b.size, 1, end, sizeof end - 1);
    mend_wandb(&b);
    add_seed(WANDB, b.bytes, b.size);
}

#define LOG_START "{\"kind\":\"start\",\"time\":1700000000.250000,\"id\":\"ab\",\"began\":1700000000," \
                  "\"events\":1700000000,\"name\":\"x\",\"project\":\"p\"}\n"

static void make_seeds(void)
{
    static const unsigned char images[] = { 0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 2,
                                            1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 };
    static const char *const texts[] = {
        ("{\"lr\": 1e-3, \"steps\": [1, 2.5, -0, null], \"name\": \"a \\u03bb \\ud83d\\ude00 \\n\","
         " \"deep\": {\"on\": true, \"off\": false}}"),
        "[[[[[[[[{}]]]]]]]]", "\"\"", "-12.5e+7", " [1,\n2,\t3 ] " };
    if (seed_counts[0]) return;
    add_safetensors("{\"test\":{\"dtype\":\"I32\",\"shape\":[2,2],\"data_offsets\":[0,16]}}", 16);
    add_safetensors("{\"__metadata__\":{\"format\":\"pt\",\"a\\u00e9\":\"\\ud83d\\ude00\"},"
                    "\"a\":{\"dtype\":\"F64\",\"shape\":[1,2],\"data_offsets\":[0,16]},"
                    "\"b\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[16,28]},"
                    "\"c\":{\"dtype\":\"U8\",\"shape\":[],\"data_offsets\":[28,29]}}  ", 29);
    add_safetensors("{\"z\":{\"data_offsets\":[0,0],\"shape\":[0,7],\"dtype\":\"BF16\"},"
                    "\"y\":{\"dtype\":\"F4\",\"shape\":[2,3],\"data_offsets\":[0,3]},"
                    "\"i\":{\"dtype\":\"I64\",\"shape\":[1],\"data_offsets\":[3,11]}}", 11);
    add_safetensors("{}", 0);
    add_npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", 24);
    add_npy(1, "{'descr': '>i2', 'fortran_order': True, 'shape': (2, 3, 2), }", 24);
    add_npy(2, "{'descr': '<f8', 'fortran_order': False, 'shape': (), }", 8);
    add_npy(3, "{\"shape\": (5,), \"descr\": \"|b1\", \"fortran_order\": False}", 5);
    add_npy(1, "{'descr': '<i8', 'fortran_order': True, 'shape': (0, 4), }", 0);
    add_npy(1, "{'descr': '|u1', 'fortran_order': True, 'shape': (1, 1, 2, 1, 3, 1, 1, 1), }", 6);
    add_seed(IDX, images, sizeof images);
    add_seed(IDX, "\0\0\x08\x01\0\0\0\x02\x05\x06", 10);
    for (int i = 0; i < COUNT(texts); ++i) add_seed(JSON, texts[i], strlen(texts[i]));
    static const char lines[] =
        LOG_START "{\"kind\":\"scalars\",\"time\":1700000001.000000,\"step\":0,\"values\":{\"a\":1}}\n"
        "{\"kind\":\"resume\",\"time\":1700000002.000000,\"id\":\"ab\",\"began\":1700000000,\"events\":1700000002}\n";
    add_seed(LOG, lines, sizeof lines - 1);
    add_seed(LOG, LOG_START "{\"kind\":\"scal", sizeof LOG_START - 1 + 13);
    add_wandb();
}

/* ---- mutations ---- */

#define NUMBER_WORDS 20         /* of the words, the first */
static const char *const words[] = {
    "0", "1", "-1", "8", "9", "255", "65535", "2147483647", "4294967296", "281474976710655", "281474976710656",
    "9223372036854775807", "9223372036854775808", "18446744073709551616", "1e400", "0.5", "00",
    "4294967296,4294967296", "281474976710655,281474976710655", "281474976710655, 65536, 0",
    "\"", "'", "\\", "\\u0000", "\\ud800", "\\udc00", "\\u00e9", "\xc3\xa9", "\xc0\x80", "\xed\xa0\x80", "\xff",
    "\n", " ", ",", ":",
    "{", "}", "[", "]", "(", ")", "{}", "[]", "()", "true", "null", "NaN", "True", "False",
    "__metadata__", "dtype", "shape", "data_offsets", "F4", "F6_E2M3", "F32", "F64", "I64", "BOOL", "C64",
    "descr", "fortran_order", "<f8", ">i8", "|u1", "|O", "<U3", "(1,)", "(2, 3)", "[('a', '<f4')]",
    "\"kind\":\"start\",", "\"id\":\"", "\"began\":", "\"events\":", "../", "{\"kind\":\"resume\"," };

static const uint64_t numbers[] = {
    0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 32761, 32768, 65535, 65536, 0x7fffffff, 0x80000000u, 0xffffffffu,
    UINT64_C(0x100000000), UINT64_C(0x7fffffffffffffff), UINT64_C(0x8000000000000000), UINT64_C(0xffffffffffffffff) };

/* Puts `count` bytes in place of `removed` at `at`. */
static void replace(blob *b, size_t at, size_t removed, const void *with, size_t count)
{
    unsigned char copy[MAX_SIZE];
    if (count > sizeof copy || b->size - removed + count > sizeof b->bytes) return;
    memcpy(copy, with, count);
    memmove(b->bytes + at + count, b->bytes + at + removed, b->size - at - removed);
    memcpy(b->bytes + at, copy, count);
    b->size += count - removed;
}

/* Puts another number in place of one in digits, or a word anywhere. */
static void change_word(blob *b)
{
    const char *word = words[below(COUNT(words))];
    size_t at = below(b->size + 1), end;
    if (draw() % 2) {
        while (at < b->size && (b->bytes[at] < '0' || b->bytes[at] > '9')) ++at;
        for (end = at; end < b->size && b->bytes[end] >= '0' && b->bytes[end] <= '9';) ++end;
        if (end > at) word = words[below(NUMBER_WORDS)];
    } else {
        end = at;
        if (draw() % 2) end += below(b->size - at + 1) % 16;
    }
    replace(b, at, end - at, word, strlen(word));
}

static void change_number(blob *b)
{
    static const int sizes[] = { 1, 2, 4, 8 };
    unsigned char code[8];
    int size = sizes[below(4)];
    uint64_t value = numbers[below(COUNT(numbers))];
    if (b->size < (size_t)size) return;
    size_t at = draw() % 2 ? below(b->size - (size_t)size + 1) : below(b->size < 17 ? b->size - (size_t)size + 1 : 16);
    if (at + (size_t)size > b->size) return;
    put_little(code, value, 8);
    for (int i = 0; i < size; ++i) b->bytes[at + (size_t)i] = code[draw() % 2 ? i : size - 1 - i];
}

static void mutate_once(blob *b, const blob *other)
{
    size_t at = below(b->size), count = b->size ? 1 + below(draw() % 4 ? 8 : b->size) : 0, from = below(b->size), piece;
    if (count > b->size - at) count = b->size - at;
    switch (draw() % 10) {
    case 0: if (b->size) b->bytes[at] ^= (unsigned char)(1u << draw() % 8); break;
    case 1: if (b->size) b->bytes[at] = (unsigned char)draw(); break;
    case 2: case 3: change_word(b); break;
    case 4: case 5: change_number(b); break;
    case 6: replace(b, at, count, "", 0); break;
    case 7: replace(b, from, 0, b->bytes + at, count); break;                          /* a copy somewhere else */
    case 8:
        from = below(other->size);
        piece = other->size ? 1 + below(other->size - from) : 0;
        replace(b, at, draw() % 2 ? count : 0, other->bytes + from, piece);
        break;
    default:
        if (draw() % 2) b->size = at;
        else replace(b, b->size, 0, other->bytes, below(other->size + 1) % 64);
    }
}

/* Makes lengths fit, so that a reader looks behind them. */
static void mend(blob *b, reader which)
{
    size_t end = b->size;
    if (which == SAFETENSORS && b->size > 8) {
        while (end > 8 && b->bytes[end - 1] != '}') --end;
        put_little(b->bytes, end - 8, 8);
    } else if (which == NPY && b->size > 12) {
        size_t head = b->bytes[6] == 1 ? 10 : 12;
        while (end > head && b->bytes[end - 1] != '\n') --end;
        put_little(b->bytes + 8, end - head, head == 10 ? 2 : 4);
    } else if (which == IDX && b->size > 16 && b->bytes[3] == 3) {
        size_t area = (size_t)b->bytes[11] * b->bytes[15], records = area ? (b->size - 16) / area : 0;
        if (records < 256) b->bytes[7] = (unsigned char)records;
    } else if (which == WANDB) {
        mend_wandb(b);
    }
}

static void mutate(blob *b, reader which, uint64_t seed, uint64_t run)
{
    random_state = seed * UINT64_C(0xd1342543de82ef95) + run * UINT64_C(0x2545f4914f6cdd1d) + (uint64_t)which;
    const blob *from = &seeds[which][below((size_t)seed_counts[which])];
    memcpy(b->bytes, from->bytes, from->size);
    b->size = from->size;
    for (size_t i = 0, times = 1 + (size_t)(draw() % 8 & draw()); i < times; ++i)
        mutate_once(b, &seeds[which][below((size_t)seed_counts[which])]);
    if (draw() % 2) mend(b, which);
}

/* ---- the readers ---- */

static char file_path[256], log_folder[256], log_path[320], wandb_path[400];
static dot_context *ctx;
static size_t allowance;        /* bytes that one allocation may have */
static const char *failure;     /* what a run did wrong */
static int64_t accepted;

static void *bounded_allocate(void *user, size_t bytes)
{
    (void)user;
    if (bytes > allowance) {
        failure = "more memory than the file justifies";
        return NULL;
    }
    return malloc(bytes);
}

static void bounded_release(void *user, void *memory, size_t bytes)
{
    (void)user;
    (void)bytes;
    free(memory);
}

static void new_context(void)
{
    dot_context_options options = dot_context_defaults();
    options.threads = 1;
    options.allocator.allocate = bounded_allocate;
    options.allocator.release = bounded_release;
    dot_context_destroy(ctx);
    allowance = SIZE_MAX;
    ctx = dot_context_create(&options);
    if (!ctx) abort();
}

static void write_bytes(const char *path, const blob *b)
{
    int file = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0600);
    if (file < 0 || write(file, b->bytes, b->size) != (ssize_t)b->size || close(file) != 0) {
        perror(path);
        exit(2);
    }
}

/* A reader accepts and leaves no error, or refuses and says why. */
static void verdict(bool good)
{
    accepted += good;
    if (good != dot_ok(ctx)) failure = good ? "accepted, but an error stands" : "refused without an error";
    if (!good && dot_error_status(ctx) != DOT_ERROR_FORMAT && dot_error_status(ctx) != DOT_ERROR_MEMORY)
        failure = "refused with another status than DOT_ERROR_FORMAT";
    if (!good && strlen(dot_error(ctx)) < 20) failure = "a sentence without words";
    dot_error_clear(ctx);
}

static void read_safetensors(void)
{
    static unsigned char bytes[MAX_SIZE];
    static double values[16 * MAX_SIZE];
    dot_safetensors *file = dot_safetensors_open(ctx, file_path);
    verdict(file != NULL);
    for (int i = 0; i < dot_safetensors_count(file); ++i) {
        dot_safetensors_entry e;
        if (!dot_safetensors_entry_at(file, i, &e) || e.bytes > sizeof bytes ||
            !dot_safetensors_read(file, i, bytes, e.bytes) || dot_safetensors_find(file, e.name) != i) failure = "an accepted tensor cannot be read";
        if (e.count <= COUNT(values)) dot_safetensors_read_double(file, i, values, e.count);    /* of some types only */
        dot_error_clear(ctx);
    }
    dot_safetensors_metadata(file, "format");
    dot_safetensors_close(file);
}

static void read_npy(void)
{
    static unsigned char bytes[MAX_SIZE];
    static double values[MAX_SIZE];
    dot_npy_info info;
    dot_npy *file = dot_npy_open(ctx, file_path);
    verdict(file != NULL);
    if (!file) return;
    if (!dot_npy_describe(file, &info) || info.bytes > sizeof bytes || !dot_npy_read(file, bytes, info.bytes) ||
        !dot_npy_read_double(file, values, info.count) || !dot_ok(ctx)) failure = "an accepted array cannot be read";
    dot_npy_close(file);
}

static void read_idx(void)
{
    bool labels = draw() % 4 == 0;
    dot_dataset *data = dot_dataset_idx(ctx, file_path, labels ? file_path : NULL, NULL);
    verdict(data != NULL);
    if (data) dot_dataset_record(data, dot_dataset_count(data) - 1);
    allowance = SIZE_MAX;
    new_context();                                  /* datasets live as long as it */
}

static void read_json(const blob *b)
{
    char text[MAX_SIZE + 1];
    json_document document;
    memcpy(text, b->bytes, b->size);
    text[b->size] = 0;
    bool good = json_parse(&document, text, b->size);
    accepted += good;
    if (good == (document.error != NULL)) failure = "good with an error, or bad without";
    if (good) {
        const json_node *root = &document.nodes[0];
        double steps[4];
        json_get_number(&document, root, "lr", 0);
        json_get_string(&document, root, "name", "");
        json_get_numbers(&document, root, "steps", steps, 4, 1);
    }
    json_release(&document);
}

static double clock_of_fuzz(void *user) { (void)user; return 1700000100.5; }

/* A run is resumed whose log.jsonl or .wandb file is the mutated one; the log must then take a record. */
static void read_log(bool wandb)
{
    dot_logger_options o = dot_logger_defaults();
    o.tensorboard = false;
    o.wandb = wandb;
    o.resume = true;
    o.resume_step = draw() % 2 ? -1 : (int64_t)below(8);
    o.clock = clock_of_fuzz;
    dot_logger *log = dot_logger_create(ctx, log_folder, &o);
    verdict(log != NULL);
    if (!log) return;
    if (!dot_logger_scalar(log, INT64_MAX, "loss", 0.5) || !dot_ok(ctx)) failure = "a resumed log takes no record";
    new_context();                                  /* closes it, without waiting for a disk */
}

static void run_once(const blob *b, reader which)
{
    if (which == JSON) {
        read_json(b);
        return;
    }
    write_bytes(which == LOG ? log_path : which == WANDB ? wandb_path : file_path, b);
    if (which == WANDB) {
        blob start;
        memcpy(start.bytes, LOG_START, start.size = sizeof LOG_START - 1);
        write_bytes(log_path, &start);
    }
    allowance = 65536 + 64 * b->size;
    if (which >= LOG) allowance += 1 << 17;         /* a block of the .wandb file, doubled */
    if (which == SAFETENSORS) read_safetensors();
    else if (which == NPY) read_npy();
    else if (which == IDX) read_idx();
    else read_log(which == WANDB);
}

/* ---- the program ---- */

static void remove_files(void)
{
    char path[400];
    unlink(file_path);
    unlink(log_path);
    unlink(wandb_path);
    snprintf(path, sizeof path, "%s/wandb/offline-run-20231114_221320-ab", log_folder);
    rmdir(path);
    snprintf(path, sizeof path, "%s/wandb", log_folder);
    rmdir(path);
    rmdir(log_folder);
}

static void prepare(void)
{
    const char *folder = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : getenv("TMPDIR");
    if (!folder) folder = "/tmp";
    snprintf(file_path, sizeof file_path, "%.150s/dotopt_fuzz.%ld", folder, (long)getpid());
    snprintf(log_folder, sizeof log_folder, "%.150s/dotopt_fuzz_log.%ld", folder, (long)getpid());
    snprintf(log_path, sizeof log_path, "%s/log.jsonl", log_folder);
    snprintf(wandb_path, sizeof wandb_path, "%s/wandb/offline-run-20231114_221320-ab", log_folder);
    mkdir(log_folder, 0700);
    snprintf(log_path, sizeof log_path, "%s/wandb", log_folder);
    mkdir(log_path, 0700);
    mkdir(wandb_path, 0700);
    snprintf(log_path, sizeof log_path, "%s/log.jsonl", log_folder);
    snprintf(wandb_path, sizeof wandb_path, "%s/wandb/offline-run-20231114_221320-ab/run-ab.wandb", log_folder);
    make_seeds();
    new_context();
}

/* Returns the number of the run that failed, or -1. The seeds come first: all must be accepted, but for the IDX file of
   labels, which is there to be mixed with the images. */
static int64_t fuzz(reader which, uint64_t seed, int64_t first, int64_t runs, const char *keep)
{
    blob b;
    accepted = 0;
    failure = NULL;
    random_state = 2;               /* images without labels */
    for (int i = 0; i < seed_counts[which] && !failure; ++i, accepted = 0) {
        run_once(&seeds[which][i], which);
        if (accepted != 1 && !(which == IDX && i == 1)) failure = "a valid seed is refused";
    }
    for (int64_t run = first; run < first + runs && !failure; ++run) {
        mutate(&b, which, seed, (uint64_t)run);
        if (keep) write_bytes(keep, &b);
        run_once(&b, which);
        if (failure) return run;
    }
    return failure ? 0 : -1;
}

#ifndef FUZZ_TEST

int main(int argc, char **argv)
{
    const char *name = "all", *keep = NULL;
    int64_t runs = 100000, first = 0;
    uint64_t seed = 1;
    bool usage = argc % 2 == 0;
    for (int i = 1; i + 1 < argc; i += 2) {
        if (strcmp(argv[i], "--reader") == 0) name = argv[i + 1];
        else if (strcmp(argv[i], "--runs") == 0) runs = atoll(argv[i + 1]);
        else if (strcmp(argv[i], "--first") == 0) first = atoll(argv[i + 1]);
        else if (strcmp(argv[i], "--seed") == 0) seed = strtoull(argv[i + 1], NULL, 10);
        else if (strcmp(argv[i], "--keep") == 0) keep = argv[i + 1];
        else usage = true;
    }
    bool any = false;
    for (int k = 0; k < READERS; ++k) any = any || strcmp(name, reader_names[k]) == 0 || strcmp(name, "all") == 0;
    if (usage || !any) {
        fprintf(stderr, "usage: fuzz [--reader safetensors|npy|idx|json|log|wandb|all] [--runs N] [--seed S] [--first K]"
                        " [--keep FILE]\n");
        return 2;
    }
    prepare();
    atexit(remove_files);
    for (int k = 0; k < READERS; ++k) {
        if (strcmp(name, "all") != 0 && strcmp(name, reader_names[k]) != 0) continue;
        clock_t begin = clock();
        int64_t failed = fuzz((reader)k, seed, first, runs, keep);
        double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
        if (failed >= 0) {
            printf("%s: run %lld of seed %llu: %s\n", reader_names[k], (long long)failed, (unsigned long long)seed,
                   failure);
            return 1;
        }
        printf("%s: %lld executions, %lld accepted, %.1f s of processor time, %.0f a second\n", reader_names[k],
               (long long)runs, (long long)accepted, seconds, (double)runs / seconds);
        fflush(stdout);
    }
    dot_context_destroy(ctx);
    return 0;
}
#endif
