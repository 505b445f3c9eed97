#include "workspace.h"

#include "range.cuh"

namespace fm {

int64_t workspace_elements_cuda(int64_t elements, int64_t groups) {
  if (elements <= 0 || groups <= 0) return 0;
  const Partition partition = make_partition(elements, groups);
  return partition.parts == 1 ? 0 : partition.blocks;
}

}  // namespace fm
