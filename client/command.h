// What the commands of `gla` share: the common flags, exit codes, Ctrl-C, and how errors are shown.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "client/args.h"
#include "client/client.h"

namespace gla {

// Exit codes, for scripts.
enum ExitCode {
  kExitOk = 0,
  kExitFailed = 1,       // the server failed (INTERNAL, ...), or is not serving (`gla health`)
  kExitUsage = 2,        // bad flag or unreadable file, found before anything was sent
  kExitUnreachable = 3,  // UNAVAILABLE: no server, loading or draining
  kExitRefused =
      4,  // the request was wrong: INVALID_ARGUMENT, NOT_FOUND, ALREADY_EXISTS, ABORTED, ...
  kExitTryLater = 5,  // RESOURCE_EXHAUSTED, DEADLINE_EXCEEDED
  kExitInterrupted = 130,
};
int ExitCodeOf(const grpc::Status& status);

struct Common {
  std::string target = "127.0.0.1:8001";
  double timeout = 0;
  bool json = false;
  bool help = false;
};
void AddCommon(Args* args, Common* common, bool with_timeout = true);

// Prints the error (as JSON with --json) and gives the exit code.
int Report(const grpc::Status& status, const Common& common);
int UsageError(const std::string& message);

// Cancels `call` at the first Ctrl-C; exits at the second. One at a time.
Call* InterruptibleCall();
// Called on Ctrl-C instead of cancelling a call, when set.
void SetInterruptHandler(std::function<void()> handler);

// The whole file ("-": standard input), or a message.
bool ReadFile(const std::string& path, std::string* contents, std::string* error);

// `text` as a JSON string; bytes that are no UTF-8 come out as U+FFFD.
std::string Dump(const nlohmann::json& json);

// Each command gets the words behind its name and returns the exit code.
int GenerateCommand(const std::vector<std::string>& arguments);
int ChatCommand(const std::vector<std::string>& arguments);
int ScoreCommand(const std::vector<std::string>& arguments);
int TokenizeCommand(const std::vector<std::string>& arguments);
int SessionsCommand(const std::vector<std::string>& arguments);
int InfoCommand(const std::vector<std::string>& arguments);
int HealthCommand(const std::vector<std::string>& arguments);

}  // namespace gla
