#include "random/random.h"

#include "binding.h"

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

FM_BINDING(random) { m.def("random", &random); }

}  // namespace
}  // namespace fm_python
