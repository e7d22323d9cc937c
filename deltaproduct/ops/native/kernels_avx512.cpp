// The kernels for AVX-512; compiled with its flags, called only where the processor has it.
#define DP_ARCH avx512
#define DP_VECTOR_BYTES 64
#define DP_REGISTERS 32
#include "kernels.h"

const deltaproduct::Kernels deltaproduct::avx512_kernels = deltaproduct::avx512::table;
