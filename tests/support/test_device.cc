#include "support/test_device.h"

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <sys/mman.h>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <map>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

namespace stbllm::test {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

// --- memory --------------------------------------------------------------------------------------------

/// All pages of the device. Some are open to the host while operations use them.
class Memory {
 public:
  void* allocate(size_t bytes) {
    const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    const size_t size = std::max<size_t>(1, (bytes + page - 1) / page) * page;
    void* data = ::mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(data != MAP_FAILED, "the test device has no ", size, " bytes left");
    const std::scoped_lock lock(mutex_);
    ranges_[reinterpret_cast<std::uintptr_t>(data)] = {.size = size};
    return data;
  }
  void release(void* data) {
    const std::scoped_lock lock(mutex_);
    const auto found = ranges_.find(reinterpret_cast<std::uintptr_t>(data));
    found->second.released = true;
    remove_if_unused(found);
  }
  /// Opens the pages around `data` to the host and returns their first address.
  std::uintptr_t open(const void* data) {
    const std::scoped_lock lock(mutex_);
    auto found = ranges_.upper_bound(reinterpret_cast<std::uintptr_t>(data));
    TORCH_CHECK(found != ranges_.begin(), data, " is no memory of the test device");
    --found;
    TORCH_CHECK(reinterpret_cast<std::uintptr_t>(data) - found->first < found->second.size, data,
                " is no memory of the test device");
    if (found->second.users++ == 0) protect(*found, PROT_READ | PROT_WRITE);
    return found->first;
  }
  void close(std::uintptr_t first) {
    const std::scoped_lock lock(mutex_);
    const auto found = ranges_.find(first);
    if (--found->second.users == 0) protect(*found, PROT_NONE);
    remove_if_unused(found);
  }

 private:
  struct Range {
    size_t size;
    int users = 0;          // operations that use it
    bool released = false;  // no tensor is there any more
  };
  using Ranges = std::map<std::uintptr_t, Range>;  // by the first address
  void remove_if_unused(Ranges::iterator range) {
    if (range->second.users > 0 || !range->second.released) return;
    ::munmap(reinterpret_cast<void*>(range->first), range->second.size);
    ranges_.erase(range);
  }
  static void protect(const Ranges::value_type& range, int access) {
    TORCH_CHECK(::mprotect(reinterpret_cast<void*>(range.first), range.second.size, access) == 0,
                "mprotect failed");
  }
  std::mutex mutex_;
  Ranges ranges_;
};

Memory& memory() {
  static Memory& memory = *new Memory;  // never destroyed: tensors may outlive it
  return memory;
}

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = memory().allocate(bytes);
    return {data, data, &release, c10::Device(kType, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    const DeviceAccess open_to(to), open_from(from);
    default_copy_data(to, from, bytes);
  }

 private:
  static void release(void* data) { memory().release(data); }
};

DeviceAllocator& allocator() {
  static DeviceAllocator& allocator = *new DeviceAllocator;
  return allocator;
}

// --- what libtorch asks of a device ----------------------------------------------------------------------

struct GuardImpl final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream only_stream() { return c10::Stream(c10::Stream::DEFAULT, c10::Device(kType, 0)); }
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return {kType, 0}; }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return only_stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return only_stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return only_stream(); }
  void* getStreamNativeHandle(const c10::Stream) const override { return nullptr; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  // There is one stream, in which everything is done at once.
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  /// Operations draw from that of the CPU; at::manual_seed() wants to see one here.
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static const at::Generator generator = at::detail::createCPUGenerator();
    return generator;
  }
};

// --- operations ------------------------------------------------------------------------------------------

struct Counters {
  std::atomic<int64_t> to_device = 0, to_host = 0, waits = 0;
};
Counters& counters() {
  static Counters counters;
  return counters;
}

bool on_device(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kType; }

/// A tensor of the CPU in the memory of a tensor of the device, whose pages must be open when it is used.
at::Tensor alias_on_host(const at::Tensor& tensor) {
  const c10::Storage& storage = tensor.storage();
  c10::Storage alias(c10::Storage::use_byte_size_t(), storage.nbytes(),
                     c10::DataPtr(storage.data_ptr().get(), c10::Device(c10::kCPU)));
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(),
                                                      tensor.storage_offset());
  return result;
}

at::Tensor make_on_device(c10::Storage storage, const at::Tensor& like) {
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), like.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return result;
}

at::Tensor empty(at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(sizes, &allocator(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   at::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef strides, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(sizes, strides, &allocator(),
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                           at::dtype_or_default(dtype));
}

/// A copy of a tensor of the CPU, with its strides.
at::Tensor copy_to_device(const at::Tensor& host) {
  const size_t bytes = at::detail::computeStorageNbytes(host.sizes(), host.strides(), host.element_size());
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, allocator().allocate(bytes), &allocator(),
                       /*resizable=*/true);
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), host.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(host.sizes(), host.strides(), 0);
  const DeviceAccess access(result);
  alias_on_host(result).copy_(host);
  return result;
}

const at::Tensor& resize(const at::Tensor& self, at::IntArrayRef sizes, std::optional<at::MemoryFormat>) {
  c10::TensorImpl* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(sizes);
  const size_t bytes =
      at::detail::computeStorageNbytesContiguous(sizes, self.element_size(), self.storage_offset());
  const c10::Storage& storage = self.storage();
  if (bytes <= storage.nbytes()) return self;
  c10::DataPtr grown = allocator().allocate(bytes);
  allocator().copy_data(grown.get(), storage.data_ptr().get(), storage.nbytes());
  storage.unsafeGetStorageImpl()->set_data_ptr(std::move(grown));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  return self;
}

at::Tensor as_strided(const at::Tensor& self, at::IntArrayRef sizes, at::IntArrayRef strides,
                      std::optional<int64_t> offset) {
  at::Tensor result = at::detail::make_tensor<c10::TensorImpl>(
      c10::TensorImpl::VIEW, c10::Storage(self.storage()), self.key_set(), self.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides, offset.value_or(self.storage_offset()));
  return result;
}

/// The one way between the host and the device.
at::Tensor& copy(at::Tensor& self, const at::Tensor& from, bool) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (self.numel() > 0 && on_device(self) != on_device(from)) {
    ++(on_device(self) ? counters().to_device : counters().to_host);
    if (!on_device(self)) ++counters().waits;
  }
  std::vector<DeviceAccess> access;
  const auto on_host = [&](const at::Tensor& tensor) {
    if (!on_device(tensor)) return tensor;
    access.emplace_back(tensor);
    return alias_on_host(tensor);
  };
  on_host(self).copy_(on_host(from));
  return self;
}

/// Operations on CUDA whose shape the host has to wait for.
bool has_shape_by_values(std::string_view name) {
  constexpr std::array<std::string_view, 5> kNames = {"aten::nonzero", "aten::masked_select",
                                                      "aten::_unique2", "aten::unique_dim",
                                                      "aten::repeat_interleave"};
  return std::ranges::find(kNames, name) != kNames.end();
}

/// One call of an operation of the CPU on the memory of the device.
class Fallback {
 public:
  Fallback(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), stack_(stack), name_(op.schema().operator_name().name) {}

  void call() {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::FunctionSchema& schema = op_.schema();
    const size_t count = schema.arguments().size(), first = stack_.size() - count;
    for (size_t i = 0; i < count; ++i) {
      const c10::AliasInfo* alias = schema.arguments()[i].alias_info();
      stack_[first + i] =
          to_host(stack_[first + i], alias != nullptr && alias->isWrite(), schema.arguments()[i].name());
    }
    op_.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), &stack_);
    for (const Argument& argument : arguments_) update(argument);
    bool waits = has_shape_by_values(name_);
    for (size_t i = stack_.size() - schema.returns().size(); i < stack_.size(); ++i) {
      stack_[i] = to_device(stack_[i]);
      waits |= !stack_[i].isTensor() && !stack_[i].isTensorList();
    }
    if (waits) ++counters().waits;
  }

 private:
  struct Argument {
    at::Tensor on_device, on_host;
    bool fresh;  // an empty tensor that the operation may give a size
  };

  at::Tensor to_host(const at::Tensor& tensor, bool written, const std::string& argument) {
    if (!tensor.defined()) return tensor;
    if (!on_device(tensor)) {
      TORCH_CHECK(tensor.is_cpu(), "the test device got a tensor on ", tensor.device());
      if (argument == "indices" && !written) {
        ++counters().to_device;  // as libtorch sends them on CUDA
        return tensor;
      }
      TORCH_CHECK(tensor.dim() == 0 && !written,
                  "Expected all tensors to be on the same device, but found at least two devices, ",
                  test_device(), " and cpu! (argument ", argument, " of ", name_, ")");
      return tensor;
    }
    for (const Argument& known : arguments_)
      if (known.on_device.is_same(tensor)) return known.on_host;
    const bool fresh = written && tensor.numel() == 0;
    access_.emplace_back(tensor);
    arguments_.push_back(
        {tensor,
         fresh ? at::empty(tensor.sizes(), at::TensorOptions().dtype(tensor.dtype())) : alias_on_host(tensor),
         fresh});
    return arguments_.back().on_host;
  }

  c10::IValue to_host(const c10::IValue& value, bool written, const std::string& argument) {
    if (value.isTensor()) return to_host(value.toTensor(), written, argument);
    if (value.isTensorList()) {
      c10::List<at::Tensor> tensors;
      for (const at::Tensor& tensor : value.toTensorVector())
        tensors.push_back(to_host(tensor, written, argument));
      return tensors;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorVector())
        tensors.push_back(tensor ? std::optional(to_host(*tensor, written, argument)) : std::nullopt);
      return tensors;
    }
    if (value.isDevice() && value.toDevice().type() == kType) return c10::IValue(c10::Device(c10::kCPU));
    return value;
  }

  /// What the operation did to the shape of an argument holds for the tensor of the device.
  void update(const Argument& argument) {
    c10::TensorImpl* impl = argument.on_device.unsafeGetTensorImpl();
    const at::Tensor& host = argument.on_host;
    if (argument.fresh) {
      if (host.numel() == 0) return;
      const at::Tensor copied = copy_to_device(host);
      impl->set_storage_keep_dtype(copied.storage());
      impl->set_sizes_and_strides(host.sizes(), host.strides(), 0);
    } else if (impl->sizes() != host.sizes() || impl->strides() != host.strides()) {
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    }
  }

  at::Tensor to_device(const at::Tensor& result) {
    if (!result.defined()) return result;
    for (const Argument& argument : arguments_) {
      if (argument.on_host.is_same(result)) return argument.on_device;
      if (!argument.fresh && argument.on_host.storage().data_ptr().get() == result.storage().data_ptr().get())
        return make_on_device(argument.on_device.storage(), result);  // a view
    }
    return copy_to_device(result);
  }

  c10::IValue to_device(const c10::IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> tensors;
    for (const at::Tensor& tensor : value.toTensorVector()) tensors.push_back(to_device(tensor));
    return tensors;
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  const std::string name_;
  std::vector<Argument> arguments_;
  std::vector<DeviceAccess> access_;
};

void call_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { Fallback(op, *stack).call(); }

C10_REGISTER_GUARD_IMPL(PrivateUse1, GuardImpl);

[[maybe_unused]] const bool kRegistered = [] {
  c10::register_privateuse1_backend(kTestDevice);
  c10::SetAllocator(kType, &allocator());
  at::RegisterPrivateUse1HooksInterface(new Hooks);  // libtorch keeps it to the end
  return true;
}();

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("resize_", &resize);
  m.impl("as_strided", &as_strided);
  m.impl("copy_", &copy);
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&call_on_host>());
}

}  // namespace

at::Device test_device() { return {kType, 0}; }

Transfers transfers() { return {counters().to_device, counters().to_host, counters().waits}; }

DeviceAccess::DeviceAccess(const void* data) : pages_(memory().open(data)) {}
DeviceAccess::DeviceAccess(const at::Tensor& tensor)
    : DeviceAccess(static_cast<const void*>(tensor.storage().data_ptr().get())) {}
DeviceAccess::~DeviceAccess() {
  if (pages_ != 0) memory().close(pages_);
}
DeviceAccess::DeviceAccess(DeviceAccess&& from) noexcept : pages_(std::exchange(from.pages_, 0)) {}

}  // namespace stbllm::test
