// Health, reflection, readiness, drain, and the accept loop under stress.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <thread>

#include "test_server.h"

namespace gla {
namespace {

using testing::HasSubstr;

constexpr char kServing[] = "\x08\x01";
constexpr char kNotServing[] = "\x08\x02";
constexpr char kServiceUnknown[] = "\x08\x03";

// grpc.health.v1.HealthCheckRequest{service}.
std::string HealthRequest(const std::string& service) {
  return service.empty() ? "" : std::string("\x0a") + static_cast<char>(service.size()) + service;
}

std::string Check(TestServer& server, const std::string& service, grpc::Status* status) {
  const auto answers = RawCall(server.NewChannel(), "/grpc.health.v1.Health/Check",
                               HealthRequest(service), 1, status);
  return answers.empty() ? "" : answers[0];
}

int Connect(int port) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (fd >= 0) connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address));
  return fd;
}

TEST(Health, IsServingForTheServerAndBothServices) {
  TestServer server;
  grpc::Status status;
  for (const char* name : {"", "gla.v1.InferenceService", "gla.v1.SessionService"}) {
    EXPECT_EQ(Check(server, name, &status), kServing) << name;
    EXPECT_TRUE(status.ok());
  }
  EXPECT_EQ(Check(server, "nobody", &status), "");
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST(Health, WatchSeesTheLoadingAndTheDrain) {
  TestServer server({}, /*loading=*/true);
  std::vector<std::string> seen;
  std::thread watcher([&] {
    seen = RawCall(server.NewChannel(), "/grpc.health.v1.Health/Watch",
                   HealthRequest("gla.v1.InferenceService"), 3);
  });
  grpc::Status status;
  EXPECT_EQ(Check(server, "", &status), kNotServing);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  server.Load();
  EXPECT_EQ(Check(server, "", &status), kServing);
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  server.server->SetNotServing();
  watcher.join();
  EXPECT_THAT(seen, testing::ElementsAre(kNotServing, kServing, kNotServing));
  EXPECT_EQ(
      RawCall(server.NewChannel(), "/grpc.health.v1.Health/Watch", HealthRequest("nobody"), 1),
      std::vector<std::string>{kServiceUnknown});
}

TEST(Reflection, ListsTheServices) {
  TestServer server({}, /*loading=*/true);
  // ServerReflectionRequest{list_services: "*"}
  const auto answers =
      RawCall(server.channel, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
              "\x3a\x01*", 1);
  ASSERT_EQ(answers.size(), 1u);
  EXPECT_THAT(answers[0], HasSubstr("gla.v1.InferenceService"));
  EXPECT_THAT(answers[0], HasSubstr("gla.v1.SessionService"));
  EXPECT_THAT(answers[0], HasSubstr("grpc.health.v1.Health"));
}

TEST(Loading, CallsAreUnavailableWithAReason) {
  TestServer server({}, /*loading=*/true);
  EXPECT_EQ(server.loaded.NotReady(), "loading");
  EXPECT_EQ(server.loaded.NotLive(), "");
  const Answer answer = Generate(server, Greedy({1}, 1));
  EXPECT_EQ(answer.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonIn(answer.status), "LOADING");
  grpc::ClientContext first, second, third;
  v1::GetModelInfoResponse info;
  EXPECT_EQ(server.inference->GetModelInfo(&first, {}, &info).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  v1::Session session;
  EXPECT_EQ(server.sessions->CreateSession(&second, {}, &session).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(server.inference->Converse(&third)->Finish().error_code(),
            grpc::StatusCode::UNAVAILABLE);
  server.Load();
  EXPECT_EQ(server.loaded.NotReady(), "");
  EXPECT_EQ(server.loaded.NotLive(), "");
  EXPECT_TRUE(Generate(server, Greedy({1}, 1)).status.ok());
}

TEST(Drain, RunningWorkFinishesAndNewWorkIsUnavailable) {
  TestServer server;
  grpc::ClientContext context;
  const auto running = server.inference->Generate(&context, Greedy({1}, 500));
  v1::GenerateResponse message;
  ASSERT_TRUE(running->Read(&message));
  int tokens = message.token_ids_size();
  std::atomic<bool> drained = false;
  server.loaded.engine().Drain([&] { drained = true; });
  server.server->Drain();
  const Answer refused = Generate(server, Greedy({1}, 1));
  EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonIn(refused.status), "DRAINING");
  while (running->Read(&message)) tokens += message.token_ids_size();
  EXPECT_TRUE(running->Finish().ok());
  EXPECT_EQ(tokens, 500);
  EXPECT_TRUE(WaitFor([&] { return drained.load(); }));
}

TEST(Drain, AnIdleConversationEnds) {
  TestServer server;
  grpc::ClientContext context;
  const auto stream = server.inference->Converse(&context);
  v1::ConverseRequest request;
  request.mutable_open();
  stream->Write(request);
  v1::ConverseResponse response;
  ASSERT_TRUE(stream->Read(&response));
  server.server->Drain();
  EXPECT_FALSE(stream->Read(&response));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ReasonIn(status), "DRAINING");
}

TEST(Drain, StopEndsStreamsWhoseReaderDoesNotRead) {
  auto server = std::make_unique<TestServer>();
  grpc::ChannelArguments small;
  small.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1);
  small.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  small.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const auto stub = v1::InferenceService::NewStub(
      grpc::CreateCustomChannel(server->target(), grpc::InsecureChannelCredentials(), small));
  v1::GenerateRequest request = Greedy({1}, 300);
  request.set_logprobs(20);
  grpc::ClientContext context;
  const auto reader = stub->Generate(&context, request);
  ASSERT_TRUE(WaitFor(
      [&] {
        return server->Metric("gla_requests_running") == 0 &&
               server->Metric("gla_generated_tokens_total") == 300;
      },
      60));
  EXPECT_EQ(server->server->num_calls(), 1);
  const auto began = std::chrono::steady_clock::now();
  server.reset();
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(5));
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
  }
  EXPECT_FALSE(reader->Finish().ok());
}

TEST(Drain, StopEndsRunningStreamsAsUnavailable) {
  TestServer server;
  grpc::ClientContext context;
  const auto running = server.inference->Generate(&context, Greedy({1}, 8192));
  v1::GenerateResponse message;
  ASSERT_TRUE(running->Read(&message));
  server.loaded.engine().Stop();
  while (running->Read(&message)) {
  }
  EXPECT_EQ(running->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(Listener, ATakenPortIsAnErrorThatNamesIt) {
  TestServer server({}, /*loading=*/true);
  const auto second =
      Server::Start(*server.service, {.host = "127.0.0.1", .port = server.server->port()});
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("127.0.0.1:" + std::to_string(server.server->port())));
}

TEST(Listener, ServesIpv6) {
  TestServer server({"--host=::1"}, /*loading=*/true);
  const auto channel = grpc::CreateChannel(HostPort("::1", server.server->port()),
                                           grpc::InsecureChannelCredentials());
  grpc::ClientContext context;
  v1::GetModelInfoResponse info;
  const grpc::Status status =
      v1::InferenceService::NewStub(channel)->GetModelInfo(&context, {}, &info);
  EXPECT_EQ(ReasonIn(status), "LOADING");
}

TEST(Listener, ConnectionsBeyondTheLimitAreClosedAndCounted) {
  TestServer server({"--max-connections=3"}, /*loading=*/true);
  std::vector<int> fds;
  for (int i = 0; i < 3; ++i) fds.push_back(Connect(server.server->port()));
  ASSERT_TRUE(WaitFor([&] { return server.server->CountConnections() == 3; }));
  const int fourth = Connect(server.server->port());
  char byte = 0;
  EXPECT_EQ(recv(fourth, &byte, 1, 0), 0);  // closed at once
  EXPECT_EQ(server.Metric("gla_rejections_total{reason=\"connections\"}"), 1);
  close(fourth);
  for (const int fd : fds) close(fd);
  EXPECT_TRUE(WaitFor([&] { return server.server->CountConnections() == 0; }));
  EXPECT_EQ(ReasonIn(Generate(server, Greedy({1}, 1)).status), "LOADING");
}

TEST(Listener, AcceptsAgainAfterDescriptorsRanOut) {
  TestServer server({}, /*loading=*/true);
  EXPECT_EQ(ReasonIn(Generate(server, Greedy({1}, 1)).status), "LOADING");
  // Sockets made before the limit falls; the server then has none left to accept them with.
  std::vector<int> idle;
  for (int i = 0; i < 40; ++i) idle.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit tight = before;
  tight.rlim_cur = static_cast<rlim_t>(idle.back()) + 4;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &tight), 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(server.server->port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (const int fd : idle) connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address));
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(server.server->CountConnections(), 40);
  for (const int fd : idle) close(fd);
  EXPECT_TRUE(WaitFor([&] { return server.server->CountConnections() <= 1; }, 5));
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  grpc::ClientContext context;
  context.set_wait_for_ready(true);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::GetModelInfoResponse info;
  const grpc::Status status =
      v1::InferenceService::NewStub(server.NewChannel())->GetModelInfo(&context, {}, &info);
  EXPECT_EQ(ReasonIn(status), "LOADING");
}

}  // namespace
}  // namespace gla
