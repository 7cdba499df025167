// Every metric of the process, as members of one struct; the names are in docs, dashboards and
// tests.
//
// Built once by main and passed by reference. Every series exists, at zero, from the start. Label
// values come from fixed sets: never a session id, a user or a prompt. Counters and gauges may be
// touched from any thread; reading them for a scrape takes no lock of the engine's.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "prometheus/counter.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"

namespace gla {

// Gauges of facts that do not change, set at construction.
struct StaticFacts {
  std::string version, backend, device, model, family, dtype;
};

class Metrics {
 public:
  explicit Metrics(const StaticFacts& facts);
  ~Metrics();

  // Exposition format 0.0.4 of everything; process gauges (memory, descriptors, threads, uptime)
  // are refreshed here.
  std::string Render();

  // One finished RPC: `method` is the short name ("Generate"), `code` a gRPC status name ("OK").
  // Other methods than those of our services count as "other".
  void CountRequest(const std::string& method, const std::string& code, double seconds);
  prometheus::Counter& Rejected(
      const std::string&
          reason);  // queue_full, tokens_full,
                    // sessions_full, draining, invalid_argument, prompt_too_long, connections
  prometheus::Counter& Finished(const std::string& reason);       // length, eos, stop, cancelled,
                                                                  // deadline, error
  prometheus::Counter& SessionsEnded(const std::string& reason);  // deleted, expired, drained
  prometheus::Histogram& StepDuration(const std::string& kind);   // prefill, decode, mixed

  prometheus::Registry registry;

  // requests
  prometheus::Gauge& requests_running;
  prometheus::Gauge& requests_queued;
  prometheus::Gauge& queued_tokens;
  prometheus::Histogram& queue_time_seconds;
  prometheus::Histogram& prefill_time_seconds;
  prometheus::Histogram& decode_time_seconds;
  prometheus::Histogram& time_to_first_token_seconds;
  prometheus::Histogram& inter_token_latency_seconds;
  // tokens
  prometheus::Counter& prompt_tokens_total;  // prefilled: run through the model
  prometheus::Counter& generated_tokens_total;
  prometheus::Counter& restored_tokens_total;  // positions continued from, not computed again
  prometheus::Counter& scored_tokens_total;
  // engine
  prometheus::Histogram& step_batch_size;  // sequences in a step
  prometheus::Histogram& step_tokens;      // rows in a step
  // states
  prometheus::Gauge& slots_total;  // gla_state_slots{state="total"}
  prometheus::Gauge& slots_used;
  prometheus::Gauge& slots_pinned;  // held by sessions at rest
  prometheus::Gauge& state_bytes_per_session;
  prometheus::Gauge& sessions_device;  // gla_sessions{tier="device"}
  prometheus::Counter& sessions_created_total;
  prometheus::Counter& numeric_guard_trips_total;
  // process and device
  prometheus::Gauge& draining;           // 1 while draining
  prometheus::Gauge& connections;        // open gRPC connections
  prometheus::Gauge& log_lines_dropped;  // because nobody read them
  prometheus::Gauge& device_memory_total_bytes;
  prometheus::Gauge& device_memory_used_bytes;

 private:
  struct Families;
  std::unique_ptr<Families> families_;
};

}  // namespace gla
