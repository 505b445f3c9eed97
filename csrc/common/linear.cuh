// Linear combinations of operands for device threads: a vector of elements, or a single one, at a time.
//
// Both add the tensors first, in their order, then the noise, with the same fused operations: which elements
// a thread happens to take as vectors is never seen in the result.
#pragma once

#include <type_traits>

#include "operand.h"
#include "philox.h"
#include "vector.cuh"

namespace fm {

template <typename A>
struct Lookup {
  const A* data;
  int64_t stride;
  Divider rows_per_entry;
  A value, slope;

  FM_HOST_DEVICE A at(int64_t row) const {
    return data == nullptr ? value : multiply_add(slope, data[rows_per_entry.divide(row) * stride], value);
  }
};

template <typename A>
Lookup<A> make_lookup(const Coefficient& c) {
  const bool constant = c.data == nullptr || c.stride == 0;
  return {static_cast<const A*>(c.data), c.stride, make_divider(constant ? 1 : c.rows_per_entry),
          static_cast<A>(c.value), static_cast<A>(c.slope)};
}

template <typename A>
struct LinearOperand {
  const void* data;
  void* store;
  const int64_t* seed;
  uint64_t stream;
  int64_t offset;
  Lookup<A> coefficient, error;
};

template <typename A>
LinearOperand<A> make_operand(const Operand& operand, bool with_error) {
  return {operand.data,
          operand.store,
          operand.seed,
          static_cast<uint64_t>(operand.stream),
          operand.offset,
          make_lookup<A>(operand.coefficient),
          with_error ? make_lookup<A>(operand.error) : Lookup<A>{}};
}

inline bool has_noise(const Operand* operands, int count) {
  for (int k = 0; k < count; ++k)
    if (operands[k].data == nullptr) return true;
  return false;
}

// Whether all noise begins with a block.
inline bool has_whole_blocks(const Operand* operands, int count) {
  for (int k = 0; k < count; ++k)
    if (operands[k].data == nullptr && operands[k].offset % 4 != 0) return false;
  return true;
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

inline bool are_aligned(const Operand* operands, int count) {
  for (int k = 0; k < count; ++k)
    if (!is_aligned(operands[k].data) || !is_aligned(operands[k].store)) return false;
  return true;
}

// Where a vector stands: the row of its first element, and how many of its elements are in that row. The
// others are in the next one: vectors are used only where rows are no shorter than they.
struct Position {
  int64_t row;
  int left;
};

struct Rows {
  int64_t inner;
  Divider divider;

  template <int V>
  FM_HOST_DEVICE Position at(int64_t i) const {
    const int64_t row = divider.divide(i);
    const int64_t left = inner - (i - row * inner);
    return {row, left < V ? static_cast<int>(left) : V};
  }
};

inline Rows make_rows(int64_t inner) { return {inner, make_divider(inner)}; }

// In place of Rows where all of a thread's vectors lie in one row, and noise begins with a block: every coefficient is
// then looked up once.
struct OneRow {
  int64_t row;

  template <int V>
  FM_HOST_DEVICE Position at(int64_t) const {
    return {row, V};
  }
};

// What a vector looks up: an entry for its elements before `left`, one for the others.
template <typename A>
struct Pair {
  A before, after;
  int left;

  FM_HOST_DEVICE A operator[](int j) const { return j < left ? before : after; }
};

template <int V, typename A>
FM_HOST_DEVICE Pair<A> look_up(const Lookup<A>& lookup, const Position& position) {
  const A before = lookup.at(position.row);
  return {before, position.left < V ? lookup.at(position.row + 1) : before, position.left};
}

// y += c x
template <int V, typename A>
FM_HOST_DEVICE void add_scaled(const Pair<A>& c, const A (&x)[V], A (&y)[V]) {
  if (c.left >= V) {  // nearly always: no selection for each element
    FM_UNROLL
    for (int j = 0; j < V; ++j) y[j] = multiply_add(c.before, x[j], y[j]);
  } else {
    FM_UNROLL
    for (int j = 0; j < V; ++j) y[j] = multiply_add(c[j], x[j], y[j]);
  }
}

// A stream's blocks of four numbers, as vectors at multiples of 4 elements need them: where the blocks begin within a
// vector is then the same for all threads.
struct Blocks {
  uint64_t seed, stream, first;  // first: block of element 0
  int lead;                      // elements of `first` that come before element 0

  FM_HOST_DEVICE Blocks(uint64_t seed, uint64_t stream, int64_t offset)
      : seed(seed), stream(stream), first(static_cast<uint64_t>(offset) >> 2), lead(static_cast<int>(offset & 3)) {}

  FM_HOST_DEVICE Words operator()(int64_t block) const {
    return philox4x32(seed, first + static_cast<uint64_t>(block), stream);
  }
};

// Numbers of the V elements from 4 block on, where these are whole blocks (lead is 0). `make` turns a block's words
// into four numbers.
template <int V, typename T, typename Make>
FM_HOST_DEVICE void draw_blocks(const Blocks& blocks, int64_t block, Make make, T* out) {
  FM_UNROLL
  for (int b = 0; b < V / 4; ++b) make(blocks(block + b), out + 4 * b);
}

// The same for any lead.
template <int V, typename T, typename Make>
FM_HOST_DEVICE void draw_vector(const Blocks& blocks, int64_t block, Make make, T (&out)[V]) {
  T z[V + 4];
  draw_blocks<V>(blocks, block, make, z);
  if (blocks.lead != 0) {
    make(blocks(block + V / 4), z + V);
    // Shifts by constants keep the array in registers.
    if ((blocks.lead & 1) != 0) {
      FM_UNROLL
      for (int j = 0; j < V + 3; ++j) z[j] = z[j + 1];
    }
    if ((blocks.lead & 2) != 0) {
      FM_UNROLL
      for (int j = 0; j < V + 2; ++j) z[j] = z[j + 2];
    }
  }
  FM_UNROLL
  for (int j = 0; j < V; ++j) out[j] = z[j];
}

struct MakeNormals {
  template <typename T>
  FM_HOST_DEVICE void operator()(const Words& w, T* out) const {
    box_muller(w.w0, w.w1, out[0], out[1]);
    box_muller(w.w2, w.w3, out[2], out[3]);
  }
};

FM_HOST_DEVICE uint32_t word_at(uint64_t seed, uint64_t stream, int64_t index) {
  const Words w = philox4x32(seed, static_cast<uint64_t>(index) >> 2, stream);
  const int lane = static_cast<int>(index & 3);
  return lane == 0 ? w.w0 : lane == 1 ? w.w1 : lane == 2 ? w.w2 : w.w3;
}

template <typename T>
FM_HOST_DEVICE T normal_at(uint64_t seed, uint64_t stream, int64_t index) {
  const Words w = philox4x32(seed, static_cast<uint64_t>(index) >> 2, stream);
  const bool second = (index & 2) != 0;
  T z0, z1;
  box_muller(second ? w.w2 : w.w0, second ? w.w3 : w.w1, z0, z1);
  return (index & 1) != 0 ? z1 : z0;
}

// Sums start from here and not from 0: -0 + x is x for every x, also for -0.
template <typename A>
FM_HOST_DEVICE constexpr A empty_sum() {
  return A(-0.0);
}

template <typename A, int V, int U, bool with_error>
struct LinearVectors {
  Position position[U];
  A y[U][V];
};
template <typename A, int V, int U>
struct LinearVectors<A, V, U, true> {
  Position position[U];
  A y[U][V], error[U][V], first[U][V];  // first: operand 0
};

// U vectors of V elements, from elements at[u] on where active[u]. All loads of `chunk` operands are in
// flight before the first is used.
template <Dtype dtype, int V, int U, int chunk, bool noise, bool with_error, typename Place, typename A>
FM_HOST_DEVICE void linear_vectors(const LinearOperand<A>* operands, int count, bool use_error, const Place& rows,
                                   const int64_t (&at)[U], const bool (&active)[U], bool streaming,
                                   LinearVectors<A, V, U, with_error>& sum) {
  constexpr int bytes = V * bytes_of(dtype);
  constexpr bool one_row = std::is_same_v<Place, OneRow>;
  // Of vector u; `once` is what one row has for all of them.
  const auto look = [&](const Lookup<A>& lookup, const Pair<A>& once, int u) {
    return one_row ? once : look_up<V>(lookup, sum.position[u]);
  };
  FM_UNROLL
  for (int u = 0; u < U; ++u) {
    sum.position[u] = rows.template at<V>(at[u]);
    FM_UNROLL
    for (int j = 0; j < V; ++j) {
      sum.y[u][j] = empty_sum<A>();
      if constexpr (with_error) sum.error[u][j] = empty_sum<A>();
    }
  }
  FM_ROLLED
  for (int start = 0; start < count; start += chunk) {
    Packed<bytes> packed[chunk][U];
    FM_UNROLL
    for (int k = 0; k < chunk; ++k) {
      FM_UNROLL
      for (int u = 0; u < U; ++u)
        if ((chunk == 1 || start + k < count) && (!noise || operands[start + k].data != nullptr) && active[u])
          packed[k][u] = load_packed<bytes>(operands[start + k].data, at[u] * bytes_of(dtype));
    }
    FM_UNROLL
    for (int k = 0; k < chunk; ++k) {
      if ((chunk > 1 && start + k >= count) || (noise && operands[start + k].data == nullptr)) continue;
      const LinearOperand<A>& operand = operands[start + k];
      Pair<A> once;
      if constexpr (one_row) once = look_up<V>(operand.coefficient, sum.position[0]);
      FM_UNROLL
      for (int u = 0; u < U; ++u) {
        if (!active[u]) continue;
        A x[V];
        unpack<dtype, V>(packed[k][u], x);
        add_scaled(look(operand.coefficient, once, u), x, sum.y[u]);
        if constexpr (with_error) {
          if (use_error) add_scaled(look_up<V>(operand.error, sum.position[u]), x, sum.error[u]);
          if (start + k == 0) {
            FM_UNROLL
            for (int j = 0; j < V; ++j) sum.first[u][j] = x[j];
          }
        }
      }
    }
  }
  if constexpr (noise) {
    FM_ROLLED
    for (int k = 0; k < count; ++k) {
      const LinearOperand<A>& operand = operands[k];
      if (operand.data != nullptr) continue;
      const Blocks blocks(static_cast<uint64_t>(*operand.seed), operand.stream, operand.offset);
      Pair<A> once;
      if constexpr (one_row) once = look_up<V>(operand.coefficient, sum.position[0]);
      FM_UNROLL
      for (int u = 0; u < U; ++u) {
        if (!active[u]) continue;
        A x[V];
        if constexpr (one_row)
          draw_blocks<V>(blocks, at[u] >> 2, MakeNormals{}, x);
        else
          draw_vector<V>(blocks, at[u] >> 2, MakeNormals{}, x);
        const Packed<bytes> rounded = pack<dtype, V>(x);
        if (operand.store != nullptr) store_packed<bytes>(operand.store, at[u] * bytes_of(dtype), rounded, streaming);
        unpack<dtype, V>(rounded, x);
        add_scaled(look(operand.coefficient, once, u), x, sum.y[u]);
        if constexpr (with_error) {
          if (use_error) add_scaled(look_up<V>(operand.error, sum.position[u]), x, sum.error[u]);
        }
      }
    }
  }
}

template <typename A>
struct LinearScalar {
  A y, error, first;
};

// The same for element i alone. Any dtype, any alignment; the loops stay loops, to keep the code small.
template <typename A>
FM_HOST_DEVICE LinearScalar<A> linear_scalar(const LinearOperand<A>* operands, int count, bool use_error, Dtype dtype,
                                             int64_t row, int64_t i) {
  LinearScalar<A> sum{empty_sum<A>(), empty_sum<A>(), A(0)};
  FM_ROLLED
  for (int n = 0; n < 2 * count; ++n) {
    const int k = n < count ? n : n - count;
    const LinearOperand<A>& operand = operands[k];
    const bool drawn = operand.data == nullptr;
    if (drawn != (n >= count)) continue;
    A x;
    if (drawn) {
      const uint64_t seed = static_cast<uint64_t>(*operand.seed);
      x = static_cast<A>(normal_at<float>(seed, operand.stream, operand.offset + i));
      if constexpr (sizeof(A) == sizeof(double)) {
        if (dtype == Dtype::f64) x = normal_at<double>(seed, operand.stream, operand.offset + i);
      }
      x = round_scalar(dtype, x);
      if (operand.store != nullptr) store_scalar(operand.store, dtype, i, x);
    } else {
      x = load_scalar<A>(operand.data, dtype, i);
    }
    if (k == 0) sum.first = x;
    sum.y = multiply_add(operand.coefficient.at(row), x, sum.y);
    if (use_error) sum.error = multiply_add(operand.error.at(row), x, sum.error);
  }
  return sum;
}

}  // namespace fm
