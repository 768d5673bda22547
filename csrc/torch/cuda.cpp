#include "cuda.h"

#include "../cuda/device.h"
#include "common.h"

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <dlfcn.h>

#include <array>
#include <atomic>
#include <limits>
#include <map>
#include <mutex>

namespace boft {
namespace {

using CurrentStream = int32_t (*)(int32_t device, void** stream);

// A function of torch's stable C interface; NULL in a torch without CUDA.
CurrentStream current_stream_function() {
  static const auto function = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(
        dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  return function;
}

void* current_stream(c10::DeviceIndex device) {
  void* stream = nullptr;
  const CurrentStream function = current_stream_function();
  TORCH_CHECK(function && function(device, &stream) == 0, "boft_ext: this torch does not say which CUDA stream is "
              "current on device ", static_cast<int>(device));
  return stream;
}

}  // namespace

bool cuda_streams() { return current_stream_function() != nullptr; }

bool cuda_serves(c10::DeviceIndex device) {
  enum Answer : char { kUnknown, kYes, kNo };
  static std::array<std::atomic<Answer>, std::numeric_limits<c10::DeviceIndex>::max() + 1> answers{};
  if (device < 0) return false;
  Answer answer = answers[device].load(std::memory_order_relaxed);
  if (answer == kUnknown) {
    answer = !at::detail::getCUDAHooks().hasROCM() && boft_cuda_serves(device) ? kYes : kNo;
    answers[device].store(answer, std::memory_order_relaxed);
  }
  return answer == kYes;
}

CudaCall::CudaCall(c10::Device device) : device_(device), guard_(device), stream_(current_stream(device.index())) {}

Workspace CudaCall::workspace(size_t bytes) const {
  if (bytes == 0) return {};
  return {at::empty({static_cast<int64_t>(bytes)}, at::TensorOptions().device(device_).dtype(at::kByte))};
}

Counters CudaCall::counters() const {
  int capturing = 0;
  check(boft_cuda_capturing(stream_, &capturing));
  unsigned* own = nullptr;
  // A graph may be replayed beside this stream's work, so its calls have counters of their own.
  if (!capturing) {
    // Work on one stream runs one after another. Not torch's memory: this may be called while torch gives out that of a
    // graph, which must not hold what outlives the graph.
    static std::mutex mutex;
    static std::map<std::pair<c10::DeviceIndex, void*>, unsigned*> kept;
    const std::lock_guard<std::mutex> guard(mutex);
    unsigned*& of_stream = kept[{device_.index(), stream_}];
    if (!of_stream) check(boft_cuda_make_counters(stream_, &of_stream));
    own = of_stream;
  }
  if (own) return {own, {}};
  return {nullptr, at::zeros({BOFT_CUDA_COUNTERS}, at::TensorOptions().device(device_).dtype(at::kInt))};
}

c10::Device common_device(const char* name, std::initializer_list<const at::Tensor*> tensors) {
  std::optional<c10::Device> device;
  for (const at::Tensor* tensor : tensors) {
    if (!tensor) continue;
    if (!device) device = tensor->device();
    TORCH_CHECK(*device == tensor->device(), name, ": all tensors must be on one device, got ", *device, " and ",
                tensor->device());
  }
  return *device;
}

}  // namespace boft
