#include "telemetry/metrics.h"

#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <set>
#include <sstream>
#include <vector>

#include "telemetry/http.h"

namespace gla {
namespace {

using testing::HasSubstr;

StaticFacts Facts() {
  return {
      .version = "1", .backend = "cpu", .device = "d", .model = "m", .family = "gla", .dtype = "f"};
}

// Names of the metrics, without _bucket, _sum and _count.
std::set<std::string> Names(const std::string& text) {
  std::set<std::string> names;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.rfind("# TYPE ", 0) == 0) names.insert(line.substr(7, line.find(' ', 7) - 7));
  }
  return names;
}

TEST(Metrics, EveryNameOfTheContractExistsFromTheStart) {
  Metrics metrics(Facts());
  const std::set<std::string> names = Names(metrics.Render());
  for (const char* name : {"gla_requests_total",
                           "gla_requests_running",
                           "gla_requests_queued",
                           "gla_rejections_total",
                           "gla_request_duration_seconds",
                           "gla_queue_time_seconds",
                           "gla_prefill_time_seconds",
                           "gla_decode_time_seconds",
                           "gla_time_to_first_token_seconds",
                           "gla_inter_token_latency_seconds",
                           "gla_finished_total",
                           "gla_prompt_tokens_total",
                           "gla_generated_tokens_total",
                           "gla_restored_tokens_total",
                           "gla_step_duration_seconds",
                           "gla_step_batch_size",
                           "gla_step_tokens",
                           "gla_state_slots",
                           "gla_state_bytes_per_session",
                           "gla_sessions",
                           "gla_sessions_created_total",
                           "gla_sessions_ended_total",
                           "gla_numeric_guard_trips_total",
                           "gla_build_info",
                           "gla_uptime_seconds",
                           "gla_device_memory_total_bytes",
                           "gla_device_memory_used_bytes",
                           "process_start_time_seconds",
                           "process_resident_memory_bytes",
                           "process_open_fds"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST(Metrics, EverySeriesIsThereAtZero) {
  Metrics metrics(Facts());
  const std::string text = metrics.Render();
  for (const char* line :
       {"gla_requests_total{code=\"OK\",method=\"Generate\"} 0\n",
        "gla_requests_total{code=\"RESOURCE_EXHAUSTED\",method=\"Converse\"} 0\n",
        "gla_rejections_total{reason=\"queue_full\"} 0\n", "gla_finished_total{reason=\"eos\"} 0\n",
        "gla_state_slots{state=\"pinned\"} 0\n", "gla_sessions{tier=\"device\"} 0\n",
        "gla_step_duration_seconds_count{kind=\"mixed\"} 0\n",
        "gla_time_to_first_token_seconds_bucket{le=\"0.0005\"} 0\n"}) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(Metrics, UnknownMethodsAndCodesAddNoSeries) {
  Metrics metrics(Facts());
  const auto lines = [&] {
    const std::string text = metrics.Render();
    return std::count(text.begin(), text.end(), '\n');
  };
  const auto before = lines();
  metrics.CountRequest("Generate", "OK", 0.5);
  metrics.CountRequest("../../etc", "OK", 0.5);
  metrics.CountRequest("Score", "SEVENTEEN", 0.5);
  EXPECT_EQ(lines(), before);
  const std::string text = metrics.Render();
  EXPECT_THAT(text, HasSubstr("gla_requests_total{code=\"OK\",method=\"Generate\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("gla_requests_total{code=\"OK\",method=\"other\"} 1\n"));
  EXPECT_THAT(text, HasSubstr("gla_requests_total{code=\"UNKNOWN\",method=\"Score\"} 1\n"));
}

// The whole answer to a raw request; the connection ends with it.
std::string Ask(int port, const std::string& request) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  std::string answer;
  if (connect(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) {
    EXPECT_EQ(send(fd, request.data(), request.size(), MSG_NOSIGNAL),
              static_cast<ssize_t>(request.size()));
    char buffer[4096];
    for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
      answer.append(buffer, static_cast<size_t>(n));
    }
  }
  close(fd);
  return answer;
}

std::string Get(int port, const std::string& path) {
  return Ask(port, "GET " + path + " HTTP/1.1\r\nHost: x\r\n\r\n");
}

TEST(Http, PagesAnswerByTheirState) {
  std::string not_ready = "loading";
  const auto http = *HttpServer::Start("127.0.0.1", 0,
                                       {.metrics = [] { return "a_metric 1\n"; },
                                        .not_live = [] { return ""; },
                                        .not_ready = [&] { return not_ready; }});
  EXPECT_THAT(Get(http->port(), "/metrics"), HasSubstr("a_metric 1\n"));
  EXPECT_THAT(Get(http->port(), "/metrics"), HasSubstr("version=0.0.4"));
  EXPECT_THAT(Get(http->port(), "/livez"), HasSubstr("200"));
  EXPECT_THAT(Get(http->port(), "/readyz"), testing::AllOf(HasSubstr("503"), HasSubstr("loading")));
  not_ready = "";
  EXPECT_THAT(Get(http->port(), "/readyz"), HasSubstr("200"));
  EXPECT_THAT(Get(http->port(), "/other"), HasSubstr("404"));
  EXPECT_THAT(
      Ask(http->port(), "GET /livez HTTP/1.1\r\nHost: " + std::string(20000, 'h') + "\r\n\r\n"),
      testing::Not(HasSubstr("200 OK")));
}

TEST(Http, ATakenPortIsAnErrorThatNamesIt) {
  const HttpPages pages = {
      .metrics = [] { return ""; }, .not_live = [] { return ""; }, .not_ready = [] { return ""; }};
  const auto first = *HttpServer::Start("127.0.0.1", 0, pages);
  const auto second = HttpServer::Start("127.0.0.1", first->port(), pages);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(std::to_string(first->port())));
}

TEST(Http, SilentConnectionsDoNotKeepAProbeWaiting) {
  const auto http = *HttpServer::Start("127.0.0.1", 0,
                                       {.metrics = [] { return ""; },
                                        .not_live = [] { return ""; },
                                        .not_ready = [] { return ""; }});
  std::vector<int> silent;
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(http->port()));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  for (int i = 0; i < 50; ++i) {
    silent.push_back(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(silent.back(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  const auto began = std::chrono::steady_clock::now();
  EXPECT_THAT(Get(http->port(), "/livez"), HasSubstr("200"));
  EXPECT_LT(std::chrono::steady_clock::now() - began, std::chrono::seconds(8));
  for (const int fd : silent) close(fd);
}

}  // namespace
}  // namespace gla
