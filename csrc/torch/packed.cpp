// boft::pack, and the packed copy of an input that several layers share.
#include "packed.h"

#include "common.h"
#include "ops.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/util/intrusive_ptr.h>

#include <optional>

namespace boft {
namespace {

using at::Tensor;
using c10::TensorImpl;
using c10::weak_intrusive_ptr;

Tensor pack_cpu(const Tensor& x, int64_t bits) {
  TORCH_CHECK_VALUE(bits == 4 || bits == 8, "pack: 4 or 8 bits, not ", bits);
  TORCH_CHECK_VALUE(x.dim() >= 1, "pack: x needs at least one axis");
  const boft_dtype dtype = data_dtype(x, "x");
  const Rows in(x);
  const int width = static_cast<int>(bits);
  Tensor packed = at::empty({in.rows, static_cast<int64_t>(boft_pack_bytes(in.columns, width))},
                            x.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous));
  parallel(in.rows, in.rows * in.columns * 8, 0, [&](int64_t begin, int64_t end, void*) {
    return boft_pack(dtype, width, in.rows, in.columns, in.data(), in.stride, packed.mutable_data_ptr(), begin, end);
  });
  return packed;
}

// The version changes when x is written to; its memory can be exchanged without that.
struct LastPacked {
  weak_intrusive_ptr<TensorImpl> x, packed;
  uint32_t version;
  const void* data;
};

thread_local std::optional<LastPacked> last;

}  // namespace

bool packs(bool compact, const Tensor& data, const Tensor& parameter) {
  return compact && at::GradMode::is_enabled() && parameter.requires_grad() && data.device().is_cpu() &&
         cpu_kernels_in_use();
}

Tensor pack(const Tensor& data, int64_t bits) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("boft::pack", "").typed<Tensor(const Tensor&, int64_t)>();
  return op.call(data, bits);
}

Tensor pack_shared(const Tensor& x) {
  if (!is_plain(x) || x.is_inference()) return pack(x, kBitsOfX);
  const uint32_t version = x._version();
  const void* data = x.const_data_ptr();
  if (last && last->version == version && last->data == data) {
    const auto owner = last->x.lock();
    auto packed = last->packed.lock();
    if (owner.get() == x.unsafeGetTensorImpl() && packed) return Tensor(std::move(packed));
  }
  Tensor packed = pack(x, kBitsOfX);
  last = LastPacked{weak_intrusive_ptr<TensorImpl>(x.getIntrusivePtr()),
                    weak_intrusive_ptr<TensorImpl>(packed.getIntrusivePtr()), version, data};
  return packed;
}

Tensor unpack(const Tensor& packed, at::ScalarType dtype, int64_t n, int bits) {
  check_packed(packed, packed.size(0), n, bits);
  const int64_t rows = packed.size(0);
  Tensor x = at::empty({rows, n}, packed.options().dtype(dtype));
  const boft_dtype to = data_dtype(x, "x");
  parallel(rows, rows * n * 8, 0, [&](int64_t begin, int64_t end, void*) {
    return boft_unpack(to, bits, rows, n, packed.const_data_ptr(), x.mutable_data_ptr(), n, begin, end);
  });
  return x;
}

void check_packed(const Tensor& packed, int64_t rows, int64_t n, int bits) {
  const int64_t bytes = static_cast<int64_t>(boft_pack_bytes(n, bits));
  TORCH_CHECK_VALUE(packed.scalar_type() == at::kByte && packed.is_contiguous() && packed.dim() == 2 &&
                        packed.size(0) == rows && packed.size(1) == bytes,
                    "packed: expected (", rows, ", ", bytes, ") contiguous bytes, got ", packed.sizes(), " of ",
                    packed.scalar_type());
}

// Not withdrawn with the other CPU kernels, which a backward may outlive.
TORCH_LIBRARY_IMPL(boft, CPU, library) {
  library.impl("pack", pack_cpu);
}

}  // namespace boft
