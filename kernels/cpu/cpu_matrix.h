#pragma once
// prepare(): from the planes of the file to the layout of the CPU kernels.

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "kernels.h"
#include "stbllm/backend/backend.h"

namespace stbllm::cpu {

/// Aligns vectors to whole 512-bit registers, and large ones to huge pages: hardware prefetching stops at
/// page borders.
template <typename T>
struct AlignedAllocator {
  using value_type = T;
  AlignedAllocator() = default;
  template <typename U>
  AlignedAllocator(const AlignedAllocator<U>&) {}

  static constexpr size_t kHugePage = size_t{2} << 20;
  static std::align_val_t alignment(size_t bytes) {
    return std::align_val_t{bytes < 2 * kHugePage ? 64 : kHugePage};
  }

  T* allocate(size_t n) {
    void* memory = ::operator new(n * sizeof(T), alignment(n * sizeof(T)));
    if (n * sizeof(T) >= 2 * kHugePage) madvise(memory, n * sizeof(T), MADV_HUGEPAGE);
    return static_cast<T*>(memory);
  }
  void deallocate(T* memory, size_t n) { ::operator delete(memory, alignment(n * sizeof(T))); }
  template <typename U>
  bool operator==(const AlignedAllocator<U>&) const {
    return true;
  }
};
template <typename T>
using AlignedVector = std::vector<T, AlignedAllocator<T>>;

class CpuMatrix : public PreparedMatrix {
 public:
  /// Chooses the form of the codes: a lookup form where `kernels` has lookups for it and the scales allow it.
  CpuMatrix(const StructuredBinaryMatrix& matrix, const Kernels& kernels);
  /// The integers stay where they are.
  CpuMatrix(QuantizedRows rows, const Kernels& kernels);

  int64_t bytes() const override;
  const MatrixView& view() const { return view_; }
  const Kernels& kernels() const { return kernels_; }

 private:
  void prepare_plane(const StructuredBinaryMatrix& matrix);
  void prepare_lookups(const StructuredBinaryMatrix& matrix);
  void make_terms();
  void make_value_tables();
  template <typename Value>
  AlignedVector<uint8_t> make_unit_tables(int sums, const Value& value_of_level) const;
  void store_codes(const StructuredBinaryMatrix& matrix);
  void prepare_scales(const StructuredBinaryMatrix& matrix);
  void prepare_columns(const StructuredBinaryMatrix& matrix);
  void prepare_salient_symbols(const StructuredBinaryMatrix& matrix);

  const Kernels& kernels_;
  MatrixView view_{};
  QuantizedRows rows_;   // kRows
  bool digits_ = false;  // words that hold symbols in place of stored codes
  AlignedVector<uint8_t> codes_, expand_, unit_tables_, integer_tables_, bfloat16_tables_, half_base_,
      scale_codes_, salient_signs_, salient_kept_, salient_first_signs_;
  AlignedVector<uint64_t> magnitudes_;
  AlignedVector<int16_t> terms_;
  AlignedVector<uint16_t> half_scales_, outlier_values_;
  AlignedVector<float> row_scales_;
  AlignedVector<int32_t> salient_columns_, outlier_columns_;
};

}  // namespace stbllm::cpu
