// What the CPU kernels share: data passes through tiles that fit into the L1 cache, converted to the
// accumulation type.
//
// Every *_cpu.cpp is compiled once for each instruction set, FM_ISA naming the namespace; nothing here may be
// an ordinary inline function outside that namespace, or the linker could pick the AVX-512 copy for an older
// processor.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "dtype.h"
#include "float16.h"
#include "normal.h"
#include "operand.h"
#include "philox.h"

namespace fm {
namespace FM_ISA {

// Small enough that the streams of a call are read on without long pauses, which the hardware's prefetching needs:
// measured on bfloat16 with four operands, 1024 elements took four times as long, 512 half as long again, and 128 no
// less.
constexpr int64_t tile_elements = 256;
constexpr int64_t parallel_elements = 32768;  // below this, waking the other threads costs more than they save
constexpr int64_t segment_elements = 32;      // rows at least this long get a loop of their own, shorter ones share one

constexpr int64_t minimum(int64_t a, int64_t b) { return a < b ? a : b; }

// Outputs at least this large are streamed past the caches: they would be evicted before anyone reads them,
// and an ordinary store reads each line before it writes it.
constexpr int64_t streaming_bytes = int64_t{24} << 20;

// Copies bytes, a multiple of 64, to an address that is a multiple of 64 and is not read again soon.
static inline void stream_copy(void* out, const void* in, int64_t bytes) {
#if defined(__SSE2__)
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
#if defined(__AVX512F__)
  for (int64_t done = 0; done < bytes; done += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + done), _mm512_load_si512(from + done));
#elif defined(__AVX__)
  for (int64_t done = 0; done < bytes; done += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done),
                        _mm256_load_si256(reinterpret_cast<const __m256i*>(from + done)));
#else
  for (int64_t done = 0; done < bytes; done += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + done),
                     _mm_load_si128(reinterpret_cast<const __m128i*>(from + done)));
#endif
#else
  std::memcpy(out, in, static_cast<size_t>(bytes));
#endif
}

template <typename T>
struct DtypeOf;
template <>
struct DtypeOf<float> {
  static constexpr Dtype value = Dtype::f32;
};
template <>
struct DtypeOf<double> {
  static constexpr Dtype value = Dtype::f64;
};

static inline void widen_f16(const uint16_t* in, float* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  for (; i < n; ++i) out[i] = f16_to_float(in[i]);
}

static inline void narrow_f16(const float* in, uint16_t* out, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512F__)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_cvtps_ph(_mm512_loadu_ps(in + i), 0));
#elif defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), 0));
#endif
  for (; i < n; ++i) out[i] = float_to_f16(in[i]);
}

// n elements from index i on, as T: the data itself where it has that type, else converted into the buffer.
template <typename T>
static inline const T* load(const void* data, Dtype dtype, int64_t i, int64_t n, T* buffer) {
  if (dtype == DtypeOf<T>::value) return static_cast<const T*>(data) + i;
  if (dtype == Dtype::f32) {
    const float* in = static_cast<const float*>(data) + i;
    for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<T>(in[j]);
  } else if (dtype == Dtype::bf16) {
    const uint16_t* in = static_cast<const uint16_t*>(data) + i;
    for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<T>(bf16_to_float(in[j]));
  } else if constexpr (sizeof(T) == sizeof(float)) {
    widen_f16(static_cast<const uint16_t*>(data) + i, buffer, n);
  } else {
    const uint16_t* in = static_cast<const uint16_t*>(data) + i;
    for (int64_t j = 0; j < n; ++j) buffer[j] = static_cast<T>(f16_to_float(in[j]));
  }
  return buffer;
}

// Rounds n values to dtype.
template <typename T>
static inline void convert(void* out, Dtype dtype, int64_t n, const T* values) {
  if (dtype == Dtype::f64) {
    for (int64_t j = 0; j < n; ++j) static_cast<double*>(out)[j] = static_cast<double>(values[j]);
  } else if (dtype == Dtype::f32) {
    for (int64_t j = 0; j < n; ++j) static_cast<float*>(out)[j] = static_cast<float>(values[j]);
  } else if (dtype == Dtype::bf16) {
    for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = float_to_bf16(static_cast<float>(values[j]));
  } else if constexpr (sizeof(T) == sizeof(float)) {
    narrow_f16(values, static_cast<uint16_t*>(out), n);
  } else {
    for (int64_t j = 0; j < n; ++j) static_cast<uint16_t*>(out)[j] = float_to_f16(static_cast<float>(values[j]));
  }
}

// An output tensor of the kernels.
struct Output {
  // Streamed stores must alternate with the loads they depend on: a burst of them leaves the memory bus idle
  // before and after. Measured at 16.8 M floats: chunks of 64 as fast as single vectors, of 1024 a third
  // slower.
  static constexpr int64_t chunk = 64;

  char* data;
  Dtype dtype;
  int64_t size;
  bool streaming;

  Output(void* data_, Dtype dtype_, int64_t elements)
      : data(static_cast<char*>(data_)),
        dtype(dtype_),
        size(bytes_of(dtype_)),
        streaming(elements * size >= streaming_bytes) {}

  // True where values of type T may be written in place, without a buffer.
  template <typename T>
  bool takes() const {
    return dtype == DtypeOf<T>::value && !streaming;
  }

  // Rounds and writes n <= tile_elements values from index i on; fill(j, m, out) makes values j .. j + m - 1
  // of them.
  template <typename T, typename Fill>
  void produce(int64_t i, int64_t n, Fill fill) const {
    char* out = data + i * size;
    if (takes<T>()) {
      fill(0, n, reinterpret_cast<T*>(out));
      return;
    }
    alignas(64) T values[tile_elements];
    if (!streaming) {
      fill(0, n, values);
      convert(out, dtype, n, values);
      return;
    }
    const int64_t to_boundary = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(out) & 63) / size;
    int64_t j = minimum(n, to_boundary);
    if (j > 0) {
      fill(0, j, values);
      convert(out, dtype, j, values);
    }
    for (; j + chunk <= n; j += chunk) {
      fill(j, chunk, values);
      if (dtype == DtypeOf<T>::value) {
        stream_copy(out + j * size, values, chunk * size);
      } else {
        alignas(64) char rounded[chunk * sizeof(double)];
        convert(rounded, dtype, chunk, values);
        stream_copy(out + j * size, rounded, chunk * size);
      }
    }
    if (j < n) {
      fill(j, n - j, values);
      convert(out + j * size, dtype, n - j, values);
    }
  }

  template <typename T>
  void write(int64_t i, int64_t n, const T* values) const {
    produce<T>(i, n,
               [=](int64_t j, int64_t m, T* out) { std::memcpy(out, values + j, static_cast<size_t>(m) * sizeof(T)); });
  }

  // After a thread's last write: streamed data is then visible to whoever synchronises with the thread.
  void finish() const {
#if defined(__SSE2__)
    if (streaming) _mm_sfence();
#endif
  }
};

// Words are made for this many blocks at once, so that every loop over them vectorises at full width.
constexpr int64_t noise_lanes = 32;
constexpr int64_t noise_buffer = tile_elements + 4 * noise_lanes + 4;

struct WordLanes {
  alignas(64) uint32_t w[4][noise_lanes];
};

static inline void draw_words(uint64_t seed, uint64_t block, uint64_t stream, WordLanes& words) {
#pragma omp simd
  for (int64_t i = 0; i < noise_lanes; ++i) {
    const Words r = philox4x32(seed, block + static_cast<uint64_t>(i), stream);
    words.w[0][i] = r.w0;
    words.w[1][i] = r.w1;
    words.w[2][i] = r.w2;
    words.w[3][i] = r.w3;
  }
}

// Numbers first .. first + n - 1 of a stream, n <= tile_elements. Returns where they begin in the buffer,
// which holds noise_buffer elements.
template <typename T>
static inline T* draw_normals(uint64_t seed, uint64_t stream, int64_t first, int64_t n, T* buffer) {
  const int64_t lead = first % 4;
  const uint64_t block = static_cast<uint64_t>(first / 4);
  WordLanes words;
  alignas(64) T z[4][noise_lanes];
  for (int64_t done = 0; done < lead + n; done += 4 * noise_lanes) {
    draw_words(seed, block + static_cast<uint64_t>(done / 4), stream, words);
#pragma omp simd
    for (int64_t i = 0; i < noise_lanes; ++i) box_muller(words.w[0][i], words.w[1][i], z[0][i], z[1][i]);
#pragma omp simd
    for (int64_t i = 0; i < noise_lanes; ++i) box_muller(words.w[2][i], words.w[3][i], z[2][i], z[3][i]);
    T* out = buffer + done;
    for (int64_t i = 0; i < noise_lanes; ++i) {
      out[4 * i] = z[0][i];
      out[4 * i + 1] = z[1][i];
      out[4 * i + 2] = z[2][i];
      out[4 * i + 3] = z[3][i];
    }
  }
  return buffer + lead;
}

// n elements of an operand from index i on, as T. Noise is rounded to dtype first, so that drawing it again
// and having stored it are the same. `elements` is the size of the whole tensor.
template <typename T>
static inline const T* load_operand(const Operand& operand, Dtype dtype, int64_t elements, int64_t i, int64_t n,
                                    T* buffer) {
  if (operand.data != nullptr) return load(operand.data, dtype, i, n, buffer);
  const uint64_t seed = static_cast<uint64_t>(*operand.seed), stream = static_cast<uint64_t>(operand.stream);
  T* values;
  if constexpr (sizeof(T) == sizeof(double)) {
    if (dtype == Dtype::f64) {
      values = draw_normals(seed, stream, operand.offset + i, n, buffer);
    } else {
      alignas(64) float narrow[noise_buffer];
      const float* drawn = draw_normals(seed, stream, operand.offset + i, n, narrow);
      for (int64_t j = 0; j < n; ++j) buffer[j] = drawn[j];
      values = buffer;
    }
  } else {
    values = draw_normals(seed, stream, operand.offset + i, n, buffer);
  }
  if (dtype == Dtype::bf16) {
    for (int64_t j = 0; j < n; ++j) values[j] = bf16_to_float(float_to_bf16(static_cast<float>(values[j])));
  } else if (dtype == Dtype::f16) {
    alignas(64) uint16_t half[tile_elements];
    convert(half, dtype, n, values);
    load(half, dtype, 0, n, values);
  }
  if (operand.store != nullptr) {
    const Output store(operand.store, dtype, elements);
    store.write(i, n, values);
    store.finish();
  }
  return values;
}

// sum + c p, rounded once where the hardware does that: what the compiler fuses by itself differs between the body of a
// vector loop and its remainder, and a sample's result must not depend on its place in the batch.
template <typename T>
static inline T add_product(T sum, T c, T p) {
#if defined(__FMA__) || defined(__aarch64__)
  return std::fma(c, p, sum);
#else
  return sum + c * p;
#endif
}

// Data as it is used: bfloat16 is widened where it is read, everything else has been converted before.
template <typename T>
static inline T widened(T value) {
  return value;
}
template <typename T>
static inline T widened(uint16_t bits) {
  return bf16_to_float(bits);
}

// y (+)= sum_k c_k p_k with one coefficient an operand.
template <int count, bool accumulate, typename T, typename In>
static inline void linear_row(T* y, const In* const* p, const T* c, int64_t first, int64_t n) {
  // Local copies: a store to y could otherwise change what the arrays hold.
  const In* q[count];
  T b[count];
  for (int k = 0; k < count; ++k) {
    q[k] = p[k] + first;
    b[k] = c[k];
  }
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    T sum = accumulate ? add_product(y[j], b[0], widened<T>(q[0][j])) : b[0] * widened<T>(q[0][j]);
    for (int k = 1; k < count; ++k) sum = add_product(sum, b[k], widened<T>(q[k][j]));
    y[j] = sum;
  }
}

// The sum of partial sums, `stride` apart, in a fixed order, halves first: its error grows with the logarithm of their
// number.
static inline double sum_of_partials(const double* p, int64_t count, int64_t stride = 1) {
  if (count <= 8) {
    double sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += p[i * stride];
    return sum;
  }
  const int64_t half = count / 2;
  return sum_of_partials(p, half, stride) + sum_of_partials(p + half * stride, count - half, stride);
}

// Partial sums of a reduction, a few of them on the stack.
struct Partials {
  double few[64];
  double* data;

  explicit Partials(int64_t count)
      : data(count <= 64 ? few : static_cast<double*>(std::malloc(static_cast<size_t>(count) * sizeof(double)))) {}
  ~Partials() {
    if (data != few) std::free(data);
  }
  Partials(const Partials&) = delete;
  Partials& operator=(const Partials&) = delete;
};

// linear_row with a coefficient an element.
template <bool accumulate, typename T>
static inline void linear_element(T* y, const T* p, const T* c, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = accumulate ? add_product(y[j], c[j], p[j]) : c[j] * p[j];
}

// Coefficients of n consecutive elements from index i on, an entry each.
template <typename T>
static inline void expand(const Coefficient& c, int64_t inner, int64_t i, int64_t n, T* out) {
  if (c.data == nullptr || c.stride == 0) {
    const T value = coefficient_at<T>(c, 0);
    for (int64_t j = 0; j < n; ++j) out[j] = value;
    return;
  }
  const int64_t entry_elements = inner * c.rows_per_entry;
  int64_t entry = i / entry_elements;
  int64_t left = entry_elements - i % entry_elements;
  for (int64_t j = 0; j < n; ++entry, left = entry_elements) {
    const T value = coefficient_at<T>(c, entry * c.rows_per_entry);
    for (const int64_t end = minimum(n, j + left); j < end; ++j) out[j] = value;
  }
}

// Up to four operands of a tile, of which one loop forms the combination.
template <typename T>
class Linear {
 public:
  static constexpr int limit = 4;

  void load(const Operand* operands, int count, Dtype dtype, int64_t elements, int64_t i, int64_t n) {
    operands_ = operands;
    count_ = count;
    narrow_ = sizeof(T) == sizeof(float) && dtype == Dtype::bf16;
    for (int k = 0; k < count; ++k) narrow_ = narrow_ && operands[k].data != nullptr;
    for (int k = 0; k < count; ++k) {
      if (narrow_)
        bits_[k] = static_cast<const uint16_t*>(operands[k].data) + i;
      else
        values_[k] = load_operand(operands[k], dtype, elements, i, n, buffers_[k]);
    }
  }

  void select_row(Coefficient Operand::* which, int64_t row) {
    for (int k = 0; k < count_; ++k) coefficients_[k] = coefficient_at<T>(operands_[k].*which, row);
  }

  // y (+)= the combination for elements j .. j + n - 1 of the tile.
  template <bool accumulate>
  void evaluate(int64_t j, int64_t n, T* y) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (narrow_) return evaluate<accumulate>(bits_, j, n, y);
    }
    evaluate<accumulate>(values_, j, n, y);
  }

 private:
  template <bool accumulate, typename In>
  void evaluate(const In* const* p, int64_t j, int64_t n, T* y) const {
    if (count_ == 1) linear_row<1, accumulate>(y, p, coefficients_, j, n);
    if (count_ == 2) linear_row<2, accumulate>(y, p, coefficients_, j, n);
    if (count_ == 3) linear_row<3, accumulate>(y, p, coefficients_, j, n);
    if (count_ == 4) linear_row<4, accumulate>(y, p, coefficients_, j, n);
  }

  const Operand* operands_;
  int count_;
  bool narrow_;  // all operands are bfloat16 tensors, which need no buffers
  const T* values_[limit];
  const uint16_t* bits_[limit];
  T coefficients_[limit];
  alignas(64) T buffers_[limit][noise_buffer];
};

// Calls each(row, j, m) for the stretches of rows that make up elements i .. i + n - 1; j counts from i.
template <typename Each>
static inline void for_each_row(int64_t inner, int64_t i, int64_t n, Each each) {
  int64_t row = i / inner;
  int64_t left = inner - i % inner;
  for (int64_t j = 0; j < n; ++row, left = inner) {
    const int64_t length = minimum(n - j, left);
    each(row, j, length);
    j += length;
  }
}

// y = sum_k c_k k_k over elements i .. i + n - 1, n <= tile_elements. `which` picks an operand's coefficient.
template <typename T>
static inline void linear_tile(const Operand* operands, int count, Coefficient Operand::* which, Dtype dtype,
                               int64_t elements, int64_t inner, int64_t i, int64_t n, T* y) {
  if (inner < segment_elements) {
    alignas(64) T buffer[noise_buffer], c[tile_elements];
    for (int k = 0; k < count; ++k) {
      const T* p = load_operand(operands[k], dtype, elements, i, n, buffer);
      expand(operands[k].*which, inner, i, n, c);
      if (k == 0)
        linear_element<false>(y, p, c, n);
      else
        linear_element<true>(y, p, c, n);
    }
    return;
  }
  Linear<T> linear;
  for (int first = 0; first < count; first += Linear<T>::limit) {
    linear.load(operands + first, count - first < Linear<T>::limit ? count - first : Linear<T>::limit, dtype, elements,
                i, n);
    for_each_row(inner, i, n, [&](int64_t row, int64_t j, int64_t m) {
      linear.select_row(which, row);
      if (first == 0)
        linear.template evaluate<false>(j, m, y + j);
      else
        linear.template evaluate<true>(j, m, y + j);
    });
  }
}

}  // namespace FM_ISA
}  // namespace fm
