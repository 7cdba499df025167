#include "telemetry/metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <fstream>
#include <map>
#include <string_view>
#include <utility>
#include <vector>

#include "prometheus/family.h"
#include "prometheus/text_serializer.h"

namespace gla {
namespace {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Registry;
using Buckets = Histogram::BucketBoundaries;

// Fit for decode steps below a millisecond and for requests of a minute.
const Buckets& Latency() {
  static const Buckets buckets = {.0005, .001, .002, .003, .005, .0075, .01, .025, .05, .075, .1,
                                  .15,   .2,   .3,   .5,   .75,  1,     2.5, 5,    10,  30,   60};
  return buckets;
}

Buckets PowersOfTwo(double last) {
  Buckets buckets;
  for (double b = 1; b <= last; b *= 2) buckets.push_back(b);
  return buckets;
}

Gauge& AddGauge(Registry& registry, const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry).Add({});
}

Counter& AddCounter(Registry& registry, const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

Histogram& AddHistogram(Registry& registry, const std::string& name, const std::string& help,
                        const Buckets& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

prometheus::Family<Gauge>& SlotsFamily(Registry& registry) {
  return prometheus::BuildGauge()
      .Name("gla_state_slots")
      .Help("Slots for recurrent states: in all, in use, held by sessions at rest.")
      .Register(registry);
}

// The fixed label values. Whatever else comes is counted under the last one.
const std::vector<std::string>& Methods() {
  static const std::vector<std::string> names = {
      "Generate",     "Converse",      "Score",         "Tokenize",      "Detokenize",
      "GetModelInfo", "CreateSession", "GetSession",    "ListSessions",  "DeleteSession",
      "ForkSession",  "RewindSession", "ExportSession", "ImportSession", "other"};
  return names;
}

const std::vector<std::string>& Codes() {
  static const std::vector<std::string> names = {"OK",
                                                 "CANCELLED",
                                                 "INVALID_ARGUMENT",
                                                 "DEADLINE_EXCEEDED",
                                                 "NOT_FOUND",
                                                 "ALREADY_EXISTS",
                                                 "PERMISSION_DENIED",
                                                 "RESOURCE_EXHAUSTED",
                                                 "FAILED_PRECONDITION",
                                                 "ABORTED",
                                                 "OUT_OF_RANGE",
                                                 "UNIMPLEMENTED",
                                                 "INTERNAL",
                                                 "UNAVAILABLE",
                                                 "DATA_LOSS",
                                                 "UNAUTHENTICATED",
                                                 "UNKNOWN"};
  return names;
}

// Label value -> series, all made at the start: reading needs no lock.
template <typename T>
using Series = std::map<std::string, T*, std::less<>>;

template <typename T, typename... Args>
Series<T> MakeSeries(prometheus::Family<T>& family, const std::string& label,
                     const std::vector<std::string>& values, const Args&... args) {
  Series<T> series;
  for (const std::string& value : values) series[value] = &family.Add({{label, value}}, args...);
  return series;
}

// An unknown value is our own mistake; abort rather than grow a label set.
template <typename T>
T& Get(const Series<T>& series, const std::string& value) {
  const auto it = series.find(value);
  if (it == series.end()) std::abort();
  return *it->second;
}

Series<Counter> CounterSeries(Registry& registry, const std::string& name, const std::string& help,
                              const std::string& label, const std::vector<std::string>& values) {
  return MakeSeries(prometheus::BuildCounter().Name(name).Help(help).Register(registry), label,
                    values);
}

Series<Histogram> HistogramSeries(Registry& registry, const std::string& name,
                                  const std::string& help, const std::string& label,
                                  const std::vector<std::string>& values) {
  return MakeSeries(prometheus::BuildHistogram().Name(name).Help(help).Register(registry), label,
                    values, Latency());
}

double SecondsOf(const timeval& t) {
  return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
}

int CountEntries(const char* folder) {
  DIR* dir = opendir(folder);
  if (dir == nullptr) return 0;
  int n = 0;
  while (const dirent* entry = readdir(dir)) n += entry->d_name[0] != '.';
  closedir(dir);
  return n;
}

double ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  double size = 0, resident = 0;
  statm >> size >> resident;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

}  // namespace

struct Metrics::Families {
  explicit Families(Registry& registry)
      : rejected(CounterSeries(registry, "gla_rejections_total",
                               "Requests and connections refused before any work, by reason.",
                               "reason",
                               {"queue_full", "tokens_full", "sessions_full", "draining",
                                "invalid_argument", "prompt_too_long", "connections"})),
        finished(CounterSeries(registry, "gla_finished_total", "Generations that ended, by reason.",
                               "reason",
                               {"length", "eos", "stop", "cancelled", "deadline", "error"})),
        sessions_ended(CounterSeries(registry, "gla_sessions_ended_total",
                                     "Sessions that ended, by reason.", "reason",
                                     {"deleted", "expired", "drained"})),
        step_duration(HistogramSeries(registry, "gla_step_duration_seconds",
                                      "Time of one step, by what it held.", "kind",
                                      {"prefill", "decode", "mixed"})),
        request_duration(HistogramSeries(registry, "gla_request_duration_seconds",
                                         "Arrival of a call to its status, by method.", "method",
                                         Methods())),
        start_time(AddGauge(registry, "process_start_time_seconds",
                            "When this process began to serve, seconds since 1970.")),
        uptime(AddGauge(registry, "gla_uptime_seconds", "Seconds since the process began.")),
        resident(AddGauge(registry, "process_resident_memory_bytes", "Resident memory.")),
        descriptors(AddGauge(registry, "process_open_fds", "Open file descriptors.")),
        max_descriptors(AddGauge(registry, "process_max_fds", "Limit of open file descriptors.")),
        threads(AddGauge(registry, "process_threads", "Threads.")),
        cpu_seconds(AddCounter(registry, "process_cpu_seconds_total",
                               "User and system time of all threads.")) {
    auto& family = prometheus::BuildCounter()
                       .Name("gla_requests_total")
                       .Help("Calls answered, by method and gRPC status code.")
                       .Register(registry);
    for (const std::string& method : Methods()) {
      for (const std::string& code : Codes()) {
        requests[{method, code}] = &family.Add({{"method", method}, {"code", code}});
      }
    }
  }

  std::map<std::pair<std::string, std::string>, Counter*> requests;
  Series<Counter> rejected, finished, sessions_ended;
  Series<Histogram> step_duration, request_duration;
  Gauge& start_time;
  Gauge& uptime;
  Gauge& resident;
  Gauge& descriptors;
  Gauge& max_descriptors;
  Gauge& threads;
  Counter& cpu_seconds;
  const std::chrono::steady_clock::time_point started = std::chrono::steady_clock::now();
};

Metrics::Metrics(const StaticFacts& facts)
    : requests_running(AddGauge(registry, "gla_requests_running", "Requests in the batch.")),
      requests_queued(AddGauge(registry, "gla_requests_queued", "Requests waiting.")),
      queued_tokens(AddGauge(registry, "gla_queued_tokens", "Prompt tokens waiting.")),
      queue_time_seconds(AddHistogram(registry, "gla_queue_time_seconds",
                                      "Accepted to first scheduled.", Latency())),
      prefill_time_seconds(AddHistogram(registry, "gla_prefill_time_seconds",
                                        "First scheduled to first token.", Latency())),
      decode_time_seconds(
          AddHistogram(registry, "gla_decode_time_seconds", "First to last token.", Latency())),
      time_to_first_token_seconds(AddHistogram(registry, "gla_time_to_first_token_seconds",
                                               "Arrival to first token.", Latency())),
      inter_token_latency_seconds(AddHistogram(registry, "gla_inter_token_latency_seconds",
                                               "From one token of a request to its next.",
                                               Latency())),
      prompt_tokens_total(
          AddCounter(registry, "gla_prompt_tokens_total", "Prompt tokens run through the model.")),
      generated_tokens_total(
          AddCounter(registry, "gla_generated_tokens_total", "Tokens generated.")),
      restored_tokens_total(AddCounter(registry, "gla_restored_tokens_total",
                                       "Positions of sessions continued from, not run again.")),
      scored_tokens_total(AddCounter(registry, "gla_scored_tokens_total", "Tokens scored.")),
      step_batch_size(
          AddHistogram(registry, "gla_step_batch_size", "Sequences in a step.", PowersOfTwo(1024))),
      step_tokens(
          AddHistogram(registry, "gla_step_tokens", "Tokens run in a step.", PowersOfTwo(16384))),
      slots_total(SlotsFamily(registry).Add({{"state", "total"}})),
      slots_used(SlotsFamily(registry).Add({{"state", "used"}})),
      slots_pinned(SlotsFamily(registry).Add({{"state", "pinned"}})),
      state_bytes_per_session(
          AddGauge(registry, "gla_state_bytes_per_session", "Memory of one recurrent state.")),
      sessions_device(prometheus::BuildGauge()
                          .Name("gla_sessions")
                          .Help("Sessions, by where their state rests.")
                          .Register(registry)
                          .Add({{"tier", "device"}})),
      sessions_created_total(
          AddCounter(registry, "gla_sessions_created_total", "Sessions created.")),
      numeric_guard_trips_total(AddCounter(registry, "gla_numeric_guard_trips_total",
                                           "Requests ended because of non-finite logits.")),
      draining(AddGauge(registry, "gla_draining", "1 while the server drains.")),
      connections(AddGauge(registry, "gla_connections", "Open gRPC connections.")),
      log_lines_dropped(AddGauge(registry, "gla_log_lines_dropped",
                                 "Log lines that nobody read, since the start.")),
      device_memory_total_bytes(
          AddGauge(registry, "gla_device_memory_total_bytes", "Memory of the device.")),
      device_memory_used_bytes(AddGauge(registry, "gla_device_memory_used_bytes",
                                        "Memory of the device in use, by anyone.")),
      families_(std::make_unique<Families>(registry)) {
  prometheus::BuildGauge()
      .Name("gla_build_info")
      .Help("1, with what is served and how as labels.")
      .Register(registry)
      .Add({{"version", facts.version},
            {"backend", facts.backend},
            {"device", facts.device},
            {"model", facts.model},
            {"family", facts.family},
            {"dtype", facts.dtype}})
      .Set(1);
  families_->start_time.SetToCurrentTime();
}

Metrics::~Metrics() = default;

std::string Metrics::Render() {
  Families& f = *families_;
  f.uptime.Set(std::chrono::duration<double>(std::chrono::steady_clock::now() - f.started).count());
  f.resident.Set(ResidentBytes());
  f.descriptors.Set(CountEntries("/proc/self/fd") - 1);  // less the one that reads the folder
  f.threads.Set(CountEntries("/proc/self/task"));
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    f.max_descriptors.Set(static_cast<double>(limit.rlim_cur));
  }
  rusage usage = {};
  if (getrusage(RUSAGE_SELF, &usage) == 0) {
    // Two scrapes at once may both add a difference; a negative one is ignored by the counter.
    f.cpu_seconds.Increment(SecondsOf(usage.ru_utime) + SecondsOf(usage.ru_stime) -
                            f.cpu_seconds.Value());
  }
  return prometheus::TextSerializer().Serialize(registry.Collect());
}

void Metrics::CountRequest(const std::string& method, const std::string& code, double seconds) {
  const bool known = families_->request_duration.contains(method);
  const std::string& name = known ? method : Methods().back();
  auto it = families_->requests.find({name, code});
  if (it == families_->requests.end()) it = families_->requests.find({name, Codes().back()});
  it->second->Increment();
  Get(families_->request_duration, name).Observe(seconds);
}

Counter& Metrics::Rejected(const std::string& reason) { return Get(families_->rejected, reason); }
Counter& Metrics::Finished(const std::string& reason) { return Get(families_->finished, reason); }
Counter& Metrics::SessionsEnded(const std::string& reason) {
  return Get(families_->sessions_ended, reason);
}
Histogram& Metrics::StepDuration(const std::string& kind) {
  return Get(families_->step_duration, kind);
}

}  // namespace gla
