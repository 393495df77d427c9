/* dotopt.h - v0.1 - train neural networks from one C file - public domain or MIT-0 (your choice)

   Do this in ONE file of your program, to create the implementation:

       #define DOTOPT_IMPLEMENTATION
       #include "dotopt.h"

   and include "dotopt.h" plainly everywhere else. Never put the define in a header or on the
   compiler's command line. Build:  cc -O2 program.c -lm -pthread

   LIMITS
     - CPU only in this file (x86-64 with AVX2+FMA is fast; everything else runs portable C).
     - Dense tensors, up to 8 dimensions, contiguous, 32- and 64-bit floats; no sparse tensors, no int8.
     - One process, one machine; no distributed training.
     - Gradients are first order: the backward pass is not itself recorded.
     - Convolution weights are at most 2^31 elements, an image at most 2^31 elements.

   WHAT IT IS
     Tensors, eager operations with reverse-mode autograd, layers, losses, optimizers, schedules,
     datasets and safetensors files. It needs libc, libm and pthreads, and nothing else.

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
     - A context may be used by one thread at a time; different contexts are independent.

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
     [11 utilities]      gradient check, norms
     [12 files]          safetensors, checkpoints, datasets
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
const char *dot_kernels(const dot_context *ctx);    /* "avx2" or "portable" */

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

/* The gradient of `t` after dot_backward, a tensor of the same shape; NULL (without an error) when it has none. */
dot_tensor *dot_tensor_grad(dot_tensor *t);

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
dot_layer *dot_nn_batch_norm(dot_context *ctx, int64_t channels);                   /* eps 1e-5, momentum 0.1 */
dot_layer *dot_nn_layer_norm(dot_context *ctx, int64_t size);                       /* over the last axis, eps 1e-5 */
dot_layer *dot_nn_group_norm(dot_context *ctx, int groups, int64_t channels);       /* eps 1e-5 */
dot_layer *dot_nn_embedding(dot_context *ctx, int64_t rows, int64_t size);
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
/* The same of its gradient; all zero when it has none. */
bool dot_parameter_grad(dot_layer *layer, const char *name, int lane, double *out, int64_t count);

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

/* The list of optimizers: X(constant, name, description, paper). The enum, the names, the defaults, the tests and the command
   lines of the examples all read this list. */
#define DOT_OPTIMIZERS(X) \
    X(DOT_SGD,            "sgd",            "SGD with momentum, dampening, Nesterov",   "Sutskever et al. 2013; torch.optim.SGD") \
    X(DOT_ADAM,           "adam",           "Adam, weight decay as L2 by default",      "Kingma, Ba 2015; torch.optim.Adam") \
    X(DOT_ADAMW,          "adamw",          "Adam with decoupled weight decay",         "Loshchilov, Hutter 2019; torch.optim.AdamW") \
    X(DOT_ADAFACTOR,      "adafactor",      "factored second moment, relative step",    "Shazeer, Stern 2018") \
    X(DOT_ADAMW_FACTORED, "adamw-factored", "Adafactor's moments and clipping with AdamW's schedule and decay", "this library")

typedef enum dot_algorithm {
#define DOT__ENUM(constant, name, description, paper) constant,
    DOT_OPTIMIZERS(DOT__ENUM)
#undef DOT__ENUM
    DOT_ALGORITHMS
} dot_algorithm;

const char *dot_algorithm_name(dot_algorithm algorithm);            /* "adamw"; NULL when out of range */
const char *dot_algorithm_description(dot_algorithm algorithm);
const char *dot_algorithm_paper(dot_algorithm algorithm);
bool        dot_algorithm_find(const char *name, dot_algorithm *algorithm);

/* Where the weight decay lambda goes; eta is the schedule's multiplier, lr the base learning rate. */
typedef enum dot_decay {
    DOT_DECAY_L2,           /* gradient += lambda theta, before the moments             torch Adam, SGD */
    DOT_DECAY_LR,           /* theta *= 1 - eta lr lambda                               torch AdamW */
    DOT_DECAY_SCHEDULED,    /* theta *= 1 - eta decay_lr lambda: free of lr             Loshchilov, Hutter 2019, alg. 2 */
    DOT_DECAY_NORMALIZED    /* the same with lambda / sqrt(decay_period)                ibid., appendix B.1, AdamWR */
} dot_decay;

typedef struct dot_parameter_group {
    const char *pattern;    /* names it takes, with * and ?, or NULL: none by name; copied */
    unsigned kinds;         /* kinds it takes, e.g. DOT_KIND_BIAS | DOT_KIND_NORM; 0: none by kind */
    double lr, weight_decay;
} dot_parameter_group;

typedef struct dot_optimizer_options {
    uint32_t magic;             /* set by dot_optimizer_defaults */
    dot_algorithm algorithm;
    double lr;                  /* SGD, Adam, AdamW 1e-3; Adafactor and factored AdamW 1e-2: the largest relative step */
    double weight_decay;        /* lambda; AdamW 1e-2, else 0 */
    dot_decay decay;            /* SGD, Adam: DOT_DECAY_L2, else DOT_DECAY_LR */
    double decay_lr;            /* 1; DOT_DECAY_SCHEDULED and _NORMALIZED: what stands where lr would */
    double decay_period;        /* 1; DOT_DECAY_NORMALIZED: steps in the run, or in the present restart period */
    double beta1;               /* Adam 0.9; SGD: the momentum, 0; Adafactor: the first moment's decay, 0 for none */
    double beta2;               /* Adam 0.999 */
    double eps;                 /* Adam 1e-8 */
    double dampening;           /* SGD 0 */
    bool nesterov;              /* SGD false */
    bool relative_step;         /* Adafactor: step min(lr, 1/sqrt(t)) instead of lr; true; factored AdamW: false */
    bool scale_parameter;       /* Adafactor: times max(eps2, RMS(theta)); true */
    double beta2_exponent;      /* Adafactor: beta2_t = 1 - t^-0.8; 0.8 */
    double eps1, eps2;          /* Adafactor: 1e-30, 1e-3 */
    double clip_threshold;      /* Adafactor: update clipped to this RMS; 1 */
    bool maximize;              /* false */
    const dot_parameter_group *groups;  /* a parameter belongs to the first group that takes it by name or kind; */
    int group_count;                    /* else to the default group, with the lr and weight_decay above. NULL, 0 */
} dot_optimizer_options;
dot_optimizer_options dot_optimizer_defaults(dot_algorithm algorithm);

typedef struct dot_optimizer dot_optimizer;

/* An optimizer over all trainable parameters of `layer`. State: SGD n (momentum only), Adam 2n, Adafactor about
   rows + columns of each matrix (a tensor is factored as [out, rest]) and n with beta1, all in the parameters' type. */
dot_optimizer *dot_optimizer_create(dot_context *ctx, dot_layer *layer, const dot_optimizer_options *options);

/* One update of every parameter that has a gradient, with the learning rate times `multiplier` (a schedule's
   value, 1 for none); then the gradients are forgotten. The rules, with g the gradient (clipped, plus L2), t = 1, 2, ...:
     SGD        b = beta1 b + (1 - dampening) g (first step: b = g); g = nesterov ? g + beta1 b : b; theta -= lr g
     Adam(W)    m += (1-beta1)(g - m); v = beta2 v + (1-beta2) g^2; theta -= lr/(1-beta1^t) m / (sqrt(v/(1-beta2^t)) + eps)
     Adafactor  R, C: means over columns and rows of g^2 + eps1, decayed by beta2_t; V = R C / mean(R); U = g / sqrt(V);
                U /= max(1, RMS(U)/clip_threshold); a = max(eps2, RMS(theta)) min(lr, 1/sqrt(t)) multiplier;
                beta1: m = beta1 m + (1-beta1) a U, theta -= m; else theta -= a U. Vectors and scalars keep V whole.
   Decoupled decay is applied to theta before the update. */
bool dot_optimizer_step(dot_optimizer *optimizer, double multiplier);

/* Change a hyperparameter of one group and lane (DOT_ALL: of all); group 0 is the default group, then 1, 2, ... */
typedef enum dot_hyper { DOT_HYPER_LR, DOT_HYPER_WEIGHT_DECAY, DOT_HYPER_BETA1, DOT_HYPER_BETA2, DOT_HYPER_EPS,
                         DOT_HYPER_DECAY_PERIOD, DOT_HYPERS } dot_hyper;
bool   dot_optimizer_set(dot_optimizer *optimizer, dot_hyper hyper, int group, int lane, double value);
double dot_optimizer_get(const dot_optimizer *optimizer, dot_hyper hyper, int group, int lane);
int64_t dot_optimizer_steps(const dot_optimizer *optimizer);        /* steps taken: t */
size_t  dot_optimizer_state_bytes(const dot_optimizer *optimizer);  /* of all lanes */

/* Scales the gradients of the next step by min(1, max_norm / (norm + 1e-6)), norm over all parameters of the optimizer, for
   each lane by itself. Returns lane 0's norm before clipping; dot_grad_norm gives each lane's. */
double dot_clip_grad_norm(dot_optimizer *optimizer, double max_norm);
double dot_grad_norm(dot_optimizer *optimizer, int lane);
double dot_weight_norm(dot_optimizer *optimizer, int lane);

/* ==== [10 schedules] =============================================================================== */

/* A schedule is a pure function from the step (0, 1, ...) to a multiplier of the base learning rate; it has no
   state, and is clamped outside its range. */
typedef enum dot_schedule_kind { DOT_SCHEDULE_CONSTANT, DOT_SCHEDULE_STEP_DROP, DOT_SCHEDULE_COSINE,
                                 DOT_SCHEDULE_WARM_RESTARTS } dot_schedule_kind;
typedef struct dot_schedule {
    dot_schedule_kind kind;
    int64_t total;              /* steps of the run, or of the first period */
    double floor;               /* the least multiplier */
    double factor;              /* step drop: at each milestone; warm restarts: by which periods grow */
    int64_t milestones[16];
    int milestone_count;
} dot_schedule;

dot_schedule dot_schedule_constant(void);                                               /* 1 */
dot_schedule dot_schedule_step_drop(const int64_t *milestones, int count, double gamma);/* gamma^(milestones <= step) */
dot_schedule dot_schedule_cosine(int64_t total, double floor);     /* floor + (1-floor)/2 (1 + cos(pi min(step, total)/total)) */
dot_schedule dot_schedule_warm_restarts(int64_t first, int factor, double floor);
                                    /* the cosine over periods first, first*factor, ...      Loshchilov, Hutter 2017 (SGDR) */
double  dot_schedule_at(const dot_schedule *schedule, int64_t step);                    /* NaN for an invalid schedule */
int64_t dot_schedule_period(const dot_schedule *schedule, int64_t step, int64_t total); /* length of the restart period
                                    that `step` lies in; `total` for the schedules without restarts */

/* ==== [11 utilities] =============================================================================== */

/* Compares the gradients of the scalar f(user) with central differences, for every element of `inputs` (persistent
   DOT_F64 tensors with gradient, in a context of one lane). f must call dot_step_begin first and return the loss. Returns
   the largest |analytic - numeric| / max(1, |analytic|, |numeric|), or NaN after an error. step: 1e-6 is PyTorch's. */
typedef dot_tensor *(*dot_loss_function)(void *user);
double dot_gradient_check(dot_context *ctx, dot_loss_function f, void *user, dot_tensor *const *inputs, int count,
                          double step);

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

#ifdef __cplusplus
}
#endif

/* Stop now if you only want to use the library: what follows is how it works. */

#endif /* DOTOPT_H */
