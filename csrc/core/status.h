/* Refusals: a status code and a message in the calling thread. */
#ifndef BOFT_STATUS_H
#define BOFT_STATUS_H

#include "boft.h"

/* Stores a printf-formatted message for boft_last_error() and returns `status`, for `return boft_refuse(...)`. */
boft_status boft_refuse(boft_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* BOFT_OK if [begin, end) lies in [0, count]; otherwise a refusal that names `what` and the numbers. */
boft_status boft_check_range(const char *what, int64_t begin, int64_t end, int64_t count);

/* BOFT_OK if `dtype` is BOFT_F32 or BOFT_F64, the types of blocks. */
boft_status boft_check_real(const char *what, boft_dtype dtype);

/* BOFT_OK if `dtype` is one of the four types of data. */
boft_status boft_check_data(const char *what, boft_dtype dtype);

/* BOFT_OK unless `pointer` is NULL although there is work to do. */
boft_status boft_check_pointer(const char *what, const void *pointer);

#endif
