#include "config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>

namespace gla {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

using Env = std::map<std::string, std::string>;

absl::StatusOr<Config> Parse(std::vector<std::string> args, const Env& env = {}) {
  args.insert(args.begin(), "--model=m");
  return ParseConfig(args, [&](const std::string& name) {
    const auto it = env.find(name);
    return it == env.end() ? nullptr : it->second.c_str();
  });
}

std::string ErrorOf(const std::vector<std::string>& args, const Env& env = {}) {
  const absl::StatusOr<Config> config = Parse(args, env);
  return config.ok() ? "" : std::string(config.status().message());
}

TEST(Config, DefaultsAreTheContracts) {
  const Config config = *Parse({});
  EXPECT_EQ(config.port, 8001);
  EXPECT_EQ(config.http_port, 8002);
  EXPECT_EQ(config.host, "0.0.0.0");
  EXPECT_EQ(config.max_connections, 1024);
  EXPECT_EQ(config.max_new_tokens_limit, 8192);
  EXPECT_EQ(config.max_prompt_tokens, 32768);
  EXPECT_EQ(config.session_ttl, 900);
  EXPECT_EQ(config.shutdown_timeout, 25);
  EXPECT_EQ(config.log(), LogFormat::kText);
}

TEST(Config, BothSpellingsOfAFlagAreRead) {
  EXPECT_EQ(Parse({"--port=7"})->port, 7);
  EXPECT_EQ(Parse({"--port", "7"})->port, 7);
  EXPECT_EQ(Parse({"--log-format=json"})->log(), LogFormat::kJson);
  EXPECT_EQ(*Parse({"--seed=18446744073709551615"})->seed, 18446744073709551615u);
}

TEST(Config, TheFlagBeatsTheEnvironmentWhichBeatsTheDefault) {
  EXPECT_EQ(Parse({}, {{"GLA_MAX_NUM_SEQS", "5"}})->max_num_seqs, 5);
  EXPECT_EQ(Parse({"--max-num-seqs=6"}, {{"GLA_MAX_NUM_SEQS", "5"}})->max_num_seqs, 6);
  EXPECT_EQ(Parse({}, {{"GLA_MAX_NUM_SEQS", ""}})->max_num_seqs, 64);
  EXPECT_THAT(ErrorOf({}, {{"GLA_PORT", "tcp://10.0.0.1:80"}}),
              StartsWith("GLA_PORT: expected an integer in 0 .. 65535, got \"tcp:"));
}

TEST(Config, BytesHaveSuffixes) {
  EXPECT_EQ(Parse({"--state-memory=auto"})->state_memory, 0);
  EXPECT_EQ(Parse({"--state-memory=4096"})->state_memory, 4096);
  EXPECT_EQ(Parse({"--state-memory=3KiB"})->state_memory, 3072);
  EXPECT_EQ(Parse({"--state-memory=1.5GiB"})->state_memory, 3ll << 29);
  for (const char* bad : {"", "-1", "0", "1GB", "nan", "inf", "1e30", "KiB", "1 MiB x"}) {
    EXPECT_THAT(ErrorOf({std::string("--state-memory=") + bad}),
                HasSubstr("--state-memory: expected"))
        << bad;
  }
}

TEST(Config, ABadValueNamesFlagValueAndWhatWasExpected) {
  EXPECT_EQ(ErrorOf({"--port=65536"}), "--port: expected an integer in 0 .. 65535, got \"65536\"");
  EXPECT_EQ(ErrorOf({"--port=80x"}), "--port: expected an integer in 0 .. 65535, got \"80x\"");
  EXPECT_EQ(ErrorOf({"--dtype=float16"}), "--dtype: expected float32 or bfloat16, got \"float16\"");
  EXPECT_THAT(ErrorOf({"--shutdown-timeout=nan"}),
              HasSubstr("--shutdown-timeout: expected seconds"));
  EXPECT_THAT(ErrorOf({"--nope=1"}), HasSubstr("got \"--nope\""));
  EXPECT_THAT(ErrorOf({"stray"}), HasSubstr("got \"stray\""));
  EXPECT_THAT(ErrorOf({"--port"}), HasSubstr("--port: expected a value"));
  EXPECT_THAT(ErrorOf({"--help=yes"}), HasSubstr("--help: expected no value"));
}

TEST(Config, FlagsThatDoNotFitTogetherAreRefused) {
  EXPECT_THAT(ErrorOf({"--max-num-seqs=64", "--max-num-batched-tokens=32"}),
              HasSubstr("--max-num-batched-tokens: expected at least --max-num-seqs = 64, got 32"));
  EXPECT_THAT(ErrorOf({"--port=80", "--http-port=80"}), HasSubstr("--http-port"));
  EXPECT_THAT(ErrorOf({"--max-num-queued-tokens=10"}), HasSubstr("--max-prompt-tokens"));
  EXPECT_THAT(
      std::string(ParseConfig({}, [](const std::string&) { return nullptr; }).status().message()),
      HasSubstr("--model: expected"));
}

TEST(Config, HelpNamesEveryFlagAndItsDefault) {
  const std::string help = HelpText();
  EXPECT_TRUE(ParseConfig({"--help"}, [](const std::string&) { return nullptr; })->help);
  for (const char* flag : {"--model", "--served-model-name", "--state-memory", "--session-ttl",
                           "--shutdown-timeout", "--log-format", "--max-new-tokens-limit"}) {
    EXPECT_THAT(help, HasSubstr(flag));
  }
  EXPECT_THAT(help, HasSubstr("(default 8001)"));
}

TEST(Config, DescribeCanBeParsedAgain) {
  const Config config = *Parse({"--port=5", "--state-memory=1MiB", "--log-format=json"});
  std::vector<std::string> args;
  std::string word;
  for (const char c : Describe(config) + " ") {
    if (c != ' ') {
      word += c;
    } else {
      args.push_back(std::exchange(word, ""));
    }
  }
  EXPECT_EQ(Describe(*Parse(args)), Describe(config));
}

}  // namespace
}  // namespace gla
