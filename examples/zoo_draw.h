/*
 * zoo_draw.h - sheets of small charts with a legend below each, built on the
 * primitives of plot.h. All text of a sheet has one size.
 */
#ifndef ZOO_DRAW_H
#define ZOO_DRAW_H

#if defined(__GNUC__)       /* plot.h draws more than this program needs */
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include "plot.h"
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

/* One small chart: lines, over the contours of a function if there is one. */
typedef struct {
    const char *title;
    const plot_series *series;      /* up to 8 differ in colour */
    int count;
    double (*surface)(double x, double y);
    const double *level;            /* of the contours */
    int levels;
    double goal_x, goal_y;          /* a cross there; NAN: none */
    double xlo, xhi, ylo, yhi;      /* limits; NAN: those of the data */
    int log_y;
    int ends;                       /* a dot at the last point of each line */
} zoo_panel;

typedef struct {
    const char *title, *xlabel, *ylabel;    /* xlabel: below each chart, without legends once below all */
    int columns, legend_columns;            /* legend_columns 0: no legends */
    double width, height;                   /* of one chart */
} zoo_sheet;

static void zoo_panel_defaults(zoo_panel *panel)
{
    memset(panel, 0, sizeof *panel);
    panel->goal_x = panel->goal_y = panel->xlo = panel->xhi = panel->ylo = panel->yhi = NAN;
}

/* ---- contours ----------------------------------------------------------- */

enum { ZOO_GRID = 96 };             /* cells along each side of a chart */

/* Where the contour crosses the side from p to q of a cell, in parts of the side; < 0: it does not. */
static double zoo_crossing(double p, double q, double level)
{
    return (p < level) == (q < level) ? -1 : (level - p) / (q - p);
}

/* The contour of one level by marching squares: one line through each cell, two through a saddle. */
static void zoo_contour(plot_canvas *c, const plot_chart *f, const double *value, double level)
{
    const double w = f->w / ZOO_GRID, h = f->h / ZOO_GRID;
    double *line = (double *)malloc(ZOO_GRID * ZOO_GRID * 8 * sizeof *line);
    int lines = 0;
    c->failed |= !line;
    for (int i = 0; line && i < ZOO_GRID * ZOO_GRID; i++) {
        const int col = i % ZOO_GRID, row = i / ZOO_GRID;
        const double *at = value + row * (ZOO_GRID + 1) + col, *up = at + ZOO_GRID + 1;
        const double x = f->x + col * w, y = f->y + f->h - row * h;
        const double side[4] = {zoo_crossing(at[0], at[1], level), zoo_crossing(at[1], up[1], level),
                                zoo_crossing(up[0], up[1], level), zoo_crossing(at[0], up[0], level)};
        const double px[4] = {x + side[0] * w, x + w, x + side[2] * w, x};
        const double py[4] = {y, y - side[1] * h, y - h, y - side[3] * h};
        double *end = line + 4 * lines;
        int ends = 0;
        for (int k = 0; k < 4; k++)
            if (side[k] >= 0) {
                end[2 * ends] = px[k];
                end[2 * ends++ + 1] = py[k];
            }
        lines += ends / 2;
    }
    if (line)
        plot_segments(c, line, lines, 0xb4b4b4, 0.4);
    free(line);
}

static void zoo_contours(plot_canvas *c, const plot_chart *f, const zoo_panel *panel)
{
    const int side = ZOO_GRID + 1;
    double *value = (double *)malloc((size_t)(side * side) * sizeof *value);
    c->failed |= !value;
    for (int i = 0; value && i < side * side; i++) {
        const double u = (double)(i % side) / ZOO_GRID, v = (double)(i / side) / ZOO_GRID;
        value[i] = panel->surface(f->x_axis.lo + u * (f->x_axis.hi - f->x_axis.lo),
                                  f->y_axis.lo + v * (f->y_axis.hi - f->y_axis.lo));
    }
    plot_box(c, f->x, f->y, f->w, f->h, PLOT_WHITE);    /* over the grid lines of the axes */
    for (int i = 0; value && i < panel->levels; i++)
        zoo_contour(c, f, value, panel->level[i]);
    free(value);
}

static void zoo_goal(plot_canvas *c, const plot_chart *f, double x, double y)
{
    const double px = f->x + f->w * plot_unit(&f->x_axis, x);
    const double py = f->y + f->h * (1 - plot_unit(&f->y_axis, y)), r = 3;
    const double cross[] = {px - r, py - r, px + r, py + r, px - r, py + r, px + r, py - r};
    plot_segments(c, cross, 2, PLOT_BLACK, 1);
}

/* ---- a sheet ------------------------------------------------------------ */

/* A dot at the last point of a line that lies on the axes. */
static void zoo_end(plot_canvas *c, const plot_chart *f, int index)
{
    const plot_series *s = &f->series[index];
    int last = s->count - 1;
    while (last >= 0 && !plot_on_axes(f, s->x[last], s->y[last]))
        last--;
    if (last < 0)
        return;
    const double u = plot_unit(&f->x_axis, s->x[last]), v = plot_unit(&f->y_axis, s->y[last]);
    const double dot[] = {f->x + f->w * u, f->y + f->h * (1 - v)};
    if (u >= 0 && u <= 1 && v >= 0 && v <= 1)
        plot_polyline(c, dot, 1, plot_palette[s->colour ? s->colour - 1 : index % PLOT_COLOURS], 3.4, 0);
}

static void zoo_legend(plot_canvas *c, const plot_chart *f, int columns, double y, double pitch)
{
    const double em = f->em;
    int named = 0;
    for (int i = 0; i < f->count; i++) {
        if (!f->series[i].name)
            continue;
        const double x = f->x + named % columns * pitch, row = y + named / columns * 1.35 * em;
        const double xy[] = {x, row, x + 1.9 * em, row};
        plot_chart_stroke(c, f, i, xy, 2);
        plot_text(c, x + 2.3 * em, row + PLOT_DIGIT / 2 * em, f->series[i].name, em, 0, 0);
        named++;
    }
}

static void zoo_chart(plot_canvas *c, plot_chart *f, const zoo_panel *panel, const zoo_sheet *sheet,
                      double legend_pitch)
{
    const double em = f->em;
    plot_chart_axes(c, f);
    plot_clip(c, f->x, f->y, f->w, f->h);
    if (panel->surface)
        zoo_contours(c, f, panel);
    for (int i = 0; i < f->count; i++)
        plot_chart_series(c, f, i);
    for (int i = 0; panel->ends && i < f->count; i++)
        zoo_end(c, f, i);
    if (isfinite(panel->goal_x))
        zoo_goal(c, f, panel->goal_x, panel->goal_y);
    plot_unclip(c);
    plot_frame(c, f->x, f->y, f->w, f->h, PLOT_BLACK, PLOT_HAIR);
    plot_text(c, f->x + f->w / 2, f->y - 0.45 * em, panel->title, em, 0.5, 0);
    if (!sheet->legend_columns)
        return;
    if (sheet->xlabel)
        plot_text(c, f->x + f->w / 2, f->y + f->h + 2.75 * em, sheet->xlabel, em, 0.5, 0);
    zoo_legend(c, f, sheet->legend_columns, f->y + f->h + 4.1 * em, legend_pitch);
}

/* Axes and ticks of one panel. */
static const char *zoo_chart_open(plot_chart *f, plot_style *style, const zoo_panel *panel,
                                  const zoo_sheet *sheet, plot_lines_options *o)
{
    plot_lines_defaults(o);
    o->log_y = panel->log_y;
    o->xlo = panel->xlo;
    o->xhi = panel->xhi;
    o->ylo = panel->ylo;
    o->yhi = panel->yhi;
    memset(f, 0, sizeof *f);
    f->style = style;
    f->series = panel->series;
    f->count = panel->count;
    f->o = o;
    f->em = style->font_size;
    f->w = sheet->width;
    f->h = sheet->height;
    const char *error = plot_chart_data(f, style);
    if (error)
        return error;
    plot_ticks_make(&f->y_ticks, &f->y_axis, f->h, 2 * f->em);
    plot_ticks_make(&f->x_ticks, &f->x_axis, f->w, 4 * f->em);
    return NULL;
}

/* Draws the panels row by row. Writes PATH.png and PATH.svg. */
static const char *zoo_draw(plot_style *style, const char *path, const zoo_panel *panel, int count,
                            const zoo_sheet *sheet)
{
    const double em = style->font_size, margin = 0.8 * em;
    const int rows = (count + sheet->columns - 1) / sheet->columns;
    const int columns = count < sheet->columns ? count : sheet->columns;
    double tick = 0, names = 0;
    int legend_rows = 0;
    plot_chart f;
    plot_lines_options o;
    plot_canvas c;
    for (int i = 0; i < count; i++) {
        int named = 0;
        const char *error = zoo_chart_open(&f, style, &panel[i], sheet, &o);
        if (error)
            return error;
        tick = fmax(tick, plot_ticks_width(style, &f.y_ticks));
        for (int k = 0; k < panel[i].count; k++)
            if (panel[i].series[k].name) {
                names = fmax(names, plot_text_width(style, panel[i].series[k].name, em));
                named++;
            }
        if (sheet->legend_columns)
            legend_rows = (int)fmax(legend_rows, (named + sheet->legend_columns - 1) / sheet->legend_columns);
    }
    const double legend_pitch = 3.1 * em + names, side = tick + PLOT_TICK + 0.3 * em;
    const double legend_width = sheet->legend_columns * legend_pitch;
    const double pitch_x = fmax(sheet->width + side + 1.6 * em, legend_rows ? legend_width + 0.6 * em : 0);
    const double below = legend_rows ? (1.35 * legend_rows + 2.2) * em : 0;
    const double pitch_y = sheet->height + 3.6 * em + below;
    const plot_block ylabel = plot_wrap(style, sheet->ylabel, em, rows * pitch_y);
    const double left = margin + (ylabel.lines ? ylabel.height + 0.5 * em : 0);
    const double last = fmax(sheet->width + 1.2 * em, legend_rows ? legend_width : 0);
    const double width = left + side + (columns - 1) * pitch_x + last + margin, middle = (left + width) / 2;
    const plot_block title = plot_wrap(style, sheet->title, PLOT_TITLE * em, width - 2 * margin);
    const plot_block xlabel = plot_wrap(style, legend_rows ? NULL : sheet->xlabel, em, width - 2 * margin);
    const double top = margin + (title.lines ? title.height + 0.6 * em : 0) + 1.4 * em;
    const double foot = top + (rows - 1) * pitch_y + sheet->height + 1.9 * em + below;
    plot_canvas_open(&c, style, width, foot + xlabel.height + margin);
    for (int i = 0; i < count; i++) {
        zoo_chart_open(&f, style, &panel[i], sheet, &o);
        f.x = plot_snap(&c, left + side + i % columns * pitch_x);
        f.y = plot_snap(&c, top + i / columns * pitch_y);
        zoo_chart(&c, &f, &panel[i], sheet, legend_pitch);
    }
    plot_put_block(&c, middle, margin, &title, PLOT_TITLE * em, 0);
    plot_put_block(&c, middle, foot, &xlabel, em, 0);
    plot_put_block(&c, margin - 0.2 * em, (top + foot) / 2, &ylabel, em, 1);
    return plot_canvas_close(&c, style, path);
}

#endif /* ZOO_DRAW_H */
