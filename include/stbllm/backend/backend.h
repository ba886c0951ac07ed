#pragma once
// A backend multiplies activations with packed matrices: y (tokens, rows) = x (tokens, cols) W^T.
// Backends know the packed format and nothing of torch; the on-disk planes are repacked once by prepare().

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "stbllm/pack/quantized_rows.h"
#include "stbllm/pack/structured_binary_matrix.h"

namespace stbllm {

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

/// A row-major matrix of activations, rows adjacent. Host memory for CPU backends, device memory for CUDA.
struct ActivationView {
  void* data = nullptr;
  ElementType type = ElementType::kFloat32;
  int64_t tokens = 0;
  int64_t width = 0;  ///< elements per token
};

/// A matrix in a backend's own layout. Owns its memory and is independent of the file it came from; rows of
/// integers keep the file mapped.
class PreparedMatrix {
 public:
  virtual ~PreparedMatrix() = default;
  virtual int64_t bytes() const = 0;  ///< memory held, in host or device bytes
};

/// One of several products with the same activations.
struct Product {
  const PreparedMatrix* matrix = nullptr;
  ActivationView y;
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name()
      const = 0;  ///< "reference", "cpu-generic", "cpu-avx2", "cpu-avx512", "cuda"
  virtual bool on_cuda() const { return false; }  ///< activations live in CUDA memory
  virtual std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const = 0;
  /// The same for rows of integers, whose bytes may stay where they are (and are kept alive). Null: this
  /// backend has no product with them.
  virtual std::unique_ptr<PreparedMatrix> prepare_rows(const QuantizedRows&) const { return nullptr; }
  /// y = x W^T. x.width == cols, y.width == rows, x.tokens == y.tokens >= 1; both types may be any
  /// ElementType. `stream` is a cudaStream_t for CUDA, ignored elsewhere.
  virtual void matmul(const PreparedMatrix& matrix, const ActivationView& x, const ActivationView& y,
                      void* stream = nullptr) const = 0;
  /// The same for every product, whose matrices have equally many columns. One by one, unless a backend does
  /// better.
  virtual void matmul_all(std::span<const Product> products, const ActivationView& x,
                          void* stream = nullptr) const {
    for (const Product& product : products) matmul(*product.matrix, x, product.y, stream);
  }
};

/// The backend of that name; "auto" is the fastest this machine can run, "cpu" the fastest on the CPU.
/// Environment variable STBLLM_BACKEND overrides "auto". Never null: throws Error(kUsage) for an unknown name
/// and Error(kUnsupported), with the reason, for one that cannot run here.
const Backend& find_backend(std::string_view name);
/// Why "auto" chose what it chose, in one sentence.
std::string describe_auto_backend();
/// Names that find_backend accepts on this machine, the reference first.
std::vector<std::string_view> available_backends();

}  // namespace stbllm
