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

struct TeamPlace;

enum class ElementType { kFloat32, kBFloat16, kFloat16 };

/// A row-major matrix of activations, rows adjacent. They lie where the backend's device() is.
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

/// Products with the same activations.
struct ProductSet {
  std::vector<Product> products;
  ActivationView x;
};

/// Sets of products whose operands keep their places, planned once. They are computed one at a time and so
/// share the memory that they take meanwhile.
class PlannedProducts {
 public:
  virtual ~PlannedProducts() = default;
  /// Computes the products of set `index`. All threads of a team call this together, and wait for all before
  /// it and behind it: x has to be complete, and y is complete then.
  virtual void run(size_t index, const TeamPlace& team) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;
  /// "reference", "cpu-generic", "cpu-avx2", "cpu-avxvnni", "cpu-avx512", "cpu-amx", "cpu-neon" or "cuda".
  virtual std::string_view name() const = 0;
  /// Where activations live, as libtorch calls the device: "cpu" or "cuda".
  virtual std::string_view device() const { return "cpu"; }
  /// The matrix in this backend's own layout.
  virtual std::unique_ptr<PreparedMatrix> prepare(const StructuredBinaryMatrix& matrix) const = 0;
  /// The same for rows of integers, whose bytes may stay where they are (and are kept alive). Null where this
  /// backend has no product with them.
  virtual std::unique_ptr<PreparedMatrix> prepare_rows(const QuantizedRows&) const { return nullptr; }
  /// y = x W^T. x.width == cols, y.width == rows, x.tokens == y.tokens >= 1; both types may be any
  /// ElementType. `stream` is a cudaStream_t for CUDA, ignored elsewhere.
  virtual void matmul(const PreparedMatrix& matrix, const ActivationView& x, const ActivationView& y,
                      void* stream = nullptr) const = 0;
  /// The same for every product, whose matrices have equally many columns. They are computed one by one,
  /// unless a backend does better.
  virtual void matmul_all(std::span<const Product> products, const ActivationView& x,
                          void* stream = nullptr) const {
    for (const Product& product : products) matmul(*product.matrix, x, product.y, stream);
  }
  /// matmul_all() of each set inside a region of the caller's, with the same results. Null where this backend
  /// has no such thing for one of them.
  virtual std::unique_ptr<PlannedProducts> plan(std::vector<ProductSet> /*sets*/) const { return nullptr; }
};

/// The backend of that name; "auto" is the one of backend_of_environment(), else the fastest that this
/// machine can run; "cpu" is the fastest on the CPU. Throws Error(kUsage) for an unknown name and
/// Error(kUnsupported), with the reason, for a backend that cannot run here.
const Backend& find_backend(std::string_view name);
/// What the environment variable STBLLM_BACKEND puts in the place of "auto"; empty where it is unset, empty
/// or "auto".
std::string backend_of_environment();
/// Why "auto" chooses what it chooses, in one sentence.
std::string describe_auto_backend();
/// The backends that this machine can run, the reference first, then the slowest.
std::vector<std::string_view> available_backends();

}  // namespace stbllm
