// Many short streams: memory, descriptors and threads stay flat.
//
// GLA_CHURN_STREAMS sets how many (default 20,000; a tenth of that under a sanitizer).
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <thread>

#include "test_server.h"

namespace gla {
namespace {

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
#else
constexpr bool kSanitized = false;
#endif
constexpr int kClients = 8;
constexpr int kTokens = 3;

int NumStreams() {
  if (const char* text = std::getenv("GLA_CHURN_STREAMS")) return std::atoi(text);
  return kSanitized ? 2'000 : 20'000;
}

// Streams of kTokens tokens; one in eight is cancelled after its first message.
void Churn(TestServer& server, int num_streams) {
  std::atomic<int> left = num_streams;
  std::atomic<int> bad = 0;
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&] {
      int i = 0;
      while ((i = left.fetch_sub(1)) > 0) {
        grpc::ClientContext context;
        const auto reader = server.inference->Generate(&context, Greedy({1 + i % 2000}, kTokens));
        v1::GenerateResponse message;
        int tokens = 0;
        const bool cancels = i % 8 == 0;
        while (reader->Read(&message)) {
          tokens += message.token_ids_size();
          if (cancels) context.TryCancel();
        }
        const grpc::Status status = reader->Finish();
        const bool good = cancels ? status.ok() || status.error_code() == grpc::CANCELLED
                                  : status.ok() && tokens == kTokens;
        if (!good) ++bad;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(bad, 0);
  EXPECT_TRUE(WaitFor([&] { return server.server->num_calls() == 0; }));
  EXPECT_TRUE(WaitFor([&] { return server.Metric("gla_requests_running") == 0; }));
}

TEST(Churn, ShortStreamsLeaveNothingBehind) {
  TestServer server;
  const int num_streams = NumStreams();
  Churn(server, num_streams / 5);
  const double memory = server.Metric("process_resident_memory_bytes");
  const double descriptors = server.Metric("process_open_fds");
  const double threads = server.Metric("process_threads");
  Churn(server, num_streams - num_streams / 5);
  // gRPC's pollers come and go.
  EXPECT_LE(server.Metric("process_open_fds"), descriptors + 2);
  EXPECT_LE(server.Metric("process_threads"), threads + 4);
  const double growth = server.Metric("process_resident_memory_bytes") - memory;
  std::printf("streams %d, growth of memory %.2f MiB, descriptors %g -> %g, threads %g -> %g\n",
              num_streams, growth / 0x1p20, descriptors, server.Metric("process_open_fds"), threads,
              server.Metric("process_threads"));
  if (!kSanitized) {  // a sanitizer keeps what is freed
    EXPECT_LE(growth, 2 * 0x1p20);
  }
  EXPECT_EQ(server.Metric("gla_state_slots{state=\"used\"}"), 0);
  EXPECT_EQ(server.service->calls.size(), 0);
}

}  // namespace
}  // namespace gla
