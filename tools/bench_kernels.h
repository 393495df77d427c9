/* bench_kernels.h - what the benchmark measures the library against: a team of threads, the processor's peak rate of
   fused multiply-adds, the memory's bandwidth, and a single-pass AdamW written by hand. */
#ifndef DOTOPT_BENCH_KERNELS_H
#define DOTOPT_BENCH_KERNELS_H

#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#define BENCH_X86 1
#include <immintrin.h>
#define BENCH_TARGET(features) __attribute__((target(features), noinline))
#else
#define BENCH_X86 0
#endif

/* ---- a team of threads -------------------------------------------------- */

/* Runs a task on every member, the caller being member 0. Members spin for a while between two tasks, so that short ones can
   be timed, and then sleep, so that they are in no one's way. */
enum { TEAM_MOST = 64, TEAM_SPINS = 20000 };
typedef void (*team_task)(void *argument, int member, int members);
typedef struct {
    int members, started;               /* started: other threads that run */
    pthread_t thread[TEAM_MOST];
    pthread_mutex_t lock;
    pthread_cond_t wake;
    unsigned round;
    int busy;
    team_task task;                     /* NULL: go home */
    void *argument;
} team;
typedef struct { team *of; int member; } team_seat;

static void *team_member(void *seat)
{
    team *t = ((team_seat *)seat)->of;
    const int member = ((team_seat *)seat)->member;
    free(seat);
    for (unsigned seen = 0;;) {
        for (int i = 0; i < TEAM_SPINS && __atomic_load_n(&t->round, __ATOMIC_ACQUIRE) == seen; ++i) { }
        pthread_mutex_lock(&t->lock);
        while (t->round == seen) pthread_cond_wait(&t->wake, &t->lock);
        seen = t->round;
        pthread_mutex_unlock(&t->lock);
        if (!t->task) return NULL;
        t->task(t->argument, member, t->members);
        __atomic_sub_fetch(&t->busy, 1, __ATOMIC_RELEASE);
    }
}

static void team_start(team *t, team_task task, void *argument)
{
    pthread_mutex_lock(&t->lock);
    t->task = task;
    t->argument = argument;
    t->busy = t->started;
    __atomic_add_fetch(&t->round, 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

static void team_run(team *t, team_task task, void *argument)
{
    team_start(t, task, argument);
    task(argument, 0, t->members);
    for (int i = 0; __atomic_load_n(&t->busy, __ATOMIC_ACQUIRE) > 0; ++i)
        if (i > TEAM_SPINS) sched_yield();
}

static void team_close(team *t)
{
    team_start(t, NULL, NULL);
    for (int i = 0; i < t->started; ++i) pthread_join(t->thread[i], NULL);
    pthread_mutex_destroy(&t->lock);
    pthread_cond_destroy(&t->wake);
}

static bool team_open(team *t, int members)
{
    memset(t, 0, sizeof *t);
    t->members = members;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    while (members <= TEAM_MOST && t->started < members - 1) {
        team_seat *seat = (team_seat *)malloc(sizeof *seat);
        if (!seat) break;
        *seat = (team_seat){ t, t->started + 1 };
        if (pthread_create(&t->thread[t->started], NULL, team_member, seat)) { free(seat); break; }
        ++t->started;
    }
    if (t->started == members - 1) return true;
    team_close(t);
    return false;
}

/* Part `member` of n elements: whole multiples of 64, but for the last. */
static size_t team_part(size_t n, int member, int members)
{
    return member == members ? n : n / 64 * (size_t)member / (size_t)members * 64;
}

/* ---- peak rate of multiply-adds ----------------------------------------- */

/* x = x a + b on independent registers, as many as hide the latency of two units of four cycles, in a loop that the compiler can
   neither shorten nor spill. Returns something that depends on all of them. */
#define FMA_ROUNDS 100000
typedef struct { const char *name; double flop; float (*run)(void); } fma_kernel;

static float fma_portable(void)
{
    float a = 0.999f, b = 1e-3f, c[8] = { 0, 1, 2, 3, 4, 5, 6, 7 };
    for (int i = 0; i < FMA_ROUNDS; ++i)
        for (int k = 0; k < 8; ++k) c[k] = c[k] * a + b;
    return c[0] + c[1] + c[2] + c[3] + c[4] + c[5] + c[6] + c[7];
}

#if BENCH_X86
#define FMA_TIMES12(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define FMA_TIMES24(X) FMA_TIMES12(X) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23)

BENCH_TARGET("avx2,fma") static float fma_avx2(void)
{
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
    __m256 sum = _mm256_setzero_ps();
#define BEGIN(k) __m256 c##k = _mm256_set1_ps((float)k);
#define STEP(k) c##k = _mm256_fmadd_ps(c##k, a, b);
#define END(k) sum = _mm256_add_ps(sum, c##k);
    FMA_TIMES12(BEGIN)
    for (int i = 0; i < FMA_ROUNDS; ++i) { FMA_TIMES12(STEP) }
    FMA_TIMES12(END)
#undef BEGIN
#undef STEP
#undef END
    return _mm256_cvtss_f32(sum);
}

BENCH_TARGET("avx512f") static float fma_avx512(void)
{
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
    __m512 sum = _mm512_setzero_ps();
#define BEGIN(k) __m512 c##k = _mm512_set1_ps((float)k);
#define STEP(k) c##k = _mm512_fmadd_ps(c##k, a, b);
#define END(k) sum = _mm512_add_ps(sum, c##k);
    FMA_TIMES24(BEGIN)
    for (int i = 0; i < FMA_ROUNDS; ++i) { FMA_TIMES24(STEP) }
    FMA_TIMES24(END)
#undef BEGIN
#undef STEP
#undef END
    return _mm512_cvtss_f32(sum);
}
#endif

/* The kernel of the widest registers that this processor and its system have. */
static fma_kernel fma_best(void)
{
#if BENCH_X86
    if (__builtin_cpu_supports("avx512f")) return (fma_kernel){ "avx512", 2.0 * 16 * 24 * FMA_ROUNDS, fma_avx512 };
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return (fma_kernel){ "avx2", 2.0 * 8 * 12 * FMA_ROUNDS, fma_avx2 };
#endif
    return (fma_kernel){ "portable", 2.0 * 8 * FMA_ROUNDS, fma_portable };
}

/* ---- bandwidth ---------------------------------------------------------- */

/* a = b + 3 c */
static void triad_portable(float *a, const float *b, const float *c, size_t n)
{
    for (size_t i = 0; i < n; ++i) a[i] = b[i] + 3 * c[i];
}

#if BENCH_X86
BENCH_TARGET("avx2,fma") static void triad_avx2(float *a, const float *b, const float *c, size_t n, bool streaming)
{
    const __m256 three = _mm256_set1_ps(3);
    for (size_t i = 0; i + 8 <= n; i += 8) {
        const __m256 x = _mm256_fmadd_ps(three, _mm256_loadu_ps(c + i), _mm256_loadu_ps(b + i));
        if (streaming) _mm256_stream_ps(a + i, x);
        else _mm256_storeu_ps(a + i, x);
    }
    _mm_sfence();
}
#endif

/* Streaming stores, which need addresses that are multiples of 32 bytes, do not read what they overwrite. */
static void triad(float *a, const float *b, const float *c, size_t n, bool streaming)
{
#if BENCH_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        triad_avx2(a, b, c, n, streaming);
        return;
    }
#endif
    (void)streaming;
    triad_portable(a, b, c, n);
}

/* ---- AdamW in one pass -------------------------------------------------- */

/* The yardstick: as PyTorch's AdamW at step t, 28 bytes of traffic a parameter. */
typedef struct { float beta1, beta2, eps, keep, step, root; } adamw_numbers;

static adamw_numbers adamw_at(int64_t t)
{
    const double lr = 1e-3, decay = 1e-2, beta1 = 0.9, beta2 = 0.999;
    return (adamw_numbers){ (float)beta1, (float)beta2, 1e-8f, (float)(1 - lr * decay), (float)(-lr / (1 - pow(beta1, (double)t))),
                            (float)(1 / sqrt(1 - pow(beta2, (double)t))) };
}

static void adamw_portable(float *w, const float *g, float *m, float *v, size_t n, const adamw_numbers *k)
{
    for (size_t i = 0; i < n; ++i) {
        m[i] = k->beta1 * m[i] + (1 - k->beta1) * g[i];
        v[i] = k->beta2 * v[i] + (1 - k->beta2) * g[i] * g[i];
        w[i] = k->keep * w[i] + k->step * (m[i] / (sqrtf(v[i]) * k->root + k->eps));
    }
}

#if BENCH_X86
BENCH_TARGET("avx2,fma") static void adamw_avx2(float *w, const float *g, float *m, float *v, size_t n, const adamw_numbers *k)
{
    const __m256 beta1 = _mm256_set1_ps(k->beta1), rest1 = _mm256_set1_ps(1 - k->beta1), beta2 = _mm256_set1_ps(k->beta2),
                 rest2 = _mm256_set1_ps(1 - k->beta2), eps = _mm256_set1_ps(k->eps), keep = _mm256_set1_ps(k->keep),
                 step = _mm256_set1_ps(k->step), root = _mm256_set1_ps(k->root);
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        const __m256 G = _mm256_loadu_ps(g + i);
        const __m256 M = _mm256_fmadd_ps(beta1, _mm256_loadu_ps(m + i), _mm256_mul_ps(rest1, G));
        const __m256 V = _mm256_fmadd_ps(beta2, _mm256_loadu_ps(v + i), _mm256_mul_ps(rest2, _mm256_mul_ps(G, G)));
        const __m256 d = _mm256_div_ps(M, _mm256_fmadd_ps(_mm256_sqrt_ps(V), root, eps));
        _mm256_storeu_ps(w + i, _mm256_fmadd_ps(step, d, _mm256_mul_ps(_mm256_loadu_ps(w + i), keep)));
        _mm256_storeu_ps(m + i, M);
        _mm256_storeu_ps(v + i, V);
    }
    adamw_portable(w + i, g + i, m + i, v + i, n - i, k);
}
#endif

static void adamw(float *w, const float *g, float *m, float *v, size_t n, const adamw_numbers *k)
{
#if BENCH_X86
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        adamw_avx2(w, g, m, v, n, k);
        return;
    }
#endif
    adamw_portable(w, g, m, v, n, k);
}

#endif
