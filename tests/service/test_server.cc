#include "test_server.h"

#include <fcntl.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cstdlib>
#include <thread>

namespace gla {
namespace {

Logger& LibraryLog() {
  static Logger log(LogFormat::kText, open("/dev/null", O_WRONLY | O_CLOEXEC));
  return log;
}

void Require(const absl::Status& status) {
  if (status.ok()) return;
  ADD_FAILURE() << status;
  std::abort();
}

}  // namespace

TestServer::TestServer(std::vector<std::string> flags, bool loading)
    : log(LogFormat::kText,
          std::getenv("GLA_TEST_LOG") != nullptr ? 2 : open("/dev/null", O_WRONLY | O_CLOEXEC)) {
  RouteLibraryLogs(LibraryLog());
  flags.insert(flags.begin(), {"--model", GLA_SOURCE_DIR "/deploy/models/bard-6m", "--host",
                               "127.0.0.1", "--port=0", "--http-port=0", "--threads=1",
                               "--max-num-seqs=16", "--state-memory=64MiB"});
  absl::StatusOr<Config> parsed = ParseConfig(flags, [](const std::string&) { return nullptr; });
  Require(parsed.status());
  config = *std::move(parsed);
  absl::StatusOr<Ground> opened = OpenGround(config);
  Require(opened.status());
  ground = *std::move(opened);
  metrics = std::make_unique<Metrics>(ground.facts);
  service = std::make_unique<ServiceContext>(*metrics, log, config.seed);
  absl::StatusOr<std::unique_ptr<Server>> started = Server::Start(
      *service,
      {.host = config.host, .port = config.port, .max_connections = config.max_connections});
  Require(started.status());
  server = *std::move(started);
  channel = NewChannel();
  inference = v1::InferenceService::NewStub(channel);
  sessions = v1::SessionService::NewStub(channel);
  if (!loading) Load();
}

TestServer::~TestServer() {
  if (service->serving.load() != nullptr) loaded.engine().Stop();
  server->Stop(absl::Seconds(1));
}

void TestServer::Load() {
  Require(loaded.Load(config, ground, *metrics, log));
  loaded.SetState(ServingState::kReady);
  server->SetServing(loaded.serving());
}

std::shared_ptr<grpc::Channel> TestServer::NewChannel() const {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(target(), grpc::InsecureChannelCredentials(), arguments);
}

double TestServer::Metric(const std::string& series) {
  const std::string text = metrics->Render();
  const size_t at = text.find("\n" + series + " ");
  return at == std::string::npos ? -1 : std::atof(text.c_str() + at + series.size() + 2);
}

Answer Generate(TestServer& server, const v1::GenerateRequest& request, double timeout_seconds) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(static_cast<int64_t>(timeout_seconds * 1000)));
  const auto reader = server.inference->Generate(&context, request);
  Answer answer;
  v1::GenerateResponse message;
  while (reader->Read(&message)) {
    EXPECT_FALSE(answer.finished) << "a message after the finish";
    ++answer.num_messages;
    answer.token_ids.insert(answer.token_ids.end(), message.token_ids().begin(),
                            message.token_ids().end());
    answer.text += message.text();
    answer.logprobs.insert(answer.logprobs.end(), message.logprobs().begin(),
                           message.logprobs().end());
    answer.finished = message.has_finish();
    if (answer.finished) answer.finish = message.finish();
  }
  answer.status = reader->Finish();
  return answer;
}

v1::GenerateRequest Greedy(const std::vector<int>& ids, int max_new_tokens) {
  v1::GenerateRequest request;
  request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  request.set_max_new_tokens(max_new_tokens);
  request.mutable_sampling()->set_temperature(0);
  request.set_ignore_eos(true);
  return request;
}

std::string ReasonIn(const grpc::Status& status) {
  return DetailOf<google::rpc::ErrorInfo>(status).reason();
}

std::vector<std::string> RawCall(const std::shared_ptr<grpc::Channel>& channel,
                                 const std::string& method, const std::string& request,
                                 int max_messages, grpc::Status* status) {
  grpc::GenericStub stub(channel);
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  const auto done = [&queue] {
    void* tag = nullptr;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto stream = stub.PrepareCall(&context, method, &queue);
  stream->StartCall(nullptr);
  std::vector<std::string> answers;
  const grpc::Slice slice(request);
  bool ok = done();
  if (ok) {
    stream->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    ok = done();
  }
  while (ok && static_cast<int>(answers.size()) < max_messages) {
    grpc::ByteBuffer buffer;
    stream->Read(&buffer, nullptr);
    ok = done();
    grpc::Slice whole;
    if (ok && buffer.DumpToSingleSlice(&whole).ok()) {
      answers.emplace_back(reinterpret_cast<const char*>(whole.begin()), whole.size());
    }
  }
  if (status == nullptr) context.TryCancel();
  grpc::Status end;
  stream->Finish(&end, nullptr);
  done();
  if (status != nullptr) *status = end;
  queue.Shutdown();
  done();
  return answers;
}

bool WaitFor(const std::function<bool()>& condition, double seconds) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (!condition()) {
    if (std::chrono::steady_clock::now() > until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

}  // namespace gla
