#include <cstring>

#include "../combine/combine.h"
#include "../common/isa.h"
#include "step_control_body.h"

namespace fm {
namespace {

constexpr int64_t copy_bytes = int64_t{1} << 16;      // a thread's share of a row
constexpr int64_t parallel_bytes = int64_t{1} << 19;  // below this, waking the other threads costs more than they save

// Rows from `source` (where not null) to `target`, those with accept == wanted.
void copy_rows(const StepRowsArguments& a, bool wanted, const void* source, void* target) {
  const int32_t* accept = a.count + at_accept * a.rows;
  const int64_t row_bytes = a.inner * bytes_of(a.dtype);
  const int64_t parts = (row_bytes + copy_bytes - 1) / copy_bytes;
#pragma omp parallel for schedule(static) if (a.rows * row_bytes > parallel_bytes)
  for (int64_t i = 0; i < a.rows * parts; ++i) {
    const int64_t row = i / parts, begin = i % parts * copy_bytes;
    if ((accept[row] != 0) != wanted) continue;
    const int64_t n = row_bytes - begin < copy_bytes ? row_bytes - begin : copy_bytes;
    const int64_t at = row * row_bytes + begin;
    std::memcpy(static_cast<char*>(target) + at, static_cast<const char*>(source) + at, static_cast<size_t>(n));
  }
}

// The state of a row at time number j, as one linear combination.
Status output(const StepRowsArguments& a, int64_t row, int32_t j) {
  const double* clock = a.clock + row;
  const int64_t size = bytes_of(a.dtype), at = row * a.inner * size;
  const int64_t place = a.ids == nullptr ? row : a.ids[row];
  char* out = static_cast<char*>(a.out) + (j * a.out_stride + place * a.inner) * size;
  const double time = a.wanted.times[row * a.wanted.stride + j];
  if (time == clock[at_t * a.rows]) {
    std::memcpy(out, static_cast<const char*>(a.y1) + at, static_cast<size_t>(a.inner * size));
    return Status::ok;
  }
  const double h = clock[at_h_taken * a.rows], theta = (time - clock[at_t_from * a.rows]) / h;
  CombineArguments c{};
  c.dtype = a.dtype;
  c.out = out;
  c.rows = c.samples = 1;
  c.inner = a.inner;
  c.operands[0].data = static_cast<const char*>(a.y) + at;
  c.operands[0].coefficient = {nullptr, 1, 0, 1.0};
  c.count = 1;
  for (int i = 0; i < a.stages; ++i) {
    const double weight = dense_weight(a.polynomials[i], a.degree, theta, h);
    if (weight == 0) continue;
    c.operands[c.count].data = static_cast<const char*>(a.k[i]) + at;
    c.operands[c.count++].coefficient = {nullptr, 1, 0, weight};
  }
  return combine_cpu(c);
}

}  // namespace

Status step_control_cpu(const StepControlArguments& a) {
  if (a.stages > max_stages) return Status::bad_argument;
  for (int64_t r = 0; r < a.rows; ++r) control_thread(a, r);
  return Status::ok;
}

Status step_trial_cpu(const StepControlArguments& a) {
  for (int64_t r = 0; r < a.rows; ++r) trial_thread(a, r);
  return Status::ok;
}

Status step_rows_cpu(const StepRowsArguments& a) {
  if (a.stages > max_stages || a.degree > max_degree) return Status::bad_argument;
  const int32_t* count = a.count;
  if (a.wanted.times != nullptr) {
    for (int64_t r = 0; r < a.rows; ++r) {
      if (count[at_accept * a.rows + r] == 0) continue;
      for (int32_t j = count[at_first_output * a.rows + r]; j < count[at_next_output * a.rows + r]; ++j) {
        const Status status = output(a, r, j);
        if (status != Status::ok) return status;
      }
    }
  }
  if (!a.move) return Status::ok;
  copy_rows(a, true, a.y1, a.y);
  copy_rows(a, true, a.k_last, a.k0);
  if (a.k0_from != a.k0) copy_rows(a, false, a.k0_from, a.k0);
  return Status::ok;
}

}  // namespace fm

FM_NO_CUDA_ENTRY(step_control_cuda, fm::StepControlArguments)
FM_NO_CUDA_ENTRY(step_trial_cuda, fm::StepControlArguments)
FM_NO_CUDA_ENTRY(step_rows_cuda, fm::StepRowsArguments)
