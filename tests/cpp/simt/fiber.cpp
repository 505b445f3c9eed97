#include "fiber.h"

#include <cstdint>

#if !defined(__x86_64__)
#include <ucontext.h>

#endif

#if defined(__x86_64__)
// Saves the registers that a function must keep on the stack that it leaves, and takes those of the other from there.
extern "C" void simt_switch(void** save, void* load);
asm(R"(
.text
.globl simt_switch
.type simt_switch,@function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch,.-simt_switch
)");
#endif

namespace simt {

void switch_stacks(Stack& from, Stack& to, [[maybe_unused]] bool last) {
#if defined(SIMT_TSAN)
  __tsan_switch_to_fiber(to.thread_sanitizer, 1);  // 1: without an order between the two
#endif
#if defined(SIMT_ASAN)
  __sanitizer_start_switch_fiber(last ? nullptr : &from.fake_stack, to.memory, to.bytes);
#endif
#if defined(__x86_64__)
  simt_switch(&from.top, to.top);
#else
  if (from.top == nullptr) from.top = new ucontext_t;
  swapcontext(static_cast<ucontext_t*>(from.top), static_cast<ucontext_t*>(to.top));
#endif
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrive([[maybe_unused]] Stack& from) {
#if defined(SIMT_ASAN)
  __sanitizer_finish_switch_fiber(nullptr, &from.memory, &from.bytes);
#endif
}

void prepare(Stack& stack, char* memory, size_t bytes, void (*entry)()) {
  allow(memory, bytes);
  stack.memory = memory;
  stack.bytes = bytes;
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(memory + bytes);
  *--top = nullptr;  // alignment, and an address to return to that ends in a fault
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack.top = top;
#else
  if (stack.top == nullptr) stack.top = new ucontext_t;  // kept with the stack, for the life of the process
  ucontext_t* context = static_cast<ucontext_t*>(stack.top);
  getcontext(context);
  context->uc_stack.ss_sp = memory;
  context->uc_stack.ss_size = bytes;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
#endif
}

}  // namespace simt
