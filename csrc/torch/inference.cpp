// Calls without gradients: the collapsed blocks of a parameter kept between calls, and operators called without the
// dispatcher where nothing would listen there. One row costs little arithmetic, so the call is what counts.
#include "linear.h"

#include <ATen/ops/linear.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <array>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace boft {
namespace {

using at::Tensor;

// Parts of a parameter with a digest each, so that threads can share the reading; 128 KiB take one thread about 3 us.
constexpr size_t kPartBytes = 1 << 17;
using Digest = std::array<uint64_t, BOFT_DIGEST_WORDS>;

// What a parameter held and the blocks made from it. Not a copy of it: when single rows go through a model, what is
// read beside the weights counts, and the copy would be a third of it. Immutable, so that a thread can go on using it.
struct Entry {
  c10::weak_intrusive_ptr<c10::TensorImpl> owner;
  at::ScalarType dtype;
  std::vector<int64_t> sizes;
  std::vector<Digest> digests;
  Tensor blocks;
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

std::vector<Digest> digests_of(const Tensor& boft_R) {
  const auto* const data = static_cast<const char*>(boft_R.const_data_ptr());
  const size_t bytes = boft_R.nbytes();
  std::vector<Digest> digests((bytes + kPartBytes - 1) / kPartBytes);
  at::parallel_for(0, static_cast<int64_t>(digests.size()), 1, [&](int64_t begin, int64_t end) {
    for (size_t i = begin; i < static_cast<size_t>(end); i++)
      check(boft_digest(data + i * kPartBytes, std::min(kPartBytes, bytes - i * kPartBytes), digests[i].data()));
  });
  return digests;
}

Tensor blocks_of(const Tensor& boft_R, at::ScalarType real) {
  auto entry = find(boft_R);
  std::vector<Digest> digests = digests_of(boft_R);
  if (!entry || entry->blocks.scalar_type() != real || entry->dtype != boft_R.scalar_type() ||
      boft_R.sizes() != entry->sizes || entry->digests != digests) {
    // A tensor made in inference mode could never be saved for a later backward.
    const c10::InferenceMode outside(false);
    const at::NoGradGuard no_grad;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("boft::blocks", "")
                               .typed<std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&)>();
    // A copy, so that the digest and the blocks are of the same values if another thread is writing to the parameter.
    const Tensor parameter = boft_R.detach().clone();
    digests = digests_of(parameter);
    Tensor blocks = std::get<0>(op.call(parameter.to(real), std::nullopt));
    entry = std::make_shared<const Entry>(Entry{c10::weak_intrusive_ptr<c10::TensorImpl>(boft_R.getIntrusivePtr()),
                                                boft_R.scalar_type(), boft_R.sizes().vec(), std::move(digests),
                                                std::move(blocks)});
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

std::optional<Tensor> linear_now(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                 const Tensor& boft_R, const Tensor& s) {
  if (!serves(boft_R) || !is_plain(x) || !is_plain(weight) || !is_plain(s) || (bias.has_value() && !is_plain(*bias)))
    return std::nullopt;
  const Tensor blocks = blocks_of(boft_R, real_dtype(x.scalar_type()));
  if (linear_fits(x, weight, bias)) {
    const Layer layer(x.scalar_type(), s, weight, bias, std::nullopt, boft_R.size(2), boft_R.size(0));
    return is_few(layer, x) ? few_forward(layer, blocks, x) : linear_forward(layer, blocks, x, false).out;
  }
  const Tensor rotated = rotate_cpu(x, blocks, boft_R.size(2), boft_R.size(0), false);
  return scale_cpu(at::linear(rotated, weight, bias), s, bias, false);
}

std::optional<Tensor> scale_now(const Tensor& z, const Tensor& s, const std::optional<Tensor>& bias) {
  if (!cpu_kernels_in_use() || !is_plain(z) || !is_plain(s) || (bias.has_value() && !is_plain(*bias)))
    return std::nullopt;
  return scale_cpu(z, s, bias, false);
}

std::optional<Tensor> rotate_runs_now(const Tensor& x, const std::vector<int64_t>& ends,
                                      const std::vector<int64_t>& choice, const std::vector<Tensor>& parameters) {
  if (!is_plain(x) || !std::all_of(parameters.begin(), parameters.end(), serves)) return std::nullopt;
  std::vector<Rotation> rotations;
  for (const Tensor& boft_R : parameters)
    rotations.push_back({blocks_of(boft_R, real_dtype(x.scalar_type())), boft_R.size(2), boft_R.size(0)});
  return rotate_runs_cpu(x, {ends, choice}, rotations);
}

std::optional<Tensor> scale_runs_now(const Tensor& z, const std::vector<int64_t>& ends,
                                     const std::vector<int64_t>& choice, const std::vector<Tensor>& scales,
                                     const std::optional<Tensor>& bias) {
  if (!cpu_kernels_in_use() || !is_plain(z) || !std::all_of(scales.begin(), scales.end(), is_plain) ||
      (bias.has_value() && !is_plain(*bias)))
    return std::nullopt;
  return scale_runs_cpu(z, {ends, choice}, scales, bias);
}

}  // namespace boft
