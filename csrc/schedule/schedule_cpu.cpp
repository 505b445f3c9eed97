#include "../common/isa.h"
#include "schedule_body.h"

namespace fm {
namespace FM_ISA {
namespace {

constexpr int64_t parallel_times = 4096;  // below this, waking the other threads costs more than they save

template <typename T>
void run(const ScheduleArguments& a) {
#pragma omp parallel for schedule(static) if (a.count > parallel_times)
  for (int64_t i = 0; i < a.count; ++i) schedule_thread<T>(a, i);
}

}  // namespace

Status schedule(const ScheduleArguments& a) {
  if (!valid(a)) return Status::bad_argument;
  a.dtype == Dtype::f64 ? run<double>(a) : run<float>(a);
  return Status::ok;
}

}  // namespace FM_ISA
}  // namespace fm

FM_ENTRY_POINTS(schedule, fm::ScheduleArguments)
