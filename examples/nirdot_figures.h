/*
 * nirdot_figures.h - the figures of NIR-DOT, as PNG and SVG: slices through
 * volumes, sensitivity, measurements against separation, learning curves,
 * gradient norms, attention over optodes. Built on the primitives of plot.h;
 * each function takes plain arrays and a path without extension, and returns
 * NULL, or one line that says what is wrong.
 *
 *     plot_style style;
 *     const char *error = plot_open(&style);
 *     nir_slices_figure f = { .n = 32, .h = 2, .label = label, .truth = truth, ... };
 *     if (!error) error = nir_figure_slices(&style, "out/slices", &f);
 *     plot_close(&style);
 *
 * Volumes are [z][y][x], x fastest, the middle of the grid at the origin;
 * volumes of properties have two channels, [n^3][2]: mu_a and mu_s', mm^-1.
 */
#ifndef NIRDOT_FIGURES_H
#define NIRDOT_FIGURES_H

#include <math.h>
#include <stdbool.h>
#include <stdint.h>

#if defined(__GNUC__)       /* plot.h draws more than this needs, and a program need not use all of it */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "plot.h"

/* ---- what a program uses ------------------------------------------------ */

enum { NIR_SLICE_IMAGES = 4, NIR_ATTENTION_QUERIES = 8, NIR_CURVES = 6 };

/* One slice of the truth, of up to 4 images and of the last image's error, in a row for each channel. The tumours of
   the truth are outlined in all. */
typedef struct {
    const char *title;                          /* NULL for none, here and below */
    int n;
    double h;                                   /* mm */
    const uint8_t *label;                       /* [n^3]: 0 air, left white; from 2 on tumours */
    const float *truth;                         /* [n^3][2] */
    const float *image[NIR_SLICE_IMAGES];       /* [n^3][2] each */
    const char *name[NIR_SLICE_IMAGES];         /* above the images */
    int images;
    int axis;                                   /* across the slice: 0 x, 1 y, 2 z */
    int slice;                                  /* its index along the axis; -1: the one with most of the tumours */
} nir_slices_figure;
static const char *nir_figure_slices(plot_style *style, const char *path, const nir_slices_figure *f);

/* The sensitivity, sum |J| over the measurements, in three slices at right angles, on a logarithmic scale; what is
   below 1 % of the largest is outside a white line. Optodes no farther than a voxel from a slice are marked. */
typedef struct {
    const char *title;
    int n;
    double h;
    const uint8_t *label;                       /* [n^3] */
    const float *sensitivity;                   /* [n^3] */
    const float *source, *detector;             /* [..][3], mm */
    int sources, detectors;
    int slice[3];                               /* indices along x, y, z; -1: through the largest */
} nir_sensitivity_figure;
static const char *nir_figure_sensitivity(plot_style *style, const char *path, const nir_sensitivity_figure *f);

/* Log amplitude and phase against the separation of source and detector, and a line of theory through both. */
typedef struct {
    const char *title;
    const double *separation, *log_amplitude, *phase;       /* [count]: mm, ln, degrees */
    int count;
    const double *line_separation, *line_log_amplitude, *line_phase;    /* [line_count] */
    int line_count;
    const char *line_name, *point_name;         /* in the legend */
} nir_separation_figure;
static const char *nir_figure_separation(plot_style *style, const char *path, const nir_separation_figure *f);

/* Losses by epoch, above the learning rate and beta_1 of the steps. */
typedef struct {
    const char *title;
    const double *epoch;                        /* [epochs] */
    const double *loss[NIR_CURVES];             /* [epochs] each; NAN: a gap */
    const char *name[NIR_CURVES];
    int epochs, losses;
    const char *loss_label;
    int log_loss;
    const double *step_epoch, *lr, *beta1;      /* [steps]; the first: where in the epochs; NULL: not drawn */
    int steps;
} nir_learning_figure;
static const char *nir_figure_learning(plot_style *style, const char *path, const nir_learning_figure *f);

/* The norm of the gradient before clipping, with the line above which it is clipped. */
typedef struct {
    const char *title;
    const double *step, *norm;                  /* [count] */
    int count;
    double clip;                                /* 0: none */
} nir_gradient_figure;
static const char *nir_figure_gradient(plot_style *style, const char *path, const nir_gradient_figure *f);

/* What share of a pooling query's attention each optode has, from the front (x, z) and from above (x, y): a column
   for each query. Of points in one place those with more attention lie above. */
typedef struct {
    const char *title;
    const float *position;                      /* [count][3], mm */
    const uint8_t *is_source;                   /* [count] */
    const double *attention;                    /* [queries][count]; the sum over the optodes is 1 */
    int count, queries;
    const float *ellipsoid;                     /* [15]: centre, semi-axes, rotation; its outline is drawn; or NULL */
} nir_attention_figure;
static const char *nir_figure_attention(plot_style *style, const char *path, const nir_attention_figure *f);

/* ---- colours ------------------------------------------------------------ */

typedef unsigned (*nir_colours)(double t);      /* of t in 0 to 1 */

static unsigned nir_colours_value(double t) { return plot_colour(PLOT_VIRIDIS, t); }

/* Blue, white, red: linear in between, so that white is zero. */
static unsigned nir_colours_error(double t)
{
    static const double low[3] = { 33, 78, 160 }, high[3] = { 178, 24, 43 };
    const double u = 2 * plot_clamp(t, 0, 1) - 1;
    unsigned colour = 0;
    for (int k = 0; k < 3; ++k)
        colour = colour << 8 | (unsigned)(255 + fabs(u) * ((u < 0 ? low[k] : high[k]) - 255) + 0.5);
    return colour;
}

static const char *const nir_channel_names[2] = { "\u03bc\u2090 (mm\u207b\u00b9)",
                                                  "\u03bc\u209b\u2032 (mm\u207b\u00b9)" };
static const char *const nir_axis_names[3] = { "x (mm)", "y (mm)", "z (mm)" };

/* ---- axes --------------------------------------------------------------- */

/* A frame with ticks. */
typedef struct {
    double x, y, w, h;          /* points */
    plot_axis across, up;
    const char *xlabel, *ylabel;
    int xticks, yticks;         /* with labels */
    int grid;
} nir_axes;

static double nir_axes_x(const nir_axes *a, double value) { return a->x + a->w * plot_unit(&a->across, value); }
static double nir_axes_y(const nir_axes *a, double value) { return a->y + a->h * (1 - plot_unit(&a->up, value)); }

/* Room on the left of the frame for tick labels and the label. */
static double nir_axes_left(const plot_style *style, const nir_axes *a)
{
    plot_ticks ticks;
    const double em = style->font_size;
    plot_ticks_make(&ticks, &a->up, a->h, 2 * em);
    return (a->yticks ? plot_ticks_width(style, &ticks) + PLOT_TICK + 0.3 * em : 0) + (a->ylabel ? 1.7 * em : 0);
}

/* Room below. */
static double nir_axes_below(const plot_style *style, const nir_axes *a)
{
    const double em = style->font_size;
    return (a->xticks ? PLOT_TICK + 1.4 * em : 0) + (a->xlabel ? 1.5 * em : 0);
}

/* Ticks along the axis across, closer together on small panels. */
static void nir_axes_across(plot_ticks *ticks, const nir_axes *a, double em)
{
    plot_ticks_make(ticks, &a->across, a->w, (a->w < 16 * em ? 3 : 4) * em);
}

/* Grid lines, before what lies on them. */
static void nir_axes_under(plot_canvas *c, const nir_axes *a)
{
    const double em = c->style->font_size;
    plot_ticks ticks;
    nir_axes_across(&ticks, a, em);
    for (int i = 0; a->grid && i < ticks.count; ++i) {
        const double at = nir_axes_x(a, ticks.at[i]), line[4] = { at, a->y, at, a->y + a->h };
        if (*ticks.label[i]) plot_segments(c, line, 1, PLOT_PALE, 0.5);
    }
    plot_ticks_make(&ticks, &a->up, a->h, 2 * em);
    for (int i = 0; a->grid && i < ticks.count; ++i) {
        const double at = nir_axes_y(a, ticks.at[i]), line[4] = { a->x, at, a->x + a->w, at };
        if (*ticks.label[i]) plot_segments(c, line, 1, PLOT_PALE, 0.5);
    }
}

/* Frame, ticks and labels, after it. */
static void nir_axes_over(plot_canvas *c, const nir_axes *a)
{
    const double em = c->style->font_size, bottom = a->y + a->h, far = PLOT_TICK + 0.3 * em;
    plot_ticks ticks;
    plot_frame(c, a->x, a->y, a->w, a->h, PLOT_BLACK, PLOT_HAIR);
    nir_axes_across(&ticks, a, em);
    for (int i = 0; i < ticks.count; ++i) {
        const double at = nir_axes_x(a, ticks.at[i]), tick[4] = { at, bottom, at, bottom + PLOT_TICK };
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        if (a->xticks) plot_text(c, at, bottom + far + PLOT_DIGIT * em, ticks.label[i], em, 0.5, 0);
    }
    if (a->xlabel) plot_text(c, a->x + a->w / 2, bottom + far + (a->xticks ? 2.3 : 1) * em, a->xlabel, em, 0.5, 0);
    plot_ticks_make(&ticks, &a->up, a->h, 2 * em);
    for (int i = 0; i < ticks.count; ++i) {
        const double at = nir_axes_y(a, ticks.at[i]);
        const double tick[4] = { a->x - PLOT_TICK * (*ticks.label[i] ? 1 : 0.6), at, a->x, at };
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        if (a->yticks) plot_text(c, a->x - far, at + PLOT_DIGIT / 2 * em, ticks.label[i], em, 1, 0);
    }
    if (a->ylabel) plot_text(c, a->x - nir_axes_left(c->style, a) + 0.9 * em, a->y + a->h / 2, a->ylabel, em, 0.5, 1);
}

/* A vertical colour bar with ticks and a label on its right, `room` wide in all: nir_bar_width or more. */
static void nir_bar(plot_canvas *c, double x, double y, double h, double room, const plot_axis *axis,
                    nir_colours colours, const char *label)
{
    const double em = c->style->font_size, w = em;
    plot_ticks ticks;
    for (int i = 0; i < 256; ++i) {     /* each reaches under the next, so that no seam shows */
        const double top = fmax(0, h - (i + 2) * h / 256);
        plot_box(c, x, y + top, w, h - i * h / 256 - top, colours((i + 0.5) / 256));
    }
    plot_frame(c, x, y, w, h, PLOT_BLACK, PLOT_HAIR);
    plot_ticks_make(&ticks, axis, h, 1.6 * em);
    for (int i = 0; i < ticks.count; ++i) {
        const double at = y + h * (1 - plot_unit(axis, ticks.at[i]));
        const double tick[4] = { x + w, at, x + w + PLOT_TICK * (*ticks.label[i] ? 1 : 0.6), at };
        plot_segments(c, tick, 1, PLOT_BLACK, PLOT_HAIR);
        plot_text(c, x + w + PLOT_TICK + 0.3 * em, at + PLOT_DIGIT / 2 * em, ticks.label[i], em, 0, 0);
    }
    if (label) plot_text(c, x + room - 0.4 * em, y + h / 2, label, em, 0.5, 1);
}

static double nir_bar_width(const plot_style *style, double h, const plot_axis *axis, const char *label)
{
    const double em = style->font_size;
    plot_ticks ticks;
    plot_ticks_make(&ticks, axis, h, 1.6 * em);
    return em + PLOT_TICK + 0.3 * em + plot_ticks_width(style, &ticks) + (label ? 1.9 * em : 0);
}

/* ---- marks -------------------------------------------------------------- */

static void nir_disc(plot_canvas *c, double x, double y, double radius, unsigned colour)
{
    plot_add_disc(c, x, y, radius, 1);
    plot_fill(c, colour);
    plot_svg(c, "<circle cx=\"%.2f\" cy=\"%.2f\" r=\"%.2f\" fill=\"#%06x\"/>\n", x, y, radius, colour);
}

/* Sources are triangles, detectors discs, each with an edge. */
static void nir_optode_mark(plot_canvas *c, double x, double y, double radius, bool source, unsigned colour,
                            unsigned edge)
{
    for (int inner = 0; inner < 2; ++inner) {
        const double r = radius + (inner ? 0 : 0.7);
        const double s = source ? 1.25 * radius + (inner ? 0 : 1.3) : 0;
        const double triangle[6] = { x, y - s, x + 0.866 * s, y + 0.5 * s, x - 0.866 * s, y + 0.5 * s };
        if (source) plot_polygon(c, triangle, 3, inner ? colour : edge);
        else nir_disc(c, x, y, r, inner ? colour : edge);
    }
}

/* An entry of a legend. kind: 0 line, 1 dots, 2 source, 3 detector, 4 dashes, 5 a white line on the colour */
typedef struct { const char *name; unsigned colour; int kind; } nir_key;

static double nir_key_sample(const nir_key *key, double em)
{
    return (key->kind == 0 || key->kind >= 4 ? 2.6 : 1.2) * em;
}

static double nir_keys_width(const plot_style *style, const nir_key *key, int count)
{
    const double em = style->font_size;
    double width = -1.4 * em;
    for (int i = 0; i < count; ++i)
        width += nir_key_sample(&key[i], em) + 1.6 * em + plot_text_width(style, key[i].name, em);
    return width;
}

/* A row of entries, centred. */
static void nir_keys(plot_canvas *c, double centre, double y, const nir_key *key, int count)
{
    const double em = c->style->font_size;
    double x = centre - nir_keys_width(c->style, key, count) / 2;
    for (int i = 0; i < count; ++i) {
        const double wide = nir_key_sample(&key[i], em), line[4] = { x, y, x + 0.88 * wide, y };
        if (key[i].kind == 5) plot_box(c, x, y - 0.5 * em, 0.88 * wide, em, key[i].colour);
        if (key[i].kind == 1) nir_disc(c, x + wide / 2, y, 1.6, key[i].colour);
        else if (key[i].kind == 2 || key[i].kind == 3)
            nir_optode_mark(c, x + wide / 2, y, 2.6, key[i].kind == 2, key[i].colour, PLOT_BLACK);
        else plot_polyline(c, line, 2, key[i].kind == 5 ? PLOT_WHITE : key[i].colour, key[i].kind == 5 ? 0.9 : 1.3,
                           key[i].kind == 4);
        plot_text(c, x + wide + 0.2 * em, y + PLOT_DIGIT / 2 * em, key[i].name, em, 0, 0);
        x += wide + 1.6 * em + plot_text_width(c->style, key[i].name, em);
    }
}

/* A line through the values that can be drawn. */
static void nir_curve(plot_canvas *c, const nir_axes *a, const double *x, const double *y, int count, unsigned colour,
                      double width, int dash)
{
    double *xy = (double *)malloc(((size_t)count + 1) * 2 * sizeof *xy);
    int kept = 0;
    c->failed |= !xy;
    for (int i = 0; xy && i <= count; ++i) {
        const bool good = i < count && isfinite(x[i]) && isfinite(y[i]) && (y[i] > 0 || !a->up.log);
        if (good) {
            xy[2 * kept] = nir_axes_x(a, x[i]);
            xy[2 * kept + 1] = nir_axes_y(a, y[i]);
            if (kept == 0 || hypot(xy[2 * kept] - xy[2 * kept - 2], xy[2 * kept + 1] - xy[2 * kept - 1]) >= 0.1) ++kept;
        } else {
            if (kept) plot_polyline(c, xy, kept, colour, kept == 1 ? 2.6 : width, dash);
            kept = 0;
        }
    }
    free(xy);
}

/* An axis that holds the values, with some space. */
static const char *nir_axis_of(plot_axis *axis, const double *value, int count, int logarithmic, double space)
{
    if (!(axis->lo <= axis->hi)) axis->lo = axis->hi = NAN;
    axis->log = logarithmic;
    for (int i = 0; i < count; ++i) plot_extend(axis, value[i]);
    return space < 0 ? NULL : plot_settle(axis, NAN, NAN, space);
}

static plot_axis nir_axis_none(void)
{
    const plot_axis none = { NAN, NAN, 0 };
    return none;
}

static plot_axis nir_axis_grid(int n, double h)
{
    const plot_axis axis = { -n * h / 2, n * h / 2, 0 };
    return axis;
}

/* ---- slices of volumes -------------------------------------------------- */

/* The voxel at (column, row) of a slice, row 0 at the bottom; x is across and z up where they are in the plane. */
static int nir_slice_voxel(int n, int axis, int slice, int column, int row)
{
    const int x = axis == 0 ? slice : column, y = axis == 0 ? column : axis == 1 ? slice : row;
    const int z = axis == 2 ? slice : row;
    return (z * n + y) * n + x;
}

/* "z = -3 mm" */
static void nir_slice_name(char *out, size_t size, int axis, int slice, int n, double h)
{
    char number[24];
    plot_number(number, sizeof number, (slice + 0.5 - n / 2.0) * h, -1, 0);
    snprintf(out, size, "%c = %s mm", "xyz"[axis], number);
}

static const char *nir_slice_label(int axis, int up)
{
    return nir_axis_names[up ? (axis == 2 ? 1 : 2) : (axis == 0 ? 1 : 0)];
}

enum { NIR_CLEAR = 0xffffff };

/* n x n colours, row 0 at the bottom, `zoom` pixels of the canvas each. */
static void nir_slice_draw(plot_canvas *c, double x, double y, const unsigned *colour, int n, int zoom)
{
    const int side = n * zoom, left = (int)(x * c->scale + 0.5), top = (int)(y * c->scale + 0.5);
    unsigned char *rgb = (unsigned char *)malloc((size_t)side * (size_t)side * 3);
    plot_buffer png;
    memset(&png, 0, sizeof png);
    c->failed |= !rgb;
    for (int i = 0; !c->failed && i < side; ++i)
        for (int j = 0; j < side; ++j) {
            const unsigned value = colour[(n - 1 - i / zoom) * n + j / zoom];
            unsigned char *pixel = rgb + 3 * (i * side + j);
            for (int k = 0; k < 3; ++k) pixel[k] = (unsigned char)(value >> (16 - 8 * k) & 255);
            if (top + i < c->rows && left + j < c->columns)
                memcpy(c->pixel + ((size_t)(top + i) * (size_t)c->columns + (size_t)(left + j)) * 3, pixel, 3);
        }
    if (!c->failed) plot_png(&png, rgb, side, side, 3);
    plot_svg(c, "<image x=\"%.2f\" y=\"%.2f\" width=\"%.2f\" height=\"%.2f\" image-rendering=\"pixelated\" "
                "xlink:href=\"data:image/png;base64,", left / c->scale, top / c->scale, side / c->scale,
             side / c->scale);
    plot_base64(&c->svg, &png);
    plot_svg(c, "\"/>\n");
    c->failed |= png.failed;
    free(png.data);
    free(rgb);
}

/* The edges between voxels that are in a set and voxels that are not. in: [n * n] */
static void nir_slice_outline(plot_canvas *c, double x, double y, double side, const unsigned char *in, int n,
                              unsigned colour, double width)
{
    double *line = (double *)malloc((size_t)n * (size_t)n * 8 * sizeof *line);
    const double voxel = side / n;
    int lines = 0;
    c->failed |= !line;
    for (int i = 0; line && i < n * n; ++i) {
        const double left = x + i % n * voxel, bottom = y + side - i / n * voxel, reach = width / 2;
        if (i % n > 0 && in[i] != in[i - 1]) {
            const double edge[4] = { left, bottom + reach, left, bottom - voxel - reach };
            memcpy(line + 4 * lines++, edge, sizeof edge);
        }
        if (i >= n && in[i] != in[i - n]) {
            const double edge[4] = { left - reach, bottom, left + voxel + reach, bottom };
            memcpy(line + 4 * lines++, edge, sizeof edge);
        }
    }
    if (line) plot_segments(c, line, lines, colour, width);
    free(line);
}

/* The largest whole number of pixels per voxel with which n voxels stay within `points`. */
static int nir_slice_zoom(const plot_style *style, int n, double points)
{
    return (int)fmax(1, floor(points * style->dpi / 72 / n));
}

/* ---- truth, images and error -------------------------------------------- */

typedef struct {
    const nir_slices_figure *f;
    const plot_style *style;
    int slice, zoom, columns;
    double em, side;
    plot_axis value[2], error[2], grid;
    double left, top, pitch_x, pitch_y, bar_x, bar, error_x, error_bar_x, error_bar, width, height;
    plot_block title;
    unsigned *colour;
    unsigned char *tumour;
} nir_slices;

static const float *nir_slices_volume(const nir_slices_figure *f, int column)
{
    return column ? f->image[column - 1] : f->truth;
}

static int nir_slices_choose(const nir_slices_figure *f)
{
    int best = f->n / 2, most = 0;
    for (int slice = 0; f->slice < 0 && slice < f->n; ++slice) {
        int count = 0;
        for (int i = 0; i < f->n * f->n; ++i)
            count += f->label[nir_slice_voxel(f->n, f->axis, slice, i % f->n, i / f->n)] > 1;
        if (count > most) {
            most = count;
            best = slice;
        }
    }
    return f->slice < 0 ? best : f->slice;
}

/* Limits of the colours: of the values those of the tissue in all images, of the error symmetric about zero. */
static void nir_slices_limits(nir_slices *s)
{
    const nir_slices_figure *f = s->f;
    for (int c = 0; c < 2; ++c) {
        double most = 0;
        s->value[c] = s->error[c] = nir_axis_none();
        for (int i = 0; i < f->n * f->n; ++i) {
            const int voxel = nir_slice_voxel(f->n, f->axis, s->slice, i % f->n, i / f->n);
            if (!f->label[voxel]) continue;
            for (int k = 0; k <= f->images; ++k)
                plot_extend(&s->value[c], (double)nir_slices_volume(f, k)[2 * voxel + c]);
            most = fmax(most, fabs((double)(f->image[f->images - 1][2 * voxel + c] - f->truth[2 * voxel + c])));
        }
        plot_settle(&s->value[c], NAN, NAN, 0);
        s->error[c].lo = -(most > 0 ? most : 1);
        s->error[c].hi = most > 0 ? most : 1;
    }
}

/* What stands above a column: the truth's with the slice's place; the last is the error's. */
static plot_block nir_slices_name(const nir_slices *s, int column)
{
    const nir_slices_figure *f = s->f;
    char name[96], place[40];
    nir_slice_name(place, sizeof place, f->axis, s->slice, f->n, f->h);
    if (column == s->columns) snprintf(name, sizeof name, "%.60s \u2212 truth", f->name[f->images - 1]);
    else if (column) snprintf(name, sizeof name, "%.60s", f->name[column - 1]);
    else snprintf(name, sizeof name, "truth, %s", place);
    return plot_wrap(s->style, name, s->em, s->side);
}

static void nir_slices_layout(nir_slices *s)
{
    const double em = s->em, margin = 0.6 * em, gap = 0.9 * em;
    const nir_axes outer = { 0, 0, s->side, s->side, s->grid, s->grid, "x", "y", 1, 1, 0 };
    for (int c = 0; c < 2; ++c) {
        s->bar = fmax(s->bar, nir_bar_width(s->style, s->side, &s->value[c], nir_channel_names[c]));
        s->error_bar = fmax(s->error_bar, nir_bar_width(s->style, s->side, &s->error[c], nir_channel_names[c]));
    }
    s->pitch_x = s->side + gap;
    s->pitch_y = s->side + gap;
    s->left = margin + nir_axes_left(s->style, &outer);
    s->bar_x = s->left + s->columns * s->pitch_x - gap + 0.7 * em;
    s->error_x = s->bar_x + s->bar + 1.2 * em;
    s->error_bar_x = s->error_x + s->side + 0.7 * em;
    s->width = s->error_bar_x + s->error_bar + margin;
    s->title = plot_wrap(s->style, s->f->title, PLOT_TITLE * em, s->width - 2 * margin);
    s->top = em;
    for (int k = 0; k <= s->columns; ++k) s->top = fmax(s->top, nir_slices_name(s, k).height);
    s->top += margin + (s->title.lines ? s->title.height + 0.3 * em : 0) + 0.2 * em;
    s->height = s->top + 2 * s->pitch_y - gap + nir_axes_below(s->style, &outer) + margin;
}

/* One panel: channel c of a volume, or its error. */
static void nir_slices_panel(plot_canvas *canvas, nir_slices *s, double x, double y, int c, const float *volume,
                             bool error)
{
    const nir_slices_figure *f = s->f;
    const plot_axis *axis = error ? &s->error[c] : &s->value[c];
    for (int i = 0; i < f->n * f->n; ++i) {
        const int voxel = nir_slice_voxel(f->n, f->axis, s->slice, i % f->n, i / f->n);
        const double value = (double)volume[2 * voxel + c] - (error ? (double)f->truth[2 * voxel + c] : 0);
        s->colour[i] = !f->label[voxel] ? NIR_CLEAR
                     : (error ? nir_colours_error : nir_colours_value)(plot_unit(axis, value));
        s->tumour[i] = f->label[voxel] > 1;
    }
    nir_slice_draw(canvas, x, y, s->colour, f->n, s->zoom);
    nir_slice_outline(canvas, x, y, s->side, s->tumour, f->n, error ? PLOT_BLACK : PLOT_WHITE, 0.7);
}

static void nir_slices_row(plot_canvas *canvas, nir_slices *s, int c)
{
    const nir_slices_figure *f = s->f;
    const double y = plot_snap(canvas, s->top + c * s->pitch_y), em = s->em;
    for (int k = 0; k <= s->columns; ++k) {
        const bool error = k == s->columns;
        const double x = plot_snap(canvas, error ? s->error_x : s->left + k * s->pitch_x);
        const nir_axes axes = { x, y, s->side, s->side, s->grid, s->grid, c ? nir_slice_label(f->axis, 0) : NULL,
                                k ? NULL : nir_slice_label(f->axis, 1), c, k == 0, 0 };
        const plot_block name = nir_slices_name(s, k);
        nir_slices_panel(canvas, s, x, y, c, nir_slices_volume(f, error ? f->images : k), error);
        nir_axes_over(canvas, &axes);
        if (c == 0) plot_put_block(canvas, x + s->side / 2, y - 0.2 * em - name.height, &name, em, 0);
    }
    nir_bar(canvas, plot_snap(canvas, s->bar_x), y, s->side, s->bar, &s->value[c], nir_colours_value,
            nir_channel_names[c]);
    nir_bar(canvas, plot_snap(canvas, s->error_bar_x), y, s->side, s->error_bar, &s->error[c], nir_colours_error,
            nir_channel_names[c]);
}

static const char *nir_figure_slices(plot_style *style, const char *path, const nir_slices_figure *f)
{
    nir_slices s;
    plot_canvas canvas;
    const char *error;
    if (f->n < 2 || !(f->h > 0) || f->images < 1 || f->images > NIR_SLICE_IMAGES || f->axis < 0 || f->axis > 2 ||
        f->slice >= f->n)
        return plot_fail(style, "slices: n %d, h %g, %d images, axis %d, slice %d, expected n >= 2, h > 0, 1 to %d, "
                         "0 to 2, below n", f->n, f->h, f->images, f->axis, f->slice, NIR_SLICE_IMAGES);
    memset(&s, 0, sizeof s);
    s.f = f;
    s.style = style;
    s.em = style->font_size;
    s.columns = f->images + 1;
    s.zoom = nir_slice_zoom(style, f->n, 100);
    s.side = f->n * s.zoom / (style->dpi / 72);
    s.grid = nir_axis_grid(f->n, f->h);
    s.slice = nir_slices_choose(f);
    s.colour = (unsigned *)malloc((size_t)f->n * (size_t)f->n * sizeof *s.colour);
    s.tumour = (unsigned char *)malloc((size_t)f->n * (size_t)f->n);
    if (s.colour && s.tumour) {
        nir_slices_limits(&s);
        nir_slices_layout(&s);
        plot_canvas_open(&canvas, style, s.width, s.height);
        plot_put_block(&canvas, s.width / 2, 0.6 * s.em, &s.title, PLOT_TITLE * s.em, 0);
        for (int c = 0; !canvas.failed && c < 2; ++c) nir_slices_row(&canvas, &s, c);
        error = plot_canvas_close(&canvas, style, path);
    } else {
        error = plot_fail(style, "out of memory for the figure %.300s", path);
    }
    free(s.colour);
    free(s.tumour);
    return error;
}

/* ---- sensitivity -------------------------------------------------------- */

typedef struct {
    const nir_sensitivity_figure *f;
    int slice[3], zoom;
    double side, most;
    plot_axis scale, grid;
    unsigned *colour;
    unsigned char *seen;
} nir_sensitivity;

/* Where the largest value of the tissue is. */
static void nir_sensitivity_find(nir_sensitivity *s)
{
    const int n = s->f->n;
    int at = 0;
    for (int i = 0; i < n * n * n; ++i)
        if (s->f->label[i] && (double)s->f->sensitivity[i] > s->most) {
            s->most = (double)s->f->sensitivity[i];
            at = i;
        }
    const int place[3] = { at % n, at / n % n, at / (n * n) };
    for (int k = 0; k < 3; ++k) s->slice[k] = s->f->slice[k] < 0 ? place[k] : s->f->slice[k];
}

static void nir_sensitivity_optodes(plot_canvas *c, const nir_sensitivity *s, const nir_axes *a, int axis, bool source)
{
    const nir_sensitivity_figure *f = s->f;
    const float *optode = source ? f->source : f->detector;
    const double plane = (s->slice[axis] + 0.5 - f->n / 2.0) * f->h;
    for (int i = 0; i < (source ? f->sources : f->detectors); ++i) {
        const float *p = optode + 3 * i;
        if (fabs((double)p[axis] - plane) > f->h) continue;
        nir_optode_mark(c, nir_axes_x(a, (double)p[axis == 0]), nir_axes_y(a, (double)p[axis == 2 ? 1 : 2]), 2.2,
                        source, source ? 0xd62728 : 0x56b4e9, PLOT_BLACK);
    }
}

static void nir_sensitivity_panel(plot_canvas *c, nir_sensitivity *s, double x, double y, int axis)
{
    const nir_sensitivity_figure *f = s->f;
    const double em = c->style->font_size;
    const nir_axes axes = { x, y, s->side, s->side, s->grid, s->grid, nir_slice_label(axis, 0),
                            nir_slice_label(axis, 1), 1, 1, 0 };
    char name[48];
    for (int i = 0; i < f->n * f->n; ++i) {
        const int voxel = nir_slice_voxel(f->n, axis, s->slice[axis], i % f->n, i / f->n);
        const double value = (double)f->sensitivity[voxel] / s->most;
        s->colour[i] = f->label[voxel] ? nir_colours_value(value > 0 ? plot_unit(&s->scale, value) : 0) : NIR_CLEAR;
        s->seen[i] = f->label[voxel] && value > 0.01;
    }
    nir_slice_draw(c, x, y, s->colour, f->n, s->zoom);
    nir_slice_outline(c, x, y, s->side, s->seen, f->n, PLOT_WHITE, 0.7);
    nir_sensitivity_optodes(c, s, &axes, axis, false);
    nir_sensitivity_optodes(c, s, &axes, axis, true);
    nir_axes_over(c, &axes);
    nir_slice_name(name, sizeof name, axis, s->slice[axis], f->n, f->h);
    plot_text(c, x + s->side / 2, y - 0.5 * em, name, em, 0.5, 0);
}

static const char *nir_sensitivity_draw(plot_style *style, const char *path, nir_sensitivity *s)
{
    static const nir_key keys[3] = { { "source", 0xd62728, 2 }, { "detector", 0x56b4e9, 3 },
                                     { "1 % of the largest", 0x2a788e, 5 } };
    static const char bar_label[] = "\u03a3|J| / largest";
    const double em = style->font_size, margin = 0.6 * em;
    const nir_axes outer = { 0, 0, s->side, s->side, s->grid, s->grid, "x", "y", 1, 1, 0 };
    const double left = nir_axes_left(style, &outer), pitch = s->side + left + 0.9 * em, x = margin + left;
    const double bar = nir_bar_width(style, s->side, &s->scale, bar_label);
    const double width = x + 2 * pitch + s->side + 0.9 * em + bar + margin;
    const plot_block title = plot_wrap(style, s->f->title, PLOT_TITLE * em, width - 2 * margin);
    const double top = margin + (title.lines ? title.height + 0.3 * em : 0) + 1.4 * em;
    const double below = top + s->side + nir_axes_below(style, &outer);
    plot_canvas c;
    plot_canvas_open(&c, style, width, below + 1.6 * em + margin);
    plot_put_block(&c, width / 2, margin, &title, PLOT_TITLE * em, 0);
    for (int k = 0; !c.failed && k < 3; ++k)
        nir_sensitivity_panel(&c, s, plot_snap(&c, x + k * pitch), plot_snap(&c, top), 2 - k);
    nir_bar(&c, plot_snap(&c, x + 2 * pitch + s->side + 0.9 * em), plot_snap(&c, top), s->side, bar, &s->scale,
            nir_colours_value, bar_label);
    nir_keys(&c, x + pitch + s->side / 2, below + 0.9 * em, keys, 3);
    return plot_canvas_close(&c, style, path);
}

static const char *nir_figure_sensitivity(plot_style *style, const char *path, const nir_sensitivity_figure *f)
{
    nir_sensitivity s;
    const char *error;
    if (f->n < 2 || !(f->h > 0) || f->slice[0] >= f->n || f->slice[1] >= f->n || f->slice[2] >= f->n)
        return plot_fail(style, "sensitivity: n %d, h %g, slices %d, %d, %d, expected n >= 2, h > 0, slices below n",
                         f->n, f->h, f->slice[0], f->slice[1], f->slice[2]);
    memset(&s, 0, sizeof s);
    s.f = f;
    s.zoom = nir_slice_zoom(style, f->n, 112);
    s.side = f->n * s.zoom / (style->dpi / 72);
    s.grid = nir_axis_grid(f->n, f->h);
    s.scale.lo = 1e-4;
    s.scale.hi = 1;
    s.scale.log = 1;
    nir_sensitivity_find(&s);
    if (!(s.most > 0)) return plot_fail(style, "sensitivity: no positive value in the tissue");
    s.colour = (unsigned *)malloc((size_t)f->n * (size_t)f->n * sizeof *s.colour);
    s.seen = (unsigned char *)malloc((size_t)f->n * (size_t)f->n);
    error = s.colour && s.seen ? nir_sensitivity_draw(style, path, &s)
                               : plot_fail(style, "out of memory for the figure %.300s", path);
    free(s.colour);
    free(s.seen);
    return error;
}

/* ---- measurements against separation ------------------------------------ */

static const char *nir_figure_separation(plot_style *style, const char *path, const nir_separation_figure *f)
{
    static const char *const names[2] = { "ln amplitude", "phase (degrees)" };
    const double *const point[2] = { f->log_amplitude, f->phase };
    const double *const line[2] = { f->line_log_amplitude, f->line_phase };
    const double em = style->font_size, margin = 0.6 * em, w = 190, h = 150;
    const nir_key keys[2] = { { f->point_name ? f->point_name : "measured", 0x0072b2, 1 },
                              { f->line_name ? f->line_name : "theory", 0xd55e00, 0 } };
    nir_axes a[2];
    plot_canvas c;
    double x = margin;
    const char *error = NULL;
    if (f->count < 1) return plot_fail(style, "separation: no measurements");
    for (int k = 0; !error && k < 2; ++k) {
        const nir_axes axes = { 0, 0, w, h, nir_axis_none(), nir_axis_none(), "source\u2013detector separation (mm)",
                                names[k], 1, 1, 1 };
        a[k] = axes;
        nir_axis_of(&a[k].across, f->line_separation, f->line_count, 0, -1);
        error = nir_axis_of(&a[k].across, f->separation, f->count, 0, 0.03);
        nir_axis_of(&a[k].up, line[k], f->line_count, 0, -1);
        if (!error) error = nir_axis_of(&a[k].up, point[k], f->count, 0, 0.04);
        x += nir_axes_left(style, &a[k]);
        a[k].x = x;
        x += w + 1.5 * em;
    }
    if (error) return plot_fail(style, "separation: %s", error);
    const plot_block title = plot_wrap(style, f->title, PLOT_TITLE * em, x - margin);
    const double top = margin + (title.lines ? title.height + 0.8 * em : 0.4 * em);
    const double dot = f->count < 100 ? 1.6 : f->count < 400 ? 1.2 : 0.9;
    const double below = top + h + nir_axes_below(style, &a[0]);
    plot_canvas_open(&c, style, x + margin, below + 2.2 * em);
    plot_put_block(&c, (x + margin) / 2, margin, &title, PLOT_TITLE * em, 0);
    for (int k = 0; k < 2; ++k) {
        a[k].y = top;
        nir_axes_under(&c, &a[k]);
        plot_clip(&c, a[k].x, a[k].y, w, h);
        for (int i = 0; i < f->count; ++i)
            if (isfinite(f->separation[i]) && isfinite(point[k][i]))
                nir_disc(&c, nir_axes_x(&a[k], f->separation[i]), nir_axes_y(&a[k], point[k][i]), dot, 0x0072b2);
        if (f->line_count) nir_curve(&c, &a[k], f->line_separation, line[k], f->line_count, 0xd55e00, 1.3, 0);
        plot_unclip(&c);
        nir_axes_over(&c, &a[k]);
    }
    nir_keys(&c, (a[0].x + a[1].x + w) / 2, below + em, keys, f->line_count ? 2 : 1);
    return plot_canvas_close(&c, style, path);
}

/* ---- learning curves ---------------------------------------------------- */

enum { NIR_LEARNING_PANELS = 3 };               /* losses, learning rate, beta_1 */

typedef struct {
    const nir_learning_figure *f;
    nir_axes axes[NIR_LEARNING_PANELS];
    int panels;
    double left;                /* room for the labels of the widest */
} nir_learning;

static const double *nir_learning_values(const nir_learning_figure *f, int panel)
{
    return panel == 1 ? f->lr : f->beta1;
}

/* The panels with their limits; they share the axis across. */
static const char *nir_learning_axes(nir_learning *l, const plot_style *style)
{
    static const double heights[NIR_LEARNING_PANELS] = { 150, 55, 55 };
    static const char *const names[NIR_LEARNING_PANELS] = { "loss", "learning rate", "\u03b2\u2081" };
    const nir_learning_figure *f = l->f;
    plot_axis across = nir_axis_none();
    nir_axis_of(&across, f->step_epoch, f->steps, 0, -1);
    nir_axis_of(&across, f->epoch, f->epochs, 0, -1);
    const char *error = plot_settle(&across, NAN, NAN, 0.01);
    for (int k = 0; !error && k < l->panels; ++k) {
        const bool last = k + 1 == l->panels;
        const nir_axes axes = { 0, 0, 330, heights[k], across, nir_axis_none(), last ? "epoch" : NULL,
                                k == 0 && f->loss_label ? f->loss_label : names[k], last, 1, 1 };
        l->axes[k] = axes;
        for (int i = 0; k == 0 && i < f->losses; ++i)
            nir_axis_of(&l->axes[k].up, f->loss[i], f->epochs, f->log_loss, -1);
        if (k) nir_axis_of(&l->axes[k].up, nir_learning_values(f, k), f->steps, 0, -1);
        error = plot_settle(&l->axes[k].up, NAN, NAN, k ? 0.08 : 0.04);
        if (!error) l->left = fmax(l->left, nir_axes_left(style, &l->axes[k]));
    }
    return error;
}

static void nir_learning_panel(plot_canvas *c, const nir_learning *l, int panel)
{
    const nir_learning_figure *f = l->f;
    const nir_axes *a = &l->axes[panel];
    nir_axes_under(c, a);
    plot_clip(c, a->x, a->y, a->w, a->h);
    for (int i = 0; panel == 0 && i < f->losses; ++i)
        nir_curve(c, a, f->epoch, f->loss[i], f->epochs, plot_palette[i], 1.3, 0);
    if (panel) nir_curve(c, a, f->step_epoch, nir_learning_values(f, panel), f->steps, PLOT_BLACK, 1.1, 0);
    plot_unclip(c);
    nir_axes_over(c, a);
}

static const char *nir_figure_learning(plot_style *style, const char *path, const nir_learning_figure *f)
{
    const double em = style->font_size, margin = 0.6 * em;
    nir_learning l;
    nir_key keys[NIR_CURVES];
    plot_canvas c;
    memset(&l, 0, sizeof l);
    l.f = f;
    l.panels = f->steps > 0 && f->lr ? (f->beta1 ? 3 : 2) : 1;
    if (f->epochs < 1 || f->losses < 1 || f->losses > NIR_CURVES)
        return plot_fail(style, "learning curves: %d epochs, %d losses, expected from 1 on, 1 to %d", f->epochs,
                         f->losses, NIR_CURVES);
    const char *error = nir_learning_axes(&l, style);
    if (error) return plot_fail(style, "learning curves: %s", error);
    const double w = l.axes[0].w, x = margin + l.left;
    const plot_block title = plot_wrap(style, f->title, PLOT_TITLE * em, w);
    double y = margin + (title.lines ? title.height + 0.3 * em : 0) + 1.6 * em;
    for (int k = 0; k < l.panels; ++k) {
        l.axes[k].x = x;
        l.axes[k].y = y;
        y += l.axes[k].h + 0.9 * em;
    }
    for (int i = 0; i < f->losses; ++i) {
        const nir_key key = { f->name[i] ? f->name[i] : "loss", plot_palette[i], 0 };
        keys[i] = key;
    }
    y += nir_axes_below(style, &l.axes[l.panels - 1]) - 0.9 * em;
    plot_canvas_open(&c, style, x + w + 1.5 * em, y + margin);
    plot_put_block(&c, x + w / 2, margin, &title, PLOT_TITLE * em, 0);
    nir_keys(&c, x + w / 2, l.axes[0].y - 0.9 * em, keys, f->losses);
    for (int k = 0; k < l.panels; ++k) nir_learning_panel(&c, &l, k);
    return plot_canvas_close(&c, style, path);
}

/* ---- gradient norms ----------------------------------------------------- */

static const char *nir_figure_gradient(plot_style *style, const char *path, const nir_gradient_figure *f)
{
    const double em = style->font_size, margin = 0.6 * em, w = 330, h = 150;
    nir_axes a = { 0, 0, w, h, nir_axis_none(), nir_axis_none(), "step", "norm of the gradient", 1, 1, 1 };
    plot_canvas c;
    int finite = 0, above = 0;
    char note[96];
    const char *error;
    for (int i = 0; i < f->count; ++i) {
        finite += isfinite(f->norm[i]);
        above += isfinite(f->norm[i]) && f->norm[i] > f->clip;
    }
    if (!finite) return plot_fail(style, "gradient norms: no finite value among %d", f->count);
    snprintf(note, sizeof note, "clipped above %.4g: %.3g %% of steps", f->clip, 100.0 * above / finite);
    error = nir_axis_of(&a.across, f->step, f->count, 0, 0.01);
    nir_axis_of(&a.up, f->norm, f->count, 1, -1);
    if (f->clip > 0) plot_extend(&a.up, f->clip);
    if (!error) error = plot_settle(&a.up, NAN, NAN, 0.05);
    if (error) return plot_fail(style, "gradient norms: %s", error);
    const plot_block title = plot_wrap(style, f->title, PLOT_TITLE * em, w);
    a.x = margin + nir_axes_left(style, &a);
    a.y = margin + (title.lines ? title.height + 0.3 * em : 0) + 1.6 * em;
    plot_canvas_open(&c, style, a.x + w + 1.5 * em, a.y + h + nir_axes_below(style, &a) + margin);
    plot_put_block(&c, a.x + w / 2, margin, &title, PLOT_TITLE * em, 0);
    nir_axes_under(&c, &a);
    plot_clip(&c, a.x, a.y, w, h);
    nir_curve(&c, &a, f->step, f->norm, f->count, plot_palette[0], 0.8, 0);
    const double across[2] = { a.across.lo, a.across.hi }, level[2] = { f->clip, f->clip };
    if (f->clip > 0) nir_curve(&c, &a, across, level, 2, 0xd55e00, 1.3, 1);
    plot_unclip(&c);
    nir_axes_over(&c, &a);
    const nir_key keys[2] = { { "before clipping", plot_palette[0], 0 }, { note, 0xd55e00, 4 } };
    nir_keys(&c, a.x + w / 2, a.y - 0.9 * em, keys, f->clip > 0 ? 2 : 1);
    return plot_canvas_close(&c, style, path);
}

/* ---- attention ---------------------------------------------------------- */

/* The outline of an ellipsoid seen along an axis: where p = M u / sqrt(u^T M u) for directions u in the plane, with
   M = R^T S^2 R cut to the plane. */
static void nir_attention_outline(plot_canvas *c, const nir_axes *a, const float *e, int across, int up)
{
    enum { POINTS = 96 };
    const int plane[2] = { across, up };
    double m[2][2] = { { 0, 0 }, { 0, 0 } }, xy[2 * (POINTS + 1)];
    for (int k = 0; k < 3; ++k)
        for (int i = 0; i < 2; ++i)
            for (int j = 0; j < 2; ++j)
                m[i][j] += (double)e[6 + 3 * k + plane[i]] * (double)e[6 + 3 * k + plane[j]] * pow((double)e[3 + k], 2);
    for (int i = 0; i <= POINTS; ++i) {
        const double u = cos(2 * PLOT_PI * i / POINTS), v = sin(2 * PLOT_PI * i / POINTS);
        const double p = m[0][0] * u + m[0][1] * v, q = m[1][0] * u + m[1][1] * v, r = sqrt(u * p + v * q);
        xy[2 * i] = nir_axes_x(a, (double)e[across] + p / r);
        xy[2 * i + 1] = nir_axes_y(a, (double)e[up] + q / r);
    }
    plot_polyline(c, xy, POINTS + 1, PLOT_GREY, 0.7, 0);
}

static void nir_attention_points(plot_canvas *c, const nir_attention_figure *f, const nir_axes *a, int query, int up,
                                 const plot_axis *scale, int *order)
{
    const double *weight = f->attention + (size_t)query * (size_t)f->count;
    for (int i = 0; i < f->count; ++i) {        /* from little to much; counts are small */
        int k = i;
        for (; k > 0 && weight[order[k - 1]] > weight[i]; --k) order[k] = order[k - 1];
        order[k] = i;
    }
    for (int k = 0; k < f->count; ++k) {
        const float *p = f->position + 3 * order[k];
        const double t = plot_clamp(plot_unit(scale, weight[order[k]]), 0, 1);
        nir_optode_mark(c, nir_axes_x(a, (double)p[0]), nir_axes_y(a, (double)p[up]), 1.3 + 2.2 * sqrt(t),
                        f->is_source && f->is_source[order[k]], nir_colours_value(t), 0x606060);
    }
}

/* The same limits in millimetres for all panels, so that these are squares. */
static plot_axis nir_attention_extent(const nir_attention_figure *f)
{
    double most = 1;
    for (int i = 0; i < 3 * f->count; ++i) most = fmax(most, fabs((double)f->position[i]));
    const plot_axis axis = { -1.12 * most, 1.12 * most, 0 };
    return axis;
}

static const char *nir_attention_draw(plot_style *style, const char *path, const nir_attention_figure *f,
                                      const plot_axis *scale, int *order)
{
    static const nir_key keys[2] = { { "source", 0xbbbbbb, 2 }, { "detector", 0xbbbbbb, 3 } };
    static const char bar_label[] = "share of attention";
    const double em = style->font_size, margin = 0.6 * em, side = f->queries > 4 ? 78 : 100, pitch = side + 0.9 * em;
    const plot_axis extent = nir_attention_extent(f);
    const nir_axes outer = { 0, 0, side, side, extent, extent, "x", "y", 1, 1, 0 };
    const double x = margin + nir_axes_left(style, &outer), right = x + f->queries * pitch - 0.9 * em;
    const double height = 2 * side + 0.9 * em;
    const double bar = nir_bar_width(style, height, scale, bar_label), width = right + 0.9 * em + bar + margin;
    const plot_block title = plot_wrap(style, f->title, PLOT_TITLE * em, width - 2 * margin);
    const double top = margin + (title.lines ? title.height + 0.3 * em : 0) + 1.4 * em;
    const double below = top + height + nir_axes_below(style, &outer);
    plot_canvas c;
    plot_canvas_open(&c, style, width, below + 1.6 * em + margin);
    plot_put_block(&c, width / 2, margin, &title, PLOT_TITLE * em, 0);
    for (int i = 0; !c.failed && i < 2 * f->queries; ++i) {
        const int query = i / 2, row = i % 2, up = row ? 1 : 2;
        const nir_axes a = { x + query * pitch, top + row * pitch, side, side, extent, extent,
                             row ? nir_axis_names[0] : NULL, query ? NULL : nir_axis_names[up], row, query == 0, 0 };
        char name[32];
        plot_clip(&c, a.x, a.y, side, side);
        if (f->ellipsoid) nir_attention_outline(&c, &a, f->ellipsoid, 0, up);
        nir_attention_points(&c, f, &a, query, up, scale, order);
        plot_unclip(&c);
        nir_axes_over(&c, &a);
        snprintf(name, sizeof name, "query %d", query + 1);
        if (!row) plot_text(&c, a.x + side / 2, a.y - 0.5 * em, name, em, 0.5, 0);
    }
    nir_bar(&c, plot_snap(&c, right + 0.9 * em), top, height, bar, scale, nir_colours_value, bar_label);
    nir_keys(&c, (x + right) / 2, below + 0.9 * em, keys, 2);
    return plot_canvas_close(&c, style, path);
}

static const char *nir_figure_attention(plot_style *style, const char *path, const nir_attention_figure *f)
{
    plot_axis scale = { 0, 0, 0 };
    const char *error;
    if (f->count < 1 || f->queries < 1 || f->queries > NIR_ATTENTION_QUERIES)
        return plot_fail(style, "attention: %d optodes, %d queries, expected from 1 on, 1 to %d", f->count, f->queries,
                         NIR_ATTENTION_QUERIES);
    for (int i = 0; i < f->queries * f->count; ++i) {
        if (!(f->attention[i] >= 0 && f->attention[i] <= 1 + 1e-6))
            return plot_fail(style, "attention: value %d is %g, expected 0 to 1", i, f->attention[i]);
        scale.hi = fmax(scale.hi, f->attention[i]);
    }
    if (!(scale.hi > 0)) scale.hi = 1;
    int *order = (int *)malloc((size_t)f->count * sizeof *order);
    error = order ? nir_attention_draw(style, path, f, &scale, order)
                  : plot_fail(style, "out of memory for the figure %.300s", path);
    free(order);
    return error;
}

#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif
#endif /* NIRDOT_FIGURES_H */
