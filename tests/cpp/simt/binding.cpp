// Of an emulated library: its launches, for tests that count them or time what stands around them.
#include "binding.h"

#include <pybind11/stl.h>

#include "report.h"

namespace fm_python {
FM_BINDING(simt) {
  m.def("emulated_launches", &simt::launches);
  m.def("run_emulated_bodies", &simt::run_bodies);
}
}  // namespace fm_python
