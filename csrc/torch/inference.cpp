// Calls without gradients: the collapsed blocks of a parameter kept between calls, and operators called without the
// dispatcher where nothing would listen there. One row costs little arithmetic, so the call is what counts.
#include "common.h"
#include "ops.h"

#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace boft {
namespace {

using at::Tensor;

// The bytes of a parameter and the blocks made from them. Immutable, so that a thread can go on using what it found.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;
  Tensor parameter, blocks;
};

std::mutex mutex;
std::unordered_map<const c10::TensorImpl*, std::shared_ptr<const Entry>> entries;
size_t sweep_at = 64;

std::shared_ptr<const Entry> find(const Tensor& boft_R) {
  const std::lock_guard<std::mutex> guard(mutex);
  const auto found = entries.find(boft_R.unsafeGetTensorImpl());
  if (found == entries.end() || found->second->owner.expired()) return nullptr;
  return found->second;
}

void keep(const Tensor& boft_R, std::shared_ptr<const Entry> entry) {
  const std::lock_guard<std::mutex> guard(mutex);
  entries[boft_R.unsafeGetTensorImpl()] = std::move(entry);
  if (entries.size() < sweep_at) return;
  for (auto at = entries.begin(); at != entries.end();) at = at->second->owner.expired() ? entries.erase(at) : ++at;
  sweep_at = 2 * entries.size() + 64;
}

bool same_bytes(const Tensor& kept, const Tensor& now) {
  if (kept.scalar_type() != now.scalar_type() || kept.sizes() != now.sizes()) return false;
  const char *a = static_cast<const char*>(kept.const_data_ptr()), *b = static_cast<const char*>(now.const_data_ptr());
  constexpr int64_t each = 1 << 17;  // bytes; 256 KiB in one thread take about 19 us
  std::atomic<bool> same{true};
  at::parallel_for(0, static_cast<int64_t>(kept.nbytes()), each, [&](int64_t begin, int64_t end) {
    if (std::memcmp(a + begin, b + begin, static_cast<size_t>(end - begin)) != 0) same = false;
  });
  return same;
}

Tensor blocks_of(const Tensor& boft_R, at::ScalarType real) {
  auto entry = find(boft_R);
  if (!entry || entry->blocks.scalar_type() != real || !same_bytes(entry->parameter, boft_R)) {
    // A tensor made in inference mode could never be saved for a later backward.
    const c10::InferenceMode outside(false);
    const at::NoGradGuard no_grad;
    const Tensor parameter = boft_R.detach().clone();
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("boft::blocks", "")
                               .typed<std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&)>();
    Tensor blocks = std::get<0>(op.call(parameter.to(real), std::nullopt));
    entry = std::make_shared<const Entry>(
        Entry{c10::weak_intrusive_ptr<c10::TensorImpl>(boft_R.getIntrusivePtr()), parameter, std::move(blocks)});
    keep(boft_R, entry);
  }
  return entry->blocks;
}

bool serves(const Tensor& boft_R) {
  return cpu_kernels_in_use() && is_plain(boft_R) && boft_R.dim() == 4 && boft_R.is_contiguous() &&
         boft_R.is_floating_point();
}

}  // namespace

std::optional<Tensor> cached_blocks(const Tensor& boft_R, bool wide) {
  if (!serves(boft_R)) return std::nullopt;
  return blocks_of(boft_R, wide ? at::kDouble : at::kFloat);
}

std::optional<Tensor> rotate_now(const Tensor& x, const Tensor& boft_R, bool transpose) {
  if (!serves(boft_R) || !is_plain(x)) return std::nullopt;
  const Tensor blocks = blocks_of(boft_R, real_dtype(x.scalar_type()));
  return rotate_cpu(x, blocks, boft_R.size(2), boft_R.size(0), transpose);
}

std::optional<Tensor> scale_now(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias) {
  if (!cpu_kernels_in_use() || !is_plain(z) || !is_plain(s) || (bias.has_value() && !is_plain(*bias)))
    return std::nullopt;
  return scale_cpu(z, s, bias, false);
}

}  // namespace boft
