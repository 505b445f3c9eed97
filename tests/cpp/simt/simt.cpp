// The grid: blocks one after another, the threads of a block in turns. Compiled without sanitizers of its own, which
// hear of it by fiber.h.
#include "simt.h"

#include <sys/mman.h>

#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"
#include "report.h"

namespace simt {

Index thread_index, block_index;
dim3 block_size, grid_size;
cudaError_t last_error = cudaSuccess;

namespace {

constexpr int warp_lanes = 32;
constexpr size_t stack_bytes = 64 << 10;
constexpr size_t most_shared_bytes = 48 << 10;
constexpr size_t gap = 64;  // between shared variables, forbidden to all
constexpr cudaError_t invalid_configuration = 9;

enum class State { ready, at_barrier, at_shuffle, finished };

struct Fiber {
  Stack stack;
  char* memory = nullptr;
  State state = State::ready;
  Place place{};
  int shuffles = 0;
  unsigned mask = 0;
};

// Two rounds of shuffles, as one lane may be at the next while another still takes from the last.
struct Warp {
  uint64_t values[2][warp_lanes];
  unsigned arrived[2];
  Place places[2];
};

// What outlives a launch: the stacks.
std::vector<Fiber> fibers;
std::mutex one_launch;
std::mt19937 generator;
char start_token, end_token, barrier_tokens[2];

// A declaration of shared memory, and where it is.
struct Variable {
  const void* declaration;
  char* place;
};

// Of the launch that runs.
struct Launch {
  const char* kernel;
  const std::function<void()>& body;
  size_t dynamic_bytes;
  int threads;
  Stack caller{};
  int current = 0;
  int rotation = 0;  // thread t of a block is on stack (t + rotation) % threads
  unsigned barriers = 0;
  std::vector<Warp> warps{};
  std::array<Variable, 16> variables{};  // an array, as a thread's allocations are its own
  size_t variable_count = 0;
  std::vector<std::unique_ptr<char[]>> memories{};  // shared ones of the blocks so far
  size_t used = 0;
  long complaints = 0;
  std::string first_complaint{};

  Fiber& fiber(int thread) { return fibers[static_cast<size_t>((thread + rotation) % threads)]; }
  int lanes(int thread) const { return std::min(warp_lanes, threads - thread / warp_lanes * warp_lanes); }
};
Launch* launch = nullptr;

std::string order() {
  const char* name = std::getenv("SIMT_ORDER");
  return name == nullptr ? "forward" : name;
}

std::vector<uint64_t> in_order(uint64_t count, const std::string& name) {
  std::vector<uint64_t> list(count);
  for (uint64_t i = 0; i < count; ++i) list[i] = name == "reverse" ? count - 1 - i : i;
  if (name == "random") std::shuffle(list.begin(), list.end(), generator);
  return list;
}

struct Report {
  std::map<std::string, long> launches;
  ~Report() {
    const char* name = std::getenv("SIMT_REPORT");
    std::FILE* file = name == nullptr ? nullptr : std::fopen(name, "a");
    if (file == nullptr) return;
    for (const auto& [kernel, count] : launches) std::fprintf(file, "%ld %s\n", count, kernel.c_str());
    std::fclose(file);
  }
} report;
bool bodies_run = true;

void to_caller(bool last) { switch_stacks(launch->fiber(launch->current).stack, launch->caller, last); }

void thread_entry() {
  arrive(launch->caller);
  acquire(&start_token);
  acquire(&launch->fiber(launch->current));  // who used this stack before
  launch->body();
  release(&launch->fiber(launch->current));
  release(&end_token);
  launch->fiber(launch->current).state = State::finished;
  to_caller(true);
  std::abort();
}

void resume(int thread) {
  launch->current = thread;
  const unsigned t = static_cast<unsigned>(thread);
  thread_index = {t % block_size.x, t / block_size.x % block_size.y, t / block_size.x / block_size.y};
  switch_stacks(launch->caller, launch->fiber(thread).stack, false);
}

void begin(Fiber& fiber) {
  if (fiber.memory == nullptr) {
    fiber.memory =
        static_cast<char*>(mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (fiber.memory == MAP_FAILED) throw std::runtime_error("simt: no memory for stacks");
  }
  prepare(fiber.stack, fiber.memory, stack_bytes, thread_entry);
#if defined(SIMT_TSAN)
  fiber.stack.thread_sanitizer = __tsan_create_fiber(0);
#endif
  fiber.state = State::ready;
  fiber.shuffles = 0;
}

// Whether all lanes have put down what they give in a lane's shuffle.
bool is_complete(int thread) {
  const Fiber& fiber = launch->fiber(thread);
  const int first = thread / warp_lanes * warp_lanes;
  for (int lane = 0; lane < launch->lanes(thread); ++lane)
    if ((fiber.mask >> lane & 1u) != 0 && launch->fiber(first + lane).shuffles < fiber.shuffles) return false;
  return true;
}

void open_barrier() {
  const Place* place = nullptr;
  for (int t = 0; t < launch->threads; ++t) {
    Fiber& fiber = launch->fiber(t);
    if (fiber.state != State::at_barrier) continue;
    if (place != nullptr && (place->line != fiber.place.line || std::strcmp(place->file, fiber.place.file) != 0))
      complain("threads wait at the barriers of lines %d and %d", place->line, fiber.place.line);
    place = &fiber.place;
    fiber.state = State::ready;
  }
  ++launch->barriers;
}

// Lets the threads run until all have finished or none can.
void run_threads(const std::string& in) {
  for (;;) {
    bool progress = false;
    for (const uint64_t t : in_order(static_cast<uint64_t>(launch->threads), in)) {
      const int thread = static_cast<int>(t);
      Fiber& fiber = launch->fiber(thread);
      if (fiber.state == State::at_shuffle && is_complete(thread)) fiber.state = State::ready;
      if (fiber.state != State::ready) continue;
      resume(thread);
      progress = true;
    }
    int waiting = 0, finished = 0;
    for (int t = 0; t < launch->threads; ++t) {
      waiting += launch->fiber(t).state == State::at_barrier;
      finished += launch->fiber(t).state == State::finished;
    }
    if (finished == launch->threads) return;
    if (waiting + finished == launch->threads) {
      open_barrier();  // threads that have left count as having come, as on the hardware
    } else if (!progress) {
      complain("deadlock: %d threads wait at a barrier, %d at a shuffle, %d have left", waiting,
               launch->threads - waiting - finished, finished);
      return;
    }
  }
}

void run_block(const std::string& in) {
  constexpr size_t bytes = most_shared_bytes + 64 * gap;
  launch->variable_count = 0;
  launch->memories.emplace_back(new char[bytes]);  // kept to the launch's end, that no block gets another's
  char* memory = launch->memories.back().get();
  std::memset(memory, 0xFF, bytes);
  forbid(memory, bytes);
  allow(memory, launch->dynamic_bytes);
  launch->used = launch->dynamic_bytes;
  launch->warps.assign(static_cast<size_t>((launch->threads + warp_lanes - 1) / warp_lanes), Warp{});
  launch->rotation = (launch->rotation + 37) % launch->threads;
  for (int t = 0; t < launch->threads; ++t) begin(launch->fiber(t));
  run_threads(in);
#if defined(SIMT_TSAN)
  for (int t = 0; t < launch->threads; ++t) __tsan_destroy_fiber(launch->fiber(t).stack.thread_sanitizer);
#endif
  allow(memory, bytes);
  if (launch->memories.size() >= 64) {
    acquire(&end_token);
    launch->memories.clear();
  }
}

bool is_possible(dim3 grid, uint64_t threads, size_t shared_bytes) {
  return threads >= 1 && threads <= 1024 && grid.x >= 1 && grid.x <= 2147483647u && grid.y >= 1 && grid.y <= 65535 &&
         grid.z == 1 && shared_bytes <= most_shared_bytes;
}

}  // namespace

std::map<std::string, long> launches() {
  const std::lock_guard<std::mutex> lock(one_launch);
  return report.launches;
}

void run_bodies(bool run) { bodies_run = run; }

void complain(const char* format, ...) {
  char text[512];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof text, format, list);
  va_end(list);
  if (launch->complaints++ == 0)
    launch->first_complaint = std::string(launch->kernel) + ", block " + std::to_string(block_index.x) + ", thread " +
                              std::to_string(thread_index.x) + ": " + text;
}

int lane() { return static_cast<int>(launch->current % warp_lanes); }

void* dynamic_shared() { return launch->dynamic_bytes == 0 ? nullptr : launch->memories.back().get(); }

void* shared(const void* declaration, size_t bytes) {
  for (size_t i = 0; i < launch->variable_count; ++i)
    if (launch->variables[i].declaration == declaration) return launch->variables[i].place;
  launch->used = (launch->used + gap + 15) / 16 * 16;
  char* place = launch->memories.back().get() + launch->used;
  launch->used += bytes;
  launch->variables.at(launch->variable_count++) = {declaration, place};
  if (launch->used > most_shared_bytes + 2 * gap * launch->variable_count) {
    std::fprintf(stderr, "simt: %s: more than 48 KiB of shared memory\n", launch->kernel);
    std::abort();
  }
  allow(place, bytes);
  return place;
}

void barrier(Place place) {
  Fiber& fiber = launch->fiber(launch->current);
  fiber.state = State::at_barrier;
  fiber.place = place;
  char* token = &barrier_tokens[launch->barriers & 1u];
  release(token);
  to_caller(false);
  acquire(token);
}

uint64_t exchange(uint64_t value, unsigned mask, int source, Place place) {
  const int me = lane(), thread = launch->current, lanes = launch->lanes(thread);
  Fiber& fiber = launch->fiber(thread);
  Warp& warp = launch->warps[static_cast<size_t>(thread / warp_lanes)];
  const int round = fiber.shuffles++ & 1;
  if ((mask >> me & 1u) == 0) complain("lane %d is not in its own shuffle mask %08x", me, mask);
  if (lanes < warp_lanes && mask >> lanes != 0) complain("shuffle mask %08x in a warp of %d threads", mask, lanes);
  if (source != me && (mask >> source & 1u) == 0)
    complain("lane %d takes from lane %d, which is not in the mask", me, source);
  if (warp.arrived[round] == 0)
    warp.places[round] = place;
  else if (warp.places[round].line != place.line || std::strcmp(warp.places[round].file, place.file) != 0)
    complain("lanes shuffle at lines %d and %d together", warp.places[round].line, place.line);
  warp.values[round][me] = value;
  warp.arrived[round] |= 1u << me;
  warp.arrived[1 - round] &= ~(1u << me);
  fiber.mask = mask;
  fiber.state = State::at_shuffle;
  fiber.place = place;
  to_caller(false);
  return warp.values[round][source];
}

void run(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
  const std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (!is_possible(grid, threads, shared_bytes)) {
    last_error = invalid_configuration;
    return;
  }
  if (!bodies_run) {
    ++report.launches[kernel];
    return;
  }
  Launch now{kernel, thread, shared_bytes, static_cast<int>(threads)};
  launch = &now;
  if (fibers.size() < threads) fibers.resize(threads);
#if defined(SIMT_TSAN)
  now.caller.thread_sanitizer = __tsan_get_current_fiber();
#endif
  block_size = block;
  grid_size = grid;
  release(&start_token);
  const std::string in = order();
  for (const uint64_t b : in_order(uint64_t{grid.x} * grid.y, in)) {
    block_index = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x), 0};
    run_block(in);
    if (now.complaints > 0) break;
  }
  acquire(&end_token);
  now.memories.clear();
  launch = nullptr;
  ++report.launches[kernel];
  if (now.complaints > 0)
    throw std::runtime_error("simt: " + now.first_complaint + (now.complaints > 1 ? ", and more of the kind" : ""));
}

}  // namespace simt
