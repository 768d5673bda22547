// What operators on CUDA devices have in common. Without torch's CUDA headers, so that the module is the same for torch
// with and without CUDA.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "boft_cuda.h"

namespace boft {

// Whether the operators run kernels on this CUDA device: not on those older than the kernels, nor on other vendors'
// that torch calls CUDA. The answer is kept. Thread-safe.
bool cuda_serves(c10::DeviceIndex device);

// Whether this torch says which stream is current. Touches no device.
bool cuda_streams();

// Memory for one call; NULL for no bytes. Torch gives it out again to later work on the same stream only.
struct Workspace {
  at::Tensor tensor;
  void* data() const { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }
};

// BOFT_CUDA_COUNTERS zeros: those of the stream, or a tensor for one call.
struct Counters {
  unsigned* of_stream;
  at::Tensor tensor;
  unsigned* data() const { return of_stream ? of_stream : static_cast<unsigned*>(tensor.mutable_data_ptr()); }
};

// One call on a device, which is the current one as long as this lives, and on torch's current stream there.
class CudaCall {
 public:
  explicit CudaCall(c10::Device device);
  void* stream() const { return stream_; }
  Workspace workspace(size_t bytes) const;
  Counters counters() const;

 private:
  const c10::Device device_;
  const c10::DeviceGuard guard_;
  void* const stream_;
};

// The CUDA device that all tensors are on; RuntimeError naming the operator and the devices if there are several.
c10::Device common_device(const char* name, std::initializer_list<const at::Tensor*> tensors);

inline const at::Tensor* tensor_or_null(const at::Tensor& tensor) { return &tensor; }
inline const at::Tensor* tensor_or_null(const std::optional<at::Tensor>& tensor) { return tensor ? &*tensor : nullptr; }
template <typename T>
const at::Tensor* tensor_or_null(const T&) { return nullptr; }

// The operator `name` for the CUDA key: `kernel` on devices that it serves, elsewhere the device-independent form.
template <const char* name, auto kernel>
struct OnCuda;

template <const char* name, typename Result, typename... Args, Result (*kernel)(const CudaCall&, Args...)>
struct OnCuda<name, kernel> {
  static Result call(Args... args) {
    const c10::Device device = common_device(name, {tensor_or_null(args)...});
    if (cuda_serves(device.index())) return kernel(CudaCall(device), std::forward<Args>(args)...);
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Result(Args...)>();
    // The form is registered for all devices at once, and this is a key of one that has no kernel of its own.
    return op.redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse3), std::forward<Args>(args)...);
  }
};

}  // namespace boft
