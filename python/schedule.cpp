#include "schedule/schedule.h"

#include "binding.h"
#include "device.h"
#include "plain.h"

namespace fm_python {
namespace {

// A new tensor of [4, *shape].
py::object table(PyObject* beside, PyObject* shape, fm::Dtype dtype) {
  const Py_ssize_t dim = PyTuple_GET_SIZE(shape);
  py::tuple sizes(dim + 1);
  sizes[0] = py::int_(4);
  for (Py_ssize_t i = 0; i < dim; ++i) sizes[i + 1] = py::handle(PyTuple_GET_ITEM(shape, i));
  const py::object made = empty_beside(beside, sizes.ptr(), dtype);
  if (!made) throw py::error_already_set();
  return made;
}

bool run(const fm::ScheduleArguments& a, const Place& place) {
  return a.t != nullptr && a.out != nullptr && place.run(a, fm::schedule_cpu, fm::schedule_cuda) == fm::Status::ok;
}

// The schedule at given times: a tensor of [4, *t.shape], or None.
py::object schedule_plain(py::handle t, int kind, double a, double b) {
  View times;
  Place place;
  if (!view(t.ptr(), false, times) || !place_of(times.device, place)) return py::none();
  const py::object out = table(t.ptr(), times.shape.ptr(), times.dtype);
  const fm::ScheduleArguments arguments{static_cast<fm::ScheduleKind>(kind),
                                        times.dtype,
                                        a,
                                        b,
                                        times.elements,
                                        times.data,
                                        nullptr,
                                        0,
                                        0,
                                        new_address(out.ptr())};
  return run(arguments, place) ? out : py::none();
}

// The same at times that are drawn, beside the seed: (t, the table), or None.
py::object drawn_schedule_plain(py::handle shape, py::handle seed, int64_t stream, int64_t offset, py::handle dtype,
                                int kind, double a, double b) {
  fm::ScheduleArguments arguments{
      static_cast<fm::ScheduleKind>(kind), fm::Dtype::f32, a, b, 0, nullptr, nullptr, stream, offset, nullptr};
  int device = host;
  Place place;
  arguments.seed = seed_of(seed.ptr(), device);
  arguments.count = count_elements(shape.ptr(), most_elements(device));
  if (arguments.seed == nullptr || arguments.count < 0 || !floating(dtype.ptr(), arguments.dtype) ||
      !place_of(device, place))
    return py::none();
  const py::object t = empty_beside(seed.ptr(), shape.ptr(), arguments.dtype);
  if (!t) throw py::error_already_set();
  const py::object out = table(seed.ptr(), shape.ptr(), arguments.dtype);
  arguments.t = new_address(t.ptr());
  arguments.out = new_address(out.ptr());
  return run(arguments, place) ? py::object(py::make_tuple(t, out)) : py::none();
}

FM_BINDING(schedule) {
  m.def("schedule_plain", &schedule_plain);
  m.def("drawn_schedule_plain", &drawn_schedule_plain);
}

}  // namespace
}  // namespace fm_python
