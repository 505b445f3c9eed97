#include "combine/combine.h"

#include <pybind11/stl.h>

#include <cstring>

#include "binding.h"
#include "device.h"
#include "plain.h"

namespace fm_python {
namespace {

void combine(int device, int dtype, Address out, int64_t rows, int64_t inner, const std::vector<Address>& data,
             const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets,
             const std::vector<Address>& stores, const std::vector<Lookup>& coefficients,
             const std::vector<Lookup>& errors, double atol, double rtol, Address norm, int64_t samples,
             Address workspace, Address stream) {
  fm::CombineArguments a{};
  fill_operands(a.operands, fm::max_operands, data, streams, offsets);
  if (stores.size() != data.size() || coefficients.size() != data.size() ||
      (!errors.empty() && errors.size() != data.size()))
    check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) {
    a.operands[i].store = pointer(stores[i]);
    a.operands[i].coefficient = coefficient_of(coefficients[i]);
    if (!errors.empty()) a.operands[i].error = coefficient_of(errors[i]);
  }
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.out = pointer(out);
  a.rows = rows;
  a.inner = inner;
  a.count = static_cast<int>(data.size());
  a.has_error = !errors.empty();
  a.atol = atol;
  a.rtol = rtol;
  a.norm = pointer(norm);
  a.samples = samples;
  a.workspace = pointer(workspace);
  run_unlocked([&] { return device == cpu ? fm::combine_cpu(a) : fm::combine_cuda(a, pointer(stream)); });
}

void set_data(fm::CombineArguments& a, const View& data, void* out) {
  a.dtype = data.dtype;
  a.out = out;
  a.rows = data.elements / a.inner;
  a.samples = 1;
}

// combine(operands, coefficients): [the new tensor, *noise drawn (if stored)], or None.
py::object combine_plain(py::handle operands, py::handle coefficients, py::handle store_noise) {
  bool stores = false;
  if (!flag(store_noise, stores) || !PyList_CheckExact(operands.ptr()) || PyList_GET_SIZE(operands.ptr()) == 0)
    return py::none();
  PyObject* first = PyList_GET_ITEM(operands.ptr(), 0);
  View data;
  Place place;
  fm::CombineArguments a{};
  if (!view(first, false, data) ||
      !fill(operands, coefficients, data, data, fm::max_operands - 1, a.operands, a.count, a.inner) ||
      !place_of(data.device, place))
    return py::none();
  py::list results;
  const auto make = [&]() -> void* {
    const py::object made = empty_like(first);
    if (!made) throw py::error_already_set();
    results.append(made);
    return new_address(made.ptr());
  };
  set_data(a, data, make());
  for (int i = 0; stores && i < a.count; ++i)
    if (a.operands[i].data == nullptr && (a.operands[i].store = make()) == nullptr) return py::none();
  if (a.out == nullptr || place.run(a, fm::combine_cpu, fm::combine_cuda) != fm::Status::ok) return py::none();
  return results;
}

// out = factor * x, for tensors of one kind that are the same or share no memory: whether it was done.
bool scale_plain(py::handle out, py::handle x, py::handle factor) {
  View target, data;
  Place place;
  fm::CombineArguments a{};
  if (!view(out.ptr(), false, target) || !view(x.ptr(), false, data) || target.dtype != data.dtype ||
      target.device != data.device || !same_shape(target, data) || !place_of(data.device, place))
    return false;
  a.count = 1;
  a.operands[0].data = data.data;
  a.inner = data.elements;
  if (!fill_beside(factor, data, a.operands, 0, a.operands[0].coefficient, a.inner)) return false;
  set_data(a, data, target.data);
  return place.run(a, fm::combine_cpu, fm::combine_cuda) == fm::Status::ok;
}

// combine into a contiguous CPU tensor with elements, by its address, dtype code and shape: whether it was done. An
// operand that is an int is the address of another such tensor; the others are checked. None may overlap the output.
// With `copy`, an address, the result is written there too.
bool combine_into_buffer(Address out, int dtype, py::tuple shape, py::handle operands, py::handle coefficients,
                         Address copy) {
  View data;
  fm::CombineArguments a{};
  data.dtype = static_cast<fm::Dtype>(dtype);
  data.device = host;
  data.elements = count_elements(shape.ptr(), INT64_MAX);
  data.shape = std::move(shape);
  if (data.elements < 0 ||
      !fill_trusted(operands, coefficients, data, fm::max_operands - 1, a.operands, a.count, a.inner))
    return false;
  set_data(a, data, pointer(out));
  if (fm::combine_cpu(a) != fm::Status::ok) return false;
  if (copy != 0) std::memcpy(pointer(copy), a.out, static_cast<size_t>(data.elements * fm::bytes_of(data.dtype)));
  return true;
}

FM_BINDING(combine) {
  m.def("combine", &combine);
  m.def("combine_plain", &combine_plain);
  m.def("scale_plain", &scale_plain);
  m.def("combine_into_buffer", &combine_into_buffer);
}

}  // namespace
}  // namespace fm_python
