// Scratch memory that reductions on a GPU need; the CPU kernels need none.
#pragma once

#include <cstdint>

namespace fm {

// How many doubles for a reduction over `elements` elements in `groups` equal groups.
int64_t workspace_elements_cuda(int64_t elements, int64_t groups);

}  // namespace fm
