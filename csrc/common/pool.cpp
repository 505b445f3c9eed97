#include "pool.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fm {
namespace {

constexpr int64_t huge_page = int64_t{2} << 20;

struct Pool {
  std::mutex mutex;
  std::vector<PoolBlock> free_blocks;  // oldest first
  int64_t cached = 0;
  int64_t limit = int64_t{1} << 30;

  // The caller holds the mutex. Blocks to give back are appended to `released`.
  void trim(std::vector<PoolBlock>& released) {
    size_t drop = 0;
    while (drop < free_blocks.size() && cached > limit) cached -= free_blocks[drop++].bytes;
    released.assign(free_blocks.begin(), free_blocks.begin() + static_cast<std::ptrdiff_t>(drop));
    free_blocks.erase(free_blocks.begin(), free_blocks.begin() + static_cast<std::ptrdiff_t>(drop));
  }
};

Pool& pool() {
  static Pool* instance = new Pool;  // never destroyed: tensors may outlive static destructors
  return *instance;
}

void release(const std::vector<PoolBlock>& blocks) {
  for (const PoolBlock& block : blocks) std::free(block.data);
}

}  // namespace

PoolBlock pool_allocate(int64_t bytes) {
  const int64_t rounded = (bytes + huge_page - 1) / huge_page * huge_page;
  Pool& p = pool();
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    // Newest first: its pages are likeliest to be near. Up to an eighth may be wasted.
    for (size_t i = p.free_blocks.size(); i-- > 0;) {
      const PoolBlock block = p.free_blocks[i];
      if (block.bytes >= rounded && block.bytes - rounded <= rounded / 8) {
        p.free_blocks.erase(p.free_blocks.begin() + static_cast<std::ptrdiff_t>(i));
        p.cached -= block.bytes;
        return block;
      }
    }
  }
  void* data = std::aligned_alloc(static_cast<size_t>(huge_page), static_cast<size_t>(rounded));
  if (data == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  madvise(data, static_cast<size_t>(rounded), MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
  return {data, rounded};
}

void pool_free(PoolBlock block) {
  Pool& p = pool();
  std::vector<PoolBlock> released;
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.free_blocks.push_back(block);
    p.cached += block.bytes;
    p.trim(released);
  }
  release(released);
}

int64_t pool_cached_bytes() {
  std::lock_guard<std::mutex> lock(pool().mutex);
  return pool().cached;
}

void pool_limit(int64_t bytes) {
  Pool& p = pool();
  std::vector<PoolBlock> released;
  {
    std::lock_guard<std::mutex> lock(p.mutex);
    p.limit = bytes;
    p.trim(released);
  }
  release(released);
}

}  // namespace fm
