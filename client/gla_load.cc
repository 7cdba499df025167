// `gla-load`: a load generator. Closed loop (N users, each sends its next request when the last one
// is done) or open loop (requests arrive at a rate, whatever the server does).
//
// Latencies are those of the client: time to first token from the moment the request was sent
// (closed loop) or should have been sent (open loop); between tokens: the time between two
// messages, shared by the tokens of the later one. With --warmup only what falls into a window of
// time counts, see Window.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "client/command.h"
#include "client/terminal.h"

namespace gla {
namespace {

using Clock = std::chrono::steady_clock;

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }
Clock::duration ToDuration(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

struct Options {
  int64_t users = 1;
  int64_t requests = 0;
  double duration = 0;
  double ramp = 0;
  double warmup = 0;
  double rate = 0;
  int64_t prompt_tokens = 16;
  int64_t new_tokens = 64;
  int64_t turns = 1;
  int64_t connections = 1;
  double temperature = 0;
  int64_t seed = 1;
};

// The time that counts: latencies are those of requests sent in it, rates are of the tokens and
// ends of requests that arrive in it, whenever these were sent.
struct Window {
  Clock::time_point begin, end;

  bool Has(Clock::time_point time) const { return begin <= time && time < end; }
};

// What one user saw; merged at the end.
struct Tally {
  std::vector<double> first_token, between_tokens, whole;  // seconds
  std::map<std::string, int64_t> codes;                    // of all requests
  int64_t finished = 0;
  int64_t tokens = 0;

  void Add(const Tally& other) {
    for (auto [to, from] :
         {std::pair(&first_token, &other.first_token),
          std::pair(&between_tokens, &other.between_tokens), std::pair(&whole, &other.whole)}) {
      to->insert(to->end(), from->begin(), from->end());
    }
    for (const auto& [code, count] : other.codes) codes[code] += count;
    finished += other.finished;
    tokens += other.tokens;
  }
};

// Hands out the moments at which requests start, until the work is done.
class Arrivals {
 public:
  Arrivals(const Options& options, Clock::time_point start)
      : options_(options), start_(start), next_(start), random_(options.seed) {}

  // The moment of the next request; false when there is none. In a closed loop it is now.
  bool Next(Clock::time_point* when) {
    std::lock_guard<std::mutex> lock(mu_);
    if (options_.requests > 0 && handed_out_ >= options_.requests) return false;
    *when = Clock::now();
    if (options_.rate > 0) {
      std::exponential_distribution<double> gap(options_.rate);
      next_ += ToDuration(gap(random_));
      *when = next_;
    }
    if (options_.duration > 0 && Seconds(*when - start_) >= options_.duration) return false;
    ++handed_out_;
    return true;
  }

 private:
  const Options& options_;
  const Clock::time_point start_;
  std::mutex mu_;
  Clock::time_point next_;
  std::mt19937_64 random_;
  int64_t handed_out_ = 0;
};

class User {
 public:
  User(const Options& options, const Common& common, const v1::GetModelInfoResponse& info,
       int64_t index, Call* call)
      : options_(options),
        client_(common.target, static_cast<int>(index % options.connections)),
        call_options_{common.timeout, call},
        random_(options.seed * 1000003 + index),
        // Ids below 3 are the special tokens of most vocabularies.
        ids_(std::min(3, info.vocab_size() - 1), info.vocab_size() - 1) {}

  void Run(Arrivals& arrivals, const Window& window) {
    window_ = window;
    Clock::time_point when;
    while (!call_options_.call->cancelled() && arrivals.Next(&when)) {
      std::this_thread::sleep_until(when);
      RunRequest(when);
    }
  }

  Tally tally;

 private:
  // One request, or with --turns a session of so many.
  void RunRequest(Clock::time_point when) {
    if (options_.turns == 1) {
      RunTurn("", when);
      return;
    }
    v1::Session session;
    const grpc::Status status = client_.CreateSession({}, &session, call_options_);
    if (!status.ok()) {
      ++tally.codes[CodeName(status.error_code())];
      return;
    }
    for (int64_t turn = 0; turn < options_.turns; ++turn) {
      if (!RunTurn(session.session_id(), turn == 0 ? when : Clock::now())) break;
    }
    client_.DeleteSession(session.session_id());
  }

  bool RunTurn(const std::string& session_id, Clock::time_point start) {
    v1::GenerateRequest request;
    for (int64_t i = 0; i < options_.prompt_tokens; ++i) {
      request.mutable_token_ids()->add_ids(ids_(random_));
    }
    request.set_session_id(session_id);
    request.set_max_new_tokens(static_cast<int32_t>(options_.new_tokens));
    request.set_ignore_eos(true);
    request.mutable_sampling()->set_temperature(static_cast<float>(options_.temperature));
    request.mutable_sampling()->set_seed(random_());
    const bool is_counted = window_.Has(start);
    bool first = true;
    Clock::time_point last = start;
    const grpc::Status status = client_.Generate(
        request,
        [&](const v1::GenerateResponse& response) {
          const int count = response.token_ids_size();
          if (count == 0) return;
          const Clock::time_point now = Clock::now();
          if (window_.Has(now)) tally.tokens += count;
          if (is_counted) AddLatencies(Seconds(now - last), count, first);
          first = false;
          last = now;
        },
        call_options_);
    ++tally.codes[CodeName(status.error_code())];
    if (!status.ok()) return false;
    const Clock::time_point end = Clock::now();
    if (window_.Has(end)) ++tally.finished;
    if (is_counted) tally.whole.push_back(Seconds(end - start));
    return true;
  }

  // Of a message with `count` tokens, `gap` seconds after the one before it.
  void AddLatencies(double gap, int count, bool first) {
    (first ? tally.first_token : tally.between_tokens).push_back(first ? gap : gap / count);
    for (int i = 1; i < count; ++i) tally.between_tokens.push_back(first ? 0 : gap / count);
  }

  const Options& options_;
  Window window_;
  Client client_;
  CallOptions call_options_;
  std::mt19937_64 random_;
  std::uniform_int_distribution<int32_t> ids_;
};

nlohmann::ordered_json Percentiles(std::vector<double> values) {
  nlohmann::ordered_json json;
  std::sort(values.begin(), values.end());
  for (const auto& [name, part] :
       {std::pair("p50", .5), std::pair("p90", .9), std::pair("p99", .99), std::pair("max", 1.)}) {
    const size_t index = std::min<size_t>(
        values.size() - 1, static_cast<size_t>(part * static_cast<double>(values.size())));
    json[name] = values.empty() ? 0 : values[index];
  }
  return json;
}

void PrintRow(const char* name, const nlohmann::ordered_json& percentiles) {
  std::printf("%-20s", name);
  for (const char* key : {"p50", "p90", "p99", "max"}) {
    std::printf("  %s %9.2f", key, percentiles[key].get<double>() * 1e3);
  }
  std::printf("  ms\n");
}

// What is wrong with the times, or nothing.
std::string CheckTimes(const Options& options) {
  for (const auto& [name, value] :
       {std::pair("ramp", options.ramp), std::pair("warmup", options.warmup)}) {
    std::ostringstream error;
    error << "--" << name << ": expected ";
    if (value < 0) {
      error << "0 or more seconds, got " << value;
      return error.str();
    }
    if (options.duration > 0 && value >= options.duration) {
      error << "less than --duration " << options.duration << ", got " << value;
      return error.str();
    }
  }
  if (options.ramp > 0 && options.rate > 0) {
    return "--ramp: expected a closed loop, got --rate, which spreads requests by itself";
  }
  if (options.warmup > 0 && options.duration <= 0) {
    return "--warmup: expected --duration, which ends what is counted, got none";
  }
  return "";
}

// Starts the users, spread over --ramp, and waits until all are done. The window that counts.
Window RunUsers(const Options& options, const std::vector<std::unique_ptr<Call>>& calls,
                const std::vector<std::unique_ptr<User>>& users) {
  const Clock::time_point start = Clock::now();
  const Window window = {
      start + ToDuration(options.warmup),
      options.warmup > 0 ? start + ToDuration(options.duration) : Clock::time_point::max()};
  Arrivals arrivals(options, start);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < users.size() && !calls[i]->cancelled(); ++i) {
    const Clock::time_point begin = start + ToDuration(options.ramp * static_cast<double>(i) /
                                                       static_cast<double>(users.size()));
    while (Clock::now() < begin && !calls[i]->cancelled()) {
      std::this_thread::sleep_until(std::min(begin, Clock::now() + std::chrono::milliseconds(100)));
    }
    threads.emplace_back([&, i] { users[i]->Run(arrivals, window); });
  }
  for (std::thread& thread : threads) thread.join();
  return {window.begin, std::min(Clock::now(), window.end)};
}

int Main(const std::vector<std::string>& arguments) {
  Common common;
  Options options;
  Args args;
  args.Add("users", &options.users, "closed loop: users; open loop: most requests at once");
  args.Add("requests", &options.requests, "end after so many requests (with --turns: sessions)");
  args.Add("duration", &options.duration, "end after so many seconds");
  args.Add("ramp", &options.ramp,
           "closed loop: the users begin evenly spread over so many seconds (default 0: at once)");
  args.Add("warmup", &options.warmup,
           "with --duration: latencies of requests sent, rates of what arrives, from so many "
           "seconds on to the duration's end");
  args.Add("rate", &options.rate, "open loop: requests per second, Poisson; 0: closed loop");
  args.Add("prompt-tokens", &options.prompt_tokens, "random token ids per prompt (default 16)");
  args.Add("new-tokens", &options.new_tokens, "generated per request, exactly (default 64)");
  args.Add("turns", &options.turns, "above 1: each request is a session of so many turns");
  args.Add("connections", &options.connections, "TCP connections that the users share");
  args.Add("temperature", &options.temperature, "0: greedy");
  args.Add("seed", &options.seed, "of prompts, arrivals and sampling");
  AddCommon(&args, &common);
  std::vector<std::string> words;
  if (std::string error = args.Parse(arguments, &words); !error.empty()) return UsageError(error);
  if (common.help) {
    std::cout << "gla-load: load a gla-server and print latencies and rates\n" << args.Help();
    return kExitOk;
  }
  if (!words.empty()) return UsageError("unexpected \"" + words[0] + "\"");
  for (const auto& [name, value] :
       {std::pair("users", options.users), std::pair("prompt-tokens", options.prompt_tokens),
        std::pair("new-tokens", options.new_tokens), std::pair("turns", options.turns),
        std::pair("connections", options.connections)}) {
    if (value < 1 || value > 1000000) {
      return UsageError("--" + std::string(name) + ": expected 1 .. 1000000, got " +
                        std::to_string(value));
    }
  }
  if (std::string error = CheckTimes(options); !error.empty()) return UsageError(error);
  if (options.requests <= 0 && options.duration <= 0) options.requests = options.users * 4;

  Call* call = InterruptibleCall();
  v1::GetModelInfoResponse info;
  {
    Client client(common.target);
    const grpc::Status status = client.GetModelInfo(&info, {common.timeout, call});
    if (!status.ok()) return Report(status, common);
  }
  std::vector<std::unique_ptr<Call>> calls;
  std::vector<std::unique_ptr<User>> users;
  for (int64_t i = 0; i < options.users; ++i) {
    calls.push_back(std::make_unique<Call>());
    users.push_back(std::make_unique<User>(options, common, info, i, calls.back().get()));
  }
  SetInterruptHandler([&calls] {
    for (const auto& one : calls) one->Cancel();
  });
  const Window window = RunUsers(options, calls, users);
  SetInterruptHandler(nullptr);
  // Above 0 also when the warm-up was interrupted.
  const double seconds = std::max(Seconds(window.end - window.begin), 1e-9);
  Tally tally;
  for (const auto& user : users) tally.Add(user->tally);

  int64_t failed = 0;
  for (const auto& [code, count] : tally.codes) failed += code == "OK" ? 0 : count;
  nlohmann::ordered_json json = {
      {"model", info.model()},
      {"backend", info.backend()},
      {"device", info.device()},
      {"users", options.users},
      {"rate", options.rate},
      {"ramp_seconds", options.ramp},
      {"warmup_seconds", options.warmup},
      {"prompt_tokens", options.prompt_tokens},
      {"new_tokens", options.new_tokens},
      {"turns", options.turns},
      {"seconds", seconds},
      {"requests_ok", tally.finished},
      {"requests_failed", failed},
      {"codes", tally.codes},
      {"requests_per_second", static_cast<double>(tally.finished) / seconds},
      {"generated_tokens", tally.tokens},
      {"tokens_per_second", static_cast<double>(tally.tokens) / seconds},
      {"prompt_tokens_per_second",
       static_cast<double>(tally.finished * options.prompt_tokens) / seconds},
      {"time_to_first_token_seconds", Percentiles(tally.first_token)},
      {"between_tokens_seconds", Percentiles(tally.between_tokens)},
      {"request_seconds", Percentiles(tally.whole)}};
  if (common.json) {
    std::cout << json.dump() << std::endl;
  } else {
    std::printf("%s on %s (%s): %lld users, prompts of %lld, %lld new tokens, %lld turns\n",
                info.model().c_str(), info.device().c_str(), info.backend().c_str(),
                static_cast<long long>(options.users),
                static_cast<long long>(options.prompt_tokens),
                static_cast<long long>(options.new_tokens), static_cast<long long>(options.turns));
    PrintRow("time to first token", json["time_to_first_token_seconds"]);
    PrintRow("between tokens", json["between_tokens_seconds"]);
    PrintRow("whole request", json["request_seconds"]);
    std::printf("%.1f s, %lld requests, %.1f requests/s, %.0f new tokens/s, %.0f prompt tokens/s\n",
                seconds, static_cast<long long>(tally.finished),
                json["requests_per_second"].get<double>(), json["tokens_per_second"].get<double>(),
                json["prompt_tokens_per_second"].get<double>());
    for (const auto& [code, count] : tally.codes) {
      if (code != "OK") std::printf("%s: %lld\n", code.c_str(), static_cast<long long>(count));
    }
  }
  return failed == 0 ? kExitOk : kExitFailed;
}

}  // namespace
}  // namespace gla

int main(int argc, char** argv) {
  gla::SetInterruptHandler(nullptr);
  return gla::Main(std::vector<std::string>(argv + 1, argv + argc));
}
