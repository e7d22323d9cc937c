// The kernels for AVX2 and FMA; compiled with its flags, called only where the processor has it.
#define DP_ARCH avx2
#define DP_VECTOR_BYTES 32
#define DP_REGISTERS 16
#include "recurrence.h"

namespace deltaproduct {
const Kernels avx2_kernels = {
    "avx2", DP_VECTOR_BYTES, avx2::any_forward, avx2::any_backward, avx2::any_summary, avx2::any_compose};
}
