// kernels.frame_norm on a CPU: every pass reads x once.
// Equations, names and shapes are those of kernels/frame_norm/__init__.py: rows [B, T, S, C],
// contiguous, in fp32, bf16 or fp16; statistics [T, C], gain and bias [B, t, C], in fp32; arithmetic
// in fp32, and in fp64 where moments of blocks of rows are merged.
//
// A frame, [S, C], is one thread's work, and every channel's sums are taken in one order: the bits
// do not depend on the number of threads, and are the same with SSE2 and with AVX2 (checked by hand;
// AVX-512 has not been run). Results are the caller's to allocate.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <vector>

// One binary for every x86 CPU: the loops are compiled for several and chosen when it is loaded.
#if defined(__x86_64__) && defined(__ELF__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EVERY_CPU __attribute__((target_clones("default", "avx2", "avx512f")))
#else
#define FOR_EVERY_CPU
#endif
#define INLINE_LAMBDA __attribute__((always_inline))
#define INLINE inline INLINE_LAMBDA

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows whose values are summed plainly: errors grow with them, and with how many such sums there
// are, but not with the product.
constexpr int64_t kBlockRows = 64;
// As ATen: fewer values are not worth a thread.
constexpr int64_t kGrain = 32768;

struct Shape {
  int64_t B, T, S, C;
  int64_t frame() const { return S * C; }
};

// Gain or bias, [B, t, C].
struct PerSample {
  const float* values;
  int64_t num_frames;  // t: 1 or T
  INLINE const float* of(int64_t b, int64_t t, int64_t C) const {
    return values + (b * num_frames + (num_frames == 1 ? 0 : t)) * C;
  }
};

// What frames are scaled by.
struct Scaling {
  PerSample gain, bias;
  const float *mean, *var;
  float eps;
};

// Of one frame, each [C]: y = (x - mean) * scale + bias, scale = gain * rstd.
struct Coefficients {
  std::vector<float> scale, rstd;
  const float *mean = nullptr, *bias = nullptr;

  explicit Coefficients(int64_t C) : scale(C), rstd(C) {}

  INLINE void set(const Scaling& by, const Shape& shape, int64_t frame) {
    const int64_t b = frame / shape.T, t = frame % shape.T, C = shape.C;
    mean = by.mean + t * C;
    bias = by.bias.of(b, t, C);
    const float *gain = by.gain.of(b, t, C), *var = by.var + t * C;
    for (int64_t c = 0; c < C; ++c) {
      rstd[c] = 1.0f / std::sqrt(var[c] + by.eps);
      scale[c] = gain[c] * rstd[c];
    }
  }
};

// add(first, number) for groups of rows: four at once read and write their sums once.
template <class Add>
INLINE void by_fours(int64_t count, const Add& add) {
  int64_t s = 0;
  for (; s + 4 <= count; s += 4) add(s, std::integral_constant<int, 4>{});
  for (; s < count; ++s) add(s, std::integral_constant<int, 1>{});
}

// Means and sums of squared deviations of the rows so far, each [C], and of `count` more (Chan et
// al. 1983). In fp64: where |mean| is large against std, fp32 would round means by more than they
// differ, and a running mean would stand still where blocks move it by less than a rounding.
INLINE void merge(double* __restrict mean, double* __restrict squares,
                  const double* __restrict more_mean, const double* __restrict more_squares,
                  int64_t seen, int64_t count, int64_t C) {
  const double share = static_cast<double>(count) / static_cast<double>(seen + count);
  const double weight = static_cast<double>(seen) * share;
  for (int64_t c = 0; c < C; ++c) {
    const double delta = more_mean[c] - mean[c];
    mean[c] += delta * share;
    squares[c] += more_squares[c] + delta * delta * weight;
  }
}

// partial: [B, T, 2, C], a frame's mean and sum of squared deviations.
template <class T>
INLINE void frames_moments(const T* all, const Shape& shape, int64_t begin, int64_t end,
                           double* partial) {
  const int64_t C = shape.C;
  std::vector<float> sums(3 * C);
  float *__restrict mean = sums.data(), *__restrict squares = mean + C;
  float* __restrict from = squares + C;
  std::vector<double> block(2 * C);
  for (int64_t frame = begin; frame < end; ++frame) {
    const T* x = all + frame * shape.frame();
    double* own = partial + frame * 2 * C;
    std::fill_n(own, 2 * C, 0.0);
    for (int64_t first = 0; first < shape.S; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, shape.S - first);
      const T* __restrict rows = x + first * C;
      // Sums are of x less the block's first row: the rest is small where |mean| is not.
      for (int64_t c = 0; c < C; ++c) from[c] = static_cast<float>(rows[c]);
      std::fill_n(mean, 2 * C, 0.0f);
      by_fours(count, [&](int64_t s, auto number) INLINE_LAMBDA {
        for (int64_t c = 0; c < C; ++c) {
          float sum = 0;
          for (int r = 0; r < number; ++r)
            sum += static_cast<float>(rows[(s + r) * C + c]) - from[c];
          mean[c] += sum;
        }
      });
      for (int64_t c = 0; c < C; ++c) mean[c] /= static_cast<float>(count);
      by_fours(count, [&](int64_t s, auto number) INLINE_LAMBDA {
        for (int64_t c = 0; c < C; ++c) {
          float sum = 0;
          for (int r = 0; r < number; ++r) {
            const float centred = static_cast<float>(rows[(s + r) * C + c]) - from[c] - mean[c];
            sum += centred * centred;
          }
          squares[c] += sum;
        }
      });
      for (int64_t c = 0; c < C; ++c) {
        block[c] = static_cast<double>(from[c]) + static_cast<double>(mean[c]);
        block[C + c] = static_cast<double>(squares[c]);
      }
      merge(own, own + C, block.data(), block.data() + C, first, count, C);
    }
  }
}

template <class T>
INLINE void frames_normalized(const T* all, const Scaling& by, const Shape& shape, int64_t begin,
                              int64_t end, T* results) {
  const int64_t C = shape.C;
  Coefficients of(C);
  for (int64_t frame = begin; frame < end; ++frame) {
    of.set(by, shape, frame);
    const float *__restrict mean = of.mean, *__restrict bias = of.bias;
    const float* __restrict scale = of.scale.data();
    const T* __restrict x = all + frame * shape.frame();
    T* __restrict y = results + frame * shape.frame();
    const auto value = [&](int64_t i, int64_t c) INLINE_LAMBDA {
      const float before_relu = (static_cast<float>(x[i]) - mean[c]) * scale[c] + bias[c];
      return before_relu < 0.0f ? 0.0f : before_relu;  // a NaN stays one
    };
    for (int64_t first = 0; first < shape.frame(); first += C)
      for (int64_t c = 0; c < C; ++c) y[first + c] = static_cast<T>(value(first + c, c));
  }
}

// dy where the ReLU was open, else 0.
template <class T>
INLINE float passed(T dy, float centred, float scale, float bias) {
  return centred * scale + bias <= 0.0f ? 0.0f : static_cast<float>(dy);
}

// sums: [2, B, T, C], S1 and S2.
template <class T>
INLINE void frames_sums(const T* all_dy, const T* all, const Scaling& by, const Shape& shape,
                        int64_t begin, int64_t end, float* sums) {
  const int64_t C = shape.C;
  Coefficients of(C);
  std::vector<float> block(2 * C);
  float *__restrict first_sum = block.data(), *__restrict second_sum = first_sum + C;
  for (int64_t frame = begin; frame < end; ++frame) {
    of.set(by, shape, frame);
    const float *__restrict mean = of.mean, *__restrict bias = of.bias;
    const float* __restrict scale = of.scale.data();
    float *s1 = sums + frame * C, *s2 = s1 + shape.B * shape.T * C;
    std::fill_n(s1, C, 0.0f);
    std::fill_n(s2, C, 0.0f);
    for (int64_t first = 0; first < shape.S; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, shape.S - first);
      const int64_t offset = frame * shape.frame() + first * C;
      const T *__restrict x = all + offset, *__restrict dy = all_dy + offset;
      std::fill_n(first_sum, 2 * C, 0.0f);
      by_fours(count, [&](int64_t s, auto number) INLINE_LAMBDA {
        for (int64_t c = 0; c < C; ++c) {
          float sum = 0, product_sum = 0;
          for (int r = 0; r < number; ++r) {
            const int64_t i = (s + r) * C + c;
            const float centred = static_cast<float>(x[i]) - mean[c];
            const float g = passed(dy[i], centred, scale[c], bias[c]);
            sum += g;
            product_sum += g * centred;
          }
          first_sum[c] += sum;
          second_sum[c] += product_sum;
        }
      });
      // Not into a vector of their own, of fp64: with one GCC 12 leaves the loop above scalar, 18
      // times the time.
      for (int64_t c = 0; c < C; ++c) s1[c] += first_sum[c];
      for (int64_t c = 0; c < C; ++c) s2[c] += second_sum[c];
    }
    for (int64_t c = 0; c < C; ++c) s2[c] *= of.rstd[c];
  }
}

// terms: [2, T, C], or null where the statistics do not depend on x.
template <class T>
INLINE void frames_dx(const T* all_dy, const T* all, const Scaling& by, const float* terms,
                      const Shape& shape, int64_t begin, int64_t end, T* results) {
  const int64_t C = shape.C;
  Coefficients of(C);
  std::vector<float> shared(2 * C);
  float *__restrict offset = shared.data(), *__restrict slope = offset + C;
  for (int64_t frame = begin; frame < end; ++frame) {
    of.set(by, shape, frame);
    const float *__restrict mean = of.mean, *__restrict bias = of.bias;
    const float* __restrict scale = of.scale.data();
    const T* __restrict x = all + frame * shape.frame();
    const T* __restrict dy = all_dy + frame * shape.frame();
    T* __restrict dx = results + frame * shape.frame();
    const auto scaled = [&](int64_t i, int64_t c, float centred) INLINE_LAMBDA {
      return passed(dy[i], centred, scale[c], bias[c]) * scale[c];
    };
    if (terms == nullptr) {
      for (int64_t first = 0; first < shape.frame(); first += C)
        for (int64_t c = 0; c < C; ++c) {
          const int64_t i = first + c;
          dx[i] = static_cast<T>(scaled(i, c, static_cast<float>(x[i]) - mean[c]));
        }
      continue;
    }
    const float* first_term = terms + frame % shape.T * C;
    const float* second_term = first_term + shape.T * C;
    for (int64_t c = 0; c < C; ++c) {
      offset[c] = first_term[c] * of.rstd[c];
      slope[c] = second_term[c] * of.rstd[c] * of.rstd[c];
    }
    for (int64_t first = 0; first < shape.frame(); first += C)
      for (int64_t c = 0; c < C; ++c) {
        const int64_t i = first + c;
        const float centred = static_cast<float>(x[i]) - mean[c];
        dx[i] = static_cast<T>(scaled(i, c, centred) - (centred * slope[c] + offset[c]));
      }
  }
}

// The passes in the forms that are compiled for every CPU, which a template cannot be.
#define PASSES(T)                                                                                  \
  FOR_EVERY_CPU void moments(const T* x, const Shape& shape, int64_t begin, int64_t end,           \
                             double* partial) {                                                    \
    frames_moments(x, shape, begin, end, partial);                                                 \
  }                                                                                                \
  FOR_EVERY_CPU void normalize(const T* x, const Scaling& by, const Shape& shape, int64_t begin,   \
                               int64_t end, T* y) {                                                \
    frames_normalized(x, by, shape, begin, end, y);                                                \
  }                                                                                                \
  FOR_EVERY_CPU void sums(const T* dy, const T* x, const Scaling& by, const Shape& shape,          \
                          int64_t begin, int64_t end, float* result) {                             \
    frames_sums(dy, x, by, shape, begin, end, result);                                             \
  }                                                                                                \
  FOR_EVERY_CPU void dx(const T* dy, const T* x, const Scaling& by, const float* terms,            \
                        const Shape& shape, int64_t begin, int64_t end, T* result) {               \
    frames_dx(dy, x, by, terms, shape, begin, end, result);                                        \
  }
PASSES(float)
PASSES(BFloat16)
PASSES(Half)

// ------------------------------------------------------------------------ arguments

void check(const Tensor& tensor, const char* name, ScalarType dtype, int64_t num_values) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous");
  STD_TORCH_CHECK(tensor.numel() == num_values, name, " is of the wrong size");
}

Shape shape_of(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "x is not [B, T, S, C]");
  check(x, "x", x.scalar_type(), x.numel());
  return {x.size(0), x.size(1), x.size(2), x.size(3)};
}

const float* values(const Tensor& tensor, const char* name, int64_t num_values) {
  check(tensor, name, ScalarType::Float, num_values);
  return static_cast<const float*>(tensor.const_data_ptr());
}

PerSample per_sample(const Tensor& tensor, const char* name, const Shape& shape) {
  STD_TORCH_CHECK(tensor.dim() == 3, name, " is not [B, t, C]");
  const int64_t t = tensor.size(1);
  STD_TORCH_CHECK(t == 1 || t == shape.T, name, " is neither of 1 nor of all frames");
  return {values(tensor, name, shape.B * t * shape.C), t};
}

Scaling scaling(const Tensor& gain, const Tensor& bias, const Tensor& mean, const Tensor& var,
                double eps, const Shape& shape) {
  const int64_t num_statistics = shape.T * shape.C;
  return {per_sample(gain, "gain", shape), per_sample(bias, "bias", shape),
          values(mean, "mean", num_statistics), values(var, "var", num_statistics),
          static_cast<float>(eps)};
}

// A pointer to values of a dtype that is as x's.
template <class T>
const T* as_x(const Tensor& tensor, const char* name, const Tensor& x) {
  check(tensor, name, x.scalar_type(), x.numel());
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* result_as_x(Tensor& tensor, const Tensor& x) {
  check(tensor, "the result", x.scalar_type(), x.numel());
  return static_cast<T*>(tensor.mutable_data_ptr());
}

float* result(Tensor& tensor, int64_t num_values) {
  check(tensor, "the result", ScalarType::Float, num_values);
  return static_cast<float*>(tensor.mutable_data_ptr());
}

// work(T{}) with the type of x's values.
template <class Work>
void with_type_of(const Tensor& x, const Work& work) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return work(float{});
    case ScalarType::BFloat16: return work(BFloat16{});
    case ScalarType::Half: return work(Half{});
    default: STD_TORCH_CHECK(false, "x is neither fp32, bf16 nor fp16");
  }
}

// work(begin, end) over all frames.
template <class Work>
void over_frames(const Shape& shape, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, shape.frame()));
  torch::stable::parallel_for(0, shape.B * shape.T, grain, work);
}

// ------------------------------------------------------------------------ operators

void moments_op(Tensor x, Tensor mean, Tensor var) {
  const Shape shape = shape_of(x);
  STD_TORCH_CHECK(x.numel() > 0, "an empty video has no statistics");
  const int64_t num_statistics = shape.T * shape.C;
  float *means = result(mean, num_statistics), *vars = result(var, num_statistics);
  std::vector<double> partial(shape.B * num_statistics * 2);
  with_type_of(x, [&](auto like) {
    const auto* values = as_x<decltype(like)>(x, "x", x);
    over_frames(shape, [&](int64_t begin, int64_t end) {
      moments(values, shape, begin, end, partial.data());
    });
  });
  std::vector<double> all(2 * shape.C);
  double *mean_C = all.data(), *squares_C = mean_C + shape.C;
  for (int64_t t = 0; t < shape.T; ++t) {
    std::fill_n(mean_C, 2 * shape.C, 0.0);
    for (int64_t b = 0; b < shape.B; ++b) {
      const double* frame = partial.data() + (b * shape.T + t) * 2 * shape.C;
      merge(mean_C, squares_C, frame, frame + shape.C, b * shape.S, shape.S, shape.C);
    }
    for (int64_t c = 0; c < shape.C; ++c) {
      means[t * shape.C + c] = static_cast<float>(mean_C[c]);
      vars[t * shape.C + c] = static_cast<float>(squares_C[c] / (shape.B * shape.S));
    }
  }
}

void normalize_op(Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var, double eps,
                  Tensor y) {
  const Shape shape = shape_of(x);
  const Scaling by = scaling(gain, bias, mean, var, eps, shape);
  with_type_of(x, [&](auto like) {
    using T = decltype(like);
    const T* values = as_x<T>(x, "x", x);
    T* results = result_as_x<T>(y, x);
    over_frames(shape, [&](int64_t begin, int64_t end) {
      normalize(values, by, shape, begin, end, results);
    });
  });
}

void sums_op(Tensor dy, Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var, double eps,
             Tensor sums_2BTC) {
  const Shape shape = shape_of(x);
  const Scaling by = scaling(gain, bias, mean, var, eps, shape);
  float* results = result(sums_2BTC, 2 * shape.B * shape.T * shape.C);
  with_type_of(x, [&](auto like) {
    using T = decltype(like);
    const T *values = as_x<T>(x, "x", x), *grads = as_x<T>(dy, "dy", x);
    over_frames(shape, [&](int64_t begin, int64_t end) {
      sums(grads, values, by, shape, begin, end, results);
    });
  });
}

void dx_op(Tensor dy, Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var,
           std::optional<Tensor> terms, double eps, Tensor dx_BTSC) {
  const Shape shape = shape_of(x);
  const Scaling by = scaling(gain, bias, mean, var, eps, shape);
  const float* shared = terms ? values(*terms, "terms", 2 * shape.T * shape.C) : nullptr;
  with_type_of(x, [&](auto like) {
    using T = decltype(like);
    const T *values = as_x<T>(x, "x", x), *grads = as_x<T>(dy, "dy", x);
    T* results = result_as_x<T>(dx_BTSC, x);
    over_frames(shape, [&](int64_t begin, int64_t end) {
      dx(grads, values, by, shared, shape, begin, end, results);
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(sswgan_cpu, m) {
  m.def("moments(Tensor x, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def(
      "normalize(Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var, float eps, "
      "Tensor(a!) y) -> ()");
  m.def(
      "sums(Tensor dy, Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var, float eps, "
      "Tensor(a!) sums) -> ()");
  m.def(
      "dx(Tensor dy, Tensor x, Tensor gain, Tensor bias, Tensor mean, Tensor var, Tensor? terms, "
      "float eps, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sswgan_cpu, CPU, m) {
  m.impl("moments", TORCH_BOX(&moments_op));
  m.impl("normalize", TORCH_BOX(&normalize_op));
  m.impl("sums", TORCH_BOX(&sums_op));
  m.impl("dx", TORCH_BOX(&dx_op));
}
