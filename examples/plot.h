/*
 * plot.h - figures for papers, as PNG and SVG, from one description.
 *
 * Every figure function takes a path without extension and writes PATH.png
 * and PATH.svg with the same layout. Lengths are points (1/72 inch). All text
 * has one size; only a figure's title is a little larger. A text may hold
 * UTF-8 and '\n', and is wrapped where it would not fit.
 *
 * Functions that can fail return NULL, or one line that says what is wrong
 * (it stays valid until the next call with the same plot_style). Nothing here
 * prints or exits, and there is no global state.
 *
 *     plot_style style;
 *     const char *error = plot_open(&style);   (before hours of computing)
 *     plot_panel panel;
 *     plot_heat_options options;
 *     plot_panel_defaults(&panel);
 *     plot_heat_defaults(&options);
 *     panel.value = value; panel.rows = 12; panel.cols = 12; ...
 *     if (!error) error = plot_heatmaps(&style, "out/grid", &panel, 1, &options);
 *     plot_close(&style);
 *
 * C99, also C++11. Needs stb_truetype.h and stb_image_write.h on the include
 * path (Debian: libstb-dev, -I/usr/include/stb), DejaVuSans.ttf, and -lm.
 */
#ifndef PLOT_H
#define PLOT_H

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* stb is compiled into this file unless the program has included it already;
   its warnings are not ours to show. */
#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wunused-function"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wsign-compare"
#pragma GCC diagnostic ignored "-Wcast-qual"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#endif
#ifndef __STB_INCLUDE_STB_TRUETYPE_H__
#define STBTT_STATIC
#define STB_TRUETYPE_IMPLEMENTATION
#include "stb_truetype.h"
#undef STB_TRUETYPE_IMPLEMENTATION
#endif
#ifndef INCLUDE_STB_IMAGE_WRITE_H
#define STB_IMAGE_WRITE_STATIC
#define STB_IMAGE_WRITE_IMPLEMENTATION
#include "stb_image_write.h"
#undef STB_IMAGE_WRITE_IMPLEMENTATION
#endif
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

/* ---- what a program uses ------------------------------------------------ */

/* The font and what all figures of a program have in common. */
typedef struct {
    double dpi;         /* resolution of the PNG files, 300 */
    double font_size;   /* of all text but figure titles, 9 */
    stbtt_fontinfo font;
    unsigned char *font_data;
    char error[512];    /* the line that a failed call returned */
} plot_style;

/* Loads the font: the file named by the environment variable DOTOPT_FONT if
   it is set, otherwise DejaVuSans.ttf from data/, from ./ or from the system.
   dpi and font_size may be changed afterwards. Call plot_close in any case. */
static const char *plot_open(plot_style *style);
static void plot_close(plot_style *style);

/* One heatmap. Only value, rows and cols must be set. */
typedef struct {
    const double *value;        /* [row * cols + col], row 0 at the bottom;
                                   NaN: diverged, -INFINITY: missing */
    int rows, cols;
    const char *title;
    const char *xlabel;         /* labels of this panel alone: leave those of the */
    const char *ylabel;         /* figure NULL then */
    const char *const *xticks;  /* cols labels, left to right */
    const char *const *yticks;  /* rows labels, bottom to top */
    const int *circle;          /* cells to ring, as row * cols + col */
    int circles;
} plot_panel;

/* Fills in an empty panel. */
static void plot_panel_defaults(plot_panel *panel);

typedef enum { PLOT_JET, PLOT_VIRIDIS, PLOT_TURBO } plot_colormap;

/* What the panels of one figure share. */
typedef struct {
    const char *title;          /* of the figure, NULL for none, as all labels */
    const char *xlabel, *ylabel;
    const char *bar_label;      /* along the colour bar */
    plot_colormap map;          /* PLOT_JET */
    int log_scale;              /* of the colours, 1 */
    double lo, hi;              /* limits of the colours, NAN: those of the data;
                                   the bar has a tip where values lie beyond */
    int columns;                /* panels side by side, 0: one row up to 4 panels,
                                   a square arrangement beyond */
    double panel_width;         /* 0: by the number of panels */
    const char *diverged_note;  /* names in the key below the panels, shown only */
    const char *missing_note;   /* if such cells occur: "diverged", "not run", */
    const char *circle_note;    /* NULL (no entry) */
} plot_heat_options;

static void plot_heat_defaults(plot_heat_options *options);

/* Draws count heatmaps with one colour scale and one colour bar. Where all
   panels have the same tick labels, these appear on the outer panels only. */
static const char *plot_heatmaps(plot_style *style, const char *path, const plot_panel *panel,
                                 int count, const plot_heat_options *options);

/* Writes the indices of the (at most) k lowest finite values, best first, and
   returns how many there are: the cells to circle. */
static int plot_best(const double *value, int count, int k, int *index);

/* One line of a line plot. Points with a NaN or infinite coordinate, and those
   with y <= 0 on a logarithmic axis, are gaps. */
typedef struct {
    const char *name;           /* in the legend, NULL for no entry */
    const double *x, *y;
    int count;
    int colour;                 /* 1 to 8, 0: by the position among the series */
    int dash;                   /* 1 solid, 2 dashed, 3 dotted, 4 dash-dot, 0: as above */
} plot_series;

typedef struct {
    const char *title, *xlabel, *ylabel;
    int log_x, log_y;           /* 0 */
    double xlo, xhi, ylo, yhi;  /* limits of the axes, NAN: those of the data */
    double width, height;       /* of the axes, 320 x 210 */
} plot_lines_options;

static void plot_lines_defaults(plot_lines_options *options);

/* Draws count series with a legend on the right of the axes. Up to 32 lines
   differ in colour or dash. */
static const char *plot_lines(plot_style *style, const char *path, const plot_series *series,
                              int count, const plot_lines_options *options);

typedef struct {
    const char *title;
    const char *const *row_label;   /* rows labels, NULL for none */
    const char *const *col_label;   /* cols labels, NULL for none */
    double zoom;                    /* points per image pixel, 1.5 */
} plot_images_options;

static void plot_images_defaults(plot_images_options *options);

/* Draws rows x cols grey images, each of height x width bytes (0 black, 255
   white, top row first); image[row * cols + col] may be NULL for a blank. */
static const char *plot_images(plot_style *style, const char *path,
                               const unsigned char *const *image, int rows, int cols,
                               int height, int width, const plot_images_options *options);

/* ---- constants ---------------------------------------------------------- */

enum { PLOT_BLACK = 0x000000, PLOT_WHITE = 0xffffff, PLOT_GREY = 0x888888, PLOT_PALE = 0xe4e4e4 };

#define PLOT_PI 3.14159265358979323846
#define PLOT_LEADING 1.25   /* distance of lines of text, in font sizes */
#define PLOT_DIGIT 0.73     /* height of digits and capitals in DejaVu Sans, likewise */
#define PLOT_TITLE 1.15     /* size of a figure's title relative to all other text */
#define PLOT_HAIR 0.6       /* width of frames and ticks, in points */
#define PLOT_TICK 3.0       /* length of a tick */

/* The nearest value from lo to hi; lo for NaN, so that nothing is ever drawn at
   a place that is not a number. */
static double plot_clamp(double value, double lo, double hi)
{
    return value > lo ? fmin(value, hi) : lo;
}

/* ---- style: the font ---------------------------------------------------- */

static const char *plot_fail(plot_style *style, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(style->error, sizeof style->error, format, args);
    va_end(args);
    return style->error;
}

/* A whole file in memory, NULL if it cannot be read. */
static unsigned char *plot_read(const char *path, long *size)
{
    unsigned char *data = NULL;
    FILE *file = fopen(path, "rb");
    if (!file)
        return NULL;
    if (fseek(file, 0, SEEK_END) == 0 && (*size = ftell(file)) > 0 && fseek(file, 0, SEEK_SET) == 0)
        data = (unsigned char *)malloc((size_t)*size);
    if (data && fread(data, 1, (size_t)*size, file) != (size_t)*size) {
        free(data);
        data = NULL;
    }
    fclose(file);
    return data;
}

static const char *plot_open(plot_style *style)
{
    static const char *const places[] = {
        "data/DejaVuSans.ttf",
        "DejaVuSans.ttf",
        "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf",    /* Debian, Ubuntu */
        "/usr/share/fonts/TTF/DejaVuSans.ttf",                /* Arch */
        "/usr/share/fonts/dejavu-sans-fonts/DejaVuSans.ttf",  /* Fedora */
        "/Library/Fonts/DejaVuSans.ttf",                      /* macOS */
    };
    const char *path = getenv("DOTOPT_FONT");
    const int chosen = path && *path;
    long size = 0;

    memset(style, 0, sizeof *style);
    style->dpi = 300;
    style->font_size = 9;
    if (chosen)
        style->font_data = plot_read(path, &size);
    for (size_t i = 0; !chosen && !style->font_data && i < sizeof places / sizeof *places; i++)
        style->font_data = plot_read(path = places[i], &size);
    if (!style->font_data && chosen)
        return plot_fail(style, "cannot read the font %.300s, named by DOTOPT_FONT", path);
    if (!style->font_data)
        return plot_fail(style, "no font DejaVuSans.ttf: install fonts-dejavu-core, put the file "
                                "into data/, or name it in DOTOPT_FONT");
    if (size < 12 || stbtt_GetFontOffsetForIndex(style->font_data, 0) < 0 ||
        !stbtt_InitFont(&style->font, style->font_data,
                        stbtt_GetFontOffsetForIndex(style->font_data, 0)))
        return plot_fail(style, "%.300s is not a TrueType font", path);
    return NULL;
}

static void plot_close(plot_style *style)
{
    free(style->font_data);
    style->font_data = NULL;
}

/* ---- text: measuring and wrapping --------------------------------------- */

/* The next code point of a UTF-8 string; malformed bytes stand for themselves. */
static int plot_utf8(const char **text)
{
    const unsigned char *s = (const unsigned char *)*text;
    const int more = s[0] >= 0xf0 ? 3 : s[0] >= 0xe0 ? 2 : s[0] >= 0xc0 ? 1 : 0;
    int code = more ? s[0] & (0x3f >> more) : s[0];
    for (int i = 1; i <= more; i++) {
        if ((s[i] & 0xc0) != 0x80) {
            *text += 1;
            return s[0];
        }
        code = code << 6 | (s[i] & 0x3f);
    }
    *text += more + 1;
    return code;
}

/* Width of the text between two places, without a line break. */
static double plot_width(const plot_style *style, const char *text, const char *end, double size)
{
    const double unit = size * (double)stbtt_ScaleForMappingEmToPixels(&style->font, 1);
    int last = 0, advance, bearing;
    double width = 0;
    while (text < end) {
        const int glyph = stbtt_FindGlyphIndex(&style->font, plot_utf8(&text));
        stbtt_GetGlyphHMetrics(&style->font, glyph, &advance, &bearing);
        width += advance + (last ? stbtt_GetGlyphKernAdvance(&style->font, last, glyph) : 0);
        last = glyph;
    }
    return width * unit;
}

static double plot_text_width(const plot_style *style, const char *text, double size)
{
    return plot_width(style, text, text + strlen(text), size);
}

/* Text broken into lines; no lines for a text that is NULL or empty. */
typedef struct {
    char text[512];
    int lines;
    double width, height;
} plot_block;

static plot_block plot_wrap_greedy(const plot_style *style, const char *text, double size,
                                   double room)
{
    plot_block block;
    char *start = block.text, *space = NULL;
    memset(&block, 0, sizeof block);
    if (!text || !*text)
        return block;
    snprintf(block.text, sizeof block.text, "%s", text);
    block.lines = 1;
    for (char *s = block.text;; s++) {
        if (*s && *s != ' ' && *s != '\n')
            continue;
        if (space && plot_width(style, start, s, size) > room) {
            *space = '\n';
            start = space + 1;
            block.lines++;
        }
        space = *s == ' ' ? s : NULL;
        block.width = fmax(block.width, plot_width(style, start, space ? start : s, size));
        if (!*s)
            break;
        if (*s == '\n') {
            start = s + 1;
            block.lines++;
        }
    }
    block.height = PLOT_LEADING * size * block.lines;
    return block;
}

/* Wraps a text into the room given; lines come out about equally long, since a
   single word on a last line looks like a mistake. */
static plot_block plot_wrap(const plot_style *style, const char *text, double size, double room)
{
    plot_block best = plot_wrap_greedy(style, text, size, room);
    while (best.lines > 1) {
        const plot_block next = plot_wrap_greedy(style, text, size, room *= 0.96);
        if (next.lines > best.lines || room < size)
            break;
        best = next;
    }
    return best;
}

/* The widest of several labels. */
static double plot_widest(const plot_style *style, const char *const *label, int count)
{
    double width = 0;
    for (int i = 0; label && i < count; i++)
        if (label[i])
            width = fmax(width, plot_text_width(style, label[i], style->font_size));
    return width;
}

/* ---- axes and ticks ----------------------------------------------------- */

typedef struct {
    double lo, hi;
    int log;
} plot_axis;

/* Where a value lies on an axis: 0 at the low end, 1 at the high end. */
static double plot_unit(const plot_axis *axis, double value)
{
    if (!axis->log)
        return (value - axis->lo) / (axis->hi - axis->lo);
    if (value <= 0)
        return -1;
    return (log(value) - log(axis->lo)) / (log(axis->hi) - log(axis->lo));
}

/* Widens an axis to hold a value that can lie on it. */
static void plot_extend(plot_axis *axis, double value)
{
    if (!isfinite(value) || (axis->log && value <= 0))
        return;
    axis->lo = isnan(axis->lo) ? value : fmin(axis->lo, value);
    axis->hi = isnan(axis->hi) ? value : fmax(axis->hi, value);
}

/* Makes an axis usable: limits given by the caller count, others come from the
   data with some space at both ends, and lo < hi. NULL or what is wrong. */
static const char *plot_settle(plot_axis *axis, double lo, double hi, double space)
{
    double margin;
    if (isinf(lo) || isinf(hi) || (!isnan(lo) && !isnan(hi) && !(lo < hi)))
        return "limits of an axis must be finite, the lower below the upper";
    if (axis->log && (lo <= 0 || hi <= 0))
        return "limits of a logarithmic axis must be positive";
    if (isnan(axis->lo))            /* no data */
        axis->lo = axis->hi = 1;
    if (axis->log)
        margin = axis->lo < axis->hi ? exp(space * (log(axis->hi) - log(axis->lo))) : 1.1;
    else
        margin = axis->lo < axis->hi ? (axis->hi - axis->lo) * space
                                     : axis->lo == 0 ? 1 : 0.1 * fabs(axis->lo);
    axis->lo = !isnan(lo) ? lo : axis->log ? axis->lo / margin : axis->lo - margin;
    axis->hi = !isnan(hi) ? hi : axis->log ? axis->hi * margin : axis->hi + margin;
    /* losses that diverge come close to the largest double */
    axis->lo = plot_clamp(axis->lo, axis->log ? 1e-300 : -1e300, 1e300);
    axis->hi = plot_clamp(axis->hi, axis->log ? 1e-300 : -1e300, 1e300);
    if (!(axis->lo < axis->hi)) {   /* one limit given, all data on the wrong side */
        if (isnan(hi))
            axis->hi = axis->log ? axis->lo * 10 : axis->lo + 1;
        else
            axis->lo = axis->log ? axis->hi / 10 : axis->hi - 1;
    }
    return NULL;
}

enum { PLOT_TICKS = 128 };

typedef struct {
    double at[PLOT_TICKS];
    char label[PLOT_TICKS][48]; /* empty for a minor tick */
    int count;
} plot_ticks;

/* A number as in print: true minus sign, powers of ten raised. decimals < 0
   asks for as many as the number needs. */
static void plot_number(char *out, size_t size, double value, int decimals, int scientific)
{
    static const char *const raised[] = {"\u2070", "\u00b9", "\u00b2", "\u00b3", "\u2074",
                                         "\u2075", "\u2076", "\u2077", "\u2078", "\u2079"};
    const double magnitude = fabs(value);
    char digits[20] = "", power[20] = "";
    if (scientific && magnitude > 0) {
        const int exponent = (int)floor(log10(magnitude) + 1e-9);
        const double mantissa = magnitude / pow(10, exponent);
        const int one = fabs(mantissa - 1) < 1e-9;
        char plain[16];
        snprintf(plain, sizeof plain, "%d", abs(exponent));
        snprintf(power, sizeof power, "%s10%s", one ? "" : "\u00d7", exponent < 0 ? "\u207b" : "");
        for (const char *s = plain; *s; s++)
            strcat(power, raised[*s - '0']);    /* at most three of at most three bytes */
        if (!one)
            snprintf(digits, sizeof digits, "%.4g", mantissa);
    } else if (decimals < 0) {
        snprintf(digits, sizeof digits, "%.6g", magnitude);
    } else {
        snprintf(digits, sizeof digits, "%.*f", decimals, magnitude);
    }
    snprintf(out, size, "%s%s%s", value < 0 ? "\u2212" : "", digits, power);
}

/* Adds a tick with this number as label, or a minor one without. */
static void plot_add_tick(plot_ticks *ticks, double at, int label, int decimals, int scientific)
{
    if (ticks->count == PLOT_TICKS)
        return;
    ticks->at[ticks->count] = at;
    ticks->label[ticks->count][0] = '\0';
    if (label)
        plot_number(ticks->label[ticks->count], sizeof ticks->label[0], at, decimals, scientific);
    ticks->count++;
}

/* Multiples of 1, 2 or 5 times a power of ten, labels at least gap apart on an
   axis of the given length. */
static void plot_ticks_linear(plot_ticks *ticks, const plot_axis *axis, double length, double gap)
{
    static const double nice[] = {1, 2, 5, 10};
    const double range = axis->hi - axis->lo, least = range * fmax(gap / length, 0.14);
    const double ten = pow(10, floor(log10(least)));
    const double peak = fmax(fabs(axis->lo), fabs(axis->hi));
    int pick = 0;
    while (pick < 3 && nice[pick] * ten < least * (1 - 1e-9))
        pick++;
    const double step = nice[pick] * ten, first = ceil(axis->lo / step - 1e-6);
    const int decimals = (int)fmax(0, -floor(log10(step) + 1e-9));
    ticks->count = 0;
    for (int i = 0; (first + i) * step <= axis->hi + 1e-6 * step && i < PLOT_TICKS; i++)
        plot_add_tick(ticks, (first + i) * step, 1, decimals, decimals > 5 || peak >= 1e6);
}

/* Labels at the densest set of digits per decade that keeps them apart, small
   ticks at the others. Returns the number of labels. */
static int plot_ticks_log(plot_ticks *ticks, const plot_axis *axis, double length, double gap)
{
    static const struct { const char *digits; double closest; } sets[] = {
        {"123456789", 0.0457}, {"12357", 0.146}, {"125", 0.301}, {"13", 0.477}, {"1", 1},
    };
    const double decade = length / (log10(axis->hi) - log10(axis->lo));
    const int from = (int)floor(log10(axis->lo)), to = (int)floor(log10(axis->hi) + 1e-9);
    const int scientific = axis->lo < 0.99e-4 || axis->hi >= 1e5;
    const int skip = (int)ceil(fmax(1, gap / decade));  /* of decades */
    int set = 0, labels = 0;
    while (set < 4 && sets[set].closest * decade < gap)
        set++;
    ticks->count = 0;
    for (int power = from; power <= to; power++)
        for (int digit = 1; digit <= 9; digit++) {
            const double at = digit * pow(10, power);
            const int label = strchr(sets[set].digits, '0' + digit) != NULL && power % skip == 0;
            if (at < axis->lo * (1 - 1e-9) || at > axis->hi * (1 + 1e-9) ||
                (!label && decade < (digit > 1 ? 24 : 3)))
                continue;
            plot_add_tick(ticks, at, label, -1, scientific);
            labels += label;
        }
    return labels;
}

static void plot_ticks_make(plot_ticks *ticks, const plot_axis *axis, double length, double gap)
{
    /* a logarithmic axis over less than a decade may hold no round numbers */
    if (!axis->log || plot_ticks_log(ticks, axis, length, gap) < 3)
        if (!axis->log || axis->hi / axis->lo < 30)
            plot_ticks_linear(ticks, axis, length, gap);
}

/* The width of the widest label. */
static double plot_ticks_width(const plot_style *style, const plot_ticks *ticks)
{
    double width = 0;
    for (int i = 0; i < ticks->count; i++)
        width = fmax(width, plot_text_width(style, ticks->label[i], style->font_size));
    return width;
}

/* ---- colours ------------------------------------------------------------ */

static void plot_jet(double t, double *rgb)
{
    for (int i = 0; i < 3; i++)
        rgb[i] = 1.5 - fabs(4 * t - (3 - i));
}

/* viridis of matplotlib (CC0), sampled at 16 places */
static void plot_viridis(double t, double *rgb)
{
    static const unsigned table[] = {
        0x440154, 0x481a6c, 0x472f7d, 0x414487, 0x39568c, 0x31688e, 0x2a788e, 0x23888e,
        0x1f988b, 0x22a884, 0x35b779, 0x54c568, 0x7ad151, 0xa5db36, 0xd2e21b, 0xfde725,
    };
    const int i = (int)fmin(t * 15, 14);
    for (int k = 0; k < 3; k++) {
        const double a = (table[i] >> (16 - 8 * k)) & 255, b = (table[i + 1] >> (16 - 8 * k)) & 255;
        rgb[k] = (a + (b - a) * (t * 15 - i)) / 255;
    }
}

/* turbo of A. Mikhailov, as the polynomials of R. Du */
static void plot_turbo(double t, double *rgb)
{
    static const double table[3][6] = {
        {0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943},
        {0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604},
        {0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973},
    };
    for (int k = 0; k < 3; k++) {
        rgb[k] = 0;
        for (int i = 5; i >= 0; i--)
            rgb[k] = rgb[k] * t + table[k][i];
    }
}

/* The colour 0xRRGGBB of t in 0 to 1. */
static unsigned plot_colour(plot_colormap map, double t)
{
    static void (*const maps[])(double, double *) = {plot_jet, plot_viridis, plot_turbo};
    double rgb[3];
    unsigned colour = 0;
    maps[map](plot_clamp(t, 0, 1), rgb);
    for (int k = 0; k < 3; k++)
        colour = colour << 8 | (unsigned)(255 * plot_clamp(rgb[k], 0, 1) + 0.5);
    return colour;
}

/* ---- byte buffers ------------------------------------------------------- */

typedef struct {
    unsigned char *data;
    size_t size, room;
    int failed;
} plot_buffer;

static void plot_append(plot_buffer *buffer, const void *data, size_t size)
{
    if (buffer->failed || size == 0)
        return;
    if (size > buffer->room - buffer->size) {
        const size_t room = 2 * buffer->room + size + 4096;
        unsigned char *more = (unsigned char *)realloc(buffer->data, room);
        if (!more) {
            buffer->failed = 1;
            return;
        }
        buffer->data = more;
        buffer->room = room;
    }
    memcpy(buffer->data + buffer->size, data, size);
    buffer->size += size;
}

static void plot_append_stb(void *context, void *data, int size)
{
    plot_append((plot_buffer *)context, data, (size_t)size);
}

/* Encodes pixels as PNG; channels is 1 or 3. */
static void plot_png(plot_buffer *out, const unsigned char *pixel, int width, int height,
                     int channels)
{
    if (!stbi_write_png_to_func(plot_append_stb, out, width, height, channels, pixel,
                                width * channels))
        out->failed = 1;
}

/* Puts the resolution into a PNG, so that it is printed at the size it was
   drawn for: a chunk pHYs after the header, which is 33 bytes long. */
static void plot_png_dpi(plot_buffer *png, double dpi)
{
    unsigned char chunk[21] = {0, 0, 0, 9, 'p', 'H', 'Y', 's'};
    const unsigned long metre = (unsigned long)(dpi / 0.0254 + 0.5);
    unsigned long crc = 0xffffffff;
    for (int i = 0; i < 4; i++)
        chunk[8 + i] = chunk[12 + i] = (unsigned char)(metre >> (24 - 8 * i) & 255);
    chunk[16] = 1;
    for (int i = 4; i < 17; i++) {
        crc ^= chunk[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320 : 0);
    }
    for (int i = 0; i < 4; i++)
        chunk[17 + i] = (unsigned char)((crc ^ 0xffffffff) >> (24 - 8 * i) & 255);
    plot_append(png, chunk, sizeof chunk);      /* for the room */
    if (png->failed || png->size < 33 + sizeof chunk)
        return;
    memmove(png->data + 33 + sizeof chunk, png->data + 33, png->size - 33 - sizeof chunk);
    memcpy(png->data + 33, chunk, sizeof chunk);
}

static void plot_base64(plot_buffer *out, const plot_buffer *in)
{
    static const char digit[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    for (size_t i = 0; i < in->size; i += 3) {
        unsigned long three = 0;
        char four[4];
        for (size_t k = 0; k < 3; k++)
            three = three << 8 | (i + k < in->size ? in->data[i + k] : 0);
        for (size_t k = 0; k < 4; k++)
            four[k] = i + k > in->size ? '=' : digit[three >> (18 - 6 * k) & 63];
        plot_append(out, four, 4);
    }
}

/* ---- canvas: pixels and SVG side by side -------------------------------- */

/* An edge of a polygon in pixels, y0 < y1; turn is its direction, x where it
   meets the current scan line. */
typedef struct {
    double x0, y0, x1, y1, x;
    int turn;
} plot_edge;

/* Everything is drawn by the primitives below, each of which adds to both
   pictures; figures use nothing else. Points, y downwards. */
typedef struct {
    const plot_style *style;
    double width, height, scale;    /* scale: pixels per point */
    int columns, rows;              /* in pixels */
    unsigned char *pixel;           /* RGB */
    double *cover;                  /* of the pixels of one row, 0 to 1 */
    plot_edge *edge;                /* of the shape being built, then room for as many */
    int edges, room;
    int clip[4];                    /* left, top, right, bottom in pixels */
    plot_buffer svg;
    int failed;                     /* out of memory; all drawing is ignored */
} plot_canvas;

static void plot_svg(plot_canvas *c, const char *format, ...)
{
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    plot_append(&c->svg, text, strlen(text));
}

static void plot_svg_text(plot_canvas *c, const char *text, const char *end)
{
    for (; text < end; text++) {
        const char *entity = *text == '&' ? "&amp;" : *text == '<' ? "&lt;" : *text == '>' ? "&gt;"
                             : NULL;
        plot_append(&c->svg, entity ? entity : text, entity ? strlen(entity) : 1);
    }
}

static void plot_clip_none(plot_canvas *c)
{
    c->clip[0] = c->clip[1] = 0;
    c->clip[2] = c->columns;
    c->clip[3] = c->rows;
}

static void plot_canvas_open(plot_canvas *c, const plot_style *style, double width, double height)
{
    memset(c, 0, sizeof *c);
    c->style = style;
    c->scale = style->dpi / 72;
    c->columns = (int)ceil(width * c->scale);
    c->rows = (int)ceil(height * c->scale);
    c->width = c->columns / c->scale;
    c->height = c->rows / c->scale;
    c->pixel = (unsigned char *)malloc((size_t)c->columns * (size_t)c->rows * 3);
    c->cover = (double *)calloc((size_t)c->columns + 1, sizeof *c->cover);
    c->failed = !c->pixel || !c->cover;
    if (!c->failed)
        memset(c->pixel, 255, (size_t)c->columns * (size_t)c->rows * 3);
    plot_clip_none(c);
    plot_svg(c, "<svg xmlns=\"http://www.w3.org/2000/svg\" "
                "xmlns:xlink=\"http://www.w3.org/1999/xlink\" width=\"%.2fpt\" height=\"%.2fpt\" "
                "viewBox=\"0 0 %.2f %.2f\" font-family=\"DejaVu Sans, sans-serif\">\n",
             c->width, c->height, c->width, c->height);
    plot_svg(c, "<rect width=\"100%%\" height=\"100%%\" fill=\"#ffffff\"/>\n");
}

/* Writes a file under a temporary name first, so that no reader ever sees half
   of one. */
static const char *plot_write(plot_style *style, const char *path, const char *suffix,
                              const plot_buffer *data)
{
    char name[1024], temporary[1032];
    int bad;
    FILE *file;
    if (snprintf(name, sizeof name, "%s%s", path, suffix) >= (int)sizeof name)
        return plot_fail(style, "the path %.100s... is too long", path);
    snprintf(temporary, sizeof temporary, "%s.tmp", name);
    errno = 0;
    file = fopen(temporary, "wb");
    if (!file)
        return plot_fail(style, "cannot write %.300s: %s", temporary, strerror(errno));
    bad = fwrite(data->data, 1, data->size, file) != data->size;
    bad |= fclose(file) != 0;
#ifdef _WIN32
    remove(name);   /* rename does not replace there */
#endif
    if (bad || rename(temporary, name)) {
        plot_fail(style, "cannot write %.300s: %s", name, strerror(errno));
        remove(temporary);
        return style->error;
    }
    return NULL;
}

/* Writes both files and releases the canvas. */
static const char *plot_canvas_close(plot_canvas *c, plot_style *style, const char *path)
{
    plot_buffer png;
    const char *error = NULL;
    memset(&png, 0, sizeof png);
    plot_svg(c, "</svg>\n");
    if (!c->failed)
        plot_png(&png, c->pixel, c->columns, c->rows, 3);
    plot_png_dpi(&png, style->dpi);
    if (c->failed || png.failed || c->svg.failed)
        error = plot_fail(style, "out of memory for the figure %.300s", path);
    if (!error)
        error = plot_write(style, path, ".png", &png);
    if (!error)
        error = plot_write(style, path, ".svg", &c->svg);
    free(png.data);
    free(c->svg.data);
    free(c->edge);
    free(c->cover);
    free(c->pixel);
    return error;
}

/* ---- canvas: filling shapes --------------------------------------------- */

/* Adds an edge, given in points, to the shape being built. */
static void plot_add_edge(plot_canvas *c, double x0, double y0, double x1, double y1)
{
    const double s = c->scale;
    plot_edge *e;
    if (c->failed || y0 == y1)
        return;
    if (c->edges == c->room) {
        const int room = 2 * c->room + 256;
        e = (plot_edge *)realloc(c->edge, 2 * (size_t)room * sizeof *e);
        if (!e) {
            c->failed = 1;
            return;
        }
        c->edge = e;
        c->room = room;
    }
    e = &c->edge[c->edges++];
    e->turn = y0 < y1 ? 1 : -1;
    e->x0 = s * (y0 < y1 ? x0 : x1);
    e->y0 = s * fmin(y0, y1);
    e->x1 = s * (y0 < y1 ? x1 : x0);
    e->y1 = s * fmax(y0, y1);
    e->x = e->x0;
}

static void plot_add_polygon(plot_canvas *c, const double *xy, int count)
{
    for (int i = 0, last = count - 1; i < count; last = i++)
        plot_add_edge(c, xy[2 * last], xy[2 * last + 1], xy[2 * i], xy[2 * i + 1]);
}

/* turn: 1, or -1 to cut a hole into a shape added with 1 */
static void plot_add_box(plot_canvas *c, double x, double y, double w, double h, int turn)
{
    const double from = turn > 0 ? y : y + h, to = turn > 0 ? y + h : y;
    plot_add_edge(c, x + w, from, x + w, to);
    plot_add_edge(c, x, to, x, from);
}

static void plot_add_disc(plot_canvas *c, double x, double y, double radius, int turn)
{
    const int sides = radius * c->scale < 4 ? 12 : 64;
    double px = x + radius, py = y;
    for (int i = 1; i <= sides; i++) {
        const double angle = turn * 2 * PLOT_PI * i / sides;
        const double qx = x + radius * cos(angle), qy = y + radius * sin(angle);
        plot_add_edge(c, px, py, qx, qy);
        px = qx;
        py = qy;
    }
}

static void plot_add_segment(plot_canvas *c, double x0, double y0, double x1, double y1,
                             double width)
{
    const double length = hypot(x1 - x0, y1 - y0);
    if (!(length > 0))
        return;
    const double nx = -(y1 - y0) / length * width / 2, ny = (x1 - x0) / length * width / 2;
    const double xy[] = {x0 - nx, y0 - ny, x1 - nx, y1 - ny, x1 + nx, y1 + ny, x0 + nx, y0 + ny};
    plot_add_polygon(c, xy, 4);
}

static int plot_edge_order(const void *a, const void *b)
{
    const double ya = ((const plot_edge *)a)->y0, yb = ((const plot_edge *)b)->y0;
    return (ya > yb) - (ya < yb);
}

/* Adds the stretch x0 to x1 of one scan line to the coverage of a row. */
static void plot_cover(plot_canvas *c, double x0, double x1, double weight)
{
    int first, last;
    x0 = plot_clamp(x0, c->clip[0], c->clip[2]);
    x1 = plot_clamp(x1, c->clip[0], c->clip[2]);
    if (x0 >= x1)
        return;
    first = (int)x0;
    last = (int)x1;
    if (first == last) {
        c->cover[first] += weight * (x1 - x0);
        return;
    }
    c->cover[first] += weight * (first + 1 - x0);
    for (int x = first + 1; x < last; x++)
        c->cover[x] += weight;
    c->cover[last] += weight * (x1 - last);
}

/* The inside of a shape on one scan line: where edges add up to a turn that is
   not zero, so that shapes may overlap themselves, as strokes and glyphs do. */
static void plot_scan(plot_canvas *c, plot_edge *live, int count, double y, double weight)
{
    int turn = 0;
    for (int i = 0; i < count; i++) {
        const plot_edge e = live[i];
        const double x = e.x0 + (e.x1 - e.x0) * (y - e.y0) / (e.y1 - e.y0);
        int k = i;
        for (; k > 0 && live[k - 1].x > x; k--)
            live[k] = live[k - 1];
        live[k] = e;
        live[k].x = x;
    }
    for (int i = 0; i + 1 < count; i++) {
        turn += live[i].turn;
        if (turn)
            plot_cover(c, live[i].x, live[i + 1].x, weight);
    }
}

/* Blends a colour into the pixels from..to of a row as far as they are covered. */
static void plot_blend_row(plot_canvas *c, int row, int from, int to, unsigned colour)
{
    unsigned char *p = c->pixel + ((size_t)row * (size_t)c->columns + (size_t)from) * 3;
    for (int x = from; x < to; x++, p += 3) {
        const double a = fmin(c->cover[x], 1);
        for (int k = 0; a > 0 && k < 3; k++) {
            const double target = (double)(colour >> (16 - 8 * k) & 255);
            p[k] = (unsigned char)(p[k] + a * (target - p[k]) + 0.5);
        }
        c->cover[x] = 0;
    }
}

/* Fills the shape built so far, anti-aliased: exact along a scan line, by 16
   scan lines per pixel across. */
static void plot_fill(plot_canvas *c, unsigned colour)
{
    const int fine_rows = 16;
    plot_edge *live = c->edge + c->room;
    double bottom = 0, left = c->columns, right = 0;
    int next = 0, count = 0;
    if (c->failed || c->edges == 0)
        return;
    qsort(c->edge, (size_t)c->edges, sizeof *c->edge, plot_edge_order);
    for (int i = 0; i < c->edges; i++) {
        bottom = fmax(bottom, c->edge[i].y1);
        left = fmin(left, fmin(c->edge[i].x0, c->edge[i].x1));
        right = fmax(right, fmax(c->edge[i].x0, c->edge[i].x1));
    }
    const int from = (int)plot_clamp(c->edge[0].y0, c->clip[1], c->clip[3]);
    const int to = (int)ceil(plot_clamp(bottom, c->clip[1], c->clip[3]));
    for (int row = from; row < to; row++) {
        for (int fine = 0; fine < fine_rows; fine++) {
            const double y = row + (fine + 0.5) / fine_rows;
            int kept = 0;
            while (next < c->edges && c->edge[next].y0 <= y)
                live[count++] = c->edge[next++];
            for (int i = 0; i < count; i++)
                if (live[i].y1 > y)
                    live[kept++] = live[i];
            count = kept;
            plot_scan(c, live, count, y, 1.0 / fine_rows);
        }
        plot_blend_row(c, row, (int)plot_clamp(left, c->clip[0], c->clip[2]),
                       (int)ceil(plot_clamp(right, c->clip[0], c->clip[2])), colour);
    }
    c->edges = 0;
}

/* ---- canvas: primitives ------------------------------------------------- */

/* The nearest place between two pixels: filled boxes meet there without seams. */
static double plot_snap(const plot_canvas *c, double at)
{
    return floor(at * c->scale + 0.5) / c->scale;
}

/* Draws inside a box only, until plot_unclip. */
static void plot_clip(plot_canvas *c, double x, double y, double w, double h)
{
    c->clip[0] = (int)plot_clamp(floor(x * c->scale + 0.5), 0, c->columns);
    c->clip[1] = (int)plot_clamp(floor(y * c->scale + 0.5), 0, c->rows);
    c->clip[2] = (int)plot_clamp(floor((x + w) * c->scale + 0.5), 0, c->columns);
    c->clip[3] = (int)plot_clamp(floor((y + h) * c->scale + 0.5), 0, c->rows);
    plot_svg(c, "<svg x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
                "viewBox=\"%.2f %.2f %.2f %.2f\">\n", x, y, w, h, x, y, w, h);
}

static void plot_unclip(plot_canvas *c)
{
    plot_clip_none(c);
    plot_svg(c, "</svg>\n");
}

/* Gives what is drawn until plot_unhint a tooltip in the SVG. */
static void plot_hint(plot_canvas *c, const char *text)
{
    plot_svg(c, "<g><title>");
    plot_svg_text(c, text, text + strlen(text));
    plot_svg(c, "</title>");
}

static void plot_unhint(plot_canvas *c)
{
    plot_svg(c, "</g>\n");
}

/* A filled box, its sides between pixels. */
static void plot_box(plot_canvas *c, double x, double y, double w, double h, unsigned colour)
{
    const double left = plot_snap(c, x), top = plot_snap(c, y);
    w = plot_snap(c, x + w) - left;
    h = plot_snap(c, y + h) - top;
    plot_add_box(c, left, top, w, h, 1);
    plot_fill(c, colour);
    plot_svg(c, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"#%06x\" "
                "shape-rendering=\"crispEdges\"/>", left, top, w, h, colour);
}

/* The outline of a box. */
static void plot_frame(plot_canvas *c, double x, double y, double w, double h, unsigned colour,
                       double width)
{
    plot_add_box(c, x - width / 2, y - width / 2, w + width, h + width, 1);
    plot_add_box(c, x + width / 2, y + width / 2, w - width, h - width, -1);
    plot_fill(c, colour);
    plot_svg(c, "<rect x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" fill=\"none\" "
                "stroke=\"#%06x\" stroke-width=\"%.2f\"/>\n", x, y, w, h, colour, width);
}

/* Separate straight lines, four numbers each. */
static void plot_segments(plot_canvas *c, const double *xyxy, int count, unsigned colour,
                          double width)
{
    if (count == 0)
        return;
    plot_svg(c, "<path d=\"");
    for (int i = 0; i < count; i++, xyxy += 4) {
        plot_add_segment(c, xyxy[0], xyxy[1], xyxy[2], xyxy[3], width);
        plot_svg(c, "M%.2f %.2fL%.2f %.2f", xyxy[0], xyxy[1], xyxy[2], xyxy[3]);
    }
    plot_fill(c, colour);
    plot_svg(c, "\" stroke=\"#%06x\" stroke-width=\"%.2f\"/>\n", colour, width);
}

/* Dash patterns: lengths of on, off, on, off in line widths, 0 for a solid line. */
static const double plot_dashes[4][4] = {{0, 0, 0, 0}, {5, 2.2, 5, 2.2}, {1.2, 1.6, 1.2, 1.6},
                                         {6, 1.8, 1.4, 1.8}};

/* Adds the dashes of one line; place is how far the pattern has got. */
static void plot_add_dashes(plot_canvas *c, const double *p, const double *q, double width,
                            const double *dash, double *place)
{
    const double length = hypot(q[0] - p[0], q[1] - p[1]);
    const double dx = (q[0] - p[0]) / length, dy = (q[1] - p[1]) / length;
    const double period = width * (dash[0] + dash[1] + dash[2] + dash[3]);
    double at = 0;
    while (at < length) {
        double end = 0, step;
        int part = 0;
        for (; part < 4; part++)
            if (*place < (end += width * dash[part]) - 1e-9)
                break;
        step = fmin(end - *place, length - at);
        if (part % 2 == 0)
            plot_add_segment(c, p[0] + dx * at, p[1] + dy * at, p[0] + dx * (at + step),
                             p[1] + dy * (at + step), width);
        at += step;
        *place += step;
        if (*place >= period - 1e-9)
            *place = 0;
    }
}

/* A line through points; dash is 0 to 3, a row of plot_dashes. */
static void plot_polyline(plot_canvas *c, const double *xy, int count, unsigned colour,
                          double width, int dash)
{
    const double *d = plot_dashes[dash];
    double place = 0;
    if (count == 0)
        return;
    plot_svg(c, "<path d=\"M%.2f %.2fL%.2f %.2f", xy[0], xy[1], xy[0], xy[1]);
    for (int i = 0; i < count; i++) {
        const double *p = xy + 2 * i;
        if (i > 0 && dash == 0)
            plot_add_segment(c, p[-2], p[-1], p[0], p[1], width);
        if (i > 0 && dash > 0)
            plot_add_dashes(c, p - 2, p, width, d, &place);
        if (dash == 0 || count == 1)
            plot_add_disc(c, p[0], p[1], width / 2, 1);
        if (i > 0)
            plot_svg(c, " %.2f %.2f", p[0], p[1]);
    }
    plot_fill(c, colour);
    plot_svg(c, "\" fill=\"none\" stroke=\"#%06x\" stroke-width=\"%.2f\" stroke-linejoin=\"round\"",
             colour, width);
    if (dash == 0 || count == 1)
        plot_svg(c, " stroke-linecap=\"round\"/>\n");
    else
        plot_svg(c, " stroke-dasharray=\"%.2f %.2f %.2f %.2f\"/>\n", d[0] * width, d[1] * width,
                 d[2] * width, d[3] * width);
}

static void plot_polygon(plot_canvas *c, const double *xy, int count, unsigned colour)
{
    plot_svg(c, "<polygon points=\"");
    for (int i = 0; i < count; i++)
        plot_svg(c, " %.2f,%.2f", xy[2 * i], xy[2 * i + 1]);
    plot_svg(c, "\" fill=\"#%06x\"/>\n", colour);
    plot_add_polygon(c, xy, count);
    plot_fill(c, colour);
}

/* A circle without filling, transparent to the mouse so as not to hide a hint. */
static void plot_ring(plot_canvas *c, double x, double y, double radius, unsigned colour,
                      double width)
{
    plot_add_disc(c, x, y, radius + width / 2, 1);
    plot_add_disc(c, x, y, radius - width / 2, -1);
    plot_fill(c, colour);
    plot_svg(c, "<circle cx=\"%.2f\" cy=\"%.2f\" r=\"%.2f\" fill=\"none\" stroke=\"#%06x\" "
                "stroke-width=\"%.2f\" pointer-events=\"none\"/>\n", x, y, radius, colour, width);
}

/* Text is set along (dx, dy): (1, 0) to the right, (0, -1) upwards. */
typedef struct {
    double x, y, dx, dy;
} plot_pen;

/* Adds an edge of a glyph, y upwards from the base line. */
static void plot_pen_edge(plot_canvas *c, const plot_pen *pen, const double *p, const double *q)
{
    const double dx = pen->dx, dy = pen->dy;
    plot_add_edge(c, pen->x + p[0] * dx + p[1] * dy, pen->y + p[0] * dy - p[1] * dx,
                  pen->x + q[0] * dx + q[1] * dy, pen->y + q[0] * dy - q[1] * dx);
}

/* Adds the outline of a glyph, its curves as short lines. */
static void plot_add_glyph(plot_canvas *c, const plot_pen *pen, int glyph, double unit)
{
    stbtt_vertex *v = NULL;
    const int count = stbtt_GetGlyphShape(&c->style->font, glyph, &v);
    double at[2] = {0, 0};
    for (int i = 0; i < count; i++) {
        const double p[2] = {at[0], at[1]}, q[2] = {v[i].x * unit, v[i].y * unit};
        const double m[2] = {v[i].cx * unit, v[i].cy * unit};
        const int steps = v[i].type == STBTT_vcurve ? 8 : 1;
        for (int k = 1; v[i].type != STBTT_vmove && k <= steps; k++) {
            const double t = (double)k / steps, s = 1 - t;
            double next[2];
            for (int j = 0; j < 2; j++)
                next[j] = steps == 1 ? q[j] : s * s * p[j] + 2 * s * t * m[j] + t * t * q[j];
            plot_pen_edge(c, pen, at, next);
            at[0] = next[0];
            at[1] = next[1];
        }
        at[0] = q[0];
        at[1] = q[1];
    }
    stbtt_FreeShape(&c->style->font, v);
}

/* One line of text; x, y is where its base line starts. */
static void plot_text_line(plot_canvas *c, plot_pen pen, const char *text, const char *end,
                           double size)
{
    const stbtt_fontinfo *font = &c->style->font;
    const double unit = size * (double)stbtt_ScaleForMappingEmToPixels(font, 1);
    int last = 0, advance, bearing;
    while (text < end) {
        const int glyph = stbtt_FindGlyphIndex(font, plot_utf8(&text));
        const double kern = last ? unit * stbtt_GetGlyphKernAdvance(font, last, glyph) : 0;
        pen.x += kern * pen.dx;
        pen.y += kern * pen.dy;
        plot_add_glyph(c, &pen, glyph, unit);
        stbtt_GetGlyphHMetrics(font, glyph, &advance, &bearing);
        pen.x += advance * unit * pen.dx;
        pen.y += advance * unit * pen.dy;
        last = glyph;
    }
    plot_fill(c, PLOT_BLACK);
}

/* Black text, its lines broken at '\n'. x, y is on the base line of the first
   line: at its start (align 0), middle (0.5) or end (1). upward: turned to run
   from bottom to top, further lines on the right. */
static void plot_text(plot_canvas *c, double x, double y, const char *text, double size,
                      double align, int upward)
{
    static const char *const anchors[] = {"start", "middle", "end"};
    for (int line = 0; *text; line++) {
        const char *end = text + strcspn(text, "\n");
        const double back = align * plot_width(c->style, text, end, size);
        const double down = line * PLOT_LEADING * size;
        plot_pen pen;
        pen.dx = upward ? 0 : 1;
        pen.dy = upward ? -1 : 0;
        pen.x = x - back * pen.dx - down * pen.dy;
        pen.y = y - back * pen.dy + down * pen.dx;
        plot_text_line(c, pen, text, end, size);
        plot_svg(c, "<text x=\"%.2f\" y=\"%.2f\" font-size=\"%.2f\" text-anchor=\"%s\"",
                 pen.x + back * pen.dx, pen.y + back * pen.dy, size, anchors[(int)(2 * align)]);
        if (upward)
            plot_svg(c, " transform=\"rotate(-90 %.2f %.2f)\"", pen.x, pen.y + back * pen.dy);
        plot_svg(c, ">");
        plot_svg_text(c, text, end);
        plot_svg(c, "</text>\n");
        text = *end ? end + 1 : end;
    }
}

/* A wrapped text, centred at x below top, or upward: at y to the right of x. */
static void plot_put_block(plot_canvas *c, double x, double y, const plot_block *block,
                           double size, int upward)
{
    plot_text(c, upward ? x + 0.95 * size : x, upward ? y : y + 0.95 * size, block->text, size,
              0.5, upward);
}

/* A grey image with zoom pixels of the canvas to every one of its pixels. */
static void plot_picture(plot_canvas *c, double x, double y, const unsigned char *image,
                         int height, int width, int zoom)
{
    const int w = width * zoom, h = height * zoom;
    const int left = (int)(x * c->scale + 0.5), top = (int)(y * c->scale + 0.5);
    unsigned char *large = (unsigned char *)malloc((size_t)w * (size_t)h);
    plot_buffer png;
    memset(&png, 0, sizeof png);
    c->failed |= !large;
    for (int i = 0; !c->failed && i < h; i++)
        for (int j = 0; j < w; j++) {
            const unsigned char grey = image[i / zoom * width + j / zoom];
            large[i * w + j] = grey;
            if (top + i < c->rows && left + j < c->columns)
                memset(c->pixel + ((size_t)(top + i) * (size_t)c->columns + (size_t)(left + j)) * 3,
                       grey, 3);
        }
    if (!c->failed)
        plot_png(&png, large, w, h, 1);
    plot_svg(c, "<image x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" "
                "image-rendering=\"pixelated\" xlink:href=\"data:image/png;base64,",
             left / c->scale, top / c->scale, w / c->scale, h / c->scale);
    plot_base64(&c->svg, &png);
    plot_svg(c, "\"/>\n");
    c->failed |= png.failed;
    free(png.data);
    free(large);
}

/* ---- heatmaps ----------------------------------------------------------- */

static void plot_panel_defaults(plot_panel *panel)
{
    memset(panel, 0, sizeof *panel);
}

static void plot_heat_defaults(plot_heat_options *options)
{
    memset(options, 0, sizeof *options);
    options->map = PLOT_JET;
    options->log_scale = 1;
    options->lo = options->hi = NAN;
    options->diverged_note = "diverged";
    options->missing_note = "not run";
}

static int plot_best(const double *value, int count, int k, int *index)
{
    int found = 0;
    for (int i = 0; i < count; i++) {
        int at = found;
        if (!isfinite(value[i]))
            continue;
        while (at > 0 && value[index[at - 1]] > value[i])
            at--;
        if (at >= k)
            continue;
        found = found < k ? found + 1 : k;
        for (int j = found - 1; j > at; j--)
            index[j] = index[j - 1];
        index[at] = i;
    }
    return found;
}

/* What a cell shows. */
typedef enum { PLOT_VALUE, PLOT_DIVERGED, PLOT_MISSING } plot_cell_kind;

static plot_cell_kind plot_kind(double value)
{
    return isfinite(value) ? PLOT_VALUE : isinf(value) && value < 0 ? PLOT_MISSING : PLOT_DIVERGED;
}

enum { PLOT_KEYS = 3 };

/* The measured figure: room for everything, before anything is drawn. */
typedef struct {
    const plot_style *style;
    const plot_panel *panel;
    int count;
    const plot_heat_options *o;
    double em;                      /* font size */
    int columns, rows;              /* of panels */
    int own_x, own_y;               /* ticks (and label) at every panel */
    int upright;                    /* tick labels below are turned */
    double panel_w, panel_h;
    double head, side, foot;        /* room for texts above, left of, below a panel */
    double tick_w, tick_h;          /* room for ticks with labels, part of side and foot */
    double pitch_x, pitch_y;        /* from panel to panel */
    double x, y, w, h;              /* all panels: frames only */
    double width, height;           /* of the figure */
    double bar_x, bar_y, bar_w, bar_h;
    plot_axis data, axis;           /* range of the values, of the colours */
    plot_ticks ticks;
    const char *key[PLOT_KEYS];     /* names of the kinds of cells that occur; that of
                                       PLOT_VALUE is the rings' */
    int key_rows;
    double key_width, key_y;
    plot_block title, xlabel, ylabel, bar_label;
} plot_heat;

/* Whether two panels have the same tick labels. */
static int plot_same(const char *const *a, int na, const char *const *b, int nb)
{
    int same = na == nb && !a == !b;
    for (int i = 0; same && a && i < na; i++)
        same = a[i] == b[i] || (a[i] && b[i] && !strcmp(a[i], b[i]));
    return same;
}

static const char *plot_heat_data(plot_heat *f, plot_style *style)
{
    const char *error;
    int seen[PLOT_KEYS] = {0, 0, 0};
    f->axis.lo = f->axis.hi = NAN;
    f->axis.log = f->o->log_scale;
    for (int i = 0; i < f->count; i++) {
        const plot_panel *p = &f->panel[i];
        if (!p->value || p->rows < 1 || p->cols < 1)
            return plot_fail(style, "panel %d of a heatmap has no values", i + 1);
        for (int k = 0; k < p->rows * p->cols; k++) {
            plot_extend(&f->axis, p->value[k]);
            seen[plot_kind(p->value[k])] = 1;
        }
        for (int k = 0; k < p->circles; k++)
            if (p->circle[k] < 0 || p->circle[k] >= p->rows * p->cols)
                return plot_fail(style, "panel %d of a heatmap circles a cell it has not", i + 1);
        f->own_x |= p->xlabel || !plot_same(p->xticks, p->cols, f->panel->xticks, f->panel->cols);
        f->own_y |= p->ylabel || !plot_same(p->yticks, p->rows, f->panel->yticks, f->panel->rows);
        if (p->circles)
            f->key[PLOT_VALUE] = f->o->circle_note;
    }
    f->data = f->axis;
    f->key[PLOT_DIVERGED] = seen[PLOT_DIVERGED] ? f->o->diverged_note : NULL;
    f->key[PLOT_MISSING] = seen[PLOT_MISSING] ? f->o->missing_note : NULL;
    error = plot_settle(&f->axis, f->o->lo, f->o->hi, 0);
    return error ? plot_fail(style, "heatmap: %s", error) : NULL;
}

/* Whether values lie beyond the upper or else the lower limit of the colours:
   the bar then ends in a tip, one em high. */
static int plot_beyond(const plot_heat *f, int upper)
{
    return upper ? f->data.hi > f->axis.hi : f->data.lo < f->axis.lo;
}

/* Room for the texts that panels have around them: the largest of each kind. */
static void plot_heat_rooms(plot_heat *f)
{
    double xticks = 0, xlabels = 0, ylabels = 0;
    for (int i = 0; i < f->count; i++) {
        const plot_panel *p = &f->panel[i];
        const double wide = plot_widest(f->style, p->xticks, p->cols);
        f->upright |= wide + 0.6 * f->em > f->panel_w / p->cols;
        xticks = fmax(xticks, wide);
        f->tick_w = fmax(f->tick_w, plot_widest(f->style, p->yticks, p->rows));
        f->head = fmax(f->head, plot_wrap(f->style, p->title, f->em, f->panel_w).height);
        xlabels = fmax(xlabels, plot_wrap(f->style, p->xlabel, f->em, f->panel_w).height);
        ylabels = fmax(ylabels, plot_wrap(f->style, p->ylabel, f->em, f->panel_h).height);
    }
    if (f->tick_w > 0)
        f->tick_w += PLOT_TICK + 0.3 * f->em;
    if (xticks > 0)
        f->tick_h = (f->upright ? xticks : f->em) + PLOT_TICK + 0.3 * f->em;
    f->head += f->head > 0 ? 0.2 * f->em : 0;
    f->side = f->tick_w + (ylabels > 0 ? ylabels + 0.3 * f->em : 0);
    f->foot = f->tick_h + (xlabels > 0 ? xlabels + 0.3 * f->em : 0);
}

/* One row of the key if it fits into the figure, one entry per row otherwise. */
static void plot_heat_key(plot_heat *f, double room)
{
    int entries = 0;
    double widest = 0;
    f->key_width = 0;
    for (int i = 0; i < PLOT_KEYS; i++)
        if (f->key[i]) {
            const double wide = 1.6 * f->em + plot_text_width(f->style, f->key[i], f->em);
            f->key_width += wide + (entries++ ? 1.6 * f->em : 0);
            widest = fmax(widest, wide);
        }
    f->key_rows = entries > 0;
    if (f->key_width > room) {
        f->key_width = widest;
        f->key_rows = entries;
    }
}

static void plot_heat_layout(plot_heat *f)
{
    static const double widths[] = {28, 20, 18, 15.5, 13};     /* by number of columns */
    const double em = f->em, margin = 0.6 * em, gap = 1.2 * em;
    double centre, room, below;
    f->columns = f->o->columns > 0 ? f->o->columns
               : f->count <= 4 ? f->count : (int)ceil(sqrt(f->count));
    f->columns = f->columns < f->count ? f->columns : f->count;
    f->rows = (f->count + f->columns - 1) / f->columns;
    f->panel_w = f->o->panel_width > 0 ? f->o->panel_width
               : em * widths[f->columns > 5 || f->rows > 2 ? 4 : f->columns - 1];
    f->panel_h = f->panel_w * f->panel->rows / f->panel->cols;
    plot_heat_rooms(f);
    f->pitch_x = f->panel_w + gap + (f->own_y ? f->side : 0);
    f->pitch_y = f->panel_h + f->head + 0.8 * em + (f->own_x ? f->foot : 0);
    f->w = f->pitch_x * (f->columns - 1) + f->panel_w;
    f->h = f->pitch_y * (f->rows - 1) + f->panel_h;
    f->bar_h = f->h - (plot_beyond(f, 0) + plot_beyond(f, 1)) * em;
    plot_ticks_make(&f->ticks, &f->axis, f->bar_h, 1.6 * em);

    /* from left to right; labels along an axis may be a little longer than it */
    f->ylabel = plot_wrap(f->style, f->o->ylabel, em, f->h + 2 * fmin(f->head, f->foot));
    f->bar_label = plot_wrap(f->style, f->o->bar_label, em, f->h);
    f->x = margin + (f->ylabel.lines ? f->ylabel.height + 0.4 * em : 0) + f->side;
    f->bar_x = f->x + f->w + 1.4 * em;
    f->bar_w = 1.2 * em;
    f->width = f->bar_x + f->bar_w + PLOT_TICK + 0.3 * em + plot_ticks_width(f->style, &f->ticks) +
               (f->bar_label.lines ? f->bar_label.height + 0.5 * em : 0) + margin;
    centre = f->x + f->w / 2;
    room = 2 * fmin(centre - margin, f->width - margin - centre);

    /* from top to bottom */
    f->title = plot_wrap(f->style, f->o->title, PLOT_TITLE * em, room);
    f->xlabel = plot_wrap(f->style, f->o->xlabel, em, room);
    f->y = margin + (f->title.lines ? f->title.height + 0.5 * em : 0) + f->head;
    plot_heat_key(f, room);
    below = f->y + f->h + f->foot + (f->xlabel.lines ? f->xlabel.height + 0.4 * em : 0);
    f->key_y = below + 0.6 * em;
    f->height = (f->key_rows ? f->key_y + 1.5 * em * f->key_rows : below) + margin;
}

/* A box hatched from bottom left to top right. */
static void plot_hatch(plot_canvas *c, double x, double y, double w, double h)
{
    enum { MOST = 16 };
    double xyxy[4 * 2 * MOST];
    const int lines = (int)plot_clamp(fmin(w, h) / 3.4, 2, MOST);
    plot_box(c, x, y, w, h, 0xd4d4d4);
    for (int i = 0; i < 2 * lines; i++) {
        /* the line u + v = at, where u, v run from 0 to 1 across the box */
        const double at = (i + 0.5) / lines, u = fmax(0, at - 1), v = fmin(1, at);
        xyxy[4 * i] = x + u * w;
        xyxy[4 * i + 1] = y + v * h;
        xyxy[4 * i + 2] = x + v * w;
        xyxy[4 * i + 3] = y + u * h;
    }
    plot_segments(c, xyxy, 2 * lines, PLOT_GREY, 0.5);
}

/* An empty box with a thin cross. */
static void plot_cross(plot_canvas *c, double x, double y, double w, double h)
{
    const double a = 0.3, b = 0.7;
    const double xyxy[] = {x + a * w, y + a * h, x + b * w, y + b * h,
                           x + a * w, y + b * h, x + b * w, y + a * h};
    plot_box(c, x, y, w, h, PLOT_WHITE);
    plot_segments(c, xyxy, 2, 0xb0b0b0, 0.5);
}

/* A black ring; the white edge shows it on dark cells. */
static void plot_mark(plot_canvas *c, double x, double y, double cell)
{
    const double radius = 0.34 * cell, width = plot_clamp(0.09 * cell, 0.9, 1.6);
    plot_ring(c, x, y, radius, PLOT_WHITE, width + 1.1);
    plot_ring(c, x, y, radius, PLOT_BLACK, width);
}

static void plot_heat_cell(plot_canvas *c, const plot_heat *f, const plot_panel *p, int row,
                           int col, const double *box)
{
    const double value = p->value[row * p->cols + col];
    const plot_cell_kind kind = plot_kind(value);
    char hint[256], number[32];
    const char *note = f->key[kind] ? f->key[kind] : "no value";
    snprintf(number, sizeof number, "%.5g", value);
    if (kind == PLOT_VALUE)
        note = number;
    if (p->xticks && p->xticks[col] && p->yticks && p->yticks[row])
        snprintf(hint, sizeof hint, "%.60s, %.60s: %.60s", p->xticks[col], p->yticks[row], note);
    else
        snprintf(hint, sizeof hint, "%.60s", note);
    plot_hint(c, hint);
    if (kind == PLOT_DIVERGED)
        plot_hatch(c, box[0], box[1], box[2], box[3]);
    else if (kind == PLOT_MISSING)
        plot_cross(c, box[0], box[1], box[2], box[3]);
    else
        plot_box(c, box[0], box[1], box[2], box[3],
                 plot_colour(f->o->map, plot_unit(&f->axis, value)));
    plot_unhint(c);
}

/* The box of a cell: x, y, width, height, its sides between pixels. */
static void plot_cell_box(const plot_canvas *c, const plot_heat *f, const plot_panel *p, double x,
                          double y, int cell, double *box)
{
    const double w = f->panel_w / p->cols, h = f->panel_h / p->rows;
    const int row = cell / p->cols, col = cell % p->cols;
    box[0] = plot_snap(c, x + col * w);
    box[1] = plot_snap(c, y + (p->rows - 1 - row) * h);
    box[2] = plot_snap(c, x + (col + 1) * w) - box[0];
    box[3] = plot_snap(c, y + (p->rows - row) * h) - box[1];
}

/* Tick labels below and on the left of a panel; where cells are too narrow for
   the text, every second (third, ...) has one. */
static void plot_heat_ticks(plot_canvas *c, const plot_heat *f, const plot_panel *p, double x,
                            double y, int below, int left)
{
    const double em = f->em, w = f->panel_w / p->cols, h = f->panel_h / p->rows;
    const double bottom = y + f->panel_h, far = PLOT_TICK + 0.3 * em;
    const int skip_x = f->upright ? (int)ceil(1.05 * em / w) : 1, skip_y = (int)ceil(1.05 * em / h);
    for (int i = 0; below && p->xticks && i < p->cols; i += skip_x) {
        const double at = x + (i + 0.5) * w, tick[] = {at, bottom, at, bottom + PLOT_TICK};
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        if (p->xticks[i] && f->upright)
            plot_text(c, at + PLOT_DIGIT / 2 * em, bottom + far, p->xticks[i], em, 1, 1);
        else if (p->xticks[i])
            plot_text(c, at, bottom + far + PLOT_DIGIT * em, p->xticks[i], em, 0.5, 0);
    }
    for (int i = 0; left && p->yticks && i < p->rows; i += skip_y) {
        const double at = bottom - (i + 0.5) * h, tick[] = {x - PLOT_TICK, at, x, at};
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        if (p->yticks[i])
            plot_text(c, x - far, at + PLOT_DIGIT / 2 * em, p->yticks[i], em, 1, 0);
    }
}

static void plot_heat_panel(plot_canvas *c, const plot_heat *f, int index)
{
    const plot_panel *p = &f->panel[index];
    const double x = plot_snap(c, f->x + index % f->columns * f->pitch_x);
    const double y = plot_snap(c, f->y + index / f->columns * f->pitch_y);
    const double em = f->em;
    const plot_block title = plot_wrap(f->style, p->title, em, f->panel_w);
    const plot_block xlabel = plot_wrap(f->style, p->xlabel, em, f->panel_w);
    const plot_block ylabel = plot_wrap(f->style, p->ylabel, em, f->panel_h);
    double box[4];
    for (int i = 0; i < p->rows * p->cols; i++) {
        plot_cell_box(c, f, p, x, y, i, box);
        plot_heat_cell(c, f, p, i / p->cols, i % p->cols, box);
    }
    for (int i = 0; i < p->circles; i++) {
        plot_cell_box(c, f, p, x, y, p->circle[i], box);
        plot_mark(c, box[0] + box[2] / 2, box[1] + box[3] / 2, fmin(box[2], box[3]));
    }
    plot_frame(c, x, y, f->panel_w, f->panel_h, PLOT_BLACK, PLOT_HAIR);
    plot_heat_ticks(c, f, p, x, y, f->own_x || index + f->columns >= f->count,
                    f->own_y || index % f->columns == 0);
    plot_put_block(c, x + f->panel_w / 2, y - 0.3 * em - title.height, &title, em, 0);
    plot_put_block(c, x + f->panel_w / 2, y + f->panel_h + f->tick_h + 0.2 * em, &xlabel, em, 0);
    plot_put_block(c, x - f->tick_w - 0.2 * em - ylabel.height, y + f->panel_h / 2, &ylabel, em, 1);
}

/* The tip of the bar for values beyond the limits; up is 1 or -1. */
static void plot_heat_tip(plot_canvas *c, const plot_heat *f, int up)
{
    const double base = f->bar_y + (up > 0 ? 0 : f->bar_h), mid = f->bar_x + f->bar_w / 2;
    const double xy[] = {f->bar_x, base, mid, base - up * f->em, f->bar_x + f->bar_w, base};
    plot_polygon(c, xy, 3, plot_colour(f->o->map, up > 0));
    plot_polyline(c, xy, 3, PLOT_BLACK, PLOT_HAIR, 0);
}

static void plot_heat_bar(plot_canvas *c, const plot_heat *f)
{
    const double em = f->em, right = f->bar_x + f->bar_w, bottom = f->bar_y + f->bar_h;
    const int steps = 256;
    const double label_x = f->width - 0.6 * em - f->bar_label.height, step = f->bar_h / steps;
    for (int i = 0; i < steps; i++)
        plot_box(c, f->bar_x, bottom - (i + 1) * step, f->bar_w, step,
                 plot_colour(f->o->map, (i + 0.5) / steps));
    for (int up = 0; up < 2; up++)
        if (plot_beyond(f, up))
            plot_heat_tip(c, f, up ? 1 : -1);
    plot_frame(c, f->bar_x, f->bar_y, f->bar_w, f->bar_h, PLOT_BLACK, PLOT_HAIR);
    for (int i = 0; i < f->ticks.count; i++) {
        const double at = bottom - f->bar_h * plot_unit(&f->axis, f->ticks.at[i]);
        const double tick[] = {right, at, right + PLOT_TICK * (f->ticks.label[i][0] ? 1 : 0.6), at};
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        plot_text(c, right + PLOT_TICK + 0.3 * em, at + PLOT_DIGIT / 2 * em, f->ticks.label[i], em,
                  0, 0);
    }
    plot_put_block(c, label_x, f->y + f->h / 2, &f->bar_label, em, 1);
}

/* Small samples of the special cells with their names. */
static void plot_heat_notes(plot_canvas *c, const plot_heat *f)
{
    const double em = f->em, left = f->x + f->w / 2 - f->key_width / 2;
    double x = left, y = f->key_y;
    for (int i = 0; i < PLOT_KEYS; i++) {
        if (!f->key[i])
            continue;
        if (i == PLOT_DIVERGED)
            plot_hatch(c, x, y, em, em);
        else if (i == PLOT_MISSING)
            plot_cross(c, x, y, em, em);
        if (i == PLOT_VALUE)
            plot_ring(c, x + em / 2, y + em / 2, 0.45 * em, PLOT_BLACK, 1);
        else
            plot_frame(c, x, y, em, em, PLOT_GREY, 0.5);
        plot_text(c, x + 1.6 * em, y + (0.5 + PLOT_DIGIT / 2) * em, f->key[i], em, 0, 0);
        if (f->key_rows > 1)
            y += 1.5 * em;
        else
            x += 3.2 * em + plot_text_width(f->style, f->key[i], em);
    }
}

static const char *plot_heatmaps(plot_style *style, const char *path, const plot_panel *panel,
                                 int count, const plot_heat_options *options)
{
    plot_heat f;
    plot_canvas c;
    const char *error;
    memset(&f, 0, sizeof f);
    f.style = style;
    f.panel = panel;
    f.count = count;
    f.o = options;
    f.em = style->font_size;
    if (count < 1)
        return plot_fail(style, "a figure of heatmaps needs a panel");
    error = plot_heat_data(&f, style);
    if (error)
        return error;
    plot_heat_layout(&f);
    plot_canvas_open(&c, style, f.width, f.height);
    f.x = plot_snap(&c, f.x);
    f.y = plot_snap(&c, f.y);
    f.bar_y = f.y + plot_beyond(&f, 1) * f.em;
    for (int i = 0; i < count; i++)
        plot_heat_panel(&c, &f, i);
    plot_heat_bar(&c, &f);
    plot_heat_notes(&c, &f);
    plot_put_block(&c, f.x + f.w / 2, 0.6 * f.em, &f.title, PLOT_TITLE * f.em, 0);
    plot_put_block(&c, f.x + f.w / 2, f.y + f.h + f.foot + 0.3 * f.em, &f.xlabel, f.em, 0);
    plot_put_block(&c, 0.6 * f.em, f.y + f.h / 2, &f.ylabel, f.em, 1);
    return plot_canvas_close(&c, style, path);
}

/* ---- lines -------------------------------------------------------------- */

enum { PLOT_COLOURS = 8, PLOT_DASHES = 4 };

/* After Okabe and Ito, told apart with colour-blindness too; wine in place of
   their yellow, which is hard to see on white. */
static const unsigned plot_palette[PLOT_COLOURS] = {0x0072b2, 0xd55e00, 0x009e73, 0xcc79a7,
                                                    0x000000, 0xe69f00, 0x56b4e9, 0x882255};

static void plot_lines_defaults(plot_lines_options *options)
{
    memset(options, 0, sizeof *options);
    options->xlo = options->xhi = options->ylo = options->yhi = NAN;
    options->width = 320;
    options->height = 210;
}

/* The measured figure. */
typedef struct {
    const plot_style *style;
    const plot_series *series;
    int count;
    const plot_lines_options *o;
    double em;
    plot_axis x_axis, y_axis;
    plot_ticks x_ticks, y_ticks;
    double x, y, w, h;              /* of the axes */
    double legend_x, legend_h;
    double width, height;
    plot_block title, xlabel, ylabel;
} plot_chart;

static int plot_on_axes(const plot_chart *f, double x, double y)
{
    return isfinite(x) && isfinite(y) && (x > 0 || !f->x_axis.log) && (y > 0 || !f->y_axis.log);
}

static const char *plot_chart_data(plot_chart *f, plot_style *style)
{
    const plot_lines_options *o = f->o;
    const char *error;
    f->x_axis.log = o->log_x;
    f->y_axis.log = o->log_y;
    f->x_axis.lo = f->x_axis.hi = f->y_axis.lo = f->y_axis.hi = NAN;
    for (int i = 0; i < f->count; i++) {
        const plot_series *s = &f->series[i];
        if (s->count > 0 && (!s->x || !s->y))
            return plot_fail(style, "series %d of a line plot has no values", i + 1);
        for (int k = 0; k < s->count; k++)
            if (plot_on_axes(f, s->x[k], s->y[k])) {
                plot_extend(&f->x_axis, s->x[k]);
                plot_extend(&f->y_axis, s->y[k]);
            }
    }
    error = plot_settle(&f->x_axis, o->xlo, o->xhi, 0);
    if (!error)
        error = plot_settle(&f->y_axis, o->ylo, o->yhi, 0.04);
    return error ? plot_fail(style, "line plot: %s", error) : NULL;
}

static void plot_chart_layout(plot_chart *f)
{
    const double em = f->em, margin = 0.6 * em;
    double centre, room, names = 0;
    int named = 0;
    f->w = f->o->width;
    f->h = f->o->height;
    for (int i = 0; i < f->count; i++)
        if (f->series[i].name) {
            names = fmax(names, plot_text_width(f->style, f->series[i].name, em));
            named++;
        }
    plot_ticks_make(&f->y_ticks, &f->y_axis, f->h, 2 * em);
    plot_ticks_make(&f->x_ticks, &f->x_axis, f->w, 4 * em);
    if (plot_ticks_width(f->style, &f->x_ticks) > 3 * em)
        plot_ticks_make(&f->x_ticks, &f->x_axis, f->w,
                        plot_ticks_width(f->style, &f->x_ticks) + em);
    f->legend_h = 1.35 * em * named;
    f->ylabel = plot_wrap(f->style, f->o->ylabel, em, f->h);
    f->x = margin + (f->ylabel.lines ? f->ylabel.height + 0.4 * em : 0) +
           plot_ticks_width(f->style, &f->y_ticks) + PLOT_TICK + 0.3 * em;
    f->legend_x = f->x + f->w + em;
    /* without a legend, the last label on the x axis still needs its half */
    f->width = (named ? f->legend_x + 3 * em + names : f->x + f->w + 2 * em) + margin;
    centre = f->x + f->w / 2;
    room = 2 * fmin(centre - margin, f->width - margin - centre);
    f->title = plot_wrap(f->style, f->o->title, PLOT_TITLE * em, room);
    f->xlabel = plot_wrap(f->style, f->o->xlabel, em, room);
    f->y = margin + (f->title.lines ? f->title.height : 0) + 0.5 * em;
    f->height = f->y + fmax(f->legend_h, f->h + PLOT_TICK + 0.3 * em + em +
                            (f->xlabel.lines ? f->xlabel.height + 0.4 * em : 0)) + margin;
}

/* Grid lines, ticks and frame. */
static void plot_chart_axes(plot_canvas *c, const plot_chart *f)
{
    const double em = f->em, bottom = f->y + f->h, far = PLOT_TICK + 0.3 * em;
    for (int i = 0; i < f->x_ticks.count; i++) {
        const char *label = f->x_ticks.label[i];
        const double at = f->x + f->w * plot_unit(&f->x_axis, f->x_ticks.at[i]);
        const double tick[] = {at, bottom, at, bottom + PLOT_TICK * (*label ? 1 : 0.6)};
        const double grid[] = {at, f->y, at, bottom};
        plot_segments(c, grid, *label ? 1 : 0, PLOT_PALE, 0.5);
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        plot_text(c, at, bottom + far + PLOT_DIGIT * em, label, em, 0.5, 0);
    }
    for (int i = 0; i < f->y_ticks.count; i++) {
        const char *label = f->y_ticks.label[i];
        const double at = bottom - f->h * plot_unit(&f->y_axis, f->y_ticks.at[i]);
        const double tick[] = {f->x - PLOT_TICK * (*label ? 1 : 0.6), at, f->x, at};
        const double grid[] = {f->x, at, f->x + f->w, at};
        plot_segments(c, grid, *label ? 1 : 0, PLOT_PALE, 0.5);
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        plot_text(c, f->x - far, at + PLOT_DIGIT / 2 * em, label, em, 1, 0);
    }
}

static void plot_chart_stroke(plot_canvas *c, const plot_chart *f, int index, const double *xy,
                              int count)
{
    const plot_series *s = &f->series[index];
    const int colour = s->colour > 0 ? s->colour - 1 : index;
    const int dash = s->dash > 0 ? s->dash - 1 : index / PLOT_COLOURS;
    /* a point between two gaps is a dot, which must be larger to be seen */
    plot_polyline(c, xy, count, plot_palette[colour % PLOT_COLOURS], count == 1 ? 2.6 : 1.2,
                  dash % PLOT_DASHES);
}

/* One series, its gaps left out. Points so close that the eye cannot tell them
   apart are drawn once, which keeps the SVG of long curves small. */
static void plot_chart_series(plot_canvas *c, const plot_chart *f, int index)
{
    const plot_series *s = &f->series[index];
    double *xy = (double *)malloc(2 * ((size_t)s->count + 1) * sizeof *xy);
    int kept = 0;
    c->failed |= !xy;
    for (int i = 0; xy && i < s->count; i++) {
        double x, y;
        if (!plot_on_axes(f, s->x[i], s->y[i])) {
            plot_chart_stroke(c, f, index, xy, kept);
            kept = 0;
            continue;
        }
        /* far outside is as good as very far */
        x = f->x + f->w * plot_clamp(plot_unit(&f->x_axis, s->x[i]), -9, 9);
        y = f->y + f->h * (1 - plot_clamp(plot_unit(&f->y_axis, s->y[i]), -9, 9));
        if (kept && hypot(x - xy[2 * kept - 2], y - xy[2 * kept - 1]) < 0.1)
            continue;
        xy[2 * kept] = x;
        xy[2 * kept++ + 1] = y;
    }
    if (xy)
        plot_chart_stroke(c, f, index, xy, kept);
    free(xy);
}

static void plot_chart_legend(plot_canvas *c, const plot_chart *f)
{
    const double em = f->em;
    double y = f->y + fmax(0, (f->h - f->legend_h) / 2) + 0.675 * em;
    for (int i = 0; i < f->count; i++) {
        const double xy[] = {f->legend_x, y, f->legend_x + 2.5 * em, y};
        if (!f->series[i].name)
            continue;
        plot_chart_stroke(c, f, i, xy, 2);
        plot_text(c, f->legend_x + 3 * em, y + PLOT_DIGIT / 2 * em, f->series[i].name, em, 0, 0);
        y += 1.35 * em;
    }
}

static const char *plot_lines(plot_style *style, const char *path, const plot_series *series,
                              int count, const plot_lines_options *options)
{
    plot_chart f;
    plot_canvas c;
    const char *error;
    memset(&f, 0, sizeof f);
    f.style = style;
    f.series = series;
    f.count = count;
    f.o = options;
    f.em = style->font_size;
    error = plot_chart_data(&f, style);
    if (error)
        return error;
    plot_chart_layout(&f);
    plot_canvas_open(&c, style, f.width, f.height);
    f.x = plot_snap(&c, f.x);
    f.y = plot_snap(&c, f.y);
    plot_chart_axes(&c, &f);
    plot_clip(&c, f.x, f.y, f.w, f.h);
    for (int i = 0; i < count; i++)
        plot_chart_series(&c, &f, i);
    plot_unclip(&c);
    plot_frame(&c, f.x, f.y, f.w, f.h, PLOT_BLACK, PLOT_HAIR);
    plot_chart_legend(&c, &f);
    plot_put_block(&c, f.x + f.w / 2, 0.6 * f.em, &f.title, PLOT_TITLE * f.em, 0);
    plot_put_block(&c, f.x + f.w / 2, f.y + f.h + PLOT_TICK + 1.6 * f.em, &f.xlabel, f.em, 0);
    plot_put_block(&c, 0.6 * f.em, f.y + f.h / 2, &f.ylabel, f.em, 1);
    return plot_canvas_close(&c, style, path);
}

/* ---- images ------------------------------------------------------------- */

static void plot_images_defaults(plot_images_options *options)
{
    memset(options, 0, sizeof *options);
    options->zoom = 1.5;
}

static const char *plot_images(plot_style *style, const char *path,
                               const unsigned char *const *image, int rows, int cols,
                               int height, int width, const plot_images_options *options)
{
    const double em = style->font_size, margin = 0.6 * em, gap = 0.4 * em, scale = style->dpi / 72;
    const int zoom = (int)fmax(1, floor(options->zoom * scale + 0.5));
    const double w = width * zoom / scale, h = height * zoom / scale;
    const double labels = plot_widest(style, options->row_label, rows);
    const double x0 = margin + (labels > 0 ? labels + 0.8 * em : 0);
    const double all = cols * (w + gap) - gap;
    const double total = x0 + all + margin;
    const plot_block title = plot_wrap(style, options->title, PLOT_TITLE * em, total - 2 * margin);
    const double head = margin + (title.lines ? title.height + 0.4 * em : 0);
    const double y0 = head + (options->col_label ? 1.3 * em : 0);
    plot_canvas c;
    if (rows < 1 || cols < 1 || height < 1 || width < 1)
        return plot_fail(style, "a grid of images needs images");
    plot_canvas_open(&c, style, total, y0 + rows * (h + gap) - gap + margin);
    /* a title wider than the images is centred in the figure instead */
    plot_put_block(&c, title.width > all ? total / 2 : x0 + all / 2, margin, &title,
                   PLOT_TITLE * em, 0);
    for (int row = 0; row < rows; row++) {
        const double y = y0 + row * (h + gap);
        if (options->row_label && options->row_label[row])
            plot_text(&c, x0 - 0.8 * em, y + h / 2 + PLOT_DIGIT / 2 * em, options->row_label[row],
                      em, 1, 0);
        for (int col = 0; col < cols; col++) {
            const double x = x0 + col * (w + gap);
            if (row == 0 && options->col_label && options->col_label[col])
                plot_text(&c, x + w / 2, y0 - 0.4 * em, options->col_label[col], em, 0.5, 0);
            if (image[row * cols + col])
                plot_picture(&c, x, y, image[row * cols + col], height, width, zoom);
        }
    }
    return plot_canvas_close(&c, style, path);
}

#endif /* PLOT_H */
