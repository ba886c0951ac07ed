#include "stbllm/pack/ledger.h"

#include <algorithm>
#include <numeric>
#include <string_view>

namespace stbllm {
namespace {

/// Whether a tensor belongs to a decoder block: a part of its name, between points, is the block's number.
bool is_in_a_block(std::string_view name) {
  for (size_t begin = 0, end; (end = name.find('.', begin)) != std::string_view::npos; begin = end + 1) {
    const std::string_view part = name.substr(begin, end - begin);
    if (!part.empty() && std::ranges::all_of(part, [](char c) { return c >= '0' && c <= '9'; })) return true;
  }
  return false;
}

}  // namespace

Ledger make_ledger(const PackedReader& reader) {
  Ledger ledger;
  std::map<std::string, nlohmann::json> results;
  if (const nlohmann::json recorded = reader.remark("results"); recorded.is_array())
    for (const auto& result : recorded)
      if (result.is_object() && result.contains("name") && result["name"].is_string())
        results[result["name"]] = result;
  double nominal = 0, density = 0;
  for (const auto& [name, matrix] : reader.linears()) {
    const Layout& layout = matrix.layout();
    LinearEntry entry{name, layout, matrix.bytes(), matrix.stored_bits()};
    const double weights = static_cast<double>(layout.rows) * static_cast<double>(layout.cols);
    entry.nominal_bits =
        layout.nm.density() * (1 + static_cast<double>(layout.salient) / static_cast<double>(layout.cols));
    if (const auto found = results.find(name); found != results.end()) {
      const auto number = [&](const char* key) {
        return found->second.contains(key) && found->second[key].is_number()
                   ? found->second[key].get<double>()
                   : -1.0;
      };
      entry.output_error = number("output_error");
      entry.holdout_error = number("holdout_error");
    }
    for (int p = 0; p < kPlaneCount; ++p) {
      const auto plane = static_cast<Plane>(p);
      if (const int64_t bytes = plane_bytes(layout, plane); bytes > 0)
        ledger.plane_bytes[std::string(plane_name(plane))] += bytes;
    }
    nominal += weights * entry.nominal_bits;
    density += weights * layout.nm.density();
    ledger.linear_weights += layout.rows * layout.cols;
    ledger.linear_bytes += entry.bytes;
    ledger.linears.push_back(std::move(entry));
  }
  ledger.parameters = ledger.linear_weights;
  for (const auto& [name, entry] : reader.dense_tensors()) {
    ledger.dense_bytes += std::ssize(entry.data);
    if (entry.shape.size() == 2 && is_in_a_block(name))
      ledger.kept_linears.push_back({name, entry.shape[0], entry.shape[1], std::ssize(entry.data)});
    ledger.parameters +=
        std::accumulate(entry.shape.begin(), entry.shape.end(), int64_t{1}, std::multiplies<>());
  }
  for (const auto& [name, rows] : reader.quantized_rows()) {
    ledger.dense_bytes += rows.bytes();
    ledger.parameters += rows.layout().rows * rows.layout().cols;
  }
  ledger.file_bytes = reader.file_bytes();
  if (ledger.linear_weights > 0) {
    const double weights = static_cast<double>(ledger.linear_weights);
    ledger.nominal_bits = nominal / weights;
    ledger.density = density / weights;
    ledger.stored_bits = 8.0 * static_cast<double>(ledger.linear_bytes) / weights;
  }
  ledger.file_bits = 8.0 * static_cast<double>(ledger.file_bytes) / static_cast<double>(ledger.parameters);
  return ledger;
}

nlohmann::json to_json(const Ledger& ledger) {
  nlohmann::json linears = nlohmann::json::array();
  for (const LinearEntry& entry : ledger.linears)
    linears.push_back({{"name", entry.name},
                       {"rows", entry.layout.rows},
                       {"cols", entry.layout.cols},
                       {"nm", entry.layout.nm.str()},
                       {"levels", entry.layout.levels},
                       {"scale_bits", entry.layout.scale_bits},
                       {"salient", entry.layout.salient},
                       {"outliers", entry.layout.outliers},
                       {"bytes", entry.bytes},
                       {"stored_bits", entry.stored_bits},
                       {"nominal_bits", entry.nominal_bits},
                       {"output_error", entry.output_error},
                       {"holdout_error", entry.holdout_error}});
  nlohmann::json kept = nlohmann::json::array();
  for (const KeptLinear& linear : ledger.kept_linears)
    kept.push_back(
        {{"name", linear.name}, {"rows", linear.rows}, {"cols", linear.cols}, {"bytes", linear.bytes}});
  return {{"nominal_bits", ledger.nominal_bits},
          {"stored_bits", ledger.stored_bits},
          {"file_bits", ledger.file_bits},
          {"density", ledger.density},
          {"file_bytes", ledger.file_bytes},
          {"linear_bytes", ledger.linear_bytes},
          {"dense_bytes", ledger.dense_bytes},
          {"linear_weights", ledger.linear_weights},
          {"parameters", ledger.parameters},
          {"plane_bytes", ledger.plane_bytes},
          {"linears", linears},
          {"kept_linears", kept}};
}

}  // namespace stbllm
