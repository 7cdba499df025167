#include "engine/engine.h"

#include <utility>

#include "base/status_macros.h"
#include "engine/core.h"

namespace gla {

absl::StatusOr<std::unique_ptr<Engine>> Engine::Create(Device& device, Model& model,
                                                       const Tokenizer& tokenizer, Metrics& metrics,
                                                       const EngineOptions& options) {
  GLA_ASSIGN_OR_RETURN(auto core, Core::Create(device, model, tokenizer, metrics, options));
  return std::unique_ptr<Engine>(new Engine(std::move(core)));
}

Engine::Engine(std::unique_ptr<Core> core) : core_(std::move(core)) {}
Engine::~Engine() = default;

absl::Status Engine::SelfTest() { return core_->SelfTest(); }
void Engine::Start() { core_->Start(); }
void Engine::Stop() { core_->Stop(); }

absl::StatusOr<RequestId> Engine::Submit(GenerateParams params, TokenSink* sink) {
  return core_->Submit(std::move(params), /*is_score=*/false, sink);
}

absl::StatusOr<RequestId> Engine::Submit(ScoreParams params, TokenSink* sink) {
  GenerateParams fed;
  fed.prompt = std::move(params.tokens);
  fed.deadline = params.deadline;
  fed.request_id = std::move(params.request_id);
  return core_->Submit(std::move(fed), /*is_score=*/true, sink);
}

void Engine::Cancel(RequestId id) { core_->inbox().Cancel(id); }

void Engine::CreateSession(std::string id, std::optional<int64_t> ttl_seconds,
                           SessionCallback done) {
  core_->inbox().Post(
      [this, id = std::move(id), ttl_seconds, done = std::move(done)](const absl::Status& status) {
        done(status.ok() ? core_->CreateSession(id, ttl_seconds) : status);
      });
}

void Engine::GetSession(std::string id, SessionCallback done) {
  core_->inbox().Post(
      [this, id = std::move(id), done = std::move(done)](const absl::Status& status) {
        done(status.ok() ? core_->GetSession(id) : status);
      });
}

void Engine::DeleteSession(std::string id, std::function<void(absl::Status)> done) {
  core_->inbox().Post(
      [this, id = std::move(id), done = std::move(done)](const absl::Status& status) {
        done(status.ok() ? core_->DeleteSession(id) : status);
      });
}

void Engine::ListSessions(std::function<void(std::vector<SessionInfo>)> done) {
  core_->inbox().Post([this, done = std::move(done)](const absl::Status& status) {
    done(status.ok() ? core_->ListSessions() : std::vector<SessionInfo>());
  });
}

void Engine::Drain(std::function<void()> drained) {
  core_->inbox().StopAccepting();
  core_->inbox().Post([this, drained = std::move(drained)](const absl::Status& status) {
    if (status.ok()) {
      core_->OnDrained(drained);
    } else {
      drained();
    }
  });
}

int64_t Engine::capacity_sessions() const { return core_->capacity_sessions(); }
int64_t Engine::num_sessions() const { return core_->num_sessions(); }
double Engine::heartbeat_age_seconds() const { return core_->heartbeat_age_seconds(); }

}  // namespace gla
