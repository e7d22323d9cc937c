// The kernels for AVX-512; compiled with its flags, called only where the processor has it.
#define DP_ARCH avx512
#define DP_VECTOR_BYTES 64
#define DP_REGISTERS 32
#include "recurrence.h"

namespace deltaproduct {
const Kernels avx512_kernels = {
    "avx512", DP_VECTOR_BYTES, avx512::any_forward, avx512::any_backward, avx512::any_summary, avx512::any_compose};
}
