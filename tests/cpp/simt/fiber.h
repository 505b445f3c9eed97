// Switching between the stacks of fibers, and what the sanitizers must be told of it.
#pragma once

#include <cstddef>

#if defined(SIMT_TSAN)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif
#if defined(SIMT_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

// What happened before a release is seen after an acquire of the same token.
inline void acquire([[maybe_unused]] void* token) {
#if defined(SIMT_TSAN)
  __tsan_acquire(token);
#endif
}
inline void release([[maybe_unused]] void* token) {
#if defined(SIMT_TSAN)
  __tsan_release(token);
#endif
}

inline void forbid([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_poison_memory_region(memory, bytes);
#endif
}
inline void allow([[maybe_unused]] const void* memory, [[maybe_unused]] size_t bytes) {
#if defined(SIMT_ASAN)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

// A place of execution with a stack: the caller of a launch, or a thread of a block.
struct Stack {
  void* top = nullptr;  // where it was left
  const void* memory = nullptr;
  size_t bytes = 0;
  void* thread_sanitizer = nullptr;
  void* fake_stack = nullptr;
};

// Leaves one stack, to be gone on with after a switch back, and goes on with the other. `last`: never back.
void switch_stacks(Stack& from, Stack& to, bool last);

// The first thing on a new stack: what switch_stacks does after its return.
void arrive(Stack& from);

// Makes a stack that begins with entry().
void prepare(Stack& stack, char* memory, size_t bytes, void (*entry)());

}  // namespace simt
