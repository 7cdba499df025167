// Wire messages <-> engine types. Every field that a client can set is checked here, once; an error
// is INVALID_ARGUMENT and names the field, what was expected and what came.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "gla/v1/inference.pb.h"
#include "gla/v1/session.pb.h"
#include "service/context.h"

namespace gla {

inline constexpr size_t kMaxTextBytes = 1 << 20;
inline constexpr int kDefaultMaxNewTokens = 256;

// NotFound unless `model` is empty or the served name.
absl::Status CheckModel(const std::string& model, const Serving& serving);
// 1 .. 128 characters of [A-Za-z0-9._-].
absl::Status CheckSessionId(const std::string& id);

// All of the request but the deadline. An absent seed is drawn, an empty request id made.
absl::StatusOr<GenerateParams> ToParams(const v1::GenerateRequest& request, const Serving& serving,
                                        RandomSource& random);
absl::StatusOr<ScoreParams> ToParams(const v1::ScoreRequest& request, const Serving& serving);
// The turn as the request that it stands for.
v1::GenerateRequest ToRequest(v1::ConverseTurn&& turn, const v1::ConverseOpen& open,
                              const std::string& session_id);

// Adds one token to a message under construction.
void Append(const TokenEvent& event, v1::GenerateResponse* message);
// Makes `message` the last one.
void SetFinish(const FinishEvent& event, v1::GenerateResponse* message);
v1::Timings ToProto(const RequestTimings& timings);
v1::Session ToProto(const SessionInfo& info);

}  // namespace gla
