// What both bindings of adaptive steps read.
#pragma once

#include "binding.h"
#include "step_control/step_control.h"

namespace fm_python {

using Wanted = std::tuple<Address, int64_t, int64_t>;  // times, count, stride

fm::StepRules rules_of(const std::vector<double>& numbers);  // Rules.numbers()
fm::WantedTimes wanted_of(const Wanted& wanted);

}  // namespace fm_python
