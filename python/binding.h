// What the bindings share: addresses, sizes and codes in, an exception for any status but ok.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "common/operand.h"
#include "common/status.h"

namespace fm_python {

namespace py = pybind11;

using Address = uintptr_t;
using Lookup = std::tuple<Address, int64_t, int64_t, double>;  // data, rows_per_entry, stride, value

constexpr int cpu = 0;  // a device; anything else is CUDA

inline void* pointer(Address address) { return reinterpret_cast<void*>(address); }

inline fm::Coefficient coefficient_of(const Lookup& c) {
  return {pointer(std::get<0>(c)), std::get<1>(c), std::get<2>(c), std::get<3>(c)};
}

// Throws unless the status is ok. Needs Python's lock, as the exception becomes Python's.
void check(fm::Status status);

// operands[i] is a tensor's address where streams[i] < 0, else a seed's.
void fill_operands(fm::Operand* operands, int limit, const std::vector<Address>& data,
                   const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets);

// Runs a kernel without Python's lock; `run` must not touch a Python object.
template <typename Run>
void run_unlocked(Run run) {
  fm::Status status;
  {
    py::gil_scoped_release unlocked;
    status = run();
  }
  check(status);
}

class Binding {
 public:
  using Define = void (*)(py::module_&);
  explicit Binding(Define define);
};

// A file of bindings adds its functions to the module m: FM_BINDING(name) { m.def(...); }
#define FM_BINDING(name)                              \
  static void define_##name(py::module_& m);          \
  static const Binding binding_##name(define_##name); \
  static void define_##name(py::module_& m)

// Calls all of them.
void define_all(py::module_& m);

}  // namespace fm_python
