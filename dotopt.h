/* dotopt.h - v0.1 - train neural networks from one C file - public domain or MIT-0 (your choice)

   Do this in ONE file of your program, to create the implementation:

       #define DOTOPT_IMPLEMENTATION
       #include "dotopt.h"

   and include "dotopt.h" plainly everywhere else. Never put the define in a header or on the
   compiler's command line. Build:  cc -O2 program.c -lm -pthread

   LIMITS
     - CPU only in this file (x86-64 with AVX2 or AVX-512 is fast; 64-bit ARM has NEON for matrix products and
       convolutions alone; everything else runs portable C).
     - Dense tensors, up to 8 dimensions, contiguous, 32- and 64-bit floats; no sparse tensors, no int8.
     - One process, one machine; no distributed training.
     - Gradients are first order: the backward pass is not itself recorded.
     - Convolution weights are at most 2^31 elements, an image at most 2^31 elements.

   WHAT IT IS
     Tensors, eager operations with reverse-mode autograd, layers, losses, optimizers, schedules,
     datasets, safetensors and NPY files, and run logs. It needs libc, libm and pthreads, and nothing else.

   CONVENTIONS
     - Row-major, contiguous tensors. Images are channels-last: [N,H,W,C]; volumes [N,D,H,W,C];
       sequences [N,T,C]. Defaults are PyTorch's, except for this layout.
     - A context owns everything that is created in it, and frees it all in dot_context_destroy.
     - The library never exits, prints or aborts. The first failure is kept in the context (dot_ok,
       dot_error); a call that fails returns NULL (or 0, or false) and changes nothing; a call that is given
       NULL does the same silently; and while an error stands nothing computes, so that one check per step
       (`dot_ok(ctx)`) is enough and a failed step never touches the weights.
     - Step memory: what an operation returns lives until the next dot_step_begin or dot_eval_begin.
       Parameters, datasets and optimizers live as long as the context.
     - Options are structs that a `_defaults` function fills; change fields, never zero-initialise them.
       Where a pointer to options is taken, NULL means the defaults.
     - Same seed, same machine type: the same bits, whatever the number of threads and of lanes.
     - A context may be used by one thread at a time; different contexts are independent. That thread needs 256 KiB of stack.

   CONFIGURATION MACROS (only where DOTOPT_IMPLEMENTATION is defined; none changes the interface)
     DOTOPT_NO_THREADS   no pthreads: every context runs on the calling thread
     DOTOPT_NO_SIMD      portable C kernels only

   CONTENTS (search for the text on the left; each stands twice, in the interface and in the implementation)
     [1 portability]     configuration, portability
     [2 context]         status, context, memory, threads
     [3 random]          random numbers
     [4 tensors]         tensors
     [5 backend]         backend table; CPU kernels
     [6 ops]             autograd and ops
     [7 layers]          layers and initialisation
     [8 losses]          losses and metrics
     [9 optimizers]      optimizers
     [10 schedules]      learning-rate schedules
     [11 utilities]      gradient check; clipping, accumulation, averages, Lookahead, Mechanic, SAM, guards, telemetry
     [12 files]          safetensors, checkpoints, NPY, datasets
     [13 logs]           run logs: JSON lines, TensorBoard, Weights & Biases
*/
#ifndef DOTOPT_H
#define DOTOPT_H

/* ==== [1 portability] ============================================================================== */

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define DOTOPT_VERSION_MAJOR 0
#define DOTOPT_VERSION_MINOR 1
#define DOTOPT_VERSION_PATCH 0
#define DOTOPT_VERSION "0.1.0"

#define DOT_MAX_RANK 8      /* dimensions of a tensor */
#define DOT_MAX_NAME 128    /* bytes of a parameter's or layer's name, with the final zero */

#ifdef __cplusplus
extern "C" {
#endif

/* ==== [2 context] ================================================================================== */

typedef struct dot_context dot_context;

typedef enum dot_status {
    DOT_OK = 0,
    DOT_ERROR_ARGUMENT,     /* an option or argument out of its range, NULL where an object is needed */
    DOT_ERROR_SHAPE,        /* shapes that do not fit each other */
    DOT_ERROR_DTYPE,        /* an element type that the function does not take */
    DOT_ERROR_STATE,        /* a call in the wrong order, or objects of different contexts */
    DOT_ERROR_MEMORY,       /* the allocator returned NULL, or a size does not fit size_t */
    DOT_ERROR_FILE,         /* the operating system refused to open, read, write or rename */
    DOT_ERROR_FORMAT        /* a file whose contents break its format */
} dot_status;

typedef enum dot_dtype { DOT_F32 = 0, DOT_F64, DOT_I64, DOT_U8 } dot_dtype;

/* Memory comes from here and goes back here. `allocate` returns `bytes` bytes aligned as malloc does, or
   NULL. Both are called only from the thread that uses the context. */
typedef struct dot_allocator {
    void *(*allocate)(void *user, size_t bytes);
    void (*release)(void *user, void *memory, size_t bytes);
    void *user;
} dot_allocator;

typedef struct dot_context_options {
    uint32_t magic;             /* set by dot_context_defaults */
    int threads;                /* 1..256; default: the cores this process may use */
    int lanes;                  /* copies of everything trained side by side, 1..4096; default 1 */
    uint64_t seed;              /* of every random draw; default 0 */
    const uint64_t *lane_seeds; /* `lanes` seeds, one a lane, or NULL: `seed` for all; copied */
    dot_dtype dtype;            /* DOT_F32 (default) or DOT_F64: of parameters, inputs and activations */
    bool flush_denormals;       /* treat denormal floats as zero while computing; default true (up to 100x faster
                                   where they occur; set false to compare tiny numbers with other libraries) */
    bool simd;                  /* use the fastest kernels of this processor; default true, false: portable C */
    dot_allocator allocator;    /* default: malloc and free */
    void (*log)(void *user, const char *message);  /* told what the library overrides or skips; default NULL: silent */
    void *log_user;
} dot_context_options;

dot_context_options dot_context_defaults(void);

/* A new context, or NULL when the options are invalid or memory is short. `options` may be NULL. */
dot_context *dot_context_create(const dot_context_options *options);

/* Frees the context and everything made in it. NULL is allowed. */
void dot_context_destroy(dot_context *ctx);

bool        dot_ok(const dot_context *ctx);         /* no error stands; false for NULL */
dot_status  dot_error_status(const dot_context *ctx);
const char *dot_error(const dot_context *ctx);      /* the first error's sentence, "" when none */
void        dot_error_clear(dot_context *ctx);      /* forget it, and go on */

/* What the options asked for, and what became of it. */
int         dot_threads(const dot_context *ctx);
int         dot_lanes(const dot_context *ctx);
dot_dtype   dot_context_dtype(const dot_context *ctx);
uint64_t    dot_lane_seed(const dot_context *ctx, int lane);    /* 0 for a bad lane */
const char *dot_kernels(const dot_context *ctx);    /* "avx512", "avx2", "neon" or "portable" */

/* Begin a training step: takes all step memory back and starts recording for dot_backward. */
void dot_step_begin(dot_context *ctx);

/* Begin an evaluation: takes all step memory back; nothing is recorded, dropout does nothing and batch
   normalisation uses its running statistics, until the next dot_step_begin. */
void dot_eval_begin(dot_context *ctx);

/* Lanes: a context with K lanes trains K networks at once, each with its own parameters, seed and
   hyperparameters, on the same data. Shapes do not mention lanes. Lane k computes bit for bit what a context
   with one lane and the same seed computes. A stopped lane costs no more time and keeps its values. */
bool dot_lane_stop(dot_context *ctx, int lane);     /* e.g. because its loss is no longer finite */
bool dot_lane_active(const dot_context *ctx, int lane);

typedef struct dot_memory_report {
    size_t persistent_bytes;    /* parameters, gradients, optimizer state, datasets */
    size_t step_bytes;          /* step memory held */
    size_t step_peak_bytes;     /* the most that one step has used */
    int64_t allocations;        /* calls of the allocator so far */
} dot_memory_report;
dot_memory_report dot_memory(const dot_context *ctx);

/* ==== [3 random] =================================================================================== */

/* Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a pure
   function from a 128-bit counter and a 64-bit key to 128 random bits. */
void dot_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

/* Draw `index` of stream `stream` of `seed`; a pure function, so that any draw can be made again. */
double dot_random_uniform(uint64_t seed, uint64_t stream, uint64_t index);   /* [0, 1), 53 bits */
double dot_random_normal(uint64_t seed, uint64_t stream, uint64_t index);    /* mean 0, variance 1 (Box-Muller) */

/* ==== [4 tensors] ================================================================================== */

typedef struct dot_tensor dot_tensor;

/* A tensor in persistent memory, all zero, with one copy a lane; it has no gradient until
   dot_requires_grad asks for one. `shape` has `rank` sizes >= 0; rank 0 is a scalar. */
dot_tensor *dot_tensor_create(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape);

/* A tensor in step memory, with the values at `data` (of the type `dtype`), shared by all lanes. */
dot_tensor *dot_input(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape, const void *data);

/* Asks that dot_backward compute the gradient of `t` (a persistent tensor of float type). Returns t. */
dot_tensor *dot_requires_grad(dot_tensor *t, bool on);

dot_context *dot_tensor_context(const dot_tensor *t);
dot_dtype    dot_tensor_dtype(const dot_tensor *t);
int          dot_tensor_rank(const dot_tensor *t);
int64_t      dot_tensor_dim(const dot_tensor *t, int axis);     /* a negative axis counts from the last */
int64_t      dot_tensor_size(const dot_tensor *t);              /* elements of one lane */
size_t       dot_dtype_size(dot_dtype dtype);                   /* bytes of one element */

/* The elements of one lane, row-major; valid as long as the tensor. NULL for a NULL tensor or a bad lane. */
void *dot_tensor_data(dot_tensor *t, int lane);

/* The gradient of `t` after dot_backward, a tensor of the same shape; NULL (without an error) when it has none. What operations
   compute keeps its gradient only where dot_retain_grad asked for it: else its memory is used again during dot_backward. */
dot_tensor *dot_tensor_grad(dot_tensor *t);
dot_tensor *dot_retain_grad(dot_tensor *t);             /* t; torch's Tensor.retain_grad */

/* Element 0 of one lane as a double: for losses and other scalars. NaN for NULL. */
double dot_item(const dot_tensor *t, int lane);

/* Copy `count` elements out of or into one lane (DOT_ALL: into every lane), converting from or to double. */
#define DOT_ALL (-1)
bool dot_tensor_get(const dot_tensor *t, int lane, double *out, int64_t count);
bool dot_tensor_set(dot_tensor *t, int lane, const double *values, int64_t count);

/* ==== [5 backend] ================================================================================== */

/* Which activation a fused operation applies; only those whose derivative is a function of the output. */
typedef enum dot_activation { DOT_NONE = 0, DOT_RELU, DOT_SIGMOID, DOT_TANH } dot_activation;

/* ==== [6 ops] ====================================================================================== */

/* Every operation takes tensors of one context and one float type (that of its first argument), returns a new
   tensor in step memory, and is recorded for dot_backward if any argument needs a gradient. */

/* z = a o b, elementwise, with NumPy's broadcasting. maximum and minimum give ties half the gradient each. */
dot_tensor *dot_add(dot_tensor *a, dot_tensor *b);
dot_tensor *dot_sub(dot_tensor *a, dot_tensor *b);
dot_tensor *dot_mul(dot_tensor *a, dot_tensor *b);
dot_tensor *dot_div(dot_tensor *a, dot_tensor *b);
dot_tensor *dot_maximum(dot_tensor *a, dot_tensor *b);
dot_tensor *dot_minimum(dot_tensor *a, dot_tensor *b);

/* y = f(x), elementwise. */
dot_tensor *dot_neg(dot_tensor *x);
dot_tensor *dot_abs(dot_tensor *x);                     /* derivative 0 at 0 */
dot_tensor *dot_exp(dot_tensor *x);
dot_tensor *dot_log(dot_tensor *x);
dot_tensor *dot_sqrt(dot_tensor *x);
dot_tensor *dot_square(dot_tensor *x);
dot_tensor *dot_add_scalar(dot_tensor *x, double c);    /* x + c */
dot_tensor *dot_mul_scalar(dot_tensor *x, double c);    /* x * c */
dot_tensor *dot_pow_scalar(dot_tensor *x, double c);    /* x ^ c */
dot_tensor *dot_relu(dot_tensor *x);                    /* max(x, 0); derivative 0 at 0 */
dot_tensor *dot_leaky_relu(dot_tensor *x, double slope);/* x > 0 ? x : slope x; PyTorch's default slope is 0.01 */
dot_tensor *dot_gelu(dot_tensor *x);                    /* x Phi(x), with erf (Hendrycks, Gimpel 2016) */
dot_tensor *dot_gelu_tanh(dot_tensor *x);               /* x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) */
dot_tensor *dot_silu(dot_tensor *x);                    /* x sigmoid(x) */
dot_tensor *dot_sigmoid(dot_tensor *x);                 /* 1 / (1 + exp(-x)) */
dot_tensor *dot_tanh(dot_tensor *x);
dot_tensor *dot_softplus(dot_tensor *x, double beta, double threshold);
                                                        /* log(1 + exp(beta x)) / beta; x where beta x > threshold */

/* Reductions over the axes in the set `axes`: DOT_AXIS(0) | DOT_AXIS(2), or DOT_ALL_AXES. With `keep` the
   reduced axes stay, with size 1. max and min share the gradient equally among ties (torch.amax). The mean, max and
   min of no elements are errors; their sum is 0. */
#define DOT_AXIS(i) (1u << (i))
#define DOT_ALL_AXES 0xffu
dot_tensor *dot_sum(dot_tensor *x, unsigned axes, bool keep);
dot_tensor *dot_mean(dot_tensor *x, unsigned axes, bool keep);
dot_tensor *dot_max(dot_tensor *x, unsigned axes, bool keep);
dot_tensor *dot_min(dot_tensor *x, unsigned axes, bool keep);

/* [..., M, K] x [K, N], or [..., M, K] x [..., K, N] with the same leading sizes -> [..., M, N]. */
dot_tensor *dot_matmul(dot_tensor *a, dot_tensor *b);

/* y = act(x W + b): x [..., in], weight [in, out], bias [out] or NULL -> [..., out]. PyTorch's weight is [out, in];
   the layer's file name and shape are PyTorch's (see dot_layer_parameter). */
dot_tensor *dot_linear(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, dot_activation act);

/* Convolution (cross-correlation, as in PyTorch) in 1, 2 or 3 dimensions: the rank of x says which. */
typedef struct dot_conv_options {
    uint32_t magic;             /* set by dot_conv_defaults */
    int kernel;                 /* 3; layers only: the ops take it from the weight's shape */
    int stride;                 /* 1 */
    int padding;                /* 0, zeros on both sides */
    int dilation;               /* 1 */
    int output_padding;         /* 0, transposed convolution only: added to one side of the output */
    int groups;                 /* 1 */
    bool bias;                  /* true; layers only */
    /* Sizes by spatial axis, first axis first; -1 (the default): the value above, for every axis. */
    int kernel_each[3], stride_each[3], padding_each[3], dilation_each[3], output_padding_each[3];
} dot_conv_options;
dot_conv_options dot_conv_defaults(void);

/* x [N, spatial..., Cin], weight [kernel..., Cin/groups, Cout], bias [Cout] or NULL -> [N, out..., Cout],
   out = floor((in + 2 padding - dilation (kernel - 1) - 1) / stride) + 1.   (torch.nn.functional.conv2d) */
dot_tensor *dot_conv(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options,
                     dot_activation act);

/* The gradient of a convolution as an operation ("deconvolution"): x [N, spatial..., Cin], weight [kernel...,
   Cout/groups, Cin], bias [Cout] or NULL -> [N, out..., Cout],
   out = (in - 1) stride - 2 padding + dilation (kernel - 1) + output_padding + 1.   (conv_transpose2d) */
dot_tensor *dot_conv_transpose(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options,
                               dot_activation act);

/* Pooling in 1, 2 or 3 dimensions, over x [N, spatial..., C]. */
typedef struct dot_pool_options {
    uint32_t magic;             /* set by dot_pool_defaults */
    int kernel;                 /* 2 */
    int stride;                 /* 0 (the default): the kernel's size */
    int padding;                /* 0; at most kernel / 2 */
    int dilation;               /* 1; max pooling only */
    bool ceil_mode;             /* false: round the output size down */
    bool count_include_pad;     /* true: an average counts the padding (PyTorch's default) */
    int kernel_each[3], stride_each[3], padding_each[3], dilation_each[3];   /* as in dot_conv_options */
} dot_pool_options;
dot_pool_options dot_pool_defaults(void);
dot_tensor *dot_max_pool(dot_tensor *x, const dot_pool_options *options);    /* ties: the first position, as PyTorch */
dot_tensor *dot_avg_pool(dot_tensor *x, const dot_pool_options *options);
/* Output sizes given, one for each spatial axis; window i of n is [floor(i L / n), ceil((i + 1) L / n)). */
dot_tensor *dot_adaptive_max_pool(dot_tensor *x, const int64_t *sizes);
dot_tensor *dot_adaptive_avg_pool(dot_tensor *x, const int64_t *sizes);

dot_tensor *dot_softmax(dot_tensor *x, int axis);       /* exp(x - max) / sum; a negative axis counts from the last */
dot_tensor *dot_log_softmax(dot_tensor *x, int axis);

/* Scaled dot-product attention of several heads: q [N, T, heads * d], k [N, S, heads * d], v [N, S, heads * e] -> [N, T, heads * e];
   head h of each is the h-th run of its last axis, and o = softmax(scale q k') v, row by row. The scores exist in small blocks only
   (online softmax). Attention weights have no dropout.
   Vaswani et al. 2017, eq. 1; Milakov, Gimelshein 2018 and Dao et al. 2022 for the blocks; torch's scaled_dot_product_attention */
typedef struct dot_attention_options {
    uint32_t magic;             /* set by dot_attention_defaults */
    int64_t heads;              /* 1 */
    double scale;               /* NAN (default): 1 / sqrt(d) */
    bool causal;                /* false; true: query t sees the keys 0..t only */
    dot_tensor *key_mask;       /* NULL; else DOT_U8 [N, S]: 0 hides a key. A query that sees no key gives zeros. */
} dot_attention_options;
dot_attention_options dot_attention_defaults(void);
dot_tensor *dot_attention(dot_tensor *q, dot_tensor *k, dot_tensor *v, const dot_attention_options *options);
/* The same with q, k and v behind one another in the last axis, as one linear layer makes them: [N, T, 3 heads d] -> [N, T, heads d]. */
dot_tensor *dot_self_attention(dot_tensor *qkv, const dot_attention_options *options);

/* While training: zero with probability p, else x / (1 - p). The mask depends on the seed, the step and the
   order of the dropouts in the step. (Srivastava et al. 2014; p in [0, 1]) */
dot_tensor *dot_dropout(dot_tensor *x, double p);

/* Normalisation: (x - mean) / sqrt(var + eps) * weight + bias, with the biased variance; weight and bias may be NULL.
   layer: over the last `axes` axes; weight and bias have their shape. (Ba et al. 2016)
   group: x [N, spatial..., C]; over the spatial axes and C / groups channels; weight, bias [C]. (Wu, He 2018)
   batch: x [N, spatial..., C]; over all axes but the last. While training the running statistics (or NULL) become
   (1 - momentum) old + momentum new, with the unbiased variance; in evaluation they are used. (Ioffe, Szegedy 2015) */
dot_tensor *dot_layer_norm(dot_tensor *x, int axes, dot_tensor *weight, dot_tensor *bias, double eps);
dot_tensor *dot_group_norm(dot_tensor *x, int groups, dot_tensor *weight, dot_tensor *bias, double eps);
dot_tensor *dot_batch_norm(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, dot_tensor *running_mean,
                           dot_tensor *running_var, double momentum, double eps);

/* Rows of `weight` [V, D] by `indices` (DOT_I64, values 0..V-1) -> [shape of indices..., D]. */
dot_tensor *dot_embedding(dot_tensor *weight, dot_tensor *indices);

dot_tensor *dot_reshape(dot_tensor *x, int rank, const int64_t *shape);  /* one size may be -1; shares memory */
dot_tensor *dot_permute(dot_tensor *x, const int *axes);                 /* result axis i is x's axis axes[i] */
dot_tensor *dot_concat(dot_tensor *const *tensors, int count, int axis);
dot_tensor *dot_slice(dot_tensor *x, int axis, int64_t begin, int64_t end);
dot_tensor *dot_pad(dot_tensor *x, const int64_t *before, const int64_t *after, double value);  /* one pair an axis */
dot_tensor *dot_detach(dot_tensor *x);                  /* the same values, cut off from the tape; shares memory */

/* Reverse-mode differentiation from the scalar `loss` (one element; its gradient is 1). Gradients of persistent tensors
   add up over calls until dot_optimizer_step or dot_zero_grad. After a failure they are undefined until then. */
bool dot_backward(dot_tensor *loss);

/* ==== [7 layers] =================================================================================== */

/* A layer owns parameters and child layers and computes one output from one input. */
typedef struct dot_layer dot_layer;

dot_layer *dot_nn_sequential(dot_context *ctx, ...);    /* layers, then NULL; fuses a layer with the activation after it */
dot_layer *dot_nn_linear(dot_context *ctx, int64_t in, int64_t out);
dot_layer *dot_nn_linear_no_bias(dot_context *ctx, int64_t in, int64_t out);
dot_layer *dot_nn_conv1d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_conv2d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_conv3d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_conv_transpose1d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_conv_transpose2d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_conv_transpose3d(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options);
dot_layer *dot_nn_max_pool(dot_context *ctx, const dot_pool_options *options);
dot_layer *dot_nn_avg_pool(dot_context *ctx, const dot_pool_options *options);
dot_layer *dot_nn_adaptive_max_pool(dot_context *ctx, int64_t depth, int64_t height, int64_t width);    /* of the output; */
dot_layer *dot_nn_adaptive_avg_pool(dot_context *ctx, int64_t depth, int64_t height, int64_t width);    /* unused sizes 0 */
dot_layer *dot_nn_batch_norm(dot_context *ctx, int64_t channels);                   /* eps 1e-5, momentum 0.1 */
dot_layer *dot_nn_layer_norm(dot_context *ctx, int64_t size);                       /* over the last axis, eps 1e-5 */
dot_layer *dot_nn_group_norm(dot_context *ctx, int groups, int64_t channels);       /* eps 1e-5 */
dot_layer *dot_nn_embedding(dot_context *ctx, int64_t rows, int64_t size);
/* Self-attention over [N, T, size]: in_proj (size to 3 size), dot_self_attention, out_proj. torch.nn.MultiheadAttention, batch_first,
   with its names and first weights (in_proj_weight Xavier uniform, biases 0). */
dot_layer *dot_nn_multihead_attention(dot_context *ctx, int64_t size, int64_t heads);
dot_layer *dot_nn_dropout(dot_context *ctx, double p);
dot_layer *dot_nn_relu(dot_context *ctx);
dot_layer *dot_nn_leaky_relu(dot_context *ctx, double slope);
dot_layer *dot_nn_gelu(dot_context *ctx);
dot_layer *dot_nn_silu(dot_context *ctx);
dot_layer *dot_nn_sigmoid(dot_context *ctx);
dot_layer *dot_nn_tanh(dot_context *ctx);
dot_layer *dot_nn_softplus(dot_context *ctx);           /* beta 1, threshold 20 */

/* [N, H, W, C] -> [N, C*H*W] with PyTorch's order of features (C slowest), and back: [N, features] -> [N, H, W, C]
   ([N, W, C], [N, D, H, W, C]: set the unused sizes to 0). In a sequential, next to a linear layer, the order is absorbed
   into that layer's parameters and costs nothing. */
dot_layer *dot_nn_flatten(dot_context *ctx);
dot_layer *dot_nn_unflatten(dot_context *ctx, int64_t depth, int64_t height, int64_t width, int64_t channels);

/* A layer of your own: forward is called with `user`. Children and parameters are added with dot_layer_add_*. */
typedef dot_tensor *(*dot_forward_function)(void *user, dot_layer *layer, dot_tensor *x);
dot_layer *dot_nn_custom(dot_context *ctx, const char *kind, dot_forward_function forward, void *user);
bool       dot_layer_add_child(dot_layer *parent, const char *name, dot_layer *child);

/* What a parameter is: weight-decay rules and optimizers ask. */
typedef enum dot_parameter_kind {
    DOT_KIND_WEIGHT = 1, DOT_KIND_BIAS = 2, DOT_KIND_NORM = 4, DOT_KIND_EMBEDDING = 8, DOT_KIND_BUFFER = 16
} dot_parameter_kind;

/* Adds a new parameter (zeros, with gradient; a DOT_KIND_BUFFER has none) named `name`; returns its tensor. */
dot_tensor *dot_layer_add_parameter(dot_layer *layer, const char *name, dot_parameter_kind kind, int rank,
                                    const int64_t *shape);

dot_tensor *dot_forward(dot_layer *layer, dot_tensor *x);

/* Names the layer within its parent ("encoder"; default: its position, "0"). Returns the layer. */
dot_layer *dot_layer_name(dot_layer *layer, const char *name);

/* The parameters and buffers of a layer and all below it, in order. `name` is PyTorch's ("encoder.0.weight").
   `shape` is PyTorch's shape, and axes[i] says which axis of the stored tensor PyTorch's axis i is. */
typedef struct dot_parameter_info {
    char name[DOT_MAX_NAME];
    dot_parameter_kind kind;
    dot_tensor *tensor;             /* as stored, in the order that the kernels want */
    int rank;                       /* PyTorch's view: rank, shape, */
    int64_t shape[DOT_MAX_RANK];
} dot_parameter_info;
int  dot_layer_parameters(dot_layer *layer);                                    /* how many */
bool dot_layer_parameter(dot_layer *layer, int index, dot_parameter_info *info);
int64_t dot_layer_parameter_count(dot_layer *layer);                            /* trainable elements, buffers not */

/* Copies a parameter's values, in PyTorch's order and shape, out of one lane or into one lane (DOT_ALL: every lane). */
bool dot_parameter_get(dot_layer *layer, const char *name, int lane, double *out, int64_t count);
bool dot_parameter_set(dot_layer *layer, const char *name, int lane, const double *values, int64_t count);
/* The same of its gradient: all zero when it has none; one that was computed elsewhere (summed over machines, say) takes the place of what
   dot_backward left. A buffer has none to set. */
bool dot_parameter_grad(dot_layer *layer, const char *name, int lane, double *out, int64_t count);
bool dot_parameter_set_grad(dot_layer *layer, const char *name, int lane, const double *values, int64_t count);

/* Forgets the gradients of all parameters of the layer. */
bool dot_zero_grad(dot_layer *layer);

/* Initialisation of a weight anew; fan_in and fan_out as PyTorch computes them. Layers begin with PyTorch's defaults:
   weights and biases of linear and convolution uniform in +-1/sqrt(fan_in), embedding normal(0, 1), norms 1 and 0. */
typedef enum dot_init {
    DOT_INIT_ZEROS, DOT_INIT_ONES,
    DOT_INIT_XAVIER_UNIFORM,    /* +- gain sqrt(6 / (fan_in + fan_out))          Glorot, Bengio 2010 */
    DOT_INIT_XAVIER_NORMAL,     /* std gain sqrt(2 / (fan_in + fan_out)) */
    DOT_INIT_KAIMING_UNIFORM,   /* +- gain sqrt(3 / fan_in)                      He et al. 2015; gain sqrt(2) for ReLU */
    DOT_INIT_KAIMING_NORMAL,    /* std gain / sqrt(fan_in) */
    DOT_INIT_ORTHOGONAL         /* gain times a random matrix with orthonormal rows or columns; Saxe et al. 2014 */
} dot_init;
bool dot_parameter_init(dot_layer *layer, const char *name, dot_init init, double gain);

/* ==== [8 losses] =================================================================================== */

/* Each returns a scalar, the mean over all elements (rows, for cross entropy); an empty input is an error. */
dot_tensor *dot_mse_loss(dot_tensor *prediction, dot_tensor *target);           /* (p - t)^2 */
dot_tensor *dot_rmse_loss(dot_tensor *prediction, dot_tensor *target);          /* sqrt of the mean of (p - t)^2 */
dot_tensor *dot_l1_loss(dot_tensor *prediction, dot_tensor *target);            /* |p - t| */
dot_tensor *dot_huber_loss(dot_tensor *prediction, dot_tensor *target, double delta);
                                    /* d^2/2 for |d| < delta, else delta (|d| - delta/2)           Huber 1964 */
dot_tensor *dot_bce_with_logits_loss(dot_tensor *logits, dot_tensor *target);
                                    /* max(x,0) - x t + log(1 + exp(-|x|)) */
/* logits [..., classes], labels DOT_I64 [...] -> mean of -sum_c q_c log softmax(logits)_c with
   q = (1 - smoothing) onehot + smoothing / classes.  (torch's cross_entropy; Szegedy et al. 2016) */
dot_tensor *dot_cross_entropy_loss(dot_tensor *logits, dot_tensor *labels, double label_smoothing);

/* ==== [9 optimizers] =============================================================================== */

/* The list of optimizers: X(constant, name, rule, description, source, defaults...). `rule` is a row of the implementation's table
   DOT__RULES (or another family); `defaults` are assignments to the options o, where they differ from DOT_HYPERPARAMETERS.
   The enum, the names, the defaults, the tests and the tables of the examples all read this list. The formulas stand, one a row,
   at DOT__RULES. */
#define DOT_OPTIMIZERS(X) \
    X(DOT_SGD, "sgd", SGD, "gradient descent", "torch.optim.SGD", o.lr = 1e-3, o.beta1 = 0, o.decay = DOT_DECAY_L2) \
    X(DOT_MOMENTUM, "momentum", SGD, "SGD with momentum", "Polyak 1964; torch.optim.SGD", o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_NESTEROV, "nesterov", SGD, "SGD with Nesterov's momentum", "Sutskever et al. 2013; torch.optim.SGD", \
      o.lr = 1e-3, o.nesterov = true, o.decay = DOT_DECAY_L2) \
    X(DOT_ADAM, "adam", ADAM, "Adam, weight decay as L2 by default", "Kingma, Ba 2015; torch.optim.Adam", o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_ADAMW, "adamw", ADAM, "Adam with decoupled weight decay", "Loshchilov, Hutter 2019; torch.optim.AdamW", \
      o.lr = 1e-3, o.weight_decay = 1e-2) \
    X(DOT_ADAFACTOR, "adafactor", FACTORED, "factored second moment, relative step", "Shazeer, Stern 2018", \
      o.lr = 1e-2, o.beta1 = 0, o.relative_step = true) \
    X(DOT_ADAMW_FACTORED, "adamw-factored", FACTORED, "Adafactor's moments and clipping with AdamW's schedule and decay", "this library", \
      o.lr = 1e-2, o.beta1 = 0) \
    X(DOT_ADAGRAD, "adagrad", ADAGRAD, "steps by the sum of squares", "Duchi et al. 2011; torch.optim.Adagrad", \
      o.lr = 1e-2, o.eps = 1e-10, o.beta1 = 0, o.decay = DOT_DECAY_L2) \
    X(DOT_RMSPROP, "rmsprop", RMSPROP, "steps by the mean of squares", "Tieleman, Hinton 2012; torch.optim.RMSprop", \
      o.lr = 1e-2, o.beta1 = 0, o.beta2 = 0.99, o.decay = DOT_DECAY_L2) \
    X(DOT_AMSGRAD, "amsgrad", AMSGRAD, "Adam with the maximum of the second moment", "Reddi et al. 2018; torch.optim.Adam", \
      o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_ADAMAX, "adamax", ADAMAX, "Adam with the infinity norm", "Kingma, Ba 2015; torch.optim.Adamax", \
      o.lr = 2e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_ADAMAXW, "adamaxw", ADAMAX, "Adamax with decoupled weight decay", "optax.adamaxw", o.lr = 2e-3, o.weight_decay = 1e-2) \
    X(DOT_NADAM, "nadam", NADAM, "Adam with Nesterov's momentum", "Dozat 2016; torch.optim.NAdam", o.lr = 2e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_NADAMW, "nadamw", NADAM, "NAdam with decoupled weight decay", "optax.nadamw", \
      o.lr = 2e-3, o.weight_decay = 1e-2, o.dialect = DOT_DIALECT_OPTAX) \
    X(DOT_RADAM, "radam", RADAM, "Adam, rectified while its variance is unknown", "Liu et al. 2020; torch.optim.RAdam", \
      o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_LION, "lion", LION, "sign of an interpolated momentum", "Chen et al. 2023", o.lr = 1e-4, o.beta2 = 0.99) \
    X(DOT_ADADELTA, "adadelta", ADADELTA, "steps by the ratio of two means", "Zeiler 2012; torch.optim.Adadelta", \
      o.lr = 1, o.beta2 = 0.9, o.eps = 1e-6, o.decay = DOT_DECAY_L2) \
    X(DOT_ASGD, "asgd", ASGD, "averaged SGD", "Polyak, Juditsky 1992; torch.optim.ASGD", \
      o.lr = 1e-2, o.alpha = 0.75, o.decay = DOT_DECAY_L2) \
    X(DOT_RPROP, "rprop", RPROP, "a step size for each sign run; full batches", "Riedmiller, Braun 1993; torch.optim.Rprop", \
      o.lr = 1e-2, o.decay = DOT_DECAY_L2) \
    X(DOT_ADABELIEF, "adabelief", ADABELIEF, "Adam by the variance around the momentum", "Zhuang et al. 2020", o.lr = 1e-3, o.eps = 1e-16) \
    X(DOT_ADAN, "adan", ADAN, "Nesterov's momentum from gradient differences", "Xie et al. 2022", \
      o.lr = 1e-3, o.beta1 = 0.98, o.beta2 = 0.92, o.beta3 = 0.99, o.decay = DOT_DECAY_PROX) \
    X(DOT_LAMB, "lamb", LAMB, "Adam with a trust ratio per tensor", "You et al. 2020", o.lr = 1e-3, o.eps = 1e-6, o.weight_decay = 1e-2) \
    X(DOT_LARS, "lars", LARS, "momentum with a trust ratio per tensor", "You et al. 2017", o.lr = 1) \
    X(DOT_NOVOGRAD, "novograd", NOVOGRAD, "second moment per tensor", "Ginsburg et al. 2019; optax.novograd", o.lr = 1e-3, o.beta2 = 0.25, o.eps = 1e-6) \
    X(DOT_YOGI, "yogi", YOGI, "Adam with an additive second moment", "Zaheer et al. 2018", \
      o.lr = 1e-2, o.eps = 1e-3, o.initial = 1e-6, o.decay = DOT_DECAY_L2) \
    X(DOT_FROMAGE, "fromage", FROMAGE, "steps relative to the norm of each tensor", "Bernstein et al. 2020", o.lr = 1e-2) \
    X(DOT_SIGN_SGD, "sign-sgd", SIGN_SGD, "sign of the gradient", "Bernstein et al. 2018", o.lr = 1e-3) \
    X(DOT_SIGNUM, "signum", SIGNUM, "sign of the momentum", "Bernstein et al. 2018", o.lr = 1e-3) \
    X(DOT_TIGER, "tiger", SIGNUM, "sign of the momentum, decoupled decay", "Su 2023", o.lr = 1e-3, o.beta1 = 0.965) \
    X(DOT_NOISY_SGD, "noisy-sgd", NOISY_SGD, "SGD with decaying Gaussian noise", "Neelakantan et al. 2015; optax.noisy_sgd", \
      o.lr = 1e-3, o.gamma = 0.55, o.decay = DOT_DECAY_L2) \
    X(DOT_POLYAK_SGD, "polyak-sgd", POLYAK_SGD, "the step from the loss and its lower bound", "Polyak 1969; optax.polyak_sgd", \
      o.lr = 1, o.eps = 0, o.decay = DOT_DECAY_L2) \
    X(DOT_PRODIGY, "prodigy", PRODIGY, "Adam that estimates its own learning rate", "Mishchenko, Defazio 2023", o.lr = 1, o.beta3 = 0) \
    X(DOT_DADAPT_ADAM, "dadapt-adam", DADAPT_ADAM, "Adam that estimates its own learning rate", "Defazio, Mishchenko 2023", o.lr = 1) \
    X(DOT_DOG, "dog", DOG, "distance over gradients: no learning rate", "Ivgi et al. 2023", o.lr = 1, o.decay = DOT_DECAY_L2) \
    X(DOT_DOWG, "dowg", DOWG, "weighted distance over gradients", "Khaled et al. 2023", o.lr = 1, o.r_eps = 1e-4, o.decay = DOT_DECAY_L2) \
    X(DOT_MOMO, "momo", MOMO, "momentum with the step from a model of the loss", "Schaipp et al. 2023", \
      o.lr = 1, o.decay = DOT_DECAY_PROX) \
    X(DOT_MOMO_ADAM, "momo-adam", MOMO_ADAM, "Adam with the step from a model of the loss", "Schaipp et al. 2023", \
      o.lr = 1e-2, o.decay = DOT_DECAY_PROX) \
    X(DOT_OPTIMISTIC_ADAM, "optimistic-adam", OPTIMISTIC_ADAM, "Adam with an optimistic step, for games", "Daskalakis et al. 2017; optax", \
      o.lr = 1e-3, o.gamma = 1) \
    X(DOT_COCOB, "cocob", COCOB, "coin betting: no learning rate", "Orabona, Tommasi 2017; optax.contrib.cocob", o.lr = 1, o.alpha = 100) \
    X(DOT_SWATS, "swats", SWATS, "Adam that turns into SGD", "Keskar, Socher 2017", o.lr = 1e-3, o.eps = 1e-9, o.decay = DOT_DECAY_L2) \
    X(DOT_MADGRAD, "madgrad", MADGRAD, "dual averaging with a cube root", "Defazio, Jelassi 2021", \
      o.lr = 1e-2, o.eps = 1e-6, o.decay = DOT_DECAY_L2) \
    X(DOT_ACPROP, "acprop", ACPROP, "centred second moment of the step before", "Zhuang et al. 2021", o.lr = 1e-3, o.eps = 1e-16) \
    X(DOT_ADOPT, "adopt", ADOPT, "Adam that converges for any beta2", "Taniguchi et al. 2024", \
      o.lr = 1e-3, o.beta2 = 0.9999, o.eps = 1e-6, o.decay = DOT_DECAY_L2) \
    X(DOT_ADEMAMIX, "ademamix", ADEMAMIX, "Adam with a second, slow momentum", "Pagliardini et al. 2024", o.lr = 1e-3, o.beta3 = 0.9999, o.alpha = 5) \
    X(DOT_MARS, "mars", MARS, "AdamW with variance reduction", "Yuan et al. 2024", o.lr = 3e-3, o.beta1 = 0.95, o.beta2 = 0.99, o.gamma = 0.025) \
    X(DOT_SCHEDULE_FREE_SGD, "schedule-free-sgd", SCHEDULE_FREE_SGD, "SGD with averaging in place of a schedule", "Defazio et al. 2024", \
      o.lr = 1) \
    X(DOT_SCHEDULE_FREE_ADAMW, "schedule-free-adamw", SCHEDULE_FREE_ADAMW, "AdamW with averaging in place of a schedule", \
      "Defazio et al. 2024", o.lr = 2.5e-3) \
    X(DOT_STABLE_ADAMW, "stable-adamw", STABLE_ADAMW, "AdamW with update clipping", "Wortsman et al. 2023", o.lr = 1e-3, o.beta2 = 0.99) \
    X(DOT_ADABOUND, "adabound", ADABOUND, "Adam with bounds that close in on SGD", "Luo et al. 2019", \
      o.lr = 1e-3, o.gamma = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_LAPROP, "laprop", LAPROP, "momentum of normalised gradients", "Ziyin et al. 2020", o.lr = 4e-4, o.eps = 1e-15) \
    X(DOT_QHM, "qhm", QHM, "quasi-hyperbolic momentum", "Ma, Yarats 2019", o.lr = 1, o.beta1 = 0.999, o.nu = 0.7, o.decay = DOT_DECAY_L2) \
    X(DOT_QHADAM, "qhadam", QHADAM, "quasi-hyperbolic Adam", "Ma, Yarats 2019", o.lr = 1e-3, o.nu1 = 0.7, o.decay = DOT_DECAY_L2) \
    X(DOT_AGGMO, "aggmo", AGGMO, "the mean of three momenta", "Lucas et al. 2019", o.lr = 0.1, o.beta2 = 0.99, o.decay = DOT_DECAY_L2) \
    X(DOT_PNM, "pnm", PNM, "positive-negative momentum", "Xie et al. 2021", o.lr = 1e-3, o.alpha = 1, o.decay = DOT_DECAY_L2) \
    X(DOT_DIFFGRAD, "diffgrad", DIFFGRAD, "Adam slowed where the gradient is steady", "Dubey et al. 2020", o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_GRAMS, "grams", GRAMS, "Adam's size, the gradient's sign", "Cao et al. 2024", o.lr = 1e-3) \
    X(DOT_ADAM_ATAN2, "adam-atan2", ADAM_ATAN2, "Adam without eps", "Everett et al. 2024", o.lr = 1e-3) \
    X(DOT_SPARSE_ADAM, "sparse-adam", SPARSE_ADAM, "Adam on the rows that have a gradient", "torch.optim.SparseAdam", \
      o.lr = 1e-3, o.decay = DOT_DECAY_L2) \
    X(DOT_ADAM_MINI, "adam-mini", ADAM_MINI, "Adam with one second moment for each row", "Zhang et al. 2024", o.lr = 1e-3) \
    X(DOT_ADAMP, "adamp", ADAMP, "Adam without the radial part of the step", "Heo et al. 2021", o.lr = 1e-3) \
    X(DOT_SGDP, "sgdp", SGDP, "SGD without the radial part of the step", "Heo et al. 2021", o.lr = 0.1, o.beta1 = 0) \
    X(DOT_SM3, "sm3", SM3, "one accumulator for each index of each axis", "Anil et al. 2019", o.lr = 1e-2) \
    X(DOT_CAME, "came", CAME, "Adafactor with confidence", "Luo et al. 2023", o.lr = 2e-4, o.beta3 = 0.9999, o.eps2 = 1e-16) \
    X(DOT_MUON, "muon", MUON, "orthogonalised momentum; vectors by AdamW", "Jordan et al. 2024; torch.optim.Muon", \
      o.lr = 1e-3, o.beta1 = 0.95, o.nesterov = true, o.weight_decay = 0.1, o.eps = 1e-7) \
    X(DOT_SHAMPOO, "shampoo", SHAMPOO, "preconditioned on both sides", "Gupta et al. 2018", \
      o.lr = 0.1, o.beta1 = 0, o.eps = 1e-4) \
    X(DOT_SOAP, "soap", SOAP, "Adam in the eigenbasis of Shampoo's matrices", "Vyas et al. 2024", \
      o.lr = 3e-3, o.beta1 = 0.95, o.beta2 = 0.95, o.weight_decay = 1e-2, o.period = 10) \
    X(DOT_PSGD_KRON, "psgd-kron", PSGD_KRON, "momentum, whitened by a triangular matrix for each side; random draws", \
      "Li 2018, 2022; Walters' kron", o.lr = 1e-3, o.initial = 1, o.clip_threshold = 1.1) \
    X(DOT_GALORE, "galore", GALORE, "Adam in a low-rank projection of each gradient", "Zhao et al. 2024", \
      o.lr = 1e-3, o.rank = 32, o.period = 200) \
    X(DOT_SCION, "scion", SCION, "steps of fixed norm: spectral for matrices, RMS for vectors", "Pethick et al. 2025", \
      o.lr = 1e-3, o.eps = 1e-7) \
    X(DOT_SOPHIA_G, "sophia-g", SOPHIA_G, "momentum over clipped Gauss-Newton curvature", "Liu et al. 2023", \
      o.lr = 1e-4, o.beta1 = 0.965, o.beta2 = 0.99, o.weight_decay = 0.1, o.eps = 1e-15) \
    X(DOT_SOPHIA_H, "sophia-h", SOPHIA_H, "momentum over clipped Hutchinson curvature", "Liu et al. 2023; optax.contrib.sophia", \
      o.lr = 1e-4, o.beta1 = 0.96, o.beta2 = 0.99, o.eps = 1e-12) \
    X(DOT_ADAHESSIAN, "adahessian", ADAHESSIAN, "Adam by the diagonal of the Hessian", "Yao et al. 2021", o.lr = 0.1, o.eps = 1e-4) \
    X(DOT_CUSTOM, "custom", CUSTOM, "a rule of your own: dot_rule", "-", o.lr = 1e-3)

typedef enum dot_algorithm {
#define DOT__ENUM(constant, name, rule, description, source, ...) constant,
    DOT_OPTIMIZERS(DOT__ENUM)
#undef DOT__ENUM
    DOT_ALGORITHMS
} dot_algorithm;

const char *dot_algorithm_name(dot_algorithm algorithm);            /* "adamw"; NULL when out of range */
const char *dot_algorithm_description(dot_algorithm algorithm);
const char *dot_algorithm_paper(dot_algorithm algorithm);
bool        dot_algorithm_find(const char *name, dot_algorithm *algorithm);

/* The numbers of an optimizer: X(constant, field, default, least, greatest, meaning). Each is a field of dot_optimizer_options, may
   differ by group and lane, and may be changed, hence scheduled, at any step (dot_optimizer_set). A rule reads those it names. */
#define DOT__BELOW_1 0.99999999999999989
#define DOT_HYPERPARAMETERS(X) \
    X(DOT_HYPER_LR,              lr,              1e-3,  0, 1e30, "learning rate; Adafactor: largest relative step") \
    X(DOT_HYPER_WEIGHT_DECAY,    weight_decay,    0,     0, 1e30, "lambda; where it goes: dot_decay") \
    X(DOT_HYPER_BETA1,           beta1,           0.9,   0, DOT__BELOW_1, "decay of the first moment; SGD, RMSprop, LARS: the momentum") \
    X(DOT_HYPER_BETA2,           beta2,           0.999, 0, DOT__BELOW_1, "decay of the second moment; AggMo: of the third momentum") \
    X(DOT_HYPER_BETA3,           beta3,           0.99,  0, DOT__BELOW_1, "Adan; AdEMAMix: of the slow momentum; Prodigy: 0 is sqrt(beta2)") \
    X(DOT_HYPER_EPS,             eps,             1e-8,  0, 1e30, "keeps denominators from 0") \
    X(DOT_HYPER_DECAY_LR,        decay_lr,        1,     0, 1e30, "what stands where lr would (DOT_DECAY_SCHEDULED, _NORMALIZED)") \
    X(DOT_HYPER_DECAY_PERIOD,    decay_period,    1,     1, 1e18, "steps in the run or restart period (DOT_DECAY_NORMALIZED)") \
    X(DOT_HYPER_DAMPENING,       dampening,       0,     0, 1,    "SGD: momentum takes (1 - dampening) g") \
    X(DOT_HYPER_LR_DECAY,        lr_decay,        0,     0, 1e30, "AdaGrad: lr / (1 + (t-1) lr_decay)") \
    X(DOT_HYPER_INITIAL,         initial,         0,     0, 1e30, "AdaGrad, Yogi: first value of the second moment; PSGD: scale of the first Q") \
    X(DOT_HYPER_MOMENTUM_DECAY,  momentum_decay,  4e-3,  0, 1e3,  "NAdam: psi of the momentum schedule") \
    X(DOT_HYPER_RHO,             rho,             0.04,  0, 1e30, "Sophia-G: scale of the curvature") \
    X(DOT_HYPER_BATCH,           batch,           1,     1, 1e18, "Sophia-G: examples (times tokens) in a batch") \
    X(DOT_HYPER_POWER,           power,           1,     0, 10,   "AdaHessian: of the curvature's root") \
    X(DOT_HYPER_NS_STEPS,        ns_steps,        5,     0, 100,  "Muon, Scion: Newton-Schulz iterations") \
    X(DOT_HYPER_RANK,            rank,            32,    1, 1e6,  "GaLore: rank of the projection") \
    X(DOT_HYPER_PERIOD,          period,          200,   1, 1e18, "GaLore, SOAP: steps from one projection (basis) to the next") \
    X(DOT_HYPER_SCALE,           scale,           0.25,  0, 1e30, "GaLore: of the projected step") \
    X(DOT_HYPER_GAMMA,           gamma,           0.01,  0, 1e30, "Sophia-H, MARS: scale; AdaBound: closing speed; noise: its decay") \
    X(DOT_HYPER_ALPHA,           alpha,           1,     0, 1e30, "AdEMAMix, PNM: weight of the other momentum; ASGD: power of lr's decay") \
    X(DOT_HYPER_WARMUP,          warmup,          0,     0, 1e18, "AdEMAMix: steps in which alpha and beta3 grow") \
    X(DOT_HYPER_ETA,             eta,             0.01,  0, 1e30, "noisy SGD: variance of the noise at the first step") \
    X(DOT_HYPER_NU,              nu,              0.7,   0, 1,    "QHM: share of the momentum") \
    X(DOT_HYPER_NU1,             nu1,             0.7,   0, 1,    "QHAdam: share of the first moment") \
    X(DOT_HYPER_NU2,             nu2,             1,     0, 1,    "QHAdam: share of the second moment") \
    X(DOT_HYPER_LAMBD,           lambd,           1e-4,  0, 1e30, "ASGD: decay") \
    X(DOT_HYPER_T0,              t0,              1e6,   0, 1e18, "ASGD: averaging starts here") \
    X(DOT_HYPER_ETA_MINUS,       eta_minus,       0.5,   0, 1,    "Rprop: factor of a step size whose sign changed") \
    X(DOT_HYPER_ETA_PLUS,        eta_plus,        1.2,   1, 1e3,  "Rprop: factor of a step size whose sign stayed") \
    X(DOT_HYPER_STEP_MIN,        step_min,        1e-6,  0, 1e30, "Rprop") \
    X(DOT_HYPER_STEP_MAX,        step_max,        50,    0, 1e30, "Rprop") \
    X(DOT_HYPER_TRUST,           trust,           1e-3,  0, 1e30, "LARS: trust coefficient") \
    X(DOT_HYPER_D0,              d0,              1e-6,  1e-300, 1e30, "Prodigy, D-Adaptation: first estimate of the distance") \
    X(DOT_HYPER_D_COEF,          d_coef,          1,     0, 1e30, "Prodigy: factor of the estimate") \
    X(DOT_HYPER_R_EPS,           r_eps,           1e-6,  1e-300, 1e30, "DoG, DoWG: first distance") \
    X(DOT_HYPER_LOWER_BOUND,     lower_bound,     0, -1e30, 1e30, "Polyak, MoMo: the least that the loss can be") \
    X(DOT_HYPER_R,               r,               0,     0, 1e3,  "schedule-free: power of the step in the weights") \
    X(DOT_HYPER_WEIGHT_LR_POWER, weight_lr_power, 2,     0, 1e3,  "schedule-free: power of the largest lr in the weights") \
    X(DOT_HYPER_FINAL_LR,        final_lr,        0.1,   0, 1e30, "AdaBound: the SGD learning rate it ends in") \
    X(DOT_HYPER_DELTA,           delta,           0.1,   0, 1,    "AdamP, SGDP: cosine below which the radial part is removed") \
    X(DOT_HYPER_WD_RATIO,        wd_ratio,        0.1,   0, 1,    "AdamP, SGDP: decay's factor where it is") \
    X(DOT_HYPER_BETA2_EXPONENT,  beta2_exponent,  0.8,   0, 1e3,  "Adafactor: beta2_t = 1 - t^-beta2_exponent") \
    X(DOT_HYPER_EPS1,            eps1,            1e-30, 0, 1e30, "Adafactor: added to g^2") \
    X(DOT_HYPER_EPS2,            eps2,            1e-3,  0, 1e30, "Adafactor: least scale of a parameter") \
    X(DOT_HYPER_CLIP_THRESHOLD,  clip_threshold,  1, 1e-30, 1e30, "Adafactor, PSGD: RMS that an update is clipped to") \
    X(DOT_HYPER_MAX_PRECOND_DIM, max_precond_dim, 512,   0, 1e6,  "Shampoo, SOAP: longer sides are left as they are; PSGD: are diagonal") \
    X(DOT_HYPER_PRECOND_LR,      precond_lr,      0.1,   0, 1e30, "PSGD: step of the preconditioner Q, which is updated once 1 / p steps have") \
    X(DOT_HYPER_PROB_START,      prob_start,      500,   0, 1e18, "PSGD: passed, p = exp(-prob_decay (t - 1 - prob_start)), at most 1") \
    X(DOT_HYPER_PROB_DECAY,      prob_decay,      1e-3,  0, 1e30, "PSGD: how fast updates become rare after prob_start steps") \
    X(DOT_HYPER_MIN_PROB,        min_prob,        0.03,  1e-9, 1, "PSGD: the least p")

typedef enum dot_hyper {
#define DOT__ENUM(constant, field, value, least, greatest, meaning) constant,
    DOT_HYPERPARAMETERS(DOT__ENUM)
#undef DOT__ENUM
    DOT_HYPERS
} dot_hyper;

/* Where the weight decay lambda goes; eta is the schedule's multiplier, lr the base learning rate. All but DOT_DECAY_L2 are
   decoupled; they are applied before the update, DOT_DECAY_PROX after it. */
typedef enum dot_decay {
    DOT_DECAY_L2,           /* gradient += lambda theta, before the moments             torch Adam, SGD */
    DOT_DECAY_LR,           /* theta *= 1 - eta lr lambda                               torch AdamW */
    DOT_DECAY_SCHEDULED,    /* theta *= 1 - eta decay_lr lambda: free of lr             Loshchilov, Hutter 2019, alg. 2 */
    DOT_DECAY_NORMALIZED,   /* the same with lambda / sqrt(decay_period)                ibid., appendix B.1, AdamWR */
    DOT_DECAY_CORRECTED,    /* theta *= 1 - eta^2 lr lambda                             Defazio 2025, AdamC */
    DOT_DECAY_CAUTIOUS,     /* theta *= 1 - eta lr lambda where the update shrinks it   Chen et al. 2025 */
    DOT_DECAY_PROX,         /* theta /= 1 + eta lr lambda, after the update             Xie et al. 2022, Adan */
    DOT_DECAY_FIXED         /* theta *= 1 - lambda                                      AdaBelief's fixed_decay */
} dot_decay;

/* Whose version of a rule; the default is PyTorch's where it has the rule, else the authors'. A rule without a dialect of
   that name refuses it. */
typedef enum dot_dialect {
    DOT_DIALECT_DEFAULT,
    DOT_DIALECT_OPTAX,          /* AMSGrad, NAdam, RAdam, LARS, Muon; Adafactor: the two largest axes of 128 or more, lr as it is */
    DOT_DIALECT_PAPER,          /* AMSGrad: no bias correction */
    DOT_DIALECT_OFFICIAL,       /* RAdam: no step at all before it can be rectified */
    DOT_DIALECT_TF,             /* RMSprop: v starts at 1, eps under the root, lr inside the momentum */
    DOT_DIALECT_INSIDE,         /* AdaGrad: eps under the root */
    DOT_DIALECT_MLCOMMONS,      /* NAdam */
    DOT_DIALECT_TORCH,          /* Adafactor: last two axes, no eps1 in the mean (set eps1 to the type's epsilon), always scaled */
    DOT_DIALECT_HF,             /* Adafactor: last two axes; decay times the whole step */
    DOT_DIALECT_T2T,            /* Adafactor: matrices only; the authors' tensor2tensor */
    DOT_DIALECT_MATCH_RMS,      /* Muon: 0.2 sqrt(max(rows, columns)), AdamW's RMS (Liu et al. 2025; PyTorch's match_rms_adamw); default:
                                   sqrt(max(1, rows / columns)) (Jordan et al. 2024; PyTorch's original) */
    DOT_DIALECT_SPECTRAL,       /* Muon: sqrt(rows / columns) (Bernstein, Newhouse 2024; PyTorch's spectral_unclamped) */
    DOT_DIALECTS
} dot_dialect;
const char *dot_dialect_name(dot_dialect dialect);      /* "optax"; NULL when out of range */
bool        dot_algorithm_has(dot_algorithm algorithm, dot_dialect dialect);

/* How the state is kept between steps; it is float (or double) while a step computes. Elementwise rules only. */
typedef enum dot_state_precision {
    DOT_STATE_FULL,             /* as the parameters: 4 (8) bytes an element */
    DOT_STATE_BF16,             /* bfloat16 with stochastic rounding: 2 bytes */
    DOT_STATE_BF16_KAHAN,       /* bfloat16 and its rounding error, also bfloat16: 4 bytes, 16 bits of precision */
    DOT_STATE_8BIT              /* blocks of 256 share a scale (Dettmers et al. 2022): 1 + 4/256 bytes */
} dot_state_precision;

/* An optimizer of your own (DOT_CUSTOM): `update` is called for ranges of elements, from several threads at once, and changes theta and
   the states in place; `first` is the range's first element. Its states start at 0, are saved in checkpoints, and are cut into lanes. */
#define DOT_MAX_STATES 5
typedef struct dot_rule_range {
    dot_dtype dtype;            /* DOT_F32 or DOT_F64: of all arrays below */
    void *theta;
    const void *gradient;       /* times gradient_scale, plus l2 theta, is the gradient to use */
    void *state[DOT_MAX_STATES];
    int64_t first, count, step; /* step: 1, 2, ... of this parameter */
    int lane;
    double lr, gradient_scale, l2, keep;    /* lr times the multiplier; keep: theta is to be multiplied by it (decay) */
} dot_rule_range;
typedef struct dot_rule {
    const char *name;
    int states;                 /* 0..DOT_MAX_STATES arrays of the parameter's size */
    void (*update)(void *user, const dot_rule_range *range);
    void *user;
} dot_rule;

typedef struct dot_parameter_group {
    const char *pattern;    /* names it takes, with * and ?, or NULL: none by name; copied */
    unsigned kinds;         /* kinds it takes, e.g. DOT_KIND_BIAS | DOT_KIND_NORM; 0: none by kind */
    double lr, weight_decay;
} dot_parameter_group;

typedef struct dot_optimizer_options {
    uint32_t magic;             /* set by dot_optimizer_defaults */
    dot_algorithm algorithm;
    dot_decay decay;            /* DOT_DECAY_LR, or as DOT_OPTIMIZERS says */
    dot_dialect dialect;        /* DOT_DIALECT_DEFAULT */
    dot_state_precision state;  /* DOT_STATE_FULL */
    bool nesterov;              /* SGD; needs momentum and no dampening; false */
    bool centered;              /* RMSprop: by the variance instead of the square; false */
    bool rectify;               /* AdaBelief: as RAdam; false */
    bool amsbound;              /* AdaBound: the maximum of the second moment; false */
    bool relative_step;         /* Adafactor: step min(lr, 1/sqrt(t)) instead of lr; true; factored AdamW: false */
    bool scale_parameter;       /* Adafactor: times max(eps2, RMS(theta)); true */
    bool maximize;              /* false */
    bool cautious;              /* any elementwise rule: only where update and gradient agree in sign, the others made up for by the
                                   share of those that do (Liang et al. 2024); false */
    const dot_rule *rule;       /* DOT_CUSTOM only; must outlive the optimizer */
    const dot_parameter_group *groups;  /* a parameter belongs to the first group that takes it by name or kind; */
    int group_count;                    /* else to the default group, with the lr and weight_decay below. NULL, 0 */
#define DOT__FIELD(constant, field, value, least, greatest, meaning) double field;
    DOT_HYPERPARAMETERS(DOT__FIELD)     /* double lr, weight_decay, beta1, beta2, ...: see there */
#undef DOT__FIELD
} dot_optimizer_options;
dot_optimizer_options dot_optimizer_defaults(dot_algorithm algorithm);

typedef struct dot_optimizer dot_optimizer;
typedef dot_tensor *(*dot_loss_function)(void *user);     /* calls dot_step_begin, computes a scalar loss and returns it */

/* An optimizer over all trainable parameters of `layer`. */
dot_optimizer *dot_optimizer_create(dot_context *ctx, dot_layer *layer, const dot_optimizer_options *options);

/* The bytes of state that dot_optimizer_create would allocate for the layer, in all lanes; allocates nothing. */
size_t dot_optimizer_bytes(dot_layer *layer, const dot_optimizer_options *options);

/* One update of every parameter that has a gradient, with the learning rate times `multiplier` (a schedule's value, 1 for none);
   then the gradients are forgotten. With g the gradient (clipped, its sign turned by `maximize`, plus lambda theta for
   DOT_DECAY_L2), t = 1, 2, ... counted by each parameter, the rule gives a direction d: theta = theta (1 - decay) - d. */
bool dot_optimizer_step(dot_optimizer *optimizer, double multiplier);

/* Tells the loss of the step to the rules that need it (Polyak, MoMo): a scalar tensor, before dot_optimizer_step. */
bool dot_optimizer_loss(dot_optimizer *optimizer, const dot_tensor *loss);

/* Gives curvature to the rules that need it (Sophia, AdaHessian; every 10 steps is usual), from the gradients that stand, which are then
   forgotten. Sophia-G: the gradients of the loss with labels sampled from the model's own prediction; call it before the
   step's own backward pass. Other rules only forget the gradients. Sophia-H, AdaHessian: an estimate z * Hz of the Hessian's diagonal, as dot_optimizer_hutchinson makes. */
bool dot_optimizer_curvature(dot_optimizer *optimizer);

/* Hutchinson's estimate z * (H z), z = +-1 at random (from the lane's seed), by the central difference of the gradients at theta +- h z,
   given to dot_optimizer_curvature. `loss` calls dot_step_begin and returns the loss; it is evaluated twice. */
bool dot_optimizer_hutchinson(dot_optimizer *optimizer, dot_loss_function loss, void *user);

/* Schedule-free rules train at one point and are evaluated at another: `on` puts the averaged point into the parameters, false puts the
   training point back (exactly). Steps are refused in between. No effect on other rules. */
bool dot_optimizer_averaged(dot_optimizer *optimizer, bool on);

/* Change a hyperparameter of one group and lane (DOT_ALL: of all); group 0 is the default group, then 1, 2, ... */
bool   dot_optimizer_set(dot_optimizer *optimizer, dot_hyper which, int group, int lane, double value);
double dot_optimizer_get(const dot_optimizer *optimizer, dot_hyper which, int group, int lane);
const char *dot_hyper_name(dot_hyper which);                        /* "lr"; NULL when out of range */
int64_t dot_optimizer_steps(const dot_optimizer *optimizer);        /* steps taken: t */
size_t  dot_optimizer_state_bytes(const dot_optimizer *optimizer);  /* of all lanes */

/* Scales the gradients of the next step by min(1, max_norm / (norm + 1e-6)), norm over all parameters of the optimizer, for
   each lane by itself. Returns lane 0's norm before clipping; dot_grad_norm gives each lane's. */
double dot_clip_grad_norm(dot_optimizer *optimizer, double max_norm);
double dot_grad_norm(dot_optimizer *optimizer, int lane);
double dot_weight_norm(dot_optimizer *optimizer, int lane);

/* ---- optimizers that evaluate the loss themselves ---- */

/* They work on all trainable parameters of a layer (those that require a gradient when the solver is created), seen as one
   vector theta, in a context of one lane; their own vectors are in double. `loss` calls
   dot_step_begin, computes the loss and returns it; it shall not call dot_backward, and, but for SPSA and CMA-ES, give the same
   value at the same theta (no dropout). Memory is taken by the _create functions, the gradients are forgotten after each call,
   and a call that fails leaves the parameters as they were and returns NaN. */

/* L-BFGS, as torch.optim.LBFGS: d = -H g from the latest `history` pairs s = t d, y = change of g (two-loop recursion, H0 =
   s'y / y'y, a pair is kept if s'y > 1e-10); theta += t d with t = lr (first: min(1, 1/|g|_1) lr), or t from the line search
   for the strong Wolfe conditions (c1 1e-4, c2 0.9, cubic interpolation), which begins there and evaluates the loss
   at most max_eval times less what the step has used.   (Liu, Nocedal 1989; Nocedal, Wright 2006, alg. 3.5, 3.6, 7.4) */
typedef enum dot_line_search { DOT_LINE_SEARCH_NONE, DOT_LINE_SEARCH_STRONG_WOLFE } dot_line_search;
typedef struct dot_lbfgs_options {
    uint32_t magic;             /* set by dot_lbfgs_defaults */
    double lr;                  /* 1 */
    int max_iter, max_eval;     /* of one step: 20; 25 (PyTorch: 5/4 max_iter) */
    double tolerance_grad;      /* 1e-7: a step ends when max |g| is not above it, */
    double tolerance_change;    /* 1e-9: or max |t d| or the change of the loss is not */
    int history;                /* 100: costs 16 bytes for each and each parameter; 1 to 10000 */
    dot_line_search line_search;/* DOT_LINE_SEARCH_NONE */
} dot_lbfgs_options;
dot_lbfgs_options dot_lbfgs_defaults(void);
typedef struct dot_lbfgs dot_lbfgs;
dot_lbfgs *dot_lbfgs_create(dot_context *ctx, dot_layer *layer, const dot_lbfgs_options *options);

/* Up to max_iter iterations; returns the loss before the first. When a loss or gradient is not finite, the step ends at the
   best point that it has seen, and the next step begins without pairs; so it does after a failure. */
double  dot_lbfgs_step(dot_lbfgs *lbfgs, dot_loss_function loss, void *user);
int64_t dot_lbfgs_iterations(const dot_lbfgs *lbfgs);       /* of all steps */
int64_t dot_lbfgs_evaluations(const dot_lbfgs *lbfgs);

/* CMA-ES: a population drawn from N(m, sigma^2 C) each generation; its better half moves the mean m, and all of it the step size
   sigma (cumulative) and the covariance C (rank one, rank mu with negative weights).   (Hansen, "The CMA evolution strategy: a
   tutorial", arXiv 1604.00772, figure 6 and table 1.) Needs no gradients: `loss` may call dot_eval_begin instead. Costs
   O(n^2) a sample, and O(n^3) for the eigenvectors of C once every few generations: for up to some hundred parameters. */
typedef struct dot_cmaes_options {
    uint32_t magic;             /* set by dot_cmaes_defaults */
    double sigma;               /* 0.3: the first step size; the optimum should lie within some 3 sigma */
    int population;             /* 0 (the default): 4 + floor(3 ln n); else 4 to 1000000 */
    uint64_t seed;              /* 0; with the context's it selects the draws: another one for a second solver */
} dot_cmaes_options;
dot_cmaes_options dot_cmaes_defaults(void);
typedef struct dot_cmaes dot_cmaes;
dot_cmaes *dot_cmaes_create(dot_context *ctx, dot_layer *layer, const dot_cmaes_options *options);

/* One generation; returns its least loss. The first mean is theta at creation; after a step theta is the new mean. Samples
   whose loss is not finite rank last; when the better half is not all finite, sigma is halved and nothing else changes. */
double dot_cmaes_step(dot_cmaes *cmaes, dot_loss_function loss, void *user);
double dot_cmaes_sigma(const dot_cmaes *cmaes);
/* Sets theta to the best point sampled so far and returns its loss; before there is one it returns NaN and changes nothing. The
   next step goes on from the mean. */
double dot_cmaes_best(dot_cmaes *cmaes);

/* SPSA: theta -= a_k (L(theta + c_k delta) - L(theta - c_k delta)) / (2 c_k) / delta, delta independent and +-1, a_k = a / (k + 1
   + stability)^alpha, c_k = c / (k + 1)^gamma, k = 0, 1, ...   (Spall 1992; the gains: Spall 1998.) Needs no gradients: `loss` may
   call dot_eval_begin instead. */
typedef struct dot_spsa_options {
    uint32_t magic;             /* set by dot_spsa_defaults */
    double a, c;                /* 0.16, 0.3 (ensmallen): c about the noise of the loss, a for the first steps wanted */
    double stability;           /* 100: about a tenth of the steps to be taken */
    double alpha, gamma;        /* 0.602, 0.101 */
    uint64_t seed;              /* 0; as for CMA-ES */
} dot_spsa_options;
dot_spsa_options dot_spsa_defaults(void);
typedef struct dot_spsa dot_spsa;
dot_spsa *dot_spsa_create(dot_context *ctx, dot_layer *layer, const dot_spsa_options *options);
/* One update, two evaluations; returns the mean of the two losses. One that is not finite: theta stays. */
double dot_spsa_step(dot_spsa *spsa, dot_loss_function loss, void *user);

/* SVRG: at each snapshot w the full gradient mu, then `inner` times, with a batch i drawn at random,
   theta -= lr (g_i(theta) - g_i(w) + mu).   (Johnson, Zhang 2013, option I: the next snapshot is the last theta.) */
typedef struct dot_svrg_options {
    uint32_t magic;             /* set by dot_svrg_defaults */
    double lr;                  /* 1e-2; less than 1/(4 L), L the largest curvature of a batch's loss */
    int64_t batches;            /* 1; their mean loss is the full loss */
    int64_t inner;              /* 0 (the default): 2 batches; the paper's value for convex losses, for others 5 */
    uint64_t seed;              /* 0; as for CMA-ES */
} dot_svrg_options;
dot_svrg_options dot_svrg_defaults(void);
typedef struct dot_svrg dot_svrg;
typedef dot_tensor *(*dot_indexed_function)(void *user, int64_t index);     /* begins with dot_step_begin, as `loss` does */
dot_svrg *dot_svrg_create(dot_context *ctx, dot_layer *layer, const dot_svrg_options *options);
/* One snapshot and its inner updates; returns the full loss at the snapshot. `batch` gives the loss of batch 0..batches-1. When a
   gradient is not finite, theta goes back to the snapshot. */
double dot_svrg_step(dot_svrg *svrg, dot_loss_function loss, dot_indexed_function batch, void *user);

/* Natural gradient: theta -= lr (F + damping I)^-1 g, g the gradient of the loss (Amari 1998). Which F; i = 0..examples-1:
     EMPIRICAL     1/N sum g_i g_i', g_i the gradient of example i's loss, with its own label. Not an estimate of the Fisher matrix
     SAMPLED       the same, but your function draws the labels from the model's prediction: an unbiased estimate of the true
                   Fisher matrix, if the loss is -log p (Kunstner, Balles, Hennig 2019 on the difference)
     GAUSS_NEWTON  1/N sum J_i' J_i, J_i the Jacobian of example i's outputs: the true Fisher matrix of outputs with Gaussian noise
                   of variance 1, that is of the loss |y - t|^2 / 2 of an example. One backward pass for each output */
typedef enum dot_fisher { DOT_FISHER_EMPIRICAL, DOT_FISHER_SAMPLED, DOT_FISHER_GAUSS_NEWTON } dot_fisher;
/* How it is solved. DENSE: exactly, by Cholesky; 8 n^2 bytes, n^3 / 3 operations, up to 8192 parameters. CG: conjugate gradients
   with the products F v = scale / N G' (G v), G the stored gradients. DIAGONAL: with the diagonal of F alone; stores no G. */
typedef enum dot_natural_method { DOT_NATURAL_DENSE, DOT_NATURAL_CG, DOT_NATURAL_DIAGONAL } dot_natural_method;
typedef struct dot_natural_options {
    uint32_t magic;             /* set by dot_natural_defaults */
    dot_fisher fisher;          /* DOT_FISHER_EMPIRICAL */
    dot_natural_method method;  /* DOT_NATURAL_DENSE */
    double lr;                  /* 1 */
    double damping;             /* must be set, above 0: F has no inverse where examples are fewer than parameters */
    double scale;               /* 1: F is multiplied by it. Gauss-Newton with dot_mse_loss: 2 / outputs */
    int64_t examples;           /* must be set: N. G takes 8 examples outputs n bytes */
    int64_t outputs;            /* 1; Gauss-Newton: elements of an example's output */
    int cg_iterations;          /* 250, and */
    double cg_tolerance;        /* 1e-10: CG ends when |residual| <= cg_tolerance |g| */
} dot_natural_options;
dot_natural_options dot_natural_defaults(void);
typedef struct dot_natural dot_natural;
dot_natural *dot_natural_create(dot_context *ctx, dot_layer *layer, const dot_natural_options *options);
/* One update; returns the loss before it. `example` returns the loss of example i (a scalar), or for GAUSS_NEWTON its outputs.
   `loss` may be NULL with EMPIRICAL: the mean of the examples' losses. When something is not finite, theta stays. */
double dot_natural_step(dot_natural *natural, dot_loss_function loss, dot_indexed_function example, void *user);

/* K-FAC: the natural gradient with F of each linear and convolution layer taken as A x G (Kronecker), both moving averages that
   begin as I; for the bias there is a 1 at the end of each a. E is the mean over the N rows of a linear layer's input (all axes but
   the last), or over the N images of a convolution's, [N, spatial..., channels]:
     linear       A = E[a a'] of the inputs a, G = E[g g'] of the gradients g at the outputs   (Martens, Grosse 2015, section 3)
     convolution  A = E[sum_t a_t a_t'], G = E[sum_t g_t g_t'] / T, a_t the patch [kernel..., channels] that output position t of T
                  sees, g_t the gradient there   (KFC: Grosse, Martens 2016, Omega and Gamma of theorem 1)
   A layer's gradient M, [in, out], becomes v = the solution of A v G + damping v = M through the eigenvectors and eigenvalues of A
   and G, or what the factored damping makes of it. All layers' v are scaled by min(1, sqrt(kl_clip / (lr^2 sum v M))) (Ba, Grosse,
   Martens 2017, in the form of alecwangcq/KFAC-Pytorch). Other layers' parameters, and those of transposed convolutions and of
   convolutions in groups, keep their gradient; then SGD with momentum.
   The layers must have been built: from dot_kfac_create on those under K-FAC remember their inputs and outputs in each training
   step. Each is used once in a step. The eigenvectors take O(size^3), one factor a thread: about a second for a factor of 785. */
typedef enum dot_tikhonov {
    DOT_TIKHONOV_EXACT,         /* (A x G + damping I)^-1 */
    DOT_TIKHONOV_FACTORED       /* (A + pi sqrt(damping) I)^-1 x (G + sqrt(damping) / pi I)^-1, pi^2 = (tr A / dim A) / (tr G / dim G):
                                   Martens, Grosse 2015, section 6.3; pi is 1 where that is not a positive number */
} dot_tikhonov;
typedef struct dot_kfac_options {
    uint32_t magic;             /* set by dot_kfac_defaults */
    dot_fisher fisher;          /* DOT_FISHER_SAMPLED: what `statistics` returns, see dot_kfac_step */
    double lr, momentum;        /* 1e-3, 0.9 */
    double decay;               /* 0.95: of the averages; 0: the latest statistics alone */
    double damping;             /* 1e-3, above 0 */
    dot_tikhonov tikhonov;      /* DOT_TIKHONOV_EXACT: how the damping enters */
    double kl_clip;             /* 1e-3; 0: off */
    int statistics_every;       /* 10 steps, from the first on */
    int inverse_every;          /* 100 */
} dot_kfac_options;
dot_kfac_options dot_kfac_defaults(void);
typedef struct dot_kfac dot_kfac;
dot_kfac *dot_kfac_create(dot_context *ctx, dot_layer *layer, const dot_kfac_options *options);
/* One update; returns the loss before it. Losses are means over the N rows or images. `statistics` begins with dot_step_begin
   and returns: SAMPLED: the loss with labels drawn from the model's prediction; EMPIRICAL: the loss with its own labels (or
   is NULL: `loss` is taken); GAUSS_NEWTON: the outputs [rows, outputs], for one backward pass each. Statistics and gradients
   that are not finite are left out. */
double dot_kfac_step(dot_kfac *kfac, dot_loss_function loss, dot_loss_function statistics, void *user);

/* ==== [10 schedules] =============================================================================== */

/* A schedule is a pure function from the step (0, 1, ...) to a multiplier of the base learning rate. It has no state to save,
   is held at its first value before step 0 and at its last one beyond its end, if it has one, and is a plain value: a
   constructor below makes one, and every field that its kind reads (the last column of the list) may be changed before it is
   used; another that is changed makes it invalid. Lengths are in steps; for a schedule in epochs, pass step / dot_batches(...)
   instead of the step.

       dot_schedule s = dot_schedule_one_cycle(total);      the optimizer's lr is then the peak
       s.div = 10;
       dot_optimizer_step(opt, dot_schedule_at(&s, step));

   Any other scalar can follow a schedule: set it before the step, from its own base value.

       dot_optimizer_set(opt, DOT_HYPER_WEIGHT_DECAY, DOT_ALL, DOT_ALL, 1e-2 * dot_schedule_at(&grow, step));
       dot_optimizer_set(opt, DOT_HYPER_BETA1, DOT_ALL, DOT_ALL, dot_schedule_momentum(&s, step));
       dot_optimizer_set(opt, DOT_HYPER_LR, 1, DOT_ALL, lr1 * dot_schedule_at(&a, step));     groups apart, step multiplier 1

   The list of schedules: X(constant, name, function, description, source, fields it reads). The enum, the names, the rules and
   the checks all read this list. */
#define DOT_SCHEDULES(X) \
    X(DOT_SCHEDULE_CONSTANT, "constant", constant, "fixed", "-", \
      "") \
    X(DOT_SCHEDULE_STEP, "step", step, "drops every n steps", "torch StepLR", \
      "total factor") \
    X(DOT_SCHEDULE_STEP_DROP, "step-drop", step_drop, "drops at milestones", "torch MultiStepLR", \
      "factor milestones") \
    X(DOT_SCHEDULE_EXPONENTIAL, "exponential", exponential, "a little less every step", "torch ExponentialLR", \
      "factor") \
    X(DOT_SCHEDULE_RANGE_TEST, "range-test", range_test, "grows exponentially", "Smith 2017", \
      "total start end") \
    X(DOT_SCHEDULE_FACTOR, "constant-factor", factor, "a factor, then 1", "torch ConstantLR", \
      "total factor") \
    X(DOT_SCHEDULE_LINEAR, "linear", anneal, "straight from start to end", "torch LinearLR", \
      "total start end slopes") \
    X(DOT_SCHEDULE_POLYNOMIAL, "polynomial", polynomial, "a power of what is left", "torch PolynomialLR", \
      "total warmup start floor floor_base power") \
    X(DOT_SCHEDULE_COSINE, "cosine", cosine, "half a cosine", "Loshchilov, Hutter 2017", \
      "total warmup start floor floor_base") \
    X(DOT_SCHEDULE_WARM_RESTARTS, "warm-restarts", warm_restarts, "cosines, longer each time", "Loshchilov, Hutter 2017", \
      "total factor decay warmup start floor floor_base") \
    X(DOT_SCHEDULE_WARMUP_LINEAR, "warmup-linear", polynomial, "warm-up, linear decay", "Devlin et al. 2019", \
      "total warmup start floor floor_base power") \
    X(DOT_SCHEDULE_WARMUP_COSINE, "warmup-cosine", cosine, "warm-up, half a cosine", "Hugging Face", \
      "total warmup start floor floor_base") \
    X(DOT_SCHEDULE_WARMUP_SQRT, "warmup-inverse-sqrt", inverse_sqrt, "warm-up, 1/sqrt decay", "Zhai et al. 2022", \
      "warmup start scale") \
    X(DOT_SCHEDULE_NOAM, "noam", noam, "1/sqrt by model width", "Vaswani et al. 2017", \
      "warmup scale") \
    X(DOT_SCHEDULE_ONE_CYCLE, "one-cycle", one_cycle, "up, down and far down", "torch OneCycleLR", \
      "total peak peak_at div final_div three_phase slopes momentum_low momentum_high") \
    X(DOT_SCHEDULE_CYCLIC, "cyclic", cyclic, "triangles", "torch CyclicLR", \
      "total down start peak decay factor momentum_low momentum_high") \
    X(DOT_SCHEDULE_WARMUP_STABLE, "warmup-stable-decay", stable_decay, "up, level, down", "Hu et al. 2024", \
      "total warmup start down floor floor_base slopes") \
    X(DOT_SCHEDULE_REX, "rex", rex, "reflected exponential", "Chen et al. 2021", \
      "total warmup start floor floor_base") \
    X(DOT_SCHEDULE_TANH, "tanh", tanh, "hyperbolic tangent", "Hsueh et al. 2019", \
      "total warmup start floor floor_base tanh_from tanh_to") \
    X(DOT_SCHEDULE_SWA, "swa", anneal, "to a constant, to average", "torch SWALR", \
      "total start end slopes") \
    X(DOT_SCHEDULE_SEQUENCE, "sequence", sequence, "one after another", "torch SequentialLR", \
      "milestones parts") \
    X(DOT_SCHEDULE_PRODUCT, "product", product, "multiplied", "torch ChainedScheduler", \
      "parts")

typedef enum dot_schedule_kind {
#define DOT__ENUM(constant, name, function, description, source, fields) constant,
    DOT_SCHEDULES(DOT__ENUM)
#undef DOT__ENUM
    DOT_SCHEDULE_KINDS
} dot_schedule_kind;

const char *dot_schedule_name(dot_schedule_kind kind);              /* "warm-restarts"; NULL when out of range */
const char *dot_schedule_description(dot_schedule_kind kind);
const char *dot_schedule_source(dot_schedule_kind kind);
const char *dot_schedule_fields(dot_schedule_kind kind);            /* "total factor": the fields it reads */
bool        dot_schedule_find(const char *name, dot_schedule_kind *kind);

/* How a slope goes from its beginning (p = 0) to its end (p = 1); the part of the way that is left is: */
typedef enum dot_slope {
    DOT_SLOPE_LINEAR,           /* 1 - p */
    DOT_SLOPE_COSINE,           /* (1 + cos(pi p)) / 2 */
    DOT_SLOPE_SQRT              /* 1 - sqrt(p)                                          Haegele et al. 2024 */
} dot_slope;

#define DOT_MAX_MILESTONES 16
#define DOT_MAX_PARTS 8

typedef struct dot_schedule dot_schedule;
struct dot_schedule {           /* start, peak, end and floor are multiples of the base learning rate */
    dot_schedule_kind kind;
    int64_t total;              /* steps of the run, or of the first period, or of one cycle */
    double floor;               /* the least multiplier, 0..floor_base; 0 */
    double factor;              /* step, exponential: gamma; step drop: at each milestone; warm restarts: by which periods grow */
    int64_t milestones[DOT_MAX_MILESTONES];     /* step drop; sequence: where the next part begins */
    int milestone_count;
    int64_t warmup;             /* the first steps, from start to 1 in a straight line; 0 (warm restarts: of each period) */
    double start, end, peak;    /* 0, 0, 1 */
    double floor_base;          /* 1: the floor is a ratio. The base learning rate: the floor is a learning rate */
    double decay;               /* warm restarts, cyclic: the peak's factor at each new period; 1 */
    double power;               /* polynomial; 1 */
    int64_t down;               /* steps of the final (cyclic: falling) slope; 0 */
    int64_t scale;              /* inverse square root: time scale; Noam: width of the model; 1 */
    dot_slope slopes[3];        /* one-cycle: of each phase; other slopes: the first; DOT_SLOPE_LINEAR */
    double peak_at;             /* one-cycle: part of the run before the peak; 0.3 */
    double div, final_div;      /* one-cycle: starts at peak/div, ends at peak/div/final_div; 25, 1e4 */
    bool three_phase;           /* one-cycle: down to peak/div as fast as up, then to the end; false */
    double momentum_low, momentum_high;         /* one-cycle 0.85, 0.95; cyclic 0.8, 0.9: at the peak, far from it */
    double tanh_from, tanh_to;  /* tanh: -6, 3 */
    const dot_schedule *parts[DOT_MAX_PARTS];   /* sequence, product: yours, must outlive this schedule */
    int part_count;
};

/* s: the step; T: total; w: warmup; p = (s - w)/(T - w), 0..1; f: the floor as a ratio. A schedule that reads warmup and
   start is start + (1 - start) s/w for s < w, and as written from there on; "to f" means f + (1 - f) times what is written.
   A first update with lr 0 is wasted: start 1/w spares it. */
dot_schedule dot_schedule_constant(void);                                               /* 1 */
dot_schedule dot_schedule_step(int64_t every, double gamma);                            /* gamma^floor(s/every) */
dot_schedule dot_schedule_step_drop(const int64_t *milestones, int count, double gamma);/* gamma^(milestones <= s) */
dot_schedule dot_schedule_exponential(double gamma);                                    /* gamma^s; gamma > 1 has no bound */
dot_schedule dot_schedule_constant_factor(int64_t total, double factor);                /* factor for s < T, then 1 */
dot_schedule dot_schedule_linear(int64_t total, double start, double end);              /* start + (end - start) s/T */
dot_schedule dot_schedule_polynomial(int64_t total, double power, double floor);        /* (1 - p)^power to f */
dot_schedule dot_schedule_cosine(int64_t total, double floor);                          /* (1 + cos(pi p))/2 to f */
dot_schedule dot_schedule_rex(int64_t total, double floor);                             /* (1 - p)/(1 - p/2) to f */
dot_schedule dot_schedule_tanh(int64_t total, double floor);    /* (1 - tanh(tanh_from (1 - p) + tanh_to p))/2 to f */
dot_schedule dot_schedule_warmup_linear(int64_t total, int64_t warmup, double floor);   /* (1 - p)^power to f, power 1 */
dot_schedule dot_schedule_warmup_cosine(int64_t total, int64_t warmup, double floor);   /* (1 + cos(pi p))/2 to f */
dot_schedule dot_schedule_warmup_inverse_sqrt(int64_t warmup, int64_t timescale);       /* sqrt(timescale/(s - w + timescale));
                                                                                           usual timescale: w */
dot_schedule dot_schedule_noam(int64_t warmup, int64_t width);      /* width^-0.5 min((s+1)^-0.5, (s+1) w^-1.5); base lr 1 */

/* The cosine over periods first, first*factor, ...; period i begins at max(decay^i, f), after a warm-up of its own. */
dot_schedule dot_schedule_warm_restarts(int64_t first, int factor, double floor);

/* 1 up to step T - down, then the slope to the floor. */
dot_schedule dot_schedule_warmup_stable_decay(int64_t total, int64_t warmup, int64_t down, dot_slope slope);

/* From start, which is 1, along the slope to end, and there it stays: while weights are averaged. */
dot_schedule dot_schedule_swa(int64_t total, double end, dot_slope slope);

/* start (end/start)^(s/T): train, and see where the loss is lowest and where it blows up. Smith's is dot_schedule_linear. */
dot_schedule dot_schedule_range_test(int64_t total, double start, double end);

/* Up from peak/div to the peak at step peak_at T - 1, down to peak/div/final_div at step T - 1; with three_phase down to
   peak/div at step 2 peak_at T - 2, then to the same end. Cosine slopes. The momentum that belongs to it, dot_schedule_momentum,
   goes from momentum_high to momentum_low at the peak and back. Differs from PyTorch's only after its end, where that rises.
   (Smith, Topin 2018; two phases: fastai) */
dot_schedule dot_schedule_one_cycle(int64_t total);

/* From low to the peak in `up` steps, back in `down` steps, again and again; the height of cycle c is (peak - low) decay^c
   factor^s. decay 0.5: PyTorch's "triangular2"; factor < 1: "exp_range". momentum_high at the low, momentum_low at the peak. */
dot_schedule dot_schedule_cyclic(int64_t up, int64_t down, double low);

/* Part 0 up to boundaries[0], then part 1 from its own step 0, ...; count parts, count - 1 rising boundaries > 0. */
dot_schedule dot_schedule_sequence(const dot_schedule *const *parts, const int64_t *boundaries, int count);
dot_schedule dot_schedule_product(const dot_schedule *const *parts, int count);     /* 1..8 parts */

double  dot_schedule_at(const dot_schedule *schedule, int64_t step);                /* NaN for an invalid schedule */

/* The momentum (beta1) of a one-cycle or cyclic schedule, also inside a combination; NaN when there is none. */
double  dot_schedule_momentum(const dot_schedule *schedule, int64_t step);

/* Length of the restart period that `step` lies in, also where warm restarts are part of a combination; it is the
   period's full length, even if the run or the part ends before. `total` where nothing restarts. */
int64_t dot_schedule_period(const dot_schedule *schedule, int64_t step, int64_t total);

/* What is wrong with a schedule, by name and value: NULL when nothing is, else a sentence in `buffer` ("invalid" without one). */
const char *dot_schedule_invalid(const dot_schedule *schedule, char *buffer, size_t size);

/* One-cycle and cyclic schedules pass over the learning rate and momentum that an optimizer was made with. Says so: writes a
   sentence with the values that will be used, and returns true; "" and false for the others and for invalid schedules. */
bool dot_schedule_overrides(const dot_schedule *schedule, double lr, double beta1, char *buffer, size_t size);

/* The one schedule with a state: the multiplier falls when a metric has stopped getting better (torch ReduceLROnPlateau). A
   plain struct: copy or save it whole. To warm up as well, multiply with dot_schedule_at.

       dot_plateau p = dot_plateau_defaults();
       multiplier = dot_plateau_observe(&p, validation_loss);       after each epoch

   A metric is better when it is below best - threshold |best| (absolute: best - threshold); the first one always is, NaN never.
   (PyTorch's best (1 - threshold) lets a negative metric get worse.) More than `patience` observations in a row that are
   not better, and the multiplier becomes max(floor, factor * multiplier), if that lowers it by more than eps; then
   `cooldown` observations are not counted. floor and eps are multiples of the base learning rate, in PyTorch they are
   learning rates. */
typedef struct dot_plateau {
    uint32_t magic;             /* set by dot_plateau_defaults */
    bool maximize, absolute;    /* false, false */
    double threshold;           /* 1e-4 */
    int64_t patience, cooldown; /* 10, 0 */
    double factor, floor, eps;  /* 0.1, 0, 1e-8 */
    double multiplier;          /* 1; state from here on: the present value, */
    double best;                /* the best metric, NaN before the first, */
    int64_t bad, cooling;       /* observations since that were not better; still to be passed over */
} dot_plateau;
dot_plateau dot_plateau_defaults(void);
double      dot_plateau_observe(dot_plateau *plateau, double metric);   /* the multiplier; NaN, and no change, when invalid */
const char *dot_plateau_invalid(const dot_plateau *plateau, char *buffer, size_t size);     /* as dot_schedule_invalid */

/* ==== [11 utilities] =============================================================================== */

/* Compares the gradients of the scalar f(user) with central differences, for every element of `inputs` (persistent
   DOT_F64 tensors with gradient, in a context of one lane). f must call dot_step_begin first and return the loss. Returns
   the largest |analytic - numeric| / max(1, |analytic|, |numeric|), or NaN after an error. step: 1e-6 is PyTorch's. */
double dot_gradient_check(dot_context *ctx, dot_loss_function f, void *user, dot_tensor *const *inputs, int count,
                          double step);

/* ---- gradients between dot_backward and dot_optimizer_step ----
   Each works on the gradients g of all parameters of an optimizer that have one, in place, every lane by itself; they read g once or
   twice and write it once, where it changes. A unit is what PyTorch's first axis counts: an output feature or channel. Call
   dot_clip_grad_norm last: its factor is applied in the step. */

/* g = min(max(g, -limit), limit); NaN stays.                                  torch.nn.utils.clip_grad_value_ */
bool dot_clip_grad_value(dot_optimizer *optimizer, double limit);

/* Each parameter's g /= max(1, RMS(g) / limit), and 1 is the usual limit.     optax.clip_by_block_rms; Shazeer, Stern 2018 */
bool dot_clip_grad_rms(dot_optimizer *optimizer, double limit);

/* Adaptive: each unit's g *= limit max(|theta|, eps) / |g|, where |g| is not below limit max(|theta|, eps); norms over the unit, of
   biases and other vectors over the whole. Usual: limit 0.01, eps 1e-3. The paper leaves out the last layer: give `except` its
   pattern (* and ?), or NULL.                                                 Brock et al. 2021, eq. 2, 3; timm adaptive_clip_grad */
bool dot_clip_grad_adaptive(dot_optimizer *optimizer, double limit, double eps, const char *except);

/* Centralisation: g -= the mean of its unit; vectors stay.                    Yong et al. 2020, eq. 1 */
bool dot_centralize_grad(dot_optimizer *optimizer);

/* The gradient of a large batch from several smaller ones: gradients add up over dot_backward calls (also over dot_step_begin), so
   only the weights are missing. With a mean loss over n_i examples each, sum n_i g_i / sum n_i is the whole batch's gradient,
   also when the n_i differ. (Batch normalisation still sees the small batches.) No memory, and one pass at the end:

       dot_accumulation a = { 0 };
       for (i = 0; i < parts; ++i) { dot_step_begin(ctx); ...  dot_backward(dot_accumulate(&a, loss, n_i)); }
       dot_accumulate_finish(&a, optimizer);                   before clipping; then dot_optimizer_step

   A checkpoint holds no gradients: make it between windows. */
typedef struct dot_accumulation { double weight; } dot_accumulation;                   /* so far; 0 to begin with */
dot_tensor *dot_accumulate(dot_accumulation *a, dot_tensor *loss, double weight);      /* weight loss; weight > 0 */
bool        dot_accumulate_finish(dot_accumulation *a, dot_optimizer *optimizer);      /* g /= the sum of weights, which becomes 0 */

/* ---- objects that remember ----
   Each can be saved (dot_state_save in [12 files]): training that is saved, loaded and goes on has the same bits. */
typedef struct dot_state dot_state;

/* Grokfast-EMA: h = alpha h + (1 - alpha) g (first: h = g), g += lambda h.    Lee et al. 2024, alg. 1 and its code (gradfilter_ema)
   What is not finite does not enter h. One more copy of the parameters; 16 bytes an element of float and step. */
typedef struct dot_grokfast_options {
    uint32_t magic;             /* set by dot_grokfast_defaults */
    double alpha, lambda;       /* 0.98, 2 */
} dot_grokfast_options;
typedef struct dot_grokfast dot_grokfast;
dot_grokfast_options dot_grokfast_defaults(void);
dot_grokfast *dot_grokfast_create(dot_optimizer *optimizer, const dot_grokfast_options *options);
bool          dot_grokfast_filter(dot_grokfast *grokfast);
dot_state    *dot_grokfast_state(dot_grokfast *grokfast);

/* Averages of the weights of a layer, updated after dot_optimizer_step. With n averages taken before, the first being a copy:
     EMA   a += (1 - d) (theta - a), d = decay; with warmup d = min(decay, 1 - (1 + n/gamma)^-power)       timm ModelEmaV3
     SWA   a += (theta - a) / (n + 1)                                          Izmailov et al. 2018; torch AveragedModel
   Buffers are copied from the layer, or averaged too, those of integers excepted (torch: use_buffers). One more copy of the
   weights. */
typedef enum dot_average_kind { DOT_AVERAGE_EMA, DOT_AVERAGE_SWA } dot_average_kind;
typedef struct dot_average_options {
    uint32_t magic;             /* set by dot_average_defaults */
    dot_average_kind kind;      /* DOT_AVERAGE_EMA */
    double decay;               /* 0.999 */
    bool warmup;                /* false */
    double gamma, power;        /* 1, 2/3 */
    int64_t every;              /* 1: every so many calls of dot_average_update an average is taken: at calls k, 2k, ... */
    bool buffers;               /* false: copied */
} dot_average_options;
typedef struct dot_average dot_average;
dot_average_options dot_average_defaults(void);
dot_average *dot_average_create(dot_layer *layer, const dot_average_options *options);
bool         dot_average_update(dot_average *average);
int64_t      dot_average_count(const dot_average *average);    /* averages taken: n */
dot_state   *dot_average_state(dot_average *average);

/* Exchanges the averages and the weights in the layer, buffers too, by pointer: to evaluate or save the averaged network. The same
   call again takes them back, exactly; in between updates and saving the average are refused, and you must not train or make
   checkpoints. Between steps only. Pointers from dot_tensor_data follow the values. */
bool dot_average_swap(dot_average *average);

/* Recomputes the running statistics of all batch-normalisation layers below `layer`, e.g. after a swap of averaged weights: their
   mean over batches 0..batches-1 (cumulative average). `batch` begins with dot_step_begin and runs dot_forward on the batch; it
   returns false to give up. Then, and after any error, the statistics are as before.     torch.optim.swa_utils.update_bn */
bool dot_batch_norm_recompute(dot_layer *layer, bool (*batch)(void *user, int64_t index), void *user, int64_t batches);

/* Lookahead around any optimizer: after each k-th step slow += alpha (theta - slow), theta = slow; slow begins as theta at
   creation. One more copy of the parameters.                                 Zhang et al. 2019, alg. 1 */
typedef struct dot_lookahead_options {
    uint32_t magic;             /* set by dot_lookahead_defaults */
    int64_t k;                  /* 6 */
    double alpha;               /* 0.5 */
} dot_lookahead_options;
typedef struct dot_lookahead dot_lookahead;
dot_lookahead_options dot_lookahead_defaults(void);
dot_lookahead *dot_lookahead_create(dot_optimizer *optimizer, const dot_lookahead_options *options);
bool           dot_lookahead_update(dot_lookahead *lookahead);      /* after every dot_optimizer_step (dot_guard_step) */
dot_state     *dot_lookahead_state(dot_lookahead *lookahead);

/* Mechanic around any optimizer learns the factor s of its steps: keep the optimizer's lr at 1, or at a schedule's shape. With x0 the
   parameters at the first step and D the sum of the steps d so far, theta = x0 - s D, s = sum of s_i, i = 1..betas, b_i = 1 - 0.1^i:
     h = <g + weight_decay s |g| / (|theta| + eps) theta, D'>, D' = s / (s + eps) D;   D = D' + d;   norms over all parameters
     r_i = b_i r_i + s_i min(max(h, -m_i), m_i)     m_i = max(b_i m_i, |h| + eps)     v_i = b_i^2 v_i + h^2
     s_i = (s_init / betas m_i + max(r_i, 0)) / (sqrt(v_i) + eps)
   One more copy of the parameters, and of the weights for the time of a step.   Cutkosky, Defazio, Mehta 2023, alg. 1, in the form of
   optax.contrib.mechanize, by the authors */
typedef struct dot_mechanic_options {
    uint32_t magic;             /* set by dot_mechanic_defaults */
    double weight_decay;        /* 1e-2; besides the optimizer's own */
    double s_init, eps;         /* 1e-6, above 0; 1e-8, above 0 */
    int betas;                  /* 6; 1 to 12 */
} dot_mechanic_options;
typedef struct dot_mechanic dot_mechanic;
dot_mechanic_options dot_mechanic_defaults(void);
dot_mechanic *dot_mechanic_create(dot_optimizer *optimizer, const dot_mechanic_options *options);
bool          dot_mechanic_step(dot_mechanic *mechanic, double multiplier);         /* in place of dot_optimizer_step */
double        dot_mechanic_scale(const dot_mechanic *mechanic, int lane);           /* s; NaN when there is no such lane */
dot_state    *dot_mechanic_state(dot_mechanic *mechanic);

/* Sharpness-aware minimisation: the gradient at the worst point near theta is used at theta, for two backward passes a step:

       dot_backward(loss at theta);  dot_sam_ascend(sam);  dot_step_begin; dot_backward(loss anew);  dot_sam_descend(sam);
       dot_optimizer_step

   Ascend: theta += rho T^2 g / (|T g| + eps), T = 1, or adaptive (ASAM) |theta| + eta; norm over all parameters. The gradients
   are then forgotten. Descend puts theta back, exactly, by pointer; buffers too, so that running statistics are those of the first
   pass. One more copy of the weights.    Foret et al. 2021, eq. 2; Kwon et al. 2021, eq. 4; adaptive with eta 0: davda54/sam */
typedef struct dot_sam_options {
    uint32_t magic;             /* set by dot_sam_defaults */
    double rho;                 /* 0.05 (ASAM's authors: 0.5 to 2) */
    bool adaptive;              /* false */
    double eta, eps;            /* 0, 1e-12 */
} dot_sam_options;
typedef struct dot_sam dot_sam;
dot_sam_options dot_sam_defaults(void);
dot_sam *dot_sam_create(dot_optimizer *optimizer, const dot_sam_options *options);
bool     dot_sam_ascend(dot_sam *sam);
bool     dot_sam_descend(dot_sam *sam);

/* A guard steps an optimizer only where all gradients are finite: each lane by itself; a lane that is skipped keeps weights, state and
   step count as if the step had not been. With a loss scale it is torch.amp.GradScaler: gradients of scale * loss are divided by
   it; `interval` clean steps in a row multiply it by growth, a skipped one by backoff.

       dot_backward(dot_guard_loss(guard, loss));
       dot_guard_unscale(guard);           before clipping; if not called, dot_guard_step does it
       dot_guard_step(guard, multiplier);  in place of dot_optimizer_step

   After max_skips skipped steps in a row a lane is stopped (dot_lane_stop); with the last lane it is an error instead. Costs one pass
   over the gradients. Once lanes have skipped different steps they are stepped in groups of equal counts. */
typedef struct dot_guard_options {
    uint32_t magic;             /* set by the functions below */
    double scale;               /* 1;      loss scaling: 65536 */
    double growth, backoff;     /* 1, 1;   loss scaling: 2, 0.5 */
    int64_t interval;           /* 2000 */
    int64_t max_skips;          /* 0: no limit */
} dot_guard_options;
typedef struct dot_guard dot_guard;
dot_guard_options dot_guard_defaults(void);
dot_guard_options dot_guard_loss_scaling(void);
dot_guard  *dot_guard_create(dot_optimizer *optimizer, const dot_guard_options *options);
dot_tensor *dot_guard_loss(dot_guard *guard, dot_tensor *loss);
bool        dot_guard_unscale(dot_guard *guard);
bool        dot_guard_step(dot_guard *guard, double multiplier);
double      dot_guard_scale(const dot_guard *guard, int lane);
int64_t     dot_guard_skips(const dot_guard *guard, int lane);      /* of all steps */
bool        dot_guard_skipped(const dot_guard *guard, int lane);    /* the latest step */
dot_state  *dot_guard_state(dot_guard *guard);

/* Outliers of a loss or gradient norm: x lies more than `threshold` deviations above the running mean. Mean and variance are moved
   by a = max(1/n, 1 - decay): d = x - mean, mean += a d, var = (1 - a) (var + a d^2)          West 1979; Finch 2009, eq. 143
   so they begin as plain averages. Outliers and what is not finite are not averaged; after `patience` outliers in a row the
   statistics begin anew. A plain struct: copy or save it whole. */
typedef struct dot_outlier {
    uint32_t magic;             /* set by dot_outlier_defaults */
    double threshold, decay;    /* 4, 0.99 */
    int64_t warmup, patience;   /* 20: values before the first judgement; 10 */
    double mean, variance;      /* state from here on */
    int64_t count, outliers;    /* values averaged; latest outliers in a row */
    double z;                   /* of the latest value: (x - mean) / deviation */
} dot_outlier;
dot_outlier dot_outlier_defaults(void);
bool        dot_outlier_observe(dot_outlier *outlier, double x);    /* is x an outlier? Not finite: always */

/* Parameter groups with a learning rate for each depth; patterns[0] is nearest the input. False, and no change, when a number is
   out of range or a pointer NULL.
     layerwise        lr_i = lr decay^(count - 1 - i)                          Howard, Ruder 2018 (decay 1/2.6); BEiT, timm (0.65 to 0.9)
     discriminative   lr_i = first (last / first)^(i / (count - 1))            fastai: slice(first, last) */
bool dot_groups_layerwise(dot_parameter_group *groups, const char *const *patterns, int count, double lr, double decay, double weight_decay);
bool dot_groups_discriminative(dot_parameter_group *groups, const char *const *patterns, int count, double first, double last,
                               double weight_decay);

/* What a step does, measured every so many steps: two passes (before: g, first moment and a copy of theta; after: theta and the
   copy), one more copy of the weights; nothing in the steps between. */
typedef struct dot_telemetry dot_telemetry;
typedef struct dot_telemetry_report {
    int64_t step;               /* the optimizer's steps when it was measured; -1: never */
    double update_ratio;        /* |change of theta| / |theta before|; about 1e-3 is usual */
    double cosine;              /* of g and the first moment before the step; NaN for a rule without "exp_avg" or "momentum_buffer"
                                   in full precision */
    double clipped;             /* share of all steps that dot_clip_grad_norm made smaller */
} dot_telemetry_report;
dot_telemetry *dot_telemetry_create(dot_optimizer *optimizer, int64_t every);
bool dot_telemetry_before(dot_telemetry *telemetry);        /* after clipping, before the step */
bool dot_telemetry_after(dot_telemetry *telemetry);
dot_telemetry_report dot_telemetry_latest(const dot_telemetry *telemetry, int lane);

/* ==== [12 files] =================================================================================== */

/* Weights as safetensors, with PyTorch's names and shapes. Saving writes a temporary file beside `path`, flushes it to the disk
   and renames it, so that `path` is always the old or the new file, whole. Loading checks every name, shape and type before
   the first value changes; it takes F32 and F64, and loads into every lane. A strict reader: anything outside the format is
   refused. Both work, as far as the objects are whole, while an error stands. */
bool dot_save(dot_layer *layer, const char *path);                      /* lane 0 */
bool dot_save_lane(dot_layer *layer, int lane, const char *path);
bool dot_load(dot_layer *layer, const char *path);

/* The whole state of training: weights of every lane, optimizer state, hyperparameters, step, and random state. Training that
   is saved and loaded goes on with the same bits. `step` is yours: it is stored and given back. */
bool dot_checkpoint_save(const char *path, dot_layer *layer, dot_optimizer *optimizer, int64_t step);
bool dot_checkpoint_load(const char *path, dot_layer *layer, dot_optimizer *optimizer, int64_t *step);

/* The same for an object of [11 utilities]: its copies of the parameters under their names, and its counters. A swapped average
   is refused. An average has the names of torch's AveragedModel (module.0.weight). */
bool dot_state_save(const char *path, dot_state *state);
bool dot_state_load(const char *path, dot_state *state);

/* Any safetensors file. The reader keeps the header in memory and reads tensors on request. */
typedef struct dot_safetensors dot_safetensors;
typedef struct dot_safetensors_entry {
    const char *name;
    const char *dtype;              /* "F32", "F64", "I64", "U8", "BF16", ... */
    int rank;
    int64_t shape[DOT_MAX_RANK];
    int64_t count;                  /* elements */
    size_t bytes;
} dot_safetensors_entry;
dot_safetensors *dot_safetensors_open(dot_context *ctx, const char *path);
int         dot_safetensors_count(const dot_safetensors *file);
bool        dot_safetensors_entry_at(const dot_safetensors *file, int index, dot_safetensors_entry *entry);
int         dot_safetensors_find(const dot_safetensors *file, const char *name);        /* index, or -1 */
const char *dot_safetensors_metadata(const dot_safetensors *file, const char *key);     /* NULL when absent */
bool        dot_safetensors_read(dot_safetensors *file, int index, void *out, size_t bytes);     /* raw */
bool        dot_safetensors_read_double(dot_safetensors *file, int index, double *out, int64_t count); /* F32 F64 I64 U8 */
void        dot_safetensors_close(dot_safetensors *file);

typedef struct dot_safetensors_item {  /* one tensor to write */
    const char *name;
    dot_dtype dtype;
    int rank;
    int64_t shape[DOT_MAX_RANK];
    const void *data;
} dot_safetensors_item;
/* `metadata`: key, value, key, value, ..., NULL; or NULL. */
bool dot_safetensors_write(dot_context *ctx, const char *path, const dot_safetensors_item *items, int count,
                           const char *const *metadata);

/* NPY, NumPy's file of one array (numpy.lib.format, versions 1.0 to 3.0). Writing makes the bytes that numpy.save makes, and
   replaces `path` only by a whole file, as dot_save does. The reader keeps the file open and reads on request; it is strict:
   the file must end with the last element, and object and structured arrays are refused. An array in Fortran order or in
   big-endian bytes is read all the same, and comes out row-major in this machine's bytes. */
typedef struct dot_npy dot_npy;
typedef struct dot_npy_info {
    const char *type;               /* NumPy's letter and bytes: f4 f8, i1 i2 i4 i8, u1 u2 u4 u8, b1 */
    int rank;
    int64_t shape[DOT_MAX_RANK];
    int64_t count;                  /* elements */
    size_t bytes;
    bool fortran_order;             /* how the file has it */
} dot_npy_info;
dot_npy *dot_npy_open(dot_context *ctx, const char *path);
bool     dot_npy_describe(const dot_npy *file, dot_npy_info *info);
bool     dot_npy_read(dot_npy *file, void *out, size_t bytes);          /* as it is: u1 and b1 are DOT_U8, i8 DOT_I64 */
bool     dot_npy_read_double(dot_npy *file, double *out, int64_t count);        /* of any type, rounded to double */
void     dot_npy_close(dot_npy *file);
bool     dot_npy_write(dot_context *ctx, const char *path, dot_dtype dtype, int rank, const int64_t *shape,
                       const void *data);

/* A dataset: records of bytes (images), and labels if there are any. */
typedef struct dot_dataset dot_dataset;
typedef struct dot_dataset_options {
    uint32_t magic;             /* set by dot_dataset_defaults */
    bool shuffle;               /* true: a new permutation each epoch, from the lane's seed and the epoch */
    double scale;               /* 1/255: tensors are bytes times scale */
    int64_t first, count;       /* the part of the records to use; 0, and -1: to the last */
} dot_dataset_options;
dot_dataset_options dot_dataset_defaults(void);

/* The IDX files of MNIST and Fashion-MNIST (unsigned bytes; 3 dimensions [count, H, W] for images, 1 for labels). Images
   become [batch, H, W, 1]. `labels` and `options` may be NULL. */
dot_dataset *dot_dataset_idx(dot_context *ctx, const char *images, const char *labels, const dot_dataset_options *options);
/* Records in your memory, which must outlive the dataset: count records of shape[0..rank-1] bytes each. */
dot_dataset *dot_dataset_memory(dot_context *ctx, const uint8_t *records, const uint8_t *labels, int64_t count, int rank,
                                const int64_t *shape, const dot_dataset_options *options);
int64_t        dot_dataset_count(const dot_dataset *dataset);
const uint8_t *dot_dataset_record(const dot_dataset *dataset, int64_t index);
int            dot_dataset_label(const dot_dataset *dataset, int64_t index);        /* -1 when there are none */

/* Batches in an epoch, the last one smaller when `batch` does not divide the count. */
int64_t dot_batches(const dot_dataset *dataset, int64_t batch);
/* Batch `step` (epoch = step / dot_batches): [batch, shape...], in step memory; a pure function of the step. */
dot_tensor *dot_batch(dot_dataset *dataset, int64_t batch, int64_t step);
dot_tensor *dot_batch_labels(dot_dataset *dataset, int64_t batch, int64_t step);    /* DOT_I64 [batch] */

/* ==== [13 logs] ==================================================================================== */

/* The log of one training run, in one folder. Every record goes first, with a single append, into

       FOLDER/log.jsonl                                              JSON lines: the source of truth

   and, unless switched off, also into the files of two programs that draw it; it takes no server and no Python to write them:

       FOLDER/events.out.tfevents.*                                  tensorboard --logdir FOLDER
       FOLDER/wandb/offline-run-DATE_TIME-ID/run-ID.wandb            wandb sync FOLDER/wandb/offline-run-DATE_TIME-ID

   A record whose call returned true survives the death of the process (SIGKILL), and after dot_logger_flush that of the
   machine. All calls work while an error stands; one that fails returns false and leaves whole records only. A tag, such as
   "loss/train", is 1 to 255 bytes of UTF-8. After the first records nothing is allocated, unless a record is larger than all
   before it.

   Each line of log.jsonl is an object with "kind" and "time" (seconds since 1970-01-01 UTC):
       start      id, began, events, name, project, group, library, host, process; `resume` has the same and `step`
       config     key, value (a number, a string, true or false)
       scalars    step, values {tag: number}; JSON has neither NaN nor infinities: such a value is null, and the member
                  nonfinite {tag: "NaN" | "Infinity" | "-Infinity"} says which
       text       step, tag, text
       histogram  step, tag, count, nonfinite (values left out), min, max, sum, sum_squares, low, high, counts: equal
                  bins from low to high, closed on the left, the last one on both sides (numpy.histogram)
       image      step, tag, path (in FOLDER), width, height, bytes, sha256
       end        success, seconds, error (the context's sentence, if one stands) */
typedef struct dot_logger dot_logger;
typedef struct dot_logger_options {
    uint32_t magic;             /* set by dot_logger_defaults */
    const char *name;           /* of the run; NULL: the last part of the folder */
    const char *project;        /* "dotopt" */
    const char *group;          /* of runs, such as the seeds of one setting, which are drawn together; NULL: none */
    const char *id;             /* W&B's run id, 1..64 of [A-Za-z0-9_-]; NULL: eight characters from time and process */
    bool tensorboard, wandb;    /* true: write their files too */
    bool resume;                /* false: a folder with a log is refused; true: its log is continued, if there is one */
    int64_t resume_step;        /* where the resumed run begins again: what is logged of this step and later ones is
                                   superseded (TensorBoard and W&B drop it, JSON lines keep it before a `resume` record);
                                   -1: nothing is */
    int histogram_bins;         /* 64; 1..512 */
    double (*clock)(void *user);    /* seconds since 1970; default: the system's */
    void *clock_user;
} dot_logger_options;
dot_logger_options dot_logger_defaults(void);

/* Begins the log in `folder`, which is made, with its parents, if it is not there; one process at a time may write it.
   Resuming cuts off what a crash left of a last record, goes on in log.jsonl and in the .wandb file (one file is one run,
   which `wandb sync` uploads whole; the mark that it was uploaded is removed), and opens another event file, which TensorBoard
   reads after the earlier ones. */
dot_logger *dot_logger_create(dot_context *ctx, const char *folder, const dot_logger_options *options);
const char *dot_logger_id(const dot_logger *log);

/* What the run was made with. TensorBoard (HPARAMS) takes only what comes before the first record with a step. */
bool dot_logger_config_number(dot_logger *log, const char *key, double value);
bool dot_logger_config_text(dot_logger *log, const char *key, const char *value);
bool dot_logger_config_bool(dot_logger *log, const char *key, bool value);

/* Records of step `step` >= 0. dot_logger_scalars writes one record; dot_logger_tensor the histogram of a tensor's values;
   dot_logger_image takes the bytes of a PNG file. W&B makes one row of what follows each other with the same step, and gets it
   when the next step begins or at a flush; its steps must not fall: a record of an earlier step is left out there (the
   context's `log` is told). TensorBoard rounds scalars to float. */
bool dot_logger_scalar(dot_logger *log, int64_t step, const char *tag, double value);
bool dot_logger_scalars(dot_logger *log, int64_t step, int count, const char *const *tags, const double *values);
bool dot_logger_text(dot_logger *log, int64_t step, const char *tag, const char *text);
bool dot_logger_histogram(dot_logger *log, int64_t step, const char *tag, const double *values, int64_t count);
bool dot_logger_tensor(dot_logger *log, int64_t step, const char *tag, const dot_tensor *t, int lane);
bool dot_logger_image(dot_logger *log, int64_t step, const char *tag, const void *png, size_t bytes);

/* Hands everything to the disk; once an epoch is often enough. What comes later of the same step makes another row in W&B. */
bool dot_logger_flush(dot_logger *log);

/* Ends the run, with success or without, flushes and closes; frees the logger in any case. A log that only
   dot_context_destroy closes has no end, as after a crash. */
bool dot_logger_close(dot_logger *log, bool success);

#ifdef __cplusplus
}
#endif

/* Stop now if you only want to use the library: what follows is how it works. */

#endif /* DOTOPT_H */

/* ========================================================================================================
   The implementation.
   ======================================================================================================== */

#if defined(DOTOPT_IMPLEMENTATION) && !defined(DOTOPT__IMPLEMENTED)
#define DOTOPT__IMPLEMENTED

/* ==== [1 portability] ============================================================================== */

#include <errno.h>
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if !defined(__GNUC__) && !defined(DOTOPT_NO_THREADS)
#define DOTOPT_NO_THREADS           /* the pool is written with GCC's and clang's atomic builtins */
#endif
#ifndef DOTOPT_NO_THREADS
#include <pthread.h>
#include <sched.h>
#endif
#ifndef _WIN32
#include <unistd.h>
#endif

#if defined(__GNUC__) && defined(__x86_64__) && !defined(DOTOPT_NO_SIMD)
#define DOT__AVX2                   /* compiled in; used when the processor has it */
#include <immintrin.h>
#define DOT__TARGET_AVX2 __attribute__((target("avx2,fma")))
#define DOT__TARGET_AVX512 __attribute__((target("avx512f,avx2,fma")))
#endif

#if defined(__GNUC__) && defined(__aarch64__) && !defined(DOTOPT_NO_SIMD)
#define DOT__NEON                   /* every such processor has it */
#include <arm_neon.h>
#endif

#ifdef __GNUC__
#define DOT__INLINE static inline __attribute__((always_inline, unused))
#define DOT__PRINTF(text, first) __attribute__((format(printf, text, first)))
#define DOT__NOINLINE __attribute__((noinline))
#else
#define DOT__INLINE static inline
#define DOT__PRINTF(text, first)
#define DOT__NOINLINE
#endif

#if defined(_WIN32) && !defined(__USE_MINGW_ANSI_STDIO)
#define DOT__I64 "%I64d"
#else
#define DOT__I64 "%lld"
#endif
#define DOT__LL(x) ((long long)(x))

DOT__INLINE int64_t dot__min(int64_t a, int64_t b) { return a < b ? a : b; }
DOT__INLINE int64_t dot__max(int64_t a, int64_t b) { return a > b ? a : b; }
DOT__INLINE int64_t dot__ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
DOT__INLINE int64_t dot__round_up(int64_t a, int64_t b) { return dot__ceil_div(a, b) * b; }

static bool dot__mul_size(size_t a, size_t b, size_t *product)
{
    if (a != 0 && b > SIZE_MAX / a) return false;
    *product = a * b;
    return true;
}

/* Denormals cost up to a hundred cycles each. These set and restore the thread's mode. */
static unsigned long long dot__denormals_flush(bool on)
{
    unsigned long long before = 0;
#if defined(__GNUC__) && defined(__x86_64__)
    before = __builtin_ia32_stmxcsr();
    if (on) __builtin_ia32_ldmxcsr((unsigned)before | 0x8040u);        /* flush to zero, denormals are zero */
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ volatile("mrs %0, fpcr" : "=r"(before));
    if (on) __asm__ volatile("msr fpcr, %0" : : "r"(before | (1ull << 24)));
#else
    (void)on;
#endif
    return before;
}

static void dot__denormals_restore(unsigned long long before)
{
#if defined(__GNUC__) && defined(__x86_64__)
    __builtin_ia32_ldmxcsr((unsigned)before);
#elif defined(__GNUC__) && defined(__aarch64__)
    __asm__ volatile("msr fpcr, %0" : : "r"(before));
#else
    (void)before;
#endif
}

/* ==== [2 context] ================================================================================== */

#define DOT__MAGIC_CONTEXT   0xd07c0001u    /* in an options struct: it was filled by its _defaults function */
#define DOT__MAGIC_CONV      0xd07c0002u
#define DOT__MAGIC_POOL      0xd07c0003u
#define DOT__MAGIC_OPTIMIZER 0xd07c0004u
#define DOT__MAGIC_DATASET   0xd07c0005u
#define DOT__MAGIC_ATTENTION 0xd07c0006u

#define DOT__ALIGN 64       /* bytes; every array starts on a cache line, */
#define DOT__SLACK 128      /* and may be read this far beyond its end by a kernel that discards what it read there */

typedef struct dot__block {         /* head of a piece of persistent memory, DOT__ALIGN bytes before the piece */
    struct dot__block *next, *previous;
    void *allocated;
    size_t bytes;                   /* as asked of the allocator */
} dot__block;

typedef struct dot__arena_block {   /* head of a block of step memory */
    struct dot__arena_block *next;
    size_t bytes, size;             /* allocated; usable */
    char *base;
} dot__arena_block;

typedef struct dot__mark { dot__arena_block *block; size_t used; size_t total; } dot__mark;

typedef void (*dot__work)(void *job, int lane, int64_t piece);

#ifndef DOTOPT_NO_THREADS
typedef struct dot__pool {
    pthread_mutex_t mutex;
    pthread_cond_t wake, done;
    int generation;                 /* counts jobs; changed under the mutex, watched without */
    bool open, stop;                /* the present job still takes workers; the threads shall end */
    int joined;                     /* workers inside the present job */
    int workers;
    pthread_t *threads;
} dot__pool;
#endif

typedef struct dot__node dot__node;
typedef struct dot__spare dot__spare;

struct dot_context {
    uint32_t magic;
    int threads, lanes;
    uint64_t *lane_seeds;
    bool same_seeds, flush_denormals, simd;
    dot_dtype dtype;
    dot_allocator allocator;
    void (*log)(void *user, const char *message);
    void *log_user;

    dot_status status;
    char error[512];
    const char *function;           /* the public function last entered: out-of-memory sentences name it */
    dot_safetensors *files;         /* open files, */
    struct dot_npy *arrays;
    struct dot_logger *loggers;

    dot__block *blocks;             /* persistent memory, newest first */
    size_t persistent_bytes;
    int64_t allocations;
    dot__arena_block *arena, *arena_at;         /* step memory: all blocks, and the one in use */
    size_t arena_used, arena_total, arena_peak, arena_bytes;

    int *active;                    /* the lanes not stopped, in order */
    bool *lane_stopped;
    int active_count;

    bool training;                  /* between dot_step_begin and dot_eval_begin */
    uint64_t step;                  /* training steps begun: random state */
    uint64_t draws;                 /* random operations in this step */
    uint64_t inits;                 /* parameters initialised */
    uint64_t step_id;               /* counts both kinds of step, to tell old step tensors */
    uint64_t pass;                  /* counts dot_backward calls */
    dot__node *tape;                /* newest node first */
    dot__spare *spares;             /* memory of gradients that were passed on */

    const struct dot__backend *backend;

    dot__work work;                 /* the present parallel job */
    void *job;
    int64_t job_pieces;
    int job_total, job_next;
    bool job_laned;
#ifndef DOTOPT_NO_THREADS
    dot__pool pool;
#endif
};

static void DOT__PRINTF(3, 4) dot__fail(dot_context *ctx, dot_status status, const char *format, ...)
{
    if (!ctx || ctx->status != DOT_OK) return;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(ctx->error, sizeof ctx->error, format, arguments);
    va_end(arguments);
    ctx->status = status;
}

static void DOT__PRINTF(2, 3) dot__log(dot_context *ctx, const char *format, ...)
{
    if (!ctx->log) return;
    char message[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(message, sizeof message, format, arguments);
    va_end(arguments);
    ctx->log(ctx->log_user, message);
}

bool        dot_ok(const dot_context *ctx)              { return ctx && ctx->status == DOT_OK; }
dot_status  dot_error_status(const dot_context *ctx)    { return ctx ? ctx->status : DOT_ERROR_ARGUMENT; }
const char *dot_error(const dot_context *ctx)           { return ctx ? ctx->error : "no context"; }
int         dot_threads(const dot_context *ctx)         { return ctx ? ctx->threads : 0; }
int         dot_lanes(const dot_context *ctx)           { return ctx ? ctx->lanes : 0; }
dot_dtype   dot_context_dtype(const dot_context *ctx)   { return ctx ? ctx->dtype : DOT_F32; }
uint64_t    dot_lane_seed(const dot_context *ctx, int lane) { return ctx && lane >= 0 && lane < ctx->lanes ? ctx->lane_seeds[lane] : 0; }

void dot_error_clear(dot_context *ctx)
{
    if (!ctx) return;
    ctx->status = DOT_OK;
    ctx->error[0] = 0;
}

/* ---- persistent memory ---- */

static void dot__out_of_memory(dot_context *ctx, size_t bytes)
{
    dot__fail(ctx, DOT_ERROR_MEMORY, "%s: out of memory (" DOT__I64 " bytes asked for)", ctx->function ? ctx->function : "dot_context_create",
              DOT__LL(bytes));
}

static void *dot__malloc(void *user, size_t bytes) { (void)user; return malloc(bytes); }
static void dot__free(void *user, void *memory, size_t bytes) { (void)user; (void)bytes; free(memory); }

static char *dot__align(char *p)
{
    return p + (DOT__ALIGN - (uintptr_t)p % DOT__ALIGN) % DOT__ALIGN;
}

static void *dot__new(dot_context *ctx, size_t bytes)
{
    size_t total = bytes + 2 * DOT__ALIGN + DOT__SLACK;
    char *raw = total > bytes ? (char *)ctx->allocator.allocate(ctx->allocator.user, total) : NULL;
    if (!raw) {
        dot__out_of_memory(ctx, bytes);
        return NULL;
    }
    char *memory = dot__align(raw) + DOT__ALIGN;
    dot__block *block = (dot__block *)(void *)(memory - DOT__ALIGN);
    memset(memory, 0, bytes + DOT__SLACK - DOT__ALIGN);
    block->allocated = raw;
    block->bytes = total;
    block->previous = NULL;
    block->next = ctx->blocks;
    if (ctx->blocks) ctx->blocks->previous = block;
    ctx->blocks = block;
    ctx->persistent_bytes += total;
    ctx->allocations++;
    return memory;
}

static void dot__delete(dot_context *ctx, void *memory)
{
    if (!memory) return;
    dot__block *block = (dot__block *)(void *)((char *)memory - DOT__ALIGN);
    if (block->previous) block->previous->next = block->next; else ctx->blocks = block->next;
    if (block->next) block->next->previous = block->previous;
    ctx->persistent_bytes -= block->bytes;
    ctx->allocator.release(ctx->allocator.user, block->allocated, block->bytes);
}

/* ---- step memory: a chain of blocks that is only ever extended; a step walks along it from the start, so that the same
   step asks for the same addresses ---- */

static dot__arena_block *dot__arena_extend(dot_context *ctx, size_t bytes)
{
    size_t size = (size_t)1 << 20;
    dot__arena_block *last = ctx->arena;
    while (last && last->next) last = last->next;
    if (last) size = last->size * 2;                /* doubling: each block holds more than all before it */
    if (size > (size_t)256 << 20) size = (size_t)256 << 20;
    if (size < bytes) size = bytes;
    size_t head = (sizeof(dot__arena_block) + DOT__ALIGN - 1) / DOT__ALIGN * DOT__ALIGN;
    size_t total = size + head + DOT__ALIGN + DOT__SLACK;
    char *raw = total > size ? (char *)ctx->allocator.allocate(ctx->allocator.user, total) : NULL;
    if (!raw) {
        dot__out_of_memory(ctx, bytes);
        return NULL;
    }
    dot__arena_block *block = (dot__arena_block *)(void *)raw;
    block->next = NULL;
    block->bytes = total;
    block->size = size;
    block->base = dot__align(raw + head);
    memset(block->base + size, 0, DOT__SLACK);
    if (last) last->next = block; else ctx->arena = block;
    ctx->arena_bytes += total;
    ctx->allocations++;
    return block;
}

static void *dot__step_alloc(dot_context *ctx, size_t bytes)
{
    if (bytes > SIZE_MAX / 2) {
        dot__out_of_memory(ctx, bytes);
        return NULL;
    }
    bytes = (bytes + DOT__SLACK + DOT__ALIGN - 1) / DOT__ALIGN * DOT__ALIGN;    /* slack after each array: nobody else writes there */
    dot__arena_block *block = ctx->arena_at;
    size_t used = ctx->arena_used;
    while (block && block->size - used < bytes) { block = block->next; used = 0; }
    if (!block) { block = dot__arena_extend(ctx, bytes); used = 0; }
    if (!block) return NULL;
    ctx->arena_at = block;
    ctx->arena_used = used + bytes;
    ctx->arena_total += bytes;
    if (ctx->arena_total > ctx->arena_peak) ctx->arena_peak = ctx->arena_total;
    return block->base + used;
}

/* Scratch: what is allocated after a mark is given back when its operation has run. */
static dot__mark dot__scratch_begin(const dot_context *ctx)
{
    dot__mark mark;
    mark.block = ctx->arena_at;
    mark.used = ctx->arena_used;
    mark.total = ctx->arena_total;
    return mark;
}

static void dot__scratch_end(dot_context *ctx, dot__mark mark)
{
    ctx->arena_at = mark.block ? mark.block : ctx->arena;
    ctx->arena_used = mark.block ? mark.used : 0;
    ctx->arena_total = mark.total;
}

static void dot__step_reset(dot_context *ctx, bool training)
{
    ctx->arena_at = ctx->arena;
    ctx->arena_used = ctx->arena_total = 0;
    ctx->tape = NULL;
    ctx->spares = NULL;
    ctx->training = training;
    ctx->draws = 0;
    ctx->step_id++;
}

void dot_step_begin(dot_context *ctx)
{
    if (!ctx) return;
    dot__step_reset(ctx, true);
    ctx->step++;
}

void dot_eval_begin(dot_context *ctx)
{
    if (ctx) dot__step_reset(ctx, false);
}

dot_memory_report dot_memory(const dot_context *ctx)
{
    dot_memory_report report = { 0, 0, 0, 0 };
    if (!ctx) return report;
    report.persistent_bytes = ctx->persistent_bytes;
    report.step_bytes = ctx->arena_bytes;
    report.step_peak_bytes = ctx->arena_peak;
    report.allocations = ctx->allocations;
    return report;
}

/* ---- threads: a job is a number of pieces, the same however many threads there are; whoever is free takes the next
   piece. What a piece computes depends on its number alone, hence the same bits for any number of threads. ---- */

static void dot__run_piece(dot_context *ctx, int64_t index)
{
    int lane = ctx->job_laned ? ctx->active[index / ctx->job_pieces] : 0;
    ctx->work(ctx->job, lane, index % ctx->job_pieces);
}

#ifndef DOTOPT_NO_THREADS

static void dot__run_pieces(dot_context *ctx)
{
    for (;;) {
        int index = __atomic_fetch_add(&ctx->job_next, 1, __ATOMIC_RELAXED);
        if (index >= ctx->job_total) break;
        dot__run_piece(ctx, index);
    }
}

DOT__INLINE void dot__pause(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* The jobs of a training loop follow each other within microseconds: look so many times before sleeping, but not long enough to
   hurt when there are more threads than cores. */
#define DOT__SPINS 400

static void *dot__worker(void *argument)
{
    dot_context *ctx = (dot_context *)argument;
    dot__pool *pool = &ctx->pool;
    dot__denormals_flush(ctx->flush_denormals);
    int seen = 0;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        if (pool->generation == seen && !pool->stop) {
            pthread_mutex_unlock(&pool->mutex);
            for (int i = 0; i < DOT__SPINS && __atomic_load_n(&pool->generation, __ATOMIC_ACQUIRE) == seen; ++i) dot__pause();
            pthread_mutex_lock(&pool->mutex);
            while (pool->generation == seen && !pool->stop) pthread_cond_wait(&pool->wake, &pool->mutex);
        }
        if (pool->stop) break;
        seen = pool->generation;
        if (!pool->open) continue;
        __atomic_store_n(&pool->joined, pool->joined + 1, __ATOMIC_RELAXED);
        pthread_mutex_unlock(&pool->mutex);
        dot__run_pieces(ctx);
        pthread_mutex_lock(&pool->mutex);
        __atomic_store_n(&pool->joined, pool->joined - 1, __ATOMIC_RELEASE);
        if (pool->joined == 0) pthread_cond_signal(&pool->done);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

static void dot__run_parallel(dot_context *ctx)
{
    dot__pool *pool = &ctx->pool;
    pthread_mutex_lock(&pool->mutex);
    pool->open = true;
    __atomic_store_n(&pool->generation, pool->generation + 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    dot__run_pieces(ctx);
    pthread_mutex_lock(&pool->mutex);
    pool->open = false;                     /* a worker that wakes up only now goes back to sleep */
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < DOT__SPINS && __atomic_load_n(&pool->joined, __ATOMIC_ACQUIRE) > 0; ++i) dot__pause();
    pthread_mutex_lock(&pool->mutex);
    while (pool->joined > 0) pthread_cond_wait(&pool->done, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
}

#define DOT__STACK ((size_t)1 << 20)   /* of a thread, at least: kernels keep up to 220 KiB there, and musl gives 128 */

static bool dot__pool_start(dot_context *ctx)
{
    dot__pool *pool = &ctx->pool;
    if (ctx->threads == 1) return true;
    pool->threads = (pthread_t *)dot__new(ctx, sizeof(pthread_t) * (size_t)ctx->threads);
    if (!pool->threads) return false;
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pthread_cond_init(&pool->done, NULL);
    pthread_attr_t attributes;
    size_t stack = 0;
    pthread_attr_init(&attributes);
    if (pthread_attr_getstacksize(&attributes, &stack) == 0 && stack < DOT__STACK) pthread_attr_setstacksize(&attributes, DOT__STACK);
    /* Fewer threads than asked for are no error: the bits are the same. */
    for (; pool->workers < ctx->threads - 1; ++pool->workers)
        if (pthread_create(&pool->threads[pool->workers], &attributes, dot__worker, ctx) != 0) break;
    pthread_attr_destroy(&attributes);
    return true;
}

static void dot__pool_stop(dot_context *ctx)
{
    dot__pool *pool = &ctx->pool;
    if (!pool->threads) return;
    pthread_mutex_lock(&pool->mutex);
    pool->stop = true;
    __atomic_store_n(&pool->generation, pool->generation + 1, __ATOMIC_RELEASE);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->workers; ++i) pthread_join(pool->threads[i], NULL);
    pthread_cond_destroy(&pool->done);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
}

#endif

/* Runs work(job, lane, piece) for all pieces, of every active lane or, unless `laned`, once with lane 0. */
static void dot__parallel(dot_context *ctx, bool laned, int64_t pieces, dot__work work, void *job)
{
    int64_t total = (laned ? ctx->active_count : 1) * pieces;
    if (total <= 0) return;
    unsigned long long mode = dot__denormals_flush(ctx->flush_denormals);
    ctx->work = work;
    ctx->job = job;
    ctx->job_laned = laned;
    ctx->job_pieces = pieces;
#ifndef DOTOPT_NO_THREADS
    if (ctx->pool.workers > 0 && total > 1 && total < INT_MAX / 2) {
        ctx->job_total = (int)total;
        ctx->job_next = 0;
        dot__run_parallel(ctx);
        dot__denormals_restore(mode);
        return;
    }
#endif
    for (int64_t i = 0; i < total; ++i) dot__run_piece(ctx, i);
    dot__denormals_restore(mode);
}

/* ---- creation ---- */

static int dot__cores(void)
{
#if !defined(DOTOPT_NO_THREADS) && defined(_SC_NPROCESSORS_ONLN)
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    return cores < 1 ? 1 : cores > 256 ? 256 : (int)cores;
#else
    return 1;
#endif
}

dot_context_options dot_context_defaults(void)
{
    dot_context_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_CONTEXT;
    o.threads = dot__cores();
    o.lanes = 1;
    o.dtype = DOT_F32;
    o.flush_denormals = true;
    o.simd = true;
    o.allocator.allocate = dot__malloc;
    o.allocator.release = dot__free;
    return o;
}

static const struct dot__backend *dot__cpu_backend(void);
static void dot__files_close(dot_context *ctx);

dot_context *dot_context_create(const dot_context_options *options)
{
    dot_context_options o = dot_context_defaults();
    if (options) o = *options;
    if (o.magic != DOT__MAGIC_CONTEXT || o.threads < 1 || o.threads > 256 || o.lanes < 1 || o.lanes > 4096
        || (o.dtype != DOT_F32 && o.dtype != DOT_F64) || !o.allocator.allocate || !o.allocator.release) return NULL;
    dot_context *ctx = (dot_context *)o.allocator.allocate(o.allocator.user, sizeof *ctx);
    if (!ctx) return NULL;
    memset(ctx, 0, sizeof *ctx);
    ctx->magic = DOT__MAGIC_CONTEXT;
    ctx->threads = o.threads;
    ctx->lanes = o.lanes;
    ctx->flush_denormals = o.flush_denormals;
    ctx->simd = o.simd;
    ctx->dtype = o.dtype;
    ctx->allocator = o.allocator;
    ctx->log = o.log;
    ctx->log_user = o.log_user;
    ctx->allocations = 1;
    ctx->active_count = o.lanes;
    ctx->same_seeds = true;
    ctx->backend = dot__cpu_backend();
    ctx->lane_seeds = (uint64_t *)dot__new(ctx, sizeof(uint64_t) * (size_t)o.lanes);
    ctx->active = (int *)dot__new(ctx, sizeof(int) * (size_t)o.lanes);
    ctx->lane_stopped = (bool *)dot__new(ctx, sizeof(bool) * (size_t)o.lanes);
    if (!ctx->lane_seeds || !ctx->active || !ctx->lane_stopped) {
        dot_context_destroy(ctx);
        return NULL;
    }
    for (int k = 0; k < o.lanes; ++k) {
        ctx->active[k] = k;
        ctx->lane_seeds[k] = o.lane_seeds ? o.lane_seeds[k] : o.seed;
        if (ctx->lane_seeds[k] != ctx->lane_seeds[0]) ctx->same_seeds = false;
    }
#ifdef DOTOPT_NO_THREADS
    ctx->threads = 1;
#else
    if (!dot__pool_start(ctx)) {
        dot_context_destroy(ctx);
        return NULL;
    }
#endif
    return ctx;
}

void dot_context_destroy(dot_context *ctx)
{
    if (!ctx) return;
#ifndef DOTOPT_NO_THREADS
    dot__pool_stop(ctx);
#endif
    dot__files_close(ctx);
    dot_allocator allocator = ctx->allocator;
    for (dot__arena_block *block = ctx->arena, *next; block; block = next) {
        next = block->next;
        allocator.release(allocator.user, block, block->bytes);
    }
    while (ctx->blocks) dot__delete(ctx, (char *)ctx->blocks + DOT__ALIGN);
    allocator.release(allocator.user, ctx, sizeof *ctx);
}

/* ---- lanes ---- */

bool dot_lane_stop(dot_context *ctx, int lane)
{
    if (!ctx) return false;
    if (lane < 0 || lane >= ctx->lanes) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_lane_stop: lane %d, expected 0..%d", lane, ctx->lanes - 1);
        return false;
    }
    ctx->lane_stopped[lane] = true;
    ctx->active_count = 0;
    for (int k = 0; k < ctx->lanes; ++k)
        if (!ctx->lane_stopped[k]) ctx->active[ctx->active_count++] = k;
    return true;
}

bool dot_lane_active(const dot_context *ctx, int lane)
{
    return ctx && lane >= 0 && lane < ctx->lanes && !ctx->lane_stopped[lane];
}

/* ==== [3 random] =================================================================================== */

/* A stream number is a kind in the top byte and a position below it. */
#define DOT__STREAM_INIT    ((uint64_t)1 << 56)     /* + number of the parameter */
#define DOT__STREAM_DROPOUT ((uint64_t)2 << 56)     /* + step << 16 + number of the dropout in the step */
#define DOT__STREAM_SHUFFLE ((uint64_t)3 << 56)     /* + epoch */
#define DOT__STREAM_STATE   ((uint64_t)4 << 56)     /* + parameter << 40 + state << 38 + its step: stochastic rounding */
#define DOT__STREAM_NOISE   ((uint64_t)5 << 56)     /* + parameter << 40 + its step: noisy SGD */
#define DOT__STREAM_HUTCHINSON ((uint64_t)6 << 56)  /* + parameter << 40 + step: signs */
#define DOT__STREAM_SOLVER  ((uint64_t)9 << 56)     /* + step: CMA-ES, SPSA */

void dot_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4])
{
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c1 = (uint32_t)p1;
        c3 = (uint32_t)p0;
        c0 = n0;
        c2 = n2;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0; out[1] = c1; out[2] = c2; out[3] = c3;
}

static void dot__random_words(uint64_t seed, uint64_t stream, uint64_t index, uint32_t out[4])
{
    uint32_t counter[4] = { (uint32_t)index, (uint32_t)(index >> 32), (uint32_t)stream, (uint32_t)(stream >> 32) };
    uint32_t key[2] = { (uint32_t)seed, (uint32_t)(seed >> 32) };
    dot_philox4x32(counter, key, out);
}

/* One block of random words makes two doubles: draws 2i and 2i+1. */
static void dot__random_pair(uint64_t seed, uint64_t stream, uint64_t pair, double out[2])
{
    uint32_t w[4];
    dot__random_words(seed, stream, pair, w);
    out[0] = (double)(((uint64_t)w[1] << 32 | w[0]) >> 11) * (1.0 / 9007199254740992.0);
    out[1] = (double)(((uint64_t)w[3] << 32 | w[2]) >> 11) * (1.0 / 9007199254740992.0);
}

double dot_random_uniform(uint64_t seed, uint64_t stream, uint64_t index)
{
    double pair[2];
    dot__random_pair(seed, stream, index / 2, pair);
    return pair[index % 2];
}

double dot_random_normal(uint64_t seed, uint64_t stream, uint64_t index)
{
    double pair[2];
    dot__random_pair(seed, stream, index / 2, pair);
    double radius = sqrt(-2.0 * log(1.0 - pair[0])), angle = 6.283185307179586477 * pair[1];
    return radius * (index % 2 ? sin(angle) : cos(angle));
}

/* ==== [4 tensors] ================================================================================== */

struct dot_tensor {
    dot_context *ctx;
    dot_dtype dtype;
    int rank;
    int64_t shape[DOT_MAX_RANK];
    int64_t size;                   /* elements of one lane */
    int64_t lane_stride;            /* elements from one lane to the next; 0: shared by all lanes */
    char *data;
    bool persistent, requires_grad, retains_grad;
    bool has_grad;                  /* persistent tensors: `grad` holds a gradient not yet used up */
    uint64_t grad_pass;             /* step tensors: the backward pass that `grad` belongs to */
    struct dot_tensor *grad;        /* storage, made when first needed */
    dot__node *node;                /* the operation that made it, if recorded */
    uint64_t step_id;               /* step tensors: the step that they live in */
};

size_t dot_dtype_size(dot_dtype dtype)
{
    static const size_t sizes[] = { 4, 8, 8, 1 };
    return (unsigned)dtype <= DOT_U8 ? sizes[dtype] : 0;
}

static const char *dot__dtype_name(dot_dtype dtype)
{
    static const char *const names[] = { "F32", "F64", "I64", "U8" };
    return (unsigned)dtype <= DOT_U8 ? names[dtype] : "?";
}

DOT__INLINE bool dot__laned(const dot_tensor *t) { return t->lane_stride != 0; }
DOT__INLINE bool dot__is_float(dot_dtype d) { return d == DOT_F32 || d == DOT_F64; }

/* Address of a lane's first element. */
DOT__INLINE void *dot__at(const dot_tensor *t, int lane)
{
    return t->data + (size_t)(t->lane_stride * lane) * dot_dtype_size(t->dtype);
}

/* "[2,3,4]" for messages. */
typedef struct dot__text { char text[160]; } dot__text;
static dot__text dot__shape_text(int rank, const int64_t *shape)
{
    dot__text s;
    size_t used = 1;
    strcpy(s.text, "[");
    for (int i = 0; i < rank && i < DOT_MAX_RANK && used < sizeof s.text - 24; ++i)
        used += (size_t)snprintf(s.text + used, sizeof s.text - used, i ? "," DOT__I64 : DOT__I64, DOT__LL(shape[i]));
    snprintf(s.text + used, sizeof s.text - used, "]");
    return s;
}
#define DOT__SHAPE(t) dot__shape_text((t)->rank, (t)->shape).text

static bool dot__shape_equal(const dot_tensor *a, const dot_tensor *b)
{
    return a->rank == b->rank && (a->rank == 0 || memcmp(a->shape, b->shape, sizeof(int64_t) * (size_t)a->rank) == 0);
}

/* Elements of a shape whose bytes in all lanes fit memory, or -1 with the error set. */
static int64_t dot__shape_size(dot_context *ctx, const char *function, dot_dtype dtype, int rank, const int64_t *shape)
{
    ctx->function = function;
    if ((unsigned)dtype > DOT_U8) {
        dot__fail(ctx, DOT_ERROR_DTYPE, "%s: dtype %d, expected DOT_F32, DOT_F64, DOT_I64 or DOT_U8", function, (int)dtype);
        return -1;
    }
    if (rank < 0 || rank > DOT_MAX_RANK || (rank > 0 && !shape)) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: rank %d, expected 0..%d and a shape", function, rank, DOT_MAX_RANK);
        return -1;
    }
    size_t bytes = dot_dtype_size(dtype) * (size_t)ctx->lanes;
    int64_t size = 1;
    bool empty = false, fits = true;
    for (int i = 0; i < rank; ++i) {
        if (shape[i] < 0) {
            dot__fail(ctx, DOT_ERROR_SHAPE, "%s: shape %s, expected sizes >= 0", function, dot__shape_text(rank, shape).text);
            return -1;
        }
        if (shape[i] == 0) { empty = true; continue; }
        if ((uint64_t)shape[i] > SIZE_MAX / 4 || !dot__mul_size(bytes, (size_t)shape[i], &bytes)
            || bytes > SIZE_MAX / 4 || bytes > (size_t)(INT64_MAX / 4)) { fits = false; break; }
        size *= shape[i];
    }
    if (!fits) {
        dot__fail(ctx, DOT_ERROR_MEMORY, "%s: shape %s is larger than memory can be", function,
                  dot__shape_text(rank, shape).text);
        return -1;
    }
    return empty ? 0 : size;
}

static void dot__tensor_init(dot_tensor *t, dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape, int64_t size)
{
    memset(t, 0, sizeof *t);
    t->ctx = ctx;
    t->dtype = dtype;
    t->rank = rank;
    for (int i = 0; i < rank; ++i) t->shape[i] = shape[i];
    t->size = size;
    t->step_id = ctx->step_id;
}

/* Lanes begin on a cache line. An empty tensor keeps a stride, so that laned and shared stay apart. */
static int64_t dot__lane_stride(int64_t size) { return dot__round_up(dot__max(size, 1), DOT__ALIGN / 4); }

static dot_tensor *dot__persistent_tensor(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape, int64_t size)
{
    dot_tensor *t = (dot_tensor *)dot__new(ctx, sizeof *t);
    if (!t) return NULL;
    dot__tensor_init(t, ctx, dtype, rank, shape, size);
    t->persistent = true;
    t->lane_stride = dot__lane_stride(size);
    bool first_error = ctx->status == DOT_OK;
    t->data = (char *)dot__new(ctx, (size_t)(t->lane_stride * ctx->lanes) * dot_dtype_size(dtype));
    if (t->data) return t;
    if (first_error) {                          /* say it with the shape */
        ctx->status = DOT_OK;
        dot__fail(ctx, DOT_ERROR_MEMORY, "%s: out of memory for a tensor %s", ctx->function, dot__shape_text(rank, shape).text);
    }
    dot__delete(ctx, t);
    return NULL;
}

/* A tensor in step memory, its elements not set. The shape must have been checked. */
static dot_tensor *dot__step_tensor(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape, bool laned)
{
    int64_t size = dot__shape_size(ctx, ctx->function, dtype, rank, shape);
    if (size < 0) return NULL;
    dot_tensor *t = (dot_tensor *)dot__step_alloc(ctx, sizeof *t);
    if (!t) return NULL;
    dot__tensor_init(t, ctx, dtype, rank, shape, size);
    int64_t stride = dot__lane_stride(size);
    t->data = (char *)dot__step_alloc(ctx, (size_t)(laned ? stride * ctx->lanes : stride) * dot_dtype_size(dtype));
    if (!t->data) return NULL;
    t->lane_stride = laned ? stride : 0;
    return t;
}

static dot_tensor *dot__step_like(const dot_tensor *t, bool laned)
{
    return dot__step_tensor(t->ctx, t->dtype, t->rank, t->shape, laned);
}

dot_tensor *dot_tensor_create(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape)
{
    if (!dot_ok(ctx)) return NULL;
    int64_t size = dot__shape_size(ctx, "dot_tensor_create", dtype, rank, shape);
    return size < 0 ? NULL : dot__persistent_tensor(ctx, dtype, rank, shape, size);
}

dot_tensor *dot_input(dot_context *ctx, dot_dtype dtype, int rank, const int64_t *shape, const void *data)
{
    if (!dot_ok(ctx)) return NULL;
    int64_t size = dot__shape_size(ctx, "dot_input", dtype, rank, shape);
    if (size < 0) return NULL;
    if (!data && size > 0) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_input: data is NULL, expected " DOT__I64 " elements", DOT__LL(size));
        return NULL;
    }
    dot_tensor *t = dot__step_tensor(ctx, dtype, rank, shape, false);
    if (t && size > 0) memcpy(t->data, data, (size_t)size * dot_dtype_size(dtype));
    return t;
}

dot_tensor *dot_requires_grad(dot_tensor *t, bool on)
{
    if (!t || !dot_ok(t->ctx)) return NULL;
    if (!t->persistent || !dot__is_float(t->dtype)) {
        dot__fail(t->ctx, t->persistent ? DOT_ERROR_DTYPE : DOT_ERROR_ARGUMENT, "dot_requires_grad: %s tensor %s, expected a persistent tensor of F32 or F64",
                  t->persistent ? dot__dtype_name(t->dtype) : "step", DOT__SHAPE(t));
        return NULL;
    }
    t->requires_grad = on;
    return t;
}

dot_context *dot_tensor_context(const dot_tensor *t) { return t ? t->ctx : NULL; }
dot_dtype    dot_tensor_dtype(const dot_tensor *t)   { return t ? t->dtype : DOT_F32; }
int          dot_tensor_rank(const dot_tensor *t)    { return t ? t->rank : 0; }
int64_t      dot_tensor_size(const dot_tensor *t)    { return t ? t->size : 0; }

int64_t dot_tensor_dim(const dot_tensor *t, int axis)
{
    if (!t) return 0;
    int i = axis < 0 ? axis + t->rank : axis;
    if (i >= 0 && i < t->rank) return t->shape[i];
    dot__fail(t->ctx, DOT_ERROR_ARGUMENT, "dot_tensor_dim: axis %d of a tensor %s", axis, DOT__SHAPE(t));
    return 0;
}

/* Checks a lane number; DOT_ALL only where `all` says so. */
static bool dot__lane_ok(dot_context *ctx, const char *function, int lane, bool all)
{
    if ((lane >= 0 && lane < ctx->lanes) || (all && lane == DOT_ALL)) return true;
    dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: lane %d, expected 0..%d%s", function, lane, ctx->lanes - 1, all ? " or DOT_ALL" : "");
    return false;
}

void *dot_tensor_data(dot_tensor *t, int lane)
{
    return t && dot__lane_ok(t->ctx, "dot_tensor_data", lane, false) ? dot__at(t, lane) : NULL;
}

static bool dot__has_grad(const dot_tensor *t)
{
    return t->grad && (t->persistent ? t->has_grad : t->grad_pass == t->ctx->pass);
}

dot_tensor *dot_tensor_grad(dot_tensor *t) { return t && dot__has_grad(t) ? t->grad : NULL; }

dot_tensor *dot_retain_grad(dot_tensor *t)
{
    if (t) t->retains_grad = true;
    return t;
}

static double dot__load(const void *data, dot_dtype dtype, int64_t i)
{
    switch (dtype) {
    case DOT_F32: return (double)((const float *)data)[i];
    case DOT_F64: return ((const double *)data)[i];
    case DOT_I64: return (double)((const int64_t *)data)[i];
    default:      return (double)((const uint8_t *)data)[i];
    }
}

/* Integers are rounded to the nearest and clamped; NaN becomes 0. */
static void dot__store(void *data, dot_dtype dtype, int64_t i, double value)
{
    switch (dtype) {
    case DOT_F32: ((float *)data)[i] = (float)value; break;
    case DOT_F64: ((double *)data)[i] = value; break;
    case DOT_I64: ((int64_t *)data)[i] = value != value ? 0 : value >= 9.2e18 ? INT64_MAX : value <= -9.2e18 ? INT64_MIN
                                         : (int64_t)floor(value + 0.5); break;
    default:      ((uint8_t *)data)[i] = value >= 255 ? 255 : value > 0 ? (uint8_t)(value + 0.5) : 0; break;
    }
}

double dot_item(const dot_tensor *t, int lane)
{
    if (!t) return (double)NAN;
    if (!dot__lane_ok(t->ctx, "dot_item", lane, false)) return (double)NAN;
    if (t->size < 1) {
        dot__fail(t->ctx, DOT_ERROR_SHAPE, "dot_item: tensor %s is empty", DOT__SHAPE(t));
        return (double)NAN;
    }
    return dot__load(dot__at(t, lane), t->dtype, 0);
}

static bool dot__transfer_ok(const char *function, const dot_tensor *t, int lane, const void *values, int64_t count, bool all)
{
    if (!dot__lane_ok(t->ctx, function, lane, all)) return false;
    if (count != t->size || (count > 0 && !values)) {
        dot__fail(t->ctx, DOT_ERROR_ARGUMENT, "%s: " DOT__I64 " values%s, expected " DOT__I64 " for a tensor %s", function,
                  DOT__LL(count), values ? "" : " at NULL", DOT__LL(t->size), DOT__SHAPE(t));
        return false;
    }
    return true;
}

bool dot_tensor_get(const dot_tensor *t, int lane, double *out, int64_t count)
{
    if (!t || !dot__transfer_ok("dot_tensor_get", t, lane, out, count, false)) return false;
    for (int64_t i = 0; i < count; ++i) out[i] = dot__load(dot__at(t, lane), t->dtype, i);
    return true;
}

bool dot_tensor_set(dot_tensor *t, int lane, const double *values, int64_t count)
{
    if (!t || !dot__transfer_ok("dot_tensor_set", t, lane, values, count, true)) return false;
    for (int k = 0; k < (dot__laned(t) ? t->ctx->lanes : 1); ++k)
        if (lane == DOT_ALL || lane == k || !dot__laned(t))
            for (int64_t i = 0; i < count; ++i) dot__store(dot__at(t, k), t->dtype, i, values[i]);
    return true;
}

/* ==== [5 backend] ================================================================================== */

/* What operations ask of a device goes through the table dot__backend; they fill in plain descriptors. (The optimizers' own kernels
   run on the CPU.) An array is the address of lane 0 and the bytes from one lane to the next (0: shared). `laned` says whether a
   kernel runs for every active lane or once. Strides are in elements.

   The headings of this section: descriptors, THE MATRIX PRODUCT among them; building blocks of one element type; micro-kernels;
   elementwise jobs; reductions; the matrix product, its addressing first; folding; the weight's gradient; softmax; attention;
   normalisation; pooling; embedding; dropout; losses.

   Words that come back:
     piece       what one thread does at a time; a job's pieces depend on its shape alone, so that the bits do not depend on the threads
     part        pieces whose results are added up afterwards, in order
     tap         one position of a convolution's kernel
     image, grid of a convolution the larger side, whose positions have channels to be read, and the positions of the kernel over it
     run         positions that follow one another along the last axis, in one image
     tile        a block of a product that is kept in registers
     panel       B, as wide as a tile, packed for the micro-kernel */

typedef struct dot__array { char *data; int64_t lane; } dot__array;

DOT__INLINE void *dot__lane(dot__array a, int lane) { return a.data + a.lane * lane; }

static dot__array dot__array_of(const dot_tensor *t)
{
    dot__array a = { NULL, 0 };
    if (!t) return a;
    a.data = t->data;
    a.lane = t->lane_stride * (int64_t)dot_dtype_size(t->dtype);
    return a;
}

/* Elementwise functions of one argument: X(name, y = f(x), dy/dx), with two parameters p and q. One text serves scalars and
   vectors: it may use operators, x, y, p, q, zero, one, `power` (p as a number), and the words that DOT__WORD explains below. */
#define DOT__UNARY(X) \
    X(NEG,        -x,                                   -one) \
    X(ABS_,       ABS(x),                               IF_POSITIVE(x, one, IF_POSITIVE(-x, -one, zero))) \
    X(EXP_,       EXP(x),                               y) \
    X(LOG_,       LOG(x),                               one / x) \
    X(SQRT_,      ROOT(x),                              (T)0.5 / y) \
    X(SQUARE,     x * x,                                (T)2 * x) \
    X(ADD_SCALAR, x + p,                                one) \
    X(MUL_SCALAR, x * p,                                p) \
    X(POW_SCALAR, POWER(x, power),                      power == 0 ? zero : p * POWER(x, power - 1)) \
    X(RELU,       IF_POSITIVE(-x, zero, x),             IF_POSITIVE(y, one, zero)) \
    X(LEAKY_RELU, IF_POSITIVE(x, x, p * x),             IF_POSITIVE(x, one, p)) \
    X(GELU,       (T)0.5 * x * ERFC(-x * (T)0.70710678118654752440), \
                  (T)0.5 * ERFC(-x * (T)0.70710678118654752440) + x * EXP((T)-0.5 * x * x) * (T)0.39894228040143267794) \
    X(GELU_TANH,  (T)0.5 * x * (one + TANH((T)0.79788456080286535588 * (x + (T)0.044715 * x * x * x))), \
                  DOT__N(dot__gelu_tanh_slope)(x)) \
    X(SILU,       x * DOT__N(dot__sigmoid)(x), \
                  DOT__N(dot__sigmoid)(x) * (one + x * (one - DOT__N(dot__sigmoid)(x)))) \
    X(SIGMOID,    DOT__N(dot__sigmoid)(x),              y * (one - y)) \
    X(TANH_,      TANH(x),                              one - y * y) \
    X(SOFTPLUS,   IF_POSITIVE(p * x - q, x, LOG1P(EXP(p * x)) / p), \
                  IF_POSITIVE(p * x - q, one, DOT__N(dot__sigmoid)(p * x)))

/* Elementwise functions of two arguments, compiled for numbers only: X(name, z = f(a, b), dz/da, dz/db). EQUAL serves the gradient of max and min. */
#define DOT__BINARY(X) \
    X(ADD,     a + b,                       (T)1,                               (T)1) \
    X(SUB,     a - b,                       (T)1,                               (T)-1) \
    X(MUL,     a * b,                       b,                                  a) \
    X(DIV,     a / b,                       1 / b,                              -a / (b * b)) \
    X(MAXIMUM, a != a || a > b ? a : b,     a > b ? (T)1 : a == b ? (T)0.5 : (T)0, b > a ? (T)1 : a == b ? (T)0.5 : (T)0) \
    X(MINIMUM, a != a || a < b ? a : b,     a < b ? (T)1 : a == b ? (T)0.5 : (T)0, b < a ? (T)1 : a == b ? (T)0.5 : (T)0) \
    X(EQUAL,   a == b ? (T)1 : (T)0,        (T)0,                               (T)0)

/* Losses of a prediction x and a target t, averaged over the elements, also for numbers only: X(name, value, dvalue/dx, dvalue/dt), parameter p. */
#define DOT__LOSSES(X) \
    X(MSE,   (x - t) * (x - t),                 2 * (x - t),                            2 * (t - x)) \
    X(L1,    ABS(x - t),                        x > t ? (T)1 : x < t ? (T)-1 : (T)0,    t > x ? (T)1 : t < x ? (T)-1 : (T)0) \
    X(HUBER, ABS(x - t) < p ? (T)0.5 * (x - t) * (x - t) : p * (ABS(x - t) - (T)0.5 * p), \
             ABS(x - t) < p ? x - t : x > t ? p : -p,  ABS(x - t) < p ? t - x : x > t ? -p : p) \
    X(BCE,   (x > 0 ? x : 0) - x * t + LOG1P(EXP(-ABS(x))),    DOT__N(dot__sigmoid)(x) - t,        -x)

#define DOT__ENUM3(name, a, b) DOT__##name,
#define DOT__ENUM4(name, a, b, c) DOT__##name,
typedef enum dot__unary { DOT__UNARY(DOT__ENUM3) DOT__UNARIES } dot__unary;
typedef enum dot__binary { DOT__BINARY(DOT__ENUM4) DOT__BINARIES } dot__binary;
typedef enum dot__loss { DOT__LOSSES(DOT__ENUM4) DOT__LOSS_KINDS } dot__loss;

struct dot__kernels;
typedef struct dot__map {           /* y = f(x); backward: dx (+)= dy f'(x, y) */
    dot_dtype dtype;
    const struct dot__kernels *kernel;  /* the CPU's: filled in by it */
    bool laned, accumulate;
    dot__unary op;
    double p, q;
    int64_t n;
    dot__array x, y, dy, dx;
} dot__map;

typedef struct dot__zip {           /* z = f(a, b) over `shape`; backward: out = dz df/da, or df/db if `second` */
    dot_dtype dtype;
    bool laned, second;
    dot__binary op;
    int rank;
    int64_t shape[DOT_MAX_RANK], a_stride[DOT_MAX_RANK], b_stride[DOT_MAX_RANK];    /* stride 0: broadcast */
    dot__array a, b, z, out;        /* z (or dz) and out are contiguous */
} dot__zip;

typedef struct dot__copy {          /* to = scale * from (+ to), over `shape` */
    dot_dtype dtype;
    bool laned, accumulate;
    double scale;
    int rank;
    int64_t shape[DOT_MAX_RANK], to_stride[DOT_MAX_RANK], from_stride[DOT_MAX_RANK];
    dot__array to, from;
} dot__copy;

typedef enum dot__reduction { DOT__SUM, DOT__MAX, DOT__MIN } dot__reduction;
typedef struct dot__reduce {        /* out = scale * (sum | max | min over the axes in `axes`) (+ out) */
    dot_dtype dtype;
    bool laned, accumulate;
    dot__reduction op;
    double scale;
    int rank;
    int64_t shape[DOT_MAX_RANK];
    unsigned axes;
    dot__array x, out;
} dot__reduce;

/* THE MATRIX PRODUCT.  C[row][column] = sum over tap, k of A[row][tap][k] B[tap][k][column].

   Rows are found through tables, one for each of three axes, so that one kernel serves them all:
     a matrix            one tap; every row is an "image" of one position
     an image as patches row = output position, tap = kernel position; the address of a row's tap is the sum of three table
                         entries, one an axis, and -1 in any of them stands for padding, a row of zeros
     the gradient of a strided convolution with respect to its input, which is also a transposed convolution: the input
                         positions fall into stride^dims classes by their remainder modulo the stride (one class, where the
                         stride is 1). Within a class every position is reached by the same taps, so each class is one matrix
                         product over those taps: row = position of the class, A = gradient of the output, B = the weight of
                         the class's taps, transposed.
   The table says which taps those are (`tap`) and where the results go (`to`).

   An example: kernel 3, stride 2, padding 1, an image of 6 positions of I channels, hence outputs o = 0, 1, 2 of O channels:
   y[o] = sum over k of x[2 o - 1 + k] w[k]. An even position 2 i is read by k = 1 of o = i alone, an odd one, 2 i + 1, by k = 0 of
   o = i + 1 and by k = 2 of o = i:
                    dx[2 i] = dy[i] w1'                     dx[2 i + 1] = dy[i + 1] w0' + dy[i] w2'
       count, taps  3, 1                                    3, 2
       from         {0} {O} {2 O}                           {O, 0} {2 O, O} {-1, 2 O}
       tap          {I O}                                   {0, 2 I O}
       to           {0, 2 I, 4 I}                           {I, 3 I, 5 I}
   with depth = O, columns = I, and B read with b_row = 1, b_column = O, which transposes it. dot__rows_of_grid and
   dot__rows_of_image_class in [6 ops] fill in the tables. Only where the image has so few channels that a tile would be half
   empty, the products with all taps are made side by side, and added up where they belong: dot__fold. */
typedef struct dot__axis {
    int64_t count;                  /* positions along the axis */
    int taps;
    const int32_t *from;            /* [count][taps]: element offset of the row within the image of A, or -1 */
    const int32_t *to;              /* [count]: element offset within the image of C (of D, of a weight's gradient) */
    const int32_t *tap;             /* [taps]: element offset within the weight */
} dot__axis;

typedef struct dot__rows {          /* rows = images * positions of the three axes; A and C are addressed by row */
    int64_t images;
    dot__axis axis[3];
    int64_t from_image, to_image;   /* elements from one image to the next, in A and in C */
} dot__rows;

typedef struct dot__gemm {
    dot_dtype dtype;
    bool laned, accumulate;         /* C +=; never together with an activation */
    dot_activation activation;
    dot__rows rows;
    int64_t depth, columns;         /* k per tap; columns */
    int64_t b_row, b_column;        /* strides of B within a tap */
    int64_t batch, a_batch, b_batch, c_batch;   /* independent products (groups of channels, batched matrices) */
    dot__array a, b, bias, c;       /* bias: [batch][columns], or NULL */
} dot__gemm;

/* C[row][channel] (+)= act(bias[channel] + sum over taps of A[row][tap][channel]): what a class of positions of an image gets from
   the products of all positions with all taps, A[position][tap][channel]. `tap` and `from` are in elements of A. */
typedef struct dot__fold {
    dot_dtype dtype;
    const struct dot__kernels *kernel;  /* the CPU's: filled in by it */
    bool laned, accumulate;
    dot_activation activation;
    dot__rows rows;
    int64_t channels;               /* at most DOT__FOLD */
    dot__array a, bias, c;
} dot__fold;

/* W[tap][k][column] (+)= sum over rows of A[row][tap][k] D[row][column]: the gradient of the weight. */
typedef struct dot__outer {
    dot_dtype dtype;
    bool laned, accumulate;
    dot__rows rows;                 /* `to` addresses D */
    int64_t depth, columns;
    int64_t w_row;                  /* from one k to the next in W; columns are contiguous */
    int64_t batch, a_batch, d_batch, w_batch;
    dot__array a, d, w;
} dot__outer;

typedef struct dot__softmax {       /* over the middle of [outer][n][inner]; backward needs y and dy */
    dot_dtype dtype;
    const struct dot__kernels *kernel;  /* the CPU's: filled in by it */
    bool laned, accumulate, logarithm;
    int64_t outer, n, inner;
    dot__array x, y, dy, dx;
} dot__softmax;

/* o = softmax(scale q k') v of each of `batch` sequences and `heads` heads. q, k, v: [batch][position][head][size], row[i] elements from
   one position to the next; o and its gradient: [batch][query][head][value_size]. */
typedef struct dot__attention {
    dot_dtype dtype;
    bool laned, causal;
    int64_t batch, heads, queries, keys, size, value_size;
    double scale;
    int64_t row[3];
    dot__array in[3], key_mask, o;              /* q, k, v */
    dot__array statistics;                      /* [batch][head][query][2] doubles: greatest score, and sum of exp(score - greatest) */
    dot__array dout, din[3];                    /* din: NULL where not wanted */
    bool accumulate[3];
} dot__attention;

/* x seen as [sets][positions][groups][channels]; statistics of each (set, group); weight and bias are indexed by (group,
   channel). Layer normalisation is [N][1][1][C] of this, group normalisation [N][positions][G][C/G], batch normalisation
   [1][N positions][C][1]. */
typedef struct dot__norm {
    dot_dtype dtype;
    const struct dot__kernels *kernel;                          /* the CPU's: filled in by it */
    bool laned, weighted, biased, tracked, fixed;               /* fixed: use the running statistics */
    bool accumulate, add_weight, add_bias;                      /* dx, dweight, dbias: add to what is there */
    int64_t sets, positions, groups, channels;
    double eps, momentum;
    dot__array x, y, weight, bias, mean, rstd;                  /* mean, rstd: [sets][groups] doubles */
    dot__array running_mean, running_var;
    dot__array dy, dx, dweight, dbias, partial;                 /* NULL where not wanted; partial: scratch */
} dot__norm;

typedef struct dot__pool_job {      /* [images][in][channels] -> [images][positions][channels] over windows of taps */
    dot_dtype dtype;
    bool laned, accumulate, maximum, count_padding;
    int64_t images, in, channels;
    dot__axis axis[3];              /* `from` in positions, or -1; `tap` unused; `to`: [count] window sizes with padding */
    dot__array x, y, dy, dx;
} dot__pool_job;

typedef struct dot__gather {        /* y[i] = w[index[i]]; backward: dw[index[i]] += dy[i], dw zeroed first unless accumulate */
    dot_dtype dtype;
    bool laned, accumulate;
    int64_t count, rows, width;
    dot__array w, index, y, dy, dw;
} dot__gather;

typedef struct dot__dropout_job {   /* y (+)= keep ? x * scale : 0 */
    dot_dtype dtype;
    bool laned, accumulate;
    int64_t n;
    uint64_t stream, threshold;     /* kept when the 32-bit draw >= threshold */
    double scale;
    const uint64_t *seeds;
    dot__array x, y;
} dot__dropout_job;

typedef struct dot__loss_job {      /* value = mean of f(x, t); backward: value is dvalue, out (+)= dvalue f' / n */
    dot_dtype dtype;
    bool laned, accumulate, wrt_target;
    dot__loss op;
    double p;
    int64_t n;
    dot__array x, t, value, out;
} dot__loss_job;

typedef struct dot__entropy {       /* cross entropy; backward: value is dvalue, dx (+)= dvalue (softmax - q) / rows, q the smoothed one-hot label */
    dot_dtype dtype;
    bool laned, accumulate;
    int64_t rows, classes;
    double smoothing;
    dot__array x, labels, value, dx;
} dot__entropy;

typedef struct dot__backend {
    const char *name;
    void (*fill)(dot_context *ctx, dot_dtype dtype, bool laned, dot__array to, int64_t n, double value);
    void (*map)(dot_context *ctx, dot__map *job);
    void (*map_backward)(dot_context *ctx, dot__map *job);
    void (*zip)(dot_context *ctx, dot__zip *job);
    void (*zip_backward)(dot_context *ctx, dot__zip *job);
    void (*copy)(dot_context *ctx, dot__copy *job);
    bool (*reduce)(dot_context *ctx, dot__reduce *job);
    bool (*gemm)(dot_context *ctx, dot__gemm *job);
    void (*fold)(dot_context *ctx, dot__fold *job);
    bool (*outer)(dot_context *ctx, dot__outer *job);
    void (*softmax)(dot_context *ctx, dot__softmax *job);
    void (*softmax_backward)(dot_context *ctx, dot__softmax *job);
    bool (*attention)(dot_context *ctx, dot__attention *job);
    bool (*attention_backward)(dot_context *ctx, dot__attention *job);
    void (*norm)(dot_context *ctx, dot__norm *job);
    bool (*norm_backward)(dot_context *ctx, dot__norm *job);
    void (*pool)(dot_context *ctx, dot__pool_job *job);
    void (*pool_backward)(dot_context *ctx, dot__pool_job *job);
    void (*gather)(dot_context *ctx, dot__gather *job);
    void (*gather_backward)(dot_context *ctx, dot__gather *job);
    void (*dropout)(dot_context *ctx, dot__dropout_job *job);
    bool (*loss)(dot_context *ctx, dot__loss_job *job);
    void (*loss_backward)(dot_context *ctx, dot__loss_job *job);
    bool (*entropy)(dot_context *ctx, dot__entropy *job);
    void (*entropy_backward)(dot_context *ctx, dot__entropy *job);
} dot__backend;                     /* the bool ones need scratch memory: false when there is none; what they had of it, the step's end takes back */

/* ---- the CPU: building blocks of one element type ----
   So that each kernel is written once, it is a macro of (T, S), the element type and its suffix, where there is nothing to gain from
   vectors or the compiler finds them; and else a text in words, compiled for each vocabulary. */

#define DOT__PIECE 16384            /* elements of an elementwise job that one thread does at a time */
#define DOT__CHUNK 4096             /* elements of a piece where order or scratch matters: of a sum before it is combined with the others, in order */

#define DOT__PASTE(a, b) DOT__PASTE2(a, b)
#define DOT__PASTE2(a, b) a##_##b
#define DOT__N(name) DOT__PASTE(name, DOT__S)

/* What is written in the words T, V, ABS, IF_POSITIVE, ... is compiled once for each DOT__S: f32 and f64 for numbers, avx2 and avx512 for
   vectors of 8 and 16 floats. A word means DOT__word_S of the table that follows.
     T V U               an element; what is computed at once, one or a vector of WIDTH; the bits of V
     D H                 a vector of doubles as large as V, of DOUBLES_WIDTH, and that many of T; DOUBLES and SINGLES turn one into the other
     IF_POSITIVE         (x, then, otherwise)
     MAX, MIN            (x, limit): NaN stays NaN
     ABS ROOT CBRT EXP LOG LOG1P TANH ERFC SIGN, ATAN2(y, x), POWER(x, p) with a number p
     BITS, FLOAT, COUNT  V as U; U as V; U converted to V
     ADD_UP              adds the elements of x to sum[at], sum[at + 1], ... of eight
     REST                the function for what is left over of less than a vector
     WORD_TARGET         the target of a function whose results have f32's bits: no fused multiplication and addition
     RULE_TARGET         of the optimizers' rules, which may fuse
     LEAVE_VECTORS       before a call to other code
   A word that is missing is not used there: f32 has no optimizer rules (those run in double), f64 none of DOT__REAL_FUNCTIONS. To add a
   vocabulary: its words, its instantiations here and in [9 optimizers] (dot__rule_run chooses there), and a row of kernels below. */
#define DOT__WORD(name) DOT__PASTE(DOT__##name, DOT__S)

#define DOT__T_f32 float
#define DOT__V_f32 float
#define DOT__U_f32 uint32_t
#define DOT__D_f32 double
#define DOT__H_f32 float
#define DOT__WIDTH_f32 1
#define DOT__DOUBLES_WIDTH_f32 1
#define DOT__WORD_TARGET_f32
#define DOT__REST_OF_f32 f32
#define DOT__LEAVE_VECTORS_f32
#define DOT__ZERO_f32 0.0f
#define DOT__BITS_f32(x) dot__bits(x)
#define DOT__FLOAT_f32(i) dot__float(i)
#define DOT__COUNT_f32(i) ((float)(i))
#define DOT__DOUBLES_f32(v) ((double)(v))
#define DOT__SINGLES_f32(d) ((float)(d))
#define DOT__ADD_UP_f32(sum, at, x) sum[at] += (double)(x);
#define DOT__IF_POSITIVE_f32(x, then, otherwise) ((x) > 0 ? (float)(then) : (float)(otherwise))
#define DOT__MAX_f32(x, least) ((x) < (least) ? (float)(least) : (x))
#define DOT__MIN_f32(x, most) ((x) > (most) ? (float)(most) : (x))
#define DOT__ABS_f32(x) fabsf(x)
#define DOT__ROOT_f32(x) sqrtf(x)
#define DOT__POWER_f32(x, p) powf(x, p)
#define DOT__EXP_f32(x) dot__exp_f32(x, 0.0f)
#define DOT__LOG_f32(x) dot__log_f32(x)
#define DOT__LOG1P_f32(x) dot__log1p_f32(x)
#define DOT__TANH_f32(x) dot__tanh_f32(x)
#define DOT__ERFC_f32(x) dot__erfc_f32(x)

#define DOT__T_f64 double
#define DOT__V_f64 double
#define DOT__D_f64 double
#define DOT__H_f64 double
#define DOT__WIDTH_f64 1
#define DOT__DOUBLES_WIDTH_f64 1
#define DOT__WORD_TARGET_f64
#define DOT__RULE_TARGET_f64
#define DOT__REST_OF_f64 f64
#define DOT__LEAVE_VECTORS_f64
#define DOT__DOUBLES_f64(v) (v)
#define DOT__SINGLES_f64(d) (d)
#define DOT__ADD_UP_f64(sum, at, x) sum[at] += (x);
#define DOT__IF_POSITIVE_f64(x, then, otherwise) ((x) > 0 ? (double)(then) : (double)(otherwise))
#define DOT__MAX_f64(x, least) ((x) < (least) ? (double)(least) : (x))
#define DOT__MIN_f64(x, most) ((x) > (most) ? (double)(most) : (x))
#define DOT__ABS_f64(x) fabs(x)
#define DOT__ROOT_f64(x) sqrt(x)
#define DOT__CBRT_f64(x) cbrt(x)
#define DOT__POWER_f64(x, p) ((p) == 1 ? (x) : pow(x, p))
#define DOT__EXP_f64(x) exp(x)
#define DOT__LOG_f64(x) log(x)
#define DOT__LOG1P_f64(x) log1p(x)
#define DOT__TANH_f64(x) tanh(x)
#define DOT__ERFC_f64(x) erfc(x)
#define DOT__ATAN2_f64(y, x) atan2(y, x)

#ifdef DOT__AVX2
typedef float dot__float4 __attribute__((vector_size(16)));
typedef float dot__float8 __attribute__((vector_size(32)));
typedef float dot__float16 __attribute__((vector_size(64)));
typedef uint32_t dot__word8 __attribute__((vector_size(32)));
typedef uint32_t dot__word16 __attribute__((vector_size(64)));
typedef double dot__double4 __attribute__((vector_size(32)));
typedef double dot__double8 __attribute__((vector_size(64)));

#define DOT__T_avx2 float
#define DOT__V_avx2 dot__float8
#define DOT__U_avx2 dot__word8
#define DOT__D_avx2 dot__double4
#define DOT__H_avx2 dot__float4
#define DOT__WIDTH_avx2 8
#define DOT__DOUBLES_WIDTH_avx2 4
#define DOT__WORD_TARGET_avx2 __attribute__((target("avx2")))   /* without fused multiplication and addition: the same bits as f32 */
#define DOT__RULE_TARGET_avx2 DOT__TARGET_AVX2
#define DOT__REST_OF_avx2 f32
#define DOT__LEAVE_VECTORS_avx2 _mm256_zeroupper();             /* compilers forget it before a call that is a jump, and scalar code then crawls */
#define DOT__ZERO_avx2 ((dot__float8)_mm256_setzero_ps())
#define DOT__M_avx2(x) ((__m256)((x) - DOT__ZERO_avx2))         /* of a vector, or of a number */
#define DOT__BITS_avx2(x) ((dot__word8)(x))
#define DOT__FLOAT_avx2(i) ((dot__float8)(i))
#define DOT__COUNT_avx2(i) ((dot__float8)_mm256_cvtepi32_ps((__m256i)(i)))
#define DOT__DOUBLES_avx2(v) ((dot__double4)_mm256_cvtps_pd((__m128)(v)))
#define DOT__SINGLES_avx2(d) ((dot__float4)_mm256_cvtpd_ps((__m256d)(d)))
#define DOT__ADD_HALF_avx2(sum, half) _mm256_storeu_pd(sum, _mm256_add_pd(_mm256_loadu_pd(sum), _mm256_cvtps_pd(half)));
#define DOT__ADD_UP_avx2(sum, at, x) \
    DOT__ADD_HALF_avx2(sum, _mm256_castps256_ps128((__m256)(x))) DOT__ADD_HALF_avx2(sum + 4, _mm256_extractf128_ps((__m256)(x), 1))
#define DOT__IF_POSITIVE_avx2(x, then, otherwise) ((dot__float8)_mm256_blendv_ps( \
    DOT__M_avx2(otherwise), DOT__M_avx2(then), _mm256_cmp_ps(DOT__M_avx2(x), _mm256_setzero_ps(), _CMP_GT_OQ)))
#define DOT__MAX_avx2(x, least) ((dot__float8)_mm256_max_ps(DOT__M_avx2(least), DOT__M_avx2(x)))
#define DOT__MIN_avx2(x, most) ((dot__float8)_mm256_min_ps(DOT__M_avx2(most), DOT__M_avx2(x)))
#define DOT__ABS_avx2(x) ((dot__float8)_mm256_andnot_ps(_mm256_set1_ps(-0.0f), DOT__M_avx2(x)))
#define DOT__ROOT_avx2(x) ((dot__float8)_mm256_sqrt_ps(DOT__M_avx2(x)))
#define DOT__CBRT_avx2(x) dot__cbrt_avx2(x)
#define DOT__POWER_avx2(x, p) ((p) == 1 ? (x) : dot__power_avx2(x, p))
#define DOT__EXP_avx2(x) dot__exp_avx2(x, DOT__ZERO_avx2)
#define DOT__LOG_avx2(x) dot__log_avx2(x)
#define DOT__LOG1P_avx2(x) dot__log1p_avx2(x)
#define DOT__TANH_avx2(x) dot__tanh_avx2(x)
#define DOT__ERFC_avx2(x) dot__erfc_avx2(x)
#define DOT__ATAN2_avx2(y, x) dot__atan2_avx2(y, x)

/* Intrinsics in their maskz form: the plain ones read what GCC's own headers leave uninitialised, and g++ warns. */
#define DOT__T_avx512 float
#define DOT__V_avx512 dot__float16
#define DOT__U_avx512 dot__word16
#define DOT__D_avx512 dot__double8
#define DOT__H_avx512 dot__float8
#define DOT__WIDTH_avx512 16
#define DOT__DOUBLES_WIDTH_avx512 8
#define DOT__WORD_TARGET_avx512 __attribute__((target("avx512f,avx2")))
#define DOT__RULE_TARGET_avx512 DOT__TARGET_AVX512
#define DOT__REST_OF_avx512 avx2
#define DOT__LEAVE_VECTORS_avx512 _mm256_zeroupper();
#define DOT__ZERO_avx512 ((dot__float16)_mm512_setzero_ps())
#define DOT__M_avx512(x) ((__m512)((x) - DOT__ZERO_avx512))
#define DOT__BITS_avx512(x) ((dot__word16)(x))
#define DOT__FLOAT_avx512(i) ((dot__float16)(i))
#define DOT__COUNT_avx512(i) ((dot__float16)_mm512_maskz_cvtepi32_ps(0xffff, (__m512i)(i)))
#define DOT__DOUBLES_avx512(v) ((dot__double8)_mm512_maskz_cvtps_pd(0xff, (__m256)(v)))
#define DOT__SINGLES_avx512(d) ((dot__float8)_mm512_maskz_cvtpd_ps(0xff, (__m512d)(d)))
#define DOT__HALF_avx512(x, half) DOT__DOUBLES_avx512(_mm512_maskz_extractf64x4_pd(0xff, _mm512_castps_pd((__m512)(x)), half))
#define DOT__ADD_UP_avx512(sum, at, x) \
    _mm512_storeu_pd(sum, (__m512d)((dot__double8)_mm512_loadu_pd(sum) + DOT__HALF_avx512(x, 0) + DOT__HALF_avx512(x, 1)));
#define DOT__IF_POSITIVE_avx512(x, then, otherwise) ((dot__float16)_mm512_mask_blend_ps( \
    _mm512_cmp_ps_mask(DOT__M_avx512(x), _mm512_setzero_ps(), _CMP_GT_OQ), DOT__M_avx512(otherwise), DOT__M_avx512(then)))
#define DOT__MAX_avx512(x, least) ((dot__float16)_mm512_maskz_max_ps(0xffff, DOT__M_avx512(least), DOT__M_avx512(x)))
#define DOT__MIN_avx512(x, most) ((dot__float16)_mm512_maskz_min_ps(0xffff, DOT__M_avx512(most), DOT__M_avx512(x)))
#define DOT__ABS_avx512(x) ((dot__float16)_mm512_abs_ps(DOT__M_avx512(x)))
#define DOT__ROOT_avx512(x) ((dot__float16)_mm512_maskz_sqrt_ps(0xffff, DOT__M_avx512(x)))
#define DOT__CBRT_avx512(x) dot__cbrt_avx512(x)
#define DOT__POWER_avx512(x, p) ((p) == 1 ? (x) : dot__power_avx512(x, p))
#define DOT__EXP_avx512(x) dot__exp_avx512(x, DOT__ZERO_avx512)
#define DOT__LOG_avx512(x) dot__log_avx512(x)
#define DOT__LOG1P_avx512(x) dot__log1p_avx512(x)
#define DOT__TANH_avx512(x) dot__tanh_avx512(x)
#define DOT__ERFC_avx512(x) dot__erfc_avx512(x)
#define DOT__ATAN2_avx512(y, x) dot__atan2_avx512(y, x)
#endif

/* Functions of float, of a number or of a vector, by the same operations, hence to the same bits (unless the compiler is told
   to fuse multiplications and additions). Largest error found among 16 million numbers: exp 1 ulp, log 0.8, log1p of numbers >= 0 1.2,
   tanh 1.3, erfc 6. exp by Cody and Waite's method: an exact multiple of ln 2 is taken off, the rest goes into a polynomial; coefficients of
   exp, tanh and erf: Moshier's Cephes; log: FreeBSD's msun; erfc: Press et al., Numerical Recipes, section 6.2. */
#define DOT__REAL_FUNCTIONS \
    /* exp(x + low), low being what was lost in rounding x. The sum with 1.5 * 2^23 rounds to a whole number, in its last bits. */ \
    WORD_TARGET DOT__INLINE V DOT__N(dot__exp)(V x, V low) \
    { \
        V whole = ZERO + 12582912.0f; \
        x = MAX(MIN(x, 89.0f), -104.0f); \
        V shifted = x * 1.44269504088896341f + 12582912.0f, n = shifted - whole; \
        V r = x - n * 0.693359375f - n * -2.12194440e-4f + low, p = r * 1.9875691500e-4f + 1.3981999507e-3f; \
        p = p * r + 8.3334519073e-3f; \
        p = p * r + 4.1665795894e-2f; \
        p = p * r + 1.6666665459e-1f; \
        p = p * r + 5.0000001201e-1f; \
        p = p * r * r + r + 1.0f; \
        U i = BITS(shifted) - BITS(whole), half = ((i + 1024u) >> 1) - 512u;    /* 2^i as a product, each factor a normal number */ \
        return p * FLOAT((half + 127u) << 23) * FLOAT((i - half + 127u) << 23); \
    } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__log)(V x) \
    { \
        V tiny = IF_POSITIVE(1.17549435e-38f - x, ZERO + 8388608.0f, ZERO + 1.0f); \
        U i = BITS(x * tiny) + (0x3f800000u - 0x3f3504f3u); \
        V k = COUNT(i >> 23) - 127.0f - IF_POSITIVE(tiny - 1.0f, ZERO + 23.0f, ZERO); \
        V f = FLOAT((i & 0x007fffffu) + 0x3f3504f3u) - 1.0f, s = f / (f + 2.0f), z = s * s, w = z * z; \
        V r = w * (0.24279078841f * w + 0.40000972152f) + z * (w * 0.28498786688f + 0.66666662693f), h = 0.5f * f * f; \
        V y = s * (h + r) + k * 9.0580006145e-6f - h + f + k * 6.9313812256e-1f; \
        y = IF_POSITIVE(x - 3.40282347e38f, x, y);                              /* infinity stays, */ \
        return IF_POSITIVE(x, y, IF_POSITIVE(-x, (x - x) / (x - x), x - (T)INFINITY));     /* log(-1) is NaN, log(0) -infinity */ \
    } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__log1p)(V x)     /* of numbers >= 0 */ \
    { \
        V u = x + 1.0f; \
        return IF_POSITIVE(u - 3.40282347e38f, u, DOT__N(dot__log)(u) - ((u - 1.0f) - x) / u); \
    } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__tanh)(V x) \
    { \
        V z = x * x, p = z * -5.70498872745e-3f + 2.06390887954e-2f; \
        p = p * z + -5.37397155531e-2f; \
        p = p * z + 1.33314422036e-1f; \
        p = p * z + -3.33332819422e-1f; \
        V big = 1.0f - 2.0f / (DOT__N(dot__exp)(ABS(x) + ABS(x), ZERO) + 1.0f); \
        return IF_POSITIVE(0.625f - ABS(x), p * z * x + x, IF_POSITIVE(x, big, -big)); \
    } \
    /* Near 0 by a polynomial, else t exp(-x^2 + P(t)), t = 1 / (1 + |x| / 2): the square's upper half is exact, what its lower \
       half and P lose goes along. */ \
    WORD_TARGET DOT__INLINE V DOT__N(dot__erfc)(V x) \
    { \
        V a = MIN(ABS(x), 12.0f), t = 1.0f / (0.5f * a + 1.0f), p = t * 0.17087277f + -0.82215223f; \
        p = p * t + 1.48851587f; \
        p = p * t + -1.13520398f; \
        p = p * t + 0.27886807f; \
        p = p * t + -0.18628806f; \
        p = p * t + 0.09678418f; \
        p = p * t + 0.37409196f; \
        p = p * t + 1.00002368f; \
        p = p * t + -1.26551223f; \
        V upper = FLOAT(BITS(a) & 0xfffff000u), square = -upper * upper, rest = p - (a - upper) * (a + upper), sum = square + rest; \
        V y = t * DOT__N(dot__exp)(sum, (square - sum) + rest), z = a * a, near = z * 7.853861353153693e-5f + -8.010193625184903e-4f; \
        near = near * z + 5.188327685732524e-3f; \
        near = near * z + -2.685381193529856e-2f; \
        near = near * z + 1.128358514861418e-1f; \
        near = near * z + -3.761262582423300e-1f; \
        near = near * z + 1.128379165726710f; \
        return IF_POSITIVE(0.5f - a, 1.0f - near * x, IF_POSITIVE(x, y, 2.0f - y)); \
    }

#define DOT__SIGMOID_FUNCTIONS \
    WORD_TARGET DOT__INLINE V DOT__N(dot__sigmoid)(V x) \
    { \
        V e = EXP(-ABS(x)), y = (T)1 / (e + (T)1);      /* never overflows */ \
        return IF_POSITIVE(-x, e * y, y); \
    } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__gelu_tanh_slope)(V x) \
    { \
        T c = (T)0.79788456080286535588; \
        V h = TANH(c * (x + (T)0.044715 * x * x * x)); \
        return (T)0.5 * (h + (T)1) + (T)0.5 * x * ((T)1 - h * h) * c * ((T)1 + (T)3 * (T)0.044715 * x * x); \
    }

/* Vectors, and what is left over as scalars. */
#define DOT__UNARY_FUNCTIONS(name, value, slope) \
    WORD_TARGET static void DOT__N(dot__map_##name)(const void *xs, void *ys, int64_t n, double p0, double q0) \
    { \
        T power = (T)p0; \
        int64_t i = 0; \
        V zero, one, p, q, x, y; \
        memset(&zero, 0, sizeof zero); \
        one = zero + (T)1; p = zero + (T)p0; q = zero + (T)q0; \
        (void)power; (void)one; (void)p; (void)q; \
        for (; i + WIDTH <= n; i += WIDTH) { \
            memcpy(&x, (const T *)xs + i, sizeof x); \
            y = value; \
            memcpy((T *)ys + i, &y, sizeof y); \
        } \
        LEAVE_VECTORS \
        if (i < n) REST(dot__map_##name)((const T *)xs + i, (T *)ys + i, n - i, p0, q0); \
    } \
    WORD_TARGET static void DOT__N(dot__map_back_##name)(const void *xs, const void *ys, const void *dys, void *dxs, int64_t n, double p0, double q0, \
                                                         bool add) \
    { \
        T power = (T)p0; \
        int64_t i = 0; \
        V zero, one, p, q, x, y, dy, dx; \
        memset(&zero, 0, sizeof zero); \
        one = zero + (T)1; p = zero + (T)p0; q = zero + (T)q0; \
        (void)power; (void)one; (void)p; (void)q; \
        for (; i + WIDTH <= n; i += WIDTH) { \
            memcpy(&x, (const T *)xs + i, sizeof x); \
            memcpy(&y, (const T *)ys + i, sizeof y); \
            memcpy(&dy, (const T *)dys + i, sizeof dy); \
            dx = dy * (slope); \
            if (add) { memcpy(&y, (T *)dxs + i, sizeof y); dx = dx + y; } \
            memcpy((T *)dxs + i, &dx, sizeof dx); \
        } \
        LEAVE_VECTORS \
        if (i < n) REST(dot__map_back_##name)((const T *)xs + i, (const T *)ys + i, (const T *)dys + i, (T *)dxs + i, n - i, p0, q0, add); \
    }

/* The greatest element (where there is a NaN, any: the sum is NaN then); and y = exp(x - top), of which it returns the sum, by eight
   partial sums, to which the rest's elements go too, for the order's sake. */
#define DOT__ROW_FUNCTIONS \
    WORD_TARGET static double DOT__N(dot__top)(const void *xs, int64_t n) \
    { \
        const T *x = (const T *)xs; \
        T top = x[0]; \
        int64_t i = 0; \
        if (WIDTH > 1 && n >= WIDTH) { \
            V all, some; \
            T each[WIDTH]; \
            memcpy(&all, x, sizeof all); \
            for (i = WIDTH; i + WIDTH <= n; i += WIDTH) { memcpy(&some, x + i, sizeof some); all = IF_POSITIVE(some - all, some, all); } \
            memcpy(each, &all, sizeof all); \
            for (int j = 0; j < WIDTH; ++j) if (each[j] > top || each[j] != each[j]) top = each[j]; \
        } \
        for (; i < n; ++i) if (x[i] > top || x[i] != x[i]) top = x[i]; \
        return (double)top; \
    } \
    WORD_TARGET static double DOT__N(dot__exp_row)(const void *xs, double top, void *ys, int64_t n) \
    { \
        double sum[8] = { 0, 0, 0, 0, 0, 0, 0, 0 }; \
        T *y = (T *)ys; \
        int64_t i = 0; \
        V x; \
        for (; i + WIDTH <= n; i += WIDTH) { \
            memcpy(&x, (const T *)xs + i, sizeof x); \
            x = EXP(x - (T)top); \
            memcpy(y + i, &x, sizeof x); \
            ADD_UP(sum, i % 8, x) \
        } \
        LEAVE_VECTORS \
        if (i < n) { \
            REST(dot__exp_row)((const T *)xs + i, top, y + i, n - i); \
            for (; i < n; ++i) sum[i % 8] += (double)y[i]; \
        } \
        return ((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])); \
    } \
    /* The softmax's gradient: p *= share, then dp = scale p (dp - delta). */ \
    WORD_TARGET static void DOT__N(dot__score_row)(void *ps, void *dps, double share, double delta, double scale, int64_t n) \
    { \
        T *p = (T *)ps, *dp = (T *)dps; \
        int64_t i = 0; \
        V x, d; \
        for (; i + WIDTH <= n; i += WIDTH) { \
            memcpy(&x, p + i, sizeof x); \
            memcpy(&d, dp + i, sizeof d); \
            x = x * (T)share; \
            d = x * (d - (T)delta) * (T)scale; \
            memcpy(p + i, &x, sizeof x); \
            memcpy(dp + i, &d, sizeof d); \
        } \
        LEAVE_VECTORS \
        if (i < n) REST(dot__score_row)(p + i, dp + i, share, delta, scale, n - i); \
    }

#define DOT__BINARY_FUNCTIONS(name, value, slope_a, slope_b) \
    static void DOT__N(dot__zip_##name)(const T *as, int64_t sa, const T *bs, int64_t sb, T *zs, int64_t n) \
    { \
        if (sa == 1 && sb == 1) for (int64_t i = 0; i < n; ++i) { T a = as[i], b = bs[i]; zs[i] = value; } \
        else for (int64_t i = 0; i < n; ++i) { T a = as[i * sa], b = bs[i * sb]; zs[i] = value; } \
    } \
    static void DOT__N(dot__zip_back_##name)(const T *as, int64_t sa, const T *bs, int64_t sb, const T *dzs, T *out, int64_t n, \
                                             bool second) \
    { \
        for (int64_t i = 0; i < n; ++i) { \
            T a = as[i * sa], b = bs[i * sb]; \
            (void)a; (void)b; \
            out[i] = dzs[i] * (second ? (slope_b) : (slope_a)); \
        } \
    }

#define DOT__LOSS_FUNCTIONS(name, value, slope_x, slope_t) \
    static double DOT__N(dot__loss_##name)(const T *xs, const T *ts, int64_t n, T p) \
    { \
        double sum = 0; \
        (void)p; \
        for (int64_t i = 0; i < n; ++i) { T x = xs[i], t = ts[i]; sum += (double)(value); } \
        return sum; \
    } \
    static void DOT__N(dot__loss_back_##name)(const T *xs, const T *ts, T *out, int64_t n, T p, T scale, bool wrt_t, bool add) \
    { \
        (void)p; \
        for (int64_t i = 0; i < n; ++i) { \
            T x = xs[i], t = ts[i], d = scale * (wrt_t ? (slope_t) : (slope_x)); \
            (void)x; (void)t; \
            out[i] = add ? out[i] + d : d; \
        } \
    }

/* Parts of normalisation, in double: over so many rows, `step` elements apart, and n columns side by side. mean and rstd are one for
   each column (`apart`), or one for all. */
#define DOT__NORM_FUNCTIONS \
    /* Adds up x, or (x - mean)^2 if there is a mean: out[column], or all in out[0]. */ \
    WORD_TARGET static void DOT__N(dot__norm_sums)(const void *xs, int64_t rows, int64_t step, int64_t n, const double *mean, bool apart, double *out) \
    { \
        const T *x = (const T *)xs; \
        int64_t c = 0; \
        D zero, total, sum, m, d; \
        H v; \
        memset(&zero, 0, sizeof zero); \
        total = zero; \
        for (; c + DOUBLES_WIDTH <= n; c += DOUBLES_WIDTH) { \
            sum = m = zero; \
            if (mean && apart) memcpy(&m, mean + c, sizeof m); \
            else if (mean) m = zero + mean[0]; \
            for (int64_t r = 0; r < rows; ++r) { \
                memcpy(&v, x + r * step + c, sizeof v); \
                d = DOUBLES(v) - m; \
                sum = sum + (mean ? d * d : d); \
            } \
            if (apart) { memcpy(&d, out + c, sizeof d); d = d + sum; memcpy(out + c, &d, sizeof d); } \
            else total = total + sum; \
        } \
        if (!apart) { \
            double each[DOUBLES_WIDTH]; \
            memcpy(each, &total, sizeof total); \
            for (int j = 0; j < DOUBLES_WIDTH; ++j) out[0] += each[j]; \
        } \
        LEAVE_VECTORS \
        if (c < n) REST(dot__norm_sums)(x + c, rows, step, n - c, mean && apart ? mean + c : mean, apart, apart ? out + c : out); \
    } \
    /* y = (x - mean) rstd weight + bias */ \
    WORD_TARGET static void DOT__N(dot__norm_affine)(const void *xs, void *ys, int64_t rows, int64_t step, int64_t n, const double *mean, \
                                                     const double *rstd, bool apart, const void *weights, const void *biases) \
    { \
        const T *x = (const T *)xs, *weight = (const T *)weights, *bias = (const T *)biases; \
        T *y = (T *)ys; \
        int64_t c = 0; \
        D zero, m, scale, shift; \
        H v; \
        memset(&zero, 0, sizeof zero); \
        for (; c + DOUBLES_WIDTH <= n; c += DOUBLES_WIDTH) { \
            m = zero + mean[0]; scale = zero + rstd[0]; shift = zero; \
            if (apart) { memcpy(&m, mean + c, sizeof m); memcpy(&scale, rstd + c, sizeof scale); } \
            if (weight) { memcpy(&v, weight + c, sizeof v); scale = scale * DOUBLES(v); } \
            if (bias) { memcpy(&v, bias + c, sizeof v); shift = DOUBLES(v); } \
            for (int64_t r = 0; r < rows; ++r) { \
                memcpy(&v, x + r * step + c, sizeof v); \
                v = SINGLES((DOUBLES(v) - m) * scale + shift); \
                memcpy(y + r * step + c, &v, sizeof v); \
            } \
        } \
        LEAVE_VECTORS \
        if (c < n) REST(dot__norm_affine)(x + c, y + c, rows, step, n - c, apart ? mean + c : mean, apart ? rstd + c : rstd, apart, \
                                          weight ? weight + c : NULL, bias ? bias + c : NULL); \
    } \
    /* Adds up e = dy weight, and e (x - mean) rstd: sum[column] and product[column], or all in sum[0] and product[0]. */ \
    WORD_TARGET static void DOT__N(dot__norm_pairs)(const void *xs, const void *dys, int64_t rows, int64_t step, int64_t n, const double *mean, \
                                                    const double *rstd, bool apart, const void *weights, bool columns, double *sum, double *product) \
    { \
        const T *x = (const T *)xs, *dy = (const T *)dys, *weight = (const T *)weights; \
        int64_t c = 0; \
        D zero, m, k, w, a, b, e, all_a, all_b; \
        H v; \
        memset(&zero, 0, sizeof zero); \
        all_a = all_b = zero; \
        for (; c + DOUBLES_WIDTH <= n; c += DOUBLES_WIDTH) { \
            a = b = zero; m = zero + mean[0]; k = zero + rstd[0]; w = zero + 1.0; \
            if (apart) { memcpy(&m, mean + c, sizeof m); memcpy(&k, rstd + c, sizeof k); } \
            if (weight) { memcpy(&v, weight + c, sizeof v); w = DOUBLES(v); } \
            for (int64_t r = 0; r < rows; ++r) { \
                memcpy(&v, dy + r * step + c, sizeof v); \
                e = DOUBLES(v) * w; \
                memcpy(&v, x + r * step + c, sizeof v); \
                a = a + e; \
                b = b + e * (DOUBLES(v) - m); \
            } \
            b = b * k; \
            if (!columns) { all_a = all_a + a; all_b = all_b + b; continue; } \
            memcpy(&e, sum + c, sizeof e); a = a + e; memcpy(sum + c, &a, sizeof a); \
            memcpy(&e, product + c, sizeof e); b = b + e; memcpy(product + c, &b, sizeof b); \
        } \
        if (!columns) { \
            double each[2][DOUBLES_WIDTH]; \
            memcpy(each[0], &all_a, sizeof all_a); \
            memcpy(each[1], &all_b, sizeof all_b); \
            for (int j = 0; j < DOUBLES_WIDTH; ++j) { sum[0] += each[0][j]; product[0] += each[1][j]; } \
        } \
        LEAVE_VECTORS \
        if (c < n) REST(dot__norm_pairs)(x + c, dy + c, rows, step, n - c, apart ? mean + c : mean, apart ? rstd + c : rstd, apart, \
                                         weight ? weight + c : NULL, columns, columns ? sum + c : sum, columns ? product + c : product); \
    } \
    /* dx (+)= rstd (dy weight - e - (x - mean) rstd eh); e and eh are given like mean and rstd. */ \
    WORD_TARGET static void DOT__N(dot__norm_back)(const void *xs, const void *dys, void *dxs, int64_t rows, int64_t step, int64_t n, const double *mean, \
                                                   const double *rstd, bool apart, const void *weights, const double *es, const double *ehs, bool add) \
    { \
        const T *x = (const T *)xs, *dy = (const T *)dys, *weight = (const T *)weights; \
        T *dx = (T *)dxs; \
        int64_t c = 0; \
        D zero, m, k, w, e, h, d; \
        H v, old; \
        memset(&zero, 0, sizeof zero); \
        for (; c + DOUBLES_WIDTH <= n; c += DOUBLES_WIDTH) { \
            m = zero + mean[0]; k = zero + rstd[0]; e = zero + es[0]; h = zero + ehs[0]; w = zero + 1.0; \
            if (apart) { \
                memcpy(&m, mean + c, sizeof m); memcpy(&k, rstd + c, sizeof k); \
                memcpy(&e, es + c, sizeof e); memcpy(&h, ehs + c, sizeof h); \
            } \
            if (weight) { memcpy(&v, weight + c, sizeof v); w = DOUBLES(v); } \
            h = h * k; \
            for (int64_t r = 0; r < rows; ++r) { \
                memcpy(&v, dy + r * step + c, sizeof v); \
                d = DOUBLES(v) * w - e; \
                memcpy(&v, x + r * step + c, sizeof v); \
                v = SINGLES(k * (d - (DOUBLES(v) - m) * h)); \
                if (add) { memcpy(&old, dx + r * step + c, sizeof old); v = v + old; } \
                memcpy(dx + r * step + c, &v, sizeof v); \
            } \
        } \
        LEAVE_VECTORS \
        if (c < n) REST(dot__norm_back)(x + c, dy + c, dx + c, rows, step, n - c, apart ? mean + c : mean, apart ? rstd + c : rstd, apart, \
                                        weight ? weight + c : NULL, apart ? es + c : es, apart ? ehs + c : ehs, add); \
    }

typedef struct dot__map_row {
    void (*forward)(const void *x, void *y, int64_t n, double p, double q);
    void (*backward)(const void *x, const void *y, const void *dy, void *dx, int64_t n, double p, double q, bool add);
} dot__map_row;

#define DOT__MAP_ROW(name, a, b)        { DOT__N(dot__map_##name), DOT__N(dot__map_back_##name) },
#define DOT__ZIP_ROW(name, a, b, c)     { DOT__N(dot__zip_##name), DOT__N(dot__zip_back_##name) },
#define DOT__LOSS_ROW(name, a, b, c)    { DOT__N(dot__loss_##name), DOT__N(dot__loss_back_##name) },

#define DOT__MAPS \
    DOT__SIGMOID_FUNCTIONS \
    DOT__ROW_FUNCTIONS \
    DOT__NORM_FUNCTIONS \
    DOT__UNARY(DOT__UNARY_FUNCTIONS) \
    static const dot__map_row DOT__N(dot__maps)[] = { DOT__UNARY(DOT__MAP_ROW) };

#define DOT__ELEMENTWISE \
    DOT__MAPS \
    DOT__BINARY(DOT__BINARY_FUNCTIONS) \
    DOT__LOSSES(DOT__LOSS_FUNCTIONS) \
    static const struct { \
        void (*forward)(const T *, int64_t, const T *, int64_t, T *, int64_t); \
        void (*backward)(const T *, int64_t, const T *, int64_t, const T *, T *, int64_t, bool); \
    } DOT__N(dot__zips)[] = { DOT__BINARY(DOT__ZIP_ROW) }; \
    static const struct { \
        double (*forward)(const T *, const T *, int64_t, T); \
        void (*backward)(const T *, const T *, T *, int64_t, T, T, bool, bool); \
    } DOT__N(dot__losses)[] = { DOT__LOSSES(DOT__LOSS_ROW) };

DOT__INLINE uint32_t dot__bits(float x) { uint32_t i; memcpy(&i, &x, sizeof i); return i; }
DOT__INLINE float dot__float(uint32_t i) { float x; memcpy(&x, &i, sizeof x); return x; }

/* The words; defined until [9 optimizers], which writes its rules in them: nothing else may have one of these names until there. */
#define REST(function) DOT__PASTE(function, DOT__WORD(REST_OF))
#define SIGN(x) (IF_POSITIVE(x, 1, 0) - IF_POSITIVE(-(x), 1, 0))
#define T DOT__WORD(T)
#define V DOT__WORD(V)
#define U DOT__WORD(U)
#define D DOT__WORD(D)
#define H DOT__WORD(H)
#define WIDTH DOT__WORD(WIDTH)
#define DOUBLES_WIDTH DOT__WORD(DOUBLES_WIDTH)
#define WORD_TARGET DOT__WORD(WORD_TARGET)
#define RULE_TARGET DOT__WORD(RULE_TARGET)
#define LEAVE_VECTORS DOT__WORD(LEAVE_VECTORS)
#define ZERO DOT__WORD(ZERO)
#define BITS DOT__WORD(BITS)
#define FLOAT DOT__WORD(FLOAT)
#define COUNT DOT__WORD(COUNT)
#define DOUBLES DOT__WORD(DOUBLES)
#define SINGLES DOT__WORD(SINGLES)
#define ADD_UP DOT__WORD(ADD_UP)
#define IF_POSITIVE DOT__WORD(IF_POSITIVE)
#define MAX DOT__WORD(MAX)
#define MIN DOT__WORD(MIN)
#define ABS DOT__WORD(ABS)
#define ROOT DOT__WORD(ROOT)
#define CBRT DOT__WORD(CBRT)
#define POWER DOT__WORD(POWER)
#define EXP DOT__WORD(EXP)
#define LOG DOT__WORD(LOG)
#define LOG1P DOT__WORD(LOG1P)
#define TANH DOT__WORD(TANH)
#define ERFC DOT__WORD(ERFC)
#define ATAN2 DOT__WORD(ATAN2)

#define DOT__S f32
DOT__REAL_FUNCTIONS
DOT__ELEMENTWISE
#undef DOT__S

#define DOT__S f64
DOT__ELEMENTWISE
#undef DOT__S

#ifdef DOT__AVX2
/* Functions that are a loop over the elements. */
#define DOT__LOOP_FUNCTIONS \
    WORD_TARGET DOT__INLINE V DOT__N(dot__cbrt)(V x)           { for (int j = 0; j < WIDTH; ++j) x[j] = cbrtf(x[j]); return x; } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__power)(V x, float p) { for (int j = 0; j < WIDTH; ++j) x[j] = powf(x[j], p); return x; } \
    WORD_TARGET DOT__INLINE V DOT__N(dot__atan2)(V y, V x)     { for (int j = 0; j < WIDTH; ++j) y[j] = atan2f(y[j], x[j]); return y; }

#define DOT__S avx2
DOT__LOOP_FUNCTIONS
DOT__REAL_FUNCTIONS
DOT__MAPS
#undef DOT__S

/* AVX-512 has its own fused multiplication and addition: compilers are told not to use it here. */
#ifdef __clang__
#pragma clang fp contract(off)
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif
#define DOT__S avx512
DOT__LOOP_FUNCTIONS
DOT__REAL_FUNCTIONS
DOT__MAPS
#undef DOT__S
#ifdef __clang__
#pragma clang fp contract(on)
#else
#pragma GCC pop_options
#endif
#endif

/* Calls the float or the double version of a kernel. */
#define DOT__CALL(dtype, function, arguments) \
    do { if ((dtype) == DOT_F32) function##_f32 arguments; else function##_f64 arguments; } while (0)

/* Part `piece` of n elements: begin and length. */
DOT__INLINE int64_t dot__part(int64_t n, int64_t piece, int64_t size, int64_t *length)
{
    int64_t begin = piece * size;
    *length = dot__min(size, n - begin);
    return begin;
}

/* ---- micro-kernels: what depends on the instruction set ----
   A tile of the matrix product is a block of C that is kept in registers, of as many rows and columns as there is room for. Rows
   of A are pointers; B is packed into panels as wide as a tile, [tap][k][column], padded with zeros. */

#define DOT__MAX_ROWS 12            /* of any instruction set's tile */
#define DOT__MAX_COLUMNS 32         /* with all elements: at most DOT__SLACK bytes, which a tile may read too many */
#define DOT__DEPTH 320              /* about as many k's, over all taps, the matrix product gives one call, so that a panel stays in L1 */
#define DOT__TAPS 32                /* most taps of one call */
#define DOT__ROW_BLOCK 96           /* rows whose pointers are made at a time: whole tiles of any height */

typedef char dot__tile_within_slack[DOT__MAX_COLUMNS * sizeof(float) <= DOT__SLACK ? 1 : -1];

typedef struct dot__tile {
    int rows, columns;              /* used of the tile */
    int taps;
    int64_t depth;                  /* k per tap */
    const void *const *a;           /* [taps][rows of a tile] */
    const void *b;                  /* panel */
    int64_t b_tap;                  /* elements from one tap to the next */
    const void *bias;               /* a value for each column to begin with, or NULL: zeros */
    bool accumulate;                /* begin with C */
    bool relu;                      /* end with max(0, c) */
    void *const *c;                 /* rows */
} dot__tile;

typedef struct dot__outer_tile {
    int64_t count;                  /* rows summed over */
    const void *const *a;           /* [count] rows of A, from element a_at */
    int64_t a_at;
    const void *const *d;           /* [count] rows of D, from element d_at */
    int64_t d_at;
    int rows, columns;
    bool accumulate;
    void *w;
    int64_t w_row;
} dot__outer_tile;

typedef struct dot__kernels {       /* one row for each instruction set and element type */
    const char *name;
    const struct dot__kernels *slim;/* instead of this one, where its tiles would be half empty */
    int rows, columns;              /* of a tile */
    int outer_rows;                 /* of a tile of the weight's gradient, which has as many columns */
    int dot_start;                  /* what a call of `dot` costs, in k's of a row of a tile; then six of its k's cost one */
    void (*tile)(const dot__tile *);
    void (*outer)(const dot__outer_tile *);
    double (*dot)(const void *a, const void *b, int64_t n);
    void (*sum_rows)(const void *x, int64_t rows, int64_t step, double *sum, int64_t n);  /* sum[j] += x[row * step + j] */
    double (*top)(const void *x, int64_t n);                                            /* greatest element */
    double (*exp_row)(const void *x, double top, void *y, int64_t n);                   /* y = exp(x - top); their sum */
    void (*score_row)(void *p, void *dp, double share, double delta, double scale, int64_t n);
    void (*norm_sums)(const void *x, int64_t rows, int64_t step, int64_t n, const double *mean, bool apart, double *out);
    void (*norm_affine)(const void *x, void *y, int64_t rows, int64_t step, int64_t n, const double *mean, const double *rstd, bool apart,
                        const void *weight, const void *bias);
    void (*norm_pairs)(const void *x, const void *dy, int64_t rows, int64_t step, int64_t n, const double *mean, const double *rstd, bool apart,
                       const void *weight, bool columns, double *sum, double *product);
    void (*norm_back)(const void *x, const void *dy, void *dx, int64_t rows, int64_t step, int64_t n, const double *mean, const double *rstd,
                      bool apart, const void *weight, const double *e, const double *eh, bool add);
    const dot__map_row *maps;
} dot__kernels;

#define DOT__PORTABLE_ROWS 6
#define DOT__PORTABLE_COLUMNS 16

#define DOT__PORTABLE_KERNELS(T, S) \
static void dot__tile_##S(const dot__tile *t) \
{ \
    T sum[DOT__PORTABLE_ROWS][DOT__PORTABLE_COLUMNS]; \
    for (int i = 0; i < t->rows; ++i) \
        for (int j = 0; j < DOT__PORTABLE_COLUMNS; ++j) sum[i][j] = t->bias ? ((const T *)t->bias)[j] : (T)0; \
    for (int tap = 0; tap < t->taps; ++tap) { \
        const T *b = (const T *)t->b + tap * t->b_tap; \
        for (int64_t k = 0; k < t->depth; ++k, b += DOT__PORTABLE_COLUMNS) \
            for (int i = 0; i < t->rows; ++i) { \
                T a = ((const T *)t->a[tap * DOT__PORTABLE_ROWS + i])[k]; \
                for (int j = 0; j < DOT__PORTABLE_COLUMNS; ++j) sum[i][j] += a * b[j]; \
            } \
    } \
    for (int i = 0; i < t->rows; ++i) { \
        T *c = (T *)t->c[i]; \
        for (int j = 0; j < t->columns; ++j) { \
            c[j] = t->accumulate ? c[j] + sum[i][j] : sum[i][j]; \
            if (t->relu && c[j] < 0) c[j] = (T)0; \
        } \
    } \
} \
static void dot__outer_##S(const dot__outer_tile *t) \
{ \
    T sum[DOT__PORTABLE_ROWS][DOT__PORTABLE_COLUMNS]; \
    memset(sum, 0, sizeof sum); \
    for (int64_t p = 0; p < t->count; ++p) { \
        const T *a = (const T *)t->a[p] + t->a_at, *d = (const T *)t->d[p] + t->d_at; \
        for (int i = 0; i < t->rows; ++i) \
            for (int j = 0; j < t->columns; ++j) sum[i][j] += a[i] * d[j]; \
    } \
    for (int i = 0; i < t->rows; ++i) { \
        T *w = (T *)t->w + i * t->w_row; \
        for (int j = 0; j < t->columns; ++j) w[j] = t->accumulate ? w[j] + sum[i][j] : sum[i][j]; \
    } \
} \
static double dot__dot_##S(const void *a, const void *b, int64_t n) \
{ \
    const T *x = (const T *)a, *y = (const T *)b; \
    T sum[8] = { 0, 0, 0, 0, 0, 0, 0, 0 }, rest = 0; \
    int64_t i = 0; \
    for (; i + 8 <= n; i += 8) \
        for (int j = 0; j < 8; ++j) sum[j] += x[i + j] * y[i + j]; \
    for (; i < n; ++i) rest += x[i] * y[i]; \
    return (double)(((sum[0] + sum[4]) + (sum[1] + sum[5])) + ((sum[2] + sum[6]) + (sum[3] + sum[7])) + rest); \
} \
static void dot__sum_rows_##S(const void *xs, int64_t rows, int64_t step, double *sum, int64_t n) \
{ \
    const T *x = (const T *)xs; \
    for (int64_t i = 0; i < rows; ++i, x += step) \
        for (int64_t j = 0; j < n; ++j) sum[j] += (double)x[j]; \
}
DOT__PORTABLE_KERNELS(float, f32)
DOT__PORTABLE_KERNELS(double, f64)

/* Accumulators have names because compilers keep arrays of them in memory. */
#define DOT__SIX(X)    X(0) X(1) X(2) X(3) X(4) X(5)
#define DOT__EIGHT(X)  DOT__SIX(X) X(6) X(7)
#define DOT__TWELVE(X) DOT__EIGHT(X) X(8) X(9) X(10) X(11)

#ifdef DOT__NEON
/* Six rows of four registers, four of B and one of A: twenty-nine of thirty-two. */
#define DOT__NEON_START(i)   float32x4_t c##i##0 = s0, c##i##1 = s1, c##i##2 = s2, c##i##3 = s3;
#define DOT__NEON_POINTER(i) const float *a##i = a[i];
#define DOT__NEON_ADD(i, number) x = vdupq_n_f32(number); \
    c##i##0 = vfmaq_f32(c##i##0, x, b0); c##i##1 = vfmaq_f32(c##i##1, x, b1); \
    c##i##2 = vfmaq_f32(c##i##2, x, b2); c##i##3 = vfmaq_f32(c##i##3, x, b3);
#define DOT__NEON_STEP(i)    DOT__NEON_ADD(i, a##i[k])
#define DOT__NEON_OUTER(i)   DOT__NEON_ADD(i, a[i])
#define DOT__NEON_STORE(i)   if (t->rows > i) \
    dot__store_row_neon(c##i##0, c##i##1, c##i##2, c##i##3, (float *)t->c[i], t->columns, t->accumulate, t->relu);
#define DOT__NEON_OUTER_STORE(i) if (t->rows > i) \
    dot__store_row_neon(c##i##0, c##i##1, c##i##2, c##i##3, (float *)t->w + i * t->w_row, t->columns, t->accumulate, false);

static void dot__store_row_neon(float32x4_t c0, float32x4_t c1, float32x4_t c2, float32x4_t c3, float *c, int columns, bool accumulate, bool relu)
{
    float row[16];
    vst1q_f32(row, c0);
    vst1q_f32(row + 4, c1);
    vst1q_f32(row + 8, c2);
    vst1q_f32(row + 12, c3);
    for (int j = 0; j < columns; ++j) {
        c[j] = accumulate ? c[j] + row[j] : row[j];
        if (relu && c[j] < 0) c[j] = 0;
    }
}

static void dot__tile_neon(const dot__tile *t)
{
    const float *bias = (const float *)t->bias;
    float32x4_t s0 = vdupq_n_f32(0), s1 = s0, s2 = s0, s3 = s0, x;
    if (bias) {
        s0 = vld1q_f32(bias);
        s1 = vld1q_f32(bias + 4);
        s2 = vld1q_f32(bias + 8);
        s3 = vld1q_f32(bias + 12);
    }
    DOT__SIX(DOT__NEON_START)
    for (int tap = 0; tap < t->taps; ++tap) {
        const float *b = (const float *)t->b + tap * t->b_tap, *const *a = (const float *const *)t->a + tap * 6;
        DOT__SIX(DOT__NEON_POINTER)
        for (int64_t k = 0; k < t->depth; ++k, b += 16) {
            float32x4_t b0 = vld1q_f32(b), b1 = vld1q_f32(b + 4), b2 = vld1q_f32(b + 8), b3 = vld1q_f32(b + 12);
            DOT__SIX(DOT__NEON_STEP)
        }
    }
    DOT__SIX(DOT__NEON_STORE)
}

static void dot__outer_neon(const dot__outer_tile *t)
{
    float32x4_t s0 = vdupq_n_f32(0), s1 = s0, s2 = s0, s3 = s0, x;
    DOT__SIX(DOT__NEON_START)
    for (int64_t p = 0; p < t->count; ++p) {
        const float *a = (const float *)t->a[p] + t->a_at, *d = (const float *)t->d[p] + t->d_at;
        float32x4_t b0 = vld1q_f32(d), b1 = vld1q_f32(d + 4), b2 = vld1q_f32(d + 8), b3 = vld1q_f32(d + 12);
        DOT__SIX(DOT__NEON_OUTER)
    }
    DOT__SIX(DOT__NEON_OUTER_STORE)
}
#endif

#ifdef DOT__AVX2
/* Six rows of two registers, two of B and one of A: all sixteen. */
#define DOT__TILE_START(i) __m256 c##i##0 = s0, c##i##1 = s1;
#define DOT__TILE_ROW(i)   const float *a##i = (const float *)t->a[tap * 6 + i];
#define DOT__TILE_STEP(i)  x = _mm256_broadcast_ss(a##i + k); \
                           c##i##0 = _mm256_fmadd_ps(x, b0, c##i##0); c##i##1 = _mm256_fmadd_ps(x, b1, c##i##1);
#define DOT__TILE_STORE(i) if (t->rows > i) dot__store_row_avx2(c##i##0, c##i##1, (float *)t->c[i], t->columns, t->accumulate, t->relu);

DOT__TARGET_AVX2 DOT__INLINE void dot__store_row_avx2(__m256 lo, __m256 hi, float *c, int columns, bool accumulate, bool relu)
{
    if (columns == 16) {
        if (accumulate) {
            lo = _mm256_add_ps(lo, _mm256_loadu_ps(c));
            hi = _mm256_add_ps(hi, _mm256_loadu_ps(c + 8));
        }
        if (relu) {                 /* max takes its second operand where one is NaN: NaN stays */
            lo = _mm256_max_ps(_mm256_setzero_ps(), lo);
            hi = _mm256_max_ps(_mm256_setzero_ps(), hi);
        }
        _mm256_storeu_ps(c, lo);
        _mm256_storeu_ps(c + 8, hi);
    } else {
        float row[16];
        _mm256_storeu_ps(row, lo);
        _mm256_storeu_ps(row + 8, hi);
        for (int j = 0; j < columns; ++j) {
            c[j] = accumulate ? c[j] + row[j] : row[j];
            if (relu && c[j] < 0) c[j] = 0;
        }
    }
}

/* Unused rows have some valid pointer: reading them is harmless. */
DOT__TARGET_AVX2 static void dot__tile_avx2(const dot__tile *t)
{
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, x;
    if (t->bias) {
        s0 = _mm256_loadu_ps((const float *)t->bias);
        s1 = _mm256_loadu_ps((const float *)t->bias + 8);
    }
    DOT__SIX(DOT__TILE_START)
    for (int tap = 0; tap < t->taps; ++tap) {
        const float *b = (const float *)t->b + tap * t->b_tap;
        DOT__SIX(DOT__TILE_ROW)
        for (int64_t k = 0; k < t->depth; ++k, b += 16) {
            __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
            DOT__SIX(DOT__TILE_STEP)
        }
    }
    DOT__SIX(DOT__TILE_STORE)
}

#define DOT__OUTER_STEP(i) x = _mm256_broadcast_ss(a + i); \
                           c##i##0 = _mm256_fmadd_ps(x, b0, c##i##0); c##i##1 = _mm256_fmadd_ps(x, b1, c##i##1);
#define DOT__OUTER_STORE(i) if (t->rows > i) \
    dot__store_row_avx2(c##i##0, c##i##1, (float *)t->w + i * t->w_row, t->columns, t->accumulate, false);

/* Reads up to a tile's rows and columns beyond what is used, which is why arrays have slack at their end. */
DOT__TARGET_AVX2 static void dot__outer_avx2(const dot__outer_tile *t)
{
    __m256 s0 = _mm256_setzero_ps(), s1 = s0, x;
    DOT__SIX(DOT__TILE_START)
    for (int64_t p = 0; p < t->count; ++p) {
        const float *a = (const float *)t->a[p] + t->a_at, *d = (const float *)t->d[p] + t->d_at;
        __m256 b0 = _mm256_loadu_ps(d), b1 = _mm256_loadu_ps(d + 8);
        DOT__SIX(DOT__OUTER_STEP)
    }
    DOT__SIX(DOT__OUTER_STORE)
}

DOT__TARGET_AVX2 static double dot__dot_avx2(const void *a, const void *b, int64_t n)
{
    const float *x = (const float *)a, *y = (const float *)b;
    __m256 sum = _mm256_setzero_ps();
    float rest = 0, part[8];
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(x + i), _mm256_loadu_ps(y + i), sum);
    for (; i < n; ++i) rest += x[i] * y[i];
    _mm256_storeu_ps(part, sum);
    return (double)(((part[0] + part[4]) + (part[1] + part[5])) + ((part[2] + part[6]) + (part[3] + part[7])) + rest);
}

/* Sixteen columns at a time, in registers over all rows. */
DOT__TARGET_AVX2 static void dot__sum_rows_avx2(const void *xs, int64_t rows, int64_t step, double *sum, int64_t n)
{
    const float *x = (const float *)xs;
    int64_t j = 0;
    for (; j + 16 <= n; j += 16) {
        __m256d s0 = _mm256_loadu_pd(sum + j), s1 = _mm256_loadu_pd(sum + j + 4);
        __m256d s2 = _mm256_loadu_pd(sum + j + 8), s3 = _mm256_loadu_pd(sum + j + 12);
        for (int64_t i = 0; i < rows; ++i) {
            const float *row = x + i * step + j;
            s0 = _mm256_add_pd(s0, _mm256_cvtps_pd(_mm_loadu_ps(row)));
            s1 = _mm256_add_pd(s1, _mm256_cvtps_pd(_mm_loadu_ps(row + 4)));
            s2 = _mm256_add_pd(s2, _mm256_cvtps_pd(_mm_loadu_ps(row + 8)));
            s3 = _mm256_add_pd(s3, _mm256_cvtps_pd(_mm_loadu_ps(row + 12)));
        }
        _mm256_storeu_pd(sum + j, s0);
        _mm256_storeu_pd(sum + j + 4, s1);
        _mm256_storeu_pd(sum + j + 8, s2);
        _mm256_storeu_pd(sum + j + 12, s3);
    }
    _mm256_zeroupper();
    dot__sum_rows_f32(x + j, rows, step, sum + j, n - j);
}

/* AVX-512: twelve rows of two registers, or of one for a matrix of few columns, where the numbers of A come from memory in the
   multiplication itself. */
#define DOT__WIDE_START(i) __m512 c##i##0 = s0, c##i##1 = s1;
#define DOT__WIDE_STEP(i)  x = _mm512_set1_ps(a##i[k]); \
                           c##i##0 = _mm512_fmadd_ps(x, b0, c##i##0); c##i##1 = _mm512_fmadd_ps(x, b1, c##i##1);
#define DOT__WIDE_STORE(i) if (t->rows > i) { \
    dot__store_row_avx512(c##i##0, (float *)t->c[i], t->columns, t->accumulate, t->relu); \
    dot__store_row_avx512(c##i##1, (float *)t->c[i] + 16, t->columns - 16, t->accumulate, t->relu); }
#define DOT__SLIM_START(i) __m512 c##i = s0;
#define DOT__SLIM_STEP(i)  c##i = _mm512_fmadd_ps(_mm512_set1_ps(a##i[k]), b0, c##i);
#define DOT__SLIM_STORE(i) if (t->rows > i) dot__store_row_avx512(c##i, (float *)t->c[i], t->columns, t->accumulate, t->relu);
#define DOT__TILE_POINTER(i) const float *a##i = a[i];

DOT__TARGET_AVX512 DOT__INLINE void dot__store_row_avx512(__m512 row, float *c, int columns, bool accumulate, bool relu)
{
    __mmask16 mask = (__mmask16)(columns >= 16 ? 0xffff : columns > 0 ? (1 << columns) - 1 : 0);
    if (accumulate) row = _mm512_add_ps(row, _mm512_maskz_loadu_ps(mask, c));
    if (relu) row = _mm512_maskz_max_ps((__mmask16)0xffff, _mm512_setzero_ps(), row);
    _mm512_mask_storeu_ps(c, mask, row);
}

#define DOT__TILE_AVX512(name, VECTORS, START, STEP, STORE) \
DOT__TARGET_AVX512 static void name(const dot__tile *t) \
{ \
    const float *bias = (const float *)t->bias; \
    __m512 s0 = bias ? _mm512_loadu_ps(bias) : _mm512_setzero_ps(), s1 = bias && VECTORS > 1 ? _mm512_loadu_ps(bias + 16) : _mm512_setzero_ps(), x = s1; \
    DOT__TWELVE(START) \
    for (int tap = 0; tap < t->taps; ++tap) { \
        const float *b = (const float *)t->b + tap * t->b_tap, *const *a = (const float *const *)t->a + tap * 12; \
        DOT__TWELVE(DOT__TILE_POINTER) \
        for (int64_t k = 0; k < t->depth; ++k, b += 16 * VECTORS) { \
            __m512 b0 = _mm512_loadu_ps(b), b1 = VECTORS > 1 ? _mm512_loadu_ps(b + 16) : b0; \
            (void)b1; \
            DOT__TWELVE(STEP) \
        } \
    } \
    (void)x; \
    DOT__TWELVE(STORE) \
}
DOT__TILE_AVX512(dot__tile_avx512, 2, DOT__WIDE_START, DOT__WIDE_STEP, DOT__WIDE_STORE)
DOT__TILE_AVX512(dot__tile_avx512_slim, 1, DOT__SLIM_START, DOT__SLIM_STEP, DOT__SLIM_STORE)

#define DOT__WIDE_OUTER(i) x = _mm512_set1_ps(a[i]); \
                           c##i##0 = _mm512_fmadd_ps(x, b0, c##i##0); c##i##1 = _mm512_fmadd_ps(x, b1, c##i##1);
#define DOT__WIDE_OUTER_STORE(i) if (t->rows > i) { \
    dot__store_row_avx512(c##i##0, (float *)t->w + i * t->w_row, t->columns, t->accumulate, false); \
    dot__store_row_avx512(c##i##1, (float *)t->w + i * t->w_row + 16, t->columns - 16, t->accumulate, false); }
#define DOT__SLIM_OUTER(i) c##i = _mm512_fmadd_ps(_mm512_set1_ps(a[i]), b0, c##i);
#define DOT__SLIM_OUTER_STORE(i) if (t->rows > i) \
    dot__store_row_avx512(c##i, (float *)t->w + i * t->w_row, t->columns, t->accumulate, false);

#define DOT__OUTER_AVX512(name, VECTORS, START, STEP, STORE) \
DOT__TARGET_AVX512 static void name(const dot__outer_tile *t) \
{ \
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, x = s0; \
    (void)s1; \
    DOT__EIGHT(START) \
    for (int64_t p = 0; p < t->count; ++p) { \
        const float *a = (const float *)t->a[p] + t->a_at, *d = (const float *)t->d[p] + t->d_at; \
        __m512 b0 = _mm512_loadu_ps(d), b1 = VECTORS > 1 ? _mm512_loadu_ps(d + 16) : b0; \
        (void)b1; \
        DOT__EIGHT(STEP) \
    } \
    (void)x; \
    DOT__EIGHT(STORE) \
}
DOT__OUTER_AVX512(dot__outer_avx512, 2, DOT__WIDE_START, DOT__WIDE_OUTER, DOT__WIDE_OUTER_STORE)
DOT__OUTER_AVX512(dot__outer_avx512_slim, 1, DOT__SLIM_START, DOT__SLIM_OUTER, DOT__SLIM_OUTER_STORE)

#endif

/* name, slim, rows, columns, outer_rows, and the functions: S, V are the suffixes of those that are not its own. An instruction set needs
   tile, outer, a row here and a branch in dot__kernel. */
#define DOT__KERNEL_ROW(name, slim, rows, columns, outer_rows, tile, outer, S, V) \
    { name, slim, rows, columns, outer_rows, DOT__DOT_START_##S, tile, outer, dot__dot_##S, dot__sum_rows_##S, dot__top_##V, dot__exp_row_##V, dot__score_row_##V, dot__norm_sums_##V, \
      dot__norm_affine_##V, dot__norm_pairs_##V, dot__norm_back_##V, dot__maps_##V }
#define DOT__DOT_START_f32 0
#define DOT__DOT_START_f64 0
#define DOT__DOT_START_avx2 34
#define DOT__PORTABLE_ROW(S) DOT__KERNEL_ROW("portable", NULL, DOT__PORTABLE_ROWS, DOT__PORTABLE_COLUMNS, DOT__PORTABLE_ROWS, dot__tile_##S, \
                                             dot__outer_##S, S, S)
static const dot__kernels dot__kernels_portable[2] = { DOT__PORTABLE_ROW(f32), DOT__PORTABLE_ROW(f64) };
#ifdef DOT__NEON
static const dot__kernels dot__kernels_neon[2] = {
    DOT__KERNEL_ROW("neon", NULL, 6, 16, 6, dot__tile_neon, dot__outer_neon, f32, f32), DOT__PORTABLE_ROW(f64),
};
#endif
#ifdef DOT__AVX2
static const dot__kernels dot__kernels_avx2[2] = {
    DOT__KERNEL_ROW("avx2", NULL, 6, 16, 6, dot__tile_avx2, dot__outer_avx2, avx2, avx2), DOT__PORTABLE_ROW(f64),
};
static const dot__kernels dot__kernel_avx512_slim =
    DOT__KERNEL_ROW("avx512", NULL, 12, 16, 8, dot__tile_avx512_slim, dot__outer_avx512_slim, avx2, avx512);
static const dot__kernels dot__kernels_avx512[2] = {
    DOT__KERNEL_ROW("avx512", &dot__kernel_avx512_slim, 12, 32, 8, dot__tile_avx512, dot__outer_avx512, avx2, avx512), DOT__PORTABLE_ROW(f64),
};
#endif

/* The one place where an instruction set is chosen; dot__rule_run in [9 optimizers] follows it. */
static const dot__kernels *dot__kernel(const dot_context *ctx, dot_dtype dtype)
{
#ifdef DOT__AVX2
    if (ctx->simd && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &(__builtin_cpu_supports("avx512f") ? dot__kernels_avx512 : dot__kernels_avx2)[dtype == DOT_F64];
#endif
#ifdef DOT__NEON
    if (ctx->simd) return &dot__kernels_neon[dtype == DOT_F64];
#endif
    (void)ctx;
    return &dot__kernels_portable[dtype == DOT_F64];
}

/* The same for a matrix of so many columns: slim, where the last of one or two wide panels would be half empty. */
static const dot__kernels *dot__kernel_for(const dot_context *ctx, dot_dtype dtype, int64_t columns)
{
    const dot__kernels *kernel = dot__kernel(ctx, dtype);
    return kernel->slim && columns <= 3 * kernel->slim->columns && dot__ceil_div(columns, kernel->slim->columns) % 2 ? kernel->slim : kernel;
}

const char *dot_kernels(const dot_context *ctx)
{
    return ctx ? dot__kernel(ctx, ctx->dtype)->name : NULL;
}

/* ---- elementwise jobs ---- */

typedef struct dot__fill_job { dot_dtype dtype; dot__array to; int64_t n; double value; } dot__fill_job;

static void dot__fill_piece(void *argument, int lane, int64_t piece)
{
    dot__fill_job *job = (dot__fill_job *)argument;
    int64_t n, begin = dot__part(job->n, piece, DOT__PIECE, &n);
    void *to = dot__lane(job->to, lane);
    if (job->dtype == DOT_F32) for (int64_t i = 0; i < n; ++i) ((float *)to)[begin + i] = (float)job->value;
    else for (int64_t i = 0; i < n; ++i) ((double *)to)[begin + i] = job->value;
}

static void dot__cpu_fill(dot_context *ctx, dot_dtype dtype, bool laned, dot__array to, int64_t n, double value)
{
    dot__fill_job job = { dtype, to, n, value };
    dot__parallel(ctx, laned, dot__ceil_div(n, DOT__PIECE), dot__fill_piece, &job);
}

/* Axes that lie one behind the other in every array are one axis; an axis of size 1 is none. `strides` holds `arrays` rows of
   DOT_MAX_RANK. There is always at least one axis afterwards. */
static int dot__collapse(int rank, int64_t *shape, int64_t (*strides)[DOT_MAX_RANK], int arrays)
{
    int kept = 0;
    for (int i = 0; i < rank; ++i) {
        if (shape[i] == 1) continue;
        bool joins = kept > 0;
        for (int a = 0; a < arrays && joins; ++a) joins = strides[a][kept - 1] == strides[a][i] * shape[i];
        if (joins) {
            shape[kept - 1] *= shape[i];
            for (int a = 0; a < arrays; ++a) strides[a][kept - 1] = strides[a][i];
        } else {
            shape[kept] = shape[i];
            for (int a = 0; a < arrays; ++a) strides[a][kept] = strides[a][i];
            kept++;
        }
    }
    if (kept == 0) {
        shape[0] = 1;
        for (int a = 0; a < arrays; ++a) strides[a][0] = 1;
        kept = 1;
    }
    return kept;
}

/* An elementwise walk over strided arrays: rows along the last axis, cut into pieces. */
typedef struct dot__walk {
    int rank;
    int64_t shape[DOT_MAX_RANK], stride[3][DOT_MAX_RANK];
    int64_t rows, length;           /* of the rows */
    int64_t per_piece, pieces;      /* rows a piece when rows are short; else a row has `cuts` pieces */
    int64_t cuts;
} dot__walk;

static void dot__walk_init(dot__walk *w, int rank, const int64_t *shape, const int64_t *s0, const int64_t *s1, const int64_t *s2)
{
    const int64_t *strides[3] = { s0, s1, s2 };
    for (int i = 0; i < rank; ++i) {
        w->shape[i] = shape[i];
        for (int a = 0; a < 3; ++a) w->stride[a][i] = strides[a][i];
    }
    w->rank = dot__collapse(rank, w->shape, w->stride, 3);
    w->length = w->shape[w->rank - 1];
    w->rows = 1;
    for (int i = 0; i + 1 < w->rank; ++i) w->rows *= w->shape[i];
    w->cuts = dot__max(1, dot__ceil_div(w->length, DOT__PIECE));
    w->per_piece = w->cuts > 1 ? 1 : dot__max(1, DOT__PIECE / dot__max(1, w->length));
    w->pieces = w->length == 0 ? 0 : w->cuts > 1 ? w->rows * w->cuts : dot__ceil_div(w->rows, w->per_piece);
}

/* The rows of a piece are [first, last), and the part of each row [begin, begin + n). */
static void dot__walk_piece(const dot__walk *w, int64_t piece, int64_t *first, int64_t *last, int64_t *begin, int64_t *n)
{
    if (w->cuts > 1) {
        *first = piece / w->cuts;
        *last = *first + 1;
        *begin = dot__part(w->length, piece % w->cuts, DOT__PIECE, n);
    } else {
        *first = piece * w->per_piece;
        *last = dot__min(w->rows, *first + w->per_piece);
        *begin = 0;
        *n = w->length;
    }
}

static void dot__walk_offsets(const dot__walk *w, int64_t row, int64_t offset[3])
{
    offset[0] = offset[1] = offset[2] = 0;
    for (int i = w->rank - 2; i >= 0; --i) {
        int64_t at = row % w->shape[i];
        row /= w->shape[i];
        for (int a = 0; a < 3; ++a) offset[a] += at * w->stride[a][i];
    }
}

static void dot__contiguous_strides(int rank, const int64_t *shape, int64_t *stride)
{
    int64_t s = 1;
    for (int i = rank - 1; i >= 0; --i) { stride[i] = s; s *= shape[i]; }
}

typedef struct dot__walk_job { dot__walk walk; void *job; bool backward; } dot__walk_job;

#define DOT__ZIP_PIECE(T, S) \
static void dot__zip_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__walk_job *walk = (dot__walk_job *)argument; \
    const dot__walk *w = &walk->walk; \
    dot__zip *job = (dot__zip *)walk->job; \
    int64_t first, last, begin, n, o[3], sa = w->stride[0][w->rank - 1], sb = w->stride[1][w->rank - 1]; \
    dot__walk_piece(w, piece, &first, &last, &begin, &n); \
    for (int64_t row = first; row < last; ++row) { \
        dot__walk_offsets(w, row, o); \
        const T *a = (T *)dot__lane(job->a, lane) + o[0] + begin * sa, *b = (T *)dot__lane(job->b, lane) + o[1] + begin * sb; \
        T *z = (T *)dot__lane(job->z, lane) + o[2] + begin; \
        if (walk->backward) dot__zips_##S[job->op].backward(a, sa, b, sb, z, (T *)dot__lane(job->out, lane) + o[2] + begin, n, \
                                                            job->second); \
        else dot__zips_##S[job->op].forward(a, sa, b, sb, z, n); \
    } \
}
DOT__ZIP_PIECE(float, f32)
DOT__ZIP_PIECE(double, f64)

static void dot__run_zip(dot_context *ctx, dot__zip *job, bool backward)
{
    dot__walk_job walk;
    int64_t contiguous[DOT_MAX_RANK];
    dot__contiguous_strides(job->rank, job->shape, contiguous);
    dot__walk_init(&walk.walk, job->rank, job->shape, job->a_stride, job->b_stride, contiguous);
    walk.job = job;
    walk.backward = backward;
    dot__parallel(ctx, job->laned, walk.walk.pieces, job->dtype == DOT_F32 ? dot__zip_piece_f32 : dot__zip_piece_f64, &walk);
}

static void dot__cpu_zip(dot_context *ctx, dot__zip *job) { dot__run_zip(ctx, job, false); }
static void dot__cpu_zip_backward(dot_context *ctx, dot__zip *job) { dot__run_zip(ctx, job, true); }

#define DOT__COPY_PIECE(T, S) \
static void dot__copy_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__walk_job *walk = (dot__walk_job *)argument; \
    const dot__walk *w = &walk->walk; \
    dot__copy *job = (dot__copy *)walk->job; \
    T scale = (T)job->scale; \
    int64_t first, last, begin, n, o[3], st = w->stride[0][w->rank - 1], sf = w->stride[1][w->rank - 1]; \
    dot__walk_piece(w, piece, &first, &last, &begin, &n); \
    for (int64_t row = first; row < last; ++row) { \
        dot__walk_offsets(w, row, o); \
        T *to = (T *)dot__lane(job->to, lane) + o[0] + begin * st; \
        const T *from = (T *)dot__lane(job->from, lane) + o[1] + begin * sf; \
        if (job->accumulate) for (int64_t i = 0; i < n; ++i) to[i * st] += scale * from[i * sf]; \
        else if (st == 1 && sf == 1 && scale == (T)1) memcpy(to, from, (size_t)n * sizeof(T)); \
        else for (int64_t i = 0; i < n; ++i) to[i * st] = scale * from[i * sf]; \
    } \
}
DOT__COPY_PIECE(float, f32)
DOT__COPY_PIECE(double, f64)

static void dot__cpu_copy(dot_context *ctx, dot__copy *job)
{
    dot__walk_job walk;
    dot__walk_init(&walk.walk, job->rank, job->shape, job->to_stride, job->from_stride, job->from_stride);
    walk.job = job;
    dot__parallel(ctx, job->laned, walk.walk.pieces, job->dtype == DOT_F32 ? dot__copy_piece_f32 : dot__copy_piece_f64, &walk);
}

/* ---- elementwise jobs of one argument ---- */

static void dot__map_piece(void *argument, int lane, int64_t piece)
{
    dot__map *job = (dot__map *)argument;
    int64_t n, i = dot__part(job->n, piece, DOT__PIECE, &n) * (int64_t)dot_dtype_size(job->dtype);
    job->kernel->maps[job->op].forward((char *)dot__lane(job->x, lane) + i, (char *)dot__lane(job->y, lane) + i, n, job->p, job->q);
}

static void dot__map_back_piece(void *argument, int lane, int64_t piece)
{
    dot__map *job = (dot__map *)argument;
    int64_t n, i = dot__part(job->n, piece, DOT__PIECE, &n) * (int64_t)dot_dtype_size(job->dtype);
    job->kernel->maps[job->op].backward((char *)dot__lane(job->x, lane) + i, (char *)dot__lane(job->y, lane) + i, (char *)dot__lane(job->dy, lane) + i,
                                        (char *)dot__lane(job->dx, lane) + i, n, job->p, job->q, job->accumulate);
}

static void dot__cpu_map(dot_context *ctx, dot__map *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, dot__ceil_div(job->n, DOT__PIECE), dot__map_piece, job);
}

static void dot__cpu_map_backward(dot_context *ctx, dot__map *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, dot__ceil_div(job->n, DOT__PIECE), dot__map_back_piece, job);
}

/* ---- reductions: in double, in an order that the shape alone decides ----
   The reduced elements of every output are cut into `parts` of fixed size; the second pass adds the parts up in order. */

typedef struct dot__reduce_plan {
    dot__reduce *job;
    const dot__kernels *kernel;
    int kept, reduced;                          /* collapsed axes: the kept ones, and the reduced ones */
    int64_t kept_shape[DOT_MAX_RANK], kept_stride[DOT_MAX_RANK];
    int64_t reduced_shape[DOT_MAX_RANK], reduced_stride[DOT_MAX_RANK];
    int64_t outputs, terms;                     /* elements of the result; summands of each */
    int64_t width;                              /* outputs that lie side by side in memory, done together */
    int64_t blocks;                             /* of up to DOT__REDUCE_WIDTH outputs within a run of `width`, all runs */
    int64_t parts, part_terms;
    double *partial;                            /* [lane][part][output] */
} dot__reduce_plan;

#define DOT__REDUCE_WIDTH 64

static void dot__reduce_planning(dot_context *ctx, dot__reduce_plan *plan, dot__reduce *job)
{
    memset(plan, 0, sizeof *plan);
    plan->job = job;
    plan->kernel = dot__kernel(ctx, job->dtype);
    int64_t stride[DOT_MAX_RANK];
    int64_t ks[1][DOT_MAX_RANK], rs[1][DOT_MAX_RANK];
    dot__contiguous_strides(job->rank, job->shape, stride);
    plan->outputs = plan->terms = 1;
    for (int i = 0; i < job->rank; ++i) {
        bool out = (job->axes >> i & 1u) != 0;
        int *count = out ? &plan->reduced : &plan->kept;
        (out ? plan->reduced_shape : plan->kept_shape)[*count] = job->shape[i];
        (out ? rs : ks)[0][*count] = stride[i];
        *(out ? &plan->terms : &plan->outputs) *= job->shape[i];
        ++*count;
    }
    plan->kept = dot__collapse(plan->kept, plan->kept_shape, ks, 1);
    plan->reduced = dot__collapse(plan->reduced, plan->reduced_shape, rs, 1);
    memcpy(plan->kept_stride, ks[0], sizeof ks[0]);
    memcpy(plan->reduced_stride, rs[0], sizeof rs[0]);
    plan->width = plan->kept_stride[plan->kept - 1] == 1 ? plan->kept_shape[plan->kept - 1] : 1;
    plan->blocks = plan->width > 0 ? plan->outputs / plan->width * dot__ceil_div(plan->width, DOT__REDUCE_WIDTH) : 0;
    int64_t work = plan->terms * dot__min(plan->outputs, 1024);
    plan->parts = plan->outputs > 65536 ? 1 : dot__min(64, dot__max(1, work / 32768));
    plan->part_terms = dot__max(1, dot__ceil_div(plan->terms, plan->parts));
    plan->parts = dot__max(1, dot__ceil_div(plan->terms, plan->part_terms));
}

DOT__INLINE double dot__combine(dot__reduction op, double a, double b)
{
    if (op == DOT__SUM) return a + b;
    if (a != a) return a;
    if (op == DOT__MAX) return b > a || b != b ? b : a;
    return b < a || b != b ? b : a;
}

/* One piece: a block of outputs side by side, and one part of their terms. */
#define DOT__REDUCE_PIECE(T, S) \
static void dot__reduce_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__reduce_plan *plan = (dot__reduce_plan *)argument; \
    dot__reduction op = plan->job->op; \
    int64_t per_run = dot__ceil_div(plan->width, DOT__REDUCE_WIDTH), block = piece % plan->blocks, part = piece / plan->blocks; \
    int64_t first = block / per_run * plan->width + block % per_run * DOT__REDUCE_WIDTH; \
    int64_t n = dot__min(DOT__REDUCE_WIDTH, plan->width - block % per_run * DOT__REDUCE_WIDTH); \
    int64_t rest = first, base = 0; \
    for (int i = plan->kept - 1; i >= 0; --i) { \
        base += rest % plan->kept_shape[i] * plan->kept_stride[i]; \
        rest /= plan->kept_shape[i]; \
    } \
    const T *x = (T *)dot__lane(plan->job->x, lane) + base; \
    double sum[DOT__REDUCE_WIDTH]; \
    for (int64_t j = 0; j < n; ++j) sum[j] = op == DOT__SUM ? 0 : op == DOT__MAX ? -(double)INFINITY : (double)INFINITY; \
    int64_t term = part * plan->part_terms, end = dot__min(plan->terms, term + plan->part_terms); \
    int last = plan->reduced - 1; \
    int64_t run = plan->reduced_shape[last], step = plan->reduced_stride[last]; \
    while (term < end) { \
        int64_t offset = 0; \
        rest = term; \
        for (int i = last; i >= 0; --i) { \
            offset += rest % plan->reduced_shape[i] * plan->reduced_stride[i]; \
            rest /= plan->reduced_shape[i]; \
        } \
        int64_t terms = dot__min(end - term, run - term % run); \
        const T *row = x + offset; \
        if (n == 1 && op == DOT__SUM) sum[0] += dot__strided_sum_##S(row, terms, step); \
        else if (op == DOT__SUM) plan->kernel->sum_rows(row, terms, step, sum, n); \
        else for (int64_t i = 0; i < terms; ++i, row += step) \
            for (int64_t j = 0; j < n; ++j) sum[j] = dot__combine(op, sum[j], (double)row[j]); \
        term += terms; \
    } \
    memcpy(plan->partial + (lane * plan->parts + part) * plan->outputs + first, sum, (size_t)n * sizeof(double)); \
} \
static void dot__reduce_finish_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__reduce_plan *plan = (dot__reduce_plan *)argument; \
    dot__reduce *job = plan->job; \
    int64_t n, begin = dot__part(plan->outputs, piece, DOT__CHUNK, &n); \
    T *out = (T *)dot__lane(job->out, lane) + begin; \
    const double *partial = plan->partial + lane * plan->parts * plan->outputs + begin; \
    for (int64_t j = 0; j < n; ++j) { \
        double value = partial[j]; \
        for (int64_t p = 1; p < plan->parts; ++p) value = dot__combine(job->op, value, partial[p * plan->outputs + j]); \
        out[j] = (T)(value * job->scale + (job->accumulate ? (double)out[j] : 0.0)); \
    } \
}
#define DOT__STRIDED_SUM(T, S) \
static double dot__strided_sum_##S(const T *x, int64_t n, int64_t step) \
{ \
    double a = 0, b = 0, c = 0, d = 0; \
    int64_t i = 0; \
    for (; i + 4 <= n; i += 4, x += 4 * step) { \
        a += (double)x[0]; b += (double)x[step]; c += (double)x[2 * step]; d += (double)x[3 * step]; \
    } \
    for (; i < n; ++i, x += step) a += (double)x[0]; \
    return (a + b) + (c + d); \
}
DOT__STRIDED_SUM(float, f32)
DOT__STRIDED_SUM(double, f64)
DOT__REDUCE_PIECE(float, f32)
DOT__REDUCE_PIECE(double, f64)

static bool dot__cpu_reduce(dot_context *ctx, dot__reduce *job)
{
    dot__reduce_plan plan;
    dot__reduce_planning(ctx, &plan, job);
    if (plan.outputs == 0) return true;
    dot__mark mark = dot__scratch_begin(ctx);
    size_t lanes = job->laned ? (size_t)ctx->lanes : 1;
    plan.partial = (double *)dot__step_alloc(ctx, lanes * (size_t)(plan.parts * plan.outputs) * sizeof(double));
    if (!plan.partial) return false;
    bool f32 = job->dtype == DOT_F32;
    dot__parallel(ctx, job->laned, plan.blocks * plan.parts, f32 ? dot__reduce_piece_f32 : dot__reduce_piece_f64, &plan);
    dot__parallel(ctx, job->laned, dot__ceil_div(plan.outputs, DOT__CHUNK), f32 ? dot__reduce_finish_f32 : dot__reduce_finish_f64,
                  &plan);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- the matrix product: addressing ---- */

static const double dot__zeros[DOT__DEPTH + DOT__MAX_COLUMNS] = { 0 };     /* the row that padding reads, at least a tap long */

static int64_t dot__positions(const dot__rows *r) { return r->axis[0].count * r->axis[1].count * r->axis[2].count; }
static int dot__tap_count(const dot__rows *r) { return r->axis[0].taps * r->axis[1].taps * r->axis[2].taps; }

typedef struct dot__position { int64_t image, at[3]; } dot__position;

static dot__position dot__position_of(const dot__rows *r, int64_t row)
{
    dot__position p;
    for (int i = 2; i >= 0; --i) {
        p.at[i] = row % r->axis[i].count;
        row /= r->axis[i].count;
    }
    p.image = row;
    return p;
}

static void dot__position_next(const dot__rows *r, dot__position *p)
{
    for (int i = 2; i >= 0; --i) {
        if (++p->at[i] < r->axis[i].count) return;
        p->at[i] = 0;
    }
    p->image++;
}

/* Rows that differ only in their position along the last axis are a run: what the other two axes give is the same for all. */
DOT__INLINE int64_t dot__run(const dot__rows *r, const dot__position *p, int64_t most)
{
    return dot__min(most, r->axis[2].count - p->at[2]);
}

/* n rows on, within a run or to its end. */
DOT__INLINE void dot__advance(const dot__rows *r, dot__position *p, int64_t n)
{
    p->at[2] += n - 1;
    dot__position_next(r, p);
}

/* What a tap reads in a run: row i reads elements from `line + z[i * step]` of the array on; it is padding where `outside` or
   z[i * step] < 0. */
typedef struct dot__tap_run { bool outside; int64_t line; const int32_t *z; int step; } dot__tap_run;

DOT__INLINE dot__tap_run dot__tap_of(const dot__rows *r, const dot__position *p, int tap)
{
    const dot__axis *x = &r->axis[0], *y = &r->axis[1], *z = &r->axis[2];
    int k = tap % z->taps, j = tap / z->taps % y->taps, i = tap / z->taps / y->taps;
    int32_t fx = x->from[p->at[0] * x->taps + i], fy = y->from[p->at[1] * y->taps + j];
    dot__tap_run t;
    t.outside = (fx | fy) < 0;
    t.line = p->image * r->from_image + fx + fy;
    t.z = z->from + p->at[2] * z->taps + k;
    t.step = z->taps;
    return t;
}

/* Whether row i simply is image i. */
DOT__INLINE bool dot__is_matrix(const dot__rows *r)
{
    for (int i = 0; i < 3; ++i)
        if (r->axis[i].count != 1 || r->axis[i].taps != 1 || r->axis[i].from[0] != 0) return false;
    return true;
}

/* Copies the patches of rows where a tap is too short to be worth a pointer: to[row][tap][k]. Whole lines of a patch are copied
   four elements at a time; what is too much is overwritten by the next line, or lies in the slack of `to`. */
#define DOT__PATCH_STEP 4           /* reads up to 3 elements beyond A: its slack */
#define DOT__PATCH_LINES 320        /* at most: a patch has no more elements than DOT__DEPTH */
#define DOT__PATCHES(T, S) \
static void dot__patches_##S(const dot__rows *r, dot__position at, int64_t rows, int64_t depth, const void *from, void *patches) \
{ \
    const dot__axis *x = &r->axis[0], *y = &r->axis[1], *z = &r->axis[2]; \
    int64_t length = z->taps * depth, lines = (int64_t)x->taps * y->taps, n; \
    T *to = (T *)patches; \
    for (; rows > 0; rows -= n, dot__advance(r, &at, n)) { \
        const int32_t *fx = x->from + at.at[0] * x->taps, *fy = y->from + at.at[1] * y->taps, *fz = z->from + at.at[2] * z->taps; \
        const T *a = (const T *)from + at.image * r->from_image; \
        int64_t base[DOT__PATCH_LINES];     /* of the lines that a patch of this run has; -1: padding */ \
        n = dot__run(r, &at, rows); \
        for (int i = 0, line = 0; i < x->taps; ++i) \
            for (int j = 0; j < y->taps; ++j) base[line++] = (fx[i] | fy[j]) < 0 ? -1 : (int64_t)fx[i] + fy[j]; \
        for (int64_t i = 0; i < n; ++i, fz += z->taps) { \
            bool whole = fz[0] >= 0 && fz[z->taps - 1] - fz[0] == length - depth; \
            for (int64_t line = 0; line < lines; ++line, to += length) { \
                const T *source = a + dot__max(base[line], 0); \
                if (base[line] < 0) for (int64_t c = 0; c < length; ++c) to[c] = (T)0; \
                else if (whole) \
                    for (int64_t c = 0; c < length; c += DOT__PATCH_STEP) memcpy(to + c, source + fz[0] + c, DOT__PATCH_STEP * sizeof(T)); \
                else for (int k = 0; k < z->taps; ++k) \
                    for (int64_t c = 0; c < depth; ++c) to[k * depth + c] = fz[k] < 0 ? (T)0 : source[fz[k] + c]; \
            } \
        } \
    } \
}
DOT__PATCHES(float, f32)
DOT__PATCHES(double, f64)

typedef struct dot__gemm_plan {
    dot__gemm *job;
    const dot__kernels *kernel;
    int64_t rows, panels, row_piece, row_pieces, panels_a_piece, column_pieces;
    int taps;                       /* as the micro-kernel sees them */
    int64_t depth;                  /* per tap */
    bool patches;                   /* taps are short: rows are copied, and make one long tap */
    bool narrow;                    /* few columns: dot products instead of tiles */
    int groups_of_taps, taps_a_group, depth_parts;     /* one call of a tile: some taps, or a part of one tap's k's */
    int64_t depth_part;
    char *packed, *bias;            /* [lane][batch][panel][tap][k][column]; [lane][batch][panel][column] */
    size_t packed_lane, bias_lane;  /* bytes */
} dot__gemm_plan;

#define DOT__NARROW 4               /* most columns of the dot-product form */

/* Element offset of a tap by the tables `tap`. */
static int64_t dot__tap_offset(const dot__rows *r, int tap)
{
    int k = tap % r->axis[2].taps, j = tap / r->axis[2].taps % r->axis[1].taps, i = tap / r->axis[2].taps / r->axis[1].taps;
    return (int64_t)r->axis[0].tap[i] + r->axis[1].tap[j] + r->axis[2].tap[k];
}

#define DOT__PACK_ROWS 16           /* k's packed together: a cache line of each column, where B is transposed */
#define DOT__PACK(T, S) \
static void dot__pack_panel_##S(const T *b, int64_t b_row, int64_t b_column, int64_t depth, int64_t n, int64_t width, T *to) \
{                                       /* [k][column], n columns of them and then zeros */ \
    for (int64_t k = 0, left; k < depth; k += DOT__PACK_ROWS, to += left * width) { \
        left = dot__min(DOT__PACK_ROWS, depth - k); \
        if (b_column == 1 && n == width) \
            for (int64_t i = 0; i < left; ++i) memcpy(to + i * width, b + (k + i) * b_row, (size_t)width * sizeof(T)); \
        else \
            for (int64_t j = 0; j < width; ++j) { \
                const T *column = b + k * b_row + dot__min(j, n - 1) * b_column; \
                T *element = to + j; \
                if (j < n) for (int64_t i = 0; i < left; ++i) element[i * width] = column[i * b_row]; \
                else for (int64_t i = 0; i < left; ++i) element[i * width] = (T)0; \
            } \
    } \
} \
static void dot__pack_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__gemm_plan *plan = (dot__gemm_plan *)argument; \
    dot__gemm *job = plan->job; \
    int64_t batch = piece / plan->panels, panel = piece % plan->panels, depth = job->depth, width = plan->kernel->columns; \
    int taps = dot__tap_count(&job->rows), n = (int)dot__min(width, job->columns - panel * width); \
    T *to = (T *)(void *)(plan->packed + (size_t)lane * plan->packed_lane) + piece * taps * depth * width; \
    const T *from = (T *)dot__lane(job->b, lane) + batch * job->b_batch + panel * width * job->b_column; \
    for (int tap = 0; tap < taps; ++tap) { \
        const T *b = from + dot__tap_offset(&job->rows, tap); \
        if (!plan->narrow) dot__pack_panel_##S(b, job->b_row, job->b_column, depth, n, width, to + tap * depth * width); \
        else for (int j = 0; j < n; ++j)        /* [column][tap][k] */ \
            for (int64_t k = 0; k < depth; ++k) to[(j * taps + tap) * depth + k] = b[k * job->b_row + j * job->b_column]; \
    } \
    if (job->bias.data) { \
        T *bias = (T *)(void *)(plan->bias + (size_t)lane * plan->bias_lane) + piece * width; \
        const T *source = (T *)dot__lane(job->bias, lane) + batch * job->columns + panel * width; \
        for (int j = 0; j < width; ++j) bias[j] = j < n ? source[j] : (T)0; \
    } \
}
DOT__PACK(float, f32)
DOT__PACK(double, f64)

static void dot__gemm_planning(dot_context *ctx, dot__gemm_plan *plan, dot__gemm *job)
{
    memset(plan, 0, sizeof *plan);
    plan->job = job;
    plan->kernel = dot__kernel_for(ctx, job->dtype, job->columns);
    plan->rows = job->rows.images * dot__positions(&job->rows);
    plan->panels = dot__ceil_div(job->columns, plan->kernel->columns);
    plan->taps = dot__tap_count(&job->rows);
    plan->depth = job->depth;
    plan->patches = plan->taps > 1 && plan->depth < 8 && plan->taps * plan->depth <= DOT__DEPTH;
    plan->narrow = job->columns <= DOT__NARROW && plan->depth >= 8 && job->columns * (plan->kernel->dot_start + plan->depth / 6) < plan->depth;
    if (plan->patches) { plan->depth *= plan->taps; plan->taps = 1; }
    /* Blocks of about DOT__DEPTH k's: whole taps together, or one tap in parts; always at least one, for the bias. */
    plan->taps_a_group = (int)dot__max(1, dot__min(DOT__TAPS, DOT__DEPTH / dot__max(1, plan->depth)));
    plan->groups_of_taps = (int)dot__max(1, dot__ceil_div(plan->taps, plan->taps_a_group));
    plan->taps_a_group = (int)dot__ceil_div(plan->taps, plan->groups_of_taps);
    plan->depth_parts = (int)dot__max(1, dot__ceil_div(plan->depth, DOT__DEPTH));
    plan->depth_part = dot__round_up(dot__ceil_div(plan->depth, plan->depth_parts), 8);
    /* Pieces of about a million multiplications, and at least a dozen of them if the shape allows. */
    int64_t k = dot__max(1, plan->taps * plan->depth), width = dot__max(1, dot__min(plan->panels, 128 / plan->kernel->columns));
    plan->row_piece = dot__max(48, ((int64_t)1 << 20) / (k * width * plan->kernel->columns));
    plan->row_piece = dot__round_up(dot__min(plan->row_piece, 4096), plan->kernel->rows);
    plan->row_pieces = dot__ceil_div(plan->rows, plan->row_piece);
    plan->row_piece = dot__round_up(dot__ceil_div(plan->rows, dot__max(1, plan->row_pieces)), plan->kernel->rows);
    while (width > 1 && plan->row_pieces * dot__ceil_div(plan->panels, width) * job->batch < 12) width = (width + 1) / 2;
    plan->panels_a_piece = width;
    plan->column_pieces = dot__ceil_div(plan->panels, width);
}

/* The pointers of a block of rows: a[tile][tap][row of the tile], and c[row]. Rows beyond the end repeat the first of their tile:
   reading them is harmless. */
typedef struct dot__row_block {
    const void *a[DOT__TAPS * DOT__ROW_BLOCK];
    void *c[DOT__ROW_BLOCK];
} dot__row_block;

/* One block of rows and of k's, all panels of the piece: panel by panel, so that a panel stays in L1. */
static void dot__gemm_block(const dot__gemm_plan *plan, dot__row_block *block, int64_t rows, int taps, int64_t depth, const char *panel0,
                            size_t panel_bytes, int64_t panels, int64_t first_panel, const char *bias, bool accumulate, bool relu)
{
    size_t element = dot_dtype_size(plan->job->dtype);
    int height = plan->kernel->rows, width = plan->kernel->columns;
    dot__tile tile;
    tile.taps = taps;
    tile.depth = depth;
    tile.b_tap = plan->depth * width;
    tile.accumulate = accumulate;
    tile.relu = relu;
    for (int64_t j = 0; j < panels; ++j) {
        int64_t column = (first_panel + j) * width;
        tile.columns = (int)dot__min(width, plan->job->columns - column);
        tile.b = panel0 + (size_t)j * panel_bytes;
        tile.bias = bias ? bias + (size_t)(j * width) * element : NULL;
        for (int64_t i = 0; i < rows; i += height) {
            void *c[DOT__MAX_ROWS];
            tile.rows = (int)dot__min(height, rows - i);
            for (int r = 0; r < tile.rows; ++r) c[r] = (char *)block->c[i + r] + (size_t)column * element;
            tile.c = c;
            tile.a = block->a + i * taps;
            plan->kernel->tile(&tile);
        }
    }
}

/* Fills in block->a for the taps [first, first + taps) and the k's from k0. */
static void dot__gemm_pointers(const dot__gemm_plan *plan, dot__row_block *block, const char *a, dot__position at, int64_t rows,
                               int first, int taps, int64_t k0)
{
    const dot__rows *r = &plan->job->rows;
    size_t element = dot_dtype_size(plan->job->dtype);
    int height = plan->kernel->rows;
    a += (size_t)k0 * element;
    if (dot__is_matrix(r))
        for (int64_t i = 0; i < rows; ++i) block->a[i] = a + (size_t)((at.image + i) * r->from_image) * element;
    else for (int64_t row = 0, n; row < rows; row += n, dot__advance(r, &at, n)) {
        n = dot__run(r, &at, rows - row);
        for (int tap = 0; tap < taps; ++tap) {
            dot__tap_run t = dot__tap_of(r, &at, first + tap);
            const void **slot = block->a + (row - row % height) * taps + tap * height + row % height;
            int64_t left = height - row % height;
            for (int64_t i = 0; i < n; ++i, t.z += t.step) {
                *slot++ = t.outside || *t.z < 0 ? (const void *)dot__zeros : (const void *)(a + (size_t)(t.line + *t.z) * element);
                if (--left == 0) { slot += height * (taps - 1); left = height; }
            }
        }
    }
    const void **last = block->a + (rows - rows % height) * taps;
    for (int64_t i = rows % height; i % height != 0; ++i)
        for (int tap = 0; tap < taps; ++tap) last[tap * height + i] = last[tap * height];
}

/* Where the rows of C are. */
static void dot__gemm_targets(const dot__rows *r, dot__position at, int64_t rows, char *c, size_t element, void **to)
{
    for (int64_t n; rows > 0; rows -= n, dot__advance(r, &at, n)) {
        n = dot__run(r, &at, rows);
        char *line = c + (size_t)(at.image * r->to_image + r->axis[0].to[at.at[0]] + r->axis[1].to[at.at[1]]) * element;
        for (int64_t i = 0; i < n; ++i) *to++ = line + (size_t)r->axis[2].to[at.at[2] + i] * element;
    }
}

static void dot__activate(const dot__kernels *kernel, dot_activation activation, void *c, int64_t n)
{
    static const dot__unary op[] = { DOT__UNARIES, DOT__RELU, DOT__SIGMOID, DOT__TANH_ };
    kernel->maps[op[activation]].forward(c, c, n, 0, 0);
}

/* One row of a product of few columns: C[row][column] as dot products. */
#define DOT__NARROW_ROW(T, S) \
static void dot__narrow_row_##S(const dot__gemm_plan *plan, const dot__position *at, const void *from, const void *weight, \
                                const void *start, void *to) \
{ \
    const T *a = (const T *)from, *b = (const T *)weight, *bias = (const T *)start; \
    T *c = (T *)to, sum[DOT__NARROW]; \
    int n = (int)plan->job->columns; \
    for (int j = 0; j < n; ++j) sum[j] = bias ? bias[j] : (T)0; \
    for (int tap = 0; tap < plan->taps; ++tap) { \
        dot__tap_run t = dot__tap_of(&plan->job->rows, at, tap); \
        if (t.outside || *t.z < 0) continue; \
        for (int j = 0; j < n; ++j) \
            sum[j] += (T)plan->kernel->dot(a + t.line + *t.z, b + (j * plan->taps + tap) * plan->depth, plan->depth); \
    } \
    for (int j = 0; j < n; ++j) c[j] = plan->job->accumulate ? c[j] + sum[j] : sum[j]; \
    if (plan->job->activation != DOT_NONE) dot__activate(plan->kernel, plan->job->activation, c, n); \
}
DOT__NARROW_ROW(float, f32)
DOT__NARROW_ROW(double, f64)

/* A piece: some rows and some panels of one product of the batch. */
static void dot__gemm_piece(void *argument, int lane, int64_t piece)
{
    const dot__gemm_plan *plan = (const dot__gemm_plan *)argument;
    const dot__gemm *job = plan->job;
    size_t element = dot_dtype_size(job->dtype);
    int64_t column = piece % plan->column_pieces, row = piece / plan->column_pieces % plan->row_pieces;
    int64_t batch = piece / plan->column_pieces / plan->row_pieces, height = plan->kernel->rows, width = plan->kernel->columns;
    int64_t first_panel = column * plan->panels_a_piece, panels = dot__min(plan->panels_a_piece, plan->panels - first_panel);
    int64_t first = row * plan->row_piece, last = dot__min(plan->rows, first + plan->row_piece);
    int64_t columns = dot__min(panels * width, job->columns - first_panel * width);
    int64_t panel_elements = plan->taps * plan->depth * width, panel0 = batch * plan->panels + first_panel;
    const char *a = (const char *)dot__lane(job->a, lane) + (size_t)(batch * job->a_batch) * element;
    char *c = (char *)dot__lane(job->c, lane) + (size_t)(batch * job->c_batch) * element;
    const char *b = plan->packed + (size_t)lane * plan->packed_lane + (size_t)(panel0 * panel_elements) * element;
    const char *bias = job->bias.data ? plan->bias + (size_t)lane * plan->bias_lane + (size_t)(panel0 * width) * element : NULL;
    bool relu = job->activation == DOT_RELU;
    dot__row_block block;
    double patches[DOT__MAX_ROWS * 4 * DOT__DEPTH + DOT__PATCH_STEP];
    int64_t step = plan->patches ? height * 4 : DOT__ROW_BLOCK;
    for (int64_t r = first; r < last; r += step) {
        int64_t rows = dot__min(step, last - r);
        dot__position at = dot__position_of(&job->rows, r);
        dot__gemm_targets(&job->rows, at, rows, c, element, block.c);
        if (plan->narrow) {
            for (int64_t i = 0; i < rows; ++i, dot__advance(&job->rows, &at, 1))
                DOT__CALL(job->dtype, dot__narrow_row, (plan, &at, a, b, bias, block.c[i]));
            continue;
        }
        if (plan->patches) {
            DOT__CALL(job->dtype, dot__patches, (&job->rows, at, rows, job->depth, a, patches));
            for (int64_t i = 0; i < dot__round_up(rows, height); ++i)
                block.a[i] = (char *)patches + (size_t)((i < rows ? i : i - i % height) * plan->depth) * element;
        }
        for (int group = 0; group < plan->groups_of_taps; ++group) {
            int tap = group * plan->taps_a_group, taps = (int)dot__min(plan->taps_a_group, plan->taps - tap);
            for (int part = 0; part < plan->depth_parts; ++part) {
                int64_t k = part * plan->depth_part, depth = dot__min(plan->depth_part, plan->depth - k);
                bool initial = group == 0 && part == 0, final = group == plan->groups_of_taps - 1 && part == plan->depth_parts - 1;
                if (!plan->patches) dot__gemm_pointers(plan, &block, a, at, rows, tap, taps, k);
                dot__gemm_block(plan, &block, rows, taps, depth, b + (size_t)((tap * plan->depth + k) * width) * element,
                                (size_t)panel_elements * element, panels, first_panel, initial ? bias : NULL,
                                job->accumulate || !initial, relu && final);
            }
        }
        for (int64_t i = 0; i < rows && job->activation != DOT_NONE && !relu; ++i)
            dot__activate(plan->kernel, job->activation, (char *)block.c[i] + (size_t)(first_panel * width) * element, columns);
    }
}

static bool dot__cpu_gemm(dot_context *ctx, dot__gemm *job)
{
    dot__gemm_plan plan;
    dot__gemm_planning(ctx, &plan, job);
    if (plan.rows == 0 || job->columns == 0 || job->batch == 0) return true;
    size_t element = dot_dtype_size(job->dtype), panels = (size_t)(plan.panels * job->batch), width = (size_t)plan.kernel->columns;
    int64_t lanes = job->laned ? ctx->lanes : 1;
    dot__mark mark = dot__scratch_begin(ctx);
    plan.packed_lane = panels * (size_t)(plan.taps * plan.depth) * width * element;
    plan.bias_lane = panels * width * element;
    plan.packed = (char *)dot__step_alloc(ctx, plan.packed_lane * (size_t)lanes);
    plan.bias = (char *)dot__step_alloc(ctx, plan.bias_lane * (size_t)lanes);
    if (!plan.packed || !plan.bias) return false;
    dot__parallel(ctx, job->laned, (int64_t)panels, job->dtype == DOT_F32 ? dot__pack_piece_f32 : dot__pack_piece_f64, &plan);
    dot__parallel(ctx, job->laned, job->batch * plan.row_pieces * plan.column_pieces, dot__gemm_piece, &plan);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- folding: products with all taps are added up where they belong ---- */

#define DOT__FOLD 8                 /* most channels */
#define DOT__FOLD_RUN 64            /* rows done together */

#define DOT__FOLD_PIECE(T, S) \
static void dot__fold_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__fold *job = (dot__fold *)argument; \
    const dot__rows *r = &job->rows; \
    int64_t left, first = dot__part(r->images * dot__positions(r), piece, DOT__CHUNK, &left), channels = job->channels; \
    int taps = dot__tap_count(r); \
    const T *a = (const T *)dot__lane(job->a, lane), *bias = job->bias.data ? (const T *)dot__lane(job->bias, lane) : NULL; \
    dot__position at = dot__position_of(r, first); \
    void *to[DOT__FOLD_RUN]; \
    T sum[DOT__FOLD_RUN * DOT__FOLD]; \
    for (int64_t n; left > 0; left -= n, dot__advance(r, &at, n)) { \
        n = dot__run(r, &at, dot__min(left, DOT__FOLD_RUN)); \
        dot__gemm_targets(r, at, n, (char *)dot__lane(job->c, lane), sizeof(T), to); \
        for (int64_t i = 0, c = 0; i < n * channels; ++i, c = c + 1 < channels ? c + 1 : 0) sum[i] = bias ? bias[c] : (T)0; \
        for (int tap = 0; tap < taps; ++tap) { \
            dot__tap_run t = dot__tap_of(r, &at, tap); \
            const T *from = a + t.line + dot__tap_offset(r, tap); \
            T *to_sum = sum; \
            for (int64_t i = 0; i < n && !t.outside; ++i, t.z += t.step, to_sum += channels) { \
                const T *term = from + dot__max(*t.z, 0); \
                for (int64_t c = 0; *t.z >= 0 && c < channels; ++c) to_sum[c] += term[c]; \
            } \
        } \
        int64_t whole = dot__round_up(n * channels, 16);            /* of vectors: short runs would be activated number by number */ \
        for (int64_t i = n * channels; i < whole; ++i) sum[i] = (T)0; \
        if (job->activation != DOT_NONE) dot__activate(job->kernel, job->activation, sum, whole); \
        for (int64_t i = 0; i < n; ++i) \
            for (int64_t c = 0; c < channels; ++c) { \
                T *out = (T *)to[i] + c; \
                *out = job->accumulate ? *out + sum[i * channels + c] : sum[i * channels + c]; \
            } \
    } \
}
DOT__FOLD_PIECE(float, f32)
DOT__FOLD_PIECE(double, f64)

static void dot__cpu_fold(dot_context *ctx, dot__fold *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, dot__ceil_div(job->rows.images * dot__positions(&job->rows), DOT__CHUNK),
                  job->dtype == DOT_F32 ? dot__fold_piece_f32 : dot__fold_piece_f64, job);
}

/* ---- the gradient of the weight: outer products summed over the rows ---- */

typedef struct dot__outer_plan {
    dot__outer *job;
    const dot__kernels *kernel;
    int64_t rows, taps, depth;
    bool patches;                   /* as in the matrix product */
    bool far_a, far_d;              /* rows of A, of D, are copied together before they are multiplied */
    int64_t parts, part_rows;       /* the rows are summed in this many parts, each into its own copy of W, added up in order */
    int64_t k_piece, k_pieces, column_piece, column_pieces, tap_pieces;
    size_t elements;                /* of W, all batches */
    char *partial;                  /* [lane][part][W], or NULL */
} dot__outer_plan;

#define DOT__OUTER_ROWS 96          /* rows whose pointers are made at a time */
#define DOT__OUTER_BYTES 1024       /* most of a row of A, and of D, in a piece */
#define DOT__OUTER_PATCH 64         /* most elements of a patch */
#define DOT__FAR 1024               /* bytes between rows, from which on they compete for the same few lines of L1 and are copied together */
#define DOT__COPY 16                /* bytes copied at a time: a little beyond the end, where nothing is yet, and nothing matters */

/* The rows of one block that a tap reaches: padding contributes nothing and is left out. */
static int64_t dot__outer_pointers(const dot__outer_plan *plan, dot__position at, int64_t rows, int tap, const char *a,
                                   void *const *d, const void **as, const void **ds)
{
    const dot__rows *r = &plan->job->rows;
    size_t element = dot_dtype_size(plan->job->dtype);
    int64_t count = 0;
    for (int64_t n; rows > 0; rows -= n, d += n, dot__advance(r, &at, n)) {
        dot__tap_run t = dot__tap_of(r, &at, tap);
        n = dot__run(r, &at, rows);
        for (int64_t i = 0; i < n && !t.outside; ++i, t.z += t.step) {
            if (*t.z < 0) continue;
            as[count] = a + (size_t)(t.line + *t.z) * element;
            ds[count++] = d[i];
        }
    }
    return count;
}

/* Copies so many bytes of each row to `to`, as panels of [row][panel] of a tile's height or width, and points to the first panel instead.
   Returns the bytes from one panel to the next. */
static int64_t dot__outer_collect(const void **rows, int64_t count, int64_t bytes, int64_t panel, char *to)
{
    int64_t step = count * panel + DOT__COPY;
    for (int64_t i = 0; i < count; ++i) {
        const char *from = (const char *)rows[i];
        char *row = to + i * panel;
        rows[i] = row;
        for (int64_t at = 0; at < bytes; at += panel, row += step)
            for (int64_t c = 0; c < panel; c += DOT__COPY) memcpy(row + c, from + at + c, DOT__COPY);
    }
    return step;
}

/* W, of `height` k's and `width` columns. a_step, d_step: elements from one panel to the next, or 0 where rows are whole. */
static void dot__outer_tiles(const dot__outer_plan *plan, dot__outer_tile *tile, char *w, int64_t height, int64_t width, int64_t a_step,
                             int64_t d_step)
{
    size_t element = dot_dtype_size(plan->job->dtype);
    const dot__kernels *kernel = plan->kernel;
    for (int64_t j = 0; j < width; j += kernel->columns)        /* these columns of D stay in L1 for all of A's */
        for (int64_t k = 0; k < height; k += kernel->outer_rows) {
            tile->a_at = a_step ? k / kernel->outer_rows * a_step : k;
            tile->d_at = d_step ? j / kernel->columns * d_step : j;
            tile->rows = (int)dot__min(kernel->outer_rows, height - k);
            tile->columns = (int)dot__min(kernel->columns, width - j);
            tile->w = w + (size_t)(k * plan->job->w_row + j) * element;
            kernel->outer(tile);
        }
}

static void dot__outer_piece(void *argument, int lane, int64_t piece)
{
    const dot__outer_plan *plan = (const dot__outer_plan *)argument;
    const dot__outer *job = plan->job;
    size_t element = dot_dtype_size(job->dtype);
    int64_t size = (int64_t)element, column = piece % plan->column_pieces * plan->column_piece;
    piece /= plan->column_pieces;
    int64_t k0 = piece % plan->k_pieces * plan->k_piece;
    piece /= plan->k_pieces;
    int tap0 = (int)(piece % plan->tap_pieces), tap1 = plan->tap_pieces == 1 ? (int)plan->taps : tap0 + 1;
    piece /= plan->tap_pieces;
    int64_t part = piece % plan->parts, batch = piece / plan->parts;
    int64_t width = dot__min(job->columns - column, plan->column_piece), height = dot__min(plan->depth - k0, plan->k_piece);
    const char *a = (const char *)dot__lane(job->a, lane) + (size_t)(batch * job->a_batch + (plan->patches ? 0 : k0)) * element;
    char *d = (char *)dot__lane(job->d, lane) + (size_t)(batch * job->d_batch + column) * element;
    char *w = plan->partial ? plan->partial + ((size_t)lane * (size_t)plan->parts + (size_t)part) * plan->elements * element
                            : (char *)dot__lane(job->w, lane);
    w += (size_t)(batch * job->w_batch + k0 * job->w_row + column) * element;
    const void *as[DOT__OUTER_ROWS], *ds[DOT__OUTER_ROWS];
    void *rows_of_d[DOT__OUTER_ROWS];
    double of_a[DOT__OUTER_ROWS * DOT__OUTER_BYTES / 8 + DOT__OUTER_BYTES], of_d[DOT__OUTER_ROWS * DOT__OUTER_BYTES / 8 + DOT__OUTER_BYTES];
    dot__outer_tile tile;
    tile.a = as;
    tile.w_row = job->w_row;
    int64_t first = part * plan->part_rows, last = dot__min(plan->rows, first + plan->part_rows);
    for (int64_t r = first; r < last || r == first; r += DOT__OUTER_ROWS) {       /* once even without rows: W becomes 0 */
        int64_t rows = dot__max(0, dot__min(DOT__OUTER_ROWS, last - r));
        dot__position at = dot__position_of(&job->rows, r);
        dot__gemm_targets(&job->rows, at, rows, d, element, rows_of_d);
        tile.accumulate = r > first || (job->accumulate && !plan->partial);
        tile.d = ds;
        if (plan->patches) {
            DOT__CALL(job->dtype, dot__patches, (&job->rows, at, rows, job->depth, a, of_a));
            for (int64_t i = 0; i < rows; ++i) {
                as[i] = (char *)of_a + (size_t)(i * plan->depth + k0) * element;
                ds[i] = rows_of_d[i];
            }
            tile.count = rows;
            dot__outer_tiles(plan, &tile, w, height, width, 0, 0);
        } else
            for (int tap = tap0; tap < tap1; ++tap) {
                tile.count = dot__outer_pointers(plan, at, rows, tap, a, rows_of_d, as, ds);
                int64_t a_step = !plan->far_a ? 0 : dot__outer_collect(as, tile.count, height * size, plan->kernel->outer_rows * size, (char *)of_a);
                int64_t d_step = !plan->far_d ? 0 : dot__outer_collect(ds, tile.count, width * size, plan->kernel->columns * size, (char *)of_d);
                dot__outer_tiles(plan, &tile, w + (size_t)dot__tap_offset(&job->rows, tap) * element, height, width, a_step / size, d_step / size);
            }
    }
}

#define DOT__OUTER_SUM(T, S) \
static void dot__outer_sum_##S(void *argument, int lane, int64_t piece) \
{ \
    const dot__outer_plan *plan = (const dot__outer_plan *)argument; \
    int64_t n, begin = dot__part((int64_t)plan->elements, piece, DOT__CHUNK, &n); \
    const T *from = (const T *)(void *)plan->partial + (size_t)lane * (size_t)plan->parts * plan->elements + begin; \
    T *w = (T *)dot__lane(plan->job->w, lane) + begin; \
    for (int64_t i = 0; i < n; ++i) { \
        T sum = from[i]; \
        for (int64_t p = 1; p < plan->parts; ++p) sum += from[(size_t)p * plan->elements + (size_t)i]; \
        w[i] = plan->job->accumulate ? w[i] + sum : sum; \
    } \
}
DOT__OUTER_SUM(float, f32)
DOT__OUTER_SUM(double, f64)

static void dot__outer_planning(dot_context *ctx, dot__outer_plan *plan, dot__outer *job)
{
    memset(plan, 0, sizeof *plan);
    plan->job = job;
    plan->kernel = dot__kernel_for(ctx, job->dtype, job->columns);
    plan->rows = job->rows.images * dot__positions(&job->rows);
    plan->taps = dot__tap_count(&job->rows);
    plan->depth = job->depth;
    plan->elements = (size_t)(plan->taps * job->depth * job->columns * job->batch);
    /* Patches need the taps one behind the other in W, which holds when there is one group. */
    plan->patches = plan->taps > 1 && plan->depth < 8 && plan->taps * plan->depth <= DOT__OUTER_PATCH && job->batch == 1;
    if (plan->patches) { plan->depth *= plan->taps; plan->taps = 1; }
    bool split_rows = plan->rows >= 1024 && plan->elements <= 65536;
    plan->parts = split_rows ? 8 : 1;
    plan->part_rows = dot__ceil_div(plan->rows, plan->parts);
    plan->tap_pieces = split_rows ? 1 : plan->taps;
    int64_t element = (int64_t)dot_dtype_size(job->dtype), most = DOT__OUTER_BYTES / element;
    plan->k_piece = dot__min(plan->depth, most / plan->kernel->outer_rows * plan->kernel->outer_rows);
    plan->column_piece = dot__min(job->columns, most);
    plan->far_a = job->depth * job->batch * element >= DOT__FAR;
    plan->far_d = job->columns * job->batch * element >= DOT__FAR;
    plan->k_pieces = dot__ceil_div(plan->depth, dot__max(1, plan->k_piece));
    plan->column_pieces = dot__ceil_div(job->columns, dot__max(1, plan->column_piece));
}

static bool dot__cpu_outer(dot_context *ctx, dot__outer *job)
{
    dot__outer_plan plan;
    dot__outer_planning(ctx, &plan, job);
    if (plan.elements == 0) return true;
    dot__mark mark = dot__scratch_begin(ctx);
    if (plan.parts > 1) {
        size_t lanes = job->laned ? (size_t)ctx->lanes : 1;
        plan.partial = (char *)dot__step_alloc(ctx, lanes * (size_t)plan.parts * plan.elements * dot_dtype_size(job->dtype));
        if (!plan.partial) return false;
    }
    dot__parallel(ctx, job->laned, job->batch * plan.parts * plan.tap_pieces * plan.k_pieces * plan.column_pieces, dot__outer_piece,
                  &plan);
    if (plan.partial)
        dot__parallel(ctx, job->laned, dot__ceil_div((int64_t)plan.elements, DOT__CHUNK),
                      job->dtype == DOT_F32 ? dot__outer_sum_f32 : dot__outer_sum_f64, &plan);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- softmax ---- */

#define DOT__SOFTMAX_PIECES(T, S) \
static void dot__softmax_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__softmax *job = (dot__softmax *)argument; \
    int64_t rows, row = dot__part(job->outer * job->inner, piece, 64, &rows); \
    for (rows += row; row < rows; ++row) { \
        int64_t at = row / job->inner * job->n * job->inner + row % job->inner, step = job->inner; \
        const T *x = (T *)dot__lane(job->x, lane) + at; \
        T *y = (T *)dot__lane(job->y, lane) + at, top = x[0]; \
        double sum = 0; \
        if (step == 1) { \
            top = (T)job->kernel->top(x, job->n); \
            sum = job->kernel->exp_row(x, (double)top, y, job->n); \
        } else { \
            for (int64_t i = 1; i < job->n; ++i) if (x[i * step] > top || x[i * step] != x[i * step]) top = x[i * step]; \
            for (int64_t i = 0; i < job->n; ++i) sum += job->kernel->exp_row(x + i * step, (double)top, y + i * step, 1); \
        } \
        T log_sum = (T)log(sum), scale = (T)(1 / sum); \
        if (job->logarithm) for (int64_t i = 0; i < job->n; ++i) y[i * step] = x[i * step] - top - log_sum; \
        else for (int64_t i = 0; i < job->n; ++i) y[i * step] *= scale; \
    } \
} \
static void dot__softmax_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__softmax *job = (dot__softmax *)argument; \
    int64_t rows, row = dot__part(job->outer * job->inner, piece, 64, &rows); \
    for (rows += row; row < rows; ++row) { \
        int64_t at = row / job->inner * job->n * job->inner + row % job->inner, step = job->inner; \
        const T *y = (T *)dot__lane(job->y, lane) + at, *dy = (T *)dot__lane(job->dy, lane) + at; \
        T *dx = (T *)dot__lane(job->dx, lane) + at; \
        double sum = 0; \
        if (step == 1 && !job->logarithm) sum = job->kernel->dot(dy, y, job->n); \
        else for (int64_t i = 0; i < job->n * step; i += step) \
            sum += job->logarithm ? (double)dy[i] : (double)dy[i] * (double)y[i]; \
        for (int64_t i = 0; i < job->n * step; i += step) { \
            T d, e; \
            if (job->logarithm) { job->kernel->exp_row(y + i, 0, &e, 1); d = dy[i] - e * (T)sum; } \
            else d = y[i] * (dy[i] - (T)sum); \
            dx[i] = job->accumulate ? dx[i] + d : d; \
        } \
    } \
}
DOT__SOFTMAX_PIECES(float, f32)
DOT__SOFTMAX_PIECES(double, f64)

static void dot__cpu_softmax(dot_context *ctx, dot__softmax *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, job->n ? dot__ceil_div(job->outer * job->inner, 64) : 0,
                  job->dtype == DOT_F32 ? dot__softmax_piece_f32 : dot__softmax_piece_f64, job);
}

static void dot__cpu_softmax_backward(dot_context *ctx, dot__softmax *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, job->n ? dot__ceil_div(job->outer * job->inner, 64) : 0,
                  job->dtype == DOT_F32 ? dot__softmax_back_piece_f32 : dot__softmax_back_piece_f64, job);
}

/* ---- attention ----
   A piece is one head of one sequence (and up to DOT__ATTENTION_QUERIES of its queries, forward). Keys come in blocks, which are packed
   once for a piece; under each, rows of queries come in blocks whose scores fit the cache. Forward keeps for each query the
   greatest score so far and the sum of exp(score - greatest), and shrinks what it has whenever a greater one comes. Backward makes the
   probabilities p again from the two numbers; with delta = dout . o,  dv = p' dout,  e = scale p (dout v' - delta),  dq = e k,  dk = e' q (' is transposed). */

#define DOT__ATTENTION_QUERIES 512
#define DOT__FORWARD_KEYS 256
#define DOT__FORWARD_ROWS 48
#define DOT__BACKWARD_KEYS 64
#define DOT__BACKWARD_ROWS 96       /* and DOT__MAX_ROWS elements more: a tile of p' or e' reads whole, beyond the last row's end */

typedef struct dot__attention_plan {
    dot__attention *job;
    const dot__kernels *score, *query, *value;  /* of blocks whose columns are keys, elements of q and k, and elements of v */
    int64_t chunks;                             /* of queries, forward */
    int64_t packed[3];                          /* where the packed k', v (v' backward), and k (backward) begin */
    int64_t room;                               /* of a piece, in elements */
    char *scratch;                              /* [lane][piece][room] elements */
    double *delta;                              /* [lane][batch][head][query] */
    int64_t pieces;
} dot__attention_plan;

/* A head of a sequence in one lane: rows of its arrays. */
typedef struct dot__head {
    int64_t batch, head, pair;                  /* pair: batch * heads + head */
    const char *in[3], *dout;
    char *o, *din[3];
    const uint8_t *mask;
    double *statistics;
    size_t element;
} dot__head;

static dot__head dot__head_of(const dot__attention *job, int lane, int64_t pair)
{
    dot__head h;
    int64_t size[3] = { job->size, job->size, job->value_size }, rows[3] = { job->queries, job->keys, job->keys };
    memset(&h, 0, sizeof h);
    h.pair = pair;
    h.batch = pair / job->heads;
    h.head = pair % job->heads;
    h.element = dot_dtype_size(job->dtype);
    for (int i = 0; i < 3; ++i) {
        size_t at = (size_t)(h.batch * rows[i] * job->row[i] + h.head * size[i]) * h.element;
        h.in[i] = (const char *)dot__lane(job->in[i], lane) + at;
        h.din[i] = job->din[i].data ? (char *)dot__lane(job->din[i], lane) + at : NULL;
    }
    size_t at = (size_t)(h.batch * job->queries * job->heads + h.head) * (size_t)job->value_size * h.element;
    h.o = (char *)dot__lane(job->o, lane) + at;
    h.dout = job->dout.data ? (const char *)dot__lane(job->dout, lane) + at : NULL;
    h.mask = job->key_mask.data ? (const uint8_t *)dot__lane(job->key_mask, lane) + h.batch * job->keys : NULL;
    h.statistics = (double *)dot__lane(job->statistics, lane) + pair * job->queries * 2;
    return h;
}

/* Packs a block: B[k][column] at b + k * b_row + column * b_column becomes panels of [k][column]. */
static void dot__pack_block(const dot__kernels *kernel, dot_dtype dtype, const char *b, int64_t b_row, int64_t b_column, int64_t depth,
                            int64_t columns, double scale, void *to)
{
    for (int64_t j = 0, width = kernel->columns; j < columns; j += width) {
        int64_t n = dot__min(width, columns - j), at = j * depth;
        if (dtype == DOT_F32) {
            dot__pack_panel_f32((const float *)(const void *)b + j * b_column, b_row, b_column, depth, n, width, (float *)to + at);
            for (int64_t i = 0; i < depth * width && scale != 1; ++i) ((float *)to)[at + i] *= (float)scale;
        } else {
            dot__pack_panel_f64((const double *)(const void *)b + j * b_column, b_row, b_column, depth, n, width, (double *)to + at);
            for (int64_t i = 0; i < depth * width && scale != 1; ++i) ((double *)to)[at + i] *= scale;
        }
    }
}

/* C (+)= A B, B packed. */
static void dot__block_product(const dot__kernels *kernel, size_t element, const char *a, int64_t a_row, int64_t rows, int64_t depth,
                               const char *b, int64_t columns, char *c, int64_t c_row, bool accumulate)
{
    const void *from[DOT__MAX_ROWS];
    void *to[DOT__MAX_ROWS];
    dot__tile tile;
    memset(&tile, 0, sizeof tile);
    tile.taps = 1;
    tile.depth = depth;
    tile.accumulate = accumulate;
    tile.a = from;
    tile.c = to;
    for (int64_t j = 0, width = kernel->columns; j < columns; j += width, b += (size_t)(depth * width) * element) {
        tile.b = b;
        tile.columns = (int)dot__min(width, columns - j);
        for (int64_t i = 0; i < rows; i += kernel->rows) {
            tile.rows = (int)dot__min(kernel->rows, rows - i);
            for (int r = 0; r < kernel->rows; ++r) {
                int64_t row = i + dot__min(r, tile.rows - 1);
                from[r] = a + (size_t)(row * a_row) * element;
                to[r] = c + (size_t)(row * c_row + j) * element;
            }
            kernel->tile(&tile);
        }
    }
}

/* W (+)= A' D, of `count` rows. */
static void dot__block_outer(const dot__kernels *kernel, size_t element, const char *a, int64_t a_row, const char *d, int64_t d_row, int64_t count,
                             int64_t rows, int64_t columns, char *w, int64_t w_row, bool accumulate)
{
    const void *a_rows[DOT__BACKWARD_ROWS], *d_rows[DOT__BACKWARD_ROWS];
    dot__outer_tile tile;
    for (int64_t i = 0; i < count; ++i) {
        a_rows[i] = a + (size_t)(i * a_row) * element;
        d_rows[i] = d + (size_t)(i * d_row) * element;
    }
    tile.count = count;
    tile.a = a_rows;
    tile.d = d_rows;
    tile.accumulate = accumulate;
    tile.w_row = w_row;
    for (int64_t j = 0; j < columns; j += kernel->columns)
        for (int64_t i = 0; i < rows; i += kernel->outer_rows) {
            tile.a_at = i;
            tile.d_at = j;
            tile.rows = (int)dot__min(kernel->outer_rows, rows - i);
            tile.columns = (int)dot__min(kernel->columns, columns - j);
            tile.w = w + (size_t)(i * w_row + j) * element;
            kernel->outer(&tile);
        }
}

/* Of the keys from `first` on, how many query `query` sees; hidden ones among them get the score -infinity. */
#define DOT__ATTENTION_PIECES(T, S) \
static int64_t dot__seen_##S(const dot__attention *job, const dot__head *h, int64_t query, int64_t first, int64_t n, T *score) \
{ \
    n = job->causal ? dot__max(0, dot__min(n, query + 1 - first)) : n; \
    for (int64_t j = 0; j < n && h->mask; ++j) if (!h->mask[first + j]) score[j] = -(T)INFINITY; \
    return n; \
} \
/* Scores into exp(score - greatest), and what is there of o made to fit. */ \
static void dot__attend_##S(const dot__attention_plan *plan, const dot__head *h, int64_t query, int64_t first, int64_t n, T *score, T *o) \
{ \
    const dot__attention *job = plan->job; \
    double *top = h->statistics + 2 * query, *sum = top + 1, old = *top, shrink; \
    int64_t seen = dot__seen_##S(job, h, query, first, n, score); \
    double most = seen ? plan->score->top(score, seen) : old; \
    if (first > 0 && most <= old) most = old; \
    *top = most; \
    if (most == -(double)INFINITY) seen = 0; \
    shrink = first == 0 ? 0 : most == old ? 1 : exp(old - most); \
    *sum = *sum * shrink + (seen ? plan->score->exp_row(score, most, score, seen) : 0); \
    for (int64_t j = seen; j < n; ++j) score[j] = (T)0; \
    for (int64_t j = 0; j < job->value_size && first > 0 && shrink != 1; ++j) o[j] *= (T)shrink; \
} \
static void dot__attention_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__attention_plan *plan = (dot__attention_plan *)argument; \
    const dot__attention *job = plan->job; \
    dot__head h = dot__head_of(job, lane, piece / plan->chunks); \
    int64_t begin = piece % plan->chunks * DOT__ATTENTION_QUERIES, end = dot__min(job->queries, begin + DOT__ATTENTION_QUERIES); \
    int64_t n, rows, o_row = job->heads * job->value_size; \
    T score[DOT__FORWARD_ROWS * DOT__FORWARD_KEYS], *packed = (T *)(void *)plan->scratch + (lane * plan->pieces + piece) * plan->room; \
    T *k = packed + plan->packed[0], *v = packed + plan->packed[1], *o = (T *)(void *)h.o; \
    for (int64_t q = begin; q < end; ++q) h.statistics[2 * q + 1] = 0; \
    for (int64_t first = 0; first < job->keys && !(job->causal && first >= end); first += n) { \
        n = dot__min(DOT__FORWARD_KEYS, job->keys - first); \
        dot__pack_block(plan->score, job->dtype, h.in[1] + (size_t)(first * job->row[1]) * sizeof(T), 1, job->row[1], job->size, n, job->scale, k); \
        dot__pack_block(plan->value, job->dtype, h.in[2] + (size_t)(first * job->row[2]) * sizeof(T), job->row[2], 1, n, job->value_size, 1, v); \
        for (int64_t q = begin; q < end; q += rows) { \
            rows = dot__min(DOT__FORWARD_ROWS, end - q); \
            if (job->causal && first >= q + rows) continue; \
            dot__block_product(plan->score, sizeof(T), h.in[0] + (size_t)(q * job->row[0]) * sizeof(T), job->row[0], rows, job->size, \
                               (char *)k, n, (char *)score, DOT__FORWARD_KEYS, false); \
            for (int64_t i = 0; i < rows; ++i) \
                dot__attend_##S(plan, &h, q + i, first, n, score + i * DOT__FORWARD_KEYS, o + (q + i) * o_row); \
            dot__block_product(plan->value, sizeof(T), (char *)score, DOT__FORWARD_KEYS, rows, n, (char *)v, job->value_size, \
                               (char *)(o + q * o_row), o_row, first > 0); \
        } \
    } \
    for (int64_t q = begin; q < end; ++q) { \
        double sum = h.statistics[2 * q + 1]; \
        T share = (T)(sum == 0 ? 0 : 1 / sum); \
        for (int64_t j = 0; j < job->value_size; ++j) o[q * o_row + j] *= share; \
    } \
} \
static void dot__attention_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__attention_plan *plan = (dot__attention_plan *)argument; \
    const dot__attention *job = plan->job; \
    dot__head h = dot__head_of(job, lane, piece); \
    int64_t n, rows, o_row = job->heads * job->value_size; \
    const T *o = (T *)(void *)h.o, *dout = (const T *)(const void *)h.dout; \
    T p[DOT__BACKWARD_ROWS * DOT__BACKWARD_KEYS + DOT__MAX_ROWS], e[DOT__BACKWARD_ROWS * DOT__BACKWARD_KEYS + DOT__MAX_ROWS]; \
    T *packed = (T *)(void *)plan->scratch + (lane * plan->pieces + piece) * plan->room; \
    T *keys = packed + plan->packed[0], *values = packed + plan->packed[1], *k = packed + plan->packed[2]; \
    double *delta = plan->delta + (lane * plan->pieces + piece) * job->queries; \
    for (int64_t q = 0; q < job->queries; ++q) delta[q] = plan->score->dot(dout + q * o_row, o + q * o_row, job->value_size); \
    for (int64_t first = 0; first < job->keys; first += n) { \
        n = dot__min(DOT__BACKWARD_KEYS, job->keys - first); \
        const char *key = h.in[1] + (size_t)(first * job->row[1]) * sizeof(T), *value = h.in[2] + (size_t)(first * job->row[2]) * sizeof(T); \
        dot__pack_block(plan->score, job->dtype, key, 1, job->row[1], job->size, n, job->scale, keys); \
        dot__pack_block(plan->score, job->dtype, value, 1, job->row[2], job->value_size, n, 1, values); \
        dot__pack_block(plan->query, job->dtype, key, job->row[1], 1, n, job->size, 1, k); \
        char *dk = h.din[1] ? h.din[1] + (size_t)(first * job->row[1]) * sizeof(T) : NULL; \
        char *dv = h.din[2] ? h.din[2] + (size_t)(first * job->row[2]) * sizeof(T) : NULL; \
        bool add[3] = { job->accumulate[0] || first > 0, job->accumulate[1], job->accumulate[2] }; \
        for (int64_t q = 0; q < job->queries; q += rows) { \
            rows = dot__min(DOT__BACKWARD_ROWS, job->queries - q); \
            if (job->causal && first >= q + rows && q + rows < job->queries) continue;      /* the last block sets dk and dv, to 0 at least */ \
            const char *query = h.in[0] + (size_t)(q * job->row[0]) * sizeof(T), *d = h.dout + (size_t)(q * o_row) * sizeof(T); \
            dot__block_product(plan->score, sizeof(T), query, job->row[0], rows, job->size, (char *)keys, n, (char *)p, DOT__BACKWARD_KEYS, false); \
            dot__block_product(plan->score, sizeof(T), d, o_row, rows, job->value_size, (char *)values, n, (char *)e, DOT__BACKWARD_KEYS, false); \
            for (int64_t i = 0; i < rows; ++i) { \
                T *p_row = p + i * DOT__BACKWARD_KEYS, *e_row = e + i * DOT__BACKWARD_KEYS; \
                const double *statistics = h.statistics + 2 * (q + i); \
                int64_t seen = statistics[1] == 0 ? 0 : dot__seen_##S(job, &h, q + i, first, n, p_row); \
                if (seen) plan->score->exp_row(p_row, statistics[0], p_row, seen); \
                if (seen) plan->score->score_row(p_row, e_row, 1 / statistics[1], delta[q + i], job->scale, seen); \
                for (int64_t j = seen; j < n; ++j) p_row[j] = e_row[j] = (T)0; \
            } \
            if (dv) dot__block_outer(plan->value, sizeof(T), (char *)p, DOT__BACKWARD_KEYS, d, o_row, rows, n, job->value_size, dv, job->row[2], add[2]); \
            if (dk) dot__block_outer(plan->query, sizeof(T), (char *)e, DOT__BACKWARD_KEYS, query, job->row[0], rows, n, job->size, dk, job->row[1], add[1]); \
            if (h.din[0]) dot__block_product(plan->query, sizeof(T), (char *)e, DOT__BACKWARD_KEYS, rows, n, (char *)k, job->size, \
                                             h.din[0] + (size_t)(q * job->row[0]) * sizeof(T), job->row[0], add[0]); \
            add[1] = add[2] = true; \
        } \
    } \
}
DOT__ATTENTION_PIECES(float, f32)
DOT__ATTENTION_PIECES(double, f64)

static bool dot__run_attention(dot_context *ctx, dot__attention *job, bool backward)
{
    dot__attention_plan plan;
    int64_t keys = dot__min(job->keys, backward ? DOT__BACKWARD_KEYS : DOT__FORWARD_KEYS), lanes = job->laned || backward ? ctx->lanes : 1;
    memset(&plan, 0, sizeof plan);
    plan.job = job;
    plan.score = dot__kernel(ctx, job->dtype);
    plan.query = dot__kernel_for(ctx, job->dtype, job->size);
    plan.value = dot__kernel_for(ctx, job->dtype, job->value_size);
    plan.chunks = backward ? 1 : dot__ceil_div(job->queries, DOT__ATTENTION_QUERIES);
    plan.pieces = job->batch * job->heads * plan.chunks;
    if (plan.pieces == 0 || job->queries == 0) return true;
    int64_t key_columns = dot__round_up(keys, plan.score->columns);
    plan.packed[1] = key_columns * job->size;
    plan.packed[2] = plan.packed[1] + (backward ? key_columns * job->value_size : keys * dot__round_up(job->value_size, plan.value->columns));
    plan.room = plan.packed[2] + (backward ? keys * dot__round_up(job->size, plan.query->columns) : 0);
    dot__mark mark = dot__scratch_begin(ctx);
    plan.scratch = (char *)dot__step_alloc(ctx, (size_t)(lanes * plan.pieces * plan.room) * dot_dtype_size(job->dtype));
    plan.delta = (double *)dot__step_alloc(ctx, (size_t)(backward ? lanes * plan.pieces * job->queries : 0) * sizeof(double));
    if (!plan.scratch || !plan.delta) return false;
    if (job->dtype == DOT_F32)
        dot__parallel(ctx, job->laned || backward, plan.pieces, backward ? dot__attention_back_piece_f32 : dot__attention_piece_f32, &plan);
    else
        dot__parallel(ctx, job->laned || backward, plan.pieces, backward ? dot__attention_back_piece_f64 : dot__attention_piece_f64, &plan);
    dot__scratch_end(ctx, mark);
    return true;
}

static bool dot__cpu_attention(dot_context *ctx, dot__attention *job)          { return dot__run_attention(ctx, job, false); }
static bool dot__cpu_attention_backward(dot_context *ctx, dot__attention *job) { return dot__run_attention(ctx, job, true); }

/* ---- normalisation: [sets][positions][groups][channels] ----
   A piece is some sets and a few groups side by side, so that batch normalisation (one set, one channel a group) reads whole cache
   lines and layer normalisation (one group) whole rows. Statistics in two passes over the data, in double. */

#define DOT__NORM_GROUPS 16
#define DOT__NORM_ROWS 64           /* positions whose elements are still in L1 when the next columns are done */
#define DOT__NORM_PARTS 8

/* The groups of one set in a piece: as one block whose columns have statistics of their own, or as blocks of one group each. */
typedef struct dot__norm_block {
    bool apart;
    int64_t first, groups, n;       /* groups of the block, from `first` in [sets][groups]; columns */
    int64_t column, offset;         /* first column; first element */
    double *mean, *rstd;
} dot__norm_block;

static int64_t dot__norm_sets(const dot__norm *job)     /* in a piece */
{
    return dot__max(1, DOT__CHUNK / dot__max(1, job->positions * job->groups * job->channels));
}

static int64_t dot__norm_pieces(const dot__norm *job)
{
    return dot__ceil_div(job->sets, dot__norm_sets(job)) * dot__ceil_div(job->groups, DOT__NORM_GROUPS);
}

/* Block i of a piece; false after the last. */
static bool dot__norm_block_at(const dot__norm *job, int lane, int64_t piece, int64_t i, dot__norm_block *b)
{
    int64_t blocks = dot__ceil_div(job->groups, DOT__NORM_GROUPS), groups, sets;
    int64_t g = dot__part(job->groups, piece % blocks, DOT__NORM_GROUPS, &groups);
    int64_t set = dot__part(job->sets, piece / blocks, dot__norm_sets(job), &sets);
    b->apart = job->channels == 1;
    int64_t a_set = b->apart ? 1 : groups;
    if (i >= sets * a_set) return false;
    set += i / a_set;
    g += i % a_set;
    b->groups = b->apart ? groups : 1;
    b->n = b->apart ? groups : job->channels;
    b->column = g * job->channels;
    b->first = set * job->groups + g;
    b->offset = set * job->positions * job->groups * job->channels + b->column;
    b->mean = (double *)dot__lane(job->mean, lane) + b->first;
    b->rstd = (double *)dot__lane(job->rstd, lane) + b->first;
    return true;
}

/* Element i of an array; NULL of none. */
DOT__INLINE char *dot__element_of(dot_dtype dtype, dot__array a, int lane, int64_t i)
{
    return a.data ? (char *)dot__lane(a, lane) + i * (int64_t)dot_dtype_size(dtype) : NULL;
}

static void dot__norm_statistics(const dot__norm *job, int lane, const dot__norm_block *b)
{
    int64_t row = job->groups * job->channels, group = b->first % job->groups;
    double sum[DOT__NORM_GROUPS], count = (double)(job->positions * job->channels);
    for (int64_t g = 0; g < b->groups && job->fixed; ++g) {
        b->mean[g] = dot__load(dot__lane(job->running_mean, lane), job->dtype, group + g);
        b->rstd[g] = 1 / sqrt(dot__load(dot__lane(job->running_var, lane), job->dtype, group + g) + job->eps);
    }
    if (job->fixed) return;
    for (int64_t g = 0; g < b->groups; ++g) b->mean[g] = sum[g] = 0;
    for (int pass = 0; pass < 2; ++pass) {
        for (int64_t p = 0; p < job->positions; p += DOT__NORM_ROWS)
            job->kernel->norm_sums(dot__element_of(job->dtype, job->x, lane, b->offset + p * row), dot__min(DOT__NORM_ROWS, job->positions - p), row, b->n,
                                   pass ? b->mean : NULL, b->apart, sum);
        for (int64_t g = 0; g < b->groups && !pass; ++g) { b->mean[g] = sum[g] / count; sum[g] = 0; }
    }
    for (int64_t g = 0; g < b->groups; ++g) {
        b->rstd[g] = 1 / sqrt(sum[g] / count + job->eps);
        if (!job->tracked) continue;
        void *m = dot__lane(job->running_mean, lane), *v = dot__lane(job->running_var, lane);
        dot__store(m, job->dtype, group + g, (1 - job->momentum) * dot__load(m, job->dtype, group + g) + job->momentum * b->mean[g]);
        dot__store(v, job->dtype, group + g, (1 - job->momentum) * dot__load(v, job->dtype, group + g) + job->momentum * sum[g] / (count - 1));
    }
}

static void dot__normalize_piece(void *argument, int lane, int64_t piece)
{
    const dot__norm *job = (const dot__norm *)argument;
    int64_t row = job->groups * job->channels;
    dot__norm_block b;
    for (int64_t i = 0; dot__norm_block_at(job, lane, piece, i, &b); ++i) {
        const char *weight = job->weighted ? dot__element_of(job->dtype, job->weight, lane, b.column) : NULL;
        const char *bias = job->biased ? dot__element_of(job->dtype, job->bias, lane, b.column) : NULL;
        dot__norm_statistics(job, lane, &b);
        for (int64_t p = 0; p < job->positions; p += DOT__NORM_ROWS)
            job->kernel->norm_affine(dot__element_of(job->dtype, job->x, lane, b.offset + p * row), dot__element_of(job->dtype, job->y, lane, b.offset + p * row),
                                     dot__min(DOT__NORM_ROWS, job->positions - p), row, b.n, b.mean, b.rstd, b.apart, weight, bias);
    }
}

/* With h = (x - mean) rstd and e = dy weight:  dx = rstd (e - mean(e) - h mean(e h)). */
static void dot__normalize_back_piece(void *argument, int lane, int64_t piece)
{
    const dot__norm *job = (const dot__norm *)argument;
    int64_t row = job->groups * job->channels;
    double e[DOT__NORM_GROUPS], eh[DOT__NORM_GROUPS], count = (double)(job->positions * job->channels);
    dot__norm_block b;
    for (int64_t i = 0; dot__norm_block_at(job, lane, piece, i, &b); ++i) {
        const char *weight = job->weighted ? dot__element_of(job->dtype, job->weight, lane, b.column) : NULL;
        for (int64_t g = 0; g < b.groups; ++g) e[g] = eh[g] = 0;
        for (int pass = job->fixed ? 1 : 0; pass < 2; ++pass) {
            for (int64_t p = 0; p < job->positions; p += DOT__NORM_ROWS) {
                const char *x = dot__element_of(job->dtype, job->x, lane, b.offset + p * row), *dy = dot__element_of(job->dtype, job->dy, lane, b.offset + p * row);
                int64_t rows = dot__min(DOT__NORM_ROWS, job->positions - p);
                if (!pass) job->kernel->norm_pairs(x, dy, rows, row, b.n, b.mean, b.rstd, b.apart, weight, b.apart, e, eh);
                else job->kernel->norm_back(x, dy, dot__element_of(job->dtype, job->dx, lane, b.offset + p * row), rows, row, b.n, b.mean, b.rstd, b.apart,
                                            weight, e, eh, job->accumulate);
            }
            for (int64_t g = 0; g < b.groups && !pass; ++g) { e[g] /= count; eh[g] /= count; }
        }
    }
}

/* dweight = sum dy h, dbias = sum dy, over a part of the rows (set, position); partial is [part][2][row]. */
static void dot__norm_weight_piece(void *argument, int lane, int64_t part)
{
    const dot__norm *job = (const dot__norm *)argument;
    int64_t row = job->groups * job->channels, rows = job->sets * job->positions, per = dot__ceil_div(rows, DOT__NORM_PARTS);
    const double *mean = (double *)dot__lane(job->mean, lane), *rstd = (double *)dot__lane(job->rstd, lane);
    double *product = (double *)dot__lane(job->partial, lane) + part * 2 * row, *sum = product + row;
    bool apart = job->channels == 1;
    int64_t groups = apart ? 1 : job->groups, n = apart ? row : job->channels, end = dot__min(rows, (part + 1) * per);
    for (int64_t c = 0; c < 2 * row; ++c) product[c] = 0;
    for (int64_t r = part * per, count; r < end; r += count) {
        count = dot__min(dot__min(end - r, DOT__NORM_ROWS), job->positions - r % job->positions);
        for (int64_t g = 0; g < groups; ++g) {
            int64_t at = r * row + g * n, s = r / job->positions * job->groups + g;
            job->kernel->norm_pairs(dot__element_of(job->dtype, job->x, lane, at), dot__element_of(job->dtype, job->dy, lane, at), count, row, n, mean + s,
                                    rstd + s, apart, NULL, true, sum + g * n, product + g * n);
        }
    }
}

static void dot__norm_weight_sum(void *argument, int lane, int64_t piece)
{
    const dot__norm *job = (const dot__norm *)argument;
    int64_t row = job->groups * job->channels;
    const double *from = (double *)dot__lane(job->partial, lane) + piece * row;
    dot__array to = piece == 0 ? job->dweight : job->dbias;
    bool add = piece == 0 ? job->add_weight : job->add_bias;
    for (int64_t c = 0; c < row && to.data; ++c) {
        double sum = add ? dot__load(dot__lane(to, lane), job->dtype, c) : 0;
        for (int64_t p = 0; p < DOT__NORM_PARTS; ++p) sum += from[p * 2 * row + c];
        dot__store(dot__lane(to, lane), job->dtype, c, sum);
    }
}

static void dot__cpu_norm(dot_context *ctx, dot__norm *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    dot__parallel(ctx, job->laned, dot__norm_pieces(job), dot__normalize_piece, job);
}

static bool dot__cpu_norm_backward(dot_context *ctx, dot__norm *job)
{
    job->kernel = dot__kernel(ctx, job->dtype);
    if (job->dx.data) dot__parallel(ctx, job->laned, dot__norm_pieces(job), dot__normalize_back_piece, job);
    if (!job->dweight.data && !job->dbias.data) return true;
    int64_t row = job->groups * job->channels;
    dot__mark mark = dot__scratch_begin(ctx);
    size_t bytes = (size_t)(DOT__NORM_PARTS * 2 * row) * sizeof(double);
    job->partial.data = (char *)dot__step_alloc(ctx, bytes * (job->laned ? (size_t)ctx->lanes : 1));
    job->partial.lane = (int64_t)bytes;
    if (!job->partial.data) return false;
    dot__parallel(ctx, job->laned, DOT__NORM_PARTS, dot__norm_weight_piece, job);
    dot__parallel(ctx, job->laned, 2, dot__norm_weight_sum, job);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- pooling: the windows come from the same kind of table as a convolution's ----
   Backward runs over images, one a piece, because windows overlap. The maximum is found again rather than kept. */

#define DOT__POOL_WINDOW(job, position, body) \
    do { \
        const dot__axis *X = &(job)->axis[0], *Y = &(job)->axis[1], *Z = &(job)->axis[2]; \
        for (int wi = 0; wi < X->taps; ++wi) for (int wj = 0; wj < Y->taps; ++wj) for (int wk = 0; wk < Z->taps; ++wk) { \
            int64_t fx = X->from[(position)->at[0] * X->taps + wi], fy = Y->from[(position)->at[1] * Y->taps + wj]; \
            int64_t fz = Z->from[(position)->at[2] * Z->taps + wk]; \
            if (fx < 0 || fy < 0 || fz < 0) continue; \
            int64_t in = fx + fy + fz; \
            body \
        } \
    } while (0)

static double dot__pool_weight(const dot__pool_job *job, const dot__position *at)
{
    double count = 0;
    if (job->count_padding)
        return 1.0 / ((double)job->axis[0].to[at->at[0]] * (double)job->axis[1].to[at->at[1]] * (double)job->axis[2].to[at->at[2]]);
    DOT__POOL_WINDOW(job, at, (void)in; count += 1;);
    return 1.0 / count;
}

#define DOT__POOL_PIECES(T, S) \
static void dot__pool_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__pool_job *job = (dot__pool_job *)argument; \
    dot__rows rows; \
    memset(&rows, 0, sizeof rows); \
    memcpy(rows.axis, job->axis, sizeof rows.axis); \
    int64_t positions = dot__positions(&rows), n = job->channels; \
    const T *x = (T *)dot__lane(job->x, lane) + piece * job->in * n; \
    T *y = (T *)dot__lane(job->y, lane) + piece * positions * n; \
    dot__position at = dot__position_of(&rows, 0); \
    for (int64_t p = 0; p < positions; ++p, y += n, dot__position_next(&rows, &at)) { \
        for (int64_t c = 0; c < n; ++c) y[c] = job->maximum ? -(T)INFINITY : (T)0; \
        if (job->maximum) \
            DOT__POOL_WINDOW(job, &at, for (int64_t c = 0; c < n; ++c) { T v = x[in * n + c]; if (v > y[c] || v != v) y[c] = v; }); \
        else { \
            T weight = (T)dot__pool_weight(job, &at); \
            DOT__POOL_WINDOW(job, &at, for (int64_t c = 0; c < n; ++c) y[c] += x[in * n + c];); \
            for (int64_t c = 0; c < n; ++c) y[c] *= weight; \
        } \
    } \
} \
static void dot__pool_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__pool_job *job = (dot__pool_job *)argument; \
    dot__rows rows; \
    memset(&rows, 0, sizeof rows); \
    memcpy(rows.axis, job->axis, sizeof rows.axis); \
    int64_t positions = dot__positions(&rows), n = job->channels; \
    const T *x = (T *)dot__lane(job->x, lane) + piece * job->in * n; \
    const T *dy = (T *)dot__lane(job->dy, lane) + piece * positions * n; \
    T *dx = (T *)dot__lane(job->dx, lane) + piece * job->in * n; \
    if (!job->accumulate) memset(dx, 0, (size_t)(job->in * n) * sizeof(T)); \
    dot__position at = dot__position_of(&rows, 0); \
    for (int64_t p = 0; p < positions; ++p, dy += n, dot__position_next(&rows, &at)) { \
        if (!job->maximum) { \
            T weight = (T)dot__pool_weight(job, &at); \
            DOT__POOL_WINDOW(job, &at, for (int64_t c = 0; c < n; ++c) dx[in * n + c] += dy[c] * weight;); \
            continue; \
        } \
        for (int64_t c = 0; c < n; ++c) { \
            int64_t best = -1; \
            DOT__POOL_WINDOW(job, &at, { \
                T v = x[in * n + c]; \
                if (best < 0 || v > x[best * n + c] || v != v) best = in; \
            }); \
            if (best >= 0) dx[best * n + c] += dy[c]; \
        } \
    } \
}
DOT__POOL_PIECES(float, f32)
DOT__POOL_PIECES(double, f64)

static void dot__cpu_pool(dot_context *ctx, dot__pool_job *job)
{
    dot__parallel(ctx, job->laned, job->images, job->dtype == DOT_F32 ? dot__pool_piece_f32 : dot__pool_piece_f64, job);
}

static void dot__cpu_pool_backward(dot_context *ctx, dot__pool_job *job)
{
    dot__parallel(ctx, job->laned, job->images, job->dtype == DOT_F32 ? dot__pool_back_piece_f32 : dot__pool_back_piece_f64, job);
}

/* ---- rows by index; backward goes through the indices in order, 64 columns a piece ---- */

#define DOT__GATHER_PIECES(T, S) \
static void dot__gather_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__gather *job = (dot__gather *)argument; \
    int64_t n, i = dot__part(job->count, piece, 64, &n), width = job->width; \
    const int64_t *index = (const int64_t *)dot__lane(job->index, lane); \
    const T *w = (T *)dot__lane(job->w, lane); \
    T *y = (T *)dot__lane(job->y, lane); \
    for (n += i; i < n; ++i) memcpy(y + i * width, w + index[i] * width, (size_t)width * sizeof(T)); \
} \
static void dot__gather_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__gather *job = (dot__gather *)argument; \
    int64_t n, c0 = dot__part(job->width, piece, 64, &n), width = job->width; \
    const int64_t *index = (const int64_t *)dot__lane(job->index, lane); \
    const T *dy = (T *)dot__lane(job->dy, lane) + c0; \
    T *dw = (T *)dot__lane(job->dw, lane) + c0; \
    for (int64_t r = 0; r < job->rows && !job->accumulate; ++r) memset(dw + r * width, 0, (size_t)n * sizeof(T)); \
    for (int64_t i = 0; i < job->count; ++i) \
        for (int64_t c = 0; c < n; ++c) dw[index[i] * width + c] += dy[i * width + c]; \
}
DOT__GATHER_PIECES(float, f32)
DOT__GATHER_PIECES(double, f64)

static void dot__cpu_gather(dot_context *ctx, dot__gather *job)
{
    dot__parallel(ctx, job->laned, dot__ceil_div(job->count, 64), job->dtype == DOT_F32 ? dot__gather_piece_f32 : dot__gather_piece_f64,
                  job);
}

static void dot__cpu_gather_backward(dot_context *ctx, dot__gather *job)
{
    dot__parallel(ctx, job->laned, dot__ceil_div(job->width, 64),
                  job->dtype == DOT_F32 ? dot__gather_back_piece_f32 : dot__gather_back_piece_f64, job);
}

/* ---- dropout: the mask is not kept but drawn again ---- */

#define DOT__DROPOUT_PIECE(T, S) \
static void dot__dropout_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__dropout_job *job = (dot__dropout_job *)argument; \
    int64_t n, begin = dot__part(job->n, piece, DOT__PIECE, &n); \
    const T *x = (T *)dot__lane(job->x, lane) + begin; \
    T *y = (T *)dot__lane(job->y, lane) + begin, scale = (T)job->scale; \
    uint32_t draw[4]; \
    for (int64_t i = 0; i < n; ++i) { \
        if (i % 4 == 0) dot__random_words(job->seeds[lane], job->stream, (uint64_t)(begin + i) / 4, draw); \
        T v = draw[i % 4] >= job->threshold ? x[i] * scale : (T)0; \
        y[i] = job->accumulate ? y[i] + v : v; \
    } \
}
DOT__DROPOUT_PIECE(float, f32)
DOT__DROPOUT_PIECE(double, f64)

static void dot__cpu_dropout(dot_context *ctx, dot__dropout_job *job)
{
    dot__parallel(ctx, job->laned, dot__ceil_div(job->n, DOT__PIECE),
                  job->dtype == DOT_F32 ? dot__dropout_piece_f32 : dot__dropout_piece_f64, job);
}

/* ---- losses: partial sums of fixed chunks, added up in order ---- */

typedef struct dot__loss_plan { void *job; int64_t parts; double *partial; } dot__loss_plan;

/* The last part of every loss: value = scale * (sum of the partial sums). */
static void dot__loss_total(const dot__loss_plan *plan, int lane, dot_dtype dtype, void *value, double scale)
{
    double sum = 0;
    for (int64_t p = 0; p < plan->parts; ++p) sum += plan->partial[lane * plan->parts + p];
    dot__store(value, dtype, 0, sum * scale);
}

#define DOT__LOSS_PIECES(T, S) \
static void dot__loss_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__loss_plan *plan = (dot__loss_plan *)argument; \
    dot__loss_job *job = (dot__loss_job *)plan->job; \
    int64_t n, i = dot__part(job->n, piece, DOT__CHUNK, &n); \
    plan->partial[lane * plan->parts + piece] = \
        dot__losses_##S[job->op].forward((T *)dot__lane(job->x, lane) + i, (T *)dot__lane(job->t, lane) + i, n, (T)job->p); \
} \
static void dot__loss_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__loss_job *job = (dot__loss_job *)argument; \
    int64_t n, i = dot__part(job->n, piece, DOT__PIECE, &n); \
    T scale = (T)((double)*(T *)dot__lane(job->value, lane) / (double)job->n); \
    dot__losses_##S[job->op].backward((T *)dot__lane(job->x, lane) + i, (T *)dot__lane(job->t, lane) + i, \
        (T *)dot__lane(job->out, lane) + i, n, (T)job->p, scale, job->wrt_target, job->accumulate); \
} \
static double dot__entropy_row_##S(const T *x, int64_t n, double *top) \
{ \
    double sum = 0; \
    *top = (double)x[0]; \
    for (int64_t c = 1; c < n; ++c) if ((double)x[c] > *top || x[c] != x[c]) *top = (double)x[c]; \
    for (int64_t c = 0; c < n; ++c) sum += exp((double)x[c] - *top); \
    return sum; \
} \
static void dot__entropy_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__loss_plan *plan = (dot__loss_plan *)argument; \
    dot__entropy *job = (dot__entropy *)plan->job; \
    int64_t rows, row = dot__part(job->rows, piece, 64, &rows), n = job->classes; \
    const int64_t *labels = (const int64_t *)dot__lane(job->labels, lane); \
    double total = 0, top; \
    for (rows += row; row < rows; ++row) { \
        const T *x = (T *)dot__lane(job->x, lane) + row * n; \
        double norm = log(dot__entropy_row_##S(x, n, &top)) + top, sum = 0; \
        for (int64_t c = 0; c < n; ++c) sum += norm - (double)x[c]; \
        total += (1 - job->smoothing) * (norm - (double)x[labels[row]]) + (job->smoothing > 0 ? job->smoothing * sum / (double)n : 0); \
    } \
    plan->partial[lane * plan->parts + piece] = total; \
} \
static void dot__entropy_back_piece_##S(void *argument, int lane, int64_t piece) \
{ \
    dot__entropy *job = (dot__entropy *)argument; \
    int64_t rows, row = dot__part(job->rows, piece, 64, &rows), n = job->classes; \
    const int64_t *labels = (const int64_t *)dot__lane(job->labels, lane); \
    double scale = (double)*(T *)dot__lane(job->value, lane) / (double)job->rows, top; \
    for (rows += row; row < rows; ++row) { \
        const T *x = (T *)dot__lane(job->x, lane) + row * n; \
        T *dx = (T *)dot__lane(job->dx, lane) + row * n; \
        double sum = dot__entropy_row_##S(x, n, &top); \
        for (int64_t c = 0; c < n; ++c) { \
            double q = (c == labels[row] ? 1 - job->smoothing : 0) + job->smoothing / (double)n; \
            T d = (T)(scale * (exp((double)x[c] - top) / sum - q)); \
            dx[c] = job->accumulate ? dx[c] + d : d; \
        } \
    } \
}
DOT__LOSS_PIECES(float, f32)
DOT__LOSS_PIECES(double, f64)

static void dot__loss_finish(void *argument, int lane, int64_t piece)
{
    dot__loss_plan *plan = (dot__loss_plan *)argument;
    dot__loss_job *job = (dot__loss_job *)plan->job;
    (void)piece;
    dot__loss_total(plan, lane, job->dtype, dot__lane(job->value, lane), 1.0 / (double)job->n);
}

static void dot__entropy_finish(void *argument, int lane, int64_t piece)
{
    dot__loss_plan *plan = (dot__loss_plan *)argument;
    dot__entropy *job = (dot__entropy *)plan->job;
    (void)piece;
    dot__loss_total(plan, lane, job->dtype, dot__lane(job->value, lane), 1.0 / (double)job->rows);
}

static bool dot__run_loss(dot_context *ctx, bool laned, void *job, int64_t parts, dot__work piece, dot__work finish)
{
    dot__loss_plan plan;
    dot__mark mark = dot__scratch_begin(ctx);
    plan.job = job;
    plan.parts = parts;
    plan.partial = (double *)dot__step_alloc(ctx, (size_t)parts * sizeof(double) * (laned ? (size_t)ctx->lanes : 1));
    if (!plan.partial) return false;
    dot__parallel(ctx, laned, parts, piece, &plan);
    dot__parallel(ctx, laned, 1, finish, &plan);
    dot__scratch_end(ctx, mark);
    return true;
}

static bool dot__cpu_loss(dot_context *ctx, dot__loss_job *job)
{
    return dot__run_loss(ctx, job->laned, job, dot__ceil_div(job->n, DOT__CHUNK),
                         job->dtype == DOT_F32 ? dot__loss_piece_f32 : dot__loss_piece_f64, dot__loss_finish);
}

static void dot__cpu_loss_backward(dot_context *ctx, dot__loss_job *job)
{
    dot__parallel(ctx, job->laned, dot__ceil_div(job->n, DOT__PIECE),
                  job->dtype == DOT_F32 ? dot__loss_back_piece_f32 : dot__loss_back_piece_f64, job);
}

static bool dot__cpu_entropy(dot_context *ctx, dot__entropy *job)
{
    return dot__run_loss(ctx, job->laned, job, dot__ceil_div(job->rows, 64),
                         job->dtype == DOT_F32 ? dot__entropy_piece_f32 : dot__entropy_piece_f64, dot__entropy_finish);
}

static void dot__cpu_entropy_backward(dot_context *ctx, dot__entropy *job)
{
    dot__parallel(ctx, job->laned, dot__ceil_div(job->rows, 64),
                  job->dtype == DOT_F32 ? dot__entropy_back_piece_f32 : dot__entropy_back_piece_f64, job);
}

static const dot__backend dot__cpu = {
    "cpu", dot__cpu_fill, dot__cpu_map, dot__cpu_map_backward, dot__cpu_zip, dot__cpu_zip_backward, dot__cpu_copy, dot__cpu_reduce,
    dot__cpu_gemm, dot__cpu_fold, dot__cpu_outer, dot__cpu_softmax, dot__cpu_softmax_backward,
    dot__cpu_attention, dot__cpu_attention_backward, dot__cpu_norm, dot__cpu_norm_backward,
    dot__cpu_pool, dot__cpu_pool_backward, dot__cpu_gather, dot__cpu_gather_backward, dot__cpu_dropout,
    dot__cpu_loss, dot__cpu_loss_backward, dot__cpu_entropy, dot__cpu_entropy_backward,
};

static const dot__backend *dot__cpu_backend(void) { return &dot__cpu; }

/* ==== [6 ops] ====================================================================================== */

/* ---- the tape ---- */

/* A recorded operation. Its own data follow: every node struct begins with a dot__node. */
struct dot__node {
    dot__node *previous;
    bool (*backward)(dot_context *ctx, dot__node *node);    /* false: an error was set */
    dot_tensor *out;
    dot_tensor *in[3];                                      /* NULL where an operation has fewer */
};

/* Checks what every operation asks of its arguments; returns the context, or NULL (silently for a NULL argument). */
static dot_context *dot__enter(const char *function, const dot_tensor *a, const dot_tensor *b)
{
    if (!a || !b || !dot_ok(a->ctx)) return NULL;
    a->ctx->function = function;
    if (a->ctx != b->ctx) {
        dot__fail(a->ctx, DOT_ERROR_STATE, "%s: tensors of different contexts", function);
        return NULL;
    }
    for (int i = 0; i < 2; ++i) {
        const dot_tensor *t = i ? b : a;
        if (t->persistent || t->step_id == t->ctx->step_id) continue;
        dot__fail(a->ctx, DOT_ERROR_STATE, "%s: tensor %s is of an earlier step; its memory has been taken back", function, DOT__SHAPE(t));
        return NULL;
    }
    if (!dot__is_float(a->dtype) || a->dtype != b->dtype) {
        dot__fail(a->ctx, DOT_ERROR_DTYPE, "%s: tensors of type %s and %s, expected one float type", function,
                  dot__dtype_name(a->dtype), dot__dtype_name(b->dtype));
        return NULL;
    }
    return a->ctx;
}

DOT__INLINE bool dot__wants_grad(const dot_tensor *t) { return t && t->requires_grad; }

/* Appends a node of `bytes` bytes to the tape if a gradient is wanted; sets *node to it or to NULL. False: no memory. */
static bool dot__record(dot_context *ctx, size_t bytes, bool (*backward)(dot_context *, dot__node *), dot_tensor *out,
                        dot_tensor *a, dot_tensor *b, dot_tensor *c, void *node_out)
{
    dot__node **node = (dot__node **)node_out;
    *node = NULL;
    if (!ctx->training || !(dot__wants_grad(a) || dot__wants_grad(b) || dot__wants_grad(c))) return true;
    *node = (dot__node *)dot__step_alloc(ctx, bytes);
    if (!*node) return false;
    memset(*node, 0, bytes);
    (*node)->backward = backward;
    (*node)->out = out;
    (*node)->in[0] = a;
    (*node)->in[1] = b;
    (*node)->in[2] = c;
    (*node)->previous = ctx->tape;
    ctx->tape = *node;
    out->node = *node;
    out->requires_grad = true;
    return true;
}

/* Gradients of what operations computed: their memory is given back when the operation has passed them on, and taken again by those
   of operations before it. The list lies in that memory itself. */
struct dot__spare {
    struct dot__spare *next;
    size_t bytes;
};

static size_t dot__grad_bytes(const dot_tensor *t)
{
    return (size_t)dot__lane_stride(t->size) * (size_t)t->ctx->lanes * dot_dtype_size(t->dtype);
}

static void dot__grad_release(dot_tensor *t)
{
    if (t->persistent || t->retains_grad || !t->grad) return;
    dot__spare *spare = (dot__spare *)(void *)t->grad->data;
    spare->bytes = dot__grad_bytes(t);
    spare->next = t->ctx->spares;
    t->ctx->spares = spare;
    t->grad = NULL;
}

/* Out of the smallest spare memory that is large enough, of these the last given back. */
static dot_tensor *dot__step_grad(const dot_tensor *t)
{
    dot_context *ctx = t->ctx;
    dot__spare **best = NULL;
    size_t bytes = dot__grad_bytes(t);
    for (dot__spare **link = &ctx->spares; *link; link = &(*link)->next)
        if ((*link)->bytes >= bytes && (!best || (*link)->bytes < (*best)->bytes)) best = link;
    if (!best) return dot__step_like(t, true);
    dot_tensor *grad = (dot_tensor *)dot__step_alloc(ctx, sizeof *grad);
    if (!grad) return NULL;
    dot__tensor_init(grad, ctx, t->dtype, t->rank, t->shape, t->size);
    grad->lane_stride = dot__lane_stride(t->size);
    grad->data = (char *)*best;
    *best = (*best)->next;
    return grad;
}

/* Where the gradient of `t` goes; *accumulate: there is one already, to be added to. NULL: no memory. */
static dot_tensor *dot__grad_target(dot_tensor *t, bool *accumulate)
{
    if (!t->grad) t->grad = t->persistent ? dot__persistent_tensor(t->ctx, t->dtype, t->rank, t->shape, t->size) : dot__step_grad(t);
    if (!t->grad) return NULL;
    *accumulate = dot__has_grad(t);
    t->has_grad = true;
    t->grad_pass = t->ctx->pass;
    return t->grad;
}

bool dot_backward(dot_tensor *loss)
{
    if (!loss || !dot_ok(loss->ctx)) return false;
    dot_context *ctx = loss->ctx;
    ctx->function = "dot_backward";
    if (!ctx->training) {
        dot__fail(ctx, DOT_ERROR_STATE, "dot_backward: in evaluation nothing is recorded; call dot_step_begin first");
        return false;
    }
    if (loss->size != 1) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_backward: tensor %s, expected one element", DOT__SHAPE(loss));
        return false;
    }
    if (!loss->node || loss->step_id != ctx->step_id) {
        dot__fail(ctx, DOT_ERROR_STATE, "dot_backward: the tensor depends on nothing that needs a gradient in this step");
        return false;
    }
    ctx->pass++;
    bool accumulate;
    dot_tensor *seed = dot__grad_target(loss, &accumulate);
    if (!seed) return false;
    ctx->backend->fill(ctx, seed->dtype, true, dot__array_of(seed), 1, 1.0);
    for (dot__node *node = loss->node; node; node = node->previous) {
        if (!dot__has_grad(node->out)) continue;
        if (!node->backward(ctx, node)) return false;
        if (!node->previous || node->previous->out != node->out) dot__grad_release(node->out);      /* a concatenation has a node for each part */
    }
    return true;
}

/* ---- elementwise, one argument ---- */

typedef struct dot__map_node { dot__node node; dot__unary op; double p, q; } dot__map_node;

static void dot__map_job(dot__map *job, dot__unary op, double p, double q, const dot_tensor *x, const dot_tensor *y)
{
    memset(job, 0, sizeof *job);
    job->dtype = y->dtype;
    job->laned = dot__laned(y);
    job->op = op;
    job->p = p;
    job->q = q;
    job->n = y->size;
    job->x = dot__array_of(x);
    job->y = dot__array_of(y);
}

static bool dot__map_backward(dot_context *ctx, dot__node *base)
{
    dot__map_node *node = (dot__map_node *)base;
    dot__map job;
    bool accumulate;
    dot_tensor *dx = dot__grad_target(base->in[0], &accumulate);
    if (!dx) return false;
    dot__map_job(&job, node->op, node->p, node->q, base->in[0], base->out);
    job.accumulate = accumulate;
    job.dy = dot__array_of(base->out->grad);
    job.dx = dot__array_of(dx);
    ctx->backend->map_backward(ctx, &job);
    return true;
}

static dot_tensor *dot__map_op(const char *function, dot__unary op, dot_tensor *x, double p, double q)
{
    dot_context *ctx = dot__enter(function, x, x);
    dot_tensor *y = ctx ? dot__step_like(x, dot__laned(x)) : NULL;
    dot__map_node *node;
    dot__map job;
    if (!y || !dot__record(ctx, sizeof *node, dot__map_backward, y, x, NULL, NULL, &node)) return NULL;
    if (node) { node->op = op; node->p = p; node->q = q; }
    dot__map_job(&job, op, p, q, x, y);
    ctx->backend->map(ctx, &job);
    return y;
}

static bool dot__finite(double x) { return x - x == 0; }

/* Refuses a parameter that is not finite or below its least value. */
static dot_tensor *dot__map_checked(const char *function, dot__unary op, dot_tensor *x, const char *name, double p, double q)
{
    if (x && dot_ok(x->ctx) && !(dot__finite(p) && dot__finite(q))) {
        dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "%s: %s %g, expected a finite number", function, name, dot__finite(p) ? q : p);
        return NULL;
    }
    return dot__map_op(function, op, x, p, q);
}

dot_tensor *dot_neg(dot_tensor *x)       { return dot__map_op("dot_neg", DOT__NEG, x, 0, 0); }
dot_tensor *dot_abs(dot_tensor *x)       { return dot__map_op("dot_abs", DOT__ABS_, x, 0, 0); }
dot_tensor *dot_exp(dot_tensor *x)       { return dot__map_op("dot_exp", DOT__EXP_, x, 0, 0); }
dot_tensor *dot_log(dot_tensor *x)       { return dot__map_op("dot_log", DOT__LOG_, x, 0, 0); }
dot_tensor *dot_sqrt(dot_tensor *x)      { return dot__map_op("dot_sqrt", DOT__SQRT_, x, 0, 0); }
dot_tensor *dot_square(dot_tensor *x)    { return dot__map_op("dot_square", DOT__SQUARE, x, 0, 0); }
dot_tensor *dot_relu(dot_tensor *x)      { return dot__map_op("dot_relu", DOT__RELU, x, 0, 0); }
dot_tensor *dot_gelu(dot_tensor *x)      { return dot__map_op("dot_gelu", DOT__GELU, x, 0, 0); }
dot_tensor *dot_gelu_tanh(dot_tensor *x) { return dot__map_op("dot_gelu_tanh", DOT__GELU_TANH, x, 0, 0); }
dot_tensor *dot_silu(dot_tensor *x)      { return dot__map_op("dot_silu", DOT__SILU, x, 0, 0); }
dot_tensor *dot_sigmoid(dot_tensor *x)   { return dot__map_op("dot_sigmoid", DOT__SIGMOID, x, 0, 0); }
dot_tensor *dot_tanh(dot_tensor *x)      { return dot__map_op("dot_tanh", DOT__TANH_, x, 0, 0); }

dot_tensor *dot_add_scalar(dot_tensor *x, double c) { return dot__map_checked("dot_add_scalar", DOT__ADD_SCALAR, x, "c", c, 0); }
dot_tensor *dot_mul_scalar(dot_tensor *x, double c) { return dot__map_checked("dot_mul_scalar", DOT__MUL_SCALAR, x, "c", c, 0); }
dot_tensor *dot_pow_scalar(dot_tensor *x, double c) { return dot__map_checked("dot_pow_scalar", DOT__POW_SCALAR, x, "c", c, 0); }

dot_tensor *dot_leaky_relu(dot_tensor *x, double slope)
{
    return dot__map_checked("dot_leaky_relu", DOT__LEAKY_RELU, x, "slope", slope, 0);
}

dot_tensor *dot_softplus(dot_tensor *x, double beta, double threshold)
{
    if (x && dot_ok(x->ctx) && !(beta > 0)) {
        dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "dot_softplus: beta %g, expected a positive number", beta);
        return NULL;
    }
    return dot__map_checked("dot_softplus", DOT__SOFTPLUS, x, "beta or threshold", beta, threshold);
}

/* ---- reductions ---- */

typedef struct dot__reduce_node { dot__node node; dot__reduction op; unsigned axes; double scale; } dot__reduce_node;

static bool dot__sum_into(dot_context *ctx, const dot_tensor *x, dot__reduction op, unsigned axes, double scale, const dot_tensor *out,
                          bool accumulate)
{
    dot__reduce job;
    memset(&job, 0, sizeof job);
    job.dtype = x->dtype;
    job.laned = dot__laned(out);
    job.accumulate = accumulate;
    job.op = op;
    job.scale = scale;
    job.rank = x->rank;
    memcpy(job.shape, x->shape, sizeof job.shape);
    job.axes = axes;
    job.x = dot__array_of(x);
    job.out = dot__array_of(out);
    return ctx->backend->reduce(ctx, &job);
}

/* Strides that read a tensor of `shape` with the axes in `axes` missing (or of size 1) as if it were whole. */
static void dot__broadcast_strides(int rank, const int64_t *shape, unsigned axes, int64_t *stride)
{
    int64_t s = 1;
    for (int i = rank - 1; i >= 0; --i) {
        bool missing = (axes >> i & 1u) != 0;
        stride[i] = missing ? 0 : s;
        if (!missing) s *= shape[i];
    }
}

static void dot__run_copy(dot_context *ctx, const dot_tensor *like, const int64_t *to_stride, dot__array to, const int64_t *from_stride,
                          dot__array from, double scale, bool accumulate)
{
    dot__copy job;
    memset(&job, 0, sizeof job);
    job.dtype = like->dtype;
    job.laned = true;
    job.accumulate = accumulate;
    job.scale = scale;
    job.rank = like->rank;
    memcpy(job.shape, like->shape, sizeof job.shape);
    memcpy(job.to_stride, to_stride, sizeof job.to_stride);
    memcpy(job.from_stride, from_stride, sizeof job.from_stride);
    job.to = to;
    job.from = from;
    ctx->backend->copy(ctx, &job);
}

static void dot__zip_job(dot__zip *job, dot__binary op, const dot_tensor *like, dot__array a, const int64_t *a_stride, dot__array b,
                         const int64_t *b_stride, dot__array z)
{
    memset(job, 0, sizeof *job);
    job->dtype = like->dtype;
    job->laned = dot__laned(like);
    job->op = op;
    job->rank = like->rank;
    memcpy(job->shape, like->shape, sizeof job->shape);
    memcpy(job->a_stride, a_stride, sizeof job->a_stride);
    memcpy(job->b_stride, b_stride, sizeof job->b_stride);
    job->a = a;
    job->b = b;
    job->z = z;
}

/* max, min: dx = dy / (number of ties) where x equals the result. */
static bool dot__extremum_backward(dot_context *ctx, dot__reduce_node *node, const dot_tensor *dx, bool accumulate)
{
    dot_tensor *x = node->node.in[0], *y = node->node.out;
    int64_t whole[DOT_MAX_RANK] = { 0 }, reduced[DOT_MAX_RANK] = { 0 };
    dot__zip zip;
    dot__contiguous_strides(x->rank, x->shape, whole);
    dot__broadcast_strides(x->rank, x->shape, node->axes, reduced);
    dot__mark mark = dot__scratch_begin(ctx);
    dot_tensor *equal = dot__step_like(x, true), *share = dot__step_like(y, true);
    if (!equal || !share) return false;
    dot__zip_job(&zip, DOT__EQUAL, equal, dot__array_of(x), whole, dot__array_of(y), reduced, dot__array_of(equal));
    ctx->backend->zip(ctx, &zip);
    if (!dot__sum_into(ctx, equal, DOT__SUM, node->axes, 1.0, share, false)) return false;
    int64_t flat[DOT_MAX_RANK] = { 0 };
    dot__contiguous_strides(y->rank, y->shape, flat);
    dot__zip_job(&zip, DOT__DIV, y, dot__array_of(y->grad), flat, dot__array_of(share), flat, dot__array_of(share));
    ctx->backend->zip(ctx, &zip);
    dot__zip_job(&zip, DOT__MUL, equal, dot__array_of(equal), whole, dot__array_of(share), reduced, dot__array_of(equal));
    ctx->backend->zip(ctx, &zip);
    dot__run_copy(ctx, x, whole, dot__array_of(dx), whole, dot__array_of(equal), 1.0, accumulate);
    dot__scratch_end(ctx, mark);
    return true;
}

static bool dot__reduce_backward(dot_context *ctx, dot__node *base)
{
    dot__reduce_node *node = (dot__reduce_node *)base;
    dot_tensor *x = base->in[0];
    bool accumulate;
    int64_t whole[DOT_MAX_RANK] = { 0 }, reduced[DOT_MAX_RANK] = { 0 };
    dot_tensor *dx = dot__grad_target(x, &accumulate);
    if (!dx) return false;
    if (node->op != DOT__SUM) return dot__extremum_backward(ctx, node, dx, accumulate);
    dot__contiguous_strides(x->rank, x->shape, whole);
    dot__broadcast_strides(x->rank, x->shape, node->axes, reduced);
    dot__run_copy(ctx, x, whole, dot__array_of(dx), reduced, dot__array_of(base->out->grad), node->scale, accumulate);
    return true;
}

static dot_tensor *dot__reduce_op(const char *function, dot__reduction op, bool mean, dot_tensor *x, unsigned axes, bool keep)
{
    dot_context *ctx = dot__enter(function, x, x);
    if (!ctx) return NULL;
    unsigned all = x->rank ? 0xffu >> (DOT_MAX_RANK - x->rank) : 0;
    if (axes == DOT_ALL_AXES) axes = all;
    if (axes & ~all) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: axes 0x%x of a tensor %s", function, axes, DOT__SHAPE(x));
        return NULL;
    }
    int64_t shape[DOT_MAX_RANK], terms = 1;
    int rank = 0;
    for (int i = 0; i < x->rank; ++i) {
        bool out = (axes >> i & 1u) != 0;
        if (out) terms *= x->shape[i];
        if (!out || keep) shape[rank++] = out ? 1 : x->shape[i];
    }
    if (terms == 0 && (mean || op != DOT__SUM)) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: nothing to reduce in a tensor %s", function, DOT__SHAPE(x));
        return NULL;
    }
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, rank, shape, dot__laned(x));
    dot__reduce_node *node;
    if (!y || !dot__record(ctx, sizeof *node, dot__reduce_backward, y, x, NULL, NULL, &node)) return NULL;
    double scale = mean ? 1.0 / (double)terms : 1.0;
    if (node) { node->op = op; node->axes = axes; node->scale = scale; }
    return dot__sum_into(ctx, x, op, axes, scale, y, false) ? y : NULL;
}

dot_tensor *dot_sum(dot_tensor *x, unsigned axes, bool keep)  { return dot__reduce_op("dot_sum", DOT__SUM, false, x, axes, keep); }
dot_tensor *dot_mean(dot_tensor *x, unsigned axes, bool keep) { return dot__reduce_op("dot_mean", DOT__SUM, true, x, axes, keep); }
dot_tensor *dot_max(dot_tensor *x, unsigned axes, bool keep)  { return dot__reduce_op("dot_max", DOT__MAX, false, x, axes, keep); }
dot_tensor *dot_min(dot_tensor *x, unsigned axes, bool keep)  { return dot__reduce_op("dot_min", DOT__MIN, false, x, axes, keep); }

/* ---- elementwise, two arguments, with broadcasting ---- */

typedef struct dot__zip_node {
    dot__node node;
    dot__binary op;
    int64_t stride[2][DOT_MAX_RANK];
    unsigned missing[2];            /* axes of the result along which an argument was broadcast */
} dot__zip_node;

static bool dot__zip_backward_one(dot_context *ctx, dot__zip_node *node, int which)
{
    dot_tensor *a = node->node.in[0], *b = node->node.in[1], *z = node->node.out, *x = node->node.in[which];
    if (!dot__wants_grad(x)) return true;
    bool accumulate;
    dot__zip job;
    dot_tensor *dx = dot__grad_target(x, &accumulate);
    if (!dx) return false;
    dot__zip_job(&job, node->op, z, dot__array_of(a), node->stride[0], dot__array_of(b), node->stride[1], dot__array_of(z->grad));
    job.second = which == 1;
    if (!node->missing[which] && !accumulate) {
        job.out = dot__array_of(dx);
        ctx->backend->zip_backward(ctx, &job);
        return true;
    }
    dot__mark mark = dot__scratch_begin(ctx);
    dot_tensor *whole = dot__step_like(z, true);
    if (!whole) return false;
    job.out = dot__array_of(whole);
    ctx->backend->zip_backward(ctx, &job);
    if (!dot__sum_into(ctx, whole, DOT__SUM, node->missing[which], 1.0, dx, accumulate)) return false;
    dot__scratch_end(ctx, mark);
    return true;
}

static bool dot__zip_backward(dot_context *ctx, dot__node *base)
{
    dot__zip_node *node = (dot__zip_node *)base;
    return dot__zip_backward_one(ctx, node, 0) && dot__zip_backward_one(ctx, node, 1);
}

static dot_tensor *dot__zip_op(const char *function, dot__binary op, dot_tensor *a, dot_tensor *b)
{
    dot_context *ctx = dot__enter(function, a, b);
    if (!ctx) return NULL;
    int rank = a->rank > b->rank ? a->rank : b->rank;
    int64_t shape[DOT_MAX_RANK];
    int64_t stride[2][DOT_MAX_RANK] = { { 0 }, { 0 } };
    unsigned missing[2] = { 0, 0 };
    for (int i = 0; i < rank; ++i) {
        int64_t size[2];
        for (int which = 0; which < 2; ++which) {
            const dot_tensor *t = which ? b : a;
            int at = i - (rank - t->rank);
            size[which] = at < 0 ? 1 : t->shape[at];
        }
        if (size[0] != size[1] && size[0] != 1 && size[1] != 1) {
            dot__fail(ctx, DOT_ERROR_SHAPE, "%s: shapes %s and %s do not broadcast", function, DOT__SHAPE(a), DOT__SHAPE(b));
            return NULL;
        }
        shape[i] = size[0] == 1 ? size[1] : size[0];
        for (int which = 0; which < 2; ++which)
            if (size[which] != shape[i]) missing[which] |= DOT_AXIS(i);
    }
    dot__broadcast_strides(rank, shape, missing[0], stride[0]);
    dot__broadcast_strides(rank, shape, missing[1], stride[1]);
    if (dot__shape_size(ctx, function, a->dtype, rank, shape) < 0) return NULL;
    dot_tensor *z = dot__step_tensor(ctx, a->dtype, rank, shape, dot__laned(a) || dot__laned(b));
    dot__zip_node *node;
    dot__zip job;
    if (!z || !dot__record(ctx, sizeof *node, dot__zip_backward, z, a, b, NULL, &node)) return NULL;
    if (node) {
        node->op = op;
        memcpy(node->stride, stride, sizeof stride);
        memcpy(node->missing, missing, sizeof missing);
    }
    dot__zip_job(&job, op, z, dot__array_of(a), stride[0], dot__array_of(b), stride[1], dot__array_of(z));
    ctx->backend->zip(ctx, &job);
    return z;
}

dot_tensor *dot_add(dot_tensor *a, dot_tensor *b)     { return dot__zip_op("dot_add", DOT__ADD, a, b); }
dot_tensor *dot_sub(dot_tensor *a, dot_tensor *b)     { return dot__zip_op("dot_sub", DOT__SUB, a, b); }
dot_tensor *dot_mul(dot_tensor *a, dot_tensor *b)     { return dot__zip_op("dot_mul", DOT__MUL, a, b); }
dot_tensor *dot_div(dot_tensor *a, dot_tensor *b)     { return dot__zip_op("dot_div", DOT__DIV, a, b); }
dot_tensor *dot_maximum(dot_tensor *a, dot_tensor *b) { return dot__zip_op("dot_maximum", DOT__MAXIMUM, a, b); }
dot_tensor *dot_minimum(dot_tensor *a, dot_tensor *b) { return dot__zip_op("dot_minimum", DOT__MINIMUM, a, b); }

/* ---- matrix products ---- */

static const int32_t dot__zero_table[1] = { 0 };

/* A matrix is a number of images of one position with one tap. */
static void dot__matrix_rows(dot__rows *r, int64_t rows, int64_t from_row, int64_t to_row)
{
    memset(r, 0, sizeof *r);
    r->images = rows;
    r->from_image = from_row;
    r->to_image = to_row;
    for (int i = 0; i < 3; ++i) {
        r->axis[i].count = r->axis[i].taps = 1;
        r->axis[i].from = r->axis[i].to = r->axis[i].tap = dot__zero_table;
    }
}

/* C [m, n] (+)= A [m, k] B, batch times; B is [k, n], or [n, k] if transposed. */
static bool dot__matrix_product(dot_context *ctx, const dot_tensor *a, const dot_tensor *b, bool transposed, const dot_tensor *bias,
                                const dot_tensor *c, int64_t batch, int64_t m, int64_t k, int64_t n, dot_activation activation,
                                bool accumulate)
{
    dot__gemm job;
    memset(&job, 0, sizeof job);
    job.dtype = a->dtype;
    job.laned = dot__laned(c);
    job.accumulate = accumulate;
    job.activation = activation;
    dot__matrix_rows(&job.rows, m, k, n);
    job.depth = k;
    job.columns = n;
    job.b_row = transposed ? 1 : n;
    job.b_column = transposed ? k : 1;
    job.batch = batch;
    job.a_batch = m * k;
    job.b_batch = k * n;
    job.c_batch = m * n;
    job.a = dot__array_of(a);
    job.b = dot__array_of(b);
    job.c = dot__array_of(c);
    job.bias = dot__array_of(bias);
    return ctx->backend->gemm(ctx, &job);
}

/* W [k, n] (+)= A [m, k] transposed times D [m, n], batch times. */
static bool dot__matrix_outer(dot_context *ctx, const dot_tensor *a, const dot_tensor *d, const dot_tensor *w, int64_t batch, int64_t m,
                              int64_t k, int64_t n, bool accumulate)
{
    dot__outer job;
    memset(&job, 0, sizeof job);
    job.dtype = a->dtype;
    job.laned = true;
    job.accumulate = accumulate;
    dot__matrix_rows(&job.rows, m, k, n);
    job.depth = k;
    job.columns = job.w_row = n;
    job.batch = batch;
    job.a_batch = m * k;
    job.d_batch = m * n;
    job.w_batch = k * n;
    job.a = dot__array_of(a);
    job.d = dot__array_of(d);
    job.w = dot__array_of(w);
    return ctx->backend->outer(ctx, &job);
}

typedef struct dot__product_node {
    dot__node node;                 /* in: a (or x), b (or the weight), bias */
    int64_t batch, m, k, n;
    dot_activation activation;
} dot__product_node;

/* The gradient of the bias: the sum over all but the last axis. */
static bool dot__bias_backward(dot_context *ctx, dot_tensor *bias, const dot_tensor *dy)
{
    if (!dot__wants_grad(bias)) return true;
    bool accumulate;
    dot_tensor *db = dot__grad_target(bias, &accumulate);
    return db && dot__sum_into(ctx, dy, DOT__SUM, (1u << (dy->rank - 1)) - 1u, 1.0, db, accumulate);
}

/* Turns the gradient of act(z) into that of z, in place: it is not needed again. */
static void dot__activation_backward(dot_context *ctx, const dot_tensor *y, dot_activation activation)
{
    static const dot__unary op[] = { DOT__UNARIES, DOT__RELU, DOT__SIGMOID, DOT__TANH_ };
    dot__map job;
    if (activation == DOT_NONE) return;
    dot__map_job(&job, op[activation], 0, 0, y, y);
    job.dy = job.dx = dot__array_of(y->grad);
    ctx->backend->map_backward(ctx, &job);
}

static bool dot__product_backward(dot_context *ctx, dot__node *base)
{
    dot__product_node *p = (dot__product_node *)base;
    dot_tensor *a = base->in[0], *b = base->in[1], *dy = base->out->grad;
    bool accumulate;
    dot__activation_backward(ctx, base->out, p->activation);
    if (dot__wants_grad(a)) {
        dot_tensor *da = dot__grad_target(a, &accumulate);
        if (!da || !dot__matrix_product(ctx, dy, b, true, NULL, da, p->batch, p->m, p->n, p->k, DOT_NONE, accumulate)) return false;
    }
    if (dot__wants_grad(b)) {
        dot_tensor *db = dot__grad_target(b, &accumulate);
        if (!db || !dot__matrix_outer(ctx, a, dy, db, p->batch, p->m, p->k, p->n, accumulate)) return false;
    }
    return dot__bias_backward(ctx, base->in[2], dy);
}

static dot_tensor *dot__product_op(dot_context *ctx, dot_tensor *a, dot_tensor *b, dot_tensor *bias, int64_t batch, int64_t m,
                                   dot_activation activation)
{
    int64_t shape[DOT_MAX_RANK], k = a->shape[a->rank - 1], n = b->shape[b->rank - 1];
    memcpy(shape, a->shape, sizeof shape);
    shape[a->rank - 1] = n;
    bool laned = dot__laned(a) || dot__laned(b) || (bias && dot__laned(bias));
    dot_tensor *c = dot__step_tensor(ctx, a->dtype, a->rank, shape, laned);
    dot__product_node *node;
    if (!c || !dot__record(ctx, sizeof *node, dot__product_backward, c, a, b, bias, &node)) return NULL;
    if (node) { node->batch = batch; node->m = m; node->k = k; node->n = n; node->activation = activation; }
    return dot__matrix_product(ctx, a, b, false, bias, c, batch, m, k, n, activation, false) ? c : NULL;
}

dot_tensor *dot_matmul(dot_tensor *a, dot_tensor *b)
{
    dot_context *ctx = dot__enter("dot_matmul", a, b);
    if (!ctx) return NULL;
    bool shared = b->rank == 2, fits = a->rank >= 2 && b->rank >= 2 && (shared || a->rank == b->rank);
    for (int i = 0; fits && !shared && i < a->rank - 2; ++i) fits = a->shape[i] == b->shape[i];
    if (!fits || a->shape[a->rank - 1] != b->shape[b->rank - 2]) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_matmul: shapes %s and %s, expected [...,M,K] and [K,N] or [...,K,N]", DOT__SHAPE(a),
                  DOT__SHAPE(b));
        return NULL;
    }
    int64_t batch = 1, m = a->shape[a->rank - 2];
    for (int i = 0; i < a->rank - 2; ++i) batch *= a->shape[i];
    return shared ? dot__product_op(ctx, a, b, NULL, 1, batch * m, DOT_NONE) : dot__product_op(ctx, a, b, NULL, batch, m, DOT_NONE);
}

/* Checks a fused activation and a bias [size]. */
static bool dot__epilogue_ok(const char *function, dot_tensor *x, dot_tensor *bias, int64_t size, dot_activation activation)
{
    if ((unsigned)activation > DOT_TANH) {
        dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "%s: activation %d, expected DOT_NONE, DOT_RELU, DOT_SIGMOID or DOT_TANH", function,
                  (int)activation);
        return false;
    }
    if (!bias) return true;
    if (!dot__enter(function, x, bias)) return false;
    if (bias->rank == 1 && bias->shape[0] == size) return true;
    dot__fail(x->ctx, DOT_ERROR_SHAPE, "%s: bias %s, expected [" DOT__I64 "]", function, DOT__SHAPE(bias), DOT__LL(size));
    return false;
}

dot_tensor *dot_linear(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, dot_activation act)
{
    dot_context *ctx = dot__enter("dot_linear", x, weight);
    if (!ctx) return NULL;
    if (weight->rank != 2 || x->rank < 1 || x->shape[x->rank - 1] != weight->shape[0]) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_linear: input %s, weight %s, expected [...,in] and [in,out]", DOT__SHAPE(x), DOT__SHAPE(weight));
        return NULL;
    }
    if (!dot__epilogue_ok("dot_linear", x, bias, weight->shape[1], act)) return NULL;
    int64_t m = 1;
    for (int i = 0; i < x->rank - 1; ++i) m *= x->shape[i];
    return dot__product_op(ctx, x, weight, bias, 1, m, act);
}

/* ---- convolution ----
   One geometry serves the convolution and its transpose: `image` is the side that is padded and strided over (the input of
   a convolution, the output of a transposed one), `grid` the other. The three products between image, grid and weight
       grid   = convolve(image, weight)        image = spread(grid, weight)        weight = correlate(image, grid)
   are the forward pass and the two gradients of either. */

typedef struct dot__geometry {
    int dims;                       /* 1, 2, 3; the missing axes come first and have size and kernel 1 */
    int64_t batch, image[3], grid[3], kernel[3], stride[3], padding[3], dilation[3];
    int64_t image_channels, grid_channels, groups;
} dot__geometry;

dot_conv_options dot_conv_defaults(void)
{
    dot_conv_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_CONV;
    o.kernel = 3;
    o.stride = o.dilation = o.groups = 1;
    o.bias = true;
    for (int i = 0; i < 3; ++i)
        o.kernel_each[i] = o.stride_each[i] = o.padding_each[i] = o.dilation_each[i] = o.output_padding_each[i] = -1;
    return o;
}

typedef struct dot__conv_sizes { int kernel[3], stride[3], padding[3], dilation[3], output_padding[3]; } dot__conv_sizes;

/* One option for each spatial axis, the missing axes first. Refuses what is below `least`, by name. */
static bool dot__each(dot_context *ctx, const char *function, const char *name, int value, const int *each, int dims, int least, int missing,
                      int *out)
{
    for (int i = 0; i < 3; ++i) {
        int axis = i - (3 - dims), v = axis < 0 ? missing : each[axis] != -1 ? each[axis] : value;
        if (v < least || v > 1 << 20) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s %d, expected %d or more", function, name, v, least);
            return false;
        }
        out[i] = v;
    }
    return true;
}

static bool dot__conv_sizes_of(dot_context *ctx, const char *function, const dot_conv_options *o, int dims, bool transposed,
                               dot__conv_sizes *s)
{
    if (o->magic != DOT__MAGIC_CONV) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: options not filled by dot_conv_defaults (magic 0x%08x)", function, (unsigned)o->magic);
        return false;
    }
    if (!dot__each(ctx, function, "kernel", o->kernel, o->kernel_each, dims, 1, 1, s->kernel)
        || !dot__each(ctx, function, "stride", o->stride, o->stride_each, dims, 1, 1, s->stride)
        || !dot__each(ctx, function, "padding", o->padding, o->padding_each, dims, 0, 0, s->padding)
        || !dot__each(ctx, function, "dilation", o->dilation, o->dilation_each, dims, 1, 1, s->dilation)
        || !dot__each(ctx, function, "output_padding", o->output_padding, o->output_padding_each, dims, 0, 0, s->output_padding))
        return false;
    if (o->groups < 1) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: groups %d, expected 1 or more", function, o->groups);
        return false;
    }
    for (int i = 0; i < 3 && transposed; ++i)
        if (s->output_padding[i] >= s->stride[i] && s->output_padding[i] >= s->dilation[i]) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: output_padding %d, expected less than the stride %d or the dilation %d", function,
                      s->output_padding[i], s->stride[i], s->dilation[i]);
            return false;
        }
    return true;
}

/* Fills in the geometry from the shapes of x and weight. */
static bool dot__geometry_of(const char *function, const dot_tensor *x, const dot_tensor *weight, const dot_conv_options *options,
                             bool transposed, dot__geometry *g)
{
    dot_context *ctx = x->ctx;
    dot_conv_options o = dot_conv_defaults();
    dot__conv_sizes s;
    if (options) o = *options;
    int dims = x->rank - 2;
    if (dims < 1 || dims > 3 || weight->rank != x->rank) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: input %s, weight %s, expected [N,spatial...,C] with 1 to 3 spatial axes and a weight of the same rank",
                  function, DOT__SHAPE(x), DOT__SHAPE(weight));
        return false;
    }
    o.kernel = 1;
    for (int i = 0; i < 3; ++i) o.kernel_each[i] = -1;
    if (!dot__conv_sizes_of(ctx, function, &o, dims, transposed, &s)) return false;
    memset(g, 0, sizeof *g);
    g->dims = dims;
    g->batch = x->shape[0];
    g->groups = o.groups;
    int64_t in = x->shape[dims + 1], per_group = weight->shape[dims], last = weight->shape[dims + 1];
    g->image_channels = per_group * g->groups;
    g->grid_channels = last;
    int64_t expected = transposed ? g->grid_channels : g->image_channels;
    if (in != expected) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: input has " DOT__I64 " channels, weight %s with %d groups takes " DOT__I64, function,
                  DOT__LL(in), DOT__SHAPE(weight), o.groups, DOT__LL(expected));
        return false;
    }
    if (last % g->groups != 0 || per_group < 1 || last < 1) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: weight %s does not divide into %d groups", function, DOT__SHAPE(weight), o.groups);
        return false;
    }
    int64_t image = g->image_channels, grid = g->grid_channels;
    for (int i = 0; i < 3; ++i) {
        int axis = i - (3 - dims);
        int64_t size = axis < 0 ? 1 : x->shape[1 + axis];
        g->kernel[i] = axis < 0 ? 1 : weight->shape[axis];
        g->stride[i] = s.stride[i];
        g->padding[i] = s.padding[i];
        g->dilation[i] = s.dilation[i];
        int64_t span = g->dilation[i] * (g->kernel[i] - 1) + 1;
        if (g->kernel[i] < 1) span = INT64_MAX / 4;
        if (transposed) {
            g->grid[i] = size;
            g->image[i] = size < 1 ? 0 : (size - 1) * g->stride[i] - 2 * g->padding[i] + span + s.output_padding[i];
        } else {
            g->image[i] = size;
            g->grid[i] = size + 2 * g->padding[i] < span ? 0 : (size + 2 * g->padding[i] - span) / g->stride[i] + 1;
        }
        if (g->image[i] < 1 || g->grid[i] < 1 || g->image[i] > INT32_MAX || g->grid[i] > INT32_MAX) {
            dot__fail(ctx, DOT_ERROR_SHAPE, "%s: kernel " DOT__I64 " (stride " DOT__I64 ", padding " DOT__I64 ", dilation " DOT__I64
                      ") does not fit the input %s", function, DOT__LL(g->kernel[i]), DOT__LL(g->stride[i]), DOT__LL(g->padding[i]),
                      DOT__LL(g->dilation[i]), DOT__SHAPE(x));
            return false;
        }
        image *= g->image[i];
        grid *= g->grid[i];
        if (image > INT32_MAX || grid > INT32_MAX) break;
    }
    if (image > INT32_MAX || grid > INT32_MAX || weight->size > INT32_MAX) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: input %s: an image of more than 2^31 elements", function, DOT__SHAPE(x));
        return false;
    }
    return true;
}

/* Elements from one position to the next along each axis. */
static void dot__spatial_strides(const int64_t *size, int64_t channels, int64_t *stride)
{
    stride[2] = channels;
    stride[1] = size[2] * channels;
    stride[0] = size[1] * stride[1];
}

static bool dot__axis_alloc(dot_context *ctx, dot__axis *axis, int64_t count, int64_t taps, int32_t **from, int32_t **to, int32_t **tap)
{
    *from = (int32_t *)dot__step_alloc(ctx, (size_t)(count * taps) * sizeof(int32_t));
    *to = (int32_t *)dot__step_alloc(ctx, (size_t)count * sizeof(int32_t));
    *tap = (int32_t *)dot__step_alloc(ctx, (size_t)taps * sizeof(int32_t));
    axis->count = count;
    axis->taps = (int)taps;
    axis->from = *from;
    axis->to = *to;
    axis->tap = *tap;
    return *from && *to && *tap;
}

/* Rows are the positions of the grid, taps those of the kernel: tap k of grid position o reads image position
   o stride - padding + k dilation. */
static bool dot__rows_of_grid(dot_context *ctx, const dot__geometry *g, dot__rows *rows)
{
    int64_t from_stride[3], to_stride[3], tap_stride[3];
    int32_t *from, *to, *tap;
    dot__spatial_strides(g->image, g->image_channels, from_stride);
    dot__spatial_strides(g->grid, g->grid_channels, to_stride);
    dot__spatial_strides(g->kernel, g->image_channels / g->groups * g->grid_channels, tap_stride);
    rows->images = g->batch;
    rows->from_image = g->image[0] * from_stride[0];
    rows->to_image = g->grid[0] * to_stride[0];
    for (int i = 0; i < 3; ++i) {
        int64_t taps = g->kernel[i];
        if (!dot__axis_alloc(ctx, &rows->axis[i], g->grid[i], taps, &from, &to, &tap)) return false;
        for (int64_t k = 0; k < taps; ++k) tap[k] = (int32_t)(k * tap_stride[i]);
        for (int64_t o = 0; o < g->grid[i]; ++o) {
            to[o] = (int32_t)(o * to_stride[i]);
            for (int64_t k = 0; k < taps; ++k) {
                int64_t at = o * g->stride[i] - g->padding[i] + k * g->dilation[i];
                from[o * taps + k] = at < 0 || at >= g->image[i] ? -1 : (int32_t)(at * from_stride[i]);
            }
        }
    }
    return true;
}

/* Rows are the positions of the image with remainders `rest` modulo the strides. Position p is read by tap k of grid position
   (p + padding - k dilation) / stride where that is whole: for a given remainder always by the same taps. A grid position has
   `from_channels` elements, and kernel positions are `tap_elements` apart. */
static bool dot__rows_of_image_class(dot_context *ctx, const dot__geometry *g, const int64_t *rest, int64_t from_channels,
                                     int64_t tap_elements, dot__rows *rows)
{
    int64_t from_stride[3], to_stride[3], tap_stride[3];
    int32_t *from, *to, *tap;
    dot__spatial_strides(g->grid, from_channels, from_stride);
    dot__spatial_strides(g->image, g->image_channels, to_stride);
    dot__spatial_strides(g->kernel, tap_elements, tap_stride);
    rows->images = g->batch;
    rows->from_image = g->grid[0] * from_stride[0];
    rows->to_image = g->image[0] * to_stride[0];
    for (int i = 0; i < 3; ++i) {
        int64_t count = g->image[i] > rest[i] ? dot__ceil_div(g->image[i] - rest[i], g->stride[i]) : 0, taps = 0;
        if (!dot__axis_alloc(ctx, &rows->axis[i], count, g->kernel[i], &from, &to, &tap)) return false;
        int64_t reach[2] = { rest[i] + g->padding[i], 0 };
        for (int64_t k = 0; k < g->kernel[i]; ++k)
            if ((reach[0] - k * g->dilation[i]) % g->stride[i] == 0) taps++;
        rows->axis[i].taps = (int)taps;
        for (int64_t p = 0; p < count; ++p) to[p] = (int32_t)((rest[i] + p * g->stride[i]) * to_stride[i]);
        for (int64_t k = 0, t = 0; k < g->kernel[i]; ++k) {
            reach[1] = reach[0] - k * g->dilation[i];
            if (reach[1] % g->stride[i] != 0) continue;
            tap[t] = (int32_t)(k * tap_stride[i]);
            for (int64_t p = 0; p < count; ++p) {
                int64_t at = reach[1] / g->stride[i] + p;
                from[p * taps + t] = at < 0 || at >= g->grid[i] ? -1 : (int32_t)(at * from_stride[i]);
            }
            t++;
        }
    }
    return true;
}

static bool dot__convolve(dot_context *ctx, const dot__geometry *g, const dot_tensor *image, const dot_tensor *weight,
                          const dot_tensor *bias, dot_activation activation, const dot_tensor *grid, bool accumulate)
{
    dot__mark mark = dot__scratch_begin(ctx);
    dot__gemm job;
    memset(&job, 0, sizeof job);
    if (!dot__rows_of_grid(ctx, g, &job.rows)) return false;
    job.dtype = image->dtype;
    job.laned = dot__laned(grid);
    job.accumulate = accumulate;
    job.activation = activation;
    job.depth = job.a_batch = g->image_channels / g->groups;
    job.columns = job.b_batch = job.c_batch = g->grid_channels / g->groups;
    job.b_row = g->grid_channels;
    job.b_column = 1;
    job.batch = g->groups;
    job.a = dot__array_of(image);
    job.b = dot__array_of(weight);
    job.bias = dot__array_of(bias);
    job.c = dot__array_of(grid);
    bool ok = ctx->backend->gemm(ctx, &job);
    dot__scratch_end(ctx, mark);
    return ok;
}

/* The remainders of class c; false when no position of the image has them. */
static bool dot__image_class(const dot__geometry *g, int64_t c, int64_t *rest)
{
    rest[0] = c / g->stride[2] / g->stride[1];
    rest[1] = c / g->stride[2] % g->stride[1];
    rest[2] = c % g->stride[2];
    return rest[0] < g->image[0] && rest[1] < g->image[1] && rest[2] < g->image[2];
}

static int64_t dot__image_classes(const dot__geometry *g) { return g->stride[0] * g->stride[1] * g->stride[2]; }

/* An image of few channels would leave most of a tile empty: the grid is multiplied with all taps side by side, as one matrix of
   taps * channels columns, and the products are folded into the image; some images at a time, so that they stay in the cache. */
static bool dot__spread_folded(dot_context *ctx, const dot__geometry *g, const dot_tensor *grid, const dot_tensor *weight,
                               const dot_tensor *bias, dot_activation activation, const dot_tensor *image, bool accumulate)
{
    int64_t channels = g->image_channels, columns = g->kernel[0] * g->kernel[1] * g->kernel[2] * channels;
    int64_t positions = g->grid[0] * g->grid[1] * g->grid[2], pixels = g->image[0] * g->image[1] * g->image[2], rest[3];
    int64_t group = dot__min(g->batch, dot__max(1, ((int64_t)1 << 18) / (positions * columns))), lanes = dot__laned(image) ? ctx->lanes : 1;
    size_t element = dot_dtype_size(image->dtype), products = (size_t)(group * positions * columns) * element;
    dot__mark mark = dot__scratch_begin(ctx);
    dot__gemm product;
    dot__fold fold;
    memset(&product, 0, sizeof product);
    memset(&fold, 0, sizeof fold);
    product.dtype = fold.dtype = image->dtype;
    product.laned = fold.laned = dot__laned(image);
    product.depth = product.b_column = g->grid_channels;
    product.columns = columns;
    product.b_row = product.batch = 1;
    product.b = dot__array_of(weight);
    product.c.lane = (int64_t)products;
    product.c.data = (char *)dot__step_alloc(ctx, products * (size_t)lanes);
    fold.accumulate = accumulate;
    fold.activation = activation;
    fold.channels = channels;
    fold.a = product.c;
    fold.bias = dot__array_of(bias);
    bool ok = product.c.data != NULL;
    for (int64_t first = 0; ok && first < g->batch; first += group) {
        dot__geometry some = *g;
        some.batch = dot__min(group, g->batch - first);
        product.a = dot__array_of(grid);
        product.a.data += (size_t)(first * positions * g->grid_channels) * element;
        dot__matrix_rows(&product.rows, some.batch * positions, g->grid_channels, columns);
        ok = ctx->backend->gemm(ctx, &product);
        for (int64_t c = 0; c < dot__image_classes(g) && ok; ++c) {
            if (!dot__image_class(g, c, rest)) continue;
            dot__mark table = dot__scratch_begin(ctx);
            if (!dot__rows_of_image_class(ctx, &some, rest, columns, channels, &fold.rows)) return false;
            fold.c = dot__array_of(image);
            fold.c.data += (size_t)(first * pixels * channels) * element;
            ctx->backend->fold(ctx, &fold);
            dot__scratch_end(ctx, table);
        }
    }
    dot__scratch_end(ctx, mark);
    return ok;
}

static bool dot__spread(dot_context *ctx, const dot__geometry *g, const dot_tensor *grid, const dot_tensor *weight,
                        const dot_tensor *bias, dot_activation activation, const dot_tensor *image, bool accumulate)
{
    bool ok = true;
    int64_t rest[3];
    if (g->groups == 1 && g->image_channels <= DOT__FOLD && weight->size / g->grid_channels <= INT32_MAX / (g->grid[0] * g->grid[1] * g->grid[2]))
        return dot__spread_folded(ctx, g, grid, weight, bias, activation, image, accumulate);
    for (int64_t c = 0; c < dot__image_classes(g) && ok; ++c) {
        if (!dot__image_class(g, c, rest)) continue;
        dot__mark mark = dot__scratch_begin(ctx);
        dot__gemm job;
        memset(&job, 0, sizeof job);
        if (!dot__rows_of_image_class(ctx, g, rest, g->grid_channels, g->image_channels / g->groups * g->grid_channels, &job.rows)) return false;
        job.dtype = grid->dtype;
        job.laned = dot__laned(image);
        job.accumulate = accumulate;
        job.activation = activation;
        job.depth = job.a_batch = job.b_batch = g->grid_channels / g->groups;
        job.columns = job.c_batch = g->image_channels / g->groups;
        job.b_row = 1;
        job.b_column = g->grid_channels;
        job.batch = g->groups;
        job.a = dot__array_of(grid);
        job.b = dot__array_of(weight);
        job.bias = dot__array_of(bias);
        job.c = dot__array_of(image);
        ok = ctx->backend->gemm(ctx, &job);
        dot__scratch_end(ctx, mark);
    }
    return ok;
}

static bool dot__correlate(dot_context *ctx, const dot__geometry *g, const dot_tensor *image, const dot_tensor *grid,
                           const dot_tensor *weight, bool accumulate)
{
    dot__mark mark = dot__scratch_begin(ctx);
    dot__outer job;
    memset(&job, 0, sizeof job);
    if (!dot__rows_of_grid(ctx, g, &job.rows)) return false;
    job.dtype = image->dtype;
    job.laned = true;
    job.accumulate = accumulate;
    job.depth = job.a_batch = g->image_channels / g->groups;
    job.columns = job.d_batch = job.w_batch = g->grid_channels / g->groups;
    job.w_row = g->grid_channels;
    job.batch = g->groups;
    job.a = dot__array_of(image);
    job.d = dot__array_of(grid);
    job.w = dot__array_of(weight);
    bool ok = ctx->backend->outer(ctx, &job);
    dot__scratch_end(ctx, mark);
    return ok;
}

typedef struct dot__conv_node { dot__node node; dot__geometry geometry; dot_activation activation; bool transposed; } dot__conv_node;

static bool dot__conv_backward(dot_context *ctx, dot__node *base)
{
    dot__conv_node *node = (dot__conv_node *)base;
    const dot__geometry *g = &node->geometry;
    dot_tensor *x = base->in[0], *weight = base->in[1], *dy = base->out->grad;
    bool accumulate, ok = true;
    dot__activation_backward(ctx, base->out, node->activation);
    if (dot__wants_grad(x)) {
        dot_tensor *dx = dot__grad_target(x, &accumulate);
        if (!dx) return false;
        ok = node->transposed ? dot__convolve(ctx, g, dy, weight, NULL, DOT_NONE, dx, accumulate)
                              : dot__spread(ctx, g, dy, weight, NULL, DOT_NONE, dx, accumulate);
    }
    if (ok && dot__wants_grad(weight)) {
        dot_tensor *dw = dot__grad_target(weight, &accumulate);
        if (!dw) return false;
        ok = node->transposed ? dot__correlate(ctx, g, dy, x, dw, accumulate) : dot__correlate(ctx, g, x, dy, dw, accumulate);
    }
    return ok && dot__bias_backward(ctx, base->in[2], dy);
}

static dot_tensor *dot__conv_op(const char *function, dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options,
                                dot_activation act, bool transposed)
{
    dot_context *ctx = dot__enter(function, x, weight);
    dot__geometry g;
    if (!ctx || !dot__geometry_of(function, x, weight, options, transposed, &g)) return NULL;
    const int64_t *size = transposed ? g.image : g.grid;
    int64_t channels = transposed ? g.image_channels : g.grid_channels, shape[5];
    if (!dot__epilogue_ok(function, x, bias, channels, act)) return NULL;
    shape[0] = g.batch;
    for (int i = 0; i < g.dims; ++i) shape[1 + i] = size[3 - g.dims + i];
    shape[1 + g.dims] = channels;
    if (dot__shape_size(ctx, function, x->dtype, g.dims + 2, shape) < 0) return NULL;
    bool laned = dot__laned(x) || dot__laned(weight) || (bias && dot__laned(bias));
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, g.dims + 2, shape, laned);
    dot__conv_node *node;
    if (!y || !dot__record(ctx, sizeof *node, dot__conv_backward, y, x, weight, bias, &node)) return NULL;
    if (node) { node->geometry = g; node->activation = act; node->transposed = transposed; }
    bool ok = transposed ? dot__spread(ctx, &g, x, weight, bias, act, y, false) : dot__convolve(ctx, &g, x, weight, bias, act, y, false);
    return ok ? y : NULL;
}

dot_tensor *dot_conv(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options, dot_activation act)
{
    return dot__conv_op("dot_conv", x, weight, bias, options, act, false);
}

dot_tensor *dot_conv_transpose(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, const dot_conv_options *options, dot_activation act)
{
    return dot__conv_op("dot_conv_transpose", x, weight, bias, options, act, true);
}

/* ---- pooling ---- */

dot_pool_options dot_pool_defaults(void)
{
    dot_pool_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_POOL;
    o.kernel = 2;
    o.dilation = 1;
    o.count_include_pad = true;
    for (int i = 0; i < 3; ++i) o.kernel_each[i] = o.stride_each[i] = o.padding_each[i] = o.dilation_each[i] = -1;
    return o;
}

/* One spatial axis of a pooling: `from` in positions of the input (times `step`), `to` the window's size with padding. */
typedef struct dot__window { int64_t in, out, kernel, stride, padding, dilation; bool adaptive; } dot__window;

static bool dot__pool_axis(dot_context *ctx, const dot__window *w, int64_t step, dot__axis *axis)
{
    int32_t *from, *to, *tap;
    int64_t taps = w->kernel;
    if (w->adaptive) {
        taps = 1;
        for (int64_t o = 0; o < w->out; ++o)
            taps = dot__max(taps, dot__ceil_div((o + 1) * w->in, w->out) - o * w->in / w->out);
    }
    if (!dot__axis_alloc(ctx, axis, w->out, taps, &from, &to, &tap)) return false;
    for (int64_t o = 0; o < w->out; ++o) {
        int64_t start = w->adaptive ? o * w->in / w->out : o * w->stride - w->padding;
        int64_t end = w->adaptive ? dot__ceil_div((o + 1) * w->in, w->out) : dot__min(start + w->kernel, w->in + w->padding);
        to[o] = (int32_t)(end - start);
        for (int64_t k = 0; k < taps; ++k) {
            int64_t at = start + k * w->dilation;
            bool inside = at >= 0 && at < w->in && (!w->adaptive || at < end);
            from[o * taps + k] = inside ? (int32_t)(at * step) : -1;
        }
    }
    return true;
}

typedef struct dot__pool_node { dot__node node; dot__window window[3]; bool maximum, count_padding; } dot__pool_node;

static bool dot__pool_run(dot_context *ctx, const dot__window *window, bool maximum, bool count_padding, const dot_tensor *x,
                          const dot_tensor *y, const dot_tensor *dy, const dot_tensor *dx, bool accumulate)
{
    dot__pool_job job;
    memset(&job, 0, sizeof job);
    dot__mark mark = dot__scratch_begin(ctx);
    int64_t step = 1;
    for (int i = 2; i >= 0; --i) {
        if (!dot__pool_axis(ctx, &window[i], step, &job.axis[i])) return false;
        step *= window[i].in;
    }
    job.dtype = x->dtype;
    job.laned = dot__laned(y);
    job.accumulate = accumulate;
    job.maximum = maximum;
    job.count_padding = count_padding;
    job.images = x->shape[0];
    job.in = step;
    job.channels = x->shape[x->rank - 1];
    job.x = dot__array_of(x);
    job.y = dot__array_of(y);
    job.dy = dot__array_of(dy);
    job.dx = dot__array_of(dx);
    if (dx) ctx->backend->pool_backward(ctx, &job); else ctx->backend->pool(ctx, &job);
    dot__scratch_end(ctx, mark);
    return true;
}

static bool dot__pool_backward(dot_context *ctx, dot__node *base)
{
    dot__pool_node *node = (dot__pool_node *)base;
    bool accumulate;
    dot_tensor *dx = dot__grad_target(base->in[0], &accumulate);
    return dx && dot__pool_run(ctx, node->window, node->maximum, node->count_padding, base->in[0], base->out, base->out->grad, dx, accumulate);
}

static dot_tensor *dot__pool_windows(dot_context *ctx, dot_tensor *x, const dot__window *window, bool maximum, bool count_padding)
{
    int64_t shape[5];
    int dims = x->rank - 2;
    shape[0] = x->shape[0];
    for (int i = 0; i < dims; ++i) shape[1 + i] = window[3 - dims + i].out;
    shape[1 + dims] = x->shape[1 + dims];
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, x->rank, shape, dot__laned(x));
    dot__pool_node *node;
    if (!y || !dot__record(ctx, sizeof *node, dot__pool_backward, y, x, NULL, NULL, &node)) return NULL;
    if (node) { memcpy(node->window, window, sizeof node->window); node->maximum = maximum; node->count_padding = count_padding; }
    return dot__pool_run(ctx, window, maximum, count_padding, x, y, NULL, NULL, false) ? y : NULL;
}

static dot_context *dot__pool_enter(const char *function, const dot_tensor *x, dot__window *window)
{
    dot_context *ctx = dot__enter(function, x, x);
    if (!ctx) return NULL;
    if (x->rank < 3 || x->rank > 5) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: input %s, expected [N,spatial...,C] with 1 to 3 spatial axes", function, DOT__SHAPE(x));
        return NULL;
    }
    int64_t image = 1;
    memset(window, 0, 3 * sizeof *window);
    for (int i = 0; i < 3; ++i) {
        int axis = i - (5 - x->rank);
        window[i].in = axis < 0 ? 1 : x->shape[1 + axis];
        image = image > INT32_MAX ? image : image * window[i].in;
        window[i].out = window[i].kernel = window[i].stride = window[i].dilation = 1;
    }
    if (image >= 1 && image <= INT32_MAX) return ctx;
    dot__fail(ctx, DOT_ERROR_SHAPE, "%s: input %s, expected 1 to 2^31 positions", function, DOT__SHAPE(x));
    return NULL;
}

/* The options by spatial axis. */
static bool dot__pool_windows_of(dot_context *ctx, const char *function, const dot_pool_options *o, int dims, bool maximum, dot__window *window)
{
    if (o->magic != DOT__MAGIC_POOL) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: options not filled by dot_pool_defaults (magic 0x%08x)", function, (unsigned)o->magic);
        return false;
    }
    int kernel[3], stride[3], padding[3], dilation[3];
    if (!dot__each(ctx, function, "kernel", o->kernel, o->kernel_each, dims, 1, 1, kernel)
        || !dot__each(ctx, function, "stride", o->stride, o->stride_each, dims, 0, 1, stride)
        || !dot__each(ctx, function, "padding", o->padding, o->padding_each, dims, 0, 0, padding)
        || !dot__each(ctx, function, "dilation", o->dilation, o->dilation_each, dims, 1, 1, dilation)) return false;
    for (int i = 0; i < 3; ++i) {
        dot__window *w = &window[i];
        w->kernel = kernel[i];
        w->stride = stride[i] ? stride[i] : kernel[i];
        w->padding = padding[i];
        w->dilation = dilation[i];
        if (w->padding <= w->kernel / 2 && (maximum || w->dilation == 1)) continue;
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: padding %d and dilation %d, expected a padding of at most half the kernel %d%s", function,
                  padding[i], dilation[i], kernel[i], maximum ? "" : " and no dilation");
        return false;
    }
    return true;
}

static dot_tensor *dot__pool_op(const char *function, dot_tensor *x, const dot_pool_options *options, bool maximum)
{
    dot__window window[3];
    dot_context *ctx = dot__pool_enter(function, x, window);
    dot_pool_options o = dot_pool_defaults();
    if (options) o = *options;
    if (!ctx || !dot__pool_windows_of(ctx, function, &o, x->rank - 2, maximum, window)) return NULL;
    for (int i = 0; i < 3; ++i) {
        dot__window *w = &window[i];
        int64_t free_span = w->in + 2 * w->padding - w->dilation * (w->kernel - 1) - 1;
        w->out = free_span < 0 ? 0 : (o.ceil_mode ? dot__ceil_div(free_span, w->stride) : free_span / w->stride) + 1;
        if (o.ceil_mode && (w->out - 1) * w->stride >= w->in + w->padding) w->out--;   /* a window must begin inside */
        if (w->out < 1) {
            dot__fail(ctx, DOT_ERROR_SHAPE, "%s: kernel " DOT__I64 " does not fit the input %s", function, DOT__LL(w->kernel), DOT__SHAPE(x));
            return NULL;
        }
    }
    return dot__pool_windows(ctx, x, window, maximum, o.count_include_pad);
}

static dot_tensor *dot__adaptive_op(const char *function, dot_tensor *x, const int64_t *sizes, bool maximum)
{
    dot__window window[3];
    dot_context *ctx = dot__pool_enter(function, x, window);
    if (!ctx || !sizes) return NULL;
    for (int i = 0; i < 3; ++i) {
        int axis = i - (5 - x->rank);
        window[i].adaptive = true;
        if (axis < 0) continue;
        if (sizes[axis] < 1 || sizes[axis] > 1 << 20) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: output size " DOT__I64 ", expected 1 or more", function, DOT__LL(sizes[axis]));
            return NULL;
        }
        window[i].out = sizes[axis];
    }
    return dot__pool_windows(ctx, x, window, maximum, false);
}

dot_tensor *dot_max_pool(dot_tensor *x, const dot_pool_options *options) { return dot__pool_op("dot_max_pool", x, options, true); }
dot_tensor *dot_avg_pool(dot_tensor *x, const dot_pool_options *options) { return dot__pool_op("dot_avg_pool", x, options, false); }
dot_tensor *dot_adaptive_max_pool(dot_tensor *x, const int64_t *sizes) { return dot__adaptive_op("dot_adaptive_max_pool", x, sizes, true); }
dot_tensor *dot_adaptive_avg_pool(dot_tensor *x, const int64_t *sizes) { return dot__adaptive_op("dot_adaptive_avg_pool", x, sizes, false); }

/* ---- softmax ---- */

typedef struct dot__softmax_node { dot__node node; int axis; bool logarithm; } dot__softmax_node;

static void dot__softmax_job(dot__softmax *job, const dot_tensor *y, int axis, bool logarithm)
{
    memset(job, 0, sizeof *job);
    job->dtype = y->dtype;
    job->laned = dot__laned(y);
    job->logarithm = logarithm;
    job->outer = job->inner = 1;
    for (int i = 0; i < axis; ++i) job->outer *= y->shape[i];
    for (int i = axis + 1; i < y->rank; ++i) job->inner *= y->shape[i];
    job->n = y->shape[axis];
    job->y = dot__array_of(y);
}

static bool dot__softmax_backward(dot_context *ctx, dot__node *base)
{
    dot__softmax_node *node = (dot__softmax_node *)base;
    dot__softmax job;
    bool accumulate;
    dot_tensor *dx = dot__grad_target(base->in[0], &accumulate);
    if (!dx) return false;
    dot__softmax_job(&job, base->out, node->axis, node->logarithm);
    job.accumulate = accumulate;
    job.dy = dot__array_of(base->out->grad);
    job.dx = dot__array_of(dx);
    ctx->backend->softmax_backward(ctx, &job);
    return true;
}

/* A valid axis number from 0, or -1 with the error set. */
static int dot__axis_of(const char *function, const dot_tensor *x, int axis)
{
    int at = axis < 0 ? axis + x->rank : axis;
    if (at >= 0 && at < x->rank) return at;
    dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "%s: axis %d of a tensor %s", function, axis, DOT__SHAPE(x));
    return -1;
}

static dot_tensor *dot__softmax_op(const char *function, dot_tensor *x, int axis, bool logarithm)
{
    dot_context *ctx = dot__enter(function, x, x);
    if (!ctx || (axis = dot__axis_of(function, x, axis)) < 0) return NULL;
    dot_tensor *y = dot__step_like(x, dot__laned(x));
    dot__softmax_node *node;
    dot__softmax job;
    if (!y || !dot__record(ctx, sizeof *node, dot__softmax_backward, y, x, NULL, NULL, &node)) return NULL;
    if (node) { node->axis = axis; node->logarithm = logarithm; }
    dot__softmax_job(&job, y, axis, logarithm);
    job.x = dot__array_of(x);
    ctx->backend->softmax(ctx, &job);
    return y;
}

dot_tensor *dot_softmax(dot_tensor *x, int axis)     { return dot__softmax_op("dot_softmax", x, axis, false); }
dot_tensor *dot_log_softmax(dot_tensor *x, int axis) { return dot__softmax_op("dot_log_softmax", x, axis, true); }

/* ---- attention ---- */

typedef struct dot__attention_node { dot__node node; dot__attention job; } dot__attention_node;

dot_attention_options dot_attention_defaults(void)
{
    dot_attention_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_ATTENTION;
    o.heads = 1;
    o.scale = (double)NAN;
    return o;
}

/* q, k, v are parts of one tensor, or three, of which some may be the same: what goes into one place is added up there, from 0. */
static bool dot__attention_backward(dot_context *ctx, dot__node *base)
{
    dot__attention job = ((dot__attention_node *)base)->job;
    bool packed = !base->in[1];
    for (int i = 0; i < 3; ++i) {
        dot_tensor *t = base->in[packed ? 0 : i], *grad;
        if (!dot__wants_grad(t)) continue;
        bool again = !packed && (t == base->in[(i + 1) % 3] || t == base->in[(i + 2) % 3]);
        if (packed && i > 0) job.accumulate[i] = job.accumulate[0];
        else if (!dot__grad_target(t, &job.accumulate[i])) return false;
        grad = t->grad;
        job.din[i] = dot__array_of(grad);
        if ((again || job.queries == 0) && !job.accumulate[i]) ctx->backend->fill(ctx, grad->dtype, true, job.din[i], grad->size, 0);
        job.accumulate[i] = job.accumulate[i] || again;
        if (packed) job.din[i].data += i * job.heads * job.size * (int64_t)dot_dtype_size(job.dtype);
    }
    job.dout = dot__array_of(base->out->grad);
    return ctx->backend->attention_backward(ctx, &job);
}

static bool dot__attention_options_ok(const char *function, const dot_attention_options *o, const dot__attention *job, const dot_tensor *q)
{
    const dot_tensor *mask = o->key_mask;
    if (o->magic != DOT__MAGIC_ATTENTION)
        dot__fail(q->ctx, DOT_ERROR_ARGUMENT, "%s: options that dot_attention_defaults did not make", function);
    else if (o->scale == o->scale && !dot__finite(o->scale))
        dot__fail(q->ctx, DOT_ERROR_ARGUMENT, "%s: scale %g, expected a finite number, or NAN for 1 / sqrt(size)", function, o->scale);
    else if (mask && mask->ctx != q->ctx)
        dot__fail(q->ctx, DOT_ERROR_STATE, "%s: a key_mask of a different context", function);
    else if (mask && !mask->persistent && mask->step_id != q->ctx->step_id)
        dot__fail(q->ctx, DOT_ERROR_STATE, "%s: key_mask %s is of an earlier step; its memory has been taken back", function, DOT__SHAPE(mask));
    else if (mask && mask->dtype != DOT_U8)
        dot__fail(q->ctx, DOT_ERROR_DTYPE, "%s: key_mask of type %s, expected u8", function, dot__dtype_name(mask->dtype));
    else if (mask && (mask->rank != 2 || mask->shape[0] != job->batch || mask->shape[1] != job->keys))
        dot__fail(q->ctx, DOT_ERROR_SHAPE, "%s: key_mask %s, expected [" DOT__I64 "," DOT__I64 "]", function, DOT__SHAPE(mask),
                  DOT__LL(job->batch), DOT__LL(job->keys));
    else if (job->keys < 1 && job->queries > 0)
        dot__fail(q->ctx, DOT_ERROR_SHAPE, "%s: no keys, expected 1 or more", function);
    else return true;
    return false;
}

static dot_tensor *dot__attention_op(const char *function, dot__attention *job, dot_tensor *const in[3], const dot_attention_options *o)
{
    dot_tensor *q = in[0], *mask = o->key_mask;
    dot_context *ctx = q->ctx;
    if (!dot__attention_options_ok(function, o, job, q)) return NULL;
    bool laned = dot__laned(q) || (in[1] && (dot__laned(in[1]) || dot__laned(in[2]))) || (mask && dot__laned(mask));
    int64_t shape[3] = { job->batch, job->queries, job->heads * job->value_size };
    int64_t statistics[3] = { job->batch, job->heads, job->queries * 2 };
    dot_tensor *y = dot__step_tensor(ctx, q->dtype, 3, shape, laned), *kept = dot__step_tensor(ctx, DOT_F64, 3, statistics, laned);
    dot__attention_node *node;
    if (!y || !kept || !dot__record(ctx, sizeof *node, dot__attention_backward, y, q, in[1], in[2], &node)) return NULL;
    job->dtype = q->dtype;
    job->laned = laned;
    job->causal = o->causal;
    job->scale = o->scale == o->scale ? o->scale : 1 / sqrt((double)job->size);
    job->key_mask = dot__array_of(mask);
    job->o = dot__array_of(y);
    job->statistics = dot__array_of(kept);
    if (node) node->job = *job;
    return ctx->backend->attention(ctx, job) ? y : NULL;
}

static bool dot__heads_ok(const char *function, const dot_tensor *t, int64_t heads, int64_t parts)
{
    if (heads >= 1 && heads <= INT32_MAX && t->rank == 3 && t->shape[2] > 0 && t->shape[2] % (heads * parts) == 0) return true;
    dot__fail(t->ctx, heads >= 1 && heads <= INT32_MAX ? DOT_ERROR_SHAPE : DOT_ERROR_ARGUMENT,
              "%s: input %s for " DOT__I64 " heads, expected [N,T,C], C a multiple of " DOT__I64 " times the heads", function,
              DOT__SHAPE(t), DOT__LL(heads), DOT__LL(parts));
    return false;
}

dot_tensor *dot_attention(dot_tensor *q, dot_tensor *k, dot_tensor *v, const dot_attention_options *options)
{
    static const char *const f = "dot_attention";
    dot_attention_options o = options ? *options : dot_attention_defaults();
    dot_context *ctx = dot__enter(f, q, k);
    dot_tensor *const in[3] = { q, k, v };
    dot__attention job;
    if (!ctx || !dot__enter(f, q, v)) return NULL;
    for (int i = 0; i < 3; ++i)
        if (!dot__heads_ok(f, in[i], o.heads, 1)) return NULL;
    if (k->shape[0] != q->shape[0] || v->shape[0] != q->shape[0] || k->shape[2] != q->shape[2] || v->shape[1] != k->shape[1]) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: q %s, k %s, v %s, expected [N,T,C], [N,S,C], [N,S,D]", f, DOT__SHAPE(q), DOT__SHAPE(k), DOT__SHAPE(v));
        return NULL;
    }
    memset(&job, 0, sizeof job);
    job.batch = q->shape[0];
    job.heads = o.heads;
    job.queries = q->shape[1];
    job.keys = k->shape[1];
    job.size = q->shape[2] / o.heads;
    job.value_size = v->shape[2] / o.heads;
    for (int i = 0; i < 3; ++i) {
        job.row[i] = in[i]->shape[2];
        job.in[i] = dot__array_of(in[i]);
    }
    return dot__attention_op(f, &job, in, &o);
}

dot_tensor *dot_self_attention(dot_tensor *qkv, const dot_attention_options *options)
{
    static const char *const f = "dot_self_attention";
    dot_attention_options o = options ? *options : dot_attention_defaults();
    dot_tensor *const in[3] = { qkv, NULL, NULL };
    dot__attention job;
    if (!dot__enter(f, qkv, qkv) || !dot__heads_ok(f, qkv, o.heads, 3)) return NULL;
    memset(&job, 0, sizeof job);
    job.batch = qkv->shape[0];
    job.heads = o.heads;
    job.queries = job.keys = qkv->shape[1];
    job.size = job.value_size = qkv->shape[2] / 3 / o.heads;
    for (int i = 0; i < 3; ++i) {
        job.row[i] = qkv->shape[2];
        job.in[i] = dot__array_of(qkv);
        job.in[i].data += i * job.heads * job.size * (int64_t)dot_dtype_size(qkv->dtype);
    }
    return dot__attention_op(f, &job, in, &o);
}

/* ---- dropout ---- */

typedef struct dot__dropout_node { dot__node node; double p; uint64_t stream; } dot__dropout_node;

static void dot__run_dropout(dot_context *ctx, double p, uint64_t stream, const dot_tensor *x, const dot_tensor *y, bool accumulate)
{
    dot__dropout_job job;
    memset(&job, 0, sizeof job);
    job.dtype = x->dtype;
    job.laned = dot__laned(y);
    job.accumulate = accumulate;
    job.n = x->size;
    job.stream = stream;
    job.threshold = (uint64_t)(p * 4294967296.0);
    job.scale = p < 1 ? 1 / (1 - p) : 0;
    job.seeds = ctx->lane_seeds;
    job.x = dot__array_of(x);
    job.y = dot__array_of(y);
    ctx->backend->dropout(ctx, &job);
}

static bool dot__dropout_backward(dot_context *ctx, dot__node *base)
{
    dot__dropout_node *node = (dot__dropout_node *)base;
    bool accumulate;
    dot_tensor *dx = dot__grad_target(base->in[0], &accumulate);
    if (!dx) return false;
    dot__run_dropout(ctx, node->p, node->stream, base->out->grad, dx, accumulate);
    return true;
}

dot_tensor *dot_dropout(dot_tensor *x, double p)
{
    dot_context *ctx = dot__enter("dot_dropout", x, x);
    if (!ctx) return NULL;
    if (!(p >= 0 && p <= 1)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_dropout: p %g, expected 0 to 1", p);
        return NULL;
    }
    if (!ctx->training || p == 0) return x;
    dot_tensor *y = dot__step_like(x, dot__laned(x) || !ctx->same_seeds);
    dot__dropout_node *node;
    if (!y || !dot__record(ctx, sizeof *node, dot__dropout_backward, y, x, NULL, NULL, &node)) return NULL;
    uint64_t stream = DOT__STREAM_DROPOUT + (ctx->step << 16) + ctx->draws++;
    if (node) { node->p = p; node->stream = stream; }
    dot__run_dropout(ctx, p, stream, x, y, false);
    return y;
}

/* ---- normalisation ---- */

typedef struct dot__norm_node { dot__node node; dot__norm job; } dot__norm_node;

static bool dot__norm_backward(dot_context *ctx, dot__node *base)
{
    dot__norm job = ((dot__norm_node *)base)->job;
    dot_tensor *grad[3] = { NULL, NULL, NULL };
    bool add[3] = { false, false, false };
    for (int i = 0; i < 3; ++i)
        if (dot__wants_grad(base->in[i]) && !(grad[i] = dot__grad_target(base->in[i], &add[i]))) return false;
    job.dy = dot__array_of(base->out->grad);
    job.dx = dot__array_of(grad[0]);
    job.dweight = dot__array_of(grad[1]);
    job.dbias = dot__array_of(grad[2]);
    job.accumulate = add[0];
    job.add_weight = add[1];
    job.add_bias = add[2];
    return ctx->backend->norm_backward(ctx, &job);
}

/* `job` holds the four sizes; weight and bias may be NULL, their shapes have been checked. */
static dot_tensor *dot__norm_op(dot_context *ctx, dot__norm *job, dot_tensor *x, dot_tensor *weight, dot_tensor *bias,
                                dot_tensor *running_mean, dot_tensor *running_var)
{
    bool laned = dot__laned(x) || (weight && dot__laned(weight)) || (bias && dot__laned(bias)) || running_mean;
    int64_t count = job->sets * job->groups;
    dot_tensor *y = dot__step_like(x, laned);
    dot_tensor *mean = dot__step_tensor(ctx, DOT_F64, 1, &count, laned), *rstd = dot__step_tensor(ctx, DOT_F64, 1, &count, laned);
    dot__norm_node *node;
    if (!y || !mean || !rstd || !dot__record(ctx, sizeof *node, dot__norm_backward, y, x, weight, bias, &node)) return NULL;
    job->dtype = x->dtype;
    job->laned = laned;
    job->weighted = weight != NULL;
    job->biased = bias != NULL;
    job->x = dot__array_of(x);
    job->y = dot__array_of(y);
    job->weight = dot__array_of(weight);
    job->bias = dot__array_of(bias);
    job->mean = dot__array_of(mean);
    job->rstd = dot__array_of(rstd);
    job->running_mean = dot__array_of(running_mean);
    job->running_var = dot__array_of(running_var);
    if (node) node->job = *job;
    if (y->size > 0) ctx->backend->norm(ctx, job);
    return y;
}

/* Checks eps and the shapes of weight, bias and statistics (each may be NULL): the `axes` last axes of x. */
static bool dot__norm_ok(const char *function, const dot_tensor *x, int axes, const dot_tensor *const *parts, int count, double eps)
{
    if (!(eps >= 0) || !dot__finite(eps)) {
        dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "%s: eps %g, expected 0 or more", function, eps);
        return false;
    }
    for (int i = 0; i < count; ++i) {
        if (!parts[i]) continue;
        if (!dot__enter(function, x, parts[i])) return false;
        if (parts[i]->rank == axes && memcmp(parts[i]->shape, x->shape + x->rank - axes, sizeof(int64_t) * (size_t)axes) == 0) continue;
        dot__fail(x->ctx, DOT_ERROR_SHAPE, "%s: weight, bias or statistics %s, expected %s", function, DOT__SHAPE(parts[i]),
                  dot__shape_text(axes, x->shape + x->rank - axes).text);
        return false;
    }
    return true;
}

dot_tensor *dot_layer_norm(dot_tensor *x, int axes, dot_tensor *weight, dot_tensor *bias, double eps)
{
    dot_context *ctx = dot__enter("dot_layer_norm", x, x);
    const dot_tensor *parts[2];
    dot__norm job;
    if (!ctx) return NULL;
    if (axes < 1 || axes > x->rank) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_layer_norm: %d axes of a tensor %s", axes, DOT__SHAPE(x));
        return NULL;
    }
    parts[0] = weight;
    parts[1] = bias;
    if (!dot__norm_ok("dot_layer_norm", x, axes, parts, 2, eps)) return NULL;
    memset(&job, 0, sizeof job);
    job.positions = job.groups = job.sets = job.channels = 1;
    for (int i = 0; i < x->rank; ++i) *(i < x->rank - axes ? &job.sets : &job.channels) *= x->shape[i];
    job.eps = eps;
    return dot__norm_op(ctx, &job, x, weight, bias, NULL, NULL);
}

dot_tensor *dot_group_norm(dot_tensor *x, int groups, dot_tensor *weight, dot_tensor *bias, double eps)
{
    dot_context *ctx = dot__enter("dot_group_norm", x, x);
    const dot_tensor *parts[2];
    dot__norm job;
    if (!ctx) return NULL;
    if (x->rank < 2 || groups < 1 || x->shape[x->rank - 1] % groups != 0) {
        dot__fail(ctx, groups < 1 ? DOT_ERROR_ARGUMENT : DOT_ERROR_SHAPE, "dot_group_norm: %d groups of the last axis of %s", groups, DOT__SHAPE(x));
        return NULL;
    }
    parts[0] = weight;
    parts[1] = bias;
    if (!dot__norm_ok("dot_group_norm", x, 1, parts, 2, eps)) return NULL;
    memset(&job, 0, sizeof job);
    job.sets = x->shape[0];
    job.positions = 1;
    for (int i = 1; i < x->rank - 1; ++i) job.positions *= x->shape[i];
    job.groups = groups;
    job.channels = x->shape[x->rank - 1] / groups;
    job.eps = eps;
    return dot__norm_op(ctx, &job, x, weight, bias, NULL, NULL);
}

dot_tensor *dot_batch_norm(dot_tensor *x, dot_tensor *weight, dot_tensor *bias, dot_tensor *running_mean, dot_tensor *running_var,
                           double momentum, double eps)
{
    dot_context *ctx = dot__enter("dot_batch_norm", x, x);
    const dot_tensor *parts[4];
    dot__norm job;
    if (!ctx) return NULL;
    if (x->rank < 2 || !(momentum >= 0 && momentum <= 1) || !running_mean != !running_var) {
        dot__fail(ctx, x->rank < 2 ? DOT_ERROR_SHAPE : DOT_ERROR_ARGUMENT,
                  "dot_batch_norm: input %s, momentum %g, expected [N,...,C], 0 to 1, and both running statistics or none", DOT__SHAPE(x),
                  momentum);
        return NULL;
    }
    parts[0] = weight;
    parts[1] = bias;
    parts[2] = running_mean;
    parts[3] = running_var;
    if (!dot__norm_ok("dot_batch_norm", x, 1, parts, 4, eps)) return NULL;
    memset(&job, 0, sizeof job);
    job.sets = job.channels = job.positions = 1;
    for (int i = 0; i < x->rank - 1; ++i) job.positions *= x->shape[i];
    job.groups = x->shape[x->rank - 1];
    job.eps = eps;
    job.momentum = momentum;
    job.fixed = !ctx->training && running_mean;
    job.tracked = ctx->training && running_mean;
    if (!job.fixed && job.positions < 2) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_batch_norm: input %s, expected more than one value per channel", DOT__SHAPE(x));
        return NULL;
    }
    return dot__norm_op(ctx, &job, x, weight, bias, running_mean, running_var);
}

/* ---- embedding ---- */

static void dot__gather_job(dot__gather *job, const dot_tensor *weight, const dot_tensor *indices, bool laned)
{
    memset(job, 0, sizeof *job);
    job->dtype = weight->dtype;
    job->laned = laned;
    job->count = indices->size;
    job->rows = weight->shape[0];
    job->width = weight->shape[1];
    job->w = dot__array_of(weight);
    job->index = dot__array_of(indices);
}

typedef struct dot__gather_node { dot__node node; dot_tensor *indices; } dot__gather_node;

static bool dot__gather_backward(dot_context *ctx, dot__node *base)
{
    dot__gather job;
    bool accumulate;
    dot_tensor *dw = dot__grad_target(base->in[0], &accumulate);
    if (!dw) return false;
    dot__gather_job(&job, base->in[0], ((dot__gather_node *)base)->indices, true);
    job.accumulate = accumulate;
    job.dy = dot__array_of(base->out->grad);
    job.dw = dot__array_of(dw);
    ctx->backend->gather_backward(ctx, &job);
    return true;
}

/* Checks a tensor of class numbers or row numbers. */
static bool dot__indices_ok(const char *function, const dot_tensor *x, const dot_tensor *indices, int64_t limit)
{
    if (indices->ctx != x->ctx || (!indices->persistent && indices->step_id != x->ctx->step_id)) {
        dot__fail(x->ctx, DOT_ERROR_STATE, "%s: indices of another context or an earlier step", function);
        return false;
    }
    if (indices->dtype != DOT_I64) {
        dot__fail(x->ctx, DOT_ERROR_DTYPE, "%s: indices of type %s, expected I64", function, dot__dtype_name(indices->dtype));
        return false;
    }
    for (int lane = 0; lane < (dot__laned(indices) ? x->ctx->lanes : 1); ++lane)
        for (int64_t i = 0; i < indices->size && !(dot__laned(indices) && x->ctx->lane_stopped[lane]); ++i) {
            int64_t v = ((const int64_t *)dot__at(indices, lane))[i];
            if (v >= 0 && v < limit) continue;
            dot__fail(x->ctx, DOT_ERROR_ARGUMENT, "%s: index " DOT__I64 ", expected 0.." DOT__I64, function, DOT__LL(v), DOT__LL(limit - 1));
            return false;
        }
    return true;
}

dot_tensor *dot_embedding(dot_tensor *weight, dot_tensor *indices)
{
    dot_context *ctx = dot__enter("dot_embedding", weight, weight);
    if (!ctx || !indices) return NULL;
    if (weight->rank != 2 || indices->rank >= DOT_MAX_RANK) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_embedding: weight %s, indices %s, expected [rows,size]", DOT__SHAPE(weight), DOT__SHAPE(indices));
        return NULL;
    }
    if (!dot__indices_ok("dot_embedding", weight, indices, weight->shape[0])) return NULL;
    int64_t shape[DOT_MAX_RANK];
    memcpy(shape, indices->shape, sizeof shape);
    shape[indices->rank] = weight->shape[1];
    if (dot__shape_size(ctx, "dot_embedding", weight->dtype, indices->rank + 1, shape) < 0) return NULL;
    dot_tensor *y = dot__step_tensor(ctx, weight->dtype, indices->rank + 1, shape, dot__laned(weight) || dot__laned(indices));
    dot__gather_node *node;
    dot__gather job;
    if (!y || !dot__record(ctx, sizeof *node, dot__gather_backward, y, weight, NULL, NULL, &node)) return NULL;
    if (node) node->indices = indices;
    dot__gather_job(&job, weight, indices, dot__laned(y));
    job.y = dot__array_of(y);
    ctx->backend->gather(ctx, &job);
    return y;
}

/* ---- shapes ---- */

/* Another shape for the same elements. */
static dot_tensor *dot__step_view(dot_tensor *x, int rank, const int64_t *shape)
{
    dot_tensor *t = (dot_tensor *)dot__step_alloc(x->ctx, sizeof *t);
    if (!t) return NULL;
    dot__tensor_init(t, x->ctx, x->dtype, rank, shape, x->size);
    t->lane_stride = x->lane_stride;
    t->data = x->data;
    return t;
}

/* A first gradient needs no copy: it is the same memory under x's shape. */
static bool dot__reshape_backward(dot_context *ctx, dot__node *base)
{
    dot_tensor *x = base->in[0];
    bool accumulate;
    if (!x->persistent && !x->grad && !base->out->retains_grad) {      /* the memory is handed on */
        x->grad = dot__step_view(base->out->grad, x->rank, x->shape);
        x->grad_pass = ctx->pass;
        base->out->grad = NULL;
        return x->grad != NULL;
    }
    dot_tensor *dx = dot__grad_target(x, &accumulate);
    if (!dx) return false;
    int64_t stride[DOT_MAX_RANK] = { 0 };
    dot__contiguous_strides(x->rank, x->shape, stride);
    dot__run_copy(ctx, x, stride, dot__array_of(dx), stride, dot__array_of(base->out->grad), 1.0, accumulate);
    return true;
}

dot_tensor *dot_reshape(dot_tensor *x, int rank, const int64_t *shape)
{
    dot_context *ctx = dot__enter("dot_reshape", x, x);
    if (!ctx) return NULL;
    int64_t size[DOT_MAX_RANK], known = 1;
    int unknown = -1;
    bool ok = rank >= 0 && rank <= DOT_MAX_RANK && (rank == 0 || shape);
    if (!ok) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_reshape: rank %d, expected 0..%d and a shape", rank, DOT_MAX_RANK);
        return NULL;
    }
    for (int i = 0; ok && i < rank; ++i) {
        size[i] = shape[i];
        if (shape[i] == -1 && unknown < 0) unknown = i;
        else if (shape[i] < 0 || (shape[i] > 0 && known > INT64_MAX / 4 / shape[i])) ok = false;
        else known *= shape[i];
    }
    if (ok && unknown >= 0) {
        ok = known > 0 && x->size % known == 0;
        if (ok) { size[unknown] = x->size / known; known = x->size; }
    }
    if (!ok || known != x->size) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_reshape: %s does not make %s", DOT__SHAPE(x), dot__shape_text(rank, shape).text);
        return NULL;
    }
    dot_tensor *y = dot__step_view(x, rank, size);
    void *node;
    return y && dot__record(ctx, sizeof(dot__node), dot__reshape_backward, y, x, NULL, NULL, &node) ? y : NULL;
}

dot_tensor *dot_detach(dot_tensor *x)
{
    return dot__enter("dot_detach", x, x) ? dot__step_view(x, x->rank, x->shape) : NULL;
}

/* permute, concat, slice and pad copy a box of one tensor to a box of another; backward copies back. */
typedef struct dot__box {
    int64_t shape[DOT_MAX_RANK];            /* of the box, in the order of the result */
    int64_t x_stride[DOT_MAX_RANK], y_stride[DOT_MAX_RANK];
    int64_t x_offset, y_offset;
} dot__box;

typedef struct dot__box_node { dot__node node; dot__box box; } dot__box_node;

static void dot__copy_box(dot_context *ctx, const dot__box *box, const dot_tensor *x, const dot_tensor *y, bool back, bool accumulate)
{
    dot__copy job;
    int64_t element = (int64_t)dot_dtype_size(x->dtype);
    memset(&job, 0, sizeof job);
    job.dtype = x->dtype;
    job.laned = dot__laned(back ? x : y);
    job.accumulate = accumulate;
    job.scale = 1;
    job.rank = y->rank;
    memcpy(job.shape, box->shape, sizeof job.shape);
    memcpy(job.to_stride, back ? box->x_stride : box->y_stride, sizeof job.to_stride);
    memcpy(job.from_stride, back ? box->y_stride : box->x_stride, sizeof job.from_stride);
    dot__array xs = dot__array_of(x), ys = dot__array_of(y);
    xs.data += box->x_offset * element;
    ys.data += box->y_offset * element;
    job.to = back ? xs : ys;
    job.from = back ? ys : xs;
    ctx->backend->copy(ctx, &job);
}

static bool dot__box_backward(dot_context *ctx, dot__node *base)
{
    bool accumulate;
    dot_tensor *x = base->in[0], *dx = dot__grad_target(x, &accumulate);
    if (!dx) return false;
    if (!accumulate) ctx->backend->fill(ctx, dx->dtype, true, dot__array_of(dx), dx->size, 0.0);   /* outside the box */
    dot__copy_box(ctx, &((dot__box_node *)base)->box, dx, base->out->grad, true, true);
    return true;
}

static bool dot__box_op(dot_context *ctx, const dot__box *box, dot_tensor *x, dot_tensor *y)
{
    dot__box_node *node;
    if (!dot__record(ctx, sizeof *node, dot__box_backward, y, x, NULL, NULL, &node)) return false;
    if (node) node->box = *box;
    dot__copy_box(ctx, box, x, y, false, false);
    return true;
}

dot_tensor *dot_permute(dot_tensor *x, const int *axes)
{
    dot_context *ctx = dot__enter("dot_permute", x, x);
    if (!ctx || (!axes && x->rank > 0)) return NULL;
    int64_t stride[DOT_MAX_RANK];
    unsigned seen = 0;
    dot__box box;
    memset(&box, 0, sizeof box);
    dot__contiguous_strides(x->rank, x->shape, stride);
    for (int i = 0; i < x->rank; ++i) {
        if (axes[i] < 0 || axes[i] >= x->rank || (seen >> axes[i] & 1u)) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_permute: axis %d at position %d, expected each of 0..%d once", axes[i], i, x->rank - 1);
            return NULL;
        }
        seen |= 1u << axes[i];
        box.shape[i] = x->shape[axes[i]];
        box.x_stride[i] = stride[axes[i]];
    }
    dot__contiguous_strides(x->rank, box.shape, box.y_stride);
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, x->rank, box.shape, dot__laned(x));
    return y && dot__box_op(ctx, &box, x, y) ? y : NULL;
}

dot_tensor *dot_slice(dot_tensor *x, int axis, int64_t begin, int64_t end)
{
    dot_context *ctx = dot__enter("dot_slice", x, x);
    if (!ctx || (axis = dot__axis_of("dot_slice", x, axis)) < 0) return NULL;
    if (begin < 0 || end < begin || end > x->shape[axis]) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_slice: " DOT__I64 ".." DOT__I64 " of axis %d of %s", DOT__LL(begin), DOT__LL(end), axis,
                  DOT__SHAPE(x));
        return NULL;
    }
    dot__box box;
    memset(&box, 0, sizeof box);
    memcpy(box.shape, x->shape, sizeof box.shape);
    box.shape[axis] = end - begin;
    dot__contiguous_strides(x->rank, x->shape, box.x_stride);
    dot__contiguous_strides(x->rank, box.shape, box.y_stride);
    box.x_offset = begin * box.x_stride[axis];
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, x->rank, box.shape, dot__laned(x));
    return y && dot__box_op(ctx, &box, x, y) ? y : NULL;
}

dot_tensor *dot_pad(dot_tensor *x, const int64_t *before, const int64_t *after, double value)
{
    dot_context *ctx = dot__enter("dot_pad", x, x);
    if (!ctx || !before || !after) return NULL;
    dot__box box;
    int64_t shape[DOT_MAX_RANK];
    memset(&box, 0, sizeof box);
    for (int i = 0; i < x->rank; ++i) {
        if (before[i] < 0 || after[i] < 0 || before[i] > INT64_MAX / 8 || after[i] > INT64_MAX / 8) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_pad: " DOT__I64 " before and " DOT__I64 " after on axis %d, expected 0 or more",
                      DOT__LL(before[i]), DOT__LL(after[i]), i);
            return NULL;
        }
        box.shape[i] = x->shape[i];
        shape[i] = before[i] + x->shape[i] + after[i];
    }
    if (dot__shape_size(ctx, "dot_pad", x->dtype, x->rank, shape) < 0) return NULL;
    dot__contiguous_strides(x->rank, x->shape, box.x_stride);
    dot__contiguous_strides(x->rank, shape, box.y_stride);
    for (int i = 0; i < x->rank; ++i) box.y_offset += before[i] * box.y_stride[i];
    dot_tensor *y = dot__step_tensor(ctx, x->dtype, x->rank, shape, dot__laned(x));
    if (!y) return NULL;
    ctx->backend->fill(ctx, y->dtype, dot__laned(y), dot__array_of(y), y->size, value);
    return dot__box_op(ctx, &box, x, y) ? y : NULL;
}

/* Each argument is recorded as a box of the result; their nodes share it. */
dot_tensor *dot_concat(dot_tensor *const *tensors, int count, int axis)
{
    if (!tensors || !tensors[0]) return NULL;
    dot_tensor *first = tensors[0];
    dot_context *ctx = dot__enter("dot_concat", first, first);
    if (ctx && count < 1) dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_concat: %d tensors, expected 1 or more", count);
    if (!dot_ok(ctx)) return NULL;
    if (!ctx || (axis = dot__axis_of("dot_concat", first, axis)) < 0) return NULL;
    int64_t shape[DOT_MAX_RANK];
    bool laned = false;
    memcpy(shape, first->shape, sizeof shape);
    shape[axis] = 0;
    for (int t = 0; t < count; ++t) {
        if (!dot__enter("dot_concat", first, tensors[t])) return NULL;
        bool fits = tensors[t]->rank == first->rank;
        for (int i = 0; fits && i < first->rank; ++i) fits = i == axis || tensors[t]->shape[i] == first->shape[i];
        if (!fits) {
            dot__fail(ctx, DOT_ERROR_SHAPE, "dot_concat: shapes %s and %s differ in more than axis %d", DOT__SHAPE(first),
                      DOT__SHAPE(tensors[t]), axis);
            return NULL;
        }
        shape[axis] += tensors[t]->shape[axis];
        laned = laned || dot__laned(tensors[t]);
    }
    dot_tensor *y = dot__step_tensor(ctx, first->dtype, first->rank, shape, laned);
    int64_t at = 0;
    for (int t = 0; y && t < count; ++t) {
        dot__box box;
        memset(&box, 0, sizeof box);
        memcpy(box.shape, tensors[t]->shape, sizeof box.shape);
        dot__contiguous_strides(first->rank, tensors[t]->shape, box.x_stride);
        dot__contiguous_strides(first->rank, shape, box.y_stride);
        box.y_offset = at * box.y_stride[axis];
        at += tensors[t]->shape[axis];
        if (!dot__box_op(ctx, &box, tensors[t], y)) return NULL;
    }
    return y;
}

/* ==== [7 layers] =================================================================================== */

/* A parameter knows PyTorch's view of itself: `shape` in PyTorch's order, where one reported axis may be split into several
   (a linear layer after a flatten: [out, C*S] is [out, C, S]); axis i lies at position `axis[i]` of the stored order. */
typedef struct dot__layout { int rank; int64_t shape[DOT_MAX_RANK]; int axis[DOT_MAX_RANK]; } dot__layout;

typedef struct dot__parameter {
    struct dot__parameter *next;
    char name[DOT_MAX_NAME];
    dot_parameter_kind kind;
    dot_tensor *tensor;
    dot__layout layout;
    int rank;                       /* reported */
    int64_t shape[DOT_MAX_RANK];
    bool draw_default, draw_normal; /* the values are the layer's own first draw; how they were drawn */
    double draw_scale;
    uint64_t draw_stream;
} dot__parameter;

struct dot_layer {
    dot_context *ctx;
    const char *kind;
    char name[DOT_MAX_NAME];
    dot_layer *parent, *children, *next;                /* first child; next sibling */
    dot__parameter *parameters;
    dot_tensor *(*forward)(dot_layer *layer, dot_tensor *x, dot_activation act);
    bool fuses;                                         /* forward applies `act` itself */
    bool numbered;                                      /* its name is its position */
    bool elementwise;                                   /* does not care about the order of features */
    dot_activation activation;                          /* what a layer before it may apply in its stead */
    dot_forward_function custom;
    void *user;
    dot_tensor *weight, *bias, *mean, *var, *batches;
    dot_conv_options conv;
    dot_pool_options pool;
    bool transposed, absorbed;
    double p, q;
    int groups;
    int64_t in, out;                                    /* features or channels */
    int64_t in_channels, out_channels;                  /* linear: how its features split into channels, or 0 */
    int64_t size[4];                                    /* unflatten, adaptive pool: depth, height, width, channels; unused 0 */
};

/* ---- the tree ---- */

static bool dot__name_ok(dot_context *ctx, const char *function, const char *name)
{
    size_t n = name ? strlen(name) : 0;
    if (n > 0 && n < DOT_MAX_NAME && !strchr(name, '.')) return true;
    dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: name \"%.40s\" of %d bytes, expected 1 to %d bytes without a point", function,
              name ? name : "(NULL)", n < INT_MAX ? (int)n : INT_MAX, DOT_MAX_NAME - 1);
    return false;
}

static dot_layer *dot__layer_new(dot_context *ctx, const char *function, const char *kind,
                                 dot_tensor *(*forward)(dot_layer *, dot_tensor *, dot_activation))
{
    if (!dot_ok(ctx)) return NULL;
    ctx->function = function;
    dot_layer *layer = (dot_layer *)dot__new(ctx, sizeof *layer);
    if (!layer) return NULL;
    layer->ctx = ctx;
    layer->kind = kind;
    layer->forward = forward;
    return layer;
}

/* A layer that could not be completed goes, with what it had. */
static dot_layer *dot__layer_abandon(dot_layer *layer)
{
    for (dot__parameter *p = layer->parameters, *next; p; p = next) {
        next = p->next;
        dot__delete(layer->ctx, p->tensor->data);
        dot__delete(layer->ctx, p->tensor);
        dot__delete(layer->ctx, p);
    }
    dot__delete(layer->ctx, layer);
    return NULL;
}

static bool dot__adopt(const char *function, dot_layer *parent, const char *name, dot_layer *child)
{
    dot_context *ctx = parent->ctx;
    if (child->ctx != ctx) {
        dot__fail(ctx, DOT_ERROR_STATE, "%s: layer \"%s\" of another context", function, child->kind);
        return false;
    }
    bool cycle = false;
    for (dot_layer *up = parent; up; up = up->parent) cycle = cycle || up == child;
    if (child->parent || cycle) {
        dot__fail(ctx, DOT_ERROR_STATE, "%s: layer \"%s\" %s", function, child->kind,
                  cycle ? "would contain itself" : "has a parent already");
        return false;
    }
    dot_layer **link = &parent->children;
    for (; *link; link = &(*link)->next)
        if (strcmp((*link)->name, name) == 0) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: two children named \"%s\"", function, name);
            return false;
        }
    memmove(child->name, name, strlen(name) + 1);
    child->parent = parent;
    *link = child;
    return true;
}

bool dot_layer_add_child(dot_layer *parent, const char *name, dot_layer *child)
{
    return parent && child && dot_ok(parent->ctx) && dot__name_ok(parent->ctx, "dot_layer_add_child", name)
        && dot__adopt("dot_layer_add_child", parent, name, child);
}

dot_layer *dot_layer_name(dot_layer *layer, const char *name)
{
    if (!layer || !dot_ok(layer->ctx) || !dot__name_ok(layer->ctx, "dot_layer_name", name)) return NULL;
    for (dot_layer *other = layer->parent ? layer->parent->children : NULL; other; other = other->next)
        if (other != layer && strcmp(other->name, name) == 0) {
            dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_layer_name: two children named \"%s\"", name);
            return NULL;
        }
    memcpy(layer->name, name, strlen(name) + 1);
    return layer;
}

/* ---- parameters ---- */

static dot__parameter *dot__add_parameter(dot_layer *layer, const char *function, const char *name, dot_parameter_kind kind,
                                          dot_dtype dtype, int rank, const int64_t *shape)
{
    dot_context *ctx = layer->ctx;
    dot__parameter **link = &layer->parameters;
    for (; *link; link = &(*link)->next)
        if (strcmp((*link)->name, name) == 0) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: two parameters named \"%s\"", function, name);
            return NULL;
        }
    int64_t size = dot__shape_size(ctx, function, dtype, rank, shape);
    if (size < 0) return NULL;
    dot__parameter *p = (dot__parameter *)dot__new(ctx, sizeof *p);
    dot_tensor *t = p ? dot__persistent_tensor(ctx, dtype, rank, shape, size) : NULL;
    if (!t) {
        dot__delete(ctx, p);
        return NULL;
    }
    memcpy(p->name, name, strlen(name) + 1);
    p->kind = kind;
    p->tensor = t;
    p->rank = p->layout.rank = rank;
    for (int i = 0; i < rank; ++i) {
        p->shape[i] = p->layout.shape[i] = shape[i];
        p->layout.axis[i] = i;
    }
    t->requires_grad = kind != DOT_KIND_BUFFER;
    *link = p;
    return p;
}

dot_tensor *dot_layer_add_parameter(dot_layer *layer, const char *name, dot_parameter_kind kind, int rank, const int64_t *shape)
{
    if (!layer || !dot_ok(layer->ctx) || !dot__name_ok(layer->ctx, "dot_layer_add_parameter", name)) return NULL;
    if (kind != DOT_KIND_WEIGHT && kind != DOT_KIND_BIAS && kind != DOT_KIND_NORM && kind != DOT_KIND_EMBEDDING && kind != DOT_KIND_BUFFER) {
        dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_layer_add_parameter: kind %d, expected one DOT_KIND_...", (int)kind);
        return NULL;
    }
    dot__parameter *p = dot__add_parameter(layer, "dot_layer_add_parameter", name, kind, layer->ctx->dtype, rank, shape);
    return p ? p->tensor : NULL;
}

/* Stored element of each of PyTorch's elements, in PyTorch's order. */
typedef struct dot__torch_walk { const dot__layout *layout; int64_t at[DOT_MAX_RANK], stride[DOT_MAX_RANK], offset; } dot__torch_walk;

static dot__torch_walk dot__torch_begin(const dot__layout *layout)
{
    dot__torch_walk w;
    int64_t stored[DOT_MAX_RANK] = { 0 }, stride[DOT_MAX_RANK] = { 0 };
    memset(&w, 0, sizeof w);
    w.layout = layout;
    for (int i = 0; i < layout->rank; ++i) stored[layout->axis[i]] = layout->shape[i];
    dot__contiguous_strides(layout->rank, stored, stride);
    for (int i = 0; i < layout->rank; ++i) w.stride[i] = stride[layout->axis[i]];
    return w;
}

DOT__INLINE void dot__torch_next(dot__torch_walk *w)
{
    for (int i = w->layout->rank - 1; i >= 0; --i) {
        w->offset += w->stride[i];
        if (++w->at[i] < w->layout->shape[i]) return;
        w->offset -= w->at[i] * w->stride[i];
        w->at[i] = 0;
    }
}

static void dot__torch_get(const dot__layout *layout, dot_dtype dtype, const void *data, int64_t count, double *out)
{
    dot__torch_walk w = dot__torch_begin(layout);
    for (int64_t i = 0; i < count; ++i, dot__torch_next(&w)) out[i] = dot__load(data, dtype, w.offset);
}

static void dot__torch_set(const dot__layout *layout, dot_dtype dtype, void *data, int64_t count, const double *values)
{
    dot__torch_walk w = dot__torch_begin(layout);
    for (int64_t i = 0; i < count; ++i, dot__torch_next(&w)) dot__store(data, dtype, w.offset, values[i]);
}

/* Calls visit(user, full name, parameter) for the parameters of the layer and all below it; stops where it returns false. */
typedef bool (*dot__visitor)(void *user, const char *name, dot__parameter *p);
static bool dot__visit(dot_layer *layer, const char *prefix, dot__visitor visit, void *user)
{
    char name[DOT_MAX_NAME * 2];
    for (dot__parameter *p = layer->parameters; p; p = p->next) {
        if (snprintf(name, sizeof name, "%s%s", prefix, p->name) >= DOT_MAX_NAME) {
            dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dotopt: parameter name %.60s... is longer than %d bytes", name, DOT_MAX_NAME - 1);
            return false;
        }
        if (!visit(user, name, p)) return false;
    }
    for (dot_layer *child = layer->children; child; child = child->next) {
        snprintf(name, sizeof name, "%s%s.", prefix, child->name);
        if (!dot__visit(child, name, visit, user)) return false;
    }
    return true;
}

typedef struct dot__lookup {
    int index, wanted;                          /* by number, or */
    const char *name;                           /* by name */
    dot__parameter *found;
    char found_name[DOT_MAX_NAME];
    int64_t elements;                           /* trainable ones seen */
} dot__lookup;

static bool dot__lookup_visit(void *user, const char *name, dot__parameter *p)
{
    dot__lookup *l = (dot__lookup *)user;
    if (p->kind != DOT_KIND_BUFFER) l->elements += p->tensor->size;
    if (l->name ? strcmp(l->name, name) == 0 : l->index == l->wanted) {
        l->found = p;
        memcpy(l->found_name, name, strlen(name) + 1);
    }
    l->index++;
    return true;
}

static dot__lookup dot__find(dot_layer *layer, const char *name, int index)
{
    dot__lookup l;
    memset(&l, 0, sizeof l);
    l.name = name;
    l.wanted = index;
    dot__visit(layer, "", dot__lookup_visit, &l);
    return l;
}

int dot_layer_parameters(dot_layer *layer) { return layer ? dot__find(layer, NULL, -1).index : 0; }
int64_t dot_layer_parameter_count(dot_layer *layer) { return layer ? dot__find(layer, NULL, -1).elements : 0; }

bool dot_layer_parameter(dot_layer *layer, int index, dot_parameter_info *info)
{
    if (!layer || !info) return false;
    dot__lookup l = dot__find(layer, NULL, index);
    if (!l.found) {
        dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_layer_parameter: index %d, expected 0..%d", index, l.index - 1);
        return false;
    }
    memset(info, 0, sizeof *info);
    memcpy(info->name, l.found_name, sizeof info->name);
    info->kind = l.found->kind;
    info->tensor = l.found->tensor;
    info->rank = l.found->rank;
    memcpy(info->shape, l.found->shape, sizeof info->shape);
    return true;
}

static dot__parameter *dot__named(const char *function, dot_layer *layer, const char *name)
{
    dot__parameter *p = name ? dot__find(layer, name, -1).found : NULL;
    if (!p) dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "%s: no parameter \"%.60s\"", function, name ? name : "(NULL)");
    return p;
}

bool dot_parameter_get(dot_layer *layer, const char *name, int lane, double *out, int64_t count)
{
    dot__parameter *p = layer ? dot__named("dot_parameter_get", layer, name) : NULL;
    if (!p || !dot__transfer_ok("dot_parameter_get", p->tensor, lane, out, count, false)) return false;
    dot__torch_get(&p->layout, p->tensor->dtype, dot__at(p->tensor, lane), count, out);
    return true;
}

bool dot_parameter_set(dot_layer *layer, const char *name, int lane, const double *values, int64_t count)
{
    dot__parameter *p = layer ? dot__named("dot_parameter_set", layer, name) : NULL;
    if (!p || !dot__transfer_ok("dot_parameter_set", p->tensor, lane, values, count, true)) return false;
    for (int k = 0; k < layer->ctx->lanes; ++k)
        if (lane == DOT_ALL || lane == k) dot__torch_set(&p->layout, p->tensor->dtype, dot__at(p->tensor, k), count, values);
    return true;
}

bool dot_parameter_grad(dot_layer *layer, const char *name, int lane, double *out, int64_t count)
{
    dot__parameter *p = layer ? dot__named("dot_parameter_grad", layer, name) : NULL;
    if (!p || !dot__transfer_ok("dot_parameter_grad", p->tensor, lane, out, count, false)) return false;
    dot_tensor *g = dot_tensor_grad(p->tensor);
    if (g) dot__torch_get(&p->layout, g->dtype, dot__at(g, lane), count, out);
    else for (int64_t i = 0; i < count; ++i) out[i] = 0;
    return true;
}

bool dot_parameter_set_grad(dot_layer *layer, const char *name, int lane, const double *values, int64_t count)
{
    dot__parameter *p = layer ? dot__named("dot_parameter_set_grad", layer, name) : NULL;
    if (!p || !dot__transfer_ok("dot_parameter_set_grad", p->tensor, lane, values, count, true)) return false;
    if (p->kind == DOT_KIND_BUFFER) {
        dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_parameter_set_grad: '%s' is a buffer, which has no gradient", name);
        return false;
    }
    bool had;
    layer->ctx->function = "dot_parameter_set_grad";
    dot_tensor *g = dot__grad_target(p->tensor, &had);
    if (!g) return false;
    for (int k = 0; k < layer->ctx->lanes; ++k)
        if (lane == DOT_ALL || lane == k) dot__torch_set(&p->layout, g->dtype, dot__at(g, k), count, values);
        else if (!had) memset(dot__at(g, k), 0, (size_t)g->size * dot_dtype_size(g->dtype));
    return true;
}

static bool dot__zero_grad_visit(void *user, const char *name, dot__parameter *p)
{
    (void)user; (void)name;
    p->tensor->has_grad = false;
    return true;
}

bool dot_zero_grad(dot_layer *layer) { return layer && dot__visit(layer, "", dot__zero_grad_visit, NULL); }

/* ---- initialisation: element i in PyTorch's order is draw i of the parameter's stream ---- */

/* Makes the draw, or, with `compare`, says whether the values still are what it made. */
static bool dot__draw(dot__parameter *p, bool compare)
{
    dot_context *ctx = p->tensor->ctx;
    double pair[2] = { 0, 0 };
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        uint64_t seed = ctx->lane_seeds[lane];
        dot__torch_walk w = dot__torch_begin(&p->layout);
        void *data = dot__at(p->tensor, lane);
        for (int64_t i = 0; i < p->tensor->size; ++i, dot__torch_next(&w)) {
            if (!p->draw_normal && i % 2 == 0) dot__random_pair(seed, p->draw_stream, (uint64_t)i / 2, pair);
            double value = p->draw_scale * (p->draw_normal ? dot_random_normal(seed, p->draw_stream, (uint64_t)i) : 2 * pair[i % 2] - 1);
            if (!compare) dot__store(data, p->tensor->dtype, w.offset, value);
            else if (dot__load(data, p->tensor->dtype, w.offset) != (p->tensor->dtype == DOT_F32 ? (double)(float)value : value))
                return false;
        }
    }
    return true;
}

static void dot__init_random(dot__parameter *p, bool normal, double scale)
{
    p->draw_default = false;
    p->draw_normal = normal;
    p->draw_scale = scale;
    p->draw_stream = DOT__STREAM_INIT + p->tensor->ctx->inits++;
    dot__draw(p, false);
}

/* C leaves open in which order the arguments of dot_nn_sequential are evaluated, hence in which order its layers drew their
   first weights. What nobody has changed since is drawn again, in the order of the network. */
static bool dot__draw_again(void *user, const char *name, dot__parameter *p)
{
    (void)user; (void)name;
    if (!p->draw_default || !dot__draw(p, true)) return true;
    p->draw_stream = DOT__STREAM_INIT + p->tensor->ctx->inits++;
    return dot__draw(p, false);
}

static void dot__init_constant(dot_tensor *t, double value)
{
    for (int lane = 0; lane < t->ctx->lanes; ++lane)
        for (int64_t i = 0; i < t->size; ++i) dot__store(dot__at(t, lane), t->dtype, i, value);
}

/* PyTorch's fans, from its shape [a, b, k...]: fan_in b k, fan_out a k. */
static void dot__fans(const dot__parameter *p, double *fan_in, double *fan_out)
{
    double field = 1;
    for (int i = 2; i < p->rank; ++i) field *= (double)p->shape[i];
    *fan_in = p->rank > 1 ? (double)p->shape[1] * field : 1;
    *fan_out = p->rank > 0 ? (double)p->shape[0] * field : 1;
}

/* Rows (or columns, whichever are fewer) of a normal random matrix, made orthonormal by Gram-Schmidt, twice for precision. */
static bool dot__init_orthogonal(dot__parameter *p, double gain)
{
    dot_context *ctx = p->tensor->ctx;
    int64_t count = p->tensor->size, rows = p->shape[0], cols = rows ? count / rows : 0;
    bool tall = rows > cols;
    int64_t n = tall ? cols : rows, m = tall ? rows : cols;
    double *q = (double *)dot__new(ctx, (size_t)count * 2 * sizeof(double)), *values = q + count;
    if (!q) return false;
    uint64_t stream = DOT__STREAM_INIT + ctx->inits++;
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        for (int64_t i = 0; i < count; ++i) q[i] = dot_random_normal(ctx->lane_seeds[lane], stream, (uint64_t)i);
        for (int64_t i = 0; i < n; ++i) {
            double *row = q + i * m, norm = 0;
            for (int64_t j = 0; j < 2 * i; ++j) {
                const double *other = q + j % i * m;
                double product = 0;
                for (int64_t k = 0; k < m; ++k) product += row[k] * other[k];
                for (int64_t k = 0; k < m; ++k) row[k] -= product * other[k];
            }
            for (int64_t k = 0; k < m; ++k) norm += row[k] * row[k];
            for (int64_t k = 0; k < m; ++k) row[k] /= sqrt(norm);
        }
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < cols; ++j) values[i * cols + j] = gain * (tall ? q[j * m + i] : q[i * m + j]);
        dot__torch_set(&p->layout, p->tensor->dtype, dot__at(p->tensor, lane), count, values);
    }
    dot__delete(ctx, q);
    return true;
}

bool dot_parameter_init(dot_layer *layer, const char *name, dot_init init, double gain)
{
    if (!layer || !dot_ok(layer->ctx)) return false;
    dot__parameter *p = dot__named("dot_parameter_init", layer, name);
    if (!p) return false;
    double fan_in, fan_out;
    dot__fans(p, &fan_in, &fan_out);
    bool needs_matrix = init != DOT_INIT_ZEROS && init != DOT_INIT_ONES;
    if (!dot__finite(gain) || gain == 0 || (unsigned)init > DOT_INIT_ORTHOGONAL || (needs_matrix && p->rank < 2)) {
        dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_parameter_init: \"%.60s\" %s with init %d and gain %g, expected a matrix, DOT_INIT_... and a gain",
                  name, dot__shape_text(p->rank, p->shape).text, (int)init, gain);
        return false;
    }
    switch (init) {
    case DOT_INIT_ZEROS:           dot__init_constant(p->tensor, 0); break;
    case DOT_INIT_ONES:            dot__init_constant(p->tensor, 1); break;
    case DOT_INIT_XAVIER_UNIFORM:  dot__init_random(p, false, gain * sqrt(6 / (fan_in + fan_out))); break;
    case DOT_INIT_XAVIER_NORMAL:   dot__init_random(p, true, gain * sqrt(2 / (fan_in + fan_out))); break;
    case DOT_INIT_KAIMING_UNIFORM: dot__init_random(p, false, gain * sqrt(3 / fan_in)); break;
    case DOT_INIT_KAIMING_NORMAL:  dot__init_random(p, true, gain / sqrt(fan_in)); break;
    default:                       return dot__init_orthogonal(p, gain);
    }
    return true;
}

/* Weight and bias uniform in +-1/sqrt(fan_in of the weight), as PyTorch's layers begin. */
static void dot__init_default(dot__parameter *weight, dot__parameter *bias)
{
    double fan_in, fan_out;
    dot__fans(weight, &fan_in, &fan_out);
    double bound = fan_in > 0 ? 1 / sqrt(fan_in) : 0;
    dot__init_random(weight, false, bound);
    weight->draw_default = true;
    if (!bias) return;
    dot__init_random(bias, false, bound);
    bias->draw_default = true;
}

/* ---- linear ---- */

static dot_tensor *dot__linear_forward(dot_layer *l, dot_tensor *x, dot_activation act) { return dot_linear(x, l->weight, l->bias, act); }

/* PyTorch's [out, in], either axis split into [channels, positions] where a flatten or unflatten is absorbed; stored as
   [in positions, in channels, out positions, out channels]. */
static void dot__linear_layout(const dot_layer *l, dot__layout *weight, dot__layout *bias)
{
    int64_t ci = l->in_channels ? l->in_channels : 1, co = l->out_channels ? l->out_channels : 1;
    weight->rank = 4;
    bias->rank = 2;
    weight->shape[0] = bias->shape[0] = l->out_channels ? co : l->out;
    weight->shape[1] = bias->shape[1] = l->out_channels ? l->out / co : 1;
    weight->shape[2] = l->in_channels ? ci : l->in;
    weight->shape[3] = l->in_channels ? l->in / ci : 1;
    for (int i = 0; i < 4; ++i) weight->axis[i] = 3 - i;
    for (int i = 0; i < 2; ++i) bias->axis[i] = 1 - i;
}

static dot_layer *dot__linear_new(dot_context *ctx, const char *function, const char *weight, const char *bias, int64_t in, int64_t out)
{
    if (dot_ok(ctx) && (in < 1 || out < 1))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: in " DOT__I64 ", out " DOT__I64 ", expected 1 or more", function, DOT__LL(in), DOT__LL(out));
    dot_layer *l = dot__layer_new(ctx, function, "linear", dot__linear_forward);
    if (!l) return NULL;
    int64_t shape[2] = { in, out };
    dot__parameter *w = dot__add_parameter(l, function, weight, DOT_KIND_WEIGHT, ctx->dtype, 2, shape), *b = NULL;
    dot__layout unused;
    if (!w || (bias && !(b = dot__add_parameter(l, function, bias, DOT_KIND_BIAS, ctx->dtype, 1, &out))))
        return dot__layer_abandon(l);
    l->in = in;
    l->out = out;
    l->fuses = true;
    l->weight = w->tensor;
    l->bias = b ? b->tensor : NULL;
    w->shape[0] = out;
    w->shape[1] = in;
    dot__linear_layout(l, &w->layout, b ? &b->layout : &unused);
    dot__init_default(w, b);
    return l;
}

dot_layer *dot_nn_linear(dot_context *ctx, int64_t in, int64_t out) { return dot__linear_new(ctx, "dot_nn_linear", "weight", "bias", in, out); }
dot_layer *dot_nn_linear_no_bias(dot_context *ctx, int64_t in, int64_t out) { return dot__linear_new(ctx, "dot_nn_linear_no_bias", "weight", NULL, in, out); }

/* ---- attention ---- */

static dot_tensor *dot__multihead_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    dot_attention_options o = dot_attention_defaults();
    (void)act;
    o.heads = l->groups;
    return dot_forward(l->children, dot_self_attention(dot_linear(x, l->weight, l->bias, DOT_NONE), &o));
}

dot_layer *dot_nn_multihead_attention(dot_context *ctx, int64_t size, int64_t heads)
{
    static const char *const f = "dot_nn_multihead_attention";
    if (dot_ok(ctx) && (size < 1 || heads < 1 || heads > INT32_MAX || size % heads != 0))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: size " DOT__I64 ", heads " DOT__I64 ", expected 1 or more, and a size that the heads divide", f,
                  DOT__LL(size), DOT__LL(heads));
    dot_layer *l = dot__linear_new(ctx, f, "in_proj_weight", "in_proj_bias", size, size > INT64_MAX / 3 ? size : 3 * size);    /* too large as it is */
    if (!l) return NULL;
    dot_layer *out = dot__linear_new(ctx, f, "weight", "bias", size, size);
    if (!out || !dot_layer_add_child(l, "out_proj", out)) return dot__layer_abandon(l);
    l->kind = "multihead_attention";
    l->forward = dot__multihead_forward;
    l->fuses = false;
    l->groups = (int)heads;
    bool good = dot_parameter_init(l, "in_proj_weight", DOT_INIT_XAVIER_UNIFORM, 1) && dot_parameter_init(l, "in_proj_bias", DOT_INIT_ZEROS, 1)
             && dot_parameter_init(l, "out_proj.bias", DOT_INIT_ZEROS, 1);
    l->parameters->draw_default = true;         /* the Xavier draw is this layer's default */
    return good ? l : NULL;
}

/* ---- linear: flatten and unflatten beside it ---- */

/* Changes how the features split, and keeps the weights what they are in PyTorch's order. */
static bool dot__linear_split(dot_layer *l, int64_t in_channels, int64_t out_channels)
{
    dot_context *ctx = l->ctx;
    dot__parameter *w = l->parameters, *b = w->next;
    dot__layout layout[2];
    double *values = (double *)dot__new(ctx, (size_t)w->tensor->size * sizeof(double));
    if (!values) return false;
    if (in_channels) l->in_channels = in_channels;
    if (out_channels) l->out_channels = out_channels;
    dot__linear_layout(l, &layout[0], &layout[1]);
    for (dot__parameter *p = w; p; p = p == w ? b : NULL) {
        const dot__layout *to = &layout[p == w ? 0 : 1];
        for (int lane = 0; lane < ctx->lanes; ++lane) {
            dot__torch_get(&p->layout, p->tensor->dtype, dot__at(p->tensor, lane), p->tensor->size, values);
            dot__torch_set(to, p->tensor->dtype, dot__at(p->tensor, lane), p->tensor->size, values);
        }
        p->layout = *to;
    }
    dot__delete(ctx, values);
    return true;
}

/* ---- convolution ---- */

static dot_tensor *dot__conv_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    return l->transposed ? dot_conv_transpose(x, l->weight, l->bias, &l->conv, act) : dot_conv(x, l->weight, l->bias, &l->conv, act);
}

static dot_layer *dot__conv_new(dot_context *ctx, const char *function, int dims, bool transposed, int64_t in, int64_t out,
                                const dot_conv_options *options)
{
    dot_conv_options o = dot_conv_defaults();
    dot__conv_sizes s;
    if (options) o = *options;
    if (!dot_ok(ctx) || !dot__conv_sizes_of(ctx, function, &o, dims, transposed, &s)) return NULL;
    if (in < 1 || out < 1 || in % o.groups != 0 || out % o.groups != 0) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: " DOT__I64 " to " DOT__I64 " channels in %d groups, expected multiples of the groups, 1 or more",
                  function, DOT__LL(in), DOT__LL(out), o.groups);
        return NULL;
    }
    dot_layer *l = dot__layer_new(ctx, function, "conv", dot__conv_forward);
    if (!l) return NULL;
    int64_t shape[5];
    for (int i = 0; i < dims; ++i) shape[i] = s.kernel[3 - dims + i];
    shape[dims] = (transposed ? out : in) / o.groups;
    shape[dims + 1] = transposed ? in : out;
    dot__parameter *w = dot__add_parameter(l, function, "weight", DOT_KIND_WEIGHT, ctx->dtype, dims + 2, shape), *b = NULL;
    if (!w || (o.bias && !(b = dot__add_parameter(l, function, "bias", DOT_KIND_BIAS, ctx->dtype, 1, &out)))) return dot__layer_abandon(l);
    for (int i = 0; i < dims + 2; ++i) {        /* PyTorch: last two axes first, in reverse, then the kernel */
        w->layout.axis[i] = i == 0 ? dims + 1 : i == 1 ? dims : i - 2;
        w->shape[i] = w->layout.shape[i] = shape[w->layout.axis[i]];
    }
    l->in = in;
    l->out = out;
    l->fuses = true;
    l->conv = o;
    l->transposed = transposed;
    l->weight = w->tensor;
    l->bias = b ? b->tensor : NULL;
    dot__init_default(w, b);
    return l;
}

#define DOT__CONV_LAYER(name, dims, transposed) \
    dot_layer *dot_nn_##name(dot_context *ctx, int64_t in, int64_t out, const dot_conv_options *options) \
    { return dot__conv_new(ctx, "dot_nn_" #name, dims, transposed, in, out, options); }
DOT__CONV_LAYER(conv1d, 1, false)
DOT__CONV_LAYER(conv2d, 2, false)
DOT__CONV_LAYER(conv3d, 3, false)
DOT__CONV_LAYER(conv_transpose1d, 1, true)
DOT__CONV_LAYER(conv_transpose2d, 2, true)
DOT__CONV_LAYER(conv_transpose3d, 3, true)

/* ---- layers without parameters ---- */

static dot_tensor *dot__max_pool_forward(dot_layer *l, dot_tensor *x, dot_activation act)   { (void)act; return dot_max_pool(x, &l->pool); }
static dot_tensor *dot__avg_pool_forward(dot_layer *l, dot_tensor *x, dot_activation act)   { (void)act; return dot_avg_pool(x, &l->pool); }
static dot_tensor *dot__dropout_forward(dot_layer *l, dot_tensor *x, dot_activation act)    { (void)act; return dot_dropout(x, l->p); }
static dot_tensor *dot__relu_forward(dot_layer *l, dot_tensor *x, dot_activation act)       { (void)l; (void)act; return dot_relu(x); }
static dot_tensor *dot__leaky_relu_forward(dot_layer *l, dot_tensor *x, dot_activation act) { (void)act; return dot_leaky_relu(x, l->p); }
static dot_tensor *dot__gelu_forward(dot_layer *l, dot_tensor *x, dot_activation act)       { (void)l; (void)act; return dot_gelu(x); }
static dot_tensor *dot__silu_forward(dot_layer *l, dot_tensor *x, dot_activation act)       { (void)l; (void)act; return dot_silu(x); }
static dot_tensor *dot__sigmoid_forward(dot_layer *l, dot_tensor *x, dot_activation act)    { (void)l; (void)act; return dot_sigmoid(x); }
static dot_tensor *dot__tanh_forward(dot_layer *l, dot_tensor *x, dot_activation act)       { (void)l; (void)act; return dot_tanh(x); }
static dot_tensor *dot__softplus_forward(dot_layer *l, dot_tensor *x, dot_activation act)   { (void)l; (void)act; return dot_softplus(x, 1, 20); }

static dot_layer *dot__activation_layer(dot_context *ctx, const char *function, const char *kind,
                                        dot_tensor *(*forward)(dot_layer *, dot_tensor *, dot_activation), dot_activation activation, double p)
{
    dot_layer *l = dot__layer_new(ctx, function, kind, forward);
    if (!l) return NULL;
    l->elementwise = true;
    l->activation = activation;
    l->p = p;
    return l;
}

dot_layer *dot_nn_relu(dot_context *ctx)     { return dot__activation_layer(ctx, "dot_nn_relu", "relu", dot__relu_forward, DOT_RELU, 0); }
dot_layer *dot_nn_gelu(dot_context *ctx)     { return dot__activation_layer(ctx, "dot_nn_gelu", "gelu", dot__gelu_forward, DOT_NONE, 0); }
dot_layer *dot_nn_silu(dot_context *ctx)     { return dot__activation_layer(ctx, "dot_nn_silu", "silu", dot__silu_forward, DOT_NONE, 0); }
dot_layer *dot_nn_sigmoid(dot_context *ctx)  { return dot__activation_layer(ctx, "dot_nn_sigmoid", "sigmoid", dot__sigmoid_forward, DOT_SIGMOID, 0); }
dot_layer *dot_nn_tanh(dot_context *ctx)     { return dot__activation_layer(ctx, "dot_nn_tanh", "tanh", dot__tanh_forward, DOT_TANH, 0); }
dot_layer *dot_nn_softplus(dot_context *ctx) { return dot__activation_layer(ctx, "dot_nn_softplus", "softplus", dot__softplus_forward, DOT_NONE, 0); }

dot_layer *dot_nn_leaky_relu(dot_context *ctx, double slope)
{
    if (dot_ok(ctx) && !dot__finite(slope))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_leaky_relu: slope %g, expected a finite number", slope);
    return dot__activation_layer(ctx, "dot_nn_leaky_relu", "leaky_relu", dot__leaky_relu_forward, DOT_NONE, slope);
}

dot_layer *dot_nn_dropout(dot_context *ctx, double p)
{
    if (dot_ok(ctx) && !(p >= 0 && p <= 1)) dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_dropout: p %g, expected 0 to 1", p);
    dot_layer *l = dot__layer_new(ctx, "dot_nn_dropout", "dropout", dot__dropout_forward);
    if (l) l->p = p;
    return l;
}

static dot_layer *dot__pool_layer(dot_context *ctx, const char *function, const dot_pool_options *options, bool maximum)
{
    dot__window unused[3];
    dot_pool_options o = dot_pool_defaults();
    if (options) o = *options;
    if (!dot_ok(ctx) || !dot__pool_windows_of(ctx, function, &o, 3, maximum, unused)) return NULL;
    dot_layer *l = dot__layer_new(ctx, function, "pool", maximum ? dot__max_pool_forward : dot__avg_pool_forward);
    if (l) l->pool = o;
    return l;
}

dot_layer *dot_nn_max_pool(dot_context *ctx, const dot_pool_options *options) { return dot__pool_layer(ctx, "dot_nn_max_pool", options, true); }
dot_layer *dot_nn_avg_pool(dot_context *ctx, const dot_pool_options *options) { return dot__pool_layer(ctx, "dot_nn_avg_pool", options, false); }

static dot_tensor *dot__adaptive_pool_forward(dot_layer *l, dot_tensor *x, bool maximum)
{
    const char *f = maximum ? "dot_nn_adaptive_max_pool" : "dot_nn_adaptive_avg_pool";
    int dims = 1 + (l->size[1] > 0) + (l->size[0] > 0);
    if (!dot__enter(f, x, x)) return NULL;
    if (x->rank == dims + 2) return dot__adaptive_op(f, x, l->size + 3 - dims, maximum);
    dot__fail(x->ctx, DOT_ERROR_SHAPE, "%s: input %s, expected %d spatial axes between batch and channels", f, DOT__SHAPE(x), dims);
    return NULL;
}

static dot_tensor *dot__adaptive_max_pool_forward(dot_layer *l, dot_tensor *x, dot_activation act) { (void)act; return dot__adaptive_pool_forward(l, x, true); }
static dot_tensor *dot__adaptive_avg_pool_forward(dot_layer *l, dot_tensor *x, dot_activation act) { (void)act; return dot__adaptive_pool_forward(l, x, false); }

static dot_layer *dot__adaptive_pool_layer(dot_context *ctx, bool maximum, const int64_t size[3])
{
    const char *f = maximum ? "dot_nn_adaptive_max_pool" : "dot_nn_adaptive_avg_pool";
    bool ok = size[2] >= 1 && size[1] >= 0 && size[0] >= 0 && (size[1] > 0 || size[0] == 0)
           && size[0] <= INT32_MAX && size[1] <= INT32_MAX && size[2] <= INT32_MAX;
    if (dot_ok(ctx) && !ok)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: sizes " DOT__I64 ", " DOT__I64 ", " DOT__I64 ", expected width of 1 or more, unused sizes 0",
                  f, DOT__LL(size[0]), DOT__LL(size[1]), DOT__LL(size[2]));
    dot_layer *l = dot__layer_new(ctx, f, "adaptive_pool", maximum ? dot__adaptive_max_pool_forward : dot__adaptive_avg_pool_forward);
    for (int i = 0; i < 3 && l; ++i) l->size[i] = size[i];
    return l;
}

dot_layer *dot_nn_adaptive_max_pool(dot_context *ctx, int64_t depth, int64_t height, int64_t width)
{
    const int64_t size[3] = { depth, height, width };
    return dot__adaptive_pool_layer(ctx, true, size);
}

dot_layer *dot_nn_adaptive_avg_pool(dot_context *ctx, int64_t depth, int64_t height, int64_t width)
{
    const int64_t size[3] = { depth, height, width };
    return dot__adaptive_pool_layer(ctx, false, size);
}

/* ---- flatten and unflatten: PyTorch's feature order is channels first ---- */

static dot_tensor *dot__flatten_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    if (!dot__enter("dot_nn_flatten", x, x)) return NULL;
    if (x->rank < 2 || (l->absorbed && x->shape[x->rank - 1] != l->in)) {
        dot__fail(x->ctx, DOT_ERROR_SHAPE, "dot_nn_flatten: input %s, expected [N,...] with " DOT__I64 " channels", DOT__SHAPE(x), DOT__LL(l->in));
        return NULL;
    }
    int64_t features = 1, shape[2];
    for (int i = 1; i < x->rank; ++i) features *= x->shape[i];
    shape[0] = x->shape[0];
    shape[1] = features;
    if (!l->absorbed && x->rank > 2 && x->shape[x->rank - 1] > 1) {
        int axes[DOT_MAX_RANK] = { 0 };
        axes[1] = x->rank - 1;
        for (int i = 2; i < x->rank; ++i) axes[i] = i - 1;
        x = dot_permute(x, axes);
    }
    return dot_reshape(x, 2, shape);
}

static dot_tensor *dot__unflatten_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    if (!dot__enter("dot_nn_unflatten", x, x)) return NULL;
    int64_t shape[5];
    int dims = 0;
    for (int i = 0; i < 3; ++i)
        if (l->size[i]) dims++;
    shape[0] = x->shape[0];
    for (int i = 0; i < dims; ++i) shape[l->absorbed ? 1 + i : 2 + i] = l->size[3 - dims + i];
    shape[l->absorbed ? 1 + dims : 1] = l->size[3];
    if (x->rank != 2 || x->shape[1] != l->out) {
        dot__fail(x->ctx, DOT_ERROR_SHAPE, "dot_nn_unflatten: input %s, expected [N," DOT__I64 "]", DOT__SHAPE(x), DOT__LL(l->out));
        return NULL;
    }
    x = dot_reshape(x, 2 + dims, shape);
    if (l->absorbed) return x;
    int axes[5] = { 0, 2, 3, 4, 0 };
    axes[1 + dims] = 1;
    return dot_permute(x, axes);
}

dot_layer *dot_nn_flatten(dot_context *ctx) { return dot__layer_new(ctx, "dot_nn_flatten", "flatten", dot__flatten_forward); }

dot_layer *dot_nn_unflatten(dot_context *ctx, int64_t depth, int64_t height, int64_t width, int64_t channels)
{
    bool ok = width >= 1 && channels >= 1 && height >= 0 && depth >= 0 && (height > 0 || depth == 0) && width <= INT32_MAX
           && height <= INT32_MAX && depth <= INT32_MAX && channels <= INT32_MAX;
    if (dot_ok(ctx) && !ok)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_unflatten: sizes " DOT__I64 ", " DOT__I64 ", " DOT__I64 ", " DOT__I64
                  ", expected width and channels of 1 or more, unused sizes 0", DOT__LL(depth), DOT__LL(height), DOT__LL(width), DOT__LL(channels));
    int64_t shape[4] = { depth > 0 ? depth : 1, height > 0 ? height : 1, width, channels };
    int64_t features = dot_ok(ctx) ? dot__shape_size(ctx, "dot_nn_unflatten", ctx->dtype, 4, shape) : -1;
    dot_layer *l = dot__layer_new(ctx, "dot_nn_unflatten", "unflatten", dot__unflatten_forward);
    if (!l) return NULL;
    l->size[0] = depth;
    l->size[1] = height;
    l->size[2] = width;
    l->size[3] = channels;
    l->out = features;
    return l;
}

/* ---- normalisation and embedding ---- */

static dot_tensor *dot__batch_norm_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    dot_tensor *y = dot_batch_norm(x, l->weight, l->bias, l->mean, l->var, 0.1, 1e-5);
    for (int k = 0; y && l->ctx->training && k < l->ctx->active_count; ++k) ++*(int64_t *)dot__at(l->batches, l->ctx->active[k]);
    return y;
}

static dot_tensor *dot__layer_norm_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    return dot_layer_norm(x, 1, l->weight, l->bias, 1e-5);
}

static dot_tensor *dot__group_norm_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    return dot_group_norm(x, l->groups, l->weight, l->bias, 1e-5);
}

static dot_layer *dot__norm_new(dot_context *ctx, const char *function, const char *kind, int64_t size,
                                dot_tensor *(*forward)(dot_layer *, dot_tensor *, dot_activation))
{
    if (dot_ok(ctx) && size < 1) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: size " DOT__I64 ", expected 1 or more", function, DOT__LL(size));
    dot_layer *l = dot__layer_new(ctx, function, kind, forward);
    if (!l) return NULL;
    dot__parameter *w = dot__add_parameter(l, function, "weight", DOT_KIND_NORM, ctx->dtype, 1, &size);
    dot__parameter *b = w ? dot__add_parameter(l, function, "bias", DOT_KIND_NORM, ctx->dtype, 1, &size) : NULL;
    if (!b) return dot__layer_abandon(l);
    l->weight = w->tensor;
    l->bias = b->tensor;
    dot__init_constant(l->weight, 1);
    return l;
}

dot_layer *dot_nn_batch_norm(dot_context *ctx, int64_t channels)
{
    dot_layer *l = dot__norm_new(ctx, "dot_nn_batch_norm", "batch_norm", channels, dot__batch_norm_forward);
    if (!l) return NULL;
    dot__parameter *mean = dot__add_parameter(l, "dot_nn_batch_norm", "running_mean", DOT_KIND_BUFFER, ctx->dtype, 1, &channels);
    dot__parameter *var = mean ? dot__add_parameter(l, "dot_nn_batch_norm", "running_var", DOT_KIND_BUFFER, ctx->dtype, 1, &channels) : NULL;
    dot__parameter *n = var ? dot__add_parameter(l, "dot_nn_batch_norm", "num_batches_tracked", DOT_KIND_BUFFER, DOT_I64, 0, NULL) : NULL;
    if (!n) return dot__layer_abandon(l);
    l->mean = mean->tensor;
    l->var = var->tensor;
    l->batches = n->tensor;
    dot__init_constant(l->var, 1);
    return l;
}

dot_layer *dot_nn_layer_norm(dot_context *ctx, int64_t size) { return dot__norm_new(ctx, "dot_nn_layer_norm", "layer_norm", size, dot__layer_norm_forward); }

dot_layer *dot_nn_group_norm(dot_context *ctx, int groups, int64_t channels)
{
    if (dot_ok(ctx) && (groups < 1 || channels % groups != 0))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_group_norm: %d groups of " DOT__I64 " channels", groups, DOT__LL(channels));
    dot_layer *l = dot__norm_new(ctx, "dot_nn_group_norm", "group_norm", channels, dot__group_norm_forward);
    if (l) l->groups = groups;
    return l;
}

static dot_tensor *dot__embedding_forward(dot_layer *l, dot_tensor *x, dot_activation act) { (void)act; return dot_embedding(l->weight, x); }

dot_layer *dot_nn_embedding(dot_context *ctx, int64_t rows, int64_t size)
{
    if (dot_ok(ctx) && (rows < 1 || size < 1))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_embedding: " DOT__I64 " rows of " DOT__I64 ", expected 1 or more", DOT__LL(rows), DOT__LL(size));
    dot_layer *l = dot__layer_new(ctx, "dot_nn_embedding", "embedding", dot__embedding_forward);
    if (!l) return NULL;
    int64_t shape[2] = { rows, size };
    dot__parameter *w = dot__add_parameter(l, "dot_nn_embedding", "weight", DOT_KIND_EMBEDDING, ctx->dtype, 2, shape);
    if (!w) return dot__layer_abandon(l);
    l->weight = w->tensor;
    dot__init_random(w, true, 1);
    w->draw_default = true;
    return l;
}

/* ---- custom and sequential ---- */

static dot_tensor *dot__custom_forward(dot_layer *l, dot_tensor *x, dot_activation act) { (void)act; return l->custom(l->user, l, x); }

dot_layer *dot_nn_custom(dot_context *ctx, const char *kind, dot_forward_function forward, void *user)
{
    if (!dot_ok(ctx)) return NULL;
    if (!kind || !forward) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_nn_custom: %s is NULL", kind ? "forward" : "kind");
        return NULL;
    }
    ctx->function = "dot_nn_custom";
    char *copy = (char *)dot__new(ctx, strlen(kind) + 1);
    dot_layer *l = copy ? dot__layer_new(ctx, "dot_nn_custom", copy, dot__custom_forward) : NULL;
    if (!l) {
        dot__delete(ctx, copy);
        return NULL;
    }
    memcpy(copy, kind, strlen(kind) + 1);
    l->custom = forward;
    l->user = user;
    return l;
}

/* A layer and the activation after it are one operation where the layer can apply it. */
static dot_tensor *dot__sequential_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    (void)act;
    for (dot_layer *child = l->children; child && x; child = child->next) {
        bool fuse = child->fuses && child->next && child->next->activation != DOT_NONE;
        x = child->forward(child, x, fuse ? child->next->activation : DOT_NONE);
        if (fuse) child = child->next;
    }
    return x;
}

/* Lets linear layers absorb the feature order of a flatten before them and of an unflatten after them. */
static bool dot__absorb_orders(dot_layer *sequential)
{
    int64_t channels = 0;               /* of what flows here, when known */
    dot_layer *flatten = NULL, *linear = NULL;
    for (dot_layer *l = sequential->children; l; l = l->next) {
        if (strcmp(l->kind, "conv") == 0) { channels = l->out; flatten = linear = NULL; continue; }
        if (strcmp(l->kind, "flatten") == 0) { flatten = channels > 0 ? l : NULL; linear = NULL; continue; }
        if (strcmp(l->kind, "linear") == 0) {
            if (flatten && l->in % channels == 0) {
                if (!dot__linear_split(l, channels, 0)) return false;
                flatten->absorbed = true;
                flatten->in = channels;
            }
            flatten = NULL;
            linear = l;
            channels = 0;
            continue;
        }
        if (strcmp(l->kind, "unflatten") == 0) {
            if (linear && linear->out == l->out) {
                if (!dot__linear_split(linear, 0, l->size[3])) return false;
                l->absorbed = true;
            }
            channels = l->size[3];
            flatten = linear = NULL;
            continue;
        }
        if (!l->elementwise) flatten = linear = NULL;
        if (l->children || l->custom) channels = 0;
    }
    return true;
}

dot_layer *dot_nn_sequential(dot_context *ctx, ...)
{
    dot_layer *sequential = dot__layer_new(ctx, "dot_nn_sequential", "sequential", dot__sequential_forward);
    if (!sequential) return NULL;
    va_list layers;
    va_start(layers, ctx);
    bool ok = true;
    int position = 0;
    for (dot_layer *child = va_arg(layers, dot_layer *); child && ok; child = va_arg(layers, dot_layer *), ++position) {
        char number[24];
        snprintf(number, sizeof number, "%d", position);
        bool numbered = child->name[0] == 0;
        ok = dot__adopt("dot_nn_sequential", sequential, numbered ? number : child->name, child);
        if (ok) child->numbered = numbered;
    }
    va_end(layers);
    if (!ok || !dot__absorb_orders(sequential)) {
        for (dot_layer *child = sequential->children, *next; child; child = next) {     /* let the children go, as they were */
            next = child->next;
            if (child->numbered) child->name[0] = 0;
            child->numbered = false;
            child->parent = child->next = NULL;
        }
        return dot__layer_abandon(sequential);
    }
    dot__visit(sequential, "", dot__draw_again, NULL);
    return sequential;
}

dot_tensor *dot_forward(dot_layer *layer, dot_tensor *x)
{
    if (!layer || !x || !dot_ok(layer->ctx)) return NULL;
    if (x->ctx != layer->ctx) {
        dot__fail(layer->ctx, DOT_ERROR_STATE, "dot_forward: layer and input of different contexts");
        return NULL;
    }
    return layer->forward(layer, x, DOT_NONE);
}

/* ==== [8 losses] =================================================================================== */

typedef struct dot__loss_node { dot__node node; dot__loss op; double p; } dot__loss_node;

static void dot__loss_setup(dot__loss_job *job, dot__loss op, double p, const dot_tensor *x, const dot_tensor *t, const dot_tensor *value)
{
    memset(job, 0, sizeof *job);
    job->dtype = x->dtype;
    job->laned = dot__laned(value);
    job->op = op;
    job->p = p;
    job->n = x->size;
    job->x = dot__array_of(x);
    job->t = dot__array_of(t);
    job->value = dot__array_of(value);
}

static bool dot__loss_backward(dot_context *ctx, dot__node *base)
{
    dot__loss_node *node = (dot__loss_node *)base;
    for (int which = 0; which < 2; ++which) {
        dot__loss_job job;
        if (!dot__wants_grad(base->in[which])) continue;
        dot__loss_setup(&job, node->op, node->p, base->in[0], base->in[1], base->out->grad);
        dot_tensor *out = dot__grad_target(base->in[which], &job.accumulate);
        if (!out) return false;
        job.wrt_target = which == 1;
        job.out = dot__array_of(out);
        ctx->backend->loss_backward(ctx, &job);
    }
    return true;
}

static dot_tensor *dot__loss_op(const char *function, dot__loss op, double p, dot_tensor *x, dot_tensor *t)
{
    dot_context *ctx = dot__enter(function, x, t);
    if (!ctx) return NULL;
    if (!dot__shape_equal(x, t) || x->size == 0) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: prediction %s, target %s, expected one shape with elements", function, DOT__SHAPE(x), DOT__SHAPE(t));
        return NULL;
    }
    dot_tensor *value = dot__step_tensor(ctx, x->dtype, 0, NULL, dot__laned(x) || dot__laned(t));
    dot__loss_node *node;
    dot__loss_job job;
    if (!value || !dot__record(ctx, sizeof *node, dot__loss_backward, value, x, t, NULL, &node)) return NULL;
    if (node) { node->op = op; node->p = p; }
    dot__loss_setup(&job, op, p, x, t, value);
    return ctx->backend->loss(ctx, &job) ? value : NULL;
}

dot_tensor *dot_mse_loss(dot_tensor *prediction, dot_tensor *target)  { return dot__loss_op("dot_mse_loss", DOT__MSE, 0, prediction, target); }
dot_tensor *dot_rmse_loss(dot_tensor *prediction, dot_tensor *target) { return dot_sqrt(dot__loss_op("dot_rmse_loss", DOT__MSE, 0, prediction, target)); }
dot_tensor *dot_l1_loss(dot_tensor *prediction, dot_tensor *target)   { return dot__loss_op("dot_l1_loss", DOT__L1, 0, prediction, target); }

dot_tensor *dot_bce_with_logits_loss(dot_tensor *logits, dot_tensor *target)
{
    return dot__loss_op("dot_bce_with_logits_loss", DOT__BCE, 0, logits, target);
}

dot_tensor *dot_huber_loss(dot_tensor *prediction, dot_tensor *target, double delta)
{
    if (prediction && dot_ok(prediction->ctx) && !(delta > 0 && dot__finite(delta))) {
        dot__fail(prediction->ctx, DOT_ERROR_ARGUMENT, "dot_huber_loss: delta %g, expected a positive number", delta);
        return NULL;
    }
    return dot__loss_op("dot_huber_loss", DOT__HUBER, delta, prediction, target);
}

typedef struct dot__entropy_node { dot__node node; dot_tensor *labels; double smoothing; } dot__entropy_node;

static void dot__entropy_setup(dot__entropy *job, const dot_tensor *x, const dot_tensor *labels, double smoothing, const dot_tensor *value)
{
    memset(job, 0, sizeof *job);
    job->dtype = x->dtype;
    job->laned = dot__laned(value);
    job->classes = x->shape[x->rank - 1];
    job->rows = x->size / job->classes;
    job->smoothing = smoothing;
    job->x = dot__array_of(x);
    job->labels = dot__array_of(labels);
    job->value = dot__array_of(value);
}

static bool dot__entropy_backward(dot_context *ctx, dot__node *base)
{
    dot__entropy_node *node = (dot__entropy_node *)base;
    dot__entropy job;
    dot__entropy_setup(&job, base->in[0], node->labels, node->smoothing, base->out->grad);
    dot_tensor *dx = dot__grad_target(base->in[0], &job.accumulate);
    if (!dx) return false;
    job.dx = dot__array_of(dx);
    ctx->backend->entropy_backward(ctx, &job);
    return true;
}

dot_tensor *dot_cross_entropy_loss(dot_tensor *logits, dot_tensor *labels, double label_smoothing)
{
    dot_context *ctx = dot__enter("dot_cross_entropy_loss", logits, logits);
    if (!ctx || !labels) return NULL;
    if (labels->dtype != DOT_I64) {
        dot__fail(ctx, DOT_ERROR_DTYPE, "dot_cross_entropy_loss: labels of type %s, expected I64", dot__dtype_name(labels->dtype));
        return NULL;
    }
    bool fits = logits->rank >= 1 && labels->rank == logits->rank - 1 && logits->size > 0;
    for (int i = 0; fits && i < labels->rank; ++i) fits = labels->shape[i] == logits->shape[i];
    if (!fits) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_cross_entropy_loss: logits %s, labels %s, expected [...,classes] and [...] with elements",
                  DOT__SHAPE(logits), DOT__SHAPE(labels));
        return NULL;
    }
    if (!(label_smoothing >= 0 && label_smoothing <= 1)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_cross_entropy_loss: label_smoothing %g, expected 0 to 1", label_smoothing);
        return NULL;
    }
    if (!dot__indices_ok("dot_cross_entropy_loss", logits, labels, logits->shape[logits->rank - 1])) return NULL;
    dot_tensor *value = dot__step_tensor(ctx, logits->dtype, 0, NULL, dot__laned(logits) || dot__laned(labels));
    dot__entropy_node *node;
    dot__entropy job;
    if (!value || !dot__record(ctx, sizeof *node, dot__entropy_backward, value, logits, NULL, NULL, &node)) return NULL;
    if (node) { node->labels = labels; node->smoothing = label_smoothing; }
    dot__entropy_setup(&job, logits, labels, label_smoothing, value);
    return ctx->backend->entropy(ctx, &job) ? value : NULL;
}

/* ==== [9 optimizers] =============================================================================== */

#define DOT__NAME_ROW(constant, name, rule, description, source, ...) name,
#define DOT__DESCRIPTION_ROW(constant, name, rule, description, source, ...) description,
#define DOT__SOURCE_ROW(constant, name, rule, description, source, ...) source,

const char *dot_algorithm_name(dot_algorithm a)
{
    static const char *const names[] = { DOT_OPTIMIZERS(DOT__NAME_ROW) };
    return (unsigned)a < DOT_ALGORITHMS ? names[a] : NULL;
}

const char *dot_algorithm_description(dot_algorithm a)
{
    static const char *const descriptions[] = { DOT_OPTIMIZERS(DOT__DESCRIPTION_ROW) };
    return (unsigned)a < DOT_ALGORITHMS ? descriptions[a] : NULL;
}

const char *dot_algorithm_paper(dot_algorithm a)
{
    static const char *const papers[] = { DOT_OPTIMIZERS(DOT__SOURCE_ROW) };
    return (unsigned)a < DOT_ALGORITHMS ? papers[a] : NULL;
}

bool dot_algorithm_find(const char *name, dot_algorithm *algorithm)
{
    for (int a = 0; name && algorithm && a < (int)DOT_ALGORITHMS; ++a)
        if (strcmp(name, dot_algorithm_name((dot_algorithm)a)) == 0) {
            *algorithm = (dot_algorithm)a;
            return true;
        }
    return false;
}

const char *dot_dialect_name(dot_dialect dialect)
{
    static const char *const names[] = { "default", "optax", "paper", "official", "tf", "inside", "mlcommons", "torch", "hf", "t2t", "match_rms",
                                         "spectral" };
    return (unsigned)dialect < DOT_DIALECTS ? names[dialect] : NULL;
}

/* ---- hyperparameters: a struct of doubles, and the same as a table ---- */

typedef struct dot__numbers {
#define DOT__FIELD(constant, field, value, least, greatest, meaning) double field;
    DOT_HYPERPARAMETERS(DOT__FIELD)
#undef DOT__FIELD
} dot__numbers;

typedef struct dot__hyper_row { const char *name; size_t of_options, of_numbers; double value, least, greatest; } dot__hyper_row;
static const dot__hyper_row dot__hyper_rows[] = {
#define DOT__ROW(constant, field, value, least, greatest, meaning) \
    { #field, offsetof(dot_optimizer_options, field), offsetof(dot__numbers, field), value, least, greatest },
    DOT_HYPERPARAMETERS(DOT__ROW)
#undef DOT__ROW
};

static double *dot__number(dot__numbers *numbers, int which) { return (double *)(void *)((char *)numbers + dot__hyper_rows[which].of_numbers); }
static double *dot__option(dot_optimizer_options *o, int which) { return (double *)(void *)((char *)o + dot__hyper_rows[which].of_options); }

const char *dot_hyper_name(dot_hyper which) { return (unsigned)which < DOT_HYPERS ? dot__hyper_rows[which].name : NULL; }

dot_optimizer_options dot_optimizer_defaults(dot_algorithm algorithm)
{
    dot_optimizer_options o;
    memset(&o, 0, sizeof o);
    for (int i = 0; i < DOT_HYPERS; ++i) *dot__option(&o, i) = dot__hyper_rows[i].value;
    o.magic = DOT__MAGIC_OPTIMIZER;
    o.algorithm = algorithm;
    o.decay = DOT_DECAY_LR;
    o.scale_parameter = true;
    switch (algorithm) {
#define DOT__CASE(constant, name, rule, description, source, ...) case constant: (void)(__VA_ARGS__); break;
    DOT_OPTIMIZERS(DOT__CASE)
#undef DOT__CASE
    default: break;
    }
    return o;
}

/* ---- elementwise rules ----
   What a rule computes with, worked out in double once for each parameter, lane and step. */
#define DOT__SCALARS(X) \
    X(gradient) X(l2)                   /* g = gradient g + l2 theta: clipping, maximize, L2 */ \
    X(keep) X(after) X(cautious_decay)  /* theta = after (keep theta - d) - cautious_decay theta where d theta >= 0 */ \
    X(caution)                          /* d *= caution where d g > 0, else 0; 0: off */ \
    X(lr) X(wd)                         /* the step's learning rate; lambda, of rules that place it themselves */ \
    X(beta1) X(beta2) X(beta3) X(a1) X(a2) X(a3)        /* a = 1 - beta */ \
    X(step1) X(root2) X(eps)            /* lr / (1 - beta1^t); 1 / sqrt(1 - beta2^t) */ \
    X(first)                            /* 1 at t = 1, else 0 */ \
    X(k0) X(k1) X(k2) X(k3) X(k4) X(k5) /* the rule's own */

#define DOT__SUMS 4
#define DOT__ABOVE_5 5.000000000000001  /* PyTorch: rectified above 5, others: from 5 on */

typedef struct dot__scalars {
#define DOT__FIELD(name) double name;
    DOT__SCALARS(DOT__FIELD)
#undef DOT__FIELD
    double sum[DOT__SUMS];              /* what the rule measured, over the parameter or over all of them */
} dot__scalars;

/* What a rule's scalars come from. `m` is the parameter's own memory between steps, `all` that of its group; both start at 0. */
typedef struct dot__preparation {
    const dot__numbers *o;
    const dot_optimizer_options *f;
    double t, n, *m, *all, loss;
    bool first, final;                  /* final: the sums are known; a rule that measures is prepared twice a step */
} dot__preparation;

/* RAdam's rectification (Liu et al. 2020, algorithm 2): 0 while the length of the average is below `threshold`. */
static double dot__rectification(double beta2, double t, double threshold)
{
    double limit = 2 / (1 - beta2) - 1, power = pow(beta2, t), rho = limit - 2 * t * power / (1 - power);
    return rho < threshold ? 0 : sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
}

/* The decay whose half-life lies a share `a` of the way from that of `from` to that of `to` (AdEMAMix's warm-up of beta3). */
static double dot__half_life_between(double from, double to, double a)
{
    double f = log(0.5) / log(from + 1e-8) - 1, g = log(0.5) / log(to + 1e-8) - 1;
    return pow(0.5, 1 / ((1 - a) * f + a * g + 1));
}

/* X(rule, states, names, prepare, rule, measure): an optimizer is a row.
     states   bits: which of s0..s4 it keeps (an expression of the options f)
     names    of the states in files: PyTorch's where it has them
     prepare  sets h->k0..k5 in double, from the scalars h, the numbers o, the options f, t, m, all; {} for none
     rule     changes s0..s4 and sets d, what is subtracted from theta. Operators and the functions ROOT, CBRT, EXP, POWER, ATAN2, ABS, SIGN,
              MAX(x, least), MIN(x, most), IF_POSITIVE(x, then, else) alone, so that one text serves scalars and vectors
     measure  q0..q2, of which the sums are h->sum[] in the final preparation; OVER_ALL rules: over all parameters. {} for none */
#define DOT__RULES(X) \
    X(SGD, f->beta1 > 0, "momentum_buffer", \
      { h->k0 = first ? 0 : o->beta1; h->k1 = first ? 1 : 1 - o->dampening; /* PyTorch: the buffer begins as g, undampened */ \
        h->k2 = f->nesterov; h->k3 = f->nesterov ? o->beta1 : 1; }, \
      s0 = k0 * s0 + k1 * g; d = lr * (k2 * g + k3 * s0), {}) \
    X(ADAM, 3, "exp_avg,exp_avg_sq", {}, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = step1 * s0 / (root2 * ROOT(s1) + eps), {}) \
    X(AMSGRAD, 7, "exp_avg,exp_avg_sq,max_exp_avg_sq", \
      { bool paper = f->dialect == DOT_DIALECT_PAPER; bool optax = f->dialect == DOT_DIALECT_OPTAX; \
        h->k0 = optax ? h->root2 * h->root2 : 1; h->k1 = paper || optax ? 1 : h->root2; h->k2 = paper ? h->lr : h->step1; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; s2 = MAX(k0 * s1, s2); d = k2 * s0 / (k1 * ROOT(s2) + eps), {}) \
    X(ADAGRAD, 1, "sum", \
      { bool inside = f->dialect == DOT_DIALECT_INSIDE; \
        h->k0 = h->lr / (1 + (t - 1) * o->lr_decay); h->k1 = first ? o->initial : 0; h->k2 = inside ? o->eps : 0; \
        h->k3 = inside ? 0 : o->eps; }, \
      s0 = s0 + k1 + g * g; d = k0 * g / (ROOT(s0 + k2) + k3), {}) \
    X(RMSPROP, 1 | (f->centered ? 2 : 0) | (f->beta1 > 0 ? 4 : 0), "square_avg,grad_avg,momentum_buffer", \
      { bool tf = f->dialect == DOT_DIALECT_TF; \
        h->k0 = tf && first ? o->beta2 : 0; h->k1 = f->centered; h->k2 = tf ? o->eps : 0; h->k3 = tf ? 0 : o->eps; \
        h->k4 = tf ? h->lr : 1; h->k5 = tf ? 1 : h->lr; }, \
      s0 = beta2 * s0 + k0 + a2 * g * g; s1 = beta2 * s1 + a2 * g; \
      s2 = beta1 * s2 + k4 * g / (ROOT(MAX(s0 - k1 * s1 * s1, 0) + k2) + k3); d = k5 * s2, {}) \
    X(ADAMAX, 3, "exp_avg,exp_inf", {}, \
      s0 = s0 + a1 * (g - s0); s1 = MAX(ABS(g) + eps, beta2 * s1); d = step1 * s0 / s1, {}) \
    X(NADAM, 3, "exp_avg,exp_avg_sq", \
      { double mu = o->beta1 * (1 - 0.5 * pow(0.96, t * o->momentum_decay)); \
        double next = o->beta1 * (1 - 0.5 * pow(0.96, (t + 1) * o->momentum_decay)); \
        double bc1 = 1 - pow(o->beta1, t); double product = m[0] = mu * (first ? 1 : m[0]); \
        bool torch = f->dialect == DOT_DIALECT_DEFAULT; bool optax = f->dialect == DOT_DIALECT_OPTAX; \
        h->k0 = h->lr * (torch ? (1 - mu) / (1 - product) : (1 - o->beta1) / bc1); \
        h->k1 = h->lr * (torch ? next / (1 - product * next) : o->beta1 / (optax ? 1 - pow(o->beta1, t + 1) : bc1)); }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = (k0 * g + k1 * s0) / (root2 * ROOT(s1) + eps), {}) \
    X(RADAM, 3, "exp_avg,exp_avg_sq", \
      { bool torch = f->dialect == DOT_DIALECT_DEFAULT; bool official = f->dialect == DOT_DIALECT_OFFICIAL; \
        double r = dot__rectification(o->beta2, t, torch ? DOT__ABOVE_5 : 5); double root = official || torch ? h->root2 : 1; \
        h->k0 = h->step1 * r / root; h->k1 = r == 0 ? 0 : official || torch ? 1 : h->root2; h->k2 = r == 0 ? 1 : o->eps; \
        h->k3 = r == 0 && !official ? h->step1 : 0; \
        if (r == 0 && official) h->keep = h->after = 1; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = s0 * (k0 / (k1 * ROOT(s1) + k2) + k3), {}) \
    X(LION, 1, "exp_avg", {}, d = lr * SIGN(beta1 * s0 + a1 * g); s0 = beta2 * s0 + a2 * g, {}) \
    X(SIGN_SGD, 0, "", {}, d = lr * SIGN(g), {}) \
    X(SIGNUM, 1, "exp_avg", {}, s0 = beta1 * s0 + a1 * g; d = lr * SIGN(s0), {}) \
    X(NOISY_SGD, 0, "", {}, d = lr * g, {}) \
    X(ADADELTA, 3, "square_avg,acc_delta", {}, \
      s0 = beta2 * s0 + a2 * g * g; d = ROOT(s1 + eps) / ROOT(s0 + eps) * g; s1 = beta2 * s1 + a2 * d * d; d = lr * d, {}) \
    X(ASGD, 1, "ax", \
      { double eta = first ? h->lr : m[0]; h->k0 = eta; h->k1 = first ? 1 : m[1]; h->keep *= 1 - o->lambd * eta; h->k2 = h->keep; \
        m[0] = h->lr / pow(1 + o->lambd * h->lr * t, o->alpha); m[1] = 1 / (t - o->t0 > 1 ? t - o->t0 : 1); }, \
      d = k0 * g; s0 = s0 + k1 * (k2 * theta - d - s0), {}) \
    X(RPROP, 3, "prev,step_size", { h->k0 = first ? h->lr : 0; h->k1 = o->eta_minus; h->k2 = o->eta_plus; h->k3 = o->step_min; \
                                    h->k4 = o->step_max; }, \
      d = g * s0; s1 = (s1 + k0) * IF_POSITIVE(d, k2, IF_POSITIVE(-d, k1, 1)); s1 = MIN(MAX(s1, k3), k4); \
      s0 = IF_POSITIVE(-d, 0 * g, g); d = SIGN(s0) * s1, {}) \
    X(ADABELIEF, 3, "exp_avg,exp_avg_var", \
      { double r = f->rectify ? dot__rectification(o->beta2, t, 5) : 1; \
        h->k0 = r > 0 ? h->step1 * r : 0; h->k1 = r > 0 ? h->root2 : 0; h->k2 = r > 0 ? o->eps : 1; h->k3 = r > 0 ? 0 : h->step1; \
        if (f->rectify && r > 0) { h->k0 /= h->root2; h->k1 = 1; } }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * (g - s0) * (g - s0) + eps; d = s0 * (k0 / (k1 * ROOT(s1) + k2) + k3), {}) \
    X(ADAN, 15, "exp_avg,exp_avg_diff,exp_avg_sq,previous_grad", \
      { h->k0 = h->step1; h->k1 = h->lr * o->beta2 / (1 - pow(o->beta2, t)); h->k2 = 1 / sqrt(1 - pow(o->beta3, t)); \
        h->k3 = first ? 0 : 1; }, \
      d = k3 * (g - s3); s3 = g; s0 = s0 + a1 * (g - s0); s1 = s1 + a2 * (d - s1); d = g + beta2 * d; \
      s2 = beta3 * s2 + a3 * d * d; d = (k0 * s0 + k1 * s1) / (k2 * ROOT(s2) + eps), {}) \
    X(LAMB, 3 | PER_TENSOR, "exp_avg,exp_avg_sq", \
      { h->k0 = 1 / (1 - pow(o->beta1, t)); h->k1 = final && h->sum[0] > 0 && h->sum[1] > 0 ? h->lr * sqrt(h->sum[0] / h->sum[1]) : h->lr; \
        h->k1 = final ? h->k1 : 1; h->keep = 1; h->wd = o->weight_decay; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = k1 * (k0 * s0 / (root2 * ROOT(s1) + eps) + wd * theta), \
      { q0 = theta * theta; q1 = d * d; }) \
    X(LARS, 1 | PER_TENSOR, "momentum_buffer", \
      { bool optax = f->dialect == DOT_DIALECT_OPTAX; double w = sqrt(h->sum[0]); double gradient = sqrt(h->sum[optax ? 2 : 1]); \
        double ratio = o->trust * w / (gradient + (optax ? 0 : o->weight_decay * w) + o->eps); \
        if (w == 0 || gradient == 0) ratio = 1; \
        h->k0 = optax ? h->lr * ratio : ratio; h->k1 = optax ? 1 : h->lr; h->keep = 1; h->wd = o->weight_decay; }, \
      s0 = beta1 * s0 + k0 * (g + wd * theta); d = k1 * s0, \
      { q0 = theta * theta; q1 = g * g; q2 = (g + wd * theta) * (g + wd * theta); }) \
    X(NOVOGRAD, 1 | PER_TENSOR, "exp_avg", \
      { if (final) m[0] = first ? h->sum[0] : o->beta2 * m[0] + (1 - o->beta2) * h->sum[0]; \
        h->k0 = 1 / (sqrt(m[0]) + o->eps); h->keep = 1; h->wd = o->weight_decay; }, \
      s0 = beta1 * s0 + (k0 * g + wd * theta); d = lr * s0, { q0 = g * g; }) \
    X(YOGI, 3, "exp_avg,exp_avg_sq", { h->k0 = first ? o->initial : 0; }, \
      s0 = s0 + a1 * (g - s0); s1 = s1 + k0; s1 = s1 - a2 * SIGN(s1 - g * g) * g * g; d = step1 * s0 / (root2 * ROOT(s1) + eps), {}) \
    X(FROMAGE, 0 | PER_TENSOR, "", \
      { h->k0 = h->sum[0] > 0 && h->sum[1] > 0 ? h->lr * sqrt(h->sum[0] / h->sum[1]) : h->lr; h->after /= sqrt(1 + h->lr * h->lr); }, \
      d = k0 * g, { q0 = theta * theta; q1 = g * g; }) \
    X(POLYAK_SGD, OVER_ALL, "", { h->k0 = all[0]; }, d = k0 * g, { q0 = g * g; }) \
    X(OPTIMISTIC_ADAM, 7, "exp_avg,exp_avg_sq,previous_update", \
      { h->k0 = h->lr * (1 - o->beta1) / (1 - pow(o->beta1, t)); h->k1 = h->lr * o->beta1 / (1 - pow(o->beta1, t + 1)); \
        h->k2 = o->alpha + (first ? 0 : o->gamma); h->k3 = first ? 0 : o->gamma; h->k4 = h->lr; h->k5 = h->lr > 0 ? 1 / h->lr : 0; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; q3 = k5 * (k0 * g + k1 * s0) / (root2 * ROOT(s1) + eps); \
      d = k4 * (k2 * q3 - k3 * s2); s2 = q3, {}) \
    X(COCOB, 31, "largest,sum_abs,reward,theta_sum,first_theta", { h->k0 = first ? o->eps : 0; h->k1 = o->alpha; }, \
      s4 = s4 + first * theta; s0 = MAX(s0 + k0, ABS(g)); s1 = s1 + ABS(g); s2 = MAX(s2 - g * (theta - s4), 0); s3 = s3 - g; \
      d = theta - s4 - s3 / (s0 * MAX(s1 + s0, k1 * s0)) * (s0 + s2), {}) \
    X(SWATS, 3 | PER_TENSOR, "exp_avg,exp_avg_sq", \
      { bool sgd = m[1] > 0; h->k0 = sgd ? h->lr / o->lr * (1 - o->beta1) * m[1] : h->step1 / h->root2; \
        h->k1 = sgd ? 0 : 1; h->k2 = sgd ? 1 : o->eps; h->k3 = !sgd || m[2] > 0 ? o->beta1 : 0; h->k4 = sgd ? 1 : h->a1; \
        if (final && sgd) m[2] += 1; \
        if (final && !sgd && h->sum[1] != 0) { \
            double rate = h->sum[0] / h->sum[1] * (h->lr > 0 ? o->lr / h->lr : 0); m[0] = o->beta2 * m[0] + (1 - o->beta2) * rate; \
            double mean = m[0] / (1 - pow(o->beta2, t)); \
            if (t > 1 && mean > 0 && fabs(mean - rate) < o->eps) m[1] = mean; \
        } }, \
      s0 = k3 * s0 + k4 * g; s1 = beta2 * s1 + a2 * g * g; d = k0 * s0 / (k1 * ROOT(s1) + k2), { q0 = d * d; q1 = d * g; }) \
    X(PRODIGY, 15 | OVER_ALL, "exp_avg,exp_avg_sq,s,p0", \
      { double rate = all[3] * h->lr; if (!final) rate = all[0] * h->lr; \
        h->beta3 = o->beta3 > 0 ? o->beta3 : sqrt(o->beta2); \
        double d0 = final ? all[3] : all[0]; h->k0 = d0 * h->a1; h->k1 = d0 * d0 * h->a2; h->k2 = d0 / o->d0 * rate; h->k3 = rate; \
        h->k4 = all[0] * o->eps; h->k5 = first; \
        h->keep = f->decay == DOT_DECAY_LR ? 1 - rate * o->weight_decay : h->keep; \
        if (final && all[4] == 0) { h->k3 = 0; h->keep = 1; } }, \
      s3 = s3 + k5 * theta; s0 = beta1 * s0 + k0 * g; s1 = beta2 * s1 + k1 * g * g; s2 = beta3 * s2 + k2 * g; \
      d = k3 * s0 / (ROOT(s1) + k4 + IF_POSITIVE(k3, 0 * g, 1)), { q0 = k2 * g * (s3 - theta); q1 = ABS(s2); }) \
    X(DADAPT_ADAM, 7 | OVER_ALL, "exp_avg,exp_avg_sq,s", \
      { double rate = (final ? all[3] : all[0]) * h->lr; \
        h->beta3 = sqrt(o->beta2); h->a3 = 1 - h->beta3; h->k0 = rate * h->a1; h->k1 = rate * h->a3; h->k2 = rate; \
        h->keep = f->decay == DOT_DECAY_LR ? 1 - rate * o->weight_decay : h->keep; \
        h->k3 = 1; if (final && all[4] == 0) { h->k3 = 0; h->keep = 1; } }, \
      d = k2 * g * s2 / (ROOT(s1) + eps); s0 = beta1 * s0 + k0 * g; s1 = beta2 * s1 + a2 * g * g; s2 = beta3 * s2 + k1 * g; \
      q3 = d; d = k3 * s0 / (ROOT(s1) + eps), { q0 = q3; q1 = ABS(s2); }) \
    X(DOG, 1 | OVER_ALL, "first_theta", { h->k0 = h->lr * all[1]; }, s0 = s0 + first * theta; d = k0 * g, \
      { q0 = (theta - s0) * (theta - s0); q1 = g * g; q2 = s0 * s0; }) \
    X(DOWG, 1 | OVER_ALL, "first_theta", { h->k0 = h->lr * all[1]; }, s0 = s0 + first * theta; d = k0 * g, \
      { q0 = (theta - s0) * (theta - s0); q1 = g * g; q2 = s0 * s0; }) \
    X(MOMO, 1 | OVER_ALL, "exp_avg", { h->k0 = first ? 0 : o->beta1; h->k1 = first ? 1 : h->a1; h->k2 = all[0]; }, \
      s0 = k0 * s0 + k1 * g; d = k2 * s0, { q0 = s0 * s0; q1 = s0 * theta; q2 = g * theta; }) \
    X(MOMO_ADAM, 3 | OVER_ALL, "exp_avg,exp_avg_sq", { h->k0 = all[0]; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; q3 = s0 / (root2 * ROOT(s1) + eps); d = k0 * q3, \
      { q0 = s0 * q3; q1 = s0 * theta; q2 = g * theta; }) \
    X(MADGRAD, 7, "grad_sum_sq,s,x0", { h->k0 = (h->lr + o->eps) * sqrt(t); h->k1 = 1 - o->beta1; }, \
      s2 = s2 + first * theta; s0 = s0 + k0 * g * g; s1 = s1 + k0 * g; \
      d = CBRT(s0) + eps; d = k1 * (theta - s2 + s1 / (d + IF_POSITIVE(d, 0 * d, 1))), {}) \
    X(ACPROP, 3, "exp_avg,exp_avg_var", \
      { h->k0 = first ? 1 : 0; h->k1 = first ? 0 : 1 / sqrt(1 - pow(o->beta2, t - 1)); }, \
      d = lr * g / (k1 * ROOT(s1) + k0 + eps); s1 = beta2 * s1 + a2 * (g - s0) * (g - s0) + eps; s0 = s0 + a1 * (g - s0), {}) \
    X(ADOPT, 3, "exp_avg,exp_avg_sq", \
      { h->k0 = first ? 1 : h->a2; h->k1 = first ? 0 : h->a1; h->k2 = first ? 0 : h->lr; h->k3 = pow(t - 1, 0.25); \
        if (first) h->keep = 1; }, \
      d = MIN(MAX(g / MAX(ROOT(s1), eps), -k3), k3); s0 = s0 + k1 * (d - s0); s1 = beta2 * s1 + k0 * g * g; d = k2 * s0, {}) \
    X(ADEMAMIX, 7, "exp_avg,exp_avg_sq,exp_avg_slow", \
      { double a = t < o->warmup ? t / o->warmup : 1; h->k0 = h->step1; h->k1 = h->lr * o->alpha * a; \
        if (a < 1) h->beta3 = dot__half_life_between(o->beta1, o->beta3, a); \
        h->a3 = 1 - h->beta3; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; s2 = beta3 * s2 + a3 * g; \
      d = (k0 * s0 + k1 * s2) / (root2 * ROOT(s1) + eps), {}) \
    X(MARS, 7 | PER_TENSOR, "exp_avg,exp_avg_sq,last_grad", \
      { h->k0 = final && h->sum[0] > 1 ? 1 / sqrt(h->sum[0]) : 1; h->k1 = o->gamma * o->beta1 / (1 - o->beta1); }, \
      d = k0 * (g + k1 * (g - s2)); s2 = g; s0 = s0 + a1 * (d - s0); s1 = beta2 * s1 + a2 * d * d; q3 = d; \
      d = step1 * s0 / (root2 * ROOT(s1) + eps), { q0 = q3 * q3; }) \
    X(SCHEDULE_FREE_SGD, 1, "z", \
      { if (h->lr > m[1]) m[1] = h->lr; \
        double weight = pow(t, o->r) * pow(m[1], o->weight_lr_power); m[0] += weight; double share = m[0] > 0 ? weight / m[0] : 0; \
        h->k0 = share; h->k1 = h->lr * (1 - o->beta1 * (1 - share)); h->k2 = h->lr; h->keep = 1; h->wd = o->weight_decay; }, \
      s0 = s0 + first * theta; q3 = g + wd * theta; d = k0 * (theta - s0) + k1 * q3; s0 = s0 - k2 * q3, {}) \
    X(SCHEDULE_FREE_ADAMW, 3, "z,exp_avg_sq", \
      { if (h->lr > m[1]) m[1] = h->lr; \
        double weight = pow(t, o->r) * pow(m[1], o->weight_lr_power); m[0] += weight; double share = m[0] > 0 ? weight / m[0] : 0; \
        h->k0 = share; h->k1 = h->lr * (1 - o->beta1 * (1 - share)); h->k2 = h->lr; h->keep = 1; h->wd = o->weight_decay; }, \
      s0 = s0 + first * theta; s1 = beta2 * s1 + a2 * g * g; q3 = g / (root2 * ROOT(s1) + eps) + wd * theta; \
      d = k0 * (theta - s0) + k1 * q3; s0 = s0 - k2 * q3, {}) \
    X(STABLE_ADAMW, 3 | PER_TENSOR, "exp_avg,exp_avg_sq", \
      { double rms = sqrt(h->sum[0] / n); double shrink = final && rms > 1 ? 1 / rms : 1; \
        h->k0 = (1 - o->beta1) / (1 - pow(o->beta1, t)); h->k1 = (1 - o->beta2) / (1 - pow(o->beta2, t)); h->k2 = h->lr * shrink; \
        h->k3 = o->eps * o->eps; if (f->decay == DOT_DECAY_LR) h->keep = 1 - h->k2 * o->weight_decay; }, \
      s0 = s0 + k0 * (g - s0); s1 = s1 + k1 * (g * g - s1); d = k2 * s0 / (ROOT(s1) + eps), { q0 = g * g / MAX(s1, k3); }) \
    X(ADABOUND, 3 | (f->amsbound ? 4 : 0), "exp_avg,exp_avg_sq,max_exp_avg_sq", \
      { double final_lr = o->lr > 0 ? o->final_lr * h->lr / o->lr : 0; h->k0 = final_lr * (1 - 1 / (o->gamma * t + 1)); \
        h->k1 = final_lr * (1 + 1 / (o->gamma * t)); h->k2 = h->step1 / h->root2; h->k3 = f->amsbound; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; s2 = MAX(s1, s2 * k3); \
      d = s0 * MIN(MAX(k2 / (ROOT(s2) + eps), k0), k1), {}) \
    X(LAPROP, 3, "exp_avg,exp_avg_sq", \
      { m[0] = o->beta1 * m[0] + (1 - o->beta1) * h->lr; h->k0 = m[0] > 0 ? h->lr / m[0] : 0; h->k1 = h->lr * h->a1; \
        h->after = h->keep; h->keep = 1; }, \
      s1 = beta2 * s1 + a2 * g * g; s0 = beta1 * s0 + k1 * g / (root2 * ROOT(s1) + eps); d = k0 * s0, {}) \
    X(QHM, 1, "momentum_buffer", { h->k0 = h->lr * (1 - o->nu); h->k1 = h->lr * o->nu; }, \
      s0 = s0 + a1 * (g - s0); d = k0 * g + k1 * s0, {}) \
    X(QHADAM, 3, "exp_avg,exp_avg_sq", \
      { h->k0 = h->lr * (1 - o->nu1); h->k1 = h->step1 * o->nu1; h->k2 = (1 - o->nu2) / (h->root2 * h->root2); h->k3 = o->nu2; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = (k0 * g + k1 * s0) / (root2 * ROOT(k2 * g * g + k3 * s1) + eps), {}) \
    X(AGGMO, 3, "momentum_buffer_1,momentum_buffer_2", { h->k0 = h->lr / 3; }, \
      s0 = beta1 * s0 + g; s1 = beta2 * s1 + g; d = k0 * (g + s0 + s1), {}) \
    X(PNM, 3, "pos_momentum,neg_momentum", \
      { bool odd = fmod(t, 2) == 1; double square = o->beta1 * o->beta1; \
        double scale = h->lr / sqrt((1 + o->alpha) * (1 + o->alpha) + o->alpha * o->alpha); \
        h->k0 = odd ? 1 - square : 0; h->k1 = odd ? 0 : 1 - square; \
        h->k2 = scale * (odd ? 1 + o->alpha : -o->alpha); h->k3 = scale * (odd ? -o->alpha : 1 + o->alpha); }, \
      s0 = s0 + k0 * (g - s0); s1 = s1 + k1 * (g - s1); d = k2 * s0 + k3 * s1, {}) \
    X(DIFFGRAD, 7, "exp_avg,exp_avg_sq,previous_grad", { h->k0 = h->step1 / h->root2; }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = k0 * s0 / (1 + EXP(-ABS(s2 - g))) / (ROOT(s1) + eps); s2 = g, {}) \
    X(SOPHIA_G, 3, "exp_avg,hessian", { h->k0 = o->rho * o->batch; }, \
      s0 = s0 + a1 * (g - s0); d = lr * SIGN(s0) * MIN(ABS(s0) / (k0 * s1 + eps), 1), {}) \
    X(SOPHIA_H, 7, "exp_avg,hessian,estimate", \
      { h->k0 = o->gamma; h->k1 = 1 / (1 - pow(o->beta1, t)); h->k2 = m[0] > 0 ? h->a2 : 0; m[0] = 0; }, \
      s0 = s0 + a1 * (g - s0); d = lr * MIN(MAX(k1 * s0 / MAX(k0 * s1, eps), -1), 1); s1 = s1 + k2 * (s2 - s1), {}) \
    X(ADAHESSIAN, 3, "exp_avg,exp_hessian_diag_sq", \
      { h->k0 = m[0] > 0 ? 1 / sqrt(1 - pow(o->beta2, m[0])) : 0; h->k1 = o->power; }, \
      s0 = s0 + a1 * (g - s0); d = step1 * s0 / (POWER(k0 * ROOT(s1), k1) + eps), {}) \
    X(GRAMS, 3, "exp_avg,exp_avg_sq", {}, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = SIGN(g) * ABS(step1 * s0 / (root2 * ROOT(s1) + eps)), {}) \
    X(ADAM_ATAN2, 3, "exp_avg,exp_avg_sq", { h->k0 = 1 / (1 - pow(o->beta1, t)); }, \
      s0 = s0 + a1 * (g - s0); s1 = beta2 * s1 + a2 * g * g; d = lr * ATAN2(k0 * s0, root2 * ROOT(s1)), {})

/* X(rule, size of each state, names, function): sizes in rows, columns, n, axes (the sum of all axes' sizes), f; n-sized states have the
   parameter's shape. The rules made of matrix products are the last, from SHAMPOO on. */
#define DOT__MATRIX_RULES(X) \
    X(SPARSE_ADAM, n, n, 0, 0, 0, "exp_avg,exp_avg_sq", dot__sparse_adam) \
    X(ADAM_MINI, n, rows, 0, 0, 0, "exp_avg,exp_avg_sq", dot__adam_mini) \
    X(ADAMP, n, n, 0, 0, 0, "exp_avg,exp_avg_sq", dot__adamp) \
    X(SGDP, f->beta1 > 0 ? n : 0, 0, 0, 0, 0, "momentum_buffer", dot__sgdp) \
    X(SM3, axes, f->beta1 > 0 ? n : 0, 0, 0, 0, "accumulators,momentum_buffer", dot__sm3) \
    X(CAME, matrix ? rows : n, matrix ? columns : 0, n, matrix ? rows : 0, matrix ? columns : 0, \
      "exp_avg_sq_row,exp_avg_sq_col,exp_avg,exp_avg_res_row,exp_avg_res_col", dot__came) \
    X(ADAFACTOR, dot__factor_axes_of(f->dialect, p).r, dot__factor_axes_of(f->dialect, p).c, f->beta1 > 0 ? n : 0, 0, 0, \
      "row_var,col_var,exp_avg", dot__adafactor) \
    X(SHAMPOO, dot__shampoo_size(f, rows, matrix, n), dot__shampoo_size(f, columns, matrix, 0), f->beta1 > 0 ? n : 0, 0, 0, \
      "left,right,momentum_buffer", dot__shampoo) \
    X(SOAP, n, n, 2 * dot__shampoo_size(f, rows, matrix, 0), 2 * dot__shampoo_size(f, columns, matrix, 0), 0, \
      "exp_avg,exp_avg_sq,left,right", dot__soap) \
    X(PSGD_KRON, n, matrix ? dot__kron_size(f, rows) : 0, matrix ? dot__kron_size(f, columns) : n, 0, 0, \
      "momentum_buffer,left,right", dot__psgd_kron) \
    X(GALORE, matrix ? dot__galore_rank(f->rank, rows, columns) * dot__min(rows, columns) : 0, \
      matrix ? dot__galore_rank(f->rank, rows, columns) * dot__max(rows, columns) : n, \
      matrix ? dot__galore_rank(f->rank, rows, columns) * dot__max(rows, columns) : n, 0, 0, "projection,exp_avg,exp_avg_sq", dot__galore) \
    X(SCION, n, 0, 0, 0, 0, "momentum_buffer", dot__scion) \
    X(MUON, n, matrix ? 0 : n, 0, 0, 0, "momentum_buffer,exp_avg_sq", dot__muon)

#define DOT__RULE_ENUM(name, states, names, prepare, rule, measure) DOT__RULE_##name,
#define DOT__MATRIX_ENUM(name, size0, size1, size2, size3, size4, names, function) DOT__RULE_##name,
typedef enum dot__rule {
    DOT__RULES(DOT__RULE_ENUM) DOT__RULE_COUNT, DOT__RULE_FACTORED, DOT__RULE_CUSTOM,
    DOT__RULE_MATRIX, DOT__MATRIX_RULES(DOT__MATRIX_ENUM) DOT__RULE_END
} dot__rule;
#define DOT__PER_TENSOR 256          /* measures each parameter by itself */
#define DOT__OVER_ALL 512           /* has numbers of the whole optimizer: see dot__rule_over_all */

#define DOT__RULE_NAMES(name, states, names, prepare, rule, measure) names,
#define DOT__MATRIX_NAMES(name, size0, size1, size2, size3, size4, names, function) names,
static const char *const dot__rule_names[] = { DOT__RULES(DOT__RULE_NAMES) "", "", "", "", DOT__MATRIX_RULES(DOT__MATRIX_NAMES) };

static unsigned dot__rule_states(dot__rule rule, const dot_optimizer_options *f)
{
#define PER_TENSOR DOT__PER_TENSOR
#define OVER_ALL DOT__OVER_ALL
#define DOT__STATES_CASE(name, states, names, prepare, rule, measure) case DOT__RULE_##name: return (unsigned)(states);
    switch (rule) {
    DOT__RULES(DOT__STATES_CASE)
    default: return rule == DOT__RULE_CUSTOM ? (1u << f->rule->states) - 1 : 0;
    }
#undef DOT__STATES_CASE
#undef PER_TENSOR
#undef OVER_ALL
}

static void dot__rule_prepare(dot__rule rule, dot__scalars *h, const dot__preparation *p)
{
    const dot__numbers *o = p->o;
    const dot_optimizer_options *f = p->f;
    double t = p->t, n = p->n, *m = p->m, *all = p->all;
    bool first = p->first, final = p->final;
    (void)n;
#define DOT__PREPARE_CASE(name, states, names, prepare, rule, measure) case DOT__RULE_##name: prepare break;
    switch (rule) {
    DOT__RULES(DOT__PREPARE_CASE)
    default: break;
    }
#undef DOT__PREPARE_CASE
}

/* One pass over n elements, a multiple of a vector's. With `sums` nothing is stored, and the measures of the first `counted` elements are
   added to it instead. */
#define DOT__LOAD_SCALAR(name) const T name = (T)h->name; (void)name;
#define DOT__GET(v, from) memcpy(&v, from + i, sizeof(V));
#define DOT__PUT(v, to) memcpy(to + i, &v, sizeof(V));
#define DOT__RULE_FUNCTION(name, states, names, prepare, rule, measure) \
    RULE_TARGET static void DOT__N(dot__rule_##name)(T *w, const T *gs, T *const *s, int64_t n, int64_t counted, const dot__scalars *h, \
                                                     double *sums) \
    { \
        DOT__SCALARS(DOT__LOAD_SCALAR) \
        V zero, one; \
        T q[4][WIDTH]; \
        T *at0 = s[0], *at1 = s[1], *at2 = s[2], *at3 = s[3], *at4 = s[4];     /* what a store may alias is read again after it */ \
        memset(&zero, 0, sizeof zero); \
        one = zero + (T)1; \
        (void)one; \
        for (int64_t i = 0; i < n; i += (int64_t)(sizeof(V) / sizeof(T))) { \
            V theta, g, s0 = zero, s1 = zero, s2 = zero, s3 = zero, s4 = zero, d = zero, q0 = zero, q1 = zero, q2 = zero, q3 = zero; \
            DOT__GET(theta, w) DOT__GET(g, gs) \
            if (at0) DOT__GET(s0, at0) \
            if (at1) DOT__GET(s1, at1) \
            if (at2) DOT__GET(s2, at2) \
            if (at3) DOT__GET(s3, at3) \
            if (at4) DOT__GET(s4, at4) \
            g = gradient * g + l2 * theta; \
            rule; \
            if (sums) { \
                measure \
                q3 = IF_POSITIVE(d * g, one, zero); \
                memcpy(q[0], &q0, sizeof(V)); memcpy(q[1], &q1, sizeof(V)); memcpy(q[2], &q2, sizeof(V)); memcpy(q[3], &q3, sizeof(V)); \
                DOT__N(dot__rule_count)(q, counted - i, sums); \
                continue; \
            } \
            if (caution > 0) d = IF_POSITIVE(d * g, caution * d, zero); \
            V moved = after * (keep * theta - d); \
            if (cautious_decay > 0) moved = moved - IF_POSITIVE(-(d * theta), zero, cautious_decay * theta); \
            DOT__PUT(moved, w) \
            if (at0) DOT__PUT(s0, at0) \
            if (at1) DOT__PUT(s1, at1) \
            if (at2) DOT__PUT(s2, at2) \
            if (at3) DOT__PUT(s3, at3) \
            if (at4) DOT__PUT(s4, at4) \
            (void)q3; \
        } \
    }

/* The sums of a vector's measures, in double, element after element. They come through memory: GCC's address sanitizer gives a vector
   that is an argument a place that is not aligned. */
#define DOT__COUNT_FUNCTION \
    RULE_TARGET DOT__NOINLINE static void DOT__N(dot__rule_count)(T q[4][WIDTH], int64_t left, double *sums) \
    { \
        for (int k = 0; k < 4; ++k) \
            for (int64_t j = 0; j < WIDTH && j < left; ++j) sums[k] += (double)q[k][j]; \
    }

#define DOT__S f64
DOT__COUNT_FUNCTION
DOT__RULES(DOT__RULE_FUNCTION)
#undef DOT__S
#ifdef DOT__AVX2
#define DOT__S avx2
DOT__COUNT_FUNCTION
DOT__RULES(DOT__RULE_FUNCTION)
#undef DOT__S
#define DOT__S avx512
DOT__COUNT_FUNCTION
DOT__RULES(DOT__RULE_FUNCTION)
#undef DOT__S
#endif
#undef REST
#undef SIGN
#undef T
#undef V
#undef U
#undef D
#undef H
#undef WIDTH
#undef DOUBLES_WIDTH
#undef WORD_TARGET
#undef RULE_TARGET
#undef LEAVE_VECTORS
#undef ZERO
#undef BITS
#undef FLOAT
#undef COUNT
#undef DOUBLES
#undef SINGLES
#undef ADD_UP
#undef IF_POSITIVE
#undef MAX
#undef MIN
#undef ABS
#undef ROOT
#undef CBRT
#undef POWER
#undef EXP
#undef LOG
#undef LOG1P
#undef TANH
#undef ERFC
#undef ATAN2
#undef DOT__GET
#undef DOT__PUT

typedef void (*dot__rule_f64)(double *, const double *, double *const *, int64_t, int64_t, const dot__scalars *, double *);
#define DOT__RULE_ROW_F64(name, states, names, prepare, rule, measure) dot__rule_##name##_f64,
static const dot__rule_f64 dot__rules_f64[] = { DOT__RULES(DOT__RULE_ROW_F64) };
#ifdef DOT__AVX2
typedef void (*dot__rule_f32)(float *, const float *, float *const *, int64_t, int64_t, const dot__scalars *, double *);
#define DOT__RULE_ROW_AVX2(name, states, names, prepare, rule, measure) dot__rule_##name##_avx2,
static const dot__rule_f32 dot__rules_avx2[] = { DOT__RULES(DOT__RULE_ROW_AVX2) };
#define DOT__RULE_ROW_AVX512(name, states, names, prepare, rule, measure) dot__rule_##name##_avx512,
static const dot__rule_f32 dot__rules_avx512[] = { DOT__RULES(DOT__RULE_ROW_AVX512) };
#endif

#ifdef DOT__AVX2
/* Any number of elements: the rest of less than a vector goes through a buffer, so that every element is computed by the same
   instructions wherever it lies. */
static void dot__rule_run_f32(dot__rule_f32 rule, int64_t width, float *w, const float *g, float *const *s, int64_t n, const dot__scalars *h,
                              double *sums)
{
    float buffer[DOT_MAX_STATES + 2][DOT__WIDTH_avx512] = { { 0 } }, *rest[DOT_MAX_STATES];
    int64_t whole = n / width * width;
    size_t bytes = (size_t)(n - whole) * sizeof(float);
    if (whole) rule(w, g, s, whole, whole, h, sums);
    if (!bytes) return;
    memcpy(buffer[0], w + whole, bytes);
    memcpy(buffer[1], g + whole, bytes);
    for (int i = 0; i < DOT_MAX_STATES; ++i) {
        rest[i] = s[i] ? buffer[i + 2] : NULL;
        if (s[i]) memcpy(rest[i], s[i] + whole, bytes);
    }
    rule(buffer[0], buffer[1], rest, width, n - whole, h, sums);
    if (sums) return;
    memcpy(w + whole, buffer[0], bytes);
    for (int i = 0; i < DOT_MAX_STATES; ++i) if (s[i]) memcpy(s[i] + whole, rest[i], bytes);
}
#endif

/* The same without vectors: in double, through buffers. */
static void dot__rule_run_portable(dot__rule_f64 rule, float *w, const float *g, float *const *s, int64_t n, const dot__scalars *h, double *sums)
{
    enum { BLOCK = 128 };
    double buffer[DOT_MAX_STATES + 2][BLOCK], *state[DOT_MAX_STATES];
    for (int64_t first = 0, count; first < n; first += count) {
        count = dot__min(BLOCK, n - first);
        for (int64_t i = 0; i < count; ++i) {
            buffer[0][i] = (double)w[first + i];
            buffer[1][i] = (double)g[first + i];
        }
        for (int k = 0; k < DOT_MAX_STATES; ++k) {
            state[k] = s[k] ? buffer[k + 2] : NULL;
            for (int64_t i = 0; i < count && s[k]; ++i) state[k][i] = (double)s[k][first + i];
        }
        rule(buffer[0], buffer[1], state, count, count, h, sums);
        for (int64_t i = 0; i < count && !sums; ++i) w[first + i] = (float)buffer[0][i];
        for (int k = 0; k < DOT_MAX_STATES && !sums; ++k)
            for (int64_t i = 0; i < count && s[k]; ++i) s[k][first + i] = (float)state[k][i];
    }
}

/* ---- state precision: a state is decoded into a buffer of floats, 256 at a time, and encoded again ---- */

#define DOT__BLOCK 256

/* The 8-bit code: 256 values in [-1, 1] or [0, 1], dense near 0: a sign or not, an exponent of base 10 coded in unary, and a linear
   fraction with the bits that are left (Dettmers 2016, "8-bit approximations for parallelism in deep learning"). */
typedef struct dot__code { float value[2][DOT__BLOCK]; } dot__code;

static void dot__code_make(dot__code *code)
{
    for (int positive = 0; positive < 2; ++positive) {
        float *v = code->value[positive];
        int count = 0, bits = positive ? 7 : 6;
        for (int e = 0; e <= bits; ++e) {
            int items = 1 << e;
            for (int i = 0; i < items; ++i) {
                double fraction = 0.1 + 0.9 * (i + 0.5) / items, x = fraction * pow(10, e - bits);
                v[count++] = (float)x;
                if (!positive) v[count++] = (float)-x;
            }
        }
        if (!positive) v[count++] = 0;
        v[positive ? count - 1 : count] = 1;
        if (positive) v[count] = 0;
        for (int i = 1; i < DOT__BLOCK; ++i)        /* sorted by insertion: qsort may allocate */
            for (int j = i; j > 0 && v[j - 1] > v[j]; --j) {
                float x = v[j];
                v[j] = v[j - 1];
                v[j - 1] = x;
            }
    }
}

/* The nearest of the code's values. */
static uint8_t dot__code_of(const float *value, float x)
{
    int low = 0, high = DOT__BLOCK - 1;
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (value[middle] <= x) low = middle; else high = middle;
    }
    return (uint8_t)(x - value[low] <= value[high] - x ? low : high);
}

static uint16_t dot__bf16_nearest(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    if (x != x) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static uint16_t dot__bf16_random(float x, uint32_t random)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return (bits & 0x7f800000u) == 0x7f800000u ? dot__bf16_nearest(x) : (uint16_t)((bits + (random & 0xffff)) >> 16);
}

static float dot__bf16_float(uint16_t h)
{
    uint32_t bits = (uint32_t)h << 16;
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static size_t dot__state_size(dot_state_precision precision, dot_dtype dtype, int64_t n)
{
    switch (precision) {
    case DOT_STATE_BF16:       return (size_t)n * 2;
    case DOT_STATE_BF16_KAHAN: return (size_t)n * 4;
    case DOT_STATE_8BIT:       return (size_t)n + (size_t)dot__ceil_div(n, DOT__BLOCK) * sizeof(float);
    default:                   return (size_t)n * dot_dtype_size(dtype);
    }
}

/* One state's block of up to 256 elements from `first` on. The 8-bit form has the scales of all blocks behind the codes. */
static void dot__state_decode(dot_state_precision precision, const dot__code *code, const uint8_t *state, int64_t size, int64_t first,
                              int64_t n, float *out)
{
    if (precision == DOT_STATE_8BIT) {
        float scale;
        memcpy(&scale, state + size + first / DOT__BLOCK * (int64_t)sizeof scale, sizeof scale);
        const float *value = code->value[scale > 0];        /* a scale above 0: no negative element */
        for (int64_t i = 0; i < n; ++i) out[i] = scale == 0 ? 0 : value[state[first + i]] * fabsf(scale);
        return;
    }
    for (int64_t i = 0; i < n; ++i) {
        uint16_t h[2] = { 0, 0 };
        if (precision == DOT_STATE_BF16) memcpy(h, state + 2 * (first + i), 2); else memcpy(h, state + 4 * (first + i), 4);
        out[i] = dot__bf16_float(h[0]) + dot__bf16_float(h[1]);
    }
}

static void dot__state_encode(dot_state_precision precision, const dot__code *code, uint8_t *state, int64_t size, int64_t first, int64_t n,
                              const float *in, uint64_t seed, uint64_t stream)
{
    if (precision == DOT_STATE_8BIT) {
        float scale = 0;
        bool negative = false;
        for (int64_t i = 0; i < n; ++i) {
            if (!(fabsf(in[i]) <= scale)) scale = fabsf(in[i]);
            negative = negative || in[i] < 0;
        }
        for (int64_t i = 0; i < n; ++i) state[first + i] = scale > 0 ? dot__code_of(code->value[!negative], in[i] / scale) : 0;
        if (negative) scale = -scale;
        memcpy(state + size + first / DOT__BLOCK * (int64_t)sizeof scale, &scale, sizeof scale);
        return;
    }
    uint32_t words[4] = { 0, 0, 0, 0 };
    for (int64_t i = 0; i < n; ++i) {
        uint16_t h[2];
        if (precision == DOT_STATE_BF16) {
            if (i % 8 == 0) dot__random_words(seed, stream, (uint64_t)(first + i) / 8, words);
            h[0] = dot__bf16_random(in[i], words[i % 8 / 2] >> (i % 2 * 16));
            memcpy(state + 2 * (first + i), h, 2);
        } else {
            h[0] = dot__bf16_nearest(in[i]);
            h[1] = dot__bf16_nearest(in[i] - dot__bf16_float(h[0]));
            memcpy(state + 4 * (first + i), h, 4);
        }
    }
}

/* ---- the optimizer ---- */

#define DOT__MEMORY 4               /* doubles that a parameter keeps between steps, and */
#define DOT__MEMORY_ALL 8           /* a group */

/* A parameter under an optimizer. A factored one is seen as a matrix with a mean for each row and each column; PyTorch's first
   axis, which is factored against the rest, lies first or last in the stored order, hence is the rows or the columns. */
typedef struct dot__slot {
    dot__parameter *parameter;
    dot_tensor *tensor;
    char name[DOT_MAX_NAME];
    int index, group, order;                /* order: among those of this step */
    int64_t t;                              /* updates of this parameter so far */
    int64_t rows, columns;                  /* factored: the matrix; else size x 1 */
    bool factored;
    dot_tensor *state[DOT_MAX_STATES];      /* by rule: s0..s4; Adafactor: rows (or whole), columns, first moment */
    dot_tensor *backup;                     /* of theta: schedule-free, while the averaged point stands in the parameter; Hutchinson */
    dot_tensor *ahead;                      /* Hutchinson: the gradient at theta + h z */
    double *memory;                         /* [lane][DOT__MEMORY] */
    int64_t block_rows, blocks;             /* Adafactor: a piece is a block of rows */
    int64_t first_piece;                    /* of this step */
    char *scratch;                          /* Adafactor, this step: dot__factor_scratch a lane */
} dot__slot;

struct dot_optimizer {
    dot_context *ctx;
    dot_layer *layer;
    dot_optimizer_options options;
    dot__rule rule;
    unsigned states;                        /* of the rule: bits */
    bool factored;                          /* Adafactor and the factored AdamW */
    bool has_loss;                          /* of this step */
    bool averaged;                          /* the averaged point stands in the parameters */
    int slots, groups;                      /* groups: with the default group */
    dot__slot *slot;
    dot__code *code;                        /* 8-bit states */
    dot__numbers *hypers;                   /* [group][lane] */
    double *memory;                         /* [slot][lane][DOT__MEMORY], [group][lane][DOT__MEMORY_ALL] */
    int64_t memory_count;
    double *memory_all;                     /* the latter */
    double *clip;                           /* [lane]: what the gradients of the next step are multiplied by */
    double *loss;                           /* [lane]: of this step; NaN until told */
    double multiplier;
    int64_t steps;
    int active;                             /* slots of this step, */
    dot__slot **active_slot;
    int64_t pieces;
    double *norms;                          /* [lane]: scratch of the norms */
    dot__scalars *scalars;                  /* this step: [active slot][lane] */
    double *sums;                           /* this step: [lane][piece][DOT__SUMS] */
};

static dot__numbers *dot__hypers(const dot_optimizer *opt, int group, int lane) { return opt->hypers + group * opt->ctx->lanes + lane; }

/* The range of an option; `below`: the upper bound itself is excluded. */
static bool dot__option_ok(dot_context *ctx, const char *function, const char *name, double value, double low, double high, bool below)
{
    if (dot__finite(value) && value >= low && (below ? value < high : value <= high)) return true;
    dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s %g, expected %g to %g%s", function, name, value, low, high, below ? " (excluded)" : "");
    return false;
}

static bool dot__hyper_ok(dot_context *ctx, const char *function, dot_hyper which, double value)
{
    const dot__hyper_row *row = &dot__hyper_rows[which];
    bool below_1 = row->greatest == DOT__BELOW_1;
    return dot__option_ok(ctx, function, row->name, value, row->least, below_1 ? 1 : row->greatest, below_1);
}

static dot__rule dot__rule_of(const dot_optimizer_options *o)
{
#define DOT__RULE_ROW(constant, name, rule, description, source, ...) DOT__RULE_##rule,
    static const dot__rule rules[] = { DOT_OPTIMIZERS(DOT__RULE_ROW) };
#undef DOT__RULE_ROW
    bool dialect = rules[o->algorithm] == DOT__RULE_FACTORED && o->dialect != DOT_DIALECT_DEFAULT;
    return dialect ? DOT__RULE_ADAFACTOR : rules[o->algorithm];
}

/* The dialects that each rule has. */
static bool dot__dialect_ok(dot__rule rule, dot_dialect dialect)
{
    static const struct { dot__rule rule; dot_dialect dialect; } rows[] = {
        { DOT__RULE_AMSGRAD, DOT_DIALECT_OPTAX }, { DOT__RULE_AMSGRAD, DOT_DIALECT_PAPER }, { DOT__RULE_NADAM, DOT_DIALECT_OPTAX },
        { DOT__RULE_NADAM, DOT_DIALECT_MLCOMMONS }, { DOT__RULE_RADAM, DOT_DIALECT_OPTAX }, { DOT__RULE_RADAM, DOT_DIALECT_OFFICIAL },
        { DOT__RULE_LARS, DOT_DIALECT_OPTAX }, { DOT__RULE_RMSPROP, DOT_DIALECT_TF }, { DOT__RULE_ADAGRAD, DOT_DIALECT_INSIDE },
        { DOT__RULE_MUON, DOT_DIALECT_MATCH_RMS }, { DOT__RULE_MUON, DOT_DIALECT_SPECTRAL }, { DOT__RULE_MUON, DOT_DIALECT_OPTAX },
        { DOT__RULE_ADAFACTOR, DOT_DIALECT_OPTAX }, { DOT__RULE_ADAFACTOR, DOT_DIALECT_TORCH },
        { DOT__RULE_ADAFACTOR, DOT_DIALECT_HF }, { DOT__RULE_ADAFACTOR, DOT_DIALECT_T2T },
    };
    for (size_t i = 0; i < sizeof rows / sizeof *rows; ++i)
        if (rows[i].rule == rule && rows[i].dialect == dialect) return true;
    return dialect == DOT_DIALECT_DEFAULT;
}

bool dot_algorithm_has(dot_algorithm algorithm, dot_dialect dialect)
{
    dot_optimizer_options o = dot_optimizer_defaults(algorithm);
    o.dialect = dialect;
    return (unsigned)algorithm < DOT_ALGORITHMS && (unsigned)dialect < DOT_DIALECTS && dot__dialect_ok(dot__rule_of(&o), dialect);
}

static bool dot__has_curvature(dot__rule rule)
{
    return rule == DOT__RULE_SOPHIA_G || rule == DOT__RULE_SOPHIA_H || rule == DOT__RULE_ADAHESSIAN;
}

static bool dot__rule_options_ok(dot_context *ctx, const char *f, const dot_optimizer_options *o)
{
    dot__rule rule = dot__rule_of(o);
    const char *name = dot_algorithm_name(o->algorithm);
    if (!dot__dialect_ok(rule, o->dialect))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s has no dialect %d (%s), expected DOT_DIALECT_DEFAULT", f, name, (int)o->dialect,
                  (unsigned)o->dialect < DOT_DIALECTS ? dot_dialect_name(o->dialect) : "unknown");
    else if ((unsigned)o->state > DOT_STATE_8BIT)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: state %d, expected DOT_STATE_...", f, (int)o->state);
    else if (o->state != DOT_STATE_FULL && (rule >= DOT__RULE_COUNT || ctx->dtype != DOT_F32))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: state %d for %s, expected DOT_STATE_FULL: others are for float32 and elementwise rules", f,
                  (int)o->state, name);
    else if (o->cautious && rule >= DOT__RULE_COUNT)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: cautious %s, expected an elementwise rule", f, name);
    else if (o->decay == DOT_DECAY_CAUTIOUS && rule >= DOT__RULE_COUNT)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: decay %d for %s, expected an elementwise rule", f, (int)o->decay, name);
    else if (o->nesterov && (o->beta1 == 0 || o->dampening != 0))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: nesterov with beta1 %g and dampening %g, expected momentum and no dampening", f, o->beta1,
                  o->dampening);
    else if ((rule == DOT__RULE_SCHEDULE_FREE_SGD || rule == DOT__RULE_SCHEDULE_FREE_ADAMW) && o->beta1 == 0)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s with beta1 0, expected more: the averaged point would be lost", f, name);
    else if (rule == DOT__RULE_PSGD_KRON && o->initial == 0)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: initial 0 for %s, expected more: the preconditioner would stay 0", f, name);
    else if (rule == DOT__RULE_CUSTOM
             && (!o->rule || !o->rule->name || !o->rule->update || o->rule->states < 0 || o->rule->states > DOT_MAX_STATES))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: rule %s with %d states, expected a name, an update function and 0 to %d states", f,
                  o->rule && o->rule->name ? o->rule->name : "NULL", o->rule ? o->rule->states : 0, DOT_MAX_STATES);
    else return true;
    return false;
}

static bool dot__optimizer_options_ok(dot_context *ctx, const char *f, const dot_optimizer_options *o)
{
    if (o->magic != DOT__MAGIC_OPTIMIZER || (unsigned)o->algorithm >= DOT_ALGORITHMS || (unsigned)o->decay > DOT_DECAY_FIXED) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: algorithm %d, decay %d, expected options filled by dot_optimizer_defaults (magic 0x%08x)", f,
                  (int)o->algorithm, (int)o->decay, (unsigned)o->magic);
        return false;
    }
    if (o->group_count < 0 || o->group_count > 1024 || (o->group_count > 0 && !o->groups)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: group_count %d, expected 0 to 1024 and groups", f, o->group_count);
        return false;
    }
    for (int i = 0; i < o->group_count; ++i)
        if (!dot__hyper_ok(ctx, f, DOT_HYPER_LR, o->groups[i].lr)
            || !dot__hyper_ok(ctx, f, DOT_HYPER_WEIGHT_DECAY, o->groups[i].weight_decay)) return false;
    dot_optimizer_options copy = *o;
    for (int i = 0; i < DOT_HYPERS; ++i)
        if (!dot__hyper_ok(ctx, f, (dot_hyper)i, *dot__option(&copy, i))) return false;
    return dot__rule_options_ok(ctx, f, o);
}

/* Does `name` match `pattern`, where * stands for any characters and ? for one? */
static bool dot__matches(const char *pattern, const char *name)
{
    if (*pattern == 0) return *name == 0;
    if (*pattern == '*') return dot__matches(pattern + 1, name) || (*name && dot__matches(pattern, name + 1));
    return *name && (*pattern == '?' || *pattern == *name) && dot__matches(pattern + 1, name + 1);
}

static bool dot__trainable(const dot__parameter *p) { return p->kind != DOT_KIND_BUFFER && dot__is_float(p->tensor->dtype); }

static bool dot__slot_visit(void *user, const char *name, dot__parameter *p)
{
    dot_optimizer *opt = (dot_optimizer *)user;
    if (!dot__trainable(p)) return true;
    dot__slot *slot = &opt->slot[opt->slots];
    slot->index = opt->slots++;
    slot->parameter = p;
    slot->tensor = p->tensor;
    memcpy(slot->name, name, strlen(name) + 1);
    for (int i = opt->options.group_count; i > 0; --i) {
        const dot_parameter_group *group = &opt->options.groups[i - 1];
        if ((group->kinds & (unsigned)p->kind) || (group->pattern && dot__matches(group->pattern, name))) slot->group = i;
    }
    return true;
}

/* What a parameter needs: the matrix that a factored one is seen as, and the elements and type of each state. From state `wide` on the
   type is double. */
typedef struct dot__plan { int64_t rows, columns; bool factored; int64_t size[DOT_MAX_STATES]; dot_dtype dtype; int wide; } dot__plan;

static dot_dtype dot__plan_dtype(const dot__plan *plan, int i) { return i < plan->wide ? plan->dtype : DOT_F64; }

/* The two axes that an Adafactor dialect factors, and the sizes of R (without `column`) and C (without `row`). */
typedef struct dot__factor_axes { bool factored; int row, column; int64_t r, c; } dot__factor_axes;
static dot__factor_axes dot__factor_axes_of(dot_dialect dialect, const dot__parameter *p);

/* Shampoo and SOAP: the matrix of a side that is preconditioned. */
static int64_t dot__shampoo_size(const dot_optimizer_options *f, int64_t side, bool matrix, int64_t otherwise)
{
    return !matrix ? otherwise : (double)side <= f->max_precond_dim ? side * side : 0;
}

/* PSGD-Kron: a triangle, or only its diagonal where the side is too long, or 1. */
static bool dot__kron_diagonal(const dot_optimizer_options *f, int64_t side) { return side == 1 || (double)side > f->max_precond_dim; }
static int64_t dot__kron_size(const dot_optimizer_options *f, int64_t side) { return dot__kron_diagonal(f, side) ? side : side * side; }

static int64_t dot__galore_rank(double rank, int64_t rows, int64_t columns) { return dot__min((int64_t)rank, dot__min(rows, columns)); }

static void dot__matrix_plan(dot__rule rule, const dot_optimizer_options *f, const dot__parameter *p, int64_t size[DOT_MAX_STATES])
{
    bool matrix = p->rank >= 2 && p->tensor->size > 0;
    int64_t n = p->tensor->size, rows = matrix ? p->shape[0] : n > 0, columns = rows ? n / rows : 0, axes = n > 0 && p->rank == 0;
    for (int i = 0; i < p->rank && n > 0; ++i) axes += p->shape[i];
    (void)columns;
    (void)f;
#define DOT__MATRIX_CASE(name, size0, size1, size2, size3, size4, names, function) \
    case DOT__RULE_##name: size[0] = size0; size[1] = size1; size[2] = size2; size[3] = size3; size[4] = size4; break;
    switch (rule) {
    DOT__MATRIX_RULES(DOT__MATRIX_CASE)
    default: break;
    }
#undef DOT__MATRIX_CASE
}

static dot__plan dot__plan_of(const dot_optimizer_options *o, const dot__parameter *p)
{
    dot__plan plan;
    dot__rule rule = dot__rule_of(o);
    int64_t n = p->tensor->size;
    memset(&plan, 0, sizeof plan);
    plan.rows = n;
    plan.columns = 1;
    plan.dtype = o->state == DOT_STATE_FULL ? p->tensor->dtype : DOT_U8;
    plan.wide = rule == DOT__RULE_SOAP ? 2 : DOT_MAX_STATES;    /* float would drown the small eigenvalues, whose directions Adam scales up */
    if (rule > DOT__RULE_MATRIX) {
        dot__matrix_plan(rule, o, p, plan.size);
        return plan;
    }
    if (rule != DOT__RULE_FACTORED) {
        unsigned states = dot__rule_states(rule, o);
        for (int i = 0; i < DOT_MAX_STATES; ++i)
            plan.size[i] = !(states >> i & 1) ? 0 : plan.dtype == DOT_U8 ? (int64_t)dot__state_size(o->state, DOT_F32, n) : n;
        return plan;
    }
    if (p->rank >= 2 && n > 0) {
        plan.factored = true;
        plan.columns = p->layout.axis[0] != 0 ? p->shape[0] : n / p->shape[0];
        plan.rows = n / plan.columns;
        plan.size[1] = plan.columns;
    }
    plan.size[0] = plan.rows;
    plan.size[2] = o->beta1 > 0 ? n : 0;
    return plan;
}

static bool dot__slot_states(dot_optimizer *opt, dot__slot *slot)
{
    dot__plan plan = dot__plan_of(&opt->options, slot->parameter);
    bool empty = slot->tensor->size == 0;
    slot->rows = plan.rows;
    slot->columns = plan.columns;
    slot->factored = plan.factored;
    slot->block_rows = dot__max(1, 8192 / slot->columns);
    slot->blocks = dot__ceil_div(slot->rows, slot->block_rows);
    for (int i = 0; i < DOT_MAX_STATES; ++i)
        if ((plan.size[i] > 0 || (empty && opt->states >> i & 1))
            && !(slot->state[i] = dot__persistent_tensor(opt->ctx, dot__plan_dtype(&plan, i), 1, &plan.size[i], plan.size[i]))) return false;
    return true;
}

typedef struct dot__bytes_job { const dot_optimizer_options *options; size_t bytes; int lanes; } dot__bytes_job;

static bool dot__bytes_visit(void *user, const char *name, dot__parameter *p)
{
    dot__bytes_job *job = (dot__bytes_job *)user;
    (void)name;
    if (!dot__trainable(p)) return true;
    dot__plan plan = dot__plan_of(job->options, p);
    for (int i = 0; i < DOT_MAX_STATES; ++i) job->bytes += (size_t)plan.size[i] * dot_dtype_size(dot__plan_dtype(&plan, i)) * (size_t)job->lanes;
    return true;
}

size_t dot_optimizer_bytes(dot_layer *layer, const dot_optimizer_options *options)
{
    dot_optimizer_options o = options ? *options : dot_optimizer_defaults(DOT_ADAMW);
    dot__bytes_job job;
    if (!layer || !dot_ok(layer->ctx) || !dot__optimizer_options_ok(layer->ctx, "dot_optimizer_bytes", &o)) return 0;
    job.options = &o;
    job.bytes = 0;
    job.lanes = layer->ctx->lanes;
    dot__visit(layer, "", dot__bytes_visit, &job);
    return job.bytes;
}

static bool dot__optimizer_allocate(dot_optimizer *opt)
{
    dot_context *ctx = opt->ctx;
    size_t count = (size_t)dot_layer_parameters(opt->layer), lanes = (size_t)ctx->lanes, groups = (size_t)opt->groups;
    if (!(opt->slot = (dot__slot *)dot__new(ctx, count * sizeof(dot__slot)))
        || !(opt->active_slot = (dot__slot **)dot__new(ctx, count * sizeof(dot__slot *)))
        || !(opt->hypers = (dot__numbers *)dot__new(ctx, groups * lanes * sizeof(dot__numbers)))
        || !(opt->clip = (double *)dot__new(ctx, lanes * sizeof(double))) || !(opt->loss = (double *)dot__new(ctx, lanes * sizeof(double)))
        || !(opt->norms = (double *)dot__new(ctx, lanes * sizeof(double)))) return false;
    if (opt->options.state == DOT_STATE_8BIT) {
        if (!(opt->code = (dot__code *)dot__new(ctx, sizeof(dot__code)))) return false;
        dot__code_make(opt->code);
    }
    if (!dot__visit(opt->layer, "", dot__slot_visit, opt)) return false;
    opt->memory_count = ((int64_t)opt->slots * DOT__MEMORY + opt->groups * DOT__MEMORY_ALL) * ctx->lanes;
    if (!(opt->memory = (double *)dot__new(ctx, (size_t)opt->memory_count * sizeof(double)))) return false;
    opt->memory_all = opt->memory + opt->slots * ctx->lanes * DOT__MEMORY;
    for (int i = 0; i < opt->slots; ++i) {
        opt->slot[i].memory = opt->memory + i * ctx->lanes * DOT__MEMORY;
        if (!dot__slot_states(opt, &opt->slot[i])) return false;
    }
    return true;
}

dot_optimizer *dot_optimizer_create(dot_context *ctx, dot_layer *layer, const dot_optimizer_options *options)
{
    if (!dot_ok(ctx) || !layer) return NULL;
    dot_optimizer_options o = options ? *options : dot_optimizer_defaults(DOT_ADAMW);
    ctx->function = "dot_optimizer_create";
    if (layer->ctx != ctx) {
        dot__fail(ctx, DOT_ERROR_STATE, "dot_optimizer_create: layer of another context");
        return NULL;
    }
    if (!dot__optimizer_options_ok(ctx, "dot_optimizer_create", &o)) return NULL;
    dot_optimizer *opt = (dot_optimizer *)dot__new(ctx, sizeof *opt);
    if (!opt) return NULL;
    opt->ctx = ctx;
    opt->layer = layer;
    opt->options = o;
    opt->groups = o.group_count + 1;
    opt->rule = dot__rule_of(&o);
    opt->states = dot__rule_states(opt->rule, &o);
    opt->factored = opt->rule == DOT__RULE_FACTORED;
    if (!dot__optimizer_allocate(opt)) return NULL;
    for (int group = 0; group < opt->groups; ++group)
        for (int lane = 0; lane < ctx->lanes; ++lane) {
            dot__numbers *h = dot__hypers(opt, group, lane);
            for (int i = 0; i < DOT_HYPERS; ++i) *dot__number(h, i) = *dot__option(&o, i);
            if (group) {
                h->lr = o.groups[group - 1].lr;
                h->weight_decay = o.groups[group - 1].weight_decay;
            }
            if (opt->rule == DOT__RULE_PRODIGY || opt->rule == DOT__RULE_DADAPT_ADAM)
                opt->memory_all[(group * ctx->lanes + lane) * DOT__MEMORY_ALL] = h->d0;
            opt->clip[lane] = 1;
            opt->loss[lane] = (double)NAN;
        }
    opt->options.groups = NULL;             /* the caller's array need not live on */
    bool relative = o.relative_step && o.dialect != DOT_DIALECT_OPTAX && (opt->factored || opt->rule == DOT__RULE_ADAFACTOR);
    if (relative) dot__log(ctx, "%s: the step is min(lr, 1/sqrt(t)): lr %g is only its upper bound",
                                                   dot_algorithm_name(o.algorithm), o.lr);
    return opt;
}

static bool dot__hyper_index_ok(const dot_optimizer *opt, const char *function, dot_hyper which, int group, int lane, bool all)
{
    if ((unsigned)which >= DOT_HYPERS || group < (all ? DOT_ALL : 0) || group >= opt->groups) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "%s: hyperparameter %d of group %d, expected DOT_HYPER_... and 0..%d", function, (int)which,
                  group, opt->groups - 1);
        return false;
    }
    return dot__lane_ok(opt->ctx, function, lane, all);
}

bool dot_optimizer_set(dot_optimizer *opt, dot_hyper which, int group, int lane, double value)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__hyper_index_ok(opt, "dot_optimizer_set", which, group, lane, true)
        || !dot__hyper_ok(opt->ctx, "dot_optimizer_set", which, value)) return false;
    double created = *dot__option(&opt->options, (int)which);
    if ((which == DOT_HYPER_RANK || which == DOT_HYPER_MAX_PRECOND_DIM) && value != created) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_optimizer_set: %s %g, expected the %g of the optimizer's creation",
                  dot_hyper_name(which), value, created);
        return false;
    }
    dot_optimizer_options changed = opt->options;
    changed.beta1 = value;
    if (which == DOT_HYPER_BETA1 && value > 0 && opt->options.beta1 == 0
        && (opt->rule >= DOT__RULE_COUNT || dot__rule_states(opt->rule, &changed) != opt->states)) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_optimizer_set: beta1 %g, but the optimizer was created without a first moment", value);
        return false;
    }
    for (int g = 0; g < opt->groups; ++g)
        for (int k = 0; k < opt->ctx->lanes; ++k)
            if ((group == DOT_ALL || group == g) && (lane == DOT_ALL || lane == k)) *dot__number(dot__hypers(opt, g, k), (int)which) = value;
    return true;
}

double dot_optimizer_get(const dot_optimizer *opt, dot_hyper which, int group, int lane)
{
    if (!opt || !dot__hyper_index_ok(opt, "dot_optimizer_get", which, group, lane, false)) return (double)NAN;
    return *dot__number(dot__hypers(opt, group, lane), (int)which);
}

int64_t dot_optimizer_steps(const dot_optimizer *opt) { return opt ? opt->steps : 0; }

size_t dot_optimizer_state_bytes(const dot_optimizer *opt)
{
    size_t bytes = 0;
    for (int i = 0; opt && i < opt->slots; ++i)
        for (int s = 0; s < DOT_MAX_STATES; ++s)
            if (opt->slot[i].state[s])
                bytes += (size_t)opt->slot[i].state[s]->size * dot_dtype_size(opt->slot[i].state[s]->dtype) * (size_t)opt->ctx->lanes;
    return bytes;
}

bool dot_optimizer_loss(dot_optimizer *opt, const dot_tensor *loss)
{
    if (!opt || !loss || !dot_ok(opt->ctx)) return false;
    if (loss->ctx != opt->ctx || !dot__is_float(loss->dtype) || loss->size != 1) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_optimizer_loss: loss of " DOT__I64 " elements, expected a scalar of the same context",
                  DOT__LL(loss->size));
        return false;
    }
    for (int lane = 0; lane < opt->ctx->lanes; ++lane) opt->loss[lane] = dot_item(loss, lane);
    opt->has_loss = true;
    return true;
}

/* ---- norms over all parameters: sums of squares by pieces, added up in order ---- */

typedef struct dot__norm_job { dot_optimizer *opt; bool gradient; double *partial; } dot__norm_job;

/* The slot that a piece of this step belongs to. */
static dot__slot *dot__slot_of_piece(const dot_optimizer *opt, int64_t piece)
{
    int low = 0, high = opt->active - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (opt->active_slot[middle]->first_piece <= piece) low = middle; else high = middle - 1;
    }
    return opt->active_slot[low];
}

/* Selects the slots that have a gradient (or all) and numbers their pieces: of elements, or of Adafactor's blocks. */
static void dot__select(dot_optimizer *opt, bool all, bool blocks)
{
    opt->active = 0;
    opt->pieces = 0;
    for (int i = 0; i < opt->slots; ++i) {
        dot__slot *slot = &opt->slot[i];
        if (slot->tensor->size == 0 || !(all || slot->tensor->has_grad)) continue;
        opt->active_slot[opt->active++] = slot;
        slot->order = opt->active - 1;
        slot->first_piece = opt->pieces;
        opt->pieces += blocks ? slot->blocks : dot__ceil_div(slot->tensor->size, DOT__PIECE);
    }
}

static void dot__norm_piece(void *argument, int lane, int64_t piece)
{
    dot__norm_job *job = (dot__norm_job *)argument;
    dot__slot *slot = dot__slot_of_piece(job->opt, piece);
    dot_tensor *t = job->gradient ? slot->tensor->grad : slot->tensor;
    int64_t n, i = dot__part(t->size, piece - slot->first_piece, DOT__PIECE, &n);
    double a = 0, b = 0;
    for (n += i; i < n; ++i) {
        double x = dot__load(dot__at(t, lane), t->dtype, i);
        if (i & 1) a += x * x; else b += x * x;
    }
    job->partial[lane * job->opt->pieces + piece] = a + b;
}

static bool dot__norms(dot_optimizer *opt, bool gradient)
{
    dot_context *ctx = opt->ctx;
    dot__norm_job job;
    dot__select(opt, !gradient, false);
    dot__mark mark = dot__scratch_begin(ctx);
    job.opt = opt;
    job.gradient = gradient;
    job.partial = (double *)dot__step_alloc(ctx, (size_t)opt->pieces * (size_t)ctx->lanes * sizeof(double));
    if (!job.partial) return false;
    dot__parallel(ctx, true, opt->pieces, dot__norm_piece, &job);
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        opt->norms[lane] = 0;
        for (int64_t p = 0; p < opt->pieces && !ctx->lane_stopped[lane]; ++p) opt->norms[lane] += job.partial[lane * opt->pieces + p];
        opt->norms[lane] = sqrt(opt->norms[lane]);
    }
    dot__scratch_end(ctx, mark);
    return true;
}

static double dot__one_norm(const char *function, dot_optimizer *opt, int lane, bool gradient)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__lane_ok(opt->ctx, function, lane, false)) return 0;
    opt->ctx->function = function;
    if (!dot__norms(opt, gradient)) return 0;
    return opt->norms[lane];
}

double dot_grad_norm(dot_optimizer *opt, int lane)   { return dot__one_norm("dot_grad_norm", opt, lane, true); }
double dot_weight_norm(dot_optimizer *opt, int lane) { return dot__one_norm("dot_weight_norm", opt, lane, false); }

double dot_clip_grad_norm(dot_optimizer *opt, double max_norm)
{
    if (!opt || !dot_ok(opt->ctx)) return 0;
    if (!(max_norm > 0) || !dot__finite(max_norm)) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_clip_grad_norm: max_norm %g, expected a positive number", max_norm);
        return 0;
    }
    opt->ctx->function = "dot_clip_grad_norm";
    if (!dot__norms(opt, true)) return 0;
    for (int lane = 0; lane < opt->ctx->lanes; ++lane) {
        double scale = max_norm / (opt->norms[lane] + 1e-6);
        opt->clip[lane] = scale < 1 ? scale : 1;
    }
    return opt->norms[0];
}

/* ---- one step ---- */

/* What is common to all rules: the gradient's scale, the decay in its modes, and the numbers that most rules read. */
static dot__scalars dot__common_scalars(const dot_optimizer *opt, const dot__slot *slot, int lane)
{
    const dot_optimizer_options *f = &opt->options;
    const dot__numbers *o = dot__hypers(opt, slot->group, lane);
    double lambda = o->weight_decay, eta = opt->multiplier, t = (double)slot->t;
    dot__scalars s;
    memset(&s, 0, sizeof s);
    s.gradient = opt->clip[lane] * (f->maximize ? -1 : 1);
    s.keep = s.after = 1;
    switch (f->decay) {
    case DOT_DECAY_L2:         s.l2 = lambda; break;
    case DOT_DECAY_SCHEDULED:  s.keep = 1 - eta * o->decay_lr * lambda; break;
    case DOT_DECAY_NORMALIZED: s.keep = 1 - eta * o->decay_lr * lambda / sqrt(o->decay_period); break;
    case DOT_DECAY_CORRECTED:  s.keep = 1 - eta * eta * o->lr * lambda; break;
    case DOT_DECAY_CAUTIOUS:   s.cautious_decay = eta * o->lr * lambda; break;
    case DOT_DECAY_PROX:       s.after = 1 / (1 + eta * o->lr * lambda); break;
    case DOT_DECAY_FIXED:      s.keep = 1 - lambda; break;
    default:                   s.keep = 1 - eta * o->lr * lambda; break;
    }
    s.lr = o->lr * eta;
    s.beta1 = o->beta1;
    s.beta2 = o->beta2;
    s.beta3 = o->beta3;
    s.a1 = 1 - o->beta1;
    s.a2 = 1 - o->beta2;
    s.a3 = 1 - o->beta3;
    s.step1 = s.lr / (1 - pow(o->beta1, t));
    s.root2 = 1 / sqrt(1 - pow(o->beta2, t));
    s.eps = o->eps;
    s.first = slot->t == 1;
    return s;
}

/* The pieces of a slot's elements that a pass is cut into, and the sum of their measures. */
static int64_t dot__slot_pieces(const dot__slot *slot) { return dot__ceil_div(slot->tensor->size, DOT__PIECE); }

static void dot__slot_sums(const dot_optimizer *opt, const dot__slot *slot, int lane, double *sum)
{
    for (int64_t p = slot->first_piece; p < slot->first_piece + dot__slot_pieces(slot); ++p)
        for (int k = 0; k < DOT__SUMS; ++k) sum[k] += opt->sums[(lane * opt->pieces + p) * DOT__SUMS + k];
}

typedef struct dot__step_job { dot_optimizer *opt; bool measure, final; } dot__step_job;

static void dot__prepare_piece(void *argument, int lane, int64_t index)
{
    dot__step_job *job = (dot__step_job *)argument;
    dot_optimizer *opt = job->opt;
    const dot__slot *slot = opt->active_slot[index];
    dot__scalars *h = opt->scalars + index * opt->ctx->lanes + lane;
    double memory[DOT__MEMORY];             /* the first preparation of two changes nothing */
    dot__preparation p;
    *h = dot__common_scalars(opt, slot, lane);
    if (job->final && opt->sums) dot__slot_sums(opt, slot, lane, h->sum);
    memcpy(memory, slot->memory + lane * DOT__MEMORY, sizeof memory);
    p.o = dot__hypers(opt, slot->group, lane);
    p.f = &opt->options;
    p.t = (double)slot->t;
    p.n = (double)slot->tensor->size;
    p.m = job->final ? slot->memory + lane * DOT__MEMORY : memory;
    p.all = opt->memory_all + (slot->group * opt->ctx->lanes + lane) * DOT__MEMORY_ALL;
    p.first = slot->t == 1;
    p.final = job->final;
    double agreeing = h->sum[3] / p.n;
    dot__rule_prepare(opt->rule, h, &p);
    if (opt->options.cautious) h->caution = job->final ? 1 / (agreeing > 1e-3 ? agreeing : 1e-3) : 1;
}

static void dot__rule_range(const dot_optimizer *opt, const dot__slot *slot, int lane, int64_t first, int64_t n, const dot__scalars *h)
{
    dot_rule_range range;
    size_t size = dot_dtype_size(slot->tensor->dtype);
    memset(&range, 0, sizeof range);
    range.dtype = slot->tensor->dtype;
    range.theta = (char *)dot__at(slot->tensor, lane) + (size_t)first * size;
    range.gradient = (char *)dot__at(slot->tensor->grad, lane) + (size_t)first * size;
    for (int i = 0; i < DOT_MAX_STATES; ++i)
        if (slot->state[i]) range.state[i] = (char *)dot__at(slot->state[i], lane) + (size_t)first * size;
    range.first = first;
    range.count = n;
    range.step = slot->t;
    range.lane = lane;
    range.lr = h->lr;
    range.gradient_scale = h->gradient;
    range.l2 = h->l2;
    range.keep = h->keep;
    opt->options.rule->update(opt->options.rule->user, &range);
}

static void dot__rule_run(const dot_optimizer *opt, float *w, const float *g, float *const *s, int64_t n, const dot__scalars *h, double *sums)
{
#ifdef DOT__AVX2
    const dot__kernels *kernel = dot__kernel(opt->ctx, DOT_F32);
    if (kernel != &dot__kernels_portable[0]) {
        bool wide = kernel == &dot__kernels_avx512[0];
        dot__rule_run_f32((wide ? dot__rules_avx512 : dot__rules_avx2)[opt->rule], wide ? DOT__WIDTH_avx512 : DOT__WIDTH_avx2, w, g, s, n, h, sums);
        return;
    }
#endif
    dot__rule_run_portable(dot__rules_f64[opt->rule], w, g, s, n, h, sums);
}

/* A range of elements whose states are kept in another precision: block by block through a buffer. */
static void dot__rule_blocks(const dot_optimizer *opt, const dot__slot *slot, int lane, int64_t first, int64_t n, const dot__scalars *h,
                             double *sums)
{
    dot_state_precision precision = opt->options.state;
    float buffer[DOT_MAX_STATES][DOT__BLOCK], *s[DOT_MAX_STATES];
    float *w = (float *)(void *)dot__at(slot->tensor, lane), *g = (float *)(void *)dot__at(slot->tensor->grad, lane);
    for (int64_t end = first + n, size = slot->tensor->size; first < end; first += DOT__BLOCK) {
        int64_t count = dot__min(DOT__BLOCK, end - first);
        for (int i = 0; i < DOT_MAX_STATES; ++i) {
            s[i] = slot->state[i] ? buffer[i] : NULL;
            if (s[i]) dot__state_decode(precision, opt->code, (uint8_t *)dot__at(slot->state[i], lane), size, first, count, s[i]);
        }
        dot__rule_run(opt, w + first, g + first, s, count, h, sums);
        for (int i = 0; i < DOT_MAX_STATES && !sums; ++i) {
            uint64_t stream = DOT__STREAM_STATE | (uint64_t)slot->index << 40 | (uint64_t)i << 38 | (uint64_t)slot->t;
            if (s[i]) dot__state_encode(precision, opt->code, (uint8_t *)dot__at(slot->state[i], lane), size, first, count, s[i],
                                        opt->ctx->lane_seeds[lane], stream);
        }
    }
}

static void dot__rule_piece(void *argument, int lane, int64_t piece)
{
    dot__step_job *job = (dot__step_job *)argument;
    dot_optimizer *opt = job->opt;
    const dot__slot *slot = dot__slot_of_piece(opt, piece);
    const dot__scalars *h = opt->scalars + slot->order * opt->ctx->lanes + lane;
    double *sums = job->measure ? opt->sums + (lane * opt->pieces + piece) * DOT__SUMS : NULL;
    int64_t n, i = dot__part(slot->tensor->size, piece - slot->first_piece, DOT__PIECE, &n);
    for (int k = 0; k < DOT__SUMS && sums; ++k) sums[k] = 0;
    if (opt->rule == DOT__RULE_CUSTOM) {
        dot__rule_range(opt, slot, lane, i, n, h);
        return;
    }
    if (slot->tensor->dtype == DOT_F64) {
        double *s[DOT_MAX_STATES];
        for (int k = 0; k < DOT_MAX_STATES; ++k) s[k] = slot->state[k] ? (double *)(void *)dot__at(slot->state[k], lane) + i : NULL;
        dot__rules_f64[opt->rule]((double *)(void *)dot__at(slot->tensor, lane) + i, (double *)(void *)dot__at(slot->tensor->grad, lane) + i,
                                  s, n, n, h, sums);
        return;
    }
    if (opt->options.state != DOT_STATE_FULL) {
        dot__rule_blocks(opt, slot, lane, i, n, h, sums);
        return;
    }
    float *s[DOT_MAX_STATES];
    for (int k = 0; k < DOT_MAX_STATES; ++k) s[k] = slot->state[k] ? (float *)(void *)dot__at(slot->state[k], lane) + i : NULL;
    dot__rule_run(opt, (float *)(void *)dot__at(slot->tensor, lane) + i, (float *)(void *)dot__at(slot->tensor->grad, lane) + i, s, n, h, sums);
}

/* ---- rules with numbers of the whole optimizer: `sum` over all parameters; `all` is kept between steps, for each group ---- */

static void dot__polyak(const dot__numbers *o, double lr, double loss, const double *sum, double *all)
{
    double square = sum[0] + o->eps, step = square > DBL_EPSILON ? (loss - o->lower_bound) / square : 0;
    all[0] = step < lr ? step : lr;
}

/* all: d, its maximum, the numerator, d of this step, the denominator. */
static void dot__estimate_distance(dot__rule rule, const dot__numbers *o, const double *sum, double *all)
{
    bool prodigy = rule == DOT__RULE_PRODIGY;
    double beta = prodigy && o->beta3 > 0 ? o->beta3 : sqrt(o->beta2), share = prodigy ? 1 : 1 - beta;
    all[3] = all[0];
    all[4] = sum[1];
    all[2] = beta * all[2] + share * sum[0];
    if (sum[1] == 0) return;
    double d = (prodigy ? o->d_coef : 1) * all[2] / (share * sum[1]);
    if (d > all[0]) all[0] = d;
}

/* all: distance (DoWG: its square), the step, weighted sum of squares. */
static void dot__distance_over_gradients(dot__rule rule, const dot__numbers *o, bool first, const double *sum, double *all)
{
    bool weighted = rule == DOT__RULE_DOWG;
    double distance = weighted ? sum[0] : sqrt(sum[0]);
    if (first) all[0] = weighted ? o->r_eps : o->r_eps * (1 + sqrt(sum[2]));
    if (distance > all[0]) all[0] = distance;
    all[2] += weighted ? all[0] * sum[1] : sum[1];
    all[1] = all[0] / (weighted ? sqrt(all[2]) + o->eps : sqrt(all[2] + o->eps));
}

/* all: the step, the mean loss. sum[2] is the mean of <g, theta>. */
static void dot__momo(dot__rule rule, const dot_optimizer_options *f, const dot__numbers *o, double lr, double loss, double t,
                      const double *sum, double *all)
{
    bool adam = rule == DOT__RULE_MOMO_ADAM;
    double beta = !adam && t == 1 ? 0 : o->beta1, corrected = adam ? 1 - pow(o->beta1, t) : 1;
    double prox = f->decay == DOT_DECAY_PROX ? 1 + lr * o->weight_decay : 1;
    all[1] = beta * all[1] + (1 - beta) * loss;
    double gap = prox * (all[1] - corrected * o->lower_bound - sum[2]) + sum[1];
    all[0] = sum[0] > 0 && gap > 0 ? gap / sum[0] : 0;
    if (all[0] > lr / corrected) all[0] = lr / corrected;
}

static void dot__rule_over_all(const dot_optimizer *opt, int group, int lane, const double *sum)
{
    const dot__numbers *o = dot__hypers(opt, group, lane);
    double lr = o->lr * opt->multiplier, loss = opt->loss[lane], *all = opt->memory_all + (group * opt->ctx->lanes + lane) * DOT__MEMORY_ALL;
    switch (opt->rule) {
    case DOT__RULE_POLYAK_SGD: dot__polyak(o, lr, loss, sum, all); break;
    case DOT__RULE_PRODIGY: case DOT__RULE_DADAPT_ADAM: dot__estimate_distance(opt->rule, o, sum, all); break;
    case DOT__RULE_DOG: case DOT__RULE_DOWG: dot__distance_over_gradients(opt->rule, o, opt->steps == 0, sum, all); break;
    case DOT__RULE_MOMO: case DOT__RULE_MOMO_ADAM:
        dot__momo(opt->rule, &opt->options, o, lr, loss, (double)opt->steps + 1, sum, all); break;
    default: break;
    }
}

/* A parameter that has no gradient in this step is still some way from where it began. */
static void dot__resting_sums(const dot__slot *slot, int lane, double *sum)
{
    const dot_tensor *w = slot->tensor;
    for (int64_t i = 0; i < w->size && slot->state[0]; ++i) {
        double theta = dot__load(dot__at(slot->tensor, lane), w->dtype, i);
        double away = slot->t > 0 ? theta - dot__load(dot__at(slot->state[0], lane), w->dtype, i) : 0;
        sum[0] += away * away;
        sum[2] += theta * theta;
    }
}

static void dot__over_all(dot_optimizer *opt)
{
    dot_context *ctx = opt->ctx;
    bool momo = opt->rule == DOT__RULE_MOMO || opt->rule == DOT__RULE_MOMO_ADAM;
    bool distance = opt->rule == DOT__RULE_DOG || opt->rule == DOT__RULE_DOWG;
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        double sum[DOT__SUMS] = { 0 };
        if (ctx->lane_stopped[lane]) continue;
        for (int i = 0; i < opt->active; ++i) {
            dot__slot *slot = opt->active_slot[i];
            double own[DOT__SUMS] = { 0 }, *mean = slot->memory + lane * DOT__MEMORY;
            double beta = slot->t == 1 && opt->rule == DOT__RULE_MOMO ? 0 : dot__hypers(opt, slot->group, lane)->beta1;
            dot__slot_sums(opt, slot, lane, own);
            if (momo) own[2] = *mean = beta * *mean + (1 - beta) * own[2];
            for (int k = 0; k < DOT__SUMS; ++k) sum[k] += own[k];
        }
        for (int i = 0; i < opt->slots && distance && opt->options.state == DOT_STATE_FULL; ++i)
            if (!opt->slot[i].tensor->has_grad) dot__resting_sums(&opt->slot[i], lane, sum);
        for (int group = 0; group < opt->groups; ++group) dot__rule_over_all(opt, group, lane, sum);
    }
}

static bool dot__rule_step(dot_optimizer *opt)
{
    dot_context *ctx = opt->ctx;
    bool measured = opt->options.cautious || (opt->states & (DOT__PER_TENSOR | DOT__OVER_ALL));
    dot__mark mark = dot__scratch_begin(ctx);
    dot__step_job job;
    job.opt = opt;
    job.measure = measured;
    job.final = false;
    opt->sums = NULL;
    opt->scalars = (dot__scalars *)dot__step_alloc(ctx, (size_t)opt->active * (size_t)ctx->lanes * sizeof(dot__scalars));
    if (measured) opt->sums = (double *)dot__step_alloc(ctx, (size_t)opt->pieces * (size_t)ctx->lanes * DOT__SUMS * sizeof(double));
    if (!opt->scalars || (measured && !opt->sums)) return false;
    for (int i = 0; i < opt->active; ++i) opt->active_slot[i]->t++;
    if (measured) {
        dot__parallel(ctx, true, opt->active, dot__prepare_piece, &job);
        dot__parallel(ctx, true, opt->pieces, dot__rule_piece, &job);
    }
    if (opt->states & DOT__OVER_ALL) dot__over_all(opt);
    job.measure = false;
    job.final = true;
    dot__parallel(ctx, true, opt->active, dot__prepare_piece, &job);
    dot__parallel(ctx, true, opt->pieces, dot__rule_piece, &job);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- Adafactor: moments of rows and columns, RMS of the update, then the update ----
   A piece is a block of rows; what pieces sum is added up in the order of the blocks. */

typedef struct dot__factor_scratch {        /* views into one slot's and lane's scratch memory */
    double *row, *column;                   /* sums of g^2 by row; by [block][column] */
    double *theta, *update;                 /* sums of squares by block */
    double *mean, *alpha, *shrink;          /* of R; the step; 1 / max(1, RMS(U)/d) */
} dot__factor_scratch;

static size_t dot__factor_scratch_size(const dot__slot *slot)
{
    return (size_t)(slot->rows + slot->blocks * slot->columns + 2 * slot->blocks + 3);
}

static dot__factor_scratch dot__factor_views(const dot__slot *slot, int lane)
{
    dot__factor_scratch f;
    f.row = (double *)(void *)slot->scratch + (size_t)lane * dot__factor_scratch_size(slot);
    f.column = f.row + slot->rows;
    f.theta = f.column + slot->blocks * slot->columns;
    f.update = f.theta + slot->blocks;
    f.mean = f.update + slot->blocks;
    f.alpha = f.mean + 1;
    f.shrink = f.mean + 2;
    return f;
}

static double dot__factor_beta2(const dot_optimizer *opt, const dot__slot *slot)
{
    return 1 - pow((double)slot->t, -opt->options.beta2_exponent);
}

#define DOT__FACTOR_PIECES(T, S) \
/* Sums of g^2; an unfactored parameter's moment is complete at once. */ \
static void dot__factor_moments_##S(void *argument, int lane, int64_t piece) \
{ \
    dot_optimizer *opt = (dot_optimizer *)argument; \
    dot__slot *slot = dot__slot_of_piece(opt, piece); \
    dot__scalars s = dot__common_scalars(opt, slot, lane); \
    dot__factor_scratch f = dot__factor_views(slot, lane); \
    int64_t block = piece - slot->first_piece, rows, row = dot__part(slot->rows, block, slot->block_rows, &rows), n = slot->columns; \
    double *column = f.column + block * n, theta = 0, beta2 = dot__factor_beta2(opt, slot), eps1 = opt->options.eps1; \
    const T *w = (T *)dot__at(slot->tensor, lane) + row * n, *g = (T *)dot__at(slot->tensor->grad, lane) + row * n; \
    T *moment = (T *)dot__at(slot->state[0], lane); \
    for (int64_t j = 0; j < n; ++j) column[j] = 0; \
    for (rows += row; row < rows; ++row, w += n, g += n) { \
        double sum = 0; \
        for (int64_t j = 0; j < n; ++j) { \
            double x = s.gradient * (double)g[j] + s.l2 * (double)w[j]; \
            sum += x * x; \
            column[j] += x * x; \
            theta += (double)w[j] * (double)w[j]; \
        } \
        f.row[row] = sum; \
        if (!slot->factored) moment[row] = (T)(beta2 * (double)moment[row] + (1 - beta2) * (sum + eps1)); \
    } \
    f.theta[block] = theta; \
} \
/* Once a parameter: R, C, mean(R) and the step. */ \
static void dot__factor_combine_##S(void *argument, int lane, int64_t index) \
{ \
    dot_optimizer *opt = (dot_optimizer *)argument; \
    dot__slot *slot = opt->active_slot[index]; \
    dot__factor_scratch f = dot__factor_views(slot, lane); \
    const dot_optimizer_options *o = &opt->options; \
    double beta2 = dot__factor_beta2(opt, slot), theta = 0, lr = dot__hypers(opt, slot->group, lane)->lr, sum = 0; \
    for (int64_t b = 0; b < slot->blocks; ++b) theta += f.theta[b]; \
    theta = sqrt(theta / (double)slot->tensor->size); \
    if (o->relative_step && 1 / sqrt((double)slot->t) < lr) lr = 1 / sqrt((double)slot->t); \
    *f.alpha = lr * opt->multiplier * (!o->scale_parameter ? 1 : theta > o->eps2 ? theta : o->eps2); \
    if (!slot->factored) return; \
    T *r = (T *)dot__at(slot->state[0], lane), *c = (T *)dot__at(slot->state[1], lane); \
    for (int64_t i = 0; i < slot->rows; ++i) { \
        r[i] = (T)(beta2 * (double)r[i] + (1 - beta2) * (f.row[i] / (double)slot->columns + o->eps1)); \
        sum += (double)r[i]; \
    } \
    *f.mean = sum / (double)slot->rows; \
    for (int64_t j = 0; j < slot->columns; ++j) { \
        double total = 0; \
        for (int64_t b = 0; b < slot->blocks; ++b) total += f.column[b * slot->columns + j]; \
        c[j] = (T)(beta2 * (double)c[j] + (1 - beta2) * (total / (double)slot->rows + o->eps1)); \
    } \
} \
/* U = g / sqrt(V): its sum of squares by block, or, with `apply`, the update of theta. */ \
static void dot__factor_update_##S(const dot_optimizer *opt, int lane, int64_t piece, bool apply) \
{ \
    dot__slot *slot = dot__slot_of_piece(opt, piece); \
    dot__scalars s = dot__common_scalars(opt, slot, lane); \
    dot__factor_scratch f = dot__factor_views(slot, lane); \
    int64_t block = piece - slot->first_piece, rows, row = dot__part(slot->rows, block, slot->block_rows, &rows), n = slot->columns; \
    T *w = (T *)dot__at(slot->tensor, lane) + row * n, *m = slot->state[2] ? (T *)dot__at(slot->state[2], lane) + row * n : NULL; \
    const T *g = (T *)dot__at(slot->tensor->grad, lane) + row * n, *r = (T *)dot__at(slot->state[0], lane); \
    const T *c = slot->factored ? (T *)dot__at(slot->state[1], lane) : NULL; \
    double sum = 0, scale = apply ? *f.alpha * *f.shrink : 1, beta1 = dot__hypers(opt, slot->group, lane)->beta1; \
    for (rows += row; row < rows; ++row, w += n, g += n) { \
        double base = c ? (double)r[row] / *f.mean : (double)r[row]; \
        for (int64_t j = 0; j < n; ++j) { \
            double x = s.gradient * (double)g[j] + s.l2 * (double)w[j]; \
            double u = x == 0 ? 0 : x / sqrt(c ? base * (double)c[j] : base); \
            sum += u * u; \
            if (!apply) continue; \
            u *= scale; \
            if (m) u = (double)(m[j] = (T)(beta1 * (double)m[j] + (1 - beta1) * u)); \
            w[j] = (T)(s.keep * (double)w[j] - u); \
        } \
        if (m) m += n; \
    } \
    if (!apply) f.update[block] = sum; \
} \
static void dot__factor_measure_##S(void *opt, int lane, int64_t piece) { dot__factor_update_##S((dot_optimizer *)opt, lane, piece, false); } \
static void dot__factor_apply_##S(void *opt, int lane, int64_t piece) { dot__factor_update_##S((dot_optimizer *)opt, lane, piece, true); }
DOT__FACTOR_PIECES(float, f32)
DOT__FACTOR_PIECES(double, f64)

static void dot__factor_clip(void *argument, int lane, int64_t index)
{
    dot_optimizer *opt = (dot_optimizer *)argument;
    dot__slot *slot = opt->active_slot[index];
    dot__factor_scratch f = dot__factor_views(slot, lane);
    double sum = 0;
    for (int64_t b = 0; b < slot->blocks; ++b) sum += f.update[b];
    double rms = sqrt(sum / (double)slot->tensor->size) / opt->options.clip_threshold;
    *f.shrink = rms > 1 || rms != rms ? 1 / rms : 1;
}

static bool dot__factor_step(dot_optimizer *opt)
{
    dot_context *ctx = opt->ctx;
    bool f32 = ctx->dtype == DOT_F32;
    dot__mark mark = dot__scratch_begin(ctx);
    for (int i = 0; i < opt->active; ++i) {
        dot__slot *slot = opt->active_slot[i];
        slot->scratch = (char *)dot__step_alloc(ctx, dot__factor_scratch_size(slot) * (size_t)ctx->lanes * sizeof(double));
        if (!slot->scratch) return false;
    }
    for (int i = 0; i < opt->active; ++i) opt->active_slot[i]->t++;
    dot__parallel(ctx, true, opt->pieces, f32 ? dot__factor_moments_f32 : dot__factor_moments_f64, opt);
    dot__parallel(ctx, true, opt->active, f32 ? dot__factor_combine_f32 : dot__factor_combine_f64, opt);
    dot__parallel(ctx, true, opt->pieces, f32 ? dot__factor_measure_f32 : dot__factor_measure_f64, opt);
    dot__parallel(ctx, true, opt->active, dot__factor_clip, opt);
    dot__parallel(ctx, true, opt->pieces, f32 ? dot__factor_apply_f32 : dot__factor_apply_f64, opt);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- rules that see a parameter whole: as the matrix [shape[0], rest] of its PyTorch shape ----
   They work on copies in double and in PyTorch's order, one parameter and lane at a time. */

typedef struct dot__matrix {
    dot_context *ctx;
    bool spread;                            /* products go to all threads */
    const dot_optimizer_options *f;
    const dot__numbers *o;
    const dot__parameter *p;
    bool matrix;                            /* rank 2 or more */
    int64_t rows, columns, n;               /* less than rank 2: 1 x n */
    double t, lr, keep, after, l2;
    double *theta, *g, *d;                  /* [n]; d: what is to be subtracted */
    double *s[DOT_MAX_STATES];
    double *memory;                         /* [DOT__MEMORY] */
    uint64_t seed, stream;                  /* of this parameter's draws in this step */
    double *rows_of_x;                      /* of a product, transposed or in float */
    double *scratch;                        /* DOT__MATRIX_SCRATCH doubles */
} dot__matrix;

#define DOT__MATRIX_SCRATCH(rows, columns, n) (3 * (n) + 6 * (rows) * (rows) + 2 * ((rows) + (columns)) + 64)

static double dot__norm_of(const double *x, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i] * x[i];
    return sqrt(sum);
}

static double dot__product_of(const double *x, const double *y, int64_t n)
{
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
    return sum;
}

static void dot__swap(double *x, double *y, int64_t n, int64_t stride)
{
    for (int64_t i = 0; i < n * stride; i += stride) {
        double kept = x[i];
        x[i] = y[i];
        y[i] = kept;
    }
}

static void dot__mean_into(double *mean, const double *x, double beta, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) mean[i] = beta * mean[i] + (1 - beta) * x[i];
}

static void dot__mean_square_into(double *mean, const double *x, double beta, int64_t n)
{
    for (int64_t i = 0; i < n; ++i) mean[i] = beta * mean[i] + (1 - beta) * x[i] * x[i];
}

/* d = lr m^ / (sqrt(v^) + eps), from moments that are up to date. */
static void dot__adam_direction(dot__matrix *a, const double *m, const double *v)
{
    double c1 = 1 - pow(a->o->beta1, a->t), c2 = 1 - pow(a->o->beta2, a->t);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] = a->lr * (m[i] / c1) / (sqrt(v[i] / c2) + a->o->eps);
}

/* torch.optim.SparseAdam: rows whose gradient is 0 stay as they are, moments too. */
static void dot__sparse_adam(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    int64_t rows = a->matrix ? a->rows : 1, columns = a->matrix ? a->columns : a->n;
    double rate = a->lr * sqrt(1 - pow(o->beta2, a->t)) / (1 - pow(o->beta1, a->t));
    for (int64_t r = 0; r < rows; ++r) {
        double *g = a->g + r * columns, *m = a->s[0] + r * columns, *v = a->s[1] + r * columns, *d = a->d + r * columns;
        bool touched = !a->matrix;
        for (int64_t c = 0; c < columns; ++c) touched = touched || g[c] != 0;
        for (int64_t c = 0; c < columns; ++c) d[c] = 0;
        for (int64_t c = 0; c < columns && touched; ++c) {
            m[c] += (1 - o->beta1) * (g[c] - m[c]);
            v[c] += (1 - o->beta2) * (g[c] * g[c] - v[c]);
            d[c] = rate * m[c] / (sqrt(v[c]) + o->eps);
        }
    }
}

/* Adam-mini (Zhang et al. 2024): one second moment for each index of the first axis, the mean of g^2. */
static void dot__adam_mini(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double c1 = 1 - pow(o->beta1, a->t), c2 = 1 - pow(o->beta2, a->t);
    dot__mean_into(a->s[0], a->g, o->beta1, a->n);
    for (int64_t r = 0; r < a->rows; ++r) {
        const double *g = a->g + r * a->columns, *m = a->s[0] + r * a->columns;
        a->s[1][r] = o->beta2 * a->s[1][r] + (1 - o->beta2) * dot__product_of(g, g, a->columns) / (double)a->columns;
        for (int64_t c = 0; c < a->columns; ++c)
            a->d[r * a->columns + c] = a->lr * (m[c] / c1) / (sqrt(a->s[1][r] / c2) + o->eps);
    }
}

/* Heo et al. 2021, section 3: where weight and gradient are nearly orthogonal, in every row or as a whole, the weight is taken to be
   scale-invariant, and the radial part of the direction u is removed. Returns the factor of the decay. */
static double dot__project(dot__matrix *a, double *u)
{
    const double floor = a->o->eps;
    for (int whole = 0; whole < 2 && a->matrix; ++whole) {
        int64_t rows = whole ? 1 : a->rows, columns = whole ? a->n : a->columns;
        double largest = 0;
        for (int64_t r = 0; r < rows; ++r) {
            const double *w = a->theta + r * columns, *g = a->g + r * columns;
            double wn = dot__norm_of(w, columns), gn = dot__norm_of(g, columns);
            double cosine = fabs(dot__product_of(w, g, columns)) / (wn > floor ? wn : floor) / (gn > floor ? gn : floor);
            if (cosine > largest) largest = cosine;
        }
        if (largest >= a->o->delta / sqrt((double)columns)) continue;
        for (int64_t r = 0; r < rows; ++r) {
            const double *w = a->theta + r * columns;
            double norm = dot__norm_of(w, columns) + floor, radial = dot__product_of(w, u + r * columns, columns) / norm;
            for (int64_t c = 0; c < columns; ++c) u[r * columns + c] -= w[c] / norm * radial;
        }
        return a->o->wd_ratio;
    }
    return 1;
}

static void dot__adamp(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double c1 = 1 - pow(o->beta1, a->t), c2 = 1 - pow(o->beta2, a->t);
    dot__mean_into(a->s[0], a->g, o->beta1, a->n);
    dot__mean_square_into(a->s[1], a->g, o->beta2, a->n);
    for (int64_t i = 0; i < a->n; ++i) {
        double m = a->f->nesterov ? o->beta1 * a->s[0][i] + (1 - o->beta1) * a->g[i] : a->s[0][i];
        a->d[i] = m / (sqrt(a->s[1][i] / c2) + o->eps);
    }
    a->keep = 1 - (1 - a->keep) * dot__project(a, a->d);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= a->lr / c1;
}

static void dot__sgdp(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    for (int64_t i = 0; i < a->n; ++i) {
        double b = o->beta1 * (a->s[0] ? a->s[0][i] : 0) + (1 - o->dampening) * a->g[i];
        if (a->s[0]) a->s[0][i] = b;
        a->d[i] = a->f->nesterov ? a->g[i] + o->beta1 * b : b;
    }
    a->keep = 1 - (1 - a->keep) * dot__project(a, a->d) / (1 - o->beta1);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= a->lr;
}

/* SM3-II with momentum (Anil et al. 2019): s[0] has the accumulators of all axes, one after the other. */
static void dot__sm3(dot__matrix *a)
{
    const int rank = a->p->rank;
    const int64_t *shape = a->p->shape;
    int64_t at[DOT_MAX_RANK] = { 0 }, begin[DOT_MAX_RANK + 1] = { 0 };
    double *largest = a->scratch;           /* the new accumulators */
    for (int k = 0; k < rank; ++k) begin[k + 1] = begin[k] + shape[k];
    for (int64_t i = 0; i < (rank ? begin[rank] : 1); ++i) largest[i] = 0;
    for (int64_t i = 0; i < a->n; ++i) {
        double nu = a->s[0][begin[0] + at[0]], u;
        for (int k = 1; k < rank; ++k) if (a->s[0][begin[k] + at[k]] < nu) nu = a->s[0][begin[k] + at[k]];
        nu += a->g[i] * a->g[i];
        for (int k = 0; k < (rank ? rank : 1); ++k) if (!(largest[begin[k] + at[k]] >= nu)) largest[begin[k] + at[k]] = nu;
        u = nu > 0 ? a->g[i] / sqrt(nu + a->o->eps) : 0;
        if (a->s[1]) u = a->s[1][i] = a->o->beta1 * a->s[1][i] + (1 - a->o->beta1) * u;
        a->d[i] = a->lr * u;
        for (int k = rank - 1; k >= 0 && ++at[k] == shape[k]; --k) at[k] = 0;
    }
    for (int64_t i = 0; i < (rank ? begin[rank] : 1); ++i) a->s[0][i] = largest[i];
}

/* r and c: means of x over columns and rows, decayed by beta; out = x's matrix R C / mean(R). */
static void dot__factor_into(const dot__matrix *a, double *r, double *c, const double *x, double beta, double *out)
{
    double mean = 0;
    for (int64_t j = 0; j < a->columns; ++j) c[j] *= beta;
    for (int64_t i = 0; i < a->rows; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < a->columns; ++j) {
            sum += x[i * a->columns + j];
            c[j] += (1 - beta) * x[i * a->columns + j] / (double)a->rows;
        }
        r[i] = beta * r[i] + (1 - beta) * sum / (double)a->columns;
        mean += r[i] / (double)a->rows;
    }
    for (int64_t i = 0; i < a->n; ++i) out[i] = r[i / a->columns] / mean * c[i % a->columns];
}

/* CAME (Luo et al. 2023, algorithm 2): s: R and C of g^2 (or v), m, R and C of the instability. */
static void dot__came(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double *x = a->scratch, *v = x + a->n, rms = 0;
    for (int64_t i = 0; i < a->n; ++i) x[i] = a->g[i] * a->g[i] + o->eps1;
    if (a->matrix) dot__factor_into(a, a->s[0], a->s[1], x, o->beta2, v);
    else for (int64_t i = 0; i < a->n; ++i) v[i] = a->s[0][i] = o->beta2 * a->s[0][i] + (1 - o->beta2) * x[i];
    for (int64_t i = 0; i < a->n; ++i) { a->d[i] = a->g[i] / sqrt(v[i]); rms += a->d[i] * a->d[i]; }
    rms = sqrt(rms / (double)a->n) / o->clip_threshold;
    for (int64_t i = 0; i < a->n && rms > 1; ++i) a->d[i] /= rms;
    dot__mean_into(a->s[2], a->d, o->beta1, a->n);
    for (int64_t i = 0; i < a->n; ++i) x[i] = (a->d[i] - a->s[2][i]) * (a->d[i] - a->s[2][i]) + o->eps2;
    if (a->matrix) dot__factor_into(a, a->s[3], a->s[4], x, o->beta3, v);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] = a->lr * (a->matrix ? a->s[2][i] / sqrt(v[i]) : a->s[2][i]);
}


static dot__factor_axes dot__factor_axes_of(dot_dialect dialect, const dot__parameter *p)
{
    dot__factor_axes a;
    memset(&a, 0, sizeof a);
    a.row = p->rank - 2;
    a.column = p->rank - 1;
    a.r = p->tensor->size;
    a.factored = p->rank >= 2 && p->tensor->size > 0 && (dialect != DOT_DIALECT_T2T || p->rank == 2);
    if (dialect == DOT_DIALECT_OPTAX && a.factored) {       /* the two largest, the latter of equals as the larger, if both have 128 */
        int first = 0, second = -1;
        for (int i = 1; i < p->rank; ++i) if (p->shape[i] >= p->shape[first]) first = i;
        for (int i = 0; i < p->rank; ++i) if (i != first && (second < 0 || p->shape[i] >= p->shape[second])) second = i;
        a.row = second;
        a.column = first;
        a.factored = p->shape[second] >= 128;
    }
    if (!a.factored) return a;
    a.r = p->tensor->size / p->shape[a.column];
    a.c = p->tensor->size / p->shape[a.row];
    return a;
}

/* v = R C / mean(R) over the row axis, after R and C have taken the means of x = g^2. */
static void dot__factor_dialect(const dot__matrix *a, const dot__factor_axes *axes, const double *x, double beta2, double *v)
{
    const dot__parameter *p = a->p;
    double *r = a->s[0], *c = a->s[1], *mean = v + a->n;    /* mean: by R's index with the row axis at 0 */
    bool torch = a->f->dialect == DOT_DIALECT_TORCH;
    int64_t ri[DOT_MAX_RANK] = { 0 }, ci[DOT_MAX_RANK] = { 0 }, at[DOT_MAX_RANK], rows = p->shape[axes->row], columns = p->shape[axes->column];
    int64_t step_r = 1, step_c = 1;
    for (int k = p->rank - 1; k >= 0; --k) {
        if (k != axes->column) { ri[k] = step_r; step_r *= p->shape[k]; }
        if (k != axes->row) { ci[k] = step_c; step_c *= p->shape[k]; }
    }
    for (int64_t i = 0; i < axes->r; ++i) { r[i] *= beta2; mean[i] = 0; }
    for (int64_t i = 0; i < axes->c; ++i) c[i] *= beta2;
    for (int pass = 0; pass < 3; ++pass) {
        memset(at, 0, sizeof at);
        for (int64_t i = 0; i < a->n; ++i) {
            int64_t row = 0, column = 0;
            for (int k = 0; k < p->rank; ++k) { row += at[k] * ri[k]; column += at[k] * ci[k]; }
            double *m = &mean[row - at[axes->row] * ri[axes->row]];
            if (pass == 0) {
                r[row] += (1 - beta2) * x[i] / (double)columns;
                c[column] += (1 - beta2) * x[i] / (double)rows;
            } else if (pass == 1) {
                *m += at[axes->column] == 0 ? r[row] / (double)rows : 0;
            } else v[i] = r[row] * c[column] / (torch && *m < a->o->eps1 ? a->o->eps1 : *m);
            for (int k = p->rank - 1; k >= 0 && ++at[k] == p->shape[k]; --k) at[k] = 0;
        }
    }
}

/* Adafactor as others have written it: see dot_dialect. s: R (or v), C, m. */
static void dot__adafactor(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    dot_dialect dialect = a->f->dialect;
    dot__factor_axes axes = dot__factor_axes_of(dialect, a->p);
    bool torch = dialect == DOT_DIALECT_TORCH, t2t = dialect == DOT_DIALECT_T2T;
    bool relative = torch || (a->f->relative_step && dialect != DOT_DIALECT_OPTAX);
    double *x = a->scratch, *v = x + a->n, beta2 = 1 - pow(a->t, -o->beta2_exponent), rms = 0, theta = 0, eta = o->lr > 0 ? a->lr / o->lr : 0;
    for (int64_t i = 0; i < a->n; ++i) {
        x[i] = a->g[i] * a->g[i] + (torch ? 0 : o->eps1);
        theta += a->theta[i] * a->theta[i];
    }
    if (axes.factored) dot__factor_dialect(a, &axes, x, beta2, v);
    else for (int64_t i = 0; i < a->n; ++i) v[i] = a->s[0][i] = beta2 * a->s[0][i] + (1 - beta2) * x[i];
    for (int64_t i = 0; i < a->n; ++i) {
        if (torch && v[i] < o->eps1 * o->eps1) v[i] = o->eps1 * o->eps1;
        a->d[i] = a->g[i] / sqrt(v[i]);
        rms += a->d[i] * a->d[i];
    }
    rms = sqrt(rms / (double)a->n) / o->clip_threshold;
    theta = sqrt(theta / (double)a->n);
    double limit = 1 / sqrt(a->t), rate = !relative ? a->lr : torch ? fmin(a->lr, limit) : eta * fmin(o->lr, limit);
    if (torch || a->f->scale_parameter) rate *= theta > o->eps2 ? theta : o->eps2;
    else if (t2t && relative) rate *= 0.05;
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= rate / (rms > 1 ? rms : 1);
    if (a->s[2]) {
        dot__mean_into(a->s[2], a->d, o->beta1, a->n);
        memcpy(a->d, a->s[2], (size_t)a->n * sizeof(double));
    }
    if (dialect == DOT_DIALECT_HF && a->f->decay == DOT_DECAY_LR) a->keep = 1 - rate * o->weight_decay;
}

/* out[m, n] = x y, where x is [m, k], or [k, m] if it is to be transposed, and y [k, n] or [n, k]: by the tiles of the matrix product,
   panel by panel of the columns, in double or in float. */
enum { DOT__PLAIN, DOT__X_TRANSPOSED, DOT__Y_TRANSPOSED };
typedef struct dot__tiled { const dot__kernels *kernel; const void *rows; const double *y; double *out; int64_t m, k, n; int how; } dot__tiled;

#define DOT__TILED_PANEL(T, S) \
static void dot__tiled_panel_##S(void *argument, int lane, int64_t piece) \
{ \
    const dot__tiled *job = (const dot__tiled *)argument; \
    int height = job->kernel->rows, width = job->kernel->columns; \
    int64_t k = job->k, n = job->n, j = piece * width, columns = dot__min(width, n - j); \
    int64_t across = job->how == DOT__Y_TRANSPOSED ? k : 1, down = job->how == DOT__Y_TRANSPOSED ? 1 : n; \
    T panel[DOT__DEPTH * DOT__MAX_COLUMNS], sums[DOT__MAX_ROWS][DOT__MAX_COLUMNS]; \
    const void *from[DOT__MAX_ROWS]; \
    void *to[DOT__MAX_ROWS]; \
    dot__tile tile; \
    memset(&tile, 0, sizeof tile); \
    (void)lane; \
    tile.columns = width; \
    tile.taps = 1; \
    tile.a = from; \
    tile.b = panel; \
    tile.c = to; \
    for (int r = 0; r < height; ++r) to[r] = sums[r]; \
    for (int64_t l = 0; l < k; l += DOT__DEPTH) { \
        tile.depth = dot__min(DOT__DEPTH, k - l); \
        for (int64_t p = 0; p < tile.depth; ++p) { \
            const double *y = job->y + (l + p) * down + j * across; \
            for (int64_t c = 0; c < width; ++c) panel[p * width + c] = c < columns ? (T)y[c * across] : (T)0; \
        } \
        for (int64_t i = 0; i < job->m; i += height) { \
            tile.rows = (int)dot__min(height, job->m - i); \
            for (int r = 0; r < height; ++r) from[r] = (const T *)job->rows + (i + dot__min(r, tile.rows - 1)) * k + l; \
            job->kernel->tile(&tile); \
            for (int r = 0; r < tile.rows; ++r) { \
                double *out = job->out + (i + r) * n + j; \
                for (int64_t c = 0; c < columns; ++c) out[c] = l > 0 ? out[c] + (double)sums[r][c] : (double)sums[r][c]; \
            } \
        } \
    } \
}
DOT__TILED_PANEL(float, f32)
DOT__TILED_PANEL(double, f64)

static void dot__multiply_in(dot_dtype dtype, const dot__matrix *a, const double *x, const double *y, double *out, int64_t m, int64_t k,
                             int64_t n, int how)
{
    dot__tiled job = { dot__kernel(a->ctx, dtype), x, y, out, m, k, n, how };
    dot__work panel = dtype == DOT_F32 ? dot__tiled_panel_f32 : dot__tiled_panel_f64;
    int64_t panels = dot__ceil_div(n, job.kernel->columns), along = how == DOT__X_TRANSPOSED ? 1 : k, step = how == DOT__X_TRANSPOSED ? m : 1;
    if (dtype == DOT_F32 || how == DOT__X_TRANSPOSED) {
        job.rows = a->rows_of_x;
        for (int64_t i = 0; i < m; ++i)
            for (int64_t p = 0; p < k; ++p) dot__store(a->rows_of_x, dtype, i * k + p, x[i * along + p * step]);
    }
    if (a->spread) dot__parallel(a->ctx, false, panels, panel, &job);
    else for (int64_t i = 0; i < panels; ++i) panel(&job, 0, i);
}

static void dot__multiply(const dot__matrix *a, const double *x, const double *y, double *out, int64_t m, int64_t k, int64_t n, int how)
{
    dot__multiply_in(DOT_F64, a, x, y, out, m, k, n, how);
}

/* In the precision of the parameters, for rules that were made for low precision. */
static void dot__multiply_low(const dot__matrix *a, const double *x, const double *y, double *out, int64_t m, int64_t k, int64_t n, int how)
{
    dot__multiply_in(a->p->tensor->dtype, a, x, y, out, m, k, n, how);
}

static void dot__transpose(const double *x, double *out, int64_t rows, int64_t columns)
{
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
}

/* x [rows, columns], rows <= columns, becomes nearly orthogonal: `steps` of the quintic Newton-Schulz iteration of Jordan et al. 2024.
   scratch: n + 2 rows^2. */
static void dot__orthogonalize(const dot__matrix *a, double *x, int64_t rows, int64_t columns, double *scratch)
{
    double *square = scratch, *poly = square + rows * rows, *next = poly + rows * rows, norm = dot__norm_of(x, a->n);
    for (int64_t i = 0; i < a->n; ++i) x[i] /= norm > a->o->eps ? norm : a->o->eps;
    for (int step = 0; step < (int)a->o->ns_steps; ++step) {
        dot__multiply_low(a, x, x, square, rows, columns, rows, DOT__Y_TRANSPOSED);
        dot__multiply_low(a, square, square, poly, rows, rows, rows, DOT__PLAIN);
        for (int64_t i = 0; i < rows * rows; ++i) poly[i] = -4.7750 * square[i] + 2.0315 * poly[i];
        dot__multiply_low(a, poly, x, next, rows, rows, columns, DOT__PLAIN);
        for (int64_t i = 0; i < a->n; ++i) x[i] = 3.4445 * x[i] + next[i];
    }
}

/* The direction a->d, made orthogonal; tall matrices are transposed for it. */
static void dot__orthogonal_direction(dot__matrix *a)
{
    bool tall = a->rows > a->columns;
    int64_t rows = tall ? a->columns : a->rows, columns = tall ? a->rows : a->columns;
    double *x = tall ? a->scratch : a->d;
    if (tall) dot__transpose(a->d, x, a->rows, a->columns);
    dot__orthogonalize(a, x, rows, columns, a->scratch + a->n);
    if (tall) dot__transpose(x, a->d, rows, columns);
}

/* Muon (Jordan et al. 2024; torch.optim.Muon): momentum, orthogonalised. Vectors and scalars go to AdamW. */
static void dot__muon(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double tall = (double)a->rows, wide = (double)a->columns;
    bool optax = a->f->dialect == DOT_DIALECT_OPTAX, ahead = a->f->nesterov && (a->matrix || optax);
    double share = optax ? (1 - pow(o->beta1, a->t + 1)) / (1 - pow(o->beta1, a->t)) : 1;     /* of m's bias correction in g's */
    dot__mean_into(a->s[0], a->g, o->beta1, a->n);
    for (int64_t i = 0; i < a->n; ++i)
        a->d[i] = ahead ? o->beta1 * a->s[0][i] / share + (1 - o->beta1) * a->g[i] : a->s[0][i];
    if (!a->matrix) {
        dot__mean_square_into(a->s[1], a->g, o->beta2, a->n);
        dot__adam_direction(a, a->d, a->s[1]);
        return;
    }
    dot__orthogonal_direction(a);
    double scale = a->f->dialect == DOT_DIALECT_MATCH_RMS ? 0.2 * sqrt(tall > wide ? tall : wide)
                 : sqrt(tall > wide || a->f->dialect == DOT_DIALECT_SPECTRAL ? tall / wide : 1);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= a->lr * scale;
}

/* Scion (Pethick et al. 2025), unconstrained: the step that a norm of size lr allows, spectral times sqrt(rows / columns), or RMS. */
static void dot__scion(dot__matrix *a)
{
    dot__mean_into(a->s[0], a->g, a->o->beta1, a->n);
    memcpy(a->d, a->s[0], (size_t)a->n * sizeof(double));
    if (a->matrix) dot__orthogonal_direction(a);
    double scale = a->matrix ? sqrt((double)a->rows / (double)a->columns) : 1 / (dot__norm_of(a->d, a->n) / sqrt((double)a->n) + a->o->eps);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= a->lr * scale;
}

/* The symmetric a [n][n], its lower triangle, becomes T = Q'A Q: the diagonal to value, T[i][i-1] to a[i-1][i]. b becomes Q'. From the
   last row up, the reflection I - tau v v' leaves of a row's first i elements v's last; v takes their place. */
static void dot__tridiagonalize(double *a, double *b, double *value, int64_t n)
{
    double *p = b;
    for (int64_t i = n - 1; i > 0; --i) {
        double *v = a + i * n, alpha = v[i - 1], rest = dot__norm_of(v, i - 1), beta = alpha, tau = 0, half = 0;
        if (rest != 0) {
            beta = alpha > 0 ? -hypot(alpha, rest) : hypot(alpha, rest);
            tau = (beta - alpha) / beta;
            for (int64_t j = 0; j < i - 1; ++j) v[j] /= alpha - beta;
            v[i - 1] = 1;
            for (int64_t j = 0; j < i; ++j) {
                const double *row = a + j * n;
                double sum = row[j] * v[j];
                for (int64_t k = 0; k < j; ++k) {
                    sum += row[k] * v[k];
                    p[k] += row[k] * v[j];
                }
                p[j] = sum;
            }
            for (int64_t j = 0; j < i; ++j) half += p[j] * v[j];
            for (int64_t j = 0; j < i; ++j) p[j] = tau * (p[j] - tau * half / 2 * v[j]);
            for (int64_t j = 0; j < i; ++j)
                for (int64_t k = 0; k <= j; ++k) a[j * n + k] -= v[j] * p[k] + p[j] * v[k];
        }
        a[(i - 1) * n + i] = beta;
        value[i] = tau;
    }
    for (int64_t i = 0; i < n * n; ++i) b[i] = i % (n + 1) == 0;
    for (int64_t i = 1; i < n; ++i) {
        const double *v = a + i * n;
        for (int64_t j = 0; j < i && value[i] != 0; ++j) {
            double *row = b + j * n, scale = value[i] * dot__product_of(row, v, i);
            for (int64_t k = 0; k < i; ++k) row[k] -= scale * v[k];
        }
    }
    for (int64_t i = 0; i < n; ++i) value[i] = a[i * n + i];
}

/* One implicit QL step on d[l..m], e[l..m-1] (the element beside d[i] and d[i+1]), and on the rows of b, with Wilkinson's shift. */
static void dot__ql_step(double *d, double *e, double *b, int64_t n, int64_t l, int64_t m)
{
    double delta = (d[l + 1] - d[l]) / 2, root = hypot(delta, e[l]);
    double x = d[m] - d[l] + e[l] * (e[l] / (delta + (delta < 0 ? -root : root))), z = e[m - 1];
    for (int64_t k = m - 1; k >= l; --k) {
        double r = hypot(x, z), c = r > 0 ? x / r : 1, s = r > 0 ? z / r : 0, t = e[k], u = s * (d[k] - d[k + 1]) + 2 * c * t;
        double *low = b + k * n, *high = low + n;
        if (k + 1 < m) e[k + 1] = r;
        d[k + 1] += s * u;
        d[k] -= s * u;
        x = e[k] = c * u - t;
        if (k > l) {
            z = s * e[k - 1];
            e[k - 1] *= c;
        }
        for (int64_t j = 0; j < n; ++j) {
            double y = high[j];
            high[j] = c * y + s * low[j];
            low[j] = c * low[j] - s * y;
        }
    }
}

/* Eigenvalues of the symmetric a [n][n], which is destroyed, to value[n], in no order; eigenvectors to the rows of b, each with its
   largest element positive. (Golub, Van Loan, "Matrix computations", 8.3) */
static void dot__symmetric_eigen(double *a, double *b, double *value, int64_t n)
{
    double largest = 0, *e = a;
    int exponent = 0;
    for (int64_t i = 0; i < n * n; ++i) largest = fmax(largest, fabs(a[i]));
    if (dot__finite(largest)) frexp(largest, &exponent);
    for (int64_t i = 0; i < n * n; ++i) a[i] = ldexp(a[i], -exponent);      /* no square overflows, and no digit is lost */
    dot__tridiagonalize(a, b, value, n);
    for (int64_t i = 0; i + 1 < n; ++i) e[i] = a[i * n + i + 1];
    for (int64_t l = 0; l < n; ++l)
        for (int step = 0; step < 60; ++step) {
            int64_t m = l;
            while (m + 1 < n && fabs(e[m]) > DBL_EPSILON / 2 * sqrt(fabs(value[m])) * sqrt(fabs(value[m + 1])) + DBL_MIN) ++m;
            if (m == l) break;
            dot__ql_step(value, e, b, n, l, m);
        }
    for (int64_t i = 0; i < n; ++i) {
        double *v = b + i * n, top = v[0];
        value[i] = ldexp(value[i], exponent);
        for (int64_t j = 1; j < n; ++j) if (fabs(v[j]) > fabs(top)) top = v[j];
        for (int64_t j = 0; j < n && top < 0; ++j) v[j] = -v[j];
    }
}

/* out = (sum + eps I)^power, of a symmetric n x n matrix; scratch: 2 n^2 + n. */
static void dot__matrix_power(const double *sum, double eps, double power, int64_t n, double *out, double *scratch)
{
    double *a = scratch, *vectors = a + n * n, *value = vectors + n * n;
    for (int64_t i = 0; i < n * n; ++i) a[i] = sum[i] + (i % (n + 1) == 0 ? eps : 0);
    dot__symmetric_eigen(a, vectors, value, n);
    for (int64_t i = 0; i < n * n; ++i) out[i] = 0;
    for (int64_t k = 0; k < n; ++k) {
        const double *v = vectors + k * n, scaled = pow(value[k] > eps ? value[k] : eps, power);
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) out[i * n + j] += scaled * v[i] * v[j];
    }
}

/* Shampoo (Gupta, Koren, Singer 2018, algorithm 1): L += g g', R += g' g, d = L^-1/4 g R^-1/4, or the one side to -1/2; vectors: AdaGrad.
   s: L (or v) and R without their eps I, momentum. */
static void dot__shampoo(dot__matrix *a)
{
    int64_t rows = a->rows, columns = a->columns, sides[2] = { rows, columns };
    double *x = a->scratch, *turned = x + a->n, *root = turned + a->n, power = a->s[0] && a->s[1] ? -0.25 : -0.5;
    memcpy(a->d, a->g, (size_t)a->n * sizeof(double));
    for (int64_t i = 0; i < a->n && !a->matrix; ++i) {
        a->s[0][i] += a->g[i] * a->g[i];
        a->d[i] = a->g[i] / sqrt(a->s[0][i] + a->o->eps);
    }
    dot__transpose(a->g, turned, rows, columns);
    for (int side = 0; side < 2 && a->matrix; ++side) {
        int64_t n = sides[side];
        if (!a->s[side]) continue;
        dot__multiply(a, side ? turned : a->g, side ? turned : a->g, root, n, a->n / n, n, DOT__Y_TRANSPOSED);
        for (int64_t i = 0; i < n * n; ++i) a->s[side][i] += root[i];
        dot__matrix_power(a->s[side], a->o->eps, power, n, root, root + n * n);
        if (side) dot__multiply(a, a->d, root, x, rows, columns, columns, DOT__PLAIN);
        else dot__multiply(a, root, a->d, x, rows, rows, columns, DOT__PLAIN);
        memcpy(a->d, x, (size_t)a->n * sizeof(double));
    }
    for (int64_t i = 0; i < a->n; ++i) {
        if (a->s[2]) a->d[i] = a->s[2][i] = a->o->beta1 * a->s[2][i] + a->d[i];
        a->d[i] *= a->lr;
    }
}

/* The rows of x [n, n] become orthonormal, each less its parts along those before it. From the first of which no more than `null` of
   the largest is left they have no direction of their own: the unit vectors follow, those of which 1e-2 is left. */
static void dot__orthonormalize(double *x, double null, int64_t n)
{
    double largest = 0;
    int64_t unit = -1;
    for (int64_t i = 0; i < n;) {
        double *row = x + i * n, left = 0;
        for (int64_t j = 0; j < n && unit >= 0; ++j) row[j] = j == unit;
        for (int pass = 0; pass < 2 && (pass == 0 || unit < 0 || left >= 1e-2); ++pass) {
            for (int64_t k = 0; k < i; ++k) {
                double along = dot__product_of(x + k * n, row, n);
                for (int64_t j = 0; j < n; ++j) row[j] -= along * x[k * n + j];
            }
            left = dot__norm_of(row, n);
        }
        if (unit < 0 && left > largest) largest = left;
        bool taken = unit < 0 ? left > null * largest : left >= 1e-2;
        if (!taken || unit >= 0) ++unit;
        if (!taken && unit < n) continue;
        for (int64_t j = 0; j < n; ++j) row[j] /= left > 0 ? left : 1;
        ++i;
    }
}

/* The basis of one side's matrix L, the rows of p: at first the eigenvectors, later Q of QR(L p'), p sorted by falling p L p'; rows or
   columns of the second moment are sorted with it. scratch: n^2 + n. */
static void dot__soap_basis(dot__matrix *a, int side, double *scratch)
{
    int64_t n = side ? a->columns : a->rows, along = side ? 1 : a->columns, across = side ? a->columns : 1;
    double *sum = a->s[2 + side], *p = sum + n * n, *next = scratch, *value = next + n * n, *v = a->s[1];
    if (a->t == 1) {
        memcpy(next, sum, (size_t)(n * n) * sizeof(double));
        dot__symmetric_eigen(next, p, value, n);
    }
    dot__multiply(a, p, sum, next, n, n, n, DOT__PLAIN);
    for (int64_t i = 0; i < n; ++i) value[i] = dot__product_of(p + i * n, next + i * n, n);
    for (int64_t i = 0; i < n; ++i) {
        int64_t best = i;
        for (int64_t j = i + 1; j < n; ++j) if (value[j] > value[best]) best = j;
        if (best == i) continue;
        dot__swap(&value[i], &value[best], 1, 1);
        dot__swap(next + i * n, next + best * n, n, 1);
        dot__swap(v + i * along, v + best * along, a->n / n, across);
    }
    dot__orthonormalize(next, 1e-12, n);
    memcpy(p, next, (size_t)(n * n) * sizeof(double));
}

/* x = P' x Q, or back: P x Q'; a side without a basis stays. scratch: n. */
static void dot__soap_turn(const dot__matrix *a, double *x, bool back, double *scratch)
{
    for (int side = 0; side < 2; ++side) {
        int64_t n = side ? a->columns : a->rows;
        if (!a->s[2 + side]) continue;
        const double *p = a->s[2 + side] + n * n;
        if (side) dot__multiply(a, x, p, scratch, a->rows, n, n, back ? DOT__PLAIN : DOT__Y_TRANSPOSED);
        else dot__multiply(a, p, x, scratch, n, n, a->columns, back ? DOT__X_TRANSPOSED : DOT__PLAIN);
        memcpy(x, scratch, (size_t)a->n * sizeof(double));
    }
}

/* SOAP (Vyas et al. 2024, algorithm 3; its repository's order of things): Adam in the bases P, Q of L = mean of g g', R = mean of g' g.
   The first step only makes the bases; decay after the update. s: m, v in the bases, L and P, R and Q. */
static void dot__soap(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double *x = a->scratch, *room = x + a->n, k = a->t - 1;
    bool first = k == 0, turn = first || fmod(k, o->period) == 0;
    a->after = first ? 1 : a->after * a->keep;
    a->keep = 1;
    memset(a->d, 0, (size_t)a->n * sizeof(double));
    if (!first) {
        double rate = a->lr * sqrt(1 - pow(o->beta2, k)) / (1 - pow(o->beta1, k));
        memcpy(x, a->g, (size_t)a->n * sizeof(double));
        dot__soap_turn(a, x, false, room);
        dot__mean_into(a->s[0], x, o->beta1, a->n);
        dot__mean_square_into(a->s[1], x, o->beta2, a->n);
        for (int64_t i = 0; i < a->n; ++i) a->d[i] = rate * a->s[0][i] / (sqrt(a->s[1][i]) + o->eps);
        dot__soap_turn(a, a->d, true, room);
        if (turn) dot__soap_turn(a, a->s[0], true, room);
    }
    for (int side = 0; side < 2; ++side) {
        int64_t n = side ? a->columns : a->rows;
        if (!a->s[2 + side]) continue;
        dot__multiply(a, a->g, a->g, x, n, a->n / n, n, side ? DOT__X_TRANSPOSED : DOT__Y_TRANSPOSED);
        dot__mean_into(a->s[2 + side], x, o->beta2, n * n);
        if (turn) dot__soap_basis(a, side, x);
    }
    if (turn && !first) dot__soap_turn(a, a->s[0], false, room);
}

/* ---- PSGD with Kronecker factors ---- */

/* The largest magnitude of n numbers; NaN where there is one. */
static double dot__largest(const double *x, int64_t n)
{
    double largest = 0;
    for (int64_t i = 0; i < n; ++i) if (!(fabs(x[i]) <= largest)) largest = fabs(x[i]);
    return largest;
}

/* x [n, m] becomes q x, q' x, or (DOT__KRON_SOLVE) the y of q' y = x, and then is transposed; q is upper triangular, a diagonal, or NULL
   for 1. scratch: n m. */
enum { DOT__KRON_SOLVE = DOT__Y_TRANSPOSED };
static void dot__kron_side(const dot__matrix *a, const double *q, int how, double *x, int64_t n, int64_t m, double *scratch)
{
    if (q && (!a->matrix || dot__kron_diagonal(a->f, n)))
        for (int64_t i = 0; i < a->n; ++i) x[i] *= how == DOT__KRON_SOLVE ? 1 / q[i / m] : q[i / m];
    else if (q && how == DOT__KRON_SOLVE)
        for (int64_t i = 0; i < n; ++i) {
            double *row = x + i * m;
            for (int64_t j = 0; j < m; ++j) row[j] /= q[i * n + i];
            for (int64_t k = i + 1; k < n; ++k)
                for (int64_t j = 0; j < m; ++j) x[k * m + j] -= q[i * n + k] * row[j];
        }
    else if (q) {
        dot__multiply_low(a, q, x, scratch, n, n, m, how);
        memcpy(x, scratch, (size_t)a->n * sizeof(double));
    }
    dot__transpose(x, scratch, n, m);
    memcpy(x, scratch, (size_t)a->n * sizeof(double));
}

/* x = Ql x Qr', or with Ql' and Qr, or with the inverses of those. */
static void dot__kron_both(const dot__matrix *a, int how, double *x, double *scratch)
{
    dot__kron_side(a, a->s[1], how, x, a->rows, a->columns, scratch);
    dot__kron_side(a, a->s[2], how, x, a->columns, a->rows, scratch);
}

/* A lower bound of the spectral norm of the symmetric x: |x v| of v = x u / |x u|, u the longest row of x. */
static double dot__kron_norm(const double *x, int64_t n, double *v)
{
    double scale = dot__largest(x, n * n), longest = -1, square = 0, norm;
    int64_t u = 0;
    if (scale == 0) return 0;
    for (int64_t i = 0; i < n; ++i) {
        double length = dot__norm_of(x + i * n, n) / scale;
        if (length > longest) { longest = length; u = i; }
    }
    for (int64_t i = 0; i < n; ++i) v[i] = dot__product_of(x + i * n, x + u * n, n) / scale / scale;
    norm = dot__norm_of(v, n);
    for (int64_t i = 0; i < n; ++i) {
        double along = dot__product_of(x + i * n, v, n) / scale / norm;
        square += along * along;
    }
    return scale * sqrt(square);
}

/* Q -= precond_lr triu(x x' - y y') Q / |x x' + y y'| of one side, with x = A, y = B of dot__psgd_kron, transposed for the right. */
static void dot__kron_update(const dot__matrix *a, int side, const double *x, const double *y, double *scratch)
{
    const double tiny = 1.1754943508222875e-38;
    int64_t n = side ? a->columns : a->rows, m = a->n / n, along = side ? 1 : m, across = side ? n : 1;
    double *q = a->s[1 + side], *sum = scratch;
    if (!q) return;
    if (!a->matrix || dot__kron_diagonal(a->f, n)) {
        double *difference = sum + n;
        for (int64_t i = 0; i < n; ++i) {
            double xx = 0, yy = 0;
            for (int64_t j = i * along, end = j + m * across; j < end; j += across) { xx += x[j] * x[j]; yy += y[j] * y[j]; }
            sum[i] = xx + yy;
            difference[i] = xx - yy;
        }
        double rate = a->o->precond_lr / (dot__largest(sum, n) + tiny);
        for (int64_t i = 0; i < n; ++i) q[i] -= rate * difference[i] * q[i];
        return;
    }
    double *difference = sum + n * n, *step = difference + n * n;
    int how = side ? DOT__X_TRANSPOSED : DOT__Y_TRANSPOSED;
    dot__multiply_low(a, x, x, sum, n, m, n, how);
    dot__multiply_low(a, y, y, step, n, m, n, how);
    for (int64_t i = 0; i < n * n; ++i) {
        difference[i] = i % n >= i / n ? sum[i] - step[i] : 0;
        sum[i] += step[i];
    }
    double rate = a->o->precond_lr / (dot__kron_norm(sum, n, step) + tiny);
    dot__multiply_low(a, difference, q, step, n, n, n, DOT__PLAIN);
    for (int64_t i = 0; i < n * n; ++i) q[i] -= rate * step[i];
}

/* Is the preconditioner updated in this step? The memory counts the steps since the latest update. */
static bool dot__kron_due(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    double p = exp(-o->prob_decay * (a->t - 1 - o->prob_start));
    p = p > 1 ? 1 : p < o->min_prob ? o->min_prob : p;
    if (++a->memory[0] < 1 / p) return false;
    a->memory[0] = 0;
    return true;
}

/* Ql and Qr by reciprocal factors, so that their largest elements are equal. */
static void dot__kron_balance(dot__matrix *a)
{
    int64_t sides[2] = { dot__kron_size(a->f, a->rows), dot__kron_size(a->f, a->columns) };
    double ratio = sqrt(dot__largest(a->s[2], sides[1]) / dot__largest(a->s[1], sides[0]));
    for (int64_t i = 0; i < sides[0]; ++i) a->s[1][i] *= ratio;
    for (int64_t i = 0; i < sides[1]; ++i) a->s[2][i] /= ratio;
}

/* PSGD with Kronecker factors (Li, "Preconditioned stochastic gradient descent", 2018; "Black box Lie group preconditioners", 2022; as
   E. Walters' kron): with m the momentum, bias corrected, and v drawn from N(0, 1), A = Ql m Qr' and B = Ql'^-1 v Qr^-1 move Q towards
   A A' = B B', which whitens m; d = Ql'Ql m Qr'Qr, clipped by RMS. In one of 100 updates at random both Q get the same largest element.
   s: momentum, Ql, Qr. */
static void dot__psgd_kron(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    int64_t sides[2] = { a->rows, a->columns };
    double *x = a->scratch, *y = x + a->n, *room = y + a->n, rms;
    for (int side = 0; side < 2 && a->t == 1; ++side) {
        bool diagonal = !a->matrix || dot__kron_diagonal(a->f, sides[side]);
        double *q = a->s[1 + side], scale = a->matrix ? sqrt(o->initial) : o->initial;
        for (int64_t i = 0; q && i < sides[side]; ++i) q[diagonal ? i : i * (sides[side] + 1)] = scale;
    }
    dot__mean_into(a->s[0], a->g, o->beta1, a->n);
    for (int64_t i = 0; i < a->n; ++i) a->d[i] = a->s[0][i] / (1 - pow(o->beta1, a->t));
    if (dot__kron_due(a)) {
        if (a->matrix && dot_random_uniform(a->seed, a->stream, 2 * (uint64_t)a->n) < 0.01) dot__kron_balance(a);
        memcpy(x, a->d, (size_t)a->n * sizeof(double));
        for (int64_t i = 0; i < a->n; ++i) y[i] = dot_random_normal(a->seed, a->stream, (uint64_t)i);
        dot__kron_both(a, DOT__PLAIN, x, room);
        dot__kron_both(a, DOT__KRON_SOLVE, y, room);
        for (int side = 0; side < 2; ++side) dot__kron_update(a, side, x, y, room);
    }
    dot__kron_both(a, DOT__PLAIN, a->d, room);
    dot__kron_both(a, DOT__X_TRANSPOSED, a->d, room);
    rms = (dot__norm_of(a->d, a->n) / sqrt((double)a->n) + 1e-8) / o->clip_threshold;
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= a->lr / (rms > 1 ? rms : 1);
}

/* The `rank` leading eigenvectors of x' x (or x x'), in the rows of p, each with its largest element positive. */
static void dot__galore_project(dot__matrix *a, int64_t rank, int64_t small, bool tall, double *p, double *scratch)
{
    double *gram = scratch, *vectors = gram + small * small, *value = vectors + small * small, *turned = value + small;
    dot__transpose(a->g, turned, a->rows, a->columns);
    const double *x = tall ? turned : a->g;
    dot__multiply(a, x, x, gram, small, a->n / small, small, DOT__Y_TRANSPOSED);
    dot__symmetric_eigen(gram, vectors, value, small);
    for (int64_t k = 0; k < rank; ++k) {
        int64_t best = 0;
        for (int64_t i = 1; i < small; ++i) if (value[i] > value[best]) best = i;
        memcpy(p + k * small, vectors + best * small, (size_t)small * sizeof(double));
        value[best] = -(double)INFINITY;
    }
}

/* GaLore (Zhao et al. 2024; its repository's AdamW, decay after the update): s: projection, m, v of the projected gradient. */
static void dot__galore(dot__matrix *a)
{
    const dot__numbers *o = a->o;
    bool tall = a->rows >= a->columns;
    int64_t small = dot__min(a->rows, a->columns), large = dot__max(a->rows, a->columns), rank = dot__galore_rank(o->rank, a->rows, a->columns);
    double *x = a->scratch, rate = a->lr * sqrt(1 - pow(o->beta2, a->t)) / (1 - pow(o->beta1, a->t));
    a->after *= a->keep;
    a->keep = 1;
    if (a->matrix && fmod(a->t - 1, o->period) == 0) dot__galore_project(a, rank, small, tall, a->s[0], x + a->n);
    if (!a->matrix) memcpy(x, a->g, (size_t)a->n * sizeof(double));
    else if (tall) dot__multiply(a, a->g, a->s[0], x, large, small, rank, DOT__Y_TRANSPOSED);
    else dot__multiply(a, a->s[0], a->g, x, rank, small, large, DOT__PLAIN);
    int64_t n = a->matrix ? rank * large : a->n;
    dot__mean_into(a->s[1], x, o->beta1, n);
    dot__mean_square_into(a->s[2], x, o->beta2, n);
    for (int64_t i = 0; i < n; ++i) x[i] = a->s[1][i] / (sqrt(a->s[2][i]) + o->eps);
    if (a->matrix && tall) dot__multiply(a, x, a->s[0], a->d, large, rank, small, DOT__PLAIN);
    else if (a->matrix) {
        double *turned = x + a->n;
        dot__transpose(a->s[0], turned, rank, small);
        dot__multiply(a, turned, x, a->d, small, rank, large, DOT__PLAIN);
    } else memcpy(a->d, x, (size_t)a->n * sizeof(double));
    for (int64_t i = 0; i < a->n; ++i) a->d[i] *= rate * (a->matrix ? o->scale : 1);
}

/* ---- the step of the rules above ---- */

typedef struct dot__matrix_job { dot_optimizer *opt; double **memory; bool spread; } dot__matrix_job;

/* A large parameter of a rule made of products? */
static bool dot__matrix_large(const dot_optimizer *opt, const dot__slot *slot)
{
    return opt->rule >= DOT__RULE_SHAMPOO && slot->parameter->rank >= 2 && slot->tensor->size >= DOT__PIECE;
}

/* Of a state: its size in PyTorch's order if it has the parameter's shape, else as it lies. */
static void dot__matrix_state(const dot__slot *slot, int lane, int i, double *values, bool out)
{
    dot_tensor *t = slot->state[i];
    void *data = dot__at(t, lane);
    if (t->size == slot->tensor->size) {
        if (out) dot__torch_set(&slot->parameter->layout, t->dtype, data, t->size, values);
        else dot__torch_get(&slot->parameter->layout, t->dtype, data, t->size, values);
        return;
    }
    for (int64_t j = 0; j < t->size; ++j)
        if (out) dot__store(data, t->dtype, j, values[j]); else values[j] = dot__load(data, t->dtype, j);
}

/* The longer side that is preconditioned, and the elements of the largest factor of a product. */
static int64_t dot__matrix_side(const dot_optimizer *opt, int64_t rows, int64_t columns)
{
    int64_t small = dot__min(rows, columns), large = dot__max(rows, columns);
    bool takes = opt->rule == DOT__RULE_SHAMPOO || opt->rule == DOT__RULE_SOAP || opt->rule == DOT__RULE_PSGD_KRON;
    double limit = takes ? opt->options.max_precond_dim : 0;
    return (double)large <= limit ? large : (double)small <= limit ? small : 0;
}

static int64_t dot__matrix_factor(const dot_optimizer *opt, const dot__slot *slot)
{
    int64_t n = slot->tensor->size, rows = slot->parameter->rank >= 2 ? slot->parameter->shape[0] : 1, columns = n / rows;
    int64_t side = dot__max(dot__min(rows, columns), dot__matrix_side(opt, rows, columns));
    return opt->rule >= DOT__RULE_SHAMPOO ? dot__max(n, side * side) : 0;
}

static int64_t dot__matrix_room(const dot_optimizer *opt, const dot__slot *slot)
{
    const dot__parameter *p = slot->parameter;
    int64_t n = slot->tensor->size, rows = p->rank >= 2 ? p->shape[0] : 1, columns = n / rows, room = 3 * n;
    int64_t small = dot__min(rows, columns), large = dot__max(rows, columns), side = dot__matrix_side(opt, rows, columns);
    for (int i = 0; i < DOT_MAX_STATES; ++i) room += slot->state[i] ? slot->state[i]->size : 0;
    return room + 3 * side * side + side + dot__matrix_factor(opt, slot) + DOT__MATRIX_SCRATCH(small, large, n);
}

static void dot__matrix_apply(dot__matrix *a, dot__rule rule)
{
#define DOT__MATRIX_CASE(name, size0, size1, size2, size3, size4, names, function) case DOT__RULE_##name: function(a); break;
    switch (rule) {
    DOT__MATRIX_RULES(DOT__MATRIX_CASE)
    default: break;
    }
#undef DOT__MATRIX_CASE
}

static void dot__matrix_run(const dot__matrix_job *job, int lane, int64_t index, bool spread)
{
    dot_optimizer *opt = job->opt;
    dot__slot *slot = opt->active_slot[index];
    const dot__parameter *p = slot->parameter;
    dot__scalars h = dot__common_scalars(opt, slot, lane);
    dot__matrix a;
    double *memory = job->memory[index] + lane * dot__matrix_room(opt, slot);
    memset(&a, 0, sizeof a);
    a.ctx = opt->ctx;
    a.spread = spread;
    a.f = &opt->options;
    a.o = dot__hypers(opt, slot->group, lane);
    a.p = p;
    a.n = slot->tensor->size;
    a.matrix = p->rank >= 2;
    a.rows = a.matrix ? p->shape[0] : 1;
    a.columns = a.n / a.rows;
    a.t = (double)slot->t;
    a.memory = slot->memory + lane * DOT__MEMORY;
    a.seed = opt->ctx->lane_seeds[lane];
    a.stream = DOT__STREAM_NOISE | (uint64_t)slot->index << 40 | (uint64_t)slot->t;
    a.lr = h.lr;
    a.keep = h.keep;
    a.after = h.after;
    a.theta = memory;
    a.g = a.theta + a.n;
    a.d = a.g + a.n;
    a.rows_of_x = a.d + a.n;
    a.scratch = a.rows_of_x + dot__matrix_factor(opt, slot);
    for (int i = 0; i < DOT_MAX_STATES; ++i)
        if (slot->state[i]) {
            dot__matrix_state(slot, lane, i, a.s[i] = a.scratch, false);
            a.scratch += slot->state[i]->size;
        }
    dot__torch_get(&p->layout, slot->tensor->dtype, dot__at(slot->tensor, lane), a.n, a.theta);
    dot__torch_get(&p->layout, slot->tensor->dtype, dot__at(slot->tensor->grad, lane), a.n, a.g);
    for (int64_t i = 0; i < a.n; ++i) a.g[i] = h.gradient * a.g[i] + h.l2 * a.theta[i];
    dot__matrix_apply(&a, opt->rule);
    for (int64_t i = 0; i < a.n; ++i) a.theta[i] = a.after * (a.keep * a.theta[i] - a.d[i]);
    dot__torch_set(&p->layout, slot->tensor->dtype, dot__at(slot->tensor, lane), a.n, a.theta);
    for (int i = 0; i < DOT_MAX_STATES; ++i)
        if (slot->state[i]) dot__matrix_state(slot, lane, i, a.s[i], true);
}

static void dot__matrix_piece(void *argument, int lane, int64_t index)
{
    const dot__matrix_job *job = (const dot__matrix_job *)argument;
    if (!job->spread || !dot__matrix_large(job->opt, job->opt->active_slot[index])) dot__matrix_run(job, lane, index, false);
}

/* A thread takes a parameter and lane at a time; where there are fewer large ones than threads, these come one after the other, and all
   threads take part in their products. */
static bool dot__matrix_step(dot_optimizer *opt)
{
    dot_context *ctx = opt->ctx;
    dot__mark mark = dot__scratch_begin(ctx);
    dot__matrix_job job;
    job.opt = opt;
    job.memory = (double **)dot__step_alloc(ctx, (size_t)opt->active * sizeof(double *) + 1);
    for (int i = 0; i < opt->active && job.memory; ++i) {
        size_t room = (size_t)dot__matrix_room(opt, opt->active_slot[i]) * (size_t)ctx->lanes * sizeof(double);
        if (!(job.memory[i] = (double *)dot__step_alloc(ctx, room))) return false;
    }
    if (!job.memory) return false;
    int large = 0;
    for (int i = 0; i < opt->active; ++i) {
        opt->active_slot[i]->t++;
        large += dot__matrix_large(opt, opt->active_slot[i]) ? ctx->active_count : 0;
    }
    job.spread = large < ctx->threads;
    dot__parallel(ctx, true, opt->active, dot__matrix_piece, &job);
    unsigned long long mode = dot__denormals_flush(ctx->flush_denormals);
    for (int i = 0; i < opt->active && job.spread; ++i)
        for (int k = 0; k < ctx->active_count && dot__matrix_large(opt, opt->active_slot[i]); ++k)
            dot__matrix_run(&job, ctx->active[k], i, true);
    dot__denormals_restore(mode);
    dot__scratch_end(ctx, mark);
    return true;
}

/* ---- curvature ---- */

/* h of the state takes in the gradient x; Sophia-H keeps the estimate as it is until its step has used the curvature before it. */
static double dot__curvature_next(const dot_optimizer *opt, double beta2, double h, double x)
{
    return opt->rule == DOT__RULE_SOPHIA_H ? x : beta2 * h + (1 - beta2) * x * x;
}

static void dot__curvature_piece(void *argument, int lane, int64_t piece)
{
    dot_optimizer *opt = (dot_optimizer *)argument;
    const dot__slot *slot = dot__slot_of_piece(opt, piece);
    dot_state_precision precision = opt->options.state;
    double beta2 = dot__hypers(opt, slot->group, lane)->beta2;
    unsigned char *g = (unsigned char *)dot__at(slot->tensor->grad, lane);
    unsigned char *s = (unsigned char *)dot__at(slot->state[opt->rule == DOT__RULE_SOPHIA_H ? 2 : 1], lane);
    dot_dtype dtype = slot->tensor->dtype;
    int64_t n, first = dot__part(slot->tensor->size, piece - slot->first_piece, DOT__PIECE, &n);
    uint64_t stream = DOT__STREAM_STATE | (uint64_t)slot->index << 40 | (uint64_t)3 << 38 | (uint64_t)slot->t;   /* these rules have no state 3 */
    float h[DOT__BLOCK];
    for (int64_t end = first + n, size = slot->tensor->size; first < end; first += DOT__BLOCK) {
        int64_t count = dot__min(DOT__BLOCK, end - first);
        if (precision == DOT_STATE_FULL) {
            for (int64_t i = first; i < first + count; ++i)
                dot__store(s, dtype, i, dot__curvature_next(opt, beta2, dot__load(s, dtype, i), dot__load(g, dtype, i)));
            continue;
        }
        dot__state_decode(precision, opt->code, s, size, first, count, h);
        for (int64_t i = 0; i < count; ++i)
            h[i] = (float)dot__curvature_next(opt, beta2, (double)h[i], dot__load(g, dtype, first + i));
        dot__state_encode(precision, opt->code, s, size, first, count, h, opt->ctx->lane_seeds[lane], stream);
    }
}

bool dot_optimizer_curvature(dot_optimizer *opt)
{
    if (!opt || !dot_ok(opt->ctx)) return false;
    if (!dot__has_curvature(opt->rule)) return dot_zero_grad(opt->layer);
    dot__select(opt, false, false);
    dot__parallel(opt->ctx, true, opt->pieces, dot__curvature_piece, opt);
    for (int i = 0; i < opt->active; ++i)
        for (int lane = 0; lane < opt->ctx->lanes; ++lane) opt->active_slot[i]->memory[lane * DOT__MEMORY] += 1;
    return dot_zero_grad(opt->layer);
}

/* theta = backup + step z, z = +-1 drawn from the lane's seed; or, with `estimate`, gradient = z (ahead - gradient) / (2 h), theta = backup. */
static void dot__hutchinson_slot(dot_optimizer *opt, dot__slot *slot, double step, bool estimate)
{
    dot_tensor *w = slot->tensor;
    uint64_t stream = DOT__STREAM_HUTCHINSON | (uint64_t)slot->index << 40 | (uint64_t)opt->steps;
    for (int lane = 0; lane < opt->ctx->lanes; ++lane)
        for (int64_t i = 0; i < w->size; ++i) {
            double z = dot_random_uniform(opt->ctx->lane_seeds[lane], stream, (uint64_t)i) < 0.5 ? -1 : 1;
            double theta = dot__load(dot__at(slot->backup, lane), w->dtype, i);
            dot__store(dot__at(w, lane), w->dtype, i, estimate ? theta : theta + step * z);
            if (estimate && w->has_grad) {
                double change = dot__load(dot__at(slot->ahead, lane), w->dtype, i) - dot__load(dot__at(w->grad, lane), w->dtype, i);
                dot__store(dot__at(w->grad, lane), w->dtype, i, z * change / (2 * step));
            }
        }
}

static void dot__copy_lanes(dot_tensor *to, dot_tensor *from)
{
    for (int lane = 0; lane < from->ctx->lanes; ++lane)
        memcpy(dot__at(to, lane), dot__at(from, lane), (size_t)from->size * dot_dtype_size(from->dtype));
}

static bool dot__hutchinson_begin(dot_optimizer *opt)
{
    for (int i = 0; i < opt->slots; ++i) {
        dot__slot *slot = &opt->slot[i];
        dot_tensor *w = slot->tensor;
        if ((!slot->backup && !(slot->backup = dot__persistent_tensor(opt->ctx, w->dtype, 1, &w->size, w->size)))
            || (!slot->ahead && !(slot->ahead = dot__persistent_tensor(opt->ctx, w->dtype, 1, &w->size, w->size)))) return false;
        dot__copy_lanes(slot->backup, w);
    }
    return true;
}

bool dot_optimizer_hutchinson(dot_optimizer *opt, dot_loss_function loss, void *user)
{
    if (!opt || !dot_ok(opt->ctx)) return false;
    if (!loss) {
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_optimizer_hutchinson: loss NULL, expected a function");
        return false;
    }
    if (!dot__has_curvature(opt->rule)) return true;
    opt->ctx->function = "dot_optimizer_hutchinson";
    if (!dot__hutchinson_begin(opt)) return false;
    double h = cbrt(opt->ctx->dtype == DOT_F64 ? DBL_EPSILON : (double)FLT_EPSILON);    /* the best step of a central difference */
    for (int side = 0; side < 2; ++side) {
        for (int i = 0; i < opt->slots; ++i) dot__hutchinson_slot(opt, &opt->slot[i], side ? -h : h, false);
        bool good = dot_backward(loss(user));
        for (int i = 0; i < opt->slots; ++i) {
            dot__slot *slot = &opt->slot[i];
            if (!good) dot__copy_lanes(slot->tensor, slot->backup);
            else if (side) dot__hutchinson_slot(opt, slot, h, true);
            else if (slot->tensor->has_grad) dot__copy_lanes(slot->ahead, slot->tensor->grad);
        }
        if (!good) return false;
        if (side == 0) dot_zero_grad(opt->layer);
    }
    return dot_optimizer_curvature(opt);
}

/* Gaussian noise of variance eta / t^gamma on every gradient (Neelakantan et al. 2015). */
static void dot__noise_piece(void *argument, int lane, int64_t piece)
{
    dot_optimizer *opt = (dot_optimizer *)argument;
    const dot__slot *slot = dot__slot_of_piece(opt, piece);
    const dot__numbers *o = dot__hypers(opt, slot->group, lane);
    double deviation = sqrt(o->eta / pow((double)slot->t + 1, o->gamma));
    int64_t n, i = dot__part(slot->tensor->size, piece - slot->first_piece, DOT__PIECE, &n);
    uint64_t stream = DOT__STREAM_NOISE | (uint64_t)slot->index << 40 | (uint64_t)slot->t;
    void *g = dot__at(slot->tensor->grad, lane);
    for (n += i; i < n; ++i)
        dot__store(g, slot->tensor->dtype, i, dot__load(g, slot->tensor->dtype, i)
                   + deviation * dot_random_normal(opt->ctx->lane_seeds[lane], stream, (uint64_t)i));
}

static bool dot__step_ok(dot_optimizer *opt, double multiplier)
{
    bool needs_loss = opt->rule == DOT__RULE_POLYAK_SGD || opt->rule == DOT__RULE_MOMO || opt->rule == DOT__RULE_MOMO_ADAM;
    if (!dot__finite(multiplier) || multiplier < 0)
        dot__fail(opt->ctx, DOT_ERROR_ARGUMENT, "dot_optimizer_step: multiplier %g, expected 0 or more", multiplier);
    else if (opt->averaged)
        dot__fail(opt->ctx, DOT_ERROR_STATE, "dot_optimizer_step: the averaged point stands in the parameters, expected "
                  "dot_optimizer_averaged(optimizer, false) first");
    else if (needs_loss && !opt->has_loss)
        dot__fail(opt->ctx, DOT_ERROR_STATE, "dot_optimizer_step: %s needs the loss of the step, expected dot_optimizer_loss first",
                  dot_algorithm_name(opt->options.algorithm));
    else return true;
    return false;
}

bool dot_optimizer_step(dot_optimizer *opt, double multiplier)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__step_ok(opt, multiplier)) return false;
    opt->ctx->function = "dot_optimizer_step";
    opt->multiplier = multiplier;
    dot__select(opt, false, opt->factored);
    if (opt->rule == DOT__RULE_NOISY_SGD) dot__parallel(opt->ctx, true, opt->pieces, dot__noise_piece, opt);
    if (!(opt->factored ? dot__factor_step(opt) : opt->rule > DOT__RULE_MATRIX ? dot__matrix_step(opt) : dot__rule_step(opt))) return false;
    opt->steps++;
    opt->has_loss = false;
    for (int lane = 0; lane < opt->ctx->lanes; ++lane) opt->clip[lane] = 1;
    return dot_zero_grad(opt->layer);
}

/* Schedule-free (Defazio et al. 2024): y = (1 - beta1) z + beta1 x is trained, z is state 0, hence x = y + (1 - 1/beta1) (z - y). */
static bool dot__average_slot(dot_optimizer *opt, dot__slot *slot)
{
    dot_tensor *w = slot->tensor;
    if (!slot->backup && !(slot->backup = dot__persistent_tensor(opt->ctx, w->dtype, 1, &w->size, w->size))) return false;
    for (int lane = 0; lane < opt->ctx->lanes; ++lane) {
        double share = slot->t > 0 ? 1 - 1 / dot__hypers(opt, slot->group, lane)->beta1 : 0;
        memcpy(dot__at(slot->backup, lane), dot__at(w, lane), (size_t)w->size * dot_dtype_size(w->dtype));
        for (int64_t i = 0; i < w->size; ++i) {
            double y = dot__load(dot__at(w, lane), w->dtype, i), z;
            float decoded;
            if (opt->options.state == DOT_STATE_FULL) z = dot__load(dot__at(slot->state[0], lane), w->dtype, i);
            else {
                dot__state_decode(opt->options.state, opt->code, (uint8_t *)dot__at(slot->state[0], lane), w->size, i, 1, &decoded);
                z = (double)decoded;
            }
            dot__store(dot__at(w, lane), w->dtype, i, y + share * (z - y));
        }
    }
    return true;
}

bool dot_optimizer_averaged(dot_optimizer *opt, bool on)
{
    if (!opt || !dot_ok(opt->ctx)) return false;
    if (opt->rule != DOT__RULE_SCHEDULE_FREE_SGD && opt->rule != DOT__RULE_SCHEDULE_FREE_ADAMW) return true;
    if (on == opt->averaged) return true;
    opt->ctx->function = "dot_optimizer_averaged";
    for (int i = 0; i < opt->slots; ++i) {
        dot__slot *slot = &opt->slot[i];
        if (on && !dot__average_slot(opt, slot)) {
            while (i-- > 0) dot__copy_lanes(opt->slot[i].tensor, opt->slot[i].backup);
            return false;
        }
        if (!on) dot__copy_lanes(slot->tensor, slot->backup);
    }
    opt->averaged = on;
    return true;
}

/* ---- optimizers that evaluate the loss themselves ---- */

#define DOT__MAGIC_LBFGS   0xd07c0901u
#define DOT__MAGIC_CMAES   0xd07c0902u
#define DOT__MAGIC_SPSA    0xd07c0903u
#define DOT__MAGIC_SVRG    0xd07c0904u
#define DOT__MAGIC_NATURAL 0xd07c0905u
#define DOT__MAGIC_KFAC    0xd07c0906u

/* The trainable parameters of a layer, those that ask for a gradient, as one vector. */
typedef struct dot__flat {
    dot_context *ctx;
    dot_layer *layer;
    int tensors;
    dot_tensor **tensor;
    int64_t n;
    double *partial;                        /* one sum a piece */
} dot__flat;

static bool dot__flat_visit(void *user, const char *name, dot__parameter *p)
{
    dot__flat *v = (dot__flat *)user;
    (void)name;
    if (p->kind == DOT_KIND_BUFFER || !dot__is_float(p->tensor->dtype) || !p->tensor->requires_grad) return true;
    v->tensor[v->tensors++] = p->tensor;
    v->n += p->tensor->size;
    return true;
}

static bool dot__flat_open(dot__flat *v, dot_context *ctx, dot_layer *layer)
{
    v->ctx = ctx;
    v->layer = layer;
    v->tensor = (dot_tensor **)dot__new(ctx, (size_t)dot_layer_parameters(layer) * sizeof(dot_tensor *));
    if (!v->tensor || !dot__visit(layer, "", dot__flat_visit, v)) return false;
    if (v->n == 0) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: the layer has no trainable parameters", ctx->function);
    return v->n > 0 && (v->partial = (double *)dot__new(ctx, (size_t)dot__ceil_div(v->n, DOT__PIECE) * sizeof(double))) != NULL;
}

/* What all _create functions check before they allocate. */
static bool dot__solver_creatable(dot_context *ctx, dot_layer *layer, const char *function, uint32_t magic, uint32_t expected)
{
    if (!dot_ok(ctx) || !layer) return false;
    ctx->function = function;
    if (layer->ctx != ctx)
        dot__fail(ctx, DOT_ERROR_STATE, "%s: layer of another context", function);
    else if (ctx->lanes != 1)
        dot__fail(ctx, DOT_ERROR_STATE, "%s: a context of %d lanes, expected one lane", function, ctx->lanes);
    else if (magic != expected)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: magic 0x%08x, expected options filled by their _defaults function", function,
                  (unsigned)magic);
    return dot_ok(ctx);
}

/* A vector (or matrix of `rows` of them) in persistent memory. */
static double *dot__flat_new(const dot__flat *v, int64_t rows)
{
    size_t bytes = 0;
    if ((uint64_t)rows <= SIZE_MAX && dot__mul_size((size_t)rows, (size_t)v->n, &bytes)
        && dot__mul_size(bytes, sizeof(double), &bytes)) return (double *)dot__new(v->ctx, bytes);
    dot__out_of_memory(v->ctx, SIZE_MAX / 2);
    return NULL;
}

static void dot__flat_get(const dot__flat *v, double *x)
{
    for (int k = 0; k < v->tensors; ++k) {
        const dot_tensor *t = v->tensor[k];
        for (int64_t i = 0; i < t->size; ++i) *x++ = dot__load(dot__at(t, 0), t->dtype, i);
    }
}

static void dot__flat_set(const dot__flat *v, const double *x)
{
    for (int k = 0; k < v->tensors; ++k) {
        const dot_tensor *t = v->tensor[k];
        for (int64_t i = 0; i < t->size; ++i) dot__store(dot__at(t, 0), t->dtype, i, *x++);
    }
}

static void dot__flat_grad(const dot__flat *v, double *g)
{
    for (int k = 0; k < v->tensors; ++k) {
        const dot_tensor *t = v->tensor[k];
        for (int64_t i = 0; i < t->size; ++i) *g++ = dot__has_grad(t) ? dot__load(dot__at(t->grad, 0), t->dtype, i) : 0;
    }
}

/* May the step begin? `given`: its functions are not NULL. */
static bool dot__solver_ready(const dot__flat *v, const char *function, bool given)
{
    dot_context *ctx = v->ctx;
    if (!dot_ok(ctx)) return false;
    ctx->function = function;
    if (!given) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: a function is NULL", function);
    else if (ctx->active_count == 0) dot__fail(ctx, DOT_ERROR_STATE, "%s: the context's lane is stopped", function);
    return dot_ok(ctx);
}

/* The value of the loss that the user's function has returned and, unless g is NULL, its gradient. False after an error. */
static bool dot__evaluate(const dot__flat *v, const char *function, dot_tensor *loss, double *value, double *g)
{
    dot_context *ctx = v->ctx;
    if (!dot_ok(ctx)) return false;
    if (!loss || loss->ctx != ctx) {
        dot__fail(ctx, DOT_ERROR_STATE, "%s: the user's function returned %s, expected a scalar", function,
                  loss ? "a tensor of another context" : "NULL");
        return false;
    }
    if (loss->size != 1) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: the user's function returned a tensor %s, expected a scalar", function,
                  DOT__SHAPE(loss));
        return false;
    }
    dot_zero_grad(v->layer);
    if (g && !dot_backward(loss)) return false;
    *value = dot__load(dot__at(loss, 0), loss->dtype, 0);
    if (g) dot__flat_grad(v, g);
    ctx->function = function;
    return dot_zero_grad(v->layer);
}

/* ---- vectors: by pieces, whose sums are added up in order ---- */

typedef struct dot__vector_job { const dot__flat *v; double *y, a; const double *x; } dot__vector_job;

static void dot__vector_dot_piece(void *argument, int lane, int64_t piece)
{
    const dot__vector_job *job = (const dot__vector_job *)argument;
    int64_t n, i = dot__part(job->v->n, piece, DOT__PIECE, &n);
    double sum[2] = { 0, 0 };
    (void)lane;
    for (n += i; i < n; ++i) sum[i & 1] += job->x[i] * job->y[i];
    job->v->partial[piece] = sum[0] + sum[1];
}

static void dot__vector_add_piece(void *argument, int lane, int64_t piece)
{
    const dot__vector_job *job = (const dot__vector_job *)argument;
    int64_t n, i = dot__part(job->v->n, piece, DOT__PIECE, &n);
    (void)lane;
    for (n += i; i < n; ++i) job->y[i] += job->a * job->x[i];
}

static double dot__vector_dot(const dot__flat *v, const double *x, double *y)
{
    dot__vector_job job = { v, y, 0, x };
    int64_t pieces = dot__ceil_div(v->n, DOT__PIECE);
    double sum = 0;
    dot__parallel(v->ctx, false, pieces, dot__vector_dot_piece, &job);
    for (int64_t p = 0; p < pieces; ++p) sum += v->partial[p];
    return sum;
}

/* y += a x */
static void dot__vector_add(const dot__flat *v, double *y, double a, const double *x)
{
    dot__vector_job job = { v, y, a, x };
    dot__parallel(v->ctx, false, dot__ceil_div(v->n, DOT__PIECE), dot__vector_add_piece, &job);
}

/* y = a x */
static void dot__vector_scale(const dot__flat *v, double *y, double a, const double *x)
{
    for (int64_t i = 0; i < v->n; ++i) y[i] = a * x[i];
}

static double dot__vector_max(const dot__flat *v, const double *x)     /* max |x| */
{
    double largest = 0;
    for (int64_t i = 0; i < v->n; ++i) largest = fmax(largest, fabs(x[i]));
    return largest;
}

static double dot__vector_sum(const dot__flat *v, const double *x)     /* sum |x|: not finite if an element is not */
{
    double sum = 0;
    for (int64_t i = 0; i < v->n; ++i) sum += fabs(x[i]);
    return sum;
}

/* ---- L-BFGS ---- */

/* A point theta + t d of the line search: the loss, its slope along d, and its gradient. */
typedef struct dot__wolfe_point { double t, f, slope, *g; } dot__wolfe_point;

struct dot_lbfgs {
    dot__flat v;
    dot_lbfgs_options o;
    dot_loss_function loss;        /* of the present step */
    void *user;
    int64_t iterations, evaluations;
    int64_t step_evaluations;
    bool fresh;                             /* no direction yet: begin with steepest descent */
    int pairs, oldest;                      /* the ring of pairs */
    double *s, *y, *rho, *alpha;            /* [history][n], 1 / s'y, scratch */
    double t, scale;                        /* the latest step length; H0 */
    double *x, *d, *previous;               /* theta, direction, gradient at the latest theta but one */
    double *g[3];                           /* gradients of the line search's points */
    double *start, *best, best_loss;        /* of this step */
};

dot_lbfgs_options dot_lbfgs_defaults(void)
{
    dot_lbfgs_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_LBFGS;
    o.lr = 1;
    o.max_iter = 20;
    o.max_eval = 25;
    o.tolerance_grad = 1e-7;
    o.tolerance_change = 1e-9;
    o.history = 100;
    o.line_search = DOT_LINE_SEARCH_NONE;
    return o;
}

static bool dot__lbfgs_options_ok(dot_context *ctx, const dot_lbfgs_options *o)
{
    const char *f = "dot_lbfgs_create";
    return dot__option_ok(ctx, f, "lr", o->lr, 0, 1e30, false) && dot__option_ok(ctx, f, "max_iter", o->max_iter, 1, 1e9, false)
        && dot__option_ok(ctx, f, "max_eval", o->max_eval, 1, 1e9, false)
        && dot__option_ok(ctx, f, "tolerance_grad", o->tolerance_grad, 0, 1e30, false)
        && dot__option_ok(ctx, f, "tolerance_change", o->tolerance_change, 0, 1e30, false)
        && dot__option_ok(ctx, f, "history", o->history, 1, 10000, false)
        && dot__option_ok(ctx, f, "line_search", (double)o->line_search, DOT_LINE_SEARCH_NONE, DOT_LINE_SEARCH_STRONG_WOLFE,
                          false);
}

dot_lbfgs *dot_lbfgs_create(dot_context *ctx, dot_layer *layer, const dot_lbfgs_options *options)
{
    dot_lbfgs_options o = options ? *options : dot_lbfgs_defaults();
    if (!dot__solver_creatable(ctx, layer, "dot_lbfgs_create", o.magic, DOT__MAGIC_LBFGS)
        || !dot__lbfgs_options_ok(ctx, &o)) return NULL;
    dot_lbfgs *l = (dot_lbfgs *)dot__new(ctx, sizeof *l);
    if (!l || !dot__flat_open(&l->v, ctx, layer)) return NULL;
    double **vectors[] = { &l->x, &l->d, &l->previous, &l->g[0], &l->g[1], &l->g[2], &l->start, &l->best };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; ++i)
        if (!(*vectors[i] = dot__flat_new(&l->v, 1))) return NULL;
    size_t history = (size_t)o.history;
    if (!(l->s = dot__flat_new(&l->v, o.history)) || !(l->y = dot__flat_new(&l->v, o.history))
        || !(l->rho = (double *)dot__new(ctx, history * sizeof(double)))
        || !(l->alpha = (double *)dot__new(ctx, history * sizeof(double)))) return NULL;
    l->o = o;
    l->fresh = true;
    return l;
}

int64_t dot_lbfgs_iterations(const dot_lbfgs *l)  { return l ? l->iterations : 0; }
int64_t dot_lbfgs_evaluations(const dot_lbfgs *l) { return l ? l->evaluations : 0; }

/* Loss and gradient at the parameters as they are. False after an error, and when they are not finite. */
static bool dot__lbfgs_evaluate(dot_lbfgs *l, dot__wolfe_point *p)
{
    l->evaluations++;
    l->step_evaluations++;
    if (!dot__evaluate(&l->v, "dot_lbfgs_step", l->loss(l->user), &p->f, p->g)) return false;
    if (!dot__finite(p->f) || !dot__finite(dot__vector_sum(&l->v, p->g))) return false;
    if (p->f < l->best_loss) {
        l->best_loss = p->f;
        dot__flat_get(&l->v, l->best);
    }
    return true;
}

/* theta = x + t d */
static void dot__lbfgs_move(dot_lbfgs *l, double t)
{
    const double *x = l->x, *d = l->d;
    for (int k = 0; k < l->v.tensors; ++k) {
        const dot_tensor *w = l->v.tensor[k];
        for (int64_t i = 0; i < w->size; ++i) dot__store(dot__at(w, 0), w->dtype, i, *x++ + t * *d++);
    }
}

static bool dot__wolfe_at(dot_lbfgs *l, double t, dot__wolfe_point *p)
{
    dot__lbfgs_move(l, t);
    p->t = t;
    if (!dot__lbfgs_evaluate(l, p)) return false;
    p->slope = dot__vector_dot(&l->v, p->g, l->d);
    return true;
}

/* The minimum, within the bounds, of the cubic through two points with their slopes. (Nocedal, Wright 2006, eq. 3.59) */
static double dot__wolfe_cubic(const dot__wolfe_point *a, const dot__wolfe_point *b, double low, double high)
{
    double d1 = a->slope + b->slope - 3 * (a->f - b->f) / (a->t - b->t), square = d1 * d1 - a->slope * b->slope;
    if (!(square >= 0)) return (low + high) / 2;
    double d2 = sqrt(square);
    double t = a->t <= b->t ? b->t - (b->t - a->t) * ((b->slope + d2 - d1) / (b->slope - a->slope + 2 * d2))
                            : a->t - (a->t - b->t) * ((a->slope + d2 - d1) / (a->slope - b->slope + 2 * d2));
    return t > low ? t < high ? t : high : low;     /* NaN: low */
}

/* The one of the three gradients' places that neither point uses. */
static double *dot__wolfe_place(dot_lbfgs *l, const dot__wolfe_point *a, const dot__wolfe_point *b)
{
    int i = 0;
    while (l->g[i] == a->g || l->g[i] == b->g) ++i;
    return l->g[i];
}

/* Where to look next between the ends of the bracket. A minimum near an end is tried once; the second time in turn, or at the end
   itself, a tenth of the way into the bracket is taken. */
static double dot__wolfe_trial(const dot__wolfe_point b[2], bool *near_end)
{
    double low = fmin(b[0].t, b[1].t), high = fmax(b[0].t, b[1].t), tenth = 0.1 * (high - low);
    double t = dot__wolfe_cubic(&b[0], &b[1], low, high);
    if (!(fmin(high - t, t - low) < tenth)) {
        *near_end = false;
    } else if (*near_end || t >= high || t <= low) {
        t = fabs(t - high) < fabs(t - low) ? high - tenth : low + tenth;
        *near_end = false;
    } else {
        *near_end = true;
    }
    return t;
}

static const double dot__wolfe_c1 = 1e-4, dot__wolfe_c2 = 0.9;

/* Shrinks the bracket until its lower end satisfies the strong Wolfe conditions; returns that end in *low. */
static bool dot__wolfe_zoom(dot_lbfgs *l, const dot__wolfe_point *start, dot__wolfe_point b[2], int tries, dot__wolfe_point *low)
{
    double length = dot__vector_max(&l->v, l->d);
    int lo = b[0].f <= b[1].f ? 0 : 1;
    bool done = false, near_end = false;
    while (!done && tries-- > 0 && !(fabs(b[1].t - b[0].t) * length < l->o.tolerance_change)) {
        dot__wolfe_point p;
        p.g = dot__wolfe_place(l, &b[0], &b[1]);
        if (!dot__wolfe_at(l, dot__wolfe_trial(b, &near_end), &p)) return false;
        if (p.f > start->f + dot__wolfe_c1 * p.t * start->slope || p.f >= b[lo].f) {
            b[1 - lo] = p;
            lo = b[0].f <= b[1].f ? 0 : 1;
            continue;
        }
        if (fabs(p.slope) <= -dot__wolfe_c2 * start->slope) done = true;
        else if (p.slope * (b[1 - lo].t - b[lo].t) >= 0) b[1 - lo] = b[lo];
        b[lo] = p;
    }
    *low = b[lo];
    return true;
}

/* From *now, along d: steps out until a bracket is found, then zooms. *now becomes the point found. */
static bool dot__wolfe_search(dot_lbfgs *l, dot__wolfe_point *now, int max_tries)
{
    dot__wolfe_point start = *now, b[2] = { *now, *now }, *previous = &b[0], *p = &b[1];
    bool done = false, found = false;
    int tries = 0;
    p->g = dot__wolfe_place(l, &start, previous);
    if (!dot__wolfe_at(l, l->t, p)) return false;
    for (; tries < max_tries; ++tries) {
        found = p->f > start.f + dot__wolfe_c1 * p->t * start.slope || (tries > 1 && p->f >= previous->f);
        done = !found && fabs(p->slope) <= -dot__wolfe_c2 * start.slope;
        found = found || p->slope >= 0;
        if (done || found) break;
        double t = dot__wolfe_cubic(previous, p, p->t + 0.01 * (p->t - previous->t), p->t * 10);
        *previous = *p;
        p->g = dot__wolfe_place(l, &start, previous);
        if (!dot__wolfe_at(l, t, p)) return false;
    }
    if (done) {
        *now = *p;
        return true;
    }
    if (!found) *previous = start;              /* out of tries: the better of the first and the last */
    return dot__wolfe_zoom(l, &start, b, max_tries - tries, now);
}

/* Keeps the pair of the latest move, if its curvature is positive; the oldest makes room. */
static void dot__lbfgs_remember(dot_lbfgs *l, const double *g)
{
    const dot__flat *v = &l->v;
    int slot = (l->oldest + l->pairs) % l->o.history;
    double *s = l->s + slot * v->n, *y = l->y + slot * v->n;
    double *candidate_s = l->d, *candidate_y = l->previous;        /* both are used up after this */
    for (int64_t i = 0; i < v->n; ++i) {
        candidate_y[i] = g[i] - candidate_y[i];
        candidate_s[i] *= l->t;
    }
    double ys = dot__vector_dot(v, candidate_y, candidate_s);
    if (!(ys > 1e-10)) return;
    memcpy(s, candidate_s, (size_t)v->n * sizeof(double));
    memcpy(y, candidate_y, (size_t)v->n * sizeof(double));
    l->rho[slot] = 1 / ys;
    l->scale = ys / dot__vector_dot(v, y, y);
    if (l->pairs < l->o.history) l->pairs++; else l->oldest = (l->oldest + 1) % l->o.history;
}

/* d = -H g by the two-loop recursion. */
static void dot__lbfgs_direction(dot_lbfgs *l, const double *g)
{
    const dot__flat *v = &l->v;
    if (l->fresh) {
        l->pairs = l->oldest = 0;
        l->scale = 1;
    } else {
        dot__lbfgs_remember(l, g);
    }
    dot__vector_scale(v, l->d, -1, g);
    for (int i = l->pairs; i-- > 0;) {
        int slot = (l->oldest + i) % l->o.history;
        l->alpha[slot] = dot__vector_dot(v, l->s + slot * v->n, l->d) * l->rho[slot];
        dot__vector_add(v, l->d, -l->alpha[slot], l->y + slot * v->n);
    }
    dot__vector_scale(v, l->d, l->scale, l->d);
    for (int i = 0; i < l->pairs; ++i) {
        int slot = (l->oldest + i) % l->o.history;
        double beta = dot__vector_dot(v, l->y + slot * v->n, l->d) * l->rho[slot];
        dot__vector_add(v, l->d, l->alpha[slot] - beta, l->s + slot * v->n);
    }
}

/* The iterations of a step, from *now. False after an error, and when something is not finite. */
static bool dot__lbfgs_iterate(dot_lbfgs *l, dot__wolfe_point *now)
{
    const dot_lbfgs_options *o = &l->o;
    bool search = o->line_search == DOT_LINE_SEARCH_STRONG_WOLFE;
    for (int i = 1; i <= o->max_iter; ++i) {
        l->iterations++;
        dot__lbfgs_direction(l, now->g);
        memcpy(l->previous, now->g, (size_t)l->v.n * sizeof(double));
        l->t = o->lr * (l->fresh ? fmin(1, 1 / dot__vector_sum(&l->v, now->g)) : 1);
        l->fresh = false;
        double before = now->f;
        now->t = 0;
        now->slope = dot__vector_dot(&l->v, now->g, l->d);
        if (now->slope > -o->tolerance_change) break;
        if (search) {
            if (!dot__wolfe_search(l, now, (int)(o->max_eval - l->step_evaluations))) return false;
            l->t = now->t;
        }
        dot__lbfgs_move(l, l->t);
        if (!search && i < o->max_iter && !dot__lbfgs_evaluate(l, now)) return false;
        dot__flat_get(&l->v, l->x);
        if (l->step_evaluations >= o->max_eval || dot__vector_max(&l->v, now->g) <= o->tolerance_grad
            || fabs(l->t) * dot__vector_max(&l->v, l->d) <= o->tolerance_change
            || fabs(now->f - before) < o->tolerance_change) break;
    }
    return true;
}

double dot_lbfgs_step(dot_lbfgs *l, dot_loss_function loss, void *user)
{
    if (!l || !dot__solver_ready(&l->v, "dot_lbfgs_step", loss != NULL)) return (double)NAN;
    dot__wolfe_point now = { 0, (double)NAN, 0, l->g[0] };
    l->loss = loss;
    l->user = user;
    l->step_evaluations = 0;
    l->best_loss = (double)INFINITY;
    dot__flat_get(&l->v, l->start);
    memcpy(l->x, l->start, (size_t)l->v.n * sizeof(double));
    bool good = dot__lbfgs_evaluate(l, &now);
    double first = now.f;
    if (good && dot__vector_max(&l->v, now.g) > l->o.tolerance_grad) good = dot__lbfgs_iterate(l, &now);
    if (good) return first;
    l->fresh = true;
    dot__flat_set(&l->v, dot_ok(l->v.ctx) && l->best_loss < (double)INFINITY ? l->best : l->start);
    dot_zero_grad(l->v.layer);
    return dot_ok(l->v.ctx) ? first : (double)NAN;
}

/* ---- CMA-ES ---- */

struct dot_cmaes {
    dot__flat v;
    int population, parents;
    uint64_t seed;
    uint64_t generation;
    double sigma, best_loss;
    double mu_eff, c_sigma, d_sigma, c_c, c_1, c_mu, expected;  /* names of the tutorial; expected: E|N(0, I)| */
    double *weight, weight_sum;             /* by rank */
    double *loss;                           /* of the samples */
    int *rank;                              /* samples, best first */
    uint64_t decompose_every, decomposed;   /* generations */
    double *mean, *best, *x;
    double *path_sigma, *path_c;
    double *z, *y;                          /* [population][n]: z ~ N(0, I), y = C^1/2 z */
    double *step_z, *step_y;                /* their weighted means over the parents */
    double *c, *root, *vectors, *values;    /* C, its symmetric square root, its eigenvectors and eigenvalues */
};

dot_cmaes_options dot_cmaes_defaults(void)
{
    dot_cmaes_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_CMAES;
    o.sigma = 0.3;
    return o;
}

/* Table 1 of the tutorial. */
static void dot__cmaes_parameters(dot_cmaes *s)
{
    double n = (double)s->v.n, lambda = s->population, sum[2] = { 0, 0 }, squares[2] = { 0, 0 };
    for (int i = 0; i < s->population; ++i) {
        double w = s->weight[i] = log((lambda + 1) / 2) - log(i + 1.0);
        sum[i >= s->parents] += w;
        squares[i >= s->parents] += w * w;
    }
    double m = s->mu_eff = sum[0] * sum[0] / squares[0], m_negative = sum[1] * sum[1] / squares[1];
    s->c_sigma = (m + 2) / (n + m + 5);
    s->d_sigma = 1 + 2 * fmax(0, sqrt((m - 1) / (n + 1)) - 1) + s->c_sigma;
    s->c_c = (4 + m / n) / (n + 4 + 2 * m / n);
    s->c_1 = 2 / ((n + 1.3) * (n + 1.3) + m);
    s->c_mu = fmin(1 - s->c_1, 2 * (0.25 + m + 1 / m - 2) / ((n + 2) * (n + 2) + m));
    double negative = fmin(1 + s->c_1 / s->c_mu, fmin(1 + 2 * m_negative / (m + 2), (1 - s->c_1 - s->c_mu) / (n * s->c_mu)));
    s->weight_sum = 0;
    for (int i = 0; i < s->population; ++i) {
        s->weight[i] *= i < s->parents ? 1 / sum[0] : negative / -sum[1];
        s->weight_sum += s->weight[i];
    }
    s->expected = sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n));
    s->decompose_every = (uint64_t)fmax(1, floor(1 / (10 * n * (s->c_1 + s->c_mu))));
}

dot_cmaes *dot_cmaes_create(dot_context *ctx, dot_layer *layer, const dot_cmaes_options *options)
{
    dot_cmaes_options o = options ? *options : dot_cmaes_defaults();
    const char *f = "dot_cmaes_create";
    if (!dot__solver_creatable(ctx, layer, f, o.magic, DOT__MAGIC_CMAES)
        || !dot__option_ok(ctx, f, "sigma", o.sigma, 1e-300, 1e30, false)
        || (o.population != 0 && !dot__option_ok(ctx, f, "population", o.population, 4, 1e6, false))) return NULL;
    dot_cmaes *s = (dot_cmaes *)dot__new(ctx, sizeof *s);
    if (!s || !dot__flat_open(&s->v, ctx, layer)) return NULL;
    int64_t n = s->v.n;
    if (!dot__option_ok(ctx, f, "the number of trainable parameters", (double)n, 1, 4096, false)) return NULL;
    s->population = o.population ? o.population : 4 + (int)floor(3 * log((double)n));
    s->parents = s->population / 2;
    s->sigma = o.sigma;
    s->best_loss = (double)INFINITY;
    s->seed = ctx->lane_seeds[0] + o.seed * UINT64_C(0x9E3779B97F4A7C15);
    size_t samples = (size_t)s->population;
    double **vectors[] = { &s->mean, &s->best, &s->x, &s->path_sigma, &s->path_c, &s->step_z, &s->step_y, &s->values };
    double **matrices[] = { &s->c, &s->root, &s->vectors };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; ++i) if (!(*vectors[i] = dot__flat_new(&s->v, 1))) return NULL;
    for (size_t i = 0; i < sizeof matrices / sizeof matrices[0]; ++i) if (!(*matrices[i] = dot__flat_new(&s->v, n))) return NULL;
    if (!(s->z = dot__flat_new(&s->v, s->population)) || !(s->y = dot__flat_new(&s->v, s->population))
        || !(s->weight = (double *)dot__new(ctx, samples * sizeof(double)))
        || !(s->loss = (double *)dot__new(ctx, samples * sizeof(double)))
        || !(s->rank = (int *)dot__new(ctx, samples * sizeof(int)))) return NULL;
    dot__cmaes_parameters(s);
    dot__flat_get(&s->v, s->mean);
    for (int64_t i = 0; i < n; ++i) s->c[i * n + i] = s->root[i * n + i] = 1;
    return s;
}

double dot_cmaes_sigma(const dot_cmaes *s) { return s ? s->sigma : (double)NAN; }

double dot_cmaes_best(dot_cmaes *s)
{
    if (!s || !dot_ok(s->v.ctx) || !(s->best_loss < (double)INFINITY)) return (double)NAN;
    dot__flat_set(&s->v, s->best);
    return s->best_loss;
}

static void dot__cmaes_decompose(dot_cmaes *s)
{
    int64_t n = s->v.n;
    memcpy(s->root, s->c, (size_t)(n * n) * sizeof(double));
    dot__symmetric_eigen(s->root, s->vectors, s->values, n);
    double floor_value = 1e-20 * dot__vector_max(&s->v, s->values);     /* rounding may make one negative */
    memset(s->root, 0, (size_t)(n * n) * sizeof(double));
    for (int64_t k = 0; k < n; ++k) {
        const double *vector = s->vectors + k * n;
        double value = sqrt(fmax(s->values[k], floor_value));
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j < n; ++j) s->root[i * n + j] += value * vector[i] * vector[j];
    }
    s->decomposed = s->generation + 1;
}

/* Draws the population, evaluates and ranks it; a loss that is not finite counts as infinite. */
static bool dot__cmaes_sample(dot_cmaes *s, dot_loss_function loss, void *user)
{
    int64_t n = s->v.n;
    for (int k = 0; k < s->population; ++k) {
        double *z = s->z + k * n, *y = s->y + k * n;
        for (int64_t i = 0; i < n; ++i)
            z[i] = dot_random_normal(s->seed, DOT__STREAM_SOLVER + s->generation, (uint64_t)(k * n + i));
        for (int64_t i = 0; i < n; ++i) {
            y[i] = dot__vector_dot(&s->v, s->root + i * n, z);
            s->x[i] = s->mean[i] + s->sigma * y[i];
        }
        dot__flat_set(&s->v, s->x);
        if (!dot__evaluate(&s->v, "dot_cmaes_step", loss(user), &s->loss[k], NULL)) return false;
        if (!dot__finite(s->loss[k])) s->loss[k] = (double)INFINITY;
        if (s->loss[k] < s->best_loss) {
            s->best_loss = s->loss[k];
            dot__flat_get(&s->v, s->best);
        }
        int place = k;
        for (; place > 0 && s->loss[s->rank[place - 1]] > s->loss[k]; --place) s->rank[place] = s->rank[place - 1];
        s->rank[place] = k;
    }
    return true;
}

/* Mean, step size and evolution paths; returns h_sigma. */
static double dot__cmaes_move(dot_cmaes *s)
{
    int64_t n = s->v.n;
    double cs = s->c_sigma, norm = 0, generations = (double)s->generation + 1;
    memset(s->step_z, 0, (size_t)n * sizeof(double));
    memset(s->step_y, 0, (size_t)n * sizeof(double));
    for (int i = 0; i < s->parents; ++i) {
        dot__vector_add(&s->v, s->step_z, s->weight[i], s->z + s->rank[i] * n);
        dot__vector_add(&s->v, s->step_y, s->weight[i], s->y + s->rank[i] * n);
    }
    dot__vector_add(&s->v, s->mean, s->sigma, s->step_y);
    for (int64_t i = 0; i < n; ++i) {
        s->path_sigma[i] = (1 - cs) * s->path_sigma[i] + sqrt(cs * (2 - cs) * s->mu_eff) * s->step_z[i];  /* = C^-1/2 step_y */
        norm += s->path_sigma[i] * s->path_sigma[i];
    }
    norm = sqrt(norm);
    s->sigma *= exp(cs / s->d_sigma * (norm / s->expected - 1));
    double h = norm / sqrt(1 - pow(1 - cs, 2 * generations)) < (1.4 + 2 / ((double)n + 1)) * s->expected;
    for (int64_t i = 0; i < n; ++i)
        s->path_c[i] = (1 - s->c_c) * s->path_c[i] + h * sqrt(s->c_c * (2 - s->c_c) * s->mu_eff) * s->step_y[i];
    return h;
}

static void dot__cmaes_covariance(dot_cmaes *s, double h)
{
    int64_t n = s->v.n;
    double keep = 1 + s->c_1 * (1 - h) * s->c_c * (2 - s->c_c) - s->c_1 - s->c_mu * s->weight_sum;
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j <= i; ++j) s->c[i * n + j] = keep * s->c[i * n + j] + s->c_1 * s->path_c[i] * s->path_c[j];
    for (int k = 0; k < s->population; ++k) {
        double *y = s->y + s->rank[k] * n, *z = s->z + s->rank[k] * n, w = s->c_mu * s->weight[k];
        if (w < 0) w *= (double)n / dot__vector_dot(&s->v, z, z);       /* z = C^-1/2 y */
        for (int64_t i = 0; i < n; ++i)
            for (int64_t j = 0; j <= i; ++j) s->c[i * n + j] += w * y[i] * y[j];
    }
    for (int64_t i = 0; i < n; ++i)
        for (int64_t j = 0; j < i; ++j) s->c[j * n + i] = s->c[i * n + j];
}

double dot_cmaes_step(dot_cmaes *s, dot_loss_function loss, void *user)
{
    if (!s || !dot__solver_ready(&s->v, "dot_cmaes_step", loss != NULL)) return (double)NAN;
    double best_loss = s->best_loss;
    if (!dot__cmaes_sample(s, loss, user)) {
        s->best_loss = best_loss;
        dot__flat_set(&s->v, s->mean);
        return (double)NAN;
    }
    if (s->loss[s->rank[s->parents - 1]] < (double)INFINITY) {
        dot__cmaes_covariance(s, dot__cmaes_move(s));
        if (s->generation + 1 - s->decomposed >= s->decompose_every) dot__cmaes_decompose(s);
    } else {
        s->sigma /= 2;
    }
    s->generation++;
    dot__flat_set(&s->v, s->mean);
    return s->loss[s->rank[0]];
}

/* ---- SPSA ---- */

struct dot_spsa {
    dot__flat v;
    dot_spsa_options o;
    uint64_t seed, k;
    double *x, *delta, *moved;
};

dot_spsa_options dot_spsa_defaults(void)
{
    dot_spsa_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_SPSA;
    o.a = 0.16;
    o.c = 0.3;
    o.stability = 100;
    o.alpha = 0.602;
    o.gamma = 0.101;
    return o;
}

dot_spsa *dot_spsa_create(dot_context *ctx, dot_layer *layer, const dot_spsa_options *options)
{
    dot_spsa_options o = options ? *options : dot_spsa_defaults();
    const char *f = "dot_spsa_create";
    if (!dot__solver_creatable(ctx, layer, f, o.magic, DOT__MAGIC_SPSA) || !dot__option_ok(ctx, f, "a", o.a, 0, 1e30, false)
        || !dot__option_ok(ctx, f, "c", o.c, 1e-300, 1e30, false)
        || !dot__option_ok(ctx, f, "stability", o.stability, 0, 1e30, false)
        || !dot__option_ok(ctx, f, "alpha", o.alpha, 0, 1e3, false)
        || !dot__option_ok(ctx, f, "gamma", o.gamma, 0, 1e3, false)) return NULL;
    dot_spsa *s = (dot_spsa *)dot__new(ctx, sizeof *s);
    if (!s || !dot__flat_open(&s->v, ctx, layer) || !(s->x = dot__flat_new(&s->v, 1)) || !(s->delta = dot__flat_new(&s->v, 1))
        || !(s->moved = dot__flat_new(&s->v, 1))) return NULL;
    s->o = o;
    s->seed = ctx->lane_seeds[0] + o.seed * UINT64_C(0x9E3779B97F4A7C15);
    return s;
}

/* theta = x + c delta */
static void dot__spsa_move(dot_spsa *s, double c)
{
    for (int64_t i = 0; i < s->v.n; ++i) s->moved[i] = s->x[i] + c * s->delta[i];
    dot__flat_set(&s->v, s->moved);
}

double dot_spsa_step(dot_spsa *s, dot_loss_function loss, void *user)
{
    if (!s || !dot__solver_ready(&s->v, "dot_spsa_step", loss != NULL)) return (double)NAN;
    double k = (double)s->k, above, below;
    double a = s->o.a / pow(k + 1 + s->o.stability, s->o.alpha), c = s->o.c / pow(k + 1, s->o.gamma);
    dot__flat_get(&s->v, s->x);
    for (int64_t i = 0; i < s->v.n; ++i)
        s->delta[i] = dot_random_uniform(s->seed, DOT__STREAM_SOLVER + s->k, (uint64_t)i) < 0.5 ? -1 : 1;
    dot__spsa_move(s, c);
    bool good = dot__evaluate(&s->v, "dot_spsa_step", loss(user), &above, NULL);
    if (good) dot__spsa_move(s, -c);
    if (!good || !dot__evaluate(&s->v, "dot_spsa_step", loss(user), &below, NULL)) {
        dot__flat_set(&s->v, s->x);
        return (double)NAN;
    }
    double slope = (above - below) / (2 * c);
    dot__spsa_move(s, dot__finite(slope) ? -a * slope : 0);             /* 1 / delta = delta */
    s->k++;
    return (above + below) / 2;
}

/* ---- SVRG ---- */

struct dot_svrg {
    dot__flat v;
    dot_svrg_options o;
    uint64_t seed, snapshots;
    double *snapshot, *full, *x, *g, *g_snapshot;
};

dot_svrg_options dot_svrg_defaults(void)
{
    dot_svrg_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_SVRG;
    o.lr = 1e-2;
    o.batches = 1;
    return o;
}

dot_svrg *dot_svrg_create(dot_context *ctx, dot_layer *layer, const dot_svrg_options *options)
{
    dot_svrg_options o = options ? *options : dot_svrg_defaults();
    const char *f = "dot_svrg_create";
    if (!dot__solver_creatable(ctx, layer, f, o.magic, DOT__MAGIC_SVRG) || !dot__option_ok(ctx, f, "lr", o.lr, 0, 1e30, false)
        || !dot__option_ok(ctx, f, "batches", (double)o.batches, 1, 1e15, false)
        || !dot__option_ok(ctx, f, "inner", (double)o.inner, 0, 1e15, false)) return NULL;
    dot_svrg *s = (dot_svrg *)dot__new(ctx, sizeof *s);
    if (!s || !dot__flat_open(&s->v, ctx, layer)) return NULL;
    double **vectors[] = { &s->snapshot, &s->full, &s->x, &s->g, &s->g_snapshot };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; ++i)
        if (!(*vectors[i] = dot__flat_new(&s->v, 1))) return NULL;
    s->o = o;
    if (s->o.inner == 0) s->o.inner = 2 * o.batches;
    s->seed = ctx->lane_seeds[0] + o.seed * UINT64_C(0x9E3779B97F4A7C15);
    return s;
}

/* One inner update of x. False after an error, and when a gradient is not finite. */
static bool dot__svrg_update(dot_svrg *s, dot_indexed_function batch, void *user, int64_t j)
{
    const dot__flat *v = &s->v;
    int64_t i = (int64_t)(dot_random_uniform(s->seed, DOT__STREAM_SOLVER + s->snapshots, (uint64_t)j) * (double)s->o.batches);
    double value;
    dot__flat_set(v, s->snapshot);
    if (!dot__evaluate(v, "dot_svrg_step", batch(user, i), &value, s->g_snapshot)) return false;
    dot__flat_set(v, s->x);
    if (!dot__evaluate(v, "dot_svrg_step", batch(user, i), &value, s->g)) return false;
    for (int64_t k = 0; k < v->n; ++k) s->g[k] += s->full[k] - s->g_snapshot[k];
    if (!dot__finite(dot__vector_sum(v, s->g))) return false;
    dot__vector_add(v, s->x, -s->o.lr, s->g);
    return true;
}

double dot_svrg_step(dot_svrg *s, dot_loss_function loss, dot_indexed_function batch, void *user)
{
    if (!s || !dot__solver_ready(&s->v, "dot_svrg_step", loss && batch)) return (double)NAN;
    double first = (double)NAN;
    dot__flat_get(&s->v, s->snapshot);
    memcpy(s->x, s->snapshot, (size_t)s->v.n * sizeof(double));
    bool good = dot__evaluate(&s->v, "dot_svrg_step", loss(user), &first, s->full);
    for (int64_t j = 0; good && j < s->o.inner; ++j) good = dot__svrg_update(s, batch, user, j);
    dot__flat_set(&s->v, good ? s->x : s->snapshot);
    if (!dot_ok(s->v.ctx)) return (double)NAN;
    s->snapshots++;
    return first;
}

/* ---- natural gradient ---- */

struct dot_natural {
    dot__flat v;
    dot_natural_options o;
    int64_t rows;                           /* of G: examples, times outputs for Gauss-Newton */
    double *x, *g, *row, *direction;        /* theta, gradient, one row of G, (F + damping I)^-1 g */
    double *gradients;                      /* G [rows][n]; diagonal: the sums of its squares [n] */
    double *product;                        /* CG: G v [rows] */
    double *residual, *conjugate, *image;   /* CG */
    double *matrix;                         /* dense: F + damping I, then its Cholesky factor, [n][n], lower */
    int64_t column;                         /* of the factor, which is being computed */
};

dot_natural_options dot_natural_defaults(void)
{
    dot_natural_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_NATURAL;
    o.fisher = DOT_FISHER_EMPIRICAL;
    o.method = DOT_NATURAL_DENSE;
    o.lr = o.scale = 1;
    o.outputs = 1;
    o.cg_iterations = 250;
    o.cg_tolerance = 1e-10;
    return o;
}

static bool dot__natural_options_ok(dot_context *ctx, const dot_natural_options *o)
{
    const char *f = "dot_natural_create";
    return dot__option_ok(ctx, f, "fisher", (double)o->fisher, DOT_FISHER_EMPIRICAL, DOT_FISHER_GAUSS_NEWTON, false)
        && dot__option_ok(ctx, f, "method", (double)o->method, DOT_NATURAL_DENSE, DOT_NATURAL_DIAGONAL, false)
        && dot__option_ok(ctx, f, "lr", o->lr, 0, 1e30, false)
        && dot__option_ok(ctx, f, "damping", o->damping, 1e-300, 1e30, false)
        && dot__option_ok(ctx, f, "scale", o->scale, 0, 1e30, false)
        && dot__option_ok(ctx, f, "examples", (double)o->examples, 1, 1e9, false)
        && dot__option_ok(ctx, f, "outputs", (double)o->outputs, 1, o->fisher == DOT_FISHER_GAUSS_NEWTON ? 1e9 : 1, false)
        && dot__option_ok(ctx, f, "cg_iterations", o->cg_iterations, 1, 1e9, false)
        && dot__option_ok(ctx, f, "cg_tolerance", o->cg_tolerance, 0, 1, false);
}

dot_natural *dot_natural_create(dot_context *ctx, dot_layer *layer, const dot_natural_options *options)
{
    dot_natural_options o = options ? *options : dot_natural_defaults();
    const char *f = "dot_natural_create";
    if (!dot__solver_creatable(ctx, layer, f, o.magic, DOT__MAGIC_NATURAL) || !dot__natural_options_ok(ctx, &o)) return NULL;
    dot_natural *s = (dot_natural *)dot__new(ctx, sizeof *s);
    if (!s || !dot__flat_open(&s->v, ctx, layer)) return NULL;
    bool dense = o.method == DOT_NATURAL_DENSE, cg = o.method == DOT_NATURAL_CG;
    if (dense && !dot__option_ok(ctx, f, "the number of trainable parameters", (double)s->v.n, 1, 8192, false)) return NULL;
    s->o = o;
    s->rows = o.examples * o.outputs;
    double **vectors[] = { &s->x, &s->g, &s->row, &s->direction, &s->residual, &s->conjugate, &s->image };
    for (int i = 0; i < (cg ? 7 : 4); ++i)
        if (!(*vectors[i] = dot__flat_new(&s->v, 1))) return NULL;
    if (!(s->gradients = dot__flat_new(&s->v, dense || cg ? s->rows : 1)) || (dense && !(s->matrix = dot__flat_new(&s->v, s->v.n)))
        || (cg && !(s->product = (double *)dot__new(ctx, (size_t)s->rows * sizeof(double))))) return NULL;
    return s;
}

/* ---- F + damping I and its Cholesky factor, by blocks of rows ---- */

#define DOT__NATURAL_BLOCK 16

static void dot__natural_matrix_piece(void *argument, int lane, int64_t piece)
{
    const dot_natural *s = (const dot_natural *)argument;
    int64_t n = s->v.n, rows, first = dot__part(n, piece, DOT__NATURAL_BLOCK, &rows);
    double scale = s->o.scale / (double)s->o.examples;
    (void)lane;
    for (int64_t i = first; i < first + rows; ++i)
        for (int64_t j = 0; j <= i; ++j) s->matrix[i * n + j] = i == j ? s->o.damping : 0;
    for (int64_t r = 0; r < s->rows; ++r) {
        const double *g = s->gradients + r * n;
        for (int64_t i = first; i < first + rows; ++i) {
            double a = scale * g[i], *out = s->matrix + i * n;
            for (int64_t j = 0; j <= i; ++j) out[j] += a * g[j];
        }
    }
}

static double dot__natural_remainder(const dot_natural *s, int64_t i, int64_t j)   /* a_ij - sum over k < j of l_ik l_jk */
{
    const double *a = s->matrix + i * s->v.n, *b = s->matrix + j * s->v.n;
    double sum[4] = { 0, 0, 0, 0 };
    for (int64_t k = 0; k < j; ++k) sum[k & 3] += a[k] * b[k];
    return a[j] - (sum[0] + sum[1] + sum[2] + sum[3]);
}

static void dot__natural_column_piece(void *argument, int lane, int64_t piece)
{
    const dot_natural *s = (const dot_natural *)argument;
    int64_t n = s->v.n, j = s->column, rows, i = j + 1 + dot__part(n - j - 1, piece, DOT__NATURAL_BLOCK, &rows);
    double pivot = s->matrix[j * n + j];
    (void)lane;
    for (rows += i; i < rows; ++i) s->matrix[i * n + j] = dot__natural_remainder(s, i, j) / pivot;
}

static bool dot__natural_cholesky(dot_natural *s)
{
    int64_t n = s->v.n;
    for (int64_t j = 0; j < n; ++j) {
        double square = dot__natural_remainder(s, j, j);
        if (!(square > 0)) {
            dot__fail(s->v.ctx, DOT_ERROR_ARGUMENT, "dot_natural_step: damping %g is lost in rounding beside F: pivot " DOT__I64
                      " is %g", s->o.damping, DOT__LL(j), square);
            return false;
        }
        s->matrix[j * n + j] = sqrt(square);
        s->column = j;
        dot__parallel(s->v.ctx, false, dot__ceil_div(n - j - 1, DOT__NATURAL_BLOCK), dot__natural_column_piece, s);
    }
    return true;
}

static bool dot__natural_dense(dot_natural *s)
{
    int64_t n = s->v.n;
    double *d = s->direction;
    dot__parallel(s->v.ctx, false, dot__ceil_div(n, DOT__NATURAL_BLOCK), dot__natural_matrix_piece, s);
    if (!dot__natural_cholesky(s)) return false;
    for (int64_t i = 0; i < n; ++i) {
        d[i] = s->g[i];
        for (int64_t k = 0; k < i; ++k) d[i] -= s->matrix[i * n + k] * d[k];
        d[i] /= s->matrix[i * n + i];
    }
    for (int64_t i = n; i-- > 0;) {
        d[i] /= s->matrix[i * n + i];
        for (int64_t k = 0; k < i; ++k) d[k] -= s->matrix[i * n + k] * d[i];
    }
    return true;
}

/* ---- conjugate gradients ---- */

static void dot__natural_product_piece(void *argument, int lane, int64_t r)
{
    const dot_natural *s = (const dot_natural *)argument;
    const double *g = s->gradients + r * s->v.n;
    double sum[4] = { 0, 0, 0, 0 };
    (void)lane;
    for (int64_t j = 0; j < s->v.n; ++j) sum[j & 3] += g[j] * s->conjugate[j];
    s->product[r] = (sum[0] + sum[1] + sum[2] + sum[3]) * s->o.scale / (double)s->o.examples;
}

static void dot__natural_image_piece(void *argument, int lane, int64_t piece)
{
    const dot_natural *s = (const dot_natural *)argument;
    int64_t n, first = dot__part(s->v.n, piece, 1024, &n);
    (void)lane;
    for (int64_t j = first; j < first + n; ++j) s->image[j] = s->o.damping * s->conjugate[j];
    for (int64_t r = 0; r < s->rows; ++r) {
        const double *g = s->gradients + r * s->v.n;
        for (int64_t j = first; j < first + n; ++j) s->image[j] += s->product[r] * g[j];
    }
}

/* (Hestenes, Stiefel 1952) */
static void dot__natural_cg(dot_natural *s)
{
    const dot__flat *v = &s->v;
    memset(s->direction, 0, (size_t)v->n * sizeof(double));
    memcpy(s->residual, s->g, (size_t)v->n * sizeof(double));
    memcpy(s->conjugate, s->g, (size_t)v->n * sizeof(double));
    double square = dot__vector_dot(v, s->residual, s->residual), enough = s->o.cg_tolerance * s->o.cg_tolerance * square;
    for (int i = 0; i < s->o.cg_iterations && square > enough; ++i) {
        dot__parallel(v->ctx, false, s->rows, dot__natural_product_piece, s);
        dot__parallel(v->ctx, false, dot__ceil_div(v->n, 1024), dot__natural_image_piece, s);
        double a = square / dot__vector_dot(v, s->conjugate, s->image), before = square;
        dot__vector_add(v, s->direction, a, s->conjugate);
        dot__vector_add(v, s->residual, -a, s->image);
        square = dot__vector_dot(v, s->residual, s->residual);
        dot__vector_scale(v, s->conjugate, square / before, s->conjugate);
        dot__vector_add(v, s->conjugate, 1, s->residual);
    }
}

/* ---- the rows of G, and the step ---- */

/* Takes s->row in. False when it is not finite. */
static bool dot__natural_take(dot_natural *s, int64_t r)
{
    if (!dot__finite(dot__vector_sum(&s->v, s->row))) return false;
    if (s->o.method == DOT_NATURAL_DIAGONAL)
        for (int64_t j = 0; j < s->v.n; ++j) s->gradients[j] += s->row[j] * s->row[j];
    else memcpy(s->gradients + r * s->v.n, s->row, (size_t)s->v.n * sizeof(double));
    return true;
}

/* All rows; without a loss of its own also the mean loss and its gradient. False after an error, or if one is not finite. */
static bool dot__natural_rows(dot_natural *s, dot_indexed_function example, void *user, bool mean, double *loss)
{
    const char *f = "dot_natural_step";
    int64_t outputs = s->o.outputs, all = -1;
    double value;
    if (s->o.method == DOT_NATURAL_DIAGONAL) memset(s->gradients, 0, (size_t)s->v.n * sizeof(double));
    for (int64_t i = 0; i < s->o.examples; ++i) {
        dot_tensor *t = example(user, i);
        if (s->o.fisher == DOT_FISHER_GAUSS_NEWTON) {
            if (t && t->size != outputs)
                dot__fail(s->v.ctx, DOT_ERROR_SHAPE, "%s: the output of example " DOT__I64 " is %s, expected " DOT__I64
                          " elements", f, DOT__LL(i), DOT__SHAPE(t), DOT__LL(outputs));
            t = dot_reshape(t, 1, &all);
        }
        for (int64_t k = 0; k < outputs; ++k) {
            dot_tensor *one = s->o.fisher == DOT_FISHER_GAUSS_NEWTON ? dot_slice(t, 0, k, k + 1) : t;
            if (!dot__evaluate(&s->v, f, one, &value, s->row) || !dot__natural_take(s, i * outputs + k)) return false;
            if (!mean) continue;
            *loss += value / (double)s->o.examples;
            dot__vector_add(&s->v, s->g, 1 / (double)s->o.examples, s->row);
        }
    }
    return true;
}

double dot_natural_step(dot_natural *s, dot_loss_function loss, dot_indexed_function example, void *user)
{
    bool mean = s && !loss && s->o.fisher == DOT_FISHER_EMPIRICAL;
    if (!s || !dot__solver_ready(&s->v, "dot_natural_step", example && (loss || mean))) return (double)NAN;
    const dot__flat *v = &s->v;
    double value = 0;
    dot__flat_get(v, s->x);
    memset(s->g, 0, (size_t)v->n * sizeof(double));
    bool good = (mean || dot__evaluate(v, "dot_natural_step", loss(user), &value, s->g))
        && dot__natural_rows(s, example, user, mean, &value) && dot__finite(dot__vector_sum(v, s->g));
    if (good && s->o.method == DOT_NATURAL_DENSE) good = dot__natural_dense(s);
    if (good && s->o.method == DOT_NATURAL_CG) dot__natural_cg(s);
    for (int64_t j = 0; good && s->o.method == DOT_NATURAL_DIAGONAL && j < v->n; ++j)
        s->direction[j] = s->g[j] / (s->gradients[j] * s->o.scale / (double)s->o.examples + s->o.damping);
    if (good && dot__finite(dot__vector_sum(v, s->direction))) {
        dot__vector_add(v, s->x, -s->o.lr, s->direction);
        dot__flat_set(v, s->x);
    }
    dot_zero_grad(v->layer);
    return dot_ok(v->ctx) ? value : (double)NAN;
}

/* ---- K-FAC ---- */

/* One layer: the stored weight is [in, out], a convolution's in being [kernel..., channels], and the bias is one more row, so that the
   gradient is `gradient` [in][out]. */
typedef struct dot__kfac_layer {
    dot_layer *layer;
    dot_tensor *(*forward)(dot_layer *layer, dot_tensor *x, dot_activation act);    /* its own */
    dot_tensor *x, *y;                      /* of the training step `step_id`, in which it was used `uses` times */
    uint64_t step_id;
    int uses;
    int64_t in, out;                        /* in: with the bias */
    int64_t weight, bias;                   /* places in theta; bias -1: none */
    double *factor[2], *fresh[2];           /* A [in][in], G [out][out]; the sums of the present statistics, and scratch */
    double scale[2];                        /* makes means of those sums */
    double *vectors[2], *values[2];         /* their eigenvectors, as rows, and eigenvalues */
    double *gradient, *product;
} dot__kfac_layer;

struct dot_kfac {
    dot__flat v;
    dot_kfac_options o;
    int layers;
    dot__kfac_layer *layer;
    int64_t steps;
    double *x, *g, *direction, *momentum;
};

dot_kfac_options dot_kfac_defaults(void)
{
    dot_kfac_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_KFAC;
    o.fisher = DOT_FISHER_SAMPLED;
    o.lr = o.damping = o.kl_clip = 1e-3;
    o.momentum = 0.9;
    o.decay = 0.95;
    o.statistics_every = 10;
    o.inverse_every = 100;
    return o;
}

/* What a layer under K-FAC does: the same, with the activation as an operation of its own, so that y comes before it. */
static dot_tensor *dot__kfac_forward(dot_layer *l, dot_tensor *x, dot_activation act)
{
    dot__kfac_layer *k = (dot__kfac_layer *)l->user;
    dot_context *ctx = l->ctx;
    dot_tensor *y = k->forward(l, x, DOT_NONE);
    if (ctx->training) {
        k->uses = k->step_id == ctx->step_id ? k->uses + 1 : 1;
        k->step_id = ctx->step_id;
        k->x = x;
        k->y = dot_retain_grad(y);
    }
    return act == DOT_RELU ? dot_relu(y) : act == DOT_SIGMOID ? dot_sigmoid(y) : act == DOT_TANH ? dot_tanh(y) : y;
}

/* Counts the layers that K-FAC takes and that train, and enters them where `s->layer` is there. */
static void dot__kfac_find(dot_kfac *s, dot_layer *l)
{
    bool known = l->forward == dot__linear_forward || (l->forward == dot__conv_forward && !l->transposed && l->conv.groups == 1);
    if (known && l->weight->requires_grad && (!l->bias || l->bias->requires_grad)) {
        if (s->layer) s->layer[s->layers].layer = l;
        s->layers++;
    }
    for (dot_layer *child = l->children; child; child = child->next) dot__kfac_find(s, child);
}

static int64_t dot__flat_place(const dot__flat *v, const dot_tensor *t)
{
    int64_t place = 0;
    for (int k = 0; k < v->tensors; place += v->tensor[k++]->size)
        if (v->tensor[k] == t) return place;
    return -1;
}

static bool dot__kfac_layer_open(dot_kfac *s, dot__kfac_layer *k)
{
    dot_context *ctx = s->v.ctx;
    k->forward = k->layer->forward;
    k->out = k->layer->out;
    k->in = k->layer->weight->size / k->out + (k->layer->bias ? 1 : 0);
    k->weight = dot__flat_place(&s->v, k->layer->weight);
    k->bias = dot__flat_place(&s->v, k->layer->bias);
    int64_t size[2] = { k->in, k->out };
    for (int f = 0; f < 2; ++f) {
        if (!dot__option_ok(ctx, "dot_kfac_create", "a layer's size, with the bias,", (double)size[f], 1, 4096, false))
            return false;
        size_t bytes = (size_t)(size[f] * size[f]) * sizeof(double);
        if (!(k->factor[f] = (double *)dot__new(ctx, bytes)) || !(k->fresh[f] = (double *)dot__new(ctx, bytes))
            || !(k->vectors[f] = (double *)dot__new(ctx, bytes))
            || !(k->values[f] = (double *)dot__new(ctx, (size_t)size[f] * sizeof(double)))) return false;
        for (int64_t i = 0; i < size[f]; ++i) k->factor[f][i * size[f] + i] = 1;
    }
    size_t bytes = (size_t)(k->in * k->out) * sizeof(double);
    return (k->gradient = (double *)dot__new(ctx, bytes)) && (k->product = (double *)dot__new(ctx, bytes));
}

static bool dot__kfac_options_ok(dot_context *ctx, const dot_kfac_options *o)
{
    const char *f = "dot_kfac_create";
    return dot__option_ok(ctx, f, "fisher", (double)o->fisher, DOT_FISHER_EMPIRICAL, DOT_FISHER_GAUSS_NEWTON, false)
        && dot__option_ok(ctx, f, "lr", o->lr, 0, 1e30, false) && dot__option_ok(ctx, f, "momentum", o->momentum, 0, 1, true)
        && dot__option_ok(ctx, f, "decay", o->decay, 0, 1, true)
        && dot__option_ok(ctx, f, "damping", o->damping, 1e-300, 1e30, false)
        && dot__option_ok(ctx, f, "tikhonov", (double)o->tikhonov, DOT_TIKHONOV_EXACT, DOT_TIKHONOV_FACTORED, false)
        && dot__option_ok(ctx, f, "kl_clip", o->kl_clip, 0, 1e300, false)
        && dot__option_ok(ctx, f, "statistics_every", o->statistics_every, 1, 1e9, false)
        && dot__option_ok(ctx, f, "inverse_every", o->inverse_every, 1, 1e9, false);
}

dot_kfac *dot_kfac_create(dot_context *ctx, dot_layer *layer, const dot_kfac_options *options)
{
    dot_kfac_options o = options ? *options : dot_kfac_defaults();
    if (!dot__solver_creatable(ctx, layer, "dot_kfac_create", o.magic, DOT__MAGIC_KFAC)
        || !dot__kfac_options_ok(ctx, &o)) return NULL;
    dot_kfac *s = (dot_kfac *)dot__new(ctx, sizeof *s);
    if (!s || !dot__flat_open(&s->v, ctx, layer)) return NULL;
    s->o = o;
    dot__kfac_find(s, layer);
    if (s->layers == 0) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_kfac_create: 0 linear or convolution layers that train under no other K-FAC, "
                  "expected 1 or more");
        return NULL;
    }
    s->layer = (dot__kfac_layer *)dot__new(ctx, (size_t)s->layers * sizeof *s->layer);
    if (!s->layer) return NULL;
    s->layers = 0;
    dot__kfac_find(s, layer);
    double **vectors[] = { &s->x, &s->g, &s->direction, &s->momentum };
    for (size_t i = 0; i < sizeof vectors / sizeof vectors[0]; ++i)
        if (!(*vectors[i] = dot__flat_new(&s->v, 1))) return NULL;
    for (int i = 0; i < s->layers; ++i)
        if (!dot__kfac_layer_open(s, &s->layer[i])) return NULL;
    for (int i = 0; i < s->layers; ++i) {
        s->layer[i].layer->user = &s->layer[i];
        s->layer[i].layer->forward = dot__kfac_forward;
    }
    return s;
}

/* Some doubles as the products of matrices want them. */
static dot_tensor dot__kfac_matrix(dot_context *ctx, double *data)
{
    dot_tensor t;
    memset(&t, 0, sizeof t);
    t.ctx = ctx;
    t.dtype = DOT_F64;
    t.data = (char *)data;
    return t;
}

/* C [m, n] = A [m, k] B; B is [k, n], or [n, k] if transposed. */
static bool dot__kfac_product(dot_context *ctx, double *c, double *a, double *b, bool transposed, int64_t m, int64_t k, int64_t n)
{
    dot_tensor tc = dot__kfac_matrix(ctx, c), ta = dot__kfac_matrix(ctx, a), tb = dot__kfac_matrix(ctx, b);
    return dot__matrix_product(ctx, &ta, &tb, transposed, NULL, &tc, 1, m, k, n, DOT_NONE, false);
}

/* C [k, n] (+)= A [m, k] transposed times B [m, n]. */
static bool dot__kfac_outer(dot_context *ctx, double *c, double *a, double *b, int64_t m, int64_t k, int64_t n, bool accumulate)
{
    dot_tensor tc = dot__kfac_matrix(ctx, c), ta = dot__kfac_matrix(ctx, a), tb = dot__kfac_matrix(ctx, b);
    return dot__matrix_outer(ctx, &ta, &tb, &tc, 1, m, k, n, accumulate);
}

/* Rows of a tensor, those of an image being its patches: to r, [row][tap][k], with a 1 where there is one more column. */
typedef struct dot__kfac_rows {
    dot__rows rows;
    const dot_tensor *t;
    int64_t depth, columns, first, count;
    double *r;
} dot__kfac_rows;

static void dot__kfac_rows_piece(void *argument, int lane, int64_t piece)
{
    const dot__kfac_rows *job = (const dot__kfac_rows *)argument;
    int64_t count, i = dot__part(job->count, piece, 32, &count);
    int taps = dot__tap_count(&job->rows);
    dot__position at = dot__position_of(&job->rows, job->first + i);
    const void *data = dot__at(job->t, 0);
    (void)lane;
    for (count += i; i < count; ++i) {
        double *r = job->r + i * job->columns;
        for (int tap = 0; tap < taps; ++tap) {
            dot__tap_run t = dot__tap_of(&job->rows, &at, tap);
            bool outside = t.outside || *t.z < 0;
            for (int64_t c = 0; c < job->depth; ++c) *r++ = outside ? 0 : dot__load(data, job->t->dtype, t.line + *t.z + c);
        }
        if (r < job->r + (i + 1) * job->columns) *r = 1;
        dot__position_next(&job->rows, &at);
    }
}

/* sum [columns][columns] += R'R, R being all rows; about a megabyte of them at a time. */
static bool dot__kfac_gather(dot_context *ctx, dot__kfac_rows *job, double *sum)
{
    int64_t rows = job->rows.images * dot__positions(&job->rows), chunk = dot__max(64, ((int64_t)1 << 17) / job->columns);
    bool ok = true;
    for (job->first = 0; job->first < rows && ok; job->first += chunk) {
        dot__mark mark = dot__scratch_begin(ctx);
        job->count = dot__min(chunk, rows - job->first);
        job->r = (double *)dot__step_alloc(ctx, (size_t)(job->count * job->columns) * sizeof(double));
        if (!job->r) return false;
        dot__parallel(ctx, false, dot__ceil_div(job->count, 32), dot__kfac_rows_piece, job);
        ok = dot__kfac_outer(ctx, sum, job->r, job->r, job->count, job->columns, job->columns, true);
        dot__scratch_end(ctx, mark);
    }
    return ok;
}

/* What one backward pass has left at a layer, into its fresh factors; the inputs if it is the first pass. mean: the pass began at the
   mean over the N rows or images, so that their own gradients are N times those that are there. */
static bool dot__kfac_enter(dot__kfac_layer *k, bool first, bool mean)
{
    dot_layer *l = k->layer;
    dot_context *ctx = l->ctx;
    dot__mark mark = dot__scratch_begin(ctx);
    dot__geometry geometry;
    dot__kfac_rows in, out;
    memset(&in, 0, sizeof in);
    in.t = k->x;
    in.depth = l->in;
    in.columns = k->in;
    if (k->forward == dot__linear_forward) dot__matrix_rows(&in.rows, k->x->size / l->in, l->in, l->in);
    else if (!dot__geometry_of("dot_kfac_step", k->x, l->weight, &l->conv, false, &geometry)
             || !dot__rows_of_grid(ctx, &geometry, &in.rows)) return false;
    int64_t images = in.rows.images, positions = dot__positions(&in.rows);
    k->scale[0] = 1 / (double)images;
    k->scale[1] = (mean ? (double)images : 1 / (double)images) / (double)positions;
    memset(&out, 0, sizeof out);
    out.t = dot__has_grad(k->y) ? k->y->grad : NULL;
    out.depth = out.columns = k->out;
    dot__matrix_rows(&out.rows, images * positions, k->out, k->out);
    bool ok = (!first || dot__kfac_gather(ctx, &in, k->fresh[0])) && (!out.t || dot__kfac_gather(ctx, &out, k->fresh[1]));
    dot__scratch_end(ctx, mark);
    return ok;
}

/* One backward pass from `from`, into the fresh factors. */
static bool dot__kfac_pass(dot_kfac *s, dot_tensor *from, bool first, bool mean)
{
    dot_context *ctx = s->v.ctx;
    double value;
    if (!dot__evaluate(&s->v, "dot_kfac_step", from, &value, s->g)) return false;
    for (int i = 0; i < s->layers; ++i) {
        dot__kfac_layer *k = &s->layer[i];
        if (k->step_id != ctx->step_id || k->uses != 1) {
            dot__fail(ctx, DOT_ERROR_STATE, "dot_kfac_step: %s layer %d of those under K-FAC is used %d times in a step, "
                      "expected once", k->layer->kind, i, k->step_id == ctx->step_id ? k->uses : 0);
            return false;
        }
        if (!dot__kfac_enter(k, first, mean)) return false;
    }
    return true;
}

static void dot__kfac_average(dot_kfac *s, dot__kfac_layer *k)
{
    int64_t size[2] = { k->in, k->out };
    double sum = 0;
    for (int f = 0; f < 2; ++f)
        for (int64_t i = 0; i < size[f] * size[f]; ++i) sum += fabs(k->scale[f] * k->fresh[f][i]);
    for (int f = 0; f < 2 && dot__finite(sum); ++f)
        for (int64_t i = 0; i < size[f] * size[f]; ++i)
            k->factor[f][i] = s->o.decay * k->factor[f][i] + (1 - s->o.decay) * k->scale[f] * k->fresh[f][i];
}

static bool dot__kfac_statistics(dot_kfac *s, dot_tensor *t)
{
    dot_context *ctx = s->v.ctx;
    bool outputs = s->o.fisher == DOT_FISHER_GAUSS_NEWTON;
    for (int i = 0; i < s->layers; ++i) {
        memset(s->layer[i].fresh[0], 0, (size_t)(s->layer[i].in * s->layer[i].in) * sizeof(double));
        memset(s->layer[i].fresh[1], 0, (size_t)(s->layer[i].out * s->layer[i].out) * sizeof(double));
    }
    if (outputs && t && t->rank != 2)
        dot__fail(ctx, DOT_ERROR_SHAPE, "dot_kfac_step: the outputs are %s, expected [rows, outputs]", DOT__SHAPE(t));
    int64_t passes = outputs && t && t->rank == 2 ? t->shape[1] : 1;
    for (int64_t j = 0; j < passes; ++j) {
        dot_tensor *from = outputs ? dot_sum(dot_slice(t, 1, j, j + 1), DOT_ALL_AXES, false) : t;
        if (!dot__kfac_pass(s, from, j == 0, !outputs)) return false;
    }
    for (int i = 0; i < s->layers; ++i) dot__kfac_average(s, &s->layer[i]);
    return true;
}

/* Eigenvectors of one factor of one layer; eigenvalues that are rounding count as 0. */
static void dot__kfac_eigen_piece(void *argument, int lane, int64_t piece)
{
    dot_kfac *s = (dot_kfac *)argument;
    dot__kfac_layer *k = &s->layer[piece / 2];
    int64_t f = piece % 2, n = f ? k->out : k->in;
    (void)lane;
    memcpy(k->fresh[f], k->factor[f], (size_t)(n * n) * sizeof(double));
    dot__symmetric_eigen(k->fresh[f], k->vectors[f], k->values[f], n);
    for (int64_t i = 0; i < n; ++i)
        if (!(k->values[f][i] > 1e-10)) k->values[f][i] = 0;
}

/* The layer's part of the direction; *sum += its product with the gradient. */
static bool dot__kfac_direction(dot_kfac *s, dot__kfac_layer *k, double *sum)
{
    dot_context *ctx = s->v.ctx;
    double *m = k->gradient, *t = k->product, **vectors = k->vectors, mean[2] = { 0, 0 }, add[2] = { 0, 0 }, damping = s->o.damping;
    size_t weight = (size_t)k->layer->weight->size, bias = k->bias < 0 ? 0 : (size_t)k->out;
    int64_t in = k->in, out = k->out;
    if (s->o.tikhonov == DOT_TIKHONOV_FACTORED) {
        for (int64_t i = 0; i < in; ++i) mean[0] += k->values[0][i] / (double)in;
        for (int64_t j = 0; j < out; ++j) mean[1] += k->values[1][j] / (double)out;
        double square = mean[0] / mean[1], pi = square > 0 && dot__finite(square) ? sqrt(square) : 1;
        add[0] = pi * sqrt(damping);
        add[1] = sqrt(damping) / pi;
        damping = 0;
    }
    memcpy(m, s->g + k->weight, weight * sizeof(double));
    if (bias) memcpy(m + weight, s->g + k->bias, bias * sizeof(double));
    if (!dot__kfac_product(ctx, t, vectors[0], m, false, in, in, out)
        || !dot__kfac_product(ctx, m, t, vectors[1], true, in, out, out)) return false;
    for (int64_t i = 0; i < in; ++i)
        for (int64_t j = 0; j < out; ++j)
            m[i * out + j] /= (k->values[0][i] + add[0]) * (k->values[1][j] + add[1]) + damping;
    if (!dot__kfac_product(ctx, t, m, vectors[1], false, in, out, out)
        || !dot__kfac_outer(ctx, m, vectors[0], t, in, in, out, false)) return false;
    memcpy(s->direction + k->weight, m, weight * sizeof(double));
    if (bias) memcpy(s->direction + k->bias, m + weight, bias * sizeof(double));
    *sum += dot__product_of(m, s->g + k->weight, (int64_t)weight);
    if (bias) *sum += dot__product_of(m + weight, s->g + k->bias, (int64_t)bias);
    return true;
}

/* theta, from the gradient. */
static void dot__kfac_update(dot_kfac *s)
{
    const dot__flat *v = &s->v;
    double sum = 0;
    memcpy(s->direction, s->g, (size_t)v->n * sizeof(double));
    for (int i = 0; i < s->layers; ++i)
        if (!dot__kfac_direction(s, &s->layer[i], &sum)) return;
    double shrink = s->o.kl_clip > 0 && sum > 0 ? fmin(1, sqrt(s->o.kl_clip / (sum * s->o.lr * s->o.lr))) : 1;
    if (!dot__finite(dot__vector_sum(v, s->direction))) return;
    dot__vector_scale(v, s->momentum, s->o.momentum, s->momentum);
    for (int i = 0; i < s->layers; ++i) {
        const dot__kfac_layer *k = &s->layer[i];
        for (int64_t j = 0; j < k->layer->weight->size; ++j) s->direction[k->weight + j] *= shrink;
        for (int64_t j = 0; k->bias >= 0 && j < k->out; ++j) s->direction[k->bias + j] *= shrink;
    }
    dot__vector_add(v, s->momentum, 1, s->direction);
    dot__vector_add(v, s->x, -s->o.lr, s->momentum);
    dot__flat_set(v, s->x);
}

double dot_kfac_step(dot_kfac *s, dot_loss_function loss, dot_loss_function statistics, void *user)
{
    if (s && !statistics && s->o.fisher == DOT_FISHER_EMPIRICAL) statistics = loss;
    if (!s || !dot__solver_ready(&s->v, "dot_kfac_step", loss && statistics)) return (double)NAN;
    double value = (double)NAN;
    dot__flat_get(&s->v, s->x);
    bool good = s->steps % s->o.statistics_every != 0 || dot__kfac_statistics(s, statistics(user));
    if (good && s->steps % s->o.inverse_every == 0)
        dot__parallel(s->v.ctx, false, 2 * (int64_t)s->layers, dot__kfac_eigen_piece, s);
    good = good && dot__evaluate(&s->v, "dot_kfac_step", loss(user), &value, s->g);
    if (good && dot__finite(dot__vector_sum(&s->v, s->g))) dot__kfac_update(s);
    dot_zero_grad(s->v.layer);
    if (!dot_ok(s->v.ctx)) return (double)NAN;
    s->steps++;
    return value;
}

/* ==== [10 schedules] =============================================================================== */

#define DOT__MAGIC_PLATEAU 0xd07c0010u

#define DOT__SCHEDULE_NAME(constant, name, function, description, source, fields) name,
#define DOT__SCHEDULE_DESCRIPTION(constant, name, function, description, source, fields) description,
#define DOT__SCHEDULE_SOURCE(constant, name, function, description, source, fields) source,
#define DOT__SCHEDULE_FIELDS(constant, name, function, description, source, fields) fields,
const char *dot_schedule_name(dot_schedule_kind kind)
{
    static const char *const names[] = { DOT_SCHEDULES(DOT__SCHEDULE_NAME) };
    return (unsigned)kind < DOT_SCHEDULE_KINDS ? names[kind] : NULL;
}

const char *dot_schedule_description(dot_schedule_kind kind)
{
    static const char *const descriptions[] = { DOT_SCHEDULES(DOT__SCHEDULE_DESCRIPTION) };
    return (unsigned)kind < DOT_SCHEDULE_KINDS ? descriptions[kind] : NULL;
}

const char *dot_schedule_source(dot_schedule_kind kind)
{
    static const char *const sources[] = { DOT_SCHEDULES(DOT__SCHEDULE_SOURCE) };
    return (unsigned)kind < DOT_SCHEDULE_KINDS ? sources[kind] : NULL;
}

const char *dot_schedule_fields(dot_schedule_kind kind)
{
    static const char *const lists[] = { DOT_SCHEDULES(DOT__SCHEDULE_FIELDS) };
    return (unsigned)kind < DOT_SCHEDULE_KINDS ? lists[kind] : NULL;
}
#undef DOT__SCHEDULE_NAME
#undef DOT__SCHEDULE_DESCRIPTION
#undef DOT__SCHEDULE_SOURCE
#undef DOT__SCHEDULE_FIELDS

bool dot_schedule_find(const char *name, dot_schedule_kind *kind)
{
    for (int k = 0; name && kind && k < (int)DOT_SCHEDULE_KINDS; ++k)
        if (strcmp(name, dot_schedule_name((dot_schedule_kind)k)) == 0) {
            *kind = (dot_schedule_kind)k;
            return true;
        }
    return false;
}

/* ---- making schedules ---- */

/* Every field has a value that is valid for every kind. */
static dot_schedule dot__schedule(dot_schedule_kind kind, int64_t total, double floor_, double factor)
{
    dot_schedule s;
    memset(&s, 0, sizeof s);
    s.kind = kind;
    s.total = total;
    s.floor = floor_;
    s.factor = factor;
    s.peak = s.floor_base = s.decay = s.power = 1;
    s.scale = 1;
    s.peak_at = 0.3;
    s.div = 25;
    s.final_div = 1e4;
    s.momentum_low = 0.85;
    s.momentum_high = 0.95;
    s.tanh_from = -6;
    s.tanh_to = 3;
    return s;
}

dot_schedule dot_schedule_constant(void) { return dot__schedule(DOT_SCHEDULE_CONSTANT, 1, 0, 1); }
dot_schedule dot_schedule_step(int64_t every, double gamma) { return dot__schedule(DOT_SCHEDULE_STEP, every, 0, gamma); }
dot_schedule dot_schedule_exponential(double gamma) { return dot__schedule(DOT_SCHEDULE_EXPONENTIAL, 1, 0, gamma); }
dot_schedule dot_schedule_cosine(int64_t total, double floor) { return dot__schedule(DOT_SCHEDULE_COSINE, total, floor, 1); }
dot_schedule dot_schedule_rex(int64_t total, double floor) { return dot__schedule(DOT_SCHEDULE_REX, total, floor, 1); }
dot_schedule dot_schedule_tanh(int64_t total, double floor) { return dot__schedule(DOT_SCHEDULE_TANH, total, floor, 1); }

dot_schedule dot_schedule_constant_factor(int64_t total, double factor)
{
    return dot__schedule(DOT_SCHEDULE_FACTOR, total, 0, factor);
}

dot_schedule dot_schedule_warm_restarts(int64_t first, int factor, double floor)
{
    return dot__schedule(DOT_SCHEDULE_WARM_RESTARTS, first, floor, (double)factor);
}

dot_schedule dot_schedule_polynomial(int64_t total, double power, double floor)
{
    dot_schedule s = dot__schedule(DOT_SCHEDULE_POLYNOMIAL, total, floor, 1);
    s.power = power;
    return s;
}

/* From start to end along a slope. */
static dot_schedule dot__anneal(dot_schedule_kind kind, int64_t total, double start, double end, dot_slope slope)
{
    dot_schedule s = dot__schedule(kind, total, 0, 1);
    s.start = start;
    s.end = end;
    s.slopes[0] = slope;
    return s;
}

dot_schedule dot_schedule_linear(int64_t total, double start, double end)
{
    return dot__anneal(DOT_SCHEDULE_LINEAR, total, start, end, DOT_SLOPE_LINEAR);
}

dot_schedule dot_schedule_swa(int64_t total, double end, dot_slope slope)
{
    return dot__anneal(DOT_SCHEDULE_SWA, total, 1, end, slope);
}

dot_schedule dot_schedule_range_test(int64_t total, double start, double end)
{
    return dot__anneal(DOT_SCHEDULE_RANGE_TEST, total, start, end, DOT_SLOPE_LINEAR);
}

static dot_schedule dot__warmup(dot_schedule_kind kind, int64_t total, int64_t warmup, double floor_, int64_t scale)
{
    dot_schedule s = dot__schedule(kind, total, floor_, 1);
    s.warmup = warmup;
    s.scale = scale;
    return s;
}

dot_schedule dot_schedule_warmup_linear(int64_t total, int64_t warmup, double floor)
{
    return dot__warmup(DOT_SCHEDULE_WARMUP_LINEAR, total, warmup, floor, 1);
}

dot_schedule dot_schedule_warmup_cosine(int64_t total, int64_t warmup, double floor)
{
    return dot__warmup(DOT_SCHEDULE_WARMUP_COSINE, total, warmup, floor, 1);
}

dot_schedule dot_schedule_warmup_inverse_sqrt(int64_t warmup, int64_t timescale)
{
    return dot__warmup(DOT_SCHEDULE_WARMUP_SQRT, 1, warmup, 0, timescale);
}

dot_schedule dot_schedule_noam(int64_t warmup, int64_t width)
{
    return dot__warmup(DOT_SCHEDULE_NOAM, 1, warmup, 0, width);
}

dot_schedule dot_schedule_warmup_stable_decay(int64_t total, int64_t warmup, int64_t down, dot_slope slope)
{
    dot_schedule s = dot__warmup(DOT_SCHEDULE_WARMUP_STABLE, total, warmup, 0, 1);
    s.down = down;
    s.slopes[0] = slope;
    return s;
}

dot_schedule dot_schedule_one_cycle(int64_t total)
{
    dot_schedule s = dot__schedule(DOT_SCHEDULE_ONE_CYCLE, total, 0, 1);
    s.slopes[0] = s.slopes[1] = s.slopes[2] = DOT_SLOPE_COSINE;
    return s;
}

/* A sum that does not fit, or with something negative in it, ends as a total or down that is refused. */
dot_schedule dot_schedule_cyclic(int64_t up, int64_t down, double low)
{
    dot_schedule s = dot__schedule(DOT_SCHEDULE_CYCLIC, (int64_t)((uint64_t)up + (uint64_t)down), 0, 1);
    s.down = down;
    s.start = low;
    s.momentum_low = 0.8;
    s.momentum_high = 0.9;
    return s;
}

/* More milestones or parts than there is room for make an invalid schedule. */
static void dot__set_milestones(dot_schedule *s, const int64_t *milestones, int count)
{
    s->milestone_count = count > 0 && !milestones ? -1 : count;
    for (int i = 0; milestones && i < count && i < DOT_MAX_MILESTONES; ++i) s->milestones[i] = milestones[i];
}

static dot_schedule dot__combination(dot_schedule_kind kind, const dot_schedule *const *parts, int count)
{
    dot_schedule s = dot__schedule(kind, 1, 0, 1);
    s.part_count = parts ? count : 0;
    for (int i = 0; parts && i < count && i < DOT_MAX_PARTS; ++i) s.parts[i] = parts[i];
    return s;
}

dot_schedule dot_schedule_step_drop(const int64_t *milestones, int count, double gamma)
{
    dot_schedule s = dot__schedule(DOT_SCHEDULE_STEP_DROP, 1, 0, gamma);
    dot__set_milestones(&s, milestones, count);
    return s;
}

dot_schedule dot_schedule_product(const dot_schedule *const *parts, int count)
{
    return dot__combination(DOT_SCHEDULE_PRODUCT, parts, count);
}

dot_schedule dot_schedule_sequence(const dot_schedule *const *parts, const int64_t *boundaries, int count)
{
    dot_schedule s = dot__combination(DOT_SCHEDULE_SEQUENCE, parts, count);
    dot__set_milestones(&s, boundaries, count < 1 ? 0 : count - 1);
    return s;
}

/* ---- what is wrong with one ---- */

static DOT__PRINTF(3, 4) const char *dot__sentence(char *buffer, size_t size, const char *format, ...)
{
    if (!buffer || size == 0) return "invalid";
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, size, format, arguments);
    va_end(arguments);
    return buffer;
}

/* The values that a field of a struct may take. */
typedef struct dot__range { const char *name; size_t offset; bool whole; double low, high; const char *expected; } dot__range;

#define DOT__IS_POSITIVE false, DBL_MIN, DBL_MAX, "> 0"
#define DOT__IS_AT_LEAST_0 false, 0, DBL_MAX, ">= 0"
#define DOT__IS_0_TO_1 false, 0, 1, "0..1"
#define DOT__IS_BELOW_1 false, 0, 1 - DBL_EPSILON, "0 or more, below 1"
#define DOT__IS_FINITE false, -DBL_MAX, DBL_MAX, "a finite number"
#define DOT__IS_COUNT(low, expected) true, low, 9.3e18, expected

static double dot__range_value(const void *object, const dot__range *r)
{
    const char *field = (const char *)object + r->offset;
    return r->whole ? (double)*(const int64_t *)field : *(const double *)field;
}

static const char *dot__out_of_range(const void *object, const dot__range *ranges, int count, const char *name, char *buffer,
                                     size_t size)
{
    for (const dot__range *r = ranges; r < ranges + count; ++r) {
        const double value = dot__range_value(object, r);
        if (!(value >= r->low && value <= r->high))
            return dot__sentence(buffer, size, "%s: %s %.15g, expected %s", name, r->name, value, r->expected);
    }
    return NULL;
}

static bool dot__reads(dot_schedule_kind kind, const char *field)
{
    const char *list = dot_schedule_fields(kind);
    const size_t length = strlen(field);
    for (const char *at = list; (at = strstr(at, field)) != NULL; at += length)
        if ((at == list || at[-1] == ' ') && (at[length] == ' ' || at[length] == 0)) return true;
    return false;
}

/* A field that the schedule does not read must be as it was made: who sets it expects something of it. */
static const char *dot__schedule_fields_wrong(const dot_schedule *s, const char *name, char *buffer, size_t size)
{
#define DOT__RANGE(field, range) { #field, offsetof(dot_schedule, field), range }
    static const dot__range ranges[] = {
        DOT__RANGE(total, DOT__IS_COUNT(1, ">= 1")), DOT__RANGE(warmup, DOT__IS_COUNT(0, ">= 0")),
        DOT__RANGE(down, DOT__IS_COUNT(0, ">= 0")), DOT__RANGE(scale, DOT__IS_COUNT(1, ">= 1")),
        DOT__RANGE(floor, DOT__IS_AT_LEAST_0), DOT__RANGE(factor, DOT__IS_AT_LEAST_0), DOT__RANGE(start, DOT__IS_AT_LEAST_0),
        DOT__RANGE(end, DOT__IS_AT_LEAST_0), DOT__RANGE(peak, DOT__IS_AT_LEAST_0), DOT__RANGE(floor_base, DOT__IS_POSITIVE),
        DOT__RANGE(decay, DOT__IS_0_TO_1), DOT__RANGE(power, DOT__IS_POSITIVE), DOT__RANGE(peak_at, DOT__IS_0_TO_1),
        DOT__RANGE(div, DOT__IS_POSITIVE), DOT__RANGE(final_div, DOT__IS_POSITIVE), DOT__RANGE(momentum_low, DOT__IS_BELOW_1),
        DOT__RANGE(momentum_high, DOT__IS_BELOW_1), DOT__RANGE(tanh_from, DOT__IS_FINITE), DOT__RANGE(tanh_to, DOT__IS_FINITE)
    };
#undef DOT__RANGE
    const int count = (int)(sizeof ranges / sizeof *ranges);
    const dot_schedule made = dot__schedule(s->kind, 1, 0, 1);
    const char *wrong = dot__out_of_range(s, ranges, count, name, buffer, size);
    if (wrong) return wrong;
    for (const dot__range *r = ranges; r < ranges + count; ++r)
        if (dot__range_value(s, r) != dot__range_value(&made, r) && !dot__reads(s->kind, r->name))
            return dot__sentence(buffer, size, "%s: %s %.15g, a field that it does not read", name, r->name,
                                 dot__range_value(s, r));
    if (s->milestone_count < 0 || s->milestone_count > DOT_MAX_MILESTONES)
        return dot__sentence(buffer, size, "%s: %d milestones, expected 0..%d and an array", name, s->milestone_count,
                             DOT_MAX_MILESTONES);
    for (int i = 0, most = dot__reads(s->kind, "slopes") ? DOT_SLOPE_SQRT : 0; i < 3; ++i)
        if ((unsigned)s->slopes[i] > (unsigned)most)
            return dot__sentence(buffer, size, "%s: slopes[%d] %d, expected 0..%d", name, i, (int)s->slopes[i], most);
    return NULL;
}

/* How fields must fit each other. */
static const char *dot__schedule_relations_wrong(const dot_schedule *s, const char *name, char *buffer, size_t size)
{
    if (s->floor > s->floor_base)
        return dot__sentence(buffer, size, "%s: floor %g, expected 0..%g", name, s->floor, s->floor_base);
    if (dot__reads(s->kind, "total") && s->warmup > s->total - s->down)
        return dot__sentence(buffer, size, "%s: warmup " DOT__I64 " and down " DOT__I64 ", expected at most the total, " DOT__I64,
                             name, DOT__LL(s->warmup), DOT__LL(s->down), DOT__LL(s->total));
    if (s->kind == DOT_SCHEDULE_WARM_RESTARTS && !(s->factor >= 1 && s->factor <= 1e6 && s->factor == floor(s->factor)))
        return dot__sentence(buffer, size, "%s: factor %g, expected a whole number, 1..1e6", name, s->factor);
    if (s->kind == DOT_SCHEDULE_WARM_RESTARTS && s->warmup >= s->total)
        return dot__sentence(buffer, size, "%s: warmup " DOT__I64 ", expected less than the first period, " DOT__I64, name,
                             DOT__LL(s->warmup), DOT__LL(s->total));
    if (s->kind == DOT_SCHEDULE_NOAM && s->warmup < 1)
        return dot__sentence(buffer, size, "%s: warmup 0, expected >= 1", name);
    if (s->kind == DOT_SCHEDULE_RANGE_TEST && !(s->start > 0 && s->end > 0))
        return dot__sentence(buffer, size, "%s: start %g and end %g, expected > 0", name, s->start, s->end);
    if ((s->kind == DOT_SCHEDULE_CYCLIC || s->kind == DOT_SCHEDULE_WARMUP_STABLE) && s->down < 1)
        return dot__sentence(buffer, size, "%s: down " DOT__I64 ", expected >= 1", name, DOT__LL(s->down));
    if (s->kind == DOT_SCHEDULE_CYCLIC && s->down >= s->total)
        return dot__sentence(buffer, size, "%s: up " DOT__I64 ", expected >= 1", name, DOT__LL(s->total - s->down));
    if (s->kind == DOT_SCHEDULE_ONE_CYCLE) {
        const double total = (double)s->total, peak = s->peak_at * total - 1, last = s->three_phase ? 2 * peak : peak;
        if (!(peak > 0 && last < total - 1))
            return dot__sentence(buffer, size, "%s: peak_at %g of " DOT__I64 " steps ends phase 1 at step %g%s, expected between "
                                 "the first step and the last", name, s->peak_at, DOT__LL(s->total), peak,
                                 s->three_phase ? " and phase 2 twice as late" : "");
    }
    return NULL;
}

#define DOT__MAX_NESTING 8

static const char *dot__schedule_wrong(const dot_schedule *s, int depth, char *buffer, size_t size)
{
    if (!s) return dot__sentence(buffer, size, "schedule is NULL");
    const char *name = dot_schedule_name(s->kind), *wrong;
    if (!name)
        return dot__sentence(buffer, size, "schedule of kind %d, expected 0..%d", (int)s->kind, (int)DOT_SCHEDULE_KINDS - 1);
    if ((wrong = dot__schedule_fields_wrong(s, name, buffer, size)) != NULL) return wrong;
    if ((wrong = dot__schedule_relations_wrong(s, name, buffer, size)) != NULL) return wrong;
    if (s->kind != DOT_SCHEDULE_SEQUENCE && s->kind != DOT_SCHEDULE_PRODUCT) return NULL;

    if (depth > DOT__MAX_NESTING) return dot__sentence(buffer, size, "%s: nested more than %d deep", name, DOT__MAX_NESTING);
    if (s->part_count < 1 || s->part_count > DOT_MAX_PARTS)
        return dot__sentence(buffer, size, "%s: %d parts, expected 1..%d and an array", name, s->part_count, DOT_MAX_PARTS);
    if (s->kind == DOT_SCHEDULE_SEQUENCE && s->milestone_count != s->part_count - 1)
        return dot__sentence(buffer, size, "%s: %d boundaries, expected one less than the %d parts", name, s->milestone_count,
                             s->part_count);
    for (int i = 0; s->kind == DOT_SCHEDULE_SEQUENCE && i < s->milestone_count; ++i) {
        const int64_t before = i > 0 ? s->milestones[i - 1] : 0;
        if (s->milestones[i] <= before)
            return dot__sentence(buffer, size, "%s: boundary %d at step " DOT__I64 ", expected above " DOT__I64, name, i,
                                 DOT__LL(s->milestones[i]), DOT__LL(before));
    }
    for (int i = 0; i < s->part_count; ++i)
        if ((wrong = dot__schedule_wrong(s->parts[i], depth + 1, buffer, size)) != NULL) return wrong;
    return NULL;
}

const char *dot_schedule_invalid(const dot_schedule *s, char *buffer, size_t size)
{
    return dot__schedule_wrong(s, 0, buffer, size);
}

/* ---- the rules: value at a step >= 0 of a valid schedule ----
   A slope is worked out from `left`, the part that is left of it: 1 at its beginning, 0 at its end. Written so, with sums of
   nothing negative, the values are exact at both ends and accurate where they are small. */

static double dot__schedule_value(const dot_schedule *s, int64_t step);

static double dot__mix(double from, double to, double left) { return from * left + to * (1 - left); }

static double dot__slope(dot_slope slope, double left)
{
    const double sine = sin(0.5 * 3.14159265358979323846 * left);
    return slope == DOT_SLOPE_COSINE ? sine * sine : slope == DOT_SLOPE_SQRT ? left / (1 + sqrt(1 - left)) : left;
}

/* The part of the last `length` steps up to `total` that is left. */
static double dot__left(int64_t step, int64_t total, int64_t length)
{
    return step >= total ? 0 : total - step >= length ? 1 : (double)(total - step) / (double)length;
}

static double dot__left_after_warmup(const dot_schedule *s, int64_t step)
{
    return dot__left(step, s->total, s->total - s->warmup);
}

static double dot__rise(double start, double peak, int64_t step, int64_t warmup)
{
    return start + (peak - start) * ((double)step / (double)warmup);
}

/* The warm-up, and after it the way down to the floor. */
static double dot__down(const dot_schedule *s, int64_t step, double left)
{
    return step < s->warmup ? dot__rise(s->start, 1, step, s->warmup) : dot__mix(1, s->floor / s->floor_base, left);
}

static double dot__at_constant(const dot_schedule *s, int64_t step)
{
    (void)s;
    (void)step;
    return 1;
}

static double dot__at_step(const dot_schedule *s, int64_t step) { return pow(s->factor, (double)(step / s->total)); }
static double dot__at_exponential(const dot_schedule *s, int64_t step) { return pow(s->factor, (double)step); }
static double dot__at_factor(const dot_schedule *s, int64_t step) { return step < s->total ? s->factor : 1; }

static double dot__at_step_drop(const dot_schedule *s, int64_t step)
{
    double value = 1;
    for (int i = 0; i < s->milestone_count; ++i)
        if (step >= s->milestones[i]) value *= s->factor;
    return value;
}

static double dot__at_range_test(const dot_schedule *s, int64_t step)
{
    const double left = dot__left(step, s->total, s->total);
    return pow(s->start, left) * pow(s->end, 1 - left);
}

static double dot__at_anneal(const dot_schedule *s, int64_t step)
{
    return dot__mix(s->start, s->end, dot__slope(s->slopes[0], dot__left(step, s->total, s->total)));
}

static double dot__at_polynomial(const dot_schedule *s, int64_t step)
{
    return dot__down(s, step, pow(dot__left_after_warmup(s, step), s->power));
}

static double dot__at_cosine(const dot_schedule *s, int64_t step)
{
    return dot__down(s, step, dot__slope(DOT_SLOPE_COSINE, dot__left_after_warmup(s, step)));
}

static double dot__at_rex(const dot_schedule *s, int64_t step)
{
    const double left = dot__left_after_warmup(s, step);
    return dot__down(s, step, 2 * left / (1 + left));
}

static double dot__at_tanh(const dot_schedule *s, int64_t step)
{
    const double x = dot__mix(s->tanh_from, s->tanh_to, dot__left_after_warmup(s, step));
    return dot__down(s, step, 1 / (1 + exp(2 * x)));        /* (1 - tanh x) / 2 */
}

static double dot__at_stable_decay(const dot_schedule *s, int64_t step)
{
    return dot__down(s, step, dot__slope(s->slopes[0], dot__left(step, s->total, s->down)));
}

static double dot__at_inverse_sqrt(const dot_schedule *s, int64_t step)
{
    const double scale = (double)s->scale, since = (double)dot__max(step - s->warmup, 0);
    return dot__down(s, step, sqrt(scale / (since + scale)));
}

static double dot__at_noam(const dot_schedule *s, int64_t step)
{
    const double t = (double)step + 1, warmup = (double)s->warmup;
    return fmin(1 / sqrt(t), t / (warmup * sqrt(warmup))) / sqrt((double)s->scale);
}

/* A restart period. Counted with whole numbers, never with a logarithm, which errs at the restarts themselves. */
typedef struct dot__period { int64_t begin, length, index; double exact; } dot__period;   /* exact: the length, however large */

static dot__period dot__period_of(const dot_schedule *s, int64_t step)
{
    const int64_t factor = (int64_t)s->factor;
    dot__period p = { 0, s->total, 0, (double)s->total };
    if (factor == 1) {
        p.index = step / s->total;
        p.begin = p.index * s->total;
    }
    for (; step - p.begin >= p.length; ++p.index) {
        p.begin += p.length;
        p.exact = (double)p.length * (double)factor;
        p.length = p.length > INT64_MAX / factor ? INT64_MAX : p.length * factor;
    }
    return p;
}

static double dot__at_warm_restarts(const dot_schedule *s, int64_t step)
{
    const dot__period p = dot__period_of(s, step);
    const int64_t since = step - p.begin;
    const double least = s->floor / s->floor_base, peak = fmax(least, pow(s->decay, (double)p.index));
    if (since < s->warmup) return dot__rise(s->start, peak, since, s->warmup);
    return dot__mix(peak, least, dot__slope(DOT_SLOPE_COSINE, (p.exact - (double)since) / (p.exact - (double)s->warmup)));
}

/* Where one-cycle turns: the ends of its phases. */
typedef struct dot__turn { double step, level, momentum; } dot__turn;

static int dot__turns(const dot_schedule *s, dot__turn turns[4])
{
    const double total = (double)s->total, start = s->peak / s->div;
    const dot__turn begin = { 0, start, s->momentum_high }, peak = { s->peak_at * total - 1, s->peak, s->momentum_low },
                    middle = { 2 * s->peak_at * total - 2, start, s->momentum_high },
                    end = { total - 1, start / s->final_div, s->momentum_high };
    int count = 0;
    turns[count++] = begin;
    turns[count++] = peak;
    if (s->three_phase) turns[count++] = middle;
    turns[count++] = end;
    return count;
}

static dot__turn dot__one_cycle(const dot_schedule *s, int64_t step)
{
    dot__turn turns[4], now;
    const int count = dot__turns(s, turns);
    int i = 1;
    while (i < count - 1 && (double)step > turns[i].step) ++i;
    const dot__turn from = turns[i - 1], to = turns[i];
    const double left = dot__slope(s->slopes[i - 1], fmax(0, (to.step - (double)step) / (to.step - from.step)));
    now.step = (double)step;
    now.level = dot__mix(from.level, to.level, left);
    now.momentum = dot__mix(from.momentum, to.momentum, left);
    return now;
}

static double dot__at_one_cycle(const dot_schedule *s, int64_t step) { return dot__one_cycle(s, step).level; }

/* The height of the triangles, 0..1. */
static double dot__triangle(const dot_schedule *s, int64_t step)
{
    const int64_t cycle = step / s->total, since = step % s->total, up = s->total - s->down;
    const double height = since <= up ? (double)since / (double)up : (double)(s->total - since) / (double)s->down;
    return height * pow(s->decay, (double)cycle) * pow(s->factor, (double)step);
}

static double dot__at_cyclic(const dot_schedule *s, int64_t step)
{
    return s->start + (s->peak - s->start) * dot__triangle(s, step);
}

/* The part that a step lies in; the step becomes the part's own. */
static const dot_schedule *dot__sequence_part(const dot_schedule *s, int64_t *step)
{
    int i = 0;
    while (i < s->milestone_count && *step >= s->milestones[i]) ++i;
    if (i > 0) *step -= s->milestones[i - 1];
    return s->parts[i];
}

static double dot__at_sequence(const dot_schedule *s, int64_t step)
{
    const dot_schedule *part = dot__sequence_part(s, &step);
    return dot__schedule_value(part, step);
}

static double dot__at_product(const dot_schedule *s, int64_t step)
{
    double value = 1;
    for (int i = 0; i < s->part_count; ++i) value *= dot__schedule_value(s->parts[i], step);
    return value;
}

static double dot__schedule_value(const dot_schedule *s, int64_t step)
{
#define DOT__SCHEDULE_RULE(constant, name, function, description, source, fields) dot__at_##function,
    static double (*const rules[])(const dot_schedule *, int64_t) = { DOT_SCHEDULES(DOT__SCHEDULE_RULE) };
#undef DOT__SCHEDULE_RULE
    return rules[s->kind](s, step);
}

double dot_schedule_at(const dot_schedule *s, int64_t step)
{
    return dot__schedule_wrong(s, 0, NULL, 0) ? (double)NAN : dot__schedule_value(s, step < 0 ? 0 : step);
}

/* ---- momentum, periods, what is overridden: found also inside combinations ---- */

static double dot__schedule_momentum(const dot_schedule *s, int64_t step)
{
    double value = (double)NAN;
    if (s->kind == DOT_SCHEDULE_ONE_CYCLE) return dot__one_cycle(s, step).momentum;
    if (s->kind == DOT_SCHEDULE_CYCLIC)
        return s->momentum_high + (s->momentum_low - s->momentum_high) * dot__triangle(s, step);
    if (s->kind == DOT_SCHEDULE_SEQUENCE) {
        const dot_schedule *part = dot__sequence_part(s, &step);
        return dot__schedule_momentum(part, step);
    }
    for (int i = 0; s->kind == DOT_SCHEDULE_PRODUCT && i < s->part_count && value != value; ++i)
        value = dot__schedule_momentum(s->parts[i], step);
    return value;
}

double dot_schedule_momentum(const dot_schedule *s, int64_t step)
{
    return dot__schedule_wrong(s, 0, NULL, 0) ? (double)NAN : dot__schedule_momentum(s, step < 0 ? 0 : step);
}

static int64_t dot__restart_period(const dot_schedule *s, int64_t step)     /* 0: no restarts */
{
    int64_t period = 0;
    if (s->kind == DOT_SCHEDULE_WARM_RESTARTS) return dot__period_of(s, step).length;
    if (s->kind == DOT_SCHEDULE_SEQUENCE) {
        const dot_schedule *part = dot__sequence_part(s, &step);
        return dot__restart_period(part, step);
    }
    for (int i = 0; s->kind == DOT_SCHEDULE_PRODUCT && i < s->part_count && period == 0; ++i)
        period = dot__restart_period(s->parts[i], step);
    return period;
}

int64_t dot_schedule_period(const dot_schedule *s, int64_t step, int64_t total)
{
    const int64_t period = dot__schedule_wrong(s, 0, NULL, 0) ? 0 : dot__restart_period(s, step < 0 ? 0 : step);
    return period ? period : total;
}

static const dot_schedule *dot__overriding(const dot_schedule *s)
{
    const dot_schedule *found = NULL;
    if (s->kind == DOT_SCHEDULE_ONE_CYCLE || s->kind == DOT_SCHEDULE_CYCLIC) return s;
    if (s->kind == DOT_SCHEDULE_SEQUENCE || s->kind == DOT_SCHEDULE_PRODUCT)
        for (int i = 0; i < s->part_count && !found; ++i) found = dot__overriding(s->parts[i]);
    return found;
}

bool dot_schedule_overrides(const dot_schedule *s, double lr, double beta1, char *buffer, size_t size)
{
    dot__sentence(buffer, size, "%s", "");
    const dot_schedule *found = dot__schedule_wrong(s, 0, NULL, 0) ? NULL : dot__overriding(s);
    if (!found) return false;
    const double up = (double)(found->total - found->down);
    const dot__turn begin = { 0, found->start, found->momentum_high }, peak = { up, found->peak, found->momentum_low };
    dot__turn turns[4] = { begin, peak, begin, begin };         /* of cyclic */
    int count = 3;
    turns[2].step = (double)found->total;
    if (found->kind == DOT_SCHEDULE_ONE_CYCLE) count = dot__turns(found, turns);
    const dot__turn end = turns[count - 1];
    dot__sentence(buffer, size, "%s: the learning rate is not %g but %g at step 0, %g at step %g, %g at step %g; the momentum "
                  "(dot_schedule_momentum) not %g but %g, %g, %g", dot_schedule_name(found->kind), lr, lr * turns[0].level,
                  lr * turns[1].level, turns[1].step, lr * end.level, end.step, beta1, turns[0].momentum, turns[1].momentum,
                  end.momentum);
    return true;
}

/* ---- plateau ---- */

dot_plateau dot_plateau_defaults(void)
{
    dot_plateau p;
    memset(&p, 0, sizeof p);
    p.magic = DOT__MAGIC_PLATEAU;
    p.threshold = 1e-4;
    p.patience = 10;
    p.factor = 0.1;
    p.eps = 1e-8;
    p.multiplier = 1;
    p.best = (double)NAN;
    return p;
}

const char *dot_plateau_invalid(const dot_plateau *p, char *buffer, size_t size)
{
#define DOT__RANGE(field, range) { #field, offsetof(dot_plateau, field), range }
    static const dot__range ranges[] = {
        DOT__RANGE(threshold, DOT__IS_AT_LEAST_0), DOT__RANGE(factor, DOT__IS_BELOW_1), DOT__RANGE(floor, DOT__IS_AT_LEAST_0),
        DOT__RANGE(eps, DOT__IS_AT_LEAST_0), DOT__RANGE(multiplier, DOT__IS_AT_LEAST_0),
        DOT__RANGE(patience, DOT__IS_COUNT(0, ">= 0")), DOT__RANGE(cooldown, DOT__IS_COUNT(0, ">= 0")),
        DOT__RANGE(bad, DOT__IS_COUNT(0, ">= 0")), DOT__RANGE(cooling, DOT__IS_COUNT(0, ">= 0"))
    };
#undef DOT__RANGE
    if (!p) return dot__sentence(buffer, size, "plateau is NULL");
    if (p->magic != DOT__MAGIC_PLATEAU)
        return dot__sentence(buffer, size, "plateau: not filled by dot_plateau_defaults (magic 0x%08x)", (unsigned)p->magic);
    return dot__out_of_range(p, ranges, (int)(sizeof ranges / sizeof *ranges), "plateau", buffer, size);
}

static bool dot__plateau_better(const dot_plateau *p, double metric)
{
    const double sign = p->maximize ? -1 : 1;
    const double best = p->best != p->best ? (double)INFINITY : sign * p->best;
    const double margin = p->absolute ? p->threshold : dot__finite(best) ? p->threshold * fabs(best) : 0;
    return sign * metric < best - margin;       /* never for NaN */
}

double dot_plateau_observe(dot_plateau *p, double metric)
{
    if (dot_plateau_invalid(p, NULL, 0)) return (double)NAN;
    ++p->bad;
    if (dot__plateau_better(p, metric)) {
        p->best = metric;
        p->bad = 0;
    }
    if (p->cooling > 0) {
        --p->cooling;
        p->bad = 0;
    }
    if (p->bad > p->patience) {
        const double next = fmax(p->factor * p->multiplier, p->floor);
        if (p->multiplier - next > p->eps) p->multiplier = next;
        p->cooling = p->cooldown;
        p->bad = 0;
    }
    return p->multiplier;
}

#undef DOT__IS_POSITIVE
#undef DOT__IS_AT_LEAST_0
#undef DOT__IS_0_TO_1
#undef DOT__IS_BELOW_1
#undef DOT__IS_FINITE
#undef DOT__IS_COUNT

/* ==== [11 utilities] =============================================================================== */

double dot_gradient_check(dot_context *ctx, dot_loss_function f, void *user, dot_tensor *const *inputs, int count, double step)
{
    if (!dot_ok(ctx) || !f || !inputs) return (double)NAN;
    if (ctx->lanes != 1 || !(step > 0) || !dot__finite(step) || count < 0) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "dot_gradient_check: %d inputs, step %g, %d lanes, expected a positive step and one lane", count,
                  step, ctx->lanes);
        return (double)NAN;
    }
    for (int i = 0; i < count; ++i) {
        const dot_tensor *t = inputs[i];
        if (!t) return (double)NAN;
        if (t->ctx == ctx && t->dtype == DOT_F64 && t->persistent && t->requires_grad) continue;
        dot__fail(ctx, t->ctx != ctx ? DOT_ERROR_STATE : t->dtype != DOT_F64 ? DOT_ERROR_DTYPE : DOT_ERROR_ARGUMENT,
                  "dot_gradient_check: input %d is %s%s%s, expected a persistent F64 tensor with gradient, of this context", i,
                  t->ctx != ctx ? "of another context, " : "", dot__dtype_name(t->dtype), t->requires_grad ? "" : " without gradient");
        return (double)NAN;
    }
    for (int i = 0; i < count; ++i) inputs[i]->has_grad = false;
    double worst = 0;
    if (!dot_backward(f(user))) return (double)NAN;
    for (int i = 0; i < count; ++i) {
        dot_tensor *t = inputs[i];
        double *x = (double *)dot__at(t, 0), *g = t->has_grad ? (double *)dot__at(t->grad, 0) : NULL;
        for (int64_t j = 0; j < t->size; ++j) {
            double before = x[j], analytic = g ? g[j] : 0;
            x[j] = before + step;
            double above = dot_item(f(user), 0);
            x[j] = before - step;
            double below = dot_item(f(user), 0), numeric = (above - below) / (2 * step);
            x[j] = before;
            double scale = fmax(1, fmax(fabs(analytic), fabs(numeric))), error = fabs(analytic - numeric) / scale;
            if (!(error <= worst)) worst = error;       /* NaN is the worst */
            if (!dot_ok(ctx)) return (double)NAN;
        }
    }
    for (int i = 0; i < count; ++i) inputs[i]->has_grad = false;
    return worst;
}

#define DOT__MAGIC_GROKFAST  0xd07c1101u
#define DOT__MAGIC_AVERAGE   0xd07c1102u
#define DOT__MAGIC_LOOKAHEAD 0xd07c1103u
#define DOT__MAGIC_SAM       0xd07c1104u
#define DOT__MAGIC_GUARD     0xd07c1105u
#define DOT__MAGIC_OUTLIER   0xd07c1106u
#define DOT__MAGIC_MECHANIC  0xd07c1107u

/* Runs an always-inlined f with a constant type, so that its loops are compiled for it. */
#define DOT__TYPED(dtype, f, ...) do { if ((dtype) == DOT_F32) f(DOT_F32, __VA_ARGS__); else f(DOT_F64, __VA_ARGS__); } while (0)

#define DOT__TINIEST 1e-300
#define DOT__HUGE 1e300

static bool dot__magic_ok(dot_context *ctx, const char *function, uint32_t magic, uint32_t expected)
{
    if (magic == expected) return true;
    dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: magic 0x%08x, expected options filled by their _defaults function", function, (unsigned)magic);
    return false;
}

static bool dot__count_ok(dot_context *ctx, const char *function, const char *name, int64_t value, int64_t least)
{
    if (value >= least) return true;
    dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s " DOT__I64 ", expected " DOT__I64 " or more", function, name, DOT__LL(value), DOT__LL(least));
    return false;
}

/* ---- gradients, element by element ---- */

typedef struct dot__grad_job {
    dot_optimizer *opt;
    double limit;
    const double *factor;               /* [lane] */
    bool *bad;                          /* [lane][piece]: something is not finite */
} dot__grad_job;

DOT__INLINE void dot__clamp_range(dot_dtype dtype, void *g, int64_t i, int64_t end, double limit)
{
    for (; i < end; ++i) {
        double x = dot__load(g, dtype, i);
        dot__store(g, dtype, i, x > limit ? limit : x < -limit ? -limit : x);
    }
}

static void dot__clamp_piece(void *argument, int lane, int64_t piece)
{
    const dot__grad_job *job = (const dot__grad_job *)argument;
    const dot__slot *slot = dot__slot_of_piece(job->opt, piece);
    const dot_tensor *g = slot->tensor->grad;
    int64_t n, i = dot__part(g->size, piece - slot->first_piece, DOT__PIECE, &n);
    DOT__TYPED(g->dtype, dot__clamp_range, dot__at(g, lane), i, i + n, job->limit);
}

bool dot_clip_grad_value(dot_optimizer *opt, double limit)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__option_ok(opt->ctx, "dot_clip_grad_value", "limit", limit, DOT__TINIEST, DOT__HUGE, false)) return false;
    dot__grad_job job = { opt, limit, NULL, NULL };
    dot__select(opt, false, false);
    dot__parallel(opt->ctx, true, opt->pieces, dot__clamp_piece, &job);
    return true;
}

DOT__INLINE void dot__scale_range(dot_dtype dtype, void *g, int64_t i, int64_t end, double factor, bool *bad)
{
    double poison = 0;                  /* x * 0 is NaN where x is not finite */
    if (factor == 1) for (; i < end; ++i) poison += dot__load(g, dtype, i) * 0;
    for (; i < end; ++i) {
        double x = dot__load(g, dtype, i);
        poison += x * 0;
        dot__store(g, dtype, i, x * factor);
    }
    *bad = poison != 0;
}

static void dot__scale_piece(void *argument, int lane, int64_t piece)
{
    const dot__grad_job *job = (const dot__grad_job *)argument;
    const dot__slot *slot = dot__slot_of_piece(job->opt, piece);
    const dot_tensor *g = slot->tensor->grad;
    int64_t n, i = dot__part(g->size, piece - slot->first_piece, DOT__PIECE, &n);
    DOT__TYPED(g->dtype, dot__scale_range, dot__at(g, lane), i, i + n, job->factor[lane], &job->bad[lane * job->opt->pieces + piece]);
}

/* g *= factor[lane]; good[lane], unless NULL: were all of the lane's gradients finite? */
static bool dot__scale_grad(dot_optimizer *opt, const double *factor, bool *good)
{
    dot_context *ctx = opt->ctx;
    dot__mark mark = dot__scratch_begin(ctx);
    dot__select(opt, false, false);
    dot__grad_job job = { opt, 0, factor, (bool *)dot__step_alloc(ctx, (size_t)(opt->pieces * ctx->lanes) * sizeof(bool)) };
    if (!job.bad) return false;
    dot__parallel(ctx, true, opt->pieces, dot__scale_piece, &job);
    for (int k = 0; good && k < ctx->active_count; ++k) {
        int lane = ctx->active[k];
        good[lane] = true;
        for (int64_t p = 0; p < opt->pieces; ++p) if (job.bad[lane * opt->pieces + p]) good[lane] = false;
    }
    dot__scratch_end(ctx, mark);
    return true;
}

dot_tensor *dot_accumulate(dot_accumulation *a, dot_tensor *loss, double weight)
{
    if (!a || !loss || !dot_ok(loss->ctx) || !dot__option_ok(loss->ctx, "dot_accumulate", "weight", weight, DOT__TINIEST, DOT__HUGE, false)) return NULL;
    dot_tensor *weighted = dot_mul_scalar(loss, weight);
    if (weighted) a->weight += weight;
    return weighted;
}

bool dot_accumulate_finish(dot_accumulation *a, dot_optimizer *opt)
{
    if (!a || !opt || !dot_ok(opt->ctx)) return false;
    dot_context *ctx = opt->ctx;
    ctx->function = "dot_accumulate_finish";
    if (!(a->weight > 0) || !dot__finite(a->weight)) {
        dot__fail(ctx, DOT_ERROR_STATE, "dot_accumulate_finish: sum of weights %g, expected dot_accumulate first", a->weight);
        return false;
    }
    dot__mark mark = dot__scratch_begin(ctx);
    double *factor = (double *)dot__step_alloc(ctx, (size_t)ctx->lanes * sizeof(double));
    if (!factor) return false;
    for (int lane = 0; lane < ctx->lanes; ++lane) factor[lane] = 1 / a->weight;
    bool ok = dot__scale_grad(opt, factor, NULL);
    dot__scratch_end(ctx, mark);
    if (ok) a->weight = 0;
    return ok;
}

/* ---- gradients, unit by unit. PyTorch's first axis lies first or last in the stored order (see dot__slot), hence units are rows or
   columns of a matrix. A piece is a lot of them: columns are gone through side by side. ---- */

#define DOT__LOT 64

typedef struct dot__units { int64_t count, length, next, step, lot; } dot__units;      /* next: to the next unit; step: within one */
typedef struct dot__change { double factor, shift; } dot__change;   /* g = factor g - shift */

typedef struct dot__unit_job dot__unit_job;
struct dot__unit_job {
    dot_optimizer *opt;
    bool whole, squares, weights;       /* a unit is a whole parameter; g^2 instead of g; theta^2, too */
    dot__change (*change)(const dot__unit_job *job, const dot__slot *slot, double length, double g, double theta);
    double limit, eps;
    const char *except;
};

static dot__units dot__units_of(const dot__slot *slot, bool whole)
{
    const dot__parameter *p = slot->parameter;
    dot__units u = { 1, slot->tensor->size, 0, 1, 1 };
    if (whole || p->rank < 2) return u;
    bool columns = p->layout.axis[0] != 0;
    u.count = p->shape[0];
    u.length = slot->tensor->size / u.count;
    u.next = columns ? 1 : u.length;
    u.step = columns ? u.count : 1;
    u.lot = columns ? DOT__LOT : dot__max(1, dot__min(DOT__LOT, DOT__PIECE / u.length));
    return u;
}

DOT__INLINE void dot__lot_sum(dot_dtype dtype, const void *data, const dot__units *u, int64_t first, int64_t n, bool squares, double *sum)
{
    for (int64_t k = 0; k < n; ++k) sum[k] = 0;
    for (int64_t e = 0, at = first * u->next; e < u->length; ++e, at += u->step)
        for (int64_t k = 0; k < n; ++k) {
            double x = dot__load(data, dtype, at + k * u->next);
            sum[k] += squares ? x * x : x;
        }
}

DOT__INLINE void dot__lot_change(dot_dtype dtype, void *data, const dot__units *u, int64_t first, int64_t n, const dot__change *c)
{
    for (int64_t e = 0, at = first * u->next; e < u->length; ++e, at += u->step)
        for (int64_t k = 0; k < n; ++k) {
            int64_t i = at + k * u->next;
            if (c[k].factor != 1 || c[k].shift != 0) dot__store(data, dtype, i, c[k].factor * dot__load(data, dtype, i) - c[k].shift);
        }
}

static void dot__unit_piece(void *argument, int lane, int64_t piece)
{
    const dot__unit_job *job = (const dot__unit_job *)argument;
    const dot__slot *slot = dot__slot_of_piece(job->opt, piece);
    const dot_tensor *w = slot->tensor;
    dot__units u = dot__units_of(slot, job->whole);
    double g[DOT__LOT], theta[DOT__LOT] = { 0 };
    dot__change c[DOT__LOT];
    bool changed = false;
    int64_t n, first = dot__part(u.count, piece - slot->first_piece, u.lot, &n);
    DOT__TYPED(w->dtype, dot__lot_sum, dot__at(w->grad, lane), &u, first, n, job->squares, g);
    if (job->weights) DOT__TYPED(w->dtype, dot__lot_sum, dot__at(w, lane), &u, first, n, true, theta);
    for (int64_t k = 0; k < n; ++k) {
        c[k] = job->change(job, slot, (double)u.length, g[k], theta[k]);
        if (c[k].factor != 1 || c[k].shift != 0) changed = true;
    }
    if (changed) DOT__TYPED(w->dtype, dot__lot_change, dot__at(w->grad, lane), &u, first, n, c);
}

static bool dot__unit_run(dot__unit_job *job)
{
    dot_optimizer *opt = job->opt;
    dot__select(opt, false, false);
    opt->pieces = 0;
    for (int i = 0; i < opt->active; ++i) {
        dot__slot *slot = opt->active_slot[i];
        dot__units u = dot__units_of(slot, job->whole);
        slot->first_piece = opt->pieces;
        opt->pieces += dot__ceil_div(u.count, u.lot);
    }
    dot__parallel(opt->ctx, true, opt->pieces, dot__unit_piece, job);
    return true;
}

static dot__change dot__change_rms(const dot__unit_job *job, const dot__slot *slot, double length, double g, double theta)
{
    dot__change c = { 1, 0 };
    double ratio = sqrt(g / length) / job->limit;
    (void)slot;
    (void)theta;
    if (ratio > 1) c.factor = 1 / ratio;
    return c;
}

static dot__change dot__change_adaptive(const dot__unit_job *job, const dot__slot *slot, double length, double g, double theta)
{
    dot__change c = { 1, 0 };
    double norm = sqrt(g), weight = sqrt(theta), most = job->limit * (weight > job->eps ? weight : job->eps);
    (void)length;
    if (norm >= most && norm > 0 && !(job->except && dot__matches(job->except, slot->name))) c.factor = most / norm;
    return c;
}

static dot__change dot__change_centralize(const dot__unit_job *job, const dot__slot *slot, double length, double g, double theta)
{
    dot__change c = { 1, 0 };
    (void)job;
    (void)theta;
    if (slot->parameter->rank >= 2) c.shift = g / length;
    return c;
}

bool dot_clip_grad_rms(dot_optimizer *opt, double limit)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__option_ok(opt->ctx, "dot_clip_grad_rms", "limit", limit, DOT__TINIEST, DOT__HUGE, false)) return false;
    dot__unit_job job = { opt, true, true, false, dot__change_rms, limit, 0, NULL };
    return dot__unit_run(&job);
}

bool dot_clip_grad_adaptive(dot_optimizer *opt, double limit, double eps, const char *except)
{
    static const char *const f = "dot_clip_grad_adaptive";
    if (!opt || !dot_ok(opt->ctx) || !dot__option_ok(opt->ctx, f, "limit", limit, DOT__TINIEST, DOT__HUGE, false)
        || !dot__option_ok(opt->ctx, f, "eps", eps, 0, DOT__HUGE, false)) return false;
    dot__unit_job job = { opt, false, true, true, dot__change_adaptive, limit, eps, except };
    return dot__unit_run(&job);
}

bool dot_centralize_grad(dot_optimizer *opt)
{
    if (!opt || !dot_ok(opt->ctx)) return false;
    dot__unit_job job = { opt, false, false, false, dot__change_centralize, 0, 0, NULL };
    return dot__unit_run(&job);
}

/* ---- objects that remember: a copy of each parameter of a layer, counters, numbers ---- */

typedef struct dot__kept {
    dot__parameter *parameter;
    dot_tensor *tensor, *copy;
    char name[DOT_MAX_NAME];
    int64_t first_piece;
} dot__kept;

struct dot_state {
    dot_context *ctx;
    dot_layer *layer;                   /* NULL: no copies */
    const char *label;                  /* of the copies in files */
    bool buffers;                       /* copies of buffers, too */
    bool away;                          /* the layer has the copies, and the copies have its values */
    int count;
    dot__kept *kept;
    int64_t pieces;
    int64_t counters, numbers;
    int64_t *counter;                   /* its own, */
    double *number;
};

static bool dot__state_visit(void *user, const char *name, dot__parameter *p)
{
    dot_state *s = (dot_state *)user;
    if (!s->buffers && !dot__trainable(p)) return true;
    dot__kept *kept = &s->kept[s->count];
    kept->parameter = p;
    kept->tensor = p->tensor;
    kept->first_piece = s->pieces;
    memcpy(kept->name, name, strlen(name) + 1);
    kept->copy = dot__persistent_tensor(s->ctx, p->tensor->dtype, p->tensor->rank, p->tensor->shape, p->tensor->size);
    if (!kept->copy) return false;
    s->pieces += dot__ceil_div(p->tensor->size, DOT__PIECE);
    s->count++;
    return true;
}

/* The memory of an object, in front of which `s` stands. On failure it goes. */
static bool dot__state_open(dot_state *s, dot_layer *layer, bool buffers, const char *label, int64_t counters, int64_t numbers)
{
    s->label = label;
    s->buffers = buffers;
    s->layer = layer;
    s->counters = counters;
    s->numbers = numbers;
    s->kept = (dot__kept *)dot__new(s->ctx, (size_t)dot_layer_parameters(layer) * sizeof(dot__kept));
    s->counter = s->kept ? (int64_t *)dot__new(s->ctx, (size_t)counters * sizeof(int64_t)) : NULL;
    s->number = s->counter ? (double *)dot__new(s->ctx, (size_t)numbers * sizeof(double)) : NULL;
    if (s->number && (!layer || dot__visit(layer, "", dot__state_visit, s))) return true;
    for (int i = 0; i < s->count; ++i) {
        dot__delete(s->ctx, s->kept[i].copy->data);
        dot__delete(s->ctx, s->kept[i].copy);
    }
    dot__delete(s->ctx, s->kept);
    dot__delete(s->ctx, s->counter);
    dot__delete(s->ctx, s->number);
    dot__delete(s->ctx, s);
    return false;
}

static void *dot__state_new(dot_context *ctx, size_t bytes)
{
    dot_state *s = (dot_state *)dot__new(ctx, bytes);
    if (s) s->ctx = ctx;
    return s;
}

/* A pass over the copies, by pieces; it may add up sums, of each lane. */
#define DOT__PASS_SUMS 4
typedef struct dot__pass dot__pass;
typedef struct dot__stretch { const dot__kept *kept; int lane; int64_t first, end; double *sum; } dot__stretch;
struct dot__pass {
    dot_state *state;
    void (*range)(const dot__pass *pass, const dot__stretch *r);
    double *sums;                       /* [lane][piece][DOT__PASS_SUMS], or NULL */
    double a;
    bool flag;
    const double *by_lane;
    void *user;
};

static void dot__pass_piece(void *argument, int lane, int64_t piece)
{
    const dot__pass *pass = (const dot__pass *)argument;
    const dot_state *s = pass->state;
    int low = 0, high = s->count - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (s->kept[middle].first_piece <= piece) low = middle; else high = middle - 1;
    }
    dot__stretch r;
    int64_t n;
    r.kept = &s->kept[low];
    r.lane = lane;
    r.first = dot__part(r.kept->tensor->size, piece - r.kept->first_piece, DOT__PIECE, &n);
    r.end = r.first + n;
    r.sum = pass->sums ? pass->sums + (lane * s->pieces + piece) * DOT__PASS_SUMS : NULL;
    for (int k = 0; k < DOT__PASS_SUMS && r.sum; ++k) r.sum[k] = 0;
    pass->range(pass, &r);
}

static dot__pass dot__pass_of(dot_state *s, void (*range)(const dot__pass *, const dot__stretch *))
{
    dot__pass pass;
    memset(&pass, 0, sizeof pass);
    pass.state = s;
    pass.range = range;
    return pass;
}

/* Runs it; total[lane][DOT__PASS_SUMS], unless NULL: the sums of the active lanes, added up in order. */
static bool dot__pass_run(dot__pass *pass, double *total)
{
    dot_state *s = pass->state;
    dot_context *ctx = s->ctx;
    dot__mark mark = dot__scratch_begin(ctx);
    if (total && !(pass->sums = (double *)dot__step_alloc(ctx, (size_t)(s->pieces * ctx->lanes) * DOT__PASS_SUMS * sizeof(double)))) return false;
    dot__parallel(ctx, true, s->pieces, dot__pass_piece, pass);
    for (int k = 0; total && k < ctx->active_count; ++k) {
        int lane = ctx->active[k];
        double *sum = total + lane * DOT__PASS_SUMS;
        for (int j = 0; j < DOT__PASS_SUMS; ++j) sum[j] = 0;
        for (int64_t p = 0; p < s->pieces; ++p)
            for (int j = 0; j < DOT__PASS_SUMS; ++j) sum[j] += pass->sums[(lane * s->pieces + p) * DOT__PASS_SUMS + j];
    }
    dot__scratch_end(ctx, mark);
    return true;
}

static void dot__range_copy(const dot_tensor *to, const dot_tensor *from, const dot__stretch *r)
{
    size_t size = dot_dtype_size(to->dtype), first = (size_t)r->first * size;
    memcpy((char *)dot__at(to, r->lane) + first, (char *)dot__at(from, r->lane) + first, (size_t)(r->end - r->first) * size);
}

/* The layer's values and the copies change places. */
static void dot__state_swap(dot_state *s)
{
    for (int i = 0; i < s->count; ++i) {
        char *data = s->kept[i].tensor->data;
        s->kept[i].tensor->data = s->kept[i].copy->data;
        s->kept[i].copy->data = data;
    }
    s->away = !s->away;
}

static bool dot__state_here(const dot_state *s, const char *function)
{
    if (!dot_ok(s->ctx)) return false;
    s->ctx->function = function;
    if (s->away) dot__fail(s->ctx, DOT_ERROR_STATE, "%s: the layer and the %s object have changed places, expected them back first", function, s->label);
    return !s->away;
}

/* y += a (x - y) */
DOT__INLINE void dot__lerp_range(dot_dtype dtype, double a, const void *x, void *y, int64_t i, int64_t end)
{
    for (; i < end; ++i) {
        double old = dot__load(y, dtype, i);
        dot__store(y, dtype, i, old + a * (dot__load(x, dtype, i) - old));
    }
}

static void dot__range_lerp(const dot_tensor *y, const dot_tensor *x, double a, const dot__stretch *r)
{
    DOT__TYPED(y->dtype, dot__lerp_range, a, dot__at(x, r->lane), dot__at(y, r->lane), r->first, r->end);
}

/* ---- Grokfast ---- */

struct dot_grokfast { dot_state state; dot_optimizer *opt; dot_grokfast_options options; };

dot_grokfast_options dot_grokfast_defaults(void)
{
    dot_grokfast_options o = { DOT__MAGIC_GROKFAST, 0.98, 2 };
    return o;
}

dot_grokfast *dot_grokfast_create(dot_optimizer *opt, const dot_grokfast_options *options)
{
    static const char *const f = "dot_grokfast_create";
    dot_grokfast_options o = options ? *options : dot_grokfast_defaults();
    if (!opt || !dot_ok(opt->ctx)) return NULL;
    opt->ctx->function = f;
    if (!dot__magic_ok(opt->ctx, f, o.magic, DOT__MAGIC_GROKFAST) || !dot__option_ok(opt->ctx, f, "alpha", o.alpha, 0, 1, true)
        || !dot__option_ok(opt->ctx, f, "lambda", o.lambda, 0, DOT__HUGE, false)) return NULL;
    dot_grokfast *g = (dot_grokfast *)dot__state_new(opt->ctx, sizeof *g);
    if (!g) return NULL;
    g->opt = opt;
    g->options = o;
    return dot__state_open(&g->state, opt->layer, false, "grads", opt->slots, 0) ? g : NULL;
}

DOT__INLINE void dot__grokfast_range(dot_dtype dtype, double alpha, double lambda, void *h, void *g, int64_t i, int64_t end)
{
    for (; i < end; ++i) {
        double x = dot__load(g, dtype, i);
        if (dot__finite(x)) dot__store(h, dtype, i, alpha * dot__load(h, dtype, i) + (1 - alpha) * x);
        dot__store(g, dtype, i, x + lambda * dot__load(h, dtype, i));
    }
}

static void dot__grokfast_piece(const dot__pass *pass, const dot__stretch *r)
{
    const dot_grokfast *f = (const dot_grokfast *)pass->user;
    const dot_tensor *g = r->kept->tensor->grad;
    if (!r->kept->tensor->has_grad) return;
    double alpha = f->state.counter[r->kept - f->state.kept] > 0 ? f->options.alpha : 0;
    DOT__TYPED(g->dtype, dot__grokfast_range, alpha, f->options.lambda, dot__at(r->kept->copy, r->lane), dot__at(g, r->lane), r->first, r->end);
}

bool dot_grokfast_filter(dot_grokfast *f)
{
    if (!f || !dot_ok(f->state.ctx)) return false;
    dot__pass pass = dot__pass_of(&f->state, dot__grokfast_piece);
    pass.user = f;
    dot__pass_run(&pass, NULL);
    for (int i = 0; i < f->state.count; ++i) f->state.counter[i] += f->state.kept[i].tensor->has_grad;
    return true;
}

dot_state *dot_grokfast_state(dot_grokfast *f) { return f ? &f->state : NULL; }

/* ---- averages ---- */

struct dot_average { dot_state state; dot_average_options options; };      /* counters: averages taken; calls */

dot_average_options dot_average_defaults(void)
{
    dot_average_options o = { DOT__MAGIC_AVERAGE, DOT_AVERAGE_EMA, 0.999, false, 1, 2.0 / 3, 1, false };
    return o;
}

dot_average *dot_average_create(dot_layer *layer, const dot_average_options *options)
{
    static const char *const f = "dot_average_create";
    dot_average_options o = options ? *options : dot_average_defaults();
    if (!layer || !dot_ok(layer->ctx)) return NULL;
    dot_context *ctx = layer->ctx;
    ctx->function = f;
    if (!dot__magic_ok(ctx, f, o.magic, DOT__MAGIC_AVERAGE) || !dot__option_ok(ctx, f, "kind", o.kind, DOT_AVERAGE_EMA, DOT_AVERAGE_SWA, false)
        || !dot__option_ok(ctx, f, "decay", o.decay, 0, 1, false) || !dot__option_ok(ctx, f, "gamma", o.gamma, DOT__TINIEST, DOT__HUGE, false)
        || !dot__option_ok(ctx, f, "power", o.power, 0, DOT__HUGE, false) || !dot__count_ok(ctx, f, "every", o.every, 1)) return NULL;
    dot_average *a = (dot_average *)dot__state_new(ctx, sizeof *a);
    if (!a) return NULL;
    a->options = o;
    return dot__state_open(&a->state, layer, true, "module", 2, 0) ? a : NULL;
}

static void dot__average_range(const dot__pass *pass, const dot__stretch *r)
{
    const dot_average *average = (const dot_average *)pass->user;
    bool copied = !dot__is_float(r->kept->tensor->dtype) || (!average->options.buffers && r->kept->parameter->kind == DOT_KIND_BUFFER);
    if (copied || average->state.counter[0] == 0) dot__range_copy(r->kept->copy, r->kept->tensor, r);
    else dot__range_lerp(r->kept->copy, r->kept->tensor, pass->a, r);
}

bool dot_average_update(dot_average *average)
{
    if (!average || !dot__state_here(&average->state, "dot_average_update")) return false;
    const dot_average_options *o = &average->options;
    int64_t *counter = average->state.counter;
    double n = (double)counter[0], warm = 1 - pow(1 + n / o->gamma, -o->power);
    if (++counter[1] % o->every != 0) return true;
    dot__pass pass = dot__pass_of(&average->state, dot__average_range);
    pass.user = average;
    pass.a = o->kind == DOT_AVERAGE_SWA ? 1 / (n + 1) : 1 - (o->warmup && warm < o->decay ? warm : o->decay);
    dot__pass_run(&pass, NULL);
    counter[0]++;
    return true;
}

bool dot_average_swap(dot_average *average)
{
    if (!average || !dot_ok(average->state.ctx)) return false;
    if (average->state.counter[0] == 0) {
        dot__fail(average->state.ctx, DOT_ERROR_STATE, "dot_average_swap: 0 averages taken, expected dot_average_update first");
        return false;
    }
    dot__state_swap(&average->state);
    return true;
}

int64_t    dot_average_count(const dot_average *average) { return average ? average->state.counter[0] : 0; }
dot_state *dot_average_state(dot_average *average)       { return average ? &average->state : NULL; }

/* ---- statistics of batch normalisation ---- */

/* Of one layer, [lane][mean, variance, count of batches]: as they were, and the cumulative averages. */
typedef struct dot__statistics { dot_layer *layer; double *old, *average; } dot__statistics;

static int dot__find_batch_norms(dot_layer *layer, dot__statistics *found, int count)
{
    if (layer->batches) {
        if (found) found[count].layer = layer;
        count++;
    }
    for (dot_layer *child = layer->children; child; child = child->next) count = dot__find_batch_norms(child, found, count);
    return count;
}

static void dot__statistics_take(void *data, dot_dtype dtype, int64_t i, double *own, double share)    { own[i] = dot__load(data, dtype, i); (void)share; }
static void dot__statistics_put(void *data, dot_dtype dtype, int64_t i, double *own, double share)     { dot__store(data, dtype, i, own[i]); (void)share; }
static void dot__statistics_zero(void *data, dot_dtype dtype, int64_t i, double *own, double share)    { dot__store(data, dtype, i, 0); (void)own; (void)share; }

/* The layer's momentum is 0.1: from zero, the running statistics become 0.1 times the batch's. */
static void dot__statistics_add(void *data, dot_dtype dtype, int64_t i, double *own, double share)
{
    own[i] += share * (dot__load(data, dtype, i) * 10 - own[i]);
}

static void dot__statistics_each(const dot__statistics *s, void (*f)(void *, dot_dtype, int64_t, double *, double), double *values, double share)
{
    dot_context *ctx = s->layer->ctx;
    dot_tensor *const parts[] = { s->layer->mean, s->layer->var, s->layer->batches };
    int64_t channels = s->layer->mean->size;
    for (int k = 0; k < ctx->active_count; ++k) {
        double *own = values + ctx->active[k] * (2 * channels + 1);
        for (int part = 0; part < 3; own += parts[part++]->size)
            for (int64_t i = 0; i < parts[part]->size; ++i) f(dot__at(parts[part], ctx->active[k]), parts[part]->dtype, i, own, share);
    }
}

static bool dot__statistics_run(dot__statistics *found, int count, bool (*batch)(void *, int64_t), void *user, int64_t batches)
{
    for (int64_t b = 0; b < batches; ++b) {
        for (int i = 0; i < count; ++i) dot__statistics_each(&found[i], dot__statistics_zero, found[i].average, 0);
        if (!batch(user, b) || (count > 0 && !dot_ok(found->layer->ctx))) return false;
        for (int i = 0; i < count; ++i) dot__statistics_each(&found[i], dot__statistics_add, found[i].average, 1 / (double)(b + 1));
    }
    for (int i = 0; i < count; ++i) {           /* the counts are counts, not averages */
        dot_context *ctx = found[i].layer->ctx;
        int64_t row = 2 * found[i].layer->mean->size + 1;
        for (int k = 0; k < ctx->active_count; ++k) found[i].average[(ctx->active[k] + 1) * row - 1] = (double)batches;
    }
    return true;
}

bool dot_batch_norm_recompute(dot_layer *layer, bool (*batch)(void *user, int64_t index), void *user, int64_t batches)
{
    if (!layer || !batch || !dot_ok(layer->ctx) || !dot__count_ok(layer->ctx, "dot_batch_norm_recompute", "batches", batches, 1)) return false;
    dot_context *ctx = layer->ctx;
    ctx->function = "dot_batch_norm_recompute";
    int count = dot__find_batch_norms(layer, NULL, 0), ready = 0;
    uint64_t step = ctx->step;                  /* training goes on with the same random numbers */
    dot__statistics *found = (dot__statistics *)dot__new(ctx, (size_t)count * sizeof *found);
    if (!found) return false;
    dot__find_batch_norms(layer, found, 0);
    for (; ready < count; ++ready) {
        dot__statistics *s = &found[ready];
        size_t bytes = (2 * (size_t)s->layer->mean->size + 1) * (size_t)ctx->lanes * sizeof(double);
        if (!(s->old = (double *)dot__new(ctx, bytes)) || !(s->average = (double *)dot__new(ctx, bytes))) break;
        dot__statistics_each(s, dot__statistics_take, s->old, 0);
    }
    bool ok = ready == count && dot__statistics_run(found, count, batch, user, batches);
    for (int i = 0; i < count; ++i) {
        if (i < ready) dot__statistics_each(&found[i], dot__statistics_put, ok ? found[i].average : found[i].old, 0);
        dot__delete(ctx, found[i].old);
        dot__delete(ctx, found[i].average);
    }
    dot__delete(ctx, found);
    ctx->step = step;
    return ok;
}

/* ---- Lookahead ---- */

struct dot_lookahead { dot_state state; dot_lookahead_options options; };  /* counter: steps */

dot_lookahead_options dot_lookahead_defaults(void)
{
    dot_lookahead_options o = { DOT__MAGIC_LOOKAHEAD, 6, 0.5 };
    return o;
}

dot_lookahead *dot_lookahead_create(dot_optimizer *opt, const dot_lookahead_options *options)
{
    static const char *const f = "dot_lookahead_create";
    dot_lookahead_options o = options ? *options : dot_lookahead_defaults();
    if (!opt || !dot_ok(opt->ctx)) return NULL;
    opt->ctx->function = f;
    if (!dot__magic_ok(opt->ctx, f, o.magic, DOT__MAGIC_LOOKAHEAD) || !dot__count_ok(opt->ctx, f, "k", o.k, 1)
        || !dot__option_ok(opt->ctx, f, "alpha", o.alpha, 0, 1, false)) return NULL;
    dot_lookahead *l = (dot_lookahead *)dot__state_new(opt->ctx, sizeof *l);
    if (!l) return NULL;
    l->options = o;
    if (!dot__state_open(&l->state, opt->layer, false, "slow", 1, 0)) return NULL;
    for (int i = 0; i < l->state.count; ++i)
        for (int lane = 0; lane < opt->ctx->lanes; ++lane) {
            dot__stretch r = { &l->state.kept[i], lane, 0, l->state.kept[i].tensor->size, NULL };
            dot__range_copy(r.kept->copy, r.kept->tensor, &r);
        }
    return l;
}

static void dot__lookahead_range(const dot__pass *pass, const dot__stretch *r)
{
    dot__range_lerp(r->kept->copy, r->kept->tensor, pass->a, r);
    dot__range_copy(r->kept->tensor, r->kept->copy, r);
}

bool dot_lookahead_update(dot_lookahead *l)
{
    if (!l || !dot_ok(l->state.ctx)) return false;
    if (++l->state.counter[0] % l->options.k != 0) return true;
    dot__pass pass = dot__pass_of(&l->state, dot__lookahead_range);
    pass.a = l->options.alpha;
    return dot__pass_run(&pass, NULL);
}

dot_state *dot_lookahead_state(dot_lookahead *l) { return l ? &l->state : NULL; }

/* ---- Mechanic ---- */

typedef struct dot__mechanic_beta { double r, m, v, s; } dot__mechanic_beta;
typedef struct dot__mechanic_step { double h, share, old_scale, scale; } dot__mechanic_step;

struct dot_mechanic {
    dot_state state;                    /* the copies: D; numbers: [lane][betas] r m v s, and of a step: */
    dot_optimizer *opt;
    dot_mechanic_options options;
    dot__mechanic_step *now;            /* [lane] */
    double *sums;                       /* [lane][DOT__PASS_SUMS] */
    dot_tensor **before;                /* [parameter] theta */
};

dot_mechanic_options dot_mechanic_defaults(void)
{
    dot_mechanic_options o = { DOT__MAGIC_MECHANIC, 1e-2, 1e-6, 1e-8, 6 };
    return o;
}

static dot__mechanic_beta *dot__mechanic_betas(const dot_mechanic *m, int lane)
{
    return (dot__mechanic_beta *)(void *)m->state.number + lane * m->options.betas;
}

dot_mechanic *dot_mechanic_create(dot_optimizer *opt, const dot_mechanic_options *options)
{
    static const char *const f = "dot_mechanic_create";
    dot_mechanic_options o = options ? *options : dot_mechanic_defaults();
    if (!opt || !dot_ok(opt->ctx)) return NULL;
    opt->ctx->function = f;
    if (!dot__magic_ok(opt->ctx, f, o.magic, DOT__MAGIC_MECHANIC) || !dot__option_ok(opt->ctx, f, "betas", o.betas, 1, 12, false)
        || !dot__option_ok(opt->ctx, f, "weight_decay", o.weight_decay, 0, DOT__HUGE, false)
        || !dot__option_ok(opt->ctx, f, "s_init", o.s_init, DOT__TINIEST, DOT__HUGE, false)
        || !dot__option_ok(opt->ctx, f, "eps", o.eps, DOT__TINIEST, DOT__HUGE, false)) return NULL;
    dot_mechanic *m = (dot_mechanic *)dot__state_new(opt->ctx, sizeof *m);
    if (!m) return NULL;
    int64_t lanes = opt->ctx->lanes, of_lane = 4 * o.betas;
    m->opt = opt;
    m->options = o;
    if (!dot__state_open(&m->state, opt->layer, false, "delta", 0, lanes * (of_lane + 4 + DOT__PASS_SUMS))) return NULL;
    m->now = (dot__mechanic_step *)(void *)(m->state.number + lanes * of_lane);
    m->sums = m->state.number + lanes * (of_lane + 4);
    for (int lane = 0; lane < lanes; ++lane) {
        for (int i = 0; i < o.betas; ++i) dot__mechanic_betas(m, lane)[i].s = o.s_init;
        m->now[lane].scale = o.s_init * o.betas;
    }
    return m;
}

DOT__INLINE void dot__mechanic_measure(dot_dtype dtype, const void *w, const void *g, const void *delta, int64_t i, int64_t end, double *sum)
{
    for (; i < end; ++i) {
        double x = dot__load(w, dtype, i), slope = g ? dot__load(g, dtype, i) : 0, d = dot__load(delta, dtype, i);
        sum[0] += slope * d;
        sum[1] += x * d;
        sum[2] += slope * slope;
        sum[3] += x * x;
    }
}

DOT__INLINE void dot__mechanic_move(dot_dtype dtype, const dot__mechanic_step *now, const void *before, void *w, void *delta, int64_t i, int64_t end)
{
    for (; i < end; ++i) {
        double x = dot__load(before, dtype, i), d = dot__load(delta, dtype, i), next = now->share * d + (x - dot__load(w, dtype, i));
        dot__store(w, dtype, i, x + now->old_scale * d - now->scale * next);
        dot__store(delta, dtype, i, next);
    }
}

static void dot__mechanic_range(const dot__pass *pass, const dot__stretch *r)
{
    const dot_mechanic *m = (const dot_mechanic *)pass->user;
    const dot_tensor *w = r->kept->tensor, *before = m->before[r->kept - m->state.kept];
    void *delta = dot__at(r->kept->copy, r->lane);
    if (!r->sum) {
        DOT__TYPED(w->dtype, dot__mechanic_move, &m->now[r->lane], dot__at(before, r->lane), dot__at(w, r->lane), delta, r->first, r->end);
        return;
    }
    dot__range_copy(before, w, r);
    DOT__TYPED(w->dtype, dot__mechanic_measure, dot__at(w, r->lane), w->has_grad ? dot__at(w->grad, r->lane) : NULL, delta, r->first, r->end,
               r->sum);
}

/* h, from the sums over all parameters. */
static void dot__mechanic_slope(dot_mechanic *m, int lane)
{
    const double *sum = m->sums + lane * DOT__PASS_SUMS, factor = m->opt->clip[lane];
    dot__mechanic_step *now = &m->now[lane];
    double decay = m->options.weight_decay * now->scale * factor * sqrt(sum[2]) / (sqrt(sum[3]) + m->options.eps);
    now->share = now->scale / (now->scale + m->options.eps);
    now->h = now->share * ((m->opt->options.maximize ? -factor : factor) * sum[0] + decay * sum[1]);
}

/* The scale from h. One that is not finite changes nothing. */
static void dot__mechanic_tune(dot_mechanic *m, int lane)
{
    const dot_mechanic_options *o = &m->options;
    dot__mechanic_step *now = &m->now[lane];
    double h = now->h, beta = 0;
    now->old_scale = now->scale;
    if (!dot__finite(h)) return;
    now->scale = 0;
    for (int i = 0; i < o->betas; ++i) {
        dot__mechanic_beta *b = dot__mechanic_betas(m, lane) + i;
        beta = 1 - (1 - beta) * 0.1;
        b->r = beta * b->r + b->s * (h > b->m ? b->m : h < -b->m ? -b->m : h);
        b->m = fmax(beta * b->m, fabs(h) + o->eps);
        b->v = beta * beta * b->v + h * h;
        b->s = (o->s_init / o->betas * b->m + fmax(b->r, 0)) / (sqrt(b->v) + o->eps);
        now->scale += b->s;
    }
}

bool dot_mechanic_step(dot_mechanic *m, double multiplier)
{
    if (!m || !dot_ok(m->state.ctx)) return false;
    dot_context *ctx = m->state.ctx;
    dot__mark mark = dot__scratch_begin(ctx);
    dot__pass pass = dot__pass_of(&m->state, dot__mechanic_range);
    pass.user = m;
    if (!(m->before = (dot_tensor **)dot__step_alloc(ctx, (size_t)(m->state.count + 1) * sizeof(dot_tensor *)))) return false;
    for (int i = 0; i < m->state.count; ++i)
        if (!(m->before[i] = dot__step_like(m->state.kept[i].tensor, true))) return false;
    if (!dot__pass_run(&pass, m->sums)) return false;
    for (int k = 0; k < ctx->active_count; ++k) dot__mechanic_slope(m, ctx->active[k]);
    if (!dot_optimizer_step(m->opt, multiplier)) return false;
    for (int k = 0; k < ctx->active_count; ++k) dot__mechanic_tune(m, ctx->active[k]);
    pass.sums = NULL;
    dot__pass_run(&pass, NULL);
    dot__scratch_end(ctx, mark);
    return true;
}

double dot_mechanic_scale(const dot_mechanic *m, int lane)
{
    return m && dot__lane_ok(m->state.ctx, "dot_mechanic_scale", lane, false) ? m->now[lane].scale : (double)NAN;
}

dot_state *dot_mechanic_state(dot_mechanic *m) { return m ? &m->state : NULL; }

/* ---- sharpness-aware minimisation ---- */

struct dot_sam { dot_state state; dot_sam_options options; double *sums, *scale; };

dot_sam_options dot_sam_defaults(void)
{
    dot_sam_options o = { DOT__MAGIC_SAM, 0.05, false, 0, 1e-12 };
    return o;
}

dot_sam *dot_sam_create(dot_optimizer *opt, const dot_sam_options *options)
{
    static const char *const f = "dot_sam_create";
    dot_sam_options o = options ? *options : dot_sam_defaults();
    if (!opt || !dot_ok(opt->ctx)) return NULL;
    opt->ctx->function = f;
    if (!dot__magic_ok(opt->ctx, f, o.magic, DOT__MAGIC_SAM) || !dot__option_ok(opt->ctx, f, "rho", o.rho, 0, DOT__HUGE, false)
        || !dot__option_ok(opt->ctx, f, "eta", o.eta, 0, DOT__HUGE, false)
        || !dot__option_ok(opt->ctx, f, "eps", o.eps, DOT__TINIEST, DOT__HUGE, false)) return NULL;
    dot_sam *sam = (dot_sam *)dot__state_new(opt->ctx, sizeof *sam);
    if (!sam) return NULL;
    sam->options = o;
    if (!dot__state_open(&sam->state, opt->layer, true, "sam", 0, opt->ctx->lanes * (DOT__PASS_SUMS + 1))) return NULL;
    sam->sums = sam->state.number;
    sam->scale = sam->sums + opt->ctx->lanes * DOT__PASS_SUMS;
    return sam;
}

DOT__INLINE double dot__sam_size(const dot_sam_options *o, double w) { return o->adaptive ? fabs(w) + o->eta : 1; }

DOT__INLINE void dot__sam_norm_range(dot_dtype dtype, const dot_sam_options *o, const void *w, const void *g, int64_t i, int64_t end, double *sum)
{
    for (; i < end; ++i) {
        double x = dot__sam_size(o, dot__load(w, dtype, i)) * dot__load(g, dtype, i);
        *sum += x * x;
    }
}

DOT__INLINE void dot__sam_move_range(dot_dtype dtype, const dot_sam_options *o, double scale, const void *w, const void *g, void *out, int64_t i, int64_t end)
{
    for (; i < end; ++i) {
        double x = dot__load(w, dtype, i), size = dot__sam_size(o, x);
        dot__store(out, dtype, i, x + scale * size * size * dot__load(g, dtype, i));
    }
}

static void dot__sam_range(const dot__pass *pass, const dot__stretch *r)
{
    const dot_sam *sam = (const dot_sam *)pass->user;
    const dot_tensor *w = r->kept->tensor, *g = w->has_grad ? w->grad : NULL;
    if (r->sum) {
        if (g) DOT__TYPED(w->dtype, dot__sam_norm_range, &sam->options, dot__at(w, r->lane), dot__at(g, r->lane), r->first, r->end, r->sum);
    }
    else if (!g) dot__range_copy(r->kept->copy, w, r);
    else DOT__TYPED(w->dtype, dot__sam_move_range, &sam->options, sam->scale[r->lane], dot__at(w, r->lane), dot__at(g, r->lane),
                    dot__at(r->kept->copy, r->lane), r->first, r->end);
}

bool dot_sam_ascend(dot_sam *sam)
{
    if (!sam || !dot__state_here(&sam->state, "dot_sam_ascend")) return false;
    dot_context *ctx = sam->state.ctx;
    dot__pass pass = dot__pass_of(&sam->state, dot__sam_range);
    pass.user = sam;
    if (!dot__pass_run(&pass, sam->sums)) return false;
    for (int lane = 0; lane < ctx->lanes; ++lane)
        sam->scale[lane] = sam->options.rho / (sqrt(sam->sums[lane * DOT__PASS_SUMS]) + sam->options.eps);
    pass.sums = NULL;
    dot__pass_run(&pass, NULL);
    dot__state_swap(&sam->state);
    return dot_zero_grad(sam->state.layer);
}

bool dot_sam_descend(dot_sam *sam)
{
    if (!sam) return false;
    if (sam->state.away) dot__state_swap(&sam->state);          /* also after an error: nothing is lost */
    else dot__fail(sam->state.ctx, DOT_ERROR_STATE, "dot_sam_descend: the parameters are where they were, expected dot_sam_ascend first");
    return dot_ok(sam->state.ctx);
}

/* ---- guard and loss scaling ----
   Lanes that have skipped different steps have different step counts, of which the optimizer holds the greatest: the guard keeps how
   far each lane is behind, and steps lanes together that are behind alike. A clock is a parameter's step count or the
   optimizer's own. */

enum { DOT__CLEAN, DOT__IN_A_ROW, DOT__SKIPS, DOT__SKIPPED, DOT__GUARD_COUNTERS };

struct dot_guard {
    dot_state state;                    /* counters: [lane][DOT__GUARD_COUNTERS], [lane][clock] behind; numbers: [lane] scale */
    dot_optimizer *opt;
    dot_guard_options options;
    int clocks;
    int64_t *behind;
    dot_tensor *scale;
    bool checked, has_loss;             /* dot_guard_unscale has run */
    bool *good, *stopped, *done, *had;  /* [lane], [lane], [lane], [slot] */
    double *factor, *clip;              /* [lane] */
};

dot_guard_options dot_guard_defaults(void)
{
    dot_guard_options o = { DOT__MAGIC_GUARD, 1, 1, 1, 2000, 0 };
    return o;
}

dot_guard_options dot_guard_loss_scaling(void)
{
    dot_guard_options o = { DOT__MAGIC_GUARD, 65536, 2, 0.5, 2000, 0 };
    return o;
}

static bool dot__guard_options_ok(dot_context *ctx, const dot_guard_options *o)
{
    static const char *const f = "dot_guard_create";
    return dot__magic_ok(ctx, f, o->magic, DOT__MAGIC_GUARD) && dot__option_ok(ctx, f, "scale", o->scale, 1e-30, 1e30, false)
        && dot__option_ok(ctx, f, "growth", o->growth, 1, 1e6, false) && dot__option_ok(ctx, f, "backoff", o->backoff, 1e-6, 1, false)
        && dot__count_ok(ctx, f, "interval", o->interval, 1) && dot__count_ok(ctx, f, "max_skips", o->max_skips, 0);
}

dot_guard *dot_guard_create(dot_optimizer *opt, const dot_guard_options *options)
{
    dot_guard_options o = options ? *options : dot_guard_defaults();
    if (!opt || !dot_ok(opt->ctx)) return NULL;
    dot_context *ctx = opt->ctx;
    ctx->function = "dot_guard_create";
    if (!dot__guard_options_ok(ctx, &o)) return NULL;
    dot_guard *guard = (dot_guard *)dot__state_new(ctx, sizeof *guard);
    if (!guard) return NULL;
    size_t lanes = (size_t)ctx->lanes;
    guard->opt = opt;
    guard->options = o;
    guard->clocks = opt->slots + 1;
    if (!dot__state_open(&guard->state, NULL, false, "guard", ctx->lanes * (DOT__GUARD_COUNTERS + guard->clocks), ctx->lanes)) return NULL;
    guard->behind = guard->state.counter + lanes * DOT__GUARD_COUNTERS;
    guard->scale = dot__persistent_tensor(ctx, ctx->dtype, 0, NULL, 1);
    guard->good = (bool *)dot__new(ctx, (3 * lanes + (size_t)opt->slots) * sizeof(bool));
    guard->factor = (double *)dot__new(ctx, 2 * lanes * sizeof(double));
    if (!guard->scale || !guard->good || !guard->factor) return NULL;
    guard->stopped = guard->good + lanes;
    guard->done = guard->stopped + lanes;
    guard->had = guard->done + lanes;
    guard->clip = guard->factor + lanes;
    for (int lane = 0; lane < ctx->lanes; ++lane) guard->state.number[lane] = o.scale;
    return guard;
}

static int64_t *dot__guard_counter(const dot_guard *guard, int lane, int which) { return &guard->state.counter[lane * DOT__GUARD_COUNTERS + which]; }
static int64_t *dot__clock(dot_optimizer *opt, int i) { return i < opt->slots ? &opt->slot[i].t : &opt->steps; }

dot_tensor *dot_guard_loss(dot_guard *guard, dot_tensor *loss)
{
    if (!guard || !loss || !dot_ok(guard->state.ctx)) return NULL;
    const dot_guard_options *o = &guard->options;
    if (o->scale == 1 && o->growth == 1 && o->backoff == 1) return loss;
    for (int lane = 0; lane < guard->state.ctx->lanes; ++lane) dot__store(dot__at(guard->scale, lane), guard->scale->dtype, 0, guard->state.number[lane]);
    return dot_mul(loss, guard->scale);
}

bool dot_guard_unscale(dot_guard *guard)
{
    if (!guard || !dot_ok(guard->state.ctx)) return false;
    dot_context *ctx = guard->state.ctx;
    ctx->function = "dot_guard_unscale";
    if (guard->checked) {
        dot__fail(ctx, DOT_ERROR_STATE, "dot_guard_unscale: called twice in a step, expected dot_guard_step in between");
        return false;
    }
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        guard->factor[lane] = 1 / guard->state.number[lane];
        guard->good[lane] = false;
    }
    guard->checked = dot__scale_grad(guard->opt, guard->factor, guard->good);
    return guard->checked;
}

static void dot__lanes_rebuild(dot_context *ctx)
{
    ctx->active_count = 0;
    for (int lane = 0; lane < ctx->lanes; ++lane) if (!ctx->lane_stopped[lane]) ctx->active[ctx->active_count++] = lane;
}

/* Before the steps of the groups, and again before each of them: what a step uses up. */
static void dot__guard_keep(dot_guard *guard, bool back)
{
    dot_optimizer *opt = guard->opt;
    for (int i = 0; i < opt->slots; ++i)
        if (back) opt->slot[i].tensor->has_grad = guard->had[i]; else guard->had[i] = opt->slot[i].tensor->has_grad;
    for (int lane = 0; lane < opt->ctx->lanes; ++lane)
        if (back) opt->clip[lane] = guard->clip[lane]; else guard->clip[lane] = opt->clip[lane];
    if (back) opt->has_loss = guard->has_loss; else guard->has_loss = opt->has_loss;
}

/* Steps `lead` and the good lanes that stand at the same clocks. `behind` holds the lanes' clocks themselves meanwhile. */
static bool dot__guard_group(dot_guard *guard, int lead, double multiplier)
{
    dot_optimizer *opt = guard->opt;
    dot_context *ctx = opt->ctx;
    const int64_t *clock = guard->behind + lead * guard->clocks;
    size_t bytes = (size_t)guard->clocks * sizeof(int64_t);
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        bool member = !guard->stopped[lane] && guard->good[lane] && memcmp(guard->behind + lane * guard->clocks, clock, bytes) == 0;
        ctx->lane_stopped[lane] = !member || guard->done[lane];
    }
    dot__lanes_rebuild(ctx);
    for (int i = 0; i < guard->clocks; ++i) *dot__clock(opt, i) = clock[i];
    dot__guard_keep(guard, true);
    bool ok = dot_optimizer_step(opt, multiplier);
    for (int k = 0; k < ctx->active_count; ++k) {
        guard->done[ctx->active[k]] = true;
        for (int i = 0; i < guard->clocks; ++i) guard->behind[ctx->active[k] * guard->clocks + i] = *dot__clock(opt, i);
    }
    return ok;
}

static bool dot__guard_groups(dot_guard *guard, double multiplier)
{
    dot_optimizer *opt = guard->opt;
    dot_context *ctx = opt->ctx;
    bool ok = true;
    dot__guard_keep(guard, false);
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        guard->done[lane] = false;
        guard->stopped[lane] = ctx->lane_stopped[lane];
        for (int i = 0; i < guard->clocks; ++i) guard->behind[lane * guard->clocks + i] = *dot__clock(opt, i) - guard->behind[lane * guard->clocks + i];
    }
    for (int lane = 0; lane < ctx->lanes && ok; ++lane)
        if (!guard->stopped[lane] && guard->good[lane] && !guard->done[lane]) ok = dot__guard_group(guard, lane, multiplier);
    for (int lane = 0; lane < ctx->lanes; ++lane) ctx->lane_stopped[lane] = guard->stopped[lane];
    dot__lanes_rebuild(ctx);
    for (int i = 0; i < guard->clocks; ++i) {
        int64_t latest = 0;
        for (int k = 0; k < ctx->active_count; ++k) latest = dot__max(latest, guard->behind[ctx->active[k] * guard->clocks + i]);
        *dot__clock(opt, i) = latest;
        for (int lane = 0; lane < ctx->lanes; ++lane) guard->behind[lane * guard->clocks + i] = latest - guard->behind[lane * guard->clocks + i];
    }
    return ok;
}

/* The lane's counts and scale after a step; false: it has skipped too often. */
static bool dot__guard_count(dot_guard *guard, int lane)
{
    const dot_guard_options *o = &guard->options;
    int64_t *c = dot__guard_counter(guard, lane, 0);
    double *scale = &guard->state.number[lane];
    c[DOT__SKIPPED] = !guard->good[lane];
    if (guard->good[lane]) {
        c[DOT__IN_A_ROW] = 0;
        if (++c[DOT__CLEAN] < o->interval) return true;
        c[DOT__CLEAN] = 0;
        *scale *= o->growth;
        return true;
    }
    c[DOT__CLEAN] = 0;
    c[DOT__SKIPS]++;
    *scale *= o->backoff;
    return ++c[DOT__IN_A_ROW] < o->max_skips || o->max_skips == 0;
}

bool dot_guard_step(dot_guard *guard, double multiplier)
{
    if (!guard || !dot_ok(guard->state.ctx) || (!guard->checked && !dot_guard_unscale(guard))) return false;
    dot_context *ctx = guard->state.ctx;
    dot_optimizer *opt = guard->opt;
    guard->checked = false;
    if (!dot__step_ok(opt, multiplier) || !dot__guard_groups(guard, multiplier)) return false;
    opt->has_loss = false;
    for (int lane = 0; lane < ctx->lanes; ++lane) opt->clip[lane] = 1;
    dot_zero_grad(opt->layer);
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        if (ctx->lane_stopped[lane] || dot__guard_count(guard, lane)) continue;
        if (ctx->active_count == 1) {
            dot__fail(ctx, DOT_ERROR_STATE, "dot_guard_step: lane %d skipped " DOT__I64 " steps in a row, expected finite gradients", lane,
                      DOT__LL(*dot__guard_counter(guard, lane, DOT__IN_A_ROW)));
            return false;
        }
        dot__log(ctx, "dot_guard_step: lane %d is stopped after " DOT__I64 " skipped steps in a row", lane,
                 DOT__LL(*dot__guard_counter(guard, lane, DOT__IN_A_ROW)));
        dot_lane_stop(ctx, lane);
    }
    return true;
}

static bool dot__guard_lane_ok(const dot_guard *guard, const char *function, int lane)
{
    return guard && dot__lane_ok(guard->state.ctx, function, lane, false);
}

double dot_guard_scale(const dot_guard *guard, int lane)
{
    return dot__guard_lane_ok(guard, "dot_guard_scale", lane) ? guard->state.number[lane] : (double)NAN;
}

int64_t dot_guard_skips(const dot_guard *guard, int lane)
{
    return dot__guard_lane_ok(guard, "dot_guard_skips", lane) ? *dot__guard_counter(guard, lane, DOT__SKIPS) : 0;
}

bool dot_guard_skipped(const dot_guard *guard, int lane)
{
    return dot__guard_lane_ok(guard, "dot_guard_skipped", lane) && *dot__guard_counter(guard, lane, DOT__SKIPPED) != 0;
}

dot_state *dot_guard_state(dot_guard *guard) { return guard ? &guard->state : NULL; }

/* ---- outliers ---- */

dot_outlier dot_outlier_defaults(void)
{
    dot_outlier o = { DOT__MAGIC_OUTLIER, 4, 0.99, 20, 10, 0, 0, 0, 0, 0 };
    return o;
}

bool dot_outlier_observe(dot_outlier *o, double x)
{
    if (!o || o->magic != DOT__MAGIC_OUTLIER) return false;
    double deviation = sqrt(o->variance), d = x - o->mean;
    o->z = !dot__finite(x) ? (double)NAN : d == 0 ? 0 : d / deviation;
    bool outlier = !dot__finite(x) || (o->count >= o->warmup && o->z > o->threshold);
    o->outliers = outlier ? o->outliers + 1 : 0;
    if (outlier && o->outliers > o->patience && dot__finite(x)) {
        o->count = o->outliers = 0;                             /* this is how things are now */
        o->variance = o->mean = 0;
        d = x;
    }
    else if (outlier) return true;
    double share = 1 / (double)++o->count;
    if (share < 1 - o->decay) share = 1 - o->decay;
    o->mean += share * d;
    o->variance = (1 - share) * (o->variance + share * d * d);
    return outlier;
}

/* ---- parameter groups ---- */

static bool dot__groups_fill(dot_parameter_group *groups, const char *const *patterns, int count, double first, double factor, double decay)
{
    if (!groups || !patterns || count < 1 || !(first >= 0) || !(factor >= 0) || !(decay >= 0)) return false;
    if (!dot__finite(first) || !dot__finite(factor) || !dot__finite(decay)) return false;
    for (int i = 0; i < count; ++i) if (!patterns[i]) return false;
    for (int i = 0; i < count; ++i) {
        groups[i].pattern = patterns[i];
        groups[i].kinds = 0;
        groups[i].lr = first * pow(factor, i);
        groups[i].weight_decay = decay;
    }
    return true;
}

bool dot_groups_layerwise(dot_parameter_group *groups, const char *const *patterns, int count, double lr, double decay, double weight_decay)
{
    if (!(decay > 0)) return false;
    return dot__groups_fill(groups, patterns, count, lr * pow(decay, count - 1), 1 / decay, weight_decay);
}

bool dot_groups_discriminative(dot_parameter_group *groups, const char *const *patterns, int count, double first, double last,
                               double weight_decay)
{
    if (!(first > 0) || !(last > 0)) return false;
    return dot__groups_fill(groups, patterns, count, first, count > 1 ? pow(last / first, 1.0 / (count - 1)) : 1, weight_decay);
}

/* ---- telemetry ---- */

struct dot_telemetry {
    dot_state state;
    dot_optimizer *opt;
    int64_t every, calls, step;
    int moment;                         /* which state is the first moment; -1: none */
    bool measuring;
    double *sums, *after;               /* [lane][DOT__PASS_SUMS]: theta^2, g^2, m^2, g m; then change^2 */
    int64_t *clipped;                   /* [lane] */
};

static int dot__first_moment(const dot_optimizer *opt)
{
    if (opt->factored) return 2;
    const char *names = opt->options.state == DOT_STATE_FULL ? dot__rule_names[opt->rule] : NULL;
    for (int i = 0; names; ++i) {
        size_t length = strcspn(names, ",");
        if ((length == 7 && strncmp(names, "exp_avg", 7) == 0) || (length == 15 && strncmp(names, "momentum_buffer", 15) == 0)) return i;
        names = names[length] ? names + length + 1 : NULL;
    }
    return -1;
}

dot_telemetry *dot_telemetry_create(dot_optimizer *opt, int64_t every)
{
    if (!opt || !dot_ok(opt->ctx) || !dot__count_ok(opt->ctx, "dot_telemetry_create", "every", every, 1)) return NULL;
    opt->ctx->function = "dot_telemetry_create";
    dot_telemetry *t = (dot_telemetry *)dot__state_new(opt->ctx, sizeof *t);
    if (!t) return NULL;
    t->opt = opt;
    t->every = every;
    t->step = -1;
    t->moment = dot__first_moment(opt);
    if (!dot__state_open(&t->state, opt->layer, false, "telemetry", opt->ctx->lanes, 2 * opt->ctx->lanes * DOT__PASS_SUMS)) return NULL;
    t->sums = t->state.number;
    t->after = t->sums + opt->ctx->lanes * DOT__PASS_SUMS;
    t->clipped = t->state.counter;
    return t;
}

DOT__INLINE void dot__telemetry_sums(dot_dtype dtype, const void *w, const void *g, const void *m, int64_t i, int64_t end, double *sum)
{
    for (; i < end; ++i) {
        double x = dot__load(w, dtype, i), y = g ? dot__load(g, dtype, i) : 0, z = m ? dot__load(m, dtype, i) : 0;
        sum[0] += x * x;
        sum[1] += y * y;
        sum[2] += z * z;
        sum[3] += y * z;
    }
}

DOT__INLINE void dot__telemetry_change(dot_dtype dtype, const void *w, const void *before, int64_t i, int64_t end, double *sum)
{
    for (; i < end; ++i) {
        double x = dot__load(w, dtype, i) - dot__load(before, dtype, i);
        *sum += x * x;
    }
}

static void dot__telemetry_range(const dot__pass *pass, const dot__stretch *r)
{
    const dot_telemetry *t = (const dot_telemetry *)pass->user;
    const dot_tensor *w = r->kept->tensor;
    if (pass->flag) {
        DOT__TYPED(w->dtype, dot__telemetry_change, dot__at(w, r->lane), dot__at(r->kept->copy, r->lane), r->first, r->end, r->sum);
        return;
    }
    const dot_tensor *m = t->moment < 0 ? NULL : t->opt->slot[r->kept - t->state.kept].state[t->moment];
    if (m && (m->size != w->size || m->dtype != w->dtype)) m = NULL;
    dot__range_copy(r->kept->copy, w, r);
    DOT__TYPED(w->dtype, dot__telemetry_sums, dot__at(w, r->lane), w->has_grad ? dot__at(w->grad, r->lane) : NULL,
               m ? dot__at(m, r->lane) : NULL, r->first, r->end, r->sum);
}

bool dot_telemetry_before(dot_telemetry *t)
{
    if (!t || !dot_ok(t->state.ctx)) return false;
    for (int lane = 0; lane < t->state.ctx->lanes; ++lane) t->clipped[lane] += t->opt->clip[lane] < 1;
    t->measuring = t->calls++ % t->every == 0;
    if (!t->measuring) return true;
    t->state.ctx->function = "dot_telemetry_before";
    dot__pass pass = dot__pass_of(&t->state, dot__telemetry_range);
    pass.user = t;
    return dot__pass_run(&pass, t->sums);
}

bool dot_telemetry_after(dot_telemetry *t)
{
    if (!t || !dot_ok(t->state.ctx)) return false;
    if (!t->measuring) return true;
    t->state.ctx->function = "dot_telemetry_after";
    dot__pass pass = dot__pass_of(&t->state, dot__telemetry_range);
    pass.user = t;
    pass.flag = true;
    t->measuring = false;
    t->step = t->opt->steps;
    return dot__pass_run(&pass, t->after);
}

dot_telemetry_report dot_telemetry_latest(const dot_telemetry *t, int lane)
{
    dot_telemetry_report r = { -1, (double)NAN, (double)NAN, 0 };
    if (!t || !dot__lane_ok(t->state.ctx, "dot_telemetry_latest", lane, false)) return r;
    const double *sum = t->sums + lane * DOT__PASS_SUMS;
    r.step = t->step;
    r.clipped = t->calls > 0 ? (double)t->clipped[lane] / (double)t->calls : 0;
    if (t->step < 0) return r;
    r.update_ratio = sqrt(t->after[lane * DOT__PASS_SUMS] / sum[0]);
    r.cosine = sum[3] / sqrt(sum[1] * sum[2]);
    return r;
}

/* ==== [12 files] =================================================================================== */

/* ---- the operating system ---- */

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>

#ifdef _WIN32
#include <io.h>
#include <process.h>

/* What <windows.h> says, without the rest of it. */
#ifdef __cplusplus
extern "C"
#endif
__declspec(dllimport) int __stdcall MoveFileExA(const char *from, const char *to, unsigned long flags);

static int dot__os_open(const char *path, bool create)
{
    int mode = create ? _O_WRONLY | _O_CREAT | _O_EXCL : _O_RDONLY;
    return _open(path, mode | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
}

static bool dot__os_size(int fd, int64_t *size)
{
    struct _stat64 status;
    if (_fstat64(fd, &status) != 0 || (status.st_mode & _S_IFMT) != _S_IFREG) return false;
    *size = (int64_t)status.st_size;
    return true;
}

static int64_t dot__os_read(int fd, void *to, size_t bytes)          { return _read(fd, to, (unsigned)bytes); }
static int64_t dot__os_write(int fd, const void *from, size_t bytes) { return _write(fd, from, (unsigned)bytes); }
static bool    dot__os_seek(int fd, int64_t at)                      { return _lseeki64(fd, at, SEEK_SET) == at; }
static bool    dot__os_sync(int fd)                                  { return _commit(fd) == 0; }
static bool    dot__os_close(int fd)                                 { return _close(fd) == 0; }
static long    dot__os_process(void)                                 { return (long)_getpid(); }

static bool dot__os_rename(const char *from, const char *to)
{
    if (MoveFileExA(from, to, 1 | 8)) return true;      /* MOVEFILE_REPLACE_EXISTING | MOVEFILE_WRITE_THROUGH */
    errno = EACCES;
    return false;
}

static bool dot__os_sync_folder(const char *folder) { (void)folder; return true; }

#else
#include <unistd.h>     /* what is used of it is declared under -std=c99 too; pread and fileno are not */

static int dot__os_open(const char *path, bool create)
{
    int mode = create ? O_WRONLY | O_CREAT | O_EXCL : O_RDONLY | O_NONBLOCK;   /* do not wait for a pipe's writer */
#ifdef O_CLOEXEC
    mode |= O_CLOEXEC;
#endif
    return open(path, mode, 0666);
}

static bool dot__os_size(int fd, int64_t *size)
{
    struct stat status;
    if (fstat(fd, &status) != 0 || !S_ISREG(status.st_mode)) return false;
    *size = (int64_t)status.st_size;
    return true;
}

static int64_t dot__os_read(int fd, void *to, size_t bytes)          { return (int64_t)read(fd, to, bytes); }
static int64_t dot__os_write(int fd, const void *from, size_t bytes) { return (int64_t)write(fd, from, bytes); }
static bool    dot__os_seek(int fd, int64_t at)      { return (int64_t)lseek(fd, (off_t)at, SEEK_SET) == at; }
static bool    dot__os_close(int fd)                 { return close(fd) == 0; }
static long    dot__os_process(void)                 { return (long)getpid(); }
static bool    dot__os_rename(const char *from, const char *to) { return rename(from, to) == 0; }

static bool dot__os_sync(int fd)
{
#ifdef F_FULLFSYNC                                      /* macOS: fsync alone stops at the disk's cache */
    if (fcntl(fd, F_FULLFSYNC) == 0) return true;
#endif
    return fsync(fd) == 0;
}

/* Makes a rename last. A folder that may not be read, or a file system that cannot flush folders, is no error. */
static bool dot__os_sync_folder(const char *folder)
{
    int fd = dot__os_open(folder, false);
    if (fd < 0) return errno == EACCES;
    bool good = fsync(fd) == 0 || errno == EINVAL;
    return dot__os_close(fd) && good;
}
#endif

static bool dot__big_endian(void)
{
    const uint16_t one = 1;
    return *(const unsigned char *)&one == 0;
}

/* Reverses the bytes of each word: files are little-endian. */
static void dot__swap_words(unsigned char *bytes, size_t count, size_t word)
{
    for (size_t at = 0; at < count; at += word)
        for (size_t i = 0; i < word / 2; ++i) {
            unsigned char byte = bytes[at + i];
            bytes[at + i] = bytes[at + word - 1 - i];
            bytes[at + word - 1 - i] = byte;
        }
}

/* ---- reading ---- */

#define DOT__IO_CHUNK ((size_t)1 << 30)     /* the most that every system moves in one call */

typedef struct dot__file {
    dot_context *ctx;
    const char *function, *path;            /* for messages; not owned */
    int fd;
    int64_t size;
} dot__file;

static const char *dot__file_reason(void) { return errno ? strerror(errno) : "it ends early"; }

static void dot__file_close(dot__file *file) { dot__os_close(file->fd); }

static bool dot__file_open(dot__file *file, dot_context *ctx, const char *function, const char *path)
{
    ctx->function = function;               /* for out-of-memory sentences */
    file->ctx = ctx;
    file->function = function;
    file->path = path;
    file->fd = path ? dot__os_open(path, false) : -1;
    if (!path) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: path is NULL", function);
    } else if (file->fd < 0) {
        dot__fail(ctx, DOT_ERROR_FILE, "%s: %s: cannot open it: %s", function, path, dot__file_reason());
    } else if (!dot__os_size(file->fd, &file->size)) {
        dot__fail(ctx, DOT_ERROR_FILE, "%s: %s: not a regular file", function, path);
        dot__file_close(file);
        file->fd = -1;
    }
    return file->fd >= 0;
}

static bool dot__file_read(const dot__file *file, int64_t at, void *to, size_t bytes)
{
    bool good = dot__os_seek(file->fd, at);
    for (char *next = (char *)to; good && bytes > 0;) {
        int64_t n = dot__os_read(file->fd, next, bytes < DOT__IO_CHUNK ? bytes : DOT__IO_CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = 0;
        if (!(good = n > 0)) break;
        next += n;
        bytes -= (size_t)n;
    }
    if (!good)
        dot__fail(file->ctx, DOT_ERROR_FILE, "%s: %s: cannot read it: %s", file->function, file->path, dot__file_reason());
    return good;
}

/* ---- drafts: a file that takes its place when it is whole, and leaves the old one in place until then ---- */

typedef struct dot__draft {
    dot_context *ctx;
    const char *function, *path;
    char *temporary;            /* beside `path`, so that the rename stays within one file system */
    int fd;
} dot__draft;

static bool dot__draft_open(dot__draft *draft, dot_context *ctx, const char *function, const char *path)
{
    size_t size = strlen(path) + 48;
    draft->ctx = ctx;
    draft->function = function;
    draft->path = path;
    draft->temporary = (char *)dot__new(ctx, size);
    if (!draft->temporary) return false;
    draft->fd = -1;
    errno = EEXIST;                                     /* left by a crash, or another thread's */
    for (int n = 0; n < 100 && draft->fd < 0 && errno == EEXIST; ++n) {
        snprintf(draft->temporary, size, "%s.tmp.%ld.%d", path, dot__os_process(), n);
        draft->fd = dot__os_open(draft->temporary, true);
    }
    if (draft->fd >= 0) return true;
    dot__fail(ctx, DOT_ERROR_FILE, "%s: cannot create %s: %s", function, draft->temporary, dot__file_reason());
    dot__delete(ctx, draft->temporary);
    return false;
}

static bool dot__draft_write(dot__draft *draft, const void *from, size_t bytes)
{
    for (const char *next = (const char *)from; bytes > 0;) {
        int64_t n = dot__os_write(draft->fd, next, bytes < DOT__IO_CHUNK ? bytes : DOT__IO_CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) {
            dot__fail(draft->ctx, DOT_ERROR_FILE, "%s: cannot write %s: %s", draft->function, draft->temporary,
                      dot__file_reason());
            return false;
        }
        next += n;
        bytes -= (size_t)n;
    }
    return true;
}

/* Ends the draft: as the file at `path`, or, if it is not `whole` or cannot be completed, as nothing. */
static bool dot__draft_close(dot__draft *draft, bool whole)
{
    bool good = whole && dot__os_sync(draft->fd);
    good = dot__os_close(draft->fd) && good;
    good = good && dot__os_rename(draft->temporary, draft->path);
    if (!good) {
        if (whole) dot__fail(draft->ctx, DOT_ERROR_FILE, "%s: cannot flush %s and rename it to %s: %s", draft->function,
                             draft->temporary, draft->path, dot__file_reason());
        remove(draft->temporary);
    } else {
        char *slash = strrchr(draft->temporary, '/');
        if (slash) slash[slash == draft->temporary] = 0;
        good = dot__os_sync_folder(slash ? draft->temporary : ".");
        if (!good) dot__fail(draft->ctx, DOT_ERROR_FILE, "%s: %s is written, but its folder cannot be flushed: %s",
                             draft->function, draft->path, dot__file_reason());
    }
    dot__delete(draft->ctx, draft->temporary);
    return good;
}

/* ---- sorted arrays: a merge sort, since qsort may allocate behind the allocator's back, and hostile input slow it down ---- */

static bool dot__sort(dot_context *ctx, void *items, size_t count, size_t size, int (*compare)(const void *, const void *))
{
    char *from = (char *)items, *to = (char *)dot__new(ctx, count * size + 1), *scratch = to;
    if (!scratch) return false;
    for (size_t width = 1; width < count; width *= 2) {
        for (size_t begin = 0; begin < count; begin += 2 * width) {
            size_t middle = count - begin < width ? count : begin + width;
            size_t end = count - middle < width ? count : middle + width;
            for (size_t at = begin, a = begin, b = middle; at < end; ++at) {
                bool first = a < middle && (b == end || compare(from + a * size, from + b * size) <= 0);
                memcpy(to + at * size, from + (first ? a++ : b++) * size, size);
            }
        }
        char *sorted = to;
        to = from;
        from = sorted;
    }
    if (from == scratch) memcpy(items, from, count * size);
    dot__delete(ctx, scratch);
    return true;
}

/* For structs whose first member is a name. */
static int dot__by_name(const void *a, const void *b)
{
    return strcmp(*(const char *const *)a, *(const char *const *)b);
}

/* Sorts by name; finds in `twice` a name that occurs twice, or NULL. */
static bool dot__sort_names(dot_context *ctx, void *items, size_t count, size_t size, const char **twice)
{
    const char *base = (const char *)items;
    *twice = NULL;
    if (!dot__sort(ctx, items, count, size, dot__by_name)) return false;
    for (size_t i = 1; i < count && !*twice; ++i)
        if (dot__by_name(base + (i - 1) * size, base + i * size) == 0) *twice = *(const char *const *)(base + i * size);
    return true;
}

static int dot__find_name(const void *items, int count, size_t size, const char *name)
{
    const char *found = (const char *)bsearch(&name, items, (size_t)count, size, dot__by_name);
    return found ? (int)((size_t)(found - (const char *)items) / size) : -1;
}

/* ---- the text of a safetensors header: JSON objects, strings, lists of integers; nothing else ---- */

#define DOT__ST_MAX_HEADER 100000000            /* the reference's limit */
#define DOT__ST_MAX_INTEGER 281474976710655     /* 2^48 - 1, that of its JSON schema */
#define DOT__ST_METADATA "__metadata__"

typedef struct dot__json {      /* a reader of text that ends with a zero byte, which no rule below accepts */
    const dot__file *file;
    char *text, *at;
} dot__json;

static bool dot__json_fail(dot__json *json, const char *expected)
{
    dot__fail(json->file->ctx, DOT_ERROR_FORMAT, "%s: %s: byte %lld of the header: expected %s", json->file->function,
              json->file->path, DOT__LL(json->at - json->text), expected);
    return false;
}

static bool dot__json_take(dot__json *json, char wanted)
{
    while (*json->at == ' ' || *json->at == '\t' || *json->at == '\n' || *json->at == '\r') ++json->at;
    if (*json->at != wanted) return false;
    ++json->at;
    return true;
}

static bool dot__json_need(dot__json *json, char wanted)
{
    char expected[] = "' '";
    expected[1] = wanted;
    return dot__json_take(json, wanted) || dot__json_fail(json, expected);
}

/* Bytes of the well-formed UTF-8 sequence at `s` (The Unicode Standard, table 3-7), or 0. */
static size_t dot__utf8_size(const char *s)
{
    unsigned char first = (unsigned char)s[0];
    if (first < 0x80) return first != 0;
    if (first < 0xc2 || first > 0xf4) return 0;
    size_t size = first < 0xe0 ? 2 : first < 0xf0 ? 3 : 4;
    unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    for (size_t i = 1; i < size; ++i) {
        if ((unsigned char)s[i] < low || (unsigned char)s[i] > high) return 0;
        low = 0x80;
        high = 0xbf;
    }
    return size;
}

static char *dot__utf8_put(char *out, uint32_t code)
{
    static const uint32_t leads[] = { 0, 0xc0, 0xe0, 0xf0 };
    int more = code < 0x80 ? 0 : code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *out++ = (char)(unsigned char)(leads[more] | code >> 6 * more);
    while (more-- > 0) *out++ = (char)(unsigned char)(0x80 | (code >> 6 * more & 0x3f));
    return out;
}

/* \uXXXX, the reader being at the u. */
static bool dot__json_unit(dot__json *json, uint32_t *unit)
{
    static const char digits[] = "0123456789abcdef0123456789ABCDEF";
    *unit = 0;
    for (int i = 1; i <= 4; ++i) {
        const char *digit = json->at[i] ? strchr(digits, json->at[i]) : NULL;
        if (!digit) return dot__json_fail(json, "\\u and four hexadecimal digits");
        *unit = *unit << 4 | ((uint32_t)(digit - digits) & 15);
    }
    json->at += 5;
    return true;
}

/* What follows a backslash. */
static bool dot__json_escape(dot__json *json, char **out)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (*json->at != 'u') {
        const char *name = *json->at ? strchr(names, *json->at) : NULL;
        if (!name) return dot__json_fail(json, "a known escape");
        *(*out)++ = values[name - names];
        ++json->at;
        return true;
    }
    uint32_t code, second;
    if (!dot__json_unit(json, &code)) return false;
    if (code >= 0xd800 && code < 0xdc00) {
        if (json->at[0] != '\\' || json->at[1] != 'u') return dot__json_fail(json, "the second half of a surrogate pair");
        ++json->at;
        if (!dot__json_unit(json, &second)) return false;
        if (second < 0xdc00 || second > 0xdfff) return dot__json_fail(json, "the second half of a surrogate pair");
        code = 0x10000 + ((code - 0xd800) << 10) + (second - 0xdc00);
    } else if (code == 0 || (code >= 0xdc00 && code <= 0xdfff)) {
        return dot__json_fail(json, "no zero character and no second half of a surrogate pair before here");
    }
    *out = dot__utf8_put(*out, code);
    return true;
}

/* A string, unescaped in place (it only becomes shorter) and ended with a zero; or NULL. */
static const char *dot__json_string(dot__json *json)
{
    if (!dot__json_need(json, '"')) return NULL;
    char *begin = json->at, *out = begin;
    while (*json->at != '"') {
        if (*json->at == '\\') {
            ++json->at;
            if (!dot__json_escape(json, &out)) return NULL;
            continue;
        }
        size_t size = dot__utf8_size(json->at);
        if (size == 0 || (size == 1 && *json->at < 0x20)) {
            dot__json_fail(json, "UTF-8 text without control characters, and a closing quote");
            return NULL;
        }
        while (size-- > 0) *out++ = *json->at++;
    }
    ++json->at;
    *out = 0;
    return begin;
}

static bool dot__json_integer(dot__json *json, int64_t *value)
{
    static const char expected[] = "an integer from 0 to 281474976710655, without leading zeros";
    *value = 0;
    dot__json_take(json, ' ');                          /* for the blanks before */
    const char *begin = json->at;
    while (*json->at >= '0' && *json->at <= '9') {
        if (json->at > begin && *begin == '0') return dot__json_fail(json, expected);
        *value = *value * 10 + (*json->at - '0');
        if (*value > DOT__ST_MAX_INTEGER) return dot__json_fail(json, expected);
        ++json->at;
    }
    return json->at > begin || dot__json_fail(json, expected);
}

/* [a, b, ...]: up to `most` integers. */
static bool dot__json_integers(dot__json *json, int64_t *values, int most, int *count)
{
    *count = 0;
    if (!dot__json_need(json, '[')) return false;
    if (dot__json_take(json, ']')) return true;
    do {
        if (*count == most) return dot__json_fail(json, most == 2 ? "two integers" : "at most 8 integers");
        if (!dot__json_integer(json, &values[(*count)++])) return false;
    } while (dot__json_take(json, ','));
    return dot__json_need(json, ']');
}

/* ---- safetensors: the reader ---- */

/* The element types, in the reference's order: by growing alignment. */
static const struct { const char *name; int bits; int word; int dtype; } dot__st_types[] = {
    { "BOOL",  8, 1, -1 }, { "F4",       4, 1, -1 },     { "F6_E2M3", 6, 1, -1 },     { "F6_E3M2",     6, 1, -1 },
    { "U8",    8, 1, DOT_U8 }, { "I8",   8, 1, -1 },     { "F8_E5M2", 8, 1, -1 },     { "F8_E4M3",     8, 1, -1 },
    { "F8_E8M0", 8, 1, -1 }, { "F8_E4M3FNUZ", 8, 1, -1 }, { "F8_E5M2FNUZ", 8, 1, -1 }, { "I16",       16, 2, -1 },
    { "U16",  16, 2, -1 }, { "F16",     16, 2, -1 },     { "BF16",   16, 2, -1 },     { "I32",        32, 4, -1 },
    { "U32",  32, 4, -1 }, { "F32",     32, 4, DOT_F32 }, { "C64",    64, 4, -1 },     { "F64",        64, 8, DOT_F64 },
    { "I64",  64, 8, DOT_I64 }, { "U64", 64, 8, -1 } };
enum { DOT__ST_TYPES = (int)(sizeof dot__st_types / sizeof *dot__st_types) };

typedef struct dot__st_entry {
    dot_safetensors_entry view; /* its first member is the name */
    int type;
    int64_t begin, end;         /* of its bytes in the data */
} dot__st_entry;

typedef struct dot__st_pair { const char *key, *value; } dot__st_pair;

struct dot_safetensors {
    dot_context *ctx;
    dot_safetensors *next;      /* open file of the context */
    dot__file in;
    char *path, *header;        /* the header holds all the strings */
    int64_t data_begin, data_size;
    dot__st_entry *entries;     /* by name */
    dot__st_pair *pairs;        /* by key */
    int entry_count, pair_count;
};

/* The product of sizes >= 0, or false when it does not fit. */
static bool dot__product(int rank, const int64_t *shape, int64_t *product)
{
    *product = 1;
    for (int i = 0; i < rank; ++i) {
        if (shape[i] > 0 && *product > INT64_MAX / shape[i]) return false;
        *product *= shape[i];
    }
    return true;
}

/* Whether a number of bytes >= 0 fits size_t. */
static bool dot__fits_size(int64_t number) { return (int64_t)(size_t)number == number && (size_t)number < SIZE_MAX; }

/* {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}, in any order. */
static bool dot__st_parse_tensor(dot__json *json, dot__st_entry *entry)
{
    static const char *const keys[] = { "dtype", "shape", "data_offsets" };
    int64_t offsets[2] = { 0, 0 };
    int offset_count = 0;
    unsigned seen = 0;
    if (!dot__json_need(json, '{')) return false;
    do {
        const char *key = dot__json_string(json), *type;
        int which = 0;
        if (!key || !dot__json_need(json, ':')) return false;
        while (which < 3 && strcmp(key, keys[which]) != 0) ++which;
        if (which == 3 || (seen & 1u << which))
            return dot__json_fail(json, "each of the keys dtype, shape, data_offsets once and no other before here");
        seen |= 1u << which;
        if (which == 0) {
            if (!(type = dot__json_string(json))) return false;
            for (entry->type = 0; strcmp(type, dot__st_types[entry->type].name) != 0;)
                if (++entry->type == DOT__ST_TYPES) return dot__json_fail(json, "a known dtype before here");
        } else if (which == 1) {
            if (!dot__json_integers(json, entry->view.shape, DOT_MAX_RANK, &entry->view.rank)) return false;
        } else {
            if (!dot__json_integers(json, offsets, 2, &offset_count)) return false;
            if (offset_count != 2) return dot__json_fail(json, "two integers before here");
        }
    } while (dot__json_take(json, ','));
    if (seen != 7) return dot__json_fail(json, "the keys dtype, shape, data_offsets before here");
    entry->begin = offsets[0];
    entry->end = offsets[1];
    return dot__json_need(json, '}');
}

/* Whether dtype, shape and offsets fit each other and the data. */
static bool dot__st_check_tensor(const dot_safetensors *file, dot__st_entry *entry)
{
    dot_safetensors_entry *view = &entry->view;
    int64_t bits = dot__st_types[entry->type].bits, length = entry->end - entry->begin;
    const char *wrong = NULL;
    if (entry->begin > entry->end) wrong = "data_offsets that run backwards";
    else if (entry->end > file->data_size) wrong = "data_offsets that lie outside the file";
    else if (!dot__product(view->rank, view->shape, &view->count) || view->count > INT64_MAX / bits)
        wrong = "a shape whose product overflows";
    else if (view->count * bits % 8 != 0) wrong = "a size that is not whole bytes";
    else if (view->count * bits / 8 != length) wrong = "data_offsets that do not fit dtype and shape";
    else if (!dot__fits_size(length)) wrong = "a size that this machine cannot address";
    if (wrong) {
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: tensor \"%.80s\" has %s (data_offsets [%lld, %lld], %lld bytes of data)",
                  file->in.function, file->path, view->name, wrong, DOT__LL(entry->begin), DOT__LL(entry->end),
                  DOT__LL(file->data_size));
        return false;
    }
    view->dtype = dot__st_types[entry->type].name;
    view->bytes = (size_t)length;
    return true;
}

/* {"key": "value", ...} */
static bool dot__st_parse_metadata(dot_safetensors *file, dot__json *json)
{
    if (!dot__json_need(json, '{')) return false;
    if (dot__json_take(json, '}')) return true;
    do {
        dot__st_pair pair;
        if (!(pair.key = dot__json_string(json)) || !dot__json_need(json, ':') || !(pair.value = dot__json_string(json)))
            return false;
        file->pairs[file->pair_count++] = pair;
    } while (dot__json_take(json, ','));
    return dot__json_need(json, '}');
}

static bool dot__st_parse(dot_safetensors *file, dot__json *json, const char *end)
{
    bool metadata = false;
    if (*json->at != '{') return dot__json_fail(json, "'{'");
    ++json->at;
    if (!dot__json_take(json, '}')) {
        do {
            dot__st_entry entry;
            memset(&entry, 0, sizeof entry);
            if (!(entry.view.name = dot__json_string(json)) || !dot__json_need(json, ':')) return false;
            if (strcmp(entry.view.name, DOT__ST_METADATA) != 0) {
                if (!dot__st_parse_tensor(json, &entry) || !dot__st_check_tensor(file, &entry)) return false;
                file->entries[file->entry_count++] = entry;
            } else {
                if (metadata) return dot__json_fail(json, DOT__ST_METADATA " only once before here");
                metadata = true;
                if (!dot__st_parse_metadata(file, json)) return false;
            }
        } while (dot__json_take(json, ','));
        if (!dot__json_need(json, '}')) return false;
    }
    while (*json->at == ' ') ++json->at;
    return json->at == end || dot__json_fail(json, "only spaces to the end");
}

static int dot__st_by_offset(const void *a, const void *b)
{
    const dot__st_entry *x = (const dot__st_entry *)a, *y = (const dot__st_entry *)b;
    if (x->begin != y->begin) return x->begin < y->begin ? -1 : 1;
    return (x->end > y->end) - (x->end < y->end);
}

/* The tensors must cover the data without holes and overlaps; names and keys must be unique. Leaves both sorted. */
static bool dot__st_check(dot_safetensors *file)
{
    const char *twice = NULL;
    size_t entries = (size_t)file->entry_count, pairs = (size_t)file->pair_count;
    int64_t at = 0;
    if (!dot__sort(file->ctx, file->entries, entries, sizeof *file->entries, dot__st_by_offset)) return false;
    for (int i = 0; i < file->entry_count; at = file->entries[i++].end)
        if (file->entries[i].begin != at) {
            dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: tensor \"%.80s\" begins at byte %lld of the data, expected %lld",
                      file->in.function, file->path, file->entries[i].view.name, DOT__LL(file->entries[i].begin),
                      DOT__LL(at));
            return false;
        }
    if (at != file->data_size) {
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: the tensors take %lld bytes, but the file has %lld bytes of data",
                  file->in.function, file->path, DOT__LL(at), DOT__LL(file->data_size));
        return false;
    }
    if (!dot__sort_names(file->ctx, file->entries, entries, sizeof *file->entries, &twice)) return false;
    if (!twice && !dot__sort_names(file->ctx, file->pairs, pairs, sizeof *file->pairs, &twice)) return false;
    if (twice)
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: the name \"%.80s\" occurs twice", file->in.function, file->path, twice);
    return !twice;
}

/* Memory is bounded by the header's length, which is bounded by the file's: the shortest tensor,
   "":{"dtype":"U8","shape":[],"data_offsets":[0,0]} has 49 bytes, the shortest metadata, "":"", has 5 and a comma. */
static bool dot__st_read_header(dot_safetensors *file)
{
    unsigned char head[8];
    uint64_t length = 0;
    dot__json json;
    if (file->in.size < 8) {
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: %lld bytes, expected at least 8", file->in.function, file->path,
                  DOT__LL(file->in.size));
        return false;
    }
    if (!dot__file_read(&file->in, 0, head, 8)) return false;
    for (int i = 8; i-- > 0;) length = length << 8 | head[i];
    if (length > DOT__ST_MAX_HEADER || length > (uint64_t)file->in.size - 8) {
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: header of %llu bytes, expected at most %d and the %lld that follow",
                  file->in.function, file->path, (unsigned long long)length, DOT__ST_MAX_HEADER,
                  DOT__LL(file->in.size - 8));
        return false;
    }
    file->data_begin = 8 + (int64_t)length;
    file->data_size = file->in.size - file->data_begin;
    file->header = (char *)dot__new(file->ctx, (size_t)length + 1);
    file->entries = (dot__st_entry *)dot__new(file->ctx, ((size_t)length / 49 + 1) * sizeof *file->entries);
    file->pairs = (dot__st_pair *)dot__new(file->ctx, ((size_t)length / 6 + 1) * sizeof *file->pairs);
    if (!file->header || !file->entries || !file->pairs) return false;
    json.file = &file->in;
    json.text = json.at = file->header;
    return dot__file_read(&file->in, 8, file->header, (size_t)length) && dot__st_parse(file, &json, file->header + length) &&
           dot__st_check(file);
}

static dot_safetensors *dot__st_open(dot_context *ctx, const char *function, const char *path)
{
    dot__file in;
    if (!ctx || !dot__file_open(&in, ctx, function, path)) return NULL;
    dot_safetensors *file = (dot_safetensors *)dot__new(ctx, sizeof *file);
    if (!file) {
        dot__file_close(&in);
        return NULL;
    }
    file->ctx = ctx;
    file->in = in;
    file->next = ctx->files;
    ctx->files = file;
    file->path = (char *)dot__new(ctx, strlen(path) + 1);
    if (file->path) file->in.path = strcpy(file->path, path);
    if (file->path && dot__st_read_header(file)) return file;
    dot_safetensors_close(file);
    return NULL;
}

dot_safetensors *dot_safetensors_open(dot_context *ctx, const char *path)
{
    return dot__st_open(ctx, "dot_safetensors_open", path);
}

void dot_safetensors_close(dot_safetensors *file)
{
    if (!file) return;
    dot_safetensors **link = &file->ctx->files;
    while (*link != file) link = &(*link)->next;
    *link = file->next;
    dot__file_close(&file->in);
    dot__delete(file->ctx, file->path);
    dot__delete(file->ctx, file->header);
    dot__delete(file->ctx, file->entries);
    dot__delete(file->ctx, file->pairs);
    dot__delete(file->ctx, file);
}

static void dot__loggers_close(dot_context *ctx);

/* What dot_context_destroy calls: memory goes with the context, but open files would stay. */
static void dot__files_close(dot_context *ctx)
{
    dot__loggers_close(ctx);
    while (ctx->files) dot_safetensors_close(ctx->files);
    while (ctx->arrays) dot_npy_close(ctx->arrays);
}

int dot_safetensors_count(const dot_safetensors *file) { return file ? file->entry_count : 0; }

static const dot__st_entry *dot__st_entry_at(const dot_safetensors *file, const char *function, int index)
{
    if (index >= 0 && index < file->entry_count) return &file->entries[index];
    dot__fail(file->ctx, DOT_ERROR_ARGUMENT, "%s: %s: tensor %d, but the file has %d", function, file->path, index,
              file->entry_count);
    return NULL;
}

bool dot_safetensors_entry_at(const dot_safetensors *file, int index, dot_safetensors_entry *entry)
{
    if (!file || !entry) return false;
    const dot__st_entry *found = dot__st_entry_at(file, "dot_safetensors_entry_at", index);
    if (found) *entry = found->view;
    return found != NULL;
}

int dot_safetensors_find(const dot_safetensors *file, const char *name)
{
    return file && name ? dot__find_name(file->entries, file->entry_count, sizeof *file->entries, name) : -1;
}

const char *dot_safetensors_metadata(const dot_safetensors *file, const char *key)
{
    int index = file && key ? dot__find_name(file->pairs, file->pair_count, sizeof *file->pairs, key) : -1;
    return index < 0 ? NULL : file->pairs[index].value;
}

/* Whether `out` is room for the `expected` bytes or elements of a tensor. */
static bool dot__st_room(const dot_safetensors *file, const dot__st_entry *entry, const void *out, int64_t given,
                         int64_t expected, const char *unit)
{
    if (given == expected && (out || expected == 0)) return true;
    dot__fail(file->ctx, DOT_ERROR_ARGUMENT, "%s: %s: room for %lld %s%s, but tensor \"%.80s\" has %lld", file->in.function,
              file->path, DOT__LL(given), unit, out ? "" : " at NULL", entry->view.name, DOT__LL(expected));
    return false;
}

/* `bytes` of the tensor's data, from byte `at` of them, in this machine's byte order. */
static bool dot__st_read_part(const dot_safetensors *file, const dot__st_entry *entry, int64_t at, void *out, size_t bytes)
{
    bool good = dot__file_read(&file->in, file->data_begin + entry->begin + at, out, bytes);
    if (good && dot__big_endian()) dot__swap_words((unsigned char *)out, bytes, (size_t)dot__st_types[entry->type].word);
    return good;
}

static bool dot__st_read(dot_safetensors *file, const char *function, int index, void *out, size_t bytes)
{
    const dot__st_entry *entry = dot__st_entry_at(file, function, index);
    file->in.function = function;
    return entry && dot__st_room(file, entry, out, (int64_t)bytes, (int64_t)entry->view.bytes, "bytes") &&
           dot__st_read_part(file, entry, 0, out, bytes);
}

static double dot__st_value(const unsigned char *at, int dtype)
{
    float f32;
    double f64;
    int64_t i64;
    switch (dtype) {
    case DOT_F32: memcpy(&f32, at, sizeof f32); return (double)f32;
    case DOT_F64: memcpy(&f64, at, sizeof f64); return f64;
    case DOT_I64: memcpy(&i64, at, sizeof i64); return (double)i64;
    default:      return (double)*at;
    }
}

static bool dot__st_read_double(dot_safetensors *file, const char *function, int index, double *out, int64_t count)
{
    unsigned char buffer[4096];
    const dot__st_entry *entry = dot__st_entry_at(file, function, index);
    file->in.function = function;
    if (!entry || !dot__st_room(file, entry, out, count, entry->view.count, "elements")) return false;
    int dtype = dot__st_types[entry->type].dtype;
    if (dtype < 0) {
        dot__fail(file->ctx, DOT_ERROR_DTYPE, "%s: %s: tensor \"%.80s\" is %s, expected F32, F64, I64 or U8", function,
                  file->path, entry->view.name, entry->view.dtype);
        return false;
    }
    int64_t size = dot__st_types[entry->type].word, most = (int64_t)sizeof buffer / size;
    for (int64_t done = 0, n; done < count; done += n) {
        n = count - done < most ? count - done : most;
        if (!dot__st_read_part(file, entry, done * size, buffer, (size_t)(n * size))) return false;
        for (int64_t i = 0; i < n; ++i) out[done + i] = dot__st_value(buffer + i * size, dtype);
    }
    return true;
}

bool dot_safetensors_read(dot_safetensors *file, int index, void *out, size_t bytes)
{
    return file && dot__st_read(file, "dot_safetensors_read", index, out, bytes);
}

bool dot_safetensors_read_double(dot_safetensors *file, int index, double *out, int64_t count)
{
    return file && dot__st_read_double(file, "dot_safetensors_read_double", index, out, count);
}

/* ---- safetensors: the writer ---- */

typedef struct dot__json_text { char *out; uint64_t length; } dot__json_text;     /* out NULL: only counts */

static void dot__put(dot__json_text *text, const char *string)
{
    size_t length = strlen(string);
    if (text->out) memcpy(text->out + text->length, string, length);
    text->length += length;
}

static void dot__put_integer(dot__json_text *text, int64_t value)    /* >= 0 */
{
    char digits[24], *at = digits + sizeof digits - 1;
    *at = 0;
    do *--at = (char)('0' + value % 10); while (value /= 10);
    dot__put(text, at);
}

static void dot__put_string(dot__json_text *text, const char *string)
{
    dot__put(text, "\"");
    for (; *string; ++string) {
        char one[8] = { *string, 0 };
        unsigned code = (unsigned char)*string;
        if (code == '"' || code == '\\') dot__put(text, "\\");
        if (code < 0x20) snprintf(one, sizeof one, "\\u%04x", code);
        dot__put(text, one);
    }
    dot__put(text, "\"");
}

static bool dot__utf8(const char *string)
{
    size_t size;
    while ((size = dot__utf8_size(string)) > 0) string += size;
    return *string == 0;
}

static int dot__st_type(dot_dtype dtype)    /* its row in dot__st_types, or -1 */
{
    int type = (int)dtype < 0 ? -1 : DOT__ST_TYPES - 1;
    while (type >= 0 && dot__st_types[type].dtype != (int)dtype) --type;
    return type;
}

/* The bytes of a valid item. */
static int64_t dot__item_bytes(const dot_safetensors_item *item)
{
    int64_t count = 0;
    dot__product(item->rank, item->shape, &count);
    return count * dot__st_types[dot__st_type(item->dtype)].word;
}

static bool dot__item_check(dot_context *ctx, const char *function, const dot_safetensors_item *item, int index, bool source)
{
    const char *expected = NULL;
    int64_t count = 0;
    int rank = item->rank;
    if (!item->name || !*item->name) expected = "a name";
    else if (!dot__utf8(item->name)) expected = "a name in UTF-8";
    else if (strcmp(item->name, DOT__ST_METADATA) == 0) expected = "another name";
    else if (dot__st_type(item->dtype) < 0) expected = "dtype DOT_F32, DOT_F64, DOT_I64 or DOT_U8";
    else if (rank < 0 || rank > DOT_MAX_RANK) expected = "rank 0..8";
    for (int i = 0; !expected && i < rank; ++i)
        if (item->shape[i] < 0 || item->shape[i] > DOT__ST_MAX_INTEGER) expected = "sizes 0..281474976710655";
    if (!expected && (!dot__product(rank, item->shape, &count) || count > DOT__ST_MAX_INTEGER / 8)) expected = "fewer elements";
    if (!expected && count > 0 && !item->data && !source) expected = "data";
    if (expected)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: item %d (\"%.80s\"): dtype %d, rank %d, shape %s; expected %s", function, index,
                  item->name ? item->name : "", (int)item->dtype, rank, dot__shape_text(rank, item->shape).text, expected);
    return !expected;
}

static bool dot__metadata_check(dot_context *ctx, const char *function, const char *const *metadata)
{
    const char *wrong = NULL;
    for (int i = 0; metadata && metadata[i] && !wrong; i += 2) {
        if (!metadata[i + 1]) wrong = "has no value";
        else if (!dot__utf8(metadata[i]) || !dot__utf8(metadata[i + 1])) wrong = "or its value is not UTF-8";
        for (int k = 0; k < i && !wrong; k += 2)
            if (strcmp(metadata[k], metadata[i]) == 0) wrong = "occurs twice";
        if (wrong) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: metadata key \"%.80s\" %s", function, metadata[i], wrong);
    }
    return !wrong;
}

typedef struct dot__item_ref { const char *name; const dot_safetensors_item *item; } dot__item_ref;

static int dot__by_alignment(const void *a, const void *b)
{
    const dot__item_ref *x = (const dot__item_ref *)a, *y = (const dot__item_ref *)b;
    int order = dot__st_type(y->item->dtype) - dot__st_type(x->item->dtype);
    return order ? order : strcmp(x->name, y->name);
}

/* Checks the items and brings them into the order of the file, the reference's: by falling alignment, then by name. */
static bool dot__items_order(dot_context *ctx, const char *function, const dot_safetensors_item *items, int count,
                             bool source, dot__item_ref *order)
{
    int64_t total = 0;
    for (int i = 0; i < count; ++i) {
        if (!dot__item_check(ctx, function, &items[i], i, source)) return false;
        if ((total += dot__item_bytes(&items[i])) > DOT__ST_MAX_INTEGER) {
            dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %lld bytes up to item %d, expected at most %lld", function,
                      DOT__LL(total), i, DOT__LL(DOT__ST_MAX_INTEGER));
            return false;
        }
        order[i].name = items[i].name;
        order[i].item = &items[i];
    }
    const char *twice = NULL;
    if (!dot__sort_names(ctx, order, (size_t)count, sizeof *order, &twice)) return false;
    if (twice) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: the name \"%.80s\" occurs twice", function, twice);
        return false;
    }
    return dot__sort(ctx, order, (size_t)count, sizeof *order, dot__by_alignment);
}

/* {"__metadata__":{...},"name":{"dtype":"F32","shape":[...],"data_offsets":[begin,end]},...} and spaces to a multiple of 8. */
static void dot__st_put_header(dot__json_text *text, const dot__item_ref *order, int count, const char *const *metadata)
{
    int64_t at = 0;
    dot__put(text, "{");
    if (metadata && metadata[0]) {
        dot__put(text, "\"" DOT__ST_METADATA "\":{");
        for (int i = 0; metadata[i]; ++i) {
            if (i) dot__put(text, i % 2 ? ":" : ",");
            dot__put_string(text, metadata[i]);
        }
        dot__put(text, count ? "}," : "}");
    }
    for (int i = 0; i < count; ++i) {
        const dot_safetensors_item *item = order[i].item;
        if (i) dot__put(text, ",");
        dot__put_string(text, item->name);
        dot__put(text, ":{\"dtype\":\"");
        dot__put(text, dot__st_types[dot__st_type(item->dtype)].name);
        dot__put(text, "\",\"shape\":[");
        for (int k = 0; k < item->rank; ++k) {
            if (k) dot__put(text, ",");
            dot__put_integer(text, item->shape[k]);
        }
        dot__put(text, "],\"data_offsets\":[");
        dot__put_integer(text, at);
        dot__put(text, ",");
        dot__put_integer(text, at += dot__item_bytes(item));
        dot__put(text, "]}");
    }
    dot__put(text, "}");
    while (text->length % 8) dot__put(text, " ");
}

/* Little-endian, on any machine. */
static bool dot__st_put_data(dot__draft *draft, const void *data, size_t bytes, size_t word)
{
    unsigned char buffer[4096];
    if (!dot__big_endian()) return dot__draft_write(draft, data, bytes);
    for (size_t at = 0, n; at < bytes; at += n) {
        n = bytes - at < sizeof buffer ? bytes - at : sizeof buffer;
        memcpy(buffer, (const char *)data + at, n);
        dot__swap_words(buffer, n, word);
        if (!dot__draft_write(draft, buffer, n)) return false;
    }
    return true;
}

/* Where the elements of items[index] are, until the next call; NULL, with the error set, when they cannot be had. Called
   once for each item that has elements, in the order of the file. It lets a caller make them in one buffer, one by one. */
typedef const void *(*dot__item_source)(void *user, int index);

static bool dot__st_write_draft(dot__draft *draft, const dot_safetensors_item *items, int count, const dot__item_ref *order,
                                const dot__json_text *header, dot__item_source source, void *user)
{
    unsigned char head[8];
    for (int i = 0; i < 8; ++i) head[i] = (unsigned char)(header->length >> 8 * i & 255);
    if (!dot__draft_write(draft, head, 8) || !dot__draft_write(draft, header->out, (size_t)header->length)) return false;
    for (int i = 0; i < count; ++i) {
        const dot_safetensors_item *item = order[i].item;
        int64_t bytes = dot__item_bytes(item);
        if (bytes == 0) continue;
        const void *data = source ? source(user, (int)(item - items)) : item->data;
        size_t word = (size_t)dot__st_types[dot__st_type(item->dtype)].word;
        if (!data || !dot__st_put_data(draft, data, (size_t)bytes, word)) return false;
    }
    return true;
}

/* Writes the items; their data are at item->data, or, if there is a source, where it says. */
static bool dot__st_write(dot_context *ctx, const char *function, const char *path, const dot_safetensors_item *items,
                          int count, const char *const *metadata, dot__item_source source, void *user)
{
    dot__json_text header = { NULL, 0 };
    dot__draft draft;
    ctx->function = function;
    if (!path || count < 0 || (!items && count > 0)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: path is %s, items is %s, count %d; expected a path and count items", function,
                  path ? path : "NULL", items ? "given" : "NULL", count);
        return false;
    }
    dot__item_ref *order = (dot__item_ref *)dot__new(ctx, ((size_t)count + 1) * sizeof *order);
    bool good = order && dot__items_order(ctx, function, items, count, source != NULL, order) &&
                dot__metadata_check(ctx, function, metadata);
    if (good) {
        dot__st_put_header(&header, order, count, metadata);
        good = header.length <= DOT__ST_MAX_HEADER;
        if (!good) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: header of %llu bytes, expected at most %d", function,
                             (unsigned long long)header.length, DOT__ST_MAX_HEADER);
    }
    if (good) good = (header.out = (char *)dot__new(ctx, (size_t)header.length)) != NULL;
    if (good) {
        header.length = 0;
        dot__st_put_header(&header, order, count, metadata);
        good = dot__draft_open(&draft, ctx, function, path) &&
               dot__draft_close(&draft, dot__st_write_draft(&draft, items, count, order, &header, source, user));
    }
    dot__delete(ctx, header.out);
    dot__delete(ctx, order);
    return good;
}

bool dot_safetensors_write(dot_context *ctx, const char *path, const dot_safetensors_item *items, int count,
                           const char *const *metadata)
{
    return ctx && dot__st_write(ctx, "dot_safetensors_write", path, items, count, metadata, NULL, NULL);
}

/* ---- NPY ---- */

#define DOT__NPY_MAX_HEADER 10000       /* NumPy's limit for files of unknown origin */
#define DOT__NPY_GROWTH 21              /* digits that numpy.save keeps free for the first size to grow */

/* The element types; those of dot_dtype come first, in its order. */
static const struct { char name[3]; unsigned char size; } dot__npy_types[] = {
    { "f4", 4 }, { "f8", 8 }, { "i8", 8 }, { "u1", 1 },
    { "b1", 1 }, { "i1", 1 }, { "i2", 2 }, { "i4", 4 }, { "u2", 2 }, { "u4", 4 }, { "u8", 8 } };
enum { DOT__NPY_TYPES = (int)(sizeof dot__npy_types / sizeof *dot__npy_types) };

struct dot_npy {
    dot_context *ctx;
    dot_npy *next;              /* open array of the context */
    dot__file in;
    char *path;
    int type;
    bool big_endian, fortran_order;
    int rank;
    int64_t shape[DOT_MAX_RANK], count, data_begin;
};

/* 'text' or "text", without escapes, of less than `room` bytes. */
static bool dot__npy_string(dot__json *json, char *out, int room)
{
    char quote = dot__json_take(json, '\'') ? '\'' : '"';
    if (quote == '"' && !dot__json_take(json, '"')) return dot__json_fail(json, "a quoted string");
    for (int n = 0; n < room; ++n, ++json->at) {
        out[n] = *json->at == quote ? 0 : *json->at;
        if (*json->at == quote) return ++json->at, true;
        if ((unsigned char)*json->at < 0x20 || *json->at == '\\') break;
    }
    return dot__json_fail(json, "a short string without escapes");
}

static bool dot__npy_type(dot_npy *file, dot__json *json)
{
    char descr[16];
    if (!dot__npy_string(json, descr, (int)sizeof descr)) return false;
    for (file->type = 0; file->type < DOT__NPY_TYPES; ++file->type)
        if (strcmp(descr + (*descr != 0), dot__npy_types[file->type].name) == 0) break;
    file->big_endian = *descr == '>';
    bool known = file->type < DOT__NPY_TYPES;
    if (known && (*descr == '<' || *descr == '>' || (*descr == '|' && dot__npy_types[file->type].size == 1))) return true;
    return dot__json_fail(json, "before here a type f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1, after < or > or, of one byte, |");
}

/* (), (a,), (a, b), ...; a comma may follow the last size, and must follow an only one. */
static bool dot__npy_shape(dot_npy *file, dot__json *json)
{
    if (!dot__json_need(json, '(')) return false;
    for (file->rank = 0; !dot__json_take(json, ')');) {
        if (file->rank == DOT_MAX_RANK) return dot__json_fail(json, "at most 8 sizes");
        if (!dot__json_integer(json, &file->shape[file->rank++])) return false;
        if (dot__json_take(json, ',')) continue;
        if (file->rank == 1) return dot__json_fail(json, "','");
        return dot__json_need(json, ')');
    }
    return true;
}

static bool dot__npy_bool(dot__json *json, bool *value)
{
    dot__json_take(json, ' ');                          /* for the blanks before */
    *value = strncmp(json->at, "True", 4) == 0;
    if (!*value && strncmp(json->at, "False", 5) != 0) return dot__json_fail(json, "True or False");
    json->at += *value ? 4 : 5;
    return true;
}

/* {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), } in any order, spaces, and a newline. */
static bool dot__npy_parse(dot_npy *file, dot__json *json, const char *end)
{
    static const char *const keys[] = { "descr", "fortran_order", "shape" };
    unsigned seen = 0;
    if (!dot__json_need(json, '{')) return false;
    while (!dot__json_take(json, '}')) {
        char key[16];
        int which = 0;
        if (!dot__npy_string(json, key, (int)sizeof key) || !dot__json_need(json, ':')) return false;
        while (which < 3 && strcmp(key, keys[which]) != 0) ++which;
        if (which == 3 || (seen & 1u << which))
            return dot__json_fail(json, "each of the keys descr, fortran_order, shape once and no other before here");
        seen |= 1u << which;
        if (!(which == 0 ? dot__npy_type(file, json) : which == 1 ? dot__npy_bool(json, &file->fortran_order)
                                                                  : dot__npy_shape(file, json))) return false;
        if (dot__json_take(json, ',')) continue;
        if (!dot__json_need(json, '}')) return false;
        break;
    }
    if (seen != 7) return dot__json_fail(json, "the keys descr, fortran_order, shape before here");
    while (*json->at == ' ') ++json->at;
    return (*json->at == '\n' && json->at + 1 == end) || dot__json_fail(json, "only spaces and one newline to the end");
}

/* Finds the header's length and checks what stands before it: \x93NUMPY, the version, the length. */
static bool dot__npy_preamble(dot_npy *file, size_t *length)
{
    unsigned char head[12] = { 0 };
    int64_t size = file->in.size;
    const char *wrong = NULL;
    if (!dot__file_read(&file->in, 0, head, (size_t)dot__min(size, 12))) return false;
    bool wide = head[6] > 1;                                /* versions 2.0 and 3.0: a length of four bytes */
    file->data_begin = wide ? 12 : 10;
    *length = (size_t)head[8] | (size_t)head[9] << 8 | (wide ? (size_t)head[10] << 16 | (size_t)head[11] << 24 : 0);
    if (size < 10 || memcmp(head, "\x93NUMPY", 6) != 0) wrong = "it does not begin with \\x93NUMPY, version and length";
    else if (head[6] < 1 || head[6] > 3 || head[7] != 0) wrong = "its version is not 1.0, 2.0 or 3.0";
    else if (*length > DOT__NPY_MAX_HEADER) wrong = "its header has more than 10000 bytes";
    else if (size < file->data_begin || (int64_t)*length > size - file->data_begin) wrong = "its header ends outside the file";
    if (wrong) dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: %s", file->in.function, file->path, wrong);
    return !wrong;
}

static bool dot__npy_read_header(dot_npy *file)
{
    char text[DOT__NPY_MAX_HEADER + 1];
    size_t length = 0;
    dot__json json;
    if (!dot__npy_preamble(file, &length)) return false;
    if (!dot__file_read(&file->in, file->data_begin, text, length)) return false;
    text[length] = 0;
    json.file = &file->in;
    json.text = json.at = text;
    if (!dot__npy_parse(file, &json, text + length)) return false;
    file->data_begin += (int64_t)length;
    int64_t size = dot__npy_types[file->type].size, bytes = file->in.size - file->data_begin;
    if (!dot__product(file->rank, file->shape, &file->count) || file->count != bytes / size || bytes % size != 0) {
        dot__fail(file->ctx, DOT_ERROR_FORMAT, "%s: %s: shape %s of %d-byte elements, but %lld bytes follow the header",
                  file->in.function, file->path, dot__shape_text(file->rank, file->shape).text, (int)size, DOT__LL(bytes));
        return false;
    }
    if (dot__fits_size(bytes)) return true;
    dot__fail(file->ctx, DOT_ERROR_MEMORY, "%s: %s: %lld bytes do not fit the memory", file->in.function, file->path,
              DOT__LL(bytes));
    return false;
}

dot_npy *dot_npy_open(dot_context *ctx, const char *path)
{
    dot__file in;
    if (!ctx || !dot__file_open(&in, ctx, "dot_npy_open", path)) return NULL;
    dot_npy *file = (dot_npy *)dot__new(ctx, sizeof *file);
    if (!file) {
        dot__file_close(&in);
        return NULL;
    }
    file->ctx = ctx;
    file->in = in;
    file->next = ctx->arrays;
    ctx->arrays = file;
    file->path = (char *)dot__new(ctx, strlen(path) + 1);
    if (file->path) file->in.path = strcpy(file->path, path);
    if (file->path && dot__npy_read_header(file)) return file;
    dot_npy_close(file);
    return NULL;
}

void dot_npy_close(dot_npy *file)
{
    if (!file) return;
    dot_npy **link = &file->ctx->arrays;
    while (*link != file) link = &(*link)->next;
    *link = file->next;
    dot__file_close(&file->in);
    dot__delete(file->ctx, file->path);
    dot__delete(file->ctx, file);
}

bool dot_npy_describe(const dot_npy *file, dot_npy_info *info)
{
    if (!file || !info) return false;
    memset(info, 0, sizeof *info);
    info->type = dot__npy_types[file->type].name;
    info->rank = file->rank;
    memcpy(info->shape, file->shape, sizeof info->shape);
    info->count = file->count;
    info->bytes = (size_t)file->count * dot__npy_types[file->type].size;
    info->fortran_order = file->fortran_order;
    return true;
}

/* An element in little-endian bytes. */
static double dot__npy_value(const unsigned char *at, int type)
{
    int size = dot__npy_types[type].size;
    uint64_t bits = 0;
    for (int i = size; i-- > 0;) bits = bits << 8 | at[i];
    if (type == DOT_F64) {
        double f64;
        memcpy(&f64, &bits, sizeof f64);
        return f64;
    }
    if (type == DOT_F32) {
        uint32_t half = (uint32_t)bits;
        float f32;
        memcpy(&f32, &half, sizeof f32);
        return (double)f32;
    }
    if (*dot__npy_types[type].name != 'i') return (double)bits;
    int64_t i64;
    if (bits >> (8 * size - 1)) bits |= ~(UINT64_MAX >> (64 - 8 * size));      /* the sign */
    memcpy(&i64, &bits, sizeof i64);
    return (double)i64;
}

/* All elements, in row-major order, either to `raw` in this machine's bytes, or as doubles. */
static bool dot__npy_fetch(dot_npy *file, char *raw, double *values)
{
    unsigned char buffer[4096];
    size_t size = dot__npy_types[file->type].size;
    int64_t index[DOT_MAX_RANK] = { 0 }, stride[DOT_MAX_RANK], step = 1, at = 0, most = (int64_t)(sizeof buffer / size);
    bool swap = file->big_endian != (raw && dot__big_endian());         /* dot__npy_value takes little-endian bytes */
    if (file->count == 0) return true;                                  /* and the products below stay within it */
    for (int k = file->rank; k-- > 0; step *= file->shape[k]) stride[k] = step;
    for (int64_t done = 0, n; done < file->count; done += n) {
        n = dot__min(file->count - done, most);
        int64_t begin = file->data_begin + done * (int64_t)size;
        if (!dot__file_read(&file->in, begin, buffer, (size_t)n * size)) return false;
        if (swap) dot__swap_words(buffer, (size_t)n * size, size);
        for (int64_t i = 0; i < n; ++i) {
            const unsigned char *from = buffer + (size_t)i * size;
            if (raw) memcpy(raw + (size_t)at * size, from, size);
            else values[at] = dot__npy_value(from, file->type);
            if (!file->fortran_order) ++at;
            for (int k = 0; file->fortran_order && k < file->rank; ++k) {       /* the first index runs fastest */
                at += stride[k];
                if (++index[k] < file->shape[k]) break;
                at -= stride[k] * file->shape[k];
                index[k] = 0;
            }
        }
    }
    return true;
}

static bool dot__npy_room(dot_npy *file, const char *function, const void *out, int64_t given, int64_t expected,
                          const char *unit)
{
    file->in.function = function;
    if (given == expected && (out || expected == 0)) return true;
    dot__fail(file->ctx, DOT_ERROR_ARGUMENT, "%s: %s: room for %lld %s%s, but the array has %lld", function, file->path,
              DOT__LL(given), unit, out ? "" : " at NULL", DOT__LL(expected));
    return false;
}

bool dot_npy_read(dot_npy *file, void *out, size_t bytes)
{
    if (!file) return false;
    int64_t size = dot__npy_types[file->type].size;
    if (!dot__npy_room(file, "dot_npy_read", out, (int64_t)bytes, file->count * size, "bytes")) return false;
    bool swap = size > 1 && file->big_endian != dot__big_endian();
    if (swap || file->fortran_order) return dot__npy_fetch(file, (char *)out, NULL);
    return dot__file_read(&file->in, file->data_begin, out, bytes);
}

bool dot_npy_read_double(dot_npy *file, double *out, int64_t count)
{
    return file && dot__npy_room(file, "dot_npy_read_double", out, count, file->count, "elements") &&
           dot__npy_fetch(file, NULL, out);
}

/* {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }, numpy.save's spaces, and a newline so that the data begin at
   a multiple of 64 bytes. Returns its length; version, length and all. */
static size_t dot__npy_header(char *out, size_t room, dot_dtype dtype, int rank, const int64_t *shape)
{
    dot__json_text text = { out + 10, 0 };
    size_t growth = DOT__NPY_GROWTH;
    memset(out, ' ', room);
    memcpy(out, "\x93NUMPY\1", 8);
    dot__put(&text, dtype == DOT_U8 ? "{'descr': '|" : "{'descr': '<");
    dot__put(&text, dot__npy_types[dtype].name);
    dot__put(&text, "', 'fortran_order': False, 'shape': (");
    for (int i = 0; i < rank; ++i) {
        uint64_t begin = text.length;
        if (i) dot__put(&text, ", ");
        dot__put_integer(&text, shape[i]);
        if (i == 0) growth -= (size_t)(text.length - begin);
        if (rank == 1) dot__put(&text, ",");
    }
    dot__put(&text, "), }");
    size_t length = 10 + (size_t)text.length + (rank > 0 ? growth : 0) + 1;
    length = (length + 63) / 64 * 64;
    out[8] = (char)(unsigned char)((length - 10) & 255);
    out[9] = (char)(unsigned char)((length - 10) >> 8);
    out[length - 1] = '\n';
    return length;
}

bool dot_npy_write(dot_context *ctx, const char *path, dot_dtype dtype, int rank, const int64_t *shape,
                   const void *data)
{
    static const char function[] = "dot_npy_write";
    char header[512];
    dot_safetensors_item item;
    dot__draft draft;
    if (!ctx) return false;
    ctx->function = function;
    if (!path || (rank > 0 && !shape)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: path is %s, shape is %s; expected both", function, path ? path : "NULL",
                  shape ? "given" : "NULL");
        return false;
    }
    memset(&item, 0, sizeof item);
    item.name = "array";
    item.dtype = dtype;
    item.rank = rank;
    item.data = data;
    for (int i = 0; i < rank && i < DOT_MAX_RANK; ++i) item.shape[i] = shape[i];
    if (!dot__item_check(ctx, function, &item, 0, false)) return false;
    size_t length = dot__npy_header(header, sizeof header, dtype, rank, item.shape);
    return dot__draft_open(&draft, ctx, function, path) &&
           dot__draft_close(&draft, dot__draft_write(&draft, header, length) &&
                                    dot__st_put_data(&draft, data, (size_t)dot__item_bytes(&item), dot_dtype_size(dtype)));
}

/* ---- datasets ---- */

struct dot_dataset {
    dot_context *ctx;
    const uint8_t *records, *labels;
    int64_t count, record_size;
    int64_t first;              /* where record 0 was before the part was taken */
    int rank;
    int64_t shape[DOT_MAX_RANK];
    bool shuffle;
    int orders;                 /* permutations held: none, one for all lanes, or one a lane */
    int64_t *order;             /* [orders][2 + count]: ~epoch (0: none), seed, and the permutation */
    double table[256];          /* of the values of a byte */
    float table32[256];
};

dot_dataset_options dot_dataset_defaults(void)
{
    dot_dataset_options options;
    memset(&options, 0, sizeof options);
    options.magic = DOT__MAGIC_DATASET;
    options.shuffle = true;
    options.scale = 1.0 / 255.0;
    options.first = 0;
    options.count = -1;
    return options;
}

static bool dot__dataset_check(dot_context *ctx, const char *function, const dot_dataset_options *options, int64_t total)
{
    double most = ctx->dtype == DOT_F32 ? (double)FLT_MAX : DBL_MAX;
    if (options->magic != DOT__MAGIC_DATASET)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: options not made by dot_dataset_defaults", function);
    else if (!(fabs(options->scale) <= most / 255))
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: scale %g, expected a finite number that 255 times fits the context's dtype",
                  function, options->scale);
    else if (options->first < 0 || options->first >= total || options->count < -1 || options->count == 0 ||
             options->count > total - options->first)
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: first %lld, count %lld, but there are %lld records", function,
                  DOT__LL(options->first), DOT__LL(options->count), DOT__LL(total));
    else return true;
    return false;
}

static bool dot__dataset_laned(const dot_dataset *dataset)
{
    return dataset->shuffle && dataset->ctx->lanes > 1 && !dataset->ctx->same_seeds;
}

/* Memory for the permutations that the context's seeds ask for; later calls find it there, unless the seeds changed. */
static bool dot__dataset_reserve(dot_dataset *dataset, const char *function)
{
    int wanted = !dataset->shuffle ? 0 : dot__dataset_laned(dataset) ? dataset->ctx->lanes : 1;
    size_t bytes = 0;
    if (wanted <= dataset->orders) return true;
    if (!dot__fits_size(dataset->count + 2) || !dot__mul_size((size_t)dataset->count + 2, sizeof *dataset->order, &bytes) ||
        !dot__mul_size(bytes, (size_t)wanted, &bytes)) {
        dot__fail(dataset->ctx, DOT_ERROR_MEMORY, "%s: %d permutations of %lld records do not fit the memory", function, wanted,
                  DOT__LL(dataset->count));
        return false;
    }
    dot__delete(dataset->ctx, dataset->order);
    dataset->order = (int64_t *)dot__new(dataset->ctx, bytes);
    dataset->orders = dataset->order ? wanted : 0;
    return dataset->order != NULL;
}

static void dot__dataset_delete(dot_dataset *dataset)
{
    dot__delete(dataset->ctx, dataset->order);
    dot__delete(dataset->ctx, dataset);
}

/* A dataset of `total` records, or the part that the options ask for, without the records. */
static dot_dataset *dot__dataset_new(dot_context *ctx, const char *function, int64_t total, int rank, const int64_t *shape,
                                     const dot_dataset_options *options)
{
    const dot_dataset_options defaults = dot_dataset_defaults();
    if (!options) options = &defaults;
    if (!dot__dataset_check(ctx, function, options, total)) return NULL;
    dot_dataset *dataset = (dot_dataset *)dot__new(ctx, sizeof *dataset);
    if (!dataset) return NULL;
    dataset->ctx = ctx;
    dataset->shuffle = options->shuffle;
    dataset->first = options->first;
    dataset->count = options->count < 0 ? total - options->first : options->count;
    dataset->rank = rank;
    dataset->record_size = 1;
    for (int i = 0; i < rank; ++i) dataset->record_size *= dataset->shape[i] = shape[i];
    for (int i = 0; i < 256; ++i) {
        dataset->table[i] = i * options->scale;
        dataset->table32[i] = ctx->dtype == DOT_F32 ? (float)dataset->table[i] : 0;
    }
    if (dot__dataset_reserve(dataset, function)) return dataset;
    dot__dataset_delete(dataset);
    return NULL;
}

dot_dataset *dot_dataset_memory(dot_context *ctx, const uint8_t *records, const uint8_t *labels, int64_t count, int rank,
                                const int64_t *shape, const dot_dataset_options *options)
{
    static const char function[] = "dot_dataset_memory";
    int64_t sizes[DOT_MAX_RANK], total = 0;
    if (!ctx || !dot_ok(ctx)) return NULL;
    ctx->function = function;
    if (!records || count < 1 || rank < 0 || rank >= DOT_MAX_RANK || (rank > 0 && !shape)) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: records %s, count %lld, rank %d, shape %s; expected records, count at least 1, "
                  "rank 0..%d and its shape", function, records ? "given" : "NULL", DOT__LL(count), rank,
                  shape ? "given" : "NULL", DOT_MAX_RANK - 1);
        return NULL;
    }
    sizes[0] = count;
    bool fits = true;
    for (int i = 0; i < rank; ++i) {
        sizes[i + 1] = shape[i];
        fits = fits && shape[i] >= 1;
    }
    if (!fits || !dot__product(rank + 1, sizes, &total) || !dot__fits_size(total)) {
        dot__fail(ctx, DOT_ERROR_SHAPE, "%s: %lld records of shape %s, expected sizes of at least 1 that fit the memory",
                  function, DOT__LL(count), dot__shape_text(rank, shape).text);
        return NULL;
    }
    dot_dataset *dataset = dot__dataset_new(ctx, function, count, rank, shape, options);
    if (!dataset) return NULL;
    dataset->records = records + dataset->first * dataset->record_size;
    dataset->labels = labels ? labels + dataset->first : NULL;
    return dataset;
}

/* Opens an IDX file of unsigned bytes and checks it: two zero bytes, the type 8, the number of sizes, the sizes as big-endian
   32-bit numbers, and exactly as many bytes as they say (LeCun, Cortes, Burges, "The MNIST database"). */
static bool dot__idx_open(dot__file *file, dot_context *ctx, const char *function, const char *path, int rank, int64_t *sizes)
{
    unsigned char head[16] = { 0 };
    int64_t expected = 0, begin = 4 + 4 * rank;
    if (!dot__file_open(file, ctx, function, path)) return false;
    bool whole = file->size >= begin, magic = file->size >= 4;
    if (!dot__file_read(file, 0, head, (size_t)(whole ? begin : magic ? 4 : 0))) {
        dot__file_close(file);
        return false;
    }
    for (int i = 0; i < rank; ++i) {
        const unsigned char *at = head + 4 + 4 * i;
        sizes[i] = (int64_t)at[0] << 24 | (int64_t)at[1] << 16 | (int64_t)at[2] << 8 | at[3];
    }
    bool fits = dot__product(rank, sizes, &expected) && expected == file->size - begin;
    if (magic && (head[0] || head[1] || head[2] != 8 || head[3] != rank))
        dot__fail(ctx, DOT_ERROR_FORMAT, "%s: %s: magic number 0x%02x%02x%02x%02x, expected 0x0000080%d (unsigned bytes, "
                  "%d dimension%s)%s", function, path, head[0], head[1], head[2], head[3], rank, rank, rank == 1 ? "" : "s",
                  head[0] == 0x1f && head[1] == 0x8b ? "; it is compressed: gunzip it first" : "");
    else if (!whole)
        dot__fail(ctx, DOT_ERROR_FORMAT, "%s: %s: %lld bytes, expected at least %lld", function, path, DOT__LL(file->size),
                  DOT__LL(begin));
    else if (!fits)
        dot__fail(ctx, DOT_ERROR_FORMAT, "%s: %s: %lld records of %lld x %lld bytes announced, but %lld bytes follow", function,
                  path, DOT__LL(sizes[0]), DOT__LL(rank > 1 ? sizes[1] : 1), DOT__LL(rank > 2 ? sizes[2] : 1),
                  DOT__LL(file->size - begin));
    else if (expected == 0)
        dot__fail(ctx, DOT_ERROR_FORMAT, "%s: %s: it is empty, expected at least one record", function, path);
    else if (!dot__fits_size(expected))
        dot__fail(ctx, DOT_ERROR_MEMORY, "%s: %s: %lld bytes do not fit the memory", function, path, DOT__LL(expected));
    else return true;
    dot__file_close(file);
    return false;
}

/* The records of the dataset's part. Closes the file. */
static uint8_t *dot__idx_read(const dot_dataset *dataset, dot__file *file, int rank)
{
    int64_t record = rank == 1 ? 1 : dataset->record_size;
    size_t bytes = (size_t)(dataset->count * record);
    uint8_t *records = (uint8_t *)dot__new(dataset->ctx, bytes);
    if (records && !dot__file_read(file, 4 + 4 * rank + dataset->first * record, records, bytes)) {
        dot__delete(dataset->ctx, records);
        records = NULL;
    }
    dot__file_close(file);
    return records;
}

static uint8_t *dot__idx_labels(const dot_dataset *dataset, const char *function, const char *path, int64_t total)
{
    dot__file file;
    int64_t count = 0;
    if (!dot__idx_open(&file, dataset->ctx, function, path, 1, &count)) return NULL;
    if (count == total) return dot__idx_read(dataset, &file, 1);
    dot__fail(dataset->ctx, DOT_ERROR_FORMAT, "%s: %s: %lld labels for %lld images", function, path, DOT__LL(count),
              DOT__LL(total));
    dot__file_close(&file);
    return NULL;
}

dot_dataset *dot_dataset_idx(dot_context *ctx, const char *images, const char *labels, const dot_dataset_options *options)
{
    static const char function[] = "dot_dataset_idx";
    int64_t sizes[4] = { 0, 0, 0, 1 };                  /* [count, H, W], and one channel */
    uint8_t *records = NULL, *classes = NULL;
    dot__file file;
    if (!ctx || !dot_ok(ctx) || !dot__idx_open(&file, ctx, function, images, 3, sizes)) return NULL;
    dot_dataset *dataset = dot__dataset_new(ctx, function, sizes[0], 3, sizes + 1, options);
    if (!dataset) {
        dot__file_close(&file);
        return NULL;
    }
    records = dot__idx_read(dataset, &file, 3);
    if (records && labels) classes = dot__idx_labels(dataset, function, labels, sizes[0]);
    dataset->records = records;
    dataset->labels = classes;
    if (records && (classes || !labels)) return dataset;
    dot__delete(ctx, records);
    dot__dataset_delete(dataset);
    return NULL;
}

static bool dot__dataset_index(const dot_dataset *dataset, const char *function, int64_t index)
{
    if (!dataset || (index >= 0 && index < dataset->count)) return dataset != NULL;
    dot__fail(dataset->ctx, DOT_ERROR_ARGUMENT, "%s: record %lld, but there are %lld", function, DOT__LL(index),
              DOT__LL(dataset->count));
    return false;
}

int64_t dot_dataset_count(const dot_dataset *dataset) { return dataset ? dataset->count : 0; }

const uint8_t *dot_dataset_record(const dot_dataset *dataset, int64_t index)
{
    return dot__dataset_index(dataset, "dot_dataset_record", index) ? dataset->records + index * dataset->record_size : NULL;
}

int dot_dataset_label(const dot_dataset *dataset, int64_t index)
{
    return dot__dataset_index(dataset, "dot_dataset_label", index) && dataset->labels ? dataset->labels[index] : -1;
}

/* ---- batches ---- */

static int64_t dot__batches(const dot_dataset *dataset, const char *function, int64_t batch)
{
    if (batch >= 1) return (dataset->count - 1) / batch + 1;
    dot__fail(dataset->ctx, DOT_ERROR_ARGUMENT, "%s: batch %lld, expected at least 1", function, DOT__LL(batch));
    return 0;
}

int64_t dot_batches(const dot_dataset *dataset, int64_t batch)
{
    return dataset ? dot__batches(dataset, "dot_batches", batch) : 0;
}

/* The epoch's permutation of the records for one lane, or NULL for the order as it is: Fisher and Yates' shuffle (Durstenfeld
   1964; Knuth, vol. 2, algorithm P), draw i from stream SHUFFLE + epoch of the lane's seed. */
static const int64_t *dot__dataset_order(dot_dataset *dataset, int lane, int64_t epoch)
{
    if (!dataset->shuffle) return NULL;
    uint64_t seed = dataset->ctx->lane_seeds[lane], stream = (uint64_t)DOT__STREAM_SHUFFLE + (uint64_t)epoch;
    int64_t *key = dataset->order + lane * (dataset->count + 2), *order = key + 2;
    if (key[0] == ~epoch && (uint64_t)key[1] == seed) return order;
    for (int64_t i = 0; i < dataset->count; ++i) order[i] = i;
    for (int64_t i = dataset->count - 1; i > 0; --i) {
        int64_t k = (int64_t)(dot_random_uniform(seed, stream, (uint64_t)i) * (double)(i + 1));
        int64_t record = order[i];
        order[i] = order[k];
        order[k] = record;
    }
    key[0] = ~epoch;
    key[1] = (int64_t)seed;
    return order;
}

typedef void (*dot__take)(const dot_dataset *dataset, int64_t record, int64_t row, void *out);

static void dot__take_f32(const dot_dataset *dataset, int64_t record, int64_t row, void *out)
{
    const uint8_t *from = dataset->records + record * dataset->record_size;
    float *to = (float *)out + row * dataset->record_size;
    for (int64_t i = 0; i < dataset->record_size; ++i) to[i] = dataset->table32[from[i]];
}

static void dot__take_f64(const dot_dataset *dataset, int64_t record, int64_t row, void *out)
{
    const uint8_t *from = dataset->records + record * dataset->record_size;
    double *to = (double *)out + row * dataset->record_size;
    for (int64_t i = 0; i < dataset->record_size; ++i) to[i] = dataset->table[from[i]];
}

static void dot__take_label(const dot_dataset *dataset, int64_t record, int64_t row, void *out)
{
    ((int64_t *)out)[row] = dataset->labels[record];
}

/* Batch `step` of whatever `take` takes from a record, of shape [batch] + the first `rank` sizes of a record's shape. One
   copy for all lanes if they see the same records, else one for each active lane. */
static dot_tensor *dot__batch(dot_dataset *dataset, const char *function, int64_t batch, int64_t step, dot_dtype dtype,
                              int rank, dot__take take)
{
    int64_t shape[DOT_MAX_RANK] = { 0 }, batches = dot__batches(dataset, function, batch);
    dot_context *ctx = dataset->ctx;
    ctx->function = function;
    if (batches == 0) return NULL;
    if (step < 0) {
        dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: step %lld, expected at least 0", function, DOT__LL(step));
        return NULL;
    }
    if (!dot__dataset_reserve(dataset, function)) return NULL;
    int64_t epoch = step / batches, begin = step % batches * batch;
    bool laned = dot__dataset_laned(dataset);
    shape[0] = batch < dataset->count - begin ? batch : dataset->count - begin;
    for (int i = 0; i < rank; ++i) shape[i + 1] = dataset->shape[i];
    dot_tensor *out = dot__step_tensor(ctx, dtype, rank + 1, shape, laned);
    for (int lane = 0; out && lane < (laned ? ctx->lanes : 1); ++lane) {
        if (laned && !dot_lane_active(ctx, lane)) continue;
        const int64_t *order = dot__dataset_order(dataset, lane, epoch);
        for (int64_t row = 0; row < shape[0]; ++row)
            take(dataset, order ? order[begin + row] : begin + row, row, dot__at(out, lane));
    }
    return out;
}

dot_tensor *dot_batch(dot_dataset *dataset, int64_t batch, int64_t step)
{
    if (!dataset || !dot_ok(dataset->ctx)) return NULL;
    dot_dtype dtype = dataset->ctx->dtype;
    return dot__batch(dataset, "dot_batch", batch, step, dtype, dataset->rank,
                      dtype == DOT_F32 ? dot__take_f32 : dot__take_f64);
}

dot_tensor *dot_batch_labels(dot_dataset *dataset, int64_t batch, int64_t step)
{
    if (!dataset || !dot_ok(dataset->ctx)) return NULL;
    if (!dataset->labels) {
        dot__fail(dataset->ctx, DOT_ERROR_STATE, "dot_batch_labels: the dataset has no labels");
        return NULL;
    }
    return dot__batch(dataset, "dot_batch_labels", batch, step, DOT_I64, 0, dot__take_label);
}

/* ---- weights and checkpoints ----
   Both are lists of named arrays in the library's memory; one list serves writing and reading. */

typedef struct dot__stored {
    char name[DOT_MAX_NAME * 4];
    dot_dtype dtype;
    int rank;
    int64_t shape[DOT_MAX_RANK];
    const dot__layout *layout;          /* of the elements at `data`, which the file has in PyTorch's order; or NULL */
    int64_t count;
    char *data;                         /* of lane 0 of the list's lane, */
    dot_tensor *tensor;                 /* and the tensor that it belongs to, or NULL */
} dot__stored;

typedef struct dot__list {
    dot_context *ctx;
    const char *prefix;
    int lane, count, room;              /* room 0: only count */
    dot__stored *stored;
    void *buffer;                       /* the largest array */
    size_t largest;
} dot__list;

static void dot__list_add(dot__list *list, const char *name, const char *suffix, dot_dtype dtype, int rank, const int64_t *shape,
                          const dot__layout *layout, int64_t count, void *data, dot_tensor *tensor)
{
    size_t bytes = (size_t)count * dot_dtype_size(dtype);
    if (bytes > list->largest) list->largest = bytes;
    if (list->count < list->room) {
        dot__stored *s = &list->stored[list->count];
        snprintf(s->name, sizeof s->name, "%s%s%s%s", list->prefix, name, suffix ? "." : "", suffix ? suffix : "");
        s->dtype = dtype;
        s->rank = rank;
        for (int i = 0; i < rank; ++i) s->shape[i] = shape[i];
        s->layout = layout;
        s->count = count;
        s->data = (char *)data;
        s->tensor = tensor;
    }
    list->count++;
}

static bool dot__list_visit(void *user, const char *name, dot__parameter *p)
{
    dot__list *list = (dot__list *)user;
    dot__list_add(list, name, NULL, p->tensor->dtype, p->rank, p->shape, &p->layout, p->tensor->size, dot__at(p->tensor, list->lane),
                  p->tensor);
    return true;
}

/* Makes the list: `fill` is run twice, to count and to fill in. */
static bool dot__list_make(dot__list *list, dot_context *ctx, bool (*fill)(dot__list *list, void *user), void *user)
{
    memset(list, 0, sizeof *list);
    list->ctx = ctx;
    list->prefix = "";
    if (!fill(list, user)) return false;
    list->room = list->count;
    list->count = 0;
    list->stored = (dot__stored *)dot__new(ctx, (size_t)(list->room + 1) * sizeof *list->stored);
    list->buffer = list->stored ? dot__new(ctx, list->largest) : NULL;
    return list->buffer && fill(list, user);
}

static void dot__list_free(dot__list *list)
{
    dot__delete(list->ctx, list->stored);
    dot__delete(list->ctx, list->buffer);
}

/* Elements between memory and PyTorch's order. */
static void dot__reorder(const dot__stored *s, void *torch, bool to_torch)
{
    size_t size = dot_dtype_size(s->dtype);
    if (!s->layout) {
        memcpy(to_torch ? torch : s->data, to_torch ? s->data : torch, (size_t)s->count * size);
        return;
    }
    dot__torch_walk w = dot__torch_begin(s->layout);
    char *outside = (char *)torch;
    for (int64_t i = 0; i < s->count; ++i, dot__torch_next(&w), outside += size) {
        char *inside = s->data + (size_t)w.offset * size;
        memcpy(to_torch ? outside : inside, to_torch ? inside : outside, size);
    }
}

static const void *dot__list_source(void *user, int index)
{
    dot__list *list = (dot__list *)user;
    dot__reorder(&list->stored[index], list->buffer, true);
    return list->buffer;
}

static bool dot__list_write(dot__list *list, const char *function, const char *path, const char *const *metadata)
{
    dot_safetensors_item *items = (dot_safetensors_item *)dot__new(list->ctx, (size_t)(list->count + 1) * sizeof *items);
    if (!items) return false;
    for (int i = 0; i < list->count; ++i) {
        items[i].name = list->stored[i].name;
        items[i].dtype = list->stored[i].dtype;
        items[i].rank = list->stored[i].rank;
        memcpy(items[i].shape, list->stored[i].shape, sizeof items[i].shape);
    }
    bool ok = dot__st_write(list->ctx, function, path, items, list->count, metadata, dot__list_source, list);
    dot__delete(list->ctx, items);
    return ok;
}

/* Finds every array of the list in the file, and nothing else there; `convert`: F32 and F64 stand for each other. */
static bool dot__list_match(const dot__list *list, const char *function, dot_safetensors *file, const char *path, bool convert)
{
    for (int i = 0; i < list->count; ++i) {
        const dot__stored *s = &list->stored[i];
        dot_safetensors_entry e;
        int at = dot_safetensors_find(file, s->name);
        if (at < 0 || !dot_safetensors_entry_at(file, at, &e)) {
            dot__fail(list->ctx, DOT_ERROR_FORMAT, "%s: %s: no tensor \"%s\"", function, path, s->name);
            return false;
        }
        bool is_float = strcmp(e.dtype, "F32") == 0 || strcmp(e.dtype, "F64") == 0;
        bool type = strcmp(e.dtype, dot__dtype_name(s->dtype)) == 0 || (convert && dot__is_float(s->dtype) && is_float);
        if (!type || e.rank != s->rank || (e.rank > 0 && memcmp(e.shape, s->shape, sizeof(int64_t) * (size_t)e.rank) != 0)) {
            dot__fail(list->ctx, type ? DOT_ERROR_SHAPE : DOT_ERROR_DTYPE, "%s: %s: tensor \"%s\" is %s %s, expected %s %s", function, path, s->name, e.dtype,
                      dot__shape_text(e.rank, e.shape).text, dot__dtype_name(s->dtype), dot__shape_text(s->rank, s->shape).text);
            return false;
        }
    }
    for (int at = 0; at < dot_safetensors_count(file) && dot_safetensors_count(file) != list->count; ++at) {
        dot_safetensors_entry e;
        bool known = false;
        if (!dot_safetensors_entry_at(file, at, &e)) return false;
        for (int i = 0; i < list->count && !known; ++i) known = strcmp(e.name, list->stored[i].name) == 0;
        if (known) continue;
        dot__fail(list->ctx, DOT_ERROR_FORMAT, "%s: %s: tensor \"%.80s\" has no counterpart", function, path, e.name);
        return false;
    }
    return true;
}

/* Reads everything before the first value changes. Weights come as doubles, for any lane; a checkpoint as it is. */
static bool dot__list_read(dot__list *list, const char *function, dot_safetensors *file, const char *path, bool convert)
{
    dot_context *ctx = list->ctx;
    size_t total = 0, at = 0;
    if (!dot__list_match(list, function, file, path, convert)) return false;
    for (int i = 0; i < list->count; ++i)
        total += (size_t)dot__round_up(list->stored[i].count * (convert ? 8 : (int64_t)dot_dtype_size(list->stored[i].dtype)), 8);
    char *staged = (char *)dot__new(ctx, total);
    if (!staged) return false;
    for (int pass = 0; pass < 2; ++pass, at = 0)
        for (int i = 0; i < list->count; ++i) {
            const dot__stored *s = &list->stored[i];
            size_t bytes = (size_t)s->count * (convert ? sizeof(double) : dot_dtype_size(s->dtype));
            int index = dot_safetensors_find(file, s->name);
            void *values = staged + at;
            at += (bytes + 7) / 8 * 8;
            if (pass == 0 && !(convert ? dot_safetensors_read_double(file, index, (double *)values, s->count)
                                       : dot_safetensors_read(file, index, values, bytes))) {
                dot__delete(ctx, staged);
                return false;
            }
            if (pass == 1 && !convert) dot__reorder(s, values, false);
            if (pass == 1 && convert)
                for (int lane = 0; lane < ctx->lanes; ++lane)
                    dot__torch_set(s->layout, s->dtype, dot__at(s->tensor, lane), s->count, (const double *)values);
        }
    dot__delete(ctx, staged);
    return true;
}

typedef struct dot__weights { dot_layer *layer; int lane; } dot__weights;

static bool dot__list_weights(dot__list *list, void *user)
{
    dot__weights *w = (dot__weights *)user;
    list->lane = w->lane;
    return dot__visit(w->layer, "", dot__list_visit, list);
}

static bool dot__save(const char *function, dot_layer *layer, int lane, const char *path)
{
    static const char *const metadata[] = { "format", "pt", NULL };
    dot__weights weights = { layer, lane };
    dot__list list;
    if (!layer || !path || !dot__lane_ok(layer->ctx, function, lane, false)) return false;
    layer->ctx->function = function;
    bool ok = dot__list_make(&list, layer->ctx, dot__list_weights, &weights) && dot__list_write(&list, function, path, metadata);
    dot__list_free(&list);
    return ok;
}

bool dot_save(dot_layer *layer, const char *path) { return dot__save("dot_save", layer, 0, path); }
bool dot_save_lane(dot_layer *layer, int lane, const char *path) { return dot__save("dot_save_lane", layer, lane, path); }

bool dot_load(dot_layer *layer, const char *path)
{
    dot__weights weights = { layer, 0 };
    dot__list list;
    if (!layer || !path) return false;
    dot_safetensors *file = dot__st_open(layer->ctx, "dot_load", path);
    if (!file) return false;
    bool ok = dot__list_make(&list, layer->ctx, dot__list_weights, &weights) && dot__list_read(&list, "dot_load", file, path, true);
    dot__list_free(&list);
    dot_safetensors_close(file);
    return ok;
}

/* ---- checkpoints ---- */

typedef struct dot__training {
    dot_layer *layer;
    dot_optimizer *optimizer;
    int64_t *counters;              /* user's step; updates; random state; seeds of the lanes; updates of each parameter */
    int64_t counter_count;
    uint8_t *stopped;               /* lanes */
} dot__training;

/* The names of an algorithm's states are PyTorch's, where it has them. */
static const char *dot__state_name(const dot_optimizer *opt, const dot__slot *slot, int state, char *out)
{
    static const char *const factored[] = { "row_var", "col_var", "exp_avg", "" };
    if (opt->factored) return !slot->factored && state == 0 ? "variance" : factored[state];
    const char *name = dot__rule_names[opt->rule];
    for (int i = 0; i < state && name; ++i) name = strchr(name, ',') ? strchr(name, ',') + 1 : NULL;
    if (!name || !*name) snprintf(out, DOT_MAX_NAME, "state%d", state);
    else snprintf(out, DOT_MAX_NAME, "%.*s", (int)strcspn(name, ","), name);
    return out;
}

static void dot__list_slot(dot__list *list, dot_optimizer *opt, dot__slot *slot)
{
    for (int i = 0; i < DOT_MAX_STATES; ++i) {
        dot_tensor *t = slot->state[i];
        char name[DOT_MAX_NAME];
        if (!t) continue;
        const dot__parameter *p = slot->parameter;
        bool whole = t->dtype != DOT_U8 && t->size == slot->tensor->size && (!opt->factored || i == 2);  /* one value for each of the parameter's: in its shape */
        dot__list_add(list, slot->name, dot__state_name(opt, slot, i, name), t->dtype, whole ? p->rank : 1, whole ? p->shape : &t->size,
                      whole ? &p->layout : NULL, t->size, dot__at(t, list->lane), t);
    }
}

static bool dot__list_training(dot__list *list, void *user)
{
    dot__training *t = (dot__training *)user;
    dot_optimizer *opt = t->optimizer;
    int lanes = list->ctx->lanes;
    int64_t hypers[3] = { opt->groups, lanes, DOT_HYPERS }, lane_count = lanes;
    char of_lane[24], prefix[64];
    for (list->lane = 0; list->lane < lanes; ++list->lane) {
        of_lane[0] = 0;
        if (lanes > 1) snprintf(of_lane, sizeof of_lane, "lane%d.", list->lane);
        snprintf(prefix, sizeof prefix, "%smodel.", of_lane);
        list->prefix = prefix;
        if (!dot__visit(t->layer, "", dot__list_visit, list)) return false;
        snprintf(prefix, sizeof prefix, "%soptimizer.", of_lane);
        for (int i = 0; i < opt->slots; ++i) dot__list_slot(list, opt, &opt->slot[i]);
    }
    list->prefix = "";
    dot__list_add(list, "counters", NULL, DOT_I64, 1, &t->counter_count, NULL, t->counter_count, t->counters, NULL);
    dot__list_add(list, "stopped", NULL, DOT_U8, 1, &lane_count, NULL, lane_count, t->stopped, NULL);
    dot__list_add(list, "hyperparameters", NULL, DOT_F64, 3, hypers, NULL, hypers[0] * hypers[1] * hypers[2], opt->hypers, NULL);
    dot__list_add(list, "memory", NULL, DOT_F64, 1, &opt->memory_count, NULL, opt->memory_count, opt->memory, NULL);
    return true;
}

static bool dot__training_begin(dot__training *t, const char *function, dot_layer *layer, dot_optimizer *optimizer)
{
    memset(t, 0, sizeof *t);
    if (!layer || !optimizer) return false;
    dot_context *ctx = layer->ctx;
    ctx->function = function;
    if (optimizer->layer != layer) {
        dot__fail(ctx, DOT_ERROR_STATE, "%s: the optimizer is of another layer", function);
        return false;
    }
    t->layer = layer;
    t->optimizer = optimizer;
    t->counter_count = 4 + ctx->lanes + optimizer->slots;
    t->counters = (int64_t *)dot__new(ctx, (size_t)t->counter_count * sizeof(int64_t));
    t->stopped = (uint8_t *)dot__new(ctx, (size_t)ctx->lanes);
    return t->counters && t->stopped;
}

static void dot__training_end(dot__training *t)
{
    if (!t->layer) return;
    dot__delete(t->layer->ctx, t->counters);
    dot__delete(t->layer->ctx, t->stopped);
}

static void dot__training_collect(dot__training *t, int64_t step)
{
    dot_context *ctx = t->layer->ctx;
    int64_t *c = t->counters;
    *c++ = step;
    *c++ = t->optimizer->steps;
    *c++ = (int64_t)ctx->step;
    *c++ = (int64_t)ctx->inits;
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        t->stopped[lane] = ctx->lane_stopped[lane];
        *c++ = (int64_t)ctx->lane_seeds[lane];
    }
    for (int i = 0; i < t->optimizer->slots; ++i) *c++ = t->optimizer->slot[i].t;
}

static void dot__training_restore(dot__training *t, int64_t *step)
{
    dot_context *ctx = t->layer->ctx;
    const int64_t *c = t->counters;
    if (step) *step = c[0];
    t->optimizer->steps = c[1];
    ctx->step = (uint64_t)c[2];
    ctx->inits = (uint64_t)c[3];
    c += 4;
    ctx->same_seeds = true;
    ctx->active_count = 0;
    for (int lane = 0; lane < ctx->lanes; ++lane) {
        ctx->lane_seeds[lane] = (uint64_t)*c++;
        if (ctx->lane_seeds[lane] != ctx->lane_seeds[0]) ctx->same_seeds = false;
        ctx->lane_stopped[lane] = t->stopped[lane] != 0;
        if (!ctx->lane_stopped[lane]) ctx->active[ctx->active_count++] = lane;
    }
    for (int i = 0; i < t->optimizer->slots; ++i) t->optimizer->slot[i].t = *c++;
    dot_zero_grad(t->layer);
}

bool dot_checkpoint_save(const char *path, dot_layer *layer, dot_optimizer *optimizer, int64_t step)
{
    dot__training t;
    dot__list list;
    if (!path || !layer || !optimizer) return false;
    if (step < 0) {
        dot__fail(layer->ctx, DOT_ERROR_ARGUMENT, "dot_checkpoint_save: step " DOT__I64 ", expected 0 or more", DOT__LL(step));
        return false;
    }
    bool ok = dot__training_begin(&t, "dot_checkpoint_save", layer, optimizer);
    if (ok) {
        const char *metadata[] = { "format", "dotopt-checkpoint", "algorithm", dot_algorithm_name(optimizer->options.algorithm), NULL };
        dot__training_collect(&t, step);
        ok = dot__list_make(&list, layer->ctx, dot__list_training, &t) && dot__list_write(&list, "dot_checkpoint_save", path, metadata);
        dot__list_free(&list);
    }
    dot__training_end(&t);
    return ok;
}

static bool dot__algorithm_matches(dot_safetensors *file, const dot_optimizer *opt, const char *path)
{
    const char *name = dot_safetensors_metadata(file, "algorithm"), *expected = dot_algorithm_name(opt->options.algorithm);
    if (name && strcmp(name, expected) == 0) return true;
    dot__fail(opt->ctx, DOT_ERROR_FORMAT, "dot_checkpoint_load: %s: algorithm \"%.40s\", expected \"%s\"", path, name ? name : "", expected);
    return false;
}

bool dot_checkpoint_load(const char *path, dot_layer *layer, dot_optimizer *optimizer, int64_t *step)
{
    dot__training t;
    dot__list list;
    if (!path || !layer || !optimizer) return false;
    bool ok = dot__training_begin(&t, "dot_checkpoint_load", layer, optimizer);
    dot_safetensors *file = ok ? dot__st_open(layer->ctx, "dot_checkpoint_load", path) : NULL;
    if (file) {
        ok = dot__algorithm_matches(file, optimizer, path);
        if (ok) {
            ok = dot__list_make(&list, layer->ctx, dot__list_training, &t)
              && dot__list_read(&list, "dot_checkpoint_load", file, path, false);
            dot__list_free(&list);
        }
        if (ok) dot__training_restore(&t, step);
        dot_safetensors_close(file);
    }
    dot__training_end(&t);
    return ok && file;
}

/* ---- objects of [11 utilities] ---- */

static bool dot__list_state(dot__list *list, void *user)
{
    dot_state *s = (dot_state *)user;
    char prefix[64], of_lane[24];
    for (list->lane = 0; list->lane < list->ctx->lanes; ++list->lane) {
        of_lane[0] = 0;
        if (list->ctx->lanes > 1) snprintf(of_lane, sizeof of_lane, "lane%d.", list->lane);
        snprintf(prefix, sizeof prefix, "%s%s.", of_lane, s->label);
        list->prefix = prefix;
        for (int i = 0; i < s->count; ++i) {
            const dot__parameter *p = s->kept[i].parameter;
            dot_tensor *t = s->kept[i].copy;
            dot__list_add(list, s->kept[i].name, NULL, t->dtype, p->rank, p->shape, &p->layout, t->size, dot__at(t, list->lane), t);
        }
    }
    list->prefix = "";
    dot__list_add(list, "counters", NULL, DOT_I64, 1, &s->counters, NULL, s->counters, s->counter, NULL);
    dot__list_add(list, "numbers", NULL, DOT_F64, 1, &s->numbers, NULL, s->numbers, s->number, NULL);
    return true;
}

bool dot_state_save(const char *path, dot_state *state)
{
    dot__list list;
    if (!path || !state || !dot__state_here(state, "dot_state_save")) return false;
    const char *metadata[] = { "format", "dotopt-state", "kind", state->label, NULL };
    bool ok = dot__list_make(&list, state->ctx, dot__list_state, state) && dot__list_write(&list, "dot_state_save", path, metadata);
    dot__list_free(&list);
    return ok;
}

bool dot_state_load(const char *path, dot_state *state)
{
    dot__list list;
    if (!path || !state || !dot__state_here(state, "dot_state_load")) return false;
    dot_safetensors *file = dot__st_open(state->ctx, "dot_state_load", path);
    if (!file) return false;
    bool ok = dot__list_make(&list, state->ctx, dot__list_state, state) && dot__list_read(&list, "dot_state_load", file, path, false);
    dot__list_free(&list);
    dot_safetensors_close(file);
    return ok;
}

/* ==== [13 logs] ==================================================================================== */

#define DOT__MAGIC_LOGGER 0xd07c1301u
#define DOT__LOG_TAG 255            /* bytes of a tag or key */
#define DOT__LOG_BINS 512           /* W&B draws no more */
#define DOT__LOG_NAME 512           /* bytes of what follows the folder in a path */

/* ---- the operating system ---- */

#ifdef _WIN32
#include <direct.h>
#include <sys/timeb.h>

static int dot__os_open_log(const char *path)
{
    return _open(path, _O_RDWR | _O_CREAT | _O_APPEND | _O_BINARY | _O_NOINHERIT, _S_IREAD | _S_IWRITE);
}

static bool dot__os_truncate(int fd, int64_t size)  { return _chsize_s(fd, size) == 0; }
static bool dot__os_make_folder(const char *path)   { return _mkdir(path) == 0; }
static void dot__os_host(char *out, size_t room)
{
    const char *host = getenv("COMPUTERNAME");
    snprintf(out, room, "%s", host ? host : "localhost");
}

static double dot__os_time(void *user)
{
    struct __timeb64 now;
    (void)user;
    _ftime64(&now);
    return (double)now.time + now.millitm * 1e-3;
}

#else
#include <sys/time.h>
#include <sys/utsname.h>

/* glibc hides it under -std=c99; this is what <unistd.h> says otherwise. */
#if defined(__GLIBC__) && !defined(__cplusplus) && \
    !(defined(__USE_POSIX199309) || defined(__USE_XOPEN_EXTENDED) || defined(__USE_XOPEN2K))
#ifdef __USE_FILE_OFFSET64
extern int ftruncate64(int fd, off_t size);
#define DOT__FTRUNCATE ftruncate64
#else
extern int ftruncate(int fd, off_t size);
#endif
#endif
#ifndef DOT__FTRUNCATE
#define DOT__FTRUNCATE ftruncate
#endif

static int dot__os_open_log(const char *path)
{
    int mode = O_RDWR | O_CREAT | O_APPEND | O_NONBLOCK;
#ifdef O_CLOEXEC
    mode |= O_CLOEXEC;
#endif
    return open(path, mode, 0666);
}

static bool dot__os_truncate(int fd, int64_t size)  { return DOT__FTRUNCATE(fd, (off_t)size) == 0; }
static bool dot__os_make_folder(const char *path)   { return mkdir(path, 0777) == 0; }
static void dot__os_host(char *out, size_t room)
{
    struct utsname system;
    snprintf(out, room, "%s", uname(&system) >= 0 ? system.nodename : "localhost");
}

static double dot__os_time(void *user)
{
    struct timeval now;
    (void)user;
    gettimeofday(&now, NULL);
    return (double)now.tv_sec + (double)now.tv_usec * 1e-6;
}
#endif

/* ---- bytes that grow, and never shrink ---- */

typedef struct dot__bytes {
    dot_context *ctx;
    unsigned char *data;
    size_t size, room;
    bool lost;                      /* memory ran short (the error is set): the contents are incomplete */
} dot__bytes;

static void dot__bytes_reset(dot__bytes *b)
{
    b->size = 0;
    b->lost = false;
}

/* Room for `count` more bytes; NULL when there is none. */
static unsigned char *dot__bytes_add(dot__bytes *b, size_t count)
{
    if (b->lost) return NULL;
    if (count > b->room - b->size) {
        size_t room = 2 * (b->size + count) + 1024;
        bool fits = count <= SIZE_MAX / 4 && b->size <= SIZE_MAX / 8;
        unsigned char *grown = (unsigned char *)(fits ? dot__new(b->ctx, room) : NULL);
        if (!grown) {
            if (!fits) dot__out_of_memory(b->ctx, count);
            b->lost = true;
            return NULL;
        }
        if (b->size > 0) memcpy(grown, b->data, b->size);
        dot__delete(b->ctx, b->data);
        b->data = grown;
        b->room = room;
    }
    b->size += count;
    return b->data + b->size - count;
}

static void dot__bytes_put(dot__bytes *b, const void *from, size_t count)
{
    unsigned char *to = dot__bytes_add(b, count);
    if (to && count > 0) memcpy(to, from, count);
}

static void dot__bytes_text(dot__bytes *b, const char *text) { dot__bytes_put(b, text, strlen(text)); }

/* ---- JSON ---- */

static void dot__log_string(dot__bytes *b, const char *text)
{
    dot__bytes_text(b, "\"");
    for (const char *at = text; *at; ++at) {
        char code[8] = { *at, 0 };
        if (*at == '"' || *at == '\\') dot__bytes_text(b, "\\");
        if ((unsigned char)*at < 0x20) snprintf(code, sizeof code, "\\u%04x", (unsigned)(unsigned char)*at);
        dot__bytes_text(b, code);
    }
    dot__bytes_text(b, "\"");
}

static void dot__log_integer(dot__bytes *b, int64_t value)
{
    char text[32];
    snprintf(text, sizeof text, DOT__I64, DOT__LL(value));
    dot__bytes_text(b, text);
}

static const char *dot__log_nonfinite(double value)
{
    return value != value ? "NaN" : value > DBL_MAX ? "Infinity" : value < -DBL_MAX ? "-Infinity" : NULL;
}

/* The fewest of 15 to 17 digits that bring back the same double, with a point in any locale; `other` if it is not finite. */
static void dot__log_number(dot__bytes *b, double value, const char *other)
{
    char text[48];
    if (dot__log_nonfinite(value)) {
        dot__bytes_text(b, other);
        return;
    }
    for (int digits = 15; digits <= 17; ++digits) {
        snprintf(text, sizeof text, "%.*g", digits, value);
        if (strtod(text, NULL) == value) break;
    }
    for (const char *at = text; *at;) {
        size_t plain = strspn(at, "0123456789+-e");
        dot__bytes_put(b, at, plain);
        at += plain;
        if (*at) dot__bytes_text(b, ".");
        at += strcspn(at, "0123456789+-e");
    }
}

static void dot__log_key(dot__bytes *b, const char *key)
{
    dot__bytes_text(b, ",");
    dot__log_string(b, key);
    dot__bytes_text(b, ":");
}

static void dot__log_put_integer(dot__bytes *b, const char *key, int64_t value)
{
    dot__log_key(b, key);
    dot__log_integer(b, value);
}

static void dot__log_put_string(dot__bytes *b, const char *key, const char *text)
{
    if (!text) return;
    dot__log_key(b, key);
    dot__log_string(b, text);
}

static void dot__log_put_number(dot__bytes *b, const char *key, double value)
{
    dot__log_key(b, key);
    dot__log_number(b, value, "null");
}

/* ---- protocol buffers (their wire format: varints; fields as number << 3 | type; type 0 varint, 1 eight bytes, 2 length and
   bytes, 5 four bytes) ---- */

static void dot__pb_varint(dot__bytes *b, uint64_t value)
{
    unsigned char code[10];
    size_t n = 0;
    do code[n++] = (unsigned char)((value & 127) | (value > 127 ? 128 : 0)); while (value >>= 7);
    dot__bytes_put(b, code, n);
}

static void dot__put_little(dot__bytes *b, uint64_t value, size_t count)
{
    unsigned char *to = dot__bytes_add(b, count);
    for (size_t i = 0; to && i < count; ++i) to[i] = (unsigned char)(value >> 8 * i & 255);
}

static void dot__pb_integer(dot__bytes *b, uint32_t field, int64_t value)
{
    dot__pb_varint(b, (uint64_t)field << 3);
    dot__pb_varint(b, (uint64_t)value);
}

static void dot__put_double(dot__bytes *b, double value)
{
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    dot__put_little(b, bits, 8);
}

static void dot__pb_double(dot__bytes *b, uint32_t field, double value)
{
    dot__pb_varint(b, (uint64_t)field << 3 | 1);
    dot__put_double(b, value);
}

static void dot__pb_float(dot__bytes *b, uint32_t field, double value)
{
    float single = value > FLT_MAX || value < -FLT_MAX ? (value > 0 ? INFINITY : -INFINITY) : (float)value;
    uint32_t bits;
    memcpy(&bits, &single, sizeof bits);
    dot__pb_varint(b, (uint64_t)field << 3 | 5);
    dot__put_little(b, bits, 4);
}

static void dot__pb_bytes(dot__bytes *b, uint32_t field, const void *from, size_t count)
{
    dot__pb_varint(b, (uint64_t)field << 3 | 2);
    dot__pb_varint(b, count);
    dot__bytes_put(b, from, count);
}

static void dot__pb_text(dot__bytes *b, uint32_t field, const char *text)
{
    if (text) dot__pb_bytes(b, field, text, strlen(text));
}

/* What is put between begin and end is one field; its length goes before it when it is known. */
static size_t dot__pb_begin(dot__bytes *b, uint32_t field)
{
    dot__pb_varint(b, (uint64_t)field << 3 | 2);
    return b->size;
}

static void dot__pb_end(dot__bytes *b, size_t begin)
{
    if (b->lost) return;
    size_t count = b->size - begin;
    dot__pb_varint(b, count);                               /* at the end, to learn its size */
    if (b->lost) return;
    unsigned char code[10];
    size_t n = b->size - begin - count;
    memcpy(code, b->data + begin + count, n);
    memmove(b->data + begin + n, b->data + begin, count);
    memcpy(b->data + begin, code, n);
}

static bool dot__pb_read_varint(const unsigned char **at, const unsigned char *end, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; *at < end && shift < 64; shift += 7) {
        unsigned char byte = *(*at)++;
        *value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return true;
    }
    return false;
}

/* The next field: its number and type, its value (varint, length of a type 2), and where its bytes are. */
static bool dot__pb_read(const unsigned char **at, const unsigned char *end, uint64_t *tag, uint64_t *value,
                         const unsigned char **body)
{
    if (!dot__pb_read_varint(at, end, tag)) return false;
    unsigned type = (unsigned)(*tag & 7);
    *value = type == 1 ? 8 : 4;
    if (type != 0 && type != 1 && type != 2 && type != 5) return false;
    if (type != 1 && type != 5 && !dot__pb_read_varint(at, end, value)) return false;
    *body = *at;
    if (type == 0) return true;
    if (*value > (uint64_t)(end - *at)) return false;
    *at += *value;
    return true;
}

/* ---- checksums ---- */

enum { DOT__CRC32C, DOT__CRC32, DOT__CRCS };      /* TensorBoard's, Castagnoli's polynomial; W&B's, that of zip and PNG */

static void dot__crc_table(uint32_t *table, uint32_t polynomial)
{
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? polynomial : 0);
        table[byte] = crc;
    }
}

static uint32_t dot__crc(const uint32_t *table, const unsigned char *bytes, size_t count)
{
    uint32_t crc = 0xffffffffu;
    for (size_t i = 0; i < count; ++i) crc = crc >> 8 ^ table[(crc ^ bytes[i]) & 255];
    return ~crc;
}

/* One block of SHA-256 (FIPS 180-4, 6.2.2). */
static void dot__sha256_block(uint32_t h[8], const unsigned char block[64])
{
    static const uint32_t k[64] = {
        0x428a2f98u, 0x71374491u, 0xb5c0fbcfu, 0xe9b5dba5u, 0x3956c25bu, 0x59f111f1u, 0x923f82a4u, 0xab1c5ed5u,
        0xd807aa98u, 0x12835b01u, 0x243185beu, 0x550c7dc3u, 0x72be5d74u, 0x80deb1feu, 0x9bdc06a7u, 0xc19bf174u,
        0xe49b69c1u, 0xefbe4786u, 0x0fc19dc6u, 0x240ca1ccu, 0x2de92c6fu, 0x4a7484aau, 0x5cb0a9dcu, 0x76f988dau,
        0x983e5152u, 0xa831c66du, 0xb00327c8u, 0xbf597fc7u, 0xc6e00bf3u, 0xd5a79147u, 0x06ca6351u, 0x14292967u,
        0x27b70a85u, 0x2e1b2138u, 0x4d2c6dfcu, 0x53380d13u, 0x650a7354u, 0x766a0abbu, 0x81c2c92eu, 0x92722c85u,
        0xa2bfe8a1u, 0xa81a664bu, 0xc24b8b70u, 0xc76c51a3u, 0xd192e819u, 0xd6990624u, 0xf40e3585u, 0x106aa070u,
        0x19a4c116u, 0x1e376c08u, 0x2748774cu, 0x34b0bcb5u, 0x391c0cb3u, 0x4ed8aa4au, 0x5b9cca4fu, 0x682e6ff3u,
        0x748f82eeu, 0x78a5636fu, 0x84c87814u, 0x8cc70208u, 0x90befffau, 0xa4506cebu, 0xbef9a3f7u, 0xc67178f2u };
    uint32_t w[64], s[8];
#define DOT__ROTATE(x, n) ((x) >> (n) | (x) << (32 - (n)))
    for (int i = 0; i < 64; ++i) {
        const unsigned char *at = block + 4 * i;
        if (i < 16) {
            w[i] = (uint32_t)at[0] << 24 | (uint32_t)at[1] << 16 | (uint32_t)at[2] << 8 | at[3];
            continue;
        }
        uint32_t a = w[i - 15], b = w[i - 2];
        w[i] = w[i - 16] + w[i - 7] + (DOT__ROTATE(a, 7) ^ DOT__ROTATE(a, 18) ^ a >> 3)
             + (DOT__ROTATE(b, 17) ^ DOT__ROTATE(b, 19) ^ b >> 10);
    }
    memcpy(s, h, sizeof s);
    for (int i = 0; i < 64; ++i) {
        uint32_t t1 = s[7] + (DOT__ROTATE(s[4], 6) ^ DOT__ROTATE(s[4], 11) ^ DOT__ROTATE(s[4], 25))
                    + ((s[4] & s[5]) ^ (~s[4] & s[6])) + k[i] + w[i];
        uint32_t t2 = (DOT__ROTATE(s[0], 2) ^ DOT__ROTATE(s[0], 13) ^ DOT__ROTATE(s[0], 22))
                    + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
        memmove(s + 1, s, 7 * sizeof *s);
        s[4] += t1;
        s[0] = t1 + t2;
    }
#undef DOT__ROTATE
    for (int i = 0; i < 8; ++i) h[i] += s[i];
}

/* SHA-256 as 64 hexadecimal digits. */
static void dot__sha256(const unsigned char *bytes, size_t count, char hex[65])
{
    uint32_t h[8] = { 0x6a09e667u, 0xbb67ae85u, 0x3c6ef372u, 0xa54ff53au,
                      0x510e527fu, 0x9b05688cu, 0x1f83d9abu, 0x5be0cd19u };
    unsigned char last[128] = { 0 };
    size_t rest = count % 64, padded = rest < 56 ? 64 : 128;
    for (size_t at = 0; at + 64 <= count; at += 64) dot__sha256_block(h, bytes + at);
    if (rest > 0) memcpy(last, bytes + count - rest, rest);
    last[rest] = 0x80;
    for (size_t i = 0; i < 8; ++i) last[padded - 1 - i] = (unsigned char)((uint64_t)count * 8 >> 8 * i & 255);
    for (size_t at = 0; at < padded; at += 64) dot__sha256_block(h, last + at);
    for (int i = 0; i < 8; ++i) snprintf(hex + 8 * i, 9, "%08lx", (unsigned long)h[i]);
}

/* ---- the logger ---- */

typedef struct dot__sink {          /* a file that only grows by whole records */
    char *path;
    int fd;                         /* -1: not open */
    int64_t size;                   /* of its whole records */
    bool torn;                      /* more than that is in the file, and could not be cut off yet */
} dot__sink;

enum { DOT__SINK_JSON, DOT__SINK_EVENTS, DOT__SINK_WANDB, DOT__SINKS };

typedef struct dot__log_last { size_t name; double value; } dot__log_last;     /* a tag's last scalar; name: where in `names` */

struct dot_logger {
    dot_context *ctx;
    dot_logger *next;               /* open log of the context */
    const char *function;           /* in which it is, for messages */
    char *folder, *name, *project, *group;
    char *path;                     /* scratch: room for the folder and DOT__LOG_NAME */
    size_t path_room;
    char id[65], host[65];
    bool tensorboard, wandb;
    int bins;
    double (*clock)(void *user);
    void *clock_user;
    double time;                    /* of the present record */
    int64_t began, events;          /* seconds: of the run's first start; in the name of the event file */
    double origin;                  /* from which the run's time is counted: its first start, as exactly as it is known */
    dot__sink sink[DOT__SINKS];
    dot__bytes text, proto, frame;  /* the present record: as JSON, as a message, and framed */

    dot__bytes parameters;          /* TensorBoard's hyperparameters, until they are written */
    bool parameters_written;

    int64_t record;                 /* W&B: the number of the last record, */
    int64_t row_step;               /* of the open or last row, -1: none yet, */
    double row_time;                /* of the last record in it, */
    dot__bytes row;                 /* the open row, */
    bool row_late, row_told;        /* the last one was left out, and that was told; */
    dot__bytes lasts, names;        /* for its summary */
    bool lasts_changed;
    uint32_t crc[DOT__CRCS][256];
};

dot_logger_options dot_logger_defaults(void)
{
    dot_logger_options o;
    memset(&o, 0, sizeof o);
    o.magic = DOT__MAGIC_LOGGER;
    o.project = "dotopt";
    o.tensorboard = o.wandb = true;
    o.resume_step = -1;
    o.histogram_bins = 64;
    o.clock = dot__os_time;
    return o;
}

static bool dot__log_fail(dot_logger *log, const char *what, const char *path)
{
    dot__fail(log->ctx, DOT_ERROR_FILE, "%s: cannot %s %s: %s", log->function, what, path, dot__file_reason());
    return false;
}

static const char *dot__log_path(dot_logger *log, const char *name)
{
    snprintf(log->path, log->path_room, "%s/%s", log->folder, name);
    return log->path;
}

/* Makes the folders above the last slash of log->path. */
static bool dot__log_make_folders(dot_logger *log)
{
    for (char *at = log->path + 1, *parent = NULL; (at = strchr(at, '/')) != NULL; parent = at++) {
        *at = 0;
        bool made = dot__os_make_folder(log->path), there = made || errno == EEXIST || errno == EISDIR;
        there = there || errno == EACCES || errno == EROFS;     /* or perhaps: opening a file in it tells */
        if (!there) dot__log_fail(log, "make the folder", log->path);
        if (made && parent) *parent = 0;
        if (made) dot__os_sync_folder(parent ? log->path : ".");
        if (made && parent) *parent = '/';
        *at = '/';
        if (!there) return false;
    }
    return true;
}

/* Makes renames and new names in the folder of log->path last. */
static bool dot__log_sync_folder(dot_logger *log)
{
    char *slash = strrchr(log->path, '/');
    *slash = 0;
    return dot__os_sync_folder(log->path) || dot__log_fail(log, "flush the folder", log->path);
}

/* Opens log->path to append to it, and learns its size. */
static bool dot__sink_open(dot_logger *log, dot__sink *sink)
{
    sink->path = (char *)dot__new(log->ctx, strlen(log->path) + 1);
    if (!sink->path || !dot__log_make_folders(log)) return false;
    strcpy(sink->path, log->path);
    sink->fd = dot__os_open_log(sink->path);
    if (sink->fd < 0) return dot__log_fail(log, "open", sink->path);
    if (dot__os_size(sink->fd, &sink->size)) return true;
    dot__fail(log->ctx, DOT_ERROR_FILE, "%s: %s: not a regular file", log->function, sink->path);
    return false;
}

/* Appends a whole record, or nothing. */
static bool dot__sink_write(dot_logger *log, int which, const dot__bytes *record)
{
    dot__sink *sink = &log->sink[which];
    if (record->lost) return false;
    if (sink->torn && !dot__os_truncate(sink->fd, sink->size)) return dot__log_fail(log, "write", sink->path);
    sink->torn = false;
    for (size_t done = 0; done < record->size;) {
        size_t left = record->size - done;
        int64_t n = dot__os_write(sink->fd, record->data + done, left < DOT__IO_CHUNK ? left : DOT__IO_CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        if (n <= 0) {
            dot__log_fail(log, "write", sink->path);
            sink->torn = done > 0 && !dot__os_truncate(sink->fd, sink->size);
            return false;
        }
        done += (size_t)n;
    }
    sink->size += (int64_t)record->size;
    return true;
}

static void dot__sink_cut(dot__sink *sink, int64_t size)
{
    sink->torn = sink->size > size;             /* and the next write does it */
    sink->size = size;
}

static void dot__log_delete(dot_logger *log)
{
    dot_context *ctx = log->ctx;
    dot__bytes *buffers[] = { &log->text, &log->proto, &log->frame, &log->parameters, &log->row, &log->lasts, &log->names };
    dot_logger **link = &ctx->loggers;
    while (*link != log) link = &(*link)->next;
    *link = log->next;
    for (int i = 0; i < DOT__SINKS; ++i) {
        if (log->sink[i].fd >= 0) dot__os_close(log->sink[i].fd);
        dot__delete(ctx, log->sink[i].path);
    }
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; ++i) dot__delete(ctx, buffers[i]->data);
    dot__delete(ctx, log->folder);
    dot__delete(ctx, log->name);
    dot__delete(ctx, log->project);
    dot__delete(ctx, log->group);
    dot__delete(ctx, log->path);
    dot__delete(ctx, log);
}

/* ---- JSON lines ---- */

/* Begins a public call, and its record: {"kind":...,"time":... */
static void dot__log_begin(dot_logger *log, const char *function, const char *kind)
{
    char time[40];
    log->ctx->function = log->function = function;
    log->time = log->clock(log->clock_user);
    if (!(log->time >= 0 && log->time < 1e11)) log->time = 0;
    int64_t micro = (int64_t)floor(log->time * 1e6 + 0.5);
    snprintf(time, sizeof time, ",\"time\":" DOT__I64 ".%06d", DOT__LL(micro / 1000000), (int)(micro % 1000000));
    dot__bytes_reset(&log->text);
    dot__bytes_text(&log->text, "{\"kind\":");
    dot__log_string(&log->text, kind);
    dot__bytes_text(&log->text, time);
}

static bool dot__log_end(dot_logger *log)
{
    dot__bytes_text(&log->text, "}\n");
    return dot__sink_write(log, DOT__SINK_JSON, &log->text);
}

/* ---- TensorBoard (tensorboard/compat/proto: event, summary, tensor; hparams/plugin_data) ---- */

/* An event begins with the time; a step of 0 is not written. */
static void dot__event_begin(dot_logger *log, int64_t step)
{
    dot__bytes_reset(&log->proto);
    dot__pb_double(&log->proto, 1, log->time);
    if (step > 0) dot__pb_integer(&log->proto, 2, step);
}

static uint32_t dot__event_crc(const dot_logger *log, const unsigned char *bytes, size_t count)
{
    uint32_t crc = dot__crc(log->crc[DOT__CRC32C], bytes, count);
    return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/* TFRecord: length, its checksum, the event, its checksum. */
static bool dot__event_end(dot_logger *log)
{
    dot__bytes *frame = &log->frame;
    if (log->proto.lost) return false;
    dot__bytes_reset(frame);
    dot__put_little(frame, log->proto.size, 8);
    if (!frame->lost) dot__put_little(frame, dot__event_crc(log, frame->data, 8), 4);
    dot__bytes_put(frame, log->proto.data, log->proto.size);
    dot__put_little(frame, dot__event_crc(log, log->proto.data, log->proto.size), 4);
    return dot__sink_write(log, DOT__SINK_EVENTS, frame);
}

typedef struct dot__marks { size_t summary, value; } dot__marks;

/* One value of an event's summary. */
static dot__marks dot__value_begin(dot__bytes *b, const char *tag, const char *suffix)
{
    dot__marks marks;
    marks.summary = dot__pb_begin(b, 5);
    marks.value = dot__pb_begin(b, 1);
    size_t name = dot__pb_begin(b, 1);
    dot__bytes_text(b, tag);
    dot__bytes_text(b, suffix);
    dot__pb_end(b, name);
    return marks;
}

static bool dot__value_end(dot_logger *log, dot__marks marks)
{
    dot__pb_end(&log->proto, marks.value);
    dot__pb_end(&log->proto, marks.summary);
    return dot__event_end(log);
}

/* A tensor of rank 1. */
static void dot__event_tensor(dot__bytes *b, int dtype, int64_t size, const char *text)
{
    size_t tensor = dot__pb_begin(b, 8);
    dot__pb_integer(b, 1, dtype);
    size_t shape = dot__pb_begin(b, 2), dim = dot__pb_begin(b, 2);
    if (size > 0) dot__pb_integer(b, 1, size);
    dot__pb_end(b, dim);
    dot__pb_end(b, shape);
    dot__pb_text(b, 8, text);
    dot__pb_end(b, tensor);
}

/* The hparams plugin's start or end of the session; `content` is the field of HParamsPluginData. */
static bool dot__event_session(dot_logger *log, const char *tag, uint32_t content, int status)
{
    dot__bytes *b = &log->proto;
    dot__event_begin(log, 0);
    dot__marks marks = dot__value_begin(b, tag, "");
    dot__event_tensor(b, 1, 0, NULL);
    size_t metadata = dot__pb_begin(b, 9), plugin = dot__pb_begin(b, 1);
    dot__pb_text(b, 1, "hparams");
    size_t data = dot__pb_begin(b, 2), session = dot__pb_begin(b, content);
    if (status == 0) {                                      /* start */
        dot__bytes_put(b, log->parameters.data, log->parameters.size);
        dot__pb_text(b, 4, log->group);
        dot__pb_double(b, 5, (double)log->began);
    } else {                                                /* end */
        dot__pb_integer(b, 1, status);
        dot__pb_double(b, 2, log->time);
    }
    dot__pb_end(b, session);
    dot__pb_end(b, data);
    dot__pb_end(b, plugin);
    dot__pb_end(b, metadata);
    return dot__value_end(log, marks);
}

/* Before the first record with a step, and at the end. */
static bool dot__event_parameters(dot_logger *log)
{
    if (!log->tensorboard || log->parameters_written) return true;
    log->parameters_written = true;
    return log->parameters.size == 0 || dot__event_session(log, "_hparams_/session_start_info", 3, 0);
}

/* events.out.tfevents.SECONDS.HOST.PROCESS.0: TensorBoard reads the files of a folder in the order of their names. */
static bool dot__events_open(dot_logger *log, const dot_logger_options *o, bool resumed)
{
    char name[DOT__LOG_NAME];
    snprintf(name, sizeof name, "events.out.tfevents.%010lld.%s.%ld.0", DOT__LL(log->events), log->host, dot__os_process());
    dot__log_path(log, name);
    if (!dot__sink_open(log, &log->sink[DOT__SINK_EVENTS])) return false;
    dot__event_begin(log, 0);
    dot__pb_text(&log->proto, 3, "brain.Event:2");
    if (!dot__event_end(log)) return false;
    if (!resumed || o->resume_step < 0) return true;
    dot__event_begin(log, o->resume_step);
    size_t session = dot__pb_begin(&log->proto, 7);         /* SessionLog START: earlier events from this step on are void */
    dot__pb_integer(&log->proto, 1, 1);
    dot__pb_end(&log->proto, session);
    return dot__event_end(log);
}

/* ---- W&B (wandb/proto/wandb_internal.proto; the frame is LevelDB's log format with a checksum of its own) ---- */

#define DOT__WANDB_BLOCK 32768
#define DOT__WANDB_CHUNK 7          /* bytes before a piece: CRC-32 of type and piece, length, type */

static const unsigned char dot__wandb_magic[7] = { ':', 'W', '&', 'B', 0xe1, 0xbe, 0 };

static void dot__record_begin(dot_logger *log)
{
    dot__bytes_reset(&log->proto);
    dot__pb_integer(&log->proto, 1, ++log->record);
}

/* Pieces do not cross the blocks of the file; types 1 whole, 2 first, 3 middle, 4 last. */
static bool dot__record_end(dot_logger *log)
{
    dot__bytes *frame = &log->frame;
    size_t done = 0, size = log->proto.size;
    bool first = true, last = false;
    int64_t begin = log->sink[DOT__SINK_WANDB].size;
    if (log->proto.lost) return false;
    dot__bytes_reset(frame);
    if (begin == 0) dot__bytes_put(frame, dot__wandb_magic, sizeof dot__wandb_magic);
    for (; !last; first = false) {
        size_t room = DOT__WANDB_BLOCK - (size_t)((begin + (int64_t)frame->size) % DOT__WANDB_BLOCK);
        if (room < DOT__WANDB_CHUNK) {
            dot__put_little(frame, 0, room);
            room = DOT__WANDB_BLOCK;
        }
        last = size - done <= room - DOT__WANDB_CHUNK;
        size_t part = last ? size - done : room - DOT__WANDB_CHUNK;         /* 0 where the head alone fills the block */
        unsigned char *head = dot__bytes_add(frame, DOT__WANDB_CHUNK + part);
        if (!head) return false;
        head[4] = (unsigned char)(part & 255);
        head[5] = (unsigned char)(part >> 8);
        head[6] = (unsigned char)(first ? (last ? 1 : 2) : (last ? 4 : 3));
        memcpy(head + DOT__WANDB_CHUNK, log->proto.data + done, part);
        uint32_t crc = dot__crc(log->crc[DOT__CRC32], head + 6, part + 1);
        for (int i = 0; i < 4; ++i) head[i] = (unsigned char)(crc >> 8 * i & 255);
        done += part;
    }
    return dot__sink_write(log, DOT__SINK_WANDB, frame);
}

/* {key, value_json}: begins one of a config, history or summary record; dot__item_end ends it. */
static dot__marks dot__item_begin(dot__bytes *b, const char *key)
{
    dot__marks marks;
    marks.summary = dot__pb_begin(b, 1);
    dot__pb_text(b, 1, key);
    marks.value = dot__pb_begin(b, 16);
    return marks;
}

static void dot__item_end(dot__bytes *b, dot__marks marks)
{
    dot__pb_end(b, marks.value);
    dot__pb_end(b, marks.summary);
}

static void dot__item_json(dot__bytes *b, double value)
{
    char other[16];
    const char *name = dot__log_nonfinite(value);
    snprintf(other, sizeof other, "\"%s\"", name ? name : "");
    dot__log_number(b, value, other);                       /* W&B knows these three strings */
}

static void dot__item_number(dot__bytes *b, const char *key, double value)
{
    dot__marks marks = dot__item_begin(b, key);
    dot__item_json(b, value);
    dot__item_end(b, marks);
}

/* Writes the open row, if there is one. */
static bool dot__row_write(dot_logger *log)
{
    dot__bytes *b = &log->proto;
    if (log->row.size == 0) return true;
    bool good = !log->row.lost;
    if (good) {
        dot__record_begin(log);
        size_t history = dot__pb_begin(b, 2), step = dot__pb_begin(b, 2);
        dot__pb_integer(b, 1, log->row_step);
        dot__pb_end(b, step);
        dot__bytes_put(b, log->row.data, log->row.size);
        dot__item_number(b, "_step", (double)log->row_step);
        dot__item_number(b, "_timestamp", log->row_time);
        dot__item_number(b, "_runtime", log->row_time - log->origin);
        dot__pb_end(b, history);
        good = dot__record_end(log);
    }
    dot__bytes_reset(&log->row);
    return good;
}

/* Makes `step` the open row's. */
static bool dot__row_begin(dot_logger *log, int64_t step)
{
    log->row_late = step < log->row_step;
    if (log->row_late && !log->row_told) {
        dot__log(log->ctx, "%s: step " DOT__I64 " after step " DOT__I64 " is left out of the W&B file, whose steps must not "
                 "fall", log->function, DOT__LL(step), DOT__LL(log->row_step));
        log->row_told = true;
    }
    if (log->row_late) return true;
    bool good = step == log->row_step || dot__row_write(log);
    log->row_step = step;
    log->row_time = log->time;
    return good;
}

/* Remembers a tag's last scalar. */
static bool dot__summary_set(dot_logger *log, const char *tag, double value)
{
    dot__log_last last, *known = (dot__log_last *)(void *)log->lasts.data;
    size_t count = log->lasts.size / sizeof *known, i = 0;
    while (i < count && strcmp((const char *)log->names.data + known[i].name, tag) != 0) ++i;
    log->lasts_changed = true;
    if (i < count) {
        known[i].value = value;
        return true;
    }
    last.name = log->names.size;
    last.value = value;
    dot__bytes_put(&log->names, tag, strlen(tag) + 1);
    if (!log->names.lost) dot__bytes_put(&log->lasts, &last, sizeof last);
    bool good = !log->names.lost && !log->lasts.lost;
    log->names.lost = log->lasts.lost = false;              /* what they had is whole */
    return good;
}

static bool dot__summary_write(dot_logger *log)
{
    dot__bytes *b = &log->proto;
    const dot__log_last *known = (const dot__log_last *)(const void *)log->lasts.data;
    if (!log->lasts_changed) return true;
    dot__record_begin(log);
    size_t summary = dot__pb_begin(b, 3);
    for (size_t i = 0; i < log->lasts.size / sizeof *known; ++i)
        dot__item_number(b, (const char *)log->names.data + known[i].name, known[i].value);
    dot__item_number(b, "_step", (double)log->row_step);
    dot__item_number(b, "_timestamp", log->time);
    dot__item_number(b, "_runtime", log->time - log->origin);
    dot__pb_end(b, summary);
    log->lasts_changed = false;
    return dot__record_end(log);
}

static bool dot__wandb_run(dot_logger *log)
{
    dot__bytes *b = &log->proto;
    dot__record_begin(log);
    size_t run = dot__pb_begin(b, 17);
    dot__pb_text(b, 1, log->id);
    dot__pb_text(b, 3, log->project);
    dot__pb_text(b, 6, log->group);
    dot__pb_text(b, 8, log->name);
    dot__pb_text(b, 13, log->host);
    size_t start = dot__pb_begin(b, 17);
    dot__pb_integer(b, 1, log->began);
    dot__pb_end(b, start);
    dot__pb_end(b, run);
    return dot__record_end(log);
}

static bool dot__wandb_header(dot_logger *log)
{
    dot__bytes *b = &log->proto;
    dot__record_begin(log);
    size_t header = dot__pb_begin(b, 21), version = dot__pb_begin(b, 1);
    dot__pb_text(b, 1, "dotopt " DOTOPT_VERSION);           /* producer */
    dot__pb_text(b, 2, "0.70.0");                           /* the oldest W&B that reads this */
    dot__pb_end(b, version);
    dot__pb_end(b, header);
    return dot__record_end(log);
}

/* The record at `*at`, put together in log->proto: 1, or 0 at what is not a whole record, or -1 with an error. */
static int dot__wandb_read(dot_logger *log, const dot__file *file, int64_t *at)
{
    unsigned type, expected = 1;                            /* 1: a first piece; 3: a later one */
    dot__bytes_reset(&log->proto);
    do {
        unsigned char *head;
        int64_t room = DOT__WANDB_BLOCK - *at % DOT__WANDB_BLOCK;
        if (room < DOT__WANDB_CHUNK) *at += room;
        room = DOT__WANDB_BLOCK - *at % DOT__WANDB_BLOCK - DOT__WANDB_CHUNK;
        dot__bytes_reset(&log->frame);
        head = dot__bytes_add(&log->frame, DOT__WANDB_BLOCK);
        if (file->size - *at < DOT__WANDB_CHUNK) return 0;
        if (!head || !dot__file_read(file, *at, head, DOT__WANDB_CHUNK)) return -1;
        int64_t length = head[4] | head[5] << 8;
        type = head[6];
        *at += DOT__WANDB_CHUNK;
        if (length > room || length > file->size - *at || type < expected || type > expected + 1) return 0;
        if (!dot__file_read(file, *at, head + DOT__WANDB_CHUNK, (size_t)length)) return -1;
        uint32_t crc = dot__crc(log->crc[DOT__CRC32], head + 6, (size_t)length + 1);
        for (int i = 0; i < 4; ++i)
            if (head[i] != (crc >> 8 * i & 255)) return 0;
        dot__bytes_put(&log->proto, head + DOT__WANDB_CHUNK, (size_t)length);
        *at += length;
        expected = 3;
    } while (type == 2 || type == 3);
    return log->proto.lost ? -1 : 1;
}

/* What a resumed run needs to know of a record: its number, its kind (the field's number), the step of a row. */
static bool dot__wandb_parse(const dot__bytes *record, int64_t *number, uint64_t *kind, int64_t *step)
{
    const unsigned char *at = record->data, *end = at + record->size, *body = at, *inner, *row;
    uint64_t tag, value;
    *number = *step = 0;
    *kind = 0;
    while (at < end) {
        if (!dot__pb_read(&at, end, &tag, &value, &body)) return false;
        if (tag == 1 << 3) *number = (int64_t)value;
        if ((tag & 7) != 2) continue;
        *kind = tag >> 3;
        for (row = body; tag == (2 << 3 | 2) && row < at;) {            /* history: look for its step */
            uint64_t field, size, number_tag, number_value;
            const unsigned char *ignored;
            if (!dot__pb_read(&row, at, &field, &size, &inner)) return false;
            if (field == (2 << 3 | 2) && inner < row && dot__pb_read(&inner, row, &number_tag, &number_value, &ignored) &&
                number_tag == 1 << 3) *step = (int64_t)number_value;
        }
    }
    return *number >= 0 && *step >= 0;
}

/* Goes through a file of an earlier process, and keeps it up to the first record that the resumed run replaces: its exit, a
   row of the step from which the run begins again, or what a crash left torn. `has_run`: what is kept has the run's record. */
static bool dot__wandb_scan(dot_logger *log, int64_t resume_step, bool *has_run)
{
    dot__sink *sink = &log->sink[DOT__SINK_WANDB];
    unsigned char magic[sizeof dot__wandb_magic];
    int64_t at = (int64_t)sizeof magic, keep = 0, number, step;
    uint64_t kind;
    int whole = 0;
    dot__file file;
    file.ctx = log->ctx;
    file.function = log->function;
    file.path = sink->path;
    file.fd = sink->fd;
    file.size = sink->size;
    if (file.size >= at && !dot__file_read(&file, 0, magic, sizeof magic)) return false;
    bool known = file.size >= at && memcmp(magic, dot__wandb_magic, sizeof magic) == 0;
    while (known && (whole = dot__wandb_read(log, &file, &at)) > 0) {
        if (!dot__wandb_parse(&log->proto, &number, &kind, &step)) break;
        if (kind == 18 || (kind == 2 && resume_step >= 0 && step >= resume_step)) break;
        if (kind == 2 && step > log->row_step) log->row_step = step;
        if (number > log->record) log->record = number;
        *has_run = *has_run || kind == 17;
        keep = at;
    }
    if (whole < 0) return false;
    dot__sink_cut(sink, keep);
    return true;
}

/* 20231114_221320, UTC (the civil calendar from a count of days: Hinnant, "chrono-Compatible Low-Level Date Algorithms") */
static void dot__log_date(int64_t seconds, char *out, size_t room)
{
    int64_t day = seconds / 86400 + 719468, second = seconds % 86400;
    int64_t era = day / 146097, of_era = day % 146097;
    int64_t year = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
    int64_t of_year = of_era - (365 * year + year / 4 - year / 100), month = (5 * of_year + 2) / 153;
    snprintf(out, room, "%04d%02d%02d_%02d%02d%02d", (int)(year + era * 400 + (month >= 10)),
             (int)(month < 10 ? month + 3 : month - 9), (int)(of_year - (153 * month + 2) / 5 + 1), (int)(second / 3600),
             (int)(second / 60 % 60), (int)(second % 60));
}

/* wandb/offline-run-DATE_TIME-ID/NAME, in log->path. */
static const char *dot__wandb_path(dot_logger *log, const char *name)
{
    char date[80], path[DOT__LOG_NAME];
    dot__log_date(log->began, date, sizeof date);
    snprintf(path, sizeof path, "wandb/offline-run-%s-%s/%s", date, log->id, name);
    return dot__log_path(log, path);
}

static bool dot__wandb_open(dot_logger *log, const dot_logger_options *o)
{
    char name[96];
    dot__sink *sink = &log->sink[DOT__SINK_WANDB];
    snprintf(name, sizeof name, "run-%s.wandb.synced", log->id);
    remove(dot__wandb_path(log, name));                     /* there will be something new to upload */
    name[strlen(name) - strlen(".synced")] = 0;
    dot__wandb_path(log, name);
    if (!dot__sink_open(log, sink)) return false;
    bool has_run = false;
    if (sink->size > 0 && !dot__wandb_scan(log, o->resume_step, &has_run)) return false;
    return (sink->size > 0 || dot__wandb_header(log)) && (has_run || dot__wandb_run(log));
}

/* ---- opening ---- */

#define DOT__LOG_PREFIX 256         /* holds what a start or resume record says first */

static bool dot__log_id_ok(const char *id)
{
    size_t length = strspn(id, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-");
    return id[length] == 0 && length >= 1 && length <= 64;
}

/* The seconds after `key` in the record, or -1. */
static int64_t dot__log_read_seconds(const char *record, const char *key)
{
    const char *at = strstr(record, key);
    int64_t value = 0;
    if (!at) return -1;
    for (at += strlen(key); *at >= '0' && *at <= '9' && value < 100000000000; ++at) value = value * 10 + (*at - '0');
    return *at == ',' && value < 100000000000 ? value : -1;
}

/* Takes id, began and events out of a start or resume record; `line` is its beginning. */
static void dot__log_read_start(dot_logger *log, const char *line)
{
    static const char key[] = ",\"id\":\"";
    char id[65] = "";
    if (strncmp(line, "{\"kind\":\"start\",", 16) != 0 && strncmp(line, "{\"kind\":\"resume\",", 17) != 0) return;
    const char *at = strstr(line, key), *end = at ? strchr(at + sizeof key - 1, '"') : NULL;
    int64_t began = dot__log_read_seconds(line, ",\"began\":"), events = dot__log_read_seconds(line, ",\"events\":");
    if (!end || end - at - (ptrdiff_t)sizeof key + 1 > 64 || began < 0 || events < 0) return;
    memcpy(id, at + sizeof key - 1, (size_t)(end - at) - sizeof key + 1);
    if (!dot__log_id_ok(id)) return;
    strcpy(log->id, id);
    log->began = began;
    log->events = events;
}

/* Reads the lines of an earlier process, and cuts off a torn last one. */
static bool dot__log_scan(dot_logger *log)
{
    dot__sink *sink = &log->sink[DOT__SINK_JSON];
    char line[DOT__LOG_PREFIX + 1], buffer[4096];
    size_t used = 0;
    int64_t whole = 0;
    dot__file file;
    file.ctx = log->ctx;
    file.function = log->function;
    file.path = sink->path;
    file.fd = sink->fd;
    file.size = sink->size;
    for (int64_t at = 0, n; at < file.size; at += n) {
        n = dot__min(file.size - at, (int64_t)sizeof buffer);
        if (!dot__file_read(&file, at, buffer, (size_t)n)) return false;
        for (int64_t i = 0; i < n; ++i) {
            if (buffer[i] != '\n') {
                if (used < DOT__LOG_PREFIX) line[used++] = buffer[i];
                continue;
            }
            line[used] = 0;
            used = 0;
            dot__log_read_start(log, line);
            whole = at + i + 1;
        }
    }
    if (whole > 0 && !*log->id) {
        dot__fail(log->ctx, DOT_ERROR_FORMAT, "%s: %s: not a log: it has no start record", log->function, sink->path);
        return false;
    }
    dot__sink_cut(sink, whole);
    return true;
}

static char *dot__log_copy(dot_context *ctx, const char *text)
{
    char *copy = (char *)dot__new(ctx, strlen(text) + 1);
    return copy ? strcpy(copy, text) : NULL;
}

static bool dot__log_options_ok(dot_context *ctx, const char *function, const char *folder, const dot_logger_options *o)
{
    const char *wrong = NULL;
    if (o->magic != DOT__MAGIC_LOGGER) wrong = "options not made by dot_logger_defaults";
    else if (!folder || !*folder || strlen(folder) > 4096) wrong = "folder is NULL, empty or of more than 4096 bytes";
    else if (!o->project || !dot__utf8(o->project) || (o->name && !dot__utf8(o->name)) || (o->group && !dot__utf8(o->group)))
        wrong = "project, name or group is not UTF-8";
    else if (strlen(o->project) > DOT__LOG_TAG || (o->name && strlen(o->name) > DOT__LOG_TAG) ||
             (o->group && strlen(o->group) > DOT__LOG_TAG)) wrong = "project, name or group has more than 255 bytes";
    else if (o->id && !dot__log_id_ok(o->id)) wrong = "id, expected 1..64 of A-Z a-z 0-9 _ -";
    else if (o->histogram_bins < 1 || o->histogram_bins > DOT__LOG_BINS) wrong = "histogram_bins, expected 1..512";
    else if (o->resume_step < -1) wrong = "resume_step, expected -1 or a step";
    else if (!o->clock) wrong = "clock is NULL";
    if (wrong) dot__fail(ctx, DOT_ERROR_ARGUMENT, "%s: %s", function, wrong);
    return !wrong;
}

/* Eight of 0-9 a-z, from the time, the process and the folder. */
static void dot__log_make_id(dot_logger *log)
{
    uint64_t time = (uint64_t)(log->time * 1e6);
    uint32_t counter[4], key[2], bits[4];
    counter[0] = (uint32_t)time;
    counter[1] = (uint32_t)(time >> 32);
    counter[2] = dot__crc(log->crc[DOT__CRC32], (const unsigned char *)log->folder, strlen(log->folder));
    counter[3] = dot__crc(log->crc[DOT__CRC32], (const unsigned char *)log->host, strlen(log->host));
    key[0] = (uint32_t)dot__os_process();
    key[1] = DOT__MAGIC_LOGGER;
    dot_philox4x32(counter, key, bits);
    uint64_t number = (uint64_t)bits[0] << 32 | bits[1];
    for (int i = 0; i < 8; ++i, number /= 36) log->id[i] = "0123456789abcdefghijklmnopqrstuvwxyz"[number % 36];
}

/* The first record, or the first of a resumed run. dot__log_read_start reads id, began and events back. */
static bool dot__log_start(dot_logger *log, const dot_logger_options *o, bool resumed)
{
    dot__bytes *b = &log->text;
    dot__log_begin(log, "dot_logger_create", resumed ? "resume" : "start");
    dot__log_put_string(b, "id", log->id);
    dot__log_put_integer(b, "began", log->began);
    dot__log_put_integer(b, "events", log->events);
    if (resumed && o->resume_step >= 0) dot__log_put_integer(b, "step", o->resume_step);
    dot__log_put_string(b, "name", log->name);
    dot__log_put_string(b, "project", log->project);
    dot__log_put_string(b, "group", log->group);
    dot__log_put_string(b, "library", "dotopt " DOTOPT_VERSION);
    dot__log_put_string(b, "host", log->host);
    dot__log_put_integer(b, "process", dot__os_process());
    return dot__log_end(log);
}

static bool dot__log_open(dot_logger *log, const dot_logger_options *o)
{
    dot__sink *json = &log->sink[DOT__SINK_JSON];
    dot__log_path(log, "log.jsonl");
    if (!dot__sink_open(log, json)) return false;
    if (json->size > 0 && !o->resume) {
        dot__fail(log->ctx, DOT_ERROR_STATE, "%s: %s: a log is there already; take another folder, or resume it", log->function,
                  json->path);
        return false;
    }
    if (!dot__log_scan(log)) return false;
    bool resumed = json->size > 0;
    if (resumed && o->id && strcmp(log->id, o->id) != 0) {
        dot__fail(log->ctx, DOT_ERROR_STATE, "%s: %s: its id is %s, but the options say %s", log->function, json->path, log->id,
                  o->id);
        return false;
    }
    dot__log_begin(log, log->function, "");                 /* for the time */
    if (!resumed) {
        log->began = (int64_t)log->time;
        if (o->id) strcpy(log->id, o->id);
        else dot__log_make_id(log);
    }
    log->origin = resumed ? (double)log->began : log->time;
    log->events = dot__max((int64_t)log->time, resumed ? log->events + 1 : 0);
    return dot__log_start(log, o, resumed) && (!o->tensorboard || dot__events_open(log, o, resumed)) &&
           (!o->wandb || dot__wandb_open(log, o));
}

static bool dot__log_init(dot_logger *log, const char *folder, const dot_logger_options *o)
{
    dot_context *ctx = log->ctx;
    dot__bytes *buffers[] = { &log->text, &log->proto, &log->frame, &log->parameters, &log->row, &log->lasts, &log->names };
    for (size_t i = 0; i < sizeof buffers / sizeof *buffers; ++i) buffers[i]->ctx = ctx;
    for (int i = 0; i < DOT__SINKS; ++i) log->sink[i].fd = -1;
    log->tensorboard = o->tensorboard;
    log->wandb = o->wandb;
    log->bins = o->histogram_bins;
    log->clock = o->clock;
    log->clock_user = o->clock_user;
    log->row_step = -1;
    dot__crc_table(log->crc[DOT__CRC32C], 0x82f63b78u);
    dot__crc_table(log->crc[DOT__CRC32], 0xedb88320u);
    dot__os_host(log->host, sizeof log->host);
    for (char *at = log->host; *at; ++at)
        if (!strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-", *at)) *at = '-';
    log->path_room = strlen(folder) + DOT__LOG_NAME;
    log->path = (char *)dot__new(ctx, log->path_room);
    log->folder = dot__log_copy(ctx, folder);
    log->project = dot__log_copy(ctx, o->project);
    if (o->group) log->group = dot__log_copy(ctx, o->group);
    if (!log->path || !log->folder || !log->project || (o->group && !log->group)) return false;
    for (char *end = log->folder + strlen(folder); end - log->folder > 1 && end[-1] == '/';) *--end = 0;
    const char *slash = strrchr(log->folder, '/');
    log->name = dot__log_copy(ctx, o->name ? o->name : slash ? slash + 1 : log->folder);
    return log->name != NULL;
}

dot_logger *dot_logger_create(dot_context *ctx, const char *folder, const dot_logger_options *options)
{
    static const char function[] = "dot_logger_create";
    const dot_logger_options defaults = dot_logger_defaults();
    if (!options) options = &defaults;
    if (!ctx || !dot__log_options_ok(ctx, function, folder, options)) return NULL;
    ctx->function = function;
    dot_logger *log = (dot_logger *)dot__new(ctx, sizeof *log);
    if (!log) return NULL;
    log->ctx = ctx;
    log->function = function;
    log->next = ctx->loggers;
    ctx->loggers = log;
    if (dot__log_init(log, folder, options) && dot__log_open(log, options)) return log;
    dot__log_delete(log);
    return NULL;
}

const char *dot_logger_id(const dot_logger *log) { return log ? log->id : ""; }

/* ---- config ---- */

typedef struct dot__log_value { const char *text; double number; bool is_bool; } dot__log_value;

static bool dot__log_tag_ok(dot_logger *log, const char *function, const char *tag)
{
    size_t length = tag ? strlen(tag) : 0;
    if (length >= 1 && length <= DOT__LOG_TAG && dot__utf8(tag)) return true;
    dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: tag \"%.80s\" of %lld bytes, expected 1..255 bytes of UTF-8", function,
              tag && dot__utf8(tag) ? tag : "", DOT__LL(length));
    return false;
}

static void dot__log_put_value(dot__bytes *b, const dot__log_value *value, const char *other)
{
    if (value->text) dot__log_string(b, value->text);
    else if (value->is_bool) dot__bytes_text(b, value->number != 0 ? "true" : "false");
    else dot__log_number(b, value->number, other);
}

/* An entry of SessionStartInfo.hparams: key, and a Value. */
static bool dot__event_parameter(dot_logger *log, const char *key, const dot__log_value *value)
{
    dot__bytes *b = &log->parameters;
    const char *text = value->text ? value->text : dot__log_nonfinite(value->number);
    size_t before = b->size;
    if (!log->tensorboard || log->parameters_written) return true;
    size_t entry = dot__pb_begin(b, 1);
    dot__pb_text(b, 1, key);
    size_t content = dot__pb_begin(b, 2);
    if (text) dot__pb_text(b, 3, text);
    else if (value->is_bool) dot__pb_integer(b, 4, value->number != 0);
    else dot__pb_double(b, 2, value->number);
    dot__pb_end(b, content);
    dot__pb_end(b, entry);
    if (!b->lost) return true;
    b->size = before;                                       /* the earlier entries stay whole */
    b->lost = false;
    return false;
}

static bool dot__log_config(dot_logger *log, const char *function, const char *key, const dot__log_value *value)
{
    if (!dot__log_tag_ok(log, function, key)) return false;
    if (value->text && !dot__utf8(value->text)) {
        dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: the value of \"%.80s\" is not UTF-8", function, key);
        return false;
    }
    dot__log_begin(log, function, "config");
    dot__log_put_string(&log->text, "key", key);
    dot__log_key(&log->text, "value");
    dot__log_put_value(&log->text, value, "null");
    if (!value->text) dot__log_put_string(&log->text, "nonfinite", dot__log_nonfinite(value->number));
    if (!dot__log_end(log)) return false;
    bool good = dot__event_parameter(log, key, value);
    if (!log->wandb) return good;
    dot__record_begin(log);
    size_t config = dot__pb_begin(&log->proto, 5);
    dot__marks marks = dot__item_begin(&log->proto, key);
    if (value->text || value->is_bool) dot__log_put_value(&log->proto, value, "");
    else dot__item_json(&log->proto, value->number);
    dot__item_end(&log->proto, marks);
    dot__pb_end(&log->proto, config);
    return dot__record_end(log) && good;
}

bool dot_logger_config_number(dot_logger *log, const char *key, double number)
{
    dot__log_value value = { NULL, number, false };
    return log && dot__log_config(log, "dot_logger_config_number", key, &value);
}

bool dot_logger_config_bool(dot_logger *log, const char *key, bool flag)
{
    dot__log_value value = { NULL, flag ? 1.0 : 0.0, true };
    return log && dot__log_config(log, "dot_logger_config_bool", key, &value);
}

bool dot_logger_config_text(dot_logger *log, const char *key, const char *text)
{
    dot__log_value value = { text, 0, false };
    if (log && !text) dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "dot_logger_config_text: value is NULL");
    return log && text && dot__log_config(log, "dot_logger_config_text", key, &value);
}

/* ---- records of a step ---- */

/* Begins a record: {"kind":...,"time":...,"step":... and, of a single tag, ,"tag":... */
static bool dot__log_step(dot_logger *log, const char *function, const char *kind, int64_t step, const char *tag)
{
    if (step < 0) {
        dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: step " DOT__I64 ", expected 0 or more", function, DOT__LL(step));
        return false;
    }
    if (tag && !dot__log_tag_ok(log, function, tag)) return false;
    dot__log_begin(log, function, kind);
    dot__log_put_integer(&log->text, "step", step);
    dot__log_put_string(&log->text, "tag", tag);
    return true;
}

static void dot__log_scalars_json(dot__bytes *b, int count, const char *const *tags, const double *values)
{
    bool finite = true, first = true;
    dot__bytes_text(b, ",\"values\":{");
    for (int i = 0; i < count; ++i) {
        if (i) dot__bytes_text(b, ",");
        dot__log_string(b, tags[i]);
        dot__bytes_text(b, ":");
        dot__log_number(b, values[i], "null");
        finite = finite && !dot__log_nonfinite(values[i]);
    }
    dot__bytes_text(b, "}");
    if (finite) return;
    dot__bytes_text(b, ",\"nonfinite\":{");
    for (int i = 0; i < count; ++i) {
        if (!dot__log_nonfinite(values[i])) continue;
        if (!first) dot__bytes_text(b, ",");
        first = false;
        dot__log_string(b, tags[i]);
        dot__bytes_text(b, ":");
        dot__log_string(b, dot__log_nonfinite(values[i]));
    }
    dot__bytes_text(b, "}");
}

static bool dot__log_scalars_events(dot_logger *log, int64_t step, int count, const char *const *tags, const double *values)
{
    dot__bytes *b = &log->proto;
    if (!log->tensorboard) return true;
    if (!dot__event_parameters(log)) return false;
    dot__event_begin(log, step);
    size_t summary = dot__pb_begin(b, 5);
    for (int i = 0; i < count; ++i) {
        size_t value = dot__pb_begin(b, 1);
        dot__pb_text(b, 1, tags[i]);
        dot__pb_float(b, 2, values[i]);
        dot__pb_end(b, value);
    }
    dot__pb_end(b, summary);
    return dot__event_end(log);
}

static bool dot__log_scalars_wandb(dot_logger *log, int64_t step, int count, const char *const *tags, const double *values)
{
    if (!log->wandb) return true;
    bool good = dot__row_begin(log, step);
    for (int i = 0; i < count && !log->row_late; ++i) {
        dot__item_number(&log->row, tags[i], values[i]);
        good = dot__summary_set(log, tags[i], values[i]) && good;
    }
    return good && !log->row.lost;
}

static bool dot__log_scalars(dot_logger *log, const char *function, int64_t step, int count, const char *const *tags,
                             const double *values)
{
    if (count < 0 || (count > 0 && (!tags || !values))) {
        dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: count %d, tags %s, values %s; expected count of both", function, count,
                  tags ? "given" : "NULL", values ? "given" : "NULL");
        return false;
    }
    for (int i = 0; i < count; ++i) {
        if (!dot__log_tag_ok(log, function, tags[i])) return false;
        for (int k = 0; k < i; ++k)
            if (strcmp(tags[k], tags[i]) == 0) {
                dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: tag \"%.80s\" occurs twice", function, tags[i]);
                return false;
            }
    }
    if (!dot__log_step(log, function, "scalars", step, NULL)) return false;
    dot__log_scalars_json(&log->text, count, tags, values);
    if (!dot__log_end(log)) return false;
    bool good = dot__log_scalars_events(log, step, count, tags, values);
    return dot__log_scalars_wandb(log, step, count, tags, values) && good;
}

bool dot_logger_scalar(dot_logger *log, int64_t step, const char *tag, double value)
{
    return log && dot__log_scalars(log, "dot_logger_scalar", step, 1, &tag, &value);
}

bool dot_logger_scalars(dot_logger *log, int64_t step, int count, const char *const *tags, const double *values)
{
    return log && dot__log_scalars(log, "dot_logger_scalars", step, count, tags, values);
}

bool dot_logger_text(dot_logger *log, int64_t step, const char *tag, const char *text)
{
    static const char function[] = "dot_logger_text";
    bool good = true;
    if (!log) return false;
    if (!text || !dot__utf8(text)) {
        dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: the text is %s, expected UTF-8", function, text ? "not UTF-8" : "NULL");
        return false;
    }
    if (!dot__log_step(log, function, "text", step, tag ? tag : "")) return false;
    dot__log_put_string(&log->text, "text", text);
    if (!dot__log_end(log)) return false;
    if (log->tensorboard && (good = dot__event_parameters(log))) {
        dot__event_begin(log, step);
        dot__marks marks = dot__value_begin(&log->proto, tag, "/text_summary");
        size_t metadata = dot__pb_begin(&log->proto, 9), plugin = dot__pb_begin(&log->proto, 1);
        dot__pb_text(&log->proto, 1, "text");
        dot__pb_end(&log->proto, plugin);
        dot__pb_integer(&log->proto, 4, 2);                 /* data_class: tensor */
        dot__pb_end(&log->proto, metadata);
        dot__event_tensor(&log->proto, 7, 1, text);
        good = dot__value_end(log, marks);
    }
    if (!log->wandb) return good;
    good = dot__row_begin(log, step) && good;
    if (log->row_late) return good;
    dot__marks marks = dot__item_begin(&log->row, tag);
    dot__log_string(&log->row, text);
    dot__item_end(&log->row, marks);
    return good && !log->row.lost;
}

/* ---- histograms ---- */

typedef struct dot__histogram {
    int64_t count, nonfinite;
    double min, max, sum, sum_squares;
    int bins;
    double edge[DOT__LOG_BINS + 1], counts[DOT__LOG_BINS];
} dot__histogram;

/* The edges that numpy.histogram takes, except where all values are equal and large: then they stay apart, too. The range is
   scaled where it would overflow. */
static void dot__histogram_edges(dot__histogram *h)
{
    double low = h->min, high = h->max, scale = 1;
    if (h->count == 0) low = 0, high = 1;
    if (low == high) {
        double half = fmax(0.5, fabs(low) * 1e-6);
        low = fmax(low - half, -DBL_MAX);
        high = fmin(high + half, DBL_MAX);
    }
    if (high - low > DBL_MAX) scale = 0.5;
    double width = (high * scale - low * scale) / h->bins;
    for (int i = 0; i <= h->bins; ++i) h->edge[i] = (low * scale + i * width) / scale;
    h->edge[h->bins] = high;
}

static int dot__histogram_bin(const dot__histogram *h, double value)
{
    int low = 0, high = h->bins;                            /* the bin is one of low..high-1 */
    while (high - low > 1) {
        int middle = (low + high) / 2;
        if (value >= h->edge[middle]) low = middle;
        else high = middle;
    }
    return low;
}

static void dot__histogram_make(dot__histogram *h, int bins, const void *data, dot_dtype dtype, int64_t size)
{
    memset(h, 0, sizeof *h);
    h->bins = bins;
    for (int64_t i = 0; i < size; ++i) {
        double value = dot__load(data, dtype, i);
        if (dot__log_nonfinite(value)) {
            h->nonfinite++;
            continue;
        }
        h->min = h->count == 0 ? value : fmin(h->min, value);
        h->max = h->count == 0 ? value : fmax(h->max, value);
        h->sum += value;
        h->sum_squares += value * value;
        h->count++;
    }
    dot__histogram_edges(h);
    for (int64_t i = 0; i < size; ++i) {
        double value = dot__load(data, dtype, i);
        if (!dot__log_nonfinite(value)) h->counts[dot__histogram_bin(h, value)] += 1;
    }
}

static void dot__histogram_counts(dot__bytes *b, const dot__histogram *h)
{
    for (int i = 0; i < h->bins; ++i) {
        if (i) dot__bytes_text(b, ",");
        dot__log_integer(b, (int64_t)h->counts[i]);
    }
}

static void dot__histogram_json(dot__bytes *b, const dot__histogram *h)
{
    dot__log_put_integer(b, "count", h->count);
    dot__log_put_integer(b, "nonfinite", h->nonfinite);
    dot__log_put_number(b, "min", h->count ? h->min : (double)NAN);
    dot__log_put_number(b, "max", h->count ? h->max : (double)NAN);
    dot__log_put_number(b, "sum", h->sum);
    dot__log_put_number(b, "sum_squares", h->sum_squares);
    dot__log_put_number(b, "low", h->edge[0]);
    dot__log_put_number(b, "high", h->edge[h->bins]);
    dot__bytes_text(b, ",\"counts\":[");
    dot__histogram_counts(b, h);
    dot__bytes_text(b, "]");
}

static bool dot__histogram_event(dot_logger *log, int64_t step, const char *tag, const dot__histogram *h)
{
    dot__bytes *b = &log->proto;
    const double head[] = { h->min, h->max, (double)h->count, h->sum, h->sum_squares };
    if (!dot__event_parameters(log)) return false;
    dot__event_begin(log, step);
    dot__marks marks = dot__value_begin(b, tag, "");
    size_t histogram = dot__pb_begin(b, 5);
    for (uint32_t i = 0; i < 5; ++i) dot__pb_double(b, i + 1, head[i]);
    size_t limits = dot__pb_begin(b, 6);                    /* the right edges */
    for (int i = 0; i < h->bins; ++i) dot__put_double(b, h->edge[i + 1]);
    dot__pb_end(b, limits);
    size_t counts = dot__pb_begin(b, 7);
    for (int i = 0; i < h->bins; ++i) dot__put_double(b, h->counts[i]);
    dot__pb_end(b, counts);
    dot__pb_end(b, histogram);
    return dot__value_end(log, marks);
}

static bool dot__histogram_row(dot_logger *log, int64_t step, const char *tag, const dot__histogram *h)
{
    dot__bytes *b = &log->row;
    bool good = dot__row_begin(log, step);
    if (log->row_late) return good;
    dot__marks marks = dot__item_begin(b, tag);
    dot__bytes_text(b, "{\"_type\":\"histogram\",\"values\":[");
    dot__histogram_counts(b, h);
    dot__bytes_text(b, "],\"bins\":[");
    for (int i = 0; i <= h->bins; ++i) {
        if (i) dot__bytes_text(b, ",");
        dot__log_number(b, h->edge[i], "null");
    }
    dot__bytes_text(b, "]}");
    dot__item_end(b, marks);
    return good && !b->lost;
}

static bool dot__log_histogram(dot_logger *log, const char *function, int64_t step, const char *tag, const void *data,
                               dot_dtype dtype, int64_t size)
{
    dot__histogram h;
    if (!dot__log_step(log, function, "histogram", step, tag ? tag : "")) return false;
    dot__histogram_make(&h, log->bins, data, dtype, size);
    dot__histogram_json(&log->text, &h);
    if (!dot__log_end(log)) return false;
    bool good = !log->tensorboard || dot__histogram_event(log, step, tag, &h);
    return (!log->wandb || dot__histogram_row(log, step, tag, &h)) && good;
}

bool dot_logger_histogram(dot_logger *log, int64_t step, const char *tag, const double *values, int64_t count)
{
    static const char function[] = "dot_logger_histogram";
    if (!log) return false;
    if (count >= 0 && (values || count == 0)) return dot__log_histogram(log, function, step, tag, values, DOT_F64, count);
    dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: values is %s, count " DOT__I64 "; expected count values", function,
              values ? "given" : "NULL", DOT__LL(count));
    return false;
}

bool dot_logger_tensor(dot_logger *log, int64_t step, const char *tag, const dot_tensor *t, int lane)
{
    static const char function[] = "dot_logger_tensor";
    if (!log || !t || !dot__lane_ok(t->ctx, function, lane, false)) return false;
    return dot__log_histogram(log, function, step, tag, dot__at(t, lane), t->dtype, t->size);
}

/* ---- images ---- */

typedef struct dot__image {
    const unsigned char *png;
    size_t bytes;
    int64_t width, height;
    int colorspace;                 /* TensorBoard's number */
    char sha256[65];
    char name[200];                 /* of its file */
} dot__image;

static int64_t dot__read_big32(const unsigned char *at)
{
    return (int64_t)at[0] << 24 | (int64_t)at[1] << 16 | (int64_t)at[2] << 8 | at[3];
}

/* Looks at a PNG file's first chunk and its last (PNG specification, 5.2, 11.2.2, 11.2.5). */
static bool dot__image_read(dot_logger *log, const char *function, dot__image *image)
{
    static const unsigned char first[16] = { 0x89, 'P', 'N', 'G', 13, 10, 26, 10, 0, 0, 0, 13, 'I', 'H', 'D', 'R' };
    static const unsigned char last[12] = { 0, 0, 0, 0, 'I', 'E', 'N', 'D', 0xae, 0x42, 0x60, 0x82 };
    static const signed char colorspaces[] = { 1, -1, 3, 3, 2, -1, 4 };     /* grey, RGB, palette, grey and alpha, RGBA */
    const unsigned char *png = image->png;
    const char *wrong = NULL;
    if (!png || image->bytes < 45 || memcmp(png, first, sizeof first) != 0) wrong = "not a PNG file";
    else if (memcmp(png + image->bytes - sizeof last, last, sizeof last) != 0) wrong = "a PNG file without its end";
    else if (png[25] > 6 || colorspaces[png[25]] < 0) wrong = "a PNG file of an unknown colour type";
    else {
        image->width = dot__read_big32(png + 16);
        image->height = dot__read_big32(png + 20);
        image->colorspace = colorspaces[png[25]];
        if (image->width < 1 || image->width > INT32_MAX || image->height < 1 || image->height > INT32_MAX)
            wrong = "a PNG file of an impossible size";
    }
    if (wrong) dot__fail(log->ctx, DOT_ERROR_ARGUMENT, "%s: %lld bytes are %s", function, DOT__LL(image->bytes), wrong);
    return !wrong;
}

/* TAG_STEP_SHA.png, with a tag of letters that every file system takes. */
static void dot__image_name(dot__image *image, const char *tag, int64_t step)
{
    char plain[65];
    size_t n = 0;
    for (; tag[n] && n < sizeof plain - 1; ++n)
        plain[n] = strchr("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-", tag[n]) ? tag[n] : '_';
    plain[n] = 0;
    dot__sha256(image->png, image->bytes, image->sha256);
    snprintf(image->name, sizeof image->name, "%s_" DOT__I64 "_%.20s.png", plain, DOT__LL(step), image->sha256);
}

/* Writes the image to log->path and flushes it. */
static bool dot__image_store(dot_logger *log, const dot__image *image)
{
    if (!dot__log_make_folders(log)) return false;
    remove(log->path);                                      /* left by a crash */
    int fd = dot__os_open(log->path, true);
    if (fd < 0) return dot__log_fail(log, "create", log->path);
    bool good = true;
    for (size_t done = 0; good && done < image->bytes;) {
        size_t left = image->bytes - done;
        int64_t n = dot__os_write(fd, image->png + done, left < DOT__IO_CHUNK ? left : DOT__IO_CHUNK);
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENOSPC;
        good = n > 0;
        done += good ? (size_t)n : 0;
    }
    good = good && dot__os_sync(fd);
    if (!good) dot__log_fail(log, "write", log->path);
    if (!dot__os_close(fd) && good) good = dot__log_fail(log, "write", log->path);
    if (!good) remove(log->path);
    return good && dot__log_sync_folder(log);
}

static bool dot__image_event(dot_logger *log, int64_t step, const char *tag, const dot__image *image)
{
    dot__bytes *b = &log->proto;
    if (!dot__event_parameters(log)) return false;
    dot__event_begin(log, step);
    dot__marks marks = dot__value_begin(b, tag, "");
    size_t content = dot__pb_begin(b, 4);
    dot__pb_integer(b, 1, image->height);
    dot__pb_integer(b, 2, image->width);
    dot__pb_integer(b, 3, image->colorspace);
    dot__pb_bytes(b, 4, image->png, image->bytes);
    dot__pb_end(b, content);
    return dot__value_end(log, marks);
}

/* The file, its entry in the list of files, and the value of the row. */
static bool dot__image_row(dot_logger *log, int64_t step, const char *tag, const dot__image *image)
{
    dot__bytes *b = &log->row;
    char path[256];
    bool good = dot__row_begin(log, step);
    if (log->row_late) return good;
    snprintf(path, sizeof path, "files/media/images/%s", image->name);
    dot__wandb_path(log, path);
    if (!dot__image_store(log, image)) return false;
    dot__record_begin(log);
    size_t files = dot__pb_begin(&log->proto, 6), file = dot__pb_begin(&log->proto, 1);
    dot__pb_text(&log->proto, 1, path + strlen("files/"));
    dot__pb_integer(&log->proto, 3, 2);                     /* type: media; policy: now, 0 */
    dot__pb_end(&log->proto, file);
    dot__pb_end(&log->proto, files);
    good = dot__record_end(log) && good;
    dot__marks marks = dot__item_begin(b, tag);
    dot__bytes_text(b, "{\"_type\":\"image-file\",\"format\":\"png\"");
    dot__log_put_integer(b, "width", image->width);
    dot__log_put_integer(b, "height", image->height);
    dot__log_put_string(b, "path", path + strlen("files/"));
    dot__log_put_string(b, "sha256", image->sha256);
    dot__log_put_integer(b, "size", (int64_t)image->bytes);
    dot__bytes_text(b, "}");
    dot__item_end(b, marks);
    return good && !b->lost;
}

bool dot_logger_image(dot_logger *log, int64_t step, const char *tag, const void *png, size_t bytes)
{
    static const char function[] = "dot_logger_image";
    dot__image image;
    char path[256];
    if (!log) return false;
    memset(&image, 0, sizeof image);
    image.png = (const unsigned char *)png;
    image.bytes = bytes;
    if (!dot__image_read(log, function, &image) || !dot__log_step(log, function, "image", step, tag ? tag : "")) return false;
    dot__image_name(&image, tag, step);
    snprintf(path, sizeof path, "images/%s", image.name);
    dot__log_path(log, path);
    if (!dot__image_store(log, &image)) return false;
    dot__log_put_string(&log->text, "path", path);
    dot__log_put_integer(&log->text, "width", image.width);
    dot__log_put_integer(&log->text, "height", image.height);
    dot__log_put_integer(&log->text, "bytes", (int64_t)bytes);
    dot__log_put_string(&log->text, "sha256", image.sha256);
    if (!dot__log_end(log)) return false;
    bool good = !log->tensorboard || dot__image_event(log, step, tag, &image);
    return (!log->wandb || dot__image_row(log, step, tag, &image)) && good;
}

/* ---- flushing and closing ---- */

static bool dot__log_flush(dot_logger *log)
{
    bool good = dot__event_parameters(log);
    if (log->wandb) good = dot__row_write(log) && dot__summary_write(log) && good;
    for (int i = 0; i < DOT__SINKS; ++i) {
        dot__sink *sink = &log->sink[i];
        if (sink->fd < 0) continue;
        if (!dot__os_sync(sink->fd)) good = dot__log_fail(log, "flush", sink->path);
        snprintf(log->path, log->path_room, "%s", sink->path);
        good = dot__log_sync_folder(log) && good;
    }
    return good;
}

bool dot_logger_flush(dot_logger *log)
{
    if (!log) return false;
    dot__log_begin(log, "dot_logger_flush", "");            /* for the time */
    return dot__log_flush(log);
}

bool dot_logger_close(dot_logger *log, bool success)
{
    if (!log) return false;
    dot__log_begin(log, "dot_logger_close", "end");
    double seconds = log->time - log->origin;
    dot__bytes_text(&log->text, success ? ",\"success\":true" : ",\"success\":false");
    dot__log_put_number(&log->text, "seconds", seconds);
    if (!dot_ok(log->ctx) && dot__utf8(dot_error(log->ctx))) dot__log_put_string(&log->text, "error", dot_error(log->ctx));
    bool good = dot__log_end(log);
    if (log->tensorboard) {
        good = dot__event_parameters(log) && good;
        if (log->parameters.size > 0) good = dot__event_session(log, "_hparams_/session_end_info", 4, success ? 1 : 2) && good;
    }
    if (log->wandb) {
        good = dot__row_write(log) && dot__summary_write(log) && good;
        dot__record_begin(log);
        size_t end = dot__pb_begin(&log->proto, 18);
        if (!success) dot__pb_integer(&log->proto, 1, 1);
        dot__pb_integer(&log->proto, 2, seconds > 0 && seconds < INT32_MAX ? (int64_t)seconds : 0);
        dot__pb_end(&log->proto, end);
        good = dot__record_end(log) && good;
    }
    good = dot__log_flush(log) && good;
    dot__log_delete(log);
    return good;
}

/* What dot_context_destroy calls: W&B gets its open row, and no end. */
static void dot__loggers_close(dot_context *ctx)
{
    while (ctx->loggers) {
        dot_logger *log = ctx->loggers;
        log->function = "dot_context_destroy";
        if (log->sink[DOT__SINK_WANDB].fd >= 0) dot__row_write(log);
        dot__log_delete(log);
    }
}

#endif /* DOTOPT_IMPLEMENTATION */

/*
   LICENSE: public domain (www.unlicense.org) or MIT No Attribution, whichever you prefer; see the file LICENSE.
*/
