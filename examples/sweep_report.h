/*
 * sweep_report.h - what a sweep found: the table and the pictures.
 */
#ifndef SWEEP_REPORT_H
#define SWEEP_REPORT_H

#include "plot.h"
#include "sweep_results.h"

/* ---- the grid of a variant ---------------------------------------------- */

/* Rows are learning rates, columns weight decays, row 0 the lowest. With several seeds a cell is the geometric mean of its
   runs, and diverged if one of them is. NaN: diverged, -INFINITY: not run. */
typedef struct {
    const sweep_variant *variant;
    int rows, cols, cells, runs, diverged;  /* cells: that were run */
    const double *lr, *decay;               /* the axes, multipliers */
    double *loss;                           /* final test loss */
    int best;                               /* the cell with the lowest; -1: all diverged */
    int chosen;                             /* the cell with the lowest validation loss; -1: no validation */
    double median;                          /* of the finite cells */
    double near;                            /* share of the cells within 5 % of the best */
    double share_lr, share_decay, interaction;  /* of the variance of log loss; NaN: not enough cells */
    int used_rows, used_cols;               /* the sub-grid that the shares are of */
    const sweep_run *best_run;
} sweep_grid;

typedef struct {
    int rows, cols, count;
    double *lr, *decay;
    sweep_grid grid[SWEEP_VARIANTS];
    int epochs, seeds;
} sweep_report;

static int sweep_compare_doubles(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

/* Sorts, drops repetitions, and returns how many are left. */
static int sweep_unique(double *values, int count)
{
    int kept = 0;
    if (count) qsort(values, (size_t)count, sizeof *values, sweep_compare_doubles);
    for (int i = 0; i < count; ++i)
        if (i == 0 || values[i] != values[kept - 1]) values[kept++] = values[i];
    return kept;
}

static int sweep_position(const double *axis, int count, double value)
{
    int i = 0;
    while (i < count && axis[i] != value) ++i;
    return i;
}

/* Fills `cell` with the geometric mean of a loss over the runs of each cell. */
static void sweep_average(const sweep_grid *g, const sweep_runs *runs, bool validation, double *cell)
{
    const int cells = g->rows * g->cols;
    int *number = (int *)sweep_alloc((size_t)cells, sizeof *number);
    for (int i = 0; i < cells; ++i) cell[i] = 0;
    for (int i = 0; i < runs->count; ++i) {
        const sweep_run *r = runs->run[i];
        if (&sweep_variants[r->variant] != g->variant) continue;
        const int at = sweep_position(g->lr, g->rows, r->lr) * g->cols + sweep_position(g->decay, g->cols, r->decay);
        const sweep_epoch *last = &r->epoch[r->epochs - 1];
        cell[at] += r->diverged ? NAN : log(validation ? last->validation : last->test);
        ++number[at];
    }
    for (int i = 0; i < cells; ++i) cell[i] = number[i] ? exp(cell[i] / number[i]) : -INFINITY;
    free(number);
}

static int sweep_lowest(const double *cell, int count)
{
    int best = -1;
    for (int i = 0; i < count; ++i)
        if (isfinite(cell[i]) && (best < 0 || cell[i] < cell[best])) best = i;
    return best;
}

/* ---- how far learning rate and weight decay are coupled ------------------ */

/* Drops the row or column with the largest share of cells without a loss, again and again, until none is left. */
static void sweep_complete(const sweep_grid *g, bool *row, bool *col, int *rows, int *cols)
{
    *rows = g->rows;
    *cols = g->cols;
    for (;;) {
        int worst = -1;
        double share = 0;
        for (int line = 0; line < g->rows + g->cols; ++line) {      /* rows, then columns */
            const bool is_row = line < g->rows;
            int bad = 0;
            if (is_row ? !row[line] : !col[line - g->rows]) continue;
            for (int i = 0; i < (is_row ? g->cols : g->rows); ++i) {
                const int r = is_row ? line : i, c = is_row ? i : line - g->rows;
                bad += row[r] && col[c] && !isfinite(g->loss[r * g->cols + c]);
            }
            const double here = (double)bad / (is_row ? *cols : *rows);
            if (here > share) {
                share = here;
                worst = line;
            }
        }
        if (worst < 0) return;
        if (worst < g->rows) row[worst] = false, --*rows;
        else col[worst - g->rows] = false, --*cols;
    }
}

/* Two-way analysis of variance of log loss without replication: the shares of the sum of squares that belong to the
   learning rate, to the weight decay, and to neither alone (the interaction). It needs a complete grid: rows and columns
   with diverged cells are left out. */
static void sweep_anova(sweep_grid *g)
{
    bool *row = (bool *)sweep_alloc((size_t)g->rows, sizeof *row), *col = (bool *)sweep_alloc((size_t)g->cols, sizeof *col);
    double *row_mean = (double *)sweep_alloc((size_t)g->rows, sizeof *row_mean);
    double *col_mean = (double *)sweep_alloc((size_t)g->cols, sizeof *col_mean);
    double mean = 0, total = 0, by_row = 0, by_col = 0;
    for (int r = 0; r < g->rows; ++r) row[r] = true;
    for (int c = 0; c < g->cols; ++c) col[c] = true;
    sweep_complete(g, row, col, &g->used_rows, &g->used_cols);
    const int m = g->used_rows, n = g->used_cols;
    for (int r = 0; r < g->rows; ++r)
        for (int c = 0; c < g->cols; ++c) {
            if (!row[r] || !col[c]) continue;
            const double x = log(g->loss[r * g->cols + c]);
            row_mean[r] += x / n;
            col_mean[c] += x / m;
            mean += x / ((double)m * n);
        }
    for (int r = 0; r < g->rows; ++r)
        for (int c = 0; c < g->cols; ++c)
            if (row[r] && col[c]) total += pow(log(g->loss[r * g->cols + c]) - mean, 2);
    for (int r = 0; r < g->rows; ++r) by_row += row[r] ? n * pow(row_mean[r] - mean, 2) : 0;
    for (int c = 0; c < g->cols; ++c) by_col += col[c] ? m * pow(col_mean[c] - mean, 2) : 0;
    const bool enough = m > 1 && n > 1 && total > 0;
    g->share_lr = enough ? by_row / total : NAN;
    g->share_decay = enough ? by_col / total : NAN;
    g->interaction = enough ? fmax(0, 1 - g->share_lr - g->share_decay) : NAN;
    free(row);
    free(col);
    free(row_mean);
    free(col_mean);
}

/* ---- the report --------------------------------------------------------- */

static void sweep_statistics(sweep_grid *g)
{
    const int cells = g->rows * g->cols;
    double *sorted = (double *)sweep_alloc((size_t)cells, sizeof *sorted);
    int finite = 0, near = 0;
    for (int i = 0; i < cells; ++i) {
        g->cells += g->loss[i] != -INFINITY;
        g->diverged += isnan(g->loss[i]);
        if (isfinite(g->loss[i])) sorted[finite++] = g->loss[i];
    }
    if (finite) qsort(sorted, (size_t)finite, sizeof *sorted, sweep_compare_doubles);
    g->best = sweep_lowest(g->loss, cells);
    g->median = finite ? (sorted[(finite - 1) / 2] + sorted[finite / 2]) / 2 : NAN;
    for (int i = 0; i < finite; ++i) near += sorted[i] <= 1.05 * sorted[0];
    g->near = (double)near / g->cells;
    free(sorted);
}

static void sweep_grid_fill(sweep_grid *g, const sweep_runs *runs)
{
    const int cells = g->rows * g->cols;
    double *validation = (double *)sweep_alloc((size_t)cells, sizeof *validation);
    g->loss = (double *)sweep_alloc((size_t)cells, sizeof *g->loss);
    sweep_average(g, runs, false, g->loss);
    sweep_average(g, runs, true, validation);
    sweep_statistics(g);
    sweep_anova(g);
    g->chosen = sweep_lowest(validation, cells);
    for (int i = 0; i < runs->count; ++i) {
        const sweep_run *r = runs->run[i];
        if (&sweep_variants[r->variant] != g->variant || g->best < 0) continue;
        if (r->lr != g->lr[g->best / g->cols] || r->decay != g->decay[g->best % g->cols]) continue;
        if (!g->best_run || sweep_final_test(r) < sweep_final_test(g->best_run)) g->best_run = r;
    }
    free(validation);
}

/* Makes the report of a set of runs, which must outlive it. */
static void sweep_report_create(sweep_report *report, const sweep_runs *runs, int epochs)
{
    const size_t count = (size_t)runs->count;
    double *seed = (double *)sweep_alloc(count, sizeof *seed);
    memset(report, 0, sizeof *report);
    report->epochs = epochs;
    report->lr = (double *)sweep_alloc(count, sizeof(double));
    report->decay = (double *)sweep_alloc(count, sizeof(double));
    for (int i = 0; i < runs->count; ++i) {
        report->lr[i] = runs->run[i]->lr;
        report->decay[i] = runs->run[i]->decay;
        seed[i] = (double)runs->run[i]->seed;
    }
    report->rows = sweep_unique(report->lr, runs->count);
    report->cols = sweep_unique(report->decay, runs->count);
    report->seeds = sweep_unique(seed, runs->count);
    free(seed);
    for (int v = 0; v < SWEEP_VARIANTS; ++v) {
        sweep_grid *g = &report->grid[report->count];
        for (int i = 0; i < runs->count; ++i) g->runs += runs->run[i]->variant == v;
        if (!g->runs) continue;
        g->variant = &sweep_variants[v];
        g->rows = report->rows;
        g->cols = report->cols;
        g->lr = report->lr;
        g->decay = report->decay;
        sweep_grid_fill(g, runs);
        ++report->count;
    }
}

static void sweep_report_free(sweep_report *report)
{
    for (int i = 0; i < report->count; ++i) free(report->grid[i].loss);
    free(report->lr);
    free(report->decay);
}

/* ---- the table ---------------------------------------------------------- */

/* A multiplier as the seed writes it: 0, 1/32, 1, 2. */
static const char *sweep_fraction(double value, char *buffer, size_t size)
{
    const double inverse = value > 0 && value < 1 ? 1 / value : 0;
    if (inverse > 0 && inverse == floor(inverse)) snprintf(buffer, size, "1/%.0f", inverse);
    else snprintf(buffer, size, "%g", value);
    return buffer;
}

static const char *sweep_cell_text(const sweep_grid *g, int cell, char *buffer, size_t size)
{
    char lr[24], decay[24];
    if (cell < 0) return "-";
    snprintf(buffer, size, "%s x %s", sweep_fraction(g->lr[cell / g->cols], lr, sizeof lr),
             sweep_fraction(g->decay[cell % g->cols], decay, sizeof decay));
    return buffer;
}

static void sweep_print_loss(int width, double loss)
{
    if (isfinite(loss)) printf(" %*.5f", width, loss);
    else printf(" %*s", width, "-");
}

static void sweep_print_percent(int width, int decimals, double share)
{
    if (isfinite(share)) printf(" %*.*f %%", width - 2, decimals, 100 * share);
    else printf(" %*s", width, "-");
}

static void sweep_print_row(const sweep_grid *g)
{
    char text[48];
    printf("%-3s %-34s", g->variant->id, g->variant->title);
    sweep_print_loss(8, g->best < 0 ? NAN : g->loss[g->best]);
    sweep_print_loss(8, g->median);
    printf("  %-14s", sweep_cell_text(g, g->best, text, sizeof text));
    sweep_print_percent(6, 0, g->near);
    sweep_print_loss(10, g->chosen < 0 ? NAN : g->loss[g->chosen]);
    sweep_print_percent(7, 1, g->share_lr);
    sweep_print_percent(7, 1, g->share_decay);
    sweep_print_percent(12, 1, g->interaction);
    printf("%s", g->used_rows < g->rows || g->used_cols < g->cols ? " *" : "");
    if (g->diverged) printf("  %d of %d diverged", g->diverged, g->cells);
    printf("\n");
}

static void sweep_print_table(const sweep_report *report)
{
    printf("Test loss (mean squared error) after %d epoch%s; a cell is learning rate x weight decay, as multipliers\n\n",
           report->epochs, report->epochs == 1 ? "" : "s");
    printf("%-38s %8s %8s  %-14s %6s %10s %7s %7s %12s\n", "", "best", "median", "best cell", "<5 %", "validated", "lr",
           "decay", "interaction");
    for (int i = 0; i < report->count; ++i) sweep_print_row(&report->grid[i]);
    printf("\n"
           "  <5 %%        share of the cells within 5 %% of the best\n"
           "  validated   test loss of the cell with the lowest validation loss\n"
           "  lr, decay, interaction: shares of the variance of log loss over the grid (two-way analysis of variance).\n"
           "              The larger the interaction, the more the best weight decay depends on the learning rate.\n"
           "  *           without the rows and columns in which runs diverged or are missing\n"
           "  A1c         control, not in the plan; A2: inferred, the plan counts it but does not describe it\n");
}

/* ---- the pictures ------------------------------------------------------- */

/* The texts that the heatmaps share. */
typedef struct {
    char (*text)[24];               /* of the ticks: columns, then rows */
    const char **xticks, **yticks;
    char bar[96], decay[64];
    plot_heat_options options;
} sweep_labels;

static void sweep_labels_create(sweep_labels *labels, const sweep_report *report, plot_colormap map)
{
    const int ticks = report->rows + report->cols;
    labels->text = (char (*)[24])sweep_alloc((size_t)ticks, sizeof *labels->text);
    labels->xticks = (const char **)sweep_alloc((size_t)ticks, sizeof *labels->xticks);
    labels->yticks = labels->xticks + report->cols;
    for (int i = 0; i < ticks; ++i)
        labels->xticks[i] = sweep_fraction(i < report->cols ? report->decay[i] : report->lr[i - report->cols],
                                           labels->text[i], sizeof *labels->text);
    snprintf(labels->bar, sizeof labels->bar, "test loss (mean squared error) after %d epoch%s", report->epochs,
             report->epochs == 1 ? "" : "s");
    if (report->seeds > 1)
        snprintf(labels->bar + strlen(labels->bar), 40, ", mean of %d seeds", report->seeds);
    snprintf(labels->decay, sizeof labels->decay, "weight decay, to be multiplied by %g", sweep_base_decay);
    plot_heat_defaults(&labels->options);
    labels->options.map = map;
    labels->options.bar_label = labels->bar;
    labels->options.xlabel = labels->decay;
    labels->options.diverged_note = "diverged";
    labels->options.missing_note = "not run";
    labels->options.circle_note = "the ten best";
}

static void sweep_labels_free(sweep_labels *labels)
{
    free(labels->text);
    free((void *)labels->xticks);
}

enum { SWEEP_CIRCLES = 10 };

static const char *sweep_panel(const sweep_grid *g, const sweep_labels *labels, plot_panel *panel, int *circle, char *title,
                               size_t size)
{
    snprintf(title, size, "%s: %s", g->variant->id, g->variant->title);
    plot_panel_defaults(panel);
    panel->value = g->loss;
    panel->rows = g->rows;
    panel->cols = g->cols;
    panel->title = title;
    panel->xticks = labels->xticks;
    panel->yticks = labels->yticks;
    panel->circle = circle;
    panel->circles = plot_best(g->loss, g->rows * g->cols, SWEEP_CIRCLES, circle);
    return title;
}

/* One figure of the grids in `grids`; nothing if all of their cells diverged. */
static const char *sweep_draw_grids(plot_style *style, const char *path, const sweep_grid *const *grids, int count,
                                    sweep_labels *labels, const char *ylabel)
{
    plot_panel panel[SWEEP_VARIANTS];
    int circle[SWEEP_VARIANTS][SWEEP_CIRCLES];
    char title[SWEEP_VARIANTS][80];
    bool any = false;
    for (int i = 0; i < count; ++i) {
        sweep_panel(grids[i], labels, &panel[i], circle[i], title[i], sizeof title[i]);
        any |= grids[i]->best >= 0;
    }
    labels->options.ylabel = ylabel;
    return any ? plot_heatmaps(style, path, panel, count, &labels->options) : NULL;
}

/* The test loss of the best run of each variant by epoch. */
static const char *sweep_draw_curves(plot_style *style, const char *path, const sweep_report *report)
{
    plot_series series[SWEEP_VARIANTS];
    plot_lines_options options;
    double *x = (double *)sweep_alloc((size_t)report->epochs, sizeof *x), *y[SWEEP_VARIANTS];
    char name[SWEEP_VARIANTS][128];
    int count = 0;
    for (int e = 0; e < report->epochs; ++e) x[e] = e + 1;
    for (int i = 0; i < report->count; ++i) {
        const sweep_grid *g = &report->grid[i];
        if (!g->best_run) continue;
        char cell[48];
        y[count] = (double *)sweep_alloc((size_t)g->best_run->epochs, sizeof **y);
        for (int e = 0; e < g->best_run->epochs; ++e) y[count][e] = g->best_run->epoch[e].test;
        snprintf(name[count], sizeof name[count], "%s: %s (%s)", g->variant->id, g->variant->title,
                 sweep_cell_text(g, g->best, cell, sizeof cell));
        const int points = g->best_run->epochs < report->epochs ? g->best_run->epochs : report->epochs;
        series[count] = (plot_series){ name[count], x, y[count], points, 0, 0 };
        ++count;
    }
    plot_lines_defaults(&options);
    options.title = "Best run of each variant (learning rate x weight decay)";
    options.xlabel = "epoch";
    options.ylabel = "test loss (mean squared error)";
    options.log_y = 1;
    const char *error = count ? plot_lines(style, path, series, count, &options) : NULL;
    for (int i = 0; i < count; ++i) free(y[i]);
    free(x);
    return error;
}

/* Draws all figures of a report into folder/figures. NULL, or what is wrong. */
static const char *sweep_draw(plot_style *style, const char *folder, const sweep_report *report, plot_colormap map)
{
    static const char *const compared[] = { "A1", "A1c", "B3" };
    const sweep_grid *all[SWEEP_VARIANTS], *three[3];
    int alike = 0;
    const char *error = NULL;
    char path[1200], ylabel[96];
    sweep_labels labels;
    sweep_labels_create(&labels, report, map);
    for (int i = 0; i < report->count && !error; ++i) {
        const sweep_variant *v = report->grid[i].variant;
        all[i] = &report->grid[i];
        for (int k = 0; k < 3; ++k)
            if (strcmp(v->id, compared[k]) == 0) three[alike++] = all[i];
        snprintf(path, sizeof path, "%s/figures/%s_%s", folder, v->id, v->name);
        snprintf(ylabel, sizeof ylabel, "%s, to be multiplied by %g", sweep_factored(v) ? "relative step" : "learning rate",
                 v->base_lr);
        error = sweep_draw_grids(style, path, &all[i], 1, &labels, ylabel);
    }
    snprintf(path, sizeof path, "%s/figures/comparison", folder);
    if (!error && alike > 1)
        error = sweep_draw_grids(style, path, three, alike, &labels, "learning rate, to be multiplied by 0.001");
    snprintf(path, sizeof path, "%s/figures/overview", folder);
    if (!error && report->count > 1)
        error = sweep_draw_grids(style, path, all, report->count, &labels,
                                 "learning rate, to be multiplied by 0.001 (A2: 0.1; C1 to D3: 0.01)");
    snprintf(path, sizeof path, "%s/figures/curves", folder);
    if (!error) error = sweep_draw_curves(style, path, report);
    sweep_labels_free(&labels);
    return error;
}

/* The reconstructions that a run kept, below the originals, into folder/reconstructions. */
static const char *sweep_draw_reconstructions(plot_style *style, const char *folder, const sweep_settings *s,
                                              const sweep_data *data, const sweep_run *r)
{
    const sweep_variant *v = &sweep_variants[r->variant];
    const int rows = 1 + r->snapshots, shown = s->test_samples < SWEEP_SHOWN ? (int)s->test_samples : SWEEP_SHOWN;
    const unsigned char **image = (const unsigned char **)sweep_alloc((size_t)rows * SWEEP_SHOWN, sizeof *image);
    char (*label)[40] = (char (*)[40])sweep_alloc((size_t)rows, sizeof *label);
    const char **labels = (const char **)sweep_alloc((size_t)rows, sizeof *labels);
    char path[1200], title[160], lr[24], decay[24];
    for (int row = 0; row < rows; ++row) {
        const long long epoch = s->epochs < 10 ? (long long)s->epochs : 10LL * row;
        if (row) snprintf(label[row], sizeof *label, "epoch %lld", epoch);
        else snprintf(label[row], sizeof *label, "original");
        labels[row] = label[row];
        const unsigned char *first = row ? r->snapshot + (size_t)(row - 1) * SWEEP_SHOWN * SWEEP_PIXELS : data->test;
        for (int i = 0; i < shown; ++i) image[row * SWEEP_SHOWN + i] = first + i * SWEEP_PIXELS;
    }
    snprintf(title, sizeof title, "%s: %s\nmultipliers: learning rate %s, weight decay %s", v->id, v->title,
             sweep_fraction(r->lr, lr, sizeof lr), sweep_fraction(r->decay, decay, sizeof decay));
    snprintf(path, sizeof path, "%s/reconstructions/%s_lr%g_wd%g_seed%llu", folder, v->id, r->lr, r->decay,
             (unsigned long long)r->seed);
    plot_images_options options;
    plot_images_defaults(&options);
    options.title = title;
    options.row_label = labels;
    const char *error = plot_images(style, path, image, rows, SWEEP_SHOWN, SWEEP_HEIGHT, SWEEP_WIDTH, &options);
    free((void *)image);
    free(label);
    free((void *)labels);
    return error;
}

#endif
