#include "random/random.h"

#include "binding.h"
#include "device.h"
#include "plain.h"

namespace fm_python {
namespace {

void random(int device, int dtype, int kind, Address out, int64_t count, Address seed, int64_t stream_number,
            int64_t offset, Address stream) {
  const fm::RandomArguments a{static_cast<fm::RandomKind>(kind),
                              static_cast<fm::Dtype>(dtype),
                              pointer(out),
                              count,
                              static_cast<const int64_t*>(pointer(seed)),
                              stream_number,
                              offset};
  run_unlocked([&] { return device == cpu ? fm::random_cpu(a) : fm::random_cuda(a, pointer(stream)); });
}

// Uniforms or normals of a shape, a tuple, beside the seed: the new tensor, or None.
py::object random_plain(py::handle shape, py::handle seed, int kind, int64_t stream, int64_t offset, py::handle dtype) {
  fm::RandomArguments a{static_cast<fm::RandomKind>(kind), fm::Dtype::f32, nullptr, 0, nullptr, stream, offset};
  int device = host;
  Place place;
  a.seed = seed_of(seed.ptr(), device);
  a.count = count_elements(shape.ptr(), most_elements(device));
  if (a.seed == nullptr || a.count < 0 || !floating(dtype.ptr(), a.dtype) || !place_of(device, place))
    return py::none();
  const py::object out = empty_beside(seed.ptr(), shape.ptr(), a.dtype);
  if (!out) throw py::error_already_set();
  a.out = new_address(out.ptr());
  return a.out != nullptr && place.run(a, fm::random_cpu, fm::random_cuda) == fm::Status::ok ? out : py::none();
}

FM_BINDING(random) {
  m.def("random", &random);
  m.def("random_plain", &random_plain);
}

}  // namespace
}  // namespace fm_python
