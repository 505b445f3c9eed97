// What one thread of random_cuda does; see random/random.h.
#pragma once

#include "../common/range.cuh"
#include "random.h"

namespace fm {

struct RandomParams {
  RandomKind kind;
  Dtype dtype;
  void* out;
  int64_t count;
  const int64_t* seed;
  uint64_t stream;
  int64_t offset;
  bool vectors;  // elements may be taken in vectors
  bool streaming;
};

inline RandomParams make_random_params(const RandomArguments& a) {
  const int bytes = a.kind == RandomKind::words ? 8 : bytes_of(a.dtype);
  return {a.kind,
          a.dtype,
          a.out,
          a.count,
          a.seed,
          static_cast<uint64_t>(a.stream),
          a.offset,
          is_aligned(a.out),
          a.count * bytes >= streaming_bytes_cuda};
}

// The dtype of words is a name only: 8 bytes an element, in vectors of four.
template <RandomKind kind_, Dtype dtype_>
struct RandomShape {
  static constexpr RandomKind kind = kind_;
  static constexpr Dtype dtype = dtype_;
  static constexpr int V = vector_length(dtype), U = dtype == Dtype::f64 ? 1 : 16 / V;
  static constexpr int64_t tile = static_cast<int64_t>(block_threads) * V * U;
  using T =
      std::conditional_t<kind == RandomKind::words, uint32_t, std::conditional_t<dtype == Dtype::f64, double, float>>;
};

template <typename Shape>
struct MakeNumbers {
  using T = typename Shape::T;

  FM_HOST_DEVICE static T from_word(uint32_t word) {
    if constexpr (Shape::kind == RandomKind::words)
      return word;
    else if constexpr (Shape::dtype == Dtype::f64)
      return half_open_uniform_double(word);
    else
      return half_open_uniform(word, Shape::dtype == Dtype::f32 ? 24 : Shape::dtype == Dtype::f16 ? 11 : 8);
  }

  FM_HOST_DEVICE void operator()(const Words& w, T* out) const {
    if constexpr (Shape::kind == RandomKind::normal) {
      MakeNormals{}(w, out);
    } else {
      out[0] = from_word(w.w0);
      out[1] = from_word(w.w1);
      out[2] = from_word(w.w2);
      out[3] = from_word(w.w3);
    }
  }
};

template <typename Shape>
struct RandomBody {
  using T = typename Shape::T;
  static constexpr int V = Shape::V, U = Shape::U;
  const RandomParams& p;
  const Blocks blocks;

  FM_HOST_DEVICE void vectors(const int64_t (&at)[1], const bool (&)[1]) {
    T numbers[V];
    draw_vector<V>(blocks, at[0] >> 2, MakeNumbers<Shape>{}, numbers);
    store(at[0], numbers);
  }

  // A tile that is whole and whose vectors are whole blocks.
  FM_HOST_DEVICE void whole(int64_t begin, int thread) {
    const int64_t at = begin + thread * V, block = at >> 2;
    FM_UNROLL
    for (int u = 0; u < U; ++u) {
      T numbers[V];
      draw_blocks<V>(blocks, block + u * (block_threads * V / 4), MakeNumbers<Shape>{}, numbers);
      store(at + u * (block_threads * V), numbers);
    }
  }

  FM_HOST_DEVICE void store(int64_t at, const T (&numbers)[V]) {
    if constexpr (Shape::kind == RandomKind::words) {
      Packed<V * 8> packed;
      FM_UNROLL
      for (int j = 0; j < V; ++j) {
        packed.words[2 * j] = numbers[j];
        packed.words[2 * j + 1] = 0;
      }
      store_packed<V * 8>(p.out, at * 8, packed, p.streaming);
    } else {
      store_packed<V * bytes_of(Shape::dtype)>(p.out, at * bytes_of(Shape::dtype), pack<Shape::dtype, V>(numbers),
                                               p.streaming);
    }
  }

  FM_HOST_DEVICE void scalar(int64_t i) {
    const uint64_t seed = blocks.seed;
    if constexpr (Shape::kind == RandomKind::normal)
      store_scalar(p.out, Shape::dtype, i, normal_at<T>(seed, p.stream, p.offset + i));
    else if constexpr (Shape::kind == RandomKind::uniform)
      store_scalar(p.out, Shape::dtype, i, MakeNumbers<Shape>::from_word(word_at(seed, p.stream, p.offset + i)));
    else
      static_cast<int64_t*>(p.out)[i] = word_at(seed, p.stream, p.offset + i);
  }
};

template <typename Shape>
FM_HOST_DEVICE void random_thread(const RandomParams& p, int64_t block, int thread) {
  const int64_t begin = block * Shape::tile;
  RandomBody<Shape> body{p, Blocks(static_cast<uint64_t>(*p.seed), p.stream, p.offset)};
  if (p.vectors && body.blocks.lead == 0 && p.count - begin >= Shape::tile) {
    body.whole(begin, thread);
    return;
  }
  const int64_t end = p.count - begin < Shape::tile ? p.count : begin + Shape::tile;
  for_range<Shape::V, 1>(begin, end, p.vectors, thread, body);
}

// Calls visit(Shape{}) with what suits a call; the same choice on the device and in its emulation.
template <RandomKind kind, typename Visit>
auto choose_random_shape(Dtype dtype, Visit visit) {
  if (dtype == Dtype::f32) return visit(RandomShape<kind, Dtype::f32>{});
  if (dtype == Dtype::bf16) return visit(RandomShape<kind, Dtype::bf16>{});
  if (dtype == Dtype::f16) return visit(RandomShape<kind, Dtype::f16>{});
  return visit(RandomShape<kind, Dtype::f64>{});
}

template <typename Visit>
auto choose_random_shape(const RandomArguments& a, Visit visit) {
  if (a.kind == RandomKind::words) return visit(RandomShape<RandomKind::words, Dtype::f32>{});
  if (a.kind == RandomKind::uniform) return choose_random_shape<RandomKind::uniform>(a.dtype, visit);
  return choose_random_shape<RandomKind::normal>(a.dtype, visit);
}

}  // namespace fm
