// The kernels for AVX2 and FMA; compiled with their flags, called only where the processor has them.
#define DP_ARCH avx2
#define DP_VECTOR_BYTES 32
#define DP_REGISTERS 16
#include "kernels.h"

const deltaproduct::Kernels deltaproduct::avx2_kernels = deltaproduct::avx2::table;
