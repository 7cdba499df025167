#include "service/status.h"

#include <cstdint>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/engine.h"
#include "google/rpc/status.pb.h"

namespace gla {
namespace {

constexpr char kFieldUrl[] = "gla/field";
constexpr char kDomain[] = "gla-server";
// A status travels in HTTP/2 headers, whose size is limited.
constexpr size_t kMaxMessage = 1024;
constexpr size_t kMaxShown = 64;

std::string PayloadText(const absl::Status& status, const char* url) {
  const auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : "";
}

}  // namespace

absl::Status FieldError(const std::string& field, const std::string& problem,
                        const std::string& reason) {
  absl::Status status =
      WithReason(absl::InvalidArgumentError(absl::StrCat(field, ": ", problem)), reason);
  status.SetPayload(kFieldUrl, absl::Cord(field));
  return status;
}

std::string Shown(const std::string& text) {
  const std::string escaped = absl::CHexEscape(text.substr(0, kMaxShown));
  return absl::StrCat("\"", escaped, text.size() > kMaxShown ? "...\"" : "\"");
}

std::string CodeName(absl::StatusCode code) { return absl::StatusCodeToString(code); }

std::string ReasonOf(const absl::Status& status) {
  if (status.ok()) return "";
  const std::string reason = PayloadText(status, kReasonUrl);
  return reason.empty() ? CodeName(status.code()) : reason;
}

grpc::Status ToGrpc(const absl::Status& status, grpc::CallbackServerContext* context,
                    const std::map<std::string, std::string>& metadata) {
  if (status.ok()) return grpc::Status::OK;
  const std::string message = std::string(status.message()).substr(0, kMaxMessage);
  google::rpc::Status details;
  details.set_code(static_cast<int>(status.code()));
  details.set_message(message);

  google::rpc::ErrorInfo info;
  info.set_reason(ReasonOf(status));
  info.set_domain(kDomain);
  info.mutable_metadata()->insert(metadata.begin(), metadata.end());
  details.add_details()->PackFrom(info);

  int64_t retry_ms = 0;
  if (absl::SimpleAtoi(PayloadText(status, kRetryMsUrl), &retry_ms)) {
    google::rpc::RetryInfo retry;
    retry.mutable_retry_delay()->set_seconds(retry_ms / 1000);
    retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(retry_ms % 1000 * 1000000));
    details.add_details()->PackFrom(retry);
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(retry_ms));
  }
  if (const std::string field = PayloadText(status, kFieldUrl); !field.empty()) {
    google::rpc::BadRequest bad;
    auto* violation = bad.add_field_violations();
    violation->set_field(field);
    violation->set_description(message);
    details.add_details()->PackFrom(bad);
  }
  // The two enumerations have the same values.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message,
                      details.SerializeAsString());
}

}  // namespace gla
