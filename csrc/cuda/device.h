/*
 * What a caller must know of a device or stream before it launches. Under the conventions of boft_cuda.h, except that
 * boft_cuda_make_counters allocates.
 */
#ifndef BOFT_CUDA_DEVICE_H
#define BOFT_CUDA_DEVICE_H

#include "boft_cuda.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 1 if the kernels are built for devices like `device`, 0 if not or if there is no such CUDA device. */
int boft_cuda_serves(int device);

/* *capturing: whether work queued on `stream` goes into a CUDA graph. */
boft_status boft_cuda_capturing(void *stream, int *capturing);

/*
 * *counters: BOFT_CUDA_COUNTERS zeros on the current device, for calls on `stream` as long as the process lives. NULL
 * if no memory is left. Not while `stream` is capturing.
 */
boft_status boft_cuda_make_counters(void *stream, unsigned **counters);

#ifdef __cplusplus
}
#endif

#endif
