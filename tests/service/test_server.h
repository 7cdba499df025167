// A whole server in this process, over real sockets, with bard-6m on the CPU backend.
#pragma once

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <vector>

#include "gla/v1/inference.grpc.pb.h"
#include "gla/v1/session.grpc.pb.h"
#include "google/rpc/status.pb.h"
#include "parts.h"
#include "service/server.h"

namespace gla {

class TestServer {
 public:
  // Flags as on the command line, beside --model and ports. With `loading` the model is not loaded
  // before Load() is called.
  explicit TestServer(std::vector<std::string> flags = {}, bool loading = false);
  ~TestServer();

  void Load();

  std::string target() const { return "127.0.0.1:" + std::to_string(server->port()); }
  // A connection of its own.
  std::shared_ptr<grpc::Channel> NewChannel() const;
  double Metric(const std::string& series);  // "gla_requests_running"; -1 when there is none

  Logger log;
  Config config;
  Ground ground;
  std::unique_ptr<Metrics> metrics;
  std::unique_ptr<ServiceContext> service;
  Loaded loaded;
  std::unique_ptr<Server> server;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::InferenceService::Stub> inference;
  std::unique_ptr<v1::SessionService::Stub> sessions;
};

// All messages of one Generate call.
struct Answer {
  std::vector<int> token_ids;
  std::string text;
  int num_messages = 0;
  std::vector<v1::TokenLogprobs> logprobs;
  v1::Finish finish;
  bool finished = false;
  grpc::Status status;
};
Answer Generate(TestServer& server, const v1::GenerateRequest& request,
                double timeout_seconds = 60);
// Greedy, from these ids.
v1::GenerateRequest Greedy(const std::vector<int>& ids, int max_new_tokens);

// google.rpc details of a status; the default when there is none of that type.
template <typename Detail>
Detail DetailOf(const grpc::Status& status) {
  google::rpc::Status all;
  all.ParseFromString(status.error_details());
  Detail detail;
  for (const auto& any : all.details()) {
    if (any.Is<Detail>()) any.UnpackTo(&detail);
  }
  return detail;
}
std::string ReasonIn(const grpc::Status& status);

// Sends `request` as it is to `method` and returns up to `max_messages` raw answers: for services
// whose stubs are not installed.
std::vector<std::string> RawCall(const std::shared_ptr<grpc::Channel>& channel,
                                 const std::string& method, const std::string& request,
                                 int max_messages, grpc::Status* status = nullptr);

// Until `condition` holds; false after `seconds`.
bool WaitFor(const std::function<bool()>& condition, double seconds = 60);

}  // namespace gla
