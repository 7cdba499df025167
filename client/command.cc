#include "client/command.h"

#include <unistd.h>

#include <csignal>
#include <fstream>
#include <iostream>
#include <iterator>
#include <mutex>
#include <thread>

#include "client/terminal.h"

namespace gla {
namespace {

std::mutex interrupt_mu;
std::function<void()> interrupt_handler;  // guarded by interrupt_mu

// SIGINT is taken by a thread of its own, since cancelling a call takes locks.
void WatchInterrupts() {
  static std::once_flag once;
  std::call_once(once, [] {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGINT);
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    std::thread([set] {
      for (int count = 1;; ++count) {
        int signal = 0;
        if (sigwait(&set, &signal) != 0) continue;
        std::lock_guard<std::mutex> lock(interrupt_mu);
        if (!interrupt_handler) _exit(kExitInterrupted);
        interrupt_handler();
      }
    }).detach();
  });
}

}  // namespace

void SetInterruptHandler(std::function<void()> handler) {
  WatchInterrupts();
  std::lock_guard<std::mutex> lock(interrupt_mu);
  interrupt_handler = std::move(handler);
}

Call* InterruptibleCall() {
  static Call call;
  SetInterruptHandler([] {
    if (call.cancelled()) _exit(kExitInterrupted);
    call.Cancel();
  });
  return &call;
}

int ExitCodeOf(const grpc::Status& status) {
  switch (status.error_code()) {
    case grpc::OK:
      return kExitOk;
    case grpc::CANCELLED:
      return kExitInterrupted;
    case grpc::UNAVAILABLE:
      return kExitUnreachable;
    case grpc::RESOURCE_EXHAUSTED:
    case grpc::DEADLINE_EXCEEDED:
      return kExitTryLater;
    case grpc::INVALID_ARGUMENT:
    case grpc::NOT_FOUND:
    case grpc::ALREADY_EXISTS:
    case grpc::PERMISSION_DENIED:
    case grpc::UNAUTHENTICATED:
    case grpc::FAILED_PRECONDITION:
    case grpc::ABORTED:
    case grpc::OUT_OF_RANGE:
    case grpc::UNIMPLEMENTED:
      return kExitRefused;
    default:
      return kExitFailed;
  }
}

void AddCommon(Args* args, Common* common, bool with_timeout) {
  args->Add("target", &common->target, "server as HOST:PORT (default 127.0.0.1:8001)");
  if (with_timeout) {
    args->Add("timeout", &common->timeout, "seconds after which the request ends; 0: none");
  }
  args->Add("json", &common->json, "print JSON, one object on the last line");
  args->Add("help", &common->help, "this text");
}

int Report(const grpc::Status& status, const Common& common) {
  if (common.json) {
    std::cout << Dump({{"error",
                        {{"code", CodeName(status.error_code())},
                         {"message", status.error_message()}}}})
              << std::endl;
  } else {
    std::cerr << Styled(STDERR_FILENO, Style::kRed, "gla: " + CodeName(status.error_code())) << ": "
              << status.error_message() << std::endl;
  }
  return ExitCodeOf(status);
}

int UsageError(const std::string& message) {
  std::cerr << "gla: " << message << std::endl;
  return kExitUsage;
}

bool ReadFile(const std::string& path, std::string* contents, std::string* error) {
  if (path == "-") {
    contents->assign(std::istreambuf_iterator<char>(std::cin), {});
    return true;
  }
  std::ifstream file(path, std::ios::binary);
  if (file) contents->assign(std::istreambuf_iterator<char>(file), {});
  if (!file || file.bad()) {
    *error = path + ": cannot be read";
    return false;
  }
  return true;
}

std::string Dump(const nlohmann::json& json) {
  return json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

}  // namespace gla
