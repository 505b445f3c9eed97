#include "device.h"

namespace fm_python {
namespace {

#if !defined(FM_EMULATED)
// Torch's functions that tell a device's current stream and the current device; null where none are to be asked.
struct Hooks {
  PyObject *stream = nullptr, *device = nullptr;

  Hooks() {
    const py::object hooks = py::module_::import("fmkernels._dispatch").attr("plain_device_hooks")();
    if (hooks.is_none()) return;
    stream = py::object(hooks[py::int_(0)]).release().ptr();
    device = py::object(hooks[py::int_(1)]).release().ptr();
  }
};

const Hooks& hooks() {
  static const Hooks* instance = new Hooks;
  return *instance;
}
#endif

}  // namespace

bool place_of(int device, Place& out) {
  out = {device, nullptr};
#if !defined(FM_EMULATED)
  if (device == host) return true;
  const Hooks& h = hooks();
  if (h.stream == nullptr) return false;
  const py::object current = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(h.device));
  if (!current) throw py::error_already_set();
  if (PyLong_AsLong(current.ptr()) != device) return false;
  const py::object index = py::int_(device);
  const py::object stream = py::reinterpret_steal<py::object>(PyObject_CallOneArg(h.stream, index.ptr()));
  if (!stream) throw py::error_already_set();
  out.stream = PyLong_AsVoidPtr(stream.ptr());
#endif
  return true;
}

Scratch::Scratch(PyObject* tensor, int device, int64_t doubles) {
  if (device == host || doubles == 0) return;
  static PyObject* const module = py::module_::import("fmkernels._native").release().ptr();
  tensor_ = py::handle(module).attr("scratch")(py::handle(tensor), doubles);
  data_ = new_address(tensor_.ptr());
  failed_ = data_ == nullptr;
}

}  // namespace fm_python
