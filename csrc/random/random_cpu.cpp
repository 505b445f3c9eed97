#include "../common/cpu_tile.h"
#include "../common/isa.h"
#include "random.h"

namespace fm {
namespace FM_ISA {
namespace {

// Calls write(word, index) for numbers first .. first + n - 1.
template <typename Write>
inline void for_each_word(uint64_t seed, uint64_t stream, int64_t first, int64_t n, Write write) {
  const int64_t lead = first % 4;
  WordLanes words;
  for (int64_t done = 0; done < lead + n; done += 4 * noise_lanes) {
    draw_words(seed, static_cast<uint64_t>((first + done) / 4), stream, words);
    for (int64_t j = 0; j < 4 * noise_lanes; ++j) {
      const int64_t index = done + j - lead;
      if (index >= 0 && index < n) write(words.w[j % 4][j / 4], index);
    }
  }
}

template <typename T>
void normal_tile(const RandomArguments& a, int64_t i, int64_t n) {
  alignas(64) T buffer[noise_buffer];
  Output(a.out, a.dtype, a.count)
      .write(i, n,
             draw_normals(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(a.stream), a.offset + i, n, buffer));
}

void uniform_tile(const RandomArguments& a, int64_t i, int64_t n) {
  const uint64_t seed = static_cast<uint64_t>(*a.seed), stream = static_cast<uint64_t>(a.stream);
  if (a.dtype == Dtype::f64) {
    double* out = static_cast<double*>(a.out) + i;
    for_each_word(seed, stream, a.offset + i, n,
                  [=](uint32_t word, int64_t j) { out[j] = half_open_uniform_double(word); });
    return;
  }
  const int bits = a.dtype == Dtype::f32 ? 24 : a.dtype == Dtype::f16 ? 11 : 8;
  alignas(64) float values[tile_elements];
  for_each_word(seed, stream, a.offset + i, n,
                [&](uint32_t word, int64_t j) { values[j] = half_open_uniform(word, bits); });
  Output(a.out, a.dtype, a.count).write(i, n, values);
}

}  // namespace

Status random(const RandomArguments& a) {
  const int64_t tiles = (a.count + tile_elements - 1) / tile_elements;
#pragma omp parallel for schedule(static) if (a.count > parallel_elements)
  for (int64_t t = 0; t < tiles; ++t) {
    const int64_t i = t * tile_elements, n = minimum(tile_elements, a.count - i);
    if (a.kind == RandomKind::words) {
      int64_t* out = static_cast<int64_t*>(a.out) + i;
      for_each_word(static_cast<uint64_t>(*a.seed), static_cast<uint64_t>(a.stream), a.offset + i, n,
                    [=](uint32_t word, int64_t j) { out[j] = word; });
    } else if (a.kind == RandomKind::uniform) {
      uniform_tile(a, i, n);
    } else if (a.dtype == Dtype::f64) {
      normal_tile<double>(a, i, n);
    } else {
      normal_tile<float>(a, i, n);
    }
  }
  return Status::ok;
}

}  // namespace FM_ISA
}  // namespace fm

FM_ENTRY_POINTS(random, fm::RandomArguments)
