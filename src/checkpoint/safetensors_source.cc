#include <ATen/ATen.h>

#include <map>
#include <string>
#include <vector>

#include "mapped_tensor.h"
#include "stbllm/base/error.h"
#include "stbllm/base/safetensors.h"
#include "stbllm/checkpoint/sources.h"

namespace stbllm {
namespace {

const std::map<std::string, at::ScalarType> kDtypes = {
    {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16}};

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
    const auto dtype = kDtypes.find(entry.dtype);
    if (dtype == kDtypes.end()) refuse_dtype(path(), name, entry.dtype);
    return mapped_tensor(file_, entry.data, entry.shape, c10::contiguous_strides(entry.shape), dtype->second);
  }

  void release(const std::string& name) const override {
    file_->file()->release(file_->tensors().at(name).data);
  }

 private:
  std::shared_ptr<const SafetensorsFile> file_;
};

}  // namespace

std::shared_ptr<const TensorSource> open_safetensors(const std::filesystem::path& path) {
  return std::make_shared<SafetensorsSource>(path);
}

}  // namespace stbllm
