#include "binding.h"

#include <stdexcept>
#include <string>

#include "common/build_info.h"

namespace fm_python {
namespace {

std::vector<Binding::Define>& definitions() {
  static std::vector<Binding::Define> list;
  return list;
}

}  // namespace

Binding::Binding(Define define) { definitions().push_back(define); }

void define_all(py::module_& m) {
  for (const Binding::Define define : definitions()) define(m);
}

void check(fm::Status status) {
  const int code = static_cast<int>(status);
  if (status == fm::Status::ok) return;
  if (status == fm::Status::bad_argument)
    throw std::invalid_argument("fmkernels._C: a dtype, kind, size or address out of range");
  if (status == fm::Status::no_cuda) throw std::runtime_error("fmkernels._C: built without CUDA");
  throw std::runtime_error("fmkernels._C: " + fm::cuda_error_text(code - static_cast<int>(fm::Status::cuda_error)));
}

void fill_operands(fm::Operand* operands, int limit, const std::vector<Address>& data,
                   const std::vector<int64_t>& streams, const std::vector<int64_t>& offsets) {
  if (data.empty() || data.size() > static_cast<size_t>(limit) || streams.size() != data.size() ||
      offsets.size() != data.size())
    check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) {
    const bool noise = streams[i] >= 0;
    if (data[i] == 0) check(fm::Status::bad_argument);  // a tensor without memory
    operands[i].data = noise ? nullptr : pointer(data[i]);
    operands[i].seed = noise ? static_cast<const int64_t*>(pointer(data[i])) : nullptr;
    operands[i].stream = streams[i];
    operands[i].offset = offsets[i];
  }
}

}  // namespace fm_python
