#include "status.h"

#include <stdarg.h>
#include <stdio.h>

static _Thread_local char message[512];

const char *boft_last_error(void)
{
    return message;
}

boft_status boft_refuse(boft_status status, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(message, sizeof message, format, args);
    va_end(args);
    return status;
}

boft_status boft_check_range(const char *what, int64_t begin, int64_t end, int64_t count)
{
    if (begin < 0 || end < begin || end > count)
        return boft_refuse(BOFT_BAD_SHAPE, "%s: range [%lld, %lld) is not within 0 ... %lld", what, (long long)begin,
                           (long long)end, (long long)count);
    return BOFT_OK;
}

boft_status boft_check_real(const char *what, boft_dtype dtype)
{
    if (dtype != BOFT_F32 && dtype != BOFT_F64)
        return boft_refuse(BOFT_BAD_DTYPE, "%s: dtype %d is neither float32 nor float64", what, (int)dtype);
    return BOFT_OK;
}

boft_status boft_check_data(const char *what, boft_dtype dtype)
{
    if ((int)dtype < BOFT_F32 || (int)dtype > BOFT_F16)
        return boft_refuse(BOFT_BAD_DTYPE, "%s: dtype %d is not float32, float64, bfloat16 or float16", what,
                           (int)dtype);
    return BOFT_OK;
}

boft_status boft_check_pointer(const char *what, const void *pointer)
{
    if (!pointer)
        return boft_refuse(BOFT_BAD_ARGUMENT, "%s is NULL", what);
    return BOFT_OK;
}
