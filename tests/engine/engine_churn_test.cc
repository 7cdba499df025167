// Many short requests of every kind leave nothing behind.
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <random>
#include <thread>

#include "tests/engine/engine_fixture.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define GLA_SANITIZED 1
#else
#define GLA_SANITIZED 0
#endif

namespace gla {
namespace {

int64_t ResidentBytes() {
  int64_t size = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// One client's next request: generated to its end, cancelled at some point, late, or on a session
// that others use and delete.
void RunOne(TestEngine& engine, std::mt19937& random) {
  RecordingSink sink;
  std::atomic<RequestId> id = 0;
  GenerateParams params = Sampled(Tokens(1 + static_cast<int>(random() % 6)), 2, random());
  const int kind = static_cast<int>(random() % 8);
  const std::string session = absl::StrCat("s", random() % 4);
  if (kind == 1) params.deadline = absl::Now() + absl::Microseconds(random() % 200);
  if (kind >= 5) params.session_id = session;
  if (kind == 2) sink.on_token = [&](int) { engine->Cancel(id); };
  if (kind == 5) engine->CreateSession(session, {}, [](auto) {});
  const auto submitted = engine->Submit(std::move(params), &sink);
  if (!submitted.ok()) return;
  id = *submitted;
  if (kind == 3 || kind == 6) engine->Cancel(*submitted);
  if (kind == 7 && random() % 4 == 0) engine->DeleteSession(session, [](auto) {});
  EXPECT_EQ(sink.Get().finishes, 1);
}

TEST(EngineChurn, LeavesSlotsAndMemoryFlat) {
  const int num_requests = GLA_SANITIZED ? 2000 : 20000;
  constexpr int kClients = 8;
  EngineSetup setup;
  setup.engine.max_num_seqs = 6;
  setup.engine.num_slots = 10;
  TestEngine engine(setup);
  std::atomic<int> left = num_requests;
  std::atomic<int64_t> resident_early = 0;
  std::vector<std::thread> clients;
  for (int client = 0; client < kClients; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(static_cast<unsigned>(client));
      for (int n; (n = left--) > 0;) {
        if (n == num_requests * 3 / 4) resident_early = ResidentBytes();
        RunOne(engine, random);
      }
    });
  }
  for (std::thread& client : clients) client.join();

  for (const SessionInfo& session : engine.List()) {
    EXPECT_FALSE(session.busy);
    EXPECT_TRUE(engine.Delete(session.id).ok());
  }
  EXPECT_TRUE(engine.IsIdle());
  double finished = 0;
  for (const char* reason : {"length", "eos", "stop", "cancelled", "deadline", "error"}) {
    finished += engine.finished(reason);
  }
  EXPECT_EQ(finished, num_requests);
  EXPECT_GT(engine.finished("cancelled"), 0);
  EXPECT_GT(engine.finished("length"), num_requests / 4);
  EXPECT_EQ(engine.metrics().numeric_guard_trips_total.Value(), 0);
  // A sanitizer keeps freed memory for a while, so there its size says nothing.
  if (!GLA_SANITIZED) {
    EXPECT_LT(ResidentBytes() - resident_early, 2 << 20);
  }
}

}  // namespace
}  // namespace gla
