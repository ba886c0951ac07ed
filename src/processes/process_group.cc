#include "stbllm/processes/process_group.h"

#include <ATen/ATen.h>

#ifdef STBLLM_HAS_GLOO
// Only pointers to Gloo's types cross from here into libtorch, which holds Gloo itself: its headers may be of
// another version.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#endif

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>
#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/base/log.h"

namespace stbllm {
namespace {

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  if (value == nullptr || *value == 0)
    fail(ErrorCode::kUsage,
         "{} is not set: with WORLD_SIZE above 1, RANK, MASTER_ADDR and MASTER_PORT say where the other "
         "processes are",
         name);
  return value;
}

int integer_variable(const char* name, int least, int most) {
  const std::string text = variable(name);
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < least || value > most)
    fail(ErrorCode::kUsage, "{}={}: expected a number from {} to {}", name, text, least, most);
  return value;
}

#ifdef STBLLM_HAS_GLOO

/// How long another process is waited for.
std::chrono::seconds time_limit() {
  constexpr const char* kVariable = "STBLLM_PROCESS_TIMEOUT";
  constexpr std::chrono::seconds kDefault = std::chrono::minutes(30);
  if (std::getenv(kVariable) == nullptr) return kDefault;
  return std::chrono::seconds(integer_variable(kVariable, 1, 7 * 24 * 3600));
}

#endif

}  // namespace

#ifdef STBLLM_HAS_GLOO

struct ProcessGroup::Gloo {
  c10::intrusive_ptr<c10d::ProcessGroupGloo> backend;

  /// Runs one exchange; whatever stops it is a process that is gone or silent.
  template <typename Exchange>
  static auto guarded(const Exchange& exchange) {
    try {
      return exchange();
    } catch (const std::exception& error) {
      const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
      const std::string reason =
          torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
      fail(ErrorCode::kInterrupted,
           "another process ended or did not answer within {} s, its own message tells more ({}); start all "
           "processes again, "
           "with --resume where blocks are finished",
           time_limit().count(), reason.substr(0, reason.find('\n')));
    }
  }
  void wait(const c10::intrusive_ptr<c10d::Work>& work) const {
    guarded([&] { return work->wait(); });
  }
  void broadcast_bytes(const at::Tensor& bytes, int root) const {
    std::vector<at::Tensor> tensors = {bytes};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    wait(guarded([&] { return backend->broadcast(tensors, options); }));
  }
};

bool ProcessGroup::supported() { return true; }

ProcessGroup ProcessGroup::from_environment() {
  ProcessGroup group;
  if (std::getenv("WORLD_SIZE") != nullptr) group.size_ = integer_variable("WORLD_SIZE", 1, 1 << 16);
  if (group.size_ == 1) return group;
  group.rank_ = integer_variable("RANK", 0, group.size_ - 1);
  const std::string address = variable("MASTER_ADDR");
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(integer_variable("MASTER_PORT", 1, 65535));
  options.isServer = group.rank_ == 0;
  options.numWorkers = group.size_;
  options.timeout = time_limit();
  if (options.isServer)
    log::info("waiting at {}:{} until {} processes are there", address, options.port, group.size_);
  const auto store = [&] {
    try {
      return c10::make_intrusive<c10d::TCPStore>(address, options);
    } catch (const c10::Error& error) {
      const std::string reason = error.what_without_backtrace();
      fail(ErrorCode::kUsage,
           "{}:{}: the processes cannot meet there ({}); set MASTER_ADDR to the host of process 0 and "
           "MASTER_PORT to a free port",
           address, options.port, reason.substr(0, reason.find('\n')));
    }
  }();
  group.gloo_ = Gloo::guarded([&] {
    auto gloo = std::make_unique<Gloo>();
    gloo->backend = c10::make_intrusive<c10d::ProcessGroupGloo>(
        store, group.rank_, group.size_, c10d::ProcessGroupGloo::Options::create_default(time_limit()));
    return gloo;
  });
  return group;
}

void ProcessGroup::all_reduce(at::Tensor& tensor) const {
  if (!gloo_) return;
  tensor = tensor.contiguous();
  std::vector<at::Tensor> tensors = {tensor};
  gloo_->wait(Gloo::guarded([&] { return gloo_->backend->allreduce(tensors); }));
}

void ProcessGroup::broadcast(at::Tensor& tensor, int root) const {
  if (!gloo_) return;
  constexpr int64_t kMaxDimensions = 8;
  at::Tensor header =
      at::zeros({2 + kMaxDimensions}, at::kLong);  // dtype, or -1 without a tensor; dimensions; their sizes
  int64_t* const values = header.data_ptr<int64_t>();
  if (rank_ == root) {
    values[0] = tensor.defined() ? static_cast<int64_t>(tensor.scalar_type()) : -1;
    if (tensor.defined()) {
      tensor = tensor.contiguous();
      values[1] = tensor.dim();
      STBLLM_CHECK(tensor.dim() <= kMaxDimensions, "{} dimensions", tensor.dim());
      std::copy(tensor.sizes().begin(), tensor.sizes().end(), values + 2);
    }
  }
  gloo_->broadcast_bytes(header, root);
  if (rank_ != root)
    tensor = values[0] < 0 ? at::Tensor()
                           : at::empty({values + 2, static_cast<size_t>(values[1])},
                                       static_cast<at::ScalarType>(values[0]));
  if (tensor.defined() && tensor.numel() > 0)
    gloo_->broadcast_bytes(
        at::from_blob(tensor.data_ptr(), {static_cast<int64_t>(tensor.nbytes())}, at::kByte), root);
}

#else

struct ProcessGroup::Gloo {};

bool ProcessGroup::supported() { return false; }

ProcessGroup ProcessGroup::from_environment() {
  if (std::getenv("WORLD_SIZE") != nullptr && integer_variable("WORLD_SIZE", 1, 1 << 16) > 1)
    fail(ErrorCode::kUnsupported,
         "WORLD_SIZE={}: this program was built without Gloo and runs in one process; install its headers "
         "(package libgloo-dev), "
         "then run cmake again and build",
         variable("WORLD_SIZE"));
  return {};
}

void ProcessGroup::all_reduce(at::Tensor&) const {}
void ProcessGroup::broadcast(at::Tensor&, int) const {}

#endif

ProcessGroup::ProcessGroup() = default;
ProcessGroup::~ProcessGroup() = default;
ProcessGroup::ProcessGroup(ProcessGroup&&) noexcept = default;

double ProcessGroup::all_reduce(double value) const {
  at::Tensor tensor = at::tensor({value}, at::kDouble);
  all_reduce(tensor);
  return tensor.item<double>();
}

void ProcessGroup::broadcast(nlohmann::json& value, int root) const {
  if (size_ == 1) return;
  std::string text = value.dump();
  at::Tensor bytes = at::from_blob(text.data(), {static_cast<int64_t>(text.size())}, at::kByte).clone();
  broadcast(bytes, root);
  const auto* first = static_cast<const char*>(bytes.data_ptr());
  value = nlohmann::json::parse(first, first + bytes.numel());
}

int local_rank() { return std::getenv("LOCAL_RANK") == nullptr ? 0 : integer_variable("LOCAL_RANK", 0, 127); }

Share share_of(int64_t items, const ProcessGroup& group) {
  const int64_t first = items * group.rank() / group.size();
  return {first, items * (group.rank() + 1) / group.size() - first};
}

}  // namespace stbllm
