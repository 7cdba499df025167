// Conversations whose state outlives a request: the table, one writer at a time, idle expiry.
//
// Owned by the engine thread; not thread-safe.
#pragma once

#include <cstdint>
#include <list>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/clock.h"
#include "engine/engine.h"
#include "engine/state_pool.h"

namespace gla {

struct Sequence;

struct Session {
  std::string id;
  int64_t position = 0;        // tokens consumed by the state
  StatePool::Slot slot;        // none while the position is 0
  Sequence* writer = nullptr;  // the request that runs or waits on it
  Instant created, last_used;
  int64_t idle_ttl_seconds = 0;  // 0: never expires
};

// The last ids of a kind, so that their fate can be told; the oldest are forgotten.
class RecentIds {
 public:
  explicit RecentIds(size_t capacity) : capacity_(capacity) {}
  void Add(const std::string& id);
  void Remove(const std::string& id);
  bool Contains(const std::string& id) const { return where_.count(id) > 0; }

 private:
  const size_t capacity_;
  std::list<std::string> ids_;  // oldest first
  std::unordered_map<std::string, std::list<std::string>::iterator> where_;
};

class SessionTable {
 public:
  SessionTable(int64_t capacity, int64_t default_ttl_seconds, int64_t state_bytes)
      : capacity_(capacity), default_ttl_seconds_(default_ttl_seconds), state_bytes_(state_bytes) {}

  // AlreadyExists; ResourceExhausted (SESSIONS_FULL) beyond the capacity.
  absl::StatusOr<Session*> Create(const std::string& id, std::optional<int64_t> ttl_seconds,
                                  Instant now);
  // NotFound: SESSION_EXPIRED as long as that is remembered, else SESSION_NOT_FOUND.
  absl::StatusOr<Session*> Find(const std::string& id);
  void Erase(Session& session);

  // From Open to Close the session is busy: it does not expire, and a second Open is Aborted
  // (SESSION_BUSY). Aborted (STALE_POSITION) when the session is not at `expected_position`.
  absl::Status Open(Session& session, std::optional<int64_t> expected_position, Sequence& writer);
  void Close(Session& session, Instant now);

  // Erases what has been idle for its time; returns how many.
  int Expire(Instant now);

  SessionInfo Describe(const Session& session, Instant now) const;
  std::vector<SessionInfo> List(Instant now) const;  // by id
  int64_t size() const { return static_cast<int64_t>(sessions_.size()); }

 private:
  using Expiry = std::pair<Instant, Session*>;
  static std::optional<Expiry> ExpiryOf(Session& session);

  const int64_t capacity_;
  const int64_t default_ttl_seconds_;
  const int64_t state_bytes_;
  std::map<std::string, Session> sessions_;
  std::set<Expiry> expiries_;  // of the sessions that are not busy, soonest first
  RecentIds expired_{4096};
};

}  // namespace gla
