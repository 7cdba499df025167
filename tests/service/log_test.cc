#include "base/log.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <limits>

namespace gla {
namespace {

using testing::HasSubstr;

const absl::Time kTime = absl::FromUnixMillis(1700000000123);

// Both ends of a pipe.
struct Pipe {
  Pipe() { EXPECT_EQ(pipe2(ends, O_CLOEXEC), 0); }
  ~Pipe() {
    for (const int end : ends) {
      if (end >= 0) close(end);
    }
  }
  std::string Read() {
    std::string text(65536, '\0');
    const ssize_t n = read(ends[0], text.data(), text.size());
    return text.substr(0, n > 0 ? static_cast<size_t>(n) : 0);
  }
  int ends[2] = {-1, -1};
};

TEST(Log, TextIsOneReadableLine) {
  EXPECT_EQ(
      Logger::Format(
          LogFormat::kText, kTime, "info", "request",
          {{"id", "r-1"}, {"tokens", 5}, {"s", 0.25}, {"session", true}, {"why", "a b"}}),
      "2023-11-14T22:13:20.123Z info request id=r-1 tokens=5 s=0.25 session=true why=\"a b\"\n");
}

TEST(Log, JsonIsOneObject) {
  EXPECT_EQ(
      Logger::Format(LogFormat::kJson, kTime, "warn", "say \"hi\"",
                     {{"id", "x\n"}, {"nan", std::numeric_limits<double>::quiet_NaN()}}),
      "{\"time\":\"2023-11-14T22:13:20.123Z\",\"level\":\"warn\",\"message\":\"say \\\"hi\\\"\","
      "\"id\":\"x\\u000a\",\"nan\":null}\n");
}

TEST(Log, ALongValueIsCut) {
  const std::string line =
      Logger::Format(LogFormat::kText, kTime, "info", "m", {{"v", std::string(5000, 'x')}});
  EXPECT_LT(line.size(), 2000u);
  EXPECT_THAT(line, HasSubstr("xxx..."));
}

TEST(Log, AFullPipeDropsLinesAndNeverBlocks) {
  Pipe pipe;
  Logger log(LogFormat::kText, pipe.ends[1]);
  for (int i = 0; i < 2000; ++i) log.Info("a line that fills the pipe", {{"i", i}});
  EXPECT_GT(log.num_dropped(), 0);
  const std::string text = pipe.Read();
  EXPECT_EQ(text.back(), '\n');  // whole lines only
  log.Info("again");
  EXPECT_THAT(pipe.Read(), HasSubstr("again"));
}

TEST(Log, AClosedPipeDropsLines) {
  signal(SIGPIPE, SIG_IGN);
  Pipe pipe;
  close(std::exchange(pipe.ends[0], -1));
  Logger log(LogFormat::kText, pipe.ends[1]);
  log.Info("nobody reads this");
  EXPECT_EQ(log.num_dropped(), 1);
}

TEST(Log, LimitedWritesOneLineASecondAndCountsTheRest) {
  Pipe pipe;
  Logger log(LogFormat::kText, pipe.ends[1]);
  for (int i = 0; i < 100; ++i) log.Limited("grpc", "the same again");
  log.Limited("protobuf", "another source");
  const std::string text = pipe.Read();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 2);
  sleep(1);
  log.Limited("grpc", "later");
  EXPECT_THAT(pipe.Read(), HasSubstr("left_out=99"));
}

}  // namespace
}  // namespace gla
