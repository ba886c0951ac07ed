#pragma once
// The pickle inside pytorch_model.bin: a dictionary of tensors, each described by storage, offset, shape and
// strides. A pickle is a program. Only the few operations that torch.save writes for a state_dict are
// understood here, and only the functions and types that pickle.cc lists may be named. Nothing is ever
// executed.

#include <c10/core/ScalarType.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace stbllm {

/// One tensor. Its element (index_0, index_1, ...) is element `offset + sum_i index_i * strides_i` of a
/// storage, which several tensors may share.
struct PickledTensor {
  at::ScalarType dtype;
  std::string storage;    ///< key of the record that holds the storage
  int64_t storage_numel;  ///< elements of the storage
  int64_t offset;
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;  ///< in elements; none is negative
};

/// The tensors of a pickled state_dict by name; all their elements lie within their storage. Values that are
/// no tensors are left out. `file` is for messages. Throws Error(kUnsupported) naming a global or an
/// operation that is not on the list, Error(kCorrupt).
std::map<std::string, PickledTensor> read_state_dict(std::span<const std::byte> pickle,
                                                     const std::string& file);

}  // namespace stbllm
