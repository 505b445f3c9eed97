// Which elements a block takes, which of them a thread, and how reductions over groups of elements are split.
#pragma once

#include <type_traits>

#include "linear.cuh"

namespace fm {

constexpr int block_threads = 256;

// Outputs at least this large are stored past the caches; smaller ones stay there for whoever reads them
// next.
constexpr int64_t streaming_bytes_cuda = int64_t{32} << 20;

// What one thread of a block does with elements begin .. end - 1: vectors where the call allows them, single
// elements at both ends or, where it does not, everywhere. A body has vectors(at, active) and scalar(i).
template <int V, int U, typename Body>
FM_HOST_DEVICE void for_range(int64_t begin, int64_t end, bool vectors, int thread, Body& body) {
  int64_t head = end, tail = end;  // vectors lie between the two
  if (vectors) {
    head = (begin + V - 1) / V * V;
    tail = end / V * V;
    if (head >= tail) head = tail = end;
  }
  constexpr int64_t step = static_cast<int64_t>(block_threads) * V;
  FM_ROLLED
  for (int64_t i = head + static_cast<int64_t>(thread) * V; i < tail; i += U * step) {
    const int left = tail - i < U * step ? static_cast<int>(tail - i) : static_cast<int>(U * step);
    int64_t at[U];
    bool active[U];
    FM_UNROLL
    for (int u = 0; u < U; ++u) {
      at[u] = i + u * step;
      active[u] = u == 0 || u * static_cast<int>(step) < left;
    }
    body.vectors(at, active);
  }
  FM_ROLLED
  for (int64_t i = begin + thread; i < end; i += block_threads) {
    if (i >= head && i < tail) {
      i += (tail - i + block_threads - 1) / block_threads * block_threads;
      if (i >= end) break;
    }
    body.scalar(i);
  }
}

// Elements of a reduction over equal groups. A block takes a part of one group, or several whole small
// groups. The split of a group depends on its size alone: neither other groups nor its place nor the machine change the
// order of its sum.
struct Partition {
  int64_t elements, groups, group_elements;
  int64_t part_elements;  // a multiple of every vector length
  int64_t parts;          // of a group
  int64_t block_groups;   // groups that a block takes; 0: parts of one
  int64_t blocks;
  Divider by_parts;

  // The first element of a block.
  FM_HOST_DEVICE int64_t begin(int64_t block) const {
    int64_t first, last;
    range(block, first, last);
    return first;
  }

  FM_HOST_DEVICE void range(int64_t block, int64_t& begin, int64_t& end) const {
    if (block_groups > 0) {
      begin = block * block_groups * group_elements;
      end = begin + block_groups * group_elements;
      if (end > elements) end = elements;
      return;
    }
    const int64_t group = by_parts.divide(block);
    const int64_t first = group * group_elements;
    begin = first + (block - group * parts) * part_elements;
    end = begin + part_elements;
    if (end > first + group_elements) end = first + group_elements;
  }
};

constexpr int64_t part_unit = 4096;
constexpr int64_t most_parts = 16384;  // of a group: what one block adds up in a few microseconds
constexpr int64_t small_group = 1024;  // elements up to which groups share a block

inline Partition make_partition(int64_t elements, int64_t groups) {
  Partition p{};
  p.elements = elements;
  p.groups = groups;
  p.group_elements = elements / groups;
  if (p.group_elements <= small_group) {
    p.part_elements = part_unit;
    p.parts = 1;
    p.block_groups = part_unit / p.group_elements;
    if (p.block_groups > groups) p.block_groups = groups;
    p.blocks = (groups + p.block_groups - 1) / p.block_groups;
  } else {
    const int64_t units = (p.group_elements + part_unit * most_parts - 1) / (part_unit * most_parts);
    p.part_elements = part_unit * units;
    p.parts = (p.group_elements + p.part_elements - 1) / p.part_elements;
    p.blocks = groups * p.parts;
  }
  p.by_parts = make_divider(p.parts);
  return p;
}

// What one thread of a block adds of it. Of a part the thread takes runs of V elements counted from the group's
// beginning, as vectors where these lie on vectors' boundaries: the order of a sum does not show which. A body as
// for_range's.
template <int V, int U, typename Body>
FM_HOST_DEVICE void for_partition(const Partition& p, int64_t block, bool vectors, int thread, Body& body) {
  int64_t begin, end;
  p.range(block, begin, end);
  if (p.block_groups > 0) {  // its values are added up from a table, in whatever order they came there
    for_range<V, U>(begin, end, vectors, thread, body);
    return;
  }
  constexpr int64_t step = static_cast<int64_t>(block_threads) * V;
  const bool wide = vectors && begin % V == 0;
  FM_ROLLED
  for (int64_t i = begin + static_cast<int64_t>(thread) * V; i < end; i += wide ? U * step : step) {
    int64_t at[U], rest = i;
    bool active[U];
    if (wide) {
      FM_UNROLL
      for (int u = 0; u < U; ++u) {
        at[u] = i + u * step;
        active[u] = at[u] + V <= end;
        if (active[u]) rest = at[u] + step;
      }
      if (active[0]) body.vectors(at, active);
      if (rest >= i + U * step) continue;
    }
    const int64_t stop = rest + V < end ? rest + V : end;  // a run that is no vector, the last one or any
    FM_ROLLED
    for (; rest < stop; ++rest) body.scalar(rest);
  }
}

// From a group's sum to its result: a loss (the sum times its scale) or a norm (root of the mean).
template <typename A>
struct Finish {
  A* out;
  bool root;
  int64_t group_elements, group_rows;
  Lookup<A> scale;

  FM_HOST_DEVICE void operator()(int64_t group, double sum) const {
    out[group] = static_cast<A>(root ? sqrt(sum / static_cast<double>(group_elements))
                                     : sum * static_cast<double>(scale.at(group * group_rows)));
  }
};

// How many threads add up one small group: a power of two.
inline int small_group_lanes(int64_t group_elements) {
  int lanes = 1;
  while (lanes < 32 && lanes * 8 <= group_elements) lanes *= 2;
  return lanes;
}

// One lane's share of a small group's values.
template <typename A>
FM_HOST_DEVICE A lane_sum(const A* values, int64_t group_elements, int lane, int lanes) {
  A sum = 0;
  FM_ROLLED
  for (int j = lane; j < static_cast<int>(group_elements); j += lanes) sum += values[j];
  return sum;
}

// What a body's threads add to: a sum in a register or, where a block has several groups, the block's table
// of values.
template <typename A>
struct Tally {
  A sum;
  A* values;
  int64_t begin;

  template <int V>
  FM_HOST_DEVICE void add(int64_t i, const A (&value)[V]) {
    if (values == nullptr) {
      FM_UNROLL
      for (int j = 0; j < V; ++j) sum += value[j];
    } else {
      FM_UNROLL
      for (int j = 0; j < V; ++j) values[i - begin + j] = value[j];
    }
  }
  FM_HOST_DEVICE void add(int64_t i, A value) {
    if (values != nullptr)
      values[i - begin] = value;
    else
      sum += value;
  }
};

}  // namespace fm
