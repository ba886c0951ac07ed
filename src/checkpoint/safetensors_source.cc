#include <ATen/ATen.h>

#include <string>
#include <vector>

#include "mapped_tensor.h"
#include "stbllm/base/error.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/checkpoint/sources.h"

namespace stbllm {
namespace {

class SafetensorsSource : public TensorSource {
 public:
  explicit SafetensorsSource(const std::filesystem::path& path) : file_(SafetensorsFile::open(path)) {}

  const std::filesystem::path& path() const override { return file_->file()->path(); }

  std::vector<std::string> names() const override {
    std::vector<std::string> names;
    for (const auto& [name, entry] : file_->tensors()) names.push_back(name);
    return names;
  }

  std::vector<int64_t> shape(const std::string& name) const override {
    return file_->tensors().at(name).shape;
  }

  at::Tensor load(const std::string& name) const override {
    const TensorEntry& entry = file_->tensors().at(name);
    return mapped_tensor(file_, entry.data, entry.shape, c10::contiguous_strides(entry.shape),
                         scalar_type_of(entry.dtype, path(), name));
  }

  void release(const std::string& name) const override {
    file_->file()->release(file_->tensors().at(name).data);
  }

 private:
  std::shared_ptr<const SafetensorsFile> file_;
};

}  // namespace

at::ScalarType scalar_type_of(const std::string& dtype, const std::filesystem::path& file,
                              const std::string& tensor) {
  if (dtype == "F32") return at::kFloat;
  if (dtype == "F16") return at::kHalf;
  if (dtype == "BF16") return at::kBFloat16;
  refuse_dtype(file, tensor, dtype);
}

std::string_view dtype_name(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return "F32";
    case at::kHalf:
      return "F16";
    case at::kBFloat16:
      return "BF16";
    case at::kShort:
      return "I16";
    default:
      STBLLM_CHECK(false, "no name for {}", at::toString(tensor.scalar_type()));
  }
}

std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path) {
  return std::make_shared<SafetensorsSource>(path);
}

}  // namespace stbllm
