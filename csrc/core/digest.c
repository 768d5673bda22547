/* The digest of bytes: checks, and the call of the current variant. */
#include "kernels.h"
#include "status.h"

boft_status boft_digest(const void *data, size_t bytes, uint64_t digest[BOFT_DIGEST_WORDS])
{
    boft_status status;
    if ((bytes > 0 && (status = boft_check_pointer("digest: data", data))) ||
        (status = boft_check_pointer("digest: digest", digest)))
        return status;
    boft_kernels_current()->digest(data, bytes, digest);
    return BOFT_OK;
}
