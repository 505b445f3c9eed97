// Memory for large CPU outputs, kept for the next call instead of being returned to the system.
//
// A fresh block costs a page fault for every page, more than the kernels' arithmetic on it; a training loop
// needs the same sizes again at every step. Blocks are on huge pages where the system has them. Freed blocks
// are kept up to a limit, the least recently freed go first.
#pragma once

#include <cstdint>

namespace fm {

struct PoolBlock {
  void* data;
  int64_t bytes;  // of the whole block, at least what was asked for
};

PoolBlock pool_allocate(int64_t bytes);
void pool_free(PoolBlock block);
int64_t pool_cached_bytes();
void pool_limit(int64_t bytes);  // frees what is above; 0 keeps nothing

}  // namespace fm
