#include "engine/session.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/status_payload.h"

namespace gla {

void RecentIds::Add(const std::string& id) {
  Remove(id);
  where_[id] = ids_.insert(ids_.end(), id);
  if (ids_.size() > capacity_) Remove(std::string(ids_.front()));
}

void RecentIds::Remove(const std::string& id) {
  const auto it = where_.find(id);
  if (it == where_.end()) return;
  ids_.erase(it->second);
  where_.erase(it);
}

absl::StatusOr<Session*> SessionTable::Create(const std::string& id,
                                              std::optional<int64_t> ttl_seconds, Instant now) {
  if (sessions_.count(id) > 0) {
    return WithReason(absl::AlreadyExistsError(absl::StrCat("session \"", id, "\" exists")),
                      "SESSION_EXISTS");
  }
  if (size() >= capacity_) {
    return WithRetry(WithReason(absl::ResourceExhaustedError(absl::StrCat(
                                    "no room for another session: expected at most ", capacity_)),
                                "SESSIONS_FULL"));
  }
  Session& session = sessions_[id];
  session.id = id;
  session.created = now;
  session.last_used = now;
  session.idle_ttl_seconds = std::max<int64_t>(0, ttl_seconds.value_or(default_ttl_seconds_));
  if (const auto expiry = ExpiryOf(session)) expiries_.insert(*expiry);
  expired_.Remove(id);
  return &session;
}

absl::StatusOr<Session*> SessionTable::Find(const std::string& id) {
  const auto it = sessions_.find(id);
  if (it != sessions_.end()) return &it->second;
  if (expired_.Contains(id)) {
    return WithReason(absl::NotFoundError(absl::StrCat("session \"", id, "\" has expired")),
                      "SESSION_EXPIRED");
  }
  return WithReason(absl::NotFoundError(absl::StrCat("no session \"", id, "\"")),
                    "SESSION_NOT_FOUND");
}

void SessionTable::Erase(Session& session) {
  if (const auto expiry = ExpiryOf(session)) expiries_.erase(*expiry);
  sessions_.erase(sessions_.find(session.id));
}

absl::Status SessionTable::Open(Session& session, std::optional<int64_t> expected_position,
                                Sequence& writer) {
  if (session.writer != nullptr) {
    return WithReason(absl::AbortedError(absl::StrCat("session \"", session.id,
                                                      "\" is busy: another request runs on it")),
                      "SESSION_BUSY");
  }
  if (expected_position.has_value() && *expected_position != session.position) {
    return WithReason(absl::AbortedError(absl::StrCat(
                          "session \"", session.id, "\": expected_position is ", *expected_position,
                          ", the session is at ", session.position)),
                      "STALE_POSITION");
  }
  if (const auto expiry = ExpiryOf(session)) expiries_.erase(*expiry);
  session.writer = &writer;
  return absl::OkStatus();
}

void SessionTable::Close(Session& session, Instant now) {
  session.writer = nullptr;
  session.last_used = now;
  if (const auto expiry = ExpiryOf(session)) expiries_.insert(*expiry);
}

int SessionTable::Expire(Instant now) {
  int count = 0;
  while (!expiries_.empty() && expiries_.begin()->first <= now) {
    Session& session = *expiries_.begin()->second;
    expired_.Add(session.id);
    Erase(session);
    ++count;
  }
  return count;
}

std::optional<SessionTable::Expiry> SessionTable::ExpiryOf(Session& session) {
  // A century is as good as never, and cannot overflow an Instant.
  constexpr int64_t kCentury = int64_t{100} * 365 * 24 * 3600;
  const int64_t ttl = session.idle_ttl_seconds;
  if (ttl == 0 || ttl > kCentury) return std::nullopt;
  return Expiry(session.last_used + std::chrono::seconds(ttl), &session);
}

SessionInfo SessionTable::Describe(const Session& session, Instant now) const {
  const bool busy = session.writer != nullptr;
  return {.id = session.id,
          .position = session.position,
          .state_bytes = session.slot ? state_bytes_ : 0,
          .busy = busy,
          .idle_seconds = busy ? 0 : SecondsBetween(session.last_used, now),
          .age_seconds = SecondsBetween(session.created, now),
          .idle_ttl_seconds = session.idle_ttl_seconds};
}

std::vector<SessionInfo> SessionTable::List(Instant now) const {
  std::vector<SessionInfo> all;
  all.reserve(sessions_.size());
  for (const auto& [id, session] : sessions_) all.push_back(Describe(session, now));
  return all;
}

}  // namespace gla
