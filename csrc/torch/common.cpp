#include "common.h"

#include "recycler.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstring>

namespace boft {

void check(boft_status status) {
  if (status == BOFT_OK) return;
  TORCH_CHECK(status != BOFT_CUDA_FAILED, boft_last_error());
  TORCH_CHECK_TYPE(status != BOFT_BAD_DTYPE, boft_last_error());
  TORCH_CHECK_VALUE(false, boft_last_error());
}

boft_dtype data_dtype(const at::Tensor& tensor, const char* what) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return BOFT_F32;
    case at::kDouble:
      return BOFT_F64;
    case at::kBFloat16:
      return BOFT_BF16;
    case at::kHalf:
      return BOFT_F16;
    default:
      TORCH_CHECK_TYPE(false, what, ": expected float32, float64, bfloat16 or float16, got ", tensor.scalar_type());
  }
}

at::ScalarType real_dtype(at::ScalarType data) {
  return data == at::kDouble ? at::kDouble : at::kFloat;
}

boft_plan make_plan(int64_t d, int64_t b, int64_t m) {
  boft_plan plan;
  check(boft_plan_make(d, b, m, &plan));
  return plan;
}

bool is_plain(const at::Tensor& tensor) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  constexpr DispatchKeySet quiet({DispatchKey::CPU, DispatchKey::ADInplaceOrView, DispatchKey::AutogradCPU,
                                  DispatchKey::BackendSelect});
  const c10::impl::LocalDispatchKeySet local = c10::impl::tls_local_dispatch_key_set();
  const DispatchKeySet active = (tensor.key_set() | local.included_) - local.excluded_;
  return (active.raw_repr() & ~quiet.raw_repr()) == 0 && tensor.layout() == at::kStrided;
}

Rows::Rows(const at::Tensor& any) : tensor(any) {
  columns = tensor.size(-1);
  rows = columns == 0 ? 0 : tensor.numel() / columns;
  stride = columns;
  // Only its data is read, so what lies in rows already is not reshaped.
  if (tensor.is_contiguous()) return;
  if (tensor.dim() != 2) tensor = tensor.reshape({rows, columns});
  if (columns > 1 && tensor.stride(1) != 1) tensor = tensor.contiguous();
  if (rows > 1) stride = tensor.stride(0);
}

at::Tensor empty_contiguous(const at::Tensor& tensor) { return empty_contiguous(tensor, tensor.sizes()); }

at::Tensor empty_contiguous(const at::Tensor& tensor, at::IntArrayRef sizes) {
  if (!tensor.is_cpu()) return at::empty(sizes, tensor.options().memory_format(at::MemoryFormat::Contiguous));
  return at::detail::empty_generic(sizes, &recycler(), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.scalar_type(),
                                   c10::MemoryFormat::Contiguous);
}

void Runs::check(const at::Tensor& batch, int64_t adapters) const {
  TORCH_CHECK_VALUE(batch.dim() >= 2 && ends.size() == choice.size(), "runs: got ", ends.size(), " ends and ",
                    choice.size(), " adapters for a batch of shape ", batch.sizes());
  int64_t begin = 0;
  for (size_t i = 0; i < ends.size(); begin = ends[i++]) {
    TORCH_CHECK_VALUE(ends[i] > begin, "runs: the run that begins with row ", begin, " ends before row ", ends[i]);
    TORCH_CHECK_VALUE(choice[i] >= -1 && choice[i] < adapters, "runs: no adapter ", choice[i], " among ", adapters);
  }
  TORCH_CHECK_VALUE(begin == batch.size(0), "runs: they end before row ", begin, " of ", batch.size(0));
}

void copy_rows(const Rows& in, const at::Tensor& out, int64_t begin, int64_t end) {
  const size_t item = out.element_size(), bytes = in.columns * item;
  const char* from = static_cast<const char*>(in.data());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t row = begin; row < end; row++) std::memcpy(to + row * bytes, from + row * in.stride * item, bytes);
}

}  // namespace boft
