#include "step_control/step_control.h"

#include <pybind11/stl.h>

#include <algorithm>

#include "step_control.h"

namespace fm_python {

fm::StepRules rules_of(const std::vector<double>& numbers) {
  fm::StepRules rules;
  if (numbers.size() != sizeof(rules) / sizeof(double)) check(fm::Status::bad_argument);
  std::copy(numbers.begin(), numbers.end(), reinterpret_cast<double*>(&rules));
  return rules;
}

fm::WantedTimes wanted_of(const Wanted& wanted) {
  return {static_cast<const double*>(pointer(std::get<0>(wanted))), std::get<1>(wanted), std::get<2>(wanted)};
}

namespace {

void step_control(bool on_cpu, int64_t rows, Address clock, Address count, int dtype, Address error, Address step,
                  int time_dtype, Address times, const std::vector<double>& nodes, const std::vector<double>& rules,
                  const Wanted& wanted, bool start, Address stream) {
  if (nodes.size() > fm::max_stages) check(fm::Status::bad_argument);
  fm::StepControlArguments a{};
  a.rows = rows;
  a.clock = static_cast<double*>(pointer(clock));
  a.count = static_cast<int32_t*>(pointer(count));
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.error = pointer(error);
  a.step = pointer(step);
  a.time_dtype = static_cast<fm::Dtype>(time_dtype);
  a.times = pointer(times);
  a.stages = static_cast<int>(nodes.size());
  std::copy(nodes.begin(), nodes.end(), a.nodes);
  a.rules = rules_of(rules);
  a.wanted = wanted_of(wanted);
  a.phase = start ? fm::StepPhase::first : fm::StepPhase::taken;
  check(on_cpu ? fm::step_control_cpu(a) : fm::step_control_cuda(a, pointer(stream)));
}

FM_BINDING(step_control) { m.def("step_control", &step_control); }

}  // namespace
}  // namespace fm_python
