#include "regression_loss/regression_loss.h"

#include <pybind11/stl.h>

#include "binding.h"
#include "common/workspace.h"
#include "device.h"
#include "plain.h"

namespace fm_python {
namespace {

void regression_loss(int device, int pred_dtype, Address pred, Address grad, int64_t rows, int64_t inner, int dtype,
                     const std::vector<Address>& data, const std::vector<int64_t>& streams,
                     const std::vector<int64_t>& offsets, const std::vector<Lookup>& lookups, Address mask,
                     int64_t mask_elements, int kind, double delta, bool scale_grad, Address loss, int64_t groups,
                     Address workspace, Address stream) {
  fm::RegressionLossArguments a{};
  fill_operands(a.operands, fm::max_loss_operands, data, streams, offsets);
  if (lookups.size() != data.size() + 2) check(fm::Status::bad_argument);
  for (size_t i = 0; i < data.size(); ++i) a.operands[i].coefficient = coefficient_of(lookups[i]);
  a.pred_dtype = static_cast<fm::Dtype>(pred_dtype);
  a.pred = pointer(pred);
  a.grad = pointer(grad);
  a.dtype = static_cast<fm::Dtype>(dtype);
  a.rows = rows;
  a.inner = inner;
  a.count = static_cast<int>(data.size());
  a.weight = coefficient_of(lookups[data.size()]);
  a.scale = coefficient_of(lookups[data.size() + 1]);
  a.scale_grad = scale_grad;
  a.mask = static_cast<const bool*>(pointer(mask));
  a.mask_elements = mask_elements;
  a.kind = static_cast<fm::Penalty>(kind);
  a.delta = delta;
  a.loss = pointer(loss);
  a.groups = groups;
  a.workspace = pointer(workspace);
  run_unlocked(
      [&] { return device == cpu ? fm::regression_loss_cpu(a) : fm::regression_loss_cuda(a, pointer(stream)); });
}

// regression_loss of all samples together, without mask: (loss, gradient or None), or None. `weight` may be None.
py::object regression_loss_plain(py::handle pred, py::handle operands, py::handle coefficients, py::handle weight,
                                 int kind, double delta, bool mean, bool need_grad) {
  View data, target;
  Place place;
  fm::RegressionLossArguments a{};
  if (!PyList_CheckExact(operands.ptr()) || PyList_GET_SIZE(operands.ptr()) == 0) return py::none();
  if (!view(pred.ptr(), true, data) || !view(PyList_GET_ITEM(operands.ptr(), 0), false, target)) return py::none();
  // float16's gradient waits for its scale, which is Python's business.
  if (data.dtype == fm::Dtype::f16 || accumulation(data.dtype) != accumulation(target.dtype)) return py::none();
  if (!fill(operands, coefficients, data, target, fm::max_loss_operands, a.operands, a.count, a.inner))
    return py::none();
  a.weight = {nullptr, 1, 0, 1.0};
  if (!weight.is_none() && !fill_beside(weight, data, a.operands, a.count, a.weight, a.inner)) return py::none();
  if (!place_of(data.device, place)) return py::none();
  const py::object grad = need_grad ? empty_like(pred.ptr()) : py::none();
  const py::object loss = empty_beside(pred.ptr(), py::tuple().ptr(), accumulation(data.dtype));
  if (!grad || !loss) throw py::error_already_set();
  const Scratch scratch(pred.ptr(), data.device, fm::workspace_elements_cuda(data.elements, 1));
  a.pred_dtype = data.dtype;
  a.pred = data.data;
  a.grad = need_grad ? new_address(grad.ptr()) : nullptr;
  a.dtype = target.dtype;
  a.rows = data.elements / a.inner;
  a.scale = {nullptr, 1, 0, mean ? 1.0 / static_cast<double>(data.elements) : 1.0};
  a.scale_grad = true;
  a.kind = static_cast<fm::Penalty>(kind);
  a.delta = delta;
  a.loss = new_address(loss.ptr());
  a.groups = 1;
  a.workspace = scratch.data();
  if (a.loss == nullptr || (need_grad && a.grad == nullptr) || scratch.failed() ||
      place.run(a, fm::regression_loss_cpu, fm::regression_loss_cuda) != fm::Status::ok)
    return py::none();
  return py::make_tuple(loss, grad);
}

FM_BINDING(regression_loss) {
  m.def("regression_loss", &regression_loss);
  m.def("regression_loss_plain", &regression_loss_plain);
}

}  // namespace
}  // namespace fm_python
