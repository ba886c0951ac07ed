#include "stbllm/calibrate/results.h"

namespace stbllm {

nlohmann::json to_json(const LinearResult& result, bool with_seconds) {
  const LinearReport& report = result.report;
  nlohmann::json json = {{"name", result.name},
                         {"nm", result.scheme.nm.str()},
                         {"levels", result.scheme.levels},
                         {"rows", result.rows},
                         {"cols", result.cols},
                         {"salient_share", result.salient_share},
                         {"output_error", report.output_error},
                         {"holdout_error", report.holdout_error},
                         {"shrink", report.shrink},
                         {"damping", report.damping},
                         {"damping_retries", report.damping_retries},
                         {"salient_count", report.salient_count},
                         {"threshold", report.threshold}};
  if (with_seconds) json["seconds"] = report.seconds;
  return json;
}

LinearResult linear_result_from_json(const nlohmann::json& json) {
  LinearResult result{
      .name = json.at("name"),
      .scheme = {.nm = NmPattern::parse(json.at("nm").get<std::string>()), .levels = json.at("levels")},
      .rows = json.at("rows"),
      .cols = json.at("cols"),
      .salient_share = json.at("salient_share"),
      .report = {}};
  LinearReport& report = result.report;
  report.output_error = json.at("output_error");
  report.holdout_error = json.at("holdout_error");
  report.shrink = json.at("shrink");
  report.damping = json.at("damping");
  report.damping_retries = json.at("damping_retries");
  report.salient_count = json.at("salient_count").get<std::vector<int>>();
  report.threshold = json.at("threshold").get<std::vector<double>>();
  report.seconds = json.value("seconds", 0.0);
  return result;
}

void to_json(nlohmann::json& json, const BlockResult& result) {
  json = {{"cosine", result.cosine}, {"relative_error", result.relative_error}};
  if (result.tune) json["tune"] = *result.tune;
}

}  // namespace stbllm
