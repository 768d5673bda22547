#include "device.h"

extern "C" {
#include "../core/status.h"
}

#include <cuda_runtime.h>

static const int oldest_major = 8; /* sm_80: mma with bfloat16 */

/* BOFT_OK, or the refusal that names the error, which is then forgotten so that the next launch does not report it. */
static boft_status checked(const char *what, cudaError_t error)
{
    if (error == cudaSuccess)
        return BOFT_OK;
    cudaGetLastError();
    return boft_refuse(BOFT_CUDA_FAILED, "%s: %s", what, cudaGetErrorString(error));
}

extern "C" int boft_cuda_serves(int device)
{
    int major = 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return checked("cudaDeviceGetAttribute", error) == BOFT_OK && major >= oldest_major;
}

extern "C" boft_status boft_cuda_capturing(void *stream, int *capturing)
{
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t error = cudaStreamIsCapturing((cudaStream_t)stream, &status);
    *capturing = status != cudaStreamCaptureStatusNone;
    return checked("cudaStreamIsCapturing", error);
}

extern "C" boft_status boft_cuda_make_counters(void *stream, unsigned **counters)
{
    const size_t bytes = BOFT_CUDA_COUNTERS * sizeof(unsigned);
    /* Another thread may be capturing, which forbids cudaMalloc to threads in the mode that they start in. */
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    boft_status status = checked("cudaThreadExchangeStreamCaptureMode", cudaThreadExchangeStreamCaptureMode(&mode));
    if (status != BOFT_OK)
        return status;
    *counters = NULL;
    const cudaError_t error = cudaMalloc((void **)counters, bytes);
    status = checked("cudaMalloc", error);
    if (error == cudaErrorMemoryAllocation)
        status = BOFT_OK;
    if (*counters)
        status = checked("cudaMemsetAsync", cudaMemsetAsync(*counters, 0, bytes, (cudaStream_t)stream));
    cudaThreadExchangeStreamCaptureMode(&mode);
    return status;
}
