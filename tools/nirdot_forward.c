/* Times the forward model of examples/nirdot_physics.h on random ellipsoids with two tumours.

   cc -O2 -std=c99 -I. -o build/nirdot_forward tools/nirdot_forward.c -lm -pthread
   build/nirdot_forward [N [SOURCES [THREADS [PHANTOMS]]]]
   by default 64 voxels a side, 50 sources, 2 threads, 8 phantoms for each thread

   Processor time of each part, and phantoms a minute by the clock with all the threads, one phantom at a time each. */
#define _POSIX_C_SOURCE 200809L
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "examples/nirdot_physics.h"

enum { MAX_SOURCES = 256, PER_SOURCE = 20, MAX_THREADS = 64, PARTS = 4 };
static const char *const part_name[PARTS] = { "surface", "matrix", "optodes", "solution" };

typedef struct {
    int n, sources, phantoms, thread;
    double seconds[PARTS];
    int iterations;
    bool failed;
} job;

static double clock_of(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* A repeatable sequence in [0, 1). */
static double draw(uint32_t *state)
{
    *state = *state * 1664525u + 1013904223u;
    return (double)(*state >> 8) / 16777216;
}

static void draw_direction(uint32_t *state, double v[3])
{
    const double z = 2 * draw(state) - 1, angle = 2 * NIR_PI * draw(state);
    v[0] = sqrt(1 - z * z) * cos(angle);
    v[1] = sqrt(1 - z * z) * sin(angle);
    v[2] = z;
}

typedef struct {
    nir_ellipsoid shape;
    uint8_t *label;
    float *mu_a, *mu_s;
    double source[MAX_SOURCES][3], detector[MAX_SOURCES * PER_SOURCE][3];
    uint16_t pair[MAX_SOURCES * PER_SOURCE][2];
    double log_amplitude[MAX_SOURCES * PER_SOURCE], phase[MAX_SOURCES * PER_SOURCE];
} phantom;

static void make_phantom(phantom *p, nir_grid grid, int sources, uint32_t *state)
{
    double tumour[2][3];
    for (int k = 0; k < 3; ++k) p->shape.semi_axis[k] = 25 + 5 * draw(state);
    for (int k = 0; k < 9; ++k) p->shape.rotation[k] = k % 4 == 0;
    for (int t = 0; t < 2; ++t)
        for (int k = 0; k < 3; ++k) tumour[t][k] = 24 * draw(state) - 12;
    for (int z = 0, i = 0; z < grid.n; ++z)
        for (int y = 0; y < grid.n; ++y)
            for (int x = 0; x < grid.n; ++x, ++i) {
                const int voxel[3] = { x, y, z };
                double at[3];
                nir_centre(grid, voxel, at);
                p->label[i] = nir_ellipsoid_level(&p->shape, at, NULL) < 0;
                for (int t = 0; t < 2 && p->label[i]; ++t)
                    if (hypot(hypot(at[0] - tumour[t][0], at[1] - tumour[t][1]), at[2] - tumour[t][2]) < 8)
                        p->label[i] = (uint8_t)(2 + t);
                p->mu_a[i] = p->label[i] == 0 ? 0 : p->label[i] == 1 ? 0.005f : 0.012f;
                p->mu_s[i] = p->label[i] == 0 ? 0 : p->label[i] == 1 ? 1 : 1.6f;
            }
    for (int s = 0; s < sources; ++s) {
        double u[3], v[3];
        draw_direction(state, u);
        for (int k = 0; k < 3; ++k) p->source[s][k] = u[k] * p->shape.semi_axis[k];
        for (int d = 0; d < PER_SOURCE; ++d) {
            const int i = s * PER_SOURCE + d;
            draw_direction(state, v);
            for (int k = 0; k < 3; ++k) v[k] = u[k] + 0.7 * v[k];
            const double length = hypot(hypot(v[0], v[1]), v[2]);
            for (int k = 0; k < 3; ++k) p->detector[i][k] = v[k] / length * p->shape.semi_axis[k];
            p->pair[i][0] = (uint16_t)s;
            p->pair[i][1] = (uint16_t)i;
        }
    }
}

static void *work(void *argument)
{
    job *j = (job *)argument;
    const nir_grid grid = { j->n, 64.0 / j->n };
    const size_t voxels = (size_t)j->n * (size_t)j->n * (size_t)j->n;
    uint32_t state = (uint32_t)j->thread + 1;
    nir_workspace *ws = nir_workspace_new(grid, NULL);
    phantom *p = (phantom *)calloc(1, sizeof *p);
    j->failed = true;
    if (!ws || !p) return NULL;
    p->label = (uint8_t *)calloc(voxels, 1);
    p->mu_a = (float *)calloc(voxels, sizeof(float));
    p->mu_s = (float *)calloc(voxels, sizeof(float));
    for (int i = 0; i < j->phantoms && p->label && p->mu_a && p->mu_s; ++i) {
        double at[PARTS + 1];
        make_phantom(p, grid, j->sources, &state);
        at[0] = clock_of(CLOCK_THREAD_CPUTIME_ID);
        if (!nir_set_tissue(ws, &p->shape, p->label)) return NULL;
        at[1] = clock_of(CLOCK_THREAD_CPUTIME_ID);
        if (!nir_set_properties(ws, p->mu_a, p->mu_s)) return NULL;
        at[2] = clock_of(CLOCK_THREAD_CPUTIME_ID);
        if (!nir_set_optodes(ws, (const double (*)[3])p->source, j->sources, (const double (*)[3])p->detector,
                j->sources * PER_SOURCE)) return NULL;
        at[3] = clock_of(CLOCK_THREAD_CPUTIME_ID);
        const int pairs = j->sources * PER_SOURCE;
        if (!nir_forward(ws, p->pair[0], pairs, NIR_KEEP_NOTHING, p->log_amplitude, p->phase)) return NULL;
        at[4] = clock_of(CLOCK_THREAD_CPUTIME_ID);
        for (int k = 0; k < PARTS; ++k) j->seconds[k] += at[k + 1] - at[k];
        j->iterations = ws->iterations;
        j->failed = i + 1 < j->phantoms;
    }
    free(p->label);
    free(p->mu_a);
    free(p->mu_s);
    free(p);
    nir_workspace_free(ws);
    return NULL;
}

int main(int argc, char **argv)
{
    const int value[4] = { argc > 1 ? atoi(argv[1]) : 64, argc > 2 ? atoi(argv[2]) : 50, argc > 3 ? atoi(argv[3]) : 2,
        argc > 4 ? atoi(argv[4]) : 8 };
    const int n = value[0], sources = value[1], threads = value[2], phantoms = value[3];
    if (argc > 5 || n < 4 || sources < 1 || sources > MAX_SOURCES || threads < 1 || threads > MAX_THREADS ||
        phantoms < 1) {
        fprintf(stderr, "usage: %s [N [SOURCES (to %d) [THREADS (to %d) [PHANTOMS]]]]\n", argv[0], MAX_SOURCES,
            MAX_THREADS);
        return 2;
    }
    pthread_t thread[MAX_THREADS];
    static job jobs[MAX_THREADS];
    const double start = clock_of(CLOCK_MONOTONIC);
    int begun = 0;
    for (; begun < threads; ++begun) {
        jobs[begun] = (job){ .n = n, .sources = sources, .phantoms = phantoms, .thread = begun };
        if (pthread_create(&thread[begun], NULL, work, &jobs[begun])) break;
    }
    for (int t = 0; t < begun; ++t) pthread_join(thread[t], NULL);
    const double wall = clock_of(CLOCK_MONOTONIC) - start;
    double total = 0, seconds[PARTS] = { 0 };
    for (int t = 0; t < threads; ++t) {
        if (t >= begun || jobs[t].failed) {
            fprintf(stderr, "nirdot_forward: a thread failed\n");
            return 1;
        }
        for (int k = 0; k < PARTS; ++k) seconds[k] += jobs[t].seconds[k] / threads / phantoms;
    }
    for (int k = 0; k < PARTS; ++k) total += seconds[k];
    printf("%d^3, %d sources, %d threads, %d iterations\n", n, sources, threads, jobs[0].iterations);
    for (int k = 0; k < PARTS; ++k) printf("%-9s %8.2f ms of processor time\n", part_name[k], 1e3 * seconds[k]);
    printf("%-9s %8.2f ms of processor time: %.2f for each source, %.0f phantoms/min on each processor\n", "all",
        1e3 * total, 1e3 * seconds[PARTS - 1] / sources, 60 / total);
    printf("%.0f phantoms/min by the clock\n", threads * phantoms / wall * 60);
    return 0;
}
