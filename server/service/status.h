// absl::Status -> grpc::Status, with google.rpc details, and the errors that the service itself
// makes.
#pragma once

#include <grpcpp/grpcpp.h>

#include <map>
#include <string>

#include "absl/status/status.h"

namespace gla {

// INVALID_ARGUMENT about one field of a request: "top_p: expected (0, 1], got 0". `reason` as in
// google.rpc.ErrorInfo; the field travels as google.rpc.BadRequest.
absl::Status FieldError(const std::string& field, const std::string& problem,
                        const std::string& reason = "INVALID_FIELD");

// What a client sent, for a message: escaped and cut.
std::string Shown(const std::string& text);

// The machine-readable reason: the payload's, else the code's name. Empty when ok.
std::string ReasonOf(const absl::Status& status);

// "INVALID_ARGUMENT"
std::string CodeName(absl::StatusCode code);

// The status as it goes on the wire: code, message, ErrorInfo{reason, metadata}, RetryInfo and
// BadRequest where they apply. A retry delay also becomes trailing metadata of `context`, where
// gRPC's own retries look for it. Before Finish().
grpc::Status ToGrpc(const absl::Status& status, grpc::CallbackServerContext* context,
                    const std::map<std::string, std::string>& metadata = {});

}  // namespace gla
